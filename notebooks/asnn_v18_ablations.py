# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # ASNN-Goose v18: what each part is worth
#
# <a href="https://kaggle.com/kernels/welcome?src=https://github.com/OWNER/REPO/blob/main/
# notebooks/asnn_v18_ablations.ipynb"><img alt="Open in Kaggle"
# src="https://kaggle.com/static/images/open-in-kaggle.svg"></a>
# <a href="https://colab.research.google.com/github/OWNER/REPO/blob/main/
# notebooks/asnn_v18_ablations.ipynb"><img alt="Open in Colab"
# src="https://colab.research.google.com/assets/colab-badge.svg"></a>
#
# **Needs** `asnn_common.py`; finished rows in `outputs/reference/ablations.jsonl` are shown too.
# A sitting ends after `hours`: six minutes, 3 GB on two CPU cores; 11 hours, 9 GB on a T4 (an
# estimate). Run all again, here or on another machine with the same folder, to go on.
# *Run All* needs no editing. The last line you should see begins with `Finished: v18`.
#
# A recipe has twenty parts, and a table that ends in its best row says of none what it is worth.
# Here every part is switched off, or exchanged, alone, over several seeds, against a control with
# the same seed, corpus, teacher and steps. The table of rows is data; one function runs them.

# %% tags=["bootstrap"]
import os
import sys
from pathlib import Path

here = Path(globals().get("__file__", "notebook")).resolve().parent
near = [Path(os.environ.get("ASNN_HOME") or here), here, here.parent, Path.cwd(), Path.cwd().parent]
inputs = [*os.environ.get("ASNN_INPUTS", "").split(os.pathsep), "/kaggle/input", "/kaggle/usr/lib"]
found = [folder / "asnn_common.py" for folder in near if (folder / "asnn_common.py").is_file()]
found += [path for root in inputs if root for path in sorted(Path(root).rglob("asnn_common.py"))]
if not found:
    raise FileNotFoundError("asnn_common.py was not found: attach it as a Kaggle dataset, upload "
                            "it beside this notebook, or set ASNN_HOME to its folder.")
sys.path.insert(0, str(found[0].parent))
import asnn_common as asnn  # noqa: E402

print(f"asnn_common {asnn.__version__} from {os.path.relpath(found[0])}")

# %% [markdown]
# ## Parameters
# The only cell to edit. `None` means: what the profile says.

# %% tags=["parameters"]
profile = None  # tiny (seconds), cpu (minutes), ref, t4 (full size); None: by hardware
rows = None  # names of rows, separated by commas; "all"; None: a few in profiles tiny and cpu
seeds = None  # how many seeds from `seed` on; None: 2 in profile tiny, else 3
steps = None  # optimiser steps of every run; None: 6 (tiny), 30 (cpu), 300 (ref), 5000 (t4)
hours = None  # what one sitting may take; None: no limit (tiny), 0.1 (cpu), 8 (ref), 11 (t4)
again = None  # a row to run once more, to be held against its published value
seed = 42

# %% [markdown]
# ## The matrix
# A row changes fields of a recipe and names its control. Families that are about the published
# recipe stand on `v14.3`, which is that recipe with its faults repaired; ours on `v14.4`. Students
# of other widths cannot take the teacher's weights: rows of capacity and their control do not.

