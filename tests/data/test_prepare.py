import importlib.util
import time

import pytest
import tensorflow_datasets as tfds

from falcon_jax.data.tfds import prepare
from tests.data import tiny_tfds


@pytest.fixture
def known(monkeypatch):
    """Lets TFDS find the small builders by name, as it finds its own."""
    builders = {"tiny_set": tiny_tfds.TinySet, "tiny_downloaded": tiny_tfds.TinyDownloaded}
    find = tfds.builder

    def builder(name, **options):
        return builders[name](**options) if name in builders else find(name, **options)

    monkeypatch.setattr(tfds, "builder", builder)


def pretend_tensorflow(monkeypatch, installed):
    find_spec = importlib.util.find_spec

    def pretend(name, package=None):
        if name == "tensorflow":
            return object() if installed else None
        return find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", pretend)


@pytest.mark.usefixtures("known")
def test_prepares_and_then_finds_it_done(tmp_path):
    directory = prepare("tiny_set", str(tmp_path))
    assert directory == tmp_path / "tiny_set" / "1.2.0"
    info = directory / "dataset_info.json"
    written = info.stat().st_mtime_ns
    assert '"array_record"' in info.read_text()
    assert prepare("tiny_set", str(tmp_path)) == directory
    assert info.stat().st_mtime_ns == written


def test_unknown_name_is_answered_with_near_ones(tmp_path):
    with pytest.raises(ValueError, match="no data set 'cifar1O'; did you mean cifar10 or"):
        prepare("cifar1O", str(tmp_path))


@pytest.mark.usefixtures("known")
def test_missing_tensorflow_is_said_at_once(tmp_path, monkeypatch):
    pretend_tensorflow(monkeypatch, installed=False)
    with pytest.raises(ImportError, match=r"needs TensorFlow.*pip install tensorflow-cpu"):
        prepare("tiny_downloaded", str(tmp_path))


@pytest.mark.usefixtures("known")
def test_unreachable_server_is_said_at_once(tmp_path, monkeypatch):
    pretend_tensorflow(monkeypatch, installed=True)
    start = time.monotonic()
    with pytest.raises(
        OSError, match=r"needs tiny\.tar\.gz from 127\.0\.0\.1:9, .*refused"
    ) as caught:
        prepare("tiny_downloaded", str(tmp_path))
    assert time.monotonic() - start < 5.0
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("known")
def test_archive_put_there_by_hand_needs_no_server(tmp_path, monkeypatch):
    pretend_tensorflow(monkeypatch, installed=True)
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "tiny.tar.gz").write_bytes(b"x")
    assert prepare("tiny_downloaded", str(tmp_path)).is_dir()


@pytest.mark.usefixtures("known")
def test_any_failure_of_tfds_becomes_one_sentence(tmp_path, monkeypatch):
    def fail(self):
        raise AssertionError("Manual directory\n  does not exist")

    monkeypatch.setattr(tiny_tfds.TinySet, "download_and_prepare", fail)
    with pytest.raises(OSError, match=r"failed: Manual directory does not exist$"):
        prepare("tiny_set", str(tmp_path))
