#!/usr/bin/env bash
# Long runs at a high learning rate: the proxy reward keeps rising while the gold win-rate falls. Gold and proxy against KL.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
case $scale in
tiny) flags+=(--learning-rate 3e-4 --total-episodes 19200 --eval-every 15) ;;
paper) flags+=(--learning-rate 1e-5 --total-episodes 524160) dpo+=(--total-episodes 1048320) ;;
esac
for algorithm in online_dpo rloo ppo; do
    SEEDS=${SEEDS:-1,2,3} run overoptimisation async_$algorithm.py
done
draw overoptimisation
