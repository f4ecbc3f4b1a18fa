"""Training: resume to the bit, interruptions, several processes and devices, ends of a run, steps
that are not finite, Muon, evaluation."""
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import asnn_common as asnn


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """What is compared to the bit runs on the CPU, also where there is a GPU."""
    monkeypatch.setattr(asnn, "_select_device", lambda: (torch.device("cpu"), "asked for"))


@pytest.fixture
def on(task, small_recipe):
    """on(name, **overrides): the shared task with another recipe."""
    def make(name="v14.3", **overrides):
        recipe, _ = asnn._match_teacher(small_recipe(name, **overrides), task.teacher, "small")
        return dataclasses.replace(task, recipe=recipe)
    return make


@pytest.fixture
def train(on, monkeypatch):
    """train(name, folder, **overrides): (student, result) of a run. `keywords` go to `distil`;
    `ppl` are the perplexities that its evaluations shall find."""
    def run(name="v14.3", folder=None, ppl=None, keywords=(), **overrides):
        with monkeypatch.context() as patch:
            if ppl:
                left = list(ppl)
                patch.setattr(asnn, "evaluate", lambda *_, **__: SimpleNamespace(ppl=left.pop(0)))
            return asnn.distil(on(name, **overrides), folder=folder, **dict(keywords))
    return run


@pytest.mark.parametrize("steps, problem, fast", [(49, "", False), (50, "", True),
                                                  (50, "no compiler", False)])
