#!/usr/bin/env bash
# Figure 8 of the paper: bound by learning, best and worst of K = 4 samples reach the win-rate of K = 2 in half the updates.
# Equal completions: with K = 4 a batch of 256 gives as many pairs as 128 with K = 2, from half as many updates.
# Times are of seeds 1 to 3, one run at a time. tiny: 4 to 8, and K = 4 at twice the rate, run side by side, for their win-rates.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
case $scale in
tiny) two=(--eval-every 8) four=(--eval-every 4) ;; # K = 2 comes near its plateau
paper) two=() four=() ;;
esac
two() { run samples async_online_dpo.py "${two[@]}" --samples-per-prompt 2 "$@"; }
four() { run samples async_online_dpo.py "${four[@]}" --samples-per-prompt 4 --batch-size "$double" "$@"; }
for seed in $(tr , ' ' <<< "${SEEDS:-1,2,3}"); do # in turn: times drift
    JOBS=1 SEEDS=$seed two
    JOBS=1 SEEDS=$seed four
done
if [ "$scale" = tiny ]; then
    [ -n "${SEEDS:-}" ] || JOBS=2 SEEDS=4,5,6,7,8 two
    [ -n "${SEEDS:-}" ] || JOBS=2 SEEDS=4,5,6,7,8 four
    JOBS=2 SEEDS=${SEEDS:-1,2,3,4,5,6,7,8} four --learning-rate 4e-4
fi
draw samples
