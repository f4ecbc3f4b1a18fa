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
# <a href="https://kaggle.com/kernels/welcome?src=https://github.com/OWNER/REPO/blob/main/
# notebooks/asnn_v17_bench.ipynb"><img alt="Open in Kaggle"
# src="https://kaggle.com/static/images/open-in-kaggle.svg"></a>
# <a href="https://colab.research.google.com/github/OWNER/REPO/blob/main/
# notebooks/asnn_v17_bench.ipynb"><img alt="Open in Colab"
# src="https://colab.research.google.com/assets/colab-badge.svg"></a>
#
# **Needs** `asnn_common.py`, outputs of v14.4, and of v15, whose gate it reads. The CPU is measured
# unless you choose the GPU: about six minutes and 5 GB on Kaggle or Colab (an estimate),
# ten minutes and 7 GB on two CPU cores.
# *Run All* needs no editing. The last line you should see begins with `Finished: v17`.
#
# A user has other choices than a spiking student: GPT-2, GPT-2 in int8, a smaller GPT-2, another
# recurrent model. All run here on one machine, in turns: latency, memory, operations and energy.
# **Two networks stand on this page.** Speed does not depend on what weights hold, so that the large
# models have random ones, with spikes as dense as those of the trained student. The student that
# passes the gate, and whose quality is shown, is the trained one, which is small. What is measured
# and what is estimated stands in separate columns.

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
# The only cell to edit. `None` means: what the profile and the hardware say.

# %% tags=["parameters"]
student_run = None  # "v14.5/cpu-seed42", the folder of a run, or None: the newest that fits
profile = None  # tiny (seconds), cpu, ref, t4: how much is measured; None: by hardware
device_name = None  # "cpu" or "cuda", where there is no int8; None: cpu
layers = None  # of the student whose speed is measured, width 768; None: 2 in profile tiny, else 5
repeats = None  # interleaved measurements of each case; None: 3 in profile tiny, else 20
contexts = None  # tokens before the decoded one; None: [128, 512, 1000, 8192], fewer in tiny
batches = None  # sequences decoded at once; None: [1, 2] in profile tiny, else [1, 4, 16, 64]
compiled = None  # also measure the students' compiled steps; None: not in profile tiny
price_per_hour = 0.35  # dollars for an hour of the hardware that trained the student: an assumption
seed = 42
run_name = None  # None: <version>-<run> of the student; a finished run is never overwritten

# %% [markdown]
# ## Student
# Its spikes are known to carry information (the gate of v15), or it is marked as ungated.

# %%
import importlib.util
import json
import math
import shutil
import subprocess
import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, RwkvConfig

asnn.figure_style()  # colours that people with any colour vision tell apart
begin, env = time.perf_counter(), asnn.environment()
device = torch.device(device_name or "cpu")
on_cpu = device.type == "cpu"
tiny = asnn.get_recipe("v14.4-sites", profile).profile == "tiny"
compiled = (not tiny if compiled is None else compiled) and on_cpu
layers, repeats = layers or (2 if tiny else 5), repeats or (3 if tiny else 20)
contexts = sorted(contexts or ([16, 48] if tiny else [128, 512, 1000, 8192]))
batches = sorted(batches or ([1, 2] if tiny else [1, 4, 16, 64]))
width, vocabulary, positions = (64, 512, 40) if tiny else (768, 50257, 1024)
hardware = f"{env['cpu']}, {env['threads']} thread{'s' * (env['threads'] > 1)}"
hardware = hardware if on_cpu else ", ".join(env["gpus"])
loaded = asnn.load_student(student_run, without=("v16", "v17"), sites=asnn.SITES[2:-1])
student, task, site_density = loaded.student, loaded.task, loaded.site_density
name = f"{loaded.metrics['version']}/{loaded.metrics['run']}"
settings = {"student": student.content_hash(), "hardware": hardware, "layers": layers, "seed": seed,
            "repeats": repeats, "contexts": contexts, "batches": batches, "compiled": compiled}
run = asnn.Run.open("v17", run_name or loaded.name, settings)
print(f"{loaded}\nThe student is {loaded.gate}.\n{run.note}; {hardware}")
print(f"channels that fire: {pd.Series(site_density).round(2).to_dict()} (measured)")

# %% [markdown]
# ## Systems
# All with random weights. GPT-2 is what a student is made from; its int8 form (torch.ao, dynamic)
# is what a user would try first; two others have as many layers as the student and its width. On a
# GPU all weights are in half precision, and there is no int8. A compiled step of `gather_int8` is
# one C++ call, for one sequence.

