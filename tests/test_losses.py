"""Losses: chunked distillation, temperature, CKA, feature dynamics, and what may switch them off."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import asnn_common as asnn

V, D, D_TEACHER, N = 71, 12, 9, 13


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
    return (torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True), torch.randn(N, D_TEACHER),
            torch.randn(V, D_TEACHER), torch.tensor(1.7, requires_grad=True), labels)


def gradients(loss, *inputs):
    # The factor stands for whatever comes after the loss, the loss scale of fp16 for one.
    return torch.autograd.grad(3.0 * loss, inputs)


# 4 * LOGIT_COPIES * V bytes hold one row of a chunk.
ROW = 4 * asnn.LOGIT_COPIES * V


@pytest.mark.parametrize("kd_weight, ce_weight", [(1.0, 0.0), (0.9, 0.1), (0.0, 1.0)])
@pytest.mark.parametrize("budget", [1, ROW, 5 * ROW, N * ROW, None],
                         ids=["less", "one row", "5 rows", "all", "default"])
def test_chunked_distillation_is_the_plain_formula_with_its_gradients(case, budget, kd_weight, ce_weight):
    hidden, head, teacher_hidden, teacher_head, tau, labels = case
    kd = plain_kl(*case[:5])
    ce = F.cross_entropy(hidden @ head.t(), labels)
    expected = kd_weight * kd + ce_weight * ce
    got = asnn.chunked_distillation(hidden, head, teacher_hidden, teacher_head, tau, labels, kd_weight, ce_weight,
                                    budget=budget)
    torch.testing.assert_close(got.loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.ce, ce, rtol=1e-5, atol=1e-5)
    inputs = (hidden, head, tau) if kd_weight else (hidden, head)
    for mine, true in zip(gradients(got.loss, *inputs), gradients(expected, *inputs)):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


def test_chunked_kl_averages_over_all_leading_dimensions(case):
    hidden, head, teacher_hidden, teacher_head, tau, _ = case
    batched = asnn.chunked_kl(hidden[:12].view(3, 4, D), head, teacher_hidden[:12].view(3, 4, -1), teacher_head, tau)
    expected = plain_kl(hidden[:12], head, teacher_hidden[:12], teacher_head, tau)
    torch.testing.assert_close(batched, expected, rtol=1e-5, atol=1e-5)


def test_a_student_equal_to_its_teacher_has_no_kl(case):
    hidden, head = case[:2]
    assert abs(float(asnn.chunked_kl(hidden, head, hidden, head, 2.0).detach())) < 1e-5


def test_ignored_labels_carry_neither_loss_nor_gradient(case):
    hidden, head, *_, labels = case
    loss = asnn.chunked_distillation(hidden, head, labels=labels, ce_weight=1.0).loss
    grad, = torch.autograd.grad(loss, hidden)
    assert not grad[labels == -100].any() and grad[labels >= 0].any(-1).all()
    nothing = asnn.chunked_distillation(hidden, head, labels=torch.full((N,), -100), ce_weight=1.0).loss
    assert float(nothing.detach()) == 0.0 and not torch.autograd.grad(nothing, hidden)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_stay_close(case, dtype):
    hidden, head, teacher_hidden, teacher_head, tau, labels = case
    expected = plain_kl(*case[:5]) + 0.1 * F.cross_entropy(hidden @ head.t(), labels)
    with torch.autocast("cpu", dtype=dtype):
        got = asnn.chunked_distillation(hidden, head, teacher_hidden, teacher_head, tau, labels, 1.0, 0.1,
                                        budget=3 * ROW)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss, expected, rtol=2e-2, atol=2e-2)
    for mine, true in zip(gradients(got.loss, hidden, head, tau), gradients(expected, hidden, head, tau)):
        assert mine.dtype == true.dtype
        assert float((mine - true).norm() / true.norm()) < 3e-2


class LogitMemory(TorchDispatchMode):
    """The largest logit-shaped tensor, (rows, V), and the most bytes that such tensors held at one time; the
    transposed heads, whose storages are given, are not among them."""

    def __init__(self, vocab_size, *heads):
        super().__init__()
        self.vocab_size, self.rows, self.peak, self.alive = vocab_size, 0, 0, {}
        self.heads = {head.untyped_storage()._cdata for head in heads}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.vocab_size:
                storage = tensor.untyped_storage()
                if storage._cdata in self.heads:
                    continue
                self.rows = max(self.rows, tensor.numel() // self.vocab_size)
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: (ref, size) for k, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def test_logits_of_the_chunks_stay_within_the_budget():
    vocab, n, rows = 50257, 512, 32
    hidden, head = torch.randn(n, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    teacher_hidden, teacher_head = torch.randn(n, 4), torch.randn(vocab, 4)
    tau, labels = torch.tensor(2.0, requires_grad=True), torch.randint(0, vocab, (n,))
    budget = rows * 4 * asnn.LOGIT_COPIES * vocab
    with LogitMemory(vocab, head, teacher_head) as chunked:
        asnn.chunked_distillation(hidden, head, teacher_hidden, teacher_head, tau, labels, 1.0, 0.1,
                                  budget=budget).loss.backward()
    assert 0 < chunked.rows <= rows
    assert budget / 4 < chunked.peak <= 1.05 * budget
    # The same measurement says no to the plain formula.
    with LogitMemory(vocab, head, teacher_head) as plain:
        plain_kl(hidden, head, teacher_hidden, teacher_head, tau).backward()
    assert plain.rows >= n and plain.peak > 4 * budget


def test_different_vocabularies_are_refused_with_both_sizes(case):
    hidden, head, teacher_hidden, teacher_head, *_ = case
    with pytest.raises(ValueError, match=f"teacher vocabulary is {V - 1} and the student's {V}"):
        asnn.chunked_distillation(hidden, head, teacher_hidden, teacher_head[:-1])


@pytest.mark.parametrize("budget", [1, 3 * ROW, None])
def test_chunked_nll_is_cross_entropy(case, budget):
    hidden, head, *_, labels = case
    labels = labels.clamp_min(0).view(1, N)
    got = asnn.chunked_nll(hidden.view(1, N, D), head, labels, budget)
    expected = F.cross_entropy(hidden @ head.t(), labels[0], reduction="none")
    assert got.shape == labels.shape
    torch.testing.assert_close(got[0], expected.detach(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode, low, high", [("bounded", 1.0, 5.0), ("paper", 1.0, 21.0)])
def test_learned_temperature_starts_right_and_stays_bounded(mode, low, high):
    temperature = asnn.Temperature(mode, tau=2.0, tau_min=1.0, tau_max=5.0)
    assert float(temperature()) == pytest.approx(2.0, abs=1e-5)
    for logit in (-100.0, -3.0, 0.0, 3.0, 100.0):
        temperature.logit.data.fill_(logit)
        assert low <= float(temperature()) <= high
        assert float(temperature()) == pytest.approx(low + (high - low) / (1 + math.exp(-logit)), rel=1e-5)


@pytest.mark.parametrize("mode, tau, allowed", [("bounded", 5.0, "between 1.0 and 5.0"),
                                                ("paper", 30.0, "between 1.0 and 21.0")])
def test_a_start_outside_the_bounds_is_refused(mode, tau, allowed):
    with pytest.raises(ValueError, match=f"tau is {tau}; allowed: .*{allowed}"):
        asnn.Temperature(mode, tau=tau)


def test_an_unknown_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature is 'warm'; allowed: fixed, bounded, paper, staged"):
        asnn.Temperature("warm")


@pytest.mark.parametrize("mode, quarter", [("bounded", 0.25), ("paper", 0.5 * (1 - math.cos(math.pi / 4)))])
def test_lambda_rises_over_the_warm_up_and_stays(mode, quarter):
    temperature = asnn.Temperature(mode, lambda_max=0.8, lambda_warmup_ratio=0.4)
    assert temperature.strength(0.0) == 0.0
    assert temperature.strength(0.1) == pytest.approx(0.8 * quarter)
    assert temperature.strength(0.2) == pytest.approx(0.4)
    assert temperature.strength(0.4) == temperature.strength(1.0) == pytest.approx(0.8)


def test_without_a_warm_up_lambda_is_full_at_once():
    assert asnn.Temperature(lambda_max=0.7, lambda_warmup_ratio=0.0).strength(0.0) == 0.7


@pytest.mark.parametrize("reversal", [True, False])
def test_gradient_reversal_makes_the_temperature_raise_the_loss(case, reversal):
    hidden, head, teacher_hidden, teacher_head, *_ = case
    temperature = asnn.Temperature("bounded", gradient_reversal=reversal)

    def loss():
        return asnn.chunked_kl(hidden, head, teacher_hidden, teacher_head, temperature(1.0))

    before = loss()
    before.backward()
    torch.optim.SGD(temperature.parameters(), lr=0.1).step()
    assert (loss() > before) == reversal and abs(float((loss() - before).detach())) > 1e-4


def test_reversal_has_the_strength_of_lambda():
    temperature = asnn.Temperature("bounded", lambda_warmup_ratio=0.5)
    slopes = [torch.autograd.grad(temperature(progress), temperature.logit)[0] for progress in (0.0, 0.25, 1.0)]
    assert float(slopes[0]) == 0.0 and float(slopes[2]) < 0
    assert float(slopes[1]) == pytest.approx(0.5 * float(slopes[2]))


@pytest.mark.parametrize("progress, tau", [(0.0, 1.0), (0.3, 1.0), (0.34, 1.5), (0.6, 1.5), (0.67, 2.0), (1.0, 2.0)])
def test_staged_temperature(progress, tau):
    assert float(asnn.Temperature("staged")(progress)) == tau


def test_fixed_temperature_has_nothing_to_learn():
    temperature = asnn.Temperature("fixed", tau=3.0)
    assert float(temperature(0.5)) == 3.0 and not list(temperature.parameters())


def textbook_hsic(x, y):
    """Song et al., eq. 5, from the kernel matrices."""
    n = len(x)
    k, l = (z @ z.t() * (1 - torch.eye(n)) for z in (x, y))
    one = torch.ones(n)
    sums = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    return (torch.trace(k @ l) + sums) / (n * (n - 3))


@pytest.mark.parametrize("n", [4, 5, 11])
def test_unbiased_hsic_is_the_textbook_formula(n):
    x, y = torch.randn(n, 3) + 2.0, torch.randn(n, 6)
    torch.testing.assert_close(asnn.unbiased_hsic(x, y), textbook_hsic(x, y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, m", [(3, 3), (6, 5)])
def test_hsic_refuses_too_few_or_unpaired_samples(n, m):
    with pytest.raises(ValueError, match=rf"samples of x and y is \({n}, {m}\); allowed: equal and at least 4"):
        asnn.unbiased_hsic(torch.randn(n, 2), torch.randn(m, 2))


def test_unbiased_cka_of_noise_is_zero_where_the_biased_one_is_not():
    n, d = 48, 144
    pairs = [(torch.randn(n, d), torch.randn(n, d)) for _ in range(30)]
    unbiased = torch.stack([asnn.linear_cka(x, y) for x, y in pairs]).mean()
    biased = torch.stack([asnn.linear_cka(x, y, unbiased=False) for x, y in pairs]).mean()
    assert abs(float(unbiased)) < 0.03
    assert float(biased) == pytest.approx(d / (n + d), abs=0.03)


@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_is_one_with_itself_rotated_scaled_and_shifted(unbiased):
    x = torch.randn(40, 8) * torch.linspace(0.5, 2.0, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert float(asnn.linear_cka(x, x, unbiased)) == pytest.approx(1.0, abs=1e-5)
    assert float(asnn.linear_cka(x, 3 * x @ rotation + 5.0, unbiased)) == pytest.approx(1.0, abs=1e-4)
    y = x[:, 5:] + torch.randn(40, 3)
    expected = float(asnn.linear_cka(x, y, unbiased))
    assert 0.05 < expected < 0.95
    assert float(asnn.linear_cka(x @ rotation - 7.0, y, unbiased)) == pytest.approx(expected, abs=1e-4)


def deltas(change):
    """A block's (input, output) that adds `change`."""
    before = torch.randn_like(change)
    return before, before + change


