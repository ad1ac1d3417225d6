"""Arguments that several commands have, with one spelling and one default."""

import argparse
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from lhcp.comm.layout import LAYOUTS
from lhcp.config import LighthouseConfig
from lhcp.ring.rotation import NAMES


def make_parser(description: str | None) -> ArgumentParser:
    """Return a parser whose help is the module's docstring, line breaks kept."""
    return ArgumentParser(
        prog=shlex.join(program()),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def program() -> list[str]:
    """Return what starts this process, without its arguments; a module by its name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return ["python", sys.argv[0]]
    return ["python", "-m", spec.name.removesuffix(".__main__")]


def add_heads(parser: ArgumentParser, heads: int = 8, head_dim: int = 128) -> None:
    """Add the heads of q, k, v."""
    parser.add_argument("--heads", type=int, default=heads)
    parser.add_argument("--head-dim", type=int, default=head_dim)


def add_device(parser: ArgumentParser) -> None:
    """Add where ranks compute."""
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def add_json(parser: ArgumentParser) -> None:
    """Add where the document goes beside the last line."""
    parser.add_argument("--json", help="write the JSON document here as well")


def add_ranks(parser: ArgumentParser) -> None:
    """Add what every command has that attends across ranks."""
    add_heads(parser)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on a GPU, else float32")
    add_device(parser)
    add_json(parser)


def add_layer(
    parser: ArgumentParser, topk: int | None = None, levels: int = 3, strata: int = 16
) -> None:
    """Add the lighthouse layer's sizes; where no topk is given, there is none."""
    parser.add_argument("--topk", type=int, default=topk, help="of a lighthouse layer")
    parser.add_argument("--levels", type=int, default=levels)
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--strata", type=int, default=strata)


def add_lengths(parser: ArgumentParser) -> None:
    """Add what a call of bench.rotation.overhead runs over: rotations, lengths, batch, layout."""
    known = ("auto", *NAMES)
    parser.add_argument("--rotations", nargs="*", default=["p2p", "allgather"], choices=known)
    parser.add_argument("--seqlens", type=int, nargs="*", default=[8192])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layout", default="zigzag", choices=LAYOUTS)
    parser.add_argument("--nodes", type=int, default=1, help="outer axis of a mesh of two axes")


def parse(parser: ArgumentParser, arguments: Sequence[str] | None = None) -> Namespace:
    """Parse, with as many kv heads as heads where none were named."""
    args = parser.parse_args(arguments)
    args.kv_heads = args.kv_heads or args.heads
    return args


def config_of(args: Namespace) -> LighthouseConfig | None:
    """Return the layer that `add_layer` describes, if one was asked for."""
    if args.topk is None:
        return None
    return LighthouseConfig(
        num_levels=args.levels, pool_factor=args.factor, topk=args.topk, num_strata=args.strata
    )
