"""Directories that are replaced: killed at every moment, the old one or the new one stands."""

import json
import subprocess
import sys

import pytest

from falcon_jax.storage.directories import standing, whole_directory

# A child is killed at its n-th change of the file system, for every n until it comes to its end.
KILLS = """
import json, os, pathlib, sys
from falcon_jax.storage.directories import standing, whole_directory

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

def write(path, text):
    with whole_directory(path) as new:
        new.mkdir()
        for name in "ab":
            (new / name).write_text(text)

def child(path, kill_at):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in CHANGES:
            count += 1
            if count == kill_at:
                os._exit(9)
    write(path, "old")
    sys.addaudithook(hook)
    write(path, "new")
    os._exit(0)

found = []
for kill_at in range(1, 100):
    parent = pathlib.Path(sys.argv[1]) / str(kill_at)
    parent.mkdir()
    (parent / "model.unfinished").mkdir()
    path = parent / "model"
    pid = os.fork()
    if pid == 0:
        child(path, kill_at)
    killed = os.waitpid(pid, 0)[1] != 0
    texts = {file.read_text() for file in standing(path).iterdir()}
    at_place = path.exists()
    write(path, "newest")
    there = {p.name for p in parent.iterdir()}
    left = [p for name in there - {"model"} for p in (parent / name).rglob("*")]
    size = sum(p.stat().st_size for p in left if p.is_file())
    found.append((sorted(texts), at_place, {"model", "model.unfinished"} <= there and size == 0))
    if not killed:
        break
print(json.dumps(found))
"""


def test_killed_at_any_moment_the_old_or_the_new_one_stands(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    texts = [tuple(text) for text, _, _ in found]
    assert set(texts) == {("old",), ("new",)} and texts == sorted(texts, reverse=True)
    assert len(found) > 10 and not all(at_place for _, at_place, _ in found)
    # The next write leaves nothing of the killed ones, and what others made as it was.
    assert all(clean for _, _, clean in found)


def write(path, text="new"):
    with whole_directory(path) as new:
        new.mkdir()
        (new / "file").write_text(text)


def test_what_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a" / "model"
    write(path, "old")
    with pytest.raises(KeyboardInterrupt), whole_directory(path) as new:
        new.mkdir()
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), whole_directory(path):
        pass  # nothing was made
    assert (path / "file").read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["model"]


def test_what_others_made_stays_whatever_it_is_called(tmp_path):
    path = tmp_path / "model"
    suffix = ".falcon-jax-saving"
    ours_of_another = tmp_path / f".x{suffix}"
    for folder, lock in (
        (tmp_path / f".users{suffix}", None),
        (ours_of_another, '{"of": "other"}'),
        (tmp_path / f".more{suffix}", '{"of": "model"}'),
    ):
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        if lock is not None:
            (folder / "lock").write_text(lock)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    assert standing(path) == path
    write(path)
    with whole_directory(path) as new:  # nor what a living process is writing
        new.mkdir()
        write(path, "meanwhile")
    after = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    assert [p for p in after if p.parts[0] != "model"] == before
