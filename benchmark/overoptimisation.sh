#!/usr/bin/env bash
# Over-optimisation on tldr-tiny: at a high learning rate the proxy reward keeps rising while the gold win-rate falls.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e tasks/tldr-tiny/info.json ] || .venv/bin/python -m benchmark.tasks.tldr_tiny
for seed in ${SEEDS:-1 2 3}; do
    .venv/bin/python async_online_dpo.py --seed "$seed" --learning-rate 3e-4 --total-episodes 19200 \
        --eval-split test --eval-every 15 --eval-prompts 1024 "$@"
done
