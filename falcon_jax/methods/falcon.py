"""FALCON: pointwise first, then depthwise, fitted to the trained kernel."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.gep import falcon_kernel
from falcon_jax.methods.base import (
    Cost,
    Params,
    scale_outputs,
    spatial_shape,
    unit_gain,
)
from falcon_jax.methods.ranks import Rank, RankMethod
from falcon_jax.methods.registry import register
from falcon_jax.ops.choice import falcon_form, is_canonical
from falcon_jax.ops.convolution import conv
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.ops.separable import pointwise_then_depthwise
from falcon_jax.solvers.alternating import falcon_best, falcon_sweeps
from falcon_jax.solvers.low_rank import best_terms
from falcon_jax.solvers.moments import Moments, quadratics

Impl = Literal["auto", "separable", "wide", "grouped", "gep"]


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Falcon(RankMethod):
    """Rank-k FALCON.

    ``K[i, j, m, n] = sum_r depthwise[i, j, r, n] pointwise[m, r, n]``

    Parameters: ``pointwise`` of shape ``(M / groups, k, N)`` and ``depthwise`` of shape
    ``(*kernel_size, k, N)``. With feature groups, FALCON stands inside each group. The pointwise
    step runs at the input's resolution, the depthwise step carries strides and dilations.

    Attributes:
        rank: number k of terms; ``full`` (D^2, or M / groups if that is less) reproduces any
            kernel, an `Energy` is decided by the trained kernel.
        impl: how it is computed, with the same result: ``separable`` (a matrix product a term and
            one fused depthwise pass), ``wide`` (one matrix product for all terms), ``grouped`` (1x1
            and feature-grouped ``lax`` convolutions), ``gep`` (build the kernel by einsum, then one
            standard convolution), or ``auto``: the fastest for such a shape and batch, as measured
            on the default backend.

    Reference:
        FALCON, Sections 3.3 and 3.4, Equation 5, Theorems 1 and 3 to 5, Definition 3.

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32, use_bias=False)
    >>> Falcon(rank=2).cost(spec, (8, 8, 16))
    Cost(params=1600, mult_adds=102400)
    """

    rank: Rank = 1
    impl: Impl = "auto"
    name: ClassVar[str] = "falcon"

    def __post_init__(self):
        super().__post_init__()
        if self.impl not in get_args(Impl):
            raise ValueError(f"impl is one of {', '.join(get_args(Impl))}; got {self.impl!r}.")

    def init(self, key: PRNGKeyArray, spec: ConvSpec) -> Params:
        """Return random parameters: He pointwise, depthwise of unit gain over all terms."""
        k, n = self.terms(spec), spec.out_features
        pointwise_key, depthwise_key = jax.random.split(key)
        gain = initializers.variance_scaling(2.0, "fan_in", "uniform", in_axis=0, out_axis=(1, 2))
        return {
            "pointwise": gain(pointwise_key, (spec.group_in_features, k, n)),
            "depthwise": unit_gain(depthwise_key, (*spec.kernel_size, k, n), spec.taps * k),
        }

    def matrices(
        self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec
    ) -> Float[Array, "n taps group_m"]:
        """Return the D^2 x M / groups matrix of each output channel."""
        matrices = kernel.reshape(spec.taps, spec.group_in_features, spec.out_features)
        return matrices.transpose(2, 0, 1)

    def fit(self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> Params:
        """Return the best rank-k approximation of the D^2 x M matrix of each output channel."""
        matrices = kernel.reshape(spec.taps, spec.group_in_features, spec.out_features)
        depthwise, pointwise = best_terms(matrices, rank=self.terms(spec, kernel))
        return {
            "pointwise": pointwise,
            "depthwise": depthwise.reshape(*spec.kernel_size, *depthwise.shape[1:]),
        }

    def fit_moments(
        self,
        kernel: Float[Array, "*kernel_shape"],
        spec: ConvSpec,
        moments: Moments,
        start: Params | None = None,
    ) -> Params:
        """Return the factors of alternating least squares, group by group.

        They start from the optimum of a metric that is a product of one of the taps and one of the
        channels; no sweep makes the error larger.
        """
        k = self.terms(spec, kernel)
        if start is None:
            found = [falcon_best(problem, k) for problem in quadratics(moments, kernel)]
            pointwise, depthwise = (np.concatenate(part, -1) for part in zip(*found, strict=True))
            depthwise = depthwise.reshape(*spec.kernel_size, k, -1)
        else:
            pointwise, depthwise = falcon_sweeps(
                moments, kernel, start["pointwise"], start["depthwise"]
            )
        return {"pointwise": jnp.asarray(pointwise), "depthwise": jnp.asarray(depthwise)}

    def kernel(self, params: Params, spec: ConvSpec) -> Float[Array, "*kernel_shape"]:
        """Return the equivalent standard kernel (Theorem 1)."""
        return falcon_kernel(params["depthwise"], params["pointwise"])

    def builds_kernel(self) -> bool:
        """Return whether ``impl`` is ``gep``."""
        return self.impl == "gep"

    def forms(self) -> tuple["Falcon", ...]:
        """Return FALCON of this rank with every ``impl`` but ``auto``."""
        names = [n for n in get_args(Impl) if n != "auto" and (n != "wide" or self.rank != 1)]
        return tuple(dataclasses.replace(self, impl=name) for name in names)

    def apply(
        self,
        params: Params,
        x: Float[Array, "b *spatial m"],
        spec: ConvSpec,
        *,
        precision: lax.PrecisionLike = None,
    ) -> Float[Array, "b *spatial_out n"]:
        """Convolve ``x`` of shape ``(b, *spatial, M)`` without adding a bias."""
        groups = spec.feature_group_count
        depthwise, pointwise = params["depthwise"], params["pointwise"]
        impl = _form(spec, x.shape, depthwise.shape[-2]) if self.impl == "auto" else self.impl
        if impl in ("separable", "wide"):
            return pointwise_then_depthwise(
                x,
                depthwise,
                pointwise,
                **spec.geometry,
                feature_group_count=groups,
                precision=precision,
                wide=impl == "wide",
            )
        if impl == "gep":
            return conv(
                x,
                falcon_kernel(depthwise, pointwise),
                **spec.geometry,
                feature_group_count=groups,
                precision=precision,
            )
        terms = (
            self._grouped_term(x, depthwise[..., r, :], pointwise[:, r], spec, precision)
            for r in range(depthwise.shape[-2])
        )
        return functools.reduce(jnp.add, terms)

    def _grouped_term(
        self, x: Array, depthwise: Array, pointwise: Array, spec: ConvSpec, precision
    ) -> Array:
        axes = len(spec.kernel_size)
        ones = (1,) * axes
        z = conv(
            x,
            pointwise.reshape(*ones, *pointwise.shape),
            strides=ones,
            padding="VALID",
            input_dilation=ones,
            kernel_dilation=ones,
            feature_group_count=spec.feature_group_count,
            precision=precision,
        )
        return conv(
            z,
            depthwise[..., None, :],
            **spec.geometry,
            feature_group_count=spec.out_features,
            precision=precision,
        )

    def factors(self, spec: ConvSpec) -> tuple[str, ...]:
        """Return the names of parameters in each of which the kernel is linear."""
        return ("pointwise", "depthwise")

    def with_gain(self, params: Params, gain: Float[Array, "*stack n"]) -> Params:
        """Return parameters of the kernel with output channels multiplied by a gain."""
        return params | {"depthwise": scale_outputs(params["depthwise"], gain)}

    def cost(self, spec: ConvSpec, input_shape: Sequence[int]) -> Cost:
        """Return ``k N (M / g + D^2)`` parameters, ``k N (H W M / g + H' W' D^2)`` mult-adds.

        Reference: FALCON, Table 2, Theorems 3 to 5.
        """
        spatial = spatial_shape(spec, input_shape)
        points_in, points_out = math.prod(spatial), math.prod(spec.output_shape(spatial))
        m, n, k = spec.group_in_features, spec.out_features, self.terms(spec)
        return Cost(
            params=k * n * (m + spec.taps),
            mult_adds=k * n * (points_in * m + points_out * spec.taps),
        )


def _form(spec: ConvSpec, input_shape: Sequence[Any], rank: int) -> Impl:
    if is_canonical():
        return "wide"
    known = all(isinstance(n, int) for n in input_shape)  # not so in exported functions
    return falcon_form(
        points=math.prod(input_shape[:-1]) if known else None,
        taps=spec.taps,
        in_features=spec.group_in_features,
        out_features=spec.out_features,
        rank=rank,
    )
