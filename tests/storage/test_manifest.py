import hashlib
import json
import os

import pytest

from falcon_jax.paths import read_json
from falcon_jax.storage.directories import (
    MANIFEST,
    check_manifest,
    data_digest,
    unlisted_file,
    write_manifest,
)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "below" / "b.bin").write_bytes(bytes(range(256)))
    write_manifest(tmp_path)
    return tmp_path


def test_what_was_saved_passes(directory):
    check_manifest(directory)
    (directory / "more").write_text("new")
    check_manifest(directory)


def test_every_flipped_bit_is_told(directory):
    for name in ["a.txt", "below/b.bin", MANIFEST]:
        content = (directory / name).read_bytes()
        for i in range(len(content)):
            (directory / name).write_bytes(
                content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :]
            )
            with pytest.raises(ValueError, match=f"damaged: {name} is not what was saved"):
                check_manifest(directory)
        (directory / name).write_bytes(content)


def test_missing_and_cut_files_are_told(directory):
    (directory / "a.txt").write_text("on")
    with pytest.raises(ValueError, match=r"a\.txt is not what"):
        check_manifest(directory)
    (directory / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.txt is missing"):
        check_manifest(directory)
    (directory / MANIFEST).write_text("[]")
    with pytest.raises(ValueError, match=r"manifest\.json is not what"):
        check_manifest(directory)
    (directory / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError):
        check_manifest(directory)


def test_names_that_lead_out_of_the_directory_are_refused(directory):
    outside = directory.parent / "outside.txt"
    outside.write_text("secret")
    (directory / "link").symlink_to(outside)
    (directory / "folder").symlink_to(directory.parent)
    (directory / "pipe").mkdir()
    digest = hashlib.sha256(b"secret").hexdigest()
    names = [
        "../outside.txt",
        str(outside),
        "link",
        "folder/outside.txt",
        "./a.txt",
        "below/../a.txt",
    ]
    for name in [*names, "a\0b", "", "pipe/.."]:
        files = {name: digest}
        content = {"files": files, "sha256": data_digest(files)}
        (directory / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match=r"is damaged: manifest\.json names .* not a file inside"
        ):
            check_manifest(directory)


def test_manifests_of_another_form(directory):
    for files in ([], 3, None, "x", [["a.txt", "0"]], {"a.txt": {"b": [1e400]}}):
        content = {"files": files, "sha256": data_digest(files)}
        (directory / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(ValueError, match="is damaged"):
            check_manifest(directory)
    for text in (b"", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b"NaN"):
        (directory / MANIFEST).write_bytes(text)
        with pytest.raises(ValueError, match="damaged"):
            check_manifest(directory)


def test_files_that_are_no_json_are_named(tmp_path):
    file = tmp_path / "x\x1b[31m.json"
    for content in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"\x1b[2J"):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"x\\x1b\[31m\.json is damaged: it is no JSON"
        ) as caught:
            read_json(file)
        assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 600
    with pytest.raises(ValueError, match="is no file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    with pytest.raises(ValueError, match="is no file"):
        read_json(tmp_path / "pipe")


def test_files_that_no_manifest_names(directory):
    assert unlisted_file(directory) is None
    (directory / "below" / "mine.txt").write_text("")
    assert unlisted_file(directory) == "below/mine.txt"
