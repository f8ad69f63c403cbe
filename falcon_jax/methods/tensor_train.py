"""Tensor train: pointwise, one convolution along each spatial axis, pointwise."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from falcon_jax.methods.chain import HALF, Chain, Stage
from falcon_jax.methods.ranks import Budget
from falcon_jax.methods.registry import register
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.settings import is_whole
from falcon_jax.solvers.low_rank import best_low_rank


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorTrain(Chain):
    """The kernel as a train of cores: input channels, the spatial axes in turn, output channels.

    ``K[i, j, m, n] = sum_abc inner[m, a] axis0[i, a, b] axis1[j, b, c] outer[c, n]``

    Parameters: ``inner`` of shape ``(M, R_0)``, ``axis0`` of shape ``(D, 1, R_0, R_1)``, ``axis1``
    of shape ``(1, D, R_1, R_2)``, ... and ``outer`` of shape ``(R_d, N)``.

    Attributes:
        rank: one number for all ranks (each cut to what is exact), all ``d + 1`` of them for d
            spatial axes, a `Budget`, or ``full``, which reproduces any kernel.

    Reference:
        Oseledets: Tensor-Train Decomposition, SIAM J. Sci. Comput. 2011, Algorithm 1; Garipov et
        al.: Ultimate Tensorization, 2016.

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32, use_bias=False)
    >>> TensorTrain(rank=8).cost(spec, (8, 8, 16))
    Cost(params=768, mult_adds=49152)
    """

    rank: int | Sequence[int] | Literal["full"] | Budget = HALF
    name: ClassVar[str] = "tensor_train"
    last_stage: ClassVar[str] = "outer"

    def __post_init__(self):
        rank = self.rank
        if rank == "full" or isinstance(rank, Budget):
            return
        if isinstance(rank, Sequence) and not isinstance(rank, str):
            rank = tuple(rank)
            object.__setattr__(self, "rank", rank)
        numbers = rank if isinstance(rank, tuple) and rank else (rank,)
        if any(not is_whole(r) or r < 1 for r in numbers):
            raise ValueError(
                "rank is a number, one for each bond, 'full' or a Budget, numbers at least 1; got "
                f"{rank!r}."
            )

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        if (reason := super().supports(spec)) is not None:
            return reason
        if spec.taps == 1:
            return "a 1x1 kernel has nothing spatial to take apart"
        most = _exact_ranks(spec)
        if isinstance(self.rank, tuple) and len(self.rank) != len(most):
            return f"{len(self.rank)} ranks are given, but its train has {len(most)}"
        if isinstance(self.rank, tuple) and any(
            r > e for r, e in zip(self.rank, most, strict=True)
        ):
            return f"ranks {self.rank} are more than {most}, with which every kernel is exact"
        if isinstance(self.rank, Budget):
            return self.rank.reason(spec, self.factor_params(spec, self.smallest_rank(spec)))
        return None

    def decided_rank(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> tuple[int, ...]:
        """Return all ranks in numbers."""
        rank, most = self.rank, _exact_ranks(spec)
        if isinstance(rank, Budget):
            return rank.proportional(spec, lambda ranks: self.factor_params(spec, ranks), most)
        if isinstance(rank, int):
            return tuple(min(rank, bound) for bound in most)
        return most if isinstance(rank, str) else tuple(rank)

    def smallest_rank(self, spec: ConvSpec) -> tuple[int, ...]:
        """Return the least ranks."""
        return (1,) * (len(spec.kernel_size) + 1)

    def stages(self, spec: ConvSpec, rank: tuple[int, ...]) -> tuple[Stage, ...]:
        """Return the two pointwise convolutions and one along each axis between them."""
        along = (Stage(f"axis{axis}", rank[axis + 1], (axis,)) for axis in range(len(rank) - 1))
        return (Stage("inner", rank[0]), *along, Stage("outer", spec.out_features))

    def factorize(
        self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec, rank: tuple[int, ...]
    ) -> Sequence[Array]:
        """Return the cores that TT-SVD finds: one truncated SVD after another."""
        rest, cores = jnp.moveaxis(kernel, -2, 0), []
        for size, before, after in zip(
            (spec.in_features, *spec.kernel_size), (1, *rank), rank, strict=False
        ):
            left, right = best_low_rank(rest.reshape(1, before * size, -1), rank=after)
            # All of a singular value goes on, so that the next cut sees its true weight.
            root = jnp.linalg.norm(left[0], axis=0)
            unit = left[0] / jnp.where(root > 0, root, 1)[None]
            cores.append(unit.reshape(before, size, after).swapaxes(0, 1))
            rest = root[:, None] * right[0]
        return *cores, rest


def _exact_ranks(spec: ConvSpec) -> tuple[int, ...]:
    """Return the ranks of the train with which every kernel is exact."""
    sizes = (spec.in_features, *spec.kernel_size, spec.out_features)
    cuts = range(1, len(sizes))
    return tuple(min(math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in cuts)
