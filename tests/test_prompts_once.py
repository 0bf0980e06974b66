"""A prompt computed once for its K responses, and micro-batches on two threads: against each row by itself. No vLLM."""

import copy
import os
import random
import types

import pytest
import torch
import transformers as hf
from transformers import AutoTokenizer

import async_online_dpo as script
import async_ppo
from tests import tiny
from tests.test_algorithm import ALONE, DATA, learner_of, make_args, make_rollout, random_scores

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, eos_token_id=1)
GATED = SMALL | dict(intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None)
LAYERS = ["sliding_attention", "full_attention"]
CONFIGS = {
    "llama": hf.LlamaConfig(**GATED),
    "qwen2": hf.Qwen2Config(**GATED),
    "qwen3": hf.Qwen3Config(**GATED, head_dim=8),
    "gpt2": hf.GPT2Config(**SMALL, n_positions=64, bos_token_id=None),
    "gpt_neox": hf.GPTNeoXConfig(**SMALL, intermediate_size=48, max_position_embeddings=64),
    "gemma3": hf.Gemma3TextConfig(**GATED, head_dim=8, sliding_window=4, layer_types=LAYERS),
    "opt": hf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "mistral with a window": hf.MistralConfig(**GATED, sliding_window=4),
}


def rollout_of(k: int):
    """Eight prompts of 1 to 8 tokens with k responses of 1 to 7 tokens each."""
    rollout = make_rollout(prompts=8, k=k)
    rollout.prompts[:k] = [[5]] * k
    return rollout


@pytest.fixture(scope="session", params=CONFIGS)
def folders(request, tmp_path_factory):
    """A policy and a reward model of an architecture, with random weights that matter."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[request.param])
    config.num_labels, made = 1, []
    for auto in (hf.AutoModelForCausalLM, hf.AutoModelForSequenceClassification):
        model = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        made.append(str(tmp_path_factory.mktemp("model")))
        model.save_pretrained(made[-1])
        tiny.tokenizer().save_pretrained(made[-1])
    return made


@pytest.mark.parametrize("k", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_each_row_by_itself(task, folders, k):
    """Log-probabilities, values and scores, and the gradients of the first two."""
    policy_folder, rm_folder = folders
    changes = dict(model=policy_folder, reward=rm_folder, temperature=0.7)
    args = make_args(task, **changes, samples_per_prompt=max(2, k), micro_batch_size=4 * k)
    rollout = rollout_of(k)
    policy = script.Policy(args).eval()
    value_args = async_ppo.Args(model=policy_folder, reward=rm_folder, gold="", dtype="float32")
    value_model = async_ppo.ValueModel(value_args).eval()
    tokenizer = AutoTokenizer.from_pretrained(f"{task}/policy")
    reward = script.make_reward("reward", DATA, tokenizer, [1], args, ALONE)
    batch = script.make_batch(rollout, k, policy, args, ALONE)
    scores = reward(rollout.prompts, rollout.responses, {}, k)
    weights = torch.randn(8 * k, batch.mask.shape[1], generator=torch.Generator().manual_seed(1)) * batch.mask
    found = []
    for model in (policy, value_model):
        for rows in script.micro_batches(batch, torch.arange(8), args):
            (script.forward_rows(model, batch, rows, args) * weights[rows]).sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    values = script.all_rows(value_model, batch, args, ALONE)
    for i, (query, response) in enumerate(zip(rollout.prompts, rollout.responses)):
        ids, n = torch.tensor([query + response]), len(response)
        logits = policy.model(ids).logits[0, len(query) - 1 : -1].float() / 0.7
        logprobs = logits.log_softmax(-1)[range(n), response]
        hidden = value_model.model.base_model(ids).last_hidden_state[0, len(query) - 1 :]
        by_token = value_model.model.score(hidden)[:, 0]  # after the query, and after each token of the response
        assert torch.allclose(batch.ref_logprobs[i, :n], logprobs, atol=2e-5)
        assert torch.allclose(values[i, :n], by_token[:-1], atol=2e-5)
        assert scores[i].item() == pytest.approx(by_token[-1].item(), abs=2e-5)
        (logprobs * weights[i, :n]).sum().backward()
        (by_token[:-1] * weights[i, :n]).sum().backward()
    for model, grads in zip((policy, value_model), found):
        for (name, p), grad in zip(model.named_parameters(), grads):
            assert torch.allclose(grad, p.grad, rtol=1e-4, atol=1e-4), name
        assert sum(grad.abs().max() > 1e-3 for grad in grads) > len(grads) / 2  # the comparison is of something


class Moments:
    """Requests that come and go at random: the generator has something to do, or not, at every look."""

    def __init__(self, seed: int, share: float):
        self.random, self.share = random.Random(seed), share

    @property
    def unfinished_tasks(self) -> bool:
        return self.random.random() < self.share


@pytest.mark.parametrize("algo", ["online_dpo", "rloo", "ppo"])
def test_the_helper_changes_no_bit(task, algo):
    """Learned with the helper at other moments each time, never and always, and by a plain backward pass."""
    affinity, threads = os.sched_getaffinity(0), torch.get_num_threads()
    devices = script.Devices(make_args(task))
    helped, submit = [], devices.helper.submit
    devices.helper = types.SimpleNamespace(submit=lambda *call: helped.append(1) or submit(*call))
    try:
        results = []
        for requests in (None, Moments(1, 1.0), Moments(2, 0.0), Moments(3, 0.5), Moments(4, 0.5), Moments(5, 0.3)):
            devices.requests = requests
            where = types.SimpleNamespace(device=devices.device, helper=None, map=map) if requests is None else devices
            changes = dict(num_epochs=2, num_mini_batches=2, micro_batch_size=4)
            model, loss_fn, batch, args = learner_of(task, algo, make_rollout(prompts=16, k=2), 2, **changes)
            before = len(helped)
            if algo == "ppo":
                async_ppo.ppo_targets(model, batch, random_scores(len(batch.mask)), args, where)
            metrics = script.learn(model, loss_fn, torch.optim.AdamW(model.parameters()), batch, 0, args, where)
            results.append((metrics, [p.detach() for p in model.parameters()], len(helped) - before))
    finally:
        os.sched_setaffinity(0, affinity)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    for metrics, weights, _ in results[1:]:
        assert metrics == results[0][0] and all(map(torch.equal, weights, results[0][1]))
    counts = [count for *_, count in results]
    assert counts[:2] == [0, 0] and counts[2] > 0 and len(set(counts[3:]) - {0, counts[2]}) > 0


def test_an_error_of_the_helper_is_the_learner_s(task):
    affinity, threads = os.sched_getaffinity(0), torch.get_num_threads()
    devices = script.Devices(make_args(task))
    os.sched_setaffinity(0, affinity)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    with pytest.raises(ZeroDivisionError):
        list(devices.map(lambda x: 1 / x, [1, 0]))
    assert list(devices.map(lambda x: -x, [1, 2, 3])) == [-1, -2, -3]
