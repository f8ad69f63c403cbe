"""What every compression method is: a frozen value with a few pure functions."""

import abc
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.ops.choice import is_canonical
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.solvers.alternating import MANY_SWEEPS, SMALL, SMALL_TOLERANCE, STARTS, alternate
from falcon_jax.solvers.moments import Moments, Quadratic, dense_kernel, quadratics

Params = dict[str, Array]

MOST_SWEEPS = 30  # of alternating steps
WARM_SWEEPS = 1  # of those that go on from a fit
SMALL_SWEEPS = 20  # of small kernels, at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one convolution costs.

    Attributes:
        params: trainable parameters, the bias included.
        mult_adds: multiply-adds for one example, plus one per output element for a bias.

    >>> Cost(params=112, mult_adds=7168) + Cost(params=10, mult_adds=100)
    Cost(params=122, mult_adds=7268)
    """

    params: int
    mult_adds: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(params=self.params + other.params, mult_adds=self.mult_adds + other.mult_adds)


def _in_metric(function: Callable[..., Params]) -> Callable[..., Params]:
    """Return `fit_moments` for what belongs together, its result finite, in the kernel's type."""

    @functools.wraps(function)
    def fit_moments(
        self: Any, kernel: Array, spec: ConvSpec, moments: Moments, start: Params | None = None
    ) -> Params:
        self.require(spec, kernel)
        check_moments(moments, spec)
        decided = self.for_layer(spec, kernel[None])
        params = function(decided, kernel, spec, moments, start)
        if not all(np.isfinite(np.asarray(value)).all() for value in params.values()):
            raise ValueError(
                f"the parameters of {self} for these moments are not finite; scale the inputs, or "
                "the kernel, nearer to 1."
            )
        return {name: jnp.asarray(value, kernel.dtype) for name, value in params.items()}

    return fit_moments


