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
