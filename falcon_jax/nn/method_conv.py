"""The one NNX module that every method can use, and how a method is applied in any framework."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from falcon_jax.methods import ConvSpec, Method, Params
from falcon_jax.methods.base import apply_method

# What nnx.Conv has beside, as it is where nothing was asked for.
_UNUSED = {
    "mask": None,
    "kernel_init": nnx.initializers.lecun_normal(),
    "conv_general_dilated": lax.conv_general_dilated,
    "promote_dtype": promote_dtype,
    "preferred_element_type": None,
}


class MethodConv(nnx.Conv):
    """A convolution carried out by a compression method.

    It stands where an ``nnx.Conv`` stood: it is one to code that asks, and has its attributes;
    ``kernel`` is the standard kernel that its parameters stand for.

    The method's parameters are attributes of the module, each an ``nnx.Param`` under the name that
    the method gives it, beside ``bias`` (None without one).

    Args:
        method: how the convolution is carried out.
        spec: its geometry.
        params: the method's parameters; random ones if not given.
        bias: N entries; made by ``bias_init`` if not given and ``spec.use_bias``.
        dtype: of the computation; as input and parameters if None.
        param_dtype: of random parameters.
        precision: of products on accelerators, as in ``jax.lax``.
        bias_init: makes the bias.
        rngs: for random parameters, stream ``params``.

    Raises:
        ValueError: if the method cannot replace such a convolution, or ``rngs`` is missing.
    """

    def __init__(
        self,
        method: Method,
        spec: ConvSpec,
        *,
        params: Params | None = None,
        bias: Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: lax.PrecisionLike = None,
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008  # a pure function
        rngs: nnx.Rngs | None = None,
    ):
        method.require(spec)
        method = method.for_layer(spec)
        if rngs is None and (params is None or (bias is None and spec.use_bias)):
            raise ValueError("random parameters need rngs, e.g. rngs=nnx.Rngs(0).")
        if params is None:
            assert rngs is not None
            params = {
                name: value.astype(param_dtype)
                for name, value in method.init(rngs.params(), spec).items()
            }
        if bias is None and spec.use_bias:
            assert rngs is not None
            bias = bias_init(rngs.params(), (spec.out_features,), param_dtype)
        self.method = method
        self.spec = spec
        self.param_names = tuple(sorted(params))
        for name in self.param_names:
            setattr(self, name, nnx.Param(params[name]))
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias)
        self.dtype = dtype
        self.param_dtype = params[self.param_names[0]].dtype if params else param_dtype
        self.precision = precision
        self.bias_init = bias_init
        for name, value in _UNUSED.items():
            setattr(self, name, value)

    in_features = property(lambda self: self.spec.in_features)
    out_features = property(lambda self: self.spec.out_features)
    kernel_size = property(lambda self: self.spec.kernel_size)
    strides = property(lambda self: self.spec.strides)
    padding = property(lambda self: self.spec.padding)
    input_dilation = property(lambda self: self.spec.input_dilation)
    kernel_dilation = property(lambda self: self.spec.kernel_dilation)
    feature_group_count = property(lambda self: self.spec.feature_group_count)
    use_bias = property(lambda self: self.spec.use_bias)
    kernel_shape = property(lambda self: self.spec.kernel_shape)

    @property
    def kernel(self) -> Float[Array, "*stacked_kernel_shape"]:
        """The standard kernel that the parameters stand for; with their leading axes, if any."""
        build, stack = self.method.kernel, _stack(self.method, self.spec, self.params)
        function = functools.partial(build, spec=self.spec)
        for _ in range(stack):
            function = jax.vmap(function)
        return function(self.params)

    @property
    def params(self) -> Params:
        """The method's parameters as arrays."""
        return {name: getattr(self, name)[...] for name in self.param_names}

    def __call__(self, inputs: Float[ArrayLike, "*batch m"]) -> Float[Array, "*batch_out n"]:
        """Convolve inputs of shape ``(..., *spatial, M)``, any number of batch axes."""
        bias = None if self.bias is None else self.bias[...]
        return apply_method(
            self.method,
            self.spec,
            self.params,
            bias,
            inputs,
            dtype=self.dtype,
            precision=self.precision,
        )


def _stack(method: Method, spec: ConvSpec, params: Params) -> int:
    """Return how many leading axes parameters have, of layers stacked for scan or vmap."""
    plain = jax.eval_shape(lambda key: method.init(key, spec), jax.random.key(0))
    return next((params[n].ndim - len(plain[n].shape) for n in params), 0)
