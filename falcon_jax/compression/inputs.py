"""Example inputs of a model: what it is called with, as far as shapes tell."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, init=False)
class Inputs:
    """Arguments of a model's call, where a single array or a tuple of arrays is not enough.

    Arrays, and shapes in their place (``jax.ShapeDtypeStruct``), have a leading batch axis. All
    else, such as ``train=False``, is a constant.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.

    >>> Inputs(jnp.ones((2, 8, 8, 3)), train=False).batch
    2
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __init__(self, *args: Any, **kwargs: Any):
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", kwargs)

    @classmethod
    def of(cls, sample: Any) -> "Inputs":
        """Return inputs as they are; spread a tuple over the arguments; take all else as one.

        Raises:
            ValueError: if there is no array with a batch axis.
        """
        inputs = sample
        if not isinstance(sample, Inputs):
            inputs = cls(*sample) if isinstance(sample, tuple) else cls(sample)
        if any(type(leaf).__module__.partition(".")[0] == "torch" for leaf in inputs.arrays):
            raise ValueError(
                "sample holds PyTorch tensors; give arrays of NumPy or JAX, such as x.numpy(), "
                "with channels last."
            )
        if not any(getattr(leaf, "ndim", 0) for leaf in inputs.arrays):
            raise ValueError(
                "sample is an example input with a leading batch axis; got no array. "
                "Give one, or a tuple of arguments, or falcon_jax.Inputs(x, train=False)."
            )
        return inputs

    @property
    def arrays(self) -> list[Any]:
        """The arrays among the arguments."""
        return [leaf for leaf in jax.tree.leaves((self.args, self.kwargs)) if _is_array(leaf)]

    @property
    def batch(self) -> int:
        """Length of the leading axis of the first array."""
        return next(leaf.shape[0] for leaf in self.arrays if leaf.ndim)

    @property
    def shapes(self) -> "Inputs":
        """The same with shapes in place of arrays."""
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.arrays]
        return self.with_arrays(shapes)

    def with_arrays(self, arrays: list[Any]) -> "Inputs":
        """Return the same constants with other arrays."""
        leaves, structure = jax.tree.flatten((self.args, self.kwargs))
        new = iter(arrays)
        leaves = [next(new) if _is_array(leaf) else leaf for leaf in leaves]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return Inputs(*args, **kwargs)

    def refused_by(self, model: Any, error: Exception) -> ValueError:
        """Return what to raise if a model cannot be called on the inputs."""
        return ValueError(
            f"{type(model).__name__} cannot be called on the sample; give an example input with a "
            "leading batch axis, a tuple of arguments or falcon_jax.Inputs(x, train=False). "
            f"It said: {error}"
        )

    def call(self, function: Callable[..., Any]) -> Any:
        """Return ``function(*args, **kwargs)``."""
        return function(*self.args, **self.kwargs)

    def to_json(self) -> dict[str, Any]:
        """Return shapes and constants as plain data.

        Raises:
            ValueError: if there is something else, such as an object of one's own.
        """
        return {"args": _to_json(list(self.args)), "kwargs": _to_json(dict(self.kwargs))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Inputs":
        """Return what `to_json` wrote."""
        return cls(*_from_json(data["args"]), **_from_json(data["kwargs"]))


# Names of the implementations of random keys, by those of their types.
_KEYS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if _is_array(value):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return {"shape": list(value.shape), "key": _KEYS.get(value.dtype.name, "")}
        return {"shape": list(value.shape), "dtype": str(jnp.dtype(value.dtype))}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_to_json(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _to_json(item) for key, item in value.items()}}
    raise ValueError(
        f"a plan keeps example inputs as shapes, numbers, strings, lists, tuples and dicts of "
        f"them; it cannot keep {value!r}. Make the plan with a simpler example."
    )


def _from_json(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    if "shape" in data:
        if "key" in data:
            key = jax.eval_shape(lambda: jax.random.key(0, impl=data["key"] or None))
            return jax.ShapeDtypeStruct(tuple(data["shape"]), key.dtype)
        return jax.ShapeDtypeStruct(tuple(data["shape"]), jnp.dtype(data["dtype"]))
    ((kind, value),) = data.items()
    if kind == "dict":
        return {key: _from_json(item) for key, item in value.items()}
    items = [_from_json(item) for item in value]
    return tuple(items) if kind == "tuple" else items
