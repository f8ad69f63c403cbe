import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.nn.weights import draw


@pytest.mark.parametrize(
    "kernel_size, options",
    [
        ((3, 3), {"strides": 2, "padding": "SAME"}),
        ((3, 2), {"padding": ((1, 0), (0, 2)), "kernel_dilation": (1, 2), "use_bias": False}),
        (3, {"padding": "CIRCULAR", "dtype": jnp.bfloat16}),
        ((2, 3), {"padding": "VALID", "impl": "grouped"}),
    ],
)
def test_computes_what_a_grouped_convolution_of_flax_does(kernel_size, options):
    axes = 1 if isinstance(kernel_size, int) else len(kernel_size)
    x = draw(2, *(6, 7)[:axes], 4)
    ours = fj.DepthwiseConv(4, kernel_size, rngs=nnx.Rngs(0), **options)
    options.pop("impl", None)
    theirs = nnx.Conv(4, 4, kernel_size, feature_group_count=4, rngs=nnx.Rngs(1), **options)
    theirs.kernel[...] = ours.kernel[...][..., None, :]
    if ours.bias is not None:
        ours.bias[...] = theirs.bias[...] = jnp.arange(4.0)
    y, expected = ours(x), theirs(x)
    assert y.dtype == expected.dtype and (ours.bias is None) == (theirs.bias is None)
    tolerance = 0.05 if "dtype" in options else 1e-5
    y, expected = np.asarray(y, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(y, expected, atol=tolerance)


def test_initial_weights_have_the_scale_of_flax():
    ours = fj.DepthwiseConv(512, (3, 3), rngs=nnx.Rngs(0)).kernel[...]
    theirs = nnx.Conv(512, 512, (3, 3), feature_group_count=512, rngs=nnx.Rngs(1)).kernel[...]
    assert ours.shape == (3, 3, 512)
    np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.1)
