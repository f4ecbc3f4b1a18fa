"""Recurrence: every form is the loop, in values, final states and gradients."""
import pytest
import torch

import asnn_common as asnn

B, D = 2, 5
DECAYS = {"1e-6": [1e-6] * D, "0.378": [0.378] * D, "0.5": [0.5] * D, "0.9": [0.9] * D, "1-1e-6": [1 - 1e-6] * D,
          "mixed": [1e-6, 0.378, 0.5, 0.9, 1 - 1e-6]}
NAMES = ("r", "k", "v", "w", "state")


def inputs(T, decay="mixed", dtype=torch.float64, spikes=False):
    r, k, v = (torch.randn(B, T, D, dtype=torch.float64) for _ in range(3))
    if spikes:
        k, v = k.sign() * (k.abs() > 0.8), v.sign() * (v.abs() > 0.8)
    state = torch.randn(B, D, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (torch.sigmoid(r).to(dtype), k.to(dtype), v.to(dtype), torch.tensor(DECAYS[decay], dtype=wide),
            state.to(wide))


def stepwise(r, k, v, w, state=None):
    out = []
    for t in range(k.shape[1]):
        y, state = asnn.recurrence_step(*(x[:, t:t + 1] for x in (r, k, v)), w, state)
        out.append(y)
    return torch.cat(out, 1), state


def with_gradients(function, arguments):
    """Read-out, final state and the gradients of every input, with both outputs in the loss."""
    leaves = [x.clone().requires_grad_() for x in arguments]
    out, S = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, S)]
    gradients = torch.autograd.grad((out, S), leaves, upstream)
    return {"out": out.detach(), "final": S.detach(), **dict(zip(NAMES, gradients))}


def assert_same(got, expected, tolerance):
    for name in expected:
        scale = expected[name].abs().max().clamp_min(1e-30)
        error = ((got[name] - expected[name]).abs().max() / scale).item()
        assert error <= tolerance, f"{name}: {error:.1e}"
        assert got[name].dtype == expected[name].dtype and got[name].shape == expected[name].shape


@pytest.mark.parametrize("T", [1, 15, 16, 17, 255, 1024])
@pytest.mark.parametrize("decay", DECAYS)
def test_chunked_is_the_loop_in_fp64(decay, T):
    arguments = inputs(T, decay)
    assert_same(with_gradients(asnn.recurrence_chunked, arguments),
                with_gradients(asnn.recurrence_reference, arguments), 1e-10)


@pytest.mark.parametrize("T", [1, 17, 255])
@pytest.mark.parametrize("decay", DECAYS)
def test_steps_are_the_loop_in_fp64(decay, T):
    arguments = inputs(T, decay)
    assert_same(with_gradients(stepwise, arguments), with_gradients(asnn.recurrence_reference, arguments), 1e-10)


@pytest.mark.parametrize("T", [17, 255, 1024])
@pytest.mark.parametrize("decay", DECAYS)
def test_chunked_is_the_loop_in_fp32(decay, T):
    arguments = inputs(T, decay, torch.float32)
    assert_same(with_gradients(asnn.recurrence_chunked, arguments),
                with_gradients(asnn.recurrence_reference, arguments), 1e-4)


@pytest.mark.parametrize("T", [1, 100, 1024])
def test_fp32_is_close_to_fp64(T):
    arguments = inputs(T, dtype=torch.float32)
    exact = with_gradients(asnn.recurrence_reference, [x.double() for x in arguments])
    got = with_gradients(asnn.recurrence_chunked, arguments)
    assert_same({name: x.double() for name, x in got.items()}, exact, 1e-4)


@pytest.mark.parametrize("form", [asnn.recurrence_reference, asnn.recurrence_chunked, stepwise])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_lose_one_rounding_and_keep_the_state_in_fp32(dtype, form):
    arguments = inputs(255, dtype=dtype)
    exact, S_exact = asnn.recurrence_reference(*(x.double() for x in arguments))
    out, S = form(*arguments)
    assert out.dtype == dtype and S.dtype == torch.float32
    torch.testing.assert_close(S.double(), S_exact, rtol=1e-4, atol=1e-4)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=unit, atol=unit * 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_have_the_gradients_of_the_loop(dtype):
    arguments = inputs(100, dtype=dtype)
    got, expected = (with_gradients(f, arguments) for f in (asnn.recurrence_chunked, asnn.recurrence_reference))
    assert_same(got, expected, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("T", [2, 31, 100, 129])
@pytest.mark.parametrize("chunk", [1, 2, 8, 16, 64, 256])
def test_chunk_size_does_not_matter(chunk, T):
    arguments = inputs(T)
    assert_same(with_gradients(lambda *a: asnn.recurrence_chunked(*a, chunk=chunk), arguments),
                with_gradients(asnn.recurrence_reference, arguments), 1e-10)


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("chunk", [0, 3, 48, -16])
def test_chunks_must_be_powers_of_two(chunk, T):
    with pytest.raises(ValueError, match=f"chunk is {chunk}; allowed: a power of two"):
        asnn.recurrence_chunked(*inputs(T), chunk=chunk)


def test_spikes_give_the_same_in_all_forms():
    arguments = inputs(100, dtype=torch.float32, spikes=True)
    expected, S = asnn.recurrence_reference(*arguments)
    for form in (asnn.recurrence_chunked, stepwise):
        out, last = form(*arguments)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last, S, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [asnn.recurrence_reference, asnn.recurrence_chunked])