# %%
import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import socket
import threading
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the matrix: recipe `base` with `changes`, held against the row `control` (a control
    itself has none). kill_switch: whether FDD ends when it harms."""

    name: str
    family: str
    control: str | None
    base: str
    says: str
    changes: dict
    kill_switch: bool = True


# The founders' widths and depths (16M, 22M, 42M, 74M), and the same shares of other teachers.
SHAPES = {"t4": [(256, 4), (320, 5), (512, 5), (768, 5)],
          "ref": [(88, 2), (108, 3), (172, 3), (256, 3)],
          "cpu": [(44, 2), (56, 3), (84, 3), (128, 3)],
          "tiny": [(24, 1), (28, 2), (44, 2), (64, 2)]}
SIZES = ("16M", "22M", "42M", "74M")
FIXED = {"temperature": "fixed"}
CE_ONLY = {**FIXED, "kd_weight": 0.0, "ce_weight": 1.0, "fdd": "none"}
NO_FDD = {"fdd": "none"}
FROM_SCRATCH = {"weights_from_teacher": False, "embeddings_from_teacher": False, "align_steps": 0}
KINDS = [("dense", "no spikes: the dense twin", {"spike_kind": "dense"}),
         ("binary", "binary spikes {0, 1}", {"spike_kind": "binary"}),
         ("integer2", "signed counts up to 2", {"spike_kind": "integer:2"}),
         ("two-step", "a second ternary train on the rest", {"spike_steps": 2})]


def matrix(profile):
    """{name: Row} of all rows, each after its control, at the size of a profile."""
    made = {}

    def add(family, base, control, *lines):
        for name, says, changes, *kill in lines:
            about = None if name == control else control
            made[name] = Row(name, family, about, base, says, changes, *kill)

    sites = asnn.SITES[:-1]
    add("ours", "v14.4", "control", ("control", "v14.4", {}),
        ("transfer", "without the teacher's weights", {"weights_from_teacher": False}),
        ("alignment", "without layerwise alignment", {"align_steps": 0}),
        ("delta", "sums instead of the delta rule", {"state_kind": "matrix"}),
        ("vector", "a vector for a state", {"state_kind": "vector"}),
        ("muon", "AdamW instead of Muon", {"optimizer": "adamw"}),
        ("decay", "+ decays that depend on the token", {"decay": "token"}),
        ("sites", "+ spikes before every product", {"spike_sites": sites}))
    add("ours", "v14.4-sites", "sites", ("rates", "+ rates held in a band", {"rate_weight": 10.0}))
    add("distillation, v14.3", "v14.3", "published", ("published", "CTKD and FDD", {}),
        ("p-ce", "cross-entropy only", CE_ONLY), ("p-logits", "logits only", {**FIXED, **NO_FDD}),
        ("p-ctkd", "logits and CTKD", NO_FDD), ("p-fdd", "logits and FDD", FIXED))
    add("distillation, v14.4", "v14.4", "control", ("o-ce", "cross-entropy only", CE_ONLY),
        ("o-logits", "logits only", {"ce_weight": 0.0}),
        ("o-ctkd", "+ CTKD", {"temperature": "bounded", "tau": 2.0}),
        ("o-fdd", "+ FDD", {"fdd": "cka_delta"}))
    add("components, v14.3", "v14.3", "published",
        ("p-reversal", "CTKD without gradient reversal", {"gradient_reversal": False}),
        ("p-warmup", "FDD from the first step", {"fdd_start": 0}),
        ("p-kill", "FDD without the kill switch", {}, False))
    for base, control, letter in (("v14.3", "published", "p"), ("v14.4", "control", "o")):
        add(f"spike kind, {base}", base, control,
            *((f"{letter}-{name}", says, changes) for name, says, changes in KINDS))
    add("spike kind, all sites", "v14.4-sites", "sites",
        ("s-dense", *KINDS[0][1:]), ("s-two-step", *KINDS[3][1:]),
        ("s-integer2", KINDS[2][1], {"spike_kind": "integer:2", "encoder_kind": "integer:2"}))
    for base, letter in (("v14.3", "p"), ("v14.4", "o")):
        shapes = [(f"{letter}-{size}", f"{size} at full size", {
            **FROM_SCRATCH, "d_model": D, "n_layer": L,
            "head_dim": 64 if profile == "t4" else D // 4})
            for size, (D, L) in zip(SIZES, SHAPES[profile])][::-1]
        add(f"capacity, {base}", base, f"{letter}-74M", *shapes)
    return made


def recipe_of(row, profile, steps, seed):
    """The recipe of a cell: a row and a seed. Measured six times, saved as often."""
    share = max(1, steps // 6)
    recipe = asnn.get_recipe(row.base, profile, distill_steps=steps, seed=seed, eval_every=share,
                             save_every=max(share, 25), **row.changes)
    # The rate of matrices is Muon's; AdamW has one for all, at which it was the best of its ladder.
    return recipe if recipe.optimizer == "muon" else recipe.replace(matrix_lr=None)


# %% [markdown]
# ## How it is run
# A cell is a row with one seed and leaves one file. Who works on it holds a claim, a file that only
# one can make and that is renewed while work goes on; one that is not renewed is taken over, with
# the checkpoint. So several machines share a folder, and a sitting goes on where one ended.

# %%
STALE = 600.0  # seconds after which a claim that was not renewed is another's to take
NOT_SAME = {"name", "changed", "outcome", "published_ppl", "inferred", "repaired", "max_hours",
            "tracker", "save_every"}  # fields of a recipe that change nothing of a result


class WithoutKillSwitch(asnn.DistillationTrainer):
    """Trains with FDD whatever it does to the perplexity."""

    def __init__(self, objective, *args, **kwargs):
        objective.FDD_REGRESSION = math.inf
        super().__init__(objective, *args, **kwargs)


@contextlib.contextmanager
def claimed(path, stale=STALE):
    """Whether this process may work on the cell at `path`. Claims are numbered: the newest counts,
    and in the place of a stale one comes the next number, which only one process can make."""
    claims = sorted(path.parent.glob(f"{path.stem}.claim-*"))
    number = int(claims[-1].suffix.split("-")[1]) + 1 if claims else 0
    mine = path.with_suffix(f".claim-{number:06d}")
    try:
        if claims and time.time() - claims[-1].stat().st_mtime < stale:
            raise FileExistsError
        with open(mine, "x") as file:
            file.write(f"{socket.gethostname()} {os.getpid()}\n")
    except (FileExistsError, FileNotFoundError):  # another works on it, or has just finished
        yield False
        return
    done = threading.Event()

    def renew():
        while not done.wait(stale / 10):
            with contextlib.suppress(FileNotFoundError):
                os.utime(mine)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        for claim in (*claims, mine):
            claim.unlink(missing_ok=True)


def differing(cell, recipe):
    """Fields in which the recipe of a finished cell is not this one, of those that both know."""
    now, then = json.loads(json.dumps(vars(recipe))), cell["recipe"]
    return [name for name in then if name in now and name not in NOT_SAME
            and then[name] != now[name]]


def facts_of(task):
    """What all cells of a task share; the teacher is known by the hash of its weights."""
    whole, env = hashlib.sha256(), asnn.environment()
    for parameter in task.teacher.parameters():
        whole.update(parameter.detach().cpu().numpy().tobytes())
    test = asnn.evaluate(task.teacher, task.tokens["test"], task.recipe.seq_len,
                         windows=task.recipe.final_windows, description="teacher")
    return {"corpus": {"name": task.corpus.name, "hash": task.corpus.hash},
            "teacher": {"name": task.teacher_name, "hash": whole.hexdigest()[:16],
                        "ppl": test.ppl}, "commit": env["commit"], "hardware": env["hardware"],
            "versions": {"python": env["python"], **env["versions"]}}


def train_cell(task, row, recipe, facts, work, hours):
    """The finished cell, or None where the hours did not suffice."""
    trainer = asnn.DistillationTrainer if row.kill_switch else WithoutKillSwitch
    student, result = asnn.distil(task, recipe.replace(max_hours=hours), work, trainer=trainer,
                                  description=f"{row.name}, seed {recipe.seed}")
    if not result.finished:
        return None
    test = asnn.evaluate(student, task.tokens["test"], recipe.seq_len, description="test",
                         windows=recipe.final_windows)
    checks = [entry for entry in result.log if "val_ppl" in entry]
    rates = checks[-1]["val_density"].values()
    command = (f"papermill notebooks/asnn_v18_ablations.ipynb - -p profile {recipe.profile} "
               f"-p rows {row.name} -p steps {recipe.distill_steps} -p seed {recipe.seed} "
               "-p seeds 1")
    return {"row": row.name, "family": row.family, "control": row.control, "seed": recipe.seed,
            "profile": recipe.profile, "steps": recipe.distill_steps, "command": command, **facts,
            "recipe": vars(recipe), "kill_switch": row.kill_switch, "precision": result.precision,
            "stopped": result.stopped, "step": result.step, "skipped": result.skipped,
            "seconds": result.seconds, "tokens_per_second": result.tokens_per_second,
            "parameters": student.num_parameters(), "student": student.content_hash(),
            "curve": [[entry["step"], entry["val_ppl"]] for entry in checks],
            "firing_rate": sum(rates) / len(rates) if rates else None, "ppl": test.ppl,
            "nll_se": test.nll_se, "gap": test.ppl / facts["teacher"]["ppl"], "status": "measured"}


def finished(folder):
    """All finished cells of a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def run_rows(task, rows, seeds, steps, folder, hours=None):
    """Trains the cells (row, seed) that no file in `folder` and nobody else has, for so many hours;
    a seed of all rows before the next. Returns the finished cells of the folder. Raises ValueError,
    before anything is trained, for a finished cell whose recipe was another."""
    folder.mkdir(parents=True, exist_ok=True)
    ends, facts = time.time() + 3600 * (hours or 1e6), None
    todo = [(folder / f"{row.name}_{steps}_{seed}.json", row,
             recipe_of(row, task.recipe.profile, steps, seed)) for seed in seeds for row in rows]
    for path, _, recipe in todo:
        found = differing(json.loads(path.read_text()), recipe) if path.exists() else []
        if found:
            raise ValueError(f"{path.name} is of a recipe with another {', '.join(found)}; move it "
                             "away to run the row again.")
    todo = [cell for cell in todo if not cell[0].exists()]
    for path, row, recipe in tqdm(todo, "cells", unit="cell"):
        left = (ends - time.time()) / 3600
        with claimed(path) as ours:
            if left <= 0 or not ours or path.exists():
                continue
            facts, work, cell = facts or facts_of(task), path.with_suffix(".work"), None
            try:
                cell = train_cell(task, row, recipe, facts, work, left)
            except RuntimeError as error:  # the other rows go on
                print(f"{row.name}, seed {recipe.seed} failed: {error}")
            if cell:
                new = path.with_suffix(f".{os.getpid()}.new")
                new.write_text(json.dumps(cell, sort_keys=True))
                new.replace(path)
                shutil.rmtree(work, ignore_errors=True)
    return finished(folder)


