"""Whole runs with a real vLLM engine: lag, order, determinism, and what a run leaves. Failures: test_failures.py."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import async_online_dpo as script
import sync_baseline
from benchmark import timeline
from tests.conftest import real_engine
from tests.runs import ALGORITHMS, HERE, flags, metrics, same, start


@pytest.mark.parametrize("slow", ["generator", "learner"])
@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_lag_is_exactly_min_t_S(run, staleness, slow):
    """By the label, and by the probe: the engine's log-probabilities are those of that version (main checks both)."""
    seconds = 0.6 if staleness == 1 else 0.1  # much more than a step where waiting is looked at, on a slow machine too
    sleep = {"before_load" if slow == "generator" else "before_label": lambda *_: time.sleep(seconds)}
    folder, rollouts = run(max_staleness=staleness, **sleep)
    assert [t - r.version for t, r in enumerate(rollouts)] == [min(t, staleness) for t in range(6)]
    assert [r["lag"] for r in metrics(folder)[0]] == [min(t, staleness) for t in range(6)]
    assert max(r.probe_error for r in rollouts) < 1e-4
    if staleness == 1:  # who waits is who is faster
        records = timeline.lines(folder, "metrics.jsonl")[2:]
        waits = {name: np.median([r[f"time/{name}"] for r in records]) for name in ("generator_wait", "wait")}
        own, other = {"generator": ("generator_wait", "wait"), "learner": ("wait", "generator_wait")}[slow]
        assert waits[other] > 0.1 > waits[own]


def test_each_prompt_once_and_each_response_with_its_own(run, task):
    args = script.Args(**flags(task))
    data = script.load_prompts(args, "train", *script.load_tokenizer(args), None)
    _, rollouts = run(max_staleness=2)
    used = []
    for rollout in rollouts:
        assert rollout.prompts == [data[row]["input_ids"] for row in rollout.rows]
        assert rollout.rows[::2] == rollout.rows[1::2]
        used += rollout.rows[::2]
    assert len(set(used)) == len(used) == 96
    # A response belongs to its prompt if its log-probabilities do: version 0's are known to the learner.
    policy = script.Policy(args)
    worst, shuffled = [], []
    others = rollouts[0].prompts[2:] + rollouts[0].prompts[:2]
    for prompts, errors in ((rollouts[0].prompts, worst), (others, shuffled)):
        for prompt, response, logprobs in zip(prompts, rollouts[0].responses, rollouts[0].logprobs):
            with torch.no_grad():
                logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            mine = (logits / args.temperature).log_softmax(-1)[range(len(response)), response]
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
    policy, where = script.Policy(args), dict(device=torch.device("cpu"), generates=True, transfer="file")
    devices = SimpleNamespace(helper=None, map=map, **where)
    prompt, params = [3, 10, 11, 12, 4], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    generated = []
    for version in (1, 2):
        send_weights(script.snapshot(policy, version, [5, 6], args, devices, tmp_path))
        output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
        want = list(prompt)
        with torch.no_grad():
            for _ in range(8):
                want.append(policy.model(torch.tensor([want])).logits[0, -1].argmax().item())
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


