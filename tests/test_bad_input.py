"""Bad input: each ends in one clear sentence, before anything is trained or overwritten."""
import builtins
import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import asnn_common as asnn

ROOT = Path(asnn.__file__).resolve().parent


@pytest.fixture
def refused(record_property):
    """refused(call, kind, sentence): the call raises `kind` with a message of one line that matches all of `sentence`."""
    def check(call, kind, sentence):
        with pytest.raises(kind) as caught:
            call()
        message = str(caught.value)
        record_property("sentence", f"{type(caught.value).__name__}: {message}")
        assert re.fullmatch(sentence, message), message
        assert type(caught.value) is kind or kind is OSError
    return check


# ---- names


@pytest.mark.parametrize("call, sentence", [
    (lambda: asnn.get_recipe("v99"), r"recipe is 'v99'; allowed: v4, v6, .*v14\.4-1b\."),
    (lambda: asnn.get_recipe("v14.4", learning_rate=1e-3), r"Recipe has no field learning_rate; it has: .*\blr\b.*\."),
    (lambda: asnn.PROFILES["cpu"].replace(layers=3), r"Profile has no field layers; it has: .*teacher_layers.*\."),
    (lambda: asnn.FitConfig.from_recipe(asnn.RECIPES["v14.4"], epochs=3),
     r"FitConfig has no field epochs; it has: .*steps.*\."),
    (lambda: asnn.GooseConfig(layers=3), r"GooseConfig has no field layers; it has: .*n_layer.*\."),
    (lambda: asnn.load_corpus("wikitext"), r"corpus is 'wikitext'; allowed: pydocs, wikitext-2, wikitext-103, ref, or a "
                                           r"folder that exists\."),
    (lambda: asnn.load_corpus(5), r"corpus is 5; allowed: pydocs, .*"), (lambda: asnn.load_corpus(""), r"corpus is ''; .*"),
    (lambda: asnn.load_teacher(5), r"teacher is 5; allowed: gpt2, .*"), (lambda: asnn.load_teacher(""), r"teacher is ''; .*"),
    (lambda: asnn.select_profile("huge"), r"profile \(asked for\) is 'huge'; allowed: tiny, cpu, ref, t4\.")])
def test_an_unknown_name_is_refused_with_those_that_exist(refused, call, sentence):
    refused(call, ValueError, sentence)


WRONG = {"str": (5, "", True, ["a"]), "int": (-1, 1.5, "3", True, math.nan, [1]), "float": (-1, "0.35", True, math.nan, math.inf),
         "bool": ("yes", 1, 0.0), "list": (5, True, "128", [], ["a"], [0], [1.5], [True])}


@pytest.mark.parametrize("name, value", [
    (name, value) for name, (annotation, _) in asnn.PARAMETERS.items()
    for value in (*WRONG[annotation.split(" ")[0]], *(() if "None" in annotation else (None,)))], ids=str)
def test_a_parameter_of_a_notebook_is_what_it_has_to_be(refused, name, value):
    refused(lambda: asnn.check_parameters(**{name: value}), ValueError, rf"{name} is {re.escape(repr(value))}; allowed: .+\.")


@pytest.mark.parametrize("name, value, allowed", [
    ("seed", 2**32, "a whole number from 0 to 4,294,967,295"), ("tokens", 2047, "a whole number from 2048 or None"),
    ("damage_windows", 1, "a whole number from 2"), ("max_hours", 0, "a number above 0 or None")])
def test_a_parameter_has_its_bounds(refused, name, value, allowed):
    refused(lambda: asnn.check_parameters(**{name: value}), ValueError, rf"{name} is {value}; allowed: {allowed}\.")


def test_good_parameters_pass():
    asnn.check_parameters(recipe="v14.4", corpus=None, teacher=Path("gpt2"), seed=2**32 - 1, tax_seeds=0, tokens=2048, max_hours=1,
                          price_per_hour=0, compiled=False, contexts=(1, 2), batches=[1], layers=None, run_name="a")


@pytest.mark.parametrize("name", ["a/b", "..", " ", 5, "a" * 101, "-a"])
def test_a_run_name_is_a_short_word(refused, tmp_path, name):
    refused(lambda: asnn.Run.open("v1", name, {}, tmp_path), ValueError, r"run name is .+; allowed: at most 100 letters, .+\.")
    assert not list(tmp_path.iterdir())


