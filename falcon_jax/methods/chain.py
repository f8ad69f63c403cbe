"""Two convolutions in place of one, each of which can be given to another method."""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax import ops
from falcon_jax.fitting.energy import smallest_rank
from falcon_jax.fitting.low_rank import best_low_rank
from falcon_jax.methods.base import (
    Cost,
    Method,
    Params,
    bias_cost,
    flatten_batch,
    spatial_shape,
    standard_cost,
    unit_gain,
)
from falcon_jax.methods.channel_ranks import Budget
from falcon_jax.methods.ranks import Energy
from falcon_jax.methods.registry import get_method, method_from
from falcon_jax.methods.spec import ConvSpec
from falcon_jax.numeric import is_whole

HALF = Budget(2.0)
ChainRank = int | Literal["full"] | Energy | Budget
Inner = Method | Mapping[str, Any] | str | None


class Chain(Method):
    """A convolution to a few channels, and a second one from there to N.

    The kernel, seen as one matrix, is approximated by a matrix of low rank; each factor is the
    kernel of one of the two. Subclasses are dataclasses with the fields ``rank`` and ``inner``.

    The parameters of a stage that stays a convolution are its kernel, under the stage's name (a
    matrix where it is 1x1). Those of a stage that is given to another method are that method's,
    under ``STAGE_NAME``.
    """

    rank: ChainRank
    inner: Inner | Sequence[Inner]
    stage_names: ClassVar[tuple[str, str]]

    def __post_init__(self):
        rank = self.rank
        named = rank == "full" or isinstance(rank, (Energy, Budget))
        if not named and (not is_whole(rank) or rank < 1):
            raise ValueError(
                "rank is a whole number of at least 1, 'full', an Energy or a Budget; got "
                f"{rank!r}."
            )
        if isinstance(self.inner, Sequence) and not isinstance(self.inner, str):
            inner: Any = tuple(_inner_method(given) for given in self.inner)
            if len(inner) != 2:
                raise ValueError(f"inner has one method or None for each stage; got {inner}.")
        else:
            inner = _inner_method(self.inner)
        object.__setattr__(self, "inner", inner)

    @abc.abstractmethod
    def stages(self, spec: ConvSpec, rank: int) -> tuple[ConvSpec, ConvSpec]:
        """Return the two convolutions, without bias."""

    @abc.abstractmethod
    def matrix(self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> Float[Array, "p q"]:
        """Return the kernel as the matrix that is the product of the factors."""

    @abc.abstractmethod
    def stage_kernels(
        self, left: Float[Array, "p rank"], right: Float[Array, "rank q"], spec: ConvSpec
    ) -> tuple[Float[Array, "*first_shape"], Float[Array, "*second_shape"]]:
        """Return the kernels of the two convolutions that a pair of factors stands for."""

    @abc.abstractmethod
    def joined(
        self, first: Float[Array, "*first_shape"], second: Float[Array, "*second_shape"]
    ) -> Float[Array, "*kernel_shape"]:
        """Return the kernel that two convolutions are together."""

    def options(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        plain = super().options()
        inner = plain["inner"]
        if isinstance(inner, tuple):
            return plain | {"inner": [_as_data(method) for method in inner]}
        return plain | {"inner": _as_data(inner)}

    def label(self) -> str:
        """Return name and rank, and those of the inner methods."""
        inner = self.inner if isinstance(self.inner, tuple) else (self.inner,)
        labels = [method.label() for method in inner if isinstance(method, Method)]
        return " > ".join([super().label(), *dict.fromkeys(labels)])

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        if spec.feature_group_count != 1:
            return f"{self.name} is for one feature group"
        most = self._full_rank(spec)
        if isinstance(self.rank, int) and self.rank > most:
            return f"rank {self.rank} is more than {most}, with which every kernel is exact"
        if isinstance(self.rank, Budget):
            reason = self.rank.reason(spec, self._factor_params(spec, 1))
            if reason is not None:
                return reason
        # The energy of a kernel that is yet to come can ask for any rank.
        rank = most if isinstance(self.rank, Energy) else self._rank(spec)
        for name, stage, method in self._stages(spec, rank):
            reason = None if method is None else method.supports(stage)
            if reason is not None:
                return f"its {name} convolution cannot be {method}: {reason}"
        return None

    def for_layer(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> "Chain":
        """Return the method with the rank, and the inner methods, that a layer needs."""
        rank = self._rank(spec, kernels)
        inner = self.inner
        if inner is not None:
            found: tuple[Array | None, ...] = (None, None)
            if kernels is not None:
                found = jax.vmap(lambda kernel: self._fitted(kernel, spec, rank))(kernels)
            inner = tuple(
                method if method is None else method.for_layer(stage, stage_kernels)
                for (_, stage, method), stage_kernels in zip(
                    self._stages(spec, rank), found, strict=True
                )
            )
        return dataclasses.replace(self, rank=rank, inner=inner)  # type: ignore[type-var]

    def _rank(self, spec: ConvSpec, kernels: Array | None = None) -> int:
        if isinstance(self.rank, int):
            return self.rank
        if self.rank == "full":
            return self._full_rank(spec)
        if isinstance(self.rank, Budget):
            return self.rank.largest(
                spec, lambda rank: self._factor_params(spec, rank), self._full_rank(spec)
            )
        if kernels is None:
            raise ValueError(f"a rank by {self.rank} needs a trained kernel to choose it from.")
        stack = jax.vmap(lambda kernel: self.matrix(kernel, spec))(kernels)
        return smallest_rank(stack[:, None], self.rank.share)

    def _full_rank(self, spec: ConvSpec) -> int:
        like = jax.ShapeDtypeStruct(spec.kernel_shape, jnp.float32)
        return min(jax.eval_shape(lambda kernel: self.matrix(kernel, spec), like).shape)

    def _factor_params(self, spec: ConvSpec, rank: int) -> int:
        return sum(math.prod(stage.kernel_shape) for stage in self.stages(spec, rank))

    def _stages(self, spec: ConvSpec, rank: int) -> tuple[tuple[str, ConvSpec, Method | None], ...]:
        """Return name, convolution and inner method of each stage."""
        stages = self.stages(spec, rank)
        given: Any = self.inner
        if not isinstance(given, tuple):
            given = tuple(given if stage.taps > 1 else None for stage in stages)
        return tuple(zip(self.stage_names, stages, given, strict=True))

    def init(self, key: PRNGKeyArray, spec: ConvSpec) -> Params:
        """Return random parameters that keep the variance, He on the second stage."""
        self.require(spec)
        params: Params = {}
        keys = jax.random.split(key)
        stages = self._stages(spec, self._rank(spec))
        for index, (name, stage, method) in enumerate(stages):
            if method is not None:
                inner = method.init(keys[index], stage)
                params |= {f"{name}_{part}": value for part, value in inner.items()}
                continue
            shape = stage.kernel_shape
            if index == 0:
                kernel = unit_gain(keys[0], shape, stage.taps * stage.in_features)
            else:
                kernel = initializers.he_uniform()(keys[1], shape)
            params[name] = _stored(kernel, stage)
        return params

    def fit(self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> Params:
        """Return the best approximation of low rank, its factors given to the inner methods."""
        self.require(spec, kernel)
        rank = self._rank(spec, kernel[None])
        return self.stage_params(self._fitted(kernel, spec, rank), spec)

    def _fitted(self, kernel: Array, spec: ConvSpec, rank: int) -> tuple[Array, Array]:
        left, right = best_low_rank(self.matrix(kernel, spec)[None], rank=rank)
        return self.stage_kernels(left[0], right[0], spec)

    def stage_params(self, kernels: Sequence[Array], spec: ConvSpec) -> Params:
        """Return the parameters of stages whose kernels are given, fitted by inner methods."""
        params: Params = {}
        stages = self._stages(spec, rank=kernels[0].shape[-1])
        for kernel, (name, stage, method) in zip(kernels, stages, strict=True):
            if method is None:
                params[name] = _stored(kernel, stage)
            else:
                inner = method.fit(kernel, stage)
                params |= {f"{name}_{part}": value for part, value in inner.items()}
        return params

    def factors(self, spec: ConvSpec) -> tuple[str, ...]:
        """Return the names of parameters in each of which the kernel is linear."""
        names: list[str] = []
        for name, stage, method in self._stages(spec, rank=1):
            inner = None if method is None else method.factors(stage)
            names += [name] if inner is None else [f"{name}_{part}" for part in inner]
        return tuple(names)

    def kernel(self, params: Params, spec: ConvSpec) -> Float[Array, "*kernel_shape"]:
        """Return the equivalent standard kernel."""
        kernels = [
            params[name].reshape(stage.kernel_shape)
            if method is None
            else method.kernel(_of_stage(params, name), stage)
            for name, stage, method in self._stages(spec, self._rank(spec))
        ]
        return self.joined(kernels[0], kernels[1])

    def apply(
        self,
        params: Params,
        x: Float[Array, "*batch m"],
        spec: ConvSpec,
        *,
        precision: lax.PrecisionLike = None,
    ) -> Float[Array, "*batch_out n"]:
        """Convolve ``x`` of shape ``(..., *spatial, M)`` without adding a bias."""
        y, batch = flatten_batch(x, spec)
        for name, stage, method in self._stages(spec, self._rank(spec)):
            if method is not None:
                y = method.apply(_of_stage(params, name), y, stage, precision=precision)
            elif stage.taps == 1:
                y = ops.pointwise_conv(y, params[name], precision=precision)
            else:
                y = ops.conv(y, params[name], **stage.geometry, precision=precision)
        return y.reshape(*batch, *y.shape[1:])

    def cost(self, spec: ConvSpec, input_shape: Sequence[int]) -> Cost:
        """Return the cost of the two convolutions, the second at the output of the first."""
        spatial = spatial_shape(spec, input_shape)
        total = Cost(params=0, mult_adds=0)
        for _, stage, method in self._stages(spec, self._rank(spec)):
            shape = (*spatial, stage.in_features)
            total += standard_cost(stage, shape) if method is None else method.cost(stage, shape)
            spatial = stage.output_shape(spatial)
        return total + bias_cost(spec, math.prod(spatial))


def _inner_method(given: Inner) -> Method | None:
    if isinstance(given, str):
        return get_method(given)
    if isinstance(given, Mapping):
        return method_from(given)
    if given is None or isinstance(given, Method):
        return given
    raise ValueError(f"inner is a method, its name or settings, or None; got {given!r}.")


def _as_data(method: Any) -> dict[str, Any] | None:
    return None if method is None else {"method": method.name, **method.options()}


def _stored(kernel: Array, stage: ConvSpec) -> Array:
    return kernel.reshape(kernel.shape[-2:]) if stage.taps == 1 else kernel


def _of_stage(params: Params, name: str) -> Params:
    prefix = f"{name}_"
    return {key.removeprefix(prefix): v for key, v in params.items() if key.startswith(prefix)}