def test_no_staleness_is_the_synchronous_script(run):
    """Two loops written apart, one answer, to the last bit: 12 batches of two mini-batches, and the evaluations."""
    changes = dict(total_episodes=384, batch_size=16, num_mini_batches=2, eval_every=5, eval_prompts=16)
    asynchronous, _ = run("async", max_staleness=0, **changes)
    synchronous, _ = run("sync", sync_baseline, **changes)
    records, weights = metrics(asynchronous)
    assert len([r for r in records if "step" in r]) == 12 and len([r for r in records if "eval/score" in r]) == 4
    assert same((records, weights), metrics(synchronous))
    assert records[-2]["logratio_max"] > 1e-3  # the second mini-batch is off-policy


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_no_staleness_is_the_plain_loop(run, task, engine, tmp_path, algo):
    """S = 0 against generate, label, learn in turn, without threads and queues: the same weights to the last bit."""
    module = ALGORITHMS[algo]
    changes = dict(num_mini_batches=2, batch_size=16)
    folder, _ = run("run", module, max_staleness=0, **changes)
    args, affinity, threads = module.Args(**flags(task, **changes)), os.sched_getaffinity(0), torch.get_num_threads()
    devices = module.Devices(args)
    os.sched_setaffinity(0, affinity)
    tokenizer, end_ids = module.load_tokenizer(args)
    data, probe = module.load_prompts(args, "train", tokenizer, end_ids, devices), [5, 6, 7]
    policy, reference = module.Policy(args), module.Policy(args)
    model = module.ActorCritic(policy, module.ValueModel(args)) if algo == "ppo" else policy
    loss = {"online_dpo": "dpo_loss", "rloo": "leave_one_out_loss", "ppo": "actor_critic_loss"}[algo]
    reward = module.make_reward("reward", data, tokenizer, end_ids, args, devices)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0)
    generator = module.Generator(args, devices, probe, end_ids, lambda *_, **__: contextlib.nullcontext())
    generator.llm, generator.send_weights = engine
    for t in range(args.num_batches):
        weights = module.snapshot(policy, t, probe, args, devices, tmp_path / "plain")
        rollout = generator.generate(module.batch_request(t, weights, data, args), 0.0)
        scores, samples = module.score_rollout(rollout, data[rollout.rows], reward, 2, end_ids, args), 2
        if algo == "online_dpo":
            rollout = module.best_and_worst(rollout, scores, 2)
        batch = module.make_batch(rollout, samples, reference, args, devices)
        if algo == "rloo":
            batch.scores = scores
        if algo == "ppo":
            module.ppo_targets(model, batch, scores, args, devices)
        module.learn(model, getattr(module, loss), optimizer, batch, t, args, devices)
    torch.set_num_threads(threads)
    trained = metrics(folder)[1]
    assert all(torch.equal(trained[name], p) for name, p in policy.model.named_parameters())


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_the_pad_token_does_not_matter(run, task, tmp_path, pad):
    """None, or EOS as in many models: the same metrics and weights, to the last bit."""
    changes = {}
    for flag, name in (("model", "policy"), ("reward", "rm")):
        changes[flag] = str(shutil.copytree(f"{task}/{name}", tmp_path / name))
        tokenizer = AutoTokenizer.from_pretrained(changes[flag])
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(changes[flag])
    assert AutoTokenizer.from_pretrained(changes["model"]).pad_token == pad
    assert same(metrics(run("plain")[0]), metrics(run("other", **changes)[0]))


def test_old_weights_are_noticed(run, monkeypatch, tmp_path):
    """If the engine gets the weights of another version than the label says, the probe tells."""
    make = script.snapshot

    def stale(policy, version, *rest):
        weights = make(policy, version, *rest)
        file = weights.folder / "model.safetensors"
        if version == 1:
            shutil.copy(file, kept)
        elif version == 2:
            shutil.copy(kept, file)
        return weights

    kept = str(tmp_path / "version-1.safetensors")
    monkeypatch.setattr(script, "snapshot", stale)
    with pytest.raises(RuntimeError, match="be version 2, its label says 2: vLLM has other weights. The probe"):
        run()


OFF_POLICY = dict(num_mini_batches=2, num_epochs=2, samples_per_prompt=4, lr_schedule="per_update")
VARIANTS = [("online_dpo", dict(dpo_loss=x)) for x in ("dpo", "best_of_k")]
VARIANTS += [("rloo", dict(rloo_loss=x)) for x in ("proximal", "vanilla", "truncated", "copg", "topr", "asymre")]
VARIANTS += [("ppo", dict(ppo_loss=x)) for x in ("behaviour", "recompute", "truncated", "cispo")]
VARIANTS += [("online_dpo", dict(dpo_loss="ipo") | OFF_POLICY), ("rloo", dict(rloo_loss="tba") | OFF_POLICY)]
VARIANTS += [("ppo", dict(ppo_loss="decoupled") | OFF_POLICY)]


