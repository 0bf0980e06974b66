"""Checks of a script's input, before it costs time. Each one raises a ValueError: the line that its user will read.

The scripts call them; a script that was copied alone, without this file, runs without them.
"""

import os
import pkgutil
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

MAY_BE_ZERO = ("seed", "max_staleness", "eval_every", "save_every", "kl_coef", "value_coef", "gamma", "gae_lambda")
UNCHECKED = ("missing_eos_score", "baseline_shift", "num_batches", "num_prompts")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
NOT_ON_CPUS = {"bloom": "does not start it", "cohere2": "gives it other log-probabilities than transformers"}


def reason(error: Exception, value: str) -> str:
    """What is wrong with the value of a flag, in one line, from the error of a library."""
    why = " ".join(str(error).split())
    if isinstance(error, BlockingIOError):  # of the lock on an output folder
        return "another run uses it: name a new folder"
    if getattr(error, "errno", None):  # from the operating system
        return why
    if value.startswith("tasks/") and not os.path.exists(value):
        return f"run `python -m benchmark.tasks.{value.split('/')[1].replace('-', '_')}` first"
    if value.startswith(("/", ".")) and not os.path.exists(value):
        return "there is no such file or folder"
    if not isinstance(error, OSError | ValueError | ImportError | AttributeError) or not why:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {why} ({where.filename}:{where.lineno})"
    return why


def numbers(args) -> None:
    """Refuse arguments that no run can have; tyro shows a ValueError as it shows a wrong flag."""
    for name, value in vars(args).items():
        if type(value) in (int, float) and name not in UNCHECKED:
            bound = "0 or more" if name in MAY_BE_ZERO else "above 0"
            if not (value > 0 or (value == 0 and name in MAY_BE_ZERO)):  # NaN is neither: refused
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be {bound}")

    world, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if args.batch_size % (unit := world * args.samples_per_prompt):
        raise ValueError(f"--batch-size {args.batch_size} must be a multiple of {unit}, learners x samples per prompt")
    if args.total_episodes < (generated := args.batch_size * args.num_mini_batches):
        raise ValueError(f"--total-episodes {args.total_episodes} is less than the {generated} of one generated batch")
    if args.placement == "colocate" and args.max_staleness:
        raise ValueError("--placement colocate generates and learns in turn: it needs --max-staleness 0")
    gpus = torch.cuda.device_count()
    learn = gpus - (args.placement == "split" and gpus > 1)  # one is the generator's
    if gpus and here > learn:
        raise ValueError(f"{here} learners need as many GPUs; of {gpus}, {learn} can learn with this --placement")


def models(args, exit_on_error: Callable, reads_tokens_of: Callable) -> None:
    """Refuse models of the wrong kind, of another vocabulary, or that vLLM does not run. No weights are loaded.

    exit_on_error and reads_tokens_of are the script's functions of these names.
    """
    with exit_on_error("model", args.model):
        config, tokenizer = read(args.model)
        language_model(args, config, tokenizer)
    values = ""  # the start of PPO's value model
    if hasattr(args, "value_model"):
        values = args.value_model or (args.model if ":" in args.reward else args.reward)
    judges = dict(reward=args.reward, gold=args.gold if args.eval_every else "", value_model=values)
    for name, path in judges.items():
        with exit_on_error(name.replace("_", "-"), path):
            if ":" in path and name != "value_model":
                pkgutil.resolve_name(path)
            elif path or name == "reward":
                config, own = read(path)
                if name == "value_model" and not reads_tokens_of(own, tokenizer):
                    raise ValueError(
                        "it has another vocabulary than the policy, whose tokens it must read: name another "
                        "(without --value-model it is the reward model)"
                    )
                is_classifier = "SequenceClassification" in str(config.architectures) and config.num_labels == 1
                if name != "value_model" and not is_classifier:
                    raise ValueError(
                        f"it is a {config.architectures} with {config.num_labels} labels: a judge must be "
                        f"a sequence classifier with one label, or a function as module:function"
                    )


