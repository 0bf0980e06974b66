# Sourced by the experiments. The first argument is the scale: tiny (the default, 2 cores, no download) or paper (TL;DR,
# 4 GPUs: three learn, one generates). Sets `scale`, and `flags` that all runs of the experiment share.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scale=${1:-tiny} python=.venv/bin/python
case $scale in
tiny)
    [ -n "${DRY:-}" ] || [ -e tasks/tldr-tiny/info.json ] || $python -m benchmark.tasks.tldr_tiny
    flags=(--total-episodes 5120 --learning-rate 1e-4 --eval-split test --eval-every 10 --eval-prompts 512 --seed 1,2,3)
    ;;
paper)
    tldr=vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144
    export LAUNCH=${LAUNCH:-.venv/bin/torchrun --nproc_per_node 3}
    flags=(--dataset "$tldr" --query-column query --reference-column reference_response --eval-split validation
        --model mnoukhov/pythia410m-sft-tldr --reward mnoukhov/pythia410m-rm-tldr6.9b
        --gold cleanrl/EleutherAI_pythia-6.9b-deduped__reward__tldr
        --total-episodes 131072 --batch-size 512 --micro-batch-size 16 --prompt-length 512 --response-length 128
        --temperature 0.7 --learning-rate 3e-6 --eval-every 64 --eval-prompts 6000 --save-every 64 --seed 1,2,3)
    ;;
*)
    echo "$0: the scale is tiny or paper, not $scale" >&2
    exit 2
    ;;
esac
run() { $python -m benchmark.run "$@" "${flags[@]}"; }  # run NAME SCRIPT --flag value[,value...] ...
