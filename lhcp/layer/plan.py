"""Every choice that is left to lhcp: the one file that resolves "auto".

Choices depend on static sizes, ranks, layout, dtype, whether there are documents, the device and
its compute capability, the installed packages and torch's deterministic switch alone, so that ranks
with equal inputs never differ; an explicit name is never replaced.
"""

import logging
from collections.abc import Sequence
from functools import cache
from operator import index

import torch
from torch import Tensor

from lhcp.comm.layout import LayoutName, make_layout
from lhcp.comm.mesh import Ranks
from lhcp.cost.calibration import Calibration
from lhcp.cost.choose import CANDIDATES, FOLLOW_DOCUMENTS, choose
from lhcp.cost.tables import built_in
from lhcp.layer.choices import PACKAGE_RINGS, Choices, check_name, rotation_names
from lhcp.lighthouse.kernel_sets import KERNELS
from lhcp.operators import HAS_TRITON
from lhcp.ring import rotation as rotations
from lhcp.ring.attention import attention
from lhcp.ring.block import BLOCKS
from lhcp.ring.block.base import Block, Request
from lhcp.ring.documents import PackedRows
from lhcp.ring.plan import RingPlan
from lhcp.ring.shape import CAUSAL, AttentionShape, Mask
from lhcp.timing import Spans

_log = logging.getLogger("lhcp")


def make_plan(
    q: Tensor,
    k: Tensor,
    ranks: Ranks,
    choices: Choices,
    mask: Mask = CAUSAL,
    tokens: int | None = None,
    packed: bool = False,
) -> RingPlan:
    """Resolve every "auto" of an attention and check every name; no communication.

    Args:
        q: [B, n, H, D]; k: [B, n, Hk, D]; only their sizes, dtype and device are read.
        tokens: of this rank that attention runs on, such as entries of the sub-sequence; None: n.
        packed: whether rows are packed of documents.

    Raises:
        ValueError, ImportError: see `lhcp.ring_attention`.
    """
    layout = make_layout(choices.layout, ranks.world_size)
    batch, own, num_heads, head_dim = q.shape
    shape = AttentionShape(
        seqlen=(own if tokens is None else tokens) * ranks.world_size,
        layout=layout,
        num_heads=num_heads,
        num_kv_heads=k.shape[2],
        head_dim=head_dim,
        batch=batch,
        element_bytes=q.element_size(),
        mask=mask,
        node_size=ranks.node_size,
    )
    name = _rotation(shape, choices.rotation, q.device, packed)
    check_rotation(name, ranks, shape.num_heads)
    if (package := PACKAGE_RINGS.get(name)) is not None:
        package.check(_request(q.dtype, q.shape[3], q.device, packed), layout, mask)
    block = choose_backend(choices.backend, q.dtype, q.shape[3], q.device, packed)
    return RingPlan(ranks, shape, name, block.name, choices.scale_of(q))


def carry_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: RingPlan,
    timers: Spans,
    packed: PackedRows | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend as the plan says, in the ring or in another package's: see `ring.attention`."""
    package = PACKAGE_RINGS.get(plan.rotation)
    if package is not None and plan.ranks.world_size > 1:
        return package.attend(q, k, v, plan)
    return attention(q, k, v, plan, timers, packed, with_lse)


def check_rotation(name: str, ranks: Ranks, num_heads: int) -> None:
    """Check that a rotation called so exists and can serve these ranks and heads.

    Raises:
        ValueError: it does not, or cannot.
    """
    check_name("rotation", name, rotation_names())
    if (reason := rotations.refuses(name, ranks, num_heads)) is not None:
        raise ValueError(f"rotation={name!r}: {reason}")


def _rotation(
    shape: AttentionShape, rotation: str | Calibration, device: torch.device, packed: bool
) -> str:
    if isinstance(rotation, str) and rotation != "auto":
        return rotation
    if shape.world_size == 1:
        return "p2p"
    table = None if isinstance(rotation, str) else rotation.text
    # The choice depends on the length: index makes a symbolic one a number, for this graph alone.
    sizes = tuple(index(value) for value in shape.pack())
    layout, world_size = shape.layout.name, shape.world_size
    return fastest_rotation(layout, world_size, sizes, device.type, table, packed)


