"""The text detector CRAFT: VGG16 with BatchNorm, and a decoder to maps of characters and links."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from flax import nnx
from jaxtyping import Array, Float, UInt8

from examples.ocr.weights import load_weights

MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)
# Index in the checkpoint and channels of the backbone's convolutions, slice by slice.
SLICES = (
    ((0, 64), (3, 64), (7, 128), (10, 128)),
    ((14, 256), (17, 256)),
    ((20, 256), (24, 512), (27, 512)),
    ((30, 512), (34, 512), (37, 512)),
)
POOLED = (7, 14, 24, 34)  # the convolutions that a pooling comes before
HEAD = ((0, 32), (2, 32), (4, 16), (6, 16), (8, 2))

CHARACTERS, LINKS, CERTAIN = 0.4, 0.4, 0.7
SMALLEST = 10  # points of a word, at half the resolution


class ConvNorm(nnx.Module):
    """A convolution and a BatchNorm."""

    def __init__(self, m: int, n: int, size: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(m, n, (size, size), rngs=rngs)
        self.norm = nnx.BatchNorm(n, use_running_average=True, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b h w n"]:
        """Return what the BatchNorm gives, before any ReLU."""
        return self.norm(self.conv(x))


class Merge(nnx.Module):
    """A 1x1 and a 3x3 convolution of two maps side by side."""

    def __init__(self, m: int, middle: int, n: int, *, rngs: nnx.Rngs):
        self.mix = ConvNorm(m, middle, 1, rngs=rngs)
        self.conv = ConvNorm(middle, n, 3, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w m1"], skip: Float[Array, "b h2 w2 m2"]
    ) -> Float[Array, "b h2 w2 n"]:
        """Return a map of the second one's size."""
        if x.shape[1:3] != skip.shape[1:3]:
            x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "bilinear")
        x = jnp.concatenate([x, skip], axis=-1)
        return nnx.relu(self.conv(nnx.relu(self.mix(x))))


class Detector(nnx.Module):
    """Scores of characters and of links between them, at half the resolution."""

    def __init__(self, *, rngs: nnx.Rngs):
        slices, m = [], 3
        for parts in SLICES:
            layers = []
            for _, n in parts:
                layers.append(ConvNorm(m, n, 3, rngs=rngs))
                m = n
            slices.append(nnx.List(layers))
        self.slices = nnx.List(slices)
        self.wide = nnx.Conv(512, 1024, (3, 3), kernel_dilation=6, rngs=rngs)
        self.mix = nnx.Conv(1024, 1024, (1, 1), rngs=rngs)
        self.merge1 = Merge(1536, 512, 256, rngs=rngs)
        self.merge2 = Merge(768, 256, 128, rngs=rngs)
        self.merge3 = Merge(384, 128, 64, rngs=rngs)
        self.merge4 = Merge(192, 64, 32, rngs=rngs)
        head, m = [], 32
        for index, n in HEAD:
            size = 3 if index < 6 else 1
            head.append(nnx.Conv(m, n, (size, size), rngs=rngs))
            m = n
        self.head = nnx.List(head)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h_half w_half 2"]:
        """Return the scores of images of a size that 16 divides, `normalized`."""
        skips = []
        for parts, layers in zip(SLICES, self.slices, strict=True):
            for place, ((index, _), layer) in enumerate(zip(parts, layers, strict=True)):
                if place > 0:
                    x = nnx.relu(x)
                if index in POOLED:
                    x = nnx.max_pool(x, (2, 2), strides=(2, 2))
                x = layer(x)
            # The authors rectify in place: the decoder sees the first three behind the ReLU.
            x = x if len(skips) == 3 else nnx.relu(x)
            skips.append(x)
        x = nnx.max_pool(skips[3], (3, 3), strides=(1, 1), padding="SAME")
        x = self.mix(self.wide(x))
        for merge, skip in zip(
            (self.merge1, self.merge2, self.merge3, self.merge4), skips[::-1], strict=True
        ):
            x = merge(x, skip)
        for layer in self.head[:-1]:
            x = nnx.relu(layer(x))
        return self.head[-1](x)


