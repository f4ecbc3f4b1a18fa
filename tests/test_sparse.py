"""Sparse decoding: products, the C++ kernel, the decoding copy of a student, its compiled step, and
the ways to multiply that v16 compares."""
import copy
import functools
import inspect
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import asnn_common as asnn
from conftest import definitions, shake

V, D = 50, 32
v16 = definitions("asnn_v16_sparse")
SIZES = [(1, 3), (7, 5), (33, 1), (64, 40), (257, 100)]  # X, out: odd, beside a line of the cache
KINDS = {"delta": {"state_kind": "delta", "projection_bias": True},
         "delta, counts": {"state_kind": "delta", "encoder_kind": "integer:3"},
         "matrix": {"state_kind": "matrix", "threshold": "mixed_fixed"},
         "vector": {"state_kind": "vector"},
         "delta, two trains": {"state_kind": "delta", "spike_steps": 2, "decay": "token",
                               "rotated_sites": ("mix_in", "ffn_hidden")}}


def spikes_of(n, X, density, levels=1):
    signs = torch.where(torch.rand(n, X) < 0.5, -1.0, 1.0) * torch.randint(1, levels + 1, (n, X))
    return signs * (torch.rand(n, X) < density)


def error(got, expected):
    """Relative to the norm."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def build(**options):
    """A student whose parameters are all away from their start values, with calibrated encoders."""
    torch.manual_seed(0)
    model = shake(asnn.GooseForCausalLM(asnn.GooseConfig(**{
        "vocab_size": V, "d_model": D, "n_layer": 2, "n_positions": 24, "pad_token_id": 0,
        "head_dim": 8, "spike_sites": asnn.SITES, **options})).eval())
    hooks = [module.register_forward_pre_hook(lambda module, args: module.calibrate(args[0]))
             for module in asnn.spike_modules(model).values() if module.kind != "dense"]
    with torch.no_grad():
        model(torch.randint(1, V, (8, 24)))
    for hook in hooks:
        hook.remove()
    return model


@pytest.fixture(scope="module", autouse=True)
def kernel(cache, tmp_path_factory):
    """The kernel, built by g++ alone in the cache of all tests: "", or why not."""
    tools = tmp_path_factory.mktemp("tools")
    for name in ("g++", "as", "ld"):
        if shutil.which(name):
            (tools / name).symlink_to(shutil.which(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASNN_CACHE", str(cache))
        patch.setenv("PATH", str(tools))
        patch.delenv("ASNN_KERNEL", raising=False)
        assert shutil.which("ninja") is None
        return asnn._load_kernel()


@pytest.fixture
def gather_rows(kernel):
    """The kernel itself; a machine without a compiler has none."""
    if kernel:
        pytest.skip(kernel)
    return torch.ops.asnn_goose.gather_rows


@pytest.fixture(scope="module")
def students():
    """students(name): one of KINDS, built once."""
    return functools.cache(lambda name: build(**KINDS[name]))


@pytest.fixture
def ids():
    return torch.randint(1, V, (3, 12))


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# ---- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", v16.WAYS)
def test_every_way_is_the_dense_product(way, threads):
    """At every density, number of tokens and odd shape, for ternary spikes and counts; the error is
    relative to the norm that the result has when terms do not cancel."""
    bound = 0.02 if way.endswith("int8") else 1e-5
    for (X, out), n, density in itertools.product(SIZES, (1, 2, 7, 64), (0.0, 0.02, 0.3, 1.0)):
        for levels in (1, 3):
            rows, spikes = torch.randn(X, out), spikes_of(n, X, density, levels)
            got = v16.WAYS[way](v16.weights_for(way, rows), spikes)
            assert got.shape == (n, out) and got.dtype == torch.float32
            size = (spikes.square() @ rows.square()).sum().sqrt()
            off = (got - spikes.double() @ rows.double()).norm()
            assert off <= bound * size, (X, out, n, density)


@pytest.mark.parametrize("way", [way for way in v16.WAYS if way != "linear"])
def test_a_channel_that_is_silent_is_not_read(way):
    rows, spikes = torch.randn(96, 7), torch.zeros(1, 96)
    spikes[0, 5] = 1.0
    rows[40:] = math.nan
    assert v16.WAYS[way](v16.weights_for(way, rows), spikes).isfinite().all()


def test_int8_rows_cost_0_7_percent_and_have_a_scale_and_an_offset_each():
    rows, spikes = torch.randn(768, 768), spikes_of(4, 768, 0.4)
    gather, packed = asnn.PRODUCTS["gather_int8"], asnn._weights_for("gather_int8", rows)
    assert 0.005 < error(gather(packed, spikes), spikes @ rows) < 0.009
    sizes, offsets = torch.logspace(-6, 4, 40), torch.linspace(-3, 3, 40)  # very different ones
    rows = torch.randn(40, 100) * sizes.unsqueeze(1) + offsets.unsqueeze(1)
    rows[3], rows[4] = 0.0, 2.5  # no range
    packed = asnn._weights_for("gather_int8", rows)
    assert packed.dtype == torch.uint8 and packed.shape == (40, 108)
    step = (rows.max(1).values - rows.min(1).values) / 255
    off = (gather(packed, torch.eye(40)) - rows).abs().max(1).values
    assert (off <= 0.501 * step + 1e-6 * rows.abs().max(1).values).all()


@pytest.mark.parametrize("dtype, spiking, bound", [
    (torch.float64, torch.float64, 1e-12), (torch.bfloat16, torch.bfloat16, 2e-2),
    (torch.float32, torch.int8, 1e-5)])
def test_gather_takes_other_types_and_strides(dtype, spiking, bound):
    for n in (1, 4):
        rows, wide = torch.randn(40, 20).to(dtype), torch.full((n, 80), 7.0)
        wide[:, ::2] = spikes_of(n, 40, 0.4)
        got, spikes = asnn.PRODUCTS["gather"](rows, wide.to(spiking)[:, ::2]), wide[:, ::2]
        assert got.dtype == dtype and error(got, spikes.double() @ rows.double()) < bound


# ---- the kernel ----------------------------------------------------------------------------------


def test_the_kernel_is_built_by_one_call_of_the_compiler(kernel, cache):
    """With g++, as and ld on the path and nothing else; skipped where there is no g++."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    assert kernel == ""
    library, = (cache / "kernels").glob("*/*")  # and nothing else is left
    assert library.stem == asnn._content_hash(library.read_bytes())


