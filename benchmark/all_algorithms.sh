#!/usr/bin/env bash
# Every algorithm, asynchronous (S=1) and synchronous (split), 3 seeds, equal completions, on tldr-tiny and math-tiny; for
# seed 1 the colocated baseline too. One run at a time, pairs in turn; finished runs are kept, so it may be stopped and
# started again. Writes benchmark/results/all_algorithms.{csv,md}.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -e tasks/tldr-tiny/info.json ] || $python -m benchmark.tasks.tldr_tiny
[ -e tasks/math-tiny/info.json ] || $python -m benchmark.tasks.math_tiny
tldr=(--learning-rate 1e-4 --total-episodes 5120 --eval-prompts 1024)
math=(--learning-rate 1e-4 --total-episodes 7680 --eval-prompts 512 --model tasks/math-tiny/sft --dataset tasks/math-tiny/data
    --reward benchmark.tasks.math_tiny:reward --gold "" --samples-per-prompt 4
    --batch-size 256 --temperature 1.0 --missing-eos-score 0 --prompt-length 64 --response-length 48)
run() { # name, script, flags
    local folder=runs/all_algorithms/$1
    [ -e "$folder/summary.json" ] && return
    rm -rf "$folder"
    $python "$2" --output-dir "$folder" --eval-split test --eval-every 40 "${@:3}"
}
for seed in ${SEEDS:-1 2 3}; do
    for task in tldr math; do
        declare -n flags=$task
        for algo in online_dpo rloo ppo; do
            run "$task-$algo-async-$seed" "async_$algo.py" --seed "$seed" "${flags[@]}"
            run "$task-$algo-split-$seed" sync_baseline.py --algo "$algo" --seed "$seed" "${flags[@]}"
            [ "$seed" != 1 ] || run "$task-$algo-colocate-$seed" sync_baseline.py --algo "$algo" \
                --placement colocate --seed "$seed" "${flags[@]}"
        done
    done
done
$python -m benchmark.table runs/all_algorithms/* > benchmark/results/all_algorithms.csv
$python -m benchmark.summary benchmark/results/all_algorithms.csv > benchmark/results/all_algorithms.md
