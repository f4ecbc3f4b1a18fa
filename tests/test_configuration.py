"""Configuration: the published history as data, what is refused, profiles, devices and precisions."""
import ast
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import asnn_common as asnn

ROOT = Path(asnn.__file__).resolve().parent

HISTORY = {
    "v4": (None, "works at small scale"),
    "v6": (627.0, "baseline"),
    "v7": (1655.0, "failed: alignment drowned the KL"),
    "v8": (559.0, "fixed"),
    "v9": (542.0, "baseline"),
    "v10": (514.5, "baseline"),
    "v11": (512.67, "penalty froze learning"),
    "v11.1": (512.04, "k and v amplitudes stayed identical (symmetric init and gradients)"),
    "v12": (1000.0, "tau ran away to 10"),
    "v12.1": (445.61, "tau 2.0 -> 1.58"),
    "v13": (1126.0, "catastrophic forgetting"),
    "v13.1": (434.44, "longer helps"),
    "v14": (424.81, "small gain; FDD loss 0.791 -> 0.777"),
    "v14.1": (321.48, "capacity mattered"),
    "v14.2": (330.89, "under-trained, collapsed"),
    "v14.3": (306.89, "best"),
}
V14_3 = {
    "d_model": 768, "n_layer": 5, "activation": "silu", "teacher": "gpt2", "output_order": "gate_first",
    "spike_kind": "ternary", "alpha_init": 1.0, "amplitude_init": 1.0, "distill_steps": 5000, "lr": 2e-4,
    "weight_decay": 0.01, "warmup_ratio": 0.1, "batch_size": 8, "seq_len": 256, "clip": 1.0,
    "temperature": "bounded", "tau": 2.0, "tau_min": 1.0, "tau_max": 5.0, "gradient_reversal": True,
    "lambda_max": 1.0, "lambda_warmup_ratio": 0.25, "fdd": "cka_delta", "fdd_weight": 0.001, "fdd_start": 500,
    "fdd_max_regression": 0.10, "layer_map": ((0, 2), (2, 7), (4, 11)), "patience": 800, "min_delta": 0.5,
    "eval_every": 300, "kd_weight": 1.0, "ce_weight": 0.0,
}
CHANGES = {  # what each version is known for
    "v4": {"recurrence": "cumsum", "d_model": 256, "n_layer": 4, "batch_size": 16, "lr": 3e-4, "distill_steps": 1000,
           "eval_every": 100, "teacher": "untrained-goose", "embeddings_from_teacher": True, "temperature": "fixed",
           "tau": 2.0, "output_order": "project_first"},
    "v6": {"teacher": "gpt2", "recurrence": "chunked"},
    "v7": {"hidden_weight": 1.0},
    "v8": {"hidden_weight": 0.0},
    "v9": {"d_model": 320, "n_layer": 5, "lr": 3e-4, "distill_steps": 3000},
    "v11": {"granularity": "channel", "variance_penalty": 0.01},
    "v11.1": {"granularity": "channel", "variance_penalty": 0.0},
    "v12": {"temperature": "bounded", "gradient_reversal": False, "tau_max": 10.0},
    "v12.1": {"gradient_reversal": True, "tau_min": 1.0, "tau_max": 5.0, "lambda_warmup_ratio": 0.2},
    "v13": {"curriculum": "pocl", "temperature": "staged"},
    "v13.1": {"distill_steps": 5000, "curriculum": "none", "temperature": "bounded"},
    "v14": {"fdd": "cka_delta"},
    "v14.1": {"d_model": 512, "lr": 3e-4},
    "v14.2": {"d_model": 1024, "lr": 3e-4, "lambda_warmup_ratio": 0.2, "patience": 500},
    "v14.3": {"decay_init": "spread", "mix_init": "spread", "estimator": "clipped"},
    "v14.3-published": {"decay_init": "published", "mix_init": "published", "estimator": "identity"},
}
PARAMETERS = {"v9": 22_329_620, "v14.1": 41_625_620, "v14.2": 165_093_412, "v14.3": 74_234_900}
TINY = {"vocab_size": 11, "d_model": 8, "n_layer": 1, "n_positions": 4}


