"""Configuration: the published history as data, profiles, parameter cells, devices."""
import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import asnn_common as asnn

# What each version is known for: published PPL and outcome, and the fields that it changed.
HISTORY = {
    "v4": (None, "works at small scale", {
        "recurrence": "cumsum", "d_model": 256, "n_layer": 4, "batch_size": 16, "lr": 3e-4,
        "distill_steps": 1000, "eval_every": 100, "teacher": "untrained-goose", "tau": 2.0,
        "embeddings_from_teacher": True, "temperature": "fixed", "output_order": "project_first"}),
    "v6": (627.0, "baseline", {"teacher": "gpt2", "recurrence": "chunked"}),
    "v7": (1655.0, "failed: alignment drowned the KL", {"hidden_weight": 1.0}),
    "v8": (559.0, "fixed", {"hidden_weight": 0.0}),
    "v9": (542.0, "baseline", {"d_model": 320, "n_layer": 5, "lr": 3e-4, "distill_steps": 3000}),
    "v10": (514.5, "baseline", {"d_model": 320, "n_layer": 5}),
    "v11": (512.67, "penalty froze learning", {"granularity": "channel", "variance_penalty": 0.01}),
    "v11.1": (512.04, "k and v amplitudes stayed identical (symmetric init and gradients)",
              {"granularity": "channel", "variance_penalty": 0.0}),
    "v12": (1000.0, "tau ran away to 10", {"gradient_reversal": False, "tau_max": 10.0}),
    "v12.1": (445.61, "tau 2.0 -> 1.58", {"gradient_reversal": True, "tau_min": 1.0, "tau_max": 5.0,
                                          "lambda_warmup_ratio": 0.2}),
    "v13": (1126.0, "catastrophic forgetting", {"curriculum": "pocl", "temperature": "staged"}),
    "v13.1": (434.44, "longer helps", {"distill_steps": 5000, "curriculum": "none"}),
    "v14": (424.81, "small gain; FDD loss 0.791 -> 0.777", {"fdd": "cka_delta"}),
    "v14.1": (321.48, "capacity mattered", {"d_model": 512, "lr": 3e-4}),
    "v14.2": (330.89, "under-trained, collapsed", {
        "d_model": 1024, "lr": 3e-4, "lambda_warmup_ratio": 0.2, "patience": 500}),
    "v14.3": (306.89, "best", {"decay_init": "spread", "mix_init": "spread"}),
    "v14.3-published": (306.89, "best", {"decay_init": "published", "estimator": "identity"}),
    "v14.3-cumsum": (None, "", {"decay_init": "published", "recurrence": "cumsum"}),
    "v14.4": (None, "", {
        "weights_from_teacher": True, "output_scale": 0.5, "state_kind": "delta", "lr": 4e-4,
        "projection_bias": True, "temperature": "fixed", "tau": 1.0, "ce_weight": 0.2,
        "fdd": "none", "align_steps": 833, "optimizer": "muon", "matrix_lr": 1e-3, "beta2": 0.95,
        "patience": 5000, "rate_weight": 0.0, "spike_sites": ("k", "v")}),
    "v14.4-sites": (None, "", {"spike_sites": asnn.SITES[:-1], "rate_weight": 0.0}),
    "v14.4-rates": (None, "", {"rate_weight": 10.0, "state_kind": "delta"}),
    "v14.5": (None, "", {"rate_weight": 10.0, "spike_steps": 2, "decay": "token",
                       "rotated_sites": ("mix_out", "ffn_hidden")}),
    "v14.4-vector": (None, "", {"state_kind": "vector", "weights_from_teacher": True}),
    "v14.4-t4": (None, "", {"corpus": "wikitext-103", "max_hours": 11.0, "seq_len": 512,
                            "grad_accum": 4, "distill_steps": 12_000, "align_steps": 2000}),
    "v14.5-smollm2": (None, "", {"teacher": "smollm2", "d_model": 576, "n_layer": 10,
                                 "gated_ffn": True, "spike_steps": 2, "decay": "token"}),
    "v14.5-smollm2-t4": (None, "", {"teacher": "smollm2", "corpus": "wikitext-103",
                                    "distill_steps": 12_000, "align_steps": 2000}),
}
V14_3 = {
    "d_model": 768, "n_layer": 5, "activation": "silu", "teacher": "gpt2", "corpus": "wikitext-2",
    "output_order": "gate_first", "spike_kind": "ternary", "distill_steps": 5000, "lr": 2e-4,
    "weight_decay": 0.01, "warmup_ratio": 0.1, "batch_size": 8, "seq_len": 256, "tau": 2.0,
    "temperature": "bounded", "tau_min": 1.0, "tau_max": 5.0, "gradient_reversal": True,
    "lambda_warmup_ratio": 0.25, "fdd": "cka_delta", "fdd_weight": 0.001, "fdd_start": 500,
    "layer_map": ((0, 2), (2, 7), (4, 11)), "patience": 800, "eval_every": 300, "kd_weight": 1.0,
    "ce_weight": 0.0, "optimizer": "adamw", "spike_sites": ("k", "v"), "align_steps": 0}
