"""Models, tokenizers, rewards and data of the kinds that people have: right, or one line that says why not."""

import json
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
import transformers as hf
from datasets import Dataset, DatasetDict, load_from_disk
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import async_online_dpo as script
import async_ppo
from benchmark import models, text_part
from tests import tiny
from tests.runs import HERE, command, flags, metrics
from tests.test_algorithm import ALONE

TURN = 64  # the id of w59, which stands for a token that ends a turn, or for a tag
EOS, BOS = 1, 63  # BOS: w58
LEARNER = types.SimpleNamespace(rank=0, **vars(ALONE))


def edit(path, **changes):
    with open(path) as f:
        content = json.load(f)
    with open(path, "w") as f:
        json.dump(content | changes, f)


@pytest.fixture
def policy(task, tmp_path):
    """policy(name, says=, template=, around=, **tokens): the tiny policy with another tokenizer, in its own folder.

    says: a token that every fourth word is; around: what its tokenizer puts before and after a text.
    """

    def make(name="model", says=None, template=None, around=None, **tokens):
        folder = str(shutil.copytree(f"{task}/policy", tmp_path / name))
        tokenizer = AutoTokenizer.from_pretrained(folder, **tokens)
        if around:
            names = [(token, tokenizer.convert_tokens_to_ids(token)) for token in around.split() if token != "$A"]
            inner = tokenizer.backend_tokenizer
            inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=names)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        if says:
            weights = load_file(f"{folder}/model.safetensors")
            embedding = weights["model.embed_tokens.weight"]
            embedding[:, 0] = 8.0  # so the first number of every hidden state is nearly the same
            weights["lm_head.weight"] = embedding * 0.2
            weights["lm_head.weight"][:, 0] = 0.0
            weights["lm_head.weight"][says, 0] = 0.27
            save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
            edit(f"{folder}/config.json", tie_word_embeddings=False)
        return folder

    return make


def read(args, use="train"):
    """The data as main() reads it."""
    return script.load_prompts(args, use, *script.load_tokenizer(args), ALONE)


def arguments(task, **changes):
    return script.Args(**flags(task, gold="") | changes)


@pytest.mark.parametrize("where", ["config", "generation_config", "tokenizer"])
def test_every_token_that_ends_a_response_ends_it_for_the_scores(run, policy, where, capsys):
    tokens = {"eos_token": "w59"} if where == "tokenizer" else {}
    folder = policy(says=TURN, **tokens)
    if where != "tokenizer":
        edit(f"{folder}/{where}.json", eos_token_id=[EOS, TURN])
    output, rollouts = run(model=folder, reward="tests.tiny:reward", missing_eos_score=-100.0, learning_rate=1e-9)
    assert "A response ends with" in (shown := capsys.readouterr().out) and "w59 (64)" in shown
    for rollout, record in zip(rollouts, metrics(output)[0]):
        assert all(not {EOS, TURN} & set(response[:-1]) for response in rollout.responses)
        ended = [response[-1] in (EOS, TURN) for response in rollout.responses]
        assert sum(response[-1] == TURN for response in rollout.responses) > 16
        bodies = [[i for i in response if i not in (EOS, TURN)] for response in rollout.responses]
        texts = tiny.tokenizer().batch_decode(bodies, skip_special_tokens=True)
        scores = [score if end else -100.0 for score, end in zip(tiny.reward([], texts), ended)]
        assert record["score"] == pytest.approx(sum(scores) / 32, abs=1e-4)


