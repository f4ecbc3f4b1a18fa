"""Losses: distillation in chunks, temperature, CKA, feature dynamics, firing rates, alignment of
spikes, and what may switch them off."""
import collections
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import asnn_common as asnn
from test_training import hooks

V, D, D_TEACHER, N = 71, 12, 9, 13
ROW = 4 * asnn.LOGIT_COPIES * V  # bytes that hold one row of a chunk


def plain_kl(hidden, head, teacher_hidden, teacher_head, tau):
    """The formula on full logits: batchmean over tokens, times tau^2."""
    student = F.log_softmax(hidden @ head.t() / tau, -1)
    teacher = F.log_softmax(teacher_hidden @ teacher_head.t() / tau, -1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * tau**2


@pytest.fixture
def case():
    """hidden, head, teacher_hidden, teacher_head, tau, labels; two labels are ignored."""
    labels = torch.randint(0, V, (N,))
    labels[[2, 7]] = -100
    return (torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True),
            torch.randn(N, D_TEACHER), torch.randn(V, D_TEACHER),
            torch.tensor(1.7, requires_grad=True), labels)


def gradients(loss, *inputs):
    return torch.autograd.grad(3.0 * loss, inputs)  # the factor stands for a loss scale


@pytest.mark.parametrize("kd_weight, ce_weight", [(1.0, 0.0), (0.9, 0.1), (0.0, 1.0)])
@pytest.mark.parametrize("budget", [1, ROW, 5 * ROW, N * ROW, None],
                         ids=["less", "one row", "5 rows", "all", "default"])
def test_the_loss_is_the_plain_formula_with_its_gradients(case, budget, kd_weight, ce_weight):
    hidden, head, *_, tau, labels = case
    ce = F.cross_entropy(hidden @ head.t(), labels)
    expected = kd_weight * plain_kl(*case[:5]) + ce_weight * ce
    batched = hidden.view(1, N, D), head, case[2].view(1, N, -1), case[3], tau, labels.view(1, N)
    got = asnn.distillation_loss(*batched, kd_weight, ce_weight, budget=budget)
    torch.testing.assert_close(got.loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.ce, ce, rtol=1e-5, atol=1e-5)
    inputs = (hidden, head, tau) if kd_weight else (hidden, head)
    for mine, true in zip(gradients(got.loss, *inputs), gradients(expected, *inputs)):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)
    unasked = asnn.distillation_loss(*case, kd_weight, ce_weight, False, budget)
    assert torch.equal(unasked.loss, got.loss) and bool(unasked.ce) == bool(ce_weight)


