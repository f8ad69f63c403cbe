import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

import train
from falcon_jax.training import experiment

# ml_collections loads config files so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(train.__file__).parent
DEMO = ROOT / "configs" / "demo.py"


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch):
    """Let input that is taken for good end at once instead of training a network."""

    def claim(*arguments):
        raise AssertionError("the experiment began")

    monkeypatch.setattr(experiment, "claim_workdir", claim)
    # ml_collections loads every config file as one module, and what an earlier one had stays.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)


@pytest.fixture
def told(capsys, monkeypatch):
    """Run the script in this process with bad input and return what it says."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        assert train.main(sys.argv) == 2
        return one_line(capsys)

    return run


def one_line(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("train.py: error: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert "Traceback" not in captured.err
    return captured.err[len("train.py: error: ") : -1]


def test_bad_input_leaves_no_folder_behind(told, tmp_path):
    told(f"--config={DEMO}", f"--workdir={tmp_path}/new", "--config.train.epoch=3")
    told(f"--config={DEMO}", f"--workdir={tmp_path}/new", "--config.model.name=vgg")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "override, words",
    [
        (
            "--config.train.epoch=3",
            ["config.train.epoch: there is no 'epoch'", "did you mean 'epochs'?"],
        ),
        ("--config.trian.epochs=3", ["there is no 'trian'", "did you mean 'train'?"]),
        ("--config.seed.x=3", ["config.seed.x: there is no 'x'"]),
        (
            "--config.model.name=vgg8cifar",
            ["config.model.name: there is no 'vgg8cifar'", "did you mean 'vgg8_cifar'?"],
        ),
        ("--config.data.source=folder", ['the source "folder" needs data_dir']),
        (
            "--config.data.source=digit",
            ["config.data.source: there is no 'digit'", "digits, idx, tfds, fake"],
        ),
        (
            "--config.compression.variants.falcon_k1.method=falcn",
            ["config.compression.variants.falcon_k1", "'falcn'", "falcon"],
        ),
        (
            "--config.compression.variants.falcon_k1.rank=0",
            ["config.compression.variants.falcon_k1", "rank"],
        ),
        ("--config.compression.only=falcon_k9", ["'falcon_k9'", "falcon_k1, falcon_k2, falcon_k3"]),
        ("--config.compression.solver=exakt", ["'exakt'", "exact, adamw, random"]),
        ("--config.train.schedule=linear", ["config.train.schedule", "step, cosine, constant"]),
        ("--config.train.epochs=-1", ["config.train.epochs must be 0 or more, but is -1"]),
        ("--config.train.epochs=three", ["train.epochs", "three"]),
        ("--config.train.epochs=3.5", ["train.epochs", "3.5"]),
        ("--config.train.learning_rate=fast", ["train.learning_rate", "fast"]),
        ("--config.train.nesterov=maybe", ["train.nesterov", "maybe"]),
        ("--config.train.boundaries=(1.0,'b')", ["config.train.boundaries"]),
        ("--config.compression.rules=((('),None),)", ["config.compression.rules"]),
        ("--config.compression.rules=(('(',None),)", ["regular expression"]),
        ("--unknown=3", ["unknown"]),
        ("surplus", ["surplus"]),
    ],
)
def test_bad_flags_are_told_in_one_line(told, tmp_path, override, words):
    message = told(f"--config={DEMO}", f"--workdir={tmp_path}/run", override)
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["--config.data.source=idx", "--config.data.data_dir=/nowhere"],
            ["there is no directory /nowhere", "data_dir"],
        ),
        (
            [
                "--config.data.source=tfds",
                "--config.data.name=cifar10",
                "--config.data.data_dir=/nowhere",
            ],
            ["cifar10", "/nowhere", "python -m falcon_jax prepare"],
        ),
        (["--config.data.source=tfds"], ["name"]),
        (["--config.data.validation_fraction=1.0"], ["fraction"]),
        (["--config.data.image_size=0"], ["image_size"]),
        (["--config.data.resize=crop"], ["resize", "crop"]),
        (["--config.seed=-1"], ["seed"]),
    ],
)
def test_data_that_cannot_be_had_is_told_in_one_line(told, tmp_path, overrides, words):
    message = told(f"--config={DEMO}", f"--workdir={tmp_path}/run", *overrides)
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_missing_flags(told, tmp_path):
    both = "give --config=FILE and --workdir=FOLDER"
    assert told() == both
    assert told(f"--config={DEMO}") == both
    assert told(f"--workdir={tmp_path}") == both


def test_a_config_file_that_is_not_there(told, tmp_path):
    message = told("--config=configs/nothing.py", f"--workdir={tmp_path}")
    assert message.startswith("there is no config file configs/nothing.py")
    told("--config", "configs/nothing.py", f"--workdir={tmp_path}")


@pytest.mark.parametrize(
    "text",
    [
        "def get_config(:",
        "import nothing_of_this_name",
        "x = 1",
        "from falcon_jax.training.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.train.epoch = 3\n"
        "    return config\n",
        "def get_config():\n    return 3\n",
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n",
    ],
)
def test_a_bad_config_file(told, tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    told(f"--config={path}", f"--workdir={tmp_path}/run")


def test_the_arguments_given_count_whatever_those_of_the_process_are(tmp_path):
    found, workdir, _ = train.read_flags(
        [
            "train.py",
            f"--config={DEMO}",
            f"--workdir={tmp_path}",
            "--config.train.epochs=3",
            "--config.train.boundaries=(1.0, 2.0)",
            "--config.train.nesterov=True",
            "--noconfig.data.augmentation.flip",
            "--config.compression.only=falcon_k2",
            "--config.compression.variants.falcon_k2.rank=4",
        ]
    )
    assert workdir == tmp_path
    assert found.train.epochs == 3
    assert found.train.boundaries == (1.0, 2.0) and found.train.nesterov
    (variant,) = found.compression.chosen
    assert variant.method.options()["rank"] == 4


def test_numbers_that_went_bad_have_a_status_of_their_own(capsys, tmp_path, monkeypatch):
    def fail(*args):
        raise FloatingPointError("the loss is\n  not finite")

    monkeypatch.setattr(train, "run_experiment", fail)
    assert train.main(["train.py", f"--config={DEMO}", f"--workdir={tmp_path}"]) == 4
    assert capsys.readouterr().err == "train.py: error: the loss is not finite\n"


def test_faults_of_ours_are_not_hidden(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyError("a fault")

    monkeypatch.setattr(train, "run_experiment", fail)
    with pytest.raises(KeyError):
        train.main(["train.py", f"--config={DEMO}", f"--workdir={tmp_path}"])


def program(*arguments, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
    )


def test_as_a_program_with_an_unknown_field():
    finished = program(
        "--config=configs/demo.py", "--workdir=never", "--config.train.epoch=3", cwd=ROOT
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("train.py: error: config.train.epoch: there is no 'epoch'")
    assert finished.stderr.count("\n") == 1


@pytest.mark.slow
def test_as_a_program_from_another_folder_a_config_finds_what_it_shares(tmp_path):
    finished = program(
        f"--config={ROOT}/configs/resnet34_svhn.py",
        "--workdir=run",
        "--config.data.data_dir=/nowhere",
        cwd=tmp_path,
    )
    assert finished.returncode == 2
    assert "svhn_cropped is not prepared in /nowhere" in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_says_how_to_use_it():
    finished = program("--help", cwd=ROOT)
    assert finished.returncode == 0
    assert "--workdir" in finished.stdout and "--config" in finished.stdout


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_the_status_of_a_run_that_can_go_on(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), f"--config={ROOT}/configs/torture.py"]
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}", "--config.train.epochs=1000"],
        stderr=subprocess.PIPE,
        text=True,
    )
    saved = workdir / "standard" / "checkpoints"
    deadline = time.monotonic() + 120
    while not any(path.name.isdigit() for path in saved.glob("*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "SIGTERM: saving at the next step" in told
    step = re.search(r"standard: stopped and saved at step (\d+); the same command goes on", told)
    assert (saved / step[1] / "manifest.json").is_file()
