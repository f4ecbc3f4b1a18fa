"""What only a GPU can show: `pytest -m gpu tests/test_gpu.py`, under eight minutes on any CUDA
card; skipped without one. What is measured there is printed: `-s` is not needed."""
import copy
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import asnn_common as asnn
from conftest import ROOT

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
RECIPES = ("v4", "v7", "v11", "v13", "v14.3", "v14.3-published", "v14.3-cumsum", "v14.4",
           "v14.4-rates", "v14.4-vector")
PAGES = {  # with the parameters that differ from what a person gets, in the order of the project
    "asnn_v14_3_distill": {}, "asnn_v14_4_transfer": {"tax_seeds": 1, "tax_steps": 2},
    "asnn_v15_spikingbrain": {"tokens": 2048, "damage_windows": 2, "remedy": True},
    "asnn_v16_sparse": {}, "asnn_v17_bench": {"device_name": "cuda"}}


@pytest.fixture
def cuda():
    device, reason = asnn._select_device()
    assert device.type == "cuda", reason
    return device


@pytest.fixture
def precision(cuda):
    """The name of this card's half precision."""
    found = asnn._select_precision(cuda)[0]
    assert found == ("bf16" if torch.cuda.get_device_capability(cuda) >= (8, 0) else "fp16")
    return found


@pytest.fixture
def half(precision):
    return asnn.DTYPES[precision]


@pytest.fixture
def train(small_task):
    """train(name, folder, max_steps, **overrides): (student, result) of a run of a small recipe,
    with matrix states of two heads."""
    def run(name="v14.3", folder=None, max_steps=None, **overrides):
        task = small_task(name, **{"head_dim": 16, **overrides})
        return asnn.distil(task, folder=folder, max_steps=max_steps)
    return run


@pytest.fixture
def on(monkeypatch):
    """on(device): what is trained from here on is trained there."""
    def choose(device):
        monkeypatch.setattr(asnn, "_select_device", lambda: (torch.device(device), "asked for"))
    return choose


@pytest.fixture
def sparse_student(small_task):
    """An untrained student with spikes before every product, and its task."""
    task = small_task("v14.4-sites", head_dim=16)
    return task.build_student().eval(), task


@pytest.fixture
def tell(capsys):
    """tell(text): prints past pytest's capture."""
    def say(text):
        with capsys.disabled():
            print(f"\n{torch.cuda.get_device_name()}: {text}", flush=True)
    return say


def error(got, expected):
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12))


def cosine(a, b):
    a, b = (x.detach().double().cpu().flatten() for x in (a, b))
    return float(F.cosine_similarity(a, b, dim=0))


def losses(result):
    return [row["loss"] for row in result.log if "loss" in row]


# ---- the parts against the CPU


@pytest.mark.parametrize("T", [1, 31, 70, 257])
@pytest.mark.parametrize("kind", ["vector", "matrix", "delta"])
def test_recurrences_and_their_gradients(cuda, half, kind, T):
    g = torch.Generator().manual_seed(0)
    shape = (2, T, 32) if kind == "vector" else (2, T, 2, 16)
    r, k, v = (torch.randn(shape, generator=g) for _ in range(3))
    w = torch.rand(shape[2:], generator=g) * 0.8 + 0.15
    inputs = [r, F.normalize(k, dim=-1), v, w]
    inputs += [torch.rand(2, T, 2, generator=g)] * (kind == "delta")
    forms = asnn.RECURRENCES if kind == "vector" else asnn.MATRIX_RECURRENCES

    def found(form, device, dtype):
        x = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs]
        with torch.autocast("cuda", half, enabled=form == "chunked" and kind == "vector"):
            out, S = forms[form](*x[:4], *[None, *x[4:]] * (kind == "delta"))
        assert S.dtype == dtype and S.device.type == torch.device(device).type
        return out, S, *torch.autograd.grad(out.square().sum() + S.sum(), x)

    expected = found("reference", "cpu", torch.float64)
    for got, true in zip(found("chunked", cuda, torch.float32), expected, strict=True):
        assert error(got, true) < 2e-4


@pytest.mark.parametrize("estimator", asnn.ESTIMATORS)
@pytest.mark.parametrize("kind", ["ternary", "binary", "integer:3"])
def test_spikes_and_their_gradients(cuda, half, estimator, kind):
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1)).to(half).float()

    def found(device, dtype):
        site, y = asnn.TernarySpike(64, kind, estimator=estimator).to(device), x.to(device, dtype)
        out, weights = site(y.requires_grad_()).float(), torch.linspace(-1, 1, 64, device=device)
        return out, *torch.autograd.grad((out * weights).sum(), (y, site.amplitude))

    expected, got = found("cpu", torch.float32), found(cuda, half)
    assert torch.equal(got[0].cpu(), expected[0])
    assert error(got[1], expected[1]) < 1e-2 and error(got[2], expected[2]) < 1e-2


