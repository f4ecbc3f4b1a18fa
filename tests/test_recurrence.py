"""Recurrence: every form is the rule, in values, final states and gradients."""
import pytest
import torch

import asnn_common as asnn

B, D, H, N, M = 2, 6, 2, 3, 4
DECAYS = {"1e-6": [1e-6] * D, "0.378": [0.378] * D, "0.9": [0.9] * D, "1-1e-6": [1 - 1e-6] * D,
          "mixed": [1e-6, 0.15, 0.378, 0.7, 0.95, 1 - 1e-6]}
NAMES = ("r", "k", "v", "w", "state", "beta")
FORMS = {"vector": asnn.RECURRENCES, "matrix": asnn.MATRIX_RECURRENCES,
         "delta": asnn.MATRIX_RECURRENCES, "delta, decays of tokens": asnn.MATRIX_RECURRENCES}
RULES = pytest.mark.parametrize("rule", FORMS)
EXACT = pytest.mark.parametrize("form", ["reference", "chunked"])


def inputs(rule, T, decay="mixed", dtype=torch.float64):
    """r, k, v, w, state and, for the delta rule, keys of length below one and beta."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    heads, more = ((D,), (D,)) if rule == "vector" else ((H, N), (H, M))
    r, k = (torch.randn(B, T, *heads, dtype=torch.float64) for _ in range(2))
    v = torch.randn(B, T, *more, dtype=torch.float64)
    beta = torch.rand(B, T, H, dtype=torch.float64)
    if rule.startswith("delta"):
        k = k / (k.square().sum(-1, keepdim=True) + 0.1).sqrt()
    state = torch.randn(B, *((D,) if rule == "vector" else (H, N, M)), dtype=wide)
    w = torch.tensor(DECAYS[decay], dtype=wide).view(heads)
    if rule.endswith("tokens"):
        w = w.flatten()[torch.randint(0, D, (B, T, *heads))]
    return (*(x.to(dtype) for x in (r, k, v)), w, state,
            *((beta.to(dtype),) if rule.startswith("delta") else ()))


def pieces(function, cuts):
    """The form called part by part, each with the state of the one before."""
    def run(r, k, v, w, state=None, beta=None):
        out, start = [], 0
        for end in (*cuts, k.shape[1]):
            part = slice(start, end)
            more = () if beta is None else (beta[:, part],)
            decay = w[:, part] if w.dim() == 4 else w
            y, state = function(r[:, part], k[:, part], v[:, part], decay, state, *more)
            out.append(y)
            start = end
        return torch.cat(out, 1), state
    return run


def with_gradients(function, arguments):
    """Read-out, final state and the gradients of every input, with both outputs in the loss."""
    leaves = [x.clone().requires_grad_() for x in arguments]
    out, S = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
                for x in (out, S)]
    gradients = torch.autograd.grad((out, S), leaves, upstream)
    return {"out": out.detach(), "final": S.detach(), **dict(zip(NAMES, gradients))}


def assert_same(got, expected, tolerance):
    for name in expected:
        scale = expected[name].abs().max().clamp_min(1e-30)
        error = ((got[name] - expected[name]).abs().max() / scale).item()
        assert error <= tolerance, f"{name}: {error:.1e}"
        assert (got[name].dtype, got[name].shape) == (expected[name].dtype, expected[name].shape)


def by_hand(rule, r, k, v, w, state, beta=None):
    """The rule as it is written, one sequence, head and token at a time."""
    if rule == "vector":  # a head for each channel
        r, k, v, w, state = (x.unsqueeze(-1) for x in (r, k, v, w, state.unsqueeze(-1)))
    out, last = torch.zeros_like(v), torch.zeros_like(state)
    least = 0.0 if rule == "vector" else asnn.MIN_DECAY
    for b in range(B):
        for h in range(k.shape[2]):
            S = state[b, h]
            for t in range(k.shape[1]):
                key, value = k[b, t, h], v[b, t, h]
                new = value if beta is None else beta[b, t, h] * (value - key @ S)
                decay = w[b, t, h] if w.dim() == 4 else w[h]
                S = torch.diag(decay.clamp_min(least)) @ S + torch.outer(key, new)
                out[b, t, h] = r[b, t, h] @ S
            last[b, h] = S
    return (out.squeeze(-1), last.flatten(1)) if rule == "vector" else (out, last)


@RULES
@pytest.mark.parametrize("name", ["reference", "chunked", "steps"])
@pytest.mark.parametrize("decay", DECAYS)
def test_every_form_is_the_rule_as_it_is_written(name, rule, decay):
    arguments, chunked = inputs(rule, 9, decay), FORMS[rule]["chunked"]
    form = pieces(chunked, range(1, 9)) if name == "steps" else FORMS[rule][name]
    for got, expected in zip(form(*arguments), by_hand(rule, *arguments)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@RULES
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 31, 32, 33, 64, 255, 1024])
def test_chunked_is_the_loop_with_its_gradients(T, decay, rule):
    arguments = inputs(rule, T, decay)
    assert_same(with_gradients(FORMS[rule]["chunked"], arguments),
                with_gradients(FORMS[rule]["reference"], arguments), 1e-9)


@RULES
@pytest.mark.parametrize("T", [2, 31, 100])
@pytest.mark.parametrize("chunk", [1, 2, 8, 16])
def test_chunk_size_does_not_matter(chunk, T, rule):
    arguments, chunked = inputs(rule, T), FORMS[rule]["chunked"]
    assert_same(with_gradients(lambda *a: chunked(*a, chunk=chunk), arguments),
                with_gradients(FORMS[rule]["reference"], arguments), 1e-9)


@RULES
@EXACT
@pytest.mark.parametrize("cuts", [(1,), (32,), (33, 49), tuple(range(1, 50))])
def test_a_state_carried_across_calls_equals_one_call(cuts, form, rule):
    arguments, form = inputs(rule, 50), FORMS[rule][form]
    got, expected = (with_gradients(f, arguments) for f in (pieces(form, cuts), form))
    assert_same(got, expected, 1e-9)


@RULES
@pytest.mark.parametrize("decay", DECAYS)
def test_fp32_stays_close_to_fp64_over_a_long_window(decay, rule):
    arguments, chunked = inputs(rule, 1024, decay, torch.float32), FORMS[rule]["chunked"]
    exact = with_gradients(chunked, [x.double() for x in arguments])
    got = with_gradients(chunked, arguments)
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in got.values())
    assert_same({name: x.double() for name, x in got.items()}, exact, 2e-4)


@RULES
@pytest.mark.parametrize("name", ["reference", "chunked", "steps"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_lose_one_rounding_and_keep_the_state_in_fp32(dtype, name, rule):
    arguments, forms = inputs(rule, 70, dtype=dtype), FORMS[rule]
    form = pieces(forms["chunked"], range(1, 70)) if name == "steps" else forms[name]
    exact, S_exact = forms["reference"](*(x.double() for x in arguments))
    out, S = form(*arguments)
    assert out.dtype == dtype and S.dtype == torch.float32
    torch.testing.assert_close(S.double(), S_exact, rtol=1e-4, atol=1e-4)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=unit, atol=unit * 1e-2)


@RULES
def test_no_state_is_a_state_of_zeros(rule):
    r, k, v, w, state, *beta = inputs(rule, 40)
    for form in FORMS[rule].values():
        for a, b in zip(form(r, k, v, w, None, *beta),
                        form(r, k, v, w, torch.zeros_like(state), *beta)):
            assert torch.equal(a, b)


@RULES
def test_gradcheck(rule):
    r, k, v, w, *more = (x[:1] if len(x) == B and x.dim() > 2 else x for x in inputs(rule, 5))
    more[0] = more[0][:1]
    leaves = [x.clone().requires_grad_() for x in (r, k, v, w.clamp(0.2, 0.9), *more)]
    assert torch.autograd.gradcheck(lambda *a: FORMS[rule]["chunked"](*a, chunk=2), leaves)


@RULES
@EXACT
@pytest.mark.parametrize("t", [0, 31, 32, 45])
def test_a_changed_key_changes_nothing_before_it_nor_in_other_sequences(t, form, rule):
    r, k, v, w, *more = inputs(rule, 50)
    changed = k.clone()
    changed[0, t] = -0.5 * k[0, t].flip(-1)
    before, after = (FORMS[rule][form](r, keys, v, w, *more)[0] for keys in (k, changed))
    assert torch.equal(before[0, :t], after[0, :t]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[0, t], after[0, t])


@RULES
def test_inputs_are_left_as_they_were(rule):
    arguments = inputs(rule, 64)  # whole chunks: nothing was copied to pad them
    copies = [x.clone() for x in arguments]
    with_gradients(FORMS[rule]["chunked"], arguments)
    FORMS[rule]["chunked"](*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies))


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("rule, chunks, allowed", [("vector", (0, 3, 48, -16), "a power of two"),
                                                   ("matrix", (0, 33, -1), "1 to 32")])
def test_wrong_chunks_are_refused(rule, chunks, allowed, T):
    for chunk in chunks:
        with pytest.raises(ValueError, match=f"chunk is {chunk}; allowed: {allowed}"):
            FORMS[rule]["chunked"](*inputs(rule, T), chunk=chunk)


# ---- the founders' formula -----------------------------------------------------------------------


def test_the_founders_cumsum_is_right_for_ten_tokens_and_wrong_after_twenty_five():
    r, k, v = (torch.randn(1, 64, 4096) for _ in range(3))
    got, expected = (asnn.RECURRENCES[name](r, k, v, torch.full((4096,), 0.378))[0]
                     for name in ("cumsum", "reference"))
    error = ((got - expected).norm(dim=-1) / expected.norm(dim=-1))[0]
    assert error[:10].max() < 1e-3 and (error[24:] > 0.5).all()
