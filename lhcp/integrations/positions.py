"""Are positions those of this rank's tokens? What stacks ask that hand them to their models."""

from torch import Tensor

from lhcp.context.context_parallel import ContextParallel


def first_wrong(
    positions: Tensor, cp: ContextParallel, cu_seqlens: Tensor | None = None
) -> str | None:
    """Return in words where positions are not those of this rank's tokens; None: nowhere.

    Waits for the device.

    Args:
        positions: integers [1 or B, N / W].
        cp: the ranks and their layout.
        cu_seqlens: documents in each of which positions begin at 0; None: they are global.
    """
    seqlen = positions.shape[1] * cp.world_size
    expected = cp.positions(seqlen, positions.device, cu_seqlens)
    if expected.ndim == 2 and len(positions) not in (1, len(expected)):
        return f"they are of {len(positions)} rows, and the documents of {len(expected)}"
    wrong = (positions != expected).any(0).nonzero()
    if not len(wrong):
        return None
    at = int(wrong[0])
    return (
        f"this rank's token {at} has position {positions[:, at].tolist()}, and rank {cp.rank} of "
        f"{cp.world_size} holds {expected[..., at].tolist()} there, {cp.layout}"
    )
