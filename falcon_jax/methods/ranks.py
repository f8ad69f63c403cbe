"""What a rank can be: a number, full, or whatever keeps a share of the trained kernel's energy."""

import abc
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from falcon_jax.fitting.energy import smallest_rank
from falcon_jax.methods.base import Method
from falcon_jax.methods.spec import ConvSpec
from falcon_jax.numeric import is_number, is_whole


@dataclasses.dataclass(frozen=True)
class Energy:
    """A rank chosen layer by layer: the smallest that keeps a share of the kernel's energy.

    ``1 - ||K - K'||^2 / ||K||^2 >= share``

    Attributes:
        share: more than 0, at most 1.

    Raises:
        ValueError: if the share is out of these bounds.
    """

    share: float | int

    def __post_init__(self):
        if not is_number(self.share) or not 0 < self.share <= 1:
            raise ValueError(f"the share of energy is above 0 and at most 1; got {self.share!r}.")


Rank = int | Literal["full"] | Energy


class RankMethod(Method):
    """A method that approximates matrices cut from the kernel by ones of low rank.

    Subclasses are dataclasses with a field ``rank``.
    """

    rank: Rank

    def __post_init__(self):
        rank = self.rank
        if rank == "full" or isinstance(rank, Energy):
            return
        if not is_whole(rank) or rank < 1:
            raise ValueError(
                f"rank is a whole number of at least 1, 'full' or an Energy; got {rank!r}."
            )

    @abc.abstractmethod
    def matrices(
        self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec
    ) -> Float[Array, "b taps q"]:
        """Return the matrices whose rank is meant."""

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        if spec.taps == 1:
            return "a 1x1 kernel has nothing to separate"
        if isinstance(self.rank, int) and self.rank > spec.taps:
            return (
                f"rank {self.rank} is more than the {spec.taps} taps, "
                "with which every kernel is exact"
            )
        return None

    def for_layer(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> "RankMethod":
        """Return the method with the number that its rank stands for in this layer."""
        if isinstance(self.rank, int):
            return self
        if self.rank == "full":
            like = jax.ShapeDtypeStruct(spec.kernel_shape, jnp.float32)
            shape = jax.eval_shape(lambda kernel: self.matrices(kernel, spec), like).shape
            return dataclasses.replace(self, rank=min(shape[1:]))  # type: ignore[type-var]
        if kernels is None:
            raise ValueError(f"a rank by {self.rank} needs a trained kernel to choose it from.")
        rank = smallest_rank(self.stacked_matrices(kernels, spec), self.rank.share)
        return dataclasses.replace(self, rank=rank)  # type: ignore[type-var]

    def stacked_matrices(
        self, kernels: Float[Array, "layers *kernel_shape"], spec: ConvSpec
    ) -> Float[Array, "layers b taps q"]:
        """Return the matrices of every kernel of a stack."""
        return jax.vmap(lambda kernel: self.matrices(kernel, spec))(kernels)

    def terms(self, spec: ConvSpec, kernel: Float[Array, "*kernel_shape"] | None = None) -> int:
        """Return the rank in this layer as a number.

        Raises:
            ValueError: if the rank is an `Energy` and there is no kernel.
        """
        if isinstance(self.rank, int):
            return self.rank
        return self.for_layer(spec, None if kernel is None else kernel[None]).terms(spec)
