#!/usr/bin/env bash
# What the paper does not show: how much lag each loss bears. Batch t is made by version t - S. With three seeds also S = 4, and
# two losses of RLOO and PPO each, which tell the cost of the lag from that of the clip. Shares runs with off_policyness.sh.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
lagging() { # lagging SCRIPT S[,S...] [FLAG ...]
    run off_policyness "$1" --max-staleness "$2" "${short[@]}" --num-mini-batches 1 "${@:3}"
}
lagging async_online_dpo.py 0,16
lagging async_rloo.py 0,16
lagging async_ppo.py 0 "${curve[@]}" # as in off_policyness.sh
lagging async_ppo.py 16
SEEDS=${SEEDS:-1,2,3}
lagging async_rloo.py 16 --rloo-loss vanilla,truncated
lagging async_ppo.py 16 --ppo-loss recompute,decoupled
for script in async_online_dpo.py async_rloo.py async_ppo.py; do
    lagging $script 4
done
draw lag
