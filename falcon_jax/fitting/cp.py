"""CP decomposition of tensors of any order by alternating least squares."""

import functools
import math
import string

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("rank", "max_iterations", "tolerance"))
def cp_als(
    tensor: Float[Array, "*shape"],
    *,
    rank: int,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
) -> tuple[Float[Array, "size rank"], ...]:
    """Return the factors of a CP decomposition.

    ``T[i, j, ...] = sum_r A[i, r] B[j, r] ...``

    Every factor in turn is the least-squares solution for the others; its columns are normalised at
    once, so that none grows while another vanishes, and the weights are spread evenly over the
    factors at the end. Starts from the leading singular vectors of the unfoldings.

    Args:
        tensor: two axes or more.
        rank: number of terms.
        max_iterations: bound on the rounds through all factors.
        tolerance: ends when a round lowers the relative error by less.

    Returns:
        One factor an axis, in the type of ``tensor``.

    Reference:
        Kolda and Bader: Tensor Decompositions and Applications, 2009, Figure 3.3; Lebedev et al.:
        Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition, ICLR 2015.
    """
    a = tensor.astype(jnp.promote_types(tensor.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(a), initial=0)
    scale = jnp.where(largest > 0, largest, 1)
    a = a / scale
    total = jnp.sum(a * a)
    start = [_initial(a, axis, rank) for axis in range(a.ndim)]

    def update(state: tuple[list[Array], Array, Array, Array, Array]):
        factors, _, error, _, count = state
        factors, weights = list(factors), jnp.ones(rank, a.dtype)
        fit = jnp.zeros((), a.dtype)
        for axis in range(a.ndim):
            gram = _hadamard_of_grams(factors, axis)
            right = _projected(a, factors, axis)
            new = _solve(gram, right)
            fit = 2 * jnp.sum(new * right) - jnp.sum(_product("ir,is,rs->", new, new, gram))
            weights = jnp.sqrt(jnp.sum(new * new, axis=0))
            factors[axis] = new / jnp.where(weights > 0, weights, 1)[None]
        lost = jnp.maximum(total - fit, 0) / jnp.where(total > 0, total, 1)
        return factors, weights, jnp.sqrt(lost), error, count + 1

    def unfinished(state: tuple[list[Array], Array, Array, Array, Array]) -> Array:
        _, _, error, before, count = state
        return (count < max_iterations) & (before - error > tolerance)

    nothing = (jnp.ones(rank, a.dtype), jnp.full((), 2, a.dtype), jnp.full((), 3, a.dtype))
    state = (start, *nothing, jnp.zeros((), jnp.int32))
    factors, weights, *_ = lax.while_loop(unfinished, update, state)
    share = (weights * scale) ** (1 / a.ndim)
    return tuple((factor * share[None]).astype(tensor.dtype) for factor in factors)


def _initial(a: Array, axis: int, rank: int) -> Array:
    """Return leading singular vectors of an unfolding, and random columns beyond its size."""
    unfolded = jnp.moveaxis(a, axis, 0).reshape(a.shape[axis], -1)
    _, vectors = jnp.linalg.eigh(_product("ij,kj->ik", unfolded, unfolded))
    vectors = vectors[:, ::-1][:, :rank]
    more = jax.random.uniform(
        jax.random.key(axis), (a.shape[axis], rank - vectors.shape[1]), a.dtype, minval=-1
    )
    return jnp.concatenate([vectors, more / math.sqrt(a.shape[axis] / 3)], axis=1)


def _projected(a: Array, factors: list[Array], axis: int) -> Array:
    """Return the tensor times all factors but one: the matricised product with Khatri-Rao."""
    letters = string.ascii_lowercase[: a.ndim]
    others = [i for i in range(a.ndim) if i != axis]
    terms = ",".join([letters, *(letters[i] + "z" for i in others)])
    return _product(
        f"{terms}->{letters[axis]}z", a, *(factors[i] for i in others), optimize="optimal"
    )


def _hadamard_of_grams(factors: list[Array], axis: int) -> Array:
    grams = [_product("ir,is->rs", f, f) for i, f in enumerate(factors) if i != axis]
    return functools.reduce(jnp.multiply, grams)


def _solve(gram: Array, right: Array) -> Array:
    """Return ``right @ inverse(gram)``, with a ridge at the level of rounding errors."""
    rank = gram.shape[0]
    ridge = 10 * jnp.finfo(gram.dtype).eps * jnp.maximum(jnp.trace(gram), 1e-30)
    factor = jax.scipy.linalg.cho_factor(gram + ridge * jnp.eye(rank, dtype=gram.dtype))
    return jax.scipy.linalg.cho_solve(factor, right.T).T
