"""SpikingBrain: estimators against known truths, coverage, capture, the gate, interventions and the remedy."""
import contextlib
import copy
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import lfilter
from scipy.stats import binomtest, norm
from sklearn.linear_model import LogisticRegression

import asnn_common as asnn

QUICK = {"components": 8, "shifts": 100, "refits": 10}


def ternary(x, theta=0.8):
    return (x.sign() * (x.abs() > theta)).to(torch.int8)


def windows_of(n, length=25):
    return torch.arange(n) // length


def correlated_in_time(n, columns, run=20):
    """AR(1) series of variance 1 whose correlation falls to 1/e within `run` tokens, (n, columns)."""
    r, rng = math.exp(-1 / run), np.random.default_rng(int(torch.randint(2**31, ())))
    noise = rng.standard_normal((n + 10 * run, columns))
    return torch.from_numpy(lfilter([math.sqrt(1 - r * r)], [1, -r], noise, axis=0)[10 * run:]).float()


def bits(p):
    """Entropy over the last axis of probabilities."""
    return -(p * p.clamp_min(1e-12).log2()).sum(-1)


def record_of(spikes, hidden, length=32, control=None):
    """A SpikeRecord of windows of one length, with what nobody asked for left empty."""
    n = len(next(iter(hidden.values())))
    return asnn.SpikeRecord(spikes, hidden, windows_of(n, length), torch.arange(n) % length, torch.full((n,), -1),
                            control or {}, dict.fromkeys(spikes, 1))


def hooks(*models):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


# ---- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 40, 1000])
def test_wilson_interval_is_that_of_scipy(n):
    counts = np.unique(np.linspace(0, n, 6).astype(int))
    low, high = asnn.wilson_interval(counts, n)
    for k, *ends in zip(counts, low, high):
        assert ends == pytest.approx(list(binomtest(int(k), n).proportion_ci(method="wilson")), abs=1e-5)
    assert tuple(map(float, asnn.wilson_interval(int(counts[1]), n))) == (low[1], high[1])


def test_without_observations_a_share_may_be_anything():
    low, high = asnn.wilson_interval(np.zeros(3), 0)
    assert low.tolist() == [0, 0, 0] and high.tolist() == [1, 1, 1]
    assert tuple(map(float, asnn.wilson_interval(0, 0))) == (0, 1)


def coverage(intervals, truth):
    low, high = np.array(intervals).T
    return np.mean((low <= truth) & (truth <= high))


@pytest.mark.parametrize("share, n", [(0.05, 100), (0.3, 60), (0.5, 768)])
def test_wilson_covers_the_truth(share, n):
    low, high = asnn.wilson_interval(np.random.default_rng(1).binomial(n, share, 200), n)
    assert 0.90 <= coverage(np.stack((low, high), 1), share) <= 0.99


def test_bootstrap_covers_a_mean_and_a_ratio_of_means():
    rng = np.random.default_rng(0)
    draws = rng.gamma(2.0, 0.5, (200, 60, 2)) * (3.0, 1.0)
    means = [asnn.bootstrap_interval(rows, draws=500, seed=i) for i, rows in enumerate(draws)]
    ratios = [asnn.bootstrap_interval(rows, lambda m: m[:, 0] / m[:, 1], draws=500) for rows in draws]
    assert 0.90 <= coverage(means, 3.0) <= 0.99
    assert 0.90 <= coverage(ratios, 3.0) <= 0.99
    assert asnn.bootstrap_interval(np.full(9, 2.5)) == (2.5, 2.5)
    assert asnn.bootstrap_interval(draws[0]) == asnn.bootstrap_interval(draws[0])


def gaussian_pair(n, d=4, channels=6, batch=()):
    """x (*batch, n, d), y = x A + noise of unit variance each, and their correlation matrix (d, channels)."""
    A = torch.randn(d, channels, generator=torch.Generator().manual_seed(5))
    scale = (A.square().sum(0) + 1.5).sqrt()
    x = torch.randn(*batch, n, d)
    y = (x @ A + math.sqrt(1.5) * torch.randn(*batch, n, channels)) / scale
    R, Ryy = A / scale, (A.t() @ A + 1.5 * torch.eye(channels)) / scale.unsqueeze(1) / scale
    return x, y, float(R.square().sum() / (math.sqrt(d) * Ryy.norm()))


def test_cka_interval_covers_the_truth():
    x, y, truth = gaussian_pair(32, batch=(200, 30))
    intervals = []
    for a, b in zip(x, y):
        K, L = (torch.stack([asnn.RepresentationAnalyzer._kernel(part) for part in side]) for side in (a, b))
        terms = torch.stack([asnn.hsic_of_kernels(p, q).diagonal() for p, q in ((K, L), (K, K), (L, L))], -1)
        intervals.append(asnn.bootstrap_interval(terms.numpy(), asnn.cka_of_terms, draws=500))
    assert 0.90 <= coverage(intervals, truth) <= 0.99


CHANNEL = torch.tensor([[0.0, 0.5, 1.4], [0.0, -1.2, 0.3]])  # logits of -1, 0, 1 for two features


def test_probe_interval_covers_the_truth():
    q = (torch.randn(400_000, 2) @ CHANNEL).softmax(-1)
    truth = float(bits(q.mean(0)) - bits(q).mean())
    probe, window, intervals = asnn.MutualInformationEstimator(2, shifts=100, refits=0), windows_of(3000), []
    for _ in range(200):
        x = torch.randn(3000, 2)
        s = torch.multinomial((x @ CHANNEL).softmax(-1), 1).to(torch.int8) - 1
        intervals.append(probe.probe(x, s, window)["interval"])
    assert 0.90 <= coverage(intervals, truth) <= 0.99


# ---- mutual information: counts ------------------------------------------------------------------


def tables(rows, columns, R, S):
    """Contingency tables (draws, R, S) of codes (draws, n)."""
    return np.stack([np.bincount(r * S + c, minlength=R * S).reshape(R, S) for r, c in zip(rows, columns)])


@pytest.mark.parametrize("n", [300, 1000, 4000])
def test_counts_of_independent_codes_say_nothing_but_their_bias(n):
    rng = np.random.default_rng(n)
    plain, corrected = asnn.miller_madow(tables(rng.integers(0, 8, (400, n)), rng.integers(0, 3, (400, n)), 8, 3))
    bias = 7 * 2 / (2 * n * math.log(2))
    assert plain.mean() == pytest.approx(bias, rel=0.1) and (plain >= 0).all()
    assert abs(corrected.mean()) < 0.1 * bias


@pytest.mark.parametrize("n", [300, 1000, 4000])
def test_counts_of_a_deterministic_code_give_its_entropy(n):
    rows = np.random.default_rng(n).integers(0, 6, (100, n))
    plain, corrected = asnn.miller_madow(tables(rows, rows % 3, 6, 3))
    assert plain.mean() == pytest.approx(math.log2(3), abs=3 / n)
    assert corrected.mean() == pytest.approx(math.log2(3), abs=0.5 / n)


@pytest.mark.parametrize("n", [300, 1000, 4000])
@pytest.mark.parametrize("S, error", [(2, 0.11), (3, 0.2)])
def test_counts_of_a_noisy_channel_give_its_information(S, error, n):
    rng = np.random.default_rng(n)
    sent = rng.integers(0, S, (400, n))
    got = np.where(rng.random(sent.shape) < error, (sent + rng.integers(1, S, sent.shape)) % S, sent)
    truth = math.log2(S) + (1 - error) * math.log2(1 - error) + error * math.log2(error / (S - 1))
    plain, corrected = asnn.miller_madow(tables(sent, got, S, S))
    margin = 3 * corrected.std() / 20
    assert corrected.mean() == pytest.approx(truth, abs=margin + 1 / n)
    assert plain.mean() == pytest.approx(truth + (S - 1) ** 2 / (2 * n * math.log(2)), abs=margin + 1 / n)


@pytest.mark.parametrize("n", [1000, 4000])
def test_binned_components_find_what_there_is_and_nothing_else(n):
    x, estimate = torch.randn(n, 4), asnn.MutualInformationEstimator(shifts=100)
    inside = float(norm.ppf(11 / 16))  # on an edge of the 16 bins, so that a bin decides the spike
    told = estimate.plug_in(x, ternary(x, inside), windows_of(n))
    assert told["bits"] == pytest.approx(bits(torch.tensor([5, 6, 5]) / 16).item(), abs=0.12 if n == 1000 else 0.08)
    assert told["mean"] > 100 * told["null high"] > 0 and abs(told["null mean"]) < 0.005
    noise = estimate.plug_in(x, ternary(torch.randn(n, 40)), windows_of(n))
    assert abs(noise["mean"]) < 0.005 and noise["mean"] < noise["plain"].mean() + 1e-9
    assert noise["mean"] < 0.01 > noise["null high"]


def test_the_founders_estimate_sees_a_fifth_of_a_bit_in_noise_where_ours_sees_none():
    x, s = torch.randn(2000, 8), ternary(torch.randn(2000, 64))
    estimate = asnn.MutualInformationEstimator(shifts=200, refits=20)
    value, noise = estimate.founders(x, s)
    assert value == pytest.approx(0.22, abs=0.05) and noise == pytest.approx(value, abs=0.03)
    assert value > asnn.GATE["mutual information"]  # it passes the gate on noise
    ours = estimate.probe(x, s, windows_of(2000))
    assert ours["mean"] < 0.005 and ours["mean p"] > 0.05
    counts = torch.randint(-3, 4, (2000, 8))  # and with more values more of it
    assert estimate.founders(x, counts, levels=3)[0] > 2 * value


# ---- mutual information: probe -------------------------------------------------------------------


@pytest.mark.parametrize("n", [1000, 4000])
def test_probe_finds_nothing_in_independent_spikes(n):
    found = asnn.MutualInformationEstimator(shifts=200, refits=40).probe(
        torch.randn(n, 4), ternary(torch.randn(n, 100)), windows_of(n))
    assert -30 / n < found["mean"] < 0 and found["bits"].max() < 10 / n
    assert found["mean p"] > 0.05 and -30 / n < found["null mean"] < 0
    assert found["null mean"] < found["null high"] < 10 / n
    assert found["mean"] == pytest.approx(found["null mean"], abs=6 / n)
    assert found["interval"][0] < found["mean"] < found["interval"][1] < 0


@pytest.mark.parametrize("n, share", [(1000, 0.75), (4000, 0.82)])
@pytest.mark.parametrize("theta", [0.0, 0.8])
def test_probe_of_a_deterministic_spike_nears_its_entropy_from_below(theta, n, share):
    x = torch.randn(n, 4)
    s = ternary(x, theta)
    entropy = asnn.entropy_bits(np.stack([(s == k).sum(0).numpy() for k in (-1, 0, 1)], -1))
    found = asnn.MutualInformationEstimator(shifts=200, refits=5).probe(x, s, windows_of(n))
    assert (found["bits"] <= entropy).all() and (found["bits"] > share * entropy).all()
    assert (found["p"] == 1 / 201).all() and (found["q"] == 1 / 201).all() and found["mean p"] == 1 / 201


