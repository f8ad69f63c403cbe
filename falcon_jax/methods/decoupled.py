"""Network decoupling: a sum of separable terms, as many as an energy asks for."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.methods.base import Cost, Method, Params
from falcon_jax.methods.depthwise_separable import DepthwiseSeparable
from falcon_jax.methods.falcon import Falcon
from falcon_jax.methods.ranks import RankMethod
from falcon_jax.methods.registry import register
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.settings import is_number
from falcon_jax.solvers.moments import Moments
from falcon_jax.solvers.rank_selection import mean_kept_energy, smallest_rank

Order = Literal["pw-dw", "dw-pw"]


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoupled(Method):
    """T parallel branches of pointwise and depthwise convolution, summed; no training needed.

    With ``pw-dw``, T terms are `Falcon` of rank T, with ``dw-pw`` `DepthwiseSeparable`: same
    parameters, same optimum (Eckart-Young). What differs is how T is chosen, by the energy that
    the filters keep on average, and that BatchNorm is folded into the kernels first
    (`fold_batchnorm`).

    Attributes:
        order: which step comes first; the authors' default is ``pw-dw``.
        terms: number T of terms, or ``full``, which reproduces any kernel.
        energy: instead of ``terms``: the share of its energy that a filter keeps on average;
            0.95, the authors' threshold, if neither is given.

    Raises:
        ValueError: if both are given, or one is out of bounds.

    Reference:
        Guo, Li, Lin, Chen, Li: Network Decoupling, BMVC 2018 (arXiv 1808.05517).

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32, use_bias=False)
    >>> Decoupled(terms=2).cost(spec, (8, 8, 16))
    Cost(params=1600, mult_adds=102400)
    """

    order: Order = "pw-dw"
    terms: int | Literal["full"] | None = None
    energy: float | int | None = None
    name: ClassVar[str] = "decoupled"

    def __post_init__(self):
        if self.order not in get_args(Order):
            raise ValueError(f"order is one of {', '.join(get_args(Order))}; got {self.order!r}.")
        if self.terms is not None and self.energy is not None:
            raise ValueError("give either terms or energy, not both.")
        if self.terms is None and self.energy is None:
            object.__setattr__(self, "energy", 0.95)
        energy = self.energy
        if energy is not None and (not is_number(energy) or not 0 < energy <= 1):
            raise ValueError(f"energy is above 0 and at most 1; got {self.energy!r}.")
        if self.terms is not None:
            self._separable(self.terms)

    def label(self) -> str:
        """Return name, order and number of terms."""
        return f"{self.name} {self.order} {self.terms or self.energy}"

    def _separable(self, rank: int | Literal["full"]) -> RankMethod:
        return Falcon(rank=rank) if self.order == "pw-dw" else DepthwiseSeparable(rank=rank)

    def _decided(self, spec: ConvSpec, kernels: Array | None = None) -> RankMethod:
        """Return the separable method that this is in a layer."""
        terms = self.for_layer(spec, kernels).terms
        assert terms is not None
        return self._separable(terms)

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        return self._separable(1 if self.terms is None else self.terms).supports(spec)

    def for_layer(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> "Decoupled":
        """Return the method with the number of terms that a layer needs."""
        if isinstance(self.terms, int):
            return self
        if self.terms == "full":
            return dataclasses.replace(self, terms=self._separable("full").terms(spec))
        if kernels is None:
            raise ValueError(
                f"terms by energy ({self.energy}) need a trained kernel to choose them from."
            )
        assert self.energy is not None
        stack = self._separable(1).stacked_matrices(kernels, spec)
        terms = smallest_rank(stack, self.energy, measure=mean_kept_energy)
        return dataclasses.replace(self, terms=terms, energy=None)

    def init(self, key: PRNGKeyArray, spec: ConvSpec) -> Params:
        """Return random parameters."""
        return self._decided(spec).init(key, spec)

    def fit(self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> Params:
        """Return the leading singular terms of the matrix of every filter."""
        return self._decided(spec, kernel[None]).fit(kernel, spec)

    def fit_moments(
        self,
        kernel: Float[Array, "*kernel_shape"],
        spec: ConvSpec,
        moments: Moments,
        start: Params | None = None,
    ) -> Params:
        """Return the fit of the separable method with as many terms."""
        return self._decided(spec, kernel[None]).fit_moments(kernel, spec, moments, start)

    def kernel(self, params: Params, spec: ConvSpec) -> Float[Array, "*kernel_shape"]:
        """Return the equivalent standard kernel."""
        return self._separable(1).kernel(params, spec)

    def factors(self, spec: ConvSpec) -> tuple[str, ...]:
        """Return the names of parameters in each of which the kernel is linear."""
        return self._separable(1).factors(spec)

    def apply(
        self,
        params: Params,
        x: Float[Array, "b *spatial m"],
        spec: ConvSpec,
        *,
        precision: lax.PrecisionLike = None,
    ) -> Float[Array, "b *spatial_out n"]:
        """Convolve ``x`` of shape ``(b, *spatial, M)`` without adding a bias."""
        return self._separable(1).apply(params, x, spec, precision=precision)

    def with_gain(self, params: Params, gain: Float[Array, "*stack n"]) -> Params | None:
        """Return parameters of the kernel with output channels multiplied by a gain."""
        return self._separable(1).with_gain(params, gain)

    def cost(self, spec: ConvSpec, input_shape: Sequence[int]) -> Cost:
        """Return the cost of the separable method with as many terms."""
        return self._decided(spec).cost(spec, input_shape)
