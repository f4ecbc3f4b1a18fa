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
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://www.kaggle.com/code/new)
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/#upload=true)
# ![Python 3.11-3.13](https://img.shields.io/badge/python-3.11--3.13-blue)
# ![torch 2.10+](https://img.shields.io/badge/torch-2.10%2B-orange)
#
# ASNN stands for *Adapted* Spiking Neural Network: spikes for the GPUs and CPUs that people have, not for neuromorphic chips.
# The weights stay full precision; the activations that carry memory become ternary, {-1, 0, +1}.
# A product of a weight with such a spike is an addition, a subtraction or nothing at all.
# The student is a recurrent network of the RWKV family: its context is a state of fixed size, however long the text.
# In each layer a key and a value are computed from the current and the previous token, and both are turned into spikes.
# A channel of the state decays by a learned factor and is written to only where key and value fire together.
# A receptance gate reads the state, and a feed-forward block follows, as in a transformer.
# The teacher is GPT-2; without a download it is a small GPT-2 trained here on the documentation of Python packages.
# The student learns the teacher's whole next-token distribution (KL), at a temperature that is itself learned to make the lesson harder (CTKD), and later also how features change from layer to layer (FDD).
# At the end stand curves, samples, the twelve run checks, and an honest comparison with the published history of this recipe.
#
# *Run All* needs no editing: a GPU gets the published size, a CPU a small one that takes minutes.

# %% [markdown]
# ## Set-up
# The next cell finds `asnn_common.py` next to this notebook, in the folder above, or in an attached Kaggle input. It installs a small package that is missing or too old where there is internet, and never torch.

# %% tags=["bootstrap"]
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

# Threads that wait give up soon: on a shared machine with few cores, spinning ones slow the working ones tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def find_common():
    here = Path(globals().get("__file__", "notebook.py")).resolve().parent
    near = [Path(os.environ["ASNN_HOME"])] if os.environ.get("ASNN_HOME") else []
    near += [here, here.parent, Path.cwd(), Path.cwd().parent]
    roots = [*os.environ.get("ASNN_INPUTS", "").split(os.pathsep), "/kaggle/input", "/kaggle/usr/lib", "/content"]
    for folder in near:
        if (folder / "asnn_common.py").is_file():
            return folder
    level = [Path(root) for root in roots if root and Path(root).is_dir()]
    for _ in range(7):
        for folder in sorted(level):
            if (folder / "asnn_common.py").is_file():
                return folder
        level = [child for folder in level for child in folder.iterdir() if child.is_dir()]
    raise FileNotFoundError("asnn_common.py was not found: attach it as a Kaggle dataset or utility script, upload it "
                            "beside this notebook, or set ASNN_HOME to its folder.")


sys.path.insert(0, str(find_common()))


def version(name):
    try:
        return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version(name))[:2])
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)


least = {"transformers": (5, 0), "accelerate": (1, 10), "datasets": (4, 0), "matplotlib": (3, 8), "pandas": (2, 2), "tqdm": (4, 66)}
missing = [f"{name}>={major}.{minor}" for name, (major, minor) in least.items() if version(name) < (major, minor)]
if missing and subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing]).returncode:
    raise ImportError(f"{', '.join(missing)} cannot be installed: turn the internet on or attach the wheels.")
if version("torch") < (2, 10):
    raise ImportError(f"torch is {'.'.join(map(str, version('torch')))}, and 2.10 or newer is needed (0.0: there is none): "
                      "choose the latest environment; Kaggle and Colab have it.")

# %% [markdown]
# ## Parameters
# The only cell to edit. `None` means: what the profile says.

# %% tags=["parameters"]
recipe = "v14.3"  # any version of the history: v4, v6 ... v14.2, v14.3, v14.3-published, v14.3-cumsum
profile = None  # tiny (seconds), cpu (minutes), ref, t4 (full size); None: ASNN_PROFILE, else by hardware
corpus = None  # pydocs, wikitext-2, wikitext-103, or a folder with train.txt, validation.txt, test.txt
teacher = None  # gpt2, another hub id, a folder, or train (a small GPT-2 trained here)
steps = None  # optimiser steps of the distillation
max_hours = None  # stop and save after so many hours; run again with the same name to go on
tracker = None  # None, "tensorboard" or "trackio" (pip install it); log.jsonl is always written
seed = 42
run_name = None  # None: <profile>-seed<seed>; a finished run is never overwritten

