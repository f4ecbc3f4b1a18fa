"""Recurrence: every form is the loop, in values, final states and gradients."""
import pytest
import torch

import asnn_common as asnn

B, D = 2, 5
DECAYS = {"1e-6": [1e-6] * D, "0.378": [0.378] * D, "0.5": [0.5] * D, "0.9": [0.9] * D, "1-1e-6": [1 - 1e-6] * D,
          "mixed": [1e-6, 0.378, 0.5, 0.9, 1 - 1e-6]}
NAMES = ("r", "k", "v", "w", "state", "beta")


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


# ---- the matrix state and the delta rule ---------------------------------------------------------

H, N, M = 2, 3, 4
MATRIX_DECAYS = {"1e-6": [1e-6] * (H * N), "0.5": [0.5] * (H * N), "1-1e-6": [1 - 1e-6] * (H * N),
                 "mixed": [1e-6, 0.15, 0.378, 0.7, 0.95, 1 - 1e-6]}
RULES = pytest.mark.parametrize("delta", [False, True], ids=["matrix", "delta"])


def matrix_inputs(T, delta, decay="mixed", dtype=torch.float64):
    """r, k, v, w, state and, for the delta rule, keys of length below one and beta."""
    r, k = (torch.randn(B, T, H, N, dtype=torch.float64) for _ in range(2))
    v, beta = torch.randn(B, T, H, M, dtype=torch.float64), torch.rand(B, T, H, dtype=torch.float64)
    if delta:
        k = k / (k.square().sum(-1, keepdim=True) + 0.1).sqrt()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w, state = torch.tensor(MATRIX_DECAYS[decay], dtype=wide).view(H, N), torch.randn(B, H, N, M, dtype=wide)
    return (*(x.to(dtype) for x in (r, k, v)), w, state, *((beta.to(dtype),) if delta else ()))


def matrix_stepwise(r, k, v, w, state=None, beta=None):
    out = []
    for t in range(k.shape[1]):
        now = [x[:, t:t + 1] for x in (r, k, v)]
        y, state = asnn.matrix_recurrence_step(*now, w, state, None if beta is None else beta[:, t:t + 1])
        out.append(y)
    return torch.cat(out, 1), state


def by_hand(r, k, v, w, state, beta=None):
    """The rule as it is written, one sequence, head and token at a time."""
    out, last = torch.zeros(B, k.shape[1], H, M, dtype=torch.float64), torch.zeros_like(state)
    for b in range(B):
        for h in range(H):
            S = state[b, h]
            for t in range(k.shape[1]):
                key, value = k[b, t, h], v[b, t, h]
                wrong = value if beta is None else beta[b, t, h] * (value - key @ S)
                S = torch.diag(w[h].clamp_min(asnn.MIN_DECAY)) @ S + torch.outer(key, wrong)
                out[b, t, h] = r[b, t, h] @ S
            last[b, h] = S
    return out, last


MATRIX_FORMS = (asnn.matrix_recurrence_reference, asnn.matrix_recurrence_chunked, matrix_stepwise)


@RULES
@pytest.mark.parametrize("form", MATRIX_FORMS)
def test_every_matrix_form_is_the_rule_as_it_is_written(form, delta):
    arguments = matrix_inputs(9, delta)
    for got, expected in zip(form(*arguments), by_hand(*arguments)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@RULES
@pytest.mark.parametrize("decay", MATRIX_DECAYS)
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 64, 100])
def test_the_chunked_matrix_form_is_the_loop_in_fp64(T, decay, delta):
    arguments = matrix_inputs(T, delta, decay)
    assert_same(with_gradients(asnn.matrix_recurrence_chunked, arguments),
                with_gradients(asnn.matrix_recurrence_reference, arguments), 1e-9)


