"""Pages: what is printed, what is written, and that a wrong row ends with status 1."""

import json
import re
from pathlib import Path

import pytest

from bench.common.page import Page


def test_a_page_that_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a fact, a cell or a record is lost, or a cell that looks like a number changes."""
    page = Page("a title", {"commit": "abc"})
    page.table("a table", "a note", ("what", "ms"), [("1,024", "0.10")])
    page.row("2,048", "1e3")
    page.line("after it")
    page.close(tmp_path / "out.md", {"records": 1})
    text = re.sub(" +", " ", (tmp_path / "out.md").read_text())
    for line in ("# a title", "- commit: abc", "| 1,024 | 0.10 |", "| 2,048 | 1e3 |", "after it"):
        assert line in text.splitlines()
    document = {"card": {"commit": "abc"}, "records": {"records": 1}, "wrong": []}
    assert json.loads((tmp_path / "out.json").read_text()) == document
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == document and "2,048 | 1e3" in printed


def test_a_wrong_row_is_named(tmp_path: Path) -> None:
    """Fails if a number that was refused ends with status 0, or is not on the page."""
    page = Page("a title", {}, shown=False)
    page.table("a table", "", ("what", "ms", "more"))
    page.refuse("32K", "dq is\n off")
    with pytest.raises(SystemExit, match="32K: dq is off"):
        page.close(tmp_path / "out", [])
    assert "WRONG, no number: dq is off" in (tmp_path / "out.md").read_text()