# %% [markdown]
# ## Configuration and environment
# Everything about the run is data: a recipe from the history, scaled by a profile.

# %%
import copy
import dataclasses
import json
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are text here
import asnn_common as asnn  # noqa: E402

asnn.figure_style()  # one look for all notebooks, in colours that people with any colour vision tell apart
begin = time.perf_counter()
asnn.check_parameters(recipe=recipe, profile=profile, corpus=corpus, teacher=teacher, steps=steps,
                      max_hours=max_hours, tracker=tracker, seed=seed, run_name=run_name)
size, reason = asnn.select_profile(profile)
size = size.replace(**{k: v for k, v in {"corpus": corpus, "teacher": teacher}.items() if v is not None})
chosen = size.scale(asnn.get_recipe(recipe), seed=seed, **({} if steps is None else {"distill_steps": steps}))
device, device_reason = asnn.select_device()
precision, precision_reason = asnn.select_precision(device)
env = asnn.environment()
asnn.FitConfig.from_recipe(chosen, max_hours=max_hours, tracker=tracker)  # says now what is wrong with them
print(f"{reason}\ndevice {device}: {device_reason}\nprecision {precision_reason}")
print(f"{env['platform']}, {asnn.hardware_text(env, gpus=False)}, {asnn.versions_text(env)}")

# %% [markdown]
# The recipe, beside the values that were published for v14.3. Rows that differ are the profile's doing, or repairs.

# %%
published = asnn.get_recipe("v14.3-published")
fields = [item.name for item in dataclasses.fields(chosen) if item.name not in ("changed", "outcome", "inferred", "published_ppl")]
rows = [{"field": name, "this run": str(getattr(chosen, name)), "published v14.3": str(getattr(published, name))} for name in fields]
rows = [row for row in rows if row["this run"] != row["published v14.3"]]
asnn.show_table(rows)
print(f"{len(fields) - len(rows)} further fields have the published value.")

# %% [markdown]
# ## Data and teacher
# The corpus is addressed by the hash of its content. A teacher trained here is cached under its own hash, so that a second run starts at once.

# %%
task = asnn.load_task(chosen, size)
chosen, text, tokens, master, teacher_training = task.recipe, task.corpus, task.tokens, task.teacher, task.teacher_training
print(f"corpus {text.name}, content hash {text.hash}")
print("\n".join(task.notes or [f"teacher {master.name} fits the recipe as it is"]))
asnn.show_table([{"split": split, "bytes": f"{task.sizes[split]['bytes']:,}", "words": f"{task.sizes[split]['words']:,}",
                  "tokens": f"{len(tokens[split]):,}", "bytes per token": f"{task.sizes[split]['bytes'] / len(tokens[split]):.2f}"}
                 for split in asnn.SPLITS])
print(f"teacher {master.name}: {asnn.count_parameters(master.model):,} parameters, vocabulary {len(master.tokenizer):,}")
if teacher_training:
    print(f"trained for {teacher_training['trained_steps']} steps in {teacher_training['seconds']} s (measured when it was trained)")

# %% [markdown]
# ## Preflight
# What this machine is and, by a probe of a few training steps, how long the run will take. Below the table stands what to click where something is not as it should be.

# %%
asnn.show_preflight(task, max_hours=max_hours)

# %% [markdown]
# The run folder: a finished run is never overwritten, an interrupted one goes on where it stopped.

# %%
settings = {"recipe": dataclasses.asdict(chosen), "profile": dataclasses.asdict(size), "corpus_hash": text.hash,
            "teacher": master.name}
run = asnn.Run.open(chosen.name, run_name or f"{size.name}-seed{seed}", json.loads(json.dumps(settings)))
print(run.note)

# %% [markdown]
# ## The architecture
# One layer of the student; spikes act where the picture is orange.

