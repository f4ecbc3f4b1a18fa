"""Data: corpora, tokenizers, token caches, teachers, windows, and files that appear whole or not at all."""
import importlib
import os

import numpy as np
import pytest
import torch
import transformers

import asnn_common as asnn


def write_corpus(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for split in asnn.SPLITS:
        (folder / f"{split}.txt").write_text(texts.get(split, f"The {split} text.\n"), encoding="utf-8")
    return folder


# ---- corpora


def test_a_folder_is_a_corpus(tmp_path):
    folder = write_corpus(tmp_path / "mine", test="Zwei Wörter\n")
    corpus = asnn.load_corpus(str(folder))
    assert corpus.name == "mine" and corpus.text("train") == "The train text.\n"
    assert corpus.size("test") == {"bytes": 13, "words": 2}


def test_the_hash_of_a_corpus_is_that_of_its_text(tmp_path):
    hashes = [asnn.load_corpus(str(write_corpus(tmp_path / name, **text))).hash
              for name, text in (("a", {}), ("b", {}), ("c", {"test": "Other.\n"}))]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("split", asnn.SPLITS)
@pytest.mark.parametrize("fault", ["missing", "empty"])
def test_a_corpus_folder_without_text_is_refused_by_the_file_name(tmp_path, split, fault):
    path = write_corpus(tmp_path / "mine") / f"{split}.txt"
    path.unlink() if fault == "missing" else path.write_text("")
    with pytest.raises(ValueError, match=f"mine has no text in {split}.txt; it needs train.txt, validation.txt and"):
        asnn.load_corpus(str(path.parent))


def test_an_unknown_corpus_is_refused_with_what_exists():
    with pytest.raises(ValueError, match="corpus is 'wikitext-4'; allowed: pydocs, wikitext-2, wikitext-103, ref"):
        asnn.load_corpus("wikitext-4")


@pytest.mark.parametrize("load", [asnn.load_corpus, asnn.load_teacher])
def test_the_reference_task_needs_its_folder(load):
    with pytest.raises(ValueError, match="ASNN_REF is None; allowed: the folder of the reference task"):
        load("ref")


def test_the_reference_task_is_read_from_its_folder(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus")
    monkeypatch.setenv("ASNN_REF", str(tmp_path))
    assert asnn.load_corpus("ref").name == "ref"


def paragraphs(text):
    return [p for document in text.split(asnn.END_OF_TEXT) for p in document.split("\n\n")]


def test_pydocs_is_disjoint_deterministic_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path / "one"))
    corpus = asnn.load_corpus("pydocs", max_chars=80_000)
    parts = {split: paragraphs(corpus.text(split)) for split in asnn.SPLITS}
    every = [p for part in parts.values() for p in part]
    assert all(parts.values()) and len(every) == len(set(every))
    assert 80_000 <= sum(map(len, every)) < 160_000
    # From the cache: the text is not collected again.
    monkeypatch.setattr(asnn, "_docstrings", None)
    monkeypatch.setattr(asnn, "new_folder", None)
    assert asnn.load_corpus("pydocs", max_chars=80_000) == corpus
    monkeypatch.undo()
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path / "two"))
    assert asnn.load_corpus("pydocs", max_chars=80_000).hash == corpus.hash


def test_pydocs_reads_the_docstrings_of_installed_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path))
    monkeypatch.setattr(asnn, "PYDOCS_PACKAGES", ("tqdm", "a_package_that_is_not_installed"))
    monkeypatch.setattr(importlib.import_module("pydoc_data.topics"), "topics", {"assert": "A topic. " * 40})
    corpus = asnn.load_corpus("pydocs")
    text = "".join(corpus.text(split) for split in asnn.SPLITS)
    tqdm = importlib.import_module("tqdm").tqdm
    assert "A topic. " in text and tqdm.__doc__.strip().splitlines()[0].strip() in text


