#!/usr/bin/env bash
# What the paper does not show: how much lag each loss bears. S in 0, 1, 2, 4, 8, 16: batch t is made by version t - S.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
lag=(--max-staleness 0,1,2,4,8,16)
run lag async_online_dpo.py "${lag[@]}"
run lag async_rloo.py "${lag[@]}"
run lag async_ppo.py "${lag[@]}"
run lag async_rloo.py "${lag[@]}" --rloo-loss vanilla,truncated,copg,tba,topr,asymre
run lag async_ppo.py "${lag[@]}" --ppo-loss recompute,truncated,decoupled,cispo
run lag async_online_dpo.py "${lag[@]}" --dpo-loss ipo,best_of_k
[ -n "${DRY:-}" ] || $python -m benchmark.plot lag
