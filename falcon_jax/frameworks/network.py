"""A model of either framework as its variables by name and a program that they take part in."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array

from falcon_jax.frameworks.interface import Model, by_framework
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.linen import intercepted_jaxpr, unbound
from falcon_jax.frameworks.nnx import ModuleCall, arrays, jaxpr_through, with_arrays
from falcon_jax.frameworks.program import Program
from falcon_jax.frameworks.tracing import mark_answer, mark_input, mark_kernel
from falcon_jax.nn.method_conv import MethodConv


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A model, taken apart.

    Attributes:
        values: of its variables, by name; changing them changes what its programs compute.
        prefix: of the names of parameters, before their paths.
        program: returns the program of a call in evaluation mode, with some layers marked.
        rebuilt: returns a model with the values as they are now.
    """

    values: dict[str, Array]
    prefix: str
    program: Callable[[Inputs, Collection[str]], Program]
    rebuilt: Callable[[], Any]

    @classmethod
    def of(cls, model: Model) -> "Network":
        """Return a model taken apart.

        Raises:
            ValueError: if a Linen module is not bound to variables.
        """
        taken_apart: Any = by_framework(model, nnx_=_nnx, linen=_linen)
        return taken_apart(model)

    def name(self, path: str, parameter: str) -> str:
        """Return the name of a layer's parameter."""
        return self.prefix + f"{path}/{parameter}".lstrip("/")

    def params(self, path: str) -> dict[str, Array]:
        """Return a layer's parameters."""
        start = self.name(path, "")
        return {
            name.removeprefix(start): value
            for name, value in self.values.items()
            if name.startswith(start) and "/" not in name.removeprefix(start)
        }


def _nnx(model: nnx.Module) -> Network:
    values = {name: jnp.asarray(value) for name, value in sorted(arrays(model).items())}

    def program(inputs: Inputs, paths: Collection[str]) -> Program:
        def around(path: str, layer: ModuleCall, x: Any) -> Any:
            if path not in paths:
                return layer(x)
            module = layer.module
            name = module.param_names[0] if isinstance(module, MethodConv) else "kernel"
            kernel = getattr(module, name)[...]
            return _marked(path, name, kernel, layer, x)

        closed = jaxpr_through(model, inputs, lambda m: isinstance(m, nnx.Conv), around)
        return Program(closed, list(values), values)

    return Network(
        values=values, prefix="", program=program, rebuilt=lambda: with_arrays(model, values)
    )


def _linen(bound: nn.Module) -> Network:
    module, variables = unbound(bound)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    names = [_joined(keys) for keys, _ in leaves]
    values = {name: jnp.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}

    def program(inputs: Inputs, paths: Collection[str]) -> Program:
        def intercept(
            next_fun: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: Mapping[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            conv, path = context.module, "/".join(context.module.path)
            own = path in paths and context.method_name == "__call__"
            if not (own and isinstance(conv, nn.Conv)):
                return next_fun(*args, **kwargs)
            held: Any = conv.variables.get("params", {})
            name = min((n for n in held if n != "bias"), default="kernel")
            kernel: Any = nn.meta.unbox(held[name])
            x, args = (args[0], args[1:]) if args else (next(iter(kwargs.values())), ())
            return _marked(path, name, kernel, lambda x: next_fun(x, *args), x)

        closed = intercepted_jaxpr(module, inputs, variables, intercept)
        return Program(closed, names, values)

    def rebuilt() -> nn.Module:
        new = jax.tree_util.tree_map_with_path(lambda keys, _: values[_joined(keys)], variables)
        return module.bind(new)

    return Network(values=values, prefix="params/", program=program, rebuilt=rebuilt)


def _joined(keys: Any) -> str:
    return "/".join(str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey))


def _marked(path: str, name: str, kernel: Array, layer: Callable[[Any], Any], x: Any) -> Any:
    x = jnp.asarray(x)
    mark_kernel(path, kernel, f"{path}/{name}".lstrip("/"))
    mark_input(path, x)
    return mark_answer(path, layer(x))
