"""CP decomposition: pointwise, one depthwise step an axis, pointwise."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax import ops
from falcon_jax.fitting.cp import cp_als
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
from falcon_jax.methods.channel_ranks import Budget, Named, estimated_ranks
from falcon_jax.methods.registry import register
from falcon_jax.methods.spec import ConvSpec
from falcon_jax.numeric import is_whole

TermRank = Named | Budget | int


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class CP(Method):
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
    """

    rank: TermRank = "vbmf"
    name: ClassVar[str] = "cp"

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
        if spec.feature_group_count != 1:
            return "CP is for one feature group"
        if spec.taps == 1:
            return "a 1x1 kernel has nothing spatial to keep apart"
        if isinstance(self.rank, Budget):
            return self.rank.reason(spec, _params(spec, 1))
        bound = _useful_rank(spec)
        if isinstance(self.rank, int) and self.rank > bound:
            return f"rank {self.rank} is more than {bound}, with which every kernel is exact"
        return None

    def for_layer(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> "CP":
        """Return CP of the rank that a layer needs."""
        return dataclasses.replace(self, rank=self._terms(spec, kernels))

    def _terms(self, spec: ConvSpec, kernels: Array | None = None) -> int:
        if isinstance(self.rank, int):
            return self.rank
        if isinstance(self.rank, Budget):
            bound = _useful_rank(spec)
            return max(self.rank.largest(spec, lambda r: _params(spec, r), bound), 1)
        return max(estimated_ranks(kernels, spec))

    def init(self, key: PRNGKeyArray, spec: ConvSpec) -> Params:
        """Return random parameters that keep the variance, He on the last step."""
        self.require(spec)
        r = self._terms(spec)
        inner_key, outer_key, *keys = jax.random.split(key, 2 + len(spec.kernel_size))
        gain = initializers.variance_scaling(2.0, "fan_in", "uniform")
        return {
            "inner": unit_gain(inner_key, (spec.in_features, r), spec.in_features),
            "outer": gain(outer_key, (r, spec.out_features)),
        } | {
            f"axis{axis}": unit_gain(key, (size, r), size)
            for axis, (key, size) in enumerate(zip(keys, spec.kernel_size, strict=True))
        }

    def fit(self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> Params:
        """Return the decomposition that alternating least squares find."""
        self.require(spec, kernel)
        *axes, inner, outer = cp_als(kernel, rank=self._terms(spec, kernel[None]))
        spatial = {f"axis{axis}": factor for axis, factor in enumerate(axes)}
        return {"inner": inner, "outer": outer.T} | spatial

    def kernel(self, params: Params, spec: ConvSpec) -> Float[Array, "*kernel_shape"]:
        """Return the equivalent standard kernel."""
        taps = params["axis0"]
        for axis in range(1, len(spec.kernel_size)):
            taps = jnp.einsum("...r,dr->...dr", taps, params[f"axis{axis}"])
        return jnp.einsum("...r,mr,rn->...mn", taps, params["inner"], params["outer"])

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
        for axis, size in enumerate(spec.kernel_size):
            ones = (1,) * len(spec.kernel_size)
            shape = (*ones[:axis], size, *ones[axis + 1 :], y.shape[-1])
            kernel = params[f"axis{axis}"].reshape(shape)
            y = ops.depthwise_conv(y, kernel, **_along(spec, axis))
        y = ops.pointwise_conv(y, params["outer"], precision=precision)
        return y.reshape(*batch, *y.shape[1:])

    def factors(self, spec: ConvSpec) -> tuple[str, ...]:
        """Return the names of parameters in each of which the kernel is linear."""
        return ("inner", *(f"axis{axis}" for axis in range(len(spec.kernel_size))), "outer")

    def with_gain(self, params: Params, gain: Float[Array, "*stack n"]) -> Params:
        """Return parameters of the kernel with output channels multiplied by a gain."""
        return params | {"outer": scale_outputs(params["outer"], gain)}

    def cost(self, spec: ConvSpec, input_shape: Sequence[int]) -> Cost:
        """Return ``R (M + D + D + N)`` parameters, each times the points where its step runs."""
        spatial = list(spatial_shape(spec, input_shape))
        out = spec.output_shape(spatial)
        r = self._terms(spec)
        mult_adds = math.prod(spatial) * spec.in_features * r
        for axis, size in enumerate(spec.kernel_size):
            spatial[axis] = out[axis]
            mult_adds += math.prod(spatial) * size * r
        mult_adds += math.prod(out) * r * spec.out_features
        return Cost(params=_params(spec, r), mult_adds=mult_adds) + bias_cost(spec, math.prod(out))


def _params(spec: ConvSpec, rank: int) -> int:
    return rank * (spec.in_features + sum(spec.kernel_size) + spec.out_features)


def _useful_rank(spec: ConvSpec) -> int:
    """Return a rank at which every kernel is exact: the product of all sizes but the largest."""
    sizes = (*spec.kernel_size, spec.in_features, spec.out_features)
    return math.prod(sizes) // max(sizes)


def _along(spec: ConvSpec, axis: int) -> dict[str, Any]:
    """Return the geometry of a step along one axis."""

    def only(values: Sequence[Any], rest: Any) -> tuple[Any, ...]:
        return tuple(value if i == axis else rest for i, value in enumerate(values))

    padding = spec.padding if isinstance(spec.padding, str) else only(spec.padding, (0, 0))
    return {
        "strides": only(spec.strides, 1),
        "padding": padding,
        "input_dilation": only(spec.input_dilation, 1),
        "kernel_dilation": only(spec.kernel_dilation, 1),
    }
