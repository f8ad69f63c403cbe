"""Batches of a split: shuffled for training, padded and masked for evaluation, read ahead."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import queue
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np
from jaxtyping import Int32

from falcon_jax.data.dataset import AnySplit, Split, shuffled
from falcon_jax.data.streamed import Rows

_MOST_THREADS = 16
_BATCHES_A_WORKER = 2  # that wait, finished, in each worker process
_LOOK_EVERY_S = 1.0


def read_ahead(
    read: Callable[[int], Rows], steps: range, *, workers: int
) -> Generator[Rows, None, None]:
    """Make the rows of each step, in order, some steps ahead of who takes them.

    Args:
        read: makes the rows of a step; it is pickled if there are workers.
        steps: the steps, one after the other.
        workers: processes that call read, in turn; 0 for threads of this process.

    Returns:
        an iterator over the rows of each step.

    Raises:
        ChildProcessError: if a worker died.
    """
    rows = _rows(read, steps, workers)
    # At the end of the program, too: multiprocessing would wait for workers, who hear no signal.
    weakref.finalize(rows, _close, weakref.ref(rows))
    return rows


def _close(reference: weakref.ref[Generator[Rows, None, None]]) -> None:
    rows = reference()
    if rows is not None:
        rows.close()


def _rows(read: Callable[[int], Rows], steps: range, workers: int) -> Generator[Rows, None, None]:
    threads = workers or min(_cores(), _MOST_THREADS)
    most = _BATCHES_A_WORKER * workers or threads
    with contextlib.ExitStack() as stack:
        pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
        # Not waited for: who forgets an iterator may be one of the threads, collecting garbage.
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        call = stack.enter_context(contextlib.closing(_Workers(read, workers))) if workers else read
        ahead: collections.deque[concurrent.futures.Future[Rows]] = collections.deque()
        for step in steps:
            ahead.append(pool.submit(call, step))
            if len(ahead) > most:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class _Workers:
    """Processes that read, each at its own pipe: whatever kills one, at whatever moment, ends it.

    Queues that processes share stay locked, or half written, when one of them is killed.
    """

    def __init__(self, read: Callable[[int], Rows], count: int) -> None:
        self._read = read
        self._idle: queue.SimpleQueue[tuple[Connection, bool]] = queue.SimpleQueue()
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("spawn")
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._idle.put((ours, False))

    def __call__(self, step: int) -> Rows:
        pipe, has_read = self._idle.get()
        try:
            if not has_read:
                pipe.send(self._read)  # here, not at the start: processes begin side by side
            pipe.send(step)
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            raise ChildProcessError(
                "a worker that reads images died, perhaps for want of memory; use fewer workers, "
                "or 0 to read in this process"
            ) from error
        finally:
            self._idle.put((pipe, True))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _serve(pipe: Connection) -> None:
    """Answer steps with rows, or with what went wrong, until the other end is closed."""
    # Signals that are sent to all are left to the reader, who may want some batches more.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        read = pipe.recv()
        while True:
            step = pipe.recv()
            try:
                answer = read(step)
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = error
            pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # The pipe of multiprocessing also stays open in what the parent has forked, if that lives on.
    while parent.is_alive() and os.getppid() == parent.pid:
        parent.join(_LOOK_EVERY_S)
    os._exit(1)


def _cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


Batch = dict[str, np.ndarray]
Batches = Generator[Batch, None, None]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Number of training batches in an epoch; the incomplete last batch is dropped.

    >>> steps_per_epoch(1000, 128)
    7

    Args:
        n: number of training images.
        batch_size: images a batch.

    Returns:
        n // batch_size, at least 1.

    Raises:
        ValueError: if batch_size is not positive or larger than n.
    """
    _require_positive(batch_size)
    if batch_size > n:
        raise ValueError(
            f"batch_size {batch_size} is larger than the training split of {n} images; use at "
            f"most {n}"
        )
    return n // batch_size