@pytest.mark.parametrize("n", [2000, 8000])
def test_probe_of_a_logistic_channel_gives_its_information(n):
    W = 1.2 * torch.randn(16, 4, 3)  # sixteen channels of four features
    q = torch.einsum("np,cpk->nck", torch.randn(50_000, 4), W).softmax(-1)
    truth = (bits(q.mean(0)) - bits(q).mean(0)).numpy()
    x = torch.randn(n, 4)
    q = torch.einsum("np,cpk->nck", x, W).softmax(-1)
    s = (torch.multinomial(q.flatten(0, 1), 1).view(n, -1) - 1).to(torch.int8)
    found = asnn.MutualInformationEstimator(iterations=100, shifts=100, refits=0).probe(x, s, windows_of(n))
    assert found["interval"][0] <= truth.mean()
    assert found["mean"] == pytest.approx(truth.mean(), abs=0.02 if n == 2000 else 0.01)
    error = 1.0 / math.sqrt(n)  # of one channel
    assert (found["bits"] < truth + 3 * error).all() and (found["bits"] > truth - 3 * error - 12 / n).all()


@pytest.mark.parametrize("n", [2000, 8000])
@pytest.mark.parametrize("rho", [0.3, 0.7, 0.95])
def test_probe_of_a_gaussian_behind_a_threshold_gives_its_information_from_below(rho, n):
    """s = ternary(rho x + sqrt(1 - rho^2) z): the truth is an integral over x."""
    spread, at = math.sqrt(1 - rho**2), np.linspace(-8, 8, 4001)
    up, down = norm.sf((0.8 - rho * at) / spread), norm.cdf((-0.8 - rho * at) / spread)
    q = torch.from_numpy(np.stack((down, 1 - up - down, up), -1)).clamp_min(0)
    weight = torch.from_numpy(norm.pdf(at) * (at[1] - at[0]))
    truth = float(bits(weight @ q) - weight @ bits(q))
    x = torch.randn(n, 4)
    s = ternary(rho * x[:, :1] + spread * torch.randn(n, 24))
    found = asnn.MutualInformationEstimator(shifts=100, refits=0).probe(x, s, windows_of(n))
    assert found["interval"][0] <= truth
    assert 0.9 * truth - 20 / n < found["mean"]
    assert (found["bits"] < truth + 3.5 / math.sqrt(n)).all()


def test_probe_is_the_logistic_regression_of_scikit_learn():
    x = torch.randn(600, 5)
    estimate = asnn.MutualInformationEstimator(iterations=2000, ridge=3.0)
    target = (x @ torch.randn(5, 2) + torch.randn(600, 2) > 0.5).int()
    W = estimate.fit(x, target, 2)  # of two classes the parameters are the same
    assert W.shape == (6, 2, 1)
    for c in range(2):
        model = LogisticRegression(C=1 / 3.0, tol=1e-10, max_iter=2000).fit(x, target[:, c])
        assert W[:-1, c, 0].tolist() == pytest.approx(model.coef_[0].tolist(), abs=2e-4)
        assert float(W[-1, c, 0]) == pytest.approx(float(model.intercept_[0]), abs=2e-4)
    # Of three, class 0 is our reference and theirs is symmetric: with little ridge the predictions agree.
    target = torch.multinomial((x @ torch.randn(5, 3)).softmax(-1), 1).int()
    fold = (torch.arange(600) >= 300).long()
    for iterations, margin in ((2000, 1e-3), (50, 5e-3)):  # and nearly so after as many steps as a validation takes
        estimate = asnn.MutualInformationEstimator(iterations=iterations, ridge=1e-2)
        log_q = estimate.log_probabilities(x, target, 3, fold)
        torch.testing.assert_close(log_q.exp2().sum(-1), torch.ones(600, 1))
        for f in (0, 1):
            model = LogisticRegression(C=100, tol=1e-10, max_iter=2000).fit(x[fold != f], target[fold != f, 0])
            theirs = model.predict_log_proba(x[fold == f])[range(300), target[fold == f, 0]].mean() / math.log(2)
            ours = log_q[fold == f, 0].gather(1, target[fold == f].long()).mean()
            assert float(ours) == pytest.approx(theirs, abs=margin)


@pytest.mark.parametrize("name, value, least", [("components", 0, 1), ("folds", 1, 2), ("iterations", 2.5, 1),
                                                ("shifts", 99, 100), ("refits", -1, 0), ("bins", 1, 2)])
def test_estimator_refuses_wrong_settings(name, value, least):
    with pytest.raises(ValueError, match=f"{name} is {value}; allowed: a whole number from {least}"):
        asnn.MutualInformationEstimator(**{name: value})


def test_folds_are_blocks_of_whole_windows():
    window = torch.arange(10).repeat_interleave(4)
    fold = asnn.MutualInformationEstimator(folds=3).blocks(window)
    assert fold.tolist() == sorted(fold.tolist()) and fold.unique().tolist() == [0, 1, 2]
    assert all(len(fold[window == w].unique()) == 1 for w in range(10))
    with pytest.raises(ValueError, match="windows is 1; allowed: at least the 2 folds"):
        asnn.MutualInformationEstimator().blocks(torch.zeros(9))


@pytest.mark.parametrize("K", [3, 7])
def test_all_shifts_at_once_are_the_shifts_one_by_one(K):
    n, C, away = 240, 70, 11  # more channels than one part takes
    log_q = torch.randn(n, C, K).log_softmax(-1) / math.log(2)
    target = torch.randint(0, K, (n, C))
    estimate = asnn.MutualInformationEstimator(shifts=150)
    got = estimate._shifted(log_q, target, away)
    lags = np.unique(np.linspace(away, n - away, 150).astype(int))
    slow = np.stack([estimate._gain(log_q, target.roll(int(lag), 0)).mean(0).numpy() for lag in lags])
    assert got == pytest.approx(slow, abs=1e-5)


def test_exchanged_windows_are_those_of_a_cycle_one_by_one():
    log_q = torch.randn(120, 5, 3).log_softmax(-1) / math.log(2)
    target, window = torch.randint(0, 3, (120, 5)), windows_of(120, 12)
    estimate, rng = asnn.MutualInformationEstimator(shifts=100, seed=4), np.random.default_rng(4)
    (got, own), slow = estimate._exchanged(log_q, target, window), []
    for _ in range(100):
        order = rng.permutation(10)
        source = np.empty(10, int)
        source[order] = np.roll(order, 1)
        assert (source != np.arange(10)).all() and sorted(source) == list(range(10))
        slow.append(estimate._gain(log_q, target.view(10, 12, 5)[source].flatten(0, 1)).mean(0).numpy())
    assert got == pytest.approx(np.stack(slow), abs=1e-5)
    assert own == pytest.approx(estimate._gain(log_q, target).mean(0).numpy(), abs=1e-5)


def test_spikes_that_know_nothing_but_their_position_are_no_evidence():
    n, at = 3000, (torch.arange(3000) % 25 - 12).unsqueeze(1) / 7.2
    x = asnn.whitened_components(torch.cat((at + 0.3 * torch.randn(n, 1), torch.randn(n, 3)), 1), 4)
    told = asnn.MutualInformationEstimator(shifts=300, refits=20).probe(
        x, ternary(at + 0.5 * torch.randn(n, 60)), windows_of(n))
    assert told["mean"] > 0.1 and np.mean(told["p"] < 0.05) < 0.12 and told["mean p"] > 0.05


@pytest.mark.parametrize("more", [0, 1, 2, 24])
def test_a_window_that_was_cut_short_takes_no_evidence_away(more):
    n, x = 5000 + more, torch.randn(5024, 4)
    s = ternary(0.2 * x[:, :1] + torch.randn(5024, 20))
    told = asnn.MutualInformationEstimator(shifts=500, refits=0).probe(x[:n], s[:n], windows_of(n))
    assert told["mean"] == pytest.approx(0.017, abs=0.006)
    assert (told["p"] < 0.01).mean() >= 0.8 and told["mean p"] == 1 / 501


# The two halves of a cross-fit share what they learn from each other, which makes these values a little too small.
@pytest.mark.parametrize("components, highest", [(4, 0.08), (32, 0.12)])
def test_p_values_of_independent_spikes_are_about_uniform(components, highest):
    p, found = [], 0
    for _ in range(4):
        told = asnn.MutualInformationEstimator(components, shifts=500, refits=0).probe(
            torch.randn(2000, components), ternary(torch.randn(2000, 150)), windows_of(2000))
        p, found = [*p, *told["p"]], found + (told["q"] < 0.05).sum()
    assert 0.02 < np.mean(np.array(p) < 0.05) < highest
    assert 0.2 < np.mean(np.array(p) < 0.5) < 0.6 and 0.4 < np.mean(p) < 0.7
    assert found <= 6


def test_q_values_find_the_channels_that_tell_something():
    x = torch.randn(3000, 8)
    s = ternary(torch.cat((0.4 * x[:, :5] + torch.randn(3000, 5), torch.randn(3000, 95)), 1))
    told = asnn.MutualInformationEstimator(shifts=999, refits=0).probe(x, s, windows_of(3000))
    assert (told["q"][:5] < 0.05).all() and (told["p"][:5] <= 0.002).all()
    assert (told["q"][5:] < 0.05).sum() <= 2 and (told["q"] >= told["p"]).all()


def test_a_channel_that_is_always_the_same_is_never_informative():
    """Each shift of it gives the value itself, and rounding is no evidence."""
    for _ in range(8):
        s = ternary(torch.randn(1500, 6))
        s[:, 2], s[:, 4] = 0, 1
        told = asnn.MutualInformationEstimator(shifts=200, refits=0).probe(torch.randn(1500, 4), s, windows_of(1500))
        assert (told["bits"][[2, 4]] <= 0).all() and (told["p"][[2, 4]] > 0.9).all()


def test_spikes_that_last_are_not_taken_for_information():
    """Independent, but 20 tokens long: shifts keep that, where a permutation of tokens would find a lot."""
    p, naive = [], []
    for _ in range(2):
        x, s = asnn.whitened_components(correlated_in_time(2000, 4), 4), ternary(correlated_in_time(2000, 100))
        estimate = asnn.MutualInformationEstimator(shifts=300, refits=0)
        told = estimate.probe(x, s, windows_of(2000))
        p.append(told["p"])
        target = s.int() + 1
        log_q = estimate.log_probabilities(x, target, 3, estimate.blocks(windows_of(2000)))
        permuted = np.stack([estimate._gain(log_q, target[torch.randperm(2000)]).mean(0).numpy() for _ in range(60)])
        naive.append((1 + (permuted >= told["bits"]).sum(0)) / 61)
    assert np.mean(np.array(p) < 0.05) <= 0.12 < np.mean(np.array(naive) < 0.05)


def test_components_are_whitened_and_in_order():
    hidden = torch.randn(500, 6) @ torch.diag(torch.tensor([9.0, 5, 3, 1, 0.5, 0])) + 7
    x = asnn.whitened_components(hidden, 64)
    assert x.shape == (500, 5)  # the sixth channel is constant
    torch.testing.assert_close(x.t() @ x / 500, torch.eye(5), rtol=0, atol=1e-3)
    assert torch.corrcoef(torch.stack((x[:, 0], hidden[:, 0])))[0, 1].abs() > 0.98
    torch.testing.assert_close(asnn.whitened_components(hidden, 2), x[:, :2])
    assert asnn.whitened_components(torch.ones(9, 3), 2).shape == (9, 0)


def test_what_spikes_tell_of_the_token_to_come():
    n, window = 4000, windows_of(4000)
    vocabulary, hidden, tokens = torch.randn(50, 4), torch.randn(n, 4), torch.randint(0, 50, (n,))
    tokens[24::25] = -1  # the last of a window
    estimate = asnn.MutualInformationEstimator()
    embedded = vocabulary[tokens.clamp_min(0)]
    told = {name: estimate.next_token(hidden, embedded, s, tokens, window) for name, s in {
        "token": ternary(embedded), "hidden": ternary(hidden), "noise": ternary(torch.randn(n, 4))}.items()}
    assert told["token"]["next token"] > 0.9 and told["token"]["beyond teacher"] > 0.9
    assert told["token"]["beyond teacher interval"][0] > told["token"]["beyond teacher null"] + 0.8
    for name in ("hidden", "noise"):
        assert abs(told[name]["next token"]) < 0.01
        assert told[name]["beyond teacher"] == pytest.approx(told[name]["beyond teacher null"], abs=0.006)
        low, high = told[name]["beyond teacher interval"]
        assert low < told[name]["beyond teacher"] < high < 0.01


