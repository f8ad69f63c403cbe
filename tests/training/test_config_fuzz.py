"""Every field of a config with values that are wrong, and names that are misspelt."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from falcon_jax.training.config import ExperimentConfig, check_config, default_config

pytestmark = pytest.mark.usefixtures("without_hook")
FREE_FORM = "compression__variants"


def leaves(group, prefix=""):
    """Yield every field that is no group, and its default."""
    for name, value in group.items():
        if isinstance(value, dict) and prefix + name != FREE_FORM:
            yield from leaves(value, f"{prefix}{name}__")
        elif prefix + name != FREE_FORM:
            yield prefix + name, value


FIELDS = dict(leaves(default_config().to_dict()))
NUMBERS = [f for f, v in FIELDS.items() if isinstance(v, (int, float)) and type(v) is not bool]
TEXTS = [field for field, value in FIELDS.items() if isinstance(value, str)]
FREE_TEXTS = ["data__name", "data__data_dir", "compression__only"]
OF_OTHER_TYPES = {
    bool: [0, 1, 0.0, "", "True", None, (), [], {}],
    int: [True, False, 0.0, 3.0, math.nan, "3", "", None, (), (1,), {"a": 1}],
    float: [True, False, "0.1", "", None, (), (0.1,), 1j, {"a": 1}],
    str: [True, 0, 1.5, None, (), ("a",), b"sgd", {"a": 1}],
    tuple: [True, 3, 0.5, "", "ab", None, {"a": 1}],
}


def dotted(field):
    return "config." + field.replace("__", ".")


def changed(**fields):
    """A default config with fields changed, as they are: assignments to a field convert them."""
    config = default_config().to_dict()
    for name, value in fields.items():
        *groups, field = name.split("__")
        group = config
        for part in groups:
            group = group[part]
        group[field] = value
    return ConfigDict(config)


def refusal(**fields):
    """The message with which a config is refused."""
    with pytest.raises(ValueError) as caught:
        check_config(changed(**fields))
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_no_field_is_forgotten():
    assert len(FIELDS) == 69
    assert {type(value) for value in FIELDS.values()} == set(OF_OTHER_TYPES)


@pytest.mark.parametrize("field", FIELDS)
def test_values_of_other_types(field):
    for value in OF_OTHER_TYPES[type(FIELDS[field])]:
        message = refusal(**{field: value})
        assert message.startswith(f"{dotted(field)} "), (value, message)


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    "value", [-1, -(2**31), 2**31, 10**400], ids=["-1", "-2^31", "2^31", "10^400"]
)
def test_numbers_below_zero_or_beyond_32_bits(field, value):
    assert refusal(**{field: value}).startswith(f"{dotted(field)} must ")


@pytest.mark.parametrize("field", [f for f in NUMBERS if isinstance(FIELDS[f], float)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-30, -1e300])
def test_numbers_that_are_not_finite_or_just_below_zero(field, value):
    assert refusal(**{field: value}).startswith(f"{dotted(field)} must ")


@pytest.mark.parametrize(
    "field",
    [
        *("data__image_size", "data__train_fraction", "checkpoint__keep"),
        *(
            f"{group}__{name}"
            for group in ("train", "finetune")
            for name in (
                *("batch_size", "accumulate", "eval_batch_size"),
                *("learning_rate", "factor"),
            )
        ),
    ],
)
def test_zero_where_there_must_be_something(field):
    assert refusal(**{field: type(FIELDS[field])(0)}).startswith(f"{dotted(field)} must ")


@pytest.mark.parametrize(
    "field, value",
    [
        ("data__validation_fraction", 1.0),
        ("data__train_fraction", 1.0 + 1e-9),
        ("train__momentum", 1.0),
        ("train__label_smoothing", 1),
        ("train__factor", 1.1),
        ("train__warmup_epochs", 350.5),
        ("train__accumulate", 129),
        ("train__boundaries", (2.0, 1.0)),
        ("train__boundaries", (-1.0, 1.0)),
        ("train__boundaries", (math.nan,)),
        ("train__boundaries", (1.0, math.inf)),
        ("train__boundaries", (True,)),
        ("train__boundaries", (1.0, 10**400)),
        ("finetune__boundaries", ((1.0,),)),
        ("data__shorter_side", 31),
        ("data__shorter_side", -32),
    ],
)
def test_numbers_just_out_of_range(field, value):
    assert refusal(**{field: value}).startswith(f"{dotted(field)} must ")


@pytest.mark.parametrize("field", [field for field in TEXTS if field not in FREE_TEXTS])
@pytest.mark.parametrize("value", ["", " "])
def test_empty_texts(field, value):
    assert refusal(**{field: value}).startswith(dotted(field))


@pytest.mark.parametrize(
    "field", [f for f in TEXTS if f not in (*FREE_TEXTS, "compression__start", "log__project")]
)
def test_texts_that_stand_for_nothing(field):
    message = refusal(**{field: FIELDS[field] + "x"})
    assert message.startswith(dotted(field))
    assert FIELDS[field] in message.removeprefix(dotted(field))


@pytest.mark.parametrize("field", FIELDS)
def test_misspelt_names(field):
    *groups, name = field.split("__")
    for wrong in (name[:-1], "_" + name):
        message = refusal(**{"__".join([*groups, wrong]): FIELDS[field]})
        assert message.startswith(f"{dotted('__'.join([*groups, wrong]))}: there is no {wrong!r}; ")
        assert message.endswith(f"did you mean {name!r}?")


@pytest.mark.parametrize("field", FIELDS)
def test_missing_fields(field):
    config = default_config()
    *groups, name = field.split("__")
    with config.unlocked():
        group = config
        for part in groups:
            group = group[part]
        del group[name]
    with pytest.raises(ValueError) as caught:
        check_config(config)
    assert str(caught.value).startswith(f"{dotted(field)} is missing")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 64),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=5),
    st.sampled_from(["exact", "cosine", "adamw", "bfloat16", "bilinear", "pmap", "scratch"]),
    st.lists(st.one_of(st.floats(0, 100), st.integers(), st.text(max_size=2)), max_size=3),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(FIELDS)), VALUES)
def test_any_value_is_right_or_refused_by_name(field, value):
    config = changed(**{field: value})
    try:
        experiment = check_config(config)
    except ValueError as error:
        assert str(error).startswith(dotted(field))
    else:
        assert isinstance(experiment, ExperimentConfig)
        default = FIELDS[field]
        assert isinstance(value, bool) == isinstance(default, bool)
        assert isinstance(value, (list, tuple)) == isinstance(default, tuple)
        if isinstance(default, (int, float)):
            assert 0 <= value < math.inf


@pytest.mark.parametrize(
    "variant, words",
    [
        ({"method": "filter_summary", "rank": 2}, "'filter_summary' has no setting rank; it has "),
        ({"method": "falcon", "ratio": 2}, "'falcon' has no setting ratio; it has rank, impl"),
        ({"method": "falcon", "name": "x"}, "has no setting name"),
        ({"method": "falcon", "rank": 1, "energy": 0.5}, "either rank or energy"),
        ({"method": "tucker", "rank": 1, "budget": 2}, "either rank or budget"),
        ({"method": "decoupled", "terms": 1, "energy": 0.5}, "either terms or energy"),
        ({"unit": "pdp", "rank": 2}, "unit 'pdp' has no option rank"),
        ({"unit": "gdg", "method": "falcon"}, "with a method"),
        ({"unit": "pdp", "solver": "random"}, "no option solver"),
        ({"method": "pdp"}, "is a conv unit"),
    ],
)
def test_contradictions_in_variants(variant, words):
    message = refusal(compression__variants={"small": variant})
    assert message.startswith("config.compression.variants.small") and words in message


WRONG = [None, True, -1, 0, math.nan, math.inf, -0.5, "", "x", [], [0], {}, (1, 2, 3)]
SETTINGS = [
    *(("falcon", name) for name in ("rank", "impl", "energy", "width", "solver", "of", "rules")),
    *(("depthwise_separable", "rank"), ("cp", "rank"), ("cp", "budget"), ("tucker", "rank")),
    *(("decoupled", name) for name in ("order", "terms", "energy")),
    *(("filter_summary", name) for name in ("ratio", "step", "reorder")),
    *(("differentiable_filter_summary", "ratio"), ("channel_decomposition", "inner")),
    *(("channel_decomposition", name) for name in ("rank", "relu", "budget", "energy")),
]
RIGHT = {
    ("falcon", "of"): [""],
    ("falcon", "rules"): [[]],
    ("channel_decomposition", "inner"): [None],
    ("channel_decomposition", "relu"): [True],
    ("filter_summary", "reorder"): [True, [0]],
    ("decoupled", "terms"): [None],
    ("decoupled", "energy"): [None],
}


@pytest.mark.parametrize("method, setting", SETTINGS)
def test_wrong_settings_of_methods(method, setting):
    for value in WRONG:
        config = changed(compression__variants={"v": {"method": method, setting: value}})
        try:
            check_config(config)
        except ValueError as error:
            message = str(error)
            assert message.startswith("config.compression.variants.v"), message
            assert not any(word in message for word in ("instance", "object is", "argument")), (
                message
            )
        else:
            assert value in RIGHT.get((method, setting), []), value


@pytest.mark.parametrize(
    "unit, option", [("gdg", "groups"), ("pdp", "expansion"), ("pdp", "width")]
)
def test_wrong_options_of_units(unit, option):
    for value in (None, True, -1, 0, math.nan, math.inf, -0.5, "", "x", [], {}):
        message = refusal(compression__variants={"v": {"unit": unit, option: value}})
        assert message.startswith("config.compression.variants.v: "), message
        assert option in message and repr(value) in message


@pytest.mark.parametrize("value", [None, True, 3, math.nan, "falcn", [], {"rank": 3}])
@pytest.mark.parametrize("kind", ["method", "unit"])
def test_wrong_names_of_methods_and_units(kind, value):
    message = refusal(compression__variants={"v": {kind: value}})
    assert message.startswith("config.compression.variants.v: "), message
    assert f"no {kind} is called" in message


@pytest.mark.parametrize(
    "rules",
    [
        ("a",),
        (("a",),),
        (("a", "falcon", 3),),
        ((3, "falcon"),),
        (("(", "falcon"),),
        (("a", "falcn"),),
        (("a", 3),),
        (("a", {"rank": 2}),),
        (("a", {"method": "falcon", "rank": math.nan}),),
        (None,),
    ],
)
def test_wrong_rules(rules):
    assert refusal(compression__rules=rules).startswith("config.compression.rules: ")
