"""tldr-tiny: the paper's controlled TL;DR set-up in miniature, for CPU minutes.

1. Posts state seven facts among noise sentences; reference summaries are human-like: they leave facts out
   (mostly the ones that matter most), sometimes get one wrong, sometimes mention noise.
2. A small Llama is trained from scratch on the references of the train split: the SFT policy.
3. `gold` scores a summary by rules, from the facts. Training never sees it, except through its labels of
4. pairs of SFT samples, from which a proxy reward model learns. RL prompts are the same train split.

Run: python -m benchmark.tasks.tldr_tiny   (writes tasks/tldr-tiny/{data,sft-m,rm-m}/ and info.json)
"""

import itertools
import json
import random
import statistics
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import tyro
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark.tasks.common import (
    Preparation,
    repeatable,
    sample,
    save,
    score,
    set_seed,
    sft,
    small_llama,
    train_reward_model,
    word_tokenizer,
)

SLOTS = {
    "actor": "boss sister brother roommate neighbor landlord mother father cousin uncle aunt teacher coach doctor "
    "girlfriend boyfriend wife husband coworker dentist",
    "action": "broke stole lost sold hid burned borrowed ruined returned painted dropped scratched buried flooded "
    "copied mailed",
    "object": "phone car laptop guitar bike jacket camera wallet watch book couch lamp mirror piano tent kayak drone "
    "passport diary necklace blender printer suitcase umbrella",
    "place": "office park school beach gym library airport hospital mall bakery church stadium museum hotel cinema "
    "garage station farm bar zoo",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "feeling": "angry sad guilty nervous confused jealous lonely tired proud ashamed bitter hopeful scared numb "
    "betrayed relieved anxious calm bored shocked",
    "plan": "leave apologize call forgive wait sue move write confess pay complain lie cry travel vote sing fight "
    "quit drive rest",
}
SLOTS = {slot: words.split() for slot, words in SLOTS.items()}
CLASS = {word: slot for slot, words in SLOTS.items() for word in words}

SUBREDDITS = ["r/advice", "r/family", "r/work", "r/relationships", "r/legal", "r/pets"]
TITLES = ["need advice", "what now", "long story", "not sure what to do"]
FACTS = [
    "yesterday my {actor} {action} my {object} .",
    "it happened at the {place} on {day} .",
    "now i feel {feeling} .",
    "should i {plan} ?",
]
NOISE = [
    "by the way my {actor} likes my {object} .",
    "i pass the {place} every {day} .",
    "people say i look {feeling} .",
    "nobody wants me to {plan} .",
]

# The summary: (clause, probability that a reference has it). The clauses gold values most are often left out.
CLAUSES = [
    ("my {actor} {action} my {object}", 1.0),
    ("at the {place}", 0.7),
    ("on {day}", 0.6),
    ("and i feel {feeling}", 0.35),
    ("should i {plan} ?", 0.3),
]
WRONG_SLOT = 0.1  # a reference has one wrong word
NOISE_CLAUSE = 0.15  # a reference mentions noise
NOISE_SUMMARY = "also my {actor} likes my {object}"

# Gold points: for a correct fact the first time, and penalties.
WEIGHTS = {"actor": 0.5, "action": 0.5, "object": 0.5, "place": 0.5, "day": 0.3, "feeling": 1.0, "plan": 1.5}
WRONG, REPEATED, UNGRAMMATICAL = 0.7, 0.7, 0.5
FREE_LENGTH, PER_WORD = 18, 0.2

MAX_NEW_TOKENS = 32
SIZES = {"s": (96, 3, 256), "m": (128, 4, 384), "l": (192, 5, 512)}  # hidden, layers, intermediate
SFT_STEPS, SFT_LR = 500, {"s": 4e-3, "m": 3e-3, "l": 1.5e-3}  # batches of 32
RM_PROMPTS, RM_LR = 3_000, {"s": 1e-3, "m": 5e-4}


