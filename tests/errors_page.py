"""A pytest plugin that writes docs/errors.md: the messages that the tests provoke.

python -m pytest -p tests.errors_page --errors-page=docs/errors.md
"""

import pathlib
import re
import traceback

import pytest

ROOT = pathlib.Path(__file__).parents[1]
HEAD = """# Messages

What users are told when something is wrong, as the tests provoked it: one example of every place
that raises, by module. Command-line programs put it on one line and end with the status that
[reliability.md](reliability.md) lists. Written by `python -m pytest -p tests.errors_page
--errors-page=docs/errors.md`; DIR stands for a folder.
"""
FOLDER = re.compile(r"/\S*?/pytest-of-[^/\s]+/pytest-\d+/(popen-gw\d+/)?[^/\s:;,)']+")


def pytest_addoption(parser):
    parser.addoption("--errors-page", help="file to write the messages to")


def pytest_configure(config):
    if page := config.getoption("--errors-page"):
        config.pluginmanager.register(Recorder(pathlib.Path(page)))


class Recorder:
    """Notes what `pytest.raises` catches from our own code."""

    def __init__(self, page):
        self._page = page
        self._messages = {}
        self._raises = pytest.raises
        pytest.raises = self._recording

    def pytest_sessionfinish(self):
        pytest.raises = self._raises
        lines, heading = [HEAD], None
        for (module, _), (kind, text) in sorted(self._messages.items()):
            if module != heading:
                lines.append(f"\n## {module}\n")
                heading = module
            fence = "``" if "`" in text else "`"
            lines.append(f"- {kind}: {fence}{text}{fence}")
        self._page.write_text("\n".join(lines) + "\n")

    def _recording(self, *arguments, **options):
        context = self._raises(*arguments, **options)
        return _Context(context, self) if hasattr(context, "__exit__") else context

    def note(self, error):
        """Keep one message for every line of ours that raises."""
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if pathlib.Path(frame.filename).is_relative_to(ROOT / "falcon_jax")
        ]
        if frames and "jaxtyping" not in type(error).__module__:
            place = pathlib.Path(frames[-1].filename).relative_to(ROOT).as_posix()
            text = FOLDER.sub("DIR", " ".join(str(error).split())).replace(str(ROOT), ".")
            key = (place, frames[-1].lineno or 0)
            self._messages.setdefault(key, (type(error).__name__, text[:400]))


class _Context:
    def __init__(self, context, recorder):
        self._context, self._recorder = context, recorder

    def __enter__(self):
        self._caught = self._context.__enter__()
        return self._caught

    def __exit__(self, kind, error, trace):
        handled = self._context.__exit__(kind, error, trace)
        if handled and error is not None:
            self._recorder.note(error)
        return handled
