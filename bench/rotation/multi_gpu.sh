#!/usr/bin/env bash
# Everything that several GPUs of one host can show, in one call of SECONDS_LEFT seconds (540):
# correctness of every rotation, what rotations cost beside the cost model's prediction (written
# first) and beside ring-flash-attn, training steps. At most six files come to $OUT.
#
#   bash bench/rotation/multi_gpu.sh                                   # all GPUs
#   bash bench/rotation/multi_gpu.sh --steps "check_small l4_w8"       # these, in this order
#   bash bench/rotation/multi_gpu.sh --tiny --device cpu --ranks 2     # gloo, tiny: does it run?
#   NCCL_MULTI_RANK_GPU_ENABLE=1 LD_PRELOAD=.../libnccl.so.2 \
#     bash bench/rotation/multi_gpu.sh --ranks 4 --share-gpu    # NCCL >= 2.30; function, not speed
#
# Options: --ranks W (2, 4 or 8; default: the GPUs)  --calibration NAME|FILE (of the cost model)
# Environment: OUT, SECONDS_LEFT, PYTHON, COMMIT (for a copy that is no checkout).
# Needs the extra [bench]; without its matplotlib there are no timelines. Status 1 if a step fails or
# a result is wrong; steps for which no time is left are named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

: "${SECONDS_LEFT:=540}" "${COMMIT:=$(git rev-parse --short HEAD 2>/dev/null || true)}"
OUT="${OUT:-bench/results/multi_gpu-$(date +%Y-%m-%d)}"
python="${PYTHON:-python3}"
tiny=0 device=cuda share=0 ranks="" calibration="" steps=""
command="bash bench/rotation/multi_gpu.sh $*"
while (( $# )); do
  case "$1" in
    --tiny) tiny=1 ;;
    --share-gpu) share=1 ;;
    --device | --ranks | --calibration | --steps)
      (( $# > 1 )) || { echo "$1 needs a value" >&2; exit 2; }
      printf -v "${1#--}" %s "$2"
      shift ;;
    *) echo "$1: not an option; see the head of bench/rotation/multi_gpu.sh" >&2; exit 2 ;;
  esac
  shift
done

# Multicast over NVLink can put GPUs that others share out of service.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Every rank compiles.
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-4}"
if (( share )); then export NCCL_MULTI_RANK_GPU_ENABLE=1; fi

gpus=0
if [ "$device" = cuda ]; then
  gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
fi
if [ -z "$ranks" ]; then
  ranks=2
  for w in 4 8; do if (( gpus >= w )); then ranks=$w; fi; done
fi
case "$ranks" in
  2 | 4 | 8) ;;
  *) echo "ranks=$ranks: must be 2, 4 or 8" >&2; exit 2 ;;
esac
if [ "$device" = cuda ] && (( gpus < (share ? 1 : ranks) )); then
  echo "$ranks ranks on $gpus GPUs: fewer --ranks, --share-gpu on one GPU, or --device cpu" >&2
  exit 2
fi

heads=8 head_dim=128 strata=16 topk=4096 compiler=inductor element_bytes=2
l4_lengths="1048576" l3_lengths="262144 524288 1048576" dense_lengths="131072 262144"
peer_lengths="65536 98304 131072 262144" check_lengths=""
long_lengths="262144 1048576" long_dense="131072"
short_run="paper_256k_cp8" long_run="paper_1m_cp8" timing="--repeats 5 --warmup 1"
train_timing="--steps $(( ranks == 8 ? 5 : 3 )) --warmup $(( ranks == 8 ? 2 : 1 )) --graphs off"
draws=0
if "$python" -c 'import matplotlib' 2>/dev/null; then draws=1; fi
if (( tiny )); then
  head_dim=64 strata=$(( ranks > 4 ? 16 : 8 )) topk=64
  l4_lengths="8192" l3_lengths="2048 4096" dense_lengths="1024 2048" peer_lengths="1024"
  check_lengths="--dense-seqlen 512 --layer-seqlen 2048 --layer-topk 64 --strata $strata"
  long_lengths="16384" long_dense="2048" short_run=tiny_cp4 long_run=tiny_cp4
  timing="--repeats 2 --warmup 1"
fi
if [ "$device" = cpu ]; then
  heads=$(( ranks > 4 ? 8 : 4 )) head_dim=16 compiler=aot_eager element_bytes=4
fi
: "${calibration:=$([ "$device" = cpu ] && echo cpu || echo H200)}"
shape="--heads $heads --head-dim $head_dim"

smaller=""
for w in 4 2; do if (( w < ranks )); then smaller+=" $w"; fi; done
if [ -z "$steps" ]; then
  steps="check_small"
  if (( ! share )); then
    steps+=" l4_w$ranks l3_w$ranks dense_w$ranks peer_w$ranks train_256k train_1m"
  fi
  steps+=" check_long"
  if (( ! share )); then
    for w in $smaller; do steps+=" l4_w$w"; done
    for w in $smaller; do steps+=" l3_w$w dense_w$w"; done
    steps+=" train_256k_compiled train_1m_compiled"
  fi
