#!/usr/bin/env bash
# Figure 3 of the paper: PPO, synchronous, N mini-batches from one policy. As N grows the win-rate falls; all N lie on one
# curve of win-rate against KL. Both learning-rate schedules: per_batch is the paper's. At N = 64 tiny is one batch: offline.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
case $scale in
tiny) flags+=(--batch-size 64 --total-episodes 4096 --eval-every 1000) ;;
paper) more=(--save-every 4) ;; # batches: N = 64 has 4
esac
for n in 1 2 4 8 16 32 64; do
    run off_policyness sync_baseline.py --algo ppo --num-mini-batches $n --lr-schedule per_batch,per_update
done
[ -n "${DRY:-}" ] || $python -m benchmark.plot off_policyness
