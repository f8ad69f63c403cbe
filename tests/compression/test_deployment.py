import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export

import falcon_jax as fj
from falcon_jax.frameworks.nnx_norms import FoldedBatchNorm
from tests.compression.networks import arrays, randomised
from tests.nn.weights import draw

METHODS = [
    fj.Falcon(rank=2),
    fj.Falcon(impl="gep"),
    fj.DepthwiseSeparable(rank=2),
    fj.Tucker(rank=4),
    fj.CP(rank=4),
    fj.FilterSummary(ratio=2.0),
]


@functools.cache
def network(method):
    model = fj.models.VGG(
        ((8,), (8, 8)), num_classes=3, hidden=4, unit=fj.models.method_unit(method),
        stem_unit=fj.models.standard_unit, rngs=nnx.Rngs(0),
    )  # fmt: skip
    model = randomised(model)
    model.eval()
    return model


def images(batch):
    return draw(batch, 8, 8, 3)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.label()} {m.options()}"[:24])
def test_gives_what_the_model_gives(method):
    model = network(method)
    before = arrays(model)
    function = fj.deploy(model, images(1), chunk=2)
    x = images(5)
    expected = model(x)
    for batch in (1, 4, 5):
        np.testing.assert_allclose(function(x[:batch]), expected[:batch], rtol=1e-4, atol=1e-4)
    for name, value in arrays(model).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("method", METHODS[:5], ids=lambda m: m.label())
def test_norms_after_compressed_convolutions_are_folded(method):
    folded = fj.fold_batchnorm(network(method), images(1))
    norms = [m for _, m in nnx.iter_modules(folded) if isinstance(m, nnx.BatchNorm)]
    gone = [m for _, m in nnx.iter_modules(folded) if isinstance(m, FoldedBatchNorm)]
    assert not norms and len(gone) == 3


def test_without_a_sample_and_with_a_batch_of_any_size_exported():
    model = network(fj.Falcon())
    x = images(3)
    np.testing.assert_allclose(fj.deploy(model)(x), model(x), rtol=1e-4, atol=1e-4)
    shape = export.symbolic_shape("b, 8, 8, 3")
    exported = export.export(fj.deploy(model, x))(jax.ShapeDtypeStruct(shape, jnp.float32))
    np.testing.assert_allclose(exported.call(x), model(x), rtol=1e-4, atol=1e-4)


class Mean(nnx.Module):
    """Its output has no batch axis."""

    def __call__(self, x):
        return x.mean()


def test_outputs_without_a_batch_axis_are_not_cut():
    x = images(4)
    np.testing.assert_allclose(fj.deploy(Mean(), x, chunk=3)(x), x.mean(), rtol=1e-6)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (3, 3))(x)
        return nn.BatchNorm(use_running_average=not train)(x).mean(axis=(1, 2))


def test_linen_modules_come_bound():
    module, x = Linen(), images(5)
    variables = module.init(jax.random.key(0), x, train=False)
    function = fj.deploy(module.bind(variables), fj.Inputs(x, train=False), chunk=2)
    expected = module.apply(variables, x, train=False)
    np.testing.assert_allclose(function(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"module\.bind\(variables\)"):
        fj.deploy(module)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1, 'auto' or None; got 0"):
        fj.deploy(Mean(), chunk=0)


@pytest.mark.parametrize(
    ("size", "batch", "chunk"), [(8, 40, 20), (256, 16, 8), (256, 15, 5), (256, 11, 8)]
)
def test_so_many_examples_go_through_together_as_have_32_mb(size, batch, chunk):
    layer = nnx.Conv(3, 16, (3, 3), rngs=nnx.Rngs(0))  # 4 MB an example at 256x256
    x = draw(batch, size, size, 3)
    function = fj.deploy(layer, x, native=False)
    np.testing.assert_allclose(function(x), layer(x), rtol=1e-4, atol=1e-4)
    assert f"{chunk},{size},{size},16" in str(jax.make_jaxpr(function)(x))


@pytest.mark.usefixtures("without_hook")
def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="'float32' or 'bfloat16'; got float16"):
        fj.deploy(Mean(), precision="float16")


def test_kernels_of_linen_modules_are_built_once():
    module, x = Linen(), images(5)
    model = module.bind(module.init(jax.random.key(0), x, train=False))
    sample = fj.Inputs(x, train=False)
    rules = [fj.Rule(method=fj.FilterSummary(ratio=2.0))]
    small = fj.compress(model, fj.make_plan(model, rules, sample))
    function = fj.deploy(small, sample)
    np.testing.assert_allclose(function(x), small(x, train=False), rtol=1e-5, atol=1e-5)
    assert "gather" not in str(jax.make_jaxpr(function)(x))
    assert "gather" in str(jax.make_jaxpr(lambda x: small(x, train=False))(x))
