"""A task small enough for tests: random weights, random prompts, a rule as reward. `make(folder)` writes it."""

import os

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(60)]


def reward(prompts: list[str], responses: list[str], **columns) -> list[float]:
    """Number of w7 in the response, and a little for variety."""
    return [r.split().count("w7") + 0.01 * len(set(r.split())) for r in responses]


def short_reward(prompts: list[str], responses: list[str], **columns) -> list[float]:
    """A wrong reward function: one score too few."""
    return [0.0] * (len(responses) - 1)


def broken_reward(prompts: list[str], responses: list[str], **columns) -> list[float]:
    return [1 / 0]


def nan_reward(prompts: list[str], responses: list[str], **columns) -> list[float]:
    return [float("nan") if len(responses) > 2 else 0.0 for _ in responses]  # right when it is tried on two rows


def huge_reward(prompts: list[str], responses: list[str], **columns) -> list[float]:
    """Finite, but not the losses that follow."""
    return [3e38 * (-1) ** i for i in range(len(responses))]


def equal_reward(prompts: list[str], responses: list[str], **columns) -> list[float]:
    return [1.0] * len(responses)


calls = 0


def fragile_reward(prompts: list[str], responses: list[str], **columns) -> list[float]:
    """reward, but where $BREAK_RANK names this learner its call for batch 2 fails, before torchrun has restarted it."""
    global calls
    calls += 1
    mine = os.environ.get("BREAK_RANK") == os.environ.get("RANK", "none")
    if mine and calls == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise ValueError(f"broken on rank {os.environ['RANK']}")
    return reward(prompts, responses)


def tokenizer(first=("<pad>", "<eos>", "<unk>", "Q:", "A:")) -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate([*first, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **special)


def make(folder: str) -> str:
    """Write policy/, rm/ and data/ under folder; same bytes every time."""
    shape = dict(
        vocab_size=len(tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    for name, model in (("policy", LlamaForCausalLM), ("rm", LlamaForSequenceClassification)):
        model(LlamaConfig(**shape, num_labels=1)).save_pretrained(os.path.join(folder, name))
        tokenizer().save_pretrained(os.path.join(folder, name))
    generator = torch.Generator().manual_seed(0)

    def text(low: int, high: int) -> str:
        n = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator))

    rows = [{"query": f"Q: {text(4, 12)} A:", "reference": f" {text(2, 8)}"} for _ in range(320)]
    splits = {"train": Dataset.from_list(rows[:256]), "validation": Dataset.from_list(rows[256:])}
    DatasetDict(splits).save_to_disk(os.path.join(folder, "data"))
    return folder
