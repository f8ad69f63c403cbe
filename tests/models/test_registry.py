import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.models import MODELS, get_model, method_unit


@pytest.mark.parametrize(
    ("name", "classes", "channels"), [(n, 7, c) for n in MODELS for c in (1, 3)]
)
def test_forward_shapes(name, classes, channels):
    def forward():
        model = get_model(
            name, num_classes=classes, in_features=channels, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
        return model(jnp.ones((2, 32, 32, channels)))

    assert jax.eval_shape(forward) == jax.ShapeDtypeStruct((2, classes), jnp.float32)


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
    model = nnx.eval_shape(lambda: get_model(name, rngs=nnx.Rngs(0)))
    convs = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Conv)]
    assert len(convs) == convolutions
    biased = [conv for conv in convs if conv.bias is not None]
    assert all(conv.kernel_size == (3, 3) for conv in biased)
    assert all(conv.kernel_size == (1, 1) for conv in convs if conv.bias is None)


def test_parameters_and_statistics_are_float32_whatever_the_computation():
    model = nnx.eval_shape(lambda: get_model("vgg8_cifar", dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    convs = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Conv)]
    assert {conv.dtype for conv in convs} == {jnp.bfloat16}


def test_units_of_a_method():
    unit = method_unit(fj.Falcon(rank=2))
    model = nnx.eval_shape(lambda: get_model("resnet18_cifar", unit=unit, rngs=nnx.Rngs(0)))
    assert type(model.stem.conv) is nnx.Conv
    block = model.stages[1][0]
    assert block.unit1.conv.method == block.unit2.conv.method == fj.Falcon(rank=2)
    assert block.unit1.conv.bias is None
    assert block.unit1.conv.spec.strides == (2, 2)
    assert type(block.shortcut.conv) is nnx.Conv
    vgg = nnx.eval_shape(lambda: get_model("vgg8_cifar", unit=unit, rngs=nnx.Rngs(0)))
    assert type(vgg.stages[0][0].conv) is fj.FalconConv


def test_an_unknown_model_lists_the_known_ones_and_the_nearest():
    with pytest.raises(ValueError, match="no model is called 'vgg91_cifar'") as caught:
        get_model("vgg91_cifar", rngs=nnx.Rngs(0))
    assert all(name in str(caught.value) for name in MODELS)
    assert "Did you mean 'vgg" in str(caught.value)
