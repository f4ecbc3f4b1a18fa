"""Build, run and check the notebook series.

Each notebook is a pair: notebooks/asnn_*.py, the source in jupytext's percent format, and
notebooks/asnn_*.ipynb, built from it, executed and committed with its outputs. Run inside .venv:

    notebooks.py build [names]   make the .ipynb of each source, with outputs
    notebooks.py run [names]     run each source as a program and tell what it took and made
    notebooks.py check           say what is wrong with the committed pairs

A name is any part of a notebook's name; without names it is the whole series, in the order of the names.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
MAX_BYTES = 3_000_000
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget"
ABSOLUTE_PATH = re.compile(r"/root/|/home/\w|/Users/\w|/tmp/")


class Stop(Exception):
    """A reason, in one sentence, to end a command."""


# ---- the series ----------------------------------------------------------------------------------


def series(folder=NOTEBOOKS, names=()):
    """The sources of the series in order, or those that the names select."""
    sources = sorted(Path(folder).glob("asnn_*.py"))
    if not sources:
        raise Stop(f"no notebook asnn_*.py was found in {folder}.")
    # v14.3 and v14_3, with and without the folder and the ending of a file.
    wanted = [re.sub(r"\.(py|ipynb)$", "", Path(name).name).replace(".", "_") for name in names]
    for name in wanted:
        if not any(name in source.stem for source in sources):
            raise Stop(
                f"no notebook is named {name}: there are {', '.join(source.stem for source in sources)}."
            )
    return [source for source in sources if not wanted or any(name in source.stem for name in wanted)]


# ---- build ---------------------------------------------------------------------------------------


def read_source(py_path):
    """The notebook that a .py source describes, without outputs."""
    import jupytext

    return jupytext.read(py_path, fmt="py:percent")


def set_ids(notebook):
    """Give each cell an id that its text alone decides: a rebuilt notebook differs only where it changed."""
    seen = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:10]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"


# The profiler's word on memory that was allocated before it began, with the time.
ALLOCATOR_NOTE = re.compile(r"^\[W\d+ .*CPUAllocator\.cpp.*\n?", re.MULTILINE)


def last_lines(text):
    """What a terminal shows after the carriage returns of progress bars: each line's last state."""
    text = re.sub(r"\n?\x1b\[A", "", text)  # nested bars move up a line
    shown = []
    for line in text.split("\n"):
        state = ""
        for part in line.split("\r"):
            state = part + state[len(part) :]
        shown.append(state.rstrip() if "\r" in line else state)
    return "\n".join(shown)


def without_places(text, root=ROOT):
    """The text without the project's and the home folder, the kernel's own files and memory addresses."""
    text = re.sub(r"/\S*/ipykernel_\d+/\d+\.py", "<cell>", text)
    home = Path.home()
    for place, short in ((root, "."), (home, "~"), (home.resolve(), "~")):
        if len(Path(place).parts) > 1:
            text = re.sub(re.escape(str(place)) + r"(?![\w-])", short, text)
    return re.sub(r" at 0x[0-9a-f]{6,}", "", text)


def clean_outputs(outputs, root=ROOT):
    """The outputs of a cell without what differs from machine to machine."""
    cleaned = []
    for output in outputs:
        if output["output_type"] == "stream":
            # A bar comes in many pieces, maybe between lines of the other stream: put each stream together.
            group = []
            while len(group) < len(cleaned) and cleaned[-1 - len(group)]["output_type"] == "stream":
                group.append(cleaned[-1 - len(group)])
            same = [earlier for earlier in group if earlier["name"] == output["name"]]
            if same:
                same[0]["text"] += output["text"]
                continue
        elif "data" in output:
            had_widget = any(kind.startswith(WIDGET) for kind in output["data"])
            for kind in [kind for kind in output["data"] if kind.startswith(WIDGET)]:
                del output["data"][kind]
            if had_widget and set(output["data"]) <= {"text/plain"}:
                continue  # only the widget's name is left
            for kind, value in output["data"].items():
                if isinstance(value, str) and not (kind.startswith("image/") and kind != "image/svg+xml"):
                    output["data"][kind] = without_places(value, root)
        cleaned.append(output)
    for output in cleaned:
        if output["output_type"] == "stream":
            output["text"] = without_places(ALLOCATOR_NOTE.sub("", last_lines(output["text"])), root)
    return [output for output in cleaned if output["output_type"] != "stream" or output["text"].strip()]


