import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import falcon_jax as fj


def spec_of(**changes):
    return fj.ConvSpec(**{"kernel_size": (3, 3), "in_features": 4, "out_features": 8, **changes})


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"strides": 2}, {"strides": (2, 2)}),
        ({"strides": None}, {"strides": [1, 1]}),
        ({"kernel_dilation": 2}, {"kernel_dilation": [2, 2]}),
        ({"input_dilation": None}, {"input_dilation": (1, 1)}),
        ({"padding": 1}, {"padding": ((1, 1), (1, 1))}),
        ({"padding": [1, 2]}, {"padding": [(1, 1), (2, 2)]}),
        ({"padding": [[0, 1], (1, 2)]}, {"padding": ((0, 1), (1, 2))}),
        ({"kernel_size": [3, 3]}, {"kernel_size": (3, 3)}),
        ({"kernel_size": 5, "padding": "CAUSAL"}, {"kernel_size": (5,), "padding": "CAUSAL"}),
    ],
)
def test_equal_convolutions_have_equal_specs(a, b):
    assert spec_of(**a) == spec_of(**b)
    assert hash(spec_of(**a)) == hash(spec_of(**b))


def test_defaults_are_those_of_flax():
    conv = nnx.eval_shape(lambda: nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)))
    spec = spec_of()
    assert spec.strides == (conv.strides,) * 2
    assert spec.padding == conv.padding
    assert spec.kernel_dilation == (conv.kernel_dilation,) * 2
    assert spec.input_dilation == (conv.input_dilation,) * 2
    assert spec.feature_group_count == conv.feature_group_count
    assert spec.use_bias == conv.use_bias
    assert spec.kernel_shape == conv.kernel.shape


def test_derived_sizes():
    spec = spec_of(kernel_size=(3, 5), feature_group_count=4)
    assert spec.kernel_shape == (3, 5, 1, 8)
    assert spec.group_in_features == 1
    assert spec.taps == 15


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kernel_size": (0, 3)}, "positive sizes"),
        ({"kernel_size": ()}, "at least one spatial axis"),
        ({"in_features": 0}, "positive sizes"),
        ({"out_features": -8}, "positive sizes"),
        ({"strides": 0}, "positive sizes"),
        ({"kernel_dilation": (1, 0)}, "positive sizes"),
        ({"input_dilation": -1}, "positive sizes"),
        ({"feature_group_count": 0}, "positive sizes"),
        ({"feature_group_count": 3}, "feature_group_count=3 does not divide in_features=4"),
        ({"strides": (1, 2, 3)}, "strides has 3 entries for 2 spatial axes"),
        ({"kernel_dilation": (1,)}, "kernel_dilation has 1 entries for 2 spatial axes"),
        ({"padding": "FULL"}, "'FULL' is not one of SAME, SAME_LOWER, VALID"),
        ({"padding": (1, 1, 1)}, "2 spatial axes"),
        ({"padding": ((1, 1, 1), (0, 0))}, "2 spatial axes"),
        ({"padding": "CAUSAL"}, "CAUSAL padding is for one spatial axis"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        spec_of(**wrong)


NAMED = ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT"]


@pytest.mark.parametrize(
    # Flax has no named padding for dilated inputs.
    ("padding", "input_dilation"),
    [(2, 1), (2, 2), (((0, 3), (1, 0)), (2, 3)), *((name, 1) for name in NAMED)],
)
@pytest.mark.parametrize("strides", [1, (2, 3)])
@pytest.mark.parametrize("kernel_dilation", [1, 2])
def test_output_sizes_are_those_of_flax(padding, input_dilation, strides, kernel_dilation):
    geometry = {
        "strides": strides,
        "padding": padding,
        "input_dilation": input_dilation,
        "kernel_dilation": kernel_dilation,
    }
    expected = nnx.eval_shape(
        lambda: nnx.Conv(4, 8, (3, 2), **geometry, rngs=nnx.Rngs(0))(jnp.ones((1, 9, 10, 4)))
    )
    assert spec_of(kernel_size=(3, 2), **geometry).output_shape((9, 10)) == expected.shape[1:-1]


def test_of_kernel_is_the_plain_convolution():
    assert fj.ConvSpec.of_kernel((3, 4, 8)) == fj.ConvSpec(
        kernel_size=3, in_features=4, out_features=8, use_bias=False
    )


def test_specs_are_values():
    spec = spec_of()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.strides = (2, 2)
    assert dataclasses.replace(spec, strides=2) == spec_of(strides=(2, 2))
    assert fj.ConvSpec(**dataclasses.asdict(spec)) == spec
    assert jax.jit(lambda x, s: x * s.taps, static_argnums=1)(1, spec) == 9