def fastest_rotation(
    layout: LayoutName,
    world_size: int,
    shape: tuple[int, ...],
    device: str,
    table: str | None,
    packed: bool = False,
) -> str:
    """Return the rotation that is predicted to be the fastest, and log it once.

    Plain arguments, since torch.compile calls it while it traces and keeps the answer.

    Args:
        shape: the packed shape. device: the type of device.
        table: a `Calibration` as text; None for the built-in one of the device.
        packed: whether there are documents. Other ones come every step, and the choice must not
            change with them: it is among the rotations that follow them, by their times without.
    """
    calibration = built_in(device) if table is None else _from_text(table)
    attention = AttentionShape.unpack(make_layout(layout, world_size), shape)
    return _fastest(attention, calibration, FOLLOW_DOCUMENTS if packed else CANDIDATES)


# What torch.compiler.assume_constant_result does, which imports the compiler, and Triton with it.
fastest_rotation._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _from_text(text: str) -> Calibration:
    return Calibration.from_text(text, "the table given as rotation")


@cache
def _fastest(shape: AttentionShape, calibration: Calibration, among: tuple[str, ...]) -> str:
    rotation, reason = choose(shape, calibration, among)
    message = "rotation %r for %d ranks, %d tokens: %s"
    _log.info(message, rotation, shape.world_size, shape.seqlen, reason)
    return rotation


def choose_backend(
    name: str, dtype: torch.dtype, head_dim: int, device: torch.device, packed: bool = False
) -> Block:
    """Return the backend called `name`, or for "auto" the preferred one of those that can.

    Args:
        packed: whether rows are packed of documents.

    Raises:
        ValueError: no backend has this name, or it cannot do these inputs (the message names
            those that can).
        ImportError: the backend's package is missing or not understood.
    """
    asked = _request(dtype, head_dim, device, packed)
    if name == "auto":
        able = _able(asked)
        name = _preferred(able).name if able else "math"
        if able and not torch.compiler.is_compiling():
            _announce(name, asked)
    check_name("backend", name, tuple(BLOCKS))
    block = BLOCKS[name]
    if block.missing is not None:
        raise ImportError(f"backend={name!r}: {block.missing}")
    if (reason := block.refuses(asked)) is not None:
        names = ", ".join(b.name for b in _able(asked))
        raise ValueError(f"backend={name!r}: {reason}; backends that can: {names}")
    return block


def able_backends(dtype: torch.dtype, head_dim: int, device: torch.device) -> list[Block]:
    """Return the backends that are there and can do such inputs, in the order of the table."""
    return _able(_request(dtype, head_dim, device))


def why_not(dtype: torch.dtype, head_dim: int, device: torch.device) -> dict[str, str | None]:
    """Return of each backend, in the order of the table, why it cannot do such inputs, or None."""
    asked = _request(dtype, head_dim, device)
    return {name: block.missing or block.refuses(asked) for name, block in BLOCKS.items()}


def _able(asked: Request) -> list[Block]:
    return [b for b in BLOCKS.values() if b.missing is None and b.refuses(asked) is None]


def _preferred(blocks: Sequence[Block]) -> Block:
    # A loop, because torch.compile traces it and knows no key of min.
    best = blocks[0]
    for block in blocks[1:]:
        if block.preference < best.preference:
            best = block
    return best


def _request(
    dtype: torch.dtype, head_dim: int, device: torch.device, packed: bool = False
) -> Request:
    capability = _capability(device.type, device.index)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Request(dtype, head_dim, device.type, capability, deterministic, packed)


def _capability(kind: str, index: int | None) -> tuple[int, int] | None:
    """Return the compute capability of a CUDA device that is there, else None."""
    return _capability_of(index) if kind == "cuda" else None


_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _capability_of(index: int | None) -> tuple[int, int] | None:
    # Asked for once: looking for a GPU takes the host as long as a launch.
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


@cache
def _announce(name: str, asked: Request) -> None:
    message = "attention backend %r: the preferred of those that can do %s, head_dim %d on %s%s"
    packed = ", packed documents" if asked.documents else ""
    _log.info(message, name, str(asked.dtype), asked.head_dim, asked.device, packed)


def choose_kernels(kernels: str, dtype: torch.dtype, device: torch.device) -> str:
    """Return the kernels of the local stages: "auto" is Triton's wherever they can run.

    Raises:
        ValueError: no implementation has this name, or it cannot do these inputs.
        ImportError: Triton is not installed.
    """
    if kernels == "auto":
        fits = device.type == "cuda" and dtype != torch.float64
        return "triton" if fits and HAS_TRITON else "torch"
    check_name("kernels", kernels, KERNELS)
    if kernels == "triton" and not HAS_TRITON:
        raise ImportError("kernels='triton': Triton is missing; pip install 'lhcp[triton]'")
    if kernels == "triton" and dtype == torch.float64:
        raise ValueError("kernels='triton': inputs are float64; use kernels='torch'")
    return kernels
