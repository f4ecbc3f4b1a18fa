"""SpikingBrain: estimators against known truths, the gate, interventions and the remedy."""
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import definitions
from scipy.signal import lfilter
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

import asnn_common as asnn

page = definitions("asnn_v15_spikingbrain")
METRICS = ["dead channels", "saturated channels", "firing rate", "mutual information", "CKA"]


def ternary(x, theta=0.8):
    return (x.sign() * (x.abs() > theta)).char()


def windows(x, T=25):
    """(n, C) -> (W, T, C)"""
    return x.reshape(-1, T, x.shape[-1])


def lasting(W, T, columns, run=20):
    """AR(1) series of variance 1 whose correlation falls to 1/e within `run` tokens, a new one for
    each window: (W, T, columns)."""
    r, rng = math.exp(-1 / run), np.random.default_rng(int(torch.randint(2**31, ())))
    noise = rng.standard_normal((W, T + 10 * run, columns))
    series = lfilter([math.sqrt(1 - r * r)], [1, -r], noise, axis=1)[:, 10 * run:]
    return torch.from_numpy(series).float()


def bits(p):
    """Entropy over the last axis of probabilities."""
    return -(p * p.clamp_min(1e-12).log2()).sum(-1)


def hooks(*models):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks)
               for model in models for m in model.modules())


def coverage(intervals, truth):
    low, high = np.array(intervals).T
    return np.mean((low <= truth) & (truth <= high))


# ---- intervals and the null ----------------------------------------------------------------------


def test_bootstrap_covers_a_mean_and_a_ratio_of_means():
    draws = np.random.default_rng(0).gamma(2.0, 0.5, (100, 60, 2)) * (3.0, 1.0)
    means = [asnn._bootstrap(rows) for rows in draws]
    ratios = [asnn._bootstrap(rows, lambda m: m[:, 0] / m[:, 1]) for rows in draws]
    assert 0.90 <= coverage(means, 3.0) <= 0.99 and 0.90 <= coverage(ratios, 3.0) <= 0.99
    assert asnn._bootstrap(np.full(9, 2.5)) == [2.5, 2.5]


def test_exchanged_windows_meet_every_window_once_and_never_themselves():
    W = 7
    sums = np.add.outer(W * np.arange(W), np.arange(W))
    found = asnn._exchanged(np.stack((np.eye(W), sums, np.triu(np.ones((W, W))))), 500)
    assert found.shape == (500, 3) and not found[:, 0].any()
    assert np.allclose(found[:, 1], (W + 1) * (W - 1) / 2)  # each row and each column once
    assert len(np.unique(found[:, 2])) > 3 and 0.4 < found[:, 2].mean() < 0.6


# ---- mutual information --------------------------------------------------------------------------


def probe(x, s, T=25, whiten=False):
    """What the estimator says of x (n, P) and spikes (n, C)."""
    estimator, x = asnn.MutualInformationEstimator(), windows(x, T)
    told = estimator.estimate(estimator.whiten(x) if whiten else x, windows(s, T))
    return SimpleNamespace(mean=told["mutual information"], p=told["mutual information p"],
                           null=told["mutual information null"], bits=told["bits"],
                           nothing=told["null bits"], informative=told["informative"],
                           interval=told["mutual information interval"])


@pytest.mark.parametrize("n", [1000, 4000])
def test_probe_finds_nothing_in_independent_spikes_and_nearly_all_in_deterministic_ones(n):
    x = torch.randn(n, 4)
    told = probe(x, ternary(torch.randn(n, 100)))
    assert -30 / n < told.mean < 0 and told.bits.max() < 10 / n
    assert told.p > 0.05 and told.informative < 0.05 and told.mean < told.null
    assert told.mean == pytest.approx(told.nothing.mean(), abs=6 / n)
    assert told.interval[0] < told.mean < told.interval[1] < 0
    for theta in (0.0, 0.8):
        s = ternary(x, theta)
        entropy = bits(torch.stack([(s == k).float().mean(0) for k in (-1, 0, 1)], -1)).numpy()
        told = probe(x, s)
        assert (told.bits <= entropy).all() and told.p == 1 / 1000 and told.informative == 1.0
        assert (told.bits > (0.75 if n == 1000 else 0.82) * entropy).all()


def test_probe_of_noisy_channels_gives_their_information_and_its_interval_covers_it(monkeypatch):
    W = 1.2 * torch.randn(16, 4, 3)  # sixteen channels of four features: logits of -1, 0, 1

    def noisy(x):
        q = (x @ W).softmax(-1)  # (16, n, 3)
        return torch.multinomial(q.flatten(0, 1), 1).view(16, -1).t().char() - 1

    q = (torch.randn(50_000, 4) @ W).softmax(-1)
    truth = (bits(q.mean(1)) - bits(q).mean(1)).numpy()
    x = torch.randn(8000, 4)
    told = probe(x, noisy(x))
    assert told.interval[0] <= truth.mean() == pytest.approx(told.mean, abs=0.01)
    assert (abs(told.bits - truth) < 3 / math.sqrt(8000)).all()
    monkeypatch.setattr(asnn, "_exchanged", lambda pairs: pairs.mean((1, 2))[None])  # unused
    found = [probe(x, noisy(x)) for x in torch.randn(40, 3000, 4)]
    left = np.mean([told.mean for told in found])  # what so short a text leaves of it
    assert truth.mean() - 0.03 < left < truth.mean() + 0.005
    assert coverage([told.interval for told in found], left) >= 0.8


