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
# # ASNN-Goose v14.3: distil a transformer into a recurrent model that thinks in ternary spikes
#
# <a href="https://kaggle.com/kernels/welcome?src=https://github.com/OWNER/REPO/blob/main/
# notebooks/asnn_v14_3_distill.ipynb"><img alt="Open in Kaggle"
# src="https://kaggle.com/static/images/open-in-kaggle.svg"></a>
# <a href="https://colab.research.google.com/github/OWNER/REPO/blob/main/
# notebooks/asnn_v14_3_distill.ipynb"><img alt="Open in Colab"
# src="https://colab.research.google.com/assets/colab-badge.svg"></a>
#
# **Needs** `asnn_common.py` and, on a GPU, WikiText-2 and GPT-2 (from the hub or attached).
# A T4 takes about 60 minutes and 6 GB (an estimate), two CPU cores six minutes and 1 GB.
# *Run All* needs no editing. The last line you should see begins with `Finished: v14.3`.
#
# ASNN stands for *Adapted* Spiking Neural Network: spikes for the GPUs and CPUs people have. The
# weights stay full precision; the activations that carry memory become ternary, {-1, 0, +1}. Such a
# product is an addition, a subtraction or nothing. The student is a recurrent network of the RWKV
# family: a channel of its state decays, and is written to where key and value fire together. It
# learns the teacher's next-token distribution (KL), at a temperature that learns to make the lesson
# harder (CTKD), and how features change between layers (FDD).

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
# The only cell to edit. `None` means: as the recipe and the profile say.

# %% tags=["parameters"]
recipe = "v14.3"  # or another of the history: v4, v6 ... v14.2, v14.3-published, v14.3-cumsum
profile = None  # tiny (seconds), cpu (minutes), ref, t4 (full size); None: by hardware
corpus = None  # pydocs, wikitext-2, wikitext-103, or a folder with {train,validation,test}.txt
teacher_name = None  # gpt2, another hub id, a folder, or train (a small GPT-2 trained here)
steps = None  # optimiser steps of the distillation
max_hours = None  # stop and save after so many hours; run all again to go on
tracker = None  # "tensorboard" or "trackio" (pip install it)
seed = 42
run_name = None  # None: <profile>-seed<seed>; a finished run is never overwritten

# %% [markdown]
# ## Environment
# What this session runs on and why, then what differs from the recipe that was published for v14.3:
# the profile's doing, or a repair.

# %%
import copy
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

asnn.figure_style()  # colours that people with any colour vision tell apart
begin, env = time.perf_counter(), asnn.environment()
recipe = asnn.get_recipe(recipe, profile, corpus=corpus, teacher=teacher_name,
                         distill_steps=steps, max_hours=max_hours, tracker=tracker, seed=seed)
versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
asnn.show_table([{"what": what, "value": value, "why": why} for what, value, why in (
    ("profile", recipe.profile, "asked for" if profile else "by ASNN_PROFILE or hardware"),
    ("device", env["device"], env["device_reason"]), ("hardware", env["hardware"], env["platform"]),
    ("precision", env["precision"], env["precision_reason"]),
    ("free disk", f"{env['disk_free_gb']:.0f} GB", "where outputs go"),
    ("versions", f"Python {env['python']}", versions))])
press = {"kaggle": "Settings > Accelerator > GPU T4 x2", "colab": "Runtime > Change runtime type"}
if env["device"] == "cpu" and env["platform"] in press:
    print(f"No GPU in this session: choose {press[env['platform']]} and run all again.")

# %%
published = vars(asnn.get_recipe("v14.3-published", "t4"))
told = {"name", "changed", "outcome", "published_ppl", "inferred", "repaired", "profile"}
asnn.show_table([
    {"field": name, "this run": str(value), "published v14.3": str(published[name])}
    for name, value in vars(recipe).items() if name not in told and value != published[name]])

# %% [markdown]
# ## Data and teacher
# A corpus is known by the hash of its content. A teacher trained here is kept for the next time.

# %%
task = asnn.load_task(recipe)
recipe = task.recipe
print("\n".join(task.notes or [f"teacher {task.teacher_name} fits the recipe as it is"]))
asnn.show_table([{"split": split, "bytes": f"{size['bytes']:,}", "words": f"{size['words']:,}",
                  "tokens": f"{len(task.tokens[split]):,}"} for split, size in task.sizes.items()])
