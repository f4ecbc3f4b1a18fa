"""Efficiency: what a token costs in operations, energy, memory and time, and the tables that say so."""
import copy
import dataclasses
import itertools
import json
import math
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, RwkvConfig, RwkvForCausalLM
from transformers.pytorch_utils import Conv1D

import asnn_common as asnn
from conftest import shake

V, D, N = 50, 32, 8
PRODUCTS = {"W_k": "time_mix.key", "W_v": "time_mix.value", "W_r": "time_mix.receptance", "W_g": "time_mix.gate",
            "W_b": "time_mix.beta", "W_o": "time_mix.output", "W_1": "ffn.up", "W_2": "ffn.down"}
FED = {"mix_in": {"W_k", "W_v", "W_r", "W_g", "W_b"}, "mix_out": {"W_o"}, "ffn_in": {"W_1"}, "ffn_hidden": {"W_2"},
       "head_in": {"head"}}


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """Building it takes longer than this file."""
    monkeypatch.setattr(asnn, "load_kernel", lambda: "not in this test")


def goose(**options):
    """A student whose parameters are all away from their start values, with calibrated encoders at all sites."""
    torch.manual_seed(0)
    values = {"vocab_size": V, "d_model": D, "n_layer": 2, "n_positions": 24, "pad_token_id": 0, "head_width": N,
              "state_kind": "delta", "spike_sites": asnn.SITES, **options}
    model = shake(asnn.GooseForCausalLM(asnn.GooseConfig(**values)).eval())
    asnn.calibrate_encoders(model, torch.randint(1, values["vocab_size"], (8, 24)))
    return model


@torch.no_grad()
def gpt2(std=0.15, **options):
    """A GPT-2 whose blocks change its logits by more than their size, biases included."""
    torch.manual_seed(0)
    values = {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 24, "bos_token_id": None,
              "eos_token_id": None, **options}
    model = GPT2LMHeadModel(GPT2Config(**values)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(std=std)
        else:
            p.add_(0.2 * torch.rand_like(p))
    return model


def rwkv(**options):
    torch.manual_seed(0)
    values = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "context_length": 24, "bos_token_id": None,
              "eos_token_id": None, **options}
    return RwkvForCausalLM(RwkvConfig(**values)).eval()


def recipe(**options):
    return asnn.get_recipe("v14.4-sites").replace(**{
        "d_model": 64, "n_layer": 2, "head_width": 16, "seq_len": 64, "spike_sites": asnn.SITES, **options})


@pytest.fixture
def ids():
    return torch.randint(1, V, (3, 12))


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def by_product(rows, layer=0):
    return {row["product"]: row for row in rows if row["layer"] in (layer, "-")}


# ---- a random student ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"encoder_kind": "integer:3"}, {"state_kind": "vector"},
                                     {"state_kind": "matrix", "threshold": "mixed_fixed"}])
@pytest.mark.parametrize("asked", [{"mix_in": 0.3, "mix_out": 0.2, "ffn_in": 0.5, "ffn_hidden": 0.1}, {"ffn_in": 0.2},
                                   {"mix_in": 0.9, "mix_out": 0.7, "ffn_in": 0.05, "ffn_hidden": 0.8},
                                   {"head_in": 0.2},
                                   {"mix_out": 0.0, "ffn_in": 1.0}])
def test_a_random_student_fires_as_often_as_asked_for(options, asked):
    student = asnn.random_student(recipe(**options), 300, asked, seed=3)
    with asnn.SpikeCapture(student) as capture:
        student(torch.randint(0, 300, (4, 32)))
    spikes = capture.spikes()
    for name, share in {name: (some != 0).float().mean().item() for name, some in spikes.items()}.items():
        site = next(part for part in name.split(".") if not part.isdigit())
        if site in asked:
            assert share == pytest.approx(asked[site], abs=0.05), name
        else:
            assert 0.2 < share < 0.8, name  # k, v and what is calibrated only
    assert max(some.max() for some in spikes.values()) == (3 if "encoder_kind" in options else 1)


def test_a_random_student_depends_on_its_seed_alone():
    weights = []
    for seed, before in ((1, 10), (1, 20), (2, 10)):
        torch.manual_seed(before)
        student = asnn.random_student(recipe(), 300, {"mix_in": 0.3}, seed)
        weights.append((student.state_dict(), torch.rand(3)))
        assert not student.training
        assert not any(m._forward_pre_hooks for m in student.modules())  # they would set the thresholds at each token
    (first, after), (again, later), (other, _) = weights
    assert all(torch.equal(value, again[name]) for name, value in first.items()) and torch.equal(after, later)
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("asked", [{"mix_inn": 0.3}, {"0.mix_in.k": 0.3}, {"k": 0.3}, {"mix_in": 1.3}])
def test_a_density_that_no_encoder_takes_is_refused(asked):
    with pytest.raises(ValueError, match=next(iter(asked))):
        asnn.random_student(recipe(), 300, asked)


def test_the_dense_twin_of_a_random_student_has_no_spikes():
    twin = asnn.random_student(recipe(spike_kind="dense"), 300, {"mix_in": 0.3})
    assert set(asnn.spike_density(twin, torch.randint(0, 300, (2, 32))).values()) == {1.0}
    assert twin.config.spike_sites == list(asnn.SITES) and asnn.count_parameters(twin) == asnn.count_parameters(
        asnn.random_student(recipe(), 300, {}))


# ---- int8 ----------------------------------------------------------------------------------------


def dense_goose(kind):
    """Without spikes, which flip where int8 moves a value over a threshold."""
    model = goose(state_kind=kind, spike_kind="dense", projection_bias=kind != "vector")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "blocks" in name:
                p.mul_(0.3)
    return model


DENSE = {"GPT-2": gpt2, "delta": lambda: dense_goose("delta"), "matrix": lambda: dense_goose("matrix"),
         "vector": lambda: dense_goose("vector")}


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_an_int8_model_has_nearly_the_logits_of_the_dense_one(ids, name, embeddings):
    model = DENSE[name]()
    kept, expected = copy.deepcopy(model.state_dict()), model(ids).logits
    small = asnn.quantize_int8(model, embeddings)
    assert 0 < error(small(ids).logits, expected) < 0.05
    assert not small.training and not any(p.requires_grad for p in small.parameters())
    assert not any(isinstance(m, (nn.Linear, Conv1D)) for m in small.modules())
    assert any(isinstance(m, nn.Embedding) for m in small.modules()) != embeddings
    assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for key, p in model.named_parameters() if "alpha" not in key and "centre" not in key
               and "amplitude" not in key)
    # And the blocks matter to the logits, or the test would say little.
    for block in asnn.transformer_blocks(model):
        for module in block.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                module.weight.zero_()
    assert error(model(ids).logits, expected) > 0.3


