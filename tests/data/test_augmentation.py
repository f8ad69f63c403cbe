import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from falcon_jax.data.augmentation import (
    Augmentation,
    augment,
    crop,
    normalize,
    random_crop,
    random_flip,
)


def random_images(*shape):
    return np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "padding"), [((9, 8, 6, 3), 2), ((25, 5, 5, 1), 4), ((3, 4, 4, 2), 0)]
)
def test_crop_matches_numpy(shape, padding):
    images = random_images(*shape)
    n, h, w, _ = shape
    offsets = np.random.default_rng(1).integers(0, 2 * padding + 1, (n, 2))
    padded = np.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    expected = np.stack(
        [image[y : y + h, x : x + w] for image, (y, x) in zip(padded, offsets, strict=True)]
    )
    ours = crop(jnp.asarray(images), jnp.asarray(offsets, jnp.int32), padding)
    np.testing.assert_array_equal(ours, expected)


def offsets_of(image, cropped, padding):
    h, w = image.shape[:2]
    padded = np.pad(image, [(padding, padding), (padding, padding), (0, 0)])
    return [
        (y, x)
        for y in range(2 * padding + 1)
        for x in range(2 * padding + 1)
        if (padded[y : y + h, x : x + w] == cropped).all()
    ]


def test_random_crop_takes_every_offset_about_equally_often():
    image = random_images(1, 6, 6, 1)[0]
    images = jnp.asarray(np.broadcast_to(image, (1800, 6, 6, 1)))
    crops = np.asarray(random_crop(jax.random.key(0), images, 1))
    counts = np.zeros((3, 3))
    for cropped in crops:
        [offset] = offsets_of(image, cropped, 1)
        counts[offset] += 1
    # 1,800 draws over nine offsets: 200 expected, standard deviation 13.3.
    assert counts.min() > 200 - 5 * 13.3
    assert counts.max() < 200 + 5 * 13.3


def test_random_flip_mirrors_about_half_left_to_right():
    images = random_images(1000, 2, 3, 1)
    flipped = np.asarray(random_flip(jax.random.key(1), jnp.asarray(images)))
    same = (flipped == images).all(axis=(1, 2, 3))
    mirrored = (flipped == np.flip(images, axis=2)).all(axis=(1, 2, 3))
    assert (same | mirrored).all()
    assert 400 < mirrored.sum() < 600


def test_augment_under_jit_equals_augment():
    images = jnp.asarray(random_images(16, 8, 8, 3))
    settings = Augmentation(crop_padding=2, flip=True)
    jitted = jax.jit(augment, static_argnums=2)
    key = jax.random.key(4)
    ours = jitted(key, images, settings)
    np.testing.assert_array_equal(ours, augment(key, images, settings))
    assert ours.dtype == jnp.uint8
    assert (ours != jitted(jax.random.key(5), images, settings)).any()


def test_augment_crops_and_flips():
    image = random_images(1, 5, 5, 1)[0]
    images = jnp.asarray(np.broadcast_to(image, (200, 5, 5, 1)))
    found = set()
    for varied in np.asarray(
        augment(jax.random.key(0), images, Augmentation(crop_padding=1, flip=True))
    ):
        plain = offsets_of(image, varied, 1)
        mirrored = offsets_of(image, varied[:, ::-1], 1)
        assert len(plain) + len(mirrored) == 1
        found.add((bool(mirrored), *(plain or mirrored)[0]))
    assert len(found) == 18


def test_no_augmentation_changes_nothing():
    images = jnp.asarray(random_images(3, 4, 4, 1))
    np.testing.assert_array_equal(augment(jax.random.key(0), images, Augmentation()), images)


def test_augment_stays_on_its_device_when_the_batch_is_sharded():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    images = random_images(32, 8, 8, 3)
    settings = Augmentation(crop_padding=2, flip=True)
    key = jax.random.key(3)
    jitted = jax.jit(augment, static_argnums=2, out_shardings=split)
    sharded = jax.device_put(images, split)
    np.testing.assert_array_equal(
        jitted(key, sharded, settings), augment(key, jnp.asarray(images), settings)
    )
    program = jitted.lower(key, sharded, settings).compile().as_text()
    assert "all-gather" not in program
    assert "all-reduce" not in program


def test_normalize_matches_float64():
    images = random_images(4, 3, 2, 3)
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    expected = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    ours = normalize(jnp.asarray(images), mean, std)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_normalize_to_bfloat16_rounds_once():
    images = jnp.asarray(random_images(4, 3, 2, 1))
    ours = normalize(images, (0.3,), (0.2,), jnp.bfloat16)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, normalize(images, (0.3,), (0.2,)).astype(jnp.bfloat16))


def test_refusals():
    with pytest.raises(ValueError, match="crop_padding must be 0 or more, but is -1"):
        Augmentation(crop_padding=-1)
    with pytest.raises(ValueError, match="each of 3 channels, but have 1 and 3"):
        normalize(jnp.asarray(random_images(1, 2, 2, 3)), (0.5,), (0.5, 0.5, 0.5))