# %%
def draw_architecture(recipe, vocab_size):
    figure, axes = plt.subplots(figsize=(10, 5.2))
    axes.set(xlim=(-0.05, 10), ylim=(0.3, 5.1))
    axes.axis("off")
    plain, spiking, memory = "#d9e6f2", asnn.COLOURS["orange"], "#bfe3d7"

    def box(x, y, w, h, label, colour):
        axes.add_patch(plt.Rectangle((x, y), w, h, facecolor=colour, edgecolor="#444444", linewidth=1))
        axes.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=9)

    def arrow(x0, y0, x1, y1):
        axes.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": "#444444"})

    box(0.0, 2.3, 1.1, 1.0, f"embedding\nV={vocab_size:,}\nD={recipe.d_model}", plain)
    box(1.35, 2.3, 1.05, 1.0, "LayerNorm", plain)
    box(2.65, 2.3, 1.25, 1.0, "token shift\nx, previous x", plain)
    for y, name in ((4.2, "k"), (2.95, "v"), (1.7, "r")):
        box(4.3, y, 0.8, 0.7, f"W_{name}", plain)
        arrow(3.9, 2.8, 4.3, y + 0.35)
    for y, name in ((4.2, "k"), (2.95, "v")):
        box(5.4, y, 1.1, 0.7, f"spike {name}\n{{-1, 0, +1}}", spiking)
        arrow(5.1, y + 0.35, 5.4, y + 0.35)
        arrow(6.5, y + 0.35, 6.9, 3.75)
    box(5.4, 1.7, 1.1, 0.7, "sigmoid", plain)
    arrow(5.1, 2.05, 5.4, 2.05)
    box(6.9, 3.3, 1.5, 0.9, "state\n$S_t = w S_{t-1} + k v$", memory)
    box(7.2, 1.7, 0.9, 0.7, "r * S", plain)
    arrow(6.5, 2.05, 7.2, 2.05)
    arrow(7.65, 3.3, 7.65, 2.4)
    box(8.4, 1.7, 0.6, 0.7, "W_o", plain)
    arrow(8.1, 2.05, 8.4, 2.05)
    box(4.3, 0.4, 3.3, 0.7, f"LayerNorm, W_1, {recipe.activation}, W_2  (F={4 * recipe.d_model})", plain)
    axes.plot([9.0, 9.4, 9.4], [2.05, 2.05, 0.75], color="#444444", linewidth=1)
    arrow(9.4, 0.75, 7.6, 0.75)
    axes.text(9.45, 1.4, "+ x", fontsize=10)
    arrow(1.1, 2.8, 1.35, 2.8)
    arrow(2.4, 2.8, 2.65, 2.8)
    arrow(4.3, 0.75, 3.2, 0.75)
    box(1.0, 0.4, 2.2, 0.7, f"+ x, next layer (L={recipe.n_layer}),\nthen the tied head", plain)
    axes.set_title(f"ASNN-Goose {recipe.name}: one of {recipe.n_layer} layers")
    return figure


run.show(draw_architecture(chosen, len(master.tokenizer)), "architecture")

# %% [markdown]
# ## The recurrence, checked
# The first published notebook computed the recurrence as `cumsum(kv / (w^t + 1e-8)) * w^t`. Relative error by position against the exact loop in double precision: that formula forgets how to remember after about twenty tokens, the chunked scan used here does not.

# %%
def recurrence_errors(length=256, width=64):
    generator = torch.Generator().manual_seed(0)
    r, k, v = (torch.randn(4, length, width, generator=generator) for _ in range(3))
    r, k, v = torch.ones_like(r), torch.sign(k), torch.sign(v)
    errors = {}
    for label, scan, decay in (("cumsum formula, w = 0.378", asnn.recurrence_cumsum, 0.378),
                               ("cumsum formula, w = 0.9", asnn.recurrence_cumsum, 0.9),
                               ("chunked scan, w = 0.378", asnn.recurrence_chunked, 0.378),
                               ("chunked scan, w = 0.9", asnn.recurrence_chunked, 0.9)):
        w = torch.full((width,), decay)
        exact, _ = asnn.recurrence_reference(r.double(), k.double(), v.double(), w.double())
        measured, _ = scan(r, k, v, w)
        errors[label] = ((measured - exact).norm(dim=(0, 2)) / exact.norm(dim=(0, 2))).numpy()
    return errors


