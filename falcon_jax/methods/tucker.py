"""Tucker-2: pointwise, spatial, pointwise."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax import ops
from falcon_jax.fitting.tucker import tucker2
from falcon_jax.methods.base import (
    Cost,
    Method,
    Params,
    bias_cost,
    flatten_batch,
    scale_outputs,
    spatial_shape,
    unit_gain,
)
from falcon_jax.methods.channel_ranks import Budget, Named, estimated_ranks, too_large
from falcon_jax.methods.registry import register
from falcon_jax.methods.spec import ConvSpec
from falcon_jax.numeric import is_whole

ChannelRanks = Named | Literal["full"] | Budget | int | Sequence[int]


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tucker(Method):
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
    """

    rank: ChannelRanks = "vbmf"
    name: ClassVar[str] = "tucker"

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
        if spec.feature_group_count != 1:
            return "Tucker is for one feature group"
        if spec.taps == 1:
            return "a 1x1 kernel has nothing spatial to keep apart"
        if isinstance(self.rank, Budget):
            return self.rank.reason(spec, _params(spec, 1, 1))
        if self.rank in ("vbmf", "full"):
            return None
        r_in, r_out = self._ranks(spec)
        return too_large(r_in, spec.in_features, "input") or too_large(
            r_out, spec.out_features, "output"
        )

    def for_layer(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> "Tucker":
        """Return Tucker of the ranks that a layer needs."""
        return dataclasses.replace(self, rank=self._ranks(spec, kernels))

    def _ranks(self, spec: ConvSpec, kernels: Array | None = None) -> tuple[int, int]:
        rank, m, n = self.rank, spec.in_features, spec.out_features
        if isinstance(rank, tuple):
            return rank[0], rank[1]
        if isinstance(rank, int):
            return rank, rank
        if rank == "full":
            return m, n
        if isinstance(rank, Budget):
            return _within(rank, spec)
        return estimated_ranks(kernels, spec)

    def init(self, key: PRNGKeyArray, spec: ConvSpec) -> Params:
        """Return random parameters that keep the variance, He on the last step."""
        self.require(spec)
        r_in, r_out = self._ranks(spec)
        keys = jax.random.split(key, 3)
        gain = initializers.variance_scaling(2.0, "fan_in", "uniform")
        return {
            "inner": unit_gain(keys[0], (spec.in_features, r_in), spec.in_features),
            "core": unit_gain(keys[1], (*spec.kernel_size, r_in, r_out), spec.taps * r_in),
            "outer": gain(keys[2], (r_out, spec.out_features)),
        }

    def fit(self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> Params:
        """Return the decomposition that HOSVD and HOOI find."""
        self.require(spec, kernel)
        r_in, r_out = self._ranks(spec, kernel[None])
        flat = kernel.reshape(spec.taps, spec.in_features, spec.out_features)
        inner, core, outer = tucker2(flat, rank_in=r_in, rank_out=r_out)
        return {
            "inner": inner,
            "core": core.reshape(*spec.kernel_size, *core.shape[1:]),
            "outer": outer,
        }

    def kernel(self, params: Params, spec: ConvSpec) -> Float[Array, "*kernel_shape"]:
        """Return the equivalent standard kernel."""
        return jnp.einsum("ma,...ab,bn->...mn", params["inner"], params["core"], params["outer"])

    def apply(
        self,
        params: Params,
        x: Float[Array, "*batch m"],
        spec: ConvSpec,
        *,
        precision: lax.PrecisionLike = None,
    ) -> Float[Array, "*batch_out n"]:
        """Convolve ``x`` of shape ``(..., *spatial, M)`` without adding a bias."""
        x, batch = flatten_batch(x, spec)
        y = ops.pointwise_conv(x, params["inner"], precision=precision)
        y = ops.conv(y, params["core"], **spec.geometry, precision=precision)
        y = ops.pointwise_conv(y, params["outer"], precision=precision)
        return y.reshape(*batch, *y.shape[1:])

    def factors(self, spec: ConvSpec) -> tuple[str, ...]:
        """Return the names of parameters in each of which the kernel is linear."""
        return ("inner", "core", "outer")

    def with_gain(self, params: Params, gain: Float[Array, "*stack n"]) -> Params:
        """Return parameters of the kernel with output channels multiplied by a gain."""
        return params | {"outer": scale_outputs(params["outer"], gain)}

    def cost(self, spec: ConvSpec, input_shape: Sequence[int]) -> Cost:
        """Return ``M R_in + D^2 R_in R_out + R_out N`` parameters, each times its points."""
        spatial = spatial_shape(spec, input_shape)
        points_in, points_out = math.prod(spatial), math.prod(spec.output_shape(spatial))
        r_in, r_out = self._ranks(spec)
        inner = spec.in_features * r_in
        rest = _params(spec, r_in, r_out) - inner
        return Cost(
            params=inner + rest, mult_adds=points_in * inner + points_out * rest
        ) + bias_cost(spec, points_out)


def _within(budget: Budget, spec: ConvSpec) -> tuple[int, int]:
    """Return ranks in the proportion of the channels, then one by one what still fits."""
    channels = (spec.in_features, spec.out_features)

    def ranks(step: int) -> tuple[int, int]:
        r_in, r_out = (max(1, c * step // max(channels)) for c in channels)
        return r_in, r_out

    r_in, r_out = ranks(
        budget.largest(spec, lambda step: _params(spec, *ranks(step)), max(channels))
    )
    while True:
        wider = [(r_in + 1, r_out), (r_in, r_out + 1)]
        wider = [r for r in wider if r[0] <= channels[0] and r[1] <= channels[1]]
        wider = [r for r in wider if _params(spec, *r) <= budget.params(spec)]
        if not wider:
            return r_in, r_out
        r_in, r_out = min(wider, key=lambda r: max(r[0] / channels[0], r[1] / channels[1]))


def _params(spec: ConvSpec, r_in: int, r_out: int) -> int:
    return spec.in_features * r_in + spec.taps * r_in * r_out + r_out * spec.out_features
