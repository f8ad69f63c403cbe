"""Layers fitted to their responses on data, one after the other."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.compression.plan import Plan, check_plan
from falcon_jax.frameworks.interface import Model, defined_layers
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.nnx import map_modules, named_modules, with_calls_wrapped
from falcon_jax.nn.method_conv import MethodConv

# A layer's calls: input and output of each.
Calls = list[tuple[Array, Array]]


def calibrate(
    model: Model,
    compressed: Model,
    plan: Plan,
    batches: Sequence[Any],
    *,
    positions: int = 10,
    key: PRNGKeyArray | None = None,
) -> nnx.Module:
    """Return a compressed model whose layers answer to data as those of the original do.

    Layer by layer in the plan's order, ``min || y - W' x' ||``: y is the original layer's answer in
    the original model, x' what the layer gets in the compressed one, with the errors of all layers
    before. Only methods that can be fitted to responses (`ChannelDecomposition`) change, and the
    biases of their layers.

    BatchNorm between a layer and its ReLU stands in the way of ``relu=True``: fold it before
    (`fold_batchnorm`).

    Args:
        model: the NNX model that was compressed.
        compressed: what ``compress(model, plan)`` returned; it is not changed.
        plan: made with a sample, so that it has the order of the layers.
        batches: a few inputs of both models, arrays or `Inputs`; 3,000 examples are the authors'.
        positions: how many points of each response are looked at, at random.
        key: for these; ``jax.random.key(0)`` if not given.

    Returns:
        A new model.

    Raises:
        ValueError: if there are no batches or too few, they do not fit the model, no layer of the
            plan can be fitted to responses, or one is called where its responses cannot be seen.

    Reference:
        Zhang et al.: Accelerating Very Deep Convolutional Networks, TPAMI 2016, Section 3.3.
    """
    if not (isinstance(model, nnx.Module) and isinstance(compressed, nnx.Module)):
        raise ValueError(f"calibrate takes NNX models; got {type(model).__name__}.")
    check_plan(plan, defined_layers(model, None))
    rows = {r.path: r for r in plan.replaced if r.method and r.method.fits_responses()}
    if not rows:
        raise ValueError(
            "no layer of the plan can be fitted to responses; ChannelDecomposition is a method "
            "that can."
        )
    inputs = [Inputs.of(batch) for batch in batches]
    if not inputs:
        raise ValueError("calibration needs at least one batch of inputs; got none.")
    key = jax.random.key(0) if key is None else key
    convs = dict(named_modules(model))
    targets = _record(model, rows, inputs)
    copy = map_modules(lambda path, module: None, compressed)
    layers = dict(named_modules(copy))
    for index, (path, row) in enumerate(rows.items()):
        layer, conv, method = layers.get(path), convs[path], row.method
        if not isinstance(layer, MethodConv) or layer.method != method:
            raise ValueError(
                f"the plan replaces {path!r} by {method}, but the compressed model has not got it "
                "there. Give the model that compress(model, plan) returned, and this plan."
            )
        assert isinstance(conv, nnx.Conv) and method is not None
        pick = jax.random.fold_in(key, index)
        answers = [conv(x) for x, _ in _record(copy, [path], inputs)[path]]
        responses = _sampled(answers, pick, positions)
        target = _sampled([y for _, y in targets.pop(path)], pick, positions)
        if len(target) < row.spec.out_features:
            raise ValueError(
                f"the batches give {len(target)} responses of {path!r}, fewer than its "
                f"{row.spec.out_features} channels; give more examples or positions."
            )
        bias = None if conv.bias is None else conv.bias[...]
        params, bias = method.fit_responses(conv.kernel[...], bias, row.spec, responses, target)
        for name, value in params.items():
            getattr(layer, name)[...] = value
        if bias is not None:
            layer.bias[...] = bias  # type: ignore[index]
    return copy


def _record(
    model: nnx.Module, paths: Sequence[str] | Mapping[str, Any], inputs: Sequence[Inputs]
) -> dict[str, Calls]:
    """Return the calls of some layers, by path, while a model is called on all inputs."""
    calls: dict[str, Calls] = {path: [] for path in paths}
    hidden: list[str] = []

    def around(path: str, layer: Callable[[Any], Any], x: Any) -> Any:
        y = layer(x)
        if isinstance(y, Tracer):
            hidden.append(path)
        elif path in calls:
            calls[path].append((jnp.asarray(x), y))
        return y

    wrapped = with_calls_wrapped(
        model, lambda module: isinstance(module, (nnx.Conv, MethodConv)), around
    )
    for batch in inputs:
        try:
            batch.call(wrapped)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise batch.refused_by(model, error) from error
    unseen = [path for path in paths if path in hidden or not calls[path]]
    if unseen:
        raise ValueError(
            f"{unseen[0]!r} is not called, or inside a jitted, scanned or vmapped part of the "
            "model, where its responses cannot be seen; leave it out of the plan."
        )
    return calls


def _sampled(
    outputs: Sequence[Float[Array, "b *spatial n"]], key: PRNGKeyArray, positions: int
) -> Float[Array, "samples n"]:
    """Return the channels at some points of every example, at most as many as there are."""
    sampled = []
    for index, y in enumerate(outputs):
        points = y.reshape(y.shape[0], math.prod(y.shape[1:-1]), y.shape[-1])
        count = min(positions, points.shape[1])
        scores = jax.random.uniform(jax.random.fold_in(key, index), points.shape[:2])
        _, chosen = jax.lax.top_k(scores, count)
        sampled.append(jnp.take_along_axis(points, chosen[..., None], axis=1))
    return jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in sampled])