def test_docstrings_are_those_of_modules_classes_and_functions():
    long = "long enough to be kept as a text of its own"
    source = (f'"""Module, {long}."""\nclass A:\n    """Class, {long}."""\n    async def f():\n'
              f'        """Method, {long}."""\n')
    expected = [f"{kind}, {long}." for kind in ("Module", "Class", "Method")]
    assert asnn._docstrings(source).split("\n\n") == expected
    assert asnn._docstrings("def broken(:") == ""


def test_docstrings_are_found_below_a_long_licence():
    text = "long enough to be kept as a text of its own"
    licence = "# A line of a licence, with words in it.\n#\n" * 40
    assert asnn._docstrings(f'{licence}\n"""{text}"""\n') == text
    assert asnn._docstrings(licence) == ""


# ---- tokenizer and token cache


AWKWARD = ("def f(x):\n    if x:\n        return 1\n\n\n    y = 2\n\nText\n\n\nmore text \n  \n = Heading = \n\n "
           "Naïve café — 日本語のテキスト 🦢🦢\n\tTabbed\r\n"
           "Windows line\n'quoted'\n  's\n'll start\n123\n\n456\n"
           + "long " * 60
           + asnn.END_OF_TEXT + "\n\nafter the end\n" + asnn.END_OF_TEXT + "x" * 90 + "\n\n  \n\nlast")


def test_the_tokenizer_is_byte_level_and_loses_nothing(teacher, profile):
    tokenizer = teacher.tokenizer
    assert len(tokenizer) == profile.vocab_size
    for text in (AWKWARD, "\x00\x7f\u0301\ufffd", "   "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    end = tokenizer.convert_tokens_to_ids(asnn.END_OF_TEXT)
    assert tokenizer.encode(asnn.END_OF_TEXT) == [end] == [tokenizer.eos_token_id]
    assert tokenizer.padding_side == "left"


def test_the_tokenizer_is_trained_once(corpus, monkeypatch, tmp_path):
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path))
    first = asnn.train_tokenizer(corpus, 280)
    monkeypatch.setattr(asnn, "new_folder", None)
    assert asnn.train_tokenizer(corpus, 280).get_vocab() == first.get_vocab()
    assert len(first) == 280


def merging_tokenizer(tmp_path):
    """A tokenizer whose vocabulary has runs of newlines and spaces, as GPT-2's has."""
    text = ("a\n\n\n    b\n\n    c \n\n\nd\n \n e\n\n\n\n" * 50) + AWKWARD * 4
    return asnn.train_tokenizer(asnn.load_corpus(str(write_corpus(tmp_path / "newlines", train=text))), 340)


@pytest.mark.parametrize("size", [1, 7, 40, 10**6])
def test_cutting_the_text_into_pieces_changes_no_token(tmp_path, monkeypatch, size):
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path / "cache"))
    tokenizer = merging_tokenizer(tmp_path)
    assert len(tokenizer.encode("\n\n\n", add_special_tokens=False)) == 1
    corpus = asnn.load_corpus(str(write_corpus(tmp_path / "mine", train=AWKWARD * 3, test="only\n")))
    pieces = asnn._pieces
    monkeypatch.setattr(asnn, "_pieces", lambda text: pieces(text, size))
    text = corpus.text("train")
    assert "".join(asnn._pieces(text)) == text
    assert (len(asnn._pieces(text)) > 3) == (size < 10**6)
    got = asnn.tokenize_corpus(corpus, tokenizer)
    assert got["train"].tolist() == tokenizer.encode(text, add_special_tokens=False)
    assert got["test"].tolist() == tokenizer.encode("only\n", add_special_tokens=False)


def test_text_whose_lines_begin_with_a_space_is_cut_too():
    """As in WikiText, which would otherwise be encoded in one piece of half a gigabyte."""
    text = " = Heading = \n A paragraph of the article . \n" * 50
    pieces = asnn._pieces(text, 100)
    assert "".join(pieces) == text and len(pieces) > 10


