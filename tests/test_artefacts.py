"""Artefacts: run folders, tables, model cards, the run checks, and where results go."""
import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import asnn_common as asnn

SETTINGS = {"recipe": "v14.3", "seed": 42}


def metrics(run="run", ppl=20.0, bits=1.25):
    """What a run writes, with figures that are easy to find again."""
    split = {"ppl": ppl, "nll": 3.0, "nll_se": 0.01, "tokens": 12345, "windows": 77, "seq_len": 16,
             "bits_per_byte": bits, "word_ppl": 99.0}
    return {"run": run, "version": "v14.3", "corpus": {"name": "small", "hash": "0123456789abcdef"},
            "teacher": {"name": "a-teacher", "test": {**split, "ppl": 10.0}},
            "student": {"test": split, "parameters": 1_500_000, "density": {"0.k": 0.4, "0.v": 0.5}},
            "gap": {"test": {"value": ppl / 10, "standard_error": 0.021}},
            "training": {"step": 321, "tokens_per_second": 4567.0},
            "environment": {"gpus": [], "cpu": "A CPU", "threads": 3}}


# ---- run folders


def test_a_new_run_has_its_settings_and_environment(tmp_path):
    run = asnn.Run.open("v14.3", "first", SETTINGS, tmp_path)
    assert run.folder == tmp_path / "v14.3" / "first" and run.note == "new run first"
    assert json.loads((run.folder / "config.json").read_text()) == SETTINGS
    assert json.loads((run.folder / "env.json").read_text()) == asnn.environment()
    assert (run.folder / "figures").is_dir()


def test_a_finished_run_is_never_overwritten(tmp_path):
    first = asnn.Run.open("v14.3", "name", SETTINGS, tmp_path)
    first.finish(metrics())
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    second = asnn.Run.open("v14.3", "name", SETTINGS, tmp_path)
    assert second.folder.name == "name-2" and "name exists with other settings or is finished" in second.note
    second.finish(metrics(ppl=5.0))
    assert asnn.Run.open("v14.3", "name", SETTINGS, tmp_path).folder.name == "name-3"
    assert before == {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}


def test_an_unfinished_run_with_the_same_settings_is_resumed(tmp_path):
    first = asnn.Run.open("v14.3", "name", SETTINGS, tmp_path)
    again = asnn.Run.open("v14.3", "name", dict(reversed(SETTINGS.items())), tmp_path)
    assert again.folder == first.folder and again.note == "resuming unfinished run name"


