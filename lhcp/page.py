"""A markdown page of results that may be written again without losing what people added to it."""

from pathlib import Path

BY_HAND = "<!-- By hand: what follows stays when this page is written again. -->"
"""The last line of a page as it is written, below which people say what it means."""


def write_page(path: Path, markdown: str) -> None:
    """Write a page; what an older one has below `BY_HAND` stays below it."""
    older = path.read_text("utf-8") if path.exists() else ""
    by_hand = older.partition(BY_HAND)[2] or "\n"
    path.write_text(f"{markdown.rstrip()}\n\n{BY_HAND}{by_hand}", encoding="utf-8")