LONG = {"best_of_k", "vanilla", "truncated", "copg", "topr", "asymre", "recompute", "cispo"}
for i, (algo, changes) in enumerate(VARIANTS):
    if LONG.intersection(map(str, changes.values())):
        VARIANTS[i] = pytest.param(algo, changes, marks=pytest.mark.long)


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
        assert 0 <= r["clip_fraction"] <= 1 and r["behaviour_kl"] > -1e-6


def test_colocated_and_split_give_the_same(run):
    """All cores for both, in turn: the same prompts, and the same responses of the first weights."""
    changes = dict(module=ALGORITHMS["rloo"], max_staleness=0, total_episodes=96)
    _, split = run("split", **changes)
    _, colocated = run("colocate", placement="colocate", **changes)
    assert [r.prompts for r in split] == [r.prompts for r in colocated]
    assert split[0].responses == colocated[0].responses and len(split) == 3


def test_the_tables_ratios_need_steps_and_come_from_sums():
    """With S = 1 a step after an evaluation has no time, and the next did not have to wait for its batch."""
    parts = dict(generate=2.0, load=0.0, generator_wait=0.0, snapshot=0.0, label=1.0, learn=2.0, wait=0.0)
    times = [None, 9.0, 9.0, 4.0, 2.0, "evaluation", None, 1.0, 3.0, 4.0, 2.0, 3.0]
    records, step = [{"version": 0}], 0
    for seconds in times:
        if seconds == "evaluation":
            records.append({"version": step})
            continue
        records.append({"step": step, "time/step": seconds} | {f"time/{name}": value for name, value in parts.items()})
        step += 1
    timed = [record["time/step"] for record in timeline.timed_steps(records, 1)]
    assert timed == [9.0, 4.0, 2.0, 3.0, 4.0, 2.0, 3.0]
    found = timeline.summary(records, 1)
    assert found["step"] == pytest.approx(27 / 7) and found["generation"] == 2 and found["learning"] == 3
    assert found["overlap"] == pytest.approx(3 / (27 / 7)) and found["overlap_ratio"] == pytest.approx(5 / (27 / 7))
    assert timeline.summary(records[:6], 1) == {} and "too few for a table" in timeline.table({}, 1)


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
    assert output.startswith("Loading torch, transformers and datasets\nA response ends with <eos> (1)\nSplit train: ")
    for text in ("Starting vLLM", "benchmark.timeline", "Evaluation of version 0: ", "win_rate", folder):
        assert text in output
    assert not [chatter for chatter in CHATTER if chatter in output]
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    assert config["args"]["num_batches"] == 6 and len(config["versions"]) == 4
    records, _ = metrics(folder)
    assert [r["version"] for r in records if "eval/win_rate" in r] == [0, 3, 6]
    drawn = [sys.executable, "-m", "benchmark.timeline", folder]
    picture = subprocess.run(drawn, cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert "too few for a table" in picture and "generator |" in picture
    assert os.path.exists(os.path.join(folder, "timeline.png"))
    with open(os.path.join(folder, "trace.json")) as f:
        events = json.load(f)["traceEvents"]
    generate = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "generate"]
    learn = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "learn"]
    assert any(max(a, c) < min(b, d) for a, b in generate for c, d in learn), "generation and learning never overlapped"


