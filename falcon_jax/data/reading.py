"""Reading ahead: batches are made by threads or worker processes while the network works."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import Any

from falcon_jax.data.rows import Rows

_MOST_THREADS = 16
_BATCHES_A_WORKER = 2  # that wait, finished, in each worker process


def read_ahead(
    read: Callable[[int], Rows], steps: range, *, workers: int
) -> Generator[Rows, None, None]:
    """Makes the rows of each step, in order, some steps ahead of who takes them.

    Args:
        read: makes the rows of a step; it is pickled if there are workers.
        steps: the steps, one after the other.
        workers: processes that call read, in turn; 0 for threads of this process.

    Yields:
        the rows of each step.

    Raises:
        ImportError: if grain is not installed.
        ChildProcessError: if a worker died.
    """
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
    return iter(batches.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(settings))


def _cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
