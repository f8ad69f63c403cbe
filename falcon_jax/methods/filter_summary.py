"""Filter summaries: all filters of a layer are overlapping segments of one vector."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from falcon_jax.methods.base import Cost, Method, Params, standard_cost
from falcon_jax.methods.registry import register
from falcon_jax.ops.convolution import conv
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.settings import is_number
from falcon_jax.solvers.scale import largest_exponent

Step = Literal["even", "paper"]


class SummaryMethod(Method):
    """A method whose filters are segments of a vector ``summary`` of length ``int(N K / ratio)``.

    ``K = h w M / groups`` is the size of a filter. Subclasses are dataclasses with a field
    ``ratio``.
    """

    ratio: float | int

    def __post_init__(self):
        if not is_number(self.ratio) or self.ratio < 1:
            raise ValueError(f"ratio is a finite number of at least 1; got {self.ratio!r}.")

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        length, size = self.length(spec), _filter_size(spec)
        if size <= length:
            return None
        return (
            f"a ratio of {self.ratio} leaves {length} weights, fewer than the {size} of one "
            f"filter; the ratio can be at most {spec.out_features}, the number of filters"
        )

    def length(self, spec: ConvSpec) -> int:
        """Return the length L of the vector."""
        return int(math.prod(spec.kernel_shape) / self.ratio)

    def init_summary(self, key: PRNGKeyArray, spec: ConvSpec) -> Float[Array, " length"]:
        """Return a random vector, uniform within ``1 / sqrt(K)``."""
        bound = 1 / math.sqrt(_filter_size(spec))
        return jax.random.uniform(key, (self.length(spec),), minval=-bound, maxval=bound)

    def factors(self, spec: ConvSpec) -> tuple[str, ...]:
        """Return the names of parameters in each of which the kernel is linear."""
        return ("summary",)

    def builds_kernel(self) -> bool:
        """Return True."""
        return True

    def apply(
        self,
        params: Params,
        x: Float[Array, "b *spatial m"],
        spec: ConvSpec,
        *,
        precision: lax.PrecisionLike = None,
    ) -> Float[Array, "b *spatial_out n"]:
        """Convolve ``x`` of shape ``(b, *spatial, M)`` without adding a bias."""
        return conv(
            x,
            self.kernel(params, spec),
            **spec.geometry,
            feature_group_count=spec.feature_group_count,
            precision=precision,
        )

    def cost(self, spec: ConvSpec, input_shape: Sequence[int]) -> Cost:
        """Return the cost of the standard convolution with fewer parameters."""
        standard = standard_cost(spec, input_shape)
        saved = math.prod(spec.kernel_shape) - self.vector_params(spec)
        return dataclasses.replace(standard, params=standard.params - saved)

    def vector_params(self, spec: ConvSpec) -> int:
        """Return the parameters without a bias."""
        return self.length(spec)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterSummary(SummaryMethod):
    """Filter summary with fixed locations.

    ``F[c, k] = summary[(l_c + k) mod L]``, ``L = int(N K / ratio)``

    ``k`` runs over input channels first, then over the kernel's spatial axes. One parameter,
    ``summary`` of shape ``(L,)``. With feature groups, filters have ``M / groups`` channels.

    Attributes:
        ratio: the N K entries of the kernel per parameter, from 1 to N.
        step: ``even`` starts filter c at ``floor(c L / N)``; ``paper`` at ``floor(c L / (N - 1))``,
            where the last filter equals the first.
        reorder: whether a trained kernel decides which filter is at which location, so that filters
            that overlap are alike; or the filters by location, as `for_layer` decides them.

    Reference:
        FSNet: Compression of Deep Convolutional Neural Networks by Filter Summary (Yang et al.,
        2019, arXiv 1902.03264), Section 3.1.

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32, use_bias=False)
    >>> FilterSummary(ratio=4.0).cost(spec, (8, 8, 16))
    Cost(params=1152, mult_adds=294912)
    """

    ratio: float | int = 4.0
    step: Step = "even"
    reorder: bool | Sequence[int] = False
    name: ClassVar[str] = "filter_summary"

    def __post_init__(self):
        super().__post_init__()
        if self.step not in get_args(Step):
            raise ValueError(f"step is one of {', '.join(get_args(Step))}; got {self.step!r}.")
        if isinstance(self.reorder, bool):
            return
        order = tuple(self.reorder) if isinstance(self.reorder, Sequence) else ()
        if not order or set(order) != set(range(len(order))):
            raise ValueError(
                f"reorder is True, False or every filter's number once; got {self.reorder!r}."
            )
        object.__setattr__(self, "reorder", order)

    def __str__(self) -> str:
        order = self.reorder if isinstance(self.reorder, bool) else "decided"
        return f"FilterSummary(ratio={self.ratio}, step={self.step!r}, reorder={order})"

    def supports(self, spec: ConvSpec) -> str | None:
        """Return None, or the reason why the method cannot replace such a convolution."""
        n = spec.out_features
        if isinstance(self.reorder, tuple) and len(self.reorder) != n:
            return f"reorder has {len(self.reorder)} filters, the convolution {n}"
        return super().supports(spec)

    def for_layer(
        self, spec: ConvSpec, kernels: Float[Array, "layers *kernel_shape"] | None = None
    ) -> "FilterSummary":
        """Return the method with the order of the filters; as they are without a kernel.

        Raises:
            ValueError: under a trace, where an order cannot be found.
        """
        if self.reorder is not True:
            return self
        if kernels is None:
            return dataclasses.replace(self, reorder=False)
        self.require(spec)
        if isinstance(kernels, Tracer):
            raise ValueError("the order of filters cannot be found under jit; decide it before.")
        layers = np.stack([np.asarray(_filters(k, spec), np.float64) for k in kernels])
        layers = np.ldexp(layers, -largest_exponent(layers))
        order = neighbour_order(layers, self._starts(spec), self.length(spec))
        return dataclasses.replace(self, reorder=order or False)

    def locations(self, spec: ConvSpec) -> Int[np.ndarray, " n"]:
        """Return where the segment of each filter starts.

        Raises:
            ValueError: if the order of the filters is not decided.
        """
        if self.reorder is True:
            raise ValueError(
                "which filter is where is decided by a layer; use "
                "method.for_layer(spec, kernel[None]) in place of method."
            )
        starts = self._starts(spec)
        if self.reorder is False:
            return starts
        locations = np.empty_like(starts)
        locations[np.array(self.reorder)] = starts
        return locations

    def _starts(self, spec: ConvSpec) -> Int[np.ndarray, " n"]:
        n, length = spec.out_features, self.length(spec)
        parts = n if self.step == "even" else max(n - 1, 1)
        return np.array([c * length // parts % length for c in range(n)])

    def init(self, key: PRNGKeyArray, spec: ConvSpec) -> Params:
        """Return a random vector, uniform within ``1 / sqrt(K)``, as the authors have it."""
        return {"summary": self.init_summary(key, spec)}

    def fit(self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> Params:
        """Return the least-squares vector: the mean of all kernel entries that share a position.

        Raises:
            ValueError: if the order of the filters is not decided.
        """
        means = shared_means(_filters(kernel, spec), self.locations(spec), self.length(spec))
        return {"summary": means}

    def kernel(self, params: Params, spec: ConvSpec) -> Float[Array, "*kernel_shape"]:
        """Return the equivalent standard kernel."""
        size = _filter_size(spec)
        return _kernel(gather_segments(params["summary"], self.locations(spec), size), spec)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentiableFilterSummary(SummaryMethod):
    """Filter summary with learned locations.

    ``F[c, k] = (1 - a) summary[l + k] + a summary[l + k + 1]`` with ``p = sigmoid(g_c) L``,
    ``l = floor(p)``, ``a = p - l`` and indices modulo L

    Parameters: ``summary`` of shape ``(L,)`` and ``shift`` of shape ``(N,)``, the difference of g
    from its value at the evenly spaced location: 0 is that location exactly, in half precision,
    too. Locations start half a step from 0, where the sigmoid would not move; the vector is turned
    by as much.

    Attributes:
        ratio: the N K entries of the kernel per entry of ``summary``, from 1 to N.

    Reference:
        FSNet (Yang et al., 2019, arXiv 1902.03264), Section 3.2.

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32, use_bias=False)
    >>> DifferentiableFilterSummary(ratio=4.0).cost(spec, (8, 8, 16))
    Cost(params=1184, mult_adds=294912)
    """

    ratio: float | int = 4.0
    name: ClassVar[str] = "differentiable_filter_summary"

    def init(self, key: PRNGKeyArray, spec: ConvSpec) -> Params:
        """Return a random vector, uniform within ``1 / sqrt(K)``, and even locations."""
        return {
            "summary": self.init_summary(key, spec),
            "shift": jnp.zeros(spec.out_features),
        }

    def fit(self, kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> Params:
        """Return the least-squares vector at even locations, as `FilterSummary` has it."""
        means = shared_means(_filters(kernel, spec), self._starts(spec), self.length(spec))
        return {"summary": means, "shift": jnp.zeros(spec.out_features, kernel.dtype)}

    def locations(self, params: Params, spec: ConvSpec) -> Float[Array, " n"]:
        """Return where the segment of each filter starts, float32, not yet modulo L."""
        starts, length = self._starts(spec), self.length(spec)
        # The least fraction is half a position, where a step of less than two leaves no more.
        fractions = np.clip(starts / length, 0.5 / length, 1 - 0.5 / length)
        logits = jnp.asarray(np.log(fractions) - np.log1p(-fractions), jnp.float32)
        shift = params["shift"].astype(jnp.float32)
        moved = jax.nn.sigmoid(logits + shift) - jax.nn.sigmoid(logits)
        return jnp.asarray(starts, jnp.float32) + length * moved

    def _starts(self, spec: ConvSpec) -> Int[np.ndarray, " n"]:
        n, length = spec.out_features, self.length(spec)
        return FilterSummary(ratio=self.ratio).locations(spec) + length // (2 * n)

    def kernel(self, params: Params, spec: ConvSpec) -> Float[Array, "*kernel_shape"]:
        """Return the equivalent standard kernel."""
        locations = self.locations(params, spec)
        left = jnp.floor(locations)
        starts = left.astype(jnp.int32) % self.length(spec)
        longer = gather_segments(params["summary"], starts, _filter_size(spec) + 1)
        share = (locations - left)[:, None].astype(longer.dtype)
        return _kernel((1 - share) * longer[:, :-1] + share * longer[:, 1:], spec)

    def vector_params(self, spec: ConvSpec) -> int:
        """Return the parameters without a bias: L and one for each filter."""
        return self.length(spec) + spec.out_features


def _filter_size(spec: ConvSpec) -> int:
    return spec.taps * spec.group_in_features


def _filters(kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> Float[Array, "n size"]:
    """Return the filters of a kernel, each flattened from (M, *kernel_size)."""
    return jnp.moveaxis(kernel, (-1, -2), (0, 1)).reshape(spec.out_features, -1)


def _kernel(filters: Float[Array, "n size"], spec: ConvSpec) -> Float[Array, "*kernel_shape"]:
    shape = (spec.out_features, spec.group_in_features, *spec.kernel_size)
    return jnp.moveaxis(filters.reshape(shape), (0, 1), (-1, -2))


def gather_segments(
    summary: Float[Array, " length"],
    locations: Int[np.ndarray, " n"] | Int[Array, " n"],
    size: int,
) -> Float[Array, "n {size}"]:
    """Return the segments of a vector that start at the given locations.

    ``F[c, k] = summary[(locations[c] + k) mod L]``

    Args:
        summary: vector of length L.
        locations: starts of the segments, from 0 to L - 1.
        size: length of the segments.

    Reference:
        FSNet (Yang et al., 2019), Section 3.1.
    """
    wrapped = jnp.pad(summary, (0, size), mode="wrap")
    # Slices of a whole segment: an accelerator gathers rows, not single entries.
    segment = jax.vmap(lambda start: lax.dynamic_slice_in_dim(wrapped, start, size))
    return segment(jnp.asarray(locations, jnp.int32))


def shared_means(
    filters: Float[Array, "n size"], locations: Int[np.ndarray, " n"], length: int
) -> Float[Array, " {length}"]:
    """Return the vector whose segments are nearest to the filters, in least squares.

    An entry is the mean of all filter entries that share it; 0 where no filter has one.

    Args:
        filters: N filters of K entries.
        locations: where each one's segment starts.
        length: L, entries of the vector.

    Returns:
        The vector, in the type of ``filters``.
    """
    dtype = jnp.promote_types(filters.dtype, jnp.float32)
    like = jax.ShapeDtypeStruct((length,), dtype)
    scatter = jax.linear_transpose(lambda s: gather_segments(s, locations, filters.shape[1]), like)
    (totals,) = scatter(filters.astype(dtype))
    (counts,) = scatter(jnp.ones(filters.shape, dtype))
    return (totals / jnp.maximum(counts, 1)).astype(filters.dtype)


def neighbour_order(
    filters: Float[np.ndarray, "layers n size"], locations: Int[np.ndarray, " n"], length: int
) -> tuple[int, ...] | None:
    """Return an order of filters in which they share a vector at less error, or None.

    Greedy, from filter 0 on: the filter whose beginning is nearest to the end of the one before,
    over the entries that the two would share.

    Args:
        filters: float64, N filters of K entries of every layer of a stack (one order for all).
        locations: where the N segments start, increasing.
        length: L, entries of the vector.

    Returns:
        The filters by increasing location; None if the order as it is has no greater error.
    """
    n = filters.shape[1]
    steps = np.diff(locations)
    distances = {int(step): _distances(filters, int(step)) for step in np.unique(steps)}
    order, left = [0], np.ones(n, bool)
    for step in steps:
        left[order[-1]] = False
        order.append(int(np.where(left, distances[int(step)][order[-1]], np.inf).argmin()))
    better = _kept(filters[:, order], locations, length) > _kept(filters, locations, length)
    return tuple(order) if better else None


def _distances(filters: np.ndarray, step: int) -> np.ndarray:
    """Return squared distances between the ends (rows) and the beginnings of filters."""
    n, size = filters.shape[1:]
    # A wrap-around of the paper's step has a negative one; nothing is compared there.
    shared = size - step if 0 <= step < size else 0
    ends = filters[:, :, size - shared :].transpose(1, 0, 2).reshape(n, -1)
    beginnings = filters[:, :, :shared].transpose(1, 0, 2).reshape(n, -1)
    squares = (ends**2).sum(1)[:, None] + (beginnings**2).sum(1)[None]
    return squares - 2 * ends @ beginnings.T


def _kept(filters: np.ndarray, locations: np.ndarray, length: int) -> float:
    """Return the squared norm of the least-squares segments."""
    positions = ((locations[:, None] + np.arange(filters.shape[2])) % length).ravel()
    counts = np.maximum(np.bincount(positions, minlength=length), 1)
    totals = (np.bincount(positions, layer.ravel(), minlength=length) for layer in filters)
    return sum(float((total**2 / counts).sum()) for total in totals)
