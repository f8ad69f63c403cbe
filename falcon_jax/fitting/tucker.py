"""Partial Tucker decomposition of convolution kernels: channels are compressed, taps are not."""

import functools

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
