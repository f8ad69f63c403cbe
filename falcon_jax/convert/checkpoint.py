"""From a file of weights to a stored model: its arrays, its plan, and where it came from."""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Sequence

from flax import nnx

from falcon_jax.compression.compress import compress
from falcon_jax.compression.plan import Rule, make_plan
from falcon_jax.convert.families import Head, torchvision
from falcon_jax.convert.state_dicts import load_torch
from falcon_jax.methods.base import Method
from falcon_jax.paths import user_path
from falcon_jax.storage.models import (
    Description,
    ImagePreprocessing,
    Stored,
    save_stored,
    uncompressed,
)

# Of torchvision's IMAGENET1K_V1 weights.
IMAGENET = ImagePreprocessing(
    image_size=224, shorter_side=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


def convert_file(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    arch: str,
    classes: int = 1000,
    method: Method | None = None,
    head: Head = "keep",
    key: str | None = None,
    preprocessing: ImagePreprocessing = IMAGENET,
) -> Stored:
    """Convert weights of torchvision or timm to a stored model.

    Args:
        weights: what `load_torch` reads.
        out: directory to make. It is there as a whole or, after an error, not at all.
        arch: a key of ``falcon_jax.models.MODELS`` for which there are such weights.
        classes: outputs of the model.
        method: replaces every convolution but the first, fitted to its kernel; None for none.
        head: as in `torchvision`.
        key: as in `load_torch`.
        preprocessing: of the images that the weights were trained on; that of torchvision's
            ``IMAGENET1K_V1`` weights if not given.

    Returns:
        What is stored: the model, its plan (without a method, it replaces nothing) and its
        description with name and digest of the file of weights.

    Raises:
        ValueError: if the file is damaged, or the weights do not fit the model.
        OSError: if ``out`` is there already, or a file cannot be read or written.
    """
    weights, out = user_path(weights), user_path(out)
    require_absent(out)
    if classes < 1:
        raise ValueError(f"a model has at least one class; got classes={classes}.")
    state_dict = load_torch(weights, key=key)
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    description = Description(
        arch=arch,
        classes=classes,
        preprocessing=preprocessing,
        source={"file": weights.name, "sha256": digest, "head": head}
        | ({} if key is None else {"key": key}),
    )
    model = torchvision(description.build(rngs=nnx.Rngs(0)), state_dict, head=head)
    stored = compressed(uncompressed(model, description), method)
    save_stored(out, stored)
    return stored


def require_absent(out: pathlib.Path) -> None:
    """Raise if a directory that is to be made is there, before anything long is done.

    Raises:
        FileExistsError: saying so.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already. Give another directory, or remove it.")


def compressed(stored: Stored, method: Method | None, *, keep: Sequence[str] = ()) -> Stored:
    """Return a model whose convolutions are replaced by a method, fitted to their kernels.

    Args:
        stored: a model that was not compressed yet; it is not changed.
        method: what replaces them; None for none.
        keep: regular expressions of the paths of those that stay; the first one used if empty.

    Raises:
        ValueError: if the model is compressed already, or a path matches nothing.
    """
    if stored.plan.replaced:
        raise ValueError(
            f"{len(stored.plan.replaced)} of its convolutions are replaced already; start from the "
            "model as it was before."
        )
    keep = keep or [re.escape(stored.plan.rows[0].path)]
    rules = [*(Rule(path=path, method=None) for path in keep), Rule(method=method)]
    plan = make_plan(stored.model, rules, stored.description.sample)
    return dataclasses.replace(stored, model=compress(stored.model, plan), plan=plan)
