#!/usr/bin/env bash
# What the paper does not show: how much lag each loss bears, and at which learning rate. Batch t is made by version t - S.
# At S = 0 some losses are the same: the ratio is 1. TBA is half of CoPG. Rates: of the default losses, and of one correction each.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
rates=5e-5,2e-4
[ "$scale" != paper ] || rates=1e-6,1e-5
for script in async_online_dpo.py async_rloo.py async_ppo.py; do
    run lag $script "${short[@]}" --max-staleness 0,1,2,4,8,16
done
for script in async_online_dpo.py async_rloo.py async_ppo.py; do
    run lag $script "${short[@]}" --max-staleness 0,16 --learning-rate $rates
done
run lag async_rloo.py "${short[@]}" --max-staleness 0 --rloo-loss asymre
run lag async_online_dpo.py "${short[@]}" --max-staleness 0 --dpo-loss ipo,best_of_k
for late in 16 4 1,2,8; do  # a figure can be drawn after the first
    run lag async_rloo.py "${short[@]}" --max-staleness $late --rloo-loss vanilla,truncated,topr,copg,asymre
    run lag async_ppo.py "${short[@]}" --max-staleness $late --ppo-loss recompute,truncated,decoupled,cispo
    run lag async_online_dpo.py "${short[@]}" --max-staleness $late --dpo-loss ipo,best_of_k
done
run lag async_rloo.py "${short[@]}" --max-staleness 16 --rloo-loss truncated --learning-rate $rates
run lag async_ppo.py "${short[@]}" --max-staleness 16 --ppo-loss decoupled --learning-rate $rates
draw lag
