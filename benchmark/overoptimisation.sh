#!/usr/bin/env bash
# Over-optimisation: in a long run at a high learning rate the proxy reward keeps rising while the gold win-rate falls.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
[ "$scale" = paper ] || flags+=(--learning-rate 3e-4 --total-episodes 19200 --eval-every 15 --eval-prompts 1024)
[ "$scale" = tiny ] || flags+=(--learning-rate 1e-5 --total-episodes 524288)
run overoptimisation async_online_dpo.py
[ -n "${DRY:-}" ] || $python -m benchmark.plot overoptimisation
