"""What every kind of split gives to batching: some of its rows, and which could not be read."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32, UInt8


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