def test_fdd_is_zero_when_layers_add_the_same_up_to_rotation():
    change = torch.randn(2, 12, 6)
    rotated = change @ torch.linalg.qr(torch.randn(6, 6)).Q
    assert float(asnn.fdd_cka_delta([deltas(change)], [deltas(rotated)])) == pytest.approx(0.0, abs=1e-4)
    assert float(asnn.fdd_cka_delta([deltas(change)], [deltas(torch.randn(2, 12, 6))])) > 0.5


def test_fdd_leaves_position_0_out():
    student, teacher = torch.randn(2, 12, 6), torch.randn(2, 12, 6)
    outlier = teacher.clone()
    outlier[:, 0] += 1e3
    values = [float(asnn.fdd_cka_delta([(torch.zeros(2, 12, 6), student)], [(torch.zeros(2, 12, 6), t)]))
              for t in (teacher, outlier)]
    assert values[0] == values[1]


def test_fdd_is_the_mean_over_pairs_and_carries_gradients():
    students = [torch.randn(2, 12, 6, requires_grad=True) for _ in range(2)]
    teachers = [torch.randn(2, 12, 6) for _ in range(2)]
    blocks = [[(torch.zeros(2, 12, 6), h) for h in side] for side in (students, teachers)]
    both = asnn.fdd_cka_delta(*blocks)
    single = [asnn.fdd_cka_delta([s], [t]) for s, t in zip(*blocks)]
    assert float(both.detach()) == pytest.approx(float(sum(single).detach()) / 2, abs=1e-6)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(both, students))


