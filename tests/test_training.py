"""Training: every recipe, exact resume, interruptions, several processes, evaluation, building students."""
import dataclasses
import itertools
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import asnn_common as asnn

ROOT = Path(asnn.__file__).resolve().parent


def same(a, b):
    """Equality to the bit of nested states."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def without_speed(log):
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in log]


def weights(objective):
    return {name: value.detach().clone() for name, value in objective.named_parameters()}


def series(*values):
    """An evaluation that returns the given perplexities one after the other."""
    left = list(values)
    return lambda: {"ppl": left.pop(0)}


# ---- recipes


@pytest.mark.parametrize("name", asnn.RECIPES)
def test_every_recipe_trains(name, small_recipe, teacher, tokens):
    recipe = small_recipe(name, distill_steps=3, fdd_start=1, eval_every=3)
    if recipe.teacher == "untrained-goose":
        teacher = asnn.untrained_goose_teacher(recipe, teacher.tokenizer)
    sampler = asnn.distillation_sampler(recipe, tokens["train"], teacher.model)
    student = asnn.build_student(recipe, teacher, calibration=sampler.batch(0, 8)[0])
    objective = asnn.Distiller(student, teacher.model, recipe)
    before = weights(objective)
    result = asnn.fit(objective, sampler, asnn.FitConfig.from_recipe(recipe, precision="fp32", log_every=1),
                      lambda: {"ppl": asnn.evaluate(student, tokens["validation"], 16, windows=4).ppl})
    rows = [row for row in result.log if "loss" in row]
    assert (result.step, result.stopped, result.nonfinite, len(rows)) == (3, "completed", 0, 3)
    assert all(math.isfinite(row[key]) for row in rows for key in row)
    assert math.isfinite(result.best_ppl) and result.best_step == 3
    assert ["fdd" in row for row in rows] == [False, recipe.fdd != "none", recipe.fdd != "none"]
    frozen = {key for key, value in weights(objective).items() if torch.equal(value, before[key])}
    assert {key for key in frozen if "alpha" not in key} <= {"temperature.logit"}


def test_pocl_visits_easy_windows_first(small_recipe, teacher, tokens):
    recipe = small_recipe("v13", distill_steps=30)
    sampler = asnn.distillation_sampler(recipe, tokens["train"], teacher.model)
    assert len(sampler.order) == 30 * recipe.batch_size
    losses = [asnn.LanguageModelling(teacher.model)(*sampler.batch(40 * third, 40))[1]["ce"] for third in range(3)]
    assert losses[0] < losses[1] < losses[2]


def test_the_loss_goes_down_and_the_teacher_stays(distillation, tokens):
    objective, sampler, settings = distillation(distill_steps=60, batch_size=8, lr=5e-3)
    teacher = {name: value.clone() for name, value in objective.teacher.state_dict().items()}
    before = asnn.evaluate(objective.student, tokens["validation"], 16).ppl
    log = asnn.fit(objective, sampler, settings).log
    assert np.mean([row["kd"] for row in log[-5:]]) < 0.7 * np.mean([row["kd"] for row in log[:5]])
    assert asnn.evaluate(objective.student, tokens["validation"], 16).ppl < 0.7 * before
    assert same(teacher, dict(objective.teacher.state_dict()))
    assert not any(p.requires_grad for p in objective.teacher.parameters()) and not objective.teacher.training


def test_the_teacher_is_in_no_checkpoint(distillation, tmp_path):
    objective, sampler, settings = distillation(distill_steps=1)
    asnn.fit(objective, sampler, settings, folder=tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(saved["objective"]) == set(objective.state_dict())
    assert all(key.split(".")[0] in ("student", "temperature", "_extra_state") for key in saved["objective"])
    trained = sum(len(group["params"]) for group in saved["optimizer"]["param_groups"])
    assert trained == len(list(objective.parameters()))


# ---- resuming


@pytest.mark.parametrize("name, overrides", [
    ("v14.3", {"fdd_start": 60}), ("v10", {}), ("v7", {}),
    ("v14.4", {"align_steps": 50, "ce_start": 60, "anneal_steps": 70, "head_width": 16})])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(distillation, tokens, tmp_path, name, overrides):
    def run(folder, max_steps=None):
        objective, sampler, settings = distillation(name, {"eval_every": 20}, distill_steps=100, batch_size=2,
                                                    patience=10**6, **overrides)
        result = asnn.fit(objective, sampler, settings, lambda: {"ppl": asnn.evaluate(
            objective.student, tokens["validation"], 16, windows=4).ppl}, tmp_path / folder, max_steps=max_steps)
        return objective, result

    whole, expected = run("whole")
    _, first = run("parts", 50)
    assert (first.step, first.stopped, first.finished) == (50, "step limit", False)
    parts, second = run("parts")
    assert second.step == 100 and second.finished
    assert same(weights(whole), weights(parts))
    assert without_speed(second.log) == without_speed(expected.log)
    assert (second.best_ppl, second.best_step) == (expected.best_ppl, expected.best_step)
    saved = [torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True) for folder in ("whole", "parts")]
    assert all(same(saved[0][key], saved[1][key]) for key in saved[0]
               if key not in ("log", "trained_seconds", "peak"))  # these three tell of the clock
    if name == "v14.3":
        assert expected.log[0]["tau"] != expected.log[-2]["tau"]
    if name == "v14.4":
        assert [row["step"] for row in expected.log if "align" in row] == list(range(1, 51))
    rows = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert rows == second.log


def test_a_finished_run_is_not_trained_again(distillation, tmp_path):
    objective, sampler, settings = distillation(distill_steps=3)
    asnn.fit(objective, sampler, settings, folder=tmp_path)
    again = distillation(distill_steps=3)[0]
    torch.nn.init.zeros_(again.student.goose.ln_f.weight)
    result = asnn.fit(again, sampler, settings, folder=tmp_path)
    assert (result.step, result.stopped) == (3, "completed") and same(weights(again), weights(objective))


@pytest.mark.parametrize("name, old, new", [("lr", 0.002, 0.003), ("batch_size", 4, 2), ("steps", 4, 5),
                                            ("seed", 42, 7)])
def test_resume_refuses_other_settings_by_name(distillation, tmp_path, name, old, new):
    objective, sampler, settings = distillation(distill_steps=4)
    asnn.fit(objective, sampler, settings, folder=tmp_path, max_steps=1)
    other = dataclasses.replace(settings, **{name: new})
    with pytest.raises(ValueError, match=f"checkpoint.pt was made with {name} {old} and this run has {new}; choose"):
        asnn.fit(objective, sampler, other, folder=tmp_path)


def test_resume_refuses_other_data(distillation, tmp_path):
    objective, sampler, settings = distillation(distill_steps=4)
    asnn.fit(objective, sampler, settings, folder=tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="was made with data '.*' and this run has '.*'"):
        asnn.fit(objective, asnn.WindowSampler(sampler.tokens[:-16], 16, 42), settings, folder=tmp_path)


def test_a_resume_between_evaluations_does_not_stop_early(distillation, tmp_path):
    """Patience is judged at evaluations alone: step 50 is 30 steps after the best one and yet no reason to stop."""
    def run(folder, evaluation, max_steps=None):
        return asnn.fit(*distillation(settings={"eval_every": 20, "patience": 25}, distill_steps=60), evaluation,
                        tmp_path / folder, max_steps=max_steps)

    assert run("whole", series(10.0, 11.0, 9.0)).stopped == "completed"
    run("parts", series(10.0, 11.0), 50)
    resumed = run("parts", series(9.0))
    assert (resumed.step, resumed.stopped, resumed.best_ppl) == (60, "completed", 9.0)


def test_a_run_that_stopped_early_stays_stopped(distillation, tmp_path):
    arguments = distillation(settings={"eval_every": 2, "patience": 4}, distill_steps=20)
    assert asnn.fit(*arguments, series(10.0, 11.0, 12.0), tmp_path).stopped == "early stopping"
    again = asnn.fit(*arguments, series(), tmp_path)
    assert (again.step, again.stopped) == (6, "early stopping")


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import numpy as np, torch, transformers
import asnn_common as asnn

def objective(name, **overrides):
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.0,
                                     resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    teacher = asnn.Teacher(transformers.GPT2LMHeadModel(config).eval(), None, "random")
    sizes = {"d_model": 16, "n_layer": 2, "seq_len": 16, "batch_size": 4, "distill_steps": 6, "lr": 1e-2,
             "fdd_start": 10**6, "layer_map": ((0, 0), (1, 1)), **overrides}
    recipe = asnn.get_recipe(name, **sizes)
    made = asnn.Distiller(asnn.build_student(recipe, teacher), teacher.model, recipe)
    tokens = np.random.default_rng(0).integers(0, 64, 4000).astype(np.uint16)
    sampler = asnn.WindowSampler(tokens, 16, 42)
    settings = asnn.FitConfig.from_recipe(recipe, precision="fp32", log_every=1, save_every=2, patience=None,
                                          eval_every=10**6)
    return made, sampler, settings
"""

