"""Spikes: alphabets, Gaussian facts, gradient estimators, thresholds that leak nothing."""
import math

import pytest
import torch

import asnn_common as asnn

D = 16
KINDS = ("dense", "binary", "ternary", "integer:3")


def spike(**options):
    return asnn.TernarySpike(D, **options)


def parts(x, cuts, module, mask=None):
    """Spikes of x taken in several calls that hand the statistics on, and the statistics after the last."""
    outs, past, start = [], None, 0
    for end in (*cuts, x.shape[1]):
        out, past = module(x[:, start:end], None if mask is None else mask[:, start:end], past)
        outs.append(out)
        start = end
    return torch.cat(outs, 1), past


# ---- alphabet ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind, alphabet", [("ternary", [-1, 0, 1]), ("binary", [0, 1]), ("integer:1", [-1, 0, 1]),
                                            ("integer:2", [-2, -1, 0, 1, 2]), ("integer:4", list(range(-4, 5)))])
def test_alphabet_is_exact(kind, alphabet, dtype):
    x = (3 * torch.randn(2, 64, D)).pow(3).to(dtype)  # heavy tails reach the highest count
    spikes, _ = spike(kind=kind).encode(x)
    assert spikes.dtype == dtype
    assert spikes.unique().tolist() == alphabet


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_counts_are_the_thresholds_exceeded(levels):
    x = torch.tensor([0.0, 0.5, -0.5, 0.51, -0.51, 1.0, -1.01, 1.49, 1.51, -2.6, 9.0])
    expected = [0, 0, 0, 1, -1, 1, -2, 2, 3, -5, 17]  # a value on a threshold has not exceeded it
    spikes = asnn.ternary_spike(x, torch.tensor(0.5), levels=levels)
    assert spikes.tolist() == [max(-levels, min(levels, n)) for n in expected]


def test_binary_fires_only_upwards():
    x = torch.tensor([-2.0, -0.6, 0.0, 0.4, 0.6, 2.0])
    assert asnn.ternary_spike(x, torch.tensor(0.5), binary=True).tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("estimator", asnn.ESTIMATORS)
def test_integer_1_is_ternary_with_the_same_gradients(estimator):
    x, results = torch.randn(2, 5, D), []
    for kind in ("ternary", "integer:1"):
        module, leaf = spike(kind=kind, estimator=estimator, threshold="mixed"), x.clone().requires_grad_()
        out, _ = module(leaf)
        (out * torch.linspace(-1, 2, D)).sum().backward()
        results.append((out, leaf.grad, module.alpha.grad, module.amplitude.grad))
    for a, b in zip(*results):
        assert (a is None and b is None) or torch.equal(a, b)


def test_dense_is_the_identity():
    x = torch.randn(2, 5, D, requires_grad=True)
    module = spike(kind="dense", threshold="mixed")
    out, statistics = module(x)
    assert torch.equal(out, x) and statistics is None
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and module.alpha.grad is None


def test_amplitude_is_the_height_of_the_spikes():
    out, _ = spike(amplitude_init=1.5)(torch.randn(2, 32, D))
    assert out.unique().tolist() == [-1.5, 0, 1.5]


@pytest.mark.parametrize("options, message", [
    ({"kind": "octal"}, "spike_kind is 'octal'; allowed: dense, binary, ternary, integer:k"),
    ({"threshold": "batch"}, "threshold is 'batch'; allowed: token, channel, mixed"),
    ({"granularity": "head"}, "granularity is 'head'; allowed: scalar, channel"),
    ({"estimator": "magic"}, "estimator is 'magic'; allowed: identity, normalised, clipped")])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        spike(**options)


def test_wrong_estimator_is_refused_by_the_function():
    with pytest.raises(ValueError, match="estimator is 'magic'; allowed: identity, normalised, clipped"):
        asnn.ternary_spike(torch.ones(3), torch.tensor(0.5), estimator="magic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", asnn.THRESHOLDS)
