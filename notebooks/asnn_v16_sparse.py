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
# # ASNN-Goose v16: skip the zeros
#
# [![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://www.kaggle.com/code/new)
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/#upload=true)
# ![Python 3.11-3.13](https://img.shields.io/badge/python-3.11--3.13-blue)
# ![torch 2.10+](https://img.shields.io/badge/torch-2.10%2B-orange)
#
# A product of weights and spikes needs only the weights of channels that fired. For one token at a time that is what counts: decoding waits for memory, and rows that are not read cost nothing, at any density.
# This notebook takes a student whose products are fed by spikes, replaces each Linear by one that gathers rows, and shows with a stopwatch what that is worth: for one product, for every density and batch, and for the whole model.
# Libraries' sparse formats are measured beside it, and lose where they lose. Nothing is assumed: the choice between backends comes from a table measured on the machine at hand.
#
# *Run All* needs no editing: the newest student with spikes before its products is taken.

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
# The only cell to edit. `None` means: the newest student whose products are fed by spikes, and what the profile says.

# %% tags=["parameters"]
student = None  # "v14.4-rates/cpu-seed42", the folder of a run, or None: the newest with spikes before its products
profile = None  # tiny, cpu, ref, t4: how large the measurements are, and the short run that makes a student where there is none
layers = None  # of the model whose speed is measured, width 768; None: 1 in profile tiny, else 5
repeats = None  # interleaved measurements of each case; None: 3 in profile tiny, else 9
compiled = None  # also measure whole models whose small operations torch.compile has fused; None: yes, but not in profile tiny
quality_tokens = None  # tokens on which perplexities are compared; None: 2,048 in profile tiny, else 20,480
seed = 42
run_name = None  # None: <version>-<run> of the student; a finished run is never overwritten

# %% [markdown]
# ## Configuration and environment
# Timings belong to one machine and one number of threads; both are printed with them. It is the CPU that is measured, also where there is a GPU: the kernel and the int8 forms exist for the CPU only.

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
from tqdm import tqdm

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are text here
import asnn_common as asnn  # noqa: E402

asnn.figure_style()  # one look for all notebooks, in colours that people with any colour vision tell apart
begin = time.perf_counter()
asnn.check_parameters(student=student, profile=profile, layers=layers, repeats=repeats, compiled=compiled,
                      quality_tokens=quality_tokens, seed=seed, run_name=run_name)
size, reason = asnn.select_profile(profile)
tiny = size.name == "tiny"
compiled = not tiny if compiled is None else compiled
layers, repeats, quality_tokens = layers or (1 if tiny else 5), repeats or (3 if tiny else 9), quality_tokens or (2048 if tiny else 20_480)
env = asnn.environment()
hardware = asnn.hardware_text(env, gpus=False)
print(reason)
asnn.show_preflight(device=torch.device("cpu"), precision="fp32")

# %% [markdown]
# The student, and its gate first: what follows is a claim about a network whose spikes are known to carry information, or it is marked as ungated.

# %%
loaded = asnn.load_student(student, size, reason, "v14.4-rates", without=("v16", "v17"), sites=("mix_in", "ffn_hidden"), steps=60, seed=seed)
brain, recipe, task, site_density = loaded.student, loaded.recipe, loaded.task, loaded.site_density
settings = {"student": asnn.student_id(brain), "layers": layers, "compiled": compiled, "repeats": repeats, "quality_tokens": quality_tokens, "seed": seed, "threads": env["threads"],
            "recipe": dataclasses.asdict(recipe), "profile": dataclasses.asdict(loaded.profile)}
run = asnn.Run.open("v16", run_name or loaded.name, json.loads(json.dumps(settings)))
print(loaded)
print(loaded.gate)
print(run.note)

# %% [markdown]
# ## Where the spikes are
# The share of multiply-accumulates that spikes feed, and how often a spike is zero there: what can be skipped at all.

# %%
products = asnn.matrix_products(brain)
total = sum(row["macs"] for row in products)
asnn.show_table([{"product": row["product"], "site": row["site"] or "-", "MACs per token": f"{row['macs']:,}", "share": f"{100 * row['macs'] / total:.1f} %",
                  "fed by spikes": "yes" if row["fed"] else "no", "density": " ".join(f"{d:.2f}" for d in asnn.densities_at(loaded.density, row["site"])) or "-"} for row in products])
fed = sum(row["macs"] for row in products if row["fed"] and row["site"])
print(f"{100 * fed / total:.0f} % of all MACs are products with weights that spikes feed; mean densities " + ", ".join(f"{s} {d:.2f}" for s, d in site_density.items()) + " (measured, 8 validation windows)")

