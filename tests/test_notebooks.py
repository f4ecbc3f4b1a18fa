"""The notebook of the distillation on a simulated Kaggle, as a script and through papermill; the README's tables."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import asnn_common as asnn

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
NOTEBOOK = ROOT / "notebooks" / "asnn_v14_3_distill"


def listing(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def kaggle(tmp_path, depth):
    """(environment, working folder, input folder) of a Kaggle session without a network; inputs lie `depth` deep."""
    inputs, working = tmp_path / "kaggle" / "input", tmp_path / "kaggle" / "working"
    below = inputs.joinpath(*["datasets", "someone"][:depth])
    (below / "asnn-goose").mkdir(parents=True)
    working.mkdir()
    shutil.copy(ROOT / "asnn_common.py", below / "asnn-goose")
    notebook = working / NOTEBOOK.with_suffix(".py").name
    shutil.copy(NOTEBOOK.with_suffix(".py"), notebook)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("ASNN_", "HF_", "PYTHONPATH", "MPLBACKEND"))}
    nowhere = "http://127.0.0.1:9"
    env = {**keep, "KAGGLE_KERNEL_RUN_TYPE": "Interactive", "COLAB_RELEASE_TAG": "set on Kaggle too", "HF_HUB_OFFLINE": "1",
           "HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere, "ASNN_INPUTS": str(inputs), "ASNN_PROFILE": "tiny",
           "ASNN_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path), "MPLBACKEND": "Agg"}
    return env, working, below


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    """A folder with WikiText as the hub's parquet files and a GPT-2 with its tokenizer, both tiny."""
    import pandas as pd
    import transformers

    folder = tmp_path_factory.mktemp("attached")
    corpus = asnn.load_corpus("pydocs", 150_000)
    data = folder / "wikitext" / "wikitext-2-raw-v1"
    data.mkdir(parents=True)
    for split in asnn.SPLITS:
        lines = corpus.text(split).splitlines(keepends=True)
        pd.DataFrame({"text": lines}).to_parquet(data / f"{split}-00000-of-00001.parquet")
    tokenizer = asnn.train_tokenizer(corpus, 300)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=2, n_head=2,
                                     bos_token_id=0, eos_token_id=0)
    asnn.seed_everything(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return folder


def metrics_of(working):
    (path,) = working.glob("outputs/*/*/metrics.json")
    return json.loads(path.read_text())


def test_script_and_papermill_do_the_same_on_kaggle_without_a_network(tmp_path, attached):
    results = []
    for how, depth in (("script", 0), ("papermill", 2)):
        env, working, below = kaggle(tmp_path / how, depth)
        shutil.copytree(attached, below / "attached")
        before = listing(below)
        values = {"corpus": "wikitext-2", "teacher": "gpt2", "steps": 4, "run_name": "night"}
        if how == "script":
            notebook = working / NOTEBOOK.with_suffix(".py").name
            with_values(notebook, **values)
            command = [sys.executable, str(notebook)]
        else:
            shutil.copy(NOTEBOOK.with_suffix(".ipynb"), working)
            pairs = [part for name, value in values.items() for part in ("-p", name, str(value))]
            command = [sys.executable, "-m", "papermill", "--no-progress-bar", NOTEBOOK.with_suffix(".ipynb").name,
                       "out.ipynb", *pairs]
            env.pop("MPLBACKEND")
        done = subprocess.run(command, cwd=working, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert listing(below) == before  # inputs are read-only on Kaggle
        results.append(metrics_of(working))
    script, papermill = results
    assert script["environment"]["platform"] == "kaggle"
    assert script["run"] == papermill["run"] == "night"
    assert script["corpus"]["name"] == "wikitext-2" and script["teacher"]["name"] == "gpt2"
    for key in ("gap", "corpus"):
        assert script[key] == papermill[key]


def test_notebook_without_hub_or_attachment_ends_in_one_sentence(tmp_path):
    env, working, _ = kaggle(tmp_path, 1)
    notebook = working / NOTEBOOK.with_suffix(".py").name
    with_values(notebook, corpus="wikitext-2")
    done = subprocess.run([sys.executable, str(notebook)], cwd=working, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    for way in ("attach it", "give a folder", "pydocs"):
        assert way in last
    assert not list(working.glob("outputs/*/*"))


def test_bootstrap_says_what_to_do_when_the_module_is_nowhere(tmp_path):
    env, working, below = kaggle(tmp_path, 1)
    (below / "asnn-goose" / "asnn_common.py").unlink()
    done = subprocess.run([sys.executable, str(working / NOTEBOOK.with_suffix(".py").name)], cwd=working, env=env,
                          capture_output=True, text=True)
    assert done.returncode != 0 and "attach it as a Kaggle dataset" in done.stderr.strip().splitlines()[-1]


def cell_of(source, tag):
    return source.split(f'# %% tags=["{tag}"]\n')[1].split("\n# %%")[0]


@pytest.mark.parametrize("source", sorted((ROOT / "notebooks").glob("asnn_*.py")), ids=lambda path: path.stem)
def test_a_notebook_checks_all_its_parameters(source):
    text = source.read_text()
    names = [target.id for line in ast.parse(cell_of(text, "parameters")).body for target in line.targets]
    (call,) = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)
               and ast.unparse(node.func) == "asnn.check_parameters"]
    assert sorted((k.arg, ast.unparse(k.value)) for k in call.keywords) == sorted((name, name) for name in names)
    assert set(names) <= asnn.PARAMETERS.keys()


@pytest.mark.parametrize("name, version, outcome", [
    ("transformers", "4.57.3", "transformers>=5.0"), ("datasets", "3.6.0", "datasets>=4.0"), ("transformers", "5.0.0rc1", None), ("accelerate", "1.9", "accelerate>=1.10"),
    ("torch", "2.9.1+cu128", "torch is 2.9, and 2.10 or newer is needed"), ("torch", "3.0", None)])
def test_bootstrap_asks_for_versions_that_work(monkeypatch, name, version, outcome):
    """A package that is too old is installed anew; torch never is."""
    known, asked = importlib.metadata.version, []
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version if package == name else known(package))
    monkeypatch.setattr(subprocess, "run", lambda command: asked.append(command[5:]) or subprocess.CompletedProcess(command, 0))
    monkeypatch.setattr(sys, "path", list(sys.path))
    cell = compile(cell_of(NOTEBOOK.with_suffix(".py").read_text(), "bootstrap"), "bootstrap", "exec")
    if name == "torch" and outcome:
        with pytest.raises(ImportError, match=re.escape(outcome)):
            exec(cell, {"__file__": str(NOTEBOOK)})
    else:
        exec(cell, {"__file__": str(NOTEBOOK)})
    assert asked == ([[outcome]] if outcome and name != "torch" else [])


