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
# # ASNN-Goose v15 SpikingBrain: do the spikes carry information?
#
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://www.kaggle.com/code/new)
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/#upload=true)
# ![Python 3.11-3.13](https://img.shields.io/badge/python-3.11--3.13-blue)
# ![torch 2.10+](https://img.shields.io/badge/torch-2.10%2B-orange)
#
# A student can reach a low perplexity while its spikes are noise that the rest of the network has learned to ignore.
# This notebook asks the spikes themselves, at every site and layer: are the channels alive, what do they say about the teacher's representation, and what does the model lose when they are damaged?
# The published run failed such a gate with estimators that pass on noise: biased CKA of two white noises is 0.33 at 512 samples of 256 channels and 0.75 at 256 samples of 768, and plain counts of 20 bins over 128 tokens find 0.2 bit of information where there is none.
# Here every estimator has a null and an interval, is held out or unbiased, and the same gate is shown to refuse spikes that were made to fail it.
# A student that fails is fine-tuned, and validated again; both results stay.
#
# *Run All* needs no editing: the newest student that a distillation notebook left is taken, here or from an attached input.

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
# The only cell to edit. `None` means: the newest student, and what its run used.

# %% tags=["parameters"]
student = None  # "v14.4/cpu-seed42", the folder of a run, or None: the newest that a distillation notebook left
profile = None  # of the short run that makes a student where there is none: tiny, cpu, ref, t4
corpus = None  # pydocs, wikitext-2, wikitext-103, or a folder; None: that of the student's run
teacher = None  # a hub id or a folder; None: that of the student's run
tokens = None  # validation tokens that are recorded; None: 4,096 in profile tiny, else 20,480
remedy = None  # True, False; None: when the gate fails
remedy_steps = None  # optimiser steps of the remedy; None: 5 in profile tiny, else 250
damage_windows = 16  # windows on which interventions are scored
max_hours = None  # stop the remedy and save it after so many hours of this page; run again with the same name to go on
seed = 42
run_name = None  # None: <version>-<run> of the student; a finished run is never overwritten

# %% [markdown]
# ## Configuration and environment
# The student brings its own settings: recipe, corpus and teacher are those of the run that made it.

# %%
import dataclasses
import json
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are text here
import asnn_common as asnn  # noqa: E402

asnn.figure_style()  # one look for all notebooks, in colours that people with any colour vision tell apart
begin = time.perf_counter()
asnn.check_parameters(student=student, profile=profile, corpus=corpus, teacher=teacher, tokens=tokens, remedy=remedy,
                      remedy_steps=remedy_steps, damage_windows=damage_windows, max_hours=max_hours, seed=seed,
                      run_name=run_name)
asnn.select_profile(profile)
asnn.import_optional("scipy.stats")  # said now and not after the recording
device, _ = asnn.select_device()
asnn.show_preflight()

# %% [markdown]
# The student. Where no distillation notebook has left one, a short run makes one now, so that the page works; what it says is then about that run.

# %%
loaded = asnn.load_student(student, *asnn.select_profile(profile), without=("v15", "v16", "v17"), seed=seed, corpus=corpus, teacher=teacher)
brain, recipe, size, origin, task = loaded.student, loaded.recipe, loaded.profile, loaded.metrics, loaded.task
tokens = tokens or (4096 if size.name == "tiny" else 20_480)
print(loaded)

# %%
master = task.teacher
asnn.register_auto_classes()
own = asnn.import_optional("transformers").AutoTokenizer.from_pretrained(loaded.folder / "student").get_vocab()
asnn.require(master.tokenizer.get_vocab() == own, "teacher", master.name, f"{origin['teacher']['name']}, whose tokenizer the student was trained with; attach it and name its folder")
brain, teacher_model = brain.to(device), master.model.to(device)
if (task.corpus.hash, master.name) != (origin["corpus"]["hash"], origin["teacher"]["name"]):
    print(f"Note: corpus {task.corpus.name} {task.corpus.hash} and teacher {master.name} are not those of the student's run, {origin['corpus']['hash']} and {origin['teacher']['name']}.")