def set_metadata(notebook):
    """Keep of the notebook's metadata what holds on every machine."""
    pairing = {
        key: value
        for key, value in notebook.metadata.get("jupytext", {}).items()
        if key != "text_representation"
    }
    pairing["formats"] = "ipynb,py:percent"
    language = dict(notebook.metadata.get("language_info", {"name": "python"}))
    language.pop("version", None)
    notebook.metadata = {"jupytext": pairing, "kernelspec": dict(KERNELSPEC), "language_info": language}


def build_one(py_path, profile="cpu", timeout=1800):
    """Execute one source as a notebook and write the .ipynb in one step; return it."""
    import nbclient
    import nbformat

    notebook = read_source(py_path)
    notebook.nbformat, notebook.nbformat_minor = 4, 5  # cell ids exist since 4.5
    set_ids(notebook)
    notebook.metadata["kernelspec"] = dict(KERNELSPEC)
    environment = {
        key: value for key, value in os.environ.items() if key != "MPLBACKEND"
    }  # figures go inline
    environment["ASNN_PROFILE"] = profile
    client = nbclient.NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        allow_errors=False,
        resources={"metadata": {"path": str(py_path.parent)}},
        extra_arguments=["--log-level=ERROR"],  # the kernel's own warnings are of no use here
    )
    client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.from_dict(output) for output in clean_outputs(cell.outputs)]
            cell.metadata.pop("execution", None)
    set_metadata(notebook)
    nbformat.validate(notebook)
    ipynb_path = py_path.with_suffix(".ipynb")
    unfinished = py_path.with_suffix(".ipynb.new")
    unfinished.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(unfinished, ipynb_path)
    return ipynb_path


def build(names, profile, timeout):
    """Build the .ipynb of each source."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    for source in series(names=names):
        print(f"building {source.stem} (profile {profile}) ...", flush=True)
        start = time.time()
        try:
            ipynb_path = build_one(source, profile, timeout)
        except CellExecutionError as error:
            print(error, file=sys.stderr)
            raise Stop(f"a cell of {source.stem} failed, so its .ipynb was left as it was.") from None
        except (CellTimeoutError, DeadKernelError) as error:
            text = " ".join(str(error).split())
            raise Stop(f"{source.stem} was not built, its .ipynb was left as it was: {text}") from None
        print(f"  {time.time() - start:.0f} s, {ipynb_path.stat().st_size / 1e6:.2f} MB", flush=True)


# ---- run -----------------------------------------------------------------------------------------


def outputs_folder():
    """Where runs leave their results."""
    return Path(os.environ.get("ASNN_OUTPUTS") or ROOT / "outputs")


def metrics_files():
    """The metrics.json of each run folder, with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in outputs_folder().glob("*/*/metrics.json")}


def run_one(source, environment):
    """Run one source as a program; return its exit code, its seconds and its peak memory in GB."""
    start = time.time()
    process = subprocess.Popen([sys.executable, str(source)], cwd=ROOT, env=environment)
    try:
        # wait4 gives the memory of this one child, where getrusage gives the largest of all so far.
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    return process.returncode, time.time() - start, usage.ru_maxrss * unit / 1e9


