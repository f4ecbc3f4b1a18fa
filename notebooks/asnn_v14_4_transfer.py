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
# <a href="https://kaggle.com/kernels/welcome?src=https://github.com/OWNER/REPO/blob/main/
# notebooks/asnn_v14_4_transfer.ipynb"><img alt="Open in Kaggle"
# src="https://kaggle.com/static/images/open-in-kaggle.svg"></a>
# <a href="https://colab.research.google.com/github/OWNER/REPO/blob/main/
# notebooks/asnn_v14_4_transfer.ipynb"><img alt="Open in Colab"
# src="https://colab.research.google.com/assets/colab-badge.svg"></a>
#
# **Needs** `asnn_common.py` and, on a GPU, WikiText-2 and GPT-2 (from the hub or attached).
# A T4 takes about 150 minutes and 9 GB (an estimate), two busy CPU cores 27 minutes, 2 GB.
# *Run All* needs no editing. The last line you should see begins with `Finished: v14.5`.
#
# v14.3 takes only the embeddings from its teacher, and a channel remembers one number. Here a layer
# has the matrices of a GPT-2 layer and starts from their weights. The memory of a head is a matrix,
# written by the delta rule: a ternary key chooses rows, and what is added is the ternary value less
# what the rows hold. Matrices are trained with Muon. Spikes stand before every product with
# weights, a second train on what the first left, at rates that are held in a band. A dense twin,
# the same student without spikes, is trained over three seeds: what spikes cost is measured.

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
recipe = "v14.5"  # v14.4-rates (one train), v14.4-sites (rates free), v14.4 (k, v), v14.4-t4 ...
profile = None  # tiny (seconds), cpu (minutes), ref, t4 (full size); None: by hardware
corpus = None  # pydocs, wikitext-2, wikitext-103, or a folder with {train,validation,test}.txt
teacher_name = None  # gpt2, smollm2, ... (README), a hub id, a folder, or train (a GPT-2, here)
steps = None  # optimiser steps of the distillation
tax_seeds = 3  # seeds over which the ternary tax is measured; 0: not at all
tax_steps = None  # steps of each of those runs; None: all in profile ref, a tenth elsewhere
max_hours = None  # stop and save after so many hours; run all again to go on
recall_share = None  # share of training windows with made-up facts to recall; None: none
tracker = None  # "tensorboard" or "trackio" (pip install it)
seed = 42
run_name = None  # None: <profile>-seed<seed>; a finished run is never overwritten

# %% [markdown]
# ## Environment
# What this session runs on and why, then what this version changes against v14.3.

# %%
import copy
import itertools
import json
import math
import shutil
import socket
import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, sem
from scipy.stats import t as student_t

asnn.figure_style()  # colours that people with any colour vision tell apart
begin, env = time.perf_counter(), asnn.environment()
recipe = asnn.get_recipe(recipe, profile, corpus=corpus, teacher=teacher_name,
                         distill_steps=steps, max_hours=max_hours, tracker=tracker, seed=seed,
                         recall_share=recall_share)
if not isinstance(tax_seeds, int) or tax_seeds < 0:
    raise ValueError(f"tax_seeds is {tax_seeds!r}; allowed: a whole number from 0.")
