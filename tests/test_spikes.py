"""Spikes: alphabets, Gaussian facts, gradient estimators, thresholds and codes that leak none."""
import math

import pytest
import torch

import asnn_common as asnn

C = 16
KINDS = ("dense", "binary", "ternary", "integer:3")
THRESHOLDS = pytest.mark.parametrize("threshold", asnn.THRESHOLDS)
HALVES = (torch.float32, torch.float16, torch.bfloat16)


def spike(alpha=1.0, width=C, **options):
    """A module with this alpha, and channel means of a Gaussian."""
    module = asnn.TernarySpike(width, **options)
    with torch.no_grad():
        module.alpha.fill_(alpha)
    module.calibrate(torch.full((3, width), math.sqrt(2 / math.pi)))
    return module


def encoder(kind="ternary", estimator="clipped", dtype=torch.float32, **options):
    """An encoder whose parameters are all away from their start values."""
    module = asnn.SpikeEncoder(C, kind, estimator, **options)
    with torch.no_grad():
        module.centre.copy_(0.3 * torch.randn(C))
        for name, p in module.named_parameters():
            if name != "centre":
                p.copy_((0.5 + torch.rand(C)) * p)
    return module.to(dtype)


# ---- alphabet ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind, alphabet", [
    ("ternary", [-1, 0, 1]), ("binary", [0, 1]), ("integer:1", [-1, 0, 1]),
    ("integer:2", [-2, -1, 0, 1, 2]), ("integer:4", list(range(-4, 5)))])
def test_alphabet_is_exact_with_and_without_gradients(kind, alphabet, dtype):
    x = (3 * torch.randn(2, 64, C)).pow(3).to(dtype)  # heavy tails reach the highest count
    spikes = spike(kind=kind).encode(x)
    assert spikes.dtype == dtype and spikes.unique().tolist() == alphabet
    with torch.no_grad():
        assert torch.equal(spike(kind=kind).encode(x), spikes)
    if kind != "binary":
        coded, scale = encoder(kind, dtype=dtype).encode(x)
        assert coded.dtype == dtype and coded.unique().tolist() == alphabet
        assert encoder(kind, dtype=dtype)(x).dtype == dtype and scale.dtype == torch.float32


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_counts_are_the_thresholds_exceeded(levels):
    x = torch.tensor([0.0, 0.5, -0.5, 0.51, -0.51, 1.0, -1.01, 1.49, 1.51, -2.6, 9.0])
    expected = [0, 0, 0, 1, -1, 1, -2, 2, 3, -5, 17]  # a value on a threshold has not exceeded it
    spikes = asnn.ternary_spike(x, torch.tensor(0.5), levels=levels)
    assert spikes.tolist() == [max(-levels, min(levels, n)) for n in expected]
    upwards = asnn.ternary_spike(x, torch.tensor(0.5), binary=True)
    assert upwards.tolist() == [float(value > 0.5) for value in x]


