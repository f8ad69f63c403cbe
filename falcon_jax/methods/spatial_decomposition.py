"""Spatial decomposition: a vertical convolution, then a horizontal one."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from falcon_jax.methods.chain import HALF, Chain, ChainRank, Inner
from falcon_jax.methods.registry import register
from falcon_jax.methods.spec import ConvSpec


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialDecomposition(Chain):
    """A vertical h x 1 convolution to r channels, then a horizontal 1 x w one.

    ``K[i, j, m, n] = sum_r vertical[i, 0, m, r] horizontal[0, j, r, n]``, the best approximation of
    rank r of the matrix ``[(h, m) x (w, n)]``

    Attributes:
        rank: number r of channels between the two; ``full`` (``min(h M, w N)``) reproduces any
            kernel, an `Energy` is decided by the trained kernel, and a `Budget` gives the authors'
            ``r = int(M N h w / (ratio (h M + w N)))``.
        inner: method that the two convolutions are given to, or one for each of them.

    Reference:
        Jaderberg, Vedaldi, Zisserman: Speeding up Convolutional Neural Networks with Low Rank
        Expansions, BMVC 2014; combined as in Network Decoupling (arXiv 1808.05517), Section 4.
    """

    rank: ChainRank = HALF
    inner: Inner | Sequence[Inner] = None
    name: ClassVar[str] = "spatial_decomposition"
    stage_names: ClassVar[tuple[str, str]] = ("vertical", "horizontal")

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        if len(spec.kernel_size) != 2 or min(spec.kernel_size) == 1:
            size = "x".join(map(str, spec.kernel_size))
            return f"a {size} kernel has no height and width to take apart"
        return super().supports(spec)

    def stages(self, spec: ConvSpec, rank: int) -> tuple[ConvSpec, ConvSpec]:
        """Return the vertical and the horizontal convolution."""
        (h, w), m, n = spec.kernel_size, spec.in_features, spec.out_features
        return (
            _along(spec, 0, kernel_size=(h, 1), in_features=m, out_features=rank),
            _along(spec, 1, kernel_size=(1, w), in_features=rank, out_features=n),
        )

    def matrix(self, kernel: Float[Array, "h w m n"], spec: ConvSpec) -> Float[Array, "hm wn"]:
        """Return the matrix ``[(h, m) x (w, n)]``."""
        h, w, m, n = kernel.shape
        return kernel.transpose(0, 2, 1, 3).reshape(h * m, w * n)

    def stage_kernels(
        self, left: Float[Array, "hm rank"], right: Float[Array, "rank wn"], spec: ConvSpec
    ) -> tuple[Float[Array, "h 1 m rank"], Float[Array, "1 w rank n"]]:
        """Return the vertical and the horizontal kernel."""
        (h, w), rank = spec.kernel_size, right.shape[0]
        horizontal = right.reshape(rank, w, spec.out_features).transpose(1, 0, 2)
        return left.reshape(h, 1, spec.in_features, rank), horizontal[None]

    def joined(
        self, first: Float[Array, "h 1 m rank"], second: Float[Array, "1 w rank n"]
    ) -> Float[Array, "h w m n"]:
        """Return the kernel that the two are together."""
        return jnp.einsum("hmr,wrn->hwmn", first[:, 0], second[0])


def _along(spec: ConvSpec, axis: int, **sizes: int | tuple[int, int]) -> ConvSpec:
    """Return the convolution along one axis, which leaves the other as it is."""
    kept = {
        name: tuple(v if i == axis else 1 for i, v in enumerate(getattr(spec, name)))
        for name in ("strides", "kernel_dilation", "input_dilation")
    }
    padding = spec.padding
    if not isinstance(padding, str):
        padding = tuple(pair if i == axis else (0, 0) for i, pair in enumerate(padding))
    return ConvSpec(**sizes, **kept, padding=padding, use_bias=False)  # type: ignore[arg-type]