tax_steps = tax_steps or max(2, recipe.distill_steps // (1 if recipe.profile == "ref" else 10))
asnn.get_recipe(recipe.name, recipe.profile, distill_steps=tax_steps)  # refuses them now
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
before = vars(asnn.get_recipe("v14.3", recipe.profile, seed=seed))
told = {"name", "changed", "outcome", "published_ppl", "inferred", "repaired", "profile"}
asnn.show_table([{"field": name, "this run": str(value), "v14.3": str(before[name])}
                 for name, value in vars(recipe).items()
                 if name not in told and value != before[name]])

# %% [markdown]
# ## Data and teacher
# A corpus is known by the hash of its content. A teacher trained here is kept for the next time.

# %%
task = asnn.load_task(recipe)
recipe, tokens = task.recipe, task.tokens
print("\n".join(task.notes or [f"teacher {task.teacher_name} fits the recipe as it is"]))
asnn.show_table([{"split": split, "bytes": f"{size['bytes']:,}", "words": f"{size['words']:,}",
                  "tokens": f"{len(tokens[split]):,}"} for split, size in task.sizes.items()])
print(f"corpus {task.corpus.name}, content hash {task.corpus.hash}; teacher {task.teacher_name}: "
      f"{task.teacher.num_parameters():,} parameters, vocabulary {len(task.tokenizer):,}")
settings = {"recipe": vars(recipe.replace(max_hours=None, tracker=None)),
            "corpus_hash": task.corpus.hash, "teacher": task.teacher_name}
run = asnn.Run.open(recipe.name, run_name or f"{recipe.profile}-seed{seed}", settings)
print(run.note)

# %% [markdown]
# ## The architecture
# One layer: time mix above, feed-forward block below. Orange: spikes; white: an encoder that this
# recipe lacks. The curved arrow: receptance and gate.

# %%
def draw_architecture(recipe):
    """A picture of one layer of the student, its spike sites marked."""
    matrix, arrow = recipe.state_kind != "vector", {"arrowstyle": "->", "color": "#444444"}
    state = {"vector": "state\nS = w S + k v", "matrix": "state\nS = diag(w) S + k v$^T$",
             "delta": "state\nS = diag(w) S\n+ beta k (v - k S)$^T$"}[recipe.state_kind]
    weights = "W_k, W_v\nW_r" + ", W_g" * matrix
    rows = [["x", "norm", "token shift\nx, previous x", "mix_in", weights, "k, v", state,
             "r S" + "\nnorm, gate" * matrix, "mix_out", "W_o", "+ x"],
            ["norm", "ffn_in", "W_1" + ", W_3" * recipe.gated_ffn, recipe.activation[:4],
             "ffn_hidden", "W_2", "+ x", f"next layer (of {recipe.n_layer}),\nthen the head"]]
    figure, axes = plt.subplots(figsize=(12, 3.4))
    axes.set(xlim=(0, 15.6), ylim=(-0.4, 3.6), title=f"{recipe.name}, D={recipe.d_model}")
    axes.axis("off")
    for y, row in zip((2.2, 0.3), rows):
        x, middle = 0.1, {}
        for label in row:
            site, on = (label.split(",")[0] in names for names in (asnn.SITES, recipe.spike_sites))
            width = 0.4 if site else 0.35 + 0.112 * max(map(len, label.split("\n")))
            colour = {state: "#bfe3d7"}.get(label, "white" if site else "#d9e6f2")
            axes.add_patch(plt.Rectangle((x, y), width, 0.9, edgecolor="#444444", facecolor=(
                asnn.COLOURS["orange"] if on else colour)))
            middle[label] = x + width / 2
            axes.text(middle[label], y - 0.3 if site else y + 0.45, label, ha="center", va="center")
            x += width + 0.35
            if label != row[-1]:
                axes.annotate("", (x, y + 0.45), (x - 0.35, y + 0.45), arrowprops=arrow)
        if state in row:
            axes.annotate("", (middle[row[7]], y + 0.95), (middle[row[4]], y + 0.95), arrowprops={
                **arrow, "connectionstyle": "arc3,rad=-0.15"})
    return figure


run.show(draw_architecture(recipe), "architecture")

# %% [markdown]
# ## What a state can hold
# Pairs of a ternary key and value are written into one head of N = 64, then keys are read back.
# Left, every pair has its own key: the delta rule is best up to about N/2 pairs. Right, 16 keys
# come again with new values, as names do: the delta rule replaces what a key held.

# %%
def recall(pairs, distinct, width=64, trials=16):
    """{state kind: cosine of what a key reads and its newest value}, after writing `pairs` pairs
    whose keys are `distinct` ones in turn."""
    generator, distinct = torch.Generator().manual_seed(0), min(pairs, distinct)

    def spikes(count):  # (trials, count, H=1, N), 42 % of them not zero
        signs = torch.randn(trials, count, 1, width, generator=generator).sign()
        return signs * (torch.rand(trials, count, 1, width, generator=generator) < 0.42)

    key = spikes(distinct).repeat(1, -(-pairs // distinct), 1, 1)[:, :pairs]
    value, decay = spikes(pairs), torch.full((1, width), 0.9999)
    unit = key * (key.square().sum(-1, keepdim=True) + 1.0).rsqrt()
    found = {"vector": key.squeeze(2) * (key * value).sum(1)}  # (trials, pairs, N)
    for name, beta in (("matrix", None), ("delta", torch.ones(trials, pairs, 1))):
        _, S = asnn.MATRIX_RECURRENCES["chunked"](unit, unit, value, decay, None, beta)
        found[name] = torch.einsum("bthn,bhnm->btm", unit, S)
    newest = value[:, -distinct:].squeeze(2)
    return {name: float(torch.cosine_similarity(read[:, -distinct:], newest, dim=-1).mean())
            for name, read in found.items()}


def recurrence_error(length=70, width=16):
    """Largest relative difference of chunked form and loop in fp64: output, state, gradients."""
    torch.manual_seed(0)
    shapes = [(2, length, 2, width)] * 3 + [(2, width), (2, 2, width, width), (2, length, 2)]
    r, k, v, w, S, beta = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    inputs = [r, torch.nn.functional.normalize(k, dim=-1), v, w.sigmoid(), S, beta.sigmoid()]
    inputs, results = [x.requires_grad_() for x in inputs], []
    for form in asnn.MATRIX_RECURRENCES.values():
        out, last = form(*inputs)
        results.append((out, last, *torch.autograd.grad(out.square().sum() + last.sum(), inputs)))
    return max(float(((a - b).abs().max() / a.abs().max()).detach()) for a, b in zip(*results))


counts, worst = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128], recurrence_error()
recalled = {"every pair has its own key": [recall(count, count) for count in counts],
            "16 keys that come again": [recall(count, 16) for count in counts]}
figure, panels = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True)
for axes, (title, rows) in zip(panels, recalled.items()):
    pd.DataFrame(rows, index=counts).plot(ax=axes, style=["o-", "s-", "^-"], title=title, logx=True,
                                          xlabel="pairs written", ylim=(0, 1.05))
    axes.set_xticks([2**i for i in range(8)], [2**i for i in range(8)])
panels[0].set_ylabel("cosine of what is read\nand the newest value")
run.show(figure, "recall")

# %% [markdown]
# ## Weight transfer
# What the weights of the first layer, and those outside the layers, start from.

# %%
untrained = task.build_student()
if recipe.weights_from_teacher:
    rows = asnn.transfer_weights(untrained, task.teacher, recipe.output_scale)
    taken = {row["student"]: row["teacher"] for row in rows if row["transferred"] == "yes"}
    asnn.show_table([{"student": ours, "teacher": theirs} for ours, theirs in taken.items()
                     if ours.endswith("weight") and ("blocks" not in ours or ".0." in ours)])
    sizes = {name: p.numel() for name, p in untrained.goose.named_parameters()}
    print(f"{sum(map(sizes.get, taken)):,} of {sum(sizes.values()):,} parameters start from these")

# %% [markdown]
# ## Training
# First each block learns what the teacher's blocks do, then the whole student the distribution.

# %%
def hours_left(max_hours, begin):
    """What is left of max_hours since `begin`, a time.perf_counter(); None without a limit."""
    return max_hours and max(1e-3, max_hours - (time.perf_counter() - begin) / 3600)


limited = recipe.replace(max_hours=hours_left(recipe.max_hours, begin))
student, result = asnn.distil(task, limited, run.folder)
print(f"{result.stopped} at step {result.step} in {result.seconds:.0f} s; measured: "
      f"{result.tokens_per_second:,.0f} tokens/s, peak memory {result.peak_memory_gb:.2f} GiB")

# %% [markdown]
# What happened. Firing rates are means over the layers, shaded from the lowest to the highest;
# dashed: the rate published for v14.3.

# %%
def plot_curves(log, recipe):
    """Losses, validation perplexity and firing rates by step; dotted: where a stage begins."""
    frame = pd.DataFrame([row for row in log if "loss" in row]).reindex(
        columns=["step", "align", "kd", "ce"])
    checks = pd.DataFrame([row for row in log if "val_ppl" in row])
    figure, (losses, ppl, rates) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    frame.plot("step", ["align", "kd", "ce"], ax=losses, logy=True, ylabel="nats, or share",
               label=["alignment, share of variance", "KL", "cross-entropy"],
               title="loss on training batches")
    checks.plot("step", "val_ppl", ax=ppl, style="o-", logy=True, ylabel="PPL", legend=False,
                title=f"validation perplexity, first {recipe.eval_windows} windows")
    shares = pd.DataFrame(list(checks["val_density"]), index=checks["step"])
    sites = shares.T.groupby([(name.split(".") + [name])[1] for name in shares])
    for (site, mean), marker in zip(sites.mean().iterrows(), "osv^<>D"):
        line, = rates.plot(mean.index, mean, marker + "-", label=site)
        rates.fill_between(mean.index, sites.min().loc[site], sites.max().loc[site], alpha=0.15,
                           color=line.get_color(), linewidth=0)
    rates.axhline(0.382, color="#444444", linestyle="--", linewidth=1)
    rates.set(title="firing rate by site", ylim=(0, 1), ylabel="share of non-zero spikes")
    rates.legend(ncol=3)
    for axes in figure.axes:
        axes.set(xlabel="step", xlim=(0, 1.03 * frame["step"].max()))
        for _, start, _ in recipe.stages()[1:]:
            axes.axvline(start, color="#888888", linestyle=":", linewidth=1)
    return figure


run.show(plot_curves(result.log, recipe), "training")
first = asnn.evaluate(untrained.to(student.device), tokens["validation"], recipe.seq_len,
                      windows=recipe.eval_windows).ppl
checks = {0: first, **{row["step"]: row["val_ppl"] for row in result.log if "val_ppl" in row}}
gains = [{"stage": name, "steps": f"{start} to {end}", "PPL before": f"{checks[start]:.2f}",
          "PPL after": f"{checks[end]:.2f}", "gain": f"{checks[start] / checks[end]:.3f}x"}
         for name, start, end in recipe.stages() if end in checks]
asnn.show_table(gains)

# %% [markdown]
# ## Quality
# Perplexity over consecutive windows, every token once, in fp32. The gap is student PPL / teacher
# PPL; its standard error comes from the paired windows. An unfinished run gets fewer windows.

# %%
measured = task.measure(student, recipe.final_windows if result.finished else recipe.eval_windows)
test = measured["student"]["test"]
asnn.show_table(task.quality_table(measured))
samples = task.samples({"teacher": task.teacher, "student": student}, seed)
asnn.show_table(samples, prose=True)

# %% [markdown]
# ## Recall and generation
# Perplexity hardly asks what a state remembers. Here one made-up fact, "marker KEY VALUE", stands
# somewhere in test text that ends with "marker KEY", and VALUE has to get the highest logit of all
# candidates. Keys and values are frequent words, the marker is the rarest token. Windows are up to
# eight times as long as in training. Then models write on from test prompts, at temperature 1: the
# gap is the teacher's PPL of what a model wrote over its PPL of its own.

# %%
def retrieval_windows(facts, tokens, length, count, seed):
    """ids (count, length) from random places of a split, each with one fact at a random place and
    its question at the end; which of facts.values is right, (count,)."""
    rng = np.random.default_rng((seed, length))
    right, rows = rng.integers(len(facts.values), size=count), []
    for value in facts.values[right]:
        start, place = rng.integers(len(tokens) - length + 1), rng.integers(length - 4)
        rows.append(tokens[start:start + length].astype(np.int64))
        rows[-1][place:place + 3] = facts.marker, rng.choice(facts.keys), value
        rows[-1][-2:] = rows[-1][place:place + 2]
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(right)


@torch.no_grad()
def recall_by_length(models, facts, tokens, seq_len, count, seed):
    """A row for each model and length that it can read: right answers with a Wilson interval."""
    rows, values = [], torch.from_numpy(facts.values)
    lengths = [n * seq_len for n in (1, 2, 4, 8) if n * seq_len <= len(tokens)]
    for length, (name, model) in itertools.product(lengths, models.items()):
        if isinstance(model, asnn.GooseForCausalLM) or (
                length <= model.config.max_position_embeddings):
            ids, right = retrieval_windows(facts, tokens, length, count, seed)
            logits = torch.cat([model(part.to(model.device), use_cache=False, logits_to_keep=1)
                                .logits[:, -1].float().cpu() for part in ids.split(8)])
            hits = int((logits[:, values].argmax(-1) == right).sum())
            interval = binomtest(hits, count).proportion_ci(method="wilson")
            rows.append({"model": name, "length": length, "windows": count, "recall": hits / count,
                         "low": interval.low, "high": interval.high})
    return rows


@torch.no_grad()
def write_on(model, prompts, length, seed):
    """Continuations (K, length) of prompts (K, P), drawn at temperature 1 from all tokens."""
    generator, cache, written = torch.Generator().manual_seed(seed), {}, [prompts]
    for _ in range(length):
        out = model(written[-1].to(model.device), use_cache=True, logits_to_keep=1, **cache)
        cache = {name: out[name] for name in ("state", "past_key_values") if name in out}
        chances = out.logits[:, -1].float().softmax(-1).cpu()
        written.append(torch.multinomial(chances, 1, generator=generator))
    return torch.cat(written[1:], 1)


def repetition(written, size=4):
    """Share of n-grams that occurred before in their continuation, of those written (K, T)."""
    grams = [list(zip(*(row[i:] for i in range(size)))) for row in written.tolist()]
    return float(np.mean([1 - len(set(row)) / len(row) for row in grams]))


@torch.no_grad()
def generation_gap(models, teacher, tokens, seq_len, count, seed):
    """A row for the teacher, first, and each model, from the same prompts of an eighth of seq_len
    tokens to its end; the standard error is that of the paired continuations."""
    length, rows, own = seq_len // 8, [], None
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    prompts = torch.from_numpy(np.stack([tokens[i:i + length] for i in starts]).astype(np.int64))
    for name, model in {"teacher": teacher, **models}.items():
        written, nll = write_on(model, prompts, seq_len - length, seed), []
        for part in torch.cat((prompts, written), 1).to(teacher.device).split(8):
            logits = teacher(part, use_cache=False).logits[:, length - 1:-1].float()
            nll.append(torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), part[:, length:], reduction="none").mean(1).cpu())
        nll = torch.cat(nll).double()
        own = nll if own is None else own
        gap, error = math.exp(nll.mean() - own.mean()), float((nll - own).std()) / count**0.5
        rows.append({"model": name, "continuations": count, "PPL": math.exp(nll.mean()), "gap": gap,
                     "standard_error": gap * error, "repetition": repetition(written)})
    return rows