KILLED = SCRIPT + """
if __name__ == "__main__":
    save, count = torch.save, 0

    def half(payload, file):
        global count
        count += 1
        if count < 2:
            return save(payload, file)
        import io
        whole = io.BytesIO()
        save(payload, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    asnn.fit(*objective("v14.3"), folder=Path(sys.argv[1]))
"""

CURVES = SCRIPT + """
import accelerate
rank, written = os.environ.get("RANK", "0"), []
place = Path(sys.argv[1])

def watch(event, args):
    if event == "open" and str(place) in str(args[0]) and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        written.append(str(args[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove") and str(place) in str(args[0]):
        written.append(str(args[0]))

sys.addaudithook(watch)
curves = {}
v14_4 = {"head_width": 8, "lr": 1e-3, "matrix_lr": 1e-3, "ce_start": 0, "anneal_steps": 0}
for key, name, overrides in (("v14.3", "v14.3", {}), ("v14.3-published", "v14.3-published", {}),
                             ("v7", "v7", {"grad_accum": 2}), ("v14.4", "v14.4", {**v14_4, "align_steps": 0}),
                             ("aligned", "v14.4", {**v14_4, "align_steps": 3})):
    result = asnn.fit(*objective(name, **overrides))
    curves[key] = [[row["loss"], row["align" if "align" in row else "kd"], row["grad_norm"]] for row in result.log]

# A step whose second part is not finite: it is left out, with all that its first part has left.
calls, plain = [0], asnn.Distiller.forward

def poisoned(self, *args, **more):
    loss, terms = plain(self, *args, **more)
    calls[0] += 1
    return loss * (float("nan") if calls[0] == 6 else 1.0), terms

asnn.Distiller.forward = poisoned
result = asnn.fit(*objective("v14.3", grad_accum=2))
asnn.Distiller.forward = plain
curves["poisoned"] = [[row["loss"], row["kd"], row["grad_norm"]] for row in result.log]

# An evaluation, of batches that cannot be shared out evenly; then a run that evaluates, saves and finishes.
made, sampler, settings = objective("v14.3")
held_out = np.random.default_rng(1).integers(0, 64, 16 * 13 + 6).astype(np.uint16)
curves["evaluation"] = [[part.ppl, part.nll, part.nll_se, part.tokens, *part.window_nll] for part in (
    asnn.evaluate(made.student, held_out, 16, batch_size=3), asnn.evaluate(made.student, held_out[:10], 16))]
run = asnn.Run.open("v14.3", "several", {}, place)
settings = asnn.dataclasses.replace(settings, eval_every=3)
result = asnn.fit(made, sampler, settings, lambda: {"ppl": asnn.evaluate(made.student, held_out, 16).ppl}, run.folder)
curves["validation"] = [[row["val_ppl"]] for row in result.log if "val_ppl" in row]
asnn.results_table = lambda metrics: ""
run.finish({})
(place.parent / f"{place.name}.{rank}.json").write_text(json.dumps(
    {"processes": accelerate.PartialState().num_processes, "written": written, **curves}))
"""

