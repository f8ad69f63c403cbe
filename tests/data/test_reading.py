import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from falcon_jax.data.batching import eval_batches, read_ahead, train_batches
from falcon_jax.data.fake import make_image_folder
from falcon_jax.data.loading import DataConfig, load_dataset
from falcon_jax.data.streamed import Rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_image_folder(
        tmp_path_factory.mktemp("made") / "set", num_classes=2, num_train=24, num_val=4, side=24
    )


def load(folder, workers):
    return load_dataset(
        DataConfig(
            source="folder",
            data_dir=str(folder),
            image_size=16,
            workers=workers,
            validation_fraction=0.0,
        )
    )


def test_workers_make_the_batches_that_this_process_makes(made):
    expected = list(train_batches(load(made, 0).train, 4, seed=5, epoch=1, start_step=1))
    batches = list(train_batches(load(made, 2).train, 4, seed=5, epoch=1, start_step=1))
    assert len(batches) == len(expected) == 5
    for one, other in zip(batches, expected, strict=True):
        for key, value in other.items():
            np.testing.assert_array_equal(one[key], value)
    assert not multiprocessing.active_children()


def test_unreadable_pixels_found_by_a_worker_name_the_file_and_end_it(made, tmp_path):
    data = load(shutil.copytree(made, tmp_path / "set"), 1)
    path = tmp_path / "set" / "val" / "class_1" / "000003.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=f"{path} cannot be read: "):
        list(eval_batches(data.test, 2))
    assert not multiprocessing.active_children()


def read_much(step):
    images = np.full((1, 2000, 2000, 2), step, np.uint8)
    return Rows(images=images, index=np.array([step], np.int32), readable=np.array([True]))


def test_a_worker_that_dies_is_told_even_in_the_middle_of_an_answer():
    answers = read_ahead(read_much, range(200), workers=2)
    assert next(answers).index == [0]
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="a worker that reads images died"):
        list(answers)
    assert not multiprocessing.active_children()


def test_closing_ends_the_worker(made):
    batches = train_batches(load(made, 1).train, 1, seed=0, epoch=0)
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    batches.close()
    assert not multiprocessing.active_children()


READER = """
import multiprocessing
import sys

from falcon_jax.data.batching import train_batches
from tests.data.test_reading import load

if __name__ == "__main__":
    batches = train_batches(load(sys.argv[1], 1).train, 1, seed=0, epoch=0)
    for _ in batches:
        print(multiprocessing.active_children()[0].pid, flush=True)
        if sys.stdin.readline() == "end\\n":
            sys.exit()
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="processes are looked up in /proc")
def test_a_worker_hears_no_signal_but_ends_with_its_reader(made, tmp_path):
    script = tmp_path / "reader.py"
    script.write_text(READER)
    command = [sys.executable, str(script), str(made)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as reader,
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
        ) as ended,
    ):
        worker = int(reader.stdout.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
        reader.stdin.write("more\n")
        reader.stdin.flush()
        assert int(reader.stdout.readline()) == worker
        reader.kill()
        reader.wait()
        give_up = time.monotonic() + 20
        while os.path.exists(f"/proc/{worker}") and time.monotonic() < give_up:
            time.sleep(0.1)
        assert not os.path.exists(f"/proc/{worker}")

        worker = int(ended.stdout.readline())
        assert ended.communicate("end\n")[1] == ""
        assert ended.returncode == 0
        assert not os.path.exists(f"/proc/{worker}")


def test_threads_end_with_a_forgotten_iterator(made):
    batches = train_batches(load(made, 0).train, 1, seed=0, epoch=0)
    next(batches)
    del batches
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("read-ahead"):
            thread.join(10)
            assert not thread.is_alive()