# %% [markdown]
# ## What is run here
# A few rows in the small profiles, all of them at the reference task and on a T4. Controls come
# along. Finished rows of `outputs/reference/ablations.jsonl` are read, not run again.

# %%
FEW = "published,p-logits,control,transfer"
DEFAULTS = {"tiny": (FEW, 2, 6, None), "cpu": (FEW, 3, 30, 0.1), "ref": ("all", 3, 300, 8.0),
            "t4": ("all", 3, 5000, 11.0)}


def chosen(table, names):
    """The rows called so, "all" or a list with commas, their controls before them."""
    wanted = list(table) if names == "all" else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in table]
    if unknown:
        raise ValueError(f"rows is {', '.join(unknown)}; allowed: all, {', '.join(table)}.")
    controls = [table[name].control for name in wanted if table[name].control]
    return [table[name] for name in dict.fromkeys(controls + wanted)]


def published(place):
    """Cells of a JSON Lines file, newest last; none where there is no file."""
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def export(cells, place):
    """Puts cells into a JSON Lines file, in the place of those of the same key; their number."""
    merged = {key(cell): cell for cell in (*published(place), *cells)}
    place.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(merged[k], sort_keys=True) + "\n" for k in sorted(merged)]
    place.with_suffix(".new").write_text("".join(lines))
    place.with_suffix(".new").replace(place)
    return len(merged)