def test_a_run_that_is_long_enough_has_the_kernel_of_encoders(train, monkeypatch, steps, problem,
                                                             fast):
    given = []

    class Look(asnn.Distiller):
        def __init__(self, *arguments):
            given.append(arguments[-1])
            super().__init__(*arguments)
    monkeypatch.setattr(asnn, "Distiller", Look)
    monkeypatch.setattr(asnn, "_load_kernel", lambda: problem)
    train(distill_steps=steps, keywords={"max_steps": 1})
    assert given == [asnn._encode_fast if fast else None]


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a, b):
    """Equality to the bit of nested states."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def without_clock(log):
    clock = ("tokens_per_second", "seconds")
    return [{key: value for key, value in row.items() if key not in clock} for row in log]


def steps_of(result, key="loss"):
    return [row["step"] for row in result.log if key in row]


def saved(folder, step):
    """Weights, best weights and optimiser state of a checkpoint."""
    folder = folder / f"checkpoint-{step}"
    return (safetensors.torch.load_file(folder / "model.safetensors"),
            safetensors.torch.load_file(folder / "best.safetensors"),
            torch.load(folder / "optimizer.pt", weights_only=True)["state"])


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_own_trainer_may_change_the_loss_and_sees_the_windows_in_pocls_order(on):
    task, losses, drawn = on("v13", distill_steps=30), [], []

    class Mine(asnn.DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **more):
            logits = task.teacher(inputs["input_ids"]).logits.detach()
            losses.append(float(F.cross_entropy(logits.transpose(1, 2), inputs["labels"])))
            drawn.append(inputs["input_ids"])
            return 3 * super().compute_loss(model, inputs, **more)

    _, mine = asnn.distil(task, trainer=Mine)
    _, plain = asnn.distil(task, max_steps=1)
    assert mine.log[0]["grad_norm"] == pytest.approx(3 * plain.log[0]["grad_norm"], rel=1e-5)
    assert torch.equal(torch.cat(drawn), task.windows(task.recipe).batch(0, 4 * 30)[0])
    easy, middle, hard = np.array(losses).reshape(3, 10).mean(1)
    assert easy < middle < hard


# ---- resume


@pytest.mark.parametrize("name, overrides", [
    ("v14.3", {"fdd_start": 8}), ("v7", {}), ("v7", {"grad_accum": 2}),
    ("v14.4", {"align_steps": 5, "head_dim": 16})])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(train, tmp_path, name, overrides):
    overrides = {"eval_every": 5, "batch_size": 2, **overrides}
    whole, expected = train(name, tmp_path / "whole", **overrides)
    _, first = train(name, tmp_path / "parts", keywords={"max_steps": 7}, **overrides)
    assert (first.step, first.stopped, first.finished) == (7, "step limit", False)
    # A limit is no end where the run itself has one.
    parts, second = train(name, tmp_path / "parts", keywords={"max_steps": 5}, **overrides)
    assert (second.step, second.stopped, second.finished) == (12, "completed", True)
    assert same(weights(parts), weights(whole))
    assert without_clock(second.log) == without_clock(expected.log)
    assert steps_of(second) == list(range(1, 13)) and second.seconds > first.seconds
    assert (second.best_ppl, second.best_step) == (expected.best_ppl, expected.best_step)
    assert same(saved(tmp_path / "parts", 12), saved(tmp_path / "whole", 12))
    rows = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert list(map(json.loads, rows)) == second.log
    model, _, optimizer = saved(tmp_path / "whole", 12)  # of what is trained, not of the teacher
    assert {key.split(".")[0] for key in model} - {"student", "projections", "temperature"} == {
        "best_ppl", "fdd_killed"} and "student.lm_head.weight" not in model
    assert len(optimizer) == len(model) - 2 - 4 * (name == "v7")  # whose alphas have no gradient


def test_the_kill_switch_survives_a_checkpoint(train, tmp_path):
    recipe = {"eval_every": 3, "fdd_start": 1, "fdd": "cka_delta"}
    train(folder=tmp_path, ppl=(10.0, 12.0), keywords={"max_steps": 7}, **recipe)
    _, result = train(folder=tmp_path, ppl=(9.0, 9.0), **recipe)
    assert steps_of(result, "fdd") == [2, 3, 4, 5, 6] and result.step == 12


@pytest.mark.parametrize("stop", ["completed", "early stopping"])
def test_a_run_that_has_ended_is_not_trained_again(train, tmp_path, stop):
    class Idle(asnn.DistillationTrainer):
        def compute_loss(self, *_, **__):
            raise AssertionError("a step was taken")

    recipe = {"eval_every": 3, "patience": 4 if stop == "early stopping" else 100}
    student, first = train(folder=tmp_path, ppl=(10.0, 11.0, 12.0, 13.0), **recipe)
    again, second = train(folder=tmp_path, keywords={"trainer": Idle}, **recipe)
    assert first.stopped == second.stopped == stop and second.finished
    assert first.step == second.step == (9 if stop == "early stopping" else 12)
    assert same(weights(again), weights(student)) and first.log == second.log


def test_a_checkpoint_that_is_not_whole_is_passed_over_and_removed(train, tmp_path):
    folder = tmp_path / "parts"
    whole, expected = train(folder=tmp_path / "whole", eval_every=4)
    train(folder=folder, eval_every=4, keywords={"max_steps": 4})
    for name in ("checkpoint-8", "checkpoint-10"):
        shutil.copytree(folder / "checkpoint-4", folder / name)
    os.truncate(folder / "checkpoint-8" / "trainer_state.json", 200)
    (folder / "checkpoint-10" / "trainer_state.json").unlink()
    _, between = train(folder=folder, eval_every=4, keywords={"max_steps": 2})
    assert between.step == 6
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]  # and stays
    student, result = train(folder=folder, eval_every=4)
    assert without_clock(result.log) == without_clock(expected.log)
    assert same(weights(student), weights(whole))


# A process of its own: the recipe's fields as JSON, a folder, and where it is of several processes.
CHILD = """
import json, os, signal, sys
from pathlib import Path
import torch
import asnn_common as asnn

recipes = {name: asnn.RECIPES[name].replace(**fields)
           for name, fields in json.loads(sys.argv[1]).items()}
place = Path(sys.argv[2])
"""

KILLED = CHILD + """
save, seen = torch.save, []

def half(payload, file, *args, **kwargs):
    seen.append(str(file).endswith("optimizer.pt"))
    save(payload, file, *args, **kwargs)
    if sum(seen) == 2:
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
asnn.distil(asnn.load_task(recipes["v14.3"]), folder=place)
"""

SEVERAL = CHILD + """
curves = {}
for name, recipe in recipes.items():
    task = asnn.load_task(recipe)
    untrained = asnn.evaluate(task.build_student(), task.tokens["test"], 16, 3, windows=11)
    _, result = asnn.distil(task, folder=place / name)
    curves[name] = [list(untrained.window_nll), result.log]
