#!/usr/bin/env bash
# Figure 1 of the paper: win-rate over completions and over time, asynchronous (S = 1) against both synchronous placements, for
# every algorithm and three sizes of the policy; five seeds.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
prepare_sizes
SEEDS=${SEEDS:-1,2,3,4,5}
for model in "${sizes[@]}"; do
    [[ $model != *2.8b* ]] || flags+=(--micro-batch-size 4)
    for algo in online_dpo rloo ppo; do
        run async_vs_sync async_$algo.py --model "$model"
        run async_vs_sync sync_baseline.py --algo $algo --model "$model"
        colocate async_vs_sync --algo $algo --model "$model"
    done
done
[ -n "${DRY:-}" ] || $python -m benchmark.plot async_vs_sync
