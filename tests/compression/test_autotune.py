import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import falcon_jax as fj
from falcon_jax.compression.plan import Plan


class Two(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.second = nnx.Conv(8, 8, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


X = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


@pytest.fixture
def clock(monkeypatch):
    """Times of each form as a test wants them, in place of those of this machine."""
    module = __import__("sys").modules["falcon_jax.compression.autotune"]

    def set_times(times):
        def measure(method, spec, call, backward, repeats):
            assert call.input_shape[0] == 2
            return {form: times[module._form_name(form)] for form in (None, *method.forms())}

        monkeypatch.setattr(module, "_measure", measure)

    return set_times


def test_the_fastest_form_is_written_into_the_plan(clock, tmp_path):
    clock({"standard": 3.0, "separable": 2.0, "wide": 1.0, "grouped": 9.0, "gep": 3.5})
    model = Two(nnx.Rngs(0))
    rules = [fj.Rule(path="second", method=fj.Falcon(rank=2))]
    plan = fj.autotune(model, X, fj.make_plan(model, rules, X))
    (row,) = plan.replaced
    assert (row.path, row.impl, row.measured_ms["gep"]) == ("second", "wide", 3.5)
    assert "wide: 3.0 times faster than the standard convolution" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert fj.compress(model, plan).second.method == fj.Falcon(rank=2, impl="wide")


def test_where_no_form_wins_the_layer_stays_and_the_plan_says_so(clock):
    clock({"standard": 1.0, "separable": 2.0, "wide": 2.5, "grouped": 9.0, "gep": 1.5})
    model = Two(nnx.Rngs(0))
    rules = [fj.Rule(method=fj.Falcon(rank=2))]
    plan = fj.make_plan(model, rules, X)
    tuned = fj.autotune(model, X, plan)
    assert not tuned.replaced and tuned.after == tuned.before
    assert tuned.rows[0].reason == (
        "no form is faster than the standard convolution; gep 1.5 times slower"
    )
    kept = fj.autotune(model, X, plan, only_faster=False)
    assert [row.impl for row in kept.rows] == ["gep", "gep"] and kept.after == plan.after


@pytest.mark.parametrize("backward", [False, True])
def test_measures_on_the_device(backward):
    model = Two(nnx.Rngs(0))
    plan = fj.autotune(model, X, backward=backward, repeats=2, only_faster=False)
    row = plan.rows[1]
    assert set(row.measured_ms) == {"standard", "separable", "grouped", "gep"}
    assert all(ms > 0 for ms in row.measured_ms.values())
    assert row.impl == min((n for n in row.measured_ms if n != "standard"), key=row.measured_ms.get)
    x = jax.random.normal(jax.random.key(0), X.shape)
    expected = fj.compress(model, fj.make_plan(model, None, X))(x)
    np.testing.assert_allclose(fj.compress(model, plan)(x), expected, rtol=1e-4, atol=1e-5)


def test_linen_modules_and_plans_of_before():
    class Module(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(8, (3, 3), name="second")(nn.Conv(8, (3, 3), name="first")(x))

    module = Module()
    variables = module.init(jax.random.key(0), jnp.zeros(X.shape))
    plan = fj.autotune(module.bind(variables), X, repeats=1, only_faster=False)
    assert plan.rows[1].impl in {"separable", "grouped", "gep"}
    data = json.loads(json.dumps(plan.to_json()))
    for row in data["rows"]:
        del row["measured_ms"]
    assert Plan.from_json(data).rows[1].measured_ms is None
