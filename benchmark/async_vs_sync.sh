#!/usr/bin/env bash
# Figure 1 of the paper: win-rate over completions and over time, asynchronous (S = 1) against both synchronous placements.
# tiny: Online DPO at three sizes, RLOO and PPO at m. Times are of seeds 1 to 3, one run at a time; 4 to 8 run side by side, for
# their win-rates. `colocate`, which learns what `split` learns, is run for its times, at m.
# docstrings: real text and a pretrained policy, Online DPO. paper: every algorithm and size. Three seeds each.
set -euo pipefail
scales="tiny or docstrings or paper"
. "$(dirname "$0")/scales.sh"
compare() { # compare ALGORITHM MODEL [FLAG ...]
    local seed own=(--model "$2" "${@:3}")
    for seed in $(tr , ' ' <<< "${SEEDS:-1,2,3}"); do # in turn: times drift
        JOBS=1 SEEDS=$seed pair "$1"
        [[ $2 = *sft-[sl] ]] || JOBS=1 SEEDS=$seed colocate async_vs_sync "async_$1.py" "${own[@]}"
    done
    [[ $scale != tiny || -n ${SEEDS:-} ]] || JOBS=2 SEEDS=4,5,6,7,8 pair "$1"
}
pair() {
    run async_vs_sync "async_$1.py" "${own[@]}"
    run async_vs_sync "async_$1.py" --max-staleness 0 "${own[@]}"
}
case $scale in
tiny)
    flags+=(--total-episodes 3072 --eval-every 6) # still rising
    compare online_dpo "${sizes[1]}"
    compare rloo "${sizes[1]}"
    compare ppo "${sizes[1]}"
    compare online_dpo "${sizes[0]}"
    compare online_dpo "${sizes[2]}" --learning-rate 1e-4
    ;;
docstrings) compare online_dpo "${sizes[0]}" ;;
paper)
    for model in "${sizes[@]}"; do
        [[ $model != *2.8b* ]] || flags+=(--micro-batch-size 4)
        for algorithm in online_dpo rloo ppo; do
            compare $algorithm "$model"
        done
    done
    ;;
esac
draw async_vs_sync
