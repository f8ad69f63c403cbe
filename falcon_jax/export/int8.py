"""`onnx_int8`: an ONNX file whose weights and activations have 8 bits, calibrated on data."""

import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from falcon_jax.export.extras import optional
from falcon_jax.export.files import writable
from falcon_jax.export.inference import AUTO
from falcon_jax.export.onnx_file import OPSET, OnnxFile, described, onnx_model, write_proto
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.settings import no_such

_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
Range = Literal["minmax", "entropy", "percentile"]


def onnx_int8(
    model: Any,
    sample: Any,
    path: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    open_sizes: str | Sequence[str] = AUTO,
    opset: int = OPSET,
    ranges: Range = "minmax",
    reduce_range: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> OnnxFile:
    """Write a model as an ONNX file that computes with 8 bits.

    Weights are signed codes with a scale for each output channel, activations unsigned codes with
    a scale and a zero point for each tensor, found on the batches; pairs of ``QuantizeLinear`` and
    ``DequantizeLinear`` say so, which runtimes turn into products of integers. What follows a
    convolution is folded into it before.

    Args:
        model: as in `falcon_jax.export.onnx`.
        sample: as there.
        path: of the file.
        batches: inputs to calibrate on, each as ``sample`` is given; tens of images will do.
        open_sizes: as there.
        opset: as there.
        ranges: what an activation's range is: ``minmax`` of all its values, the one that
            ``entropy`` says loses least, or a ``percentile`` of 99.999.
        reduce_range: whether weights have 7 bits, so that sums of two products do not saturate on
            x86 processors without VNNI.
        metadata: names and texts to be kept in the file.

    Returns:
        What was written.

    Raises:
        ValueError: as `falcon_jax.export.onnx` does, or if there is no batch.
        ImportError: if onnx or onnxruntime is not installed.
        OSError: if the file cannot be written.
    """
    if ranges not in get_args(Range):
        raise ValueError(no_such("range of activations", ranges, get_args(Range)))
    file = writable(path)
    what = "export to ONNX with 8 bits"
    package = optional("onnx", what, "export")
    tools: Any = optional("onnxruntime.quantization", what, "export")
    proto, traced = onnx_model(model, sample, open_sizes=open_sizes, opset=opset)
    names = [given.name for given in proto.graph.input]
    reader = _reader(tools, _fed(batches, names))
    methods = tools.CalibrationMethod
    with tempfile.TemporaryDirectory(prefix="falcon_jax_int8_") as folder:
        whole, small = pathlib.Path(folder) / "float32.onnx", pathlib.Path(folder) / "int8.onnx"
        # What the tools ask to be done before is done: nodes are joined, shapes can be inferred.
        package.helper.set_model_props(proto, {_PREPARED[0]: _PREPARED[1]})
        write_proto(proto, whole)
        tools.quantize_static(
            whole,
            small,
            reader,
            quant_format=tools.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
            calibrate_method={
                "minmax": methods.MinMax,
                "entropy": methods.Entropy,
                "percentile": methods.Percentile,
            }[ranges],
        )
        quantized = package.load(small)
    package.helper.set_model_props(quantized, dict(metadata or {}))
    write_proto(quantized, file)
    return described(file, quantized, traced)


def _fed(batches: Iterable[Any], names: Sequence[str]) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield the batches as a session takes them.

    Raises:
        ValueError: if there is none.
    """
    empty = True
    for batch in batches:
        arrays = Inputs.of(batch).arrays
        if len(arrays) != len(names):
            raise ValueError(
                f"a batch has {len(arrays)} arrays, but the model has {len(names)} inputs; give "
                "batches as the sample is."
            )
        yield {name: np.asarray(a) for name, a in zip(names, arrays, strict=True)}
        empty = False
    if empty:
        raise ValueError("there is no batch to calibrate on; give some, such as [x].")


def _reader(tools: Any, fed: Iterator[Mapping[str, np.ndarray]]) -> Any:
    class Reader(tools.CalibrationDataReader):
        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(fed, None)

    return Reader()
