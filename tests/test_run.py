"""Whole runs with a real vLLM engine: lag, order, determinism, and what a run leaves. Failures: test_failures.py."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import async_online_dpo as script
import sync_baseline
from tests.runs import ALGORITHMS, HERE, flags, metrics, same, start


@pytest.mark.parametrize("slow", ["generator", "learner"])
@pytest.mark.parametrize("staleness", [0, 1, 2, 3, 4])
def test_lag_is_exactly_min_t_S(run, staleness, slow):
    """By the label, and by the probe: the engine's log-probabilities are those of that version (main checks both)."""
    seconds = 0.6 if staleness == 1 else 0.1  # much more than a step where waiting is looked at, on a slow machine too
    sleep = {"before_load" if slow == "generator" else "before_label": lambda *_: time.sleep(seconds)}
    folder, rollouts = run(max_staleness=staleness, **sleep)
    assert [t - r.version for t, r in enumerate(rollouts)] == [min(t, staleness) for t in range(6)]
    assert [r["lag"] for r in metrics(folder)[0]] == [min(t, staleness) for t in range(6)]
    assert max(r.probe_error for r in rollouts) < 1e-4
    with open(os.path.join(folder, "summary.json")) as f:
        median = json.load(f)["seconds"]
    if staleness == 1:  # who waits is who is faster
        own, other = {"generator": ("generator_wait", "wait"), "learner": ("wait", "generator_wait")}[slow]
        assert median[other] > 0.1 > median[own]


def test_each_prompt_once_and_each_response_with_its_own(run, task):
    args = script.Args(**flags(task))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = script.load_prompts(args, "train", tokenizer)
    _, rollouts = run(max_staleness=2)
    used = []
    for t, rollout in enumerate(rollouts):
        rows = script.prompt_rows(args, len(data), t)
        assert rollout.prompts == [data[row]["input_ids"] for row in rows for _ in range(2)]
        used += rows
    assert len(set(used)) == len(used) == 96
    # A response belongs to its prompt if its log-probabilities do: version 0's are known to the learner.
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    worst, shuffled = [], []
    others = rollouts[0].prompts[2:] + rollouts[0].prompts[:2]
    for prompts, errors in ((rollouts[0].prompts, worst), (others, shuffled)):
        for prompt, response, logprobs in zip(prompts, rollouts[0].responses, rollouts[0].logprobs):
            ids, mask = torch.tensor([prompt + response]), torch.ones(1, len(response), dtype=torch.bool)
            with torch.no_grad():
                mine = script.response_logprobs(policy, ids, torch.tensor([len(prompt)]), mask, args.temperature)[0]
            errors.append((mine - torch.tensor(logprobs)).abs().max().item())
    assert max(worst) < 1e-4 < np.median(shuffled)


def test_generator_and_learner_agree_at_equal_weights_and_differ_after_an_update(run):
    folder, _ = run(max_staleness=1)
    ratios = [r["logratio_max"] for r in metrics(folder)[0]]
    assert ratios[0] < 1e-4 and min(ratios[1:]) > 1e-3
    folder, _ = run("sync", max_staleness=0)
    assert max(r["logratio_max"] for r in metrics(folder)[0]) < 1e-4


def test_a_pushed_weight_changes_what_is_generated(task, engine, tmp_path):
    """Greedy tokens of the engine are those of transformers for the weights pushed last."""
    from vllm import SamplingParams

    llm, send_weights = engine
    args = script.Args(**flags(task))
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    prompt, params = [3, 10, 11, 12, 4], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    generated = []
    for version in (1, 2):
        send_weights(script.snapshot_weights(policy, version, [5, 6], args, str(tmp_path)))
        output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
        want = list(prompt)
        with torch.no_grad():
            for _ in range(8):
                want.append(policy(torch.tensor([want])).logits[0, -1].argmax().item())
            assert list(output.token_ids) == want[5:]
            generated.append(want[5:])
            for parameter in policy.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3)
    assert generated[0] != generated[1]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_asynchronous_runs_repeat_to_the_last_bit(run, algo):
    """The same with a slow generator and with a slow learner: results do not depend on who is faster."""
    module = ALGORITHMS[algo]
    first, rollouts = run("a", module, before_load=lambda _: time.sleep(0.1))
    second, _ = run("b", module, before_label=lambda: time.sleep(0.1))
    third, _ = run("c", module, seed=2)
    assert [t - r.version for t, r in enumerate(rollouts)] == [0, 1, 1, 1, 1, 1]
    assert same(metrics(first), metrics(second))
    assert not same(metrics(first), metrics(third))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_no_staleness_is_the_synchronous_script(run, algo):
    """Two loops written apart, one answer, to the last bit: 12 batches of two mini-batches, and the evaluations."""
    changes = dict(total_episodes=384, batch_size=16, num_mini_batches=2, eval_every=5, eval_prompts=16)
    if algo == "ppo":
        changes["samples_per_prompt"] = 1
    asynchronous, _ = run("async", ALGORITHMS[algo], max_staleness=0, **changes)
    synchronous, _ = run("sync", sync_baseline, algo=algo, **changes)
    records, weights = metrics(asynchronous)
    assert len([r for r in records if "step" in r]) == 12 and len([r for r in records if "eval/score" in r]) == 4
    assert same((records, weights), metrics(synchronous))
    assert records[-2]["logratio_max"] > 1e-3  # the second mini-batch is off-policy


