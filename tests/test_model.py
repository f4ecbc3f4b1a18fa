"""The model: configuration, start values, saving, causality, padding, state, generation."""
import json

import pytest
import torch
import torch.nn.functional as F

import asnn_common as asnn
import conftest

V = 50
SHAPE = {"vocab_size": V, "d_model": 32, "n_layer": 3, "n_positions": 24, "pad_token_id": 0}
STUDENTS = {
    "vector": {"granularity": "channel"},
    "mixed_fixed": {"threshold": "mixed_fixed", "spike_kind": "integer:2"},
    "project_first": {"output_order": "project_first", "spike_kind": "binary"},
    "matrix": {"state_kind": "matrix", "head_dim": 8, "threshold": "mixed_fixed"},
    "delta": {"state_kind": "delta", "head_dim": 8, "projection_bias": True},
    "vector at all sites": {"spike_sites": asnn.SITES},
    "matrix at all sites": {"state_kind": "matrix", "head_dim": 16, "spike_sites": asnn.SITES,
                            "encoder_kind": "integer:3"},
    "delta at all sites": {"state_kind": "delta", "head_dim": 32, "spike_sites": asnn.SITES,
                           "granularity": "channel"},
    "delta, two trains": {"state_kind": "delta", "head_dim": 8, "spike_sites": asnn.SITES,
                          "spike_steps": 2, "rotated_sites": ("ffn_hidden", "mix_in"),
                          "decay": "token", "decay_rank": 5},
    "matrix, some": {"state_kind": "matrix", "head_dim": 8, "spike_sites": asnn.SITES[:-1],
                     "spike_steps": {"v": 2, "ffn_in": 2}, "decay": "token", "decay_rank": 3}}
FEW = ("vector", "matrix", "delta at all sites")
EVERY = pytest.mark.parametrize("student", STUDENTS)
SOME = pytest.mark.parametrize("student", FEW)
PADS = (0, 3, 8)


def build(student="vector", shake=True, **options):
    """A model whose parameters and channel means are all away from their start values."""
    torch.manual_seed(0)
    config = asnn.GooseConfig(**{**SHAPE, **STUDENTS[student], **options})
    model = asnn.GooseForCausalLM(config).eval()
    if shake:
        conftest.shake(model)
        for module in model.modules():
            if isinstance(module, asnn.TernarySpike):
                module.calibrate(torch.randn(9, 32) * torch.linspace(0.5, 2, 32))
    return model


@pytest.fixture(scope="module")
def models():
    """models(student): one of each, built once."""
    made = {}

    def get(student="vector"):
        made[student] = made.get(student) or build(student)
        return made[student]
    return get


@pytest.fixture
def model(models):
    return models()


@pytest.fixture
def ids():
    return torch.randint(1, V, (3, 12))


def left_padded(ids, pads=PADS):
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return ids, mask


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def same_state(a, b):
    assert torch.equal(a.position, b.position) and a.length == b.length
    for one, other in zip(a.layers, b.layers, strict=True):
        close(one.S, other.S)
        close(one.shift, other.shift)


