"""What people do with a model of the Hugging Face libraries: cards, uploads, lm-eval, generation options, gradient
checkpointing, other vocabularies, LoRA, torch.compile."""
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, TextStreamer, pipeline

import asnn_common as asnn
from test_artefacts import metrics
from test_model import STATES, V, build, close, generate, left_padded

STUDENTS = {"vector": {"threshold": "mixed"}, **{name: STATES[name] for name in ("vector at all sites", "matrix",
                                                                             "delta at all sites")}}
LINEARS = ["key", "value", "receptance", "output", "up", "down"]


@pytest.fixture(scope="module")
def model():
    return build(threshold="mixed", granularity="channel")


@pytest.fixture
def ids():
    return torch.randint(1, V, (3, 12))


@pytest.fixture(scope="module")
def tokenizer():
    """One word a token, so that texts are easy to compare with ids."""
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")


# ---- model card ----------------------------------------------------------------------------------


def front_matter(card):
    """The card's header as the hub reads it; raises for YAML that is none and for a model-index that is not valid."""
    return ModelCard(card, ignore_metadata_errors=False).data


def test_the_card_has_a_header_that_the_hub_reads():
    values = metrics("name")
    values["teacher"]["name"], values["corpus"]["name"] = "gpt2", "wikitext-2"
    card = asnn.model_card(values)
    data = front_matter(card)
    assert (data.license, data.base_model, data.datasets) == ("mit", "openai-community/gpt2", ["Salesforce/wikitext"])
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("transformers", "text-generation", ["perplexity"])
    assert "name" in data.model_name
    found = {r.metric_type: r.metric_value for r in data.eval_results}
    assert found == {"perplexity": 20.0, "bits_per_byte": 1.25, "word_perplexity": 99.0, "perplexity_ratio": 2.0}
    assert {(r.dataset_type, r.dataset_config, r.dataset_split) for r in data.eval_results} == {
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}
    assert "## Limits" in card and "licence of\ngpt2" in card


@pytest.mark.parametrize("name,trained,base,licence", [
    ("gpt2-medium", False, "openai-community/gpt2-medium", "mit"),
    ("distilgpt2", False, "distilbert/distilgpt2", "apache-2.0"), ("someone/theirs", False, "someone/theirs", "other"),
    ("a-folder", False, None, "other"), ("gpt2-6x256-pydocs-79e16e", True, None, "mit"),
    ("untrained-goose", False, None, "mit")])
def test_the_card_names_as_base_model_only_what_the_hub_has(name, trained, base, licence):
    values = metrics()
    values["teacher"].update({"name": name}, **({"trained_steps": 40} if trained else {}))
    data = front_matter(asnn.model_card(values))
    assert (data.base_model, data.license, data.datasets) == (base, licence, None)
    assert (data.to_dict().get("license_name") is not None) == (licence == "other")


def test_the_card_leaves_out_what_was_not_measured():
    values = metrics(bits=None)
    values["student"]["test"].update(ppl=float("nan"), word_ppl=None)
    assert [r.metric_type for r in front_matter(asnn.model_card(values)).eval_results] == ["perplexity_ratio"]
    values["gap"]["test"]["value"] = float("inf")
    assert front_matter(asnn.model_card(values)).eval_results is None


def test_names_that_yaml_would_misread_survive():
    values = metrics("on: [#1] 'x'")
    values["corpus"]["name"] = "my: corpus # 1"
    data = front_matter(asnn.model_card(values))
    assert data.model_name == "ASNN-Goose v14.3, run on: [#1] 'x'"
    assert data.eval_results[0].dataset_type == "my: corpus # 1"


def test_the_card_says_what_is_known_of_the_energy():
    values = metrics()
    assert "Neither the energy of training nor that of generation was measured." in asnn.model_card(values)
    for energy, said in (("12 J a token.", "12 J a token."),
                         ({"joules per token": 0.123456, "counter": "RAPL"},
                          "- joules per token: 0.1235\n- counter: RAPL")):
        card = asnn.model_card({**values, "energy": energy})
        assert said in card and "was measured" not in card


