"""`shrink` on the command line."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax import __main__ as cli
from falcon_jax.convert.checkpoint import compressed
from falcon_jax.models import vgg
from falcon_jax.storage import models as stored
from falcon_jax.storage.models import Description, ImagePreprocessing


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Compile fewer layers."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vgg, "VGG8_STAGES", ((8,), (16,)))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    preprocessing = ImagePreprocessing(image_size=8, mean=(0.5,), std=(0.2,))
    description = Description(arch="vgg8_cifar", classes=10, preprocessing=preprocessing)
    model = description.build(rngs=nnx.Rngs(0))
    model.eval()
    path = tmp_path_factory.mktemp("models") / "model"
    stored.save_stored(path, stored.uncompressed(model, description))
    return path


def shrink(checkpoint, out, *options):
    given = ["--out", str(out), "--data", "digits", "--batch-size", "64", *options]
    return cli.main(["shrink", str(checkpoint), *given])


@pytest.mark.parametrize(
    "more",
    [[], pytest.param(["--method", "falcon:2", "--distill", "2"], marks=pytest.mark.slow)],
    ids=["", "ranks, distilled"],
)
def test_a_smaller_checkpoint_and_a_report(tmp_path, checkpoint, capsys, more):
    options = ["--target", "mult_adds=0.6", "--method", "falcon:1", *more]
    options += ["--keep", ".*/0/0/conv", "--batches", "2"]
    out = tmp_path / "small"
    assert shrink(checkpoint, out, *options, "--report", str(tmp_path / "report")) == 0
    told = capsys.readouterr().out
    small, before = stored.load_stored(out), stored.load_stored(checkpoint)
    assert small.plan.after.mult_adds <= 0.6 * small.plan.before.mult_adds
    assert small.plan.rows[0].method is None
    assert {type(row.method) for row in small.plan.replaced} == {fj.Falcon}
    assert "loss of the output" in told and told.endswith(f"{out}\n")
    data = json.loads((tmp_path / "report/shrink.json").read_text())
    assert data["front"]["quantity"] == "mult_adds"
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    assert np.isfinite(small.model(x)).all() and small.model(x).shape == before.model(x).shape


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--target", "mult_adds"], "--target is a name and a number"),
        (["--target", "size=0.5"], "got 'size=0.5'"),
        (["--target", "mult_adds=0.00001", "--method", "falcon"], "cannot be reached"),
        (["--target", "params=0.5", "--method", "falcon:full"], "--method is a name"),
        (["--target", "params=0.5", "--batches", "0"], "--batches must be 1 or more"),
        (["--target", "params=0.5", "--distill", "-1"], "--distill must be 0 or more"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, checkpoint, capsys, options, told):
    assert shrink(checkpoint, tmp_path / "small", *options) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert not (tmp_path / "small").exists()


def test_a_compressed_checkpoint_is_refused(tmp_path, checkpoint, capsys):
    small = compressed(stored.load_stored(checkpoint), fj.Falcon())
    stored.save_stored(tmp_path / "compressed", small)
    assert shrink(tmp_path / "compressed", tmp_path / "out", "--target", "params=0.5") == 2
    assert "is compressed already" in capsys.readouterr().err
