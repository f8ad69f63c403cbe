"""`tflite`: a model as a LiteRT (TensorFlow Lite) file, by way of StableHLO."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
from jax import export

from falcon_jax.export.files import Shape, optional, shown_shape, writable, writing
from falcon_jax.export.inference import inference, input_names, output_names
from falcon_jax.export.stablehlo_file import with_folded_norms
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.ops.canonical import canonical_forms
from falcon_jax.wording import reason

SIGNATURE = "serving_default"


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
    function = inference(with_folded_norms(model, inputs))
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