@pytest.mark.parametrize("make", [lambda: spike(kind="dense"), lambda: encoder("dense")])
def test_the_dense_twin_passes_everything_on(make):
    module, x, seen = make(), torch.randn(2, 5, C, requires_grad=True), []
    module.spikes.register_forward_hook(lambda _m, _a, out: seen.append(out))
    out = module(x)
    assert torch.equal(out, x) and torch.equal(seen[0], x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and module.alpha.grad is None


@pytest.mark.parametrize("make, options, sentence", [
    (spike, {"kind": "octal"}, "spike_kind is 'octal'; allowed: dense, binary, ternary, integer:k"),
    (spike, {"kind": "integer:0"}, "spike_kind is 'integer:0'; allowed: .* k from 1 to 127"),
    (spike, {"threshold": "batch"}, "threshold is 'batch'; allowed: token, mixed_fixed"),
    (spike, {"granularity": "head"}, "granularity is 'head'; allowed: scalar, channel"),
    (encoder, {"kind": "binary"}, "encoder_kind is 'binary'; allowed: dense, ternary, integer:k"),
    (lambda **o: asnn.ternary_spike(torch.ones(3), torch.ones(1), **o), {"estimator": "magic"},
     "estimator is 'magic'; allowed: identity, clipped")])
def test_wrong_options_are_refused_in_a_sentence(make, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**options)


# ---- Gaussian facts ------------------------------------------------------------------------------


def gaussian_density(alpha):
    return math.erfc(alpha / math.sqrt(math.pi))


def gaussian_height(alpha):
    """E[|x| given a spike] / E|x|, the least-squares height."""
    return math.exp(-alpha**2 / math.pi) / gaussian_density(alpha)


@THRESHOLDS
@pytest.mark.parametrize("alpha, density, height", [(1.0, 0.425, 1.71), (0.77, 0.539, 1.53)])
def test_gaussian_density_and_best_height(alpha, density, height, threshold):
    assert gaussian_density(alpha) == pytest.approx(density, abs=1e-3)
    assert gaussian_height(alpha) == pytest.approx(height, abs=1e-2)
    x = torch.randn(1, 1024, 1024)
    spikes = spike(alpha, 1024, threshold=threshold).encode(x)
    assert (spikes != 0).float().mean().item() == pytest.approx(gaussian_density(alpha), abs=3e-3)
    best = (spikes * x).sum() / spikes.abs().sum() / x.abs().mean()
    assert best.item() == pytest.approx(gaussian_height(alpha), abs=1e-2)


# ---- estimators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[1:])
def test_identity_passes_the_gradient_and_alpha_gets_none(kind):
    x, upstream = torch.randn(2, 5, C, requires_grad=True), torch.randn(2, 5, C)
    module = spike(kind=kind, estimator="identity")
    module(x).backward(upstream)
    assert torch.equal(x.grad, upstream)
    assert module.alpha.grad is None and module.amplitude.grad is not None


@pytest.mark.parametrize("granularity, size", [("scalar", 1), ("channel", C)])
@THRESHOLDS
@pytest.mark.parametrize("kind", KINDS[1:])
def test_gradient_reaches_alpha_and_says_more_threshold_fewer_spikes(kind, threshold, granularity,
                                                                     size):
    x, options = torch.randn(2, 64, C), {"threshold": threshold, "granularity": granularity}
    module = spike(kind=kind, **options)
    direction = torch.ones_like(x) if kind == "binary" else x.sign()
    (module.encode(x) * direction).sum().backward()
    assert module.alpha.grad.shape == module.amplitude.shape == (size,)
    assert (module.alpha.grad < 0).all()


def smooth(x, theta, levels, binary, width):
    """The staircase with each step replaced by a sigmoid whose scale is held fixed."""
    scale, total = width * theta.detach(), torch.zeros_like(x)
    for level in range(1, levels + 1):
        total = total + torch.sigmoid((x - level * theta) / scale)
        if not binary:
            total = total - torch.sigmoid((-x - level * theta) / scale)
    return total


@pytest.mark.parametrize("width", [0.5, 0.2])
@pytest.mark.parametrize("levels, binary", [(1, False), (1, True), (3, False)])
def test_clipped_is_the_derivative_of_smooth_steps(levels, binary, width):
    x, upstream, theta, gradients = torch.randn(4, C), torch.randn(4, C), torch.rand(C) + 0.2, []
    for function in (lambda a, b: asnn.ternary_spike(a, b, "clipped", levels, binary, width),
                     lambda a, b: smooth(a, b, levels, binary, width)):
        leaves = x.clone().requires_grad_(), theta.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(*leaves), leaves, upstream))
    for got, expected in zip(*gradients):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [0.0, 2.5])
@pytest.mark.parametrize("estimator", asnn.ESTIMATORS)
def test_constants_give_finite_values_and_gradients(estimator, value, dtype):
    calibrated = asnn.SpikeEncoder(C, estimator=estimator)
    calibrated.calibrate(torch.full((2, 3, C), value))
    assert (calibrated.amplitude > 0).all() and (calibrated.alpha > 0).all()  # to learn from
    for module in (*(spike(estimator=estimator, threshold=t) for t in asnn.THRESHOLDS),
                   asnn.SpikeEncoder(C, estimator=estimator), calibrated):
        x = torch.full((2, 3, C), value, dtype=dtype, requires_grad=True)
        out = module(x)
        assert out.isfinite().all() and (value > 0 or not out.any())
        out.sum().backward()
        for tensor in (x, *module.parameters()):
            assert tensor.grad is None or tensor.grad.isfinite().all()


