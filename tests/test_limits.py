"""What keeps the project readable: sizes, what an import does, what is required."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

MODULE = ROOT / "asnn_common.py"
SOURCES = [MODULE, *sorted((ROOT / "notebooks").glob("*.py")), *sorted((ROOT / ".ci").glob("*.py")),
           *sorted((ROOT / "tests").glob("*.py"))]
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in SOURCES}


def lines_of(*paths):
    return [line for path in paths for line in path.read_text().splitlines()]


def committed(folder):
    return [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]


@pytest.mark.parametrize("what, paths, limit", [
    ("the module", [MODULE], 5318), ("pages", (ROOT / "notebooks").glob("*v1[4-7]*.py"), 2861),
    ("v18", (ROOT / "notebooks").glob("*v18*.py"), 643),
    ("v19", (ROOT / "notebooks").glob("*v19*.py"), 891),
    (".ci", committed(".ci"), 356), ("the tests", (ROOT / "tests").glob("*.py"), 8888),
    ("the README", [ROOT / "README.md"], 200)])
def test_length(what, paths, limit):
    assert 0 < len(lines_of(*paths)) <= limit, what


def test_width():
    wide = [(path.name, number) for path in [*SOURCES, ROOT / "Makefile", *committed(".ci")]
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not wide


def test_functions_are_short_and_public_names_are_few():
    (tree,) = (tree for name, tree in TREES.items() if name == "asnn_common.py")
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [f.name for f in functions if f.end_lineno - f.lineno + 1 > 80]
    public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              and not node.name.startswith("_")]
    assert 30 <= len(public) <= 40
    assert not [node.name for node in public if not ast.get_docstring(node)]


@pytest.mark.parametrize("name", TREES)
def test_no_nested_conditional_expression_and_no_built_up_names(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.IfExp):
            inner = [part for part in ast.walk(node) if isinstance(part, ast.IfExp)]
            assert inner == [node], f"line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "getattr"):
            assert not isinstance(node.args[1], (ast.JoinedStr, ast.BinOp)), f"line {node.lineno}"


IMPORT = """
import sys
import torch
from transformers import Trainer
before = set(sys.modules)
import asnn_common
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"matplotlib", "pandas", "scipy", "sklearn", "IPython"}, new
"""


def test_the_import_prints_nothing_and_loads_no_matplotlib_of_its_own():
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Packages that are run or whose files are read, and imported by none of ours; others are called
# otherwise than they are imported.
TOOLS = {"papermill", "ipykernel", "nbval", "tensorboard", "pytest", "jinja2", "tabulate"}
OURS = {"asnn_common", "conftest", "pages", *(path.stem for path in SOURCES)}
OPTIONAL = {"pynvml", "gguf"}  # the counter of a GPU's energy; files for llama.cpp
CALLED = {"sklearn": "scikit-learn", "IPython": "ipython", "lm_eval": "lm-eval"}


def imports(tree):
    """The top-level names of all packages that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - OURS


def test_what_is_imported_is_required_and_what_is_required_is_used():
    used = {CALLED.get(name, name) for tree in TREES.values() for name in imports(tree)}
    required = set(re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.M))
    assert used - required == OPTIONAL and required - used - TOOLS == set()
    pins = (ROOT / ".ci" / "constraints.txt").read_text().replace("lm_eval", "lm-eval")
    assert set(re.findall(r"^([\w-]+)==", pins, re.M)) == required


def test_what_a_saved_student_carries_needs_torch_and_transformers_only():
    carried, mark, _ = MODULE.read_text().partition("\n# ---- end of what a saved student carries")
    assert mark and imports(ast.parse(carried)) <= {"torch", "transformers"}
