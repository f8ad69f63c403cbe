"""Channels counted, split and shuffled."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def channel_shuffle(x: Float[Array, "*batch c"], groups: int) -> Float[Array, "*batch c"]:
    """Deal channels out so that those of every group end up in all groups.

    ``y[..., i g + j] = x[..., j C / g + i]``

    Args:
        x: input with C channels last.
        groups: number g of groups that the channels lie in; it divides C.

    Returns:
        Output of the same shape.

    Raises:
        ValueError: if the groups do not divide the channels.

    Reference:
        ShuffleNet (Zhang et al., 2018), Section 3.1.

    >>> channel_shuffle(jnp.arange(6.0), 2)
    Array([0., 3., 1., 4., 2., 5.], dtype=float32)
    """
    channels = x.shape[-1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels.")
    grouped = x.reshape(*x.shape[:-1], groups, channels // groups)
    return jnp.swapaxes(grouped, -1, -2).reshape(x.shape)


def scaled(features: int, width: float | int) -> int:
    """Return the channels that a width multiplier leaves, rounded down.

    ``int(width * features)``

    Args:
        features: channels at width 1.
        width: the multiplier alpha.

    Returns:
        At least 1.

    Raises:
        ValueError: if the multiplier is not positive or no channel is left.

    Reference:
        MobileNet (Howard et al., 2017), Section 3.3.

    >>> scaled(64, 1.75)
    112
    """
    if not width > 0 or int(width * features) < 1:
        raise ValueError(
            f"width={width!r} leaves no channel of {features}; give a number of at least "
            f"1 / {features}."
        )
    return int(width * features)
