#!/usr/bin/env bash
# Figure 3 of the paper: PPO, synchronous, N mini-batches from one policy. As N grows the win-rate falls; all N lie on one
# curve of win-rate against KL. At N = 64 tiny is one batch: offline.
# losses, scale and lag share runs with this one, so the results of all four stand in results/off_policyness.csv.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
updates() { run off_policyness async_ppo.py --max-staleness 0 "${short[@]}" --num-mini-batches "$1" "${@:2}"; }
case $scale in
tiny)
    updates 1 "${curve[@]}"
    updates 4,16,64
    [ -n "${SEEDS:-}" ] || SEEDS=6,7,8 updates 1 "${curve[@]}" # whether both lie on one curve needs eight
    [ -n "${SEEDS:-}" ] || SEEDS=6,7,8 updates 16
    ;;
paper)
    updates 1 "${curve[@]}"
    updates 2,4,8,16,32,64
    ;;
esac
draw off_policyness