print(json.dumps(curves))
"""


def child(script, recipes, folder, **environment):
    """A Python that runs `script`; it sees the same module, cache and libraries as we do."""
    fields = {recipe.name: dataclasses.asdict(recipe) for recipe in recipes}
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(asnn.__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(fields), str(folder)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment})


def test_a_run_killed_while_it_saves_goes_on_from_the_last_whole_checkpoint(on, tmp_path):
    task = on(eval_every=4, save_every=4)
    process = child(KILLED, [task.recipe], tmp_path / "run")
    error = process.communicate(timeout=300)[1]
    assert process.returncode == -signal.SIGKILL, error
    left = [path.parent.name for path in (tmp_path / "run").glob("*/trainer_state.json")]
    assert left == ["checkpoint-4"] and (tmp_path / "run/checkpoint-8/optimizer.pt").exists()
    resumed, result = asnn.distil(task, folder=tmp_path / "run")
    whole, expected = asnn.distil(task, folder=tmp_path / "whole")
    assert without_clock(result.log) == without_clock(expected.log)
    assert same(weights(resumed), weights(whole))
    assert same(saved(tmp_path / "run", 12), saved(tmp_path / "whole", 12))


# ---- several processes and devices


def test_two_processes_give_the_curve_of_one(on, tmp_path):
    """As `accelerate launch` or torchrun start them; the batches are shared out."""
    tasks = [on("v14.3", eval_every=6, fdd="none"), on("v14.4-rates", eval_every=6, align_steps=6)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [child(SEVERAL, [task.recipe for task in tasks], tmp_path, WORLD_SIZE="2",
                       RANK=str(rank), LOCAL_RANK=str(rank), **where) for rank in range(2)]
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended[0][1][-3000:]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in ended)
    for task in tasks:
        name = task.recipe.name
        one = asnn.evaluate(task.build_student(), task.tokens["test"], 16, 3, windows=11)
        assert first[name][0] == second[name][0] == list(one.window_nll)  # to the bit
        _, result = asnn.distil(task)
        for key in ("loss", "kd", "align", "rate", "tau", "grad_norm", "val_ppl"):
            expected, *others = ([row[key] for row in log if key in row]
                                 for log in (result.log, first[name][1], second[name][1]))
            for got in others:
                np.testing.assert_allclose(got, expected, rtol=1e-3, err_msg=f"{name} {key}")


def test_with_two_gpus_the_teacher_takes_the_second_and_all_else_the_first(on, monkeypatch):
    task, moved, seen = on(distill_steps=1), [], []
    teacher = copy.deepcopy(task.teacher)
    teacher.to = lambda device: moved.append(device) or teacher

    class Watching(asnn.DistillationTrainer):
        def compute_loss(self, model, inputs, **more):
            seen.append((type(model), len(inputs["labels"]), self.args.n_gpu))
            return super().compute_loss(model, inputs, **more)

    monkeypatch.setattr(asnn, "_select_device", lambda: (torch.device("cuda"), "as if"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asnn.distil(dataclasses.replace(task, teacher=teacher), trainer=Watching)
    assert moved == [torch.device("cuda:1")]
    assert seen == [(asnn.Distiller, task.recipe.batch_size, 1)]


def test_what_several_processes_cannot_do_is_refused(train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "3")
        with pytest.raises(ValueError, match="batch_size is 4; allowed: a multiple of the 3 proc"):
            train()
    plain = asnn.Trainer.create_accelerator_and_postprocess

    def sharing(trainer):
        plain(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(asnn.Trainer, "create_accelerator_and_postprocess", sharing)
    with pytest.raises(ValueError, match="optimizer is 'muon'; allowed: adamw .*--use_fsdp"):
        train("v14.4")


# ---- ends of a run


@pytest.mark.parametrize("share, stop", [(0.94, 8), (0.951, 3)])
def test_a_run_ends_at_95_percent_of_its_hours_and_the_next_call_goes_on(
        train, monkeypatch, tmp_path, share, stop):
    """A minute, of which the third step takes almost all; each look at the clock a microsecond."""
    recipe, looks, jump = {"distill_steps": 8, "folder": tmp_path}, itertools.count(), [0.0]

    class Slow(asnn.DistillationTrainer):
        def compute_loss(self, *args, **more):
            jump[0] += 60 * share if self.state.global_step == 2 else 0.0
            return super().compute_loss(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(asnn.time, "perf_counter", lambda: 1e-6 * next(looks) + jump[0])
        _, result = train(max_hours=1 / 60, keywords={"trainer": Slow}, **recipe)
    assert (result.step, result.finished) == (stop, stop == 8)
    assert result.stopped == ("completed" if stop == 8 else "time budget")
    student, result = train(max_hours=1.0, **recipe)
    assert result.step == 8 and same(weights(student), weights(train(distill_steps=8)[0]))


def test_early_stopping_waits_for_patience_and_a_fall_of_min_delta(train):
    """39.8 is a new best, but not by half a point: the patience of 40 ends there."""
    seen = []

    class Watching(asnn.DistillationTrainer):
        def evaluate(self, *args, **more):
            seen.append(weights(self.model.student))
            return super().evaluate(*args, **more)

    recipe = {"eval_every": 2, "patience": 4, "distill_steps": 20}
    student, result = train(ppl=(50.0, 40.0, 45.0, 39.8), keywords={"trainer": Watching}, **recipe)
    assert (result.step, result.stopped, result.finished) == (8, "early stopping", True)
    assert (result.best_ppl, result.best_step) == (39.8, 8)
    assert same(weights(student), seen[3])
    _, result = train(ppl=(50.0, 40.0, 45.0, 39.4, 41.0, 41.0), **recipe)
    assert (result.step, result.best_step) == (12, 8)


def test_the_best_weights_are_there_at_the_end_also_of_a_resumed_run(train, tmp_path):
    best, _ = train(ppl=(10.0,), eval_every=4, keywords={"max_steps": 4})
    for folder, calls in (("whole", {None: (10.0, 11.0, 12.0)}),
                          ("parts", {6: (10.0,), None: (11.0, 12.0)})):
        for limit, ppl in calls.items():
            student, result = train(folder=tmp_path / folder, ppl=ppl, eval_every=4,
                                    keywords={"max_steps": limit})
        assert (result.best_ppl, result.best_step, result.step) == (10.0, 4, 12)
        assert same(weights(student), weights(best))
        assert not same(saved(tmp_path / folder, 12)[0], saved(tmp_path / folder, 12)[1])


def test_a_run_evaluates_where_a_stage_ends_and_each_stage_has_its_own_schedule(train):
    _, result = train("v14.4", align_steps=4, eval_every=5, warmup_ratio=0.25, matrix_lr=7e-3)
    assert steps_of(result, "val_ppl") == [4, 5, 10, 12]
    assert steps_of(result, "align") == [1, 2, 3, 4]
    assert steps_of(result, "ce") == list(range(5, 13))
    shares = [row["lr"] / 2e-3 for row in result.log if "loss" in row]  # not those of the matrices
    falling = [[0.5 * (1 + math.cos(math.pi * i / n)) for i in range(n)] for n in (3, 6)]
    assert shares == pytest.approx([0.0, *falling[0], 0.0, 0.5, *falling[1]])


# ---- steps that are not finite


@pytest.fixture
def poison(monkeypatch):
    """poison(steps, value, accumulated): the last loss of these steps is not finite."""
    def make(steps, value=math.nan, accumulated=1):
        plain, calls = asnn.Distiller.forward, itertools.count(1)

        def forward(self, input_ids, labels, step=0, want_ce=True):
            loss, terms = plain(self, input_ids, labels, step, want_ce)
            if next(calls) % accumulated or step not in steps:
                return loss, terms
            return loss * value, {**terms, "kd": terms["kd"] * value}
        monkeypatch.setattr(asnn.Distiller, "forward", forward)
    return make


@pytest.mark.parametrize("name, value, accumulated", [
    ("v14.3", math.nan, 1), ("v14.3", math.inf, 2), ("v14.4", math.nan, 2)])
def test_steps_that_are_not_finite_change_nothing_and_are_counted(
        train, poison, tmp_path, name, value, accumulated):
    recipe = {"align_steps": 0, "weight_decay": 0.5, "grad_accum": accumulated, "eval_every": 3,
              "folder": tmp_path, "distill_steps": 8}
    poison({3, 4}, value, accumulated)
    train(name, keywords={"max_steps": 3}, **recipe)
    before = saved(tmp_path, 3)
    _, result = train(name, keywords={"max_steps": 2}, **recipe)
    assert (result.step, result.skipped, steps_of(result)) == (5, 2, [1, 2, 3])
    assert same(before, saved(tmp_path, 5))
    student, result = train(name, **recipe)
    assert (result.step, result.skipped, steps_of(result)) == (8, 2, [1, 2, 3, 6, 7, 8])
    assert not same(before[0], saved(tmp_path, 8)[0])
    assert all(tensor.isfinite().all() for tensor in weights(student).values())
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_eleventh_of_them_ends_the_run_with_a_sentence(train, on, poison, accumulated):
    student = on().build_student()
    poison(range(1, 20), math.nan, accumulated)
    with pytest.raises(RuntimeError, match="Step 11: kd is nan; 11 steps were not finite, at most "
                                           "10 are skipped. A lower lr or fp32 may help."):
        train(distill_steps=20, grad_accum=accumulated, keywords={"student": student})
    assert hooks(student) == 0


@pytest.fixture
def scaler(monkeypatch):
    """A GradScaler as on a T4 with fp16; the scaler's CPU form does the same in fp32."""
    def use(scale):
        made, plain = torch.amp.GradScaler("cpu", init_scale=scale), accelerate.Accelerator.__init__

        def init(self, *args, **kwargs):
            plain(self, *args, **kwargs)
            self.scaler = made
        monkeypatch.setattr(accelerate.Accelerator, "__init__", init)
        # In fp32 accelerate sees no reason to unscale before it clips.
        monkeypatch.setattr(accelerate.Accelerator, "unscale_gradients", lambda self, *_:
                            [made.unscale_(o.optimizer) for o in self._optimizers])
        return made
    return use


