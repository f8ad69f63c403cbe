"""BatchNorm whose backward pass is fast."""

from typing import Any

from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.ops.normalization import normalize_batch


class BatchNorm(nnx.BatchNorm):
    """``nnx.BatchNorm`` with a backward pass of its own: 1.3 to 2 times faster in training on CPUs.

    Arguments, variables and results are those of ``nnx.BatchNorm``. What it does not do itself (a
    mask, other axes, devices joined by ``axis_name``, no scale or bias) it leaves to Flax.

    >>> import jax.numpy as jnp
    >>> BatchNorm(4, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 3, 4))).shape
    (2, 3, 3, 4)
    """

    def __call__(
        self,
        x: Float[Array, "*batch c"],
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Any:
        """Normalise the input; in training by its own statistics, which are then kept."""
        average = self.use_running_average if use_running_average is None else use_running_average
        plain = self.axis in (-1, x.ndim - 1) and self.axis_name is None and self.use_fast_variance
        if average is not False or mask is not None or not plain:
            return super().__call__(x, use_running_average, mask=mask)
        if self.scale is None or self.bias is None:
            return super().__call__(x, use_running_average, mask=mask)
        arrays = (x, self.mean[...], self.var[...], self.scale[...], self.bias[...])
        x, _, _, scale, bias = self.promote_dtype(arrays, dtype=self.dtype)
        y, mean, variance = normalize_batch(x, scale, bias, epsilon=self.epsilon)
        for kept, new in ((self.mean, mean), (self.var, variance)):
            kept[...] = self.momentum * kept[...] + (1 - self.momentum) * lax.stop_gradient(new)
        return y
