"""Plans for targets, against all plans one by one."""

import itertools
import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.compression.linen_networks import Lifted, drawn
from tests.compression.networks import images
from tests.compression.test_sensitivity import Net, batches

METHODS = (fj.ChannelDecomposition(rank=2), fj.Falcon(rank=1), fj.Falcon(rank=2))
DATA = batches()
SAMPLE = images(1, 8)


@pytest.fixture(scope="module")
def net():
    model = Net(nnx.Rngs(0))
    return model, fj.sensitivity(model, DATA, candidates=METHODS)


def search(net, **options):
    model, effects = net
    return fj.search(model, DATA, effects=effects, **options)


def every_plan(effects, quantity):
    """Costs and losses of all plans."""
    rest = getattr(effects.plan.before, quantity)
    options = [
        [
            (0, 0.0),
            *(
                (getattr(e.row.after, quantity) - getattr(e.row.before, quantity), e.loss)
                for e in each
            ),
        ]
        for each in effects.effects.values()
    ]
    return [
        (rest + sum(cost for cost, _ in choice), sum(loss for _, loss in choice))
        for choice in itertools.product(*options)
    ]


@pytest.mark.parametrize("quantity", ["mult_adds", "params"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_no_plan_that_meets_the_target_loses_less(net, quantity, share):
    plan = search(net, target=fj.Target(**{quantity: share}))
    budget = share * getattr(plan.before, quantity)
    least = min(loss for cost, loss in every_plan(net[1], quantity) if cost <= budget)
    assert getattr(plan.after, quantity) <= budget
    assert plan.predicted_loss == pytest.approx(least)
    # A number says the same as a share.
    again = search(net, target=fj.Target(**{quantity: int(budget)}))
    assert [row.method for row in again.rows] == [row.method for row in plan.rows]


def test_a_loss_is_met_with_the_least_mult_adds(net):
    plan = search(net, target=fj.Target(loss=0.02))
    assert plan.predicted_loss <= 0.02
    least = min(cost for cost, loss in every_plan(net[1], "mult_adds") if loss <= 0.02)
    assert plan.after.mult_adds == least


def test_the_front_has_the_other_plans(net):
    plan = search(net, target=fj.Target(mult_adds=0.5))
    front = plan.front
    assert (np.diff(front.costs) > 0).all() and (np.diff(front.losses) < 0).all()
    assert front.original == plan.before.mult_adds == front.costs[-1]
    other = front.plan(fj.Target(mult_adds=0.8))
    assert other.after.mult_adds > plan.after.mult_adds
    assert other.predicted_loss < plan.predicted_loss
    assert not front.plan(fj.Target(mult_adds=1.0)).replaced
    assert f"{plan.before.mult_adds:,}" in str(front)
    assert json.loads(json.dumps(front.to_json()))["losses"][-1] == 0
    with pytest.raises(ValueError, match="the front is one of mult_adds"):
        front.plan(fj.Target(params=0.5))


@pytest.mark.slow
def test_the_plan_is_an_ordinary_one(net, tmp_path):
    model, _ = net
    plan = search(net, target=fj.Target(mult_adds=0.5))
    assert {row.reason for row in plan.rows if row.method is None} <= {"the search leaves it alone"}
    plan.save(tmp_path / "plan.json")
    again = fj.Plan.load(tmp_path / "plan.json")
    assert again.rows == plan.rows
    small = fj.calibrate(model, fj.compress(model, again), again, DATA)
    assert fj.profile(small, SAMPLE).mult_adds == plan.after.mult_adds
    assert "of the output" in str(plan)


def test_latency_is_measured_and_nothing_slower_is_chosen(net, monkeypatch):
    standard = 2.0

    def times(method, spec, call, backward, repeats):
        assert not backward
        slow = isinstance(method, fj.ChannelDecomposition)
        ms = 3.0 if slow else method.rank * (0.5 + 0.1 * (spec.in_features == 3))
        forms = dict.fromkeys(method.forms(), ms)
        forms[method.forms()[-1]] = ms * 0.9
        return {None: standard, **forms}

    monkeypatch.setattr(sys.modules["falcon_jax.compression.autotune"], "_measure", times)
    search_module = sys.modules["falcon_jax.compression.search"]
    monkeypatch.setattr(search_module, "median_ms", lambda run: run() is None or 10.0)
    plan = search(net, target=fj.Target(latency=0.99), sample=SAMPLE)
    front = plan.front
    layers = [[o.cost for o in options] for options in front.options.values()]
    assert all(cost < standard for options in layers for cost in options[1:])
    assert all(options[0] == standard for options in layers)
    for row in plan.replaced:
        assert isinstance(row.method, fj.Falcon) and row.method == row.method.forms()[-1]
    assert plan.predicted_ms <= 0.99 * front.original
    # What is not in a layer takes as long as before.
    assert front.costs[-1] == pytest.approx(front.original)
    fewest = front.plan(fj.Target(latency_ms=float(front.costs[0])))
    assert fewest.predicted_ms == pytest.approx(10 - 3 * standard + 0.9 * (0.6 + 0.5 + 0.5))


def test_linen_and_targets_met_by_linen_models():
    bound = Lifted().bind(drawn(Lifted()))
    data = [fj.Inputs(images(16, 8, seed=seed), train=False) for seed in range(2)]
    plan = fj.search(bound, data, target=fj.Target(params=0.8), candidates=[fj.Falcon()])
    assert plan.after.params <= 0.8 * plan.before.params
    small = fj.compress(bound, plan)
    assert jax.tree.leaves(small.variables)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "one of params=, mult_adds=.*got nothing"),
        ({"params": 0.5, "loss": 0.1}, "got params, loss"),
        ({"mult_adds": 0}, "mult_adds of a target is a number above 0"),
        ({"latency": 2.0}, "at most 1"),
        ({"loss": -0.1}, "loss of a target is a number"),
    ],
)
def test_targets_that_are_none(fields, told):
    with pytest.raises(ValueError, match=told):
        fj.Target(**fields)


def test_what_cannot_be_reached_is_told_with_the_nearest(net):
    lowest = min(cost for cost, _ in every_plan(net[1], "mult_adds"))
    with pytest.raises(ValueError, match=f"cannot be reached: the nearest is {lowest:,}"):
        search(net, target=fj.Target(mult_adds=0.01))
    with pytest.raises(ValueError, match="give sample="):
        search(net, target=fj.Target(latency=0.5))