# %% [markdown]
# The generalist scorecard is lm-eval's: its own tasks, where the internet is there, and two local
# ones: which of four continuations is the text's (by chance 0.25), and the last word of a passage.

# %%
SUITE = "group: generalist\ntask: [lambada_openai, hellaswag, arc_easy, piqa, blimp, wikitext]\n"
LOCAL = {"continuation": "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\n"
                         "metric_list: [{metric: acc}]\n",
         "last_word": "output_type: loglikelihood\nmetric_list: [{metric: acc}]\n"}


def write_tasks(task, folder, count):
    """Files for lm-eval in a folder: the suite, and local tasks on places of the test split."""
    tokens, rng, rows = task.tokens["test"], np.random.default_rng(0), {name: [] for name in LOCAL}
    for i, starts in enumerate(rng.integers(len(tokens) - 40, size=(count, 4))):
        before = task.tokenizer.decode(tokens[starts[i % 4]:starts[i % 4] + 32])
        after = [task.tokenizer.decode(tokens[start + 32:start + 40]) for start in starts]
        rows["continuation"].append({"q": before, "choices": after, "a": i % 4})
        text, word = f". {before}".rsplit(" ", 2)[:2]  # what follows may be half a word
        rows["last_word"].append({"q": text, "a": f" {word}"})
    (folder / "generalist.yaml").write_text(SUITE)
    for name, lines in LOCAL.items():
        (data := folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[name])))
        (folder / f"{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ntest_split: test\ntarget_delimiter: ''\n"
            f"doc_to_text: '{{{{q}}}}'\ndoc_to_target: '{{{{a}}}}'\n{lines}"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n")


def scorecard(task, models):
    """Rows of lm-eval: model, task, metric, value, standard_error. What is left out is said."""
    try:
        from lm_eval import simple_evaluate, tasks
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        return print(f"no scorecard: {error} (pip install lm-eval)") or []
    names, rows = [f"local_{name}" for name in LOCAL], []
    count = {"tiny": 8, "cpu": 64}.get(task.recipe.profile, 400)
    try:
        socket.create_connection(("huggingface.co", 443), 3).close()
        names += ["generalist"] * (os.environ.get("HF_HUB_OFFLINE") != "1")
    except OSError:
        print("The hub cannot be reached: only the local tasks of the scorecard are run.")
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(task, Path(folder), count)
        known = tasks.TaskManager(include_path=folder, include_defaults="generalist" in names)
        for name, model in models.items():
            lm = HFLM(pretrained=model.eval(), tokenizer=task.tokenizer, batch_size=8)
            found = simple_evaluate(lm, tasks=names, task_manager=known, limit=count)["results"]
            rows += [{"model": name, "task": one, "metric": key.split(",")[0], "value": value,
                      "standard_error": scores.get(key.replace(",", "_stderr,"))}
                     for one, scores in found.items() if one in SUITE or one in names
                     for key, value in scores.items() if "," in key and "_stderr" not in key]
    return rows


def beyond_perplexity(task, models):
    """{"recall", "generation", "scorecard"}: rows of what is above, in sizes of the profile."""
    windows, prompts = {"tiny": (16, 4), "cpu": (64, 16)}.get(task.recipe.profile, (200, 64))
    place, known = (task.tokens["test"], task.recipe.seq_len), {"teacher": task.teacher, **models}
    return {"recall": recall_by_length(known, task.facts(), *place, windows, seed=0),
            "generation": generation_gap(models, task.teacher, *place, prompts, seed=0),
            "scorecard": scorecard(task, known)}


# %%
def show_beyond(found, chance):
    """Two tables, models by length and models by what they write, and a figure of the first."""
    frame = pd.DataFrame(found["recall"])
    cells = frame.apply("{0.recall:.2f} ({0.low:.2f} to {0.high:.2f})".format, axis=1)
    table = frame.assign(cells=cells).pivot(index="model", columns="length", values="cells")
    asnn.show_table(table.fillna("too long").reset_index().to_dict("records"))
    for name in ("generation", "scorecard"):
        asnn.show_table(pd.DataFrame(found[name]).round(3).to_dict("records"))
    figure, axes = plt.subplots(figsize=(7, 3.4))
    for (name, rows), marker in zip(frame.groupby("model", sort=False), "os^v"):
        errors = rows["recall"] - rows["low"], rows["high"] - rows["recall"]
        axes.errorbar(rows["length"], rows["recall"], errors, marker=marker, capsize=3, label=name)
    axes.axhline(chance, color="#444444", linestyle="--", label=f"chance, {chance:.3f}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in a window", ylabel="share of right answers", ylim=(0, 1.05),
             xticks=(ticks := frame["length"].unique()), xticklabels=ticks)
    axes.legend()
    return figure


chance = 1 / len(task.facts().values)
beyond = beyond_perplexity(task, {"student": student.eval()})
run.show(show_beyond(beyond, chance), "retrieval")

# %% [markdown]
# ## Where the spikes are
# Multiply-accumulates (MACs) per token, all layers together. Where spikes go in, additions are left
# of them and the rest is skipped; the read `r S` has no spikes.

# %%
def products(student, rates):
    """(table by product, share of the layers' products with weights that spikes feed); `rates` is
    {"layer.site": firing rate}."""
    frame = pd.DataFrame(asnn.operations(student, rates))
    frame["site"] = frame["site"].str.split(".").str[0]
    weights = frame[frame["product"].str.startswith("W_")].sum()
    table = frame.groupby(["product", "site"], sort=False)[["MACs", "adds", "skipped"]].sum()
    table.insert(1, "share of MACs", (table["MACs"] / table["MACs"].sum()).round(3))
    return table[table["MACs"] > 0].reset_index(), (
        weights["adds"] + weights["skipped"]) / weights["MACs"]


rates = asnn.firing_rates(student, task.peek())
table, fed = products(student, rates)
asnn.show_table(table.map(lambda x: f"{x:,}" if isinstance(x, int) else x).to_dict("records"))
print(f"{100 * fed:.0f} % of the layers' products with weights are fed by spikes")
figure, axes = plt.subplots(figsize=(10, 3.2))
pd.Series(rates).plot.bar(ax=axes, color=asnn.COLOURS["orange"], ylim=(0, 1),
                          ylabel="share of non-zero spikes", title="Firing rate by layer and site")
axes.axhline(0.382, color="#444444", linestyle="--", linewidth=1, label="published v14.3: 0.382")
axes.legend()
run.show(figure, "density")

# %%
# The student is saved now: what follows may take longer than the session lasts.
metrics = run.metrics(task, student, result, measured, stages=gains, layers_fed_by_spikes=fed,
                      **beyond, recall_chance=chance)
if result.finished:
    run.save("samples.json", samples)
    run.finish({**metrics, "left": "the ternary tax"}, student, task.tokenizer)

# %% [markdown]
# ## What the spikes cost: the ternary tax
# The dense twin has the same architecture, seed, batches and budget, and every spike function
# replaced by identity. The tax is spiking PPL / dense PPL on the same tokens. Outside profile ref
# these runs have a tenth of the steps: theirs is the tax of a short budget, not of the run above.

# %%
def tax_recipe(recipe, kind, seed, steps):
    """As `recipe`, with other spikes, seed and steps; what is counted in steps follows them."""
    scaled = vars(asnn.get_recipe(recipe.name, recipe.profile, distill_steps=steps))
    counted = ("distill_steps", "align_steps", "fdd_start", "patience", "eval_every")
    return recipe.replace(spike_kind=kind, seed=seed, **{name: scaled[name] for name in counted})


def tax_row(seed, spiking, dense):
    """The tax of one seed and its standard error, of the paired windows of two runs."""
    difference = np.subtract(spiking["window_nll"], dense["window_nll"])
    tax = spiking["ppl"] / dense["ppl"]
    return {"seed": seed, "spiking": spiking["ppl"], "dense": dense["ppl"], "tax": tax,
            "standard_error": tax * difference.std(ddof=1) / len(difference) ** 0.5}


def measure_tax(task, run, seeds, steps, known, hours, beyond=lambda task, models: {}):
    """Rows of `tax_row`, one for each seed whose two runs are done; `hours()` are left. Runs in
    tax.json or `known` are not made again; one that the hours cut off keeps its checkpoint. In
    tax.json stands too what `beyond` says of the first dense twin."""
    path, kinds = run.folder / "tax.json", (task.recipe.spike_kind, "dense")
    done = {**(json.loads(path.read_text()) if path.is_file() else {}), **known}
    for seed, kind in [(seed, kind) for seed in seeds for kind in kinds]:
        name = f"{kind}-{seed}-{steps}"
        if name not in done:
            other = tax_recipe(task.recipe, kind, seed, steps).replace(max_hours=hours())
            twin, result = asnn.distil(task, other, run.folder / "tax" / name, description=name)
            if not result.finished:
                break
            one = asnn.evaluate(twin, task.tokens["test"], other.seq_len,
                                windows=task.recipe.final_windows)
            done[name] = {"ppl": one.ppl, "window_nll": one.window_nll.tolist()}
            if (kind, seed) == ("dense", seeds[0]):
                done[name] |= beyond(task, {f"dense twin, {steps} steps": twin.eval()})
            run.save("tax.json", done)
            shutil.rmtree(run.folder / "tax" / name)  # its checkpoints, 1.2 GB at full size
    pairs = [(seed, *(done.get(f"{kind}-{seed}-{steps}") for kind in kinds)) for seed in seeds]
    return [tax_row(*pair) for pair in pairs if all(pair[1:])]


known = {f"{recipe.spike_kind}-{seed}-{recipe.distill_steps}": {
    "ppl": test.ppl, "window_nll": test.window_nll.tolist()}}
wanted = range(seed, seed + tax_seeds * (recipe.spike_kind != "dense"))
taxes = measure_tax(task, run, wanted if result.finished else (), tax_steps, known,
                    lambda: hours_left(recipe.max_hours, begin), beyond_perplexity)
if taxes:
    twin = json.loads((run.folder / "tax.json").read_text())[f"dense-{seed}-{tax_steps}"]
    for name in beyond:  # the teacher's rows are there already
        rows = twin.get(name, ())  # none of a run that an earlier version began
        metrics[name] = beyond[name] + [row for row in rows if row["model"] != "teacher"]
    run.show(show_beyond(metrics, chance), "retrieval")
    asnn.show_table(pd.DataFrame(taxes).round(4).to_dict("records"))
    values = pd.Series([row["tax"] for row in taxes])
    metrics["tax"] = {"steps": tax_steps, "runs": taxes, "value": values.mean(),
                      "standard_deviation": values.std() if len(values) > 1 else None}
    print(f"ternary tax {values.mean():.4f} ± {values.std():.4f} (standard deviation) over "
          f"{len(values)} seeds, {tax_steps} steps each, test split, measured")

# %% [markdown]
# On the frozen task (profile ref) the numbers that the project claims go to
# `outputs/reference/headline.json`, where the README and the model card find them.

# %%
def over_seeds(values, errors):
    """A row of headline.json: mean and 95 % interval by Student's t over seeds, or, of one seed, by
    its standard error over windows."""
    n, mean = len(values), float(np.mean(values))
    spread = sem(values) if n > 1 else errors[0]
    low, high = student_t.interval(0.95, n - 1 if n > 1 else 1e6, mean, spread)
    return {"value": mean, "low": float(low), "high": float(high), "seeds": n}


def headlines(recipe, metrics, steps, one):
    """{name: row} of what this run shows: recall where it was trained for that, else the tax and,
    of v14.5, gap and free-running gap. `one` is the student's name in the tables."""
    if recipe.recall_share:
        rows = {row["length"] // recipe.seq_len: row for row in metrics["recall"]
                if row["model"] == one}
        return {f"recall_{times}x": {"value": rows[times]["recall"], "low": rows[times]["low"],
                                     "high": rows[times]["high"], "seeds": 1} for times in (1, 4)}
    taxes = pd.DataFrame(metrics["tax"]["runs"])
    name = f"tax_sites_{steps}" + "_one_step" * (recipe.spike_steps == 1)
    found = {name if len(recipe.spike_sites) > 2 else "tax_kv": over_seeds(
        taxes["tax"], taxes["standard_error"])}
    if recipe.name == "v14.5":
        gap, ppl = metrics["gap"]["test"], metrics["teacher"]["test"]["ppl"]
        found[f"gap_{steps}"] = over_seeds(taxes["spiking"] / ppl, [gap["standard_error"]])
        written = next(row for row in metrics["generation"] if row["model"] == one)
        found["generation_gap"] = over_seeds([written["gap"]], [written["standard_error"]])
    return found


if recipe.profile == "ref" and taxes and tax_steps == recipe.distill_steps:
    command = ("papermill notebooks/asnn_v14_4_transfer.ipynb - -p profile ref -p recipe "
               f"{recipe.name} -p recall_share {recipe.recall_share} -p tax_seeds {len(taxes)}")
    found = headlines(recipe, metrics, tax_steps, "student")
    run.headline(command, found)
    asnn.show_table([{"name": name, **row} for name, row in found.items()])

# %% [markdown]
# ## The long run
# What `recipe = "v14.4-t4"` asks of one T4, by arithmetic. Nothing of it was trained here.

# %%
def training_memory(recipe, vocab_size, teacher_parameters):
    """{part: bytes} that a run in half precision takes of a GPU: an estimate, by arithmetic.

    Backward keeps 46 halves and 20 fp32 of each token, layer and channel (a full-size step on a
    CPU: 173 bytes), 15 bytes more for a channel that is encoded, 19 for one whose rate is held.
    """
    with torch.device("meta"):
        count = asnn.GooseForCausalLM(recipe.student_config(vocab_size)).num_parameters()
    widths = {"mix_in": 4, "mix_out": 1, "ffn_in": 1, "ffn_hidden": 4}
    encoded = sum(widths.get(site, 0) for site in recipe.spike_sites)
    spikes = 15 * encoded + (19 * (2 + encoded) if recipe.rate_weight else 0)
    head, tokens = vocab_size * recipe.d_model, recipe.batch_size * recipe.seq_len
    return {"teacher weights, fp32": 4 * teacher_parameters,
            "student weights, gradients, two moments, fp32": 16 * count,
            "half-precision copies under autocast": 2 * (count + head),
            "kept for backward": tokens * recipe.n_layer * recipe.d_model * (172 + spikes),
            "gradient of the head, fp32": 4 * head,
            "logit chunks of the loss": asnn.LOGIT_BUDGET["cuda"],
            "CUDA context and workspaces, allowance": 2**30}


long, speed = asnn.get_recipe("v14.4-t4", "t4"), 7_800  # tokens/s: a T4's roofline
parts = training_memory(long, 50257, 124_439_808)
planned = sum(parts.values()) / 2**30
asnn.show_table([{"memory": name, "GiB": f"{size / 2**30:.2f}"} for name, size in parts.items()])
step_tokens = long.batch_size * long.grad_accum * long.seq_len
hours = long.distill_steps * step_tokens / speed / 3600
print(f"{planned:.1f} GiB of 16; {long.distill_steps:,} steps of {step_tokens:,} tokens: "
      f"{hours:.1f} h at {speed:,} tokens/s, at best, {1.6 * hours:.1f} h with the tax of 3 seeds, "
      f"which goes on in a second session; budget {long.max_hours:g} h (all estimated)")

# %% [markdown]
# ## Contract
# Facts that hold in every profile; continuous integration compares their output.

# %% tags=["nbval-check-output"]
with torch.device("meta"):
    full = asnn.GooseForCausalLM(asnn.get_recipe("v14.4", "t4").student_config(50257))
print("full-size student, parameters:", full.num_parameters())
print("chunked form equals the loop:", worst < 1e-12)
own, again = recalled.values()
renews = all(row["delta"] > row["matrix"] + 0.1 for row in again[-4:])
print("the delta rule replaces what a key held:", renews)
print("and holds less than a sum of 128 keys:", own[-1]["delta"] < own[-1]["matrix"])
print("the long run is estimated to fit 16 GB:", planned < 14)

# %% tags=["nbval-check-output"]
with torch.no_grad():
    exact = copy.deepcopy(student).cpu().double().eval()  # no threshold is crossed by rounding
    probe, alphabet = torch.randn(2, 32, recipe.d_model, dtype=torch.float64), set()
    with asnn.spike_hooks(exact, lambda name, s: alphabet.update((s.unique() + 0.0).tolist())):
        exact(torch.from_numpy(tokens["validation"][:32].astype(np.int64))[None])
    linear, own = exact.goose.blocks[0].ffn.up, exact.goose.blocks[0].ffn.ffn_in
    encoder = own if isinstance(own, asnn.SpikeEncoder) else asnn.SpikeEncoder(recipe.d_model)
    encoder = encoder.double()
    encoder.calibrate(probe)
    spikes, scale = encoder.encode(probe)
    folded = encoder.fold(linear)
    agrees = torch.allclose(scale * (spikes @ folded.weight.t()) + folded.bias,
                            linear(encoder(probe)), atol=1e-5)
print("every train of spikes has the alphabet", sorted(alphabet))
print("an encoder folds into the next Linear:", agrees)

# %% tags=["nbval-check-output"]
with torch.no_grad():
    ids = torch.from_numpy(tokens["validation"][:64].astype(np.int64)).view(2, 32)
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % exact.config.vocab_size
    whole, other, first = exact(ids).logits, exact(changed).logits, exact(ids[:, :13])
    cached = torch.cat((first.logits, exact(ids[:, 13:], state=first.state).logits), 1)
print("a changed token changes nothing before it:", torch.equal(whole[:, :20], other[:, :20]))
print("and something from it on:", not torch.equal(whole[:, 20:], other[:, 20:]))
print("cached equals uncached:", torch.allclose(cached, whole, atol=1e-6))

# %% [markdown]
# ## Saved artefacts
# The student is a Hugging Face folder that loads without this project. The tax comes to it now.

# %%
complete = result.finished and len(taxes) == len(wanted)
if complete:
    run.finish({**metrics, "notebook_seconds": time.perf_counter() - begin})
    shutil.rmtree(run.folder / "tax", ignore_errors=True)  # empty by now

# %% tags=["nbval-check-output"]
for name in (".", "figures", "student"):
    files = sorted(p.name for p in (run.folder / name).glob("*") if p.suffix != ".svg")
    print(f"{name}:", files or "not yet: the run is not finished")

# %% [markdown]
# ## Summary

# %%
gap, tax = metrics["gap"]["test"], metrics.get("tax", {}).get("value", math.nan)
print(f"{task.corpus.name}, teacher {task.teacher_name}: test PPL {test.ppl:.2f} against "
      f"{measured['teacher']['test'].ppl:.2f}; {100 * fed:.0f} % of the layers' products with "
      f"weights are fed by spikes; metrics and figures in {os.path.relpath(run.folder)}")
if not complete:
    print("Run all cells again to go on; on Kaggle attach the output of this session first.")
print(f"{'Finished' if complete else 'Not finished'}: {recipe.name}, gap {gap['value']:.3f} ± "
      f"{gap['standard_error']:.3f} (standard error, {test.windows} windows, measured), "
      f"tax {tax:.3f}, {time.perf_counter() - begin:.0f} s")
