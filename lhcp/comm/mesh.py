"""Groups of ranks: what a user passes as `group`, turned into the process groups that lhcp uses."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lhcp.comm.layout import Layout, make_layout
from lhcp.comm.torch_private import flat_group, resolve_group
from lhcp.operators import pack_words, unpack_words

Group = dist.ProcessGroup | DeviceMesh | None

Allocate = Callable[[Tensor, tuple[int, ...]], Tensor]
"""(like, shape) -> memory of the dtype and device of `like`."""


def new_memory(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return memory that holds whatever it happens to hold."""
    return like.new_empty(shape)


@dataclass(frozen=True)
class Ranks:
    """The context-parallel ranks, seen from this one. Ranks count inside the group."""

    flat: dist.ProcessGroup | None = None
    """All ranks; None for one rank without a group."""
    outer: dist.ProcessGroup | None = None
    """The ranks with this one's index on every node; only from a mesh of two axes."""
    inner: dist.ProcessGroup | None = None
    """The ranks of this node; only from a mesh of two axes."""
    allocate: Allocate = field(default=new_memory, compare=False, repr=False)
    """Where messages arrive. Measurements whose groups send nothing put random numbers there; what
    is given spans of its own then, since such ranks do not go through operators."""

    def receive_buffer(self, like: Tensor, *shape: int) -> Tensor:
        """Return memory for a message that arrives, of the dtype and device of `like`."""
        return self.allocate(like, shape)

    @property
    def rank(self) -> int:
        """This rank, counted inside the group."""
        return 0 if self.flat is None else self.flat.rank()

    @property
    def world_size(self) -> int:
        """W, the number of ranks."""
        return 1 if self.flat is None else self.flat.size()

    @property
    def node_size(self) -> int | None:
        """Ranks of one node; None where the mesh says nothing of nodes."""
        return None if self.inner is None else self.inner.size()

    @property
    def names(self) -> tuple[str, str, str]:
        """The groups' names, from which `from_names` makes equal ranks; "" for None."""
        flat, outer, inner = (
            "" if g is None else str(g.group_name) for g in (self.flat, self.outer, self.inner)
        )
        return flat, outer, inner

    def __deepcopy__(self, memo: object) -> "Ranks":
        """Return these ranks: groups are of the process, and a copy of a layer shares them."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the groups' names, for a process that has the same groups."""
        if self.flat is None:
            return Ranks, ()
        return _restored, (self.names, dist.get_process_group_ranks(self.flat))

    @classmethod
    def from_names(cls, names: tuple[str, str, str]) -> "Ranks":
        """Return the ranks of the groups that are called so; "" is no group."""
        flat, outer, inner = (resolve_group(name) if name else None for name in names)
        return cls(flat, outer, inner)


def _restored(names: tuple[str, str, str], members: list[int]) -> Ranks:
    """Return the ranks that were pickled, in a process that has their groups.

    Raises:
        RuntimeError: it has not.
    """
    try:
        ranks = Ranks.from_names(names)
    except (RuntimeError, ValueError, LookupError) as error:
        raise RuntimeError(_cannot_restore(members)) from error
    assert ranks.flat is not None
    if dist.get_process_group_ranks(ranks.flat) != members:
        raise RuntimeError(_cannot_restore(members))
    return ranks


def _cannot_restore(members: list[int]) -> str:
    return (
        f"what is loaded has a process group of the ranks {members}, which is not in this process: "
        "make the layer with group= here, and load a state_dict instead of a whole module"
    )


def traced() -> str:
    """Return a word for an operator: whether it is traced into a graph, or ""."""
    return "traced" if torch.compiler.is_compiling() else ""


def pack_cut(ranks: Ranks, layout: Layout, *more: str) -> str:
    """Return ranks, layout and more names as one argument of an operator."""
    # Ranks are made anew inside the operator, with memory of its own.
    assert ranks.allocate is new_memory, "ranks with other receive buffers enter no operator"
    return pack_words([*ranks.names, layout.name, *more])


def unpack_cut(argument: str) -> tuple[Ranks, Layout, list[str]]:
    """Return the ranks, the layout and the other names that `pack_cut` packed."""
    flat, outer, inner, name, *more = unpack_words(argument)
    ranks = Ranks.from_names((flat, outer, inner))
    return ranks, make_layout(name, ranks.world_size), more


