import pytest

import falcon_jax as fj


@pytest.mark.parametrize(
    "method",
    [
        fj.Falcon(),
        fj.Falcon(rank=3, impl="gep"),
        fj.DepthwiseSeparable(rank=2),
    ],
)
def test_a_method_is_found_by_its_name_and_options(method):
    assert fj.get_method(method.name, **method.options()) == method


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'falcon'") as caught:
        fj.get_method("falcn", rank=2)
    assert all(name in str(caught.value) for name in fj.method_names())
    assert {"falcon", "depthwise_separable"} <= set(fj.method_names())


def test_an_unknown_setting_lists_the_known_ones():
    with pytest.raises(ValueError, match="no setting ratio; it has rank, impl"):
        fj.get_method("falcon", ratio=2)


@pytest.mark.parametrize("method_class", [fj.Falcon, fj.DepthwiseSeparable])
@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_are_whole_numbers_from_one_on(method_class, rank):
    with pytest.raises(
        ValueError, match=f"whole number of at least 1, 'full' or an Energy; got {rank}"
    ):
        method_class(rank=rank)


def test_methods_are_values():
    assert fj.Falcon(rank=2) == fj.Falcon(rank=2) != fj.Falcon(rank=3)
    assert len({fj.Falcon(), fj.Falcon(), fj.DepthwiseSeparable()}) == 2
