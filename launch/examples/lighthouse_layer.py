"""A tiny model with Lighthouse attention on sequences that all ranks share, compared with one rank.

torchrun --standalone --nproc-per-node 2 launch/examples/lighthouse_layer.py
"""

import os
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import lhcp

CONFIG = lhcp.LighthouseConfig(num_levels=3, pool_factor=2, topk=32, num_strata=8)
SEQLEN, DIM, HEADS = 512, 64, 4


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Apply RoPE to x [B, n, heads, head_dim] at the global positions [n] of its tokens."""
    pairs = torch.view_as_complex(torch.unflatten(x, -1, (-1, 2)))
    rates = 10000.0 ** -torch.linspace(0, 1, pairs.shape[-1], device=x.device)
    angles = (positions[:, None] * rates)[:, None]
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class Model(nn.Module):
    """Embedding, two layers of attention, logits of the next token."""

    def __init__(self, group: DeviceMesh | None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, DIM), nn.Linear(DIM, 256)
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(2))
        # The first layer stays dense: equal tokens have equal scores there.
        self.attend = nn.ModuleList(lhcp.LighthouseAttention(c, group) for c in (None, CONFIG))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return logits [B, n, 256] of this rank's tokens [B, n]."""
        x = self.embed(tokens)
        for qkv, attend in zip(self.qkv, self.attend, strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
            x = x + attend(rotate(q, positions), rotate(k, positions), v).flatten(-2)
        logits: Tensor = self.head(x)
        return logits


def loss_and_gradients(model: Model, text: Tensor, group: DeviceMesh | None) -> list[Tensor]:
    """Return the mean loss over all tokens of text [B, N + 1] and its gradients, on every rank."""
    # Labels are shifted on the whole sequence: a rank does not hold the token after its last one.
    tokens, labels = (lhcp.shard(x, group) for x in (text[:, :-1], text[:, 1:]))
    logits = model(tokens, lhcp.positions(SEQLEN, group, device=text.device))
    # Divided by the tokens of all ranks, so that losses and gradients are sums over ranks.
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = loss / text[:, 1:].numel()
    found = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    if group is not None:
        for x in found:
            dist.all_reduce(x, group=group.get_group())
    return found


# The mesh joins the ranks that torchrun started: NCCL if each has a GPU, else gloo on the CPU.
cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = "cuda" if cuda else "cpu"
group = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("cp",))["cp"]

torch.manual_seed(0)
model, alone = Model(group).to(device), Model(None).to(device)
alone.load_state_dict(model.state_dict())
text = torch.randint(256, (2, SEQLEN + 1)).to(device)
modes: tuple[Literal["lighthouse", "dense"], ...] = ("lighthouse", "dense")
for mode in modes:
    for layer in (*model.modules(), *alone.modules()):
        if isinstance(layer, lhcp.LighthouseAttention) and layer.config is not None:
            layer.mode = mode
    found, expected = loss_and_gradients(model, text, group), loss_and_gradients(alone, text, None)
    loss, *grads = ((x - y).abs().max().item() for x, y in zip(found, expected, strict=True))
    if dist.get_rank() == 0:
        print(f"{mode}: loss {found[0].item():.4f}, largest difference to one rank {loss:.1e}")
        print(f"{mode}: gradients, largest difference to one rank {max(grads):.1e}")
dist.barrier()
dist.destroy_process_group()
