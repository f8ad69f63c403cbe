"""A tilde at the beginning of a path is the home directory, wherever a path comes in."""

import pwd
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
import train
from falcon_jax.__main__ import main
from falcon_jax.convert import load_torch
from falcon_jax.data import DataConfig, load_dataset
from falcon_jax.data.tfds import tfds_directory
from falcon_jax.paths import user_path
from falcon_jax.report.table import write_json
from falcon_jax.storage.models import is_stored, load_stored
from falcon_jax.training.checkpoints import Checkpoints


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory, while the working directory, another one, stays as empty as it was."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "home"
    assert not list((tmp_path / "work").iterdir())


def test_only_a_tilde_at_the_beginning_is_replaced(home, monkeypatch):
    monkeypatch.setenv("THERE", "elsewhere")
    assert user_path("~") == home
    assert user_path(Path("~/x")) == home / "x"
    for path in ("a/~", "a~", "$THERE/x", str(home)):
        assert user_path(path) == Path(path)
    user = pwd.getpwuid(0)
    assert user_path(f"~{user.pw_name}/x") == Path(user.pw_dir, "x")


def test_an_unknown_home_is_told(home, capsys):
    with pytest.raises(ValueError, match="'~no-one/x' begins with ~no-one, but no such home"):
        user_path("~no-one/x")
    assert main(["make-folder", "--out=~no-one/x"]) == 2
    assert "no such home directory is known" in capsys.readouterr().err


def test_models_and_plans_go_home(home):
    model = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)))
    plan = fj.make_plan(model, sample=jax.ShapeDtypeStruct((1, 4, 4, 3), "float32"))
    fj.save_compressed("~/small", model, plan)
    assert (home / "small").is_dir()
    assert is_stored("~/small")
    fj.load_compressed("~/small", lambda: model)
    plan.save("~/plan.json")
    assert type(plan).load("~/plan.json") == plan
    write_json("~/reports/x.json", [])
    Checkpoints("~/run").close()
    assert {path.name for path in home.iterdir()} == {"small", "plan.json", "reports", "run"}


@pytest.mark.parametrize("read", [load_torch, load_stored])
def test_what_is_missing_is_looked_for_at_home(home, read):
    with pytest.raises(FileNotFoundError, match=str(home)):
        read("~/nothing.pth")


def test_data_are_at_home(home, capsys):
    assert main(["make-folder", "--out=~/set", "--train=10", "--val=10", "--side=8"]) == 0
    assert capsys.readouterr().out.strip() == str(home / "set")
    assert (
        len(
            load_dataset(
                DataConfig(source="folder", data_dir="~/set", image_size=8, validation_fraction=0.0)
            ).test
        )
        == 10
    )
    with pytest.raises(FileNotFoundError, match=str(home / "idx")):
        load_dataset(DataConfig(source="idx", data_dir="~/idx"))
    assert tfds_directory("~/tfds") == home / "tfds"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
@pytest.mark.parametrize("config", [["--config=~/demo.py"], ["--config", "~/demo.py"]])
def test_config_and_workdir_are_at_home(home, config):
    shutil.copy(Path(train.__file__).parent / "configs" / "demo.py", home)
    experiment, workdir, *_ = train.read_flags(["train.py", *config, "--workdir=~/run"])
    assert workdir == home / "run"
    assert np.isfinite(experiment.train.epochs)
    with pytest.raises(ValueError, match=f"no config file {home}/none.py"):
        train.read_flags(["train.py", "--config=~/none.py", "--workdir=x"])
