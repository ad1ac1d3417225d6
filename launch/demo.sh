#!/usr/bin/env bash
# Sets up, then runs the main job: 2 ranks share each sequence, lighthouse then dense, and dense from
# scratch to compare with, on the Python standard library's sources. Arguments go to `lhcp train`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# One thread a rank: two ranks with all cores each slow one another down several times.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m torch.distributed.run --standalone --nproc-per-node 2 \
  -m lhcp train demo --out "runs/demo-$(date +%Y%m%d-%H%M%S)" "$@"
