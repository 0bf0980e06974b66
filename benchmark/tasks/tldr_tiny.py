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
from dataclasses import dataclass, field
from typing import Literal

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
SIZES = {"s": (96, 3, 256), "m": (192, 4, 512), "l": (384, 5, 896)}  # hidden, layers, intermediate


@dataclass
class Args:
    seed: int = 1
    """seed of the data, the models and the sampling"""
    sizes: list[Literal["s", "m", "l"]] = field(default_factory=lambda: ["m"])
    """policy sizes to prepare (s 0.4M, m 1.8M, l 8.2M parameters)"""
    reward_sizes: list[Literal["s", "m"]] = field(default_factory=lambda: ["m"])
    """reward model sizes to prepare (each starts from the SFT policy of its size)"""
    train_size: int = 20_000
    """posts in the train split (SFT, reward model pairs and RL prompts all come from it)"""
    validation_size: int = 1_024
    """posts in the validation split"""


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
    templates = [*FACTS, *NOISE, *TITLES, *(clause for clause, _ in CLAUSES), NOISE_SUMMARY, "SUBREDDIT: TITLE: POST: TL;DR:"]
    return [w for text in templates for w in text.split() if "{" not in w] + [*CLASS, *SUBREDDITS]
