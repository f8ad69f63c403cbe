"""Channel decomposition: a convolution to fewer channels, then a pointwise one."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from falcon_jax.methods.base import Params
from falcon_jax.methods.chain import HALF, ChainRank, Inner, LowRankChain, Stage
from falcon_jax.methods.registry import register
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.solvers.alternating import low_rank
from falcon_jax.solvers.moments import Moments, quadratics


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelDecomposition(LowRankChain):
    """A convolution to d channels, then a pointwise one to N.

    ``K[..., m, n] = sum_r spatial[..., m, r] pointwise[r, n]``. From the kernel alone, the best
    approximation of rank d of the matrix ``[(D^2 M) x N]``; by `calibrate`, the one whose responses
    to data are nearest to the original layer's, with a new bias.

    Attributes:
        rank: number d of channels between the two; ``full`` (``min(D^2 M, N)``) reproduces any
            kernel, an `Energy` is decided by the trained kernel, and a `Budget` gives the authors'
            ``d = int(M N h w / (ratio (h w M + N)))``.
        inner: method that the first convolution is given to.

    Reference:
        Zhang, Zou, He, Sun: Accelerating Very Deep Convolutional Networks for Classification and
        Detection, TPAMI 2016; combined as in Network Decoupling (arXiv 1808.05517), Section 4.

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32, use_bias=False)
    >>> ChannelDecomposition(rank=8).cost(spec, (8, 8, 16))
    Cost(params=1408, mult_adds=90112)
    """

    rank: ChainRank = HALF
    inner: Inner | Sequence[Inner] = None
    name: ClassVar[str] = "channel_decomposition"
    last_stage: ClassVar[str] = "pointwise"
    former_settings: ClassVar[frozenset[str]] = frozenset({"relu"})

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        if spec.taps == 1:
            return "a 1x1 kernel is pointwise already"
        return super().supports(spec)

    def stages(self, spec: ConvSpec, rank: int) -> tuple[Stage, ...]:
        """Return the convolution to d channels and the pointwise one."""
        axes = tuple(range(len(spec.kernel_size)))
        return Stage("spatial", rank, axes), Stage("pointwise", spec.out_features)

    def matrix(self, kernel: Float[Array, "*kernel_shape"]) -> Float[Array, "inputs n"]:
        """Return the matrix ``[(D^2 M) x N]``."""
        return kernel.reshape(-1, kernel.shape[-1])

    def from_factors(
        self, left: Float[Array, "inputs rank"], right: Float[Array, "rank n"], spec: ConvSpec
    ) -> tuple[Float[Array, "inputs rank"], Float[Array, "rank n"]]:
        """Return the kernel to d channels and the pointwise one: the factors are these."""
        return left, right

    def first_factors(
        self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec, moments: Moments
    ) -> Params:
        """Return the best factors of all; without inner methods, nothing remains to be done."""
        (problem,) = quadratics(moments, kernel)
        rank = self.decided_rank(spec)
        left, right = (jnp.asarray(f, kernel.dtype) for f in low_rank(problem, rank))
        return self.params_of((left, right), spec, rank)