def test_logit_lens_is_zero_for_identical_models_and_learns_otherwise():
    head = torch.randn(V, D)
    student = [torch.randn(2, 8, D, requires_grad=True) for _ in range(3)]
    same = asnn.fdd_logit_lens(student, student, lambda h: h @ head.t(), lambda h: h @ head.t())
    assert float(same) == pytest.approx(0.0, abs=1e-5)
    teacher = [torch.randn(2, 8, D) for _ in range(3)]
    other = asnn.fdd_logit_lens(student, teacher, lambda h: h @ head.t(), lambda h: h @ head.t())
    assert float(other) > 0.1 and all(grad.abs().sum() > 0 for grad in torch.autograd.grad(other, student))


def test_logit_lens_is_kl_plus_cosine_of_the_steps():
    head = torch.randn(V, D)
    student, teacher = ([torch.randn(1, 5, D) for _ in range(2)] for _ in range(2))
    s, t = ([F.log_softmax(h[0] @ head.t(), -1) for h in side] for side in (student, teacher))
    kl = sum((b.exp() * (b - a)).sum(-1).mean() for a, b in zip(s, t)) / 2
    cosine = F.cosine_similarity(s[1] - s[0], t[1] - t[0], dim=-1).mean()
    got = asnn.fdd_logit_lens(student, teacher, lambda h: h @ head.t(), lambda h: h @ head.t())
    assert float(got) == pytest.approx(float(kl + 1 - cosine), abs=1e-5)
    only = asnn.fdd_logit_lens(student[:1], teacher[:1], lambda h: h @ head.t(), lambda h: h @ head.t())
    assert float(only) == pytest.approx(float((t[0].exp() * (t[0] - s[0])).sum(-1).mean()), abs=1e-5)