# %%
torch.manual_seed(seed)
same, build = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}, (
    AutoModelForCausalLM.from_config)
gpt2, alike = (GPT2Config(n_layer=n, n_embd=width, n_head=max(1, width // 64), **same,
                          n_positions=positions) for n in (2 * layers if tiny else 12, layers))
rwkv = RwkvConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width,
                  context_length=positions, **same)
large = asnn.RECIPES["v14.4-sites"].replace(
    n_layer=layers, d_model=width, spike_steps=loaded.recipe.spike_steps, decay=loaded.recipe.decay)
spiking = asnn.random_student(large, vocabulary, site_density, seed)
systems = {
    "GPT-2, eager": build(gpt2, attn_implementation="eager"), "GPT-2, SDPA": build(gpt2),
    "GPT-2 of this size": build(alike), "RWKV of transformers": build(rwkv),
    "dense twin": asnn.random_student(large.replace(spike_kind="dense"), vocabulary, {}, seed),
    "student, dense": spiking}
half = torch.bfloat16 if env["precision"] == "bf16" else torch.float16
for model in systems.values() if not on_cpu else ():
    model.to(device, half)
int8 = {"backend": "gather_int8", "head": "int8", "embeddings": "int8"}
systems["student, gather"] = asnn.sparsify(spiking, "gather")
four = on_cpu and not systems["student, gather"].without_kernel  # only the kernel reads int4
for fuse in [False, True][:on_cpu + compiled]:
    forms = {"student, dense": asnn.sparsify(spiking, {}, compiled=fuse),
             "student, dense int8": asnn.quantize_int8(spiking, compiled=fuse),
             "student, gather_int8": asnn.sparsify(spiking, **int8, compiled=fuse)}
    systems |= {key + ", compiled" * fuse: model for key, model in forms.items()
                if bool(model.goose.blocks[0].compiled) == fuse}
if on_cpu:
    systems["GPT-2, int8"] = asnn.quantize_int8(systems["GPT-2, SDPA"])
gather_by = systems["student, gather"].without_kernel or "gathers are the C++ kernel's"
print(f"{len(systems)} systems; {spiking.num_parameters():,} parameters of the student, "
      f"{systems['GPT-2, SDPA'].num_parameters():,} of GPT-2; {gather_by}")

# %% [markdown]
# ## How it is measured
# A step decodes one token of each sequence with the cache that the system has. All take turns,
# after warm-up calls outside the clock.

# %%
def peak_allocation(call, device):
    """Bytes that a call has allocated at most at once, over what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler else writes at each start
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as trace:
        kept = call()  # the profiler knows the sizes only of what it has seen
        del kept
        with torch.profiler.record_function("measured"):
            call()
    events = sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    since = next(event.start_ns() for event in events if event.name() == "measured")
    sizes = [event.nbytes() for event in events
             if event.name() == "[memory]" and event.start_ns() >= since]
    return int(np.cumsum([0, *sizes]).max())


def gpu_joules():
    """What all GPUs have used so far, by NVML's counters; None where none can be read."""
    try:
        import pynvml as nvml
        nvml.nvmlInit()
        gpus = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return sum(map(nvml.nvmlDeviceGetTotalEnergyConsumption, gpus)) / 1e3
    except Exception:  # no GPU, no driver library, no permission: then energy is only estimated
        return None


def joules_per_call(call, seconds=5.0):
    """Joules of a call over those of idle GPUs, from two windows; None without a counter."""
    watts, calls = [], 0
    for work in (lambda: time.sleep(0.01), call) if gpu_joules() else ():
        calls, before, start = 0, gpu_joules(), time.perf_counter()
        while time.perf_counter() < start + seconds:
            work()
            calls += 1
        watts.append((gpu_joules() - before) / seconds)
    return (watts[1] - watts[0]) * seconds / calls if watts else None


