"""Build, check and run the pages: each is notebooks/asnn_*.py and the .ipynb made from it.

    pages.py build [NAMES]   execute the .ipynb of each source, in profile cpu
    pages.py check           say what is wrong with the committed pages
    pages.py run [NAMES]     run each source as a program; say what it took and where results are

A name is a part of a page's name (v14.3, v15); without names all are meant, in order.
"""
import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat
from jupytext.compare import NotebookDifference, compare_notebooks

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"/root/|/home/\w|/Users/\w|/tmp/|" + re.escape(str(ROOT)))


def pages(names=(), folder=ROOT / "notebooks"):
    """The sources in order, or those that the names select."""
    found = sorted(folder.glob("asnn_*.py"))
    wanted = [re.sub(r"^.*/|\.(py|ipynb)$", "", name).replace(".", "_") for name in names]
    for name in wanted:
        if not any(name in path.stem for path in found):
            sys.exit(f"no page is named {name}: there are {', '.join(p.stem for p in found)}.")
    return [path for path in found if not wanted or any(name in path.stem for name in wanted)]


# ---- build


def last_lines(text):
    """What a terminal shows after a progress bar's carriage returns: each line's last state."""
    lines = re.sub(r"\n?\x1b\[A", "", text).split("\n")  # nested bars move up a line
    return "\n".join(re.sub(r".*\r(?=.)", "", line).rstrip() if "\r" in line else line
                     for line in lines)


def without_places(text):
    """The text without the project's and the home folder, the kernel's files and addresses."""
    text = re.sub(r"(?m)^\[W\d.*\n", "", text)  # a warning from C++ begins with the time
    text = re.sub(r"/\S*/ipykernel_\d+/\d+\.py", "<cell>", text)
    text = text.replace(f"{ROOT}/", "./").replace(f"{Path.home()}/", "~/")
    return re.sub(r" at 0x[0-9a-f]{6,}", "", text)


def cleaned(outputs):
    """Outputs without what differs from machine to machine. A bar comes in pieces, maybe between
    lines of the other stream: neighbours of one stream are joined."""
    kept, streams = [], {}
    for output in outputs:
        if output["output_type"] != "stream":
            streams = {}
        elif output["name"] in streams:
            streams[output["name"]]["text"] += output["text"]
            continue
        else:
            streams[output["name"]] = output
        kept.append(output)
    for output in kept:
        if output["output_type"] == "stream":
            output["text"] = without_places(last_lines(output["text"]))
        for kind in {"text/html", "text/markdown", "text/plain"} & set(output.get("data", ())):
            output["data"][kind] = without_places(output["data"][kind])
    return [o for o in kept if o["output_type"] != "stream" or o["text"].strip()]


def build(path, profile="cpu"):
    """Execute one source as a notebook and write its .ipynb in one step."""
    page = jupytext.read(path)
    page.nbformat, page.nbformat_minor = 4, 5
    for number, cell in enumerate(page.cells):
        cell["id"] = f"cell-{number}"  # a rebuilt page differs only where it changed
    client = nbclient.NotebookClient(page, timeout=1800, kernel_name="python3", record_timing=False,
                                     extra_arguments=["--log-level=ERROR"],
                                     resources={"metadata": {"path": str(path.parent)}})
    inline = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    client.execute(env={**inline, "ASNN_PROFILE": profile})
    for cell in page.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.from_dict(output) for output in cleaned(cell.outputs)]
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    page.metadata = {"jupytext": {"formats": "ipynb,py:percent"}, "kernelspec": kernel,
                     "language_info": {"name": "python"}}
    new = path.with_suffix(".ipynb.new")
    nbformat.write(page, new)
    os.replace(new, path.with_suffix(".ipynb"))


# ---- check


def tagged(page, tag):
    return [i for i, cell in enumerate(page.cells) if tag in cell.metadata.get("tags", [])]


def is_literal(statement):
    """Whether a statement sets names to a literal, which papermill and people replace."""
    try:
        ast.literal_eval(statement.value)
        return all(isinstance(target, ast.Name) for target in statement.targets)
    except (AttributeError, ValueError):
        return False


