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
steps = None  # optimiser steps of every run; None: 12 (tiny), 60 (cpu), 300 (ref), 5000 (t4)
hours = None  # what one sitting may take; None: no limit (tiny), 0.1 (cpu), 8 (ref), 11 (t4)
again = None  # a row to run once more, to be held against its published value
seed = 42

# %% [markdown]
# ## The matrix
# A row changes fields of a recipe and names its control. Families that are about the published
# recipe stand on `v14.3`, which is that recipe with its faults repaired; ours on `v14.4`.

# %%
import contextlib
import dataclasses
import hashlib
import json
import math
import re
import shutil
import socket
import threading
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
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
    with contextlib.suppress(FileNotFoundError):  # its owner has just finished
        if claims and time.time() - claims[-1].stat().st_mtime < stale:
            yield False
            return
    number = int(claims[-1].suffix.split("-")[1]) + 1 if claims else 0
    mine = path.with_suffix(f".claim-{number:06d}")
    try:
        with open(mine, "x") as file:
            file.write(f"{socket.gethostname()} {os.getpid()}\n")
    except FileExistsError:
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
    ends, facts, todo = time.time() + 3600 * (hours or 1e6), None, []
    for seed in seeds:
        for row in rows:
            recipe = recipe_of(row, task.recipe.profile, steps, seed)
            path = folder / f"{row.name}_{steps}_{seed}.json"
            todo.append((path, row, recipe))
            if path.exists():
                found = differing(json.loads(path.read_text()), recipe)
                if found:
                    raise ValueError(f"{path.name} is of a recipe with another {', '.join(found)}; "
                                     "move it away to run the row again.")
    todo = [cell for cell in todo if not cell[0].exists()]
    for path, row, recipe in tqdm(todo, "cells", unit="cell"):
        left = (ends - time.time()) / 3600
        with claimed(path) as ours:
            if left <= 0 or not ours or path.exists():
                continue
            facts = facts or facts_of(task)
            work = path.with_suffix(".work")
            cell = train_cell(task, row, recipe, facts, work, left)
            if cell:
                new = path.with_suffix(f".{os.getpid()}.new")
                new.write_text(json.dumps(cell, sort_keys=True))
                new.replace(path)
                shutil.rmtree(work, ignore_errors=True)
    return finished(folder)

