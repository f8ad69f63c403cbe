"""A training step of VGG19 on 32x32 images: FALCON, its grouped form, the standard model, PyTorch.

Forward, backward and SGD with momentum, float32, the state donated. "Tuned" is the standard model
with im2col on small maps, "lax" the one with XLA's convolutions only, "flax" FALCON with Flax's own
layers. About five minutes.

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.train_step --out results/train_step.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import ratios_and_times, report, take_turns
from benchmarks.vgg19 import CLASSES, images, models, torch_images, torch_model
from falcon_jax.training.network import Network

RATIOS = {
    "tuned / ours": ("tuned", "ours"),
    "lax / ours": ("lax", "ours"),
    "grouped / ours": ("grouped", "ours"),
    "flax / ours": ("flax", "ours"),
    "ours / torch": ("ours", "torch"),
    "torch standard / torch": ("torch standard", "torch"),
}
LEARNING_RATE, MOMENTUM = 0.01, 0.9


def jax_step(model: Any, batch: int) -> Callable[[], Any]:
    """Return a call that trains a model for one step, on the same images every time."""
    network, params, statistics = Network.split(model)
    optimizer = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    x = images(batch)
    labels = jnp.arange(batch) % CLASSES

    def step(state: Any, key: jax.Array) -> Any:
        params, statistics, opt_state = state

        def loss(params: Any) -> Any:
            logits, new = network.apply_training(params, statistics, x, key)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return (optax.apply_updates(params, updates), new, opt_state), value

    compiled = jax.jit(step, donate_argnums=0)
    # Donated arrays cannot be shared between models.
    state = jax.tree.map(jnp.copy, (params, statistics, optimizer.init(params)))
    key = jax.random.key(0)

    def call() -> Any:
        nonlocal state
        state, value = jax.block_until_ready(compiled(state, key))
        return value

    return call


def torch_step(batch: int, *, falcon: bool) -> Callable[[], Any] | None:
    """Return the same call in PyTorch; None where it is not installed."""
    model = torch_model(falcon=falcon)
    if model is None:
        return None
    import torch

    x, labels = torch_images(batch), torch.arange(batch) % CLASSES
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)
    model.train()

    def call() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss

    return call


def measure(batch: int, *, rounds: int, skip: list[str]) -> dict[str, Any]:
    """Return ratios, milliseconds and spread for one batch size.

    Args:
        batch: images.
        rounds: turns that each model gets.
        skip: models that are left out.
    """
    calls = {n: jax_step(make(), batch) for n, make in models().items() if n not in skip}
    for name, falcon in (("torch", True), ("torch standard", False)):
        call = None if name in skip else torch_step(batch, falcon=falcon)
        if call is not None:
            calls[name] = call
    times = take_turns(calls, rounds=rounds)
    return {"batch": batch, **ratios_and_times(times, RATIOS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--skip", nargs="*", default=[], help="models to leave out")
    options = parser.parse_args()
    rows = [measure(b, rounds=options.rounds, skip=options.skip) for b in options.batches]
    report(rows, RATIOS, module="benchmarks.train_step", out=options.out)


if __name__ == "__main__":
    main()
