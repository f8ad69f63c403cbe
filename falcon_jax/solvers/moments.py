"""Second moments of what a convolution gets and should answer, and what weights cost by them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from falcon_jax.ops.geometry import ConvSpec, pad, pad_boundary, padding_pairs, tap_slices

CHUNK = 1 << 24  # floats of patches at a time: 64 MB


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("count", "input_mean", "target_mean", "second", "cross", "variance"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Moments of patches ``x`` (taps first, then channels, as in Flax) and targets ``y``.

    Per group of channels; centred, and divided by the number of points:
    ``second = E (x - E x) (x - E x)^T``, ``cross = E (x - E x) (y - E y)``.

    Attributes:
        count: points seen (or the sum of their weights).
        input_mean: of the patches.
        target_mean: of the targets.
        second: covariance of the patches.
        cross: covariance of patches and targets.
        variance: of the targets.
    """

    count: Float[Array, ""]
    input_mean: Float[Array, "groups inputs"]
    target_mean: Float[Array, "groups outputs"]
    second: Float[Array, "groups inputs inputs"]
    cross: Float[Array, "groups inputs outputs"]
    variance: Float[Array, "groups outputs"]

    @classmethod
    def zeros(cls, spec: ConvSpec) -> "Moments":
        """Return the moments of no points."""
        groups = spec.feature_group_count
        inputs, outputs = spec.taps * spec.group_in_features, spec.out_features // groups
        return cls(
            count=jnp.zeros(()),
            input_mean=jnp.zeros((groups, inputs)),
            target_mean=jnp.zeros((groups, outputs)),
            second=jnp.zeros((groups, inputs, inputs)),
            cross=jnp.zeros((groups, inputs, outputs)),
            variance=jnp.zeros((groups, outputs)),
        )

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of the points of both.

        Reference:
            Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm for Computing Sample
            Variances, 1979.
        """
        count = self.count + other.count
        share = jnp.where(count > 0, other.count / jnp.where(count > 0, count, 1), 0)
        dx = other.input_mean - self.input_mean
        dy = other.target_mean - self.target_mean
        spread = share * (1 - share)

        def mixed(a: Array, b: Array) -> Array:
            return a + share * (b - a)

        return Moments(
            count=count,
            input_mean=mixed(self.input_mean, other.input_mean),
            target_mean=mixed(self.target_mean, other.target_mean),
            second=mixed(self.second, other.second) + spread * dx[:, :, None] * dx[:, None],
            cross=mixed(self.cross, other.cross) + spread * dx[:, :, None] * dy[:, None],
            variance=mixed(self.variance, other.variance) + spread * dy * dy,
        )

    def about_zero(self) -> "Moments":
        """Return the moments about 0, which a layer without a bias is fitted to."""
        x, y = self.input_mean, self.target_mean
        return Moments(
            count=self.count,
            input_mean=jnp.zeros_like(x),
            target_mean=jnp.zeros_like(y),
            second=self.second + x[:, :, None] * x[:, None],
            cross=self.cross + x[:, :, None] * y[:, None],
            variance=self.variance + y * y,
        )


def update_moments(
    moments: Moments,
    x: Float[Array, "b *spatial m"],
    y: Float[Array, "b *spatial_out n"],
    spec: ConvSpec,
    *,
    weights: Float[Array, "b *spatial_out"] | None = None,
    points: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Moments:
    """Return the moments with those of a batch added.

    Args:
        moments: of the batches before.
        x: what the layer gets.
        y: what it should answer.
        spec: the convolution.
        weights: of the output points, 0 or more; all count the same if None.
        points: of each example's output, so many are looked at, at random; all if None.
        key: for the choice.

    Returns:
        Moments; the patches of a few examples at a time are in memory.
    """
    total = math.prod(y.shape[1:-1])
    seen = total if points is None else min(points, total)
    inputs = spec.taps * spec.in_features
    examples = max(1, CHUNK // max(1, seen * inputs))
    if seen < total and key is None:
        raise ValueError("sampling points needs a key, e.g. key=jax.random.key(0).")
    for start in range(0, x.shape[0], examples):
        part = slice(start, start + examples)
        some = None
        if seen < total:
            assert key is not None
            scores = jax.random.uniform(jax.random.fold_in(key, start), (x[part].shape[0], total))
            some = lax.top_k(scores, seen)[1]
        weight = None if weights is None else jnp.asarray(weights[part])
        moments = _updated(moments, x[part], y[part], weight, some, spec=spec)
    return moments


@functools.partial(jax.jit, static_argnames="spec", donate_argnums=0)
def _updated(
    moments: Moments,
    x: Array,
    y: Array,
    weights: Array | None,
    chosen: Array | None,
    *,
    spec: ConvSpec,
) -> Moments:
    groups = spec.feature_group_count
    patches = patches_at(x, spec, chosen)
    target = points_at(y, chosen).reshape(-1, groups, spec.out_features // groups).swapaxes(0, 1)
    count = target.shape[1]
    if weights is None:
        share = jnp.full((1, count, 1), 1 / max(count, 1))
        total = jnp.asarray(float(count))
    else:
        weight = points_at(weights[..., None], chosen).reshape(1, count, 1)
        total = weight.sum()
        share = weight / jnp.where(total > 0, total, 1)
    x_mean, y_mean = (share * patches).sum(1), (share * target).sum(1)
    x_rest, y_rest = patches - x_mean[:, None], target - y_mean[:, None]
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    weighted = x_rest * share
    return moments.merge(
        Moments(
            count=total,
            input_mean=x_mean,
            target_mean=y_mean,
            second=product("gsi,gsj->gij", weighted, x_rest),
            cross=product("gsi,gsn->gin", weighted, y_rest),
            variance=(share * y_rest * y_rest).sum(1),
        )
    )


def patches_at(
    x: Float[Array, "b *spatial m"], spec: ConvSpec, chosen: Int[Array, "b points"] | None
) -> Float[Array, "groups b_points inputs"]:
    """Return what a convolution's kernel is multiplied by at some points of its output.

    Args:
        x: what the convolution gets.
        spec: the convolution.
        chosen: points of each example's output, in row-major order; all if None.
    """
    groups = spec.feature_group_count
    rows = (-1, spec.taps, groups, spec.group_in_features)
    patches = _patches(x, spec, chosen).reshape(rows).transpose(2, 0, 1, 3)
    return patches.reshape(groups, -1, rows[1] * rows[3])


def points_at(
    y: Float[Array, "b *spatial c"], chosen: Int[Array, "b points"] | None
) -> Float[Array, "b points c"]:
    """Return the channels at some points of a map, or at all."""
    flat = y.reshape(y.shape[0], math.prod(y.shape[1:-1]), y.shape[-1])
    return flat if chosen is None else jnp.take_along_axis(flat, chosen[..., None], axis=1)


def _patches(x: Array, spec: ConvSpec, chosen: Array | None) -> Float[Array, "b points taps m"]:
    x, padding = pad_boundary(
        x, spec.padding, spec.kernel_size, kernel_dilation=spec.kernel_dilation
    )
    pairs = padding_pairs(
        padding,
        x.shape[1:-1],
        spec.kernel_size,
        strides=spec.strides,
        input_dilation=spec.input_dilation,
        kernel_dilation=spec.kernel_dilation,
    )
    geometry = spec.strides, pairs, spec.input_dilation, spec.kernel_dilation
    slices = tap_slices(geometry, pad(geometry, x), spec.kernel_size)
    return jnp.stack([points_at(tap, chosen) for tap in slices], axis=2)


RIDGE = 1e-4  # of the mean eigenvalue of C


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quadratic:
    """``trace(W^T A W) - 2 trace(W^T b)`` of one group's weights W, taps first, then channels.

    Attributes:
        taps: points of the kernel.
        metric: A, positive definite.
        linear: b.
        constant: what is added, so that weights without error give 0: the targets' variance and
            ``lam ||K||^2``.
    """

    taps: int
    metric: Float[np.ndarray, "inputs inputs"]
    linear: Float[np.ndarray, "inputs outputs"]
    constant: float

    @property
    def channels(self) -> int:
        """Input channels M."""
        return self.metric.shape[0] // self.taps

    @property
    def outputs(self) -> int:
        """Output channels N of the group."""
        return self.linear.shape[1]

    def __call__(self, weights: Float[np.ndarray, "inputs outputs"]) -> float:
        """Return the error of weights."""
        return float(np.sum(weights * (self.metric @ weights - 2 * self.linear))) + self.constant

    def by_output(
        self, weights: Float[np.ndarray, "inputs outputs"]
    ) -> Float[np.ndarray, " outputs"]:
        """Return the error of the weights of each output channel, but for the constant."""
        return np.sum(weights * (self.metric @ weights - 2 * self.linear), axis=0)

    def dense(self) -> Float[np.ndarray, "inputs outputs"]:
        """Return the best weights of all, ``A^-1 b``."""
        return solve(self.metric, self.linear)


def quadratics(
    moments: Moments,
    kernel: Float[Array, "*kernel_size m n"] | Float[np.ndarray, "*kernel_size m n"],
    *,
    ridge: float = RIDGE,
) -> list[Quadratic]:
    """Return what a kernel's weights cost, for each group.

    Args:
        moments: of the layer; ``moments.about_zero()`` for one without a bias.
        kernel: trained, ``(*kernel_size, M / groups, N)``, that the weights are drawn to.
        ridge: lam, in units of the mean eigenvalue of C.
    """
    groups, inputs = moments.input_mean.shape
    taps = inputs // kernel.shape[-2]
    targets = np.asarray(kernel, np.float64).reshape(inputs, groups, -1).swapaxes(0, 1)
    found = []
    for index, target in enumerate(targets):
        second = np.array(moments.second[index], np.float64)
        mean = np.trace(second) / inputs
        # Without any input, the kernel itself is best.
        lam = ridge * mean if mean > 0 else 1.0
        second += second.T
        second /= 2
        second[np.diag_indices(inputs)] += lam
        found.append(
            Quadratic(
                taps=taps,
                metric=second,
                linear=np.asarray(moments.cross[index], np.float64) + lam * target,
                constant=float(np.sum(np.asarray(moments.variance[index], np.float64)))
                + lam * float(np.sum(target**2)),
            )
        )
    return found


def dense_kernel(
    moments: Moments, kernel: Float[Array, "*kernel_size m n"], *, ridge: float = RIDGE
) -> Float[Array, "*kernel_size m n"]:
    """Return the kernel that is best of all, in the type and shape of a trained one."""
    groups = [problem.dense() for problem in quadratics(moments, kernel, ridge=ridge)]
    return jnp.asarray(np.concatenate(groups, axis=1).reshape(kernel.shape), kernel.dtype)


def best_bias(
    moments: Moments,
    kernel: Float[Array, "*kernel_size m n"] | Float[np.ndarray, "*kernel_size m n"],
) -> Float[np.ndarray, " n"]:
    """Return the bias with which a kernel's mean answers are the targets'."""
    groups, inputs = moments.input_mean.shape
    weights = np.asarray(kernel, np.float64).reshape(inputs, groups, -1)
    means = np.einsum("ign,gi->gn", weights, np.asarray(moments.input_mean, np.float64))
    return (np.asarray(moments.target_mean, np.float64) - means).reshape(-1)


def explained(moments: Moments, kernel: Float[Array, "*kernel_size m n"]) -> float:
    """Return the share of the targets' variance that a kernel (with `best_bias`) explains."""
    groups, inputs = moments.input_mean.shape
    weights = np.asarray(kernel, np.float64).reshape(inputs, groups, -1).swapaxes(0, 1)
    total = float(np.sum(np.asarray(moments.variance, np.float64)))
    second, cross = (np.asarray(a, np.float64) for a in (moments.second, moments.cross))
    # einsum of three would not use a matrix product
    share = float(np.sum(weights * (2 * cross - second @ weights)))
    return share / total if total > 0 else 1.0


