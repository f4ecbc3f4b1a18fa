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
# # ASNN-Goose v14.4: start the spiking student from its teacher's weights
#
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://www.kaggle.com/code/new)
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/#upload=true)
# ![Python 3.11-3.13](https://img.shields.io/badge/python-3.11--3.13-blue)
# ![torch 2.10+](https://img.shields.io/badge/torch-2.10%2B-orange)
#
# The recipe of v14.3 takes nothing from its teacher but the embeddings, and gives each channel a memory of one number.
# This notebook takes everything that fits: a layer of the student has the matrices of a GPT-2 layer, and an output gate.
# The memory of a head becomes a matrix, written by the delta rule: a ternary key chooses rows, and what is added there is the ternary value less what the rows already hold.
# The matrices are trained with Muon, everything else with AdamW, on the teacher's whole next-token distribution and the text itself.
# Spikes can stand before every product of the layers with a weight matrix too: an encoder writes the input as `centre + amplitude * scale * s` with s in {-1, 0, +1}, and the next Linear absorbs all but s and one number per token.
# A dense twin, the same student with the spikes taken out, is trained beside it over three seeds: what the spikes cost is measured, not assumed.
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
recipe = "v14.4-rates"  # spikes before every product, held in a band: what v16 and v17 need; v14.4 (keys and values only), v14.4-sites, v14.4-vector, v14.4-t4 (long), or one of the history
profile = None  # tiny (seconds), cpu (minutes), ref, t4 (full size); None: ASNN_PROFILE, else by hardware
corpus = None  # pydocs, wikitext-2, wikitext-103, or a folder with train.txt, validation.txt, test.txt
teacher = None  # gpt2, another hub id, a folder, or train (a small GPT-2 trained here)
steps = None  # optimiser steps of the distillation
tax_seeds = 3  # seeds over which the ternary tax is measured; 0: not at all
tax_steps = None  # optimiser steps of each of those runs; None: all in profile ref, a tenth elsewhere
max_hours = None  # stop and save after so many hours; run again with the same name to go on
tracker = None  # None, "tensorboard" or "trackio" (pip install it); log.jsonl is always written
seed = 42
run_name = None  # None: <profile>-seed<seed>; a finished run is never overwritten

# %% [markdown]
# ## Configuration and environment
# Everything about the run is data: a recipe, scaled by a profile.

# %%
import copy
import dataclasses
import json
import shutil
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
                      tax_seeds=tax_seeds, tax_steps=tax_steps, max_hours=max_hours, tracker=tracker, seed=seed,
                      run_name=run_name)
size, reason = asnn.select_profile(profile)
asked = asnn.get_recipe(recipe)
if size.name == "t4":  # what a long recipe asks for
    corpus, teacher, max_hours = corpus or asked.corpus, teacher or asked.teacher, max_hours or asked.max_hours
size = size.replace(**{k: v for k, v in {"corpus": corpus, "teacher": teacher}.items() if v is not None})
chosen = size.scale(asked, seed=seed, **({} if steps is None else {"distill_steps": steps}))
device, device_reason = asnn.select_device()
precision, precision_reason = asnn.select_precision(device)
env = asnn.environment()
asnn.FitConfig.from_recipe(chosen, max_hours=max_hours, tracker=tracker)  # says now what is wrong with them
print(f"{reason}\ndevice {device}: {device_reason}\nprecision {precision_reason}")
print(f"{env['platform']}, {asnn.hardware_text(env, gpus=False)}, {asnn.versions_text(env)}")

# %% [markdown]
# The recipe, beside the repaired recipe of v14.3 in the same profile: these are the changes that this version makes.

# %%
before = size.scale(asnn.get_recipe("v14.3"), seed=seed)
fields = [item.name for item in dataclasses.fields(chosen) if item.name not in ("changed", "outcome", "inferred", "repaired", "published_ppl")]
asnn.show_table([{"field": name, "this run": str(getattr(chosen, name)), "v14.3": str(getattr(before, name))}
                 for name in fields if getattr(chosen, name) != getattr(before, name)])

# %% [markdown]
# ## Data and teacher
# The corpus is addressed by the hash of its content. A teacher trained here is cached under its own hash, so that a second run starts at once.

