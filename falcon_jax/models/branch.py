"""StConv-branch and FALCON-branch: half of the channels convolved, half passed on."""

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.methods.base import Method
from falcon_jax.models.units import UnitFactory, channel_shuffle, method_unit, unbiased_unit


class BranchUnit(nnx.Module):
    """Two branches of N / 2 channels each, concatenated and shuffled.

    Where neither channels nor stride change, the first half of the input passes as it is and the
    second goes through 3x3 convolution, BatchNorm and ReLU. Elsewhere both branches do so, from all
    M channels to N / 2.

    The unit stands for convolution, BatchNorm and ReLU together. It is no drop-in for a bare
    convolution; its inner convolutions can be replaced like any other.

    Args:
        in_features: input channels M.
        out_features: output channels N, an even number.
        strides: step between outputs.
        inner: factory of the convolutions in the branches.
        dtype: of the computation.
        rngs: for parameters.

    Raises:
        ValueError: if the output channels cannot be halved.

    Reference:
        FALCON, Section 3.5 and Figure 3; ShuffleNetV2 (Ma et al., 2018), Section 4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int = 1,
        inner: UnitFactory = unbiased_unit,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        half = half_of(in_features, out_features, "branch unit")
        self.left = nnx.data(None)
        passes = passes_half(in_features, out_features, strides)
        if not passes:
            self.left = inner(
                in_features, half, strides=strides, activate=True, dtype=dtype, rngs=rngs
            )
        self.right = inner(
            half if passes else in_features,
            half,
            strides=strides,
            activate=True,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b h_out w_out n"]:
        """Apply the unit to a batch of feature maps."""
        return in_two_branches(x, self.left, self.right)


def branch_unit(method: Method | None = None) -> UnitFactory:
    """Return a factory of branch units: StConv-branch, or FALCON-branch with ``Falcon()``.

    FALCON-branch fitted to trained kernels is the StConv-branch model, compressed by ``compress``.

    Args:
        method: carries the inner convolutions out; standard ones if None.

    Returns:
        A unit factory. The branches end with ReLU, whatever ``activate`` says.

    Reference:
        FALCON, Section 3.5.
    """
    inner = unbiased_unit if method is None else method_unit(method)

    def unit(
        in_features: int,
        out_features: int,
        *,
        strides: int = 1,
        activate: bool = True,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ) -> BranchUnit:
        return BranchUnit(
            in_features, out_features, strides=strides, inner=inner, dtype=dtype, rngs=rngs
        )

    return unit


def half_of(in_features: int, out_features: int, name: str) -> int:
    """Return half of the output channels.

    Args:
        in_features: input channels, for the message.
        out_features: output channels.
        name: of the unit, for the message.

    Raises:
        ValueError: if there are an odd number of them.
    """
    if out_features % 2:
        raise ValueError(
            f"a {name} from {in_features} to {out_features} channels cannot be halved: give an "
            f"even number of output channels, such as {out_features - 1} or {out_features + 1}, "
            "by another width multiplier."
        )
    return out_features // 2


def passes_half(in_features: int, out_features: int, strides: int) -> bool:
    """Say whether half of the input can pass as it is: neither channels nor stride change."""
    return in_features == out_features and strides == 1


def in_two_branches(
    x: Float[Array, "b h w m"], left: nnx.Module | None, right: nnx.Module
) -> Float[Array, "b h_out w_out n"]:
    """Apply two branches side by side and shuffle what they give.

    Args:
        x: input.
        left: first branch; None passes the first half of the channels as it is, and hands only the
            second half on to the other branch.
        right: second branch.

    Returns:
        Both results, concatenated and shuffled in two groups.
    """
    first, second = jnp.split(x, 2, axis=-1) if left is None else (x, x)
    first = first if left is None else left(first)  # type: ignore[operator]
    y = jnp.concatenate([first, right(second)], axis=-1)  # type: ignore[operator]
    return channel_shuffle(y, 2)
