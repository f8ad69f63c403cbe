"""NNX models as trees: their modules and variables by path, and copies with some replaced."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from falcon_jax.nn.method_conv import MethodConv

_WALKED = (nnx.Module, nnx.Variable, dict, list, tuple, functools.partial)

Visit = Callable[[str, nnx.Module], nnx.Module | None]


def named_modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yield every module with its path, once, parents first; inside tuples and partials, too.

    The order is that of definition. A module used in several places has the first of its paths in
    the alphabet, which a copy of the model cannot change.
    """
    return _first_visits(model, nnx.Module)


def named_variables(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """Yield every variable with its path, once, as `named_modules` has modules."""
    return _first_visits(model, nnx.Variable)


def _first_visits(model: nnx.Module, kind: type[Any]) -> Iterator[tuple[str, Any]]:
    paths = {id(value): path for path, value in _visited(model, kind, alphabetically=True)}
    for _, value in _visited(model, kind, alphabetically=False):
        yield paths[id(value)], value


def _visited(
    model: nnx.Module, kind: type[Any], *, alphabetically: bool
) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()

    def walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if isinstance(value, (nnx.Module, nnx.Variable)):
            if id(value) in seen:
                return
            seen.add(id(value))
        if isinstance(value, kind):
            yield "/".join(path), value
        if kind is nnx.Module and is_leaf(value):
            return
        children = _children(value)
        if alphabetically:
            children = iter(sorted(children, key=lambda child: child[0]))
        for name, child in children:
            yield from walk(child, (*path, name))

    yield from walk(model, ())


def weights(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the variables by path, all but the states of random number generators."""
    return {n: v for n, v in named_variables(model) if not isinstance(v, nnx.RngState)}


def is_leaf(value: Any) -> bool:
    """Return whether something is a layer, whose own modules do not matter."""
    return isinstance(value, (nnx.Conv, nnx.ConvTranspose, nnx.Linear, MethodConv))


def map_modules(visit: Visit, model: nnx.Module) -> nnx.Module:
    """Return a copy of a model in which some modules are replaced.

    Args:
        visit: gets path (as `named_modules` has it) and module of the copy; returns what replaces
            it, or None.
        model: it is not changed. Arrays are shared with the copy, variables are not.

    Returns:
        The copy. A module used in several places is replaced by one module.
    """
    copy = nnx.clone(model)
    clones = _Clones(model, copy)
    done: dict[int, nnx.Module] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, nnx.Module):
            if id(value) not in done:
                new = visit(clones.paths[id(value)], value)
                done[id(value)] = value if new is None else new
                if new is None and not is_leaf(value):
                    for name, child in list(_children(value)):
                        replaced = walk(child)
                        if replaced is not child:
                            setattr(value, name, replaced)
            return done[id(value)]
        if not _holds_module(value):
            return value
        if isinstance(value, functools.partial):
            value = clones.of_partial(value)
        return _rebuild(value, {name: walk(child) for name, child in _children(value)})

    return walk(copy)


class _Clones:
    """The modules of a copy: their paths, and which module of the original each is a clone of."""

    def __init__(self, model: nnx.Module, copy: nnx.Module):
        self.paths: dict[int, str] = {}
        self._names = {id(module): path for path, module in named_modules(model)}
        self._clones: dict[int, nnx.Module] = {}
        self._pair(model, copy)

    def _pair(self, old: Any, new: Any) -> None:
        if old is new:  # inside a partial
            return
        if isinstance(old, nnx.Module):
            if id(old) in self._clones:
                return
            self._clones[id(old)] = new
            self.paths[id(new)] = self._names[id(old)]
            if is_leaf(old):
                return
        children = dict(_children(new))
        for name, child in _children(old):
            self._pair(child, children[name])

    def of_partial(self, value: Any) -> Any:
        """Return a partial, or what is in it, with the clones of its modules.

        NNX does not look into partials: a clone of the model shares what they hold.
        """
        if isinstance(value, nnx.Module):
            if id(value) not in self._clones:
                self._pair(value, nnx.clone(value))
            return self._clones[id(value)]
        if not _holds_module(value):
            return value
        return _rebuild(value, {name: self.of_partial(child) for name, child in _children(value)})


def _holds_module(value: Any) -> bool:
    return isinstance(value, nnx.Module) or any(_holds_module(c) for _, c in _children(value))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nnx.Module):
        items = ((k, v) for k, v in vars(value).items() if not k.startswith("_pytree__"))
    elif isinstance(value, dict):
        items = ((str(k), v) for k, v in value.items())
    elif isinstance(value, (list, tuple)):
        items = ((str(i), v) for i, v in enumerate(value))
    elif isinstance(value, functools.partial):
        items = [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    else:
        return
    for name, child in items:
        if isinstance(child, _WALKED):
            yield name, child


def _rebuild(value: Any, children: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return type(value)({k: children.get(str(k), v) for k, v in value.items()})
    if isinstance(value, functools.partial):
        return functools.partial(
            children.get("func", value.func),
            *children.get("args", value.args),
            **children.get("keywords", value.keywords),
        )
    items = [children.get(str(i), v) for i, v in enumerate(value)]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
