#!/usr/bin/env bash
# One run on several machines without a scheduler: start this on each, with the same HEAD_NODE.
#   NUM_NODES=2 HEAD_NODE=host0:29400 launch/torchrun.sh paper_256k_cp8 --out /shared/run1 ...
# First the same with `doctor` in place of the recipe: what all machines have, and their links.
# When a rank dies all are started again, up to MAX_RESTARTS times, from the newest whole checkpoint.
# SIGTERM and SIGUSR1 are handed to the ranks, which end their step and save; they have 30 seconds.
# --out and --data.text must name storage that all machines see: checkpoints have one file a rank.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${NUM_NODES:=1}" "${GPUS_PER_NODE:=8}" "${HEAD_NODE:=localhost:29400}" "${MAX_RESTARTS:=3}"
# Neighbouring ranks share a sequence (cp is the inner axis of the mesh), so with cp at most
# GPUS_PER_NODE the rotation stays inside a machine and only FSDP crosses between them.
place=()
# The ranks of one machine meet on its loopback interface. Others call each other by their names. On
# a network where names are not of the cards that are meant, give HEAD_NODE as an address and each
# machine its own as LOCAL_ADDR: the one that has the head's keeps the store.
if [[ "$HEAD_NODE" == localhost:* ]]; then
  : "${LOCAL_ADDR:=localhost}"
fi
if [[ -n "${LOCAL_ADDR:-}" ]]; then
  place=(--local-addr "$LOCAL_ADDR")
  if [[ "$LOCAL_ADDR" == "${HEAD_NODE%:*}" ]]; then
    place+=(--rdzv-conf is_host=1)
  else
    place+=(--rdzv-conf is_host=0)
  fi
fi
case "${1:-}" in
  train | doctor | overhead | calibrate) ;;
  *) set -- train "$@" ;;
esac
exec torchrun ${place[@]+"${place[@]}"} \
  --nnodes "$NUM_NODES" \
  --nproc-per-node "$GPUS_PER_NODE" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD_NODE" \
  --rdzv-id "${RUN_ID:-lhcp}" \
  --max-restarts "$MAX_RESTARTS" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m lhcp "$@"
