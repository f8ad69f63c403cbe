import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.compression.plan import first_match
from tests.compression.networks import Nested

SPEC = fj.ConvSpec(kernel_size=(3, 3), in_features=4, out_features=8)
POINT = fj.ConvSpec(kernel_size=(1, 1), in_features=4, out_features=8)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        (r"stem/.*", "stem/conv", True),
        (r"stem", "stem/conv", False),  # the whole path must match
        (r"conv", "stem/conv", False),
        (r".*", "", True),
        (r"stages/\d/0/conv", "stages/12/0/conv", False),
        (r"a.b", "a/b", True),
    ],
)
def test_the_whole_path_must_match(pattern, path, expected):
    assert fj.Rule(path=pattern, method=None).matches(path, SPEC) is expected


def test_the_condition_must_hold_too():
    rule = fj.Rule(path="a", method=None, where=lambda spec: spec.taps > 1)
    assert rule.matches("a", SPEC)
    assert not rule.matches("a", POINT)
    assert not rule.matches("b", SPEC)


def test_the_first_match_wins():
    rules = [
        fj.Rule(path="stem", method=None),
        fj.Rule(method=fj.Falcon(), where=lambda spec: spec.taps > 1),
        fj.Rule(method=fj.DepthwiseSeparable()),
    ]
    assert first_match(rules, "stem", SPEC) == 0
    assert first_match(rules, "other", SPEC) == 1
    assert first_match(rules, "other", POINT) == 2
    assert first_match(rules[:1], "other", SPEC) is None


def test_a_bad_regular_expression_is_refused():
    with pytest.raises(ValueError, match=r"'stem/\(' is no regular expression"):
        fj.Rule(path="stem/(", method=None)


def plan(rules):
    model = nnx.eval_shape(lambda: Nested(nnx.Rngs(0)))
    return fj.make_plan(model, rules, solver="random")


def test_a_rule_that_matches_nothing_lists_the_paths_there_are():
    with pytest.raises(ValueError, match="no convolution matches path='stemm'") as caught:
        plan([fj.Rule(method=fj.Falcon()), fj.Rule(path="stemm", method=None)])
    paths = {line.strip() for line in str(caught.value).splitlines()[1:]}
    assert paths == {
        "stem", "blocks/0/0", "blocks/1/0", "sequence/layers/0", "table/left", "pair/0",
        "partial/args/0", "up", "own",
    }  # fmt: skip


def test_a_condition_that_never_holds_is_named():
    with pytest.raises(ValueError, match="with its condition"):
        plan([fj.Rule(method=fj.Falcon(), where=lambda spec: spec.taps > 9)])


def test_a_rule_behind_an_earlier_one_is_no_error():
    rules = [fj.Rule(method=fj.Falcon()), fj.Rule(path="stem", method=None)]
    stem = next(row for row in plan(rules).rows if row.path == "stem")
    assert stem.method == fj.Falcon()