def test_probe_is_the_logistic_regression_of_scikit_learn():
    x, estimator = torch.randn(600, 5), asnn.MutualInformationEstimator()
    ones = F.pad(x, (0, 1), value=1.0)
    # Of three classes, 0 is our reference and theirs is symmetric: with little ridge predictions
    # agree, and nearly so after as many steps as a validation takes. Of two, the weights agree.
    target = torch.multinomial((x @ torch.randn(5, 3)).softmax(-1), 1)
    model = LogisticRegression(C=100, tol=1e-10, max_iter=2000).fit(x, target[:, 0])
    theirs = model.predict_log_proba(x)[range(600), target[:, 0]].mean()
    for steps, margin in ((2000, 1e-3), (50, 5e-3)):
        W = estimator._fit(ones, target, 3, steps, ridge=1e-2)[..., 0]
        ours = -F.cross_entropy(F.pad(ones @ W, (1, 0)), target[:, 0])
        assert float(ours) == pytest.approx(theirs, abs=margin)
    W = estimator._fit(ones, target.clamp(max=1), 2, steps=2000, ridge=3.0)[:, 0, 0]
    classes = target[:, 0].clamp(max=1)
    model = LogisticRegression(C=1 / 3.0, tol=1e-10, max_iter=2000).fit(x, classes)
    assert W.tolist() == pytest.approx([*model.coef_[0], model.intercept_[0]], abs=2e-4)


def test_each_half_is_predicted_by_the_other_alone():
    """A code whose sign turns between the halves is predicted wrongly, not well."""
    x, half = torch.randn(4000, 3), torch.arange(4000)[:, None] < 2000
    assert probe(x, ternary(torch.where(half, x, -x))).mean < -0.5 < 0.5 < probe(x, ternary(x)).mean


def test_spikes_that_last_or_keep_to_a_position_are_not_taken_for_information():
    at = (torch.arange(3000) % 25 - 12).unsqueeze(1) / 7.2
    x = torch.cat((at + 0.3 * torch.randn(3000, 1), torch.randn(3000, 3)), 1)
    told = probe(x, ternary(at + 0.5 * torch.randn(3000, 60)), whiten=True)
    assert told.mean > 0.1 and told.p > 0.05 and told.informative < 0.05
    p = []
    for _ in range(20):  # independent, but 20 tokens long: permuted tokens would find a lot
        x, s = lasting(60, 25, 4).flatten(0, 1), ternary(lasting(60, 25, 20)).flatten(0, 1)
        told = probe(x, s, whiten=True)
        p.append(told.p)
        assert told.informative <= 0.1
    assert np.mean(np.array(p) < 0.05) <= 0.15 and 0.25 < np.mean(p) < 0.75


def test_the_false_discovery_rate_finds_the_channels_that_tell_something():
    x = torch.randn(3000, 8)
    s = ternary(torch.cat((0.4 * x[:, :5] + torch.randn(3000, 5), torch.randn(3000, 95)), 1))
    s[:, 5:9] = torch.tensor([0, 1, -1, 1]).char()  # always the same: never informative
    told = probe(x, s)
    assert 0.05 <= told.informative <= 0.07 and abs(told.bits[5:9]).max() < 0.005
    assert probe(x, s[:, 5:9]).informative == 0 and probe(x, s[:, 5:9]).p > 0.05


def test_components_are_whitened_in_order_and_few_where_tokens_are_few():
    hidden = torch.randn(20, 25, 6) @ torch.diag(torch.tensor([9.0, 5, 3, 1, 0.5, 0])) + 7
    x = asnn.MutualInformationEstimator().whiten(hidden).flatten(0, 1)
    assert x.shape == (500, 5)  # the sixth channel is constant
    torch.testing.assert_close(x.t() @ x / 500, torch.eye(5), rtol=0, atol=1e-3)
    assert torch.corrcoef(torch.stack((x[:, 0], hidden.flatten(0, 1)[:, 0])))[0, 1].abs() > 0.98
    x = torch.randn(400, 60)  # a probe of 60 weights would learn the noise of 200 tokens
    assert probe(x, ternary(x[:, :1] + 0.1 * torch.randn(400, 20))).mean > 0.4


@pytest.mark.parametrize("n", [300, 4000])
def test_counts_of_known_channels(n):
    """Independent, deterministic and noisy codes on the edges of their bins."""
    rng, edges, bias = np.random.default_rng(n), np.arange(1, 3) - 0.5, 2 / (n * math.log(2))
    sent = rng.integers(0, 3, n)
    got = np.where(rng.random((200, n)) < 0.2, (sent + rng.integers(1, 3, (200, n))) % 3, sent)
    entropy = bits(torch.bincount(torch.from_numpy(sent)).double() / n).item()
    truth = math.log2(3) + 0.8 * math.log2(0.8) + 0.2 * math.log2(0.1)
    for codes, value, margin in ((rng.integers(0, 3, (200, n)), 0.0, 0.15 * bias),
                                 (np.tile(sent, (2, 1)), entropy - bias, 1e-6),
                                 (got, truth, 0.5 * bias + 0.02 * (n == 300))):
        plain, corrected = page.counted(sent, torch.from_numpy(codes.T) - 1, edges)
        assert plain == pytest.approx(corrected + bias)
        assert corrected == pytest.approx(value, abs=margin)