SHARDED = SCRIPT + """
ARGUMENTS = {"v14.3": {}, "v14.4": {"head_width": 8, "lr": 1e-3, "matrix_lr": 1e-3, "ce_start": 0, "anneal_steps": 0,
                                    "align_steps": 3, "grad_accum": 2}}
if __name__ == "__main__":
    place, parts = Path(sys.argv[1]), []
    keep = asnn.ShardedObjective.optimizer_state
    asnn.ShardedObjective.optimizer_state = lambda self, optimizer: parts.append((self, optimizer)) or keep(self, optimizer)
    for name, more in ARGUMENTS.items():
        made, sampler, settings = objective(name, batch_size=6, **more)
        asnn.fit(made, sampler, settings, folder=place / name / "begun", max_steps=3)
        shards, optimizer = parts[-1]
        held = sum(p.to_local().numel() for p in shards.matrices) + sum(
            x.to_local().numel() for state in optimizer.state.values() for x in state.values() if hasattr(x, "to_local"))
        whole = sum(p.numel() for p in shards.matrices) + sum(
            x.numel() for state in optimizer.state.values() for x in state.values() if hasattr(x, "to_local"))
        made, sampler, settings = objective(name, batch_size=6, **more)
        torch.nn.init.zeros_(made.student.goose.embeddings.weight)
        asnn.fit(made, sampler, settings, folder=place / name / "half")
        assert all(type(p) is torch.nn.Parameter for p in made.parameters())
        torch.save({"held": held, "whole": whole, "weights": made.state_dict()}, place / name / f"{os.environ['RANK']}.pt")
"""


def in_a_process(command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True,
                          timeout=300)


