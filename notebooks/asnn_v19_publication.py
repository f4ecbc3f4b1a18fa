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
# # ASNN-Goose v19: the paper and its package
#
# <a href="https://kaggle.com/kernels/welcome?src=https://github.com/OWNER/REPO/blob/main/
# notebooks/asnn_v19_publication.ipynb"><img alt="Open in Kaggle"
# src="https://kaggle.com/static/images/open-in-kaggle.svg"></a>
# <a href="https://colab.research.google.com/github/OWNER/REPO/blob/main/
# notebooks/asnn_v19_publication.ipynb"><img alt="Open in Colab"
# src="https://colab.research.google.com/assets/colab-badge.svg"></a>
#
# **Needs** `asnn_common.py` and `outputs/reference`. Nothing is trained or measured: a minute and
# 1 GB anywhere. With LaTeX (`tectonic` or `latexmk`) the paper is compiled.
# *Run All* needs no editing. The last line you should see begins with `Finished: v19`.
#
# Every number of the paper is a macro that is made from a field of a JSON file which the code that
# measured it has written. What nobody measured reads "not measured".

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
# The only cell to edit.

# %% tags=["parameters"]
compile_paper = None  # None: where tectonic or latexmk is installed; False: never
run_name = None  # of the folder below outputs/v19; None: paper

# %% [markdown]
# ## Sources
# What the pages v14.3 to v18 wrote, each file under a name of its own.

# %%
import hashlib
import json
import re
import shutil
import subprocess
import time
import zipfile

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

MISSING = r"\textit{not measured}"
HEADLINE = [f"{kind}_{what}" for kind, names in {
    "tax": "kv sites_600 sites_600_one_step sites_3000 sites_3000_one_step", "gap": "600 3000",
    "recall": "1x 4x", "generation": "gap", "train": "step_over_v14_4", "decode":
    "over_llamacpp_q8_same_size over_llamacpp_q4_same_size over_llamacpp_q8_gpt2 memory_mib "
    "share_of_byte_limit skipping_alone latency_8192_over_128", "smollm2":
    "gap_pydocs published_gap_pydocs tax_sites", "ablation": "p_transfer p_alignment p_delta p_muon"
    }.items() for what in names.split()]
RUNS = {f"{name}": f"ref-{name}" for name in (
    "v14.3-cumsum", "v14.3-published", "v14.3", "v14.4", "v14.4-3000", "v14.4-sites-3000",
    "v14.4-rates-3000")}


def read_sources(folder):
    """{name: content} of files below outputs/reference; {} in the place of a missing one."""
    def read(name):
        path = folder / name
        return json.loads(path.read_text()) if path.is_file() else {}

    def lines(name):
        path = folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    ladder = {}
    for row in lines("ladder.jsonl"):
        ladder.setdefault(row["row"], []).append(row["test"]["gap"])
    ablations = read("v18/effects.json")
    group = max(ablations, default=None, key=lambda name: (name.startswith("ref"), len([
        row for row in ablations[name]["rows"] if "p" in row])))  # what v18 draws, too
    return {
        "headline": read("headline.json"), "runs": {k: read(f"{v}.json") for k, v in RUNS.items()},
        "ladder": {row: {"gap": float(np.mean(gaps)), "seeds": len(gaps)}
                   for row, gaps in ladder.items()},
        "dial": {f"{row['row']}, {row['levels']}": row for row in lines("dial.jsonl")},
        "gate": {path.stem: read(path.relative_to(folder)) for path in
                 sorted((folder / "v15").glob("*.json"))},
        "v16": read("v16.json"), "v17": read("v17/efficiency.json"),
        "bench": read("v17/bench.json"), "ablations": ablations,
        "shown": {"group": group} if group else {},
        "cells": lines("ablations.jsonl"),
        "recipes": {name: vars(recipe) for name, recipe in asnn.RECIPES.items()}}


def at(sources, path):
    """The field at "source|key|key"; None where it is not there."""
    for key in path.split("|"):
        if isinstance(sources, list):
            sources = sources[int(key)] if int(key) < len(sources) else None
        else:
            sources = sources.get(key) if isinstance(sources, dict) else None
    return sources


asnn.figure_style()
begin = time.perf_counter()
run = asnn.Run.open("v19", run_name or "paper", {"page": "v19"})
places = [run.folder.parent.parent / "reference", Path(asnn.__file__).parent / "outputs/reference"]
reference = next((place for place in places if (place / "headline.json").is_file()), places[1])
sources, paper = read_sources(reference), run.folder
print(f"{run.note}; {sum(map(bool, sources.values()))} of {len(sources)} sources are there")

# %% [markdown]
# ## Numbers
# A macro for each field: its name, the field, its format. Those of `headline.json` come with their
# interval and seeds.

# %%
DIGITS = "Zero One Two Three Four Five Six Seven Eight Nine".split()
GATES = {"mutual information": "Mi", "CKA": "Cka", "dead channels": "Dead",
         "saturated channels": "Saturated", "firing rate": "Rate"}
