"""What a user's `cu_seqlens` is to this rank: checked on the host, agreed on, and numbered."""

import torch
from torch import Tensor

from lhcp.checks import check_plain, shape_of
from lhcp.comm.agreement import agreed
from lhcp.comm.layout import LayoutName, make_layout
from lhcp.comm.mesh import Ranks
from lhcp.config import LighthouseConfig
from lhcp.documents import Cut, Documents, Packing, number_tokens, read_packing
from lhcp.operators import operator


def local_documents(
    cu_seqlens: Tensor | None,
    q: Tensor,
    ranks: Ranks,
    layout: LayoutName,
    config: LighthouseConfig | None = None,
    layer: object = None,
) -> Documents | None:
    """Return the documents of this rank's tokens; None where there are no bounds.

    The bounds are read once: further layers of a step, which are given the same tensor, look them
    up. Ranks compare them at each layer's first call. In a compiled graph, whose bounds are inputs,
    an operator reads them when the graph runs.

    Args:
        cu_seqlens: of the whole sequences, the same on every rank: see `read_packing`.
        q: [B, N / W, H, D], for its sizes and its device.
        config: of a call that selects: documents must then fit its strata.
        layer: whose call it is.

    Raises:
        TypeError, ValueError: they are no such bounds, do not fit, or differ between ranks.
    """
    if cu_seqlens is None:
        return None

    def cut() -> Cut:
        check_plain("q", q)
        if q.ndim != 4:
            raise ValueError(f"q is {shape_of(q)}: must be [batch, seqlen, heads, head_dim]")
        how = make_layout(layout, ranks.world_size)
        seqlen = q.shape[1] * ranks.world_size
        how.check_seqlen(seqlen)
        return Cut(q.shape[0], seqlen, how.num_chunks, how.chunks(ranks.rank))

    if torch.compiler.is_compiling():
        mine = cut()
        rule = [] if config is None else _sizes(config)
        sizes = [*mine[:3], *mine.chunks]
        return Documents(*_read(cu_seqlens, q, sizes, rule))

    def prepare() -> tuple[Packing, Cut]:
        mine = cut()
        packing = read_packing(cu_seqlens, mine.batch, mine.seqlen)
        if config is not None:
            packing.check_fits(config, mine.num_chunks)
        return packing, mine

    def fields(prepared: tuple[Packing, Cut] | None) -> dict[str, str]:
        return {} if prepared is None else {"cu_seqlens": str(prepared[0])}

    key = ("documents", layer, getattr(q, "shape", None), str(layout), config)
    packing, mine = agreed(ranks, key, prepare, fields)
    return packing.local(mine, q.device)


def _sizes(config: LighthouseConfig) -> list[int]:
    return [config.num_levels, config.pool_factor, config.topk, config.num_strata]


def _fake_read(
    cu_seqlens: Tensor, like: Tensor, sizes: list[int], rule: list[int]
) -> tuple[Tensor, Tensor]:
    numbers, positions = (like.new_empty(like.shape[:2], dtype=torch.int32) for _ in range(2))
    return numbers, positions


@operator("documents", _fake_read)
def _read(
    cu_seqlens: Tensor, like: Tensor, sizes: list[int], rule: list[int]
) -> tuple[Tensor, Tensor]:
    """Read bounds, and number the tokens of a `Cut`; `rule`: sizes of a config, or nothing."""
    batch, seqlen, num_chunks, *chunks = sizes
    packing = read_packing(cu_seqlens, batch, seqlen)
    if rule:
        num_levels, pool_factor, topk, num_strata = rule
        config = LighthouseConfig(
            num_levels=num_levels, pool_factor=pool_factor, topk=topk, num_strata=num_strata
        )
        packing.check_fits(config, num_chunks)
    # Fresh ones: whoever calls an operator may write into what it returns.
    cut = Cut(batch, seqlen, num_chunks, tuple(chunks))
    numbers, positions = number_tokens(packing.starts, cut, like.device)
    return numbers, positions