def test_the_founders_count_a_fifth_of_a_bit_and_a_third_of_cka_in_noise():
    told = page.second_opinions(ternary(torch.randn(80, 25, 256)), torch.randn(80, 25, 256))
    for value in told["founders' MI"]:
        assert value == pytest.approx(0.22, abs=0.05) and value > asnn.GATE["mutual information"]
    for value in told["biased CKA"]:
        assert value == pytest.approx(256 / (256 + 512), abs=0.02) and value > asnn.GATE["CKA"]
    assert abs(np.array(told["Miller-Madow"])).max() < 0.002


# ---- CKA -----------------------------------------------------------------------------------------


def compare(s, hidden, layer=0, standard=True):
    """Measures of spikes (W, T, C) at a layer of hidden {layer: (W, T, D)}."""
    analyzer = asnn.RepresentationAnalyzer()
    own, analyzer.kernels = analyzer.kernels, lambda x: own(x, standard)
    return analyzer.compare(s, {t: own(h, standard) for t, h in hidden.items()}, layer)


def test_products_of_kernels_are_unbiased_hsic_of_whole_windows():
    x, y = torch.randn(100, 12, 8) + 2, 3 * torch.randn(100, 12, 5)
    y[..., :2] += x[..., :2]
    kernels, n = asnn.RepresentationAnalyzer().kernels, 60  # five windows each: twenty minibatches
    K, L = (kernels(z, standard=False) for z in (x, y))
    a, b = (z.reshape(20, n, -1) for z in (x, y))
    for A, B, pairs in ((K, L, zip(a, b)), (K, K, zip(a, a))):
        expected = torch.stack([asnn._unbiased_hsic(p, q) for p, q in pairs])
        torch.testing.assert_close((A * B).sum(1) / (n * (n - 3)), expected, rtol=1e-3, atol=1e-3)
    assert kernels(x, batch_tokens=36).shape == (33, 36 * 36) and len(kernels(x[:3])) == 3
    X, Y = kernels(x), kernels(y)
    xy, xx, yy = ((A * B).sum(1).mean() for A, B in ((X, Y), (X, X), (Y, Y)))
    assert compare(x, {0: y})["CKA"] == pytest.approx(float(xy / (xx * yy).sqrt()), rel=1e-4)


@pytest.mark.parametrize("W, margin", [(20, 0.1), (160, 0.035)])
def test_cka_of_correlated_gaussians_is_that_of_the_population(W, margin):
    A = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    scale = (A.square().sum(0) + 1.5).sqrt()
    R, own = A / scale, (A.t() @ A + 1.5 * torch.eye(6)) / scale.unsqueeze(1) / scale
    truth, inside = float(R.square().sum() / (2 * own.norm())), []
    for x in torch.randn(12, W, 32, 4):
        told = compare(x, {0: (x @ A + math.sqrt(1.5) * torch.randn(W, 32, 6)) / scale})
        assert told["CKA"] == pytest.approx(truth, abs=2 * margin)
        inside.append(told["CKA interval"])
    assert 0.3 < truth < 0.9 and coverage(inside, truth) >= 0.75


def test_cka_of_independent_spikes_is_nothing_and_of_the_same_is_everything():
    hidden = torch.randn(80, 32, 12)
    turned = hidden @ torch.linalg.qr(torch.randn(12, 12)).Q
    noise, same, shifted, rotated, spikes, dead = (compare(s, {0: hidden}) for s in (
        ternary(torch.randn(80, 32, 16)), hidden, 5 - 3 * hidden, turned, ternary(hidden),
        0 * hidden))
    assert abs(noise["CKA"]) < 0.02 and noise["CKA p"] > 0.05 and abs(noise["CKA null"]) < 0.03
    assert noise["CKA interval"][0] < noise["CKA"] < noise["CKA interval"][1]
    assert same["CKA"] == pytest.approx(1.0, abs=1e-4) == shifted["CKA"]
    assert rotated["CKA"] == pytest.approx(1.0, abs=0.01) and 0.7 < spikes["CKA"] < 0.95
    assert all(told["CKA p"] == 1 / 1000 for told in (same, rotated, spikes))
    assert dead["CKA"] == 0 == dead["CKA interval"][1] and dead["CKA p"] == 1
    mixed = 0.6 * turned + 0.8 * torch.randn(80, 32, 12)
    layers = {0: hidden, 1: mixed, 2: torch.randn(80, 32, 12)}
    told = [compare(ternary(x), layers, layer=1) for x in layers.values()]
    assert [t["heat"].argmax() for t in told] == [0, 1, 2] and told[0]["CKA"] == told[0]["heat"][1]


def test_cka_stands_on_all_channels_and_the_raw_value_on_the_loudest():
    hidden = torch.randn(80, 32, 10)
    s = ternary(hidden[..., :6] + 0.5 * torch.randn(80, 32, 6))
    wide = torch.cat((s, torch.zeros(80, 32, 5).char(), torch.ones(80, 32, 2).char()), -1)
    loud = torch.cat((hidden * torch.tensor([1000.0] + 9 * [1.0]) + 4, torch.ones(80, 32, 3)), -1)
    fair, raw = (compare(s, {0: hidden}, standard=flag)["CKA"] for flag in (True, False))
    assert compare(wide, {0: loud})["CKA"] == pytest.approx(fair, abs=1e-4)  # constants: nothing
    assert abs(compare(s, {0: loud}, standard=False)["CKA"] - raw) > 0.05


@pytest.mark.parametrize("make", [
    lambda: (lasting(80, 64, 8), lasting(80, 64, 12)),
    lambda: [at + torch.randn(80, 32, 8) for at in 2 * [torch.randn(32, 8)]]])