@RULES
@pytest.mark.parametrize("T", [1, 33])
@pytest.mark.parametrize("decay", MATRIX_DECAYS)
def test_matrix_steps_are_the_loop_in_fp64(decay, T, delta):
    arguments = matrix_inputs(T, delta, decay)
    assert_same(with_gradients(matrix_stepwise, arguments),
                with_gradients(asnn.matrix_recurrence_reference, arguments), 1e-10)


@RULES
@pytest.mark.parametrize("T", [2, 33, 64])
@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 31])
def test_chunk_size_does_not_matter_to_the_matrix_state(chunk, T, delta):
    arguments = matrix_inputs(T, delta)
    assert_same(with_gradients(lambda *a: asnn.matrix_recurrence_chunked(*a, chunk=chunk), arguments),
                with_gradients(asnn.matrix_recurrence_reference, arguments), 1e-9)


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("chunk", [0, 33, -1])
def test_chunks_of_the_matrix_state_are_bounded(chunk, T):
    with pytest.raises(ValueError, match=f"chunk is {chunk}; allowed: 1 to 32"):
        asnn.matrix_recurrence_chunked(*matrix_inputs(T, False), chunk=chunk)


@RULES
@pytest.mark.parametrize("form", [asnn.matrix_recurrence_reference, asnn.matrix_recurrence_chunked])
@pytest.mark.parametrize("cut", [1, 32, 33, 49])
def test_a_matrix_state_carried_across_two_calls_equals_one(cut, form, delta):
    def two(r, k, v, w, state, beta=None):
        out = []
        for part in (slice(None, cut), slice(cut, None)):
            y, state = form(r[:, part], k[:, part], v[:, part], w, state, None if beta is None else beta[:, part])
            out.append(y)
        return torch.cat(out, 1), state
    arguments = matrix_inputs(50, delta)
    assert_same(with_gradients(two, arguments), with_gradients(form, arguments), 1e-9)


@RULES
@pytest.mark.parametrize("form", MATRIX_FORMS)
def test_no_matrix_state_is_a_state_of_zeros(form, delta):
    r, k, v, w, state, *beta = matrix_inputs(40, delta)
    for a, b in zip(form(r, k, v, w, None, *beta), form(r, k, v, w, torch.zeros_like(state), *beta)):
        assert torch.equal(a, b)


@RULES
def test_gradcheck_of_the_matrix_state(delta):
    arguments = matrix_inputs(5, delta)
    arguments = (*arguments[:3], arguments[3].clamp_min(0.2), *arguments[4:])  # away from the bound, where it bends
    leaves = [x.clone().requires_grad_() for x in arguments]
    assert torch.autograd.gradcheck(lambda *a: asnn.matrix_recurrence_chunked(*a, chunk=2), leaves)


@RULES
@pytest.mark.parametrize("decay", MATRIX_DECAYS)
def test_the_matrix_state_in_fp32_stays_close_to_fp64_over_a_long_window(decay, delta):
    arguments = matrix_inputs(1024, delta, decay, torch.float32)
    exact = with_gradients(asnn.matrix_recurrence_chunked, [x.double() for x in arguments])
    got = with_gradients(asnn.matrix_recurrence_chunked, arguments)
    assert all(x.isfinite().all() for x in got.values())
    assert_same({name: x.double() for name, x in got.items()}, exact, 2e-4)


@RULES
@pytest.mark.parametrize("form", MATRIX_FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_lose_one_rounding_and_keep_the_matrix_state_in_fp32(dtype, form, delta):
    arguments = matrix_inputs(70, delta, dtype=dtype)
    exact, S_exact = asnn.matrix_recurrence_reference(*(x.double() for x in arguments))
    out, S = form(*arguments)
    assert out.dtype == dtype and S.dtype == torch.float32
    torch.testing.assert_close(S.double(), S_exact, rtol=1e-4, atol=1e-4)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=unit, atol=unit * 1e-2)


