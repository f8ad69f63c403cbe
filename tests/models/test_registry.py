import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.models import MODELS, get_model, method_unit, model_shapes

CASES = [(n, c) for n in MODELS for c in (1, 3)][::5]
LARGE = ("resnet101", "resnet152", "resnet110", "resnet164")


@pytest.mark.parametrize(
    ("name", "channels"),
    [pytest.param(n, c, marks=[pytest.mark.slow] if n.startswith(LARGE) else []) for n, c in CASES],
)
def test_forward_shapes(name, channels):
    model = model_shapes(name, num_classes=7, in_features=channels, dtype=jnp.bfloat16)
    logits = nnx.eval_shape(lambda model: model(jnp.ones((2, 32, 32, channels))), model)
    assert logits == jax.ShapeDtypeStruct((2, 7), jnp.float32)


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [
        ("vgg16_cifar", 13),
        ("vgg19_cifar", 16),
        ("resnet18_cifar", 1 + 16 + 4),
        ("resnet34_cifar", 1 + 32 + 4),
    ],
)
def test_numbers_of_convolutions(name, convolutions):
    model = model_shapes(name)
    convs = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Conv)]
    assert len(convs) == convolutions
    biased = [conv for conv in convs if conv.bias is not None]
    assert all(conv.kernel_size == (3, 3) for conv in biased)
    assert all(conv.kernel_size == (1, 1) for conv in convs if conv.bias is None)


def test_parameters_and_statistics_are_float32_whatever_the_computation():
    model = model_shapes("vgg8_cifar", dtype=jnp.bfloat16)
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    convs = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Conv)]
    assert {conv.dtype for conv in convs} == {jnp.bfloat16}


def test_units_of_a_method():
    unit = method_unit(fj.Falcon(rank=2))
    model = model_shapes("resnet18_cifar", unit=unit)
    assert type(model.stem.conv) is nnx.Conv
    block = model.stages[1][0]
    assert block.unit1.conv.method == block.unit2.conv.method == fj.Falcon(rank=2)
    assert block.unit1.conv.bias is None
    assert block.unit1.conv.spec.strides == (2, 2)
    assert type(block.shortcut.conv) is nnx.Conv
    vgg = model_shapes("vgg8_cifar", unit=unit)
    assert type(vgg.stages[0][0].conv) is fj.FalconConv


def test_an_unknown_model_lists_the_known_ones_and_the_nearest():
    with pytest.raises(ValueError, match="no model is called 'vgg91_cifar'") as caught:
        get_model("vgg91_cifar", rngs=nnx.Rngs(0))
    assert all(name in str(caught.value) for name in MODELS)
    assert "Did you mean 'vgg" in str(caught.value)


@pytest.mark.parametrize("name", ["vgg8_cifar", "resnet18_cifar", "resnet18", "vgg11_bn"])
def test_a_width_multiplies_all_channels_rounded_down(name):
    narrow, full = model_shapes(name, width=0.3), model_shapes(name)
    convs = [
        [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Conv)]
        for model in (narrow, full)
    ]
    widths = [[conv.out_features for conv in found] for found in convs]
    closing = [512] if name == "vgg11_bn" else []
    assert sorted(widths[0]) == sorted([int(0.3 * n) for n in widths[1]] + closing)


def test_a_width_that_leaves_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"width=0.01 leaves no channel of 32"):
        get_model("vgg8_cifar", width=0.01, rngs=nnx.Rngs(0))


def test_shapes_are_those_of_the_model():
    shapes = nnx.state(model_shapes("vgg8_cifar"), nnx.Param)
    arrays = nnx.state(get_model("vgg8_cifar", rngs=nnx.Rngs(0)), nnx.Param)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, arrays)
