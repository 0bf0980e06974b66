#!/usr/bin/env bash
# Flame graphs of a run of async_rloo.py on math-tiny before and after the two largest changes of speed, as SVG in
# docs/flames/: rows sorted by length (thread "MainThread", the learner), and flat log-probabilities with the loaded objects
# frozen for the garbage collector (thread "generator"). Needs tasks/math-tiny; 12 updates each, 100 samples a second.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -m pip install --quiet py-spy==0.4.3
out=$PWD/docs/flames python=$PWD/.venv/bin/python tasks=$PWD/tasks
mkdir -p "$out"
draw() {  # draw COMMIT NAME
    local tree
    tree=$(mktemp -d)
    git worktree add --quiet --detach "$tree" "$1"
    ln -s "$tasks" "$tree/tasks"
    (cd "$tree" && "${python%/python}/py-spy" record --rate 100 --threads --format flamegraph --output "$out/$2.svg" -- \
        "$python" async_rloo.py --model tasks/math-tiny/sft --dataset tasks/math-tiny/data \
        --reward benchmark.tasks.math_tiny:reward --gold "" --samples-per-prompt 4 --batch-size 256 --total-episodes 3072 \
        --temperature 1.0 --missing-eos-score 0 --prompt-length 64 --response-length 48 --learning-rate 1e-4 --eval-every 0)
    git worktree remove --force "$tree"
}
draw a8efb0b learner-before
draw cae92da learner-after
draw 8adef98 generator-before
draw 1c5e34f generator-after
