"""The static description of one lighthouse layer: `LighthouseConfig` and its checks."""

from dataclasses import dataclass
from operator import index
from typing import Any, Literal

from lhcp import sizes

Scorer = Literal["norm", "dilated"]
SCORER_NAMES: tuple[Scorer, ...] = ("norm", "dilated")


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
                f"{sizes.nearest_multiples(self.topk, unit)}"
            )
        if self.scorer not in SCORER_NAMES:
            raise ValueError(f"scorer={self.scorer!r}: must be one of {', '.join(SCORER_NAMES)}")
        if self.dilation < 1:
            raise ValueError(f"dilation={self.dilation}: must be at least 1, for example 4")
        if self.scorer_window < 1 or self.scorer_window % self.dilation:
            raise ValueError(
                f"scorer_window={self.scorer_window}: must be a positive multiple of dilation="
                f"{self.dilation}, for example "
                f"{sizes.nearest_multiples(self.scorer_window, self.dilation)}"
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
                coarsest entries than it must take. What the message offers keeps every rule.
        """
        unit = self.seqlen_multiple
        if seqlen < 1 or seqlen % unit:
            below = seqlen // unit * unit
            fits = f"{below} or " if below >= self.min_seqlen else ""
            raise ValueError(
                f"seqlen={seqlen}: must be a positive multiple of num_strata * pool_factor ** "
                f"(num_levels - 1) = {unit}, and at least {self.min_seqlen}, so that a stratum has "
                f"entries to take, for example {fits}{self.padded_length(max(seqlen, 1))}; pad "
                f"with lhcp.pad_to_length and LighthouseConfig.padded_length"
                f"{self._or_smaller(seqlen)}"
            )
        if seqlen < self.min_seqlen:
            raise ValueError(
                f"seqlen={seqlen}: each stratum has {seqlen // unit} coarsest entries but must "
                f"take topk / num_strata = {self.picks} of them; use seqlen >= {self.min_seqlen}"
                f"{self._or_smaller(seqlen)}"
            )
        if not self._scorer_fits(seqlen):
            stratum = seqlen // self.num_strata
            window, dilation = sizes.fitting_block(stratum, self.scorer_window, self.dilation)
            also = f", dilation={dilation}" if dilation != self.dilation else ""
            raise ValueError(
                f"scorer_window={self.scorer_window}: the block of "
                f"{min(self.scorer_window, stratum)} tokens must divide the stratum of seqlen / "
                f"num_strata = {stratum} tokens and be a multiple of dilation={self.dilation}, for "
                f"example scorer_window={window}{also}"
            )

    def check_chunks(self, num_chunks: int) -> None:
        """Check that the strata divide over the chunks of all ranks: 2W with zigzag, else W.

        Raises:
            ValueError: they do not; the message names what fits, a topk too where it must change.
        """
        if self.num_strata % num_chunks == 0:
            return
        low = self.num_strata // num_chunks * num_chunks
        offers = []
        for strata in (low, low + num_chunks) if low else (num_chunks,):
            topk = sizes.nearest_multiple(self.topk, 2 * strata)
            offers.append(f"num_strata={strata}" + (f", topk={topk}" if topk != self.topk else ""))
        raise ValueError(
            f"num_strata={self.num_strata}: must be a multiple of {num_chunks}, the chunks of all "
            "ranks (two a rank with zigzag on several ranks, else one), for example "
            f"{' or '.join(offers)}"
        )

    def padded_length(self, seqlen: int) -> int:
        """Return the shortest whole length that fits this config and has at least `seqlen` tokens.

        Raises:
            ValueError: `seqlen` is less than 1.
        """
        if seqlen < 1:
            raise ValueError(f"seqlen={seqlen}: must be at least 1")
        unit = self.seqlen_multiple
        length = max(-(-seqlen // unit) * unit, self.min_seqlen)
        # At the latest where a stratum is a multiple of the scorer's window.
        while not self._scorer_fits(length):
            length += unit
        return length

    @classmethod
    def fit(cls, seqlen: int, world_size: int = 1, **wishes: Any) -> "LighthouseConfig":
        """Return the config nearest to what is wished that fits a length and a number of ranks.

        Levels and pool_factor are kept. The strata divide over the ranks in either layout, topk
        over the strata, and `padded_length(seqlen)` is the least that any such config has; among
        these, num_strata and then topk are the nearest. topk is reduced to what the length has to
        take, and to what makes the sub-sequence shorter than the sequence.

        Args:
            seqlen: N, tokens of the whole sequence; any number.
            world_size: W, context-parallel ranks.
            wishes: fields of the config; those left out are wished at their defaults.

        Raises:
            TypeError, ValueError: a size is less than 1, or a wish breaks a rule on its own.
        """
        if seqlen < 1 or world_size < 1:
            raise ValueError(f"seqlen={seqlen}, world_size={world_size}: must be at least 1")
        return cls._fit(seqlen, world_size * (2 if world_size > 1 else 1), wishes)

    @classmethod
    def _fit(cls, seqlen: int, num_chunks: int, wishes: dict[str, Any]) -> "LighthouseConfig":
        """Return what `fit` does, with strata that are a multiple of `num_chunks`."""
        rest = dict(wishes)
        # On their own these two have no rule but to be positive.
        strata, topk = (
            rest.pop(name, cls.__dataclass_fields__[name].default)
            for name in ("num_strata", "topk")
        )
        for name, value in (("num_strata", strata), ("topk", topk)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        least = cls(num_strata=num_chunks, topk=2 * num_chunks, **rest)
        window = least.coarsest_window
        strata, topk, length = sizes.fitting_strata(seqlen, num_chunks, window, strata, topk)
        branches = (least.num_levels - 1) * least.pool_factor
        topk = sizes.shortening_topk(topk, 2 * strata, length // window, window, branches)
        if least.scorer == "dilated":
            rest["scorer_window"], rest["dilation"] = sizes.fitting_block(
                length // strata, least.scorer_window, least.dilation
            )
        return cls(num_strata=strata, topk=topk, **rest)

    def _or_smaller(self, seqlen: int) -> str:
        """Name the nearest config, of as many strata or a multiple, that takes a short sequence."""
        if seqlen < 1 or seqlen > self.min_seqlen:
            return ""
        wishes = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found = self._fit(seqlen, self.num_strata, wishes)
        changed = [f"{k}={getattr(found, k)}" for k, v in wishes.items() if getattr(found, k) != v]
        if not changed:
            return ""
        length = found.padded_length(seqlen)
        return f"; or seqlen={length} with {', '.join(changed)} (LighthouseConfig.fit)"

    def _scorer_fits(self, seqlen: int) -> bool:
        """Return whether the blocks of the scorer, if it has any, cut a stratum."""
        stratum = seqlen // self.num_strata
        fits = sizes.block_fits(stratum, self.scorer_window, self.dilation)
        return self.scorer != "dilated" or fits

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
