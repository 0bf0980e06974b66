#!/usr/bin/env bash
# The paper's chatbot: Online DPO of LLaMA 3.1 8B on No Robots, judged by a language model against the human response. Only at
# the scale `paper`: 8 GPUs, 7 learn and one generates. The paper's SFT policy and reward model are not public:
# `bash benchmark/sft_and_reward.sh no_robots meta-llama/Llama-3.1-8B` makes them. The judge is at JUDGE_URL, see benchmark/judge.py.
# 252 completions an update instead of 256.
set -euo pipefail
LEARNERS=${LEARNERS:-7} scales=paper
. "$(dirname "$0")/scales.sh" "${1:-paper}"
dpo=()
prepare no_robots tasks/no-robots/data
flags+=(--model models/no_robots-sft --reward models/no_robots-reward
    --dataset tasks/no-robots/data --reference-column reference --eval-split test --eval-prompts 490
    --gold benchmark.judge:gold --total-episodes 100000 --batch-size 252 --micro-batch-size 2
    --response-length 1024 --learning-rate 8e-7 --beta 0.03 --missing-eos-score -10 --timeout 3600)
SEEDS=${SEEDS:-1}
run chatbot async_online_dpo.py --max-staleness 1,0
draw chatbot
