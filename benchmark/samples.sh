#!/usr/bin/env bash
# Figure 8 of the paper: bound by learning, best and worst of K = 4 samples reach the win-rate of K = 2 in half the updates.
# Equal completions: with K = 4 a batch of 256 gives as many pairs as 128 with K = 2, from half as many updates.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
run samples async_online_dpo.py --samples-per-prompt 2
run samples async_online_dpo.py --samples-per-prompt 4 --batch-size "$double"
[ -n "${DRY:-}" ] || $python -m benchmark.plot samples