@pytest.mark.parametrize("offset", [0.0, 110.0])
@pytest.mark.parametrize("tau, ce", [(1.0, 0.2), (3.0, 0.0)])
def test_the_chunked_loss_in_half_precision(cuda, half, offset, tau, ce):
    """GPT-2's logits lie near -110, where half precision is coarse."""
    g, V, D, n = torch.Generator().manual_seed(0), 50257, 64, 96
    u, W = F.normalize(torch.randn(D, generator=g), dim=0), torch.randn(V, D, generator=g) * 0.5
    W += torch.outer(2.5 - W @ u, u)  # every row has 2.5 along u, and every state -offset / 2.5
    theirs = torch.randn(n, D, generator=g)
    theirs -= torch.outer(theirs @ u + offset / 2.5, u)
    ours, labels = theirs + 0.1 * torch.randn(n, D, generator=g), torch.randint(V, (n,), generator=g)
    h, head = (x.to(cuda).requires_grad_() for x in (ours, W))
    with torch.autocast("cuda", half):
        found = asnn.distillation_loss(h, head, theirs.to(cuda), W.to(cuda), tau, labels.to(cuda),
                                       1.0, ce)
    found.loss.backward()
    x, w = (t.clone().requires_grad_() for t in (ours, W))
    z, other = x @ w.t(), theirs @ W.t()
    kl = tau**2 * F.kl_div(F.log_softmax(z / tau, -1), F.log_softmax(other / tau, -1),
                           log_target=True, reduction="batchmean")
    (kl + ce * F.cross_entropy(z, labels)).backward()
    assert float(found.kd) == pytest.approx(float(kl.detach()), rel=0.02)
    assert min(cosine(h.grad, x.grad), cosine(head.grad, w.grad)) > 0.98


def test_the_loss_stays_in_its_budget(cuda, half):
    h, w = torch.randn(4096, 768, device=cuda), torch.randn(50257, 768, device=cuda)
    labels = torch.zeros(4096, dtype=torch.long, device=cuda)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", half), torch.no_grad():
        asnn.distillation_loss(h, w, h, w, 2.0, labels, 1.0, 0.2)
    heads = 2 * 2 * w.numel()  # both in half precision, beside the logits
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.1 * asnn.LOGIT_BUDGET["cuda"] + 1.5 * heads


def test_muon_orthogonalises_in_this_cards_half(cuda, half):
    matrix = torch.randn(96, 384, generator=torch.Generator().manual_seed(0))
    for m in (matrix, matrix.t()):
        got = asnn._orthogonalise(m.to(cuda), dtype=half).float().cpu()
        values = torch.linalg.svdvals(got)
        assert 0.5 < values.min() and values.max() < 1.5
        assert cosine(got, asnn._orthogonalise(m)) > 0.99


# ---- training


@pytest.mark.parametrize("name", RECIPES)
def test_three_steps_of_every_kind_of_recipe(cuda, precision, train, name):
    aligned = min(1, asnn.RECIPES[name].align_steps)
    teacher = {"v4": "untrained-goose"}.get(name, "train")
    student, result = train(name, distill_steps=3, align_steps=aligned, precision="auto",
                            teacher=teacher, fdd_start=1)
    assert (result.finished, result.skipped, result.precision) == (True, 0, precision)
    assert student.device.type == "cuda" and np.isfinite(losses(result)).all()


@pytest.mark.parametrize("name", ["v14.3", "v14.4-rates"])
def test_a_run_in_fp32_is_that_of_the_cpu(cuda, train, on, monkeypatch, name):
    # Muon iterates in what a device is fast at; here in the same on both.
    monkeypatch.setattr(asnn, "_select_precision", lambda *_: ("fp32", "asked for"))
    curves = []
    for device in (cuda, "cpu"):
        on(device)
        student, result = train(name, distill_steps=10)
        assert student.device.type == torch.device(device).type
        curves.append(losses(result))
    assert len(curves[0]) == 10 and np.allclose(*curves, rtol=2e-3)