def test_a_student_is_named_by_a_word(refused):
    for name in (5, ""):
        refused(lambda: asnn.find_run(name), ValueError, r"student is .+; allowed: <version>/<run>, .+\.")


@pytest.mark.parametrize("band", [(0.6, 0.2), (-0.1, 0.5), (0.2, 1.1), (0.2,), (0.1, 0.2, 0.3), ("0.1", "0.5"), 0.5])
def test_a_band_of_rates_is_two_shares(refused, band):
    allowed = "a list of two shares" if band == 0.5 else "two shares, the lower one first"
    refused(lambda: asnn.get_recipe("v14.4-rates", rate_band=band), ValueError,
            rf"Recipe\.rate_band is {re.escape(repr(band))}; allowed: {allowed}\.")


# ---- numbers

ZERO = {"Recipe": {"matrix_lr", "kd_weight", "ce_weight", "hidden_weight", "fdd_weight", "variance_penalty", "rate_weight",
                   "weight_decay", "min_delta", "fdd_start", "fdd_max_regression", "align_steps", "ce_start",
                   "anneal_steps", "seed", "warmup_ratio", "lambda_warmup_ratio", "lambda_max", "beta2"},
        "FitConfig": {"matrix_lr", "weight_decay", "min_delta", "align_steps", "seed", "nonfinite_limit", "beta2",
                      "warmup_ratio"},
        "Profile": set(), "GooseConfig": set()}
SHARES = {"warmup_ratio", "lambda_warmup_ratio", "lambda_max", "beta2"}
MAKE = {"Recipe": lambda **values: asnn.get_recipe("v14.3", **values),
        "FitConfig": lambda **values: asnn.FitConfig(**{"steps": 9, "batch_size": 1, "lr": 0.1, "seq_len": 8, **values}),
        "Profile": lambda **values: asnn.PROFILES["tiny"].replace(**values), "GooseConfig": asnn.GooseConfig}
KINDS = {name: {item.name: item.type for item in dataclasses.fields(getattr(asnn, name))}
         for name in ("Recipe", "FitConfig", "Profile")}
KINDS["GooseConfig"] = {name: kind for name, kind in asnn.GooseConfig.__init__.__annotations__.items()
                        if not name.endswith("_token_id")}
NUMBERS = [(owner, name, *kind.partition(" | ")[::2]) for owner, kinds in KINDS.items() for name, kind in kinds.items()
           if kind.partition(" | ")[0] in ("int", "float")]
FLAGS = [(owner, name) for owner, kinds in KINDS.items() for name, kind in kinds.items() if kind == "bool"]


def test_the_fields_of_numbers_are_found():
    """Against a change of the annotations that would leave the tests below without cases."""
    assert {("Recipe", "lr", "float", ""), ("Profile", "final_windows", "int", "None"),
            ("FitConfig", "max_hours", "float", "None"), ("GooseConfig", "alpha_init", "float", "")} <= set(NUMBERS)
    assert len(NUMBERS) > 70 and ("Recipe", "gradient_reversal") in FLAGS and ("GooseConfig", "use_cache") in FLAGS
    for owner, names in ZERO.items():
        assert names <= {name for o, name, *_ in NUMBERS if o == owner}


@pytest.mark.parametrize("owner, name, kind, optional", NUMBERS, ids=[f"{owner}.{name}" for owner, name, *_ in NUMBERS])
def test_negative_zero_nan_and_string_numbers_are_refused(owner, name, kind, optional):
    bad = [-1, -0.5, math.nan, math.inf, -math.inf, "1", "", True, False, [1], 1j, *([1.5, 2.0] if kind == "int" else []),
           *([] if optional else [None]), *([1.5] if name in SHARES else []), *([0] if name not in ZERO[owner] else [])]
    label = name if owner == "GooseConfig" else f"{owner}.{name}"
    for value in bad:
        sentence = rf"^{re.escape(label)} is {re.escape(repr(value))}; allowed: a [a-z 0-9\[\],]+\.?"
        with pytest.raises(ValueError, match=sentence):
            MAKE[owner](**{name: value})
    if name in ZERO[owner]:
        assert getattr(MAKE[owner](**{name: 0}), name) == 0
    if optional:
        MAKE[owner](**{name: None})


