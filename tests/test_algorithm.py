"""The learner's mathematics against independent loops; no vLLM here."""

import math
import os
import types
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset

import async_online_dpo as script
import async_ppo
import async_rloo
from tests import tiny

EOS = 1
DATA = Dataset.from_dict({"query": ["Q: w1 A:", "Q: w2 w3 A:"], "input_ids": [[3, 6, 4], [3, 7, 8, 4]]})
ALONE = types.SimpleNamespace(device=torch.device("cpu"), world=1, helper=None, map=map)  # without a generator


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    return tiny.make(str(tmp_path_factory.mktemp("tiny")))


def make_args(task, **changes):
    defaults = dict(model=f"{task}/policy", reward="tests.tiny:reward", gold="", dataset=f"{task}/data")
    defaults |= dict(dtype="float32", batch_size=8, total_episodes=64, micro_batch_size=4, prompt_length=64)
    return script.Args(**defaults | changes)


def make_rollout(prompts=8, k=2, seed=0):
    """Random token ids as a rollout of `prompts` prompts; some responses end in EOS (1)."""
    rng = np.random.default_rng(seed)
    queries = [rng.integers(3, 60, rng.integers(2, 9)).tolist() for _ in range(prompts)]
    queries = [q for q in queries for _ in range(k)]
    responses = [rng.integers(3, 60, rng.integers(1, 7)).tolist() + [1] * int(rng.random() < 0.8) for _ in queries]
    logprobs = [(-rng.random(len(r))).tolist() for r in responses]
    rows = [row for row in range(prompts) for _ in range(k)]
    return script.Rollout(0, rows, queries, responses, logprobs, 0.0, {})


def naive_logprobs(model, query, response, temperature):
    """One sequence, one token at a time, in Python floats."""
    out = []
    for i, token in enumerate(response):
        with torch.no_grad():
            logits = model(torch.tensor([query + response[:i]])).logits[0, -1].tolist()
        scaled = [z / temperature for z in logits]
        top = max(scaled)
        out.append(scaled[token] - top - math.log(sum(math.exp(z - top) for z in scaled)))
    return out


def batch_of(task, args, rollout):
    policy = script.Policy(args)
    return policy, script.make_batch(rollout, 2, policy, args, ALONE)


def random_scores(rows):
    return torch.randn(rows, generator=torch.Generator().manual_seed(4))


def learner_of(task, algo, rollout, samples, **changes):
    """Model, loss function, batch and arguments of an algorithm, ready for learn()."""
    module = {"online_dpo": script, "rloo": async_rloo, "ppo": async_ppo}[algo]
    shape = dict(samples_per_prompt=samples, batch_size=len(rollout.prompts))
    args = module.Args(**vars_of(make_args(task, **shape)) | changes)
    policy = module.Policy(args)
    scores = random_scores(len(rollout.prompts))
    if algo == "online_dpo":
        rollout, samples = script.best_and_worst(rollout, scores, samples), 2
    batch = module.make_batch(rollout, samples, policy, args, ALONE)
    if algo == "rloo":
        batch.scores = scores
    with torch.no_grad():  # the learner has moved on from the reference
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * 0.02)
    if algo != "ppo":
        return policy, {"online_dpo": script.dpo_loss, "rloo": async_rloo.leave_one_out_loss}[algo], batch, args
    model = async_ppo.ActorCritic(policy, async_ppo.ValueModel(args))
    return model, async_ppo.actor_critic_loss, batch, args


def vars_of(args):
    return {k: v for k, v in vars(args).items() if k not in ("num_batches", "num_prompts", "dpo_loss", "beta")}


def dpo_losses(chosen, rejected, ref_chosen, ref_rejected, args):
    """Loss of every pair (b,), from log-probabilities of whole responses, all (b,)."""
    pairs = (chosen, rejected), (ref_chosen, ref_rejected)
    logprobs, ref = (torch.stack(pair, 1).view(-1, 1) for pair in pairs)  # (2b, 1)
    batch, rows = script.Batch(2, None, None, None, torch.ones_like(ref) > 0), torch.arange(len(ref))
    batch.ref_logprobs = batch.behaviour_logprobs = ref
    with mock.patch.object(script, "forward_rows", lambda *_: logprobs):
        return script.dpo_loss(None, batch, rows, rows, args)[1]["loss"]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "best_of_k"])