def test_a_run_killed_while_it_saves_resumes_from_the_last_whole_checkpoint(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    ended = in_a_process([script, tmp_path / "run"])
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert list((tmp_path / "run").glob(".checkpoint.pt.*.tmp"))
    objective = runpy.run_path(str(script))["objective"]
    resumed, whole = objective("v14.3"), objective("v14.3")
    torch.nn.init.zeros_(resumed[0].student.goose.embeddings.weight)
    result, expected = asnn.fit(*resumed, folder=tmp_path / "run"), asnn.fit(*whole)
    assert not list((tmp_path / "run").glob(".checkpoint.pt.*.tmp"))  # what the killed save left is gone
    assert result.step == 6 and without_speed(result.log) == without_speed(expected.log)
    assert same(weights(resumed[0]), weights(whole[0]))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """(script, what it measures in a single process)."""
    place = tmp_path_factory.mktemp("curves")
    script = place / "curves.py"
    script.write_text(CURVES)
    ended = in_a_process([script, place / "one"])
    assert ended.returncode == 0, ended.stderr[-3000:]
    return script, json.loads((place / "one.0.json").read_text())


def launch(script, *arguments, count=2, sharded=False):
    """The script in several processes, which share the weights out or not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # --multi_gpu also where there is no GPU: without it accelerate starts a single process.
    return in_a_process(["-m", "accelerate.commands.launch", "--use_fsdp" if sharded else "--multi_gpu",
                         "--num_processes", count, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend",
                         "no", "--main_process_port", port, script, *arguments])


@pytest.mark.parametrize("count, sharded", [(2, False), (4, False), (2, True)])
def test_several_processes_give_the_loss_curve_of_one_and_one_of_them_writes(tmp_path, one_process, count, sharded):
    script, one = one_process
    ended = launch(script, tmp_path / "all", count=count, sharded=sharded)
    assert ended.returncode == 0, ended.stderr[-3000:]
    several = [json.loads((tmp_path / f"all.{rank}.json").read_text()) for rank in range(count)]
    assert one["processes"] == 1 and one["written"]
    for rank, measured in enumerate(several):
        assert measured["processes"] == count and bool(measured["written"]) == (rank == 0)
        assert measured["evaluation"] == one["evaluation"]  # to the bit
        for name in one.keys() - {"processes", "written", "evaluation"}:
            assert len(one[name]) == {"validation": 2, "poisoned": 5}.get(name, 6)
            np.testing.assert_allclose(measured[name], one[name], atol=1e-4, rtol=1e-3, err_msg=name)


def test_a_run_goes_on_with_its_weights_shared_out_and_back_in_one_process(tmp_path):
    """Three processes, which divide no matrix evenly; with AdamW, and with Muon and alignment."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    begun = runpy.run_path(str(script))
    runs = {name: {"batch_size": 6, **more} for name, more in begun["ARGUMENTS"].items()}
    whole = {}
    for name, more in runs.items():
        asnn.fit(*begun["objective"](name, **more), folder=tmp_path / name / "half", max_steps=3)
        made = begun["objective"](name, **more)
        asnn.fit(*made)
        whole[name] = weights(made[0])
    ended = launch(script, tmp_path, count=3, sharded=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name, more in runs.items():
        one, several = (torch.load(tmp_path / name / run / "checkpoint.pt", weights_only=True) for run in ("half", "begun"))
        assert one["step"] == 6 and several["step"] == 3
        assert one["optimizer"]["state"].keys() == several["optimizer"]["state"].keys()
        made = begun["objective"](name, **more)
        asnn.fit(*made, folder=tmp_path / name / "begun")
        ends = {"begun": weights(made[0])}
        for rank in range(3):
            saved = torch.load(tmp_path / name / f"{rank}.pt", weights_only=True)
            assert saved["held"] < 0.45 * saved["whole"]
            ends[f"half, process {rank}"] = saved["weights"]
        for end, values in ends.items():
            for part, value in whole[name].items():
                torch.testing.assert_close(values[part], value, rtol=1e-3, atol=2e-5, msg=f"{name}, {end}, {part}")


# ---- ends of a run


@pytest.mark.parametrize("share, step", [(0.94, 8), (0.951, 3)])
def test_a_run_ends_at_95_percent_of_its_hours(distillation, monkeypatch, share, step):
    """A minute, on a clock that moves by a microsecond at each look and by almost all of the minute in the third step."""
    objective, sampler, settings = distillation(distill_steps=8)
    looks, jump, plain = itertools.count(), [0.0], objective.forward

    def forward(input_ids, labels, step=0, want_ce=True):
        jump[0] = 60 * share if step >= 2 else 0.0
        return plain(input_ids, labels, step, want_ce)

    objective.forward = forward
    monkeypatch.setattr(asnn.time, "perf_counter", lambda: 1e-6 * next(looks) + jump[0])
    result = asnn.fit(objective, sampler, dataclasses.replace(settings, max_hours=1 / 60))
    assert (result.step, result.finished) == (step, step == 8)


def test_the_time_budget_stops_saves_and_is_resumed(distillation, tmp_path):
    objective, sampler, settings = distillation(distill_steps=4)
    result = asnn.fit(objective, sampler, dataclasses.replace(settings, max_hours=1e-9), folder=tmp_path)
    assert (result.step, result.stopped, result.finished) == (1, "time budget", False)
    again, sampler, settings = distillation(distill_steps=4)
    assert asnn.fit(again, sampler, settings, folder=tmp_path).step == 4
    whole = distillation(distill_steps=4)
    asnn.fit(*whole)
    assert same(weights(again), weights(whole[0]))


def poison(objective, steps, value=math.nan):
    """Makes the loss of some steps not finite."""
    forward = objective.forward

    def poisoned(input_ids, labels, step=0, want_ce=True):
        loss, terms = forward(input_ids, labels, step, want_ce)
        return (loss * value, {**terms, "kd": terms["kd"] * value}) if step in steps else (loss, terms)

    objective.forward = poisoned


# With every step skipped, torch takes the schedule for one that is stepped before its optimiser.
@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(distillation, value):
    objective, sampler, settings = distillation(distill_steps=3)
    poison(objective, {0, 1, 2}, value)
    before = weights(objective)
    result = asnn.fit(objective, sampler, settings)
    assert result.nonfinite == 3 and result.step == 3 and same(before, weights(objective))


def test_training_goes_on_after_a_step_that_is_not_finite(distillation):
    objective, sampler, settings = distillation(distill_steps=4)
    poison(objective, {1})
    result = asnn.fit(objective, sampler, settings)
    assert result.nonfinite == 1 and [row["step"] for row in result.log] == [1, 3, 4]
    assert all(value.isfinite().all() for value in weights(objective).values())


@pytest.mark.parametrize("name", ["v14.3", "v14.4"])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(distillation, name):
    objective, sampler, settings = distillation(name, distill_steps=2)
    objective.student.goose.ln_f.weight.register_hook(lambda grad: grad * math.nan)
    before = weights(objective)
    result = asnn.fit(objective, sampler, settings)
    assert result.nonfinite == 2 and same(before, weights(objective))


def test_too_many_steps_that_are_not_finite_end_the_run_by_name(distillation):
    objective, sampler, settings = distillation(settings={"nonfinite_limit": 2}, distill_steps=9)
    poison(objective, range(1, 9))
    with pytest.raises(asnn.NonFiniteLoss, match="Step 3: kd is nan; 3 steps were not finite, at most 2 are skipped"):
        asnn.fit(objective, sampler, settings)


def test_early_stopping_ends_the_run_and_restores_the_best_weights(distillation):
    objective, sampler, settings = distillation(settings={"eval_every": 2, "patience": 4, "min_delta": 0.5},
                                                distill_steps=20)
    seen = []
    perplexities = iter((50.0, 40.0, 45.0, 39.8))

    def evaluation():
        seen.append(weights(objective))
        return {"ppl": next(perplexities)}

    result = asnn.fit(objective, sampler, settings, evaluation)
    assert (result.step, result.stopped, result.finished) == (8, "early stopping", True)
    assert (result.best_ppl, result.best_step) == (39.8, 8)
    assert same(weights(objective), seen[3])


def test_the_best_weights_are_restored_after_the_last_step(distillation):
    objective, sampler, settings = distillation(settings={"eval_every": 2}, distill_steps=6)
    seen = []
    perplexities = iter((30.0, 20.0, 25.0))

    def evaluation():
        seen.append(weights(objective))
        return {"ppl": next(perplexities)}

    result = asnn.fit(objective, sampler, settings, evaluation)
    assert result.best_step == 4 and same(weights(objective), seen[1]) and not same(seen[1], seen[2])


@pytest.mark.parametrize("where", ["batch", "optimizer", "scheduler", "evaluation"])
def test_an_interrupted_run_resumes_to_the_same_end(distillation, tmp_path, monkeypatch, where):
    def run(folder, interrupt=False):
        objective, sampler, settings = distillation(settings={"eval_every": 3}, distill_steps=6)

        def evaluation():
            if interrupt and where == "evaluation":
                raise KeyboardInterrupt
            return {"ppl": float(objective.student.goose.ln_f.weight.detach().sum())}

        with monkeypatch.context() as patch:
            if interrupt:
                calls = {"n": 0}

                def third(original):
                    def call(*args, **kwargs):
                        result = original(*args, **kwargs)
                        calls["n"] += 1
                        if calls["n"] == 3:
                            raise KeyboardInterrupt
                        return result
                    return call

                if where == "batch":
                    patch.setattr(sampler, "batch", third(sampler.batch))
                if where == "optimizer":
                    patch.setattr(torch.optim.AdamW, "step", third(torch.optim.AdamW.step))
                if where == "scheduler":
                    kind = torch.optim.lr_scheduler.LambdaLR
                    patch.setattr(kind, "get_last_lr", third(kind.get_last_lr))
            return objective, asnn.fit(objective, sampler, settings, evaluation, tmp_path / folder)

    with pytest.raises(KeyboardInterrupt):
        run("parts", interrupt=True)
    if where == "batch":  # between two updates there is something whole to save
        assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == 2
    resumed, result = run("parts")
    whole, expected = run("whole")
    assert without_speed(result.log) == without_speed(expected.log) and same(weights(resumed), weights(whole))


# ---- arithmetic


def test_accumulated_batches_equal_one_large_batch(distillation):
    curves = []
    for size, accumulated in ((8, 1), (4, 2)):
        objective, sampler, settings = distillation(distill_steps=5, batch_size=size, grad_accum=accumulated)
        log = asnn.fit(objective, sampler, settings).log
        curves.append([(row["loss"], row["kd"], row["grad_norm"]) for row in log])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_weight_decay_is_for_matrices(distillation):
    objective = distillation("v7")[0]
    groups = asnn.parameter_groups(objective, 0.1)
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("matrices", 0.1), ("embeddings", 0.1),
                                                                ("vectors", 0.0)]
    assert not any("lr" in group for group in groups)
    matrices, embeddings, vectors = ({id(p) for p in group["params"]} for group in groups)
    goose = objective.student.goose
    assert embeddings == {id(goose.embeddings.weight), id(goose.positions.weight)}  # the head is tied to them
    linear = [m for m in objective.modules() if isinstance(m, torch.nn.Linear)]
    assert matrices == {id(m.weight) for m in linear} - {id(objective.student.lm_head.weight)}
    assert vectors == {id(p) for p in objective.parameters() if p.dim() < 2}
    assert sum(len(g["params"]) for g in groups) == len(list(objective.parameters()))


@pytest.mark.parametrize("matrix_lr, rates", [(None, [2e-3, 2e-3, 2e-3]), (5e-3, [5e-3, 2e-3, 2e-3])])
def test_matrices_may_have_a_rate_of_their_own(distillation, matrix_lr, rates):
    groups = asnn.parameter_groups(distillation("v14.4")[0], 0.1, 2e-3, matrix_lr)
    assert [(g["name"], g["lr"]) for g in groups] == list(zip(("matrices", "embeddings", "vectors"), rates))


def test_frozen_parameters_are_in_no_group(distillation):
    objective = distillation()[0]
    objective.student.goose.embeddings.requires_grad_(False)
    objective.student.goose.positions.requires_grad_(False)
    assert [g["name"] for g in asnn.parameter_groups(objective, 0.1)] == ["matrices", "vectors"]


@pytest.mark.parametrize("schedule", asnn.SCHEDULES)
def test_the_schedule_rises_and_then_falls_as_its_name_says(distillation, schedule):
    objective, sampler, settings = distillation(distill_steps=10, warmup_ratio=0.2, schedule=schedule)
    rates = [row["lr"] / settings.lr for row in asnn.fit(objective, sampler, settings).log]
    left = [1 - step / 8 for step in range(8)]
    falling = left if schedule == "linear" else [0.5 * (1 + math.cos(math.pi * (1 - x))) for x in left]
    assert rates == pytest.approx([0.0, 0.5, *falling])


def test_the_rate_in_the_log_is_that_of_the_recipe(distillation):
    """And not that of the matrices, which may be another."""
    objective, sampler, settings = distillation("v14.4", distill_steps=3, warmup_ratio=0.0, matrix_lr=7e-3,
                                                optimizer="muon")
    assert asnn.fit(objective, sampler, settings).log[0]["lr"] == settings.lr == 2e-3


# ---- Muon


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (32, 32), (1, 16)])
def test_orthogonalise_moves_singular_values_to_one_and_keeps_their_directions(shape):
    """In fp64 it is U p(S) V^T with the polynomial applied five times, to the rounding."""
    matrix = 7 * torch.randn(shape, dtype=torch.float64)
    if shape == (32, 32):
        matrix = matrix + 40 * torch.eye(32)  # no singular value next to zero, from which five steps do not suffice
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    x = S / matrix.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    got = asnn.orthogonalise(matrix, dtype=torch.float64)
    torch.testing.assert_close(got, U @ torch.diag(x) @ V, rtol=1e-9, atol=1e-9)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.linalg.svdvals(asnn.orthogonalise(matrix.float(), dtype=dtype).double())
        assert asnn.orthogonalise(matrix.float(), dtype=dtype).dtype == dtype
        assert 0.6 < values.min() and values.max() < 1.3