PARAMETERS = {"v9": 22_329_620, "v14.1": 41_625_620, "v14.2": 165_093_412, "v14.3": 74_234_900,
              "v14.4": 77_260_880, "v14.4-rates": 77_376_080, "v14.5": 77_698_660,
              "v14.5-smollm2": 72_230_378}


# ---- the history


def test_the_history_is_whole():
    assert set(asnn.RECIPES) == set(HISTORY)
    fields = {item.name for item in dataclasses.fields(asnn.Recipe)}
    for recipe in asnn.RECIPES.values():
        assert {*recipe.inferred, *recipe.repaired} <= fields, recipe.name


@pytest.mark.parametrize("name", HISTORY)
def test_every_version_has_its_published_numbers(name):
    (ppl, outcome, changes), recipe = HISTORY[name], asnn.RECIPES[name]
    assert (recipe.name, recipe.published_ppl, recipe.outcome) == (name, ppl, outcome)
    assert {field: vars(recipe)[field] for field in changes} == changes and recipe.changed
    assert asnn.get_recipe(name, "t4") == recipe  # profile t4 is the published size


def test_v14_3_has_the_published_hyperparameters():
    for name in ("v14.3", "v14.3-published"):
        assert {field: vars(asnn.RECIPES[name])[field] for field in V14_3} == V14_3
    assert (asnn.DistillationTrainer.MIN_DELTA, asnn.Distiller.FDD_REGRESSION) == (0.5, 0.1)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        vocabulary = 49152 if "smollm2" in name else 50257
        model = asnn.GooseForCausalLM(asnn.RECIPES[name].student_config(vocabulary))
    assert model.num_parameters() == PARAMETERS[name]


TERMS = {"v7": {"hidden"}, "v11": {"variance"}, "v14": {"fdd"}, "v14.1": {"fdd"}, "v14.2": {"fdd"},
         **dict.fromkeys(("v14.3", "v14.3-published", "v14.3-cumsum"), {"fdd"}),
         **dict.fromkeys(("v14.4", "v14.4-sites", "v14.4-vector", "v14.4-t4"), {"align"}),
         **dict.fromkeys(("v14.4-rates", "v14.5", "v14.5-smollm2", "v14.5-smollm2-t4"),
                         {"align", "rate"})}


@pytest.mark.parametrize("name", asnn.RECIPES)
def test_every_recipe_gives_a_student_of_its_architecture_and_trains(name, small_task):
    own = {} if name != "v4" else {"teacher": "untrained-goose"}
    n_layer = 4 if name == "v4" else 2
    task = small_task(name, distill_steps=3, eval_every=3, fdd_start=2, max_hours=1.0,
                      n_layer=n_layer, eval_windows=2, grad_accum=asnn.RECIPES[name].grad_accum,
                      align_steps=1 if "align" in TERMS.get(name, ()) else 0, **own)
    config = task.build_student().config
    for field in {item.name for item in dataclasses.fields(asnn.Recipe)} & set(vars(config)):
        expected = vars(task.recipe)[field]
        if field not in ("vocab_size", "layer_map", "ffn_width"):
            assert vars(config)[field] == (list(expected) if type(expected) is tuple else expected)
    assert (config.n_positions, config.vocab_size, config.ffn_width) == (16, 300, 128)
    before = task.build_student().state_dict()
    student, result = asnn.distil(task)
    rows = [row for row in result.log if "loss" in row]
    assert result.finished and result.step == 3 and len(rows) == 3
    extra = {"hidden", "variance", "fdd", "align", "rate"} & {key for row in rows for key in row}
    assert extra == TERMS.get(name, set())
    after = student.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.split(".")[-1] for key in moved} >= {"weight", "decay_logit", "mix_k"}
    # The published estimator left theta untouched.
    assert any(key.endswith("alpha") for key in moved) == (config.estimator == "clipped")