def test_loss_and_gradient_against_loops(task, loss):
    args = make_args(task, dpo_loss=loss, beta=0.3)
    values = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * 5
    chosen, rejected = values[0].clone().requires_grad_(), values[1].clone().requires_grad_()
    losses = dpo_losses(chosen, rejected, values[2], values[3], args)
    (losses.sum() + 0 * rejected.sum()).backward()  # best_of_k does not use the rejected
    for i in range(16):
        c, r, ref_c, ref_r = (values[j, i].item() for j in range(4))

        def naive(c, r, ref_c=ref_c, ref_r=ref_r):
            h = (c - ref_c) - (r - ref_r)
            if loss == "dpo":
                return math.log1p(math.exp(-0.3 * h))
            return (h - 1 / 0.6) ** 2 if loss == "ipo" else -c

        assert losses[i].item() == pytest.approx(naive(c, r), rel=1e-4, abs=1e-5)
        for got, slope in (
            (chosen.grad[i], (naive(c + 1e-4, r) - naive(c - 1e-4, r)) / 2e-4),
            (rejected.grad[i], (naive(c, r + 1e-4) - naive(c, r - 1e-4)) / 2e-4),
        ):
            assert got.item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_dpo_swap_symmetry(task):
    """Chosen and rejected swapped: the two losses are -log p and -log(1 - p)."""
    a, b, ref_a, ref_b = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    args = make_args(task)
    one, two = dpo_losses(a, b, ref_a, ref_b, args), dpo_losses(b, a, ref_b, ref_a, args)
    assert torch.allclose((-one).exp() + (-two).exp(), torch.ones(8), atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_against_loops(task, temperature):
    args = make_args(task, temperature=temperature)
    rollout = make_rollout()
    policy, batch = batch_of(task, args, rollout)
    with torch.no_grad():
        got = script.forward_rows(policy, batch, torch.arange(len(rollout.prompts)), args)
    for i, (query, response) in enumerate(zip(rollout.prompts, rollout.responses)):
        want = naive_logprobs(policy.model, query, response, temperature)
        assert got[i, : len(want)].tolist() == pytest.approx(want, abs=1e-5)
        assert (got[i, len(want) :] == 0).all()


@pytest.mark.parametrize("algo", ["online_dpo", "rloo", "ppo"])
def test_padding_changes_nothing(task, algo):
    """Other tokens at the padding: the same weights after learning and the same metrics, to the last bit."""
    results = []
    for filler in (0, 37):
        model, loss_fn, batch, args = learner_of(task, algo, make_rollout(), 2, num_epochs=2)
        batch.prompts[~batch.prompt_mask] = batch.responses[~batch.mask] = filler
        if algo == "ppo":
            async_ppo.ppo_targets(model, batch, random_scores(len(batch.mask)), args, ALONE)
        metrics = script.learn(model, loss_fn, torch.optim.AdamW(model.parameters(), lr=1e-2), batch, 0, args, ALONE)
        results.append((metrics, [p.detach().clone() for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_pairs_are_best_and_worst():
    rng = np.random.default_rng(3)
    rollout, scores = make_rollout(prompts=6, k=4), torch.tensor(rng.integers(0, 5, 24).astype(np.float32))
    pairs = script.best_and_worst(rollout, scores, 4)
    assert len(pairs.prompts) == len(pairs.responses) == len(pairs.logprobs) == 12
    for p in range(6):
        group, rows = scores[p * 4 : p * 4 + 4].tolist(), list(zip(pairs.prompts, pairs.responses, pairs.logprobs))
        best, worst = p * 4 + group.index(max(group)), p * 4 + group.index(min(group))
        whole = list(zip(rollout.prompts, rollout.responses, rollout.logprobs))
        assert rows[2 * p] == whole[best] and rows[2 * p + 1] == whole[worst]


def test_missing_eos_replaces_the_score(task):
    rollout, args = make_rollout(), make_args(task, missing_eos_score=-7.0)
    tokenizer, end_ids = script.load_tokenizer(args)
    reward = script.make_reward("reward", DATA, tokenizer, end_ids, args, ALONE)
    scores = script.score_rollout(rollout, {"query": [""] * len(rollout.prompts)}, reward, 2, end_ids, args)
    for response, score in zip(rollout.responses, scores.tolist()):
        assert (score == -7.0) == (response[-1] != 1)


def test_update_count_and_schedules(task):
    """N mini-batches x T epochs are N*T updates; per_batch keeps the rate within a batch, per_update does not."""
    rates = {}
    for schedule in ("per_batch", "per_update"):
        args = make_args(task, num_mini_batches=2, num_epochs=3, lr_schedule=schedule, total_episodes=64)
        policy, batch = batch_of(task, args, make_rollout(prompts=8))
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        seen, step = [], optimizer.step
        optimizer.step = lambda step=step, seen=seen, optimizer=optimizer: (
            seen.append(optimizer.param_groups[0]["lr"]), step())  # fmt: skip
        script.learn(policy, script.dpo_loss, optimizer, batch, 1, args, ALONE)
        rates[schedule] = np.array(seen) / args.learning_rate
    assert rates["per_batch"] == pytest.approx([1 - 1 / 4] * 6)
    assert rates["per_update"] == pytest.approx([1 - (1 + u / 6) / 4 for u in range(6)])


@pytest.mark.parametrize("algo", ["online_dpo", "rloo", "ppo"])
def test_micro_batches_change_memory_not_results(task, algo):
    """Responses of different lengths, K = 4, two mini-batches: as one micro-batch each, and as four."""
    results = []
    for size in (4, 64):
        changes = dict(micro_batch_size=size, num_mini_batches=2, max_grad_norm=1e9)  # clipping would hide a scale
        model, loss_fn, batch, args = learner_of(task, algo, make_rollout(prompts=8, k=4), 4, **changes)
        if algo == "ppo":
            async_ppo.ppo_targets(model, batch, random_scores(len(batch.mask)), args, ALONE)
        metrics = script.learn(model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1), batch, 0, args, ALONE)
        results.append((metrics, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("algo", ["online_dpo", "rloo", "ppo"])
def test_smaller_micro_batches_change_nothing_but_rounding(task, algo):
    """The weights after learning, and how often a layer ran."""
    weights, module = [], {"online_dpo": script, "rloo": async_rloo, "ppo": async_ppo}[algo]
    for size in (16, 4):
        changes = dict(num_epochs=2, micro_batch_size=size)
        model, loss_fn, batch, args = learner_of(task, algo, make_rollout(), 2, **changes)
        layers_run = []
        policy = model.policy if algo == "ppo" else model
        policy.model.base_model.layers[0].self_attn.register_forward_hook(lambda *_, runs=layers_run: runs.append(1))
        if algo == "ppo":
            async_ppo.ppo_targets(model, batch, random_scores(len(batch.mask)), args, ALONE)
        before = len(layers_run)
        module.learn(model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1), batch, 0, args, ALONE)
        weights.append((torch.cat([p.flatten() for p in model.parameters()]), len(layers_run) - before))
    assert torch.allclose(weights[0][0], weights[1][0], atol=1e-6)
    assert weights[1][1] == weights[0][1] * 4


def test_rloo_loss_is_the_mean_over_responses(task):
    """The gradient of a whole mini-batch against the sum over responses of -A log pi, one response at a time."""
    policy, loss_fn, batch, args = learner_of(
        task, "rloo", make_rollout(prompts=2, k=4), 4, rloo_loss="vanilla", max_grad_norm=1e9
    )
    rows = torch.arange(8)
    loss_fn(policy, batch, rows, rows, args)[0].backward()
    got = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    kl = (batch.behaviour_logprobs - batch.ref_logprobs).sum(1)
    rewards = [batch.scores[i] - args.kl_coef * kl[i] for i in range(8)]
    for i in range(8):
        others = [rewards[j] for j in range(8) if j != i and j // 4 == i // 4]
        logprobs = script.forward_rows(policy, batch, torch.arange(4) + i // 4 * 4, args)[i % 4].sum()
        (-(rewards[i] - sum(others) / 3) * logprobs / 8).backward()
    assert torch.allclose(got, torch.cat([p.grad.flatten() for p in policy.parameters()]), atol=1e-5)


def test_values_are_those_of_the_state_before_each_token(task):
    """Against the classifier's own answer to each prefix."""
    rollout = make_rollout()
    model, _, batch, args = learner_of(task, "ppo", rollout, 2, value_model=f"{task}/rm")
    with torch.no_grad():
        got = async_ppo.forward_rows(model.value_model, batch, torch.arange(len(rollout.prompts)), args)
        for i, (query, response) in enumerate(zip(rollout.prompts, rollout.responses)):
            for t in range(len(response)):
                want = model.value_model.model(torch.tensor([query + response[:t]])).logits[0, 0].item()
                assert got[i, t].item() == pytest.approx(want, abs=1e-5)
            assert (got[i, len(response) :] == 0).all()


@pytest.mark.parametrize("loss", ["behaviour", "decoupled"])
def test_ppo_targets_against_loops(task, loss):
    rollout = make_rollout()
    changes = dict(kl_coef=0.3, gamma=0.9, ppo_loss=loss, temperature=0.7)
    model, _, batch, args = learner_of(task, "ppo", rollout, 2, value_model=f"{task}/rm", **changes)
    scores = random_scores(len(batch.mask))
    async_ppo.ppo_targets(model, batch, scores, args, ALONE)
    raw = []
    for i, (query, response) in enumerate(zip(rollout.prompts, rollout.responses)):
        n, mu, ref = len(response), rollout.logprobs[i], batch.ref_logprobs[i].tolist()
        reward = [-0.3 * (mu[t] - ref[t]) for t in range(n)]
        reward[-1] += scores[i].item()
        value = [*batch.values[i, :n].tolist(), 0.0]
        delta = [reward[t] + 0.9 * value[t + 1] - value[t] for t in range(n)]
        advantage = [sum((0.9 * 0.95) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
        assert batch.returns[i, :n].tolist() == pytest.approx([a + v for a, v in zip(advantage, value)], abs=1e-4)
        old = mu if loss == "behaviour" else naive_logprobs(model.policy.model, query, response, 0.7)
        assert batch.old_logprobs[i, :n].tolist() == pytest.approx(old, abs=1e-4)
        raw += [(i, t, advantage[t]) for t in range(n)]
    mean, spread = np.mean([a for _, _, a in raw]), np.std([a for _, _, a in raw], ddof=1)
    for i, t, a in raw:
        assert batch.advantages[i, t].item() == pytest.approx((a - mean) / spread, abs=1e-3)
    assert (batch.advantages[~batch.mask] == 0).all()


def test_ppo_loss_is_the_mean_over_the_tokens_of_the_mini_batch(task):
    model, loss_fn, batch, args = learner_of(task, "ppo", make_rollout(), 2)
    async_ppo.ppo_targets(model, batch, random_scores(len(batch.mask)), args, ALONE)
    mini = torch.arange(8)
    whole = loss_fn(model, batch, mini, mini, args)[0].item()
    terms = []
    for i in range(8):
        rows = torch.arange(2) + i // 2 * 2  # all of its prompt
        logprobs = script.forward_rows(model.policy, batch, rows, args)[i % 2]
        values = async_ppo.forward_rows(model.value_model, batch, rows, args)[i % 2]
        for t in range(int(batch.mask[i].sum())):
            ratio = math.exp(logprobs[t].item() - batch.behaviour_logprobs[i, t])
            a, near = batch.advantages[i, t].item(), min(max(ratio, 0.8), 1.2)
            v, old, ret = values[t].item(), batch.values[i, t].item(), batch.returns[i, t].item()
            clipped = min(max(v, old - 0.2), old + 0.2)
            terms.append(-min(ratio * a, near * a) + 0.1 * max((v - ret) ** 2, (clipped - ret) ** 2) / 2)
    assert whole == pytest.approx(np.mean(terms), abs=1e-5)


def test_metrics_of_the_lag_against_loops(task):
    policy, loss_fn, batch, args = learner_of(task, "rloo", make_rollout(), 2)
    with torch.no_grad():
        logprobs = script.all_rows(policy, batch, args, ALONE).tolist()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    got = script.learn(policy, loss_fn, optimizer, batch, 0, args, ALONE)
    ratios, kl = [], []
    for i in range(len(logprobs)):
        n, mu, ref = int(batch.mask[i].sum()), batch.behaviour_logprobs[i].tolist(), batch.ref_logprobs[i].tolist()
        ratios += [math.exp(logprobs[i][t] - mu[t]) for t in range(n)]
        kl.append(sum(logprobs[i][t] - ref[t] for t in range(n)))
    assert got["kl"] == pytest.approx(np.mean(kl), abs=1e-4)
    assert got["logratio"] == pytest.approx(np.mean(np.abs(np.log(ratios))), rel=1e-4)
    assert got["logratio_max"] == pytest.approx(np.max(np.abs(np.log(ratios))), rel=1e-4)
    assert got["behaviour_kl"] == pytest.approx(np.mean([r - 1 - math.log(r) for r in ratios]), rel=1e-4)
    assert got["clip_fraction"] == pytest.approx(np.mean([abs(r - 1) > 0.2 for r in ratios]), abs=1e-6)


@pytest.mark.parametrize("world, hosts", [(1, 1), (2, 1), (4, 1), (4, 2), (2, 2)])
def test_learners_share_a_rollout_without_rest(monkeypatch, task, world, hosts):
    """What torchrun's ranks get: disjoint whole prompts with their own K responses, made on their own host."""
    args, data = make_args(task, batch_size=16, samples_per_prompt=2), list(range(100, 108))
    weights = script.Weights(0, None, None, [])
    rows = [row for row in range(8) for _ in range(2)]
    seen, local = [], world // hosts
    made = []  # what the generator of a host sends to its learners
    monkeypatch.setattr(script.dist, "broadcast_object_list", lambda box, src, group: box.__setitem__(0, made[0]))
    monkeypatch.setattr(script.dist, "rendezvous", lambda _: iter([(None, 0, 1)]))
    monkeypatch.setattr(script.dist, "PrefixStore", lambda *_: None)
    monkeypatch.setattr(script.dist, "init_process_group", lambda **_: None)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setattr(script.dist, "new_subgroups", lambda *_, **__: (None, None))
    affinity, threads = os.sched_getaffinity(0), torch.get_num_threads()
    for rank in range(world):
        names = dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank % local, LOCAL_WORLD_SIZE=local)
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        try:
            devices = script.Devices(args)
        finally:
            os.sched_setaffinity(0, affinity)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)
        assert devices.generates == (rank % local == 0) and len(devices.ranks) == local
        generator = script.Generator(args, devices, [3, 4], [EOS], None)
        request = script.Request("batch-0", weights, rows, [[data[row]] for row in rows], 2, list(range(16)), 1.0)
        generator.submit(request)
        if devices.generates:
            asked = devices.requests.get_nowait()
            assert len(asked.prompts) == 16 // hosts
            responses = [[prompt[0], seed] for prompt, seed in zip(asked.prompts, asked.seeds)]
            zeros = [[0.0]] * len(responses)
            made[:] = [script.Rollout(0, asked.rows, asked.prompts, responses, zeros, 0.0, {})]
            asked.answer.set_result(made[0])
        mine = generator.receive(request, version=0)
        assert mine.rows == [row for row in range(rank, 8, world) for _ in range(2)]
        assert mine.prompts == [[data[row]] for row in mine.rows]
        assert [response[0] for response in mine.responses] == [prompt[0] for prompt in mine.prompts]
        seen += [response[1] for response in mine.responses]
    assert sorted(seen) == list(range(16))


def test_every_prompt_once_an_epoch(task):
    args, data = make_args(task), Dataset.from_dict({"input_ids": [[i] for i in range(100)]})
    requests = [script.batch_request(t, None, data, args) for t in range(26)]
    assert all(request.rows[::2] == request.rows[1::2] for request in requests)
    assert all([row] == prompt for request in requests for row, prompt in zip(request.rows, request.prompts))
    assert sorted(row for request in requests[:25] for row in request.rows[::2]) == list(range(100))
    assert requests[25].rows != requests[0].rows


def test_evaluation_against_loops(task):
    """KL and perplexity of the evaluation: sums over tokens one at a time; win-rate by hand."""
    args = make_args(task, gold="tests.tiny:reward")
    tokenizer, end_ids = script.load_tokenizer(args)
    policy, reference = script.Policy(args), script.Policy(args)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * 0.02)
    rollout = make_rollout(k=1)
    columns = {"query": [""] * 8, "reference": [" w7", " w3 w7 w7 w7"] * 4}
    columns["reference_ids"] = tokenizer(columns["reference"]).input_ids
    reward = script.make_reward("reward", DATA, tokenizer, end_ids, args, ALONE)
    got = script.evaluate(rollout, columns, policy, reference, reward, reward, end_ids, args, ALONE)
    kl = nll = tokens = 0.0
    for query, response in zip(rollout.prompts, rollout.responses):
        ref = sum(naive_logprobs(reference.model, query, response, 1.0))
        kl += sum(naive_logprobs(policy.model, query, response, 1.0)) - ref
        nll, tokens = nll - ref, tokens + len(query) + len(response)
    texts = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    wins = [a > b for a, b in zip(tiny.reward([], texts), tiny.reward([], columns["reference"]))]
    assert got["kl"] == pytest.approx(kl / 8, abs=1e-4)
    assert got["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert got["win_rate"] == pytest.approx(np.mean(wins))
