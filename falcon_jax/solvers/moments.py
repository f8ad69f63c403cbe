"""Second moments of what a convolution gets and should answer, and what weights cost by them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

RIDGE = 1e-4  # of the mean eigenvalue of C


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
    # As NumPy's: JAX compiles what takes a part.
    seconds, crosses, variances = map(np.asarray, (moments.second, moments.cross, moments.variance))
    found = []
    for index, target in enumerate(targets):
        second = np.array(seconds[index], np.float64)
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
                linear=np.asarray(crosses[index], np.float64) + lam * target,
                constant=float(np.sum(variances[index], dtype=np.float64))
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


def by_group(
    kernel: Float[Array, "*kernel_size m n"] | Float[np.ndarray, "*kernel_size m n"], groups: int
) -> Float[np.ndarray, "groups inputs outputs"]:
    """Return a kernel's weights group by group, in float32."""
    flat = np.asarray(kernel, np.float32).reshape(-1, groups, kernel.shape[-1] // groups)
    return flat.swapaxes(0, 1)


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