# ---- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("options, sentence", [
    ({"d_modle": 64}, "GooseConfig.*d_modle.*d_model"),
    ({"alpha_init": 1.0}, "GooseConfig.*alpha_init"),
    ({"d_model": 0}, "d_model is 0; allowed: a whole number from 1"),
    ({"n_layer": True}, "n_layer is True; allowed: a whole number from 1"),
    ({"vocab_size": 50.0}, "vocab_size is 50.0; allowed: a whole number from 1"),
    ({"ffn_width": 0}, "ffn_width is 0; allowed: a whole number from 1"),
    ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan; allowed: a number above 0"),
    ({"projection_bias": "yes"}, "projection_bias is 'yes'; allowed: True or False"),
    ({"activation": "magic"}, "activation is 'magic'; allowed: .*silu"),
    ({"state_kind": "tensor"}, "state_kind is 'tensor'; allowed: vector, matrix, delta"),
    ({"threshold": "mixed"}, "threshold is 'mixed'; allowed: token, mixed_fixed"),
    ({"spike_kind": "integer:128"}, "spike_kind is 'integer:128'; allowed: dense, binary, ternary"),
    ({"encoder_kind": "dense"}, "encoder_kind is 'dense'; allowed: ternary, integer:k"),
    ({"spike_steps": 3}, "spike_steps is 3; allowed: 1, 2 or {site: 1 or 2} of k, v, mix_in"),
    ({"spike_steps": {"q": 2}}, "spike_steps is {'q': 2}; allowed"),
    ({"rotated_sites": ["ffn_in"]}, "rotated_sites is .*; allowed: spike sites before a Linear"),
    ({"decay": "token"}, "decay is 'token'; allowed: constant for state vector"),
    ({"decay_rank": 0}, "decay_rank is 0; allowed: a whole number from 1"),
    ({"spike_sites": ["k"]}, "spike_sites is .*; allowed: 'k', 'v' and any of mix_in"),
    ({"spike_sites": "kv"}, "spike_sites is 'kv'; allowed"),
    ({"spike_sites": asnn.SITES, "output_order": "project_first"}, "gate_first with the spike"),
    ({"state_kind": "matrix", "head_dim": 7}, "head_dim is 7; allowed: a divisor of d_model = 32"),
    ({"state_kind": "delta", "recurrence": "cumsum"}, "recurrence is 'cumsum'; allowed: chunked"),
    ({"state_kind": "delta", "output_order": "project_first"}, "allowed: gate_first for delta")])
def test_wrong_values_are_refused_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        asnn.GooseForCausalLM(asnn.GooseConfig(**{**SHAPE, "head_dim": 8, **options}))


def test_a_config_survives_json_and_one_of_before_version_18_is_read(tmp_path):
    config = asnn.GooseConfig(**SHAPE, head_dim=8, spike_sites=("v", "head_in", "k"))
    assert config.spike_sites == ["k", "v", "head_in"] and config.ffn_width == 128
    assert config.hidden_size == 32 and config.num_hidden_layers == 3
    config.save_pretrained(tmp_path)
    assert asnn.GooseConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    old = json.loads((tmp_path / "config.json").read_text())
    old.update(head_width=old.pop("head_dim"), alpha_init=1.0, amplitude_init=1.0)
    assert asnn.GooseConfig.from_dict(old).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="alpha_init is 0.77; allowed: 1.0"):
        asnn.GooseConfig.from_dict({**old, "alpha_init": 0.77})


# ---- start values --------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["vector", "matrix", "delta"])
def test_post_init_leaves_the_documented_start_values(state):
    model = build(shake=False, state_kind=state, head_dim=8, projection_bias=True,
                  initializer_range=0.05, threshold="mixed_fixed", spike_sites=asnn.SITES)
    spread = torch.linspace(0.5, 6.0, 32)
    if state != "vector":
        spread = torch.linspace(0.5, 6.0, 8).repeat(4)
    for block in model.goose.blocks:
        mix = block.time_mix
        assert torch.equal(mix.decay_logit, spread)
        for m in (mix.mix_k, mix.mix_v, mix.mix_r, *([mix.mix_g] if state != "vector" else [])):
            assert torch.equal(m, torch.linspace(1.0, 0.5, 32))
        for linear in (mix.key, mix.value, mix.receptance, block.ffn.up):
            assert linear.weight.std().item() == pytest.approx(0.05, rel=0.15)
        for linear in (mix.output, block.ffn.down):
            assert linear.weight.std().item() == pytest.approx(0.05 / 6**0.5, rel=0.15)
        assert not any(linear.bias.any() for linear in (mix.key, mix.output, block.ffn.down))
        if state != "vector":
            assert mix.gate.bias.unique().tolist() == mix.norm.weight.unique().tolist() == [1.0]
            assert mix.gate.weight.std().item() == pytest.approx(0.05, rel=0.15)
        if state == "delta":
            assert not mix.beta.weight.any() and not mix.beta.bias.any()
    for name, module in asnn.spike_modules(model).items():
        for key, tensor in module.state_dict().items():
            assert tensor.unique().tolist() == [0.0 if key == "centre" else 1.0], name
    assert model.lm_head.weight.std().item() == pytest.approx(0.05, rel=0.15)


