import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

import falcon_jax as fj
from falcon_jax.frameworks.nnx_tree import named_variables
from falcon_jax.models import model_shapes
from tests.compression.networks import Nested, Scanned, Small, forward, images, randomised
from tests.models.test_resnet_cifar import PUBLISHED, statistics
from tests.nn.weights import draw

NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
SPEC = fj.ConvSpec(kernel_size=(3, 3), in_features=4, out_features=6)


def on_grid(values, bits=8):
    """The nearest point of the grid for each entry, in float64, by looking at all of them."""
    values = np.asarray(values, np.float64)
    grid = np.linspace(values.min(), values.max(), 2**bits)
    codes = np.abs(values.reshape(-1, 1) - grid).argmin(axis=1).reshape(values.shape)
    return codes, grid[codes], (values.max() - values.min()) / (2**bits - 1)


@pytest.mark.parametrize("bits", [1, 2, 7, 8])
def test_codes_are_the_nearest_points_of_the_grid(bits):
    values = draw(3, 3, 4, 8) + 3
    quantized = fj.quantize_linear(values, bits=bits)
    codes, nearest, scale = on_grid(values, bits)
    assert quantized.minimum.dtype == quantized.scale.dtype == jnp.float32
    np.testing.assert_array_equal(quantized.codes, codes)
    np.testing.assert_allclose(quantized.values(), nearest, rtol=1e-6)
    np.testing.assert_allclose(quantized.scale, scale, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(NUMBERS, min_size=6, max_size=6), st.integers(1, 8))
@example([1e30, -1e30, 0.0, 1.0, -1.0, 1e-30], 8)
def test_no_entry_is_further_off_than_half_a_step(numbers, bits):
    values = np.array(numbers, np.float32)
    quantized = fj.quantize_linear(values, bits=bits)
    # Steps below the least float32 are 0 on a machine that flushes them.
    rounding = 8 * np.finfo(np.float32).eps * np.abs(values).max() + 255 * np.finfo("f").tiny
    error = np.abs(np.asarray(quantized.values(), np.float64) - values)
    assert error.max() <= on_grid(values, bits)[2] / 2 + rounding
    assert int(quantized.codes.max()) < 2**bits


def test_the_rounding_is_that_of_torch():
    torch = pytest.importorskip("torch")
    values = np.clip(np.asarray(draw(500)), -2, 127 / 64)
    values[:2] = -2, 127 / 64
    expected = torch.fake_quantize_per_tensor_affine(torch.tensor(values), 1 / 64, 128, 0, 255)
    np.testing.assert_array_equal(fj.quantize_linear(values).values(), expected.numpy())


def test_arrays_without_a_range():
    for values in (jnp.full((2, 3), -0.3), jnp.float32(1e-3), jnp.zeros(4), jnp.zeros((0, 3))):
        quantized = fj.quantize_linear(values)
        assert (float(quantized.scale), quantized.codes.dtype) == (0, jnp.uint8)
        np.testing.assert_array_equal(quantized.values(), values)


def test_under_jit_and_vmap():
    values = draw(3, 40)
    jitted = jax.jit(fj.quantize_linear, static_argnames="bits")(values, bits=4)
    mapped = jax.vmap(fj.quantize_linear)(values)
    np.testing.assert_array_equal(jitted.codes, on_grid(values, 4)[0])
    np.testing.assert_array_equal(mapped.codes, [on_grid(row)[0] for row in values])
    assert jnp.isnan(jax.jit(fj.quantize_linear)(values.at[0, 0].set(jnp.inf)).values()).all()


def test_arrays_and_bits_that_cannot_be():
    values = draw(3)
    for bits in (0, 9, -1, True):
        with pytest.raises(ValueError, match=f"from 1 to 8; got {bits}"):
            fj.quantize_linear(values, bits=bits)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        with pytest.raises(ValueError, match="the array holds values that are not finite"):
            fj.quantize_linear(values.at[1].set(value))
    with pytest.raises(ValueError, match="the range of the array"):
        fj.quantize_linear(jnp.array([-3e38, 3e38]), bits=1)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
@pytest.mark.parametrize("size", [2.0**-126, 1e-38, 1e-37, 1e-30, 6e-8, 6e4, 1e38, 3.3e38])
def test_extreme_and_half_precision_arrays_are_rounded_like_any_other(size, dtype, bits):
    with np.errstate(over="ignore", under="ignore"):
        values = (np.linspace(-1, 1, 999) ** 3 * size).astype(dtype)
    if not np.isfinite(values.astype(np.float32)).all():
        return
    quantized = fj.quantize_linear(values, bits=bits)
    exact = values.astype(np.float64)
    entries = np.asarray(quantized.values(), np.float64)
    step = max((exact.max() - exact.min()) / (2**bits - 1), float(np.finfo(np.float32).tiny))
    assert np.abs(entries - exact).max() <= 0.5001 * step + np.finfo(np.float32).tiny
    assert np.isfinite(entries).all()
    if exact.max() > 256 * np.finfo(np.float32).tiny:
        assert (int(quantized.codes.min()), int(quantized.codes.max())) == (0, 2**bits - 1)
        jitted = jax.jit(fj.quantize_linear, static_argnames="bits")(values, bits=bits)
        assert int(jnp.abs(jitted.codes.astype(int) - quantized.codes).max()) <= 1
        np.testing.assert_allclose(jitted.scale, quantized.scale, rtol=1e-6)


