"""What the compiled kernels compute, as one operation of JAX with a meaning in plain JAX."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from falcon_jax.native.library import load
from falcon_jax.ops.convolution import conv
from falcon_jax.ops.depthwise import depthwise_conv
from falcon_jax.ops.geometry import output_shape
from falcon_jax.ops.separable import pointwise_then_depthwise

Kind = Literal["standard", "pointwise_depthwise", "depthwise"]
Pairs = tuple[tuple[int, int], ...]

PANEL, LANES = 64, 16  # as in convolution.cc


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A convolution of two spatial axes, with what follows it.

    ``y = max(conv(x) + bias + residual, 0)``, the maximum only with ``relu``

    Attributes:
        kind: which.
        kernel_size: taps per axis.
        in_features: input channels.
        out_features: output channels.
        terms: rank k of the pointwise-then-depthwise kind.
        strides: step between outputs.
        padding: ``(low, high)`` zeros per axis.
        dilation: distance between taps.
        relu: whether negative outputs become zero.
    """

    kind: Kind
    kernel_size: tuple[int, int]
    in_features: int
    out_features: int
    terms: int = 1
    strides: tuple[int, int] = (1, 1)
    padding: Pairs = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    relu: bool = False

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output's shape for an input's."""
        sizes = output_shape(
            shape[1:3], self.kernel_size, input_dilation=(1, 1), **self._geometry
        )
        return (shape[0], *sizes, self.out_features)

    @property
    def _geometry(self) -> dict[str, Any]:
        return {
            "strides": self.strides,
            "padding": self.padding,
            "kernel_dilation": self.dilation,
        }


def pack_columns(matrix: Float[np.ndarray, "depth terms n"]) -> Float[np.ndarray, " size"]:
    """Return weights as the kernels read them: panels of 64 columns, one term after the other."""
    n = matrix.shape[-1]
    wide = np.pad(matrix, ((0, 0), (0, 0), (0, -n % LANES)))
    panels = (wide[..., start : start + PANEL] for start in range(0, wide.shape[-1], PANEL))
    return np.concatenate([panel.swapaxes(0, 1).reshape(-1) for panel in panels])


def pack_rows(rows: Float[np.ndarray, "*rows n"]) -> Float[np.ndarray, " size"]:
    """Return rows over channels, channels filled up with zeros to a multiple of 16."""
    fill = [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % LANES)]
    return np.pad(rows, fill).reshape(-1)


def _columns(step: Step, packed: Array, depth: int) -> Array:
    """Undo `pack_columns`: shape (depth, terms, n)."""
    n = step.out_features + -step.out_features % LANES
    widths = [min(PANEL, n - start) for start in range(0, n, PANEL)]
    ends = np.cumsum([depth * step.terms * width for width in widths]).tolist()
    parts = jnp.split(packed, ends[:-1])
    panels = [
        part.reshape(step.terms, depth, width) for part, width in zip(parts, widths, strict=True)
    ]
    return jnp.concatenate(panels, -1).swapaxes(0, 1)[..., : step.out_features]


def _rows(step: Step, packed: Array, shape: tuple[int, ...]) -> Array:
    return packed.reshape(*shape, -1)[..., : step.out_features]


def plain(
    x: Float[Array, "b h w m"],
    weights: Float[Array, " packed_weights"],
    depthwise: Float[Array, " packed_depthwise"],
    bias: Float[Array, " packed_bias"],
    residual: Float[Array, "*output"],
    *,
    step: Step,
) -> Float[Array, "b h_out w_out n"]:
    """Return what a step is, in plain JAX.

    Args:
        x: input.
        weights: of `pack_columns`; empty for a depthwise convolution.
        depthwise: of `pack_rows`, shape ``(*kernel_size, k, N)`` before; empty for a standard one.
        bias: of `pack_rows`.
        residual: what is added, of the output's shape; of no elements if nothing is.
        step: the convolution.
    """
    geometry = {**step._geometry, "input_dilation": (1, 1)}
    taps = math.prod(step.kernel_size)
    if step.kind == "standard":
        kernel = _columns(step, weights, taps * step.in_features)
        shape = (*step.kernel_size, step.in_features, step.out_features)
        y = conv(x, kernel.reshape(shape), **geometry)
    elif step.kind == "depthwise":
        kernel = _rows(step, depthwise, step.kernel_size)
        y = depthwise_conv(x, kernel, **geometry)
    else:
        kernel = _rows(step, depthwise, (*step.kernel_size, step.terms))
        pointwise = _columns(step, weights, step.in_features)
        y = pointwise_then_depthwise(x, kernel, pointwise, **geometry)
    y = y + _rows(step, bias, ()).reshape(1, 1, 1, -1)
    if residual.size:
        y = y + residual
    return jnp.maximum(y, 0) if step.relu else y


def convolve(
    step: Step,
    x: Float[Array, "b h w m"],
    weights: Any,
    depthwise: Any,
    bias: Any,
    residual: Float[Array, "b h_out w_out n"] | None,
) -> Float[Array, "b h_out w_out n"]:
    """Carry out a step by the compiled kernel; where there is none, as `plain` does."""
    added = jnp.zeros((0,), jnp.float32) if residual is None else residual
    return _step.bind(x, weights, depthwise, bias, added, step=step)


def _compiled(x: Any, weights: Any, depthwise: Any, bias: Any, residual: Any, *, step: Step) -> Any:
    shape = jax.ShapeDtypeStruct(step.output_shape(x.shape), jnp.float32)
    (top, _), (left, _) = step.padding
    attributes: dict[str, Any] = {
        "geometry": np.array([*step.strides, *step.dilation, top, left]),
        "taps": np.array([*step.kernel_size, step.terms]),
        "relu": step.relu,
    }
    if step.kind == "standard":
        call = jax.ffi.ffi_call("FalconConvolution", shape)
        return call(x, weights, bias, residual, **attributes)
    call = jax.ffi.ffi_call("FalconPointwiseDepthwise", shape)
    return call(x, weights, depthwise, bias, residual, **attributes)


def _lower(context: Any, *operands: Any, step: Step) -> Any:
    """Lower to the compiled kernel, but for export: another machine has none."""
    exported = context.module_context.lowering_parameters.for_export
    function = plain if exported or not load() else _compiled
    return mlir.lower_fun(function, multiple_results=False)(context, *operands, step=step)


def _batch(operands: Any, axes: Any, *, step: Step) -> tuple[Array, int]:
    if any(axis is not None for axis in axes[1:4]):
        mapped = jax.vmap(lambda *a: plain(*a, step=step), in_axes=axes)
        return mapped(*operands), 0
    size = next(a.shape[d] for a, d in zip(operands, axes, strict=True) if d is not None)
    x, *weights, residual = operands

    def flat(array: Array, axis: int | None) -> Array:
        if axis is None:
            array = jnp.broadcast_to(array[None], (size, *array.shape))
        else:
            array = jnp.moveaxis(array, axis, 0)
        return array.reshape(-1, *array.shape[2:]) if array.ndim > 2 else array.reshape(-1)

    y = _step.bind(flat(x, axes[0]), *weights, flat(residual, axes[4]), step=step)
    return y.reshape(size, -1, *y.shape[1:]), 0


def _differentiate(primals: Any, tangents: Any, *, step: Step) -> Any:
    moved = [ad.instantiate_zeros(t) for t in tangents]
    return jax.jvp(lambda *a: plain(*a, step=step), tuple(primals), tuple(moved))


_step = Primitive("falcon_native_step")
_step.def_impl(jax.jit(lambda *a, step: _step.bind(*a, step=step), static_argnames="step"))
_step.def_abstract_eval(
    lambda x, *_, step: jax.core.ShapedArray(step.output_shape(x.shape), x.dtype)
)
ad.primitive_jvps[_step] = _differentiate
batching.primitive_batchers[_step] = _batch
mlir.register_lowering(_step, mlir.lower_fun(plain, multiple_results=False))
mlir.register_lowering(_step, _lower, platform="cpu")

