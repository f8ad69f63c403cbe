"""Write docs/config.md: every field of a config, from the dataclasses that it is checked with.

python -m tests.config_page
"""

import dataclasses
import inspect
import pathlib
import re

from falcon_jax.training.config import ExperimentConfig

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "config.md"
HEAD = """# The fields of a config

Written by `python -m tests.config_page` from the dataclasses of `falcon_jax/training/config.py`;
[training.md](training.md) says how they are used. A config file starts from `default_config()`, and
any field can be given on the command line, such as `--config.train.epochs=12`.
"""


def meanings(cls):
    """Return what the docstrings of a dataclass and its bases say of its fields."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        doc = inspect.cleandoc(base.__doc__ or "")
        _, _, section = doc.partition("Attributes:\n")
        section = re.split(r"\n(?=\S)", section)[0]
        for name, text in re.findall(r"^    (\w+): ((?:.+\n?(?:        .*\n?)*))", section, re.M):
            found[name] = " ".join(text.replace("``", "`").split())
    return found


def groups(group, name="config"):
    """Yield the name of every group of fields, and the group with its defaults."""
    yield name, group
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from groups(value, f"{name}.{field.name}")


def page():
    """Return the page."""
    lines = [HEAD]
    first = {}
    for name, group in groups(ExperimentConfig()):
        if first.setdefault(type(group), name) != name:
            lines.append(f"\n## {name}\n\nThe fields of `{first[type(group)]}`.")
            continue
        title = inspect.cleandoc(type(group).__doc__ or "").splitlines()[0]
        lines.append(f"\n## {name}\n\n{title}\n\n| field | default | meaning |\n|---|---|---|")
        told = meanings(type(group))
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            default = "below" if dataclasses.is_dataclass(value) else f"`{value!r}`"
            lines.append(f"| `{field.name}` | {default} | {told[field.name]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
