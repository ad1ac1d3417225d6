"""Time one stage's kernels over tile sizes and warps, after checking each variant's output.

python -m bench.latency.sweep select pool --seqlens 131072 262144
"""

from collections.abc import Sequence
from itertools import product
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from bench.common.arguments import make_parser
from bench.latency.size import Size
from bench.latency.stages import Shape, TimedStage, Wrong, build, measure
from lhcp.console import escape_unprintable
from lhcp.lighthouse.kernels import gather, pool, scatter, scatter_backward, select
from lhcp.measure.clock import copy_bandwidth

Variants = tuple[ModuleType, tuple[str, ...], Sequence[tuple[int, ...]]]

SPREADING: Sequence[tuple[int, ...]] = [
    (128, 1),
    (256, 1),
    (512, 1),
    (512, 2),
    (1024, 2),
    (1024, 4),
    (2048, 8),
]

SWEEPS: dict[str, Variants] = {
    "pool": (pool, ("TILE", "NUM_WARPS"), [(256, 1), (512, 2), (1024, 4), (1024, 2), (2048, 8)]),
    "gather": (
        gather,
        ("GATHER_TILE", "GATHER_WARPS"),
        [(1024, 1), (2048, 2), (1024, 4), (2048, 4), (4096, 4), (8192, 4), (8192, 8)],
    ),
    "gather_backward": (gather, ("SPREAD_TILE", "SPREAD_WARPS"), SPREADING),
    "scatter": (scatter, ("TILE", "NUM_WARPS"), SPREADING),
    "scatter_backward": (scatter_backward, ("TILE", "NUM_WARPS"), SPREADING),
    "select": (
        select,
        ("KEYS_PER_WARP", "PLACE_BLOCK", "PLACE_WARPS"),
        list(product((64, 128, 256, 512), (512, 1024), (4,))),
    ),
}


def sweep(name: str, stage: TimedStage, copy: float) -> None:
    """Time every variant of one stage."""
    module, constants, variants = SWEEPS[name]
    for values in variants:
        variant: dict[str, Any] = dict(zip(constants, values, strict=True))
        with patch.multiple(module, **variant):
            try:
                timed = measure({name: stage}, copy)[name]
                verdict = f"{timed.ms} ms {timed.of_copy:.0%} of copy"
            except Wrong as error:
                verdict = f"WRONG: {error}"
        print(f"  {name:17s} {values!s:16s} {verdict}", flush=True)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("stages", nargs="+", choices=SWEEPS)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[2**17, 2**18])
    args = parser.parse_args()
    torch.manual_seed(0)
    copy = copy_bandwidth(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, copy {copy / 1e12:.2f} TB/s")
    for seqlen in args.seqlens:
        print(f"N={seqlen}")
        built = build(Size(seqlen).geom, Shape())
        for name in args.stages:
            sweep(name, built[name], copy)


if __name__ == "__main__":
    escape_unprintable()
    main()