@pytest.mark.parametrize("name", ["v10", "v14.4"])
def test_training_under_a_scaler_equals_training_without_and_resumes(train, scaler, tmp_path, name):
    expected, _ = train(name, distill_steps=6)
    scaler(2.0**10)
    scaled, _ = train(name, tmp_path / "whole", distill_steps=6)
    for key, value in weights(expected).items():
        torch.testing.assert_close(scaled.state_dict()[key], value, atol=1e-5, rtol=1e-3)
    scaler(2.0**10)
    train(name, tmp_path / "parts", distill_steps=6, keywords={"max_steps": 3})
    other = scaler(2.0**4)  # the scale comes back from the checkpoint
    resumed, _ = train(name, tmp_path / "parts", distill_steps=6)
    assert same(weights(resumed), weights(scaled)) and other.get_scale() == 2.0**10


def test_a_scaler_skips_by_itself_until_its_scale_no_longer_helps(train, on, scaler):
    student = on("v10").build_student()
    student.goose.ln_f.weight.register_hook(lambda grad: grad * math.inf)
    before, used = weights(student), scaler(2.0**4)
    with pytest.raises(RuntimeError, match="Step 15: the gradient's norm is (inf|nan); 11 steps"):
        train("v10", distill_steps=30, keywords={"student": student})
    assert used.get_scale() == 2.0**-11 and same(weights(student), before)