def test_prompts_have_one_bos_and_no_eos(task, policy):
    rows = load_from_disk(f"{task}/data")["train"]
    plain = tiny.tokenizer()(list(rows["query"])).input_ids
    bos = policy("bos", around="w58 $A", bos_token="w58")
    appends = policy("appends", around="$A <eos>")
    assert read(arguments(task, model=appends))["input_ids"] == plain
    assert read(arguments(task, model=bos))["input_ids"] == [[BOS, *row] for row in plain]
    longest = max(rows["query"], key=len)
    both = rows.map(lambda row: {"query": "w58 " * (row["query"] != longest) + row["query"]})  # most have it already
    both.save_to_disk(f"{bos}/data")
    assert read(arguments(task, model=bos, dataset=f"{bos}/data"))["input_ids"] == [[BOS, *row] for row in plain]


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_messages_are_trained_through_the_chat_template(run, task, policy, column):
    """Two formats of TRL: `prompt` and a completion; `messages`, whose last, the assistant's, is the reference."""
    template = "{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    template += "{% if add_generation_prompt %}A:{% endif %}"
    folder = policy(around="w58 $A", bos_token="w58", template=template)

    def chat(row):
        asked = [{"role": "system", "content": "w0"}, {"role": "user", "content": row["query"][3:-3]}]
        answer = [{"role": "assistant", "content": row["reference"]}]
        return {"prompt": asked, "completion": answer, "messages": asked + answer}

    data = load_from_disk(f"{task}/data")
    data.map(chat).remove_columns(["query", "reference"]).save_to_disk(f"{folder}/data")
    reference = "completion" if column == "prompt" else "messages"
    changes = dict(model=folder, dataset=f"{folder}/data", query_column=column, reference_column=reference)
    changes |= dict(gold="tests.tiny:reward", eval_every=6, eval_prompts=16, reward="tests.test_models:reads_chats")
    _, rollouts = run(**changes)
    vocabulary = tiny.tokenizer().get_vocab()
    for prompt, row in zip(rollouts[0].prompts, rollouts[0].rows):
        words = data["train"][row]["query"].split()[1:-1]
        assert prompt == [BOS, 5, *(vocabulary[word] for word in words), 4]
    targets = read(script.Args(**flags(task) | changes), "eval")["reference_ids"]
    texts = data["validation"][:16]["reference"]
    assert targets == [[vocabulary[word] for word in text.split()] + [EOS] for text in texts]


def reads_chats(prompts, responses, queries, response_ids, **columns):
    assert all(prompt.startswith("w58 w0 w") and prompt.endswith(" A:") for prompt in prompts)
    assert all(query[0] == {"role": "system", "content": "w0"} for query in queries)
    assert len(response_ids) == len(responses) == len(prompts)
    return tiny.reward(prompts, responses)


def tags(prompts, responses, raw_responses, **columns):
    assert not any("w59" in response for response in responses)
    return [float(raw.count("w59")) for raw in raw_responses]


def test_a_reward_sees_tags_that_are_special_tokens(run, policy):
    folder = policy(says=TURN, extra_special_tokens=["w59"])
    ends = [EOS, *range(6, 40)]
    edit(f"{folder}/generation_config.json", eos_token_id=ends)
    output, rollouts = run(model=folder, reward="tests.test_models:tags", missing_eos_score=0.0, learning_rate=1e-9)
    counts = [r.count(TURN) if r[-1] in ends else 0 for r in rollouts[0].responses]
    assert sum(counts) > 0 and metrics(output)[0][0]["score"] == pytest.approx(sum(counts) / 32)


@pytest.mark.parametrize("pad", ["<eos>", "[PAD]", None], ids=["eos", "added", "none"])
def test_pad_tokens_do_not_matter(task, policy, pad, tmp_path):
    """As EOS, without an embedding, or missing: prompts, scores and log-probabilities are those of before."""
    found = []
    for name, token in (("before", "<pad>"), ("now", pad)):
        folder = policy(name, pad_token=token)
        judge = str(shutil.copytree(f"{task}/rm", tmp_path / f"rm-{name}"))
        AutoTokenizer.from_pretrained(folder).save_pretrained(judge)
        args = arguments(task, model=folder, reward=judge)
        data, (tokenizer, end_ids) = read(args), script.load_tokenizer(args)
        reward = script.make_reward("reward", data, tokenizer, end_ids, args, ALONE)
        queries = data[:8]["input_ids"]
        found.append((queries, reward(queries, [q[:3] + [EOS] for q in queries], data[:8], 1).tolist()))
    assert found[0] == found[1]


def test_a_prompt_with_a_token_that_has_no_embedding_gets_one_line(task, policy):
    folder = policy()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder)
    Dataset.from_list([{"query": "Q: w1 more A:"}] * 64).save_to_disk(f"{folder}/data")
    with pytest.raises(SystemExit, match="--dataset .*: row 0 has token 65, more, and .* embeddings for 65 tokens"):
        read(arguments(task, model=folder, dataset=f"{folder}/data"))