def count(name):
    with torch.device("meta"):
        return asnn.count_parameters(asnn.GooseForCausalLM(asnn.get_recipe(name).student_config(50257)))


# ---- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HISTORY)
def test_every_version_has_its_published_ppl_and_outcome(name):
    recipe = asnn.RECIPES[name]
    assert recipe.name == name and recipe.changed
    assert (recipe.published_ppl, recipe.outcome) == HISTORY[name]


def test_v14_3_has_the_published_hyperparameters():
    for name in ("v14.3", "v14.3-published"):
        recipe = asnn.get_recipe(name)
        assert {field: getattr(recipe, field) for field in V14_3} == V14_3
        assert recipe.published_ppl == 306.89


@pytest.mark.parametrize("name", CHANGES)
def test_each_version_differs_by_what_it_changed(name):
    recipe = asnn.get_recipe(name)
    assert {field: getattr(recipe, field) for field in CHANGES[name]} == CHANGES[name]


def test_inferred_names_are_fields():
    fields = {item.name for item in dataclasses.fields(asnn.Recipe)}
    for recipe in asnn.RECIPES.values():
        assert set(recipe.inferred) <= fields, recipe.name


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert count(name) == PARAMETERS[name]


@pytest.mark.parametrize("name, millions", [("v9", 22), ("v14.1", 42), ("v14.2", 165), ("v14.3", 74)])
def test_parameter_counts_are_the_published_ones(name, millions):
    assert round(PARAMETERS[name] / 1e6) == millions


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="there is no README.md")
def test_readme_states_the_exact_number_of_parameters():
    assert set(re.findall(r"\b74,\d{3},\d{3}\b", (ROOT / "README.md").read_text())) == {f"{count('v14.3'):,}"}


def test_unknown_recipe_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"recipe is 'v99'; allowed: v4, v6, .*v14\.3"):
        asnn.get_recipe("v99")


@pytest.mark.parametrize("call", [lambda: asnn.get_recipe("v14.3", learning_rate=1.0),
                                  lambda: asnn.PROFILES["tiny"].scale(asnn.RECIPES["v9"], learning_rate=1.0)])
def test_unknown_recipe_field_is_refused_with_those_that_exist(call):
    with pytest.raises(ValueError, match=r"Recipe has no field learning_rate; it has: .*\blr\b"):
        call()


@pytest.mark.parametrize("field, value, allowed", [
    ("temperature", "warm", "fixed, bounded, paper, staged"),
    ("fdd", "cka", "none, cka_delta, logit_lens"),
    ("curriculum", "hard", "none, pocl"),
    ("estimator", "magic", "identity, normalised, clipped"),
    ("threshold", "batch", "token, channel, mixed"),
    ("granularity", "head", "scalar, channel"),
    ("recurrence", "fft", "chunked, reference, cumsum"),
    ("decay_init", "random", "spread, published"),
    ("mix_init", "random", "spread, published"),
    ("output_order", "last", "gate_first, project_first"),
    ("spike_kind", "integer:0", "dense, binary, ternary, integer:k"),
    ("d_model", 0, "whole number from 1"),
    ("n_layer", 2.5, "whole number from 1"),
    ("distill_steps", -1, "whole number from 1"),
    ("grad_accum", 0, "whole number from 1"),
    ("lr", 0.0, "above 0"),
    ("clip", -1.0, "above 0"),
    ("alpha_init", 0.0, "above 0"),
    ("warmup_ratio", 1.5, r"in \[0, 1\]"),
    ("lambda_warmup_ratio", -0.1, r"in \[0, 1\]"),
    ("kd_weight", -1.0, "from 0"),
    ("min_delta", -0.5, "from 0"),
    ("tau", 5.0, "between 1.0 and 5.0"),
    ("tau", 0.5, "between 1.0 and 5.0"),
    ("state_kind", "tensor", "vector, matrix, delta"),
    ("optimizer", "sgd", "adamw, muon"),
    ("schedule", "step", "cosine, linear"),
    ("spike_sites", ("v",), "'k', 'v' and any of"),
    ("spike_sites", ("k", "v", "q"), "'k', 'v' and any of"),
    ("output_scale", 0.0, "above 0"),
    ("matrix_lr", -1e-3, "from 0"),
    ("beta2", 1.0, ""),  # the optimisers refuse it too, but not by name
    ("ce_start", -1, "from 0"),
    ("anneal_steps", -1, "from 0"),
    ("align_steps", -1, "from 0"),
    ("align_steps", 5000, "less than distill_steps = 5000"),
])
def test_wrong_recipe_value_is_refused(field, value, allowed):
    with pytest.raises(ValueError, match=rf"{field} is {re.escape(repr(value))}; allowed: .*{allowed}"):
        asnn.get_recipe("v14.3", **{field: value})


