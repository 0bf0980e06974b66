"""What the task scripts share: tokenizers, small Llamas, SFT, a reward model, sampling, and a cache of stages."""

import dataclasses
import importlib.metadata
import json
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<eos>", "<unk>"]


class Preparation:
    """The folder of one task, of a seed other than 1 NAME-SEED.

    Each stage is built in STAGE.tmp and renamed when complete, so a rerun continues.
    """

    def __init__(self, name, args):
        self.folder = Path("tasks") / (name if args.seed == 1 else f"{name}-{args.seed}")
        self.args = json.loads(json.dumps(dataclasses.asdict(args)))
        transformers.logging.set_verbosity_error()  # a new score head is reported as missing weights
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        self.info = {"args": self.args, "seconds": {}, "numbers": {}}
        path = next((p for p in (self.folder / "info.json", self.folder / "progress.json") if p.exists()), None)
        old = json.loads(path.read_text()) if path else None
        self.done = bool(old) and path.name == "info.json" and old["args"] == self.args
        if self.done:
            print(f"{self.folder} is ready (same arguments); delete it to prepare it again")
        elif old and old["args"] == self.args:
            self.info = old
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def stage(self, name, build):
        """Call build(folder) -> dict of numbers to record, unless the stage's folder is already there."""
        if (self.folder / name).exists():
            return
        print(f"[{name}]", flush=True)
        tmp = self.folder / f"{name}.tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        start = time.time()
        self.info["numbers"][name] = build(tmp)
        self.info["seconds"][name] = round(time.time() - start, 1)
        self._write("progress.json")
        tmp.rename(self.folder / name)
        print(f"[{name}] {self.info['seconds'][name]} s {self.info['numbers'][name]}", flush=True)

    def finish(self):
        """Write info.json, which marks the task as complete."""
        packages = ["torch", "transformers", "tokenizers", "datasets"]
        self.info["versions"] = {"python": sys.version.split()[0]}
        self.info["versions"] |= {package: importlib.metadata.version(package) for package in packages}
        self.info["threads"] = torch.get_num_threads()
        self.info["instructions"] = torch.backends.cpu.get_cpu_capability()
        self.info["command"] = " ".join(sys.orig_argv)
        self._write("info.json")
        (self.folder / "progress.json").unlink(missing_ok=True)

    def _write(self, name):
        tmp = self.folder / f"{name}.tmp"
        tmp.write_text(json.dumps(self.info, indent=2) + "\n")
        tmp.rename(self.folder / name)


def repeatable(threads):
    """Make the bytes of a preparation those of every processor of its maker. To be called before any arithmetic.

    They depend on the number of threads and on the widest instructions (with AVX-512 sums have another order); a model
    as small as these gains nothing from wider ones. AMD with AVX-512 and without: the same. Intel: others (MKL
    has other kernels for it).
    """
    torch.set_num_threads(threads)
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def set_seed(seed):
    """Seed python and torch; every stage calls this itself, so a stage does not depend on those before it."""
    random.seed(seed)
    torch.manual_seed(seed)


def _wrap(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def word_tokenizer(words):
    """One token per whitespace-separated word; decoding joins words with single spaces."""
    vocab = {word: i for i, word in enumerate(SPECIAL + sorted(set(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer)


def split_tokenizer(texts, pattern):
    """One token per match of the pattern, which must cover every character; decoding joins tokens as they are."""
    vocab = SPECIAL + sorted({token for text in texts for token in re.findall(pattern, text)})
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def small_llama(tokenizer, hidden, layers, intermediate, head_dim=32, max_positions=256):
    """An untrained float32 Llama; hidden must be a multiple of head_dim (vLLM wants 32, 64, ...)."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head_dim,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=hidden**-0.5,  # the usual 0.02 suits wide models: a narrow one learns to copy 10 times later
    )
    return LlamaForCausalLM(config)


def pad(sequences, value, left=False):
    """Lists of ids -> (ids, attention mask), both (B, longest)."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), value)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, where] = torch.tensor(sequence)
        mask[row, where] = 1
    return ids, mask


def schedule(optimizer, steps, warmup=20):
    """Linear warm-up, then cosine decay to zero."""
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup))
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], [warmup])


class Muon(torch.optim.Optimizer):
    """Muon (kellerjordan.github.io/posts/muon) in float32: the momentum of a matrix, made orthogonal.

    torch.optim.Muon multiplies in bfloat16, which makes a step here three times as long. `lr` is on AdamW's scale
    (arXiv 2502.16982).
    """

    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - momentum)
                update = orthogonal(weight.grad.lerp(mean, momentum))
                weight.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=0.2 * lr * max(weight.shape) ** 0.5)


