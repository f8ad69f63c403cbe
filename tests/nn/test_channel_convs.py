"""Tucker and CP as modules of both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.nn.weights import WEIGHTS, draw

LAYERS = [
    (fj.TuckerConv, fj.linen.TuckerConv, (2, 3)),
    (fj.CPConv, fj.linen.CPConv, 4),
]


@pytest.mark.parametrize(("layer", "linen_layer", "rank"), LAYERS)
def test_both_frameworks_compute_the_convolution_with_the_kernel(layer, linen_layer, rank):
    x = draw(2, 9, 8, 4)
    module = layer(4, 6, (3, 3), strides=(2, 1), rank=rank, rngs=nnx.Rngs(0))
    spec, params = module.spec, module.params
    standard = nnx.Conv(4, 6, (3, 3), strides=(2, 1), rngs=nnx.Rngs(0))
    standard.kernel[...] = module.method.kernel(params, spec)
    np.testing.assert_allclose(module(x), standard(x), atol=1e-5)
    linen = linen_layer(6, (3, 3), strides=(2, 1), rank=rank)
    made = jax.eval_shape(linen.init, jax.random.key(0), x)["params"]
    variables = {"params": {**params, "bias": module.bias[...]}}
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables["params"])
    np.testing.assert_allclose(linen.apply(variables, x), module(x), atol=1e-6)


def test_a_trained_convolution_at_full_rank():
    conv = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **WEIGHTS)
    x = draw(2, 8, 8, 4)
    small = fj.TuckerConv.from_conv(conv, rank="full")
    assert type(small) is fj.TuckerConv
    np.testing.assert_allclose(small(x), conv(x), atol=1e-5)


def test_ranks_by_vbmf_and_budget():
    conv = nnx.Conv(32, 32, (3, 3), rngs=nnx.Rngs(0), **WEIGHTS)
    assert fj.TuckerConv.from_conv(conv).method.rank == (1, 1)  # nothing but noise
    assert fj.CPConv.from_conv(conv, rank=3).method.rank == 3
    made = fj.CPConv(32, 32, (3, 3), rank=fj.Budget(8.0), rngs=nnx.Rngs(0))
    assert sum(value.size for value in made.params.values()) <= 9 * 32 * 32 / 8
    with pytest.raises(ValueError, match="VBMF needs a trained kernel"):
        fj.TuckerConv(32, 32, (3, 3), rank="vbmf", rngs=nnx.Rngs(0))