def key(cell):
    return cell["profile"], cell["steps"], cell["row"], cell["seed"]


asnn.figure_style()  # colours that people with any colour vision tell apart
begin, profile = time.perf_counter(), asnn.get_recipe("v14.4", profile).profile
few, *usual = DEFAULTS[profile]
shipped = Path(asnn.__file__).parent / "outputs" / "reference" / "ablations.jsonl"
if again and steps is None:  # as many as the published cells of this row have
    steps = next((cell["steps"] for cell in published(shipped)[::-1]
                  if (cell["row"], cell["profile"]) == (again, profile)), None)
seeds, steps, hours = (b if a is None else a for a, b in zip((seeds, steps, hours), usual))
table, seeds = matrix(profile), range(seed, seed + (1 if again else seeds))
selected = [table[again]] if again in table else chosen(table, again or rows or few)
publish = profile != "tiny" and not again  # whether finished cells go to outputs/reference
task = asnn.load_task(recipe_of(selected[0], profile, steps, seed))
run = asnn.Run.open("v18", f"{profile}-{steps}", {"corpus": task.corpus.hash, "steps": steps,
                                                  "teacher": task.teacher_name})
reference = [run.folder.parent.parent / "reference" / "ablations.jsonl", shipped]
known = list({key(cell): cell for place in reference[::-1] for cell in published(place)}.values())
cells_folder = run.folder / ("again" if again else "cells")
for name in [f"{again}_{steps}_{number}.json" for number in seeds if again]:
    (cells_folder / name).unlink(missing_ok=True)
