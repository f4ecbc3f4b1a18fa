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
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if not path.stem.startswith("v")]


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


def sparse_table(path=ROOT / "outputs" / "reference" / "v16.json"):
    """Markdown of one product and of a whole student, from the sparse.json of the committed page."""
    found = json.loads(path.read_text())
    share = {(768, 768): "mix_in", (3072, 768): "ffn_hidden", (768, 3072): "ffn_in"}
    names = ("gather", "gather_int8", "embedding_bag", "embedding_bag_int8", "csr")
    lines = ["| one product, us (quartiles) | density | linear | " + " | ".join(names) + " |", "|" + "---|" * (3 + len(names))]
    for row in found["products"]:
        linear = row["linear"]["median"]
        lines.append(f"| {row['in']} x {row['out']} | {found['densities'][share[row['in'], row['out']]]:.2f} | {asnn.Timing(**row['linear']).text(1e6)} | "
                     + " | ".join(f"{asnn.Timing(**row[name]).text(1e6)}: {linear / row[name]['median']:.2f}x" for name in names) + " |")
    base, ao = (found["decoding"][name]["median"] for name in ("dense fp32", "dense int8 (torch.ao)"))
    lines += ["", f"| whole student, {found['parameters'] / 1e6:.1f}M parameters | ms per token (quartiles) | times dense fp32 | times dense int8 | weights, MiB |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {asnn.Timing(**t).text()} | {base / t['median']:.2f} | {ao / t['median']:.2f} | {found['weights, bytes'][name] / 2**20:.0f} |" for name, t in found["decoding"].items()]
    dense, n = found["quality"]["dense"]["ppl"], found["quality"]["dense"]["tokens"]
    lines += ["", f"{found['hardware']}, medians of {next(iter(found['decoding'].values()))['runs']} interleaved runs (products: {found['products'][0]['linear']['runs']}), weights of the products out of cache, memory "
              f"{found['bandwidth, bytes/s'] / 1e9:.1f} GB/s (all measured; {'gated' if found['gated'] else 'ungated'}). Perplexity on {n:,} tokens: "
              + ", ".join(f"{name} {100 * (q['ppl'] / dense - 1):+.3f} %" for name, q in found["quality"].items() if name != "dense") + "."]
    return "\n".join(lines)


def bench_table(folder=ROOT / "outputs" / "reference" / "v17"):
    """Markdown of the systems at one token after one context, from bench.json and efficiency.json of the committed page."""
    bench, found = asnn.Bench.load(folder / "bench.json"), json.loads((folder / "efficiency.json").read_text())
    rows = [row for row in bench.rows if row["batch"] == 1 and row["context"] == found["context"] and "decode" in row]
    best = next(row for row in rows if row["system"] == found["fastest"])
    whole = lambda row: sum(row["memory"].values())  # noqa: E731
    lines = ["| system | ms per token (quartiles), p95 | tokens/s | the last row is faster by | weights + cache + activations, MiB | gap |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: -row["decode"]["median"]):
        gap = found["gaps"].get(row["system"].replace(", compiled", "").replace("auto", "dense"))  # auto is exact
        lines.append(f"| {row['system']} | {asnn.Timing(**row['decode']).text()}, {1e3 * row['decode']['p95']:.2f} | {row['tokens/s']:.1f} | {row['decode']['median'] / best['decode']['median']:.2f} | "
                     f"{' + '.join(f'{size / 2**20:.1f}' for size in row['memory'].values())} = {whole(row) / 2**20:.0f} | {'not trained' if gap is None else format(gap, '.3f')} |")
    n = rows[0]["decode"]["runs"]
    lines += ["", f"Batch 1, context {found['context']}, {found['hardware']}, medians of {n} interleaved measurements ({found['measured twice']} where a case was measured twice); a second run differed by "
              f"{100 * max(abs(r - 1) for r in found['agreement'].values()):.1f} % at most (all measured; {'gated' if found['gated'] else 'ungated'})."]
    return "\n".join(lines)


def documents():
    """{path: what it should say}."""
    spec = importlib.util.spec_from_file_location("ladder", ROOT / ".ci" / "ladder.py")
    ladder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ladder)
    readme, log = ROOT / "README.md", ROOT / "notebooks" / "LOG.md"
    text = rendered(rendered(readme.read_text(), asnn.results_table(reference_metrics())), gate_table(), "gate")
    return {readme: rendered(rendered(text, sparse_table(), "sparse products"), bench_table(), "bench"),
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