def test_orthogonalise_leaves_zeros_and_its_argument_alone():
    matrix = torch.randn(5, 9)
    copy = matrix.clone()
    asnn.orthogonalise(matrix)
    assert torch.equal(matrix, copy) and not asnn.orthogonalise(torch.zeros(4, 6)).any()


class Small(torch.nn.Module):
    """One of each kind of parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.words, self.up = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 24)
        self.down, self.norm = torch.nn.Linear(24, 8, bias=False), torch.nn.LayerNorm(8)


def muon(model, dtype):
    optimizer = asnn.Muon(asnn.parameter_groups(model, 0.1, 3e-3, 1e-2), 3e-3, (0.9, 0.95))
    optimizer.dtype = dtype
    return optimizer


def descend(model, optimizers, steps, start=0):
    """Steps along given gradients, the same for every optimiser; one of them is None in the second step."""
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            if step == 1 and name in ("down.weight", "norm.bias"):
                p.grad = None
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own")
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 3e-2)])
def test_muon_is_torchs_muon_for_matrices_and_adamw_for_the_rest(dtype, tolerance):
    """But for the rounding of the iteration, which torch does in bf16."""
    ours, theirs = Small(), Small()
    start = weights(ours)
    matrices, *rest = asnn.parameter_groups(theirs, 0.1)
    descend(ours, [muon(ours, dtype)], 6)
    descend(theirs, [torch.optim.Muon(matrices["params"], lr=1e-2, weight_decay=0.1, momentum=0.95,
                                      adjust_lr_fn="match_rms_adamw"),
                     torch.optim.AdamW([{k: v for k, v in g.items() if k != "name"} for g in rest], lr=3e-3,
                                       betas=(0.9, 0.95), fused=True)], 6)
    other = weights(theirs)
    for name, value in weights(ours).items():
        moved = (other[name] - start[name]).norm()
        allowed = tolerance if name in ("up.weight", "down.weight") else 1e-6
        assert moved > 0 and (value - other[name]).norm() <= allowed * moved, name


def test_muon_moves_a_matrix_by_the_rate_times_the_size_of_an_adamw_step():
    model = Small()
    before = model.up.weight.detach().clone()
    descend(model, [muon(model, torch.float32)], 1)
    moved = (model.up.weight.detach() - before * (1 - 1e-2 * 0.1)).square().mean().sqrt().item()
    assert moved == pytest.approx(1e-2 * 0.2, rel=0.3)


def test_a_muon_that_was_saved_and_loaded_goes_on_the_same():
    whole, parts = Small(), Small()
    descend(whole, [muon(whole, torch.float32)], 6)
    first = muon(parts, torch.float32)
    descend(parts, [first], 3)
    saved = first.state_dict()
    assert len(saved["param_groups"]) == 3 and len(saved["state"]) == len(list(parts.parameters()))
    second = muon(parts, torch.float32)
    second.load_state_dict(saved)
    descend(parts, [second], 3, start=3)
    assert same(weights(whole), weights(parts))


@pytest.mark.parametrize("poisoned", ["up.weight", "norm.bias"])
def test_a_scaler_skips_both_parts_of_muon_together(poisoned):
    model = Small()
    optimizer, scaler = muon(model, torch.float32), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = weights(model)
    scaler.scale(sum(p.square().sum() for p in model.parameters())).backward()
    model.get_parameter(poisoned).grad[..., 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert same(weights(model), before) and scaler.get_scale() == 2.0
    optimizer.zero_grad()
    scaler.scale(sum((p + 1).square().sum() for p in model.parameters())).backward()
    scaler.step(optimizer)
    assert not any(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_muon_computes_in_what_the_device_of_the_weights_is_fast_at(monkeypatch):
    """`fit` moves the weights after it has made the optimiser, so that the time to ask is the step."""
    seen = []
    original = asnn.orthogonalise
    monkeypatch.setattr(asnn, "orthogonalise", lambda matrix, steps=5, dtype=torch.float32: (
        seen.append(dtype), original(matrix, steps, dtype))[1])
    model = Small()
    monkeypatch.setattr(asnn, "select_precision", lambda *_: ("fp32", "where the weights were made"))
    optimizer = asnn.Muon(asnn.parameter_groups(model, 0.1), 1e-3)
    monkeypatch.setattr(asnn, "select_precision", lambda *_: ("bf16", "where they are now"))
    descend(model, [optimizer], 1)
    assert set(seen) == {torch.bfloat16}


def test_automatic_precision_names_its_reason(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(asnn, "_cpu_bf16_flags", lambda: ["amx_bf16"])
    assert asnn.select_precision(cpu) == ("bf16", "bf16: the CPU has amx_bf16")
    monkeypatch.setattr(asnn, "_cpu_bf16_flags", lambda: [])
    assert asnn.select_precision(cpu) == ("fp32", "fp32: the CPU has no bf16 units")
    for capability, expected in (((7, 5), "fp16"), ((8, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        precision, reason = asnn.select_precision(torch.device("cuda"))
        assert precision == expected and f"{capability[0]}.{capability[1]}" in reason
    assert asnn.select_precision(cpu, "fp32") == ("fp32", "fp32: asked for")
    with pytest.raises(ValueError, match="precision is 'fp8'; allowed: auto, fp32, fp16, bf16"):
        asnn.select_precision(cpu, "fp8")


def test_bf16_trains_and_leaves_fp32_weights_without_autocast(distillation, batch_of_tokens):
    objective, sampler, settings = distillation(settings={"precision": "bf16"}, distill_steps=2)
    result = asnn.fit(objective, sampler, settings)
    assert result.precision == "bf16" and math.isfinite(result.log[-1]["loss"])
    assert {p.dtype for p in objective.parameters()} == {torch.float32}
    assert objective.student(batch_of_tokens).logits.dtype == torch.float32


@pytest.fixture
def batch_of_tokens(tokens):
    return torch.from_numpy(tokens["train"][:64].astype(np.int64)).view(4, 16)


# ---- evaluation


@pytest.fixture
def student(distillation):
    return distillation()[0].student


def brute_force(model, tokens, seq_len):
    """NLL of every token but the first, each from the tokens before it in its window, and windows' lengths."""
    losses = []
    for start in range(0, len(tokens) - 1, seq_len):
        ids = torch.from_numpy(tokens[start:start + seq_len + 1].astype(np.int64)).unsqueeze(0)
        nll = F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="none")
        losses.append(nll.detach().double().numpy())
    return losses


