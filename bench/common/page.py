"""What the evidence on gloo ranks shares: a dated page and its JSON, ranks' parts made whole."""

import datetime
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import card, last_line
from torch import Tensor

import lhcp
from lhcp.comm.layout import make_layout
from lhcp.comm.mesh import Ranks
from lhcp.config import LighthouseConfig
from lhcp.layer.lighthouse import local_geometry
from lhcp.lighthouse.select import Selection
from lhcp.reference import ReferenceSelection


def together(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Put the zigzag parts of all ranks, in rank order, into sequence order along `dim`.

    For tokens and for sub-sequence entries alike: every chunk has equally many of both.
    """
    layout = make_layout("zigzag", len(parts))
    chunks = [part.chunk(layout.chunks_per_rank, dim) for part in parts]
    owners = [layout.owner(chunk) for chunk in range(layout.num_chunks)]
    return torch.cat([chunks[rank][slot] for rank, slot in owners], dim)


def whole_entries(
    selection: Selection, config: LighthouseConfig, seqlen: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Levels of a rank's entries and their indices in the whole sequence, each [B, Hk, S / W]."""
    geom = local_geometry(config, seqlen // ranks.world_size, ranks, "zigzag")
    levels = selection.levels(geom)
    sizes = [geom.window(level) for level in range(geom.num_levels)]
    windows = torch.tensor(sizes, device=levels.device)[levels]
    tokens = lhcp.positions(seqlen, ranks).to(levels.device)
    first_tokens = tokens[selection.indices(geom) * windows]
    return levels, first_tokens // windows


def whole_selection(entries: Sequence[tuple[Tensor, Tensor]]) -> ReferenceSelection:
    """All ranks' `whole_entries` as one selection."""
    return ReferenceSelection(*(together(parts, 2) for parts in zip(*entries, strict=True)))


def equal(a: ReferenceSelection, b: ReferenceSelection) -> bool:
    """Whether two selections have the same entries in the same order."""
    return torch.equal(a.levels, b.levels) and torch.equal(a.indices, b.indices)


def peak_mb() -> float:
    """The most memory that this process ever had, NaN where the system does not tell.

    Not ru_maxrss: in a process that was started by another it counts what that one had.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM")), math.nan)


class Page:
    """Markdown that is printed as it comes and written with its JSON at the end."""

    def __init__(self, title: str, **facts: Any) -> None:
        measured = card(torch.device("cpu"), Ranks())
        # The card speaks of this process; the ranks that it starts are told by `facts`.
        del measured["world_size"], measured["nodes"]
        self.facts = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", *sys.argv]),
            **facts,
            **measured,
        }
        self.lines: list[str] = []
        self.wrong: list[str] = []
        """What does not hold, by name; `close` ends with status 1 if there is any."""
        self.line(f"# {title}")
        self.line("")
        for name, value in self.facts.items():
            self.line(f"- {name}: {value}")

    def line(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)

    def table(self, title: str, note: str, header: Iterable[str]) -> None:
        """Open a table; its rows follow by `row`."""
        names = list(header)
        for text in ("", f"## {title}", note, "", f"| {' | '.join(names)} |"):
            self.line(text)
        self.line("|---" * len(names) + "|")

    def row(self, cells: Iterable[object]) -> None:
        self.line(f"| {' | '.join(map(str, cells))} |")

    def close(self, out: str | None, records: Any) -> None:
        """Write `out`.md and `out`.json, print the JSON last.

        Raises:
            SystemExit: something is wrong; status 1.
        """
        self.line("")
        self.line("WRONG: " + "; ".join(self.wrong) if self.wrong else "All rows hold.")
        if out:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            Path(out + ".md").write_text("\n".join(self.lines) + "\n")
        document = {"card": self.facts, "records": records, "wrong": self.wrong}
        last_line(document, out and out + ".json")
        if self.wrong:
            sys.exit("wrong: " + "; ".join(self.wrong))
