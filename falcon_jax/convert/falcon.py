"""Weights of the FALCON authors' own PyTorch models for 32x32 images."""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from falcon_jax.convert.families import Family, with_weights
from falcon_jax.methods.falcon import Falcon
from falcon_jax.models.resnet import CifarResNet
from falcon_jax.models.units import UnitFactory, method_unit, standard_unit
from falcon_jax.models.vgg import VGG, VGG16_STAGES, VGG19_STAGES
from falcon_jax.ops.convolution import max_pool_2x2

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
    return Family(names=tuple(names), heads=(("head", 1),))


def _vgg_family(stages: Sequence[Sequence[int]]) -> Family:
    """Return the names of a VGG: convolution, BatchNorm, ReLU; pooling after every stage."""
    names, index = [(r"hidden", "fc.0"), (r"head", "fc.3")], 0
    for stage, widths in enumerate(stages):
        for unit in range(len(widths)):
            path = f"stages/{stage}/{unit}"
            names += [(f"{path}/conv", f"layers.{index}"), (f"{path}/norm", f"layers.{index + 1}")]
            index += 3
        index += 1
    return Family(names=tuple(names), heads=(("head", 1),))