@pytest.mark.parametrize("given, expected", [
    ({}, [("KL", 0, 100)]),
    ({"align_steps": 30}, [("layerwise alignment", 0, 30), ("KL", 30, 100)]),
    ({"ce_weight": 0.2}, [("KL + CE", 0, 100)]),
    ({"ce_weight": 0.2, "align_steps": 30}, [("layerwise alignment", 0, 30),
                                             ("KL + CE", 30, 100)])])
def test_stages_cover_the_run(given, expected):
    assert asnn.RECIPES["v14.3"].replace(distill_steps=100, **given).stages() == expected


# ---- profiles


@pytest.mark.parametrize("steps, expected", [(5000, (500, 800, 300, 833)), (500, (50, 80, 30, 83)),
                                             (1, (1, 1, 1, 0))])
def test_what_is_counted_in_steps_shrinks_with_them(steps, expected):
    scaled = asnn.get_recipe("v14.3", "t4", distill_steps=steps)
    aligned = asnn.get_recipe("v14.4", "t4", distill_steps=steps)
    assert (scaled.fdd_start, scaled.patience, scaled.eval_every) == expected[:3]
    assert aligned.align_steps == expected[3]
    assert aligned.patience == steps  # a recipe that runs to its end does so at any size


def test_a_profile_multiplies_the_rates_and_an_override_wins_over_both():
    for profile, scale in (("tiny", 10), ("cpu", 5), ("ref", 5), ("t4", 1)):
        recipe = asnn.get_recipe("v14.4", profile)
        assert (recipe.lr, recipe.matrix_lr) == pytest.approx((4e-4 * scale, 1e-3 * scale))
        assert asnn.get_recipe("v14.3", profile).matrix_lr is None
    own = asnn.get_recipe("v14.4", "cpu", lr=1e-5, patience=7, d_model=64, max_hours=2)
    assert (own.lr, own.patience, own.d_model, own.max_hours) == (1e-5, 7, 64, 2)
    assert own.matrix_lr == pytest.approx(5e-3) and asnn.RECIPES["v14.4"].lr == 4e-4


@pytest.mark.parametrize("profile", asnn.PROFILES)
@pytest.mark.parametrize("name", ["v14.2", "v14.4-t4"])
def test_the_layer_map_is_spread_over_the_depths(profile, name):
    scaled = asnn.get_recipe(name, profile)
    students, teachers = zip(*scaled.layer_map)
    assert students[0] == 0 and students[-1] == scaled.n_layer - 1
    assert list(teachers) == sorted(teachers) and teachers[-1] == scaled.teacher_layers - 1
    assert (scaled.max_hours == 11.0) == ((name, profile) == ("v14.4-t4", "t4"))
    for student, teacher, expected in (
            (5, 12, {0: 2, 2: 7, 4: 11}), (3, 6, {0: 1, 1: 3, 2: 5}), (1, 6, {0: 5}),
            (6, 2, {0: 0, 2: 0, 5: 1})):
        recipe = asnn.get_recipe("v14.3", "tiny", n_layer=student, teacher_layers=teacher)
        assert dict(recipe.layer_map) == expected


@pytest.mark.parametrize("asked, variable, gpu, expected", [
    ("ref", "tiny", False, "ref"), (None, "tiny", True, "tiny"), (None, "", True, "t4"),
    (None, None, False, "cpu")])
