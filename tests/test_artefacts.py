"""Artefacts: run folders, the student of a page, tables, figures; what v14.3 and v14.4 own."""
import copy
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from conftest import definitions, isolate
from matplotlib import pyplot

import asnn_common as asnn

SETTINGS = {"recipe": {"name": "v14.3", "lr": 0.1}, "seed": 42}


def metrics(run="run", ppl=20.0, bits=1.25, version="v14.3", teacher="gpt2"):
    """What a run writes, with figures that are easy to find again."""
    split = {"ppl": ppl, "nll": 3.0, "nll_se": 0.01, "tokens": 12345, "windows": 77, "seq_len": 16,
             "bits_per_byte": bits, "word_ppl": 99.0}
    return {"run": run, "version": version, "corpus": {"name": "wikitext-2", "hash": "0123456789"},
            "teacher": {"name": teacher, "test": {**split, "ppl": 10.0}},
            "student": {"test": split, "parameters": 1_500_000, "density": {"0.k": 0.4, "0.v": .5}},
            "gap": {"test": {"value": ppl / 10, "standard_error": 0.021}},
            "training": {"step": 321, "tokens_per_second": 4567.0},
            "environment": {"gpus": [], "cpu": "A CPU", "threads": 3}}


# ---- run folders


def test_runs_are_new_resumed_or_left_alone(tmp_path):
    first = asnn.Run.open("v14.3", "name", SETTINGS)
    assert first.folder == tmp_path / "outputs" / "v14.3" / "name" and first.note == "new run name"
    assert json.loads((first.folder / "config.json").read_text()) == SETTINGS
    env = json.loads((first.folder / "env.json").read_text())
    assert env["versions"] == asnn.environment()["versions"] and (first.folder / "figures").is_dir()
    again = asnn.Run.open("v14.3", "name", dict(reversed(SETTINGS.items())))
    assert (again.folder, again.note) == (first.folder, "resuming unfinished run name")
    other = asnn.Run.open("v14.3", "name", {**SETTINGS, "seed": 7})
    assert other.folder.name == "name-2" and "other settings or is finished" in other.note
    assert asnn.Run.open("v14.3", "name", {**SETTINGS, "seed": 7}).folder == other.folder
    first.finish(metrics())
    files = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    third = asnn.Run.open("v14.3", "name", SETTINGS)
    third.finish(metrics(ppl=5.0))
    assert third.folder.name == "name-3" and len(files) == 3
    assert all(path.read_bytes() == content for path, content in files.items())
    assert asnn.Run.open("v14.3", "name", SETTINGS).folder.name == "name-4"


def test_a_run_with_something_left_keeps_its_checkpoint_and_is_opened_again(tmp_path):
    run = asnn.Run.open("v14.4", "night", SETTINGS)
    (run.folder / "checkpoint-9").mkdir()
    for left, name in (({"left": "the ternary tax"}, "night"), ({}, "night-2")):
        run.finish({**metrics(), **left})
        assert (run.folder / "checkpoint-9").is_dir() == bool(left) and asnn.Run.finished()
        assert asnn.Run.open("v14.4", "night", SETTINGS).folder.name == name


def test_an_attached_unfinished_run_goes_on_from_a_copy(tmp_path, monkeypatch):
    old = asnn.Run.open("v14.4", "night", SETTINGS)
    (old.folder / "checkpoint-9").write_bytes(b"weights")
    shutil.copytree(tmp_path / "outputs", tmp_path / "input" / "someone" / "outputs")
    monkeypatch.setenv("ASNN_INPUTS", str(tmp_path / "input"))
    monkeypatch.setenv("ASNN_OUTPUTS", str(tmp_path / "new"))
    other = asnn.Run.open("v14.4", "night", {**SETTINGS, "seed": 7})
    assert not (other.folder / "checkpoint-9").exists()
    new = asnn.Run.open("v14.4", "night", SETTINGS)
    assert new.folder.name == "night-2" and "resuming the attached unfinished run" in new.note
    assert (new.folder / "checkpoint-9").read_bytes() == b"weights"


