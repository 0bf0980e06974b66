# Sourced by the experiments. The first argument is the scale: tiny (the default, 2 cores, no download) or paper (TL;DR,
# 4 GPUs: three learn and one generates, hence 504 completions an update, not 512). Sets `scale`, `sizes` of the policy,
# and `flags` that all runs of an experiment share; what a run names itself comes after them and wins.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scale=${1:-tiny} python=.venv/bin/python
case $scale in
tiny)
    [ -n "${DRY:-}" ] || [ -e tasks/tldr-tiny/info.json ] || $python -m benchmark.tasks.tldr_tiny
    sizes=(tasks/tldr-tiny/sft-s tasks/tldr-tiny/sft-m tasks/tldr-tiny/sft-l)
    other_reward=tasks/tldr-tiny/rm-s double=256
    flags=(--total-episodes 5120 --learning-rate 1e-4 --eval-split test --eval-every 10 --eval-prompts 512 --seed 1,2,3)
    ;;
paper)
    tldr=vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144
    sizes=(mnoukhov/pythia410m-sft-tldr mnoukhov/pythia1b-sft-tldr mnoukhov/pythia2.8b-sft-tldr)
    other_reward=mnoukhov/pythia2.8b-rm-tldr6.9b double=1008
    export LAUNCH=${LAUNCH:-.venv/bin/torchrun --nproc_per_node 3}
    flags=(--dataset "$tldr" --query-column query --reference-column reference_response --eval-split validation
        --model mnoukhov/pythia410m-sft-tldr --reward mnoukhov/pythia410m-rm-tldr6.9b
        --gold cleanrl/EleutherAI_pythia-6.9b-deduped__reward__tldr
        --total-episodes 131072 --batch-size 504 --micro-batch-size 16 --prompt-length 512 --response-length 128
        --temperature 0.7 --learning-rate 3e-6 --eval-every 64 --eval-prompts 6000 --save-every 64 --seed 1,2,3)
    ;;
*)
    echo "$0: the scale is tiny or paper, not $scale" >&2
    exit 2
    ;;
esac
prepare_sizes() {  # of the policy and the reward model, 12 minutes
    [ "$scale" = paper ] || [ -n "${DRY:-}" ] || [ -e tasks/tldr-tiny/rm-s ] ||
        $python -m benchmark.tasks.tldr_tiny --sizes s m l --reward-sizes s m
}
colocate() {  # run NAME with the synchronous baseline, placement colocate: at paper scale all four GPUs learn
    LAUNCH=${LAUNCH:+${LAUNCH/nproc_per_node 3/nproc_per_node 4}} run "$1" sync_baseline.py --placement colocate "${@:2}"
}
run() { $python -m benchmark.run "$1" "$2" "${flags[@]}" "${@:3}"; }  # run NAME SCRIPT --flag value[,value...] ...
