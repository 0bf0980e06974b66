"""Task math-tiny: templated word problems after GSM8K (arXiv 2110.14168), with a reward that checks the answer.

    Ann has 12 apples, buys 7 and loses 2. How many apples are left?  ->  " 12+7=19, 19-2=17\\n#### 17"

Two of every 20 (template, numbers) are held out, so no problem of the other splits has a twin in training. SFT imitates
solutions of pupils who slip in most of the harder steps, each in the manner known from classrooms ("buggy arithmetic",
Brown and Burton 1978): the policy starts at a greedy accuracy of 30 to 50 %, and RL has to find out which habits pay.

    python -m benchmark.tasks.math_tiny        # writes tasks/math-tiny/{data,sft}; about 5 minutes on 2 cores
"""

import hashlib
import operator
import random
import re
from dataclasses import dataclass

import tyro
from datasets import Dataset, DatasetDict, load_from_disk

from benchmark.tasks import common

NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana"]
ITEMS = ["apples", "books", "coins", "eggs", "nuts", "pens", "shells", "stamps"]
# Text, and the chain of operations on {a}, {b}, ... that solves it, applied from left to right.
TEMPLATES = [
    ("{name} has {a} {item} and buys {b} more. How many {item} does {name} have?", "+"),
    ("{name} has {a} {item} and gives {b} to {friend}. How many {item} are left?", "-"),
    ("{name} packs {a} boxes with {b} {item} each. How many {item} is that?", "*"),
    ("{name} has {a} {item}, buys {b} and loses {c}. How many {item} are left?", "+-"),
    ("{name} had {a} {item}, lost {b} and found {c}. How many {item} does {name} have?", "-+"),
    ("{name} buys {a} bags of {b} {item} and finds {c} more. How many {item} is that?", "*+"),
    ("{name} buys {a} bags of {b} {item} and gives {c} to {friend}. How many {item} are left?", "*-"),
    ("{name} puts {a} red and {b} blue {item} in each of {c} boxes. How many {item} is that?", "+*"),
    ("{name} buys {a} bags of {b} {item}, finds {c} and loses {d}. How many {item} are left?", "*+-"),
    ("{a} people are on a bus, {b} get off, {c} get on and {d} get off. How many people are on it?", "-+-"),
]
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
HELD_OUT = {0: "validation", 1: "test"}  # of every 20 (template, numbers); the other 18 are train
TOKENS = r" ?[A-Za-z]+|[\s\S]"  # a word with the space before it, or one character: each digit is its own token


@dataclass
class Args:
    seed: int = 1
    """seed of everything random; of another than 1 the folder is tasks/math-tiny-SEED"""
    train: int = 16_384
    """number of training problems"""
    validation: int = 512
    """number of held-out problems for choosing flags, and as many for results (split test)"""
    slips: float = 0.6
    """probability that a pupil slips in a harder step of a demonstration"""
    updates: int = 1200
    """SFT updates of 64 demonstrations"""


def reward(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """1.0 where the number after #### is that of `reference`, else 0.0."""
    answers = [[re.search(r"#### (\d+)", text) for text in pair] for pair in zip(responses, columns["reference"])]
    return [float(bool(given) and given[1] == wanted[1]) for given, wanted in answers]


def slip(a, operation, b):
    """The result of a pupil's usual mistake in the step a operation b, or None where the step is an easy one."""
    if operation == "+" and a % 10 + b % 10 > 9:
        return a + b - 10  # forgets the carry
    if operation == "-" and a % 10 < b % 10:
        return 10 * abs(a // 10 - b // 10) + b % 10 - a % 10  # takes the smaller digit from the larger, never borrows
    if operation == "*" and a * b > 20:
        return a * b - a  # a neighbour in the multiplication table
    return None


def solution(numbers, operations, slips, rng):
    """The solution of a pupil who slips in a share `slips` of the harder steps and goes on with what came out."""
    steps, result = [], numbers[0]
    for operation, number in zip(operations, numbers[1:]):
        before, wrong = result, slip(result, operation, number)
        slipped = wrong is not None and rng.random() < slips
        result = wrong if slipped else abs(OPERATORS[operation](before, number))
        steps.append(f"{before}{operation}{number}={result}")
    return f" {', '.join(steps)}\n#### {result}"


def problem(rng, slips):
    """One random problem: (query, reference, demonstration, key), where the key is its (template, numbers)."""
    index = rng.randrange(len(TEMPLATES))
    text, operations = TEMPLATES[index]
    while True:  # until every step's result is small and positive
        small = [operations[0] == "*"] + [operation == "*" for operation in operations]
        numbers = [rng.randint(2, 9 if s else 20) for s in small]
        results = [numbers[0]]
        for operation, number in zip(operations, numbers[1:]):
            results.append(OPERATORS[operation](results[-1], number))
        if all(1 <= result <= 99 for result in results):
            break
    name, friend = rng.sample(NAMES, 2)
    query = text.format(name=name, friend=friend, item=rng.choice(ITEMS), **dict(zip("abcd", numbers)))
    return query, solution(numbers, operations, 0, rng), solution(numbers, operations, slips, rng), f"{index} {numbers}"


def problems(split, size, seed, slips):
    """`size` problems of a split; which split a problem belongs to depends on its (template, numbers) only."""
    rng, rows = random.Random(f"{split} {seed}"), []
    while len(rows) < size:
        query, reference, demonstration, key = problem(rng, slips)
        if HELD_OUT.get(hashlib.sha256(key.encode()).digest()[0] % 20, "train") == split:
            rows.append({"query": query, "reference": reference, "demonstration": demonstration})
    return Dataset.from_list(rows)


def accuracy(model, tokenizer, data, temperature=0.01, samples=1):
    """Share of problems that at least one of `samples` responses solves; temperature 0.01 is as good as greedy."""
    best = [0.0] * len(data["query"])
    for _ in range(samples):
        responses, _ = common.sample(model, tokenizer, data["query"], temperature, 48)
        best = [max(b, r) for b, r in zip(best, reward(data["query"], responses, reference=data["reference"]))]
    return sum(best) / len(best)


def main(args: Args):
    """Prepare the folder, stage by stage."""
    task = common.Preparation("math-tiny", args)
    common.repeatable(threads=2)
    if task.done:
        return

    def data(folder):
        sizes = {"train": args.train, "validation": args.validation, "test": args.validation}
        splits = {name: problems(name, size, args.seed, args.slips) for name, size in sizes.items()}
        DatasetDict(splits).save_to_disk(folder)
        return {name: len(split) for name, split in splits.items()}

    def sft(folder):
        common.set_seed(args.seed)
        train, validation = (load_from_disk(task.folder / "data")[split][:] for split in ("train", "validation"))
        tokenizer = common.split_tokenizer(train["query"] + train["reference"], TOKENS)
        model = common.small_llama(tokenizer, hidden=128, layers=4, intermediate=384, max_positions=128)
        loss = common.sft(model, tokenizer, train["query"], train["demonstration"], args.updates, 64, 2e-3)
        common.save(folder, model, tokenizer)
        return {
            "loss": loss,
            "parameters": sum(p.numel() for p in model.parameters()),
            "greedy_accuracy": accuracy(model, tokenizer, validation),
            "accuracy_temperature_0.7": accuracy(model, tokenizer, validation, 0.7),
            "pass_at_4_temperature_0.7": accuracy(model, tokenizer, validation, 0.7, 4),
            "pass_at_4_temperature_1.0": accuracy(model, tokenizer, validation, 1.0, 4),
        }

    task.stage("data", data)
    task.stage("sft", sft)
    task.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
