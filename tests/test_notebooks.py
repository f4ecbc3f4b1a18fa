"""The pages as people run them: wherever the module lies, as scripts and through papermill, without
a network, in several sessions and in two processes."""
import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import asnn_common as asnn
import pytest
from conftest import ROOT, kaggle_session, read_only
from simulated_cuda import with_values

PAGES = sorted((ROOT / "notebooks").glob("asnn_*.py"))
DISTIL = ROOT / "notebooks" / "asnn_v14_3_distill.py"


def cell_of(source, tag):
    return source.split(f'# %% tags=["{tag}"]\n')[1].split("\n# %%")[0]


def script(working, page, **values):
    """A copy of a page in a session, with other values of its parameters."""
    given = {name: repr(value) for name, value in values.items()}
    (working / page.name).write_text(with_values(page.read_text(), **given))
    return [sys.executable, page.name]


def run(command, env, working, succeeds=True):
    done = subprocess.run(command, cwd=working, env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == succeeds, done.stdout[-1000:] + done.stderr[-3000:]
    return done


def metrics_of(working):
    (path,) = working.glob("outputs/*/*/metrics.json")
    return json.loads(path.read_text())


# ---- where the module is


@pytest.mark.parametrize("place", ["beside", "above", "home", "attached/to/me/x", "cwd", None])
@pytest.mark.parametrize("as_script", [True, False])
def test_the_bootstrap_finds_the_module(tmp_path, place, as_script):
    folders = {"beside": "project/notebooks", "above": "project", "cwd": "cwd", "home": "my home"}
    if place:
        folder = tmp_path / folders.get(place, place)
        folder.mkdir(parents=True)
        (folder / "asnn_common.py").write_text("__version__ = '0.test'\n")
    (tmp_path / "cwd").mkdir(exist_ok=True)
    notebooks = tmp_path / "project" / "notebooks"
    notebooks.mkdir(parents=True, exist_ok=True)
    (notebooks / "page.py").write_text(cell_of(DISTIL.read_text(), "bootstrap"))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ASNN_", "PYTHONPATH"))}
    env |= {"ASNN_INPUTS": str(tmp_path / "attached")} | (
        {"ASNN_HOME": str(tmp_path / "my home")} if place == "home" else {})
    # A notebook's cells have no __file__; the folder of its kernel is its own.
    command = [notebooks / "page.py"] if as_script else ["-c", (notebooks / "page.py").read_text()]
    cwd = tmp_path / "cwd" if as_script or place == "cwd" else notebooks
    done = run([sys.executable, *map(str, command)], env, cwd, succeeds=place is not None)
    if place:
        found = os.path.relpath(folder / "asnn_common.py", cwd)
        assert done.stdout == f"asnn_common 0.test from {found}\n"
    else:
        last = done.stderr.strip().splitlines()[-1]
        assert all(word in last for word in ("attach it", "upload it beside", "ASNN_HOME"))


# ---- one page, run in every way


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    """A folder with WikiText as the hub's parquet files and a GPT-2 with its tokenizer, tiny."""
    import pandas as pd
    import transformers

    folder = tmp_path_factory.mktemp("attached")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASNN_CACHE", str(folder / "cache"))
        corpus = asnn._load_corpus("pydocs", 150_000)
        tokenizer = asnn._train_tokenizer(corpus, 300)
    texts, model = folder / "inputs/wikitext-2-raw-v1", folder / "inputs/gpt2/transformers/1"
    texts.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        lines = pd.DataFrame({"text": corpus.text(split).splitlines(keepends=True)})
        lines.to_parquet(texts / f"{split}-00000-of-00001.parquet")
    transformers.set_seed(0)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_head=2,
                                     n_layer=2, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return folder / "inputs"


VALUES = {"corpus": "wikitext-2", "teacher_name": "gpt2", "steps": 12, "run_name": "night"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, attached):
    """The metrics of the page run as a script in one go."""
    env, working, below = kaggle_session(tmp_path_factory.mktemp("whole"))
    shutil.copytree(attached, below / "attached")
    done = run(script(working, DISTIL, **VALUES), env, working)
    assert " wrote " not in done.stderr
    return metrics_of(working)


def same(found, expected):
    assert found["training"]["step"] == expected["training"]["step"] == 12
    for name in ("corpus", "gap", "run"):
        assert found[name] == expected[name]
    for name in ("validation", "test", "density"):
        assert found["student"][name] == expected["student"][name]


def test_papermill_does_what_the_script_does(tmp_path, attached, whole):
    assert whole["environment"]["platform"] == "kaggle" and whole["teacher"]["name"] == "gpt2"
    env, working, below = kaggle_session(tmp_path, "")
    shutil.copytree(attached, below / "attached")
    shutil.copy(DISTIL.with_suffix(".ipynb"), working)
    pairs = [part for name, value in VALUES.items() for part in ("-p", name, str(value))]
    done = run([sys.executable, "-m", "papermill", f"{DISTIL.stem}.ipynb", "out.ipynb", *pairs],
               env, working)
    assert " wrote " not in done.stderr
    same(metrics_of(working), whole)


def test_a_run_in_two_sessions_ends_like_one_in_one_go(tmp_path, attached, whole):
    """The time budget ends the page well; the next session goes on from a read-only copy of it."""
    for session, hours in (("first", 1e-9), ("second", None)):
        env, working, below = kaggle_session(tmp_path / session)
        shutil.copytree(attached, below / "attached")
        command = script(working, DISTIL, **VALUES, max_hours=hours)
        page = working / DISTIL.name
        assert page.read_text().count("max(1e-3, ") == 1  # hours that are always left to train
        page.write_text(page.read_text().replace("max(1e-3, ", "max(1e-9, "))
        if session == "second":
            shutil.copytree(tmp_path / "first" / "kaggle" / "working", below / "old")
            read_only(below)
        done = run(command, env, working)
        assert " wrote " not in done.stderr
        if session == "first":
            assert "time budget at step 1 of 12" in done.stdout
            assert done.stdout.splitlines()[-1].startswith("Not finished: v14.3")
            assert not list(working.glob("outputs/*/*/metrics.json"))
            assert list(working.glob("outputs/*/*/figures/training.png"))
    assert "resuming the attached unfinished run" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Finished: v14.3")
    made = [working / "outputs", *(working / "outputs").rglob("*")]
    assert all(path.stat().st_mode & 0o200 for path in made)  # not read-only as its source is
    assert not list(working.glob("outputs/**/checkpoint*"))
    same(metrics_of(working), whole)


def test_two_processes_run_the_page_into_one_folder_and_one_of_them_writes(tmp_path, attached):
    env, working, below = kaggle_session(tmp_path)
    shutil.copytree(attached, below / "attached")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env |= {"OMP_NUM_THREADS": "1", "ASNN_CACHE": str(tmp_path / "cache"),
            "WATCHED": os.pathsep.join((str(working / "outputs"), str(tmp_path / "cache")))}
    # --multi_gpu also where there is no GPU: without it accelerate starts a single process.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
              "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    command = script(working, DISTIL, **VALUES)
    done = run([sys.executable, "-m", *launch, *command[1:]], env, working)
    assert "new run night" in done.stdout and "resuming unfinished run night" in done.stdout
    assert metrics_of(working)["training"]["step"] == 12  # and there is one metrics file only
    assert set(re.findall(r"rank (\d) wrote", done.stderr)) == {"0"}


def test_without_hub_or_attachment_a_page_ends_in_one_sentence(tmp_path):
    env, working, _ = kaggle_session(tmp_path)
    done = run(script(working, DISTIL, corpus="wikitext-2"), env, working, succeeds=False)
    last = done.stderr.strip().splitlines()[-1]
    assert all(way in last for way in ("attach it", "give a folder", "pydocs"))
    assert not list(working.glob("outputs/*/*"))


@pytest.mark.parametrize("page, values, sentence", [
    ("v14_4", {"recipe": "v99"}, "recipe is 'v99'; allowed: v4, "),
    ("v15", {"student_run": "v14.4/nonsense"}, "student_run is 'v14.4/nonsense'; allowed: "),
    ("v16", {}, "no finished student was found: run asnn_v14_4_transfer first")])
def test_bad_parameters_end_a_page_before_anything_is_made(tmp_path, page, values, sentence):
    env, working, _ = kaggle_session(tmp_path)
    (path,) = (path for path in PAGES if page in path.stem)
    done = run(script(working, path, **values), env, working, succeeds=False)
    assert sentence in done.stderr.strip().splitlines()[-1]
    assert not (working / "outputs").exists()


def test_parameters_are_documented():
    """Each on its line, and all of them, no other, in the README: one name for one thing."""
    rows = (ROOT / "README.md").read_text().split("| parameter | values |")[1].split("\n\n")[0]
    told = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows.splitlines()[2:])))
    names = set()
    for page in PAGES:
        cell = cell_of(page.read_text(), "parameters")
        names |= {target.id for line in ast.parse(cell).body for target in line.targets}
        bare = [line for line in cell.splitlines() if "#" not in line and line.strip()]
        assert bare in (["seed = 42"], []), page.stem
    assert names == told
