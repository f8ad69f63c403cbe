import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import falcon_jax as fj
from tests.compression.networks import Small, arrays, conv, images, randomised

# Of unequal size: every point counts as much as any other.
BATCHES = [images(seed=0), images(seed=1), 3 * images(seed=2)[:1]]


@pytest.fixture(scope="module")
def reestimated():
    model = randomised(Small(nnx.Rngs(0)))
    model.train()
    before = arrays(model)
    new = fj.reestimate_batchnorm(model, iter(BATCHES))
    assert not model.norm1.use_running_average  # the original is not changed
    for path, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[path])
    return model, new


def expected_statistics(model, batches):
    """Mean and variance of all points that reach each BatchNorm, in float64."""
    points = {"norm1": [], "norm2": []}
    for x in batches:
        for i in "12":
            norm = getattr(model, f"norm{i}")
            y = np.asarray(getattr(model, f"conv{i}")(x), np.float64)
            points[f"norm{i}"].append(y.reshape(-1, y.shape[-1]))
            mean, var = y.mean(axis=(0, 1, 2)), y.var(axis=(0, 1, 2))
            scale, bias = (np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias))
            y = (y - mean) / np.sqrt(var + 1e-5) * scale + bias
            x = jnp.asarray(np.maximum(y, 0), jnp.float32)
    whole = {name: np.concatenate(values) for name, values in points.items()}
    return {name: (y.mean(axis=0), y.var(axis=0)) for name, y in whole.items()}


def test_statistics_are_those_of_numpy(reestimated):
    model, new = reestimated
    for name, (mean, var) in expected_statistics(model, BATCHES).items():
        norm = getattr(new, name)
        np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.var[...], var, rtol=1e-4, atol=1e-5)


def test_nothing_else_changes(reestimated):
    model, new = reestimated
    before, after = arrays(model), arrays(new)
    assert before.keys() == after.keys()
    for path in before:
        if not path.endswith(("mean", "var")):
            np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    assert (new.norm1.momentum, new.norm2.momentum) == (0.9, 0.8)
    assert new.norm1.use_running_average
    assert new.dropout.deterministic


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="at least one batch of inputs; got none"):
        fj.reestimate_batchnorm(Small(nnx.Rngs(0)), [])


def test_a_model_without_batchnorm_is_copied():
    model = conv(3, 4, rngs=nnx.Rngs(0))
    new = fj.reestimate_batchnorm(model, BATCHES)
    assert new is not model
    np.testing.assert_array_equal(new.kernel[...], model.kernel[...])


def test_inputs_as_tuples():
    class TwoInputs(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, a, b):
            return self.norm(a - b)

    a, b = BATCHES[:2]
    new = fj.reestimate_batchnorm(TwoInputs(nnx.Rngs(0)), [(a, b)])
    np.testing.assert_allclose(
        new.norm.mean[...], np.asarray(a - b, np.float64).mean(axis=(0, 1, 2)), atol=1e-6
    )


def pooled(values, axes=(0, 1, 2)):
    whole = np.concatenate([np.asarray(v, np.float64) for v in values])
    return whole.mean(axis=axes), whole.var(axis=axes)