def test_published_starts_forget_at_once_and_leave_the_last_layer_blind():
    model = build(shake=False, decay_init="published", mix_init="published")
    for i, block in enumerate(model.goose.blocks):
        decay = torch.sigmoid(block.time_mix.decay_logit).unique().tolist()
        assert decay == pytest.approx([0.378], abs=1e-3)
        for m in (block.time_mix.mix_k, block.time_mix.mix_v, block.time_mix.mix_r):
            assert m.unique().tolist() == pytest.approx([1 - i / 2])


# ---- saving and loading --------------------------------------------------------------------------


@EVERY
def test_every_parameter_survives_saving(models, ids, tmp_path, student):
    model = models(student)
    model.save_pretrained(tmp_path)
    loaded = asnn.GooseForCausalLM.from_pretrained(tmp_path)
    fresh = build(student, shake=False).state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
        assert not torch.equal(value, fresh.pop(name)), name  # it was away from its start value
    assert not fresh and not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.content_hash() == model.content_hash()


def test_the_content_hash_is_of_weights_and_spikes():
    model = build()
    name = model.content_hash()
    assert len(name) == 16 and build().content_hash() == name == model.double().content_hash()
    model.float().lm_head = torch.nn.Linear(32, V, bias=False)
    assert model.content_hash() == name  # a tied head is but another name of the embeddings
    model.config.threshold = "mixed_fixed"
    assert model.content_hash() != name
    model.config.threshold = "token"
    with torch.no_grad():
        model.goose.ln_f.bias[3] += 1e-3
    assert model.content_hash() != name


def test_what_a_checkpoint_lacks_gets_its_start_value_and_the_rest_is_kept(models, tmp_path):
    model = models("delta at all sites")
    lacking = ("decay_logit", "mix_g", "gate.bias", "beta.weight", "mix_out.alpha", "norm.weight",
               "ffn_in.centre", "spike_v.amplitude", "output.weight")
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith(lacking)}
    assert len(weights) == len(model.state_dict()) - 3 * len(lacking)
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded = asnn.GooseForCausalLM.from_pretrained(tmp_path)
    fresh = build("delta at all sites", shake=False)
    for name, p in loaded.named_parameters():
        if name.endswith("output.weight"):
            assert p.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.15)
        else:
            source = fresh if name.endswith(lacking) else model
            assert torch.equal(p, source.get_parameter(name)), name


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_tensor_and_count_once(tmp_path, tied):
    model = build(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = asnn.GooseForCausalLM.from_pretrained(tmp_path)
    with torch.device("meta"):
        nowhere = asnn.GooseForCausalLM(model.config)
        nowhere.lm_head = torch.nn.Linear(32, V, bias=False)  # 5.0 ties nothing here
    count = sum(p.numel() for p in model.goose.parameters()) + (0 if tied else V * 32)
    for one in (model, loaded):
        assert (one.lm_head.weight is one.goose.embeddings.weight) == tied
    assert model.num_parameters() == loaded.num_parameters() == nowhere.num_parameters() == count
    assert model.num_parameters(exclude_embeddings=True) == count - (V + 24) * 32
    model.goose.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == (0 if tied else V * 32)


# ---- outputs -------------------------------------------------------------------------------------


def test_labels_give_the_shifted_cross_entropy_of_gpt2(model, ids):
    labels = ids.clone()
    labels[0, :5], labels[2, 7] = -100, -100
    out = model(ids, labels=labels)
    log_p = out.logits[:, :-1].log_softmax(-1)
    terms = [-log_p[b, t, labels[b, t + 1]] for b in range(3) for t in range(11)
             if labels[b, t + 1] != -100]
    assert len(terms) == 33 - 4 - 1
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())


