"""SSD: boxes of objects and their classes, found in one pass, and what is made of them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from falcon_jax.models.units import PAD_ONE, UnitFactory, plain_unit, pointwise, scaled
from falcon_jax.models.vgg import VGG16_STAGES, layers_in_a_row
from falcon_jax.ops.convolution import conv_on_small_maps, max_pool_2x2
from falcon_jax.ops.geometry import Size, known

# Boxes at every point of the six maps: two squares, and both rectangles of every aspect ratio.
_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
BOXES_PER_POINT: tuple[int, ...] = tuple(2 + 2 * len(ratios) for ratios in _RATIOS)
_SCALES = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)
_STEPS = (8, 16, 32, 64, 100, 300)

_SMALLEST = 268  # what leaves one point in the last map
_FULL = 1024
# Of every extra map: channels of its 1x1 convolution and of the 3x3 one, its stride and padding.
_EXTRA = ((256, 512, 2, 1), (128, 256, 2, 1), (128, 256, 1, 0), (128, 256, 1, 0))


class ChannelNorm(nnx.Module):
    """Every point's channels at length one, times a learned scale.

    ``y_c = gamma_c x_c / ||x||_2``

    Args:
        features: channels C.
        scale: what all of gamma starts with.
        dtype: of the result; norms are computed in float32.

    Reference:
        Liu, Rabinovich, Berg: ParseNet, 2015 (arXiv 1506.04579), Section 3.3.
    """

    def __init__(self, features: int, *, scale: float | int, dtype: Dtype | None = None):
        self.scale = nnx.Param(jnp.full(features, scale, jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalise the points of a batch of feature maps."""
        wide = x.astype(jnp.float32)
        squares = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
        y = wide * lax.rsqrt(jnp.maximum(squares, 1e-24)) * self.scale[...][None, None, None]
        return y.astype(self.dtype or x.dtype)


