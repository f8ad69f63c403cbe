"""A network of `falcon_jax.export.onnx` as a frozen PyTorch module: the same graph, its runtime."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from torch import nn
from torch.nn import functional


def frozen(path: str | os.PathLike[str], sample: np.ndarray) -> Callable[[np.ndarray], Any]:
    """Return a network's call in PyTorch: traced, frozen, channels last where that is faster.

    Args:
        path: ONNX file with fixed shapes.
        sample: an input.

    Raises:
        ValueError: if the file has an operation that is not known here.
    """
    module = _Network(onnx.load(path).graph).eval()
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(module, torch.from_numpy(sample)))

    def call(x: np.ndarray) -> Any:
        with torch.no_grad():
            return traced(torch.from_numpy(x))

    return call


class _Network(nn.Module):
    """The nodes one after the other; feature maps are in channels-last memory."""

    def __init__(self, graph: Any):
        super().__init__()
        self.arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        self.nodes = list(graph.node)
        self.input, self.output = graph.input[0].name, graph.output[0].name
        for i, array in enumerate(self.arrays.values()):
            tensor = torch.from_numpy(array.copy())
            if tensor.ndim == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            self.register_buffer(f"array{i}", tensor)
        self.names = {name: f"array{i}" for i, name in enumerate(self.arrays)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = {self.input: x, "": None}
        values |= {name: getattr(self, held) for name, held in self.names.items()}
        for node in self.nodes:
            if node.op_type not in _OPERATIONS:
                raise ValueError(f"{node.op_type} is not known here.")
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            constants = [self.arrays.get(name) for name in node.input]
            y = _OPERATIONS[node.op_type]([values[n] for n in node.input], constants, attributes)
            outputs = y if isinstance(y, (tuple, list)) else [y]
            values.update(zip(node.output, outputs, strict=True))
        return values[self.output]


def _conv(inputs: list[Any], constants: list[Any], a: dict[str, Any]) -> torch.Tensor:
    x, weight, *bias = inputs
    top, left, bottom, right = a.get("pads", [0, 0, 0, 0])
    if (top, left) != (bottom, right):
        x = functional.pad(x, (left, right, top, bottom))
        top = left = 0
    return functional.conv2d(
        x,
        weight,
        bias[0] if bias else None,
        stride=tuple(a.get("strides", [1, 1])),
        padding=(top, left),
        dilation=tuple(a.get("dilations", [1, 1])),
        groups=a.get("group", 1),
    )


def _max_pool(inputs: list[Any], constants: list[Any], a: dict[str, Any]) -> torch.Tensor:
    top, left, bottom, right = a.get("pads", [0, 0, 0, 0])
    x = functional.pad(inputs[0], (left, right, top, bottom), value=float("-inf"))
    return functional.max_pool2d(x, tuple(a["kernel_shape"]), tuple(a.get("strides", [1, 1])))


def _gemm(inputs: list[Any], constants: list[Any], a: dict[str, Any]) -> torch.Tensor:
    x, weight, *bias = inputs
    weight = weight if a.get("transB") else weight.T
    return functional.linear(x, weight, bias[0] if bias else None)


def _resize(inputs: list[Any], constants: list[Any], a: dict[str, Any]) -> torch.Tensor:
    x = inputs[0]
    if len(inputs) > 3:
        size = [int(n) for n in constants[3][2:]]
    else:
        factors = zip(x.shape[2:], constants[2][2:], strict=True)
        size = [round(int(n) * float(factor)) for n, factor in factors]
    mode = {b"linear": "bilinear", b"nearest": "nearest"}[a["mode"]]
    return functional.interpolate(x, size=size, mode=mode)


_OPERATIONS: dict[str, Callable[[list[Any], list[Any], dict[str, Any]], Any]] = {
    "Conv": _conv,
    "MaxPool": _max_pool,
    "Gemm": _gemm,
    "Resize": _resize,
    "Relu": lambda x, _, a: functional.relu(x[0]),
    "Add": lambda x, _, a: x[0] + x[1],
    "Mul": lambda x, _, a: x[0] * x[1],
    "Concat": lambda x, _, a: torch.cat(x, dim=a["axis"]),
    "Split": lambda x, c, a: torch.split(x[0], c[1].tolist(), dim=a["axis"]),
    "Transpose": lambda x, _, a: x[0].permute(*a["perm"]),
    "Reshape": lambda x, c, a: x[0].reshape(c[1].tolist()),
    "ReduceMean": lambda x, c, a: x[0].mean(dim=c[1].tolist(), keepdim=bool(a.get("keepdims", 1))),
}
