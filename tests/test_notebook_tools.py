"""The tools in .ci: the checks on notebook pairs, the cleaning of outputs and the environment's refusals."""

import importlib.util
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
    spec = importlib.util.spec_from_file_location(f"asnn_tool_{name}", ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = load("notebooks")
environment = load("environment")


class Pair:
    """A pair of files in which one thing at a time can be made wrong."""

    def __init__(self, folder, name="asnn_v01", source=SOURCE):
        self.py, self.ipynb = folder / f"{name}.py", folder / f"{name}.ipynb"
        self.py.write_text(source)
        notebook = jupytext.reads(source, fmt="py:percent")
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for number, cell in enumerate(code, 1):
            cell.execution_count = number
        code[-1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="3\n")]
        self.notebook, self.code = notebook, code
        self.write()

    def write(self):
        nbformat.write(self.notebook, self.ipynb)

    def findings(self):
        self.write()
        return notebooks.check_pair(self.py, self.ipynb)


@pytest.fixture
def pair(tmp_path):
    return Pair(tmp_path)


def only(findings, part):
    assert len(findings) == 1 and part in findings[0], findings


# ---- the checks ----------------------------------------------------------------------------------


def test_series_of_the_project_is_in_order():
    assert notebooks.check_series(ROOT / "notebooks") == []


def test_good_pair_passes(pair, tmp_path):
    assert pair.findings() == []
    assert notebooks.check_series(tmp_path) == []


def test_out_of_sync_source(pair):
    pair.py.write_text(SOURCE.replace("# # A notebook", "# # Another notebook"))
    only(pair.findings(), "is not what asnn_v01.py gives")


def test_out_of_sync_tags(pair):
    pair.py.write_text(SOURCE.replace("nbval-check-output", "other"))
    only(pair.findings(), "is not what asnn_v01.py gives")


def test_unexecuted_cell(pair):
    pair.code[1].execution_count = None
    only(pair.findings(), "execution count None, not 2")


def test_cells_out_of_order(pair):
    pair.code[2].execution_count = 7
    only(pair.findings(), "execution count 7, not 3")


def test_compared_cell_without_output(pair):
    pair.code[-1].outputs = []
    only(pair.findings(), "to be compared but has no output")


def test_error_output(pair):
    pair.code[0].outputs = [nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])]
    only(pair.findings(), "ended with an error")


@pytest.mark.parametrize("path", ["/root/x", "/home/ann/x", "/tmp/x", "/Users/ann/x", str(ROOT / "outputs")])
@pytest.mark.parametrize("kind", ["stream", "display_data"])
def test_absolute_path(pair, path, kind):
    content = {"text": f"saved {path}\n"} if kind == "stream" else {"data": {"text/html": f"<b>{path}</b>"}}
    pair.code[0].outputs = [nbformat.v4.new_output(kind, **content)]
    only(pair.findings(), "shows the path")


def test_image_data_is_no_path(pair):
    pair.code[0].outputs = [nbformat.v4.new_output("display_data", data={"image/png": "iVBO/tmp/x/root/"})]
    assert pair.findings() == []


def test_large_file(pair, monkeypatch):
    monkeypatch.setattr(notebooks, "MAX_BYTES", 100)
    only(pair.findings(), "is the limit")


@pytest.mark.parametrize(
    "statement",
    ["STEPS = max(3, 4)", "import os", "STEPS += 1", "x.y = 1", "A = B = C", "N: int", "print(1)", "1"],
)
def test_parameter_that_is_no_literal(tmp_path, statement):
    source = SOURCE.replace("STEPS = 3  # a comment", statement)
    only(Pair(tmp_path, source=source).findings(), "sets no name to a literal")


@pytest.mark.parametrize("tag", ["bootstrap", "parameters"])
def test_tagged_cell_is_missing(tmp_path, tag):
    only(Pair(tmp_path, source=SOURCE.replace(f'"{tag}"', '"x"')).findings(), f"0 cells have the tag {tag}")


def test_two_parameters_cells(tmp_path):
    source = SOURCE + '\n# %% tags=["parameters"]\nN = 1\n'
    only(
        [f for f in Pair(tmp_path, source=source).findings() if "compared" not in f],
        "2 cells have the tag parameters",
    )


def test_bootstrap_after_parameters(tmp_path):
    title, bootstrap, parameters, rest = SOURCE.split("# %% ")[1:]
    source = "".join("# %% " + part for part in (title, parameters, bootstrap, rest))
    only(Pair(tmp_path, source=source).findings(), "comes after the parameters")


@pytest.mark.parametrize("kind", ["py", "ipynb"])
def test_missing_partner(pair, tmp_path, kind):
    getattr(pair, kind).unlink()
    only(notebooks.check_series(tmp_path), f"has no partner asnn_v01.{kind}")


