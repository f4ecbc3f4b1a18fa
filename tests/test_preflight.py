"""The table of hardware and time before a run, what it says to click, and trackers."""
import dataclasses
import importlib
import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import asnn_common as asnn


@pytest.fixture
def task(small_recipe, teacher, tokens, corpus):
    recipe, notes = asnn.match_teacher(small_recipe("v14.4"), teacher)
    return asnn.Task(recipe, notes, corpus, {}, tokens, teacher, {})


@pytest.fixture
def gpu(monkeypatch):
    """gpu(name, capability, GiB): a machine with such a card, on which an operation runs or does not."""
    def make(name="Tesla T4", capability=(7, 5), GiB=15, works=True):
        device = torch.device("cuda", 0) if works else torch.device("cpu")
        properties = SimpleNamespace(total_memory=GiB * 2**30)
        for what, value in (("is_available", True), ("device_count", 2), ("get_device_name", name),
                            ("get_device_capability", capability), ("get_device_properties", properties)):
            monkeypatch.setattr(torch.cuda, what, lambda *_, value=value: value)
        if works:
            monkeypatch.setattr(asnn, "select_device", lambda: (device, f"{name}, {GiB} GiB"))
        else:
            def no_kernel(*_args, **_kwargs):
                raise RuntimeError("no kernel image is available for execution on the device")
            monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_75"])
            monkeypatch.setattr(torch, "ones", no_kernel)
    return make


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def probed(monkeypatch, step=20, seconds=10.0):
    """The probe of a machine that takes `seconds` for `step` steps."""
    result = asnn.FitResult([], step, "step limit", 1.0, 0, seconds, 1000.0, 0, 0, "fp16", 5.0)
    monkeypatch.setattr(asnn, "_probe", lambda *_: result)


def named(rows):
    assert all(set(row) == {"what", "value", "why"} and all(isinstance(v, str) for v in row.values()) for row in rows)
    return {row["what"]: f"{row['value']} {row['why']}" for row in rows}


# ---- what to click


def test_a_t4_on_kaggle_needs_nothing(monkeypatch, gpu):
    gpu()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    rows, advice = asnn.preflight()
    table = named(rows)
    assert advice == []
    assert "2 x Tesla T4" in table["GPU"] and "7.5" in table["GPU"] and table["GPU memory"].startswith("15.0 GiB")
    assert table["precision"].startswith("fp16 ") and "below 8.0" in table["precision"]
    assert "GB" in table["disk, free"]
    assert f"torch {torch.__version__}" in table["versions"] and "Kaggle" in table["versions"]


def test_a_p100_says_what_to_choose(monkeypatch, gpu):
    gpu("Tesla P100", (6, 0), works=False)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    rows, (advice,) = asnn.preflight()
    for part in ("cannot be used", "Tesla P100 (sm_60) has no kernels", "Settings > Accelerator > GPU T4 x2"):
        assert part in advice
    assert named(rows)["GPU"].startswith("none")


@pytest.mark.parametrize("variable, words", [
    ("KAGGLE_KERNEL_RUN_TYPE", "This Kaggle session has no GPU: choose Settings > Accelerator > GPU T4 x2"),
    ("COLAB_RELEASE_TAG", "This Colab session has no GPU: choose Runtime > Change runtime type > T4 GPU"), (None, None)])
def test_a_session_without_a_gpu_says_what_to_choose(monkeypatch, no_gpu, variable, words):
    if variable:
        monkeypatch.setenv(variable, "set")
    _, advice = asnn.preflight()
    assert [sentence.startswith(words) for sentence in advice] == ([True] if words else [])


def test_bf16_asked_for_on_a_t4_is_talked_out_of(gpu):
    gpu()
    _, (advice,) = asnn.preflight(precision="bf16")
    assert "Tesla T4 (compute capability 7.5) emulates it slowly: set precision = 'auto'" in advice
    gpu("A100", (8, 0))
    assert asnn.preflight(precision="bf16")[1] == []
    with pytest.raises(ValueError, match="precision is 'fp8'; allowed: auto, fp32, fp16, bf16"):
        asnn.preflight(precision="fp8")


def test_a_page_that_measures_the_cpu_says_so_and_asks_for_no_gpu(monkeypatch, gpu, no_gpu):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    cpu = torch.device("cpu")
    rows, advice = asnn.preflight(device=cpu, precision="fp32")
    table = named(rows)
    assert advice == [] and table["GPU"] == "none no CUDA device" and table["precision"].startswith("fp32 ")
    assert table["memory"].endswith("GiB of this machine") and float(table["memory"].split()[0]) > 0.1
    gpu()
    rows, advice = asnn.preflight(device=cpu, precision="fp32")
    assert advice == [] and named(rows)["GPU"] == "not used what is measured here is the CPU; there is Tesla T4, 15 GiB"
    assert "GPU memory" not in named(rows) and named(rows)["precision"].startswith("fp32 ")
    assert asnn.preflight(device=torch.device("cuda", 0)) == asnn.preflight()  # all that it may need is there


