"""Every method as a module of both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.nn.weights import WEIGHTS, draw

SETTINGS = {
    "Falcon": {"rank": 2, "impl": "gep"},
    "DepthwiseSeparable": {"rank": 2},
    "Decoupled": {"order": "dw-pw", "terms": 2},
    "Tucker": {"rank": (2, 3)},
    "CP": {"rank": 4},
    "TensorTrain": {"rank": 2},
    "SpatialDecomposition": {"rank": 3},
    "ChannelDecomposition": {"rank": 3, "inner": "falcon"},
    "FilterSummary": {"ratio": 3.0, "step": "paper"},
    "DifferentiableFilterSummary": {"ratio": 2.0},
}


def test_every_method_has_its_module():
    named = {type(fj.get_method(name)).__name__ for name in fj.method_names()}
    assert named == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_both_frameworks_compute_the_convolution_with_the_kernel(name):
    settings, x = SETTINGS[name], draw(2, 9, 8, 4)
    make, make_linen = getattr(fj, f"{name}Conv"), getattr(fj.linen, f"{name}Conv")
    module = make(4, 6, (3, 3), strides=(2, 1), **settings, rngs=nnx.Rngs(0))
    assert isinstance(module, nnx.Conv)
    assert (module.in_features, module.kernel_size, module.strides) == (4, (3, 3), (2, 1))
    assert module.method == getattr(fj, name)(**settings).for_layer(module.spec)
    spec, params = module.spec, module.params
    standard = nnx.Conv(4, 6, (3, 3), strides=(2, 1), rngs=nnx.Rngs(0))
    standard.kernel[...] = module.method.kernel(params, spec)
    np.testing.assert_allclose(module(x), standard(x), atol=1e-5)
    linen = make_linen(6, (3, 3), strides=(2, 1), **settings)
    made = jax.eval_shape(linen.init, jax.random.key(0), x)["params"]
    variables = {"params": {**params, "bias": module.bias[...]}}
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables["params"])
    np.testing.assert_allclose(linen.apply(variables, x), module(x), atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_from_a_trained_convolution_comes_the_fit(name):
    conv = nnx.Conv(4, 6, (3, 3), padding=1, rngs=nnx.Rngs(0), **WEIGHTS)
    make, method = getattr(fj, f"{name}Conv"), getattr(fj, name)(**SETTINGS[name])
    layer = make.from_conv(conv, **SETTINGS[name])
    assert type(layer) is make
    assert (
        layer.padding == conv.padding
        or layer.spec.padding
        == fj.ConvSpec(in_features=4, out_features=6, kernel_size=(3, 3), padding=1).padding
    )
    decided = method.for_layer(layer.spec, conv.kernel[...][None])
    fitted = fj.fit(conv.kernel[...], decided, spec=layer.spec)
    for parameter, value in fitted.items():
        np.testing.assert_allclose(layer.params[parameter], value, atol=1e-5)
    np.testing.assert_array_equal(layer.bias[...], conv.bias[...])


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
