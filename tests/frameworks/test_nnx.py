"""What NNX allows in a model: seen, compressed, deployed and saved, or refused in words."""

import copy
import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import falcon_jax as fj
from falcon_jax.frameworks.nnx_tree import clone
from falcon_jax.storage import open_compressed
from tests.compression.networks import images

FULL = [fj.Rule(method=fj.Falcon(rank="full"))]


def conv(m, n, rngs):
    return nnx.Conv(m, n, (3, 3), rngs=rngs)


class Holder(nnx.Pytree):
    def __init__(self, rngs):
        self.conv = conv(4, 4, rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    conv: nnx.Conv
    scale: jax.Array


@dataclasses.dataclass
class Plain:
    conv: nnx.Conv


class Held(nnx.Module):
    """Convolutions in a pytree of Flax's, in one of JAX's, and in a dataclass."""

    def __init__(self, rngs):
        self.stem = conv(3, 4, rngs)
        self.holder = Holder(rngs)
        self.registered = nnx.data(Registered(conv(4, 4, rngs), jnp.asarray(2.0)))
        self.plain = Plain(conv(4, 4, rngs))

    def __call__(self, x):
        x = self.registered.conv(self.holder.conv(self.stem(x))) * self.registered.scale
        return self.plain.conv(x)


def test_whatever_holds_a_convolution_is_planned_replaced_and_saved(tmp_path):
    model, x = Held(nnx.Rngs(0)), images()
    plan = fj.make_plan(model, FULL, x)
    names = ["stem", "holder/conv", "registered/conv", "plain/conv"]
    assert [row.path for row in plan.replaced] == names
    assert plan.before.params == 3 * (9 * 4 * 4 + 4) + 9 * 3 * 4 + 4
    small = fj.compress(model, plan)
    for layer in (small.holder.conv, small.registered.conv, small.plain.conv):
        assert type(layer) is fj.FalconConv
    np.testing.assert_allclose(small(x), model(x), atol=1e-4)
    fj.save_compressed(tmp_path / "model", small, plan)
    loaded = fj.load_compressed(tmp_path / "model", lambda: Held(nnx.Rngs(1)))
    np.testing.assert_array_equal(loaded(x), small(x))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b, self.c = (conv(3, 3, rngs) for _ in range(3))
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.c(self.b(self.a(x)))


class Computed(nnx.Module):
    """Standardises one kernel in the call, uses that of another layer for the second."""

    def __init__(self, rngs):
        self.a, self.b, self.c = (conv(3, 3, rngs) for _ in range(3))

    def __call__(self, x):
        layer = nnx.clone(self.a)
        layer.kernel = nnx.Param(self.a.kernel[...] / jnp.linalg.norm(self.a.kernel[...]))
        x = layer(x)
        self.b.kernel = nnx.Param(2 * self.b.kernel[...])
        return self.c(self.b(x))


class OtherAxis(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(lambda r: nnx.Conv(3, 3, (3, 3), use_bias=False, rngs=r), out_axes=2)
        self.layers = nnx.split_rngs(splits=2)(make)(rngs)
        self.c = conv(3, 3, rngs)

    def __call__(self, x):
        run = nnx.scan(lambda layer, x: layer(x), in_axes=(2, nnx.Carry), out_axes=nnx.Carry)
        return self.c(run(self.layers, x))


@pytest.mark.parametrize(
    ("cls", "reasons"),
    [
        (Tied, {"a": "shared with 'b'", "b": "shared with 'a'"}),
        (Computed, {"b": "kernel computed in the call"}),
        (OtherAxis, {"layers": "axis other than the first"}),
    ],
)
def test_kernels_that_are_not_the_layers_own_stay_with_their_reason(cls, reasons):
    model = cls(nnx.Rngs(0))
    plan = fj.make_plan(model, FULL, images())
    stays = {row.path: row.reason for row in plan.rows if row.method is None}
    for path, reason in reasons.items():
        assert reason in stays[path]
    assert [row.path for row in plan.replaced] == ["c"]
    expected = nnx.clone(model)(images())
    np.testing.assert_allclose(fj.compress(model, plan)(images()), expected, atol=1e-4)


class TiedBias(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b, self.c = (conv(3, 3, rngs) for _ in range(3))
        self.b.bias = self.a.bias

    def __call__(self, x):
        return self.c(self.b(self.a(x)))


class ReadElsewhere(nnx.Module):
    """Uses one kernel for the way back, too, and decides by another one."""

    def __init__(self, rngs):
        self.a, self.b, self.c = (conv(3, 3, rngs) for _ in range(3))

    def __call__(self, x):
        y = self.c(self.b(self.a(x)))
        penalty = jnp.sum(self.b.kernel[...] ** 2)
        return jax.lax.conv_transpose(y, self.a.kernel[...], (1, 1), "SAME"), penalty


class Halved(nnx.Param):
    def get_value(self, *args, **options):
        return super().get_value(*args, **options) / 2


class ComputedWhenRead(nnx.Module):
    def __init__(self, rngs):
        self.a, self.c = conv(3, 3, rngs), conv(3, 3, rngs)
        self.a.kernel = Halved(self.a.kernel[...])

    def __call__(self, x):
        return self.c(self.a(x))


@pytest.mark.parametrize(
    ("cls", "reasons"),
    [
        (TiedBias, {"a": "bias shared with 'b'", "b": "bias shared with 'a'"}),
        (ReadElsewhere, dict.fromkeys("ab", "kernel used elsewhere in the call, too")),
        (ComputedWhenRead, {"a": "kernel computed when it is read"}),
    ],
)
def test_what_the_layer_does_not_have_for_itself_stays_with_its_reason(cls, reasons):
    model = cls(nnx.Rngs(0))
    plan = fj.make_plan(model, FULL, images())
    assert {row.path: row.reason for row in plan.rows if row.method is None} == reasons
    small = fj.compress(model, plan)
    for a, b in zip(*map(jax.tree.leaves, (small(images()), model(images()))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_parameters_of_two_modules_count_once():
    for cls in (Tied, TiedBias):
        model = cls(nnx.Rngs(0))
        there = sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param)))
        assert fj.profile(model, images()).params == there


class Frozen(nnx.Param):
    pass


def test_compressed_layers_keep_the_type_and_the_metadata_of_their_variables():
    layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), bias_metadata={"group": "late"})
    layer.kernel = Frozen(layer.kernel[...], group="early")
    small = fj.compress(layer, fj.make_plan(layer, FULL))
    for name in ("pointwise", "depthwise"):
        variable = getattr(small, name)
        assert (type(variable), variable.group) == (Frozen, "early")
    assert small.bias.group == "late"
    small.bias[...] += 1
    assert not layer.bias[...].any()