def test_overrides_replace_and_layer_maps_may_be_given_as_a_dict():
    recipe = asnn.get_recipe("v14.3", lr=1e-3, layer_map={4: 11, 0: 2})
    assert (recipe.lr, recipe.layer_map) == (1e-3, ((0, 2), (4, 11)))
    assert asnn.RECIPES["v14.3"].lr == 2e-4


def test_lists_become_tuples_and_a_matrix_lr_may_be_absent():
    recipe = asnn.get_recipe("v14.4", spike_sites=["k", "v", "ffn_in"], transfer_layers=[0, 1], matrix_lr=None)
    assert (recipe.spike_sites, recipe.transfer_layers, recipe.matrix_lr) == (("k", "v", "ffn_in"), (0, 1), None)


@pytest.mark.parametrize("given, expected", [
    ({}, [("KL", 0, 100)]),
    ({"align_steps": 30}, [("layerwise alignment", 0, 30), ("KL", 30, 100)]),
    ({"ce_weight": 0.2}, [("KL + CE", 0, 100)]),
    ({"ce_weight": 0.2, "ce_start": 60}, [("KL", 0, 60), ("KL + CE", 60, 100)]),
    ({"ce_weight": 0.2, "align_steps": 30, "ce_start": 60}, [("layerwise alignment", 0, 30), ("KL", 30, 60),
                                                             ("KL + CE", 60, 100)]),
    ({"ce_weight": 0.2, "align_steps": 30, "ce_start": 10}, [("layerwise alignment", 0, 30), ("KL + CE", 30, 100)]),
    ({"align_steps": 30, "ce_start": 60}, [("layerwise alignment", 0, 30), ("KL", 30, 100)]),  # no weight, no stage
    ({"ce_weight": 0.2, "ce_start": 150}, [("KL", 0, 100)]),  # no stage outlasts the run
])
def test_stages_cover_the_run(given, expected):
    assert asnn.get_recipe("v14.3", distill_steps=100, **given).stages() == expected


@pytest.mark.parametrize("thing, field", [(asnn.RECIPES["v14.3"], "lr"), (asnn.PROFILES["tiny"], "corpus")])
def test_recipes_and_profiles_are_frozen(thing, field):
    with pytest.raises(dataclasses.FrozenInstanceError, match=field):
        setattr(thing, field, "changed")


