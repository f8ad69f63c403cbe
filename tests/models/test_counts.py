"""Parameters and mult-adds against the cells of the paper's Tables 4 and 5 that have our models."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import falcon_jax as fj
from benchmarks import paper_counts
from falcon_jax.models import branch_unit, model_shapes, standard_unit

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
ROWS = paper_counts.paper_rows()
CIFAR_MODELS = ("VGG19", "ResNet34")


def printed(counts):
    return tuple(f"{count / 1e6:.2f}" for count in counts)


def cells_of(model, dataset, method):
    return next(
        (row.params, row.mult_adds)
        for row in ROWS
        if (row.model, row.dataset, row.method) == (model, dataset, method)
    )


def test_the_tables_are_complete():
    assert len(ROWS) == 78
    assert len({(row.table, row.model, row.dataset, row.method) for row in ROWS}) == 78
    assert {row.method for row in ROWS if row.model == "VGG19"} >= {"StConv", "FALCON-k3"}


QUICK = {("VGG19", "FALCON-k1"), ("ResNet34", "StConv"), ("ResNet18", "FALCON-k1")}
MODELS_AND_METHODS = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in sorted(
        {(row.model, row.method) for row in ROWS if row.method not in paper_counts.RANK_ONE}
    )
]


@pytest.mark.parametrize(("model", "method"), MODELS_AND_METHODS)
def test_cells(model, method):
    dataset = "CIFAR100" if model in CIFAR_MODELS else "ImageNet"
    counts = paper_counts.our_counts(model, dataset, method)
    names = (method, *paper_counts.RANK_ONE) if method == "FALCON-k1" else (method,)
    for row in ROWS:
        if row.model != model or row.method not in names:
            continue
        ours = counts
        if row.dataset == "SVHN":
            # Classes change the last layer alone, by a product and a bias each.
            width = float((re.search(r" ([\d.]+)x", method) or [0, 1])[1])
            inputs = int(512 * width) if model == "ResNet34" else 512
            ours = tuple(count - 90 * (inputs + 1) for count in counts)
        for column, cell in zip(("params", "mult_adds"), printed(ours), strict=True):
            equal = cell == getattr(row, column)
            assert equal != ((model, method, column) in paper_counts.REASONS)


def test_a_model_with_ten_classes():
    assert printed(paper_counts.our_counts("VGG19", "SVHN", "StConv")) == cells_of(
        "VGG19", "SVHN", "StConv"
    )


def test_cells_that_are_off_fail_unless_there_is_a_reason(monkeypatch, tmp_path, capsys):
    row = dataclasses.replace(ROWS[0], params="20.36")
    monkeypatch.setattr(paper_counts, "our_counts", lambda *_: (20_350_000, 398_750_000))
    monkeypatch.setattr(paper_counts, "paper_rows", lambda: [row])
    out = tmp_path / "counts.json"
    assert paper_counts.main([f"--out={out}"]) == 1
    assert "1 equal, 0 off for a reason, 1 failed" in capsys.readouterr().out
    assert [cell["difference"] for cell in json.loads(out.read_text())["cells"]] == [
        "-0.01",
        "+0.00",
    ]
    key = (row.model, row.method, "params")
    monkeypatch.setattr(paper_counts, "REASONS", {key: "misprinted"})
    assert paper_counts.main([]) == 0
    monkeypatch.setattr(paper_counts, "paper_rows", lambda: [ROWS[0]])
    assert paper_counts.main([]) == 1
    assert "REASON WITHOUT NEED" in capsys.readouterr().out


METHODS = {
    **{f"FALCON-k{rank}": fj.Falcon(rank=rank) for rank in (1, 2, 3)},
    "GEP-in": fj.DepthwiseSeparable(rank=1),
    "DPConv": fj.DepthwiseSeparable(rank=1),
}


@functools.cache
def standard(model):
    return model_shapes(paper_counts.BUILDERS[model], num_classes=100)


def rules(model, label):
    units = fj.Rule(path=r"stages/.*/conv", method=METHODS[label])
    stays = {"ResNet34": r"stem/conv|.*/shortcut/conv", "VGG19": r"stages/0/0/conv"}[model]
    if model == "VGG19" and label != "DPConv":
        return [units]
    return [fj.Rule(path=stays, method=None), units]


@pytest.mark.parametrize(
    ("model", "label"),
    [
        ("VGG19", "FALCON-k3"),
        pytest.param("VGG19", "DPConv", marks=pytest.mark.slow),
        pytest.param("ResNet34", "GEP-in", marks=pytest.mark.slow),
    ],
)
def test_standard_models_under_a_plan(model, label):
    plan = fj.make_plan(standard(model), rules(model, label), IMAGE, solver="random")
    expected = cells_of(model, "CIFAR100", label)
    params, mult_adds = plan.after.params, plan.after.mult_adds
    for row in plan.replaced:
        # The paper's layers have a BatchNorm that is never used (2 N parameters), and no bias.
        n, points = row.spec.out_features, row.before.mult_adds // row.before.params
        params += 2 * n - n
        mult_adds -= points * n
    assert printed((params, mult_adds)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("model", "label"), [("VGG19", "FALCON-k1"), ("ResNet34", "FALCON-k2")])
def test_standard_models_compressed(model, label):
    plan = fj.make_plan(standard(model), rules(model, label), IMAGE, solver="random")
    small = nnx.eval_shape(lambda model: fj.compress(model, plan), standard(model))
    expected = cells_of(model, "CIFAR100", label)
    profile = fj.profile(small, IMAGE)
    assert printed(profile.as_paper_counts) == expected
    assert (profile.params, profile.mult_adds) == (plan.after.params, plan.after.mult_adds)


def test_counting_by_hand_what_the_smallest_model_costs():
    network = model_shapes("vgg8_cifar")
    profile = fj.profile(network, IMAGE)
    params = mult_adds = 0
    size, width = 32, 3
    for stage in ((32, 32), (64, 64), (128, 128)):
        for features in stage:
            params += 9 * width * features + features + 2 * features
            mult_adds += size**2 * features * (9 * width + 1)
            width = features
        size //= 2
    for m, n in ((128, 128), (128, 10)):
        params += (m + 1) * n
        mult_adds += (m + 1) * n
    assert (profile.params, profile.mult_adds) == (params, mult_adds)
    assert profile.as_paper_counts == (params, mult_adds)
    arrays = jax.tree.leaves(nnx.state(network, nnx.Param))
    assert sum(array.size for array in arrays) == params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "label", "width", "stays"),
    [
        ("VGG19", "FALCON-branch 1.75x", 1.75, r"stages/0/0/conv"),
        ("ResNet34", "FALCON-branch 1.625x", 1.625, r"stem/conv|.*/shortcut/conv"),
    ],
)
def test_falcon_branch_is_the_branch_model_compressed(model, label, width, stays):
    options = {"unit": branch_unit(), "width": width, "stem_unit": standard_unit}
    branch = model_shapes(paper_counts.BUILDERS[model], num_classes=100, **options)
    rules = [fj.Rule(path=stays, method=None), fj.Rule(method=fj.Falcon())]
    plan = fj.make_plan(branch, rules, IMAGE, solver="random")
    small = nnx.eval_shape(lambda model: fj.compress(model, plan), branch)
    assert printed(fj.profile(small, IMAGE).as_paper_counts) == cells_of(model, "CIFAR100", label)