def test_compressed_models_are_pickled_and_copied():
    model, x = TiedBias(nnx.Rngs(0)), images()
    small = fj.compress(model, fj.make_plan(model, FULL, x))
    for new in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small), nnx.clone(small)):
        np.testing.assert_array_equal(new(x), small(x))


def test_attributes_of_a_compressed_layer_can_be_set():
    layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    small, x = fj.compress(layer, fj.make_plan(layer, FULL)), images()
    for name in vars(layer):
        if name not in ("kernel", "bias", "kernel_shape") and not name.startswith("_"):
            setattr(small, name, getattr(layer, name))
    np.testing.assert_allclose(small(x), layer(x), atol=1e-5)
    for each in (layer, small):
        each.strides, each.padding, each.use_bias = (2, 1), "VALID", False
    np.testing.assert_allclose(small(x), layer(x), atol=1e-5)
    assert (small.strides, small.padding, small.use_bias) == ((2, 1), "VALID", False)
    with pytest.raises(ValueError, match="they would be of shape"):
        small.kernel_size = (5, 5)


class LaidOut(nnx.Module):
    """Says where its activations lie, as kernels split over channels want it."""

    def __init__(self, rngs):
        self.a, self.b = conv(3, 8, rngs), conv(8, 8, rngs)

    def __call__(self, x):
        rows = jax.typeof(x).sharding.spec[0]
        return self.b(self.a(x), out_sharding=PartitionSpec(rows, None, None, "m"))


@pytest.mark.parametrize("split", [2, 3])
def test_models_on_a_mesh_of_explicit_axes(split):
    mesh = jax.make_mesh((2, 4), ("data", "m"), axis_types=2 * (AxisType.Explicit,))
    x = images()
    model = LaidOut(nnx.Rngs(0))
    expected = nnx.clone(model).b(model.a(x))
    with jax.set_mesh(mesh):
        model = LaidOut(nnx.Rngs(0))
        layout = PartitionSpec(*("m" if axis == split else None for axis in range(4)))
        model.b.kernel.set_value(jax.device_put(model.b.kernel[...], layout))
        sample = jax.device_put(x, PartitionSpec("data"))
        plan = fj.make_plan(model, FULL, sample)
        assert [row.path for row in plan.replaced] == ["a", "b"]
        small = fj.compress(model, plan)
        y = small(sample)
        assert jax.typeof(y).sharding.spec == PartitionSpec("data", None, None, "m")
        np.testing.assert_allclose(y, expected, atol=1e-4)
        gradient = jax.grad(lambda x: jnp.sum(nnx.clone(small)(x) ** 2))(sample)
        assert jax.typeof(gradient).sharding.spec[0] == "data"


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = conv(3, 3, rngs)

    @nnx.remat
    def __call__(self, x):
        return self.conv(x)


class Remat(nnx.Module):
    def __init__(self, rngs):
        self.block = Block(rngs)

    def __call__(self, x):
        return nnx.jit(lambda block, x: block(x))(self.block, x)


