#!/usr/bin/env bash
# Figure 3 once more, with another start of PPO's value model: the SFT policy with a new head instead of the reward model, which is
# the paper's (and the default). How much of PPO's fall with N is the value model's, which has further to go from a worse start?
set -euo pipefail
scales=tiny
. "$(dirname "$0")/scales.sh"
ppo_from() { # ppo_from VALUE_MODEL N[,N...] [FLAG ...]
    run value_model async_ppo.py --max-staleness 0 "${short[@]}" --value-model "tasks/tldr-tiny/$1" --num-mini-batches "$2" "${@:3}"
}
ppo_from sft-m 1 --eval-every 16 # the curve of win-rate against KL
ppo_from sft-m 4,16,64
ppo_from rm-m 1,16
draw off_policyness # the claims stand in one table