FIELDS = [
    ("published ppl", "recipes|v14.3-published|published_ppl", ".2f"),
    ("t4 steps", "recipes|v14.3-published|distill_steps", ",d"),
    ("steps", "runs|v14.4|training|steps", ",d"),
    ("window", "runs|v14.4|student|test|seq_len", "d"),
    ("long steps", "runs|v14.4-3000|training|steps", ",d"),
    ("test tokens", "runs|v14.4|student|test|tokens", ",d"),
    ("train tokens", "runs|v14.4|corpus|tokens|train", ",d"),
    ("windows", "runs|v14.4|student|test|windows", ",d"),
    ("teacher ppl", "runs|v14.4|teacher|test|ppl", ".2f"),
    ("teacher parameters", "runs|v14.4|teacher|parameters", ",d"),
    ("student parameters", "runs|v14.4|student|parameters", ",d"),
    ("gap cumsum", "ladder|published: cumsum recurrence|gap", ".2f"),
    ("gap exact", "ladder|exact recurrence|gap", ".2f"),
    ("gap repaired", "ladder|+ decays spread, mixes in [0.5, 1], clipped estimator|gap", ".2f"),
    ("gap weights", "ladder|+ weights of the teacher|gap", ".2f"),
    ("gap matrix", "ladder|+ matrix state|gap", ".2f"),
    ("gap delta", "ladder|+ delta rule|gap", ".2f"), ("gap muon", "ladder|+ Muon|gap", ".2f"),
    ("gap ours", "ladder|+ layerwise alignment first (v14.4)|gap", ".3f"),
    ("gap dense twin", "ladder|dense twin of v14.4|gap", ".3f"),
    ("gap vector", "ladder|vector state (v14.4-vector)|gap", ".2f"),
    ("gap sites", "ladder|all layer sites (v14.4-sites)|gap", ".3f"),
    ("gap rates", "ladder|all layer sites, rates held (v14.4-rates)|gap", ".3f"),
    ("gap integer", "ladder|integer:3 keys and values in v14.4|gap", ".3f"),
    ("gap channel", "ladder|alpha and amplitude per channel in v14.4|gap", ".3f"),
    *((f"long {name}", f"runs|{row}|gap|test|value", ".3f") for name, row in (
        ("ours", "v14.4-3000"), ("sites", "v14.4-sites-3000"), ("rates", "v14.4-rates-3000"))),
    ("gap unfloored", "dial|all sites, before thresholds had a floor, 2 trains|gap", ".3f"),
    ("rows read", "dial|all sites, floor, rotated mix_out and ffn_hidden, 2 trains|rows read",
     ".0%"),
    *((f"{who} {GATES[metric]} {part}", f"gate|{stem}|{when}|gate|metrics|{metric}|{part}", ".3f")
      for who, stem, when in (("vthree", "v14.3", "before"),
                              ("rates", "v14.4-rates, 3000 steps", "before"),
                              ("sites", "v14.4-sites, 3000 steps", "before"))
      for metric in GATES for part in ("value", "null") if part == "value" or metric in
      ("mutual information", "CKA")),
    ("gate tokens", "gate|v14.3|before|gate|tokens", ",d"),
    ("remedy rise", "gate|v14.4-sites, 3000 steps|after|gate|PPL rise", ".1%"),
    ("biased cka noise", "gate|v14.3|before|sites|0.k|CKA biased noise", ".2f"),
    ("founders mi", "gate|v14.3|before|sites|0.k|founders MI", ".2f"),
    ("founders mi noise", "gate|v14.3|before|sites|0.k|founders MI noise", ".2f"),
    ("beyond teacher", "gate|v14.3|before|sites|0.k|beyond teacher", ".3f"),
    ("speed parameters", "v16|parameters", ",d"), ("hardware", "v17|hardware", "s"),
    ("gate", "v17|gate", "s"), ("ablation group", "shown|group", "s"),
    ("context", "v17|context", "d"), ("estimated joules", "v17|joules, estimated|student, "
                                      "gather_int8|idealised, with DRAM and head", ".3f"),
    ("gpt joules", "v17|joules, estimated|GPT-2, int8|idealised, with DRAM and head", ".3f")]


def macro(name):
    r"""The name of a value's macro: tax_sites_600 is \VTaxSitesSixZeroZero."""
    spelt = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", name)
    return "\\V" + "".join(word[0].upper() + word[1:] for word in re.split(r"\W+|_", spelt) if word)


def shown(value, form):
    """A value as LaTeX shows it."""
    text = format(value, form).replace("%", r"\%").replace("&", r"\&").replace("_", r"\_")
    text = re.sub(r"(.*)e([+-])0?(\d+)",
                  lambda m: rf"${m[1]}\times10^{{{m[2].strip('+')}{m[3]}}}$", text)
    return re.sub("^-", "$-$", text)


def numbers(sources):
    """{macro: {"text", "field", "format"}} of all values that there are."""
    fields = list(FIELDS)
    for name in HEADLINE:
        forms = {"decode_memory_mib": ".0f", "decode": ".2f", "ablation": ".2g"}
        form = forms.get(name) or forms.get(name.split("_")[0], ".3f")
        fields += [(name + end, f"headline|{name}|{part}", form) for end, part in (
            ("", "value"), ("_low", "low"), ("_high", "high"))]
        fields.append((name + "_seeds", f"headline|{name}|seeds", "d"))
    found = [(macro(name), field, form, at(sources, field)) for name, field, form in fields]
    return {name: {"text": shown(value, form), "field": field, "format": form}
            for name, field, form, value in found if value is not None}


def definitions_of(values, tex):
    r"""The \newcommands of numbers.tex; what `tex` uses and nobody measured says so."""
    used = set(re.findall(r"\\V[A-Z]\w*", tex)) - set(values)
    lines = {name: value["text"] for name, value in values.items()} | dict.fromkeys(used, MISSING)
    return "".join(rf"\newcommand{{{name}}}{{{lines[name]}\xspace}}" + "\n"
                   for name in sorted(lines))


def typed_numbers(tex):
    """Digits that somebody typed, with what stands around them. Allowed: equations without decimal
    points, arguments of TeX itself, lengths, names of files, labels and citations."""
    arguments = r"(documentclass|usepackage|includegraphics|geometry)(\[.*?\])?\{.*?\}"
    tex = re.sub(r"(?m)(?<!\\)%.*", "", tex)
    tex = re.sub(r"\\begin\{equation\}.*?\\end\{equation\}", lambda found: found[0] if re.search(
        r"\d[.,]\d", found[0]) else "", tex, flags=re.DOTALL)
    tex = re.sub(rf"\\{arguments}|\\setlength\{{.*?\}}\{{.*?\}}|#\d|"
                 r"\\(ref|label|cite[pt]?|input|IfFileExists|fig|tab)\{.*?\}|"
                 r"\\newcommand\{\\\w+\}\[\d\]|\d*\.?\d*\\(linewidth|baselineskip)", "", tex)
    return [tex[max(0, m.start() - 20):m.end() + 20] for m in re.finditer(r"\d[\d.,]*", tex)]


values = numbers(sources)
print(f"{len(values)} numbers, {sum(name not in sources['headline'] for name in HEADLINE)} of "
      f"{len(HEADLINE)} headline names have no value yet")

# %% [markdown]
# ## Tables
# The same rows here and in LaTeX; each column says whether it was measured.

