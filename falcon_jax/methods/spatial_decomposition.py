"""Spatial decomposition: a vertical convolution, then a horizontal one."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Array, Float

from falcon_jax.methods.chain import HALF, ChainRank, Inner, LowRankChain, Stage
from falcon_jax.methods.registry import register
from falcon_jax.ops.geometry import ConvSpec


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialDecomposition(LowRankChain):
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

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32, use_bias=False)
    >>> SpatialDecomposition(rank=8).cost(spec, (8, 8, 16))
    Cost(params=1152, mult_adds=73728)
    """

    rank: ChainRank = HALF
    inner: Inner | Sequence[Inner] = None
    name: ClassVar[str] = "spatial_decomposition"
    last_stage: ClassVar[str] = "horizontal"

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        if len(spec.kernel_size) != 2 or min(spec.kernel_size) == 1:
            size = "x".join(map(str, spec.kernel_size))
            return f"a {size} kernel has no height and width to take apart"
        return super().supports(spec)

    def stages(self, spec: ConvSpec, rank: int) -> tuple[Stage, ...]:
        """Return the vertical and the horizontal convolution."""
        return Stage("vertical", rank, (0,)), Stage("horizontal", spec.out_features, (1,))

    def matrix(self, kernel: Float[Array, "h w m n"]) -> Float[Array, "hm wn"]:
        """Return the matrix ``[(h, m) x (w, n)]``."""
        h, w, m, n = kernel.shape
        return kernel.transpose(0, 2, 1, 3).reshape(h * m, w * n)

    def from_factors(
        self, left: Float[Array, "hm rank"], right: Float[Array, "rank wn"], spec: ConvSpec
    ) -> tuple[Float[Array, "hm rank"], Float[Array, "w rank n"]]:
        """Return the vertical and the horizontal kernel."""
        rows = right.reshape(right.shape[0], spec.kernel_size[1], spec.out_features)
        return left, rows.transpose(1, 0, 2)
