"""Flip a bit of a checkpoint again and again and see what is restored; what do digests cost?

    python -m benchmarks.damage --copies=200 --out=results/damage.json

Half a minute on 2 CPU cores.
"""

import argparse
import contextlib
import io
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from falcon_jax.models import vgg8_cifar, vgg19_cifar
from falcon_jax.report.table import Column, describe_machine, format_table, write_json
from falcon_jax.storage.directories import array_digest, check_manifest, write_manifest
from falcon_jax.training.checkpoints import Checkpoints
from falcon_jax.training.config import TrainConfig
from falcon_jax.training.devices import data_mesh, replicate
from falcon_jax.training.network import Network
from falcon_jax.training.optimizers import make_optimizer
from falcon_jax.training.step import TrainState, init_state


def main(arguments: Sequence[str]) -> int:
    """Damage copies, measure, report."""
    parser = argparse.ArgumentParser(description="Damaged checkpoints, and the cost of digests.")
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(arguments[1:])
    with tempfile.TemporaryDirectory() as folder:
        found = damaged(pathlib.Path(folder), options.copies, random.Random(options.seed))
        cost = digest_cost(pathlib.Path(folder))
    report = {
        "command": " ".join(["python -m benchmarks.damage", *arguments[1:]]),
        "machine": describe_machine(),
        "flipped_bytes": found,
        "digests_of_vgg19": cost,
    }
    if options.out:
        write_json(options.out, report)
    for row in (found, cost):
        print(format_table([row], [Column(name=n, header=n.replace("_", " ")) for n in row]))
    return 0


def damaged(folder: pathlib.Path, copies: int, generator: random.Random) -> dict[str, int]:
    """Flip one bit of the newest of two checkpoints, in a copy each time, and restore.

    Args:
        folder: to work in.
        copies: how many.
        generator: of file, byte and bit; every byte of the checkpoint is as likely.

    Returns:
        How many gave the newest one unharmed, the one before, or, silently, something wrong.
    """
    states = {step: _state(vgg8_cifar, seed=step) for step in (1, 2)}
    checkpoints = Checkpoints(folder / "checkpoints")
    for state in states.values():
        checkpoints.save(state, {}, score=0.5)
    checkpoints.close()
    counts = {"copies": copies, "newest_unharmed": 0, "the_one_before": 0, "silently_wrong": 0}
    for _ in range(copies):
        copy = shutil.copytree(folder / "checkpoints", folder / "copy" / "checkpoints")
        files = [path for path in sorted((copy / "2").rglob("*")) if path.is_file()]
        (path,) = generator.choices(files, [path.stat().st_size for path in files])
        content = bytearray(path.read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        with contextlib.redirect_stderr(io.StringIO()):
            checkpoints = Checkpoints(copy)
            restored = checkpoints.restore_latest(states[1])
            checkpoints.close()
        assert restored is not None
        step = int(restored[0].step)
        right = jax.tree.all(jax.tree.map(np.array_equal, restored[0], states[step]))
        name = {1: "the_one_before", 2: "newest_unharmed"}[step] if right else "silently_wrong"
        counts[name] += 1
        shutil.rmtree(folder / "copy")
    return counts


def digest_cost(folder: pathlib.Path) -> dict[str, Any]:
    """Return milliseconds of saving a checkpoint of VGG19 to the end, and of its digests."""
    state = _state(vgg19_cifar, seed=0)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    checkpoints = Checkpoints(folder / "vgg19")

    def save() -> None:
        checkpoints.save(state, {}, score=0.5)
        checkpoints.wait()

    saved = folder / "vgg19" / "0"
    total = _milliseconds(save, times=5)
    digests = _milliseconds(lambda: [array_digest(leaf) for leaf in leaves])
    manifest = _milliseconds(lambda: write_manifest(saved))
    check = _milliseconds(lambda: check_manifest(saved))
    checkpoints.close()
    return {
        "megabytes": round(sum(leaf.nbytes for leaf in leaves) / 1e6, 1),
        "saving_ms": total,
        "of_it_array_digests_ms": digests,
        "manifest_ms": manifest,
        "checking_files_ms": check,
    }


def _state(build: Callable[..., nnx.Module], *, seed: int) -> TrainState:
    network, params, statistics = Network.split(build(rngs=nnx.Rngs(seed)))
    del network
    state = init_state(params, statistics, make_optimizer(TrainConfig(), 10))
    leaves, structure = jax.tree.flatten(state)
    leaves[0] = jax.numpy.asarray(seed, jax.numpy.int32)
    return replicate(jax.tree.unflatten(structure, leaves), data_mesh())


def _milliseconds(run: Callable[[], Any], *, times: int = 7) -> float:
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return round(1e3 * float(np.median(seconds)), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
