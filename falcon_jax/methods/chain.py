"""Convolutions one after another in place of one: stages, and a factorisation of the kernel."""

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

from falcon_jax.methods.base import (
    Cost,
    FactorsToWeights,
    Method,
    Params,
    scale_outputs,
    standard_cost,
    unit_gain,
)
from falcon_jax.methods.ranks import Budget, Energy
from falcon_jax.methods.registry import get_method, method_from
from falcon_jax.ops.convolution import conv
from falcon_jax.ops.depthwise import depthwise_conv
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.ops.separable import pointwise_conv
from falcon_jax.settings import is_whole
from falcon_jax.solvers.low_rank import best_low_rank
from falcon_jax.solvers.moments import Moments, dense_kernel, quadratics
from falcon_jax.solvers.rank_selection import smallest_rank

HALF = Budget(2.0)
ChainRank = int | Literal["full"] | Energy | Budget
Inner = Method | Mapping[str, Any] | str | None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One convolution of a chain.

    Attributes:
        name: of its parameters.
        out_features: channels that it gives.
        axes: spatial axes whose taps, strides, padding and dilations it carries; none for a
            pointwise stage.
        depthwise: whether every channel is convolved by itself.

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32, strides=2)
    >>> vertical = Stage("vertical", 8, axes=(0,)).of(spec, in_features=16)
    >>> vertical.kernel_shape, vertical.strides
    ((3, 1, 16, 8), (2, 1))
    """

    name: str
    out_features: int
    axes: tuple[int, ...] = ()
    depthwise: bool = False

    def of(self, spec: ConvSpec, in_features: int) -> ConvSpec:
        """Return the stage's convolution, without bias, in a chain in place of ``spec``."""
        padding = spec.padding
        if not self.axes:
            padding = "VALID"
        elif not isinstance(padding, str):
            padding = self._own(padding, (0, 0))
        return ConvSpec(
            kernel_size=self._own(spec.kernel_size, 1),
            in_features=in_features,
            out_features=self.out_features,
            strides=self._own(spec.strides, 1),
            padding=padding,
            input_dilation=self._own(spec.input_dilation, 1),
            kernel_dilation=self._own(spec.kernel_dilation, 1),
            feature_group_count=in_features if self.depthwise else 1,
            use_bias=False,
        )

    def _own(self, values: Sequence[Any], rest: Any) -> tuple[Any, ...]:
        """Return values, with ``rest`` for axes that belong to other stages."""
        return tuple(v if axis in self.axes else rest for axis, v in enumerate(values))

    def stored(self, kernel: Float[Array, "*stage_kernel_shape"]) -> Array:
        """Return a stage's kernel as it is kept: pointwise and depthwise ones without axes of 1."""
        if not self.axes:
            return kernel.reshape(kernel.shape[-2:])
        if self.depthwise:
            return kernel.reshape(*(kernel.shape[axis] for axis in self.axes), kernel.shape[-1])
        return kernel


