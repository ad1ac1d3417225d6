"""`Run`: everything that one training run is, in one frozen record."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lhcp.comm.layout import make_layout
from lhcp.config import LighthouseConfig
from lhcp.training.data import DataConfig
from lhcp.training.model_config import ModelConfig
from lhcp.training.short import Short
from lhcp.training.stages import OptimConfig, Stage

SLOW = 4.0
"""Timeouts that the start, a save, an evaluation and each of a stage's first steps may take."""
START = SLOW + 1
"""Timeouts that ranks have to come, and a message: longer, so that the watchdog is first."""
TIMEOUT = 120.0
"""The timeout where none is given, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A two-stage run: lighthouse, then dense, with one optimiser and one order of data."""

    name: str
    """Name of the recipe; the default output folder is called after it."""
    model: ModelConfig
    lighthouse: LighthouseConfig
    optim: OptimConfig
    data: DataConfig = field(default_factory=DataConfig)

    seqlen: int
    """N, tokens of one sequence over all its ranks."""
    global_batch: int
    """Sequences in one step over all ranks, whatever the mesh."""
    lighthouse_steps: int
    """Steps of stage 1."""
    dense_steps: int
    """Steps of stage 2."""
    short: Short = field(default_factory=Short)
    """Dense training on shorter sequences that the run, and its baseline, begin from."""
    baseline: bool = False
    """Whether to train dense from scratch on the same tokens too, after the two stages."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""

    cp: int = 1
    """Ranks that share one sequence; the others of the run read other sequences."""
    tp: int = 1
    """Ranks that share the heads and the hidden width of each layer, for the same tokens."""
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    rotation: str = "auto"
    """How kv travels between the ranks of a sequence; the names are lhcp.ring_attention's."""
    nodes: int = 0
    """Nodes that the ranks of one sequence are on, for the rotations that tell them apart; 0: as
    the launcher started them, LOCAL_WORLD_SIZE ranks on each."""
    calibration: str = ""
    """The table by which rotation "auto" is chosen, of several nodes too: a file of lhcp calibrate,
    or "H200", "B200", "cpu"; empty: the built-in one, of rotations that know no nodes."""
    backend: str = "auto"
    """The block attention; the names are lhcp.ring_attention's."""
    kernels: str = "auto"
    """"triton" or "torch" for the stages around the attention."""

    accumulate: int = 1
    """Parts that a rank's sequences of one step are computed in, to save memory."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of what is computed (auto: bf16 on a GPU); weights, gradient sums, optimiser: fp32."""
    compile: bool = False
    """torch.compile for each block."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """CUDA graphs of the attention, messages included; auto: on a GPU. The waits in rotations are
    not timed then, nor in compiled blocks."""
    recompute: bool = False
    """Recompute each block in the backward instead of keeping its activations."""
    offload: bool = False
    """With recompute: keep what each block is recomputed from in the host's memory; the copies
    take a GPU the time of its link to the host."""

    eval_every: int = 100
    """Steps between held-out evaluations."""
    eval_sequences: int = 8
    """Sequences of one held-out evaluation."""
    diagnose: bool = False
    """Whether to log, before the first step and at each evaluation, if the selection of each
    lighthouse layer is alive: `lhcp.diagnose` of its q and k on held-out text."""
    logs: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the numbers go beside metrics.jsonl, which every run writes next to its checkpoints."""
    profile: int = 0
    """Steps to trace with torch's profiler, after the first few; 0 for none."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step of a run writes one too."""
    keep_checkpoints: int = 2
    sample_bytes: int = 200
    """Length of the generated sample at the end; 0 for none."""
    rotation_budget: float = 15.0
    """Seconds that the report may measure a rotation of each stage at the end; 0 for none."""
    out: str = ""
    """Folder of checkpoints and report; empty: runs/<name>."""
    timeout: float = TIMEOUT
    """Seconds that ranks wait for one another in a forward, a backward or an optimiser step; four
    times that in a save, an evaluation or the first steps of a stage, and five to start."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose loss or gradient is not finite, or whose gradient is a spike:
    the run ends and says what was the first such tensor, or how long the gradient was; or the step
    is not taken, up to three in a row."""
    spike_factor: float = 0.0
    """How many times the median of the stage's last 128 gradient norms is a spike, as 10; 0: none
    is. Clipping bounds what a spike does, so that it need not end a run: for runs that skip."""
    debug: bool = False
    """Whether ranks compare every attention call, and look through its tensors for what is not
    finite, which ends the run there (`lhcp.ContextParallel(debug=True)`: slower, and no CUDA
    graphs); and torch keeps the last messages and serves them, with all stacks, to a browser: its
    flight recorder and debug server (port 25999 of rank 0's machine), for hunting a hang."""
    accept: tuple[str, ...] = ()
    """Differences from the run that wrote the checkpoint to go on with all the same, as its refusal
    names them: optim.lr, data.files."""

    @property
    def folder(self) -> Path:
        """Return the folder of checkpoints and report."""
        return Path(self.out or f"runs/{self.name}")

    @property
    def shortest_document(self) -> int:
        """Return the least bytes of a document, N / k: more would begin in a stratum than it can
        take entries of. Where text runs on, 0."""
        return 0 if not self.data.documents else -(-self.seqlen // self.lighthouse.topk)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the two stages, in order."""
        return (
            Stage(name="lighthouse", mode="lighthouse", steps=self.lighthouse_steps),
            Stage(name="dense", mode="dense", steps=self.dense_steps),
        )

    @property
    def short_run(self) -> "Run":
        """Return the run that the short stage is: dense, the same whatever comes after it."""
        short = self.short
        return replace(
            self,
            name="short",
            seqlen=short.seqlen,
            global_batch=short.global_batch,
            # Of no layer.
            lighthouse=LighthouseConfig.fit(short.seqlen, self.cp),
            model=replace(self.model, dense_layers=tuple(range(self.model.num_layers))),
            optim=replace(self.optim, lr=short.lr, decay="constant"),
            short=Short(),
            lighthouse_steps=0,
            dense_steps=short.steps,
            baseline=False,
            diagnose=False,
            out=str(self.short_folder),
        )

    @property
    def short_stages(self) -> tuple[Stage, ...]:
        """Return the short stage, of its own run."""
        return (Stage(name="short", mode="dense", steps=self.short.steps),)

    @property
    def short_folder(self) -> Path:
        """Return the folder of the short stage's checkpoints, of this seed."""
        return Path(self.short.out or self.folder) / f"short_seed{self.seed}"

    @property
    def short_checkpoint(self) -> Path | None:
        """Return the checkpoint that the run begins from; None: it begins from new weights."""
        name = f"step-{self.short.steps:08d}"
        return self.short_folder / name if self.short.steps else None

    @property
    def baseline_stages(self) -> tuple[Stage, ...]:
        """Return one dense stage from scratch, with the steps of both."""
        steps = self.lighthouse_steps + self.dense_steps
        return (Stage(name="baseline", mode="dense", steps=steps),)

    def check(self, world_size: int) -> None:
        """Check that the run fits on `world_size` ranks.

        Raises:
            ValueError: a field is out of its range, a size does not divide, or the sequence does
                not fit the lighthouse config.
        """
        self.check_fields()
        self.check_heads()
        left = world_size // self.tp
        if world_size % self.tp:
            raise ValueError(
                f"tp={self.tp}: must divide the {world_size} ranks of the run; start a multiple of "
                f"{self.tp} ranks (torchrun --nproc-per-node)"
            )
        if self.cp < 1 or left % self.cp:
            fits = [d for d in range(1, left + 1) if left % d == 0]
            ranks = f"{world_size} ranks of the run" + (f" / tp = {left}" if self.tp > 1 else "")
            raise ValueError(
                f"cp={self.cp}: must divide the {ranks}, for example one of {fits}, or start a "
                f"multiple of {self.cp * self.tp} ranks (torchrun --nproc-per-node)"
            )
        if self.nodes < 0 or (self.nodes and self.cp % self.nodes):
            raise ValueError(
                f"nodes={self.nodes}: must divide the cp={self.cp} ranks of a sequence; 0 takes "
                "them as they were started"
            )
        dp = left // self.cp
        if self.accumulate < 1 or self.global_batch % (dp * self.accumulate):
            unit = dp * max(self.accumulate, 1)
            raise ValueError(
                f"global_batch={self.global_batch}: must be a multiple of dp * accumulate = {dp} * "
                f"{self.accumulate}, for example {max(self.global_batch // unit, 1) * unit}; dp is "
                "ranks / (cp * tp)"
            )
        if self.eval_sequences < 1 or self.eval_sequences % dp:
            raise ValueError(
                f"eval_sequences={self.eval_sequences}: must be a positive multiple of dp = {dp}, "
                f"for example {max(self.eval_sequences // dp, 1) * dp}; dp is ranks / (cp * tp)"
            )
        for name in ("eval_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        self.lighthouse.check_seqlen(self.seqlen)
        self.lighthouse.check_chunks(make_layout(self.layout, self.cp).num_chunks)
        if self.short.steps:
            self.check_short(world_size)

    def check_short(self, world_size: int) -> None:
        """Check that the short stage fits on `world_size` ranks.

        Raises:
            ValueError: it is longer than the run, or does not fit; the message says of what.
        """
        asked = self.short.seqlen
        fits = LighthouseConfig.fit(asked, self.cp).padded_length(asked)
        if asked != fits or asked > self.seqlen:
            raise ValueError(
                f"short.seqlen={asked}: must be at most seqlen={self.seqlen} and divide over "
                f"cp={self.cp} ranks, for example {min(fits, self.seqlen)}"
            )
        try:
            self.short_run.check(world_size)
        except ValueError as error:
            raise ValueError(f"the short stage (--short.*): {error}") from error

    def check_heads(self) -> None:
        """Check that `tp` cuts the model's layers into equal parts.

        Raises:
            ValueError: it does not.
        """
        cut = {n: getattr(self.model, n) for n in ("num_heads", "num_kv_heads", "hidden_dim")}
        if self.tp < 1 or any(size % self.tp for size in cut.values()):
            most = math.gcd(*cut.values())
            fits = [d for d in range(1, most + 1) if most % d == 0]
            said = ", ".join(f"{name}={size}" for name, size in cut.items())
            raise ValueError(
                f"tp={self.tp}: must divide the model's {said}, so that each rank has whole heads: "
                f"for example one of {fits}"
            )

    def check_fields(self) -> None:
        """Check what can be said of a field alone.

        Raises:
            ValueError: a field is out of its range.
        """
        if not self.folder.name or not (self.out or self.name).strip():
            raise ValueError(
                f"out={self.out!r}, name={self.name!r}: the folder of checkpoints and report must "
                "have a name; give --out runs/first"
            )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed={self.seed}: must lie in 0 to 2**63 - 1, for example 0")
        for name in ("seqlen", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.calibration and self.rotation != "auto":
            raise ValueError(
                f"calibration={self.calibration!r}: chooses the rotation, and "
                f"rotation={self.rotation!r} is asked for by name; leave out one"
            )
        if self.profile < 0:
            raise ValueError(f"profile={self.profile}: must not be negative; 0 is none")
        if self.sample_bytes < 0:
            raise ValueError(f"sample_bytes={self.sample_bytes}: must not be negative; 0 is none")
        if self.model.vocab_size < 256:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size}: the text is read as bytes, which need "
                "at least 256"
            )
        if self.offload and not self.recompute:
            raise ValueError(
                "offload=True: the inputs of recomputed blocks are kept on the host, so that it "
                "needs recompute=True (--recompute)"
            )
        if not 0 <= self.rotation_budget < math.inf:
            raise ValueError(
                f"rotation_budget={self.rotation_budget}: must be finite and not negative; 0 is "
                "none"
            )
        if self.spike_factor and not 1 < self.spike_factor < math.inf:
            raise ValueError(
                f"spike_factor={self.spike_factor}: must be finite and more than 1, as 10, or 0 "
                "for none"
            )
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout={self.timeout}: must be a positive number of seconds")