# %%
task = asnn.load_task(chosen, size)
chosen, tokens, master = task.recipe, task.tokens, task.teacher
print(f"corpus {task.corpus.name}, content hash {task.corpus.hash}")
print("\n".join(task.notes or [f"teacher {master.name} fits the recipe as it is"]))
asnn.show_table([{"split": split, "bytes": f"{task.sizes[split]['bytes']:,}", "words": f"{task.sizes[split]['words']:,}",
                  "tokens": f"{len(tokens[split]):,}", "bytes per token": f"{task.sizes[split]['bytes'] / len(tokens[split]):.2f}"}
                 for split in asnn.SPLITS])
print(f"teacher {master.name}: {asnn.count_parameters(master.model):,} parameters, vocabulary {len(master.tokenizer):,}")

# %% [markdown]
# ## Preflight
# What this machine is and, by a probe of a few training steps, how long the run will take. Below the table stands what to click where something is not as it should be.

# %%
asnn.show_preflight(task, max_hours=max_hours)

# %% [markdown]
# The run folder: a finished run is never overwritten, an interrupted one goes on where it stopped.

# %%
if tax_steps is None:
    tax_steps = chosen.distill_steps if size.name == "ref" else max(20, chosen.distill_steps // 10)
settings = {"recipe": dataclasses.asdict(chosen), "profile": dataclasses.asdict(size), "corpus_hash": task.corpus.hash,
            "teacher": master.name}
run = asnn.Run.open(chosen.name, run_name or f"{size.name}-seed{seed}", json.loads(json.dumps(settings)))
print(run.note)

# %% [markdown]
# ## The architecture
# One layer of the student. Orange: k and v are always spikes; hatched: where an encoder may stand, filled where this recipe has one.

# %%
def draw_architecture(recipe):
    figure, axes = plt.subplots(figsize=(11, 5.4))
    axes.set(xlim=(-0.05, 11), ylim=(-0.25, 5.7))
    axes.axis("off")
    plain, spiking, memory = "#d9e6f2", asnn.COLOURS["orange"], "#bfe3d7"

    def box(x, y, w, h, label, colour):
        axes.add_patch(plt.Rectangle((x, y), w, h, facecolor=colour, edgecolor="#444444", linewidth=1))
        axes.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=9)

    def arrow(x0, y0, x1, y1):
        axes.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": "#444444"})

    def site(x, y, name, above=False):
        on = name in recipe.spike_sites
        axes.add_patch(plt.Rectangle((x, y), 0.22, 0.5, facecolor=spiking if on else "white", edgecolor="#b45f06", hatch=None if on else "////"))
        axes.text(x + 0.11, y + 0.58 if above else y - 0.22, name, ha="center", fontsize=8, color="#8a4500")

    box(0.0, 2.3, 1.1, 1.0, "x\nLayerNorm", plain)
    box(1.4, 2.3, 1.3, 1.0, "token shift\nx, previous x", plain)
    names = ("k", "v", "r", "gate") if recipe.state_kind != "vector" else ("k", "v", "r")
    for y, name in zip((4.6, 3.5, 2.0, 1.1), names):
        site(3.2, y + 0.1, "mix_in", above=y > 3)  # on the side where no arrow comes from
        box(3.6, y, 0.85, 0.7, f"W_{name}", plain)
        arrow(3.42, y + 0.35, 3.6, y + 0.35)
        arrow(2.7, 2.8, 3.2, y + 0.35)
    for y, name in ((4.6, "k"), (3.5, "v")):
        box(4.7, y, 1.1, 0.7, f"spike {name}\n{{-1, 0, +1}}", spiking)
        arrow(4.45, y + 0.35, 4.7, y + 0.35)
        arrow(5.8, y + 0.35, 6.3, 4.3)
    label = {"vector": "S = w S + k v", "matrix": "S = diag(w) S + k v$^T$",
             "delta": "S = diag(w) S\n+ beta k (v - k S)$^T$"}[recipe.state_kind]
    box(6.3, 3.8, 1.9, 1.0, label, memory)
    box(6.7, 2.0, 1.1, 0.7, "read r S" + ("" if recipe.state_kind == "vector" else "\ngroup norm"), plain)
    arrow(7.25, 3.8, 7.25, 2.7)
    arrow(4.45, 2.35, 6.7, 2.35)
    if recipe.state_kind != "vector":
        box(6.9, 1.05, 0.7, 0.6, "* gate", plain)
        arrow(7.25, 2.0, 7.25, 1.65)
        arrow(4.45, 1.4, 6.9, 1.4)
    site(8.1, 1.6, "mix_out")
    box(8.6, 1.5, 0.7, 0.7, "W_o", plain)
    arrow(8.32, 1.85, 8.6, 1.85)
    arrow(7.8, 2.35, 8.1, 1.95) if recipe.state_kind == "vector" else arrow(7.6, 1.4, 8.1, 1.75)
    site(8.3, 0.15, "ffn_in")
    box(7.4, 0.05, 0.6, 0.7, "W_1", plain)
    box(6.2, 0.05, 0.9, 0.7, recipe.activation.split("_")[0], plain)
    site(5.65, 0.15, "ffn_hidden")
    box(4.75, 0.05, 0.6, 0.7, "W_2", plain)
    for x0, x1 in ((8.3, 8.0), (7.4, 7.1), (6.2, 5.87), (5.65, 5.35)):
        arrow(x0, 0.4, x1, 0.4)
    axes.plot([9.3, 9.7, 9.7], [1.85, 1.85, 0.4], color="#444444", linewidth=1)
    arrow(9.7, 0.4, 8.52, 0.4)
    axes.text(9.75, 1.1, "+ x,\nLayerNorm", fontsize=9)
    box(2.5, 0.05, 1.9, 0.7, f"+ x, next layer\n(L={recipe.n_layer}), tied head", plain)
    arrow(4.75, 0.4, 4.4, 0.4)
    arrow(1.1, 2.8, 1.4, 2.8)
    axes.set_title(f"ASNN-Goose {recipe.name}: one of {recipe.n_layer} layers, D={recipe.d_model}")
    return figure