def test_accumulated_batches_equal_one_large_batch(train):
    ends, curves = [], []
    for size, accumulated in ((8, 1), (4, 2)):
        student, result = train(distill_steps=5, batch_size=size, grad_accum=accumulated)
        ends.append(student)
        curves.append([(row["loss"], row["kd"], row["ce"], row["grad_norm"])
                       for row in result.log if "loss" in row])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)
    for name, value in weights(ends[0]).items():
        torch.testing.assert_close(ends[1].state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_changes_nothing_but_the_memory(train, monkeypatch):
    """Also with held firing rates and spike alignment, whose hooks see every block twice."""
    recipe = {"distill_steps": 4, "align_steps": 2, "spike_align_weight": 0.3}
    counted, plain = [], asnn.GooseBlock.layer
    monkeypatch.setattr(asnn.GooseBlock, "layer", lambda self, *args, **more: (
        counted.append(self.training), plain(self, *args, **more))[1])
    student, result = train("v14.4-rates", **recipe)
    once = sum(counted)
    again, other = train("v14.4-rates", keywords={"gradient_checkpointing": True}, **recipe)
    assert sum(counted) - once == once + 2 * 4  # two blocks, four steps
    assert {"rate", "spike alignment"} <= result.log[0].keys()
    assert without_clock(other.log) == without_clock(result.log)
    assert same(weights(again), weights(student))
    assert hooks(again) == 0 and not again.goose.blocks[0].gradient_checkpointing


def test_training_lowers_the_loss_and_brings_the_firing_rates_into_their_band(
        train, task, monkeypatch):
    monkeypatch.setattr(asnn, "RATE_BAND", (0.1, 0.3))
    theirs, mean = weights(task.teacher), []
    recipe = {"align_steps": 0, "distill_steps": 30, "lr": 5e-3, "eval_every": 30}
    for weight in (0.0, 10.0):
        student, result = train("v14.4", rate_weight=weight, **recipe)
        mean.append(np.mean(list(asnn.firing_rates(student, task.peek()).values())))
        first, *_, last = (row["kd"] for row in result.log if "kd" in row)
        assert last < 0.5 * first and same(weights(task.teacher), theirs)
    assert mean[0] > 0.42 and mean[1] < 0.36


def test_matrices_decay_and_have_a_rate_of_their_own(distiller):
    objective = distiller("v7", weight_decay=0.1, matrix_lr=5e-3)
    goose = objective.student.goose
    goose.positions.requires_grad_(False)  # then it is in no group
    groups = asnn._parameter_groups(objective, objective.recipe)
    assert [(g["name"], g["weight_decay"], g["lr"]) for g in groups] == [
        ("matrices", 0.1, 5e-3), ("embeddings", 0.1, 2e-3), ("vectors", 0.0, 2e-3)]
    matrices, embeddings, vectors = ({id(p) for p in group["params"]} for group in groups)
    assert embeddings == {id(goose.embeddings.weight)}  # and the head, which is tied to them
    linear = {id(m.weight) for m in objective.modules() if isinstance(m, torch.nn.Linear)}
    assert matrices == linear - embeddings
    assert vectors == {id(p) for p in objective.parameters() if p.dim() < 2}


class Small(torch.nn.Module):
    """One of each kind of parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.words, self.up = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 24)
        self.down, self.norm = torch.nn.Linear(24, 8, bias=False), torch.nn.LayerNorm(8)


def descend(model, optimizers, steps):
    """Steps along given gradients, the same for all; one of them is None in the second step."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            if step == 1 and name in ("down.weight", "norm.bias"):
                p.grad = None
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("precision, tolerance", [("bf16", 2e-2), ("fp32", 3e-2)])
def test_muon_is_torchs_muon_for_matrices_and_adamw_for_the_rest(
        small_recipe, monkeypatch, precision, tolerance):
    """But for the rounding of the iteration, which torch does in bf16 everywhere; ours asks what
    the device of the weights is fast at when it steps."""
    recipe = small_recipe(lr=3e-3, matrix_lr=1e-2, weight_decay=0.1)
    ours, theirs = Small(), Small()
    start, betas = weights(ours), (0.9, 0.95)
    optimizer = asnn.Muon(asnn._parameter_groups(ours, recipe), 3e-3, betas)
    monkeypatch.setattr(asnn, "_select_precision", lambda device, asked="auto": (precision, ""))
    descend(ours, [optimizer], 6)
    matrices, *rest = asnn._parameter_groups(theirs, recipe)
    rest = [{k: v for k, v in group.items() if k != "name"} for group in rest]
    descend(theirs, [torch.optim.Muon(matrices["params"], lr=1e-2, weight_decay=0.1, momentum=0.95,
                                      adjust_lr_fn="match_rms_adamw"),
                     torch.optim.AdamW(rest, lr=3e-3, betas=betas, fused=True)], 6)
    other = weights(theirs)
    for name, value in weights(ours).items():
        moved = (other[name] - start[name]).norm()
        allowed = tolerance if name in ("up.weight", "down.weight") else 1e-6
        assert moved > 0 and (value - other[name]).norm() <= allowed * moved, name
    assert len(optimizer.param_groups) == 3


def test_bf16_trains_and_leaves_fp32_weights_without_autocast(train, task):
    (plain, _), (student, result) = (train(distill_steps=2, precision=p) for p in ("fp32", "bf16"))
    assert result.precision == "bf16" and math.isfinite(result.log[1]["loss"])
    assert student(task.peek()).logits.dtype == student.lm_head.weight.dtype == torch.float32
    assert not same(weights(student), weights(plain))


def test_tensorboard_gets_the_rows(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    _, result = train(folder=tmp_path, distill_steps=3, eval_every=3, tracker="tensorboard")
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent)).Reload()
    tags = {tag.split("/", 1)[1]: tag for tag in events.Tags()["scalars"]}
    rows = [row for row in result.log if "loss" in row]
    for name in ("loss", "kd", "tau", "grad_norm"):
        read = [(event.step, event.value) for event in events.Scalars(tags[name])]
        assert read == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert events.Scalars(tags["val_ppl"])[0].value == pytest.approx(result.best_ppl)
    assert {"rate/0.k", "rate/1.v"} <= tags.keys()


