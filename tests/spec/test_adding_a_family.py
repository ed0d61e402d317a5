"""The code that docs/adding-a-family.md quotes is that of the source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"```py\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_quotes_code() -> None:
    assert len(QUOTES) == 5
    assert PAGE.count("```py\n") == len(QUOTES)


@pytest.mark.parametrize(("path", "code"), QUOTES)
def test_quotes_are_in_the_source(path: str, code: str) -> None:
    assert code in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", re.findall(r"`((?:src|tests)/[\w/]+\.py)`", PAGE))
def test_files_that_the_page_names_exist(name: str) -> None:
    assert (ROOT / name).exists() or "NAME" in name
