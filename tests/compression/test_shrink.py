"""A model made smaller in one call: what it costs, what it answers, and what is told of it."""

import jax
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.report.search import plot_front, write_shrunk
from tests.compression.linen_networks import Lifted, drawn
from tests.compression.networks import Small, images, randomised
from tests.compression.test_sensitivity import METHODS, Net, batches

DATA = batches(4, 16)


@pytest.fixture(scope="module")
def shrunk():
    model, reports = Net(nnx.Rngs(0)), []
    small = fj.shrink(
        model,
        DATA,
        target=fj.Target(mult_adds=0.5),
        candidates=METHODS[:2],
        report=reports.append,
    )
    return model, small, reports[0]


def loss(model, small, data):
    f, g = (np.concatenate([np.float64(m(x)) for x in data]) for m in (model, small))
    return ((f - g) ** 2).sum() / ((f - f.mean((0, 1, 2))) ** 2).sum()


def test_the_model_meets_the_target_and_answers_as_is_told(shrunk):
    model, small, told = shrunk
    sample = images(1, 8)
    before, after = (fj.profile(m, sample).mult_adds for m in (model, small))
    assert after == told.plan.after.mult_adds <= 0.5 * before
    assert told.kept == "calibrated" and "statistics" not in told.loss  # there is no BatchNorm
    assert loss(model, small, DATA) == pytest.approx(told.loss["calibrated"], rel=1e-3)
    uncalibrated = fj.compress(model, told.plan)
    assert loss(model, uncalibrated, DATA) == pytest.approx(told.loss["compressed"], rel=1e-3)
    assert told.loss["calibrated"] < told.loss["compressed"]
    assert [r.path for r in told.responses] == [row.path for row in told.plan.replaced]


def test_files_of_the_report(shrunk, tmp_path):
    _, _, told = shrunk
    text = write_shrunk(told, tmp_path / "new")
    assert (tmp_path / "new/shrink.txt").read_text() == text + "\n"
    assert "calibrated, kept" in text
    page = (tmp_path / "new/shrink.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "Mult-adds: " in page
    for name in ("front.png", "sensitivity.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new/shrink.json").is_file()
    assert plot_front(told.plan.front).startswith(b"\x89PNG")


def test_the_compressed_model_is_saved_with_the_plan(shrunk, tmp_path):
    _, small, told = shrunk
    fj.save_compressed(tmp_path / "small", small, told.plan)
    again = fj.load_compressed(tmp_path / "small", lambda: Net(nnx.Rngs(1)))
    x = DATA[0]
    np.testing.assert_array_equal(again(x), small(x))


@pytest.mark.slow
def test_statistics_are_kept_only_where_they_help():
    model = Small(nnx.Rngs(0), m=8, n=8)
    randomised(model)
    model.eval()
    reports = []
    small = fj.shrink(
        model,
        [images(32, 8, seed=i) for i in range(2)],
        target=fj.Target(params=0.8),
        candidates=[fj.Falcon()],
        report=reports.append,
    )
    (told,) = reports
    assert told.loss[told.kept] == min(told.loss.values())
    assert set(told.loss) == {"compressed", "calibrated", "statistics"}
    data = [images(32, 8, seed=i) for i in range(2)]
    f, g = (np.concatenate([np.float64(m(x)) for x in data]) for m in (model, small))
    assert ((f - g) ** 2).sum() / ((f - f.mean(0)) ** 2).sum() == pytest.approx(
        told.loss[told.kept], rel=1e-3
    )


@pytest.mark.slow
def test_linen_models_come_and_go_bound():
    bound = Lifted().bind(drawn(Lifted()))
    data = [fj.Inputs(images(16, 8, seed=seed), train=False) for seed in range(2)]
    small = fj.shrink(bound, data, target=fj.Target(params=0.8), candidates=[fj.Falcon()])
    assert small(images(2, 8), train=False).shape == bound(images(2, 8), train=False).shape
    count = [sum(a.size for a in jax.tree.leaves(m.variables["params"])) for m in (bound, small)]
    assert count[1] <= 0.8 * count[0]


def test_a_target_that_the_model_meets_already_is_told():
    with pytest.raises(ValueError, match="met by the model as it is"):
        fj.shrink(Net(nnx.Rngs(0)), DATA, target=fj.Target(mult_adds=1.0), candidates=METHODS)
