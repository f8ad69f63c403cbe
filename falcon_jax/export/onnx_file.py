"""ONNX files of nodes that runtimes have fast code for, in floats or in 8 bits."""

import collections
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from falcon_jax.export import elementwise as _elementwise  # noqa: F401  # its rules
from falcon_jax.export import shapes as _shapes  # noqa: F401
from falcon_jax.export import windows as _windows  # noqa: F401
from falcon_jax.export.files import optional, writable, writing
from falcon_jax.export.graph import (
    Graph,
    Shape,
    Tensor,
    UnmappedError,
    is_open,
    shown_shape,
    simplify,
)
from falcon_jax.export.inference import AUTO, Traced, trace_inference
from falcon_jax.export.lowering import lower
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.settings import is_whole, no_such

OPSET = 18
_LARGEST = 2**31 - 2**20  # bytes that a file of protobuf can hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """An ONNX file that was written.

    Attributes:
        path: of the file.
        inputs: shape of each by name; open sizes are names.
        outputs: likewise; sizes computed of open ones are expressions.
        nodes: how many there are of each kind, those in loops included.
        fixed: why sizes that were tried are not open; empty if all are.
        least: what open sizes were taken to be at least while the model was traced.
    """

    path: pathlib.Path
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    nodes: Mapping[str, int]
    fixed: str = ""
    least: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        def told(name: str, shape: Shape) -> str:
            return f"{name} ({', '.join(map(str, shape))})"

        lines = [
            f"{self.path}, {self.path.stat().st_size:,} bytes",
            "inputs: " + ", ".join(told(*item) for item in self.inputs.items()),
            "outputs: " + ", ".join(told(*item) for item in self.outputs.items()),
            "nodes: " + ", ".join(f"{count} {op}" for op, count in self.nodes.items()),
        ]
        if self.least:
            least = ", ".join(f"{name} >= {size}" for name, size in self.least.items())
            lines.append(f"traced for {least}")
        return "\n".join([*lines, self.fixed] if self.fixed else lines)


def onnx(
    model: Any,
    sample: Any,
    path: str | os.PathLike[str],
    *,
    open_sizes: str | Sequence[str] = AUTO,
    opset: int = OPSET,
    metadata: Mapping[str, str] | None = None,
) -> OnnxFile:
    """Write what a model computes in evaluation mode as an ONNX file.

    A convolution is a ``Conv``, a depthwise one has groups; a compressed one is those that its
    method consists of: FALCON of rank 1 is two, of rank k one wide and k depthwise ones, as
    runtimes have no fast code for groups of k channels. BatchNorms and biases that follow are in
    their weights. Inputs and outputs are as the model has them, channels last;
    in between channels are first, as ONNX has them, without transposes from layer to layer.

    Args:
        model: an NNX model, compressed or not, a bound Linen module, or a function of arrays.
        sample: what it is called with, arrays or shapes; a tuple of arguments, or
            ``falcon_jax.Inputs(x, train=False)``.
        path: of the file.
        open_sizes: which axes may have other sizes than the sample's: names out of ``batch``,
            ``height``, ``width`` (``length`` for one spatial axis, ``depth`` for three), none for a
            file of fixed shapes, or ``auto``: all if the model lets them be, else the batch, else
            none; the result says which.
        opset: version of ONNX's operators, 18 or later.
        metadata: names and texts to be kept in the file.

    Returns:
        What was written.

    Raises:
        ValueError: if the model cannot be called on the sample, not with these sizes open, or holds
            an operation that has no counterpart: it is named with its module.
        ImportError: if onnx is not installed.
        OSError: if the file cannot be written.

    >>> from flax import nnx
    >>> layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    >>> sample = jax.ShapeDtypeStruct((1, 8, 8, 3), "f4")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = onnx(layer, sample, f"{folder}/layer.onnx", open_sizes="batch")
    >>> made.inputs, made.outputs
    ({'x': ('batch', 8, 8, 3)}, {'y': ('batch', 8, 8, 4)})
    """
    file = writable(path)
    proto, traced = onnx_model(model, sample, open_sizes=open_sizes, opset=opset)
    package = optional("onnx", "export to ONNX", "export")
    package.helper.set_model_props(proto, dict(metadata or {}))
    write_proto(proto, file)
    return described(file, proto, traced)


def described(file: pathlib.Path, proto: Any, traced: Traced) -> OnnxFile:
    """Return what was written into a file.

    Args:
        file: where it is.
        proto: the model as ONNX has it.
        traced: the model before.
    """
    counts: collections.Counter[str] = collections.Counter()

    def count(graph: Any) -> None:
        for node in graph.node:
            counts[node.op_type] += 1
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    count(attribute.g)

    def shapes(infos: Any) -> dict[str, Shape]:
        return {
            info.name: tuple(d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim)
            for info in infos
        }

    count(proto.graph)
    return OnnxFile(
        path=file,
        inputs=shapes(proto.graph.input),
        outputs=shapes(proto.graph.output),
        nodes=dict(counts.most_common()),
        fixed=traced.fixed,
        least=traced.shapes.least,
    )


def onnx_model(
    model: Any, sample: Any, *, open_sizes: str | Sequence[str], opset: int
) -> tuple[Any, Traced]:
    """Return a model as ONNX has it in memory, and how it was traced."""
    package = optional("onnx", "export to ONNX", "export")
    newest = package.defs.onnx_opset_version()
    if not is_whole(opset) or not OPSET <= opset <= newest:
        raise ValueError(f"opset is a whole number from {OPSET} to {newest}; got {opset!r}.")
    traced = trace_inference(model, sample, open_sizes)
    return _proto(package, graph_of(traced, opset), opset), traced


def graph_of(traced: Traced, opset: int) -> Graph:
    """Return the graph of a traced model."""
    graph = Graph()
    jaxpr = traced.jaxpr.jaxpr
    inputs: list[Tensor] = []
    for name, variable in zip(traced.input_names, jaxpr.invars, strict=True):
        if jax.dtypes.issubdtype(variable.aval.dtype, jax.dtypes.prng_key):
            raise UnmappedError(
                f"the input {name!r} holds random keys, which ONNX has not; give a sample without."
            )
        tensor = graph.input(name, variable.aval.shape, np.dtype(variable.aval.dtype))
        inputs.append(tensor)
        for axis, size in enumerate(tensor.shape):
            if is_open(size):
                graph.open.setdefault(str(size), (tensor.name, axis))
    names = [graph.fresh(name) for name in traced.output_names]
    made = lower(jaxpr, traced.jaxpr.consts, inputs, graph, opset)
    for name, tensor in zip(names, made, strict=True):
        graph.node("Identity", [graph.named(tensor)])
        graph.nodes[-1].outputs = [name]
        graph.outputs.append((name, tensor.shape, tensor.dtype))
    simplify(graph)
    return graph


def write_proto(proto: Any, file: pathlib.Path) -> None:
    """Write a model as ONNX has it; one beyond 2 GB has its weights in a file beside it."""
    package = optional("onnx", "export to ONNX", "export")
    options: dict[str, Any] = {}
    if proto.ByteSize() > _LARGEST:
        options = {"save_as_external_data": True, "location": f"{file.name}.data"}
    with writing(file) as unfinished:
        package.save_model(proto, unfinished, **options)


def _proto(package: Any, graph: Graph, opset: int) -> Any:
    """Return a graph as ONNX has it, checked."""
    helper = package.helper
    constants = [package.numpy_helper.from_array(v, n) for n, v in graph.constants.items()]
    made = _graph_proto(package, graph, "falcon_jax", constants)
    opsets = [helper.make_opsetid("", opset)]
    proto = helper.make_model(
        made,
        producer_name="falcon_jax",
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
    )
    if proto.ByteSize() <= _LARGEST:
        package.checker.check_model(proto, full_check=True)
    return proto


def _graph_proto(package: Any, graph: Graph, name: str, constants: Sequence[Any] = ()) -> Any:
    helper = package.helper

    def info(name: str, shape: Sequence[Any], dtype: np.dtype) -> Any:
        return helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(dtype), list(shown_shape(shape))
        )

    nodes = []
    for node in graph.nodes:
        attributes = {}
        for key, value in node.attributes.items():
            if isinstance(value, Graph):
                value = _graph_proto(package, value, f"{node.outputs[0]}.{key}")
            elif isinstance(value, np.dtype):
                value = helper.np_dtype_to_tensor_dtype(value)
            attributes[key] = value
        nodes.append(
            helper.make_node(node.op, node.inputs, node.outputs, name=node.outputs[0], **attributes)
        )
    return helper.make_graph(
        nodes,
        name,
        [info(*given) for given in graph.inputs],
        [info(*made) for made in graph.outputs],
        initializer=list(constants),
    )


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