def test_hidden_states_follow_gpt2(model, ids):
    ours, goose = model(ids, output_hidden_states=True).hidden_states, model.goose
    assert [h.shape for h in ours] == 4 * [(3, 12, 32)]
    assert torch.equal(ours[0], goose.embeddings(ids) + goose.positions(torch.arange(12)))
    for i in range(2):
        assert torch.equal(ours[i + 1], goose.blocks[i](ours[i])[0])
    assert torch.equal(ours[3], goose.ln_f(goose.blocks[2](ours[2])[0]))
    assert torch.equal(ours[3], goose(ids).last_hidden_state)
    assert torch.equal(model.lm_head(ours[3]), model(ids).logits)
    assert model(ids).hidden_states is None
    assert len(build(output_hidden_states=True)(ids).hidden_states) == 4


def test_what_can_be_asked_of_a_forward_pass(model, ids):
    out = model(ids, labels=ids)
    loss, logits, state = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)
    same_state(state, out.state)
    hidden, state = model.goose(ids, return_dict=False)
    assert torch.equal(hidden, model.goose(ids).last_hidden_state)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, out.logits)
    some = torch.tensor([2, 5])
    for keep, index in ((0, slice(None)), (1, [-1]), (4, slice(-4, None)), (some, some)):
        close(model(ids, logits_to_keep=keep).logits, out.logits[:, index])
    assert out.state is not None and model(ids, use_cache=False).state is None
    assert build().train()(ids).state is None and build(use_cache=False)(ids).state is None
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds, and not both"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 1, 12, 12\); allowed: \(B, T\)"):
        model(ids, attention_mask=torch.ones(3, 1, 12, 12))


@SOME
def test_positions_continue_past_n_positions_with_the_last_one(models, student):
    model, ids, state, logits = models(student), torch.randint(1, V, (2, 60)), None, []
    for part in ids.split(25, 1):
        out = model(part, state=state)
        state, logits = out.state, [*logits, out.logits]
    close(torch.cat(logits, 1), model(ids).logits)
    assert state.position.tolist() == [60, 60] and logits[-1].isfinite().all()
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (2, 65)


# ---- causality, gradients ------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_a_changed_token_changes_nothing_before_it_nor_in_other_sequences(models, ids, student,
                                                                          training):
    model = models(student).train(training)
    before = model(ids).logits
    for t in (0, 5, 11):
        changed = ids.clone()
        changed[1, t] = ids[1, t] % (V - 1) + 1
        after = model(changed).logits
        assert torch.equal(before[1, :t], after[1, :t])
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert (before[1, t:] != after[1, t:]).any(-1).all()
    model.eval()


@EVERY
def test_gradients_reach_every_parameter_and_none_comes_from_the_future(ids, student):
    model = build(student).train()
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[1, 6].sum().backward()
    reached = embeds.grad.abs().sum(-1) > 0
    assert reached[1, :7].all() and not reached[1, 7:].any() and not reached[[0, 2]].any()


# ---- state and padding ---------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("cuts", [(1,), (5,), (3, 4, 9), tuple(range(1, 12))])
def test_prefill_by_chunks_equals_one_pass(models, ids, student, cuts):
    model, state, logits, start = models(student), None, [], 0
    for end in (*cuts, 12):
        out = model(ids[:, start:end], state=state)
        state, start, logits = out.state, end, [*logits, out.logits]
    close(torch.cat(logits, 1), model(ids).logits)
    same_state(state, model(ids).state)


