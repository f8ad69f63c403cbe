import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import falcon_jax as fj
from tests.compression.networks import Nested, Scanned, Small, Vmapped, conv, images

SAMPLE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def products(jaxpr, times=1):
    """Multiply-adds of the convolutions and matrix products of a jaxpr."""
    total = 0
    for eqn in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in eqn.invars]
        out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        if eqn.primitive.name == "conv_general_dilated":
            features = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
            total += times * out * math.prod(shapes[1]) // features
        elif eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            total += times * out * math.prod(shapes[0][axis] for axis in contracted)
        inner = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                total += products(getattr(value, "jaxpr", value), inner)
    return total


def traced_products(model, sample):
    model.eval()
    graphdef, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, sample)
    return products(jaxpr.jaxpr) // sample.shape[0]


def without_biases(model):
    for _, module in nnx.iter_modules(model):
        if type(module) in (nnx.Conv, nnx.Linear):
            module.bias, module.use_bias = nnx.data(None), False
    return model


class Grouped(nnx.Module):
    def __init__(self, rngs):
        self.a = conv(3, 8, (3, 5), strides=(2, 1), use_bias=False, rngs=rngs)
        self.b = conv(8, 12, feature_group_count=4, padding="VALID", use_bias=False, rngs=rngs)
        self.c = conv(12, 6, kernel_dilation=2, use_bias=False, rngs=rngs)
        self.d = nnx.Linear(6, 5, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.d(self.c(self.b(self.a(x))))


class Grouped1x1(nnx.Module):
    """FALCON by lax convolutions, which a jaxpr shows; the fast form sums shifted slices."""

    def __init__(self, rngs):
        options = {"impl": "grouped", "use_bias": False, "rngs": rngs}
        self.a = fj.FalconConv(3, 8, (3, 3), rank=2, **options)
        self.b = fj.FalconConv(8, 12, (3, 3), 2, padding=1, feature_group_count=2, **options)

    def __call__(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("network", [Small, Grouped, Grouped1x1, Scanned])
def test_products_are_those_of_the_jaxpr(network):
    model = nnx.eval_shape(lambda: without_biases(network(nnx.Rngs(0))))
    assert fj.profile(model, SAMPLE).mult_adds == traced_products(model, SAMPLE)


def test_layers_side_by_side_count_each():
    model = nnx.eval_shape(lambda: without_biases(Vmapped(nnx.Rngs(0))))
    counted = fj.profile(model, SAMPLE).mult_adds
    assert counted == 64 * (9 * 3 * 4 + 3 * 9 * 4 * 4)
    assert counted == traced_products(model, SAMPLE)


def test_rows_by_hand():
    model = nnx.eval_shape(lambda: Nested(nnx.Rngs(0)))
    rows = {row.path: row for row in fj.profile(model, SAMPLE).rows}
    assert rows["stem"].mult_adds == 64 * (9 * 3 * 4 + 4)
    assert rows["blocks/1/0"].mult_adds == 64 * (16 + 4)
    assert rows["sequence/layers/0"].mult_adds == 16 * (9 * 16 + 4)
    # Shared: once at 8 x 8, once at 4 x 4; its parameters count once.
    assert rows["blocks/0/0"].mult_adds == (64 + 16) * (9 * 16 + 4)
    assert "table/right" not in rows
    # Transposed, stride 2: 16 points in, each meets the whole kernel; 64 points out get a bias.
    assert rows["up"].kind == "conv_transpose"
    assert rows["up"].params == 4 * 4 * 4 + 4
    assert rows["up"].mult_adds == 16 * 4 * 4 * 4 + 64 * 4
    assert (rows["norm"].kind, rows["norm"].params, rows["norm"].mult_adds) == ("other", 8, 0)
    assert (rows["head"].kind, rows["head"].params, rows["head"].mult_adds) == ("linear", 25, 25)
    assert {row.method for row in rows.values()} == {""}


def test_parameters_are_the_sizes_of_the_arrays():
    model = nnx.eval_shape(lambda: Nested(nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    hidden = jax.tree.leaves(nnx.state(model.partial.args[0], nnx.Param))  # NNX sees no partials
    sizes += [leaf.size for leaf in hidden]
    assert fj.profile(model, SAMPLE).params == sum(sizes)


def test_a_linear_layer_on_a_sequence_counts_every_step():
    model = nnx.eval_shape(lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    assert fj.profile(model, SAMPLE).mult_adds == 64 * (3 * 4 + 4)


def test_several_inputs():
    class Sum(nnx.Module):
        def __init__(self, rngs):
            self.conv = conv(3, 4, rngs=rngs)

        def __call__(self, a, b):
            return self.conv(a) + self.conv(b)

    model = nnx.eval_shape(lambda: Sum(nnx.Rngs(0)))
    assert fj.profile(model, (SAMPLE, SAMPLE)).mult_adds == 2 * 64 * (9 * 3 * 4 + 4)


def test_a_compressed_layer_as_the_paper_counts_it():
    layer = nnx.eval_shape(lambda: fj.FalconConv(3, 8, (3, 3), rngs=nnx.Rngs(0)))
    profile = fj.profile(layer, SAMPLE)
    assert profile.rows[0].method.startswith("Falcon(rank=1")
    assert profile.params == 8 * (3 + 9) + 8
    assert profile.mult_adds == 64 * (8 * (3 + 9) + 8)
    # An unused BatchNorm, and no bias.
    assert profile.as_paper_counts == (8 * (3 + 9) + 16, 64 * 8 * (3 + 9))


def test_the_table_is_aligned_and_ends_with_the_totals():
    model = nnx.eval_shape(lambda: Small(nnx.Rngs(0)))
    profile = fj.profile(model, SAMPLE)
    lines = str(profile).splitlines()
    assert lines[0].split() == ["layer", "kind", "params", "mult-adds"]
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split() == ["total", f"{profile.params:,}", f"{profile.mult_adds:,}"]
    assert profile.latency_ms is None


def test_latency_is_measured_on_request_and_changes_nothing():
    model = Small(nnx.Rngs(0))
    profile = fj.profile(model, images(), latency=True)
    assert profile.latency_ms > 0
    assert f"latency {profile.latency_ms:.2f} ms" in str(profile)
    assert not model.norm1.use_running_average
    assert not model.norm1.mean[...].any()


@pytest.mark.parametrize("sample", [(), None])
def test_a_sample_without_arrays_is_refused(sample):
    model = nnx.eval_shape(lambda: Small(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="example input with a leading batch axis; got no array"):
        fj.profile(model, sample)


def test_a_sample_that_does_not_fit_is_refused():
    model = nnx.eval_shape(lambda: nnx.Linear(4, 5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError):
        fj.profile(model, SAMPLE)


class OwnDepthwise(nnx.Module):
    """A depthwise convolution as a module, one as a function, and parameters in a container."""

    def __init__(self, rngs):
        self.a = fj.DepthwiseConv(3, (3, 3), strides=2, rngs=rngs)
        self.taps = nnx.Param(jnp.ones((3, 5, 3)))
        self.mixing = nnx.data({"matrix": nnx.Param(jnp.ones((3, 7)))})

    def __call__(self, x):
        return fj.depthwise_conv(self.a(x), self.taps[...]) @ self.mixing["matrix"][...]


def test_depthwise_convolutions_count_like_any_convolution():
    profile = fj.profile(OwnDepthwise(nnx.Rngs(0)), SAMPLE)
    rows = {row.path: (row.kind, row.params, row.mult_adds, row.remark) for row in profile.rows}
    grouped = nnx.Conv(3, 3, (3, 3), strides=2, feature_group_count=3, rngs=nnx.Rngs(0))
    (plain,) = fj.profile(grouped, SAMPLE).rows
    assert rows["a"] == ("conv", plain.params, plain.mult_adds, "") == ("conv", 30, 16 * 30, "")
    assert rows[""] == ("other", 45 + 21, 16 * 45 + 16 * 21, "")


class MappedDepthwise(nnx.Module):
    """Depthwise convolutions side by side, each with a kernel of its own."""

    def __init__(self, rngs):
        self.kernels = nnx.Param(jnp.ones((4, 3, 3, 3)))

    def __call__(self, x):
        mapped = jax.vmap(fj.depthwise_conv, in_axes=(None, 0))
        return mapped(x, self.kernels[...]).sum(0)


def test_depthwise_convolutions_side_by_side_count_once_each():
    (row,) = fj.profile(MappedDepthwise(nnx.Rngs(0)), SAMPLE).rows
    assert row.mult_adds == 4 * 64 * 9 * 3


class Gains(nnx.Module):
    def __init__(self, rngs):
        self.conv = conv(3, 4, rngs=rngs)
        self.gains = nnx.data([nnx.Param(jnp.ones(4)), {"unused": nnx.Param(jnp.ones(4))}])

    def __call__(self, x):
        return self.conv(x) * jnp.broadcast_to(self.gains[0][...], (2, 8, 8, 4))


def test_parameters_in_containers_are_not_said_to_be_unused():
    rows = {row.path: row for row in fj.profile(Gains(nnx.Rngs(0)), SAMPLE).rows}
    assert (rows[""].params, rows[""].remark) == (
        8,
        "elementwise or looked up: no product to count",
    )
