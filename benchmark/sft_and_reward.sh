#!/usr/bin/env bash
# SFT policy and reward model at the paper's scale, by TRL's command line on 4 GPUs; what follows the task goes to both trainers:
#   bash benchmark/sft_and_reward.sh tldr EleutherAI/pythia-410m-deduped     models/tldr-sft, models/tldr-reward
#   bash benchmark/sft_and_reward.sh no_robots meta-llama/Llama-3.1-8B       models/no_robots-sft, models/no_robots-reward
# What is there is kept: delete the folders to train anew. Rates, epochs and lengths are the paper's; the batches of TL;DR (128),
# the schedule of No Robots and the small pull of the mean reward to 0 are ours.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python task=${1:-} base=${2:-}
case $task in
tldr)
    folder=tasks/tldr pad='<|padding|>' held_out=validation sharding=multi_gpu pairs=
    sft=(--learning_rate 1e-5 --num_train_epochs 1 --max_length 580 --gradient_accumulation_steps 2)
    reward=(--learning_rate 1e-5 --num_train_epochs 1 --max_length 640 --gradient_accumulation_steps 2)
    ;;
no_robots)
    folder=tasks/no-robots pad='<|finetune_right_pad_id|>' held_out=test sharding=fsdp2 pairs="--policy models/no_robots-sft"
    sft=(--learning_rate 5e-6 --num_train_epochs 2 --max_length 4096 --gradient_accumulation_steps 16)
    sft+=(--per_device_train_batch_size 2)
    reward=(--learning_rate 3e-6 --num_train_epochs 1 --max_length 1024 --gradient_accumulation_steps 32)
    reward+=(--per_device_train_batch_size 2)
    ;;
*)
    echo "$0: the task is tldr or no_robots, not '$task'" >&2
    exit 2
    ;;
esac
[ -n "$base" ] || { echo "$0: say which pretrained model, as a name on the Hub or a folder" >&2; exit 2; }
shared=(--pad_token "$pad" --lr_scheduler_type cosine --per_device_train_batch_size 16 --bf16 True --gradient_checkpointing True
    --dataset_test_split "$held_out" --eval_strategy epoch --save_strategy no --report_to none --seed 1
    ${ACCELERATE---accelerate_config $sharding --num_processes 4})
[ -e $folder/sft ] || $python -m benchmark.tasks.$task
[ -e models/$task-sft/config.json ] ||
    .venv/bin/trl sft --model_name_or_path "$base" --dataset_name $folder/sft "${shared[@]}" "${sft[@]}" \
        --output_dir models/$task-sft "${@:3}"
[ -e $folder/preferences ] || $python -m benchmark.tasks.$task $pairs
[ -e models/$task-reward/config.json ] ||
    .venv/bin/trl reward --model_name_or_path models/$task-sft --dataset_name $folder/preferences "${shared[@]}" "${reward[@]}" \
        --center_rewards_coefficient 0.01 --output_dir models/$task-reward "${@:3}"
