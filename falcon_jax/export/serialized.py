"""Serialised functions: `stablehlo` for JAX alone, and `tflite` by way of StableHLO."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import export

from falcon_jax.compression.batchnorm import fold_batchnorm
from falcon_jax.export.files import optional, writable, writing
from falcon_jax.export.graph import Shape, shown_shape
from falcon_jax.export.inference import (
    AUTO,
    OpenShapes,
    inference,
    input_names,
    output_names,
    with_open_sizes,
)
from falcon_jax.frameworks.interface import Model
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.ops.choice import canonical_forms
from falcon_jax.wording import reason

PLATFORMS = ("cpu", "cuda", "tpu")
SIGNATURE = "serving_default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StablehloFile:
    """A serialised function that was written.

    Attributes:
        path: of the file.
        inputs: shape of each, in order; open sizes are names.
        outputs: likewise; sizes computed of open ones are expressions.
        platforms: that it runs on.
        fixed: why sizes that were tried are not open; empty if all are.
        least: what open sizes have to be at least.
    """

    path: pathlib.Path
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    platforms: tuple[str, ...]
    fixed: str = ""
    least: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.path}, {self.path.stat().st_size:,} bytes, for {', '.join(self.platforms)}",
            f"inputs: {', '.join(map(str, self.inputs))}",
            f"outputs: {', '.join(map(str, self.outputs))}",
        ]
        if self.least:
            least = ", ".join(f"{name} >= {size}" for name, size in self.least.items())
            lines.append(f"for {least}")
        return "\n".join([*lines, self.fixed] if self.fixed else lines)


def stablehlo(
    model: Any,
    sample: Any,
    path: str | os.PathLike[str],
    *,
    open_sizes: str | Sequence[str] = AUTO,
    platforms: Sequence[str] = PLATFORMS,
) -> StablehloFile:
    """Write what a model computes in evaluation mode as StableHLO, its weights included.

    ``jax.export.deserialize(bytearray(file.read_bytes())).call(x)`` runs it: JAX suffices, neither
    Flax nor falcon_jax need be there. BatchNorms are folded first.

    Args:
        model: an NNX model, compressed or not, a bound Linen module, or a function of arrays.
        sample: as in `falcon_jax.export.onnx`.
        path: of the file.
        open_sizes: as there.
        platforms: on which it is to run; operations take the form that is fastest here.

    Returns:
        What was written.

    Raises:
        ValueError: if the model cannot be called on the sample, or not with these sizes open.
        ImportError: if flatbuffers is not installed.
        OSError: if the file cannot be written.

    >>> import tempfile
    >>> from flax import nnx
    >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = stablehlo(layer, jax.ShapeDtypeStruct((1, 3), "f4"), f"{folder}/layer.stablehlo")
    >>> made.inputs, made.outputs
    ((('batch', 3),), (('batch', 2),))
    """
    file = writable(path)
    optional("flatbuffers", "export to StableHLO", "export")
    inputs = Inputs.of(sample)
    function = inference(_with_folded_norms(model, inputs))

    def exported(shapes: OpenShapes) -> export.Exported:
        def forward(*arrays: Any) -> Any:
            return shapes.inputs.with_arrays(list(arrays)).call(function)

        return export.export(jax.jit(forward), platforms=list(platforms))(*shapes.inputs.arrays)

    made, shapes, fixed = with_open_sizes(model, inputs, open_sizes, exported)
    with writing(file) as unfinished:
        unfinished.write_bytes(made.serialize())
    return StablehloFile(
        path=file,
        inputs=tuple(shown_shape(a.shape) for a in made.in_avals),
        outputs=tuple(shown_shape(a.shape) for a in made.out_avals),
        platforms=tuple(made.platforms),
        fixed=fixed,
        least=shapes.least,
    )


def _with_folded_norms(model: Any, inputs: Inputs) -> Any:
    """Return a model whose convolutions do the work of the BatchNorms after them."""
    if isinstance(model, Model):
        return fold_batchnorm(model, inputs)
    return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfliteFile:
    """A LiteRT file that was written.

    Attributes:
        path: of the file.
        inputs: shape of each by name.
        outputs: likewise.
    """

    path: pathlib.Path
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]

    def __str__(self) -> str:
        lines = [f"{self.path}, {self.path.stat().st_size:,} bytes"]
        for title, shapes in (("inputs", self.inputs), ("outputs", self.outputs)):
            told = (f"{name} ({', '.join(map(str, shape))})" for name, shape in shapes.items())
            lines.append(f"{title}: {', '.join(told)}")
        return "\n".join(lines)


def tflite(model: Any, sample: Any, path: str | os.PathLike[str]) -> TfliteFile:
    """Write what a model computes in evaluation mode as a LiteRT file, once TensorFlow Lite's.

    JAX's StableHLO goes through LiteRT's own converter; TensorFlow is not needed. Convolutions
    become ``CONV_2D`` and ``DEPTHWISE_CONV_2D``, with BatchNorms folded before. All sizes are those
    of the sample.

    Args:
        model: an NNX model, compressed or not, a bound Linen module, or a function of arrays.
        sample: as in `falcon_jax.export.onnx`.
        path: of the file.

    Returns:
        What was written; the signature is called ``serving_default``.

    Raises:
        ValueError: if the model cannot be called on the sample, or the converter refuses it.
        ImportError: if litert-converter is not installed.
        OSError: if the file cannot be written.
    """
    file = writable(path)
    what = "export to LiteRT"
    converter: Any = optional("litert_converter.converter_api_ext", what, "tflite")
    ir: Any = optional("litert_converter.mlir.ir", what, "tflite")
    passes: Any = optional("litert_converter.mlir.passmanager", what, "tflite")
    inputs = Inputs.of(sample).shapes
    function = inference(_with_folded_norms(model, inputs))
    structure: list[Any] = []

    def forward(*arrays: Any) -> Any:
        y = inputs.with_arrays(list(arrays)).call(function)
        structure.append(y)
        return y

    try:
        with canonical_forms():
            made = export.export(jax.jit(forward), platforms=["cpu"])(*inputs.arrays)
    except (TypeError, ValueError) as error:
        raise inputs.refused_by(model, error) from error
    names = input_names(inputs), output_names(structure[-1])
    context = ir.Context()
    converter.prepare_mlir_context(context)
    try:
        with context:
            module = ir.Module.parse(made.mlir_module())
            converter.set_signature(module.operation, SIGNATURE, *map(list, names))
            manager = passes.PassManager("builtin.module")
            converter.run_convert_to_tfl_passes(module, manager, converter.ConvertToTFLConfig())
            content = converter.export_flatbuffer_to_bytes(module.operation)
    except Exception as error:  # of the converter, which has no kind of its own
        raise ValueError(
            f"LiteRT's converter cannot take {type(model).__name__}: {reason(error, 500)}"
        ) from error
    with writing(file) as unfinished:
        unfinished.write_bytes(content)
    shapes = [[shown_shape(a.shape) for a in avals] for avals in (made.in_avals, made.out_avals)]
    return TfliteFile(
        path=file,
        inputs=dict(zip(names[0], shapes[0], strict=True)),
        outputs=dict(zip(names[1], shapes[1], strict=True)),
    )
