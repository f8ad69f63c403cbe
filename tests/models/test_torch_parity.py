"""VGG19 and ResNet34 against PyTorch models written from falcon_counts.md, with equal weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.models.units import batch_norm

torch = pytest.importorskip("torch")


def unit(m, n, stride=1):
    return [torch.nn.Conv2d(m, n, 3, stride, padding=1), torch.nn.BatchNorm2d(n)]


def torch_vgg19(classes):
    layers, width = [], 3
    for n in [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4]:
        if n == "M":
            layers.append(torch.nn.MaxPool2d(2))
        else:
            layers += [*unit(width, n), torch.nn.ReLU()]
            width = n
    return torch.nn.Sequential(
        *layers,
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(512, 512),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(512, classes),
    )


class TorchBlock(torch.nn.Module):
    def __init__(self, m, n, stride):
        super().__init__()
        self.first = torch.nn.Sequential(*unit(m, n, stride), torch.nn.ReLU())
        self.second = torch.nn.Sequential(*unit(n, n))
        self.shortcut = torch.nn.Identity()
        if stride != 1 or m != n:
            self.shortcut = torch.nn.Sequential(
                torch.nn.Conv2d(m, n, 1, stride, bias=False), torch.nn.BatchNorm2d(n)
            )

    def forward(self, x):
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


def torch_resnet34(classes):
    blocks, width = [], 64
    for n, count in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        for index in range(count):
            blocks.append(TorchBlock(width, n, 1 if index else 2))
            width = n
    return torch.nn.Sequential(
        *unit(3, 64),
        torch.nn.ReLU(),
        *blocks,
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(512, classes),
    )


def units_in_order(model):
    """Convolutions, BatchNorms and linear layers of ours, in the order of PyTorch's modules."""
    if isinstance(model, fj.models.VGG):
        for stage in model.stages:
            for unit in stage:
                yield from (unit.conv, unit.norm)
        yield from (model.hidden, model.head)
        return
    yield from (model.stem.conv, model.stem.norm)
    for stage in model.stages:
        for block in stage:
            for unit in (block.unit1, block.unit2, block.shortcut):
                if unit is not None:
                    yield from (unit.conv, unit.norm)
    yield model.head


def random_weights(module, rng):
    """Random values for a PyTorch layer: BatchNorm's scales, offsets and statistics, too."""
    with torch.no_grad():
        if isinstance(module, torch.nn.BatchNorm2d):
            ranges = {"weight": (0.5, 1.5), "bias": (-0.5, 0.5)}
            ranges |= {"running_mean": (-0.5, 0.5), "running_var": (0.5, 1.5)}
            for name, (low, high) in ranges.items():
                value = getattr(module, name)
                value.copy_(torch.from_numpy(rng.uniform(low, high, value.shape)))
            return
        fan_in = module.weight[0].numel()
        for value in module.parameters():
            values = rng.standard_normal(tuple(value.shape), np.float32)
            value.copy_(torch.from_numpy(values * (2 / fan_in) ** 0.5))


def copy_weights(ours, theirs):
    def array(tensor, *axes):
        values = tensor.detach().numpy()
        return jnp.asarray(values.transpose(axes) if axes else values)

    if isinstance(theirs, torch.nn.BatchNorm2d):
        names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        for name, their_name in names.items():
            getattr(ours, name)[...] = array(getattr(theirs, their_name))
        return
    axes = (2, 3, 1, 0) if isinstance(theirs, torch.nn.Conv2d) else (1, 0)
    ours.kernel.set_value(array(theirs.weight, *axes))
    assert (ours.bias is None) == (theirs.bias is None)
    if theirs.bias is not None:
        ours.bias.set_value(array(theirs.bias))


def is_layer(module):
    return isinstance(module, (torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.Linear))


def zeros_like_shapes(build):
    shapes = nnx.eval_shape(build)
    graphdef, state = nnx.split(shapes)

    def filled(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.asarray(np.zeros(leaf.shape, leaf.dtype))

    return nnx.merge(graphdef, jax.tree.map(filled, state))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "reference"),
    [(fj.models.vgg19_cifar, torch_vgg19), (fj.models.resnet34_cifar, torch_resnet34)],
)
def test_logits_are_those_of_pytorch(build, reference):
    torch.manual_seed(0)
    theirs = reference(7).eval()
    ours = zeros_like_shapes(lambda: build(num_classes=7, rngs=nnx.Rngs(0)))
    ours.eval()
    rng = np.random.default_rng(0)
    layers = [module for module in theirs.modules() if is_layer(module)]
    for mine, layer in zip(units_in_order(ours), layers, strict=True):
        random_weights(layer, rng)
        copy_weights(mine, layer)
    x = rng.standard_normal((2, 32, 32, 3), np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    logits = jax.jit(lambda model, x: model(x))(ours, x)
    scale = np.abs(expected).max()
    assert np.isfinite(scale)
    assert scale > 1e-3
    np.testing.assert_allclose(logits / scale, expected / scale, rtol=1e-4, atol=1e-4)


def test_statistics_move_as_pytorch_moves_them():
    theirs = torch.nn.BatchNorm2d(6).train()
    ours = batch_norm(6, dtype=None, rngs=nnx.Rngs(0))
    ours.train()
    x = np.random.default_rng(0).normal(1, 2, size=(3, 4, 5, 6)).astype(np.float32)
    y = ours(jnp.asarray(x))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(y, expected.transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.mean[...], theirs.running_mean.numpy(), rtol=1e-5, atol=1e-6)
    # Flax keeps the biased variance, PyTorch the unbiased one: n / (n - 1).
    points = 3 * 4 * 5
    biased = (theirs.running_var.numpy() - 0.9) * (points - 1) / points + 0.9
    np.testing.assert_allclose(ours.var[...], biased, rtol=1e-5)
