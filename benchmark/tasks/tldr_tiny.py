"""tldr-tiny: the paper's controlled TL;DR set-up in miniature, for CPU minutes.

1. Posts state seven facts among noise sentences; reference summaries are human-like: they leave facts out
   (mostly the ones that matter most), sometimes get one wrong, sometimes mention noise.
2. Three small Llamas learn from scratch on 2,500 references, until about where held-out loss is lowest: SFT policies.
3. `gold` scores a summary by rules, from the facts. Training never sees it, except through its labels of
4. pairs of samples of all three policies, from which two proxy reward models learn.

Run: python -m benchmark.tasks.tldr_tiny
     (writes tasks/tldr-tiny/{data,sft-s,sft-m,sft-l,pairs,rm-m,rm-s}/ and info.json, in 2 to 3 minutes on two cores)
"""

import itertools
import json
import random
import statistics
from dataclasses import dataclass
from functools import partial

import torch
import tyro
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark.tasks.common import (
    Preparation,
    repeatable,
    sample,
    save,
    score,
    set_seed,
    sft,
    sft_loss,
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
SIZES = {"s": (64, 1, 128), "m": (64, 2, 64), "l": (96, 3, 256)}  # hidden, layers, intermediate
SFT_STEPS, SFT_LR = {"s": 400, "m": 500, "l": 320}, {"s": 8e-3, "m": 8e-3, "l": 6e-3}  # batches of 32
REWARD_SIZES, RM_PROMPTS, RM_LR = ["m", "s"], 1_000, 4e-3  # prompts of each policy


@dataclass
class Args:
    seed: int = 1
    """seed of the data, the models and the sampling; of another than 1 the folder is tasks/tldr-tiny-SEED"""


def make_row(rng):
    """One post, its reference summary, and the facts as a JSON string."""
    facts = {slot: rng.choice(words) for slot, words in SLOTS.items()}

    def others():
        return {slot: rng.choice([w for w in words if w != facts[slot]]) for slot, words in SLOTS.items()}

    noise = [others() for _ in range(rng.choice([2, 3, 4]))]
    sentences = [s.format(**facts) for s in FACTS] + [rng.choice(NOISE).format(**words) for words in noise]
    rng.shuffle(sentences)
    query = f"SUBREDDIT: {rng.choice(SUBREDDITS)} TITLE: {rng.choice(TITLES)} POST: {' '.join(sentences)} TL;DR:"
    written = dict(facts)
    if rng.random() < WRONG_SLOT:
        slot = rng.choice(list(SLOTS))
        written[slot] = noise[0][slot]
    clauses = [clause.format(**written) for clause, probability in CLAUSES if rng.random() < probability]
    if rng.random() < NOISE_CLAUSE:
        clauses.append(NOISE_SUMMARY.format(**noise[0]))
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
    sizes = {"train": 20_000, "validation": 1_024, "test": 1_024, "demonstrations": 2_500}
    splits = {split: Dataset.from_list([make_row(rng) for _ in range(size)]) for split, size in sizes.items()}
    DatasetDict(splits).save_to_disk(folder)
    return {**sizes, "reference_gold": statistics.mean(gold(None, *columns_of(splits["validation"])))}


def columns_of(rows):
    """The references and facts of some rows, as gold takes them."""
    return list(rows["reference"]), list(rows["facts"])


def build_sft(folder, args, size):
    """Train from scratch; then the loss and the gold win-rate (sampled at 0.7) on 2,048 held-out posts."""
    set_seed(args.seed)
    data = load_from_disk(folder.parent / "data")
    tokenizer = word_tokenizer(vocabulary())
    model = small_llama(tokenizer, *SIZES[size])
    rows, held_out = data["demonstrations"], concatenate_datasets([data["validation"], data["test"]])
    queries, references, facts = list(held_out["query"]), *columns_of(held_out)
    sft(model, tokenizer, list(rows["query"]), list(rows["reference"]), SFT_STEPS[size], 32, SFT_LR[size], muon=True)
    save(folder, model, tokenizer)
    with torch.no_grad():
        loss = sft_loss(model, tokenizer, queries, references)(range(len(queries)))
    numbers = {"parameters": model.num_parameters(), "held_out_loss": round(loss.item(), 3)}
    responses, ended = sample(model, tokenizer, queries, 0.7, MAX_NEW_TOKENS)
    wins = [a > b for a, b in zip(gold(None, responses, facts), gold(None, references, facts))]
    return numbers | {"win_rate_T0.7": round(statistics.mean(wins), 3), "ended_T0.7": round(statistics.mean(ended), 3)}


def build_pairs(folder, args):
    """Two samples of each policy on its own prompts, ordered by gold; ties are left out."""
    set_seed(args.seed + 1)
    data = load_from_disk(folder.parent / "data")
    pairs = {}
    for split, prompts in (("train", RM_PROMPTS), ("validation", 320)):
        pairs[split] = []
        for i, size in enumerate(SIZES):
            policy = AutoModelForCausalLM.from_pretrained(folder.parent / f"sft-{size}", dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder.parent / f"sft-{size}")
            rows = data[split].select(range(i * prompts, (i + 1) * prompts))
            texts, _ = sample(policy, tokenizer, list(rows["query"]), 1.0, MAX_NEW_TOKENS, samples=2)
            scores = gold(None, texts, [facts for facts in rows["facts"] for _ in range(2)])
            for query, first, second, a, b in zip(rows["query"], texts[::2], texts[1::2], scores[::2], scores[1::2]):
                chosen, rejected = (first, second) if a > b else (second, first)
                if a != b:
                    pairs[split].append({"prompt": query, "chosen": chosen, "rejected": rejected, "policy": size})
    DatasetDict({split: Dataset.from_list(rows) for split, rows in pairs.items()}).save_to_disk(folder)
    return {split: len(rows) for split, rows in pairs.items()}


def build_rm(folder, args, size):
    """From the SFT policy of its size, on the pairs of all policies; then its accuracy on held-out pairs."""
    set_seed(args.seed + 2)
    pairs = load_from_disk(folder.parent / "pairs")
    source = folder.parent / f"sft-{size}"
    tokenizer = AutoTokenizer.from_pretrained(source)
    train, held_out = ([list(pairs[s][c]) for c in ("prompt", "chosen", "rejected")] for s in ("train", "validation"))
    model = train_reward_model(source, tokenizer, *train, batch=32, lr=RM_LR, muon=True)
    save(folder, model, tokenizer)
    better, worse = (torch.tensor(score(model, tokenizer, held_out[0], texts)) for texts in held_out[1:])
    return {
        "parameters": model.num_parameters(),
        "pair_accuracy": round((better > worse).float().mean().item(), 3),
        "score_mean": round(torch.cat([better, worse]).mean().item(), 3),
        "score_std": round(torch.cat([better, worse]).std().item(), 3),
    }


def main(args):
    task = Preparation("tldr-tiny", args)
    repeatable(threads=2)
    if task.done:
        return
    task.stage("data", partial(build_data, args=args))
    for size in SIZES:
        task.stage(f"sft-{size}", partial(build_sft, args=args, size=size))
    task.stage("pairs", partial(build_pairs, args=args))
    for size in REWARD_SIZES:
        task.stage(f"rm-{size}", partial(build_rm, args=args, size=size))
    task.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
