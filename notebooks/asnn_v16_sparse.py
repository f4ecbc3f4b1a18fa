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
# <a href="https://kaggle.com/kernels/welcome?src=https://github.com/OWNER/REPO/blob/main/
# notebooks/asnn_v16_sparse.ipynb"><img alt="Open in Kaggle"
# src="https://kaggle.com/static/images/open-in-kaggle.svg"></a>
# <a href="https://colab.research.google.com/github/OWNER/REPO/blob/main/
# notebooks/asnn_v16_sparse.ipynb"><img alt="Open in Colab"
# src="https://colab.research.google.com/assets/colab-badge.svg"></a>
#
# **Needs** `asnn_common.py`, outputs of v14.4, and of v15, whose gate it reads. The CPU is
# measured, also where there is a GPU: about five minutes and 4 GB on Kaggle or Colab (an
# estimate), two minutes and 4 GB on two CPU cores.
# *Run All* needs no editing. The last line you should see begins with `Finished: v16`.
#
# A product of weights and spikes needs only the weights of channels that fired, and decoding waits
# for memory. This notebook replaces each product that spikes feed by one that gathers rows, and
# takes the time: of one product, of every density and number of tokens, and of the whole model. The
# sparse formats of the library stand beside it, and lose where they lose.

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
# The only cell to edit. `None` means: the newest student whose products are fed by spikes, and what
# the profile says.

# %% tags=["parameters"]
student_run = None  # "v14.5/cpu-seed42", the folder of a run, or None: the newest that fits
profile = None  # tiny (seconds), cpu, ref, t4: how much is measured; None: by hardware
layers = None  # of the model whose speed is measured, width 768; None: 1 in profile tiny, else 5
repeats = None  # interleaved measurements of each case; None: 3 in profile tiny, else 9
compiled = None  # also measure compiled steps; None: not in profile tiny
seed = 42
run_name = None  # None: <version>-<run> of the student; a finished run is never overwritten

# %% [markdown]
# ## Student
# Its spikes are known to carry information (the gate of v15), or it is marked as ungated.

# %%
import itertools
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
asnn.figure_style()  # colours that people with any colour vision tell apart
begin, env = time.perf_counter(), asnn.environment()
tiny = asnn.get_recipe("v14.4-sites", profile).profile == "tiny"
compiled = not tiny if compiled is None else compiled
layers, repeats = layers or (1 if tiny else 5), repeats or (3 if tiny else 9)
hardware = f"{env['cpu']}, {env['threads']} thread{'s' * (env['threads'] > 1)}"
loaded = asnn.load_student(student_run, without=("v16", "v17"), sites=("mix_in", "ffn_hidden"))
student, task, site_density = loaded.student, loaded.task, loaded.site_density
name = f"{loaded.metrics['version']}/{loaded.metrics['run']}"
settings = {"student": student.content_hash(), "layers": layers, "repeats": repeats, "seed": seed,
            "compiled": compiled, "threads": env["threads"]}
run = asnn.Run.open("v16", run_name or loaded.name, settings)
print(f"{loaded}\nThe student is {loaded.gate}.\n{run.note}; {hardware}")

# %% [markdown]
# ## Where the spikes are
# Of the multiply-accumulates that spikes feed, those of channels that do not fire can be skipped.

# %%
products = pd.DataFrame(asnn.operations(student, loaded.density)).query("MACs > 0")
products = products.groupby("product", sort=False).agg(
    {"site": "first", "MACs": "sum", "adds": "sum"})
asnn.show_table([{
    "product": row.Index, "site": row.site, "MACs per token": f"{row.MACs:,}",
    "share": f"{100 * row.MACs / products.MACs.sum():.1f} %",
    "channels that fire": f"{row.adds / row.MACs:.2f}" if row.adds else "no spikes"}
    for row in products.itertuples()])
fed = products.MACs[products.adds > 0].sum() / products.MACs.sum()
print(f"spikes feed {100 * fed:.0f} % of all MACs (rates measured on validation windows)")

# %% [markdown]
# ## Ways to multiply
# `gather` and `gather_int8` are the project's: a C++ kernel adds the rows of channels that fired.
# The others are the library's, and blocks of 32 channels skipped together.