# ---- thresholds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_theta_is_alpha_times_a_mean_without_gradient_to_x(dtype):
    x = torch.randn(2, 5, C, dtype=dtype, requires_grad=True)
    token = x.detach().float().abs().mean(-1, keepdim=True)
    theta = spike(-0.7).theta(x)  # reflected: a threshold is not negative
    torch.testing.assert_close(theta, 0.7 * token)
    module, batch = spike(0.7, threshold="mixed_fixed"), torch.randn(9, 4, C)
    module.calibrate(batch)
    mixed = module.theta(x)
    torch.testing.assert_close(mixed, 0.7 * (batch.abs().mean((0, 1)) * token).sqrt())
    assert torch.autograd.grad((theta.sum() + mixed.sum()), x, allow_unused=True) == (None,)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [
    *(lambda k=k, t=t: spike(kind=k, threshold=t) for k in KINDS for t in asnn.THRESHOLDS),
    encoder])
def test_a_token_is_coded_by_itself(make, training):
    module, x = make().train(training), torch.randn(3, 10, C)
    for t in (0, 4, 9):
        changed = x.clone()
        changed[1, t] = -50 * x[1, t].flip(-1)
        differs = (module(x) != module(changed)).any(-1)
        assert differs[1, t] and differs.sum() == 1


@THRESHOLDS
def test_channel_alpha_and_amplitude_act_on_their_channel_alone(threshold):
    x, module = torch.randn(2, 30, C), spike(granularity="channel", threshold=threshold)
    before = module(x)
    with torch.no_grad():
        module.alpha[3], module.amplitude[5] = 1e6, 2.0
    after, rest = module(x), [i for i in range(C) if i not in (3, 5)]
    assert before[..., 3].any() and not after[..., 3].any()
    assert torch.equal(after[..., 5], 2 * before[..., 5])
    assert torch.equal(after[..., rest], before[..., rest])


# ---- the encoder ---------------------------------------------------------------------------------


def test_an_encoder_reads_centre_plus_amplitude_times_scale_times_spikes():
    module, x = encoder(), torch.randn(3, 7, C)
    for b in range(3):
        for t in range(7):
            y = x[b, t] - module.centre
            spikes = y.sign() * (y.abs() > module.alpha * y.abs().mean())
            expected = module.centre + module.amplitude * y.abs().mean() * spikes
            torch.testing.assert_close(module(x)[b, t], expected)


MORE = pytest.mark.parametrize("options", [{}, {"steps": 2}, {"rotated": True},
                                           {"steps": 2, "rotated": True}], ids=str)


def test_a_second_train_codes_what_the_first_left_and_each_is_ternary():
    """By hand, of an encoder and of keys, whose first train stands for two thresholds."""
    module, x, seen = encoder(steps=2), torch.randn(3, 7, C), []
    keys = spike(0.7, steps=2)
    with torch.no_grad():
        keys.amplitude.fill_(1.3)
    for site in (module, keys):
        for train in (site.spikes, site.second):
            train.register_forward_hook(lambda _m, _a, out: seen.append(out))
    y = x - module.centre
    scale = y.abs().mean(-1, keepdim=True)
    theta, height = module.alpha * scale, module.amplitude * scale
    key = 0.7 * x.abs().mean(-1, keepdim=True)
    for site, z, threshold, size, last in (
            (module, y, theta, height, lambda code: module.centre + height * code),
            (keys, x, key, 2 * key, lambda code: 1.3 * code)):
        first = z.sign() * (z.abs() > threshold)
        rest = z - size * first
        second = rest.sign() * (rest.abs() > site.residual_alpha * threshold)
        torch.testing.assert_close(site(x), last(first + site.residual_height * second))
        assert torch.equal(seen[0], first) and torch.equal(seen[1], second)
        assert second.unique().tolist() == [-1, 0, 1] and not torch.equal(first, second)
        seen.clear()


def test_a_dense_twin_has_no_second_train_and_no_rotation():
    for module in (spike(kind="dense", steps=2), encoder("dense", steps=2, rotated=True)):
        x = torch.randn(2, 5, C)
        assert module.second is None and torch.equal(module(x), x)


def test_a_rotation_mixes_blocks_of_channels_keeps_length_and_undoes_itself():
    for width in (16, 96, 256, 768):
        x, block = torch.randn(2, 3, width), {16: 16, 96: 32}.get(width, 128)
        turned = asnn._rotate(x)
        torch.testing.assert_close(asnn._rotate(turned), x)
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
        one = asnn._rotate(torch.eye(width)[3])
        assert (one.nonzero().flatten().tolist() == [*range(block)])
        torch.testing.assert_close(one[:block].abs(), torch.full((block,), block**-0.5))