@EVERY
@pytest.mark.parametrize("full_mask", [True, False])
def test_a_left_padded_batch_equals_the_singles_also_in_chunks(models, ids, student, full_mask):
    model, (padded, mask) = models(student), left_padded(ids)
    whole = model(padded, attention_mask=mask)
    first = model(padded[:, :5], attention_mask=mask[:, :5])  # the last row's is padding throughout
    rest = mask if full_mask else mask[:, 5:]
    second = model(padded[:, 5:], attention_mask=rest, state=first.state)
    real, other = mask.bool(), torch.where(mask.bool(), padded, 17)  # at pads, anything
    assert torch.equal(model(other, attention_mask=mask).logits[real], whole.logits[real])
    same_state(second.state, whole.state)
    assert second.state.position.tolist() == [12, 9, 4] and second.state.length == 12
    for row, pad in enumerate(PADS):
        single = model(ids[row:row + 1, pad:])
        close(whole.logits[row, pad:], single.logits[0])
        close(torch.cat((first.logits, second.logits), 1)[row, pad:], single.logits[0])
        close(whole.state.layers[-1].S[row], single.state.layers[-1].S[0])


def test_padding_after_a_token_needs_no_state(model, ids):
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    for given in ({}, {"use_cache": False}):  # an evaluation batch asks for no state and gets none
        out = model(ids, attention_mask=mask, **given)
        assert out.state is None
        close(out.logits[1, :7], model(ids[1:2, :7]).logits[0])
        close(out.logits[0], model(ids[:1]).logits[0])
    sentence = "attention_mask has padding after a token; .*on the left.*use_cache=False"
    with pytest.raises(ValueError, match=sentence):
        model(ids, attention_mask=mask, use_cache=True)
    left = torch.ones(3, 4, dtype=torch.long)
    left[1, :2] = 0  # on the left of these tokens, but after those of the state
    for mask in (left, torch.cat((torch.ones_like(ids), left), 1)):
        with pytest.raises(ValueError, match=sentence):
            model(ids[:, :4], attention_mask=mask, state=model(ids).state)


@pytest.mark.parametrize("student, S", [("vector", (3, 32)), ("matrix", (3, 4, 8, 8)),
                                        ("delta at all sites", (3, 1, 32, 32))])
def test_a_state_has_one_size_and_can_be_reordered(models, ids, student, S):
    model = models(student)
    for state in (model(ids[:, :3]).state, model(ids.repeat(1, 5)).state):
        for layer in state.layers:
            assert layer.S.shape == S and layer.shift.shape == (3, 32)
            for x in layer:  # a view would keep all tokens alive
                assert x.untyped_storage().nbytes() == 4 * x.numel()
    index = torch.tensor([2, 2, 0, 1])
    same_state(model(ids).state.reorder(index), model(ids[index]).state)


@EVERY
def test_chunked_is_reference_and_cumsum_is_neither(models, student):
    long = torch.randint(1, V, (2, 48))
    reference = build(student, recurrence="reference")(long).logits
    close(models(student)(long).logits, reference)
    if "matrix" not in student and "delta" not in student:
        wrong = build(student, recurrence="cumsum")(long).logits[:, 30:]
        assert (wrong - reference[:, 30:]).abs().max() > 0.1


