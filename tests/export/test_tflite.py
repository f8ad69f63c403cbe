"""LiteRT files: what its interpreter gives, and of which operations they are."""

import collections
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.compression.networks import Small
from tests.export.runtime import as_function, evaluating, images


def test_convolutions_are_litert_s_own(tmp_path):
    pytest.importorskip("litert_converter")
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    x = images(2, 16, 16, 3)
    model = evaluating(Small(nnx.Rngs(0), m=8, n=8))
    small = fj.compress(model, fj.make_plan(model, [fj.Rule(method=fj.Falcon())], x))
    small.eval()
    made = fj.export.tflite(small, x, tmp_path / "m.tflite")
    assert made.inputs == {"x": (2, 16, 16, 3)} and made.outputs == {"y": (2, 5)}
    assert "y (2, 5)" in str(made)
    run = interpreter.Interpreter(
        str(made.path),
        experimental_op_resolver_type=interpreter.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    run.allocate_tensors()
    ops = collections.Counter(op["op_name"] for op in run._get_ops_details())
    assert ops["CONV_2D"] == ops["DEPTHWISE_CONV_2D"] == 2
    found = run.get_signature_runner("serving_default")(x=x)["y"]
    np.testing.assert_allclose(found, as_function(small)(x), rtol=1e-4, atol=1e-5)


def test_bad_input(tmp_path, monkeypatch):
    x, file = images(1, 8), tmp_path / "m.tflite"
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        fj.export.tflite(jnp.sin, x, tmp_path / "nowhere" / "m.tflite")
    monkeypatch.setitem(sys.modules, "litert_converter.converter_api_ext", None)
    with pytest.raises(ImportError, match=r'pip install "falcon-jax\[tflite\]"'):
        fj.export.tflite(jnp.sin, x, file)
