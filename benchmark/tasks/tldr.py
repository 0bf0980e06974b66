"""TL;DR for SFT and reward modelling, as TRL reads it: python -m benchmark.tasks.tldr

Writes tasks/tldr/sft (columns `prompt` and `completion`) and tasks/tldr/preferences (`prompt`, `chosen`, `rejected`,
labelled by the gold reward model) as JSON lines. Needs the Hub, or folders with the same files. The RL scripts read the
first of the two data sets as it is.
"""

from dataclasses import dataclass

import tyro
from datasets import DatasetDict, load_dataset

from benchmark.tasks.common import write_json_lines

END = "<|endoftext|>"


@dataclass
class Args:
    dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    """posts with the summary of a person: columns query and reference_response"""
    preferences: str = "mnoukhov/summarize_from_feedback_oai_preprocessing_1706381144_relabel_pythia6.9b"
    """pairs of summaries: columns prompt (or query), chosen and rejected"""
    output: str = "tasks/tldr"
    """folder to write"""


def demonstration(record: dict) -> dict[str, str]:
    """TRL adds the end-of-text token to a completion itself."""
    return {"prompt": record["query"], "completion": record["reference_response"].removesuffix(END)}


def pair(record: dict) -> dict[str, str]:
    chosen, rejected = (record[name].removesuffix(END) for name in ("chosen", "rejected"))
    return {"prompt": record.get("prompt") or record["query"], "chosen": chosen, "rejected": rejected}


def main(args: Args) -> None:
    for name, path, row in (("sft", args.dataset, demonstration), ("preferences", args.preferences, pair)):
        data = load_dataset(path)
        splits = {split: data[split] for split in ("train", "validation")}
        columns = {split: rows.column_names for split, rows in splits.items()}
        rows = DatasetDict({split: rows.map(row, remove_columns=columns[split]) for split, rows in splits.items()})
        write_json_lines(rows, f"{args.output}/{name}")


if __name__ == "__main__":
    main(tyro.cli(Args))
