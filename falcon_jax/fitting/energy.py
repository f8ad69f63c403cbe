"""How much of a matrix its best approximations keep."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from falcon_jax.fitting.low_rank import MOST_ROTATED, best_low_rank
from falcon_jax.fitting.scale import largest_exponent, times_power_of_two


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
