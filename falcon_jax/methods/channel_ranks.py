"""Ranks of channel decompositions: given, estimated from the kernel, or cut to a budget."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
from jax.core import Tracer
from jaxtyping import Array, Float

from falcon_jax.fitting.vbmf import vbmf_rank
from falcon_jax.methods.spec import ConvSpec
from falcon_jax.numeric import is_number


@dataclasses.dataclass(frozen=True)
class Budget:
    """The largest rank whose parameters are at most a share of the standard kernel's.

    ``parameters(rank) <= D^2 M N / ratio``

    Attributes:
        ratio: how many times fewer parameters; above 0.

    Raises:
        ValueError: if the ratio is no finite number above 0.
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
