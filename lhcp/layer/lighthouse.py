"""`select` and `lighthouse_attention`: the local stages, then the ring, then scatter-back."""

import warnings
from collections.abc import Hashable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lhcp.checks import as_autocast, check_qk, check_qkv, check_scores, check_valid, shape_of
from lhcp.comm.layout import LayoutName, make_layout
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.config import LighthouseConfig
from lhcp.cost.calibration import Calibration
from lhcp.documents import Documents
from lhcp.layer.call import Call
from lhcp.layer.documents import Bounds
from lhcp.layer.plan import Choices, by_name, carry_out, choose_kernels, make_plan
from lhcp.layer.scatter_back import ScatterBack, ScatterPlan
from lhcp.lighthouse import operators
from lhcp.lighthouse.autograd import GatherSubsequence
from lhcp.lighthouse.documents import entry_limits, numbers_of
from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.score import SCORERS, ScoreInputs
from lhcp.lighthouse.select import Selection
from lhcp.operators import pack_integers
from lhcp.ring.documents import PackedRows, gather_numbers
from lhcp.ring.plan import RingPlan
from lhcp.timing import UNTIMED, Spans


class Given(NamedTuple):
    """What a caller brings in place of what the layer would compute."""

    selection: Selection | None = None
    score_q: Tensor | None = None
    score_k: Tensor | None = None
    valid: Tensor | None = None
    documents: Documents | None = None

    @property
    def asked(self) -> tuple[tuple[str, Hashable], ...]:
        """What ranks must agree on of it."""
        given = tuple(
            (f"{name} given", getattr(self, name) is not None)
            for name in ("selection", "documents")
        )
        scores = (getattr(x, "shape", None) for x in (self.score_q, self.score_k))
        return *given, *zip(("score_q", "score_k"), scores, strict=True)

    @property
    def positions(self) -> Tensor | None:
        """Of the tokens inside their documents."""
        return None if self.documents is None else self.documents.positions

    def flat(self) -> tuple[tuple[tuple[str, Hashable], ...], list[Tensor]]:
        """Return what is given: names, with what a graph is recorded for, and tensors.

        `from_flat` is the way back.
        """
        names: list[tuple[str, Hashable]] = []
        tensors: list[Tensor] = []
        for name, x in zip(self._fields, self, strict=True):
            if isinstance(x, Documents):
                names.append((name, tuple(x.limits.tolist())))
                tensors += x[:-1]
            elif x is not None:
                names.append((name, None))
                tensors += [x] if isinstance(x, Tensor) else x
        return tuple(names), tensors

    @classmethod
    def from_flat(cls, names: Sequence[tuple[str, Hashable]], tensors: Sequence[Tensor]) -> "Given":
        """Return what was given."""
        left = iter(tensors)
        found: dict[str, Any] = {}
        for name, limits in names:
            if name == "documents":
                found[name] = Documents(next(left), next(left), next(left), torch.tensor(limits))
            else:
                found[name] = Selection(*islice(left, 2)) if name == "selection" else next(left)
        return cls(**found)


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


def scored_on(
    given: Given, q: Tensor, k: Tensor, config: LighthouseConfig
) -> tuple[Tensor, Tensor]:
    """Return what to score in place of q and k: padding is zero, so that it is taken last.

    An entry's score is the largest of its tokens', so that padding changes no score of an entry
    that has a real token; a tie goes to the lower index, and padding is at the end.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit, or the scorer attends.
    """
    score_q, score_k = check_scores(given.score_q, given.score_k, q, k)
    if given.valid is None:
        return score_q, score_k
    check_valid(given.valid, q)
    if SCORERS[config.scorer].needs_values:
        raise ValueError(
            f"valid with scorer={config.scorer!r}: it scores what it attends to, which for padding "
            'is not zero; use scorer="norm", or sequences without padding'
        )
    real = given.valid[:, :, None, None]
    return score_q.detach().where(real, 0), score_k.detach().where(real, 0)


def local_geometry(
    config: LighthouseConfig, num_tokens: int, ranks: Ranks, layout: LayoutName
) -> Geometry:
    """Return this rank's geometry; every rule between sizes and ranks is checked here.

    Raises:
        ValueError: the sequence, the strata or the layout do not fit each other.
    """
    cut = make_layout(layout, ranks.world_size)
    return Geometry.local(config, num_tokens, ranks.world_size, cut.chunks_per_rank, ranks.rank)


