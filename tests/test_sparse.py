"""Sparse products: every backend against dense, the C++ kernel, the measured choice among them, the decoding copy of a
student and its compiled step."""
import copy
import inspect
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import asnn_common as asnn
from conftest import shake

V, D = 50, 32
SIZES = [(1, 3), (7, 5), (33, 1), (64, 40), (257, 100)]  # X, out: below, at and beside multiples of BLOCK
STUDENTS = {"delta": {"state_kind": "delta", "projection_bias": True},
            "delta, counts": {"state_kind": "delta", "encoder_kind": "integer:3", "threshold": "channel"},
            "matrix": {"state_kind": "matrix", "threshold": "mixed"},
            "vector": {"state_kind": "vector"}}
FED = {"mix_in.k": "time_mix.key", "mix_in.v": "time_mix.value", "mix_in.r": "time_mix.receptance",
       "mix_in.g": "time_mix.gate", "mix_out": "time_mix.output", "ffn_in": "ffn.up", "ffn_hidden": "ffn.down"}
BOUND = {name: 1e-5 if name in asnn.EXACT else 0.02 for name in asnn.BACKENDS}  # relative, in the norm


def error(got, expected):
    """Relative to the norm; an expected zero must be met exactly."""
    difference = (got.double() - expected.double()).norm().item()
    return difference / expected.double().norm().item() if expected.any() else math.inf if difference else 0.0


def product(name, rows, spikes):
    return asnn.PRODUCTS[name](asnn.product_weights(name, rows), spikes)


def check_product(name, rows, spikes):
    """One product against fp64, and its shape; returns its type. The error is relative to the norm that the result
    has when terms do not cancel, so that a sum that happens to be near zero does not count against its order."""
    got, rows, spikes = product(name, rows, spikes), rows.double(), spikes.double()
    assert got.shape == (len(spikes), rows.shape[1])
    size = (spikes.square() @ rows.square()).sum().sqrt()
    assert (got - spikes @ rows).norm() <= BOUND[name] * size, (name, tuple(rows.shape), len(spikes))
    return got.dtype


def counts(n, X, density):
    """Spikes of an encoder of kind integer:3."""
    return asnn.random_spikes(n, X, density) * torch.randint(1, 4, (n, X))


def cell(tokens, density, X=6, out=4, device="cpu", **seconds):
    return {"in": X, "out": out, "tokens": tokens, "density": density, "device": device, "seconds": seconds}


def small_table():
    """Another backend for each number of tokens, in all shapes that a student of width D has."""
    winners = dict(zip(asnn.BackendTable.TOKENS, ("gather", "csr", "block", "dense")))
    return asnn.BackendTable([cell(n, 0.4, X, out, **{name: 1.0 if name == winner else 2.0 for name in asnn.EXACT})
                              for X, out in ((D, D), (D, 4 * D), (4 * D, D)) for n, winner in winners.items()])


def build(**options):
    """A student whose parameters are all away from their start values, with calibrated encoders at all sites."""
    torch.manual_seed(0)
    values = {"vocab_size": V, "d_model": D, "n_layer": 2, "n_positions": 24, "pad_token_id": 0, "head_width": 8,
              "spike_sites": asnn.SITES, **options}
    model = shake(asnn.GooseForCausalLM(asnn.GooseConfig(**values)).eval())
    asnn.calibrate_encoders(model, torch.randint(1, V, (8, 24)))
    return model


@pytest.fixture(scope="module", autouse=True)
def kernel(cache):
    """Builds the kernel in the cache of all tests, before a test with a cache of its own does: "", or why not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASNN_CACHE", str(cache))
        return asnn.load_kernel()


@pytest.fixture
def gather_rows(kernel):
    """The kernel itself; a machine without a compiler has none."""
    if kernel:
        pytest.skip(kernel)
    return torch.ops.asnn_goose.gather_rows


@pytest.fixture
def library(gather_rows):
    """The file that was built."""
    return next(Path(path) for path in torch.ops.loaded_libraries if Path(path).name == "asnn_goose.so")


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(asnn, "_KERNEL", {"problem": "no"})


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """As a process begins: nothing loaded, nothing in the cache; returns the cache."""
    monkeypatch.delenv("ASNN_KERNEL", raising=False)
    monkeypatch.setattr(asnn, "_KERNEL", {})
    monkeypatch.setattr(torch.ops, "asnn_goose", types.SimpleNamespace())
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path / "fresh"))
    return tmp_path / "fresh"


@pytest.fixture(scope="module")
def students():
    """students(name): one of each, built once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = build(**STUDENTS[name])
        return made[name]
    return get


@pytest.fixture(scope="module")
def trained(small_recipe, teacher, tokens, cache):
    """A small student after recipe v14.4-sites, its head fed by spikes too."""
    recipe = small_recipe("v14.4-sites", spike_sites=asnn.SITES, head_width=8, distill_steps=40, align_steps=0,
                          anneal_steps=0, ce_start=0, lr=2e-3, matrix_lr=5e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASNN_CACHE", str(cache))
        sampler = asnn.WindowSampler(tokens["train"], recipe.seq_len, recipe.seed)
        student = asnn.build_student(recipe, teacher, calibration=sampler.batch(0, 8)[0])
        settings = asnn.FitConfig.from_recipe(recipe, precision="fp32", log_every=100, eval_every=10**6, patience=None)
        asnn.fit(asnn.Distiller(student, teacher.model, recipe), sampler, settings)
    return student.eval()


@pytest.fixture
def ids():
    return torch.randint(1, V, (3, 12))


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def generate(model, ids, **options):
    return model.generate(ids, **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options})


# ---- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, dtype", [*((name, torch.float32) for name in asnn.BACKENDS),
                                         *((name, torch.float64) for name in asnn.EXACT)])
def test_a_backend_is_dense_on_random_spikes(name, dtype, threads):
    for (X, out), n, density in itertools.product(SIZES, (1, 2, 7, 64), (0.02, 0.3, 1.0)):
        for make in (asnn.random_spikes, counts):
            assert check_product(name, torch.randn(X, out, dtype=dtype), make(n, X, density).to(dtype)) == dtype


