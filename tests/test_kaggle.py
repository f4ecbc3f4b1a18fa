"""Kaggle: the folders that its command line tool pushes, and the pieces of a simulated session."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("asnn_*.py"))


def load_tool():
    sys.path.insert(0, str(ROOT / ".ci"))
    try:
        spec = importlib.util.spec_from_file_location("asnn_tool_kaggle", ROOT / ".ci" / "kaggle.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / ".ci"))
    return module


kaggle = load_tool()


@pytest.fixture(autouse=True)
def no_account(monkeypatch):
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)


def value_of(notebook, name):
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    values = {}
    exec(cell.source, values)
    return values[name]


# ---- folders to push


@pytest.mark.parametrize("name", NAMES)
def test_a_push_folder_is_complete(tmp_path, name):
    assert kaggle.main(["push-folder", name, str(tmp_path / "push"), "--owner", "someone"]) == 0
    metadata = json.loads((tmp_path / "push" / "kernel-metadata.json").read_text())
    assert sorted(path.name for path in (tmp_path / "push").iterdir()) == [metadata["code_file"], "kernel-metadata.json"]
    notebook = nbformat.read(tmp_path / "push" / metadata["code_file"], as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert value_of(notebook, "seed") == 42
    # Kaggle makes the address of a title: small letters, a dash for each space.
    assert metadata["id"] == "someone/" + metadata["title"].lower().replace(" ", "-") and len(metadata["title"]) <= 50
    assert metadata["enable_gpu"] is True and metadata["machine_shape"] == "NvidiaTeslaT4"
    assert metadata["language"] == "python" and metadata["kernel_type"] == "notebook" and metadata["is_private"] is True
    assert metadata["dataset_sources"] == ["someone/asnn-goose"]
    # Every source is a notebook of the series that comes before this one, or the data set that `dataset` makes.
    before = {f"someone/{kaggle.slug(other)}" for other in NAMES if kaggle.version(other) < kaggle.version(name)}
    assert set(metadata["kernel_sources"]) <= before
    assert set(metadata) <= {
        "id", "title", "code_file", "language", "kernel_type", "is_private", "enable_gpu", "enable_tpu",
        "enable_internet", "machine_shape", "docker_image_pinning_type", "keywords", "dataset_sources", "kernel_sources",
        "competition_sources", "model_sources"}


@pytest.mark.parametrize("name", ["v14.4", "v14_4", "asnn_v14_4_transfer.ipynb", "notebooks/asnn_v14_4_transfer.py", "transfer"])
def test_a_notebook_is_found_by_any_of_its_names(tmp_path, name):
    assert kaggle.push_folder(name, tmp_path / "push", "someone")["code_file"] == "asnn_v14_4_transfer.ipynb"


def test_the_sources_chain_the_notebooks():
    names = ["asnn_v14_3_distill", "asnn_v14_4_transfer", "asnn_v15_b", "asnn_v16_c", "asnn_v17_d"]
    chain = {name: kaggle.sources_of(name, names[::-1]) for name in names}
    assert chain == {"asnn_v14_3_distill": [], "asnn_v14_4_transfer": [], "asnn_v15_b": names[1:2],
                     "asnn_v16_c": names[1:3], "asnn_v17_d": names[1:4]}
    assert kaggle.version("asnn_v9_x") < kaggle.version("asnn_v14_3_x") < kaggle.version("asnn_v14_10_x")


def test_parameters_are_set_where_the_notebook_has_them(tmp_path):
    arguments = ["--set", "steps=7", "--set", "corpus=wikitext-103", "--offline"]
    assert kaggle.main(["push-folder", "v14_4", str(tmp_path / "push"), "--owner", "someone", *arguments]) == 0
    notebook = nbformat.read(tmp_path / "push" / "asnn_v14_4_transfer.ipynb", as_version=4)
    found = {name: value_of(notebook, name) for name in ("recipe", "steps", "corpus", "tax_steps", "seed")}
    # v15 to v17 need spikes before every product, so that is what is passed on.
    assert found == {"recipe": "v14.4-rates", "steps": 7, "corpus": "wikitext-103", "tax_steps": None, "seed": 42}
    metadata = json.loads((tmp_path / "push" / "kernel-metadata.json").read_text())
    assert metadata["enable_internet"] is False and notebook.metadata["kaggle"]["isInternetEnabled"] is False
    other = tmp_path / "other"
    assert kaggle.main(["push-folder", "v14_4", str(other), "--owner", "someone", "--set", "recipe=v14.4"]) == 0
    assert value_of(nbformat.read(other / "asnn_v14_4_transfer.ipynb", as_version=4), "recipe") == "v14.4"


def test_the_data_set_holds_the_module_and_what_is_attached(tmp_path):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    target = tmp_path / "data"
    assert kaggle.main(["dataset", str(target), "--owner", "someone", "--attach", str(tmp_path / "gpt2")]) == 0
    metadata = json.loads((target / "dataset-metadata.json").read_text())
    assert metadata == {"title": "ASNN Goose", "id": "someone/asnn-goose", "licenses": [{"name": "MIT"}]}
    assert (target / "asnn_common.py").read_bytes() == (ROOT / "asnn_common.py").read_bytes()
    assert (target / "gpt2" / "config.json").is_file()


@pytest.mark.parametrize("arguments, sentence", [
    (["push-folder", "v99", "{new}", "--owner", "me"], "no notebook is named v99: there are asnn_v14_3_distill"),
    (["push-folder", "v14", "{new}", "--owner", "me"],
     "v14 is part of several names: asnn_v14_3_distill, asnn_v14_4_transfer."),
    (["push-folder", "v15", "{new}"], "the Kaggle user name is ''"),
    (["push-folder", "v15", "{new}", "--owner", "Jane Doe"], "the Kaggle user name is 'Jane Doe'"),
    (["push-folder", "v15", "{new}", "--owner", "me", "--set", "no=1"], "has no parameter no: it has student"),
    (["push-folder", "v15", "{new}", "--owner", "me", "--set", "seed"], "--set seed is not NAME=VALUE"),
    (["push-folder", "v15", "{full}", "--owner", "me"], "exists and is not empty: name a new folder"),
    (["dataset", "{full}", "--owner", "me"], "exists and is not empty: name a new folder"),
    (["dataset", "{new}", "--owner", "me", "--attach", "{full}", "--attach", "{full}"],
     "--attach names two folders full: one would take the other's place."),
    (["dataset", "{new}", "--owner", "me", "--attach", "{new}"], "is no folder")])
def test_bad_arguments_end_in_one_sentence_and_write_nothing(tmp_path, capsys, arguments, sentence):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    places = {"{new}": str(tmp_path / "new"), "{full}": str(full)}
    assert kaggle.main([places.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists() and [path.name for path in full.iterdir()] == ["mine.txt"]


# ---- a simulated session


@pytest.fixture
def session(tmp_path):
    """A pushed folder, a data set, a former session's output and a page that writes down what it sees."""
    def make(code):
        folder = tmp_path / "push"
        folder.mkdir()
        metadata = kaggle.kernel_metadata("asnn_v15_spikingbrain", "someone", NAMES, offline=True)
        kaggle.write_json(folder / "kernel-metadata.json", metadata)
        page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("tokens = 0"), nbformat.v4.new_code_cell(code)])
        page.cells[0].metadata["tags"] = ["parameters"]
        page.metadata = {"language_info": {"name": "python"}}
        nbformat.write(page, folder / metadata["code_file"])
        dataset, former = tmp_path / "dataset", tmp_path / "former"
        for place in (dataset, former):
            place.mkdir()
            (place / "file.txt").write_text(place.name)
        return folder, tmp_path / "session", dataset, {"asnn-v14-4-transfer": former}
    return make


