"""How many terms to keep: by the energy of a matrix, or by variational Bayes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from scipy.optimize import minimize_scalar

from falcon_jax.solvers.low_rank import MOST_ROTATED, best_low_rank
from falcon_jax.solvers.scale import largest_exponent, times_power_of_two


def kept_energy(matrices: Float[Array, "b p q"]) -> Float[Array, "ranks"]:
    """Return the share of the squared norm that the best approximation of every rank keeps.

    ``e_k = 1 - sum_b ||A_b - A_b^(k)||^2 / sum_b ||A_b||^2``, all matrices at the same rank. The
    residuals themselves are summed: ``sum_{r < k} s_r^2`` would lose what is nearly nothing.

    Args:
        matrices: a batch of p x q matrices; zero matrices keep everything.

    Returns:
        ``e_1`` to ``e_min(p, q)``.

    >>> matrix = jnp.diag(jnp.array([2.0, 1.0]))
    >>> [round(float(share), 3) for share in kept_energy(matrix[None])]
    [0.8, 1.0]
    """
    lost, total = _lost_and_total(matrices)
    total = jnp.sum(total)
    return jnp.where(total > 0, 1 - jnp.sum(lost, axis=1) / jnp.where(total > 0, total, 1), 1)


def mean_kept_energy(matrices: Float[Array, "b p q"]) -> Float[Array, "ranks"]:
    """Return the share that every matrix keeps, averaged over the matrices that are not zero.

    ``e_k = mean_b (1 - ||A_b - A_b^(k)||^2 / ||A_b||^2)``

    Args:
        matrices: a batch of p x q matrices; if all are zero, they keep everything.

    Returns:
        ``e_1`` to ``e_min(p, q)``.

    Reference:
        Network Decoupling (Guo et al., BMVC 2018), Section 3.
    """
    lost, total = _lost_and_total(matrices)
    some = total > 0
    kept = jnp.where(some[None], 1 - lost / jnp.where(some, total, 1)[None], 0)
    count = jnp.sum(some)
    return jnp.where(count > 0, jnp.sum(kept, axis=1) / jnp.maximum(count, 1), 1)


def _lost_and_total(
    matrices: Float[Array, "b p q"],
) -> tuple[Float[Array, "ranks b"], Float[Array, "b"]]:
    a = matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))
    a = times_power_of_two(a, -largest_exponent(a))
    total = jnp.sum(a * a, axis=(1, 2))
    if min(a.shape[1:]) > MOST_ROTATED:
        squares = jnp.linalg.svd(a, compute_uv=False) ** 2
        # From the smallest up, so that little is not lost beside much.
        tails = jnp.cumsum(squares[:, ::-1], axis=1)[:, ::-1]
        return jnp.pad(tails[:, 1:], ((0, 0), (0, 1))).T, total
    left, right = best_low_rank(a, rank=min(a.shape[1:]))

    def remove(residual: Array, term: tuple[Array, Array]) -> tuple[Array, Array]:
        residual = residual - term[0][:, :, None] * term[1][:, None, :]
        return residual, jnp.sum(residual * residual, axis=(1, 2))

    _, lost = lax.scan(remove, a, (jnp.moveaxis(left, 2, 0), jnp.moveaxis(right, 1, 0)))
    return lost, total


def smallest_rank(
    stack: Float[Array, "layers b p q"],
    energy: float,
    *,
    measure: Callable[[Array], Array] = kept_energy,
) -> int:
    """Return the smallest rank at which the matrices of every layer keep a share of their energy.

    Args:
        stack: the matrices of one layer, or of several that must have one rank.
        energy: the share, from 0 to 1; rounding errors of float32 (1e-6) are forgiven.
        measure: gives the shares of one layer, rank by rank.

    Raises:
        ValueError: under jit, vmap or grad, where a rank cannot depend on values.
    """
    if isinstance(stack, Tracer):
        raise ValueError(
            "a rank chosen by energy depends on the kernel's values, so it cannot be found under "
            "jit, vmap or grad; choose it outside, or give a number."
        )
    stack = times_power_of_two(stack, -largest_exponent(stack))
    reached = jnp.all(jax.vmap(measure)(stack) >= energy - 1e-6, axis=0)
    return int(jnp.argmax(reached)) + 1


def vbmf_rank(matrix: ArrayLike) -> int:
    """Return the rank that empirical VBMF estimates; the noise variance is estimated, too.

    With ``alpha = L / M`` for an L x M matrix, L <= M, and noise variance ``v``, the singular
    values above ``sqrt(M v (1 + tau) (1 + alpha / tau))`` are signal, ``tau = 2.5129 sqrt(alpha)``;
    ``v`` minimises the free energy, a function of one variable.

    Args:
        matrix: two axes, any shape; at least 2 x 2 to tell noise from signal.

    Returns:
        The rank, from 0 (nothing but noise) to the smaller side.

    Raises:
        ValueError: if it is no matrix or holds values that are not finite.

    Reference:
        Nakajima, Sugiyama, Babacan, Tomioka: Global Analytic Solution of Fully-observed Variational
        Bayesian Matrix Factorization, JMLR 2013, Theorem 2 and Corollaries 1 to 3.
    """
    values = np.asarray(matrix, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"VBMF takes a matrix; got shape {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError("the matrix holds values that are not finite.")
    small, large = sorted(values.shape)
    values = values / max(np.abs(values).max(), np.finfo(np.float64).tiny)
    # The Gram matrix of the shorter side has the same spectrum and is far cheaper.
    gram = values @ values.T if values.shape[0] == small else values.T @ values
    squares = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)
    if squares[0] == 0 or small == 1:
        return int(squares[0] > 0)
    squares = squares / squares[0]  # the rank does not depend on the scale
    alpha = small / large
    tau = 2.5129 * np.sqrt(alpha)
    x_limit = (1 + tau) * (1 + alpha / tau)
    noise = _noise_variance(squares, small, large, alpha, x_limit)
    return int(np.sum(squares > large * noise * x_limit))


def _noise_variance(
    squares: np.ndarray, small: int, large: int, alpha: float, x_limit: float
) -> float:
    largest_rank = max(min(int(np.ceil(small / (1 + alpha))) - 1, small) - 1, 0)
    upper = squares.sum() / (small * large)
    tail = squares[largest_rank + 1 :]
    lower = max(tail[0] / (large * x_limit), tail.mean() / large) if tail.size else 0
    floor = np.finfo(np.float64).eps * upper
    lower, upper = max(lower, floor), max(upper, floor)
    if lower >= upper:
        return upper

    def energy(log_noise: float) -> float:
        return _free_energy(squares, large, alpha, x_limit, np.exp(log_noise))

    found = minimize_scalar(energy, bounds=(np.log(lower), np.log(upper)), method="bounded")
    return float(np.exp(found.x))


def _free_energy(
    squares: np.ndarray, large: int, alpha: float, x_limit: float, noise: float
) -> float:
    x = np.maximum(squares / (large * noise), np.finfo(np.float64).tiny)
    signal, rest = x[x > x_limit], x[x <= x_limit]
    shifted = signal - (1 + alpha)
    tau = (shifted + np.sqrt(np.maximum(shifted**2 - 4 * alpha, 0))) / 2
    return float(
        np.sum(rest - np.log(rest))
        + np.sum(signal - tau)
        + np.sum(np.log((tau + 1) / signal))
        + alpha * np.sum(np.log(tau / alpha + 1))
    )
