"""Dense causal attention over one sequence that all ranks share, compared with one rank.

torchrun --standalone --nproc-per-node 2 launch/examples/ring_attention.py
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import lhcp

# The mesh joins the ranks that torchrun started: NCCL if each has a GPU, else gloo on the CPU.
world_size = int(os.environ["WORLD_SIZE"])
cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
group = init_device_mesh(device, (world_size,), mesh_dim_names=("cp",))["cp"]

# q, k, v and the output's gradient, the same on every rank: [B, N, heads, head_dim], with two query
# heads to a kv head.
torch.manual_seed(0)
seqlen = 128 * world_size
whole = [torch.randn(2, seqlen, heads, 64).to(device, dtype) for heads in (8, 4, 4, 8)]
q, k, v, do = whole

# A rank attends from its own tokens to the whole sequence; gradients are those of its tokens.
parts = [lhcp.shard(x, group).requires_grad_() for x in (q, k, v)]
o = lhcp.ring_attention(*parts, group=group)
grads = torch.autograd.grad(o, parts, lhcp.shard(do, group))
found = [lhcp.unshard(x, group) for x in (o.detach(), *grads)]

# Without a group the rank is alone and holds the whole sequence.
alone = [x.requires_grad_() for x in (q, k, v)]
o = lhcp.ring_attention(*alone)
expected = [o.detach(), *torch.autograd.grad(o, alone, do)]

if dist.get_rank() == 0:
    print(f"{world_size} ranks on {device}, {parts[0].shape[1]} of {seqlen} tokens on each")
    for name, x, y in zip(("o", "dq", "dk", "dv"), found, expected, strict=True):
        print(f"{name}: largest difference to one rank {(x - y).abs().max().item():.1e}")
dist.barrier()
dist.destroy_process_group()