def train_batches(
    split: AnySplit,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """Yield the batches of one epoch in an order that is a pure function of (seed, epoch).

    A run restarted at a step of an epoch sees the batches that it would have seen, with any number
    of workers or processes. Images of a streamed split are cropped and mirrored at random; the
    crop is a pure function of (seed, epoch, position in the split).

    Args:
        split: the training split.
        batch_size: images a batch, over all processes.
        seed: seed of the order and the crops.
        epoch: number of the epoch; each has its own order.
        start_step: batches of the epoch to leave out, at the beginning.
        shard: which process this is, and how many there are; process i of n gets rows
            [i * batch_size / n, (i + 1) * batch_size / n) of every batch.

    Returns:
        an iterator over batches: "image" uint8 (rows, h, w, c), "label" int32 (rows,), and
        "index" int32 (rows,), the positions in the split. Its close() ends worker processes; so
        does its end, or forgetting it.

    Raises:
        ValueError: if batch_size or start_step is out of range, seed or epoch negative, or the
            processes cannot share a batch; while iterating, if an image cannot be read.
        ChildProcessError: while iterating, if a worker died.
    """
    steps = steps_per_epoch(len(split), batch_size)
    if not 0 <= start_step <= steps:
        raise ValueError(f"start_step must lie in [0, {steps}], but is {start_step}")
    share = _share(batch_size, shard)
    order = shuffled(len(split), seed, epoch).astype(np.int32)
    read = _TrainingRows(split, order, batch_size, share, seed, epoch)
    return (
        {"image": rows.images, "label": split.labels[rows.index], "index": rows.index}
        for rows in _read(split, read, range(start_step, steps))
    )


def eval_batches(split: AnySplit, batch_size: int, *, shard: tuple[int, int] = (0, 1)) -> Batches:
    """Yield the batches of a whole split, in order, each image counted exactly once by its mask.

    The last batch is padded with zero images of label 0 and mask 0, so that all batches have
    one shape. So are images that cannot be read, if the split leaves those out.

    Args:
        split: the split; it may be smaller than a batch.
        batch_size: images a batch, over all processes.
        shard: which process this is, and how many there are; as for train_batches.

    Returns:
        an iterator over batches: "image" uint8 (rows, h, w, c), "label" int32 (rows,), and
        "mask" float32 (rows,), 1 for an image of the split and 0 for padding. Its close() ends
        worker processes; so does its end, or forgetting it.

    Raises:
        ValueError: if batch_size is not positive, or the processes cannot share a batch; while
            iterating, if an image cannot be read.
        ChildProcessError: while iterating, if a worker died.
    """
    _require_positive(batch_size)
    share = _share(batch_size, shard)
    steps = range(-(-len(split) // batch_size))
    return (
        _padded(rows, split, len(share))
        for rows in _read(split, _EvaluationRows(split, batch_size, share), steps)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _TrainingRows:
    split: AnySplit
    order: Int32[np.ndarray, "n"]
    batch_size: int
    share: range
    seed: int
    epoch: int

    def __call__(self, step: int) -> Rows:
        rows = _shifted(self.share, step * self.batch_size)
        return self.split.training_rows(self.order, rows, seed=self.seed, epoch=self.epoch)


@dataclasses.dataclass(frozen=True, eq=False)
class _EvaluationRows:
    split: AnySplit
    batch_size: int
    share: range

    def __call__(self, step: int) -> Rows:
        rows = _shifted(self.share, step * self.batch_size)
        n = len(self.split)
        return self.split.evaluation_rows(range(min(rows.start, n), min(rows.stop, n)))


def _read(
    split: AnySplit, read: _TrainingRows | _EvaluationRows, steps: range
) -> Generator[Rows, None, None]:
    if isinstance(split, Split):
        yield from map(read, steps)
        return
    for rows in read_ahead(read, steps, workers=split.settings.workers):
        if rows.unreadable:
            split.note_unreadable(rows.unreadable)
        yield rows


def _padded(rows: Rows, split: AnySplit, length: int) -> Batch:
    lacking = length - len(rows.index)
    labels = np.where(rows.readable, split.labels[rows.index], np.int32(0))
    return {
        "image": np.pad(rows.images, [(0, lacking), (0, 0), (0, 0), (0, 0)]),
        "label": np.pad(labels, (0, lacking)),
        "mask": np.pad(rows.readable.astype(np.float32), (0, lacking)),
    }


def _share(batch_size: int, shard: tuple[int, int]) -> range:
    process, count = shard
    if not 0 <= process < count:
        raise ValueError(f"shard must be (process, count) with 0 <= process < count, not {shard}")
    if batch_size % count:
        raise ValueError(
            f"batch_size {batch_size} cannot be shared evenly by {count} processes; use a multiple "
            f"of {count}"
        )
    rows = batch_size // count
    return range(process * rows, (process + 1) * rows)


def _shifted(rows: range, by: int) -> range:
    return range(rows.start + by, rows.stop + by)


def _require_positive(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, but is {batch_size}")
