"""What sharing a sequence costs on these ranks: the table of `lhcp.measure_overhead`.

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

# A long sequence for GPUs, a short one for CPUs: tokens and picks of one stratum. Zigzag needs a
# multiple of 2W strata; put your own sizes here.
num_strata = 8 * world_size
tokens, picks = (8192, 96) if cuda else (256, 8)
config = lhcp.LighthouseConfig(topk=picks * num_strata, num_strata=num_strata)

# Every rank calls it with the same sizes; None in place of the config measures dense attention.
report = lhcp.measure_overhead(
    config,
    seqlen=tokens * num_strata,
    num_heads=8 if cuda else 2,
    head_dim=128 if cuda else 32,
    dtype=torch.bfloat16 if cuda else torch.float32,
    group=group,
    device=device,
    repeats=5,
)
if dist.get_rank() == 0:
    print(report.table())
    both = report.phase("both")
    print(f"of {both.real.median * 1e3:.2f} ms, {both.exposed * 1e3:.2f} ms wait for messages")
dist.barrier()
dist.destroy_process_group()
