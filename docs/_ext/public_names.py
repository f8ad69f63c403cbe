"""Document every public name of a module, and check that none is missing.

``.. public-names:: falcon_jax`` lists classes, functions and values. A name that an earlier one of
`names.MODULES` documents, too, becomes a link to it: nothing stands twice.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Mapping

from docutils import nodes
from docutils.statemachine import StringList
from names import reference
from sphinx.domains.python import PyObject
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import stringify_annotation


class PublicNames(SphinxDirective):
    """The directive."""

    required_arguments = 1

    def run(self):
        """Return the nodes of classes, functions, values and names that stand elsewhere."""
        module = self.arguments[0]
        groups = {"Classes": [], "Functions": [], "Values": [], "Modules": [], "Elsewhere": []}
        for (owner, name), (value, place) in sorted(reference().items(), key=_by_name):
            if owner != module:
                continue
            if isinstance(value, types.ModuleType):
                text = f"- :doc:`{place} <{place.rpartition('.')[2]}>`"
                groups["Modules"].append(text)
            elif place != f"{module}.{name}":
                groups["Elsewhere"].append(f"- :py:obj:`{place}`")
            elif inspect.isclass(value) and value.__name__ == name:
                groups["Classes"] += _documented("class", place, ":members:")
            elif inspect.isfunction(value):
                groups["Functions"] += _documented("function", place)
            else:
                groups["Values"] += [f".. py:data:: {name}", "", f"   {_told(value)}", ""]
        text = [".. py:module:: " + module, ""]
        for title, lines in groups.items():
            if lines:
                text += [f".. rubric:: {title}", "", *lines, ""]
        parent = nodes.section()
        parent.document = self.state.document
        self.state.nested_parse(StringList(text, source=module), 0, parent)
        return parent.children


def _by_name(entry):
    (_, name), _ = entry
    return name.lower()


def _documented(kind, place, *options):
    return [f".. auto{kind}:: {place}", *(f"   {option}" for option in options), ""]


def _told(value):
    if isinstance(value, str | int | tuple | list):
        return f"``{value!r}``"
    if isinstance(value, Mapping):
        return "By name: " + ", ".join(f"``{name}``" for name in value) + "."
    return f"A type: ``{stringify_annotation(value, mode='smart').replace('~', '')}``"


def signature_as_written(app, what, name, value, options, signature, returns):
    """Return a signature as the source has it: shapes in types stay readable."""
    if what == "class" and dataclasses.is_dataclass(value):
        return _fields(value), None
    if what == "class":
        value = value.__init__  # Flax's metaclass hides it
    elif what not in ("function", "method"):
        return None
    ours = getattr(value, "__module__", None) or ""
    function = _source(inspect.unwrap(value)) if ours.startswith("falcon_jax") else None
    if not isinstance(function, ast.FunctionDef):
        return None
    arguments = function.args
    positional = arguments.posonlyargs or arguments.args
    if what != "function" and positional and positional[0].arg in ("self", "cls"):
        positional.pop(0)
    told = ast.unparse(function.returns) if function.returns and what != "class" else None
    return f"({ast.unparse(arguments)})", told


def _source(value):
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None


def _fields(cls):
    """Return the arguments of a dataclass."""
    types = {}
    for base in reversed(cls.__mro__[:-1]):
        for line in getattr(_source(base), "body", ()):
            if isinstance(line, ast.AnnAssign):
                types[ast.unparse(line.target)] = ast.unparse(line.annotation)
    told = []
    for field in dataclasses.fields(cls):
        if field.init:
            given = field.default is not dataclasses.MISSING
            made = field.default_factory is not dataclasses.MISSING
            default = f" = {field.default!r}" if given else " = ..." if made else ""
            told.append(f"{field.name}: {types.get(field.name, 'Any')}{default}")
    only = ["*"] if any(field.kw_only for field in dataclasses.fields(cls)) else []
    return f"({', '.join(only + told)})"


def check_all_documented(app, env):
    """Warn of every public name that has no entry; `make docs` turns warnings into errors."""
    documented = env.get_domain("py").objects
    for (module, name), (value, place) in reference().items():
        if isinstance(value, types.ModuleType):
            place = f"falcon_jax.{name}"
        if place not in documented:
            logging.getLogger(__name__).warning(
                "%s of %s is not in the reference", name, module, type="public_names"
            )


def setup(app):
    """Register directive, signatures and check."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # as the docstrings have it
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-signature", signature_as_written)
    app.connect("env-check-consistency", check_all_documented)
    return {"parallel_read_safe": True}
