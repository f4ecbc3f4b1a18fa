"""What a model is given: teachers of every head, files of other tools, inputs of other models,
weights of two bytes, nothing at all."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf

import asnn_common as asnn
from test_model import SOME, V, build, close, generate


@pytest.fixture
def ids():
    return torch.randint(1, V, (2, 12))


# ---- a head that is more than a weight
SIZE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ONE = {"num_key_value_heads": 1, "head_dim": 16}
OLD = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MORE = {"phi": SIZE, "gptj": {**OLD, "rotary_dim": 4}, "cohere": {**SIZE, "logit_scale": 0.0625},
        "granite": {**SIZE, "logits_scaling": 8.0},
        "gemma2": {**SIZE, **ONE, "final_logit_softcapping": 2.0}}
PLAIN = {"llama": SIZE, "qwen3": {**SIZE, **ONE}, "gpt2": OLD,
         "mamba": {**SIZE, "state_size": 4, "time_step_rank": 4}}


def other(kind):
    """A model of another family whose weights are as large as those of a trained one."""
    config = hf.AutoConfig.for_model(kind, **{**MORE, **PLAIN}[kind])
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and kind != "mamba":
                p.mul_(8)
            elif name == "lm_head.bias":
                p.normal_(std=2.0)
    return model


@pytest.mark.parametrize("kind", [*MORE, *PLAIN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_teacher_is_judged_by_its_own_logits(kind, dtype, ids, small_recipe):
    model = other(kind).to(dtype)
    tokens = np.concatenate((ids.flatten().numpy(), [3]))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[:24]).view(3, 8)).logits.float()
    nll = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens[1:])).item()
    exact = 1e-4 if dtype == torch.float32 else 1e-2
    assert asnn.evaluate(model, tokens, 8).nll == pytest.approx(nll, rel=exact)
    call = (build(), model, small_recipe("v14.3", layer_map=((0, 0), (1, 1))))
    if kind in PLAIN:
        return asnn.Distiller(*call).close()
    with pytest.raises(ValueError, match=f"^teacher is '{kind}'; allowed: a model whose logits"):
        asnn.Distiller(*call)


# ---- config.json after other tools
TOOLS = {"quantization_config": {"quant_method": "torchao"}, "compression_config": {},
         "unsloth_version": "1", "transformers.js_config": {}, "torchscript": False,
         "max_length": 50, "model_max_length": 64, "torch_dtype": "bfloat16"}


def written(folder, **keys):
    """The config of a saved student after a tool has written these keys into its file."""
    build(shake=False).config.save_pretrained(folder)
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**whole, **keys}))
    return hf.AutoConfig.from_pretrained(folder, trust_remote_code=True)


def test_keys_of_other_tools_are_kept_and_misspelt_ones_of_ours_refused(tmp_path):
    config = written(tmp_path, **TOOLS)
    assert config.quantization_config == TOOLS["quantization_config"] and config.d_model == 32
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: again[name] for name in list(TOOLS)[:4]} == dict(list(TOOLS.items())[:4])
    assert "_of_other_tools" not in again
    for name in ("thresholds", "d_modle", "spike_site", "hidden_size"):
        with pytest.raises(ValueError, match=f"field of GooseConfig is .'{name}'.; allowed"):
            written(tmp_path, **{name: 64})
    for name in ("unsloth_version", "n_layers"):  # in Python there are no other tools
        with pytest.raises(ValueError, match=f"field of GooseConfig is .'{name}'.; allowed"):
            asnn.GooseConfig(**{name: 4})


# ---- inputs that other models take
PACKED = torch.cat((torch.arange(5), torch.arange(7)))[None]
REFUSED = {"position_ids": PACKED, "seq_idx": (PACKED == 0).cumsum(1).int(), "max_length_q": 7,
           "cu_seq_lens_q": torch.tensor([0, 5, 12]), "token_type_ids": PACKED.clamp_max(1),
           "output_attentions": True, "past_key_values": hf.DynamicCache()}
PASSES = {"position_ids": torch.arange(12)[None], "seq_idx": None, "output_attentions": False,
          "cache_position": torch.arange(12), "token_type_ids": torch.zeros(1, 12).long(),
          "num_items_in_batch": 24, "past_key_values": None, "cu_seq_lens_q": None}


@pytest.mark.parametrize("name", REFUSED)
def test_an_input_with_a_meaning_is_not_swallowed(ids, name):
    for model in (build(), build().goose):
        with pytest.raises(ValueError, match=f"{name}.*; allowed|DynamicCache.*; allowed"):
            model(ids, **{name: REFUSED[name]})


@SOME
def test_what_changes_nothing_passes_and_a_state_has_three_names(ids, student):
    model, tail = build(student), {"position_ids": torch.arange(5, 12)[None]}
    whole, state = model(ids).logits, model(ids[:, :5], use_cache=True).state
    assert torch.equal(model(ids, **PASSES).logits, whole)
    for name in ("state", "past_key_values", "cache_params"):
        close(model(ids[:, 5:], **tail, **{name: state}).logits, whole[:, 5:])
    padded = torch.cat((torch.zeros_like(ids[:, :2]), ids), 1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # pads get any number
    close(model(padded, mask, position_ids=positions).logits[:, 2:], whole)
    with pytest.raises(ValueError, match="cache is .*; allowed: one state"):
        model(ids, state=state, past_key_values=state)


@SOME
@pytest.mark.parametrize("options", [
    {}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2},
    {"num_return_sequences": 3, "do_sample": True, "top_k": 1}], ids=str)
def test_generate_goes_on_from_a_state(ids, student, options):
    model = build(student)
    state, out = model(ids[:, :7], use_cache=True).state, generate(model, ids, **options)
    for name in ("state", "past_key_values"):
        assert torch.equal(generate(model, ids, **{name: state}, **options), out)


@SOME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_student_of_two_bytes_a_weight_can_be_measured_and_made_sparse(ids, student, dtype):
    model = build(student).to(dtype)
    assert generate(model, ids, max_new_tokens=3).shape == (2, 15)
    measured = asnn.evaluate(model, ids.flatten().numpy(), 8).nll
    plans = [("gather", "dense", "dense"), ("gather_int8", "int8", "int8"),
             ("linear", "spikes", "dense")] * ("all sites" in student)
    copies = [asnn.sparsify(model, *plan) for plan in plans]
    for copied in (*copies, asnn.quantize_int8(model), asnn.quantize_int8(model, True)):
        assert asnn.evaluate(copied, ids.flatten().numpy(), 8).nll == pytest.approx(measured, 0.2)
        generate(copied, ids, max_new_tokens=2)
    assert model.dtype == dtype  # that of the original is left alone


@SOME
def test_no_tokens_give_no_logits_and_a_decay_of_one_has_finite_gradients(ids, student):
    model = build(student)
    for shape in ((1, 0), (0, 5)):
        out = model(torch.zeros(shape, dtype=torch.long), use_cache=True)
        assert out.logits.shape == (*shape, model.config.vocab_size) and out.state is None
    seen = model(ids, use_cache=True).state
    assert model(ids[:, :0], past_key_values=seen).state is seen
    for block in model.goose.blocks:
        torch.nn.init.constant_(block.time_mix.decay_logit, 20.0)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_tokenizer_beside_a_student_pads_on_the_left(student, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", "right")
    monkeypatch.setattr(asnn, "_model_card", lambda metrics: "")
    run = asnn.Run.open("v14.3", "padded", {})
    run.finish({}, student, tokenizer)
    beside = hf.AutoTokenizer.from_pretrained(run.folder / "student")
    assert (beside.padding_side, tokenizer.padding_side) == ("left", "right")
    batch = beside(["the", "state of a spike"], return_tensors="pt", padding=True)
    generate(student, batch["input_ids"], attention_mask=batch["attention_mask"])
