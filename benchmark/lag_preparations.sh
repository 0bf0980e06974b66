#!/usr/bin/env bash
# Does what `lag` finds hang on its one SFT policy and reward model? The default losses and one correction each, on tldr-tiny as
# prepared with seeds 1 to 5: other posts, another policy, another reward model. One run of each, with the same seed.
set -euo pipefail
scales=tiny
. "$(dirname "$0")/scales.sh"
for seed in $(tr , ' ' <<< "${SEEDS:-1,2,3,4,5}"); do
    folder=tasks/tldr-tiny-$seed
    [ "$seed" != 1 ] || folder=tasks/tldr-tiny
    prepare tldr_tiny "$folder/info.json" --seed "$seed"
    own=("${short[@]}" --dataset "$folder/data" --model "$folder/sft-m" --reward "$folder/rm-m")
    for script in async_online_dpo.py async_rloo.py async_ppo.py; do
        SEEDS=$seed run lag_preparations $script "${own[@]}" --max-staleness 0,1,4,16
    done
    SEEDS=$seed run lag_preparations async_rloo.py "${own[@]}" --max-staleness 4,16 --rloo-loss truncated
    SEEDS=$seed run lag_preparations async_ppo.py "${own[@]}" --max-staleness 4,16 --ppo-loss decoupled
done
draw lag_preparations