class Chain(Method):
    """A method that is a chain of convolutions.

    Each spatial axis belongs to one stage, so that the kernel is the product of the stages' kernels
    over their channels. Subclasses are dataclasses with a field ``rank``; they declare `stages` and
    a factorisation, `factorize`, and name the last stage. The parameters of a stage are its kernel,
    under the stage's name.
    """

    rank: Any
    last_stage: ClassVar[str]

    @abc.abstractmethod
    def stages(self, spec: ConvSpec, rank: Any) -> tuple[Stage, ...]:
        """Return the stages; ``rank`` is what `decided_rank` returned."""

    def smallest_rank(self, spec: ConvSpec) -> Any:
        """Return the least rank, or ranks, that there can be."""
        return 1

    @abc.abstractmethod
    def factorize(
        self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec, rank: Any
    ) -> Sequence[Array]:
        """Return the kernel of every stage, in any shape with the same order of entries."""

    @abc.abstractmethod
    def decided_rank(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> Any:
        """Return the rank, or the ranks, in numbers.

        Args:
            spec: the convolution.
            kernels: as in `for_layer`.
        """

    def inner_methods(self, specs: Sequence[ConvSpec]) -> tuple[Method | None, ...]:
        """Return the method that each stage is given to; None for one that stays a convolution."""
        return (None,) * len(specs)

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        if spec.feature_group_count != 1:
            return f"{self.name} is for one feature group"
        return None

    def for_layer(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> "Chain":
        """Return the method with the rank that a layer needs, in numbers."""
        return dataclasses.replace(self, rank=self.decided_rank(spec, kernels))  # type: ignore[type-var]

    def specs(self, spec: ConvSpec, rank: Any) -> dict[str, ConvSpec]:
        """Return the convolution of every stage by name."""
        found, features = {}, spec.in_features
        for stage in self.stages(spec, rank):
            found[stage.name] = stage.of(spec, features)
            features = stage.out_features
        return found

    def factor_params(self, spec: ConvSpec, rank: Any) -> int:
        """Return the parameters of all stages as convolutions."""
        return sum(math.prod(stage.kernel_shape) for stage in self.specs(spec, rank).values())

    def _walk(self, spec: ConvSpec, rank: Any) -> list[tuple[Stage, ConvSpec, Method | None]]:
        specs = list(self.specs(spec, rank).values())
        return list(zip(self.stages(spec, rank), specs, self.inner_methods(specs), strict=True))

    def init(self, key: PRNGKeyArray, spec: ConvSpec) -> Params:
        """Return random parameters that keep the variance, He on the last stage."""
        params: Params = {}
        walk = self._walk(spec, self.decided_rank(spec))
        keys = jax.random.split(key, len(walk))
        for index, (stage, own, method) in enumerate(walk):
            if method is not None:
                inner = method.init(keys[index], own)
                params |= {f"{stage.name}_{part}": value for part, value in inner.items()}
                continue
            shape = own.kernel_shape
            if index < len(walk) - 1:
                kernel = unit_gain(keys[index], shape, own.taps * own.group_in_features)
            else:
                kernel = initializers.he_uniform()(keys[index], shape)
            params[stage.name] = stage.stored(kernel)
        return params

    def fit(self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> Params:
        """Return the factorisation, its factors given to the inner methods."""
        rank = self.decided_rank(spec, kernel[None])
        return self.params_of(self.stage_kernels(kernel, spec, rank), spec, rank)

    def stage_kernels(
        self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec, rank: Any
    ) -> tuple[Array, ...]:
        """Return the kernels of the stages' convolutions that approximate a kernel."""
        shapes = [stage.kernel_shape for stage in self.specs(spec, rank).values()]
        found = self.factorize(kernel, spec, rank)
        return tuple(factor.reshape(s) for factor, s in zip(found, shapes, strict=True))

    def params_of(self, kernels: Sequence[Array], spec: ConvSpec, rank: Any) -> Params:
        """Return the parameters of stages whose kernels are given, fitted by inner methods."""
        params: Params = {}
        for kernel, (stage, own, method) in zip(kernels, self._walk(spec, rank), strict=True):
            kernel = kernel.reshape(own.kernel_shape)
            if method is None:
                params[stage.name] = stage.stored(kernel)
            else:
                inner = method.fit(kernel, own)
                params |= {f"{stage.name}_{part}": value for part, value in inner.items()}
        return params

    def kernel(self, params: Params, spec: ConvSpec) -> Float[Array, "*kernel_shape"]:
        """Return the equivalent standard kernel, the product of the stages' over their channels."""
        return self._joined(params, self._walk(spec, self.decided_rank(spec)))

    def _joined(
        self, params: Params, walk: Sequence[tuple[Stage, ConvSpec, Method | None]]
    ) -> Float[Array, "*kernel_size m r"]:
        """Return the product of the kernels of some stages."""
        whole: Array | None = None
        for stage, own, method in walk:
            if method is None:
                kernel = params[stage.name].reshape(own.kernel_shape)
            else:
                kernel = method.kernel(_of_stage(params, stage.name), own)
            if whole is None:
                whole = kernel
            else:
                # Kernels have taps on axes of their own: the others are 1 and broadcast.
                whole = whole * kernel if stage.depthwise else whole @ kernel
        assert whole is not None
        return whole

    def fit_moments(
        self,
        kernel: Float[Array, "*kernel_shape"],
        spec: ConvSpec,
        moments: Moments,
        start: Params | None = None,
    ) -> Params:
        """Return the factors of alternating least squares, from those of the best kernel of all."""
        last = self.last_stage
        if start is None:
            first = self.first_factors(kernel, spec, moments)
            if first is None:
                first = self.fit(dense_kernel(moments, kernel), spec)
        else:
            first = None
        names = self.factors(spec)
        problems = quadratics(moments, kernel)
        stage, _, method = self._walk(spec, self.smallest_rank(spec))[-1]
        if stage.axes or method is not None:
            weights = FactorsToWeights(self, spec)
            return self.alternated(weights, problems, spec, first, start, names)
        # The last factor is outside of the taps: its step is a small system.
        body = _BeforeLast(self, spec)
        return self.alternated(body, problems, spec, first, start, names, outer=last)

    def first_factors(
        self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec, moments: Moments
    ) -> Params | None:
        """Return parameters to begin a fit to moments with; None for those of the best kernel."""
        return None

    def apply(
        self,
        params: Params,
        x: Float[Array, "b *spatial m"],
        spec: ConvSpec,
        *,
        precision: lax.PrecisionLike = None,
    ) -> Float[Array, "b *spatial_out n"]:
        """Convolve ``x`` by one stage after the other, without adding a bias."""
        for stage, own, method in self._walk(spec, self.decided_rank(spec)):
            if method is not None:
                x = method.apply(_of_stage(params, stage.name), x, own, precision=precision)
            elif not stage.axes:
                x = pointwise_conv(x, params[stage.name], precision=precision)
            elif stage.depthwise:
                kernel = params[stage.name].reshape(*own.kernel_size, own.out_features)
                x = depthwise_conv(x, kernel, **own.geometry)
            else:
                x = conv(x, params[stage.name], **own.geometry, precision=precision)
        return x

    def factors(self, spec: ConvSpec) -> tuple[str, ...]:
        """Return the names of parameters in each of which the kernel is linear."""
        names: list[str] = []
        for stage, own, method in self._walk(spec, self.smallest_rank(spec)):
            inner = None if method is None else method.factors(own)
            names += [stage.name] if inner is None else [f"{stage.name}_{part}" for part in inner]
        return tuple(names)

    def with_gain(self, params: Params, gain: Float[Array, "*stack n"]) -> Params | None:
        """Return parameters of the kernel with output channels multiplied by a gain."""
        last = self.last_stage
        if last in params:
            return params | {last: scale_outputs(params[last], gain)}
        return None

    def cost(self, spec: ConvSpec, input_shape: Sequence[int]) -> Cost:
        """Return the cost of all stages, each at the output of the one before."""
        spatial = tuple(input_shape[-1 - len(spec.kernel_size) : -1])
        total = Cost(params=0, mult_adds=0)
        for _, own, method in self._walk(spec, self.decided_rank(spec)):
            shape = (*spatial, own.in_features)
            total += standard_cost(own, shape) if method is None else method.cost(own, shape)
            spatial = own.output_shape(spatial)
        return total


@dataclasses.dataclass(frozen=True)
class _BeforeLast:
    """A chain's parameters to the weights of all stages but the last."""

    chain: Chain
    spec: ConvSpec

    def __call__(self, params: Params) -> Float[Array, "inputs rank"]:
        chain, spec = self.chain, self.spec
        walk = chain._walk(spec, chain.decided_rank(spec))[:-1]
        kernel = chain._joined(params, walk)
        whole = jnp.broadcast_to(kernel, (*spec.kernel_size, *kernel.shape[-2:]))
        return whole.reshape(spec.taps * spec.in_features, -1)


class LowRankChain(Chain):
    """Two convolutions in place of one: the kernel, seen as one matrix, at a low rank.

    Each factor is the kernel of one of the two, which may be given to another method in turn; the
    parameters of such a stage are that method's, under ``STAGE_NAME``. Subclasses are dataclasses
    with the fields ``rank`` and ``inner``.
    """

    rank: ChainRank
    inner: Inner | Sequence[Inner]

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
    def matrix(self, kernel: Float[Array, "*kernel_shape"]) -> Float[Array, "p q"]:
        """Return the kernel as the matrix that is the product of the factors."""

    @abc.abstractmethod
    def from_factors(
        self, left: Float[Array, "p rank"], right: Float[Array, "rank q"], spec: ConvSpec
    ) -> tuple[Array, Array]:
        """Return the kernels of the two convolutions that a pair of factors stands for."""

    def factorize(
        self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec, rank: int
    ) -> tuple[Array, Array]:
        """Return the kernels of the two convolutions of the best approximation."""
        left, right = best_low_rank(self.matrix(kernel)[None], rank=rank)
        return self.from_factors(left[0], right[0], spec)

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
        if (reason := super().supports(spec)) is not None:
            return reason
        most = self._full_rank(spec)
        if isinstance(self.rank, int) and self.rank > most:
            return f"rank {self.rank} is more than {most}, with which every kernel is exact"
        if isinstance(self.rank, Budget):
            reason = self.rank.reason(spec, self.factor_params(spec, self.smallest_rank(spec)))
            if reason is not None:
                return reason
        # The energy of a kernel that is yet to come can ask for any rank.
        rank = most if isinstance(self.rank, Energy) else self.decided_rank(spec)
        for stage, own, method in self._walk(spec, rank):
            reason = None if method is None else method.supports(own)
            if reason is not None:
                return f"its {stage.name} convolution cannot be {method}: {reason}"
        return None

    def for_layer(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> "LowRankChain":
        """Return the method with the rank, and the inner methods, that a layer needs."""
        rank = self.decided_rank(spec, kernels)
        inner = self.inner
        if inner is not None:
            found: Sequence[Array | None] = (None, None)
            if kernels is not None:
                found = jax.vmap(lambda kernel: self.stage_kernels(kernel, spec, rank))(kernels)
            inner = tuple(
                method if method is None else method.for_layer(own, stage_kernels)
                for (_, own, method), stage_kernels in zip(
                    self._walk(spec, rank), found, strict=True
                )
            )
        return dataclasses.replace(self, rank=rank, inner=inner)  # type: ignore[type-var]

    def decided_rank(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> int:
        """Return the rank in numbers.

        Raises:
            ValueError: if an `Energy` has no kernel to go by.
        """
        if isinstance(self.rank, int):
            return self.rank
        if self.rank == "full":
            return self._full_rank(spec)
        if isinstance(self.rank, Budget):
            return self.rank.largest(
                spec, lambda rank: self.factor_params(spec, rank), self._full_rank(spec)
            )
        if kernels is None:
            raise ValueError(f"a rank by {self.rank} needs a trained kernel to choose it from.")
        return smallest_rank(jax.vmap(self.matrix)(kernels)[:, None], self.rank.share)

    def _full_rank(self, spec: ConvSpec) -> int:
        like = jax.ShapeDtypeStruct(spec.kernel_shape, jnp.float32)
        return min(jax.eval_shape(self.matrix, like).shape)

    def inner_methods(self, specs: Sequence[ConvSpec]) -> tuple[Method | None, ...]:
        """Return the given methods, or the one given for both for those that have taps."""
        given: Any = self.inner
        if isinstance(given, tuple):
            return given
        return tuple(given if stage.taps > 1 else None for stage in specs)


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


def _of_stage(params: Params, name: str) -> Params:
    prefix = f"{name}_"
    return {key.removeprefix(prefix): v for key, v in params.items() if key.startswith(prefix)}
