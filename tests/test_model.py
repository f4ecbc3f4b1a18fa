"""The model: saving and loading, generation with and without the cache, padding, causality, gradients."""
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import asnn_common as asnn
import conftest

V = 50
SHAPE = {"vocab_size": V, "d_model": 32, "n_layer": 3, "n_positions": 24, "pad_token_id": 0}
ORDERS = ("gate_first", "project_first")
STATES = {"matrix": {"state_kind": "matrix", "head_width": 8, "threshold": "mixed"},
          "delta": {"state_kind": "delta", "head_width": 8, "projection_bias": True},
          "vector at all sites": {"spike_sites": asnn.SITES},
          "matrix at all sites": {"state_kind": "matrix", "head_width": 16, "spike_sites": asnn.SITES,
                                  "encoder_kind": "integer:3"},
          "delta at all sites": {"state_kind": "delta", "head_width": 32, "spike_sites": asnn.SITES,
                                 "threshold": "channel"}}
STUDENTS = (*asnn.THRESHOLDS, *STATES)  # thresholds of the vector state, and the other states and sites


def build(shake=True, **options):
    """A model whose parameters are all away from their start values, so that a lost one shows."""
    torch.manual_seed(0)
    model = asnn.GooseForCausalLM(asnn.GooseConfig(**{**SHAPE, **options})).eval()
    return conftest.shake(model) if shake else model


@pytest.fixture(scope="module")
def model():
    return build(threshold="mixed", granularity="channel")


@pytest.fixture(scope="module")
def models():
    """models(student, order): one of each, built once."""
    made = {}

    def get(student="token", order="gate_first"):
        key = student, order
        if key not in made:
            made[key] = build(**{"output_order": order, **STATES.get(student, {"threshold": student})})
        return made[key]
    return get


@pytest.fixture
def ids():
    return torch.randint(1, V, (3, 12))


def left_padded(ids, pads):
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return ids, mask


def assert_same_state(a, b):
    assert torch.equal(a.position, b.position) and a.length == b.length
    for one, other in zip(a.layers, b.layers):
        torch.testing.assert_close(one.S, other.S, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.shift, other.shift, rtol=1e-4, atol=1e-4)
        for x, y in zip((one.k_statistics, one.v_statistics), (other.k_statistics, other.v_statistics)):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x.total, y.total, rtol=1e-4, atol=1e-4)
                assert torch.equal(x.count, y.count)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- saving and loading --------------------------------------------------------------------------

PROGRAM = """
import importlib.util, json, sys
folder, result, *blocked = sys.argv[1:]
assert importlib.util.find_spec("asnn_common") is None
sys.modules.update({name: None for name in blocked})
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(1, 13).unsqueeze(0)
with torch.no_grad():
    logits = model(ids).logits
tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
tied = model.lm_head.weight is model.get_input_embeddings().weight
json.dump({"logits": logits.tolist(), "tokens": tokens.tolist(), "tied": tied, "class": type(model).__name__,
           "loaded": sorted(name for name in blocked if sys.modules.get(name))}, open(result, "w"))
"""
BLOCKED = ("accelerate", "datasets", "matplotlib")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "student"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def programs(saved, tmp_path_factory):
    """Two processes that have nothing but the folder, started first so that they run beside the other tests."""
    started = {}
    for name, blocked in (("plain", ()), ("blocked", BLOCKED)):
        place = tmp_path_factory.mktemp(name)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_", "ASNN_"))}
        environment.update(HF_MODULES_CACHE=str(place / "modules"), HF_HOME=str(place / "hf"), HF_HUB_OFFLINE="1",
                           OMP_NUM_THREADS="1")
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(saved), str(place / "result.json"), *blocked],
                                   cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True)
        started[name] = process, place / "result.json"
    yield started
    for process, _ in started.values():
        process.kill()
        process.communicate()


def test_init_values_are_what_the_config_asks():
    """post_init must not wipe decays, mixes and thresholds."""
    model = build(shake=False, alpha_init=0.77, amplitude_init=1.53, granularity="channel", initializer_range=0.05)
    for block in model.goose.blocks:
        mix = block.time_mix
        for spike in (mix.spike_k, mix.spike_v):
            assert spike.alpha.unique().tolist() == pytest.approx([0.77])
            assert spike.amplitude.unique().tolist() == pytest.approx([1.53])
        for name, value in mix.initial().items():
            assert torch.equal(getattr(mix, name), value)
        assert mix.key.weight.std().item() == pytest.approx(0.05, rel=0.15)
        for branch in (mix.output, block.ffn.down):
            assert branch.weight.std().item() == pytest.approx(0.05 / 6**0.5, rel=0.15)
    assert model.lm_head.weight.std().item() == pytest.approx(0.05, rel=0.15)


