import io
import struct

import numpy as np
import pytest
from PIL import Image

from falcon_jax.data.decoding import (
    AREA,
    DRAWS,
    RATIO,
    Crop,
    decode_rgb,
    evaluation_image,
    header_problem,
    random_crop,
    resized_crop,
    training_image,
)

SIZES = [(300, 400), (400, 300), (257, 256), (256, 900), (90, 61), (500, 375), (256, 256)]


@pytest.fixture(scope="module")
def transforms(torchvision):
    from torchvision import transforms

    return transforms


def image_of(height, width, mode="RGB"):
    random = np.random.default_rng(height * width)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    pixels = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def as_torchvision_loads(data):
    with io.BytesIO(data) as stream:
        return Image.open(stream).convert("RGB")


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "jpeg", {"quality": 80}),
        ("L", "jpeg", {}),
        ("CMYK", "jpeg", {}),
        ("RGBA", "png", {}),
        ("LA", "png", {}),
        ("P", "png", {}),
        ("1", "png", {}),
        ("P", "gif", {}),
        ("RGB", "webp", {"quality": 80}),
        ("RGB", "bmp", {}),
        ("RGB", "tiff", {}),
        ("RGB", "ppm", {}),
    ],
)
def test_every_mode_becomes_the_rgb_of_torchvisions_loader(mode, kind, options):
    data = encoded(image_of(45, 67, mode), kind, **options)
    assert header_problem(data) is None
    image = decode_rgb(data)
    assert (image.mode, image.size) == ("RGB", (67, 45))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(as_torchvision_loads(data)))


def test_transparent_palette_has_the_same_colours_without_a_warning():
    data = encoded(image_of(20, 30, "P"), "png", transparency=bytes(range(256)))
    with pytest.warns(UserWarning, match="Transparency"):
        expected = np.asarray(as_torchvision_loads(data))
    np.testing.assert_array_equal(np.asarray(decode_rgb(data)), expected)


RAMP = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)


def plain_pgm(highest):
    values = " ".join(str(round(x / 65535 * highest)) for x in RAMP.ravel().tolist())
    return f"P2 20 20 {highest}\n{values}".encode()


def tiff_of_12_bits():
    """Two values in three bytes, as TIFF packs them; PIL reads but does not write such files."""
    pairs = (RAMP >> 4).reshape(-1, 2).astype(int)
    packed = np.stack(
        [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1
    )
    tags = {256: 20, 257: 20, 258: 12, 259: 1, 262: 1, 273: 128, 277: 1, 278: 20, 279: 600}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries
    return header.ljust(128, b"\0") + packed.astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encoded(Image.fromarray(RAMP), "png"), id="png"),
        pytest.param(encoded(Image.fromarray(RAMP), "tiff"), id="tiff"),
        pytest.param(encoded(Image.fromarray(RAMP.astype(">u2")), "tiff"), id="big-endian tiff"),
        pytest.param(
            encoded(Image.fromarray(65535 - RAMP), "tiff", tiffinfo={262: 0}), id="white is zero"
        ),
        pytest.param(tiff_of_12_bits(), id="12 bits"),
        pytest.param(encoded(Image.fromarray(RAMP.astype(np.int32)), "ppm"), id="pgm"),
        pytest.param(plain_pgm(4095), id="pgm to 4095"),
        pytest.param(encoded(Image.fromarray((RAMP / 65535).astype("f4")), "tiff"), id="floats"),
    ],
)
def test_grey_images_of_more_than_8_bits_are_scaled(data):
    assert header_problem(data) is None
    got = np.asarray(decode_rgb(data)).astype(float)
    assert got.shape == (20, 20, 3)
    assert np.abs(got - RAMP[..., None] / 65535 * 255).max() <= 1


def test_16_bits_are_scaled_as_torchvision_does(transforms):
    torch = pytest.importorskip("torch")
    from torchvision.transforms.v2 import functional

    expected = functional.to_dtype(torch.from_numpy(RAMP), torch.uint8, scale=True)
    got = decode_rgb(encoded(Image.fromarray(RAMP), "png"))
    np.testing.assert_array_equal(np.asarray(got)[..., 1], expected.numpy())


@pytest.mark.parametrize(
    ("values", "reason", "at_once"),
    [
        (
            RAMP.astype(np.int32),
            "signed or 32-bit samples, and nothing tells",
            True,
        ),
        (RAMP.astype(np.float32), "floats from 0 to 6.554e.04; floats must lie in", False),
        (np.full((9, 9), np.nan, np.float32), "floats from nan to nan", False),
    ],
)
def test_grey_images_of_an_unknown_range_are_refused(values, reason, at_once):
    data = encoded(Image.fromarray(values), "tiff")
    assert (header_problem(data) is not None) == at_once
    with pytest.raises(ValueError, match=reason):
        decode_rgb(data)


def test_signed_samples_are_refused():
    data = encoded(Image.fromarray(RAMP), "tiff", tiffinfo={339: 2})
    assert "signed or" in (header_problem(data) or "")
    with pytest.raises(ValueError, match="signed or"):
        decode_rgb(data)


@pytest.mark.parametrize("kind", ["gif", "png", "tiff", "webp"])
def test_of_several_images_the_first_is_taken(kind):
    first, second = (Image.new("RGB", (9, 8), colour) for colour in ("white", "black"))
    options = {"lossless": True} if kind == "webp" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert (np.asarray(decode_rgb(data)) == 255).all()


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode_rgb(encoded(image_of(40, 60), "jpeg", exif=exif)).size == (60, 40)


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_pixels_equal_torchvisions(transforms, size):
    image = decode_rgb(encoded(image_of(*size), "jpeg"))
    expected = transforms.CenterCrop(224)(transforms.Resize(256)(image))
    np.testing.assert_array_equal(evaluation_image(image, 224, 256), np.asarray(expected))