windows = asnn.WindowSampler(task.tokens["validation"], recipe.seq_len, seed)
count = min(windows.windows, -(-tokens // recipe.seq_len))
spread = np.linspace(0, windows.windows - 1, count).astype(int)  # over the whole split, in order
loader = [windows.gather(spread[i:i + 8])[0] for i in range(0, count, 8)]
settings = {"student": asnn.student_id(brain), "tokens": tokens, "seed": seed, "remedy": remedy, "remedy_steps": remedy_steps,
            "damage_windows": damage_windows, "recipe": dataclasses.asdict(recipe), "profile": dataclasses.asdict(size),
            "corpus_hash": task.corpus.hash, "teacher": master.name}
run = asnn.Run.open("v15", run_name or loaded.name, json.loads(json.dumps(settings)))
print(f"{run.note}; {count} validation windows of {recipe.seq_len} tokens; teacher {master.name}")

# %% [markdown]
# ## Estimators that can say no
# Before a student is judged, the judge is: spike trains made to pass and to fail go through the same code. They are built from the teacher's own states, so that the right answer is known.

# %%
validator = asnn.SpikingBrainValidator(device, max_tokens=tokens, seed=seed)


def constructed(record):
    """{name: record} of spike trains for which the answer is known."""
    generator = torch.Generator().manual_seed(seed)
    ends = asnn.span_ends(recipe.n_layer, len(record.hidden))
    states = {f"{i}.{kind}": record.hidden[t] for i, t in enumerate(ends) for kind in ("k", "v")}
    derived = {site: asnn.ternary_targets(h, h.shape[1]).to(torch.int8) for site, h in states.items()}
    noise = {site: (torch.rand(s.shape, generator=generator) < 0.4).to(torch.int8) * torch.where(torch.rand(s.shape, generator=generator) < 0.5, 1, -1).to(torch.int8)
             for site, s in derived.items()}
    trains = {"from the teacher": derived, "noise": noise, "of another sequence": {site: s.roll(len(s) // 2, 0) for site, s in derived.items()},
              "all dead": {site: torch.zeros_like(s) for site, s in derived.items()},
              "all saturated": {site: torch.where(s == 0, 1, s) for site, s in derived.items()},
              "one sign only": {site: (s > 0).to(torch.int8) for site, s in derived.items()}}
    levels = {site: 1 for site in derived}
    return {label: record._replace(spikes=spikes, control={}, levels=levels) for label, spikes in trains.items()}


quick = asnn.SpikingBrainValidator(device, max_channels=32, seed=seed, cka=asnn.RepresentationAnalyzer(shifts=20, seed=seed))
sample = asnn.record_spikes(brain, teacher_model, loader, max_tokens=min(tokens, 8192), control=False, seed=seed)
verdicts = {label: quick.judge(record, recipe.n_layer, progress=False) for label, record in constructed(sample).items()}
asnn.show_table([{"spikes": label, **{metric: f"{entry['value']:.3f} {'pass' if entry['pass'] else 'FAIL'}" for metric, entry in result.gate["metrics"].items()},
                  "biased CKA": f"{result.summary['CKA biased']:.3f}", "founders' MI, bits": f"{np.mean([s['founders MI'] for s in result.sites.values()]):.3f}",
                  "sign-locked": f"{100 * np.mean([s['sign-locked channels'] for s in result.sites.values()]):.0f} %", "verdict": result.gate["verdict"]}
                 for label, result in verdicts.items()])

# %% [markdown]
# `biased CKA` and `founders' MI` are the founders' way of counting: what they give for noise is in the second row, and for the information that is more than the 0.1 bit of this gate.
#
# ## Validation
# Spikes, teacher states and the spikes of an untrained student of the same shape, on the same tokens. Position 0 is left out of information and CKA: GPT-2 puts an outlier there that would decide the value alone.

# %%
about = {"corpus": f"{task.corpus.name} {task.corpus.hash}", "teacher": master.name, "run": f"{origin['version']}/{origin['run']}"}
first = validator.validate(brain, teacher_model, loader, meta=about)
print(f"{first.meta['tokens']:,} tokens in {first.meta['windows']} windows; {first.meta['seconds']:.0f} s, peak memory of this process {first.meta['peak memory, GiB']:.2f} GiB (measured)")
asnn.show_table(first.table())
if run.main:  # kept even if what follows is interrupted
    asnn.write_atomically(run.folder / "validation.json", json.dumps({"before": json.loads(first.to_json())}, indent=1))

# %%
def gate_table(result):
    return [{"metric": metric, "value": f"{m['value']:.3f}", "95 % interval": "[{:.3f}, {:.3f}]".format(*m["interval"]) if m["interval"] else "-",
             "null": "-" if m["null"] is None else f"{m['null']:.3f}", "threshold": str(m["threshold"]), "site nearest to failing": m.get("site", "-"),
             "sites passed": f"{m['sites passed']} of {m['sites']}" if "sites" in m else "-", "gate": "pass" if m["pass"] else "FAIL"}
            for metric, m in result.gate["metrics"].items()]


asnn.show_table(gate_table(first))
print(f"gate: {first.gate['verdict']}")

# %% [markdown]
# ## Health
# How often each channel fires, by site; the grey band is where the mean has to lie. Right, the mean rate by position in the window: a rate that drifts would mean that thresholds follow the length of the text.

# %%
def kinds_of(result):
    """{site without its layer: names}"""
    kinds = {}
    for site in result.sites:
        kinds.setdefault(site.split(".", 1)[-1], []).append(site)
    return kinds


def plot_health(result):
    kinds = kinds_of(result)
    columns = min(4, len(kinds) + 1)
    rows = -(-(len(kinds) + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.5 * columns, 3.2 * rows), squeeze=False)
    axes = list(axes.flat)
    for axis in axes[len(kinds) + 1:]:
        axis.remove()
    low, high = asnn.GATE["firing rate"]
    for axis, (kind, names) in zip(axes, kinds.items()):
        axis.axvspan(low, high, color="#dddddd", label=f"gate: mean in [{low}, {high}]")
        for site in names:
            axis.hist(result.arrays[site]["rate"], bins=np.linspace(0, 1, 41), histtype="step", label=f"{site}: mean {result.sites[site]['firing rate']:.2f}")
        axis.set(title=f"firing rate of channels, {kind}", xlabel="share of tokens with a spike", ylabel="channels", xlim=(0, 1),
                 ylim=(0, (1.25 + 0.12 * len(names)) * axis.get_ylim()[1]))
        axis.legend(fontsize=7, loc="upper right")
    last = axes[len(kinds)]
    layers = list(dict.fromkeys(site.split(".")[0] for site in result.sites))
    for kind, names in kinds.items():  # a colour for a layer, as in the other panels, a line for a site
        line = dict(zip(kinds, ("-", "--", ":", "-.") * len(kinds)))[kind]
        for site in names:
            last.plot(result.arrays[site]["by position"], line, color=f"C{layers.index(site.split('.')[0])}", linewidth=0.9, label=site)
    last.set(title="firing rate by position", xlabel="position in the window (tokens)", ylabel="mean rate", ylim=(0, 1))
    if len(result.sites) <= 10:
        last.legend(fontsize=7, ncol=2, loc="upper right")
    figure.tight_layout()
    return figure


run.show(plot_health(first), "health")

# %% [markdown]
# ## Information
# Bits that a held-out linear probe on the teacher's state finds in each channel, a lower bound, against the same probe fitted to circularly shifted spikes. The dashed line is the gate.

# %%
def plot_information(result):
    sites = list(result.sites)
    figure, axis = plt.subplots(figsize=(max(8, 0.55 * len(sites)), 3.6))
    for shift, key, colour, label in ((-0.18, "mutual information", asnn.COLOURS["sky"], "channels"), (0.18, "null", "#999999", "null: shifted spikes")):
        boxes = axis.boxplot([result.arrays[site][key] for site in sites], positions=np.arange(len(sites)) + shift, widths=0.3, patch_artist=True,
                             flierprops={"marker": ".", "markersize": 2, "markeredgecolor": colour}, medianprops={"color": "black"}, manage_ticks=False)
        for patch in boxes["boxes"]:
            patch.set(facecolor=colour, alpha=0.6, label=label)
            label = None
    axis.plot(range(len(sites)), [result.sites[site]["entropy"] for site in sites], "_", color=asnn.COLOURS["purple"], markersize=20, markeredgewidth=2,
              label="mean entropy H(S)")
    axis.axhline(asnn.GATE["mutual information"], color=asnn.COLOURS["vermillion"], linestyle="--", linewidth=1.2, label=f"gate: {asnn.GATE['mutual information']} bit")
    axis.set(title="I(spike; teacher state), held-out probe bound", xlabel="layer and site", ylabel="bits per channel",
             ylim=(None, 1.1 * max(row["entropy"] for row in result.sites.values()) + 0.3))
    axis.set_xticks(range(len(sites)), sites, rotation=90 if len(sites) > 8 else 0)
    axis.grid(axis="x", visible=False)
    axis.legend(ncol=4, loc="upper center")
    figure.tight_layout()
    return figure


run.show(plot_information(first), "information")

# %% [markdown]
# ## Representation
# Left, unbiased CKA of each site with each teacher layer; a frame marks the layer that the student's layer stands for. Right, that value with its interval, the untrained student, the null, and the founders' biased value with what it gives for noise.

# %%
def plot_cka(result):
    sites, layers = list(result.sites), result.meta["heat_layers"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, max(4.2, 0.32 * len(sites))), width_ratios=(1, 1.2))
    left.grid(False)
    image = left.imshow(result.heat, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for i, site in enumerate(sites):
        for j in range(len(layers)):
            left.text(j, i, f"{result.heat[i, j]:.2f}", ha="center", va="center", fontsize=8, color="white" if result.heat[i, j] < 0.6 else "black")
        for colour, width in (("black", 2.5), ("white", 1.0)):
            corner = layers.index(result.meta["layer_of"][site]) - 0.45, i - 0.42
            left.add_patch(plt.Rectangle(corner, 0.9, 0.84, fill=False, edgecolor=colour, linewidth=width))
    left.set(title="unbiased CKA", xlabel="teacher layer", ylabel="layer and site of the student")
    left.set_yticks(range(len(sites)), sites)
    left.set_xticks(range(len(layers)), layers)
    figure.colorbar(image, ax=left, label="CKA")
    place, rows = np.arange(len(sites)), [result.sites[site] for site in sites]
    values = np.array([row["CKA"] for row in rows])
    spread = np.abs(np.array([row["CKA interval"] for row in rows]).T - values)
    right.errorbar(values, place, xerr=spread, fmt="o", label="unbiased, 95 % interval")
    for key, marker, label in (("CKA control", "s", "untrained student"), ("CKA null", "|", "null, 95 % of it below"), ("CKA biased", "x", "biased"),
                               ("CKA biased shuffled", "1", "biased, tokens shuffled"), ("CKA biased noise", "+", "biased, two white noises")):
        right.plot([row[key] for row in rows], place, marker, linestyle="none", label=label)
    right.axvline(asnn.GATE["CKA"], color="#444444", linestyle="--", linewidth=1.2, label=f"gate: {asnn.GATE['CKA']}")
    right.set(title="CKA with the mapped teacher layer", xlabel="CKA", xlim=(-0.05, 1), ylim=(-0.6, len(sites) - 0.4), yticks=place)
    right.set_yticklabels(sites)
    right.invert_yaxis()
    right.legend(ncol=3, loc="upper center", bbox_to_anchor=(0.5, -1 / figure.get_figheight() + 0.05))
    figure.tight_layout()
    return figure


run.show(plot_cka(first), "cka")

# %% [markdown]
# ## A look at the spikes
# Forty channels over the first tokens of a validation window, in the manner of an electrode recording: orange fires up, blue down, white is silent. Channels are ordered by their rate.

# %%
def plot_raster(model, ids, site, channels=40):
    with torch.no_grad(), asnn.SpikeCapture(model, ids.numel(), [site]) as capture:
        model.eval().base_model(ids.to(device), use_cache=False)
    spikes = torch.sign(capture.spikes()[site])  # (T, C), counts as their sign
    rate = (spikes != 0).float().mean(0)
    chosen = rate.argsort(descending=True)[torch.linspace(0, len(rate) - 1, min(channels, len(rate))).long()]
    figure, axis = plt.subplots(figsize=(13, 5))
    axis.grid(False)
    for sign, colour in ((1, asnn.COLOURS["vermillion"]), (-1, asnn.COLOURS["blue"])):
        where = [torch.where(spikes[:, c] == sign)[0].numpy() for c in chosen]
        axis.eventplot(where, colors=colour, linelengths=0.85, linewidths=2)
    axis.set(title=f"spikes of {site}, {len(chosen)} channels", ylabel="channel, busiest below", xlabel="token", xlim=(-0.5, len(spikes) - 0.5), ylim=(-0.7, len(chosen) - 0.3))
    axis.set_xticks(range(len(spikes)), [repr(master.tokenizer.decode([int(i)]))[1:-1] for i in ids[0]], rotation=90, fontsize=7)
    return figure


sentence = loader[0][:1, :48]
for site in [f"{recipe.n_layer // 2}.{kind}" for kind in ("k", "v")]:
    run.show(plot_raster(brain, sentence, site), f"raster-{site.replace('.', '-')}")

# %% [markdown]
# ## Interventions
# A correlation says that spikes go with the teacher's states; damage says whether the model uses them. Each row replaces the spikes of one place and keeps everything else. `mean` leaves the rate and takes all timing, `shuffle` permutes each channel's spikes in time within a window, `zero` silences.

# %%
few = spread[np.linspace(0, count - 1, min(count, damage_windows)).astype(int)]
damaged_loader = [windows.gather(few[i:i + 8])[0] for i in range(0, len(few), 8)]
unigram = torch.from_numpy(np.bincount(task.tokens["train"], minlength=brain.config.vocab_size))
groups = [f"all.{kind}" for kind in kinds_of(first) if f"0.{kind}" in first.sites]
widths, chances = (1, 2, 4, 8, 16, 32), (0.05, 0.1, 0.2, 0.3, 0.5)
coarse = asnn.intervene(brain, damaged_loader, [asnn.Intervention(kind) for kind in ("mean", "shuffle", "zero")], unigram=unigram, seed=seed)
fine = asnn.intervene(brain, damaged_loader, [*(asnn.Intervention("jitter", n) for n in widths), *(asnn.Intervention("delay", n) for n in widths[:4]),
                                              *(asnn.Intervention("flip", p) for p in chances)], groups, unigram=unigram, seed=seed)
damage = coarse + fine[2:]
places = {}
for row in damage[2:]:
    if row["intervention"] in ("mean", "shuffle", "zero"):
        label = f"{row['layer']}.{row['site']}" if row["layer"] != "-" else row["site"]
        places.setdefault(label, {"place": label})[row["intervention"]] = f"{row['ppl']:.1f} ({row['rise']:.2f}x ± {row['standard error']:.2f})"
asnn.show_table(places.values())
print(f"PPL (times the intact one ± standard error over {len(few)} paired windows), {damage[0]['tokens']:,} tokens: "
      f"intact {damage[0]['ppl']:.1f}, unigram model {damage[1]['ppl']:.1f}")

# %%
def plot_damage(rows):
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.6), sharey=True)
    for axis, kind, label in zip(axes, ("jitter", "delay", "flip"), ("moved by at most so many tokens", "delayed by at most so many tokens", "probability of a turned sign")):
        for group, marker in zip(groups, "os^Dv<>ph*"):
            found = [row for row in rows if row["intervention"] == kind and row["layer"] == "all" and f"all.{row['site']}" == group]
            axis.errorbar([row["amount"] for row in found], [row["ppl"] for row in found], yerr=[row["standard error"] * rows[0]["ppl"] for row in found], marker=marker, label=group)
        for row, style in ((rows[0], "-"), (rows[1], "--")):
            axis.axhline(row["ppl"], color="#666666", linestyle=style, linewidth=1, label=row["intervention"])
        axis.set(title=kind, xlabel=label, yscale="log")
        if kind != "flip":
            axis.set_xscale("log", base=2)
            asnn.plain_log(axis.xaxis, widths if kind == "jitter" else widths[:4])
    asnn.plain_log(axes[0].yaxis)
    axes[0].set_ylabel("PPL, validation")
    axes[2].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


run.show(plot_damage(damage), "interventions")

# %% [markdown]
# ## Remedy
# A student that fails is fine-tuned with those parts of the founders' remedy that what failed calls for, and validated again. Each part can be switched in `asnn.Remediation`; the perplexity may rise by 2 % at most, for a gate passed by ruining the model is none.

# %%
def perplexity(model):
    return asnn.evaluate(model, task.tokens["validation"], recipe.seq_len, windows=size.final_windows).ppl


def again(model):
    return validator.validate(model, teacher_model, loader, meta=about)


final, left, remedied, unfinished = first, brain, None, ""
if remedy or remedy is None and first.gate["verdict"] == "failed":
    steps = {"steps": remedy_steps or (5 if size.name == "tiny" else 250)}
    parts = asnn.Remediation.for_gate(first.gate, **steps) if first.gate["verdict"] == "failed" else asnn.Remediation(**steps)
    print(parts)
    sampler = asnn.WindowSampler(task.tokens["train"], recipe.seq_len, recipe.seed + 1)
    # What came before counts too: the session ends when its hours do.
    hours_left = None if max_hours is None else max(1e-6, max_hours - (time.perf_counter() - begin) / 3600)
    remedied = asnn.remediate(brain, teacher_model, sampler, recipe, again, perplexity, parts, before=first, folder=run.folder, max_hours=hours_left)
    if not remedied.training.finished:
        unfinished = f"The remedy is unfinished, {remedied.training.stopped} at step {remedied.training.step} of {parts.steps}: {asnn.how_to_go_on()}."
        remedied = None
        print(unfinished)
if remedied:
    if remedied.after.gate["verdict"] == "passed":
        final, left = remedied.after, remedied.student
    asnn.show_table(remedied.table())
    print(f"gate after the remedy: {remedied.after.gate['verdict']}; {remedied.training.step} steps in {remedied.training.seconds:.0f} s"
          + ("" if left is not brain else "; the student before it goes on, ungated or not as it was"))
elif not unfinished:
    print("no remedy: " + ("switched off" if remedy is False else "the gate was passed"))

# %%
if remedied:
    asnn.show_table(remedied.after.table())
    run.show(plot_health(remedied.after), "health-after")

# %% [markdown]
# ## Gate
# What v16 and v17 read: an efficiency claim for a student without a passed gate is printed as "ungated".

# %%
other = None if remedied is None else first.gate if left is not brain else remedied.after.gate
gate = {**final.gate, "other": other, "folder": f"{run.folder.parent.name}/{run.folder.name}" if left is not brain else f"{loaded.folder.parent.name}/{loaded.folder.name}"}
if run.main:
    asnn.write_atomically(run.folder / "gate.json", json.dumps(gate, indent=1, sort_keys=True))
    asnn.write_atomically(run.folder / "validation.json", json.dumps({"before": json.loads(first.to_json()), "after": json.loads(remedied.after.to_json()) if remedied else None,
                                                                      "interventions": damage}, indent=1))
shared = run.folder.parent / "gate.json"
if shared.is_file() and json.loads(shared.read_text())["student"] != gate["student"]:
    print(f"the gate of student {json.loads(shared.read_text())['student']} stays in the folder of its run; {shared.name} is now that of {gate['student']}")
asnn.show_table(gate_table(final))
print(f"gate of student {gate['student']}: {gate['verdict']}")

# %% [markdown]
# ## Saved artefacts
# The metrics of the student that goes on, the gate, and both validations in full. The student is saved again only when it has changed. A run whose remedy is unfinished has no metrics yet, and its gate is that of the student before it.

# %%
metrics = {**origin, "version": f"v15 of {origin['version']}", "run": run.folder.name, "gate": gate, "notebook_seconds": time.perf_counter() - begin}
if left is not brain:
    measured = {who: {split: asnn.evaluate(model, task.tokens[split], recipe.seq_len, windows=size.final_windows,
                                           size=None if size.final_windows else task.sizes[split]) for split in ("validation", "test")}
                for who, model in (("teacher", teacher_model), ("student", left))}
    metrics = {**asnn.run_metrics(run, task, size, left, remedied.training, measured), "version": f"v15 of {origin['version']}", "gate": gate,
               "remedied_from": {"run": f"{origin['version']}/{origin['run']}", "training": origin["training"]}, "notebook_seconds": time.perf_counter() - begin}
if not unfinished:
    run.finish(metrics, left.cpu() if left is not brain else None, master.tokenizer)
if run.main:
    asnn.write_atomically(shared, json.dumps(gate, indent=1, sort_keys=True))

# %% [markdown]
# ## Contract
# Facts that hold in every profile and on every machine; continuous integration compares their output.

# %% tags=["nbval-check-output"]
with torch.no_grad(), asnn.SpikeCapture(left, sentence.numel()) as capture:
    left.base_model(sentence.to(left.device), use_cache=False)
ternary = {site: spikes for site, spikes in capture.spikes().items() if asnn.spike_modules(left)[site].levels == 1}
print("spike alphabet:", sorted({int(value) for spikes in ternary.values() for value in spikes.unique()}))
print("hooks left behind:", sum(len(module._forward_hooks) for module in left.modules()))
for label, result in verdicts.items():
    print(f"spikes {label}:", "pass" if result.gate["verdict"] == "passed" else "fail")

# %% tags=["nbval-check-output"]
saved = json.loads((run.folder.parent / "gate.json").read_text())
print("gate file written:", saved["student"] == asnn.student_id(left), sorted(set(saved["metrics"]) - {"PPL rise"}))
print("each metric has a value, an interval, a threshold and a verdict:",
      all({"value", "interval", "null", "threshold", "pass"} <= set(entry) for entry in saved["metrics"].values()))
print("the gate says what the metrics say:", saved["verdict"] == ("passed" if all(entry["pass"] for entry in saved["metrics"].values()) else "failed"))
print("read back:", asnn.gate_status(left)[0] == (saved["verdict"] == "passed" and saved["tokens"] >= asnn.GATE_TOKENS))

# %% tags=["nbval-check-output"]
print("saved:", sorted({"gate.json", "validation.json", "metrics.json", "config.json", "env.json", "figures"} & {path.name for path in run.folder.glob("*")}))

# %% [markdown]
# ## Summary

# %%
def in_words(result, rows):
    s, gate, sites = result.summary, result.gate["metrics"], result.sites.values()
    at = lambda kind, group, amount=0.0: next(row for row in rows if (row["intervention"], f"all.{row['site']}", row["layer"], row["amount"])  # noqa: E731
                                              == (kind, group, "all", amount))
    times = lambda row: f"{row['rise']:.2f} ± {2 * row['standard error']:.2f}"  # noqa: E731
    group = max(groups, key=lambda name: at("shuffle", name)["rise"])
    shuffle, delay = at("shuffle", group), at("delay", group, 8.0)
    beyond = np.mean([row["beyond teacher"] - row["beyond teacher null"] for row in sites])
    matters = shuffle["rise"] - 2 * shuffle["standard error"] > 1
    return " ".join([
        f"Over {s['tokens']:,} tokens and {s['sites']} sites the gate was {s['verdict']}" + (f": {', '.join(s['failed'])} failed." if s["failed"] else "."),
        f"A channel's spikes hold {s['mutual information']:.2f} bit about the teacher's state on average, by a probe that bounds it from below (entropy {s['entropy']:.2f} bit; "
        f"weakest site {gate['mutual information']['value']:.2f}); {100 * np.mean([row['informative channels'] for row in sites]):.0f} % of the channels tell more than spikes of other tokens do, at a false discovery rate of 5 %.",
        f"Unbiased CKA with the mapped teacher layer is {s['CKA']:.2f} on average, {np.mean([row['CKA control'] for row in sites]):.2f} for the same student untrained.",
        f"In {group}, all layers at once, permuting each channel's spikes in time multiplies perplexity by {times(shuffle)} (two standard errors), delays of up to 8 tokens by {times(delay)}, channel means by "
        f"{times(at('mean', group))}, silence by {at('zero', group)['rise']:.2f}: " + ("which channels fire at which token matters to the model." if matters else "which channels fire at which token was not shown to matter to the model."),
        f"Not shown: that spikes know anything of the next token that the teacher's state does not (the estimate, {beyond:+.4f} bit per channel above its null, is no bound), that the code is efficient "
        f"(participation ratio {s['participation ratio']:.0f} of {np.mean([row['channels'] for row in sites]):.0f} channels), or anything about other corpora."])


print(in_words(first, damage))
if remedied:
    print(f"After the remedy the gate was {remedied.after.gate['verdict']}" + "".join(f", {name} failed" for name in remedied.after.summary["failed"])
          + f"; validation PPL {remedied.ppl_before:.2f} -> {remedied.ppl_after:.2f}. The numbers above are of the student before it.")
if unfinished:
    print(unfinished)
print(f"{time.perf_counter() - begin:.0f} s in this notebook; gate in {os.path.relpath(shared)}")
