"""Efficiency: what a token costs in operations, energy, memory and time; the functions of v17."""
import ast
import copy
import itertools
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, RwkvConfig, RwkvForCausalLM

import asnn_common as asnn
from conftest import ROOT, definitions, shake

V, D, N = 50, 32, 8
v17 = definitions("asnn_v17_bench")


def goose(**options):
    """A student whose parameters are all away from their start values."""
    torch.manual_seed(0)
    return shake(asnn.GooseForCausalLM(asnn.GooseConfig(**{
        "vocab_size": V, "d_model": D, "n_layer": 2, "n_positions": 24, "pad_token_id": 0,
        "head_dim": N, "state_kind": "delta", "spike_sites": asnn.SITES, **options})).eval())


@torch.no_grad()
def gpt2(**options):
    """A GPT-2 whose blocks change its logits by more than their size, biases included."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{
        "vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 24,
        "bos_token_id": None, "eos_token_id": None, **options})).eval()
    for p in model.parameters():
        p.normal_(std=0.15) if p.dim() == 2 else p.add_(0.2 * torch.rand_like(p))
    return model


def rwkv():
    torch.manual_seed(0)
    return RwkvForCausalLM(RwkvConfig(vocab_size=V, hidden_size=D, num_hidden_layers=2,
        context_length=24, bos_token_id=None, eos_token_id=None)).eval()


@pytest.fixture
def ids():
    return torch.randint(1, V, (3, 12))


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


# ---- a random student, int8 ----------------------------------------------------------------------


def recipe(**options):
    return asnn.get_recipe("v14.4-sites", "tiny").replace(**{"spike_sites": asnn.SITES, **options})


@pytest.mark.parametrize("options", [{}, {"encoder_kind": "integer:3"}, {"state_kind": "vector"},
                                     {"rotated_sites": ("mix_in", "ffn_hidden"), "spike_steps": 2}])
@pytest.mark.parametrize("asked", [{"mix_in": 0.3, "mix_out": 0.2, "ffn_hidden": 0.1},
                                   {"mix_in": 0.9, "mix_out": 0.0, "ffn_in": 1.0, "head_in": 0.9}])
def test_a_random_student_fires_as_often_as_asked_for(options, asked):
    student = asnn.random_student(recipe(**options), 300, asked, seed=3)
    rates = asnn.firing_rates(student, torch.randint(0, 300, (4, 32)))
    assert len(rates) == 2 * (9 if student.config.state_kind == "delta" else 8) + 1
    for name, rate in rates.items():
        site = name.split(".")["." in name]
        if site in asked:
            assert rate == pytest.approx(asked[site], abs=0.05), name
        else:
            assert 0.2 < rate < 0.8, name  # what is calibrated only
    assert not any(module._forward_pre_hooks for module in student.modules())


def test_a_random_student_depends_on_its_seed_alone():
    first, again, other = (asnn.random_student(recipe(), 300, {"mix_in": 0.3}, seed).content_hash()
                           for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("asked, message", [
    ({"mix_inn": 0.3}, "^rate of mix_inn is 0.3; allowed: a share from 0 to 1 at mix_in, mix_out"),
    ({"k": 0.3}, "^rate of k is 0.3"), ({"0.mix_in.k": 0.3}, "^rate of 0.mix_in.k is 0.3"),
    ({"mix_in": 1.3}, "^rate of mix_in is 1.3; allowed: a share from 0 to 1")])
def test_a_rate_that_no_encoder_takes_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        asnn.random_student(recipe(), 300, asked)


def dense_goose():
    """Without spikes, which flip where int8 moves a value over a threshold."""
    model = goose(spike_kind="dense", projection_bias=True)
    for name, p in model.named_parameters():
        if p.dim() == 2 and "blocks" in name:
            p.data.mul_(0.3)
    return model


@pytest.mark.parametrize("make", [gpt2, dense_goose])
@pytest.mark.parametrize("embeddings", [False, True])
@torch.no_grad()
def test_an_int8_model_has_nearly_the_logits_of_the_dense_one(ids, make, embeddings):
    model = make()
    kept, expected = copy.deepcopy(model.state_dict()), model(ids).logits
    small = asnn.quantize_int8(model, embeddings)
    assert 0 < error(small(ids).logits, expected) < 0.05 and not small.training
    assert torch.equal(small(ids[:, ::2]).logits, small(ids[:, ::2].contiguous()).logits)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    kinds = {type(module).__name__ for module in small.modules()}
    assert "Conv1D" not in kinds and not any(type(m) is nn.Linear for m in small.modules())
    assert any(type(m) is nn.Embedding for m in small.modules()) != embeddings
    sizes = [m.weight.numel() for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    rows = sum(m.num_embeddings for m in model.modules() if type(m) is nn.Embedding) * embeddings
    # A fourth of the Linears and tables, scales and offsets; the head is no longer tied.
    least = asnn._tensor_bytes(model) - 3 * sum(sizes) + 4 * V * D - 3 * rows * D
    assert least <= asnn._tensor_bytes(small) <= least + 16 * (len(sizes) + rows)
    text = small.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(text[:, :12], ids)


def test_only_students_have_compiled_steps():
    with pytest.raises(ValueError, match="compiled is True; allowed: False for a GPT2LMHeadModel."):
        asnn.quantize_int8(gpt2(), compiled=True)
    assert asnn.quantize_int8(goose(), compiled=True).goose.blocks[0].compiled


# ---- bytes and decoding --------------------------------------------------------------------------


def test_bytes_of_nested_tensors_are_counted_once():
    x, y, size = torch.zeros(10, 10), torch.zeros(7, dtype=torch.int8), asnn._tensor_bytes
    assert size() == size(None, "text", 3, [], {}) == 0
    assert size(x) == size(x, x.t(), x[3:, :2]) == size(x[:2]) == 400  # what a view keeps alive
    assert size([x, {"a": (y, None), "b": [x[0]]}], y) == 407 and size(x.clone(), x) == 800
    several = [asnn.quantize_int8(nn.Sequential(nn.Embedding(50, 64)), True) for _ in range(5)]
    assert size(several) == 5 * size(several[0]) and 3200 <= size(several[0]) <= 3600


MODELS = {"delta": goose, "vector": lambda: goose(state_kind="vector"),
          "sparse": lambda: asnn.sparsify(goose(), "gather", "spikes"),
          "GPT-2, sdpa": lambda: gpt2(attn_implementation="sdpa"),
          "GPT-2, eager": lambda: gpt2(attn_implementation="eager"), "RWKV": rwkv}


@pytest.mark.parametrize("name, batch", [*itertools.product(MODELS, (1, 3))][:-1])  # it mixes three
def test_a_decoder_gives_the_logits_of_the_next_token_each_time(ids, name, batch):
    model, ids, heads = MODELS[name](), ids[:batch], []
    decoder = asnn.Decoder(model, ids)
    with torch.no_grad():
        expected = model(torch.cat((ids, ids[:, -1:]), 1)).logits[:, -1:]
        assert error(model(ids).logits[:, -1:], expected) > 0.01  # one that forgets would show
    kind = "past_key_values" if "GPT" in name else "state"
    for _ in range(1 if name == "RWKV" else 3):  # its state moves on
        got = decoder()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert not got.requires_grad and list(decoder.cache) == [kind]
    if name == "RWKV":
        return
    # Keys and values, of one token more than are used; else the state, the shift and the position.
    layer = {"past_key_values": 2 * 13 * D, "state": 2 * D if name == "vector" else D * N + D}[kind]
    assert decoder.memory()["cache"] == batch * (2 * 4 * layer + 8 * (kind == "state"))
    model.lm_head.register_forward_hook(lambda _m, args, _out: heads.append(args[0].shape[1]))
    before = decoder.cache[kind]
    decoder.prefill(ids[:, :5])
    assert heads == [1] and decoder.cache[kind] is before  # a timed prefill leaves the context


def test_a_model_without_a_cache_is_refused(ids):
    class Forgetful(nn.Module):
        def forward(self, input_ids, use_cache=None):
            return {"logits": input_ids}
    with pytest.raises(ValueError, match="^model is 'Forgetful'; allowed: one that returns a"):
        asnn.Decoder(Forgetful(), ids)


def test_what_a_token_reads_leaves_out_the_tables(ids):
    student = goose(spike_sites=("k", "v"))
    memory = asnn.Decoder(student, ids).memory()
    assert memory["weights"] == 4 * student.num_parameters()
    assert memory["weights"] - memory["read"] == 4 * 24 * D  # positions; the table is the head
    read = asnn.Decoder(asnn.quantize_int8(student, True), ids).memory()["read"]
    assert 0.25 * memory["read"] < read < 0.4 * memory["read"]


def test_timings_are_taken_in_turns_and_tell_slow_from_quick():
    called = []
    calls = {name: lambda name=name, s=s: called.append(name) or time.sleep(s)
             for name, s in (("slow", 6e-3), ("quick", 1e-3))}
    timing = asnn.time_interleaved(calls, runs=5, min_seconds=1e-3)
    assert timing["slow"].median > timing["quick"].median > 9e-4
    assert all(0 < t.low <= t.median <= t.high <= t.p95 and t.runs == 5 for t in timing.values())
    assert [name for name, _ in itertools.groupby(called)] == ["slow", "quick"] * 6
    short = asnn.time_interleaved({"short": lambda: called.append(0)}, 3, 2e-3)["short"]
    assert called.count(0) > 300 and short.median < 2e-4  # in blocks
    assert short._replace(median=2e-3, low=1e-3, high=0.5).text() == "2.00 (1.00 to 500.00)"


# ---- operations and energy -----------------------------------------------------------------------


@pytest.mark.parametrize("kind, more", [
    ("vector", {}), ("matrix", {}), ("delta", {}),
    ("delta", {"decay": "token", "decay_rank": 5, "spike_steps": 2})])
@pytest.mark.parametrize("sites", [asnn.SITES, ("k", "v")])
def test_macs_are_those_that_a_decoding_step_multiplies(ids, kind, more, sites):
    student = goose(state_kind=kind, spike_sites=sites, n_layer=3, ffn_width=3 * D, **more)
    rates = asnn.firing_rates(student, ids)
    rows, decoder = asnn.operations(student, rates), asnn.Decoder(student, ids)
    with FlopCounterMode(display=False) as counter:
        decoder()
    assert 2 * len(ids) * sum(row["MACs"] for row in rows) == counter.get_total_flops()
    assert v17.counted_macs(student) == sum(row["MACs"] for row in rows)
    for row in rows:
        key = row["site"] if row["layer"] == "-" else f"{row['layer']}.{row['site']}"
        fed = row["site"].split(".")[0] in sites and row["product"] != "state"
        adds = round(row["MACs"] * rates[key]) if fed else 0
        assert row["skipped"] == (row["MACs"] - adds if fed else 0), row
        assert row["adds"] == adds or row["product"] == "state", row


def test_a_token_reads_the_weights_of_channels_that_fired():
    student = goose(projection_bias=False)
    dense, half = (asnn.operations(student, {"0.ffn_in": share, "1.mix_in.k": share, "0.k": share})
                   for share in (1.0, 0.5))
    linears = [m for m in student.modules() if type(m) is nn.Linear]
    assert v17.weights_read(dense) == sum(m.weight.numel() for m in linears)
    fed = D * 4 * D + D * D + D * D // N  # W_1; W_k and W_b; the state of "0.k" is no weight
    assert v17.weights_read(half) == v17.weights_read(dense) - fed // 2


def test_an_estimate_of_energy_is_the_published_table_times_the_operations():
    assert v17.ENERGY == {"MAC": 4.6e-12, "add": 0.9e-12, "DRAM byte": 160e-12}
    zero = {"MACs": 0, "adds": 0, "skipped": 0, "state updates": 0}
    rows = [{**zero, "product": "W_1", "MACs": 1000, "adds": 300, "skipped": 700},
            {**zero, "product": "W_k", "MACs": 50}, {**zero, "product": "head", "MACs": 500},
            {**zero, "product": "state", "adds": 7, "state updates": 20}]
    found = v17.energy_estimate(rows, bytes_read=11)
    assert found["as built"] == pytest.approx((300 + 50 + 500 + 7 + 20) * 4.6e-12)
    assert found["idealised"] == pytest.approx((300 + 7) * 0.9e-12 + (50 + 20) * 4.6e-12)
    whole = found["idealised"] + 500 * 4.6e-12 + 11 * 160e-12
    assert found["idealised, with DRAM and head"] == pytest.approx(whole)


def test_joules_of_a_call_are_those_over_the_idle_gpus(monkeypatch):
    """Two GPUs of 10 W each, 30 W more while half a second is worked; their counters are in mJ."""
    clock, counter = [0.0], [1000.0]

    def pass_time(seconds, watts=0.0):
        clock[0] += seconds
        counter[0] += seconds * (20 + watts)
    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2,
                           nvmlDeviceGetHandleByIndex=lambda i: i,
                           nvmlDeviceGetTotalEnergyConsumption=lambda _: 1000 * counter[0] / 2)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    fake = SimpleNamespace(sleep=pass_time, perf_counter=lambda: clock[0])
    monkeypatch.setattr(v17, "time", fake)
    got = v17.joules_per_call(lambda: pass_time(0.5, 30.0), seconds=5.0)
    assert got == pytest.approx(15.0, rel=0.02)
    monkeypatch.setattr(nvml, "nvmlInit", lambda: 1 / 0)  # an old GPU, no permission
    assert v17.gpu_joules() is None and v17.joules_per_call(lambda: 1 / 0) is None


# ---- memory and the bench ------------------------------------------------------------------------


X, CPU = torch.ones(1000), torch.device("cpu")


@pytest.mark.parametrize("call, expected", [
    (lambda: None, 0), (lambda: X.add_(X), 0), (lambda: X + X, 4000),
    (lambda: [X + X for _ in range(5)], 20000), (lambda: [(X + X).sum() for _ in range(5)], 4020),
    (lambda: (X + X).double(), 12000)])
def test_the_peak_of_an_allocation_is_known(call, expected):
    assert v17.peak_allocation(call, CPU) == expected


def test_a_cache_that_is_written_anew_is_not_counted_as_activations():
    decoder = asnn.Decoder(gpt2(n_positions=600, n_layer=4), torch.randint(1, V, (1, 500)))
    decoder()
    assert v17.peak_allocation(decoder, CPU) < 0.6 * decoder.memory()["cache"]


@pytest.fixture(scope="module")
def rows():
    """Of a student, two GPT-2s, and RWKV, which mixes the sequences of a batch."""
    systems = {"student": goose(), "GPT-2": gpt2(), "10 positions": gpt2(n_positions=10),
               "RWKV": rwkv()}
    return v17.bench(systems, (4, 10, 30), (1, 2), 2, "a machine"), systems


def test_a_bench_has_a_row_for_each_system_and_case(rows):
    rows, systems = rows
    cases = [(row["batch"], row["context"], row["system"]) for row in rows]
    assert cases == list(itertools.product((1, 2), (4, 10, 30), systems))
    token = 2 * 2 * D * 4  # bytes of keys and values
    for row in rows:
        ends = {"GPT-2": 24, "10 positions": 10}.get(row["system"], math.inf)
        if row["context"] >= ends or (row["system"], row["batch"]) == ("RWKV", 2):
            assert "decode" not in row and row["status"] in (
                f"ends at {ends} positions", "mixes the sequences of a batch")
            continue
        decode, memory = row["decode"], row["memory"]
        assert 0 < decode["low"] <= decode["median"] <= decode["p95"] and decode["runs"] == 2
        assert row["tokens/s"] == row["batch"] / decode["median"] and row["first token"] > 0
        assert memory["activations"] > 0 and row["joules per token"] is None
        if row["system"] == "GPT-2":
            grown = memory["cache"] - row["context"] * row["batch"] * token
            assert 0 <= grown <= row["batch"] * token
    states = {row["memory"]["cache"] / row["batch"] for row in rows if row["system"] == "student"}
    assert len(states) == 1 and list(v17.decoded(rows)) == list(systems)


def test_a_case_that_is_known_is_not_measured_again(rows, monkeypatch):
    known, systems = rows
    monkeypatch.setattr(asnn, "Decoder", lambda *_: 1 / 0)
    few = {key: systems[key] for key in ("GPT-2", "student")}
    again = v17.bench(few, (10, 30), (2,), 2, "a machine", known=known)
    assert again == [row for context in (10, 30) for key in few for row in known
                     if (row["system"], row["batch"], row["context"]) == (key, 2, context)]


def measured(system, batch, rate, hardware="a machine"):
    return {"system": system, "batch": batch, "context": 8, "hardware": hardware, "tokens/s": rate,
            "decode": {"median": batch / rate, "low": 1e-3, "high": 3e-3}, "first token": 0.25,
            "memory": {"weights": 2**20, "cache": 2**19, "activations": 0}}


def test_a_table_has_seven_columns_and_every_value_with_its_unit():
    ended = {"system": "GPT-2", "batch": 1, "context": 30, "status": "ends at 24 positions"}
    table = v17.bench_table([measured("student", 2, 1000.0), ended])
    assert table == [
        {"system": "student", "batch": 2, "context": 8, "tokens/s": "1,000.0", "memory, MiB": "1.5",
         "ms per step (quartiles)": "2.00 (1.00 to 3.00)", "first token, ms (once)": "250"},
        {"system": "GPT-2", "batch": 1, "context": 30, "tokens/s": "-", "memory, MiB": "-",
         "ms per step (quartiles)": "ends at 24 positions", "first token, ms (once)": "-"}]
    assert len(table[0]) == 7


def test_a_gguf_file_holds_the_model(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=1, vocab_size=300))
    for kind, bound in (("Q8_0", 0.01), ("Q4_0", 0.2)):
        v17.write_gguf(str(tmp_path / kind), model, kind)
        tensors = {t.name: t for t in gguf.GGUFReader(str(tmp_path / kind)).tensors}
        assert len(tensors) == 5 + 2 * 12
        up = tensors["blk.1.ffn_up.weight"]
        found = gguf.quants.dequantize(up.data, up.tensor_type)
        expected = model.transformer.h[1].mlp.c_fc.weight.detach().t().numpy()
        assert up.tensor_type.name == kind and found.shape == expected.shape
        assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)


def test_llama_bench_is_asked_for_the_same_context_and_threads(tmp_path):
    tool = tmp_path / "llama-bench"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho \'[{{"avg_ts": 12.5}}]\'\n')
    tool.chmod(0o755)
    assert v17.llama_rate(str(tool), "a file", 512, 2) == 12.5
    assert (tmp_path / "asked").read_text().split() == (
        "-m a file -p 0 -n 32 -d 480 -t 2 -r 2 -o json".split())
    tool.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(subprocess.CalledProcessError):
        v17.llama_rate(str(tool), "a file", 16, 1)


def test_agreement_is_of_what_both_have_on_the_same_hardware():
    here = [measured("a", 1, 10.0), measured("b", 1, 10.0), measured("a", 4, 10.0)]
    there = [measured("a", 1, 8.0), measured("c", 1, 10.0), measured("a", 4, 20.0)]
    np.testing.assert_allclose(v17.agreement(here, there), [1.25, 0.5])
    with pytest.raises(ValueError, match="hardware of the other rows is {'another'}, and here"):
        v17.agreement(here, [measured("a", 1, 8.0, "another")])


# ---- what the page says --------------------------------------------------------------------------


@pytest.mark.parametrize("sparse, where", [
    ((20.0, 30.0, 90.0), "at every number of sequences"),
    ((5.0, 10.0, 20.0), "at no number of sequences"),
    ((20.0, 30.0, 20.0), "for 1, 4 sequences at once and slower for the others"),
    ((5.0, 10.0, 90.0), "for 16 sequences at once and slower for the others")])
def test_the_sentence_about_batches_says_what_the_rows_do(sparse, where):
    dense = (10.0, 20.0, 40.0)
    rows = [measured(key, batch, rate) for key, rates in (("s", sparse), ("d", dense))
            for batch, rate in zip((1, 4, 16), rates)] + [measured("s", 64, 1.0)]  # d lacks 64
    said = v17.batch_sentence(rows, "s", "d")
    assert said.startswith(f"s is faster than d {where}: {sparse[0] / 10:.2f} times at 1, ")
    assert said.endswith(f"{sparse[2] / 40:.2f} times at 16")


def test_the_dense_twin_s_gap_is_read_from_what_v14_4_writes():
    runs = [{"seed": seed, "spiking": 44.0, "dense": 40.0, "tax": tax, "standard_error": 0.01}
            for seed, tax in ((42, 1.05), (43, 1.15))]
    assert v17.twin_gap(1.21, {"tax": {"steps": 60, "runs": runs}}) == pytest.approx(1.1)
    assert v17.twin_gap(1.21, {}) is v17.twin_gap(1.21, {"tax": None}) is None


def test_a_fit_recovers_known_coefficients_and_its_interval_holds_new_measurements():
    layers, sizes = np.array([2, 3, 4, 5, 8, 10]), np.array([1e7, 3e7, 5e7, 9e7, 1e8, 3e8])
    truth, target = 2e-4 * layers + 4e-11 * sizes, (16, 1e9)
    a, b, estimate, half = v17.fit_latency(layers, sizes, truth, target)
    assert (a, b) == (pytest.approx(2e-4), pytest.approx(4e-11)) and half < 1e-6
    assert estimate == pytest.approx(2e-4 * 16 + 4e-11 * 1e9)
    noise, hits = np.random.default_rng(0), []
    for _ in range(200):
        seconds = truth * (1 + 0.05 * noise.standard_normal(6))
        *_, found, half = v17.fit_latency(layers, sizes, seconds, target)
        hits.append(abs(found - estimate * (1 + 0.05 * noise.standard_normal())) < half)
    assert 0.88 < np.mean(hits) <= 1.0  # of a 95 % interval
    a, b, *_ = v17.fit_latency(layers, sizes, 2e-4 * layers, target)
    assert b == 0.0 and a == pytest.approx(2e-4)  # no byte takes less than no time


def test_a_pareto_line_goes_through_what_no_other_beats(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    speed = {"a": 10.0, "b": 20.0, "c": 15.0, "no gap": 99.0}
    axes = v17.plot_pareto(speed, {"a": 1.0, "b": 1.2, "c": 1.3, "no gap": None}).axes[0]
    assert len(axes.get_lines()) == 4  # of three networks, and the line
    assert list(zip(*axes.get_lines()[-1].get_data())) == [(10.0, 1.0), (20.0, 1.2)]


@pytest.mark.parametrize("name", ["asnn_v16_sparse", "asnn_v17_bench"])
def test_a_page_names_the_student_that_it_measured_and_copies_nothing_of_its_training(name):
    """Or outputs/index.md would list one training several times."""
    tree = ast.parse(Path(ROOT, "notebooks", f"{name}.py").read_text(encoding="utf-8"))
    finish, = (node for node in ast.walk(tree) if isinstance(node, ast.Call)
               and ast.unparse(node.func) == "run.finish")
    keys = [key and ast.literal_eval(key) for key in finish.args[0].keys]  # None of a ** in it
    assert {"version", "run", "student", "gated"} <= set(keys)
    assert not {"training", None} & set(keys)
