"""Measure the training of the student: where a step's time goes, and what the full size needs.

    bench.py step    one step of the reference task's size, in parts, against a plain GPT-2 student of equal
                     parameters; systems interleaved, medians of one run
    bench.py full    three steps of a recipe's full-size student (--recipe, v14.3) with a GPT-2-sized teacher, random weights; parameter
                     counts, peak memory, and the memory of a larger batch on a 16 GB GPU by arithmetic
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import asnn_common as asnn


def gpt2(vocab_size, width, layers, heads, length, ffn=None):
    """A GPT-2 with random weights and no dropout."""
    config = GPT2Config(vocab_size=vocab_size, n_positions=length, n_embd=width, n_layer=layers, n_head=heads, n_inner=ffn,
                        activation_function="gelu_pytorch_tanh", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
                        bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def autocast(device, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


class Clock:
    """Seconds per named part, over repetitions."""

    def __init__(self, device):
        self.device, self.parts = device, {}

    def __call__(self, name, function):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        value = function()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.parts.setdefault(name, []).append(time.perf_counter() - start)
        return value


def describe(seconds):
    low, _, high = statistics.quantiles(seconds, n=4)
    return f"{1e3 * statistics.median(seconds):8.1f} ms  (IQR {1e3 * low:.1f} to {1e3 * high:.1f}, n={len(seconds)})"


def bench_step(repeats):
    """Prints the parts of a distillation step for the Goose student and for a GPT-2 student."""
    device, reason = asnn.select_device()
    asnn.keep_freed_memory()
    precision, why = asnn.select_precision(device)
    env = asnn.environment()
    recipe = asnn.PROFILES["ref"].scale(asnn.get_recipe("v14.3"))
    vocab, length = 4096, recipe.seq_len
    print(f"measured on {env['gpus'] or env['cpu']}, {env['threads']} threads, torch {env['versions']['torch']}, {why}; {reason}")
    torch.manual_seed(0)
    teacher = gpt2(vocab, 256, 6, 4, length).to(device).eval().requires_grad_(False)
    goose = asnn.GooseForCausalLM(recipe.student_config(vocab)).to(device)
    # Equal parameters: GPT-2's blocks of the same width hold as many as ours up to biases and decays.
    plain = gpt2(vocab, 256, 3, 4, length).to(device)
    students = {"goose": goose, "gpt2": plain}
    optimizers = {name: torch.optim.AdamW(asnn.parameter_groups(model, 0.01), lr=1e-4, fused=True)
                  for name, model in students.items()}
    inputs = torch.randint(0, vocab, (recipe.batch_size, length), device=device)
    labels = torch.randint(0, vocab, (recipe.batch_size, length), device=device)
    clocks = {name: Clock(device) for name in students}
    tau = torch.tensor(2.0, requires_grad=True)
    for repeat in range(repeats + 2):
        for name, student in students.items():
            clock = clocks[name] if repeat >= 2 else Clock(device)
            student.train()
            with autocast(device, precision):
                with torch.no_grad():
                    hidden_t = clock("teacher forward", lambda: teacher.transformer(inputs, use_cache=False)[0])
                hidden = clock("student forward", lambda: student.base_model(inputs, use_cache=False).last_hidden_state)
                loss = clock("head, KL and their gradients", lambda: asnn.chunked_distillation(
                    hidden, student.lm_head.weight, hidden_t, teacher.lm_head.weight, tau, labels, want_ce=False).loss)
            clock("student backward", loss.backward)
            clock("clip", lambda: torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0))
            clock("optimiser", optimizers[name].step)
            optimizers[name].zero_grad()
    totals = {}
    for name, student in students.items():
        parts = clocks[name].parts
        totals[name] = [sum(values) for values in zip(*parts.values())]
        print(f"\n{name}: {asnn.count_parameters(student):,} parameters, {recipe.batch_size} x {length} tokens")
        for part, seconds in sorted(parts.items(), key=lambda item: -statistics.median(item[1])):
            share = statistics.median(seconds) / statistics.median(totals[name])
            print(f"  {part:30s} {describe(seconds)}  {100 * share:4.1f} %")
        speed = recipe.batch_size * length / statistics.median(totals[name])
        print(f"  {'step':30s} {describe(totals[name])}  {speed:,.0f} tokens/s")
    ratio = statistics.median(g / p for g, p in zip(totals["goose"], totals["gpt2"]))
    print(f"\nstep time goose / gpt2, paired median: {ratio:.3f}")
    recurrences = {name: Clock(device) for name in ("reference", "chunked")}
    r, k, v = (torch.randn(recipe.batch_size, length, 256, device=device, requires_grad=True) for _ in range(3))
    w = torch.rand(256, device=device, requires_grad=True)
    for _ in range(min(repeats, 10)):
        for name, clock in recurrences.items():
            clock(name, lambda: asnn.RECURRENCES[name](r, k, v, w)[0].sum().backward())
    slow, fast = (statistics.median(recurrences[name].parts[name]) for name in ("reference", "chunked"))
    print(f"one layer's recurrence, forward and backward: loop {1e3 * slow:.1f} ms, chunked {1e3 * fast:.1f} ms, ratio {slow / fast:.1f}")


def bench_full(steps, name):
    """Prints parameter counts, step times and memory of a recipe at its full size."""
    device, reason = asnn.select_device()
    precision, why = asnn.select_precision(device)
    asked = asnn.get_recipe(name)
    recipe = asked.replace(batch_size=1, fdd_start=0, align_steps=0)
    torch.manual_seed(0)
    teacher = gpt2(50257, 768, 12, 12, 1024).eval().requires_grad_(False)
    master = asnn.Teacher(teacher, None, "gpt2, random weights")
    student = asnn.build_student(recipe, master, calibration=torch.randint(0, 50257, (1, 64)))
    objective = asnn.Distiller(student, teacher, recipe).to(device)
    objective.place_teacher(device)
    print(f"teacher {asnn.count_parameters(teacher):,} parameters, student {asnn.count_parameters(student):,}; {reason}; {why}")
    groups = asnn.parameter_groups(objective, 0.01, recipe.lr, recipe.matrix_lr)
    optimizer = (asnn.Muon if recipe.optimizer == "muon" else partial(torch.optim.AdamW, fused=True))(groups, lr=recipe.lr)
    inputs, labels = torch.randint(0, 50257, (2, 1, recipe.seq_len), device=device)
    saved = {}

    def remember(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    for step in range(steps):
        saved.clear()
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t), autocast(device, precision):
            loss, _ = objective(inputs, labels, step=step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {float(loss.detach()):.4f}, {time.perf_counter() - start:.2f} s, batch 1 x {recipe.seq_len}")
    weights = {p.data_ptr() for p in objective.parameters()}
    activations = sum(size for pointer, size in saved.items() if pointer not in weights)
    head = student.lm_head.weight.numel() * 4
    print(f"peak memory of this process, measured: {asnn.peak_memory_gb():.2f} GiB")
    batch, gib = asked.batch_size, 2**30
    parts = {
        "teacher weights, fp32": asnn.count_parameters(teacher) * 4,
        "student weights, gradients, two Adam moments, fp32": asnn.count_parameters(student) * 16,
        "half-precision copies of the weights under autocast": (asnn.count_parameters(student) + head // 4) * 2,
        f"activations kept for backward: {(activations - head) / 2**20:.0f} MiB measured at batch 1, times {batch}":
            (activations - head) * batch,
        "gradient of the head, fp32, kept by the loss": head,
        "logit chunks of the loss": asnn.LOGIT_BUDGET["cuda"],
        "CUDA context and library workspaces, allowance": gib,
    }
    print(f"estimate for batch {batch} x {recipe.seq_len} on one 16 GB GPU:")
    for name, size in parts.items():
        print(f"  {size / gib:6.2f} GiB  {name}")
    print(f"  {sum(parts.values()) / gib:6.2f} GiB  sum (estimated)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "full"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--recipe", default="v14.3")
    arguments = parser.parse_args()
    bench_step(arguments.repeats) if arguments.what == "step" else bench_full(3, arguments.recipe)
