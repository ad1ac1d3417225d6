"""`Given`: what a caller brings to a lighthouse layer beside q, k and v."""

from collections.abc import Hashable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lhcp.checks import check_scores, check_valid
from lhcp.config import LighthouseConfig
from lhcp.documents import Documents
from lhcp.lighthouse.score import SCORERS
from lhcp.lighthouse.select import Selection


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
                found[name] = Documents(
                    next(left), next(left), next(left), torch.tensor(limits, device="cpu")
                )
            else:
                found[name] = Selection(*islice(left, 2)) if name == "selection" else next(left)
        return cls(**found)


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
