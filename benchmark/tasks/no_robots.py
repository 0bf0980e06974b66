"""No Robots (instructions with responses by people) as the scripts read it: python -m benchmark.tasks.no_robots

Writes tasks/no-robots/data with the columns `query`, the conversation so far in plain text, and `reference`, the last
answer. Needs `HuggingFaceH4/no_robots` on the Hub, or a folder with the same files.
"""

from dataclasses import dataclass

import tyro
from datasets import DatasetDict, load_dataset


@dataclass
class Args:
    dataset: str = "HuggingFaceH4/no_robots"
    """Hub id, or a folder, with splits train and test and the column messages"""
    output: str = "tasks/no-robots/data"
    """folder to write"""


def row(record: dict) -> dict[str, str]:
    """### User: ... ### Assistant: ..., up to the last answer."""
    *messages, last = record["messages"]
    turns = [f"### {message['role'].capitalize()}:\n{message['content']}\n\n" for message in messages]
    return {"query": "".join(turns) + "### Assistant:", "reference": f"\n{last['content']}"}


def main(args: Args) -> None:
    data = load_dataset(args.dataset)
    splits = {name: data[name] for name in ("train", "test")}
    data = DatasetDict({name: split.map(row, remove_columns=split.column_names) for name, split in splits.items()})
    data.save_to_disk(args.output)
    print(f"{args.output}: {', '.join(f'{name} {len(split)}' for name, split in data.items())}")


if __name__ == "__main__":
    main(tyro.cli(Args))