# %%
def interval(row, form=".3f"):
    """A claim with its interval."""
    return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def main_table(sources):
    """What a user would run: quality, size, and what a token costs, batch 1."""
    if not (sources["bench"] and sources["v17"]):
        return []
    v17, rows, quality = sources["v17"], [], sources["v16"].get("quality", {})
    by_name = {row["system"]: row for row in sources["bench"]["rows"] if "decode" in row
               and (row["batch"], row["context"]) == (1, v17["context"])}
    skipped, macs = (sum(row[key] for row in v17["operations"]) for key in ("skipped", "MACs"))
    for name, row in sorted(by_name.items(), key=lambda item: -item[1]["decode"]["median"]):
        plain = name.removesuffix(", compiled")
        student, gap = plain.startswith("student"), v17["gaps"].get(plain)
        whole = by_name["student, dense" if student else name.replace("int8", "SDPA")]
        ppl = quality.get(plain.removeprefix("student, "), {}).get("ppl")
        known = [f"{value:{form}}" for value, form in ((ppl, ".1f"), (gap, ".3f")) if value]
        joules = v17["joules, estimated"].get(plain)
        rows.append({
            "system": name, "PPL, gap (measured)": ", ".join(known) or "not trained",
            "parameters, M": f"{whole['memory']['weights'] / 4e6:.0f}",
            "MACs skipped (measured)": f"{100 * skipped / macs * ('gather' in name):.0f} %",
            "ms/token (measured)": f"{1e3 * row['decode']['median']:.1f}",
            "MiB (measured)": f"{sum(row['memory'].values()) / 2**20:.0f}",
            "mJ/token (estimated)":
                f"{1e3 * joules['idealised, with DRAM and head']:.0f}" if joules else "-"})
    return rows


def tables(sources):
    """{name: rows} of all tables of the paper; one without data has no rows."""
    made = {"main": main_table(sources)}
    made["ladder"] = [{"recipe": row, "gap (measured)": f"{found['gap']:.3f}",
                       "seeds": found["seeds"]} for row, found in
                      sorted(sources["ladder"].items(), key=lambda item: -item[1]["gap"])]
    made["taxes"] = [{"what": name, "value [95 % interval] (measured)": interval(row),
                      "seeds": row["seeds"]} for name, row in sources["headline"].items()
                     if name.startswith(("tax", "gap", "generation", "recall", "smollm2", "train"))]
    made["decode"] = [{"what": name, "value [95 % interval] (measured)": interval(row, ".2f")}
                      for name, row in sources["headline"].items() if name.startswith("decode")]
    made["gate"] = [{
        "student": stem + (", remedied" if when == "after" else ""),
        **{metric: f"{gate['metrics'][metric]['value']:.3f}" + (
            "" if gate["metrics"][metric]["pass"] else " (fails)") for metric in GATES},
        "gate": gate["verdict"]} for stem, found in sources["gate"].items()
        for when in ("before", "after") for gate in [(found.get(when) or {}).get("gate")] if gate]
    group = sources["ablations"].get(sources["shown"].get("group"), {})
    made["ablations"] = [{
        "family": row["family"], "row": row["says"], "seeds": row["seeds"],
        "log PPL [95 %] (measured)": "{effect:+.4f} [{low:+.4f}, {high:+.4f}]".format(**row)
        if "p" in row else "-", "p, Holm": f"{row['p_holm']:.2g}" if "p" in row else "-",
        "verdict": row["verdict"]} for row in group.get("rows", ())]
    return made


def to_latex(rows):
    """A tabular of booktabs, or a sentence where there is nothing to show."""
    if not rows:
        return MISSING + "\n"
    style = pd.DataFrame(rows).style.hide(axis="index").format(escape="latex")
    narrow = r">{\raggedleft\arraybackslash}p{1.85cm}"  # so that long heads are broken
    columns = "l" + (len(rows[0]) - 1) * (narrow if len(rows[0]) > 6 else "l")
    return style.format_index(escape="latex", axis=1).to_latex(hrules=True, column_format=columns)


made = tables(sources)
for name, rows in made.items():
    print(f"{name}: {len(rows)} rows")
    asnn.show_table(rows)

# %% [markdown]
# ## Figures
# Vectors for the paper, PNG for everywhere else, in the colours of all pages.

# %%
def points(rows, xlabel):
    """Points {label: (value, low, high)} with their intervals, and a line where nothing changes."""
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.22 * len(rows)), layout="constrained")
    for y, (value, low, high) in enumerate(reversed(rows.values())):
        axes.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", capsize=3,
                      color=asnn.COLOURS["blue"])
    axes.set_yticks(range(len(rows)), [label.replace("_", " ") for label in rows][::-1])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel=xlabel)
    return figure


def damage(interventions):
    """What it costs to take time or sign out of the spikes of one site in all layers."""
    frame = pd.DataFrame([row for row in interventions if row["layer"] == "all"])
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained", sharey=True)
    for axes, kind, label in zip(panels, ("jitter", "flip"), ("jitter, tokens", "signs turned")):
        for site in ("k", "v", "mix_in.v", "mix_out", "ffn_in", "ffn_hidden"):
            part = frame[(frame["intervention"] == kind) & (frame["site"] == site)]
            axes.errorbar(part["amount"], part["rise"], part["standard error"], fmt="o-",
                          label=site)
        axes.set(xlabel=label, yscale="log")
    panels[0].set_ylabel("PPL over intact PPL")
    panels[1].legend(ncol=2)
    return figure


def contexts(rows):
    """Milliseconds per token over the context, batch 1."""
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    frame = pd.DataFrame([{"system": r["system"], "context": r["context"], **{
        key: 1e3 * r["decode"][key] for key in ("median", "low", "high")}}
        for r in rows if r["batch"] == 1 and "decode" in r])
    for system, part in frame.groupby("system", sort=False):
        if len(part) > 1:
            part = part.sort_values("context")
            line, = axes.plot(part["context"], part["median"], "o-", label=system)
            axes.fill_between(part["context"], part["low"], part["high"], alpha=0.2,
                              color=line.get_color())
    axes.set(xscale="log", ylim=(0, None), xlabel="context, tokens", ylabel="ms per token")
    axes.legend()
    return figure


