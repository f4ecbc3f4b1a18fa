"""The code for GPUs under a simulated CUDA: what a card refuses, training, branches of pages."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from simulated_cuda import with_values

PAGES = {"asnn_v14_4_transfer": {"steps": 3, "tax_seeds": 1, "tax_steps": 2}, "asnn_v17_bench": {
    "device_name": "'cuda'", "repeats": 1, "batches": [1], "contexts": [16]}}

REFUSED = """
import torch
x, cpu = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
other = torch.ones(3, 3, device="cuda:1")
packed = torch.ops.quantized.embedding_bag_byte_prepack
wrong = {
    "two devices": lambda: x + other, "host and card": lambda: x @ cpu,
    "in place on the host": lambda: cpu.add_(x), "to numpy": lambda: x.numpy(),
    "to numpy, half-hidden": lambda: __import__("numpy").asarray(x),
    "generator of the host": lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
    "half in linalg": lambda: torch.linalg.qr(x.half()), "no kernel": lambda: packed(x),
    "no such card": lambda: cpu.to("cuda:7"),
    "mixed gradient": lambda: (cpu.requires_grad_() * other.sum()).to("cuda") + x}
for name, call in wrong.items():
    try:
        call()
    except (RuntimeError, TypeError, NotImplementedError):
        continue
    if name != "mixed gradient":  # a number on a card may meet the host: a control
        raise SystemExit(f"not refused: {name}")
y = x.clone().requires_grad_()
((y * 2.0).cpu() @ cpu).sum().backward()
assert y.grad.device == x.device and y.grad.cpu().tolist() == [[6.0] * 3] * 3
assert torch.mm(x.half(), x.half(), out_dtype=torch.float32).dtype == x.dtype
"""

# Smaller than profile tiny: every operation costs a call of Python, whatever its size.
SMALL = """
import asnn_common as asnn
asnn.PROFILES["tiny"] |= {
    "n_layer": 1, "seq_len": 32, "teacher_steps": 2, "eval_windows": 2, "final_windows": 4}
"""

TRAINING = """
import math, torch
task = asnn.load_task(asnn.get_recipe("v14.5", "tiny", distill_steps=3, align_steps=1))


class Scaled(asnn.DistillationTrainer):  # a GradScaler that starts at 65536 skips all three steps
    def run(self):
        scaler = self.accelerator.scaler
        assert scaler is None or scaler.get_scale() == 2.0**11
        return super().run()


for precision in ("fp16", "bf16"):
    recipe = task.recipe.replace(precision=precision)
    student, result = asnn.distil(task, recipe, trainer=Scaled)
    losses = [row["loss"] for row in result.log if "loss" in row]
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and result.skipped == 0
    assert result.finished and result.precision == precision and student.device.index == 0
    teacher = next(task.teacher.parameters()).device
    assert str(teacher) == f"cuda:{torch.cuda.device_count() - 1}", teacher
pocl = task.recipe.replace(curriculum="pocl", temperature="staged")
task.teacher.cpu()
task.windows(pocl)
assert next(task.teacher.parameters()).is_cuda  # it ranked the windows there
"""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Runs code under the simulation; all runs share cache and outputs."""
    folder = tmp_path_factory.mktemp("simulated")

    def run(code, **variables):
        (folder / "code.py").write_text(code)
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
               "ASNN_PROFILE": "tiny", "ASNN_HOME": str(ROOT), "MPLBACKEND": "Agg",
               "ASNN_OUTPUTS": str(folder / "outputs"), "ASNN_REF": "", "OMP_NUM_THREADS": "1",
               "GUARD": str(folder / "guard.so"), "PYTHONWARNINGS": "default", **variables}
        command = [sys.executable, ROOT / "tests" / "simulated_cuda.py", folder / "code.py"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        assert "FutureWarning" not in done.stderr
        return done.stdout, folder / "outputs"
    return run


def test_the_simulation_refuses_and_two_cards_do_three_steps_of_the_default_recipe(simulated):
    simulated(REFUSED + SMALL + TRAINING, GPUS="2", CAPABILITY="8.0")


def test_one_card_does_three_steps_of_the_default_recipe(simulated):
    simulated(SMALL + TRAINING, GPUS="1", CAPABILITY="8.0")


def test_the_gpu_branches_of_v14_4_and_v17(simulated):
    code = SMALL
    for name, values in PAGES.items():
        path = ROOT / "notebooks" / f"{name}.py"
        source = with_values(path.read_text(encoding="utf-8"), **values)
        names = {"__name__": "__main__", "__file__": str(path)}
        code += f"exec(compile({source!r}, {str(path)!r}, 'exec'), {names})\n"
    out, outputs = simulated(code)
    first, second = out.split("Finished: v14.5")
    assert "float16" not in first
    (metrics,) = outputs.glob("v14.5/*/metrics.json")
    metrics = json.loads(metrics.read_text())
    assert metrics["environment"]["device"] == "cuda:0"
    assert metrics["training"]["precision"] == "fp16"  # of a T4
    assert "Finished: v17" in second and "simulated GPU" in second
    (rows,) = outputs.glob("v17/*/bench.json")
    rows = json.loads(rows.read_text())["rows"]
    assert all("int8" not in row["system"] and "compiled" not in row["system"] for row in rows)