def as_ranks(group: Group | Ranks, *, two_axes: bool = True) -> Ranks:
    """Turn what a user passes as `group` into `Ranks`.

    Args:
        group: a ProcessGroup; a DeviceMesh of one axis, or of two with the outer axis across nodes;
            or None for one rank.
        two_axes: whether a mesh of two axes was asked for by name; without, it is more likely a
            mesh of which one axis is meant.

    Raises:
        TypeError: anything else.
        ValueError: a mesh of more than two axes, a mesh of two that has no names for them or whose
            ranks do not ascend, or a group or mesh that this rank is not in; None in a process that
            a launcher started beside others and that has not joined them.
    """
    if isinstance(group, Ranks):
        return group
    if group is None:
        if not dist.is_initialized():
            _check_alone()
        return Ranks()
    if isinstance(group, DeviceMesh):
        if group.ndim == 1:
            if group.get_coordinate() is None:
                raise ValueError(_not_a_member(f"the mesh {group.mesh.tolist()}"))
            return Ranks(group.get_group())
        if group.ndim == 2:
            if group.mesh_dim_names is None:
                raise ValueError(
                    "group is a DeviceMesh of two axes without names: give it some, for example "
                    'mesh_dim_names=("node", "local")'
                )
            if not two_axes:
                raise ValueError(
                    f"group is a DeviceMesh of two axes {group.mesh_dim_names}, over all of which "
                    "it would attend: pass the axis that shares a sequence, for example "
                    f'mesh["{group.mesh_dim_names[1]}"]; two axes, the outer across nodes, are for '
                    "rotation='hierarchical', 'hybrid' or 'hybrid_context_first', or for a table"
                )
            _check_order(group)
            flat = flat_group(group)
            if flat is None:
                raise ValueError(_not_a_member(f"the mesh {group.mesh.tolist()}"))
            return Ranks(flat, group.get_group(0), group.get_group(1))
        raise ValueError(
            f"group is a DeviceMesh of {group.ndim} axes {group.mesh_dim_names}: pass one axis, "
            'for example mesh["cp"], or two, outer across nodes'
        )
    # What torch hands to a process that is not in a new group is no ProcessGroup.
    nobody: object = dist.GroupMember.NON_GROUP_MEMBER
    if group is nobody:
        raise ValueError(_not_a_member("a process group"))
    if isinstance(group, dist.ProcessGroup):
        if group.rank() < 0:
            raise ValueError(_not_a_member("a process group"))
        return Ranks(group)
    raise TypeError(
        f"group must be a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}"
    )


def _check_alone() -> None:
    """Check that a process without a process group was started as the only one.

    Before init_process_group, dist.group.WORLD is None, which means one rank here.

    Raises:
        ValueError: a launcher started others beside it.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if started.isdecimal() and int(started) > 1:
        raise ValueError(
            f"group is None, and this process is one of {started} (WORLD_SIZE) that have not "
            "joined: call torch.distributed.init_process_group first, before which "
            "dist.group.WORLD is None; then None means that each rank holds whole sequences"
        )


def _not_a_member(what: str) -> str:
    return (
        f"group is {what} that this process is not in (global rank {dist.get_rank()}): on each "
        "rank pass the group or the mesh that it belongs to"
    )


def _check_order(mesh: DeviceMesh) -> None:
    """Check that a mesh of two axes counts its ranks as the group of all of them does.

    torch sorts a group's ranks, so that flat rank = outer * inner size + inner, on which layouts
    and rotations rely, holds only where the mesh ascends row by row.

    Raises:
        ValueError: it does not.
    """
    rows = mesh.mesh.tolist()
    ranks = [rank for row in rows for rank in row]
    if ranks != sorted(ranks):
        size = len(rows[0])
        fits = [sorted(ranks)[i : i + size] for i in range(0, len(ranks), size)]
        raise ValueError(
            f"group is the mesh {rows}: the ranks of two axes must ascend row by row, as torch "
            f"orders those of a group, for example {fits}; start the ranks of a node one after "
            "another, or pass one axis, or a group of all ranks"
        )
