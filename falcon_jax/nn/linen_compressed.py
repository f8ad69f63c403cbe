"""A Linen module whose convolutions are carried out by compression methods."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from jax.experimental.xla_metadata import set_xla_metadata

from falcon_jax.methods import ConvSpec, Method
from falcon_jax.nn.linen import method_conv

Replaced = Mapping[str, tuple[Method, ConvSpec]]


@dataclasses.dataclass(frozen=True)
class Definition:
    """A module that is not a submodule: Flax looks for those among a module's attributes."""

    module: nn.Module


class CompressedModule(nn.Module):
    """A Linen module with convolutions replaced by methods; made by `compress`.

    Its variables have the paths of the original's; a replaced convolution has the method's
    parameters instead of ``kernel``. It initialises, applies, mutates and nests as the original
    does, under jit, vmap, remat and scan.

    Attributes:
        original: the module whose code runs.
        layers: path below this module, method and spec of every replaced convolution.
    """

    original: Definition
    layers: tuple[tuple[str, Method, ConvSpec], ...]

    def replaced(self) -> Replaced:
        """Return method and spec of the replaced convolutions, by path from the root."""
        return {
            "/".join((*self.path, path) if path else self.path): (method, spec)
            for path, method, spec in self.layers
        }

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
        module = self.original.module.clone(parent=self.scope)
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(nn.intercept_methods(_replacing(self.replaced())))
            if self.is_initializing():
                # Without variables, parts under linen.jit look the same to JAX's cache as those of
                # the original; a context of their own tells them apart.
                contexts.enter_context(set_xla_metadata(falcon_jax=str(hash(self.layers))))
            return getattr(module, name)(*args, **kwargs)


def _replacing(replaced: Replaced) -> Callable[..., Any]:
    def intercept(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        conv = context.module
        found = replaced.get("/".join(conv.path)) if type(conv) is nn.Conv else None
        if found is None or context.method_name != "__call__":
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
