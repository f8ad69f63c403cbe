"""Reading ahead: batches are made by threads or worker processes while the network works."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any

from falcon_jax.data.rows import Rows

_MOST_THREADS = 16
_BATCHES_A_WORKER = 2  # that wait, finished, in each worker process
_LOOK_EVERY_S = 1.0


def read_ahead(
    read: Callable[[int], Rows], steps: range, *, workers: int
) -> Generator[Rows, None, None]:
    """Makes the rows of each step, in order, some steps ahead of who takes them.

    Args:
        read: makes the rows of a step; it is pickled if there are workers.
        steps: the steps, one after the other.
        workers: processes that call read, in turn; 0 for threads of this process.

    Returns:
        an iterator over the rows of each step.

    Raises:
        ImportError: if grain is not installed.
        ChildProcessError: if a worker died.
    """
    rows = _rows(read, steps, workers)
    # At the end of the program, too: grain fails at that while modules are taken down.
    weakref.finalize(rows, _close, weakref.ref(rows))
    return rows


def _rows(read: Callable[[int], Rows], steps: range, workers: int) -> Generator[Rows, None, None]:
    iterator = _iterator(read, steps, workers)
    try:
        yield from iterator
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise ChildProcessError(
            "a worker that reads images died, perhaps for want of memory; use fewer workers, or 0 "
            "to read in this process"
        ) from error
    finally:
        iterator.close()


def _close(reference: weakref.ref[Generator[Rows, None, None]]) -> None:
    rows = reference()
    if rows is not None:
        rows.close()


def _iterator(read: Callable[[int], Rows], steps: range, workers: int) -> Any:
    try:
        import grain
        from absl import flags
    except ImportError as error:
        raise ImportError(
            f'reading images from the disk needs grain ({error}): pip install "falcon-jax[train]"'
        ) from error
    # Rows are a class that grain does not know, so it pickles them: its shared memory outlives who
    # forgets an iterator, and containers have little of it.
    batches = grain.MapDataset.range(steps.start, steps.stop).map(read)
    if not workers:
        threads = min(_cores(), _MOST_THREADS)
        return iter(batches.to_iter_dataset(grain.ReadOptions(threads, threads)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its own flags when it starts workers
    settings = grain.MultiprocessingOptions(workers, per_worker_buffer_size=_BATCHES_A_WORKER)
    return iter(
        batches.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(settings, _begin_worker)
    )


def _begin_worker(index: int, count: int) -> None:
    """Leave signals that are sent to all to the reader, who may want some batches more."""
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


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