def test_a_card_that_cannot_be_used_is_named_to_a_page_that_trains_nothing(gpu):
    gpu("Tesla P100", (6, 0), works=False)
    rows, advice = asnn.preflight(device=torch.device("cpu"))
    assert advice == [] and named(rows)["GPU"].startswith("none Tesla P100 (sm_60) has no kernels")


def test_the_table_is_shown_and_what_to_do_stands_under_it(monkeypatch, no_gpu, capsys):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    asnn.show_preflight()
    printed = capsys.readouterr().out
    assert "no CUDA device" in printed and printed.endswith("Nothing to change: go on.\n")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    asnn.show_preflight()
    assert capsys.readouterr().out.splitlines()[-1].startswith("This Kaggle session has no GPU: choose Settings")


def test_too_little_memory_is_said_when_the_probe_runs_out_of_it(monkeypatch, gpu, task):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    gpu("GTX 1050", (7, 5), GiB=2)
    monkeypatch.setattr(asnn, "_probe", full)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    rows, (advice,) = asnn.preflight(task)
    assert "The GPU's 2 GiB do not hold this run" in advice and "Settings > Accelerator > GPU T4 x2" in advice
    assert "speed" not in named(rows) and "the run needs about" in named(rows)["GPU memory"]


def test_the_estimate_of_the_long_run_fits_a_t4_and_grows_with_the_batch():
    recipe = asnn.get_recipe("v14.4-t4")
    parts = asnn.training_memory(recipe, 50257, 124_439_808)
    assert 5 < sum(parts.values()) / 2**30 < 14 and parts["teacher weights, fp32"] == 4 * 124_439_808
    kept = [asnn.training_memory(asnn.get_recipe(name), 50257, 124_439_808)["activations kept for backward"]
            for name in ("v14.4", "v14.4-sites", "v14.4-rates")]
    assert kept == sorted(set(kept))  # encoders keep more, and rates that are held more than those
    shared = asnn.training_memory(recipe, 50257, 124_439_808, shares=8)
    moments = "student weights, gradients, at most two moments, fp32"
    assert shared[moments] == parts[moments] // 8 and shared == {**parts, moments: shared[moments]}
    double = asnn.training_memory(recipe.replace(batch_size=2 * recipe.batch_size), 50257, 124_439_808)
    assert {k for k in parts if double[k] != parts[k]} == {"activations kept for backward"}
    assert double["activations kept for backward"] == 2 * parts["activations kept for backward"]


@pytest.mark.parametrize("max_hours, platform, words", [
    (None, "kaggle", "12 h are allowed: set max_hours = 11"), (6.0, "kaggle", "Add Input"), (None, "local", None),
    (6.0, "local", "6 h are allowed: it stops in time and saves; then run all again"), (30.0, "local", None)])
def test_a_run_longer_than_the_session_is_told_how_to_go_on(monkeypatch, no_gpu, task, max_hours, platform, words):
    probed(monkeypatch, 20, 20 * 3600 * 20 / task.recipe.distill_steps)  # 20 hours altogether
    monkeypatch.setattr(asnn, "where_am_i", lambda: platform)
    rows, advice = asnn.preflight(task, max_hours=max_hours)
    advice = [sentence for sentence in advice if "no GPU" not in sentence]
    assert named(rows)["training"].startswith("20.00 h")
    assert len(advice) == bool(words) and all(words in sentence for sentence in advice)