@pytest.mark.parametrize("owner, name", FLAGS)
def test_a_flag_is_true_or_false(owner, name):
    for value in (1, 0, "False", None):
        with pytest.raises(ValueError, match=rf"{name} is {value!r}; allowed: True or False\."):
            MAKE[owner](**{name: value})


@pytest.mark.parametrize("call, sentence", [
    (lambda: MAKE["Recipe"](lr=math.nan), r"Recipe\.lr is nan; allowed: a number above 0\."),
    (lambda: MAKE["Recipe"](batch_size="8"), r"Recipe\.batch_size is '8'; allowed: a whole number from 1\."),
    (lambda: MAKE["Recipe"](max_hours=0), r"Recipe\.max_hours is 0; allowed: a number above 0 or None\."),
    (lambda: MAKE["FitConfig"](weight_decay=-0.1), r"FitConfig\.weight_decay is -0\.1; allowed: a number from 0\."),
    (lambda: MAKE["FitConfig"](beta2=1.0), r"FitConfig\.beta2 is 1\.0; allowed: a number in \[0, 1\)\."),
    (lambda: MAKE["FitConfig"](align_steps=9), r"FitConfig\.align_steps is 9; allowed: less than steps = 9\."),
    (lambda: MAKE["FitConfig"](precision="fp8"), r"FitConfig\.precision is 'fp8'; allowed: auto, fp32, fp16, bf16\."),
    (lambda: MAKE["Profile"](teacher_heads=3), r"Profile\.teacher_heads is 3; allowed: a divisor of .* = 64\."),
    (lambda: MAKE["GooseConfig"](d_model=True), r"d_model is True; allowed: a whole number from 1\."),
    (lambda: MAKE["Recipe"](layer_map="0:2"), r"Recipe\.layer_map is '0:2'; allowed: pairs of a student layer and a "
                                              r"teacher layer\."),
    (lambda: MAKE["Recipe"](layer_map=[1, 2]), r"Recipe\.layer_map is \[1, 2\]; allowed: pairs of .*\."),
    (lambda: MAKE["Recipe"](transfer_layers="123"), r"Recipe\.transfer_layers is '123'; allowed: None or a list .*\.")])
def test_a_wrong_setting_is_refused_by_name(refused, call, sentence):
    refused(call, ValueError, sentence)


# ---- corpora


@pytest.mark.parametrize("content, shown", [
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"b'\\x89PNG.*'"), ("text".encode("utf-16"), r"b'\\xff\\xfet\\x00.*'"),
    (b"PK\x03\x04\x14\x00", r"b'PK.*'"), ("text \xe9".encode("latin-1"), r"b'text \\xe9'"), (b" \n\n", r"b' \\n\\n'")],
    ids=["PNG", "UTF-16", "zip", "Latin-1", "blank"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corpus_file_that_is_no_text_is_refused(refused, tmp_path, content, shown, split):
    for name in asnn.SPLITS:
        (tmp_path / f"{name}.txt").write_bytes(content if name == split else b"Text.\n")
    refused(lambda: asnn.load_corpus(str(tmp_path)), ValueError,
            rf"corpus file {tmp_path}/{split}\.txt is {shown}; allowed: text in UTF-8 that is not blank\.")


def test_an_empty_corpus_file_is_refused(refused, tmp_path):
    for name in asnn.SPLITS:
        (tmp_path / f"{name}.txt").write_text("" if name == "validation" else "Text.\n")
    refused(lambda: asnn.load_corpus(str(tmp_path)), ValueError,
            rf"corpus folder {tmp_path} has no text in validation\.txt; it needs train\.txt, validation\.txt and "
            r"test\.txt\.")


@pytest.mark.parametrize("split", asnn.SPLITS)
@pytest.mark.parametrize("teacher_from", ["trained here", "a folder"])
def test_a_corpus_shorter_than_one_window_is_refused_before_a_teacher_is_trained(
        refused, tmp_path, monkeypatch, corpus, teacher, profile, small_recipe, split, teacher_from):
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.folder, folder)
    (folder / f"{split}.txt").write_text("A word.")
    given = "train" if teacher_from == "trained here" else str(save(teacher, tmp_path / "teacher"))
    refused(lambda: asnn.load_task(small_recipe(), profile.replace(corpus=str(folder), teacher=given)), ValueError,
            rf"tokens in the {split} split of corpus corpus is \d; allowed: at least seq_len \+ 1 = 17\.")
    assert not (tmp_path / "cache" / "teachers").exists() and not (tmp_path / "outputs").exists()