def test_tokens_are_mapped_from_a_cache_that_the_content_names(tmp_path, monkeypatch, teacher):
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path / "cache"))
    corpus = asnn.load_corpus(str(write_corpus(tmp_path / "mine")))
    first = asnn.tokenize_corpus(corpus, teacher.tokenizer)
    assert all(isinstance(ids, np.memmap) and ids.dtype == np.uint16 for ids in first.values())

    def never(text):
        raise AssertionError("encoded again")

    pieces = asnn._pieces
    monkeypatch.setattr(asnn, "_pieces", never)
    again = asnn.tokenize_corpus(asnn.load_corpus(str(write_corpus(tmp_path / "copy"))), teacher.tokenizer)
    assert all(np.array_equal(first[split], again[split]) for split in asnn.SPLITS)
    changed = asnn.load_corpus(str(write_corpus(tmp_path / "mine", test="Changed.\n")))
    with pytest.raises(AssertionError, match="encoded again"):
        asnn.tokenize_corpus(changed, teacher.tokenizer)
    monkeypatch.setattr(asnn, "_pieces", pieces)
    other = asnn.tokenize_corpus(changed, teacher.tokenizer)
    assert teacher.tokenizer.decode(other["test"]) == "Changed.\n"
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_documents_are_separated_by_the_end_of_text_token_alone(tmp_path, teacher):
    text = f"One.{asnn.END_OF_TEXT}Two."
    corpus = asnn.load_corpus(str(write_corpus(tmp_path / "mine", train=text)))
    ids = asnn.tokenize_corpus(corpus, teacher.tokenizer)["train"].tolist()
    encode = teacher.tokenizer.encode
    assert ids == encode("One.") + [teacher.tokenizer.eos_token_id] + encode("Two.")


# ---- WikiText


@pytest.fixture
def no_hub(monkeypatch):
    """Every way to the hub raises, as it does without a network."""
    def refuse(*args, **kwargs):
        raise ConnectionError("Network is unreachable\nsecond line")

    datasets = importlib.import_module("datasets")
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda path, *args, **kwargs: (load if path == "parquet" else refuse)(path, *args, **kwargs))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    return monkeypatch


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    folder = tmp_path / "inputs"
    folder.mkdir()
    monkeypatch.setenv("ASNN_INPUTS", os.pathsep.join((str(tmp_path / "nowhere"), str(folder))))
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path / "own-cache"))
    return folder


ROWS = {"train": ["", " = Title = \n", " Body of the text . \n"], "validation": [" v \n"], "test": [" t \n"]}


@pytest.mark.parametrize("below", ["wikitext-2-raw-v1", "datasets/owner/wikitext/versions/1/wikitext-2-raw-v1"])
def test_wikitext_from_attached_parquet_files_at_any_depth(inputs, no_hub, below):
    pandas = importlib.import_module("pandas")
    (inputs / below).mkdir(parents=True)
    for split, rows in ROWS.items():
        pandas.DataFrame({"text": rows}).to_parquet(inputs / below / f"{split}-00000-of-00001.parquet")
    # Another configuration beside it is not taken for it.
    (inputs / "a-wikitext-103-raw-v1").mkdir()
    for split in ROWS:
        pandas.DataFrame({"text": ["wrong"]}).to_parquet(inputs / "a-wikitext-103-raw-v1" / f"{split}-0.parquet")
    corpus = asnn.load_corpus("wikitext-2")
    assert {split: corpus.text(split) for split in ROWS} == {split: "".join(rows) for split, rows in ROWS.items()}
    assert corpus.name == "wikitext-2"


def test_wikitext_of_several_parquet_files_keeps_their_order(inputs, no_hub):
    pandas = importlib.import_module("pandas")
    folder = inputs / "wikitext-103-raw-v1"
    folder.mkdir()
    for split, rows in {**ROWS, "train": ["first\n"]}.items():
        pandas.DataFrame({"text": rows}).to_parquet(folder / f"{split}-00000-of-00002.parquet")
    pandas.DataFrame({"text": ["second\n"]}).to_parquet(folder / "train-00001-of-00002.parquet")
    assert asnn.load_corpus("wikitext-103").text("train") == "first\nsecond\n"


@pytest.mark.parametrize("below", ["wikitext-2", "some/where/wikitext-2-raw-v1"])
def test_wikitext_from_attached_text_files(inputs, no_hub, below):
    write_corpus(inputs / below, test="attached\n")
    assert asnn.load_corpus("wikitext-2").text("test") == "attached\n"


