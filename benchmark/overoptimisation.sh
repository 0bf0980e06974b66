#!/usr/bin/env bash
# Long runs at a high learning rate: the proxy reward keeps rising while the gold win-rate falls. Gold and proxy against KL.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
case $scale in
tiny) flags+=(--learning-rate 3e-4 --total-episodes 19200 --eval-every 15) ;;
paper) flags+=(--learning-rate 1e-5 --total-episodes 524160) ;;
esac
for algo in online_dpo rloo ppo; do
    run overoptimisation async_$algo.py
done
if [ "$scale" = tiny ]; then # with hardly a KL penalty
    run overoptimisation async_rloo.py --kl-coef 0.005
    run overoptimisation async_ppo.py --kl-coef 0.005
fi
draw overoptimisation