def test_evaluation_pixels_equal_torchvisions_at_odd_margins(transforms):
    image = image_of(301, 413)
    for size, shorter_side in [(31, 36), (32, 37), (64, 64), (75, 300)]:
        reference = transforms.Compose(
            [transforms.Resize(shorter_side), transforms.CenterCrop(size)]
        )
        np.testing.assert_array_equal(
            evaluation_image(image, size, shorter_side), np.asarray(reference(image))
        )


@pytest.mark.parametrize("size", SIZES)
def test_crops_resized_equal_torchvisions(transforms, size):
    image = image_of(*size)
    crops = [random_crop(*size, draws) for draws in np.random.default_rng(0).random((4, DRAWS))]
    for crop in [*crops, Crop(0, 0, *size), Crop(3, 5, 40, 31)]:
        expected = transforms.functional.resized_crop(
            image, crop.top, crop.left, crop.height, crop.width, [224, 224]
        )
        np.testing.assert_array_equal(resized_crop(image, crop, 224), np.asarray(expected))


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 5), (2000, 1400)])
def test_where_no_crop_fits_the_fallback_is_torchvisions(transforms, size):
    hopeless = np.zeros(DRAWS)
    hopeless[0:-3:2] = 1.0  # the whole area
    hopeless[1:-3:2] = 0.0 if size[1] > size[0] else 1.0  # in the wrong direction
    # A range of areas beyond the image leaves torchvision no other way either.
    expected = transforms.RandomResizedCrop.get_params(Image.new("RGB", size[::-1]), [9, 9], RATIO)
    crop = random_crop(*size, hopeless)
    assert (crop.top, crop.left, crop.height, crop.width) == expected


def test_crops_are_distributed_as_torchvisions(transforms):
    height, width, count = 375, 500, 4000
    image = Image.new("RGB", (width, height))
    pytest.importorskip("torch").manual_seed(0)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, AREA, RATIO) for _ in range(count)]
    )
    draws = np.random.default_rng(0).random((count, DRAWS))
    crops = [random_crop(height, width, row) for row in draws]
    ours = np.array([(c.top, c.left, c.height, c.width) for c in crops])

    def kinds(boxes):
        top, left, h, w = boxes.T
        return [h * w, w / h, top / (height - h + 1), left / (width - w + 1)]

    for one, other in zip(kinds(ours), kinds(theirs), strict=True):
        values = np.sort(np.concatenate([one, other]))
        distance = np.abs(
            np.searchsorted(np.sort(one), values, "right")
            - np.searchsorted(np.sort(other), values, "right")
        ).max()
        # Kolmogorov and Smirnov's two-sample bound at 0.1%
        assert distance / count < 1.95 * (2 / count) ** 0.5


def test_half_of_the_images_are_mirrored():
    image = image_of(50, 60)
    draws = np.random.default_rng(1).random(DRAWS)
    plain, mirrored = (
        training_image(image, 32, np.append(draws[:-1], last)) for last in (0.5, 0.499)
    )
    np.testing.assert_array_equal(plain[:, ::-1], mirrored)
    assert (plain != mirrored).any()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"no image at all", "it is none of JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "it is none of JPEG, PNG"),
        (encoded(image_of(40, 40), "png")[:20], "none of|truncated|Truncated"),
    ],
)
def test_what_is_no_image_is_told_from_its_first_bytes(tmp_path, data, reason):
    path = tmp_path / "file.jpg"
    path.write_bytes(data)
    for source in (data, path):
        problem = header_problem(source)
        assert problem is not None
        assert any(part in problem for part in reason.split("|"))
    with pytest.raises(ValueError, match=reason):
        decode_rgb(data)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_truncated_pixels_are_told(kind):
    data = encoded(image_of(100, 100), kind)
    with pytest.raises(ValueError):
        decode_rgb(data[: len(data) // 2])


def test_flipped_bytes_give_an_image_or_a_reason():
    random = np.random.default_rng(0)
    for kind in ("jpeg", "png", "gif", "bmp", "tiff"):
        data = np.frombuffer(encoded(image_of(32, 32), kind), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[random.integers(len(data))] ^= random.integers(1, 256)
            try:
                assert decode_rgb(damaged.tobytes()).mode == "RGB"
            except ValueError as error:
                assert str(error)


def test_images_of_more_pixels_than_pil_takes_are_told(monkeypatch):
    data = encoded(image_of(40, 50), "png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 999)
    assert "exceeds limit" in (header_problem(data) or "")
    with pytest.raises(ValueError, match="exceeds limit"):
        decode_rgb(data)


def test_a_thread_of_pixels_is_refused_before_it_takes_the_memory():
    with pytest.raises(ValueError, match="at 60000x1 pixels it is too long and thin"):
        evaluation_image(Image.new("RGB", (60000, 1)), 224, 256)


def test_draws_at_their_limits_stay_inside():
    for value in (0.0, np.nextafter(1.0, 0.0)):
        for height, width in [(7, 9), (500, 375)]:
            crop = random_crop(height, width, np.full(DRAWS, value))
            assert crop.top >= 0
            assert crop.left >= 0
            assert crop.top + crop.height <= height
            assert crop.left + crop.width <= width