def show(path):
    """The path, relative to the project where it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def run(names):
    """Run each source in order, up to the first that fails, and print what it took and made."""
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    rows, failed = [], None
    for source in series(names=names):
        print(f"\n=== {source.stem} ===", flush=True)
        before = metrics_files()
        code, seconds, peak = run_one(source, environment)
        made = sorted(path for path, changed in metrics_files().items() if before.get(path) != changed)
        rows.append((source.stem, seconds, peak, made))
        if code != 0:
            what = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            failed = f"{source.stem} {what}, so the notebooks after it were not run."
            break
    width = max(len(row[0]) for row in rows)
    print(f"\n{'notebook':<{width}}  seconds  peak GB")
    for name, seconds, peak, made in rows:
        print(f"{name:<{width}}  {seconds:7.0f}  {peak:7.2f}")
        for path in made:
            print(f"  {show(path)}")
            if (path.parent / "figures").is_dir():
                print(f"  {show(path.parent / 'figures')}{os.sep}")
    sys.stdout.flush()
    if failed:
        raise Stop(failed)


# ---- check ---------------------------------------------------------------------------------------


def tags(cell):
    return cell.metadata.get("tags", [])


def first_line(cell):
    """The first line of a cell's source, to name the cell in a finding."""
    lines = cell.source.strip().splitlines()
    return lines[0][:60] if lines else ""


def check_sync(source_notebook, notebook):
    """Whether the cells of the pair are the same; what a finding says of the difference, or None."""
    from jupytext.compare import NotebookDifference, compare_notebooks

    # The notebooks' metadata differ by design: the source has no kernel.
    source_notebook.metadata, metadata = {}, notebook.metadata
    notebook.metadata = {}
    try:
        compare_notebooks(notebook, source_notebook, "py:percent")
    except NotebookDifference as difference:
        return " ".join(str(difference).split())[:200]
    finally:
        notebook.metadata = metadata
    return None


def check_execution(code_cells):
    """Findings on cells that were not executed, once each and in order, or that failed."""
    findings = []
    for number, cell in enumerate(code_cells, 1):
        if cell.execution_count != number:
            findings.append(
                f'code cell {number} ("{first_line(cell)}") has the execution count {cell.execution_count}, '
                f"not {number}."
            )
        if any(output.output_type == "error" for output in cell.outputs):
            findings.append(f'code cell {number} ("{first_line(cell)}") ended with an error.')
        if "nbval-check-output" in tags(cell) and not cell.outputs:
            findings.append(f'code cell {number} ("{first_line(cell)}") is to be compared but has no output.')
    return findings