print(f"corpus {task.corpus.name}, content hash {task.corpus.hash}; teacher {task.teacher_name}: "
      f"{task.teacher.num_parameters():,} parameters, vocabulary {len(task.tokenizer):,}")
settings = {"recipe": vars(recipe.replace(max_hours=None, tracker=None)),
            "corpus_hash": task.corpus.hash, "teacher": task.teacher_name}
run = asnn.Run.open(recipe.name, run_name or f"{recipe.profile}-seed{seed}", settings)
print(run.note)

# %% [markdown]
# ## The architecture
# One layer of the student; spikes act where the picture is orange.

# %%
def draw_architecture(recipe, vocab_size):
    """A picture of one layer of the student."""
    figure, axes = plt.subplots(figsize=(10, 5.2))
    axes.set(xlim=(-0.05, 10), ylim=(0.3, 5.1), title=f"One of {recipe.n_layer} layers")
    axes.axis("off")

    def box(x, y, w, h, label, colour="#d9e6f2"):
        axes.add_patch(plt.Rectangle((x, y), w, h, facecolor=colour, edgecolor="#444444"))
        axes.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=9)

    def arrow(x0, y0, x1, y1):
        axes.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": "#444444"})

    box(0.0, 2.3, 1.1, 1.0, f"embedding\nV={vocab_size:,}\nD={recipe.d_model}")
    for x, w, label in ((1.35, 1.05, "LayerNorm"), (2.65, 1.25, "token shift\nx, previous x")):
        box(x, 2.3, w, 1.0, label)
    for x, w, label in ((5.4, 1.1, "sigmoid"), (7.2, 0.9, "r * S"), (8.4, 0.6, "W_o")):
        box(x, 1.7, w, 0.7, label)
    box(6.9, 3.3, 1.5, 0.9, "state\n$S_t = w S_{t-1} + k v$", "#bfe3d7")
    box(4.3, 0.4, 3.3, 0.7, f"LayerNorm, W_1, {recipe.activation}, W_2  (F={4 * recipe.d_model})")
    box(1.0, 0.4, 2.2, 0.7, f"+ x, next layer (L={recipe.n_layer}),\nthen the tied head")
    for y, name in ((4.2, "k"), (2.95, "v"), (1.7, "r")):
        box(4.3, y, 0.8, 0.7, f"W_{name}")
        arrow(3.9, 2.8, 4.3, y + 0.35)
        arrow(5.1, y + 0.35, 5.4, y + 0.35)
        if name != "r":
            box(5.4, y, 1.1, 0.7, f"spike {name}\n{{-1, 0, +1}}", asnn.COLOURS["orange"])
            arrow(6.5, y + 0.35, 6.9, 3.75)
    for x0, x1, y in ((1.1, 1.35, 2.8), (2.4, 2.65, 2.8), (6.5, 7.2, 2.05), (8.1, 8.4, 2.05),
                      (9.4, 7.6, 0.75), (4.3, 3.2, 0.75)):
        arrow(x0, y, x1, y)
    arrow(7.65, 3.3, 7.65, 2.4)
    axes.plot([9.0, 9.4, 9.4], [2.05, 2.05, 0.75], color="#444444", linewidth=1)
    axes.text(9.45, 1.4, "+ x")
    return figure


run.show(draw_architecture(recipe, len(task.tokenizer)), "architecture")

# %% [markdown]
# ## The recurrence, checked
# The first published notebook computed the recurrence as `cumsum(kv / (w^t + 1e-8)) * w^t`. That
# formula forgets after about twenty tokens; the chunked scan used here does not.

