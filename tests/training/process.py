"""One of several processes that train together; run as a program by test_processes.py."""

import pathlib
import sys
import time

import jax
import numpy as np

from falcon_jax.data.augmentation import Augmentation
from falcon_jax.training import loop
from falcon_jax.training.devices import Peers, start_distributed
from falcon_jax.training.interruption import STOPPED, Interruption, Stopped
from falcon_jax.training.network import Network
from tests.training.tiny import Tiny, tiny_job


def run_in(directory, interruption, mesh=None):
    """A run of six epochs of three steps."""
    return tiny_job(
        directory,
        epochs=6,
        augmentation=Augmentation(crop_padding=1, flip=True),
        every_steps=1,
        interruption=interruption,
        mesh=mesh,
    )


def main(directory, coordinator, process):
    start_distributed(Peers(coordinator=coordinator, processes=2, process=int(process)))
    assert jax.device_count() == 8
    assert jax.local_device_count() == 4
    batches = loop.train_batches

    def slowly(*args, **options):
        for batch in batches(*args, **options):
            time.sleep(0.3)
            yield batch

    loop.train_batches = slowly
    try:
        with Interruption() as interruption:
            run = run_in(pathlib.Path(directory), interruption)
            params, statistics = loop.train(run, *Network.split(Tiny())).arrays
    except Stopped as reason:
        print(reason)
        return STOPPED
    np.savez(f"{directory}/end{process}.npz", **jax.device_get(params | statistics))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
