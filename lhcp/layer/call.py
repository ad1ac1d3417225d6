"""`Call`: what one call of an attention asks for, and that all ranks ask for the same."""

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lhcp.checks import check_finite
from lhcp.comm.agreement import agreed, agreed_each_time, compared
from lhcp.comm.mesh import Ranks
from lhcp.comm.torch_private import resolve_group
from lhcp.comm.trail import Fields
from lhcp.config import LighthouseConfig
from lhcp.cost.calibration import Calibration
from lhcp.layer.choices import Choices

CONFIG_FIELDS = tuple(field.name for field in dataclass_fields(LighthouseConfig))


class Prepared(Protocol):
    """What is made of a call before anything is sent."""

    @property
    def chosen(self) -> Fields:
        """What "auto" became."""


P = TypeVar("P", bound=Prepared)


def agree_while_tracing(group: str, *said: str | int | float | None) -> None:
    """Compare, with the other ranks of a group, what a graph is traced for.

    Plain arguments, since torch.compile calls it while it traces: once for each graph.

    Args:
        group: name of the process group.
        said: names and values, in turn.

    Raises:
        ValueError: as `lhcp.comm.comparison.compare`.
    """
    values = zip(said[::2], said[1::2], strict=True)
    fields = {str(name): str(value) for name, value in values}
    ranks, key = Ranks(resolve_group(group)), ("traced", said)
    # A rank may trace again where another need not, so nobody counts it.
    agreed(ranks, key, lambda: None, lambda _: fields, counted=False)


# What torch.compiler.assume_constant_result does, which imports the compiler, and Triton with it.
agree_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def warn_of_a_graph() -> None:
    """Warn that a call that is to be debugged becomes part of a graph."""
    warnings.warn(
        "debug=True: this call becomes part of a graph, of torch.compile or of CUDA. Ranks compare "
        "what it is made for; its runs are neither compared nor looked through: debug without it",
        stacklevel=3,
    )


warn_of_a_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Call:
    """One call, as its caller made it: nothing is checked yet."""

    mode: str
    """"lighthouse" or "dense"."""
    qkv: tuple[Any, ...]
    choices: Choices
    more: tuple[tuple[str, Hashable], ...]
    """What else ranks must agree on: names, and records or numbers."""
    layer: object = None
    """Whose call it is: of each layer the first is new, for it may be the one that is wrong."""

    def agreed(self, ranks: Ranks, prepare: Callable[[], P]) -> P:
        """Return what `prepare` makes of the call, when all ranks make the same one.

        Raises:
            TypeError, ValueError, ImportError: as `lhcp.comm.agreement.agreed`.
        """
        if torch.compiler.is_compiling():
            prepared = prepare()
            if self.choices.debug:
                warn_of_a_graph()
            if ranks.world_size > 1:
                agree_while_tracing(ranks.names[0], *self.constants(prepared))
            return prepared
        if not self.debugged:
            return agreed(ranks, self.key, prepare, self.fields)

        def look() -> P:
            prepared = prepare()
            for name, x in zip("qkv", self.qkv, strict=True):
                check_finite(name, x, _whose(ranks))
            return prepared

        return agreed_each_time(ranks, self.key, look, self.fields, self.layer)

    def look_at(self, out: Tensor, ranks: Ranks) -> None:
        """Check, where the call is debugged, that its output is finite on every rank.

        Raises:
            ValueError: it is not, on all ranks.
        """
        if self.debugged:
            said = {"output": f"of a {self.mode} call"}
            compared(ranks, lambda: check_finite("the output", out, _whose(ranks)), lambda _: said)

    @property
    def debugged(self) -> bool:
        """Whether it is compared, and looked through, whatever was agreed on before."""
        if not self.choices.debug or torch.compiler.is_compiling():
            return False
        q = self.qkv[0]
        if isinstance(q, Tensor) and q.is_cuda and torch.cuda.is_current_stream_capturing():
            warn_of_a_graph()
            return False
        return True

    @property
    def key(self) -> Hashable:
        """What is looked up at every call."""
        c = self.choices
        rotation = c.rotation if isinstance(c.rotation, Calibration) else str(c.rotation)
        tensors = tuple(
            (x.shape, x.dtype, x.device.type) if isinstance(x, Tensor) else type(x)
            for x in self.qkv
        )
        names = (str(c.layout), rotation, str(c.backend), str(c.kernels), repr(c.scale), c.debug)
        return self.layer, self.mode, tensors, names, self.more, self.with_gradient

    def constants(self, prepared: Prepared) -> tuple[str | int | float | None, ...]:
        """Return names and values of what is no size: a graph may be traced for all of them.

        Sizes are compared by the operators that send, when a graph first runs with them.
        """
        c = self.choices
        said: list[str | int | float | None] = ["mode", self.mode, "dtype", str(self.qkv[0].dtype)]
        said += ["layout", c.layout, "kernels", c.kernels, "scale", c.scale, "debug", c.debug]
        said += ["a gradient", "wanted" if self.with_gradient else "not wanted"]
        for name, taken in prepared.chosen.items():
            said += [name, taken]
        for name, value in self.more:
            if isinstance(value, LighthouseConfig):
                for field in CONFIG_FIELDS:
                    said += [f"{name}.{field}", getattr(value, field)]
            elif isinstance(value, bool):
                said += [name, value]
        return tuple(said)

    @property
    def with_gradient(self) -> bool:
        """Whether a backward may follow, whose messages every rank must then expect."""
        return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in self.qkv)

    def fields(self, prepared: Prepared | None) -> Fields:
        """Return what ranks must agree on, in words; None: the call cannot be made."""
        c = self.choices
        table = c.rotation.text if isinstance(c.rotation, Calibration) else str(c.rotation)
        said = {
            name: f"{list(x.shape)} {x.dtype} on {x.device.type}"
            if isinstance(x, Tensor)
            else type(x).__name__
            for name, x in zip("qkv", self.qkv, strict=True)
        }
        said |= {
            "mode": self.mode,
            "layout": str(c.layout),
            "rotation": table,
            "backend": str(c.backend),
            "kernels": str(c.kernels),
            "scale": repr(c.scale),
            "debug": repr(c.debug),
            "a gradient": "wanted" if self.with_gradient else "not wanted",
        }
        for name, value in self.more:
            if is_dataclass(value):
                inner = ((f.name, getattr(value, f.name)) for f in dataclass_fields(value))
                said |= {f"{name}.{field}": repr(inside) for field, inside in inner}
            else:
                said[name] = repr(value)
        return said | ({} if prepared is None else prepared.chosen)


def _whose(ranks: Ranks) -> str:
    return f"rank {ranks.rank} of {ranks.world_size}"
