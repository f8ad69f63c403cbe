"""Read text on a CPU, several times faster: two trained networks shrunk without labels.

    python -m examples.ocr.read [--image=PAGE.png] [--out=runs/ocr] [--quick]

A detector (CRAFT) finds the words of a page, a recognizer reads them. Both are shrunk on rendered
pages and words without labels, once; OUT keeps them. Then a page is read by the original and by the
shrunk networks: words, accuracy and milliseconds are printed, and OUT/page.png shows the boxes and
words before and after. The page is rendered in fonts that nothing was shrunk on, or yours.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

import falcon_jax.native
from examples.ocr.comparison import page_picture
from examples.ocr.pages import render_sheets
from examples.ocr.reading import LONGEST, Networks, Reading, read_page, right_words
from examples.ocr.shrinking import all_deployed, originals, shrunk
from falcon_jax.data.decoding import decode_rgb, header_problem
from falcon_jax.paths import user_path, write_whole
from falcon_jax.report.table import Column, format_ratio, table_of
from falcon_jax.terminal import Printable, Table, show, show_error
from falcon_jax.wording import reason, shown

BAD_INPUT = 2
SEED = 11  # of the page
REPEATS = 5
STAGES = ("detector", "boxes", "recognizer")

Boxes = Float[np.ndarray, "true_words 4"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Read a page by the original and by the shrunk networks, and compare.

    Args:
        arguments: what follows the program's name, by default what the shell gave.

    Returns:
        the exit status: 0, or 2 after bad input, told in one line on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.ocr.read", description="Read text on a CPU, several times faster."
    )
    parser.add_argument("--image", help="a page of yours (default: one is rendered)")
    parser.add_argument(
        "--out", default="runs/ocr", help="folder for networks and picture (default: runs/ocr)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="shrink in a minute or two, with less accuracy"
    )
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError, ImportError) as error:
        show_error(parser.prog, reason(error, 1000))
        return BAD_INPUT
    return 0


def _run(options: argparse.Namespace) -> None:
    out = user_path(options.out)
    if options.image is None:
        sheet = render_sheets(1, seed=SEED, held_out=True)
        page, truth = sheet.images[0], (sheet.boxes[0], sheet.texts[0])
    else:
        page, truth = load_page(user_path(options.image)), None
    build_kernels()
    before = originals()
    after = shrunk(before, out / ("quick" if options.quick else "networks"), quick=options.quick)
    networks = all_deployed(before, after)
    readings = {name: _timed(page, each) for name, each in networks.items()}
    marks = {name: marked(reading, truth) for name, reading in readings.items()}
    show(report(readings, marks, truth))
    picture = page_picture(page, readings, marks)
    write_whole(out / "page.png", picture)
    print(f"\n{out / 'page.png'}")


def build_kernels() -> None:
    """Compile the kernels that `falcon_jax.deploy` is faster with, if that can be done here."""
    if falcon_jax.native.is_built():
        return
    print("compiling the kernels for this machine", file=sys.stderr)
    try:
        falcon_jax.native.build()
    except ValueError as error:
        print(f"without compiled kernels, which is slower: {shown(error, 300)}", file=sys.stderr)


def load_page(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Return an image file's pixels, made smaller if a side is longer than 1280.

    Args:
        path: of the file.

    Raises:
        ValueError: if it is no image, or damaged.
        OSError: if it cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no image {shown(path)}.")
    problem = header_problem(path)
    if problem is None:
        try:
            image = decode_rgb(path.read_bytes())
        except ValueError as error:
            problem = reason(error)
    if problem is not None:
        raise ValueError(f"{shown(path)} cannot be read as an image: {problem}.")
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _timed(page: np.ndarray, networks: Networks) -> Reading:
    """Return a reading with the median times of several; the first one compiles."""
    read_page(page, networks)
    readings = [read_page(page, networks) for _ in range(REPEATS)]
    median = {s: statistics.median(r.milliseconds[s] for r in readings) for s in STAGES}
    return Reading(boxes=readings[0].boxes, texts=readings[0].texts, milliseconds=median)


def marked(reading: Reading, truth: tuple[Boxes, tuple[str, ...]] | None) -> np.ndarray | None:
    """Return for every word whether it is right; None if the truth is not known."""
    return None if truth is None else right_words(reading, *truth)


@dataclasses.dataclass(frozen=True)
class Report(Printable):
    """The last reading's words, the table of all, and how often it agrees with the first."""

    lines: tuple[Table | str, ...]

    def parts(self) -> tuple[Table | str, ...]:
        """Return what stands one below the other."""
        return self.lines


def report(
    readings: dict[str, Reading],
    marks: dict[str, np.ndarray | None],
    truth: tuple[Boxes, tuple[str, ...]] | None,
) -> Report:
    """Return what is told of the readings, the original's first."""
    rows = []
    for name, reading in readings.items():
        total, right = sum(reading.milliseconds.values()), marks[name]
        row = {"networks": name, "words": len(reading.texts), **reading.milliseconds}
        row |= {"total": total, "right": None}
        if truth is not None and right is not None:
            row["right"] = f"{right.sum()} of {len(truth[1])} ({right.sum() / len(truth[1]):.1%})"
        rows.append(row)
    for row in rows:
        row["faster"] = rows[0]["total"] / row["total"]
    columns = [
        Column(name="networks", header="Networks"),
        Column(name="words", header="Words found"),
        *([Column(name="right", header="Words right")] if truth is not None else []),
        *(Column(name=s, header=f"{s} ms", format="{:.1f}".format) for s in (*STAGES, "total")),
        Column(name="faster", header="Faster", format=format_ratio),
    ]
    first, *_, last = readings.values()
    agree = right_words(last, first.boxes, first.texts).sum()
    words = " ".join(last.texts[i] for i in _in_order(last.boxes)) or "(none)"
    alike = f"{agree} of the original's {len(first.texts)} words are read alike."
    return Report((f"{words}\n", table_of(rows, columns), f"\n{alike}"))


def _in_order(boxes: np.ndarray) -> list[int]:
    """Return the places of boxes line by line, as people read them."""
    lines: list[list[int]] = []
    for i in sorted(range(len(boxes)), key=lambda i: boxes[i, 1] + boxes[i, 3]):
        middle = boxes[i, [1, 3]].mean()
        if lines and middle < boxes[lines[-1], 3].mean():
            lines[-1].append(i)
        else:
            lines.append([i])
    return [i for line in lines for i in sorted(line, key=lambda i: boxes[i, 0])]


if __name__ == "__main__":
    sys.exit(main())
