import re
import sys

from falcon_jax.training.monitoring import Progress


def run(**options):
    progress = Progress("vgg", total=200, **options)
    progress.advance(100)
    progress.epoch(1, 2, {"loss": 0.123456, "accuracy": 0.5})
    progress.advance(100)
    progress.epoch(2, 2, {"loss": 0.1, "accuracy": 1.0})
    progress.close()


def test_without_a_terminal_one_line_an_epoch(capsys):
    run()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "vgg: epoch 1/2  loss 0.1235  accuracy 0.5\nvgg: epoch 2/2  loss 0.1  accuracy 1\n"
    )


def test_nothing_is_shown_on_request(capsys, monkeypatch):
    run(show=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(show=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def as_terminal(monkeypatch):
    """Make of what `capsys` reads a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")


def pictures(text):
    """What a terminal shows one after the other, without the codes that move the cursor."""
    return [line.strip() for line in re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", text).split("\r")]


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    as_terminal(monkeypatch)
    run(done=0)
    captured = capsys.readouterr()
    assert captured.out == ""
    last = pictures(captured.err)[-1]
    assert last.startswith("vgg") and "100%" in last and "200/200" in last and "img/s" in last
    assert "vgg: epoch 2/2 loss 0.1 accuracy 1" in captured.err
    assert captured.err.rindex("\x1b[?25h") > captured.err.rindex("\x1b[?25l")


def test_a_bar_that_goes_on_starts_where_it_was(capsys, monkeypatch):
    as_terminal(monkeypatch)
    Progress("vgg", total=200, done=100).close()
    assert "50%" in capsys.readouterr().err
