"""What a data source takes and what it gives."""

from __future__ import annotations

import dataclasses

from falcon_jax.data.dataset import AnySplit, check_splits
from falcon_jax.data.streamed import StreamSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a source may need to know; each source reads what concerns it.

    Args:
        name: name of the data set within the source, or "".
        data_dir: directory of the files, or "" for the source's own default.
        image_size: height and width of images that are made or streamed.
        seed: seed of images that are made rather than read.
        shorter_side: of streamed images, as StreamSettings has it.
        workers: likewise.
        skip_broken: likewise.
        interpolation: likewise.

    Raises:
        ValueError: if a number is out of range.
    """

    name: str = ""
    data_dir: str = ""
    image_size: int = 32
    seed: int = 0
    shorter_side: int = 0
    workers: int = 0
    skip_broken: bool = False
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        _ = self.stream
        if self.seed < 0:
            raise ValueError(f"the seed must be 0 or more, but is {self.seed}")

    @property
    def stream(self) -> StreamSettings:
        """How images are streamed."""
        return StreamSettings(
            image_size=self.image_size,
            shorter_side=self.shorter_side,
            workers=self.workers,
            skip_broken=self.skip_broken,
            interpolation=self.interpolation,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SourceSplits:
    """What a source gives: all splits in memory, before resizing, or all streamed.

    Args:
        name: what to call the data set in logs and reports.
        num_classes: number of classes.
        train: training split.
        test: test split.
        validation: the data set's own validation split, or None if it has none.

    Raises:
        ValueError: if image shapes differ between splits, or a label is out of range.
    """

    name: str
    num_classes: int
    train: AnySplit
    test: AnySplit
    validation: AnySplit | None = None

    def __post_init__(self) -> None:
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        check_splits(self.name, self.num_classes, splits)
