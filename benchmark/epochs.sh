#!/usr/bin/env bash
# Figure 7 of the paper: bound by generation, T epochs on each batch buy win-rate per completion and cost KL.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
run epochs async_online_dpo.py --num-epochs 1,2,3
run epochs async_ppo.py --num-epochs 1,2,3
[ -n "${DRY:-}" ] || $python -m benchmark.plot epochs
