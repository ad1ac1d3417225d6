"""A model of one's own on a dp x cp mesh with FSDP2: three lines of it are lhcp's.

torchrun --standalone --nproc-per-node 2 launch/examples/fsdp2_mesh.py
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import lhcp

CP, BATCH, SEQLEN, DIM, HEADS = 2, 4, 250, 64, 4
CONFIG = lhcp.LighthouseConfig.fit(SEQLEN, CP, num_levels=3, pool_factor=2, topk=16)


class Model(nn.Module):
    """A small language model; its attention was torch's."""

    def __init__(self, cp: lhcp.ContextParallel) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, DIM), nn.Embedding(2 * SEQLEN, DIM)
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(2))
        self.attend = nn.ModuleList(cp.attention(config) for config in (None, CONFIG))  # 1
        self.head = nn.Linear(DIM, 256, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor, valid: Tensor) -> Tensor:
        """Return logits [B, n, 256] of the token after each of input_ids [B, n]."""
        x = self.embed(input_ids) + self.place(position_ids)
        for qkv, attend in zip(self.qkv, self.attend, strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
            x = x + attend(q, k, v, valid=valid).flatten(-2)
        logits: Tensor = self.head(x)
        return logits


def train(
    model: nn.Module, cp: lhcp.ContextParallel, rows: Tensor, over: DeviceMesh | None
) -> list[float]:
    """Do three steps on rows [B, SEQLEN], whole sequences; return the loss before each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for _ in range(3):
        batch = cp.shard(  # 2
            {"input_ids": rows, "labels": rows}, pad_to=cp.padded_length(SEQLEN, CONFIG)
        )
        labels = batch.pop("shift_labels")
        loss = cp.loss(model(**batch), labels, over=over)  # 3
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


# The mesh joins the ranks that torchrun started: NCCL if each has a GPU, else gloo on the CPU.
world_size = int(os.environ["WORLD_SIZE"])
cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = "cuda" if cuda else "cpu"
mesh = init_device_mesh(device, (world_size // CP, CP), mesh_dim_names=("dp", "cp"))
everyone = init_device_mesh(device, (world_size,))

torch.manual_seed(0)
text = torch.randint(64, (BATCH, SEQLEN)).to(device)
cp, nobody = lhcp.ContextParallel(mesh["cp"]), lhcp.ContextParallel()
model, alone = Model(cp).to(device), Model(nobody).to(device)
alone.load_state_dict(model.state_dict())
fully_shard(model, mesh=everyone)  # dp and cp together; it averages, as cp.loss expects

mine = text.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]
found = train(model, cp, mine, over=mesh)
expected = train(alone, nobody, text, over=None)
if dist.get_rank() == 0:
    for step, (loss, whole) in enumerate(zip(found, expected, strict=True), 1):
        print(f"step {step}: loss {loss:.4f}, difference to one rank {abs(loss - whole):.1e}")
dist.barrier()
dist.destroy_process_group()
