"""What people see: tables, bars and errors by rich on a terminal, and plain text anywhere else."""

import abc
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich import box, progress
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from falcon_jax.wording import aligned, shown

_LONGEST = 1000  # characters of a cell
_READABLE = 12  # a name broken into shorter pieces is no name any more


def console_of(stream: Any) -> Console | None:
    """Return a console that writes to a stream, or None if it is no terminal.

    Args:
        stream: such as ``sys.stderr``. Colours and widths are as rich finds them: ``NO_COLOR`` and
            ``COLUMNS`` count.
    """
    return Console(file=stream, highlight=False) if stream.isatty() else None


class Table:
    """Lines of cells: `str` gives aligned text, rich a table as wide as the terminal.

    Args:
        lines: equally many cells in each; the first line is the header.
        right: the columns whose cells stand to the right.
        rule: whether text has a rule below the header.

    >>> print(Table([("layer", "params"), ("conv", "9")], right=[1]))
    layer  params
    conv        9
    """

    def __init__(self, lines: Sequence[Sequence[str]], *, right: Sequence[int], rule: bool = False):
        self._lines = lines
        self._right = right
        self._rule = rule

    def __str__(self) -> str:
        return aligned(self._lines, right=self._right, rule=self._rule)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [[shown(cell, _LONGEST) for cell in line] for line in self._lines]
        columns = list(zip(*lines, strict=True))
        # A column without cells would take room from the others.
        filled = [i for i, (_, *cells) in enumerate(columns) if any(cells) or not cells]
        least = {i: self._least_width(i, columns[i]) for i in filled}
        if sum(least.values()) + 2 * (len(least) - 1) > options.max_width:
            yield Text(aligned(lines, right=self._right, rule=self._rule), overflow="fold")
            return
        table = RichTable(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for i in filled:
            justify = "right" if i in self._right else "left"
            name = Text(columns[i][0])
            table.add_column(name, justify=justify, overflow="fold", min_width=least[i])
        for line in lines[1:]:
            table.add_row(*(Text(line[i]) for i in filled))
        yield table

    def _least_width(self, i: int, cells: Sequence[str]) -> int:
        """Return the width of a column in which no number is broken, nor any but long names."""
        longest = max((len(word) for cell in cells for word in cell.split()), default=0)
        return longest if i in self._right else min(longest, _READABLE)


class Printable(abc.ABC):
    """What has tables and lines of text as parts, one below the other."""

    @abc.abstractmethod
    def parts(self) -> Sequence[Table | str]:
        """Return the parts."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.parts()))

    def __rich__(self) -> RenderableType:
        return Group(*(_text(p) if isinstance(p, str) else p for p in self.parts()))


def show(value: Table | Printable) -> None:
    """Print to standard output, as rich does it on a terminal.

    Args:
        value: to be printed; elsewhere as ``print(value)`` does it.
    """
    console = console_of(sys.stdout)
    if console is None:
        print(value)
    else:
        console.print(value)


def show_error(program: str, message: str) -> None:
    """Print an error in one line to standard error.

    Args:
        program: what stands before it.
        message: what is wrong.
    """
    console = console_of(sys.stderr)
    if console is None:
        print(f"{program}: error: {message}", file=sys.stderr)
    else:
        text = Text.assemble(f"{program}: ", ("error:", "bold red"), f" {message}")
        console.print(text, soft_wrap=True)


class Bar:
    """A bar with counts and times on a terminal.

    Args:
        console: of the terminal.
        label: what is done.
        total: how many there are.
        done: how many are done already.
        unit: of what is counted, to show how many there are a second; empty not to.
    """

    _SECONDS = 0.25  # between two pictures

    def __init__(self, console: Console, label: str, *, total: int, done: int = 0, unit: str = ""):
        speed = [_Speed(unit)] if unit else []
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=20),
            progress.TaskProgressColumn(),
            progress.MofNCompleteColumn(),
            *speed,
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn(
                "{task.fields[note]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=console,
            auto_refresh=False,
            expand=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task(shown(label), total=total, completed=done, note="")
        self._progress.start()
        # A process that is killed leaves the cursor as it is.
        console.show_cursor(True)
        self._drawn = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Count what has been done."""
        self._progress.advance(self._task, count)
        if time.monotonic() > self._drawn + self._SECONDS:
            self._progress.refresh()
            self._drawn = time.monotonic()

    def note(self, text: str) -> None:
        """Show a text at the bar's end."""
        self._progress.update(self._task, note=shown(text), refresh=True)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(_text(text))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.refresh()
        self._progress.stop()


class _Speed(progress.ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {self._unit}/s")


def _text(cell: str) -> Text:
    # As text, brackets are no markup; control characters come out escaped.
    return Text(shown(cell, _LONGEST))