def test_a_run_interrupted_while_it_finishes_is_unfinished(task, student, monkeypatch):
    run = asnn.Run.open("v14.3", "name", SETTINGS)
    (run.folder / "checkpoint-9").mkdir()

    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(asnn, "_model_card", None)
        run.finish(metrics(), student, task.tokenizer)
    assert not (run.folder / "student").exists() and (run.folder / "checkpoint-9").exists()
    again = asnn.Run.open("v14.3", "name", SETTINGS)
    assert again.folder == run.folder and asnn.Run.finished() == []
    again.finish(metrics(), student, task.tokenizer)
    assert asnn.Run.finished() == [metrics()] and (run.folder / "student" / "README.md").is_file()


def test_the_index_lists_each_training_once_and_nothing_else(tmp_path):
    for number, version in enumerate(("v14.4", "v14.3", "v14.3")):
        run = asnn.Run.open(version, f"run{number}", SETTINGS)
        run.finish({**metrics(f"run{number}", 10.0 + number, version=version), "left": "the tax"})
        run.finish(metrics(f"run{number}", 10.0 + number, version=version))
        os.utime(run.folder / "metrics.json", (number, number))
    asnn.Run.open("v14.3", "unfinished", SETTINGS)
    gate = asnn.Run.open("v15", "run0", SETTINGS)  # not a training: its metrics are of another kind
    gate.finish({"student": "v14.4/run0", "gate": {}})
    assert [m["run"] for m in asnn.Run.finished()] == ["run0", "run1", "run2"]
    lines = (tmp_path / "outputs" / "index.md").read_text().splitlines()
    assert lines[0] == "# Runs" and len([line for line in lines if line.startswith("|")]) == 2 + 3
    assert [cell.strip() for cell in lines[4].strip("|").split("|")] == [
        "v14.4/run0", "wikitext-2 012345, gpt2", "1.5M, 321 steps", "10.00, 10.00",
        "1.000 ± 0.021", "0.45", "A CPU"]


@pytest.mark.parametrize("teacher, licence, base", [
    ("gpt2", "mit", "gpt2"), ("one/llama", "other", "one/llama"), ("my-folder", "other", None)])
def test_a_model_card_has_the_results_and_names_only_what_the_hub_has(teacher, licence, base):
    card = asnn._model_card(metrics(teacher=teacher))
    assert f"license: {licence}" in card and ("base_model:" in card) == (base is not None)
    for part in ("ASNN-Goose v14.3, run run", "1,500,000 parameters", "content hash 0123456789",
                 "windows of 16 tokens", "Salesforce/wikitext", "value: 20.0", "value: 1.25",
                 "ternary spikes {-1, 0, +1} at k, v", "2.000 ± 0.021", "padding on the left"):
        assert part in card, part
    assert "bits_per_byte" not in asnn._model_card(metrics(bits=None))


# ---- the student that a page works on


@pytest.fixture(scope="module")
def trained(small_recipe, cache, tmp_path_factory):
    """(outputs, metrics) of a short run of v14.4-rates."""
    outputs = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, cache, outputs)
        task = asnn.load_task(small_recipe("v14.4-rates", distill_steps=2, eval_windows=2))
        run = asnn.Run.open("v14.4-rates", "night", {"recipe": vars(task.recipe)})
        student, result = asnn.distil(task, folder=run.folder)
        found = run.metrics(task, student, result, task.measure(student, 4), stages=[])
        run.finish(found, student, task.tokenizer)
    return outputs, json.loads((run.folder / "metrics.json").read_text())


@pytest.fixture
def a_run(trained, tmp_path):
    """a_run(version, name, age, **changes to the student's config): the folder of a copy."""
    def make(version="v14.4-rates", name="night", age=0, **changes):
        folder = tmp_path / "outputs" / version / name
        shutil.copytree(trained[0] / "v14.4-rates" / "night", folder)
        path = folder / "student" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        os.utime(folder / "metrics.json", (1e9 - age, 1e9 - age))
        return folder
    return make


def test_metrics_have_the_keys_that_pages_read(trained):
    _, found = trained
    assert set(found) == {"version", "run", "profile", "seed", "status", "environment", "corpus",
                          "teacher", "student", "gap", "training", "stages"}
    assert {"name", "parameters", "trained_steps", "validation", "test"} <= set(found["teacher"])
    assert set(found["student"]) == {"parameters", "density", "amplitude", "validation", "test"}
    assert {"step", "steps", "stopped", "best_step", "seconds", "tokens_per_second", "precision",
            "skipped", "peak_memory_gb"} <= set(found["training"])
    assert len(found["student"]["density"]) == 2 * 9 and len(found["student"]["amplitude"]) == 4
    gap = found["student"]["test"]["ppl"] / found["teacher"]["test"]["ppl"]
    assert found["gap"]["test"]["value"] == pytest.approx(gap)