# ---- CKA -----------------------------------------------------------------------------------------


def kernels(parts):
    return torch.stack([asnn.RepresentationAnalyzer._kernel(part) for part in parts])


def test_hsic_of_kernels_is_that_of_features_for_every_pair():
    X, Y = [torch.randn(30, d) + 2 for d in (3, 8, 40)], [3 * torch.randn(30, d) for d in (5, 2)]
    X[1][:, :2] += Y[1]
    expected = torch.stack([torch.stack([asnn.unbiased_hsic(x, y) for y in Y]) for x in X])
    torch.testing.assert_close(asnn.hsic_of_kernels(kernels(X), kernels(Y)), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(asnn.hsic_of_kernels_diagonal(kernels(X)),
                               torch.stack([asnn.unbiased_hsic(x, x) for x in X]), rtol=1e-4, atol=1e-3)


def test_minibatch_cka_averages_before_the_ratio():
    pairs = []
    for scale in (1.0, 4.0, 0.3):
        x = scale * torch.randn(20, 5)
        pairs.append((x, x[:, :2] + torch.randn(20, 2)))
    K, L = (kernels(side) for side in zip(*pairs))
    terms = torch.stack([asnn.hsic_of_kernels(a, b).diagonal() for a, b in ((K, L), (K, K), (L, L))], -1)  # (3, 3)
    xy, xx, yy = (sum(float(asnn.unbiased_hsic(a, b)) for a, b in same) for same in
                  (pairs, [(x, x) for x, _ in pairs], [(y, y) for _, y in pairs]))
    value = float(asnn.cka_of_terms(terms.mean(0)))
    assert value == pytest.approx(xy / math.sqrt(xx * yy), rel=1e-4)
    mean_of_ratios = sum(float(asnn.linear_cka(x, y)) for x, y in pairs) / 3
    assert float(asnn.cka_of_terms(terms).mean()) == pytest.approx(mean_of_ratios, rel=1e-4)
    assert abs(value - mean_of_ratios) > 1e-2


def test_cka_of_nothing_is_zero():
    assert asnn.cka_of_terms([[0.0, 0.0, 2.0], [1.0, -1e-9, 2.0], [1.0, 4.0, 1.0]]).tolist() == [0, 0, 0.5]


def analyze(spikes, hidden, length=32, batch_tokens=128, shifts=50, control=None, layer=0):
    """{site: measures} of spikes {site: (n, C)}, all at one teacher layer."""
    return asnn.RepresentationAnalyzer(batch_tokens, shifts).analyze(
        record_of(spikes, hidden, length, control), dict.fromkeys(spikes, layer), progress=False)["sites"]


def test_cka_of_independent_spikes_is_nothing_and_of_the_same_is_everything():
    hidden = torch.randn(2560, 12)
    told = analyze({"noise": ternary(torch.randn(2560, 16)), "same": hidden.clone(), "shifted": 5 - 3 * hidden,
                    "rotated": hidden @ torch.linalg.qr(torch.randn(12, 12)).Q, "spikes": ternary(hidden)}, {0: hidden})
    noise = told["noise"]
    assert abs(noise["CKA"]) < 0.02 and noise["p"] > 0.05 and noise["CKA"] < noise["null high"] < 0.03
    assert abs(noise["null mean"]) < 0.01 and noise["interval"][0] < noise["CKA"] < noise["interval"][1]
    assert told["same"]["CKA"] == pytest.approx(1.0, abs=1e-5) == told["shifted"]["CKA"]
    assert told["rotated"]["CKA"] == pytest.approx(1.0, abs=0.01)
    assert 0.7 < told["spikes"]["CKA"] < 0.95
    assert all(told[name]["p"] == 1 / 51 for name in ("same", "rotated", "spikes"))
    assert told["same"]["minibatches"] == 20 and told["same"]["n"] == 128


@pytest.mark.parametrize("n, margin", [(640, 0.1), (2560, 0.05), (10_240, 0.025)])
def test_cka_of_correlated_gaussians_gives_the_value_of_the_population(n, margin):
    x, y, truth = gaussian_pair(n)
    assert 0.3 < truth < 0.9
    assert analyze({"x": x}, {0: y}, shifts=20)["x"]["CKA"] == pytest.approx(truth, abs=margin)


def test_heat_map_is_brightest_at_the_layer_that_the_spikes_come_from():
    hidden = {0: torch.randn(2560, 8)}
    for t in (1, 2, 3):
        hidden[t] = 0.6 * hidden[t - 1] @ torch.linalg.qr(torch.randn(8, 8)).Q + 0.8 * torch.randn(2560, 8)
    spikes = {f"{i}.k": ternary(hidden[t]) for i, t in enumerate((2, 0, 3, 1))}
    told = asnn.RepresentationAnalyzer(128, 20).analyze(record_of(spikes, hidden), dict.fromkeys(spikes, 1), progress=False)
    assert told["heat"].shape == (4, 4) and told["heat"].argmax(1).tolist() == [2, 0, 3, 1]
    assert told["layers"] == [0, 1, 2, 3] and told["names"] == list(spikes)
    for name, row in zip(spikes, told["heat"]):
        assert told["sites"][name]["CKA"] == pytest.approx(row[1]) and told["sites"][name]["teacher layer"] == 1


def test_biased_cka_passes_the_gate_on_noise_and_the_unbiased_one_does_not():
    n = d = 256
    told = analyze({"noise": ternary(torch.randn(20 * n, d))}, {0: torch.randn(20 * n, d)}, 64, n, 20,
                   {"noise": ternary(torch.randn(20 * n, d))})["noise"]
    assert told["biased noise"] == asnn.biased_noise_cka(n, d, d) == pytest.approx(0.5)
    assert told["biased"] == pytest.approx(0.5, abs=0.02) and told["biased"] > asnn.GATE["CKA"] > 0.29
    assert abs(told["CKA"]) < 0.01 and abs(told["control"]) < 0.01 and abs(told["raw"]) < 0.01
    assert asnn.biased_noise_cka(100, 10, 300) == pytest.approx(math.sqrt(10 / 110 * 300 / 400))


def test_cka_stands_on_all_channels_and_the_raw_value_on_the_loudest():
    hidden = torch.randn(2560, 10)
    spikes = {"0.k": ternary(hidden[:, :6] + 0.5 * torch.randn(2560, 6))}
    loud = hidden * torch.tensor([1000.0] + 9 * [1.0]) + 4
    before, after = (analyze(spikes, {0: h})["0.k"] for h in (hidden, loud))
    assert after["CKA"] == pytest.approx(before["CKA"], abs=1e-4) == pytest.approx(after["CKA"])
    assert after["null high"] == pytest.approx(before["null high"], abs=1e-4)
    assert abs(after["raw"] - before["raw"]) > 0.05 and before["raw"] == pytest.approx(before["CKA"], abs=0.05)


def test_dead_channels_count_nothing():
    hidden = torch.randn(1280, 10)
    s = ternary(hidden[:, :6])
    wide = torch.cat((s, torch.zeros(1280, 5, dtype=torch.int8), torch.ones(1280, 2, dtype=torch.int8)), 1)
    told = analyze({"0.k": s, "1.k": wide, "dead": torch.zeros_like(s)}, {0: torch.cat((hidden, torch.ones(1280, 3)), 1)})
    assert told["1.k"]["CKA"] == pytest.approx(told["0.k"]["CKA"], abs=1e-6) == pytest.approx(analyze(
        {"0.k": s}, {0: hidden})["0.k"]["CKA"], abs=1e-6)
    assert told["dead"]["CKA"] == 0 == told["dead"]["interval"][1] and told["dead"]["p"] == 1


def test_the_control_has_its_own_cka():
    hidden = torch.randn(1280, 8)
    told = analyze({"0.k": ternary(torch.randn(1280, 8))}, {0: hidden}, control={"0.k": ternary(hidden)})["0.k"]
    assert told["control"] > 0.7 and abs(told["CKA"]) < 0.05


@pytest.mark.parametrize("run", [3, 20])
def test_the_null_of_cka_knows_spikes_that_last(run):
    """Independent, but tokens long: HSIC is unbiased for independent samples, and the null has to say so."""
    n = 20 * 256
    told = analyze({f"{i}.k": ternary(correlated_in_time(n, 8, run)) for i in range(40)}, {
        0: correlated_in_time(n, 12, run)}, 64, 256, 100)
    assert np.mean([site["CKA"] for site in told.values()]) > 0.05
    assert np.mean([site["p"] < 0.05 for site in told.values()]) <= 0.12


def test_the_null_of_cka_knows_spikes_of_a_position():
    n = 20 * 128
    at = F.one_hot(torch.arange(n) % 32, 32).float() @ torch.randn(32, 8)
    told = analyze({f"{i}.k": ternary(at + torch.randn(n, 8)) for i in range(30)}, {0: at + torch.randn(n, 8)})
    assert np.mean([site["CKA"] for site in told.values()]) > 0.1
    assert np.mean([site["p"] < 0.05 for site in told.values()]) <= 0.12


@pytest.mark.parametrize("length", [4, 8, 512])
def test_windows_of_any_length_have_a_null(length):
    hidden = torch.randn(20 * 512, 6)
    told = analyze({"0.k": ternary(hidden), "0.v": ternary(torch.randn_like(hidden))}, {0: hidden}, length, 512, 20)
    assert told["0.k"]["p"] == 1 / 21 < told["0.v"]["p"] and abs(told["0.v"]["null mean"]) < 0.02


def test_minibatches_are_whole_windows_and_twenty_where_possible():
    window = torch.arange(100).repeat_interleave(12)
    parts = asnn.RepresentationAnalyzer(512).minibatches(window)
    assert len(parts) == 20 and torch.equal(torch.cat(parts), torch.arange(1200))
    assert all(set(window[part].tolist()).isdisjoint(window[other].tolist())
               for i, part in enumerate(parts) for other in parts[i + 1:])
    assert {len(p) for p in asnn.RepresentationAnalyzer(36).minibatches(window)} == {36, 12}
    with pytest.raises(ValueError, match="batch_tokens is 15; allowed: a whole number from 16"):
        asnn.RepresentationAnalyzer(15)
    with pytest.raises(ValueError, match="shifts is 19; allowed: a whole number from 20"):
        asnn.RepresentationAnalyzer(shifts=19)
    with pytest.raises(ValueError, match="tokens in a window is 7; allowed: at least 8"):
        analyze({"0.k": torch.ones(7, 3)}, {0: torch.randn(7, 3)})


# ---- health --------------------------------------------------------------------------------------


def check(s, length=50, levels=1):
    return asnn.SpikeHealthChecker().check(s, windows_of(len(s), length), torch.arange(len(s)) % length, levels)


def test_dead_saturated_and_sign_locked_channels_are_counted():
    s = torch.randint(-1, 2, (6000, 20), dtype=torch.int8)
    s[:, :2] = 0
    s[:, 2:5] = 2 * torch.randint(0, 2, (6000, 3)) - 1
    s[:, 5] = 1  # saturated, and of one sign
    s[:, 6] = s[:, 6].abs()
    s[:, 7:9] = 0
    s[:19, 7] = 1  # one event short of being called locked
    s[:20, 8] = -1
    told = check(s)
    assert told["channels"] == 20 and told["tokens"] == 6000
    for name, count in (("dead", 2), ("saturated", 6), ("sign-locked", 3)):  # one sign only counts as saturated too
        assert told[f"{name} channels"] == pytest.approx(count / 20)
        assert told[f"{name} channels interval"] == tuple(map(float, asnn.wilson_interval(count, 20)))
    fired = (s != 0).sum(0).numpy()
    assert told["rate"] == pytest.approx(fired / 6000)
    low, high = asnn.wilson_interval(fired, 6000)
    assert told["rate interval"] == pytest.approx(np.stack((low, high), 1))
    assert told["firing rate"] == pytest.approx(fired.mean() / 6000)
    low, high = told["firing rate interval"]
    assert low < told["firing rate"] < high < low + 0.02
    assert told["entropies"][:2].tolist() == [0, 0] and told["entropies"][5] == 0
    assert told["entropies"][2:5] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("levels, entropy", [(1, 1.585), (3, math.log2(7))])
def test_entropy_of_uniform_spikes_is_all_there_can_be(levels, entropy):
    s = torch.randint(-levels, levels + 1, (20_000, 8), dtype=torch.int8)
    told = check(s, levels=levels)
    assert told["entropy"] == pytest.approx(entropy, abs=2e-3) and told["entropy share"] == pytest.approx(1.0, abs=2e-3)
    assert told["firing rate"] == pytest.approx(2 * levels / (2 * levels + 1), abs=1e-2)
    assert asnn.entropy_bits(np.array([[0, 0, 0], [4, 4, 0], [1, 1, 2]])).tolist() == [0, 1, 1.5]


def test_participation_ratio_and_correlation_count_channels_that_say_different_things():
    s = ternary(torch.randn(20_000, 12))
    told = check(s)
    assert told["participation ratio"] == pytest.approx(12, abs=0.1) and told["correlation"] < 0.02
    copies = s[:, :1].repeat(1, 12) * torch.tensor([1, -1] * 6, dtype=torch.int8)
    told = check(torch.cat((copies, torch.zeros(20_000, 3, dtype=torch.int8)), 1))
    assert told["participation ratio"] == pytest.approx(1, abs=1e-3)
    assert told["correlation"] == pytest.approx(1, abs=1e-3)  # dead channels form no pairs
    told = check(torch.cat((s[:, :6], s[:, :6]), 1))
    assert told["participation ratio"] == pytest.approx(6, abs=0.1)
    assert told["correlation"] == pytest.approx(1 / 11, abs=0.02)
    dead = check(torch.zeros_like(s))
    assert math.isnan(dead["correlation"]) and dead["participation ratio"] == dead["entropy"] == dead["firing rate"] == 0


def test_wide_sites_take_part_with_evenly_spaced_channels():
    few = asnn.SpikeHealthChecker()
    few.MAX_CORRELATED = 6
    s = ternary(torch.randn(20_000, 12))
    s[:, 1::2] = s[:, :1]
    told = few.check(s, windows_of(20_000), torch.zeros(20_000, dtype=torch.long))
    assert told["participation ratio"] == pytest.approx(6, abs=0.1)


def test_firing_rate_by_position():
    s = torch.zeros(1000, 4, dtype=torch.int8)
    position = torch.arange(1000) % 50
    s[(position >= 10)] = 1
    s[(position >= 30)] = torch.tensor([-1, 0, 0, 1], dtype=torch.int8)
    told = check(s)
    assert told["by position"].tolist() == 10 * [0] + 20 * [1] + 20 * [0.5]


# ---- gate ----------------------------------------------------------------------------------------

N, WIDTH = 2560, 32


@pytest.fixture(scope="module")
def hidden():
    """Two layers that follow a few slow factors."""
    torch.manual_seed(3)
    factors, layers = correlated_in_time(N, 8, run=2), {}
    for t in (0, 1):
        layers[t] = factors @ torch.randn(8, WIDTH) / 3 + 0.5 * torch.randn(N, WIDTH)
    return layers


def judge(spikes, hidden, n_layer=1, meta=None):
    validator = asnn.SpikingBrainValidator(information=asnn.MutualInformationEstimator(16, shifts=200, refits=20),
                                           cka=asnn.RepresentationAnalyzer(128, 40))
    return validator.judge(record_of(spikes, hidden), n_layer, progress=False, meta=meta)


def standardised(layer):
    return (layer - layer.mean(0)) / layer.std(0)


def with_columns(spikes, count, values):
    spikes = spikes.clone()
    spikes[:, :count] = values[:, :count].to(spikes)
    return spikes


TARGETS = asnn.ternary_targets
TRAINS = {  # spikes of teacher states x (N, WIDTH), and the metrics that they fail
    "teacher-derived": (lambda x: TARGETS(x, WIDTH), ()),
    "one channel dead": (lambda x: with_columns(TARGETS(x, WIDTH), 1, 0 * x), ()),
    "two channels dead": (lambda x: with_columns(TARGETS(x, WIDTH), 2, 0 * x), ("dead channels",)),
    "three channels saturated": (lambda x: with_columns(ternary(standardised(x)), 3, standardised(x).sign()), ()),
    "four channels saturated": (lambda x: with_columns(ternary(standardised(x)), 4, standardised(x).sign()),
                                ("saturated channels",)),
    "rate too low": (lambda x: ternary(standardised(x), 1.5), ("firing rate",)),
    "rate too high": (lambda x: ternary(standardised(x), 0.3), ("firing rate",)),
    "noise": (lambda x: ternary(torch.randn(N, WIDTH)), ("mutual information", "CKA")),
    "another sequence": (lambda x: TARGETS(x, WIDTH).roll(N // 2, 0), ("mutual information", "CKA")),
    "all dead": (lambda x: 0 * x, ("dead channels", "firing rate", "mutual information", "CKA")),
    "all saturated": (lambda x: 0 * x + 1, ("saturated channels", "firing rate", "mutual information", "CKA")),
    "sign-locked": (lambda x: (standardised(x) > 0.4).float(), ("saturated channels",)),
}


@pytest.mark.parametrize("name", TRAINS)
def test_a_spike_train_fails_the_gates_it_was_made_to_fail_and_no_other(hidden, name):
    make, expected = TRAINS[name]
    result = judge({"0.k": make(hidden[1]).to(torch.int8)}, hidden)
    summary = result.summary
    assert tuple(summary["failed"]) == expected, result.gate["metrics"]
    assert summary["verdict"] == ("failed" if expected else "passed") == result.gate["verdict"]
    locked = {"sign-locked": 1.0, "all saturated": 1.0}.get(name, 0.0)
    assert result.sites["0.k"]["sign-locked channels"] == locked
    if name == "teacher-derived":
        assert all(metric["clear"] for name, metric in result.gate["metrics"].items() if "channels" not in name)
        assert result.sites["0.k"]["informative channels"] == 1.0


def test_many_channels_that_each_say_little_fail_the_information_alone():
    factor = torch.randn(N, 1)
    layer = factor + 0.1 * torch.randn(N, WIDTH)
    spikes = ternary(0.35 * factor + torch.randn(N, 128))
    assert judge({"0.k": spikes}, {0: layer, 1: layer}).summary["failed"] == ["mutual information"]


def test_spikes_of_what_is_a_small_part_of_the_teacher_fail_the_similarity_alone():
    factors = torch.randn(N, 5)
    layer = torch.cat((factors[:, :1].repeat(1, 28), factors[:, 1:]), 1) + 0.1 * torch.randn(N, WIDTH)
    spikes = ternary(factors[:, 1:].repeat(1, 4) + 0.3 * torch.randn(N, 16))
    assert judge({"0.k": spikes}, {0: layer, 1: layer}).summary["failed"] == ["CKA"]


def test_every_site_has_to_pass_and_the_gate_names_the_worst(hidden):
    good, noise = TARGETS(hidden[0], WIDTH).to(torch.int8), ternary(torch.randn(N, WIDTH))
    result = judge({"0.k": good, "0.v": good, "1.k": noise}, hidden, n_layer=2)
    metrics = result.gate["metrics"]
    assert [result.sites[name]["teacher layer"] for name in result.sites] == [0, 0, 1]
    for name in ("mutual information", "CKA"):
        assert metrics[name]["site"] == "1.k" and not metrics[name]["pass"] and not metrics[name]["clear"]
        assert (metrics[name]["sites passed"], metrics[name]["sites"]) == (2, 3)
        assert metrics[name]["value"] == result.sites["1.k"][name] and metrics[name]["p"] > 0.05
    assert metrics["firing rate"]["sites passed"] == 3
    assert result.heat.shape == (3, 2) and result.summary["sites"] == 3


@pytest.fixture(scope="module")
def passing(hidden):
    return judge({"0.k": TARGETS(hidden[1], WIDTH).to(torch.int8)}, hidden, meta={"student": "abc"})


def test_gate_reads_as_json_with_the_thresholds_of_the_design(passing):
    text = passing.to_json()
    told = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    gate = told["gate"]
    assert {name: metric["threshold"] for name, metric in gate["metrics"].items()} == {
        "dead channels": 0.05, "saturated channels": 0.10, "firing rate": [0.2, 0.6], "mutual information": 0.1, "CKA": 0.3}
    for name, metric in gate["metrics"].items():
        assert {"value", "interval", "null", "threshold", "pass"} <= set(metric) and metric["pass"] is True
        low, high = metric["interval"]
        assert low <= metric["value"] <= high
        assert (metric["null"] is None) == (name not in ("mutual information", "CKA"))
    assert gate["verdict"] == "passed" and gate["student"] == "abc" and gate["tokens"] == N and gate["version"] == "v15"
    assert told["sites"]["0.k"]["next token"] is None  # nobody gave embeddings
    assert np.array(told["heat"]) == pytest.approx(passing.heat)


@pytest.mark.parametrize("rise, verdict", [(-0.1, "passed"), (0.02, "passed"), (0.0201, "failed"), (0.5, "failed")])
def test_a_perplexity_that_rises_above_two_percent_fails_the_gate(passing, rise, verdict):
    result = asnn.ValidationResult({**passing.meta, "PPL rise": rise}, passing.sites, passing.arrays, passing.heat)
    assert result.gate["verdict"] == verdict == result.summary["verdict"]
    assert result.gate["metrics"]["PPL rise"]["threshold"] == 0.02
    assert ("PPL rise" in result.summary["failed"]) == (verdict == "failed")
    assert result.gate["metrics"]["PPL rise"]["value"] == json.loads(result.to_json())["gate"]["PPL rise"] == rise


@pytest.mark.parametrize("name, value, fails", [
    ("dead channels", 0.05, True), ("dead channels", 0.049, False), ("saturated channels", 0.1, True),
    ("firing rate", 0.2, False), ("firing rate", 0.6, False), ("firing rate", 0.601, True),
    ("mutual information", 0.1, True), ("mutual information", 0.101, False), ("mutual information p", 0.06, True),
    ("mutual information null", 2.0, True), ("CKA", 0.3, True), ("CKA null", 0.99, True), ("CKA p", 0.051, True)])
def test_the_edges_of_the_gate(passing, name, value, fails):
    sites = {"0.k": passing.sites["0.k"], "0.v": {**passing.sites["0.k"], name: value}}
    result = asnn.ValidationResult(passing.meta, sites, passing.arrays, passing.heat)
    assert result.summary["failed"] == ([name.removesuffix(" p").removesuffix(" null")] if fails else [])


def test_numbers_that_json_lacks_become_null():
    plain = asnn._plain({"a": math.nan, 2: [np.float32(1.5), np.int64(3), -math.inf], "c": np.array([1.0, math.nan]),
                         "d": {"e": (True, None, "x", np.bool_(False))}})
    assert plain == {"a": None, "2": [1.5, 3, None], "c": [1.0, None], "d": {"e": [True, None, "x", False]}}
    json.dumps(plain, allow_nan=False)


def test_sites_belong_to_the_end_of_their_span_or_where_the_map_says():
    names = ["0.k", "1.mix_in.k", "2.v", "head_in"]
    layer_of = asnn.SpikingBrainValidator().layer_of(names, 3, 6)
    assert layer_of == {"0.k": 1, "1.mix_in.k": 3, "2.v": 5, "head_in": 5}
    mapped = asnn.SpikingBrainValidator(layer_map={0: 0, 1: 0, 2: 4}).layer_of(names, 3, 6)
    assert mapped == {"0.k": 0, "1.mix_in.k": 0, "2.v": 4, "head_in": 5}


@pytest.mark.parametrize("layer_map, message", [
    ({0: 0, 1: 6, 2: 2}, "layer_map is (1, 6); allowed: student layers 0 to 2, teacher layers 0 to 5"),
    ({0: 0, 3: 1}, "layer_map is (3, 1)"), ({0: -1}, "layer_map is (0, -1)"),
    ({0: 0, 2: 1}, "layer_map is {0: 0, 2: 1}; allowed: a teacher layer for each of the 3 student layers")])
def test_layers_that_there_are_not_are_refused(layer_map, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        asnn.SpikingBrainValidator(layer_map=layer_map).layer_of(["0.k"], 3, 6)


@pytest.mark.parametrize("name", ["max_tokens", "max_channels"])
def test_validator_refuses_wrong_settings(name):
    with pytest.raises(ValueError, match=f"{name} is 0; allowed: a whole number from 1"):
        asnn.SpikingBrainValidator(**{name: 0})


# ---- capture -------------------------------------------------------------------------------------

STUDENTS = {"all sites": ("v14.4-sites", {"spike_sites": asnn.SITES}), "vector": ("v14.3", {}),
            "counts": ("v14.3", {"spike_kind": "integer:3", "alpha_init": 0.5}), "matrix": ("v14.4", {"state_kind": "matrix"}),
            "dense": ("v14.3", {"spike_kind": "dense"})}


@pytest.fixture
def student_of(small_recipe, teacher, tokens):
    """student_of(name, **overrides): a student as it starts."""
    def make(name="vector", **overrides):
        recipe, options = STUDENTS[name]
        batch = asnn.WindowSampler(tokens["train"], 16, 0).batch(0, 8)[0]
        return asnn.build_student(small_recipe(recipe, **{**options, **overrides}), teacher, calibration=batch)
    return make


@pytest.fixture
def batches(tokens):
    """Eight batches of four windows, (4, 16) each."""
    return list(torch.from_numpy(tokens["validation"][:8 * 64].astype(np.int64)).view(8, 4, 16))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["all sites", "vector", "matrix", "counts"])
def test_capture_sees_what_the_modules_fire(student_of, batches, name, training):
    student, given = student_of(name).train(training), {}
    modules = asnn.spike_modules(student)
    with contextlib.ExitStack() as stack, torch.no_grad():
        for site, module in modules.items():
            stack.callback(module.register_forward_pre_hook(
                lambda _m, args, site=site: given.setdefault(site, []).append(args[0])).remove)
        with asnn.SpikeCapture(student) as capture:
            expected = [student(batch).logits for batch in batches[:2]]
    assert hooks(student) == 0
    spikes = capture.spikes()
    assert list(spikes) == list(modules) and len(spikes) == {"all sites": 2 * 9 + 1}.get(name, 4)
    for site, module in modules.items():
        again = torch.cat([module.encode(x)[0].flatten(0, 1) for x in given[site]])
        assert spikes[site].dtype == torch.int8 and torch.equal(spikes[site].float(), again)
        assert spikes[site].unique().tolist() == ([-3, -2, -1, 0, 1, 2, 3] if name == "counts" else [-1, 0, 1])
    with torch.no_grad():
        assert all(torch.equal(student(batch).logits, logits) for batch, logits in zip(batches, expected))


def test_capture_keeps_the_first_tokens_of_the_sites_it_was_asked_for(student_of, batches):
    student = student_of()
    with asnn.SpikeCapture(student) as everything:
        student(torch.cat(batches[:3]))
    with asnn.SpikeCapture(student, 100, ["1.v"]) as capture:
        for batch in batches[:3]:
            student(batch)
    assert list(capture.spikes()) == ["1.v"]
    assert torch.equal(capture.spikes()["1.v"], everything.spikes()["1.v"][:100])
    with pytest.raises(ValueError, match="max_tokens is 0; allowed: a whole number from 1"):
        asnn.SpikeCapture(student, 0)


def test_capture_of_a_dense_twin_keeps_numbers(student_of, batches):
    student = student_of("dense")
    with asnn.SpikeCapture(student) as capture:
        student(batches[0])
    assert {part.dtype for part in capture.spikes().values()} == {torch.float32}
    assert len(capture.spikes()["0.k"].unique()) > 100


def test_no_hook_outlives_an_exception(student_of, teacher, batches):
    student = student_of()
    with pytest.raises(ZeroDivisionError), asnn.SpikeCapture(student):
        assert hooks(student) == 4
        raise ZeroDivisionError
    assert hooks(student) == 0
    with pytest.raises(ZeroDivisionError), asnn.spike_hooks(student, lambda name, spikes: 1 / 0):
        student(batches[0])
    with pytest.raises(IndexError):  # token ids that there are not
        asnn.record_spikes(student.train(), teacher.model.eval(), [batches[0], batches[1] + 10**6], progress=False)
    assert hooks(student, teacher.model) == 0 and student.training and not teacher.model.training


def test_spike_hooks_replace_spikes_and_refuse_names_there_are_not(student_of, batches):
    student = student_of().eval()
    ids, seen = batches[0], []
    intact = student(ids).logits
    with asnn.spike_hooks(student, lambda name, spikes: seen.append(name)):
        assert torch.equal(student(ids).logits, intact)
    assert seen == ["0.k", "0.v", "1.k", "1.v"]
    with asnn.spike_hooks(student, lambda name, spikes: torch.zeros_like(spikes), ["0.k", "1.k"]):
        silent = student(ids).logits
    module = asnn.spike_modules(student)
    with torch.no_grad():
        for name in ("0.k", "1.k"):
            module[name].amplitude.zero_()
    torch.testing.assert_close(silent, student(ids).logits)
    assert not torch.allclose(silent, intact)
    for names in (["0.k", "2.k"], ["0.ffn_in"], ["k"]):
        message = f"spike site is '{names[-1]}'; allowed: 0.k, 0.v, 1.k, 1.v."
        with pytest.raises(ValueError, match=re.escape(message)), asnn.spike_hooks(student, print, names):
            pass
        with pytest.raises(ValueError, match=re.escape(message)), asnn.SpikeCapture(student, names=names):
            pass
    assert hooks(student) == 0


def test_record_has_spikes_and_teacher_states_of_the_same_tokens(student_of, teacher, batches):
    student = student_of("all sites").train()
    teacher.model.eval()
    record = asnn.record_spikes(student, teacher.model, batches, max_batches=2, progress=False)
    assert student.training and not teacher.model.training and hooks(student, teacher.model) == 0
    ids = torch.cat(batches[:2])
    assert torch.equal(record.window, windows_of(128, 16)) and torch.equal(record.position, torch.arange(128) % 16)
    assert torch.equal(record.next_token.view(8, 16)[:, :-1], ids[:, 1:]) and (record.next_token[15::16] == -1).all()
    with torch.no_grad(), asnn.SpikeCapture(student.eval()) as capture:
        student.base_model(batches[0])
        student.base_model(batches[1])
    for name, spikes in capture.spikes().items():
        assert torch.equal(record.spikes[name], spikes), name
    with torch.no_grad():  # of a copy, for transformers leaves hooks
        states = copy.deepcopy(teacher.model)(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(record.hidden[0], states[1].flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert set(record.hidden) == {0, 1} and record.hidden[1].dtype == torch.float32
    assert record.levels == dict.fromkeys(record.spikes, 1)
    assert set(record.control) == set(record.spikes)
    assert any(not torch.equal(record.control[name], record.spikes[name]) for name in record.spikes)


def test_record_takes_what_loaders_yield_and_no_more_than_was_asked_for(student_of, teacher, batches):
    student, full = student_of(), torch.ones(4, 16, dtype=torch.long)
    loaders = {"tensors": batches, "tuples": [(b, b + 1) for b in batches], "lists": [[b] for b in batches],
               "dicts": [{"input_ids": b} for b in batches],
               "masks": [{"input_ids": b, "attention_mask": full} for b in batches]}
    records = [asnn.record_spikes(student, teacher.model, iter(loader), max_tokens=200, control=False, progress=False)
               for loader in loaders.values()]
    for record in records:
        assert len(record.window) == len(record.spikes["0.k"]) == len(record.hidden[1]) == 200
        assert record.control == {} and torch.equal(record.spikes["1.v"], records[0].spikes["1.v"])
        assert torch.equal(record.next_token, records[0].next_token)
    assert len(asnn.record_spikes(student, teacher.model, batches, 1, control=False, progress=False).window) == 64
    for loader, most in (([], None), (batches, 0)):
        with pytest.raises(ValueError, match="loader is 'empty'; allowed: at least one batch"):
            asnn.record_spikes(student, teacher.model, loader, most, progress=False)


def test_no_more_of_a_loader_is_read_than_is_needed(student_of, teacher, batches):
    def stream():
        yield from batches[:3]  # one more than is asked for may be on its way
        pytest.fail("a loader without an end would be read for ever")

    student = student_of()
    record = asnn.record_spikes(student, teacher.model, stream(), 2, control=False, progress=False)
    assert len(record.window) == 128
    assert asnn.intervene(student, stream(), [], max_batches=2, progress=False)[0]["tokens"] == 2 * 4 * 15


def test_a_dense_twin_has_no_spikes_to_record(student_of, teacher, batches):
    with pytest.raises(ValueError, match="^spike_kind is 'dense'; allowed: a student with spikes.$"):
        asnn.record_spikes(student_of("dense"), teacher.model, batches)


def padded(batch, side):
    """A batch as (dict, singles): three rows of 16, 11 and 5 tokens, padded on one side."""
    ids, mask, singles = batch[:3].clone(), torch.ones(3, 16, dtype=torch.long), []
    for row, pads in enumerate((0, 5, 11)):
        where = slice(0, pads) if side == "left" else slice(16 - pads, None)
        singles.append(batch[row:row + 1, pads:] if side == "left" else batch[row:row + 1, :16 - pads])
        ids[row, where], mask[row, where] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}, singles


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["vector", "all sites"])
def test_padding_is_left_out(student_of, teacher, batches, name, side):
    student, (batch, singles) = student_of(name), padded(batches[0], side)
    got, expected = (asnn.record_spikes(student, teacher.model, loader, control=False, progress=False)
                     for loader in ([batch], singles))
    for key in ("window", "position", "next_token"):
        assert torch.equal(getattr(got, key), getattr(expected, key)), key
    for site, spikes in expected.spikes.items():  # rounding may turn a spike at its threshold
        assert (got.spikes[site] == spikes).float().mean() > 0.995, site
    for layer, states in expected.hidden.items():
        torch.testing.assert_close(got.hidden[layer], states, rtol=1e-3, atol=1e-3, msg=f"teacher layer {layer}")


def test_the_control_of_a_mended_student_fires(student_of, teacher, batches):
    """A control that is silent for want of calibration is none."""
    mended = asnn.prepare_remedy(student_of(), asnn.Remediation(), torch.cat(batches))
    record = asnn.record_spikes(mended, teacher.model, batches, progress=False)
    for name, spikes in record.control.items():
        assert 0.2 < (spikes != 0).float().mean() < 0.7, name


def test_the_control_depends_on_its_seed_alone(student_of, batches):
    student = student_of("all sites")
    before = torch.get_rng_state()
    one, same, other = (asnn.untrained_copy(student, batches[0], seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before) and not one.training and hooks(one) == 0
    assert asnn.student_id(one) == asnn.student_id(same) != asnn.student_id(other) != asnn.student_id(student)
    assert len(set(one.goose.blocks[0].ffn.ffn_in.centre.tolist())) > 10  # calibrated


# ---- validation ----------------------------------------------------------------------------------


def validator(**options):
    return asnn.SpikingBrainValidator(information=asnn.MutualInformationEstimator(**QUICK),
                                      cka=asnn.RepresentationAnalyzer(32, 20), **options)


def test_validation_from_end_to_end_is_the_same_twice(student_of, teacher, batches):
    student = student_of().train()
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    results = [validator().validate(student, teacher.model, batches, progress=False, meta={"teacher": "tiny"})
               for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])
    assert student.training and hooks(student, teacher.model) == 0
    told = [json.loads(result.to_json()) for result in results]
    for one in told:
        assert one["gate"].pop("seconds") > 0 and one["gate"].pop("peak memory, GiB") > 0
    assert told[0] == told[1]
    gate = told[0]["gate"]
    assert gate["student"] == asnn.student_id(student) and gate["teacher"] == "tiny" and gate["seed"] == 42
    assert gate["tokens"] == 512 and gate["windows"] == 32 and gate["asnn_common"] == asnn.__version__
    assert gate["layer_of"] == {"0.k": 0, "0.v": 0, "1.k": 1, "1.v": 1}
    result = results[0]
    assert result.heat.shape == (4, 2) and set(result.sites) == set(result.arrays) == set(gate["layer_of"])
    for site in result.sites.values():
        assert all(math.isfinite(v) for v in site.values() if isinstance(v, float)), site
    summary, table = result.summary, result.table()
    assert summary["verdict"] == gate["verdict"] and summary["tokens"] == 512 and summary["sites"] == 4
    assert [row["site"] for row in table] == list(result.sites)
    assert all(isinstance(v, str) and "nan" not in v for row in table for v in row.values())
    assert result.arrays["0.k"]["mutual information"].shape == result.arrays["0.k"]["q"].shape == (32,)
    assert result.arrays["0.k"]["by position"].shape == (16,)


def test_validation_of_all_sites_and_of_counts(student_of, teacher, batches):
    told = validator(max_channels=8, max_tokens=300).validate(student_of("all sites"), teacher.model, batches, 6, False)
    assert len(told.sites) == 19 and told.sites["head_in"]["teacher layer"] == 1 and told.meta["tokens"] == 300
    assert all(len(array["mutual information"]) == 8 for array in told.arrays.values())
    assert len(told.arrays["0.ffn_hidden"]["rate"]) == 128 and len(told.table()) == 19
    counts = validator().validate(student_of("counts"), teacher.model, batches, progress=False)
    assert 1.0 < counts.sites["0.k"]["entropy"] <= math.log2(7)
    assert counts.sites["0.k"]["entropy share"] == pytest.approx(counts.sites["0.k"]["entropy"] / math.log2(7))


def test_a_table_needs_no_embeddings(passing):
    assert passing.table()[0]["next token, bits (null)"] == "nan [nan, nan] (nan)"


def test_student_id_is_the_weights_alone(student_of, tmp_path):
    student = student_of()
    name = asnn.student_id(student)
    student.save_pretrained(tmp_path / "saved")
    assert asnn.student_id(asnn.GooseForCausalLM.from_pretrained(tmp_path / "saved")) == name
    assert asnn.student_id(student.train()) == name and re.fullmatch("[0-9a-f]{16}", name)
    with torch.no_grad():
        student.goose.blocks[1].time_mix.decay_logit[3] += 1e-6
    assert asnn.student_id(student) != name


def test_student_id_knows_a_head_that_is_not_tied():
    torch.manual_seed(0)
    student = asnn.GooseForCausalLM(asnn.GooseConfig(vocab_size=40, d_model=16, n_layer=1, tie_word_embeddings=False))
    before = asnn.student_id(student)
    with torch.no_grad():
        student.lm_head.weight[3, 2] += 0.5
    assert asnn.student_id(student) != before


# ---- interventions -------------------------------------------------------------------------------


def apply(kind, amount, x, seed=0):
    means = torch.linspace(-0.5, 0.5, x.shape[-1])
    return asnn.Intervention(kind, amount).apply(x, means, torch.Generator().manual_seed(seed))


def numbered(B=3, T=40, C=8):
    """Spikes that can be told apart: (window, channel) in the thousands, the token in the rest."""
    return torch.arange(B * C).view(B, 1, C) * 1000.0 + torch.arange(1, T + 1).view(1, T, 1)


def test_zero_and_mean():
    x = torch.randn(3, 10, 5)
    assert not apply("zero", 0, x).any()
    assert torch.equal(apply("mean", 0, x), torch.linspace(-0.5, 0.5, 5).expand(3, 10, 5))
    assert apply("mean", 0, x.half()).dtype == torch.float16


def test_shuffle_permutes_the_tokens_of_a_window_another_way_for_each_channel():
    x = numbered()
    out = apply("shuffle", 0, x)
    assert torch.equal(out.sort(1).values, x)  # the multiset of each window and channel
    source = (out % 1000).transpose(1, 2).flatten(0, 1)  # (B C, T)
    assert len(source.unique(dim=0)) == len(source)
    assert not torch.equal(apply("shuffle", 0, x, seed=1), out) and torch.equal(apply("shuffle", 0, x), out)


@pytest.mark.parametrize("amount", [1, 2, 5, 64])
def test_jitter_moves_spikes_by_so_many_tokens_and_no_more(amount):
    x = numbered(T=200)
    out = apply("jitter", amount, x)
    assert torch.equal(out.sort(1).values, x)
    moved = (out - x).abs()
    assert min(amount, 2) <= moved.max() <= amount


@pytest.mark.parametrize("amount", [1, 3])
def test_delay_shows_no_token_its_future(amount):
    x = numbered(T=200)
    out = apply("delay", amount, x)
    late = x - out
    assert torch.isin(late[:, amount:], torch.arange(amount + 1.0)).all() and (late[:, amount:].unique().numel() == amount + 1)
    start = out[:, :amount]  # before the first token there was no spike
    assert ((start == 0) | torch.isin(late[:, :amount], torch.arange(amount + 1.0))).all() and (start == 0).any()
    changed = x.clone()
    changed[:, 100:] += 0.5
    assert torch.equal(apply("delay", amount, changed)[:, :100], out[:, :100])


def test_flip_turns_signs_as_often_as_it_says():
    x = ternary(torch.randn(4, 200, 50)).float()
    assert torch.equal(apply("flip", 0, x), x) and torch.equal(apply("flip", 1, x), -x)
    out = apply("flip", 0.3, x, seed=9)
    assert torch.equal(out.abs(), x.abs())
    assert (out[x != 0] != x[x != 0]).float().mean() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("kind, amount, message", [
    ("noise", 0, "intervention is 'noise'; allowed: mean, shuffle, jitter, delay, flip, zero"),
    ("jitter", 0, "amount of jitter is 0; allowed: a whole number of tokens from 1"), ("jitter", 1.5, "amount of jitter is 1.5"),
    ("delay", 0.0, "amount of delay is 0.0"), ("delay", -2, "amount of delay is -2"),
    ("flip", 1.1, "amount of flip is 1.1; allowed: a probability"), ("flip", -0.1, "amount of flip is -0.1"),
    ("zero", 1, "amount of zero is 1; allowed: 0"), ("mean", 0.5, "amount of mean is 0.5"), ("shuffle", 3, "amount of shuffle is 3")])
def test_interventions_that_make_no_sense_are_refused(kind, amount, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        asnn.Intervention(kind, amount)


def row_of(rows, site, layer="-", intervention=None):
    found = [r for r in rows if (r["site"], r["layer"]) == (site, layer) and intervention in (None, r["intervention"])]
    assert len(found) == 1
    return found[0]


@torch.no_grad()
def nll_of(student, batches):
    return float(F.cross_entropy(student(torch.cat(batches)).logits[:, :-1].flatten(0, 1), torch.cat(batches)[:, 1:].flatten()))


def awake(student):
    """Louder branches, so that spikes matter."""
    with torch.no_grad():
        for block in asnn.transformer_blocks(student):
            block.time_mix.output.weight.mul_(20)
    return student


def test_temporal_coding_suite(student_of, batches):
    student = awake(student_of()).train()
    items = [asnn.Intervention(*item) for item in (("flip", 0.0), ("flip", 1.0), ("zero",), ("mean",), ("shuffle",),
                                                   ("jitter", 4), ("delay", 2))]
    rows = asnn.intervene(student, iter(batches), items, max_batches=4, progress=False)
    assert student.training and hooks(student) == 0
    student.eval()
    ids, nll = torch.cat(batches[:4]), nll_of(student, batches[:4])
    intact, unigram = rows[:2]
    assert (intact["intervention"], unigram["intervention"]) == ("intact", "unigram")
    assert intact["ppl"] == pytest.approx(math.exp(nll), rel=1e-5) and intact["rise"] == 1 and intact["standard error"] == 0
    counts = torch.bincount(ids[:, 1:].flatten()).double()
    p = counts[counts > 0] / counts.sum()
    assert unigram["ppl"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-5)
    assert unigram["rise"] == pytest.approx(unigram["ppl"] / intact["ppl"], rel=1e-6)
    places = {(r["site"], r["layer"]) for r in rows[2:]}
    assert places == {(site, layer) for site in "kv" for layer in ("0", "1", "all")} and len(rows) == 2 + 7 * 6
    assert {r["tokens"] for r in rows} == {16 * 15}
    for r in rows[2:]:
        assert r["rise"] == pytest.approx(r["ppl"] / intact["ppl"]) and r["standard error"] >= 0
        if r["intervention"] == "flip" and r["amount"] == 0:
            assert r["rise"] == 1 and r["standard error"] == 0
        else:
            assert abs(r["rise"] - 1) > 1e-6 and r["standard error"] > 0
    for site, names in (("all", ["0.k", "1.k"]), ("1", ["1.k"])):
        with asnn.spike_hooks(student, lambda name, spikes: torch.zeros_like(spikes), names):
            silent = math.exp(nll_of(student, batches[:4]))
        assert row_of(rows, "k", site, "zero")["ppl"] == pytest.approx(silent, rel=1e-5)
    # Keys and values turned together write the same state.
    with asnn.spike_hooks(student, lambda name, spikes: -spikes):
        assert nll_of(student, batches[:4]) == pytest.approx(nll, abs=1e-4)
    with asnn.SpikeCapture(student) as capture:
        nll_of(student, batches[:4])
    means = {name: spikes.float().mean(0) for name, spikes in capture.spikes().items()}
    with asnn.spike_hooks(student, lambda name, spikes: means[name].expand_as(spikes), ["0.v"]):
        assert row_of(rows, "v", "0", "mean")["ppl"] == pytest.approx(math.exp(nll_of(student, batches[:4])), rel=1e-5)


def test_standard_error_of_a_rise_is_over_paired_sequences(student_of, batches):
    student = awake(student_of()).eval()
    row = row_of(asnn.intervene(student, batches, [asnn.Intervention("zero")], ["all.v"], progress=False), "v", "all")
    with asnn.spike_hooks(student, lambda name, spikes: torch.zeros_like(spikes), ["0.v", "1.v"]):
        damaged = np.array([nll_of(student, [seq[None]]) for batch in batches for seq in batch])
    difference = damaged - [nll_of(student, [seq[None]]) for batch in batches for seq in batch]
    assert row["rise"] == pytest.approx(math.exp(difference.mean()), rel=1e-4)
    assert row["standard error"] == pytest.approx(row["rise"] * difference.std(ddof=1) / math.sqrt(32), rel=1e-3)


def test_intervention_on_chosen_places_with_given_counts(student_of, batches):
    student, counts = student_of("all sites"), torch.zeros(300, dtype=torch.long)
    counts[:200] = torch.arange(1, 201)
    rows = asnn.intervene(student, batches[:2], [asnn.Intervention("zero")],
                          ["head_in", "all.mix_in.k", "0.ffn_hidden"], unigram=counts, progress=False)
    assert [(r["site"], r["layer"]) for r in rows[2:]] == [("head_in", "-"), ("mix_in.k", "all"), ("ffn_hidden", "0")]
    labels = torch.cat(batches[:2])[:, 1:].flatten()
    p = torch.where(counts > 0, counts / counts.sum(), 1 / (counts.sum() + 300)).double()
    assert rows[1]["ppl"] == pytest.approx(float(torch.exp(-p[labels].log().mean())), rel=1e-5)
    for sites in (["0.q"], ["all.head_in"], ["k"]):
        with pytest.raises(ValueError, match=re.escape(f"site is '{sites[0]}'; allowed: 0.mix_in.k, ")):
            asnn.intervene(student, batches, [asnn.Intervention("zero")], sites, progress=False)
    with pytest.raises(ValueError, match="loader is 'empty'; allowed: at least one batch"):
        asnn.intervene(student, [], [asnn.Intervention("zero")], progress=False)


def test_intervention_that_fails_leaves_no_hook(student_of, batches, monkeypatch):
    student = student_of().train()
    monkeypatch.setattr(asnn.Intervention, "apply", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asnn.intervene(student, batches[:1], [asnn.Intervention("zero")], ["0.k"], progress=False)
    assert hooks(student) == 0 and student.training


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_scored_nor_part_of_the_means(student_of, batches, side):
    student, (batch, singles) = awake(student_of()), padded(batches[0], side)
    items = [asnn.Intervention("zero"), asnn.Intervention("mean")]
    one, many = (asnn.intervene(student, loader, items, ["all.v"], progress=False) for loader in ([batch], singles))
    for padded_row, row in zip(one, many):
        assert padded_row["tokens"] == row["tokens"] == 15 + 10 + 4
        assert padded_row["ppl"] == pytest.approx(row["ppl"], rel=1e-4), row["intervention"]


# ---- the fixed mixture ---------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", asnn.GRANULARITIES)
def test_fixed_mixture_is_the_geometric_mean_of_token_and_calibrated_channel(granularity):
    spike, x = asnn.TernarySpike(12, threshold="mixed_fixed", granularity=granularity, alpha_init=0.7), torch.randn(2, 9, 12)
    theta, statistics = spike.theta(x)
    token = x.abs().mean(-1, keepdim=True)
    torch.testing.assert_close(theta.expand_as(x), (0.7 * token.sqrt()).expand_as(x))  # channel means start at one
    spike.channel_mean.copy_(torch.linspace(0.1, 4, 12))
    torch.testing.assert_close(spike.theta(x)[0], 0.7 * (spike.channel_mean * token).sqrt())
    assert statistics is None and "channel_mean" in spike.state_dict()
    assert "channel_mean" not in dict(spike.named_parameters())
    assert "channel_mean" not in asnn.TernarySpike(12, threshold="mixed").state_dict()


def test_fixed_mixture_decodes_step_by_step_and_comes_back_from_disk(student_of, batches, tmp_path):
    student = asnn.prepare_remedy(student_of(), asnn.Remediation(), batches[0])
    means = {n: b for n, b in student.named_buffers() if n.endswith("channel_mean")}
    assert len(means) == 4 and all(len(mean.unique()) > 16 for mean in means.values())
    ids, state, steps = batches[1], None, []
    with torch.no_grad():
        whole = student(ids).logits
        for t in range(ids.shape[1]):
            out = student(ids[:, t:t + 1], state=state, use_cache=True)
            state = out.state
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    student.save_pretrained(tmp_path / "mended")
    loaded = asnn.GooseForCausalLM.from_pretrained(tmp_path / "mended").eval()
    assert loaded.config.threshold == "mixed_fixed" and loaded.config.projection_bias
    assert all(torch.equal(loaded.get_buffer(name), mean) for name, mean in means.items())
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, whole)
    assert asnn.student_id(loaded) == asnn.student_id(student)


# ---- remedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value, allowed", [
    ("threshold", "batch", "None, token, channel, mixed, mixed_fixed"), ("rate_weight", -1.0, "a number from 0"),
    ("align_weight", math.inf, "a number from 0"), ("rate_band", (0.5, 0.2), "two shares, the lower one first"),
    ("rate_band", (0.2, 1.2), "two shares, the lower one first"), ("steps", 0, "a whole number from 1"),
    ("steps", 2.5, "a whole number from 1"), ("lr_scale", 0, "a number above 0")])
def test_remediation_refuses_wrong_settings(name, value, allowed):
    with pytest.raises(ValueError, match=re.escape(f"Remediation.{name} is {value!r}; allowed: {allowed}")):
        asnn.Remediation(**{name: value})


@pytest.mark.parametrize("name, value, threshold, rate, recentre, align", [
    (None, None, None, 0.0, False, 0.0), ("firing rate", 0.7, "mixed_fixed", 3.0, False, 0.0),
    ("dead channels", 0.2, "mixed_fixed", 3.0, False, 0.0), ("saturated channels", 0.2, "mixed_fixed", 3.0, False, 0.0),
    ("CKA", 0.1, None, 0.0, True, 0.05), ("mutual information", 0.01, None, 0.0, True, 0.05)])
def test_a_remedy_has_the_parts_that_the_gate_calls_for(passing, name, value, threshold, rate, recentre, align):
    site = passing.sites["0.k"] if name is None else {**passing.sites["0.k"], name: value}
    gate = asnn.ValidationResult(passing.meta, {"0.k": site}, passing.arrays, passing.heat).gate
    settings = asnn.Remediation.for_gate(gate)
    assert settings.unlock == (name == "saturated channels")
    assert (settings.threshold, settings.rate_weight, settings.recentre, settings.align_weight) == (
        threshold, rate, recentre, align)
    chosen = asnn.Remediation.for_gate(gate, recentre=True, align_weight=0.5, steps=7)
    assert chosen.recentre and chosen.align_weight == 0.5 and chosen.steps == 7 and chosen.rate_weight == rate


def inputs_of(student, ids):
    """{"layer.site": (tokens, C)} that the spike modules are given."""
    seen, handles = {}, []
    for name, module in asnn.spike_modules(student).items():
        handles.append(module.register_forward_pre_hook(
            lambda _m, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2))))
    with torch.no_grad():
        student(ids)
    for handle in handles:
        handle.remove()
    return seen


