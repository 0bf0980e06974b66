#!/usr/bin/env bash
# Does figure 4 hang on its one SFT policy and reward model? The three algorithms on tldr-tiny as prepared with seeds 1 to 5:
# other posts, another policy, another reward model. One run of each, with the same seed.
set -euo pipefail
scales=tiny
. "$(dirname "$0")/scales.sh"
for seed in $(tr , ' ' <<< "${SEEDS:-$seeds}"); do
    folder=tasks/tldr-tiny-$seed
    [ "$seed" != 1 ] || folder=tasks/tldr-tiny
    prepare tldr_tiny "$folder/info.json" --seed "$seed"
    own=(--max-staleness 0 "${short[@]}" --dataset "$folder/data" --model "$folder/sft-m" --reward "$folder/rm-m")
    for script in async_online_dpo.py async_rloo.py async_ppo.py; do
        SEEDS=$seed run preparations $script "${own[@]}" --num-mini-batches 1,16
    done
done
draw preparations
