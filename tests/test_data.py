"""Data: corpora, tokenizers, token caches, teachers, windows, files that appear whole or not."""
import os

import datasets
import numpy as np
import pandas
import pytest
import torch
import transformers

import asnn_common as asnn


def write_corpus(folder, **texts):
    """The corpus of a folder that is written here."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in asnn.SPLITS:
        text = texts.get(split, f"The {split} text.\n")
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    return asnn._load_corpus(str(folder))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of this test alone."""
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path / "own-cache"))
    return tmp_path / "own-cache"


@pytest.fixture
def inputs(tmp_path, monkeypatch, own_cache):
    """A folder of attached inputs, beside one that is not there."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    monkeypatch.setenv("ASNN_INPUTS", os.pathsep.join((str(tmp_path / "nowhere"), str(folder))))
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    """Every way to the hub raises, as it does without a network; parquet files are read."""
    def refuse(*args, **kwargs):
        raise ConnectionError("Network is unreachable\nsecond line")

    load, read = datasets.load_dataset, transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *args, **kwargs: (
        load if path == "parquet" else refuse)(path, *args, **kwargs))
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda source, **kwargs: (
            refuse if isinstance(source, str) else read)(source, **kwargs))


# ---- corpora


def test_a_folder_is_a_corpus_known_by_its_text(tmp_path, monkeypatch):
    corpora = [write_corpus(tmp_path / name, **text) for name, text in (
        ("mine", {"test": "Zwei Wörter\n"}), ("copy", {"test": "Zwei Wörter\n"}), ("other", {}))]
    assert corpora[0].name == "mine" and corpora[0].text("train") == "The train text.\n"
    assert corpora[0].size("test") == {"bytes": 13, "words": 2}
    assert corpora[0].hash == corpora[1].hash != corpora[2].hash
    write_corpus(tmp_path / "corpus")
    monkeypatch.setenv("ASNN_REF", str(tmp_path))  # the reference task
    assert asnn._load_corpus("ref").hash == corpora[2].hash


def test_pydocs_is_disjoint_deterministic_and_cached(own_cache, monkeypatch):
    corpus = asnn._load_corpus("pydocs", max_chars=80_000)
    parts = {split: corpus.text(split).replace(asnn.END_OF_TEXT, "\n\n").split("\n\n")
             for split in asnn.SPLITS}
    every = [p for part in parts.values() for p in part]
    assert all(parts.values()) and len(every) == len(set(every))
    assert 80_000 <= sum(map(len, every)) < 160_000
    assert len(corpus.text("train")) > 5 * len(corpus.text("test"))
    with monkeypatch.context() as patch:  # from the cache: the text is not collected again
        patch.setattr(asnn, "_sources", None)
        assert asnn._load_corpus("pydocs", max_chars=80_000) == corpus
    monkeypatch.setenv("ASNN_CACHE", str(own_cache / "two"))
    assert asnn._load_corpus("pydocs", max_chars=80_000).hash == corpus.hash


def test_docstrings_are_those_of_modules_classes_and_functions():
    long = "long enough to be kept as a text of its own"
    licence = "# A line of a licence, with words in it.\n#\n" * 40
    source = (f'{licence}"""Module, {long}."""\nclass A:\n    """Class, {long}."""\n'
              f'    async def f():\n        r"""Method, {long}."""\n        x = """No, {long}"""\n')
    found = asnn._docstrings(source).split("\n\n")
    assert found == [f"{kind}, {long}." for kind in ("Module", "Class", "Method")]
    assert asnn._docstrings("def broken(:") == asnn._docstrings(licence) == ""


# ---- tokenizer and token cache

AWKWARD = ("def f(x):\n    if x:\n        return 1\n\n\n    y = 2\n\nText\n\n\nmore text \n  \n"
           " = Heading = \n\n Naïve café — 日本語のテキスト 🦢🦢\n\tTabbed\r\nWindows line\n"
           "'quoted'\n  's\n'll start\n123\n\n456\n" + "long " * 60 + asnn.END_OF_TEXT
           + "\n\nafter the end\n" + asnn.END_OF_TEXT + "x" * 90 + "\n\n  \n\nlast")


def test_the_tokenizer_is_byte_level_and_made_once(tokenizer, task, monkeypatch):
    monkeypatch.setattr(asnn, "_new_folder", None)
    assert asnn._train_tokenizer(task.corpus, 300).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == 300 and tokenizer.padding_side == "left"
    for text in (AWKWARD, "\x00\x7f\u0301\ufffd", "   "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(asnn.END_OF_TEXT) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("size", [1, 7, 40, 10**6])
def test_cutting_the_text_into_pieces_changes_no_token(tmp_path, monkeypatch, own_cache, size):
    # A vocabulary with runs of newlines and spaces, as GPT-2's has.
    text = ("a\n\n\n    b\n\n    c \n\n\nd\n \n e\n\n\n\n" * 50) + AWKWARD * 4
    tokenizer = asnn._train_tokenizer(write_corpus(tmp_path / "newlines", train=text), 340)
    assert len(tokenizer.encode("\n\n\n", add_special_tokens=False)) == 1
    corpus = write_corpus(tmp_path / "mine", train=AWKWARD * 3, test="only")
    pieces, text = asnn._pieces, corpus.text("train")
    assert "".join(pieces(text, size)) == text and (len(pieces(text, size)) > 3) == (size < 10**6)
    assert len(pieces(" = Heading = \n A paragraph of the article . \n" * 50, 100)) > 10  # WikiText
    monkeypatch.setattr(asnn, "_pieces", lambda text: pieces(text, size))
    got = asnn._tokenize_corpus(corpus, tokenizer)
    for split in ("train", "test"):
        encoded = tokenizer.encode(corpus.text(split), add_special_tokens=False)
        assert got[split].tolist() == encoded


def test_tokens_are_mapped_from_a_cache_that_the_content_names(tmp_path, monkeypatch, tokenizer,
                                                               own_cache):
    corpus = write_corpus(tmp_path / "mine", train="One.<|endoftext|>Two.")
    first = asnn._tokenize_corpus(corpus, tokenizer)
    assert all(isinstance(ids, np.memmap) and ids.dtype == np.uint16 for ids in first.values())
    assert first["train"].tolist() == [*tokenizer.encode("One."), tokenizer.eos_token_id,
                                       *tokenizer.encode("Two.")]
    with monkeypatch.context() as patch:
        patch.setattr(asnn, "_pieces", None)  # a copy of the corpus is not encoded again
        copy = write_corpus(tmp_path / "copy", train="One.<|endoftext|>Two.")
        again = asnn._tokenize_corpus(copy, tokenizer)
    assert all(np.array_equal(first[split], again[split]) for split in asnn.SPLITS)
    changed = write_corpus(tmp_path / "mine", test="Changed.\n")
    assert tokenizer.decode(asnn._tokenize_corpus(changed, tokenizer)["test"]) == "Changed.\n"
    assert len(list((own_cache / "tokens").iterdir())) == 2


# ---- WikiText

ROWS = {"train": ["", " = Title = \n", " Body of the text . \n"], "validation": [" v \n"],
        "test": [" t \n"]}


@pytest.mark.parametrize("below", ["wikitext-2-raw-v1", "owner/wikitext/1/wikitext-2-raw-v1"])
def test_wikitext_from_attached_parquet_files_at_any_depth_in_their_order(inputs, no_hub, below):
    for folder, wrong in ((inputs / below, None), (inputs / "a-wikitext-103-raw-v1", ["wrong"])):
        folder.mkdir(parents=True)
        for split, rows in ROWS.items():
            parts = [rows[:1], rows[1:]] if split == "train" else [rows]
            for part, texts in enumerate(parts):
                pandas.DataFrame({"text": wrong or texts}).to_parquet(
                    folder / f"{split}-{part:05}-of-{len(parts):05}.parquet")
    corpus = asnn._load_corpus("wikitext-2")
    assert [corpus.text(split) for split in ROWS] == ["".join(rows) for rows in ROWS.values()]


def test_wikitext_as_attached_text_and_fetched_once(inputs, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or {
        split: {"text": rows} for split, rows in ROWS.items()})
    write_corpus(inputs / "some/where/wikitext-103-raw-v1", test="attached\n")
    assert asnn._load_corpus("wikitext-103").text("test") == "attached\n"
    corpus = asnn._load_corpus("wikitext-2")
    assert corpus.text("train") == "".join(ROWS["train"])
    assert asnn._load_corpus("wikitext-2") == corpus
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]


WAYS_ON = ("attach it as a Kaggle dataset or model, or give a folder .* or use corpus='pydocs' "
           "with teacher='train'")


@pytest.mark.parametrize("fields, name", [({"corpus": "wikitext-2"}, "wikitext-2"),
                                          ({"corpus": "wikitext-103"}, "wikitext-103"),
                                          ({"teacher": "gpt2"}, "teacher 'gpt2'")])
def test_without_the_hub_one_sentence_names_the_ways_on(inputs, no_hub, monkeypatch, small_recipe,
                                                        fields, name):
    for switch in ("", r"switch on Settings > Internet .* verified\), or "):
        sentence = rf"{name} could not be fetched .*Network is unreachable\): {switch}{WAYS_ON}.*"
        with pytest.raises(RuntimeError, match=f"^{sentence}$") as caught:
            asnn.load_task(small_recipe(**fields))
        assert "\n" not in str(caught.value) and "second line" not in str(caught.value)
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    # No other corpus is taken instead.
    assert "teacher" in fields or not (inputs.parent / "own-cache" / "corpora").exists()


# ---- teachers


def save(task, folder, model=None):
    (model or task.teacher).save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    return folder


def test_a_teacher_from_a_folder(task, tmp_path, small_task):
    loaded = small_task(teacher=str(save(task, tmp_path / "model")))
    assert loaded.teacher_name == "model" and loaded.teacher_training == {}
    assert not loaded.teacher.training and task.teacher_training["trained_steps"] == 60
    assert loaded.tokenizer.get_vocab() == task.tokenizer.get_vocab()
    ids = torch.arange(12).view(1, 12)
    torch.testing.assert_close(loaded.teacher(ids).logits, task.teacher(ids).logits)


@pytest.mark.parametrize("below", ["gpt2", "models/owner/GPT2/transformers/default/1"])
@pytest.mark.parametrize("asked", ["gpt2", "openai-community/gpt2"])
def test_a_teacher_attached_under_its_id_is_taken_before_the_hub(task, inputs, no_hub, asked,
                                                                 below):
    (inputs / "a" / "gpt2").mkdir(parents=True)  # the id in the path but no model in it
    save(task, inputs / "gpt2-medium")  # another model
    with pytest.raises(RuntimeError, match=f"teacher '{asked}' could not be fetched"):
        asnn._load_teacher(asked)
    save(task, inputs / below)
    model, tokenizer, name = asnn._load_teacher(asked)
    assert tokenizer.get_vocab() == task.tokenizer.get_vocab() and name == asked
    assert torch.equal(model.transformer.wte.weight, task.teacher.transformer.wte.weight)


def test_the_recipe_follows_the_teacher(task, tmp_path, small_task):
    """A teacher of another depth, width and activation: what it does not allow is changed."""
    config = transformers.GPT2Config(vocab_size=300, n_positions=16, n_embd=8, n_layer=1, n_head=1,
                                     activation_function="gelu")
    folder = save(task, tmp_path / "other", transformers.GPT2LMHeadModel(config))
    found = small_task("v14.3", teacher=str(folder))
    assert found.recipe.layer_map == ((0, 0), (1, 0)) and not found.recipe.embeddings_from_teacher
    assert len(found.notes) == 2 and all("teacher other" in note for note in found.notes)
    other = small_task("v14.4", teacher=str(folder), d_model=8, head_dim=4, n_layer=1)
    assert other.recipe.activation == "gelu" and "activation is gelu" in other.notes[0]
    assert small_task("v14.4").notes == []


# ---- windows

T = 4


def windows(seed=0, count=30, order=None):
    return asnn._Windows(np.arange(100, 100 + count, dtype=np.uint16), T, seed, order=order)


def test_every_window_comes_once_per_epoch_in_an_order_of_its_own():
    found = windows()
    epochs = [[found.index(7 * epoch + i) for i in range(7)] for epoch in range(3)]
    assert found.windows == len(found) == 7
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert len({tuple(windows(seed).index(i) for i in range(7)) for seed in range(6)}) > 4
    ordered = windows(order=np.array([3, 1, 3]))
    assert [ordered.index(i) for i in range(5)] == [3, 1, 3, 3, 1]


def test_a_batch_depends_on_its_position_alone():
    found = windows()
    forward = [found.batch(3 * i, 3)[0] for i in range(8)]
    backward = [windows().batch(3 * i, 3)[0] for i in reversed(range(8))][::-1]
    assert all(map(torch.equal, forward, backward))
    assert torch.equal(found.batch(0, 6)[0], torch.cat(forward[:2]))
    assert torch.equal(found[4]["input_ids"], forward[1][1])
    inputs, labels = found.gather(range(7))
    assert inputs.dtype == torch.int64 and torch.equal(inputs.flatten(), torch.arange(100, 128))
    assert torch.equal(labels, inputs + 1)


def test_a_loader_spreads_its_windows_over_the_split(task):
    loader = task.loader("validation", 16 * 20, batch_size=8)
    assert [tuple(batch.shape) for batch in loader] == [(8, 16), (8, 16), (4, 16)]
    whole = asnn._Windows(task.tokens["validation"], 16, 0)
    starts = [whole.gather([0, whole.windows - 1])[0][i] for i in range(2)]
    assert torch.equal(loader[0][0], starts[0]) and torch.equal(loader[-1][-1], starts[1])
    assert sum(map(len, task.loader("test", 10**9))) == (len(task.tokens["test"]) - 1) // 16
    assert torch.equal(task.peek(), whole.gather(range(8))[0])


def test_pocl_draws_from_the_easiest_windows_first():
    difficulty = np.array([5.0, 0.0, 8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 4.0])
    order = asnn._pocl_order(0, difficulty, 30)
    assert set(order[:10]) == {1, 3, 5}
    assert set(order[10:20]) == {1, 3, 5, 7, 8, 0} and set(order[20:]) == set(range(9))
    for positions in (1, 2, 3, 7, 100):
        assert len(asnn._pocl_order(0, np.arange(7.0), positions)) == positions


def test_a_curriculum_ranks_the_windows_by_the_teachers_loss(small_task):
    task = small_task("v13", distill_steps=9)
    order = task.windows(task.recipe).order
    plain = task.windows(task.recipe.replace(curriculum="none"))
    ids, labels = plain.gather(range(plain.windows))
    with torch.no_grad():
        logits = task.teacher(ids).logits.transpose(1, 2)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").mean(1)
    drawn = sorted({plain.index(i) for i in range(36)})
    easy = sorted(drawn, key=lambda i: float(loss[i]))[:len(drawn) // 3]
    assert plain.order is None and len(order) == 36 and set(order[:12]) == set(easy)


# ---- files


def test_an_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a" / "file.json"
    asnn._write_atomically(path, "old")
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(os, "fsync", None)
        asnn._write_atomically(path, "new content")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    asnn._write_atomically(path, "new")
    assert path.read_text() == "new"


def test_a_folder_appears_whole_and_one_that_is_there_is_kept(tmp_path):
    made = tmp_path / "a" / "made"
    with pytest.raises(KeyboardInterrupt), asnn._new_folder(made) as temporary:
        (temporary / "half").write_text("x")
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []
    with asnn._new_folder(made) as temporary:
        (temporary / "mine").write_text("x")
        assert not made.exists()
    with asnn._new_folder(made) as temporary:  # another process was faster
        (temporary / "theirs").write_text("x")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "a", "a/made", "a/made/mine"]