def test_no_staleness_is_the_plain_loop(run, task, engine):
    """S = 0 against generate, label, learn in turn, without threads and queues: the same weights to the last bit."""
    folder, _ = run(max_staleness=0)
    args, cpu = script.Args(**flags(task)), torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = script.load_prompts(args, "train", tokenizer)
    policy, reference = (AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval() for _ in range(2))
    reward = script.make_reward(args.reward, tokenizer, args, cpu)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0)
    torch.set_num_threads(len(script.device_plan(args).learner_cores))
    generator = script.Generator(args, script.device_plan(args), policy, data, tokenizer.eos_token_id, script.Trace())
    generator.llm, generator.send_weights = engine
    generator.send_weights(generator.weights)
    for t in range(args.num_batches):
        rows = [row for row in script.prompt_rows(args, len(data), t) for _ in range(2)]
        prompts = data[rows]["input_ids"]
        weights = generator.snapshot(policy, t) if t else generator.weights
        seeds = np.random.SeedSequence((args.seed, t)).generate_state(len(rows)).tolist()
        request = script.Request(str(t), weights, prompts, 2, args.temperature, seeds)
        rollout = generator.generate(request, 0.0)
        scores = script.score_rollout(rollout, data[rows], reward, tokenizer, args)
        pairs, pair_scores = script.best_and_worst(rollout, scores, 2)
        batch = script.make_batch(pairs, pair_scores, 2, reference, tokenizer, args, cpu)
        script.learn(policy, script.online_dpo_loss, optimizer, batch, t, args)
    generator.folder.cleanup()
    trained = metrics(folder)[1]
    assert all(torch.equal(trained[name], p) for name, p in policy.named_parameters())


def test_old_weights_are_noticed(run, monkeypatch, tmp_path):
    """If the engine gets the weights of another version than the label says, the probe tells."""
    make = script.snapshot_weights

    def stale(policy, version, *rest):
        weights = make(policy, version, *rest)
        file = os.path.join(weights.path, "model.safetensors")
        if version == 1:
            shutil.copy(file, kept)
        elif version == 2:
            shutil.copy(kept, file)
        return weights

    kept = str(tmp_path / "version-1.safetensors")
    monkeypatch.setattr(script, "snapshot_weights", stale)
    with pytest.raises(RuntimeError, match="the generator has other weights"):
        run()


OFF_POLICY = dict(num_mini_batches=2, num_epochs=2, samples_per_prompt=4, lr_schedule="per_update")
VARIANTS = [("online_dpo", dict(dpo_loss=x)) for x in ("dpo", "best_of_k")]
VARIANTS += [("rloo", dict(rloo_loss=x)) for x in ("proximal", "vanilla", "truncated", "copg", "topr", "asymre")]
VARIANTS += [("ppo", dict(ppo_loss=x)) for x in ("behaviour", "recompute", "truncated", "cispo")]
VARIANTS += [("online_dpo", dict(dpo_loss="ipo") | OFF_POLICY), ("rloo", dict(rloo_loss="tba") | OFF_POLICY)]
VARIANTS += [("ppo", dict(ppo_loss="decoupled") | OFF_POLICY)]


