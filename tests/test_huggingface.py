"""What people do with a model of the Hugging Face libraries: folders that stand alone, lm-eval,
options of generate, gradient checkpointing, other vocabularies, LoRA, torch.compile."""
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import pipeline

import asnn_common as asnn
from test_model import PADS, SOME, V, build, close, generate, left_padded, plain_greedy

LINEARS = ["key", "value", "receptance", "output", "up", "down"]


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def ids():
    return torch.randint(1, V, (3, 12))


@pytest.fixture(scope="module")
def words():
    """A tokenizer with one word a token, so that texts are easy to compare with ids."""
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers
    tokenizer = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0",
                                                padding_side="left")


# ---- a folder that stands alone, and the import --------------------------------------------------

ALONE = """
import importlib.util, json, sys
folder, again, *blocked = sys.argv[1:]
assert importlib.util.find_spec("asnn_common") is None
sys.modules.update({name: None for name in blocked})
import torch
from transformers import AutoModelForCausalLM, pipeline
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(1, 13).unsqueeze(0)
with torch.no_grad():
    logits = model(ids).logits.tolist()
tokens = [model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=beams).tolist()
          for beams in (1, 3)]
model.save_pretrained(again)
speak = pipeline("text-generation", model=folder, trust_remote_code=True)
texts = speak(["w3 w4 w5 w6 w7", "w9 w10"], batch_size=2, do_sample=False, max_new_tokens=5,
              return_full_text=False)
print(json.dumps({"logits": logits, "tokens": tokens, 
                  "texts": [text[0]["generated_text"] for text in texts],
                  "tied": model.lm_head.weight is model.get_input_embeddings().weight,
                  "hash": model.content_hash(), "missed": [n for n in blocked if sys.modules[n]]}))
"""
IMPORT = """
import io, contextlib, sys, time
import torch
from transformers import Trainer
before, said, begin = set(sys.modules), io.StringIO(), time.process_time()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    import asnn_common
print([begin, time.process_time() - begin, said.getvalue(),
       [name for name in ("matplotlib", "pandas", "scipy", "IPython", "sklearn", "datasets")
        if name in set(sys.modules) - before], torch.is_grad_enabled(), torch.get_num_threads()])
"""
UNNEEDED = ("accelerate", "datasets", "matplotlib", "pandas", "scipy", "sklearn", "peft")