# ---- teachers


def save(teacher, folder, model=None):
    (model or teacher.model).save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rows, sentence", [(200, "200"), (5000, "5000")])
def test_a_teacher_of_another_vocabulary_than_its_tokenizer_is_refused(refused, tmp_path, teacher, rows, sentence):
    config = transformers.GPT2Config(vocab_size=rows, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    folder = save(teacher, tmp_path / "other", transformers.GPT2LMHeadModel(config))
    refused(lambda: asnn.load_teacher(str(folder)), ValueError,
            rf"teacher other: tokens of its tokenizer is 300; allowed: about as many as the {sentence} rows of its "
            r"embedding\.")


@pytest.mark.parametrize("rows", [300, 320])
def test_a_teacher_whose_embedding_is_padded_is_taken(tmp_path, teacher, rows):
    config = transformers.GPT2Config(vocab_size=rows, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    folder = save(teacher, tmp_path / "padded", transformers.GPT2LMHeadModel(config))
    assert asnn.load_teacher(str(folder)).model.config.vocab_size == rows


@pytest.mark.parametrize("make", [
    lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, num_key_value_heads=1, **SMALL)),
    lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=300, **SMALL))])
def test_other_causal_language_models_are_taken(tmp_path, teacher, make):
    assert asnn.load_teacher(str(save(teacher, tmp_path / "model", make()))).name == "model"


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}


def bert():
    return transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=300, **SMALL))


def bert_body():
    return transformers.BertModel(transformers.BertConfig(vocab_size=300, **SMALL))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=300, d_model=8, d_kv=8, d_ff=16, num_layers=1, num_heads=1, decoder_start_token_id=0))


@pytest.mark.parametrize("make, sentence", [
    (bert, r"teacher model is 'BertLMHeadModel'; allowed: a causal language model, in which no token sees a later one\."),
    (bert_body, r"teacher model has no weights for cls\.predictions\.\S+ and \d more that its config\.json asks for; "
                r"allowed: a file of the same configuration\."),
    (t5, r"teacher folder \S+/model is 'T5'; allowed: a causal language model, as GPT-2 or Llama are\.")])
def test_a_teacher_that_is_no_causal_language_model_is_refused(refused, tmp_path, teacher, make, sentence):
    torch.manual_seed(0)
    folder = save(teacher, tmp_path / "model", make())
    refused(lambda: asnn.load_teacher(str(folder)), ValueError, sentence)


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])


def deepen(path):
    config = json.loads(path.read_text())
    config["n_layer"] += 1
    path.write_text(json.dumps(config))


def widen(path):
    config = json.loads(path.read_text())
    config["n_embd" if "n_embd" in config else "d_model"] *= 2
    path.write_text(json.dumps(config))


def spoil(path):
    weights = safetensors.torch.load_file(path)
    name = next(n for n in sorted(weights) if weights[n].dim() == 2)
    weights[name][1, 2:4] = torch.tensor([math.nan, math.inf])
    safetensors.torch.save_file(weights, path, {"format": "pt"})


DAMAGE = [(truncate, "model.safetensors", r"cannot be loaded: Error while deserializing header: .*; it needs "
                                          r"config\.json.* whole weights.*\."),
          (deepen, "config.json", r"has no weights for \S+ and \d+ more that its config\.json asks for; allowed: a file "
                                  r"of the same configuration\."),
          (widen, "config.json", r"?: shape of \S+ is \(.+\); allowed: \(.+\), that of its config\.json\."),
          (spoil, "model.safetensors", r"has 2 values in \S+ that are NaN or infinite; allowed: finite weights\.")]


@pytest.mark.parametrize("damage, name, sentence", DAMAGE, ids=[damage.__name__ for damage, *_ in DAMAGE])
def test_a_damaged_teacher_is_refused(refused, tmp_path, teacher, damage, name, sentence):
    folder = save(teacher, tmp_path / "model")
    asnn.load_teacher(str(folder))
    damage(folder / name)
    refused(lambda: asnn.load_teacher(str(folder)), ValueError,
            rf"teacher (folder )?\S*model {sentence}".replace(" ?", ""))


