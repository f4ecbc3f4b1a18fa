"""Bad input: each ends in one clear sentence, before anything is trained or overwritten."""
import dataclasses
import json
import math
import os
import re
import typing
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import asnn_common as asnn


def refused(call, sentence):
    """The call raises ValueError with one line that is all of `sentence`, a regular expression."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert re.fullmatch(sentence, message), message


def recipe(name="v14.3", profile="tiny", **fields):
    return asnn.get_recipe(name, profile, **fields)


# ---- one table: the call, and its sentence

NAMES = [
    (lambda: recipe("v99"), r"recipe is 'v99'; allowed: v4, v6, .*v14\.5-smollm2-t4\."),
    (lambda: recipe(profile="huge"), r"profile is 'huge'; allowed: tiny, cpu, ref, t4\."),
    (lambda: recipe(learning_rate=1e-3),
     r"field of a recipe is \['learning_rate'\]; allowed: .*\blr\b.*\."),
    (lambda: asnn.GooseConfig(thresholds="mixed"),
     r"field of GooseConfig is \['thresholds'\]; allowed: .*threshold.*\."),
    (lambda: asnn.load_task(recipe(corpus="wikitext")), r"corpus is 'wikitext'; allowed: pydocs, "
     r"wikitext-2, wikitext-103, ref, mix:NAME=share,NAME=share of these, or a folder that.*"),
    (lambda: asnn.load_task(recipe(corpus="ref")),
     r"ASNN_REF is None; allowed: the folder with corpus/ and teacher/\."),
    (lambda: asnn.Run.open("v1", "a/b", {}), r"run_name is 'a/b'; allowed: at most 100 .+"),
    (lambda: asnn.Run.open("v1", "a" * 101, {}), r"run_name is 'a+'; allowed: .+"),
    (lambda: asnn.Run.open("v1", 5, {}), r"run_name is 5; allowed: .+"),
    (lambda: asnn.load_student("v14.4/noon"),
     r"student_run is 'v14\.4/noon'; allowed: a finished run; there is none yet\."),
]
VALUES = [  # field of a recipe of v14.3, value, what is allowed
    ("temperature", "warm", "fixed, bounded, staged"), ("fdd", "cka", "none, cka_delta"),
    ("curriculum", "hard", "none, pocl"), ("estimator", "normalised", "identity, clipped, .*"),
    ("threshold", "channel", "token, mixed_fixed"), ("granularity", "head", "scalar, channel"),
    ("recurrence", "fft", "chunked, reference, cumsum"), ("optimizer", "sgd", "adamw, muon"),
    ("decay_init", "random", "spread, published"), ("mix_init", "ones", "spread, published"),
    ("output_order", "last", "gate_first, project_first"), ("precision", "fp8", "auto, fp32, .*"),
    ("state_kind", "tensor", "vector, matrix, delta"), ("tracker", "wandb", "tensorboard, .*"),
    ("spike_kind", "integer:0", "dense, binary, ternary, integer:k .*"), ("corpus", 5, "a word"),
    ("encoder_kind", "binary", "ternary, integer:k .*"), ("teacher", "", "a word"),
    ("spike_sites", ("v",), "'k', 'v' and any of mix_in, mix_out, ffn_in, ffn_hidden, head_in"),
    ("spike_sites", ("k", "v", "q"), "'k', 'v' and any of .*"), ("beta2", 1.0, "a number in .*"),
    ("spike_sites", 5, "a list of names"), ("layer_map", 5, "pairs of .*"),
    ("layer_map", "0:2", "pairs of a student layer and a teacher layer"),
    ("layer_map", (1, 2), "pairs of .*"), ("layer_map", ((0, 1.5),), "pairs of .*"),
    ("tau", 5.0, "between 1.0 and 5.0, exclusive"), ("tau", 0.5, "between 1.0 and 5.0, .*"),
    ("variance_penalty", 0.01, "0, or a number with granularity='channel'"),
    ("align_steps", 30, "less than distill_steps = 30"), ("seed", 2**32, "a whole number from 0"),
    ("teacher_heads", 3, "a divisor of teacher_width = 64"), ("gradient_reversal", 1, "True or .*"),
    ("max_hours", 0, "a number above 0 or None")]


@pytest.mark.parametrize("call, sentence", NAMES)
def test_an_unknown_name_is_refused_with_those_that_exist(tmp_path, call, sentence):
    refused(call, sentence)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("field, value, allowed", VALUES, ids=str)
def test_a_wrong_value_is_refused_with_what_is_allowed(field, value, allowed):
    refused(lambda: recipe(**{field: value}), rf"{field} is {re.escape(repr(value))}; allowed: "
            rf"{allowed}\.")


# ---- every number and every flag

KINDS = {name: next(iter(typing.get_args(kind)), kind)
         for name, kind in typing.get_type_hints(asnn.Recipe).items()}
NUMBERS = [name for name, kind in KINDS.items() if kind in (int, float, bool)]
OPTIONAL = {name for name in NUMBERS if asnn.Recipe.__annotations__[name].endswith("None")}
ZERO = asnn.Recipe.ZERO | asnn.Recipe.SHARES


@pytest.mark.parametrize("name", NUMBERS)
def test_negative_zero_nan_and_string_numbers_are_refused(name):
    assert {"lr", "max_hours", "final_windows", "gradient_reversal", *ZERO} <= set(NUMBERS)
    assert len(NUMBERS) > 45 and {"max_hours", "matrix_lr", "corpus_chars"} <= OPTIONAL
    make, kind = asnn.RECIPES["v14.3"].replace, KINDS[name]
    bad = [-1, -0.5, math.nan, math.inf, -math.inf, "1", "", (1,), 1j]
    bad += [1, 0, "False"] if kind is bool else [True, False]
    bad += [1.5, 2.0] if kind is int else []
    bad += [None] if name not in OPTIONAL else []
    bad += [1.5] if name in asnn.Recipe.SHARES else []
    bad += [0] if name not in ZERO else []
    for value in bad:
        refused(lambda: make(**{name: value}),
                rf"{name} is {re.escape(repr(value))}; allowed: (a .+|True or False)\.")
    for value in [0] * (name in ZERO) + [None] * (name in OPTIONAL):
        assert vars(make(**{name: value}))[name] == value


def test_recipes_and_tasks_are_frozen(task):
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.recipe.lr = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.recipe = asnn.RECIPES["v9"]


# ---- corpora


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("content, shown", [
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"b'\\x89PNG.*'"), (b"PK\x03\x04\x14\x00", r"b'PK.*'"),
    ("text".encode("utf-16"), r"b'\\xff\\xfet\\x00.*'"), ("text \xe9".encode("latin-1"), r".*xe9'"),
    (b" \n\n", r"b' \\n\\n'"), (None, "b''")],
    ids=["PNG", "zip", "UTF-16", "Latin-1", "blank", "missing"])
def test_a_corpus_file_that_is_no_text_is_refused(tmp_path, split, content, shown):
    for name in asnn.SPLITS:
        (tmp_path / f"{name}.txt").write_bytes(b"Text.\n")
    path = tmp_path / f"{split}.txt"
    path.unlink() if content is None else path.write_bytes(content)
    refused(lambda: asnn.load_task(recipe(corpus=str(tmp_path))),
            rf"corpus file {path} is {shown}; allowed: text in UTF-8 that is not blank; a corpus "
            r"needs train\.txt, validation\.txt, test\.txt\.")


@pytest.mark.parametrize("split", asnn.SPLITS)
def test_a_corpus_shorter_than_a_window_is_refused_before_a_teacher_is_trained(
        tmp_path, monkeypatch, corpus_folder, small_recipe, split):
    for name in asnn.SPLITS:
        text = "A word." if name == split else (corpus_folder / f"{name}.txt").read_text()
        (tmp_path / f"{name}.txt").write_text(text)
    monkeypatch.setattr(asnn, "DistillationTrainer", lambda *args, **kwargs: pytest.fail("trained"))
    refused(lambda: asnn.load_task(small_recipe(corpus=str(tmp_path))),
            rf"tokens in (the {split}|a) split.* is \d; allowed: at least 17\.")


# ---- teachers and students


def save(task, folder, model=None):
    (model or task.teacher).save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    return folder


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 300,
         "intermediate_size": 16}


@pytest.mark.parametrize("rows", [200, 300, 320, 5000, None])
def test_a_teacher_of_another_vocabulary_than_its_tokenizer_is_refused(tmp_path, task, rows):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **SMALL))
    if rows:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=rows, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    folder = save(task, tmp_path / "other", model)
    if rows in (300, 320, None):  # embeddings may be padded
        assert type(asnn._load_teacher(str(folder))[0]) is type(model)
        if rows:
            refused(lambda: asnn.load_task(task.recipe.replace(seq_len=17, teacher=str(folder))),
                    r"seq_len is 17; allowed: at most the 16 positions of teacher other\.")
    else:
        refused(lambda: asnn.load_task(task.recipe.replace(teacher=str(folder))),
                rf"teacher other: tokens of its tokenizer is 300; allowed: about as many as the "
                rf"{rows} rows of its embedding\.")


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])


def change_config(path, factor=1, more=0):
    config = json.loads(path.read_text())
    config["n_embd" if "n_embd" in config else "d_model"] *= factor
    config["n_layer"] += more
    path.write_text(json.dumps(config))


def spoil(path):
    weights = safetensors.torch.load_file(path)
    name = next(n for n in sorted(weights) if weights[n].dim() == 2)
    weights[name][1, 2:4] = torch.tensor([math.nan, math.inf])
    safetensors.torch.save_file(weights, path, {"format": "pt"})


DAMAGE = {
    "truncated": (truncate, "model.safetensors", r" cannot be loaded: .+; it needs .+\."),
    "missing": (Path.unlink, "model.safetensors", r" cannot be loaded: .+; it needs .+\."),
    "no JSON": (lambda path: path.write_text("{"), "config.json", r" cannot be loaded: .+; .+\."),
    "deeper": (lambda path: change_config(path, more=1), "config.json",
               r": weights its file lacks is \[.+\]; allowed: none\."),
    "wider": (lambda path: change_config(path, factor=2), "config.json",
              r": shape of \S+ is \(.+\); allowed: \(.+\), that of its config\.json\."),
    "not finite": (spoil, "model.safetensors",
                   r": NaN or infinite values in \S+ is 2; allowed: none\.")}


@pytest.mark.parametrize("damage, name, sentence", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_damaged_weights_are_refused(tmp_path, task, student, damage, name, sentence, whose):
    run = asnn.Run.open("v14.3", "run", {"recipe": vars(task.recipe)})
    save(task, run.folder / "student", student if whose == "student" else None)
    run.save("metrics.json", {})
    damage(run.folder / "student" / name)
    if whose == "student":
        refused(lambda: asnn.load_student("v14.3/run"), rf"student \S+/student{sentence}")
    else:
        refused(lambda: asnn.load_task(task.recipe.replace(teacher=str(run.folder / "student"))),
                rf"teacher (folder )?\S*student{sentence}")


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_weights_that_are_nan_are_refused_before_the_first_step(task, student, monkeypatch, whose):
    model = student if whose == "student" else task.teacher
    parameter = next(p for p in model.parameters() if p.dim() == 1)
    monkeypatch.setattr(asnn.Distiller, "forward", lambda *args, **kwargs: pytest.fail("a step"))
    before = parameter.data.clone()
    try:
        parameter.data[0] = math.nan
        refused(lambda: asnn.distil(task, student=student),
                r"the (model to train|teacher): NaN or infinite values in \S+ is 1; allowed: .+")
    finally:
        parameter.data.copy_(before)


# ---- folders


@pytest.mark.parametrize("variable", ["ASNN_OUTPUTS", "ASNN_CACHE"])
def test_folders_that_cannot_be_written_to_are_refused_first(tmp_path, monkeypatch, variable):
    allowed, folder = os.access, str(tmp_path / "locked")
    monkeypatch.setenv(variable, folder)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and allowed(path, mode))
    refused(lambda: asnn.load_task(recipe(corpus="wikitext-4")),
            rf"{variable} is '{folder}'; allowed: a folder to write to\.")