def test_other_settings_get_a_folder_of_their_own(tmp_path):
    first = asnn.Run.open("v14.3", "name", SETTINGS, tmp_path)
    other = asnn.Run.open("v14.3", "name", {**SETTINGS, "seed": 7}, tmp_path)
    assert other.folder.name == "name-2"
    assert asnn.Run.open("v14.3", "name", {**SETTINGS, "seed": 7}, tmp_path).folder == other.folder
    assert json.loads((first.folder / "config.json").read_text()) == SETTINGS


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a b", "a\\b", "x*", "../up"])
def test_a_bad_run_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="run name is .*; allowed: at most 100 letters, digits, '.', '_' and '-'"):
        asnn.Run.open("v14.3", name, SETTINGS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_name_gets_the_time(tmp_path):
    name = asnn.Run.open("v14.3", None, SETTINGS, tmp_path).folder.name
    assert len(name) == 15 and name.replace("-", "").isdigit()


def test_a_figure_is_saved_in_the_run_and_closed(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    run, figure = asnn.Run.open("v14.3", "name", SETTINGS, tmp_path), pyplot.figure()
    run.show(figure, "curve")
    assert (run.folder / "figures" / "curve.png").read_bytes()[1:4] == b"PNG"
    assert "<svg" in (run.folder / "figures" / "curve.svg").read_text()
    assert not pyplot.fignum_exists(figure.number)


def test_a_run_interrupted_while_it_finishes_is_unfinished(tmp_path, distillation, teacher, monkeypatch):
    run = asnn.Run.open("v14.3", "name", SETTINGS, tmp_path)
    (run.folder / "checkpoint.pt").write_bytes(b"checkpoint")
    student = distillation()[0].student

    def interrupted(metrics):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(asnn, "model_card", interrupted)
        run.finish(metrics(), student, teacher.tokenizer)
    assert not (run.folder / "metrics.json").exists() and not (run.folder / "student").exists()
    assert (run.folder / "checkpoint.pt").exists() and asnn.runs(tmp_path) == []
    again = asnn.Run.open("v14.3", "name", SETTINGS, tmp_path)
    assert again.folder == run.folder
    again.finish(metrics(), student, teacher.tokenizer)
    assert asnn.runs(tmp_path) == [metrics()] and not (run.folder / "checkpoint.pt").exists()


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
student = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
torch.save((student.eval()(torch.arange(10).view(1, 10)).logits.detach(), tokenizer.get_vocab()), sys.argv[2])
"""


def test_a_saved_student_needs_nothing_but_its_folder(tmp_path, distillation, teacher):
    run = asnn.Run.open("v14.3", "name", SETTINGS, tmp_path)
    student = distillation()[0].student.eval()
    values = metrics("name")
    run.finish(values, student, teacher.tokenizer)
    folder = run.folder / "student"
    card = (folder / "README.md").read_text()
    assert asnn.results_table([values]) in card and "12,345 tokens in windows of 16" in card
    assert "ASNN-Goose v14.3, run name" in card and "1,500,000" in card and "0123456789abcdef" in card
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment.update(HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1")
    ended = subprocess.run([sys.executable, "-c", LOAD, str(folder), str(tmp_path / "out.pt")], cwd=tmp_path,
                           env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    logits, vocabulary = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = student(torch.arange(10).view(1, 10)).logits.detach()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert vocabulary == teacher.tokenizer.get_vocab()


def test_runs_and_the_index_show_finished_runs_side_by_side(tmp_path):
    for number, version in enumerate(("v14.3", "v15", "v14.3")):
        run = asnn.Run.open(version, f"run{number}", SETTINGS, tmp_path)
        run.finish(metrics(f"run{number}", ppl=10.0 + number))
        os.utime(run.folder / "metrics.json", (number, number))
    asnn.Run.open("v15", "unfinished", SETTINGS, tmp_path)
    found = asnn.runs(tmp_path)
    assert [m["run"] for m in found] == ["run0", "run1", "run2"]
    index = (tmp_path / "index.md").read_text()
    assert index.startswith("# Runs\n") and "unfinished" not in index
    assert all(f"| {m['run']} |" in index for m in found)


def test_runs_of_a_folder_that_does_not_exist_are_none(tmp_path):
    assert asnn.runs(tmp_path / "nowhere") == []


def test_the_table_has_the_figures_of_the_metrics():
    header, rule, first, second = asnn.results_table([metrics("one"), metrics("two", 34.567, None)]).splitlines()
    assert header.count("|") == rule.count("|") == first.count("|") == second.count("|") == 13
    assert [cell.strip() for cell in first.strip("|").split("|")] == [
        "one", "v14.3", "small 012345, a-teacher", "1.5M", "321", "10.00", "20.00", "2.000 ± 0.021 (77)", "1.250",
        "0.450", "4,567", "A CPU, 3 threads"]
    assert "34.57" in second and "3.457 ± 0.021" in second and "part of the split" in second


def test_the_table_names_the_gpus():
    on_gpus = metrics()
    on_gpus["environment"]["gpus"] = ["Tesla T4, 15 GiB"] * 2
    assert "| Tesla T4, 15 GiB, Tesla T4, 15 GiB |" in asnn.results_table([on_gpus])


# ---- tables on a page


def test_outside_a_notebook_a_table_is_printed_whole_and_without_row_numbers(monkeypatch, capsys):
    pytest.importorskip("pandas")
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    rows = [{"system": f"a {i}", **{f"column {j}": "x" * 30 for j in range(12)}} for i in range(120)]
    asnn.show_table(row for row in rows)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 200  # broken into pieces, and nothing left out
    assert "..." not in printed and all(f"column {j}" in printed for j in range(12)) and printed.count("a 119") == 1
    asnn.show_table([{"metric": "CKA", "value": "0.5"}, {"metric": "PPL"}])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed] == [["metric", "value"], ["CKA", "0.5"], ["PPL", "NaN"]]
    asnn.show_table([{"prompt": "one\ntwo", "student": "three"}], prose=True)
    assert capsys.readouterr().out == "[prompt] 'one\\ntwo'\n[student] 'three'\n\n"


def test_in_a_notebook_a_table_is_shown_without_row_numbers(monkeypatch, capsys):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(display, "display", shown.append)
    for prose in (False, True):
        asnn.show_table([{"prompt": "<one>", "student": "two"}], prose)
    plain, prose = (table.to_html() for table in shown)
    assert capsys.readouterr().out == "" and ">prompt</th>" in plain and "row_heading" not in plain + prose
    assert "pre-wrap" in prose and "width: 48%" in prose and "pre-wrap" not in plain


def test_hardware_and_versions_are_said_in_one_line():
    env = {"gpus": [], "cpu": "A CPU", "threads": 3, "python": "3.11.2", "versions": {"torch": "2.10", "numpy": "2.0"}}
    assert asnn.hardware_text(env) == asnn.hardware_text(env, gpus=False) == "A CPU, 3 threads"
    env["gpus"] = ["Tesla T4, 15 GiB"] * 2
    assert asnn.hardware_text(env) == "Tesla T4, 15 GiB, Tesla T4, 15 GiB"
    assert asnn.hardware_text(env, gpus=False) == "A CPU, 3 threads"
    assert asnn.versions_text(env) == "Python 3.11.2, torch 2.10, numpy 2.0"


# ---- where


def test_the_environment_names_hardware_and_versions():
    found = asnn.environment()
    assert set(found) >= {"platform", "cpu", "cores", "threads", "gpus", "python", "versions", "asnn_common"}
    assert found["platform"] == "local" and found["cpu"] and found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads() and found["asnn_common"] == asnn.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"] == torch.__version__
    assert {"torch", "transformers", "datasets", "accelerate", "numpy"} <= set(found["versions"])
    json.dumps(found)


def test_kaggle_is_told_before_colab(monkeypatch):
    assert asnn.where_am_i() == "local"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    assert asnn.where_am_i() == "colab"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert asnn.where_am_i() == "kaggle"


def test_where_outputs_go(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert asnn.outputs_folder() == tmp_path / "outputs"
    monkeypatch.setenv("ASNN_OUTPUTS", "/somewhere/else")
    assert asnn.outputs_folder() == Path("/somewhere/else")
    monkeypatch.delenv("ASNN_OUTPUTS")
    assert asnn.outputs_folder() == Path(asnn.__file__).resolve().parent / "outputs"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    assert asnn.outputs_folder() == tmp_path / "outputs"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert asnn.outputs_folder() == tmp_path / "outputs"


# ---- run checks


CHECKS = ["PPL under target", "improved on the previous version", "density in [0.1, 0.9]", "amplitudes in [0.3, 3.0]",
          "training completed or stopped early", "no NaN or Inf loss", "memory under 8 GB", "FDD active",
          "tau evolved", "early stopping worked", "FDD loss decreased", "step budget met"]


def good():
    """Arguments of run_checks for a run with nothing wrong."""
    log = [{"step": step, "loss": 5.0 - step / 10, "tau": 2.0 - step / 100, "fdd": 0.8 - step / 100}
           for step in range(1, 13)]
    result = asnn.FitResult(log=log, step=5000, stopped="completed", best_ppl=300.0, best_step=4500, seconds=1.0,
                            tokens_per_second=1.0, nonfinite=0, scaler_skips=0, precision="fp32", peak_memory_gb=5.0)
    return {"recipe": asnn.get_recipe("v14.3"), "result": result, "ppl": 300.0, "target_ppl": 306.89,
            "previous_ppl": 330.0, "density": {"0.k": 0.3, "0.v": 0.5}, "amplitudes": {"0.k": 0.9, "0.v": 1.4}}


def with_result(**changes):
    return lambda given: given.update(result=dataclasses.replace(given["result"], **changes))


def with_log(change):
    def apply(given):
        log = copy.deepcopy(given["result"].log)
        for row in log:
            change(row)
        with_result(log=log)(given)
    return apply


FAULTS = [
    ("PPL under target", lambda given: given.update(target_ppl=300.0)),
    ("improved on the previous version", lambda given: given.update(previous_ppl=299.0)),
    ("density in [0.1, 0.9]", lambda given: given["density"].update({"1.k": 0.09})),
    ("density in [0.1, 0.9]", lambda given: given["density"].update({"1.k": 0.91})),
    ("amplitudes in [0.3, 3.0]", lambda given: given["amplitudes"].update({"1.v": 0.29})),
    ("amplitudes in [0.3, 3.0]", lambda given: given["amplitudes"].update({"1.v": 3.01})),
    ("training completed or stopped early", with_result(stopped="time budget")),
    ("no NaN or Inf loss", with_result(nonfinite=1)),
    ("no NaN or Inf loss", with_log(lambda row: row.update(loss=float("inf")))),
    ("memory under 8 GB", with_result(peak_memory_gb=7.5)),  # 7.5 GiB are 8.05 GB
    ("FDD active", with_log(lambda row: row.pop("fdd"))),
    ("tau evolved", with_log(lambda row: row.update(tau=2.0))),
    ("tau evolved", with_log(lambda row: row.pop("tau"))),
    ("early stopping worked", with_result(best_step=4000)),
    ("early stopping worked", with_result(best_step=0)),
    ("FDD loss decreased", with_log(lambda row: row.update(fdd=row["step"] / 100))),
    ("step budget met", with_result(step=5001)),
]


def test_a_good_run_passes_all_twelve_checks():
    checks = asnn.run_checks(**good())
    assert [check.name for check in checks] == CHECKS and all(check.passed is True for check in checks)
    assert all(check.value for check in checks)


@pytest.mark.parametrize("name, fault", FAULTS, ids=[f"{i} {name}" for i, (name, _) in enumerate(FAULTS)])
def test_each_check_says_no_to_its_fault(name, fault):
    given = good()
    fault(given)
    failed = {check.name for check in asnn.run_checks(**given) if check.passed is not True}
    assert name in failed
    # Without any FDD value its loss has not decreased either.
    assert failed <= {name, "FDD loss decreased"} if name == "FDD active" else failed == {name}


def test_every_check_has_a_fault():
    assert {name for name, _ in FAULTS} == set(CHECKS)


def test_checks_that_do_not_apply_are_neither_passed_nor_failed():
    given = {**good(), "recipe": asnn.get_recipe("v10"), "previous_ppl": None}
    with_log(lambda row: row.pop("fdd"))(given)
    undecided = {check.name for check in asnn.run_checks(**given) if check.passed is None}
    assert undecided == {"improved on the previous version", "FDD active", "tau evolved", "FDD loss decreased"}


def test_bad_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match="version is '../x'; allowed: at most 100 letters"):
        asnn.Run.open("../x", "name", {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_attached_unfinished_run_is_resumed_from_a_copy(tmp_path, monkeypatch):
    config = {"recipe": "x", "lr": 0.1}
    old = asnn.Run.open("v0", "night", config, tmp_path / "input" / "deep")
    (old.folder / "checkpoint.pt").write_bytes(b"weights")
    monkeypatch.setenv("ASNN_INPUTS", str(tmp_path / "input"))
    other = asnn.Run.open("v0", "night", {**config, "lr": 0.2}, tmp_path / "other")
    assert not (other.folder / "checkpoint.pt").exists()
    new = asnn.Run.open("v0", "night", config, tmp_path / "outputs")
    assert "resuming the attached" in new.note
    assert (new.folder / "checkpoint.pt").read_bytes() == b"weights"


def test_of_equally_old_runs_the_highest_version_is_taken(tmp_path, distillation, teacher):
    student = distillation()[0].student
    for version in ("v9", "v15", "v14.4"):
        run = asnn.Run.open(version, "run", SETTINGS, tmp_path)
        run.finish(metrics(), student, teacher.tokenizer)
        os.utime(run.folder / "metrics.json", (0, 0))  # as attached files may be
    assert asnn.find_run(outputs=tmp_path) == tmp_path / "v15" / "run"
    assert asnn.find_run(without=("v15",), outputs=tmp_path) == tmp_path / "v14.4" / "run"
    os.utime(tmp_path / "v9" / "run" / "metrics.json", (1, 1))
    assert asnn.find_run(outputs=tmp_path) == tmp_path / "v9" / "run"


def test_the_style_is_one_and_its_colours_are_told_apart():
    matplotlib, colors = pytest.importorskip("matplotlib"), pytest.importorskip("matplotlib.colors")
    with matplotlib.rc_context():
        matplotlib.rcParams["axes.prop_cycle"] = matplotlib.rcParamsDefault["axes.prop_cycle"]
        asnn.figure_style()
        assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"] == list(asnn.COLOURS.values())
        assert matplotlib.rcParams["axes.grid"] is True
    # Seen without the green cones (Machado et al. 2009), on linear RGB.
    deuteranopia = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                             [-0.011820, 0.042940, 0.968881]])

    def nearest(names):
        seen = np.array([colors.to_rgb(name) for name in names]) ** 2.2 @ deuteranopia.T
        return np.linalg.norm(seen[:, None] - seen[None], axis=2)[np.triu_indices(len(seen), 1)].min()
    default = [f"C{i}" for i in range(8)]
    with matplotlib.rc_context():
        matplotlib.rcParams["axes.prop_cycle"] = matplotlib.rcParamsDefault["axes.prop_cycle"]
        assert nearest(asnn.COLOURS.values()) > 2 * nearest(default)


def test_logarithmic_ticks_are_numbers():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    figure, axes = pyplot.subplots()
    axes.plot([1, 2, 4], [150, 400, 3000])
    axes.set(xscale="log", yscale="log")
    before = {label.get_text() for label in axes.get_yticklabels()}
    asnn.plain_log(axes.yaxis)
    asnn.plain_log(axes.xaxis, (1, 2, 4))
    figure.canvas.draw()
    assert {"200", "500", "1,000", "2,000"} <= {label.get_text() for label in axes.get_yticklabels()} != before
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]
    assert axes.get_xticklabels(minor=True) == axes.get_yticklabels(minor=True) == []
    axes.set_ylim(0.01, 1000)  # so many powers of ten leave no room between them
    asnn.plain_log(axes.yaxis)
    figure.canvas.draw()
    wide = {label.get_text() for label in axes.get_yticklabels()}
    assert {"0.01", "1", "1,000"} <= wide and not {"0.02", "2", "5"} & wide
    pyplot.close(figure)


# ---- the student that a notebook works on


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache):
    """(outputs, profile) with a short run of v14.4-sites in them."""
    outputs = tmp_path_factory.mktemp("made")
    small = asnn.PROFILES["tiny"].replace(corpus_chars=150_000, teacher_steps=4, eval_windows=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASNN_CACHE", str(cache))
        patch.setenv("ASNN_OUTPUTS", str(outputs))
        asnn.train_short_student("v14.4-sites", small, "as a test", steps=2)
    return outputs, small


@pytest.fixture
def a_run(made, tmp_path, monkeypatch):
    """(a_run(version, name, age, **changes to the student's config), profile): copies of the run, so old."""
    monkeypatch.setenv("ASNN_OUTPUTS", str(tmp_path))

    def copy_of(version, name="run", age=0, **changes):
        folder = tmp_path / version / name
        shutil.copytree(next((made[0] / "short").glob("*seed42")), folder)
        os.utime(folder / "metrics.json", (1e9 - age, 1e9 - age))
        if changes:
            student = asnn.GooseForCausalLM(asnn.GooseConfig.from_dict(
                {**json.loads((folder / "student" / "config.json").read_text()), **changes}))
            student.save_pretrained(folder / "student")
        return folder
    return copy_of, made[1]


ASKED = {"recipe": "v14.4-sites", "without": ("v16", "v17"), "sites": ("mix_in", "ffn_hidden"), "steps": 2}


def test_a_student_is_loaded_with_what_made_it_its_task_and_its_gate(a_run):
    copy_of, small = a_run
    folder = copy_of("v14.4-sites", "night")
    copy_of("v17", age=-100)
    copy_of("short", age=-200)  # newer, and taken only where there is no other
    loaded = asnn.load_student(None, small, "as a test", **ASKED)
    student, recipe, profile, found = asnn.load_run(folder)
    assert loaded.folder == folder.resolve() and loaded.name == "v14.4-sites-night"
    assert (loaded.recipe, loaded.profile, loaded.metrics) == (recipe, profile, found)
    assert asnn.student_id(loaded.student) == asnn.student_id(student) and not loaded.student.training
    assert loaded.task.recipe == recipe and loaded.task.corpus.hash == found["corpus"]["hash"]
    assert (loaded.gated, loaded.gate) == asnn.gate_status(student) and loaded.gate.startswith("ungated")
    assert f"{found['student']['test']['ppl']:.2f}" in str(loaded) and asnn.student_id(student) in str(loaded)
    asnn.write_atomically(folder.parents[1] / "v15" / "gate.json", json.dumps(
        {"student": asnn.student_id(student), "metrics": {"CKA": {"pass": True}}, "tokens": 20_480}))
    assert asnn.load_student(None, small, "as a test", **ASKED).gated


def test_the_densities_of_a_loaded_student_are_those_of_its_run(a_run):
    copy_of, small = a_run
    copy_of("v14.4-sites")
    loaded = asnn.load_student(None, small, "as a test", **ASKED)
    assert loaded.density == loaded.metrics["student"]["density"]
    layers = loaded.recipe.n_layer
    assert list(loaded.site_density) == ["mix_in", "mix_out", "ffn_in", "ffn_hidden"]
    for site, mean in loaded.site_density.items():
        found = asnn.densities_at(loaded.density, site)
        assert len(found) % layers == 0 and mean == pytest.approx(sum(found) / len(found))
    assert asnn.densities_at(loaded.density, "k") == [loaded.density[f"{i}.k"] for i in range(layers)]
    assert len(asnn.densities_at(loaded.density, "mix_in")) == layers * sum(
        name.startswith("0.mix_in.") for name in loaded.density) > layers
    assert asnn.densities_at({"head_in": 0.25}, "head_in") == [0.25] and asnn.densities_at(loaded.density, None) == []


def test_without_a_run_a_short_one_is_loaded_and_made_once(a_run, capsys):
    _, small = a_run
    first, second = (asnn.load_student(None, small, "as a test", **ASKED) for _ in range(2))
    assert first.folder.parent.name == "short" and first.folder == second.folder
    assert capsys.readouterr().out.count("a short one of 2 steps is trained now (as a test)") == 1


@pytest.mark.parametrize("changes, words", [
    ({"spike_kind": "dense"}, "a student with spikes; this one is a dense twin"),
    ({"spike_sites": ["k", "v", "mix_in"]}, "one with spikes at mix_in, ffn_hidden, as runs of recipe v14.4-sites "
                                            "have; this one has them at k, v, mix_in")])
def test_a_student_that_does_not_fit_is_refused_before_its_teacher_is_loaded(a_run, monkeypatch, changes, words):
    copy_of, small = a_run
    copy_of("v14.4", "night", **changes)
    monkeypatch.setattr(asnn, "load_task", lambda *_: pytest.fail("a task was loaded"))
    with pytest.raises(ValueError, match=re.escape(f"student is 'v14.4/night'; allowed: {words}.")):
        asnn.load_student("v14.4/night", small, "as a test", **ASKED)


def test_a_student_that_is_nowhere_is_refused_with_those_there_are(a_run):
    copy_of, small = a_run
    copy_of("v14.4", "night")
    with pytest.raises(ValueError, match="student is 'v14.4/noon'; allowed: v14.4/night"):
        asnn.load_student("v14.4/noon", small, "as a test", **ASKED)


def test_another_corpus_can_take_the_place_of_that_of_the_run(a_run, corpus):
    copy_of, small = a_run
    copy_of("v14.4-sites")
    loaded = asnn.load_student(None, small, "as a test", **ASKED, corpus=str(corpus.folder), teacher=None)
    assert loaded.task.corpus.hash == corpus.hash != loaded.metrics["corpus"]["hash"]
    assert loaded.profile == small.replace(corpus=str(corpus.folder))