@pytest.fixture
def finished(tmp_path, distillation, teacher, profile):
    """The folder of a finished run."""
    student = distillation()[0].student
    folder = tmp_path / "finished"
    save(teacher, folder / "student", student)
    settings = {"recipe": dataclasses.asdict(asnn.RECIPES["v14.3"]), "profile": dataclasses.asdict(profile)}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "metrics.json").write_text("{}")
    return folder


@pytest.mark.parametrize("damage, name, sentence", DAMAGE, ids=[damage.__name__ for damage, *_ in DAMAGE])
def test_a_damaged_student_is_refused(refused, finished, damage, name, sentence):
    asnn.load_run(finished)
    damage(finished / "student" / name)
    refused(lambda: asnn.load_run(finished), ValueError, rf"student \S+/student {sentence}".replace(" ?", ""))


# ---- weights and checkpoints


def test_deepspeed_is_refused_before_anything_is_saved(refused, tmp_path, distillation, monkeypatch):
    import accelerate
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", accelerate.DistributedType.DEEPSPEED)
    refused(lambda: asnn.fit(*distillation(), folder=tmp_path / "run"), ValueError,
            r"accelerate's distributed_type is 'DEEPSPEED'; allowed: NO, MULTI_CPU, MULTI_GPU .* or FSDP .*\.")
    assert not (tmp_path / "run").exists()


def test_fp16_is_refused_where_the_weights_are_shared_out(refused, tmp_path, distillation, monkeypatch):
    objective, sampler, settings = distillation()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(lambda: asnn.fit(objective, sampler, dataclasses.replace(settings, precision="fp16"), folder=tmp_path / "run"),
            ValueError, r"precision with --use_fsdp is 'fp16'; allowed: bf16, on GPUs of compute capability 8\.0 and above, "
                        r"or fp32 \(FitConfig\.precision\)\.")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("whose, sentence", [
    ("student", r"the model to train has 1 values in student\.goose\.\S+ that are NaN or infinite; allowed: finite "
                r"weights\."),
    ("teacher", r"the teacher has 1 values in transformer\.\S+ that are NaN or infinite; allowed: finite weights\.")])
def test_weights_that_are_nan_are_refused_before_the_first_step(
        refused, tmp_path, distillation, monkeypatch, whose, sentence):
    objective, sampler, settings = distillation()
    model = asnn.copy.deepcopy(getattr(objective, whose))
    next(p for p in model.parameters() if p.dim() == 1).data[0] = math.nan
    made = (model, objective.teacher) if whose == "student" else (objective.student, model)
    spoilt = asnn.Distiller(*made, objective.recipe)
    monkeypatch.setattr(asnn.Distiller, "forward", lambda *args, **kwargs: pytest.fail("a step was made"))
    refused(lambda: asnn.fit(spoilt, sampler, settings, folder=tmp_path / "run"), ValueError, sentence)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_a_training_that_turns_nan_ends_by_name_and_keeps_its_checkpoint(refused, tmp_path, distillation):
    objective, sampler, settings = distillation(settings={"nonfinite_limit": 2, "save_every": 2}, distill_steps=9)
    forward = objective.forward

    def poisoned(input_ids, labels, step=0, want_ce=True):
        loss, terms = forward(input_ids, labels, step, want_ce)
        return (loss * math.nan, {**terms, "kd": terms["kd"] * math.nan}) if step >= 2 else (loss, terms)

    objective.forward = poisoned
    refused(lambda: asnn.fit(objective, sampler, settings, folder=tmp_path), asnn.NonFiniteLoss,
            r"Step 4: kd is nan; 3 steps were not finite, at most 2 are skipped\. A lower lr or fp32 may help\.")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(p).all() for p in saved["objective"].values() if isinstance(p, torch.Tensor))


@pytest.mark.parametrize("damage", [
    truncate, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"<html>no</html>"),
    lambda path: torch.save({"step": 3}, path), lambda path: torch.save([1], path)],
    ids=["truncated", "empty", "a web page", "of something else", "a list"])