@pytest.mark.parametrize("name", ["v14.3", "v14.4-rates"])
def test_half_precision_learns(cuda, train, name):
    results = [train(name, distill_steps=40, patience=40, precision=p)[1] for p in ("fp32", "auto")]
    ends = [np.mean([row["kd"] for row in result.log if "kd" in row][-8:]) for result in results]
    assert all(result.finished and result.skipped == 0 for result in results)
    assert ends[1] < 1.3 * ends[0] + 0.02


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_overflows_skips_the_step(cuda, small_task, optimizer):
    """The GradScaler leaves it out and halves its scale: nothing moves."""
    task = small_task("v14.4", head_dim=16, optimizer=optimizer, align_steps=0, distill_steps=3,
                      kd_weight=4e9, precision="fp16")
    before = task.build_student().state_dict()
    student, result = asnn.distil(task)
    assert (result.step, result.skipped, losses(result)) == (3, 0, [])
    assert all(torch.equal(value.cpu(), before[k]) for k, value in student.state_dict().items())


def test_the_gradient_is_unscaled_before_it_is_clipped(cuda, train):
    norms = []
    for precision in ("fp32", "fp16"):  # at this rate nothing moves: both see the same gradients
        _, result = train("v14.3", distill_steps=4, lr=1e-12, precision=precision)
        norms.append({row["step"]: row["grad_norm"] for row in result.log if "grad_norm" in row})
    both = sorted(set(norms[0]) & set(norms[1]))
    assert len(both) >= 2
    assert all(norms[1][step] == pytest.approx(norms[0][step], rel=0.05) for step in both)


def test_resuming_is_exact(cuda, train, tmp_path):
    ends = []
    for folder, stops in (("whole", [None]), ("parts", [5, None])):
        for stop in stops:
            student, result = train("v14.4-rates", tmp_path / folder, stop, precision="auto")
        ends.append((student.state_dict(), losses(result), torch.rand(3, device=cuda).cpu()))
    (whole, curve, random), (parts, again, later) = ends
    assert result.finished and curve == again and torch.equal(random, later)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_checkpoint_of_the_gpu_goes_on_on_the_cpu(cuda, train, on, tmp_path):
    _, first = train("v14.4", tmp_path, 3, distill_steps=6, precision="auto")
    on("cpu")
    student, result = train("v14.4", tmp_path, distill_steps=6, precision="fp32")
    assert (first.step, result.step, result.finished) == (3, 6, True)
    assert student.device.type == "cpu" and losses(result)[:3] == losses(first)


