"""Inputs as people have them: other names, other things of that name, files of other tools."""
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import transformers as tf
from conftest import ROOT

import asnn_common as asnn

WORDS = "red blue green one two three cat dog bird sees takes finds".split()


def lines(count, seed=0):
    drawn = np.random.default_rng(seed).choice(WORDS, (count, 8))
    return "\n".join(map(" ".join, drawn)) + "\n"


TEXT = {split: lines(1500 if split == "train" else 300, i) for i, split in enumerate(asnn.SPLITS)}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """An empty folder of inputs, an empty cache, no hub."""
    for name in ("input", "cache", "outputs"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv({"input": "ASNN_INPUTS"}.get(name, f"ASNN_{name.upper()}"),
                           str(tmp_path / name))
    monkeypatch.setattr("datasets.load_dataset", lambda *_: (_ for _ in ()).throw(OSError("none")))
    return tmp_path / "input"


@pytest.fixture
def corpus(inputs):
    folder = inputs.parent / "corpus"
    folder.mkdir()
    for split, text in TEXT.items():
        (folder / f"{split}.txt").write_text(text)
    return asnn._load_corpus(str(folder))


def gpt2(vocab, **more):
    return tf.GPT2LMHeadModel(tf.GPT2Config(**{
        "vocab_size": vocab, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
        "bos_token_id": 0, "eos_token_id": 0, **more}))


def saved(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(folder, name, prefix=""):
    """The splits under names like `name`, a function of the split."""
    folder.mkdir(parents=True)
    for split, text in TEXT.items():
        path = folder / name(split)
        frame = pd.DataFrame({"text": (prefix + text).splitlines(True)})
        if path.suffix == ".parquet":
            frame.to_parquet(path)
        elif path.suffix == ".csv":
            frame.to_csv(path, index=False)
        else:
            path.write_text(prefix + text)


def short(split):
    return "valid" if split == "validation" else split


@pytest.mark.parametrize("path, name", [
    ("wikitext2-raw/wikitext-2-raw", lambda s: f"wiki.{short(s)}.raw"),
    ("wikitext-2-data/wikitext-2", lambda s: f"wiki.{short(s)}.tokens"),
    ("wikitext-2", lambda s: f"{short(s)}.txt"), ("wikitext-2", lambda s: f"{s}.csv"),
    ("wikitext-2", lambda s: f"{s}-00000-of-00001.parquet"), ("wikitext-2", lambda s: f"{s}.txt"),
    ("data/wikitext-2-raw-v1", lambda s: f"{s}-00000-of-00001.parquet")])
def test_wikitext_is_found_under_the_names_it_has(inputs, path, name):
    write(inputs / path, name)
    found = asnn._load_corpus("wikitext-2")
    assert {split: found.text(split) for split in asnn.SPLITS} == TEXT


@pytest.mark.parametrize("path", ["my-wikitext-2-summaries", "wikitext-2-v1", "wikitext-2-german",
                                  "wikitext-2-german/data", "wikitext/data", "wikitext-103"])
def test_another_corpus_with_such_a_name_is_named_and_not_taken(inputs, path):
    write(inputs / path, lambda split: f"{split}.txt")
    with pytest.raises(RuntimeError, match=f"{inputs / path} is attached, which has another name"):
        asnn._load_corpus("wikitext-2")


def test_the_tokenised_wikitext_is_refused(inputs):
    write(inputs / "wikitext-2", lambda split: f"wiki.{short(split)}.tokens", 50 * "<unk> ")
    with pytest.raises(ValueError, match="wikitext-2 is 'tokenised, with <unk>'; allowed: the raw"):
        asnn._load_corpus("wikitext-2")


@pytest.mark.parametrize("asked, path, found", [
    ("gpt2", "hub/models--gpt2/snapshots/607a30d", True), ("gpt2", "gpt2-pytorch", True),
    ("gpt2", "gpt2/transformers/default/1", True), ("openai-community/gpt2", "gpt2", True),
    ("gpt2", "hub/models--openai-community--gpt2/snapshots/607a30d", True),
    ("gpt2", "hub/models--stranger--gpt2/snapshots/607a30d", False),
    ("gpt2", "gpt2/gpt2-medium", False), ("gpt2", "gpt2/distilgpt2", False),
    ("openai-community/gpt2", "gpt2/gpt2-finetuned-poems", False)])
def test_a_teacher_is_known_by_whole_names(inputs, corpus, monkeypatch, asked, path, found):
    tokenizer = asnn._train_tokenizer(corpus, 300)
    saved(inputs / path, gpt2(len(tokenizer)), tokenizer)
    if found:
        assert asnn._load_teacher(asked)[2] == asked
        return

    def unreachable(*_args, **_kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(asnn.AutoModelForCausalLM, "from_pretrained", unreachable)
    with pytest.raises(RuntimeError, match="is attached, which has another name"):
        asnn._load_teacher(asked)


@pytest.mark.parametrize("options", [{"truncation": True, "max_length": 128, "padding":
                                      "max_length"}, {"padding": True}])
def test_what_a_tokenizer_was_used_for_neither_cuts_nor_pads_the_corpus(inputs, corpus, options):
    tokenizer = asnn._train_tokenizer(corpus, 300)
    whole = {split: len(ids) for split, ids in asnn._tokenize_corpus(corpus, tokenizer).items()}
    folder = saved(inputs / "used", gpt2(len(tokenizer)), tokenizer)
    used = tf.AutoTokenizer.from_pretrained(folder)
    used(["one two three", "cat"], **options)
    used.save_pretrained(folder)
    assert json.loads((folder / "tokenizer.json").read_text())["padding"]
    *_, tokenizer, _ = asnn._load_teacher(str(folder))
    backend = tokenizer.backend_tokenizer  # a student's folder gets this tokenizer too
    assert backend.truncation is None and backend.padding is None
    found = asnn._tokenize_corpus(corpus, tokenizer)
    assert {split: len(ids) for split, ids in found.items()} == whole


def test_a_tokenizer_in_python_and_an_adapter_are_refused_in_a_sentence(inputs, corpus):
    import peft
    tokenizer = tf.ByT5Tokenizer(extra_ids=0)
    model = gpt2(len(tokenizer), bos_token_id=1, eos_token_id=1)
    folder = saved(inputs / "bytes", model, tokenizer)
    with pytest.raises(ValueError, match="tokenizer of teacher bytes is 'ByT5Tokenizer'; allowed"):
        asnn._load_teacher(str(folder))
    tokenizer = asnn._train_tokenizer(corpus, 300)
    folder = saved(inputs / "base", gpt2(len(tokenizer)), tokenizer)
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"])
    saved(inputs / "adapter", peft.get_peft_model(base, config), tokenizer)
    with pytest.raises(ValueError, match="teacher is 'adapter'; allowed: a whole model; merge"):
        asnn._load_teacher(str(inputs / "adapter"))


SIZE = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
OTHERS = {
    "rwkv": (tf.RwkvForCausalLM, tf.RwkvConfig, {
        "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
        "context_length": 64}),
    "opt": (tf.OPTForCausalLM, tf.OPTConfig, {
        "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "ffn_dim": 64, "max_position_embeddings": 64,
        "pad_token_id": 0}),
    "mpt": (tf.MptForCausalLM, tf.MptConfig, {
        "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}),
    "codegen": (tf.CodeGenForCausalLM, tf.CodeGenConfig, {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "mamba": (tf.MambaForCausalLM, tf.MambaConfig, {
        "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4,
        "pad_token_id": 0})}


@pytest.mark.parametrize("version", ["v14.3", "v9"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_teachers_train_a_student_or_are_refused_in_a_sentence(inputs, corpus, kind, version):
    tokenizer = asnn._train_tokenizer(corpus, 300)
    model, config, values = OTHERS[kind]
    known = {**SIZE, "vocab_size": len(tokenizer)}
    folder = saved(inputs / kind, model(config(**known, **values)), tokenizer)
    try:
        task = asnn.load_task(asnn.get_recipe(
            version, "tiny", corpus=str(corpus.folder), teacher=str(folder), seq_len=16, d_model=32,
            distill_steps=3, batch_size=2, fdd_start=1))
        assert asnn.distil(task)[1].finished
    except ValueError as error:  # one of ours
        assert kind == "codegen" and "allowed: a model whose logits" in str(error)


def test_a_path_is_a_parameter_like_its_name(inputs, corpus, monkeypatch):
    recipe = asnn.get_recipe("v14.3", "tiny", corpus=corpus.folder)
    assert recipe.corpus == str(corpus.folder)
    assert asnn.Run.open("v14.3", "r", {"recipe": vars(recipe)}).folder.is_dir()
    monkeypatch.setenv("HOME", str(corpus.folder.parent))
    assert asnn._load_corpus("~/corpus").hash == corpus.hash


def test_what_may_not_be_read_is_passed_over(inputs):
    (inputs / "lost+found").mkdir(mode=0o000)
    write(inputs / "wikitext-2", lambda split: f"{split}.txt")
    code = ("import os, asnn_common as asnn;"
            "os.getuid() or (os.setgroups([]), os.setgid(65534), os.setuid(65534));"
            "print(sorted(p.name for p in asnn._attached(bool)));"
            "print(asnn._find_run(None, (), ()))")
    for path in (inputs, *inputs.parents):
        if "pytest" in str(path):
            path.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "['input', 'wikitext-2']"


OURS = ("version", "run", "corpus", "teacher", "student", "gap", "training", "environment",
        "recipe", "metrics", "tokens", "other")


@pytest.mark.parametrize("content", ['{"accuracy": 0.9}', '{"version": "v14.3", "corp', "", "[1]",
                                     json.dumps(dict.fromkeys(OURS, 1))])
def test_files_of_other_tools_are_no_runs(inputs, content):
    folder = inputs.parent / "outputs" / "tracker" / "exp1"
    (folder / "student").mkdir(parents=True)
    for name in ("metrics.json", "config.json", "student/config.json", "gate.json"):
        (folder / name).write_text(content)
    gate = inputs / "v15"
    gate.mkdir()
    (gate / "gate.json").write_text(content)
    assert asnn.Run.finished() == []
    assert asnn._find_run(None, (), ("mix_in",)) is None
    student = asnn.GooseForCausalLM(asnn.GooseConfig(vocab_size=8, d_model=8, n_layer=1))
    assert asnn._gate_status(student)[0] is False
    assert asnn.Run.open("tracker", "exp1", {}).folder.name == "exp1-2"


@pytest.mark.parametrize("variables", [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])
def test_a_terminal_without_a_plus_minus_sign_gets_the_table(variables):
    code = "import asnn_common as asnn; asnn.show_table([{'PPL': '10 \\u00b1 1'}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **variables})
    assert done.returncode == 0 and "10 ? 1" in done.stdout, done.stderr