def test_a_checkpoint_that_cannot_be_read_is_refused_and_left_alone(refused, tmp_path, distillation, damage):
    objective, sampler, settings = distillation(distill_steps=4)
    asnn.fit(objective, sampler, settings, folder=tmp_path, max_steps=1)
    damage(tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    refused(lambda: asnn.fit(*distillation(distill_steps=4), folder=tmp_path), ValueError,
            rf"checkpoint {tmp_path}/checkpoint\.pt is damaged or no checkpoint of a run \(\w+\); delete it to start anew, "
            r"or choose another run name\.")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("other, sentence", [
    ({"n_layer": 1, "layer_map": ((0, 0),)},
     r"\S+/checkpoint\.pt: shape of student\.goose\.blocks\.1\.\S+ is \(\d+.*\); allowed: None, that of this "
     r"run; choose .*\."),
    ({"d_model": 64, "embeddings_from_teacher": False},
     r"\S+/checkpoint\.pt: shape of student\.goose\.blocks\.0\.\S+ is \(.*32.*\); allowed: \(.*64.*\), that of this "
     r"run; choose another run name or the same settings\."),
    ({"lr": 0.5}, r"\S+/checkpoint\.pt was made with lr 0\.002 and this run has 0\.5; choose another run name or the "
                  r"same settings\.")], ids=["layers", "width", "lr"])
def test_a_checkpoint_of_another_configuration_is_refused_and_left_alone(
        refused, tmp_path, distillation, other, sentence):
    objective, sampler, settings = distillation(distill_steps=4)
    asnn.fit(objective, sampler, settings, folder=tmp_path, max_steps=1)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    refused(lambda: asnn.fit(*distillation(distill_steps=4, **other), folder=tmp_path), ValueError, sentence)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


# ---- disks

FULL = (r"\S+/{} cannot be written \(No space left on device\); what was there before is kept\. Free some space or "
        r"choose another folder, then run again")


@pytest.fixture
def small_disk(monkeypatch):
    """small_disk(size): from here on a file opened by asnn_common takes so many bytes."""
    class File(io.FileIO):
        left = 0

        def write(self, data):
            self.left -= memoryview(data).nbytes
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def use(size):
        monkeypatch.setattr(File, "left", size)
        monkeypatch.setattr(asnn, "open", lambda path, mode="r", **more: (
            File(path, "w") if "w" in mode else builtins.open(path, mode, **more)), raising=False)
    return use


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("content", ["text" * 100, lambda file: torch.save({"weights": torch.zeros(1000)}, file)],
                         ids=["text", "torch"])
def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(refused, tmp_path, small_disk, content):
    asnn.write_atomically(tmp_path / "result.bin", "old")
    small_disk(300)
    refused(lambda: asnn.write_atomically(tmp_path / "result.bin", content), OSError,
            r"\[Errno 28\] " + FULL.format(r"result\.bin"))
    assert listing(tmp_path) == {"result.bin": b"old"}


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), OSError("100000 requested and 8176 written"),  # the system, numpy
    safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_a_full_disk_leaves_no_half_written_folder(refused, tmp_path, error):
    def make():
        with asnn.new_folder(tmp_path / "student") as folder:
            (folder / "half").write_text("x")
            raise error
    refused(make, OSError, r"\[Errno 28\] " + FULL.format("student"))
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_the_disks_is_not_called_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), asnn.new_folder(tmp_path / "student"):
        open(tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match="^other$"):
        asnn.write_atomically(tmp_path / "file", lambda file: (_ for _ in ()).throw(RuntimeError("other")))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_in_training_costs_only_the_steps_since_the_last_checkpoint(
        refused, tmp_path, distillation, small_disk, monkeypatch):
    objective, sampler, settings = distillation(settings={"save_every": 2}, distill_steps=6)
    asnn.fit(objective, sampler, settings, folder=tmp_path, max_steps=2)
    before = listing(tmp_path)
    with monkeypatch.context():
        small_disk(20_000)
        refused(lambda: asnn.fit(*distillation(settings={"save_every": 2}, distill_steps=6), folder=tmp_path), OSError,
                r"\[Errno 28\] " + FULL.format(r"checkpoint\.pt"))
    assert listing(tmp_path) == before
    monkeypatch.delattr(asnn, "open")
    again, whole = (distillation(settings={"save_every": 2}, distill_steps=6) for _ in range(2))
    assert asnn.fit(*again, folder=tmp_path).step == 6
    asnn.fit(*whole)
    for a, b in zip(again[0].parameters(), whole[0].parameters()):
        assert torch.equal(a, b)