def judge_of(kind, folder, vocabulary, template=None):
    """A reward model with a tokenizer of its own, whose words stand in another order."""
    torch.manual_seed(1)
    tokenizer = tiny.tokenizer(vocabulary)
    shape = dict(vocab_size=65, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(num_labels=1, initializer_range=0.3, max_position_embeddings=128, pad_token_id=0)
    if kind == "llama":
        model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**shape, eos_token_id=tokenizer.eos_token_id))
    else:
        special = dict(cls_token_id=3, sep_token_id=1, bos_token_id=3, eos_token_id=1, classifier_pooling="mean")
        model = hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**shape, **special))
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


@pytest.mark.parametrize(
    "kind, vocabulary, template, text",
    [
        ("llama", ("<eos>", "<pad>", "<unk>", "Q:", "A:"), None, "{} {} <eos>"),
        ("llama", ("<pad>", "<eos>", "<unk>", "Q:", "A:"), None, "{} {} <eos>"),  # the policy's own: token ids
        ("modernbert", ("<pad>", "<eos>", "<unk>", "Q:", "A:"), None, "{} {}"),
        ("llama", ("<eos>", "<pad>", "<unk>", "Q:", "A:"),
         "{% for m in messages %}{{ m['role'][0] | replace('u', 'w1') | replace('a', 'w2') }} {{ m['content'] }} "
         "{% endfor %}w3", "w1 {} w2 {} w3"),
    ],
    ids=["other words", "same words", "encoder", "template"],
)  # fmt: skip
def test_a_reward_model_scores_each_text_as_by_itself(task, tmp_path, kind, vocabulary, template, text):
    model, own = judge_of(kind, tmp_path / "rm", vocabulary, template)
    args = arguments(task, reward=str(tmp_path / "rm"))
    (tokenizer, end_ids), data = script.load_tokenizer(args), read(args)
    reward = script.make_reward("reward", data, tokenizer, end_ids, args, ALONE)
    columns = data[:8]
    responses = [list(range(5 + i, 8 + 2 * i)) + [EOS] for i in range(8)]
    scores = reward(columns["input_ids"], responses, columns, 1)
    for query, response, score in zip(columns["query"], responses, scores):
        words = own(text.format(query, tokenizer.decode(response[:-1])), return_tensors="pt").input_ids
        with torch.no_grad():
            if kind == "llama":  # its own forward() would leave out a pad id at the end of a text, such as EOS
                expected = model.score(model.model(words).last_hidden_state[0, -1])[0]
            else:
                expected = model(words).logits[0, 0]
        assert score == pytest.approx(expected.item(), abs=1e-4)
    assert len(set(scores.tolist())) == 8


def test_a_value_model_that_reads_other_tokens_gets_one_line(task, tmp_path):
    judge_of("llama", tmp_path / "rm", ("<eos>", "<pad>", "<unk>", "Q:", "A:"))
    args = async_ppo.Args(**flags(task, gold="", reward=str(tmp_path / "rm")))
    with pytest.raises(SystemExit, match="--value-model .*/rm: it has another vocabulary than the policy"):
        async_ppo.load_tokenizer(args)


def test_an_encoder_as_value_model_gets_one_line(task, tmp_path):
    judge_of("modernbert", tmp_path / "rm", ("<pad>", "<eos>", "<unk>", "Q:", "A:"))
    args = async_ppo.Args(**flags(task, gold="", value_model=str(tmp_path / "rm")))
    with pytest.raises(SystemExit, match="--value-model .*/rm: it is an encoder, which sees the tokens that come"):
        async_ppo.ValueModel(args)


def nothing(prompts, responses, **columns):
    pass


def some_none(prompts, responses, **columns):
    return [None for _ in responses]


def column(prompts, responses, **columns):
    return [[1.0] for _ in responses]


def one(prompts, responses, **columns):
    return 1.0


def fails(prompts, responses, **columns):
    return [columns["answer"] for _ in responses]


def strict(prompts, responses):
    return [1.0 for _ in responses]


def of_trl(completions, prompts, **columns):
    assert all(prompt.startswith("Q:") for prompt in prompts)
    return [float(len(completion.split())) for completion in completions]