def select(
    q: Tensor,
    k: Tensor,
    *,
    config: LighthouseConfig,
    group: Group | Ranks = None,
    layout: LayoutName = "zigzag",
    score_q: Tensor | None = None,
    score_k: Tensor | None = None,
    kernels: str = "auto",
    v: Tensor | None = None,
    scale: float | None = None,
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Selection:
    """Select this rank's entries, without communication: steps 1 to 4 of the method.

    The result does not depend on the number of ranks: a stratum's entries are the same bit for bit.
    Within its stratum, selection looks ahead: it may depend on later tokens (as in the paper).

    Args:
        q: [B, N / W, H, D], this rank's queries in layout order, RoPE applied.
        k: [B, N / W, Hk, D].
        config: the layer's sizes; N is the whole sequence.
        group, layout: as in `lighthouse_attention`.
        score_q, score_k: [B, N / W, H, E], [B, N / W, Hk, E], scored in place of q and k.
        kernels: "triton", "torch" or "auto".
        v, scale: values [B, N / W, Hk, D] and logit scale; the "dilated" scorer needs v.
        valid, cu_seqlens: as in `lighthouse_attention`.

    Returns:
        Selection, which carries no gradient.

    Raises:
        TypeError, ValueError: shapes, dtypes or sizes that do not fit, or v missing.
    """
    choices, ranks = Choices(layout, kernels=kernels, scale=scale), as_ranks(group)
    documents = None
    if cu_seqlens is not None:
        documents = Bounds(cu_seqlens, q, ranks, layout, config).local()
    given = Given(None, score_q, score_k, valid, documents)
    return scored_selection(q, k, v, config, ranks, choices, given).selection


class ScoredSelection(NamedTuple):
    """A selection, and the scores of levels 1 to L-1 that it was made by."""

    geometry: Geometry
    sq: Tensor
    """[B, Hk, pooled_size], wide, level 1 first; so is sk."""
    sk: Tensor
    selection: Selection
    positions: Tensor | None = None
    """[B, n] of the tokens inside their documents; None: no documents."""


def scored_selection(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    config: LighthouseConfig,
    ranks: Ranks,
    choices: Choices,
    given: Given,
) -> ScoredSelection:
    """Select as `select`, which has the rules; return the scores too."""
    if v is None:
        check_qk(q, k)
    else:
        check_qkv(q, k, v)
    geom = local_geometry(config, q.shape[1], ranks, choices.layout)
    score_q, score_k = scored_on(given, q, k, config)
    kernels = choose_kernels(choices.kernels, q.dtype, q.device)
    scorer = SCORERS[config.scorer]
    if scorer.needs_values and v is None:
        raise ValueError(f"scorer={config.scorer!r} attends with the values: pass v=")
    inputs = ScoreInputs(geom, config, kernels, choices.scale_of(q), given.positions)
    with torch.no_grad():
        sq, sk = scorer.score(QKV(score_q, score_k, k if v is None else v), inputs)
        picked = operators.select_entries(sq, sk, pack_integers(geom), kernels, given.positions)
        return ScoredSelection(geom, sq, sk, Selection(*picked), given.positions)


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
            given instead, which on two axes chooses among those for nodes too.
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

    Returns:
        [B, N / W, H, D] in the dtype of q, differentiable in q, k and v.

    Raises:
        TypeError, ValueError: shapes, dtypes, names or sizes that do not fit; raised before
            anything is sent.
        ImportError: an explicit backend's package is missing.
    """
    choices = Choices(layout, rotation, backend, kernels, scale, timers)
    ranks = as_ranks(group, two_axes=by_name(rotation))
    documents = None
    if cu_seqlens is not None:
        documents = Bounds(cu_seqlens, q, ranks, layout, config).agreed(None)
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
            packed = PackedRows(gather_numbers(numbers, ranks, plan.layout), limits)
    # A quarter of the inputs' memory, not needed again: the gradient goes straight to the tokens.
    del pooled
    out, _ = carry_out(qs, ks, vs, plan, timers, packed)
    with timers.span("scatter", "compute", 0, q.device):
        back = ScatterPlan(integers, kernels, ranks, plan.layout)
        scattered: Tensor = ScatterBack.apply(out, *selection, back, timers, given.positions)
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