# ---- uploads -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """{repository: {path: bytes}} of what is uploaded; nothing reaches a network."""
    repositories = {}

    def create_repo(self, repo_id, **_):
        repositories.setdefault(repo_id, {})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            with operation.as_file() as file:
                repositories[repo_id][operation.path_in_repo] = file.read()
        url = f"https://huggingface.co/{repo_id}/commit/0"
        return huggingface_hub.CommitInfo(commit_url=url, commit_message="", commit_description="", oid="0")

    def nothing_there(*_, **__):
        raise huggingface_hub.errors.EntryNotFoundError("no README.md there")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.hf_api, "is_xet_available", lambda: False)  # its uploader talks for itself
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda self, content, **_: front_matter(content))
    monkeypatch.setattr(ModelCard, "load", nothing_there)
    return repositories


def test_push_to_hub_uploads_all_that_loading_needs(hub, model, tokenizer):
    model.push_to_hub("me/goose")
    assert set(hub["me/goose"]) == {"config.json", "generation_config.json", "model.safetensors", "asnn_common.py",
                                    "README.md"}
    tokenizer.push_to_hub("me/goose")
    files = hub["me/goose"]
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert files["asnn_common.py"] == Path(asnn.__file__).read_bytes()
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForCausalLM"] == "asnn_common.GooseForCausalLM"


@pytest.fixture
def finished(tmp_path, distillation, teacher):
    run = asnn.Run.open("v14.3", "name", {"recipe": "v14.3"}, tmp_path)
    run.finish(metrics("name"), distillation()[0].student.eval(), teacher.tokenizer)
    return run.folder / "student"


def test_the_folder_of_a_run_is_a_whole_repository(hub, finished, tmp_path):
    api = HfApi(token="none")
    api.create_repo("me/goose")
    api.upload_folder(repo_id="me/goose", folder_path=finished)
    files = hub["me/goose"]
    assert set(files) == {"README.md", "asnn_common.py", "config.json", "generation_config.json", "model.safetensors",
                          "tokenizer.json", "tokenizer_config.json"}
    assert front_matter(files["README.md"].decode()).eval_results[0].metric_value == 20.0


PROGRAM = """
import json, re, sys
from transformers import pipeline
folder, result = sys.argv[1:]
code = re.search("```python\\n(.*?)```", open(folder + "/README.md").read(), re.S)[1]
exec(code.replace("this folder", folder))
options = dict(do_sample=False, max_new_tokens=6, return_full_text=False)
one = pipeline("text-generation", model=student, tokenizer=tokenizer)
other = pipeline("text-generation", model=folder, trust_remote_code=True)
texts = ["The state of", "It fades with every"]
json.dump([[row[0]["generated_text"] for row in speak(texts, batch_size=2, **options)] for speak in (one, other)],
          open(result, "w"))
"""


