"""The rank of a noisy matrix by variational Bayesian matrix factorization, in closed form."""

import numpy as np
from jax.typing import ArrayLike
from scipy.optimize import minimize_scalar


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