@pytest.mark.parametrize("estimator", asnn.ESTIMATORS)
def test_zeros_give_no_spikes_and_finite_gradients(estimator, threshold, dtype):
    x = torch.zeros(2, 3, D, dtype=dtype, requires_grad=True)
    module = spike(estimator=estimator, threshold=threshold)
    out, _ = module(x)
    assert not out.any()
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert module.alpha.grad is None or module.alpha.grad.isfinite().all()


# ---- Gaussian facts ------------------------------------------------------------------------------


def gaussian_density(alpha):
    return math.erfc(alpha * math.sqrt(2 / math.pi) / math.sqrt(2))


def gaussian_amplitude(alpha):
    """E[|x| given a spike] / E|x|, the least-squares height."""
    theta = alpha * math.sqrt(2 / math.pi)
    return math.exp(-theta**2 / 2) / gaussian_density(alpha)


@pytest.mark.parametrize("threshold", asnn.THRESHOLDS)
def test_gaussian_density_and_best_amplitude_at_alpha_1(threshold):
    assert gaussian_density(1.0) == pytest.approx(0.425, abs=5e-4)
    assert gaussian_amplitude(1.0) == pytest.approx(1.71, abs=5e-3)
    x, module = torch.randn(1, 1024, 1024), asnn.TernarySpike(1024, threshold=threshold)
    if threshold == "mixed_fixed":
        module.channel_mean.copy_(x.abs().mean((0, 1)))  # what calibration is for
    spikes, _ = module.encode(x)
    assert (spikes != 0).float().mean().item() == pytest.approx(gaussian_density(1.0), abs=3e-3)
    best = (spikes * x).sum() / spikes.abs().sum() / x.abs().mean()
    assert best.item() == pytest.approx(gaussian_amplitude(1.0), abs=1e-2)


def test_gaussian_optimum_is_alpha_0_77_and_amplitude_1_53():
    assert gaussian_amplitude(0.77) == pytest.approx(1.53, abs=1e-2)
    x = torch.randn(1, 512, 1024)
    errors = {}
    for alpha in (0.57, 0.67, 0.77, 0.87, 1.0):
        spikes, _ = asnn.TernarySpike(1024, alpha_init=alpha).encode(x)
        best = (spikes * x).sum() / spikes.abs().sum()
        errors[alpha] = (x - best * spikes).square().mean().item()
    assert min(errors, key=errors.get) == 0.77


# ---- estimators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ternary", "binary", "integer:3"])
def test_identity_passes_the_gradient_and_alpha_gets_none(kind):
    x, upstream = torch.randn(2, 5, D, requires_grad=True), torch.randn(2, 5, D)
    module = spike(kind=kind, estimator="identity")
    module(x)[0].backward(upstream)
    assert torch.equal(x.grad, upstream)
    assert module.alpha.grad is None and module.amplitude.grad is not None


@pytest.mark.parametrize("granularity, size", [("scalar", 1), ("channel", D)])
@pytest.mark.parametrize("threshold", asnn.THRESHOLDS)
@pytest.mark.parametrize("kind", ["ternary", "binary", "integer:3"])
@pytest.mark.parametrize("estimator", ["normalised", "clipped"])
def test_gradient_reaches_alpha_and_says_more_threshold_fewer_spikes(estimator, kind, threshold, granularity, size):
    x = torch.randn(2, 64, D)
    module = spike(kind=kind, estimator=estimator, threshold=threshold, granularity=granularity)
    spikes, _ = module.encode(x)
    direction = torch.ones_like(x) if kind == "binary" else x.sign()
    if kind == "binary" and estimator == "normalised":
        direction = (x > 0).float()  # the chord has the sign of x, and only positive x can fire
    (spikes * direction).sum().backward()
    assert module.alpha.grad.shape == (size,)
    assert (module.alpha.grad < 0).all()


def smooth(x, theta, levels, binary, width):
    """The staircase with each step replaced by a sigmoid whose scale is held fixed."""
    scale = width * theta.detach()
    total = torch.zeros_like(x)
    for level in range(1, levels + 1):
        total = total + torch.sigmoid((x - level * theta) / scale)
        if not binary:
            total = total - torch.sigmoid((-x - level * theta) / scale)
    return total


