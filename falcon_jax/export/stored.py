"""Stored models written for other programs: in any of the formats by name, and for the Hub.

On the Hugging Face Hub, JSON says what a model is, and its arrays are safetensors.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from flax import nnx

from falcon_jax.compression.plan import Plan, compressed_blank
from falcon_jax.compression.quantization import Quantization
from falcon_jax.export.files import FORMATS, optional, require_packages
from falcon_jax.export.inference import AUTO
from falcon_jax.export.onnx_file import OPSET, onnx, onnx_int8
from falcon_jax.export.safetensors_file import (
    check_fits,
    load_safetensors,
    read_arrays,
    safetensors,
)
from falcon_jax.export.serialized import stablehlo, tflite
from falcon_jax.models.registry import same_key_rngs
from falcon_jax.paths import read_json, user_path
from falcon_jax.settings import no_such
from falcon_jax.storage.models import Description, Stored
from falcon_jax.wording import reason, shown


def export_stored(
    stored: Stored,
    name: str,
    path: str | os.PathLike[str],
    *,
    batches: Iterable[Any] = (),
    open_sizes: str | Sequence[str] = AUTO,
    opset: int = OPSET,
) -> str:
    """Write a stored model in a format.

    The description of the model, which says how images are prepared, goes into files of ONNX as
    metadata ``falcon_jax``.

    Args:
        stored: the model.
        name: of the format, out of `FORMATS`.
        path: of the file, or folder.
        batches: for ``int8``: images to calibrate on, as the model sees them.
        open_sizes: as in `falcon_jax.export.onnx`.
        opset: as there.

    Returns:
        What was written, as a text.

    Raises:
        ValueError: if there is no such format, or the model cannot be written in it.
        ImportError: if a package is not installed.
        OSError: if the file cannot be written.

    >>> import tempfile
    >>> from falcon_jax.storage.models import ImagePreprocessing, uncompressed
    >>> images = ImagePreprocessing(image_size=8, mean=(0.5,), std=(0.5,))
    >>> description = Description(arch="vgg8_cifar", classes=2, width=1 / 32, preprocessing=images)
    >>> stored = uncompressed(description.build(rngs=nnx.Rngs(0)), description)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pathlib.Path(export_stored(stored, "safetensors", f"{folder}/vgg.safetensors")).name
    'vgg.safetensors'
    """
    if name not in FORMATS:
        raise ValueError(no_such("format", name, FORMATS))
    require_packages([name])
    model, sample = stored.model, stored.description.sample
    if name == "hub":
        save_pretrained(stored, path)
        return os.fspath(path)
    if name == "safetensors":
        return os.fspath(safetensors(model, path))
    if name == "tflite":
        return str(tflite(model, sample, path))
    if name == "stablehlo":
        return str(stablehlo(model, sample, path, open_sizes=open_sizes))
    metadata = {"falcon_jax": json.dumps(stored.description.to_json())}
    if name == "onnx":
        made = onnx(model, sample, path, open_sizes=open_sizes, opset=opset, metadata=metadata)
    else:
        made = onnx_int8(
            model,
            sample,
            path,
            batches,
            open_sizes=open_sizes,
            opset=opset,
            metadata=metadata,
        )
    return str(made)


CONFIG, WEIGHTS = "config.json", "model.safetensors"
_VERSION = 1
_CARD = """---
{{ card_data }}
---

A network compressed by falcon_jax. To load it:

```python
import falcon_jax as fj

stored = fj.export.from_pretrained("owner/name")
logits = stored.model(images)  # prepared as stored.description.preprocessing says
```
"""


def save_pretrained(
    stored: Stored,
    folder: str | os.PathLike[str],
    *,
    quantization: Quantization | None = None,
) -> None:
    """Write a stored model as the Hub has models: a folder with its description and its arrays.

    Args:
        stored: the model, its plan and what it is.
        folder: made if it is not there; files of the same names are replaced.
        quantization: what `quantize_weights` returned with the model; its codes are written.

    Returns:
        Nothing; `from_pretrained` reads the folder.

    Raises:
        ValueError: if the model is not what the codes stand for.
        ImportError: if huggingface_hub is not installed.
        OSError: if the files cannot be written.
    """
    _mixin()(stored, quantization).save_pretrained(user_path(folder))


def push_to_hub(
    stored: Stored, repo_id: str, *, quantization: Quantization | None = None, **options: Any
) -> str:
    """Upload a stored model to the Hub.

    Args:
        stored: the model, its plan and what it is.
        repo_id: where to, ``owner/name``.
        quantization: as in `save_pretrained`.
        **options: of ``huggingface_hub.ModelHubMixin.push_to_hub``, such as ``private=True``.

    Returns:
        The address of the commit.

    Raises:
        ImportError: if huggingface_hub is not installed.
    """
    return _mixin()(stored, quantization).push_to_hub(repo_id, **options)


def from_pretrained(name: str | os.PathLike[str], **options: Any) -> Stored:
    """Load a model of the Hub, or of a folder that `save_pretrained` wrote.

    Args:
        name: ``owner/name``, or the folder.
        **options: of ``huggingface_hub.ModelHubMixin.from_pretrained``, such as ``revision``,
            ``cache_dir`` or ``local_files_only=True``.

    Returns:
        The model in evaluation mode, its plan and what it is.

    Raises:
        FileNotFoundError: if the folder holds no such model.
        ValueError: if a file is damaged, or the files do not fit each other.
        ImportError: if huggingface_hub is not installed.
    """
    folder, text = user_path(name), os.fspath(name)
    if not folder.is_dir() and (text.count("/") > 1 or text.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"there is no folder {folder}.")
    found = _mixin().from_pretrained(folder if folder.is_dir() else text, **options)
    return found.stored


def _mixin() -> Any:
    """Return the class by which huggingface_hub saves, loads and uploads such models."""
    hub = optional("huggingface_hub", "a model on the Hub", "hub")

    class Pretrained(  # type: ignore  # its base says what it takes, where it is installed
        hub.ModelHubMixin,
        library_name="falcon_jax",  # type: ignore
        tags=["jax", "flax", "model-compression"],  # type: ignore
        model_card_template=_CARD,  # type: ignore
    ):
        def __init__(self, stored: Any, quantization: Any = None):
            self.stored = stored
            self.quantization = quantization
            # What the mixin made of the arguments is no configuration.
            self._hub_mixin_config = None

        def _save_pretrained(self, save_directory: pathlib.Path) -> None:
            safetensors(self.stored.model, save_directory / WEIGHTS, quantization=self.quantization)
            (save_directory / CONFIG).write_text(json.dumps(_to_json(self.stored), indent=1) + "\n")

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **options: Any) -> Any:
            wanted = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            given = {name: options[name] for name in wanted if name in options}
            if os.path.isdir(model_id):
                files = [pathlib.Path(model_id) / name for name in (CONFIG, WEIGHTS)]
            else:
                files = [
                    pathlib.Path(hub.hf_hub_download(model_id, name, **given))
                    for name in (CONFIG, WEIGHTS)
                ]
            return cls(_load(*files))

    return Pretrained


def _to_json(stored: Stored) -> dict[str, Any]:
    return {
        "falcon_jax": _VERSION,
        "description": stored.description.to_json(),
        "plan": stored.plan.to_json(),
    }


def _load(config: pathlib.Path, weights: pathlib.Path) -> Stored:
    for file in (config, weights):
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file.name} in {file.parent}.")
    data = read_json(config)
    if not isinstance(data, dict) or data.get("falcon_jax") != _VERSION:
        version = data.get("falcon_jax") if isinstance(data, dict) else None
        raise ValueError(
            f"{config} describes no model that this falcon_jax reads: it has version "
            f"{shown(version, 40)}, not {_VERSION}."
        )
    try:
        description = Description.from_json(data["description"])
        plan = Plan.from_json(data["plan"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{config} is damaged ({reason(error)}).") from None

    def built(rngs: nnx.Rngs) -> nnx.Module:
        return compressed_blank(description.build(rngs=rngs), plan)

    # What it says may be enormous: no array is made before it fits those that are there.
    saved = read_arrays(weights)
    nnx.eval_shape(lambda: _fitting(weights, built(same_key_rngs()), saved))
    model = load_safetensors(weights, built(nnx.Rngs(0)))
    model.eval()
    return Stored(model=model, plan=plan, description=description)


def _fitting(file: pathlib.Path, model: nnx.Module, saved: Any) -> nnx.Module:
    check_fits(file, model, saved)
    return model