def test_wikitext_fetched_once_is_kept(inputs, monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.import_module("datasets"), "load_dataset",
                        lambda *args: asked.append(args) or {split: {"text": rows} for split, rows in ROWS.items()})
    corpus = asnn.load_corpus("wikitext-2")
    assert corpus.text("train") == "".join(ROWS["train"])
    assert asnn.load_corpus("wikitext-2") == corpus and asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]


WAYS_ON = "attach it as a Kaggle dataset or model, or give a folder .* or use corpus='pydocs' with teacher='train'"


@pytest.mark.parametrize("load, name", [(asnn.load_corpus, "wikitext-2"), (asnn.load_corpus, "wikitext-103"),
                                        (asnn.load_teacher, "gpt2")])
def test_without_the_hub_one_sentence_names_the_ways_on(inputs, no_hub, load, name):
    sentence = rf"{name}'? could not be fetched .*Network is unreachable\): {WAYS_ON}"
    with pytest.raises(asnn.HubUnavailable, match=sentence) as caught:
        load(name)
    assert "\n" not in str(caught.value) and "second line" not in str(caught.value)
    assert not (inputs.parent / "own-cache" / "corpora").exists(), "another corpus was taken instead"


def test_on_kaggle_the_switch_of_the_internet_is_named_first(inputs, no_hub, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    with pytest.raises(asnn.HubUnavailable, match=f"switch on Settings > Internet .* verified\\), or {WAYS_ON}"):
        asnn.load_teacher("gpt2")


@pytest.mark.parametrize("load, name", [(asnn.load_corpus, "wikitext-2"), (asnn.load_teacher, "gpt2")])
def test_a_hub_error_without_a_message_is_explained_too(inputs, monkeypatch, load, name):
    def refuse(*args, **kwargs):
        raise TimeoutError

    monkeypatch.setattr(importlib.import_module("datasets"), "load_dataset", refuse)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(asnn.HubUnavailable, match=WAYS_ON):
        load(name)


# ---- teachers


def save_teacher(teacher, folder):
    teacher.model.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    return folder


def test_a_teacher_from_a_folder(teacher, tmp_path):
    loaded = asnn.load_teacher(str(save_teacher(teacher, tmp_path / "model")))
    assert loaded.name == "model" and not loaded.model.training
    assert loaded.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    ids = torch.arange(12).view(1, 12)
    torch.testing.assert_close(loaded.model(ids).logits, teacher.model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asked", ["gpt2", "openai-community/gpt2"])
@pytest.mark.parametrize("below", ["gpt2", "models/owner/GPT2/transformers/default/1"])
def test_a_teacher_attached_under_its_id_is_taken_before_the_hub(teacher, inputs, asked, below):
    save_teacher(teacher, inputs / below)
    (inputs / "a" / "gpt2").mkdir(parents=True)  # the id in the path but no model in it
    loaded = asnn.load_teacher(asked)
    assert loaded.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    assert torch.equal(loaded.model.transformer.wte.weight, teacher.model.transformer.wte.weight)
    assert "gpt2" in loaded.name.lower(), "results are compared by the teacher's name"


def test_another_attached_model_is_not_taken(teacher, inputs, no_hub):
    save_teacher(teacher, inputs / "gpt2-medium")
    with pytest.raises(asnn.HubUnavailable, match="teacher 'gpt2'"):
        asnn.load_teacher("gpt2")


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no-such-model"}'])
def test_a_teacher_folder_that_cannot_be_loaded_is_named_in_one_sentence(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"teacher folder {tmp_path} cannot be loaded: .+") as caught:
        asnn.load_teacher(str(tmp_path))
    assert "\n" not in str(caught.value)


# ---- windows


T = 4


def sampler(seed=0, count=30, order=None):
    return asnn.WindowSampler(np.arange(100, 100 + count, dtype=np.uint16), T, seed, order)


def test_every_window_comes_once_per_epoch_in_a_new_order():
    windows = sampler()
    assert windows.windows == 7
    epochs = [[windows.index(7 * epoch + i) for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_labels_are_the_inputs_shifted_by_one():
    inputs, labels = sampler().gather(range(7))
    assert inputs.dtype == labels.dtype == torch.int64 and inputs.shape == (7, T)
    assert torch.equal(inputs.flatten(), torch.arange(100, 128)) and torch.equal(labels, inputs + 1)


def test_a_batch_depends_on_its_position_alone():
    windows = sampler()
    forward = [windows.batch(3 * i, 3)[0] for i in range(8)]
    backward = [sampler().batch(3 * i, 3)[0] for i in reversed(range(8))][::-1]
    assert all(map(torch.equal, forward, backward))
    assert torch.equal(windows.batch(0, 6)[0], torch.cat(forward[:2]))


def test_seeds_and_data_differ_in_order_and_fingerprint():
    orders = {tuple(sampler(seed).index(i) for i in range(7)) for seed in range(6)}
    assert len(orders) > 4
    prints = {sampler().fingerprint(), sampler(1).fingerprint(), sampler(count=31).fingerprint(),
              sampler(order=np.arange(7)).fingerprint()}
    assert len(prints) == 4 and sampler().fingerprint() in prints


def test_a_given_order_is_followed():
    windows = sampler(order=np.array([3, 1, 3]))
    assert [windows.index(i) for i in range(5)] == [3, 1, 3, 3, 1]


def test_too_few_tokens_are_refused():
    assert sampler(count=T + 1).windows == 1
    with pytest.raises(ValueError, match=rf"tokens in the train split is {T}; allowed: at least seq_len \+ 1 = 5"):
        sampler(count=T)


def test_pocl_draws_from_the_easiest_windows_first():
    windows = sampler(count=9 * T + 1)
    difficulty = np.array([5.0, 0.0, 8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 4.0])
    easy, middle = {1, 3, 5}, {1, 3, 5, 7, 8, 0}
    order = asnn.pocl_order(windows, difficulty, 30)
    assert len(order) == 30
    assert set(order[:10]) == easy
    assert set(order[10:20]) == middle
    assert set(order[20:]) == set(range(9))


@pytest.mark.parametrize("positions", [1, 2, 3, 7, 100])
def test_pocl_fills_any_number_of_positions(positions):
    assert len(asnn.pocl_order(sampler(), np.arange(7.0), positions)) == positions


# ---- files


def test_an_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a" / "file.json"
    asnn.write_atomically(path, "old")

    def interrupted(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asnn.write_atomically(path, "new content")
    assert path.read_text() == "old"
    monkeypatch.undo()
    asnn.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_an_interrupted_folder_does_not_appear(tmp_path):
    with pytest.raises(KeyboardInterrupt), asnn.new_folder(tmp_path / "a" / "made") as temporary:
        (temporary / "half").write_text("x")
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []
    with asnn.new_folder(tmp_path / "a" / "made") as temporary:
        (temporary / "whole").write_text("x")
        assert not (tmp_path / "a" / "made").exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["made"]


def test_a_folder_that_another_process_made_meanwhile_is_kept(tmp_path):
    with asnn.new_folder(tmp_path / "made") as temporary:
        (temporary / "mine").write_text("x")
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "theirs").write_text("x")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["made", "made/theirs"]


def test_an_interrupted_tokenisation_leaves_no_cache(tmp_path, monkeypatch, teacher):
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path / "cache"))
    corpus = asnn.load_corpus(str(write_corpus(tmp_path / "mine")))

    def half(path, ids):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", half)
        asnn.tokenize_corpus(corpus, teacher.tokenizer)
    assert teacher.tokenizer.decode(asnn.tokenize_corpus(corpus, teacher.tokenizer)["train"]) == "The train text.\n"


def test_attached_folders_are_searched_shallow_first(inputs):
    for below in ("b/deep/x", "z/x"):
        (inputs / below).mkdir(parents=True)
    assert asnn.find_attached(lambda path: path.name == "x") == inputs / "z" / "x"
    assert asnn.find_attached(lambda path: False) is None
