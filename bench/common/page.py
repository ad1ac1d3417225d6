"""What a command leaves behind: tables, a dated markdown page, one JSON document as last line."""

import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.common.arguments import program
from lhcp.page import write_page

Rows = Sequence[Sequence[object]]


def markdown(header: Sequence[str], rows: Rows) -> str:
    """Return a markdown table; cells are printed as they are."""
    return tabulate(
        [list(map(str, row)) for row in rows], header, tablefmt="pipe", disable_numparse=True
    )


def text_table(header: Sequence[str], rows: Rows) -> str:
    """Return a table for a terminal: two columns of names, then numbers to the right."""
    return tabulate(
        [list(map(str, row)) for row in rows],
        header,
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", "left", *("right",) * (len(header) - 2)),
    )


def write(document: Any, path: str | Path | None) -> str:
    """Write the document to a file where asked; return it as one line of JSON."""
    text = json.dumps(document, default=_plain)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n")
    return text


def last_line(document: Any, path: str | Path | None = None) -> None:
    """Print the document as the last line, and write it to a file where asked."""
    print(write(document, path), flush=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def today() -> str:
    """Return the date of a result."""
    return datetime.date.today().isoformat()


def command() -> str:
    """Return the command that started this process."""
    return shlex.join([*program(), *sys.argv[1:]])


class Page:
    """Markdown that is printed as it comes, and written once all of it is there.

    Args:
        facts: the card, a line each.
        shown: whether lines are printed as they come.
    """

    def __init__(self, title: str, facts: Mapping[str, Any], *, shown: bool = True) -> None:
        self.facts, self.shown = dict(facts), shown
        self.wrong: list[str] = []
        """What does not hold, by name; `close` ends with status 1 if there is any."""
        self._parts: list[str | tuple[list[str], list[list[str]]]] = []
        self.line(f"# {title}")
        self.line("")
        for name, value in self.facts.items():
            self.line(f"- {name}: {value}")

    def line(self, text: str) -> None:
        """Add a line of text."""
        if self.shown:
            print(text, flush=True)
        self._parts.append(text)

    def table(
        self, title: str, note: str, header: Iterable[str], rows: Iterable[Iterable[object]] = ()
    ) -> None:
        """Open a section with a table; further rows follow by `row`."""
        for text in ("", f"## {title}", *([note] if note else []), ""):
            self.line(text)
        names = list(header)
        self._parts.append((names, []))
        if self.shown:
            print(" | ".join(names), flush=True)
        for cells in rows:
            self.row(*cells)

    def row(self, *cells: object) -> None:
        """Add a row to the table that is open."""
        part = self._parts[-1]
        assert isinstance(part, tuple), "a row needs an open table"
        texts = list(map(str, cells))
        if self.shown:
            print(" | ".join(texts), flush=True)
        part[1].append(texts)

    def refuse(self, what: str, why: object) -> None:
        """Print no number for `what`; the program then ends with status 1."""
        text = " ".join(str(why).split())
        self.wrong.append(f"{what}: {text}")
        self.row(what, f"WRONG, no number: {text}")

    @property
    def markdown(self) -> str:
        """Return the page as it is written."""
        parts = (part if isinstance(part, str) else markdown(*part) for part in self._parts)
        return "\n".join(parts) + "\n"

    def close(self, out: str | Path | None, records: Any) -> None:
        """Write `out`.md and `out`.json where asked; print the JSON document last.

        What people added to an older `out`.md stays there, as by `write_page`.

        Raises:
            SystemExit: something is wrong; status 1.
        """
        self.line("")
        self.line("WRONG: " + "; ".join(self.wrong) if self.wrong else "All rows hold.")
        stem = str(out).removesuffix(".md") if out else None
        if stem:
            page = Path(stem + ".md")
            page.parent.mkdir(parents=True, exist_ok=True)
            write_page(page, self.markdown)
        document = {"card": self.facts, "records": records, "wrong": self.wrong}
        last_line(document, stem and stem + ".json")
        if self.wrong:
            sys.exit("wrong: " + "; ".join(self.wrong))
