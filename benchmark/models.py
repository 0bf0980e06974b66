"""Which architectures run: python -m benchmark.models [NAME...], about 25 minutes on 2 cores for all of them.

Each is a small model with random weights, written as transformers writes it. async_online_dpo.py trains it for two
batches, in float32 and in bfloat16. The difference is the largest between learner and vLLM over the log-probabilities
of the probe, a fixed text, before and after an update. A model that is refused stands with the line that refuses it.
Writes benchmark/results/models.csv and the table in docs/models.md.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers as hf
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer

SCRIPT = "async_online_dpo.py"
FLAGS = "--gold= --reward=benchmark.models:reward --eval-every=0 --batch-size=32 --total-episodes=64 --temperature=1.0"
FLAGS += " --prompt-length=48 --response-length=12 --learning-rate=1e-3"
RESULTS, PAGE = Path("benchmark/results/models.csv"), Path("docs/models.md")
WORDS = ["red", "green", "blue", "old", "new", "big", "small", "cat", "dog", "bird", "fish", "sees", "likes", "finds"]
WORDS += ["eats", "the", "a", "every", "no", "and", "near", "under"]
COMMON = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.1)
COMMON |= dict(bos_token_id=None, eos_token_id=0, pad_token_id=0)  # pad is EOS, as in many models
GATED = COMMON | dict(intermediate_size=128, num_key_value_heads=2, max_position_embeddings=128)
WINDOW = dict(sliding_window=8)  # tokens: shorter than the prompts
EXPERTS = GATED | dict(num_experts_per_tok=2)
EYES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28)
ARCHITECTURES = {  # class of the configuration, its values
    "Llama": ("LlamaConfig", GATED),
    "Mistral, with a window": ("MistralConfig", GATED | WINDOW),
    "Qwen2": ("Qwen2Config", GATED | dict(tie_word_embeddings=True)),
    "Qwen3": ("Qwen3Config", GATED | dict(head_dim=32)),
    "Gemma": ("GemmaConfig", GATED | dict(head_dim=32)),
    "Gemma 2": ("Gemma2Config", GATED | WINDOW | dict(head_dim=32, query_pre_attn_scalar=32,
                                                      final_logit_softcapping=5.0, attn_logit_softcapping=5.0)),
    "Gemma 3 (text)": ("Gemma3TextConfig", GATED | WINDOW | dict(head_dim=32, query_pre_attn_scalar=32)),
    "Phi": ("PhiConfig", GATED),
    "Phi 3": ("Phi3Config", GATED),
    "GPT-2": ("GPT2Config", COMMON | dict(n_positions=128)),
    "GPT-NeoX": ("GPTNeoXConfig", COMMON | dict(intermediate_size=128, max_position_embeddings=128)),
    "OPT": ("OPTConfig", COMMON | dict(ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=128, init_std=0.1)),
    "Falcon": ("FalconConfig", COMMON | dict(max_position_embeddings=128)),
    "OLMo": ("OlmoConfig", GATED),
    "OLMo 2": ("Olmo2Config", GATED),
    "OLMo 3": ("Olmo3Config", GATED | WINDOW),
    "Granite": ("GraniteConfig", GATED | dict(logits_scaling=8.0, embedding_multiplier=4.0, residual_multiplier=0.5,
                                              attention_multiplier=0.2)),
    "Cohere": ("CohereConfig", GATED | dict(logit_scale=0.25)),
    "Cohere 2": ("Cohere2Config", GATED | WINDOW | dict(logit_scale=0.25)),
    "SmolLM3": ("SmolLM3Config", GATED),
    "StarCoder2": ("Starcoder2Config", GATED | WINDOW),
    "StableLM": ("StableLmConfig", GATED),
    "GLM 4": ("Glm4Config", GATED | dict(head_dim=32)),
    "EXAONE 4": ("Exaone4Config", GATED | WINDOW),
    "Nemotron": ("NemotronConfig", GATED | dict(head_dim=32)),
    "Seed-OSS": ("SeedOssConfig", GATED | dict(head_dim=32)),
    "Bloom": ("BloomConfig", COMMON | dict(n_layer=2, n_head=2)),
    "Mamba": ("MambaConfig", COMMON | dict(state_size=8)),
    "Mixtral (experts)": ("MixtralConfig", EXPERTS | dict(num_local_experts=4)),
    "Qwen3-MoE (experts)": ("Qwen3MoeConfig", EXPERTS | dict(head_dim=32, num_experts=4, moe_intermediate_size=64)),
    "Gemma 3 (text and images)": ("Gemma3Config", dict(
        text_config=GATED | dict(head_dim=32), vision_config=EYES | dict(patch_size=14), mm_tokens_per_image=4,
        image_token_id=64, boi_token_index=63, eoi_token_index=62)),
}  # fmt: skip


def reward(prompts: list[str], responses: list[str], **columns) -> list[float]:
    return [float(len(set(response))) for response in responses]


def write_data(folder: Path) -> None:
    """A byte-level tokenizer and 64 sentences of 6 to 14 words, for all architectures the same."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 15, (64,), generator=g).tolist()
    texts = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=g)) for n in lengths]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>",
                                           pad_token="<|endoftext|>")  # fmt: skip
    tokenizer.save_pretrained(folder / "tokenizer")
    Dataset.from_list([{"query": text} for text in texts]).to_json(folder / "data.jsonl")


