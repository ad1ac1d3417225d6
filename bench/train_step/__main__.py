"""What a training step gains: dense against lighthouse, the same attention kernel in both.

    python -m bench.train_step --out bench/results                         # all of the table
    python -m bench.train_step --lengths 98304 --checkpointed-lengths --profile-at 98304
    python -m bench.train_step --backend fa4 --lengths 98304 --checkpointed-lengths

The paper's decoder, batch 1. A step is forward, backward, clipping and AdamW. At each length the
two kinds of step take turns. A compiled step that differs from the eager one prints no time. The
last line is JSON.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.common.arguments import make_parser
from bench.common.card import shown_card
from bench.common.page import command, last_line, today
from bench.train_step.arithmetic import Row, complete, config_for
from bench.train_step.gate import gate
from bench.train_step.measure import measure_length
from bench.train_step.report import live, results, write
from bench.train_step.trainer import PRECISION, Trainer, introduce_operators
from lhcp.comm.mesh import Ranks
from lhcp.console import escape_unprintable
from lhcp.layer.plan import choose_backend
from lhcp.measure.clock import matmul_rate
from lhcp.training.model import num_parameters
from lhcp.training.model_config import ModelConfig

PLAIN = [8192, 16_384, 32_768, 65_536, 98_304, 131_072]
CHECKPOINTED = [65_536, 131_072, 262_144, 524_288, 1_048_576]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=PLAIN)
    parser.add_argument("--checkpointed-lengths", type=int, nargs="*", default=CHECKPOINTED)
    parser.add_argument("--skip-dense-above", type=int, default=262_144, help="extrapolate there")
    parser.add_argument("--profile-at", type=int, default=98_304, help="0: nowhere")
    parser.add_argument("--backend", default="cudnn", help="attention of both kinds of step")
    parser.add_argument("--compiler", default="inductor", help="of torch.compile; none: eager")
    parser.add_argument("--gate-length", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=15.0, help="measured at most, per length")
    parser.add_argument("--max-repeats", type=int, default=7)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--hidden-dim", type=int, default=1536)
    parser.add_argument("--dense-layers", type=int, nargs="*", default=[0, 1, 28, 29])
    parser.add_argument("--num-strata", type=int, default=16)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--commit", help="for a copy that is no checkout")
    parser.add_argument("--date", default=today())
    parser.add_argument("--out", help="write markdown, JSON and PNGs into this folder")
    parser.add_argument(
        "--join", nargs="*", help="documents of runs on equal GPUs: write their pages as one"
    )
    return parser.parse_args(arguments)


def model_config(args: argparse.Namespace) -> ModelConfig:
    """Return the decoder's sizes."""
    return ModelConfig(
        dim=args.dim,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.heads,
        head_dim=args.head_dim,
        hidden_dim=args.hidden_dim,
        dense_layers=tuple(args.dense_layers),
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Print card and table, pass the gate, profile; return the whole document."""
    device, config = torch.device(args.device), model_config(args)
    choose_backend(args.backend, torch.bfloat16, config.head_dim, device)
    matmul = round(matmul_rate(device) / 1e12, 1)
    choices = {"backend": args.backend, "compiler": args.compiler, "precision": PRECISION}
    choices |= {"commit": args.commit} if args.commit else {}
    facts = shown_card(device, Ranks(), matmul_tflop_s=matmul, **choices, command=command())
    if args.compiler == "inductor":
        introduce_operators(args.backend, device)
    length, compiler = args.gate_length, args.compiler
    agreed = gate(
        config, config_for(length, args.num_strata), length, args.backend, device, compiler
    )
    print(f"gate passed at {length} tokens: {agreed}", flush=True)

    document: dict[str, Any] = {"card": facts, "date": args.date, "model": asdict(config)}
    rows: list[Row] = []
    document |= {"gate": agreed, "rows": rows, "profiles": {}, "profiled_at": args.profile_at}
    trainer = Trainer(config, args.backend, device, compiler=compiler)
    facts["parameters"] = num_parameters(trainer.model)
    copy_rate = facts["copy_gb_s"] * 1e9
    wanted = [(n, False) for n in args.lengths] + [(n, True) for n in args.checkpointed_lengths]
    for seqlen, recompute in sorted(wanted):
        if seqlen >= 2**20 and trainer.config.dense_layers:
            # As the paper's run of a million tokens: no layer stays dense.
            sparse = replace(config, dense_layers=())
            del trainer
            trainer = Trainer(sparse, args.backend, device, compiler=compiler)
        try:
            row, profiles = measure_length(trainer, seqlen, recompute, args)
        except torch.OutOfMemoryError as error:
            row, profiles = {"does_not_fit": str(error).split(".")[0]}, {}
            row |= {"seqlen": seqlen, "checkpointed": recompute}
            trainer.optimizer.zero_grad()
            trainer.model.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rows.append(row)
        complete(rows, config, copy_rate)
        document |= results(rows)
        document["profiles"] |= {mode: asdict(found) for mode, found in profiles.items()}
        print(live(row), flush=True)
        if args.out:
            write(document, Path(args.out))
    return document


def joined(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Make one document of several that measured different rows with equal cards.

    Raises:
        SystemExit: the cards differ in hardware, versions or commit.
    """
    first, *others = documents
    for other in others:
        for fact in ("device", "torch", "cudnn", "triton", "commit", "backend", "compiler"):
            if first["card"].get(fact) != other["card"].get(fact):
                raise SystemExit(f"documents differ in {fact}: they cannot be one table")
        first["card"]["command"] += " + " + other["card"]["command"]
        first["rows"] += other["rows"]
        first["profiles"] |= other["profiles"]
    first["rows"].sort(key=lambda row: (row["seqlen"], row["checkpointed"]))
    complete(first["rows"], ModelConfig(**first["model"]), first["card"]["copy_gb_s"] * 1e9)
    return first | results(first["rows"])


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.join:
        write(joined([json.loads(Path(path).read_text()) for path in args.join]), Path(args.out))
        return
    # Two kinds of layer at each length, each of static shape.
    torch._dynamo.config.recompile_limit = 64
    document = measure(args)
    if args.out:
        write(document, Path(args.out))
    last_line(document)


if __name__ == "__main__":
    escape_unprintable()
    main()