@RULES
@pytest.mark.parametrize("form", [asnn.matrix_recurrence_reference, asnn.matrix_recurrence_chunked])
@pytest.mark.parametrize("t", [0, 31, 32, 45])
def test_a_changed_key_changes_no_read_out_before_it_nor_in_other_sequences(t, form, delta):
    r, k, v, w, state, *beta = matrix_inputs(50, delta)
    changed = k.clone()
    changed[0, t] = -0.5 * k[0, t].flip(-1)
    before, after = form(r, k, v, w, state, *beta)[0], form(r, changed, v, w, state, *beta)[0]
    assert torch.equal(before[0, :t], after[0, :t]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[0, t], after[0, t])


@pytest.mark.parametrize("form", MATRIX_FORMS)
def test_the_delta_rule_without_beta_is_another_rule(form):
    """That the comparisons above see a term that is left out."""
    arguments = matrix_inputs(33, True)
    expected = with_gradients(asnn.matrix_recurrence_reference, arguments)
    plain = with_gradients(lambda *a: form(*a[:5]), arguments[:5])
    with pytest.raises(AssertionError, match="out: "):
        assert_same(plain, {name: expected[name] for name in plain}, 0.1)


@RULES
def test_inputs_of_the_matrix_state_are_left_as_they_were(delta):
    arguments = matrix_inputs(64, delta)
    copies = [x.clone() for x in arguments]
    with_gradients(asnn.matrix_recurrence_chunked, arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies))


def test_the_model_chooses_among_the_matrix_forms():
    assert asnn.MATRIX_RECURRENCES == {"reference": asnn.matrix_recurrence_reference,
                                       "chunked": asnn.matrix_recurrence_chunked}


def memory(form, keys, values, reads, w=1 - 1e-12, beta=None):
    """What the reads (n, N) find in one head after the values (T, M) were written under the keys (T, N)."""
    T, n = len(keys), len(reads)
    k = torch.cat((keys, torch.zeros(n, keys.shape[1])))  # a key of zeros writes nothing
    r, v = torch.cat((torch.zeros_like(keys), reads)), torch.cat((values, torch.zeros(n, values.shape[1])))
    decay = torch.full((1, keys.shape[1]), w, dtype=torch.float64)
    out, _ = form(*(x.double().view(1, T + n, 1, -1) for x in (r, k, v)), decay, None,
                  None if beta is None else torch.full((1, T + n, 1), beta, dtype=torch.float64))
    return out[0, T:, 0]


@pytest.mark.parametrize("beta", [None, 1.0])
@pytest.mark.parametrize("form", MATRIX_FORMS)
def test_orthonormal_keys_return_what_was_stored_under_them(form, beta):
    keys, values = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0], torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(memory(form, keys, values, keys, beta=beta), values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", MATRIX_FORMS)
def test_the_delta_rule_overwrites_where_the_plain_state_adds(form):
    keys = torch.eye(3, dtype=torch.float64)[[0, 1, 0]]  # the first key comes again, with another value
    values = torch.randn(3, 5, dtype=torch.float64)
    replaced = torch.stack((values[2], values[1]))
    added = torch.stack((values[0] + values[2], values[1]))
    torch.testing.assert_close(memory(form, keys, values, keys[:2], beta=1.0), replaced, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(memory(form, keys, values, keys[:2]), added, rtol=1e-9, atol=1e-9)
    halfway = memory(form, keys, values, keys[:1], beta=0.5)[0]
    torch.testing.assert_close(halfway, 0.25 * values[0] + 0.5 * values[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", MATRIX_FORMS)
def test_what_was_stored_fades_by_the_decay_with_every_token(form):
    key, value = torch.eye(2, dtype=torch.float64)[:1], torch.randn(1, 3, dtype=torch.float64)
    found = memory(form, key, value, key.expand(70, -1), w=0.9)
    torch.testing.assert_close(found, value * 0.9 ** torch.arange(1.0, 71.0, dtype=torch.float64).unsqueeze(1),
                               rtol=1e-9, atol=1e-12)


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
