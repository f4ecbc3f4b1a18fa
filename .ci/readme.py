"""Write the tables of README.md and notebooks/LOG.md from outputs/reference/, or say with --check that they are out of
date."""

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import asnn_common as asnn

def rendered(text, table, what="results"):
    """A document with one of its tables replaced. Raises ValueError when the marks are missing."""
    begin, end = f"<!-- {what}: make readme -->", f"<!-- end of {what} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the document has no place for the {what}: it needs the lines {begin} and {end}.")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}"


def reference_metrics(folder=ROOT / "outputs" / "reference"):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def gate_table(folder=ROOT / "outputs" / "reference" / "v15"):
    """Markdown of the validations in a folder, those before and after a remedy in rows of their own."""
    metrics = ("dead channels", "saturated channels", "firing rate", "mutual information", "CKA")
    lines = ["| student | " + " | ".join(metrics) + " | null of MI, CKA | untrained, biased CKA | PPL rise | gate |", "|" + "---|" * 10]
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        for when in ("before", "after"):
            if found[when] is None:
                continue
            gate, sites = found[when]["gate"], found[when]["sites"].values()
            mean = lambda key: sum(site[key] for site in sites) / len(sites)  # noqa: E731
            cells = []
            for name in metrics:
                m = gate["metrics"][name]
                low, high = m["interval"]
                cells.append(f"{m['value']:.3f} [{low:.3f}, {high:.3f}]" + ("" if m["pass"] else f" **fails at {m['sites'] - m['sites passed']} of {m['sites']}**"))
            rise = gate["metrics"].get("PPL rise")
            lines.append(f"| {path.stem}{', remedied' if when == 'after' else ''} ({gate['run']}) | {' | '.join(cells)} | "
                         f"{mean('mutual information null'):.3f}, {mean('CKA null'):.3f} | {mean('CKA control'):.2f}, {mean('CKA biased'):.2f} | "
                         f"{'-' if rise is None else format(100 * rise['value'], '+.1f') + ' %'} | {gate['verdict']} |")
    return "\n".join(lines)


def documents():
    """{path: what it should say}."""
    spec = importlib.util.spec_from_file_location("ladder", ROOT / ".ci" / "ladder.py")
    ladder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ladder)
    readme, log = ROOT / "README.md", ROOT / "notebooks" / "LOG.md"
    return {readme: rendered(rendered(readme.read_text(), asnn.results_table(reference_metrics())), gate_table(), "gate"),
            log: rendered(log.read_text(), ladder.table(ladder.read()))}


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
