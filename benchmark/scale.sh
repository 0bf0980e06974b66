#!/usr/bin/env bash
# Figure 5 of the paper: a larger policy bears more off-policyness, a larger reward model does not help. tiny: no second
# reward model, as the two are equally accurate; RLOO too, which loses more than Online DPO. Shares runs with
# off_policyness.sh.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
updates() { # updates SCRIPT N[,N...] [FLAG ...]
    run off_policyness "$1" --max-staleness 0 "${short[@]}" --num-mini-batches "$2" "${@:3}"
}
case $scale in
tiny)
    large=(--model "${sizes[2]}" --learning-rate 1e-4) # at 2e-4 a seed of it collapses
    for own in "" "--model ${sizes[0]}" "${large[*]}"; do
        updates async_online_dpo.py 1,16,64 $own
        updates async_rloo.py 1,16 $own
    done
    [ -n "${SEEDS:-}" ] || for own in "" "--model ${sizes[0]}" "${large[*]}"; do # this decides the figure
        SEEDS=6,7,8 updates async_online_dpo.py 1,64 $own
    done
    ;;
paper)
    for model in "${sizes[@]}"; do
        own=(--model "$model")
        [[ $model != *2.8b* ]] || own+=(--micro-batch-size 4)
        updates async_online_dpo.py 1,4,16 "${own[@]}"
    done
    updates async_online_dpo.py 1,4,16 --reward "$other_reward"
    ;;
esac
draw scale