print(f"{len(selected)} rows, {len(seeds)} seeds, {steps} steps on {task.corpus.name}, teacher "
      f"{task.teacher_name}; {len(known)} finished cells in outputs/reference")
own = [cell for cell in run_rows(task, selected, seeds, steps, cells_folder, hours)
       if not again or (cell["row"], cell["seed"]) == (again, seed)]

# %% [markdown]
# ## What a difference is
# Of two runs with one seed the difference of log PPL is taken. Over seeds: mean, 95 % interval and
# p by the paired t-test; Holm's correction over the rows of a family. Below p = 0.01 and from three
# seeds on a row makes a claim. Cells of another profile or number of steps are never mixed in.

# %%
ALPHA = 0.01  # after correction


def alike(cell):
    """What must be equal for two cells to be compared."""
    return (cell["profile"], cell["steps"], cell["corpus"]["hash"], cell["teacher"]["hash"],
            cell["precision"])


def paired(row, control):
    """log PPL of the cells of a row less that of the control with the same seed, (seeds,). Raises
    ValueError for a seed that the control lacks and for a pair that is not alike."""
    others = {cell["seed"]: cell for cell in control}
    for cell in row:
        if cell["seed"] not in others:
            raise ValueError(f"{cell['row']}: seed {cell['seed']} has no control of that seed.")
        if alike(cell) != alike(others[cell["seed"]]):
            raise ValueError(f"{cell['row']}, seed {cell['seed']}: {alike(cell)} is compared with "
                             f"{alike(others[cell['seed']])}.")
    return np.array([math.log(cell["ppl"] / others[cell["seed"]]["ppl"]) for cell in row])


def effect(differences):
    """{"effect", "low", "high", "p", "seeds"}: mean difference, 95 % interval, paired t-test."""
    found = {"effect": float(np.mean(differences)), "seeds": len(differences)}
    if len(differences) > 1:
        test = stats.ttest_1samp(differences, 0.0)
        low, high = test.confidence_interval(0.95)
        found |= {"low": float(low), "high": float(high), "p": float(test.pvalue)}
    return found