def test_save_and_load_keep_every_parameter_and_the_logits(model, saved, ids):
    loaded = asnn.GooseForCausalLM.from_pretrained(saved)
    assert not loaded.training
    expected = dict(model.named_parameters())
    for name, p in loaded.named_parameters():
        assert torch.equal(p, expected.pop(name)), name
    assert not expected
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_a_checkpoint_lacks_gets_its_start_value_and_the_rest_is_kept(model, tmp_path):
    lacking = ("decay_logit", "spike_k.alpha", "output.weight")
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith(lacking)}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded = asnn.GooseForCausalLM.from_pretrained(tmp_path)
    for name, p in loaded.named_parameters():
        if not name.endswith(lacking):
            assert torch.equal(p, model.get_parameter(name)), name
    for block in loaded.goose.blocks:
        assert torch.equal(block.time_mix.decay_logit, block.time_mix.initial()["decay_logit"])
        assert block.time_mix.spike_k.alpha.unique().tolist() == [1.0]
        assert block.time_mix.output.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.15)


@pytest.mark.parametrize("student", STATES)
def test_other_states_and_sites_survive_saving(models, ids, tmp_path, student):
    model = models(student)
    model.save_pretrained(tmp_path)
    loaded = asnn.GooseForCausalLM.from_pretrained(tmp_path)
    fresh = dict(build(shake=False, **STATES[student]).named_parameters())
    for name, p in loaded.named_parameters():
        assert torch.equal(p, model.get_parameter(name)) and not torch.equal(p, fresh.pop(name)), name
    assert not fresh and torch.equal(loaded(ids).logits, model(ids).logits)


def test_gates_encoders_and_norms_that_a_checkpoint_lacks_get_their_start_values(models, tmp_path):
    """Of each part one half is there and must be kept."""
    model = models("delta at all sites")
    lacking = {"gate.bias": 1.0, "beta.weight": 0.0, "mix_out.alpha": 1.0, "norm.weight": 1.0, "ffn_in.centre": 0.0,
               "spike_v.amplitude": 1.0}
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith(tuple(lacking))}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded, seen = asnn.GooseForCausalLM.from_pretrained(tmp_path), 0
    for name, p in loaded.named_parameters():
        value = next((lacking[end] for end in lacking if name.endswith(end)), None)
        seen += value is not None
        assert torch.equal(p, model.get_parameter(name) if value is None else torch.full_like(p, value)), name
    assert seen == 3 * len(lacking)


@pytest.mark.parametrize("name", ["decay_logit", "alpha", "amplitude", "mix_k"])
def test_the_saved_model_was_away_from_its_start_values(model, name):
    fresh = dict(build(shake=False, threshold="mixed", granularity="channel").named_parameters())
    for key, p in model.named_parameters():
        assert name not in key or (p != fresh[key]).all()


