"""ONNX with 8 bits: what it is made of, how near it is, and how small."""

import sys

import numpy as np
import onnx
import pytest
from flax import nnx
from onnx import numpy_helper

import falcon_jax as fj
from tests.export.runtime import as_function, evaluating, images, run


@pytest.fixture(scope="module")
def model():
    model = evaluating(fj.models.vgg8_cifar(width=0.5, rngs=nnx.Rngs(0)))
    sample = images(8, 16, 16, 3)
    small = fj.compress(model, fj.make_plan(model, [fj.Rule(method=fj.Falcon())], sample))
    small.eval()
    return small, sample


def test_weights_have_a_scale_for_each_channel_and_all_products_are_of_codes(tmp_path, model):
    small, x = model
    whole = fj.export.onnx(small, x, tmp_path / "whole.onnx")
    made = fj.export.onnx_int8(small, x, tmp_path / "int8.onnx", [x[:4], x[4:]])
    assert made.inputs == whole.inputs and made.nodes["Conv"] == whole.nodes["Conv"] == 12
    proto = onnx.load(made.path)
    onnx.checker.check_model(proto, full_check=True)
    makers = {name: node for node in proto.graph.node for name in node.output}
    arrays = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Conv":
            data, weight = (makers[name] for name in node.input[:2])
            assert data.op_type == weight.op_type == "DequantizeLinear"
            codes, scales = (arrays[name] for name in weight.input[:2])
            assert codes.dtype == np.int8 and scales.shape == (codes.shape[0],)
            largest = np.abs(codes.reshape(len(codes), -1)).max(axis=1)
            assert np.all(largest[scales > scales.max() / 1e3] >= 126)
    assert made.path.stat().st_size < 0.6 * whole.path.stat().st_size
    expected, found = np.asarray(as_function(small)(x)), run(made.path, x)[0]
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert np.abs(found - expected).max() > 1e-5  # it is not the float32 file
    assert not proto.metadata_props


def test_the_range_is_that_of_the_batches(tmp_path, model):
    """What is beyond the calibrated range is cut off."""
    small, x = model
    made = fj.export.onnx_int8(small, x, tmp_path / "int8.onnx", [x / 4], reduce_range=True)
    clipped = np.clip(x, (x / 4).min(), (x / 4).max())
    a, b = run(made.path, x)[0], run(made.path, clipped)[0]
    np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def test_bad_input(tmp_path, model, monkeypatch, without_hook):
    small, x = model
    file = tmp_path / "int8.onnx"
    with pytest.raises(ValueError, match="no batch to calibrate on"):
        fj.export.onnx_int8(small, x, file, [])
    with pytest.raises(ValueError, match="a batch has 2 arrays"):
        fj.export.onnx_int8(small, x, file, [(x, x)])
    with pytest.raises(ValueError, match="there are minmax, entropy, percentile"):
        fj.export.onnx_int8(small, x, file, [x], ranges="largest")
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(ImportError, match=r'needs onnxruntime .*"falcon-jax\[export\]"'):
        fj.export.onnx_int8(small, x, file, [x])
    assert not file.exists()
