"""`stablehlo`: a model as a function that JAX alone reads back."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import export

from falcon_jax.compression.batchnorm import fold_batchnorm
from falcon_jax.export.files import Shape, optional, shown_shape, writable, writing
from falcon_jax.export.graph import OpenShapes
from falcon_jax.export.inference import AUTO, inference, with_open_sizes
from falcon_jax.frameworks.interface import Model
from falcon_jax.frameworks.layers import Inputs

PLATFORMS = ("cpu", "cuda", "tpu")


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
    """
    file = writable(path)
    optional("flatbuffers", "export to StableHLO", "export")
    inputs = Inputs.of(sample)
    function = inference(with_folded_norms(model, inputs))

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


def with_folded_norms(model: Any, inputs: Inputs) -> Any:
    """Return a model whose convolutions do the work of the BatchNorms after them."""
    if isinstance(model, Model):
        return fold_batchnorm(model, inputs)
    return model