@pytest.mark.parametrize("cut", [1, 16, 33, 99])
def test_state_carried_across_two_calls_equals_one(cut, form):
    def two(r, k, v, w, state):
        first, S = form(r[:, :cut], k[:, :cut], v[:, :cut], w, state)
        second, S = form(r[:, cut:], k[:, cut:], v[:, cut:], w, S)
        return torch.cat((first, second), 1), S
    arguments = inputs(100)
    assert_same(with_gradients(two, arguments), with_gradients(form, arguments), 1e-10)


@pytest.mark.parametrize("form", [asnn.recurrence_reference, asnn.recurrence_chunked, stepwise,
                                  asnn.recurrence_cumsum])
def test_no_state_is_a_state_of_zeros(form):
    r, k, v, w, state = inputs(20)
    for a, b in zip(form(r, k, v, w), form(r, k, v, w, torch.zeros_like(state))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("T", [5, 8])
def test_gradcheck(T):
    r, k, v, w, state = (x[:1, ..., :3] if x.dim() > 1 else x[1:4] for x in inputs(T))
    leaves = [x.clone().requires_grad_() for x in (r, k, v, w, state)]
    assert torch.autograd.gradcheck(lambda *a: asnn.recurrence_chunked(*a, chunk=4), leaves)


@pytest.mark.parametrize("form", [asnn.recurrence_reference, asnn.recurrence_chunked])
@pytest.mark.parametrize("t", [0, 15, 16, 40])
def test_a_changed_token_changes_nothing_before_it_nor_in_other_sequences(t, form):
    r, k, v, w, state = inputs(50)
    changed = k.clone()
    changed[0, t] += 10
    before, after = form(r, k, v, w, state)[0], form(r, changed, v, w, state)[0]
    assert torch.equal(before[0, :t], after[0, :t]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[0, t], after[0, t])


def test_inputs_are_left_as_they_were():
    arguments = inputs(64)
    copies = [x.clone() for x in arguments]
    with_gradients(asnn.recurrence_chunked, arguments)
    asnn.recurrence_chunked(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies))


def test_the_model_chooses_among_these():
    assert asnn.RECURRENCES == {"reference": asnn.recurrence_reference, "chunked": asnn.recurrence_chunked,
                                "cumsum": asnn.recurrence_cumsum}


# ---- the founders' formula -----------------------------------------------------------------------


def founders_error(T=64):
    """Relative error of the founders' formula per token at w = 0.378, over channels."""
    r, k, v = (torch.randn(1, T, 4096) for _ in range(3))
    w = torch.full((4096,), 0.378)
    got, expected = asnn.recurrence_cumsum(r, k, v, w)[0], asnn.recurrence_reference(r, k, v, w)[0]
    return ((got - expected).norm(dim=-1) / expected.norm(dim=-1))[0]


def test_founders_cumsum_is_right_for_the_first_tokens():
    assert founders_error()[:10].max() < 1e-3


def test_founders_cumsum_is_wrong_after_about_20_tokens():
    error = founders_error()
    assert (error[24:] > 0.5).all()


def test_founders_cumsum_is_mostly_not_finite_in_half_precision(monkeypatch):
    def without_fp32(r, k, v, w, _state):
        return r, k * v, w, torch.zeros_like(k[:, 0])
    monkeypatch.setattr(asnn, "_recurrence_inputs", without_fp32)
    r, k, v = (torch.randn(1, 256, 512, dtype=torch.float16) for _ in range(3))
    out, _ = asnn.recurrence_cumsum(r, k, v, torch.full((512,), 0.378, dtype=torch.float16))
    assert out.dtype == torch.float16
    assert out.isfinite().float().mean() < 0.2
