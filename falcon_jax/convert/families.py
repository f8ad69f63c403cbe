"""Families of models: where the entries of a state dict belong in ours."""

import dataclasses
import re
from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from falcon_jax.models.resnet import ResNet
from falcon_jax.models.ssd import BOXES_PER_POINT, SSD
from falcon_jax.models.vgg import ImageNetVGG
from falcon_jax.wording import differences, shown

Head = Literal["keep", "new"]

_LEAVES = MappingProxyType(
    {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
)
_IGNORED = "num_batches_tracked"
_LISTED = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The names of a family of models.

    Attributes:
        names: regular expressions of our paths of modules, and what they are called in the state
            dict; the first that matches the whole path decides.
        heads: the paths of our last layers, and how many outputs of each a class has.
        aliases: regular expressions of other names that are in use, and those of ``names``.
        variables: as ``names``, of paths of variables that have another name in the state dict.
    """

    names: tuple[tuple[str, str], ...]
    heads: tuple[tuple[str, int], ...]
    aliases: tuple[tuple[str, str], ...] = ()
    variables: tuple[tuple[str, str], ...] = ()

    def theirs(self, path: str) -> str:
        """Return the name of one of our variables in the state dict."""
        if (name := _matched(path, self.variables)) is not None:
            return name
        module, _, leaf = path.rpartition("/")
        return f"{_renamed(module, self.names)}.{_LEAVES.get(leaf, leaf)}"

    def usual(self, name: str) -> str:
        """Return the name in the state dict for one of the aliases, or the name itself."""
        module, _, leaf = name.rpartition(".")
        return f"{_renamed(module, self.aliases)}.{leaf}" if module else name

    def last(self) -> dict[str, int]:
        """Return the names of the last layers' variables, and how many outputs a class has."""
        return {
            self.theirs(f"{path}/{leaf}"): outputs
            for path, outputs in self.heads
            for leaf in ("kernel", "bias")
        }


def with_weights(
    model: nnx.Module, family: Family, state_dict: Mapping[str, np.ndarray], *, head: Head
) -> nnx.Module:
    """Return a copy of a model with the weights of a state dict.

    Args:
        model: gives the structure; it is not changed.
        family: where what belongs.
        state_dict: arrays by name, in PyTorch's layout.
        head: ``keep`` the last layer of the state dict, or leave the model a ``new`` one.

    Returns:
        The copy; its parameters and statistics have the types that those of ``model`` have.

    Raises:
        ValueError: if anything is missing, unexpected or misshapen, naming all of it.
    """
    if head not in ("keep", "new"):
        raise ValueError(f"head is one of keep, new; got {head!r}.")
    graphdef, state, rest = nnx.split(model, nnx.Any(nnx.Param, nnx.BatchStat), ...)
    variables = dict(nnx.to_flat_state(state))
    places = {family.theirs("/".join(map(str, path))): path for path in variables}
    given = {family.usual(name): array for name, array in state_dict.items()}
    given = {name: array for name, array in given.items() if not name.endswith(_IGNORED)}
    given = _without_prefix(given, places)
    last = family.last()
    if head == "new":
        given = {name: array for name, array in given.items() if name not in last}
        places = {name: path for name, path in places.items() if name not in last}
    expected = {name: _in_their_layout(variables[path]) for name, path in places.items()}
    given = {name: _flattened(array, expected.get(name)) for name, array in given.items()}
    _check(expected, given, last, type(model).__name__)
    for name, path in places.items():
        array = jnp.array(_in_our_layout(given[name]), dtype=variables[path].dtype)
        variables[path] = variables[path].replace(array)
    return nnx.merge(graphdef, nnx.from_flat_state(variables), rest)


def _without_prefix(
    given: Mapping[str, np.ndarray], expected: Container[str]
) -> Mapping[str, np.ndarray]:
    """Take off what stands before all names, as long as none of them is expected."""
    while given and not any(name in expected for name in given):
        firsts = {name.partition(".")[0] for name in given}
        if len(firsts) > 1 or not all("." in name for name in given):
            break
        given = {name.partition(".")[2]: array for name, array in given.items()}
    return given


def _check(
    expected: Mapping[str, jax.ShapeDtypeStruct],
    given: Mapping[str, np.ndarray],
    last: Mapping[str, int],
    model_name: str,
) -> None:
    found = {
        name: jax.ShapeDtypeStruct(array.shape, _taken_type(array, expected.get(name)))
        for name, array in given.items()
    }
    names = [*expected, *(name for name in found if name not in expected)]
    # Name by name, as a whole list would be cut short.
    lines = [differences(_only(name, expected), _only(name, found)) for name in names]
    if not any(lines):
        return
    lines = [line for line in lines if line]
    more = [f"  and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    different = "\n".join(lines[:_LISTED] + more)
    message = f"the weights do not fit this {model_name}:\n{different}"
    classes = {
        (_classes(found[name], outputs), _classes(expected[name], outputs))
        for name, outputs in last.items()
        if name in found
    }
    for theirs, ours in classes:
        if theirs != ours:
            message += (
                f"\nThe last layer has {theirs} classes in the weights and {ours} "
                "in the model: make a model of as many, or give head='new' (on the command line "
                "--head=new) to keep the model's own."
            )
    raise ValueError(message)


def _only(name: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {shown(name): arrays[name]} if name in arrays else {}


def _classes(array: jax.ShapeDtypeStruct, outputs: int) -> int | str:
    return array.shape[0] // outputs if array.shape else "no"


def _taken_type(array: np.ndarray, expected: jax.ShapeDtypeStruct | None) -> np.dtype:
    """Return the type that an array will have: any floating type becomes the model's."""
    if expected is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array.dtype
    return expected.dtype


def _renamed(module: str, table: tuple[tuple[str, str], ...]) -> str:
    name = _matched(module, table)
    return module.replace("/", ".") if name is None else name


def _matched(path: str, table: tuple[tuple[str, str], ...]) -> str | None:
    matches = ((re.fullmatch(pattern, path), name) for pattern, name in table)
    return next((match.expand(name) for match, name in matches if match), None)


def _in_their_layout(variable: nnx.Variable) -> jax.ShapeDtypeStruct:
    """Return the shape with outputs first, then inputs, then what is left."""
    shape = variable.shape
    theirs = (*shape[:-3:-1], *shape[:-2]) if len(shape) > 1 else shape
    return jax.ShapeDtypeStruct(theirs, variable.dtype)


def _in_our_layout(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Return an array with inputs and outputs last."""
    return array.transpose(*range(2, array.ndim), 1, 0) if array.ndim > 1 else array


def _flattened(
    array: Shaped[np.ndarray, "..."], expected: jax.ShapeDtypeStruct | None
) -> Shaped[np.ndarray, "..."]:
    """Return the matrix of a convolution that does a fully connected layer's work."""
    if expected is None or (array.ndim, len(expected.shape)) != (4, 2):
        return array
    return array.reshape(expected.shape) if array.size == expected.size else array


_RESNET = Family(
    names=(
        (r"stem/conv", "conv1"),
        (r"stem/norm", "bn1"),
        (r"(layer\d)/(\d+)/unit(\d)/conv", r"\1.\2.conv\3"),
        (r"(layer\d)/(\d+)/unit(\d)/norm", r"\1.\2.bn\3"),
        (r"(layer\d)/(\d+)/shortcut/conv", r"\1.\2.downsample.0"),
        (r"(layer\d)/(\d+)/shortcut/norm", r"\1.\2.downsample.1"),
        (r"head", "fc"),
    ),
    heads=(("head", 1),),
)
_VGG = Family(
    names=((r"(features|classifier)/(\d+)", r"\1.\2"),),
    heads=(("classifier/6", 1),),
    # timm's classifier is made of convolutions.
    aliases=(
        (r"pre_logits\.fc1", "classifier.0"),
        (r"pre_logits\.fc2", "classifier.3"),
        (r"head\.fc", "classifier.6"),
    ),
)

_SSD = Family(
    names=(
        (r"features/(\d+)", r"backbone.features.\1"),
        # Theirs has what follows VGG's last convolution in a part of its own.
        (r"extra/0/8", "backbone.extra.0.7.1"),
        (r"extra/0/10", "backbone.extra.0.7.3"),
        (r"extra/(\d+)/(\d+)", r"backbone.extra.\1.\2"),
        (r"(classification|regression)/(\d)", r"head.\1_head.module_list.\2"),
    ),
    heads=tuple((f"classification/{i}", boxes) for i, boxes in enumerate(BOXES_PER_POINT)),
    variables=((r"norm/scale", "backbone.scale_weight"),),
)


def torchvision(
    model: nnx.Module, state_dict: Mapping[str, np.ndarray], *, head: Head = "keep"
) -> nnx.Module:
    """Return a model like ours with the weights of torchvision's or timm's.

    Args:
        model: of `falcon_jax.models`: ``resnet18`` to ``resnet152``, ``vgg11`` to ``vgg19_bn``,
            ``ssd300_vgg16``. It is not changed, and its weights do not matter.
        state_dict: what `load_torch` returned.
        head: ``keep`` the last layer of the weights; or ``new``: the one of ``model`` stays, so
            that the number of classes may differ.

    Returns:
        A new model: convolutions and fully connected layers with outputs last, BatchNorm with its
        running statistics, all of the types of ``model``.

    Raises:
        ValueError: if the model is none of these, or the weights do not fit it, naming everything
            that is missing, unexpected or misshapen.

    >>> from falcon_jax.models.units import plain_unit
    >>> def build():
    ...     return ImageNetVGG([[4]], num_classes=2, unit=plain_unit, rngs=nnx.Rngs(0))
    >>> shapes = {"features.0": (4, 3, 3, 3), "classifier.0": (4096, 7 * 7 * 4)}
    >>> shapes |= {"classifier.3": (4096, 4096), "classifier.6": (2, 4096)}
    >>> weights = {f"{name}.weight": np.zeros(shape, "f4") for name, shape in shapes.items()}
    >>> weights |= {f"{name}.bias": np.zeros(shape[0], "f4") for name, shape in shapes.items()}
    >>> torchvision(nnx.eval_shape(build), weights).features[0].kernel.shape
    (3, 3, 3, 4)
    """
    return with_weights(model, _family(model), state_dict, head=head)


def _family(model: nnx.Module) -> Family:
    if isinstance(model, ResNet):
        return _RESNET
    if isinstance(model, ImageNetVGG):
        return _VGG
    if isinstance(model, SSD):
        return _SSD
    raise ValueError(
        f"there are no torchvision weights for {type(model).__name__}; there are for ResNet, "
        "ImageNetVGG and SSD, such as falcon_jax.models.resnet18, vgg16_bn and ssd300_vgg16."
    )