def figures(sources):
    """{name: figure} of what there is data for."""
    made, headline = {}, sources["headline"]
    if sources["ladder"]:
        made["ladder"] = points({row: (found["gap"],) * 3 for row, found in sorted(
            sources["ladder"].items(), key=lambda item: -item[1]["gap"])}, "PPL / teacher's PPL")
    for name, label in (("tax", "PPL / dense twin's PPL"), ("decode_over", "times llama.cpp")):
        rows = {key: (row["value"], row["low"], row["high"]) for key, row in headline.items()
                if key.startswith(name)}
        if rows:
            made[name] = points(rows, label)
    rates = sources["gate"].get("v14.4-rates, 3000 steps")
    if rates:
        made["damage"] = damage(rates["interventions"])
    if sources["bench"]:
        made["contexts"] = contexts(sources["bench"]["rows"])
    return made


for name, figure in figures(sources).items():
    figure.savefig(paper / "figures" / f"{name}.pdf", metadata={"CreationDate": None})
    run.show(figure, name)
for path in (reference / "v18").glob("*.p*"):  # the ablations' own, as v18 drew them
    shutil.copy(path, paper / "figures")

# %% [markdown]
# ## Manuscript
# A constant for each section. Names that have digits are macros too, so that every digit in
# `main.tex` is a typed number, which a test refuses.

# %%
NAMES = {"Gpt": "GPT-2", "Wiki": "WikiText-2", "Vthree": "v14.3", "Vfour": "v14.4",
         "Vsites": "v14.4-sites", "Vrates": "v14.4-rates", "Vfive": "v14.5", "Tfour": "T4",
         "Qeight": r"Q8\_0", "Qfour": r"Q4\_0", "Alphabet": r"$\{-1,0,+1\}$", "Int": "int8",
         "Intfour": "int4", "Intthree": "integer:3", "Half": "half", "Fp": "fp32", "Nm": "45 nm"}

PREAMBLE = r"""
\documentclass[11pt,a4paper]{article}
\usepackage[margin=2.4cm]{geometry}
\usepackage{amsmath,array,booktabs,graphicx,microtype,xspace,lmodern}
\usepackage[T1]{fontenc}
\usepackage[numbers]{natbib}
\usepackage[hidelinks]{hyperref}
\input{names}
\input{numbers}
\xspaceaddexceptions{]}
\newcommand{\ci}[3]{#1 [#2, #3]}
\newcommand{\fig}[2]{\begin{figure}[tbp]\centering\IfFileExists{figures/#1.pdf}{%
\includegraphics[width=0.86\linewidth]{figures/#1.pdf}}{\textit{not measured}}%
\caption{#2}\label{fig:#1}\end{figure}}
\newsavebox{\fitted}
\newcommand{\tab}[2]{\sbox{\fitted}{\footnotesize\setlength{\tabcolsep}{4pt}\input{tables/#1}}%
\begin{table}[tbp]\centering\caption{#2}\label{tab:#1}\smallskip
\ifdim\wd\fitted>\linewidth\resizebox{\linewidth}{!}{\usebox{\fitted}}\else\usebox{\fitted}\fi
\end{table}}
\title{What ternary spikes cost a language model\\and what they save on a CPU}
\author{The ASNN-Goose project}
\date{}
"""

ABSTRACT = r"""
\begin{abstract}
Activations in \Alphabet turn a product of weights and activations into additions, and let a
decoder skip the weights of silent channels. We distil a recurrent student with ternary spikes from
a transformer and ask three questions: what do the spikes cost, do they carry information, and what
do they save on hardware that people own? The recipe that we began with left its student at a
perplexity of \VPublishedPpl on \Wiki. Replayed on a frozen task, its perplexity is \VGapCumsum
times the teacher's, and most of this is due to faults that we name. Repaired, started from the
teacher's weights, with a delta-rule state and Muon, the gap is \VGapOurs. Against a dense twin of
the same architecture, seed and budget, spikes for keys and values cost a factor of \VTaxKv in
perplexity, spikes before every product of the layers \VTaxSitesSixZeroZero. One token at a time, in
\Int on a CPU, it decodes \VDecodeOverLlamacppQEightSameSize times as fast as llama.cpp does a
transformer of its size; skipping zeros alone accounts for a factor of \VDecodeSkippingAlone.
All numbers here are macros made from records of what was run; what was not measured says so.
\end{abstract}
"""

QUESTION = r"""
\section{Question}
Spiking language models are usually argued for on neuromorphic hardware. We ask what their
activations are worth on a common GPU or CPU. Weights stay in full precision, which sets this apart
from networks with ternary weights \citep{li2016,ma2024}; activations are ternary. A weight times a
spike is then an addition, a subtraction, or nothing, and what is nothing need not be read from
memory. For one token at a time, decoding is bound by memory, so that skipping silent channels can
pay at any firing rate; for large batches it cannot, because dense products read each weight once
for all of them.

Three conditions must hold for this to matter. The price in quality has to be known: it is measured
here against a \emph{dense twin}, the same student with every spike function replaced by the
identity, trained with the same seed, batches and budget. The ratio of their perplexities is the
\emph{ternary tax}. The spikes have to carry information rather than arbitrary patterns, and the
model has to use it: estimators come with nulls, and interventions show what damage costs. And the
gain has to be measured on the implementation that skips, against what a user would otherwise run.

\paragraph{Related work.} SpikeGPT \citep{zhu2023} puts binary spikes behind the blocks of an RWKV
\citep{peng2023}; SpikingBrain \citep{pan2025} expands integer counts into spikes before its
products. QuEST \citep{panferov2025} gives the price of few activation levels over a hundred public
runs, and TEAL \citep{liu2024} thresholds activations of trained models without training.
Linear-time students of transformers start from their teacher's weights in Hedgehog
\citep{zhang2024} and RADLADS \citep{goldstein2025}, with layerwise alignment first, which we adopt.
"""