def test_a_student_is_loaded_with_what_made_it(a_run, trained, task):
    folder = a_run()
    loaded = asnn.load_student()
    assert loaded.folder == folder.resolve() and loaded.name == "v14.4-rates-night"
    assert loaded.recipe == loaded.task.recipe and loaded.recipe.name == "v14.4-rates"
    assert loaded.metrics == trained[1] and not loaded.student.training
    assert loaded.density == pytest.approx(loaded.metrics["student"]["density"])
    assert list(loaded.site_density) == ["mix_in", "mix_out", "ffn_in", "ffn_hidden"]
    mixes = [share for name, share in loaded.density.items() if ".mix_in." in name]
    assert len(mixes) == 8 and loaded.site_density["mix_in"] == pytest.approx(np.mean(mixes))
    assert loaded.student.content_hash() in str(loaded) and "v14.4-rates/night" in str(loaded)
    other = asnn.load_student(str(folder), corpus=str(task.corpus.folder), teacher="train")
    assert other.task.corpus.hash == task.corpus.hash and not other.gated


def test_of_several_students_the_newest_that_fits_is_taken(a_run, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="run asnn_v14_4_transfer first"):
        asnn.load_student()
    old, new = a_run(age=100), a_run("v15", "remedied")
    plain = a_run("v14.3", "morning", age=-100, spike_sites=["k", "v"])
    a_run("v9", "unfinished", age=-200).joinpath("metrics.json").unlink()
    find = asnn._find_run
    assert find(None, (), ()) == plain and find(None, (), ("mix_in",)) == new
    assert find(None, ("v15", "v14.3"), ()) == old == find("v14.4-rates/night", (), ())
    for path in (old, new, plain):  # as attached files may be
        os.utime(path / "metrics.json", (0, 0))
    assert find(None, (), ()) == new  # the highest version
    monkeypatch.setenv("ASNN_OUTPUTS", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("ASNN_INPUTS", str(tmp_path))
    assert find("v14.3/morning", (), ()) == plain
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find(old, (), ()) == old == find("~/outputs/v14.4-rates/night", (), ())
    with pytest.raises(ValueError, match=r"student_run is 'noon'; allowed: v14.3/morning, v14.4-"):
        find("noon", (), ())


def test_a_student_that_does_not_fit_is_refused_before_its_task_is_loaded(a_run, monkeypatch):
    monkeypatch.setattr(asnn, "load_task", lambda *_: pytest.fail("a task was loaded"))
    a_run("v9", "dense", spike_kind="dense")
    a_run("v9", "two", spike_sites=["k", "v", "mix_in"])
    for name, words in (("dense", "a student with spikes."), ("two", "one with spikes at mix_in, "
                        "ffn_hidden, as runs of recipe v14.4-rates have; this one has them at")):
        with pytest.raises(ValueError, match=f"student_run is 'v9/{name}'; allowed: {words}"):
            asnn.load_student(f"v9/{name}", sites=("mix_in", "ffn_hidden"))


def test_run_folders_of_before_are_read_with_one_line(a_run, capsys):
    folder, expected = a_run(), asnn.load_student(str(a_run("v14.4", "new")))
    given = json.loads((folder / "config.json").read_text())["recipe"]
    moved = ("corpus", "corpus_chars", "eval_windows", "final_windows")  # were the profile's
    recipe = {name: given[name] for name in given if name not in (*moved, "profile", "head_dim")}
    recipe.update(head_width=given["head_dim"], clip=1.0, ce_start=0, teacher="gpt2", corpus=None)
    profile = {"name": "tiny", "description": "", "recipe": [["d_model", 64]],
               **{name: given[name] for name in (*moved, "teacher")}}
    (folder / "config.json").write_text(json.dumps({"recipe": recipe, "profile": profile}))
    path = folder / "student" / "config.json"
    saved = json.loads(path.read_text())
    saved.update(head_width=saved.pop("head_dim"), alpha_init=1.0, amplitude_init=1.0)
    path.write_text(json.dumps(saved))
    capsys.readouterr()
    student, found, _ = asnn._load_run(folder)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and re.match(r"night: ignored fields .*clip", printed)
    assert found == expected.recipe and found.profile == "tiny"
    assert student.content_hash() == expected.student.content_hash()


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
@pytest.mark.parametrize("content", ['{"recipe": {"lr": 0', '{"recipe": 1, "gap": 1}'])
def test_a_damaged_file_of_a_run_is_named(a_run, name, content):
    path = a_run() / name
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path} is 'damaged'; allowed: a finished run's file."):
        asnn.load_student("v14.4-rates/night")