@pytest.mark.parametrize("student", ["vector", "project_first", "matrix", "delta"])
def test_a_layer_is_the_rule_as_it_is_written(student):
    """One layer by hand, from its own projections: token shift, keys scaled, heads apart, gates."""
    mix, x = build(student).goose.blocks[1].time_mix, torch.randn(2, 9, 32)
    before = torch.cat((torch.zeros(2, 1, 32), x[:, :-1]), 1)
    k_in, v_in, r_in = (x * m + before * (1 - m) for m in (mix.mix_k, mix.mix_v, mix.mix_r))
    k, v, r = mix.spike_k(mix.key(k_in)), mix.spike_v(mix.value(v_in)), mix.receptance(r_in)
    if student in ("vector", "project_first"):
        S, w, states, r = torch.zeros(2, 32), torch.sigmoid(mix.decay_logit), [], torch.sigmoid(r)
        for t in range(9):
            S = w * S + k[:, t] * v[:, t]
            states.append(S)
        S = torch.stack(states, 1)
        return close(mix(x)[0], mix.output(r * S) if student == "vector" else r * mix.output(S))
    w, out = torch.sigmoid(mix.decay_logit).clamp_min(asnn.MIN_DECAY), []
    for head in range(4):
        part, S = slice(8 * head, 8 * head + 8), torch.zeros(2, 8, 8)
        for t in range(9):
            key, value = k[:, t, part], v[:, t, part]
            if student == "matrix":
                key = key * (1 - torch.sigmoid(mix.decay_logit[part]).square()).sqrt()
            else:
                key = key / (key.square().sum(-1, keepdim=True) + 1).sqrt()
                beta = torch.sigmoid(mix.beta(k_in[:, t]))[:, head:head + 1]
                value = beta * (value - torch.einsum("bn,bnm->bm", key, S))
            S = w[part].unsqueeze(-1) * S + torch.einsum("bn,bm->bnm", key, value)
            y = torch.einsum("bn,bnm->bm", r[:, t, part], S)
            variance = y.var(-1, keepdim=True, unbiased=False) + mix.norm.eps
            y = (y - y.mean(-1, keepdim=True)) / variance.sqrt()
            out.append(y * mix.norm.weight[part] + mix.norm.bias[part])
    out = torch.stack(out).view(4, 9, 2, 8).permute(2, 1, 0, 3).reshape(2, 9, 32)
    gate = F.silu(mix.gate(x * mix.mix_g + before * (1 - mix.mix_g)))
    close(mix(x)[0], mix.output(out * gate))


@EVERY
def test_half_precision_is_close_and_keeps_the_state_in_fp32(ids, student):
    """Spikes near their threshold may flip, so that the dense twin is what can be compared."""
    exact, (padded, mask) = build(student, spike_kind="dense")(ids).logits, left_padded(ids)
    for dtype, bound in ((torch.float16, 0.01), (torch.bfloat16, 0.08)):
        logits = build(student, spike_kind="dense").to(dtype)(ids).logits.float()
        assert (logits - exact).norm() / exact.norm() < bound
        model = build(student).to(dtype)
        out = model(padded, attention_mask=mask, labels=ids)
        assert out.logits.dtype == dtype and out.logits.isfinite().all() and out.loss.isfinite()
        assert {layer.S.dtype for layer in out.state.layers} == {torch.float32}
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (3, 14)


# ---- spike sites ---------------------------------------------------------------------------------


@pytest.mark.parametrize("student, inputs", [("vector", "kvr"), ("matrix", "kvrg"),
                                             ("delta", "kvrg")])
def test_all_sites_feed_every_linear_with_a_code_in_the_listed_order(ids, student, inputs):
    """What a Linear sees is what an encoder made of spikes; the head's input too."""
    model, met, seen, codes = build(student, spike_sites=asnn.SITES), [], {}, []
    for name, module in asnn.spike_modules(model).items():
        module.spikes.register_forward_hook(lambda _m, _a, _o, name=name: met.append(name))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _m, a, name=name: seen.update({name: a[0]}))
        if isinstance(module, asnn.SpikeEncoder):
            module.register_forward_hook(lambda _m, _a, out: codes.append(out))
    model(ids)
    layer = [*(f"mix_in.{name}" for name in inputs), "k", "v", "mix_out", "ffn_in", "ffn_hidden"]
    assert met == list(asnn.spike_modules(model)) == [
        *(f"{i}.{name}" for i in range(3) for name in layer), "head_in"]
    assert len(seen) == 1 + 3 * {"vector": 6, "matrix": 7, "delta": 8}[student]
    for name, given in seen.items():
        assert any(torch.equal(given, code) for code in codes), name