def test_logit_lens_looks_at_a_bounded_number_of_tokens():
    seen = []

    def lens(h):
        seen.append(len(h))
        return h

    asnn.fdd_logit_lens([torch.randn(4, 50, 6)], [torch.randn(4, 50, 6)], lens, lens, max_tokens=32)
    assert seen == [32, 32]


@pytest.fixture
def batch(tokens):
    rows = torch.from_numpy(tokens["train"][:4 * 16 + 1].astype("int64"))
    return rows[:-1].view(4, 16), rows[1:].view(4, 16)


def terms_of(distillation, batch, name, step=0, prepare=lambda objective: None, **overrides):
    objective = distillation(name, **overrides)[0]
    prepare(objective)
    loss, terms = objective(*batch, step=step)
    loss.backward()
    return objective, float(loss), {key: float(value) for key, value in terms.items()}


def test_hidden_alignment_is_part_of_the_loss_and_trains_its_projections(distillation, batch):
    objective, loss, terms = terms_of(distillation, batch, "v7", hidden_weight=0.5)
    assert terms["hidden"] > 0 and loss == pytest.approx(terms["kd"] + 0.5 * terms["hidden"], rel=1e-5)
    assert len(objective.projections) == len(objective.recipe.layer_map)
    assert all(p.weight.grad.abs().sum() > 0 for p in objective.projections.values())


