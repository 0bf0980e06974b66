#!/usr/bin/env bash
# Figure 1 of the paper: win-rate over completions and over time, asynchronous (S = 1) against both synchronous placements, for
# every algorithm and three sizes of the policy; five seeds. At tiny the times are of the first three, and `colocate`, which
# learns what `split` learns to the bit, is run for these only.
# docstrings: real text and a pretrained policy, Online DPO, three seeds; about 80 minutes, and 15 to prepare.
set -euo pipefail
scales="tiny or docstrings or paper"
. "$(dirname "$0")/scales.sh"
export JOBS=1 # its times count
algos=(online_dpo rloo ppo) rounds=(1 2 3 4 5) # in turn: times drift
case $scale in
tiny)
    prepare_sizes
    flags+=(--total-episodes 3072 --learning-rate 2e-4 --eval-every 6) # still rising
    rounds=(1 2 3 4,5)
    ;;
docstrings) algos=(online_dpo) rounds=(1 2 3) ;;
esac
[ -z "${SEEDS:-}" ] || rounds=(${SEEDS//,/ })
for seeds in "${rounds[@]}"; do
    [[ $seeds != *,* ]] || JOBS=2 # no times of these
    for model in "${sizes[@]}"; do
        own=(--model "$model")
        [[ $model != *2.8b* ]] || own+=(--micro-batch-size 4)
        [[ $model != *sft-l ]] || own+=(--learning-rate 8e-5 --total-episodes 2048 --eval-every 4) # moves as far as m (scale.sh)
        for algo in "${algos[@]}"; do
            SEEDS=$seeds run async_vs_sync async_$algo.py "${own[@]}"
            SEEDS=$seeds run async_vs_sync sync_baseline.py --algo $algo "${own[@]}"
            [ $JOBS = 2 ] || SEEDS=$seeds colocate async_vs_sync --algo $algo "${own[@]}"
        done
    done
done
draw async_vs_sync
