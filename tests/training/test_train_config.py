import dataclasses

import pytest

from falcon_jax.training.config import TrainConfig, default_config


@pytest.mark.parametrize(
    "field, value, need",
    [
        ("epochs", -1, "0 or more"),
        ("batch_size", 0, "1 or more"),
        ("eval_batch_size", 0, "1 or more"),
        ("optimizer", "adam", "one of sgd, adamw"),
        ("learning_rate", 0.0, "positive and finite"),
        ("momentum", 1.0, "in [0, 1)"),
        ("momentum", -0.1, "in [0, 1)"),
        ("weight_decay", -1e-4, "0 or more, and finite"),
        ("schedule", "linear", "one of step, cosine, constant"),
        ("boundaries", (250.0, 150.0), "rising epochs, 0 or more"),
        ("boundaries", (150.0, 150.0), "rising epochs, 0 or more"),
        ("factor", 0.0, "in (0, 1]"),
        ("factor", 1.5, "in (0, 1]"),
        ("warmup_epochs", -1.0, "in [0, epochs]"),
        ("warmup_epochs", 351.0, "in [0, epochs]"),
        ("label_smoothing", 1.0, "in [0, 1)"),
        ("label_smoothing", -0.1, "in [0, 1)"),
        ("dtype", "float16", "one of float32, bfloat16"),
    ],
)
def test_each_field_says_what_it_is_and_what_it_may_be(field, value, need):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**{field: value})
    assert str(caught.value) == f"{field} must be {need}, but is {value!r}"


@pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "momentum", "warmup_epochs"])
def test_nan_is_refused(field):
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: float("nan")})


def test_the_edges_are_allowed():
    TrainConfig(
        epochs=0,
        batch_size=1,
        eval_batch_size=1,
        momentum=0.0,
        weight_decay=0.0,
        boundaries=(),
        factor=1.0,
    )
    TrainConfig(epochs=3, warmup_epochs=3.0)


def test_the_defaults_are_the_papers():
    paper = {
        "epochs": 350,
        "batch_size": 128,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "step",
        "boundaries": (150.0, 250.0),
        "factor": 0.1,
    }
    defaults = default_config().train.to_dict()
    assert paper.items() <= defaults.items()
    assert set(defaults) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 3  # type: ignore[misc]
