"""Lines of cells as aligned text."""

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], *, right: Sequence[int]) -> str:
    """Return one line of text for each line of cells, two spaces between columns.

    Args:
        lines: equally many cells in each.
        right: the columns whose cells stand to the right; all others to the left.

    >>> print(aligned([("layer", "params"), ("conv", "9")], right=[1]))
    layer  params
    conv        9
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