def test_the_kernel_is_exact_on_whole_numbers_and_is_the_fallback(gather_rows, threads):
    for X, out, n, count in itertools.product((1, 4, 17, 65, 300), (1, 16, 65, 200), (0, 1, 5),
                                              (0, 1, 4, 21, 300)):
        index = torch.rand(n, X).topk(min(count, X)).indices
        spikes = torch.zeros(n, X).scatter(1, index, torch.randint(1, 4, index.shape).float())
        rows = torch.randint(-99, 100, (X, out)).float()
        assert torch.equal(gather_rows(rows, spikes), spikes @ rows), (X, out, n, count)
        steps = torch.randint(0, 256, (X, out), dtype=torch.uint8)
        pair = torch.randint(-64, 65, (X, 2)).float()
        packed = torch.cat((steps, pair.view(torch.uint8)), 1)
        expected = spikes @ (pair[:, :1] * steps + pair[:, 1:])
        assert torch.equal(gather_rows(packed, spikes), expected), (X, out, n, count)
        if n:
            close(asnn._embedding_bag(rows, spikes), spikes @ rows)
            close(asnn._embedding_bag(packed, spikes), expected)


@pytest.mark.parametrize("rows, spikes", [
    (torch.zeros(5, 3), torch.zeros(1, 4)), (torch.zeros(5, 3).double(), torch.zeros(1, 5)),
    (torch.zeros(5, 3), torch.zeros(1, 5).double()), (torch.zeros(3, 5).t(), torch.zeros(1, 5)),
    (torch.zeros(5, 3), torch.zeros(5, 2).t()), (torch.zeros(5), torch.zeros(1, 5)),
    (torch.zeros(5, 7, dtype=torch.uint8), torch.zeros(1, 5))])
def test_the_kernel_refuses_what_it_would_misread(gather_rows, rows, spikes):
    with pytest.raises((RuntimeError, IndexError), match="gather_rows|scalar type|Dimension"):
        gather_rows(rows, spikes)


@pytest.mark.parametrize("name", ["gather", "gather_int8"])
def test_the_kernel_is_what_it_tells_the_compiler_it_is(gather_rows, name):
    arguments = asnn._weights_for(name, torch.randn(40, 20)), spikes_of(5, 40, 0.4)
    torch.library.opcheck(gather_rows.default, arguments,
                          test_utils=("test_schema", "test_faketensor"))