def load_detector() -> Detector:
    """Return the detector with its trained weights."""
    arrays = load_weights("craft_mlt_25k.pth")
    model = Detector(rngs=nnx.Rngs(0))
    for number, (parts, layers) in enumerate(zip(SLICES, model.slices, strict=True), start=1):
        for (index, _), layer in zip(parts, layers, strict=True):
            base = f"basenet.slice{number}"
            _set_pair(layer, arrays, f"{base}.{index}", f"{base}.{index + 1}")
    _set_conv(model.wide, arrays, "basenet.slice5.1")
    _set_conv(model.mix, arrays, "basenet.slice5.2")
    merges = (model.merge1, model.merge2, model.merge3, model.merge4)
    for number, merge in enumerate(merges, start=1):
        name = f"upconv{number}.conv"
        _set_pair(merge.mix, arrays, f"{name}.0", f"{name}.1")
        _set_pair(merge.conv, arrays, f"{name}.3", f"{name}.4")
    for (index, _), layer in zip(HEAD, model.head, strict=True):
        _set_conv(layer, arrays, f"conv_cls.{index}")
    return model


def _set_conv(conv: nnx.Conv, arrays: dict[str, np.ndarray], name: str) -> None:
    conv.kernel[...] = jnp.asarray(arrays[f"{name}.weight"].transpose(2, 3, 1, 0))
    assert conv.bias is not None
    conv.bias[...] = jnp.asarray(arrays[f"{name}.bias"])


def _set_pair(pair: ConvNorm, arrays: dict[str, np.ndarray], conv: str, norm: str) -> None:
    _set_conv(pair.conv, arrays, conv)
    assert pair.norm.scale is not None and pair.norm.bias is not None
    pair.norm.scale[...] = jnp.asarray(arrays[f"{norm}.weight"])
    pair.norm.bias[...] = jnp.asarray(arrays[f"{norm}.bias"])
    pair.norm.mean[...] = jnp.asarray(arrays[f"{norm}.running_mean"])
    pair.norm.var[...] = jnp.asarray(arrays[f"{norm}.running_var"])


def normalized(pages: UInt8[np.ndarray, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Return images of bytes as the detector takes them."""
    scaled = (pages.astype(np.float32) / 255 - MEAN) / STD
    return jnp.asarray(scaled, jnp.float32)


def find_boxes(scores: Float[np.ndarray, "h w 2"]) -> Float[np.ndarray, "words 4"]:
    """Return the boxes (left, top, right, bottom) of words, in points of the image.

    A word is a connected part of the map where characters or links are likely, with a certain
    character in it; its box is that of the part, grown by what the threshold cut off.
    """
    characters, links = scores[..., 0], scores[..., 1]
    parts, _ = scipy.ndimage.label((characters > CHARACTERS) | (links > LINKS))  # type: ignore[misc]
    boxes = []
    for number, place in enumerate(scipy.ndimage.find_objects(parts), start=1):
        part = parts[place] == number
        if part.sum() < SMALLEST or characters[place][part].max() < CERTAIN:
            continue
        part = part & ~((links[place] > LINKS) & (characters[place] < CHARACTERS))
        rows, columns = np.nonzero(part)
        top, left = rows.min() + place[0].start, columns.min() + place[1].start
        bottom, right = rows.max() + place[0].start + 1, columns.max() + place[1].start + 1
        tall, wide = bottom - top, right - left
        grown = np.sqrt(part.sum() * min(tall, wide) / (tall * wide))
        boxes.append(
            (2 * (left - grown), 2 * (top - grown), 2 * (right + grown), 2 * (bottom + grown))
        )
    return np.asarray(boxes, np.float64).reshape(-1, 4)


def overlaps(
    found: Float[np.ndarray, "words 4"], truth: Float[np.ndarray, "true_words 4"]
) -> Float[np.ndarray, "words true_words"]:
    """Return the intersection over the union of every pair of boxes."""
    left, top = (np.maximum(found[:, None, i], truth[None, :, i]) for i in (0, 1))
    right, bottom = (np.minimum(found[:, None, i], truth[None, :, i]) for i in (2, 3))
    shared = np.maximum(right - left, 0) * np.maximum(bottom - top, 0)
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (found, truth)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 0)


def match_counts(
    found: Float[np.ndarray, "words 4"],
    truth: Float[np.ndarray, "true_words 4"],
    least: float = 0.5,
) -> tuple[int, int, int]:
    """Return how many boxes are right (intersection over union), were found, and are true."""
    overlap = overlaps(found, truth)
    right_ones = 0
    while overlap.size and overlap.max() >= least:
        i, j = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[i], overlap[:, j] = 0, 0
        right_ones += 1
    return right_ones, len(found), len(truth)
