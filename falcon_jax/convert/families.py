"""Families of models, torchvision's and the FALCON authors': where entries belong in ours."""

import dataclasses
import re
from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from falcon_jax.methods.falcon import Falcon
from falcon_jax.models.resnet import CifarResNet, ResNet
from falcon_jax.models.units import UnitFactory, method_unit, standard_unit
from falcon_jax.models.vgg import VGG, VGG16_STAGES, VGG19_STAGES, ImageNetVGG
from falcon_jax.ops.convolution import max_pool_2x2
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
        head: the path of our last layer.
        aliases: regular expressions of other names that are in use, and those of ``names``.
    """

    names: tuple[tuple[str, str], ...]
    head: str
    aliases: tuple[tuple[str, str], ...] = ()

    def theirs(self, path: str) -> str:
        """Return the name of one of our variables in the state dict."""
        module, _, leaf = path.rpartition("/")
        return f"{_renamed(module, self.names)}.{_LEAVES.get(leaf, leaf)}"

    def usual(self, name: str) -> str:
        """Return the name in the state dict for one of the aliases, or the name itself."""
        module, _, leaf = name.rpartition(".")
        return f"{_renamed(module, self.aliases)}.{leaf}" if module else name


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
    last = [family.theirs(f"{family.head}/{leaf}") for leaf in ("kernel", "bias")]
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
    last: Sequence[str],
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
    classes = {(found[n].shape[:1], expected[n].shape[:1]) for n in last if n in found}
    for theirs, ours in classes:
        if theirs != ours:
            message += (
                f"\nThe last layer has {_count(theirs)} classes in the weights and {_count(ours)} "
                "in the model: make a model of as many, or give head='new' (on the command line "
                "--head=new) to keep the model's own."
            )
    raise ValueError(message)


def _only(name: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {shown(name): arrays[name]} if name in arrays else {}


def _count(shape: tuple[int, ...]) -> int | str:
    return shape[0] if shape else "no"


def _taken_type(array: np.ndarray, expected: jax.ShapeDtypeStruct | None) -> np.dtype:
    """Return the type that an array will have: any floating type becomes the model's."""
    if expected is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array.dtype
    return expected.dtype


def _renamed(module: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in table:
        if match := re.fullmatch(pattern, module):
            return match.expand(name)
    return module.replace("/", ".")


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
    head="head",
)
_VGG = Family(
    names=((r"(features|classifier)/(\d+)", r"\1.\2"),),
    head="classifier/6",
    # timm's classifier is made of convolutions.
    aliases=(
        (r"pre_logits\.fc1", "classifier.0"),
        (r"pre_logits\.fc2", "classifier.3"),
        (r"head\.fc", "classifier.6"),
    ),
)


def torchvision(
    model: nnx.Module, state_dict: Mapping[str, np.ndarray], *, head: Head = "keep"
) -> nnx.Module:
    """Return a model like ours with the weights of torchvision's or timm's.

    Args:
        model: of `falcon_jax.models`: ``resnet18`` to ``resnet152``, ``vgg11`` to ``vgg19_bn``. It
            is not changed, and its weights do not matter.
        state_dict: what `load_torch` returned.
        head: ``keep`` the last layer of the weights; or ``new``: the one of ``model`` stays, so
            that the number of classes may differ.

    Returns:
        A new model: convolutions and fully connected layers with outputs last, BatchNorm with its
        running statistics, all of the types of ``model``.

    Raises:
        ValueError: if the model is none of these, or the weights do not fit it, naming everything
            that is missing, unexpected or misshapen.
    """
    return with_weights(model, _family(model), state_dict, head=head)


def _family(model: nnx.Module) -> Family:
    if isinstance(model, ResNet):
        return _RESNET
    if isinstance(model, ImageNetVGG):
        return _VGG
    raise ValueError(
        f"there are no torchvision weights for {type(model).__name__}; there are for ResNet and "
        "ImageNetVGG, such as falcon_jax.models.resnet18 and vgg16_bn."
    )


_TERM = r"(.+)\.pw(\d*)\.weight"
# Blocks by stage, and convolutions by stage, by their sum.
_RESNETS = {8: (2, 2, 2, 2), 16: (3, 4, 6, 3)}
_VGGS = {13: VGG16_STAGES, 16: VGG19_STAGES}


class MaxPooledVGG(VGG):
    """VGG with max pooling after the last stage, too, as the authors run it.

    Arguments as of `VGG`.

    Reference:
        The authors' code, https://github.com/snudatalab/FALCON, src/models/vgg.py.
    """

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b classes"]:
        """Return float32 logits for a batch of images."""
        for stage in self.stages:
            for unit in stage:
                x = unit(x)
            x = max_pool_2x2(x)
        x = jax.nn.relu(self.dropout(self.hidden(x.mean(axis=(1, 2)))))
        return self.head(x).astype(jnp.float32)


