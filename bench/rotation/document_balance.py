"""How evenly do ranks share the work of packed documents, and how many keys travel? Counted.

    python -m bench.rotation.document_balance --json out.json

Lengths of documents are lognormal. Work is pairs of a query and a key that it attends to, of each
rank's tokens, and keys are those that p2p sends in a forward. Nothing is timed, and no device is
needed; the last line is JSON.
"""

from dataclasses import asdict, dataclass
from statistics import mean

import torch
from torch import Tensor

from bench.common.arguments import add_json, make_parser
from bench.common.page import last_line, text_table
from lhcp.comm.layout import LAYOUTS, Layout, LayoutName, make_layout
from lhcp.documents import Cut, limits_of
from lhcp.ring.parts import ring_sources
from lhcp.ring.shape import CAUSAL, AttentionShape, Mask


@dataclass(frozen=True)
class Row:
    """One setting, over some draws of one sequence's documents."""

    seqlen: int
    mean_length: int
    world_size: int
    layout: LayoutName
    busiest: float
    """Work of the rank that has most, over the mean of all ranks; mean over draws."""
    worst: float
    """The same of the worst draw."""
    sent: float
    """Keys that all ranks send, over those without documents; mean over draws."""


def draw_starts(seqlen: int, mean_length: int, sigma: float, generator: torch.Generator) -> Tensor:
    """First tokens of documents of lognormal lengths, int64; the last one is cut."""
    count = 4 * seqlen // mean_length + 64
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    lengths = (mean_length * (sigma * normal - sigma**2 / 2).exp()).long().clamp(min=1)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return starts[starts < seqlen]


def work_of_chunks(starts: Tensor, seqlen: int, num_chunks: int) -> Tensor:
    """Pairs of a query and a key of its document, by the query's chunk."""
    tokens = torch.arange(seqlen)
    first = starts[torch.bucketize(tokens, starts, right=True) - 1]
    return (tokens - first + 1).view(num_chunks, -1).sum(1)


def keys_sent(layout: Layout, seqlen: int, mask: Mask) -> int:
    """Keys that leave their ranks in a forward of p2p."""
    shape = AttentionShape(
        seqlen=seqlen, layout=layout, num_heads=1, num_kv_heads=1, head_dim=1, mask=mask
    )
    world = layout.world_size
    of_ranks = (ring_sources(rank, layout, mask, (range(1, world),)) for rank in range(world))
    chunks = sum(len(receivers) for of_rank in of_ranks for receivers in of_rank)
    return chunks * shape.met_rows


def count(setting: tuple[int, int, int, LayoutName], draws: int, sigma: float) -> Row:
    """Count one setting."""
    seqlen, mean_length, world, name = setting
    layout, generator = make_layout(name, world), torch.Generator().manual_seed(0)
    busiest, sent = [], []
    for _ in range(draws):
        starts = draw_starts(seqlen, mean_length, sigma, generator)
        work = work_of_chunks(starts, seqlen, layout.num_chunks)
        of_rank = torch.stack([work[list(layout.chunks(r))].sum() for r in range(world)]).double()
        busiest.append(float(of_rank.max() / of_rank.mean()))
        cut = Cut(1, seqlen, layout.num_chunks, (0,))
        mask = Mask(True, *limits_of(starts, cut).tolist())
        sent.append(keys_sent(layout, seqlen, mask) / keys_sent(layout, seqlen, CAUSAL))
    return Row(seqlen, mean_length, world, name, mean(busiest), max(busiest), mean(sent))


def main() -> None:
    """Count every setting and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[131_072, 1_048_576])
    parser.add_argument(
        "--parts", type=int, nargs="+", default=[4, 32], help="mean length N / this"
    )
    parser.add_argument("--means", type=int, nargs="*", default=[2048], help="mean lengths, tokens")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of lengths")
    parser.add_argument("--draws", type=int, default=20)
    add_json(parser)
    args = parser.parse_args()
    rows = [
        count((seqlen, length, world, layout), args.draws, args.sigma)
        for seqlen in args.seqlens
        for length in [*(seqlen // part for part in args.parts), *args.means]
        for world in args.worlds
        for layout in LAYOUTS
    ]
    header = ("layout", "N", "mean length", "W", "busiest / mean", "worst draw", "keys sent")
    cells = [
        (
            r.layout,
            r.seqlen,
            r.mean_length,
            r.world_size,
            f"{r.busiest:.3f}",
            f"{r.worst:.3f}",
            f"{r.sent:.2f}",
        )
        for r in rows
    ]
    print(text_table(header, cells))
    last_line(
        {"draws": args.draws, "sigma": args.sigma, "rows": [asdict(r) for r in rows]}, args.json
    )


if __name__ == "__main__":
    main()