@pytest.mark.parametrize("name", asnn.RECIPES)
def test_every_recipe_gives_a_student_of_its_architecture(name):
    recipe = asnn.get_recipe(name)
    config = recipe.student_config(1000)
    assert (config.vocab_size, config.n_positions) == (1000, recipe.seq_len)
    shared = set(config.to_dict()) & {item.name for item in dataclasses.fields(recipe)} - {"layer_map"}
    assert {"d_model", "recurrence", "estimator", "threshold", "decay_init", "output_order", "state_kind",
            "head_width", "projection_bias", "encoder_kind", "spike_sites"} <= shared
    expected = {field: getattr(recipe, field) for field in shared}
    expected["spike_sites"] = list(recipe.spike_sites)  # as JSON has it
    assert {field: getattr(config, field) for field in shared} == expected


# ---- profiles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, expected", [(5000, (500, 800, 300)), (500, (50, 80, 30)), (1, (1, 1, 1))])
def test_scale_shrinks_what_is_counted_in_steps(steps, expected):
    scaled = asnn.PROFILES["t4"].scale(asnn.get_recipe("v14.3"), distill_steps=steps)
    assert (scaled.fdd_start, scaled.patience, scaled.eval_every) == expected


def test_scale_shrinks_stages_and_multiplies_the_rates():
    recipe = asnn.get_recipe("v14.3", lr=1e-4, matrix_lr=3e-4, distill_steps=1000, align_steps=200, ce_start=500,
                             anneal_steps=100)
    scaled = asnn.PROFILES["t4"].replace(lr_scale=5.0).scale(recipe, distill_steps=100)
    assert (scaled.align_steps, scaled.ce_start, scaled.anneal_steps) == (20, 50, 10)
    assert (scaled.lr, scaled.matrix_lr) == pytest.approx((5 * recipe.lr, 5 * recipe.matrix_lr))
    assert asnn.PROFILES["cpu"].scale(asnn.get_recipe("v14.3")).matrix_lr is None
    assert asnn.PROFILES["cpu"].scale(recipe, lr=1e-5).lr == 1e-5


def test_scale_lets_overrides_win():
    scaled = asnn.PROFILES["tiny"].scale(asnn.get_recipe("v14.3"), d_model=48, patience=7)
    assert (scaled.d_model, scaled.patience, scaled.n_layer, scaled.distill_steps) == (48, 7, 2, 30)


def test_published_size_keeps_the_recipe():
    assert asnn.PROFILES["t4"].scale(asnn.get_recipe("v14.3")) == asnn.get_recipe("v14.3")


@pytest.mark.parametrize("profile", asnn.PROFILES)
@pytest.mark.parametrize("name", ["v14.3", "v14.2"])
def test_scaled_layer_map_stays_inside_both_models(profile, name):
    scaled = asnn.PROFILES[profile].scale(asnn.get_recipe(name))
    students, teachers = zip(*scaled.layer_map)
    assert max(students) == scaled.n_layer - 1
    assert max(teachers) == asnn.PROFILES[profile].teacher_layers - 1


@pytest.mark.parametrize("student, teacher, expected", [
    (5, 12, {0: 2, 2: 7, 4: 11}), (3, 6, {0: 1, 1: 3, 2: 5}), (2, 2, {0: 0, 1: 1}), (1, 6, {0: 5}),
    (6, 2, {0: 0, 2: 0, 5: 1})])
def test_spread_layer_map(student, teacher, expected):
    assert dict(asnn.spread_layer_map(student, teacher)) == expected


def test_unknown_profile_field_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="Profile has no field corpora; it has: .*corpus"):
        asnn.PROFILES["tiny"].replace(corpora="x")


def test_profile_by_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("ASNN_PROFILE", "tiny")
    assert asnn.select_profile("ref") == (asnn.PROFILES["ref"], "profile ref: asked for")
    assert asnn.select_profile() == (asnn.PROFILES["tiny"], "profile tiny: ASNN_PROFILE")


@pytest.mark.parametrize("device, expected", [("cpu", "cpu"), ("cuda", "t4")])
def test_profile_by_hardware_says_why(monkeypatch, device, expected):
    monkeypatch.delenv("ASNN_PROFILE", raising=False)
    monkeypatch.setattr(asnn, "select_device", lambda: (torch.device(device), "because"))
    assert asnn.select_profile() == (asnn.PROFILES[expected], f"profile {expected}: because")


