"""NNX models as trees: modules, variables and arrays by path, copies with some replaced."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from falcon_jax.nn.layers import DepthwiseConv

Visit = Callable[[str, nnx.Module], nnx.Module | None]

_ATOMS = (type(None), str, bytes, bool, int, float, complex, type)


def named_modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yield every module with its path, once, parents first.

    Those in containers, partials, dataclasses and whatever else JAX takes for a tree, too. The
    order is that of definition. A module used in several places has the first of its paths in the
    alphabet, which a copy of the model cannot change.
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
        if isinstance(value, (nnx.Pytree, nnx.Variable)):
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


def held_variables(module: nnx.Module) -> list[nnx.Variable]:
    """Return the variables of a module that are not those of a module in it; all of a layer."""
    found: dict[int, nnx.Variable] = {}

    def walk(value: Any) -> None:
        for _, child in _children(value):
            if isinstance(child, nnx.Variable):
                found[id(child)] = child
            elif is_leaf(module) or not isinstance(child, nnx.Module):
                walk(child)

    walk(module)
    return list(found.values())


def map_arrays(function: Callable[[str, Any], Any], model: nnx.Module) -> None:
    """Put what a function of path and array returns in the place of every array of a model."""
    seen: set[int] = set()

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, nnx.RngState) or _is_key(value):
            return value
        if _is_array(value):
            return function("/".join(path), value)
        if isinstance(value, (nnx.Pytree, nnx.Variable)):
            if id(value) in seen:
                return value
            seen.add(id(value))
        if isinstance(value, nnx.Variable):
            old = value.get_raw_value()
            held = jnp.asarray(old) if isinstance(old, (bool, int, float, complex)) else old
            if (new := walk(held, path)) is not held:
                value.set_raw_value(new)
            return value
        children = sorted(_children(value), key=lambda child: child[0])
        return _with_children(value, {name: walk(child, (*path, name)) for name, child in children})

    walk(model, ())


def check_seen(model: nnx.Module) -> None:
    """Raise if Flax sees arrays of a model where `named_variables` does not look.

    Raises:
        ValueError: naming the first.
    """
    seen = {id(value) for _, value in _visited(model, object, alphabetically=False)}
    for path, value in nnx.iter_graph(model):
        if (isinstance(value, nnx.Variable) or _is_array(value)) and id(value) not in seen:
            raise ValueError(
                f"the model holds an array at {'/'.join(map(str, path))!r}, in an object that is "
                "neither a module nor a container of JAX, so that it would be lost; hold it in an "
                "nnx.Module, a list, a dict or a registered dataclass."
            )


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _is_key(value: Any) -> bool:
    if isinstance(value, nnx.Variable):
        value = value.get_raw_value()
    return _is_array(value) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def is_leaf(value: Any) -> bool:
    """Return whether something is a layer, whose own modules do not matter."""
    return isinstance(value, (nnx.Conv, nnx.ConvTranspose, nnx.Linear, DepthwiseConv))


def clone(model: nnx.Module) -> nnx.Module:
    """Return a copy of a model; arrays are shared with it, variables are not."""
    return map_modules(lambda path, module: None, model)


def in_evaluation(model: nnx.Module) -> nnx.Module:
    """Return a copy of a model in evaluation mode, its modules in partials and dataclasses, too."""
    new = clone(model)
    for _, module in named_modules(new):
        module.eval()
    return new


def map_modules(visit: Visit, model: nnx.Module) -> nnx.Module:
    """Return a copy of a model in which some modules are replaced.

    Args:
        visit: gets path (as `named_modules` has it) and module of the copy; returns what replaces
            it, or None.
        model: it is not changed. Arrays are shared with the copy, variables are not.

    Returns:
        The copy. A module used in several places is replaced by one module.
    """
    copied = nnx.clone(model)
    clones = _Clones(model, copied)
    done: dict[int, Any] = {}

    def walk(value: Any) -> Any:
        value = clones.of(value)
        if not isinstance(value, nnx.Pytree):
            return _with_children(value, {n: walk(child) for n, child in _children(value)})
        if id(value) not in done:
            done[id(value)] = value
            new = None
            if isinstance(value, nnx.Module):
                new = visit(clones.paths[id(value)], value)
            if new is not None:
                done[id(value)] = new
            elif not is_leaf(value):
                _with_children(value, {n: walk(child) for n, child in list(_children(value))})
        return done[id(value)]

    return walk(copied)


class _Clones:
    """The modules of a copy: their paths, and which module of the original each is a clone of."""

    def __init__(self, model: nnx.Module, copied: nnx.Module):
        self.paths: dict[int, str] = {}
        self._names = {id(module): path for path, module in named_modules(model)}
        self._clones: dict[int, Any] = {}
        self._pair(model, copied)

    def _pair(self, old: Any, new: Any) -> None:
        if old is new:  # where NNX does not look
            return
        if isinstance(old, nnx.Pytree):
            if id(old) in self._clones:
                return
            self._clones[id(old)] = new
            if isinstance(old, nnx.Module):
                self.paths[id(new)] = self._names[id(old)]
            if is_leaf(old):
                return
        children = dict(_children(new))
        for name, child in _children(old):
            self._pair(child, children[name])

    def of(self, value: Any) -> Any:
        """Return what a copy holds with clones in place of modules of the original.

        NNX does not look into partials and plain dataclasses: a clone of a model shares what they
        hold.
        """
        if isinstance(value, nnx.Module) and id(value) in self._names:
            if id(value) not in self._clones:
                self._pair(value, nnx.clone(value))
            return self._clones[id(value)]
        if isinstance(value, (nnx.Pytree, nnx.Variable)):
            return value
        return _with_children(value, {name: self.of(child) for name, child in _children(value)})


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    for name, child in _items(value):
        if not isinstance(child, _ATOMS):
            yield name, child


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nnx.Variable) or _is_array(value):
        return
    if isinstance(value, nnx.Pytree):
        yield from ((k, v) for k, v in vars(value).items() if not k.startswith("_pytree__"))
    elif isinstance(value, dict):
        yield from ((str(k), v) for k, v in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(i), v) for i, v in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    elif _is_tree(value):
        for (key,), child in _one_level(value)[0]:
            yield jax.tree_util.keystr((key,), simple=True), child
    elif dataclasses.is_dataclass(value):
        yield from vars(value).items() if hasattr(value, "__dict__") else ()


def _is_tree(value: Any) -> bool:
    return not jax.tree_util.all_leaves([value])


def _one_level(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda child: child is not value)


def _with_children(value: Any, children: Mapping[str, Any]) -> Any:
    """Return what holds other children: a module itself, changed, and a new container."""
    old = dict(_children(value))
    changed = {name: child for name, child in children.items() if child is not old[name]}
    if isinstance(value, nnx.Pytree):
        for name, child in changed.items():
            setattr(value, name, child)
        return value
    if not changed:
        return value
    if isinstance(value, dict):
        return type(value)({k: changed.get(str(k), v) for k, v in value.items()})
    if isinstance(value, functools.partial):
        return type(value)(
            changed.get("func", value.func),
            *changed.get("args", value.args),
            **changed.get("keywords", value.keywords),
        )
    if isinstance(value, (list, tuple)):
        items = [changed.get(str(i), v) for i, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if _is_tree(value):
        items = [changed.get(name, child) for name, child in _items(value)]
        return jax.tree.unflatten(_one_level(value)[1], items)
    new = copy.copy(value)
    for name, child in changed.items():
        object.__setattr__(new, name, child)
    return new
