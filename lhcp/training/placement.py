"""Where a rank is among those of a run: whose sequences it holds, which of their tokens, and how
the ranks of a sequence are laid out over nodes."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import lhcp
from lhcp.comm.layout import LayoutName
from lhcp.comm.mesh import Ranks, as_ranks
from lhcp.cost.calibration import Calibration
from lhcp.cost.tables import CALIBRATIONS, read_calibration
from lhcp.layer.choices import by_name
from lhcp.training.run import Run

OVER_NODES = ("node", "local")
"""The axes of a sequence whose ranks are on several nodes."""


@dataclass(frozen=True)
class Placement:
    """The sequences, and those of their tokens, that this rank holds."""

    device: torch.device
    dp_rank: int
    dp_size: int
    tp_size: int
    """The ranks that hold the same tokens, each for its heads."""
    ranks: Ranks
    """Those that share a sequence; of two axes where the rotation tells nodes apart."""
    rotation: str | Calibration
    """What the layers are told."""
    positions: torch.Tensor
    """int64 [n], global positions of this rank's tokens, on `device`."""
    layout: LayoutName
    restart_positions: bool
    """Whether RoPE's positions begin at 0 in each document."""

    def rope_positions(self, seqlen: int, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """Return the positions that RoPE turns by: int64 [n], or [B, n] where documents restart."""
        if cu_seqlens is None or not self.restart_positions:
            return self.positions
        return lhcp.positions(seqlen, self.ranks, self.layout, self.device, cu_seqlens)


def make_mesh(run: Run, rotation: str | Calibration, device: torch.device) -> DeviceMesh:
    """Lay the ranks out as dp x cp x tp: neighbours share a layer, and those next a sequence.

    cp is two axes, node x local, where the rotation tells nodes apart.

    Raises:
        ValueError: the run's rotation is for several nodes, and the ranks of a sequence are on one.
    """
    dp_size = dist.get_world_size() // (run.cp * run.tp)
    nodes = num_nodes(run, _started_together() // run.tp)
    axes = [("dp", dp_size), ("cp", run.cp), ("tp", run.tp)]
    if nodes > 1 and by_name(rotation):
        axes[1:2] = zip(OVER_NODES, (nodes, run.cp // nodes), strict=True)
    names, shape = zip(*axes, strict=True)
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def sequence_axes(mesh: DeviceMesh) -> tuple[str, ...]:
    """Return the axes of a run's mesh that share a sequence."""
    assert mesh.mesh_dim_names is not None
    return OVER_NODES if OVER_NODES[0] in mesh.mesh_dim_names else ("cp",)


def place(
    run: Run, rotation: str | Calibration, mesh: DeviceMesh, device: torch.device
) -> Placement:
    """Return what this rank of the run's mesh holds."""
    ranks = as_ranks(mesh[sequence_axes(mesh)]) if run.cp > 1 else Ranks()
    return Placement(
        device,
        dp_rank=mesh["dp"].get_local_rank(),
        dp_size=mesh["dp"].size(),
        tp_size=run.tp,
        ranks=ranks,
        rotation=rotation,
        positions=lhcp.positions(run.seqlen, ranks, layout=run.layout).to(device),
        layout=run.layout,
        restart_positions=run.data.restart_positions,
    )


def num_nodes(run: Run, started_together: int) -> int:
    """Return how many nodes the ranks of one sequence are on.

    Args:
        started_together: how many of those of a sequence the launcher started on each node.

    Raises:
        ValueError: the run's rotation is for several nodes, and there is one, or they have no equal
            numbers of these ranks.
    """
    nodes = run.nodes
    if not nodes:
        whole = run.cp > started_together and run.cp % started_together == 0
        nodes = run.cp // started_together if whole else 1
    if nodes == 1 and run.cp > 1 and isinstance(run.rotation, str) and by_name(run.rotation):
        raise ValueError(
            f"rotation={run.rotation!r}: is for sequences over several nodes, and the cp={run.cp} "
            f"ranks of one are on one of {started_together}, or do not fill whole nodes; take "
            "'auto' or 'p2p', or say with --nodes 2 that these ranks count as two"
        )
    return nodes


def chosen_rotation(run: Run, device: torch.device) -> str | Calibration:
    """Return the run's rotation, or the table that chooses it; a collective where one is read.

    Raises:
        ValueError, OSError: the calibration is none, or its file cannot be read; on every rank.
    """
    if not run.calibration:
        return run.rotation
    known = CALIBRATIONS.get(run.calibration)
    everyone = Ranks(dist.group.WORLD if dist.get_world_size() > 1 else None)
    table = known or read_calibration(run.calibration, everyone)
    return table.in_graphs() if wants_graphs(run, device) else table


def wants_graphs(run: Run, device: torch.device) -> bool:
    """Return whether the attention runs as CUDA graphs.

    Raises:
        ValueError: they are asked for where there is no GPU, or where each call is debugged.
    """
    if run.graphs == "on" and device.type != "cuda":
        raise ValueError(f"graphs='on': CUDA graphs need a GPU, and this run is on {device.type}")
    if run.graphs == "on" and run.debug:
        raise ValueError("graphs='on' with debug, which looks at each call: take 'auto' or 'off'")
    return run.graphs != "off" and device.type == "cuda" and not run.debug


def _started_together() -> int:
    """Return the ranks of a node that the launcher started; without one, all are on one node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def over_nodes(nodes: int, device: torch.device) -> Ranks:
    """Return all ranks, of two axes where they are on several nodes; a collective.

    Raises:
        ValueError: they do not divide over the nodes.
    """
    world_size = dist.get_world_size()
    if nodes < 1 or world_size % nodes:
        raise ValueError(f"nodes={nodes}: must divide the {world_size} ranks")
    if nodes == 1:
        return Ranks(dist.group.WORLD if world_size > 1 else None)
    shape = (nodes, world_size // nodes)
    return as_ranks(init_device_mesh(device.type, shape, mesh_dim_names=OVER_NODES))
