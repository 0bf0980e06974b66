#!/usr/bin/env bash
# Figure 7 of the paper: bound by generation, T epochs on each batch buy win-rate per completion and cost KL. tiny is bound by
# learning: there T costs time, and what it shows is the win-rate per completion, before it saturates.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
[ "$scale" = paper ] || flags+=(--total-episodes 2560 --eval-every 2)
SEEDS=${SEEDS:-1,2,3,4,5}
run epochs async_online_dpo.py --num-epochs 1,2,3
run epochs async_ppo.py --num-epochs 1,2,3
draw epochs
