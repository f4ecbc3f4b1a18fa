"""What `make check` refuses, how pages are built and run, the README's tables, make env."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent

SOURCE = """\
# %% [markdown]
# # A notebook

# %% tags=["bootstrap"]
import sys

# %% tags=["parameters"]
STEPS = 3  # a comment
RATES = {"low": [0.1, -0.2], "none": None}

# %% tags=["nbval-check-output"]
print(STEPS)
"""


def load(name):
    """One of the tools as a module; .ci is no package."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages, readme = load("pages"), load("readme")


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def write_page(folder, source=SOURCE, name="asnn_v01", change=None):
    """A page that is in order, but for what `change(its code cells)` does to the .ipynb."""
    page = jupytext.reads(source, fmt="py:percent")
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
    code[-1].outputs = [stream("3\n")]
    if change:
        change(code)
    (folder / f"{name}.py").write_text(source)
    nbformat.write(page, folder / f"{name}.ipynb")


def test_the_pages_of_the_project_are_in_order():
    assert pages.check() == []


def test_a_good_page_passes(tmp_path):
    write_page(tmp_path)
    assert pages.check(tmp_path) == []


def output(kind, **content):
    def change(code):
        code[0].outputs = [nbformat.v4.new_output(kind, **content)]
    return change


def counted(index, number):
    return lambda code: setattr(code[index], "execution_count", number)


@pytest.mark.parametrize("change, sentence", [
    (counted(1, None), "has the execution count None"),
    (counted(2, 7), "has the execution count 7"),
    (lambda code: code[2].outputs.clear(), "is to be compared but has no output"),
    (output("error", ename="E", evalue="e", traceback=[]), "ended with an error"),
    (output("stream", text="saved in /root/x\n"), "shows an absolute path"),
    (output("stream", text="saved in /home/ann/x\n"), "shows an absolute path"),
    (output("stream", text=f"saved in {ROOT}\n"), "shows an absolute path"),
    (output("display_data", data={"text/html": "<b>/tmp/x</b>"}), "shows an absolute path"),
    (output("display_data", data={"image/png": "iVBO/tmp/x/root/"}), None),
    (lambda code: setattr(code[0], "source", "import os"), "is not what its .py gives"),
    (lambda code: code[2].metadata.update(tags=[]), "is not what its .py gives")])
def test_faults_of_a_page_are_found(tmp_path, change, sentence):
    write_page(tmp_path, change=change)
    findings = pages.check(tmp_path)
    assert len(findings) == (sentence is not None), findings
    assert sentence is None or sentence in findings[0]


@pytest.mark.parametrize("old, new, sentence", [
    *(("STEPS = 3  # a comment", line, "which is no literal") for line in (
        "STEPS = max(3, 4)", "STEPS = 3\nimport os", "STEPS = 3\nSTEPS += 1", "import x\nx.y = 1",
        "STEPS = A = B", "STEPS: int", "print(1)")),
    ('"parameters"', '"x"', "one cell tagged bootstrap, then one tagged parameters"),
    ('"bootstrap"', '"x"', "one cell tagged bootstrap, then one tagged parameters"),
    ('"nbval-check-output"', '"parameters"', "one cell tagged bootstrap, then one tagged"),
    ('tags=["bootstrap"]\nimport sys\n\n# %% tags=["parameters"]',
     'tags=["parameters"]\nSTEPS = 3\n\n# %% tags=["bootstrap"]', "then one tagged parameters"),
    ("# # A notebook", "# # " + "A notebook " * 9, "line 2 has 103 columns")])
def test_faults_of_a_source_are_found(tmp_path, old, new, sentence):
    assert old in SOURCE
    write_page(tmp_path, SOURCE.replace(old, new))
    assert any(sentence in finding for finding in pages.check(tmp_path)), pages.check(tmp_path)


def test_faults_of_a_series_are_found(tmp_path):
    assert pages.check(tmp_path) == [f"{tmp_path.name} has no page asnn_*.py."]
    write_page(tmp_path)
    write_page(tmp_path, SOURCE.replace("import sys", "import os"), "asnn_v02")
    assert pages.check(tmp_path) == ["asnn_v02: its bootstrap cell is not that of asnn_v01."]
    (tmp_path / "asnn_v02.py").unlink()
    assert pages.check(tmp_path) == ["asnn_v02: it has no .py or no .ipynb."]


def test_outputs_are_cleaned():
    data = {"image/png": "/root/", "text/plain": f"<F at 0x7f00aa00> {Path.home()}/x"}
    figure = nbformat.v4.new_output("display_data", data=data)
    cleaned = pages.cleaned([
        stream("\r 0%", "stderr"), stream(f"in {ROOT}/outputs, as  it was  \n"),
        stream("\r 50%\r100%\n\n\x1b[A\r 9%\r  done", "stderr"), figure,
        stream("[W1122 14:38 x.cpp] no\n/tmp/ipykernel_12/34.py:3: Warning\n", "stderr"),
        stream("\r bar\r    \r")])
    assert [o.get("text") or o["data"] for o in cleaned] == [
        "100%\n  done", "in ./outputs, as  it was  \n",
        {"image/png": "/root/", "text/plain": "<F> ~/x"}, "<cell>:3: Warning\n"]


