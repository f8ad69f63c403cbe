"""Preparing TFDS data sets as array_record files, with clear words where something is missing."""

from __future__ import annotations

import difflib
import http.client
import importlib.util
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from falcon_jax.data.messages import some_of
from falcon_jax.data.tfds import prepared_directory, tfds_directory
from falcon_jax.data.tfds_opening import import_tfds
from falcon_jax.wording import reason

_PROBE_SECONDS = 10


def prepare(name: str, data_dir: str = "") -> Path:
    """Downloads a TFDS data set and writes it as array_record files, unless that has been done.

    What is missing is said before anything long is tried: TFDS itself retries an unreachable
    server for minutes.

    Args:
        name: name as TFDS has it, for example "cifar10".
        data_dir: directory of all prepared data sets, or "" for TFDS's default. Archives that
            were fetched by other means are looked for in its folder downloads/manual.

    Returns:
        the directory of the prepared data set.

    Raises:
        ValueError: if TFDS does not know the name, or has prepared it in another format.
        ImportError: if tensorflow-datasets, or TensorFlow for unpacking downloads, is missing.
        OSError: if the servers cannot be reached, or preparing fails.
    """
    try:
        return prepared_directory(name, data_dir)
    except FileNotFoundError:
        pass
    tfds = import_tfds()
    root = tfds_directory(data_dir)
    builder = _find_builder(tfds, name, root)
    if builder.url_infos and importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f"preparing {name} needs TensorFlow, which TFDS unpacks downloads with (training does "
            "not need it): pip install tensorflow-cpu"
        )
    _require_archives(builder, name, root / "downloads")
    try:
        builder.download_and_prepare()
    except Exception as error:  # TFDS raises anything: requests', its own, AssertionError
        raise OSError(f"preparing {name} in {root} failed: {reason(error)}") from error
    return Path(builder.data_path)


def _find_builder(tfds: ModuleType, name: str, root: Path) -> Any:
    try:
        return tfds.builder(name, data_dir=root, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(
            name, tfds.list_builders(with_community_datasets=False), n=3
        )
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"TFDS has no data set {name!r}{hint}") from error


def _require_archives(builder: Any, name: str, downloads: Path) -> None:
    from tensorflow_datasets.core.download import resource

    archives = {
        url: info.filename
        for url, info in (builder.url_infos or {}).items()
        if url.startswith(("http://", "https://"))
        and not (downloads / "manual" / str(info.filename)).is_file()
        and not (downloads / resource.get_dl_fname(url, info.checksum)).is_file()
    }
    by_host = {urlsplit(url).netloc: url for url in archives}
    reasons = [_unreachable(url) for url in by_host.values()]
    # Some data sets list servers that the chosen variant does not need: one answer will do.
    if reasons and all(reasons):
        raise OSError(
            f"preparing {name} needs {some_of(sorted(archives.values()))} from "
            f"{some_of(by_host)}, which cannot be reached ({reasons[0]}); put the files into "
            f"{downloads / 'manual'}, or prepare where the internet can be reached and copy the "
            "prepared directory"
        )


def _unreachable(url: str) -> str | None:
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
            return None
    except (urllib.error.HTTPError, http.client.HTTPException):
        return None  # an answer, if only to say that HEAD is not liked
    except OSError as error:
        return str(getattr(error, "reason", error))
