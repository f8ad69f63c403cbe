"""The comparison's report; its runs are those of train.py, which have tests of their own."""

import pytest
from ml_collections import ConfigDict

from benchmarks.compare import _paper_cells, verdicts
from configs import compare
from falcon_jax.training.config import DataConfig, ExperimentConfig, ModelConfig, check_config


def config_of(model, data):
    return ExperimentConfig(model=ModelConfig(name=model), data=DataConfig(name=data))


@pytest.mark.parametrize(
    ("label", "accuracy", "params", "mult_adds"),
    [
        ("standard", 72.10, 20.35, 398.75),
        ("falcon_k1", 72.01, 2.61, 47.28),
        ("falcon_k2", 73.71, 4.88, 94.24),
        ("falcon_unfitted", 70.80, 2.61, 47.28),
        ("falcon_branch", 73.05, 2.68, 54.21),
        ("gdg", 72.73, 2.79, 46.71),
        ("pdp_split", 72.32, 2.91, 58.29),
        ("tucker", 57.32, 4.10, 84.89),
    ],
)
def test_the_papers_cells_stand_beside_their_rows(label, accuracy, params, mult_adds):
    cells = _paper_cells(label, config_of("vgg19_cifar", "cifar100"))
    assert (cells["paper_params"], cells["paper_mult_adds"]) == (params, mult_adds)
    assert cells["paper_accuracy"] == accuracy


def test_what_the_paper_has_not_stays_empty():
    for label, config in (
        ("tucker_equal", config_of("vgg19_cifar", "cifar100")),
        ("falcon_k1", config_of("vgg8_cifar", "")),
    ):
        assert set(_paper_cells(label, config).values()) == {None}


def rows(**accuracies):
    return [
        {"label": label, "accuracy": mean, "spread": spread, "seeds": seeds}
        for label, (mean, spread, seeds) in accuracies.items()
    ]


def test_verdicts_fall_either_way_or_not_at_all():
    found = rows(
        standard=(0.98, None, 1),
        falcon_k1=(0.95, 0.01, 4),
        falcon_unfitted=(0.90, 0.01, 4),
        gep_in=(0.96, 0.01, 4),
        falcon_k2=(0.979, 0.01, 4),
        falcon_k3=(0.99, 0.001, 4),
    )
    lines = verdicts(found)
    assert lines[0].startswith("fitting helps FALCON: holds; falcon_k1 95.00%")
    # Two standard errors: 2 sqrt(0.01^2 / 4 + 0.01^2 / 4) = 1.41 points.
    assert "both fitted: undecided (standard error 0.71 points)" in lines[1]
    # The standard model's one run has the other's error: 2 sqrt(0.01^2 / 4 + 0.01^2).
    assert "rank 2 at least matches the standard model: undecided" in lines[2]
    assert "rank 3 at least matches the standard model: holds" in lines[3]
    assert len(lines) == 4
    worse = rows(falcon_k1=(0.5, 0.01, 4), falcon_unfitted=(0.9, 0.01, 4))
    assert verdicts(worse)[0].startswith("fitting helps FALCON: does not hold")


@pytest.mark.parametrize(
    "which", ["digits", "vgg19_cifar/cifar100", "resnet34_cifar/fashion_mnist"]
)
def test_configs_of_comparisons(which):
    config = compare.get_config(which)
    assert isinstance(config, ConfigDict)
    names = [variant.name for variant in check_config(config).compression.chosen]
    assert len(names) == 16 and names.index("stconv_branch") < names.index("falcon_branch")


def test_an_unknown_comparison_is_refused():
    with pytest.raises(ValueError, match="give digits or MODEL/DATA"):
        compare.get_config("vgg19_cifar/mnist")
