#!/usr/bin/env bash
# Figure 8 of the paper: bound by learning, best and worst of K = 4 samples reach the win-rate of K = 2 in half the updates.
# Equal completions: with K = 4 a batch of 256 gives as many pairs as 128 with K = 2, from half as many updates.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
export JOBS=1 # its times count
SEEDS=${SEEDS:-1,2,3,4,5}
case $scale in
tiny) flags+=(--learning-rate 2e-4) two=(--eval-every 8) four=(--eval-every 4 --learning-rate 2e-4,4e-4) ;; # K = 2 comes near its plateau
paper) two=() four=() ;;
esac
for seed in $(tr , ' ' <<< "$SEEDS"); do # in turn: times drift
    SEEDS=$seed run samples async_online_dpo.py "${two[@]}" --samples-per-prompt 2
    SEEDS=$seed run samples async_online_dpo.py "${four[@]}" --samples-per-prompt 4 --batch-size "$double"
done
draw samples
