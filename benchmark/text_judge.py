"""A reward model of another family than the policy: it reads the text, with its own tokenizer and chat template.

The scripts make one for a --reward or --gold that does not read the policy's tokens. Each text is read alone, so that
no score depends on padding, and the model's own head gives the score.
"""

import torch
from torch import nn


def messages(query: str | list[dict]) -> list[dict]:
    """A prompt as messages, without empty fields and without the assistant's at the end, which is the reference."""
    if isinstance(query, str):
        return [{"role": "user", "content": query}]
    query = query[:-1] if query[-1]["role"] == "assistant" else query
    return [{key: value for key, value in message.items() if value is not None} for message in query]


class TextJudge:
    """Called with queries, prompts and responses, it returns a score for each response.

    model: a sequence classifier with one label, causal or encoder; tokenizer: its own; dtype: to compute in.
    """

    def __init__(self, model: nn.Module, tokenizer, device: torch.device, dtype: str):
        self.model, self.tokenizer, self.device, self.dtype = model, tokenizer, device, dtype
        if hasattr(model, "score"):  # causal: its forward() would take an EOS that is the pad token for padding
            model.config.pad_token_id = None

    def token_ids(self, queries: list, prompts: list[str], responses: list[str]) -> list[list[int]]:
        """In the chat template, where a query of text is the user's message; without one an encoder reads a pair of
        texts, and a causal model both as one text, which its EOS ends. Of messages these get the contents.
        """
        chats = [messages(query) for query in queries]
        if self.tokenizer.chat_template:
            chats = [[*chat, {"role": "assistant", "content": text}] for chat, text in zip(chats, responses)]
            return self.tokenizer.apply_chat_template(chats, return_dict=False)
        prompts = [
            prompt if isinstance(query, str) else "".join(message["content"] + "\n" for message in chat)
            for query, prompt, chat in zip(queries, prompts, chats)
        ]
        if not hasattr(self.model, "score"):
            return self.tokenizer(prompts, responses).input_ids
        # Some tokenizers leave out a text's first space when they decode it, so there is always one in between.
        texts = [f"{prompt.rstrip(' ')} {response.lstrip(' ')}" for prompt, response in zip(prompts, responses)]
        ids = self.tokenizer(texts).input_ids
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return [row if row[-1:] == end else row + end for row in ids]

    @torch.no_grad()
    def __call__(self, queries: list, prompts: list[str], responses: list[str], **columns) -> list[float]:
        rows, scores = self.token_ids(queries, prompts, responses), []
        most = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 10**9))
        if max(map(len, rows)) > most:
            raise ValueError(f"a text of {max(map(len, rows))} tokens is longer than the {most} that the judge reads")
        for row in rows:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
                logits = self.model(input_ids=torch.tensor([row], device=self.device)).logits  # (1, 1)
            scores.append(logits.item())
        return scores
