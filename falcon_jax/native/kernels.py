"""What the compiled kernels compute: operations of JAX, each with its meaning in plain JAX."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

from falcon_jax.native.library import load
from falcon_jax.ops.convolution import conv
from falcon_jax.ops.depthwise import depthwise_conv
from falcon_jax.ops.geometry import output_shape
from falcon_jax.ops.separable import pointwise_then_depthwise

Kind = Literal["standard", "pointwise_depthwise", "depthwise"]
Pair = tuple[int, int]
Pairs = tuple[Pair, Pair]

PANEL, LANES, DEPTH = 64, 16, 32  # as in convolution.cc


@runtime_checkable
class Kernel(Protocol):
    """An operation with settings; arrays are its operands."""

    @property
    def mapped(self) -> tuple[int, ...]:
        """Positions of the operands that have a batch axis, the first."""
        ...

    @property
    def plain(self) -> Callable[..., Any]:
        """What it is, in plain JAX: a function of the operands."""
        ...

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output's shape for the first operand's."""
        ...

    def compiled(self, output: jax.ShapeDtypeStruct, *operands: Any) -> Any:
        """Return what ``plain`` gives, by the compiled kernel."""
        ...


def run(kernel: Kernel, *operands: Any) -> Array:
    """Carry out an operation by the compiled kernel; where there is none, in plain JAX.

    Args:
        kernel: the operation.
        operands: as its ``plain`` takes them.
    """
    return _native.bind(*operands, kernel=kernel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxPool:
    """Maxima over windows of two spatial axes.

    Operand: the input (b, h, w, c).

    Attributes:
        window: its sizes.
        strides: step between windows.
        padding: ``(low, high)`` points per axis that count as nothing.
    """

    window: Pair
    strides: Pair
    padding: Pairs = ((0, 0), (0, 0))

    mapped = (0,)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output's shape for an input's."""
        b, *spatial, c = shape
        sizes = (
            (n + low + high - size) // step + 1
            for n, (low, high), size, step in zip(
                spatial, self.padding, self.window, self.strides, strict=True
            )
        )
        return (b, *sizes, c)

    def plain(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c"]:
        """Return the maxima in plain JAX."""
        padding = ((0, 0), *self.padding, (0, 0))
        window, strides = (1, *self.window, 1), (1, *self.strides, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)

    @property
    def geometry(self) -> np.ndarray:
        """Return strides and padding as the kernels read them."""
        (top, _), (left, _) = self.padding
        return np.array([*self.strides, top, left])

    def compiled(self, output: jax.ShapeDtypeStruct, *operands: Any) -> Any:
        """Return the maxima by the compiled kernel."""
        call = jax.ffi.ffi_call("FalconMaxPool", output)
        return call(*operands, taps=np.array(self.window), geometry=self.geometry)


HALVES = MaxPool(window=(2, 2), strides=(2, 2))
NO_POOL = MaxPool(window=(0, 0), strides=(0, 0))  # for kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A convolution of two spatial axes, with what follows it.

    ``y = pool(max(conv(x) + bias + residual, 0))``, maximum and pooling where they are asked for

    Operands: the input (b, h, w, M), weights of `Step.packed` (empty if depthwise), depthwise
    kernel of `pack_rows` (empty if standard), bias of `pack_rows`, what is added, of the
    convolution's shape (b, h', w', N), and what is added between pointwise and depthwise, of shape
    (b, h, w, k N); the last two empty if nothing is.

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
        pool: of which maxima are returned; `HALVES`, unless the kind is standard.
        bfloat16: whether inputs and weights of products over channels are rounded to bfloat16;
            their sums, and the depthwise step, are of float32.
    """

    kind: Kind
    kernel_size: Pair
    in_features: int
    out_features: int
    terms: int = 1
    strides: Pair = (1, 1)
    padding: Pairs = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    relu: bool = False
    pool: MaxPool | None = None
    bfloat16: bool = False

    mapped = (0, 4, 5)

    def packed(self, matrix: Float[np.ndarray, "depth terms n"]) -> np.ndarray:
        """Return weights as its kernel reads them."""
        return pack_tiles(matrix) if self.bfloat16 else pack_columns(matrix)

    def _matrix(self, packed: Array) -> Float[Array, "depth terms n"]:
        """Return the weights that `packed` made this of."""
        taps = math.prod(self.kernel_size) if self.kind == "standard" else 1
        unpack = unpack_tiles if self.bfloat16 else unpack_columns
        return unpack(packed, taps * self.in_features, self.terms, self.out_features)

    def convolved(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the convolution's shape, before any pooling."""
        sizes = output_shape(shape[1:3], self.kernel_size, **self._geometry)
        return (shape[0], *sizes, self.out_features)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output's shape for an input's."""
        convolved = self.convolved(shape)
        return self.pool.output_shape(convolved) if self.pool else convolved

    @property
    def _geometry(self) -> dict[str, Any]:
        return {
            "strides": self.strides,
            "padding": self.padding,
            "input_dilation": (1, 1),
            "kernel_dilation": self.dilation,
        }

    def plain(
        self,
        x: Float[Array, "b h w m"],
        weights: Float[Array, " packed_weights"],
        depthwise: Float[Array, " packed_depthwise"],
        bias: Float[Array, " packed_bias"],
        residual: Float[Array, "*convolved"],
        inner: Float[Array, "*between"],
    ) -> Float[Array, "b h_out w_out n"]:
        """Return the step in plain JAX."""
        size, geometry = self.kernel_size, self._geometry
        if self.bfloat16 and self.kind != "depthwise":
            x = x.astype(jnp.bfloat16).astype(x.dtype)
        if self.kind == "standard":
            kernel = self._matrix(weights)
            y = conv(x, kernel.reshape(*size, self.in_features, -1), **geometry)
        elif self.kind == "depthwise":
            y = depthwise_conv(x, self._rows(depthwise, *size), **geometry)
        else:
            kernel = self._rows(depthwise, *size, self.terms)
            y = pointwise_then_depthwise(x, kernel, self._matrix(weights), **geometry)
            if inner.size:
                terms = jnp.split(inner, self.terms, axis=-1)
                y = y + sum(
                    depthwise_conv(z, kernel[..., r, :], **geometry) for r, z in enumerate(terms)
                )
        y = y + self._rows(bias, 1, 1, 1)
        if residual.size:
            y = y + residual
        y = jnp.maximum(y, 0) if self.relu else y
        return self.pool.plain(y) if self.pool else y

    def _rows(self, packed: Array, *shape: int) -> Array:
        return packed.reshape(*shape, -1)[..., : self.out_features]

    def compiled(self, output: jax.ShapeDtypeStruct, *operands: Any) -> Any:
        """Return the step by the compiled kernel."""
        x, weights, depthwise, bias, residual, inner = operands
        (top, _), (left, _) = self.padding
        attributes: dict[str, Any] = {
            "taps": np.array([*self.kernel_size, self.terms]),
            "geometry": np.array([*self.strides, *self.dilation, top, left]),
            "sizes": np.array(self.convolved(x.shape)[1:]),
            "relu": self.relu,
        }
        if self.kind == "standard":
            pool = self.pool or NO_POOL
            attributes |= {"window": np.array(pool.window), "window_geometry": pool.geometry}
            call = jax.ffi.ffi_call("FalconConvolution", output)
            return call(x, weights, bias, residual, **attributes)
        call = jax.ffi.ffi_call("FalconPointwiseDepthwise", output)
        arrays = (x, weights, depthwise, bias, residual, inner)
        return call(*arrays, **attributes, pool=self.pool is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlongAxis:
    """Sums of a few entries of one axis, as in interpolation.

    ``y[a, i, b] = sum_t weights[i, t] x[a, places[i, t], b]``

    Operands: the input (a, n, b), weights (m, t), places (m, t).

    Attributes:
        size: entries m of the axis afterwards.
    """

    size: int

    mapped = (0,)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output's shape for an input's."""
        return (shape[0], self.size, shape[2])

    def plain(
        self, x: Float[Array, "a n b"], weights: Float[Array, "m t"], places: Int[Array, "m t"]
    ) -> Float[Array, "a m b"]:
        """Return the sums in plain JAX."""
        return jnp.einsum("aitb,it->aib", x[:, places], weights)

    def compiled(self, output: jax.ShapeDtypeStruct, *operands: Any) -> Any:
        """Return the sums by the compiled kernel."""
        return jax.ffi.ffi_call("FalconAlongAxis", output)(*operands)


def pack_columns(matrix: Float[np.ndarray, "depth terms n"]) -> Float[np.ndarray, " size"]:
    """Return weights as the kernels read them: panels of 64 columns, one term after the other."""
    return np.concatenate([panel.reshape(-1) for panel in _panels(matrix)])


def unpack_columns(
    packed: Float[Array, " size"], depth: int, terms: int, n: int
) -> Float[Array, "depth terms n"]:
    """Return the weights that `pack_columns` made this of.

    Args:
        packed: what it returned.
        depth: rows of the weights.
        terms: their terms.
        n: their columns.
    """
    panels = [part.reshape(terms, depth, width) for part, width in _parts(packed, depth * terms, n)]
    return jnp.concatenate(panels, -1).swapaxes(0, 1)[..., :n]


def pack_tiles(matrix: Float[np.ndarray, "depth terms n"]) -> np.ndarray:
    """Return weights rounded to bfloat16: panels as `pack_columns` has them, of tiles.

    A tile is 16 columns of 16 pairs of rows; rows are filled up with zeros to a multiple of 32.

    Args:
        matrix: the weights.
    """
    tall = np.pad(matrix, ((0, -matrix.shape[0] % DEPTH), (0, 0), (0, 0))).astype(jnp.bfloat16)
    tiled = [
        panel.reshape(len(panel), -1, DEPTH // 2, 2, panel.shape[-1] // LANES, LANES)
        for panel in _panels(tall)
    ]
    return np.concatenate([tiles.transpose(0, 4, 1, 2, 5, 3).reshape(-1) for tiles in tiled])


def unpack_tiles(packed: Array, depth: int, terms: int, n: int) -> Float[Array, "depth terms n"]:
    """Return the weights that `pack_tiles` made this of, in float32.

    Args:
        packed: what it returned.
        depth: rows of the weights.
        terms: their terms.
        n: their columns.
    """
    rows, panels = depth + -depth % DEPTH, []
    for part, width in _parts(packed, rows * terms, n):
        tiles = part.reshape(terms, width // LANES, rows // DEPTH, DEPTH // 2, LANES, 2)
        panels.append(tiles.transpose(0, 2, 3, 5, 1, 4).reshape(terms, rows, width))
    return jnp.concatenate(panels, -1).swapaxes(0, 1)[:depth, :, :n].astype(jnp.float32)


def _panels(matrix: np.ndarray) -> list[np.ndarray]:
    """Return 64 columns after the other, terms first, columns filled up to a multiple of 16."""
    wide = np.pad(matrix, ((0, 0), (0, 0), (0, -matrix.shape[-1] % LANES))).swapaxes(0, 1)
    return [wide[..., start : start + PANEL] for start in range(0, wide.shape[-1], PANEL)]


def _parts(packed: Array, rows: int, n: int) -> list[tuple[Array, int]]:
    """Return the flat panels of so many rows and terms, each with its number of columns."""
    columns = n + -n % LANES
    widths = [min(PANEL, columns - start) for start in range(0, columns, PANEL)]
    ends = np.cumsum([rows * width for width in widths]).tolist()
    return list(zip(jnp.split(packed, ends[:-1]), widths, strict=True))


def pack_rows(rows: Float[np.ndarray, "*rows n"]) -> Float[np.ndarray, " size"]:
    """Return rows over channels, channels filled up with zeros to a multiple of 16."""
    fill = [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % LANES)]
    return np.pad(rows, fill).reshape(-1)


def _shape(kernel: Kernel, x: Any) -> tuple[int, ...]:
    return kernel.output_shape(tuple(x.shape))


def _plain(*operands: Any, kernel: Kernel) -> Any:
    return kernel.plain(*operands)


def _compiled(*operands: Any, kernel: Kernel) -> Any:
    x = operands[0]
    return kernel.compiled(jax.ShapeDtypeStruct(_shape(kernel, x), x.dtype), *operands)


def _lower(context: Any, *operands: Any, kernel: Kernel) -> Any:
    """Lower to the compiled kernel, but for export: another machine has none."""
    exported = context.module_context.lowering_parameters.for_export
    function = _plain if exported or not load() else _compiled
    return mlir.lower_fun(function, multiple_results=False)(context, *operands, kernel=kernel)


def _batch(operands: Any, axes: Any, *, kernel: Kernel) -> tuple[Array, int]:
    if any(axis is not None and i not in kernel.mapped for i, axis in enumerate(axes)):
        return jax.vmap(kernel.plain, in_axes=axes)(*map(jnp.asarray, operands)), 0
    size = next(a.shape[d] for a, d in zip(operands, axes, strict=True) if d is not None)

    def joined(array: Array, axis: int | None) -> Array:
        if axis is None:
            array = jnp.broadcast_to(array[None], (size, *array.shape))
        else:
            array = jnp.moveaxis(array, axis, 0)
        return array.reshape(-1, *array.shape[2:])

    flat = [
        joined(array, axis) if i in kernel.mapped else array
        for i, (array, axis) in enumerate(zip(operands, axes, strict=True))
    ]
    y = run(kernel, *flat)
    return y.reshape(size, y.shape[0] // size, *y.shape[1:]), 0


def _differentiate(primals: Any, tangents: Any, *, kernel: Kernel) -> Any:
    moved = [ad.instantiate_zeros(t) for t in tangents]
    return jax.jvp(kernel.plain, tuple(map(jnp.asarray, primals)), tuple(moved))


_native = Primitive("falcon_native")
_native.def_impl(lambda *operands, kernel: jax.jit(run, static_argnums=0)(kernel, *operands))
_native.def_abstract_eval(lambda x, *_, kernel: ShapedArray(_shape(kernel, x), x.dtype))
ad.primitive_jvps[_native] = _differentiate
batching.primitive_batchers[_native] = _batch
mlir.register_lowering(_native, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(_native, _lower, platform="cpu")
