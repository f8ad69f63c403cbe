"""Fronts of choices, against all choices one by one."""

import itertools

import numpy as np
import pytest

from falcon_jax.compression.search import pareto_front


def drawn(seed, items, options):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, options + 1, items)
    return [rng.integers(0, 30, n).astype(float) for n in counts], [rng.random(n) for n in counts]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_that_of_all_choices(seed):
    costs, losses = drawn(seed, items=5, options=4)
    every = list(itertools.product(*(range(len(c)) for c in costs)))
    totals = [sum(c[i] for c, i in zip(costs, choice, strict=True)) for choice in every]
    risks = [sum(r[i] for r, i in zip(losses, choice, strict=True)) for choice in every]
    found, least, choices = pareto_front(costs, losses)
    assert (np.diff(found) > 0).all() and (np.diff(least) < 0).all()
    for cost, loss, choice in zip(found, least, choices, strict=True):
        assert cost == sum(c[i] for c, i in zip(costs, choice, strict=True))
        assert loss == pytest.approx(sum(r[i] for r, i in zip(losses, choice, strict=True)))
    for budget in range(int(min(totals)), int(max(totals)) + 1):
        best = min(risk for total, risk in zip(totals, risks, strict=True) if total <= budget)
        assert least[found <= budget].min() == pytest.approx(best)


def test_a_thinned_front_uses_up_budgets_but_for_its_intervals():
    costs, losses = drawn(0, items=12, options=6)
    whole, thin = pareto_front(costs, losses), pareto_front(costs, losses, most=40)
    assert len(thin[0]) <= 41
    interval = 12 * (whole[0][-1] - whole[0][0]) / 40
    for budget in np.linspace(whole[0][0], whole[0][-1], 50):
        kept = thin[1][thin[0] <= budget]
        less = whole[1][whole[0] <= max(budget - interval, whole[0][0])]
        assert kept.min() <= less.min() + 1e-12


def test_an_item_without_options_is_refused():
    with pytest.raises(ValueError, match="at least one option"):
        pareto_front([np.array([])], [np.array([])])