def test_saved_folder_holds_the_code_and_names_its_classes(saved):
    assert (saved / "asnn_common.py").read_bytes() == Path(asnn.__file__).read_bytes()
    config = json.loads((saved / "config.json").read_text())
    assert config["auto_map"] == {"AutoConfig": "asnn_common.GooseConfig",
                                  "AutoModelForCausalLM": "asnn_common.GooseForCausalLM"}
    assert (saved / "model.safetensors").is_file()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision(saved, dtype, ids):
    loaded = asnn.GooseForCausalLM.from_pretrained(saved, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded(ids).logits.isfinite().all()


def test_register_auto_classes(model, saved, ids):
    asnn.register_auto_classes()
    asnn.register_auto_classes()  # a second call changes nothing
    assert isinstance(AutoConfig.for_model("goose", **SHAPE), asnn.GooseConfig)
    assert type(AutoConfig.from_pretrained(saved)) is asnn.GooseConfig
    assert type(AutoModelForCausalLM.from_config(asnn.GooseConfig(**SHAPE))) is asnn.GooseForCausalLM
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert type(loaded) is asnn.GooseForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_head_is_tied_before_and_after_loading(model, saved):
    loaded = asnn.GooseForCausalLM.from_pretrained(saved)
    for one in (model, loaded):
        assert one.lm_head.weight is one.goose.embeddings.weight
        assert asnn.count_parameters(one) == asnn.count_parameters(one.goose)
    with torch.no_grad():
        loaded.goose.embeddings.weight[3] = 7.0
    assert (loaded.lm_head.weight[3] == 7.0).all()


def test_head_may_be_untied(tmp_path, ids):
    model = build(tie_word_embeddings=False)
    assert asnn.count_parameters(model) == asnn.count_parameters(model.goose) + V * 32
    model.save_pretrained(tmp_path)
    loaded = asnn.GooseForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is not loaded.goose.embeddings.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_resized_embeddings_stay_tied(ids):
    model = build()
    before = model(ids).logits
    model.resize_token_embeddings(V + 6)
    assert model.lm_head.weight is model.goose.embeddings.weight and model.config.vocab_size == V + 6
    close(model(ids).logits[..., :V], before)


# ---- positions, outputs, losses ------------------------------------------------------------------


@pytest.mark.parametrize("student", ["mixed", *STATES])
def test_positions_continue_past_n_positions_with_the_last_one(models, student):
    model, ids = models(student), torch.randint(1, V, (2, 60))
    logits, state = model(ids).logits, None
    pieces = []
    for part in ids.split(25, 1):
        out = model(part, state=state)
        state = out.state
        pieces.append(out.logits)
    close(torch.cat(pieces, 1), logits)
    assert logits.isfinite().all() and state.position.tolist() == [60, 60]
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (2, 65)


def test_labels_give_the_shifted_cross_entropy(model, ids):
    labels = ids.clone()
    labels[0, :5] = -100
    labels[2, 7] = -100
    out = model(ids, labels=labels)
    log_p = out.logits[:, :-1].log_softmax(-1)
    terms = [-log_p[b, t, labels[b, t + 1]] for b in range(3) for t in range(11) if labels[b, t + 1] != -100]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())
    assert len(terms) == 33 - 4 - 1
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)


def test_loss_is_that_of_gpt2s_convention(ids):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=1, n_positions=16)).eval()
    out = gpt2(ids, labels=ids)
    torch.testing.assert_close(F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), out.loss)


def test_gradient_accumulation_by_the_trainer_is_not_counted_twice(model, ids):
    """A trainer leaves the division by the number of tokens to a forward that takes any keyword, unless the model
    says that it does not."""
    if getattr(model, "accepts_loss_kwargs", True):
        plain = model(ids, labels=ids).loss
        torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=66).loss, plain * 33 / 66)


def test_training_step_as_a_trainer_calls_it(ids):
    model = build().train()
    before = model(input_ids=ids, labels=ids).loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < before


def test_hidden_states_follow_gpt2(model, ids):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=3, n_head=1, n_positions=24)).eval()
    theirs = gpt2(ids, output_hidden_states=True).hidden_states
    ours = model(ids, output_hidden_states=True).hidden_states
    assert [h.shape for h in ours] == [h.shape for h in theirs]
    goose = model.goose
    assert torch.equal(ours[0], goose.embeddings(ids) + goose.positions(torch.arange(12)))
    assert torch.equal(ours[1], goose.blocks[0](ours[0])[0])
    assert torch.equal(ours[2], goose.blocks[1](ours[1])[0])
    assert torch.equal(ours[3], goose.ln_f(goose.blocks[2](ours[2])[0]))
    assert torch.equal(ours[3], goose(ids).last_hidden_state)
    assert torch.equal(model.lm_head(ours[3]), model(ids).logits)
    assert model(ids).hidden_states is None


def test_hidden_states_may_be_asked_for_by_the_config(ids):
    model = build(output_hidden_states=True)
    assert len(model(ids).hidden_states) == 4
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_return_dict_false_gives_a_tuple(model, ids):
    out = model(ids, labels=ids)
    loss, logits, state = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)
    assert_same_state(state, out.state)
    assert len(model(ids, use_cache=False, return_dict=False)) == 1


def test_return_dict_false_gives_a_tuple_from_the_base_model_too(model, ids):
    hidden, state = model.goose(ids, return_dict=False)
    assert torch.equal(hidden, model.goose(ids).last_hidden_state) and isinstance(state, asnn.GooseState)