def check_literals(source):
    """Findings on the parameters cell: tools replace its values, so it may only set names to literals."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        return [f"the parameters cell is no valid Python ({error.msg})."]
    findings = []
    for statement in statements:
        targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
        literal = isinstance(statement, (ast.Assign, ast.AnnAssign)) and all(
            isinstance(t, ast.Name) for t in targets
        )
        try:
            ast.literal_eval(statement.value if literal else "")
        except (ValueError, TypeError, SyntaxError):
            literal = False
        if not literal:
            text = ast.unparse(statement).splitlines()[0][:60]
            findings.append(f'the parameters cell holds "{text}", which sets no name to a literal.')
    return findings


def check_tagged(cells):
    """Findings on the bootstrap and the parameters cell of a notebook."""
    findings = []
    places = {
        tag: [index for index, cell in enumerate(cells) if tag in tags(cell)]
        for tag in ("bootstrap", "parameters")
    }
    for tag, found in places.items():
        if len(found) != 1:
            findings.append(f"{len(found)} cells have the tag {tag}, there must be one.")
    for index in places["parameters"]:
        findings += check_literals(cells[index].source)
    if places["bootstrap"] and places["parameters"] and places["bootstrap"][0] > places["parameters"][0]:
        findings.append("the bootstrap cell comes after the parameters cell.")
    return findings


def check_places(code_cells, root=ROOT):
    """Findings on outputs that show a path of the machine they were made on."""
    findings = []
    for number, cell in enumerate(code_cells, 1):
        texts = []
        for output in cell.outputs:
            data = output.get("data", {})
            texts += [
                str(value) for kind, value in data.items() if not kind.startswith("image/") or "svg" in kind
            ]
            texts += [output.get("text", ""), json.dumps(output.get("traceback", []))]
        text = "\n".join(texts)
        found = str(root) if str(root) in text else None
        match = ABSOLUTE_PATH.search(text)
        if match:
            found = text[match.start() : match.start() + 40].split()[0]
        if found:
            findings.append(
                f'the output of code cell {number} ("{first_line(cell)}") shows the path {found}.'
            )
    return findings


def check_pair(py_path, ipynb_path):
    """What is wrong with one pair, each in a sentence."""
    import nbformat

    py_path, ipynb_path = Path(py_path), Path(ipynb_path)
    for here, missing in ((ipynb_path, py_path), (py_path, ipynb_path)):
        if not missing.is_file():
            return [f"{here.name} has no partner {missing.name}."]
    try:
        notebook = nbformat.read(ipynb_path, as_version=4)
    except Exception as error:
        return [f"{ipynb_path.name} is no readable notebook ({type(error).__name__})."]
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    findings = []
    difference = check_sync(read_source(py_path), notebook)
    if difference:
        findings.append(f"it is not what {py_path.name} gives, make notebooks builds it anew ({difference}).")
    if not code_cells:
        findings.append("it has no code cell.")
    findings += check_execution(code_cells)
    findings += check_tagged(notebook.cells)
    findings += check_places(code_cells)
    if ipynb_path.stat().st_size >= MAX_BYTES:
        findings.append(
            f"it has {ipynb_path.stat().st_size / 1e6:.1f} MB, {MAX_BYTES / 1e6:.0f} MB is the limit."
        )
    return [f"{ipynb_path.name}: {finding}" for finding in findings]


def bootstrap(py_path):
    """The text of the bootstrap cell, or None."""
    return next((cell.source for cell in read_source(py_path).cells if "bootstrap" in tags(cell)), None)


def check_series(folder):
    """What is wrong with the pairs of a folder and with the series as a whole, each in a sentence."""
    folder = Path(folder)
    names = sorted({path.stem for kind in ("py", "ipynb") for path in folder.glob(f"asnn_*.{kind}")})
    if not names:
        return [f"no notebook asnn_*.py was found in {folder.name}."]
    findings = []
    for name in names:
        findings += check_pair(folder / f"{name}.py", folder / f"{name}.ipynb")
    texts = {name: bootstrap(folder / f"{name}.py") for name in names if (folder / f"{name}.py").is_file()}
    for name, text in texts.items():
        first = next(iter(texts))
        if text is not None and texts[first] is not None and text != texts[first]:
            findings.append(f"{name}.py: its bootstrap cell differs from that of {first}.py.")
    return findings


def check():
    """Print the findings on the committed series; return the exit code."""
    findings = check_series(NOTEBOOKS)
    for finding in findings:
        print(finding)
    if not findings:
        print(f"all pairs of the series are in order ({len(series())}).")
    return 1 if findings else 0


def exit_code(command):
    """Runs a command and returns its exit code; a Stop and an interruption are told in one sentence."""
    try:
        return command() or 0
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 130


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "run", "check"):
        command = commands.add_parser(name)
        if name != "check":
            command.add_argument(
                "names", nargs="*", help="parts of names (the whole series if there are none)"
            )
        if name == "build":
            command.add_argument("--profile", default="cpu", help="size of the experiments (default: cpu)")
            command.add_argument("--timeout", type=int, default=1800, help="seconds that one cell may take")
    options = parser.parse_args(arguments)
    commands = {"check": check, "run": lambda: run(options.names),
                "build": lambda: build(options.names, options.profile, options.timeout)}
    return exit_code(commands[options.command])


if __name__ == "__main__":
    sys.exit(main())