METRICS = """
import json, pathlib
folder = pathlib.Path("outputs/v15/run"); folder.mkdir(parents=True)
(folder / "metrics.json").write_text(json.dumps(
    {"environment": {"platform": "kaggle"}, "corpus": {"name": "wikitext-2"}, "teacher": {"name": "gpt2"}}))
"""
SEES = """
import os, socket
def refused(call):
    try:
        call()
    except OSError:
        return True
seen = [os.getcwd(), *sorted(os.path.join(a, f) for a, _, files in os.walk("/kaggle/input") for f in files)]
assert refused(lambda: open("/kaggle/input/new.txt", "w")), "the input can be written"
assert refused(lambda: socket.create_connection(("1.1.1.1", 80), 2)), "there is a network"
assert os.environ["KAGGLE_KERNEL_RUN_TYPE"] == "Batch" and "ASNN_CACHE" not in os.environ
print(seen)
"""


@pytest.mark.parametrize("nested", [False, True])
def test_a_session_sees_what_a_session_on_kaggle_sees(tmp_path, session, nested):
    space = kaggle.unshare()
    if space is None:
        pytest.skip("namespaces are not allowed here")
    folder, place, dataset, outputs = session(METRICS + SEES)
    assert kaggle.run_session(folder, place, space, dataset, outputs, nested) == []
    seen = kaggle.last_words(place / "working" / "__notebook__.ipynb")
    first, second = (("datasets/someone/", "notebooks/someone/") if nested else ("", ""))
    assert seen == str(["/kaggle/working", f"/kaggle/input/{first}asnn-goose/file.txt",
                        f"/kaggle/input/{second}asnn-v14-4-transfer/file.txt"])
    assert not Path("/kaggle/input/asnn-goose").exists()  # nothing of it is left on the machine


@pytest.mark.parametrize("code, sentence", [
    ("1 / 0", "ZeroDivisionError"), ("print()", "left no outputs"),
    (METRICS.replace('"kaggle"', '"local"'), "its platform, corpus and teacher are local, wikitext-2, gpt2"),
    (METRICS + "(folder.parent.parent / 'short').mkdir()", "did not find the student of the notebook before it"),
    (METRICS + "import os; (pathlib.Path(os.environ['ASNN_INPUTS']) / 'x').write_text('x')", "wrote into its inputs")])
def test_what_goes_wrong_in_a_session_is_found(session, code, sentence):
    folder, place, dataset, outputs = session(code)
    findings = kaggle.run_session(folder, place, None, dataset, outputs, False)
    assert len(findings) == 1 and sentence in findings[0]


def test_a_part_of_the_series_without_its_sources_is_refused(capsys):
    assert kaggle.main(["run", "v15"]) == 2
    assert "reads the output of someone/asnn-v14-4-transfer, which is not among" in capsys.readouterr().err


def test_the_tool_runs_as_a_program(tmp_path):
    command = [sys.executable, str(ROOT / ".ci" / "kaggle.py"), "push-folder", "v14_3", str(tmp_path / "push")]
    done = subprocess.run(command, env={**os.environ, "KAGGLE_USERNAME": "someone"}, capture_output=True, text=True)
    assert done.returncode == 0 and "next: kaggle kernels push -p" in done.stdout