def test_a_disk_that_is_full_when_a_run_finishes_loses_nothing(tmp_path, distillation, teacher, monkeypatch):
    outputs = tmp_path / "outputs"
    earlier = asnn.Run.open("v14.3", "earlier", {}, outputs)
    monkeypatch.setattr(asnn, "results_table", lambda metrics: "")
    monkeypatch.setattr(asnn, "model_card", lambda metrics: "card " * 1000)
    earlier.finish({"name": "earlier"})
    run = asnn.Run.open("v14.3", "late", {}, outputs)
    (run.folder / "checkpoint.pt").write_bytes(b"checkpoint")
    before, student, plain = listing(outputs), distillation()[0].student, open

    def full(path, mode="r", **more):
        if "README.md" in str(path) and "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(path, mode, **more)

    monkeypatch.setattr(asnn, "open", full, raising=False)
    with pytest.raises(asnn.CannotWrite, match="No space left"):
        run.finish({"name": "late"}, student, teacher.tokenizer)
    assert listing(outputs) == before
    monkeypatch.delattr(asnn, "open")
    assert asnn.Run.open("v14.3", "late", {}, outputs).folder == run.folder
    run.finish({"name": "late"}, student, teacher.tokenizer)
    assert json.loads((run.folder / "metrics.json").read_text()) == {"name": "late"}


# ---- folders


@pytest.fixture(params=["below a file", "read-only"])
def closed(request, tmp_path, monkeypatch):
    """A folder that cannot be made."""
    if request.param == "below a file":
        (tmp_path / "file").write_text("x")
        return tmp_path / "file" / "outputs"
    (tmp_path / "locked").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode))
    return tmp_path / "locked" / "outputs"


def test_a_read_only_output_folder_is_refused(refused, closed):
    refused(lambda: asnn.Run.open("v14.4", "night", {}, closed), ValueError,
            rf"the outputs folder is '{closed}/v14\.4'; allowed: a folder that can be written to\.")


@pytest.mark.parametrize("variable", ["ASNN_OUTPUTS", "ASNN_CACHE"])
def test_folders_that_cannot_be_written_to_are_refused_before_a_teacher_is_trained(
        refused, closed, monkeypatch, variable, small_recipe, profile, corpus):
    monkeypatch.setenv(variable, str(closed))
    monkeypatch.setattr(asnn, "train_teacher", lambda *args: pytest.fail("a teacher was trained"))
    refused(lambda: asnn.load_task(small_recipe(), profile.replace(corpus=str(corpus.folder))), ValueError,
            rf"the (outputs|cache) folder \({variable}\) is '{closed}'; allowed: a folder that can be written to\.")


HOLD = """
import sys, time
import asnn_common as asnn
from pathlib import Path
print(asnn.Run.open("v14.4", "night", {"lr": 1}, Path(sys.argv[1])).note, flush=True)
time.sleep(600)
"""


def test_two_runs_in_one_folder_are_refused_until_the_first_has_died(refused, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], env=environment, stdout=subprocess.PIPE,
                             text=True)
    try:
        assert first.stdout.readline() == "new run night\n"
        before = listing(tmp_path)
        refused(lambda: asnn.Run.open("v14.4", "night", {"lr": 1}, tmp_path), RuntimeError,
                rf"run folder {tmp_path}/v14\.4/night is in use by another process; wait until that has ended, or "
                r"choose another run name\.")
        assert listing(tmp_path) == before
        assert asnn.Run.open("v14.4", "night", {"lr": 2}, tmp_path).folder.name == "night-2"  # of other settings
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    run = asnn.Run.open("v14.4", "night", {"lr": 1}, tmp_path)
    assert run.note == "resuming unfinished run night"
    assert asnn.Run.open("v14.4", "night", {"lr": 1}, tmp_path).folder == run.folder  # the cell run again in one process
    run.finish({**METRICS, "run": "night"})
    assert not (tmp_path / "v14.4" / ".night.lock").exists()


METRICS = {"version": "v14.4", "corpus": {"name": "small", "hash": "0123456789"},
           "gap": {"test": {"value": 2.0, "standard_error": 0.1}}, "teacher": {"name": "t", "test": {"ppl": 1.0}},
           "training": {"step": 1, "tokens_per_second": 1.0},
           "student": {"test": {"ppl": 2.0, "bits_per_byte": None, "windows": 1}, "parameters": 1,
                       "density": {"0.k": 0.4}}, "environment": {"gpus": [], "cpu": "A CPU", "threads": 1}}
