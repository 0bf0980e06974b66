#!/usr/bin/env bash
# Figure 1 of the paper: win-rate over completions and over time, asynchronous (S = 1) against both synchronous placements.
# tiny: five seeds; Online DPO at three sizes, RLOO and PPO at m. Times are those of m, seeds 1 to 3, one run at a time; all
# others run side by side, for their win-rates. `colocate`, which learns what `split` learns, is run for its times only.
# docstrings: real text and a pretrained policy, Online DPO, three seeds. paper: three.
set -euo pipefail
scales="tiny or docstrings or paper"
. "$(dirname "$0")/scales.sh"
pair() { # pair ALGORITHM [FLAG ...]: asynchronous and synchronous
    run async_vs_sync "async_$1.py" "${@:2}"
    run async_vs_sync "async_$1.py" --max-staleness 0 "${@:2}"
}
in_turn() { # in_turn ALGORITHM [FLAG ...]: seed by seed, as times drift; and `colocate`
    local seed
    for seed in ${timed//,/ }; do
        JOBS=1 SEEDS=$seed pair "$@"
        JOBS=1 SEEDS=$seed colocate async_vs_sync "async_$1.py" "${@:2}"
    done
}
timed=${SEEDS:-1,2,3}
case $scale in
tiny)
    flags+=(--total-episodes 3072 --eval-every 6) # still rising
    for algorithm in online_dpo rloo ppo; do
        in_turn $algorithm --model "${sizes[1]}"
        [ -n "${SEEDS:-}" ] || SEEDS=4,5 pair $algorithm --model "${sizes[1]}"
    done
    pair online_dpo --model "${sizes[0]}"
    pair online_dpo --model "${sizes[2]}" --learning-rate 1e-4
    ;;
docstrings) in_turn online_dpo --model "${sizes[0]}" ;;
paper)
    for model in "${sizes[@]}"; do
        [[ $model != *2.8b* ]] || flags+=(--micro-batch-size 4)
        for algorithm in online_dpo rloo ppo; do
            in_turn $algorithm --model "$model"
        done
    done
    ;;
esac
draw async_vs_sync
