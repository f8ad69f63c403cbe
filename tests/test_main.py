import subprocess
import sys
from pathlib import Path

import pytest

from falcon_jax import __main__ as cli


@pytest.fixture
def prepared(monkeypatch):
    calls = []

    def prepare(name, data_dir):
        calls.append((name, data_dir))
        return Path("/somewhere") / name

    monkeypatch.setattr(cli, "prepare", prepare)
    return calls


def test_prepare_passes_its_options_and_prints_the_directory(prepared, capsys):
    assert cli.main(["prepare", "--name", "cifar10", "--data-dir", "/data"]) == 0
    assert prepared == [("cifar10", "/data")]
    assert capsys.readouterr().out == "/somewhere/cifar10\n"


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ImportError])
def test_user_errors_are_one_line_and_status_2(monkeypatch, capsys, error):
    def fail(name, data_dir):
        raise error("what was wrong\n  and what to do")

    monkeypatch.setattr(cli, "prepare", fail)
    assert cli.main(["prepare", "--name", "cifar10"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "falcon_jax: error: what was wrong and what to do\n"
    assert captured.out == ""


def test_faults_of_ours_are_not_hidden(monkeypatch):
    def fail(name, data_dir):
        raise KeyError("a fault")

    monkeypatch.setattr(cli, "prepare", fail)
    with pytest.raises(KeyError):
        cli.main(["prepare", "--name", "cifar10"])


@pytest.mark.parametrize("arguments", [[], ["compres"], ["prepare"]])
def test_wrong_arguments_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_as_a_program():
    finished = subprocess.run(
        [sys.executable, "-m", "falcon_jax", "prepare", "--name", "../x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("falcon_jax: error: '../x' cannot be the name")
    assert finished.stderr.count("\n") == 1
