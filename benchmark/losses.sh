#!/usr/bin/env bash
# Figure 4 of the paper: losses against off-policyness. N updates on one generated batch, synchronous. At N = 16 also the
# losses and corrections that came later, with three seeds. TBA is half of CoPG. Shares runs with off_policyness.sh.
set -euo pipefail
. "$(dirname "$0")/scales.sh"
case $scale in
tiny) batches=1,4,16,64 few=1,16,64 ;;
paper) batches=1,2,4,8,16 few=$batches ;;
esac
updates() { # updates SCRIPT N[,N...] [FLAG ...]
    run off_policyness "$1" --max-staleness 0 "${short[@]}" --num-mini-batches "$2" "${@:3}"
}
updates async_online_dpo.py $batches
updates async_rloo.py $batches
updates async_ppo.py 1 "${curve[@]}" # as in off_policyness.sh
updates async_ppo.py "${batches#1,}"
updates async_online_dpo.py $few --dpo-loss best_of_k
SEEDS=${SEEDS:-1,2,3}
updates async_online_dpo.py 16 --dpo-loss ipo
updates async_rloo.py 16 --rloo-loss vanilla,truncated,topr,copg,asymre
updates async_ppo.py 16 --ppo-loss cispo
draw losses