def gate_of(student, passed=True, tokens=20_480):
    return {"student": student.content_hash(), "tokens": tokens,
            "metrics": {"dead channels": {"pass": True}, "CKA": {"pass": passed}}}


def test_a_claim_is_gated_only_by_a_passed_gate_of_the_same_student(student, tmp_path, monkeypatch):
    other, path, status = copy.deepcopy(student), tmp_path / "outputs" / "v15", asnn._gate_status
    next(other.parameters()).data.add_(1.0)
    assert status(student) == (False, "ungated: no gate.json was found; run the v15 notebook first")

    def write(gate, folder=path):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gate.json").write_text(json.dumps(gate))

    write(gate_of(student))
    assert status(student) == (True, "gated: it passed all 2 metrics over 20,480 tokens")
    assert not status(other)[0] and "of other students" in status(other)[1]
    for changed in ({"metrics": []}, {"metrics": {}}, {"metrics": {"CKA": True}}, {"tokens": "5"},
                    {"metrics": {"CKA": {"pass": "no"}}}, {"student": ["a"], "other": "b"}):
        write({**gate_of(student), **changed})  # of our keys, but of another tool
        assert status(student) == (False, status(other)[1])
    write(gate_of(student, tokens=4096))
    assert "over 4,096 tokens, and 20,000 are needed" in status(student)[1]
    # The student before a remedy is known too, and the newest gate of a student counts.
    write({**gate_of(other), "other": gate_of(student, passed=False)})
    assert status(other)[0] and status(student) == (False, "ungated: it failed CKA")
    write(gate_of(student), path / "run")
    write(gate_of(student, passed=False))
    for newest in (path / "gate.json", path / "run" / "gate.json"):
        os.utime(newest, (2e9 + len(newest.parts), 2e9 + len(newest.parts)))
        assert status(student)[0] == (newest.parent.name == "run")
    write(gate_of(student), tmp_path / "input" / "earlier" / "v15")
    shutil.rmtree(path)
    assert not status(student)[0]
    monkeypatch.setenv("ASNN_INPUTS", str(tmp_path / "input"))
    assert status(student)[0]


# ---- environment, tables, figures


def test_the_environment_says_where_and_on_what(monkeypatch, tmp_path):
    found = asnn.environment()
    assert torch.__version__.startswith(found["versions"]["torch"]) and found["disk_free_gb"] > 0
    assert {"transformers", "datasets", "accelerate", "numpy"} <= set(found["versions"])
    assert found["hardware"].endswith(f"{torch.get_num_threads()} thread") and found["cpu"]
    assert json.loads(json.dumps(found)) == found and found["platform"] == "local"
    monkeypatch.delenv("ASNN_OUTPUTS")
    monkeypatch.chdir(tmp_path)
    places = [(asnn.environment()["platform"], asnn._outputs_folder())]
    for variable in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):  # Kaggle sets Colab's too
        monkeypatch.setenv(variable, "set")
        places.append((asnn.environment()["platform"], asnn._outputs_folder()))
    assert places == [("local", asnn.Path(asnn.__file__).resolve().parent / "outputs"),
                      ("colab", tmp_path / "outputs"), ("kaggle", tmp_path / "outputs")]


