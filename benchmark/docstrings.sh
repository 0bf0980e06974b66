#!/usr/bin/env bash
# Real text, a real pretrained model: TL;DR of docstrings with SmolLM2-135M. About half an hour on 2 cores, most of it to
# prepare (SFT, then a reward model of the same size); each stage is kept, so it may be stopped and started again.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e tasks/docstrings/info.json ] || .venv/bin/python -m benchmark.tasks.docstrings
.venv/bin/python async_online_dpo.py --model tasks/docstrings/sft --dataset tasks/docstrings/data \
    --reward tasks/docstrings/rm --gold benchmark.tasks.docstrings:gold \
    --dtype bfloat16 --batch-size 32 --micro-batch-size 32 --total-episodes 640 --prompt-length 100 --response-length 24 \
    --learning-rate 2e-5 --eval-every 20 --eval-prompts 128 "$@"