def bench(systems, contexts, batches, repeats, hardware, known=()):
    """Measures decoding of {name: causal language model of transformers}, in turns.

    `contexts` are tokens before the decoded one, `batches` sequences at once, `known` rows that are
    not measured again. Returns rows {"system", "batch", "context", "hardware", "decode" (timing of
    a step), "tokens/s", "first token" (seconds, one prefill), "memory" (bytes of weights, cache and
    activations), "joules per token"}, or a "status" where a system lacks the case.
    """
    device, rows = next(iter(systems.values())).device, []
    known = {(row["system"], row["batch"], row["context"]): row for row in known}
    ids = torch.randint(0, min(model.config.vocab_size for model in systems.values()),
                        (max(contexts),), generator=torch.Generator().manual_seed(0)).to(device)
    for batch in batches:
        steps, found = {}, {}
        cases = [(key, batch, context) for context in contexts for key in systems]
        for case in tqdm(cases, desc=f"batch {batch}", unit="case"):
            model, context = systems[case[0]].eval(), case[2]
            ends = getattr(model.config, "n_positions", math.inf)
            if case in known:
                found[case] = known[case]
            elif not getattr(model, "_is_stateful", False) and context >= ends:
                found[case] = {"status": f"ends at {ends} positions"}  # the token needs one too
            else:
                clock = time.perf_counter()
                steps[case] = asnn.Decoder(model, ids[:context].repeat(batch, 1))
                found[case] = {"first token": time.perf_counter() - clock}
                if steps[case]().shape[:2] != (batch, 1):  # transformers' RWKV
                    found[case] = {"status": "mixes the sequences of a batch"}
                    del steps[case]
        for case, timing in asnn.time_interleaved(steps, repeats, 0.0, f"batch {batch}").items():
            step, joules = steps[case], device.type == "cuda" and joules_per_call(steps[case])
            memory = {key: step.memory()[key] for key in ("weights", "cache")}
            found[case] |= {
                "decode": timing._asdict(), "tokens/s": batch / timing.median,
                "memory": memory | {"activations": peak_allocation(step, device)},
                "joules per token": joules / batch if joules else None}
        rows += [{"system": key, "batch": batch, "context": context, "hardware": hardware,
                  **found[key, batch, context]} for key, batch, context in cases]
    return rows


def bench_table(rows):
    """The rows as text, measured values with their unit."""
    table = []
    for row in rows:
        step = [1e3 * row["decode"][part] for part in ("median", "low", "high")] if (
            "decode" in row) else []
        table.append({
            **{key: row[key] for key in ("system", "batch", "context")},
            "ms per step (quartiles)":
                "{:.2f} ({:.2f} to {:.2f})".format(*step) if step else row["status"],
            "tokens/s": f"{row['tokens/s']:,.1f}" if step else "-",
            "first token, ms (once)": f"{1e3 * row['first token']:,.0f}" if step else "-",
            "memory, MiB": f"{sum(row['memory'].values()) / 2**20:,.1f}" if step else "-"})
    return table


def agreement(rows, others):
    """Median latencies there over those here, of what both have. Raises ValueError for rows of
    other hardware."""
    here, there = ({row["hardware"] for row in some} for some in (rows, others))
    if here != there:
        raise ValueError(f"hardware of the other rows is {there}, and here {here}: not compared.")
    here, there = ({(row["system"], row["batch"], row["context"]): row["decode"]["median"]
                    for row in some if "decode" in row} for some in (rows, others))
    return np.array([there[case] / here[case] for case in here if case in there])


# %% [markdown]
# ## One token at a time
# Measured twice: how far can the numbers be trusted?

# %%
middle = [context for context in contexts if context < positions][:2][-1]
first, second = (bench(systems, [middle], [1], repeats, hardware) for _ in range(2))
asnn.show_table(bench_table(first))
apart = 100 * np.abs(agreement(first, second) - 1)
print(f"medians of {repeats} runs in turns, context {middle}, {hardware}; two measurements differ "
      f"by {np.median(apart):.1f} % in the median and {apart.max():.1f} % at most (measured)")

# %% [markdown]
# ## Contexts
# The student's state has one size after any number of tokens. A transformer's cache grows with
# each, and GPT-2 has no position beyond its last. Memory includes what a step allocates.

# %%
def decoded(rows):
    """{system: its rows that have a measured step}."""
    return {key: [row for row in rows if row["system"] == key and "decode" in row]
            for key in dict.fromkeys(row["system"] for row in rows if "decode" in row)}