def test_the_null_of_cka_knows_spikes_that_last_or_keep_to_a_position(make):
    told = []
    for _ in range(20):
        x, hidden = make()
        told.append(compare(ternary(x), {0: hidden}))
    assert np.mean([t["CKA p"] < 0.05 for t in told]) <= 0.15
    assert np.mean([t["CKA"] for t in told]) > 0.02  # unbiased for independent samples only


# ---- health --------------------------------------------------------------------------------------


def test_dead_saturated_and_sign_locked_channels_are_counted():
    s, checker = torch.randint(-1, 2, (6000, 20)).char(), asnn.SpikeHealthChecker()
    s[:, :2] = 0
    s[:, 2:5] = 2 * torch.randint(0, 2, (6000, 3)) - 1
    s[:, 5] = 1  # saturated, and of one sign
    s[:, 6] = s[:, 6].abs()
    s[:, 7:9] = 0
    s[:19, 7] = 1  # one event short of being called locked
    s[:20, 8] = -1
    told = checker.check(windows(s, 50))
    for name, count in (("dead", 2), ("saturated", 6), ("sign-locked", 3)):  # locked: saturated too
        assert told[f"{name} channels"] == pytest.approx(count / 20)
        wilson = binomtest(count, 20).proportion_ci(method="wilson")
        assert told[f"{name} channels interval"] == pytest.approx(list(wilson))
    fired = (s != 0).double().mean(0)
    assert told["rate"] == pytest.approx(fired.numpy())
    low, high = told["firing rate interval"]
    assert told["firing rate"] == pytest.approx(float(fired.mean())) and low < fired.mean() < high
    binary = torch.randint(0, 2, (30, 20, 8)).char()
    assert checker.check(binary)["saturated channels"] == 1.0
    assert checker.check(binary, binary=True)["saturated channels"] == 0.0


@pytest.mark.parametrize("levels", [1, 3])
def test_entropy_and_rate_of_uniform_spikes(levels):
    s = torch.randint(-levels, levels + 1, (800, 25, 8)).char()
    told = asnn.SpikeHealthChecker().check(s)
    assert told["entropy"] == pytest.approx(math.log2(2 * levels + 1), abs=2e-3)
    assert told["firing rate"] == pytest.approx(2 * levels / (2 * levels + 1), abs=1e-2)
    s[:, :10], s[:, 10:20] = 0, torch.tensor([-1, 0, 0, 1] * 2).char()
    told = asnn.SpikeHealthChecker().check(s)["by position"]
    assert told[:20].tolist() == 10 * [0] + 10 * [0.5] and min(told[20:]) > 0.6


# ---- gate ----------------------------------------------------------------------------------------

W, T, WIDTH = 80, 32, 32


@pytest.fixture(scope="module")
def hidden():
    """Two layers that follow a few slow factors."""
    torch.manual_seed(3)
    factors = lasting(W, T, 8, run=2)
    return {t: factors @ torch.randn(8, WIDTH) / 3 + 0.5 * torch.randn(W, T, WIDTH) for t in (0, 1)}


def judge(spikes, hidden, **options):
    return asnn.SpikingBrainValidator().judge(spikes, hidden, **options)


def plain(x, theta=0.8):
    return ternary((x - x.mean((0, 1))) / x.std((0, 1)), theta)


def with_columns(spikes, count, values):
    return torch.cat((values[..., :count].char(), spikes[..., count:]), -1)


