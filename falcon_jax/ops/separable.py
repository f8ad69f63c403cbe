"""Pointwise convolutions, and depthwise separable ones of rank k in both orders."""

import functools
import math
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from falcon_jax.ops.choice import is_canonical
from falcon_jax.ops.depthwise import depthwise_conv
from falcon_jax.ops.geometry import Padding, known, per_axis


def pointwise_conv(
    x: Float[Array, "*batch m"],
    kernel: Float[Array, "m_group n"],
    *,
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "*batch n"]:
    """Mix channels at every point.

    ``y[..., n] = sum_m x[..., m] * kernel[m, n]``, m running over the group that n belongs to.

    A product of two matrices is the fastest form on every backend: a 1x1 convolution takes 1.1 to
    2.4 times as long on CPUs, an einsum over the spatial axes more in the backward pass.

    Args:
        x: input with M channels last.
        kernel: shape ``(M / groups, N)``.
        feature_group_count: number of groups that channels are split into.
        precision: of the products on accelerators, as in ``jax.lax``.

    Returns:
        Output with N channels last.

    >>> kernel = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    >>> pointwise_conv(jnp.array([[1.0, 2.0], [3.0, 4.0]]), kernel).tolist()
    [[1.0, 2.0, 3.0], [3.0, 4.0, 7.0]]
    """
    m_group, n = kernel.shape
    groups = feature_group_count
    if is_canonical() and x.ndim > 2:
        axes = x.ndim - 2
        layout = (0, axes + 1, *range(1, axes + 1))
        return lax.conv_general_dilated(
            x,
            kernel.reshape(*(1,) * axes, m_group, n),
            (1,) * axes,
            "VALID",
            dimension_numbers=lax.ConvDimensionNumbers(
                layout, (axes + 1, axes, *range(axes)), layout
            ),
            feature_group_count=groups,
            precision=precision,
        )
    if not known(*x.shape):  # symbolic sizes cannot always be joined, nor need they be
        by_group = x.reshape(*x.shape[:-1], groups, m_group)
        y = jnp.einsum(
            "...gm,mgn->...gn",
            by_group,
            kernel.reshape(m_group, groups, n // groups),
            precision=precision,
        )
    elif groups == 1:
        rows = math.prod(x.shape[:-1])
        y = jnp.matmul(x.reshape(rows, m_group), kernel, precision=precision)
    else:
        y = jnp.einsum(
            "bgm,mgn->bgn",
            x.reshape(-1, groups, m_group),
            kernel.reshape(m_group, groups, n // groups),
            precision=precision,
        )
    return y.reshape(*x.shape[:-1], n)


def pointwise_then_depthwise(
    x: Float[Array, "b *spatial m"],
    depthwise: Float[Array, "*kernel_size k n"],
    pointwise: Float[Array, "m_group k n"],
    *,
    strides: tuple[int, ...],
    padding: Padding,
    input_dilation: tuple[int, ...],
    kernel_dilation: tuple[int, ...],
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    wide: bool = False,
) -> Float[Array, "b *spatial_out n"]:
    """Apply a rank-k FALCON convolution: matrix products, then one fused depthwise pass.

    ``y = sum_r depthwise_r * (x @ pointwise_r)``

    A matrix product for each term: one wide product for all of them makes the depthwise pass and
    its gradients read k arrays interleaved, and is 1.3 to 1.8 times slower in training on CPUs. It
    is faster for small batches of small maps.

    Args:
        x: input of shape ``(batch, *spatial, M)``.
        depthwise: shape ``(*kernel_size, k, N)``.
        pointwise: shape ``(M / groups, k, N)``.
        strides: step between outputs, per axis.
        padding: a name or explicit ``(low, high)`` pairs.
        input_dilation: distance between input points, per axis.
        kernel_dilation: distance between taps, per axis.
        feature_group_count: number of groups that channels are split into.
        precision: of the matrix product, as in ``jax.lax``.
        wide: whether all terms are one matrix product.

    Returns:
        Output of shape ``(batch, *spatial_out, N)``.

    Raises:
        ValueError: if the depthwise kernel has other channels than it gets, or there is no such
            padding.

    Reference:
        FALCON, Equations 6 and 7, Definition 3.

    >>> x, depthwise, pointwise = jnp.ones((1, 4, 2)), jnp.ones((3, 1, 1)), jnp.ones((2, 1, 1))
    >>> geometry = {"strides": (1,), "input_dilation": (1,), "kernel_dilation": (1,)}
    >>> y = pointwise_then_depthwise(x, depthwise, pointwise, padding="SAME", **geometry)
    >>> y.ravel().tolist()
    [4.0, 6.0, 6.0, 4.0]
    """
    mix = functools.partial(
        pointwise_conv, feature_group_count=feature_group_count, precision=precision
    )
    k, n = pointwise.shape[1:]
    if wide and feature_group_count == 1:
        mixed = jnp.split(mix(x, pointwise.reshape(-1, k * n)), k, axis=-1)
    else:
        mixed = [mix(x, pointwise[:, r]) for r in range(k)]
    terms = (
        depthwise_conv(
            z,
            depthwise[..., r, :],
            strides=strides,
            padding=padding,
            input_dilation=input_dilation,
            kernel_dilation=kernel_dilation,
        )
        for r, z in enumerate(mixed)
    )
    return functools.reduce(jnp.add, terms)


def depthwise_then_pointwise(
    x: Float[Array, "b *spatial m"],
    depthwise: Float[Array, "*kernel_size m k"],
    pointwise: Float[Array, "m_group k n"],
    *,
    strides: tuple[int, ...],
    padding: Padding,
    input_dilation: tuple[int, ...],
    kernel_dilation: tuple[int, ...],
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "b *spatial_out n"]:
    """Apply a depthwise convolution with k kernels per channel, then matrix products.

    ``y = sum_r (depthwise_r * x) @ pointwise_r``

    Args:
        x: input of shape ``(batch, *spatial, M)``.
        depthwise: shape ``(*kernel_size, M, k)``.
        pointwise: shape ``(M / groups, k, N)``.
        strides: step between outputs, per axis.
        padding: a name or explicit ``(low, high)`` pairs.
        input_dilation: distance between input points, per axis.
        kernel_dilation: distance between taps, per axis.
        feature_group_count: number of groups that channels are split into.
        precision: of the matrix product, as in ``jax.lax``.

    Returns:
        Output of shape ``(batch, *spatial_out, N)``.

    Raises:
        ValueError: if the depthwise kernel has other channels than it gets, or there is no such
            padding.

    Reference:
        FALCON, Equations 8 and 9.

    >>> x, depthwise, pointwise = jnp.ones((1, 4, 2)), jnp.ones((3, 2, 1)), jnp.ones((2, 1, 1))
    >>> geometry = {"strides": (1,), "input_dilation": (1,), "kernel_dilation": (1,)}
    >>> y = depthwise_then_pointwise(x, depthwise, pointwise, padding="SAME", **geometry)
    >>> y.ravel().tolist()
    [4.0, 6.0, 6.0, 4.0]
    """
    terms = (
        pointwise_conv(
            depthwise_conv(
                x,
                depthwise[..., r],
                strides=strides,
                padding=padding,
                input_dilation=input_dilation,
                kernel_dilation=kernel_dilation,
            ),
            pointwise[:, r],
            feature_group_count=feature_group_count,
            precision=precision,
        )
        for r in range(pointwise.shape[1])
    )
    return functools.reduce(jnp.add, terms)


def separable_conv(
    x: Float[ArrayLike, "*batch m"],
    depthwise: Float[ArrayLike, "*depthwise_shape"],
    pointwise: Float[ArrayLike, "*pointwise_shape"],
    *,
    first: Literal["pointwise", "depthwise"] = "pointwise",
    strides: tuple[int, ...] | int = 1,
    padding: Padding = "SAME",
    input_dilation: tuple[int, ...] | int = 1,
    kernel_dilation: tuple[int, ...] | int = 1,
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "*batch_out n"]:
    """Apply a depthwise separable convolution, in either order, of one or several terms.

    ``y = sum_r depthwise_r * (x @ pointwise_r)`` or ``y = sum_r (depthwise_r * x) @ pointwise_r``

    Args:
        x: input of shape ``(..., *spatial, M)``, any number of batch axes.
        depthwise: shape ``(*kernel_size, k, N)``, or ``(*kernel_size, M, k)`` if it comes first;
            without the axis k for one term.
        pointwise: shape ``(M / groups, k, N)``, or ``(M / groups, N)`` for one term.
        first: which step comes first. The depthwise one carries strides and dilations.
        strides: step between outputs, per axis or one for all.
        padding: a name or explicit ``(low, high)`` pairs, as in `depthwise_conv`.
        input_dilation: distance between input points.
        kernel_dilation: distance between taps.
        feature_group_count: number of groups that the pointwise step splits channels into.
        precision: of the matrix product, as in ``jax.lax``.

    Returns:
        Output of shape ``(..., *spatial_out, N)``.

    Raises:
        ValueError: if ``first`` is neither, or the shapes do not fit each other.

    Reference:
        FALCON, Sections 3.3 and 3.6.1, Definition 3.

    >>> separable_conv(jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 6)), jnp.ones((4, 6))).shape
    (2, 8, 8, 6)
    """
    if first not in ("pointwise", "depthwise"):
        raise ValueError(f"first is 'pointwise' or 'depthwise'; got {first!r}.")
    x, depthwise, pointwise = map(jnp.asarray, (x, depthwise, pointwise))
    if pointwise.ndim == 2:
        depthwise = jnp.expand_dims(depthwise, -2 if first == "pointwise" else -1)
        pointwise = pointwise[:, None, :]
    axes = depthwise.ndim - 2
    m = pointwise.shape[0] * feature_group_count
    k, n = pointwise.shape[1:]
    expected = (k, n) if first == "pointwise" else (m, k)
    if depthwise.shape[-2:] != expected or x.ndim <= axes or x.shape[-1] != m:
        raise ValueError(
            f"separable_conv, {first} first, with pointwise of shape {pointwise.shape} and "
            f"{feature_group_count} groups takes x of shape (..., *spatial, {m}) and depthwise of "
            f"shape (*kernel_size, {expected[0]}, {expected[1]}); got {x.shape} and "
            f"{depthwise.shape}."
        )
    batch = x.shape[: x.ndim - axes - 1]
    function = pointwise_then_depthwise if first == "pointwise" else depthwise_then_pointwise
    if len(batch) != 1:
        x = x.reshape(math.prod(batch), *x.shape[x.ndim - axes - 1 :])
    y = function(
        x,
        depthwise,
        pointwise,
        strides=per_axis("strides", strides, axes),
        padding=padding,
        input_dilation=per_axis("input_dilation", input_dilation, axes),
        kernel_dilation=per_axis("kernel_dilation", kernel_dilation, axes),
        feature_group_count=feature_group_count,
        precision=precision,
    )
    return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])
