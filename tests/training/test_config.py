import dataclasses
import json
import re

import pytest

from falcon_jax.methods import get_method
from falcon_jax.training.config import (
    ExperimentConfig,
    TrainConfig,
    check_config,
    check_override,
    default_config,
)
from tests import config_page

FIRST = ("stages/0/0/conv", None)


def changed(**fields):
    """A default config with fields changed; ``__`` stands for a dot."""
    config = default_config()
    with config.unlocked(), config.ignore_type():
        for name, value in fields.items():
            *groups, field = name.split("__")
            group = config
            for part in groups:
                group = group[part]
            group[field] = value
    return config


def refused(**fields):
    with pytest.raises(ValueError) as caught:
        check_config(changed(**fields))
    message = str(caught.value)
    assert "\n" not in message
    return message


def variants(**options):
    return {"small": {"method": "falcon", **options}}


def test_the_default_is_good():
    config = check_config(default_config())
    assert config == ExperimentConfig()
    assert (config.model.name, config.compression.start) == ("vgg19_cifar", "train")
    assert config.compression.chosen == () and config.data.source == "digits"
    assert config.train == config.finetune == TrainConfig()


def test_the_default_is_locked_and_new_every_time():
    config = default_config()
    config.seed = 5
    assert default_config().seed == 0
    with pytest.raises(AttributeError):
        config.train.epoch = 3


def test_the_tree_is_what_the_config_says_field_by_field():
    given = changed(
        seed=7,
        data__augmentation__flip=True,
        train__boundaries=[1, 2],
        compression__variants=variants(rank=2, rules=(FIRST,)),
        parallel="pmap",
    )
    found = dataclasses.asdict(check_config(given))
    expected = json.loads(given.to_json_best_effort())
    assert json.loads(json.dumps(found)) == expected


def test_checking_does_not_change_the_config():
    config = changed(compression__variants=variants(rank=2, solver="random"))
    before = config.to_json()
    check_config(config)
    assert config.to_json() == before


@pytest.mark.parametrize(
    "field, value, need",
    [
        ("seed", "0", "int"),
        ("seed", True, "int"),
        ("model__name", 3, "str"),
        ("data__validation_fraction", "0.1", "float"),
        ("data__augmentation__flip", 1, "bool"),
        ("train__epochs", 3.0, "int"),
        ("train__nesterov", 1, "bool"),
        ("finetune__boundaries", 3.0, "tuple"),
        ("compression__rules", "x", "tuple"),
        ("log__progress", None, "bool"),
    ],
)
def test_wrong_types_are_told_with_the_dotted_name(field, value, need):
    dotted = "config." + field.replace("__", ".")
    assert refused(**{field: value}) == f"{dotted} must be a {need}, but is {value!r}"


def test_integers_do_for_floats_and_lists_for_tuples():
    config = changed(train__learning_rate=1, train__boundaries=[1, 2], train__warmup_epochs=2)
    settings = check_config(config).train
    assert settings.learning_rate == 1.0 and isinstance(settings.learning_rate, float)
    assert tuple(settings.boundaries) == (1, 2)
    assert isinstance(settings.warmup_epochs, float)


@pytest.mark.parametrize("value", [("a", "b"), (None,), (1.0, "2")])
def test_boundaries_must_be_numbers(value):
    assert refused(train__boundaries=value).startswith("config.train.boundaries")


def test_a_group_cannot_be_a_value():
    assert refused(train=3) == "config.train is a group of fields, but is 3"


@pytest.mark.parametrize(
    "field, dotted, near",
    [
        ("sed", "config.sed", "seed"),
        ("train__epoch", "config.train.epoch", "epochs"),
        ("data__augmentation__flips", "config.data.augmentation.flips", "flip"),
        ("compression__rule", "config.compression.rule", "rules"),
    ],
)
def test_unknown_fields_name_the_nearest(field, dotted, near):
    message = refused(**{field: 1})
    assert message.startswith(f"{dotted}: there is no ")
    assert message.endswith(f"did you mean {near!r}?")


def test_unknown_model_and_source_list_what_there_is():
    message = refused(model__name="vgg19_cifr")
    assert message.startswith(
        "config.model.name: there is no 'vgg19_cifr'; there are resnet18_cifar, "
    )
    assert message.endswith("did you mean 'vgg19_cifar'?")
    message = refused(data__source="digit")
    assert message.startswith("config.data.source: there is no 'digit'; there are digits, idx, ")
    assert message.endswith("did you mean 'digits'?")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("train__epochs", -1, "config.train.epochs must be 0 or more, but is -1"),
        ("finetune__momentum", 1.0, "config.finetune.momentum must be in [0, 1), but is 1.0"),
        (
            "data__workers",
            -1,
            "config.data.workers must be 0 or more, but is -1",
        ),
        (
            "data__shorter_side",
            16,
            "config.data.shorter_side must be 0 (for image_size / 0.875) or at least image_size 32",
        ),
        (
            "data__augmentation__crop_padding",
            -1,
            "config.data.augmentation.crop_padding must be 0 or more, but is -1",
        ),
        ("compression__batchnorm_batches", -1, "config.compression.batchnorm_batches must be 0"),
        ("compression__calibration_batches", -1, "config.compression.calibration_batches must be"),
        ("checkpoint__keep", 0, "config.checkpoint.keep must be 1 or more"),
    ],
)
def test_values_out_of_range_are_told_with_the_dotted_name(field, value, message):
    assert refused(**{field: value}).startswith(message)


