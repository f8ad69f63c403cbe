"""torchvision's weights in our models: equal logits of every arch, and what does not fit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.models import MODELS, ResNet, model_shapes
from falcon_jax.models.resnet import BasicBlock
from tests.convert.conftest import assert_close

ARCHS = [name for name in MODELS if not name.endswith("_cifar")]


def with_random_streams(model):
    """Give a model of shapes, whose weights are there, the states of its generators."""
    graphdef, state, rest = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)

    def made(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.zeros(leaf.shape, leaf.dtype)

    model = nnx.merge(graphdef, state, jax.tree.map(made, rest))
    model.eval()
    return model


def images(side, count=2):
    return np.random.default_rng(0).standard_normal((count, side, side, 3), np.float32)


QUICK = ("resnet18", "vgg11_bn")


@pytest.mark.parametrize(
    "arch", [a if a in QUICK else pytest.param(a, marks=pytest.mark.slow) for a in ARCHS]
)
def test_logits_are_those_of_torchvision(
    arch, torch, torchvision_models, randomize, arrays, logits_of
):
    with torch.device("meta"):
        theirs = getattr(torchvision_models, arch)(num_classes=7)
    theirs = randomize(theirs.to_empty(device="cpu"))
    x = images(32 if arch.startswith("vgg") else 64)
    expected = logits_of(theirs, x).numpy()
    ours = fj.convert.torchvision(model_shapes(arch, num_classes=7), arrays(theirs))
    assert_close(with_random_streams(ours)(jnp.asarray(x)), expected)


def small_resnet(num_classes=3, **options):
    return ResNet(
        BasicBlock, (1, 1, 1, 1), num_classes=num_classes, width=1 / 16, rngs=nnx.Rngs(0), **options
    )


def small_weights(model):
    """A state dict in torchvision's names and layout for a small ResNet, written out by hand."""
    rng = np.random.default_rng(1)

    def of(variable, axes):
        return rng.uniform(0.5, 1.5, [variable.shape[axis] for axis in axes]).astype(np.float32)

    def norm(prefix, module):
        leaves = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
        named = {f"{prefix}.{k}": of(getattr(module, v), (0,)) for k, v in leaves.items()}
        return named | {f"{prefix}.num_batches_tracked": np.asarray(3)}

    kernel = (3, 2, 0, 1)
    state = {"conv1.weight": of(model.stem.conv.kernel, kernel), **norm("bn1", model.stem.norm)}
    for stage in range(1, 5):
        block = getattr(model, f"layer{stage}")[0]
        for number, unit in ((1, block.unit1), (2, block.unit2)):
            state[f"layer{stage}.0.conv{number}.weight"] = of(unit.conv.kernel, kernel)
            state |= norm(f"layer{stage}.0.bn{number}", unit.norm)
        if block.shortcut is not None:
            state[f"layer{stage}.0.downsample.0.weight"] = of(block.shortcut.conv.kernel, kernel)
            state |= norm(f"layer{stage}.0.downsample.1", block.shortcut.norm)
    state["fc.weight"] = of(model.head.kernel, (1, 0))
    state["fc.bias"] = of(model.head.bias, (0,))
    return state


def test_weights_have_our_layout_and_the_model_stays_as_it_was():
    model = small_resnet()
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    state = small_weights(model)
    new = fj.convert.torchvision(model, state)
    kernel = np.asarray(new.layer2[0].unit1.conv.kernel[...])
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), state["layer2.0.conv1.weight"])
    np.testing.assert_array_equal(new.stem.norm.var[...], state["bn1.running_var"])
    np.testing.assert_array_equal(np.asarray(new.head.kernel[...]).T, state["fc.weight"])
    after = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_floating_weights_take_the_type_of_the_model(dtype):
    model = small_resnet()
    state = {k: v.astype(dtype) for k, v in small_weights(model).items()}
    new = fj.convert.torchvision(model, state)
    assert new.head.kernel.dtype == jnp.float32
    np.testing.assert_array_equal(
        np.asarray(new.head.kernel[...]).T, state["fc.weight"].astype(np.float32)
    )


def test_everything_that_does_not_fit_is_told_at_once():
    model = small_resnet()
    state = small_weights(model)
    del state["layer1.0.bn1.running_mean"], state["conv1.weight"]
    state["layer3.0.conv2.weight"] = state["layer3.0.conv2.weight"][..., :1]
    state["bn1.weight"] = state["bn1.weight"].astype(np.int32)
    state |= {f"layer9.{i}.weight": np.zeros(1) for i in range(25)}
    with pytest.raises(ValueError, match="do not fit this ResNet") as caught:
        fj.convert.torchvision(model, state)
    message = str(caught.value)
    assert "layer1.0.bn1.running_mean is missing" in message
    assert "conv1.weight is missing" in message
    assert "layer3.0.conv2.weight has shape (16, 16, 3, 1) instead of (16, 16, 3, 3)" in message
    assert "bn1.weight is int32 instead of float32" in message
    assert all(f"layer9.{i}.weight is not expected" in message for i in range(25))
    assert len(message.splitlines()) == 1 + 4 + 25


def test_another_number_of_classes_offers_a_new_head_and_gives_it():
    state = small_weights(small_resnet(num_classes=5))
    model = small_resnet(num_classes=3)
    with pytest.raises(
        ValueError, match=r"5 classes in the weights and 3 in the model.*head='new'"
    ):
        fj.convert.torchvision(model, state)
    new = fj.convert.torchvision(model, state, head="new")
    np.testing.assert_array_equal(new.head.kernel[...], model.head.kernel[...])
    np.testing.assert_array_equal(new.stem.norm.mean[...], state["bn1.running_mean"])
    without_head = {k: v for k, v in state.items() if not k.startswith("fc.")}
    fj.convert.torchvision(model, without_head, head="new")


def test_weights_of_another_arch_are_refused():
    state = small_weights(small_resnet())
    with pytest.raises(ValueError, match="do not fit this ImageNetVGG"):
        fj.convert.torchvision(model_shapes("vgg11"), state)


def test_models_without_torchvision_weights_are_refused():
    with pytest.raises(ValueError, match=r"no torchvision weights for VGG; .*resnet18"):
        fj.convert.torchvision(model_shapes("vgg8_cifar"), {})


def test_timm_names_of_a_vgg_are_those_of_torchvision():
    shapes = model_shapes("vgg11", num_classes=3)
    ones = np.ones((), np.float32)
    state = {}
    for index, layer in enumerate(shapes.features):
        if isinstance(layer, nnx.Conv):
            m, n = layer.in_features, layer.out_features
            state[f"features.{index}.weight"] = np.broadcast_to(ones, (n, m, 3, 3))
            state[f"features.{index}.bias"] = np.zeros(n)
    first = np.arange(512 * 7 * 7, dtype=np.float32).reshape(512, 7, 7)
    timm = {
        "pre_logits.fc1.weight": np.broadcast_to(first, (4096, 512, 7, 7)),
        "pre_logits.fc1.bias": np.zeros(4096),
        "pre_logits.fc2.weight": np.broadcast_to(ones, (4096, 4096, 1, 1)),
        "pre_logits.fc2.bias": np.zeros(4096),
        "head.fc.weight": np.full((3, 4096), 2.0),
        "head.fc.bias": np.arange(3.0),
    }
    ours = fj.convert.torchvision(shapes, state | timm)
    np.testing.assert_array_equal(ours.classifier[0].kernel[...][:, 5], first.reshape(-1))
    np.testing.assert_array_equal(ours.classifier[6].bias[...], np.arange(3.0))
