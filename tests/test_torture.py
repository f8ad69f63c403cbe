"""Kills of the real program in small; the benchmark does a hundred."""

import pytest

from benchmarks.torture import torture


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_never_been(tmp_path):
    report = torture(tmp_path, kills=3, seed=1)
    summary = report["summary"]
    assert report["compared"] > 50
    assert (summary["kills"], summary["continued"], summary["differences"]) == (3, 3, 0)