def holm(p):
    """p-values of one family after Holm's correction, in their order."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate((len(p) - np.arange(len(p))) * np.asarray(p)[order])
    return np.minimum(adjusted, 1.0)[np.argsort(order)]


def verdict(found):
    """What a row may say."""
    if found["seeds"] < 3:
        return "not run" if not found["seeds"] else "fewer than 3 seeds"
    if not found["p_holm"] < ALPHA:  # a p that is not a number shows nothing either
        return "no difference shown"
    return f"PPL {100 * math.expm1(found['effect']):+.1f} %"


def effects(cells, table):
    """A row for each row of the matrix that has a control. `waits`: seeds without their control."""
    by_row, made = {}, []
    for cell in cells:
        by_row.setdefault(cell["row"], []).append(cell)
    for row in (row for row in table.values() if row.control):
        control = by_row.get(row.control, [])
        paired_seeds = {cell["seed"] for cell in control}
        mine = by_row.get(row.name, [])
        ready = [cell for cell in mine if cell["seed"] in paired_seeds]
        made.append({"row": row.name, "family": row.family, "says": row.says, "seeds": 0,
                     "waits": len(mine) - len(ready),
                     **(effect(paired(ready, control)) if ready else {})})
    for family in {found["family"] for found in made}:
        tested = [found for found in made if found["family"] == family and "p" in found]
        for found, p in zip(tested, holm([found["p"] for found in tested])):
            found["p_holm"] = float(p)
    return [{**found, "verdict": verdict(found)} for found in made]


def noise(cells):
    """Standard deviation of log PPL over at least five seeds of one control, else None."""
    rows = {}
    for cell in (cell for cell in cells if cell["control"] is None):
        rows.setdefault(cell["row"], []).append(math.log(cell["ppl"]))
    name = max(rows, key=lambda name: len(rows[name]), default=None)
    if name is None or len(rows[name]) < 5:
        return None
    return {"row": name, "seeds": len(rows[name]), "sd": float(np.std(rows[name], ddof=1))}


groups = {}  # (profile, steps) -> {(row, seed): cell}; what was run here wins
for cell in [*known, *([] if again else own)]:
    if cell["row"] in table and not differing(cell, recipe_of(
            matrix(cell["profile"])[cell["row"]], cell["profile"], cell["steps"], cell["seed"])):
        groups.setdefault(key(cell)[:2], {})[key(cell)[2:]] = cell
results = {}
for (where, count), found in sorted(groups.items()):
    cells = list(found.values())
    one = results[f"{where}-{count}"] = {"noise": noise(cells),
                                         "rows": effects(cells, matrix(where))}
    print(f"{where}, {count} steps: {len(cells)} cells, measured; noise floor (standard deviation "
          f"of log PPL over the seeds of one control): {one['noise'] or 'fewer than 5 seeds'}")
    asnn.show_table([{
        "family": row["family"], "row": f"{row['row']}: {row['says']}", "seeds": row["seeds"],
        "log PPL [95 %]": "{effect:+.4f} [{low:+.4f}, {high:+.4f}]".format(**row)
        if "p" in row else "", "p, Holm": f"{row['p_holm']:.2g}" if "p" in row else "",
        "verdict": row["verdict"]} for row in one["rows"]])
run.save("effects.json", results)

# %% [markdown]
# ## Figures
# Of the reference task where its rows are there, else of what was run here. Bars are 95 %
# intervals, the grey band is what the seed alone does; bands of curves reach over all seeds.

# %%
def forest(found):
    """Effects with intervals, by family; blue where a difference is shown."""
    rows = [row for row in found["rows"] if "p" in row][::-1]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.24 * len(rows)), layout="constrained")
    if found["noise"]:
        axes.axvspan(*(found["noise"]["sd"] * np.array([-2, 2])), color="#dddddd")
    for y, row in enumerate(rows):
        colour = asnn.COLOURS["blue" if row["verdict"].startswith("PPL") else "grey"]
        axes.plot([row["low"], row["high"]], [y, y], color=colour)
        axes.plot(row["effect"], y, "o", color=colour)
    axes.set_yticks(range(len(rows)), [f"{row['family']}: {row['says']}" for row in rows])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="log PPL, row less its control (left: better)", title="Effects")
    return figure


def curves(cells, families=("distillation, v14.3", "ours")):
    """Validation perplexity by step of each row of two families, and of their controls."""
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.6), layout="constrained")
    for axes, family in zip(panels, families):
        controls = {cell["control"] for cell in cells if cell["family"] == family}
        for name in dict.fromkeys(cell["row"] for cell in cells
                                  if cell["family"] == family or cell["row"] in controls):
            some = [np.array(cell["curve"]).T for cell in cells if cell["row"] == name]
            length = min(curve.shape[1] for curve in some)  # one may have stopped early
            steps, ppl = some[0][0, :length], np.array([curve[1, :length] for curve in some])
            line, = axes.plot(steps, ppl.mean(0), label=name)
            axes.fill_between(steps, ppl.min(0), ppl.max(0), alpha=0.2, color=line.get_color())
        axes.set(title=family, xlabel="step", ylabel="validation PPL", yscale="log")
        if axes.lines:
            axes.legend(ncol=2)
    return figure


def capacity(cells):
    """Gap by parameters, of both recipes; bars reach over all seeds."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    frame = pd.DataFrame([(cell["family"], cell["parameters"] / 1e6, cell["gap"]) for cell in cells
                          if "capacity" in cell["family"]], columns=["family", "parameters", "gap"])
    for family, part in frame.groupby("family"):
        gap = part.groupby("parameters")["gap"].agg(["mean", "min", "max"])
        axes.errorbar(gap.index, gap["mean"], (gap["mean"] - gap["min"], gap["max"] - gap["mean"]),
                      fmt="o-", label=family)
        axes.legend()
    axes.set(xlabel="parameters, million", ylabel="PPL / teacher's PPL",
             title="capacity and gap")
    return figure