def chord(x, theta, levels, _binary, _width):
    return x * levels / ((levels + 1) * theta)


@pytest.mark.parametrize("width", [0.5, 0.2])
@pytest.mark.parametrize("levels, binary", [(1, False), (1, True), (3, False)])
@pytest.mark.parametrize("estimator, surrogate", [("clipped", smooth), ("normalised", chord)])
def test_estimator_is_the_derivative_of_its_surrogate(estimator, surrogate, levels, binary, width):
    x, upstream = torch.randn(4, D), torch.randn(4, D)
    theta = torch.rand(D) + 0.2
    gradients = []
    for function in (lambda a, b: asnn.ternary_spike(a, b, estimator, levels, binary, width),
                     lambda a, b: surrogate(a, b, levels, binary, width)):
        leaves = x.clone().requires_grad_(), theta.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(*leaves), leaves, upstream))
    for got, expected in zip(*gradients):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["normalised", "clipped"])
def test_estimators_do_not_depend_on_the_scale_of_x(estimator):
    x, gradients = torch.randn(2, 5, D), []
    for scale in (1e-3, 1.0, 1e3):
        leaf = (x * scale).requires_grad_()
        spike(estimator=estimator)(leaf)[0].sum().backward()
        gradients.append(leaf.grad * scale)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[2], gradients[1], rtol=1e-4, atol=1e-5)


def test_a_negative_alpha_is_reflected():
    x = torch.randn(2, 5, D)
    module = spike(alpha_init=0.8)
    expected = module(x)[0]
    with torch.no_grad():
        module.alpha.neg_()
    assert torch.equal(module(x)[0], expected)


# ---- thresholds ----------------------------------------------------------------------------------


def test_token_threshold_is_alpha_times_the_mean_over_channels():
    x = torch.randn(2, 5, D)
    theta, statistics = spike(alpha_init=0.7).theta(x)
    torch.testing.assert_close(theta, 0.7 * x.abs().mean(-1, keepdim=True))
    assert statistics is None


@pytest.mark.parametrize("threshold", ["channel", "mixed"])
def test_channel_threshold_is_a_running_mean_with_a_prior(threshold):
    x = torch.randn(2, 7, D)
    theta, statistics = spike(threshold=threshold, alpha_init=0.7).theta(x)
    for t in range(7):
        token = x[:, t].abs().mean(-1, keepdim=True)
        channel = (4 * token + x[:, :t + 1].abs().sum(1)) / (4 + t + 1)
        expected = channel if threshold == "channel" else (channel * token).sqrt()
        torch.testing.assert_close(theta[:, t], 0.7 * expected)
    torch.testing.assert_close(statistics.total, x.abs().sum(1))
    assert statistics.count.tolist() == [[7], [7]]


@pytest.mark.parametrize("threshold", ["channel", "mixed"])
def test_channel_thresholds_follow_their_channel(threshold):
    x = torch.randn(1, 200, D) * torch.linspace(0.1, 3, D)
    theta, _ = spike(threshold=threshold).theta(x)
    assert theta[0, -1, -1] > 3 * theta[0, -1, 0]


def test_thresholds_pass_no_gradient_to_x():
    x = torch.randn(2, 5, D, requires_grad=True)
    for threshold in asnn.THRESHOLDS:
        theta, _ = spike(threshold=threshold).theta(x)
        assert torch.autograd.grad(theta.sum(), x, allow_unused=True) == (None,)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", asnn.THRESHOLDS)
@pytest.mark.parametrize("t", [0, 4, 9])
def test_a_changed_token_changes_nothing_before_it_nor_in_other_sequences(t, threshold, kind, training):
    module = spike(kind=kind, threshold=threshold).train(training)
    x = torch.randn(3, 10, D)
    changed = x.clone()
    changed[1, t] = -50 * x[1, t].flip(-1)
    before, after = module(x)[0], module(changed)[0]
    assert torch.equal(before[1, :t], after[1, :t])
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1, t], after[1, t])


