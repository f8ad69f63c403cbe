"""Weights rounded to a grid of a few bits after training, and what they take up then."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt8

from falcon_jax.frameworks.interface import M, Model, framework_of
from falcon_jax.methods.fit import check_finite
from falcon_jax.solvers.scale import largest_exponent, times_power_of_two
from falcon_jax.terminal import Printable, Table


class QuantizedArray(NamedTuple):
    """An array on an even grid: ``minimum + scale * codes``.

    Attributes:
        codes: which point of the grid each entry is.
        minimum: the first point.
        scale: from one point to the next; 0 if all entries are equal.

    >>> quantize_linear(jnp.array([0.0, 1.2, 255.0])).values().tolist()
    [0.0, 1.0, 255.0]
    """

    codes: UInt8[Array, "*shape"]
    minimum: Float[Array, ""]
    scale: Float[Array, ""]

    def values(self) -> Float[Array, "*shape"]:
        """Return the entries, float32."""
        largest = jnp.finfo(jnp.float32).max
        part = jnp.where(jnp.isinf(255 * self.scale), 2.0**-8, 1.0).astype(jnp.float32)
        entries = part * self.minimum + part * self.scale * self.codes.astype(jnp.float32)
        return jnp.clip(entries, -part * largest, part * largest) / part

    def packed(self, bits: int) -> "PackedArray":
        """Return codes of so many bits without gaps between them."""
        codes = np.asarray(self.codes).reshape(-1, 1)
        shifts = np.arange(bits, dtype=np.uint8)[::-1]
        return PackedArray(
            codes=np.packbits(codes >> shifts & np.uint8(1)),
            minimum=np.float32(self.minimum),
            scale=np.float32(self.scale),
        )


class PackedArray(NamedTuple):
    """A `QuantizedArray` as it is kept in files.

    Attributes:
        codes: of all entries, one after the other, most significant bits first; the last byte is
            filled up with zeros.
        minimum: the first point of the grid.
        scale: from one point to the next.
    """

    codes: UInt8[np.ndarray, " bytes"]
    minimum: np.float32
    scale: np.float32

    def values(self, shape: tuple[int, ...], bits: int) -> Float[np.ndarray, "*shape"]:
        """Return the entries, float32, bit for bit as `QuantizedArray.values` has them.

        Raises:
            ValueError: if there are not as many codes as entries.
        """
        size = math.prod(shape)
        if self.codes.shape != (packed_bytes(size, bits),):
            raise ValueError(
                f"{size} codes of {bits} bits take up {packed_bytes(size, bits)} bytes; got "
                f"{self.codes.shape}."
            )
        digits = np.unpackbits(self.codes, count=size * bits).reshape(size, bits)
        weights = 1 << np.arange(bits, dtype=np.uint16)[::-1]
        codes = (digits * weights).sum(axis=1).astype(np.uint8).reshape(shape)
        whole = QuantizedArray(
            jnp.asarray(codes), jnp.asarray(self.minimum), jnp.asarray(self.scale)
        )
        return np.asarray(whole.values())


def packed_bytes(size: int, bits: int) -> int:
    """Return the bytes that so many codes take up."""
    return -(-size * bits // 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationRow:
    """One quantised tensor.

    Attributes:
        path: where it is, joined with ``/``.
        size: its entries.
        effective_size: 32-bit floats that codes, minimum and scale take up.
    """

    path: str
    size: int
    effective_size: float | int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization(Printable):
    """What `quantize_weights` did to a model.

    Attributes:
        rows: one for every quantised tensor, in the order of definition.
        params: trainable parameters of the model, as `profile` counts them.
        bits: of a code.
        codes: of every quantised tensor, by path; `save_compressed` writes them in its place.

    >>> from flax import nnx
    >>> _, report = quantize_weights(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
    >>> print(report)
    tensor           params  effective params
    kernel               32             10.00
    everything else       8              8.00
    total                40             18.00
    2.2 times fewer
    """

    rows: tuple[QuantizationRow, ...]
    params: int
    bits: int
    codes: Mapping[str, QuantizedArray] = dataclasses.field(repr=False, compare=False)

    @property
    def effective_params(self) -> float | int:
        """32-bit floats that the parameters take up, those that were not quantised in full."""
        return self.params + sum(row.effective_size - row.size for row in self.rows)

    @property
    def ratio(self) -> float:
        """How many times fewer the effective parameters are."""
        return self.params / self.effective_params

    def parts(self) -> list[Table | str]:
        """Return the table of tensors, and how many times fewer numbers there are."""
        sizes = [(row.path, row.size, row.effective_size) for row in self.rows]
        rest = self.params - sum(row.size for row in self.rows)
        sizes += [("everything else", rest, rest), ("total", self.params, self.effective_params)]
        lines = [(name, f"{size:,}", f"{effective:,.2f}") for name, size, effective in sizes]
        lines.insert(0, ("tensor", "params", "effective params"))
        return [Table(lines, right=(1, 2)), f"{self.ratio:.1f} times fewer"]


def quantize_linear(values: Float[ArrayLike, "*shape"], *, bits: int = 8) -> QuantizedArray:
    """Round an array to the nearest of ``2^bits`` evenly spaced numbers.

    ``codes = round((values - min) / scale)``, ``scale = (max - min) / (2^bits - 1)``

    An entry is off by at most ``scale / 2``, and float32 rounding; ``scale`` is no less than the
    smallest normal number, 1.2e-38, unless all entries are equal. Works under jit (``bits``
    static) and vmap, where one value that is not finite makes all of them NaN.

    Args:
        values: any shape, also none or empty.
        bits: of a code, 1 to 8.

    Returns:
        Codes of the shape of ``values``, minimum and scale.

    Raises:
        ValueError: if there are no such bits, or values, or ``scale`` in float32, are not finite.

    Reference:
        FSNet (Yang et al., 2019, arXiv 1902.03264), FSNet-WQ.

    >>> quantize_linear(jnp.array([0.0, 0.5, 51.0])).codes.tolist()
    [0, 2, 255]
    """
    if isinstance(bits, bool) or bits not in range(1, 9):
        raise ValueError(f"bits is a whole number from 1 to 8; got {bits!r}.")
    if np.iscomplexobj(values):
        raise ValueError("quantize_linear takes real numbers; got complex ones.")
    values = jnp.asarray(values, jnp.float32)
    check_finite(values, "the array")
    if not values.size:
        return QuantizedArray(values.astype(jnp.uint8), jnp.float32(0), jnp.float32(0))
    # Near the largest float the range would be infinite, near the smallest the steps 0.
    exponent, last = largest_exponent(values), 2**bits - 1
    near_one = times_power_of_two(values, -exponent)
    least, tiny = jnp.min(near_one), jnp.asarray(jnp.finfo(jnp.float32).tiny)
    step = (jnp.max(near_one) - least) / last
    with np.errstate(over="ignore"):
        scale = times_power_of_two(step, exponent)
    check_finite(scale, "the range of the array, in float32,")
    scale = jnp.where(step > 0, jnp.maximum(scale, tiny), 0)
    step = jnp.maximum(step, times_power_of_two(tiny, -exponent))
    minimum, codes = jnp.min(values), jnp.round((near_one - least) / step)
    return QuantizedArray(jnp.clip(codes, 0, last).astype(jnp.uint8), minimum, scale)


def quantize_weights(model: M, *, bits: int = 8, path: str = r".*") -> tuple[M, Quantization]:
    """Return a copy of a model with weights rounded to a grid of each tensor, and a report.

    ``effective_size = size * bits / 32 + 2``

    Quantised are the kernels of convolutions and fully connected layers, and all parameters of a
    convolution under a method; no bias, no norm. Layers stacked by scan or vmap are one tensor. The
    copy computes with floats on the grid and is no smaller in memory; the report has the codes, and
    files written with it (``save_compressed(..., quantization=report)``, `export.safetensors`) hold
    them in place of the floats. Unlike the paper's counts, the report's leave out BatchNorm's
    running statistics.

    Args:
        model: an NNX model, or a Linen module bound to its variables; it is not changed.
        bits: of a code, 1 to 8.
        path: regular expression that must match the whole ``/``-joined path of such a tensor.

    Returns:
        The copy and the report.

    Raises:
        ValueError: if a Linen module is not bound, weights are not finite, or bits or path fit
            nothing.

    Reference:
        FSNet (Yang et al., 2019, arXiv 1902.03264), FSNet-WQ.

    >>> from flax import nnx
    >>> layer = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    >>> coarse, report = quantize_weights(layer, bits=2)
    >>> len(set(coarse.kernel[...].ravel().tolist()))
    4
    """
    framework: Any = framework_of(model)
    rounded, rows = {}, []
    codes: dict[str, QuantizedArray] = {}
    for name, values in _chosen(model, path).items():
        if isinstance(values, jax.ShapeDtypeStruct):
            raise ValueError("the model has shapes in place of weights; give one that has arrays.")
        check_finite(values, name)
        try:
            codes[name] = quantize_linear(values, bits=bits)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        rounded[name] = codes[name].values().astype(values.dtype)
        size = values.size * bits / 32 + 2
        rows.append(QuantizationRow(path=name, size=values.size, effective_size=size))
    params = sum(math.prod(array.shape) for array in framework.params(model).values())
    return framework.with_params(model, rounded), Quantization(
        rows=tuple(rows), params=params, bits=bits, codes=codes
    )


def packed_arrays(
    arrays: Mapping[str, np.ndarray], quantization: Quantization
) -> dict[str, PackedArray]:
    """Return the codes of a model's quantised arrays, as files keep them.

    Args:
        arrays: of the model, by path.
        quantization: what `quantize_weights` returned with it.

    Raises:
        ValueError: if an array is not there, or is no longer what its codes say.
    """
    packed = {}
    for name, codes in quantization.codes.items():
        kept = codes.packed(quantization.bits)
        stored = name if name in arrays else f"params/{name}"  # of a Linen module
        if stored not in arrays:
            raise ValueError(f"the model has no {name}, which the quantization has codes of.")
        array = arrays[stored]
        values = kept.values(array.shape, quantization.bits).astype(array.dtype)
        if not np.array_equal(values, array):
            raise ValueError(
                f"{name} is not what its codes say; give the model that quantize_weights returned "
                "with them, not trained or folded since."
            )
        packed[stored] = kept
    return packed


def _chosen(model: Model, pattern: str) -> dict[str, Any]:
    framework = framework_of(model)
    arrays = framework.params(model)
    found = {name: arrays[name] for name in framework.weight_names(model)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution or fully connected layer.")
    try:
        chosen = {name: v for name, v in found.items() if re.fullmatch(pattern, name)}
    except re.error as error:
        raise ValueError(f"path {pattern!r} is no regular expression: {error}.") from None
    if not chosen:
        paths = "".join(f"\n  {name}" for name in found)
        raise ValueError(f"no tensor matches path={pattern!r} as a whole. The paths are:{paths}")
    return chosen
