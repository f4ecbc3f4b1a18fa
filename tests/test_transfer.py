"""Starting from the teacher: what of its weights is taken and where it goes, building and
calibrating students, layerwise alignment."""
import re

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MptConfig, MptForCausalLM

import asnn_common as asnn
from test_training import same

V, D, LAYERS = 40, 16, 4


def gpt2(**options):
    """A GPT-2 with no parameter at its start value."""
    torch.manual_seed(1)
    shape = {"vocab_size": V, "n_positions": 20, "n_embd": D, "n_layer": LAYERS, "n_head": 2,
             "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0,
             "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**{**shape, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def mpt():
    return MptForCausalLM(MptConfig(vocab_size=V, d_model=D, n_layers=2, n_heads=2))


def goose(n_layer=2, **options):
    torch.manual_seed(2)
    values = {"vocab_size": V, "d_model": D, "n_layer": n_layer, "n_positions": 12, "head_dim": 8,
              "projection_bias": True, "activation": "gelu_pytorch_tanh", **options}
    return asnn.GooseForCausalLM(asnn.GooseConfig(**values)).eval()


@pytest.fixture(scope="module")
def model():
    return gpt2()


def made_task(model, name="v14.4", **overrides):
    """A task on random tokens."""
    tokens = {"train": np.random.default_rng(0).integers(0, V, 4000).astype(np.uint16)}
    values = {"d_model": D, "n_layer": 2, "head_dim": 8, "seq_len": 12, "batch_size": 16,
              "distill_steps": 30, "align_steps": 0, "layer_map": ((0, 1), (1, 3))}
    recipe = asnn.RECIPES[name].replace(**{**values, **overrides})
    return asnn.Task(recipe, [], None, {}, tokens, model, None, "random", {})


def silence(linear):
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()


def ids(T=12, B=3):
    return torch.randint(0, V, (B, T))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [
    {"state_kind": "vector"}, {"state_kind": "matrix", "tie_word_embeddings": False},
    {"state_kind": "delta", "projection_bias": False}])
def test_the_table_says_exactly_what_was_copied(model, options):
    student, theirs = goose(**options), parameters(model)
    before = parameters(student)
    table = asnn.transfer_weights(student, model, output_scale=0.5)
    rows = {row["student"]: row for row in table}
    assert {n.removeprefix("goose.") for n in before} == rows.keys() - {"-"}
    for name, p in student.named_parameters():
        row = rows[name.removeprefix("goose.")]
        kept = torch.equal(p, before[name])
        assert kept == (row["transferred"] == "no, starts fresh") == (row["teacher"] == "-"), row
        assert row["shape"] == str(tuple(p.shape)) and (kept or row["transferred"] == "yes")
    left = {row["teacher"]: row["transferred"] for row in table if row["student"] == "-"}
    names = {f"h.{t}.attn.{n}" for t in (1, 3) for n in (
        "c_proj.bias", "c_attn.bias, r", "c_attn.bias, k", "c_attn.bias, v")}
    biases = options.get("projection_bias", True)
    assert left == ({} if biases else dict.fromkeys(names, "no, no such parameter"))
    assert torch.equal(student.lm_head.weight, model.lm_head.weight)
    assert same(parameters(model), theirs)


