"""Write the tables of README.md from the metrics in outputs/reference/, or say with --check that they are out of date."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import asnn_common as asnn

BEGIN, END = "<!-- results: make readme -->", "<!-- end of results -->"


def rendered(text, metrics):
    """README text with its table replaced. Raises ValueError when the marks are missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md has no place for the results: it needs the lines {BEGIN} and {END}.")
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{asnn.results_table(metrics)}\n{END}{rest.split(END, 1)[1]}"


def reference_metrics(folder=ROOT / "outputs" / "reference"):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main(arguments):
    path = ROOT / "README.md"
    old = path.read_text()
    new = rendered(old, reference_metrics())
    if "--check" in arguments:
        if new != old:
            print("README.md does not show what outputs/reference/ holds: run make readme.")
        return int(new != old)
    asnn.write_atomically(path, new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