def write_model(name: str, folder: Path) -> Path:
    """A model with random weights, beside the tokenizer. Returns its folder."""
    torch.manual_seed(0)
    kind, values = ARCHITECTURES[name]
    tokenizer, path = hf.AutoTokenizer.from_pretrained(folder / "tokenizer"), folder / name.replace(" ", "-")
    values = dict(values)
    if "text_config" in values:
        values["text_config"] = values["text_config"] | {"vocab_size": len(tokenizer)}
        auto = hf.AutoModelForImageTextToText
    else:
        values["vocab_size"], auto = len(tokenizer), hf.AutoModelForCausalLM
    auto.from_config(getattr(hf, kind)(**values)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def train(model: Path, folder: Path, dtype: str) -> tuple[float | None, str]:
    """Two batches. Returns the largest difference between learner and vLLM, or None and the line that refuses."""
    output = folder / f"run-{model.name}-{dtype}"
    flags = [*FLAGS.split(), f"--model={model}", f"--dataset={folder}/data.jsonl", f"--dtype={dtype}"]
    command = [sys.executable, SCRIPT, *flags, f"--output-dir={output}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    if done.returncode == 0:
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return max(record["probe_error"] for record in records), ""
    lines = (done.stdout + done.stderr).strip().splitlines()
    lines = [line for line in lines if not line.startswith("This command goes on")]
    return None, lines[-1].replace(f"{SCRIPT}: ", "").replace(str(model), "MODEL")


def table(rows: list[dict]) -> str:
    """The table of docs/models.md."""
    lines = ["| architecture | runs | difference in float32 | in bfloat16 |", "| --- | --- | --- | --- |"]
    for row in rows:
        shown = [f"{float(row[d]):.1e}" if row[d] else "" for d in ("float32", "bfloat16")]
        line = row["line"].removeprefix("--model MODEL: ").removesuffix(" (docs/models.md lists what runs)")
        lines.append(f"| {row['architecture']} | {'no: ' + line if line else 'yes'} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


def write(rows: dict[str, dict]) -> None:
    """Results and page, in the order of ARCHITECTURES."""
    rows = [rows[name] for name in ARCHITECTURES if name in rows]
    with open(RESULTS, "w") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    before, rest = PAGE.read_text().split("<!-- models -->")
    PAGE.write_text(f"{before}<!-- models -->\n{table(rows)}\n<!-- end -->{rest.split('<!-- end -->')[1]}")


def main(names: list[str]) -> None:
    rows = {}
    if RESULTS.exists():
        with open(RESULTS) as f:
            rows = {row["architecture"]: row for row in csv.DictReader(f)}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        for name in names or ARCHITECTURES:
            model = write_model(name, Path(folder))
            rows[name] = {"architecture": name, "float32": "", "bfloat16": "", "line": ""}
            for dtype in ("float32", "bfloat16"):
                error, line = train(model, Path(folder), dtype)
                rows[name][dtype] = "" if error is None else f"{error:.3g}"
                rows[name]["line"] = rows[name]["line"] or line
                if error is None:
                    break
            print(rows[name], flush=True)
            write(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
