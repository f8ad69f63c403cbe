"""Tucker-2: pointwise, spatial, pointwise."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from jaxtyping import Array, Float

from falcon_jax.methods.chain import Chain, Stage
from falcon_jax.methods.ranks import Budget, Named, estimated_ranks, too_large
from falcon_jax.methods.registry import register
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.settings import is_whole
from falcon_jax.solvers.decompositions import tucker2

ChannelRanks = Named | Literal["full"] | Budget | int | Sequence[int]


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tucker(Chain):
    """Partial Tucker decomposition: channels are mixed down, convolved, and mixed up again.

    ``K[i, j, m, n] = sum_ab inner[m, a] core[i, j, a, b] outer[b, n]``

    Parameters: ``inner`` of shape ``(M, R_in)``, ``core`` of shape ``(*kernel_size, R_in, R_out)``
    and ``outer`` of shape ``(R_out, N)``.

    Attributes:
        rank: ``(R_in, R_out)``, one number for both, ``vbmf`` (estimated from the trained kernel),
            a `Budget`, or ``full``, which reproduces any kernel.

    Reference:
        Kim et al.: Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
        Applications, ICLR 2016; FALCON, Section 4.1.4.

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32, use_bias=False)
    >>> Tucker(rank=(4, 8)).cost(spec, (8, 8, 16))
    Cost(params=608, mult_adds=38912)
    """

    rank: ChannelRanks = "vbmf"
    name: ClassVar[str] = "tucker"
    last_stage: ClassVar[str] = "outer"

    def __post_init__(self):
        rank = self.rank
        if rank in ("vbmf", "full") or isinstance(rank, Budget):
            return
        if isinstance(rank, Sequence):
            rank = tuple(rank)
            object.__setattr__(self, "rank", rank)
        numbers = rank if isinstance(rank, tuple) and len(rank) == 2 else (rank,)
        if any(not is_whole(r) or r < 1 for r in numbers):
            raise ValueError(
                "rank is (R_in, R_out), one number for both, 'vbmf', 'full' or a Budget, numbers "
                f"at least 1; got {rank!r}."
            )

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        if (reason := super().supports(spec)) is not None:
            return reason
        if spec.taps == 1:
            return "a 1x1 kernel has nothing spatial to keep apart"
        if isinstance(self.rank, Budget):
            return self.rank.reason(spec, self.factor_params(spec, self.smallest_rank(spec)))
        if self.rank in ("vbmf", "full"):
            return None
        r_in, r_out = self.decided_rank(spec)
        return too_large(r_in, spec.in_features, "input") or too_large(
            r_out, spec.out_features, "output"
        )

    def decided_rank(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> tuple[int, int]:
        """Return ``(R_in, R_out)`` in numbers."""
        rank, m, n = self.rank, spec.in_features, spec.out_features
        if isinstance(rank, tuple):
            return rank[0], rank[1]
        if isinstance(rank, int):
            return rank, rank
        if rank == "full":
            return m, n
        if isinstance(rank, Budget):
            r_in, r_out = rank.proportional(spec, lambda r: self.factor_params(spec, r), (m, n))
            return r_in, r_out
        return estimated_ranks(kernels, spec)

    def smallest_rank(self, spec: ConvSpec) -> tuple[int, int]:
        """Return the least ranks."""
        return 1, 1

    def stages(self, spec: ConvSpec, rank: tuple[int, int]) -> tuple[Stage, ...]:
        """Return the two pointwise convolutions and the spatial one between them."""
        r_in, r_out = rank
        axes = tuple(range(len(spec.kernel_size)))
        return (
            Stage("inner", r_in),
            Stage("core", r_out, axes),
            Stage("outer", spec.out_features),
        )

    def factorize(
        self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec, rank: tuple[int, int]
    ) -> Sequence[Array]:
        """Return the decomposition that HOSVD and HOOI find."""
        r_in, r_out = rank
        flat = kernel.reshape(spec.taps, spec.in_features, spec.out_features)
        return tucker2(flat, rank_in=r_in, rank_out=r_out)
