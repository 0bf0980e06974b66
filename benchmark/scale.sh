#!/usr/bin/env bash
# Figure 5 of the paper: a larger policy bears more off-policyness, a larger reward model does not help. Online DPO.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
prepare_sizes
n=(--num-mini-batches 1,4,16)
case $scale in
tiny) flags+=(--batch-size 64 --total-episodes 4096 --eval-every 1000) ;;
paper) more=(--save-every 4) ;; # batches: N = 64 has 4
esac
for model in "${sizes[@]}"; do
    [[ $model != *2.8b* ]] || flags+=(--micro-batch-size 4)
    run scale sync_baseline.py --algo online_dpo --model "$model" "${n[@]}"
done
run scale sync_baseline.py --algo online_dpo --reward "$other_reward" "${n[@]}"
[ -n "${DRY:-}" ] || $python -m benchmark.plot scale