def test_the_profile_is_asked_for_else_named_else_the_hardwares(monkeypatch, asked, variable, gpu,
                                                                expected):
    device = torch.device("cuda" if gpu else "cpu")
    monkeypatch.setattr(asnn, "_select_device", lambda: (device, ""))
    if variable is not None:
        monkeypatch.setenv("ASNN_PROFILE", variable)
    assert asnn.get_recipe("v14.3", asked).profile == expected


@pytest.mark.parametrize("page", ["asnn_v14_3_distill", "asnn_v14_4_transfer"])
@pytest.mark.parametrize("profile", ["tiny", "t4"])
def test_a_parameter_cell_passes_straight_into_a_recipe(page, profile):
    text = (ROOT / "notebooks" / f"{page}.py").read_text(encoding="utf-8")
    cell = re.search(r'^# %% tags=\["parameters"\]\n(.*?)^# %%', text, re.M | re.S).group(1)
    call = re.search(r"^recipe = asnn\.get_recipe\(.*?\)$", text, re.M | re.S).group(0)
    plain, given = {"asnn": asnn}, {"asnn": asnn}
    for names in (plain, given):
        exec(cell, names)
    plain["profile"] = given["profile"] = profile
    given.update(steps=9, teacher_name="train", max_hours=2, seed=7, tracker="tensorboard")
    name = plain["recipe"]
    exec(call, plain)
    assert plain["recipe"] == asnn.get_recipe(name, profile)
    exec(call, given)
    assert given["recipe"] == asnn.get_recipe(name, profile, distill_steps=9, teacher="train",
                                              max_hours=2, seed=7, tracker="tensorboard")


# ---- devices and precisions


@pytest.fixture
def gpu(monkeypatch):
    """gpu(name, capability, works): a machine with such a card, on which something runs or not."""
    def make(name, capability, works=True):
        ones = torch.ones

        def on_cuda(*size, device=None, **more):
            if device is not None and not works:
                raise RuntimeError("no kernel image is available for execution\nmore")
            return ones(*size, **more)
        properties = SimpleNamespace(total_memory=15 * 2**30)
        for what, value in (("is_available", True), ("device_count", 2), ("get_device_name", name),
                            ("get_device_capability", capability), ("is_bf16_supported", True),
                            ("get_device_properties", properties)):
            monkeypatch.setattr(torch.cuda, what, lambda *_, value=value, **__: value)
        monkeypatch.setattr(torch, "ones", on_cuda)
    return make


@pytest.mark.parametrize("name, capability, precision", [
    ("Tesla T4", (7, 5), "fp16"), ("A100", (8, 0), "bf16"), ("Tesla P100", (6, 0), "fp32")])
def test_device_and_precision_follow_what_the_gpu_can_do(gpu, monkeypatch, name, capability,
                                                         precision):
    gpu(name, capability, works="P100" not in name)  # a T4 claims that it supports bf16
    monkeypatch.setenv("LOCAL_RANK", "1")
    env = asnn.environment()
    assert env["precision"] == precision
    if "P100" in name:  # the reason is the first line of the error, and says what to press
        assert env["device"] == "cpu" and "thread" in env["hardware"]
        for part in (name, "no kernel image is available", "Accelerator > GPU T4 x2"):
            assert part in env["device_reason"] and "more" not in env["device_reason"]
    else:
        assert (env["device"], env["device_reason"]) == ("cuda:1", f"{name}, 15 GiB")
        assert "{}.{}".format(*capability) in env["precision_reason"]
        assert env["hardware"] == ", ".join([f"{name}, 15 GiB"] * 2)


@pytest.mark.parametrize("flags, precision", [
    ("fpu avx2", "fp32"), ("avx512f", "fp32"), ("avx512_bf16 fpu", "bf16"), ("amx_bf16", "bf16")])
def test_precision_of_a_cpu_follows_its_flags(monkeypatch, flags, precision):
    monkeypatch.setattr(asnn, "_cpu_facts", lambda: {"flags": flags, "model name": "A CPU"})
    env = asnn.environment()
    assert (env["device"], env["device_reason"]) == ("cpu", "no CUDA device")
    assert env["precision"] == precision and env["precision_reason"]
