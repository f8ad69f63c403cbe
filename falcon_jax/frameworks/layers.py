"""What compression knows of a model: its layers, their weights, and the inputs that reach them."""

import dataclasses
import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from falcon_jax.frameworks.tracing import Call, Trace
from falcon_jax.methods.base import Method
from falcon_jax.ops.geometry import ConvSpec


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


Kind = Literal["conv", "conv_transpose", "linear", "other"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of a model, whatever the framework.

    Attributes:
        path: where it is, joined with ``/``.
        kind: what it is.
        params: trainable parameters, over all layers of a stack.
        spec: of a convolution; None for other kinds.
        obstacle: why it cannot be replaced, whatever the method; None if it can.
        method: of a layer that is already compressed.
        stack: leading axes of the kernel, for layers stacked by scan or vmap.
        linear_shape: ``(in, out, bias)`` of a fully connected layer.
        adds_bias: whether a layer of products that no formula counts adds a bias to its output.
        calls: uses, in order; empty if the model was not traced.
        products: multiply-adds of its parameters that no formula counts, over the whole input.
        remark: why a layer with parameters has no mult-adds, if it has none.
    """

    path: str
    kind: Kind
    params: int
    spec: ConvSpec | None = None
    obstacle: str | None = None
    method: Method | None = None
    stack: tuple[int, ...] = ()
    linear_shape: tuple[int, int, bool] | None = None
    adds_bias: bool = False
    calls: tuple[Call, ...] = ()
    products: int = 0
    remark: str = ""

    def mult_adds(self, batch: int, method: Method | None = None) -> int:
        """Return mult-adds for one example.

        Args:
            batch: examples in the traced input.
            method: count as if this method carried the layer out; the layer as it is if None.
        """
        total = sum(call.times * self._call_mult_adds(call, method) for call in self.calls)
        return (total + self.products) // batch

    def replaced_params(self, method: Method) -> int:
        """Return the parameters that the layer would have under a method."""
        assert self.spec is not None
        points = (1,) * len(self.spec.kernel_size)
        cost = method.cost(self.spec, (*points, self.spec.in_features))
        return math.prod(self.stack) * cost.params

    def _call_mult_adds(self, call: Call, method: Method | None) -> int:
        shape = call.input_shape
        if self.linear_shape is not None:
            m, n, bias = self.linear_shape
            return math.prod(shape[:-1]) * (m * n + n * bias)
        if self.spec is None:
            return math.prod(call.output_shape) * self.adds_bias
        if self.kind == "conv_transpose":
            products = math.prod(shape[:-1]) * math.prod(self.spec.kernel_shape)
            return products + math.prod(call.output_shape) * self.spec.use_bias
        method = method or self.method
        if method is None:
            products = self.spec.taps * self.spec.group_in_features
            return math.prod(call.output_shape) * (products + self.spec.use_bias)
        examples = math.prod(shape[: len(shape) - len(self.spec.kernel_size) - 1])
        return examples * method.cost(self.spec, shape).mult_adds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inference:
    """A model's call in evaluation, as a pure function.

    Attributes:
        state: the model's arrays.
        call: gets the state and the arguments; returns the output, and whether the model wrote to
            its variables (which is forgotten).
    """

    state: Any
    call: Callable[..., tuple[Any, bool]]


def spec_or_sizes(make: Callable[[], ConvSpec], **sizes: Any) -> tuple[ConvSpec, str | None]:
    """Return the spec of a convolution; where there is none, that of its sizes, and the reason.

    Args:
        make: makes it; a ValueError says why there is none.
        **sizes: ``kernel_size`` and whatever else of `ConvSpec` is beyond doubt.
    """
    try:
        return make(), None
    except ValueError as error:
        return ConvSpec(**sizes), str(error).rstrip(".")


def traced_jaxpr(forward: Callable[..., Any], *args: Any) -> Any:
    """Return the closed jaxpr of ``forward(*args)``, traced anew down to the last jitted part.

    Args:
        forward: a function of arrays; of what it returns, the arrays are seen.
        *args: arrays or shapes.
    """
    # In a context that never was before, JAX's cache holds nothing of jitted parts.
    with set_xla_metadata(falcon_jax_trace=uuid.uuid4().hex):
        return jax.make_jaxpr(lambda *args: array_leaves(forward(*args)))(*args)


def array_leaves(value: Any) -> list[Any]:
    """Return the arrays in what a model returned, those in objects of its own, too."""
    found = []
    for leaf in jax.tree.leaves(value):
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type):
            found += array_leaves(dict(vars(leaf)))
    return found


def counted(layers: list[Layer], trace: Trace, params: Mapping[str, int]) -> list[Layer]:
    """Return the layers with their calls and products, and what else there is to count.

    Args:
        layers: as the model defines them.
        trace: of a call of the model.
        params: size of every parameter, by path.

    Returns:
        The layers; for products of arrays that no parameter is among, one more of kind ``other``.
    """
    new = []
    for layer in layers:
        formula = layer.spec is not None or layer.linear_shape is not None
        products = trace.outside.get(layer.path, 0)
        products += 0 if formula else trace.inside.get(layer.path, 0)
        calls = trace.calls.get(layer.path, ())
        own = {name for name in params if name.rpartition("/")[0] == layer.path}
        new.append(
            dataclasses.replace(
                layer,
                calls=calls,
                products=products,
                remark=_remark(layer, bool(calls), products, used=bool(own & trace.used)),
            )
        )
    # Products of what is no parameter, or of parameters that stand in no layer's name.
    free = sum(trace.outside.values()) - sum(trace.outside.get(layer.path, 0) for layer in layers)
    if not free:
        return new
    remark = "products of arrays that are no parameters, such as those of attention"
    at_root = [index for index, layer in enumerate(new) if layer.path == ""]
    if not at_root:
        return [*new, Layer(path="", kind="other", params=0, products=free, remark=remark)]
    (index,) = at_root
    new[index] = dataclasses.replace(new[index], products=new[index].products + free, remark=remark)
    return new


def _remark(layer: Layer, called: bool, products: int, *, used: bool) -> str:
    if not layer.params or called or products:
        return ""
    if used:
        return "elementwise or looked up: no product to count"
    return "not used by the sample's call"
