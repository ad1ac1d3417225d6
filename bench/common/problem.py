"""One computation that several ways to attend are asked for, and the ways to attend across ranks.

Shapes: one sequence of N tokens, H query heads, Hk kv heads, D head_dim, on W ranks.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

import lhcp
from lhcp.comm.layout import LayoutName, make_layout
from lhcp.comm.mesh import Ranks
from lhcp.integrations.ring_flash_attn import check_ring_flash_attn
from lhcp.ring.block.base import Request
from lhcp.ring.heads import TWO_AXES
from lhcp.ring.rotation import NAMES, refuses
from lhcp.ring.shape import CAUSAL

TENSORS = ("out", "dq", "dk", "dv")
PEER = "ring_flash_attn"
Answers = tuple[Tensor, ...]
"""out, dq, dk, dv: [1, n, H or Hk, D]."""


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """Dense attention, or the layer where there is a config."""

    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    config: lhcp.LighthouseConfig | None = None
    seed: int = 0
    num_documents: int = 0
    """That the sequence is packed of, of random lengths; 0: it is one, and is not said to be."""

    @classmethod
    def of(cls, args: Namespace, dtype: torch.dtype, **more: Any) -> "AttentionProblem":
        """Take the heads from a command line, and a length that matters only where it is given."""
        heads = {"num_heads": args.heads, "num_kv_heads": getattr(args, "kv_heads", args.heads)}
        return cls(**{"seqlen": 0, "dtype": dtype, "head_dim": args.head_dim} | heads | more)

    @property
    def attended(self) -> int:
        """Tokens or entries of all ranks that attention runs on."""
        if self.config is None:
            return self.seqlen
        return self.config.subsequence_length(self.seqlen)

    @property
    def kind(self) -> str:
        kind = "dense" if self.config is None else "layer"
        return f"{kind}, {self.num_documents} documents" if self.num_documents else kind

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Where documents begin, int32 [num_documents + 1] on the CPU."""
        if not self.num_documents:
            return None
        draw = Random(self.seed)
        starts = draw.sample(range(1, self.seqlen), self.num_documents - 1)
        return torch.tensor([0, *sorted(starts), self.seqlen], dtype=torch.int32)

    def inputs(self, chunks: Sequence[int], num_chunks: int, device: torch.device) -> Answers:
        """Draw q, k, v and the gradient of out for some of `num_chunks` chunks, [1, n, heads, D].

        A chunk has its own seed, so every rank draws its part of the same whole. Rows differ in
        size by an order of magnitude, so that selection has work to do.
        """
        size = self.seqlen // num_chunks
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        shapes = [(1, size * len(chunks), heads, self.head_dim) for heads in counts]
        drawn = tuple(torch.empty(shape, dtype=self.dtype, device=device) for shape in shapes)
        for slot, chunk in enumerate(chunks):
            generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + chunk)
            for x in drawn:
                into = x[:, slot * size : (slot + 1) * size]
                rows = torch.randn(into.shape, generator=generator, device=device)
                sizes = torch.rand((*into.shape[:3], 1), generator=generator, device=device)
                into.copy_(rows.mul_(sizes.mul_(1.8).add_(0.2)))
        return drawn

    def whole(self, device: torch.device) -> Answers:
        """Draw the whole sequence at once."""
        return self.inputs([0], 1, device)

    def own(self, ranks: Ranks, device: torch.device) -> Answers:
        """Draw this rank's part of a zigzag layout."""
        layout = make_layout("zigzag", ranks.world_size)
        layout.check_seqlen(self.seqlen)
        return self.inputs(layout.chunks(ranks.rank), layout.num_chunks, device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Call the library: `options` are keyword arguments of its functions."""
        options = {"cu_seqlens": self.cu_seqlens, **options}
        if self.config is None:
            return lhcp.ring_attention(q, k, v, **options)
        return lhcp.lighthouse_attention(q, k, v, config=self.config, **options)

    def answer(
        self, inputs: Answers, attend: Callable[..., Tensor] | None = None, **options: Any
    ) -> Answers:
        """Return out, dq, dk, dv of these inputs.

        Args:
            inputs: q, k, v and the gradient of out.
            attend: in place of the method, for example compiled.
        """
        *leaves, dout = (x.detach() for x in inputs)
        leaves = [x.requires_grad_() for x in leaves]
        out = (attend or self.attend)(*leaves, **options)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)


@dataclass(frozen=True)
class Choice:
    """One way to attend across ranks."""

    rotation: str
    backend: str
    ranks: Ranks
    layout: LayoutName = "zigzag"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the library's functions."""
        return {
            "rotation": self.rotation,
            "backend": self.backend,
            "group": self.ranks,
            "layout": self.layout,
        }


def choices(
    nodes: Ranks, num_heads: int, backends: Sequence[str], wanted: Sequence[str]
) -> list[Choice]:
    """Return every wanted rotation that these ranks and heads allow, with every backend.

    Args:
        nodes: all ranks, of two axes where rotations that want them are to be among the choices.
        wanted: names of rotations, "auto" included.
    """
    flat = Ranks(nodes.flat)
    able = []
    for rotation in ("auto", *NAMES):
        ranks = nodes if rotation in TWO_AXES else flat
        if rotation in wanted and refuses(rotation, ranks, num_heads) is None:
            able.append((rotation, ranks))
    return [Choice(name, backend, ranks) for backend in backends for name, ranks in able]


def choices_beside_peer(
    nodes: Ranks, q: Tensor, backend: str, wanted: Sequence[str]
) -> tuple[list[Choice], str | None]:
    """Return the choices with `backend`, and where the peer can run with its kernel, and the peer.

    Args:
        q: of the heads, dtype and device that all of them must serve.

    Returns:
        choices; why ring-flash-attn is not among them, if it is not.
    """
    missing = _peer_missing(q, nodes.world_size)
    backends = [backend] if missing else [backend, "flash_attn"]
    chosen = choices(nodes, q.shape[2], backends, wanted)
    if missing is None:
        chosen.append(Choice(PEER, "auto", Ranks(nodes.flat)))
    return chosen, missing


def _peer_missing(q: Tensor, world_size: int) -> str | None:
    if world_size == 1:
        return "one rank has no ring"
    try:
        layout = make_layout("zigzag", world_size)
        check_ring_flash_attn(Request(q.dtype, q.shape[3], q.device.type), layout, CAUSAL)
    except (ImportError, ValueError) as error:
        return str(error)
    return None