@pytest.mark.parametrize("threshold", ["channel", "mixed"])
def test_channel_statistics_remember_earlier_tokens(threshold):
    module, x = spike(threshold=threshold), torch.randn(1, 10, D)
    changed = x.clone()
    changed[:, 2] *= 100
    assert not torch.equal(module(x)[0][:, 3:], module(changed)[0][:, 3:])


@pytest.mark.parametrize("cuts", [(5,), (1,), (9,), (3, 4, 8), tuple(range(1, 10))])
@pytest.mark.parametrize("threshold", asnn.THRESHOLDS)
def test_state_carried_across_calls_equals_one_pass(threshold, cuts):
    module, x = spike(threshold=threshold), torch.randn(3, 10, D)
    whole, statistics = module(x)
    carried, last = parts(x, cuts, module)
    assert torch.equal(carried, whole)
    if threshold in ("token", "mixed_fixed"):
        assert last is None and statistics is None
    else:
        torch.testing.assert_close(last.total, statistics.total)
        assert torch.equal(last.count, statistics.count)


@pytest.mark.parametrize("cuts", [(), (2,), (4, 7)])
@pytest.mark.parametrize("threshold", asnn.THRESHOLDS)
def test_padded_batch_equals_the_unpadded_singles(threshold, cuts):
    module, pads = spike(threshold=threshold), (0, 3, 8)
    x = torch.randn(3, 10, D)
    mask = torch.ones(3, 10, dtype=torch.bool)
    for row, pad in enumerate(pads):
        x[row, :pad] = 1e3  # what stands at a pad must not matter
        mask[row, :pad] = False
    out, last = parts(x, cuts, module, mask)
    for row, pad in enumerate(pads):
        single, statistics = module(x[row:row + 1, pad:])
        assert torch.equal(out[row, pad:], single[0])
        if statistics is not None:
            torch.testing.assert_close(last.total[row], statistics.total[0])
            assert last.count[row] == statistics.count[0] == 10 - pad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", ["channel", "mixed"])
def test_statistics_are_fp32_for_half_inputs(threshold, dtype):
    _, statistics = spike(threshold=threshold)(torch.randn(2, 300, D, dtype=dtype))
    assert statistics.total.dtype == statistics.count.dtype == torch.float32
    assert statistics.count.tolist() == [[300], [300]]  # bf16 cannot count past 256


# ---- granularity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity, size", [("scalar", 1), ("channel", D)])
def test_granularity_is_the_number_of_alphas_and_amplitudes(granularity, size):
    module = spike(granularity=granularity, alpha_init=0.77, amplitude_init=1.53)
    assert module.alpha.shape == module.amplitude.shape == (size,)
    assert module.alpha.unique().tolist() == pytest.approx([0.77])
    assert module.amplitude.unique().tolist() == pytest.approx([1.53])


@pytest.mark.parametrize("threshold", asnn.THRESHOLDS)
def test_channel_alpha_and_amplitude_act_on_their_channel_alone(threshold):
    x, module = torch.randn(2, 30, D), spike(granularity="channel", threshold=threshold)
    before = module(x)[0]
    with torch.no_grad():
        module.alpha[3], module.amplitude[5] = 1e6, 2.0
    after = module(x)[0]
    rest = [i for i in range(D) if i not in (3, 5)]
    assert before[..., 3].any() and not after[..., 3].any()
    assert torch.equal(after[..., 5], 2 * before[..., 5])
    assert torch.equal(after[..., rest], before[..., rest])


# ---- share ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: spike(threshold="mixed"), lambda: asnn.SpikeEncoder(D)])
def test_share_blends_input_and_spikes_in_training_alone(make):
    module, x = make(), torch.randn(2, 6, D)
    read = (lambda: module(x)[0]) if isinstance(module, asnn.TernarySpike) else (lambda: module(x))
    spikes = read()
    assert not torch.equal(spikes, x)
    for share, expected in ((0.0, x), (0.25, 0.75 * x + 0.25 * spikes), (1.0, spikes)):
        module.share = share
        torch.testing.assert_close(module.train() and read(), expected)
        assert torch.equal(module.eval() and read(), spikes)
    assert type(module).share == 1.0  # what a loaded model starts from


