import json

import pytest

import falcon_jax as fj
from falcon_jax.training.config import check_config, default_config


def checked(variants, only="", rules=()):
    config = default_config()
    config.compression.rules, config.compression.only = rules, only
    config.compression.variants = variants
    return {variant.name: variant for variant in check_config(config).compression.chosen}


def test_methods_units_and_what_compresses_what():
    found = checked(
        {
            "a": {"method": "falcon", "of": "units"},
            "b": {"method": "tucker", "budget": 8.0},
            "c": {"method": "falcon", "energy": 0.9, "width": 0.5},
            "d": {"method": "tucker", "rank": [2, 3]},
            "e": {"method": "decoupled", "energy": 0.9},
            "units": {"unit": "branch", "width": 2},
        }
    )
    assert list(found)[-1] == "a"  # after the variant that it compresses
    assert found["a"].of == "units"
    assert found["b"].method == fj.Tucker(rank=fj.Budget(8.0))
    assert found["c"].method == fj.Falcon(rank=fj.Energy(0.9))
    assert found["c"].width == 0.5
    assert found["e"].method == fj.Decoupled(energy=0.9)
    assert found["units"].method is None and found["units"].width == 2.0
    assert [found[name].kind for name in "abcd"] == ["falcon", "tucker", "falcon", "tucker"]
    ranks = [found[name].rank for name in ("a", "c", "d", "units")]
    assert json.loads(json.dumps(ranks)) == [1, "Energy(share=0.9)", "(2, 3)", None]


def test_only_brings_what_is_compressed():
    variants = {
        "a": {"method": "falcon", "of": "units"},
        "b": {"method": "falcon"},
        "units": {"unit": "branch"},
    }
    assert list(checked(variants, only="a")) == ["units", "a"]
    assert list(checked(variants, only="b")) == ["b"]


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"unit": "pdp", "method": "falcon"}, "with a method.*or with a unit"),
        ({"rank": 2}, "with a method.*or with a unit"),
        ({"method": "pdp"}, "is a conv unit.*no drop-in for a bare convolution"),
        ({"unit": "pdpp"}, "Did you mean 'pdp'"),
        ({"unit": "branch", "groups": 2}, "has no option groups"),
        ({"method": "falcon", "width": 0}, "width must be a finite number above 0, but is 0"),
        (
            {"method": "falcon", "width": "wide"},
            "finite number above 0, but is 'wide'",
        ),
        ({"method": "falcon", "of": "b"}, r"variants\.a\.of names a variant that has a unit"),
        ({"method": "falcon", "of": "u", "width": 0.5}, "its width is that of 'u'"),
        ({"method": "falcon", "energy": 0.9, "rank": 1}, "either rank or energy"),
        ({"method": "falcon", "energy": 1.5}, "above 0 and at most 1; got 1.5"),
        ({"method": "cp", "ranks": 3}, "has no setting ranks"),
    ],
)
def test_what_makes_no_sense_is_told_with_its_name(variant, message):
    variants = {"a": variant, "b": {"method": "falcon"}, "u": {"unit": "branch"}}
    with pytest.raises(ValueError, match=message) as caught:
        checked(variants)
    assert "config.compression.variants.a" in str(caught.value)


def test_a_whole_config_with_units():
    config = default_config()
    config.compression.variants = {"pdp": {"unit": "pdp", "expansion": 0.5}}
    assert [v.kind for v in check_config(config).compression.chosen] == ["pdp"]
