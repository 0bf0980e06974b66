"""No Robots (instructions with responses by people): python -m benchmark.tasks.no_robots

Writes tasks/no-robots/data with the columns `query`, the conversation so far in plain text, and `reference`, the last
answer, as the scripts read it, and tasks/no-robots/sft, the same for TRL. Needs `HuggingFaceH4/no_robots` on the Hub,
or a folder with the same files. After that, with --policy (the SFT policy), it writes tasks/no-robots/preferences: the
person's answer is chosen over a sample of the policy. (What the paper's reward model was trained on is not public.)
"""

from dataclasses import dataclass

import tyro
from datasets import DatasetDict, load_dataset, load_from_disk

from benchmark.tasks.common import write_json_lines


@dataclass
class Args:
    dataset: str = "HuggingFaceH4/no_robots"
    """Hub id, or a folder, with splits train and test and the column messages"""
    policy: str = ""
    """SFT policy whose samples are the rejected responses; empty: no preferences are written"""
    output: str = "tasks/no-robots"
    """folder to write"""
    prompt_length: int = 512
    """longer prompts get no preference, in tokens"""
    response_length: int = 512
    """longest sample, in tokens"""


def row(record: dict) -> dict[str, str]:
    """### User: ... ### Assistant: ..., up to the last answer."""
    *messages, last = record["messages"]
    turns = [f"### {message['role'].capitalize()}:\n{message['content']}\n\n" for message in messages]
    return {"query": "".join(turns) + "### Assistant:\n", "reference": last["content"]}


def preferences(data: DatasetDict, args: Args) -> DatasetDict:
    """The person's answer over a finished sample of the policy, where the two differ."""
    from vllm import LLM, SamplingParams

    length = args.prompt_length + args.response_length
    llm = LLM(args.policy, max_model_len=length, enforce_eager=True)
    tokenizer = llm.get_tokenizer()
    found = {}
    for split, rows in data.items():
        rows = rows.filter(lambda row: len(tokenizer(row["query"])["input_ids"]) <= args.prompt_length)
        sampling = SamplingParams(temperature=0.7, max_tokens=args.response_length, seed=1)
        outputs = llm.generate(rows["query"][:], sampling)
        rows = rows.rename_columns({"query": "prompt", "reference": "chosen"})
        answers = [output.outputs[0] for output in outputs]
        rows = rows.add_column(
            "rejected", [answer.text if answer.finish_reason == "stop" else "" for answer in answers]
        )
        found[split] = rows.filter(lambda row: row["rejected"].strip() not in ("", row["chosen"].strip()))
    return DatasetDict(found)


def main(args: Args) -> None:
    if args.policy:
        write_json_lines(preferences(load_from_disk(f"{args.output}/data"), args), f"{args.output}/preferences")
        return
    data = load_dataset(args.dataset)
    splits = {name: data[name] for name in ("train", "test")}
    data = DatasetDict({name: split.map(row, remove_columns=split.column_names) for name, split in splits.items()})
    data.save_to_disk(f"{args.output}/data")
    write_json_lines(data.rename_columns({"query": "prompt", "reference": "completion"}), f"{args.output}/sft")


if __name__ == "__main__":
    main(tyro.cli(Args))