METHOD = r"""
\section{Method}
\paragraph{Student.} A layer is $x + \mathrm{mix}(\mathrm{LN}(x))$, then
$x + \mathrm{ffn}(\mathrm{LN}(x))$. The time mix shifts tokens, forms keys, values, receptance and
gate, and codes keys and values as spikes: with a threshold $\theta=\alpha\,\mathrm{mean}|x|$ over
the channels of one token, a channel fires its sign where $|x|>\theta$. No mean is taken over other
tokens or sequences, so that nothing leaks from the future. The gradient is a straight-through
estimator \citep{bengio2013} that is clipped around the threshold and reaches $\alpha$. A head keeps
a matrix that the delta rule \citep{yang2024b} writes, with decays per channel
\citep{yang2024a,peng2025}:
\begin{equation}
S_t = \mathrm{diag}(w)\,S_{t-1} + \beta_t\,k_t\,(v_t - k_t\,\mathrm{diag}(w)\,S_{t-1})^{\top},
\qquad o_t = r_t S_t .
\end{equation}
What is written is a ternary value less what the state holds, which is not ternary; only rows that
a ternary key chooses are touched. In the recipe \Vsites a spike encoder stands before every
product of the layers: it subtracts a centre per channel, codes the rest, and the next Linear
absorbs centre and height, so that a product between weights and spikes remains. \Vfive adds a
second train of spikes on what the first left, rotates heavy-tailed inputs by Hadamard matrices,
holds firing rates in a band and lets decays depend on the token. A channel is read if either train
fires: \VRowsRead of the rows.

\paragraph{Training.} Student blocks first learn the teacher's hidden states layer by layer; then
the whole student learns the teacher's distribution \citep{hinton2015} and the text at a fixed
temperature. Matrices are trained by Muon \citep{jordan2024}, all else by AdamW. Every weight whose
shape allows starts from the teacher's.

\paragraph{Reference task.} A frozen corpus (documentation of Python packages, \VTrainTokens
training tokens) and a frozen teacher, a small \Gpt of \VTeacherParameters parameters with a test
perplexity of \VTeacherPpl. Students have \VStudentParameters parameters and are trained for
\VSteps steps, unless a row says otherwise. Perplexity is over all \VTestTokens test tokens in
\VWindows windows of \VWindow tokens; the \emph{gap} is the student's over the teacher's on the same
tokens. Errors of one seed are over paired windows, those of several over seeds by Student's $t$.
"""

FAULTS = r"""
\section{What was wrong with the published recipe}
The founders' last student had a perplexity of \VPublishedPpl on \Wiki after up to \VTFourSteps
steps. Replayed on the reference task the same recipe has a gap of \VGapCumsum. Reading it before
building on it was worth more than any addition:
\begin{itemize}
\setlength{\itemsep}{0pt}
\item The recurrence was a cumulative sum divided by a decaying power. It loses all accuracy after
some twenty tokens. The exact scan alone takes the gap to \VGapExact.
\item All decays started at a memory of about one token, and the last layer's token shift was blind
to the current token. The threshold got no gradient, so that $\alpha$ never learned. With these
repaired the gap is \VGapRepaired.
\item Spikes fed no product with weights: keys and values only meet each other. Skipping had nothing
to skip, and the energy argument applied to none of the multiplications.
\item Of a teacher of the same width nothing was taken but the embeddings (\VGapWeights with its
weights, at learning rates that were not yet suited).
\item A ternary tax was claimed to be a factor of several, and was never measured: no dense twin had
been trained.
\item Information and similarity were estimated without nulls. The biased CKA of noise is
\VBiasedCkaNoise at our sizes, and the published plug-in estimate gives \VFoundersMi bit on a site
where spikes of other tokens give \VFoundersMiNoise.
\end{itemize}
"""

LADDER = r"""
\section{The ladder, and what its steps are worth}
Table~\ref{tab:ladder} and Figure~\ref{fig:ladder} show what was changed, each row with all changes
before it. A matrix for a state takes the gap to \VGapMatrix, the delta rule to \VGapDelta, Muon to
\VGapMuon and layerwise alignment to \VGapOurs, where the dense twin stands at \VGapDenseTwin. After
\VLongSteps steps the student predicts these tokens better than its teacher (\VLongOurs): so small a
teacher, trained briefly, is not hard to outgrow, and the student learns from the text too.
\tab{ladder}{Recipes on the reference task, \VSteps steps. A cumulative table says of no single row
what it is worth; that is what the ablations are for.}
\fig{ladder}{The ladder: gap to the teacher, measured on the whole test split.}

\paragraph{Ablations.} A ladder is cumulative and mostly of one seed. In the ablations every part is
switched off or exchanged alone, against a control with the same seed, corpus, teacher and number
of steps (Table~\ref{tab:ablations}, Figure~\ref{fig:forest}). The effect is the mean difference of
log perplexity over seeds, with a paired $t$-test and Holm's correction \citep{holm1979} over the
rows of a family. The corrected $p$ is \VAblationPTransfer for the teacher's weights (seeds:
\VAblationPTransferSeeds), \VAblationPAlignment for layerwise alignment (\VAblationPAlignmentSeeds),
\VAblationPDelta for the delta rule (\VAblationPDeltaSeeds) and \VAblationPMuon for Muon
(\VAblationPMuonSeeds). A row that does not separate says ``no difference shown'', one that nobody
ran yet says ``not run''.
\tab{ablations}{Ablations (profile and steps: \VAblationGroup): paired differences of log PPL over
seeds. Positive: worse than the control.}
\fig{forest}{Effects with intervals (\VAblationGroup). Blue: a difference is shown. Grey band, where
there is one: twice the standard deviation over seeds of a control.}
Figure~\ref{fig:curves} has the curves of two families, Figure~\ref{fig:capacity} the gap over the
number of parameters, at the reference task's counterparts of the founders' four widths.
\fig{curves}{Validation perplexity; bands reach over all seeds.}
\fig{capacity}{Gap over parameters; bars reach over all seeds.}
"""

TAX = r"""
\section{The ternary tax}
For keys and values alone the tax is \ci{\VTaxKv}{\VTaxKvLow}{\VTaxKvHigh} with two trains of spikes
(seeds: \VTaxKvSeeds). Before every product of the layers one train costs
\ci{\VTaxSitesSixZeroZeroOneStep}{\VTaxSitesSixZeroZeroOneStepLow}%
{\VTaxSitesSixZeroZeroOneStepHigh},
which is what the coding error of three levels predicts: public runs with as few levels pay about as
much \citep{panferov2025}. A second train on the residual lowers it to
\ci{\VTaxSitesSixZeroZero}{\VTaxSitesSixZeroZeroLow}{\VTaxSitesSixZeroZeroHigh} (seeds:
\VTaxSitesSixZeroZeroSeeds; Table~\ref{tab:taxes}, Figure~\ref{fig:tax}). The remedy for the tax is
more levels, not another surrogate gradient: counts up to three for keys and values end at
\VGapInteger. After \VLongSteps steps the tax at all sites is \VTaxSitesThreeZeroZeroZero, with one
train \VTaxSitesThreeZeroZeroZeroOneStep. Perplexity is not enough to judge a converted model: when
it continues its own text the gap is \VGenerationGap; facts are recalled at the training length with
a share of \VRecallOneX and at four times that length of \VRecallFourX. On a public teacher,
SmolLM, the gap is \VSmollmTwoGapPydocs and the tax \VSmollmTwoTaxSites.
\tab{taxes}{Quality: what the project claims, with intervals.}
\fig{tax}{The ternary tax with its interval. One: no tax.}
"""