def falcon(state_dict: Mapping[str, np.ndarray], *, rngs: nnx.Rngs | None = None) -> nnx.Module:
    """Return our model for a state dict of the FALCON authors' code.

    Arch, rank and number of classes are those of the state dict: VGG16, VGG19, ResNet18 or
    ResNet34, standard or with FALCON of any rank. The BatchNorm that their FALCON layers carry and
    never use is left out.

    Args:
        state_dict: what `load_torch` returned.
        rngs: of the model's dropout; ``nnx.Rngs(0)`` if not given.

    Returns:
        A `MaxPooledVGG` or a `CifarResNet` with the same logits in evaluation mode.

    Raises:
        ValueError: if it is no such state dict, or anything is missing, unexpected or misshapen.
    """
    ranks = _ranks(state_dict)
    if len(set(ranks.values())) > 1:
        raise ValueError(f"the layers have different ranks: {ranks}; the authors' have one.")
    unit = method_unit(Falcon(rank=next(iter(ranks.values())))) if ranks else standard_unit
    rngs = nnx.Rngs(0) if rngs is None else rngs
    model, family = _built(state_dict, unit, rngs)
    return with_weights(model, family, _stacked(state_dict, ranks), head="keep")


def _ranks(state_dict: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return the number of terms of every FALCON layer."""
    ranks: dict[str, int] = {}
    for name in state_dict:
        if match := re.fullmatch(_TERM, name):
            ranks[match[1]] = ranks.get(match[1], 0) + 1
    return ranks


def _stacked(
    state_dict: Mapping[str, np.ndarray], ranks: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Return a state dict in which the terms of a FALCON layer are one array, its outputs first."""
    stacked = dict(state_dict)
    for layer, rank in ranks.items():
        terms = range(rank) if rank > 1 else ("",)
        pointwise = _taken(stacked, [f"{layer}.pw{term}.weight" for term in terms])
        depthwise = _taken(stacked, [f"{layer}.dw{term}.weight" for term in terms])
        stacked[f"{layer}.pointwise"] = np.stack([term[:, :, 0, 0] for term in pointwise], axis=1)
        stacked[f"{layer}.depthwise"] = np.concatenate(depthwise, axis=1)
        if np.any(stacked.get(f"{layer}.bn.num_batches_tracked", np.asarray(0)) != 0):
            raise ValueError(
                f"the BatchNorm inside {layer} was used; only models that leave it out are read."
            )
        for name in [name for name in stacked if name.startswith(f"{layer}.bn.")]:
            del stacked[name]
    return stacked


def _taken(state_dict: dict[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """Take equally shaped kernels out of a state dict."""
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise ValueError(f"the state dict has no {', '.join(missing)}.")
    kernels = [state_dict.pop(name) for name in names]
    shapes = {kernel.shape for kernel in kernels}
    if len(shapes) > 1 or kernels[0].ndim != 4:
        raise ValueError(f"{', '.join(names)} must be kernels of one shape; they are {shapes}.")
    return kernels


def _built(
    state_dict: Mapping[str, np.ndarray], unit: UnitFactory, rngs: nnx.Rngs
) -> tuple[nnx.Module, Family]:
    blocks = _different(r"residuals\.(\d+)\..*", state_dict)
    if blocks in _RESNETS and "fc.weight" in state_dict:
        counts = _RESNETS[blocks]
        classes = len(state_dict["fc.weight"])
        model = CifarResNet(counts, num_classes=classes, unit=unit, rngs=rngs)
        return model, _resnet_family(counts)
    convs = _different(r"layers\.(\d+)\.running_mean", state_dict)
    if convs in _VGGS and "fc.3.weight" in state_dict:
        classes = len(state_dict["fc.3.weight"])
        stages = _VGGS[convs]
        model = MaxPooledVGG(stages, num_classes=classes, unit=unit, rngs=rngs)
        return model, _vgg_family(stages)
    some = ", ".join(list(state_dict)[:5])
    raise ValueError(
        "this is no state dict of the FALCON authors' VGG16, VGG19, ResNet18 or ResNet34: those "
        f"have names such as layers.0.pw.weight or residuals.0.stacked.conv.0.pw.weight; it has "
        f"{some or 'none'}."
    )


def _different(pattern: str, names: Mapping[str, np.ndarray]) -> int:
    matches = (re.fullmatch(pattern, name) for name in names)
    return len({match[1] for match in matches if match})


def _resnet_family(counts: Sequence[int]) -> Family:
    names = [(r"stem/conv", "first.0"), (r"stem/norm", "first.1"), (r"head", "fc")]
    parts = (
        ("unit1", "stacked.conv", 0),
        ("unit2", "stacked.conv", 3),
        ("shortcut", "shortcut", 0),
    )
    index = 0
    for stage, count in enumerate(counts):
        for block in range(count):
            for ours, theirs, first in parts:
                path, name = f"stages/{stage}/{block}/{ours}", f"residuals.{index}.{theirs}"
                names += [
                    (f"{path}/conv", f"{name}.{first}"),
                    (f"{path}/norm", f"{name}.{first + 1}"),
                ]
            index += 1
    return Family(names=tuple(names), head="head")


def _vgg_family(stages: Sequence[Sequence[int]]) -> Family:
    """Return the names of a VGG: convolution, BatchNorm, ReLU; pooling after every stage."""
    names, index = [(r"hidden", "fc.0"), (r"head", "fc.3")], 0
    for stage, widths in enumerate(stages):
        for unit in range(len(widths)):
            path = f"stages/{stage}/{unit}"
            names += [(f"{path}/conv", f"layers.{index}"), (f"{path}/norm", f"layers.{index + 1}")]
            index += 3
        index += 1
    return Family(names=tuple(names), head="head")