def lopsided(student):
    """Keys and values whose channels have a mean and a scale of their own."""
    with torch.no_grad():
        for block in asnn.transformer_blocks(student):
            for linear in (block.time_mix.key, block.time_mix.value):
                linear.weight.mul_(torch.linspace(0.2, 4, 32).unsqueeze(1))
            block.ln_1.bias.add_(1.0)
    return student


@pytest.mark.parametrize("name", ["vector", "all sites"])  # without projection biases, and with
def test_recentring_and_calibration_of_a_copy(student_of, batches, name):
    student, ids = lopsided(student_of(name)).train(), torch.cat(batches)
    before = {n: p.clone() for n, p in student.state_dict().items()}
    mended = asnn.prepare_remedy(student, asnn.Remediation(rate_band=(0.35, 0.5)), ids)
    assert student.training and not mended.training and hooks(student, mended) == 0
    assert all(torch.equal(p, before[n]) for n, p in student.state_dict().items())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in mended.parameters()}
    theirs, ours = inputs_of(student.eval(), ids), inputs_of(mended, ids)
    modules = asnn.spike_modules(mended)
    for site in ("0.k", "0.v", "1.k", "1.v"):
        x, spike = ours[site], modules[site]
        assert x.median(0).values.abs().max() < 1e-5 < theirs[site].median(0).values.abs().max()
        # A channel fires as often as it did, or at the end of the band.
        rate = (asnn.spike_modules(student)[site].encode(theirs[site].unsqueeze(0))[0] != 0).float().mean((0, 1))
        assert rate.min() < 0.35 and rate.max() > 0.5
        fired = (spike.encode(x.unsqueeze(0))[0] != 0).float().mean((0, 1))
        torch.testing.assert_close(fired, rate.clamp(0.35, 0.5), rtol=0, atol=0.03)  # some inputs are the same


