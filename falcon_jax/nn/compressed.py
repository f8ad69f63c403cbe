"""A Linen module whose convolutions are carried out by compression methods, or do more work."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from falcon_jax.methods.base import Method, apply_method
from falcon_jax.ops.geometry import ConvSpec, PaddingLike, PerAxis

Replaced = Mapping[str, tuple[Method, ConvSpec]]


def method_conv(
    module: nn.Module,
    method: Method,
    spec: ConvSpec,
    inputs: Float[ArrayLike, "*batch m"],
    *,
    dtype: Dtype | None,
    param_dtype: Dtype,
    precision: lax.PrecisionLike,
    bias_init: Initializer,
) -> Float[Array, "*batch_out n"]:
    """Convolve by a method whose parameters are those of a Linen module.

    To be called in a compact method of ``module``; the parameters get the names that the method
    gives them, beside ``bias``.

    Args:
        module: holds the parameters.
        method: how the convolution is carried out.
        spec: its geometry.
        inputs: shape ``(..., *spatial, M)``.
        dtype: of the computation; as inputs and parameters if None.
        param_dtype: of the parameters.
        precision: of products on accelerators.
        bias_init: makes the bias.

    Returns:
        Output of shape ``(..., *spatial_out, N)``.
    """
    method.require(spec)
    method = method.for_layer(spec)
    names = sorted(jax.eval_shape(lambda: method.init(jax.random.key(0), spec)))
    params = {
        name: module.param(
            name, lambda key, name=name: method.init(key, spec)[name].astype(param_dtype)
        )
        for name in names
    }
    bias = None
    if spec.use_bias:
        bias = module.param("bias", bias_init, (spec.out_features,), param_dtype)
    return apply_method(method, spec, params, bias, inputs, dtype=dtype, precision=precision)


class NamedConv(nn.Module):
    """A convolution by a method, with the arguments of ``linen.Conv``; a subclass names the method.

    Attributes:
        features: output channels N.
        kernel_size: taps per spatial axis; a number for one axis.
        strides: step between outputs.
        padding: as in ``linen.Conv``.
        input_dilation: distance between input points.
        kernel_dilation: distance between taps.
        feature_group_count: groups that the channels are split into.
        use_bias: whether a bias is added.
        dtype: of the computation; as inputs and parameters if None.
        param_dtype: of the parameters.
        precision: of products on accelerators, as in ``jax.lax``.
        bias_init: makes the bias.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: PerAxis = 1
    padding: PaddingLike = "SAME"
    input_dilation: PerAxis = 1
    kernel_dilation: PerAxis = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: lax.PrecisionLike = None
    bias_init: Initializer = nn.initializers.zeros_init()

    method_class: ClassVar[type[Method]]

    def method(self) -> Method:
        """Return the method, with the settings that the module has under the same names."""
        fields = dataclasses.fields(self.method_class)  # type: ignore[arg-type]
        return self.method_class(**{field.name: getattr(self, field.name) for field in fields})

    def spec(self, in_features: int) -> ConvSpec:
        """Return the geometry for inputs of so many channels."""
        return ConvSpec(
            kernel_size=self.kernel_size,
            in_features=in_features,
            out_features=self.features,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            input_dilation=self.input_dilation,
            feature_group_count=self.feature_group_count,
            use_bias=self.use_bias,
        )

    @nn.compact
    def __call__(self, inputs: Float[ArrayLike, "*batch m"]) -> Float[Array, "*batch_out n"]:
        """Convolve inputs of shape ``(..., *spatial, M)``, any number of batch axes."""
        return method_conv(
            self,
            self.method(),
            self.spec(jnp.shape(inputs)[-1]),
            inputs,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            bias_init=self.bias_init,
        )


@dataclasses.dataclass(frozen=True)
class Definition:
    """A module that is not a submodule: Flax looks for those among a module's attributes."""

    module: nn.Module


def check_folded_call(use_running_average: bool | None) -> None:
    """Raise if what stands for a folded BatchNorm is called for training.

    Raises:
        ValueError: saying how to call the model.
    """
    if use_running_average is not None and not use_running_average:
        raise ValueError(
            "a BatchNorm of this model is folded into the convolution before it, so it cannot "
            "normalise by a batch's own statistics; call the model in evaluation mode, or train "
            "the model that was folded."
        )


