import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.models.registry import get_unit


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("branch", {}),
        ("gdg", {"groups": 4}),
        ("pdp", {"expansion": 1.0}),
        ("pdp_split", {}),
    ],
)
def test_units_by_name(name, options):
    unit = get_unit(name, **options)
    module = nnx.eval_shape(
        lambda: unit(16, 32, strides=2, activate=True, dtype=None, rngs=nnx.Rngs(0))
    )
    y = jax.eval_shape(lambda m, x: m(x), module, jnp.ones((1, 8, 8, 16)))
    assert y.shape == (1, 4, 4, 32)


def test_options_reach_the_unit():
    image = jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.float32)

    def params(expansion):
        unit = get_unit("pdp", expansion=expansion)
        model = unit(16, 16, strides=1, activate=True, dtype=None, rngs=nnx.Rngs(0))
        return fj.profile(model, image).params

    assert params(1.0) > params(0.5)


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match="Did you mean 'branch'"):
        get_unit("branchh")
    with pytest.raises(ValueError, match="unit 'pdp' has no option groups; its options: expansion"):
        get_unit("pdp", groups=2)