INFORMATION = r"""
\section{Do the spikes carry information?}
A gate asks of every site of the student: few dead and few saturated channels, a firing rate in a
band, information about the teacher's hidden state, and similarity with it, the last two above their
nulls, over \VGateTokens tokens. Information is bounded from below by a linear probe
\citep{barber2003}, cross-fitted; similarity is CKA \citep{kornblith2019} with the unbiased
estimator of \citet{song2012} averaged over minibatches \citep{nguyen2021}. The null pairs spikes
with the states of \emph{other sequences at the same positions}. A circular shift, which we used at
first, is too weak: spikes and states both know their position, and spikes of another sequence
passed.

In the worst site of \Vthree the bound is \VVthreeMiValue bit per channel (null \VVthreeMiNull) and
CKA is \VVthreeCkaValue (null \VVthreeCkaNull); \Vrates, with spikes before every product, has
\VRatesMiValue (\VRatesMiNull) and \VRatesCkaValue (\VRatesCkaNull) and passes without a remedy.
\Vsites, whose rates nobody held, fails: its worst site fires at \VSitesRateValue. A remedy mends
that and raises perplexity by \VRemedyRise, more than we allow: it fails too (Table~\ref{tab:gate}).
What spikes know of the next token beyond the teacher's state is \VBeyondTeacher bit in the site
that was looked at: nothing, within its bias.
\tab{gate}{The gate: value of the site nearest to failing (measured).}

\section{Interventions}
Correlation is not use. Figure~\ref{fig:damage} shows what it costs to move spikes in time or to
turn their signs, in all layers at once. In \Vrates a few tokens of jitter cost little in keys and
much before the output; turned signs cost little up to a tenth, but for what feeds the
output, and at a half everything in keys, values and what feeds the output. In
\Vthree almost all of the damage is done in the first layer: spikes of the later layers pass every
correlational test and hardly matter to the model. A gate of correlations alone would not have
noticed.
\fig{damage}{Perplexity after damage to one site in all layers of \Vrates, as a multiple of the
intact one (measured; bars are standard errors over windows).}
"""

DECODING = r"""
\section{Sparse decoding}
For one token the product of weights and spikes reads only the rows of channels that fired. A C++
kernel fetches rows ahead and adds four at once; the whole step is one call in which threads share
the active channels. Table~\ref{tab:main} holds it against what one would otherwise run, in turns on
one machine (\VHardware), batch one after \VContext tokens. Speeds are of networks with random
weights of the full size (\VSpeedParameters parameters) and the firing rates of a trained student;
qualities are of that small student on its own task.

Against llama.cpp \citep{gerganov2023}, which a user would pick, the \Int step is
\ci{\VDecodeOverLlamacppQEightSameSize}{\VDecodeOverLlamacppQEightSameSizeLow}%
{\VDecodeOverLlamacppQEightSameSizeHigh} times as fast as \Qeight of a transformer of the same size,
\ci{\VDecodeOverLlamacppQFourSameSize}{\VDecodeOverLlamacppQFourSameSizeLow}%
{\VDecodeOverLlamacppQFourSameSizeHigh} times \Qfour, and
\ci{\VDecodeOverLlamacppQEightGptTwo}{\VDecodeOverLlamacppQEightGptTwoLow}%
{\VDecodeOverLlamacppQEightGptTwoHigh} times \Gpt in \Qeight. It takes \VDecodeMemoryMib MiB and
reaches \VDecodeShareOfByteLimit of the limit that its bytes set. Most of this is the kernel's, not
the zeros': the same kernel with all channels firing is slower by a factor of only
\ci{\VDecodeSkippingAlone}{\VDecodeSkippingAloneLow}{\VDecodeSkippingAloneHigh}, an interval that
tells whether skipping is shown to help at all at this firing rate. Latency after a long context
over that after a short one is
\ci{\VDecodeLatencyEightOneNineTwoOverOneTwoEight}%
{\VDecodeLatencyEightOneNineTwoOverOneTwoEightLow}%
{\VDecodeLatencyEightOneNineTwoOverOneTwoEightHigh}: the state does not grow
(Figure~\ref{fig:contexts}).

Energy is an estimate by operations and bytes at \Nm \citep{horowitz2014}: no machine so far had a
counter to read. Memory traffic dominates it, \VEstimatedJoules J per token against \VGptJoules J
for \Gpt in \Int, so that the share which zeros save is small beside that of \Int weights.
\tab{main}{What a user would run: quality, size and cost of a token.}
\tab{decode}{Decoding: what the project claims, with intervals.}
\fig{decode_over}{Tokens per second over those of llama.cpp, with intervals.}
\fig{contexts}{Latency of a decoded token over the context (bands: quartiles).}
"""

LIMITS = r"""
\section{Limits}
The reference task is small: a teacher of a few million parameters on documentation. No run of
full size was trained, and no line has run on a GPU; the code for CUDA was tested under a simulation
that knows nothing of time. Many quality rows have one seed, and say so. Speeds are of random
weights, with firing rates of a student that was trained on another task. The firing rate is that of
quality: sparser spikes have to be asked for and were not searched. The delta rule writes values
that are not ternary, and the head, half of all weights at this size, is fed by no spikes. A linear
probe sees single channels; what channels say together is not shown. Whether a converted model is
good at tasks is not shown by perplexity.

\section{Negative results}
Thresholds and heights per channel change nothing (gap \VGapChannel against \VGapOurs). A vector
for a state costs most of what the matrix gained (\VGapVector). Spikes before every product with one
train stand at \VGapSites, rates held or not (\VGapRates). Two trains without a floor under their
thresholds stood at \VGapUnfloored: a threshold near zero makes a gradient that clipping pays for
everywhere else. Holding rates costs after \VLongSteps steps (\VLongRates against \VLongSites).
CSR, COO and block formats of libraries lose against dense products at these firing rates, writing
only active rows of the state is slower than writing all, and gathers in \Fp are overtaken by dense
products from some two dozen tokens at once. On a poor teacher two trains at all sites do not pass
the gate: what the first train left tells too little of the teacher. No claim of efficiency is made
for a student without a gate; of the one in Table~\ref{tab:main} the record says: \emph{\VGate}.

\section{Reproducibility}
The package beside this paper holds recipes, records of every row with command, seed, commit and
hardware, hashes of corpus, teacher and students, and a program that runs one row again and prints
the difference from the published value beside the spread over seeds. Numbers in this text are
macros that are generated from those records; a number that somebody types fails a test.
\appendix
\section{Checklist}
\input{tables/checklist}
\bibliographystyle{unsrtnat}
\bibliography{references}
"""

