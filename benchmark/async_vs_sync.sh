#!/usr/bin/env bash
# Figure 1 of the paper: win-rate over completions and over time, asynchronous (S = 1) against both synchronous placements, for
# every algorithm and three sizes of the policy.
# tiny: 99 runs, five seeds. Times are of seeds 1 to 3, one run at a time; 4 and 5 are run side by side, for their win-rates
# only. `colocate`, which learns what `split` learns, is run for its times of size m. SEEDS=1,2 runs these seeds one
# at a time.
# docstrings: real text and a pretrained policy, Online DPO, three seeds. paper: five.
set -euo pipefail
scales="tiny or docstrings or paper"
. "$(dirname "$0")/scales.sh"
algos=(online_dpo rloo ppo) timed=${SEEDS:-1,2,3,4,5} side_by_side=
case $scale in
tiny)
    flags+=(--total-episodes 3072 --learning-rate 2e-4 --eval-every 6) # still rising
    [ -n "${SEEDS:-}" ] || timed=1,2,3 side_by_side=4,5
    ;;
docstrings) algos=(online_dpo) timed=${SEEDS:-1,2,3} ;;
esac
all() { # all SEEDS
    local model algo own
    for model in "${sizes[@]}"; do
        own=(--model "$model")
        [[ $model != *2.8b* ]] || own+=(--micro-batch-size 4)
        [[ $model != *sft-l ]] || own+=(--total-episodes 2048 --eval-every 8) # three times as long a step
        for algo in "${algos[@]}"; do
            SEEDS=$1 run async_vs_sync async_$algo.py "${own[@]}"
            SEEDS=$1 run async_vs_sync async_$algo.py --max-staleness 0 "${own[@]}"
            [[ $JOBS = 2 || $model = *sft-[sl] ]] || SEEDS=$1 colocate async_vs_sync async_$algo.py "${own[@]}"
        done
    done
}
export JOBS=1
for seed in ${timed//,/ }; do all "$seed"; done # in turn: times drift
export JOBS=2
[ -z "$side_by_side" ] || all "$side_by_side"
draw async_vs_sync