def test_a_batch_of_ignored_labels_has_no_loss_and_other_vocabularies_are_refused(case):
    hidden, head, teacher_hidden, teacher_head, *_, labels = case
    loss = asnn.distillation_loss(hidden, head, labels=labels.fill_(-100), ce_weight=1.0).loss
    assert float(loss.detach()) == 0.0 and not torch.autograd.grad(loss, hidden)[0].any()
    with pytest.raises(ValueError, match=f"vocabulary is {V - 1} and the student's {V}; they must"):
        asnn.distillation_loss(hidden, head, teacher_hidden, teacher_head[:-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_stay_close(case, dtype):
    hidden, head, *_, tau, labels = case
    expected = plain_kl(*case[:5]) + 0.1 * F.cross_entropy(hidden @ head.t(), labels)
    with torch.autocast("cpu", dtype=dtype):
        got = asnn.distillation_loss(*case, 1.0, 0.1, budget=3 * ROW)
    torch.testing.assert_close(got.loss, expected, rtol=2e-2, atol=2e-2)
    inputs = (hidden, head, tau)
    for mine, true in zip(gradients(got.loss, *inputs), gradients(expected, *inputs)):
        assert mine.dtype == true.dtype
        assert float((mine - true).norm() / true.norm()) < 3e-2


@pytest.mark.parametrize("tau, ce_weight", [(1.0, 0.2), (3.0, 0.0)])
def test_logits_far_from_zero_lose_nothing_in_half_precision(tau, ce_weight):
    # GPT-2's lie near -110, where bf16 has steps of a half.
    vocab, width, n = 5000, 64, 96
    common, head = F.normalize(torch.randn(width), dim=0), 0.5 * torch.randn(vocab, width)
    head += torch.outer(2.5 - head @ common, common)
    theirs = torch.randn(n, width)
    theirs -= torch.outer(theirs @ common + 110 / 2.5, common)
    hidden, labels = theirs + 0.1 * torch.randn(n, width), torch.randint(0, vocab, (n,))
    assert -120 < float((theirs @ head.t()).mean()) < -100
    found = []
    for enabled in (False, True):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = asnn.distillation_loss(h, w, theirs, head, tau, labels, 1.0, ce_weight)
            nll = asnn._nll(hidden, head, labels)
        found.append((float(loss.kd), float(nll.mean()), *torch.autograd.grad(loss.loss, (h, w))))
    exact, half = found
    assert half[0] == pytest.approx(exact[0], rel=0.02)
    assert half[1] == pytest.approx(exact[1], rel=1e-3)
    for mine, true in zip(half[2:], exact[2:]):
        assert F.cosine_similarity(mine.flatten(), true.flatten(), 0) > 0.98


class Operations(TorchDispatchMode):
    """Counts what is called on tensors of the shape (rows, V)."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.counts = vocab_size, collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor) and args[0].shape[-1:] == (self.vocab_size,):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_chunks_are_large_at_a_real_vocabulary_and_one_softmax_serves_both_losses():
    vocab, n = 50257, 2 * asnn.LOGIT_ROWS
    head = torch.randn(vocab, 2)
    data = torch.randn(n, 2, requires_grad=True), head, torch.randn(n, 2), head
    counts = {}
    for tau in (1.0, 2.0):
        with Operations(vocab) as seen:
            asnn.distillation_loss(*data, tau, torch.zeros(n, dtype=torch.long), 1.0, 0.2)
        counts[tau] = [seen.counts[name] for name in ("_log_softmax", "div", "div_")]
    assert counts == {1.0: [4, 0, 0], 2.0: [6, 2, 2]}  # of two chunks, the teacher's included


def test_head_gradient_of_fp16_does_not_overflow():
    # Many equal tokens of which the student is sure: the largest sum over rows that there can be.
    head, teacher_head = torch.randn(50, 16), torch.randn(50, 16)
    hidden = (8.0 * head[7] / head[7].norm()).expand(512, 16).clone()
    grads = {}
    for dtype in (torch.float32, torch.float16):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = asnn.distillation_loss(h, w, -hidden, teacher_head, 5.0, budget=10**9).loss
        grads[dtype] = torch.autograd.grad(loss, (h, w))
    for exact, half in zip(grads[torch.float32], grads[torch.float16]):
        assert half.isfinite().all() and (half - exact).norm() < 0.01 * exact.norm()


class LogitMemory(TorchDispatchMode):
    """The largest logit-shaped tensor, (rows, V), and the most bytes that such tensors held at one
    time; the transposed heads, whose storages are given, are not among them."""

    def __init__(self, vocab_size, *heads):
        super().__init__()
        self.vocab_size, self.rows, self.peak, self.alive = vocab_size, 0, 0, {}
        self.heads = {head.untyped_storage()._cdata for head in heads}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocab_size,):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.heads:
                    self.rows = max(self.rows, tensor.numel() // self.vocab_size)
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def test_logits_stay_within_the_budget_and_are_never_there_for_all_tokens():
    vocab, n, rows = 50257, 256, 32
    hidden, head = torch.randn(n, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    theirs = torch.randn(n, 4), torch.randn(vocab, 4)
    tau, labels = torch.tensor(2.0, requires_grad=True), torch.randint(0, vocab, (n,))
    budget = rows * 4 * asnn.LOGIT_COPIES * vocab
    with LogitMemory(vocab, head, theirs[1]) as chunked:
        asnn.distillation_loss(hidden, head, *theirs, tau, labels, 1.0, 0.1,
                               budget=budget).loss.backward()
    assert 0 < chunked.rows <= rows and budget / 4 < chunked.peak <= 1.05 * budget
    # The same measurement says no to the plain formula.
    with LogitMemory(vocab, head, theirs[1]) as plain:
        plain_kl(hidden, head, *theirs, tau).backward()
    assert plain.rows >= n and plain.peak > 2 * budget


def test_a_temperature_starts_right_and_stays_bounded():
    learned = asnn.Temperature("bounded", tau=2.0, tau_min=1.0, tau_max=5.0)
    assert float(learned().detach()) == pytest.approx(2.0, abs=1e-5)
    for logit in (-100.0, -3.0, 0.0, 100.0):
        learned.logit.data.fill_(logit)
        assert float(learned().detach()) == pytest.approx(1 + 4 / (1 + math.exp(-logit)), rel=1e-5)
    with pytest.raises(ValueError, match="tau is 5.0; allowed: between 1.0 and 5.0, exclusive"):
        asnn.Temperature("bounded", tau=5.0)
    fixed, staged = asnn.Temperature("fixed", tau=3.0), asnn.Temperature("staged")
    assert float(fixed(0.5)) == 3.0 and not [*fixed.parameters(), *staged.parameters()]
    assert [float(staged(i / 100)) for i in (0, 33, 34, 66, 67, 100)] == [1, 1, 1.5, 1.5, 2, 2]


def test_lambda_rises_over_the_warm_up_and_is_the_strength_of_the_reversal():
    temperature = asnn.Temperature("bounded", lambda_warmup_ratio=0.4)
    shares = [temperature.strength(progress) for progress in (0.0, 0.1, 0.2, 0.4, 1.0)]
    assert shares == pytest.approx([0.0, 0.25, 0.5, 1.0, 1.0])
    slopes = [float(torch.autograd.grad(temperature(progress), temperature.logit)[0])
              for progress in (0.0, 0.2, 1.0)]
    assert slopes[0] == 0.0 and slopes[1] == pytest.approx(0.5 * slopes[2]) and slopes[2] < 0
    assert asnn.Temperature(lambda_warmup_ratio=0.0).strength(0.0) == 1.0


@pytest.mark.parametrize("reversal", [True, False])
def test_gradient_reversal_makes_the_temperature_raise_the_loss(case, reversal):
    temperature = asnn.Temperature("bounded", gradient_reversal=reversal)
    before = asnn.distillation_loss(*case[:4], temperature(1.0)).loss
    before.backward()
    torch.optim.SGD(temperature.parameters(), lr=0.1).step()
    change = float((asnn.distillation_loss(*case[:4], temperature(1.0)).loss - before).detach())
    assert abs(change) > 1e-4 and (change > 0) == reversal


def textbook_hsic(x, y):
    """Song et al., eq. 5, from the kernel matrices."""
    n = len(x)
    k, l = (z @ z.t() * (1 - torch.eye(n)) for z in (x, y))  # noqa: E741
    one = torch.ones(n)
    sums = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (torch.trace(k @ l) + sums - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


@pytest.mark.parametrize("n", [4, 5, 11])
def test_unbiased_hsic_is_the_textbook_formula(n):
    x, y = torch.randn(n, 3) + 2.0, torch.randn(n, 6)
    torch.testing.assert_close(asnn._unbiased_hsic(x, y), textbook_hsic(x, y), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"x and y is \(3, 3\); allowed: equal, at least 4"):
        asnn._unbiased_hsic(x[:3], y[:3])


def test_unbiased_cka_of_noise_is_zero_where_the_biased_one_is_not():
    n, d = 48, 144
    pairs = [(torch.randn(n, d), torch.randn(n, d)) for _ in range(30)]
    unbiased, biased = (float(torch.stack([asnn._linear_cka(x, y, kind) for x, y in pairs]).mean())
                        for kind in (True, False))
    assert abs(unbiased) < 0.03 and biased == pytest.approx(d / (n + d), abs=0.03)


@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_sees_neither_rotation_scale_nor_shift_and_stays_finite_in_fp16(unbiased):
    x = torch.randn(1000, 8) * torch.linspace(0.5, 2.0, 8)
    y = 20 * (x[:, 5:] + torch.randn(1000, 3))
    turned = 3 * x @ torch.linalg.qr(torch.randn(8, 8)).Q + 5.0
    assert float(asnn._linear_cka(x, turned, unbiased)) == pytest.approx(1.0, abs=1e-4)
    expected = float(asnn._linear_cka(x, y, unbiased))
    assert 0.05 < expected < 0.95
    assert float(asnn._linear_cka(turned, y, unbiased)) == pytest.approx(expected, abs=1e-4)
    wide = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        value = asnn._linear_cka(wide, y, unbiased)
    value.backward()
    assert float(value.detach()) == pytest.approx(expected, abs=1e-6)
    assert wide.grad.isfinite().all()


def test_fdd_compares_what_the_layers_add_without_position_0():
    student, teacher = (torch.randn(2, 12, 6, requires_grad=True) for _ in range(2))
    rotated = student @ torch.linalg.qr(torch.randn(6, 6)).Q

    def block(change):
        before = torch.randn(2, 12, 6)
        return before, before + change

    def fdd(*pairs):
        return asnn._fdd_loss(*zip(*[(block(s), block(t)) for s, t in pairs]))

    loss = fdd((student, teacher))
    apart = float(loss.detach())
    assert apart > 0.5 and torch.autograd.grad(loss, student)[0][:, 1:].abs().sum() > 0
    assert float(fdd((student, rotated)).detach()) == pytest.approx(0.0, abs=1e-4)
    outlier = teacher + F.one_hot(torch.tensor(0), 12).view(1, 12, 1) * 1e3
    assert float(fdd((student, outlier)).detach()) == pytest.approx(apart, abs=1e-4)
    both = fdd((student, student), (student, teacher))
    assert float(both.detach()) == pytest.approx(apart / 2, abs=1e-4)


@pytest.fixture
def batch(tokens):
    rows = torch.from_numpy(tokens["train"][:4 * 16 + 1].astype("int64"))
    return rows[:-1].view(4, 16), rows[1:].view(4, 16)


def loss_of(objective, batch, step=0):
    """(loss, its terms) of a batch, with gradients left in the parameters."""
    loss, terms = objective.train()(*batch, step=step)
    loss.backward()
    return float(loss.detach()), {name: float(value.detach()) for name, value in terms.items()}


def test_hidden_alignment_is_part_of_the_loss_and_trains_its_projections(distiller, batch):
    objective = distiller("v7", hidden_weight=0.5)
    with asnn._capture_blocks(objective.student, (0, 1)) as ours, \
            asnn._capture_blocks(objective.teacher, (0, 1)) as theirs:
        loss, terms = loss_of(objective, batch)
    errors = [(objective.projections[str(s)](ours[s][1]) - theirs[t][1]).square().mean()
              for s, t in objective.recipe.layer_map]
    assert terms["hidden"] == pytest.approx(float(sum(errors).detach()) / len(errors), rel=1e-5)
    assert loss == pytest.approx(terms["kd"] + 0.5 * terms["hidden"], rel=1e-5)
    assert all(p.weight.grad.abs().sum() > 0 for p in objective.projections.values())


def test_variance_penalty_is_part_of_the_loss_and_pulls_channels_together(distiller, batch):
    objective = distiller("v11", variance_penalty=100.0)
    modules = list(asnn.spike_modules(objective.student).values())
    shaken = [torch.nn.init.uniform_(p, 0.5, 1.5) for m in modules for p in (m.alpha, m.amplitude)]
    loss, terms = loss_of(objective, batch)
    spread = float(sum(p.detach().var() for p in shaken)) / len(modules)
    assert terms["variance"] == pytest.approx(spread, rel=1e-5)
    assert loss == pytest.approx(terms["kd"] + 100 * spread, rel=1e-4)
    # Under the identity estimator nothing else gives alpha a gradient.
    assert torch.equal(shaken[0].grad > 0, shaken[0] > shaken[0].mean())


def test_fdd_joins_the_loss_at_its_step_until_the_kill_switch_which_is_saved(distiller, batch):
    objective = distiller(fdd_start=2, fdd_weight=0.5)
    assert "fdd" not in loss_of(objective, batch, 1)[1]
    loss, terms = loss_of(objective, batch, 2)
    assert terms["fdd"] > 0 and loss == pytest.approx(terms["kd"] + 0.5 * terms["fdd"], rel=1e-4)
    objective.on_evaluation(1, 100.0)
    objective.on_evaluation(1, 150.0)  # FDD was not active: not its fault
    for ppl in (90.0, 98.0):
        objective.on_evaluation(2, ppl)
    assert objective.fdd_active(2)
    objective.on_evaluation(3, 99.5)  # 10 % above the best one, 90
    objective.on_evaluation(4, 50.0)
    assert not objective.fdd_active(4), "for good"
    assert "fdd" not in loss_of(objective, batch, 4)[1]
    saved = objective.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    assert not any("teacher" in name or "lm_head" in name for name in saved)
    again = distiller(fdd_start=2, fdd_weight=0.5)
    again.load_state_dict(saved, strict=False)
    assert not again.fdd_active(4) and float(again.best_ppl) == 50.0


@pytest.mark.parametrize("pair", [(2, 0), (0, 2), (-1, 0)])
def test_a_layer_map_out_of_range_is_refused(student, teacher, small_recipe, pair):
    message = f"layer_map is {pair}; allowed: student layers 0 to 1, teacher layers 0 to 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        asnn.Distiller(student, teacher, small_recipe("v7", layer_map=(pair,)))


def test_captured_blocks_are_the_residual_stream(student, batch):
    with asnn._capture_blocks(student, (0, 1)) as captured:
        out = student(batch[0], output_hidden_states=True, use_cache=False)
    assert torch.equal(captured[0][0], out.hidden_states[0])
    assert torch.equal(captured[0][1], captured[1][0])
    assert torch.equal(student.goose.ln_f(captured[1][1]), out.hidden_states[-1])
    with pytest.raises(IndexError), asnn._capture_blocks(student, (0, 9)):
        pass
    assert hooks(student) == 0


def test_spike_hooks_see_and_replace_spikes_and_go_with_the_block(student, batch):
    seen, rates, plain = {}, {}, student(batch[0]).logits

    def look(name, spikes):
        seen[name], rates[name] = set(spikes.unique().tolist()), float(spikes.abs().mean())

    with asnn.spike_hooks(student, look):
        assert torch.equal(student(batch[0]).logits, plain)
    assert seen == dict.fromkeys(("0.k", "0.v", "1.k", "1.v"), {-1.0, 0.0, 1.0})
    assert asnn.firing_rates(student, batch[0]) == pytest.approx(rates, rel=1e-6)
    with pytest.raises(RuntimeError, match="inside"), \
            asnn.spike_hooks(student, lambda name, spikes: 0 * spikes, ["1.v"]):
        assert not torch.equal(student(batch[0]).logits, plain)
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="spike site is '2.k'; allowed: 0.k, 0.v, 1.k, 1.v"), \
            asnn.spike_hooks(student, look, ["2.k"]):
        pass
    assert torch.equal(student(batch[0]).logits, plain) and hooks(student) == 0


@pytest.mark.parametrize("trains", [1, 2])
@pytest.mark.parametrize("step", [0, 5])
def test_firing_rates_outside_their_band_are_part_of_the_loss(distiller, batch, monkeypatch, step,
                                                              trains):
    """In the alignment and after it, with the counted rates; every threshold learns."""
    monkeypatch.setattr(asnn, "RATE_BAND", (0.3, 0.5))
    more = {"align_steps": 3, "spike_steps": trains}
    objective, seen = distiller("v14.4-rates", rate_weight=2.0, **more), {}
    plain, _ = loss_of(distiller("v14.4-sites", **more), batch, step)
    with asnn.spike_hooks(objective.student, lambda name, spikes: seen.update({name: spikes})):
        loss, terms = loss_of(objective, batch, step)
    expected = []
    for spikes in seen.values():
        rate = (spikes != 0).float().mean((0, 1))
        outside = [((r - 0.5).clamp_min(0) + (0.3 - r).clamp_min(0)) ** 2
                   for r in (rate, rate.mean())]
        expected.append(float(outside[0].mean() + outside[1]))
    assert len(expected) == 2 * 9 * trains and sum(expected) > 0
    assert terms["rate"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert loss == pytest.approx(plain + 2 * terms["rate"], rel=1e-5)
    modules = asnn.spike_modules(objective.student).values()
    learning = [p for m in modules for n, p in m.named_parameters() if n.endswith("alpha")]
    assert len(learning) == 2 * 9 * trains and all(p.grad.abs().max() > 0 for p in learning)


@pytest.fixture
def encode(cache, monkeypatch):
    """SpikeEncoder's arithmetic by the C++ kernel; a machine without a compiler has none."""
    monkeypatch.setenv("ASNN_CACHE", str(cache))
    problem = asnn._load_kernel()
    if problem:
        pytest.skip(problem)
    return asnn._encode_fast


@pytest.mark.parametrize("rotated", [(), ("mix_out", "ffn_in")])
@pytest.mark.parametrize("trains", [1, 2])
def test_the_kernel_of_encoders_changes_no_loss_rate_or_gradient(distiller, batch, monkeypatch,
                                                                encode, trains, rotated):
    """With a reflected threshold; in the alignment and after it; gone when the watch is closed."""
    monkeypatch.setattr(asnn, "RATE_BAND", (0.3, 0.5))
    more = {"spike_steps": trains, "rotated_sites": rotated, "align_steps": 3}
    plain = distiller("v14.4-rates", **more)
    fast = distiller("v14.4-rates", encode=encode, **more)
    fast.student.load_state_dict(plain.student.state_dict())
    for objective in (plain, fast):
        objective.student.goose.blocks[0].ffn.ffn_hidden.alpha.data[3] *= -1
    for step in (0, 5):
        (loss, terms), (again, others) = (loss_of(o, batch, step) for o in (plain, fast))
        assert again == pytest.approx(loss, rel=1e-6)
        assert others == pytest.approx(terms, rel=1e-5)
        for (name, p), q in zip(plain.named_parameters(), fast.parameters()):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=name)
    encoder = fast.student.goose.blocks[0].ffn.ffn_hidden
    assert encoder.fast is not None and encoder.eval().fast is not None
    fast.close()
    assert encoder.fast is None


@pytest.mark.parametrize("fields", [{"estimator": "trust"}, {"encoder_kind": "integer:3"}])
def test_what_the_kernel_cannot_do_is_left_to_the_reference(distiller, encode, fields):
    objective = distiller("v14.4-rates", encode=encode, **fields)
    assert all(m.fast is None for m in objective.student.modules()
               if isinstance(m, asnn.SpikeEncoder))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernel_of_encoders_against_the_reference(encode, threads):
    """Any number of tokens and channels, threads, a token without input, one that is not finite."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n, C in ((1, 1), (2, 5), (7, 33)):
            site = asnn.SpikeEncoder(C, steps=2).train()
            x = torch.randn(n, 1, C)
            site.calibrate(x)
            x[0] = 0
            heights = (site.alpha, site.amplitude, site.residual_alpha, site.residual_height)
            found = []
            for fast in (None, lambda *given: encode(*given, *heights)[0]):
                site.fast, y = fast, x.clone().requires_grad_()
                out = site(y)
                found.append([out, *torch.autograd.grad(
                    (out * torch.linspace(-1, 1, C)).sum(), (y, site.centre, *heights))])
            assert torch.equal(found[0][0], found[1][0])
            torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-4, atol=1e-6)
        assert not site(torch.full((1, 1, C), torch.nan)).isfinite().any()
    finally:
        torch.set_num_threads(before)


def test_the_dense_twin_teaches_the_outputs_of_its_layers(distiller, batch, student):
    """After the alignment, as errors over variances; without a twin the weight is refused."""
    plain = loss_of(distiller("v14.4-rates", align_steps=3), batch, 5)[0]
    twin = distiller("v14.4-rates", align_steps=3, spike_kind="dense").student
    objective = distiller("v14.4-rates", align_steps=3, twin_weight=0.5, twin=twin)
    with asnn._capture_blocks(objective.student, (0, 1)) as ours, \
            asnn._capture_blocks(twin.eval(), (0, 1)) as goals:
        loss, terms = loss_of(objective, batch, 5)
    errors = [((ours[i][1] - goals[i][1]).square().mean((0, 1)) / goals[i][1].var((0, 1))).mean()
              for i in (0, 1)]
    assert terms["twin"] == pytest.approx(float(sum(errors).detach()) / 2, rel=1e-4)
    assert terms["twin"] > 0 and loss == pytest.approx(plain + 0.5 * terms["twin"], rel=1e-4)
    assert "twin" not in loss_of(objective, batch, 2)[1]
    assert not any("twin" in name for name in objective.state_dict())
    with pytest.raises(ValueError, match="twin_weight is 0.5; allowed: 0 where no trained dense"):
        distiller("v14.4-rates", twin_weight=0.5)


def test_a_blend_ends_at_the_spikes_alone(distiller, batch):
    objective = distiller("v14.4-rates", align_steps=3, blend_ratio=0.5, distill_steps=13)
    encoders = [m for m in objective.student.modules() if isinstance(m, asnn.SpikeEncoder)]
    for step, share in ((3, 0.0), (4, 0.2), (8, 1.0), (12, 1.0)):
        loss_of(objective, batch, step)
        assert [m.blend for m in encoders] == pytest.approx([share] * 14)


def test_spike_alignment_is_the_distance_from_the_teachers_own_ternary_code(distiller, batch):
    objective, seen = distiller("v14.3", spike_align_weight=0.5, fdd="none"), {}
    with asnn.spike_hooks(objective.student, lambda name, spikes: seen.update({name: spikes})), \
            asnn._capture_blocks(objective.teacher, (0, 1)) as blocks:
        loss, terms = loss_of(objective, batch)
    errors = []
    for name, spikes in seen.items():
        states = blocks[int(name[0])][1][:, 1:].flatten(0, 1)  # a span is one layer here
        states = (states - states.mean(0)) / states.std(0)
        target = states.sign() * (states.abs() > 0.77 * states.abs().mean(-1, keepdim=True))
        errors.append(float((spikes.detach()[:, 1:].flatten(0, 1) - target).square().mean()))
    assert terms["spike alignment"] == pytest.approx(sum(errors) / 4, rel=1e-4)
    assert loss == pytest.approx(terms["kd"] + 0.5 * terms["spike alignment"], rel=1e-5)
    objective.close()
    assert hooks(objective.student) == 0 and "spike alignment" not in objective.eval()(*batch)[1]


@pytest.mark.parametrize("width", [6, 8, 24])
def test_targets_of_another_width_are_the_same_ternary_code_of_the_states(width):
    states = torch.randn(3, 50, 8) * torch.linspace(0.1, 9, 8) + 4
    near = states + 0.05 * torch.randn_like(states) * states.std((0, 1))
    code, again, close, other = (asnn._ternary_targets(x, width) for x in (
        states, states, near, states.flip(1)))
    assert code.shape == (3, 50, width) and set(code.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert 0.4 < code.abs().mean() < 0.7 and torch.equal(code, again)
    assert (code - close).abs().mean() < 0.2 * (code - other).abs().mean()


def test_held_rates_are_for_spikes_and_refuse_checkpointing_that_cuts_gradients(distiller, batch):
    twin = distiller("v14.4-rates", spike_align_weight=1.0, spike_kind="dense")
    assert not {"rate", "spike alignment"} & loss_of(twin, batch)[1].keys()
    objective = distiller("v14.4-rates").train()
    objective.student.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant is True; allowed: .*'use_reentrant': Fal"):
        objective(*batch)
