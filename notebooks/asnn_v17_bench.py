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
# # ASNN-Goose v17: what it saves
#
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://www.kaggle.com/code/new)
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/#upload=true)
# ![Python 3.11-3.13](https://img.shields.io/badge/python-3.11--3.13-blue)
# ![torch 2.10+](https://img.shields.io/badge/torch-2.10%2B-orange)
#
# A user has other choices than a spiking student: GPT-2 itself, GPT-2 in int8, a smaller GPT-2, another recurrent model. This notebook runs them all on the machine at hand, in turns, and reports latency, throughput, memory, operations and energy, with the quality beside each.
# What is measured and what is estimated stands in separate columns. Speed does not depend on what weights hold, so the large models here have random ones, with spikes as dense as those of the trained student; quality is that of the trained student, on its own task.
#
# *Run All* needs no editing. `asnn.bench(model, tokenizer)` does the same for any causal language model of transformers.

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
# The only cell to edit. `None` means: what the profile and the hardware say.

# %% tags=["parameters"]
student = None  # "v14.4-rates/cpu-seed42", the folder of a run, or None: the newest with spikes before its products
profile = None  # tiny, cpu, ref, t4: how large the measurements are, and the short run that makes a student where there is none
layers = None  # of the student whose speed is measured, width 768; None: 2 in profile tiny, else 5
repeats = None  # interleaved measurements of each case; None: 3 in profile tiny, else 25
contexts = None  # tokens before the decoded one; None: [16, 48] in profile tiny, else [128, 512, 1000, 8192]
batches = None  # sequences decoded at once; None: [1, 2] in profile tiny, else [1, 4, 16, 64]
compiled = None  # let torch.compile fuse the students' small operations too; None: yes, but not in profile tiny
price_per_hour = 0.35  # dollars for an hour of the hardware that trained the student: an assumption, for estimates of cost
seed = 42
run_name = None  # None: <version>-<run> of the student; a finished run is never overwritten

# %% [markdown]
# ## Configuration and environment
# Measurements belong to one machine and one number of threads; runs of different hardware are not compared.

# %%
import copy
import dataclasses
import json
import math
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are text here
import asnn_common as asnn  # noqa: E402
from transformers import AutoModelForCausalLM, GPT2Config, RwkvConfig  # noqa: E402

asnn.figure_style()  # one look for all notebooks, in colours that people with any colour vision tell apart
begin = time.perf_counter()
asnn.check_parameters(student=student, profile=profile, layers=layers, repeats=repeats, contexts=contexts,
                      batches=batches, compiled=compiled, price_per_hour=price_per_hour, seed=seed, run_name=run_name)
size, reason = asnn.select_profile(profile)
device, _ = asnn.select_device()
tiny = size.name == "tiny"
layers, repeats = layers or (2 if tiny else 5), repeats or (3 if tiny else 25)
contexts, batches = sorted(contexts or ([16, 48] if tiny else [128, 512, 1000, 8192])), sorted(batches or ([1, 2] if tiny else [1, 4, 16, 64]))
compiled = not tiny if compiled is None else compiled
width, vocabulary, positions = (64, 512, 40) if tiny else (768, 50257, 1024)
asnn.require(min(contexts) < positions, "contexts", contexts, f"at least one below the {positions} positions of GPT-2, beside longer ones")
env = asnn.environment()
hardware = asnn.hardware_text(env, gpus=device.type == "cuda")
print(reason)
asnn.show_preflight(device=device, precision="auto" if device.type == "cuda" else "fp32")

# %% [markdown]
# The student, its gate and its densities. What is saved by skipping is claimed for a network whose spikes are known to carry information, or marked as ungated.

# %%
loaded = asnn.load_student(student, size, reason, "v14.4-rates", without=("v16", "v17"), sites=asnn.SITES[2:-1], steps=60, seed=seed)
brain, recipe, task, origin, site_density = loaded.student, loaded.recipe, loaded.task, loaded.metrics, loaded.site_density
settings = {"student": asnn.student_id(brain), "layers": layers, "repeats": repeats, "contexts": contexts, "batches": batches, "compiled": compiled, "seed": seed,
            "threads": env["threads"], "recipe": dataclasses.asdict(recipe), "profile": dataclasses.asdict(loaded.profile)}
