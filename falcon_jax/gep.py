"""The generalized elementwise product (GEP) and the convolution kernels built from it."""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from falcon_jax.settings import as_whole


def gep(d: Float[ArrayLike, "..."], p: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Multiply two tensors along one shared axis and keep every other axis.

    ``K[i1, ..., m, j1, ...] = d[i1, ..., m] * p[m, j1, ...]``

    Args:
        d: tensor of order p, shape ``(I1, ..., I(p-1), M)``.
        p: tensor of order q, shape ``(M, J1, ..., J(q-1))``.

    Returns:
        Tensor of order p + q - 1, shape ``(I1, ..., I(p-1), M, J1, ..., J(q-1))``.

    Raises:
        ValueError: if an operand is a scalar or the shared axes differ in length.

    Reference:
        FALCON, Section 3.2, Definitions 1 and 2.

    >>> gep(jnp.ones((3, 3, 4)), jnp.ones((4, 8))).shape
    (3, 3, 4, 8)
    """
    d, p = jnp.asarray(d), jnp.asarray(p)
    if d.ndim == 0 or p.ndim == 0 or d.shape[-1] != p.shape[0]:
        raise ValueError(
            f"gep multiplies along the last axis of d and the first axis of p, which must have "
            f"equal length; got shapes {d.shape} and {p.shape}. Transpose or reshape one of them."
        )
    (*rows, m), (_, *columns) = d.shape, p.shape
    d, p = d.reshape(math.prod(rows), m), p.reshape(m, math.prod(columns))
    product = jnp.einsum("im,mj->imj", d, p)
    return product.reshape(*rows, m, *columns)


def falcon_kernel(
    depthwise: Float[ArrayLike, "*kernel_size k n"], pointwise: Float[ArrayLike, "m k n"]
) -> Float[Array, "*kernel_size m n"]:
    """Build the standard kernel that a rank-k FALCON convolution applies.

    ``K[i, j, m, n] = sum_r depthwise[i, j, r, n] * pointwise[m, r, n]``

    Args:
        depthwise: shape ``(*kernel_size, k, N)``.
        pointwise: shape ``(M, k, N)``; M counts the input channels of one feature group.

    Returns:
        Kernel of shape ``(*kernel_size, M, N)``, the layout of ``flax`` convolutions.

    Raises:
        ValueError: if the shapes do not fit each other.

    Reference:
        FALCON, Theorem 1 (k = 1) and Definition 3.

    >>> falcon_kernel(jnp.ones((3, 3, 2, 8)), jnp.ones((4, 2, 8))).shape
    (3, 3, 4, 8)
    """
    depthwise, pointwise = jnp.asarray(depthwise), jnp.asarray(pointwise)
    if depthwise.ndim < 2 or pointwise.ndim != 3 or depthwise.shape[-2:] != pointwise.shape[1:]:
        raise ValueError(
            "falcon_kernel takes a depthwise kernel of shape (*kernel_size, k, N) and a pointwise "
            f"one of shape (M, k, N); got {depthwise.shape} and {pointwise.shape}."
        )
    return jnp.einsum("...rn,mrn->...mn", depthwise, pointwise)


def separable_kernel(
    depthwise: Float[ArrayLike, "*kernel_size m k"],
    pointwise: Float[ArrayLike, "m_group k n"],
    *,
    feature_group_count: int = 1,
) -> Float[Array, "*kernel_size m_group n"]:
    """Build the standard kernel that a depthwise-then-pointwise convolution applies.

    ``K[i, j, m, n] = sum_r depthwise[i, j, m, r] * pointwise[m, r, n]``

    Args:
        depthwise: shape ``(*kernel_size, M, k)``, M counting all input channels.
        pointwise: shape ``(M / groups, k, N)``.
        feature_group_count: number of groups that channels are split into.

    Returns:
        Kernel of shape ``(*kernel_size, M / groups, N)``.

    Raises:
        ValueError: if the shapes and groups do not fit each other.

    Reference:
        FALCON, Theorem 2.

    >>> separable_kernel(jnp.ones((3, 3, 4, 2)), jnp.ones((4, 2, 8))).shape
    (3, 3, 4, 8)
    """
    depthwise, pointwise = jnp.asarray(depthwise), jnp.asarray(pointwise)
    groups = as_whole(feature_group_count) or 0
    good = groups >= 1 and pointwise.ndim == 3 and depthwise.ndim >= 2
    if good:
        m_group, k, n = pointwise.shape
        good = n % groups == 0 and depthwise.shape[-2:] == (groups * m_group, k)
    if not good:
        raise ValueError(
            "separable_kernel takes a depthwise kernel of shape (*kernel_size, M, k) and a "
            "pointwise one of shape (M / groups, k, N), groups dividing M and N; got "
            f"{depthwise.shape} and {pointwise.shape} with {feature_group_count=}."
        )
    m_group, k, n = pointwise.shape
    d = depthwise.reshape(*depthwise.shape[:-2], groups, m_group, k)
    p = pointwise.reshape(m_group, k, groups, n // groups)
    kernel = jnp.einsum("...gmr,mrgn->...mgn", d, p)
    return kernel.reshape(*depthwise.shape[:-2], m_group, n)