def with_values(notebook, **values):
    source = notebook.read_text()
    for name, value in values.items():
        assert f"\n{name} = " in source
        source = re.sub(rf"\n{name} = \S+", f"\n{name} = {value!r}", source, count=1)
    notebook.write_text(source)


def test_time_budget_ends_the_notebook_well_and_the_next_session_goes_on(tmp_path):
    env, working, below = kaggle(tmp_path, 1)
    notebook = working / NOTEBOOK.with_suffix(".py").name
    with_values(notebook, max_hours=1e-6, run_name="night")
    command = [sys.executable, str(notebook)]
    done = subprocess.run(command, cwd=working, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "time budget at step 1 of 30" in done.stdout
    assert "not yet: the run is not finished" in done.stdout
    assert not list(working.glob("outputs/*/*/metrics.json"))
    # The next session finds the outputs of this one attached as an input.
    shutil.copytree(working / "outputs", below / "last-night" / "outputs")
    shutil.rmtree(working / "outputs")
    with_values(notebook, max_hours=None)
    done = subprocess.run(command, cwd=working, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming the attached unfinished run" in done.stdout
    assert metrics_of(working)["training"]["step"] == 30


WATCH = """
import os, sys

def watch(event, args):
    if event == "open" and isinstance(args[0], str) and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        if any(part in args[0] for part in os.environ["WATCHED"].split(os.pathsep)):
            os.write(2, f"rank {os.environ.get('RANK')} wrote {args[0]}\\n".encode())

sys.addaudithook(watch)
"""


def test_two_processes_run_the_notebook_into_one_folder_and_one_of_them_writes(tmp_path):
    env, working, _ = kaggle(tmp_path, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "watch"),
            "WATCHED": os.pathsep.join((str(working / "outputs"), str(tmp_path / "cache")))}
    # --multi_gpu also where there is no GPU: without it accelerate starts a single process.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port,
               NOTEBOOK.with_suffix(".py").name]
    done = subprocess.run(command, cwd=working, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("new run tiny-seed42") == 2
    assert metrics_of(working)["training"]["step"] == 30  # and there is one metrics file only
    assert set(re.findall(r"rank (\d) wrote", done.stderr)) == {"0"}


def test_a_run_in_two_sessions_with_read_only_inputs_ends_like_one_without_a_budget(tmp_path):
    """With every site and its tax. The first session's output is attached, and nothing can be written there."""
    ends = {}
    for session in ("first", "second", "whole"):
        env, working, below = kaggle(tmp_path / session, 1)
        env["ASNN_CACHE"] = str(tmp_path / "cache")  # a teacher is trained once
        notebook = working / "asnn_v14_4_transfer.py"
        shutil.copy(ROOT / "notebooks" / notebook.name, notebook)
        # The notebook leaves at least 3.6 s; so many steps take longer.
        with_values(notebook, recipe="v14.4-sites", run_name="night", steps=300, tax_seeds=2, tax_steps=5,
                    max_hours=1e-6 if session == "first" else None)
        if session == "second":
            shutil.copytree(tmp_path / "first" / "kaggle" / "working" / "outputs", below / "last-night" / "outputs")
            for path in below.rglob("*"):
                path.chmod(0o555 if path.is_dir() else 0o444)
        before = listing(below)
        done = subprocess.run([sys.executable, str(notebook)], cwd=working, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert listing(below) == before
        ends[session] = done.stdout
        if session == "first":  # saved, plotted, and on to the summary
            assert re.search(r"time budget at step \d+ of 300", done.stdout)
            assert "not yet: the run is not finished" in done.stdout and "The tax was not measured" in done.stdout
            assert done.stdout.strip().splitlines()[-1].endswith("outputs/v14.4-sites/night")
            assert not list(working.glob("outputs/*/*/metrics.json"))
            assert {path.stem for path in working.glob("outputs/*/night/figures/*.png")} >= {"training", "density"}
            assert list(working.glob("outputs/*/night/checkpoint.pt"))
        else:
            ends[session] = metrics_of(working)
            assert not list(working.glob("outputs/**/checkpoint.pt"))
            assert ("resuming the attached unfinished run" in done.stdout) == (session == "second")
    second, whole = ends["second"], ends["whole"]
    assert [row["seed"] for row in second["tax"]["runs"]] == [42, 43]
    assert second["layers_fed_by_spikes"] == 1.0 and second["training"]["step"] == 300
    for name in ("gap", "tax", "stages", "layers_fed_by_spikes"):
        assert second[name] == whole[name], name
    for name in ("validation", "test", "density", "amplitude"):
        assert second["student"][name] == whole["student"][name], name


def test_a_remedy_is_finished_by_a_second_session_and_claimed_only_then(tmp_path):
    outputs = None
    for session in ("first", "second"):
        env, working, below = kaggle(tmp_path / session, 1)
        env["ASNN_CACHE"] = str(tmp_path / "cache")
        notebook = working / "asnn_v15_spikingbrain.py"
        shutil.copy(ROOT / "notebooks" / notebook.name, notebook)
        with_values(notebook, remedy=True, remedy_steps=4, tokens=2048, damage_windows=2, run_name="night",
                    max_hours=1e-6 if session == "first" else None)
        if outputs:
            shutil.copytree(outputs, below / "last-night" / "outputs")
        done = subprocess.run([sys.executable, str(notebook)], cwd=working, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        outputs = working / "outputs"
        folder = outputs / "v15" / "night"
        gate, found = (json.loads((folder / name).read_text()) for name in ("gate.json", "validation.json"))
        assert json.loads((folder.parent / "gate.json").read_text()) == gate
        said = ("The remedy is unfinished, time budget at step 1 of 4: attach the output of this version with "
                "Add Input, then run all cells again with the same parameters "
                "to go on.")
        assert done.stdout.count(said) == (2 if session == "first" else 0)
        assert ("gate after the remedy" in done.stdout) == (session == "second")
        if session == "first":
            assert gate["student"] == found["before"]["gate"]["student"]
            assert gate["other"] is None and found["after"] is None
            assert (folder / "checkpoint.pt").is_file() and not (folder / "metrics.json").exists()
        else:
            assert "resuming the attached unfinished run" in done.stdout and "; 4 steps in" in done.stdout
            assert gate["other"] is not None and found["after"] is not None
            assert (folder / "metrics.json").is_file() and not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("name, values, sentence", [
    ("asnn_v15_spikingbrain", {"tokens": 0}, "tokens is 0; allowed: a whole number from 2048 or None."),
    ("asnn_v15_spikingbrain", {"student": "v14.4/nonsense"}, "student is 'v14.4/nonsense'; allowed: "),
    ("asnn_v16_sparse", {"repeats": -1}, "repeats is -1; allowed: a whole number from 1 or None.")])
def test_bad_parameters_end_a_notebook_in_one_sentence_before_anything_is_made(tmp_path, name, values, sentence):
    env, working, _ = kaggle(tmp_path, 1)
    notebook = working / f"{name}.py"
    shutil.copy(ROOT / "notebooks" / notebook.name, notebook)
    with_values(notebook, **values)
    done = subprocess.run([sys.executable, str(notebook)], cwd=working, env=env, capture_output=True, text=True)
    assert done.returncode != 0 and sentence in done.stderr.strip().splitlines()[-1]
    assert not (working / "outputs").exists()


def load_readme_tool():
    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / ".ci" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_and_log_show_the_reference_results():
    tool = load_readme_tool()
    assert tool.reference_metrics()
    for path, text in tool.documents().items():
        assert path.read_text() == text


def test_readme_check_says_no():
    tool = load_readme_tool()
    text, metrics = (ROOT / "README.md").read_text(), tool.reference_metrics()
    metrics[0]["student"]["test"]["ppl"] += 1.0
    assert tool.rendered(text, tool.asnn.results_table(metrics)) != text
    for what in ("results", "gate"):
        with pytest.raises(ValueError, match=f"has no place for the {what}"):
            tool.rendered("no marks here", "", what)


def cell_of(name, word):
    """The source of the only cell of a notebook with a word in it."""
    [cell] = [c for c in (NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8").split("# %%") if word in c]
    return cell


def test_v17_chooses_the_precision_of_a_gpu(monkeypatch):
    [line] = re.findall(r"precision, why = (.*)", cell_of("asnn_v17_bench", "precision, why ="))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    precision, why = eval(line, {"asnn": asnn, "device": torch.device("cuda")})
    assert precision == "fp16" and "7.5" in why


@pytest.mark.parametrize("name", ["asnn_v15_spikingbrain", "asnn_v16_sparse", "asnn_v17_bench"])
def test_the_default_student_of_v14_4_is_one_that_later_notebooks_take(name):
    cell = cell_of(name, "asnn.load_student(")
    asked = {"recipe": cell_of("asnn_v14_4_transfer", 'tags=["parameters"]')}
    recipe = asnn.get_recipe(re.search(r'^recipe = "(.*?)"', asked["recipe"], re.M)[1])
    found = re.search(r"sites=(\(.*?\)|asnn\.SITES\[.*?\])", cell)
    assert set(eval(found[1], {"asnn": asnn}) if found else ()) <= set(recipe.spike_sites)
