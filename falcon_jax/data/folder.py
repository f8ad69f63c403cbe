"""A plain image folder: train/ and val/ (or test/), one subfolder a class in each."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from falcon_jax.data.dataset import SourceOptions, SourceSplits
from falcon_jax.data.decoding import header_problem
from falcon_jax.data.streamed import StreamedSplit, leave_out_broken
from falcon_jax.paths import user_path
from falcon_jax.wording import some_of

_CHECKING_THREADS = 16

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class FolderRecords:
    """The files of a folder.

    Args:
        root: the folder.
        paths: paths of the files within it, encoded as the file system has them; one array, since
            a million path objects would be slow to send to workers.
    """

    root: str
    paths: Shaped[np.ndarray, "n"]

    def path(self, position: int) -> Path:
        """Return the path of a file."""
        return Path(self.root, os.fsdecode(self.paths[position].item()))

    def read(self, position: int) -> bytes:
        """Return the content of a file."""
        return self.path(position).read_bytes()

    def name(self, position: int) -> str:
        """Return the path of a file, for messages."""
        return str(self.path(position))


def load_folder(options: SourceOptions, *, seed: int = 0) -> SourceSplits:
    """Find the images of a folder and check that each begins as an image does.

    Labels are the places of the class folders' names in alphabetical order. Images lie in class
    folders at any depth. Where there are both val/ and test/, val/ is the validation split; where
    there is one of them, it is the test split. Hidden files are ignored; any other file must be an
    image, whatever its name. Links are followed, and each file counts once in a split: a link to a
    folder above it, or to what is there already, is left out and logged.

    Args:
        options: data_dir is the folder; name is what to call the data set, by default the folder's
            name; and how to stream the images.
        seed: without effect.

    Returns:
        the splits, streamed.

    Raises:
        FileNotFoundError: if the folder, or a part of it, is missing.
        ValueError: if there are no classes or no images, the classes of two splits differ, or
            files are broken or stand under two classes and skip_broken is not set.
    """
    del seed
    if not options.data_dir:
        raise ValueError('the source "folder" needs data_dir, the folder with train/ and val/')
    root = user_path(options.data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    for needed in (("train",), ("val", "test")):
        if not any((root / name).is_dir() for name in needed):
            raise FileNotFoundError(
                f"{root} has no folder {' or '.join(f'{name}/' for name in needed)}; a folder of "
                f"images needs train/ and val/ (or test/), each with one folder a class"
            )
    classes = _visible_folders(root / "train")
    parts = [part for part in ("train", "val", "test") if (root / part).is_dir()]
    for part in parts:
        _check_classes(root / part, classes)
    train, *others = (_load_split(root / part, classes, options) for part in parts)
    absent = np.setdiff1d(np.arange(len(classes)), train.labels)
    if len(absent):
        raise ValueError(f"{root / 'train'} has no image in {some_of(classes[i] for i in absent)}")
    return SourceSplits(
        name=options.name or root.resolve().name,
        num_classes=len(classes),
        train=train,
        test=others[-1],
        validation=others[0] if len(others) == 2 else None,
    )


def _check_classes(folder: Path, classes: Sequence[str]) -> None:
    found = _visible_folders(folder)
    if not found:
        raise ValueError(f"{folder} has no class folders; each class needs a folder of its images")
    for lacking, one, other in (
        (sorted(set(found) - set(classes)), folder, "train"),
        (sorted(set(classes) - set(found)), folder.parent / "train", folder.name),
    ):
        if lacking:
            raise ValueError(
                f"{one} has class folders that {other}/ does not have: {some_of(lacking)}; both "
                "need the same"
            )


def _load_split(folder: Path, classes: Sequence[str], options: SourceOptions) -> StreamedSplit:
    paths: list[bytes] = []
    labels: list[int] = []
    passed: list[str] = []
    for label, name in enumerate(classes):
        files = sorted(_files(folder / name, passed))
        paths += [os.fsencode(file[len(str(folder)) + 1 :]) for file in files]
        labels += [label] * len(files)
    if passed:
        _log.warning("left out: %s", some_of(passed))
    if not paths:
        raise ValueError(f"the class folders of {folder} are empty")
    records = FolderRecords(str(folder), np.array(paths))
    top = os.path.realpath(folder)

    @functools.cache
    def real_folder(path: Path) -> str:
        return os.path.realpath(path)

    def check(position: int) -> tuple[str | None, _File]:
        path = Path(top, os.fsdecode(paths[position]))
        return header_problem(records.path(position)), _file(path, real_folder)

    with ThreadPoolExecutor(_CHECKING_THREADS) as threads:
        found, files = zip(*threads.map(check, range(len(paths))), strict=True)
    problems = {i: problem for i, problem in enumerate(found) if problem is not None}
    first = _first_of_each(files)
    again = {i: records.name(j) for i, j in enumerate(first) if i != j}
    once = [i for i, j in enumerate(first) if i == j or labels[i] != labels[j]]
    twice = {i: f"it is {again[i]}, which is of another class" for i in once if i in again}
    if twice and not options.skip_broken:
        listed = some_of(f"{records.name(i)} ({why})" for i, why in twice.items())
        raise ValueError(
            f"{len(twice)} of {len(paths)} images of {folder} stand under two classes: {listed}; "
            "remove one of each two, or set skip_broken=True to leave the links out"
        )
    if len(once) < len(paths):
        left_out = (f"{records.name(i)} (it is {again[i]})" for i in again if i not in twice)
        _log.warning("left out: %s", some_of(left_out))
    split = StreamedSplit(
        records=records,
        positions=np.arange(len(paths)),
        labels=np.array(labels, np.int32),
        settings=options,
    )
    problems |= twice
    return leave_out_broken(
        split.take(np.array(once)),
        {row: problems[i] for row, i in enumerate(once) if i in problems},
        str(folder),
    )


class _File(NamedTuple):
    """Which file a path leads to.

    Args:
        identity: equal for two paths that lead to one file.
        linked: whether a link leads there.
    """

    identity: object
    linked: bool


def _file(path: Path, real_folder: Callable[[Path], str]) -> _File:
    # Links are rare, and asking the disk for every part of every path is slow.
    here = os.path.join(real_folder(path.parent), path.name)
    real = os.path.realpath(here) if os.path.islink(here) else here
    try:
        status = os.stat(real)
    except OSError:
        return _File(here, linked=False)  # it leads nowhere, which header_problem tells
    several = status.st_nlink > 1  # hard links
    return _File((status.st_dev, status.st_ino) if several else real, real != str(path))


def _first_of_each(files: Sequence[_File]) -> list[int]:
    """For every path, the one that stands for its file: the first, if possible without a link."""
    first: dict[object, int] = {}
    for i in sorted(range(len(files)), key=lambda i: files[i].linked):
        first.setdefault(files[i].identity, i)
    return [first[file.identity] for file in files]


def _visible_folders(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )


def _files(folder: Path, passed: list[str]) -> Iterable[str]:
    """Yield the files below a folder; note links to folders that are read already, or above."""
    top = os.path.realpath(folder)
    seen = {top: str(folder)}
    for directory, below, names in os.walk(folder, followlinks=True, onerror=_fail):
        visible = sorted(name for name in below if name[0] != ".")
        below.clear()
        for path in (os.path.join(directory, name) for name in visible):
            real = os.path.realpath(path)
            if real in seen:
                passed.append(f"{path} (it is {seen[real]})")
            elif Path(top).is_relative_to(real):
                passed.append(f"{path} (it leads to {real}, a folder above it)")
            else:
                seen[real] = path
                below.append(os.path.basename(path))
        yield from (os.path.join(directory, name) for name in names if name[0] != ".")


def _fail(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that cannot be read