def other_process(code, **variables):
    """What the code prints in a process of its own, where no kernel is loaded."""
    begin = "import torch, asnn_common as asnn\nprint(repr(problem := asnn._load_kernel()))\n"
    done = subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True,
                          timeout=300, env={**os.environ, **variables, "PYTHONPATH": str(
                              Path(asnn.__file__).parent)})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


SAME = """
rows = torch.randn(40, 20)
for n in (1, 3):
    spikes = (torch.rand(n, 40) < 0.4).float()
    for name, bound in (("gather", 1e-5), ("gather_int8", 0.02)):
        got = asnn.PRODUCTS[name](asnn._weights_for(name, rows), spikes)
        assert (got - spikes @ rows).norm() < bound * (spikes @ rows).norm(), name
"""
COMPILED = """
import torch._dynamo
torch.manual_seed(0)
config = asnn.GooseConfig(vocab_size=50, d_model=32, n_layer=1, head_dim=8, spike_sites=asnn.SITES)
student, compile_ = asnn.GooseForCausalLM(config).eval(), torch.compile
torch.compile = lambda f, **options: compile_(f, **options, backend="eager", fullgraph=True)
sparse = asnn.sparsify(student)
assert problem in sparse.without_kernel
sparse.goose.blocks[0].compiled = "by hand: there is no compiler"
ids = torch.randint(0, 50, (1, 6))
with torch.no_grad():
    for model in (sparse, asnn.sparsify(student, {})):
        assert torch.allclose(asnn.Decoder(model, ids)(), asnn.Decoder(student, ids)(), atol=1e-4)
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_without_a_compiler_there_is_a_sentence_and_the_same_numbers(tmp_path):
    """And a decoding step is traced all the same: torch.compile does not depend on the kernel."""
    problem, graphs = other_process(SAME + COMPILED, ASNN_CACHE=str(tmp_path), CXX="no-g++")
    assert problem == "'there is no C++ kernel: the compiler no-g++ was not found'"
    assert graphs == "1"
    assert not [path for path in tmp_path.rglob("*.so")]


def test_a_damaged_library_is_built_again(gather_rows, cache, tmp_path):
    """By a stand-in for the compiler, which copies the whole library and takes no time."""
    library = next((cache / "kernels").glob("*/*.so"))
    damaged = tmp_path / "kernels" / library.parent.name / library.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(library.read_bytes()[:library.stat().st_size // 2])  # would be a bus error
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp {library} "$2"\n')
    compiler.chmod(0o755)
    assert other_process(SAME, ASNN_CACHE=str(tmp_path), CXX=str(compiler)) == ["''"]
    assert damaged.read_bytes() == library.read_bytes()


def test_a_compiler_that_fails_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'a note\ngather.cpp:1: fatal error: omp.h' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(OSError, match="failed, gather.cpp:1: fatal error: omp.h$"):
        asnn._build_kernel(tmp_path / "kernels")
    assert not list((tmp_path / "kernels").iterdir())


# ---- the decoding copy of a student --------------------------------------------------------------


PLANS = [("gather", "dense"), ("linear", "spikes"), ("gather", "spikes"), ({}, "dense"),
         ({"ffn_hidden": "gather", "0.mix_in.k": "linear", "head_in": "gather"}, "spikes")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan, head", PLANS)
@torch.no_grad()
def test_a_sparse_copy_is_the_student(students, ids, kind, plan, head):
    student = students(kind)
    before = copy.deepcopy(student.state_dict())
    sparse = asnn.sparsify(student, plan, head)
    close(sparse(ids).logits, student(ids).logits)
    words = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(sparse.generate(ids, **words), student.generate(ids, **words))
    seen = [], []
    for model, spikes in zip((student, sparse), seen):
        with asnn.spike_hooks(model, lambda name, s, spikes=spikes: spikes.append((name, s))):
            model(ids)
    assert [name for name, _ in seen[0]] == [name for name, _ in seen[1]] and len(seen[0]) > 9
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*seen))
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert not any(p.requires_grad for p in sparse.parameters()) and not sparse.training


def test_a_plan_names_sites_the_more_exact_name_first(students):
    sparse = asnn.sparsify(students("delta"), {"mix_in": "gather", "1.mix_in.k": "gather_int8",
                                               "0.ffn_in": "linear"})
    found = {name: module.backend for name, module in sparse.named_modules()
             if isinstance(module, asnn._SpikeLinear)}
    mix = {f"goose.blocks.{i}.time_mix.{name}": "gather" for i in (0, 1)
           for name in ("key", "beta", "value", "receptance", "gate")}
    mix |= {f"goose.blocks.1.time_mix.{name}": "gather_int8" for name in ("key", "beta")}
    assert found == {**mix, "goose.blocks.0.ffn.up": "linear"}
    assert type(sparse.goose.blocks[1].ffn.up) is torch.nn.Linear
    assert sparse.without_kernel == asnn._load_kernel()


@torch.no_grad()
def test_int8_forms_are_near_the_student_and_smaller(ids):
    """Without a second layer, whose spikes flip where int8 moves a value over a threshold."""
    student = build(n_layer=1, state_kind="vector", spike_sites=("k", "v", "ffn_hidden"))
    for embeddings in ("dense", "int8"):
        sparse = asnn.sparsify(student, {"ffn_hidden": "gather_int8"}, "int8", embeddings)
        assert 0 < error(sparse(ids[:, ::2]).logits, student(ids[:, ::2]).logits) < 0.2
    sizes = [asnn.Decoder(model, ids).memory()["weights"] for model in (sparse, student)]
    down, table = student.goose.blocks[0].ffn.down.weight, student.goose.embeddings.weight
    assert sizes[1] - sizes[0] > 0.4 * (down.nbytes + table.nbytes)


@pytest.mark.parametrize("options, arguments, message", [
    ({"spike_sites": ("k", "v")}, {}, "one without spikes before its products"),
    ({"spike_kind": "dense"}, {}, "student is 'one without spikes before its products'; allowed"),
    ({}, {"backend": "csr"}, "backend is 'csr'; allowed: linear, gather, gather_int8, or {site: "),
    ({}, {"backend": None}, "backend is None; allowed: linear, gather"),
    ({}, {"backend": {"mix_in": "auto"}}, "backend is 'auto'; allowed: linear, gather"),
    ({}, {"backend": {"mix_im": "gather"}}, "site is 'mix_im'; allowed: mix_in, mix_out, ffn_in"),
    ({}, {"backend": {"2.ffn_in": "gather"}}, "site is '2.ffn_in'; allowed: mix_in"),
    ({}, {"head": "int3"}, "head is 'int3'; allowed: dense, int8"),
    ({"spike_sites": ("k", "v", "mix_in")}, {"head": "spikes"},
     "(spikes need the site head_in, int4 the C++ kernel and a width that 32 divides)."),
    ({"d_model": 24}, {"head": "int4"}, "head is 'int4'; allowed: dense, int8, spikes (spikes"),
    ({}, {"embeddings": "int4"}, "embeddings is 'int4'; allowed: dense, int8.")])
def test_bad_input_is_refused_in_one_sentence(options, arguments, message):
    with pytest.raises(ValueError) as refusal:
        asnn.sparsify(build(**options), **arguments)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_sparse_copy_is_neither_saved_nor_made_sparse_again(students, tmp_path):
    sparse = asnn.sparsify(students("vector"))
    with pytest.raises(ValueError, match="cannot be saved: save the student it was made of.$"):
        sparse.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="student is 'a sparse copy'; allowed: its original"):
        asnn.sparsify(sparse)


# ---- the compiled step ---------------------------------------------------------------------------


@torch.no_grad()
def decode(model, ids):
    """Logits (B, T, V) token by token, and the last state."""
    state, logits = None, []
    for t in range(ids.shape[1]):
        out = model(ids[:, t:t + 1], state=state, use_cache=True)
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, 1), state


@pytest.fixture
def traced(monkeypatch):
    """The compiled path with its guards, traced anew and run operation by operation: a second
    instead of ten. Raises where the tracer cannot follow; traced() is the number of graphs."""
    torch.compiler.reset()
    counters, compile_ = torch._dynamo.utils.counters, torch.compile
    counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **options: compile_(
            f, **options, backend="eager", fullgraph=True))
        layer = inspect.unwrap(asnn._compiled_layer)()
    monkeypatch.setattr(asnn, "_compiled_layer", lambda: layer)
    return lambda: counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind, plan", [
    ("vector", {}), ("matrix", {"ffn_hidden": "gather"}), ("delta", "gather")])
def test_a_compiled_step_is_the_plain_one_in_one_graph_for_all_layers(students, traced, kind, plan):
    ids = torch.randint(1, V, (1, 8))
    plain, compiled = (asnn.sparsify(students(kind), plan, compiled=c) for c in (False, True))
    assert not plain.goose.blocks[0].compiled and compiled.goose.blocks[1].compiled
    (expected, state), (got, compiled_state) = decode(plain, ids), decode(compiled, ids)
    close(got, expected)
    close(compiled_state.layers[1].S, state.layers[1].S)
    assert traced() == 1


def test_students_that_differ_in_what_is_no_tensor_do_not_share_a_step(traced):
    """One after the other, of the same shapes: each could take a graph that is not its own."""
    ids, structures, sites = torch.randint(1, V, (1, 4)), set(), ("k", "v", "mix_out")
    for plan, options in (("gather", {}), ("linear", {}), ("gather", {"encoder_kind": "integer:3"}),
                          ("gather", {"activation": "relu"}), ("gather", {"recurrence": "cumsum"})):
        student = build(state_kind="vector", n_layer=1, spike_sites=sites, **options)
        plain, compiled = (asnn.sparsify(student, plan, compiled=c) for c in (False, True))
        close(decode(compiled, ids)[0], decode(plain, ids)[0])
        structures.add(compiled.goose.blocks[0].compiled)
    assert len(structures) == 5


def test_hooks_see_and_change_the_spikes_of_a_compiled_copy(students, traced):
    ids, compiled = torch.randint(1, V, (1, 5)), asnn.sparsify(students("vector"), compiled=True)
    before, seen = decode(compiled, ids)[0], []
    with asnn.spike_hooks(compiled, lambda _name, spikes: seen.append(spikes), ["0.ffn_hidden"]):
        assert error(decode(compiled, ids)[0], before) < 1e-5
    assert len(seen) == 5
    with asnn.spike_hooks(compiled, lambda _name, s: torch.zeros_like(s), ["0.ffn_hidden"]):
        assert error(decode(compiled, ids)[0], before) > 1e-3
    assert compiled.goose.blocks[0].compiled and error(decode(compiled, ids)[0], before) < 1e-5


def test_a_step_is_really_compiled(gather_rows):
    """By the library's compiler, in one graph, the kernel in it."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    ids = torch.randint(1, V, (1, 5))
    student = build(state_kind="vector", n_layer=1, spike_sites=("k", "v", "ffn_hidden"))
    got = decode(asnn.sparsify(student, compiled=True), ids)[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    close(got, decode(student, ids)[0])


def test_without_a_compiler_nothing_is_called_compiled(students, monkeypatch):
    monkeypatch.setenv("CXX", "no-g++")
    with pytest.warns(UserWarning, match="^not compiled: there is no C"):
        sparse = asnn.sparsify(students("vector"), compiled=True)
    assert not any(block.compiled for block in sparse.goose.blocks)


# ---- the step in C++ -----------------------------------------------------------------------------


STEPS = {"delta": {"projection_bias": True, "activation": "gelu_pytorch_tanh"},
         "delta, counts": {"encoder_kind": "integer:3", "spike_kind": "integer:2",
                           "spike_steps": 2},
         "delta, binary": {"spike_kind": "binary", "granularity": "channel", "activation": "relu",
                           "spike_steps": {"v": 2, "ffn_in": 2}},
         "matrix": {"state_kind": "matrix", "threshold": "mixed_fixed"},
         "matrix, v14.5": {"state_kind": "matrix", "threshold": "mixed_fixed", "spike_steps": 2,
                           "decay": "token"},
         "v14.5": {"spike_steps": 2, "decay": "token", "decay_rank": 5,
                   "rotated_sites": asnn.SITES[2:-1]}}


def same_states(a, b):
    assert a.length == b.length and torch.equal(a.position, b.position)
    for one, other in zip(a.layers, b.layers):
        assert all(x.shape == y.shape for x, y in zip(one, other))
        close(one.S, other.S)
        close(one.shift, other.shift)


def pair(student, *arguments):
    """A sparse copy with products in Python, and one with the step in C++."""
    plain, whole = (asnn.sparsify(student, "gather_int8", *arguments, compiled=c)
                    for c in (False, True))
    assert plain.without_step == "compiled is False" and whole.without_step == ""
    return plain, whole


@pytest.fixture
def counted(monkeypatch):
    """The calls of the C++ step, as they are made."""
    calls, call = [], asnn._Step.__call__
    monkeypatch.setattr(asnn._Step, "__call__", lambda *a: calls.append(0) or call(*a))
    return calls


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("head, table, sites", [
    ("dense", "dense", asnn.SITES[:-1]), ("int8", "int8", asnn.SITES[:-1]),
    ("int4", "int8", asnn.SITES[:-1]), ("spikes", "int8", asnn.SITES)])
@torch.no_grad()
def test_the_step_in_cpp_is_the_sparse_copy(gather_rows, threads, counted, kind, head, table,
                                            sites):
    student = build(**{"state_kind": "delta", "spike_sites": sites, **STEPS[kind]})
    student.goose.blocks[0].ffn.ffn_hidden.alpha[::3] = 1e-3  # below what a threshold may be
    plain, whole = pair(student, head, table)
    ids = torch.randint(1, V, (1, 30))  # past the 24 positions
    (expected, state), (got, after) = decode(plain, ids), decode(whole, ids)
    assert len(counted) == 29  # the first token has no state
    same_states(after, state)
    # Rounding of the head's input, to 15 bits or to 8, may fall to either side of a tie.
    assert error(got, expected) < (0.01 if head == "int4" else 1e-4)


@torch.no_grad()
def test_a_threshold_that_is_met_exactly_does_not_fire_in_cpp_either(gather_rows, counted):
    """What stands before W_1 has the same size in all channels, so that every theta is met."""
    student = build(state_kind="delta", n_layer=1, spike_sites=asnn.SITES[:-1])
    block = student.goose.blocks[0]
    block.ln_2.weight.zero_()
    block.ln_2.bias.copy_(torch.where(torch.arange(D) % 3 == 0, -0.5, 0.5))
    code, ids, seen = block.ffn.ffn_in, torch.randint(1, V, (1, 6)), []
    code.centre.zero_()
    for share in (1.0, 0.9):
        code.alpha.fill_(share)
        plain, whole = pair(student)
        (expected, state), (got, after) = decode(plain, ids), decode(whole, ids)
        close(got, expected)
        same_states(after, state)
        with asnn.spike_hooks(plain, lambda _name, s: seen.append(s.ne(0)), ["0.ffn_in"]):
            plain(ids)
    assert not seen[0].any() and seen[1].all() and len(counted) == 10


@torch.no_grad()
def test_what_is_no_single_token_goes_the_present_way(gather_rows, counted, ids):
    student = build(state_kind="delta", spike_sites=asnn.SITES[:-1])
    plain, whole = pair(student, "int8", "int8")
    for block in whole.goose.blocks:
        block.compiled = ""  # a batch would wait for torch.compile
    state = plain(ids[:1], use_cache=True).state
    wide = plain(ids, use_cache=True).state
    one, many, mask = ids[:1, :1], ids[:, :1], torch.tensor([[1, 1], [0, 1], [1, 1]])
    calls = [((many,), {"state": wide}), ((ids[:1, :3],), {"state": state}),
             ((many,), {"state": wide, "attention_mask": mask}), ((one,), {}),
             ((one,), {"state": state, "labels": one}),
             ((one,), {"state": state, "output_hidden_states": True}),
             ((), {"inputs_embeds": plain.goose.embeddings(one), "state": state})]
    for arguments, words in calls:
        close(whole(*arguments, **words).logits, plain(*arguments, **words).logits)
    with torch.enable_grad():
        whole(one, state=state)
    with asnn.spike_hooks(whole, lambda _name, s: torch.zeros_like(s), ["0.ffn_hidden"]):
        whole(one, state=state)
    close(copy.deepcopy(whole)(one, state=state).logits, plain(one, state=state).logits)
    assert not counted
    close(whole(one, state=state).logits, plain(one, state=state).logits)
    close(asnn.Decoder(whole, ids[:1])(), asnn.Decoder(plain, ids[:1])())
    assert len(counted) == 2
    with pytest.raises(IndexError, match="out of range"):
        whole(one + V, state=state)


def test_generate_gives_the_same_text_by_the_step_in_cpp(gather_rows, counted, ids):
    words = {"max_new_tokens": 12, "pad_token_id": 0}
    plain, whole = pair(build(state_kind="delta", spike_sites=asnn.SITES[:-1]), "int8", "int8")
    expected = plain.generate(ids[:1], do_sample=False, **words)
    assert torch.equal(whole.generate(ids[:1], do_sample=False, **words), expected)
    assert len(counted) == 11


@pytest.mark.parametrize("options, plan, why", [
    ({"state_kind": "vector"}, "gather_int8", "state_kind matrix and delta"),
    ({}, "gather", "gather_int8 at all sites"), ({"activation": "tanh"}, "gather_int8", "activa")])
def test_where_there_is_no_step_in_cpp_a_sentence_says_why(gather_rows, options, plan, why):
    half = asnn.sparsify(build(state_kind="delta").bfloat16(), "gather_int8", compiled=True)
    assert "fp32" in half.without_step and half.step is None
    sparse = asnn.sparsify(build(**{"state_kind": "delta", **options}), plan, compiled=True)
    assert why in sparse.without_step and sparse.step is None
    assert sparse.goose.blocks[0].compiled


@pytest.mark.parametrize("kind, bound", [("int8", 0.01), ("int4", 0.11)])
@torch.no_grad()
def test_a_head_in_few_bits_is_near_the_dense_one(gather_rows, threads, kind, bound):
    for size, n in ((1, 1), (50, 3), (131, 40)):
        weight = torch.randn(size, 64) * torch.logspace(-2, 2, size).unsqueeze(1)
        weight[size // 2] = 0.0
        head = asnn._Head(weight, kind, None)
        x = torch.randn(n, 1, 64) * torch.logspace(-3, 3, n).view(n, 1, 1)
        got, expected = head(x), x @ weight.t()
        assert got.shape == (n, 1, size)
        norms = x.norm(dim=-1, keepdim=True) * weight.norm(dim=1)
        assert (got - expected).norm() <= bound * norms.norm()
    near = asnn._Head(torch.eye(64) * 8, kind, None)  # values that both kinds have exactly
    assert error(near(torch.eye(64)), torch.eye(64) * 8) < 1e-4


# ---- the page ------------------------------------------------------------------------------------


def surface(*rows):
    return [{"tokens": n, "density": density, "seconds": {"linear": 1.0, "gather": seconds}}
            for n, density, seconds in rows]


def test_where_a_way_stops_to_win_is_read_from_the_measured_rows():
    rows = surface((1, 0.8, 1.2), (1, 0.1, 0.2), (1, 0.4, 0.9), (1, 1.0, 0.8), (4, 0.4, 0.5),
                   (16, 0.4, 2.0), (64, 0.4, 3.0))
    assert v16.break_even(rows, "gather", 1) == 0.4 and v16.break_even(rows, "gather", 16) == 0.0
    assert v16.crossover(rows, "gather", 0.45) == pytest.approx(8.0)  # half way from 4 to 16
    assert v16.crossover(surface((1, 0.4, 0.5), (16, 0.4, 0.9)), "gather", 0.4) is None
    assert v16.crossover(surface((1, 0.4, 1.5), (16, 0.4, 3.0)), "gather", 0.4) == 1.0


def test_sentences_say_what_the_numbers_do():
    assert v16.reach("gather", 1.0) == "gather is faster at every density"
    assert v16.reach("csr", 0.2) == "csr is faster up to a density of 0.2"
    assert v16.reach("csr", 0.0) == "csr is faster at no density"
    assert v16.owed("gather", [2.0], [1.5]).endswith("most is owed to skipping.")
    assert v16.owed("gather", [1.2], [5.0]).endswith("most is owed to the kernel, not to zeros.")


def test_turns_and_bytes_are_what_a_timing_needs():
    spikes = v16.random_spikes(64, 999, 0.4, torch.Generator().manual_seed(1))
    assert spikes.ne(0).float().mean().item() == pytest.approx(0.4, abs=0.01)
    turns = v16.turns(torch.ones(50, 20), total=10 * 4000)
    first, second = ([next(turns).data_ptr() for _ in range(11)] for _ in range(2))
    assert len(set(first)) == 11 and first == second  # each a storage of its own
    calls = v16.calls_for(33, 11, v16.WAYS)(spikes_of(3, 33, 0.4))
    assert {call().shape for call in calls.values()} == {(3, 11)}
    sizes = [v16.bytes_read(way, 10, 20, 0.5) for way in ("gather", "linear", "gather_int8", "csr")]
    assert sizes[:3] == [400, 800, 140] and math.isnan(sizes[3])