def test_unlocking_moves_one_sided_channels_until_the_rarer_sign_has_its_share(student_of, batches):
    student, ids = lopsided(student_of()).eval(), torch.cat(batches)
    settings = asnn.Remediation(recentre=False, unlock=True, minority=0.1)
    mended = asnn.prepare_remedy(student, settings, ids)
    shares = []
    for model in (student, mended):
        with asnn.SpikeCapture(model, ids.numel()) as capture, torch.no_grad():
            model.base_model(ids, use_cache=False)
        spikes = capture.spikes()["0.k"]
        up = (spikes > 0).float().mean(0) / (spikes != 0).float().mean(0).clamp_min(1e-6)  # a dead channel has none
        shares.append(torch.minimum(up, 1 - up))
    moved = mended.goose.blocks[0].time_mix.key.bias != 0
    assert shares[0].min() == 0 and moved.any() and not moved.all()
    assert torch.equal(moved, shares[0] < 0.1)
    # The scale of a token varies, so that the share is met about and not exactly.
    assert (shares[1] > 0).all() and float(shares[1][moved].mean()) == pytest.approx(0.1, abs=0.04)


def test_a_site_of_binary_spikes_is_not_called_locked():
    s = torch.randint(0, 2, (600, 8), dtype=torch.int8)
    window, position = torch.arange(600) // 20, torch.arange(600) % 20
    checker = asnn.SpikeHealthChecker()
    assert checker.check(s, window, position)["saturated channels"] == 1.0
    told = checker.check(s, window, position, binary=True)
    assert told["saturated channels"] == 0.0 and told["entropy share"] == pytest.approx(1.0, abs=0.02)