TRAINS = {  # spikes of teacher states x (W, T, WIDTH), and the metrics that they fail
    "teacher-derived": (plain, []),
    "one channel dead": (lambda x: with_columns(plain(x), 1, 0 * x), []),
    "two channels dead": (lambda x: with_columns(plain(x), 2, 0 * x), ["dead channels"]),
    "three saturated": (lambda x: with_columns(plain(x), 3, plain(x, 0)), []),
    "four saturated": (lambda x: with_columns(plain(x), 4, plain(x, 0)), ["saturated channels"]),
    "rate too low": (lambda x: plain(x, 1.5), ["firing rate"]),
    "rate too high": (lambda x: plain(x, 0.3), ["firing rate"]),
    "noise": (lambda x: ternary(torch.randn_like(x)), METRICS[3:]),
    "another window": (lambda x: plain(x).roll(W // 2, 0), METRICS[3:]),
    "all dead": (lambda x: 0 * x, [METRICS[0], *METRICS[2:]]),
    "all saturated": (lambda x: 0 * x + 1, METRICS[1:]),
    "sign-locked": (lambda x: plain(x, 0.4).clamp_min(0), ["saturated channels"])}


@pytest.mark.parametrize("name", TRAINS)
def test_spikes_fail_the_gates_they_were_made_to_fail_and_no_other(hidden, name):
    make, expected = TRAINS[name]
    result = judge({"0.k": make(hidden[1]).char()}, hidden)
    assert result.summary["failed"] == expected, result.gate["metrics"]
    verdict = "failed" if expected else "passed"
    assert result.summary["verdict"] == verdict == result.gate["verdict"]
    if name == "teacher-derived":
        assert all(result.gate["metrics"][metric]["clear"] for metric in METRICS[2:])


def test_information_and_similarity_can_each_fail_alone():
    factors, noise = torch.randn(W, T, 5), 0.1 * torch.randn(W, T, WIDTH)
    little = ternary(0.35 * factors[..., :1] + torch.randn(W, T, 128))  # of much, said often
    found = judge({"0.k": little}, {0: factors[..., :1] + noise})
    assert found.summary["failed"] == ["mutual information"]
    small = ternary(factors[..., 1:].repeat(1, 1, 4) + 0.3 * torch.randn(W, T, 16))
    layer = torch.cat((factors[..., :1].repeat(1, 1, 28), factors[..., 1:]), -1) + noise
    assert judge({"0.k": small}, {0: layer}).summary["failed"] == ["CKA"]


def test_every_site_has_to_pass_and_the_gate_and_its_map_name_the_worst(hidden):
    good, noise = plain(hidden[0]), ternary(torch.randn(W, T, WIDTH))
    result = judge({"0.k": good, "0.v": good, "1.k": noise, "head_in": good}, hidden)
    assert result.meta["layer_of"] == {"0.k": 0, "0.v": 0, "1.k": 1, "head_in": 1}
    for name in METRICS[3:]:
        metric = result.gate["metrics"][name]
        assert metric["site"] == "1.k" and not metric["pass"] and not metric["clear"]
        assert (metric["sites passed"], metric["sites"]) == (3, 4) and metric["p"] > 0.05
        assert metric["value"] == result.sites["1.k"][name]
    assert result.gate["metrics"]["firing rate"]["sites passed"] == 4
    axis = page.plot_gate(result).axes[0]
    texts = np.array([text.get_text() for text in axis.texts]).reshape(4, 5)
    assert np.argwhere(np.char.endswith(texts, "FAIL")).tolist() == [[2, 3], [2, 4]]
    assert texts[0, 4] == f"{result.sites['0.k']['CKA']:.3f}"
    rows = page.gate_table(result.gate)
    assert rows[4]["nearest to failing"] == "1.k" and rows[4]["gate"] == "FAIL, 3 of 4 sites"
    assert [len(row) for row in rows] == [7] * 5


def test_position_0_counts_for_health_alone(hidden):
    one, two = plain(hidden[1]), plain(hidden[1])
    two[:, 0] = 1
    loud = {t: torch.cat((h[:, :1] + 1e4, h[:, 1:]), 1) for t, h in hidden.items()}
    a, b = judge({"0.k": one}, hidden).sites["0.k"], judge({"0.k": two}, loud).sites["0.k"]
    assert all(a[name] == b[name] for name in METRICS[3:]) and a["firing rate"] < b["firing rate"]


@pytest.fixture(scope="module")
def passing(hidden):
    return judge({"0.k": plain(hidden[1])}, hidden, meta={"student": "abc"})


def test_gate_reads_as_json_with_the_thresholds_of_the_design(passing):
    gate = json.loads(json.dumps(passing.gate, allow_nan=False))
    json.dumps(passing.sites, allow_nan=False)
    assert {name: metric["threshold"] for name, metric in gate["metrics"].items()} == dict(zip(
        METRICS, (0.05, 0.10, [0.2, 0.6], 0.1, 0.3)))
    for name, metric in gate["metrics"].items():
        low, high = metric["interval"]
        assert metric["pass"] is True and low <= metric["value"] <= high
        assert (metric["null"] is None) == (metric["p"] is None) == (name not in METRICS[3:])
    about = {"verdict": "passed", "student": "abc", "tokens": W * T, "windows": W, "version": "v15",
             "asnn_common": asnn.__version__}
    assert {key: gate[key] for key in about} == about


@pytest.mark.parametrize("name, value, fails", [
    ("dead channels", 0.05, True), ("dead channels", 0.049, False),
    ("saturated channels", 0.1, True), ("firing rate", 0.2, False), ("firing rate", 0.6, False),
    ("firing rate", 0.601, True), ("firing rate", 0.199, True), ("mutual information", 0.1, True),
    ("mutual information", 0.101, False), ("mutual information p", 0.06, True),
    ("mutual information null", 2.0, True), ("CKA", 0.3, True), ("CKA null", 0.99, True),
    ("CKA p", 0.051, True), ("PPL rise", 0.02, False), ("PPL rise", 0.0201, True)])
def test_the_edges_of_the_gate(passing, name, value, fails):
    row = {**passing.sites["0.k"], "mutual information null": 0.0, "CKA null": 0.0}
    meta = {**passing.meta, **({name: value} if name == "PPL rise" else {})}
    result = passing._replace(sites={"0.k": row, "0.v": {**row, name: value}}, meta=meta)
    assert result.summary["failed"] == ([re.sub(" (p|null)$", "", name)] if fails else [])
    assert result.gate["verdict"] == ("failed" if fails else "passed")


def test_a_map_with_layers_that_there_are_not_is_refused(hidden):
    good = {"0.k": plain(hidden[0]), "1.k": plain(hidden[1])}
    for wrong in ({0: 0, 1: 2}, {0: 0, 3: 1}, {0: -1, 1: 0}, {0: 0}):
        with pytest.raises(ValueError, match=re.escape(f"layer_map is {wrong}; allowed: one of")):
            asnn.SpikingBrainValidator(layer_map=wrong).judge(good, hidden)
    crossed = asnn.SpikingBrainValidator(layer_map={0: 1, 1: 0}).judge(good, hidden)
    assert crossed.meta["layer_of"] == {"0.k": 1, "1.k": 0}


# ---- recording and validating --------------------------------------------------------------------


def test_a_second_train_has_to_be_healthy_and_the_site_tells_what_its_first_train_tells(hidden):
    x = hidden[1] / hidden[1].abs().mean(-1, keepdim=True)
    two = {"0.k": plain(hidden[1]), "0.k.2": ternary(torch.randn(W, T, WIDTH))}
    result = judge(two, hidden)
    assert result.summary["verdict"] == "passed" and result.sites["0.k.2"]["CKA"] < 0.1
    counts = {name: metric["sites"] for name, metric in result.gate["metrics"].items()}
    assert list(counts.values()) == [2, 2, 2, 1, 1]
    cka = asnn.RepresentationAnalyzer()
    whole = cka.compare((3 * two["0.k"] + two["0.k.2"])[:, 1:],
                        {1: cka.kernels(hidden[1][:, 1:])}, 1)["CKA"]
    assert result.sites["0.k"]["CKA"] == pytest.approx(whole) and asnn.GATE["CKA"] < whole
    better = judge({**two, "0.k.2": ternary(x - 1.6 * two["0.k"], 0.3)}, hidden)  # what is left
    assert better.sites["0.k"]["CKA"] > judge({"0.k": two["0.k"]}, hidden).sites["0.k"]["CKA"]
    texts = [text.get_text() for text in page.plot_gate(result).axes[0].texts]
    assert texts[8:] == [f"({result.sites['0.k.2'][name]:.3f})" for name in METRICS[3:]]
    assert judge({**two, "0.k.2": 0 * two["0.k"]}, hidden).summary["failed"] == [
        "dead channels", "firing rate"]
    swapped = {"0.k": two["0.k.2"], "0.k.2": two["0.k"]}
    assert "mutual information" in judge(swapped, hidden).summary["failed"]


def test_spikes_made_of_a_teacher_pass_whatever_its_states_look_like(hidden):
    two_peaks = {t: h.sign() + 0.1 * h for t, h in hidden.items()}  # mean and spread say little
    made = page.constructed(two_peaks, 2, 0)
    assert (made["from the teacher"]["1.k"] != 0).float().mean() == pytest.approx(0.5, abs=0.01)
    verdicts = [judge(spikes, two_peaks).gate["verdict"] for spikes in made.values()]
    assert verdicts == ["passed"] + ["failed"] * 5


@pytest.fixture
def batches(tokens):
    """Eight batches of four windows, (4, 16) each."""
    return list(torch.from_numpy(tokens["validation"][:512].astype(np.int64)).view(8, 4, 16))


@pytest.mark.parametrize("trains", [1, 2])
def test_a_record_has_spikes_and_teacher_states_of_the_same_tokens(small_task, batches, trains):
    task, given = small_task("v14.4-rates", spike_steps=trains), {}
    student, teacher = task.build_student().train(), task.teacher.eval()
    modules = asnn.spike_modules(student)
    handles = [module.register_forward_pre_hook(
        lambda _m, args, site=site: given.setdefault(site, []).append(args[0]))
        for site, module in modules.items()]
    spikes, hidden = asnn.SpikingBrainValidator().record(student, teacher, batches, 2)
    for handle in handles:
        handle.remove()
    assert student.training and not teacher.training and hooks(student, teacher) == 0
    assert list(spikes) == [site + more for site in modules for more in ("", ".2")[:trains]]
    assert len(modules) == 2 * 9
    with torch.no_grad():
        for site, module in modules.items():
            again = module.eval().encode(torch.cat(given[site]))  # an encoder's with its scale
            again = again if isinstance(again, torch.Tensor) else again[0]
            code = spikes[site].float()
            if trains == 2:
                code = code + module.residual_height * spikes[f"{site}.2"]
            assert spikes[site].dtype == torch.int8 and torch.equal(code, again)
        states = teacher(torch.cat(batches[:2]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[0], states[1], rtol=1e-4, atol=1e-4)
    assert set(hidden) == {0, 1} and hidden[1].shape == (8, 16, 32)


def test_a_record_takes_what_loaders_yield_and_reads_no_more_than_it_needs(task, student, batches):
    def stream():
        yield from batches[:4]
        pytest.fail("a loader without an end would be read for ever")

    loaders = stream(), [(b, b + 1) for b in batches], [{"input_ids": b} for b in batches]
    validator = asnn.SpikingBrainValidator(max_tokens=200)
    records = [validator.record(student, task.teacher, iter(loader)) for loader in loaders]
    for spikes, hidden in records:
        assert spikes["1.v"].shape == hidden[1].shape == (13, 16, 32)  # whole windows
        assert torch.equal(spikes["1.v"], records[0][0]["1.v"])
    for loader, most in (([], None), (batches, 0)):
        with pytest.raises(ValueError, match="loader is 'empty'; allowed: at least one batch"):
            validator.record(student, task.teacher, loader, most)
    dense = task.build_student(task.recipe.replace(spike_kind="dense"))
    with pytest.raises(ValueError, match="^spike_kind is 'dense'; allowed: a student w"):
        validator.record(dense, task.teacher, batches)


def test_no_hook_outlives_an_exception(task, student, batches, monkeypatch):
    with pytest.raises(IndexError):  # token ids that there are not
        asnn.SpikingBrainValidator().record(student.train(), task.teacher, [batches[0] + 10**6])
    assert hooks(student, task.teacher) == 0 and student.training
    monkeypatch.setattr(page, "damaged", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.intervene(student, lambda: student(batches[0]) and SimpleNamespace(ppl=1.0, tokens=64),
                       [("0.k", ["0.k"], "zero", 0)], 0)
    assert hooks(student) == 0


def test_validation_is_the_same_twice_and_leaves_random_numbers_alone(task, student, batches):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = (asnn.SpikingBrainValidator().validate(student, task.teacher, batches, meta={
        "teacher": "tiny"}) for _ in "12")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert one.gate == two.gate and one.sites == two.sites
    assert one.gate["student"] == student.content_hash() and one.gate["teacher"] == "tiny"
    assert (one.gate["tokens"], one.gate["windows"], len(one.sites)) == (512, 32, 4)
    assert one.arrays["0.k"]["bits"].shape == (32,) == one.arrays["0.k"]["rate"].shape


def test_validation_of_wide_sites_of_counts_and_of_binary_spikes(small_task, batches):
    def validate(name, **overrides):
        task = small_task(name, **overrides)
        validator = asnn.SpikingBrainValidator(max_channels=8)
        return validator.validate(task.build_student(), task.teacher, batches, 4)

    told = validate("v14.4-rates").arrays
    assert len(told["0.ffn_hidden"]["rate"]) == 128
    assert {len(array["bits"]) for array in told.values()} == {8}
    assert 1.0 < validate("v14.3", spike_kind="integer:3").sites["0.k"]["entropy"] <= math.log2(7)
    told = validate("v14.3", spike_kind="binary").sites["0.k"]
    assert told["sign-locked channels"] > 0.5 > told["saturated channels"]


# ---- interventions -------------------------------------------------------------------------------


def damaged(kind, amount, x, seed=9):
    means = torch.linspace(-0.5, 0.5, x.shape[-1])
    return page.damaged(x, kind, amount, means, torch.Generator().manual_seed(seed))


# Spikes that can be told apart: (window, channel) in the thousands, the token in the rest.
NUMBERED = torch.arange(24).view(3, 1, 8) * 1000.0 + torch.arange(1, 201).view(1, 200, 1)


def test_zero_mean_flip_and_delay():
    x = ternary(torch.randn(4, 200, 50)).float()
    assert not damaged("zero", 0, x).any() and damaged("mean", 0, x.half()).dtype == torch.float16
    assert torch.equal(damaged("mean", 0, x), torch.linspace(-0.5, 0.5, 50).expand(4, 200, 50))
    assert torch.equal(damaged("flip", 0, x), x) and torch.equal(damaged("flip", 1, x), -x)
    out = damaged("flip", 0.3, x)
    assert torch.equal(out.abs(), x.abs())
    assert (out[x != 0] != x[x != 0]).float().mean() == pytest.approx(0.3, abs=0.01)
    with pytest.raises(KeyError, match="noise"):
        damaged("noise", 0, x)
    for amount in (1, 3):  # no token sees its future
        out = damaged("delay", amount, NUMBERED)
        late, start = (NUMBERED - out)[:, amount:], out[:, :amount]
        assert late.unique().tolist() == list(range(amount + 1))
        known = torch.isin(NUMBERED[:, :amount] - start, torch.arange(amount + 1.0))
        assert ((start == 0) | known).all() and (start == 0).any()


@pytest.mark.parametrize("amount", [1, 2, 5, 64])
def test_shuffle_and_jitter_permute_the_tokens_of_a_window(amount):
    out, far = damaged("jitter", amount, NUMBERED), damaged("shuffle", 0, NUMBERED)
    assert torch.equal(out.sort(1).values, NUMBERED) and torch.equal(far.sort(1).values, NUMBERED)
    assert min(amount, 2) <= (out - NUMBERED).abs().max() <= amount < (far - NUMBERED).abs().max()
    source = (far % 1000).transpose(1, 2).flatten(0, 1)
    assert len(source.unique(dim=0)) == 24  # another way for each channel
    assert torch.equal(damaged("shuffle", 0, NUMBERED), far)
    assert not torch.equal(damaged("shuffle", 0, NUMBERED, seed=1), far)


def test_interventions_are_what_hooks_do_by_hand(task, student):
    with torch.no_grad():  # louder branches, so that spikes matter
        for block in student.goose.blocks:
            block.time_mix.output.weight.mul_(20)
    tokens = task.tokens["validation"][:33]

    def score():
        return asnn.evaluate(student, tokens, 16)

    plan = [("0.v", ["0.v"], "mean", 0), ("all.k", ["0.k", "1.k"], "zero", 0),
            ("0.k", ["0.k"], "flip", 0.0), ("1.v", ["1.v"], "shuffle", 0)]
    intact, mean, zero, nothing, shuffled = page.intervene(student, score, plan, seed=3)
    assert hooks(student) == 0 and intact["ppl"] == score().ppl
    assert (nothing["rise"], nothing["error"]) == (1, 0) and abs(shuffled["rise"] - 1) > 1e-4
    ids = torch.from_numpy(tokens[:32].astype(np.int64)).view(2, 16)
    spikes, _ = asnn.SpikingBrainValidator().record(student, task.teacher, [ids])
    rate = spikes["0.v"].float().mean((0, 1))
    with asnn.spike_hooks(student, lambda name, s: rate.expand_as(s), ["0.v"]):
        assert mean["ppl"] == pytest.approx(score().ppl, rel=1e-5)
    with asnn.spike_hooks(student, lambda name, s: 0 * s, ["0.k", "1.k"]):
        silent = score()
    assert (zero["rise"], zero["error"]) == silent.gap(score()) and zero["error"] > 0


# ---- remedy --------------------------------------------------------------------------------------


def loud(student, alpha=0.25):
    """A student that fires too often."""
    with torch.no_grad():
        for module in asnn.spike_modules(student).values():
            module.alpha.mul_(alpha)
    return student.eval()


@pytest.mark.parametrize("name", ["v14.3", "v14.4-rates"])
def test_the_mixed_threshold_fires_as_before_or_at_the_end_of_the_band(small_task, name, batches):
    ids, student, rates = torch.cat(batches), loud(small_task(name).build_student(), 0.6), []
    before = {n: p.clone() for n, p in student.state_dict().items()}
    mended = page.with_mixed_threshold(student, ids, band=(0.35, 0.6))
    assert mended.config.threshold == "mixed_fixed" and student.config.threshold == "token"
    assert all(torch.equal(p, before[n]) for n, p in student.state_dict().items())
    for model in (student, mended):
        found = {}
        with torch.no_grad(), asnn.spike_hooks(model, lambda name, s: found.update(
                {name: (s != 0).float().mean((0, 1))})):
            model(ids)
        rates.append(found)
    everything = torch.cat(list(rates[0].values()))
    assert everything.min() < 0.35 and everything.max() > 0.6 and hooks(student, mended) == 0
    for site, rate in rates[0].items():  # some inputs are the same
        torch.testing.assert_close(rates[1][site], rate.clamp(0.35, 0.6), rtol=0, atol=0.03)


@pytest.mark.parametrize("failed, expected", [
    ("firing rate", ("mixed_fixed", 3.0, 0.0)), ("dead channels", ("mixed_fixed", 3.0, 0.0)),
    ("CKA", ("token", 0.0, 0.05)), ("mutual information", ("token", 0.0, 0.05)),
    (None, ("mixed_fixed", 3.0, 0.05))])
def test_a_remedy_has_the_parts_that_the_gate_calls_for_and_each_can_be_switched(failed, expected):
    gate = {"metrics": {name: {"pass": name != failed} for name in asnn.GATE}}
    recipe = asnn.get_recipe("v14.4", "tiny", fdd="cka_delta", hidden_weight=0.5)

    def parts(*given, recipe=recipe):
        r = page.remedy_recipe(recipe, gate, 7, *given)
        assert (r.distill_steps, r.align_steps, r.hidden_weight, r.fdd) == (7, 0, 0, "none")
        assert (r.lr, r.matrix_lr) == (0.3 * recipe.lr, 0.3 * recipe.matrix_lr)
        assert (r.temperature, r.curriculum, r.seed) == ("fixed", "none", recipe.seed + 1)
        return r.threshold, r.rate_weight, r.spike_align_weight

    assert parts() == expected and parts(True, 0, 0.5) == ("mixed_fixed", 0.0, 0.5)
    assert parts(False, 2.0, 0) == ("token", 2.0, 0.0)
    assert parts(recipe=recipe.replace(rate_weight=10.0))[1] == 10.0


@pytest.fixture
def mend(small_task, batches, tmp_path):
    """mend(folder, steps, ...): (student that fires too often, what the page's `mend` gives)"""
    def make(folder="run", steps=6, mixed=True, rate=5.0, align=0.05, max_hours=None, **overrides):
        task = small_task("v14.3", final_windows=8, **overrides)
        student, gate = loud(task.build_student()), {"metrics": {}}
        mending = page.remedy_recipe(task.recipe, gate, steps, mixed, rate, align, max_hours)
        return student, page.mend(task, student, mending, tmp_path / folder, lambda model, meta: (
            asnn.SpikingBrainValidator().validate(model, task.teacher, batches, meta=meta)))
    return make


def test_a_student_that_fires_too_often_fires_less_after_its_remedy(mend, batches):
    student, (mended, result, after) = mend()
    assert min(asnn.firing_rates(student, torch.cat(batches)).values()) > 0.6
    assert all(0.2 < row["firing rate"] < 0.6 for row in after.sites.values())
    assert student.config.threshold == "token" and mended.config.threshold == "mixed_fixed"
    assert after.meta["remedy of"] == student.content_hash() != after.meta["student"]
    assert after.meta["student"] == mended.content_hash() and result.step == 6
    rise = after.meta["PPL after"] / after.meta["PPL before"] - 1
    entry = after.gate["metrics"]["PPL rise"]
    assert entry["value"] == pytest.approx(rise) and entry["pass"] == (rise <= 0.02)
    assert all({"rate", "spike alignment"} <= set(row) for row in result.log if "loss" in row)
    assert not mended.training and hooks(student, mended) == 0


def test_rates_fall_by_training_alone_and_a_part_that_is_off_does_nothing(mend):
    _, (mended, result, _) = mend(steps=25, mixed=False, rate=20.0, align=0, lr=2e-2)
    rates = [row["rate"] for row in result.log if "rate" in row]
    assert rates[-1] < 0.7 * rates[0] and mended.config.threshold == "token"
    assert all("spike alignment" not in row for row in result.log)
    student, (mended, result, _) = mend("other", mixed=False, rate=0, align=0)
    assert all({"rate", "spike alignment", "fdd"}.isdisjoint(row) for row in result.log)
    assert mended.config.to_dict() == student.config.to_dict()


def test_a_remedy_that_its_budget_ends_is_not_judged_and_goes_on(mend):
    _, (cut, result, judged) = mend("cut", max_hours=1e-9)
    assert (result.stopped, result.finished, judged) == ("time budget", False, None)
    (_, again), (_, whole) = mend("cut"), mend("whole")
    assert again[1].finished and again[1].step == whole[1].step == 6 > result.step
    assert again[0].content_hash() == whole[0].content_hash() != cut.content_hash()
    assert again[2].gate == whole[2].gate
