"""FSDP2 over a dp x cp mesh: ranks along cp share sequences, all ranks share the weights.

torchrun --standalone --nproc-per-node 2 launch/examples/fsdp2_mesh.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import lhcp

CP, BATCH, SEQLEN, DIM, HEADS = 2, 4, 256, 64, 4


class Layer(nn.Module):
    """x [B, n, DIM] plus its attention."""

    def __init__(self, group: DeviceMesh | None) -> None:
        super().__init__()
        self.qkv, self.attend = nn.Linear(DIM, 3 * DIM), lhcp.LighthouseAttention(None, group)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        return torch.add(x, self.attend(q, k, v).flatten(-2))


def train(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Do three steps and return this rank's share of the loss at each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    shares = []
    for _ in range(3):
        # Over the elements of all ranks, so that shares and gradients add up to the batch's.
        share = F.mse_loss(model(inputs), targets, reduction="sum") / (BATCH * SEQLEN)
        optimizer.zero_grad()
        torch.autograd.backward(share)
        optimizer.step()
        shares.append(share.detach())
    return shares


# The mesh joins the ranks that torchrun started: NCCL if each has a GPU, else gloo on the CPU.
world_size = int(os.environ["WORLD_SIZE"])
cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = "cuda" if cuda else "cpu"
mesh = init_device_mesh(device, (world_size // CP, CP), mesh_dim_names=("dp", "cp"))
everyone = init_device_mesh(device, (world_size,))

torch.manual_seed(0)
batch = [torch.randn(BATCH, SEQLEN, DIM).to(device) for _ in range(2)]
model = nn.Sequential(*(Layer(mesh["cp"]) for _ in range(2))).to(device)
alone = nn.Sequential(*(Layer(None) for _ in range(2))).to(device)
alone.load_state_dict(model.state_dict())
for module in (*model, model):
    sharded = fully_shard(module, mesh=everyone)
    # Gradients are summed over dp and cp alike, not averaged; gloo knows the plain sum alone.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)

# This rank's sequences along dp, and its tokens of them along cp.
rows = [x.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()] for x in batch]
found = train(model, *(lhcp.shard(x, mesh["cp"]) for x in rows))
expected = train(alone, *batch)
for step, (loss, whole) in enumerate(zip(found, expected, strict=True), 1):
    dist.all_reduce(loss)
    if dist.get_rank() == 0:
        difference = abs(loss.item() - whole.item())
        print(f"step {step}: loss {loss.item():.4f}, difference to one rank {difference:.1e}")
dist.barrier()
dist.destroy_process_group()
