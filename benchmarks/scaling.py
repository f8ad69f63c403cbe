"""One training run shared by 1, 2, 4 and 8 devices: is it the same, and how fast is it?

    python -m benchmarks.scaling --out=results/scaling.json

Without accelerators, CPU devices are forced: they share the cores of one machine, so only the
agreement means something there, and images/s says what the split costs. On GPUs, give
--devices=1,2,4,8 as far as there are any. About 3 minutes on 2 CPU cores.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from falcon_jax.report.table import Column, describe_machine, format_table, write_json

STEPS, TIMED_STEPS, BATCH = 5, 10, 64
COLUMNS = (
    Column(name="devices", header="devices"),
    Column(name="parallel", header="parallel"),
    Column(name="difference", header="difference", format="{:.1e}".format),
    Column(name="images_per_s", header="images/s", format="{:.0f}".format),
    Column(name="ratio", header="to one device", format="{:.2f}x".format),
)


def main(arguments: Sequence[str]) -> int:
    """Run every number of devices in a process of its own, and compare."""
    parser = argparse.ArgumentParser(description="Training on several devices.")
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(arguments[1:])
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for devices in map(int, options.devices.split(",")):
        for parallel in ("jit", "pmap"):
            found = _in_a_process(devices, parallel)
            first = first or found
            gaps = [
                np.abs(np.array(found["params"][n]) - np.array(value)).max()
                for n, value in first["params"].items()
            ]
            rows.append(
                {
                    "devices": devices,
                    "parallel": parallel,
                    "difference": float(max(gaps)),
                    "images_per_s": found["images_per_s"],
                    "ratio": found["images_per_s"] / first["images_per_s"],
                }
            )
    report = {
        "command": " ".join(["python -m benchmarks.scaling", *arguments[1:]]),
        "machine": describe_machine(),
        "what": f"vgg8_cifar on digits, {STEPS} steps of {BATCH} images; largest difference of a "
        "parameter from one device under jit",
        "rows": rows,
    }
    if options.out:
        write_json(options.out, report)
    print(format_table(rows, COLUMNS))
    return 0


def _in_a_process(devices: int, parallel: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--worker", str(devices), parallel]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    finished = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": flags}, stdout=subprocess.PIPE, check=True
    )
    return json.loads(finished.stdout)


def _work(devices: int, parallel: str) -> dict[str, Any]:
    """Train on so many devices; return the parameters after some steps, and images/s."""
    import jax
    from flax import nnx

    from falcon_jax.data import DataConfig, load_dataset, train_batches
    from falcon_jax.models import vgg8_cifar
    from falcon_jax.training.config import TrainConfig
    from falcon_jax.training.devices import data_mesh, replicate
    from falcon_jax.training.network import Network
    from falcon_jax.training.optimizers import make_optimizer
    from falcon_jax.training.parallel import make_parallel_step
    from falcon_jax.training.step import Preprocessing, init_state

    if jax.device_count() != devices:
        raise SystemExit(f"there are {jax.device_count()} devices, not {devices}")
    dataset = load_dataset(DataConfig(source="digits"))
    model = vgg8_cifar(num_classes=10, in_features=1, rngs=nnx.Rngs(0))
    optimizer = make_optimizer(TrainConfig(learning_rate=0.05), 1000)
    network, params, statistics = Network.split(model)
    mesh = data_mesh()
    step = make_parallel_step(
        network,
        optimizer,
        Preprocessing(mean=dataset.mean, std=dataset.std),
        mesh,
        parallel=parallel,
        batchnorm="synchronised",
        label_smoothing=0.0,
    )
    state = step.place(replicate(init_state(params, statistics, optimizer), mesh))
    stop = np.zeros(BATCH, np.float32)
    batches = [
        {"image": batch["image"], "label": batch["label"], "stop": stop}
        for batch in train_batches(dataset.train, BATCH, seed=0, epoch=0)
    ]
    key = jax.random.key(0)
    for batch in batches[:STEPS]:
        state, _ = step(state, batch, key)
    params = jax.device_get(step.gather(state).params)
    state = step.place(step.gather(state))
    start = time.perf_counter()
    for batch in batches[STEPS : STEPS + TIMED_STEPS]:
        state, _ = step(state, batch, key)
    jax.block_until_ready(state.step)
    seconds = time.perf_counter() - start
    return {
        "params": {name: array.tolist() for name, array in params.items()},
        "images_per_s": TIMED_STEPS * BATCH / seconds,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(_work(int(sys.argv[2]), sys.argv[3])))
    else:
        sys.exit(main(sys.argv))