best = max(groups, key=lambda group: (group[0] == "ref", len(groups[group]), group[1]),
           default=(profile, steps))
cells, kept = list(groups.get(best, {}).values()), reference[0].parent / "v18"
shown = results.get(f"{best[0]}-{best[1]}", {"noise": None, "rows": []})
drawn = {"forest": forest(shown), "curves": curves(cells)}
if any(cell["family"].startswith("capacity") for cell in cells):
    drawn["capacity"] = capacity(cells)
if publish:  # where v19 finds them
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "effects.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
for name, figure in drawn.items():
    for end in ("pdf", "png") if publish else ():
        figure.savefig(kept / f"{name}.{end}", metadata={} if end == "png" else {
            "CreationDate": None})
    run.show(figure, name)

# %% [markdown]
# ## What a step costs
# Training steps of recipes in turns, forward, backward and optimiser. A ratio is that to v14.4 in
# the same round; on the reference task v14.5's goes to `headline.json`.

# %%
def step_costs(task, names, rounds, steps=4):
    """{recipe: seconds of a step in each round}, over the first steps after the alignment."""
    seconds = {name: [] for name in names}
    for name in list(names) * rounds:
        recipe = asnn.get_recipe(name, task.recipe.profile, corpus=task.recipe.corpus,
                                 align_steps=0, eval_every=10**6, distill_steps=60)
        _, result = asnn.distil(task, recipe, description=name, max_steps=steps)
        seconds[name].append(result.seconds / result.step)
    return seconds


if not again:
    costs = step_costs(task, ("v14.4", "v14.4-rates", "v14.5"), 1 if profile == "tiny" else 5)
    ratios = {name: np.quantile(np.divide(found, costs["v14.4"]), (0.5, 0.25, 0.75))
              for name, found in costs.items()}
    asnn.show_table([{
        "recipe": name, "ms a step, median": f"{1e3 * np.median(costs[name]):.0f}",
        "times v14.4's, quartiles (measured)": "{:.2f} ({:.2f} to {:.2f})".format(*found),
        "rounds": len(costs[name])} for name, found in ratios.items()])
    if profile == "ref":
        run.headline("papermill notebooks/asnn_v18_ablations.ipynb - -p profile ref", {
            "train_step_over_v14_4": {**dict(zip(("value", "low", "high"), map(
                float, ratios["v14.5"]))), "seeds": 1}})

