"""Exported files run in onnxruntime, beside JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from flax import nnx

import falcon_jax as fj
from tests.nn.weights import draw


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def run(path, *arrays):
    """What onnxruntime gives for inputs in their order."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return session.run(None, dict(zip(names, map(np.asarray, arrays), strict=True)))


def assert_equal(path, call, *arrays, rtol=1e-4):
    """Outputs are those of JAX: shapes, types, and values relative to the largest."""
    # In one piece: every operation by itself would be compiled by itself.
    whole = jax.jit(lambda *arrays: call(*arrays))
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(whole(*map(jnp.asarray, arrays)))]
    found = run(path, *arrays)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if b.dtype == bool or np.issubdtype(b.dtype, np.integer):
            np.testing.assert_array_equal(a, b)
        else:
            scale = max(np.abs(b[np.isfinite(b)]).max(initial=0.0), 1e-6)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)


def exported(tmp_path, model, *arrays, others=(), call=None, **options):
    """Export a model, compare it on the inputs and on others, and return what was written."""
    call = call or as_function(model)
    sample = arrays[0] if len(arrays) == 1 else tuple(arrays)
    made = fj.export.onnx(model, sample, tmp_path / "model.onnx", **options)
    for given in (arrays, *others):
        assert_equal(made.path, call, *given)
    return made


def as_function(model):
    """A model's call, such that JAX can trace it."""
    if not isinstance(model, nnx.Module):
        return model
    graphdef, state = nnx.split(model)
    return lambda *arrays: nnx.merge(graphdef, state, copy=True)(*map(jnp.asarray, arrays))


def evaluating(model):
    """A model in evaluation mode whose BatchNorms are not the identity."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            c = module.mean.shape[0]
            module.mean[...] = draw(c) / 4
            module.var[...] = 1 + np.abs(draw(c))
            module.scale[...] = 1 + draw(c) / 4
            module.bias[...] = draw(c) / 4
    model.eval()
    return model
