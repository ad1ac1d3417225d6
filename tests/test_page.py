"""Pages of results: numbers are new each time they are written, and people's words stay."""

from pathlib import Path

from lhcp.page import BY_HAND, write_page


def test_what_people_wrote_stays(tmp_path: Path) -> None:
    """Fails if a page that is written again loses what is below its mark, or keeps old numbers."""
    page, words = tmp_path / "page.md", "\n\n## What it says\nIt holds.\n"
    for numbers in ("1.0\n", "2.0"):
        write_page(page, f"# A page\n{numbers}")
        before, _, after = page.read_text().partition(BY_HAND)
        assert before == f"# A page\n{numbers.strip()}\n\n" and after == "\n"
    page.write_text(page.read_text().rstrip() + words)
    write_page(page, "# A page\n3.0\n")
    before, _, after = page.read_text().partition(BY_HAND)
    assert before == "# A page\n3.0\n\n" and after == words