run.show(draw_architecture(chosen), "architecture")

# %% [markdown]
# ## What a state can hold
# Pairs of a random ternary key and a random ternary value are written one after the other into one head of N = 64, then keys are read back. Left, every pair has its own key: the delta rule reads more cleanly up to about N/2 pairs, and worse beyond. Right, 16 keys come again and again with new values, as names do in a text: the delta rule replaces what a key held, the others add it up.

# %%
def recall(pairs, distinct=None, width=64, trials=16):
    generator = torch.Generator().manual_seed(0)
    spikes = lambda count: (torch.sign(torch.randn(trials, count, 1, width, generator=generator))  # noqa: E731
                            * (torch.rand(trials, count, 1, width, generator=generator) < 0.42))
    key, value = spikes(distinct or pairs).repeat(1, -(-pairs // (distinct or pairs)), 1, 1)[:, :pairs], spikes(pairs)
    unit = key * (key.square().sum(-1, keepdim=True) + 1.0).rsqrt()
    last = slice(-min(pairs, distinct or pairs), None)  # the newest value of each key
    found = {"vector": key.squeeze(2) * (key * value).sum(1)}  # (trials, pairs, N)
    for name, beta in (("matrix", None), ("delta", torch.ones(trials, pairs, 1))):
        _, S = asnn.matrix_recurrence_chunked(unit, unit, value, torch.full((1, width), 0.9999), None, beta)
        found[name] = torch.einsum("bthn,bhnm->btm", unit, S)
    return {name: float(torch.cosine_similarity(read[:, last], value[:, last].squeeze(2), dim=-1).mean()) for name, read in found.items()}


counts = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128]
recalled = {"every pair has its own key": [recall(count) for count in counts], "16 keys that come again": [recall(count, 16) for count in counts]}
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True)
for axis, (title, rows) in zip(axes, recalled.items()):
    for name, style in zip(rows[0], ("o-", "s-", "^-")):
        axis.plot(counts, [row[name] for row in rows], style, label=name)
    axis.set(xlabel="pairs written", xscale="log", ylim=(0, 1.05), title=title)
    asnn.plain_log(axis.xaxis, (1, 2, 4, 8, 16, 32, 64, 128))
axes[0].set_ylabel("cosine of what is read\nand the newest value")
axes[0].legend()
run.show(figure, "recall")

# %% [markdown]
# The fast form of the recurrence against the loop, values, last state and gradients, in double precision.

