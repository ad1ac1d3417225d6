"""A model that calls torch's attention, over ranks: three lines change, and so does no result.

torchrun --standalone --nproc-per-node 2 launch/examples/existing_model.py
"""

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lhcp


class Model(nn.Module):
    """Embedding, one layer of attention, logits: [B, n] -> [B, n, 256]."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, 64), nn.Embedding(512, 64)
        self.qkv, self.head, self.attend = nn.Linear(64, 192), nn.Linear(64, 256), attend

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place(positions)
        q, k, v = torch.unflatten(self.qkv(x), -1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        o = self.attend(q, k, v, is_causal=True)
        logits: Tensor = self.head(x + o.transpose(1, 2).flatten(-2))
        return logits


# The mesh joins the ranks that torchrun started: NCCL if each has a GPU, else gloo on the CPU.
cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = "cuda" if cuda else "cpu"
mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("cp",))
torch.manual_seed(0)
cp = lhcp.ContextParallel(mesh["cp"])  # 1: the ranks that share a sequence
model = Model(cp.sdpa).to(device)  # 2: it was F.scaled_dot_product_attention
alone = Model(F.scaled_dot_product_attention).to(device)
alone.load_state_dict(model.state_dict())
fully_shard(model, mesh=mesh)
optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (model, alone)]
tokens = torch.randint(64, (2, 512)).to(device)

for step in range(1, 4):
    batch = cp.shard({"input_ids": tokens, "labels": tokens})  # 3: this rank's part, and the loss
    logits = model(batch["input_ids"], batch["position_ids"])
    loss = cp.loss(logits, batch["shift_labels"], over=mesh)
    logits = alone(tokens, torch.arange(512, device=device))[:, :-1]
    whole = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    for x, optimizer in zip((loss, whole), optimizers, strict=True):
        optimizer.zero_grad()
        torch.autograd.backward(x)
        optimizer.step()
    if dist.get_rank() == 0:
        difference = abs(loss.item() - whole.item())
        print(f"step {step}: loss {loss.item():.4f}, difference to one rank {difference:.1e}")
dist.barrier()
dist.destroy_process_group()
