"""Write the README's tables from outputs/reference/."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GATE = ("dead channels", "saturated channels", "firing rate", "mutual information", "CKA")


def table(*rows):
    """Markdown of rows of texts, the first of them the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def timing(found, unit=1e3):
    """Median and quartiles of seconds, in thousandths."""
    median, low, high = (unit * found[key] for key in ("median", "low", "high"))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def results(folder):
    rows = [["run", "corpus", "steps", "teacher PPL", "student PPL", "gap ± s.e.", "firing rate"]]
    found = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("[!v]*-v*.json"))}
    for name, m in found.items():
        gap, rates = m["gap"]["test"], m["student"]["density"].values()
        rows.append([name.removeprefix("ref-"), m["corpus"]["name"], m["training"]["step"],
                     f"{m['teacher']['test']['ppl']:.2f}", f"{m['student']['test']['ppl']:.2f}",
                     f"{gap['value']:.3f} ± {gap['standard_error']:.3f}",
                     f"{sum(rates) / len(rates):.3f}"])
    speeds = [m["training"]["tokens_per_second"] for m in found.values()]
    machines = ", ".join(sorted({m["environment"]["cpu"] for m in found.values()}))
    return (f"{table(*rows)}\n\nTrained at {min(speeds):,.0f} to {max(speeds):,.0f} tokens/s on "
            f"one or two cores ({machines}). Whole test split, one seed, all measured.")


def gate(folder):
    rows = [["student", *GATE, "gate"]]
    for path in sorted((folder / "v15").glob("*.json")):
        for when, found in json.loads(path.read_text()).items():
            if when not in ("before", "after") or not found:
                continue
            metrics, cells = found["gate"]["metrics"], []
            for m in (metrics[key] for key in GATE):
                low, high = m["interval"]
                fails = "" if m["pass"] else f" **fails at {m['sites'] - m['sites passed']}**"
                cells.append(f"{m['value']:.3f} [{low:.3f}, {high:.3f}]{fails}")
            rise = f", PPL {100 * metrics['PPL rise']['value']:+.1f} %" if when == "after" else ""
            name = path.stem + (", remedied" if when == "after" else "")
            rows.append([name, *cells, found["gate"]["verdict"] + rise])
    return table(*rows)


def products(folder):
    found = json.loads((folder / "v16.json").read_text())
    names = ("gather", "gather_int8", "embedding_bag", "csr")
    rows = [[f"{row['in']} x {row['out']}", timing(row["linear"], 1e6),
             *(f"{1e6 * row[n]['median']:.0f}: {row['linear']['median'] / row[n]['median']:.2f}x"
               for n in names)] for row in found["products"]]
    steps = [["student", "ms per token (quartiles)", "times dense fp32", "times dense int8", "MiB"]]
    times = found["decoding"]
    base, int8 = (times[name]["median"] for name in ("dense fp32", "dense int8"))
    for name, t in times.items():
        steps.append([name, timing(t), f"{base / t['median']:.2f}", f"{int8 / t['median']:.2f}",
                      f"{found['weights, bytes'][name] / 2**20:.0f}"])
    return f"{table(['product, us', 'linear (quartiles)', *names], *rows)}\n\n{table(*steps)}"


def bench(folder):
    page = json.loads((folder / "v17" / "efficiency.json").read_text())
    rows = json.loads((folder / "v17" / "bench.json").read_text())["rows"]
    rows = [r for r in rows if (r["batch"], r["context"]) == (1, page["context"]) and "decode" in r]
    cells = [["system", "ms per token (quartiles)", "tokens/s", "memory, MiB", "gap"]]
    for r in sorted(rows, key=lambda r: -r["decode"]["median"]):
        gap = page["gaps"].get(r["system"].removesuffix(", compiled"))
        cells.append([r["system"], timing(r["decode"]), f"{r['tokens/s']:.0f}",
                      f"{sum(r['memory'].values()) / 2**20:.0f}",
                      f"{gap:.3f}" if gap else "not trained"])
    return table(*cells)


def rendered(text, folder=ROOT / "outputs" / "reference"):
    """The README with its tables anew; ValueError where the marks of one are missing."""
    for make in (results, gate, products, bench):
        name = make.__name__
        marks = f"(<!-- {name}: make readme -->\n).*?(<!-- end of {name} -->)"
        text, n = re.subn(marks, lambda m: f"{m[1]}{make(folder)}\n{m[2]}", text, flags=re.DOTALL)
        if n != 1:
            raise ValueError(f"README.md has no place for {name}: it needs {marks}.")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")
