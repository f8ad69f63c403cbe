"""The settings of the training-free study; what they run has tests of its own."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import falcon_jax as fj
from benchmarks.training_free import FOLDED, _points, main
from benchmarks.training_free_ocr import METHODS, STUDIES

SAMPLE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
QUICK = ("FALCON", "CD+ND")
FIRST = fj.Rule(path="stages/0/0/conv", method=None)


@pytest.fixture(scope="module")
def shapes():
    return nnx.eval_shape(lambda: fj.models.vgg8_cifar(rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FOLDED]
)
def test_every_setting_replaces_every_layer_but_the_first(name, shapes):
    costs = []
    for _, method in FOLDED[name]:
        plan = fj.make_plan(shapes, [FIRST, fj.Rule(method=method)], SAMPLE, solver="random")
        assert [row.path for row in plan.rows if row.method is None] == ["stages/0/0/conv"]
        assert plan.after.params < plan.before.params
        costs.append(plan.after.params)
    assert len(set(costs)) == len(costs)


def test_the_smallest_model_of_each_method_carries_its_name():
    rows = [
        {"method": method, "fit": fit, "params": params, "accuracy": 0.5}
        for method, fit, params in (("a", "", 3), ("a", "", 2), ("a", "data", 3), ("b", "", 1))
    ]
    assert [point["label"] for point in _points(rows)] == ["", "a", "a, data", "b"]


def test_other_networks_are_told_apart(capsys):
    assert set(STUDIES) == {"recognizer", "detector"} and "FALCON" in METHODS
    with pytest.raises(SystemExit):
        main(["training_free", "--network=detector", "--config=configs/demo.py"])
    assert "--config=configs/demo.py is for --network=digits" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["training_free", "--network=recognizer", "--methods=falcon"])
    assert "got 'falcon'" in capsys.readouterr().err
