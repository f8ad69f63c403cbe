import numpy as np
import pytest
from PIL import Image

from falcon_jax.data.decoding import resize_images


def random_images(n, h, w, c, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8)


def pillow(image, size):
    channels = [
        Image.fromarray(image[..., k]).resize((size, size), Image.Resampling.BILINEAR)
        for k in range(image.shape[-1])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(8, 8, 32), (28, 28, 40), (40, 24, 32), (33, 17, 5), (6, 6, 1)]
)
def test_bilinear_matches_pillow(height, width, size):
    images = random_images(3, height, width, 3)
    resized = resize_images(images, size, "bilinear")
    assert resized.shape == (3, size, size, 3)
    expected = np.stack([pillow(image, size) for image in images])
    # Pillow rounds to integers between its two passes.
    assert np.abs(resized.astype(int) - expected.astype(int)).max() <= 1


def test_bilinear_by_hand():
    images = np.array([[[[0], [100]], [[200], [40]]]], np.uint8)
    # Weights of the four outputs along one side: (1, 0), (3/4, 1/4), (1/4, 3/4), (0, 1).
    side = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    expected = np.rint(side @ images[0, :, :, 0].astype(float) @ side.T)
    np.testing.assert_array_equal(resize_images(images, 4, "bilinear")[0, :, :, 0], expected)


def test_bilinear_goes_over_more_than_one_chunk():
    images = random_images(1100, 2, 2, 1)
    whole = resize_images(images, 3, "bilinear")
    np.testing.assert_array_equal(whole[1050:], resize_images(images[1050:], 3, "bilinear"))


@pytest.mark.parametrize(
    ("height", "width", "size", "top", "left"), [(28, 28, 32, 2, 2), (3, 4, 6, 1, 1)]
)
def test_pad_puts_zeros_around(height, width, size, top, left):
    images = random_images(2, height, width, 1)
    padded = resize_images(images, size, "pad")
    assert padded.shape == (2, size, size, 1)
    inner = padded[:, top : top + height, left : left + width]
    np.testing.assert_array_equal(inner, images)
    assert padded.sum(dtype=int) == images.sum(dtype=int)


@pytest.mark.parametrize(
    ("height", "width", "size", "same_as"),
    [
        (28, 28, 32, "pad"),
        (24, 24, 32, "pad"),
        (23, 23, 32, "bilinear"),
        (36, 36, 32, "bilinear"),
        (34, 30, 32, "bilinear"),
        (20, 30, 32, "bilinear"),
        (30, 32, 32, "pad"),
        (32, 32, 32, "none"),
    ],
)
def test_auto_chooses(height, width, size, same_as):
    images = random_images(1, height, width, 1)
    np.testing.assert_array_equal(resize_images(images, size), resize_images(images, size, same_as))


def test_none_changes_nothing():
    images = random_images(1, 5, 7, 1)
    assert resize_images(images, 32, "none") is images


@pytest.mark.parametrize(
    ("size", "mode", "message"),
    [
        (32, "cubic", "'cubic'; known modes: auto, pad, bilinear, none"),
        (6, "pad", "8x8 pixels cannot be padded to 6x6"),
    ],
)
def test_refusals(size, mode, message):
    with pytest.raises(ValueError, match=message):
        resize_images(random_images(1, 8, 8, 1), size, mode)