SECTIONS = (ABSTRACT, QUESTION, METHOD, FAULTS, LADDER, TAX, INFORMATION, DECODING, LIMITS)
MAIN = (PREAMBLE + r"\begin{document}" + "\n" + r"\maketitle" + "".join(SECTIONS)
        + r"\end{document}" + "\n").lstrip()

# %% [markdown]
# ## References
# Each with an identifier: arXiv's number, a DOI, or an address.

# %%
# Key and year, authors, title, identifier.
REFERENCES = """\
bengio2013 | Yoshua Bengio and Nicholas Léonard and Aaron Courville | Estimating or Propagating
 Gradients Through Stochastic Neurons | 1308.3432
hinton2015 | Geoffrey Hinton and Oriol Vinyals and Jeff Dean | Distilling the Knowledge in a Neural
 Network | 1503.02531
peng2023 | Bo Peng and others | RWKV: Reinventing RNNs for the Transformer Era | 2305.13048
peng2025 | Bo Peng and others | RWKV-7 Goose with Expressive Dynamic State Evolution | 2503.14456
yang2024a | Songlin Yang and others | Gated Linear Attention Transformers with Hardware-Efficient
 Training | 2312.06635
yang2024b | Songlin Yang and others | Parallelizing Linear Transformers with the Delta Rule over
 Sequence Length | 2406.06484
li2016 | Fengfu Li and Bin Liu | Ternary Weight Networks | 1605.04711
ma2024 | Shuming Ma and others | The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits
 | 2402.17764
zhu2023 | Rui-Jie Zhu and others | SpikeGPT: Generative Pre-trained Language Model with Spiking
 Neural Networks | 2302.13939
pan2025 | Yuqi Pan and others | SpikingBrain: Spiking Brain-inspired Large Models | 2509.05276
panferov2025 | Andrei Panferov and others | QuEST: Stable Training of LLMs with 1-Bit Weights and
 Activations | 2502.05003
liu2024 | James Liu and others | Training-Free Activation Sparsity in Large Language Models |
 2408.14690
zhang2024 | Michael Zhang and others | The Hedgehog and the Porcupine: Expressive Linear Attentions
 with Softmax Mimicry | 2402.04347
goldstein2025 | Daniel Goldstein and others | RADLADS: Rapid Attention Distillation to Linear
 Attention Decoders at Scale | 2505.03005
kornblith2019 | Simon Kornblith and others | Similarity of Neural Network Representations Revisited
 | 1905.00414
nguyen2021 | Thao Nguyen and Maithra Raghu and Simon Kornblith | Do Wide and Deep Networks Learn
 the Same Things? | 2010.15327
song2012 | Le Song and others | Feature Selection via Dependence Maximization |
 https://jmlr.org/papers/v13/song12a.html
barber2003 | David Barber and Felix Agakov | The IM Algorithm: A Variational Approach to
 Information Maximization | NIPS 2003
holm1979 | Sture Holm | A Simple Sequentially Rejective Multiple Test Procedure | Scandinavian
 Journal of Statistics 6, 65-70
horowitz2014 | Mark Horowitz | Computing's Energy Problem (and What We Can Do About It) |
 doi:10.1109/ISSCC.2014.6757323
jordan2024 | Keller Jordan and others | Muon: An Optimizer for Hidden Layers |
 https://kellerjordan.github.io/posts/muon
gerganov2023 | Georgi Gerganov and others | llama.cpp | https://github.com/ggml-org/llama.cpp"""


def bibliography():
    """references.bib; a number alone is arXiv's."""
    entries = []
    for line in re.split(r"\n(?! )", REFERENCES):
        key, authors, title, where = re.sub(r"\s+", " ", line).split(" | ")
        note = f"arXiv:{where}" if re.fullmatch(r"\d{4}\.\d{4,5}", where) else where
        note = rf"\url{{{where}}}" if where.startswith("https") else note
        year = re.sub(r"\D", "", key)
        entries.append(f"@misc{{{key},\n author = {{{authors}}},\n title = {{{{{title}}}}},\n "
                       f"year = {{{year}}},\n note = {{{note}}}\n}}\n")
    return "\n".join(entries)


# %% [markdown]
# ## Checklist
# After that of NeurIPS; every answer is read from the files.

# %%
def checklist(sources, tex, names):
    """(question, answer, why) of each item; `names` are the files of the package."""
    headline, cells = sources["headline"], sources["cells"]
    many = sum(row["seeds"] >= 3 for row in headline.values())
    told = all({"hardware", "command", "commit"} <= row.keys() for row in headline.values())
    bounds = all({"low", "high"} <= row.keys() for row in headline.values())

    def answer(yes, partly=False):
        return ["no", "partly", "yes"][2 if yes else bool(partly)]

    return [
        ("Claims match results", answer(not typed_numbers(tex)), "every number is made from a "
         "record"),
        ("Limitations", answer(r"\section{Limits}" in tex), "a section of their own"),
        ("Theory and proofs", "not applicable", "no theorem is claimed"),
        ("Results can be reproduced", answer({"reproduce.md", "commands.txt"} <= {*names}),
         "commands, recipes and hashes of every row are in the package"),
        ("Open code and data", "partly", "code is open; the reference "
         "corpus and teacher are known by hash and are no part of the repository"),
        ("Settings", answer("recipes.json" in names), "recipes in full"),
        ("Statistical significance", answer(headline and many == len(headline), bounds and many),
         f"{many} of {len(headline)} claims have three seeds or more; the others have errors over "
         "windows or runs of one seed" if bounds else "claims without an interval are left"),
        ("Compute", answer(told and headline, bool(cells)), "hardware, command and commit of every "
         "claim; seconds of every ablation"),
        ("Negative results", answer(r"\section{Negative results}" in tex), "a section of their "
         "own"),
        ("Ethics, broader impact, safeguards", "partly", "model cards say what students are not "
         "fit for"),
        ("Licences of assets", "partly", "those of teacher and corpus apply; cards name them"),
        ("Human subjects, crowdsourcing", "not applicable", "none"),
        ("Use of language models", "yes", "they are what is studied")]