def plot_lines(rows, x, value, **axis):
    """A line for each system over `x`, a name in the rows."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (key, some), style in zip(decoded(rows).items(), ("o-", "s--", "^-.", "D:", "v-", "x--")):
        axes.plot([row[x] for row in some], [value(row) for row in some], style, label=key)
    ticks = sorted({row[x] for row in rows})
    axes.set(xscale="log", ylim=(0, None), **axis)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    return figure


rate = {key: some[0]["tokens/s"] for key, some in decoded(first).items()}
fastest = max((key for key in rate if "gather" in key), key=rate.get)
dense = max((key for key in rate if key.startswith("student, dense")), key=rate.get)
few = dict.fromkeys(("GPT-2, SDPA", "GPT-2, int8", "student, dense", dense, fastest))
few = {key: systems[key] for key in few if key in systems}
by_context = bench(few, contexts, [1], repeats, hardware, known=first)
asnn.show_table(bench_table(by_context))
run.show(plot_lines(by_context, "context", lambda row: 1e3 * row["decode"]["median"],
                    title=f"one decoded token, {hardware}", xlabel="context, tokens",
                    ylabel="ms per token"), "contexts")

# %% [markdown]
# ## Batches
# Several sequences share the weights that a dense product reads; a gather reads its rows for each
# of them. What wins at how many sequences is measured; the fastest dense form of the student, in
# int8 with its small operations fused, is the row to hold against.

# %%
def batch_sentence(rows, sparse, dense):
    """What the rows say about two systems at each number of sequences that both have."""
    speed = {(row["system"], row["batch"]): row["tokens/s"] for row in rows if "decode" in row}
    both = sorted(batch for key, batch in speed if key == sparse and (dense, batch) in speed)
    ratios = {batch: speed[sparse, batch] / speed[dense, batch] for batch in both}
    wins = [str(batch) for batch in both if ratios[batch] > 1]
    where = f"for {', '.join(wins)} sequences at once and slower for the others"
    if len(wins) in (0, len(both)):
        where = f"at {'every' if wins else 'no'} number of sequences"
    return (f"{sparse} is faster than {dense} {where}: "
            + ", ".join(f"{ratio:.2f} times at {batch}" for batch, ratio in ratios.items()))


short = min(32, contexts[0])
by_batch = bench(few, [short], batches, max(3, repeats // 2), hardware)
asnn.show_table(bench_table(by_batch))
run.show(plot_lines(by_batch, "batch", lambda row: row["tokens/s"], ylabel="tokens/s",
                    title=f"decoding after {short} tokens, {hardware}",
                    xlabel="sequences decoded at once"), "batches")
print(batch_sentence(by_batch, fastest, dense) + " (measured)")

# %% [markdown]
# ## Operations
# What one token costs the student: multiply-accumulates of the dense form, and what is left of them
# where spikes feed a product.

# %%
def counted_macs(model, context=8):
    """Multiply-accumulates of one decoded token, counted by FlopCounterMode."""
    step = asnn.Decoder(model, torch.zeros(1, context, dtype=torch.long, device=model.device))
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() // 2


rates = asnn.firing_rates(spiking, torch.randint(0, vocabulary, (2, 32)))
operations = asnn.operations(spiking, rates)
frame = pd.DataFrame(operations).groupby("product", sort=False).agg({
    "site": "first", "MACs": "sum", "density": "mean", "adds": "sum", "skipped": "sum",
    "state updates": "sum"}).reset_index()
asnn.show_table(frame.round(2).to_dict("records"))
analytic, counted = int(frame["MACs"].sum()), counted_macs(spiking)
print(f"{analytic:,} MACs per token in the dense form, {counted:,} by torch's FlopCounterMode; "
      f"{100 * frame['skipped'].sum() / analytic:.0f} % of them are skipped at these densities")

# %% [markdown]
# ## Energy
# Measured where a GPU counts it. Otherwise estimated from operations and bytes at 45 nm (Horowitz
# 2014). A column that leaves out DRAM and head says little, because memory costs most.

# %%
ENERGY = {"MAC": 4.6e-12, "add": 0.9e-12, "DRAM byte": 640e-12 / 4}  # joules; fp32, 45 nm


def energy_estimate(rows, bytes_read):
    """Estimated joules per token of rows of `operations`: `as built`, all that is computed as MACs;
    `idealised`, additions where spikes feed, without the head; the same with the head and every
    byte read, which is the one to compare systems by."""
    def joules(some, spike):
        return sum(ENERGY["MAC"] * (row["MACs"] - row["skipped"] - row["adds"]) * (row["MACs"] > 0)
                   + spike * row["adds"] + ENERGY["MAC"] * row["state updates"] for row in some)
    inner = [row for row in rows if row["product"] != "head"]
    return {"as built": joules(rows, ENERGY["MAC"]), "idealised": joules(inner, ENERGY["add"]),
            "idealised, with DRAM and head":
                joules(rows, ENERGY["add"]) + bytes_read * ENERGY["DRAM byte"]}


def weights_read(rows):
    """Weights that a token of a student reads: all but those of channels that did not fire."""
    return sum(row["MACs"] - row["skipped"] for row in rows
               if row["product"].startswith("W_") or row["product"] == "head")


word, macs = (4, 1) if on_cpu else (2, 2), counted_macs(systems["GPT-2, eager"], min(middle, 512))
of_gpt2 = [{"product": "all", "MACs": macs, "adds": 0, "skipped": 0, "state updates": 0}]
of_dense, one = asnn.operations(systems["dense twin"]), torch.ones(1, 2, dtype=torch.long)
forms = {"student, dense": (of_dense, word[0] * weights_read(of_dense)),
         "student, gather": (operations, word[0] * weights_read(operations)),
         "student, gather_int8": (operations, weights_read(operations))}
forms |= {key: (of_gpt2, asnn.Decoder(systems[key], one.to(device)).memory()["read"])
          for key in ("GPT-2, eager", "GPT-2, int8") if key in systems}
joules = {key: energy_estimate(*form) for key, form in forms.items() if key in systems}
used = {row["system"]: row.get("joules per token") for row in first}
asnn.show_table([{
    "system": key, **{f"{column}, uJ (est.)": f"{1e6 * v:,.4g}" for column, v in row.items()},
    "weights read, MB": f"{forms[key][1] / 1e6:,.1f}",
    "measured, J": f"{used[key]:.3g}" if used[key] else "no counter"}
    for key, row in joules.items()])
print("estimated with fp32 operations in all rows: int8 saves more arithmetic than this table says")

# %% [markdown]
# ## Peers
# llama.cpp is what one takes to decode fast on a CPU. Its `llama-bench`, on the path or where the
# variable LLAMA_BENCH says, runs in turns with the student's C++ step: as many threads, the same
# context, GPT-2 of two sizes. A step's limit is the time in which memory gives what it must read.

# %%
def write_gguf(path, model, kind):
    """A GPT-2 for llama.cpp, its matrices in Q8_0 or Q4_0: for speed, 256 rows again and again."""
    import gguf
    c, file, quant = model.config, gguf.GGUFWriter(path, "gpt2"), gguf.GGMLQuantizationType[kind]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, c.n_layer)
    for key, value in {"block_count": c.n_layer, "embedding_length": c.n_embd, "vocab_size":
                       c.vocab_size, "feed_forward_length": 4 * c.n_embd, "context_length":
                       c.n_positions, "attention.head_count": c.n_head}.items():
        file.add_uint32(f"gpt2.{key}", value)
    file.add_layer_norm_eps(1e-5)
    file.add_tokenizer_model("none")
    for key, value in model.state_dict().items():
        x, kind = (value.t() if ".h." in key else value).contiguous().numpy(), None
        if x.ndim == 2 and "wpe" not in key:
            rows, kind = gguf.quants.quantize(x[:256], quant), quant
            x = np.resize(rows, (len(x), rows.shape[1]))
        file.add_tensor(names.get_name(key, (".weight", ".bias")), x, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def llama_rate(tool, path, context, threads):
    """Tokens/s by llama-bench for up to 32 tokens, the last of them after `context`."""
    time.sleep(0.3)  # until the threads that our calls left waiting have gone to sleep
    n = min(32, context // 2)
    done = subprocess.run([tool, "-m", path, *f"-p 0 -n {n} -d {context - n} -t {threads} -r 2 "
                           "-o json".split()], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)[0]["avg_ts"]


tool = os.environ.get("LLAMA_BENCH") or shutil.which("llama-bench")
tool = tool if importlib.util.find_spec("gguf") else None
full, files = asnn.random_student(large, vocabulary, dict.fromkeys(site_density, 1.0), seed), {}
heads = {"student, int8 head": (spiking, "int8", operations),
         "student, int4 head": (spiking, "int4", operations),
         "all fire, int8 head": (full, "int8", asnn.operations(full))} if four else {}
buffer, sample = torch.ones(2**19 if tiny else 2**26), torch.randint(0, vocabulary, (1, middle))
calls = {key: asnn.Decoder(asnn.sparsify(model, **int8 | {"head": head}, compiled=True), sample)
         for key, (model, head, _) in heads.items()}
with tempfile.TemporaryDirectory() as here:
    for key in ("GPT-2 of this size", "GPT-2, SDPA") if tool and four else ():
        for kind in ("Q8_0", "Q4_0"):
            files[f"llama.cpp, {key}, {kind}"] = path = f"{here}/{len(files)}"
            write_gguf(path, systems[key], kind)
    turns = pd.DataFrame([
        {**{key: 1 / timing.median for key, timing in asnn.time_interleaved(
            {"read": buffer.sum, **calls}, 1, 0.02 if tiny else 0.4).items()},
         **{key: llama_rate(tool, path, middle, env["threads"]) for key, path in files.items()}}
        for _ in tqdm(range(max(3, repeats // 2)), desc="peers", unit="round")])
read = buffer.nbytes * turns.pop("read")
limits = {key: (weights_read(rows) - width * vocabulary * (head == "int4") * 7 / 16) * turns[key]
          / read for key, (_, head, rows) in heads.items()}  # int4: 144 bytes for 256 weights
asnn.show_table([{
    "system": key, "tokens/s (quartiles)": "{:,.0f} ({:,.0f} to {:,.0f})".format(
        *turns[key].quantile([0.5, 0.25, 0.75])),
    **{f"{one} over it": f"{(turns[one] / turns[key]).median():.2f}" for one in [*heads][:2]},
    "of its limit": f"{limits[key].median():.0%}" if key in limits else "-"} for key in turns])
print(f"{len(turns)} rounds, context {middle}; memory gives {read.median() / 1e9:.1f} GB/s to a "
      "program that reads once (measured)" + "; no llama.cpp: build its llama-bench (github.com/"
      "ggml-org/llama.cpp), name it in LLAMA_BENCH, pip install gguf" * (not tool))

# %% [markdown]
# ## Quality and speed of one network
# Here both belong to the same network: the trained student and its teacher, which are small, on
# their own task. The dense twin's gap is the student's over the ternary tax that v14.4 measured.
# That tax is of shorter runs but in profile ref (a tenth of the steps): an estimate.

# %%
def twin_gap(gap, metrics):
    """The student's gap over the mean ternary tax of a run's metrics; None without one."""
    taxes = [one["tax"] for one in (metrics.get("tax") or {}).get("runs", [])]
    return gap / float(np.mean(taxes)) if taxes else None


def plot_pareto(speed, gaps):
    """Gap over speed of networks that have both, and the line of those that no other beats."""
    points = {key: (speed[key], gap) for key, gap in gaps.items() if gap}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (key, point), marker in zip(points.items(), "os^DvPX"):
        axes.plot(*point, marker, markersize=9, alpha=0.7, label=key)
    front = sorted(p for p in points.values() if not any(
        q[0] >= p[0] and q[1] <= p[1] and q != p for q in points.values()))
    axes.plot(*zip(*front), "k--", linewidth=0.8, zorder=0, label="none is better in both")
    axes.set(xlabel="tokens/s, one sequence", ylabel="gap (PPL over the teacher's)",
             title="trained networks, each with its own speed and gap")
    axes.margins(0.12)
    axes.legend()
    return figure


trained = {"teacher": task.teacher, "student, dense": student,
           "student, gather": asnn.sparsify(student, "gather"),
           "student, dense int8": asnn.quantize_int8(student),
           "student, gather_int8": asnn.sparsify(student, **int8)}
if four and student.config.d_model % 32 == 0:
    trained["student, int4 head"] = asnn.sparsify(student, **int8 | {"head": "int4"})
scored = task.tokens["validation"][:(2048 if tiny else 10_240) + 1]
quality = {key: asnn.evaluate(model, scored, loaded.recipe.seq_len, description=key)
           for key, model in trained.items()}
gaps = {key: result.ppl / quality["teacher"].ppl for key, result in quality.items()}
gaps["dense twin"] = twin_gap(gaps["student, dense"], loaded.metrics)
trained["dense twin"] = task.build_student(loaded.recipe.replace(spike_kind="dense"))
own = bench(trained, [loaded.recipe.seq_len // 2], [1], repeats, hardware)
own_rate = {row["system"]: row["tokens/s"] for row in own}
asnn.show_table([{"network": key, "tokens/s, on the CPU": f"{own_rate[key]:,.1f}",
                  "gap": f"{gaps[key]:.4f}" if gaps[key] else "no tax was measured"}
                 for key in trained])
print(f"{name}: PPL over the teacher's {quality['teacher'].ppl:.2f} on the same "
      f"{quality['teacher'].tokens:,} validation tokens (measured)" + "".join(
          f"; {key} costs {100 * (gap / gaps['student, dense'] - 1):+.2f} % of PPL"
          for key, gap in gaps.items() if key.endswith(("_int8", "int4 head"))))
hours = loaded.metrics["training"]["seconds"] / 3600
halvings = math.log2(student.config.vocab_size / quality["student, dense"].ppl)
cost = hours * price_per_hour
print(f"its training took {hours:.2f} h (measured), at {price_per_hour} $ per hour {cost:.4f} $, "
      f"{cost / max(1e-9, halvings):.5f} $ per halving of the PPL from a guess on (estimated)")
run.show(plot_pareto(own_rate, gaps), "pareto")

# %% [markdown]
# ## Scale
# A step takes a time for each layer and for each byte that it reads: two numbers, fitted to four
# sizes, give an estimate for a billion parameters with its interval.

# %%
def fit_latency(layers, sizes, seconds, target):
    """Seconds = a layers + b bytes by least squares on relative errors, a and b not below 0:
    (a, b, estimate for target (layers, bytes), half of its 95 % interval for a new measurement)."""
    from scipy import optimize, stats
    X = np.column_stack([layers, sizes]) / np.asarray(seconds)[:, None]
    scale, n = X.max(0), len(X)
    X = X / scale
    found, x = optimize.nnls(X, np.ones(n))[0], np.asarray(target) / scale
    variance, estimate = np.sum((1 - X @ found) ** 2) / (n - 2), float(x @ found)
    # The error of a new measurement is relative to it, as those of the fit are.
    spread = math.sqrt(variance * (x @ np.linalg.inv(X.T @ X) @ x + estimate**2))
    return (*(found / scale).tolist(), estimate, float(stats.t.ppf(0.975, n - 2) * spread))


def plot_scale(rows, fits, parameters, title):
    """Latencies of rows {"form", "parameters", "seconds"}, and estimates with their intervals."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (form, (*_, estimate, spread)), colour, marker in zip(fits.items(), ("C0", "C1"), "os"):
        some = [(row["parameters"] / 1e6, 1e3 * row["seconds"]) for row in rows
                if row["form"] == form]
        axes.plot(*zip(*some), marker, color=colour, label=f"{form}, measured")
        ends = [[1e3 * min(spread, 0.99 * estimate)], [1e3 * spread]]
        axes.errorbar([parameters / 1e6], [1e3 * estimate], ends, fmt=marker, mfc="none",
                      capsize=4, color=colour, label=f"{form}, estimated")
    axes.set(title=title, xscale="log", yscale="log", xlabel="parameters, millions",
             ylabel="ms per token")
    axes.legend()
    return figure


