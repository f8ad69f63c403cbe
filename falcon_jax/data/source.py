"""What a data source takes and what it gives."""

from __future__ import annotations

import dataclasses

from falcon_jax.data.dataset import Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a source may need to know; each source reads what concerns it.

    Args:
        name: name of the data set within the source, or "".
        data_dir: directory of the files, or "" for the source's own default.
        image_size: height and width of images that are made rather than read.
        seed: seed of images that are made rather than read.

    Raises:
        ValueError: if image_size is not positive, or seed is negative.
    """

    name: str = ""
    data_dir: str = ""
    image_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be 1 or more, but is {self.image_size}")
        if self.seed < 0:
            raise ValueError(f"the seed must be 0 or more, but is {self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SourceSplits:
    """What a source gives: the splits as they are stored, before resizing and holding out.

    Args:
        name: what to call the data set in logs and reports.
        num_classes: number of classes.
        train: training split.
        test: test split.
        validation: the data set's own validation split, or None if it has none.
    """

    name: str
    num_classes: int
    train: Split
    test: Split
    validation: Split | None = None
