import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.models import model_shapes
from tests.nn.weights import draw

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
# FSNet, Table 2: parameters of the network and of its filter summaries at ratio 4.
PUBLISHED = {
    "resnet56_cifar": (860_083, 221_935),
    "resnet110_cifar": (1_739_113, 447_781),
    "resnet164_cifar": (1_729_440, 472_092),
}


@functools.cache
def standard(name):
    return model_shapes(name)


def statistics(model):
    """BatchNorm's running means and variances, and PyTorch's counter of batches in each."""
    sizes = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.BatchStat)))
    return sizes + sum(isinstance(module, nnx.BatchNorm) for _, module in nnx.iter_modules(model))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    model = standard(name)
    rules = [fj.Rule(method=fj.FilterSummary(ratio=4.0))]
    plan = fj.make_plan(model, rules, solver="random")
    assert len(plan.replaced) == len(plan.rows)
    counts = (plan.before.params, plan.after.params)
    assert tuple(count + statistics(model) for count in counts) == PUBLISHED[name]


def test_published_counts_are_those_of_the_arrays():
    model = standard("resnet56_cifar")
    plan = fj.make_plan(model, [fj.Rule(method=fj.FilterSummary(ratio=4.0))], solver="random")
    trained = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nnx.state(model))
    small = fj.compress(nnx.merge(nnx.graphdef(model), trained), plan)
    counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(small, nnx.Param)))
    assert counted + statistics(small) == PUBLISHED["resnet56_cifar"][1]


@pytest.mark.parametrize(
    ("name", "layers", "shortcuts"),
    [
        ("resnet20_cifar", 20, 2),
        ("resnet56_cifar", 56, 2),
        ("resnet110_cifar", 110, 2),
        ("resnet164_cifar", 164, 3),
    ],
)
def test_layers_are_those_of_the_name(name, layers, shortcuts):
    convs = [m for _, m in nnx.iter_modules(standard(name)) if isinstance(m, nnx.Conv)]
    assert len(convs) - shortcuts + 1 == layers
    assert all(conv.bias is None for conv in convs)


def test_mult_adds_of_resnet_20_by_hand():
    expected, size, inputs = 32**2 * 27 * 16, 32, 16
    for width in (16, 32, 64):
        size //= 1 if width == 16 else 2
        first = 9 * inputs * width + (inputs * width if inputs != width else 0)
        expected += size**2 * (first + 5 * 9 * width**2)
        inputs = width
    expected += 64 * 10 + 10
    assert fj.profile(standard("resnet20_cifar"), IMAGE).mult_adds == expected


def test_options():
    options = {"num_classes": 7, "in_features": 1, "width": 0.5, "dtype": jnp.bfloat16}
    model = model_shapes("resnet20_cifar", **options)
    logits = nnx.eval_shape(lambda model: model(jnp.ones((2, 32, 32, 1))), model)
    assert logits == jax.ShapeDtypeStruct((2, 7), jnp.float32)
    assert model.stem.conv.out_features == 8


def test_resnet_20_runs():
    model = fj.models.resnet20_cifar(rngs=nnx.Rngs(0), width=0.25)
    model.eval()
    logits = nnx.jit(lambda model, x: model(x))(model, draw(2, 8, 8, 3))
    assert bool(jnp.isfinite(logits).all())
    assert float(jnp.abs(logits[0] - logits[1]).max()) > 0
