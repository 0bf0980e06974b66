#!/usr/bin/env bash
# Figure 5 of the paper: a larger policy bears more off-policyness, a larger reward model does not help. Online DPO.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
prepare_sizes
n=(--num-mini-batches 1,4,16)
[ "$scale" = paper ] || flags+=(--batch-size 64 --total-episodes 4096 --eval-every 1000)
for model in "${sizes[@]}"; do
    run scale sync_baseline.py --algo online_dpo --model "$model" "${n[@]}"
done
run scale sync_baseline.py --algo online_dpo --reward "$other_reward" "${n[@]}"
[ -n "${DRY:-}" ] || $python -m benchmark.plot scale