def process(program, place, *arguments, **more):
    """A Python that sees none of this project; its environment starts without ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_", "ASNN_"))}
    kept.update(HF_MODULES_CACHE=str(place / "modules"), HF_HOME=str(place / "hf"),
                HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", **more)
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], cwd=place,
                            env=kept, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def answer(started):
    output, errors = started.communicate(timeout=200)
    assert started.returncode == 0, errors[-3000:]
    assert "y/N" not in output + errors  # a question that a notebook cannot answer
    return output.splitlines()[-1]


@pytest.fixture(scope="module")
def saved(model, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "student"
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def started(saved, tmp_path_factory):
    """Processes that run beside the other tests."""
    alone, imported = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("imported")
    running = {"alone": process(ALONE, alone, saved, alone / "again", *UNNEEDED),
               "import": process(IMPORT, imported, PYTHONPATH=str(Path(asnn.__file__).parent))}
    yield running, alone / "again"
    for one in running.values():
        one.kill()
        one.communicate()


def test_a_saved_folder_holds_sections_1_to_4_and_names_its_classes(saved):
    ours, code = Path(asnn.__file__).read_text(), (saved / "modeling_goose.py").read_text()
    assert ours.startswith(code.rstrip()) and "# 4  Model" in code and "# 5  Losses" not in code
    used = set(re.findall(r"^(?:import|from) (\w+)", code, re.M))
    assert used - set(sys.stdlib_module_names) == {"torch", "transformers"}
    config = json.loads((saved / "config.json").read_text())
    assert config["auto_map"] == {"AutoConfig": "modeling_goose.GooseConfig",
                                  "AutoModelForCausalLM": "modeling_goose.GooseForCausalLM"}


@pytest.mark.parametrize("library, version", [(transformers, "4.57.1"), (torch, "2.9.1+cu128")])
def test_libraries_that_are_too_old_are_named_in_a_sentence(saved, monkeypatch, library, version):
    monkeypatch.setattr(library, "__version__", version)
    spec = importlib.util.spec_from_file_location("too_old", saved / "modeling_goose.py")
    with pytest.raises(ImportError, match=rf"{re.escape(version)} is too old .* or newer\.$"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ---- lm-eval -------------------------------------------------------------------------------------

TEXTS = ["w3 w4 w5.", " ".join(f"w{1 + (7 * i) % 49}" for i in range(40))]
QUESTIONS = [{"q": "w3 w9", "choices": [" w4 w5", " w6 w7 w8"], "gold": 0},
             {"q": "w11 w12 w13", "choices": [" w2", " w40", " w41 w3"], "gold": 1}]
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
              "doc_to_target: '{{gold}}'\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
               "metric_list: [{metric: word_perplexity}]",
    "generation": "output_type: generate_until\ndoc_to_text: '{{q}}'\n"
                  "doc_to_target: '{{choices[gold]}}'\nmetric_list: [{metric: exact_match}]\n"
                  "generation_kwargs: {until: ['.'], max_gen_toks: 6, do_sample: false}"}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with three tasks of lm-eval on two local files."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = {"questions": QUESTIONS, "texts": [{"text": text} for text in TEXTS]}
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    for name, lines in TASKS.items():
        data = tmp_path / ("texts" if name == "rolling" else "questions")
        (tmp_path / f"{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ntest_split: test\n{lines}\n"
            f"dataset_kwargs: {{data_files: {{test: {data}.jsonl}}}}\nmetadata: {{version: 1.0}}\n")
    return tmp_path


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_lm_eval_measures_what_the_plain_model_says(tasks, words):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    words.eos_token = "w49"
    student = build("delta at all sites")
    measured = lm_eval.simple_evaluate(
        model=HFLM(pretrained=student, tokenizer=words, batch_size=2), bootstrap_iters=2,
        tasks=[f"local_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False))
    samples = measured["samples"]

    @torch.no_grad()
    def log_likelihood(before, after):
        scores = student(torch.tensor([before + after])).logits.log_softmax(-1)
        scores = scores[0, len(before) - 1:-1]
        return scores.gather(1, torch.tensor(after)[:, None]).sum().item()

    for sample, row in zip(samples["local_choice"], QUESTIONS, strict=True):
        expected = [log_likelihood(words(row["q"])["input_ids"], words(choice)["input_ids"])
                    for choice in row["choices"]]
        assert [a[0] for a in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-4)
    window = student.config.n_positions
    for sample, text in zip(samples["local_rolling"], TEXTS, strict=True):
        pieces, expected, begin = words(text)["input_ids"], 0.0, 0
        while begin < len(pieces):  # windows as lm-eval cuts them: new tokens, and as many before
            end = min(begin + window, len(pieces))
            whole = [words.eos_token_id, *pieces][max(0, end - window):end + 1]
            cut = len(whole) - (end - begin)
            expected, begin = expected + log_likelihood(whole[:cut], whole[cut:]), end
        assert sample["filtered_resps"][0] == pytest.approx(expected, rel=1e-4)
    for sample, row in zip(samples["local_generation"], QUESTIONS, strict=True):
        given = torch.tensor([words(row["q"])["input_ids"]])
        new = generate(student, given, max_new_tokens=6, eos_token_id=49)[0, given.shape[1]:]
        assert sample["filtered_resps"][0] == words.decode(new, skip_special_tokens=True)


# ---- options of generate -------------------------------------------------------------------------


def test_processors_of_scores_give_what_the_plain_path_gives(model, ids):
    def penalised(seen, scores):
        had = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, seen, True)
        return torch.where(had, torch.where(scores > 0, scores / 3.0, scores * 3.0), scores)

    plain = generate(model, ids)
    bad = plain[:, 12:].unique().tolist()[:5]

    def without(_, scores):
        return scores.index_fill(1, torch.tensor(bad), -math.inf)

    for change, options in ((penalised, {"repetition_penalty": 3.0}),
                            (without, {"bad_words_ids": [[token] for token in bad]})):
        out = generate(model, ids, **options)
        assert torch.equal(out, plain_greedy(model, ids, 10, change))
        assert not torch.equal(out, plain)
    several = generate(model, ids, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(several, plain.repeat_interleave(2, 0))
    end = plain[0, 12].item()
    assert generate(model, ids[:1], eos_token_id=end).shape[1] == 13
    assert generate(model, ids[:1], eos_token_id=end, min_new_tokens=9).shape[1] >= 21


@SOME
@pytest.mark.parametrize("options", [
    {"bad_words_ids": [[7], [9], [11], [13]]}, {"min_new_tokens": 8, "eos_token_id": 5},
    {"num_beams": 2, "no_repeat_ngram_size": 2}], ids=lambda options: next(iter(options)))
def test_options_on_a_left_padded_batch_equal_the_singles(ids, student, options):
    model, (padded, mask) = build(student), left_padded(ids)
    batch = generate(model, padded, attention_mask=mask, **options)
    for row, pad in enumerate(PADS):
        single = generate(model, ids[row:row + 1, pad:], **options)[0]
        assert torch.equal(batch[row, pad:pad + len(single)], single)
        assert (batch[row, pad + len(single):] == 0).all()


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
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}, held


def same_gradients(one, other):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-5, atol=1e-6, msg=name)


@SOME
def test_checkpointing_gives_the_same_gradients_from_less_memory(ids, student, monkeypatch):
    model, (ids, mask) = build(student).train(), left_padded(ids)
    calls, layer = [], asnn.GooseBlock.layer
    monkeypatch.setattr(asnn.GooseBlock, "layer", lambda *a: (calls.append(1), layer(*a))[1])
    loss, gradients, held = step(model, ids, attention_mask=mask)
    assert len(calls) == 3
    checkpoint(model)
    again, others, less = step(model, ids, attention_mask=mask)
    assert len(calls) == 9 and torch.equal(loss, again)  # 3 before, 3 forward, 3 again
    same_gradients(gradients, others)
    less += 3 * ids.numel() * 32 * 4  # a block's input is held, but not "saved"
    assert less < 0.4 * held, (less, held)
    state = model(ids[:, :6], use_cache=True).state  # and through a state
    model.zero_grad()
    model(ids[:, 6:], state=state, labels=ids[:, 6:]).loss.backward()
    assert model.goose.positions.weight.grad[0].any()
    checkpoint(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    same_gradients(gradients, step(model, ids, attention_mask=mask)[1])


# ---- other vocabularies, LoRA --------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [V + 7, V - 9])
def test_a_resized_student_speaks_and_survives_saving(ids, tmp_path, tied, size):
    ids, model = ids.clamp_max(V - 10), build(tie_word_embeddings=tied)
    before = model(ids).logits.detach()
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size == len(model.lm_head.weight)
    close(model(ids).logits[..., :min(V, size)], before[..., :size])
    if size > V:
        assert model.lm_head.weight[V:].std().item() == pytest.approx(0.02, rel=0.2)
        ids[:, 5] = size - 1  # a token that was not there before
    out = generate(model, ids)
    model.save_pretrained(tmp_path)
    loaded = asnn.GooseForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert torch.equal(loaded(ids).logits, model(ids).logits) and out.max() < size
    assert torch.equal(generate(loaded, ids), out)
    model.train()(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (size, 32)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@SOME
def test_lora_trains_adapters_only_and_merges(ids, student, tmp_path):
    import peft
    base = build(student)
    untouched = {name: p.detach().clone() for name, p in base.named_parameters()}
    plain = base(ids).logits.detach()
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4,
                                                      target_modules=LINEARS))
    close(model(ids).logits, plain)  # adapters start at zero
    assert sum(hasattr(m, "lora_A") for m in model.modules()) == len(LINEARS) * 3
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    checkpoint(model)
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=1e-2), []
    for _ in range(6):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    tuned = model.eval()(ids).logits.detach()
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        name = re.sub(r"^base_model\.model\.|base_layer\.", "", name)
        assert "lora_" in name or torch.equal(p, untouched[name]), name
    model.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(build(student), tmp_path / "adapters").eval()
    assert torch.equal(again(ids).logits, tuned) and (tuned - plain).abs().max() > 0.05
    assert torch.equal(generate(again, ids), generate(model, ids))
    merged = again.merge_and_unload()
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
    model = build(student, n_layer=1).train()
    logits = model(ids).logits.detach()
    _, gradients, _ = step(model, ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # raises at a graph break
    model.zero_grad()
    out = compiled(ids, labels=ids)
    out.loss.backward()
    close(out.logits, logits)
    same_gradients(gradients, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("student", ["vector", "delta at all sites"])
def test_decoding_compiles_twice_and_not_at_each_token(student, graphs):
    """Once for the state of a prompt, once for that of a token; the number of tokens seen, an int,
    becomes dynamic with the second."""
    made, backend = graphs
    model, tokens = build(student, n_layer=1), torch.randint(1, V, (3, 24))
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        plain = state = model(tokens[:, :8]).state
        for t in range(8, 24):
            one = model(tokens[:, t:t + 1], state=plain)
            other = compiled(tokens[:, t:t + 1], state=state)
            plain, state = one.state, other.state
            close(other.logits, one.logits)
    assert len(made) == 2 and state.length == 24


def test_blocks_of_one_structure_share_a_compiled_step(ids, graphs, monkeypatch):
    made, backend = graphs
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    asnn._compiled_layer.cache_clear()
    models, (padded, mask) = [build("delta"), build("delta at all sites")], left_padded(ids)
    expected = [(generate(m, ids), generate(m, padded, attention_mask=mask)) for m in models]
    for model, count, (plain, batch) in zip(models, (1, 2), expected):
        for block in model.goose.blocks:
            block.compiled = repr(block)
        assert torch.equal(generate(model, ids), plain) and len(made) == count
        # Padded prompts, gradients and training go the plain way.
        assert torch.equal(generate(model, padded, attention_mask=mask), batch)
        model(ids[:, :1], state=model(ids).state).logits.sum().backward()
        assert len(made) == count
    asnn._compiled_layer.cache_clear()


def test_the_folder_alone_is_enough_and_saves_itself_again(started, model, words, saved):
    """In a process that can import neither the project nor what only training needs."""
    running, again = started
    got, ids = json.loads(answer(running["alone"])), torch.arange(1, 13).unsqueeze(0)
    close(torch.tensor(got["logits"]), model(ids).logits)
    for tokens, beams in zip(got["tokens"], (1, 3), strict=True):
        assert tokens == generate(model, ids, max_new_tokens=8, num_beams=beams).tolist()
    speak = pipeline("text-generation", model=model, tokenizer=words)
    for text, expected in zip(got["texts"], ("w3 w4 w5 w6 w7", "w9 w10"), strict=True):
        one = speak(expected, do_sample=False, max_new_tokens=5, return_full_text=False)
        assert text == one[0]["generated_text"] and len(text.split()) == 5
    assert (got["tied"], got["hash"], got["missed"]) == (True, model.content_hash(), [])
    for name in ("modeling_goose.py", "config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name


def test_importing_is_quick_says_nothing_and_loads_no_plotting(started):
    """Beside torch and transformers.Trainer, which it needs."""
    theirs, ours, *rest = eval(answer(started[0]["import"]))
    assert rest == ["", [], True, 1]
    assert ours < max(0.3, 0.06 * theirs)  # seconds of this CPU; those of a busy one are longer
