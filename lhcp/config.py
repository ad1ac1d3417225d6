"""The static description of one lighthouse layer: `LighthouseConfig` and its checks."""

from dataclasses import dataclass
from operator import index
from typing import Literal

Scorer = Literal["norm", "dilated"]
SCORER_NAMES: tuple[Scorer, ...] = ("norm", "dilated")


def nearest_multiples(value: int, unit: int) -> str:
    """Return the positive multiples of `unit` around `value`, as text for an error message."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below > 0 else f"{unit}"


@dataclass(frozen=True, kw_only=True)
class LighthouseConfig:
    """Sizes and scorer of Lighthouse attention (arXiv 2605.06554; lhcp/METHOD.md).

    Rules on these fields alone are checked here; rules with the sequence length, the heads or the
    number of ranks are checked at the call.

    Raises:
        ValueError: a field breaks a rule. The message names the value, the rule and what fits.
    """

    num_levels: int = 3
    """L, levels of the pyramid, the tokens included: level l pools p**l tokens. At least 2."""

    pool_factor: int = 4
    """p, entries of one level under one entry of the next. At least 2."""

    topk: int = 1536
    """k, entries expanded at each pooled level over the whole sequence (all ranks together)."""

    num_strata: int = 16
    """C, equal parts of the sequence that select on their own; a rank holds whole strata.

    Zigzag on W ranks needs a multiple of 2W, contiguous a multiple of W.
    """

    scorer: Scorer = "norm"
    """"norm": squared norms of q and k; "dilated": squared norms of local dilated attention."""

    scorer_window: int = 8192
    """Tokens in one block of the dilated scorer (or a stratum, if that is shorter)."""

    dilation: int = 4
    """The dilated scorer attends among tokens with the same index modulo this."""

    def __post_init__(self) -> None:
        for name in (
            "num_levels",
            "pool_factor",
            "topk",
            "num_strata",
            "scorer_window",
            "dilation",
        ):
            value = getattr(self, name)
            # What counts as an index is an integer, numpy's too; a bool is a mistake.
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} must be an int, got {value!r}")
            object.__setattr__(self, name, index(value))
        if self.pool_factor < 2:
            raise ValueError(f"pool_factor={self.pool_factor}: must be at least 2, for example 4")
        if self.num_levels < 2:
            raise ValueError(f"num_levels={self.num_levels}: must be at least 2, for example 3")
        if self.num_strata < 1:
            raise ValueError(f"num_strata={self.num_strata}: must be at least 1, for example 16")
        unit = 2 * self.num_strata
        if self.topk < unit or self.topk % unit:
            raise ValueError(
                f"topk={self.topk}: must be a positive multiple of 2 * num_strata = {unit} (half "
                "of a stratum's picks go by query score, half by key score), for example "
                f"{nearest_multiples(self.topk, unit)}"
            )
        if self.scorer not in SCORER_NAMES:
            raise ValueError(f"scorer={self.scorer!r}: must be one of {', '.join(SCORER_NAMES)}")
        if self.dilation < 1:
            raise ValueError(f"dilation={self.dilation}: must be at least 1, for example 4")
        if self.scorer_window < 1 or self.scorer_window % self.dilation:
            raise ValueError(
                f"scorer_window={self.scorer_window}: must be a positive multiple of dilation="
                f"{self.dilation}, for example "
                f"{nearest_multiples(self.scorer_window, self.dilation)}"
            )

    @property
    def picks(self) -> int:
        """m, entries that one stratum expands at one level: topk / num_strata, an even number."""
        return self.topk // self.num_strata

    @property
    def coarsest_window(self) -> int:
        """Tokens under one entry of the coarsest level: pool_factor ** (num_levels - 1)."""
        return self.pool_factor ** (self.num_levels - 1)

    @property
    def seqlen_multiple(self) -> int:
        """Every valid whole sequence length is a multiple of this many tokens."""
        return self.num_strata * self.coarsest_window

    @property
    def min_seqlen(self) -> int:
        """The shortest valid whole sequence: each stratum has `picks` coarsest entries to take."""
        return self.seqlen_multiple * self.picks

    def check_seqlen(self, seqlen: int) -> None:
        """Check that a whole sequence of `seqlen` tokens fits this config.

        Raises:
            ValueError: `seqlen` does not cut into strata of whole windows, or a stratum has fewer
                coarsest entries than it must take.
        """
        unit = self.seqlen_multiple
        if seqlen < 1 or seqlen % unit:
            raise ValueError(
                f"seqlen={seqlen}: must be a positive multiple of num_strata * pool_factor ** "
                f"(num_levels - 1) = {unit}, for example {nearest_multiples(seqlen, unit)}; "
                f"lhcp.pad_to_multiple(x, {unit}) pads (LighthouseConfig.seqlen_multiple)"
            )
        if seqlen < self.min_seqlen:
            fits = seqlen // unit * self.num_strata // (2 * self.num_strata) * 2 * self.num_strata
            hint = f"topk={fits}" if fits else "fewer strata or levels"
            raise ValueError(
                f"seqlen={seqlen}: each stratum has {seqlen // unit} coarsest entries but must "
                f"take topk / num_strata = {self.picks} of them; use seqlen >= {self.min_seqlen} "
                f"or {hint}"
            )
        if self.scorer == "dilated":
            stratum = seqlen // self.num_strata
            window = min(self.scorer_window, stratum)
            if stratum % window or window % self.dilation:
                raise ValueError(
                    f"scorer_window={self.scorer_window}: the block of {window} tokens must divide "
                    f"the stratum of seqlen / num_strata = {stratum} tokens and be a multiple of "
                    f"dilation={self.dilation}, for example {self._fitting_window(stratum)}"
                )

    def _fitting_window(self, stratum: int) -> str:
        """Name the largest scorer_window up to the present one that fits, or a dilation too."""
        for window in range(min(self.scorer_window, stratum), 0, -1):
            if stratum % window == 0 and window % self.dilation == 0:
                return f"scorer_window={window}"
        dilation = max(d for d in range(1, self.dilation) if stratum % d == 0)
        return f"scorer_window={stratum}, dilation={dilation}"

    def subsequence_length(self, seqlen: int) -> int:
        """Return S, the length of the gathered sub-sequence of a whole sequence.

        S = seqlen / pool_factor ** (num_levels - 1) + (num_levels - 1) * pool_factor * topk.

        Args:
            seqlen: N, tokens of the whole sequence over all ranks.

        Raises:
            ValueError: see `check_seqlen`.
        """
        self.check_seqlen(seqlen)
        return seqlen // self.coarsest_window + (self.num_levels - 1) * self.pool_factor * self.topk