def test_a_table_is_shown_whole_and_without_row_numbers(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    asnn.show_table({"system": f"a {i}", **{f"column {j}": "x" * 30 for j in range(6)}}
                    for i in range(120))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 160 and "..." not in printed
    assert printed.count("a 119") == 1 and all(f"column {j}" in printed for j in range(6))
    asnn.show_table([{"prompt": "one\ntwo"}], prose=True)
    assert capsys.readouterr().out == "[prompt] 'one\\ntwo'\n\n"
    shown = []
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr("IPython.display.display", lambda table: shown.append(table.to_html()))
    for prose in (False, True):
        asnn.show_table([{"prompt": "<one>"}], prose)
        assert ">prompt</th>" in shown[-1] and "row_heading" not in shown[-1]
        assert ("pre-wrap" in shown[-1]) == prose and capsys.readouterr().out == ""


def test_figures_have_one_style_and_plain_numbers_and_are_saved():
    with matplotlib.rc_context():
        assert asnn.figure_style() == asnn.COLOURS and len(set(asnn.COLOURS.values())) == 8
        cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
        figure, axes = pyplot.subplots()
        axes.plot([1, 2, 4000], [150, 400, 900])
        axes.set(xscale="log", yscale="log")
        run = asnn.Run.open("v14.3", "name", SETTINGS)
        run.show(figure, "curve")
        labels = [re.sub(r"\$|\\mathdefault|[{}]", "", label.get_text()) for axis in (
            axes.xaxis, axes.yaxis) for label in axis.get_ticklabels(which="both")]
    assert {"1", "1000", "200"} <= set(labels) and not any("^" in text for text in labels)
    assert cycle == list(asnn.COLOURS.values()) and not pyplot.fignum_exists(figure.number)
    assert (run.folder / "figures" / "curve.png").read_bytes()[1:4] == b"PNG"
    assert "<svg" in (run.folder / "figures" / "curve.svg").read_text()


# ---- v14.3


def checks_of(**changes):
    """The twelve checks of a run with nothing wrong but `changes`."""
    log = [{"step": step, "loss": 5.0 - step / 10, "tau": 2.0 - step / 100, "fdd": 0.8 - step / 100}
           for step in range(1, 13)]
    log = changes.pop("log", lambda rows: rows)(log)
    given = {"ppl": 300.0, "target_ppl": 306.89, "previous_ppl": 330.0,
             "density": {"0.k": 0.3, "0.v": 0.5}, "amplitudes": {"0.k": 0.9, "0.v": 1.4}}
    recipe = asnn.RECIPES["v14.3"].replace(**changes.pop("recipe", {}))
    given.update({name: changes.pop(name) for name in list(changes) if name in given})
    result = SimpleNamespace(**{
        "log": log, "step": 5000, "stopped": "completed", "finished": True, "best_ppl": 300.0,
        "best_step": 4500, "skipped": 0, "peak_memory_gb": 5.0, **changes})
    return definitions("asnn_v14_3_distill").run_checks(recipe, result, **given)


def NO_FDD(rows):
    return [{name: row[name] for name in ("step", "loss", "tau")} for row in rows]


FAULTS = [
    ("PPL under target", {"target_ppl": 300.0}),
    ("improved on the previous version", {"previous_ppl": 299.0}),
    *(("density in [0.1, 0.9]", {"density": {"0.k": 0.3, "1.k": k}}) for k in (0.09, 0.91)),
    *(("amplitudes in [0.3, 3.0]", {"amplitudes": {"0.k": 0.9, "1.v": v}}) for v in (0.29, 3.01)),
    ("training completed or stopped early", {"stopped": "time budget", "finished": False}),
    ("no NaN or Inf loss", {"skipped": 1}),
    ("no NaN or Inf loss", {"log": lambda rows: [{**row, "loss": float("inf")} for row in rows]}),
    ("memory under 8 GB", {"peak_memory_gb": 7.5}),  # 7.5 GiB are 8.05 GB
    ("FDD active", {"log": NO_FDD}),
    ("tau evolved", {"log": lambda rows: [{**row, "tau": 2.0} for row in rows]}),
    ("early stopping worked", {"best_step": 4000}), ("early stopping worked", {"best_step": 0}),
    ("FDD loss decreased", {"log": lambda rows: [{**row, "fdd": row["step"] / 9} for row in rows]}),
    ("step budget met", {"step": 5001})]


def test_a_good_run_passes_all_twelve_checks_and_some_do_not_apply():
    good = checks_of()
    assert len(good) == 12 and all(row["passed"] is True and row["value"] for row in good)
    json.dumps(good)
    plain = checks_of(recipe={"fdd": "none", "temperature": "fixed"}, previous_ppl=None, log=NO_FDD)
    assert {row["name"] for row in plain if row["passed"] is None} == {
        "improved on the previous version", "FDD active", "tau evolved", "FDD loss decreased"}
    assert all(row["passed"] is not False for row in plain)


@pytest.mark.parametrize("name, fault", FAULTS)
def test_each_check_says_no_to_its_fault(name, fault):
    failed = {row["name"] for row in checks_of(**fault) if row["passed"] is not True}
    # Without any FDD value its loss has not decreased either.
    assert failed == ({name, "FDD loss decreased"} if name == "FDD active" else {name})


# ---- v14.4


def test_the_memory_of_the_long_run_is_arithmetic():
    memory, recipe = definitions("asnn_v14_4_transfer").training_memory, asnn.RECIPES["v14.4-t4"]
    parts, kept = memory(recipe, 50257, 124_439_808), 8 * 512 * 5 * 768
    assert 5 < sum(parts.values()) / 2**30 < 14
    assert parts["teacher weights, fp32"] == 4 * 124_439_808
    assert parts["student weights, gradients, two moments, fp32"] == 16 * 77_457_488
    sites = recipe.replace(spike_sites=asnn.SITES[:-1])
    for given, more in ((recipe, 0), (sites, 150), (sites.replace(rate_weight=1.0), 150 + 228)):
        assert memory(given, 50257, 1)["kept for backward"] == kept * (172 + more)


def test_the_tax_is_a_ratio_with_the_error_of_paired_windows(small_task):
    page = definitions("asnn_v14_4_transfer")
    row = page.tax_row(42, {"ppl": 3.0, "window_nll": [1, 2, 3]},
                       {"ppl": 2.0, "window_nll": [1, 1, 1]})
    assert row["tax"] == 1.5 and row["standard_error"] == pytest.approx(1.5 * 1 / 3**0.5)
    recipe = small_task("v14.4-rates", align_steps=4).recipe.replace(activation="gelu")
    other = page.tax_recipe(recipe, "dense", 7, 3)
    changed = {name for name in vars(recipe) if vars(other)[name] != vars(recipe)[name]}
    assert changed == {"spike_kind", "seed", "distill_steps", "align_steps", "patience"}
    assert (other.spike_kind, other.seed, other.distill_steps) == ("dense", 7, 3)
    assert other.align_steps == round(833 * 3 / 5000) and other.patience == 3


def test_the_tax_goes_on_where_the_hours_ended_and_repeats_nothing(small_task, monkeypatch):
    page, task = definitions("asnn_v14_4_transfer"), small_task("v14.4", final_windows=4)
    run, made = asnn.Run.open("v14.4", "night", SETTINGS), []
    distil = asnn.distil

    def counted(task, recipe, folder, description):
        made.append(description)
        limit = 1 if len(made) == 3 else None  # the third run is cut off
        return distil(task, recipe, folder, description=description, max_steps=limit)

    monkeypatch.setattr(asnn, "distil", counted)
    known = {"ternary-42-2": {"ppl": 100.0, "window_nll": [4.0, 4.1, 4.2, 4.3]}}
    arguments = task, run, range(42, 44), 2, known, lambda: None
    first = page.measure_tax(*arguments)
    assert made == ["dense-42-2", "ternary-43-2", "dense-43-2"]
    kept = {path.relative_to(run.folder / "tax").parts[0] for path in run.folder.glob("tax/*/*")}
    assert kept == {"dense-43-2"}  # a checkpoint takes 1.2 GB at full size: that of what goes on
    second = page.measure_tax(*arguments)
    assert made[3:] == ["dense-43-2"] and [row["seed"] for row in second] == [42, 43]
    assert not [*run.folder.glob("tax/*")]
    assert first == second[:1] and page.measure_tax(*arguments) == second and len(made) == 4


@pytest.mark.parametrize("name, share", [("v14.4-rates", 1.0), ("v14.4", 0.0)])
def test_the_products_are_those_of_operations_and_say_what_spikes_feed(small_task, name, share):
    student = small_task(name).build_student()
    table, fed = definitions("asnn_v14_4_transfer").products(student, {"0.ffn_in": 0.5})
    rows, table = asnn.operations(student), table.set_index("product")
    assert fed == share and table["MACs"].sum() == sum(row["MACs"] for row in rows)
    assert set(table.index) == {row["product"] for row in rows if row["MACs"]}
    half = table.loc["W_1", "MACs"] // 4  # of one of two layers
    assert table.loc["W_1", "skipped"] == half * share
    assert table.loc["W_1", "adds"] == 3 * half * share