def brute_force(model, tokens, seq_len):
    """NLL of every token but the first, each from the tokens before it in its window."""
    losses = []
    for start in range(0, len(tokens) - 1, seq_len):
        ids = torch.from_numpy(tokens[start:start + seq_len + 1].astype(np.int64)).unsqueeze(0)
        logits = model(ids[:, :-1]).logits[0].detach()
        losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none").double().numpy())
    return losses


@pytest.mark.parametrize("length", [2, 16, 17, 18, 100])
def test_evaluation_scores_every_token_once_and_leaves_the_mode_alone(
        student, tokens, length, monkeypatch):
    monkeypatch.setattr(asnn, "LOGIT_BUDGET", {"cpu": 7 * 4 * asnn.LOGIT_COPIES * 300})  # 7 rows
    part = tokens["validation"][:length]
    losses = brute_force(student.eval(), part, 16)
    student.train(length > 16)
    result = asnn.evaluate(student, part, 16, batch_size=3, size={"bytes": 400, "words": 70})
    assert result.tokens == length - 1 and result.windows == len(losses)
    total = sum(loss.sum() for loss in losses)
    assert result.nll == pytest.approx(total / (length - 1), rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(result.nll))
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / 400, rel=1e-6)
    assert result.word_ppl == pytest.approx(math.exp(total / 70), rel=1e-6)
    np.testing.assert_allclose(result.window_nll, [loss.mean() for loss in losses], rtol=1e-5)
    assert math.isfinite(result.nll_se) and (result.nll_se > 0) == (len(losses) > 1)
    with pytest.raises(ValueError, match="tokens to evaluate is 1; allowed: at least 2"):
        asnn.evaluate(student, part[:1], 16)
    assert student.training == (length > 16)


