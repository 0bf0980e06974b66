#!/usr/bin/env bash
# Figure 3 once more, evaluated near-greedily as the paper does (and off_policyness.sh at its scale): how much of the fall hangs
# on how the evaluation samples. Near-greedily every response of so small a policy is one of three templates.
set -euo pipefail
scales=tiny
. "$(dirname "$0")/scales.sh"
run off_policyness_greedy async_ppo.py --max-staleness 0 "${short[@]}" --num-mini-batches 1,4,16,64 --eval-temperature 0.01
draw off_policyness # the claims stand in one table