def test_unreadable_notebook(pair, tmp_path):
    pair.ipynb.write_text("{")
    only(notebooks.check_series(tmp_path), "no readable notebook")


def test_differing_bootstrap(pair, tmp_path):
    Pair(tmp_path, name="asnn_v02", source=SOURCE.replace("import sys", "import os"))
    only(notebooks.check_series(tmp_path), "asnn_v02.py: its bootstrap cell differs from that of asnn_v01.py")


def test_empty_series(tmp_path):
    only(notebooks.check_series(tmp_path), "no notebook")


# ---- building ------------------------------------------------------------------------------------


def test_progress_bars_keep_their_last_state():
    assert notebooks.last_lines("a\n\r 0%\r 50%\r100%\nb\n") == "a\n100%\nb\n"
    assert notebooks.last_lines("\r bar\r    \r") == ""
    assert notebooks.last_lines("as  it was  \n") == "as  it was  \n"


def stream(name, text):
    return nbformat.v4.new_output("stream", name=name, text=text)


def test_outputs_are_cleaned():
    home = Path.home()
    widget = nbformat.v4.new_output(
        "display_data", data={notebooks.WIDGET + "-view+json": {}, "text/plain": "HBox()"}
    )
    figure = nbformat.v4.new_output(
        "display_data", data={"image/png": "/root/", "text/plain": f"<F> {home}/x"}
    )
    outputs = [
        widget,
        stream("stderr", "\r 0%"),
        stream("stdout", f"in {ROOT}/outputs and {home}/y\n"),
        stream("stderr", "\r100%\n[W1122 14:38:21.4 CPUAllocator.cpp:245] Memory block of unknown size was allocated\n"),
        figure,
        stream("stderr", "/tmp/ipykernel_12/34.py:3: Warning\n"),
    ]
    cleaned = notebooks.clean_outputs(outputs)
    assert [output["output_type"] for output in cleaned] == ["stream", "stream", "display_data", "stream"]
    assert cleaned[0]["text"] == "100%\n"
    assert cleaned[1]["text"] == "in ./outputs and ~/y\n"
    assert cleaned[2]["data"] == {"image/png": "/root/", "text/plain": "<F> ~/x"}
    assert cleaned[3]["text"] == "<cell>:3: Warning\n"


def test_build_makes_a_pair_that_passes(tmp_path):
    source = tmp_path / "asnn_v01.py"
    source.write_text(SOURCE)
    notebooks.build_one(source, timeout=60)
    first = source.with_suffix(".ipynb").read_bytes()
    assert notebooks.check_series(tmp_path) == []
    notebooks.build_one(source, timeout=60)
    assert source.with_suffix(".ipynb").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asnn_v01.ipynb", "asnn_v01.py"]


def test_failed_build_leaves_the_notebook(tmp_path, monkeypatch, capsys):
    pair = Pair(tmp_path, source=SOURCE.replace("print(STEPS)", "print(UNKNOWN)"))
    before = pair.ipynb.read_bytes()
    monkeypatch.setattr(notebooks, "series", lambda names: [pair.py])
    assert notebooks.main(["build"]) == 2
    assert "NameError" in capsys.readouterr().err
    assert pair.ipynb.read_bytes() == before


# ---- running -------------------------------------------------------------------------------------


def run_series(tmp_path, monkeypatch, *sources):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for number, source in enumerate(sources, 1):
        (folder / f"asnn_v{number:02}.py").write_text(source)
    monkeypatch.setenv("ASNN_OUTPUTS", str(tmp_path / "outputs"))
    found = sorted(folder.glob("*.py"))
    monkeypatch.setattr(notebooks, "series", lambda names: found)
    return notebooks.main(["run"])


RUN = """\
import os, pathlib
run = pathlib.Path(os.environ["ASNN_OUTPUTS"], "v01", "run1")
(run / "figures").mkdir(parents=True)
(run / "metrics.json").write_text("{}")
"""


def test_run_tells_what_was_made(tmp_path, monkeypatch, capsys):
    assert run_series(tmp_path, monkeypatch, RUN, "pass") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    folder = str(tmp_path / "outputs" / "v01" / "run1")
    assert f"{folder}/metrics.json" in lines and f"{folder}/figures/" in lines
    assert any(line.startswith("asnn_v02") for line in lines)


