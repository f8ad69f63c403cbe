"""Splits too large for memory: images are read and decoded when a batch wants them."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8
from PIL import Image

from falcon_jax.data.decoding import (
    DRAWS,
    INTERPOLATIONS,
    decode_rgb,
    evaluation_image,
    training_image,
)
from falcon_jax.settings import at_least, check_fields, checked, one_of
from falcon_jax.wording import reason, some_of


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Some images of a split.

    Args:
        images: images, 0 to 255, (rows, h, w, c).
        index: position of each in the split, (rows,).
        readable: whether it is an image of the split, and not zeros for one that cannot be read.
        unreadable: position in the split, and the reason, of each image that could not be read.
    """

    images: UInt8[np.ndarray, "rows h w c"]
    index: Int32[np.ndarray, "rows"]
    readable: Bool[np.ndarray, "rows"]
    unreadable: dict[int, str] = dataclasses.field(default_factory=dict)


CENTRE_SHARE = 0.875  # of the shorter side, that the centre crop of an evaluation image covers
CHANNELS = 3

_log = logging.getLogger(__name__)


@runtime_checkable
class Records(Protocol):
    """Encoded images that can be read in any order, also by other processes (it is pickled)."""

    def read(self, position: int) -> bytes:
        """Return the content of an image file."""
        ...

    def name(self, position: int) -> str:
        """Return what to call an image in messages: a path, or where it lies in a file."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How images are read and what becomes of them.

    Attributes:
        image_size: height and width of the images that the network sees, pixels.
        shorter_side: height or width, whichever is smaller, to which a streamed image is resized
            before its centre is taken for evaluation, pixels; 0 for image_size / 0.875 (256 for
            224).
        workers: processes that read and decode streamed images; 0 for threads of this process.
        skip_broken: whether to leave out streamed images that cannot be read, instead of failing.
        interpolation: of streamed evaluation images, ``bilinear`` or ``bicubic``; random crops for
            training are always bilinear.

    Raises:
        ValueError: if a number is out of range, or there is no such interpolation.
    """

    image_size: int = checked(32, at_least(1))
    shorter_side: int = 0
    workers: int = checked(0, at_least(0))
    skip_broken: bool = False
    interpolation: str = checked("bilinear", one_of(INTERPOLATIONS))

    def __post_init__(self) -> None:
        check_fields(self)
        if self.shorter_side < 0 or 0 < self.shorter_side < self.image_size:
            raise ValueError(
                f"shorter_side must be 0 (for image_size / {CENTRE_SHARE}) or at least image_size "
                f"{self.image_size}, but is {self.shorter_side}"
            )

    @property
    def resized_side(self) -> int:
        """The shorter side of an evaluation image before its centre is taken, pixels."""
        return self.shorter_side or round(self.image_size / CENTRE_SHARE)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StreamedSplit:
    """One split of a data set whose images stay on the disk.

    Args:
        records: the encoded images.
        positions: of this split's images in records, (n,).
        labels: class of each image, from 0, (n,).
        settings: how images are read.
        skipped: name of each image that was found to be unreadable while reading, and the reason;
            it grows with skip_broken, and splits taken out of this one share it.

    Raises:
        ValueError: if there are no images, positions and labels differ in length, or a label is
            negative.
    """

    records: Records
    positions: Int[np.ndarray, "positions"]
    labels: Int32[np.ndarray, "n"]
    settings: StreamSettings
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.positions) != len(self.labels):
            raise ValueError(
                f"a split has {len(self.positions)} images but {len(self.labels)} labels"
            )
        if len(self) == 0:
            raise ValueError("a split must hold images, but has none")
        if self.labels.min() < 0:
            raise ValueError(f"labels must be 0 or more, but the smallest is {self.labels.min()}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"StreamedSplit({len(self)} images, {self.settings})"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the images that the network sees, (h, w, c)."""
        return (self.settings.image_size, self.settings.image_size, CHANNELS)

    def take(self, index: Int[np.ndarray, "m"]) -> "StreamedSplit":
        """Return a split of some of the images.

        Args:
            index: their positions in this split, (m,).

        Returns:
            the split, in the order of index.
        """
        return dataclasses.replace(self, positions=self.positions[index], labels=self.labels[index])

    def training_rows(
        self, order: Int32[np.ndarray, "n"], rows: range, *, seed: int, epoch: int
    ) -> Rows:
        """Read images of an epoch, each cropped and mirrored at random.

        The crop depends on nothing but (seed, epoch, position in the split). In place of an image
        that cannot be read stands the next one of the order that can.

        Args:
            order: positions of the epoch's images in the split, (n,).
            rows: which places of the order to read.
            seed: seed of the crops.
            epoch: number of the epoch.

        Returns:
            the images.
        """
        images = np.zeros((len(rows), *self.image_shape), np.uint8)
        index = order[rows.start : rows.stop].copy()
        readable = np.zeros(len(rows), bool)
        unreadable: dict[int, str] = {}
        for row, place in enumerate(rows):
            for after in range(len(order)):
                chosen = int(order[(place + after) % len(order)])
                if chosen in unreadable:
                    continue
                # Raw draws: NumPy keeps their stream fixed, but not that of a Generator's methods.
                draws = np.random.PCG64([seed, epoch, chosen]).random_raw(DRAWS)
                try:
                    image = training_image(
                        self._decode(chosen), self.settings.image_size, (draws >> 11) * 2.0**-53
                    )
                except ValueError as error:
                    unreadable[chosen] = str(error)
                    continue
                images[row], index[row], readable[row] = image, chosen, True
                break
        return Rows(images=images, index=index, readable=readable, unreadable=unreadable)

    def evaluation_rows(self, rows: range) -> Rows:
        """Read images in order, each resized and cut to its centre.

        Args:
            rows: positions in the split.

        Returns:
            the images; zeros where one cannot be read.
        """
        images = np.zeros((len(rows), *self.image_shape), np.uint8)
        readable = np.ones(len(rows), bool)
        unreadable: dict[int, str] = {}
        for row, position in enumerate(rows):
            try:
                images[row] = evaluation_image(
                    self._decode(position),
                    self.settings.image_size,
                    self.settings.resized_side,
                    self.settings.interpolation,
                )
            except ValueError as error:
                unreadable[position] = str(error)
                readable[row] = False
        index = np.asarray(rows, np.int32)
        return Rows(images=images, index=index, readable=readable, unreadable=unreadable)

    def note_unreadable(self, unreadable: Mapping[int, str]) -> None:
        """Count and log images that could not be read, or fail.

        Args:
            unreadable: position in the split, and the reason, of each.

        Raises:
            ValueError: naming the image, unless skip_broken is set; or if none is left.
        """
        for position, why in unreadable.items():
            name = self.records.name(int(self.positions[position]))
            if not self.settings.skip_broken:
                raise ValueError(
                    f"{name} cannot be read: {why}; mend or remove it, or set skip_broken=True"
                )
            if name not in self.skipped:
                self.skipped[name] = why
                _log.warning(
                    "%s cannot be read: %s; left out, %d so far", name, why, len(self.skipped)
                )
        if len(self.skipped) >= len(self) and all(
            self.records.name(position) in self.skipped for position in self.positions.tolist()
        ):
            raise ValueError(f"none of the {len(self)} images of a split can be read")

    def _decode(self, position: int) -> Image.Image:
        try:
            data = self.records.read(int(self.positions[position]))
        except Exception as error:  # the disk's errors, and whatever a damaged archive raises
            raise ValueError(reason(error)) from error
        return decode_rgb(data)


def leave_out_broken(
    split: StreamedSplit, problems: Mapping[int, str], where: str
) -> StreamedSplit:
    """Return a split without the images that a check found to be broken, or fail.

    Args:
        split: the split that was checked.
        problems: position in the split, and the reason, of each broken image.
        where: where the images lie, for messages.

    Returns:
        the split of the others; the broken ones are in its skipped, and logged.

    Raises:
        ValueError: naming some and counting all, unless skip_broken is set; or if none is left.
    """
    if not problems:
        return split
    named = {split.records.name(int(split.positions[i])): why for i, why in problems.items()}
    listed = some_of(f"{name} ({why})" for name, why in named.items())
    told = f"{len(named)} of {len(split)} images of {where} cannot be read: {listed}"
    if not split.settings.skip_broken or len(named) == len(split):
        raise ValueError(f"{told}; mend or remove them, or set skip_broken=True to leave them out")
    _log.warning("%s; left out", told)
    split.skipped.update(named)
    return split.take(np.setdiff1d(np.arange(len(split)), list(problems)))