@pytest.mark.parametrize("site", asnn.SITES[2:])
def test_each_site_brings_its_own_encoders(site):
    modules = asnn.spike_modules(build("delta", spike_sites=("k", "v", site)))
    names = [name for name, m in modules.items() if isinstance(m, asnn.SpikeEncoder)]
    assert len(names) == {"mix_in": 12, "head_in": 1}.get(site, 3)
    assert all(site in name for name in names)


def test_the_dense_twin_of_a_student_with_encoders_passes_everything_on(ids):
    twin = build(spike_kind="dense", spike_sites=asnn.SITES)
    plain = build(spike_kind="dense")
    plain.load_state_dict({k: v for k, v in twin.state_dict().items() if k in plain.state_dict()})
    assert torch.equal(twin(ids).logits, plain(ids).logits)


# ---- generation ----------------------------------------------------------------------------------

SETTINGS = {"greedy": {}, "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
            "beams": {"num_beams": 3}, "several": {"num_beams": 3, "num_return_sequences": 2}}


def generate(model, ids, **options):
    torch.manual_seed(5)
    return model.generate(ids, **{"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0,
                                  **options})


@SOME
@pytest.mark.parametrize("setting", SETTINGS)
def test_generation_with_the_cache_equals_without(models, ids, student, setting):
    model, options, lengths = models(student), SETTINGS[setting], []
    hook = model.register_forward_pre_hook(
        lambda _m, _a, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True)
    cached = generate(model, ids, use_cache=True, **options)
    hook.remove()
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))
    assert cached.shape == (3 * options.get("num_return_sequences", 1), 22)
    assert cached[:, 12:].unique().numel() > 3  # a constant would hide a broken cache
    assert lengths == [12] + 9 * [1]


@SOME
@pytest.mark.parametrize("setting", ["greedy", "beams"])
def test_left_padded_generation_equals_the_singles(models, ids, student, setting):
    model, (padded, mask) = models(student), left_padded(ids)
    for use_cache in (True, False):
        given = {"attention_mask": mask, "use_cache": use_cache, **SETTINGS[setting]}
        batch = generate(model, padded, **given)
        for row, pad in enumerate(PADS):
            single = generate(model, ids[row:row + 1, pad:], **SETTINGS[setting])
            assert torch.equal(batch[row, pad:], single[0])


def plain_greedy(model, ids, steps, change=lambda _seen, scores: scores):
    """Greedy decoding by full forward passes; change(tokens so far, scores (B, V)) -> scores."""
    with torch.no_grad():
        for _ in range(steps):
            scores = change(ids, model(ids).logits[:, -1])
            ids = torch.cat((ids, scores.argmax(-1, keepdim=True)), 1)
    return ids


@SOME
def test_generation_is_the_argmax_and_goes_on_from_a_given_state(models, ids, student):
    model, (padded, mask) = models(student), left_padded(ids, (0, 3, 5))
    expected = plain_greedy(model, ids, 10)
    assert torch.equal(generate(model, ids), expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(generate(model, None, inputs_embeds=embeds), expected[:, 12:])
    assert torch.equal(generate(model, ids, state=model(ids[:, :7]).state), expected)
    both = torch.cat((expected, ids[:, :4]), 1)  # a second turn
    assert torch.equal(generate(model, both, state=model(expected).state), generate(model, both))
    expected = generate(model, padded, attention_mask=mask)
    state = model(padded[:, :7], attention_mask=mask[:, :7]).state
    given = {"attention_mask": mask, "state": state}
    assert torch.equal(generate(model, padded, **given), expected)
    assert torch.equal(generate(model, ids[:, 7:], **given), expected[:, 7:])
    with pytest.raises(ValueError, match="The state has seen 7 tokens and no new one follows"):
        generate(model, ids[:, 7:], state=model(ids[:, :7]).state)