def check_source(path):
    """What is wrong with a source: its lines, its bootstrap cell and its parameters."""
    page, lines = jupytext.read(path), path.read_text(encoding="utf-8").splitlines()
    findings = [f"line {number} has {len(line)} columns, 100 are allowed."
                for number, line in enumerate(lines, 1) if len(line) > 100]
    places = [tagged(page, tag) for tag in ("bootstrap", "parameters")]
    if [len(place) for place in places] != [1, 1] or places[0] > places[1]:
        return [*findings, "it needs one cell tagged bootstrap, then one tagged parameters."]
    parameters = ast.parse(page.cells[places[1][0]].source).body
    return findings + [f"its parameters hold {ast.unparse(statement)[:60]}, which is no literal."
                       for statement in parameters if not is_literal(statement)]


def check_outputs(page):
    """What is wrong with an executed page: order, errors, contract cells, places on a machine."""
    findings = []
    for number, cell in enumerate([c for c in page.cells if c.cell_type == "code"], 1):
        texts = [{**o, "data": {k: v for k, v in o.get("data", {}).items() if k != "image/png"}}
                 for o in cell.outputs]
        compared = "nbval-check-output" in cell.metadata.get("tags", [])
        wrong = {f"has the execution count {cell.execution_count}": cell.execution_count != number,
                 "ended with an error": any(o.output_type == "error" for o in cell.outputs),
                 "is to be compared but has no output": compared and not cell.outputs,
                 "shows an absolute path": PLACE.search(json.dumps(texts))}
        findings += [f"code cell {number} ({cell.source[:40]!r}) {what}."
                     for what, is_so in wrong.items() if is_so]
    return findings


def check(folder=ROOT / "notebooks"):
    """What is wrong with the pages of a folder, a sentence each."""
    names = sorted({p.stem for p in folder.glob("asnn_*") if p.suffix in (".py", ".ipynb")})
    findings, bootstraps = [] if names else [f"{folder.name} has no page asnn_*.py."], {}
    for name in names:
        path, made = folder / f"{name}.py", folder / f"{name}.ipynb"
        if not (path.is_file() and made.is_file()):
            findings.append(f"{name}: it has no .py or no .ipynb.")
            continue
        source, page = jupytext.read(path), nbformat.read(made, as_version=4)
        found = check_source(path) + check_outputs(page)
        bootstraps[name] = [source.cells[i].source for i in tagged(source, "bootstrap")]
        if bootstraps[name] != next(iter(bootstraps.values())):
            found.append(f"its bootstrap cell is not that of {next(iter(bootstraps))}.")
        source.metadata = page.metadata = {}  # they differ by design: a source has no kernel
        try:
            compare_notebooks(page, source, "py:percent")
        except NotebookDifference:
            found.append("its .ipynb is not what its .py gives: make notebooks builds it anew.")
        findings += [f"{name}: {finding}" for finding in found]
    return findings


# ---- run


def run(paths):
    """Run sources in order, up to the first that fails; print seconds and where new results are."""
    outputs = Path(os.environ.get("ASNN_OUTPUTS") or ROOT / "outputs").absolute()
    report, code, variables = [], 0, {**os.environ, "MPLBACKEND": "Agg"}
    for path in paths:
        print(f"\n=== {path.stem} ===", flush=True)
        begin = time.time()
        code = subprocess.run([sys.executable, path], cwd=ROOT, env=variables).returncode
        new = {p.parent for p in outputs.glob("*/*/*.json") if p.stat().st_mtime >= begin}
        places = ", ".join(sorted(os.path.relpath(folder, ROOT) for folder in new))
        report.append(f"{path.stem}: {time.time() - begin:.0f} s; results: {places or 'none'}")
        if code:
            report.append(f"error: {path.stem} ended with code {code}; no page after it was run.")
            break
    print("\n" + "\n".join(report))
    return int(bool(code))


if __name__ == "__main__":
    command, paths = sys.argv[1:2], pages(sys.argv[2:])
    if command == ["run"]:
        sys.exit(run(paths))
    if command != ["build"]:
        sys.exit("\n".join(check()) or None if command == ["check"] else __doc__)
    for path in paths:
        print(f"building {path.stem} ...", flush=True)
        build(path)