sizes = [(64, 1), (64, 2), (128, 1), (128, 2)] if tiny else [(256, 2), (384, 3), (512, 4), (768, 5)]
inner = {key.split(".", 1)[1]: rate for key, rate in rates.items() if key.startswith("0.")}
scaled, steps = [], []
for d, n in [*sizes, (2048, 16)]:
    recipe = large.replace(n_layer=n, d_model=d)
    with torch.device("meta"):
        model = asnn.GooseForCausalLM(recipe.student_config(vocabulary))
    density = {f"{layer}.{site}": rate for layer in range(n) for site, rate in inner.items()}
    for form, size in (("dense", word[0] * weights_read(asnn.operations(model))),
                       ("sparse", word[1] * weights_read(asnn.operations(model, density)))):
        scaled.append({"form": form, "width": d, "layers": n, "bytes": size,
                       "parameters": model.num_parameters()})
    if (d, n) in sizes:
        model = asnn.random_student(recipe, vocabulary, site_density, seed)
        model = model if on_cpu else model.to(device, half)
        sparse = asnn.sparsify(model, "gather_int8", "int8") if on_cpu else asnn.sparsify(model)
        steps += [asnn.Decoder(form, one.to(device)) for form in (model, sparse)]
timings = asnn.time_interleaved(dict(enumerate(steps)), repeats, 0.0)
measured, billion, fits = scaled[:-2], scaled[-2:], {}
for row, timing in zip(measured, timings.values()):
    row |= {"seconds": timing.median, "text": timing.text()}
