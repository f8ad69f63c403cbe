"""Models that nobody here wrote, compressed as they are.

    python -m benchmarks.foreign_models --flax=F --bonsai=B --out=results/foreign_models.json

F and B are clones of github.com/google/flax and github.com/jax-ml/bonsai; nothing of them is kept
here. All weights are random, BatchNorm scales and statistics too. For every model: the largest
difference of outputs at full rank, over the largest output; whether the plan's totals at rank 1
and 2 are what `profile` counts on the result; the loss before and after a training step under jit.
"""

import argparse
import importlib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import falcon_jax as fj
from falcon_jax.report.table import describe_machine

CLASSES = 10
BATCH = 2
SIDE = 64


def main():
    """Compress every model and report."""
    parser = argparse.ArgumentParser(description="Compress models that nobody here wrote.")
    parser.add_argument("--flax", type=pathlib.Path, required=True)
    parser.add_argument("--bonsai", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    sys.path.insert(0, str(options.bonsai))
    rows = []
    print(f"{'model':<26}{'layers':>7}{'replaced':>9}{'full rank':>11}{'totals':>7}{'loss':>18}")
    for name, build in _models(options.flax).items():
        row = {"model": name, **_check(build)}
        rows.append(row)
        print(
            f"{name:<26}{row['convolutions']:>7}{row['replaced']:>9}{row['full_rank']:>11.1e}"
            f"{'equal' if row['totals_equal'] else 'DIFFER':>7}"
            f"{row['loss_before']:>9.4f} ->{row['loss_after']:>7.4f}",
            flush=True,
        )
    report = {"machine": describe_machine(), "batch": BATCH, "side": SIDE, "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def _models(flax: pathlib.Path) -> dict[str, Callable[[], Any]]:
    spec = importlib.util.spec_from_file_location("models", flax / "examples/imagenet/models.py")
    assert spec is not None and spec.loader is not None
    linen = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(linen)

    def bonsai(model: str, class_name: str, make_config: Callable[[Any], Any]):
        def build() -> nnx.Module:
            code = importlib.import_module(f"bonsai.models.{model}.modeling")
            return getattr(code, class_name)(make_config(code.ModelConfig), rngs=nnx.Rngs(0))

        return build

    return {
        "flax Linen ResNet18": lambda: linen.ResNet18(num_classes=CLASSES),
        "flax Linen ResNet50": lambda: linen.ResNet50(num_classes=CLASSES),
        "bonsai NNX ResNet50": bonsai("resnet", "ResNet", lambda c: c.resnet50(CLASSES)),
        "bonsai NNX VGG19": bonsai("vgg19", "VGG", lambda c: c.vgg_19()),
        "bonsai NNX DenseNet121": bonsai("densenet121", "DenseNet", lambda c: c.densenet_121()),
        "bonsai NNX UNet": bonsai("unet", "UNet", lambda c: c(in_channels=3)),
    }


class _Subject:
    """A model with its variables as one pytree, whatever the framework."""

    def __init__(self, model: Any, variables: Any = None):
        self.model, self.variables = model, variables
        if isinstance(model, nnx.Module):
            model.eval()
            self.graph, self.weights, self.rest = nnx.split(model, nnx.Param, ...)
        else:
            self.weights, self.rest = variables["params"], variables.get("batch_stats", {})

    @classmethod
    def built(cls, build: Callable[[], Any], x: jax.Array) -> "_Subject":
        model = build()
        rng = np.random.default_rng(0)
        if isinstance(model, nnx.Module):
            for _, module in nnx.iter_modules(model):
                if isinstance(module, nnx.BatchNorm):
                    for name, low, high in (("scale", 0.5, 2), ("bias", -1, 1), ("var", 0.5, 2)):
                        value = getattr(module, name)
                        value[...] = jnp.asarray(rng.uniform(low, high, value.shape), jnp.float32)
            return cls(model)
        variables = model.init(jax.random.key(0), x, train=False)
        flat: dict[Any, Any] = flatten_dict(variables)
        for path, value in flat.items():
            if path[-1] in ("scale", "var"):
                flat[path] = jnp.asarray(rng.uniform(0.5, 2, value.shape), jnp.float32)
        return cls(model, unflatten_dict(flat))

    def whole(self) -> Any:
        return self.model if self.variables is None else self.model.bind(self.variables)

    def call(self, weights: Any, x: jax.Array) -> jax.Array:
        if isinstance(self.model, nn.Module):
            return self.model.apply(  # type: ignore[return-value]
                {"params": weights, "batch_stats": self.rest}, x, train=False
            )
        return nnx.merge(self.graph, weights, self.rest)(x)  # type: ignore[operator]

    def inputs(self, x: jax.Array) -> fj.Inputs:
        return fj.Inputs(x) if isinstance(self.model, nnx.Module) else fj.Inputs(x, train=False)

    def compressed(self, rank: Any, x: jax.Array) -> tuple["_Subject", fj.Plan]:
        rules = [fj.Rule(method=fj.Falcon(rank=rank))]
        model = self.whole()
        plan = fj.make_plan(model, rules, self.inputs(x))
        small = fj.compress(model, plan)
        if isinstance(small, nn.Module):
            return _Subject(*small.unbind()), plan
        return _Subject(small), plan


def _check(build: Callable[[], Any]) -> Mapping[str, Any]:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, SIDE, SIDE, 3)), jnp.float32)
    subject = _Subject.built(build, x)
    expected = jax.jit(subject.call)(subject.weights, x)
    full, plan = subject.compressed("full", x)
    difference = jnp.abs(jax.jit(full.call)(full.weights, x) - expected).max()
    totals = []
    for rank in (1, 2):
        small, small_plan = subject.compressed(rank, x)
        counted = fj.profile(small.whole(), small.inputs(x))
        after = small_plan.after
        totals.append((counted.params, counted.mult_adds) == (after.params, after.mult_adds))
    before, after = _training_step(small, x)
    return {
        "convolutions": len(plan.rows),
        "replaced": len(plan.replaced),
        "largest_output": float(jnp.abs(expected).max()),
        "full_rank": float(difference / jnp.abs(expected).max()),
        "params": [small_plan.before.params, small_plan.after.params],
        "mult_adds": [small_plan.before.mult_adds, small_plan.after.mult_adds],
        "totals_equal": all(totals),
        "loss_before": before,
        "loss_after": after,
    }


def _training_step(subject: _Subject, x: jax.Array) -> tuple[float, float]:
    """Return the loss before and after one normalised step of gradient descent."""

    def loss(weights: Any) -> jax.Array:
        logits = subject.call(weights, x)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.ones(logits.shape[:-1], jnp.int32)
        ).mean()

    @jax.jit
    def step(weights: Any) -> tuple[jax.Array, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(weights)
        rate = 0.1 * value / optax.tree.norm(gradients, squared=True)
        return value, loss(jax.tree.map(lambda w, g: w - rate * g, weights, gradients))

    return tuple(map(float, step(subject.weights)))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