@torch.no_grad()
def test_an_int8_model_generates(ids):
    for model in (goose(), gpt2()):
        for embeddings in (False, True):
            small = asnn.quantize_int8(model, embeddings)
            text = small.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert text.shape == (3, 16) and torch.equal(text[:, :12], ids)


@pytest.mark.parametrize("name", DENSE)
def test_an_int8_model_takes_a_fourth_of_the_bytes_of_its_linears(name):
    model = DENSE[name]()
    linears = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    weights, dense = sum(m.weight.numel() for m in linears), asnn.tensor_bytes(model)
    tied = V * D * 4  # the head shares them with the embeddings, which stay or become int8 themselves
    expected = dense - 4 * weights + tied + weights
    got = asnn.tensor_bytes(asnn.quantize_int8(model))
    assert expected <= got <= expected + 16 * len(linears)  # a scale and an offset each
    rows = sum(m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    saved = got - asnn.tensor_bytes(asnn.quantize_int8(model, embeddings=True))
    assert rows * (3 * D - 8) <= saved <= rows * 3 * D  # rows may count their scale and offset


@pytest.mark.parametrize("make", [
    lambda: torch.randint(20, (5,)), lambda: torch.randint(20, (4, 6)), lambda: torch.randint(20, (4, 6)).t(),
    lambda: torch.randint(20, (4, 6))[:, ::2], lambda: torch.arange(20)[None].expand(3, 20),
    lambda: torch.tensor([[7]]), lambda: torch.randint(20, (2, 3), dtype=torch.int32),
    lambda: torch.zeros(0, dtype=torch.long),
    lambda: torch.tensor(3),
    lambda: torch.randint(20, (2, 3, 4)),
    lambda: torch.randint(20, (3, 4, 2)).transpose(0, 2)])
@torch.no_grad()
def test_int8_rows_of_an_embedding_are_its_rows_within_their_rounding(make):
    """Rows of very different size and offset: each is half a step of its own range off at most."""
    embedding, index = nn.Embedding(20, 12), make()
    embedding.weight.mul_(torch.logspace(-3, 3, 20).unsqueeze(1)).add_(torch.linspace(-3, 3, 20).unsqueeze(1))
    kept = embedding.weight.clone()
    small = asnn.int8_embedding(embedding)
    got, expected = small(index), embedding(index)
    assert got.shape == expected.shape and got.dtype == torch.float32
    step = (expected.amax(-1, keepdim=True).clamp_min(0) - expected.amin(-1, keepdim=True).clamp_max(0)) / 255
    assert ((got - expected).abs() <= 0.501 * step + 1e-6).all()
    assert torch.equal(embedding.weight, kept)
    assert torch.equal(copy.deepcopy(small)(index), got)


@torch.no_grad()
def test_a_sparse_copy_may_have_int8_embeddings(ids):
    student = goose()
    sparse = asnn.sparsify(student, "gather", head="int8", embeddings="int8")
    got, expected = (m(ids, output_hidden_states=True).hidden_states[0] for m in (sparse, student))
    assert 0 < error(got, expected) < 0.02
    assert asnn.tensor_bytes(sparse) < asnn.tensor_bytes(asnn.sparsify(student, "gather", head="int8"))
    with pytest.raises(ValueError, match="^embeddings is 'int4'; allowed: dense, int8.$"):
        asnn.sparsify(student, "gather", embeddings="int4")


# ---- bytes ---------------------------------------------------------------------------------------


def test_bytes_of_nested_tensors_are_counted_once():
    x, y = torch.zeros(10, 10), torch.zeros(7, dtype=torch.int8)
    assert asnn.tensor_bytes() == asnn.tensor_bytes(None, "text", 3, [], {}) == 0
    assert asnn.tensor_bytes(x) == asnn.tensor_bytes(x, x, x.t(), x[3:, :2], x.view(-1)) == 400
    assert asnn.tensor_bytes(x[:2]) == 400  # what a view keeps alive
    assert asnn.tensor_bytes([x, {"a": (y, None), "b": [x[0]]}], y) == 407
    assert asnn.tensor_bytes(x.clone(), x) == 800
    assert asnn.tensor_bytes(x.half(), torch.zeros(0)) == 200


def test_bytes_of_a_module_are_those_of_its_parameters_and_buffers():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert asnn.tensor_bytes(module) == 4 * (15 + 12) + 8  # the count of batches is a long
    module[0].weight.requires_grad_(False)
    assert asnn.tensor_bytes(module, module, module[0].weight) == 4 * 27 + 8


def test_tied_weights_are_counted_once():
    for model in (gpt2(), goose(spike_sites=("k", "v"))):
        assert asnn.tensor_bytes(model) == 4 * asnn.count_parameters(model)
        assert asnn.tensor_bytes(model, model.get_input_embeddings()) == asnn.tensor_bytes(model)


@pytest.mark.parametrize("make, low, high", [
    (lambda: asnn.int8_linear(nn.Linear(64, 40)), 64 * 40 + 160, 16),
    (lambda: asnn.int8_embedding(nn.Embedding(50, 64)), 50 * 64, 50 * 8),
    (lambda: asnn.SpikeLinear(nn.Linear(64, 40), "gather_int8"), 64 * (40 + 8) + 160, 0)])
def test_packed_weights_count_their_packed_bytes(make, low, high):
    modules = [make() for _ in range(6)]
    for module in modules:
        assert low <= asnn.tensor_bytes(module) <= low + high
    one = asnn.tensor_bytes(modules[0])
    for several in (nn.ModuleList(modules), modules, {str(i): (module,) for i, module in enumerate(modules)}):
        assert asnn.tensor_bytes(several) == 6 * one


@torch.no_grad()
def test_bytes_of_caches(ids):
    cache = gpt2()(ids, use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    assert asnn.tensor_bytes(cache) == asnn.tensor_bytes({"a": [cache]}) == 2 * 2 * ids.numel() * D * 4


@pytest.mark.parametrize("options, layer", [({}, D * N + D), ({"state_kind": "matrix"}, D * N + D),
                                            ({"state_kind": "vector"}, 2 * D),
                                            ({"state_kind": "vector", "recurrence": "cumsum"}, 2 * D),
                                            ({"threshold": "channel"}, D * N + D + 2 * (D + 1))])
@torch.no_grad()
def test_bytes_of_a_state_do_not_grow(ids, options, layer):
    """The state, the token shift, what a threshold remembers and the position; no view of the tokens before."""
    student = goose(**options)
    sizes = [asnn.tensor_bytes(student(ids[:, :T], use_cache=True).state) for T in (1, 2, 12)]
    assert sizes == [3 * (2 * 4 * layer + 8)] * 3


# ---- decoding ------------------------------------------------------------------------------------


MODELS = {"delta": lambda: goose(projection_bias=True), "matrix": lambda: goose(state_kind="matrix", threshold="mixed"),
          "vector": lambda: goose(state_kind="vector"), "twin": lambda: goose(spike_kind="dense"),
          "sparse": lambda: asnn.sparsify(goose(), "gather", "spikes"),
          "GPT-2, sdpa": lambda: gpt2(attn_implementation="sdpa"),
          "GPT-2, eager": lambda: gpt2(attn_implementation="eager")}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_gives_the_logits_of_the_next_token_each_time(ids, name, batch):
    model, ids = MODELS[name](), ids[:batch]
    decoder = asnn.Decoder(model, ids)
    with torch.no_grad():
        expected = model(torch.cat((ids, ids[:, -1:]), 1)).logits[:, -1:]
        shorter = model(ids).logits[:, -1:]
    assert error(shorter, expected) > 0.01  # a decoder that forgets or repeats a token would show
    for _ in range(3):
        got = decoder()
        assert got.shape == (batch, 1, V) and not got.requires_grad
        close(got, expected)
        kind, cache = decoder.cache
        length = cache.get_seq_length() if "GPT" in name else cache.length
        assert (kind, length) == ("past_key_values" if "GPT" in name else "state", 12)


@pytest.mark.parametrize("make", [goose, gpt2])
@torch.no_grad()
def test_a_prefill_has_the_head_see_one_token(ids, make):
    model, shapes = make(), []
    model.lm_head.register_forward_hook(lambda _module, args, _out: shapes.append(tuple(args[0].shape)))
    decoder = asnn.Decoder(model, ids)
    name, cache = decoder.prefill(ids[:2, :5])
    assert shapes == [(3, 1, D), (2, 1, D)]
    assert cache.get_seq_length() == 5 if name == "past_key_values" else cache.length == 5
    assert decoder.cache[1] is not cache  # a timed prefill leaves the context that is decoded


@torch.no_grad()
def test_the_rwkv_of_transformers_decodes_at_any_context(ids):
    model = rwkv()
    decoder = asnn.Decoder(model, ids[:1])
    name, cache = decoder.cache
    size = asnn.tensor_bytes(cache)
    close(decoder(), model(torch.cat((ids[:1], ids[:1, -1:]), 1)).logits[:, -1:])
    for _ in range(30):  # past its context_length
        assert decoder().isfinite().all()
    assert name == "state" and asnn.tensor_bytes(decoder.cache[1]) == size == 5 * D * 2 * 4


def test_a_batch_that_the_rwkv_of_transformers_mixes_up_is_not_timed(ids):
    """Its token shift adds (B, D) to (B, 1, D): B tokens for each sequence, B times the work that was asked for."""
    try:
        logits = asnn.Decoder(rwkv(), ids)()
    except ValueError as refusal:
        assert str(refusal).endswith(".") and "Rwkv" in str(refusal)
    else:
        assert logits.shape == (3, 1, V)


class Forgetful(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=V)
        self.head = nn.Embedding(V, V)

    def forward(self, input_ids, use_cache=None):
        return SimpleNamespace(logits=self.head(input_ids), past_key_values=None)


FORGETS = "^Forgetful returns neither state nor past_key_values: it cannot be decoded token by token.$"


def test_a_model_without_a_cache_is_refused(ids):
    with pytest.raises(ValueError, match=FORGETS):
        asnn.Decoder(Forgetful(), ids)
    with pytest.raises(ValueError, match=FORGETS):
        asnn.bench({"GPT-2": gpt2(), "other": Forgetful()}, contexts=(4,), repeats=1, progress=False)


# ---- memory --------------------------------------------------------------------------------------


X = torch.ones(1000)


@pytest.mark.parametrize("call, expected", [
    (lambda: None, 0), (lambda: X.add_(X), 0), (lambda: X[:500].view(5, 100).t(), 0), (lambda: X + X, 4000),
    (lambda: [X + X for _ in range(5)], 20000), (lambda: [(X + X).sum() for _ in range(5)], 4020),
    (lambda: torch.cat([(X + X), X]), 12000), (lambda: torch.cat([X, X])[:10].clone(), 8040),
    (lambda: X > X, 1000), (lambda: (X + X).double(), 12000)])
def test_the_peak_of_an_allocation_is_known(call, expected):
    for _ in range(2):
        assert asnn.peak_allocation(call) == expected


def test_memory_that_a_call_gives_back_is_not_counted_as_its_own():
    held = [torch.ones(1000)]

    def call():
        held.clear()
        held.append(torch.ones(500))
    assert asnn.peak_allocation(call) == 0


def test_a_cache_that_is_copied_layer_by_layer_is_not_counted_twice():
    """GPT-2's keys and values are written anew with each token, and those of the layer before given back."""
    decoder = asnn.Decoder(gpt2(n_positions=600, n_layer=4), torch.randint(1, V, (1, 500)))
    decoder()
    assert asnn.peak_allocation(decoder) < 0.6 * asnn.tensor_bytes(decoder.cache[1])


def test_a_larger_batch_has_larger_activations(ids):
    student = goose()
    peaks = [asnn.peak_allocation(asnn.Decoder(student, ids[:batch])) for batch in (1, 3)]
    assert 2 * peaks[0] < peaks[1] < 4 * peaks[0]


# ---- energy counters -----------------------------------------------------------------------------


class Machine:
    """Takes `idle` watts, and has a clock and RAPL's files of its own."""

    ZONES = {"intel-rapl:0": ("package-0", 0.75), "intel-rapl:0:0": ("core", 0.5), "intel-rapl:0:1": ("dram", 0.1),
             "intel-rapl:1": ("package-1", 0.25)}

    def __init__(self, folder, idle=7.0, zones=None, limit=2**38):
        self.folder, self.idle, self.zones, self.limit = folder, idle, zones or self.ZONES, limit
        self.now, self.used = 100.0, 50.0
        (folder / "intel-rapl").mkdir(parents=True)  # the parent of the zones has no counter
        for zone, (name, _) in self.zones.items():
            (folder / zone).mkdir()
            (folder / zone / "name").write_text(f"{name}\n")
            (folder / zone / "max_energy_range_uj").write_text(f"{limit}\n")
        self.pass_time(0.0)

    def pass_time(self, seconds, watts=0.0):
        self.now += seconds
        self.used += seconds * (self.idle + watts)
        for zone, (_, share) in self.zones.items():
            (self.folder / zone / "energy_uj").write_text(f"{round(1e6 * share * self.used) % self.limit}\n")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(**options): a Machine whose time is that of the section."""
    def make(**options):
        made = Machine(tmp_path / "powercap", **options)
        monkeypatch.setattr(asnn, "time", SimpleNamespace(sleep=made.pass_time, perf_counter=lambda: made.now))
        return made
    return make


def test_the_packages_of_a_cpu_are_counted_once_each(machine):
    made = machine()
    meter = asnn.EnergyMeter("cpu", made.folder)
    assert meter.source == "RAPL, 2 packages"
    before = meter.joules()
    made.pass_time(10.0, watts=3.0)
    assert meter.joules() - before == pytest.approx(100.0)


def test_a_counter_of_the_whole_platform_is_not_added_to_its_packages(machine):
    made = machine(zones={"intel-rapl:0": ("package-0", 1.0), "intel-rapl:1": ("psys", 1.5)})
    meter = asnn.EnergyMeter("cpu", made.folder)
    before = meter.joules()
    made.pass_time(10.0)
    assert meter.source == "RAPL, 1 packages" and meter.joules() - before == pytest.approx(70.0)


def test_a_counter_may_begin_again(machine):
    made = machine(limit=110 * 10**6)  # between 63.75 and 165 J of the first package
    meter = asnn.EnergyMeter("cpu", made.folder)
    assert meter.per_call(lambda: made.pass_time(0.5, watts=20.0), seconds=5.0) == pytest.approx(10.0, rel=1e-6)


@pytest.mark.parametrize("watts", [20.0, 0.0])
@pytest.mark.parametrize("seconds, calls", [(5.0, 10), (1.2, 3)])
def test_a_call_costs_what_it_takes_over_idling(machine, watts, seconds, calls):
    made, called = machine(), []
    meter = asnn.EnergyMeter(torch.device("cpu"), made.folder)
    got = meter.per_call(lambda: called.append(made.pass_time(0.5, watts)), seconds)
    assert got == pytest.approx(0.5 * watts, abs=1e-5) and len(called) == calls
    assert made.now == pytest.approx(100.0 + seconds + 0.5 * calls)


NO_COUNTER = "^energy counter is None; allowed: NVML or RAPL, readable.$"


@pytest.mark.parametrize("spoil", ["absent", "empty", "unreadable", "text"])
def test_a_machine_without_a_counter_has_no_source(machine, monkeypatch, spoil):
    made = machine()
    if spoil == "absent":
        made.folder = made.folder / "nowhere"
    elif spoil == "empty":
        for file in made.folder.glob("*/energy_uj"):
            file.unlink()
    elif spoil == "unreadable":  # root, who may run the tests, may read any file

        def refuse(self, *args, read=asnn.Path.read_text, **options):
            if self.name == "energy_uj":
                raise PermissionError(13, "Permission denied", str(self))
            return read(self, *args, **options)
        monkeypatch.setattr(asnn.Path, "read_text", refuse)
    else:
        (made.folder / "intel-rapl:1" / "energy_uj").write_text("n/a")
    meter = asnn.EnergyMeter("cpu", made.folder)
    assert meter.source is None
    for ask in (meter.joules, lambda: meter.per_call(no_call)):
        with pytest.raises(ValueError, match=NO_COUNTER):
            ask()


def no_call():
    raise AssertionError("called without a counter")


def nvml(joules, **options):
    """A stand-in for pynvml; millijoules of each GPU."""
    values = {"nvmlInit": lambda: None, "nvmlDeviceGetCount": lambda: len(joules),
              "nvmlDeviceGetHandleByIndex": lambda i: i,
              "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 1000 * joules[handle]}
    return SimpleNamespace(**{**values, **options})


def refuse_nvml(*_args):
    raise RuntimeError("Not Supported")


def test_joules_of_gpus_are_those_of_nvml(monkeypatch):
    joules = [5.0, 11.0]
    monkeypatch.setitem(sys.modules, "pynvml", nvml(joules))
    meter = asnn.EnergyMeter("cuda")
    before = meter.joules()
    joules[:] = [8.0, 12.5]
    assert meter.source == "NVML, 2 GPU" and meter.joules() - before == 4.5


@pytest.mark.parametrize("library", [
    None, nvml([5.0], nvmlInit=refuse_nvml), nvml([5.0], nvmlDeviceGetCount=refuse_nvml),
    nvml([5.0], nvmlDeviceGetTotalEnergyConsumption=refuse_nvml),
    nvml([])])
def test_a_gpu_without_a_counter_has_no_source(monkeypatch, library):
    """None: not installed. GPUs before Volta, such as Kaggle's P100, have NVML and no counter of energy."""
    monkeypatch.setitem(sys.modules, "pynvml", library)
    meter = asnn.EnergyMeter(torch.device("cuda"))
    assert meter.source is None
    with pytest.raises(ValueError, match=NO_COUNTER):
        meter.joules()


# ---- operations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [asnn.SITES, ("k", "v")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", asnn.STATES)
def test_macs_are_those_that_a_decoding_step_multiplies(ids, kind, layers, bias, sites):
    student = goose(state_kind=kind, n_layer=layers, projection_bias=bias, spike_sites=sites, ffn_width=3 * D)
    decoder = asnn.Decoder(student, ids)
    with FlopCounterMode(display=False) as counter:
        decoder()
    rows = asnn.operations(student)
    assert 2 * len(ids) * sum(row["MACs"] for row in rows) == counter.get_total_flops()
    assert [row["product"] for row in rows].count("state") == layers


@pytest.mark.parametrize("kind", asnn.STATES)
def test_macs_are_those_of_the_linear_of_each_product(kind):
    student, found = goose(state_kind=kind, ffn_width=3 * D), set()
    for row in asnn.operations(student):
        name = ("lm_head" if row["product"] == "head"
                else f"goose.blocks.{row['layer']}.{PRODUCTS[row['product']]}" if row["product"] in PRODUCTS else None)
        if name:
            linear = student.get_submodule(name)
            assert row["MACs"] == linear.in_features * linear.out_features and name not in found
            found.add(name)
    assert found == {name for name, m in student.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("kind, products", [("vector", {"state"}), ("matrix", {"r S", "state"}),
                                            ("delta", {"k S", "r S", "state"})])
def test_the_state_is_read_and_updated_entry_by_entry(ids, kind, products):
    student = goose(state_kind=kind)
    entries = student(ids, use_cache=True).state.layers[0].S[0].numel()
    for layer in range(2):
        rows = by_product(asnn.operations(student, {f"{layer}.k": 0.25}), layer)
        assert set(rows) - set(PRODUCTS) - {"head"} == products
        assert rows["state"]["state updates"] == entries and rows["state"]["MACs"] == 0
        assert rows["state"]["adds"] == entries / 4  # only rows whose key fired are written
        assert all(rows[name]["MACs"] == entries for name in products - {"state"})
        assert not any(row["state updates"] for name, row in rows.items() if name != "state")
        if kind == "delta":
            assert (rows["k S"]["adds"], rows["k S"]["skipped"]) == (entries / 4, 3 * entries / 4)
        if kind != "vector":
            assert rows["r S"]["adds"] == rows["r S"]["skipped"] == 0  # the receptance is no spike


@pytest.mark.parametrize("kind", asnn.STATES)
def test_a_measured_density_splits_the_macs_into_adds_and_skips(ids, kind):
    student = goose(state_kind=kind)
    density = {name: 0.1 + 0.8 * i / 30 for i, name in enumerate(asnn.spike_density(student, ids))}
    assert len(set(density.values())) == len(density)
    used, rows = set(), asnn.operations(student, density)
    for row in rows:
        name = "head_in" if row["product"] == "head" else f"{row['layer']}.{row['site']}"
        if row["site"] == "-":
            assert row["product"] == "r S" and row["density"] == 1.0
            continue
        used.add(name)
        assert row["density"] == density[name]
        if row["product"] != "state":
            assert row["adds"] + row["skipped"] == row["MACs"] and abs(row["adds"] - density[name] * row["MACs"]) <= 0.5
    assert used == set(density) - {f"{layer}.v" for layer in range(2)}  # nothing is multiplied by v alone
    assert [{**row, "density": 0, "adds": 0, "skipped": 0} for row in rows] == [
        {**row, "density": 0, "adds": 0, "skipped": 0} for row in asnn.operations(student)]
    assert asnn.operations(asnn.sparsify(student, "gather"), density) == rows


@pytest.mark.parametrize("density", [{"mix_in": 0.3}, {"0.mix_in": 0.3}, {"0.mix_in.k": 0.3, "2.ffn_in": 0.5}])
def test_a_density_of_no_product_is_refused(density):
    with pytest.raises(ValueError, match=list(density)[-1]):
        asnn.operations(goose(), density)


@pytest.mark.parametrize("site", FED)
def test_only_what_spikes_feed_is_added_or_skipped(site):
    student = goose(spike_sites=("k", "v", site))
    density = {name: 0.5 for name in asnn.spike_modules(goose())}  # also of sites that this student has not
    for row in asnn.operations(student, density):
        if row["product"] == "state":
            continue
        if row["product"] in FED[site] | {"k S"}:
            assert row["adds"] == row["skipped"] == row["MACs"] / 2
        else:
            assert (row["adds"], row["skipped"], row["density"]) == (0, 0, 1.0), row


@pytest.mark.parametrize("kind", asnn.STATES)
def test_a_dense_twin_adds_and_skips_nothing(kind):
    density = {name: 0.5 for name in asnn.spike_modules(goose(state_kind=kind))}
    rows = asnn.operations(goose(state_kind=kind, spike_kind="dense"), density)
    for row in rows:
        assert (row["adds"], row["skipped"], row["density"]) == (0, 0, 1.0) or row["product"] == "state"
    assert [row["MACs"] for row in rows] == [row["MACs"] for row in asnn.operations(goose(state_kind=kind))]


def test_what_a_dense_twin_writes_to_its_state_is_no_addition():
    """Its keys are no spikes: k v^T takes a multiplication for each entry, whatever a student's keys do."""
    rows = asnn.operations(goose(spike_kind="dense"), {"0.k": 0.5, "1.k": 0.5})
    assert all(row["adds"] == 0 for row in rows)
    energy = asnn.energy_estimate([row for row in rows if row["product"] != "head"], 0)
    assert energy["idealised"] == pytest.approx(energy["as built"])


# ---- energy estimates ----------------------------------------------------------------------------


def test_an_estimate_is_its_table_times_the_operations(monkeypatch):
    monkeypatch.setattr(asnn, "ENERGY", {"MAC": 10.0, "add": 1.0, "DRAM byte": 100.0})
    names = ("layer", "product", "site", "MACs", "density", "adds", "skipped", "state updates")
    rows = [dict(zip(names, values)) for values in ((0, "W_k", "mix_in.k", 100, 0.3, 30, 70, 0),
                                                    (0, "W_o", "mix_out", 20, 1.0, 0, 0, 0),
                                                    (0, "r S", "-", 5, 1.0, 0, 0, 0),
                                                    (0, "state", "k", 0, 0.5, 4, 0, 8),
                                                    ("-", "head", "head_in", 50, 1.0, 0, 0, 0))]
    assert asnn.energy_estimate(rows, 7) == {
        "as built": 10.0 * (30 + 20 + 5 + 4 + 8 + 50), "idealised": 30 + 10.0 * (20 + 5) + 4 + 10.0 * 8,
        "idealised, with DRAM and head": 30 + 10.0 * (20 + 5) + 4 + 10.0 * 8 + 10.0 * 50 + 700.0}
    rows[-1] |= {"density": 0.2, "adds": 10, "skipped": 40}  # a head fed by spikes
    fed = asnn.energy_estimate(rows, 0)
    assert fed["idealised, with DRAM and head"] == fed["idealised"] + 10 and fed["as built"] == 10.0 * (30 + 37 + 10)


def test_the_table_of_energy_is_the_published_one():
    """45 nm, fp32: 3.7 pJ for a multiplication, 0.9 for an addition, 640 for four bytes of DRAM."""
    assert asnn.ENERGY == pytest.approx({"MAC": 3.7e-12 + 0.9e-12, "add": 0.9e-12, "DRAM byte": 160e-12}, rel=1e-9)


@pytest.mark.parametrize("kind", asnn.STATES)
def test_estimates_are_in_order(ids, kind):
    student = goose(state_kind=kind)
    measured, full = asnn.operations(student, asnn.spike_density(student, ids)), asnn.operations(student)
    for rows in (measured, full):
        energy, more, column = *(asnn.energy_estimate(rows, n) for n in (1000, 3000)), "idealised, with DRAM and head"
        assert 0 < energy["idealised"] < energy["as built"] and energy["idealised"] < energy[column]
        assert [more[name] == energy[name] for name in energy] == [True, True, False]
        assert more[column] - energy[column] == pytest.approx(2000 * asnn.ENERGY["DRAM byte"])
    sparse, dense = (asnn.energy_estimate(rows, 1000) for rows in (measured, full))
    assert all(sparse[name] < dense[name] for name in sparse)
    # Where everything fires, what is built costs every multiply-accumulate, two for each entry of the state.
    macs = sum(row["MACs"] + 2 * row["state updates"] for row in full)
    assert dense["as built"] == pytest.approx(macs * asnn.ENERGY["MAC"])


# ---- timing --------------------------------------------------------------------------------------


def test_quantiles_of_a_timing_are_those_of_its_measurements(monkeypatch):
    seconds = {"a": [float(i) for i in range(1, 22)], "b": [2.0] * 20 + [50.0]}

    class Timer:
        def __init__(self, _statement, globals, num_threads):  # noqa: A002
            self.values, self.first = iter(seconds[globals["call"]()]), True
            assert num_threads == torch.get_num_threads()

        def timeit(self, _number):
            value = 1.0 if self.first else next(self.values)  # the first tells how many calls a measurement takes
            self.first = False
            return SimpleNamespace(median=value)
    monkeypatch.setattr("torch.utils.benchmark.Timer", Timer)
    timing = asnn.time_interleaved({name: lambda name=name: name for name in seconds}, runs=21)
    assert timing["a"] == asnn.Timing(median=11.0, low=6.0, high=16.0, runs=21, p95=20.0)
    assert timing["b"] == asnn.Timing(median=2.0, low=2.0, high=2.0, runs=21, p95=2.0)


# ---- tables of measurements ----------------------------------------------------------------------


def test_a_timing_is_said_with_its_quartiles():
    timing = asnn.Timing(median=0.0012346, low=0.001, high=1.5, runs=3, p95=2.0)
    assert timing.text() == "1.23 (1.00 to 1500.00)"
    assert timing.text(1e6, ",.0f") == "1,235 (1,000 to 1,500,000)"
    assert asnn.Timing(**dataclasses.asdict(timing)).text(1.0, ".1f") == "0.0 (0.0 to 1.5)"


HARDWARE = {"cpu": "a CPU", "cores": 2, "threads": 1, "gpus": [], "platform": "local", "versions": {"torch": "2.13"},
            "energy counter": None}


def measured(system="student", batch=1, context=128, median=2e-3, **changes):
    return {"system": system, "batch": batch, "context": context,
            "decode": {"median": median, "low": 1e-3, "high": 3e-3, "runs": 5, "p95": 4e-3}, "tokens/s": batch / median,
            "prefill": {"median": 0.05, "low": 0.04, "high": 0.06, "runs": 3, "p95": 0.06},
            "memory": {"weights": 3 * 2**20, "cache": 2**19, "activations": 2**30}, "joules per token": None, **changes}


def ended(system="GPT-2", context=2048):
    return {"system": system, "batch": 1, "context": context, "status": "ends at 1024 positions"}


@pytest.mark.parametrize("ask", ["merge", "agreement", "same_hardware"])
@pytest.mark.parametrize("field, value, text", [
    ("cpu", "another CPU", "cpu of the other measurements is 'another CPU'; allowed: the same hardware, a CPU."),
    ("cores", 64, "cores of the other measurements is 64; allowed: the same hardware, 2."),
    ("threads", 8, "threads of the other measurements is 8; allowed: the same hardware, 1."),
    ("gpus", ["T4, 15 GiB"], "gpus of the other measurements is ['T4, 15 GiB']; allowed: the same hardware, [].")])
def test_measurements_on_other_hardware_are_refused(ask, field, value, text):
    here, there = asnn.Bench([measured()], HARDWARE), asnn.Bench([measured()], {**HARDWARE, field: value})
    with pytest.raises(ValueError) as refusal:
        getattr(here, ask)(there)
    assert str(refusal.value) == text
    getattr(there, ask)(asnn.Bench([measured()], {**HARDWARE, field: value}))


def test_each_field_of_the_hardware_is_tested_and_known():
    assert set(asnn.HARDWARE) == {"cpu", "cores", "threads", "gpus"} <= set(asnn.environment())


def test_measurements_with_other_libraries_may_be_compared():
    here, there = asnn.Bench([measured()], HARDWARE), asnn.Bench([], {**HARDWARE, "versions": {}, "platform": "colab"})
    assert here.agreement(there) == {} and here.merge(there).rows == here.rows


def test_merging_takes_the_later_of_equal_rows():
    first = asnn.Bench([measured(), measured(batch=4), measured(context=256), ended()], HARDWARE)
    new = [measured(context=256, median=9.0), measured("GPT-2", context=256), ended(context=4096)]
    merged = first.merge(asnn.Bench(new, {**HARDWARE, "platform": "colab"}))
    assert merged.rows == [first.rows[0], first.rows[1], new[0], ended(), *new[1:]] and merged.environment == HARDWARE
    assert len(first.rows) == 4 and len(new) == 3


def test_agreement_is_the_ratio_of_medians_of_what_both_measured():
    first = asnn.Bench([measured(), measured(batch=4), measured("GPT-2"), ended()], HARDWARE)
    second = asnn.Bench([ended(), measured("GPT-2", median=1e-3), measured(median=3e-3), measured(batch=16)], HARDWARE)
    assert first.agreement(second) == pytest.approx({("student", 1, 128): 1.5, ("GPT-2", 1, 128): 0.5})
    assert second.agreement(first) == pytest.approx({("student", 1, 128): 1 / 1.5, ("GPT-2", 1, 128): 2.0})
    ended_there = asnn.Bench([ended("student", 128)], HARDWARE)
    assert first.agreement(ended_there) == ended_there.agreement(first) == {}


def test_a_bench_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    path, first = tmp_path / "v17" / "bench.json", asnn.Bench([measured(), ended()], HARDWARE)
    first.save(path)
    assert asnn.Bench.load(path) == first and set(json.loads(path.read_text())) == {"rows", "environment"}
    assert [file.name for file in path.parent.iterdir()] == ["bench.json"]

    def full(*_args):
        raise OSError("no space left")
    monkeypatch.setattr(asnn.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        asnn.Bench([], HARDWARE).save(path)
    assert asnn.Bench.load(path) == first
    with pytest.raises(FileNotFoundError):
        asnn.Bench.load(tmp_path / "other.json")


ROWS = [measured("stu_dent, 100 % | int8", batch=4, median=2e-3), ended(),
        measured("GPT-2", prefill=None, context=1000), measured("a & b #1", **{"joules per token": 0.01234})]


def test_a_table_has_every_value_with_its_unit():
    first, second, third, fourth = asnn.Bench(ROWS, HARDWARE).table()
    assert first == {"system": "stu_dent, 100 % | int8", "batch": "4", "context": "128",
                     "ms per step (quartiles)": "2.00 (1.00 to 3.00)", "p95": "4.00", "tokens/s": "2,000.0",
                     "time to first token, ms": "50.00 (40.00 to 60.00)", "prefill tokens/s": "10,240",
                     "weights, MiB": "3.0", "state or cache, MiB": "0.5", "activations, MiB": "1,024.0",
                     "J per token (measured)": "-"}
    assert second == {**dict.fromkeys(first, "-"), "system": "GPT-2", "batch": "1", "context": "2,048",
                      "ms per step (quartiles)": "ends at 1024 positions"}
    assert (third["context"], third["time to first token, ms"], third["prefill tokens/s"]) == ("1,000", "-", "-")
    assert fourth["J per token (measured)"] == "0.0123"


@pytest.mark.parametrize("rows", [ROWS, ROWS[::-1], [ROWS[1], ROWS[0]], [ROWS[1]], [ROWS[0]]])
def test_each_line_of_a_markdown_table_has_as_many_cells(rows):
    text = asnn.Bench(rows, HARDWARE).markdown()
    lines = text.splitlines()
    assert len(lines) == 2 + len(rows) and text.endswith("|\n")
    assert {line.count("|") for line in lines} == {1 + (4 if rows == [ROWS[1]] else 12)}
    assert set(lines[1]) == set("|- ") and lines[0].startswith("| system | batch | context |")
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {row['system'].replace('|', '/')}" for row in rows]


def test_a_latex_table_is_one_of_booktabs_and_escapes_its_text():
    text = asnn.Bench(ROWS, HARDWARE).latex()
    assert all(f"\\{rule}rule" in text for rule in ("top", "mid", "bottom"))
    assert r"stu\_dent, 100 \% | int8 & 4 & 128 & 2.00 (1.00 to 3.00)" in text and r"a \& b \#1 & 1" in text
    body = text.split("\\toprule")[1].split("\\bottomrule")[0].split("\n")
    body = [line for line in body if "&" in line]
    assert len(body) == 1 + len(ROWS) and {line.replace(r"\&", "").count("&") for line in body} == {11}


# ---- measuring -----------------------------------------------------------------------------------


class Spy(asnn.Decoder):
    """A Decoder that notes what it is given and when it is called."""

    def __init__(self, model, input_ids):
        self.seen.append((model, input_ids))
        self.case = id(model), input_ids.shape[1]
        super().__init__(model, input_ids)

    def __call__(self):
        self.called.append(self.case)
        self.training.append(self.model.training)
        return super().__call__()

    def prefill(self, input_ids):
        self.filled.append((self.model, input_ids))
        return super().prefill(input_ids)


@pytest.fixture
def spy(monkeypatch):
    for name in ("seen", "called", "training", "filled"):
        monkeypatch.setattr(Spy, name, [], raising=False)
    monkeypatch.setattr(asnn, "Decoder", Spy)
    return Spy


@pytest.fixture
def quick(monkeypatch):
    """quick(model, tokenizer, **options): a small bench that counts no energy, wherever it runs."""
    monkeypatch.setattr(asnn, "EnergyMeter", lambda _device: SimpleNamespace(source=None))

    def run(model, tokenizer=None, **options):
        return asnn.bench(model, tokenizer, **{"contexts": (4,), "repeats": 2, "progress": False, **options})
    return run


KEYS = {"system", "batch", "context", "decode", "tokens/s", "prefill", "memory", "joules per token"}


@pytest.fixture(scope="module")
def systems():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asnn, "load_kernel", lambda: "not in this test")
        student = goose()
        return {"GPT-2": gpt2(), "GPT-2, 10 positions": gpt2(n_positions=10), "GPT-2, int8": asnn.quantize_int8(gpt2()),
                "student": student, "student, sparse": asnn.sparsify(student, "gather"), "RWKV": rwkv()}


def test_a_bench_has_a_row_for_each_system_and_case(quick, systems):
    contexts = (4, 9, 10, 30)
    table = quick(systems, contexts=contexts, prefill_up_to=9)
    assert [(row["context"], row["system"]) for row in table.rows] == list(itertools.product(contexts, systems))
    assert list(table.rows[0])[:3] == ["system", "batch", "context"]
    ends = {"GPT-2": 24, "GPT-2, 10 positions": 10, "GPT-2, int8": 24}
    for row in table.rows:
        assert row["batch"] == 1
        if row["context"] >= ends.get(row["system"], math.inf):
            assert row["status"] == f"ends at {ends[row['system']]} positions" and set(row) == {
                "system", "batch", "context", "status"}
            continue
        decode = row["decode"]
        assert set(row) == KEYS
        assert 0 < decode["low"] <= decode["median"] <= decode["high"] <= decode["p95"] and decode["runs"] == 2
        assert row["tokens/s"] == 1 / decode["median"] and row["joules per token"] is None
        assert (row["prefill"] is not None) == (row["context"] <= 9)
        assert row["memory"]["weights"] == asnn.tensor_bytes(systems[row["system"]])
        assert row["memory"]["activations"] > 0
    cache = {(row["system"], row["context"]): row["memory"]["cache"] for row in table.rows if "memory" in row}
    assert len({cache["student", context] for context in contexts}) == len({cache["RWKV", c] for c in contexts}) == 1
    token = 2 * 2 * D * 4
    assert all(context * token <= cache["GPT-2", context] <= (context + 1) * token for context in contexts[:3])
    assert table.environment == {**asnn.environment(), "energy counter": None}
    assert len(table.markdown().splitlines()) == 2 + 24


def test_a_system_that_mixes_up_a_batch_has_a_row_that_says_so(quick):
    rows = quick({"RWKV": rwkv(), "GPT-2": gpt2()}, batches=(1, 2)).rows
    assert ["decode" in row for row in rows] == [True, True, False, True]
    assert rows[2]["system"] == "RWKV" and "Rwkv" in rows[2]["status"]


@pytest.mark.parametrize("limit, filled", [(0, []), (8, [(1, 4), (2, 4)]), (100, [(1, 4), (1, 12), (2, 4), (2, 12)])])
def test_prefill_is_timed_up_to_so_many_tokens(quick, spy, limit, filled):
    table = quick({"student": goose(), "GPT-2": gpt2()}, contexts=(4, 12), batches=(1, 2), prefill_up_to=limit)
    assert [(row["batch"], row["context"]) for row in table.rows if row["prefill"] is not None] == [
        case for case in filled for _ in range(2)]
    shapes = Counter(tuple(ids.shape) for _, ids in spy.filled)
    assert {shape for shape, count in shapes.items() if count > 2} == set(filled)  # each Decoder begins with one
    assert all(row["tokens/s"] == row["batch"] / row["decode"]["median"] for row in table.rows)


def test_systems_are_timed_in_turns_and_without_dropout(quick, spy, monkeypatch):
    monkeypatch.setattr(asnn, "peak_allocation", lambda *_args: 0)
    models = {"a": gpt2().train(), "b": goose().train(), "c": rwkv().train()}
    quick(models, repeats=4, contexts=(4, 6))
    cases = [(id(model), ids.shape[1]) for model, ids in spy.seen]
    turns = [case for case, _ in itertools.groupby(spy.called)]
    rounds = len(turns) // len(cases)
    assert turns == cases * rounds and rounds > 4 and len(set(cases)) == 6  # four are timed, others warm up
    assert not any(m.training for m in models.values()) and not any(spy.training)


def test_all_systems_see_the_same_token_ids_that_all_of_them_know(quick, spy):
    quick({"a": goose(vocab_size=20), "b": gpt2(), "c": gpt2(vocab_size=30)}, contexts=(24, 5), batches=(2, 1),
          prefill_up_to=0)
    assert len(spy.seen) == 2 * 2 * 3 - 4  # two GPT-2s end before the 25th position
    whole = spy.seen[0][1][0]
    assert whole.shape == (24,) and whole.max() < 20 and whole.unique().numel() > 5
    for _, ids in spy.seen:
        assert torch.equal(ids, whole[:ids.shape[1]].repeat(len(ids), 1))


def test_a_tokenizer_makes_the_token_ids_of_the_prompt(quick, spy):
    asked = []

    def tokenizer(text):
        asked.append(text)
        return {"input_ids": [3, 1, 4, 1, 5]}
    quick(gpt2(), tokenizer, contexts=(3, 12), prompt="a prompt")
    quick(gpt2(), tokenizer, contexts=(5,))
    assert asked[0] == "a prompt" and len(asked) == 2 and len(asked[1]) > 10
    assert [ids.tolist() for _, ids in spy.seen] == [[[3, 1, 4]], [[3, 1, 4, 1, 5] * 2 + [3, 1]], [[3, 1, 4, 1, 5]]]


def test_a_teacher_and_its_tokenizer_are_measured(quick, teacher, spy):
    table = quick(teacher.model, teacher.tokenizer, prompt="the state of a spike", contexts=(6,))
    assert [row["system"] for row in table.rows] == ["GPT2LMHeadModel"]
    expected = teacher.tokenizer("the state of a spike")["input_ids"]
    assert spy.seen[0][1][0].tolist() == (6 * expected)[:6]


def test_joules_are_those_of_a_token_where_there_is_a_counter(quick, monkeypatch):
    asked = []

    class Meter:
        source = "RAPL, 1 packages"

        def __init__(self, device):
            assert str(device) == "cpu"

        def per_call(self, call, seconds):
            asked.append((tuple(call().shape), seconds))
            return 6.0
    monkeypatch.setattr(asnn, "EnergyMeter", Meter)
    table = quick(goose(), batches=(1, 3), energy_seconds=0.7)
    assert [row["joules per token"] for row in table.rows] == [6.0, 2.0]
    assert asked == [((1, 1, V), 0.7), ((3, 1, V), 0.7)] and table.environment["energy counter"] == Meter.source
    assert table.table()[1]["J per token (measured)"] == "2"


def test_a_bench_may_be_silent(quick, capsys):
    quick(goose())
    assert capsys.readouterr() == ("", "")
    quick(goose(), progress=True)
    assert "batch 1" in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    ({"contexts": ()}, r"^contexts is \(\); allowed: whole numbers from 1\.$"),
    ({"contexts": (0,)}, r"^contexts is \(0,\); allowed"), ({"contexts": ("8",)}, r"^contexts is \('8',\); allowed"),
    ({"contexts": (8, 1.5)}, r"^contexts is \(8, 1.5\); allowed"), ({"batches": ()}, r"^batches is \(\); allowed"),
    ({"batches": (1, -2)}, r"^batches is \(1, -2\); allowed"), ({"repeats": 0}, r"^repeats is \(?0,?\)?; allowed"),
    ({"repeats": 2.5}, r"^repeats is \(?2.5,?\)?; allowed")])
def test_wrong_options_of_a_bench_are_refused_before_anything_is_measured(quick, monkeypatch, options, message):
    monkeypatch.setattr(asnn, "Decoder", no_call)
    with pytest.raises(ValueError, match=message):
        quick(gpt2(), **options)