def solve(
    matrix: Float[np.ndarray, "p p"], right: Float[np.ndarray, "p q"]
) -> Float[np.ndarray, "p q"]:
    """Return ``matrix^-1 right`` of a symmetric matrix, positive definite but for rounding."""
    try:
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(matrix, lower=True), right)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(matrix)
        floor = np.abs(values).max() * len(values) * np.finfo(matrix.dtype).eps
        inverse = np.where(values > floor, 1 / np.where(values > floor, values, 1), 0)
        return vectors @ (inverse[:, None] * (vectors.T @ right))


def root(
    matrix: Float[np.ndarray, "p p"],
) -> tuple[Float[np.ndarray, "p p"], Float[np.ndarray, "p p"]]:
    """Return the symmetric square root of a semidefinite matrix, and its pseudo-inverse."""
    values, vectors = np.linalg.eigh(matrix)
    floor = max(values.max(), 0) * len(values) * np.finfo(matrix.dtype).eps
    kept = values > floor
    roots = np.sqrt(np.where(kept, values, 0))
    inverse = np.where(kept, 1 / np.where(kept, roots, 1), 0)
    return (vectors * roots) @ vectors.T, (vectors * inverse) @ vectors.T


def partial_traces(
    problem: Quadratic,
) -> tuple[Float[np.ndarray, "taps taps"], Float[np.ndarray, "m m"]]:
    """Return ``S_t`` and ``S_m``, the partial traces, with ``A ~ S_t (x) S_m``."""
    t, m = problem.taps, problem.channels
    blocks = problem.metric.reshape(t, m, t, m)
    taps = np.einsum("tmum->tu", blocks)
    channels = np.einsum("tmtk->mk", blocks)
    total = np.trace(taps)
    return taps / total if total > 0 else taps, channels
