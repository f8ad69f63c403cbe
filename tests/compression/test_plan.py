import json

import pytest
from flax import nnx

import falcon_jax as fj
from tests.compression.networks import Small, images


@pytest.fixture(scope="module")
def plan():
    rules = [
        fj.Rule(path="conv1", method=None),
        fj.Rule(method=fj.Falcon(rank=2, impl="gep")),
    ]
    return fj.make_plan(Small(nnx.Rngs(0)), rules, images())


def test_json_and_back(plan):
    assert fj.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_saved_and_loaded(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    loaded = fj.Plan.load(str(tmp_path / "plan.json"))
    assert loaded == plan
    assert loaded.replaced[0].method == fj.Falcon(rank=2, impl="gep")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON file"),
        ("[]", "holds no plan"),
        ("{}", "not a plan of falcon_jax: .*version"),
        ('{"version": 99}', "version 99; this falcon_jax reads 1"),
        ('{"version": 1, "rows": [{}]}', "not a plan of falcon_jax"),
        ('{"version": 1, "rows": 3}', "not a plan of falcon_jax"),
    ],
)
def test_what_is_no_plan_is_refused(text, message, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        fj.Plan.load(tmp_path / "plan.json")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        fj.Plan.load(tmp_path / "nowhere.json")


def test_an_unknown_method_in_a_plan_is_named(plan):
    data = json.loads(json.dumps(plan.to_json()))
    data["rows"][1]["method"]["name"] = "shrink"
    with pytest.raises(ValueError, match="no method is called 'shrink'"):
        fj.Plan.from_json(data)


def test_the_table_is_aligned(plan):
    lines = str(plan).splitlines()
    header, rows = lines[0], lines[1:]
    assert header.split() == [
        "layer", "kernel", "stride", "becomes", "params", "mult-adds", "error", "energy", "remark",
    ]  # fmt: skip
    assert [row.split()[0] for row in rows] == ["conv1", "conv2", "everything", "total"]
    start, end = header.index("kernel"), header.index("mult-adds") + len("mult-adds")
    assert rows[0][start:].startswith("3x3x3x4 ")
    assert rows[1][start:].startswith("3x3x4x4 ")
    assert rows[1][header.index("becomes") :].startswith("falcon 2 ")
    assert [row[end - 1].isdigit() for row in rows] == [True] * 4
    assert [row[end : end + 2].strip() for row in rows] == [""] * 4
    assert rows[0].endswith("left alone by path='conv1'")
    # 9 * 4 * 4 + 4 parameters before, 2 * 4 * (4 + 9) + 4 after.
    assert "148 -> 108" in rows[1]
    assert f"{plan.rows[1].error:.4f}" in rows[1]
    assert f"{plan.before.params:,} -> {plan.after.params:,}" in rows[3]


def test_totals_are_sums_of_the_rows(plan):
    for total, name in ((plan.before, "before"), (plan.after, "after")):
        costs = [getattr(row, name) for row in plan.rows] + [plan.rest]
        assert total.params == sum(cost.params for cost in costs)
        assert total.mult_adds == sum(cost.mult_adds for cost in costs)
    # Two BatchNorms and a Linear.
    assert plan.rest == fj.Cost(params=2 * 4 + 2 * 4 + 5 * 5, mult_adds=5 * 5)


def test_a_plan_that_was_not_traced_prints_no_mult_adds():
    model = nnx.eval_shape(lambda: Small(nnx.Rngs(0)))
    plan = fj.make_plan(model, solver="random")
    assert not plan.traced
    assert plan.before.mult_adds == 0
    assert plan.before.params == 3 * 9 * 4 + 4 + 4 * 9 * 4 + 4 + 8 + 8 + 25
    assert "->" in str(plan)


def test_a_plan_with_a_setting_of_then_still_loads(plan, tmp_path):
    data = plan.to_json()
    row = next(row for row in data["rows"] if row["method"])
    row["method"] = {"name": "channel_decomposition", "options": {"rank": 2, "relu": True}}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    loaded = fj.Plan.load(tmp_path / "plan.json")
    assert fj.ChannelDecomposition(rank=2) in [row.method for row in loaded.replaced]
    row["method"]["options"]["never"] = 1
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="never"):
        fj.Plan.load(tmp_path / "plan.json")
