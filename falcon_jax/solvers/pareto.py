"""One option for each item: the choices of least loss at every cost."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

MOST = 4096  # points that are kept of a front


def pareto_front(
    costs: Sequence[Float[np.ndarray, "_"]],
    losses: Sequence[Float[np.ndarray, "_"]],
    *,
    most: int = MOST,
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"], Int[np.ndarray, "points i"]]:
    """Return the choices that no other one beats in cost and loss, by dynamic programming.

    ``min sum_i loss_i(c_i)  subject to  sum_i cost_i(c_i) <= budget``, for all budgets at once. It
    is exact while a front has at most ``most`` points; of a longer one, the point of least loss is
    kept in each of so many equal intervals of cost, so that a budget is used up to
    ``range / most`` for every item.

    Args:
        costs: of each item's options.
        losses: of the same.
        most: points that are kept after each item.

    Returns:
        Costs, increasing; losses, decreasing; and the option of each item.

    Raises:
        ValueError: if an item has no option, or as many costs as losses are not given.

    Reference:
        Multiple-choice knapsack problem: Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004,
        Section 11.5 (dynamic programming with dominance).

    >>> pareto_front([np.array([4.0, 1.0]), np.array([2.0, 1.0])],
    ...              [np.array([0.0, 3.0]), np.array([0.0, 1.0])])[2].tolist()
    [[1, 1], [1, 0], [0, 1], [0, 0]]
    """
    for cost, loss in zip(costs, losses, strict=True):
        if len(cost) != len(loss) or not len(cost):
            raise ValueError("every item has at least one option, each with a cost and a loss.")
    total, suffered = np.zeros(1), np.zeros(1)
    chosen = np.zeros((1, 0), np.int64)
    for cost, loss in zip(costs, losses, strict=True):
        sums = (total[:, None] + cost).ravel()
        risks = (suffered[:, None] + loss).ravel()
        kept = _undominated(sums, risks, most)
        parent, option = np.divmod(kept, len(cost))
        total, suffered = sums[kept], risks[kept]
        chosen = np.concatenate([chosen[parent], option[:, None]], axis=1)
    return total, suffered, chosen


def _undominated(
    costs: Float[np.ndarray, " n"], losses: Float[np.ndarray, " n"], most: int
) -> Int[np.ndarray, " kept"]:
    """Return the indices of a front, by increasing cost."""
    order = np.lexsort((losses, costs))
    before = np.minimum.accumulate(np.concatenate([[np.inf], losses[order][:-1]]))
    front = order[losses[order] < before]
    if len(front) <= most:
        return front
    low, high = costs[front[0]], costs[front[-1]]
    interval = np.minimum(((costs[front] - low) * (most / (high - low))).astype(np.int64), most - 1)
    # Losses decrease along a front: the last of an interval has the least.
    last = np.append(interval[1:] != interval[:-1], True)
    last[0] = True
    return front[last]
