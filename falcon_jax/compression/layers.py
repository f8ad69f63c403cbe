"""What compression knows of a model: its layers, their weights, and the inputs that reach them."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
from jaxtyping import Array

from falcon_jax.methods import ConvSpec, Method, standard_cost

Kind = Literal["conv", "conv_transpose", "linear", "other"]

_MARK = "falcon_jax_layer_"


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


class CallLog:
    """Finds out which layers a forward pass uses, how often and with what inputs.

    Layers mark their inputs while the model is traced to a jaxpr; the jaxpr then tells how often
    each mark is passed, inside loops, vmapped or jitted parts, too.
    """

    def __init__(self):
        self._marks: list[tuple[str, tuple[int, ...]]] = []
        self._outputs: dict[int, tuple[int, ...]] = {}

    def call(self, path: str, layer: Callable[[Array], Array], x: Array, weight: Array) -> Array:
        """Return ``layer(x)`` with ``x`` marked as an input of the layer at ``path``.

        Args:
            path: of the layer.
            layer: applies it.
            x: its input.
            weight: any of its parameters; under vmap, the layers may be mapped and the input not.
        """

        def marked(x: Array, weight: Array) -> Array:
            return x + (0 * weight.ravel()[0]).astype(x.dtype)

        index = len(self._marks)
        marked.__name__ = f"{_MARK}{index}"
        self._marks.append((path, x.shape))
        y = layer(jax.jit(marked)(x, weight))
        self._outputs[index] = y.shape
        return y

    def trace(self, forward: Callable[..., Any], *args: Any) -> dict[str, tuple[Call, ...]]:
        """Trace ``forward(*args)`` and return the calls by path, in order of first use."""
        jaxpr = jax.make_jaxpr(forward)(*args)
        calls: dict[str, list[Call]] = {}
        for index, times in _marks_passed(jaxpr.jaxpr, 1, self._marks):
            path, shape = self._marks[index]
            call = Call(input_shape=shape, output_shape=self._outputs[index], times=times)
            calls.setdefault(path, []).append(call)
        return {path: tuple(found) for path, found in calls.items()}


def _marks_passed(
    jaxpr: Any, times: int, marks: Sequence[tuple[str, tuple[int, ...]]]
) -> Iterator[tuple[int, int]]:
    """Yield every mark in a jaxpr and how often it is passed."""
    for eqn in jaxpr.eqns:
        name = str(eqn.params.get("name", ""))
        if name.startswith(_MARK):
            index = int(name.removeprefix(_MARK))
            # Under vmap the marked array has grown by the mapped axes.
            mapped = math.prod(eqn.outvars[0].aval.shape) // max(math.prod(marks[index][1]), 1)
            yield index, times * mapped
            continue
        inner = times * int(eqn.params.get("length", 1)) if eqn.primitive.name == "scan" else times
        for sub in _inner_jaxprs(tuple(eqn.params.values())):
            yield from _marks_passed(sub, inner, marks)


def _inner_jaxprs(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _inner_jaxprs(item)
    elif hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr


def batch_size(sample: Any) -> int:
    """Return the length of the leading axis of an example input (an array or a tree of them)."""
    leaves = [leaf for leaf in jax.tree.leaves(sample) if getattr(leaf, "ndim", 0)]
    if not leaves:
        raise ValueError("sample is an example input with a leading batch axis; got no array.")
    return leaves[0].shape[0]
