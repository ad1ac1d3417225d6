"""What a user may choose about how an attention is carried out, and the names that there are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lhcp.checks import check_scale
from lhcp.comm.layout import Layout, LayoutName, make_layout
from lhcp.cost.calibration import Calibration
from lhcp.lighthouse.kernel_sets import KERNELS
from lhcp.ring import rotation as rotations
from lhcp.ring.block import BLOCKS
from lhcp.ring.block.base import Request
from lhcp.ring.heads import TWO_AXES
from lhcp.ring.plan import RingPlan
from lhcp.ring.shape import Mask
from lhcp.timing import UNTIMED, Spans


@dataclass(frozen=True)
class PackageRing:
    """A whole ring of another package, which is taken by name only."""

    check: Callable[[Request, Layout, Mask], None]
    """(asked, layout, mask): raises ValueError or ImportError where the package cannot."""
    attend: Callable[[Tensor, Tensor, Tensor, RingPlan], tuple[Tensor, Tensor]]
    """(q, k, v, plan) -> (out, lse), as `lhcp.ring.attention`."""


PACKAGE_RINGS: dict[str, PackageRing] = {}
"""By the name of the rotation. `lhcp/__init__.py` fills it: integrations are above this room."""


@dataclass(frozen=True)
class Choices:
    """What a user may choose about how an attention is carried out, and may leave to lhcp."""

    layout: LayoutName = "zigzag"
    rotation: str | Calibration = "auto"
    """A name of `lhcp.ring.rotation` or of `PACKAGE_RINGS`, "auto", or a table by which the fastest
    is taken."""
    backend: str = "auto"
    """A name of `lhcp.ring.block.BLOCKS`, or "auto"."""
    kernels: str = "auto"
    """A name of `lhcp.lighthouse.kernel_sets.KERNELS`, or "auto"."""
    scale: float | None = None
    """Factor of the logits; None: D ** -0.5."""
    timers: Spans | None = None
    """What measures; None: nothing. No object, since torch 2.11 traces none that is a default."""
    debug: bool = False
    """Whether ranks compare every call, and look through its tensors for what is not finite."""

    @property
    def spans(self) -> Spans:
        """What names, or measures, the stages."""
        return UNTIMED if self.timers is None else self.timers

    def scale_of(self, q: Tensor) -> float:
        """Return the factor of the logits for q [B, n, H, D]."""
        check_scale(self.scale)
        return q.shape[3] ** -0.5 if self.scale is None else self.scale


def by_name(rotation: str | Calibration) -> bool:
    """Return whether a rotation is one for a mesh of two axes, or a table that may take it."""
    return not isinstance(rotation, str) or rotation in TWO_AXES


def rotation_names() -> tuple[str, ...]:
    """Return the names of all rotations, other packages' rings among them."""
    return (*rotations.names(), *PACKAGE_RINGS)


def check_names(choices: Choices) -> None:
    """Check that every choice is one that there is, before anything is known of tensors.

    Raises:
        ValueError: one is not; the message has those that are.
    """
    make_layout(choices.layout, 1)
    if isinstance(choices.rotation, str):
        check_name("rotation", choices.rotation, rotation_names())
    check_name("backend", choices.backend, tuple(BLOCKS))
    check_name("kernels", choices.kernels, KERNELS)


def check_name(what: str, name: str, names: Sequence[str]) -> None:
    """Check that a name is "auto" or one of those that there are.

    Raises:
        ValueError: it is not; the message has those that are.
    """
    if name != "auto" and name not in names:
        raise ValueError(f"{what}={name!r}: must be one of auto, {', '.join(names)}")