# ---- the encoder ---------------------------------------------------------------------------------


def encoder(kind="ternary", estimator="clipped", width=D, dtype=torch.float32):
    """An encoder whose parameters are all away from their start values."""
    module = asnn.SpikeEncoder(width, kind, estimator)
    with torch.no_grad():
        module.centre.copy_(0.3 * torch.randn(width))
        module.alpha.copy_(0.5 + torch.rand(width))
        module.amplitude.copy_(0.5 + torch.rand(width))
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind, alphabet", [("ternary", [-1, 0, 1]), ("integer:1", [-1, 0, 1]),
                                            ("integer:3", list(range(-3, 4)))])
def test_the_alphabet_of_an_encoder_is_exact(kind, alphabet, dtype):
    module, x = encoder(kind).to(dtype), torch.randn(2, 64, D).pow(3).to(dtype)
    seen = []
    module.spikes.register_forward_hook(lambda _m, _a, out: seen.append(out))
    assert module(x).dtype == dtype  # and what the rest of the model sees comes from the spikes that are observed
    spikes, scale = module.encode(x)
    assert spikes.unique().tolist() == seen[0].unique().tolist() == alphabet
    torch.testing.assert_close(scale[..., 0], (x - module.centre).float().abs().mean(-1))


def test_an_encoder_reads_centre_plus_amplitude_times_scale_times_spikes():
    module, x = encoder(), torch.randn(3, 7, D)
    for b in range(3):
        for t in range(7):
            y = x[b, t] - module.centre
            scale = y.abs().mean()
            spikes = y.sign() * (y.abs() > module.alpha * scale)
            torch.testing.assert_close(module(x)[b, t], module.centre + module.amplitude * scale * spikes)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["ternary", "integer:3"])
def test_a_linear_absorbs_all_of_an_encoder_but_spikes_and_scale(kind, bias, dtype, tolerance):
    module, linear = encoder(kind, dtype=dtype), torch.nn.Linear(D, 11, bias=bias, dtype=dtype)
    kept = [p.clone() for p in linear.parameters()]
    x = (3 * torch.randn(2, 9, D) + 1).to(dtype)
    folded, (spikes, scale) = module.fold(linear), module.encode(x)
    got, expected = scale * (spikes @ folded.weight.t()) + folded.bias, linear(module(x))
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=tolerance, atol=tolerance)
    assert (folded.weight.shape, folded.bias.shape, folded.weight.dtype) == ((11, D), (11,), dtype)
    assert all(torch.equal(a, b) for a, b in zip(linear.parameters(), kept))
    assert not torch.allclose(scale * (spikes @ linear.weight.t()), expected.to(got.dtype), rtol=0.1)


def gaussian_optimum(levels):
    """The least squared error of x ~ N(0, 1) by levels * amplitude at thresholds theta, 2 theta ..., by simulation."""
    x = torch.randn(400_000)
    errors = []
    for theta in torch.linspace(0.3, 0.9, 61):
        count = sum((x.abs() > level * theta).float() for level in range(1, levels + 1)) * x.sign()
        errors.append(1 - (x * count).mean() ** 2 / count.square().mean())  # with the least-squares height
    return min(errors).item()


@pytest.mark.parametrize("kind, optimum, bound", [("ternary", 0.190, 0.2), ("integer:3", 0.061, 0.075)])
def test_calibration_comes_close_to_the_optimum_of_a_gaussian(kind, optimum, bound):
    """Channels with their own offsets and scales; the error is relative to the channels' variance. For counts the
    threshold is above the optimum, which costs a little error and saves events."""
    width = 256
    offset, size = 2 * torch.randn(width), torch.rand(width) + 0.2
    x, other = (offset + size * torch.randn(4, 512, width) for _ in range(2))

    def error(module):
        return ((module(other) - other).square().sum() / (other - offset).square().sum()).item()
    module = asnn.SpikeEncoder(width, kind)
    before = error(module)
    module.calibrate(x)
    assert gaussian_optimum(module.levels) == pytest.approx(optimum, abs=3e-3)
    assert optimum - 0.005 < error(module) < bound < before
    torch.testing.assert_close(module.centre, offset, rtol=0, atol=0.2)