def assert_statistics(norm, values):
    mean, var = pooled(values)
    np.testing.assert_allclose(norm["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm["var"], var, rtol=1e-4, atol=1e-5)


def of(norm):
    return {"mean": norm.mean[...], "var": norm.var[...]}


class Deciding(nnx.Module):
    """Decides in the call; one BatchNorm is called twice, one only on demand."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, axis_name="data", rngs=rngs)
        self.twice = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.rare = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x, *, train=False, scale=1.0, rare=False):
        y = self.norm(scale * x, use_running_average=not train)
        y = self.twice(x, use_running_average=True) + self.twice(2 * x, not train) + y
        return self.rare(y) if rare else y


@pytest.mark.parametrize("options", [{}, {"train": True}])
def test_whatever_the_model_decides_in_the_call(options):
    model = Deciding(nnx.Rngs(0))
    batches = [fj.Inputs(x, scale=2.0, **options) for x in BATCHES]
    with pytest.warns(UserWarning, match="no batch reached the BatchNorms rare; they stay"):
        new = fj.reestimate_batchnorm(model, batches)
    assert_statistics(of(new.norm), [2 * x for x in BATCHES])
    assert_statistics(of(new.twice), [y for x in BATCHES for y in (x, 2 * x)])
    np.testing.assert_array_equal(new.rare.mean[...], model.rare.mean[...])
    assert (new.norm.axis_name, new.twice.momentum) == ("data", 0.5)
    assert type(new.norm) is nnx.BatchNorm and not hasattr(new.norm, "points")


def test_batches_with_constants_of_their_own():
    model = nnx.Sequential(Deciding(nnx.Rngs(0)))
    batches = [fj.Inputs(x, scale=s, rare=True) for x, s in zip(BATCHES, (1, 2, 1), strict=True)]
    new = fj.reestimate_batchnorm(model, batches)
    scaled = [s * x for x, s in zip(BATCHES, (1, 2, 1), strict=True)]
    assert_statistics(of(new.layers[0].norm), scaled)


def test_stacked_layers_have_statistics_of_their_own():
    class Scanned(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.BatchNorm(3, rngs=rngs), in_axes=0)
            self.norms = nnx.split_rngs(splits=2)(make)(rngs)

        def __call__(self, x):
            run = nnx.scan(
                nnx.remat(lambda norm, x: 2 * norm(x) + 1),
                in_axes=(0, nnx.Carry),
                out_axes=nnx.Carry,
            )
            return run(self.norms, x)

    new = fj.reestimate_batchnorm(Scanned(nnx.Rngs(0)), BATCHES)
    mean, var = pooled(BATCHES)
    np.testing.assert_allclose(new.norms.mean[0], mean, atol=1e-5)
    np.testing.assert_allclose(new.norms.var[0], var, rtol=1e-4)
    np.testing.assert_allclose(new.norms.mean[1], np.ones(3), atol=1e-5)


def test_masked_points_do_not_count():
    class Masked(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x, mask):
            return self.norm(x, mask=mask)

    x = BATCHES[0]
    masks = [np.zeros(x.shape, bool), np.ones(x.shape, bool)]
    masks[0][:, :3] = True
    new = fj.reestimate_batchnorm(Masked(nnx.Rngs(0)), [(x, masks[0]), (2 * x, masks[1])])
    seen = np.concatenate([x[:, :3].reshape(-1, 3), 2 * x.reshape(-1, 3)]).astype(np.float64)
    np.testing.assert_allclose(new.norm.mean[...], seen.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(new.norm.var[...], seen.var(axis=0), rtol=1e-4)


class Trained(nnx.BatchNorm):
    """Has another signature than its parent."""

    def __call__(self, x, train=False):
        return super().__call__(x, use_running_average=not train) + 1


class Siblings(nnx.Module):
    """BatchNorms of every kind, all of one input."""

    def __init__(self, rngs):
        self.damaged = nnx.BatchNorm(3, rngs=rngs)
        self.damaged.mean[...] = jnp.full(3, jnp.nan)
        self.damaged.var[...] = jnp.full(3, jnp.inf)
        self.trained = Trained(3, rngs=rngs)
        self.fast = fj.BatchNorm(3, rngs=rngs)
        self.half = nnx.BatchNorm(3, rngs=rngs)
        self.half.mean.set_value(jnp.zeros(3, jnp.bfloat16))
        self.partial = functools.partial(nnx.BatchNorm(3, rngs=rngs), use_running_average=True)
        make = nnx.vmap(lambda rngs: nnx.BatchNorm(3, rngs=rngs), in_axes=0, out_axes=1)
        self.stacked = nnx.split_rngs(splits=2)(make)(rngs)
        self.mapped = nnx.BatchNorm(3, axis_name="rows", rngs=rngs)
        self.masked = nnx.BatchNorm(3, rngs=rngs)
        self.average = nnx.BatchStat(jnp.zeros(3))

    def __call__(self, x):
        for layer in (self.damaged, self.trained, self.half, self.partial):
            layer(x)
        self.fast(x, use_running_average=False)
        nnx.vmap(lambda norm, x: norm(x), in_axes=(1, None))(self.stacked, x)
        nnx.vmap(lambda norm, x: norm(x), in_axes=(None, 1), axis_name="rows")(self.mapped, x)
        self.masked(x, mask=jnp.arange(3)[None, None] < jnp.arange(x.shape[1])[:, None, None])
        return x


@pytest.fixture(scope="module")
def siblings():
    # Far from 0, where E[x^2] - E[x]^2 has lost all digits of the variance.
    batches = [x + 1000 for x in BATCHES]
    model = Siblings(nnx.Rngs(0))
    with pytest.warns(UserWarning, match="average are not the statistics of a BatchNorm of Flax"):
        return batches, model, fj.reestimate_batchnorm(model, batches)


@pytest.mark.parametrize("name", ["damaged", "trained", "fast", "mapped"])
def test_batchnorms_of_every_kind(siblings, name):
    batches, model, new = siblings
    norm = getattr(new, name)
    assert type(norm) is type(getattr(model, name))
    mean, var = pooled(batches)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-3)


def test_batchnorms_in_partials_stacked_otherwise_and_in_half_precision(siblings):
    batches, model, new = siblings
    mean, var = pooled(batches)
    np.testing.assert_allclose(new.partial.func.var[...], var, rtol=1e-3)
    assert not model.partial.func.mean[...].any()
    np.testing.assert_allclose(new.stacked.var[...], np.stack([var, var], axis=1), rtol=1e-3)
    assert new.half.mean.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(new.half.mean[...]), mean, rtol=0.004)
    np.testing.assert_array_equal(new.average[...], np.zeros(3))


def test_every_channel_has_a_mask_of_its_own(siblings):
    batches, _, new = siblings
    for channel in range(3):
        seen = np.concatenate([x[:, channel + 1 :, :, channel].ravel() for x in batches])
        seen = seen.astype(np.float64)
        np.testing.assert_allclose(new.masked.mean[channel], seen.mean(), rtol=1e-6)
        np.testing.assert_allclose(new.masked.var[channel], seen.var(), rtol=1e-3)


class TrainedLinen(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, train=False):
        return super().__call__(x, use_running_average=not train)


class LinenSiblings(nn.Module):
    """A subclass, spectral normalisation, whose vectors are statistics, too, and a counter."""

    @nn.compact
    def __call__(self, x):
        count = self.variable("counts", "calls", lambda: jnp.zeros(()))
        count.value += 1
        TrainedLinen(name="trained")(x)
        y = nn.SpectralNorm(nn.Conv(3, (1, 1)))(x, update_stats=False)
        return nn.BatchNorm(use_running_average=True, name="after")(y)


def test_linen_siblings():
    module = LinenSiblings()
    variables = module.init(jax.random.key(0), BATCHES[0])
    new = fj.reestimate_batchnorm(module.bind(variables), BATCHES)
    stats, before = (v["batch_stats"] for v in (new.variables, variables))
    assert_statistics(stats["trained"], BATCHES)
    convolved = [module.apply(variables, x, mutable=True, method=_convolved)[0] for x in BATCHES]
    assert_statistics(stats["after"], convolved)
    jax.tree.map(np.testing.assert_array_equal, stats["SpectralNorm_0"], before["SpectralNorm_0"])
    assert new.variables["counts"] == variables["counts"]


def _convolved(module, x):
    seen = []

    def note(next_fun, args, kwargs, context):
        if context.module.name == "after":
            seen.append(args[0])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        module(x)
    return seen[0]


def test_values_that_are_not_finite_are_refused():
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="the mean that layers/0 gets holds values that are not"):
        fj.reestimate_batchnorm(model, [BATCHES[0].at[0, 0].set(jnp.nan)])


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, rare=False):
        y = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        body = nn.BatchNorm(name="twice", momentum=0.5)
        y = body(x, use_running_average=True) + body(2 * x, use_running_average=not train) + y
        rare_norm = nn.BatchNorm(use_running_average=True, name="rare")
        return rare_norm(y) if rare or self.is_initializing() else y


@pytest.mark.parametrize("options", [{}, {"train": True}])
def test_linen_modules_come_and_go_bound(options):
    module = Linen()
    variables = module.init(jax.random.key(0), BATCHES[0])
    with pytest.warns(UserWarning, match="no batch reached the BatchNorms rare"):
        new = fj.reestimate_batchnorm(
            module.bind(variables), [fj.Inputs(x, **options) for x in BATCHES]
        )
    unbound, found = new.unbind()
    assert isinstance(unbound, Linen) and found.keys() == variables.keys()
    stats, params = found["batch_stats"], found["params"]
    assert_statistics(stats["norm"], BATCHES)
    assert_statistics(stats["twice"], [y for x in BATCHES for y in (x, 2 * x)])
    assert stats["rare"].keys() == {"mean", "var"}
    jax.tree.map(np.testing.assert_array_equal, params, variables["params"])
    jax.tree.map(np.testing.assert_array_equal, stats["rare"], variables["batch_stats"]["rare"])


def test_stacked_linen_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return 2 * nn.BatchNorm(use_running_average=True)(x) + 1, None

    module = nn.scan(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2
    )()
    variables = module.init(jax.random.key(0), BATCHES[0], None)
    new = fj.reestimate_batchnorm(module.bind(variables), [(x, None) for x in BATCHES])
    stats = new.variables["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["var"][0], pooled(BATCHES)[1], rtol=1e-4)
    np.testing.assert_allclose(stats["mean"][1], np.ones(3), atol=1e-5)


def test_what_cannot_be_estimated_is_told():
    with pytest.raises(ValueError, match=r"give module\.bind\(variables\)"):
        fj.reestimate_batchnorm(Linen(), BATCHES)
    with pytest.raises(ValueError, match="cannot be called on the sample"):
        fj.reestimate_batchnorm(Deciding(nnx.Rngs(0)), [fj.Inputs(BATCHES[0], oops=1)])

    class Idle(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return x

    with pytest.raises(ValueError, match=r"no batch reaches a BatchNorm \(norm\)"):
        fj.reestimate_batchnorm(Idle(nnx.Rngs(0)), BATCHES)