def test_every_weight_goes_to_its_place(model):
    student = goose(state_kind="delta", n_positions=30)
    before = student.goose.positions.weight.detach().clone()
    table = asnn.transfer_weights(student, model, output_scale=0.25)
    ours, theirs = student.goose, model.transformer
    pairs = [(ours.embeddings.weight, theirs.wte.weight), (ours.ln_f.weight, theirs.ln_f.weight),
             (ours.positions.weight[:20], theirs.wpe.weight), (ours.ln_f.bias, theirs.ln_f.bias)]
    for block, t in zip(ours.blocks, (1, 3)):  # the last of each span
        mix, ffn, source = block.time_mix, block.ffn, theirs.h[t]
        q, k, v = source.attn.c_attn.weight.split(D, 1)  # (in, out)
        q_bias, k_bias, v_bias = source.attn.c_attn.bias.split(D)
        proj, up, down = source.attn.c_proj, source.mlp.c_fc, source.mlp.c_proj
        pairs += [(mix.receptance.weight, q.t()), (mix.receptance.bias, q_bias),
                  (mix.key.weight, k.t()), (mix.key.bias, k_bias),
                  (mix.value.weight, v.t()), (mix.value.bias, v_bias),
                  (mix.output.weight, 0.25 * proj.weight.t()), (mix.output.bias, proj.bias),
                  (ffn.up.weight, up.weight.t()), (ffn.up.bias, up.bias),
                  (ffn.down.weight, down.weight.t()), (ffn.down.bias, down.bias)]
        for norm, other in ((block.ln_1, source.ln_1), (block.ln_2, source.ln_2)):
            pairs += [(norm.weight, other.weight), (norm.bias, other.bias)]
    assert all(torch.equal(got, expected) for got, expected in pairs)
    assert len(pairs) == sum(row["transferred"] == "yes" for row in table)
    assert torch.equal(ours.positions.weight[20:], before[20:])  # which the teacher lacks
    labels = {row["student"]: row["teacher"] for row in table}
    assert labels["positions.weight"] == "wpe.weight[:20]"
    assert labels["blocks.1.time_mix.key.weight"] == "h.3.attn.c_attn.weight, k"
    assert labels["blocks.0.time_mix.output.weight"] == "h.1.attn.c_proj.weight * 0.25"
    assert labels["blocks.0.time_mix.output.bias"] == "h.1.attn.c_proj.bias"


@pytest.mark.parametrize("options, theirs, ours", [
    ({"d_model": 8}, (V, D), (V, 8)), ({"vocab_size": V + 3}, (V, D), (V + 3, D)),
    ({"ffn_width": 40}, (64, D), (40, D))])
def test_weights_that_do_not_fit_are_refused_with_both_shapes(model, options, theirs, ours):
    message = re.escape(f"shape {theirs}") + ".* of the student " + re.escape(f"{ours};")
    with pytest.raises(ValueError, match=message):
        asnn.transfer_weights(goose(**options), model)


@pytest.mark.parametrize("teacher, name", [
    (mpt, "MptForCausalLM"), (goose, "GooseForCausalLM")])
def test_weights_of_another_architecture_are_refused(teacher, name):
    message = (f"teacher is a {name}; weights are transferred from gpt2, llama, qwen3, gpt_neox "
               "models only: choose one of these, or a recipe with weights_from_teacher=False")
    with pytest.raises(ValueError, match=message):
        asnn.transfer_weights(goose(), teacher())
    with pytest.raises(ValueError, match=message):
        made_task(teacher()).build_student()


def test_spans_end_where_the_teacher_is_shared_out_and_a_deeper_student_is_refused(model):
    ends = {(3, 6): (1, 3, 5), (5, 12): (2, 4, 7, 9, 11), (4, 4): (0, 1, 2, 3), (1, 6): (5,),
            (2, 3): (1, 2)}
    assert {pair: asnn._span_ends(*pair) for pair in ends} == ends
    with pytest.raises(ValueError, match="n_layer is 5; allowed: at most the teacher's 4"):
        asnn.transfer_weights(goose(5), model)