def test_the_card_s_program_and_the_pipeline_work_on_the_folder_alone(finished, teacher, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ASNN_"))}
    environment.update(HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1")
    ended = subprocess.run([sys.executable, "-c", PROGRAM, str(finished), str(tmp_path / "result.json")], cwd=tmp_path,
                           env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "y/N" not in ended.stdout + ended.stderr  # a question that a notebook cannot answer
    student = asnn.GooseForCausalLM.from_pretrained(finished).eval()
    speak = pipeline("text-generation", model=student, tokenizer=teacher.tokenizer)
    expected = [speak(text, do_sample=False, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
                for text in ("The state of", "It fades with every")]
    assert json.loads((tmp_path / "result.json").read_text()) == [expected, expected]


# ---- lm-eval -------------------------------------------------------------------------------------

LM_EVAL = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
TEXTS = ["It fades with every token.", "The state of a spike is small and it fades with every token that the model "
         "reads again and every spike is small."]
QUESTIONS = [{"q": "The state of a", "choices": [" spike is", " token fades with"], "gold": 0},
             {"q": "It fades with every", "choices": [" small again", " token"], "gold": 1},
             {"q": "Every token that", "choices": [" the", " it", " spike"], "gold": 2}]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three tasks of lm-eval on two local files."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, data, lines in (
            ("choice", "questions", "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
             "doc_to_target: '{{gold}}'\ntarget_delimiter: ''\nmetric_list: [{metric: acc}, {metric: acc_norm}]"),
            ("rolling", "texts", "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
             "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"),
            ("generation", "questions", "output_type: generate_until\ndoc_to_text: '{{q}}'\n"
             "doc_to_target: '{{choices[gold]}}'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 6, do_sample: false}\n"
             "metric_list: [{metric: exact_match}]")):
        (folder / f"{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / data}.jsonl}}}}\n"
            f"test_split: test\n{lines}\nmetadata: {{version: 1.0}}\n")
    return folder


@LM_EVAL
@pytest.mark.parametrize("sites", [("k", "v"), asnn.SITES])
def test_lm_eval_measures_what_the_plain_model_says(tasks, small_recipe, tokens, teacher, sites, tmp_path, monkeypatch):
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    recipe = small_recipe(spike_sites=sites)
    sampler = asnn.WindowSampler(tokens["train"], recipe.seq_len, recipe.seed)
    student = asnn.build_student(recipe, teacher, calibration=sampler.batch(0, recipe.batch_size)[0])
    asnn.fit(asnn.Distiller(student, teacher.model, recipe), sampler,
             asnn.FitConfig.from_recipe(recipe, precision="fp32"))
    student, tokenizer = student.eval(), teacher.tokenizer
    measured = lm_eval.simple_evaluate(
        model=HFLM(pretrained=student, tokenizer=tokenizer, batch_size=2), bootstrap_iters=2,
        tasks=["local_choice", "local_rolling", "local_generation"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False))
    samples, results = measured["samples"], measured["results"]

    @torch.no_grad()
    def log_likelihood(before, after):
        ids = torch.tensor([before + after])
        scores = student(ids).logits.log_softmax(-1)[0, len(before) - 1:-1]
        return scores.gather(1, ids[0, len(before):, None]).sum().item()

    right = 0
    for sample, row in zip(samples["local_choice"], QUESTIONS):
        before = tokenizer(row["q"])["input_ids"]
        expected = [log_likelihood(before, tokenizer(row["q"] + choice)["input_ids"][len(before):])
                    for choice in row["choices"]]
        assert [answer[0] for answer in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-4)
        right += max(range(len(expected)), key=expected.__getitem__) == row["gold"]
    assert results["local_choice"]["acc,none"] == pytest.approx(right / 3)
    total = 0.0
    for sample, text in zip(samples["local_rolling"], TEXTS):
        pieces, start, window = tokenizer(text)["input_ids"], tokenizer.bos_token_id, student.config.n_positions
        expected, begin = 0.0, 0
        while begin < len(pieces):  # windows as lm-eval cuts them: new tokens, and as many before as fit
            end = min(begin + window, len(pieces))
            whole = [start, *pieces][max(0, end - window):end + 1]
            new = end - begin
            expected += log_likelihood(whole[:len(whole) - new], whole[len(whole) - new:])
            begin = end
        assert sample["filtered_resps"][0] == pytest.approx(expected, rel=1e-4)
        total += expected
    words = sum(len(text.split()) for text in TEXTS)
    assert results["local_rolling"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-3)
    for sample, row in zip(samples["local_generation"], QUESTIONS):
        given = torch.tensor([tokenizer(row["q"])["input_ids"]])
        new = student.generate(given, max_new_tokens=6, do_sample=False)[0, given.shape[1]:]
        assert sample["filtered_resps"][0] == tokenizer.decode(new, skip_special_tokens=True).split(".")[0]


# ---- options of generate -------------------------------------------------------------------------


def plain_greedy(model, ids, steps, change):
    """Greedy decoding by full forward passes; change(tokens so far, scores (B, V)) -> scores."""
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat((ids, change(ids, model(ids).logits[:, -1]).argmax(-1, keepdim=True)), 1)
    return ids


@torch.no_grad()
def new_scores(model, out, prompt):
    """Plain logits (B, new, V) at the tokens that were generated, and those tokens (B, new)."""
    return model(out).logits[:, prompt - 1:-1], out[:, prompt:]


def test_top_k_takes_tokens_among_the_k_best(model, ids):
    assert torch.equal(generate(model, ids, do_sample=True, top_k=1), generate(model, ids))
    scores, new = new_scores(model, generate(model, ids, do_sample=True, top_k=3, temperature=9.0), 12)
    ranks = (scores > scores.gather(2, new.unsqueeze(2))).sum(2)
    assert ranks.unique().tolist() == [0, 1, 2]
    scores, new = new_scores(model, generate(model, ids, do_sample=True, top_k=0, temperature=9.0), 12)
    assert (scores > scores.gather(2, new.unsqueeze(2))).sum(2).max() > 2


def test_top_p_takes_tokens_of_the_nucleus(model, ids):
    assert torch.equal(generate(model, ids, do_sample=True, top_k=0, top_p=1e-4), generate(model, ids))
    options = {"do_sample": True, "top_k": 0, "temperature": 5.0}

    def before(out):  # probability of all that is likelier
        scores, new = new_scores(model, out, 12)
        p = (scores / 5.0).softmax(-1)
        mine = p.gather(2, new.unsqueeze(2))
        return (p * (p > mine)).sum(2)
    kept = before(generate(model, ids, top_p=0.6, **options))
    assert kept.max() < 0.6 and (kept > 0).any()
    assert before(generate(model, ids, **options)).max() > 0.6


def test_repetition_penalty_is_that_of_the_plain_path(model, ids):
    def penalised(seen, scores):
        had = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, seen, True)
        return torch.where(had, torch.where(scores > 0, scores / 3.0, scores * 3.0), scores)
    out = generate(model, ids, repetition_penalty=3.0)
    assert torch.equal(out, plain_greedy(model, ids, 10, penalised))
    assert not torch.equal(out, generate(model, ids))


def test_num_return_sequences_gives_several_continuations_of_each_prompt(model, ids):
    out = generate(model, ids, do_sample=True, temperature=5.0, num_return_sequences=4)
    assert out.shape == (12, 22) and torch.equal(out[:, :12], ids.repeat_interleave(4, 0))
    assert len({tuple(row) for row in out[:4].tolist()}) == 4
    same = generate(model, ids, do_sample=True, top_k=1, num_return_sequences=4)
    assert torch.equal(same, generate(model, ids).repeat_interleave(4, 0))


def test_streamers_say_what_generate_returns(model, ids, tokenizer, capsys):
    expected = tokenizer.decode(generate(model, ids[:1])[0, 12:])
    generate(model, ids[:1], streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=generate, args=(model, ids[:1]), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).strip() == expected and len([p for p in pieces if p]) > 3


def test_stopping_criteria_stop_each_sequence(model, ids):
    class After(StoppingCriteria):
        """Stops the first sequence after 3 new tokens, the others after 6."""

        def __call__(self, input_ids, scores, **_):
            limit = torch.full((len(input_ids),), 18)
            limit[0] = 15
            return input_ids.shape[1] >= limit
    plain = generate(model, ids)
    never = next(token for token in range(1, V) if token not in plain)  # only with an end token is the rest padded
    out = generate(model, ids, stopping_criteria=StoppingCriteriaList([After()]), eos_token_id=never)
    assert out.shape == (3, 18) and torch.equal(out[1:], plain[1:, :18])
    assert torch.equal(out[0, :15], plain[0, :15]) and (out[0, 15:] == 0).all()


def test_stop_strings_end_the_text(teacher):
    tokenizer = teacher.tokenizer
    model, ids = build(vocab_size=len(tokenizer)), tokenizer("The state of", return_tensors="pt")["input_ids"]
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 20}
    plain = generate(model, ids, **options)[0, ids.shape[1]:]
    words = [tokenizer.decode(token).strip() for token in plain]
    stop = next(word for word in words[3:] if word.isascii() and word.isalpha())
    first = next(i for i in range(20) if stop in tokenizer.decode(plain[:i + 1]))
    out = generate(model, ids, stop_strings=["never said", stop], tokenizer=tokenizer, **options)[0, ids.shape[1]:]
    assert first < 19 and torch.equal(out, plain[:first + 1])


def test_max_time_ends_after_the_token_that_passes_it(model, ids):
    assert torch.equal(generate(model, ids, max_time=1e-9), generate(model, ids, max_new_tokens=1))
    assert torch.equal(generate(model, ids, max_time=600.0), generate(model, ids))


def test_min_new_tokens_holds_the_end_back(model, ids):
    row = ids[:1]
    end = generate(model, row, max_new_tokens=1)[0, 12].item()
    assert generate(model, row, eos_token_id=end).shape[1] == 13
    late = generate(model, row, eos_token_id=end, min_new_tokens=9)

    def without_end(seen, scores):
        return scores.index_fill(1, torch.tensor([end]), -math.inf) if seen.shape[1] < 12 + 9 else scores
    assert torch.equal(late, plain_greedy(model, row, 10, without_end)[:, :late.shape[1]]) and late.shape[1] >= 21


def test_bad_words_are_never_said(model, ids):
    bad = generate(model, ids)[:, 12:].unique().tolist()[:5]

    def without(_, scores):
        return scores.index_fill(1, torch.tensor(bad), -math.inf)
    out = generate(model, ids, bad_words_ids=[[token] for token in bad])
    assert torch.equal(out, plain_greedy(model, ids, 10, without))
    assert not torch.isin(out[:, 12:], torch.tensor(bad)).any()


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("options", [{"bad_words_ids": [[7], [9], [11], [13]]}, {"min_new_tokens": 8, "eos_token_id": 5},
                                     {"do_sample": True, "top_k": 1}, {"num_beams": 2, "no_repeat_ngram_size": 2}],
                         ids=lambda options: next(iter(options)))
def test_options_on_a_left_padded_batch_equal_the_singles(ids, student, options):
    model = build(**STUDENTS[student])
    padded, mask = left_padded(ids, (0, 3, 8))
    batch = generate(model, padded, attention_mask=mask, **options)
    for row, pad in enumerate((0, 3, 8)):
        single = generate(model, ids[row:row + 1, pad:], **options)[0]
        assert torch.equal(batch[row, pad:pad + len(single)], single) and (batch[row, pad + len(single):] == 0).all()


# ---- gradient checkpointing ----------------------------------------------------------------------


def checkpoint(model, **options):
    with warnings.catch_warnings():  # the library is about to rename it
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(**options)


def step(model, ids, **given):
    """(loss, {name: gradient}, bytes that autograd saved)."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids, **given).loss
        held = sum(saved.values())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, held


def same_gradients(one, other):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("padded", [False, True])
def test_checkpointing_gives_the_same_gradients(ids, student, padded, monkeypatch):
    model = build(**STUDENTS[student]).train()
    given = {}
    if padded:
        ids, given["attention_mask"] = left_padded(ids, (0, 3, 8))
    loss, gradients, held = step(model, ids, **given)
    checkpoint(model)
    calls, layer = [], asnn.GooseBlock.layer
    monkeypatch.setattr(asnn.GooseBlock, "layer", lambda *args: (calls.append(1), layer(*args))[1])
    again, others, less = step(model, ids, **given)
    assert len(calls) == 2 * model.config.n_layer and torch.equal(loss, again)
    same_gradients(gradients, others)
    less += model.config.n_layer * ids.numel() * model.config.d_model * 4  # a block's input is held, but not "saved"
    assert less < 0.4 * held, (less, held)
    model.eval()
    assert torch.equal(generate(model, ids[:1]), generate(build(**STUDENTS[student]), ids[:1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.train().gradient_checkpointing_disable()
    calls.clear()
    assert step(model, ids, **given)[2] == pytest.approx(held, rel=0.05) and len(calls) == model.config.n_layer


def test_checkpointing_holds_no_states_of_layers_that_are_done(ids, monkeypatch):
    model, layer, states, alive = build().train(), asnn.GooseBlock.layer, [], []

    def watched(*args):
        alive.append([state() is not None for state in states])
        out = layer(*args)
        states.append(weakref.ref(out[1].S))
        return out
    monkeypatch.setattr(asnn.GooseBlock, "layer", watched)
    checkpoint(model)
    model(ids, labels=ids)
    assert alive[2][0] is False  # the last one is still a name in the loop
    alive.clear(), states.clear()
    model(ids, use_cache=True)
    assert alive[2][0] is True


def test_the_reentrant_kind_of_checkpointing_gives_the_same_gradients(ids):
    model = build().train()
    _, gradients, _ = step(model, ids)
    checkpoint(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    same_gradients(gradients, step(model, ids)[1])


def test_checkpointing_passes_gradients_through_a_state(ids):
    def gradient(model):
        state = model(ids[:, :6], use_cache=True).state
        model.zero_grad()
        model(ids[:, 6:], state=state, labels=ids[:, 6:]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model = build().train()
    plain = gradient(model)
    checkpoint(model)
    same_gradients(plain, gradient(model))


def test_distillation_with_checkpointing_is_the_same(distillation):
    losses = []
    for on in (False, True):
        objective, sampler, settings = distillation(fdd_start=2)
        if on:
            checkpoint(objective.student)
        losses.append([row["loss"] for row in asnn.fit(objective, sampler, settings).log if "loss" in row])
    assert len(losses[0]) > 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---- vocabulary ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [V + 7, V - 9])
def test_a_resized_student_speaks_and_survives_saving(ids, tmp_path, tied, size):
    ids = ids.clamp_max(V - 10)
    model = build(tie_word_embeddings=tied)
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size == model.lm_head.out_features == model.get_input_embeddings().num_embeddings
    assert (model.lm_head.weight is model.goose.embeddings.weight) == tied
    close(model(ids).logits[..., :min(V, size)], before[..., :size])
    if size > V:
        ids[:, 5] = size - 1  # a token that was not there before
    out = generate(model, ids)
    assert out.max() < size
    model.save_pretrained(tmp_path)
    loaded = asnn.GooseForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == size and (loaded.lm_head.weight is loaded.goose.embeddings.weight) == tied
    assert torch.equal(loaded(ids).logits, model(ids).logits) and torch.equal(generate(loaded, ids), out)
    model.train()(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (size, 32)


# ---- LoRA ----------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("student", STUDENTS)
def test_lora_trains_adapters_only_and_merges(ids, student, tmp_path):
    import peft
    base = build(**STUDENTS[student])
    untouched = {name: p.detach().clone() for name, p in base.named_parameters()}
    plain = base(ids).logits.detach()
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEARS))
    close(model(ids).logits, plain)  # adapters start at zero
    adapted = {name.split(".")[-1] for name, m in model.named_modules() if hasattr(m, "lora_A")}
    count = sum(hasattr(m, "lora_A") for m in model.modules())
    assert adapted == set(LINEARS) and count == len(LINEARS) * base.config.n_layer
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    checkpoint(model)
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=1e-2), []
    model.train()
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.grad is not None for p in trained.values())
    model.eval()
    for name, p in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, untouched[re.sub(r"^base_model\.model\.|base_layer\.", "", name)]), name
    tuned = model(ids).logits.detach()
    assert (tuned - plain).abs().max() > 0.05
    model.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").stat().st_size < 1e5
    again = peft.PeftModel.from_pretrained(build(**STUDENTS[student]), tmp_path / "adapters").eval()
    assert torch.equal(again(ids).logits, tuned)
    assert torch.equal(generate(again, ids), generate(model, ids))
    merged = again.merge_and_unload()
    assert type(merged) is asnn.GooseForCausalLM and not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(merged(ids).logits, tuned, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    loaded = asnn.GooseForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(loaded(ids).logits, merged(ids).logits)


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """What dynamo made of the code, one entry a graph, and a backend that runs it as it is."""
    import torch._dynamo
    torch._dynamo.reset()
    made = []

    def backend(graph, _inputs):
        made.append(graph)
        return graph.forward
    yield made, backend
    torch._dynamo.reset()


@pytest.mark.parametrize("student", ["vector", "delta at all sites"])
def test_a_training_step_is_one_graph_with_the_same_gradients(ids, student, graphs):
    model = build(n_layer=1, **STUDENTS[student]).train()
    logits = model(ids).logits.detach()
    loss, gradients, _ = step(model, ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # raises at a graph break
    model.zero_grad()
    out = compiled(ids, labels=ids)
    out.loss.backward()
    close(out.logits, logits)
    same_gradients(gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("student", ["vector", "delta at all sites"])
def test_decoding_compiles_twice_and_not_at_each_token(ids, student, graphs):
    """Once for the state of a prompt, whose tensors are views of longer ones, once for the state of a token; the number
    of tokens seen, an int, becomes dynamic with the second."""
    made, backend = graphs
    model = build(n_layer=1, **STUDENTS[student])
    tokens = torch.randint(1, V, (3, 40))
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        plain = state = model(tokens[:, :8]).state
        for t in range(8, 40):
            one, other = model(tokens[:, t:t + 1], state=plain), compiled(tokens[:, t:t + 1], state=state)
            plain, state = one.state, other.state
            close(other.logits, one.logits)
    assert len(made) == 2 and state.length == 40 and type(state) is asnn.GooseState


def test_generate_with_a_compiled_forward_makes_a_bounded_number_of_graphs(ids, graphs):
    made, backend = graphs
    model, plain = build(n_layer=1), build(n_layer=1)
    model.forward = torch.compile(model.forward, backend=backend)
    padded, mask = left_padded(ids, (0, 3, 8))
    for given in ({"inputs": ids}, {"inputs": padded, "attention_mask": mask}):
        counts = []
        for new in (8, 24):
            out = model.generate(**given, max_new_tokens=new, do_sample=False, pad_token_id=0)
            assert torch.equal(out, plain.generate(**given, max_new_tokens=new, do_sample=False, pad_token_id=0))
            counts.append(len(made))
        assert 1 <= counts[0] == counts[1] <= 16
