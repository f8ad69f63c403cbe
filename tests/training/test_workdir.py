import json
import subprocess
import sys

import pytest

from falcon_jax.training.config import default_config
from falcon_jax.training.workdir import claim_workdir, locked


def config(**fields):
    made = default_config()
    made.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return made.to_dict()


def test_the_config_is_kept(tmp_path):
    claim_workdir(tmp_path / "a" / "b", config())
    kept = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert kept["train"]["boundaries"] == [150.0, 250.0]
    assert kept["model"] == {"name": "vgg19_cifar"}


def test_the_same_experiment_may_go_on(tmp_path):
    claim_workdir(tmp_path, config())
    claim_workdir(tmp_path, config())


def test_another_experiment_may_not_and_the_differences_are_told(tmp_path):
    claim_workdir(tmp_path, config())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError) as caught:
        claim_workdir(tmp_path, config(train__epochs=3, seed=1))
    message = str(caught.value)
    assert str(tmp_path) in message and "\n" not in message
    assert "train.epochs: 350 there, 3 given" in message
    assert "seed: 0 there, 1 given" in message
    assert "finetune" not in message
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "field, value",
    [
        ("log__progress", False),
        ("log__profile_steps", 5),
        ("data__data_dir", "/elsewhere"),
        ("compression__only", "x"),
    ],
)
def test_fields_that_change_no_result_may_differ(tmp_path, field, value):
    claim_workdir(tmp_path, config())
    claim_workdir(tmp_path, config(**{field: value}))


def test_a_variant_that_was_added_or_taken_away_is_a_difference(tmp_path):
    one, two = config(), config()
    two["compression"]["variants"] = {"k1": {"method": "falcon", "rank": 1}}
    claim_workdir(tmp_path / "one", one)
    with pytest.raises(ValueError, match=r"compression\.variants\.k1: None there, \{"):
        claim_workdir(tmp_path / "one", two)
    claim_workdir(tmp_path / "two", two)
    with pytest.raises(ValueError, match=r"compression\.variants\.k1: .* there, None given"):
        claim_workdir(tmp_path / "two", one)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_config_is_told_with_its_path(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config"):
        claim_workdir(tmp_path, config())


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        claim_workdir(tmp_path / "file", config())


HOLD = """
import pathlib, sys
from falcon_jax.training.workdir import locked
with locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_and_a_crash_leaves_no_lock(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"locked\n"
    told = f"process {holder.pid} on .* works in"
    with pytest.raises(BlockingIOError, match=told), locked(tmp_path):
        raise AssertionError("both hold the lock")
    holder.kill()
    holder.communicate()
    for _ in range(2):  # and again, when it has been given back
        with locked(tmp_path):
            claim_workdir(tmp_path, config())


def test_settings_that_change_no_result_may_differ(tmp_path):
    claim_workdir(tmp_path, config())
    claim_workdir(tmp_path, config(data__workers=4, checkpoint__every_steps=10, checkpoint__keep=5))