@dataclass
class Args:
    seed: int = 1
    """seed of the data, the models and the sampling; of another than 1 the folder is tasks/tldr-tiny-SEED"""
    sizes: list[Literal["s", "m", "l"]] = field(default_factory=lambda: ["m"])
    """policy sizes to prepare (s 0.35M, m 0.9M, l 2.2M parameters)"""
    reward_sizes: list[Literal["s", "m"]] = field(default_factory=lambda: ["m"])
    """reward model sizes to prepare (each starts from the SFT policy of its size; all learn from samples of m)"""
    train_size: int = 20_000
    """posts in the train split (SFT, reward model pairs and RL prompts all come from it)"""
    validation_size: int = 1_024
    """posts in the validation split (for choosing flags), and as many in the test split (for results)"""


def make_row(rng):
    """One post, its reference summary, and the facts as a JSON string."""
    facts = {slot: rng.choice(words) for slot, words in SLOTS.items()}
    noise = {slot: rng.choice([w for w in words if w != facts[slot]]) for slot, words in SLOTS.items()}
    sentences = [s.format(**facts) for s in FACTS]
    sentences += [s.format(**noise) for s in rng.sample(NOISE, rng.choice([1, 2, 3]))]
    rng.shuffle(sentences)
    query = f"SUBREDDIT: {rng.choice(SUBREDDITS)} TITLE: {rng.choice(TITLES)} POST: {' '.join(sentences)} TL;DR:"
    written = dict(facts)
    if rng.random() < WRONG_SLOT:
        slot = rng.choice(list(SLOTS))
        written[slot] = noise[slot]
    clauses = [clause.format(**written) for clause, probability in CLAUSES if rng.random() < probability]
    if rng.random() < NOISE_CLAUSE:
        clauses.append(NOISE_SUMMARY.format(**noise))
    return {"query": query, "reference": " " + " ".join(clauses), "facts": json.dumps(facts)}


def word_classes(text):
    """'my boss broke ...' -> ['^', 'my', 'actor', 'action', ..., '$']."""
    return ["^", *(CLASS.get(word, word) for word in text.split()), "$"]


def grammatical_bigrams():
    """Every pair of neighbouring word classes that some reference can contain."""
    slots = {slot: words[0] for slot, words in SLOTS.items()}
    options = [[c] if p == 1.0 else [c, ""] for c, p in [*CLAUSES, (NOISE_SUMMARY, NOISE_CLAUSE)]]
    texts = (" ".join(parts).format(**slots) for parts in itertools.product(*options))
    return {pair for text in texts for pair in itertools.pairwise(word_classes(text))}


BIGRAMS = grammatical_bigrams()


def gold(prompts, responses, facts, **columns):
    """The true reward of each response: correct facts, minus errors, repetition, bad grammar and length."""
    scores = []
    for response, json_facts in zip(responses, facts):
        correct, words, seen, total = json.loads(json_facts), response.split(), set(), 0.0
        for word in words:
            slot = CLASS.get(word)
            if slot is None:
                continue
            if slot in seen and word == correct[slot]:
                total -= REPEATED
            else:
                total += WEIGHTS[slot] if word == correct[slot] else -WRONG
            if word == correct[slot]:
                seen.add(slot)
        total -= UNGRAMMATICAL * sum(pair not in BIGRAMS for pair in itertools.pairwise(word_classes(response)))
        total -= PER_WORD * max(0, len(words) - FREE_LENGTH)
        scores.append(total)
    return scores


def vocabulary():
    """Every word a post or a summary can contain."""
    clauses = [clause for clause, _ in CLAUSES]
    templates = ["SUBREDDIT: TITLE: POST: TL;DR:", *FACTS, *NOISE, *TITLES, *clauses, NOISE_SUMMARY]
    return [w for text in templates for w in text.split() if "{" not in w] + [*CLASS, *SUBREDDITS]


