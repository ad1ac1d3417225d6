"""`Run`: everything that one training run is, in one frozen record."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

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
