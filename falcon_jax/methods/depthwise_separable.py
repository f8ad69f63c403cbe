"""Depthwise first, then pointwise: DPConv, and GEP-in when fitted to a trained kernel."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.gep import separable_kernel
from falcon_jax.methods.base import (
    WARM_SWEEPS,
    Cost,
    Params,
    scale_outputs,
    spatial_shape,
    unit_gain,
)
from falcon_jax.methods.ranks import Rank, RankMethod
from falcon_jax.methods.registry import register
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.ops.separable import depthwise_then_pointwise
from falcon_jax.solvers.alternating import separable_als, separable_best
from falcon_jax.solvers.low_rank import best_terms
from falcon_jax.solvers.moments import Moments, dense_kernel, quadratics


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthwiseSeparable(RankMethod):
    """Rank-k depthwise separable convolution.

    ``K[i, j, m, n] = sum_r depthwise[i, j, m, r] pointwise[m, r, n]``

    Parameters: ``depthwise`` of shape ``(*kernel_size, M, k)`` and ``pointwise`` of shape
    ``(M / groups, k, N)``. The pointwise step runs at the output's resolution.

    Attributes:
        rank: number k of depthwise kernels per input channel; ``full`` (D^2, or N / groups if that
            is less) reproduces any kernel, an `Energy` is decided by the trained kernel.

    Reference:
        FALCON, Section 3.6.1, Theorem 2 and Table 2; fitted, it is the paper's GEP-in.

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32, use_bias=False)
    >>> DepthwiseSeparable(rank=2).cost(spec, (8, 8, 16))
    Cost(params=1312, mult_adds=83968)
    """

    rank: Rank = 1
    name: ClassVar[str] = "depthwise_separable"

    def init(self, key: PRNGKeyArray, spec: ConvSpec) -> Params:
        """Return random parameters: unit-gain depthwise, He pointwise over all terms."""
        k, m = self.terms(spec), spec.group_in_features
        depthwise_key, pointwise_key = jax.random.split(key)
        gain = initializers.variance_scaling(2.0, "fan_in", "uniform", in_axis=(0, 1), out_axis=2)
        return {
            "depthwise": unit_gain(
                depthwise_key, (*spec.kernel_size, spec.in_features, k), spec.taps
            ),
            "pointwise": gain(pointwise_key, (m, k, spec.out_features)),
        }

    def matrices(
        self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec
    ) -> Float[Array, "m taps group_n"]:
        """Return the D^2 x N / groups matrix of each input channel."""
        groups, m, n = spec.feature_group_count, spec.group_in_features, spec.out_features
        matrices = kernel.reshape(spec.taps, m, groups, n // groups).transpose(2, 1, 0, 3)
        return matrices.reshape(groups * m, spec.taps, n // groups)

    def fit(self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> Params:
        """Return the best rank-k approximation of the D^2 x N / g matrix of each input channel."""
        groups, m, n = spec.feature_group_count, spec.group_in_features, spec.out_features
        k = self.terms(spec, kernel)
        left, right = best_terms(self.matrices(kernel, spec).transpose(1, 2, 0), rank=k)
        depthwise = left.transpose(0, 2, 1)
        pointwise = right.reshape(n // groups, k, groups, m).transpose(3, 1, 2, 0)
        return {
            "depthwise": depthwise.reshape(*spec.kernel_size, groups * m, k),
            "pointwise": pointwise.reshape(m, k, n),
        }

    def fit_moments(
        self,
        kernel: Float[Array, "*kernel_shape"],
        spec: ConvSpec,
        moments: Moments,
        start: Params | None = None,
    ) -> Params:
        """Return the factors of alternating least squares, group by group."""
        begin = self.fit(dense_kernel(moments, kernel), spec) if start is None else start
        m, k = spec.group_in_features, self.terms(spec, kernel)
        depthwise = np.asarray(begin["depthwise"], np.float64).reshape(spec.taps, -1, k)
        found = []
        for index, problem in enumerate(quadratics(moments, kernel)):
            own = depthwise[:, index * m : (index + 1) * m]
            if start is None:
                found.append(separable_best(problem, own))
            else:
                found.append(separable_als(problem, own, sweeps=WARM_SWEEPS)[:2])
        depthwise = np.concatenate([d for d, _ in found], axis=1)
        return {
            "depthwise": jnp.asarray(depthwise).reshape(*spec.kernel_size, -1, k),
            "pointwise": jnp.asarray(np.concatenate([p for _, p in found], axis=-1)),
        }

    def kernel(self, params: Params, spec: ConvSpec) -> Float[Array, "*kernel_shape"]:
        """Return the equivalent standard kernel (Theorem 2)."""
        return separable_kernel(
            params["depthwise"],
            params["pointwise"],
            feature_group_count=spec.feature_group_count,
        )

    def apply(
        self,
        params: Params,
        x: Float[Array, "b *spatial m"],
        spec: ConvSpec,
        *,
        precision: lax.PrecisionLike = None,
    ) -> Float[Array, "b *spatial_out n"]:
        """Convolve ``x`` of shape ``(b, *spatial, M)`` without adding a bias."""
        return depthwise_then_pointwise(
            x,
            params["depthwise"],
            params["pointwise"],
            **spec.geometry,
            feature_group_count=spec.feature_group_count,
            precision=precision,
        )

    def factors(self, spec: ConvSpec) -> tuple[str, ...]:
        """Return the names of parameters in each of which the kernel is linear."""
        return ("depthwise", "pointwise")

    def with_gain(self, params: Params, gain: Float[Array, "*stack n"]) -> Params:
        """Return parameters of the kernel with output channels multiplied by a gain."""
        return params | {"pointwise": scale_outputs(params["pointwise"], gain)}

    def cost(self, spec: ConvSpec, input_shape: Sequence[int]) -> Cost:
        """Return ``k M (D^2 + N / g)`` parameters and ``H' W'`` times as many mult-adds.

        Table 2 prints H W for the depthwise step; it runs at the output's resolution, as the
        counts in Tables 4 and 5 have it.
        """
        points = math.prod(spec.output_shape(spatial_shape(spec, input_shape)))
        group_out = spec.out_features // spec.feature_group_count
        params = self.terms(spec) * spec.in_features * (spec.taps + group_out)
        return Cost(params=params, mult_adds=points * params)