def test_a_student_starts_as_its_recipe_says(model):
    student = made_task(model, output_scale=0.5).build_student()
    mix = student.goose.blocks[0].time_mix
    assert torch.equal(mix.output.weight, 0.5 * model.transformer.h[1].attn.c_proj.weight.t())
    copied = made_task(model, weights_from_teacher=False, embeddings_from_teacher=True)
    student = copied.build_student()
    assert torch.equal(student.goose.embeddings.weight, model.transformer.wte.weight)
    assert torch.equal(student.goose.positions.weight, model.transformer.wpe.weight[:12])
    assert not student.goose.blocks[0].ffn.up.bias.any()
    assert student.lm_head.weight is student.goose.embeddings.weight
    assert student.config.eos_token_id == model.config.eos_token_id
    fresh = {"weights_from_teacher": False, "embeddings_from_teacher": False}
    one, again, other = (parameters(made_task(model, seed=seed, **fresh).build_student())
                         for seed in (1, 1, 2))
    assert same(one, again) and not same(one, other)
    assert not torch.equal(one["goose.embeddings.weight"], model.transformer.wte.weight)
    with pytest.raises(ValueError, match="d_model is 8; allowed: 16, the teacher's width, or "):
        made_task(model, weights_from_teacher=False, d_model=8,
                  embeddings_from_teacher=True).build_student()


def test_encoders_are_calibrated_one_after_the_other_on_what_reaches_them(model):
    task = made_task(model, "v14.4-sites")
    student = task.build_student()
    encoders = {n: m for n, m in student.named_modules() if isinstance(m, asnn.SpikeEncoder)}
    assert len(encoders) == 2 * 7 and not any("head_in" in name for name in encoders)
    given = {}
    for name, module in encoders.items():
        assert not module._forward_pre_hooks
        module.register_forward_pre_hook(
            lambda _m, args, name=name: given.update({name: args[0].detach()}))
    student(task.windows(task.recipe).batch(0, 16)[0])
    for name, module in encoders.items():
        again = asnn.SpikeEncoder(module.alpha.numel())
        again.calibrate(given[name])
        for p, expected in zip(module.parameters(), again.parameters()):
            torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5, msg=name)
    mixed = made_task(model, threshold="mixed_fixed").build_student()
    means = [m.channel_mean for m in asnn.spike_modules(mixed).values()]
    assert len(means) == 4 and not any((mean == 1).any() for mean in means)


def distiller(model, name="v14.4", **overrides):
    task = made_task(model, name, **overrides)
    return asnn.Distiller(task.build_student(), model, task.recipe).train()


@pytest.mark.parametrize("name", ["v14.4", "v14.4-sites", "v14.4-vector"])
def test_alignment_is_the_error_over_the_variance_of_what_the_span_adds(model, name):
    """Each block's gradient comes from its own span alone: it starts from the teacher's stream."""
    objective, tokens = distiller(model, name, align_steps=5), ids()
    with torch.no_grad():
        hidden = [model.transformer.wte(tokens) + model.transformer.wpe(torch.arange(12))]
        for block in model.transformer.h:
            out = block(hidden[-1])
            hidden.append(out[0] if isinstance(out, tuple) else out)
    terms, blocks = [], objective.student.goose.blocks
    for block, (start, end) in zip(blocks, ((0, 2), (2, 4))):
        error = (block(hidden[start])[0] - hidden[end])[:, 1:].square().mean((0, 1))
        added = (hidden[end] - hidden[start])[:, 1:].flatten(0, 1)
        terms.append((error / added.var(0)).mean())
    expected = torch.stack(terms).mean()
    loss, logged = objective(tokens, tokens, step=4)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert set(logged) == {"align"} and torch.equal(logged["align"], loss.detach())
    for mine, true in zip(torch.autograd.grad(loss, list(blocks.parameters())),
                          torch.autograd.grad(expected, list(blocks.parameters()))):
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-5)
    loss, logged = objective(tokens, tokens, step=5)  # the next stage, of KL and CE
    torch.testing.assert_close(loss.detach(), logged["kd"] + 0.2 * logged["ce"])


@pytest.mark.parametrize("name", ["v14.4", "v14.3", "v7"])  # v14.3 learns tau, v7 projections
def test_what_is_outside_the_blocks_takes_part_in_the_alignment_with_weight_zero(model, name):
    """Several processes wait for the gradient of every parameter."""
    objective = distiller(model, name, align_steps=5, estimator="clipped")
    objective(ids(), ids(), step=0)[0].backward()
    for n, p in objective.named_parameters():
        assert p.grad is not None and bool(p.grad.any()) == (".blocks." in n), n
