#!/usr/bin/env bash
# Figure 1 of the paper: win-rate over completions and over time, asynchronous (S = 1) against both synchronous placements, for
# every algorithm and three sizes of the policy; five seeds, of `colocate` at tiny three: it is there for its time.
# docstrings: real text and a pretrained policy, Online DPO, three seeds; about two hours, and 15 minutes to prepare.
set -euo pipefail
scales="tiny or docstrings or paper"
. "$(dirname "$0")/scales.sh"
export JOBS=1 # its times count
algos=(online_dpo rloo ppo) colocated=1,2,3
case $scale in
tiny) prepare_sizes; flags+=(--total-episodes 3072 --learning-rate 2e-4 --eval-every 6) ;; # still rising
docstrings) algos=(online_dpo) SEEDS=${SEEDS:-1,2,3} ;;
paper) colocated=1,2,3,4,5 ;;
esac
SEEDS=${SEEDS:-1,2,3,4,5}
for seed in $(tr , ' ' <<< "$SEEDS"); do # in turn: times drift
    for model in "${sizes[@]}"; do
        own=(--model "$model")
        [[ $model != *2.8b* ]] || own+=(--micro-batch-size 4)
        [[ $model != *sft-l ]] || own+=(--learning-rate 8e-5 --total-episodes 2048 --eval-every 4) # moves as far as m (scale.sh)
        for algo in "${algos[@]}"; do
            SEEDS=$seed run async_vs_sync async_$algo.py "${own[@]}"
            SEEDS=$seed run async_vs_sync sync_baseline.py --algo $algo "${own[@]}"
            [[ ,$colocated, != *,$seed,* ]] || SEEDS=$seed colocate async_vs_sync --algo $algo "${own[@]}"
        done
    done
done
draw async_vs_sync
