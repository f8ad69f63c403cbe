"""From a file of weights to a checkpoint: the model, its plan, and where it came from."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from falcon_jax.compression import Plan, Rule, compress, make_plan, save_compressed
from falcon_jax.convert.families import Head
from falcon_jax.convert.torch_file import load_torch
from falcon_jax.convert.torchvision import torchvision
from falcon_jax.manifest import MANIFEST, write_manifest
from falcon_jax.methods import Method
from falcon_jax.models import get_model

METADATA = "metadata.json"
_IMAGE = (1, 224, 224, 3)


def convert_file(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    arch: str,
    classes: int = 1000,
    method: Method | None = None,
    head: Head = "keep",
) -> Plan:
    """Convert weights of torchvision or timm to a checkpoint that `load_compressed` reads.

    Beside the model and its plan the checkpoint has ``metadata.json``: the arch, the classes, name
    and digest of the file of weights, and the preprocessing of torchvision's images.

    Args:
        weights: what `load_torch` reads.
        out: directory to make. It is there as a whole or, after an error, not at all.
        arch: a key of ``falcon_jax.models.MODELS`` for which there are such weights.
        classes: outputs of the model.
        method: replaces every convolution but the first, fitted to its kernel; None for none.
        head: as in `torchvision`.

    Returns:
        The plan; without a method, it replaces nothing.

    Raises:
        ValueError: if the file is damaged, or the weights do not fit the model.
        OSError: if ``out`` is there already, or a file cannot be read or written.
    """
    weights, out = pathlib.Path(weights), pathlib.Path(out).absolute()
    if out.exists():
        raise FileExistsError(f"{out} is there already. Give another directory, or remove it.")
    if classes < 1:
        raise ValueError(f"a model has at least one class; got classes={classes}.")
    state_dict = load_torch(weights)
    model = torchvision(
        get_model(arch, num_classes=classes, rngs=nnx.Rngs(0)), state_dict, head=head
    )
    sample = jax.ShapeDtypeStruct(_IMAGE, jnp.float32)
    plan = make_plan(model, _rules(model, method, sample), sample)
    model = compress(model, plan)
    metadata = {
        "arch": arch,
        "classes": classes,
        "head": head,
        "source": {"file": weights.name, "sha256": _digest(weights)},
        "preprocessing": _preprocessing(),
    }
    _save(out, model, plan, metadata)
    return plan


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a checkpoint that `convert_file` made.

    Args:
        path: its directory.

    Raises:
        OSError: if there is none.
    """
    return json.loads((pathlib.Path(path) / METADATA).read_text())


def _rules(model: nnx.Module, method: Method | None, sample: jax.ShapeDtypeStruct) -> list[Rule]:
    if method is None:
        return [Rule(method=None)]
    # Only in a traced plan is the first row the convolution that is used first.
    first = make_plan(model, [Rule(method=None)], sample).rows[0].path
    return [Rule(path=re.escape(first), method=None), Rule(method=method)]


def _preprocessing() -> dict[str, Any]:
    """Return what torchvision does to images: 0 to 1, shorter side 256, the middle 224x224."""
    return {
        "resize": 256,
        "crop": 224,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save(out: pathlib.Path, model: nnx.Module, plan: Plan, metadata: dict[str, Any]) -> None:
    """Write a checkpoint beside its place and move it there when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        checkpoint = unfinished / "checkpoint"
        save_compressed(checkpoint, model, plan)
        (checkpoint / METADATA).write_text(json.dumps(metadata, indent=1) + "\n")
        (checkpoint / MANIFEST).unlink()
        write_manifest(checkpoint)
        checkpoint.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
