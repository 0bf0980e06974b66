#!/usr/bin/env bash
# Figure 4 of the paper: losses against off-policyness. N updates on one generated batch, synchronous; and the losses and
# corrections that came later.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
n=(--num-mini-batches 1,2,4,8,16)
case $scale in
tiny) flags+=(--batch-size 64 --total-episodes 4096 --eval-every 1000) ;;
paper) more=(--save-every 4) ;; # batches: N = 64 has 4
esac
run losses sync_baseline.py --algo online_dpo --dpo-loss dpo,best_of_k,ipo "${n[@]}"
run losses sync_baseline.py --algo rloo --rloo-loss proximal,vanilla,truncated,copg,tba,topr,asymre "${n[@]}"
run losses sync_baseline.py --algo ppo --ppo-loss recompute,behaviour,truncated,decoupled,cispo "${n[@]}"
[ -n "${DRY:-}" ] || $python -m benchmark.plot losses