def test_variance_penalty_is_part_of_the_loss_and_pulls_channels_together(distillation, batch):
    def prepare(objective):
        for module in objective.modules():
            if isinstance(module, asnn.TernarySpike):
                torch.nn.init.uniform_(module.amplitude, 0.5, 1.5)
                torch.nn.init.uniform_(module.alpha, 0.5, 1.5)

    objective, loss, terms = terms_of(distillation, batch, "v11", prepare=prepare, variance_penalty=100.0)
    assert terms["variance"] > 0.01 and loss == pytest.approx(terms["kd"] + 100 * terms["variance"], rel=1e-4)
    alpha = objective.student.goose.blocks[0].time_mix.spike_k.alpha
    # Nothing else gives alpha a gradient under the identity estimator.
    assert torch.equal(alpha.grad > 0, alpha > alpha.mean())


@pytest.mark.parametrize("kind", ["cka_delta", "logit_lens"])
def test_fdd_joins_the_loss_at_its_first_step(distillation, batch, kind):
    _, _, before = terms_of(distillation, batch, "v14.3", step=1, fdd=kind, fdd_start=2)
    assert "fdd" not in before
    objective, loss, terms = terms_of(distillation, batch, "v14.3", step=2, fdd=kind, fdd_start=2, fdd_weight=0.5)
    assert terms["fdd"] > 0 and loss == pytest.approx(terms["kd"] + 0.5 * terms["fdd"], rel=1e-4)
    objective.kill_switch.killed = True
    assert "fdd" not in objective(*batch, step=2)[1]


@pytest.mark.parametrize("pair", [(2, 0), (0, 2), (-1, 0)])
def test_a_layer_map_out_of_range_is_refused(distillation, pair):
    with pytest.raises(ValueError, match=rf"layer_map is \({pair[0]}, {pair[1]}\); allowed: student layers 0 to 1, "
                                         "teacher layers 0 to 1"):
        distillation(layer_map=(pair,))


def test_kill_switch_says_no_above_ten_per_cent_and_only_while_fdd_is_active():
    switch = asnn.FDDKillSwitch(0.10)
    assert not switch.update(100.0, active=False)
    assert not switch.update(150.0, active=False)
    assert not switch.update(109.0, active=True)
    assert switch.update(111.0, active=True)
    assert switch.update(50.0, active=True), "killed for good"


def test_kill_switch_compares_with_the_best_value():
    switch = asnn.FDDKillSwitch(0.10)
    assert [switch.update(ppl, True) for ppl in (100.0, 90.0, 98.0, 99.5)] == [False, False, False, True]


def test_early_stopping_waits_for_patience_and_min_delta():
    stopper = asnn.EarlyStopping(patience=20, min_delta=1.0)
    assert stopper.update(10, 100.0) == (True, False)
    assert stopper.update(20, 99.5) == (True, False), "a new best, but not by min_delta"
    assert stopper.update(30, 99.4) == (True, True), "20 steps without a fall of min_delta"
    assert (stopper.best, stopper.best_step) == (99.4, 30)


def test_a_fall_of_min_delta_restarts_the_patience():
    stopper = asnn.EarlyStopping(patience=20, min_delta=1.0)
    assert [stopper.update(step, ppl)[1] for step, ppl in ((10, 100.0), (25, 98.0), (40, 98.5), (45, 98.5))] == [
        False, False, False, True]