def test_a_built_page_passes_and_a_failing_one_stays_as_it_was(tmp_path):
    path = tmp_path / "asnn_v01.py"
    path.write_text(SOURCE)
    pages.build(path)
    first = path.with_suffix(".ipynb").read_bytes()
    assert pages.check(tmp_path) == []
    path.write_text(SOURCE.replace("print(STEPS)", "print(UNKNOWN)"))
    with pytest.raises(Exception, match="NameError"):
        pages.build(path)
    assert path.with_suffix(".ipynb").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["asnn_v01.ipynb", "asnn_v01.py"]


def test_run_says_where_results_are_and_stops_at_a_failure(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ASNN_OUTPUTS", str(tmp_path / "outputs"))
    paths = [tmp_path / f"asnn_v0{number}.py" for number in (1, 2, 3)]
    result = tmp_path / "outputs" / "v01" / "run1" / "metrics.json"
    paths[0].write_text(f"import pathlib\np = pathlib.Path({str(result)!r})\n"
                        "p.parent.mkdir(parents=True)\np.write_text('{}')\n")
    paths[1].write_text("raise SystemExit(3)")
    paths[2].write_text("print('never')")
    assert pages.run(paths) == 1
    printed = capfd.readouterr().out
    assert re.search(r"asnn_v01: \d+ s; results: \S*outputs/v01/run1\n", printed)
    assert "asnn_v02 ended with code 3" in printed and "never" not in printed
    assert pages.run(paths[:1]) == 1  # the folder is there already
    result.parent.rename(tmp_path / "away")
    assert pages.run(paths[:1]) == 0


def test_names_select_pages(tmp_path):
    for name in ("asnn_v14_3_a", "asnn_v14_4_b", "asnn_v15_c"):
        (tmp_path / f"{name}.py").touch()
    chosen = pages.pages(["v15", "v14.3", "notebooks/asnn_v14_3_a.ipynb"], tmp_path)
    assert [path.stem for path in chosen] == ["asnn_v14_3_a", "asnn_v15_c"]
    with pytest.raises(SystemExit, match="no page is named v99: there are asnn_v14_3_a, "):
        pages.pages(["v99"], tmp_path)


# ---- the README


def test_readme_shows_the_reference_results():
    text = (ROOT / "README.md").read_text()
    assert readme.rendered(text) == text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows and max(line.count("|") - 1 for line in rows) <= 7


def test_readme_tables_follow_the_numbers(tmp_path):
    folder, text = tmp_path / "reference", (ROOT / "README.md").read_text()
    shutil.copytree(ROOT / "outputs" / "reference", folder)
    path = sorted(folder.glob("ref-*.json"))[0]
    metrics = json.loads(path.read_text())
    metrics["student"]["test"]["ppl"] = 1234.5
    path.write_text(json.dumps(metrics))
    assert "| 1234.50 |" in readme.rendered(text, folder)
    with pytest.raises(ValueError, match="README.md has no place for results"):
        readme.rendered("no marks here")


def test_readme_says_what_keeps_outputs_on_colab():
    text = (ROOT / "README.md").read_text()
    assert '`from google.colab import drive; drive.mount("/content/drive")`' in text
    assert "`%env ASNN_OUTPUTS=/content/drive/MyDrive/asnn`" in text


# ---- make env


def test_a_python_out_of_range_is_refused_in_a_sentence(tmp_path):
    makefile = (ROOT / "Makefile").read_text()
    statement = re.search(r"-c 'import sys; (.*?)'", makefile)[1]
    found = []
    for version in ((2, 7), (3, 10), (3, 11), (3, 13), (3, 14)):
        exec(statement, {"sys": SimpleNamespace(version_info=(*version, 0), exit=found.append)})
    assert found == [True, True, False, False, True]
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    done = subprocess.run(["make", "env", "PYTHON=false"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 2 and not (tmp_path / ".venv").exists()
    assert done.stderr.startswith(b"error: false is no Python 3.11, 3.12 or 3.13; PYTHON=")


FAKE_PYTHON = """#!/bin/sh
echo "$*" >> log
case "$*" in
    *"-m venv"*) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
    *-r*) [ ! -e broken ];;
esac
"""


@pytest.mark.parametrize("gpu", [False, True])
def test_installation(tmp_path, gpu):
    """Without a GPU torch comes first, from the CPU index; what failed is made anew, once."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "constraints.txt", tmp_path / ".ci")
    programs = {"python": FAKE_PYTHON, "nvidia-smi": f"#!/bin/sh\nexit {int(not gpu)}\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def make():
        (tmp_path / "log").write_text("")
        done = subprocess.run(["make", "-s", "env", f"PYTHON={tmp_path}/python"], cwd=tmp_path,
                              env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
        return done.returncode, (tmp_path / "log").read_text().splitlines()[1:]

    (tmp_path / "broken").touch()
    assert make()[0] == 2
    (tmp_path / "broken").unlink()
    code, calls = make()
    assert code == 0 and calls[0].startswith("-m venv") and len(calls) == (2 if gpu else 3)
    assert all("-c .ci/constraints.txt" in call for call in calls[1:])
    assert gpu or " torch " in calls[1] and "https://download.pytorch.org/whl/cpu" in calls[1]
    assert calls[-1].endswith("-r requirements.txt")
    assert make() == (0, [])
    os.utime(tmp_path / "requirements.txt", (2**32 - 1, 2**32 - 1))
    assert len(make()[1]) == len(calls)
