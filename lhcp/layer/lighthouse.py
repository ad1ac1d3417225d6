"""`lighthouse_attention`: the local stages, then the ring, then scatter-back."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from lhcp.checks import as_autocast, check_qkv, shape_of
from lhcp.comm.layout import LayoutName
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.config import LighthouseConfig
from lhcp.cost.calibration import Calibration
from lhcp.layer.call import Call
from lhcp.layer.choices import Choices, by_name
from lhcp.layer.documents import Bounds
from lhcp.layer.given import Given, scored_on
from lhcp.layer.plan import carry_out, choose_kernels, make_plan
from lhcp.layer.scatter_back import ScatterBack, ScatterPlan
from lhcp.layer.select import local_geometry
from lhcp.lighthouse import operators
from lhcp.lighthouse.autograd import GatherSubsequence
from lhcp.lighthouse.documents import entry_limits, numbers_of
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.score import SCORERS, ScoreInputs
from lhcp.lighthouse.select import Selection
from lhcp.made_once import keep
from lhcp.operators import pack_integers
from lhcp.ring.documents import PackedRows, gather_numbers
from lhcp.ring.plan import RingPlan
from lhcp.timing import UNTIMED, Spans


class Prepared(NamedTuple):
    """What is made of a call before the first stage."""

    geometry: Geometry
    plan: RingPlan
    kernels: str
    score_q: Tensor
    score_k: Tensor

    @property
    def chosen(self) -> dict[str, str]:
        """What "auto" became."""
        return self.plan.chosen | {"kernels taken": self.kernels}


def lighthouse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: LighthouseConfig,
    group: Group | Ranks = None,
    layout: LayoutName = "zigzag",
    rotation: str | Calibration = "auto",
    backend: str = "auto",
    kernels: str = "auto",
    scale: float | None = None,
    selection: Selection | None = None,
    score_q: Tensor | None = None,
    score_k: Tensor | None = None,
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    timers: Spans = UNTIMED,
    debug: bool = False,
) -> Tensor:
    """Attend by Lighthouse attention (arXiv 2605.06554) over a sequence that ranks share.

    Pools q, k and v, selects entries, gathers them into a short causal sub-sequence, attends to it
    by ring attention and scatters the outputs back. The result is the same function on any number
    of ranks. For training; causal for a fixed selection.

    Args:
        q: [B, N / W, H, D], this rank's queries in layout order, RoPE applied.
        k, v: [B, N / W, Hk, D], the dtype of q; H a multiple of Hk.
        config: the layer's sizes; N is the whole sequence, over all ranks.
        group: ProcessGroup, DeviceMesh of one axis (or two, outer across nodes), or None for one
            rank. Every rank must call with equal shapes and choices.
        layout: "zigzag" or "contiguous": how `shard` cut the sequence.
        rotation: "p2p", "allgather", "alltoall" (query heads divide over the ranks); on a mesh of
            two axes also "hierarchical", "hybrid" (query heads divide over the ranks of a node) and
            "hybrid_context_first" (over the nodes); "ring_flash_attn" (the package); or "auto":
            what the cost model predicts to be fastest, by a built-in table or by the `Calibration`
            given instead, which on two axes chooses among those for nodes too; with documents,
            of "p2p" and the hybrids, which send and attend to no more than documents reach.
        backend: of the attention: "cpu", "cudnn", "flash", "flash_attn", "fa4", "math", "auto".
        kernels: of the local stages: "triton", "torch" or "auto".
        scale: of the logits; D ** -0.5 by default.
        selection: what `select` returned for these sizes, in place of selecting here.
        score_q, score_k: [B, N / W, H, E], [B, N / W, Hk, E], scored in place of q and k: for
            models that normalise q and k, whose norms say little.
        valid: bool [B, N / W], false for padding, which is at the end of a sequence: real tokens
            then do not depend on what it holds. With the "norm" scorer.
        cu_seqlens: int32 [num_docs + 1], documents that are packed into the sequences: their first
            tokens, ascending from 0 to B N, in whole rows laid end to end, each of which begins
            one. The same on every rank; on the CPU, or on the device, from where it is copied once
            for all layers that are given this tensor. No token's value reaches another document;
            padding is a document, or several. At most topk / num_strata windows of pool_factor
            tokens of a stratum may hold a document's first token.
        timers: an `lhcp.Timers` to measure steps with; not used under torch.compile.
        debug: as in `lhcp.ring_attention`.

    Returns:
        [B, N / W, H, D] in the dtype of q, differentiable in q, k and v.

    Raises:
        TypeError, ValueError: shapes, dtypes, names or sizes that do not fit; raised before
            anything is sent.
        ImportError: an explicit backend's package is missing.
    """
    choices = Choices(layout, rotation, backend, kernels, scale, timers, debug)
    ranks = as_ranks(group, two_axes=by_name(rotation))
    documents = None
    if cu_seqlens is not None:
        documents = Bounds(cu_seqlens, q, ranks, layout, config).agreed(None, debug)
    given = Given(selection, score_q, score_k, valid, documents)
    return sparse_attention(QKV(q, k, v), config, ranks, choices, given)


def sparse_attention(
    qkv: QKV,
    config: LighthouseConfig,
    ranks: Ranks,
    choices: Choices,
    given: Given,
    layer: object = None,
) -> Tensor:
    """Attend as `lighthouse_attention`, which has the rules; `layer` is whose call it is."""
    q, k, v = qkv = QKV(*as_autocast(*qkv))
    call = Call("lighthouse", qkv, choices, (("config", config), *given.asked), layer)
    prepared = call.agreed(ranks, lambda: prepare(qkv, config, ranks, choices, given))
    geom, plan, kernels, score_q, score_k = prepared
    if geom.subsequence >= geom.num_tokens:
        warnings.warn(
            f"the sub-sequence has {geom.subsequence} entries for {geom.num_tokens} tokens a rank: "
            "this config shortens nothing; use a smaller topk or a longer sequence",
            stacklevel=3,
        )
    scorer, timers = SCORERS[config.scorer], choices.spans
    selection = None if given.selection is None else without_inference(given.selection)
    integers = pack_integers(geom)
    with torch.no_grad():
        unchanged = score_q is q and score_k is k
        on_the_way = selection is None and scorer.comes_with_pooling and unchanged
        with timers.span("pool", "compute", 0, q.device):
            *pooled, sq, sk = operators.pool_and_score(
                q, k, v, integers, on_the_way, kernels, given.positions
            )
        with timers.span("select", "compute", 0, q.device):
            if selection is None:
                if not on_the_way:
                    inputs = ScoreInputs(geom, config, kernels, plan.scale, given.positions)
                    sq, sk = scorer.score(QKV(score_q, score_k, v), inputs)
                picked = operators.select_entries(sq, sk, integers, kernels, given.positions)
                selection = Selection(*picked)
        del sq, sk
    with timers.span("gather", "compute", 0, q.device):
        sizes = (integers, kernels, given.positions)
        qs, ks, vs = GatherSubsequence.apply(q, k, v, *pooled, *selection, *sizes)
        packed = None
        if given.documents is not None:
            numbers = numbers_of(selection.entries, given.documents.numbers, geom)
            limits = entry_limits(given.documents.limits, geom)
            packed = PackedRows(keep(gather_numbers(numbers, ranks, plan.layout)), limits)
    # A quarter of the inputs' memory, not needed again: the gradient goes straight to the tokens.
    del pooled
    out, _ = carry_out(qs, ks, vs, plan, timers, packed)
    with timers.span("scatter", "compute", 0, q.device):
        back = ScatterPlan(integers, kernels, ranks, plan.layout)
        scattered: Tensor = ScatterBack.apply(out, *selection, back, timers, given.positions)
    call.look_at(scattered, ranks)
    return scattered


def prepare(
    qkv: QKV, config: LighthouseConfig, ranks: Ranks, choices: Choices, given: Given
) -> Prepared:
    """Check a call and make its plan; no communication.

    Raises:
        TypeError, ValueError, ImportError: see `lighthouse_attention`.
    """
    q, k, v = qkv
    check_qkv(q, k, v)
    geom = local_geometry(config, q.shape[1], ranks, choices.layout)
    packed = given.documents is not None
    plan = make_plan(q, k, ranks, choices, tokens=geom.subsequence, packed=packed)
    kernels = choose_kernels(choices.kernels, q.dtype, q.device)
    scores = scored_on(given, q, k, config)
    if given.selection is not None:
        check_selection(given.selection, k, geom)
    return Prepared(geom, plan, kernels, *scores)


def without_inference(selection: Selection) -> Selection:
    """Return a selection that autograd can keep, whatever mode it was made in."""
    return Selection(*(x.clone() if x.is_inference() else x for x in selection))


def check_selection(selection: Selection, k: Tensor, geom: Geometry) -> None:
    """Check that a selection was made for these sizes.

    Raises:
        ValueError: shapes, dtype or device do not fit.
    """
    wanted = {
        "entries": (k.shape[0], k.shape[2], geom.subsequence),
        "row_of_entry": (k.shape[0], k.shape[2], geom.pyramid_size),
    }
    for name, shape in wanted.items():
        x: Tensor = getattr(selection, name)
        if tuple(x.shape) != shape or x.dtype != torch.int32 or x.device != k.device:
            raise ValueError(
                f"selection.{name} is {shape_of(x)}: these inputs need {list(shape)} torch.int32 "
                f"on {k.device}; make it with lhcp.select on inputs of the same sizes and ranks"
            )