@pytest.mark.parametrize("name", asnn.BACKENDS)
def test_a_backend_is_dense_without_and_with_all_spikes(name, threads):
    for (X, out), n in itertools.product(SIZES, (1, 2, 7, 64)):
        rows = torch.randn(X, out)
        assert torch.equal(product(name, rows, torch.zeros(n, X)), torch.zeros(n, out))
        for value in (1.0, -1.0, 3.0):
            check_product(name, rows, torch.full((n, X), value))
        spikes = torch.zeros(n, X)
        spikes[n // 2, X - 1] = -2.0  # one event, fewer than there are bags, of the last channel
        check_product(name, rows, spikes)
        assert n == 1 or not product(name, rows, spikes)[0].any()


@pytest.mark.parametrize("name", asnn.BACKENDS)
def test_a_backend_is_dense_on_the_spikes_of_a_student(name, trained, tokens, threads):
    """Each site's spikes into the folded Linear they feed."""
    with asnn.SpikeCapture(trained) as capture:
        trained.base_model(torch.from_numpy(tokens["validation"][:48].astype("int64")).view(3, 16), use_cache=False)
    spikes, encoders = capture.spikes(), asnn.spike_modules(trained)
    for i, (site, linear) in itertools.product(range(2), FED.items()):
        rows = encoders[f"{i}.{site}"].fold(asnn.transformer_blocks(trained)[i].get_submodule(linear)).weight.t()
        real = spikes[f"{i}.{site}"].float()
        assert 0.05 < real.ne(0).float().mean() < 0.95
        check_product(name, rows.detach(), real)
        check_product(name, rows.detach().contiguous(), real[7:8])


def test_dense_is_the_plain_product():
    rows, spikes = torch.randn(33, 11), asnn.random_spikes(5, 33, 0.4)
    expected = [[sum(spikes[t, x] * rows[x, o] for x in range(33)) for o in range(11)] for t in range(5)]
    torch.testing.assert_close(asnn.dense_product(rows, spikes), torch.tensor(expected))


def test_products_are_listed_once_and_only_int8_rows_are_not_exact():
    assert tuple(asnn.PRODUCTS) == tuple(asnn.LAYOUT) == asnn.BACKENDS and len(set(asnn.BACKENDS)) == len(asnn.BACKENDS)
    assert set(asnn.BACKENDS) - set(asnn.EXACT) == set(asnn.INT8) == {"gather_int8", "embedding_bag_int8"}


@pytest.mark.parametrize("name", asnn.BACKENDS)
def test_the_weights_of_a_product_have_the_layout_it_is_listed_with(name):
    rows = torch.randn(33, 11)
    weights = asnn.product_weights(name, rows)
    assert weights.is_contiguous()
    assert torch.equal(weights, {"rows": rows, "weight": rows.t(), "packed": asnn.pack_rows(rows)}[asnn.LAYOUT[name]])
    assert asnn.LAYOUT[name] == ("weight" if name == "linear" else "rows" if name in asnn.EXACT else "packed")


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("name", asnn.INT8)
def test_int8_rows_cost_0_7_percent_of_a_gaussian_product(name, n, density):
    rows, spikes = torch.randn(768, 768), asnn.random_spikes(n, 768, density)
    assert 0.005 < error(product(name, rows, spikes), spikes @ rows) < 0.009


@pytest.mark.parametrize("name", asnn.INT8)
def test_packed_rows_have_a_scale_and_an_offset_each(name):
    """Rows of very different size and offset: the error of each is half a step of its own range at most."""
    rows = torch.randn(40, 100) * torch.logspace(-6, 4, 40).unsqueeze(1) + torch.linspace(-3, 3, 40).unsqueeze(1)
    rows[3] = 0.0
    rows[4] = 2.5  # no range
    packed = asnn.pack_rows(rows)
    assert packed.dtype == torch.uint8 and packed.shape == (40, 108)
    unpacked = asnn.PRODUCTS[name](packed, torch.eye(40))
    step = (rows.max(1).values - rows.min(1).values) / 255
    # Half a step, and the rounding of fp32 around an offset.
    assert ((unpacked - rows).abs().max(1).values <= 0.501 * step + 1e-6 * rows.abs().max(1).values).all()
    assert torch.equal(unpacked[3], rows[3]) and torch.equal(unpacked[4], rows[4])


@pytest.mark.parametrize("bags", [1, 2, 3, 5])
@pytest.mark.parametrize("n, X, density", [(1, 37, 0.4), (1, 37, 0.05), (1, 8, 0.0), (1, 8, 1.0), (4, 37, 0.3),
                                           (3, 40, 0.0), (5, 7, 0.9)])
def test_events_are_the_spikes_in_bags_of_their_token(n, X, density, bags):
    spikes = counts(n, X, density)
    index, value, offsets = asnn._events(spikes, bags)
    token, channel = spikes.nonzero().unbind(1)
    assert torch.equal(index, channel) and torch.equal(value, spikes[token, channel])
    assert offsets.shape == (n * bags,) and offsets[0] == 0 and (offsets.diff() >= 0).all()
    ends = torch.cat((offsets, torch.tensor([len(index)])))
    sizes = ends.diff().view(n, bags)
    assert torch.equal(sizes.sum(1), (spikes != 0).sum(1))  # no bag holds the events of two tokens
    if n == 1:
        assert sizes.max() - sizes.min() <= 1


def test_a_single_token_takes_as_many_bags_as_threads(threads, monkeypatch):
    asked, events = [], asnn._events
    monkeypatch.setattr(asnn, "_events", lambda spikes, bags: asked.append(bags) or events(spikes, bags))
    for n in (1, 2, 9):
        for name in ("embedding_bag", "embedding_bag_int8"):
            product(name, torch.randn(20, 6), asnn.random_spikes(n, 20, 0.5))
    assert asked == [threads, threads, 1, 1, 1, 1]


@pytest.mark.parametrize("make", [asnn.random_spikes, counts])
@pytest.mark.parametrize("n", [1, 6])
def test_a_static_gather_is_dense_or_nan(make, n):
    rows, spikes = torch.randn(33, 11), make(n, 33, 0.4)
    spikes[0] = 0.0
    spikes[0, :9] = 1.0
    fired = (spikes != 0).sum(1)
    for capacity in (1, 8, 9, 10, int(fired.max()), 33, 50):
        out = asnn.gather_static(rows, spikes, capacity)
        assert out.shape == (n, 11)
        lost = fired > capacity
        assert out[lost].isnan().all() and error(out[~lost], (spikes @ rows)[~lost]) < 1e-5
    assert torch.equal(asnn.gather_static(rows, torch.zeros(n, 33), 4), torch.zeros(n, 11))
    assert asnn.gather_static(rows, torch.ones(n, 33), 32).isnan().all()
    close(asnn.gather_static(rows, -torch.ones(n, 33), 33), -rows.sum(0).expand(n, -1))


def test_a_static_gather_reads_as_many_rows_whatever_fired(monkeypatch):
    """What a CUDA graph records must not depend on the spikes."""
    shapes, bag = [], torch.nn.functional.embedding_bag

    def spy(index, *args, **options):
        shapes.append((tuple(index.shape), tuple(options["per_sample_weights"].shape)))
        return bag(index, *args, **options)
    monkeypatch.setattr(asnn.F, "embedding_bag", spy)
    for density in (0.0, 0.2, 1.0):
        asnn.gather_static(torch.randn(33, 11), asnn.random_spikes(4, 33, density), 9)
    assert shapes == [((4, 9), (4, 9))] * 3


def test_block_multiplies_only_blocks_in_which_something_fired():
    X = 3 * asnn.BLOCK + 5
    rows, spikes = torch.randn(X, 7), torch.zeros(2, X)
    rows[asnn.BLOCK:2 * asnn.BLOCK] = math.nan  # would spread if it were read
    spikes[0, 3] = spikes[1, 2 * asnn.BLOCK] = 1.0
    spikes[1, X - 1] = -1.0
    close(asnn.block_product(rows, spikes), torch.stack((rows[3], rows[2 * asnn.BLOCK] - rows[-1])))


@pytest.mark.parametrize("name", [name for name in asnn.BACKENDS if name not in ("linear", "dense")])
def test_channels_that_are_silent_are_not_read(name):
    rows, spikes = torch.randn(96, 7), torch.zeros(1, 96)
    spikes[0, 5] = 1.0
    rows[40:] = math.nan
    assert product(name, rows, spikes).isfinite().all()


# ---- the kernel ----------------------------------------------------------------------------------


WIDTHS = (1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 300)  # X: at and beside multiples of the events added at once
OUTS = (1, 15, 16, 17, 63, 64, 65, 200)  # at and beside a line of 16 fp32 numbers, of 64 bytes
FIRED = (0, 1, 3, 4, 5, 16, 17, 21, 300)  # events of each token, as far as there are channels


def fired(n, X, count, values=(-3, -2, -1, 1, 2, 3)):
    """Spikes (n, X) with exactly so many events in each token, if it has the channels."""
    index = torch.rand(n, X).topk(min(count, X)).indices
    return torch.zeros(n, X).scatter(1, index, torch.tensor(values)[torch.randint(len(values), index.shape)].float())


def cases(threads):
    """(X, out, spikes) of every combination; on several threads, which few cores make slow, of every seventh."""
    for X, out, n, count in itertools.islice(itertools.product(WIDTHS, OUTS, (0, 1, 2, 5), FIRED), 0, None,
                                             1 if threads == 1 else 7):
        if count <= X or count == FIRED[-1]:
            yield X, out, fired(n, X, count)


def whole_packed(X, out):
    """(packed rows, the same in fp32) of which every sum is exact in fp32, in whatever order it is taken."""
    steps, pair = torch.randint(0, 256, (X, out), dtype=torch.uint8), torch.randint(-64, 65, (X, 2)).float()
    return torch.cat((steps, pair.view(torch.uint8)), 1), pair[:, :1] * steps + pair[:, 1:]


def test_the_kernel_is_exact_on_whole_numbers(gather_rows, threads):
    for X, out, spikes in cases(threads):
        rows, (packed, unpacked) = torch.randint(-99, 100, (X, out)).float(), whole_packed(X, out)
        assert torch.equal(gather_rows(rows, spikes), spikes @ rows), (X, out, spikes.shape)
        assert torch.equal(gather_rows(packed, spikes), spikes @ unpacked), (X, out, spikes.shape)


def test_the_kernel_is_the_library_s_gather(gather_rows, threads):
    """And the dense product; packed rows to the rounding of fp32, not to that of int8."""
    for X, out, spikes in cases(threads):
        rows = torch.randn(X, out)
        packed = asnn.pack_rows(rows)
        scale, offset = packed[:, out:].flatten().clone().view(torch.float32).view(X, 2).double().split(1, 1)
        for weights, unpacked, reference in (
                (rows, rows.double(), asnn.embedding_bag_product),
                (packed, scale * packed[:, :out] + offset, asnn.embedding_bag_int8_product)):
            got, size = gather_rows(weights, spikes), (spikes.double().square() @ unpacked.square()).sum().sqrt()
            assert got.dtype == torch.float32
            for expected in (spikes.double() @ unpacked, reference(weights, spikes)):
                assert got.shape == expected.shape == (len(spikes), out)
                assert (got - expected).norm() <= 1e-5 * size, (X, out, spikes.shape)


@pytest.mark.parametrize("density", [0.01, 0.4, 1.0])
def test_a_token_has_the_same_sum_to_the_bit_in_any_company_on_any_threads(gather_rows, density):
    rows, spikes, before = torch.randn(300, 65), counts(7, 300, density), torch.get_num_threads()
    for weights in (rows, asnn.pack_rows(rows)):
        alone = torch.cat([gather_rows(weights, spikes[t:t + 1]) for t in range(7)])
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                assert torch.equal(gather_rows(weights, spikes), alone)
                close(torch.cat([gather_rows(weights, spikes[t:t + 1]) for t in range(7)]), alone)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 18])