def orthogonal(matrix):
    """The matrix with all its singular values moved near 1, by five Newton-Schulz iterations."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = matrix @ matrix.T
        matrix = 3.4445 * matrix + (2.0315 * gram @ gram - 4.7750 * gram) @ matrix
    return matrix


def train(model, rows, loss_of, steps, batch, lr, muon=False, log_every=50):
    """Take `steps` steps on the loss of random mini-batches of `rows` rows; returns the mean of the last losses.

    loss_of(indices) -> scalar. With `muon` the matrices of the layers are Muon's, at `lr`, all else AdamW's, at 3e-3.
    """
    layers = set(model.base_model.layers.parameters()) if muon else set()
    matrices = [weight for weight in model.parameters() if weight in layers and weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight not in layers or weight.ndim != 2]
    optimizers = [torch.optim.AdamW(others, lr=3e-3 if muon else lr, betas=(0.9, 0.95), weight_decay=0.01)]
    optimizers += [Muon(matrices, lr)] if muon else []
    schedules = [schedule(optimizer, steps) for optimizer in optimizers]
    losses, start, order = [], time.time(), []
    model.train()
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(rows).tolist()
        indices, order = order[:batch], order[batch:]
        loss = loss_of(indices)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in [*optimizers, *schedules]:
            part.step()
        losses.append(loss.item())
        if step % log_every == 0 or step == steps:
            recent = sum(losses[-log_every:]) / len(losses[-log_every:])
            print(f"  step {step}/{steps} loss {recent:.3f} {time.time() - start:.0f} s", flush=True)
    model.eval()
    return recent


def sft_loss(model, tokenizer, queries, responses):
    """A function of row numbers: the mean next-token loss on their response tokens and EOS."""
    prompt_ids = tokenizer(queries)["input_ids"]
    response_ids = [ids + [tokenizer.eos_token_id] for ids in tokenizer(responses)["input_ids"]]

    def loss_of(rows):
        ids, _ = pad([prompt_ids[i] + response_ids[i] for i in rows], tokenizer.pad_token_id)
        labels, _ = pad([[-100] * len(prompt_ids[i]) + response_ids[i] for i in rows], -100)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # causal: no mask needed
        counted = labels[:, 1:] != -100  # a large vocabulary's output layer costs much: only where it is needed
        return F.cross_entropy(model.get_output_embeddings()(hidden[counted]).float(), labels[:, 1:][counted])

    return loss_of


def sft(model, tokenizer, queries, responses, *args, **options):
    """train() on sft_loss()."""
    return train(model, len(queries), sft_loss(model, tokenizer, queries, responses), *args, **options)


@torch.no_grad()
def sample(model, tokenizer, queries, temperature, max_new_tokens, samples=1, batch=256):
    """`samples` responses per query in a row, decoded without special tokens, and whether each one ended by itself."""
    texts, ended = [], []
    model.eval()
    for start in range(0, len(queries), batch):
        prompt_ids = tokenizer(queries[start : start + batch])["input_ids"]
        ids, mask = pad(prompt_ids, tokenizer.pad_token_id, left=True)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            num_return_sequences=samples,
        )[:, ids.shape[1] :]
        texts += tokenizer.batch_decode(output, skip_special_tokens=True)
        ended += (output == tokenizer.eos_token_id).any(1).tolist()
    return texts, ended


def rm_scores(model, tokenizer, queries, responses):
    """Scores of query + response + EOS, (B,)."""
    eos = [tokenizer.eos_token_id]
    ids, _ = pad(
        [q + r + eos for q, r in zip(tokenizer(queries)["input_ids"], tokenizer(responses)["input_ids"])],
        tokenizer.pad_token_id,
    )
    return model(input_ids=ids, use_cache=False).logits[:, 0]


@torch.no_grad()
def score(model, tokenizer, queries, responses, batch=256):
    """rm_scores over a whole list, as a list of floats."""
    parts = range(0, len(queries), batch)
    return [
        s for i in parts for s in rm_scores(model, tokenizer, queries[i : i + batch], responses[i : i + batch]).tolist()
    ]


def train_reward_model(sft_folder, tokenizer, queries, chosen, rejected, batch, lr, epochs=1, **options):
    """Pairwise logistic loss from the SFT body, then scaled so that scores have unit standard deviation.

    The small second term of the loss pulls the mean score to zero (the pairwise loss alone leaves it open)."""
    model = AutoModelForSequenceClassification.from_pretrained(sft_folder, num_labels=1, dtype=torch.float32)

    def loss_of(rows):
        texts = [chosen[i] for i in rows] + [rejected[i] for i in rows]
        better, worse = rm_scores(model, tokenizer, [queries[i] for i in rows] * 2, texts).chunk(2)
        return -F.logsigmoid(better - worse).mean() + 0.01 * (better + worse).square().mean()

    train(model, len(queries), loss_of, epochs * (len(queries) // batch), batch, lr, **options)
    scores = torch.tensor(score(model, tokenizer, queries[:512] * 2, chosen[:512] + rejected[:512]))
    model.score.weight.data /= scores.std()
    return model


def save(folder, model, tokenizer):
    """Model and tokenizer in one folder; the end and padding tokens also in generation_config."""
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_json_lines(data, folder):
    """FOLDER/SPLIT.jsonl for each split, which `datasets.load_dataset(FOLDER)` and TRL's command line read."""
    shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
    for split, rows in data.items():
        rows.to_json(f"{folder}.tmp/{split}.jsonl")
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}.tmp").rename(folder)
    print(f"{folder}: {', '.join(f'{split} {len(rows)}' for split, rows in data.items())}")