# %%
def recurrence_agrees(length=70, width=16):
    generator = torch.Generator().manual_seed(0)
    leaf = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    r, v, S = leaf(2, length, 2, width), leaf(2, length, 2, width), leaf(2, 2, width, width)
    k = torch.nn.functional.normalize(leaf(2, length, 2, width), dim=-1)
    w, beta = torch.sigmoid(leaf(2, width)), torch.sigmoid(leaf(2, length, 2))
    inputs = [x.requires_grad_() for x in (r, k, v, w, S, beta)]
    results = []
    for scan in (asnn.matrix_recurrence_reference, asnn.matrix_recurrence_chunked):
        out, last = scan(*inputs)
        results.append([out, last, *torch.autograd.grad(out.square().sum() + last.sum(), inputs)])
    return max(float(((a - b).abs().max() / a.abs().max()).detach()) for a, b in zip(*results))


worst = recurrence_agrees()
print(f"largest relative difference of chunked form and loop: {worst:.1e} (fp64, outputs, state and six gradients)")

# %% [markdown]
# ## Weight transfer
# What each parameter of the student starts from. Rows that are alike in all layers are shown for the first one.

# %%
blank = asnn.GooseForCausalLM(chosen.student_config(master.model.get_input_embeddings().weight.shape[0]))
if chosen.weights_from_teacher:
    transferred = asnn.transfer_weights(blank, master.model, chosen.transfer_layers, chosen.output_scale)
    asnn.show_table([row for row in transferred if not any(row["student"].startswith(f"blocks.{i}.") for i in range(1, chosen.n_layer))])
    shares = {name: sum(p.numel() for n, p in blank.goose.named_parameters() if any(row["student"] == n and row["transferred"] == name for row in transferred))
              for name in ("yes", "no, starts fresh")}
    print(f"{shares['yes']:,} parameters start from the teacher, {shares['no, starts fresh']:,} start fresh; "
          f"student layers take teacher layers {chosen.transfer_layers or asnn.span_ends(chosen.n_layer, len(asnn.transformer_blocks(master.model)))}")
else:
    print("This recipe takes no weights but the embeddings.")

# %% [markdown]
# ## Training
# The stages of the run, then the run itself. The bar shows the loss, the student's perplexity on the training batch and on validation, and the time left.

# %%
stages = chosen.stages()
print("; ".join(f"{name}: steps {start} to {end}" for name, start, end in stages))
if chosen.anneal_steps:
    print(f"spikes fade in over the first {chosen.anneal_steps} steps")


def hours_left():
    return None if max_hours is None else max(0.001, max_hours - (time.perf_counter() - begin) / 3600)


student, result = asnn.distil(task, chosen, asnn.FitConfig.from_recipe(chosen, max_hours=hours_left(), tracker=tracker), run.folder, size.eval_windows)
print(f"{result.stopped} at step {result.step} of {chosen.distill_steps}; {result.seconds:.0f} s of steps, "
      f"{result.tokens_per_second:,.0f} tokens/s (measured), precision {result.precision}, "
      f"peak {result.peak_memory_gb:.2f} GiB")
if not result.finished:
    print(f"The run is not finished: {asnn.how_to_go_on()}.")

# %% [markdown]
# What happened, and what each stage gained.