def test_inputs_embeds_equal_input_ids(model, ids):
    embeds = model.get_input_embeddings()(ids)
    out = model(inputs_embeds=embeds, labels=ids)
    assert torch.equal(out.logits, model(ids).logits) and torch.equal(out.loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("given", [(), ("input_ids", "inputs_embeds")])
def test_exactly_one_of_ids_and_embeds(model, ids, given):
    inputs = {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds, and not both"):
        model(**{name: inputs[name] for name in given})


def test_four_dimensional_masks_are_refused(model, ids):
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 1, 12, 12\); allowed: \(B, T\), 0 at padding"):
        model(ids, attention_mask=torch.ones(3, 1, 12, 12))


@pytest.mark.parametrize("keep, index", [(0, slice(None)), (1, slice(-1, None)), (4, slice(-4, None)),
                                         (torch.tensor([2, 5]), [2, 5])])
def test_logits_to_keep(model, ids, keep, index):
    close(model(ids, logits_to_keep=keep).logits, model(ids).logits[:, index])


def test_cache_is_off_in_training_and_as_asked(model, ids):
    assert model(ids).state is not None and model(ids, use_cache=False).state is None
    assert build().train()(ids).state is None
    assert build(use_cache=False)(ids).state is None


# ---- causality -----------------------------------------------------------------------------------


EVERY = pytest.mark.parametrize("student, order", [*itertools.product(asnn.THRESHOLDS, ORDERS),
                                                   *((name, "gate_first") for name in STATES)])


@pytest.mark.parametrize("training", [True, False])
@EVERY
def test_a_changed_token_changes_nothing_before_it_nor_in_other_sequences(models, ids, student, training, order):
    model = models(student, order).train(training)
    before = model(ids).logits
    for t in (0, 5, 11):
        changed = ids.clone()
        changed[1, t] = ids[1, t] % (V - 1) + 1
        after = model(changed).logits
        assert torch.equal(before[1, :t], after[1, :t]) and torch.equal(before[[0, 2]], after[[0, 2]])
        assert (before[1, t:] != after[1, t:]).any(-1).all()
    model.eval()


@pytest.mark.parametrize("student", STUDENTS)
def test_no_gradient_comes_from_the_future(models, ids, student):
    model = models(student)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[1, 6].sum().backward()
    reached = embeds.grad.abs().sum(-1) > 0
    assert reached[1, :7].all()
    assert not reached[1, 7:].any() and not reached[[0, 2]].any()
    model.zero_grad()


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(1,), (5,), (3, 4, 9), tuple(range(1, 12))])
@EVERY
def test_prefill_by_chunks_equals_one_pass(models, ids, student, order, cuts):
    model = models(student, order)
    whole, state, logits, start = model(ids), None, [], 0
    for end in (*cuts, 12):
        out = model(ids[:, start:end], state=state)
        logits.append(out.logits)
        state, start = out.state, end
    close(torch.cat(logits, 1), whole.logits)
    assert_same_state(state, whole.state)


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("full_mask", [True, False])
def test_left_padded_prefill_by_chunks_equals_one_pass(models, ids, student, full_mask):
    model = models(student)
    padded, mask = left_padded(ids, (0, 3, 8))  # the last row's first chunk is padding throughout
    whole = model(padded, attention_mask=mask)
    first = model(padded[:, :5], attention_mask=mask[:, :5])
    second = model(padded[:, 5:], attention_mask=mask if full_mask else mask[:, 5:], state=first.state)
    for row, pad in enumerate((0, 3, 8)):
        got = torch.cat((first.logits, second.logits), 1)[row, pad:]
        close(got, whole.logits[row, pad:])
    assert_same_state(second.state, whole.state)
    assert second.state.position.tolist() == [12, 9, 4] and second.state.length == 12


@pytest.mark.parametrize("student, S", [("mixed", (2, 32)), ("matrix", (2, 4, 8, 8)),
                                        ("delta at all sites", (2, 1, 32, 32))])
def test_state_does_not_grow_with_the_tokens_seen(models, student, S):
    def size(T):
        layers = models(student)(torch.randint(1, V, (2, T))).state.layers
        assert all(layer.S.shape == S for layer in layers)
        return sum(x.numel() for layer in layers for x in (layer.S, layer.shift, *layer.k_statistics,
                                                           *layer.v_statistics))
    assert size(3) == size(50)


@pytest.mark.parametrize("student", ["mixed", "matrix", "delta"])
def test_reorder_takes_the_states_of_the_sequences(models, ids, student):
    model = models(student)
    state, index = model(ids).state, torch.tensor([2, 2, 0, 1])
    assert_same_state(state.reorder(index), model(ids[index]).state)


@pytest.mark.parametrize("student", STUDENTS)
def test_left_padded_batch_equals_the_singles(models, ids, student):
    model = models(student)
    padded, mask = left_padded(ids, (0, 3, 8))
    out = model(padded, attention_mask=mask)
    for row, pad in enumerate((0, 3, 8)):
        single = model(ids[row:row + 1, pad:])
        close(out.logits[row, pad:], single.logits[0])
        close(out.state.layers[-1].S[row], single.state.layers[-1].S[0])


