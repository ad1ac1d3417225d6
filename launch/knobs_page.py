"""Merge results of launch/knobs.py into one page: `python launch/knobs_page.py FOLDER ...`.

Knobs and seeds may have come on different days and machines. Needs no GPU.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lhcp.console import escape_unprintable
from lhcp.training import knobs_page, knobs_results
from lhcp.training.short_results import read_short


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to merge, and where to write it."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that were --out of launch/knobs.py, of one recipe."""
    page: Path
    """Folder of the page (dated .md), its numbers (.json) and its pictures (.png)."""


def main(arguments: Arguments) -> None:
    """Merge, write, and print the page."""
    rows, shorts = knobs_results.read(arguments.results), read_short(arguments.results)
    page = knobs_page.write(rows, arguments.page, shorts)
    print(page.read_text(encoding="utf-8"))
    print(f"page: {page}", flush=True)


if __name__ == "__main__":
    escape_unprintable()
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"launch/knobs_page.py: {error}")