class SSD(nnx.Module):
    """SSD300 on VGG16: six maps of features, with classes and offsets of boxes at every point.

    torchvision's names and ours: ``backbone.features.0`` is ``features/0``, ``scale_weight`` is
    ``norm/scale``, ``backbone.extra.1.0`` is ``extra/1/0``, the first layers of the heads are
    ``classification/0`` and ``regression/0``; with units that are not convolution and ReLU in a
    row, ``features`` and ``extra/0`` have one entry for each.

    Args:
        num_classes: classes with the background, which is class 0.
        in_features: channels of the images.
        width: multiplier of all channels but those of the heads, rounded down.
        unit: factory of VGG's conv units.
        stem_unit: factory of the first unit; ``unit`` if not given.
        dtype: of the computation; parameters are float32.
        rngs: stream ``params``.

    Raises:
        ValueError: if ``width`` leaves no channels, or the units cannot be that wide.

    Reference:
        Liu et al.: SSD, 2016 (arXiv 1512.02325), Figure 2; the detector that Network Decoupling
        (arXiv 1808.05517) compresses.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_features: int = 3,
        width: float | int = 1,
        unit: UnitFactory = plain_unit,
        stem_unit: UnitFactory | None = None,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(_conv, dtype=dtype, rngs=rngs)
        narrow = functools.partial(pointwise, use_bias=True, dtype=dtype, rngs=rngs)
        layers: list[Callable[..., Array]] = []
        ends, factory, inputs = [], stem_unit or unit, in_features
        for number, stage in enumerate(VGG16_STAGES):
            if number:
                layers.append(_pool_with_rest if number == 3 else max_pool_2x2)
            for features in stage:
                outputs = scaled(features, width)
                made = factory(inputs, outputs, strides=1, activate=True, dtype=dtype, rngs=rngs)
                layers += layers_in_a_row(made)
                factory, inputs = unit, outputs
            ends.append(len(layers))
        full = scaled(_FULL, width)
        layers += [_pool_in_place, conv(inputs, full, padding=6, dilation=6), jax.nn.relu]
        layers += [narrow(full, full), jax.nn.relu]
        sources = [inputs, full]
        self.features = nnx.List(layers[: ends[3]])
        self.norm = ChannelNorm(inputs, scale=20, dtype=dtype)
        self.extra = nnx.List([nnx.List(layers[ends[3] :])])
        for between, outputs, strides, padding in _EXTRA:
            between, outputs = scaled(between, width), scaled(outputs, width)
            reduced = narrow(sources[-1], between)
            wide = conv(between, outputs, strides=strides, padding=padding)
            self.extra.append(nnx.List([reduced, jax.nn.relu, wide, jax.nn.relu]))
            sources.append(outputs)
        heads = list(zip(sources, BOXES_PER_POINT, strict=True))
        self.classification = nnx.List([conv(m, n * num_classes, padding=1) for m, n in heads])
        self.regression = nnx.List([conv(m, n * 4, padding=1) for m, n in heads])

    def __call__(
        self, x: Float[Array, "b h w m"]
    ) -> tuple[Float[Array, "b boxes classes"], Float[Array, "b boxes 4"]]:
        """Return what the heads give for a batch of images.

        Args:
            x: images; torchvision's weights want pixels of 0 to 255 less (123, 117, 104).

        Returns:
            Float32 logits of the classes of every default box, and its offsets as `decode_boxes`
            takes them: 8732 boxes for 300x300 pixels, in the order of `default_boxes`.

        Raises:
            ValueError: if the images are too small for the last map, or their sizes are symbolic.
        """
        _require_points(x.shape[1:3])
        for layer in self.features:
            x = layer(x)
        maps = [self.norm(x)]
        for block in self.extra:
            for layer in block:
                x = layer(x)
            maps.append(x)
        return _of_all_maps(self.classification, maps), _of_all_maps(self.regression, maps)


def ssd300_vgg16(*, num_classes: int = 91, rngs: nnx.Rngs, **options) -> SSD:
    """Return SSD300 on VGG16 with the 91 classes of COCO.

    Args:
        num_classes: classes with the background, which is class 0.
        rngs: stream ``params``.
        **options: others of `SSD`: ``in_features``, ``width``, ``unit``, ``stem_unit`` and
            ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 300, 300, 3)`` to logits and
        offsets of 8732 boxes, as `SSD` gives them.

    Raises:
        ValueError: as `SSD` does.
    """
    return SSD(num_classes=num_classes, rngs=rngs, **options)


def _conv(
    m: int,
    n: int,
    *,
    strides: int = 1,
    padding: int = 0,
    dilation: int = 1,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    return nnx.Conv(
        m,
        n,
        (3, 3),
        strides,
        padding=((padding, padding),) * 2,
        kernel_dilation=dilation,
        dtype=dtype,
        conv_general_dilated=conv_on_small_maps,
        kernel_init=nnx.initializers.xavier_uniform(),
        rngs=rngs,
    )


def _pool_with_rest(x: Float[Array, "b h w c"]) -> Float[Array, "b h_half w_half c"]:
    return max_pool_2x2(x, ceil_mode=True)


def _pool_in_place(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return nnx.max_pool(x, (3, 3), (1, 1), PAD_ONE)  # type: ignore[arg-type]


def _of_all_maps(
    heads: Sequence[nnx.Conv], maps: Sequence[Float[Array, "b _h _w _c"]]
) -> Float[Array, "b boxes values"]:
    """Return what the convolutions of a head give, box by box."""
    given = [
        head(x).reshape(x.shape[0], -1, head.out_features // boxes)
        for head, x, boxes in zip(heads, maps, BOXES_PER_POINT, strict=True)
    ]
    return jnp.concatenate(given, axis=1).astype(jnp.float32)


def _require_points(sides: Sequence[Size]) -> None:
    if not known(*sides):
        # Nine roundings one after another: JAX reasons about them for minutes.
        raise ValueError(
            "SSD is for images of one size, as its boxes are; trace it with numbers for height "
            "and width."
        )
    if min(sides) < _SMALLEST:
        raise ValueError(
            f"SSD finds boxes in images of at least {_SMALLEST}x{_SMALLEST} pixels, 300x300 as a "
            f"rule; got {sides[0]}x{sides[1]}. Resize them."
        )


def default_boxes(height: int = 300, width: int = 300) -> Float[Array, "boxes 4"]:
    """Return the boxes that the offsets of `SSD` are of.

    At every point of map k there are two squares, of sides ``s_k`` and ``sqrt(s_k s_(k+1))``, and
    for every aspect ratio a two rectangles, ``s_k sqrt(a)`` by ``s_k / sqrt(a)`` and upright.

    Args:
        height: of the images, in pixels.
        width: likewise.

    Returns:
        Centres x and y, widths and heights, in shares of the image: 8732 boxes for 300x300 pixels,
        map by map, row by row, point by point.

    Raises:
        ValueError: if the images are too small for the last map.

    Reference:
        SSD, Section 2.2; sizes and steps are those of torchvision's ``ssd300_vgg16``.

    >>> default_boxes().shape
    (8732, 4)
    """
    _require_points((height, width))
    found = []
    for k, (rows, columns) in enumerate(zip(_map_sides(height), _map_sides(width), strict=True)):
        side, next_side = _SCALES[k : k + 2]
        sizes = [(side, side), (math.sqrt(side * next_side),) * 2]
        for ratio in _RATIOS[k]:
            long, short = side * math.sqrt(ratio), side / math.sqrt(ratio)
            sizes += [(long, short), (short, long)]
        boxes = np.empty((rows, columns, len(sizes), 4))
        boxes[..., 0] = ((np.arange(columns) + 0.5) * _STEPS[k] / width)[None, :, None]
        boxes[..., 1] = ((np.arange(rows) + 0.5) * _STEPS[k] / height)[:, None, None]
        boxes[..., 2:] = np.clip(sizes, 0, 1)
        found.append(boxes.reshape(-1, 4))
    return jnp.asarray(np.concatenate(found), jnp.float32)


def _map_sides(side: int) -> list[int]:
    """Return how many points the maps have along a side of the image."""
    first = -(-(side // 4) // 2)
    sides = [first, first // 2]
    for *_, strides, padding in _EXTRA:
        sides.append((sides[-1] + 2 * padding - 3) // strides + 1)
    return sides


_CENTRE, _SIDE = 10.0, 5.0  # what offsets are multiplied by
_LONGEST = math.log(1000 / 16)


def decode_boxes(
    offsets: Float[Array, "*batch boxes 4"], boxes: Float[Array, "boxes 4"]
) -> Float[Array, "*batch boxes 4"]:
    """Return the corners of the boxes that offsets lead to.

    ``x = x_0 + w_0 t_x / 10``, ``w = w_0 exp(t_w / 5)``, likewise y and h.

    Args:
        offsets: t, as `SSD` gives them.
        boxes: where they start, centres and sides, as `default_boxes` gives them.

    Returns:
        Left, top, right and bottom, in shares of the image; some lie outside of it. A side grows
        at most 62.5 times.

    Reference:
        SSD, Equation 2, with variances 0.1 and 0.2.

    >>> boxes = jnp.array([[0.5, 0.5, 0.5, 0.25]])
    >>> decode_boxes(jnp.array([[2.5, 0.0, 0.0, 0.0]]), boxes).tolist()
    [[0.375, 0.375, 0.875, 0.625]]
    """
    start = boxes.reshape((1,) * (offsets.ndim - 2) + boxes.shape)
    centres = start[..., :2] + start[..., 2:] * offsets[..., :2] / _CENTRE
    sides = start[..., 2:] * jnp.exp(jnp.minimum(offsets[..., 2:] / _SIDE, _LONGEST))
    return jnp.concatenate([centres - sides / 2, centres + sides / 2], axis=-1)


class Detections(NamedTuple):
    """Objects found, the surest first; what is left over of the fixed number is zero.

    Attributes:
        boxes: left, top, right and bottom, in shares of the image.
        scores: probabilities of the classes; 0 where there is no object.
        labels: classes; 0, the background, where there is no object.
    """

    boxes: Float[Array, "b limit 4"]
    scores: Float[Array, "b limit"]
    labels: Int[Array, "b limit"]


def detect(
    logits: Float[Array, "b boxes classes"],
    offsets: Float[Array, "b boxes 4"],
    boxes: Float[Array, "boxes 4"],
    *,
    least_score: float | int = 0.01,
    overlap: float | int = 0.45,
    candidates: int = 400,
    limit: int = 200,
) -> Detections:
    """Return the objects in images: of boxes of a class that overlap, only the surest.

    Non-maximum suppression class by class, of fixed sizes, so that ``jax.jit`` takes it.

    Args:
        logits: of the classes, as `SSD` gives them.
        offsets: of the boxes, likewise.
        boxes: `default_boxes` of the images.
        least_score: what a probability must be above.
        overlap: intersection over union above which a box gives way to a surer one.
        candidates: boxes of a class that are looked at.
        limit: objects per image.

    Returns:
        As many per image as ``limit``, at the most.

    Reference:
        SSD, Section 2.2; thresholds and numbers are those of torchvision's ``ssd300_vgg16``.

    >>> boxes = jnp.array([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.25]])
    >>> logits = jnp.array([[[0.0, 4.0], [0.0, 3.0]]])  # two boxes of one object
    >>> found = detect(logits, jnp.zeros((1, 2, 4)), boxes)
    >>> found.labels.tolist(), found.boxes[0, 0].tolist()
    ([[1, 0]], [0.25, 0.25, 0.75, 0.75])
    """
    candidates = min(candidates, boxes.shape[0])

    def in_image(pair: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        one, moved = pair
        corners = jnp.clip(decode_boxes(moved, boxes), 0, 1)
        objects = jax.nn.softmax(one)[:, 1:].T
        scores, places = lax.top_k(jnp.where(objects > least_score, objects, 0), candidates)
        chosen = corners[places]
        stays = jax.vmap(functools.partial(_not_covered, overlap=overlap))(chosen, scores > 0)
        flat = jnp.where(stays, scores, 0).reshape(-1)
        best, order = lax.top_k(flat, min(limit, flat.shape[0]))
        found = best > 0
        return (
            jnp.where(found[:, None], chosen.reshape(-1, 4)[order], 0),
            best,
            jnp.where(found, order // candidates + 1, 0),
        )

    # One after the other: the overlaps of all pairs in one image are 60 MB.
    return Detections(*lax.map(in_image, (logits, offsets)))


def _not_covered(
    boxes: Float[Array, "n 4"], present: Bool[Array, "n"], *, overlap: float | int
) -> Bool[Array, "n"]:
    """Say which boxes, the surest first, no box that stays overlaps."""
    low = jnp.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = jnp.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    areas = jnp.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
    union = areas[:, None] + areas[None] - common
    later = jnp.arange(len(boxes))
    covers = (common > overlap * union) & (later[:, None] < later[None])

    def step(i: Array, stays: Array) -> Array:
        return stays & ~(covers[i] & stays[i])

    return lax.fori_loop(0, len(boxes), step, present)
