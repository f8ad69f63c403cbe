"""One folder, one experiment: the config kept there, and compared."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from falcon_jax.report.table import write_json

# Fields that say where the data is, what to run or what to show, and change no result.
_FREE = ("log.", "compression.only", "data.data_dir")


def claim_workdir(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Keep the config of an experiment in its folder, or compare it with the one kept there.

    Args:
        workdir: made if missing.
        config: plain data.

    Raises:
        ValueError: if the folder holds another experiment, listing the fields that differ.
        OSError: if the folder cannot be written to.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    config = json.loads(json.dumps(config))
    if path.exists():
        try:
            kept = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; give another --workdir") from None
        differences = list(_differences(kept, config))
        if differences:
            raise ValueError(
                f"{workdir} holds an experiment with another config ({'; '.join(differences)}); "
                "give another --workdir, or the config that it has"
            )
    write_json(path, config)


def _differences(kept: Any, given: Any, name: str = "") -> Iterator[str]:
    if name.startswith(_FREE):
        return
    if isinstance(kept, Mapping) and isinstance(given, Mapping):
        for field in [*kept, *(f for f in given if f not in kept)]:
            dotted = f"{name}.{field}" if name else field
            yield from _differences(kept.get(field), given.get(field), dotted)
    elif kept != given:
        yield f"{name}: {kept!r} there, {given!r} given"