run = asnn.Run.open("v17", run_name or loaded.name, json.loads(json.dumps(settings)))
print(loaded)
print(loaded.gate)
print("densities " + ", ".join(f"{site} {share:.2f}" for site, share in site_density.items()) + " (measured, 8 validation windows)")
print(run.note)

# %% [markdown]
# ## Systems
# All of them with random weights. `GPT-2` is what the student was made from; its int8 form is what a user would try first; `GPT-2 of this size` and transformers' RWKV have as many layers and the width of the student.

# %%
asnn.seed_everything(seed)
gpt = GPT2Config(n_layer=2 * layers if tiny else 12, n_embd=width, n_head=max(1, width // 64), vocab_size=vocabulary, n_positions=positions, bos_token_id=0, eos_token_id=0)
spiking = asnn.get_recipe("v14.4-sites").replace(n_layer=layers, d_model=width)
large = asnn.random_student(spiking, vocabulary, site_density, seed)
systems = {"GPT-2, eager": AutoModelForCausalLM.from_config(gpt, attn_implementation="eager"), "GPT-2, SDPA": AutoModelForCausalLM.from_config(gpt, attn_implementation="sdpa")}
systems["GPT-2 of this size"] = AutoModelForCausalLM.from_config(GPT2Config(**{**gpt.to_diff_dict(), "n_layer": layers}), attn_implementation="sdpa")
systems["RWKV of transformers"] = AutoModelForCausalLM.from_config(RwkvConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=vocabulary, intermediate_size=4 * width, context_length=positions, bos_token_id=0, eos_token_id=0))
systems |= {"student, dense": large, "dense twin": asnn.random_student(spiking.replace(spike_kind="dense"), vocabulary, {}, seed), "student, gather": asnn.sparsify(large, "gather")}
large_density = asnn.spike_density(large, torch.randint(0, vocabulary, (2, 32)))
print(asnn.load_kernel() or "the C++ kernel is built")

# %% [markdown]
# On the CPU there are int8 forms too. On a GPU the models run under autocast, fp16 on a T4 and bf16 from compute capability 8.0 on; libraries have no int8 gather there.

# %%
if device.type == "cpu":
    systems |= {"GPT-2, int8": asnn.quantize_int8(systems["GPT-2, SDPA"]), "student, dense int8": asnn.quantize_int8(large),
                "student, auto": asnn.sparsify(large, "auto", density=large_density),
                "student, gather_int8": asnn.sparsify(large, "gather_int8", head="int8", embeddings="int8")}
    if compiled:
        systems |= {f"{name}, compiled": asnn.compile_step(copy.deepcopy(systems[name])) for name in ("student, dense", "student, dense int8", "student, gather", "student, gather_int8")}
    precision = "fp32 unless a name says int8"
else:
    precision, why = asnn.select_precision(device)
    for name, model in systems.items():
        model.to(device)
        if precision != "fp32":
            model.forward = torch.autocast("cuda", {"fp16": torch.float16, "bf16": torch.bfloat16}[precision])(model.forward)
fastest = next(name for name in ("student, gather_int8, compiled", "student, gather_int8", "student, gather") if name in systems)
plain = lambda name: "student, dense" if name.startswith("student") else "GPT-2, eager" if name == "GPT-2, int8" else name  # noqa: E731
asnn.show_table([{"system": name, "parameters": f"{asnn.count_parameters(systems[plain(name)]) / 1e6:.1f}M", "weights, MiB": f"{asnn.tensor_bytes(model) / 2**20:,.1f}"} for name, model in systems.items()])
print(f"precision: {precision}; fastest student expected: {fastest}")

# %% [markdown]
# ## One token at a time
# Latency of a decoded token after a context, with the cache that each system has; all of them in turns, warm-up calls outside the clock.

# %%
middle = [context for context in contexts if context < positions][:2][-1]  # the second, where GPT-2 still has a position
first = asnn.bench(systems, None, [middle], [1], repeats)
asnn.show_table(first.table())
print(f"medians of {repeats} interleaved measurements, context {middle}, {hardware}; energy counter: {first.environment['energy counter'] or 'none that can be read: energy is only estimated below'}")

# %% [markdown]
# The same measurement once more: how far can the numbers be trusted?

# %%
second = asnn.bench(systems, None, [middle], [1], repeats, prefill_up_to=0)
agreement = first.agreement(second)
asnn.show_table([{"system": key[0], "second run over first": f"{ratio:.3f}"} for key, ratio in agreement.items()])
print(f"medians of two runs differ by {100 * np.median(np.abs(np.array(list(agreement.values())) - 1)):.1f} % in the median and {100 * max(abs(r - 1) for r in agreement.values()):.1f} % at most (measured)")

# %% [markdown]
# ## Contexts
# The student's state has the same size after 128 tokens and after 8192. A transformer's cache grows with each, and GPT-2 has no position beyond its last.

# %%
few = [name for name in ("GPT-2, SDPA", "GPT-2, int8", "RWKV of transformers", "student, dense", fastest) if name in systems]


def once(later, before):
    """New measurements, with those of `before` where that has the case too: each case has one number on this page."""
    known = {before.key(row): row for row in before.rows}
    return asnn.Bench([known.get(later.key(row), row) for row in later.rows], later.environment)


by_context = once(asnn.bench({name: systems[name] for name in few if "RWKV" not in name}, None, contexts, [1], repeats), first)
asnn.show_table(by_context.table())


def plot_lines(bench, x, title, label, ylabel, value):
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, style in zip(dict.fromkeys(row["system"] for row in bench.rows), "o-,s--,^-.,D:,v-,x--".split(",")):
        points = [(row[x], value(row)) for row in bench.rows if row["system"] == name and "decode" in row]
        alone = {"markersize": 11, "markerfacecolor": "none"} if len(points) == 1 else {}  # seen behind another
        axis.plot(*zip(*points), style, label=name, **alone)
    axis.set(title=f"{title}, {hardware}", xscale="log", xlabel=label, ylabel=ylabel, ylim=(0, None))
    asnn.plain_log(axis.xaxis, sorted({row[x] for row in bench.rows}))
    axis.legend()
    return figure


run.show(plot_lines(by_context, "context", "one decoded token", "context, tokens", "ms per token", lambda row: 1e3 * row["decode"]["median"]), "contexts")
spread = {name: [row["decode"]["median"] for row in by_context.rows if row["system"] == name and "decode" in row] for name in few}
print("; ".join(f"{name}: {1e3 * values[0]:.2f} ms at context {contexts[0]}, {1e3 * values[-1]:.2f} ms at {contexts[len(values) - 1]:,}, ratio {values[-1] / values[0]:.3f}" for name, values in spread.items() if values) + " (measured)")

# %% [markdown]
# ## Batches
# Many sequences share the weights that a dense product reads, and the advantage of skipping goes: from some batch on, arithmetic is the limit.

# %%
by_batch = asnn.bench({name: systems[name] for name in few}, None, [contexts[0]], batches, max(3, repeats // 2), prefill_up_to=contexts[0])
by_batch = once(by_batch, first.merge(by_context))
everything = first.merge(by_context).merge(by_batch)
asnn.show_table(by_batch.table())
run.show(plot_lines(by_batch, "batch", f"decoding after {contexts[0]} tokens", "sequences decoded at once", "tokens/s", lambda row: row["tokens/s"]), "batches")

# %% [markdown]
# ## Memory
# Weights, state or cache, and what a step allocates, of one sequence after the longest context that each system can hold.

# %%
def plot_memory(bench):
    longest = {row["system"]: row for row in bench.rows if "decode" in row}
    figure, axis = plt.subplots(figsize=(7, 0.5 + 0.5 * len(longest)))
    left = np.zeros(len(longest))
    for part, colour in (("weights", asnn.COLOURS["blue"]), ("cache", asnn.COLOURS["orange"]), ("activations", asnn.COLOURS["green"])):
        sizes = np.array([row["memory"][part] / 2**20 for row in longest.values()])
        axis.barh(range(len(longest)), sizes, left=left, color=colour, label={"cache": "state or cache"}.get(part, part))
        left += sizes
    axis.set_yticks(range(len(longest)), [f"{name}\n({row['context']:,} tokens)" for name, row in longest.items()], fontsize=8)
    axis.invert_yaxis()
    axis.set(title="memory of one sequence", xlabel="MiB")
    axis.legend()
    return figure


run.show(plot_memory(by_context), "memory")
print(f"peak memory of this process, all systems at once: {asnn.peak_memory_gb():.2f} GiB (measured)")

# %% [markdown]
# ## Operations
# What one token costs the student, by product: multiply-accumulates of the dense form, and what is left of them where spikes feed a product. The sum of the dense form is compared with torch's FlopCounterMode.

# %%
operations = asnn.operations(large, large_density)
summed = {}
for row in operations:
    entry = summed.setdefault((row["product"], row["site"].split(".")[0]), {"MACs": 0, "adds": 0, "skipped": 0, "state updates": 0, "density": []})
    for what in ("MACs", "adds", "skipped", "state updates"):
        entry[what] += row[what]
    entry["density"].append(row["density"])
asnn.show_table([{"product": product, "site": site, "MACs, dense": f"{e['MACs']:,}", "fed by spikes": "yes" if e["skipped"] or (e["adds"] and e["MACs"]) else "no", "density": f"{np.mean(e['density']):.2f}",
                  "additions left": f"{e['adds']:,}", "skipped": f"{e['skipped']:,}", "state updates": f"{e['state updates']:,}"} for (product, site), e in summed.items()])
decoder = asnn.Decoder(large, torch.randint(0, vocabulary, (1, 8), device=device))
with FlopCounterMode(display=False) as counter:
    decoder()
analytic, counted = sum(row["MACs"] for row in operations), counter.get_total_flops() // 2
skipped = sum(row["skipped"] for row in operations)
print(f"{analytic:,} MACs per token in the dense form, analytic; {counted:,} by FlopCounterMode; {100 * skipped / analytic:.0f} % of them skipped at these densities (measured densities, {layers} layers)")

# %% [markdown]
# By layer and site, from which the table above is summed:

# %%
asnn.show_table([{"layer": row["layer"], "product": row["product"], "site": row["site"], "MACs": f"{row['MACs']:,}", "density": f"{row['density']:.2f}", "adds": f"{row['adds']:,}", "skipped": f"{row['skipped']:,}", "state updates": f"{row['state updates']:,}"} for row in operations if row["layer"] in (0, "-")])
print(f"the first of {layers} layers, and the head")

# %% [markdown]
# ## Energy
# Measured where the machine has a counter. Otherwise estimated from operations and bytes at 45 nm (Horowitz 2014: MAC 4.6 pJ, addition 0.9 pJ, a byte of DRAM 160 pJ); a column that leaves out DRAM and head says little, because memory costs most.

# %%
def bytes_read(model, spikes=None):
    """Weights that one token reads: all of a dense model's but the embedding table, the rows that fired of a sparse one's."""
    total = 0
    for module in model.modules():
        if isinstance(module, asnn.SpikeLinear):
            weights = next(w for w in (module.packed, module.rows, module.weight) if w is not None)
            total += weights.nbytes * (module.density if module.backend_for(1) in ("gather", "gather_int8", "embedding_bag", "embedding_bag_int8") else 1)
        elif not list(module.children()) and not isinstance(module, torch.nn.Embedding) and "Embedding" not in type(module).__name__:
            total += asnn.tensor_bytes(module)
    return int(total)


def dense_rows(model):
    """GPT-2's layers and head as rows of MACs, counted by FlopCounterMode on a decoding step."""
    step = asnn.Decoder(model, torch.randint(0, vocabulary, (1, min(middle, 512)), device=device))
    with FlopCounterMode(display=False) as found:
        step()
    head = model.get_output_embeddings().weight.numel()
    return [{"product": product, "MACs": macs, "adds": 0, "skipped": 0, "state updates": 0} for product, macs in (("layers", found.get_total_flops() // 2 - head), ("head", head))]


dense_operations = asnn.operations(systems["dense twin"])
sparse_form = asnn.sparsify(large, "gather", density=large_density)
forms = {"GPT-2, eager": (dense_rows(systems["GPT-2, eager"]), bytes_read(systems["GPT-2, eager"])), "student, dense": (dense_operations, bytes_read(large)),
         "student, gather": (operations, bytes_read(sparse_form))}
if device.type == "cpu":
    forms |= {"GPT-2, int8": (forms["GPT-2, eager"][0], bytes_read(systems["GPT-2, int8"])),
              "student, gather_int8": (operations, bytes_read(asnn.sparsify(large, "gather_int8", head="int8", density=large_density)))}
joules = {name: asnn.energy_estimate(rows, size_read) for name, (rows, size_read) in forms.items()}
counted_joules = {row["system"]: row["joules per token"] for row in first.rows if "decode" in row}
asnn.show_table([{"system": name, **{f"{column}, uJ (estimated)": f"{1e6 * value:,.1f}" for column, value in columns.items()}, "weights read, MB": f"{forms[name][1] / 1e6:,.1f}",
                  "measured, J": f"{counted_joules[name]:.3g}" if counted_joules.get(name) else "no counter"} for name, columns in joules.items()])
print("estimated per decoded token, fp32 operations at 45 nm in all rows: int8 saves more than this table says, in arithmetic, and what it says in memory")

# %% [markdown]
# ## Quality per cost
# Tokens per second and joules of the full size, the gap of the trained student on its own task: two facts about two networks of one kind, put side by side because only together they mean something. Systems that were not trained have no gap.

# %%
scored = task.tokens["validation"][:(2048 if tiny else 20_480) + 1]
quality = {"student, dense": asnn.evaluate(brain, scored, recipe.seq_len, description="dense"), "student, gather": asnn.evaluate(asnn.sparsify(brain, "gather"), scored, recipe.seq_len, description="gather")}
if device.type == "cpu":
    quality |= {"student, gather_int8": asnn.evaluate(asnn.sparsify(brain, "gather_int8", head="int8", embeddings="int8"), scored, recipe.seq_len, description="gather_int8"),
                "student, dense int8": asnn.evaluate(asnn.quantize_int8(brain), scored, recipe.seq_len, description="dense int8")}
teacher = asnn.evaluate(task.teacher.model, scored, recipe.seq_len, description="teacher")
gaps = {"GPT-2, SDPA": 1.0, **{name: result.ppl / teacher.ppl for name, result in quality.items()}}
gaps |= {"GPT-2, eager": 1.0, "GPT-2, int8": asnn.evaluate(asnn.quantize_int8(task.teacher.model), scored, recipe.seq_len, description="teacher int8").ppl / teacher.ppl} if device.type == "cpu" else {}
if origin.get("tax"):
    gaps["dense twin"] = gaps["student, dense"] / origin["tax"]["value"] if "value" in origin["tax"] else None
gap_of = lambda name: gaps.get(name.replace(", compiled", ""), gaps.get("student, dense") if name == "student, auto" else None)  # noqa: E731
speed = {row["system"]: row["tokens/s"] for row in first.rows if "decode" in row}
energy = {name: columns["idealised, with DRAM and head"] for name, columns in joules.items()}
asnn.show_table([{"system": name, "tokens/s": f"{rate:,.1f}", "gap": f"{gap_of(name):.3f}" if gap_of(name) else "not trained", "uJ per token (estimated)": f"{1e6 * energy[name.replace(', compiled', '')]:,.0f}" if name.replace(", compiled", "") in energy else "-"} for name, rate in speed.items()])
print(f"gap: validation PPL over that of the teacher ({teacher.ppl:.2f}) on the same {teacher.tokens:,} tokens, {origin['version']}/{origin['run']} (measured; {'gated' if loaded.gated else 'ungated'})")


def plot_pareto():
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    numbers = {name: i + 1 for i, name in enumerate(name for name in speed if gap_of(name))}
    for axis, values, label, best in ((axes[0], speed, "tokens/s, batch 1 (measured)", max), (axes[1], {n: 1e6 * v for n, v in energy.items()}, "uJ per token, with DRAM and head (estimated)", min)):
        points = {name: (value, gap_of(name)) for name, value in values.items() if gap_of(name)}
        clusters = []  # points that lie together have their numbers in one text
        for name, (x, y) in sorted(points.items(), key=lambda item: (round(item[1][1], 1), item[1][0])):
            skips = "gather" in name or "auto" in name
            axis.scatter(x, y, color=asnn.COLOURS["vermillion" if skips else "blue"], marker="s" if skips else "o", zorder=3)
            last = clusters[-1][-1] if clusters else None
            if last and abs(x - last[0]) < 0.05 * max(p[0] for p in points.values()) and abs(y - last[1]) < 0.1:
                clusters[-1].append((x, y, name))
            else:
                clusters.append([(x, y, name)])
        for cluster in clusters:
            x, y = np.mean([x for x, _, _ in cluster]), max(y for _, y, _ in cluster)
            axis.annotate(", ".join(str(numbers[name]) for *_, name in cluster), (x, y), xytext=(0, 8), textcoords="offset points", ha="center",
                          fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8}, zorder=2)
        front = sorted(p for p in set(points.values()) if not any((q[0] >= p[0] if best is max else q[0] <= p[0]) and q[1] <= p[1] and q != p for q in points.values()))
        axis.plot(*zip(*front), "k--", lw=0.8, zorder=1)
        axis.set(xlabel=label)
        axis.margins(0.15)
    axes[0].set(ylabel="gap (student PPL / teacher PPL)", title="faster is to the right")
    axes[1].set(title="less energy is to the left")
    keys = [plt.Line2D([], [], color=asnn.COLOURS[colour], marker=marker, linestyle="none", label=label)
            for colour, marker, label in (("blue", "o", "dense products"), ("vermillion", "s", "products that skip zeros"))]
    axes[1].legend(handles=[*keys, plt.Line2D([], [], color="k", linestyle="--", lw=0.8, label="Pareto front")], loc="center right")
    figure.tight_layout()
    figure.subplots_adjust(right=0.8)
    figure.text(0.81, 0.5, "\n".join(f"{number}  {name}" for name, number in numbers.items()), fontsize=8, va="center")
    return figure


run.show(plot_pareto(), "pareto")

# %% [markdown]
# ## Cost of training
# What the student's run took, and what a point of gap cost in it. The price of an hour is an assumption of the parameter cell.

# %%
training = origin["training"]
hours = training["seconds"] / 3600
teacher_ppl = origin["teacher"]["test"]["ppl"]
gap_end = origin["gap"]["test"]["value"]
recipe_vocabulary = brain.config.vocab_size
untrained = recipe_vocabulary / teacher_ppl  # a model that knows nothing guesses among all tokens
asnn.show_table([{"run": f"{origin['version']}/{origin['run']}", "steps": training["step"], "tokens/s": f"{training['tokens_per_second']:,.0f}", "hours": f"{hours:.3f}", "gap at the end": f"{gap_end:.3f}",
                  "cost, $ (estimated)": f"{hours * price_per_hour:.4f}", "cost of halving the gap, $ (estimated)": f"{hours * price_per_hour / max(1e-9, math.log2(untrained / gap_end)):.5f}",
                  "cost per point of gap, $ (estimated)": f"{hours * price_per_hour / max(1e-9, untrained - gap_end):.2g}"}])
print(f"from a model that guesses among all {recipe_vocabulary:,} tokens (gap {untrained:.0f}) to the end of the run; hours measured, {price_per_hour} $ per hour assumed")

# %% [markdown]
# ## Scale
# Four sizes, measured: latency is the layers' fixed costs and the bytes that a token reads. Two numbers are fitted to the four, and an estimate for a billion parameters follows with its interval.

# %%
sizes = [(64, 1), (64, 2), (128, 1), (128, 2)] if tiny else [(256, 2), (512, 4), (768, 5), (1024, 10)]
scaled = {}
for d, n in tqdm(sizes, desc="sizes"):
    model = asnn.random_student(asnn.get_recipe("v14.4-sites").replace(n_layer=n, d_model=d), vocabulary, site_density, seed)
    form = asnn.sparsify(model, "gather_int8" if device.type == "cpu" else "gather", head="int8" if device.type == "cpu" else "dense", density=asnn.spike_density(model, torch.randint(0, vocabulary, (2, 32)))).to(device)
    for name, candidate in (("dense", model.to(device)), ("sparse", form)):
        scaled[name, d, n] = {"parameters": asnn.count_parameters(model), "bytes": bytes_read(candidate), "memory": asnn.tensor_bytes(candidate), "step": asnn.Decoder(candidate, torch.randint(0, vocabulary, (1, 16), device=device))}
timings = asnn.time_interleaved({key: value["step"] for key, value in scaled.items()}, repeats, min_seconds=0.0)


def fit_latency(name, target):
    """Seconds = a * layers + b * bytes, by least squares on relative errors; (a, b, estimate, half of its 95 % interval) for a target (layers, bytes)."""
    from scipy import optimize, stats
    keys = [key for key in scaled if key[0] == name]
    seconds = np.array([timings[key].median for key in keys])
    X = np.array([[key[2], scaled[key]["bytes"]] for key in keys]) / seconds[:, None]
    scale = X.max(0)
    inverse = np.linalg.inv((X / scale).T @ (X / scale))
    coefficients = optimize.nnls(X / scale, np.ones(len(keys)))[0]  # neither a layer nor a byte takes less than no time
    residual = np.ones(len(keys)) - X / scale @ coefficients
    variance = residual @ residual / (len(keys) - 2)
    x = np.array(target) / scale
    estimate = x @ coefficients
    # The error of a new measurement is relative to it, as those of the fit are.
    half = stats.t.ppf(0.975, len(keys) - 2) * math.sqrt(variance * (x @ inverse @ x + estimate ** 2))
    return coefficients[0] / scale[0], coefficients[1] / scale[1], estimate, half


billion = asnn.get_recipe("v14.4-sites").replace(n_layer=16, d_model=2048).student_config(vocabulary)
with torch.device("meta"):
    parameters = asnn.count_parameters(asnn.GooseForCausalLM(billion))
layer_weights = 16 * 13 * 2048 ** 2
mean_density = float(np.mean([site_density["mix_in"]] * 4 + [site_density["mix_out"]] + [site_density["ffn_in"]] * 4 + [site_density["ffn_hidden"]] * 4))
target_bytes = {"dense": 4.0 * (layer_weights + 2048 * vocabulary), "sparse": (1.0 if device.type == "cpu" else 4.0) * (layer_weights * mean_density + 2048 * vocabulary)}
fits = {name: fit_latency(name, (16, target_bytes[name])) for name in ("dense", "sparse")}
asnn.show_table([{"form": name, "width": d, "layers": n, "parameters": f"{scaled[name, d, n]['parameters'] / 1e6:.1f}M", "ms per token (quartiles)": t.text(), "read per token, MB": f"{scaled[name, d, n]['bytes'] / 1e6:.1f}",
                  "weights, MiB": f"{scaled[name, d, n]['memory'] / 2**20:.0f}", "fitted, ms": f"{1e3 * (fits[name][0] * n + fits[name][1] * scaled[name, d, n]['bytes']):.2f}"} for (name, d, n), t in timings.items()])
for name, (per_layer, per_byte, estimate, half) in fits.items():
    print(f"{name}: {1e3 * per_layer:.2f} ms per layer and {1e-9 / max(per_byte, 1e-15):.1f} GB/s fitted; {parameters / 1e9:.2f}B parameters (2048 wide, 16 layers): {1e3 * max(0.0, estimate - half):.0f} to {1e3 * (estimate + half):.0f} ms per token (estimated, 95 % interval of a new measurement)")

# %%
def plot_scale():
    figure, axis = plt.subplots(figsize=(7, 4))
    for (name, marker, colour) in (("dense", "o", asnn.COLOURS["blue"]), ("sparse", "s", asnn.COLOURS["vermillion"])):
        keys = [key for key in scaled if key[0] == name]
        axis.plot([scaled[key]["parameters"] / 1e6 for key in keys], [1e3 * timings[key].median for key in keys], marker, color=colour, label=f"{name}, measured")
        *_, estimate, half = fits[name]
        axis.errorbar([parameters / 1e6], [1e3 * estimate], [[1e3 * min(half, 0.99 * estimate)], [1e3 * half]], fmt=marker, mfc="none", color=colour, capsize=4, label=f"{name}, estimated")
    axis.set(title=f"decoding at other sizes, {hardware}", xscale="log", yscale="log", xlabel="parameters, millions", ylabel="ms per token")
    asnn.plain_log(axis.xaxis)
    asnn.plain_log(axis.yaxis)
    axis.legend()
    return figure


run.show(plot_scale(), "scale")

# %% [markdown]
# ## Contract
# Facts that hold in every profile and on every machine; continuous integration compares their output.

# %% tags=["nbval-check-output"]
print("analytic MACs equal FlopCounterMode:", analytic == counted)
print("what is fed is added or skipped:", all(row["adds"] + row["skipped"] == row["MACs"] for row in operations if row["skipped"]))
print("the idealised estimate is never above what is built:", all(columns["idealised"] <= columns["as built"] for columns in joules.values()))
states = {row["memory"]["cache"] for row in by_context.rows if row["system"] == "student, dense" and "decode" in row}
print("the student's state has one size at all contexts:", len(states) == 1)
print("GPT-2 ends at its positions:", any("ends at" in row.get("status", "") for row in by_context.rows if row["system"].startswith("GPT-2")))
print("each case has one number:", all(row in everything.rows for part in (first, by_context, by_batch) for row in part.rows))
print("a second run is measured anew:", any(ratio != 1 for ratio in agreement.values()))
try:
    first.agreement(asnn.Bench([], first.environment | {"cpu": "another"}))
except ValueError as error:
    print("other hardware is not compared:", "cpu of the other measurements" in str(error))

# %% [markdown]
# ## Saved artefacts
# `bench.json` holds every row, `bench.md` and `bench.tex` the tables for a README and a paper.

# %%
if run.main:
    everything.save(run.folder / "bench.json")
    everything.save(run.folder.parent / "bench.json")
    for name, text in (("bench.md", everything.markdown()), ("bench.tex", everything.latex())):
        asnn.write_atomically(run.folder / name, text)
        asnn.write_atomically(run.folder.parent / name, text)
    asnn.write_atomically(run.folder / "efficiency.json", json.dumps({
        "gate": loaded.gate, "gated": loaded.gated, "context": middle, "measured twice": "the first", "fastest": fastest, "densities": site_density, "operations": operations, "joules, estimated": joules, "bytes read": {name: size_read for name, (_, size_read) in forms.items()},
        "gaps": gaps, "agreement": {" ".join(map(str, key)): ratio for key, ratio in agreement.items()}, "scale": {f"{name} {d} {n}": {k: v for k, v in value.items() if k != "step"} | dataclasses.asdict(timings[name, d, n]) for (name, d, n), value in scaled.items()},
        "fits": fits, "training": {"hours": hours, "price per hour, assumed": price_per_hour}, "hardware": hardware}, indent=1))
run.finish({**origin, "version": f"v17 of {origin['version']}", "run": run.folder.name, "notebook_seconds": time.perf_counter() - begin})

# %% tags=["nbval-check-output"]
print("saved:", sorted({"bench.json", "bench.md", "bench.tex", "efficiency.json", "metrics.json", "config.json", "env.json", "figures"} & {path.name for path in run.folder.glob("*")}))

# %% [markdown]
# ## Summary
# The student is fast for three reasons, and only one of them is spikes: products read memory better than the library's, int8 weights are a fourth of the bytes, and zeros are skipped. `asnn_v16_sparse` takes the first and the last apart; `student, dense int8, compiled` is the fair row to hold against.

# %%
rate = {row["system"]: row for row in first.rows if "decode" in row}
whole = lambda row: sum(row["memory"].values())  # noqa: E731
against = [name for name in ("GPT-2, eager", "GPT-2, SDPA", "GPT-2, int8", "GPT-2 of this size", "RWKV of transformers", "student, dense", "student, dense int8") if name in rate]
print(f"The student is {loaded.gate}. {fastest}, {layers} layers of width {width}, context {middle}, batch 1, {hardware}: {rate[fastest]['tokens/s']:,.1f} tokens/s, that is " + ", ".join(f"{rate[fastest]['tokens/s'] / rate[name]['tokens/s']:.2f}x {name}" for name in against) + " (measured).")
print(f"Memory (weights, state or cache, activations): {whole(rate[fastest]) / 2**20:,.0f} MiB, " + ", ".join(f"{whole(rate[fastest]) / whole(rate[name]):.2f} of {name}" for name in against) + " (measured).")
if spread.get(fastest):
    print(f"Latency at context {contexts[-1]:,} is {spread[fastest][-1] / spread[fastest][0]:.3f} of that at {contexts[0]} (measured).")
print(f"{time.perf_counter() - begin:.0f} s in this notebook; results in {os.path.relpath(run.folder)}")