def read(path: str) -> tuple:
    """Configuration and tokenizer of a model."""
    if os.path.exists(f"{path}/adapter_config.json"):
        raise ValueError("it is an adapter: merge it into its base model, and save that with its tokenizer")
    if os.path.isdir(path) and not any("token" in name or "vocab" in name for name in os.listdir(path)):
        raise ValueError("it has no tokenizer: save its own there")
    config, tokenizer = (kind.from_pretrained(path, trust_remote_code=False) for kind in (AutoConfig, AutoTokenizer))
    words = [word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens][:20]
    if not any(tokenizer(words, add_special_tokens=False).input_ids):
        raise ValueError(f"its tokenizer, a {type(tokenizer).__name__}, makes no tokens of its own words")
    return config, tokenizer


def language_model(args, config, tokenizer) -> None:
    """Refuse a policy that is no language model, reads more than text, is too short, or does not run in vLLM."""
    if "SequenceClassification" in str(config.architectures):
        raise ValueError(f"it is a {config.architectures}: a policy must be a language model")
    if hasattr(config, "text_config"):
        raise ValueError(
            f"it reads more than text: python -m benchmark.text_part {args.model} FOLDER saves its text part as a model"
        )
    if not torch.cuda.is_available() and any(getattr(config, name, 0) for name in EXPERTS):
        raise ValueError("on CPUs, vLLM 0.32 cannot replace the weights of a mixture of experts")
    if not torch.cuda.is_available() and config.model_type in NOT_ON_CPUS:
        raise ValueError(f"on CPUs, vLLM 0.32 {NOT_ON_CPUS[config.model_type]} (docs/models.md lists what runs)")
    longest, limit = args.prompt_length + args.response_length + 1, getattr(config, "max_position_embeddings", None)
    if 0 < (limit or 0) < longest:
        raise ValueError(f"it reads {limit} tokens; --prompt-length and --response-length need {longest}")


def prompts(args, use: str, texts: list[str], ids: list[list[int]], rows: list[int], tokenizer) -> str:
    """How many prompts fit, in words. Refuse too few, and a token that has no embedding.

    texts, ids: of every row of the data set, its text and its token ids; rows: the indices of those that fit.
    """
    fit = f"{len(rows)} of {len(ids)} prompts fit --prompt-length {args.prompt_length}"
    if "" in texts:
        fit += f"; {texts.count('')} have no text or no reference, such as row {texts.index('')}"
    fewest = int(os.environ.get("WORLD_SIZE", 1)) if use == "eval" else max(2, args.num_prompts)
    if len(rows) < fewest:
        raise ValueError(f"{fit}; {fewest} are needed")
    size, row = AutoConfig.from_pretrained(args.model).vocab_size, max(rows, key=lambda row: max(ids[row]))
    if (largest := max(ids[row])) >= size:
        raise ValueError(
            f"row {row} has token {largest}, {tokenizer.decode([largest])}, and --model {args.model} has "
            f"embeddings for {size} tokens only: leave it out, or train an embedding for it"
        )
    return fit


@torch.no_grad()
def forward_pass(model: nn.Module, prompts: list[list[int]], responses: list[list[int]], logprobs: Tensor) -> None:
    """Refuse a model that computes something else after padding, and from a prompt's cache, than for a plain row.

    logprobs (n, R): what the learner computed for the responses, token ids, after the prompts.
    """
    for prompt, response, row in zip(prompts, responses, logprobs):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
        plain = -F.cross_entropy(logits, torch.tensor(response), reduction="none")
        if not torch.allclose(plain, row[: len(plain)], rtol=0, atol=0.01):
            raise ValueError(f"{type(model).__name__} computes something else after padding or from a cache")


def rewards(args, reward: Callable, data, end_ids: list[int]) -> None:
    """Try the reward on the two longest prompts, with responses as long as they may be."""
    longest = sorted(range(len(data)), key=[-len(ids) for ids in data["input_ids"]].__getitem__)[:2]
    queries = data[longest]["input_ids"]
    responses = [(query * args.response_length)[: args.response_length - 1] + end_ids[:1] for query in queries]
    reward(queries, responses, data[longest], 1)


def first_batch(args, scores: Tensor, mean_length: float) -> str:
    """What to warn of if a first batch teaches nothing, else an empty text. scores: (N,)."""
    by_prompt = scores.view(-1, args.samples_per_prompt)
    if mean_length == args.response_length and (scores == args.missing_eos_score).all():
        return "Warning: no response of the first batch ended: is --response-length too short?"
    if args.samples_per_prompt > 1 and by_prompt.amax(1).equal(by_prompt.amin(1)):
        return "Warning: in the first batch all scores of a prompt are equal: does the reward tell responses apart?"
    return ""
