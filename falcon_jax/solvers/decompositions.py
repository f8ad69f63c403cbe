"""Tucker and CP decompositions of tensors, in the metric of the kernel."""

import functools
import math
import string

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_MAX_ITERATIONS = 50
_TOLERANCE = 1e-7

_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("rank_in", "rank_out"))
def tucker2(
    kernel: Float[Array, "taps m n"], *, rank_in: int, rank_out: int
) -> tuple[Float[Array, "m r_in"], Float[Array, "taps r_in r_out"], Float[Array, "r_out n"]]:
    """Return the Tucker-2 decomposition of a kernel by HOSVD and HOOI.

    ``K[t, m, n] = sum_ab inner[m, a] core[t, a, b] outer[b, n]``, ``inner`` and ``outer`` with
    orthonormal columns and rows. HOSVD starts, alternating exact updates of the two factors (HOOI)
    lower the error until they no longer do.

    Args:
        kernel: shape ``(taps, M, N)``.
        rank_in: at most M.
        rank_out: at most N.

    Returns:
        ``inner``, ``core`` and ``outer`` in the type of ``kernel``.

    Reference:
        Kim et al.: Compression of Deep Convolutional Neural Networks, ICLR 2016; De Lathauwer et
        al.: On the best rank-1 and rank-(R1, ..., RN) approximation, 2000.
    """
    a = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(a))
    scale = jnp.where(largest > 0, largest, 1)
    a = a / scale
    inner = _leading(_product("tmn,tpn->mp", a, a), rank_in)
    outer = _leading(_product("tmn,tmp->np", a, a), rank_out)

    def update(state: tuple[Array, ...]) -> tuple[Array, ...]:
        _, outer, energy, _, count = state
        half = _product("tmn,nb->tmb", a, outer)
        inner = _leading(_product("tmb,tpb->mp", half, half), rank_in)
        half = _product("tmn,ma->tan", a, inner)
        outer = _leading(_product("tan,tap->np", half, half), rank_out)
        core = _product("tan,nb->tab", half, outer)
        return inner, outer, jnp.sum(core * core), energy, count + 1

    def unfinished(state: tuple[Array, ...]) -> Array:
        _, _, energy, before, count = state
        return (count < _MAX_ITERATIONS) & (energy > before * (1 + _TOLERANCE))

    zero = jnp.zeros((), a.dtype)
    state = update((inner, outer, zero, zero, jnp.zeros((), jnp.int32)))
    inner, outer, *_ = lax.while_loop(unfinished, update, state)
    core = scale * _product("tmn,ma,nb->tab", a, inner, outer)
    return (
        inner.astype(kernel.dtype),
        core.astype(kernel.dtype),
        outer.T.astype(kernel.dtype),
    )


def _leading(gram: Float[Array, "p p"], rank: int) -> Float[Array, "p r"]:
    """Return the eigenvectors of the largest eigenvalues."""
    _, vectors = jnp.linalg.eigh(gram)
    return vectors[:, ::-1][:, :rank]


_product_of = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


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
            fit = 2 * jnp.sum(new * right) - jnp.sum(_product_of("ir,is,rs->", new, new, gram))
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
    _, vectors = jnp.linalg.eigh(_product_of("ij,kj->ik", unfolded, unfolded))
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
    return _product_of(
        f"{terms}->{letters[axis]}z", a, *(factors[i] for i in others), optimize="optimal"
    )


def _hadamard_of_grams(factors: list[Array], axis: int) -> Array:
    grams = [_product_of("ir,is->rs", f, f) for i, f in enumerate(factors) if i != axis]
    return functools.reduce(jnp.multiply, grams)


def _solve(gram: Array, right: Array) -> Array:
    """Return ``right @ inverse(gram)``, with a ridge at the level of rounding errors."""
    rank = gram.shape[0]
    ridge = 10 * jnp.finfo(gram.dtype).eps * jnp.maximum(jnp.trace(gram), 1e-30)
    factor = jax.scipy.linalg.cho_factor(gram + ridge * jnp.eye(rank, dtype=gram.dtype))
    return jax.scipy.linalg.cho_solve(factor, right.T).T