@pytest.mark.parametrize(
    "name, line",
    [
        ("nothing", "NoneType"),
        ("some_none", "NoneType"),
        ("column", r"must give 2 finite scores; it gave \[\[1.0\], \[1.0\]\]"),
        ("one", "must give 2 finite scores; it gave"),
        ("fails", "KeyError: 'answer'"),
        ("strict", "unexpected keyword argument"),
        ("of_trl", None),
    ],
)
def test_a_reward_function_is_tried_before_a_model_loads(task, monkeypatch, name, line):
    monkeypatch.setattr(script, "load_model", lambda *_: pytest.fail("a model was loaded"))
    args = arguments(task, reward=f"tests.test_models:{name}")
    tokenizer, end_ids = script.load_tokenizer(args)
    if line is None:
        reward = script.make_reward("reward", read(args), tokenizer, end_ids, args, ALONE)
        assert reward([[3, 4]], [[5, 6, EOS]], {"query": ["Q: A:"]}, 1).tolist() == [2.0]
        return
    with pytest.raises(SystemExit, match=f"--reward tests.test_models:{name}: .*{line}") as stopped:
        script.make_reward("reward", read(args), tokenizer, end_ids, args, ALONE)
    assert "\n" not in str(stopped.value)


def test_data_sets_of_every_kind(task, tmp_path):
    rows = load_from_disk(f"{task}/data")
    rows["train"].save_to_disk(tmp_path / "one-split")
    DatasetDict(train=rows["train"]).save_to_disk(tmp_path / "train-only")
    for name in ("files/train.jsonl", "files/validation.jsonl"):
        os.makedirs(tmp_path / "files", exist_ok=True)
        rows[name[6:-6]].to_json(tmp_path / name)
    rows["train"].to_csv(tmp_path / "train.csv")
    rows["train"].to_parquet(tmp_path / "train.parquet")
    for config in ("main", "other"):
        os.makedirs(tmp_path / "configs" / config)
        rows["train"].to_parquet(tmp_path / "configs" / config / "train.parquet")
    lines = [f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/train.parquet\n"
             for c in ("main", "other")]  # fmt: skip
    (tmp_path / "configs/README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n")
    expected = read(arguments(task))["input_ids"]
    for name in ("one-split", "train-only", "files", "files/train.jsonl", "train.csv", "train.parquet"):
        assert read(arguments(task, dataset=str(tmp_path / name)))["input_ids"] == expected, name
    configs = str(tmp_path / "configs")
    assert read(arguments(task, dataset=configs, dataset_config="main"))["input_ids"] == expected
    with pytest.raises(SystemExit, match=r"pick one among the available configs: \['main', 'other'\]"):
        read(arguments(task, dataset=configs))
    with pytest.raises(SystemExit, match="split validation: it has only train .with --eval-every 0 nothing is eval"):
        read(arguments(task, dataset=str(tmp_path / "train-only"), eval_every=2), "eval")
    assert read(arguments(task, dataset=str(tmp_path / "train-only")), "eval") is None
    with pytest.raises(SystemExit, match="there is no such file or folder"):
        read(arguments(task, dataset=str(tmp_path / "nothing")))


def test_rows_that_are_left_out_are_counted(task, tmp_path, capsys):
    rows = load_from_disk(f"{task}/data")["train"].to_list()[:64]
    rows[5]["query"], rows[9]["query"] = None, "Q: " + "w1 " * 40
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    assert len(read(arguments(task, dataset=str(tmp_path / "data")))) == 62
    line = "Split train: 62 of 64 prompts fit --prompt-length 32; 1 have no text or no reference, such as row 5"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("reward, limit, line", [("equal_reward", 12, "all scores of a prompt are equal"),
                                                 ("reward", 1, "no response of the first batch ended")])  # fmt: skip
def test_a_first_batch_without_anything_to_learn_warns(run, policy, capsys, reward, limit, line):
    model = policy(says=EOS) if reward == "equal_reward" else policy(says=5)
    run(model=model, reward=f"tests.tiny:{reward}", response_length=limit, total_episodes=64, missing_eos_score=1.0)
    assert capsys.readouterr().out.count(line) == 1


def test_a_policy_is_not_lost_by_its_generation_config(run, policy):
    folder = policy()
    edit(f"{folder}/generation_config.json", temperature=0.9, top_p=0.6)
    output, _ = run(model=folder, total_episodes=64)
    AutoModelForCausalLM.from_pretrained(f"{output}/policy")


@pytest.mark.parametrize(
    "name, files, line",
    [
        ("adapter", {"adapter_config.json": '{"peft_type": "LORA"}'}, "it is an adapter: merge it"),
        ("no-tokenizer", {"config.json": '{"model_type": "llama"}'}, "it has no tokenizer"),
    ],
)
def test_half_a_model_gets_one_line(task, tmp_path, name, files, line):
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(SystemExit, match=f"--model .*: {line}"):
        script.load_tokenizer(arguments(task, model=str(tmp_path)))


