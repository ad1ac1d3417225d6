"""Are positions those of this rank's tokens? What stacks ask that hand them to their models."""

from torch import Tensor

from lhcp.context.context_parallel import ContextParallel


def first_wrong(positions: Tensor, cp: ContextParallel) -> str | None:
    """Return in words where positions are not the global ones of this rank's tokens; None: nowhere.

    Waits for the device.

    Args:
        positions: integers [1 or B, N / W].
        cp: the ranks and their layout.
    """
    expected = cp.positions(positions.shape[1] * cp.world_size, positions.device)
    wrong = (positions != expected).any(0).nonzero()
    if not len(wrong):
        return None
    at = int(wrong[0])
    return (
        f"this rank's token {at} has position {positions[:, at].tolist()}, and rank {cp.rank} of "
        f"{cp.world_size} holds {int(expected[at])} there, {cp.layout}"
    )
