"""torchtitan's own Llama 3 and Qwen3, attending across all ranks by lhcp, against one rank.

    torchrun --standalone --nproc-per-node 2 -m tests.evidence.titan_ranks --out build/titan

torchtitan 0.3 trains with torch 2.15, which tests/launch/test_readme_titan.py does on CPUs. Its
models run with 2.11 too, but for one name that its FSDP imports: here that is put in its place, and
the models are called as they are, on CPUs or GPUs. float32 holds loss and gradient to one rank's;
bfloat16, dense, to twice the error that one rank has. Ends with status 1 where they do not.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import lhcp
from bench.common.arguments import make_parser
from bench.common.card import dated_card
from bench.common.page import Page
from lhcp.training.process import Process, run_to_exit

SIZES = {"num_levels": 3, "pool_factor": 4, "topk": 64, "num_strata": 16}
SEQLEN, BATCH = 1024, 2
BUDGET = 2e-5
"""Of loss and gradient in float32."""
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"dense": True},
    "lighthouse": {"dense_layers": [0]},
    "lighthouse, documents": {"dense_layers": [0], "documents": True},
}


def let_torchtitan_import() -> None:
    """Let the models import where torch is older than what shards their weights."""
    name = "DataParallelMeshDims"
    if not hasattr(torch.distributed.fsdp, name):
        setattr(torch.distributed.fsdp, name, object)


def model_of(family: str, kind: str, mesh: DeviceMesh | None, device: torch.device) -> Any:
    """Return torchtitan's debug model of three layers with our attention, in float32."""
    let_torchtitan_import()
    from torchtitan.models.llama3 import llama3_configs
    from torchtitan.models.qwen3 import qwen3_configs

    from lhcp.integrations import torchtitan as titan

    configs = {"llama3": llama3_configs, "qwen3": qwen3_configs}[family]
    config = configs["debugmodel"](attn_backend="flex")
    config.layers = config.layers[:3]
    model = titan.attention(config, **KINDS[kind], **SIZES).build()
    # What its modules ask of its ParallelDims: no axis but cp.
    dims = SimpleNamespace(
        cp_enabled=mesh is not None,
        spmd_backend="partial_dtensor",
        get_mesh=lambda _: mesh,
        get_optional_mesh=lambda _: None,
    )
    model.parallelize(dims)
    with torch.no_grad():
        model.init_states()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.to(device)


def batch_of(kind: str, device: torch.device) -> dict[str, Tensor]:
    """Return tokens, labels, and positions as torchtitan's loader gives them."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2000, (BATCH, SEQLEN + 1), generator=generator).to(device)
    places = torch.arange(SEQLEN, device=device).repeat(BATCH, 1)
    if "documents" in kind:
        places %= SEQLEN // 3
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:].contiguous(), "positions": places}


def answer(model: Any, kind: str, mesh: DeviceMesh | None, device: torch.device) -> list[Tensor]:
    """Return the loss and all gradients, in float64, as all ranks together have them."""
    cp = lhcp.ContextParallel(mesh)
    tokens, labels, places = (cp.shard(x) for x in batch_of(kind, device).values())
    model.zero_grad()
    loss = cp.loss(model(tokens, places), labels, over=mesh)
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    if mesh is not None:
        for grad in found[1:]:
            dist.all_reduce(grad)
            grad /= mesh.size()
    return [x.double() for x in found]


def distance(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Return how far a loss and a whole gradient are off, of themselves."""
    (loss, *grads), (exact, *exacts) = found, expected
    error = sum((x - y).square().sum().item() for x, y in zip(grads, exacts, strict=True))
    whole = sum(y.square().sum().item() for y in exacts)
    return ((loss - exact).abs() / exact).item(), (error / whole) ** 0.5


def main(own: Process, out: str | None) -> None:
    """Compare on all ranks; rank 0 writes."""
    mesh = init_device_mesh(own.device.type, (own.world_size,), mesh_dim_names=("cp",))
    page = Page("torchtitan's models across ranks", dated_card(own.device), shown=own.rank == 0)
    page.table(
        f"{own.world_size} ranks against one",
        f"{BATCH} sequences of {SEQLEN:,} tokens; loss and gradient, of themselves; float32: at "
        f"most {BUDGET:g}; bfloat16: at most twice one rank's distance from float32.",
        ("model", "attention", "dtype", "loss", "gradient", "one rank's"),
    )
    for family in ("llama3", "qwen3"):
        for kind in KINDS:
            exact = answer(model_of(family, kind, None, own.device), kind, None, own.device)
            across = answer(model_of(family, kind, mesh, own.device), kind, mesh, own.device)
            loss, gradient = distance(across, exact)
            name = f"{family}, {kind}"
            if not max(loss, gradient) <= BUDGET:
                page.refuse(name, f"loss {loss:.1e}, gradient {gradient:.1e} off")
            else:
                page.row(family, kind, "float32", f"{loss:.1e}", f"{gradient:.1e}", "-")
            if kind != "dense":
                continue
            low = [
                answer(model_of(family, kind, m, own.device).bfloat16(), kind, m, own.device)
                for m in (None, mesh)
            ]
            (_, single), (loss, gradient) = (distance(x, exact) for x in low)
            if not gradient <= 2 * single:
                page.refuse(name, f"bfloat16: gradient {gradient:.1e} off, one rank {single:.1e}")
            else:
                page.row(
                    family, kind, "bfloat16", f"{loss:.1e}", f"{gradient:.1e}", f"{single:.1e}"
                )
    if own.rank == 0:
        page.close(out, {"ranks": own.world_size})
    elif page.wrong:
        raise SystemExit(1)


def start(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and compare."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", help="page and JSON are written to this name")
    args = parser.parse_args(arguments)
    run_to_exit(lambda own: main(own, args.out))


if __name__ == "__main__":
    start()
