"""How the tests run a program of evidence: to its end, with its page and its document."""

import json
from pathlib import Path
from typing import Any

from lhcp.comm.mesh import as_ranks
from lhcp.testing.ranks import RankPool


def on_rank_one(group: Any) -> bool:
    return as_ranks(group).rank == 1


def end_of(program: Any, pool: RankPool, command: str, out: Path) -> tuple[Any, dict[str, Any]]:
    """Return what the program hands to sys.exit, None if it just ends, and its JSON."""
    code: Any = None
    try:
        program.report(program.parse([*command.split(), "--out", str(out)]), pool)
    except SystemExit as ended:
        code = ended.code
    assert "| dk " in out.with_suffix(".md").read_text()
    return code, json.loads(out.with_suffix(".json").read_text())