class Cond(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = conv(3, 3, rngs), conv(3, 3, rngs)

    def __call__(self, x):
        return nnx.cond(
            self.a.bias[...].sum() > -1, lambda m, x: m.a(x), lambda m, x: m.b(x), self, x
        )


class Counter(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.count = conv(3, 3, rngs), nnx.Variable(jnp.asarray(0.0))

    def __call__(self, x):
        self.count[...] += x.shape[0]
        return self.conv(x) * self.count[...]


class PartialCounter(nnx.Module):
    """Counts in a module that Flax does not see."""

    def __init__(self, rngs):
        self.stem = conv(3, 3, rngs)
        self.counted = functools.partial(Counter(rngs))

    def __call__(self, x):
        return self.counted(self.stem(x))


class Noise(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.rngs = conv(3, 3, rngs), rngs

    def __call__(self, x):
        y = self.conv(x)
        return y + jax.random.normal(self.rngs.noise(), y.shape)


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.conv = conv(3, 4, rngs)
        self.rnn = nnx.RNN(nnx.LSTMCell(4, 5, rngs=rngs))

    def __call__(self, x):
        return self.rnn(self.conv(x).mean(axis=1))


@pytest.mark.parametrize("cls", [Remat, Cond, Counter, PartialCounter, Noise, Recurrent])
def test_deploy_is_pure_and_gives_what_the_model_gives(cls):
    model, x = cls(nnx.Rngs(0)), images()
    before = jax.device_get(jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    expected = clone(model)(x)
    for deployed in (fj.deploy(model, x, chunk=1), fj.deploy(model)):
        for _ in range(2):
            np.testing.assert_allclose(deployed(x), expected, atol=1e-5)
    after = jax.device_get(jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    if cls is Counter:
        assert model.count[...] == 0
    if cls is PartialCounter:
        assert model.counted.func.count[...] == 0


@dataclasses.dataclass
class Output:
    logits: jax.Array
    task: str


class Keyworded(nnx.Module):
    """Calls by keyword, takes a typed key, returns what is no array."""

    def __init__(self, rngs):
        self.a, self.b = conv(3, 4, rngs), conv(4, 5, rngs)

    def __call__(self, x, *, key):
        y = self.b(inputs=self.a(inputs=x))
        return Output(y + jax.random.normal(key, y.shape), "noise"), "text", None


def test_keywords_keys_and_outputs_that_are_no_arrays(tmp_path):
    model, x = Keyworded(nnx.Rngs(0)), images()
    inputs = fj.Inputs(x, key=jax.random.key(3))
    plan = fj.make_plan(model, FULL, inputs)
    assert [row.path for row in plan.replaced] == ["a", "b"]
    assert plan.before.mult_adds == 64 * (4 * (9 * 3 + 1) + 5 * (9 * 4 + 1))
    small = fj.compress(model, plan)
    found, *rest = small(x, key=jax.random.key(3))
    expected, *_ = model(x, key=jax.random.key(3))
    assert rest == ["text", None] and found.task == "noise"
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)
    fj.save_compressed(tmp_path / "model", small, plan)
    assert open_compressed(tmp_path / "model").plan.inputs == plan.inputs


class Asking(nnx.Module):
    """Tells its convolutions by their class, and asks them for what they are."""

    def __init__(self, rngs):
        self.layers = nnx.List([conv(3, 4, rngs), nnx.BatchNorm(4, rngs=rngs), conv(4, 5, rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x)) if isinstance(layer, nnx.Conv) else layer(x)
        return x


METHODS = [
    fj.Falcon(rank=2),
    fj.Tucker(rank=2),
    fj.CP(rank=2),
    fj.FilterSummary(ratio=2.0),
    fj.SpatialDecomposition(rank=2),
]


def test_a_compressed_layer_is_a_convolution_to_code_that_asks():
    model, x = Asking(nnx.Rngs(0)), images()
    model.eval()
    small = fj.compress(model, fj.make_plan(model, FULL, x))
    np.testing.assert_allclose(small(x), model(x), atol=1e-4)
    names = [n for n in vars(model.layers[0]) if not n.startswith("_")]
    for method in METHODS:
        layer = fj.compress(
            model.layers[0], fj.make_plan(model.layers[0], [fj.Rule(method=method)])
        )
        assert isinstance(layer, nnx.Conv)
        for name in (*names, "kernel_shape"):
            assert hasattr(layer, name), name
        for name in ("in_features", "out_features", "kernel_size", "use_bias", "kernel_shape"):
            assert getattr(layer, name) == getattr(model.layers[0], name)
        expected = jax.lax.conv_general_dilated(
            x, layer.kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(
            layer(x), np.asarray(expected) + np.asarray(layer.bias), atol=1e-4
        )
        graphdef, state = nnx.split(layer)
        np.testing.assert_array_equal(nnx.merge(graphdef, state)(x), layer(x))


@pytest.mark.usefixtures("without_hook")
def test_what_is_no_model_or_no_array_is_told_in_words():
    model = conv(3, 4, nnx.Rngs(0))

    class Tensor:
        shape, dtype, ndim = (1, 8, 8, 3), "float32", 4

    Tensor.__module__ = "torch"
    with pytest.raises(ValueError, match=r"PyTorch tensors; give arrays .* x\.numpy\(\)"):
        fj.make_plan(model, sample=Tensor())
    plan = fj.make_plan(model, FULL)
    small = fj.compress(model, plan)
    assert small.kernel.shape == (3, 3, 3, 4)
    with pytest.raises(ValueError, match=r"got a dict\. Of a TrainState"):
        fj.make_plan({"params": {}}, sample=images())
