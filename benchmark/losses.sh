#!/usr/bin/env bash
# Figure 4 of the paper: losses against off-policyness. N updates on one generated batch, synchronous; and the losses and
# corrections that came later. At N = 1 some are the same (RLOO: the ratio is 1), and at any N those of PPO that differ in where
# the old log-probabilities come from: without lag there is one place. TBA is half of CoPG.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
case $scale in
tiny) every=1,4,16,64 late=4,16,64 ;;
paper) every=1,2,4,8,16 late=2,4,8,16 ;;
esac
run losses async_online_dpo.py --max-staleness 0 "${short[@]}" --dpo-loss dpo,ipo,best_of_k --num-mini-batches $every
run losses async_ppo.py --max-staleness 0 "${short[@]}" --ppo-loss behaviour --num-mini-batches $every
run losses async_ppo.py --max-staleness 0 "${short[@]}" --ppo-loss cispo --num-mini-batches $late
run losses async_rloo.py --max-staleness 0 "${short[@]}" --rloo-loss proximal,asymre --num-mini-batches $every
run losses async_rloo.py --max-staleness 0 "${short[@]}" --rloo-loss vanilla,truncated,topr,copg --num-mini-batches $late
draw losses