def test_a_full_disk_is_said(monkeypatch, no_gpu, task):
    probed(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    rows, (advice,) = asnn.preflight(task)
    assert "The disk has 0.0 GB free" in advice and "delete outputs" in advice and "ASNN_OUTPUTS" in advice


def test_the_probe_makes_real_steps_and_changes_nothing(no_gpu, task, tmp_path):
    before = {name: p.clone() for name, p in task.teacher.model.state_dict().items()}
    rows, advice = asnn.preflight(task, "fp32", steps=20, seconds=60.0)
    assert advice == [] and f"probe of {task.recipe.distill_steps // 6} steps" in named(rows)["speed"]
    assert all(torch.equal(p, before[name]) for name, p in task.teacher.model.state_dict().items())
    assert not (tmp_path / "outputs").exists()
    # What is trained afterwards is what is trained without it.
    settings = asnn.FitConfig.from_recipe(task.recipe, precision="fp32", log_every=1)
    losses = []
    for steps in (1, 2):
        asnn.preflight(task, "fp32", steps=steps)
        losses.append([row["loss"] for row in asnn.distil(task, task.recipe, settings)[1].log if "loss" in row])
    assert losses[0] == losses[1]


def test_the_probe_ends_when_its_seconds_are_over(no_gpu, task):
    task = dataclasses.replace(task, recipe=task.recipe.replace(distill_steps=6000))
    rows, _ = asnn.preflight(task, "fp32", steps=1000, seconds=1e-6)
    assert "probe of 1 steps" in named(rows)["speed"]


# ---- trackers


def fit_with(distillation, folder, tracker, steps=None):
    objective, sampler, settings = distillation(settings=(("tracker", tracker), ("eval_every", 6)))
    measured = {"ppl": 7.0, "density": {"0.k": 0.25, "0.v": 0.5}}
    return asnn.fit(objective, sampler, settings, lambda: measured, folder, max_steps=steps)


def test_tensorboard_shows_what_the_log_holds(tmp_path, distillation):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit_with(distillation, tmp_path / "run", "tensorboard", steps=7)
    result = fit_with(distillation, tmp_path / "run", "tensorboard")  # resumed
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log == result.log
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("loss", "lr", "val_ppl"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in log if name in row] and found
    assert [event.value for event in events.Scalars("val_density/0.k")] == [0.25, 0.25]


@pytest.fixture
def trackio(monkeypatch):
    """A module in the place of trackio, and what accelerate gives it: {"runs", "config", "rows"}. As the real one it
    sends rows in groups: those of a run that is not finished are lost."""
    tracking = pytest.importorskip("accelerate.tracking")
    module, given = ModuleType("trackio"), {"runs": [], "config": [], "rows": []}

    class TrackioRun:
        def __init__(self):
            self.waiting = []

        def log(self, metrics, step=None):
            assert all(isinstance(value, (bool, str, float, int)) for value in metrics.values())
            self.waiting.append((step, dict(metrics)))

        def finish(self):
            given["rows"] += self.waiting
            self.waiting = None

    def init(project, name=None):
        given["runs"].append((project, name))
        return TrackioRun()
    module.init = init
    module.config = SimpleNamespace(update=lambda values, allow_val_change: given["config"].append(values))
    monkeypatch.setitem(sys.modules, "trackio", module)
    if tracking.LoggerType.TRACKIO not in tracking.get_available_trackers():  # accelerate looks once, as it is imported
        available = [*tracking.get_available_trackers(), tracking.LoggerType.TRACKIO]
        monkeypatch.setattr(tracking, "_available_trackers", available)
    return given


def test_trackio_is_given_every_row_of_the_log(tmp_path, distillation, trackio):
    folder = tmp_path / "v14.3" / "night"
    fit_with(distillation, folder, "trackio", steps=7)
    assert len(trackio["rows"]) == 8  # a row for each step, and an evaluation
    result = fit_with(distillation, folder, "trackio")  # resumed
    assert trackio["runs"] == [("asnn-goose", "v14.3/night")] * 2
    assert [values["lr"] for values in trackio["config"]] == [2e-3] * 2
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log == result.log and len(log) == 14
    expected = []
    for row in log:
        flat = {name: value for name, value in row.items() if name not in ("step", "val_density") and value is not None}
        flat |= {f"val_density/{site}": share for site, share in row.get("val_density", {}).items()}
        expected.append((row["step"], flat))
    assert trackio["rows"] == expected


def test_without_a_tracker_there_is_the_log_alone_and_the_same_run(tmp_path, distillation):
    pytest.importorskip("tensorboard")
    alone, tracked = (fit_with(distillation, tmp_path / name, tracker) for name, tracker in (
        ("alone", None), ("tracked", "tensorboard")))
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == ["checkpoint.pt", "log.jsonl"]
    speed = "tokens_per_second"
    assert [{k: v for k, v in row.items() if k != speed} for row in alone.log] == [
        {k: v for k, v in row.items() if k != speed} for row in tracked.log]


def test_a_checkpoint_goes_on_with_another_tracker(tmp_path, distillation):
    fit_with(distillation, tmp_path / "run", None, steps=7)
    pytest.importorskip("tensorboard")
    assert fit_with(distillation, tmp_path / "run", "tensorboard").finished


def test_a_tracker_that_is_unknown_or_missing_is_refused_before_training(monkeypatch):
    with pytest.raises(ValueError, match="FitConfig.tracker is 'wandb'; allowed: None, tensorboard, trackio"):
        asnn.FitConfig(10, 2, 1e-3, 16, tracker="wandb")

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")
    monkeypatch.setattr(importlib, "import_module", missing)
    for name in asnn.TRACKERS:
        with pytest.raises(ImportError, match=f"{name} is needed here and is not installed: pip install {name}."):
            asnn.FitConfig(10, 2, 1e-3, 16, tracker=name)