def test_calibration_takes_any_leading_shape_and_no_gradient():
    x = torch.randn(4, 6, D) + 1
    modules = [asnn.SpikeEncoder(D) for _ in range(2)]
    modules[0].calibrate(x)
    modules[1].calibrate(x.view(24, D).requires_grad_())
    for a, b in zip(*(m.parameters() for m in modules)):
        assert torch.equal(a, b) and a.requires_grad and a.grad is None
    assert not torch.equal(modules[0].centre, torch.zeros(D))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("estimator", asnn.ESTIMATORS)
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_an_encoder_of_a_constant_is_finite(value, estimator, calibrated):
    module, x = asnn.SpikeEncoder(D, estimator=estimator), torch.full((2, 3, D), value)
    if calibrated:
        module.calibrate(x)
    out = module(x.requires_grad_())
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert not calibrated or torch.equal(out, x)  # the centre is all there is to know
    for name, p in module.named_parameters():
        assert p.isfinite().all() and (p.grad is None or p.grad.isfinite().all()), name


@pytest.mark.parametrize("kind", ["ternary", "integer:3"])
@pytest.mark.parametrize("estimator", ["normalised", "clipped"])
def test_gradients_reach_all_of_an_encoder_and_its_input(estimator, kind):
    module, x = encoder(kind, estimator), torch.randn(2, 60, D, requires_grad=True)
    (module(x) - x.detach()).square().sum().backward()
    for name, gradient in (("x", x.grad), *((n, p.grad) for n, p in module.named_parameters())):
        assert gradient.isfinite().all() and (gradient.flatten(0, -2) if name == "x" else gradient).any(0).all(), name


def test_the_gradients_of_centre_and_amplitude_are_those_of_the_code():
    """With the identity estimator and spikes that do not move: code = centre + amplitude * scale * s."""
    module, x, upstream = encoder(estimator="identity"), torch.randn(2, 5, D), torch.randn(2, 5, D)
    module(x).backward(upstream)
    spikes, scale = module.encode(x)
    torch.testing.assert_close(module.amplitude.grad, (upstream * scale * spikes).sum((0, 1)).detach())
    through_scale = (upstream * module.amplitude * spikes).sum(-1, keepdim=True) * -(x - module.centre).sign() / D
    expected = upstream + through_scale - upstream * module.amplitude * scale
    torch.testing.assert_close(module.centre.grad, expected.sum((0, 1)).detach())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("t", [0, 4, 9])
def test_a_token_is_encoded_by_itself(t, training):
    module, x = encoder().train(training), torch.randn(3, 10, D)
    changed = x.clone()
    changed[1, t] = -50 * x[1, t].flip(-1)
    differs = (module(x) != module(changed)).any(-1)
    assert differs[1, t] and differs.sum() == 1


def test_a_dense_encoder_is_the_identity():
    module, x = encoder("dense"), torch.randn(2, 5, D, requires_grad=True)
    seen = []
    module.spikes.register_forward_hook(lambda _m, _a, out: seen.append(out))
    out = module(x)
    assert torch.equal(out, x) and torch.equal(seen[0], x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("kind, estimator, message", [
    ("binary", "clipped", "encoder_kind is 'binary'; allowed: dense, ternary, integer:k"),
    ("octal", "clipped", "spike_kind is 'octal'; allowed: dense, binary, ternary, integer:k"),
    ("ternary", "magic", "estimator is 'magic'; allowed: identity, normalised, clipped")])
def test_wrong_options_of_an_encoder_are_refused(kind, estimator, message):
    with pytest.raises(ValueError, match=message):
        asnn.SpikeEncoder(D, kind, estimator)
