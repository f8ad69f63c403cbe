"""`safetensors` and `load_safetensors`: a model's arrays in the format that the Hub reads."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors as safetensors_package
import safetensors.numpy as safetensors_numpy

from falcon_jax.compression.quantization import PackedArray, Quantization, packed_arrays
from falcon_jax.export.files import writable, writing
from falcon_jax.frameworks.interface import Model, framework_of
from falcon_jax.paths import user_path
from falcon_jax.settings import is_whole
from falcon_jax.wording import differences, reason, shown

# What of the header says which arrays are codes, and what they stand for.
_CODES = "falcon_jax.codes"


def safetensors(
    model: Model,
    path: str | os.PathLike[str],
    *,
    quantization: Quantization | None = None,
) -> pathlib.Path:
    """Write a model's arrays as a safetensors file.

    An array's name is its path with dots, such as ``stages.0.1.conv.pointwise``; of a Linen module,
    after its collection, ``params``. With a quantization the codes stand in place of the floats,
    packed, as ``NAME.codes``, ``NAME.minimum`` and ``NAME.scale``.

    Args:
        model: an NNX model, or a bound Linen module; everything but the state of random number
            generators is written.
        path: of the file.
        quantization: what `quantize_weights` returned with the model.

    Returns:
        The path.

    Raises:
        ValueError: if the model is not what the codes stand for, or two arrays have one name.
        OSError: if the file cannot be written.

    >>> import tempfile
    >>> from flax import nnx
    >>> from safetensors.numpy import load_file
    >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     arrays = load_file(safetensors(model, f"{folder}/model.safetensors"))
    >>> sorted((name, array.shape) for name, array in arrays.items())
    [('layers.0.bias', (2,)), ('layers.0.kernel', (3, 2))]
    """
    file = writable(path)
    named = {name: np.asarray(array) for name, array in framework_of(model).arrays(model).items()}
    packed = {} if quantization is None else packed_arrays(named, quantization)
    content: dict[str, np.ndarray] = {}
    header: dict[str, Any] = {}
    for name, array in named.items():
        dotted = _dotted(name)
        found = {dotted: array}
        if name in packed:
            parts = packed[name]._asdict().items()
            found = {f"{dotted}.{part}": np.asarray(value) for part, value in parts}
            assert quantization is not None
            header[dotted] = {
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "bits": quantization.bits,
            }
        if twice := content.keys() & found.keys():
            raise ValueError(f"two arrays of the model are named {min(twice)!r}; rename one.")
        content |= {n: np.ascontiguousarray(a).reshape(a.shape) for n, a in found.items()}
    metadata = {_CODES: json.dumps(header)} if header else None
    with writing(file) as unfinished:
        safetensors_numpy.save_file(content, unfinished, metadata)
    return file


def load_safetensors(path: str | os.PathLike[str], model: Any) -> Any:
    """Return a copy of a model with the arrays of a file that `safetensors` wrote.

    Args:
        path: of the file.
        model: of the same structure, an NNX model or a bound Linen module; it is not changed.

    Returns:
        The copy.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds other arrays than the model, saying which.

    >>> import tempfile
    >>> from flax import nnx
    >>> a, b = (nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     copy = load_safetensors(safetensors(a, f"{folder}/a.safetensors"), b)
    >>> bool((copy.kernel[...] == a.kernel[...]).all())
    True
    """
    file = user_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}.")
    saved = read_arrays(file)
    check_fits(file, model, saved)
    framework = framework_of(model)
    new = {name: jnp.asarray(saved[_dotted(name)]) for name in framework.arrays(model)}
    return framework.with_arrays(model, new)


def check_fits(file: pathlib.Path, model: Any, saved: Mapping[str, Any]) -> None:
    """Raise unless a file's arrays are those of a model.

    Args:
        file: to be named.
        model: an NNX model or a bound Linen module; it may have shapes in place of arrays.
        saved: the file's arrays by name.

    Raises:
        ValueError: saying what differs.
    """
    different = differences(
        {_dotted(n): a for n, a in framework_of(model).arrays(model).items()}, saved
    )
    if different:
        raise ValueError(f"{file} does not fit the model; in the file:\n{different}")


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def read_arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file that `safetensors` wrote, by name, codes as what they stand for.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        with safetensors_package.safe_open(file, "numpy") as opened:
            metadata = opened.metadata() or {}
            content = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = json.loads(metadata.get(_CODES, "{}"))
        for name, about in header.items():
            parts = {f: content.pop(f"{name}.{f}") for f in PackedArray._fields}
            packed = PackedArray(
                codes=parts["codes"],
                minimum=np.float32(parts["minimum"]),
                scale=np.float32(parts["scale"]),
            )
            content[name] = _unpacked(packed, **about)
    except (
        safetensors_package.SafetensorError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        raise ValueError(f"{file} is damaged ({reason(error, 200)}).") from None
    return content


def _unpacked(packed: PackedArray, *, shape: Any, dtype: Any, bits: Any) -> np.ndarray:
    if not is_whole(bits) or not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {shown(bits, 40)}")
    values = packed.values(tuple(map(int, shape)), bits)
    return values.astype(jnp.dtype(dtype))
