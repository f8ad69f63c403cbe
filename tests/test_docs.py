import doctest
import pathlib

import pytest

PAGES = sorted((pathlib.Path(__file__).parent.parent / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_the_page(page):
    failures, _ = doctest.testfile(str(page), module_relative=False)
    assert failures == 0
