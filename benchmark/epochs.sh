#!/usr/bin/env bash
# Figure 7 of the paper: bound by generation, T epochs on each batch buy accuracy per completion, cost KL and no time.
# tiny: math-tiny with K = 16, of which the best and the worst response are learnt from: at T = 1 the learner waits.
set -euo pipefail
[[ ${1:-tiny} != tiny ]] || task=math_tiny
. "$(dirname "$0")/scales.sh"
case $scale in
tiny) own=(--samples-per-prompt 16 --eval-every 3 --num-epochs 1,3) ;;
paper) own=(--num-epochs 1,2,3) ;;
esac
for seed in $(tr , ' ' <<< "${SEEDS:-$seeds}"); do # in turn, one run at a time: times count and drift
    JOBS=1 SEEDS=$seed run epochs async_online_dpo.py "${own[@]}"
done
draw epochs