def test_parts_of_a_remedy_that_are_off_change_nothing(student_of, batches):
    student, ids = lopsided(student_of()).eval(), torch.cat(batches[:2])
    with torch.no_grad():
        logits = student(ids).logits
        same = asnn.prepare_remedy(student, asnn.Remediation(threshold=None, recentre=False, unlock=False), ids)
        assert torch.equal(same(ids).logits, logits) and asnn.student_id(same) == asnn.student_id(student)
        threshold = asnn.prepare_remedy(student, asnn.Remediation(recentre=False, unlock=False), ids)
        assert not threshold.config.projection_bias and threshold.goose.blocks[0].time_mix.key.bias is None
        centre = asnn.prepare_remedy(student, asnn.Remediation(threshold=None), ids)
        assert centre.config.threshold == "token" and not hasattr(centre.goose.blocks[0].time_mix.spike_k, "channel_mean")
        assert not torch.equal(threshold(ids).logits, logits) and not torch.equal(centre(ids).logits, logits)


@pytest.mark.parametrize("width", [24, 32, 40])
def test_teacher_targets_are_ternary_at_a_healthy_rate(width):
    hidden = torch.randn(4, 50, 32) * torch.linspace(0.1, 30, 32) + 3
    target = asnn.ternary_targets(hidden, width)
    assert target.shape == (4, 50, width) and target.unique().tolist() == [-1, 0, 1]
    assert (target != 0).float().mean() == pytest.approx(math.erfc(0.77 / math.sqrt(math.pi)), abs=0.03)
    assert torch.equal(target, asnn.ternary_targets(hidden, width))
    if width == 32:  # nothing is turned where the widths agree
        flat = standardised(hidden.flatten(0, 1))
        assert torch.equal(target.flatten(0, 1), ternary(flat, 0.77 * flat.abs().mean(-1, keepdim=True)).float())