class Method(abc.ABC):
    """A way to replace a standard convolution.

    Subclasses are frozen keyword-only dataclasses with a ``name``, decorated with
    `falcon_jax.methods.register`. An author writes `supports`, `init`, `fit`, `kernel`, `apply` and
    `cost`; what every method would repeat is done around them:

    - `init` and `fit` are called only for what `supports` takes, and a kernel that belongs to it;
    - `apply` gets one batch axis, whatever ``x`` has;
    - the bias is nobody's business: `apply` adds none, `cost` counts none, whoever calls does.

    >>> from falcon_jax.methods.falcon import Falcon
    >>> method, spec = Falcon(), ConvSpec(kernel_size=(3, 3), in_features=4, out_features=8)
    >>> params = method.init(jax.random.key(0), spec)
    >>> method.kernel(params, spec).shape, method.cost(spec, (8, 8, 4))
    ((3, 3, 4, 8), Cost(params=112, mult_adds=7168))
    """

    name: ClassVar[str]
    # Settings that the method once had, which plans of then still name.
    former_settings: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for name, around in _AROUND.items():
            if name in vars(cls) and not getattr(vars(cls)[name], "__isabstractmethod__", False):
                setattr(cls, name, around(vars(cls)[name]))

    @abc.abstractmethod
    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray, spec: ConvSpec) -> Params:
        """Return random float32 parameters that keep the variance of activations, He uniform."""

    @abc.abstractmethod
    def fit(self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> Params:
        """Return the parameters whose kernel is nearest to a trained one, in closed form."""

    @abc.abstractmethod
    def kernel(self, params: Params, spec: ConvSpec) -> Float[Array, "*kernel_shape"]:
        """Return the equivalent standard kernel, ``(*kernel_size, M / groups, N)``."""

    @abc.abstractmethod
    def apply(
        self,
        params: Params,
        x: Float[Array, "*batch m"],
        spec: ConvSpec,
        *,
        precision: lax.PrecisionLike = None,
    ) -> Float[Array, "*batch_out n"]:
        """Convolve ``x`` of shape ``(..., *spatial, M)`` without adding a bias."""

    @abc.abstractmethod
    def cost(self, spec: ConvSpec, input_shape: Sequence[int]) -> Cost:
        """Return the cost for one example of shape ``(*spatial, M)`` (batch axes are ignored).

        As an author writes it, without a bias; as it is called, with the one that ``spec`` has.
        """

    def forms(self) -> tuple["Method", ...]:
        """Return the method in every way that it can be computed, with the same result."""
        return (self,)

    def builds_kernel(self) -> bool:
        """Return whether `apply` builds the standard kernel in every call."""
        return False

    @_in_metric
    def fit_moments(
        self,
        kernel: Float[Array, "*kernel_shape"],
        spec: ConvSpec,
        moments: Moments,
        start: Params | None = None,
    ) -> Params:
        """Return the parameters whose answers are nearest to those that a layer should give.

        ``min E ||y - x K'||^2 + lam ||K - K'||^2``, K' the parameters' kernel

        Here, the fit to the best kernel of all, and from there alternating steps over the
        `factors`, each of them the optimum with the others fixed.

        Args:
            kernel: trained, that the parameters' is drawn to, with `RIDGE` for ``lam``.
            spec: the convolution.
            moments: of what the layer gets and should answer; ``moments.about_zero()`` for a layer
                without a bias.
            start: parameters to go on from by a few steps, for moments that changed a little.

        Returns:
            The parameters; `falcon_jax.solvers.moments.best_bias` of their kernel is the bias
            that belongs to them.
        """
        dense = None if start else self.fit(dense_kernel(moments, kernel), spec)
        names = self.factors(spec)
        if not names:
            return start or dense or {}
        weights = FactorsToWeights(self, spec)
        return self.alternated(weights, quadratics(moments, kernel), spec, dense, start, names)

    def alternated(
        self,
        body: Callable[[Params], Array],
        problems: Sequence[Quadratic],
        spec: ConvSpec,
        first: Params | None,
        start: Params | None,
        names: Sequence[str],
        outer: str | None = None,
    ) -> Params:
        """Return the parameters that alternating steps over factors lead to.

        Args:
            body: parameters to weights, as `alternate` takes it.
            problems: what weights cost, for each group.
            spec: the convolution.
            first: parameters to begin with.
            start: or, parameters to go on from by a few steps.
            names: of the factors.
            outer: the one of them that the body's weights are multiplied by.
        """
        given = problems[0] if outer else problems
        improved = functools.partial(alternate, body, problem=given, order=names, outer=outer)
        if first is None:
            assert start is not None
            found, _ = improved(start, sweeps=WARM_SWEEPS, tolerance=0.0)
        elif len(names) == 1 or problems[0].metric.shape[0] > SMALL:
            found, _ = improved(first, sweeps=MOST_SWEEPS)
        else:
            # Local minima are many where weights are few, and so is their cost.
            improved = functools.partial(
                alternate,
                FactorsToWeights(self, spec),
                problem=problems,
                order=names,
                sweeps=MANY_SWEEPS,
                tolerance=SMALL_TOLERANCE,
                at_once=SMALL_SWEEPS,
            )
            fits = [improved(first)]
            for index in range(STARTS):
                drawn = self.init(jax.random.key(index), spec)
                fits.append(improved(first | {name: drawn[name] for name in names}))
            found, _ = min(fits, key=lambda fit: fit[1][-1])
        return {name: jnp.asarray(value) for name, value in found.items()}

    def with_gain(self, params: Params, gain: Float[Array, "*stack n"]) -> Params | None:
        """Return parameters of a kernel whose output channels are multiplied by a gain.

        Args:
            params: the method's parameters, with leading axes if layers are stacked.
            gain: one for each output channel, with the same leading axes.

        Returns:
            The parameters; None if the method has none for such a kernel.
        """
        return None

    def factors(self, spec: ConvSpec) -> tuple[str, ...]:
        """Return the names of parameters in each of which the kernel is linear.

        With them, `fit` spreads the scale of extreme kernels over parameters; without, a kernel
        whose parameters are out of range is refused.
        """
        return ()

    def for_layer(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> "Method":
        """Return the method with everything decided that a layer decides, such as its rank.

        Args:
            spec: the convolution.
            kernels: its trained kernel with an axis in front; several of one stack.

        Raises:
            ValueError: if a decision needs kernels and there are none.
        """
        return self

    def options(self) -> dict[str, Any]:
        """Return the settings as plain data, such that ``get_method(name, **options)`` is equal."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    def label(self) -> str:
        """Return the name, with the rank of a method that has one, for tables."""
        rank = self.options().get("rank")
        return self.name if rank is None else f"{self.name} {rank}"

    def require(self, spec: ConvSpec, kernel: Float[Array, "*kernel_shape"] | None = None) -> None:
        """Raise unless the method can replace such a convolution, and the kernel belongs to it.

        Raises:
            ValueError: with the reason.
        """
        reason = self.supports(spec)
        if reason is not None:
            raise ValueError(f"{self} cannot replace {spec}: {reason}.")
        if kernel is not None:
            check_form(kernel, spec)


@dataclasses.dataclass(frozen=True)
class FactorsToWeights:
    """A method's parameters to its kernel's weights; equal for equal methods and convolutions."""

    method: Method
    spec: ConvSpec

    def __call__(self, params: Params) -> Float[Array, "groups inputs outputs"]:
        """Return the weights of every group, taps first, then channels."""
        spec = self.spec
        kernel = self.method.kernel(params, spec)
        groups, inputs = spec.feature_group_count, spec.taps * spec.group_in_features
        return kernel.reshape(inputs, groups, -1).swapaxes(0, 1)


def check_form(kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> None:
    """Raise unless a kernel has the shape of a convolution's kernels, and floating-point numbers.

    Raises:
        ValueError: saying what it has.
    """
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(
            f"the kernel holds {kernel.dtype}, in which no fit can be kept; give floating-point "
            "numbers, such as kernel.astype('float32')."
        )
    if kernel.shape != spec.kernel_shape:
        raise ValueError(
            f"the kernel has shape {kernel.shape}, but the convolution's kernels have shape "
            f"{spec.kernel_shape}: (*kernel_size, in_features / groups, out_features)."
        )


def check_moments(moments: Moments, spec: ConvSpec) -> None:
    """Raise unless moments are those of a convolution, and finite.

    Raises:
        ValueError: saying what they are.
    """
    groups = spec.feature_group_count
    inputs, outputs = spec.taps * spec.group_in_features, spec.out_features // groups
    if moments.cross.shape != (groups, inputs, outputs):
        raise ValueError(
            f"the moments are of (groups, inputs, outputs) {moments.cross.shape}, but those of "
            f"{spec} are {(groups, inputs, outputs)}."
        )
    for name in ("second", "cross", "target_mean"):
        if not np.isfinite(np.asarray(getattr(moments, name))).all():
            raise ValueError(f"the moments are not finite ({name}); look for what the layer gets.")


def standard_cost(spec: ConvSpec, input_shape: Sequence[int]) -> Cost:
    """Return the cost of the standard convolution.

    ``D^2 M N / g`` parameters and ``H' W' D^2 M N / g`` mult-adds, plus the bias.

    Args:
        spec: the convolution.
        input_shape: ``(..., *spatial, M)``; batch axes are ignored.

    Returns:
        Cost for one example.

    Reference:
        FALCON, Table 2.

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=4, out_features=8, use_bias=False)
    >>> standard_cost(spec, (32, 32, 4))
    Cost(params=288, mult_adds=294912)
    """
    kernel = math.prod(spec.kernel_shape)
    points = math.prod(spec.output_shape(spatial_shape(spec, input_shape)))
    return Cost(params=kernel, mult_adds=points * kernel) + bias_cost(spec, points)


def bias_cost(spec: ConvSpec, points: int) -> Cost:
    """Return the cost of adding the bias to ``points`` output points; nothing without a bias."""
    n = spec.out_features if spec.use_bias else 0
    return Cost(params=n, mult_adds=points * n)


def spatial_shape(spec: ConvSpec, input_shape: Sequence[Any]) -> tuple[Any, ...]:
    """Return the spatial sizes of an input of shape ``(..., *spatial, M)``.

    Raises:
        ValueError: if the input has too few axes or another number of channels.
    """
    axes = len(spec.kernel_size)
    if len(input_shape) <= axes or input_shape[-1] != spec.in_features:
        raise ValueError(
            f"the convolution takes inputs of shape (..., {axes} spatial axes, "
            f"{spec.in_features} channels); got {tuple(input_shape)}."
        )
    return tuple(input_shape[-1 - axes : -1])


def unit_gain(key: PRNGKeyArray, shape: Sequence[int], terms: int) -> Float[Array, "*shape"]:
    """Return uniform weights such that a sum over ``terms`` of them keeps the variance.

    Args:
        key: of the numbers drawn.
        shape: of the weights.
        terms: how many weights, each times an input of its own, make an output.

    Returns:
        Float32 weights, uniform within ``sqrt(3 / terms)``.

    >>> unit_gain(jax.random.key(0), (3, 3, 8), terms=9).shape
    (3, 3, 8)
    """
    bound = math.sqrt(3 / terms)
    return jax.random.uniform(key, tuple(shape), minval=-bound, maxval=bound)


def scale_outputs(
    weights: Float[Array, "*stack_and_shape"], gain: Float[Array, "*stack n"]
) -> Float[Array, "*stack_and_shape"]:
    """Return weights, output channels last, with each channel multiplied by a gain.

    Args:
        weights: ``(..., N)``; with leading axes if layers are stacked.
        gain: one for each channel, with the same leading axes.

    Returns:
        Weights of the same shape and type.

    >>> scale_outputs(jnp.ones((3, 3, 4, 2)), jnp.array([1.0, 2.0])).sum(axis=(0, 1, 2)).tolist()
    [36.0, 72.0]
    """
    axes = tuple(range(gain.ndim - 1, weights.ndim - 1))
    return weights * jnp.expand_dims(gain, axes).astype(weights.dtype)


def flatten_batch(
    x: Float[Array, "*batch m"], spec: ConvSpec
) -> tuple[Float[Array, "b *spatial m"], tuple[Any, ...]]:
    """Merge any number of batch axes (none, too) into one.

    Args:
        x: input of shape ``(..., *spatial, M)``.
        spec: the convolution that ``x`` goes to.

    Returns:
        Input with one batch axis, and the shape of the batch axes to restore.
    """
    spatial = spatial_shape(spec, x.shape)
    batch = x.shape[: x.ndim - len(spatial) - 1]
    if len(batch) == 1:
        return x, batch
    return x.reshape(math.prod(batch), *spatial, x.shape[-1]), batch


def apply_method(
    method: Method,
    spec: ConvSpec,
    params: Mapping[str, ArrayLike],
    bias: Float[ArrayLike, "n"] | None,
    inputs: Float[ArrayLike, "*batch m"],
    *,
    dtype: Dtype | None,
    precision: lax.PrecisionLike,
) -> Float[Array, "*batch_out n"]:
    """Convolve by a method and add the bias, promoting types as Flax's convolutions do.

    Args:
        method: how the convolution is carried out.
        spec: its geometry.
        params: the method's parameters.
        bias: N entries, or None.
        inputs: shape ``(..., *spatial, M)``.
        dtype: of the computation; as inputs and parameters if None.
        precision: of products on accelerators.

    Returns:
        Output of shape ``(..., *spatial_out, N)``.
    """
    names = tuple(params)
    x, bias, *values = promote_dtype((inputs, bias, *params.values()), dtype=dtype)
    promoted = {n: jnp.asarray(v) for n, v in zip(names, values, strict=True)}
    y = _compiled(method, spec, precision, is_canonical(), promoted, jnp.asarray(x))
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


# As one program outside of jit, too, as a convolution is: its constants are part of it, and no
# transfer that a guard forbids. Before JAX 0.11 what is inlined is transposed step by step.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=jax.__version_info__ >= (0, 11))
def _compiled(
    method: Method,
    spec: ConvSpec,
    precision: lax.PrecisionLike,
    canonical: bool,  # what is traced depends on it
    params: Params,
    x: Array,
) -> Array:
    return method.apply(params, x, spec, precision=precision)


def _supported(function: Callable[..., Params]) -> Callable[..., Params]:
    """Return `init` for convolutions that the method supports."""

    @functools.wraps(function)
    def init(self: Method, key: PRNGKeyArray, spec: ConvSpec) -> Params:
        self.require(spec)
        return function(self, key, spec)

    return init


def _belonging(function: Callable[..., Params]) -> Callable[..., Params]:
    """Return `fit` for kernels that belong to a convolution that the method supports."""

    @functools.wraps(function)
    def fit(self: Method, kernel: Array, spec: ConvSpec) -> Params:
        self.require(spec, kernel)
        return function(self, kernel, spec)

    return fit


def _batched(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return `apply` for any number of batch axes."""
    takes_precision = "precision" in inspect.signature(function).parameters

    @functools.wraps(function)
    def apply(
        self: Method,
        params: Params,
        x: Array,
        spec: ConvSpec,
        *,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        flat, batch = flatten_batch(x, spec)
        options = {"precision": precision} if takes_precision else {}
        y = function(self, params, flat, spec, **options)
        return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])

    return apply


def _with_bias(function: Callable[..., Cost]) -> Callable[..., Cost]:
    """Return `cost` with that of the bias."""

    @functools.wraps(function)
    def cost(self: Method, spec: ConvSpec, input_shape: Sequence[int]) -> Cost:
        spatial = spatial_shape(spec, input_shape)
        bare = dataclasses.replace(spec, use_bias=False)
        points = math.prod(spec.output_shape(spatial))
        return function(self, bare, (*spatial, spec.in_features)) + bias_cost(spec, points)

    return cost


_AROUND: dict[str, Callable[[Any], Any]] = {
    "init": _supported,
    "fit": _belonging,
    "fit_moments": _in_metric,
    "apply": _batched,
    "cost": _with_bias,
}