def test_weights_that_cannot_be_rounded_are_named():
    model = Small(nnx.Rngs(0))
    path, variable = next((p, v) for p, v in named_variables(model) if p.endswith("kernel"))
    for value, bits in ((jnp.nan, 8), (-3e38, 1)):
        variable.set_value(jnp.full(variable.shape, 3e38).at[0].set(value))
        with pytest.raises(ValueError, match=f"^{path}"):
            fj.quantize_weights(model, bits=bits)


class Several(nnx.Module):
    """Layers of the kinds that the other networks lack."""

    def __init__(self, rngs):
        fixed, moving = fj.FilterSummary(ratio=3), fj.DifferentiableFilterSummary(ratio=3)
        moved = {"summary": draw(72), "shift": draw(6)}
        self.moving = fj.MethodConv(moving, SPEC, params=moved, bias=draw(6))
        self.summary = fj.MethodConv(fixed, SPEC, rngs=rngs)
        self.general = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
        self.einsum = nnx.Einsum("ab,bc->ac", (4, 5), (5,), rngs=rngs)
        self.embed = nnx.Embed(3, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)


CONVS = "stem blocks/0/0 blocks/1/0 sequence/layers/0 table/left pair/0 partial/args/0 up own"
METHODS = {"summary/summary", "moving/summary", "moving/shift"}
WEIGHTS_OF = {
    Nested: {f"{path}/kernel" for path in (*CONVS.split(), "head")},
    Several: METHODS | {"general/kernel", "einsum/kernel"},
    Scanned: {"stem/kernel", "layers/kernel"},
    functools.partial(nnx.Linear, 4, 5): {"kernel"},
}


@pytest.mark.parametrize("network", WEIGHTS_OF)
def test_weights_of_convolutions_and_dense_layers_are_rounded_and_nothing_else(network):
    model = network(rngs=nnx.Rngs(0))
    before = {name: np.array(v[...]) for name, v in named_variables(model)}
    quantized, report = fj.quantize_weights(model, bits=6)
    after = dict(named_variables(quantized))
    assert {row.path for row in report.rows} == WEIGHTS_OF[network]
    assert after.keys() == before.keys()
    for name, variable in named_variables(model):
        np.testing.assert_array_equal(variable[...], before[name])
        rounded = name in WEIGHTS_OF[network]
        expected = on_grid(before[name], 6)[1] if rounded else before[name]
        np.testing.assert_allclose(after[name][...], expected, atol=1e-6 * rounded, rtol=0)