# %% [markdown]
# ## One product
# A single token, weights out of the cache, at this student's own densities, for the shapes of the 74M student. A product cannot be faster than the memory gives up the bytes it reads, so that limit is measured first.
# `gather` and `gather_int8` are a C++ kernel of 90 lines, built by `torch.utils.cpp_extension`, because the library's `embedding_bag` was measured to leave a factor of 2 to that limit, and of 4 to 5 with int8 rows; where the kernel cannot be built, `embedding_bag` takes its place.

# %%
problem = asnn.load_kernel()
print(problem or "the C++ kernel is built")


def read_bandwidth(total=256 * 2**20):
    """Bytes per second of the fastest of several ways to read memory once: a sum and a matrix times a vector over `total`
    bytes, and sums over pieces of 2 MiB that come in turns."""
    data, vector = torch.ones(8192, total // 4 // 8192), torch.ones(total // 4 // 8192)
    pieces = asnn.out_of_cache(lambda: torch.ones(2**19))
    read = {"sum": (data.sum, total), "matrix times vector": (lambda: data @ vector, total), "pieces": (lambda: next(pieces).sum(), 2**21)}
    timings = asnn.time_interleaved({name: call for name, (call, _) in read.items()}, runs=max(3, repeats))
    return max(size_of / timings[name].low for name, (_, size_of) in read.items())


bandwidth = read_bandwidth()
print(f"memory gives {bandwidth / 1e9:.1f} GB/s to a program that reads once (measured, the fastest of three ways, best quartile of {max(3, repeats)} runs, {hardware})")


shapes = {(768, 768): "mix_in", (3072, 768): "ffn_hidden", (768, 3072): "ffn_in"}
generator = torch.Generator().manual_seed(seed)
single, rows = {}, []
for (X, out), site in shapes.items():
    share = site_density.get(site, 0.4)
    timings = asnn.time_interleaved(asnn.ProductBench(X, out).calls(asnn.random_spikes(1, X, share, generator)), runs=repeats)
    single[(X, out)] = timings
    for name, timing in timings.items():
        skips, width = name.startswith(("gather", "embedding_bag")), (out + 8) / out if name in asnn.INT8 else 4
        limit = width * X * out * (share if skips else 1) / bandwidth
        rows.append({"in x out": f"{X} x {out}", "density": f"{share:.2f}", "backend": name, "microseconds (quartiles)": timing.text(1e6, ",.0f"),
                     "times linear": f"{timings['linear'].median / timing.median:.2f}", "times the limit of memory": f"{timing.median / limit:.2f}" if skips or name in ("linear", "dense") else "-"})
asnn.show_table(rows)
print(f"medians of {repeats} interleaved runs, one token, weights out of cache, {hardware}")

# %% [markdown]
# How much of that is skipping, and how much a product that is better written than the library's? The same kernel with every channel firing reads all rows, as a dense product does: what it gains there has nothing to do with zeros.

# %%
parts, rows = {}, []
for (X, out), site in shapes.items():
    share = site_density.get(site, 0.4)
    bench = asnn.ProductBench(X, out, ("linear", "gather", "gather_int8"))
    some, every = bench.calls(asnn.random_spikes(1, X, share, generator)), bench.calls(asnn.random_spikes(1, X, 1.0, generator))
    timings = asnn.time_interleaved({"linear": some["linear"], **{f"{name}, {what}": calls[name] for name in ("gather", "gather_int8") for what, calls in (("own density", some), ("all fire", every))}}, runs=repeats)
    parts[f"{X} x {out}"] = {name: dataclasses.asdict(t) for name, t in timings.items()}
    for name in ("gather", "gather_int8"):
        own, full = timings[f"{name}, own density"].median, timings[f"{name}, all fire"].median
        rows.append({"in x out": f"{X} x {out}", "backend": name, "times linear": f"{timings['linear'].median / own:.2f}", "with all channels firing": f"{timings['linear'].median / full:.2f}",
                     "by skipping alone": f"{full / own:.2f}", "1 / density": f"{1 / share:.2f}"})
asnn.show_table(rows)
print(f"times linear is what the kernel gains with all channels firing, times what skipping gains: medians of {repeats} interleaved runs, {hardware} (measured)")

# %% [markdown]
# ## The surface
# Speed of each backend against `linear`, which is what nn.Linear does, over density and number of tokens, the libraries that lose included. Above 1 (blue) the backend wins.

# %%
densities = (0.1, 0.4, 0.8) if tiny else (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
batches = (1, 16) if tiny else (1, 4, 16, 64, 256)
surface = []
benches = {shape: asnn.ProductBench(*shape) for shape in ([(768, 768)] if tiny else shapes)}
cells = [(shape, n, share) for shape in benches for n in batches for share in densities]
for (X, out), n, share in tqdm(cells, desc="surface", unit="case", mininterval=1.0):
    timings = asnn.time_interleaved(benches[X, out].calls(asnn.random_spikes(n, X, share, generator)), runs=3, min_seconds=1e-3)
    surface.append({"in": X, "out": out, "tokens": n, "density": share, "seconds": {name: t.median for name, t in timings.items()}})


def plot_surface(rows):
    names = [name for name in asnn.BACKENDS if name != "linear"]
    found = sorted({(row["in"], row["out"]) for row in rows})
    figure, axes = plt.subplots(len(found), len(names), figsize=(3.4 * len(names), 2.9 * len(found)), squeeze=False, sharex=True, sharey=True, layout="constrained")
    for i, shape in enumerate(found):
        for j, name in enumerate(names):
            grid = np.array([[next(r["seconds"]["linear"] / r["seconds"][name] for r in rows if ((r["in"], r["out"]), r["tokens"], r["density"]) == (shape, n, d))
                              for d in densities] for n in batches])
            axes[i][j].grid(False)
            image = axes[i][j].imshow(np.log2(grid), cmap="RdBu", vmin=-3, vmax=3, aspect="auto")
            for y in range(len(batches)):
                for x in range(len(densities)):
                    axes[i][j].text(x, y, f"{grid[y, x]:.1f}" if grid[y, x] < 9.95 else f"{grid[y, x]:.0f}", ha="center", va="center", fontsize=6,
                                    color="white" if abs(np.log2(grid[y, x])) > 1.8 else "black")
            axes[i][j].set_title(f"{name}\n{shape[0]} to {shape[1]}", fontsize=8)
            axes[i][j].set_xticks(range(len(densities)), [f"{d:g}" for d in densities], fontsize=7, rotation=60)
            axes[i][j].set_yticks(range(len(batches)), batches, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("density")
    for row in axes:
        row[0].set_ylabel("tokens")
    bar = figure.colorbar(image, ax=axes, label="speed against linear", shrink=0.8, pad=0.02)
    bar.set_ticks(range(-3, 4), labels=[f"{2.0 ** n:g}x" for n in range(-3, 4)])
    return figure


run.show(plot_surface(surface), "surface")

# %%
def break_even(X, out, n, name):
    wins = [row["density"] for row in surface if (row["in"], row["out"], row["tokens"]) == (X, out, n) and row["seconds"][name] < row["seconds"]["linear"]]
    return f"{max(wins):g}" if wins else "never"


asnn.show_table([{"in x out": f"{X} x {out}", "tokens": n, **{name: break_even(X, out, n, name) for name in asnn.BACKENDS if name != "linear"}}
                 for X, out in sorted({(row["in"], row["out"]) for row in surface}) for n in batches])
print("the highest measured density at which a backend is faster than linear")

# %% [markdown]
# The crossover: several tokens share the weights that a dense product reads, and its arithmetic is better organised. From how many tokens on is it faster than gathering, at this student's densities?

# %%
def crossover(X, out, share, name):
    """The number of tokens at which linear overtakes a backend, on a line between the measured ones."""
    ratios, before = [], None
    bench = asnn.ProductBench(X, out, ("linear", name))
    for n in (1, 16) if tiny else (1, 2, 4, 8, 16, 32, 64, 128):
        timings = asnn.time_interleaved(bench.calls(asnn.random_spikes(n, X, share, generator)), runs=3, min_seconds=1e-3)
        ratio = np.log(timings["linear"].median / timings[name].median)
        if ratio < 0:
            return float(n) if before is None else float(np.exp(np.interp(0, [ratio, before[1]], np.log([n, before[0]]))))
        before = (n, ratio)
    return math.inf


crossovers = {f"{X} x {out}": {name: crossover(X, out, site_density.get(site, 0.4), name) for name in ("gather", "gather_int8", "embedding_bag")} for (X, out), site in shapes.items()}
asnn.show_table([{"in x out": shape, **{name: f"{n:.0f} tokens" if n < math.inf else "beyond 128" for name, n in row.items()}} for shape, row in crossovers.items()])

# %% [markdown]
# ## What auto decides
# The table behind `backend="auto"`: measured on this machine in under 20 seconds, kept in the cache under the hardware's name, with no threshold assumed.

# %%
clock = time.perf_counter()
table = asnn.BackendTable.measure(shapes, seconds=4.0 if tiny else 18.0)
print(f"{len(table.rows)} cases in {time.perf_counter() - clock:.1f} s (0 when it was cached)")
asnn.show_table([{"in x out": f"{X} x {out}", "tokens": n, **{f"density {d:g}": f"{table.choose(X, out, n, d)} / {table.choose(X, out, n, d, exact=False)}" for d in table.DENSITIES}}
                 for X, out in shapes for n in table.TOKENS])
print("exact backends only / with int8 rows")

# %% [markdown]
# A choice made by a measurement may be luck. So every case is measured again, what was chosen against linear in turns; and all tokens of a product share one layout of weights unless another is 5 % faster.

# %%
again = []
benches = {shape: asnn.ProductBench(*shape, backends=("linear", "dense", "gather", "csr")) for shape in shapes}
for row in tqdm(table.rows if not tiny else table.rows[::7], desc="choices again", unit="case", mininterval=1.0):
    chosen = table.plan(row["in"], row["out"], row["density"])[row["tokens"]]
    calls = benches[row["in"], row["out"]].calls(asnn.random_spikes(row["tokens"], row["in"], row["density"], generator))
    first = row["seconds"][chosen] / row["seconds"]["linear"]
    second = 1.0 if chosen == "linear" else (lambda t: t[chosen].median / t["linear"].median)(asnn.time_interleaved({k: calls[k] for k in (chosen, "linear")}, runs=3 if tiny else 7))
    again.append((first, second))
firsts, seconds = np.array(again).T
print(f"time of auto's choice over that of linear, {len(again)} cases: median {np.median(firsts):.2f}, worst {firsts.max():.2f} where it was chosen; median {np.median(seconds):.2f}, worst {seconds.max():.2f}, "
      f"{int((seconds > 1.05).sum())} of {len(seconds)} above 1.05 when measured again")

# %% [markdown]
# ## The same student, sparse
# Perplexity on the same tokens, predictions and all: gather is the same sum in another order, int8 rows cost 0.7 % per product.

# %%
scored = task.tokens["validation"][:quality_tokens + 1]
forms = {"dense": brain, "gather": asnn.sparsify(brain, "gather"), "gather_int8": asnn.sparsify(brain, "gather_int8"),
         "gather_int8, int8 head": asnn.sparsify(brain, "gather_int8", head="int8"),
         "gather_int8, int8 head and embeddings": asnn.sparsify(brain, "gather_int8", head="int8", embeddings="int8"),
         "dense int8 (torch.ao)": asnn.quantize_int8(brain)}
quality = {name: (evaluated.ppl, evaluated.tokens) for name, model in forms.items() for evaluated in [asnn.evaluate(model, scored, recipe.seq_len, description=name)]}
asnn.show_table([{"products": name, "PPL": f"{ppl:.4f}", "against dense": f"{100 * (ppl / quality['dense'][0] - 1):+.3f} %", "tokens": f"{count:,}"} for name, (ppl, count) in quality.items()])

# %% [markdown]
# ## The whole model
# A student of the published width with random weights and this student's densities, which its thresholds are set to: only speed is measured here. All systems decode the same token with their state in turns, in one process.

# %%
large = asnn.random_student(asnn.get_recipe("v14.4-sites").replace(n_layer=layers), 50257, site_density, seed)
sample = torch.randint(0, 50257, (2, 32), generator=generator)
real = asnn.spike_density(large, sample)
print(f"{asnn.count_parameters(large):,} parameters; densities enforced: " + ", ".join(
    f"{site} {np.mean(asnn.densities_at(real, site)):.2f}" for site in site_density))
systems = {"dense fp32": large, "gather, dense head": asnn.sparsify(large, "gather"), "auto, dense head": asnn.sparsify(large, "auto", table=table),
           "gather_int8, int8 head": asnn.sparsify(large, "gather_int8", head="int8"), "dense int8 (torch.ao)": asnn.quantize_int8(large)}
if not problem:
    libraries = asnn.sparsify(large, "embedding_bag_int8", head="int8")
    systems["embedding_bag_int8, int8 head"] = libraries

# %% [markdown]
# What is left beside the products are many small operations; `compile_step` lets torch.compile fuse them. It does so for the dense models too, so that like is compared with like.

# %%
if compiled:
    systems |= {f"{name}, compiled": asnn.compile_step(copy.deepcopy(systems[name])) for name in tqdm(("dense fp32", "gather, dense head", "auto, dense head", "gather_int8, int8 head", "dense int8 (torch.ao)"), desc="copies")}
steps = {name: asnn.Decoder(model, sample[:1, :16]) for name, model in systems.items()}
for name, step in tqdm(steps.items(), desc="first token", unit="system"):
    for _ in range(3):
        step()
decoding = asnn.time_interleaved(steps, runs=max(3, 3 * repeats), min_seconds=1e-3)
base, ao = decoding["dense fp32"].median, decoding["dense int8 (torch.ao)"].median
asnn.show_table([{"system": name, "ms per token (quartiles)": t.text(), "tokens/s": f"{1 / t.median:.1f}",
                  "times dense fp32": f"{base / t.median:.2f}", "times dense int8": f"{ao / t.median:.2f}", "weights, MiB": f"{asnn.tensor_bytes(systems[name]) / 2**20:.0f}"} for name, t in decoding.items()])
print(f"medians of {max(3, 3 * repeats)} interleaved runs, batch 1, {hardware}; peak memory of this process, all systems at once, {asnn.peak_memory_gb():.2f} GiB (measured)")

# %% [markdown]
# ## Where the time of one token goes
# The largest costs of a decoded token, by torch's profiler: first of the dense student, then of the sparse one without and with fused operations.

# %%
def profile_of(step, count=5):
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler else writes two lines at each start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        for _ in range(count):
            step()
    events = sorted(trace.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    return [{"operation": event.key.replace("## Call CompiledFxGraph", "fused operations of a block")[:40], "share of time": f"{100 * event.self_cpu_time_total / whole:.0f} %", "ms per token": f"{event.self_cpu_time_total / 1e3 / count:.2f}",
             "calls per token": f"{event.count / count:.0f}"} for event in events[:6]]


profiles = {name: profile_of(steps[name]) for name in ("dense fp32", "gather_int8, int8 head", "gather_int8, int8 head, compiled") if name in steps}
for name, rows in profiles.items():
    print(name)
    asnn.show_table(rows)

# %% [markdown]
# Of the dense student nearly all is in products. What was done about the three largest costs of the sparse one: the gathers went from the library's operators to the C++ kernel; the head, dense by nature, to int8; and the hundreds of small operations into one fused piece per block.

# %% [markdown]
# ## Elementwise state updates
# The matrix state of a head is 64 x 64: writing only the rows where a key fired touches less memory and needs an index. Measured, and kept only where it wins.

# %%
def state_calls(heads=12, width=64, share=0.4):
    S, k, v = torch.randn(heads, width, width), asnn.random_spikes(heads, width, share, generator), asnn.random_spikes(heads, width, share, generator)
    w = torch.rand(heads, width, 1) * 0.5 + 0.5

    def dense():
        return w * S + k.unsqueeze(-1) * v.unsqueeze(-2)

    def rows():
        out = w * S
        head, row = k.nonzero(as_tuple=True)
        out[head, row] += k[head, row].unsqueeze(-1) * v[head]
        return out
    assert torch.allclose(dense(), rows())
    return {"dense": dense, "active rows": rows}


updates = asnn.time_interleaved(state_calls(), runs=repeats)
asnn.show_table([{"update of the state, 12 heads of 64": name, "microseconds (quartiles)": t.text(1e6, ",.0f")} for name, t in updates.items()])
print("active rows win" if updates["active rows"].median < updates["dense"].median else "the dense update is faster and stays: the decay touches every entry anyway")

# %% [markdown]
# ## Contract
# Facts that hold in every profile and on every machine; continuous integration compares their output.

# %% tags=["nbval-check-output"]
weights, worst = torch.randn(96, 40, generator=generator), {}
for share in (0.0, 0.02, 0.4, 1.0):
    for n in (1, 5):
        spikes = asnn.random_spikes(n, 96, share, generator)
        reference = asnn.dense_product(weights, spikes)
        for name, product in asnn.PRODUCTS.items():
            error = product(asnn.product_weights(name, weights), spikes) - reference
            worst[name] = max(worst.get(name, 0.0), float(error.norm() / reference.norm().clamp_min(1e-6)))
print("backends equal to dense:", sorted(name for name, error in worst.items() if error < 1e-5))
print("int8 rows within 2 %:", all(worst[name] < 0.02 for name in asnn.INT8))
silent = asnn.random_spikes(3, 96, 0.0)
print("silence gives zero:", sorted(name for name, product in asnn.PRODUCTS.items() if not product(asnn.product_weights(name, weights), silent).any()))
try:
    asnn.sparsify(asnn.GooseForCausalLM(asnn.get_recipe("v14.4", d_model=64, n_layer=1).student_config(64)))
except ValueError as error:
    print("a student whose products are not fed by spikes is refused:", "nothing" if "no matrix product" not in str(error) else "in one sentence")

# %% tags=["nbval-check-output"]
prompt = task.peek()[:1, :12]
texts = {name: model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0) for name, model in forms.items() if name in ("dense", "gather")}
print("greedy text of gather is that of dense:", torch.equal(texts["dense"], texts["gather"]))
print("perplexity with gather within 0.1 %:", abs(quality["gather"][0] / quality["dense"][0] - 1) < 1e-3)
print("int8 rows keep a fourth of the memory:", forms["gather_int8"].goose.blocks[0].ffn.down.packed.nbytes < 0.3 * brain.goose.blocks[0].ffn.down.weight.nbytes)

# %% [markdown]
# ## Saved artefacts

# %%
results = {"gate": loaded.gate, "gated": loaded.gated, "hardware": hardware, "environment": env, "status": "measured", "bandwidth, bytes/s": bandwidth, "densities": site_density,
           "products": [{"in": X, "out": out, **{name: dataclasses.asdict(t) for name, t in timings.items()}} for (X, out), timings in single.items()], "surface": surface,
           "quality": {name: {"ppl": ppl, "tokens": count} for name, (ppl, count) in quality.items()}, "decoding": {name: dataclasses.asdict(t) for name, t in decoding.items()},
           "state update": {name: dataclasses.asdict(t) for name, t in updates.items()}, "crossover, tokens": {shape: {name: n if n < math.inf else None for name, n in row.items()} for shape, row in crossovers.items()},
           "auto over linear": {"measured once": firsts.tolist(), "again": seconds.tolist()}, "kernel": problem or "built", "skipping alone": parts, "profile": profiles, "weights, bytes": {name: asnn.tensor_bytes(model) for name, model in systems.items()}, "layers": layers, "parameters": asnn.count_parameters(large)}
if run.main:
    asnn.write_atomically(run.folder / "sparse.json", json.dumps(results, indent=1))
run.finish({**loaded.metrics, "version": f"v16 of {loaded.metrics['version']}", "run": run.folder.name, "notebook_seconds": time.perf_counter() - begin})

# %% tags=["nbval-check-output"]
print("saved:", sorted({"sparse.json", "metrics.json", "config.json", "env.json", "figures"} & {path.name for path in run.folder.glob("*")}))

# %% [markdown]
# ## Summary
# The founders put the break-even of sparse products at 75 % zeros. That is right for the formats of libraries and for large batches, where arithmetic and not memory is the limit. It is wrong for decoding, where a product waits for the weights it reads: a gather wins at every density, even with all channels firing.
# That last fact is also the caution. Much of the gain over nn.Linear is that the kernel reads memory better than the library's product does, and would be there without spikes; what skipping adds is printed below, and in int8, where rows are short, it is less than the share of zeros promises.

# %%
gains = {name: base / t.median for name, t in decoding.items()}
print(f"The student is {loaded.gate}. Decoding one token at a time, {layers} layers of width 768, {hardware}: " + ", ".join(
    f"{name} {gain:.2f}x" for name, gain in gains.items() if name != "dense fp32") + " the speed of dense fp32, and dense int8 " + f"{ao / min(t.median for t in decoding.values()):.2f} times slower than the fastest (measured).")
alone = {name: [row[f"{name}, all fire"]["median"] / row[f"{name}, own density"]["median"] for row in parts.values()] for name in ("gather", "gather_int8")}
print("Skipping alone, one product against the same kernel with all channels firing: " + ", ".join(f"{name} {min(values):.2f} to {max(values):.2f}x" for name, values in alone.items()) + " (measured, three shapes).")
print(f"Perplexity changes by {100 * (quality['gather'][0] / quality['dense'][0] - 1):+.3f} % with gather and {100 * (quality['gather_int8'][0] / quality['dense'][0] - 1):+.2f} % with gather_int8, {quality['dense'][1]:,} tokens. "
      "The gather path for CUDA graphs (gather_static) is tested on the CPU only.")
print(f"{time.perf_counter() - begin:.0f} s in this notebook; results in {os.path.relpath(run.folder)}")