errors = recurrence_errors()
figure, axes = plt.subplots(figsize=(9, 3.6))
for label, error in errors.items():
    axes.semilogy(np.arange(1, len(error) + 1), np.maximum(error, 1e-9), "-" if "cumsum" in label else "--",
                  color=asnn.COLOURS["vermillion" if "0.378" in label else "blue"], label=label)
axes.set(xlabel="position (tokens)", ylabel="relative error (fp32)", title="Error of the recurrence against the exact loop in fp64")
axes.legend(loc="center right")
run.show(figure, "recurrence")
print("relative error at position 25, w = 0.378: "
      f"cumsum {errors['cumsum formula, w = 0.378'][24]:.2f}, chunked {errors['chunked scan, w = 0.378'][24]:.1e}")

# %% [markdown]
# ## Training
# The teacher is frozen and, where there are two GPUs, lives on the second. The bar shows the loss, the student's perplexity on the training batch and on validation, and the time left.

# %%
# What came before the training counts too: the session ends when its hours do.
hours_left = None if max_hours is None else max(1e-6, max_hours - (time.perf_counter() - begin) / 3600)
student, result = asnn.distil(task, chosen, asnn.FitConfig.from_recipe(chosen, max_hours=hours_left, tracker=tracker), run.folder, size.eval_windows)
print(f"{result.stopped} at step {result.step} of {chosen.distill_steps}; {result.seconds:.0f} s of steps, "
      f"{result.tokens_per_second:,.0f} tokens/s (measured), precision {result.precision}, "
      f"peak {result.peak_memory_gb:.2f} GiB")
if not result.finished:
    print(f"The run is not finished: {asnn.how_to_go_on()}.")

# %% [markdown]
# What happened, from the log. Dashed: what was published for v14.3, GPT-2 on WikiText-2; its perplexity is drawn only for that corpus and teacher.

# %%
def plot_curves(log, recipe):
    frame = pd.DataFrame([row for row in log if "loss" in row])
    checks = [row for row in log if "val_ppl" in row]
    dashed = {"color": "#444444", "linestyle": "--", "linewidth": 1, "label": "published"}
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5))
    axes[0, 0].plot(frame["step"], frame["kd"], label="KL, times tau²")
    axes[0, 0].plot(frame["step"], frame["ce"], label="cross-entropy")
    axes[0, 0].set(title="loss on training batches", ylabel="nats per token", ylim=(0, None))
    axes[0, 0].legend()
    axes[0, 1].plot([row["step"] for row in checks], [row["val_ppl"] for row in checks], "o-")
    axes[0, 1].set(title=f"validation perplexity, first {size.eval_windows} windows", ylabel="PPL")
    if (text.name, asnn.count_parameters(master.model)) == ("wikitext-2", 124_439_808):
        axes[0, 1].axhline(306.89, **dashed)
        axes[0, 1].legend()
    if checks and checks[0]["val_ppl"] > 3 * min(row["val_ppl"] for row in checks):
        axes[0, 1].set_yscale("log")
        asnn.plain_log(axes[0, 1].yaxis)
    axes[0, 2].plot(frame["step"], frame["tau"], label="tau")
    axes[0, 2].plot(frame["step"], frame["lambda"], label="lambda")
    axes[0, 2].axhline(1.61, **{**dashed, "label": "published, tau at the end: 1.61"})
    axes[0, 2].set(title="temperature and gradient reversal", ylabel="value (no unit)", ylim=(0, None))
    axes[0, 2].legend()
    if "fdd" in frame:
        axes[1, 0].plot(frame["step"], frame["fdd"])
    axes[1, 0].set(title=f"feature dynamics loss ({recipe.fdd})", ylabel="1 - CKA")
    for name in checks[0]["val_density"] if checks else ():  # a colour for a layer, a line style for a site
        axes[1, 1].plot([row["step"] for row in checks], [row["val_density"][name] for row in checks],
                        "o-" if name.endswith("k") else "s:", color=f"C{name.split('.')[0]}", label=name)
    axes[1, 1].axhline(0.382, **{**dashed, "label": "published: 0.382"})
    axes[1, 1].set(title="spike density by layer and site", ylim=(0, 1), ylabel="share of non-zero spikes")
    axes[1, 1].legend(fontsize=8, ncol=2)
    axes[1, 2].plot(frame["step"], frame["lr"])
    axes[1, 2].set(title="learning rate", ylabel="learning rate, per step")
    axes[1, 2].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axis in axes.flat:
        axis.set(xlabel="step", xlim=(0, 1.03 * frame["step"].max()))
    figure.tight_layout()
    return figure