class CompressedModule(nn.Module):
    """A Linen module with convolutions replaced by methods, or BatchNorms folded into them.

    Made by `compress` and `fold_batchnorm`. Its variables have the paths of the original's; a
    replaced convolution has the method's parameters instead of ``kernel``, one that a BatchNorm was
    folded into has a ``bias``, and the BatchNorm nothing. It initialises, applies, mutates and
    nests as the original does, under jit, vmap, remat and scan.

    Attributes:
        original: the module whose code runs.
        layers: path below this module, method and spec of every replaced convolution.
        folded: paths below this module of each folded BatchNorm and its convolution.
    """

    original: Definition
    layers: tuple[tuple[str, Method, ConvSpec], ...]
    folded: tuple[tuple[str, str], ...] = ()

    def replaced(self) -> Replaced:
        """Return method and spec of the replaced convolutions, by path from the root."""
        return {self._from_root(path): (method, spec) for path, method, spec in self.layers}

    def folded_convs(self) -> Mapping[str, str]:
        """Return the convolution that each folded BatchNorm is in, by paths from the root."""
        return {self._from_root(norm): self._from_root(conv) for norm, conv in self.folded}

    def _from_root(self, path: str) -> str:
        return "/".join((*self.path, path) if path else self.path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original with its convolutions replaced."""
        return self.call_method("__call__", *args, **kwargs)

    def call_method(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call another method of the original.

        ``compressed.apply(variables, "encode", x, method="call_method")`` is
        ``original.apply(variables, x, method="encode")``.

        Args:
            name: of the method.
            *args: its arguments.
            **kwargs: likewise.
        """
        assert self.scope is not None
        # Names are free again in every call, as those of a compact module are.
        module = self.original.module.clone(parent=self.scope.rewound())
        with contextlib.ExitStack() as contexts:
            intercept = _replacing(self.replaced(), self.folded_convs())
            contexts.enter_context(nn.intercept_methods(intercept))
            if self.is_initializing():
                # Without variables, parts under linen.jit look the same to JAX's cache as those of
                # the original; a context of their own tells them apart.
                layers = (self.layers, self.folded)
                contexts.enter_context(set_xla_metadata(falcon_jax=str(hash(layers))))
            return getattr(module, name)(*args, **kwargs)


def with_methods(
    module: nn.Module, layers: Mapping[str, tuple[Method, ConvSpec] | None]
) -> CompressedModule:
    """Return a module with convolutions carried out by methods, without variables.

    Args:
        module: any Linen module, not bound.
        layers: method and spec by path; None for a compressed layer that is a convolution again.
    """
    base = _as_compressed(module)
    known = {path: (method, spec) for path, method, spec in base.layers} | dict(layers)
    new = tuple((path, *both) for path, both in known.items() if both is not None)
    return base.clone(layers=new)


def with_folded(module: nn.Module, folded: Mapping[str, str]) -> CompressedModule:
    """Return a module without BatchNorms whose work a convolution does, without variables.

    Args:
        module: any Linen module, not bound.
        folded: path of the convolution by path of the BatchNorm.
    """
    base, biased = _as_compressed(module), set(folded.values())
    layers = tuple(
        (path, method, dataclasses.replace(spec, use_bias=True) if path in biased else spec)
        for path, method, spec in base.layers
    )
    return base.clone(layers=layers, folded=(*base.folded, *folded.items()))


def _as_compressed(module: nn.Module) -> CompressedModule:
    if isinstance(module, CompressedModule):
        return module
    return CompressedModule(original=Definition(module), layers=())


def _replacing(replaced: Replaced, folded: Mapping[str, str]) -> Callable[..., Any]:
    biased = set(folded.values())

    def intercept(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        conv, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if type(conv) is nn.BatchNorm and path in folded:
            given = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
            if not conv.is_initializing():
                check_folded_call(conv.use_running_average if given is None else given)
            return args[0] if args else kwargs["x"]
        found = replaced.get(path) if type(conv) is nn.Conv else None
        if found is None:
            if type(conv) is nn.Conv and path in biased:
                # A bound module is frozen; this one lives as long as the call.
                object.__setattr__(conv, "use_bias", True)
            return next_fun(*args, **kwargs)
        assert isinstance(conv, nn.Conv)
        method, spec = found
        return method_conv(
            conv,
            method,
            spec,
            *args,
            **kwargs,
            dtype=conv.dtype,
            param_dtype=conv.param_dtype,
            precision=conv.precision,
            bias_init=conv.bias_init,
        )

    return intercept