def test_a_model_without_some_weights_gets_one_line(task, policy):
    folder = policy()
    weights = load_file(f"{folder}/model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="--model .*: it has no .*norm.weight"):
        script.Policy(arguments(task, model=folder))


def test_a_forward_pass_that_padding_changes_gets_one_line(task, tmp_path, monkeypatch):
    """Without its mask the padded prompt is read with its padding."""
    args = arguments(task, output_dir=str(tmp_path / "run"))
    after_prompts = script.after_prompts
    everything = lambda model, prompts, mask, *rest: after_prompts(model, prompts, mask | True, *rest)  # noqa: E731
    monkeypatch.setattr(script, "after_prompts", everything)
    run = script.Run(args, LEARNER)
    with pytest.raises(SystemExit, match="LlamaForCausalLM computes something else after padding"):
        run.try_policy(script.Policy(args), read(args), tiny.tokenizer(), [EOS])


@pytest.mark.parametrize("name, line", [("Mixtral (experts)", "mixture of experts"), ("Bloom", "docs/models.md"),
                                        ("Cohere 2", "docs/models.md"),
                                        ("Gemma 3 (text and images)", "benchmark.text_part")])  # fmt: skip
def test_models_that_are_refused(task, tmp_path, name, line):
    models.write_data(tmp_path)
    folder = models.write_model(name, tmp_path)
    with pytest.raises(SystemExit, match=f"--model .*{line}"):
        script.load_tokenizer(arguments(task, model=str(folder)))
    if "images" in name:
        text_part.main(str(folder), str(tmp_path / "text"))
        script.load_tokenizer(arguments(task, model=str(tmp_path / "text")))


def test_a_script_that_was_copied_alone_runs(task, tmp_path):
    """Without benchmark/ beside it, so also without benchmark/checks.py."""
    shutil.copy(f"{HERE}/async_online_dpo.py", tmp_path)

    def train(**changes):
        arguments = command(task, gold="", total_episodes=32, **changes)
        return subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)

    done = train(output_dir="run")
    assert done.returncode == 0 and len(metrics(tmp_path / "run")[0]) == 1, done.stderr
    assert "benchmark/checks.py is not here: the input is not checked" in done.stdout
    refused = train(model="./nowhere")
    assert refused.returncode == 1 and "OSError" in refused.stderr and "nowhere" in refused.stderr


def test_two_runs_do_not_share_a_folder(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, devices = arguments(task), LEARNER
    assert script.Run(args, devices).folder != script.Run(args, devices).folder
    args = arguments(task, output_dir=str(tmp_path / "mine"))
    run = script.Run(args, devices)
    again = command(task, output_dir=str(tmp_path / "mine"), gold="")
    done = subprocess.run(again, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "another run uses it: name a new folder" in done.stderr
    kept = json.loads((run.folder / "config.json").read_text())["wandb_id"]
    (run.folder / "metrics.jsonl").touch()  # as if it had begun
    assert script.Run(args, devices).wandb_id == kept


def with_processes(prompts, responses, **columns):
    """A reward that starts processes of its own."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    for method in ("spawn", "forkserver"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
            lengths = list(pool.map(len, responses))
    return [float(length) for length in lengths]


@pytest.mark.long
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone"]])
def test_a_reward_may_start_processes(task, tmp_path, launcher):
    launcher = [sys.executable, *launcher]
    changes = dict(reward="tests.test_models:with_processes", total_episodes=32, output_dir=str(tmp_path / "run"))
    done = subprocess.run(launcher + command(task, **changes)[1:], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.long
@pytest.mark.parametrize("name", list(models.ARCHITECTURES))
def test_every_architecture_runs_or_is_refused(tmp_path, name):
    """In float32; `python -m benchmark.models` tries bfloat16 too."""
    models.write_data(tmp_path)
    error, line = models.train(models.write_model(name, tmp_path), tmp_path, "float32")
    if name in ("Mamba", "Mixtral (experts)", "Qwen3-MoE (experts)", "Gemma 3 (text and images)", "Cohere 2", "Bloom"):
        assert error is None and line.startswith("--model MODEL")
    else:
        assert error < 1e-4, line