def build_data(folder, args):
    rng = random.Random(args.seed)
    sizes = {"train": args.train_size, "validation": args.validation_size, "test": args.validation_size}
    splits = {split: Dataset.from_list([make_row(rng) for _ in range(size)]) for split, size in sizes.items()}
    DatasetDict(splits).save_to_disk(folder)
    return {**sizes, "reference_gold": statistics.mean(gold(None, *column_lists(splits["validation"])))}


def column_lists(rows):
    """The references and facts of some rows, as gold takes them."""
    return list(rows["reference"]), list(rows["facts"])


def build_sft(folder, args, size, data):
    """Train from scratch, then the gold win-rate against the references of 512 validation posts."""
    set_seed(args.seed)
    tokenizer = word_tokenizer(vocabulary())
    model = small_llama(tokenizer, *SIZES[size])
    train, validation = data["train"], data["validation"].select(range(512))
    loss = sft(model, tokenizer, list(train["query"]), list(train["reference"]), SFT_STEPS, batch=32, lr=SFT_LR[size])
    save(folder, model, tokenizer)
    references, facts = column_lists(validation)
    numbers = {"parameters": model.num_parameters(), "loss": round(loss, 3)}
    for temperature in (0.01, 0.7):
        responses, ended = sample(model, tokenizer, list(validation["query"]), temperature, MAX_NEW_TOKENS)
        wins = [a > b for a, b in zip(gold(None, responses, facts), gold(None, references, facts))]
        numbers[f"win_rate_T{temperature}"] = round(statistics.mean(wins), 3)
        numbers[f"ended_T{temperature}"] = round(statistics.mean(ended), 3)
    return numbers


def build_rm(folder, args, size, data):
    """Pairs of samples of sft-m labelled by gold (ties dropped), one epoch; accuracy on held-out pairs."""
    set_seed(args.seed + 1)
    source, sampled = (folder.parent / f"sft-{name}" for name in (size, "m"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    policy = AutoModelForCausalLM.from_pretrained(sampled, dtype=torch.float32)

    def pairs(rows):
        queries, facts = list(rows["query"]), list(rows["facts"])
        a, b = (sample(policy, tokenizer, queries, 1.0, MAX_NEW_TOKENS)[0] for _ in range(2))
        labels = zip(gold(None, a, facts), gold(None, b, facts))
        kept = [(q, *((x, y) if gx > gy else (y, x))) for q, x, y, (gx, gy) in zip(queries, a, b, labels) if gx != gy]
        return [list(column) for column in zip(*kept)]

    train = pairs(data["train"].select(range(RM_PROMPTS)))
    queries, chosen, rejected = pairs(data["validation"].select(range(512)))
    model = train_reward_model(source, tokenizer, *train, batch=32, lr=RM_LR[size])
    save(folder, model, tokenizer)
    better, worse = (torch.tensor(score(model, tokenizer, queries, texts)) for texts in (chosen, rejected))
    both = torch.cat([better, worse])
    return {
        "parameters": model.num_parameters(),
        "pairs": len(train[0]),
        "pair_accuracy": round((better > worse).float().mean().item(), 3),
        "score_mean": round(both.mean().item(), 3),
        "score_std": round(both.std().item(), 3),
    }


def main(args):
    task = Preparation("tldr-tiny", args)
    repeatable(threads=1)  # so small a model gains little from two
    if task.done:
        return
    task.stage("data", partial(build_data, args=args))
    data = load_from_disk(task.folder / "data")
    needed = (
        {"m", *args.reward_sizes} if args.reward_sizes else set()
    )  # a reward model starts from the policy of its size
    for size in sorted({*args.sizes, *needed}):
        task.stage(f"sft-{size}", partial(build_sft, args=args, size=size, data=data))
    for size in args.reward_sizes:
        task.stage(f"rm-{size}", partial(build_rm, args=args, size=size, data=data))
    task.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