def test_a_teacher_on_the_second_gpu_changes_nothing(cuda, train, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    two = losses(train("v14.4", distill_steps=6)[1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert np.allclose(two, losses(train("v14.4", distill_steps=6)[1]), rtol=1e-5)


def test_the_full_size_fits(cuda, tell):
    recipe = asnn.get_recipe("v14.4-rates", "t4", distill_steps=3, align_steps=1, eval_windows=2)
    teacher = GPT2LMHeadModel(GPT2Config(activation_function="gelu_pytorch_tanh")).eval()
    ids = np.random.default_rng(0).integers(0, 50257, 50_000).astype(np.uint16)
    task = asnn.Task(recipe, [], None, {}, dict.fromkeys(asnn.SPLITS, ids), teacher, None,
                     "gpt2 with random weights", {})
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    _, result = asnn.distil(task)
    peak = torch.cuda.max_memory_allocated() / 2**30
    tell(f"v14.4-rates at t4, {result.precision}: {result.tokens_per_second:,.0f} tokens/s with "
         f"the first steps, peak {peak:.2f} GiB")
    assert result.finished and result.skipped == 0 and peak < 14


# ---- evaluation, generation, SpikingBrain


def test_perplexity_is_that_of_the_cpu(cuda, precision, sparse_student):
    student, task = sparse_student
    for model in (task.teacher, student):
        expected = asnn.evaluate(model, task.tokens["validation"], 16).ppl
        for kind, bound in (("fp32", 1e-4), (precision, 1e-2)):
            got = asnn.evaluate(model.to(cuda), task.tokens["validation"], 16, precision=kind)
            assert got.ppl == pytest.approx(expected, rel=bound)


@pytest.mark.parametrize("name", ["v14.3", "v14.4-sites"])
def test_generation_is_that_of_the_cpu(cuda, half, small_task, name):
    task = small_task(name, head_dim=16)
    student = task.build_student().eval()
    ids = torch.from_numpy(task.tokens["test"][:16].astype(np.int64)).view(2, 8)

    def generate(**more):
        return student.generate(ids.to(student.device), max_new_tokens=8, pad_token_id=0,
                                attention_mask=torch.ones_like(ids).to(student.device),
                                do_sample=False, **more).cpu()

    expected = generate(), generate(num_beams=2)
    student.to(cuda)
    assert torch.equal(generate(), expected[0]) and torch.equal(generate(num_beams=2), expected[1])
    student.to(half)
    assert generate().shape == expected[0].shape


def test_the_gate_is_that_of_the_cpu(cuda, sparse_student):
    (student, task), found = sparse_student, []
    loader = task.loader("train", 1280)
    for device in ("cpu", cuda):
        validator = asnn.SpikingBrainValidator(device, max_channels=8)
        found.append(validator.validate(student.to(device), task.teacher.to(device), loader))
    cpu, card = found
    assert card.summary["verdict"] == cpu.summary["verdict"] and card.sites.keys() == cpu.sites.keys()
    for site, row in cpu.sites.items():
        for name in ("firing rate", "mutual information", "CKA", "entropy"):
            assert card.sites[site][name] == pytest.approx(row[name], abs=0.02), (site, name)


# ---- sparse, speed


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("name", ["linear", "gather"])
def test_products(cuda, half, name, n):
    rows = torch.randn(96, 40)
    spikes = torch.randn(n, 96).sign() * (torch.rand(n, 96) < 0.4)
    for dtype, bound in ((torch.float32, 1e-5), (half, 2e-2)):
        weights = asnn._weights_for(name, rows.to(cuda, dtype))
        got = asnn.PRODUCTS[name](weights, spikes.to(cuda, dtype))
        assert got.is_cuda and error(got, spikes.double() @ rows.double()) < bound
        assert not asnn.PRODUCTS[name](weights, torch.zeros_like(spikes).to(cuda, dtype)).any()


def test_a_sparse_copy_decodes(cuda, sparse_student):
    student, ids = sparse_student[0].to(cuda), torch.arange(6, device=cuda)[None]
    sparse = asnn.sparsify(student, "gather")
    dense, sparse = asnn.Decoder(student, ids), asnn.Decoder(sparse, ids)
    assert all(error(sparse(), dense()) < 1e-3 for _ in range(3))


def test_timings_wait_for_the_gpu(cuda):
    x = torch.randn(4096, 4096, device=cuda)
    x @ x
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(8):
        x @ x
    torch.cuda.synchronize()
    waited = time.perf_counter() - begin
    seconds = asnn.time_interleaved({n: lambda n=n: [x @ x for _ in range(n)] for n in (1, 8)}, 5)
    assert seconds[8].median > 3 * seconds[1].median and seconds[8].median > 0.3 * waited


def test_kernels_of_a_decoded_token(cuda, sparse_student, tell):
    student, task = sparse_student
    models = {"GPT-2": task.teacher, "the student": student, "its copy with gather": asnn.sparsify(
        copy.deepcopy(student).to(cuda), "gather")}
    for name, model in models.items():
        decode = asnn.Decoder(model.to(cuda), torch.arange(6, device=cuda)[None])
        decode()
        activities = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
            decode()
            torch.cuda.synchronize()
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [e for e in events if not e.name.lower().startswith(("memcpy", "memset"))]
        tell(f"{len(kernels)} kernels a token and 2 layers of {name}, and "
             f"{len(events) - len(kernels)} copies")
        assert kernels


# ---- the pages


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_run(cuda, tmp_path_factory, cache, name):
    """In order: what needs a student takes that of the page before, whose outputs it shares."""
    folder = tmp_path_factory.getbasetemp() / "pages"
    folder.mkdir(exist_ok=True)
    source = (ROOT / "notebooks" / f"{name}.py").read_text(encoding="utf-8")
    for key, value in PAGES[name].items():
        source, found = re.subn(rf"(?m)^{key} = [^#\n]*", f"{key} = {value!r}  ", source, count=1)
        assert found, key
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    known = set(folder.glob("outputs/*/*/metrics.json"))
    done = subprocess.run([sys.executable, folder / f"{name}.py"], cwd=folder, text=True, env={
        **os.environ, "ASNN_HOME": str(ROOT), "ASNN_PROFILE": "tiny", "ASNN_CACHE": str(cache),
        "ASNN_OUTPUTS": str(folder / "outputs"), "MPLBACKEND": "Agg"}, capture_output=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    (path,) = set(folder.glob("outputs/*/*/metrics.json")) - known
    assert json.loads(path.read_text())["environment"]["device"].startswith("cuda")
