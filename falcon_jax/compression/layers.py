"""What compression knows of a model: its layers, their weights, and the inputs that reach them."""

import dataclasses
import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from falcon_jax.compression.tracing import Call, Trace
from falcon_jax.methods import ConvSpec, Method

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
    """Return the jaxpr of ``forward(*args)``, traced anew down to the last jitted part.

    Args:
        forward: a function of arrays; of what it returns, the arrays are seen.
        *args: arrays or shapes.
    """
    # In a context that never was before, JAX's cache holds nothing of jitted parts.
    with set_xla_metadata(falcon_jax_trace=uuid.uuid4().hex):
        return jax.make_jaxpr(lambda *args: array_leaves(forward(*args)))(*args).jaxpr


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