run.show(plot_curves(result.log, chosen), "training")

# %% [markdown]
# ## Quality
# Perplexity over consecutive windows, every token once, in fp32. The gap is student PPL / teacher PPL on the same tokens; its standard error comes from the paired windows.

# %%
windows = size.final_windows if result.finished else size.eval_windows  # an unfinished run has used its time up
measured = {name: {split: asnn.evaluate(model, tokens[split], chosen.seq_len, windows=windows, size=task.sizes[split],
                                        description=f"{name}, {split}")
                   for split in ("validation", "test")}
            for name, model in (("teacher", master.model.to(device)), ("student", student))}
asnn.show_table(asnn.quality_table(measured))
metrics = asnn.run_metrics(run, task, size, student, result, measured)

# %% [markdown]
# ## Samples
# The same prompts, from the test split, with the same sampling (temperature 0.8, top-k 40). Perplexity says how well, samples say what.

# %%
samples = asnn.sample_texts({"teacher": master.model, "student": student}, master.tokenizer, tokens["test"], chosen.seq_len, seed)
asnn.show_table(samples, prose=True)

# %% [markdown]
# ## The twelve run checks
# The founders' checks, on this run. The target is the project's research target, a gap of 4.5; a check that does not apply says so.

# %%
versions = list(asnn.RECIPES)
earlier = [m for m in asnn.runs() if m["corpus"]["hash"] == text.hash and m["teacher"]["name"] == master.name
           and m["version"] in versions[:versions.index(chosen.name)] and m["training"]["step"] == result.step]
checks = asnn.run_checks(chosen, result, measured["student"]["test"].ppl, 4.5 * measured["teacher"]["test"].ppl,
                         earlier[-1]["student"]["test"]["ppl"] if earlier else None, metrics["student"]["density"],
                         metrics["student"]["amplitude"])
words = {True: "pass", False: "FAIL", None: "does not apply"}
asnn.show_table([{"check": c.name, "measured": c.value, "result": words[c.passed]} for c in checks])

# %% [markdown]
# ## Beside the published history
# Published figures are GPT-2 (PPL 44.6) on WikiText-2 in windows of 256 tokens; ours name their own corpus and teacher. Perplexities of different corpora do not compare, gaps do so only roughly.

# %%
history = [{"version": r.name, "corpus, teacher": "WikiText-2, GPT-2 124M" if r.name != "v4" else "-", "PPL": r.published_ppl,
            "gap": r.published_ppl / 44.6 if r.published_ppl else None, "source": "published", "outcome": r.outcome}
           for r in asnn.RECIPES.values() if r.name == "v4" or r.published_ppl and r.name != "v14.3"]
for row in history:
    row["version"] = row["version"].removesuffix("-published")
test = measured["student"]["test"]
history.append({"version": f"{chosen.name} (this run)", "corpus, teacher": f"{text.name}, {master.name}", "PPL": test.ppl,
                "gap": metrics["gap"]["test"]["value"], "source": "measured here", "outcome": f"{result.step} steps, {result.stopped}"})
asnn.show_table([{**row, **{name: f"{row[name]:.2f}" if row[name] else "-" for name in ("PPL", "gap")}} for row in history])

# %%
figure, axes = plt.subplots(figsize=(10, 3.4))
drawn = [row for row in history if row["gap"]]
for place, (label, colour) in enumerate((("published, on WikiText-2", "sky"), (f"measured in this run, on {text.name}", "orange"))):
    shown = [i for i, row in enumerate(drawn) if (row["source"] != "published") == place]
    bars = axes.bar(shown, [drawn[i]["gap"] for i in shown], color=asnn.COLOURS[colour], label=label)
    axes.bar_label(bars, [f"{drawn[i]['gap']:.1f}" for i in shown], fontsize=8, padding=2)
