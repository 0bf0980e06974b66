#!/usr/bin/env bash
# Figure 5 of the paper: a larger policy bears more off-policyness, a larger reward model does not help. Online DPO.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
prepare_sizes
for model in "${sizes[@]}"; do
    [[ $model != *2.8b* ]] || flags+=(--micro-batch-size 4)
    run scale sync_baseline.py --algo online_dpo "${short[@]}" --model "$model" --num-mini-batches 1,4,16
done
run scale sync_baseline.py --algo online_dpo "${short[@]}" --reward "$other_reward" --num-mini-batches 1,4,16
draw scale