@pytest.fixture
def objective_of(student_of, teacher, small_recipe):
    def make(settings, name="vector", **overrides):
        return asnn.RemediationObjective(student_of(name, **overrides), teacher.model,
                                         small_recipe(STUDENTS[name][0], **STUDENTS[name][1]), settings).train()
    return make


@pytest.mark.parametrize("name", ["vector", "all sites"])
@pytest.mark.parametrize("alpha, high", [(0.3, True), (2.0, False)])
def test_rate_term_pulls_the_rate_into_its_band(objective_of, batches, name, alpha, high):
    objective = objective_of(asnn.Remediation(rate_band=(0.35, 0.45), align_weight=0.0), name)
    modules, ids = asnn.spike_modules(objective.student), torch.cat(batches)
    alphas = [module.alpha for module in modules.values()]  # the only way to a rate here
    with torch.no_grad():
        for p in alphas:
            p.fill_(alpha)
    before = asnn.spike_density(objective.student, ids)
    optimizer, terms = torch.optim.Adam(alphas, lr=0.1), []
    for step in range(25):
        optimizer.zero_grad()
        term = objective(ids, ids, 10**6)[1]["rate"]
        term.backward()
        if not step and name == "vector":
            assert all((p.grad < 0 if high else p.grad > 0).all() for p in alphas)
        optimizer.step()
        terms.append(float(term.detach()))
    after = asnn.spike_density(objective.student, ids)
    assert terms[-1] < 0.4 * terms[0]
    moved = [after[site] - before[site] for site in modules]
    assert (max(moved) < -0.2) if high else (np.median(moved) > 0.1)