# %%
def plot_curves(log, recipe):
    checks = [row for row in log if "val_ppl" in row]
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5))
    axes = axes.flat
    for name, label in (("align", "alignment (share of variance)"), ("kd", "KL"), ("ce", "cross-entropy")):
        rows = [row for row in log if name in row]
        if rows:
            axes[0].plot([row["step"] for row in rows], [row[name] for row in rows], label=label)
    axes[0].set(title="loss on training batches", ylabel="nats per token, or share", yscale="log")
    asnn.plain_log(axes[0].yaxis)
    axes[0].legend(loc="center right")
    axes[1].plot([row["step"] for row in checks], [row["val_ppl"] for row in checks], "o-")
    axes[1].set(title=f"validation perplexity, first {size.eval_windows} windows", ylabel="PPL", yscale="log")
    asnn.plain_log(axes[1].yaxis)
    names = list(checks[0]["val_density"]) if checks else []
    layers, kinds = (list(dict.fromkeys(name.split(".", 1)[part] for name in names)) for part in (0, -1))
    markers = dict(zip(kinds, "osv^<>Dph*"))
    for name in names:  # a colour for a layer, a marker for a site
        axes[2].plot([row["step"] for row in checks], [row["val_density"][name] for row in checks], markers[name.split(".", 1)[-1]] + "-",
                     color=f"C{layers.index(name.split('.')[0])}", markersize=4, linewidth=1)
    keys = [plt.Line2D([], [], color=f"C{i}", label=f"layer {layer}") for i, layer in enumerate(layers)]
    keys += [plt.Line2D([], [], color="#444444", marker=marker, linestyle="none", markersize=4, label=kind) for kind, marker in markers.items()]
    keys.append(axes[2].axhline(0.382, color="#444444", linestyle="--", linewidth=1, label="published v14.3: 0.382"))
    axes[2].set(title="spike density by layer and site", ylim=(0, 1.2), ylabel="share of non-zero spikes", yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    axes[2].legend(handles=keys, fontsize=7, ncol=4, loc="upper right")
    frame = pd.DataFrame([row for row in log if "lr" in row])
    axes[3].plot(frame["step"], frame["lr"])
    axes[3].set(title="learning rate of AdamW", ylabel="learning rate, per step")
    axes[3].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axis in axes:
        axis.set(xlabel="step", xlim=(0, 1.03 * frame["step"].max()))
        for _, start, _ in stages[1:]:
            axis.axvline(start, color="#888888", linestyle=":", linewidth=1)
    figure.tight_layout()
    return figure


run.show(plot_curves(result.log, chosen), "training")
checks = {row["step"]: row["val_ppl"] for row in result.log if "val_ppl" in row}
untrained = asnn.evaluate(asnn.build_student(chosen, master, calibration=asnn.distillation_sampler(chosen, tokens["train"], master.model).batch(0, chosen.batch_size)[0]).to(device),
                          tokens["validation"], chosen.seq_len, windows=size.eval_windows, precision=precision).ppl
gains, last = [{"stage": "as built, before training", "steps": "0", "validation PPL": f"{untrained:.2f}", "gain": ""}], untrained
for name, start, end in stages:
    if end in checks:
        gains.append({"stage": name, "steps": f"{start} to {end}", "validation PPL": f"{checks[end]:.2f}", "gain": f"{last / checks[end]:.3f}x"})
        last = checks[end]
asnn.show_table(gains)

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

# %% [markdown]
# ## What the spikes cost: the ternary tax
# The dense twin has the same architecture, seed, batches and budget, and every spike function replaced by identity. The tax is spiking PPL / dense PPL on the same tokens. Outside profile ref these runs have a tenth of the steps: theirs is the tax of a short budget, not of the run above.

# %%
def tax_run(kind, tax_seed):
    """Test evaluation of a student with these spikes and this seed; None when the time ran out."""
    if kind == chosen.spike_kind and tax_seed == seed and tax_steps == chosen.distill_steps:
        return measured["student"]["test"]
    if max_hours is not None and asnn.largest_of_all(-hours_left()) >= -0.001:
        return None
    other, _ = asnn.match_teacher(size.scale(asked, seed=tax_seed, distill_steps=tax_steps, spike_kind=kind), master)
    folder = run.folder / "tax" / f"{kind}-{tax_seed}-{tax_steps}"
    twin, done = asnn.distil(task, other, asnn.FitConfig.from_recipe(other, max_hours=hours_left()), folder, size.eval_windows,
                             f"{kind}, seed {tax_seed}")
    exactly = "fp32" if tax_steps == chosen.distill_steps else precision  # a short budget is no final figure
    return asnn.evaluate(twin, tokens["test"], chosen.seq_len, windows=size.final_windows, precision=exactly) if done.finished else None


taxes = []
for tax_seed in range(seed, seed + tax_seeds) if result.finished and chosen.spike_kind != "dense" else ():
    spiking = tax_run(chosen.spike_kind, tax_seed)
    dense = tax_run("dense", tax_seed) if spiking else None
    if dense:
        tax, error = asnn.perplexity_gap(spiking, dense)
        taxes.append({"seed": tax_seed, "spiking": spiking.ppl, "dense": dense.ppl, "tax": tax, "standard_error": error})
# A run whose hours ended in the middle of these is not finished: the next one goes on with them.
complete = result.finished and (chosen.spike_kind == "dense" or len(taxes) == tax_seeds)
if taxes:
    asnn.show_table([{"seed": str(row["seed"]), "spiking PPL": f"{row['spiking']:.2f}", "dense twin PPL": f"{row['dense']:.2f}",
                      "tax ± s.e.": f"{row['tax']:.4f} ± {row['standard_error']:.4f}"} for row in taxes])
    values = np.array([row["tax"] for row in taxes])
    spread = f" ± {values.std(ddof=1):.4f} (standard deviation)" if len(values) > 1 else ""
    print(f"ternary tax {values.mean():.4f}{spread} over {len(values)} seeds, {tax_steps} steps each, test split, measured")
else:
    print("The tax was not measured: it needs a finished spiking run, tax_seeds of at least 1, and time.")

# %% [markdown]
# ## Where the spikes are
# Multiply-accumulates per token of the layers and the head, which of them a spike goes into, and how often it is not zero. The read `r S` has none; the write of the delta rule has the key, and what it writes is not ternary.

# %%
products = asnn.matrix_products(student)
density = asnn.spike_density(student, torch.from_numpy(tokens["validation"][:4 * chosen.seq_len].astype(np.int64)).view(4, -1))


def mean_density(site):
    found = asnn.densities_at(density, site)
    return f"{np.mean(found):.3f}" if found else "-"


total = sum(row["macs"] for row in products)
asnn.show_table([{"product": row["product"], "site": row["site"] or "-", "MACs per token": f"{row['macs']:,}", "share": f"{100 * row['macs'] / total:.1f} %",
                  "fed by spikes": "yes" if row["fed"] else "no", "density": mean_density(row["site"])} for row in products])
weights = [row for row in products if row["layers"] and row["site"]]
fed = sum(row["macs"] for row in weights if row["fed"]) / sum(row["macs"] for row in weights)
print(f"{100 * fed:.0f} % of the layers' products with weights are fed by spikes")
figure, axes = plt.subplots(figsize=(10, 3.2))
axes.bar(range(len(density)), list(density.values()), color=asnn.COLOURS["orange"])
axes.axhline(0.382, color="#444444", linestyle="--", linewidth=1, label="published v14.3: 0.382")
axes.set(title="Spike density by layer and site, 4 validation windows", ylabel="share of non-zero spikes", ylim=(0, 1))
axes.set_xticks(range(len(density)), list(density), rotation=90 if len(density) > 12 else 0)
axes.grid(axis="x", visible=False)
axes.legend()
run.show(figure, "density")

# %% [markdown]
# ## Samples
# The same prompts, from the test split, with the same sampling (temperature 0.8, top-k 40). Perplexity says how well, samples say what.

# %%
samples = asnn.sample_texts({"teacher": master.model, "student": student}, master.tokenizer, tokens["test"], chosen.seq_len, seed)
asnn.show_table(samples, prose=True)

# %% [markdown]
# ## The long run
# What `recipe = "v14.4-t4"` asks of one T4: an estimate, by arithmetic. Nothing of it was trained for this page.

# %%
def plan(recipe, teacher_parameters=124_439_808, memory=16, speed=10_000):
    with torch.device("meta"):
        model = asnn.GooseForCausalLM(recipe.student_config(50257))
    count, step_tokens = asnn.count_parameters(model), recipe.batch_size * recipe.grad_accum * recipe.seq_len
    parts = asnn.training_memory(recipe, 50257, teacher_parameters)
    asnn.show_table([{"memory": name, "GiB": f"{value / 2**30:.2f}"} for name, value in parts.items()])
    total, flops = recipe.distill_steps * step_tokens, 2 * teacher_parameters + 6 * count
    print(f"{flops / 1e9:.2f} GFLOP per token (2 x teacher + 6 x student parameters): {speed:,} tokens/s, assumed, are {speed * flops / 1e12:.1f} TFLOP/s, "
          f"{100 * speed * flops / 65e12:.0f} % of a T4's fp16 peak of 65")
    print(f"the tax, 3 seeds with and without spikes at a tenth of the steps, adds {0.6 * total / speed / 3600:.1f} h where time is left")
    print(f"{count:,} parameters; {sum(parts.values()) / 2**30:.1f} GiB of {memory} (estimated)")
    print(f"{step_tokens:,} tokens per step ({recipe.batch_size} x {recipe.seq_len} x {recipe.grad_accum} accumulated), {recipe.distill_steps:,} steps, "
          f"{total / 1e6:.0f}M tokens, {total / 118e6:.1f} epochs of {recipe.corpus}; {total / speed / 3600:.1f} h at an assumed {speed:,} tokens/s (estimated), budget {recipe.max_hours:g} h")
    return sum(parts.values()) / 2**30


planned = plan(asnn.get_recipe("v14.4-t4"))

# %% [markdown]
# ## Contract
# Facts that hold in every profile and on every machine; continuous integration compares their output.

# %% tags=["nbval-check-output"]
with torch.device("meta"):
    full = asnn.GooseForCausalLM(asnn.get_recipe("v14.4").student_config(50257))
print("full-size student, parameters:", asnn.count_parameters(full))
print("chunked form equals the loop:", worst < 1e-12)
print("the delta rule replaces what a key held:", all(row["delta"] > row["matrix"] + 0.1 for row in recalled["16 keys that come again"][-4:]))
print("and holds less than a sum of 128 keys:", recalled["every pair has its own key"][-1]["delta"] < recalled["every pair has its own key"][-1]["matrix"])
print("the long run is estimated to fit 16 GB:", planned < 14)

# %% tags=["nbval-check-output"]
with torch.no_grad():
    exact = copy.deepcopy(student).cpu().double().eval()  # so that no threshold is crossed by rounding
    probe = torch.randn(2, 32, chosen.d_model, dtype=torch.float64)
    alphabet = {float(value) + 0.0 for module in asnn.spike_modules(exact).values() if isinstance(module, asnn.TernarySpike) for value in module.encode(probe)[0].unique()}
    linear, own = exact.goose.blocks[0].ffn.up, exact.goose.blocks[0].ffn.ffn_in
    encoder = own if isinstance(own, asnn.SpikeEncoder) else asnn.SpikeEncoder(chosen.d_model).double()
    encoder.calibrate(probe)
    spikes, scale = encoder.encode(probe)
    folded = encoder.fold(linear)
    agrees = torch.allclose(scale * (spikes @ folded.weight.t()) + folded.bias, linear(encoder(probe)), atol=1e-5)
print("spike alphabet:", sorted(alphabet), "encoder:", sorted((spikes.unique() + 0.0).tolist()))
print("an encoder folds into the next Linear:", agrees)

# %% tags=["nbval-check-output"]
with torch.no_grad():
    ids = torch.from_numpy(tokens["validation"][:64].astype(np.int64)).view(2, 32)
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % exact.config.vocab_size
    whole, other = exact(ids).logits, exact(changed).logits
    first = exact(ids[:, :13])
    rest = exact(ids[:, 13:], state=first.state).logits
print("a changed token changes nothing before it:", torch.equal(whole[:, :20], other[:, :20]))
print("and something from it on:", not torch.equal(whole[:, 20:], other[:, 20:]))
print("cached equals uncached:", torch.allclose(torch.cat((first.logits, rest), 1), whole, atol=1e-6))

# %% [markdown]
# ## Saved artefacts
# One metrics file feeds the tables, the model card and the index of runs. The student is a Hugging Face folder that loads without this project.

# %%
metrics = asnn.run_metrics(run, task, size, student, result, measured, tax={"steps": tax_steps, "runs": taxes}, stages=gains,
                           layers_fed_by_spikes=fed, notebook_seconds=time.perf_counter() - begin)
if complete:
    if run.main:
        asnn.write_atomically(run.folder / "samples.json", json.dumps(samples, indent=1))
    run.finish(metrics, student.cpu(), master.tokenizer)
    shutil.rmtree(run.folder / "tax", ignore_errors=True)
else:
    print(f"Not finished: {asnn.how_to_go_on()}.")

# %% tags=["nbval-check-output"]
for name in (".", "figures", "student"):
    print(f"{name}:", sorted(path.name for path in (run.folder / name).glob("*") if path.suffix != ".svg") or "not yet: the run is not finished")

# %% [markdown]
# ## Summary

# %%
gap = metrics["gap"]["test"]
print(f"{chosen.name} on {task.corpus.name} with teacher {master.name}: test PPL {measured['student']['test'].ppl:.2f} against the teacher's "
      f"{measured['teacher']['test'].ppl:.2f}, gap {gap['value']:.3f} ± {gap['standard_error']:.3f} (standard error, {measured['student']['test'].windows} windows, one seed, measured).")
if taxes:
    print(f"Ternary tax {np.mean([row['tax'] for row in taxes]):.4f} over {len(taxes)} seeds of {tax_steps} steps; {100 * fed:.0f} % of the layers' products with weights are fed by spikes.")
print(f"{time.perf_counter() - begin:.0f} s in this notebook; metrics and figures in {os.path.relpath(run.folder)}")
