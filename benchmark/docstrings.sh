#!/usr/bin/env bash
# Real text, a real pretrained model: TL;DR of docstrings with SmolLM2-135M. On 2 cores about 15 minutes to prepare (SFT,
# then a reward model of the same size; each stage is kept, so it may be stopped and started again) and 12 for each seed.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e tasks/docstrings/info.json ] || .venv/bin/python -m benchmark.tasks.docstrings
for seed in $(tr , " " <<< "${SEEDS:-1}"); do
    .venv/bin/python async_online_dpo.py --seed "$seed" --model tasks/docstrings/sft --dataset tasks/docstrings/data \
        --reward tasks/docstrings/rm --gold benchmark.tasks.docstrings:gold --dtype bfloat16 \
        --batch-size 32 --micro-batch-size 8 --total-episodes 1920 --prompt-length 100 --response-length 24 \
        --learning-rate 2e-5 --eval-split test --eval-every 20 "$@"
done
