"""Compressed models on disk: the plan and the arrays in one Orbax directory, with digests."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import SingleDeviceSharding

from falcon_jax.compression.plan import Plan, compressed_blank
from falcon_jax.compression.quantization import (
    PackedArray,
    Quantization,
    packed_arrays,
    packed_bytes,
)
from falcon_jax.frameworks.interface import Model, framework_of
from falcon_jax.paths import read_json, user_path
from falcon_jax.settings import is_whole
from falcon_jax.storage.directories import (
    MANIFEST,
    array_digest,
    check_manifest,
    standing,
    unlisted_file,
    whole_directory,
    write_manifest,
)
from falcon_jax.wording import differences, reason, shown

METADATA = "metadata.json"
_VERSION = 1
_LARGE = 2**30  # bytes of arrays from which on the files must be so large, too
_DENSEST = 2000  # bytes of arrays to one byte of compressed files


def save_compressed(
    path: str | os.PathLike[str],
    model: Model,
    plan: Plan,
    *,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    quantization: Quantization | None = None,
) -> None:
    """Save a compressed model with its plan.

    Everything of an NNX model but the state of random number generators is saved; of a Linen
    module, bound, its variables. The directory is there as a whole or, after an error, not at all.

    Args:
        path: directory to make.
        model: what `compress` returned, trained further or not.
        plan: what it was compressed with.
        overwrite: whether to replace a saved model that is there. At every moment the old or new
            one stands there as a whole, or is found by `load_compressed`; a directory with other
            files in it is not replaced.
        metadata: plain data of the caller's, JSON, kept in ``metadata.json``.
        quantization: what `quantize_weights` returned with the model: codes are saved in place of
            the floats that they stand for, and loaded as these.

    Returns:
        Nothing; `load_compressed` reads the directory.

    Raises:
        ValueError: if the model is not what the plan makes, or not what the codes stand for, or a
            Linen module is not bound.
        FileExistsError: if the directory is there, or holds other files than a saved model.
        OSError: if it cannot be written.

    >>> import tempfile
    >>> from flax import nnx
    >>> from falcon_jax.compression.compress import compress
    >>> from falcon_jax.compression.plan import Rule, make_plan
    >>> from falcon_jax.methods.falcon import Falcon
    >>> conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    >>> plan = make_plan(conv, [Rule(method=Falcon(rank=2))])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_compressed(f"{folder}/small", compress(conv, plan), plan, metadata={"of": "conv"})
    ...     open_compressed(f"{folder}/small").metadata
    {'of': 'conv'}
    """
    directory = _place(path)
    if standing(directory).exists():
        _check_replaceable(directory, overwrite)
    framework = framework_of(model)
    named = {n: np.asarray(array) for n, array in framework.arrays(model).items()}
    _check_carried_out(model, plan)
    described: dict[str, dict[str, Any]] = {
        name: {"shape": array.shape, "dtype": str(array.dtype), "sha256": array_digest(array)}
        for name, array in named.items()
    }
    kept: dict[str, Any] = dict(named)
    if quantization is not None:
        for name, packed in packed_arrays(named, quantization).items():
            described[name]["bits"] = quantization.bits
            kept |= {name: {k: np.asarray(v) for k, v in packed._asdict().items()}}
    data = {"version": _VERSION, "plan": plan.to_json(), "arrays": described}
    with whole_directory(directory) as unfinished:
        with _checkpointer() as checkpointer:
            checkpointer.save(
                unfinished,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(_nested(kept)),  # type: ignore[call-arg]
                    plan=ocp.args.JsonSave(data),  # type: ignore[call-arg]
                ),
            )
        if metadata is not None:
            (unfinished / METADATA).write_text(json.dumps(dict(metadata), indent=1) + "\n")
        write_manifest(unfinished)


def load_compressed(path: str | os.PathLike[str], build_model: Callable[[], Model]) -> Any:
    """Load what `save_compressed` saved.

    Args:
        path: the directory.
        build_model: makes the model as it was before compression; its weights do not matter.

    Returns:
        The compressed model; a Linen module bound to its variables.

    Raises:
        FileNotFoundError: if there is no such directory.
        ValueError: if it holds no compressed model, or one that is damaged, or that does not fit
            what ``build_model`` makes, saying what differs.

    >>> import tempfile
    >>> from flax import nnx
    >>> from falcon_jax.compression.compress import compress
    >>> from falcon_jax.compression.plan import make_plan
    >>> def build():
    ...     return nnx.Sequential(*(nnx.Conv(m, 8, (3, 3), rngs=nnx.Rngs(0)) for m in (3, 8)))
    >>> plan = make_plan(build())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_compressed(f"{folder}/small", compress(build(), plan), plan)
    ...     small = load_compressed(f"{folder}/small", build)
    >>> type(small.layers[1]).__name__
    'FalconConv'
    """
    return open_compressed(path).load(build_model)


@dataclasses.dataclass(frozen=True)
class Saved:
    """What `save_compressed` saved, its files verified, its arrays not yet read.

    Attributes:
        directory: where it is.
        plan: what the model was compressed with.
        metadata: of the caller of `save_compressed`; empty if none was given.
    """

    directory: pathlib.Path
    plan: Plan
    metadata: Mapping[str, Any]
    _data: Mapping[str, Any]

    def load(
        self,
        build_model: Callable[[], Model],
        *,
        traced: Callable[[], nnx.Module] | None = None,
    ) -> Any:
        """Load the model; see `load_compressed`.

        Args:
            build_model: as there.
            traced: makes an NNX model of the same shapes when JAX traces it; they are compared
                before an array is made.
        """
        directory, plan, data = self.directory, self.plan, self._data
        saved = _saved_shapes(directory, data)
        if traced is not None:
            nnx.eval_shape(lambda: _blank(directory, traced(), plan, saved))
        compressed: Any = _blank(directory, build_model(), plan, saved)
        arrays = _read_arrays(directory, data, saved)
        framework: Any = framework_of(compressed)
        loaded = framework.with_arrays(compressed, arrays)
        framework.check_whole(loaded)
        return loaded


def open_compressed(path: str | os.PathLike[str]) -> Saved:
    """Verify the files of a saved model, and read all but its arrays.

    Args:
        path: the directory.

    Raises:
        FileNotFoundError: if there is no such directory.
        ValueError: if it holds no compressed model, or one that is damaged.
    """
    directory = standing(_place(path))
    data = _read_data(directory)
    file = directory / METADATA
    metadata = read_json(file) if file.exists() else {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{file} should hold names and values, but holds {shown(metadata, 60)}.")
    try:
        plan = Plan.from_json(data["plan"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{directory} holds a plan that this falcon_jax cannot read ({reason(error)})."
        ) from None
    return Saved(directory, plan, metadata, data)


def _place(path: str | os.PathLike[str]) -> pathlib.Path:
    return pathlib.Path(os.path.realpath(user_path(path)))


def _check_replaceable(directory: pathlib.Path, overwrite: bool) -> None:
    """Raise unless a directory may be replaced, and nothing but a saved model is lost with it."""
    if not overwrite:
        raise FileExistsError(f"{directory} is there already; overwrite=True replaces it.")
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; give the directory another name.")
    try:
        other = unlisted_file(directory)
    except (ValueError, OSError):
        other = next((path.name for path in directory.iterdir()), None)
    if other is not None:
        raise FileExistsError(
            f"{directory} holds {shown(other, 200)}, which is no part of a saved model, and is not "
            "replaced; give another directory, or move that away."
        )


def _blank(directory: pathlib.Path, model: Model, plan: Plan, saved: Mapping[str, Any]) -> Model:
    """Return the compressed model with blank parameters; it must fit what was saved."""
    framework = framework_of(model)
    compressed = compressed_blank(framework.with_shapes(model, plan.inputs), plan)
    _check_same(directory, framework.arrays_like(compressed, saved), saved)
    return compressed


def _saved_shapes(
    directory: pathlib.Path, data: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the arrays, which the files must be large enough to hold.

    Raises:
        ValueError: if they are none.
    """
    try:
        shapes = {
            name: jax.ShapeDtypeStruct(tuple(map(_extent, a["shape"])), _dtype(a["dtype"]))
            for name, a in data["arrays"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{directory} is damaged: it does not say what its arrays are ({reason(error)})."
        ) from None
    claimed = sum(math.prod(a.shape) * a.dtype.itemsize for a in shapes.values())
    there = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    if claimed > _LARGE and claimed > _DENSEST * there:
        raise ValueError(
            f"{directory} is damaged: it claims arrays of {claimed:,} bytes, but its files have "
            f"{there:,}."
        )
    return shapes


def _extent(size: Any) -> int:
    if not is_whole(size) or not 0 <= size < 2**31:
        raise ValueError(f"{shown(size, 40)} is no size of an array")
    return size


def _dtype(name: Any) -> np.dtype:
    dtype = jnp.dtype(name)
    if not isinstance(name, str) or str(dtype) != name or dtype.names or dtype.kind not in "biufcV":
        raise ValueError(f"{shown(name, 40)} is no type of numbers")
    return dtype


def _check_carried_out(model: Model, plan: Plan) -> None:
    done = framework_of(model).methods_of(model)
    for row in plan.replaced:
        if done.get(row.path) != row.method:
            raise ValueError(
                f"the plan replaces {row.path!r} by {row.method}, but the model has not got it "
                "there. Give the model that compress(model, plan) returned, and this plan."
            )


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten_dict(dict(named), sep="/")


def _check_same(
    directory: pathlib.Path, expected: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    different = differences(expected, saved)
    if different:
        raise ValueError(
            f"{directory} does not fit what build_model makes; in the directory:\n{different}"
        )


def _read_data(directory: pathlib.Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}.")
    if not (directory / MANIFEST).is_file():
        raise ValueError(f"{directory} holds no compressed model of falcon_jax.")
    check_manifest(directory)
    file = directory / "plan" / "metadata"
    data = read_json(file)
    if not isinstance(data, dict) or "version" not in data:
        raise ValueError(f"{file} holds no plan of falcon_jax.")
    if data["version"] != _VERSION:
        raise ValueError(
            f"{directory} has version {shown(data['version'], 40)}; this falcon_jax reads "
            f"{_VERSION}."
        )
    return data


def _read_arrays(
    directory: pathlib.Path, data: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, jax.Array]:
    sharding = SingleDeviceSharding(jax.devices()[0])

    def shape(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    bits = {name: _bits(directory, name, data) for name in saved}
    like = {
        name: shape(array)
        if bits[name] is None
        else jax.tree.map(shape, _packed(array, bits[name]))
        for name, array in saved.items()
    }
    try:
        with _checkpointer() as checkpointer:
            restore = ocp.args.StandardRestore(_nested(like))  # type: ignore[call-arg]
            how = ocp.args.Composite(arrays=restore)
            restored = checkpointer.restore(directory, args=how)["arrays"]
    except Exception as error:  # of files that were made to mislead: anything
        raise ValueError(
            f"{directory} is damaged: its arrays cannot be read ({reason(error)})."
        ) from None
    flat: dict[Any, Any] = flatten_dict(restored, sep="/")
    named = {
        name: flat[name] if bits[name] is None else _unpacked(flat, name, like, bits[name])
        for name, like in saved.items()
    }
    for name, array in named.items():
        if array_digest(np.asarray(array)) != data["arrays"][name].get("sha256"):
            raise ValueError(f"{directory} is damaged: {shown(name, 200)} is not what was saved.")
    return named


def _bits(directory: pathlib.Path, name: str, data: Mapping[str, Any]) -> int | None:
    """Return the bits of the codes that an array was saved as; None if it was saved as it is."""
    bits = data["arrays"][name].get("bits")
    if bits is not None and (not is_whole(bits) or not 1 <= bits <= 8):
        raise ValueError(f"{directory} is damaged: it says that codes have {shown(bits, 40)} bits.")
    return bits


def _packed(like: jax.ShapeDtypeStruct, bits: int | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of what an array's codes are saved as."""
    assert bits is not None
    number = jax.ShapeDtypeStruct((), np.float32)
    codes = jax.ShapeDtypeStruct((packed_bytes(math.prod(like.shape), bits),), np.uint8)
    return {"codes": codes, "minimum": number, "scale": number}


def _unpacked(flat: Mapping[str, Any], name: str, like: Any, bits: int | None) -> jax.Array:
    assert bits is not None
    packed = PackedArray(
        codes=np.asarray(flat[f"{name}/codes"]),
        minimum=np.float32(flat[f"{name}/minimum"]),
        scale=np.float32(flat[f"{name}/scale"]),
    )
    return jnp.asarray(packed.values(like.shape, bits).astype(like.dtype))


def _checkpointer() -> ocp.Checkpointer:
    """Return a checkpointer of this process alone, whether there are others or not."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"alone{own}"
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)