@pytest.mark.parametrize("algo, changes", VARIANTS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)))
def test_every_loss_learns(run, algo, changes):
    """A Python function as reward (the number of w7), updates at lag 1: it rises; the metrics of the lag are sound."""
    changes = dict(learning_rate=3e-3, total_episodes=1536, kl_coef=0.01) | changes
    if algo == "online_dpo":
        changes.pop("kl_coef")
    folder, _ = run("run", ALGORITHMS[algo], reward="tests.tiny:reward", **changes)
    records, _ = metrics(folder)
    assert len(records) == 1536 // (32 * changes.get("num_mini_batches", 1))
    # Above 0 only w7 counts. Where so few updates only teach to end (-1 if not), that much is asked.
    only_ends = algo == "online_dpo" or changes.get("rloo_loss") == "tba"
    assert records[0]["score"] < -0.8 and records[-1]["score"] > (-0.2 if only_ends else 1.0)
    for r in records:
        assert np.isfinite([v for v in r.values() if v is not None]).all()
        assert 0 < r["effective_sample_size"] <= 1 + 1e-9 and 0 <= r["clip_fraction"] <= 1 and r["behaviour_kl"] > -1e-6


def test_colocated_baseline_gives_the_same_results(run):
    """All cores for both, in turn: the same prompts, and the same responses of the first weights."""
    _, split = run("split", sync_baseline, algo="rloo", total_episodes=96)
    _, colocated = run("colocate", sync_baseline, algo="rloo", placement="colocate", total_episodes=96)
    assert [r.prompts for r in split] == [r.prompts for r in colocated]
    assert split[0].responses == colocated[0].responses and len(split) == 3


# ------------------------------------------------------------------------------------------------ as a user starts it
CHATTER = ("WARNING", "INFO", "Warning", "Triton", "Loading safetensors", "Traceback", "newly initialized", "MISSING")


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("smoke") / "run")
    status, output = start(task, output_dir=folder, eval_every=3, eval_prompts=16)
    assert status == 0, output
    return folder, output


def test_smoke_run_as_a_user_starts_it(finished):
    folder, output = finished
    for text in ("benchmark.timeline", "generation G", "ideal max(G, L)", "(G + L) / step", "win_rate", folder):
        assert text in output
    assert not [chatter for chatter in CHATTER if chatter in output]
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    assert config["args"]["num_batches"] == 6 and len(config["versions"]) == 4 and config["commit"]
    records, _ = metrics(folder)
    assert [r["version"] for r in records if "eval/win_rate" in r] == [0, 3, 6]
    with open(os.path.join(folder, "trace.json")) as f:
        events = json.load(f)["traceEvents"]
    generate = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "generate"]
    learn = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "learn"]
    assert any(max(a, c) < min(b, d) for a, b in generate for c, d in learn), "generation and learning never overlapped"


@pytest.mark.parametrize(
    "name, changes",
    [
        ("async_ppo.py", dict(reward="tests.tiny:reward", samples_per_prompt=1)),  # a value model from the policy
        ("sync_baseline.py", dict(algo="ppo", placement="colocate")),
    ],
)
def test_smoke_run_of_the_other_scripts(task, tmp_path, name, changes):
    folder = str(tmp_path / "run")
    status, output = start(task, name=name, output_dir=folder, eval_every=6, eval_prompts=16, **changes)
    assert status == 0, output
    assert not [chatter for chatter in CHATTER if chatter in output]
    records, _ = metrics(folder)
    assert [r["version"] for r in records if "eval/win_rate" in r] == [0, 6]
    pages = ["docs/async_online_dpo.md", f"docs/{name.replace('.py', '.md')}", "docs/async_ppo.md"]
    text = "".join(open(os.path.join(HERE, page)).read() for page in pages)
    plain = {"step", "version", "episodes", "prompts"}
    assert not [name for r in records for name in r if f"`{name}`" not in text and name not in plain]


def test_the_trained_policy_opens_in_transformers_and_vllm(finished, engine):
    folder = os.path.join(finished[0], "policy")
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Q: w1 A:").input_ids == [3, 6, 4] and policy.config.tie_word_embeddings
    code = (
        "import sys; from vllm import LLM, SamplingParams; llm = LLM(sys.argv[1], dtype='float32', enforce_eager=True);"
        "print('GOT', llm.generate('Q: w1 A:', SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].token_ids)"
    )
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, env=env, timeout=200)
    want = policy.generate(torch.tensor([[3, 6, 4]]), max_new_tokens=4, do_sample=False)[0, 3:].tolist()
    assert f"GOT {want}" in done.stdout, done.stdout + done.stderr
