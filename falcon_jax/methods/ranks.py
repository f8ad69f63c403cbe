"""What a rank can be: a number, full, a share of energy, an estimate, a budget."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from falcon_jax.methods.base import Method
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.settings import is_number, is_whole
from falcon_jax.solvers.rank_selection import smallest_rank, vbmf_rank


@dataclasses.dataclass(frozen=True)
class Energy:
    """A rank chosen layer by layer: the smallest that keeps a share of the kernel's energy.

    ``1 - ||K - K'||^2 / ||K||^2 >= share``

    Attributes:
        share: more than 0, at most 1.

    Raises:
        ValueError: if the share is out of these bounds.

    >>> from falcon_jax.methods import Falcon
    >>> kernel = jnp.ones((3, 3, 4, 8))
    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=4, out_features=8)
    >>> Falcon(rank=Energy(0.9)).for_layer(spec, kernel[None])
    Falcon(rank=1, impl='auto')
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


@dataclasses.dataclass(frozen=True)
class Budget:
    """The largest rank whose parameters are at most a share of the standard kernel's.

    ``parameters(rank) <= D^2 M N / ratio``

    Attributes:
        ratio: how many times fewer parameters; above 0.

    Raises:
        ValueError: if the ratio is no finite number above 0.

    >>> from falcon_jax.methods import TensorTrain
    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32)
    >>> TensorTrain(rank=Budget(4)).for_layer(spec).rank
    (5, 16, 10)
    """

    ratio: float | int

    def __post_init__(self):
        if not is_number(self.ratio) or self.ratio <= 0:
            raise ValueError(
                f"the ratio of a budget is a finite number above 0; got {self.ratio!r}."
            )

    def params(self, spec: ConvSpec) -> float:
        """Return the parameters that a layer may have, the bias left out."""
        return spec.taps * spec.group_in_features * spec.out_features / self.ratio

    def largest(self, spec: ConvSpec, params: Callable[[int], int], bound: int) -> int:
        """Return the largest rank from 0 to ``bound`` that keeps within the budget.

        Args:
            spec: the convolution.
            params: parameters of a rank, increasing.
            bound: no rank above is considered.
        """
        low, high = 0, bound
        while low < high:
            middle = (low + high + 1) // 2
            if params(middle) <= self.params(spec):
                low = middle
            else:
                high = middle - 1
        return low

    def proportional(
        self,
        spec: ConvSpec,
        params: Callable[[tuple[int, ...]], int],
        bounds: Sequence[int],
    ) -> tuple[int, ...]:
        """Return ranks in the proportion of their bounds, then one by one what still fits.

        Args:
            spec: the convolution.
            params: parameters of several ranks, increasing in each.
            bounds: no ranks above are considered.
        """

        def ranks(step: int) -> tuple[int, ...]:
            return tuple(max(1, bound * step // max(bounds)) for bound in bounds)

        found = ranks(self.largest(spec, lambda step: params(ranks(step)), max(bounds)))
        while True:
            wider = [(*found[:i], found[i] + 1, *found[i + 1 :]) for i in range(len(found))]
            wider = [r for r in wider if all(a <= b for a, b in zip(r, bounds, strict=True))]
            wider = [r for r in wider if params(r) <= self.params(spec)]
            if not wider:
                return found
            found = min(wider, key=lambda r: max(a / b for a, b in zip(r, bounds, strict=True)))

    def reason(self, spec: ConvSpec, smallest: int) -> str | None:
        """Return why not even the smallest rank, of so many parameters, is within the budget."""
        if smallest <= self.params(spec):
            return None
        return (
            f"a budget of {int(self.params(spec))} parameters (ratio {self.ratio:g}) cannot be "
            f"met: rank 1 has {smallest}"
        )


Named = Literal["vbmf"]


def estimated_ranks(
    kernels: Float[Array, "layers *kernel_shape"] | None, spec: ConvSpec
) -> tuple[int, int]:
    """Return the VBMF ranks of the input and the output channels, the largest over a stack.

    Noise alone has rank 0; it counts as 1.

    Args:
        kernels: trained kernels with an axis in front.
        spec: the convolution.

    Raises:
        ValueError: if there are no kernels, or their values cannot be seen under a trace.

    Reference:
        Kim et al.: Compression of Deep Convolutional Neural Networks, ICLR 2016, Section 3.1.
    """
    if kernels is None:
        raise ValueError("a rank by VBMF needs a trained kernel to estimate it from.")
    if isinstance(kernels, Tracer):
        raise ValueError(
            "a rank by VBMF depends on the kernel's values, so it cannot be found under jit, vmap "
            "or grad; choose it outside, or give a number."
        )
    m, n = spec.group_in_features, spec.out_features
    flat = jax.device_get(kernels).reshape(-1, spec.taps, m, n)
    inputs = (vbmf_rank(k.transpose(1, 0, 2).reshape(m, -1)) for k in flat)
    outputs = (vbmf_rank(k.reshape(-1, n)) for k in flat)
    return max(1, *inputs), max(1, *outputs)


def too_large(rank: int, channels: int, side: str) -> str | None:
    """Return why a rank does not fit, or None."""
    if rank <= channels:
        return None
    return f"rank {rank} is more than the {channels} {side} channels"
