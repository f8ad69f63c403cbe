"""Table 2's formulas against the costs that methods and profiled units report, and by hand."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.models import branch_unit, gdg_unit, pdp_split_unit, pdp_unit
from tests.methods import paper_formulas as complexity

LAYERS = [
    {"D": 3, "M": m, "N": n, "H": 8, "W": 6, "H_out": 8 // s, "W_out": 6 // s}
    for m, n, s in itertools.product((16, 24), (16, 32), (1, 2))
]


def without(symbols, *names):
    return {name: value for name, value in symbols.items() if name not in names}


def spec_of(symbols):
    return fj.ConvSpec(
        kernel_size=(symbols["D"],) * 2,
        in_features=symbols["M"],
        out_features=symbols["N"],
        strides=symbols["H"] // symbols["H_out"],
        padding=1,
        use_bias=False,
    )


def input_of(symbols):
    return (1, symbols["H"], symbols["W"], symbols["M"])


def unit_cost(factory, symbols):
    """Weights of the unit's convolutions and their products; no biases, no BatchNorm."""
    unit = nnx.eval_shape(
        lambda: factory(
            symbols["M"],
            symbols["N"],
            strides=symbols["H"] // symbols["H_out"],
            activate=True,
            dtype=None,
            rngs=nnx.Rngs(0),
        )
    )
    params = mult_adds = 0
    for _, module in nnx.iter_modules(unit):
        if type(module) is nnx.Conv:
            module.bias, module.use_bias = nnx.data(None), False
    profile = fj.profile(unit, jax.ShapeDtypeStruct(input_of(symbols), jnp.float32))
    for row in profile.rows:
        if row.kind == "conv" and "shortcut" not in row.path:
            params += row.params
            mult_adds += row.mult_adds
    return fj.Cost(params=params, mult_adds=mult_adds)


@pytest.mark.parametrize("symbols", LAYERS)
def test_methods(symbols):
    spec, shape = spec_of(symbols), input_of(symbols)
    outputs = without(symbols, "H", "W")
    assert complexity.standard(**outputs) == fj.standard_cost(spec, shape)
    assert complexity.dpconv(**outputs) == fj.DepthwiseSeparable().cost(spec, shape)
    for k in (1, 2, 3):
        assert complexity.falcon(**symbols, k=k) == fj.Falcon(rank=k).cost(spec, shape)


@pytest.mark.parametrize("symbols", LAYERS)
@pytest.mark.parametrize("t", [0.5, 2])
def test_pdpconv(symbols, t):
    assert complexity.pdpconv(**symbols, t=t) == unit_cost(pdp_unit(t), symbols)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("g", [1, 2, 4])
def test_gdgconv(strides, g):
    symbols = {
        "D": 3, "M": 32, "N": 32, "H": 8, "W": 6, "H_out": 8 // strides, "W_out": 6 // strides,
    }  # fmt: skip
    assert complexity.gdgconv(**symbols, g=g) == unit_cost(gdg_unit(g), symbols)


def test_units_on_half_of_the_channels():
    symbols = {"D": 3, "M": 16, "N": 16, "H": 8, "W": 6, "H_out": 8, "W_out": 6}
    same = without(symbols, "N", "H_out", "W_out")
    assert complexity.pdpconv_split(**same) == unit_cost(pdp_split_unit, symbols)
    assert complexity.stconv_branch(**same) == unit_cost(branch_unit(), symbols)
    for k in (1, 2):
        branch = unit_cost(branch_unit(fj.Falcon(rank=k)), symbols)
        assert complexity.falcon_branch(**same, k=k) == branch


def test_by_hand():
    symbols = {"D": 3, "M": 8, "N": 16, "H": 4, "W": 4, "H_out": 2, "W_out": 2}
    outputs, square = without(symbols, "H", "W"), {"D": 3, "M": 8, "H": 4, "W": 4}
    assert complexity.standard(**outputs) == fj.Cost(params=1152, mult_adds=4608)
    # 8 x 16 + 9 x 16; 16 points in, 4 out.
    assert complexity.falcon(**symbols) == fj.Cost(params=272, mult_adds=2048 + 576)
    assert complexity.falcon(**symbols, k=2) == fj.Cost(params=544, mult_adds=5248)
    assert complexity.dpconv(**outputs) == fj.Cost(params=128 + 72, mult_adds=800)
    # 4 inner channels: 32 + 36 + 64.
    assert complexity.pdpconv(**symbols, t=0.5) == fj.Cost(params=132, mult_adds=512 + 144 + 256)
    # A quarter of 64 + 144 + 128.
    assert complexity.gdgconv(**symbols, g=2) == fj.Cost(params=84, mult_adds=256 + 144 + 128)
    assert complexity.pdpconv_split(**square) == fj.Cost(params=68, mult_adds=1088)
    assert complexity.stconv_branch(**square) == fj.Cost(params=144, mult_adds=2304)
    assert complexity.falcon_branch(**square) == fj.Cost(params=52, mult_adds=832)


@pytest.mark.parametrize("symbols", LAYERS)
@pytest.mark.parametrize("k", [1, 3])
def test_rates_of_theorems_3_to_5(symbols, k):
    standard = complexity.standard(**without(symbols, "H", "W"))
    falcon = complexity.falcon(**symbols, k=k)
    rate = complexity.compression_rate(D=3, M=symbols["M"], k=k)
    assert rate == pytest.approx(standard.params / falcon.params)
    reduction = complexity.computation_reduction_rate(**without(symbols, "N"), k=k)
    assert reduction == pytest.approx(standard.mult_adds / falcon.mult_adds)


def test_numbers_that_are_not_whole():
    square = {"D": 3, "M": 7, "H": 4, "W": 4}
    for formula in (complexity.stconv_branch, complexity.falcon_branch):
        with pytest.raises(ValueError, match="with M=7 gives no whole number"):
            formula(**square)
    with pytest.raises(ValueError, match=r"t M = 0.5 \* 7 gives no whole number"):
        complexity.pdpconv(**square, N=8, H_out=4, W_out=4, t=0.5)