def test_shared_modules_stay_shared_under_their_first_name_and_in_their_type():
    layer = nnx.Linear(4, 5, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = nnx.Dict(z=layer, a=layer)
    quantized, report = fj.quantize_weights(model, bits=2)
    assert [row.path for row in report.rows] == ["a/kernel"]
    (kernel,) = (v[...] for name, v in named_variables(quantized) if "kernel" in name)
    assert kernel.dtype == jnp.bfloat16
    nearest = on_grid(layer.kernel[...], 2)[1]
    np.testing.assert_array_equal(kernel, jnp.asarray(nearest, jnp.bfloat16))


def test_the_report_by_hand():
    model = Small(nnx.Rngs(0))
    _, report = fj.quantize_weights(model, bits=4)
    sizes = {row.path[:5]: (row.size, row.effective_size) for row in report.rows}
    assert sizes == {"conv1": (108, 15.5), "conv2": (144, 20), "head/": (20, 4.5)}
    assert report.params == fj.profile(model, images()).params == 108 + 144 + 20 + 29
    assert report.effective_params == 15.5 + 20 + 4.5 + 29
    assert report.ratio == 301 / 69
    *table, ratio = str(report).splitlines()
    assert len({len(line) for line in table}) == 1
    assert (table[-1].split(), ratio) == (["total", "301", "69.00"], "4.4 times fewer")


def test_a_pattern_chooses_tensors():
    model = Small(nnx.Rngs(0))
    quantized, report = fj.quantize_weights(model, path=r"conv\d/.*")
    assert [row.path for row in report.rows] == ["conv1/kernel", "conv2/kernel"]
    head = dict(named_variables(quantized))["head/kernel"][...]
    np.testing.assert_array_equal(head, model.head.kernel[...])
    with pytest.raises(ValueError, match=r"no tensor matches path='conv1'.* The paths") as caught:
        fj.quantize_weights(model, path="conv1")
    assert str(caught.value).split()[-3:] == ["conv1/kernel", "conv2/kernel", "head/kernel"]
    with pytest.raises(ValueError, match="is no regular expression"):
        fj.quantize_weights(model, path="(")


def test_linen_modules_come_and_go_bound():
    module, x = linen.Sequential([linen.Conv(4, (3, 3)), linen.Dense(3)]), jnp.ones((1, 5, 5, 2))
    model = module.bind(module.init(jax.random.key(0), x))
    small = fj.compress(model, fj.make_plan(model, [fj.Rule(method=fj.Falcon())], x))
    quantized, report = fj.quantize_weights(small, bits=6)
    names = {"layers_0/pointwise", "layers_0/depthwise", "layers_1/kernel"}
    assert {row.path for row in report.rows} == names
    assert report.params == 8 + 36 + 4 + 12 + 3
    before, after = (m.unbind()[1]["params"] for m in (small, quantized))
    for layer, name in (("layers_0", "depthwise"), ("layers_1", "kernel")):
        nearest = on_grid(np.array(before[layer][name]), 6)[1]
        np.testing.assert_allclose(after[layer][name], nearest, atol=1e-6)
    np.testing.assert_array_equal(after["layers_0"]["bias"], before["layers_0"]["bias"])


def test_models_that_cannot_be_quantised():
    with pytest.raises(ValueError, match=r"give module\.bind\(variables\)"):
        fj.quantize_weights(linen.Dense(3))
    with pytest.raises(ValueError, match="BatchNorm has no convolution or fully connected"):
        fj.quantize_weights(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="has shapes in place of weights"):
        fj.quantize_weights(nnx.eval_shape(lambda: Small(nnx.Rngs(0))))
    model = Small(nnx.Rngs(0))
    model.conv2.kernel[0, 0, 0, 0] = jnp.nan
    with pytest.raises(ValueError, match="conv2/kernel holds values that are not finite"):
        fj.quantize_weights(model)


def test_outputs_stay_close():
    model = randomised(Small(nnx.Rngs(0)))
    expected = np.asarray(forward(model, images()))
    quantized = [fj.quantize_weights(model, bits=bits)[0] for bits in (8, 3)]
    fine, coarse = (np.abs(forward(q, images()) - expected).max() for q in quantized)
    assert 0 < fine < 0.01 * np.abs(expected).max() < coarse


@pytest.mark.slow
def test_the_published_effective_size_of_resnet_110():
    """Counts with BatchNorm's statistics and PyTorch's counters; 0.116M, 14.9 times, without."""
    shapes = model_shapes("resnet110_cifar")
    rules = [fj.Rule(method=fj.FilterSummary(ratio=4.0))]
    plan = fj.make_plan(shapes, rules, solver="random")
    small = nnx.eval_shape(lambda model: fj.compress(model, plan), shapes)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nnx.state(small))
    _, report = fj.quantize_weights(nnx.merge(nnx.graphdef(small), zeros))
    standard, summaries = PUBLISHED["resnet110_cifar"]
    assert report.params + statistics(small) == summaries
    effective = report.effective_params + statistics(small)
    assert (f"{effective / 1e6:.3f}M", f"{standard / effective:.1f}") == ("0.125M", "13.9")


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_packed_codes_are_bits_one_after_the_other(bits):
    values = draw(3, 5)
    quantized = fj.quantize_linear(values, bits=bits)
    packed = quantized.packed(bits)
    text = "".join(f"{code:0{bits}b}" for code in np.asarray(quantized.codes).ravel())
    text += "0" * (-len(text) % 8)
    expected = [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
    np.testing.assert_array_equal(packed.codes, expected)
    np.testing.assert_array_equal(packed.values((3, 5), bits), quantized.values())
    with pytest.raises(ValueError, match="codes of"):
        packed.values((4, 5), bits)


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 5])
def test_saved_models_hold_the_codes(tmp_path, bits):
    model = Small(nnx.Rngs(0), m=32, n=32)
    plan = fj.make_plan(model, [fj.Rule(method=fj.FilterSummary())], images(1))
    quantized, report = fj.quantize_weights(fj.compress(model, plan), bits=bits)
    fj.save_compressed(tmp_path / "codes", quantized, plan, quantization=report)
    loaded = fj.load_compressed(tmp_path / "codes", lambda: Small(nnx.Rngs(1), m=32, n=32))
    for (name, a), (_, b) in zip(named_variables(loaded), named_variables(quantized), strict=True):
        if not isinstance(a, nnx.RngState):
            np.testing.assert_array_equal(a.get_value(), b.get_value(), err_msg=name)
    trained = fj.compress(model, plan)
    with pytest.raises(ValueError, match="is not what its codes say"):
        fj.save_compressed(tmp_path / "other", trained, plan, quantization=report)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_files_of_codes_are_small(tmp_path):
    model = fj.models.vgg8_cifar(width=0.5, rngs=nnx.Rngs(0))
    plan = fj.make_plan(model, [fj.Rule(method=None)], images(1))
    small, report = fj.quantize_weights(model)
    sizes = {}
    for name, options in (("floats", {}), ("codes", {"quantization": report})):
        fj.save_compressed(tmp_path / name, small, plan, **options)
        sizes[name] = sum(f.stat().st_size for f in (tmp_path / name).rglob("*") if f.is_file())
    # What the plan and the directory take up is the same in both.
    fixed = 4 * (report.params - report.effective_params)
    assert sizes["codes"] < 4 * report.effective_params + 60_000 < fixed