for target in billion:
    some = [row for row in measured if row["form"] == target["form"]]
    fits[target["form"]] = fit_latency(*([row[key] for row in some] for key in (
        "layers", "bytes", "seconds")), (target["layers"], target["bytes"]))
asnn.show_table([{
    "form": row["form"], "width x layers": f"{row['width']} x {row['layers']}",
    "parameters": f"{row['parameters'] / 1e6:.1f}M", "ms per token (quartiles)": row["text"],
    "read per token, MB": f"{row['bytes'] / 1e6:.1f}",
    "fitted, ms": f"{1e3 * np.dot(fits[row['form']][:2], (row['layers'], row['bytes'])):.2f}"}
    for row in measured])
for form, (per_layer, per_byte, estimate, spread) in fits.items():
    low, high = (1e3 * max(0, estimate + sign * spread) for sign in (-1, 1))
    print(f"{form}: {1e3 * per_layer:.2f} ms per layer and {1e9 * per_byte:.3f} ms per MB fitted; "
          f"{billion[0]['parameters'] / 1e9:.2f}B parameters: {low:.0f} to {high:.0f} ms per token "
          "(estimated)")
run.show(plot_scale(measured, fits, billion[0]["parameters"], f"decoding, {hardware}"), "scale")

# %% [markdown]
# ## Contract
# Facts that hold on every machine; continuous integration compares the output.