@pytest.mark.long
def test_smoke_run_of_the_synchronous_script(task, tmp_path):
    folder = str(tmp_path / "run")
    changes = dict(placement="colocate", eval_every=6, eval_prompts=16)
    status, output = start(task, name="sync_baseline.py", output_dir=folder, **changes)
    assert status == 0, output
    assert not [chatter for chatter in CHATTER if chatter in output]
    assert [r["version"] for r in metrics(folder)[0] if "eval/win_rate" in r] == [0, 6]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_metric_has_its_line_on_the_page(run, algo):
    """PPO with a function as reward and K = 1: its value model starts from the policy."""
    changes = dict(reward="tests.tiny:reward", samples_per_prompt=1) if algo == "ppo" else {}
    folder, _ = run("run", ALGORITHMS[algo], eval_every=6, eval_prompts=16, **changes)
    text = "".join(open(f"{HERE}/docs/{page}.md").read() for page in ("async_online_dpo", f"async_{algo}"))
    plain = {"step", "version", "episodes"}
    names = {name for record in timeline.lines(folder, "metrics.jsonl") for name in record}
    assert not [name for name in names if f"`{name}`" not in text and name not in plain]


@pytest.mark.long
def test_the_trained_policy_opens_in_transformers_and_a_vllm_server(finished):
    """The command of the README for the CPU build, asked by the client of openai."""
    folder = os.path.join(finished[0], "policy")
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Q: w1 A:").input_ids == [3, 6, 4] and policy.config.tie_word_embeddings
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    server = subprocess.Popen(command, env=env, start_new_session=True, **output)
    client, deadline = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none"), time.monotonic() + 200
    try:
        while True:
            try:
                got = client.completions.create(model=folder, prompt="Q: w1 A:", max_tokens=4, temperature=0)
                break
            except openai.APIConnectionError:
                assert server.poll() is None and time.monotonic() < deadline, server.communicate(timeout=5)[0][-3000:]
                time.sleep(1)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
    want = policy.generate(torch.tensor([[3, 6, 4]]), max_new_tokens=4, do_sample=False)[0, 3:]
    assert got.choices[0].text.split() == tokenizer.decode(want, skip_special_tokens=True).split()


@pytest.mark.long
def test_prompts_that_vllm_reads_once_give_the_same_responses(task, tmp_path, monkeypatch):
    """K = 4, with vLLM's cache of prompts and without, two versions: tokens and log-probabilities to the last bit."""
    import vllm

    args, affinity = script.Args(**flags(task, samples_per_prompt=4, prompt_length=100)), os.sched_getaffinity(0)
    rng = np.random.default_rng(0)
    queries = [rng.integers(5, 60, length).tolist() for length in rng.integers(30, 100, 8)]
    found, cached, real = {}, {}, vllm.LLM
    for caching in (True, False):
        options = {} if caching else {"enable_prefix_caching": False}
        monkeypatch.setattr(vllm, "LLM", lambda options=options, **given: real(**given | options))
        with real_engine(args, str(tmp_path / f"weights-{caching}")) as (llm, send_weights):
            devices = script.Devices(args)
            os.sched_setaffinity(0, affinity)
            generator = script.Generator(args, devices, [5, 6, 7], [1], lambda *_, **__: contextlib.nullcontext())
            wait = llm.wait_for_completion

            def counted(wait=wait, caching=caching, **options):
                outputs = wait(**options)
                cached[caching] = cached.get(caching, 0) + sum(output.num_cached_tokens or 0 for output in outputs)
                return outputs

            llm.wait_for_completion = counted
            generator.llm, generator.send_weights = llm, send_weights
            policy = script.Policy(args)
            for version in (1, 2):
                with torch.no_grad():
                    for p in policy.parameters():
                        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(version)) * 0.05)
                weights = script.snapshot(policy, version, [5, 6, 7], args, devices, tmp_path / "on-their-way")
                request = script.Request("batch-0", weights, list(range(32)), [q for q in queries for _ in range(4)], 4,
                                         list(range(32)), 1.0)  # fmt: skip
                rollout = generator.generate(request, 0.0)
                found[caching, version] = (rollout.responses, rollout.logprobs, rollout.probe_error)
                assert rollout.probe_error < 1e-4
    assert found[True, 1] == found[False, 1] and found[True, 2] == found[False, 2] and found[True, 1] != found[True, 2]
    assert cached[True] > 1000 and cached[False] == 0
