"""Write the tables of README.md and notebooks/LOG.md from outputs/reference/, or say with --check that they are out of
date."""

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import asnn_common as asnn

BEGIN, END = "<!-- results: make readme -->", "<!-- end of results -->"


def rendered(text, table):
    """A document with its table replaced. Raises ValueError when the marks are missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"the document has no place for the results: it needs the lines {BEGIN} and {END}.")
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


def reference_metrics(folder=ROOT / "outputs" / "reference"):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def documents():
    """{path: what it should say}."""
    spec = importlib.util.spec_from_file_location("ladder", ROOT / ".ci" / "ladder.py")
    ladder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ladder)
    tables = {ROOT / "README.md": asnn.results_table(reference_metrics()),
              ROOT / "notebooks" / "LOG.md": ladder.table(ladder.read())}
    return {path: rendered(path.read_text(), table) for path, table in tables.items()}


def main(arguments):
    stale = {path: new for path, new in documents().items() if path.read_text() != new}
    if "--check" in arguments:
        for path in stale:
            print(f"{path.name} does not show what outputs/reference/ holds: run make readme.")
        return int(bool(stale))
    for path, new in stale.items():
        asnn.write_atomically(path, new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