@pytest.mark.parametrize("length", [2, 16, 17, 18, 100])
def test_evaluation_scores_every_token_once(student, tokens, length):
    part = tokens["validation"][:length]
    losses = brute_force(student.eval(), part, 16)
    result = asnn.evaluate(student, part, 16, batch_size=3, size={"bytes": 400, "words": 70})
    assert result.tokens == length - 1 and result.windows == len(losses) == math.ceil((length - 1) / 16)
    total = sum(loss.sum() for loss in losses)
    assert result.nll == pytest.approx(total / (length - 1), rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(result.nll))
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / 400, rel=1e-6)
    assert result.word_ppl == pytest.approx(math.exp(total / 70), rel=1e-6)
    np.testing.assert_allclose(result.window_nll, [loss.mean() for loss in losses], rtol=1e-5)
    assert math.isfinite(result.nll_se) and (result.nll_se > 0) == (len(losses) > 1)


def test_the_standard_error_is_that_of_a_mean_over_windows(student, tokens):
    result = asnn.evaluate(student, tokens["validation"][:16 * 20 + 1], 16)
    assert result.nll_se == pytest.approx(result.window_nll.std(ddof=1) / math.sqrt(20), rel=1e-6)


def test_part_of_a_split_has_no_figures_of_the_whole_text(student, tokens):
    result = asnn.evaluate(student, tokens["validation"], 16, windows=3, size={"bytes": 400, "words": 70})
    assert (result.windows, result.tokens, result.bits_per_byte, result.word_ppl) == (3, 48, None, None)
    assert "window_nll" not in json.loads(json.dumps(result.to_dict()))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_training_mode_unchanged(student, tokens, training):
    student.train(training)
    asnn.evaluate(student, tokens["validation"][:40], 16)
    asnn.spike_density(student, torch.zeros(1, 4, dtype=torch.long))
    assert student.training is training