def test_rate_term_is_the_distance_from_the_band(objective_of, batches):
    ids = batches[0]
    objective = objective_of(asnn.Remediation(rate_band=(0.1, 0.3), align_weight=0.0))
    with asnn.SpikeCapture(objective.student) as capture:
        loss, terms = objective(ids, ids, 0)
    expected = []
    for spikes in capture.spikes().values():
        rate = (spikes != 0).float().mean(0)
        outside = (rate - 0.3).clamp_min(0) + (0.1 - rate).clamp_min(0)
        expected.append(outside.square().mean() + (rate.mean() - 0.3).clamp_min(0) ** 2)
    torch.testing.assert_close(terms["rate"].detach(), torch.stack(expected).mean())
    assert hooks(objective.student, objective.teacher) == 0
    assert not objective_of(asnn.Remediation(rate_band=(0.0, 1.0)))(ids, ids, 0)[1]["rate"].detach()


def test_the_terms_of_a_remedy_are_what_it_adds_to_the_loss(objective_of, batches):
    ids, losses = batches[0], {}
    for rate, align in ((0.0, 0.0), (2.0, 0.0), (0.0, 3.0), (2.0, 3.0)):
        loss, terms = objective_of(asnn.Remediation(rate_band=(0.1, 0.2), rate_weight=rate, align_weight=align))(ids, ids, 0)
        assert ("rate" in terms, "spike alignment" in terms) == (rate > 0, align > 0)
        losses[rate, align] = float(loss.detach()), {k: float(v.detach()) for k, v in terms.items()}
    plain, terms = losses[0, 0][0], losses[2, 3][1]
    assert losses[2, 0][0] == pytest.approx(plain + 2 * terms["rate"], rel=1e-4)
    assert losses[0, 3][0] == pytest.approx(plain + 3 * terms["spike alignment"], rel=1e-4)
    assert losses[2, 3][0] == pytest.approx(plain + 2 * terms["rate"] + 3 * terms["spike alignment"], rel=1e-4)


@pytest.mark.parametrize("name", ["vector", "all sites"])
def test_spikes_align_with_the_teacher_as_they_train(objective_of, batches, name):
    objective, terms = objective_of(asnn.Remediation(rate_weight=0.0), name), []
    optimizer, ids = torch.optim.Adam(objective.student.parameters(), lr=3e-3), torch.cat(batches)
    for _ in range(20):
        optimizer.zero_grad()
        term = objective(ids, ids, 10**6)[1]["spike alignment"]
        term.backward()
        optimizer.step()
        terms.append(float(term.detach()))
    assert terms[-1] < 0.9 * terms[0]


@pytest.fixture
def remedy_of(student_of, teacher, small_recipe, tokens, batches):
    """remedy_of(settings): (student that fires too often, its remedy)."""
    def make(settings, **options):
        student, recipe = student_of(alpha_init=0.25), small_recipe("v14.3", alpha_init=0.25)
        return student, asnn.remediate(
            student, teacher.model, asnn.WindowSampler(tokens["train"], 16, 0), recipe,
            lambda model: validator().validate(model, teacher.model, batches, progress=False),
            lambda model: asnn.evaluate(model, tokens["validation"], 16, windows=16).ppl, settings, **options)
    return make


@pytest.fixture
def remedied(remedy_of):
    return remedy_of(asnn.Remediation(rate_weight=5.0, steps=15))


def test_rates_fall_by_training_alone(remedy_of):
    student, result = remedy_of(asnn.Remediation(threshold=None, recentre=False, unlock=False, rate_weight=20.0, steps=30, lr_scale=5.0))
    for site, row in result.after.sites.items():
        assert row["firing rate"] < result.before.sites[site]["firing rate"] - 0.02
    rates = [row["rate"] for row in result.training.log if "rate" in row]
    assert rates[-1] < 0.7 * rates[0] and result.student.config.threshold == "token"


def test_a_student_that_fires_too_often_fires_less_after_its_remedy(remedied, tokens):
    student, result = remedied
    before, after = result.before.gate["metrics"], result.after.gate["metrics"]
    assert before["firing rate"]["value"] > 0.6 and not before["firing rate"]["pass"]
    for site, row in result.after.sites.items():
        assert 0.2 < row["firing rate"] < 0.6 < result.before.sites[site]["firing rate"]
    assert result.before.meta["student"] == asnn.student_id(student)  # the original is as it was
    assert result.after.meta["student"] == asnn.student_id(result.student) != asnn.student_id(student)
    assert student.config.threshold == "token" and result.student.config.threshold == "mixed_fixed"
    assert result.after.meta["remedy of"] == asnn.student_id(student)
    assert result.after.meta["remedy"]["rate_weight"] == 5.0 and result.training.step == 15
    assert result.ppl_after == asnn.evaluate(result.student, tokens["validation"], 16, windows=16).ppl
    assert result.after.meta["PPL rise"] == pytest.approx(result.ppl_after / result.ppl_before - 1)
    assert after["PPL rise"]["pass"] == (result.ppl_after <= 1.02 * result.ppl_before)
    assert not result.student.training and hooks(student, result.student) == 0
    assert all({"rate", "spike alignment"} <= set(row) for row in result.training.log if "loss" in row)
    json.loads(result.after.to_json())
    table = result.table()
    assert [row["metric"] for row in table] == ["dead channels", "saturated channels", "firing rate", "mutual information",
                                                "CKA", "PPL"]
    assert all({"before", "before: gate", "after", "after: gate", "threshold"} <= set(row) for row in table)
    assert table[2]["before: gate"] == "FAIL" and table[2]["before"].startswith(f"{before['firing rate']['value']:.3f} at ")
    assert table[-1]["before"] == f"{result.ppl_before:.2f}" and table[-1]["after"].startswith(f"{result.ppl_after:.2f} (")


def test_a_remedied_student_can_be_remedied_again(remedied):
    student, result = remedied
    again = result._replace(before=result.after, ppl_before=result.ppl_after)
    assert [row["metric"] for row in again.table()][-1] == "PPL"


def test_a_remedy_that_its_budget_ends_goes_on_to_what_one_without_a_budget_gives(remedy_of, tmp_path):
    settings = asnn.Remediation(rate_weight=5.0, steps=6)
    student, cut = remedy_of(settings, folder=tmp_path / "cut", max_hours=1e-9)
    assert (cut.training.stopped, cut.training.step, cut.training.finished) == ("time budget", 1, False)
    assert cut.after is None and cut.ppl_after is None  # nothing is claimed of it
    assert cut.before.meta["student"] == asnn.student_id(student) and (tmp_path / "cut" / "checkpoint.pt").is_file()
    again, whole = (remedy_of(settings, folder=tmp_path / name)[1] for name in ("cut", "whole"))
    assert again.training.finished and again.training.step == whole.training.step == 6
    assert len([row for row in again.training.log if "loss" in row]) == 6
    assert asnn.student_id(again.student) == asnn.student_id(whole.student) != asnn.student_id(cut.student)
    assert again.table() == whole.table() and again.ppl_after == whole.ppl_after
    assert again.after.gate["metrics"] == whole.after.gate["metrics"]


@pytest.mark.parametrize("before, after, verdict", [(100.0, 102.0, "pass"), (50.0, 51.0, "pass"), (100.0, 102.1, "FAIL"),
                                                    (100.0, 80.0, "pass")])
def test_a_rise_of_exactly_two_percent_passes(passing, before, after, verdict):
    row = asnn.RemediationResult(None, passing, passing, before, after, None).table()[-1]
    assert row["metric"] == "PPL" and row["after: gate"] == verdict
    assert row["after"] == f"{after:.2f} ({100 * (after / before - 1):+.1f} %)"


def test_a_remedy_of_which_nothing_is_on_logs_none_of_its_terms(remedy_of, passing):
    student, result = remedy_of(asnn.Remediation(threshold=None, recentre=False, unlock=False, rate_weight=0.0, align_weight=0.0, steps=4),
                                before=passing)
    assert result.before is passing and result.training.step == 4
    assert all({"rate", "spike alignment", "fdd"}.isdisjoint(row) for row in result.training.log)
    assert result.student.config.to_dict() == student.config.to_dict()


def test_a_recipe_that_holds_its_rates_goes_on_in_the_remedy(student_of, teacher, small_recipe):
    recipe = small_recipe("v14.3", rate_weight=10.0, rate_band=(0.1, 0.4))
    for weight, expected in ((0.0, (10.0, (0.1, 0.4))), (3.0, (10.0, (0.1, 0.4))), (20.0, (20.0, (0.3, 0.5)))):
        settings = asnn.Remediation(rate_weight=weight, rate_band=(0.3, 0.5))
        objective = asnn.RemediationObjective(student_of("vector"), teacher.model, recipe, settings)
        assert (objective.recipe.rate_weight, objective.recipe.rate_band) == expected
