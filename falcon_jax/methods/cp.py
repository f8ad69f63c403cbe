"""CP decomposition: pointwise, one depthwise step an axis, pointwise."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Array, Float

from falcon_jax.methods.chain import Chain, Stage
from falcon_jax.methods.ranks import Budget, Named, estimated_ranks
from falcon_jax.methods.registry import register
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.settings import is_whole
from falcon_jax.solvers.decompositions import cp_als

TermRank = Named | Budget | int


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class CP(Chain):
    """Canonical polyadic decomposition of the kernel over all its axes.

    ``K[i, j, m, n] = sum_r inner[m, r] axis0[i, r] axis1[j, r] outer[r, n]``

    Parameters: ``inner`` of shape ``(M, R)``, ``axis0``, ``axis1``, ... of shape ``(D, R)``, one a
    spatial axis, and ``outer`` of shape ``(R, N)``. Each spatial step is depthwise along its axis.

    Attributes:
        rank: number R of terms, ``vbmf`` (the larger of the ranks estimated for the input and the
            output channels of the trained kernel) or a `Budget`.

    Reference:
        Lebedev et al.: Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition,
        ICLR 2015; FALCON, Section 4.1.4.

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32, use_bias=False)
    >>> CP(rank=8).cost(spec, (8, 8, 16))
    Cost(params=432, mult_adds=27648)
    """

    rank: TermRank = "vbmf"
    name: ClassVar[str] = "cp"
    last_stage: ClassVar[str] = "outer"

    def __post_init__(self):
        rank = self.rank
        if rank == "vbmf" or isinstance(rank, Budget):
            return
        if not is_whole(rank) or rank < 1:
            raise ValueError(
                f"rank is a whole number of at least 1, 'vbmf' or a Budget; got {rank!r}."
            )

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        if (reason := super().supports(spec)) is not None:
            return reason
        if spec.taps == 1:
            return "a 1x1 kernel has nothing spatial to keep apart"
        if isinstance(self.rank, Budget):
            return self.rank.reason(spec, self.factor_params(spec, self.smallest_rank(spec)))
        bound = _useful_rank(spec)
        if isinstance(self.rank, int) and self.rank > bound:
            return f"rank {self.rank} is more than {bound}, with which every kernel is exact"
        return None

    def decided_rank(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> int:
        """Return the number of terms."""
        if isinstance(self.rank, int):
            return self.rank
        if isinstance(self.rank, Budget):
            bound = _useful_rank(spec)
            return max(
                self.rank.largest(spec, lambda rank: self.factor_params(spec, rank), bound), 1
            )
        return max(estimated_ranks(kernels, spec))

    def stages(self, spec: ConvSpec, rank: int) -> tuple[Stage, ...]:
        """Return the two pointwise convolutions and one depthwise along each axis between them."""
        along = (
            Stage(f"axis{axis}", rank, (axis,), depthwise=True)
            for axis in range(len(spec.kernel_size))
        )
        return (Stage("inner", rank), *along, Stage("outer", spec.out_features))

    def factorize(
        self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec, rank: int
    ) -> Sequence[Array]:
        """Return the decomposition that alternating least squares find."""
        *axes, inner, outer = cp_als(kernel, rank=rank)
        return inner, *axes, outer.T


def _useful_rank(spec: ConvSpec) -> int:
    """Return a rank at which every kernel is exact: the product of all sizes but the largest."""
    sizes = (*spec.kernel_size, spec.in_features, spec.out_features)
    return math.prod(sizes) // max(sizes)
