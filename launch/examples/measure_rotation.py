"""What sharing a sequence costs on these ranks, in a sentence: `lhcp.measure_overhead`.

torchrun --standalone --nproc-per-node 2 launch/examples/measure_rotation.py
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import lhcp

# The mesh joins the ranks that torchrun started: NCCL if each has a GPU, else gloo on the CPU.
world_size = int(os.environ["WORLD_SIZE"])
cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = "cuda" if cuda else "cpu"
group = init_device_mesh(device, (world_size,), mesh_dim_names=("cp",))["cp"]

# A long sequence for GPUs, a short one for CPUs; put your own sizes here.
seqlen = 98_304 if cuda else 4096
config = lhcp.LighthouseConfig.fit(seqlen, world_size)

# Every rank calls it with the same sizes; None in place of the config measures dense attention.
report = lhcp.measure_overhead(
    config,
    seqlen=config.padded_length(seqlen),
    num_heads=8 if cuda else 2,
    head_dim=128 if cuda else 32,
    dtype=torch.bfloat16 if cuda else torch.float32,
    group=group,
    device=device,
    budget=10,
)
if dist.get_rank() == 0:
    print(report)
    # Of a training step of yours, which has 26 such layers and takes 1.9 s:
    print(report.verdict(step_seconds=1.9, num_layers=26))
    print(report.table())
dist.barrier()
dist.destroy_process_group()