def test_variants_by_name_with_their_own_solvers():
    given = {
        "b": {"method": "falcon", "rank": 2},
        "a": {"method": "depthwise_separable", "rank": 1, "solver": "random"},
    }
    # ConfigDict keeps its fields in alphabetical order.
    a, b = check_config(
        changed(compression__variants=given, compression__solver="adamw")
    ).compression.chosen
    assert (b.name, b.solver, b.method) == ("b", "adamw", get_method("falcon", rank=2))
    assert (a.name, a.solver) == ("a", "random")
    assert a.method == get_method("depthwise_separable", rank=1)


def test_rules_come_before_the_method_and_a_variant_may_have_its_own():
    given = {
        "shared": {"method": "falcon", "rank": 2},
        "own": {"method": "falcon", "rank": 2, "rules": (("head/.*", "falcon"),)},
        "none": {"method": "falcon", "rank": 2, "rules": ()},
    }
    none, own, shared = check_config(
        changed(compression__variants=given, compression__rules=(FIRST,))
    ).compression.chosen
    falcon = get_method("falcon", rank=2)
    assert [(rule.path, rule.method) for rule in shared.rules] == [FIRST, (".*", falcon)]
    assert [(r.path, r.method) for r in own.rules] == [
        ("head/.*", get_method("falcon")),
        (".*", falcon),
    ]
    assert [(rule.path, rule.method) for rule in none.rules] == [(".*", falcon)]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "falcn"}, ["falcn", "falcon"]),
        ({"method": "falcon", "rank": 0}, ["rank", "0"]),
        ({"method": "falcon", "rnk": 2}, ["rnk"]),
        ({"method": "falcon", "solver": "exakt"}, ["exakt", "exact", "adamw", "random"]),
        ({"method": "falcon", "rules": (("(", None),)}, ["'('", "regular expression"]),
        ({"method": "falcon", "rules": (("a", "b", "c"),)}, []),
        ({"method": "falcon", "rules": ("a",)}, []),
        ({"method": "falcon", "rules": 3}, []),
        ({"rank": 2}, ["must be a group with a method"]),
    ],
)
def test_bad_variants_are_told_with_their_dotted_name(options, words):
    message = refused(compression__variants={"small": options})
    assert message.startswith("config.compression.variants.small")
    for word in words:
        assert word in message


def test_a_variant_must_be_a_group():
    message = refused(compression__variants={"small": "falcon"})
    assert message.startswith("config.compression.variants.small must be a group with a method")


@pytest.mark.parametrize("name", ["standard", "/elsewhere"])
def test_a_variant_must_have_a_folder_of_its_own(name):
    config = default_config()
    config.compression.variants = {"small": {"method": "falcon"}}
    fields = config.compression.variants.to_dict()
    with config.unlocked():
        config.compression.variants = {}
        config.compression.variants[name] = fields["small"]
    with pytest.raises(ValueError, match=re.escape(f"config.compression.variants.{name}")):
        check_config(config)


def test_only_chooses_in_the_order_of_the_config():
    given = {f"k{rank}": {"method": "falcon", "rank": rank} for rank in (1, 2, 3)}
    config = changed(compression__variants=given, compression__only=" k3 ,k1,")
    assert [variant.name for variant in check_config(config).compression.chosen] == ["k1", "k3"]
    message = refused(compression__variants=given, compression__only="k4")
    assert message.startswith("config.compression.only: there is no 'k4'; there are k1, k2, k3")


def test_a_variant_that_is_not_chosen_is_not_checked_but_an_unknown_choice_is():
    assert "none" in refused(compression__only="none")


@pytest.mark.parametrize(
    "dotted",
    [
        "config.seed",
        "config.train.epochs",
        "config.data.augmentation.flip",
        "config.compression.variants.anything.rank",
        "config.compression.variants",
    ],
)
def test_overrides_of_fields_there_are(dotted):
    check_override(dotted)


@pytest.mark.parametrize(
    "dotted, unknown, near",
    [
        ("config.trian.epochs", "trian", "train"),
        ("config.train.epoch", "epoch", "epochs"),
        ("config.compression.variant.k1.rank", "variant", "variants"),
    ],
)
def test_overrides_of_other_fields_name_the_nearest(dotted, unknown, near):
    with pytest.raises(ValueError) as caught:
        check_override(dotted)
    assert str(caught.value).startswith(f"{dotted}: there is no {unknown!r}; there are ")
    assert str(caught.value).endswith(f"did you mean {near!r}?")


def test_overrides_below_a_value():
    with pytest.raises(ValueError, match=r"config\.seed\.x: there is no 'x'; there are no fields"):
        check_override("config.seed.x")


def test_the_page_of_fields_is_that_of_the_tree():
    assert config_page.PAGE.read_text() == config_page.page(), "run python -m tests.config_page"