def test_what_stands_at_a_pad_does_not_matter(model, ids):
    padded, mask = left_padded(ids, (0, 3, 8))
    other = torch.where(mask.bool(), padded, torch.full_like(padded, 17))
    a, b = (model(x, attention_mask=mask).logits[mask.bool()] for x in (padded, other))
    assert torch.equal(a, b)


def test_right_padded_batch_equals_the_singles_without_cache(model, ids):
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    close(logits[1, :7], model(ids[1:2, :7]).logits[0])
    close(logits[0], model(ids[:1]).logits[0])


def test_padding_after_a_token_is_refused_with_a_cache(model, ids):
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with pytest.raises(ValueError, match="attention_mask has padding after a token; .*on the left.*use_cache=False"):
        model(ids, attention_mask=mask, use_cache=True)
    out = model(ids, attention_mask=mask)  # an evaluation batch asks for no state and gets none
    assert out.state is None
    close(out.logits[1, :7], model(ids[1:2, :7]).logits[0])


@pytest.mark.parametrize("full_mask", [True, False])
def test_padding_after_the_tokens_of_a_state_is_refused(model, ids, full_mask):
    state = model(ids).state
    mask = torch.ones(3, 4, dtype=torch.long)
    mask[1, :2] = 0  # on the left of these tokens, and after those of the state
    if full_mask:
        mask = torch.cat((torch.ones_like(ids), mask), 1)
    with pytest.raises(ValueError, match="attention_mask has padding after a token"):
        model(ids[:, :4], attention_mask=mask, state=state)


@pytest.mark.parametrize("student", [name for name in STATES if "state_kind" in STATES[name]])
def test_matrix_recurrences_agree(student):
    long = torch.randint(1, V, (2, 48))
    logits, reference = (build(recurrence=name, **STATES[student])(long).logits for name in ("chunked", "reference"))
    close(logits, reference)


@pytest.mark.parametrize("state", ["matrix", "delta"])
def test_what_the_matrix_state_writes_and_reads_is_the_rule(ids, state):
    """One layer by hand, from its own projections: keys scaled, heads apart, group norm, gate."""
    mix = build(**STATES[state]).goose.blocks[1].time_mix
    x = torch.randn(2, 9, 32)
    before = torch.cat((torch.zeros(2, 1, 32), x[:, :-1]), 1)
    k_in, v_in, r_in, g_in = (x * m + before * (1 - m) for m in (mix.mix_k, mix.mix_v, mix.mix_r, mix.mix_g))
    k, v, r = mix.spike_k(mix.key(k_in))[0], mix.spike_v(mix.value(v_in))[0], mix.receptance(r_in)
    w, out = torch.sigmoid(mix.decay_logit).clamp_min(asnn.MIN_DECAY), []
    for head in range(4):
        part, S = slice(8 * head, 8 * head + 8), torch.zeros(2, 8, 8)
        for t in range(9):
            key, value = k[:, t, part], v[:, t, part]
            if state == "matrix":
                key = key * (1 - torch.sigmoid(mix.decay_logit[part]).square()).sqrt()
            else:
                key = key / (key.square().sum(-1, keepdim=True) + 1).sqrt()
                beta = torch.sigmoid(mix.beta(k_in[:, t]))[:, head:head + 1]
                value = beta * (value - torch.einsum("bn,bnm->bm", key, S))
            S = w[part].unsqueeze(-1) * S + torch.einsum("bn,bm->bnm", key, value)
            y = torch.einsum("bn,bnm->bm", r[:, t, part], S)
            y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + mix.norm.eps).sqrt()
            out.append(y * mix.norm.weight[part] + mix.norm.bias[part])
    out = torch.stack(out).view(4, 9, 2, 8).permute(2, 1, 0, 3).reshape(2, 9, 32)
    close(mix(x)[0], mix.output(out * F.silu(mix.gate(g_in))))


