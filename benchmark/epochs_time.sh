#!/usr/bin/env bash
# Figure 7 of the paper, its time: bound by generation, T epochs on each batch cost none. On math-tiny with K = 16, where the
# best and the worst response are learnt from: at T = 1 the learner waits for most of a step. Scale paper: epochs.sh.
set -euo pipefail
scales=tiny task=math_tiny
. "$(dirname "$0")/scales.sh"
export JOBS=1 # its times count
for seed in $(tr , ' ' <<< "${SEEDS:-1,2,3,4,5}"); do # in turn: times drift
    SEEDS=$seed run epochs_time async_online_dpo.py --samples-per-prompt 16 --eval-every 3 --num-epochs 1,2,3
done
draw epochs_time
