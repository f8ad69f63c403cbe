import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.frameworks.nnx_norms import FoldedBatchNorm
from tests.compression.networks import Nested, Small, arrays, conv, images, randomised


def folded_paths(model):
    return [
        "/".join(map(str, path))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, FoldedBatchNorm)
    ]


def test_outputs_stay_and_every_norm_after_a_convolution_goes():
    model = randomised(Small(nnx.Rngs(0)))
    before = arrays(model)
    folded = fj.fold_batchnorm(model, images())
    assert sorted(folded_paths(folded)) == ["norm1", "norm2"]
    np.testing.assert_allclose(folded(images()), model(images()), atol=1e-5)
    for name, value in arrays(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_only_what_directly_follows_a_convolution_is_folded():
    model = randomised(Nested(nnx.Rngs(0)))
    folded = fj.fold_batchnorm(model, images())
    assert folded_paths(folded) == ["pair/1"]  # the other one follows a product by 0.5
    np.testing.assert_allclose(folded(images()), model(images()), atol=1e-5)


class Awkward(nnx.Module):
    """Norms that must stay, and one without scale after a convolution without bias."""

    def __init__(self, rngs):
        self.first = conv(3, 4, use_bias=False, rngs=rngs)
        self.bare = nnx.BatchNorm(4, use_scale=False, rngs=rngs)
        self.branched = conv(4, 4, rngs=rngs)
        self.branch_norm = nnx.BatchNorm(4, rngs=rngs)
        self.twice = conv(4, 4, rngs=rngs)
        self.twice_norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        x = self.bare(self.first(x))
        y = self.branched(x)
        x = y + self.branch_norm(y)
        x = self.twice_norm(self.twice(x))
        return self.twice(x)


def test_norms_whose_convolution_is_used_elsewhere_stay():
    model = Awkward(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for norm in (model.bare, model.branch_norm, model.twice_norm):
        norm.mean[...] = jnp.asarray(rng.normal(size=4), jnp.float32)
        norm.var[...] = jnp.asarray(rng.uniform(0.5, 2, 4), jnp.float32)
    model.eval()
    folded = fj.fold_batchnorm(model, images())
    assert folded_paths(folded) == ["bare"]
    np.testing.assert_allclose(folded(images()), model(images()), atol=1e-5)


class Asking(nnx.Module):
    """Asks for the statistics of the batch in the call, of the second BatchNorm only."""

    def __init__(self, rngs):
        self.convs = nnx.List([conv(3, 4, rngs=rngs), conv(4, 4, rngs=rngs)])
        self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs), fj.BatchNorm(4, rngs=rngs)])

    def __call__(self, x):
        x = self.norms[0](self.convs[0](x), use_running_average=True)
        return self.norms[1](self.convs[1](x), use_running_average=False)


@pytest.mark.parametrize("function", [fj.fold_batchnorm, fj.deploy])
def test_norms_that_the_call_gives_statistics_of_the_batch_stay(function):
    model = Asking(nnx.Rngs(0))
    model.norms[0].mean[...] = jnp.arange(4.0)
    x = images()
    expected = Asking.__call__(nnx.clone(model), x)
    folded = function(model, x)
    np.testing.assert_allclose(folded(x), expected, atol=1e-4)
    if isinstance(folded, nnx.Module):
        assert folded_paths(folded) == ["norms/0"]


class Kept(nnx.Module):
    """Pairs of a convolution and a BatchNorm; only ``plain`` can be folded, and ``masked``."""

    def __init__(self, rngs):
        names = ("plain", "masked", "own", "noted", "tied", "other", "weighed", "mixed", "half")
        self.names = names
        self.convs = nnx.Dict({name: conv(3, 3, rngs=rngs) for name in names})
        self.norms = nnx.Dict({name: nnx.BatchNorm(3, rngs=rngs) for name in names})
        self.convs.other.kernel = self.convs.tied.kernel
        self.convs.weighed = nnx.WeightNorm(self.convs.weighed, rngs=rngs)
        self.convs.mixed = conv(3, 3, dtype=jnp.bfloat16, rngs=rngs)
        self.convs.half = conv(3, 3, param_dtype=jnp.bfloat16, dtype=jnp.float32, rngs=rngs)
        self.note = nnx.Variable(jnp.zeros(images().shape))
        random = np.random.default_rng(0)
        for norm in self.norms.values():
            norm.mean[...] = jnp.asarray(random.normal(size=3), jnp.float32)
            norm.var[...] = jnp.asarray(random.uniform(0.5, 2, 3), jnp.float32)
            norm.scale[...] = jnp.asarray(random.uniform(0.5, 2, 3), jnp.float32)

    def __call__(self, x):
        for name in self.names:
            x, options = self.convs[name](x), {}
            if name == "noted":
                self.note[...] = x
            if name == "own":
                options = {"use_running_average": False}
            if name == "masked":
                options = {"mask": jnp.ones((1, 8, 8, 1), bool)}
            x = self.norms[name](x, **options)
        return x


def test_what_a_convolution_cannot_do_the_work_of_stays():
    model = Kept(nnx.Rngs(0))
    model.eval()
    folded = fj.fold_batchnorm(model, images())
    assert sorted(folded_paths(folded)) == ["norms/masked", "norms/plain"]
    expected = np.asarray(model(images()), np.float64)
    found = folded(images())
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    note = np.asarray(model.note[...])
    np.testing.assert_allclose(folded.note[...], note, atol=1e-5 * np.abs(note).max())


def test_a_folded_batchnorm_does_not_train():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.norm = conv(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x, train=False):
            return self.norm(self.conv(x), use_running_average=not train)

    folded = fj.fold_batchnorm(Model(nnx.Rngs(0)), images())
    assert folded_paths(folded) == ["norm"]
    with pytest.raises(ValueError, match=r"is folded into the convolution before it.*evaluation"):
        folded(images(), train=True)


class ScannedBlocks(nnx.Module):
    """Convolution and BatchNorm, stacked three times."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Sequential(conv(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))

        self.blocks = make(rngs)
        self.blocks.layers[1].mean[...] = jnp.asarray(
            np.random.default_rng(0).normal(size=(3, 3)), jnp.float32
        )

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return jax.nn.relu(block(x))

        return run(self.blocks, x)


def test_stacked_layers():
    model = ScannedBlocks(nnx.Rngs(0))
    model.eval()
    folded = fj.fold_batchnorm(model, images())
    assert len(folded_paths(folded)) == 1
    np.testing.assert_allclose(folded(images()), model(images()), atol=1e-5)


def test_folded_then_compressed_at_full_rank_nothing_changes():
    model = fj.models.vgg8_cifar(rngs=nnx.Rngs(0))
    randomised(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    folded = fj.fold_batchnorm(model, x)
    assert len(folded_paths(folded)) == 6
    plan = fj.make_plan(folded, [fj.Rule(method=fj.Decoupled(terms="full"))], x)
    expected = model(x)
    found = fj.compress(folded, plan)(x)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_sample_that_does_not_fit():
    with pytest.raises(ValueError, match="Small cannot be called on the sample"):
        fj.fold_batchnorm(Small(nnx.Rngs(0)), jnp.ones((2, 8, 8, 4)))