def test_unknown_profile_is_refused_with_those_that_exist(monkeypatch):
    with pytest.raises(ValueError, match=r"profile \(asked for\) is 'huge'; allowed: tiny, cpu, ref, t4"):
        asnn.select_profile("huge")
    monkeypatch.setenv("ASNN_PROFILE", "small")
    with pytest.raises(ValueError, match=r"profile \(ASNN_PROFILE\) is 'small'; allowed: tiny, cpu, ref, t4"):
        asnn.select_profile()


# ---- devices and precisions ----------------------------------------------------------------------


def test_without_cuda_the_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert asnn.select_device() == (torch.device("cpu"), "no CUDA device")


def test_a_gpu_without_kernels_is_passed_over_and_the_reason_says_what_to_press(monkeypatch):
    def no_kernel(*_args, **_kwargs):
        raise RuntimeError("no kernel image is available for execution on the device\nmore")
    for name, value in (("is_available", True), ("get_device_name", "Tesla P100"), ("get_device_capability", (6, 0)),
                        ("get_arch_list", ["sm_70", "sm_75"])):
        monkeypatch.setattr(torch.cuda, name, lambda *_args, value=value: value)
    monkeypatch.setattr(torch, "ones", no_kernel)
    device, reason = asnn.select_device()
    assert device == torch.device("cpu")
    for part in ("Tesla P100 (sm_60)", "sm_70, sm_75", "no kernel image is available", "GPU T4 x2"):
        assert part in reason
    assert "more" not in reason  # only the first line of the error


