"""ImageNet models against torchvision: parameter counts of all, logits of two."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from falcon_jax.models import MODELS, model_shapes
from falcon_jax.models.vgg import adaptive_average_pool

torch = pytest.importorskip("torch")

NAMES = [name for name in MODELS if not name.endswith("_cifar")]
RESNET_NAMES = {
    r"conv1\.": "stem.conv.",
    r"bn1\.": "stem.norm.",
    r"(layer\d\.\d+)\.conv(\d)\.": r"\1.unit\2.conv.",
    r"(layer\d\.\d+)\.bn(\d)\.": r"\1.unit\2.norm.",
    r"(layer\d\.\d+)\.downsample\.0\.": r"\1.shortcut.conv.",
    r"(layer\d\.\d+)\.downsample\.1\.": r"\1.shortcut.norm.",
    r"fc\.": "head.",
}


def params_of(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def our_name(name):
    for pattern, replacement in RESNET_NAMES.items():
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name)
    return name


def owner_of(model, name):
    """The module that stands where torchvision has a parameter, and the parameter's name."""
    *path, leaf = our_name(name).split(".")
    for step in path:
        model = model[int(step)] if step.isdigit() else getattr(model, step)
    if isinstance(model, nnx.BatchNorm):
        names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    else:
        names = {"weight": "kernel", "bias": "bias"}
    return getattr(model, names[leaf])


def our_layout(values):
    values = np.asarray(values)
    return values.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[values.ndim])


@pytest.mark.parametrize(
    "name", [n if n == "resnet18" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_every_parameter_of_torchvision_has_its_place(name, torchvision):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    ours = model_shapes(name)
    assert params_of(ours) == sum(p.numel() for p in theirs.parameters())
    places = set()
    for key, value in theirs.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        variable = owner_of(ours, key)
        places.add(id(variable))
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
        assert variable.shape == tuple(value.shape[axis] for axis in axes), key
    ours = nnx.state(ours, nnx.Any(nnx.Param, nnx.BatchStat))
    assert len(places) == len(jax.tree.leaves(ours))


def random_weights(state, rng):
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        if value.ndim > 1:
            values = rng.standard_normal(tuple(value.shape), np.float32)
            values *= (2 / value[0].numel()) ** 0.5
        else:
            values = rng.uniform(0.5, 1.5, tuple(value.shape))
        value.copy_(torch.from_numpy(values))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("resnet18", 64), ("vgg11_bn", 64)])
def test_logits_are_those_of_torchvision(name, side, torchvision):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(num_classes=7)
    theirs = theirs.to_empty(device="cpu").eval()
    rng = np.random.default_rng(0)
    ours = model_shapes(name, num_classes=7)
    random_weights(theirs.state_dict(), rng)
    for key, value in theirs.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            owner_of(ours, key).set_value(jnp.asarray(our_layout(value)))
    ours.eval()
    x = rng.standard_normal((2, side, side, 3), np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    graphdef, params, rest = nnx.split(ours, (nnx.Param, nnx.BatchStat), ...)
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.uint32), rest)
    model = nnx.merge(graphdef, params, rest)
    scale = np.abs(expected).max()
    assert np.isfinite(scale)
    assert scale > 1e-3
    np.testing.assert_allclose(
        model(jnp.asarray(x)) / scale, expected / scale, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("height", "width"), [(7, 7), (1, 2), (10, 9), (14, 3)])
def test_adaptive_average_pool(height, width):
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x).permute(0, 3, 1, 2), 7)
    y = adaptive_average_pool(jnp.asarray(x), 7)
    np.testing.assert_allclose(y, expected.permute(0, 2, 3, 1).numpy(), rtol=1e-5, atol=1e-6)
