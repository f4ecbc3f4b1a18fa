"""The ladder from the published recipe to v14.4 on the reference task, one change per row.

    ASNN_REF=<folder with corpus/ and teacher/> .venv/bin/python .ci/ladder.py [--rows NAME ...] [--seeds 42 43 44]

Appends a line for each row and seed to outputs/reference/ladder.jsonl, skips what stands there, and prints the table.
"""
import argparse
import json
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.environ.get("ASNN_HOME") or str(ROOT))
import asnn_common as asnn  # noqa: E402

RESULTS = Path(os.environ.get("ASNN_LADDER") or ROOT / "outputs" / "reference" / "ladder.jsonl")

# name: (recipe, values that differ from it); each row is the one above with what its name says.
PLAIN = {"align_steps": 0, "optimizer": "adamw", "matrix_lr": None, "beta2": 0.999, "ce_weight": 0.0}
ROWS = {
    "published: cumsum recurrence": ("v14.3-cumsum", {}),
    "exact recurrence": ("v14.3-published", {}),
    "+ decays spread, mixes in [0.5, 1], clipped estimator": ("v14.3", {}),
    "+ weights of the teacher": ("v14.3", {"weights_from_teacher": True, "projection_bias": True, "output_scale": 0.5,
                                           "activation": "gelu_pytorch_tanh"}),
    "+ lr 2e-3, fixed tau 1, no FDD": ("v14.4", {**PLAIN, "state_kind": "vector"}),
    "+ KL + 0.2 CE, beta2 0.95": ("v14.4", {**PLAIN, "state_kind": "vector", "ce_weight": 0.2, "beta2": 0.95}),
    "+ matrix state": ("v14.4", {**PLAIN, "state_kind": "matrix", "ce_weight": 0.2, "beta2": 0.95}),
    "+ delta rule": ("v14.4", {**PLAIN, "ce_weight": 0.2, "beta2": 0.95}),
    "+ Muon": ("v14.4", {"align_steps": 0}),
    "+ layerwise alignment first (v14.4)": ("v14.4", {}),
    "identity estimator in v14.4": ("v14.4", {"estimator": "identity"}),
    "normalised estimator in v14.4": ("v14.4", {"estimator": "normalised"}),
    "alpha and amplitude per channel in v14.4": ("v14.4", {"granularity": "channel"}),
    "integer:3 keys and values in v14.4": ("v14.4", {"spike_kind": "integer:3"}),
    "no CE in v14.4": ("v14.4", {"ce_weight": 0.0}),
    "CE from step 400 on": ("v14.4", {"ce_start": 400}),
    "spikes fade in over 200 steps": ("v14.4", {"anneal_steps": 200}),
    "alignment for 300 steps": ("v14.4", {"align_steps": 300}),
    "no weights of the teacher but embeddings": ("v14.4", {"weights_from_teacher": False, "align_steps": 0}),
    "vector state (v14.4-vector)": ("v14.4-vector", {}),
    "spikes in mix_in": ("v14.4", {"spike_sites": ("k", "v", "mix_in")}),
    "spikes in mix_out": ("v14.4", {"spike_sites": ("k", "v", "mix_out")}),
    "spikes in ffn_in": ("v14.4", {"spike_sites": ("k", "v", "ffn_in")}),
    "spikes in ffn_hidden": ("v14.4", {"spike_sites": ("k", "v", "ffn_hidden")}),
    "spikes in head_in": ("v14.4", {"spike_sites": ("k", "v", "head_in")}),
    "all layer sites (v14.4-sites)": ("v14.4-sites", {}),
    "all layer sites, rates held (v14.4-rates)": ("v14.4-rates", {}),
    "all layer sites, integer:3": ("v14.4-sites", {"encoder_kind": "integer:3"}),
    "all sites and the head": ("v14.4-sites", {"spike_sites": asnn.SITES}),
    "dense twin of v14.4": ("v14.4", {"spike_kind": "dense"}),
}


def read():
    """The rows measured so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def measure(name, seed, steps):
    """One row: {"row", "seed", ..., "validation", "test"} with PPLs and gaps on whole splits."""
    recipe, values = ROWS[name]
    profile = asnn.PROFILES["ref"]
    task = asnn.load_task(profile.scale(asnn.get_recipe(recipe), seed=seed, distill_steps=steps, **values), profile)
    student, result = asnn.distil(task, task.recipe, asnn.FitConfig.from_recipe(task.recipe), description=name)
    products = [row for row in asnn.matrix_products(student) if row["layers"] and row["site"]]
    row = {"row": name, "seed": seed, "steps": steps, "trained": result.step,
           "fed": sum(p["macs"] for p in products if p["fed"]) / sum(p["macs"] for p in products), "seconds_per_step": result.seconds / result.step,
           "parameters": asnn.count_parameters(student), "threads": asnn.environment()["threads"], "precision": result.precision}
    for split in ("validation", "test"):
        ours, theirs = (asnn.evaluate(m, task.tokens[split], task.recipe.seq_len) for m in (student, task.teacher.model))
        row[split] = {"ppl": ours.ppl, "gap": ours.ppl / theirs.ppl, "tokens": ours.tokens}
    return row


def table(rows):
    """Markdown, in the order of ROWS; mean and standard deviation over seeds."""
    lines = ["| row | test PPL | test gap | validation gap | seeds | weight products fed by spikes | s/step |",
             "|" + "---|" * 7]
    for name in ROWS:
        for steps in sorted({r["steps"] for r in rows if r["row"] == name}):
            same = [r for r in rows if r["row"] == name and r["steps"] == steps]
            gaps = [r["test"]["gap"] for r in same]
            spread = f" ± {statistics.stdev(gaps):.3f}" if len(gaps) > 1 else ""
            mean = lambda key: statistics.mean(r["test"][key] for r in same)  # noqa: E731
            validation = [r["validation"]["gap"] for r in same if "validation" in r]  # the notebooks' tax runs have none
            seen = f"{statistics.mean(validation):.3f}" if validation else "-"
            speed = statistics.median(r["seconds_per_step"] for r in same)
            lines.append(f"| {name}{'' if steps == 600 else f', {steps} steps'} | {mean('ppl'):.2f} | {mean('gap'):.3f}{spread} | "
                         f"{seen} | {len(same)} | {100 * same[0].get('fed', 0.0):.0f} % | {speed:.2f} ({same[0]['threads']} threads) |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[42])
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    for name in arguments.rows:
        asnn.require(name in ROWS, "row", name, "; ".join(ROWS))
        for seed in arguments.seeds:
            if not any((r["row"], r["seed"], r["steps"]) == (name, seed, arguments.steps) for r in read()):
                line = json.dumps(measure(name, seed, arguments.steps))
                with open(RESULTS, "a") as file:
                    file.write(line + "\n")
    print(table(read()))
