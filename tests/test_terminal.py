"""What terminals show, and that files and pipes get plain text."""

import io
import os
import pty
import re
import sys
import termios

import pytest
from rich.console import Console

import falcon_jax as fj
from falcon_jax import __main__ as program
from falcon_jax import terminal
from falcon_jax.compression.profile import Profile, ProfileRow
from falcon_jax.compression.progress import shown
from falcon_jax.terminal import Printable, Table, show, show_error

LINES = [("layer", "params"), ("a", "9"), ("long/path", "1,024")]
CODES = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")


class Both(Printable):
    def parts(self):
        return [Table(LINES, right=[1]), "two of them"]


def on_terminal(value, width=80, **options):
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, width=width, **options).print(value)
    return stream.getvalue()


def plain(text):
    return [line.rstrip() for line in CODES.sub("", text).splitlines()]


@pytest.fixture
def on_a_pty(monkeypatch):
    """Run a function with a pseudo-terminal as a standard stream, and return what it shows."""

    def on_a_pty(stream, run, width=100):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, width))
        monkeypatch.setenv("TERM", "xterm-256color")
        for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        with os.fdopen(theirs, "w") as file, monkeypatch.context() as patch:
            patch.setattr(sys, stream, file)
            run()
            file.flush()
            text = os.read(ours, 100_000).decode()
        os.close(ours)
        return text

    return on_a_pty


def test_text_is_as_it_was():
    assert str(Both()).splitlines() == [
        "layer      params",
        "a               9",
        "long/path   1,024",
        "two of them",
    ]


def test_a_terminal_gets_a_table():
    shown = on_terminal(Both())
    assert "\x1b[1m" in shown
    assert plain(shown) == [
        "layer      params",
        "─────────────────",
        "a               9",
        "long/path   1,024",
        "two of them",
    ]


def test_no_colours_where_none_are_wanted(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    stream.isatty = lambda: True
    terminal.console_of(stream).print("[red]x", Both())
    assert "\x1b[3" not in stream.getvalue()


def test_a_table_is_no_wider_than_the_terminal_and_numbers_stay_whole():
    lines = [("layer", "becomes", "params"), ("features/" * 9, "x" * 40, "123,456,789")]
    shown = plain(on_terminal(Table(lines, right=[2]), width=50))
    assert max(map(len, shown)) <= 50
    assert "123,456,789" in shown[2] and len(shown) > 3
    cells = [line.split() for line in shown[2:]]
    assert "".join(line[0] for line in cells if line[0][0] != "x") == "features/" * 9


def test_too_narrow_a_terminal_gets_text():
    lines = [("layer", "params"), ("a/long/path", "1,234,567,890")]
    table = Table(lines, right=[1])
    assert " ".join(plain(on_terminal(table, width=15))).split() == str(table).split()


def test_a_column_without_cells_is_left_out():
    lines = [("layer", "error", "params"), ("a", "", "9")]
    assert plain(on_terminal(Table(lines, right=[1, 2])))[0].split() == ["layer", "params"]
    assert plain(on_terminal(Table(lines[:1], right=[])))[0].split() == list(lines[0])


def test_names_are_no_markup_and_control_no_terminal():
    lines = [("layer", "n"), ("[red]a[/red]\x1b[31m\x07", "[/]")]
    for width in (80, 10):
        shown = on_terminal(Table(lines, right=[]), no_color=True, width=width)
        text = "".join(plain(shown))
        assert "[red]a[/red]\\x1b[31m\\x07" in text.replace(" ", "") and "[/]" in text
        assert "\x1b[31m" not in shown and "\x07" not in shown


def test_profiles_and_plans_are_printable():
    row = ProfileRow(path="conv", kind="conv", method="", params=9, mult_adds=1_000)
    profile = Profile(rows=(row,), latency_ms=1.5, as_paper_counts=(9, 1_000))
    assert plain(on_terminal(profile))[2].split() == ["conv", "conv", "9", "1,000"]
    assert plain(on_terminal(profile))[-1] == str(profile).splitlines()[-1] == "latency 1.50 ms"
    assert issubclass(fj.Plan, Printable)


def test_printed_to_a_pipe_it_is_plain_text(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    show(Both())
    show_error("train.py", "no [red]such[/red] field")
    captured = capsys.readouterr()
    assert captured.out == f"{Both()}\n"
    assert captured.err == "train.py: error: no [red]such[/red] field\n"


def test_printed_to_a_terminal_it_is_a_table(on_a_pty):
    text = on_a_pty("stdout", lambda: show(Both()))
    assert "\x1b[1m" in text and "──" in text


def test_an_error_on_a_terminal_stays_in_one_line(on_a_pty):
    message = "there is no [bold]file[/bold] " + "a/" * 100
    text = on_a_pty("stderr", lambda: show_error("falcon_jax", message), width=40)
    assert "\x1b[1;31merror:\x1b[0m" in text
    assert plain(text) == [f"falcon_jax: error: {message}"]


def test_the_command_line_tells_errors_in_colour(on_a_pty, tmp_path):
    missing = str(tmp_path / "missing")
    text = on_a_pty("stderr", lambda: program.main(["profile", missing]))
    assert "\x1b[1;31merror:\x1b[0m" in text and plain(text)[0].startswith("falcon_jax: error:")


def test_steps_have_a_bar_on_a_terminal(on_a_pty):
    seen = []
    steps = ["features/[0]", "head"]
    text = on_a_pty("stderr", lambda: seen.extend(shown(steps, "calibrating", progress=True)))
    assert seen == steps
    pictures = [line.strip() for line in CODES.sub("", text).replace("\n", "").split("\r")]
    pictures = [line for line in pictures if line]
    assert any("0/2" in line and line.endswith("features/[0]") for line in pictures)
    assert pictures[-1].startswith("calibrating") and "2/2" in pictures[-1]
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_steps_elsewhere_are_told_as_they_were(capsys):
    list(shown(["a"], "calibrating", progress=True))
    first, last = capsys.readouterr().err.split("\r")[1:]
    assert first.rstrip() == f"calibrating [{' ' * 20}] 0/1, 0 s: a"
    assert last.rstrip() == f"calibrating [{'#' * 20}] 1/1, 0 s"