@pytest.mark.parametrize("rank", [None, "1"])
def test_a_gpu_that_works_is_taken_by_the_process_of_its_rank(monkeypatch, rank):
    ones = torch.ones
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    properties = SimpleNamespace(total_memory=15 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    assert asnn.select_device() == (torch.device("cuda", int(rank or 0)), "Tesla T4, 15 GiB")


@pytest.mark.parametrize("capability, precision", [((6, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"),
                                                   ((9, 0), "bf16")])
def test_precision_of_a_gpu_follows_its_compute_capability(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_args, **_kwargs: True)  # as a T4 claims
    chosen, reason = asnn.select_precision(torch.device("cuda"))
    assert chosen == precision and "{}.{}".format(*capability) in reason


@pytest.mark.parametrize("capabilities, precision", [({}, "fp32"), ({"avx512_f": True, "avx512_bf16": False}, "fp32"),
                                                     ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")])
def test_precision_of_a_cpu_follows_its_capabilities(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    chosen, reason = asnn.select_precision(torch.device("cpu"))
    assert chosen == precision and reason


@pytest.mark.parametrize("flags, precision", [("fpu sse2", "fp32"), ("fpu avx512_bf16", "bf16")])
def test_precision_of_a_cpu_is_read_from_its_flags_by_older_torch(monkeypatch, flags, precision):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(asnn.Path, "read_text", lambda *_args, **_kwargs: f"flags\t: {flags}\n")
    assert asnn.select_precision(torch.device("cpu"))[0] == precision


@pytest.mark.parametrize("asked, precision", [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16")])
def test_precision_asked_for_is_taken(asked, precision):
    assert asnn.select_precision(torch.device("cpu"), asked) == (precision, f"{asked}: asked for")


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'fp8'; allowed: auto, fp32, fp16, bf16"):
        asnn.select_precision(torch.device("cpu"), "fp8")


# ---- GooseConfig ---------------------------------------------------------------------------------


def test_config_refuses_unknown_keys_and_lists_its_own():
    with pytest.raises(ValueError, match="GooseConfig has no field thresholds; it has: .*threshold"):
        asnn.GooseConfig(**TINY, thresholds="mixed")


@pytest.mark.parametrize("field, value, allowed", [
    ("vocab_size", 0, "whole number from 1"), ("d_model", 8.0, "whole number from 1"),
    ("n_layer", -1, "whole number from 1"), ("n_positions", None, "whole number from 1"),
    ("ffn_width", 0, "number from 1"), ("state_kind", "tensor", "vector, matrix, delta"),
    ("recurrence", "fft", "chunked"),
    ("decay_init", "random", "spread, published"), ("mix_init", "ones", "spread, published"),
    ("output_order", "both", "gate_first, project_first"), ("threshold", "batch", "token, channel, mixed"),
    ("granularity", "head", "scalar, channel"), ("estimator", "none", "identity, normalised, clipped"),
    ("spike_kind", "quaternary", "dense, binary, ternary, integer:k"),
    ("spike_sites", ("k",), "'k', 'v' and any of mix_in, mix_out, ffn_in, ffn_hidden, head_in"),
    ("spike_sites", ("k", "v", "q"), "'k', 'v' and any of mix_in, mix_out, ffn_in, ffn_hidden, head_in"),
    ("encoder_kind", "binary", "ternary, integer:k"), ("encoder_kind", "dense", "ternary, integer:k"),
    ("alpha_init", 0, "above 0"), ("amplitude_init", -1.0, "above 0"),
])
def test_config_refuses_wrong_values(field, value, allowed):
    with pytest.raises(ValueError, match=rf"{field} is {re.escape(repr(value))}; allowed: .*{allowed}"):
        asnn.GooseConfig(**{**TINY, field: value})


@pytest.mark.parametrize("state", ["matrix", "delta"])
@pytest.mark.parametrize("field, value, allowed", [
    ("head_width", 3, "a divisor of d_model = 8"), ("recurrence", "cumsum", "chunked, reference"),
    ("output_order", "project_first", "gate_first")])
def test_a_matrix_state_refuses_what_only_a_vector_state_can(state, field, value, allowed):
    assert getattr(asnn.GooseConfig(**TINY, **{field: value}), field) == value
    with pytest.raises(ValueError, match=rf"{field} is {re.escape(repr(value))}; allowed: {allowed}"):
        asnn.GooseConfig(**TINY, state_kind=state, **{"head_width": 4, field: value})


def test_the_site_before_the_output_needs_the_gate_first():
    with pytest.raises(ValueError, match="output_order is 'project_first'; allowed: gate_first with .*mix_out"):
        asnn.GooseConfig(**TINY, spike_sites=("k", "v", "mix_out"), output_order="project_first")


def test_sites_are_kept_in_the_order_of_the_forward_pass():
    assert asnn.GooseConfig(**TINY, spike_sites=["ffn_in", "v", "mix_in", "k"]).spike_sites == ["k", "v", "mix_in",
                                                                                                "ffn_in"]
    assert asnn.check_sites(reversed(asnn.SITES)) == asnn.SITES


@pytest.mark.parametrize("kind", ["integer:0", "integer:128", "integer", "integer:-1", "integer:x", "ternary:2", ""])
def test_wrong_spike_kinds_are_refused(kind):
    with pytest.raises(ValueError, match=f"spike_kind is '{kind}'; allowed: dense, binary, ternary, integer:k"):
        asnn.spike_levels(kind)


@pytest.mark.parametrize("kind, levels", [("dense", 0), ("binary", 1), ("ternary", 1), ("integer:1", 1),
                                          ("integer:127", 127)])
def test_spike_levels(kind, levels):
    assert asnn.spike_levels(kind) == levels


def test_unknown_activation_is_refused_by_the_model():
    with pytest.raises(ValueError, match="activation is 'sillu'; allowed: .*silu"):
        asnn.GooseForCausalLM(asnn.GooseConfig(**TINY, activation="sillu"))


@pytest.mark.parametrize("state, order", [("vector", "project_first"), ("delta", "gate_first")])
def test_config_survives_save_and_load(tmp_path, state, order):
    changed = {"ffn_width": 20, "activation": "gelu", "layer_norm_epsilon": 1e-6, "initializer_range": 0.1,
               "recurrence": "reference", "decay_init": "published", "mix_init": "published",
               "output_order": order, "spike_kind": "integer:3", "threshold": "mixed",
               "granularity": "channel", "alpha_init": 0.77, "amplitude_init": 1.53, "estimator": "normalised",
               "state_kind": state, "head_width": 2, "projection_bias": True, "encoder_kind": "integer:3",
               "spike_sites": ["k", "v", "ffn_in", "head_in"], "use_cache": False, "tie_word_embeddings": False,
               "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = asnn.GooseConfig(**TINY, **changed)
    config.save_pretrained(tmp_path)
    loaded = asnn.GooseConfig.from_pretrained(tmp_path)
    assert {field: getattr(loaded, field) for field in {**TINY, **changed}} == {**TINY, **changed}
    assert {**loaded.to_dict(), "auto_map": 0, "_name_or_path": 0} == {**config.to_dict(), "auto_map": 0,
                                                                       "_name_or_path": 0}


def test_config_has_the_names_the_library_uses():
    config = asnn.GooseConfig(**TINY)
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (8, 1, 4)
    assert config.ffn_width == 32


# ---- import --------------------------------------------------------------------------------------

IMPORT = """
import random, sys
import numpy, torch, transformers
random.seed(1); numpy.random.seed(2); torch.manual_seed(3)
before = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state(), torch.get_num_threads()
def refuse(*_):
    raise AssertionError("a device was chosen at import")
torch.cuda.is_available = torch.cuda.init = torch.cuda.get_device_capability = refuse
from transformers import GenerationMixin, PreTrainedModel
libraries = {"accelerate", "datasets", "matplotlib"} - set(sys.modules)  # transformers may load accelerate itself
assert {"datasets", "matplotlib"} <= libraries
import asnn_common
assert random.getstate() == before[0], "random"
assert str(numpy.random.get_state()) == before[1], "numpy"
assert torch.equal(torch.get_rng_state(), before[2]), "torch"
assert torch.get_num_threads() == before[3], "threads"
assert torch.get_default_device() == torch.device("cpu") and torch.get_default_dtype() == torch.float32
loaded = libraries & set(sys.modules)
assert not loaded, loaded
"""


def test_top_level_imports_are_torch_transformers_numpy_and_the_standard_library():
    statements = ast.parse(Path(asnn.__file__).read_text()).body
    for part in [s for s in statements if isinstance(s, ast.Try)]:
        statements += [*part.body, *(s for handler in part.handlers for s in handler.body)]
    names = {alias.name for s in statements if isinstance(s, ast.Import) for alias in s.names}
    names |= {s.module for s in statements if isinstance(s, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names}
    assert "torch" in packages
    assert packages - sys.stdlib_module_names == {"torch", "transformers", "numpy"}


def test_nothing_happens_at_import(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
                   "ASNN_CACHE": str(tmp_path / "cache"), "ASNN_OUTPUTS": str(tmp_path / "outputs")}
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert not list(tmp_path.iterdir())


def test_variance_penalty_needs_channels_to_vary():
    with pytest.raises(ValueError, match="Recipe.variance_penalty is 0.01; allowed: .*granularity='channel'"):
        asnn.get_recipe("v14.3", variance_penalty=0.01)


def test_tau_of_the_paper_has_its_own_bounds():
    assert asnn.get_recipe("v14.3", temperature="paper", tau=10.0).tau == 10.0
    with pytest.raises(ValueError, match="Recipe.tau is 21.0; allowed: between 1.0 and 21.0"):
        asnn.get_recipe("v14.3", temperature="paper", tau=21.0)