# %% tags=["nbval-check-output"]
print("analytic MACs equal FlopCounterMode:", analytic == counted)
print("idealised is never above what is built:", all(row["idealised"] <= row["as built"]
                                                     for row in joules.values()))
states = {row["memory"]["cache"] for row in decoded(by_context)["student, dense"]}
print("the student's state has one size at all contexts:", len(states) == 1)
print("GPT-2 ends at its positions:", any("ends at" in row.get("status", "") for row in by_context))

# %% [markdown]
# ## Saved artefacts
# All rows and tables; of the full size beside llama.cpp also `outputs/reference/headline.json`.

# %%
rows = first + [row for row in by_context if row["context"] != middle] + by_batch
table = pd.DataFrame(bench_table(rows))
latex = table.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
run.save("bench.json", {"environment": asnn.environment(), "rows": rows})
run.save("bench.md", table.to_markdown(index=False) + "\n")
run.save("bench.tex", latex.to_latex(hrules=True))
whole = {row["system"]: sum(row["memory"].values()) for row in first}
ends = {row["context"]: row["decode"] for row in decoded(by_context)[fastest]}
if tool and four and not tiny:
    ours = turns["student, int8 head"]
    claims = {f"over_llamacpp_{key}": ours / turns[f"llama.cpp, {other}"] for key, other in (
        ("q8_same_size", "GPT-2 of this size, Q8_0"), ("q8_gpt2", "GPT-2, SDPA, Q8_0"),
        ("q4_same_size", "GPT-2 of this size, Q4_0"))}
    claims |= {"share_of_byte_limit": limits["student, int8 head"],
               "skipping_alone": ours / turns["all fire, int8 head"],
               "memory_mib": pd.Series([whole[fastest] / 2**20])}
    if {128, 8192} <= set(ends):  # with the quartiles of both
        claims["latency_8192_over_128"] = pd.Series([ends[8192][a] / ends[128][b] for a, b in (
            ("low", "high"), ("median", "median"), ("high", "low"))])
    run.headline("papermill notebooks/asnn_v17_bench.ipynb -", {
        f"decode_{key}": {**dict(zip(("value", "low", "high"), rounds.quantile(
            [0.5, 0.025, 0.975]).tolist())), "seeds": 1} for key, rounds in claims.items()})
