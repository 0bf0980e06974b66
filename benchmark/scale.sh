#!/usr/bin/env bash
# Figure 5 of the paper: a larger policy bears more off-policyness, a larger reward model does not help. Online DPO.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
batches=1,4,16
[ "$scale" = paper ] || batches+=,64
for model in "${sizes[@]}"; do
    [[ $model != *2.8b* ]] || flags+=(--micro-batch-size 4)
    run scale async_online_dpo.py --max-staleness 0 "${short[@]}" --model "$model" --num-mini-batches $batches
done
run scale async_online_dpo.py --max-staleness 0 "${short[@]}" --reward "$other_reward" --num-mini-batches $batches
[ "$scale" = paper ] || # l again, at a lower rate: at 1e-4 the l of then, of 7.7 M, over-optimised the reward model
    run scale async_online_dpo.py --max-staleness 0 "${short[@]}" --model "${sizes[2]}" --num-mini-batches $batches --learning-rate 4e-5
draw scale