def test_evaluation_refuses_a_split_without_tokens_and_leaves_the_model_alone(student, tokens):
    student.train()
    with pytest.raises(ValueError, match="tokens to evaluate is 1; allowed: at least 2"):
        asnn.evaluate(student, tokens["validation"][:1], 16)
    assert student.training


def test_the_gap_of_a_model_with_itself_is_one(student, tokens):
    result = asnn.evaluate(student, tokens["validation"][:200], 16)
    assert asnn.perplexity_gap(result, result) == (1.0, 0.0)


def test_the_gap_is_the_ratio_of_perplexities_with_a_paired_error(student, teacher, tokens):
    part = tokens["validation"][:16 * 12 + 1]
    mine, theirs = asnn.evaluate(student, part, 16), asnn.evaluate(teacher.model, part, 16)
    gap, error = asnn.perplexity_gap(mine, theirs)
    assert gap == pytest.approx(mine.ppl / theirs.ppl) and gap > 1
    assert error == pytest.approx(gap * np.std(mine.window_nll - theirs.window_nll, ddof=1) / math.sqrt(12))


def test_a_gap_between_different_tokens_is_refused(student, tokens):
    mine, theirs = (asnn.evaluate(student, tokens["validation"][:n], 16) for n in (33, 49))
    with pytest.raises(ValueError, match=r"tokens of student and teacher is \(32, 48\); allowed: equal"):
        asnn.perplexity_gap(mine, theirs)


def test_spike_density_is_the_share_of_spikes(student, batch_of_tokens):
    spikes = {}
    for i, block in enumerate(student.goose.blocks):
        for site in "kv":
            module = getattr(block.time_mix, f"spike_{site}")
            module.register_forward_pre_hook(
                lambda module, args, name=f"{i}.{site}": spikes.update({name: module.encode(*args)[0]}))
    density = asnn.spike_density(student, batch_of_tokens)
    assert list(density) == ["0.k", "0.v", "1.k", "1.v"]
    for name, value in density.items():
        assert 0 < value < 1
        assert value == pytest.approx(int((spikes[name] != 0).sum()) / spikes[name].numel(), rel=1e-6)


# ---- students and teachers


def test_a_student_copies_the_embeddings_of_its_teacher(small_recipe, teacher):
    student = asnn.build_student(small_recipe(), teacher)
    assert torch.equal(student.goose.embeddings.weight, teacher.model.transformer.wte.weight)
    assert torch.equal(student.goose.positions.weight, teacher.model.transformer.wpe.weight[:16])
    assert student.lm_head.weight is student.goose.embeddings.weight
    assert student.config.eos_token_id == teacher.tokenizer.eos_token_id
    other = asnn.build_student(small_recipe(embeddings_from_teacher=False), teacher)
    assert not torch.equal(other.goose.embeddings.weight, teacher.model.transformer.wte.weight)


def test_copying_embeddings_of_another_width_is_refused_with_both_shapes(small_recipe, teacher):
    with pytest.raises(ValueError, match=r"shapes \(300, 32\) and \(300, 24\); choose d_model=32 or "):
        asnn.build_student(small_recipe(d_model=24), teacher)


def test_the_seed_decides_the_student(small_recipe, teacher):
    first, same_seed, other = (asnn.build_student(small_recipe(), teacher, seed).state_dict() for seed in (1, 1, 2))
    assert same(dict(first), dict(same_seed)) and not same(dict(first), dict(other))


def test_the_untrained_teacher_is_dense(small_recipe, teacher):
    made = asnn.untrained_goose_teacher(small_recipe("v4"), teacher.tokenizer)
    assert made.model.config.spike_kind == "dense" and made.model.config.vocab_size == 300


def test_a_trained_teacher_is_kept(profile, corpus, teacher, tokens, monkeypatch):
    untrained = type(teacher.model)(teacher.model.config)
    learned, chance = (asnn.evaluate(m, tokens["validation"], 16).ppl for m in (teacher.model, untrained))
    assert learned < 0.5 * chance
    monkeypatch.setattr(asnn, "fit", None)
    again, known = asnn.train_teacher(profile, corpus, seq_len=16)
    assert again.name == teacher.name and known["trained_steps"] == profile.teacher_steps
    assert same(dict(again.model.state_dict()), dict(teacher.model.state_dict()))


