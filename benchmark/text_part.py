"""Save the text part of a model that also reads images, such as Gemma3ForConditionalGeneration, as a model of its own.

Run: python -m benchmark.text_part MODEL FOLDER
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer


def main(path: str, folder: str) -> None:
    whole = AutoModelForImageTextToText.from_pretrained(path, dtype="auto")
    text = AutoModelForCausalLM.from_config(whole.config.get_text_config())
    text.base_model.load_state_dict(whole.base_model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        difference = (whole(tokens).logits - text(tokens).logits).abs().max().item()
    if not difference < 1e-2:
        raise SystemExit(f"{path}: the text part alone gives other logits, by {difference}")
    text.to(whole.dtype).save_pretrained(folder)
    if whole.generation_config is not None:
        whole.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    print(f"{folder}: {type(text).__name__}, {text.num_parameters():,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