def package(sources, reference, tex, environment):
    """{name: text} of the files of the package."""
    rows = [(f"{name} (claim)", row["command"]) for name, row in sources["headline"].items()]
    rows += [(f"{c['row']}, seed {c['seed']}, {c['profile']}, {c['steps']} steps", c["command"])
             for c in sources["cells"]]
    files = {f"reference/{path.relative_to(reference).as_posix()}": path.read_text()
             for path in sorted(reference.rglob("*.json*")) if path.is_file()}
    students = {f"{c['row']}-{c['seed']}-{c['steps']}": c["student"] for c in sources["cells"]}
    gates = {name: found["before"]["gate"] for name, found in sources["gate"].items()}
    students |= {name: gate["student"] for name, gate in gates.items()}
    hashes = {"corpus": sorted({gate["corpus"] for gate in gates.values()} | {
        "{name} {hash}".format(**c["corpus"]) for c in sources["cells"]}),
        "teacher": sorted({"{name} {hash}".format(**c["teacher"]) for c in sources["cells"]}),
        "students": students, "files": {
            name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}}
    return {**files, "recipes.json": json.dumps(sources["recipes"], indent=1, sort_keys=True),
            "environment.json": json.dumps(environment, indent=1, sort_keys=True),
            "hashes.json": json.dumps(hashes, indent=1, sort_keys=True), "main.tex": tex,
            "commands.txt": "".join(f"{name}: {command}\n" for name, command in rows),
            "reproduce.md": REPRODUCE}


REPRODUCE = """# How to run a row again

1. `make env` makes the environment; `environment.json` says what the numbers were made with.
2. `make reproduce ROW=control PROFILE=cpu` runs one row of the ablations again and prints its
   perplexity, the published one, the difference, and the spread over seeds. Rows are in
   `reference/ablations.jsonl`, each with its recipe in full, seed, steps, commit and hardware.
3. For the reference task set ASNN_REF to a folder with `corpus/` and `teacher/` and say
   `PROFILE=ref`; `hashes.json` tells whether they are the same.
4. `commands.txt` has the command of every claim and row. On the same machine, with as many threads,
   a row gives the same bits; elsewhere it differs by rounding, by less than seeds do.
"""


def write_zip(path, files):
    """A zip with fixed dates: the same content gives the same file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as whole:
        for name, text in sorted(files.items()):
            whole.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), text)


# %% [markdown]
# ## The paper
# Written with its tables, figures and references, and compiled where LaTeX is installed.

# %%
def compiled(folder):
    """(path of the PDF or None, a sentence)."""
    tools = {"tectonic": ["tectonic", "main.tex"],
             "latexmk": ["latexmk", "-pdf", "-interaction=nonstopmode", "main.tex"]}
    tool = next((name for name in tools if shutil.which(name)), None)
    if tool is None:
        return None, ("no LaTeX was found: `apt-get install latexmk texlive-latex-recommended "
                      "texlive-fonts-recommended lmodern`, or tectonic, then run all again.")
    done = subprocess.run(tools[tool], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        wrong = [line for line in done.stdout.splitlines() if line.startswith("!")]
        return None, f"{tool} failed: {wrong[:1] or done.stderr[-200:]}"
    return folder / "main.pdf", f"compiled by {tool}"


files = package(sources, reference, MAIN, asnn.environment())
answers = checklist(sources, MAIN, files)
files["checklist.md"] = "".join(f"- {question}: **{answer}**. {why}.\n"
                                for question, answer, why in answers)
keys = ("item", "answer", "why")
checked = pd.DataFrame(answers, columns=keys).style.hide(axis="index")
checked = checked.format_index(str.capitalize, axis=1).to_latex(
    hrules=True, column_format=r"p{4.6cm}p{2.2cm}p{8.2cm}")
(paper / "tables").mkdir(exist_ok=True)
for name, rows in made.items():
    (paper / "tables" / f"{name}.tex").write_text(to_latex(rows))
(paper / "tables" / "checklist.tex").write_text(r"{\footnotesize " + checked + "}")
(paper / "main.tex").write_text(MAIN)
(paper / "numbers.tex").write_text(definitions_of(values, MAIN))
(paper / "names.tex").write_text("".join(
    rf"\newcommand{{\{name}}}{{{text}\xspace}}" + "\n" for name, text in NAMES.items()))
(paper / "references.bib").write_text(bibliography())
run.save("numbers.json", values)
write_zip(paper / "reproducibility.zip", files)
asnn.show_table([dict(zip(keys, row)) for row in answers])
pdf, said = (None, "not asked for") if compile_paper is False else compiled(paper)
print(f"paper in {os.path.relpath(paper)}: {said}; the package has {len(files)} files")

# %% [markdown]
# ## Contract
# Facts that hold in every profile; continuous integration compares their output.

# %% tags=["nbval-check-output"]
print("numbers typed by hand:", typed_numbers(MAIN))
print("a typed number is found:", typed_numbers(r"a gap of 1.23, \VTaxKv and $p<0.01$"))
print("cited and not listed:", sorted(
    {key for keys in re.findall(r"\\cite[tp]?\{(.*?)\}", MAIN) for key in keys.split(",")}
    ^ {*re.findall(r"(?m)^\w+", REFERENCES)}))
print("seven columns at most:", all(len(rows[0]) <= 7 for rows in made.values() if rows))

# %% [markdown]
# ## Summary

# %%
print(f"Finished: v19, {len(values)} numbers, {len(made)} tables, "
      f"{'a PDF' if pdf else 'no PDF'}, {time.perf_counter() - begin:.0f} s")
