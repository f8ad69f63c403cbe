"""The first few terms of best low-rank approximations, by repeated squaring of Gram matrices.

A rank of one, two or three needs the leading singular vectors only. Term by term: the Gram matrix
of what is left, its leading eigenvector, the term, and what is left without it. Taking terms away
from the matrix itself, not from its Gram matrix, keeps small ones accurate. Matrices lie side by
side (batch last), as the filters of a kernel do: nothing is transposed, no LAPACK is called.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.fitting.low_rank import MOST_ROTATED, best_low_rank, singular_basis
from falcon_jax.ops.accumulation import add_up

_MOST_TERMS = 3  # rotations find all at once and are as fast for more
_CHUNK = 8  # products written out at once: more compile longer, fewer read memory more often
_SAFE = (1e-20, 1e30)  # sums of squares within lose nothing to underflow or overflow


def best_terms(
    matrices: Float[Array, "p q b"], *, rank: int
) -> tuple[Float[Array, "p k b"], Float[Array, "q k b"]]:
    """Factor matrices that lie side by side, by the faster of `leading_terms` and `best_low_rank`.

    Args:
        matrices: a batch of p x q matrices, batch last, of any scale.
        rank: number k of terms, at least 1.

    Returns:
        ``left`` and ``right`` as of `leading_terms`.
    """
    if rank <= _MOST_TERMS and min(matrices.shape[:2]) <= MOST_ROTATED:
        return leading_terms(matrices, rank=rank)
    left, right = best_low_rank(matrices.transpose(2, 0, 1), rank=rank)
    return left.transpose(1, 2, 0), right.transpose(2, 1, 0)


@functools.partial(jax.jit, static_argnames="rank")
def leading_terms(
    matrices: Float[Array, "p q b"], *, rank: int
) -> tuple[Float[Array, "p k b"], Float[Array, "q k b"]]:
    """Factor every matrix into its best approximation of a given small rank.

    ``A_b ~ sum_{r < k} left[:, r, b] right[:, r, b]^T``, singular values split evenly between both.

    Differentiable where the singular values concerned are distinct. Half-precision matrices are
    factored in float32. Terms beyond ``min(p, q)`` and terms of singular value 0 are zero.

    Args:
        matrices: a batch of p x q matrices, batch last, of any scale.
        rank: number k of terms, at least 1; the time is proportional to it.

    Returns:
        ``left`` and ``right`` in the type of ``matrices``.

    Reference:
        Eckart and Young, 1936; FALCON, Algorithm 1, stage 1.
    """
    p, q, _ = matrices.shape
    if p > q:
        right, left = leading_terms(matrices.swapaxes(0, 1), rank=rank)
        return left, right
    rest = matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))
    lefts, rights = [], []
    for r in range(min(rank, p)):
        if r:
            rest = rest - lefts[-1][:, None] * rights[-1][None]
        left, right = _term(rest)
        lefts.append(left)
        rights.append(right)
    missing = ((0, 0), (0, rank - len(lefts)), (0, 0))
    return (
        jnp.pad(jnp.stack(lefts, axis=1), missing).astype(matrices.dtype),
        jnp.pad(jnp.stack(rights, axis=1), missing).astype(matrices.dtype),
    )


def _term(a: Array) -> tuple[Array, Array]:
    """Return the leading term ``sqrt(s) u`` and ``sqrt(s) v`` of every matrix."""
    u = _leading_vector(a)
    row = add_up(u[i : i + 1] * a[i] for i in range(a.shape[0]))
    largest = lax.stop_gradient(jnp.max(jnp.abs(row), axis=0, keepdims=True))
    positive = largest > 0
    scale = jnp.where(positive, largest, 1)
    # Zero terms stay zero and have zero gradient.
    squares = jnp.where(positive, jnp.sum((row / scale) ** 2, axis=0, keepdims=True), 1)
    root = jnp.where(positive, jnp.sqrt(scale) * jnp.sqrt(jnp.sqrt(squares)), 0)
    return u * root, row * jnp.where(positive, 1 / jnp.where(positive, root, 1), 0)


@jax.custom_jvp
def _leading_vector(a: Float[Array, "p q b"]) -> Float[Array, "p b"]:
    """Return a left singular vector of the largest singular value; its largest entry positive."""
    gram = _gram(a)
    trace = _trace(gram)
    safe = jnp.all((trace > _SAFE[0]) & (trace < _SAFE[1]))
    gram = lax.cond(safe, lambda a, g: g, lambda a, g: _gram(a / _largest(a)), a, gram)

    precision = jnp.finfo(gram.dtype)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, purity, count = state
        # The last squaring squares what is impure. Equal singular values stay mixed: any will do.
        impure = jnp.any(purity < 1 - jnp.sqrt(precision.eps))
        return (count <= precision.nmant) & impure

    def square(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        g, _, count = state
        product = add_up(g[:, i][:, None] * g[i][None] for i in range(g.shape[0]))
        purity = _trace(product)  # of trace 1 and one eigenvector: 1
        return product / purity, purity, count + 1

    trace = _trace(gram)
    zero = trace == 0
    start = jnp.where(zero, jnp.zeros_like(gram).at[0, 0].set(1), gram)
    start = start / jnp.where(zero, 1, trace)
    state = (start, jnp.zeros_like(trace), jnp.zeros((), jnp.int32))
    projector, _, _ = lax.while_loop(unfinished, square, state)
    diagonal = jnp.stack([projector[i, i] for i in range(a.shape[0])])
    best = jnp.argmax(diagonal, axis=0)
    column = jnp.take_along_axis(projector, best[None, None], axis=1)[:, 0]
    return column / jnp.sqrt(jnp.sum(column * column, axis=0, keepdims=True))


@_leading_vector.defjvp
def _leading_vector_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (a,), (da,) = primals, tangents
    u = _leading_vector(a)
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    scale = _largest(a)
    a, da = a / scale, da / scale
    basis = singular_basis(a.transpose(2, 0, 1))
    rows = product("bpr,pqb->brq", basis, a)
    change = product("bpr,pqb,sqb,sb->br", basis, da, a, u)
    change = change + product("brq,pqb,pb->br", rows, da, u)
    squares = jnp.sum(rows * rows, axis=2)
    gaps = squares[:, :1] - squares
    distinct = gaps != 0
    inverse = jnp.where(distinct, 1 / jnp.where(distinct, gaps, 1), 0)
    return u, product("bpr,br->pb", basis, inverse * change)


def _gram(a: Float[Array, "p q b"]) -> Float[Array, "p p b"]:
    """Return ``A A^T``: sums of some products written out, summed up in a loop."""
    p, q, b = a.shape
    chunk = min(_CHUNK, q)

    def some(rows: Array) -> Array:
        return add_up(rows[:, None, m] * rows[None, :, m] for m in range(rows.shape[1]))

    def add(total: Array, start: Array) -> tuple[Array, None]:
        return total + some(lax.dynamic_slice_in_dim(a, start, chunk, axis=1)), None

    whole = q - q % chunk
    total, _ = lax.scan(add, jnp.zeros((p, p, b), a.dtype), jnp.arange(0, whole, chunk))
    return total + some(a[:, whole:]) if whole < q else total


def _largest(a: Float[Array, "p q b"]) -> Float[Array, "1 1 b"]:
    """Return the largest entry of every matrix, 1 for zero matrices."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(a), axis=(0, 1), keepdims=True))
    return jnp.where(largest > 0, largest, 1)


def _trace(g: Float[Array, "p p b"]) -> Float[Array, "1 1 b"]:
    return add_up(g[i : i + 1, i : i + 1] for i in range(g.shape[0]))