def test_without_patience_nothing_stops_early():
    stopper = asnn.EarlyStopping(None)
    assert not any(stopper.update(step, 50.0)[1] for step in range(0, 10_000, 1000))


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_capture_blocks_sees_the_residual_stream(distillation, batch):
    student = distillation()[0].student
    with asnn.capture_blocks(student, (0, 1)) as captured:
        out = student(batch[0], output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(captured[0][0], out.hidden_states[0])
    torch.testing.assert_close(captured[0][1], captured[1][0])
    torch.testing.assert_close(student.goose.ln_f(captured[1][1]), out.hidden_states[-1])


def test_capture_blocks_leaves_no_hooks_when_the_block_fails(distillation):
    student = distillation()[0].student
    with pytest.raises(RuntimeError, match="inside"), asnn.capture_blocks(student, (0, 1)):
        assert hooks(student) == 2
        raise RuntimeError("inside")
    assert hooks(student) == 0


def test_capture_blocks_leaves_no_hooks_when_a_layer_does_not_exist(distillation):
    student = distillation()[0].student
    with pytest.raises(IndexError), asnn.capture_blocks(student, (0, 9)):
        pass
    assert hooks(student) == 0


def test_an_architecture_without_known_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no list of blocks at a known place"):
        asnn.transformer_blocks(torch.nn.Linear(2, 2))


# ---- half precision


def test_head_gradient_of_fp16_does_not_overflow():
    # Many equal tokens of which the student is sure: the sum over their rows is as large as it can get.
    torch.manual_seed(0)
    head, teacher_head = torch.randn(50, 16), torch.randn(50, 16)
    hidden = (8.0 * head[7] / head[7].norm()).expand(512, 16).clone()
    teacher_hidden = -hidden
    grads = {}
    for dtype in (torch.float32, torch.float16):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = asnn.chunked_kl(h, w, teacher_hidden, teacher_head, 5.0, budget=10**9)
        loss.backward()
        grads[dtype] = (h.grad, w.grad)
    for exact, half in zip(grads[torch.float32], grads[torch.float16]):
        assert half.isfinite().all()
        assert (half - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_of_wide_features_stays_finite_under_fp16_autocast(unbiased):
    torch.manual_seed(0)
    x, y = torch.randn(1000, 8, requires_grad=True), 20 * torch.randn(1000, 8)
    exact = asnn.linear_cka(x, y, unbiased)
    with torch.autocast("cpu", dtype=torch.float16):
        value = asnn.linear_cka(x, y, unbiased)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(exact.detach()), abs=1e-6)
    assert x.grad.isfinite().all()


# ---- firing rates


def rates_of(spikes):
    return {name: (value != 0).float().mean((0, 1)) for name, value in spikes.items()}


@pytest.mark.parametrize("step", [0, 5])
def test_firing_rates_outside_their_band_are_part_of_the_loss(distillation, batch, step):
    """In the alignment and after it, with the counted rates."""
    inputs, labels = batch
    objective, *_ = distillation("v14.4", rate_weight=2.0, rate_band=(0.1, 0.2), align_steps=3)
    plain, *_ = distillation("v14.4", align_steps=3)
    seen = {}
    with asnn.spike_hooks(objective.student, lambda name, spikes: seen.__setitem__(name, spikes.detach())):
        loss, terms = objective(inputs, labels, step=step)
    expected = []
    for rate in rates_of(seen).values():
        far = lambda x: ((x - 0.2).clamp_min(0) + (0.1 - x).clamp_min(0)) ** 2  # noqa: E731
        expected.append(float(far(rate).mean() + far(rate.mean())))
    assert len(expected) == 2 * objective.student.config.n_layer and sum(expected) > 0
    assert float(terms["rate"]) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert float(loss) == pytest.approx(float(plain(inputs, labels, step=step)[0]) + 2 * float(terms["rate"]), rel=1e-5)
    loss.backward()
    assert all(m.alpha.grad.abs().max() > 0 for m in asnn.spike_modules(objective.student).values())
    assert not any(m._forward_hooks for m in objective.student.modules())


def test_a_dense_twin_has_no_firing_rates(distillation, batch):
    _, terms = distillation("v14.4", rate_weight=2.0, spike_kind="dense")[0](*batch)
    assert "rate" not in terms


def test_firing_rates_and_gradient_checkpointing_exclude_each_other(distillation, batch):
    objective, *_ = distillation("v14.4", rate_weight=2.0)
    objective.student.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing is True; allowed: False with Recipe.rate_weight"):
        objective(*batch)


def test_training_brings_the_firing_rates_into_their_band(distillation, batch):
    mean = {}
    for weight in (0.0, 30.0):
        objective, sampler, settings = distillation("v14.4", rate_weight=weight, rate_band=(0.1, 0.3), align_steps=0,
                                                    distill_steps=40)
        asnn.fit(objective, sampler, settings)
        density = asnn.spike_density(objective.student, batch[0]).values()
        mean[weight] = sum(density) / len(density)
    assert mean[30.0] < 0.32 < mean[0.0] - 0.05
