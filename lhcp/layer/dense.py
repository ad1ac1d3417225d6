"""`ring_attention`: exact dense attention over a sharded sequence."""

from typing import Literal, TypedDict, Unpack, overload

from torch import Tensor

from lhcp.checks import as_autocast, check_qkv
from lhcp.comm.layout import LayoutName
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.cost.calibration import Calibration
from lhcp.documents import Documents
from lhcp.layer.call import Call
from lhcp.layer.choices import Choices, by_name
from lhcp.layer.documents import Bounds
from lhcp.layer.plan import carry_out, make_plan
from lhcp.ring.documents import PackedRows
from lhcp.ring.plan import RingPlan
from lhcp.ring.shape import Mask
from lhcp.timing import UNTIMED, Spans


class RingOptions(TypedDict, total=False):
    """The keyword arguments of `ring_attention` that do not change the type of its result."""

    group: Group | Ranks
    layout: LayoutName
    rotation: str | Calibration
    backend: str
    causal: bool
    scale: float | None
    cu_seqlens: Tensor | None
    timers: Spans
    debug: bool


@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[RingOptions]
) -> tuple[Tensor, Tensor]: ...


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[RingOptions],
) -> Tensor: ...


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group | Ranks = None,
    layout: LayoutName = "zigzag",
    rotation: str | Calibration = "auto",
    backend: str = "auto",
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens: Tensor | None = None,
    timers: Spans = UNTIMED,
    debug: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend densely and exactly over a sequence that is sharded over ranks (arXiv 2310.01889).

    Args:
        q: [B, N / W, H, D], this rank's queries in layout order.
        k, v: [B, N / W, Hk, D], the dtype of q; H a multiple of Hk. kv heads travel unrepeated.
        group: ProcessGroup, DeviceMesh of one axis (or two, outer across nodes), or None for one
            rank. Every rank must call with equal shapes and choices.
        layout: "zigzag" or "contiguous": how `shard` cut the sequence.
        rotation: "p2p", "allgather", "alltoall" (query heads divide over the ranks); on a mesh of
            two axes also "hierarchical", "hybrid" (query heads divide over the ranks of a node) and
            "hybrid_context_first" (over the nodes); "ring_flash_attn" (the package); or "auto":
            what the cost model predicts to be fastest, by a built-in table or by the `Calibration`
            given instead, which on two axes chooses among those for nodes too; with documents,
            of "p2p" and the hybrids, which send and attend to no more than documents reach.
        backend: "cpu", "cudnn", "flash" (torch's operators), "flash_attn", "fa4" (packages),
            "math", or "auto".
        causal: mask keys after the query's global position.
        scale: of the logits; D ** -0.5 by default.
        return_lse: return the log-sum-exp as well.
        cu_seqlens: documents that the whole batch is packed of, inside which alone is attended:
            int32 [num_docs + 1], ascending from 0 to B N, rows one after another, each row
            beginning a document. On the CPU; or on the device, from where it is copied once for as
            long as this tensor lives. The same on every rank.
        timers: an `lhcp.Timers` to measure steps with; not used under torch.compile.
        debug: on all ranks: compare every call with the others', its number too, before its first
            message, and check that q, k, v and the output are finite. What differs, or is not, is a
            ValueError on all ranks at that call. It costs each call two meetings of the ranks'
            hosts through the group's store (three with documents) and four waits for the device.
            Backwards are not looked at; nor are graphs of torch.compile or of CUDA as they run,
            but as they are made, which a warning says.

    Returns:
        out [B, N / W, H, D] in the dtype of q; with return_lse also lse [B, H, N / W], natural log,
        float32 (float64 for float64 inputs), which carries no gradient.

    Raises:
        TypeError, ValueError: shapes, dtypes, names or sizes that do not fit; raised before
            anything is sent.
        ImportError: an explicit backend's package is missing.
    """
    choices = Choices(layout, rotation, backend, scale=scale, timers=timers, debug=debug)
    ranks = as_ranks(group, two_axes=by_name(rotation))
    documents = None
    if cu_seqlens is not None:
        documents = Bounds(cu_seqlens, q, ranks, layout).agreed(None, debug)
    out, lse = dense_attention(
        (q, k, v), ranks, choices, Mask(causal), documents, with_lse=return_lse
    )
    return out if lse is None or not return_lse else (out, lse)


def dense_attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    ranks: Ranks,
    choices: Choices,
    mask: Mask,
    documents: Documents | None = None,
    layer: object = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend as `ring_attention`, which has the rules; return (out, lse). `layer`: whose call.

    Without `with_lse`, lse may be None.
    """
    q, k, v = qkv = as_autocast(*qkv)

    def prepare() -> RingPlan:
        check_qkv(q, k, v)
        plan = make_plan(q, k, ranks, choices, mask, packed=documents is not None)
        plan.layout.check_seqlen(plan.shape.seqlen)
        return plan

    more = (("mask", mask), ("documents given", documents is not None), ("lse", with_lse))
    call = Call("dense", qkv, choices, more, layer)
    plan = call.agreed(ranks, prepare)
    packed = None
    if documents is not None:
        packed = PackedRows(documents.whole, documents.limits)
    out, lse = carry_out(q, k, v, plan, choices.spans, packed, with_lse)
    call.look_at(out, ranks)
    return out, lse