def test_nan_in_a_spike_or_in_its_row_is_passed_on(gather_rows, threads, count):
    for n, place in itertools.product((1, 3), sorted({0, count // 2, count - 1})):
        spikes = fired(n, 40, count)
        channel = spikes[n - 1].nonzero()[place].item()
        spikes[:n - 1, channel] = 0.0
        rows, (packed, _) = torch.randn(40, 70), whole_packed(40, 70)
        ill, ill_packed, wrong = rows.clone(), packed.clone(), spikes.clone()
        ill[channel, 66], wrong[n - 1, channel] = math.nan, math.nan
        ill_packed[channel, 70 + 4 * (place % 2):][:4] = torch.tensor([math.nan]).view(torch.uint8)  # scale or offset
        lost = gather_rows(ill, spikes).isnan()
        assert lost[-1].nonzero().flatten().tolist() == [66] and not lost[:-1].any()
        for lost in (gather_rows(rows, wrong), gather_rows(packed, wrong), gather_rows(ill_packed, spikes)):
            assert lost[-1].isnan().all() and not lost[:-1].isnan().any()


def test_gather_runs_the_kernel_and_not_the_library(gather_rows, monkeypatch):
    def library_product(*_):
        raise AssertionError("the library's")
    for name in ("embedding_bag_product", "embedding_bag_int8_product"):
        monkeypatch.setattr(asnn, name, library_product)
    rows, spikes = torch.randn(40, 20), counts(3, 40, 0.4)
    for name in ("gather", "gather_int8"):
        weights = asnn.product_weights(name, rows)
        assert torch.equal(asnn.PRODUCTS[name](weights, spikes), gather_rows(weights, spikes))


@pytest.mark.parametrize("name", ["gather", "gather_int8"])
def test_gather_takes_spikes_of_any_type_and_stride(name):
    rows = torch.randn(40, 20)
    for n in (1, 2, 5):
        spikes = counts(n, 40, 0.4)
        wide = torch.full((n, 80), 7.0)
        wide[:, ::2] = spikes
        views = {"transposed": spikes.t().contiguous().t(), "every second": wide[:, ::2],
                 "expanded": spikes[:1].expand(n, 40),
                 **{str(dtype): spikes.to(dtype) for dtype in (torch.float64, torch.float16, torch.int8, torch.int64)}}
        for kind, view in views.items():
            expected = product(name, rows, view.float().contiguous())
            assert torch.equal(product(name, rows, view), expected) and expected.any(), kind
    assert not views["transposed"].is_contiguous() and not views["expanded"].is_contiguous()


@pytest.mark.parametrize("kind, change, bound", [
    ("fp64", lambda rows: rows.double(), 1e-12), ("fp16", lambda rows: rows.half(), 2e-3),
    ("transposed", lambda rows: rows.t().contiguous().t(), 1e-5), ("sliced", lambda rows: rows[:, 5:15], 1e-5)])
def test_rows_that_the_kernel_does_not_take_go_to_the_library(monkeypatch, kind, change, bound):
    asked, library_product = [], asnn.embedding_bag_product
    monkeypatch.setattr(asnn, "embedding_bag_product", lambda *a: asked.append(a) or library_product(*a))
    rows = change(torch.randn(40, 20))
    for n in (1, 4):
        spikes = counts(n, 40, 0.4).to(rows.dtype)
        got = asnn.gather_product(rows, spikes)
        assert got.dtype == rows.dtype and error(got, spikes.double() @ rows.double()) < bound
    assert len(asked) == 2


@pytest.mark.parametrize("kind, rows, spikes", [
    ("other width", torch.zeros(5, 3), torch.zeros(1, 4)), ("spikes of one", torch.zeros(5, 3), torch.zeros(5)),
    ("spikes of three", torch.zeros(5, 3), torch.zeros(1, 1, 5)), ("rows of one", torch.zeros(5), torch.zeros(1, 5)),
    ("fp64 rows", torch.zeros(5, 3).double(), torch.zeros(1, 5)),
    ("fp16 rows", torch.zeros(5, 3).half(), torch.zeros(1, 5)),
    ("signed bytes", torch.zeros(5, 12, dtype=torch.int8), torch.zeros(1, 5)),
    ("fp64 spikes", torch.zeros(5, 3), torch.zeros(1, 5).double()),
    ("int8 spikes", torch.zeros(5, 3), torch.zeros(1, 5, dtype=torch.int8)),
    ("transposed rows", torch.zeros(3, 5).t(), torch.zeros(1, 5)),
    ("transposed spikes", torch.zeros(5, 3), torch.zeros(5, 2).t()),
    ("packed of other width", torch.zeros(5, 12, dtype=torch.uint8), torch.zeros(1, 4)),
    ("transposed packed", torch.zeros(12, 5, dtype=torch.uint8).t(), torch.zeros(1, 5))])
def test_the_kernel_refuses_what_it_would_misread(gather_rows, kind, rows, spikes):
    with pytest.raises(RuntimeError, match=r"^gather_rows takes contiguous rows \(X, out\) in fp32 or packed int8 and "
                                           r"spikes \(n, X\) in fp32"):
        gather_rows(rows, spikes)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_kernel_is_what_it_tells_the_compiler_it_is(gather_rows, n):
    rows = torch.randn(40, 20)
    for weights in (rows, asnn.pack_rows(rows)):
        torch.library.opcheck(gather_rows.default, (weights, counts(n, 40, 0.4)),
                              test_utils=("test_schema", "test_faketensor"))


def test_the_library_stands_in_for_a_kernel_that_is_not_to_be_had(no_kernel, monkeypatch, threads):
    asked = []
    for name in ("embedding_bag_product", "embedding_bag_int8_product"):
        monkeypatch.setattr(asnn, name, lambda *a, name=name, f=getattr(asnn, name): asked.append(name) or f(*a))
    rows = torch.randn(40, 20)
    for n in (1, 4):
        spikes = counts(n, 40, 0.4)
        for name in ("gather", "gather_int8"):
            assert torch.equal(product(name, rows, spikes), product(f"embedding_bag{name[6:]}", rows, spikes))
    # Once for gather; PRODUCTS has the functions themselves.
    assert asked == ["embedding_bag_product", "embedding_bag_int8_product"] * 2


def sentence(problem):
    """A reason is one line that names the kernel."""
    assert problem.startswith("the C++ kernel ") and len(problem) < 300 and len(problem.splitlines()) == 1
    return problem


def check_without_kernel():
    rows, spikes, linear = torch.randn(40, 20), counts(3, 40, 0.4), nn.Linear(40, 20)
    for name in ("gather", "gather_int8"):
        assert torch.equal(product(name, rows, spikes), product(f"embedding_bag{name[6:]}", rows, spikes))
        got = asnn.SpikeLinear(linear, name)(asnn.SpikeVector(spikes, torch.ones(3, 1)))
        assert error(got, linear(spikes)) < BOUND[name]


def test_the_kernel_can_be_switched_off(unloaded, monkeypatch):
    monkeypatch.setattr(asnn, "_build_kernel", no_measuring)
    monkeypatch.setenv("ASNN_KERNEL", "0")
    assert sentence(asnn.load_kernel()) == "the C++ kernel is switched off by ASNN_KERNEL=0"
    check_without_kernel()
    assert not unloaded.exists()


@pytest.mark.parametrize("failure, reason", [
    (OSError(28, "No space left on device"), "No space left on device"),
    (RuntimeError("first line\nsecond"), "first line"), (OSError(), "OSError()"), (ValueError("  \n"), "ValueError"),
    (OSError("x" * 999), "x" * 100),
    (ImportError("ninja is needed here and is not installed: pip install ninja."), "ninja is needed here")])
def test_a_build_that_fails_is_tried_once_and_told_in_one_sentence(unloaded, monkeypatch, failure, reason):
    tried = []

    def build_kernel(library):
        tried.append(library)
        raise failure
    monkeypatch.setattr(asnn, "_build_kernel", build_kernel)
    assert reason in sentence(asnn.load_kernel())
    check_without_kernel()
    assert asnn.load_kernel() == asnn.load_kernel() and len(tried) == 1 and unloaded in tried[0].parents


@pytest.mark.parametrize("content", [b"", b"no library" * 999, b"\x7fELF"])
def test_a_file_in_the_cache_that_is_no_library_is_told(unloaded, monkeypatch, content):
    paths = []
    monkeypatch.setattr(asnn, "_build_kernel", lambda library: paths.append(library) or 1 / 0)
    assert "division" in asnn.load_kernel()
    paths[0].parent.mkdir(parents=True)
    paths[0].write_bytes(content)
    monkeypatch.setattr(asnn, "_KERNEL", {})
    assert sentence(asnn.load_kernel())
    check_without_kernel()


def other_process(cache, code, **variables):
    """What the code prints in a process of its own, where no kernel is loaded."""
    done = subprocess.run([sys.executable, "-c", "import torch, asnn_common as asnn\n" + code], capture_output=True,
                          text=True, timeout=600, env={**os.environ, "ASNN_CACHE": str(cache), "ASNN_KERNEL": "",
                                                       "PYTHONPATH": str(Path(asnn.__file__).parent), **variables})
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout.strip()


COMPARE = """
rows, spikes = torch.randn(40, 20), asnn.random_spikes(3, 40, 0.4)
print(asnn.load_kernel())
print(torch.equal(asnn.gather_product(rows, spikes), asnn.embedding_bag_product(rows, spikes)))
print(torch.allclose(asnn.gather_product(rows, spikes), spikes @ rows, atol=1e-4))
"""


def test_another_process_takes_the_kernel_from_the_cache(library):
    code = "def build(library): raise OSError('built again')\nasnn._build_kernel = build\n"
    out = other_process(library.parents[2], code + COMPARE).splitlines()
    assert len(out) == 2 and out[1] == "True"  # the first line, which says why not, is empty and stripped


def test_without_a_compiler_there_is_a_sentence_and_the_library(tmp_path):
    problem, same, right = other_process(tmp_path, COMPARE, CXX=str(tmp_path / "none")).splitlines()
    assert sentence(problem).startswith("the C++ kernel cannot be built: ") and same == right == "True"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # nothing is left that a later run would load


def test_half_a_library_in_the_cache_does_not_end_the_process(library, tmp_path):
    """The loader maps a file that is too short and would end with a bus error. Without a compiler: no second build."""
    broken = tmp_path / library.relative_to(library.parents[2])
    broken.parent.mkdir(parents=True)
    broken.write_bytes(library.read_bytes()[:library.stat().st_size // 2])
    out = other_process(tmp_path, COMPARE, CXX=str(tmp_path / "none")).splitlines()
    assert out[-1] == "True" and (len(out) == 2 or sentence(out[0]))


# ---- measuring -----------------------------------------------------------------------------------


def test_timings_tell_slow_from_quick_and_are_taken_in_turns():
    called = []
    calls = {"slow": lambda: called.append("slow") or time.sleep(5e-3),
             "quick": lambda: called.append("quick") or time.sleep(1e-3)}
    timing = asnn.time_interleaved(calls, runs=5, min_seconds=1e-3)
    assert list(timing) == ["slow", "quick"]
    assert timing["slow"].median > timing["quick"].median > 9e-4 and timing["slow"].median > 4.5e-3
    assert all(0 < t.low <= t.median <= t.high and t.runs == 5 for t in timing.values())
    assert [name for name, _ in itertools.groupby(called)] == ["slow", "quick"] * 6  # to know how often, 5 runs


def test_short_calls_are_timed_in_blocks():
    called = []
    timing = asnn.time_interleaved({"short": lambda: called.append(0)}, runs=3, min_seconds=2e-3)
    assert len(called) > 300 and timing["short"].median < 2e-4


def test_copies_out_of_cache_have_equal_content_and_storage_of_their_own():
    made = []
    turns = asnn.out_of_cache(lambda: made.append(torch.randn(50, 20)) or made[-1], total=10 * 4000)
    first, second = ([next(turns) for _ in range(11)] for _ in range(2))
    assert len(made) == 1 and all(torch.equal(t, made[0]) for t in first)
    assert len({t.data_ptr() for t in first}) == 11
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    assert sum(t.numel() * t.element_size() for t in first) >= 10 * 4000


@pytest.mark.parametrize("density", [0.0, 0.02, 0.4, 1.0])
def test_random_spikes_are_ternary_of_the_density_asked_for(density):
    spikes = asnn.random_spikes(64, 999, density, torch.Generator().manual_seed(1))
    assert spikes.shape == (64, 999) and spikes.dtype == torch.float32
    assert set(spikes.unique().tolist()) <= {-1.0, 0.0, 1.0}
    active = spikes.ne(0).float().mean().item()
    assert active == pytest.approx(density, abs=4 * math.sqrt(density * (1 - density) / spikes.numel()) + 1e-12)
    assert density == 0 or abs(spikes.sum().item()) < 5 * math.sqrt(density * spikes.numel())  # as many of each sign
    assert torch.equal(spikes, asnn.random_spikes(64, 999, density, torch.Generator().manual_seed(1)))


def test_a_bench_calls_every_product_on_weights_of_its_shape():
    bench, spikes = asnn.ProductBench(33, 11), asnn.random_spikes(3, 33, 0.4)
    calls = bench.calls(spikes)
    assert list(calls) == list(asnn.BACKENDS)
    assert {call().shape for call in calls.values()} == {(3, 11)}
    for name, turn in bench.weights.items():
        first, second = next(turn), next(turn)
        assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
        assert first.shape == asnn.product_weights(name, torch.zeros(33, 11)).shape
    rows = torch.randn(33, 11)
    bench.weights = {name: itertools.repeat(asnn.product_weights(name, rows)) for name in bench.weights}
    for name, call in bench.calls(spikes).items():
        assert error(call(), spikes @ rows) < BOUND[name]
    assert list(asnn.ProductBench(33, 11, ("csr", "gather")).calls(spikes)) == ["csr", "gather"]
    # Only the CPU has int8 rows; `meta` stands for any other device.
    assert asnn.ProductBench(33, 11, device="meta").backends == list(asnn.EXACT)


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """measure(shapes, **options) with a cache of its own, which it returns as the second item."""
    monkeypatch.setenv("ASNN_CACHE", str(tmp_path / "cache"))

    def run(shapes, **options):
        return asnn.BackendTable.measure(shapes, **{"seconds": 0.1, "progress": False, **options})
    run.folder = tmp_path / "cache" / "sparse"
    return run


def no_measuring(*_args, **_options):
    raise AssertionError("measured again")


def test_a_table_has_every_cell_and_is_measured_once(measure, monkeypatch):
    table = measure([(7, 5), (5, 7)])
    cells = {(r["in"], r["out"], r["tokens"], r["density"]) for r in table.rows}
    expected = set(itertools.product((7, 5), (5, 7), asnn.BackendTable.TOKENS, asnn.BackendTable.DENSITIES))
    assert cells == {c for c in expected if c[0] != c[1]} and len(table.rows) == len(cells)
    for row in table.rows:
        assert row["device"] == "cpu" and set(row["seconds"]) == {"linear", "dense", "gather", "gather_int8", "csr"}
        assert all(0 < value < 1 for value in row["seconds"].values())
    for row, exact in itertools.product(table.rows, (True, False)):
        name = table.choose(row["in"], row["out"], row["tokens"], row["density"], exact)
        # Never slower where it was measured.
        assert row["seconds"][name] <= min(row["seconds"]["dense"], row["seconds"]["linear"])
    monkeypatch.setattr(asnn, "time_interleaved", no_measuring)
    for shapes in ([(7, 5), (5, 7)], [(5, 7), (7, 5), (7, 5)]):
        assert measure(shapes).rows == table.rows
    with pytest.raises(AssertionError, match="measured again"):
        measure([(7, 5)])


def fake_timing(calls, **_options):
    return {name: asnn.Timing(1.0, 1.0, 1.0, 1, 1.0) for name in calls}


def test_the_file_of_a_table_names_the_hardware_and_belongs_to_it(measure, monkeypatch):
    monkeypatch.setattr(asnn, "time_interleaved", fake_timing)
    env = asnn.environment()
    measure([(7, 5)])
    kept = json.loads(next(measure.folder.iterdir()).read_text())
    assert kept["environment"] == env and kept["environment"]["cpu"] and kept["environment"]["threads"] == 1
    measure([(7, 5)], backends=("dense", "gather"))
    for change in ({"cpu": "another one"}, {"threads": 5}, {"gpus": ["T4, 15 GiB"]}, {"versions": {"torch": "9.9"}}):
        monkeypatch.setattr(asnn, "environment", lambda change=change: {**env, **change})
        measure([(7, 5)])
    monkeypatch.setattr(asnn, "environment", lambda: env)
    assert len(list(measure.folder.iterdir())) == 6
    for change in ({"KERNEL": "// another one"}, {"_KERNEL": {"problem": "no compiler"}}):
        for name, value in change.items():
            monkeypatch.setattr(asnn, name, value)
        measure([(7, 5)])
    assert len(list(measure.folder.iterdir())) == 8


def test_int8_rows_are_not_measured_where_they_cannot_run(measure, monkeypatch):
    """Only the CPU has them; `meta` stands for any other device."""
    monkeypatch.setattr(asnn, "time_interleaved", fake_timing)
    rows = measure([(7, 5)], device="meta").rows
    assert {tuple(row["seconds"]) for row in rows} == {("linear", "dense", "gather", "csr")}
    assert {row["device"] for row in rows} == {"meta"}


TABLE = [cell(1, 0.2, dense=5.0, gather=2.0, gather_int8=1.0), cell(1, 0.8, dense=2.0, gather=3.0, gather_int8=1.0),
         cell(8, 0.2, dense=5.0, csr=1.0, gather=2.0, gather_int8=3.0),
         cell(8, 0.8, dense=1.0, csr=2.0, gather_int8=4.0),
         cell(64, 0.5, dense=1.0, block=0.9, gather_int8=0.8), cell(1, 0.2, 4, 6, dense=1.0, coo=0.5)]


@pytest.mark.parametrize("tokens, density, exact, inexact", [
    (1, 0.2, "gather", "gather_int8"), (1, 0.0, "gather", "gather_int8"), (1, 0.49, "gather", "gather_int8"),
    (1, 0.51, "dense", "gather_int8"), (2, 0.2, "gather", "gather_int8"), (4, 0.2, "csr", "csr"),
    (22, 0.9, "dense", "dense"), (23, 0.2, "block", "gather_int8"), (500, 1.0, "block", "gather_int8")])
def test_the_fastest_backend_of_the_nearest_cell_is_chosen(tokens, density, exact, inexact):
    table = asnn.BackendTable(TABLE)
    assert table.choose(6, 4, tokens, density) == table.choose(6, 4, tokens, density, exact=True) == exact
    assert table.choose(6, 4, tokens, density, exact=False) == inexact
    assert table.choose(4, 6, 1, density) == "coo"
    assert table.choose(6, 6, tokens, density, exact=False) == "linear"  # not measured


@pytest.mark.parametrize("rows", [[], [cell(1, 0.2, gather_int8=1.0)]])
def test_linear_is_chosen_where_nothing_allowed_was_measured(rows):
    table = asnn.BackendTable(rows)
    assert table.choose(6, 4, 1, 0.2, exact=True) == "linear" and table.seconds(6, 4, 1, 0.2, exact=True) == {}
    assert table.plan(6, 4, 0.2, exact=True) == dict.fromkeys(asnn.BackendTable.TOKENS, "linear")


def test_the_seconds_of_a_cell_are_those_of_the_backends_that_are_allowed():
    table = asnn.BackendTable(TABLE)
    assert table.seconds(6, 4, 1, 0.3) == {"dense": 5.0, "gather": 2.0}
    assert table.seconds(6, 4, 1, 0.3, exact=False) == {"dense": 5.0, "gather": 2.0, "gather_int8": 1.0}
    assert table.seconds(6, 4, 500, 1.0, exact=False) == {"dense": 1.0, "block": 0.9, "gather_int8": 0.8}
    assert table.seconds(6, 6, 1, 0.3, exact=False) == {}


FAST, SAME, SLOW = 1.0, 1.04, 1.07  # more than 5 % slower than FAST is SLOW


@pytest.mark.parametrize("exact, seconds, expected", [
    # One token takes what is fastest, however little that is.
    (True, [{"linear": 1.0, "gather": 1.001}], ["linear"]),
    (True, [{"linear": 1.001, "gather": 1.0}], ["gather"]),
    # More tokens keep to its layout within 5 %, and take the fastest there.
    (True, [{"linear": 2, "gather": 1}, *[{"linear": FAST, "gather": SLOW, "csr": SAME, "dense": 1.05}] * 3],
     ["gather", "csr", "csr", "csr"]),
    (True, [{"linear": 1, "gather": 2}, *[{"linear": SAME, "gather": FAST}] * 2, {"linear": SLOW, "gather": FAST}],
     ["linear", "linear", "linear", "gather"]),
    # They leave it beyond, and what is kept twice then is free to choose from.
    (True, [{"linear": 2, "gather": 1}, {"linear": FAST, "gather": SLOW, "csr": SLOW}, {"linear": SAME, "gather": FAST},
            {"linear": FAST, "dense": SAME}], ["gather", "linear", "gather", "linear"]),
    (True, [{"linear": 2, "gather": 1}, {"linear": FAST, "dense": 1.05}, {"linear": FAST, "dense": 1.0501}],
     ["gather", "dense", "linear", "linear"]),
    # int8 rows are a layout of their own, and count only where they are allowed.
    (False, [{"linear": 3, "gather": 2, "gather_int8": 1}, {"linear": FAST, "embedding_bag_int8": SAME},
             {"gather": FAST, "gather_int8": SLOW}, {"gather": SLOW, "linear": FAST, "gather_int8": SAME}],
     ["gather_int8", "embedding_bag_int8", "gather", "gather_int8"]),
    (True, [{"linear": 3, "gather": 2, "gather_int8": 1}, {"linear": FAST, "gather": SAME, "gather_int8": 0.1}],
     ["gather", "gather", "gather", "gather"]),
    # 5 % of what is allowed, not of what is fastest of all.
    (True, [{"linear": 1}, {"linear": SAME, "gather": FAST, "gather_int8": 0.1}], ["linear"])])
def test_more_tokens_keep_the_layout_of_one_within_5_percent(exact, seconds, expected):
    rows = [cell(n, 0.4, **{k: float(v) for k, v in values.items()})
            for n, values in zip(asnn.BackendTable.TOKENS, seconds)]
    expected = expected + expected[-1:] * (4 - len(expected))  # the last cell stands for all after it
    plan = asnn.BackendTable(rows).plan(6, 4, 0.4, exact)
    assert plan == dict(zip(asnn.BackendTable.TOKENS, expected))


@pytest.mark.parametrize("exact", [True, False])
def test_a_plan_is_never_5_percent_slower_than_linear_where_both_were_measured(exact):
    rng, left = random.Random(1), 0
    for _ in range(300):
        names = ["linear", *rng.sample(asnn.BACKENDS[1:], rng.randint(0, 6))]
        rng.shuffle(names)
        spread = rng.choice((0.02, 0.1, 1.0))
        cells = itertools.product(asnn.BackendTable.TOKENS, asnn.BackendTable.DENSITIES)
        table = asnn.BackendTable([cell(n, density, **{name: n * math.exp(spread * rng.gauss(0, 1)) for name in names})
                                   for n, density in cells])
        for density in asnn.BackendTable.DENSITIES:
            plan, kept = table.plan(6, 4, density, exact), set()
            assert list(plan) == list(asnn.BackendTable.TOKENS)
            for n, name in plan.items():
                row = next(row for row in table.rows if row["tokens"] == n and row["density"] == density)
                seconds = {k: v for k, v in row["seconds"].items() if not exact or k in asnn.EXACT}
                assert seconds[name] <= 1.05 * min(seconds.values()) and seconds[name] <= 1.05 * seconds["linear"]
                if kept and asnn.LAYOUT[name] not in kept:  # then nothing of the layouts before would have done
                    left += 1
                    assert min(v for k, v in seconds.items() if asnn.LAYOUT[k] in kept) > 1.05 * seconds[name]
                kept.add(asnn.LAYOUT[name])
            assert plan[1] == table.choose(6, 4, 1, density, exact)
    assert left > 100


# ---- SpikeLinear ---------------------------------------------------------------------------------


def encoder(kind="ternary", width=37, dtype=torch.float32):
    """An encoder with no parameter at its start value."""
    module = asnn.SpikeEncoder(width, kind).to(dtype)
    with torch.no_grad():
        module.centre.normal_()
        for p in (module.alpha, module.amplitude):
            p.uniform_(0.4, 1.2)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["ternary", "integer:3"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", asnn.BACKENDS)
def test_a_spike_linear_is_the_linear_after_its_encoder(name, bias, kind, dtype):
    before, linear = encoder(kind, dtype=dtype), nn.Linear(37, 11, bias=bias, dtype=dtype)
    module = asnn.SpikeLinear(before.fold(linear), name)
    bound = 1e-10 if dtype == torch.float64 and name in asnn.EXACT else BOUND[name]
    for shape in ((37,), (1, 37), (2, 1, 37), (3, 5, 37)):
        x = (2 * torch.randn(shape) + 0.5).to(dtype)
        out = module(asnn.SpikeEncode(before)(x))
        assert out.shape == (*shape[:-1], 11) and out.dtype == dtype
        assert error(out, linear(before(x))) < bound


@pytest.mark.parametrize("name", asnn.BACKENDS)
def test_a_spike_linear_is_scale_times_spikes_times_weight_plus_bias(name, threads):
    for bias in (True, False):
        linear = nn.Linear(37, 11, bias=bias)
        module = asnn.SpikeLinear(linear, name)
        for shape in ((1, 1), (4, 1), (2, 6)):
            spikes, scale = counts(math.prod(shape), 37, 0.4).view(*shape, 37), torch.rand(*shape, 1) + 0.1
            expected = scale * (spikes @ linear.weight.t()) + (linear.bias if bias else 0)
            for kind in (spikes, spikes.to(torch.int8)):
                out = module(asnn.SpikeVector(kind, scale))
                assert out.shape == (*shape, 11) and error(out, expected) < BOUND[name]
        silent = module(asnn.SpikeVector(torch.zeros(2, 3, 37), torch.ones(2, 3, 1)))
        assert torch.equal(silent, (linear.bias if bias else torch.zeros(11)).expand(2, 3, 11))


def test_a_spike_linear_takes_no_tokens_as_a_linear_does():
    for name in asnn.BACKENDS:
        module = asnn.SpikeLinear(nn.Linear(37, 11), name)
        assert module(asnn.SpikeVector(torch.zeros(2, 0, 37), torch.ones(2, 0, 1))).shape == (2, 0, 11)


def test_auto_takes_the_measured_backend_for_each_number_of_tokens(monkeypatch):
    linear, used = nn.Linear(6, 4), []
    for name, function in asnn.PRODUCTS.items():
        monkeypatch.setitem(asnn.PRODUCTS, name,
                            lambda *a, name=name, function=function: used.append(name) or function(*a))
    module = asnn.SpikeLinear(linear, "auto", 0.2, asnn.BackendTable(TABLE))
    assert module.plan == {1: "gather", 4: "csr", 16: "csr", 64: "block"}
    for n in (1, 3, 14, 64, 200):
        spikes = asnn.random_spikes(n, 6, 0.4)
        assert error(module(asnn.SpikeVector(spikes, torch.ones(n, 1))), linear(spikes)) < 1e-5
    assert used == ["gather", "csr", "csr", "block", "block"]
    assert [module.backend_for(n) for n in (0, 1, 2, 3, 9, 31, 32, 33)] == ["gather"] * 3 + ["csr"] * 4 + ["block"]
    assert asnn.SpikeLinear(linear, "auto", 0.8, asnn.BackendTable(TABLE)).plan[1] == "dense"
    assert set(asnn.SpikeLinear(nn.Linear(5, 5), "auto", 0.2, asnn.BackendTable(TABLE)).plan.values()) == {"linear"}


def buffers(module):
    return {name for name, _ in module.named_buffers()}


def test_only_weights_that_can_be_used_are_kept():
    table, linear = asnn.BackendTable(TABLE), nn.Linear(6, 4)
    exact, free = (asnn.SpikeLinear(linear, "auto", 0.2, table, exact) for exact in (True, False))
    assert set(exact.plan.values()) == {"gather", "csr", "block"} and buffers(exact) == {"rows", "bias"}
    assert set(free.plan.values()) == {"gather_int8", "csr"} and buffers(free) == {"rows", "packed", "bias"}
    only = asnn.SpikeLinear(linear, "auto", 0.2, asnn.BackendTable(TABLE[:1]), exact=False)
    assert set(only.plan.values()) == {"gather_int8"} and buffers(only) == {"packed", "bias"}
    kept = {"rows": linear.weight.t(), "weight": linear.weight, "packed": asnn.pack_rows(linear.weight.detach().t())}
    for name in asnn.BACKENDS:
        module, layout = asnn.SpikeLinear(linear, name), asnn.LAYOUT[name]
        assert set(module.state_dict()) == buffers(module) == {layout, "bias"}
        assert torch.equal(getattr(module, layout), kept[layout]) and getattr(module, layout).is_contiguous()
        assert all(getattr(module, other) is None for other in kept if other != layout)


@pytest.mark.parametrize("names", [("gather", "linear"), ("linear", "csr"), ("gather_int8", "linear", "dense")])
def test_a_plan_of_several_layouts_keeps_them_and_gives_each_product_its_own(names, monkeypatch):
    linear, used = nn.Linear(6, 4), []
    for name, function in asnn.PRODUCTS.items():
        monkeypatch.setitem(asnn.PRODUCTS, name,
                            lambda *a, name=name, function=function: used.append(name) or function(*a))
    table = asnn.BackendTable([cell(n, 0.4, **{other: 1.0 if other == name else 2.0 for other in names})
                               for n, name in zip(asnn.BackendTable.TOKENS, names)])
    module = asnn.SpikeLinear(linear, "auto", 0.4, table, exact=False)
    assert buffers(module) == {asnn.LAYOUT[name] for name in names} | {"bias"}
    for n, name in zip(asnn.BackendTable.TOKENS, names):
        spikes = asnn.random_spikes(n, 6, 0.4)
        assert error(module(asnn.SpikeVector(spikes, torch.ones(n, 1))), linear(spikes)) < BOUND[name]
    assert tuple(used) == names


def test_int8_rows_take_a_fourth_of_the_memory():
    linear = nn.Linear(256, 768, bias=False)
    size = {name: sum(b.numel() * b.element_size() for b in asnn.SpikeLinear(linear, name).buffers())
            for name in asnn.BACKENDS}
    assert {size[name] for name in asnn.EXACT} == {256 * 768 * 4}
    assert {size[name] for name in asnn.INT8} == {256 * (768 + 8)}
    for name in asnn.INT8:
        assert set(asnn.SpikeLinear(linear, name).state_dict()) == {"packed"}


@pytest.mark.parametrize("name", ["linear", "gather", "gather_int8"])
def test_a_spike_linear_is_data_without_gradient(name):
    linear, other = nn.Linear(37, 11), nn.Linear(37, 11)
    module, twin = asnn.SpikeLinear(linear, name), asnn.SpikeLinear(other, name)
    x = asnn.SpikeVector(asnn.random_spikes(4, 37, 0.4), torch.rand(4, 1))
    expected = module(x)
    assert not list(module.parameters()) and not expected.requires_grad
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert torch.equal(module(x), expected)  # a copy


WRONG_BACKEND = f"^backend is 'magic'; allowed: {', '.join(asnn.BACKENDS)}, auto.$"


def test_wrong_options_of_a_spike_linear_are_refused():
    with pytest.raises(ValueError, match=WRONG_BACKEND):
        asnn.SpikeLinear(nn.Linear(3, 3), "magic")
    with pytest.raises(ValueError, match="^table is None; allowed: a BackendTable for backend auto.$"):
        asnn.SpikeLinear(nn.Linear(3, 3), "auto")


# ---- sparsify ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*asnn.EXACT, "auto"])
@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_the_sparse_copy_has_the_logits_of_the_student(students, ids, name, backend):
    student = students(name)
    sparse = asnn.sparsify(student, backend, table=small_table())
    expected = student(ids, output_hidden_states=True)
    got = sparse(ids, output_hidden_states=True)
    close(got.logits, expected.logits)
    for a, b in zip(got.hidden_states, expected.hidden_states):
        close(a, b)
    for a, b in zip(got.state.layers, expected.state.layers):
        close(a.S, b.S)
    close(asnn.sparsify(student, backend, "spikes", table=small_table())(ids).logits, expected.logits)


@pytest.mark.parametrize("name, backend", [("delta, counts", "gather"), ("delta", "block"), ("matrix", "auto"),
                                           ("delta", "linear"), ("vector", "csr"), ("vector", "auto")])
@torch.no_grad()
def test_decoding_token_by_token_is_the_full_pass(students, ids, name, backend, threads):
    student = students(name)
    sparse, state, logits = asnn.sparsify(student, backend, "spikes", table=small_table()), None, []
    for t in range(ids.shape[1]):
        out = sparse(ids[:1, t:t + 1], state=state, use_cache=True)
        state = out.state
        logits.append(out.logits)
    close(torch.cat(logits, 1), student(ids[:1]).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 20}])
@pytest.mark.parametrize("name", STUDENTS)
def test_the_sparse_copy_generates_what_the_student_does(students, ids, name, options):
    student, texts = students(name), []
    models = [student, asnn.sparsify(student, "gather"), asnn.sparsify(student, "auto", "spikes", table=small_table())]
    for model, use_cache in itertools.product(models, (True, False)):
        torch.manual_seed(5)
        texts.append(generate(model, ids, use_cache=use_cache, **options))
    assert all(torch.equal(text, texts[0]) for text in texts[1:])
    assert texts[0].shape[1] == 20 and texts[0][:, 12:].unique().numel() > 3  # a constant would hide a broken cache


@pytest.mark.parametrize("backend", ["gather", "block"])
@pytest.mark.parametrize("name", ["delta", "matrix"])
@torch.no_grad()
def test_a_batch_with_left_padding_is_its_sequences(students, ids, name, backend):
    student = students(name)
    sparse, mask = asnn.sparsify(student, backend, "spikes"), torch.ones_like(ids)
    ids[0, :5], mask[0, :5], ids[2, :1], mask[2, :1] = 0, 0, 0, 0
    got, expected = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (sparse, student))
    close(got, expected)
    close(sparse(ids, attention_mask=mask).logits[0, 5:], sparse(ids[:1, 5:]).logits[0])
    text = generate(sparse, ids, attention_mask=mask)
    assert torch.equal(text, generate(student, ids, attention_mask=mask))
    assert torch.equal(text[0, 5:], generate(sparse, ids[:1, 5:])[0])


@pytest.mark.parametrize("name", ["linear", "gather", "csr", "dense"])
@torch.no_grad()
def test_a_student_in_fp64_stays_one(students, ids, name):
    student = copy.deepcopy(students("delta")).double()
    logits = asnn.sparsify(student, name, "spikes")(ids).logits
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, student(ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_the_student_is_left_as_it_was(students, ids, training):
    student = copy.deepcopy(students("delta")).train(training)
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    modules = [(name, id(m), m.training) for name, m in student.named_modules()]
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    for backend, head in (("linear", "dense"), ("gather", "spikes"), ("gather_int8", "int8")):
        sparse = asnn.sparsify(student, backend, head)
        sparse(ids)
        assert not any(m.training for m in sparse.modules())
        assert not any(p.requires_grad for p in sparse.parameters()) and not sparse(ids).logits.requires_grad
        ours = {t.data_ptr() for t in (*student.parameters(), *student.buffers())}
        assert not ours & {t.data_ptr() for t in (*sparse.parameters(), *sparse.buffers()) if t.numel()}
    assert modules == [(name, id(m), m.training) for name, m in student.named_modules()]
    assert flags == {name: p.requires_grad for name, p in student.named_parameters()}
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    student(ids, labels=ids).loss.backward()  # and it can still be trained


def test_every_linear_of_the_layers_is_replaced(students):
    for name in STUDENTS:
        sparse = asnn.sparsify(students(name), "gather")
        linears = {key for key, m in sparse.named_modules() if isinstance(m, nn.Linear)}
        assert linears == {"lm_head"}
        macs = sum(row["macs"] for row in asnn.matrix_products(students(name)) if row["layers"] and row["site"])
        replaced = [m for m in sparse.modules() if isinstance(m, asnn.SpikeLinear)]
        assert sum(m.in_features * m.out_features for m in replaced) == macs
        fed = asnn.sparsify(students(name), "gather", "spikes")
        assert not any(isinstance(m, nn.Linear) for m in fed.modules())


@pytest.mark.parametrize("site", asnn.SITES[2:])
@torch.no_grad()
def test_linears_that_no_spikes_feed_stay_as_they_are(ids, site):
    student = build(state_kind="delta", spike_sites=("k", "v", site))
    sparse = asnn.sparsify(student, "gather", "spikes" if site == "head_in" else "dense")
    changed = {name for name, m in sparse.named_modules() if isinstance(m, asnn.SpikeLinear)}
    expected = {f"goose.blocks.{i}.{linear}" for i in range(2) for fed, linear in FED.items()
                if fed.split(".")[0] == site}
    if site == "mix_in":
        expected |= {f"goose.blocks.{i}.time_mix.beta" for i in range(2)}
    assert changed == (expected or {"lm_head.head"})
    for name, module in student.named_modules():
        if isinstance(module, nn.Linear) and name not in changed and not (site == "head_in" and name == "lm_head"):
            assert torch.equal(sparse.get_submodule(name).weight, module.weight)
    close(sparse(ids).logits, student(ids).logits)


def test_the_density_of_a_site_decides_what_auto_takes_there(students):
    table = asnn.BackendTable([cell(1, density, X, out, **{winner: 1.0, "gather_int8": 0.5, "csr": 2.0})
                               for density, winner in ((0.2, "gather"), (0.8, "dense"))
                               for X, out in ((D, D), (D, 4 * D), (4 * D, D))])
    density = {"0.k": 0.9, "0.ffn_hidden": 0.7, "1.mix_in.v": 0.9, "1.mix_in.r": 0.1}
    sparse = asnn.sparsify(students("delta"), density=density, table=table)
    chosen = {name: m.backend_for(1) for name, m in sparse.goose.blocks.named_modules()
              if isinstance(m, asnn.SpikeLinear)}
    expected = dict.fromkeys(chosen, "gather") | dict.fromkeys(("0.ffn.down", "1.time_mix.value"), "dense")
    # beta's shape was not measured.
    assert chosen == expected | dict.fromkeys(("0.time_mix.beta", "1.time_mix.beta"), "linear")
    free = asnn.sparsify(students("delta"), table=table, exact=False)
    assert {m.backend_for(1) for m in free.modules() if isinstance(m, asnn.SpikeLinear)} == {"gather_int8", "linear"}


@pytest.mark.parametrize("head", ["dense", "spikes"])
def test_auto_measures_the_shapes_that_spikes_feed(students, ids, monkeypatch, head):
    asked = []
    monkeypatch.setattr(asnn.BackendTable, "measure", lambda shapes, *a, **k: asked.extend(shapes) or small_table())
    sparse = asnn.sparsify(students("delta"), head=head)
    shapes = {(m.in_features, m.out_features) for m in sparse.modules() if isinstance(m, asnn.SpikeLinear)}
    assert shapes - {(D, D // 8)} <= set(asked)  # beta is too small to matter
    close(sparse(ids).logits, students("delta")(ids).logits)


@torch.no_grad()
def test_an_int8_head_is_the_head_within_its_rounding(students, ids):
    student = students("delta")
    dense, int8 = (asnn.sparsify(student, "gather", head)(ids, output_hidden_states=True) for head in ("dense", "int8"))
    assert torch.equal(int8.hidden_states[-1], dense.hidden_states[-1])
    assert 0 < error(int8.logits, dense.logits) < 0.02
    model = asnn.sparsify(student, "gather", "int8")
    assert generate(model, ids).shape == (3, 20)
    assert torch.equal(model.get_input_embeddings().weight, student.get_input_embeddings().weight)


@torch.no_grad()
def test_int8_linear_is_the_linear_within_its_rounding():
    for bias in (True, False):
        linear, x = nn.Linear(300, 200, bias=bias), torch.randn(4, 5, 300)
        kept = linear.weight.clone()
        assert 0 < error(asnn.int8_linear(linear)(x), linear(x)) < 0.02
        assert torch.equal(linear.weight, kept)


@torch.no_grad()
def test_int8_rows_change_little_of_what_a_block_computes(students):
    """Of a whole random student a spike that flips changes everything after it; a block's products say how much."""
    student = students("delta")
    sparse = asnn.sparsify(student, "gather_int8")
    for name, module in sparse.named_modules():
        if isinstance(module, asnn.SpikeLinear):
            exact = asnn.sparsify(student, "gather").get_submodule(name)
            x = asnn.SpikeVector(asnn.random_spikes(8, module.in_features, 0.4), torch.rand(8, 1) + 0.5)
            assert module.rows is None and error(module(x), exact(x)) < 0.02


@torch.no_grad()
def test_int8_embeddings_are_the_embeddings_within_their_rounding(students, ids):
    student = students("delta")
    sparse = asnn.sparsify(student, "gather", embeddings="int8")
    rows = student.get_input_embeddings().weight
    for index in (ids, ids.t(), ids[0], ids[:, ::2], ids[:, :0]):
        got = sparse.get_input_embeddings()(index)
        assert got.shape == (*index.shape, D) and (not got.numel() or 0 < error(got, rows[index]) < 0.01)
    assert torch.equal(sparse.lm_head.weight, rows) and generate(sparse, ids).shape == (3, 20)
    assert torch.equal(asnn.sparsify(student, "gather").get_input_embeddings().weight, rows)


@pytest.mark.parametrize("head, bound", [("dense", 1e-4), ("spikes", 1e-4), ("int8", 0.02)])
@pytest.mark.parametrize("backend", ["gather", "gather_int8"])
def test_perplexity_is_that_of_the_student(trained, tokens, backend, head, bound):
    part = tokens["validation"]
    expected = asnn.evaluate(trained, part, 16).ppl
    assert len(part) > 500 and expected < 100  # of 300 tokens: it has learnt something
    got = asnn.evaluate(asnn.sparsify(trained, backend, head), part, 16).ppl
    assert got == pytest.approx(expected, rel=0.02 if backend == "gather_int8" else bound)


@pytest.mark.parametrize("backend, bound", [("gather", 1e-4), ("gather_int8", 0.02)])
@pytest.mark.parametrize("head", ["dense", "spikes"])
@torch.no_grad()
def test_the_loss_is_that_of_the_student(trained, tokens, head, backend, bound):
    """As the test before, by the model's own loss."""
    ids = torch.from_numpy(tokens["validation"][:576].astype("int64")).view(-1, 16)
    sparse = asnn.sparsify(trained, backend, head)
    expected, got = (model(ids, labels=ids).loss.exp().item() for model in (trained, sparse))
    assert got == pytest.approx(expected, rel=bound)


@pytest.mark.parametrize("head", ["dense", "int8", "spikes"])
@torch.no_grad()
def test_the_spikes_of_the_sparse_copy_are_those_of_the_student(students, ids, head):
    for name in STUDENTS:
        student, captured = students(name), []
        sparse = asnn.sparsify(student, "gather", head)
        assert list(asnn.spike_modules(sparse)) == list(asnn.spike_modules(student))
        for model in (student, sparse):
            with asnn.SpikeCapture(model) as capture:
                model(ids)
            captured.append(capture.spikes())
        assert list(captured[0]) == list(captured[1])
        assert all(torch.equal(spikes, captured[1][site]) for site, spikes in captured[0].items())
        if head != "spikes":  # then the encoder is in the head, which spike_density does not run
            assert asnn.spike_density(sparse, ids) == asnn.spike_density(student, ids)


def test_a_saved_copy_loads_as_it_was_or_is_refused(students, ids, tmp_path):
    """What must not happen is a folder that loads with weights that start fresh."""
    sparse = asnn.sparsify(students("delta"), "gather")
    try:
        sparse.save_pretrained(tmp_path / "sparse")
    except (ValueError, NotImplementedError) as refusal:
        assert str(refusal).endswith(".")
        assert not list(tmp_path.glob("sparse/*.safetensors"))
    else:
        close(asnn.GooseForCausalLM.from_pretrained(tmp_path / "sparse").eval()(ids).logits, sparse(ids).logits)


@pytest.mark.parametrize("options, arguments, message", [
    ({"spike_sites": ("k", "v")}, {}, r"^spike_sites are \['k', 'v'\] and spike_kind is ternary: no matrix "
     r"product of this student is fed by spikes; train one with recipe v14\.4-rates\.$"),
    ({"spike_kind": "dense"}, {}, "spike_kind is dense: no matrix product of this student is fed by spikes"),
    ({}, {"backend": "magic"}, WRONG_BACKEND),
    ({}, {"head": "magic"}, "^head is 'magic'; allowed: dense, int8, spikes.$"),
    ({}, {"embeddings": "magic"}, "^embeddings is 'magic'; allowed: dense, int8.$"),
    ({}, {"density": {"0.mix_out": 0.4, "2.mix_out": 0.4}}, r"^density has no field 2\.mix_out; it has: 0\.ffn_hid"),
    ({"spike_sites": asnn.SITES[:-1]}, {"head": "spikes"},
     "^head is 'spikes'; allowed: dense, int8 for a student without the site head_in.$")])
def test_what_cannot_be_skipped_is_refused_before_anything_is_measured(monkeypatch, options, arguments, message):
    monkeypatch.setattr(asnn.BackendTable, "measure", no_measuring)
    with pytest.raises(ValueError, match=message):
        asnn.sparsify(build(**options), **arguments)


# ---- compiled step -------------------------------------------------------------------------------


@torch.no_grad()
def decode(model, ids, state=None):
    """Logits (B, T, V) token by token, and the last state."""
    logits = []
    for t in range(ids.shape[1]):
        out = model(ids[:, t:t + 1], state=state, use_cache=True)
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, 1), state


def close_states(a, b):
    """All that the states hold; a state's parts that are not there are None in both."""
    if isinstance(a, tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b):
            close_states(x, y)
    elif isinstance(a, torch.Tensor):
        close(a, b)
    else:
        assert a == b


COMPILED = [("matrix", None), ("delta", "gather"), ("delta", "gather_int8")]  # two of the students: a graph takes 5 s


@pytest.fixture(scope="module")
def pair(students):
    """pair(name, backend): (plain, compiled) of a student, or of its sparse copy; made once."""
    made = {}

    def get(name, backend):
        if (name, backend) not in made:
            student = students(name)
            made[name, backend] = (
                (student, asnn.compile_step(copy.deepcopy(student))) if backend is None else
                tuple(asnn.sparsify(student, backend, compiled=compiled) for compiled in (False, True)))
        return made[name, backend]
    return get


@pytest.fixture
def one(gather_rows):
    """One sequence in all tests: another number of them is another graph. Skips where there is no compiler."""
    return torch.randint(1, V, (1, 12))


class Steps(list):
    """The blocks that took the compiled path. With `by`, another function runs there than the compiled one."""

    def __init__(self, patch):
        super().__init__()
        self.patch = patch
        self.by(asnn._compiled_layer)

    def by(self, layer):
        self.patch.setattr(asnn, "_compiled_layer", lambda: lambda block, *a: self.append(block) or layer()(block, *a))


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


@pytest.fixture
def plain_steps(steps):
    steps.by(lambda: lambda block, x, past, *_: block.layer(x, past))
    return steps


@pytest.fixture
def traced(gather_rows, monkeypatch):
    """The compiled path with its guards, traced anew and run operation by operation: a second instead of ten. Raises
    where the tracer cannot follow; traced() is the number of graphs."""
    torch.compiler.reset()
    counters, compile_ = torch._dynamo.utils.counters, torch.compile
    counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **options: compile_(f, **options, backend="eager", fullgraph=True))
        layer = inspect.unwrap(asnn._compiled_layer)()
    monkeypatch.setattr(asnn, "_compiled_layer", lambda: layer)
    return lambda: counters["stats"]["unique_graphs"]


def mark(student):
    """A copy whose blocks say that they are compiled; needs no compiler."""
    student = copy.deepcopy(student)
    for block in student.goose.blocks:
        block.compiled = "compiled"
    return student


def check_decoding(compiled, plain, ids, states=(None, None)):
    (got, state), (expected, plain_state) = decode(compiled, ids, states[0]), decode(plain, ids, states[1])
    close(got, expected)
    close_states(state, plain_state)
    return got


@pytest.mark.parametrize("name, backend", COMPILED)
def test_a_compiled_step_decodes_as_the_plain_one(pair, one, steps, name, backend):
    plain, compiled = pair(name, backend)
    state = decode(plain, one)[1]
    assert not steps and (name != "matrix" or state.layers[0].k_statistics is not None)  # a threshold with a memory too
    check_decoding(compiled, plain, one)
    assert steps == [*compiled.goose.blocks] * 11  # every block at every token but the first, which has no past


@pytest.mark.parametrize("name, backend", COMPILED)
def test_a_compiled_student_generates_what_the_plain_one_does(pair, one, steps, name, backend):
    plain, compiled = pair(name, backend)
    expected = generate(plain, one[:, :1], max_new_tokens=12)
    assert not steps and expected.unique().numel() > 4
    assert torch.equal(generate(compiled, one[:, :1], max_new_tokens=12), expected)
    assert steps == [*compiled.goose.blocks] * 11


@pytest.mark.parametrize("name, backend", COMPILED[:2])
def test_a_copy_of_a_compiled_student_has_its_own_weights(pair, one, steps, name, backend):
    plain, compiled = pair(name, backend)
    before, copied, plain_copy = decode(compiled, one)[0], *map(copy.deepcopy, (compiled, plain))
    for model in (copied, plain_copy):
        with torch.no_grad():
            down = model.goose.blocks[0].ffn.down
            (down.weight if backend is None else down.rows).mul_(-1.5)
    steps.clear()
    got = check_decoding(copied, plain_copy, one)
    assert steps == [*copied.goose.blocks] * 11 and error(got[:, 1:], before[:, 1:]) > 0.01
    assert torch.equal(decode(compiled, one)[0], before)


# All of the same shapes.
DIFFERENT = [{"state_kind": "vector"}, {"state_kind": "vector", "encoder_kind": "integer:3"},
             {"state_kind": "vector", "spike_kind": "integer:2"}, {"state_kind": "vector", "activation": "relu"},
             {"state_kind": "vector", "recurrence": "cumsum"}, {"state_kind": "vector", "layer_norm_epsilon": 0.1},
             {"state_kind": "vector", "threshold": "channel"}, {"state_kind": "vector", "threshold": "mixed"}]


def test_students_that_differ_in_what_is_no_tensor_do_not_share_a_step(traced, one):
    """One after the other, so that each could take a graph that is not its own."""
    models, structures = [build(**options) for options in DIFFERENT], set()
    models += [asnn.sparsify(models[0], backend) for backend in ("linear", "dense", "gather", "gather_int8")]
    for plain in models:
        compiled = asnn.compile_step(copy.deepcopy(plain))
        check_decoding(compiled, plain, one)
        assert len({block.compiled for block in compiled.goose.blocks}) == 1
        structures.add(compiled.goose.blocks[0].compiled)
    assert len(structures) == len(models)


@pytest.mark.parametrize("name, backend", [("delta, counts", None), ("vector", "gather")])
def test_a_step_is_one_graph_for_all_layers_and_any_weights(students, traced, one, name, backend):
    plain = students(name) if backend is None else asnn.sparsify(students(name), backend)
    for model in (plain, shake(copy.deepcopy(plain))):
        check_decoding(asnn.compile_step(copy.deepcopy(model)), model, one)
    assert traced() == 1


@pytest.mark.parametrize("name, backend", [("matrix", None), ("vector", "gather")])
@torch.no_grad()
def test_any_number_of_sequences_is_decoded_after_a_prompt_of_any_length(students, traced, ids, name, backend):
    plain = students(name) if backend is None else asnn.sparsify(students(name), backend)
    compiled = asnn.compile_step(copy.deepcopy(plain))
    for batch, length in ((ids[:1], 1), (ids, 2), (ids[:1], 8), (ids.repeat(9, 1), 5)):  # a plan tells 27 from 1
        states = [model(batch[:, :length], use_cache=True).state for model in (compiled, plain)]
        check_decoding(compiled, plain, batch[:, length:], states)


@torch.no_grad()
def test_a_compiled_student_in_training_mode_anneals_as_a_plain_one(students, traced, one):
    plain = copy.deepcopy(students("vector"))
    compiled = asnn.compile_step(copy.deepcopy(plain))
    for training, share in ((False, 0.5), (True, 0.5), (True, 0.25), (False, 0.25)):
        for model in (plain, compiled):
            for module in asnn.spike_modules(model.train(training)).values():
                module.share = share
        check_decoding(compiled, plain, one)


@torch.no_grad()
def test_hooks_on_spikes_see_and_change_those_of_a_compiled_student(students, traced, one):
    plain = asnn.sparsify(students("vector"), "gather")
    compiled = asnn.compile_step(copy.deepcopy(plain))
    check_decoding(compiled, plain, one)
    structures, seen = [block.compiled for block in compiled.goose.blocks], []
    for model in (plain, compiled):
        spikes = {}
        with asnn.spike_hooks(model, lambda name, value: spikes.setdefault(name, []).append(value)):
            decode(model, one)
        with asnn.spike_hooks(model, lambda name, value: torch.zeros_like(value), ["0.ffn_hidden"]):
            seen.append((spikes, decode(model, one)[0]))
    assert list(seen[0][0]) == list(seen[1][0]) and {len(values) for values in seen[1][0].values()} == {12}
    assert all(torch.equal(torch.cat(values), torch.cat(seen[1][0][name])) for name, values in seen[0][0].items())
    close(seen[1][1], seen[0][1])
    assert error(seen[1][1], decode(plain, one)[0]) > 1e-3
    assert [block.compiled for block in compiled.goose.blocks] == structures and all(structures)
    check_decoding(compiled, plain, one)


def test_a_compiled_student_can_be_made_sparse(students, traced, one):
    plain = students("vector")
    student = asnn.compile_step(copy.deepcopy(plain))
    check_decoding(student, plain, one)
    for backend, compiled in (("gather", False), ("gather", True), ("gather_int8", True)):
        expected = asnn.sparsify(plain, backend)
        check_decoding(asnn.sparsify(student, backend, compiled=compiled), expected, one)


@pytest.mark.parametrize("name, backend", [(name, backend) for name in STUDENTS for backend in (None, "gather")])
def test_all_but_a_single_token_after_others_takes_the_plain_path(students, ids, plain_steps, name, backend):
    plain = students(name) if backend is None else asnn.sparsify(students(name), backend)
    compiled, mask = mark(plain), torch.ones_like(ids)
    mask[0, :5], mask[2, :1] = 0, 0
    with torch.no_grad():
        past = plain(ids, use_cache=True).state
        fresh = plain(ids[:, :1], attention_mask=mask[:, :1], use_cache=True).state  # two have seen only padding
        for options in ({"input_ids": ids}, {"input_ids": ids[:, :1]}, {"input_ids": ids[:, :2], "state": past},
                        {"input_ids": ids, "attention_mask": mask},
                        {"input_ids": ids[:, :1], "attention_mask": mask[:, :1], "state": fresh}):
            got, expected = (model(use_cache=True, **options) for model in (compiled, plain))
            assert not plain_steps, options.keys()
            assert torch.equal(got.logits, expected.logits)
            close_states(got.state, expected.state)
    for training in (False, True):  # with gradients
        compiled.train(training)(ids[:, :1], state=past, use_cache=True)
        assert not plain_steps
    compiled.eval()
    with torch.no_grad():  # and what is left
        got, expected = (model(ids[:, :1], state=past, use_cache=True) for model in (compiled, plain))
    assert plain_steps == [*compiled.goose.blocks]
    assert torch.equal(got.logits, expected.logits)
    close_states(got.state, expected.state)


@pytest.mark.parametrize("name", ["matrix", "delta, counts"])
def test_a_compiled_student_is_trained_as_a_plain_one(students, ids, plain_steps, name):
    models, gradients = (copy.deepcopy(students(name)), mark(students(name))), []
    for model in models:
        model.train()(ids, labels=ids).loss.backward()
        state = model(ids[:, :-1], use_cache=True).state
        model(ids[:, -1:], state=state, use_cache=True).logits.sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert not plain_steps and list(gradients[0]) == list(gradients[1]) and len(gradients[0]) > 20
    assert all(torch.equal(gradient, gradients[1][key]) for key, gradient in gradients[0].items())


def test_a_padded_batch_is_generated_by_the_compiled_step_from_its_second_token(students, ids, plain_steps):
    plain, mask = students("delta"), torch.ones_like(ids)
    compiled = mark(plain)
    ids[0, :5], mask[0, :5] = 0, 0
    text = generate(compiled, ids, attention_mask=mask)
    assert plain_steps == [*compiled.goose.blocks] * 7
    assert torch.equal(text, generate(plain, ids, attention_mask=mask))


def test_only_what_was_asked_for_is_compiled(students, gather_rows):
    student = copy.deepcopy(students("delta"))

    def compiled(model):
        return [bool(block.compiled) for block in model.goose.blocks]
    assert compiled(asnn.sparsify(student, "gather", compiled=True)) == [True, True]
    assert compiled(asnn.sparsify(student, "gather")) == compiled(student) == [False, False]
    assert asnn.compile_step(student) is student and compiled(student) == [True, True]
    assert list(student.state_dict()) == list(students("delta").state_dict())  # and it is saved as before


@pytest.mark.parametrize("make", [asnn.compile_step, lambda student: asnn.sparsify(student, "gather", compiled=True)])
def test_without_a_compiler_a_student_stays_as_it_is_with_a_warning(students, ids, no_kernel, steps, make):
    student = copy.deepcopy(students("delta"))
    with pytest.warns(UserWarning, match="^not compiled: no$"):
        model = make(student)
    assert make is not asnn.compile_step or model is student
    check_decoding(model, students("delta"), ids)
    assert not steps and not any(block.compiled for block in model.goose.blocks)


# ---- spikes without gradients --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 3, 7])
def test_spikes_are_the_same_with_and_without_gradients(levels, binary, dtype):
    x = (2 * torch.randn(3, 5, 16)).to(dtype).requires_grad_()
    with torch.no_grad():
        x[0, 0], x[0, 1, :8], x[0, 2] = 0.0, 0.5, torch.arange(-8, 8) * 0.5  # at thresholds too, where none fires
    for theta in (torch.tensor(0.5), torch.tensor(0.0), torch.rand(3, 5, 1), torch.rand(16)):
        theta.requires_grad_()
        for estimator in asnn.ESTIMATORS:
            expected = asnn.ternary_spike(x, theta, estimator, levels, binary)
            assert expected.requires_grad
            for without in (torch.no_grad, torch.inference_mode):
                with without():
                    got = asnn.ternary_spike(x, theta, estimator, levels, binary)
                assert torch.equal(got, expected) and got.dtype == expected.dtype == dtype and not got.requires_grad
    assert expected.max() == levels and expected.min() == (0 if binary else -levels)
    with torch.no_grad(), pytest.raises(ValueError, match="^estimator is 'magic'"):
        asnn.ternary_spike(x, theta, "magic", levels, binary)
