"""Random crops, flips and normalisation on the device, inside the jitted training step."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from falcon_jax.settings import at_least, check_fields, checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are varied.

    Attributes:
        crop_padding: zero pixels put around an image before a crop of its own size is taken at
            random; 0 for no crop.
        flip: whether to mirror half of the images left to right.

    Raises:
        ValueError: if crop_padding is negative.
    """

    crop_padding: int = checked(0, at_least(0))
    flip: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Which images of a batch are at hand, where a batch is shared by several replicas.

    Args:
        count: number of images in the whole batch.
        own_rows: takes the rows of the images at hand out of an array for the whole batch.
    """

    count: int
    own_rows: Callable[[Array], Array]


def augment(
    key: PRNGKeyArray,
    images: UInt8[Array, "batch h w c"],
    augmentation: Augmentation,
    part: Part | None = None,
) -> UInt8[Array, "batch h w c"]:
    """Crop and flip each image at random, as the augmentation says.

    Args:
        key: key of the whole batch.
        images: images, 0 to 255, (batch, h, w, c).
        augmentation: what to do.
        part: which part of the batch the images are; None if they are all of it. What happens to
            an image does not depend on it.

    Returns:
        the varied images, same shape.
    """
    crop_key, flip_key = jax.random.split(key)
    if augmentation.crop_padding:
        images = random_crop(crop_key, images, augmentation.crop_padding, part)
    if augmentation.flip:
        images = random_flip(flip_key, images, part)
    return images


def random_crop(
    key: PRNGKeyArray,
    images: UInt8[Array, "batch h w c"],
    padding: int,
    part: Part | None = None,
) -> UInt8[Array, "batch h w c"]:
    """Put zeros around each image and take a crop of the original size at random.

    Args:
        key: key of the whole batch.
        images: images, (batch, h, w, c).
        padding: zero pixels on each side.
        part: as for augment.

    Returns:
        the crops, same shape; each image has its own offset, uniform in [0, 2 * padding].
    """
    part = part or _all_of(images)
    offsets = jax.random.randint(key, (part.count, 2), 0, 2 * padding + 1)
    return crop(images, part.own_rows(offsets), padding)


def crop(
    images: UInt8[Array, "batch h w c"], offsets: Int[Array, "batch 2"], padding: int
) -> UInt8[Array, "batch h w c"]:
    """Put zeros around each image and take a crop of the original size at a given offset.

    Args:
        images: images, (batch, h, w, c).
        offsets: row and column of the upper left pixel in the padded image, in
            [0, 2 * padding], (batch, 2).
        padding: zero pixels on each side.

    Returns:
        the crops, same shape.
    """
    size = images.shape[1:]
    padded = jnp.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    # Slices under vmap: twice as fast on CPU as one gather by row and column indices.
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), size))(
        padded, offsets
    )


def random_flip(
    key: PRNGKeyArray, images: UInt8[Array, "batch h w c"], part: Part | None = None
) -> UInt8[Array, "batch h w c"]:
    """Mirror each image left to right with probability one half.

    Args:
        key: key of the whole batch.
        images: images, (batch, h, w, c).
        part: as for augment.

    Returns:
        the images, same shape.
    """
    part = part or _all_of(images)
    mirrored = jax.random.bernoulli(key, shape=(part.count, 1, 1, 1))
    return jnp.where(part.own_rows(mirrored), images[:, :, ::-1], images)


def _all_of(images: UInt8[Array, "batch h w c"]) -> Part:
    return Part(count=len(images), own_rows=lambda rows: rows)


def normalize(
    images: UInt8[Array, "batch h w c"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "batch h w c"]:
    """Normalise each channel: (images / 255 - mean) / std, computed in float32.

    Args:
        images: images, 0 to 255, (batch, h, w, c).
        mean: mean of each channel, in units of [0, 1].
        std: standard deviation of each channel, likewise.
        dtype: type of the result.

    Returns:
        the normalised images, same shape.

    Raises:
        ValueError: if mean or std has not one value a channel.
    """
    channels = images.shape[-1]
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"mean and std need one value for each of {channels} channels, but have {len(mean)} "
            f"and {len(std)}"
        )
    shift = jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, channels)
    scale = jnp.asarray(std, jnp.float32).reshape(1, 1, 1, channels)
    return ((images.astype(jnp.float32) / 255.0 - shift) / scale).astype(dtype)
