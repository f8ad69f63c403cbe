"""Conv units: outputs against PyTorch's modules with equal weights, structure, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.models import branch_unit, channel_shuffle, gdg_unit, pdp_split_unit, pdp_unit
from falcon_jax.models.units import depthwise_3x3, pointwise
from tests.compression.networks import forward

torch = pytest.importorskip("torch")

FACTORIES = {
    "StConv-branch": branch_unit(),
    "FALCON-branch": branch_unit(fj.Falcon(rank=2)),
    "PDPConv": pdp_unit(0.5),
    "PDPConv-split": pdp_split_unit,
    "GDGConv": gdg_unit(2),
}


def build(factory, m, n, strides, activate=True):
    unit = factory(m, n, strides=strides, activate=activate, dtype=None, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, module in nnx.iter_modules(unit):
        if isinstance(module, nnx.BatchNorm):
            for variable in (module.scale, module.bias, module.mean, module.var):
                values = rng.uniform(0.5, 1.5, variable.shape)
                variable.set_value(jnp.asarray(values, jnp.float32))
        if isinstance(module, nnx.Conv) and module.bias is not None:
            values = rng.normal(size=module.bias.shape)
            module.bias.set_value(jnp.asarray(values, jnp.float32))
    unit.eval()
    return unit


def tensor(array):
    return torch.from_numpy(np.array(array))


def conv(x, module):
    """A convolution of ours, carried out by PyTorch."""
    strides = module.strides if isinstance(module.strides, int) else module.strides[0]
    return torch.nn.functional.conv2d(
        x,
        tensor(module.kernel[...]).permute(3, 2, 0, 1),
        None if module.bias is None else tensor(module.bias[...]),
        stride=strides or 1,
        padding=module.kernel_size[0] // 2,
        groups=module.feature_group_count,
    )


def unit_of(x, unit, activation=torch.relu):
    x = conv(x, unit.conv)
    x = torch.nn.functional.batch_norm(
        x, *(tensor(v[...]) for v in (unit.norm.mean, unit.norm.var, unit.norm.scale)),
        tensor(unit.norm.bias[...]), eps=1e-5,
    )  # fmt: skip
    return x if activation is None else activation(x)


def shuffled(parts):
    return torch.nn.functional.channel_shuffle(torch.cat(parts, 1), 2)


def branch_reference(unit, x, m, n, strides):
    if m == n and strides == 1:
        return shuffled([x[:, : n // 2], unit_of(x[:, n // 2 :], unit.right)])
    return shuffled([unit_of(x, unit.left), unit_of(x, unit.right)])


def split_reference(unit, x, m, n, strides):
    def right(x):
        first, second, third = unit.right.layers
        return unit_of(unit_of(unit_of(x, first), second, None), third)

    if m == n and strides == 1:
        return shuffled([x[:, : n // 2], right(x[:, n // 2 :])])
    first, second = unit.left.layers
    return shuffled([unit_of(unit_of(x, first, None), second), right(x)])


def pdp_reference(unit, x, m, n, strides):
    relu6 = torch.nn.functional.relu6
    y = unit_of(unit_of(x, unit.expand, relu6), unit.depthwise, relu6)
    y = unit_of(y, unit.project, None)
    if strides != 1:
        return y
    return y + (x if m == n else unit_of(x, unit.shortcut, None))


def gdg_reference(unit, x, m, n, strides):
    y = torch.nn.functional.channel_shuffle(unit_of(x, unit.compress), 2)
    y = unit_of(unit_of(y, unit.depthwise, None), unit.expand, None)
    if strides != 1:
        x = torch.nn.functional.avg_pool2d(x, 3, strides, padding=1)
    return torch.relu(x + y if m == n else torch.cat([x, y], 1))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("StConv-branch", branch_reference),
        ("PDPConv", pdp_reference),
        ("PDPConv-split", split_reference),
        ("GDGConv", gdg_reference),
    ],
)
@pytest.mark.parametrize(
    ("m", "n", "strides", "size"),
    [
        (16, 16, 1, 5),
        (16, 32, 1, 6),
        pytest.param(16, 16, 2, 7, marks=pytest.mark.slow),
        (16, 32, 2, 6),
    ],
)
def test_outputs_are_those_of_pytorch(name, reference, m, n, strides, size):
    unit = build(FACTORIES[name], m, n, strides)
    x = np.random.default_rng(1).normal(size=(2, size, size, m)).astype(np.float32)
    y = forward(unit, x)  # in one program
    expected = reference(unit, tensor(x).permute(0, 3, 1, 2), m, n, strides)
    expected = expected.permute(0, 2, 3, 1).numpy()
    assert y.shape == (2, -(-size // strides), -(-size // strides), n)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strides", [1, 2])
def test_falcon_branch_is_the_branch_unit_compressed(strides):
    unit = build(branch_unit(), 16, 32, strides)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 16)), jnp.float32)
    plan = fj.make_plan(unit, [fj.Rule(method=fj.Falcon(rank="full"))], x)
    assert [row.path for row in plan.replaced] == ["left/conv", "right/conv"]
    small = fj.compress(unit, plan)
    assert isinstance(small.right.conv, fj.FalconConv)
    np.testing.assert_allclose(small(x), unit(x), rtol=1e-4, atol=1e-4)
    factory = branch_unit(fj.Falcon(rank="full"))
    made = build(factory, 16, 32, strides)
    shapes = [jax.tree.map(jnp.shape, nnx.state(u, nnx.Param)) for u in (small, made)]
    assert shapes[0] == shapes[1]


def test_gdgconv_without_activation():
    unit = build(gdg_unit(2), 16, 16, 1, activate=False)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 16)), jnp.float32)
    active = build(gdg_unit(2), 16, 16, 1)
    assert float(unit(x).min()) < 0
    np.testing.assert_allclose(jax.nn.relu(unit(x)), active(x), rtol=1e-6)


@pytest.mark.parametrize("name", FACTORIES)
def test_bfloat16_and_gradients(name):
    unit = FACTORIES[name](16, 32, strides=2, activate=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 6, 6, 16), jnp.bfloat16)

    @nnx.jit
    def gradient(unit):
        return nnx.grad(lambda unit: jnp.sum(unit(x).astype(jnp.float32) ** 2))(unit)

    assert nnx.eval_shape(lambda unit: unit(x), unit).dtype == jnp.bfloat16
    grads = gradient(unit)
    leaves = jax.tree.leaves(grads)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize("name", ["PDPConv", "PDPConv-split", "GDGConv"])
def test_nothing_in_the_other_units_is_replaced_by_default(name):
    unit = build(FACTORIES[name], 16, 32, 1)
    plan = fj.make_plan(unit, None, jnp.ones((1, 6, 6, 16)))
    assert not plan.replaced
    assert len(plan.rows) >= 3


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fast_convolutions_are_convolutions(groups):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 6, 8)), jnp.float32)
    for module in (
        pointwise(8, 12, groups=groups, use_bias=True, dtype=None, rngs=nnx.Rngs(0)),
        depthwise_3x3(8, 1 + groups % 2, use_bias=True, dtype=None, rngs=nnx.Rngs(0)),
    ):
        y = module(x)
        module.conv_general_dilated = jax.lax.conv_general_dilated
        np.testing.assert_allclose(y, module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_channel_shuffle(groups):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 12)).astype(np.float32)
    expected = torch.nn.functional.channel_shuffle(torch.from_numpy(x).permute(0, 3, 1, 2), groups)
    y = channel_shuffle(jnp.asarray(x), groups)
    np.testing.assert_array_equal(y, expected.permute(0, 2, 3, 1).numpy())


def test_channels_that_do_not_divide():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="5 groups do not divide 12 channels"):
        channel_shuffle(jnp.ones((2, 12)), 5)
    cases = [
        (branch_unit(), 8, 15, "branch unit from 8 to 15 channels cannot be halved.*14 or 16"),
        (pdp_split_unit, 9, 9, "PDPConv-split from 9 to 9 channels cannot be halved"),
        (pdp_unit(0.1), 8, 16, "PDPConv from 8 to 16 channels has no inner channels"),
        (gdg_unit(3), 16, 16, "GDGConv from 16 to 16 channels: groups=3 does not divide"),
        (gdg_unit(2), 3, 64, "GDGConv from 3 to 64 channels: groups=2 does not divide the 3"),
        (gdg_unit(2), 32, 16, "GDGConv from 32 to 16 channels has -16 channels to make"),
    ]
    for factory, m, n, message in cases:
        with pytest.raises(ValueError, match=message):
            factory(m, n, strides=1, activate=True, dtype=None, rngs=rngs)
    with pytest.raises(ValueError, match="groups"):
        gdg_unit(0)
