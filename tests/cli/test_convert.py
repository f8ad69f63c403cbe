"""`convert` on the command line: what it writes, and what it leaves after an error."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import falcon_jax as fj
from falcon_jax import __main__ as cli
from falcon_jax.models import ResNet
from falcon_jax.models import resnet as residual
from falcon_jax.storage import compressed as storage
from falcon_jax.storage import models as stored
from falcon_jax.storage import open_compressed
from tests.convert.test_torchvision import small_resnet, small_weights


def small(*, num_classes=1000, in_features=3, rngs):
    return ResNet(
        residual.BasicBlock, (1, 1, 1, 1), num_classes=num_classes, width=1 / 16, rngs=rngs
    )


@pytest.fixture(scope="module")
def state():
    return {k: v for k, v in small_weights(small_resnet(5)).items() if v.ndim}


@pytest.fixture
def weights(tmp_path, monkeypatch, state):
    """A file of weights of a small ResNet, which stands for resnet18."""

    def get_model(arch, **options):
        assert arch == "resnet18"
        return small(**options)

    monkeypatch.setattr(stored, "get_model", get_model)
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    return path


def convert(weights, out, *options):
    return cli.main(
        ["convert", "--arch=resnet18", f"--weights={weights}", f"--out={out}", *options]
    )


def build():
    return small(num_classes=5, rngs=nnx.Rngs(1))


def logits(model):
    model.eval()
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    return np.asarray(model(jnp.asarray(x)))


def test_weights_become_a_checkpoint_with_metadata(weights, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert convert(weights, out, "--classes=5") == 0
    assert capsys.readouterr().out == f"{out}\n"
    expected = fj.convert.torchvision(build(), fj.convert.load_torch(weights))
    np.testing.assert_array_equal(logits(fj.load_compressed(out, build)), logits(expected))
    assert json.loads((out / "metadata.json").read_text()) == open_compressed(out).metadata
    assert open_compressed(out).metadata == {
        "version": 1,
        "arch": "resnet18",
        "classes": 5,
        "width": 1.0,
        "unit": None,
        "source": {
            "file": "weights.safetensors",
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "head": "keep",
        },
        "preprocessing": {
            "image_size": 224,
            "shorter_side": 256,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bilinear",
        },
    }
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_method_is_fitted_while_converting(weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(weights, out, "--classes=5", "--method=falcon", "--rank=9") == 0
    printed = capsys.readouterr().out
    assert "layer1/0/unit1/conv" in printed
    assert printed.endswith(f"{out}\n")
    loaded = fj.load_compressed(out, build)
    assert isinstance(loaded.layer1[0].unit1.conv, fj.FalconConv)
    assert type(loaded.stem.conv) is nnx.Conv
    expected = fj.convert.torchvision(build(), fj.convert.load_torch(weights))
    y = logits(expected)
    scale = np.abs(y).max()
    np.testing.assert_allclose(logits(loaded) / scale, y / scale, rtol=0, atol=1e-4)


def test_metadata_is_part_of_what_is_checked(weights, tmp_path):
    out = tmp_path / "out"
    assert convert(weights, out, "--classes=5") == 0
    (out / "metadata.json").write_text("{}")
    with pytest.raises(ValueError, match=r"metadata\.json is not what was saved"):
        fj.load_compressed(out, build)


def test_a_new_head_has_other_classes(weights, tmp_path):
    out = tmp_path / "out"
    assert convert(weights, out, "--classes=3", "--head=new") == 0
    loaded = fj.load_compressed(out, lambda: small(num_classes=3, rngs=nnx.Rngs(1)))
    assert loaded.head.bias.shape == (3,)
    assert open_compressed(out).metadata["source"]["head"] == "new"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "5 classes in the weights and 1000 in the model"),
        (["--classes=0"], "at least one class"),
        (["--classes=5", "--method=falcn"], "Did you mean 'falcon'?"),
        (["--classes=5", "--rank=2"], "give --method, too"),
        (["--classes=5", "--method=falcon", "--rank=two"], "--rank is a number or full; got 'two'"),
        (["--classes=5", "--weights=/nowhere.pth"], "/nowhere.pth"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(weights, tmp_path, capsys, options, message):
    assert convert(weights, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [weights.name]


def test_a_failure_while_writing_leaves_nothing(weights, tmp_path, capsys, monkeypatch):
    def fail(directory):
        raise OSError("the disk is full")

    monkeypatch.setattr(storage, "write_manifest", fail)
    assert convert(weights, tmp_path / "out", "--classes=5") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [weights.name]


def test_what_is_there_is_not_touched(weights, tmp_path, capsys):
    assert convert(weights, tmp_path, "--classes=5") == 2
    assert "is there already" in capsys.readouterr().err
    assert weights.exists()


def test_archs_without_such_weights_are_refused(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    out = tmp_path / "out"
    for arch, message in (("resnet8", "no model is called"), ("vgg8_cifar", "no torchvision")):
        arguments = ["convert", f"--arch={arch}", f"--weights={weights}", f"--out={out}"]
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_converted_model_is_compressed_and_profiled(weights, tmp_path, capsys):
    out, smaller = tmp_path / "out", tmp_path / "smaller"
    assert convert(weights, out, "--classes=5") == 0
    options = ["--method=falcon", "--rank=9", r"--keep=stem/.*", r"--keep=layer4/.*"]
    assert cli.main(["compress", str(out), f"--out={smaller}", *options]) == 0
    assert "layer4/0/unit1/conv" in capsys.readouterr().out
    loaded = stored.load_stored(smaller)
    assert isinstance(loaded.model.layer1[0].unit1.conv, fj.FalconConv)
    assert type(loaded.model.layer4[0].unit1.conv) is nnx.Conv
    expected = fj.convert.torchvision(build(), fj.convert.load_torch(weights))
    y = logits(expected)
    scale = np.abs(y).max()
    np.testing.assert_allclose(logits(loaded.model) / scale, y / scale, rtol=0, atol=1e-4)
    assert loaded.description == stored.load_stored(out).description
    assert cli.main(["profile", str(smaller)]) == 0
    table = capsys.readouterr().out
    assert "Falcon(rank=9" in table
    parameters = nnx.state(loaded.model, nnx.Param)
    assert f"{sum(p.size for p in jax.tree.leaves(parameters)):,}" in table
    assert cli.main(["compress", str(smaller), f"--out={tmp_path / 'again'}", *options]) == 2
    assert "replaced already" in capsys.readouterr().err


def test_directories_that_are_no_stored_models_are_refused(weights, tmp_path, capsys):
    bare = tmp_path / "bare"
    model = build()
    plan = fj.make_plan(model, [fj.Rule(method=None)])
    fj.save_compressed(bare, model, plan)
    for path, message in (
        (tmp_path / "none", "there is no directory"),
        (tmp_path, "holds no compressed model"),
        (bare, "no description of a model"),
    ):
        assert cli.main(["profile", str(path)]) == 2
        assert message in capsys.readouterr().err
