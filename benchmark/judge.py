"""A language model as the gold reward: --gold benchmark.judge:gold compares each response with the reference response.

The judge is any server with OpenAI's API, such as `python -m vllm.entrypoints.openai.api_server --model MODEL`. It is
told by JUDGE_URL (http://127.0.0.1:8000/v1), JUDGE_MODEL (the first that the server names) and JUDGE_API_KEY (none).
The win-rate of the evaluation is the share of prompts where it prefers the response.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from openai import OpenAI

PROMPT = """Below are an instruction and two responses to it. Which one is better: more helpful, more correct, clearer, and no longer than it needs to be?

# Instruction
{query}

# Response A
{a}

# Response B
{b}

Answer with one letter: A or B."""  # noqa: E501


@cache
def server() -> tuple[OpenAI, str]:
    """The client, and the model that judges. Raises SystemExit with one line if the server cannot be reached."""
    url = os.environ.get("JUDGE_URL", "http://127.0.0.1:8000/v1")
    client = OpenAI(base_url=url, api_key=os.environ.get("JUDGE_API_KEY", "none"), timeout=120, max_retries=3)
    try:
        return client, os.environ.get("JUDGE_MODEL") or client.models.list().data[0].id
    except Exception as error:
        raise SystemExit(
            f"benchmark.judge: no judge at JUDGE_URL={url} ({error}): start one, see benchmark/judge.py"
        ) from None


def compare(query: str, response: str, reference: str) -> float:
    """1 if the judge prefers the response, 0 if the reference, 0.5 if they are equal or it says neither A nor B.

    Which of the two stands first is drawn from a hash of both, so that a bias to one place evens out and runs repeat.
    """
    if response.strip() == reference.strip():
        return 0.5
    client, model = server()
    first = hashlib.sha256(f"{query}\0{response}\0{reference}".encode()).digest()[0] % 2 == 0
    a, b = (response, reference) if first else (reference, response)
    prompt = PROMPT.format(query=query.strip(), a=a.strip(), b=b.strip())
    message = [{"role": "user", "content": prompt}]
    reply = client.chat.completions.create(model=model, messages=message, temperature=0.0, max_tokens=4, seed=1)
    letter = (reply.choices[0].message.content or "").strip()[:1]
    return {"A": float(first), "B": float(not first)}.get(letter, 0.5)


def gold(prompts: list[str], responses: list[str], reference: list[str], **columns: list) -> list[float]:
    """compare() for each row, eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(compare, prompts, responses, reference))