for gap, label in ((306.89 / 44.6, "published v14.3"), (4.5, "research target")):
    axes.axhline(gap, color="#444444", linestyle="--" if "published" in label else ":", linewidth=1, label=f"{label}: {gap:.1f}")
axes.set(yscale="log", ylim=(0.5, 100), ylabel="gap (student PPL / teacher PPL)", title="The versions so far")
axes.set_xticks(range(len(drawn)), [row["version"] for row in drawn], rotation=45, ha="right", rotation_mode="anchor")
axes.grid(axis="x", visible=False)
asnn.plain_log(axes.yaxis)
axes.legend(ncol=2, loc="upper right")
run.show(figure, "history")

# %% [markdown]
# ## Contract
# Facts that hold in every profile and on every machine; continuous integration compares their output.

# %% tags=["nbval-check-output"]
with torch.device("meta"):
    full = asnn.GooseForCausalLM(asnn.get_recipe("v14.3").student_config(50257))
print("full-size student, parameters:", asnn.count_parameters(full))
print("published PPL of v14.3:", asnn.get_recipe("v14.3").published_ppl)

# %% tags=["nbval-check-output"]
with torch.no_grad():
    probe = torch.randn(4, 64, student.config.d_model, device=device)
    alphabet = {int(value) for block in asnn.transformer_blocks(student) for site in (block.time_mix.spike_k, block.time_mix.spike_v)
                for value in site.encode(probe)[0].unique()}
print("spike alphabet:", sorted(alphabet))
print("chunked scan equals the loop:", bool(max(errors["chunked scan, w = 0.378"].max(), errors["chunked scan, w = 0.9"].max()) < 1e-5))
print("cumsum formula lost by token 25:", bool(errors["cumsum formula, w = 0.378"][24] > 0.5))

# %% tags=["nbval-check-output"]
with torch.no_grad():
    exact = copy.deepcopy(student).cpu().double()  # so that no threshold is crossed by rounding
    ids = torch.from_numpy(tokens["validation"][:64].astype(np.int64)).view(2, 32)
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % student.config.vocab_size
    before, after = exact(ids).logits, exact(changed).logits
    first = exact(ids[:, :13])
    second_part = exact(ids[:, 13:], state=first.state).logits
print("a changed token changes nothing before it:", torch.equal(before[:, :20], after[:, :20]))
print("and something from it on:", not torch.equal(before[:, 20:], after[:, 20:]))
print("cached equals uncached:", torch.allclose(torch.cat((first.logits, second_part), 1), before, atol=1e-3))
print("run checks:", len(checks))

# %% [markdown]
# ## Saved artefacts
# One metrics file feeds the tables, the model card and the index of runs. The student is a Hugging Face folder that loads without this project.

# %%
metrics.update(checks=[dataclasses.asdict(check) for check in checks], notebook_seconds=time.perf_counter() - begin)
if result.finished:
    if run.main:
        asnn.write_atomically(run.folder / "samples.json", json.dumps(samples, indent=1))
    run.finish(metrics, student.cpu(), master.tokenizer)

# %% tags=["nbval-check-output"]
for name in (".", "figures", "student"):
    print(f"{name}:", sorted(path.name for path in (run.folder / name).glob("*") if path.suffix != ".svg") or "not yet: the run is not finished")

# %% [markdown]
# ## Summary

# %%
failed = [check.name for check in checks if check.passed is False]
print(f"{chosen.name} on {text.name} with teacher {master.name}: test PPL {test.ppl:.2f} against the teacher's "
      f"{measured['teacher']['test'].ppl:.2f}, gap {metrics['gap']['test']['value']:.3f} ± {metrics['gap']['test']['standard_error']:.3f} (standard error, {test.windows} windows, measured).")
density = metrics["student"]["density"].values()
print(f"Spike density {min(density):.3f} to {max(density):.3f} over layers and sites; tau ended at "
      f"{[row['tau'] for row in result.log if 'tau' in row][-1]:.2f}.")
print(f"{sum(c.passed is True for c in checks)} of {len(checks)} checks passed" + (f"; failed: {', '.join(failed)}." if failed else "."))
print(f"{time.perf_counter() - begin:.0f} s in this notebook; metrics and figures in {os.path.relpath(run.folder)}")
