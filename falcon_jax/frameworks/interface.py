"""Models of NNX and of Linen behind one interface; nothing else asks which framework one is of.

A Linen module comes bound to its variables, ``module.bind(variables)``, and so does what is made of
it: ``.unbind()`` gives module and variables.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from flax import linen as nn
from flax import nnx

from falcon_jax.frameworks import linen as linen_models
from falcon_jax.frameworks import nnx as nnx_models
from falcon_jax.frameworks.layers import Inference, Inputs, Layer
from falcon_jax.methods.base import Method, Params
from falcon_jax.ops.geometry import ConvSpec

Model = nnx.Module | nn.Module
M = TypeVar("M", bound=Model)
T = TypeVar("T")


@runtime_checkable
class Framework(Protocol):
    """What can be asked of a model, whatever the framework; no function changes its model."""

    def find_layers(self, model: Any, inputs: Inputs | None) -> list[Layer]:
        """Return the layers: in the order of use if traced, else of definition."""
        ...

    def kernels(self, model: Any, paths: Iterable[str]) -> dict[str, Any]:
        """Return the kernels of convolutions by path, those that are arrays."""
        ...

    def methods_of(self, model: Any) -> dict[str, Method]:
        """Return the methods of compressed layers by path."""
        ...

    def replace_convs(
        self, model: Any, layers: Mapping[str, tuple[Method, ConvSpec, Params]]
    ) -> Any:
        """Return a model whose convolutions are carried out by methods."""
        ...

    def with_built_kernels(self, model: Any) -> Any:
        """Return a model with standard convolutions for methods that build a kernel per call."""
        ...

    def arrays(self, model: Any) -> dict[str, Any]:
        """Return everything that is saved, by path."""
        ...

    def arrays_like(self, model: Any, names: Iterable[str]) -> dict[str, Any]:
        """Return what a saved model with such names has to have."""
        ...

    def with_arrays(self, model: Any, named: Mapping[str, Any]) -> Any:
        """Return a model with other arrays, by path as `arrays` has them."""
        ...

    def check_whole(self, model: Any) -> None:
        """Raise if a model that has got its arrays still lacks something."""
        ...

    def with_shapes(self, model: Any, inputs: Inputs | None) -> Any:
        """Return a model that has shapes, if it has no arrays."""
        ...

    def params(self, model: Any) -> dict[str, Any]:
        """Return the parameters by path."""
        ...

    def with_params(self, model: Any, named: Mapping[str, Any]) -> Any:
        """Return a model with some parameters replaced."""
        ...

    def weight_names(self, model: Any) -> list[str]:
        """Return the paths of kernels and of what stands for them."""
        ...

    def inference(self, model: Any) -> Inference:
        """Return the model's call in evaluation as a pure function."""
        ...

    def named_inference(self, model: Any) -> Callable[..., Any]:
        """Return the model's call in evaluation, operations in scopes named by module."""
        ...


def by_framework(model: Any, *, nnx_: T, linen: T) -> T:
    """Return what belongs to the framework of a model.

    Args:
        model: an NNX model or a Linen module.
        nnx_: of NNX.
        linen: of Linen.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(model, nnx.Module):
        return nnx_
    if isinstance(model, nn.Module):
        return linen
    raise ValueError(
        f"a model is an nnx.Module, or a linen.Module bound to its variables; got a "
        f"{type(model).__name__}. Of a TrainState give what made it: "
        "module.bind({'params': state.params})."
    )


def framework_of(model: Any) -> Framework:
    """Return the interface to a model.

    Raises:
        ValueError: if it is neither an NNX model nor a Linen module.
    """
    return by_framework(model, nnx_=_NNX, linen=_LINEN)


def defined_layers(model: Model, inputs: Inputs | None) -> list[Layer]:
    """Return the layers without a trace where the model shows them without, as NNX models do."""
    known = by_framework(model, nnx_=None, linen=inputs)
    return framework_of(model).find_layers(model, known)


_NNX: Framework = nnx_models
_LINEN: Framework = linen_models
