import doctest
import importlib.util
import inspect
import json
import pathlib
import re
import subprocess
import sys
import types

import pytest

import falcon_jax

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
LONG = ("nnx", "speed", "target", "tutorial")  # of what has tests of its own
PAGES = sorted(DOCS.glob("*.md"))
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.slow) if p.stem in LONG else p for p in PAGES],
    ids=lambda page: getattr(page, "name", None),
)
def test_examples_of_the_page(page):
    failures, _ = doctest.testfile(str(page), module_relative=False)
    assert failures == 0


@pytest.mark.slow  # `make docs` runs it, too, and the other one, which trains
def test_cells_of_the_functional_notebook():
    names = {}
    page = _text("notebooks/functional.md")
    for cell in re.findall(r"```\{code-cell\}.*\n((?:.*\n)*?)```", page):
        exec(cell, names)
    assert names["errors"][-1] < 1e-5


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^[\w/]+$", _text("index.md"), re.M))
    pages = {p.relative_to(DOCS).with_suffix("").as_posix() for p in DOCS.glob("**/[!_]*.md")}
    pages = {page for page in pages if not page.startswith("_")}
    # errors.md is for developers.
    assert pages - {"index", "errors"} == listed - {"api/index"}


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS.glob("[!_]*.md")], ids=lambda p: p.name)
def test_links_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    files = [(page.parent / link, page.parent / f"{link}.rst") for link in links]
    assert not [file for file, rst in files if not file.exists() and not rst.exists()]


def test_every_public_name_has_a_docstring():
    reference = _public_names()
    undocumented = [
        place
        for value, place in reference.reference().values()
        if (inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value))
        and not inspect.getdoc(value)
    ]
    assert not undocumented


def test_every_namespace_has_a_page():
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.rst"))
    found = re.findall(r"^\.\. public-names:: (\S+)$", text, re.M)
    assert sorted(found) == sorted(_public_names().MODULES)
    namespaces = {
        f"falcon_jax.{name}"
        for name in falcon_jax.__all__
        if isinstance(getattr(falcon_jax, name), types.ModuleType)
    }
    assert namespaces < set(found)


@pytest.mark.slow
def test_every_public_name_is_in_the_built_reference(tmp_path):
    inventory = pytest.importorskip("sphinx.util.inventory").InventoryFile
    # Notebooks that are not run do not say what language they are in.
    options = ("nb_execution_mode=off", "suppress_warnings=myst-nb.lexer")
    settings = [part for option in options for part in ("-D", option)]
    arguments = ["-q", "-W", "-b", "html", *settings, DOCS, tmp_path]
    subprocess.run([sys.executable, "-m", "sphinx", *arguments], check=True, timeout=300)
    with (tmp_path / "objects.inv").open("rb") as file:
        built = inventory.load(file, "", lambda base, uri: uri)
    kinds = ("class", "function", "data", "module")
    names = {name for kind in kinds for name in built[f"py:{kind}"]}
    for (module, name), (value, place) in _public_names().reference().items():
        wanted = f"{module}.{name}" if isinstance(value, types.ModuleType) else place
        assert wanted in names, f"{name} of {module}"


def test_table_of_the_readme():
    rows = re.findall(r"^\| (standard|FALCON, rank \d) \|(.*)\|$", README, re.M)
    report = json.loads((ROOT / "results/demo/report.json").read_text())
    assert len(rows) == len(report)
    for (label, text), row in zip(rows, report, strict=True):
        cells = [cell.strip() for cell in text.split("|")]
        assert label == ("standard" if row["rank"] is None else f"FALCON, rank {row['rank']}")
        for cell, exact in zip(
            cells,
            (
                row["params"] / 1e6,
                row["mult_adds"] / 1e6,
                row["params_ratio"],
                row["mult_adds_ratio"],
                row["accuracy_before"] and 100 * row["accuracy_before"],
                100 * row["accuracy_after"],
                row["latency_ms"],
            ),
            strict=True,
        ):
            if exact is None:
                assert not cell
                continue
            number = cell.rstrip("Mx% s").removesuffix("m").strip()
            digits = len(number.partition(".")[2])
            assert float(number) == pytest.approx(exact, abs=0.51 * 10**-digits)


def _text(name):
    return (DOCS / name).read_text()


def _public_names():
    path = DOCS / "_ext" / "names.py"
    spec = importlib.util.spec_from_file_location("names", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
