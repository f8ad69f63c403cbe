"""`export` on the command line: every format, and what is wrong with what was asked for."""

import json

import numpy as np
import onnx
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax import __main__ as cli
from falcon_jax.convert.checkpoint import compressed
from falcon_jax.storage import models as stored
from falcon_jax.storage.models import Description, ImagePreprocessing
from tests.export.runtime import as_function, evaluating, images, run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    preprocessing = ImagePreprocessing(image_size=8, mean=(0.5,), std=(0.2,))
    description = Description(
        arch="vgg8_cifar", classes=10, width=0.25, preprocessing=preprocessing
    )
    model = evaluating(description.build(rngs=nnx.Rngs(0)))
    small = compressed(stored.uncompressed(model, description), fj.Falcon())
    path = tmp_path_factory.mktemp("models") / "model"
    stored.save_stored(path, small)
    return path, small


def export(checkpoint, out, *options):
    return cli.main(["export", str(checkpoint), "--out", str(out), *options])


def test_onnx(tmp_path, checkpoint, capsys):
    path, small = checkpoint
    assert export(path, tmp_path / "m.onnx") == 0
    assert "x (batch, height, width, 1)" in capsys.readouterr().out
    x = images(3, 8, 8, 1)
    np.testing.assert_allclose(
        run(tmp_path / "m.onnx", x)[0], as_function(small.model)(x), rtol=1e-4, atol=1e-5
    )
    proto = onnx.load(tmp_path / "m.onnx")
    told = {p.key: json.loads(p.value) for p in proto.metadata_props}
    assert told["falcon_jax"]["preprocessing"]["mean"] == [0.5]


@pytest.mark.parametrize(
    ("options", "shape"),
    [(["--fixed"], "x (1, 8, 8, 1)"), (["--open", "batch"], "x (batch, 8, 8, 1)")],
)
def test_sizes(tmp_path, checkpoint, capsys, options, shape):
    assert export(checkpoint[0], tmp_path / "m.onnx", *options) == 0
    assert shape in capsys.readouterr().out


def test_other_formats(tmp_path, checkpoint):
    path, small = checkpoint
    assert export(path, tmp_path / "m.stablehlo") == 0
    assert export(path, tmp_path / "m.safetensors") == 0
    assert export(path, tmp_path / "hub") == 0
    x = images(3, 8, 8, 1)
    expected = as_function(small.model)(x)
    loaded = fj.export.load_safetensors(tmp_path / "m.safetensors", small.model)
    np.testing.assert_array_equal(as_function(loaded)(x), expected)
    again = fj.export.from_pretrained(tmp_path / "hub")
    np.testing.assert_array_equal(as_function(again.model)(x), expected)
    assert (tmp_path / "m.stablehlo").stat().st_size > 1000


def test_int8(tmp_path, checkpoint):
    options = ["--data", "digits", "--batch-size", "16", "--batches", "2"]
    assert export(checkpoint[0], tmp_path / "m.int8.onnx", *options) == 0
    ops = {node.op_type for node in onnx.load(tmp_path / "m.int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= ops


@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        ("m.xyz", [], "does not end with one of .onnx"),
        ("m.int8.onnx", [], "give --data, too"),
        ("m.onnx", ["--data", "digits"], "needs no images"),
        ("m.onnx", ["--opset", "3"], "opset is a whole number from 18"),
        ("nowhere/m.onnx", [], "there is no directory"),
        ("m.int8.onnx", ["--data", "digits", "--batches", "0"], "--batches must be 1 or more"),
    ],
)
def test_bad_input_is_one_line(tmp_path, checkpoint, capsys, out, options, said):
    assert export(checkpoint[0], tmp_path / out, *options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