fi

# What bench.rotation.overhead is called with in the step $1, but for the ranks.
overhead_arguments() {
  local w="${1#*_w}" nodes=1 across=""
  case "$1" in l4_w* | l3_w* | dense_w*) ;; *) return ;; esac
  if (( w >= 4 )); then nodes=2 across=" hierarchical hybrid hybrid_context_first"; fi
  # The last rotation is the one whose timeline is drawn.
  local common="--nodes $nodes --rotations p2p alltoall$across allgather $shape $timing"
  case "$1" in
    l4_w*) echo "$common --seqlens $l4_lengths --topk $topk --levels 4 --strata $strata" ;;
    l3_w*) echo "$common --seqlens $l3_lengths --topk $topk --levels 3 --strata $strata" ;;
    dense_w*) echo "$common --seqlens $dense_lengths --single-seconds 2" ;;
  esac
}

work="$(mktemp -d)"
mkdir -p "$OUT"
: >"$OUT/steps.log"
: >"$work/steps.tsv"
failed=0

page() {
  "$python" -m bench.rotation.multi_gpu_page --work "$work" --out "$OUT" --commit "$COMMIT" \
    --command "$command" "$@"
}

# note NAME STATE SECONDS
note() {
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$work/steps.tsv"
  echo "== $1: $2 ($3 s)" | tee -a "$OUT/steps.log"
}

# attempt NAME MOST LEAST COMMAND...: at most MOST seconds; left out where fewer than LEAST remain.
attempt() {
  local name="$1" most="$2" least="$3" code=0 begin=$SECONDS
  shift 3
  local left=$(( SECONDS_LEFT - SECONDS - 8 ))
  if (( left < least )); then
    note "$name" "not run, $left s left" 0
    return
  fi
  echo "== $name: $*" | tee -a "$OUT/steps.log"
  # Not into a pipe: a rank that outlives its launcher would hold it open.
  timeout -k 15 "$(( left < most ? left : most ))" "$@" >"$work/$name.log" 2>&1 || code=$?
  # The JSON lines are kept in one file of their own.
  sed '/^{/d' "$work/$name.log" | tee -a "$OUT/steps.log" | tail -n 30 | cut -c -220
  case $code in
    0) note "$name" ok $(( SECONDS - begin )) ;;
    124 | 137) note "$name" "out of time" $(( SECONDS - begin )); failed=1 ;;
    *) note "$name" "failed, status $code" $(( SECONDS - begin )); failed=1 ;;
  esac
  page >/dev/null || failed=1
}

# on_ranks NAME MOST LEAST W MODULE ARGUMENTS...
on_ranks() {
  local name="$1" most="$2" least="$3" w="$4"
  shift 4
  attempt "$name" "$most" "$least" "$python" -m torch.distributed.run --standalone \
    --nproc-per-node "$w" -m "$@" --device "$device" --json "$work/$name.json"
}

rows=()
for name in $steps; do
  arguments="$(overhead_arguments "$name")"
  if [ -n "$arguments" ]; then rows+=(--row "$name" "--world ${name#*_w} $arguments"); fi
done
if (( ${#rows[@]} )); then
  attempt predict 60 5 "$python" -m bench.rotation.predict_rows --calibration "$calibration" \
    --element-bytes "$element_bytes" --json "$work/predict.json" "${rows[@]}"
fi

# Lists of words are meant to split here.
# shellcheck disable=SC2046,SC2086
for name in $steps; do
  w="${name#*_w}"
  case "$name" in
    check_small)
      on_ranks $name 200 20 $ranks tests.evidence.check_ranks $shape $check_lengths \
        --compiler $compiler ;;
    check_long)
      on_ranks $name 240 25 $ranks tests.evidence.check_ranks $shape $check_lengths --long-only \
        --compiler none --long-seqlens $long_lengths --long-topk $topk \
        --long-dense-seqlens $long_dense ;;
    l[34]_w[248] | dense_w[248])
      png=""
      if (( draws && w == ranks )) && [[ $name != l3* ]]; then
        png="--png $OUT/timeline_$name.png"
      fi
      on_ranks $name 150 25 $w bench.rotation.overhead $(overhead_arguments $name) $png ;;
    peer_w[248])
      on_ranks $name 90 20 $w bench.rotation.peer_rings $shape --rotations p2p allgather \
        --seqlens $peer_lengths ;;
    train_256k | train_256k_compiled)
      on_ranks $name 200 25 $ranks bench.train_step.ranks --recipe $short_run $train_timing \
        $([[ $name == *_compiled ]] && echo --compile) ;;
    train_1m | train_1m_compiled)
      on_ranks $name 200 25 $ranks bench.train_step.ranks --recipe $long_run $train_timing \
        --modes lighthouse $([[ $name == *_compiled ]] && echo --compile) ;;
    *) note "$name" "failed, no step has this name" 0; failed=1 ;;
  esac
done

page || failed=1
rm -rf "$work"
exit $failed
