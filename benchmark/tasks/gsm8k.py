"""GSM8K (arXiv 2110.14168) as the scripts read it: python -m benchmark.tasks.gsm8k [--dataset FOLDER]

Writes tasks/gsm8k/data with the columns `query`, in the form that `realtreetune/rho-1b-sft-GSM8K` was trained on, and
`reference`, the worked solution with the answer after ####. Needs the Hub, or a folder with the same files.
"""

import re
from dataclasses import dataclass

import tyro
from datasets import DatasetDict, load_dataset


@dataclass
class Args:
    dataset: str = "openai/gsm8k"
    """Hub id, or a folder, with splits train and test and the columns question and answer"""
    name: str | None = "main"
    """configuration of the data set; None for a plain folder"""
    validation: int = 500
    """problems of train that are kept apart for choosing flags"""
    output: str = "tasks/gsm8k/data"
    """folder to write"""


def answer(text: str) -> str | None:
    """The last number after ####, without commas, or None."""
    found = re.findall(r"####\s*(-?[\d,]*\.?\d+)", text)
    return found[-1].replace(",", "") if found else None


def reward(prompts: list[str], responses: list[str], reference: list[str], **columns: list) -> list[float]:
    """1.0 where the response's answer is that of the reference, else 0.0."""
    pairs = zip(map(answer, responses), map(answer, reference))
    return [float(given is not None and float(given) == float(wanted)) for given, wanted in pairs]


def row(record: dict) -> dict[str, str]:
    return {"query": f"[MATH_TASK] Problem:\n{record['question']}\n\nSolution:", "reference": f" {record['answer']}"}


def main(args: Args) -> None:
    data = load_dataset(args.dataset, args.name)
    if not 0 < args.validation < len(data["train"]):
        raise SystemExit(f"gsm8k: --validation {args.validation} must be between 1 and {len(data['train']) - 1}")
    train, validation = data["train"].train_test_split(args.validation, seed=1).values()
    splits = {"train": train, "validation": validation, "test": data["test"]}
    data = DatasetDict({name: split.map(row, remove_columns=split.column_names) for name, split in splits.items()})
    data.save_to_disk(args.output)
    print(f"{args.output}: {', '.join(f'{name} {len(split)}' for name, split in data.items())}")


if __name__ == "__main__":
    main(tyro.cli(Args))