def test_errors_are_those_of_a_mean_over_windows_and_a_gap_is_paired(student, teacher, tokens):
    part = tokens["validation"][:16 * 12 + 1]
    mine, theirs = (asnn.evaluate(model, part, 16) for model in (student, teacher))
    assert mine.nll_se == pytest.approx(mine.window_nll.std(ddof=1) / math.sqrt(12), rel=1e-6)
    gap, error = mine.gap(theirs)
    assert gap == pytest.approx(mine.ppl / theirs.ppl) and gap > 1
    paired = np.std(mine.window_nll - theirs.window_nll, ddof=1) / math.sqrt(12)
    assert error == pytest.approx(gap * paired) and mine.gap(mine) == (1.0, 0.0)
    three = asnn.evaluate(teacher, part, 16, windows=3, size={"bytes": 9, "words": 2})
    assert (three.windows, three.bits_per_byte, three.word_ppl) == (3, None, None)
    with pytest.raises(ValueError, match=r"student and teacher is \(192, 48\); allowed: equal"):
        mine.gap(three)


def test_an_interrupted_teacher_goes_on_to_the_same_weights_and_is_kept(
        small_task, tmp_path, monkeypatch):
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path / "whole"))
    whole = small_task(teacher_steps=3).teacher
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path / "parts"))
    for step in (1, 2):
        with pytest.raises(RuntimeError, match=f"at step {step} of 3 .time budget.; run again"):
            small_task(teacher_steps=3, max_hours=1e-9)
    small_task(teacher_steps=3)
    monkeypatch.setattr(asnn, "DistillationTrainer", None)
    kept = small_task(teacher_steps=3)
    assert kept.teacher_training["trained_steps"] == 3
    assert same(weights(kept.teacher), weights(whole))
    assert not list((tmp_path / "parts" / "teachers").glob("*.training"))