# %% [markdown]
# ## The plan for a T4
# Hours of each row with one seed at the published size: an estimate, by operations per token, from
# 7,800 tokens/s for 77M parameters (a T4's roofline).

# %%
def t4_hours(row, teacher=124_439_808, known=77_200_000, speed=7_800):
    """(parameters, hours) of a row: three passes of the student, one of the teacher."""
    recipe = recipe_of(row, "t4", 5000, 42)
    with torch.device("meta"):
        size = asnn.GooseForCausalLM(recipe.student_config(50257)).num_parameters()
    share = (3 * size + teacher) / (3 * known + teacher)
    return size, recipe.distill_steps * recipe.batch_size * recipe.seq_len / speed * share / 3600


plan = [{"family": row.family, "row": row.name, "parameters": f"{size / 1e6:.0f}M",
         "hours": f"{time_needed:.2f}"} for row in matrix("t4").values()
        for size, time_needed in [t4_hours(row)]]
asnn.show_table(plan)
whole = sum(float(line["hours"]) for line in plan)
print(f"{len(plan)} rows, {3 * whole:.0f} hours with three seeds (estimated)")

# %% [markdown]
# ## Contract
# Facts that hold in every profile; continuous integration compares their output.

# %% tags=["nbval-check-output"]
print("rows:", len(table), "controls:", sorted(r.name for r in table.values() if not r.control))
print("every row names a row of the matrix as control:",
      {r.control for r in table.values()} - {None} <= set(table))
print("Holm, by hand:", [round(float(p), 3) for p in holm([0.01, 0.04, 0.03, 0.005])])
print("no spread, no claim:", verdict({"seeds": 3, "effect": 0.0, "p_holm": float("nan")}))
print("one claim at a time:", end=" ")
with claimed(run.folder / "probe.json") as ours, claimed(run.folder / "probe.json") as theirs:
    print(ours, theirs)

# %% [markdown]
# ## Saved artefacts and summary
# Finished cells of all profiles but tiny go to `outputs/reference`; the corrected p of four rows of
# the reference task, from three seeds on, to its `headline.json` (`low` is p without correction).

# %%
if again:
    then = [cell for cell in known if key(cell) in {key(one) for one in own}
            and alike(cell) == alike(own[0])]
    spread = [math.log(cell["ppl"]) for cell in known if key(cell)[:3] == key(own[0])[:3]]
    for one, old in zip(own, then):
        print(f"Reproduced: {again}, seed {one['seed']}, PPL {one['ppl']:.4f}, published "
              f"{old['ppl']:.4f}, difference {100 * math.log(one['ppl'] / old['ppl']):+.3f} %; "
              f"seeds differ by {100 * np.std(spread, ddof=1):.3f} % (standard deviation, "
              f"{len(spread)} seeds)")
    if not then:
        print(f"Run again, PPL {own[0]['ppl']:.4f}: no value was published for this corpus, teacher"
              " and number of steps")
elif publish:
    export(own, reference[0])
    p = {f"ablation_p_{one['row']}": {"value": one["p_holm"], "low": one["p"],
                                      "high": one["p_holm"], "seeds": one["seeds"]}
         for one in shown["rows"]
         if one["row"] in ("transfer", "alignment", "delta", "muon") and one["seeds"] >= 3}
    if best[0] == "ref" and p:
        run.headline("papermill notebooks/asnn_v18_ablations.ipynb - -p profile ref", p)
left = sum(not (cells_folder / f"{row.name}_{steps}_{number}.json").exists()
           for row in selected for number in seeds)
print(f"{'Finished' if not left else 'Not finished'}: v18, {len(own)} cells of {profile}, {left} "
      f"left, {time.perf_counter() - begin:.0f} s")
