"""Groups of ranks: what a user passes as `group`, turned into the process groups that lhcp uses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh | None


@dataclass(frozen=True)
class Ranks:
    """The context-parallel ranks, seen from this one. Ranks count inside the group."""

    flat: dist.ProcessGroup | None = None
    """All ranks; None for one rank without a group."""
    outer: dist.ProcessGroup | None = None
    """The ranks in this one's place on every node; only from a mesh of two axes."""
    inner: dist.ProcessGroup | None = None
    """The ranks of this node; only from a mesh of two axes."""

    @property
    def rank(self) -> int:
        return 0 if self.flat is None else self.flat.rank()

    @property
    def world_size(self) -> int:
        return 1 if self.flat is None else self.flat.size()

    @property
    def names(self) -> tuple[str, str, str]:
        """The groups' names, from which `from_names` makes an equal object; "" for None."""
        flat, outer, inner = (
            "" if g is None else str(g.group_name) for g in (self.flat, self.outer, self.inner)
        )
        return flat, outer, inner

    @classmethod
    def from_names(cls, names: tuple[str, str, str]) -> "Ranks":
        resolve: Callable[[Any], dist.ProcessGroup] = dist.distributed_c10d._resolve_process_group
        return cls(*(resolve(name) if name else None for name in names))


def as_ranks(group: Group | Ranks) -> Ranks:
    """Turn what a user passes as `group` into `Ranks`.

    Args:
        group: a ProcessGroup; a DeviceMesh of one axis, or of two with the outer axis across nodes;
            or None for one rank.

    Raises:
        TypeError: anything else.
        ValueError: a mesh of more than two axes, or a group that this rank is not in.
    """
    if isinstance(group, Ranks):
        return group
    if group is None:
        return Ranks()
    if isinstance(group, DeviceMesh):
        if group.ndim == 1:
            return Ranks(group.get_group())
        if group.ndim == 2:
            # Row-major: flat rank = outer * inner size + inner, which the rotations rely on.
            return Ranks(group._flatten().get_group(), group.get_group(0), group.get_group(1))
        raise ValueError(
            f"group is a DeviceMesh of {group.ndim} axes {group.mesh_dim_names}: pass one axis, "
            'for example mesh["cp"], or two, outer across nodes'
        )
    if isinstance(group, dist.ProcessGroup):
        if group.rank() < 0:
            raise ValueError("group: this process is not one of the group's ranks")
        return Ranks(group)
    raise TypeError(
        f"group must be a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}"
    )