# %%
def recurrence_errors(length=256, width=64):
    """{label: relative error by position (length,)} of two forms of the vector recurrence in fp32
    against the loop in fp64, for two decays."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(4, length, width, generator=generator).sign() for _ in range(2))
    r, errors = torch.ones_like(k), {}
    for form, decay in ((form, decay) for form in ("cumsum", "chunked") for decay in (0.378, 0.9)):
        w = torch.full((width,), decay)
        exact, _ = asnn.RECURRENCES["reference"](r.double(), k.double(), v.double(), w.double())
        error = asnn.RECURRENCES[form](r, k, v, w)[0] - exact
        errors[f"{form}, w = {decay}"] = (error.norm(dim=(0, 2)) / exact.norm(dim=(0, 2))).numpy()
    return errors


errors = recurrence_errors()
figure, axes = plt.subplots(figsize=(9, 3.6))
for label, error in errors.items():
    axes.plot(np.arange(1, len(error) + 1), np.maximum(error, 1e-9), label=label,
              linestyle="-" if "cumsum" in label else "--",
              color=asnn.COLOURS["vermillion" if "0.378" in label else "blue"])
axes.set(xlabel="position (tokens)", ylabel="relative error (fp32)", yscale="log",
         title="Error of the recurrence against the exact loop in fp64")
axes.legend(loc="center right")
run.show(figure, "recurrence")

# %% [markdown]
# ## Training
# The teacher is frozen and, where there are two GPUs, lives on the second.

# %%
hours = recipe.max_hours and max(1e-3, recipe.max_hours - (time.perf_counter() - begin) / 3600)
student, result = asnn.distil(task, recipe.replace(max_hours=hours), run.folder)
print(f"{result.stopped} at step {result.step} of {recipe.distill_steps}; {result.seconds:.0f} s "
      f"of steps, {result.tokens_per_second:,.0f} tokens/s (measured), "
      f"precision {result.precision}, peak {result.peak_memory_gb:.2f} GiB")
if not result.finished:
    print("Run all cells again to go on; on Kaggle attach the output of this session first.")

# %% [markdown]
# What happened, from the log. Dashed: what was published for v14.3, GPT-2 on WikiText-2; its
# perplexity is drawn only for that corpus and teacher.

# %%
def plot_curves(log, recipe, published_ppl=0.0):
    """Losses, temperature, FDD, learning rate, validation perplexity and firing rates by step."""
    frame = pd.DataFrame([row for row in log if "loss" in row]).reindex(
        columns=["step", "kd", "ce", "tau", "lambda", "fdd", "lr"])  # without FDD: an empty panel
    checks = pd.DataFrame([row for row in log if "val_ppl" in row])
    dashed = {"color": "#444444", "linestyle": "--", "linewidth": 1}
    figure, _ = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    losses, ppl, tau, fdd, rates, lr = figure.axes
    frame.plot("step", ["kd", "ce"], ax=losses, label=["KL, times tau²", "cross-entropy"],
               title="loss on training batches", ylabel="nats per token", ylim=(0, None))
    frame.plot("step", ["tau", "lambda"], ax=tau, ylabel="value (no unit)", ylim=(0, None),
               title="temperature and gradient reversal")
    tau.axhline(1.61, label="published, tau at the end: 1.61", **dashed)
    frame.plot("step", "fdd", ax=fdd, legend=False, ylabel="1 - CKA",
               title=f"feature dynamics loss ({recipe.fdd})")
    frame.plot("step", "lr", ax=lr, legend=False, title="learning rate", ylabel="per step")
    lr.ticklabel_format(axis="y", scilimits=(0, 0))
    ppl.set(title=f"validation perplexity, first {recipe.eval_windows} windows", ylabel="PPL")
    if len(checks):
        ppl.plot(checks["step"], checks["val_ppl"], "o-")
        ppl.set_yscale("log" if checks["val_ppl"][0] > 3 * checks["val_ppl"].min() else "linear")
        shares = pd.DataFrame(list(checks["val_density"]))
        for name in shares:  # a colour for a layer, a line style for a site
            rates.plot(checks["step"], shares[name], "o-" if name.endswith("k") else "s:",
                       color=f"C{name.split('.')[0]}", label=name)
    if published_ppl:
        ppl.axhline(published_ppl, **dashed)
    rates.axhline(0.382, label="published: 0.382", **dashed)
    rates.set(title="firing rate by layer and site", ylim=(0, 1), ylabel="share of non-zero spikes")
    rates.legend(ncol=2)
    tau.legend()
    for axes in figure.axes:
        axes.set(xlabel="step", xlim=(0, 1.03 * frame["step"].max()))
    return figure


as_published = (task.corpus.name, task.teacher_name) == ("wikitext-2", "gpt2")
run.show(plot_curves(result.log, recipe, 306.89 * as_published), "training")

# %% [markdown]
# ## Quality
# Perplexity over consecutive windows, every token once, in fp32. The gap is student PPL / teacher
# PPL; its standard error comes from the paired windows. An unfinished run gets fewer windows.

# %%
measured = task.measure(student, recipe.final_windows if result.finished else recipe.eval_windows)
asnn.show_table(task.quality_table(measured))
metrics, test = run.metrics(task, student, result, measured), measured["student"]["test"]
# The same prompts and sampling for both: perplexity says how well, samples say what.
samples = task.samples({"teacher": task.teacher, "student": student}, seed)
asnn.show_table(samples, prose=True)

# %% [markdown]
# ## The twelve run checks
# The founders' checks, on this run. The target is the project's research target, a gap of 4.5; a
# check that does not apply says so.

# %%
def run_checks(recipe, result, ppl, target_ppl, previous_ppl, density, amplitudes):
    """The founders' 12 checks, rows {"name", "value", "passed"}; None: does not apply. All PPL are
    of one corpus and teacher; density and amplitudes are {"layer.site": value}."""
    loss, fdd, tau = ([row[name] for row in result.log if name in row]
                      for name in ("loss", "fdd", "tau"))
    third = max(1, len(fdd) // 3)
    before, after = (sum(part) / third for part in (fdd[:third], fdd[-third:]))
    low, high, steps = min(density.values()), max(density.values()), recipe.distill_steps
    small, large = min(amplitudes.values()), max(amplitudes.values())
    fdd_on, learned = recipe.fdd != "none", recipe.temperature == "bounded"
    known = previous_ppl is not None
    rows = [
        ("PPL under target", f"{ppl:.2f} < {target_ppl:.2f}", ppl < target_ppl),
        ("improved on the previous version",
         f"{ppl:.2f} < {previous_ppl:.2f}" if known else "no earlier run with this teacher",
         ppl < previous_ppl if known else None),
        ("density in [0.1, 0.9]", f"{low:.3f} to {high:.3f}", 0.1 <= low and high <= 0.9),
        ("amplitudes in [0.3, 3.0]", f"{small:.3f} to {large:.3f}", 0.3 <= small and large <= 3.0),
        ("training completed or stopped early", result.stopped, result.finished),
        ("no NaN or Inf loss", f"{result.skipped} steps skipped",
         result.skipped == 0 and all(map(math.isfinite, loss))),
        ("memory under 8 GB", f"peak {result.peak_memory_gb:.2f} GiB",
         result.peak_memory_gb * 2**30 < 8e9),
        ("FDD active", f"{len(fdd)} logged values", bool(fdd) if fdd_on else None),
        ("tau evolved", " -> ".join(f"{value:.3f}" for value in (*tau[:1], *tau[-1:])),
         abs(tau[-1] - tau[0]) > 1e-3 if learned and tau else None),
        ("early stopping worked", f"best {result.best_ppl:.2f} at step {result.best_step}",
         result.best_step > 0 and result.step - result.best_step <= recipe.patience),
        ("FDD loss decreased", f"{before:.3f} -> {after:.3f}", after < before if fdd_on else None),
        ("step budget met", f"{result.step} of {steps}", result.step <= steps)]
    return [dict(zip(("name", "value", "passed"), row)) for row in rows]


versions = list(asnn.RECIPES)
earlier = [m["student"]["test"]["ppl"] for m in asnn.Run.finished()
           if m["version"] in versions[:versions.index(recipe.name)]
           and (m["corpus"]["hash"], m["teacher"]["name"], m["training"]["step"])
           == (task.corpus.hash, task.teacher_name, result.step)]
checks = run_checks(recipe, result, test.ppl, 4.5 * measured["teacher"]["test"].ppl,
                    earlier[-1] if earlier else None, metrics["student"]["density"],
                    metrics["student"]["amplitude"])
words = {True: "pass", False: "FAIL", None: "does not apply"}
asnn.show_table([{**row, "passed": words[row["passed"]]} for row in checks])

# %% [markdown]
# ## Beside the published history
# Published figures are GPT-2 (PPL 44.6) on WikiText-2 in windows of 256 tokens. Perplexities of
# different corpora do not compare, gaps only roughly.

# %%
gap = metrics["gap"]["test"]
history = [{"version": r.name.removesuffix("-published"), "PPL": r.published_ppl,
            "gap": r.published_ppl and r.published_ppl / 44.6, "outcome": r.outcome}
           for r in asnn.RECIPES.values() if r.name not in ("v14.3", "v14.3-cumsum")
           and not r.name.startswith("v14.4")]
history.append({"version": f"{recipe.name} (this run)", "PPL": test.ppl, "gap": gap["value"],
                "outcome": f"{result.step} steps on {task.corpus.name}, {result.stopped}"})
asnn.show_table([{**row, **{name: f"{row[name]:.2f}" if row[name] else "-"
                            for name in ("PPL", "gap")}} for row in history])
drawn = [row for row in history if row["gap"]]
figure, axes = plt.subplots(figsize=(10, 3.4))
bars = axes.bar([row["version"] for row in drawn], [row["gap"] for row in drawn],
                color=asnn.COLOURS["sky"], label="published, on WikiText-2")
bars[-1].set(color=asnn.COLOURS["orange"], label=f"measured in this run, on {task.corpus.name}")
axes.bar_label(bars, [f"{row['gap']:.1f}" for row in drawn], fontsize=8, padding=2)
axes.axhline(306.89 / 44.6, color="#444444", linestyle="--", label="published v14.3: 6.9")
axes.axhline(4.5, color="#444444", linestyle=":", label="research target: 4.5")
axes.set(yscale="log", ylim=(0.5, 100), ylabel="gap (student PPL / teacher PPL)",
         title="The versions so far")
plt.setp(axes.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
axes.legend(ncol=2, loc="upper right")
run.show(figure, "history")

# %% [markdown]
# ## Contract
# Facts that hold in every profile; continuous integration compares their output.

# %% tags=["nbval-check-output"]
with torch.device("meta"):
    full = asnn.GooseForCausalLM(asnn.get_recipe("v14.3", "t4").student_config(50257))
print("full-size student, parameters:", full.num_parameters())
print("published PPL of v14.3:", asnn.RECIPES["v14.3"].published_ppl)

# %% tags=["nbval-check-output"]
with torch.no_grad():
    probe = torch.randn(4, 64, recipe.d_model, device=student.device)
    alphabet = {int(value) for site in asnn.spike_modules(student).values()
                if isinstance(site, asnn.TernarySpike) for value in site.encode(probe).unique()}
print("spike alphabet:", sorted(alphabet))
print("chunked scan equals the loop:", all(errors[w].max() < 1e-5 for w in list(errors)[2:]))
print("cumsum formula lost by token 25:", bool(errors["cumsum, w = 0.378"][24] > 0.5))

# %% tags=["nbval-check-output"]
with torch.no_grad():
    model = copy.deepcopy(student).cpu().double()  # so that no threshold is crossed by rounding
    ids = torch.from_numpy(task.tokens["validation"][:64].astype(np.int64)).view(2, 32)
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % model.config.vocab_size
    before, after, first = model(ids).logits, model(changed).logits, model(ids[:, :13])
    cached = torch.cat((first.logits, model(ids[:, 13:], state=first.state).logits), 1)
print("a changed token changes nothing before it:", torch.equal(before[:, :20], after[:, :20]))
print("and something from it on:", not torch.equal(before[:, 20:], after[:, 20:]))
print("cached equals uncached:", torch.allclose(cached, before, atol=1e-3))
print("run checks:", len(checks))

# %% [markdown]
# ## Saved artefacts
# One metrics file feeds the tables, the model card and the index of runs. The student is a Hugging
# Face folder that loads without this project.

# %%
metrics.update(checks=checks, notebook_seconds=time.perf_counter() - begin)
if result.finished:
    run.save("samples.json", samples)
    run.finish(metrics, student.cpu(), task.tokenizer)

# %% tags=["nbval-check-output"]
for name in (".", "figures", "student"):
    files = sorted(p.name for p in (run.folder / name).glob("*") if p.suffix != ".svg")
    print(f"{name}:", files or "not yet: the run is not finished")

# %% [markdown]
# ## Summary

# %%
failed = ", ".join(row["name"] for row in checks if row["passed"] is False)
print(f"{task.corpus.name}, teacher {task.teacher_name}: test PPL {test.ppl:.2f} against "
      f"{measured['teacher']['test'].ppl:.2f}; checks failed: {failed or 'none'}; metrics and "
      f"figures in {os.path.relpath(run.folder)}")
print(f"{'Finished' if result.finished else 'Not finished'}: {recipe.name}, gap {gap['value']:.3f} "
      f"± {gap['standard_error']:.3f} (standard error, {test.windows} windows, measured), "
      f"{sum(row['passed'] is True for row in checks)} of {len(checks)} checks passed, "
      f"{time.perf_counter() - begin:.0f} s")
