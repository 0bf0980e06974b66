#!/usr/bin/env bash
# The paper's GSM8K table: accuracy and time, asynchronous and synchronous, three algorithms. tiny: math-tiny; paper: Rho 1B.
# Times are of seeds 1 to 3, one run at a time; tiny: 4 to 8 run side by side, for their accuracy.
set -euo pipefail
task=math_tiny
. "$(dirname "$0")/scales.sh"
case $scale in
tiny) flags+=(--samples-per-prompt 4 --eval-every 6) ;;
paper) # ours: sizes that divide among 3 and 4 learners, PPO's number of updates, an unfinished response counts as wrong
    prepare gsm8k tasks/gsm8k/data
    flags+=(--model realtreetune/rho-1b-sft-GSM8K --dataset tasks/gsm8k/data --reward benchmark.tasks.gsm8k:reward --gold ""
        --reference-column reference --eval-split test --eval-prompts 1308 --missing-eos-score 0 --response-length 512
        --samples-per-prompt 4 --batch-size 1008 --total-episodes 516096)
    dpo=() rloo=(--kl-coef 0.05 --batch-size 240)
    ppo=(--samples-per-prompt 8 --batch-size 288 --total-episodes 131328 --num-epochs 2)
    ;;
esac
all() {
    local algorithm
    for algorithm in online_dpo rloo ppo; do
        run math async_$algorithm.py
        run math async_$algorithm.py --max-staleness 0
    done
}
for seed in $(tr , ' ' <<< "${SEEDS:-1,2,3}"); do # in turn: times drift
    JOBS=1 SEEDS=$seed all
done
[[ $scale != tiny || -n ${SEEDS:-} ]] || JOBS=2 SEEDS=4,5,6,7,8 all
draw math