def test_run_stops_at_the_first_failure(tmp_path, monkeypatch, capsys):
    assert run_series(tmp_path, monkeypatch, "raise SystemExit(3)", RUN) == 2
    assert "asnn_v01 ended with exit code 3" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_names_select_notebooks(tmp_path):
    for name in ("asnn_v14_3_a", "asnn_v14_4_b", "asnn_v15_c"):
        (tmp_path / f"{name}.py").touch()
    stems = [path.stem for path in notebooks.series(tmp_path, ["v15", "notebooks/asnn_v14_3_a.py"])]
    assert stems == ["asnn_v14_3_a", "asnn_v15_c"]
    with pytest.raises(notebooks.Stop, match="no notebook is named v99"):
        notebooks.series(tmp_path, ["v99"])


# ---- the environment -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 10, 13), (3, 14, 0), (2, 7, 18)])
def test_python_out_of_range(version):
    with pytest.raises(environment.Stop, match=r"3\.11, 3\.12 or 3\.13 is needed: PYTHON=python3\.12"):
        environment.check_python(version)


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 1), (3, 13, 9)])
def test_python_in_range(version):
    environment.check_python(version)


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_no_venv_module(missing):
    with pytest.raises(environment.Stop, match=r"apt-get install python3-venv .*python3\.12-venv"):
        environment.check_venv((3, 12, 1), find_spec=lambda name: None if name == missing else object())


def test_no_space():
    environment.check_space(5e9, 4)
    with pytest.raises(environment.Stop, match=r"needs 4 GB .* has 1\.2 GB free"):
        environment.check_space(1.2e9, 4)


def report(*names, requires=()):
    return {"install": [{"metadata": {"name": name, "requires_dist": list(requires)}} for name in names]}


def test_cuda_build_is_refused():
    found = report("torch", "sympy", "nvidia-cublas", "cuda-toolkit")
    assert environment.cuda_packages(found) == ["cuda-toolkit", "nvidia-cublas"]
    with pytest.raises(environment.Stop, match="only a CUDA build .* ASNN_ALLOW_CUDA=1"):
        environment.check_no_cuda(found, allowed=False)
    environment.check_no_cuda(found, allowed=True)
    environment.check_no_cuda(report("torch", "sympy"), allowed=False)


def test_cuda_wheel_is_known_by_its_requirements():
    assert environment.asks_for_cuda(
        report("torch", requires=["sympy>=1", "nvidia-cublas==13.1; platform_system"])
    )
    assert not environment.asks_for_cuda(report("torch", requires=["sympy>=1", "filelock"]))


@pytest.fixture
def fake_venv(tmp_path, monkeypatch):
    """The environment tool with its files in a temporary folder, commands that all work and a large disk."""
    monkeypatch.setattr(environment, "VENV", str(tmp_path / "venv"))
    for name in ("STAMP", "LOG"):
        monkeypatch.setattr(environment, name, str(tmp_path / "venv" / Path(getattr(environment, name)).name))
    monkeypatch.setattr(environment, "has_gpu", lambda: False)
    monkeypatch.setattr(environment, "run_logged", lambda command, beat=False: 0)
    monkeypatch.setattr(environment, "install_cpu_torch", lambda: None)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e12))
    monkeypatch.delenv("ASNN_ALLOW_CUDA", raising=False)
    return tmp_path / "venv"


def test_failures_end_with_one_sentence(fake_venv, monkeypatch, capsys):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    assert environment.main((3, 12, 1)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the environment needs 4 GB") and error.count("\n") == 1


def test_failing_pip_names_the_log(fake_venv, monkeypatch, capsys):
    def fail(command, beat=False):
        Path(environment.LOG).write_text("Looking\nERROR: Could not find torch.\nbye\n")
        return 1 if "pip" in command else 0

    monkeypatch.setattr(environment, "run_logged", fail)
    assert environment.main((3, 12, 1)) == 2
    error = capsys.readouterr().err
    assert (
        "failed: ERROR: Could not find torch (" in error and "install.log" in error and error.count("\n") == 1
    )
    assert not Path(environment.STAMP).exists()


@pytest.mark.parametrize(
    "line, why",
    [
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)'",
            "index could not be reached",
        ),
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for x", "No matching distribution found for x"),
    ],
)
def test_reason_of_a_failure(line, why):
    log = f"$ one\nERROR: an earlier error\n\n$ two\n{line}\nERROR: ResolutionImpossible: for help visit\n"
    assert environment.reason(log).endswith(why)


def test_finished_environment_is_kept_and_interrupted_one_made_anew(fake_venv, monkeypatch):
    assert environment.main((3, 12, 1)) == 0
    (fake_venv / "bin").mkdir()
    (fake_venv / "bin" / "python").touch()
    mark = fake_venv / "mark"
    mark.touch()
    assert environment.main((3, 12, 1)) == 0 and mark.exists()  # nothing was made again
    Path(environment.STAMP).unlink()
    assert environment.main((3, 12, 1)) == 0 and not mark.exists()