def test_an_interrupted_teacher_goes_on_to_the_same_weights(profile, corpus, tmp_path, monkeypatch):
    small, states = profile.replace(teacher_steps=3), []
    for cache, hours in (("whole", (None,)), ("parts", (1e-9, 1e-9, None))):
        monkeypatch.setenv("ASNN_CACHE", str(tmp_path / cache))
        for step, budget in enumerate(hours, 1):
            if budget:
                with pytest.raises(RuntimeError, match=rf"stopped at step {step} of 3 \(time budget\); run again"):
                    asnn.train_teacher(small, corpus, 16, max_hours=budget)
            else:
                made, known = asnn.train_teacher(small, corpus, 16)
        assert known["trained_steps"] == 3
        states.append(dict(made.model.state_dict()))
        assert not list((tmp_path / cache / "teachers").glob("*.training"))
    assert same(*states)


def test_recipe_is_matched_to_the_teacher_at_hand(teacher):
    recipe = asnn.get_recipe("v14.3", seq_len=16)
    matched, notes = asnn.match_teacher(recipe, teacher)
    layers = len(asnn.transformer_blocks(teacher.model))
    assert matched.layer_map == asnn.spread_layer_map(recipe.n_layer, layers)
    assert not matched.embeddings_from_teacher and len(notes) == 2
    again, none = asnn.match_teacher(matched, teacher)
    assert again == matched and none == []


def test_windows_longer_than_the_teacher_are_refused(teacher):
    with pytest.raises(ValueError, match="seq_len is 4096; allowed: at most"):
        asnn.match_teacher(asnn.get_recipe("v14.3", seq_len=4096), teacher)


def test_a_bad_fit_setting_is_refused():
    good = {"steps": 1, "batch_size": 1, "lr": 1e-3, "seq_len": 8}
    for name, value in (("steps", 0), ("max_hours", -1), ("log_every", 0), ("lr", 0.0), ("batch_size", 1.5)):
        with pytest.raises(ValueError, match=f"FitConfig.{name} is {value}; allowed"):
            asnn.FitConfig(**{**good, name: value})


@pytest.mark.parametrize("name, value", [("optimizer", "sgd"), ("schedule", "step")])
def test_an_unknown_optimizer_or_schedule_is_refused_by_name(name, value):
    """Where settings are made by hand and no recipe has looked at them."""
    with pytest.raises(ValueError, match=f"FitConfig.{name} is '{value}'; allowed"):
        asnn.FitConfig(steps=1, batch_size=1, lr=1e-3, seq_len=8, **{name: value})


@pytest.mark.parametrize("value", [0, "100", 1.5])
def test_profile_refuses_steps_that_are_no_count(value):
    with pytest.raises(ValueError, match="distill_steps is .*; allowed: a whole number from 1"):
        asnn.PROFILES["cpu"].scale(asnn.get_recipe("v14.3"), distill_steps=value)


@pytest.fixture
def scaler(monkeypatch):
    """Gives fit a GradScaler as on a GPU with fp16; the scaler's CPU form does the same in fp32."""
    import accelerate

    def use(scale):
        made = torch.amp.GradScaler("cpu", init_scale=scale)
        plain = accelerate.Accelerator.__init__

        def init(self, *args, **kwargs):
            plain(self, *args, **kwargs)
            self.scaler = made
        monkeypatch.setattr(accelerate.Accelerator, "__init__", init)
        # In fp32 accelerate sees no reason to unscale before it clips.
        monkeypatch.setattr(accelerate.Accelerator, "unscale_gradients",
                            lambda self, optimizer=None: [made.unscale_(o.optimizer) for o in self._optimizers])
        return made
    return use


@pytest.mark.parametrize("name", ["v10", "v14.4"])
def test_training_under_a_scaler_equals_training_without(distillation, scaler, tmp_path, name):
    def train(folder, max_steps=None):
        objective, sampler, settings = distillation(name, {"precision": "fp32"}, distill_steps=6)
        result = asnn.fit(objective, sampler, settings, folder=tmp_path / folder, max_steps=max_steps)
        return weights(objective), result

    expected, _ = train("plain")
    scaler(2.0**10)
    scaled, result = train("scaled")
    assert result.scaler_skips == 0
    for key, value in expected.items():
        torch.testing.assert_close(scaled[key], value, atol=1e-5, rtol=1e-3)
    scaler(2.0**10)
    train("parts", 3)
    other = scaler(2.0**4)  # the scale comes back from the checkpoint
    resumed, _ = train("parts")
    assert same(resumed, scaled) and other.get_scale() == 2.0**10


@pytest.mark.parametrize("name", ["v10", "v14.4"])
@pytest.mark.parametrize("scale, ends", [(2.0**16, False), (2.0**-1, True)])
def test_skips_of_the_scaler_are_counted_and_end_when_they_stop_helping(distillation, scaler, scale, ends, name):
    objective, sampler, settings = distillation(name, {"nonfinite_limit": 2, "precision": "fp32"}, distill_steps=5)
    before = weights(objective)
    objective.student.goose.ln_f.weight.register_hook(lambda grad: grad * math.inf)
    used = scaler(scale)
    if ends:
        with pytest.raises(asnn.NonFiniteLoss, match="the gradient's norm is (inf|nan)"):
            asnn.fit(objective, sampler, settings)
    else:
        result = asnn.fit(objective, sampler, settings)
        assert (result.scaler_skips, result.nonfinite, used.get_scale()) == (5, 0, scale / 2**5)
        assert all(row["grad_norm"] is None for row in result.log if "loss" in row)
        json.dumps(result.log, allow_nan=False)
    assert same(weights(objective), before)


def test_teacher_on_its_own_device_gives_the_same_loss(distillation):
    objective, sampler, _ = distillation("v14.3", {}, fdd_start=0)
    inputs, labels = sampler.batch(0, 2)
    expected, _ = objective(inputs, labels, step=1)
    apart = asnn.Distiller(objective.student, objective.teacher, objective.recipe, torch.device("cpu", 0))
    apart.temperature = objective.temperature
    apart.place_teacher(torch.device("cpu"))
    loss, _ = apart(inputs, labels, step=1)
    assert torch.equal(loss, expected)
