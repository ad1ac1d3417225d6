"""What a user's `cu_seqlens` is to this rank: checked on the host, agreed on, and numbered."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lhcp.checks import check_plain, shape_of
from lhcp.comm.agreement import agreed, compared
from lhcp.comm.layout import LayoutName, make_layout
from lhcp.comm.mesh import Ranks
from lhcp.comm.trail import Fields, note_given
from lhcp.config import LighthouseConfig
from lhcp.documents import Cut, Documents, number_tokens
from lhcp.operators import operator, pack_words, unpack_words
from lhcp.packing import Packing, read_packing

CU_SEQLENS = "cu_seqlens"
"""What ranks call it when they compare it."""


@dataclass(frozen=True)
class Bounds:
    """The bounds of documents of one call, as its caller gave them: nothing is checked yet."""

    cu_seqlens: Tensor
    """Of the whole sequences, the same on every rank: see `lhcp.packing.read_packing`."""
    q: Tensor
    """[B, N / W, H, D], for its sizes and its device."""
    ranks: Ranks
    layout: LayoutName
    config: LighthouseConfig | None = None
    """Of a call that selects: documents must then fit its strata."""

    def local(self) -> Documents | None:
        """Return the documents of this rank's tokens; None where rows are whole ones. Nothing is
        sent.

        The bounds are read once: further layers of a step, which are given the same tensor, look
        them up. In a compiled graph, whose input they are, an operator reads them as it runs.

        Raises:
            TypeError, ValueError: they are no such bounds, or do not fit.
        """
        if torch.compiler.is_compiling():
            return self._in_a_graph("")
        packing, cut = self._read()
        return packing.local(cut, self.q.device) if packing.divides_rows else None

    def agreed(self, layer: object, debug: bool = False) -> Documents | None:
        """Return what `local` does, when ranks were given the same bounds at this layer's first.

        Later ones are compared where their limits are new, on which messages depend. The others are
        noted, see `lhcp.comm.trail.note_given`: comparing them would cost each step a meeting
        of the hosts. With `debug` they meet.

        Raises:
            TypeError, ValueError: as `local`, on any rank; or they differ.
        """
        if torch.compiler.is_compiling():
            alone = self.ranks.world_size == 1
            return self._in_a_graph("" if alone else pack_words(self.ranks.names))
        key = ("documents", layer, getattr(self.q, "shape", None), str(self.layout), self.config)
        if debug:
            packing, cut = compared(self.ranks, self._read, _fields)
        else:
            packing, cut = agreed(self.ranks, key, self._read, _fields, counted=False)
        _tell(self.ranks, packing, cut)
        return packing.local(cut, self.q.device) if packing.divides_rows else None

    def _in_a_graph(self, names: str) -> Documents:
        """Return the documents as torch.compile traces them; `names`: of the ranks that note it."""
        cut = self._cut()
        rule = [] if self.config is None else _sizes(self.config)
        sizes = [*cut[:3], *cut.chunks]
        return Documents(*_read(self.cu_seqlens, self.q, sizes, rule, names))

    def _read(self) -> tuple[Packing, Cut]:
        cut = self._cut()
        packing = read_packing(self.cu_seqlens, cut.batch, cut.seqlen)
        if self.config is not None:
            packing.check_fits(self.config, cut.num_chunks)
        return packing, cut

    def _cut(self) -> Cut:
        check_plain("q", self.q)
        if self.q.ndim != 4:
            raise ValueError(f"q is {shape_of(self.q)}: must be [batch, seqlen, heads, head_dim]")
        layout = make_layout(self.layout, self.ranks.world_size)
        seqlen = self.q.shape[1] * self.ranks.world_size
        layout.check_seqlen(seqlen)
        return Cut(self.q.shape[0], seqlen, layout.num_chunks, layout.chunks(self.ranks.rank))


def _fields(prepared: tuple[Packing, Cut] | None) -> Fields:
    return {} if prepared is None else {CU_SEQLENS: str(prepared[0])}


def _tell(ranks: Ranks, packing: Packing, cut: Cut) -> None:
    """Compare limits that are new with the other ranks, and note all that is given."""
    said = _fields((packing, cut))
    limits = ("limits", cut[:3], packing.limits(cut))
    agreed(ranks, limits, lambda: None, lambda _: said, counted=False)
    note_given(ranks, packing.digest, said)


def _ranks(words: str) -> Ranks:
    flat, outer, inner = unpack_words(words)
    return Ranks.from_names((flat, outer, inner))


def _sizes(config: LighthouseConfig) -> list[int]:
    return [config.num_levels, config.pool_factor, config.topk, config.num_strata]


def _fake_read(
    cu_seqlens: Tensor, like: Tensor, sizes: list[int], rule: list[int], names: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens = like.shape[:2]
    numbers, positions = (like.new_empty((batch, tokens), dtype=torch.int32) for _ in range(2))
    whole = like.new_empty((batch, 1, sizes[1]), dtype=torch.int32)
    return numbers, positions, whole, torch.empty(3, dtype=torch.int64, device="cpu")


@operator("documents", _fake_read)
def _read(
    cu_seqlens: Tensor, like: Tensor, sizes: list[int], rule: list[int], names: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read bounds, and number the tokens of a `Cut`.

    `rule`: sizes of a config, or nothing; `names`: of the ranks that note what they are given, or
    nothing.
    """
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
    if names:
        _tell(_ranks(names), packing, cut)
    numbers, positions, whole, limits = number_tokens(packing.starts, cut, like.device)
    return numbers, positions, whole, limits