# %%
def embedding_bag(rows, spikes):
    """rows (X, out) in fp32 or packed int8, spikes (n, X) -> (n, out). A bag runs on one thread: a
    single token is split into one for each."""
    (n, X), index = spikes.shape, spikes.flatten().nonzero().squeeze(1)
    bags = torch.get_num_threads() if n == 1 else 1
    ends = torch.arange(n * bags)
    offsets = ends * len(index) // bags if n == 1 else torch.searchsorted(index, ends * X)
    value, index, packed = spikes.flatten()[index], index % X, torch.ops.quantized
    out = (packed.embedding_bag_byte_rowwise_offsets(rows, index, offsets, False, 0, False, value)
           if rows.dtype == torch.uint8 else
           F.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=value))
    return out.view(n, bags, out.shape[1]).sum(1)


def block(rows, spikes, size=32):
    """Skips blocks of `size` channels in which no token fired."""
    X = len(rows)
    active = F.pad(spikes.ne(0).any(0), (0, -X % size)).view(-1, size).any(1)
    index = active.repeat_interleave(size)[:X].nonzero().squeeze(1)
    return spikes[:, index] @ rows[index]


WAYS = {**asnn.PRODUCTS, "embedding_bag": embedding_bag, "embedding_bag_int8": embedding_bag,
        "csr": lambda rows, spikes: spikes.to_sparse_csr() @ rows,
        "coo": lambda rows, spikes: torch.sparse.mm(spikes.to_sparse_coo(), rows), "block": block}
KIND = {"linear": "linear", "gather_int8": "int8", "embedding_bag_int8": "int8"}  # else rows
SHAPES = {(768, 768): "mix_in", (3072, 768): "ffn_hidden", (768, 3072): "ffn_in"}  # fed by a site


def weights_for(way, rows):
    """What a way to multiply takes as its weights, made of rows (X, out)."""
    make = {"linear": lambda: rows.t().contiguous(), "rows": lambda: rows,
            "int8": lambda: torch.ops.quantized.embedding_bag_byte_prepack(rows)}
    return make[KIND.get(way, "rows")]()


def random_spikes(n, X, density, generator=None):
    """Ternary spikes (n, X), each non-zero with probability `density`."""
    sign = torch.where(torch.rand(n, X, generator=generator) < 0.5, -1.0, 1.0)
    return sign * (torch.rand(n, X, generator=generator) < density)


