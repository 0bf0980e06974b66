#!/usr/bin/env bash
# Word problems with a verifiable reward, after the paper's GSM8K table: accuracy (eval score) before and after, 3 seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e tasks/math-tiny/info.json ] || .venv/bin/python -m benchmark.tasks.math_tiny
for seed in $(tr , " " <<< "${SEEDS:-1,2,3}"); do
    .venv/bin/python async_online_dpo.py --seed "$seed" --model tasks/math-tiny/sft --dataset tasks/math-tiny/data \
        --reward benchmark.tasks.math_tiny:reward --gold "" \
        --samples-per-prompt 4 --batch-size 256 --total-episodes 7680 --temperature 1.0 --missing-eos-score 0 \
        --prompt-length 64 --response-length 48 --learning-rate 1e-4 --eval-split test --eval-every 10 --eval-prompts 512 "$@"
done
