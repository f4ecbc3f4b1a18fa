"""Starting from the teacher: what of its weights is taken and where it goes, calibration, staged distillation."""
import copy
import re

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import asnn_common as asnn

V, D, LAYERS = 40, 16, 4
STATES = ("vector", "matrix", "delta")


def gpt2(**options):
    """A GPT-2 with no parameter at its start value."""
    torch.manual_seed(1)
    shape = {"vocab_size": V, "n_positions": 20, "n_embd": D, "n_layer": LAYERS, "n_head": 2, "attn_pdrop": 0.0,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**{**shape, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def model():
    return gpt2()


def goose(n_layer=2, **options):
    torch.manual_seed(2)
    values = {"vocab_size": V, "d_model": D, "n_layer": n_layer, "n_positions": 12, "head_width": 8,
              "projection_bias": True, "activation": "gelu_pytorch_tanh", **options}
    return asnn.GooseForCausalLM(asnn.GooseConfig(**values)).eval()


def silence(linear):
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()


def ids(T=12, B=3):
    return torch.randint(0, V, (B, T))


# ---- transfer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("layers", [None, (3, 0)])
def test_the_table_says_exactly_what_was_copied(model, state, layers):
    student = goose(state_kind=state)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    theirs = {name: p.detach().clone() for name, p in model.named_parameters()}
    table = asnn.transfer_weights(student, model, layers, output_scale=0.5)
    assert [row["student"] for row in table] == [name for name, _ in student.goose.named_parameters()]
    assert {row["transferred"] for row in table} == {"yes", "no, starts fresh"}
    for row in table:
        p = student.goose.get_parameter(row["student"])
        kept = torch.equal(p, before["goose." + row["student"]])
        assert row["shape"] == str(tuple(p.shape))
        assert kept == (row["transferred"] != "yes") == (row["teacher"] == "-"), row
    fresh = {re.sub(r"blocks\.\d+\.", "", row["student"]) for row in table if row["transferred"] != "yes"}
    vector = {f"time_mix.{name}" for name in ("mix_k", "mix_v", "mix_r", "decay_logit", *(
        f"spike_{site}.{p}" for site in "kv" for p in ("alpha", "amplitude")))}
    gated = {f"time_mix.{name}" for name in ("mix_g", "gate.weight", "gate.bias", "norm.weight", "norm.bias")}
    beta = {"time_mix.beta.weight", "time_mix.beta.bias"}
    assert fresh == vector | (gated if state != "vector" else set()) | (beta if state == "delta" else set())
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("layers, taken", [(None, (1, 3)), ((0, 1), (0, 1)), ([3, 3], (3, 3))])
def test_every_weight_goes_to_its_place(model, layers, taken):
    student = goose(state_kind="delta")
    table = asnn.transfer_weights(student, model, layers, output_scale=0.25)
    ours, theirs = student.goose, model.transformer
    pairs = [(ours.embeddings.weight, theirs.wte.weight), (ours.positions.weight, theirs.wpe.weight[:12]),
             (ours.ln_f.weight, theirs.ln_f.weight), (ours.ln_f.bias, theirs.ln_f.bias)]
    for block, t in zip(ours.blocks, taken):
        mix, source = block.time_mix, theirs.h[t]
        q, k, v = source.attn.c_attn.weight.split(D, 1)  # (in, out)
        q_bias, k_bias, v_bias = source.attn.c_attn.bias.split(D)
        pairs += [(mix.receptance.weight, q.t()), (mix.key.weight, k.t()), (mix.value.weight, v.t()),
                  (mix.receptance.bias, q_bias), (mix.key.bias, k_bias), (mix.value.bias, v_bias),
                  (mix.output.weight, 0.25 * source.attn.c_proj.weight.t()), (mix.output.bias, source.attn.c_proj.bias),
                  (block.ffn.up.weight, source.mlp.c_fc.weight.t()), (block.ffn.up.bias, source.mlp.c_fc.bias),
                  (block.ffn.down.weight, source.mlp.c_proj.weight.t()), (block.ffn.down.bias, source.mlp.c_proj.bias)]
        pairs += [(getattr(getattr(block, ln), kind), getattr(getattr(source, ln), kind))
                  for ln in ("ln_1", "ln_2") for kind in ("weight", "bias")]
    for got, expected in pairs:
        assert torch.equal(got, expected)
    assert len(pairs) == sum(row["transferred"] == "yes" for row in table)
    assert student.lm_head.weight is ours.embeddings.weight
    labels = {row["student"]: row["teacher"] for row in table}
    assert labels["positions.weight"] == "wpe.weight[:12]"
    assert labels["blocks.1.time_mix.key.weight"].startswith(f"h.{taken[1]}.attn.c_attn.weight")
    assert labels["blocks.0.time_mix.output.weight"] == f"h.{taken[0]}.attn.c_proj.weight * 0.25"
    assert labels["blocks.0.time_mix.output.bias"] == f"h.{taken[0]}.attn.c_proj.bias"


def test_positions_the_teacher_lacks_start_fresh(model):
    student = goose(n_positions=30)
    before = student.goose.positions.weight.detach().clone()
    asnn.transfer_weights(student, model)
    assert torch.equal(student.goose.positions.weight[:20], model.transformer.wpe.weight)
    assert torch.equal(student.goose.positions.weight[20:], before[20:])


def test_the_table_names_the_biases_that_a_student_without_them_cannot_take(model):
    student = goose(projection_bias=False)
    table = asnn.transfer_weights(student, model)
    left = [row for row in table if row["student"] == "-"]
    assert {row["teacher"] for row in left} == {
        *(f"h.{t}.attn.c_attn.bias, {part}" for t in (1, 3) for part in "rkv"),
        *(f"h.{t}.attn.c_proj.bias" for t in (1, 3))}
    assert {row["transferred"] for row in left} == {"no, no such parameter"}
    assert {row["shape"] for row in left} == {str((D,))}
    assert len(table) - len(left) == len(list(student.goose.parameters()))


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_has_a_row_for_every_parameter_and_the_head_is_the_teachers(model, tied):
    student = goose(tie_word_embeddings=tied)
    rows = {row["student"] for row in asnn.transfer_weights(student, model)}
    assert rows == {name.removeprefix("goose.") for name, _ in student.named_parameters()}
    assert torch.equal(student.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("options, theirs, ours", [
    ({"d_model": 8}, (V, D), (V, 8)), ({"vocab_size": V + 3}, (V, D), (V + 3, D)),
    ({"ffn_width": 40}, (64, D), (40, D))])
def test_weights_that_do_not_fit_are_refused_with_both_shapes_and_nothing_is_changed(model, options, theirs, ours):
    student = goose(**options)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    with pytest.raises(ValueError, match=re.escape(f"shape {theirs}") + ".* of the student " + re.escape(f"{ours};")):
        asnn.transfer_weights(student, model)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


@pytest.mark.parametrize("layers", [(0,), (0, 1, 2), (0, 4), (-1, 2)])
def test_layers_that_do_not_exist_or_are_not_as_many_are_refused(model, layers):
    student = goose()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    message = f"transfer_layers is {layers}; allowed: 2 layers, each from 0 to 3"
    with pytest.raises(ValueError, match=re.escape(message)):
        asnn.transfer_weights(student, model, layers)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=32, num_hidden_layers=2,
                                        num_attention_heads=2, bos_token_id=0, eos_token_id=0))


@pytest.mark.parametrize("teacher, name", [(llama, "LlamaForCausalLM"), (goose, "GooseForCausalLM")])
def test_weights_of_another_architecture_are_refused(teacher, name):
    with pytest.raises(ValueError, match=f"teacher is a {name}; weights are transferred from GPT-2 models only"):
        asnn.transfer_weights(goose(), teacher())


def test_a_recipe_with_weights_refuses_another_architecture_in_the_same_words():
    teacher = asnn.Teacher(llama(), None, "llama")
    with pytest.raises(ValueError, match="weights are transferred from GPT-2 models only"):
        asnn.build_student(asnn.match_teacher(made_recipe(), teacher)[0], teacher)


@pytest.mark.parametrize("student, teacher, ends", [(3, 6, (1, 3, 5)), (5, 12, (2, 4, 7, 9, 11)), (4, 4, (0, 1, 2, 3)),
                                                    (1, 6, (5,)), (2, 3, (1, 2))])
def test_span_ends(student, teacher, ends):
    assert asnn.span_ends(student, teacher) == ends


def test_a_student_deeper_than_its_teacher_is_refused(model):
    with pytest.raises(ValueError, match="n_layer is 7; allowed: at most the teacher's 6 layers"):
        asnn.span_ends(7, 6)
    with pytest.raises(ValueError, match="n_layer is 5; allowed: at most the teacher's 4 layers"):
        asnn.transfer_weights(goose(5), model)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("n_layer, layers", [(4, None), (2, None), (3, (0, 2, 3))])
def test_without_its_recurrent_branch_a_student_is_the_teacher_without_attention(model, n_layer, layers, state):
    student = goose(n_layer, state_kind=state)
    asnn.transfer_weights(student, model, layers)
    taken = asnn.span_ends(n_layer, LAYERS) if layers is None else layers
    rest = copy.deepcopy(model)
    rest.transformer.h = torch.nn.ModuleList(rest.transformer.h[t] for t in taken)
    for block, theirs in zip(student.goose.blocks, rest.transformer.h):
        silence(block.time_mix.output)
        silence(theirs.attn.c_proj)
    tokens = ids()
    got, expected = student(tokens).logits, rest(tokens, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (expected - model(tokens).logits).abs().max() > 0.1  # the attention did something


@pytest.mark.parametrize("theirs, ours", [("gelu_new", "gelu_pytorch_tanh"), ("gelu_pytorch_tanh", "gelu_pytorch_tanh"),
                                          ("relu", "relu"), ("gelu", "gelu")])
def test_match_teacher_takes_the_activation_that_the_weights_were_trained_with(theirs, ours):
    teacher = asnn.Teacher(gpt2(activation_function=theirs), None, "random")
    recipe = made_recipe(activation="gelu_pytorch_tanh")
    matched, notes = asnn.match_teacher(recipe, teacher)
    assert matched.activation == ours
    assert ["activation is " + ours in note for note in notes] == ([True] if ours != recipe.activation else [])
    assert asnn.match_teacher(recipe.replace(weights_from_teacher=False), teacher)[0].activation == recipe.activation


# ---- building and calibrating --------------------------------------------------------------------


def made_recipe(name="v14.4", **overrides):
    values = {"d_model": D, "n_layer": 2, "head_width": 8, "seq_len": 12, "batch_size": 4, "distill_steps": 30,
              "align_steps": 0, "ce_start": 0, "anneal_steps": 0, "layer_map": ((0, 1), (1, 3)), "eval_every": 10**6,
              "patience": 10**6, **overrides}
    return asnn.get_recipe(name, **values)


@pytest.fixture
def teacher(model):
    return asnn.Teacher(model, None, "random")


def test_build_student_transfers_as_the_recipe_says(model, teacher):
    student = asnn.build_student(made_recipe(transfer_layers=(2, 3), output_scale=0.5), teacher)
    mix = student.goose.blocks[0].time_mix
    assert torch.equal(mix.output.weight, 0.5 * model.transformer.h[2].attn.c_proj.weight.t())
    fresh = asnn.build_student(made_recipe(weights_from_teacher=False), teacher)
    assert torch.equal(fresh.goose.embeddings.weight, model.transformer.wte.weight)
    assert not torch.equal(fresh.goose.blocks[0].ffn.up.bias, model.transformer.h[1].mlp.c_fc.bias)


def test_encoders_are_calibrated_one_after_the_other_on_what_reaches_them(teacher):
    tokens = ids(B=16)
    student = asnn.build_student(made_recipe("v14.4-sites"), teacher, calibration=tokens)
    encoders = {name: m for name, m in student.named_modules() if isinstance(m, asnn.SpikeEncoder)}
    assert len(encoders) == 2 * 7 and not any("head_in" in name for name in encoders)
    given = {}
    handles = [m.register_forward_pre_hook(lambda _m, args, name=name: given.update({name: args[0].detach()}))
               for name, m in encoders.items()]
    student(tokens)
    for handle in handles:
        handle.remove()
    for name, module in encoders.items():
        again = asnn.SpikeEncoder(module.alpha.numel())
        again.calibrate(given[name])
        for p, expected in zip(module.parameters(), again.parameters()):
            torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_calibration_counts_the_encoders_and_leaves_no_hook():
    student = goose(spike_sites=asnn.SITES)
    assert asnn.calibrate_encoders(student, ids()) == 2 * 6 + 1
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    student(ids())
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert asnn.calibrate_encoders(goose(spike_sites=asnn.SITES, spike_kind="dense"), ids()) == 0
    assert asnn.calibrate_encoders(goose(), ids()) == 0


def test_encoders_without_a_calibration_batch_are_refused(teacher):
    with pytest.raises(ValueError, match="calibration is None; allowed: a batch of token ids"):
        asnn.build_student(made_recipe("v14.4-sites"), teacher)
    dense = asnn.build_student(made_recipe("v14.4-sites", spike_kind="dense"), teacher)  # the twin needs none
    assert dense(ids()).logits.isfinite().all()


# ---- stages --------------------------------------------------------------------------------------


def distiller(model, name="v14.4", calibration=None, **overrides):
    recipe = made_recipe(name, **overrides)
    teacher = asnn.Teacher(model, None, "random")
    return asnn.Distiller(asnn.build_student(recipe, teacher, calibration=calibration), model, recipe).train()


def test_alignment_is_the_error_over_the_variance_of_what_the_span_adds(model):
    objective, tokens = distiller(model, align_steps=5), ids()
    hidden = [model.transformer.wte(tokens) + model.transformer.wpe(torch.arange(12))]
    for block in model.transformer.h:
        out = block(hidden[-1])
        hidden.append(out[0] if isinstance(out, tuple) else out)
    terms = []
    for block, (start, end) in zip(objective.student.goose.blocks, ((0, 2), (2, 4))):
        error = (block(hidden[start])[0] - hidden[end])[:, 1:].square().mean((0, 1))
        terms.append((error / (hidden[end] - hidden[start])[:, 1:].flatten(0, 1).var(0)).mean())
    loss, logged = objective(tokens, tokens, step=0)
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)
    assert set(logged) == {"align"} and torch.equal(logged["align"], loss.detach())


def test_alignment_is_zero_for_blocks_that_do_what_their_span_does(model):
    rest = copy.deepcopy(model)
    for block in rest.transformer.h:
        silence(block.attn.c_proj)
    objective = distiller(rest, n_layer=4, align_steps=5, layer_map=((0, 0),))
    for block in objective.student.goose.blocks:
        silence(block.time_mix.output)
    assert objective(ids(), ids(), step=0)[0] < 1e-9
    with torch.no_grad():
        objective.student.goose.blocks[2].ffn.down.bias += 0.1
    assert objective(ids(), ids(), step=0)[0] > 1e-4


@pytest.mark.parametrize("name", ["v14.4", "v14.4-sites", "v14.4-vector"])
def test_alignment_falls_and_leaves_what_is_outside_the_blocks_alone(model, name):
    tokens = ids(B=8)
    objective = distiller(model, name, tokens, align_steps=25, weights_from_teacher=False)
    outside = {n: p for n, p in objective.named_parameters() if ".blocks." not in n}
    before = {n: p.detach().clone() for n, p in outside.items()}
    optimizer, losses = torch.optim.Adam(objective.parameters(), lr=3e-3), []
    for step in range(20):
        optimizer.zero_grad()
        loss, _ = objective(tokens, tokens, step=step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert {f"student.goose.{n}.weight" for n in ("embeddings", "positions", "ln_f")} <= set(outside)
    assert losses[-1] < 0.7 * losses[0] and np.mean(losses[10:]) < np.mean(losses[:10])
    for n, p in outside.items():
        assert torch.equal(p, before[n]) and not p.grad.any(), n


def gradients(objective, tokens):
    objective.zero_grad()
    objective(tokens, tokens, step=0)[0].backward()
    return [{n: p.grad.clone() for n, p in block.named_parameters()} for block in objective.student.goose.blocks]


def test_the_gradient_of_a_block_comes_from_its_own_span_alone(model):
    theirs, tokens = copy.deepcopy(model), ids()
    objective = distiller(theirs, align_steps=5)
    first, second = gradients(objective, tokens)
    assert all(g.any() for g in (*first.values(), *second.values()))
    with torch.no_grad():
        objective.student.goose.blocks[0].ffn.down.weight.mul_(3.0)  # reaches no other block
    one, two = gradients(objective, tokens)
    assert not torch.equal(one["ffn.up.weight"], first["ffn.up.weight"])
    assert all(torch.equal(two[n], second[n]) for n in second)
    with torch.no_grad():
        theirs.transformer.h[3].mlp.c_proj.weight.mul_(3.0)  # the end of the second span
    again, other = gradients(objective, tokens)
    assert all(torch.equal(again[n], one[n]) for n in one)
    assert not torch.equal(other["ffn.up.weight"], two["ffn.up.weight"])


@pytest.mark.parametrize("name", ["v14.4", "v14.3", "v7"])  # and v14.3 learns a temperature, v7 projections
def test_every_trained_parameter_takes_part_in_the_alignment(model, name):
    """With weight zero where it is not aligned: several processes wait for the gradient of each."""
    objective = distiller(model, name, align_steps=5, estimator="clipped")
    objective(ids(), ids(), step=0)[0].backward()
    assert [n for n, p in objective.named_parameters() if p.grad is None] == []


def test_cross_entropy_joins_where_its_stage_begins(model):
    objective, tokens, labels = distiller(model, ce_weight=0.25, align_steps=2, ce_start=6), ids(), ids()
    for step in range(2, 10):
        loss, terms = objective(tokens, labels, step=step)
        assert float(terms["ce"]) > 1 and float(terms["kd"]) > 0
        expected = terms["kd"] + (0.25 * terms["ce"] if step >= 6 else 0.0)
        torch.testing.assert_close(loss.detach(), expected)
    assert set(objective(tokens, labels, step=1)[1]) == {"align"}


def test_fit_evaluates_where_a_stage_ends(model):
    objective = distiller(model, distill_steps=9, align_steps=3, ce_start=7, ce_weight=0.2)
    sampler = asnn.WindowSampler(np.arange(1000, dtype=np.uint16) % V, 12, 0)
    settings = asnn.FitConfig.from_recipe(objective.recipe, precision="fp32", log_every=1)
    log = asnn.fit(objective, sampler, settings, lambda: {"ppl": 5.0}).log
    assert [row["step"] for row in log if "val_ppl" in row] == [3, 7, 9]
    assert ["align" in row for row in log if "loss" in row] == [True] * 3 + [False] * 6


def test_spikes_are_annealed_in_as_the_steps_go_by(model):
    tokens = ids()
    objective = distiller(model, "v14.4-sites", tokens, anneal_steps=8)
    modules = list(asnn.spike_modules(objective.student).values())
    assert len(modules) == 2 * 9
    for step, share in ((0, 0.0), (2, 0.25), (8, 1.0), (20, 1.0)):
        objective(tokens, tokens, step=step)
        assert {m.share for m in modules} == {share}
    objective(tokens, tokens, step=0)
    trained = objective.student(tokens).logits
    with torch.no_grad():
        evaluated = objective.student.eval()(tokens).logits
    for module in modules:
        module.share = 1.0
    assert torch.equal(objective.student(tokens).logits, evaluated)  # evaluation sees spikes from the first step on
    assert not torch.allclose(trained, evaluated, atol=1e-3)


def test_without_annealing_there_are_spikes_from_the_first_step_on(model):
    objective = distiller(model)
    objective(ids(), ids(), step=0)
    assert {m.share for m in asnn.spike_modules(objective.student).values()} == {1.0}


@pytest.mark.parametrize("state", asnn.STATES)
@pytest.mark.parametrize("sites, fed", [(("k", "v"), set()), (("k", "v", "ffn_in"), {"ffn_in"}),
                                        (asnn.SITES, set(asnn.SITES[2:]))])
def test_products_count_every_weight_once_and_know_what_feeds_them(state, sites, fed):
    config = asnn.GooseConfig(vocab_size=40, d_model=16, n_layer=2, head_width=8, state_kind=state, spike_sites=sites)
    student = asnn.GooseForCausalLM(config)
    rows = asnn.matrix_products(student)
    linears = [m for m in asnn.transformer_blocks(student).modules() if isinstance(m, torch.nn.Linear)]
    assert sum(r["macs"] for r in rows if r["layers"] and r["site"]) == sum(m.weight.numel() for m in linears)
    assert {r["site"] for r in rows if r["fed"] and r["site"]} == fed
    states = [r for r in rows if not r["site"]]
    assert sum(r["macs"] for r in states) == {"vector": 0, "matrix": 2, "delta": 3}[state] * 2 * 16 * 8
    assert not any(r["fed"] for r in states if "r S" in r["product"])


@pytest.mark.parametrize("state", asnn.STATES)
def test_the_dense_twin_trains_nothing_that_gets_no_gradient(state):
    config = asnn.GooseConfig(vocab_size=40, d_model=16, n_layer=2, head_width=8, state_kind=state, spike_kind="dense",
                              spike_sites=asnn.SITES)
    student = asnn.GooseForCausalLM(config).train()
    student(torch.randint(0, 40, (2, 8)), labels=torch.randint(0, 40, (2, 8))).loss.backward()
    assert not [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]


def test_a_channel_that_never_fires_in_calibration_keeps_a_height():
    encoder = asnn.SpikeEncoder(4)
    x = torch.randn(64, 4)
    x[:, 2] = 1.0
    encoder.calibrate(x)
    assert bool((encoder.amplitude > 0).all())