run.save("efficiency.json", {
    "student": name, "gate": loaded.gate, "gated": loaded.gated, "hardware": hardware,
    "context": middle, "fastest": fastest, "densities": site_density, "operations": operations,
    "joules, estimated": joules, "bytes read": {key: size for key, (_, size) in forms.items()},
    "gaps": gaps, "tokens/s of the trained networks": own_rate, "scale": scaled, "fits": fits,
    "peers, tokens/s": turns.to_dict("list"),
    "two measurements apart, %": apart.tolist(), "hours": hours, "price per hour": price_per_hour})
run.finish({"version": f"v17 of {loaded.metrics['version']}", "run": run.folder.name,
            "student": name, "gated": loaded.gated, "environment": env, "tokens/s": rate,
            "seconds": time.perf_counter() - begin})

# %% tags=["nbval-check-output"]
files = {"bench.json", "bench.md", "bench.tex", "efficiency.json", "metrics.json", "figures"}
print("saved:", sorted(files & {path.name for path in run.folder.glob("*")}))

# %% [markdown]
# ## Summary
# Sentences made from the numbers above. Three things may make the student fast, and only one is
# spikes: a kernel that reads memory well, int8 weights, skipped zeros. v16 takes them apart.

# %%
others = [key for key in ("GPT-2, SDPA", "GPT-2, int8", "GPT-2 of this size", dense) if key in rate]
print(f"The trained student {name} is {loaded.gate}. Speed is that of {layers} layers of width "
      f"{width} with random weights, context {middle}, {hardware} (measured):")
print(f"{fastest} decodes {rate[fastest]:,.1f} tokens/s in {whole[fastest] / 2**20:,.0f} MiB: "
      + "; ".join(f"{rate[fastest] / rate[key]:.2f} times the speed and "
                  f"{whole[fastest] / whole[key]:.2f} of the memory of {key}" for key in others))
last, start = (ends[context]["median"] for context in (contexts[-1], contexts[0]))
print(f"Its latency after {contexts[-1]:,} tokens is {last / start:.2f} of that after "
      f"{contexts[0]}. {batch_sentence(by_batch, fastest, dense)}.")
print(f"Finished: v17 in {time.perf_counter() - begin:.0f} s; {os.path.relpath(run.folder)}")