def turns(first, total=96 * 2**20):
    """Endless turns through copies of a tensor, together larger than the caches of a CPU."""
    return itertools.cycle([first.clone() for _ in range(1 + min(64, total // first.nbytes))])


def calls_for(X, out, ways):
    """A function of spikes (n, X) that gives {way: its product}, on weights out of cache."""
    rows, kept = torch.randn(X, out), {}
    for way in ways:
        kept.setdefault(KIND.get(way, "rows"), turns(weights_for(way, rows)))
    return lambda spikes: {way: lambda way=way: WAYS[way](next(kept[KIND.get(way, "rows")]), spikes)
                           for way in ways}


gathering = asnn.sparsify(student, "gather")
note = f"; {gathering.without_kernel}" if gathering.without_kernel else ""
print(gathering.without_kernel or "gather is the C++ kernel")

# %% [markdown]
# ## One product
# One token, weights out of cache, spikes as dense as this student's, shapes of the 77M student.
# With every channel firing the kernel reads all rows: what it gains there it does not owe to zeros.

# %%
def read_bandwidth(runs, total=256 * 2**20):
    """Bytes per second of the faster of two ways to read memory once."""
    data, pieces = torch.ones(total // 4), turns(torch.ones(2**19))
    timings = asnn.time_interleaved({total: data.sum, 2**21: lambda: next(pieces).sum()}, runs)
    return max(size / timing.low for size, timing in timings.items())


def bytes_read(way, X, out, density):
    """Bytes of weights that one token needs; nan where only the library knows."""
    row = {"linear": 4 * out / density, "gather": 4 * out, "gather_int8": out + 8}
    return X * density * row.get(way.replace("embedding_bag", "gather"), np.nan)


def between(values):
    """The range of several numbers as text, "-" where one is unknown."""
    return f"{min(values):.2f} to {max(values):.2f}" if np.isfinite(values).all() else "-"


generator, bandwidth = torch.Generator().manual_seed(seed), read_bandwidth(max(3, repeats))
single, shares = {}, {shape: site_density.get(site, 0.4) for shape, site in SHAPES.items()}
for (X, out), share in shares.items():
    calls = calls_for(X, out, WAYS)
    every = calls(random_spikes(1, X, 1.0, generator))
    single[X, out] = asnn.time_interleaved({
        **calls(random_spikes(1, X, share, generator)),
        **{f"all fire, {way}": every[way] for way in ("gather", "gather_int8")}}, repeats)
seconds = {shape: {way: t.median for way, t in found.items()} for shape, found in single.items()}
gain = {way: [s["linear"] / s[way] for s in seconds.values()] for way in seconds[768, 768]}
alone = {way: [s.get(f"all fire, {way}", np.nan) / s[way] for s in seconds.values()]
         for way in gain}
asnn.show_table([{
    "way": way, **{f"{X} x {out}, us": f"{1e6 * s[way]:,.0f}" for (X, out), s in seconds.items()},
    "times linear": between(ratios), "by skipping alone": between(alone[way]),
    "over the memory's limit": between([
        s[way] * bandwidth / bytes_read(way, *shape, shares[shape])
        for shape, s in seconds.items()])} for way, ratios in gain.items()])
print(f"memory gives {bandwidth / 1e9:.1f} GB/s to a program that reads once; medians of {repeats} "
      f"runs in turns, {hardware} (measured{note})")

# %% [markdown]
# ## Density and number of tokens
# Speed against `linear`, which is what nn.Linear does. Above the line at 1 a way wins.

# %%
def measure_surface(X, out, ways, tokens, densities, runs=3):
    """Rows {"tokens", "density", "seconds": {way: median}}."""
    calls, generator, found = calls_for(X, out, ways), torch.Generator().manual_seed(0), []
    for n, density in itertools.product(tokens, densities):
        timings = asnn.time_interleaved(calls(random_spikes(n, X, density, generator)), runs, 1e-3)
        found.append({"tokens": n, "density": density,
                      "seconds": {way: timing.median for way, timing in timings.items()}})
    return found


def plot_surface(rows, ways, title):
    """For each way its speed against linear over the density, a line for each number of tokens."""
    figure, axes = plt.subplots(1, len(ways), figsize=(12, 4), sharey=True, layout="constrained")
    tokens = sorted({row["tokens"] for row in rows})
    shades = plt.get_cmap("viridis")(np.linspace(0.0, 0.8, len(tokens)))
    for axis, way in zip(axes, ways):
        axis.axhline(1.0, color="black", linestyle=":", linewidth=1)
        for n, colour, style in zip(tokens, shades, ("o-", "s--", "^-.", "D:", "v-")):
            some = [row for row in rows if row["tokens"] == n]
            axis.plot([row["density"] for row in some],
                      [row["seconds"]["linear"] / row["seconds"][way] for row in some], style,
                      color=colour, label=f"{n} token" + "s" * (n > 1))
        axis.set(title=way, xlabel="share of channels that fire", yscale="log", xlim=(0, 1.03))
    axes[0].set(ylabel="speed, times linear")
    axes[0].legend()
    figure.suptitle(title, fontsize=11)
    return figure


def break_even(rows, way, n):
    """The highest measured density up to which a way is faster than linear; 0.0 for none."""
    some = sorted((row["density"], row["seconds"]) for row in rows if row["tokens"] == n)
    wins = itertools.takewhile(lambda pair: pair[1][way] < pair[1]["linear"], some)
    return max((density for density, _ in wins), default=0.0)


def crossover(rows, way, density):
    """The number of tokens from which linear is faster than a way at the nearest measured density,
    on a line between measured numbers; None where it is not."""
    nearest = min({row["density"] for row in rows}, key=lambda d: abs(d - density))
    some = sorted((row["tokens"], np.log(row["seconds"]["linear"] / row["seconds"][way]))
                  for row in rows if row["density"] == nearest)
    for (n, before), (more, after) in zip([some[0], *some], some):
        if after < 0:
            return float(np.exp(np.interp(0, [after, max(0.0, before)], np.log([more, n]))))
    return None


shown = ("gather", "gather_int8", "csr")
surface = measure_surface(3072, 768, ("linear", *shown), (1, 16) if tiny else (1, 4, 16, 64, 256),
                          (0.1, 0.4, 1.0) if tiny else (0.05, 0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0))
run.show(plot_surface(surface, shown, f"3072 x 768, {hardware}"), "surface")
even = {way: break_even(surface, way, 1) for way in shown}
overtaken = {way: crossover(surface, way, shares[3072, 768]) for way in shown}
asnn.show_table([{"way": way, "wins for one token up to a density of": even[way] or "none",
                  "loses at this student's density from": f"{n:.0f} tokens" if n else "-"}
                 for way, n in overtaken.items()])

# %% [markdown]
# ## The same student, sparse
# `gather` is the same sum in another order, int8 rows cost 0.7 % per product.

# %%
scored = task.tokens["validation"][:(2048 if tiny else 10_240) + 1]
forms = {"dense": student, "gather": gathering,
         "gather_int8": asnn.sparsify(student, "gather_int8"),
         "gather_int8, int8 head": asnn.sparsify(student, "gather_int8", "int8"),
         "dense int8": asnn.quantize_int8(student)}
quality = {form: asnn.evaluate(model, scored, loaded.recipe.seq_len, description=form)
           for form, model in forms.items()}
change = {form: 100 * (result.ppl / quality["dense"].ppl - 1) for form, result in quality.items()}
asnn.show_table([{"products": form, "PPL": f"{result.ppl:.4f}", "change": f"{change[form]:+.3f} %",
                  "tokens": f"{result.tokens:,}"} for form, result in quality.items()])

# %% [markdown]
# ## The whole model
# Width 768, random weights, channels that fire as often as the student's: only speed is measured.
# It is not the gated student, which is small and trained. `sparsify` takes one way for all sites,
# or {site: way}, here for the feed-forward products alone. `dense int8` is torch.ao's. A compiled
# step of `gather_int8` is one C++ call; other compiled steps are torch.compile's.

# %%
speedy = asnn.RECIPES["v14.4-sites"].replace(
    n_layer=layers, spike_steps=loaded.recipe.spike_steps, decay=loaded.recipe.decay)
large = asnn.random_student(speedy, 50257, site_density, seed)
sample = torch.randint(0, 50257, (2, 32), generator=generator)
rates = [rate for key, rate in asnn.firing_rates(large, sample).items() if "_" in key]
print(f"{large.num_parameters():,} parameters; in the mean {np.mean(rates):.2f} of channels fire")
plans = {"dense fp32": ({}, "dense"), "gather": ("gather", "dense"),
         "gather in the FFN": ({"ffn_in": "gather", "ffn_hidden": "gather"}, "dense"),
         "gather_int8, int8 head": ("gather_int8", "int8")}
systems = {plan: asnn.sparsify(large, way, head) for plan, (way, head) in plans.items()}
systems["dense int8"] = asnn.quantize_int8(large)
if compiled:  # what is left beside the products are many small operations
    fused = {plan: asnn.sparsify(large, *plans[plan], compiled=True)
             for plan in plans if plan != "gather in the FFN"}
    fused["dense int8"] = asnn.quantize_int8(large, compiled=True)
    systems |= {f"{key}, compiled": model for key, model in fused.items()
                if model.goose.blocks[0].compiled}
steps = {key: asnn.Decoder(model, sample[:1, :16]) for key, model in systems.items()}
for step in [*steps.values()] * 3:  # the first tokens compile
    step()

# %%
decoding = asnn.time_interleaved(steps, 3 * repeats, 1e-3, progress="decoding")
weights = {key: step.memory()["weights"] for key, step in steps.items()}
speed = {key: 1 / timing.median for key, timing in decoding.items()}
dense_int8 = max(rate for key, rate in speed.items() if key.startswith("dense int8"))
asnn.show_table([{
    "system": key, "ms per token (quartiles)": timing.text(), "tokens/s": f"{speed[key]:.1f}",
    "times dense fp32": f"{speed[key] / speed['dense fp32']:.2f}",
    "times the best dense int8": f"{speed[key] / dense_int8:.2f}",
    "weights, MiB": f"{weights[key] / 2**20:.0f}"} for key, timing in decoding.items()])
print(f"medians of {3 * repeats} runs in turns, batch 1, {hardware} (measured{note})")

# %% [markdown]
# The largest costs of a token, dense and fastest sparse.

# %%
def profile_of(step, count=5):
    """The operations that take most of a step's time, by torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it else writes at each start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        for _ in range(count):
            step()
    events = sorted(trace.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    return [{"operation": event.key.replace("## Call CompiledFxGraph", "fused operations")[:40],
             "share of time": f"{100 * event.self_cpu_time_total / whole:.0f} %",
             "calls per token": f"{event.count / count:.0f}"} for event in events[:5]]


fastest = max((key for key in speed if key.startswith("gather")), key=speed.get)
profiles = {key: profile_of(steps[key]) for key in ("dense fp32", fastest)}
asnn.show_table([{"system": key, **row} for key, rows in profiles.items() for row in rows])

# %% [markdown]
# ## Contract
# Facts that hold on every machine; continuous integration compares the output.

# %% tags=["nbval-check-output"]
matrix, worst = torch.randn(96, 40, generator=generator), dict.fromkeys(WAYS, 0.0)
for share, n, way in itertools.product((0.0, 0.02, 0.4, 1.0), (1, 5), WAYS):
    spikes = random_spikes(n, 96, share, generator)
    error = WAYS[way](weights_for(way, matrix), spikes) - spikes @ matrix
    worst[way] = max(worst[way], float(error.norm() / (spikes @ matrix).norm().clamp_min(1e-6)))
print("equal to dense:", sorted(way for way, error in worst.items() if error < 1e-5))
print("int8 rows within 2 %:", max(worst["gather_int8"], worst["embedding_bag_int8"]) < 0.02)
options = {"input_ids": task.peek()[:1, :12], "attention_mask": torch.ones(1, 12).long(),
           "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
texts = [forms[form].generate(**options) for form in ("dense", "gather")]
print("greedy text of gather is that of dense:", torch.equal(*texts))
print("perplexity with gather within 0.1 %:", abs(change["gather"]) < 0.1)

# %% [markdown]
# ## Saved artefacts

# %%
run.save("sparse.json", {
    "student": name, "gate": loaded.gate, "gated": loaded.gated, "environment": env,
    "hardware": hardware, "bandwidth, bytes/s": bandwidth, "densities": site_density,
    "status": "measured", "kernel": gathering.without_kernel or "built",
    "products": [{"in": X, "out": out, **{way: t._asdict() for way, t in timings.items()}}
                 for (X, out), timings in single.items()],
    "surface, 3072 x 768": surface, "crossover, tokens": overtaken, "layers": layers,
    "quality": {form: result.to_dict() for form, result in quality.items()}, "profile": profiles,
    "decoding": {key: timing._asdict() for key, timing in decoding.items()},
    "weights, bytes": weights, "parameters": large.num_parameters()})
run.finish({"version": f"v16 of {loaded.metrics['version']}", "run": run.folder.name,
            "student": name, "gated": loaded.gated, "environment": env, "tokens/s": speed,
            "seconds": time.perf_counter() - begin})

# %% tags=["nbval-check-output"]
files = {"sparse.json", "metrics.json", "config.json", "env.json", "figures"}
print("saved:", sorted(files & {path.name for path in run.folder.glob("*")}))

# %% [markdown]
# ## Summary
# Sentences made from the numbers above.

# %%
def reach(way, density):
    """A sentence about up to where a way is faster than a dense product for one token."""
    where = f"up to a density of {density:g}" if density else "at no density"
    return f"{way} is faster {'at every density' if density >= 1 else where}"


def owed(way, alone, kernel):
    """A sentence about what zeros and what the kernel add, from times of each."""
    larger = "skipping" if np.median(alone) > np.median(kernel) else "the kernel, not to zeros"
    return (f"{way} gains {between(alone)} times by skipping alone, {between(kernel)} times as a "
            f"kernel that reads every row: most is owed to {larger}.")


print(f"The trained student {name} is {loaded.gate}. The speed is another network's:")
print(f"{layers} layers of width 768 with random weights decode with {fastest} "
      f"{speed[fastest] / speed['dense fp32']:.2f} times as fast as dense fp32, "
      f"{speed[fastest] / dense_int8:.2f} times the best dense int8 form ({hardware}, measured).")
print(f"One token, 3072 x 768: {', '.join(reach(way, d) for way, d in even.items())}.")
for way in ("gather", "gather_int8"):
    print(owed(way, alone[way], gain[f"all fire, {way}"]))
print(f"Finished: v16 in {time.perf_counter() - begin:.0f} s; {os.path.relpath(run.folder)}")