@MORE
def test_an_encoder_blends_with_its_input_in_training_alone(options):
    module, x = encoder(**options).train(), torch.randn(2, 5, C)
    coded, module.blend = module(x), 0.25
    torch.testing.assert_close(module(x), 0.75 * x + 0.25 * coded)
    assert torch.equal(module.eval()(x), coded) and asnn.SpikeEncoder.blend == 1


@MORE
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["ternary", "integer:3"])
def test_a_linear_absorbs_all_of_an_encoder_but_spikes_and_scale(kind, bias, dtype, tolerance,
                                                                 options):
    module = encoder(kind, dtype=dtype, **options)
    linear = torch.nn.Linear(C, 11, bias=bias, dtype=dtype)
    kept = [p.clone() for p in linear.parameters()]
    x = (3 * torch.randn(2, 9, C) + 1).to(dtype)
    folded, (spikes, scale) = module.fold(linear), module.encode(x)
    got, expected = scale * (spikes @ folded.weight.t()) + folded.bias, linear(module(x))
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=tolerance, atol=tolerance)
    assert (folded.weight.dtype, folded.bias.shape) == (dtype, (11,))
    assert all(torch.equal(a, b) for a, b in zip(linear.parameters(), kept))
    assert not torch.allclose(scale * (spikes @ linear.weight.t()), got, rtol=0.1)


@pytest.mark.parametrize("kind, low, high, options", [
    ("ternary", 0.185, 0.2, {}), ("integer:3", 0.056, 0.075, {}),
    ("ternary", 0.03, 0.045, {"steps": 2}), ("ternary", 0.185, 0.2, {"rotated": True})])
def test_calibration_comes_close_to_the_optimum_of_a_gaussian(kind, low, high, options):
    """Channels with their own offsets and scales; error over variance. The optima are 0.190 and
    0.061 (evenly spaced levels); counts have a threshold above theirs, which saves events. Two
    trains have nine levels (0.03, evenly spaced), with rates inside their band."""
    offset, size = 2 * torch.randn(256), torch.rand(256) + 0.2
    x, other = (offset + size * torch.randn(4, 512, 256) for _ in range(2))

    def error(module):
        return ((module(other) - other).square().sum() / (other - offset).square().sum()).item()
    module, flat = (asnn.SpikeEncoder(256, kind, **options) for _ in range(2))
    before = error(module)
    module.calibrate(x)
    flat.calibrate(x.flatten(0, 1).requires_grad_())  # any leading shape, and no gradient
    assert low < error(module) < high < before
    middle = asnn._rotate(offset) if options.get("rotated") else offset
    torch.testing.assert_close(module.centre, middle, rtol=0, atol=0.2)
    for a, b in zip(module.parameters(), flat.parameters()):
        assert torch.equal(a, b) and a.requires_grad and b.grad is None


@MORE
@pytest.mark.parametrize("kind", ["ternary", "integer:3"])
def test_gradients_reach_all_of_an_encoder_and_its_input(kind, options):
    module, x = encoder(kind, **options), torch.randn(2, 60, C, requires_grad=True)
    (module(x) - x.detach()).square().sum().backward()
    for p in (*module.parameters(), x):
        assert p.grad.isfinite().all() and p.grad.reshape(-1, C).any(0).all()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_threshold_near_zero_does_not_drown_the_gradients_of_others(monkeypatch, steps):
    """alpha may cross zero in training; what fires stays at an eighth of the height or above."""
    x = torch.randn(4, 64, 8)
    site = asnn.SpikeEncoder(8, steps=steps)
    site.calibrate(x)
    with torch.no_grad():
        site.alpha[2] = -1e-6

    def gradients():
        loss = (site(x) * torch.linspace(-1, 1, 512).view(4, 64, 2).repeat(1, 1, 4)).sum()
        return torch.cat([g.abs() for g in torch.autograd.grad(loss, [*site.parameters()])])
    assert torch.equal(site.threshold()[2], site.amplitude[2] / 8)
    assert torch.equal(site.threshold()[3:], site.alpha[3:])
    kept = gradients()
    monkeypatch.setattr(site, "threshold", lambda: site.alpha.abs())
    assert kept.max() < 1e3 < 1e5 < gradients().max()