def test_recurrences_agree_and_the_founders_formula_does_not(ids):
    long = torch.randint(1, V, (2, 48))
    logits = {name: build(recurrence=name)(long).logits for name in ("chunked", "reference", "cumsum")}
    close(logits["chunked"], logits["reference"])
    assert (logits["cumsum"][:, 30:] - logits["reference"][:, 30:]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("student", STUDENTS)
def test_half_precision_runs_with_an_fp32_state(ids, student, dtype):
    model = build(**STATES.get(student, {"threshold": student})).to(dtype)
    out = model(ids, labels=ids)
    assert out.logits.dtype == dtype and out.logits.isfinite().all() and out.loss.isfinite()
    assert {layer.S.dtype for layer in out.state.layers} == {torch.float32}
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (3, 16)
    padded, mask = left_padded(ids, (0, 3, 8))
    assert model(padded, attention_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize("options", [{}, STATES["matrix at all sites"], STATES["delta at all sites"]])
def test_half_precision_is_close_to_fp32_without_spikes(ids, options):
    """Spikes near their threshold may flip, so that the dense twin is what can be compared."""
    options = {**options, "spike_kind": "dense"}
    exact = build(**options)(ids).logits
    for dtype, bound in ((torch.float16, 0.01), (torch.bfloat16, 0.08)):
        logits = build(**options).to(dtype)(ids).logits.float()
        assert (logits - exact).norm() / exact.norm() < bound


# ---- initial decays and mixes --------------------------------------------------------------------


def blind_layers(model, ids):
    """Layers whose time mix does not answer to the current token."""
    found = []
    for i, block in enumerate(model.goose.blocks):
        x = torch.randn(1, 6, 32)
        changed = x.clone()
        changed[:, -1] = torch.randn(32)
        before, after = block.time_mix(x)[0], block.time_mix(changed)[0]
        if torch.equal(before[:, -1], after[:, -1]):
            found.append(i)
    return found


def test_spread_decays_and_mixes_have_the_documented_ranges():
    for block in build(shake=False).goose.blocks:
        w = torch.sigmoid(block.time_mix.decay_logit)
        assert w.min().item() == pytest.approx(torch.sigmoid(torch.tensor(0.5)).item())
        assert w.max().item() == pytest.approx(torch.sigmoid(torch.tensor(6.0)).item())
        assert w.unique().numel() == 32
        for name in ("mix_k", "mix_v", "mix_r"):
            mix = getattr(block.time_mix, name)
            assert (mix.min().item(), mix.max().item()) == pytest.approx((0.5, 1.0))


@pytest.mark.parametrize("state", ["matrix", "delta"])
def test_a_matrix_state_starts_with_spread_heads_and_open_gates(state):
    """post_init must not wipe what makes a head remember."""
    for block in build(shake=False, state_kind=state, head_width=8, projection_bias=True).goose.blocks:
        mix = block.time_mix
        w = torch.sigmoid(mix.decay_logit).view(4, 8)
        assert torch.equal(mix.decay_logit.view(4, 8), torch.linspace(0.5, 6.0, 8).expand(4, 8))
        assert (w.diff(dim=1) > 0).all()
        assert mix.gate.bias.unique().tolist() == [1.0] and mix.gate.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert mix.norm.weight.unique().tolist() == [1.0] and mix.norm.bias.unique().tolist() == [0.0]
        assert mix.mix_g.tolist() == torch.linspace(1.0, 0.5, 32).tolist()
        assert (mix.beta is None) == (state == "matrix")
        assert mix.beta is None or not (mix.beta.weight.any() or mix.beta.bias.any())
        for linear in (mix.key, mix.value, mix.receptance, mix.output):
            assert not linear.bias.any() and linear.weight.any()
    published = build(shake=False, state_kind=state, head_width=8, decay_init="published").goose.blocks[0].time_mix
    assert published.decay_logit.unique().tolist() == [-0.5]


def test_encoders_start_at_the_identity_of_their_parameters():
    for name, module in asnn.spike_modules(build(shake=False, spike_sites=asnn.SITES)).items():
        if isinstance(module, asnn.SpikeEncoder):
            assert not module.centre.any(), name
            assert module.alpha.unique().tolist() == module.amplitude.unique().tolist() == [1.0], name


def test_published_decays_and_mixes_are_the_published_ones():
    for i, block in enumerate(build(shake=False, decay_init="published", mix_init="published").goose.blocks):
        assert torch.sigmoid(block.time_mix.decay_logit).unique().tolist() == pytest.approx([0.378], abs=1e-3)
        assert block.time_mix.mix_k.unique().tolist() == pytest.approx([1 - i / 2])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mix_init, blind", [("spread", []), ("published", [2])])
def test_only_published_mixes_leave_a_layer_blind_to_the_current_token(ids, mix_init, blind, order):
    assert blind_layers(build(shake=False, mix_init=mix_init, output_order=order), ids) == blind


# ---- spike sites ---------------------------------------------------------------------------------


@pytest.mark.parametrize("state, inputs", [("vector", "kvr"), ("matrix", "kvrg"), ("delta", "kvrg")])
def test_spike_modules_are_listed_as_the_forward_pass_meets_them(ids, state, inputs):
    model, met = build(state_kind=state, head_width=8, spike_sites=asnn.SITES), []
    modules = asnn.spike_modules(model)
    for name, module in modules.items():
        module.spikes.register_forward_hook(lambda _m, _a, _o, name=name: met.append(name))
    model(ids)
    layer = [*(f"mix_in.{name}" for name in inputs), "k", "v", "mix_out", "ffn_in", "ffn_hidden"]
    assert list(modules) == met == [*(f"{i}.{name}" for i in range(3) for name in layer), "head_in"]


@pytest.mark.parametrize("site", asnn.SITES[2:])
def test_each_site_brings_its_own_encoders(ids, site):
    model = build(state_kind="delta", head_width=8, spike_sites=("k", "v", site), encoder_kind="integer:2")
    found = {name for name, m in asnn.spike_modules(model).items() if isinstance(m, asnn.SpikeEncoder)}
    expected = {"mix_in": {f"{i}.mix_in.{name}" for i in range(3) for name in "kvrg"}, "head_in": {"head_in"}}
    assert found == expected.get(site, {f"{i}.{site}" for i in range(3)})
    width = 128 if site == "ffn_hidden" else 32
    for name in found:
        module = asnn.spike_modules(model)[name]
        assert (module.kind, module.levels, module.centre.numel()) == ("integer:2", 2, width)


@pytest.mark.parametrize("student, linears", [("vector at all sites", "key value receptance output up down"),
                                              ("delta at all sites", "key value receptance gate output up down beta")])
def test_all_sites_feed_every_linear_with_a_code(models, ids, student, linears):
    """What a Linear sees, less the centre and over amplitude and scale, is spikes; the head's input too."""
    model, seen = models(student), {}
    handles = [m.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
               for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    codes = []
    handles += [m.register_forward_hook(lambda _m, _a, out: codes.append(out))
                for m in model.modules() if isinstance(m, asnn.SpikeEncoder)]
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    assert {name.split(".")[-1] for name in seen} == {*linears.split(), "lm_head"}
    for name, given in seen.items():
        assert any(torch.equal(given, code) for code in codes), name


@pytest.mark.parametrize("student", STATES)
def test_spike_density_is_a_share_at_every_site(models, ids, student):
    model = models(student)
    density = asnn.spike_density(model, ids)
    assert list(density) == list(asnn.spike_modules(model))
    assert all(0 < value < 1 for value in density.values())


def test_the_dense_twin_of_a_student_with_encoders_passes_everything_on(ids):
    twin, plain = build(spike_kind="dense", spike_sites=asnn.SITES), build(spike_kind="dense")
    plain.load_state_dict({k: v for k, v in twin.state_dict().items() if k in plain.state_dict()})
    assert torch.equal(twin(ids).logits, plain(ids).logits)
    assert set(asnn.spike_density(twin, ids).values()) == {1.0}


# ---- gradients -----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("estimator", ["clipped", "normalised"])
def test_gradients_reach_every_parameter(ids, estimator, student, order):
    options = {"output_order": order, **STATES.get(student, {"threshold": student})}
    model = build(estimator=estimator, granularity="channel", **options).train()
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_identity_gives_alpha_no_gradient(ids):
    model = build(estimator="identity").train()
    model(ids, labels=ids).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {name for name, _ in model.named_parameters() if "alpha" in name} and len(without) == 6


def test_gradients_flow_through_a_given_state(ids):
    model = build().train()
    state = model(ids[:, :6], use_cache=True).state
    loss = model(ids[:, 6:], state=state).logits.square().mean()
    first_tokens = sorted(set(ids[:, :6].flatten().tolist()) - set(ids[:, 6:].flatten().tolist()))
    model.lm_head.weight.grad = None
    gradient = torch.autograd.grad(loss, model.goose.positions.weight)[0]
    assert first_tokens and gradient[:6].any(1).all() and gradient[6:12].any(1).all()


# ---- generation ----------------------------------------------------------------------------------

SPEAKERS = (*asnn.THRESHOLDS, "matrix", "delta at all sites")
SETTINGS = {"greedy": {"do_sample": False}, "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
            "beams": {"do_sample": False, "num_beams": 3},
            "several beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}}


def generate(model, ids, **options):
    torch.manual_seed(5)
    return model.generate(ids, **{"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **options})


@pytest.mark.parametrize("student", SPEAKERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_generation_with_the_cache_equals_without(models, ids, student, setting):
    model, options = models(student), SETTINGS[setting]
    cached = generate(model, ids, use_cache=True, **options)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))
    assert cached.shape == (3 * options.get("num_return_sequences", 1), 22)
    assert cached[:, 12:].unique().numel() > 3  # a constant would hide a broken cache


def test_greedy_generation_is_the_argmax_of_the_logits(model, ids):
    expected = ids
    for _ in range(6):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(generate(model, ids, max_new_tokens=6), expected)


def test_sampling_follows_the_seed(model, ids):
    options = SETTINGS["sampling"]
    one = generate(model, ids, **options)
    assert torch.equal(one, generate(model, ids, **options))
    torch.manual_seed(6)
    assert not torch.equal(one, model.generate(ids, max_new_tokens=10, pad_token_id=0, **options))


def test_generation_with_the_cache_feeds_one_token_a_step(model, ids):
    lengths = []
    handle = model.register_forward_pre_hook(lambda _m, _a, given: lengths.append(given["input_ids"].shape[1]),
                                             with_kwargs=True)
    try:
        generate(model, ids, max_new_tokens=4)
        generate(model, ids, max_new_tokens=4, use_cache=False)
    finally:
        handle.remove()
    assert lengths == [12, 1, 1, 1, 12, 13, 14, 15]


@pytest.mark.parametrize("student", SPEAKERS)
@pytest.mark.parametrize("setting", ["greedy", "beams"])
def test_left_padded_generation_equals_the_singles(models, ids, student, setting):
    model = models(student)
    padded, mask = left_padded(ids, (0, 3, 8))
    for use_cache in (True, False):
        batch = generate(model, padded, attention_mask=mask, use_cache=use_cache, **SETTINGS[setting])
        for row, pad in enumerate((0, 3, 8)):
            single = generate(model, ids[row:row + 1, pad:], **SETTINGS[setting])
            assert torch.equal(batch[row, pad:], single[0])


@pytest.mark.parametrize("student", SPEAKERS)
def test_a_given_state_continues_a_conversation(models, ids, student):
    model = models(student)
    state = model(ids[:, :7]).state
    assert torch.equal(generate(model, ids, state=state), generate(model, ids))


def test_a_second_turn_continues_the_state_of_the_first(model, ids):
    first = generate(model, ids, return_dict_in_generate=True)
    state = model(first.sequences).state
    both = torch.cat((first.sequences, ids[:, :4]), 1)
    assert torch.equal(generate(model, both, state=state), generate(model, both))


def test_a_given_state_continues_with_new_tokens_and_the_mask_of_all(models, ids):
    model = models("mixed")
    padded, mask = left_padded(ids, (0, 3, 5))
    state = model(padded[:, :7], attention_mask=mask[:, :7]).state
    expected = generate(model, padded, attention_mask=mask)
    assert torch.equal(generate(model, padded, attention_mask=mask, state=state), expected)
    assert torch.equal(generate(model, ids[:, 7:], attention_mask=mask, state=state), expected[:, 7:])


def test_a_state_without_the_tokens_it_has_seen_is_refused(model, ids):
    state = model(ids[:, :7]).state
    with pytest.raises(ValueError, match="state"):
        generate(model, ids[:, 7:], state=state)


def test_generation_from_embeds_equals_that_from_ids(model, ids):
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(generate(model, None, inputs_embeds=embeds), generate(model, ids)[:, 12:])


def test_text_generation_pipeline(model):
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline
    words = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    speak = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["w3 w4 w5 w6 w7", "w9 w10"]
    answers = speak(texts, batch_size=2, do_sample=False, max_new_tokens=5, return_full_text=False)
    for text, answer in zip(texts, answers):
        expected = generate(model, torch.tensor([[int(w[1:]) for w in text.split()]]), max_new_tokens=5)[0, -5:]
        assert answer[0]["generated_text"].split() == [f"w{i}" for i in expected.tolist()]


# ---- the folder alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "blocked"])
def test_the_folder_alone_is_enough(programs, model, name):
    """In a process that cannot import the project, and in one that has none of what only training needs."""
    process, result = programs[name]
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    got, ids = json.loads(result.read_text()), torch.arange(1, 13).unsqueeze(0)
    torch.testing.assert_close(torch.tensor(got["logits"]), model(ids).logits, rtol=1e-4, atol=1e-5)
    assert got["tokens"] == model.generate(ids, max_new_tokens=8, do_sample=False).tolist()
    assert (got["class"], got["tied"], got["loaded"]) == ("GooseForCausalLM", True, [])
