"""What compression knows of a model: its layers, their weights, and the inputs that reach them."""

import dataclasses
import json
import math
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array

from falcon_jax.methods import ConvSpec, Method, standard_cost

Kind = Literal["conv", "conv_transpose", "linear", "other"]

_MARK = "falcon_jax layer "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One use of a layer: shapes of input and output, and how often in a forward pass."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    times: int


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
        calls: uses, in order; empty if the model was not traced.
    """

    path: str
    kind: Kind
    params: int
    spec: ConvSpec | None = None
    obstacle: str | None = None
    method: Method | None = None
    stack: tuple[int, ...] = ()
    linear_shape: tuple[int, int, bool] | None = None
    calls: tuple[Call, ...] = ()

    def mult_adds(self, batch: int, method: Method | None = None) -> int:
        """Return mult-adds for one example.

        Args:
            batch: examples in the traced input.
            method: count as if this method carried the layer out; the layer as it is if None.
        """
        total = sum(call.times * self._call_mult_adds(call, method) for call in self.calls)
        return total // batch

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
            return 0
        if self.kind == "conv_transpose":
            products = math.prod(shape[:-1]) * math.prod(self.spec.kernel_shape)
            return products + math.prod(call.output_shape) * self.spec.use_bias
        method = method or self.method
        cost = standard_cost if method is None else method.cost
        examples = math.prod(shape[: len(shape) - len(self.spec.kernel_size) - 1])
        return examples * cost(self.spec, shape).mult_adds


def mark_output(path: str, y: Array, input_shape: tuple[int, ...]) -> Array:
    """Return the output of a layer under a name that tells of this call in a jaxpr.

    Args:
        path: of the layer.
        y: its output; it depends on the layer's parameters, so vmapped layers have mapped outputs.
        input_shape: of the layer's input.
    """
    return checkpoint_name(y, _MARK + json.dumps([path, input_shape, y.shape]))


def traced_jaxpr(forward: Callable[..., Any], *args: Any) -> Any:
    """Return the jaxpr of ``forward(*args)``, traced anew down to the last jitted part.

    Args:
        forward: a function of arrays.
        *args: arrays or shapes.
    """
    # In a context that never was before, JAX's cache holds nothing of jitted parts.
    with set_xla_metadata(falcon_jax_trace=uuid.uuid4().hex):
        return jax.make_jaxpr(forward)(*args).jaxpr


def calls_in(jaxpr: Any) -> dict[str, tuple[Call, ...]]:
    """Return the calls of layers that `mark_output`, by path in the order of first use.

    The jaxpr tells how often each mark is passed, inside loops, vmapped or jitted parts, too.
    """
    calls: dict[str, list[Call]] = {}
    for path, call in _marks_passed(jaxpr, 1):
        calls.setdefault(path, []).append(call)
    return {path: tuple(found) for path, found in calls.items()}


def _marks_passed(jaxpr: Any, times: int) -> Iterator[tuple[str, Call]]:
    for eqn in jaxpr.eqns:
        name = str(eqn.params.get("name", ""))
        if name.startswith(_MARK):
            path, input_shape, output_shape = json.loads(name.removeprefix(_MARK))
            # Under vmap the marked array has grown by the mapped axes.
            grown = math.prod(eqn.outvars[0].aval.shape) // max(math.prod(output_shape), 1)
            yield (
                path,
                Call(
                    input_shape=tuple(input_shape),
                    output_shape=tuple(output_shape),
                    times=times * grown,
                ),
            )
            continue
        inner = times * int(eqn.params.get("length", 1)) if eqn.primitive.name == "scan" else times
        for sub in inner_jaxprs(tuple(eqn.params.values())):
            yield from _marks_passed(sub, inner)


def inner_jaxprs(value: Any) -> Iterator[Any]:
    """Yield the jaxprs in the parameters of an equation."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from inner_jaxprs(item)
    elif hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr
