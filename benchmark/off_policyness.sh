#!/usr/bin/env bash
# Figure 3 of the paper: PPO, synchronous, N mini-batches from one policy. As N grows the win-rate falls; all N lie on one
# curve of win-rate against KL. Both learning-rate schedules: per_batch is the paper's. At N = 64 tiny is one batch: offline.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
for n in 1 2 4 8 16 32 64; do
    [ "$scale" = paper ] || short+=(--eval-every $((n < 16 ? 16 / n : 1))) # after 16 updates each
    run off_policyness async_ppo.py --max-staleness 0 "${short[@]}" --num-mini-batches $n --lr-schedule per_batch,per_update
done
draw off_policyness
