"""Float64 references: the optimum of a fit, kernels built from parameters, the convolution."""

import numpy as np

import falcon_jax as fj
from falcon_jax.testing import float64 as float64
from falcon_jax.testing import standard_conv as standard_conv


def matrices(kernel, method, groups=1):
    """The matrices that the method approximates, each by one of rank k (Theorems 1 and 2)."""
    kernel = float64(kernel)
    *size, m, n = kernel.shape
    flat = kernel.reshape(int(np.prod(size)), m, n)
    if isinstance(method, fj.Falcon):
        return [flat[:, :, column] for column in range(n)]
    width = n // groups
    return [
        flat[:, row, group * width : (group + 1) * width]
        for group in range(groups)
        for row in range(m)
    ]


def optimum(kernel, method, groups=1):
    """The least possible error, from NumPy's SVD in float64."""
    tails = [
        np.linalg.svd(matrix, compute_uv=False)[method.rank :]
        for matrix in matrices(kernel, method, groups)
    ]
    return np.sqrt(sum(float((tail**2).sum()) for tail in tails))


def built(params, method, groups=1):
    """The kernel that parameters stand for, in float64."""
    depthwise, pointwise = float64(params["depthwise"]), float64(params["pointwise"])
    if isinstance(method, fj.Falcon):
        return np.einsum("...rn,mrn->...mn", depthwise, pointwise)
    m, _, n = pointwise.shape
    width = n // groups
    blocks = [
        np.einsum(
            "...mr,mrn->...mn",
            depthwise[..., group * m : (group + 1) * m, :],
            pointwise[..., group * width : (group + 1) * width],
        )
        for group in range(groups)
    ]
    return np.concatenate(blocks, axis=-1)


def fit_error(kernel, params, method, groups=1):
    return np.linalg.norm(float64(kernel) - built(params, method, groups))
