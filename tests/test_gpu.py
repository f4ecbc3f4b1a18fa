"""What only a GPU can show: `pytest -m gpu tests/test_gpu.py`, under eight minutes on any card."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import asnn_common as asnn
from conftest import ROOT
from simulated_cuda import with_values

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu
HALF = asnn._select_precision(torch.device("cuda"))[0]  # of this card
PAGES = {"asnn_v14_3_distill": {}, "asnn_v14_4_transfer": {"tax_seeds": 1, "tax_steps": 2},
         "asnn_v15_spikingbrain": {"tokens": 2048, "damage_windows": 2, "remedy": True},
         "asnn_v16_sparse": {}, "asnn_v17_bench": {"device_name": "cuda"},
         "asnn_v18_ablations": {"seeds": 1}}  # other parameters


@pytest.fixture
def new(small_task):
    """new(name, **overrides): the task of a small recipe, with matrix states of two heads."""
    return lambda name, **overrides: small_task(name, **{"head_dim": 16, **overrides})


@pytest.fixture
def train(new):
    return lambda name, folder=None, max_steps=None, **overrides: asnn.distil(
        new(name, **overrides), folder=folder, max_steps=max_steps)


def error(got, expected):
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12))


def cosine(a, b):
    flat = (x.detach().double().cpu().flatten() for x in (a, b))
    return float(F.cosine_similarity(*flat, dim=0))


def losses(result):
    return [row["loss"] for row in result.log if "loss" in row]


@pytest.mark.parametrize("T", [1, 31, 70, 257])
@pytest.mark.parametrize("kind", ["vector", "matrix", "delta"])
def test_recurrences_and_their_gradients(kind, T):
    shape = (2, T, 32) if kind == "vector" else (2, T, 2, 16)
    inputs = [F.normalize(torch.randn(shape), dim=-1) for _ in range(3)]  # r, k, v
    inputs += [torch.rand(shape[2:]) * 0.8 + 0.15] + [torch.rand(2, T, 2)] * (kind == "delta")
    forms = asnn.RECURRENCES if kind == "vector" else asnn.MATRIX_RECURRENCES

    def found(form, device, dtype):
        x = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs]
        with torch.autocast("cuda", asnn.DTYPES[HALF], enabled=kind == "vector"):
            out, S = forms[form](*x[:4], *[None, *x[4:]] * (kind == "delta"))
        assert S.dtype == dtype and S.device.type == device
        return out, S, *torch.autograd.grad(out.square().sum() + S.sum(), x)

    expected = found("reference", "cpu", torch.float64)
    for got, true in zip(found("chunked", "cuda", torch.float32), expected, strict=True):
        assert error(got, true) < 2e-4


@pytest.mark.parametrize("estimator", asnn.ESTIMATORS)
@pytest.mark.parametrize("kind", ["ternary", "binary", "integer:3"])
def test_spikes_and_their_gradients(estimator, kind):
    x = torch.randn(2, 9, 64).to(asnn.DTYPES[HALF]).float()

    def found(device, dtype):
        site, y = asnn.TernarySpike(64, kind, estimator=estimator).to(device), x.to(device, dtype)
        out, weights = site(y.requires_grad_()).float(), torch.linspace(-1, 1, 64, device=device)
        return out, *torch.autograd.grad((out * weights).sum(), (y, site.amplitude))

    expected, got = found("cpu", torch.float32), found("cuda", asnn.DTYPES[HALF])
    assert torch.equal(got[0].cpu(), expected[0])
    assert error(got[1], expected[1]) < 1e-2 and cosine(got[2], expected[2]) > 0.99


@pytest.mark.parametrize("offset", [0.0, 110.0])  # GPT-2's logits lie near -110: halves are coarse
@pytest.mark.parametrize("tau, ce", [(1.0, 0.2), (3.0, 0.0)])
def test_the_chunked_loss_in_half_precision(offset, tau, ce):
    V, D, n = 50257, 64, 96
    u, W, theirs = F.normalize(torch.randn(D), dim=0), torch.randn(V, D) / 2, torch.randn(n, D)
    W += torch.outer(2.5 - W @ u, u)  # along u rows have 2.5, and states -offset / 2.5
    theirs -= torch.outer(theirs @ u + offset / 2.5, u)
    ours, labels = theirs + 0.1 * torch.randn(n, D), torch.randint(V, (n,))
    h, head = (x.to("cuda").requires_grad_() for x in (ours, W))
    with torch.autocast("cuda", asnn.DTYPES[HALF]):
        found = asnn.distillation_loss(h, head, theirs.to("cuda"), W.to("cuda"), tau,
                                       labels.to("cuda"), 1.0, ce)
    found.loss.backward()
    x, w = (t.clone().requires_grad_() for t in (ours, W))
    z, other = x @ w.t(), theirs @ W.t()
    kl = tau**2 * F.kl_div(F.log_softmax(z / tau, -1), F.log_softmax(other / tau, -1),
                           log_target=True, reduction="batchmean")
    (kl + ce * F.cross_entropy(z, labels)).backward()
    assert float(found.kd) == pytest.approx(float(kl.detach()), rel=0.02)
    assert min(cosine(h.grad, x.grad), cosine(head.grad, w.grad)) > 0.98


def test_the_loss_stays_in_its_budget():
    h, w = torch.randn(4096, 768, device="cuda"), torch.randn(50257, 768, device="cuda")
    labels, before = torch.zeros(4096, dtype=torch.long).cuda(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", asnn.DTYPES[HALF]), torch.no_grad():
        asnn.distillation_loss(h, w, h, w, 2.0, labels, 1.0, 0.2)
    peak = torch.cuda.max_memory_allocated() - before  # and both heads in half precision
    assert peak < 1.1 * asnn.LOGIT_BUDGET["cuda"] + 6 * w.numel()


def test_muon_orthogonalises_in_this_cards_half():
    matrix = torch.randn(384, 96)
    got = asnn._orthogonalise(matrix.to("cuda"), dtype=asnn.DTYPES[HALF]).float().cpu()
    assert ((torch.linalg.svdvals(got) - 1).abs() < 0.5).all()
    assert cosine(got, asnn._orthogonalise(matrix)) > 0.99


@pytest.mark.parametrize("name", ["v4", "v7", "v11", "v13", "v14.3", "v14.3-published",
                                  "v14.3-cumsum", "v14.4", "v14.4-rates", "v14.4-vector",
                                  "v14.5"])
def test_three_steps_of_every_kind_of_recipe(train, name):
    aligned, teacher = min(1, asnn.RECIPES[name].align_steps), asnn.RECIPES[name].teacher
    student, result = train(name, distill_steps=3, align_steps=aligned, precision="auto",
                            teacher=teacher.replace("gpt2", "train"), fdd_start=1)
    known = ("fp16", "bf16")[torch.cuda.get_device_capability() >= (8, 0)]
    assert result.finished and result.skipped == 0 and result.precision == HALF == known
    assert student.device.type == "cuda" and np.isfinite(losses(result)).all()


@pytest.mark.parametrize("name", ["v14.3", "v14.4-rates"])
def test_a_run_in_fp32_is_that_of_the_cpu(train, monkeypatch, name):
    # Muon iterates in what a device is fast at; here in the same on both.
    monkeypatch.setattr(asnn, "_select_precision", lambda *_: ("fp32", "asked for"))
    curves = []
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(asnn, "_select_device", lambda d=device: (torch.device(d), "asked"))
        curves.append(losses(train(name, distill_steps=10)[1]))
    assert len(curves[0]) == 10 and np.allclose(*curves, rtol=2e-3)


@pytest.mark.parametrize("name", ["v14.3", "v14.4-rates"])
def test_half_precision_learns(train, name):
    results = [train(name, distill_steps=40, patience=40, precision=p)[1] for p in ("fp32", "auto")]
    ends = [np.mean([row["kd"] for row in result.log if "kd" in row][-8:]) for result in results]
    assert all(result.finished for result in results) and ends[1] < 1.3 * ends[0] + 0.02


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_overflows_skips_the_step(new, optimizer):
    task = new("v14.4", optimizer=optimizer, align_steps=0, distill_steps=3, kd_weight=4e9,
               precision="fp16")
    before, (student, result) = task.build_student().state_dict(), asnn.distil(task)
    assert (result.step, result.skipped, losses(result)) == (3, 0, [])  # the GradScaler's doing
    assert all(torch.equal(value.cpu(), before[k]) for k, value in student.state_dict().items())


def test_resuming_is_exact(train, tmp_path):
    ends = []
    for folder, stop in (("whole", None), ("parts", 5), ("parts", None)):
        student, result = train("v14.4-rates", tmp_path / folder, stop, precision="auto")
        ends.append((student.state_dict(), losses(result), torch.rand(3, device="cuda")))
    (whole, curve, random), _, (parts, again, later) = ends
    assert result.finished and curve == again and torch.equal(random, later)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_a_checkpoint_of_the_gpu_goes_on_on_the_cpu(train, monkeypatch, tmp_path, precision):
    _, first = train("v14.4", tmp_path, 3, distill_steps=6, precision=precision)
    monkeypatch.setattr(asnn, "_select_device", lambda: (torch.device("cpu"), "asked for"))
    student, result = train("v14.4", tmp_path, distill_steps=6, precision="fp32")
    assert (first.step, result.step, result.finished) == (3, 6, True)
    assert student.device.type == "cpu" and losses(result)[:3] == losses(first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_teacher_on_the_second_gpu_changes_nothing(train, monkeypatch):
    two = losses(train("v14.4", distill_steps=6)[1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert np.allclose(two, losses(train("v14.4", distill_steps=6)[1]), rtol=1e-5)


def test_the_full_size_fits(capsys):
    recipe = asnn.get_recipe("v14.4-rates", "t4", distill_steps=3, align_steps=1, eval_windows=2)
    teacher = GPT2LMHeadModel(GPT2Config(activation_function="gelu_pytorch_tanh")).eval()
    ids = np.random.default_rng(0).integers(0, 50257, 50_000).astype(np.uint16)
    task = asnn.Task(recipe, [], None, {}, dict.fromkeys(asnn.SPLITS, ids), teacher, None, "-", {})
    torch.cuda.reset_peak_memory_stats()
    _, result = asnn.distil(task)
    peak = torch.cuda.max_memory_allocated() / 2**30
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, {recipe.name} at t4, {result.precision}, first "
              f"steps: {result.tokens_per_second:,.0f} tokens/s, peak {peak:.2f} GiB")
    assert result.finished and result.skipped == 0 and peak < 14


def test_perplexity_is_that_of_the_cpu(new):
    task = new("v14.4-sites")
    for model in (task.teacher, task.build_student()):
        expected = asnn.evaluate(model, task.tokens["validation"], 16).ppl
        for kind, bound in (("fp32", 1e-4), (HALF, 1e-2)):
            got = asnn.evaluate(model.cuda(), task.tokens["validation"], 16, precision=kind)
            assert got.ppl == pytest.approx(expected, rel=bound)


@pytest.mark.parametrize("name", ["v14.3", "v14.4-sites"])
def test_generation_is_that_of_the_cpu(new, name):
    task, found = new(name), []
    ids = torch.from_numpy(task.tokens["test"][:16].astype(np.int64)).view(2, 8)
    student = task.build_student().eval()
    for device, dtype in (("cpu", None), ("cuda", None), ("cuda", asnn.DTYPES[HALF])):
        given = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
        found.append([student.to(device, dtype).generate(
            **given, max_new_tokens=8, do_sample=False, pad_token_id=0, num_beams=beams).cpu()
            for beams in (1, 2)])
    assert all(map(torch.equal, *found[:2])) and found[2][0].shape == found[0][0].shape


def test_the_gate_is_that_of_the_cpu(new):
    task, found = new("v14.4-sites"), []
    student, loader = task.build_student(), task.loader("train", 1280)
    for device in ("cpu", "cuda"):
        validator = asnn.SpikingBrainValidator(device, max_channels=8)
        found.append(validator.validate(student.to(device), task.teacher.to(device), loader))
    cpu, card = found
    assert card.summary["verdict"] == cpu.summary["verdict"]
    for name in ("firing rate", "mutual information", "CKA", "entropy"):
        values = [[row[name] for row in result.sites.values()] for result in found]
        assert values[1] == pytest.approx(values[0], abs=0.02), name


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("name", ["linear", "gather"])
def test_products(name, n):
    rows, spikes = torch.randn(96, 40), torch.randn(n, 96).sign() * (torch.rand(n, 96) < 0.4)
    for dtype, bound in ((torch.float32, 1e-5), (asnn.DTYPES[HALF], 2e-2)):
        weights, product = asnn._weights_for(name, rows.to("cuda", dtype)), asnn.PRODUCTS[name]
        assert error(product(weights, spikes.to("cuda", dtype)), spikes @ rows) < bound
        assert not product(weights, torch.zeros_like(spikes).to("cuda", dtype)).any()


def test_timings_wait_for_the_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    (timing,) = asnn.time_interleaved({"product": lambda: x @ x}, 5).values()
    assert timing.median > 2 * 4096**3 / 1e15  # no card does so many operations a second in fp32


def test_a_sparse_copy_decodes_and_kernels_are_counted(new, capsys):
    task, ids = new("v14.4-sites"), torch.arange(6, device="cuda")[None]
    student = task.build_student().eval().cuda()
    models = {"GPT-2": task.teacher.cuda(), "student": student, "gather": asnn.sparsify(student)}
    decoders, on_card = {name: asnn.Decoder(model, ids) for name, model in models.items()}, {}
    assert error(decoders["gather"](), decoders["student"]()) < 1e-3
    for name, decode in decoders.items():
        decode()
        with torch.profiler.profile() as profile:
            decode()
            torch.cuda.synchronize()
        names = [e.name.lower() for e in profile.events() if "CUDA" in str(e.device_type)]
        on_card[name] = sum(not name.startswith(("memcpy", "memset")) for name in names)
    with capsys.disabled():
        print(f"\nCUDA kernels of a decoded token, two layers: {on_card}")
    assert all(on_card.values())


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_run(tmp_path_factory, cache, name):
    """In order: a page that needs a student takes that of one before, in the same outputs."""
    folder = tmp_path_factory.getbasetemp() / "pages"
    folder.mkdir(exist_ok=True)
    source = (ROOT / "notebooks" / f"{name}.py").read_text()
    given = {key: repr(value) for key, value in PAGES[name].items()}
    (folder / f"{name}.py").write_text(with_values(source, **given))
    known = set(folder.glob("outputs/*/*/metrics.json"))
    done = subprocess.run([sys.executable, folder / f"{name}.py"], cwd=folder, text=True, env={
        **os.environ, "ASNN_HOME": str(ROOT), "ASNN_PROFILE": "tiny", "ASNN_CACHE": str(cache),
        "ASNN_OUTPUTS": str(folder / "outputs"), "MPLBACKEND": "Agg"}, capture_output=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    (path,) = set(folder.glob("outputs/*/*/metrics.json")) - known
    assert json.loads(path.read_text())["environment"]["device"].startswith("cuda")
