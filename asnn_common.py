"""ASNN-Goose: recurrent language models with ternary spike activations, distilled from a transformer.

Contents
    1  Configuration   GooseConfig, Recipe, RECIPES, get_recipe, Profile, PROFILES, select_profile,
                       environment, hardware_text, versions_text
    2  Spikes          ternary_spike, SpikeStatistics, TernarySpike, SpikeEncoder
    3  Recurrence      recurrence_reference, _chunked, _step, _cumsum; matrix_recurrence_reference, _chunked, _step
    4  Model           GooseState, TimeMix, MatrixTimeMix, GooseBlock, GooseModel, GooseForCausalLM
    5  Losses          chunked_distillation, chunked_kl, chunked_nll, Temperature, linear_cka, fdd_*, spike_modules,
                       spike_hooks, firing_rates, Distiller
    6  Data            load_corpus, load_tokenizer, tokenize_corpus, load_teacher, WindowSampler
    7  Training        FitConfig, EarlyStopping, Muon, ShardedObjective, fit, evaluate, perplexity_gap, spike_density,
                       operations, matrix_products, match_teacher, transfer_weights, calibrate_encoders, build_student,
                       train_teacher, distillation_sampler, load_task, distil, training_memory, preflight
    8  SpikingBrain    wilson_interval, bootstrap_interval, SpikeCapture, record_spikes, SpikeHealthChecker,
                       MutualInformationEstimator, RepresentationAnalyzer, SpikingBrainValidator, Intervention,
                       intervene, Remediation, remediate
    9  Sparse          SpikeVector, load_kernel, PRODUCTS, time_interleaved, BackendTable, SpikeLinear, compile_step,
                       sparsify
    10 Efficiency      random_student, quantize_int8, Decoder, EnergyMeter, energy_estimate, Bench, bench
    11 Artefacts       Run, runs, find_run, load_run, train_short_student, gate_status, LoadedStudent, load_student,
                       quality_table, sample_texts, run_metrics, run_checks, results_table, model_card, figure_style,
                       plain_log, show_table, show_preflight

Glossary
    B batch, T tokens in a window, D model width, H heads, N head width (D = H*N), L layers, V vocabulary,
    F feed-forward width (4D); alpha threshold multiplier, theta threshold = alpha * mean|x|, amplitude spike
    height, density share of non-zero spikes, tau distillation temperature, lambda gradient-reversal strength,
    w decay in (0, 1), S recurrent state, gap = student PPL / teacher PPL on the same tokens.

Papers
    [1] Peng et al. 2023, RWKV: Reinventing RNNs for the Transformer Era, arXiv 2305.13048
    [2] Bengio et al. 2013, Estimating or Propagating Gradients Through Stochastic Neurons, arXiv 1308.3432
    [3] Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531
    [4] Li et al. 2023, Curriculum Temperature for Knowledge Distillation (CTKD), arXiv 2211.16231
    [5] Gong et al. 2025, Beyond Logits: Aligning Feature Dynamics (FDD), ACL 2025, 2025.acl-long.1125
    [6] Kornblith et al. 2019, Similarity of Neural Network Representations Revisited (CKA), arXiv 1905.00414
    [7] Song et al. 2012, Feature Selection via Dependence Maximization (unbiased HSIC), JMLR 13
    [8] Nguyen et al. 2021, Do Wide and Deep Networks Learn the Same Things? (minibatch CKA), arXiv 2010.15327
    [9] Li et al. 2017, Ternary Weight Networks (threshold proportional to mean|x|), arXiv 1605.04711
    [10] Yang et al. 2024, Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635
    [11] Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv 2406.06484
    [12] Peng et al. 2025, RWKV-7 "Goose" with Expressive Dynamic State Evolution, arXiv 2503.14456
    [13] Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks, kellerjordan.github.io/posts/muon
    [14] Barber, Agakov 2003, The IM Algorithm: A Variational Approach to Information Maximization, NIPS
    [15] Paninski 2003, Estimation of Entropy and Mutual Information (Miller-Madow), Neural Computation 15
    [17] Horowitz 2014, Computing's Energy Problem (45 nm), ISSCC
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

try:
    from transformers import PreTrainedConfig
except ImportError:  # the name before transformers 5.1
    from transformers import PretrainedConfig as PreTrainedConfig

__version__ = "17.0.0"


# ======================================================================================================
# 1  Configuration
# ======================================================================================================

ESTIMATORS = ("identity", "normalised", "clipped")
THRESHOLDS = ("token", "channel", "mixed", "mixed_fixed")
GRANULARITIES = ("scalar", "channel")
STATES = ("vector", "matrix", "delta")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear")
TEMPERATURES = ("fixed", "bounded", "paper", "staged")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
TRACKERS = ("tensorboard", "trackio")
SITES = ("k", "v", "mix_in", "mix_out", "ffn_in", "ffn_hidden", "head_in")


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raises ValueError with one sentence that names the field, its value and what is allowed."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}.")


def reject_unknown(given: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Raises ValueError that lists what exists when `given` has a name outside `known`."""
    known = set(known)
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"{owner} has no field {', '.join(unknown)}; it has: {', '.join(sorted(known))}.")


def check_numbers(values: dict[str, Any], kinds: dict[str, str], owner: str = "", zero: Iterable[str] = (),
                  shares: Iterable[str] = ()) -> None:
    """Refuses numbers that are not what their annotation says, by default above 0: a field that is added is checked too.

    Args:
        kinds: {field: annotation}; of those, "int", "float" and "bool", with or without " | None", are looked at.
        owner: the class, for the sentence.
        zero: fields that may be 0.
        shares: fields in [0, 1].
    Raises:
        ValueError: a value is of another type (True is no number), NaN, infinite or too small.
    """
    for name, annotation in kinds.items():
        kind, _, optional = annotation.partition(" | ")
        value, label = values[name], f"{owner}.{name}" if owner else name
        if kind not in ("int", "float", "bool") or optional == "None" and value is None:
            continue
        known = isinstance(value, {"int": int, "float": (int, float), "bool": bool}[kind])
        if kind != "bool":
            known = known and not isinstance(value, bool) and (value <= 1 if name in shares else value < math.inf)
            known = known and (value >= 0 if name in zero or name in shares else value > 0)
        allowed = "True or False" if kind == "bool" else "a number in [0, 1]" if name in shares else (
            f"a whole number from {0 if name in zero else 1}" if kind == "int" else
            f"a number {'from' if name in zero else 'above'} 0")
        require(known, label, value, allowed + (" or None" if optional else ""))


def is_word(value: Any) -> bool:
    """True for what can be a name or a path: a string or a Path that is not empty."""
    return isinstance(value, (str, Path)) and bool(str(value))


# The notebooks' parameters: a kind, as an annotation says it, and for numbers the least one that is allowed.
PARAMETERS = {
    **{name: ("str | None", 0) for name in ("student", "profile", "corpus", "teacher", "tracker", "run_name")},
    "recipe": ("str", 0), "seed": ("int", 0), "tax_seeds": ("int", 0), "damage_windows": ("int", 2),
    "tokens": ("int | None", 2048), "price_per_hour": ("float", 0.0), "max_hours": ("float | None", None),
    **{name: ("int | None", 1) for name in (
        "steps", "tax_steps", "remedy_steps", "layers", "repeats", "quality_tokens")},
    **{name: ("bool | None", 0) for name in ("remedy", "compiled")},
    **{name: ("list | None", 1) for name in ("contexts", "batches")}}


def check_parameters(**values: Any) -> None:
    """Raises ValueError for a parameter of a notebook that is of another kind than PARAMETERS says, or too small."""
    def whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    for name, value in values.items():
        annotation, least = PARAMETERS[name]
        kind, _, optional = annotation.partition(" | ")
        if kind == "str":
            allowed, fits = "a word", is_word(value)
        elif kind == "int":
            most = 2**32 - 1 if name == "seed" else math.inf
            allowed = f"a whole number from {least}" + (f" to {most:,}" if name == "seed" else "")
            fits = whole(value, least) and value <= most
        elif kind == "list":
            allowed = f"a list of whole numbers from {least}"
            fits = isinstance(value, (list, tuple)) and bool(value) and all(whole(x, least) for x in value)
        elif kind == "bool":
            allowed, fits = "True, False", isinstance(value, bool)
        else:
            allowed = "a number above 0" if least is None else f"a number from {least:g}"
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and (
                0 < value < math.inf if least is None else least <= value < math.inf)
        require(fits or bool(optional) and value is None, name, value, allowed + (" or None" if optional else ""))


def check_fields(config: Any, zero: Iterable[str] = (), shares: Iterable[str] = ()) -> None:
    """`check_numbers` for all fields of a dataclass."""
    kinds = {item.name: item.type for item in dataclasses.fields(config)}
    check_numbers(vars(config), kinds, type(config).__name__, zero, shares)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def import_optional(name: str) -> Any:
    """Imports a library where it is used. Written so, and not as an import statement, because the loader of
    `trust_remote_code` demands every library that a model file imports, even those that only training needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ImportError(f"{package} is needed here and is not installed: pip install {package}.") from error


def progress_bar(items: Iterable[Any] | None = None, description: str | None = None, unit: str = "it",
                 show: bool = True, total: int | None = None) -> Any:
    """tqdm's bar over items, or up to `total`, drawn at most once a second."""
    return import_optional("tqdm").tqdm(items, description, total, unit=unit, mininterval=1.0, disable=not show)


def spike_levels(kind: str) -> int:
    """Events a unit can fire per token: 1 for binary and ternary, k for 'integer:k', 0 for dense.

    Raises ValueError for any other kind.
    """
    allowed = "dense, binary, ternary, integer:k with k from 1 to 127"
    if kind in ("dense", "binary", "ternary"):
        return 0 if kind == "dense" else 1
    name, _, count = str(kind).partition(":")
    require(name == "integer" and count.isdigit() and 1 <= int(count) <= 127, "spike_kind", kind, allowed)
    return int(count)


STUDENT_CHOICES = {
    "recurrence": ("chunked", "reference", "cumsum"), "decay_init": ("spread", "published"),
    "mix_init": ("spread", "published"), "output_order": ("gate_first", "project_first"), "threshold": THRESHOLDS,
    "granularity": GRANULARITIES, "estimator": ESTIMATORS, "state_kind": STATES}


def check_band(band: tuple[float, float], name: str) -> None:
    """Raises ValueError unless `band` is two shares in [0, 1], the lower one first."""
    fits = isinstance(band, (tuple, list)) and len(band) == 2 and all(isinstance(x, (int, float)) for x in band)
    require(fits and 0 <= band[0] < band[1] <= 1, name, band, "two shares, the lower one first")


def check_sites(sites: Iterable[str], name: str = "spike_sites") -> tuple[str, ...]:
    """The sites in the order of SITES. Raises ValueError for one that does not exist, and without k and v."""
    sites = tuple(sites)
    require({"k", "v"} <= set(sites) <= set(SITES), name, sites, f"'k', 'v' and any of {', '.join(SITES[2:])}")
    return tuple(site for site in SITES if site in sites)


class GooseConfig(PreTrainedConfig):
    """Architecture and spikes of a Goose student. Unknown keys are rejected.

    `decay_init` and `mix_init` are `spread` (ours) or `published` (every decay 0.378; the last layer blind to the
    current token), `recurrence` is `chunked`, `reference` or `cumsum` (the founders' formula, inexact),
    `output_order` is `gate_first`, W_o(r * S), or `project_first`, r * W_o(S). `state_kind` is `vector`, `matrix` or
    `delta` (see MatrixTimeMix), the last two with heads of `head_width` channels; `projection_bias` gives k, v, r and
    the output a bias. `spike_sites` are k, v and the sites before a Linear where a SpikeEncoder of `encoder_kind`
    stands: mix_in (k, v, r, gate), mix_out (W_o), ffn_in (W_1), ffn_hidden (W_2), head_in.
    """

    model_type = "goose"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layer", "max_position_embeddings": "n_positions"}
    keys_to_ignore_at_inference = ["state"]
    _auto_class = "AutoConfig"

    def __init__(self, vocab_size: int = 50257, d_model: int = 768, n_layer: int = 5, n_positions: int = 1024,
                 ffn_width: int | None = None, activation: str = "silu", layer_norm_epsilon: float = 1e-5,
                 initializer_range: float = 0.02, state_kind: str = "vector", head_width: int = 64,
                 projection_bias: bool = False, recurrence: str = "chunked", decay_init: str = "spread",
                 mix_init: str = "spread", output_order: str = "gate_first", spike_kind: str = "ternary",
                 spike_sites: tuple[str, ...] = ("k", "v"), encoder_kind: str = "ternary", threshold: str = "token",
                 granularity: str = "scalar", alpha_init: float = 1.0, amplitude_init: float = 1.0,
                 estimator: str = "clipped", use_cache: bool = True, tie_word_embeddings: bool = True,
                 bos_token_id: int | None = None, eos_token_id: int | None = None, pad_token_id: int | None = None,
                 **kwargs):
        values = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        kinds = GooseConfig.__init__.__annotations__
        check_numbers(values, {k: v for k, v in kinds.items() if not k.endswith("_token_id")})
        for name, allowed in STUDENT_CHOICES.items():
            require(values[name] in allowed, name, values[name], ", ".join(allowed))
        values["spike_sites"] = list(check_sites(spike_sites))
        if state_kind != "vector":
            require(d_model % head_width == 0, "head_width", head_width, f"a divisor of d_model = {d_model}")
            require(recurrence != "cumsum", "recurrence", recurrence, f"chunked, reference for state_kind {state_kind}")
            require(output_order == "gate_first", "output_order", output_order, f"gate_first for {state_kind}")
        require("mix_out" not in spike_sites or output_order == "gate_first", "output_order", output_order,
                "gate_first with the spike site mix_out")
        spike_levels(spike_kind)
        require(encoder_kind != "binary" and spike_levels(encoder_kind) > 0, "encoder_kind", encoder_kind,
                "ternary, integer:k with k from 1 to 127")
        # What the library itself writes into config.json passes; a misspelt field of ours does not.
        library = {*dir(PreTrainedConfig), *PreTrainedConfig().to_dict(), "auto_map", "torch_dtype",
                   "attn_implementation", "experts_implementation"}
        reject_unknown((k for k in kwargs if not k.startswith("_") and k not in library), values, "GooseConfig")
        values.update(ffn_width=ffn_width or 4 * d_model)
        for name, value in values.items():
            setattr(self, name, value)
        super().__init__(tie_word_embeddings=tie_word_embeddings, bos_token_id=bos_token_id, eos_token_id=eos_token_id,
                         pad_token_id=pad_token_id, **kwargs)


@dataclass(frozen=True)
class Recipe:
    """Everything about a distillation run, as data. Values not given are those of the published v14.3.

    `inferred` names the fields whose value was not published and is taken from the nearest published version,
    `repaired` those that differ from the published ones because those were at fault. `published_ppl` is the version's,
    the founders' PPL on WikiText-2 raw with 256-token windows. Steps count optimiser steps; `patience`, `fdd_start` and
    `eval_every` are in steps. Raises ValueError for a value outside what is allowed.
    """

    name: str
    changed: str
    outcome: str = ""
    published_ppl: float | None = None
    inferred: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()
    # student
    d_model: int = 768
    n_layer: int = 5
    activation: str = "silu"
    recurrence: str = "chunked"
    decay_init: str = "published"
    mix_init: str = "published"
    output_order: str = "gate_first"
    state_kind: str = "vector"
    head_width: int = 64
    projection_bias: bool = False
    spike_kind: str = "ternary"
    spike_sites: tuple[str, ...] = ("k", "v")
    encoder_kind: str = "ternary"
    threshold: str = "token"
    granularity: str = "scalar"
    alpha_init: float = 1.0
    amplitude_init: float = 1.0
    estimator: str = "identity"
    # teacher and corpus; a corpus and a time budget count in profile t4, where no parameter says otherwise
    corpus: str | None = None
    max_hours: float | None = None
    teacher: str = "gpt2"
    embeddings_from_teacher: bool = False
    weights_from_teacher: bool = False
    transfer_layers: tuple[int, ...] | None = None
    output_scale: float = 1.0
    # objective
    align_steps: int = 0
    ce_start: int = 0
    anneal_steps: int = 0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: str = "bounded"
    gradient_reversal: bool = True
    tau: float = 2.0
    tau_min: float = 1.0
    tau_max: float = 5.0
    lambda_max: float = 1.0
    lambda_warmup_ratio: float = 0.25
    hidden_weight: float = 0.0
    variance_penalty: float = 0.0
    rate_weight: float = 0.0
    rate_band: tuple[float, float] = (0.22, 0.57)
    fdd: str = "none"
    fdd_weight: float = 0.001
    fdd_start: int = 500
    fdd_max_regression: float = 0.10
    layer_map: tuple[tuple[int, int], ...] = ((0, 2), (2, 7), (4, 11))
    curriculum: str = "none"
    # optimisation
    distill_steps: int = 5000
    optimizer: str = "adamw"
    lr: float = 2e-4
    matrix_lr: float | None = None
    beta2: float = 0.999
    schedule: str = "cosine"
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    batch_size: int = 8
    grad_accum: int = 1
    seq_len: int = 256
    clip: float = 1.0
    patience: int = 800
    min_delta: float = 0.5
    eval_every: int = 300
    seed: int = 42

    def __post_init__(self):
        for name, allowed in {
                "temperature": TEMPERATURES, "fdd": ("none", "cka_delta", "logit_lens"), "curriculum": ("none", "pocl"),
                "optimizer": OPTIMIZERS, "schedule": SCHEDULES, **STUDENT_CHOICES}.items():
            require(getattr(self, name) in allowed, f"Recipe.{name}", getattr(self, name), ", ".join(allowed))
        spike_levels(self.spike_kind)
        check_fields(self, (
            "matrix_lr", "kd_weight", "ce_weight", "hidden_weight", "fdd_weight", "variance_penalty", "rate_weight",
            "weight_decay", "min_delta", "fdd_start", "fdd_max_regression", "align_steps", "ce_start", "anneal_steps",
            "seed"),
            ("warmup_ratio", "lambda_warmup_ratio", "lambda_max", "beta2"))
        require(self.beta2 < 1, "Recipe.beta2", self.beta2, "a number in [0, 1)")
        check_sites(self.spike_sites, "Recipe.spike_sites")
        check_band(self.rate_band, "Recipe.rate_band")
        require(self.align_steps < self.distill_steps, "Recipe.align_steps", self.align_steps,
                f"less than distill_steps = {self.distill_steps}")
        low, high = (1.0, 21.0) if self.temperature == "paper" else (self.tau_min, self.tau_max)
        require(self.temperature not in ("bounded", "paper") or low < self.tau < high, "Recipe.tau", self.tau,
                f"between {low} and {high}, exclusive, for temperature {self.temperature}")
        require(not self.variance_penalty or self.granularity == "channel", "Recipe.variance_penalty",
                self.variance_penalty, "0, or a number with granularity='channel'")

    def replace(self, **overrides: Any) -> Recipe:
        """A copy with other values. Raises ValueError for a name that is no field, listing those that are."""
        reject_unknown(overrides, (item.name for item in dataclasses.fields(self)), "Recipe")
        if "layer_map" in overrides:
            pairs = overrides["layer_map"]
            try:
                overrides["layer_map"] = tuple(sorted((int(s), int(t)) for s, t in
                                                      (pairs.items() if isinstance(pairs, dict) else pairs)))
            except (TypeError, ValueError):
                require(False, "Recipe.layer_map", pairs, "pairs of a student layer and a teacher layer")
        for name, what in (("spike_sites", "None or a list of the names of sites"),
                           ("rate_band", "a list of two shares"),
                           ("transfer_layers", "None or a list of the numbers of teacher layers")):
            value = overrides.get(name)
            require(value is None or isinstance(value, (tuple, list)), f"Recipe.{name}", value, what)
            if value is not None:
                overrides[name] = tuple(value)
        return dataclasses.replace(self, **overrides)

    def stages(self) -> list[tuple[str, int, int]]:
        """(name, first step, step after the last) of each stage of the run."""
        ce = min(max(self.align_steps, self.ce_start), self.distill_steps) if self.ce_weight else self.distill_steps
        edges = {"layerwise alignment": (0, self.align_steps), "KL": (self.align_steps, ce),
                 "KL + CE": (ce, self.distill_steps)}
        return [(name, *edge) for name, edge in edges.items() if edge[1] > edge[0]]

    def student_config(self, vocab_size: int, **overrides: Any) -> GooseConfig:
        """The student's architecture for a teacher with `vocab_size` tokens: the fields that GooseConfig has too."""
        shared = {name: value for name, value in vars(self).items() if name in GooseConfig.__init__.__annotations__}
        return GooseConfig(**{"vocab_size": vocab_size, "n_positions": self.seq_len, **shared, **overrides})


def _history() -> dict[str, Recipe]:
    """The recipes, each written as what it changed against the one before it. Where a value was not published,
    `inferred` says so. The history replays the published initialisations and estimator, faults included; v14.3 is
    the same recipe with the faults repaired, and v14.3-published keeps them for comparison."""
    unpublished = ("weight_decay", "warmup_ratio", "clip", "seq_len", "patience", "min_delta", "seed")
    v4 = Recipe("v4", "first ternary activations; cumsum recurrence; untrained dense Goose teacher", "works at small "
                "scale", None, unpublished, d_model=256, n_layer=4, batch_size=16,
                lr=3e-4, distill_steps=1000, eval_every=100, recurrence="cumsum", output_order="project_first",
                teacher="untrained-goose", embeddings_from_teacher=True, temperature="fixed", tau=2.0)
    v6 = v4.replace(name="v6", changed="first GPT-2 distillation", outcome="baseline", published_ppl=627.0,
                    recurrence="chunked", output_order="gate_first", teacher="gpt2", embeddings_from_teacher=False,
                    inferred=unpublished + ("d_model", "n_layer", "batch_size", "lr", "distill_steps", "eval_every",
                                            "recurrence", "output_order", "tau", "embeddings_from_teacher"))
    v7 = v6.replace(name="v7", changed="hidden-state alignment, weight 1.0", published_ppl=1655.0,
                    outcome="failed: alignment drowned the KL", hidden_weight=1.0, d_model=320, n_layer=5,
                    batch_size=8, distill_steps=3000, eval_every=300)
    v8 = v7.replace(name="v8", changed="safe defaults", outcome="fixed", published_ppl=559.0, hidden_weight=0.0)
    v9 = v8.replace(name="v9", changed="D=320, 5 layers, 22M, lr 3e-4, 3000 steps", outcome="baseline",
                    published_ppl=542.0, inferred=unpublished + (
                        "batch_size", "eval_every", "tau", "recurrence", "output_order", "embeddings_from_teacher"))
    v10 = v9.replace(name="v10", published_ppl=514.5)
    v11 = v10.replace(name="v11", changed="per-channel alpha and amplitude with variance penalty 0.01",
                      outcome="penalty froze learning", published_ppl=512.67, granularity="channel",
                      variance_penalty=0.01)
    v11_1 = v11.replace(name="v11.1", changed="v11 without the penalty", published_ppl=512.04, variance_penalty=0.0,
                        outcome="k and v amplitudes stayed identical (symmetric init and gradients)")
    v12 = v10.replace(name="v12", changed="learnable tau without gradient reversal", outcome="tau ran away to 10",
                      published_ppl=1000.0, temperature="bounded", gradient_reversal=False, tau_min=0.1, tau_max=10.0,
                      inferred=v10.inferred + ("tau_min", "tau_max"))
    v12_1 = v10.replace(name="v12.1", changed="CTKD with gradient reversal, tau in [1, 5], warm-up 0.2",
                        outcome="tau 2.0 -> 1.58", published_ppl=445.61, temperature="bounded", lambda_warmup_ratio=0.2)
    v13 = v12_1.replace(name="v13", changed="POCL curriculum: easy 33 % first, tau 1.0 -> 1.5 -> 2.0",
                        outcome="catastrophic forgetting", published_ppl=1126.0, curriculum="pocl",
                        temperature="staged")
    v13_1 = v12_1.replace(name="v13.1", changed="v12.1, 5000 steps", outcome="longer helps", published_ppl=434.44,
                          distill_steps=5000)
    v14 = v13_1.replace(name="v14", changed="+ FDD (CKA)", outcome="small gain; FDD loss 0.791 -> 0.777",
                        published_ppl=424.81, fdd="cka_delta")
    v14_1 = v14.replace(name="v14.1", changed="D=512, 42M, lr 3e-4", outcome="capacity mattered",
                        published_ppl=321.48, d_model=512)
    # 165M at D=1024 with a tied head is nine layers; the number of layers itself was not published.
    v14_2 = v14.replace(name="v14.2", changed="D=1024, 165M, lr 3e-4, lambda warm-up 0.2, patience 500",
                        outcome="under-trained, collapsed", published_ppl=330.89, d_model=1024, n_layer=9,
                        patience=500, layer_map=((0, 2), (4, 7), (8, 11)),
                        inferred=tuple(n for n in v14.inferred if n != "patience") + ("n_layer", "layer_map"))
    published = Recipe("v14.3-published", "D=768, lr 2e-4, warm-up 0.25, patience 800", "best", 306.89,
                       ("recurrence", "seed"), fdd="cka_delta", embeddings_from_teacher=True)
    cumsum = published.replace(name="v14.3-cumsum", changed="v14.3-published with the founders' cumsum recurrence",
                               outcome="", published_ppl=None, recurrence="cumsum")
    v14_3 = published.replace(
        name="v14.3", changed="the published recipe with its faults repaired: decays spread over sigmoid(0.5..6), "
        "token-shift mixes in [0.5, 1], an estimator that reaches theta, unbiased CKA", decay_init="spread",
        mix_init="spread", estimator="clipped", inferred=("seed",),
        repaired=("recurrence", "decay_init", "mix_init", "estimator"))
    v14_4 = v14_3.replace(
        name="v14.4", changed="started from the teacher's weights; delta-rule matrix state; Muon; fixed tau 1, KL + CE",
        published_ppl=None, inferred=(), repaired=(), outcome="", weights_from_teacher=True, output_scale=0.5,
        state_kind="delta", projection_bias=True, activation="gelu_pytorch_tanh", temperature="fixed", tau=1.0,
        ce_weight=0.2, fdd="none", align_steps=833, patience=5000, optimizer="muon", lr=4e-4, matrix_lr=1e-3, beta2=0.95)
    v14_4_sites = v14_4.replace(name="v14.4-sites", changed="v14.4 with every weight product of the layers fed by spikes",
                                spike_sites=SITES[:-1])
    v14_4_rates = v14_4_sites.replace(name="v14.4-rates", changed="v14.4-sites with the firing rates of all channels "
                                      "held in [0.22, 0.57]", rate_weight=10.0)
    v14_4_vector = v14_4.replace(name="v14.4-vector", changed="v14.4 with the founders' vector state",
                                 state_kind="vector")
    # 16,384 tokens a step; at an estimated 10,000 tokens/s of a T4, 12,000 steps are 5.5 hours.
    v14_4_t4 = v14_4.replace(name="v14.4-t4", changed="v14.4 at length: WikiText-103, 197M tokens, one T4 for 6 hours",
                             corpus="wikitext-103", max_hours=6.0, seq_len=512, batch_size=8, grad_accum=4,
                             distill_steps=12_000, align_steps=2000, eval_every=500, patience=12_000,
                             warmup_ratio=0.05)
    # The width of gpt2-xl, four of its seven layers: 1.01B parameters, for GPUs that share the weights out.
    v14_4_1b = v14_4_t4.replace(name="v14.4-1b", changed="v14.4-t4 at 1.0B parameters, from GPT-2 XL",
                                outcome="never run", teacher="gpt2-xl", d_model=1600, n_layer=28, max_hours=None,
                                batch_size=16, grad_accum=2)
    return {r.name: r for r in (v4, v6, v7, v8, v9, v10, v11, v11_1, v12, v12_1, v13, v13_1, v14, v14_1, v14_2,
                                v14_3, published, cumsum, v14_4, v14_4_sites, v14_4_rates, v14_4_vector, v14_4_t4,
                                v14_4_1b)}


RECIPES: dict[str, Recipe] = _history()


def get_recipe(name: str, **overrides: Any) -> Recipe:
    """The recipe called `name` with fields replaced. Raises ValueError for an unknown name or field, listing what
    exists."""
    require(name in RECIPES, "recipe", name, ", ".join(RECIPES))
    return RECIPES[name].replace(**overrides)


@dataclass(frozen=True)
class Profile:
    """How large a run is: corpus, teacher and the recipe fields that change with it.

    `corpus` and `teacher` are what `load_corpus` and `load_teacher` accept; teacher `train` trains one of the
    `teacher_*` shape here. `recipe` holds overrides of Recipe fields as pairs; the recipe's learning rates, those of
    the full width, are multiplied by `lr_scale`. `eval_windows` bounds the evaluation
    inside training; results are always computed on whole splits unless `final_windows` is set.
    """

    name: str
    description: str
    corpus: str = "pydocs"
    corpus_chars: int | None = None
    teacher: str = "train"
    vocab_size: int = 4096
    teacher_layers: int = 6
    teacher_width: int = 256
    teacher_heads: int = 4
    teacher_steps: int = 700
    teacher_lr: float = 2e-3
    teacher_batch_size: int = 8
    recipe: tuple[tuple[str, Any], ...] = ()
    lr_scale: float = 1.0
    eval_windows: int = 64
    final_windows: int | None = None

    def __post_init__(self):
        check_fields(self)
        require(self.teacher_width % self.teacher_heads == 0, "Profile.teacher_heads", self.teacher_heads,
                f"a divisor of teacher_width = {self.teacher_width}")

    def replace(self, **overrides: Any) -> Profile:
        """A copy with other values. Raises ValueError for a name that is no field."""
        reject_unknown(overrides, (item.name for item in dataclasses.fields(self)), "Profile")
        return dataclasses.replace(self, **overrides)

    def scale(self, recipe: Recipe, **overrides: Any) -> Recipe:
        """The recipe at this profile's size; `overrides` win over both.

        Fields counted in steps shrink with `distill_steps`, and the layer map is spread over the new depths.
        """
        given = {**dict(self.recipe), **overrides}
        steps = given.get("distill_steps", recipe.distill_steps)
        check_numbers({"distill_steps": steps}, {"distill_steps": "int"})
        ratio = steps / recipe.distill_steps
        for name in ("fdd_start", "patience", "eval_every"):
            given.setdefault(name, max(1, round(getattr(recipe, name) * ratio)))
        if recipe.patience >= recipe.distill_steps and "patience" not in overrides:
            given["patience"] = steps  # a recipe that runs to its end does so at any size
        for name in ("align_steps", "ce_start", "anneal_steps"):
            given.setdefault(name, round(getattr(recipe, name) * ratio))
        for name in ("lr", "matrix_lr"):
            if getattr(recipe, name) is not None:
                given.setdefault(name, getattr(recipe, name) * self.lr_scale)
        n_layer = given.get("n_layer", recipe.n_layer)
        if (n_layer, self.teacher_layers) != (recipe.n_layer, 12):
            given.setdefault("layer_map", spread_layer_map(n_layer, self.teacher_layers))
        return recipe.replace(**given)


def spread_layer_map(n_layer: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """First, middle and last student layer to the teacher layers where 1/5, 3/5 and all of its depth are done;
    for 5 and 12 layers that is the published {0: 2, 2: 7, 4: 11}. Layers are counted from 0."""
    students = sorted({0, (n_layer - 1) // 2, n_layer - 1})
    return tuple((s, min(teacher_layers - 1, math.ceil((s + 1) * teacher_layers / n_layer - 1e-9) - 1))
                 for s in students)


_SMALL = (("d_model", 256), ("n_layer", 3), ("distill_steps", 600), ("batch_size", 8), ("grad_accum", 1),
          ("seq_len", 256), ("eval_every", 100), ("patience", 300), ("embeddings_from_teacher", True))

PROFILES: dict[str, Profile] = {p.name: p for p in (
    Profile("tiny", "seconds; for continuous integration", corpus_chars=400_000, vocab_size=512, teacher_layers=2,
            teacher_width=64, teacher_heads=2, teacher_steps=40, teacher_lr=3e-3, eval_windows=8, final_windows=16,
            lr_scale=10.0,
            recipe=(("d_model", 64), ("n_layer", 2), ("head_width", 32), ("distill_steps", 30), ("batch_size", 8),
                    ("grad_accum", 1), ("seq_len", 64), ("eval_every", 10), ("fdd_start", 10), ("patience", 30),
                    ("embeddings_from_teacher", True))),
    Profile("cpu", "minutes; the default without a GPU", lr_scale=5.0, recipe=(*_SMALL, ("distill_steps", 300))),
    Profile("ref", "the reference task: a frozen teacher and corpus in the folder that ASNN_REF names",
            corpus="ref", teacher="ref", lr_scale=5.0, recipe=_SMALL),
    Profile("t4", "the published size; one 16 GB GPU", corpus="wikitext-2", teacher="gpt2", vocab_size=50257,
            teacher_layers=12, teacher_width=768, teacher_heads=12),
)}


def select_profile(name: str | None = None) -> tuple[Profile, str]:
    """(profile, reason): `name` if given, else ASNN_PROFILE, else `t4` with a usable GPU and `cpu` without.

    Raises ValueError for a name that does not exist.
    """
    for source, value in (("asked for", name), ("ASNN_PROFILE", os.environ.get("ASNN_PROFILE"))):
        if value:
            require(value in PROFILES, f"profile ({source})", value, ", ".join(PROFILES))
            return PROFILES[value], f"profile {value}: {source}"
    device, reason = select_device()
    chosen = "t4" if device.type == "cuda" else "cpu"
    return PROFILES[chosen], f"profile {chosen}: {reason}"


def select_device() -> tuple[torch.device, str]:
    """(device, reason): this process's CUDA device if an operation really runs on it, else the CPU.

    Some images carry no kernels for older cards (a P100 under a build for sm_70 and later), which only shows when
    something runs; the reason then says what to press.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu"), "no CUDA device"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    name = torch.cuda.get_device_name(device)
    try:
        torch.ones(8, device=device).mul_(2).sum().item()
    except RuntimeError as error:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        return torch.device("cpu"), (f"{name} ({arch}) has no kernels in this torch build "
                                     f"({', '.join(torch.cuda.get_arch_list())}): {_first_line(error)}; on "
                                     "Kaggle choose Settings > Accelerator > GPU T4 x2")
    return device, f"{name}, {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"


def select_precision(device: torch.device, asked: str = "auto") -> tuple[str, str]:
    """(precision, reason) with precision `fp32`, `fp16` or `bf16`.

    bf16 needs compute capability 8.0 on a GPU (`torch.cuda.is_bf16_supported` says True on a T4, where it is
    emulated and slow) and AVX512-BF16 or AMX on an x86 CPU.
    """
    require(asked in PRECISIONS, "precision", asked, ", ".join(PRECISIONS))
    if asked != "auto":
        return asked, f"{asked}: asked for"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return "bf16", f"bf16: compute capability {major}.{minor} is at least 8.0"
        return "fp16", f"fp16 with a GradScaler: compute capability {major}.{minor} is below 8.0"
    flags = _cpu_bf16_flags()
    return ("bf16", f"bf16: the CPU has {', '.join(flags)}") if flags else ("fp32", "fp32: the CPU has no bf16 units")


def cpu_facts() -> dict[str, str]:
    """What the system says of the CPU, {"model name", "flags", ...} on Linux; {} elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return dict(tuple(part.strip() for part in line.split(":", 1)) for line in first.splitlines() if ":" in line)


def _cpu_bf16_flags() -> list[str]:
    names = ("avx512_bf16", "amx_bf16")
    if hasattr(torch.cpu, "get_capabilities"):
        return [name for name in names if torch.cpu.get_capabilities().get(name)]
    return [name for name in names if name in cpu_facts().get("flags", "").split()]  # torch before 2.11


def where_am_i() -> str:
    """`kaggle`, `colab` or `local`. Kaggle is asked first: it sets Colab's variable too."""
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return "kaggle"
    return "colab" if os.environ.get("COLAB_RELEASE_TAG") else "local"


def environment() -> dict[str, Any]:
    """Hardware and versions that a measurement belongs to."""
    import importlib.metadata
    cpu = cpu_facts().get("model name") or platform.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {}
    for package in ("torch", "transformers", "datasets", "accelerate", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpus = [f"{torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
            for i in range(torch.cuda.device_count())]
    return {"platform": where_am_i(), "cpu": cpu, "cores": cores, "threads": torch.get_num_threads(), "gpus": gpus,
            "python": platform.python_version(), "versions": versions, "asnn_common": __version__}


def hardware_text(env: dict[str, Any], gpus: bool = True) -> str:
    """What a measurement in this `environment` was made on: its GPUs, without them or `gpus` its CPU and threads."""
    threads = f"{env['threads']} thread" + "s" * (env["threads"] != 1)
    return gpus and ", ".join(env["gpus"]) or f"{env['cpu']}, {threads}"


def versions_text(env: dict[str, Any]) -> str:
    """The versions in an `environment`, Python's first."""
    return ", ".join([f"Python {env['python']}", *(f"{name} {version}" for name, version in env["versions"].items())])


# ======================================================================================================
# 2  Spikes
# ======================================================================================================


class _TernarySpikeFunction(torch.autograd.Function):
    """Forward: exact event counts. Backward: a straight-through estimator (see `ternary_spike`)."""

    @staticmethod
    def forward(ctx, x: Tensor, theta: Tensor, levels: int, binary: bool, estimator: str, width: float) -> Tensor:
        ctx.save_for_backward(x, theta)
        ctx.levels, ctx.binary, ctx.estimator, ctx.width = levels, binary, estimator, width
        return _TernarySpikeFunction.count(x, theta, levels, binary)

    @staticmethod
    def count(x: Tensor, theta: Tensor, levels: int, binary: bool) -> Tensor:
        """The forward pass alone."""
        value, threshold = x.float(), theta.float()
        magnitude = value if binary else value.abs()
        count = (magnitude > threshold).to(x.dtype)
        for level in range(2, levels + 1):
            count += (magnitude > level * threshold).to(x.dtype)
        return count if binary else count * torch.sign(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, theta = ctx.saved_tensors
        if ctx.estimator == "identity":
            return grad, None, None, None, None, None
        # Where theta is 0 there is no scale: an input of zeros gets no gradient.
        value, threshold, upstream = x.float(), theta.float().clamp_min(1e-12), grad.float() * (theta > 0)
        if ctx.estimator == "normalised":
            # The chord through (0, 0) and (reach, levels): scale-free, never zero.
            slope = ctx.levels / ((ctx.levels + 1) * threshold)
            grad_x = upstream * slope
            grad_theta = -grad_x * value / threshold
        else:
            # A spike appears where |x| crosses level * theta; the step's derivative is replaced by that of a sigmoid
            # of this scale around the crossing. That derivative is even, so that one form serves both signs.
            scale = ctx.width * threshold
            position, upstream = value / scale, upstream / scale
            grad_x, grad_theta = torch.zeros_like(value), torch.zeros_like(value)
            for level in range(1, ctx.levels + 1):
                for side in (1.0,) if ctx.binary else (1.0, -1.0):
                    gate = torch.sigmoid(position - side * level / ctx.width)
                    window = torch.ops.aten.sigmoid_backward(upstream, gate)  # upstream * gate * (1 - gate)
                    grad_x += window
                    grad_theta.sub_(window, alpha=side * level)
        return (grad_x.to(x.dtype), grad_theta.sum_to_size(theta.shape).to(theta.dtype), None, None, None, None)


def ternary_spike(x: Tensor, theta: Tensor, estimator: str = "clipped", levels: int = 1, binary: bool = False,
                  width: float = 0.5) -> Tensor:
    """Spikes of x: sign(x) times the number of thresholds theta, 2 theta, ..., levels*theta that |x| exceeds.

    With levels = 1 that is exactly {-1, 0, +1}; `binary` fires only upwards, {0, 1}.

    Args:
        x: (..., D) pre-activation.
        theta: threshold >= 0, broadcastable to x.
        estimator: gradient that replaces the derivative of the steps [2]. `identity` is the published one: dx = 1
            and theta gets no gradient, so that alpha never learns; it is kept for comparison only. `normalised`:
            the chord levels / ((levels + 1) * theta), for x and theta. `clipped`: a sigmoid window of scale
            width * theta around each threshold, for x and theta.
    Returns:
        (..., D) integers in the dtype of x.
    Raises:
        ValueError for an estimator that does not exist.
    """
    require(estimator in ESTIMATORS, "estimator", estimator, ", ".join(ESTIMATORS))
    if not torch.is_grad_enabled():
        return _TernarySpikeFunction.count(x, theta, levels, binary)
    return _TernarySpikeFunction.apply(x, theta, levels, binary, estimator, width)


def last_token(x: Tensor) -> Tensor:
    """(B, T, ...) -> (B, ...), a copy: in a state, a view would keep the whole window alive for as long as the state."""
    return x[:, -1].clone(memory_format=torch.contiguous_format)


class SpikeStatistics(NamedTuple):
    """Running sum of |x| per channel and the tokens in it: what a causal channel threshold has to remember."""

    total: Tensor  # (B, D) fp32
    count: Tensor  # (B, 1) fp32


class TernarySpike(nn.Module):
    """amplitude * spikes(x), with theta = alpha * mean|x| [9].

    The mean is over the channels of one token (`token`), over one channel's tokens so far (`channel`), or the
    geometric mean of both (`mixed`). The channel mean starts as PRIOR tokens' worth of the token mean, so that the
    first tokens can fire, and sees neither the future nor other sequences; `mixed_fixed` takes channel means that were
    calibrated once, which needs no memory of the tokens before. alpha and amplitude are one scalar or one
    per channel. `dense` returns amplitude * x: the twin without spikes.
    """

    PRIOR = 4.0
    share = 1.0  # of the spikes in what training sees, the rest is x itself: annealing from dense to ternary

    def __init__(self, d_model: int, kind: str = "ternary", threshold: str = "token", granularity: str = "scalar",
                 alpha_init: float = 1.0, amplitude_init: float = 1.0, estimator: str = "clipped"):
        super().__init__()
        require(threshold in THRESHOLDS, "threshold", threshold, ", ".join(THRESHOLDS))
        require(granularity in GRANULARITIES, "granularity", granularity, ", ".join(GRANULARITIES))
        require(estimator in ESTIMATORS, "estimator", estimator, ", ".join(ESTIMATORS))
        self.levels = spike_levels(kind)
        self.kind, self.threshold, self.estimator = kind, threshold, estimator
        self.alpha_init, self.amplitude_init = alpha_init, amplitude_init
        size = d_model if granularity == "channel" else 1
        self.alpha = nn.Parameter(torch.full((size,), float(alpha_init)))
        self.amplitude = nn.Parameter(torch.full((size,), float(amplitude_init)))
        if threshold == "mixed_fixed":
            self.register_buffer("channel_mean", torch.ones(d_model))
        self.alpha.requires_grad_(kind != "dense")  # the twin has no threshold; several processes wait for gradients
        self.spikes = nn.Identity()  # all spikes pass through here: where they are observed and replaced

    def theta(self, x: Tensor, mask: Tensor | None = None,
              past: SpikeStatistics | None = None) -> tuple[Tensor, SpikeStatistics | None]:
        """Threshold of x (B, T, D), broadcastable to it, in fp32, and the statistics after its last token."""
        magnitude = x.detach().float().abs()
        token_mean = magnitude.mean(-1, keepdim=True)  # (B, T, 1)
        alpha = self.alpha.float().abs()  # reflected at zero: a threshold is not negative
        if self.threshold == "token":
            return alpha * token_mean, None
        if self.threshold == "mixed_fixed":
            return alpha * (self.channel_mean.float() * token_mean).sqrt(), None
        if mask is not None:
            magnitude = magnitude * mask.unsqueeze(-1)  # (B, T, D)
        weight = torch.ones_like(token_mean) if mask is None else mask.unsqueeze(-1).float()  # (B, T, 1)
        total, count = magnitude.cumsum(1), weight.cumsum(1)
        if past is not None:
            total, count = total + past.total.unsqueeze(1), count + past.count.unsqueeze(1)
        channel_mean = (self.PRIOR * token_mean + total) / (self.PRIOR + count)  # (B, T, D)
        mean = channel_mean if self.threshold == "channel" else (channel_mean * token_mean).sqrt()
        return alpha * mean, SpikeStatistics(last_token(total), last_token(count))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Sets the channel means of threshold `mixed_fixed` from a batch x (..., D)."""
        if self.threshold == "mixed_fixed":
            self.channel_mean.copy_(x.detach().float().abs().reshape(-1, x.shape[-1]).mean(0))

    def encode(self, x: Tensor, mask: Tensor | None = None,
               past: SpikeStatistics | None = None) -> tuple[Tensor, SpikeStatistics | None]:
        """Spikes of x (B, T, D) without their height, and the statistics after its last token."""
        if self.kind == "dense":
            return self.spikes(x), None
        theta, statistics = self.theta(x, mask, past)
        return self.spikes(ternary_spike(x, theta, self.estimator, self.levels, self.kind == "binary")), statistics

    def forward(self, x: Tensor, mask: Tensor | None = None,
                past: SpikeStatistics | None = None) -> tuple[Tensor, SpikeStatistics | None]:
        """amplitude * spikes of x (B, T, D), and the statistics after its last token."""
        spikes, statistics = self.encode(x, mask, past)
        if self.training and self.share < 1:
            spikes = torch.lerp(x, spikes.to(x.dtype), self.share)
        return self.amplitude.to(x.dtype) * spikes, statistics

    def extra_repr(self) -> str:
        return f"{self.kind}, threshold={self.threshold}, estimator={self.estimator}, size={self.alpha.numel()}"


class SpikeEncoder(nn.Module):
    """x ~ centre + amplitude * scale * s: spikes s in the place of x (B, T, X) where a Linear follows.

    centre, amplitude and alpha are per channel, scale = mean|x - centre| is one number per token, and s are the spikes
    of x - centre at theta = alpha * scale. The Linear after it can absorb all but s and scale (`fold`), so that the
    product that remains is between weights and {-1, 0, +1}, or event counts up to k for 'integer:k'. `dense` passes x
    on: the twin without spikes.
    """

    share = 1.0  # see TernarySpike

    def __init__(self, width: int, kind: str = "ternary", estimator: str = "clipped"):
        super().__init__()
        require(kind != "binary", "encoder_kind", kind, "dense, ternary, integer:k")
        require(estimator in ESTIMATORS, "estimator", estimator, ", ".join(ESTIMATORS))
        self.levels, self.kind, self.estimator = spike_levels(kind), kind, estimator
        self.centre = nn.Parameter(torch.zeros(width))
        self.alpha = nn.Parameter(torch.ones(width))
        self.amplitude = nn.Parameter(torch.ones(width))
        self.requires_grad_(kind != "dense")
        self.spikes = nn.Identity()

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Sets centre, alpha and amplitude from a batch x (..., X): the channel's median, 0.77 times its mean deviation
        (the optimum of a Gaussian; 0.67, 0.59 for counts up to 2, 3, near theirs), the least-squares height for it."""
        x = x.detach().float().reshape(-1, x.shape[-1])
        self.centre.copy_(x.median(0).values)
        x = x - self.centre
        x = x / x.abs().mean(-1, keepdim=True).clamp_min(1e-6)
        self.alpha.copy_(0.77 / (1 + 0.15 * (self.levels - 1)) * x.abs().mean(0).clamp_min(1e-3))
        count = sum((x.abs() > level * self.alpha).float() for level in range(1, self.levels + 1))
        height = (x.abs() * count).sum(0) / count.square().sum(0).clamp_min(1.0)
        # A channel that never fired here keeps a height, or it would never learn one.
        self.amplitude.copy_(torch.where(count.any(0), height, 1.53 * x.abs().mean(0).clamp_min(1e-3)))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Spikes (B, T, X) and the scale (B, T, 1) of x (B, T, X)."""
        x = x - self.centre.to(x.dtype)
        scale = x.float().abs().mean(-1, keepdim=True)
        theta = self.alpha.float().abs() * scale.detach()
        return self.spikes(ternary_spike(x, theta, self.estimator, self.levels)), scale

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, X) as its code reads it."""
        if self.kind == "dense":
            return self.spikes(x)
        spikes, scale = self.encode(x)
        code = self.centre.to(x.dtype) + (self.amplitude * scale).to(x.dtype) * spikes
        return torch.lerp(x, code, self.share) if self.training and self.share < 1 else code

    @torch.no_grad()
    def fold(self, linear: nn.Linear) -> nn.Linear:
        """A Linear for which linear(self(x)) = scale * (s @ weight^T) + bias: weight (out, X) takes the amplitude,
        bias (out,) the centre."""
        folded = nn.Linear(linear.in_features, linear.out_features).to(linear.weight)
        folded.weight.copy_(linear.weight * self.amplitude)
        folded.bias.copy_(linear.weight @ self.centre + (0 if linear.bias is None else linear.bias))
        return folded

    def extra_repr(self) -> str:
        return f"{self.kind}, estimator={self.estimator}, size={self.alpha.numel()}"


# ======================================================================================================
# 3  Recurrence
# ======================================================================================================
#
# The vector state: S_t = w * S_{t-1} + k_t * v_t per channel, read out as r_t * S_t. All forms take r, k, v
# (B, T, D), w (D,) in (0, 1) and the state before the first token (B, D), and return the read-out (B, T, D) in the
# dtype of k and the state after the last token (B, D) in fp32 (fp64 for fp64 inputs). The matrix state below has the
# same signature with heads, and S (B, H, N, N).


def _recurrence_inputs(r: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor | None):
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    update = k.to(dtype) * v.to(dtype)  # (B, T, D)
    start = update.new_zeros(update.shape[0], update.shape[2]) if state is None else state.to(dtype)
    return r.to(dtype), update, w.to(dtype), start


def recurrence_reference(r: Tensor, k: Tensor, v: Tensor, w: Tensor,
                         state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loop over tokens that the other forms are checked against."""
    gate, update, decay, S = _recurrence_inputs(r, k, v, w, state)
    out = []
    for t in range(update.shape[1]):
        S = decay * S + update[:, t]
        out.append(gate[:, t] * S)
    return torch.stack(out, 1).to(k.dtype), S


def recurrence_step(r: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token, T = 1: what decoding runs."""
    gate, update, decay, S = _recurrence_inputs(r, k, v, w, state)
    S = decay * S + update[:, 0]
    return (gate * S.unsqueeze(1)).to(k.dtype), S


def _scan(update: Tensor, decay: Tensor, S: Tensor, chunk: int) -> Tensor:
    """S_t = decay * S_{t-1} + update_t over dimension 1: update (B, T, D), decay (D,), S (B, D) -> (B, T, D).

    Inside all chunks at once by doubling: after the step with lag s every entry holds the sum over its last 2s
    updates, because sum_{j<2s} w^j = (1 + w^s) * sum_{j<s} w^j as shift operators. Then one carry per chunk.
    """
    B, T, D = update.shape
    n = -(-T // chunk)
    states = F.pad(update, (0, 0, 0, n * chunk - T)).view(B, n, chunk, D)  # zeros at the end change nothing before
    states = states.clone() if n * chunk == T else states
    power, lag = decay, 1
    while lag < chunk:
        states[:, :, lag:] += power * states[:, :, :-lag]
        power, lag = power * power, 2 * lag
    powers = decay.unsqueeze(0).pow(torch.arange(1, chunk + 1, device=decay.device).unsqueeze(1))  # (C, D): w .. w^C
    for i in range(n):
        states[:, i] += powers * S.unsqueeze(1)
        S = states[:, i, -1]
    return states.view(B, n * chunk, D)[:, :T]


class _VectorScan(torch.autograd.Function):
    """Gradients of a linear recurrence are the same recurrence run backwards; only the states are kept."""

    @staticmethod
    def forward(ctx, update: Tensor, decay: Tensor, S: Tensor, chunk: int) -> Tensor:
        states = _scan(update, decay, S, chunk)
        ctx.save_for_backward(states, decay, S)
        ctx.chunk = chunk
        return states

    @staticmethod
    def backward(ctx, grad: Tensor):
        states, decay, S = ctx.saved_tensors
        back = _scan(grad.flip(1), decay, torch.zeros_like(S), ctx.chunk).flip(1)  # (B, T, D)
        before = torch.cat((S.unsqueeze(1), states[:, :-1]), 1)
        return back, (back * before).sum((0, 1)), decay * back[:, 0], None


def recurrence_chunked(r: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor | None = None,
                       chunk: int = 32) -> tuple[Tensor, Tensor]:
    """The loop in chunks of `chunk` tokens (a power of two): log2(chunk) products over whole chunks and one carry
    per chunk. Only powers of w with exponents >= 0 appear, so that nothing overflows for any w in (0, 1)."""
    require(chunk >= 1 and chunk & (chunk - 1) == 0, "chunk", chunk, "a power of two")
    if k.shape[1] == 1:
        return recurrence_step(r, k, v, w, state)
    gate, update, decay, S = _recurrence_inputs(r, k, v, w, state)
    states = _VectorScan.apply(update, decay, S, chunk)
    return (gate * states).to(k.dtype), last_token(states)


def recurrence_cumsum(r: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The founders' formula, cumsum(kv / (w^t + 1e-8)) * w^t. It is wrong after about 20 tokens, where the 1e-8
    outgrows w^t, and exists only to show that."""
    gate, update, decay, S = _recurrence_inputs(r, k, v, w, state)
    steps = torch.arange(1, update.shape[1] + 1, device=k.device)
    powers = decay.unsqueeze(0).pow(steps.unsqueeze(1))  # (T, D)
    states = (update / (powers + 1e-8)).cumsum(1) * powers + powers * S.unsqueeze(1)
    return (gate * states).to(k.dtype), last_token(states)


# The matrix state, per head: S_t = diag(w) S_{t-1} + k_t v_t^T, read out as r_t S_t [10]. With `beta` it is the delta
# rule [11], [12]: only what the state does not yet hold under the key is written,
#     S_t = diag(w) S_{t-1} + beta_t k_t (v_t - k_t S_{t-1})^T,
# which needs |k| <= 1 and beta in (0, 1), or the state may grow. All forms take r, k (B, T, H, N), v (B, T, H, M),
# w (H, N), beta (B, T, H) or None and S (B, H, N, M), and return the read-out (B, T, H, M) in the dtype of k and the
# last state in fp32 (fp64 for fp64 inputs). Decays below MIN_DECAY count as MIN_DECAY in all of them, so that the
# powers of 1/w inside a chunk stay finite.

MIN_DECAY = 0.1


def _matrix_inputs(r: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor | None, beta: Tensor | None):
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    B, _, H, N = k.shape
    start = k.new_zeros(B, H, N, v.shape[-1], dtype=dtype) if state is None else state.to(dtype)
    w = w.to(dtype).clamp_min(MIN_DECAY)
    return r.to(dtype), k.to(dtype), v.to(dtype), w, start, None if beta is None else beta.to(dtype)


def matrix_recurrence_reference(r: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor | None = None,
                                beta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loop over tokens that the other forms are checked against."""
    dtype = k.dtype
    r, k, v, w, S, beta = _matrix_inputs(r, k, v, w, state, beta)
    out = []
    for t in range(k.shape[1]):
        write, value = k[:, t], v[:, t]  # (B, H, N), (B, H, M)
        if beta is not None:
            value = value - torch.einsum("bhn,bhnm->bhm", write, S)
            write = beta[:, t].unsqueeze(-1) * write
        S = w.unsqueeze(-1) * S + write.unsqueeze(-1) * value.unsqueeze(-2)
        out.append(torch.einsum("bhn,bhnm->bhm", r[:, t], S))
    return torch.stack(out, 1).to(dtype), S


def matrix_recurrence_step(r: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor | None = None,
                           beta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token, T = 1: what decoding runs."""
    return matrix_recurrence_reference(r, k, v, w, state, beta)


def matrix_recurrence_chunked(r: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor | None = None,
                              beta: Tensor | None = None, chunk: int = 32) -> tuple[Tensor, Tensor]:
    """The loop in chunks: inside a chunk of C tokens, (C, C) products; between chunks, one state.

    With W_i = w^i after i tokens of the chunk and S its first state, the values written are the rows of
        E = V - tril((k W^-)(beta k / W)^T, -1) E - (k W^-) S,    W^- = w^(i-1),
    a triangular system (the "UT transform" of [11]); without beta, E = V. Then
        out = (r W) S + tril((r W)(beta k / W)^T) E,    S' = W_C S + (beta k W_C / W)^T E.
    `chunk` is at most 32: 1/w^32 is finite in fp32 for every w from MIN_DECAY on.
    """
    require(1 <= chunk <= 32, "chunk", chunk, "1 to 32")
    if k.shape[1] == 1:
        return matrix_recurrence_step(r, k, v, w, state, beta)
    dtype = k.dtype
    r, k, v, w, S, beta = _matrix_inputs(r, k, v, w, state, beta)
    B, T, H, N = k.shape
    n = -(-T // chunk)

    def split(x: Tensor) -> Tensor:  # (B, T, H, X) -> (B, H, n, C, X), zeros at the end
        x = F.pad(x, (0, 0, 0, 0, 0, n * chunk - T))
        return x.view(B, n, chunk, H, -1).permute(0, 3, 1, 2, 4)

    steps = torch.arange(1, chunk + 1, device=k.device, dtype=w.dtype).unsqueeze(-1)  # (C, 1)
    log_w = w.log().view(H, 1, 1, N)
    r, k, v = split(r), split(k), split(v)
    write = k if beta is None else k * split(beta.unsqueeze(-1))
    read, inverse = r * (steps * log_w).exp(), write * (-steps * log_w).exp()
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=k.device).tril()
    attend = (read @ inverse.transpose(-1, -2)).masked_fill(~lower, 0)  # (B, H, n, C, C)
    written = v
    if beta is not None:
        before = k * ((steps - 1) * log_w).exp()
        system = (before @ inverse.transpose(-1, -2)).masked_fill(~lower.tril(-1), 0)  # the unit diagonal is implied
        both = torch.linalg.solve_triangular(system, torch.cat((v, before), -1), upper=False, unitriangular=True)
        written, before = both.split((v.shape[-1], N), -1)
    # w^(size - i) for the carry; padding ages no state: the last chunk counts the tokens that are there.
    last = T - (n - 1) * chunk
    carry = torch.cat(((chunk - steps).expand(n - 1, chunk, 1), (last - steps).clamp_min(0).unsqueeze(0)))  # (n, C, 1)
    end = write * (carry * log_w).exp()  # (B, H, n, C, N)
    # unbind and not an index in the loop: the gradient of an index is a tensor of zeros as large as the whole.
    parts = [x.unbind(2) for x in (read, attend, written, end)]
    holds = before.unbind(2) if beta is not None else ()
    out = []
    for i, (read_i, attend_i, E, end_i) in enumerate(zip(*parts)):
        if beta is not None:
            E = E - holds[i] @ S  # (B, H, C, M)
        out.append(read_i @ S + attend_i @ E)
        S = ((chunk if i < n - 1 else last) * log_w).exp().view(H, N, 1) * S + end_i.transpose(-1, -2) @ E
    out = torch.stack(out, 2).permute(0, 2, 3, 1, 4).reshape(B, n * chunk, H, -1)[:, :T]
    return out.to(dtype), S


RECURRENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": recurrence_reference, "chunked": recurrence_chunked, "cumsum": recurrence_cumsum}
MATRIX_RECURRENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": matrix_recurrence_reference, "chunked": matrix_recurrence_chunked}


# ======================================================================================================
# 4  Model
# ======================================================================================================


class LayerState(NamedTuple):
    """What one layer remembers of the tokens before: its size does not depend on how many they were."""

    S: Tensor  # (B, D), or (B, H, N, N) of a matrix state, fp32
    shift: Tensor  # (B, D), input of the token shift at the last token
    k_statistics: SpikeStatistics | None = None
    v_statistics: SpikeStatistics | None = None


class GooseState(NamedTuple):
    """The cache of `generate`."""

    layers: tuple[LayerState, ...]
    position: Tensor  # (B,) tokens seen, padding not counted
    length: int  # tokens seen, padding counted

    def reorder(self, index: Tensor) -> GooseState:
        """The states of the sequences `index` (B',), for beam search."""
        def select(item):
            if isinstance(item, Tensor):
                return item.index_select(0, index.to(item.device))
            return type(item)(*map(select, item)) if isinstance(item, tuple) else item
        return GooseState(tuple(select(layer) for layer in self.layers), select(self.position), self.length)


def spike_encoder(config: GooseConfig, site: str, width: int) -> nn.Module:
    """What stands at a site before a Linear: an encoder where `spike_sites` names the site, else nothing."""
    if site not in config.spike_sites:
        return nn.Identity()
    kind = "dense" if config.spike_kind == "dense" else config.encoder_kind
    return SpikeEncoder(width, kind, config.estimator)


class TimeMix(nn.Module):
    """Token shift, ternary keys and values, a decaying state, a receptance gate [1].

    k = spike(W_k x_k), v = spike(W_v x_v), r = sigmoid(W_r x_r) with x_* = x * m_* + previous x * (1 - m_*).
    """

    INPUTS = ("k", "v", "r")

    def __init__(self, config: GooseConfig, layer: int):
        super().__init__()
        D, bias = config.d_model, config.projection_bias
        self.layer, self.n_layer = layer, config.n_layer
        self.decay_init, self.mix_init = config.decay_init, config.mix_init
        self.project_first = config.output_order == "project_first"
        self.recurrence = config.recurrence
        for name in self.INPUTS:
            setattr(self, f"mix_{name}", nn.Parameter(torch.empty(D)))
        self.decay_logit = nn.Parameter(torch.empty(D))
        self.key, self.value, self.receptance, self.output = (nn.Linear(D, D, bias=bias) for _ in range(4))
        self.output.into_residual = True
        spike = (D, config.spike_kind, config.threshold, config.granularity, config.alpha_init, config.amplitude_init,
                 config.estimator)
        self.spike_k, self.spike_v = TernarySpike(*spike), TernarySpike(*spike)
        self.mix_in = nn.ModuleDict({name: spike_encoder(config, "mix_in", D) for name in self.INPUTS})
        self.mix_out = spike_encoder(config, "mix_out", D)

    def initial(self) -> dict[str, Tensor]:
        """Start values of mixes and decay logits, (D,) each.

        `published`: every decay sigmoid(-0.5) = 0.378, mixes 1 - layer/(L-1). `spread`: decays sigmoid(0.5 .. 6),
        memories of one to four hundred tokens; mixes from 1 down to 0.5 over the channels.
        """
        D = self.decay_logit.numel()
        decay = torch.full((D,), -0.5) if self.decay_init == "published" else torch.linspace(0.5, 6.0, D)
        if self.mix_init == "published":
            mix = torch.full((D,), 1.0 - self.layer / max(1, self.n_layer - 1))
        else:
            mix = torch.linspace(1.0, 0.5, D)
        return {"decay_logit": decay, **{f"mix_{name}": mix for name in self.INPUTS}}

    def forward(self, x: Tensor, mask: Tensor | None = None,
                past: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """x (B, T, D), mask (B, T) with 0 at padding -> (B, T, D) and the state after the last token."""
        B, T, D = x.shape
        if mask is not None:
            x = x * mask.unsqueeze(-1).to(x.dtype)  # (B, T, D): nothing of a pad reaches the token after it
        before = x.new_zeros(B, 1, D) if past is None else past.shift.to(x.dtype).unsqueeze(1)
        previous = torch.cat((before, x[:, :-1]), 1)  # (B, T, D)
        change = x - previous
        inputs = {name: self.mix_in[name](previous + change * getattr(self, f"mix_{name}")) for name in self.INPUTS}
        k, k_statistics = self.spike_k(self.key(inputs["k"]), mask, past.k_statistics if past else None)
        v, v_statistics = self.spike_v(self.value(inputs["v"]), mask, past.v_statistics if past else None)
        if mask is not None:
            k = k * mask.unsqueeze(-1).to(k.dtype)
        out, S = self.remember(inputs, k, v, past.S if past else None)
        return out, LayerState(S, last_token(x), k_statistics, v_statistics)

    def remember(self, inputs: dict[str, Tensor], k: Tensor, v: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, T, D) to the state, reads it and projects: (B, T, D) and the last state (B, D)."""
        r = torch.sigmoid(self.receptance(inputs["r"]))
        w = torch.sigmoid(self.decay_logit.float())
        scan = RECURRENCES[self.recurrence]
        if self.project_first:
            out, S = scan(torch.ones_like(k), k, v, w, S)
            return r * self.output(out), S
        out, S = scan(r, k, v, w, S)
        return self.output(self.mix_out(out)), S


class MatrixTimeMix(TimeMix):
    """The same with an N x N state per head, read by a receptance without a sigmoid, group norm and an output gate.

    state_kind `matrix`: S_t = diag(w) S_{t-1} + k v^T, keys scaled by sqrt(1 - w^2), so that channels of long and
    short memory weigh alike; the update adds or subtracts where k and v both fire. `delta`: keys of length below one and
    beta = sigmoid(W_b x_k) per head, see `matrix_recurrence_reference`; what is written, v - k S, is then not ternary,
    and only its rows, those where k fires, are sparse.
    """

    INPUTS = ("k", "v", "r", "g")

    def __init__(self, config: GooseConfig, layer: int):
        super().__init__(config, layer)
        D = config.d_model
        self.heads = D // config.head_width
        self.gate = nn.Linear(D, D)
        self.gate.initial_bias = 1.0  # gates start near silu(1) = 0.73 and beta at 0.5
        self.norm = nn.GroupNorm(self.heads, D, eps=config.layer_norm_epsilon)
        self.beta = nn.Linear(D, self.heads) if config.state_kind == "delta" else None
        if self.beta is not None:
            self.beta.starts_at_zero = True

    def initial(self) -> dict[str, Tensor]:
        """As in TimeMix, with the decays spread over the channels of each head."""
        values = super().initial()
        if self.decay_init == "spread":
            D = self.decay_logit.numel()
            values["decay_logit"] = torch.linspace(0.5, 6.0, D // self.heads).repeat(self.heads)
        return values

    def remember(self, inputs: dict[str, Tensor], k: Tensor, v: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, T, D) to the state, reads it and projects: (B, T, D) and the last state (B, H, N, N)."""
        B, T, D = k.shape
        r, gate = self.receptance(inputs["r"]), F.silu(self.gate(inputs["g"]))
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        beta = None if self.beta is None else torch.sigmoid(self.beta(inputs["k"]).to(dtype))  # (B, T, H)
        with torch.autocast(k.device.type, enabled=False):
            r, k, v = (x.to(dtype).view(B, T, self.heads, -1) for x in (r, k, v))  # (B, T, H, N)
            w = torch.sigmoid(self.decay_logit.to(dtype)).view(self.heads, -1)  # (H, N)
            if beta is None:
                k = k * (1 - w.square()).sqrt()
            else:
                # The one is small beside the events of a head, and keeps a head without any at zero.
                k = k * (k.square().sum(-1, keepdim=True) + 1.0).rsqrt()
            out, S = MATRIX_RECURRENCES[self.recurrence](r, k, v, w, S, beta)
            out = F.group_norm(out.reshape(B * T, D), self.heads, self.norm.weight.to(dtype), self.norm.bias.to(dtype),
                               self.norm.eps).view(B, T, D)
        return self.output(self.mix_out(out.to(gate.dtype) * gate)), S


class FeedForward(nn.Module):
    """W_2 act(W_1 x), (B, T, D) -> (B, T, D) through width F."""

    def __init__(self, config: GooseConfig):
        super().__init__()
        activations = import_optional("transformers.activations").ACT2FN
        require(config.activation in activations, "activation", config.activation, ", ".join(sorted(activations)))
        self.up = nn.Linear(config.d_model, config.ffn_width)
        self.activation = activations[config.activation]
        self.down = nn.Linear(config.ffn_width, config.d_model)
        self.down.into_residual = True
        self.ffn_in = spike_encoder(config, "ffn_in", config.d_model)
        self.ffn_hidden = spike_encoder(config, "ffn_hidden", config.ffn_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.down(self.ffn_hidden(self.activation(self.up(self.ffn_in(x)))))


@functools.cache
def _compiled_layer() -> Callable[..., tuple[Tensor, LayerState]]:
    def layer(block: GooseBlock, x: Tensor, past: LayerState, structure: str) -> tuple[Tensor, LayerState]:
        require(bool(structure), "structure", structure, "that of compile_step")  # only what is read is guarded
        return block.layer(x, past)

    def guards(entries: Iterable[Any]) -> list[bool]:
        # A block has 600 facts that torch.compile would check at each token, a fifth of its time. `structure` stands for
        # those that are no tensors.
        return [entry.guard_type == "TENSOR_MATCH" or not (entry.is_global or re.match(r"block\b", entry.name))
                for entry in entries]
    return torch.compile(layer, options={"guard_filter_fn": guards})


class GooseBlock(GradientCheckpointingLayer):
    """x + time_mix(LN(x)), then x + FFN(LN(x)). Where `model.gradient_checkpointing_enable()` was called, training keeps
    only a block's input and computes the rest again in the backward pass."""

    compiled = ""  # what `compile_step` calls the structure of a block whose decoding steps are compiled

    def __init__(self, config: GooseConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.time_mix = (TimeMix if config.state_kind == "vector" else MatrixTimeMix)(config, layer)
        self.ln_2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, mask: Tensor | None = None,
                past: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """x (B, T, D), mask (B, T) with 0 at padding -> (B, T, D) and the state after the last token."""
        if (self.compiled and x.shape[1] == 1 and mask is None and past is not None
                and not self.training and not torch.is_grad_enabled()):
            return _compiled_layer()(self, x, past, self.compiled)
        return self.layer(x, past, mask)

    def layer(self, x: Tensor, past: LayerState | None = None, mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """What `forward` computes; here it can be compiled."""
        mixed, state = self.time_mix(self.ln_1(x), mask, past)
        x = x + mixed
        return x + self.ffn(self.ln_2(x)), state


@dataclass
class GooseOutput(ModelOutput):
    """Output of GooseModel and GooseForCausalLM. `hidden_states` follows GPT-2: embeddings, then each block, the
    last of them after the final LayerNorm."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    state: GooseState | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class GoosePreTrainedModel(PreTrainedModel):
    """Initialisation and loading, as transformers expects them."""

    config_class = GooseConfig
    base_model_prefix = "goose"
    _no_split_modules = ["GooseBlock"]
    _is_stateful = True
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over tokens; a Trainer divides it by its accumulation steps

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            # The branches into the residual stream start small, as in GPT-2.
            small = math.sqrt(2 * self.config.n_layer) if getattr(module, "into_residual", False) else 1.0
            nn.init.normal_(module.weight, std=0.0 if getattr(module, "starts_at_zero", False) else std / small)
            if module.bias is not None:
                nn.init.constant_(module.bias, getattr(module, "initial_bias", 0.0))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, TernarySpike, SpikeEncoder)):
            start = {"bias": 0.0, "centre": 0.0, "alpha": getattr(module, "alpha_init", 1.0),
                     "amplitude": getattr(module, "amplitude_init", 1.0)}
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                nn.init.constant_(tensor, start.get(name, 1.0))
        elif isinstance(module, TimeMix):
            for name, value in module.initial().items():
                parameter = getattr(module, name)
                if not getattr(parameter, "_is_hf_initialized", False):
                    parameter.copy_(value)


class GooseModel(GoosePreTrainedModel):
    """Embeddings, blocks and the final LayerNorm."""

    def __init__(self, config: GooseConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.n_positions, config.d_model)
        self.blocks = nn.ModuleList(GooseBlock(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.head_in = spike_encoder(config, "head_in", config.d_model)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                state: GooseState | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
                output_hidden_states: bool | None = None, return_dict: bool | None = True,
                **unused: Any) -> GooseOutput:
        """input_ids (B, T) -> last hidden state (B, T, D).

        `attention_mask` is (B, T), or (B, seen + T) as `generate` passes it, 1 at tokens and 0 at padding. With a
        state, padding stands on the left: a pad after a token would age the state, and raises ValueError where a state
        is given or asked for. Positions
        count tokens without padding; past n_positions the last one is kept, so that a sequence may go on.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        asked = use_cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        mask = None
        if attention_mask is not None:
            require(attention_mask.dim() == 2, "attention_mask", tuple(attention_mask.shape), "(B, T), 0 at padding")
            mask = attention_mask[:, -T:].to(x.device).bool()
            # A state that has seen tokens stands for a token before the first one here.
            seen_any = mask.new_zeros(B) if state is None else (state.position > 0).to(mask.device)
            before = torch.cat((seen_any.unsqueeze(1), mask[:, :-1]), 1)
            if bool(mask.all()):
                mask = None
            elif (use_cache or state is not None) and bool((before & ~mask).any()):
                if asked is None and state is None:
                    use_cache = False  # nobody asked for a state: a padded evaluation batch needs none
                else:
                    raise ValueError("attention_mask has padding after a token; a recurrent state needs padding on the "
                                     "left (tokenizer.padding_side = 'left') or use_cache=False.")
        counted = torch.ones(B, T, dtype=torch.long, device=x.device) if mask is None else mask.long()
        seen = counted.cumsum(1)
        start = 0 if state is None else state.position.unsqueeze(1)
        index = (start + seen - 1).clamp(0, self.config.n_positions - 1)
        x = x + self.positions(index)
        hidden, layers = [], []
        for i, block in enumerate(self.blocks):
            hidden.append(x)
            x, layer_state = block(x, mask, state.layers[i] if state is not None else None)
            if use_cache:  # training asks for none, and would hold them all until the backward pass
                layers.append(layer_state)
        x = self.head_in(self.ln_f(x))
        hidden.append(x)
        after = None
        if use_cache:
            before = (0, 0) if state is None else (state.position, state.length)
            after = GooseState(tuple(layers), before[0] + seen[:, -1], before[1] + T)
        result = GooseOutput(last_hidden_state=x, state=after,
                             hidden_states=tuple(hidden) if output_hidden_states else None)
        return result if return_dict in (None, True) else result.to_tuple()


class GooseForCausalLM(GoosePreTrainedModel, GenerationMixin):
    """GooseModel with a language-model head tied to the embeddings.

    `save_pretrained` copies this file beside the weights, so that `AutoModelForCausalLM.from_pretrained(folder,
    trust_remote_code=True)` needs nothing but the folder. `generate` supports greedy decoding, sampling and beam
    search, with the recurrent state as cache.

    The folder student/ of a run is a whole repository for the hub, model card and tokenizer included:
    `hf upload <you>/<name> outputs/<version>/<run>/student .` (after `hf auth login`) puts it there.
    `student.push_to_hub("<you>/<name>")` uploads config, weights and this file, `tokenizer.push_to_hub` the tokenizer;
    neither has the card. `from_pretrained("<you>/<name>", trust_remote_code=True)` loads either.
    """

    _tied_weights_keys = {"lm_head.weight": "goose.embeddings.weight"}
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: GooseConfig):
        super().__init__(config)
        self.goose = GooseModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                state: GooseState | None = None, labels: Tensor | None = None, inputs_embeds: Tensor | None = None,
                use_cache: bool | None = None, output_hidden_states: bool | None = None,
                logits_to_keep: int | Tensor = 0, return_dict: bool | None = True, **unused: Any) -> GooseOutput:
        """input_ids (B, T) -> logits (B, T, V); `labels` (B, T) are shifted here and -100 is ignored, as in
        GPT2LMHeadModel. `logits_to_keep` keeps only the last so many positions, as `generate` asks."""
        use_cache = False if use_cache is None and self.training else use_cache
        out = self.goose(input_ids, attention_mask, state, inputs_embeds, use_cache, output_hidden_states)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else (
            slice(None) if isinstance(logits_to_keep, int) else logits_to_keep)
        logits = self.lm_head(out.last_hidden_state[:, keep])  # (B, T or kept, V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        result = GooseOutput(loss=loss, logits=logits, state=out.state, hidden_states=out.hidden_states)
        return result if return_dict in (None, True) else result.to_tuple()

    @classmethod
    def _supports_default_dynamic_cache(cls, *_args: Any) -> bool:
        return False  # the cache is a GooseState, made by the first forward pass

    def prepare_inputs_for_generation(self, input_ids: Tensor, state: GooseState | None = None,
                                      attention_mask: Tensor | None = None, use_cache: bool | None = None,
                                      inputs_embeds: Tensor | None = None, past_key_values: GooseState | None = None,
                                      **unused: Any) -> dict[str, Any]:
        """Called by `generate` before each forward pass: the tokens the state has not seen yet."""
        state = state if past_key_values is None else past_key_values
        if inputs_embeds is not None and (state is None or input_ids.shape[1] == 0):
            return {"inputs_embeds": inputs_embeds, "state": state, "attention_mask": attention_mask,
                    "use_cache": use_cache}
        if state is not None:
            # The mask covers all tokens, those of the state included; input_ids may hold all of them or the new ones.
            total = input_ids.shape[1] + (0 if inputs_embeds is None else inputs_embeds.shape[1])
            new = (total if attention_mask is None else attention_mask.shape[1]) - state.length
            if new < 1:
                raise ValueError(f"The state has seen {state.length} tokens and no new one follows; give generate all "
                                 "tokens, or the new ones with the attention_mask of all.")
            input_ids = input_ids[:, -new:]
            attention_mask = None if attention_mask is None else attention_mask[:, -new:]
        return {"input_ids": input_ids, "state": state, "attention_mask": attention_mask, "use_cache": use_cache}

    def _update_model_kwargs_for_generation(self, outputs: GooseOutput, model_kwargs: dict[str, Any],
                                            *args: Any, **kwargs: Any) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        model_kwargs.pop("state", None)
        if outputs.state is not None:
            # Under this name beam search reorders it, also in early transformers 5, which looks for no other.
            model_kwargs["past_key_values"] = outputs.state
        return model_kwargs

    def _reorder_cache(self, state: GooseState, beam_idx: Tensor) -> GooseState:
        return state.reorder(beam_idx)


def register_auto_classes() -> None:
    """Makes AutoConfig and AutoModelForCausalLM know 'goose' in this process, without trust_remote_code."""
    from transformers import AutoConfig, AutoModelForCausalLM
    AutoConfig.register("goose", GooseConfig, exist_ok=True)
    AutoModelForCausalLM.register(GooseConfig, GooseForCausalLM, exist_ok=True)


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once, also on the meta device, where early transformers 5 does not tie them."""
    config = getattr(model, "config", None)
    tied = (getattr(model, "_tied_weights_keys", None) or {}) if getattr(config, "tie_word_embeddings", False) else {}
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)


# ======================================================================================================
# 5  Losses
# ======================================================================================================

LOGIT_COPIES = 8  # fp32 (rows, V) tensors alive at once inside one chunk of the losses below
LOGIT_BUDGET = {"cpu": 24 * 2**20, "cuda": 768 * 2**20}  # bytes for them: a share of the CPU's cache; of a T4's 16 GB


def _rows_per_chunk(vocab_size: int, budget: int | None, device: torch.device) -> int:
    budget = LOGIT_BUDGET.get(device.type, LOGIT_BUDGET["cpu"]) if budget is None else budget
    return max(1, budget // (4 * LOGIT_COPIES * vocab_size))


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class _ChunkedDistillation(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of tokens, so that no (tokens, V) tensor ever exists."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, tau, labels, kd_weight, ce_weight, want_ce, budget):
        n, D = hidden.shape
        V = head.shape[0]
        dtype = _compute_dtype(hidden)
        needs = any(ctx.needs_input_grad)
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.detach().to(dtype)
            teacher_weight = None if teacher_head is None else teacher_head.detach().to(dtype)
            grad_hidden = torch.zeros(n, D, device=hidden.device) if needs else None
            grad_head = torch.zeros(V, D, device=hidden.device) if needs else None
            kd, ce, grad_tau = (torch.zeros((), device=hidden.device) for _ in range(3))
            valid = 0 if labels is None else max(1, int((labels >= 0).sum()))
            rows = _rows_per_chunk(V, budget, hidden.device)
            # fp16 ends at 65504 and at 6e-8: the largest possible sum over a chunk's rows stays below 256 tau |h|, and
            # the smallest probability that still counts is about 1e-7.
            lift = 256.0 / min(n, rows) if dtype == torch.float16 else 1.0
            for start in range(0, n, rows):
                part = slice(start, min(n, start + rows))
                h = hidden[part].detach().to(dtype)  # (R, D)
                z = (h @ weight.t()).float()  # (R, V)
                gradient = None
                if teacher_weight is not None and kd_weight:
                    p_s = F.log_softmax(z / tau, -1)
                    p_t = (teacher_hidden[part].detach().to(dtype) @ teacher_weight.t()).float()
                    p_t = F.log_softmax(p_t.div_(tau), -1)
                    difference = p_t - p_s  # log p_teacher - log p_student
                    log_t = p_t.clone() if tau.requires_grad else None
                    p_t.exp_()
                    kl = (p_t * difference).sum(-1)  # (R,)
                    kd += tau**2 * kl.sum() / n
                    if tau.requires_grad:
                        # d(tau^2 KL)/dtau; logits enter only up to a constant, so log-probabilities stand for them.
                        slope = ((p_t - p_s.exp()) * p_s).sum(-1)
                        slope -= (p_t * (difference - kl.unsqueeze(-1)) * log_t).sum(-1)
                        grad_tau += kd_weight * (2 * tau * kl.sum() + tau * slope.sum()) / n
                    if needs:
                        gradient = p_s.exp_().sub_(p_t).mul_(kd_weight * tau / n * lift)
                if labels is not None and (want_ce or ce_weight):
                    target = labels[part]
                    keep = target >= 0
                    log_p = F.log_softmax(z, -1)
                    ce -= log_p.gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1)[keep].sum() / valid
                    if needs and ce_weight:
                        dz = log_p.exp_()
                        dz.scatter_add_(1, target.clamp_min(0).unsqueeze(1), -torch.ones_like(dz[:, :1]))
                        dz.mul_((keep.float() * (ce_weight / valid * lift)).unsqueeze(1))
                        gradient = dz if gradient is None else gradient.add_(dz)
                if gradient is not None:
                    gradient = gradient.mul_(n).to(dtype)  # of order one inside the half-precision products
                    grad_hidden[part] = (gradient @ weight).float().div_(n * lift)
                    grad_head.add_((gradient.t() @ h).float(), alpha=1 / (n * lift))
        if needs:
            ctx.save_for_backward(grad_hidden, grad_head, grad_tau)
            ctx.dtypes = hidden.dtype, head.dtype
        ctx.mark_non_differentiable(kd, ce)
        return kd_weight * kd + ce_weight * ce, kd, ce

    @staticmethod
    def backward(ctx, grad, _kd, _ce):
        grad_hidden, grad_head, grad_tau = ctx.saved_tensors
        return ((grad_hidden * grad).to(ctx.dtypes[0]), (grad_head * grad).to(ctx.dtypes[1]), None, None,
                grad_tau * grad if ctx.needs_input_grad[4] else None, None, None, None, None, None)


class DistillationLoss(NamedTuple):
    """loss = kd_weight * kd + ce_weight * ce; only `loss` carries gradients."""

    loss: Tensor
    kd: Tensor  # tau^2 KL(teacher || student), nats per token
    ce: Tensor  # cross-entropy, nats per token; 0 where it was not asked for


def chunked_distillation(hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None = None,
                         teacher_head: Tensor | None = None, tau: Tensor | float = 1.0, labels: Tensor | None = None,
                         kd_weight: float = 1.0, ce_weight: float = 0.0, want_ce: bool = True,
                         budget: int | None = None) -> DistillationLoss:
    """Distillation and cross-entropy from final hidden states, without (tokens, V) tensors.

    Logits are made, used and dropped in chunks whose fp32 copies stay below `budget` bytes together (LOGIT_BUDGET);
    the gradients of hidden states, head and tau are formed in the same pass, so that the backward pass makes no logits again.

    Args:
        hidden: (..., D) student states after the last LayerNorm; head: (V, D).
        teacher_hidden: (..., D_teacher); teacher_head: (V, D_teacher). Neither gets a gradient.
        tau: temperature; a tensor may require a gradient.
        labels: (...) next tokens, negative ones ignored.
    Returns:
        KL is summed over the vocabulary and averaged over tokens (batchmean), times tau^2 [3].
    Raises:
        ValueError when the two heads have different vocabularies.
    """
    if teacher_head is not None and teacher_head.shape[0] != head.shape[0]:
        raise ValueError(f"teacher vocabulary is {teacher_head.shape[0]} and the student's {head.shape[0]}; they must "
                         "be the same tokenizer.")
    tau = torch.as_tensor(tau, dtype=torch.float32, device=hidden.device)
    flat = None if teacher_hidden is None else teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    return DistillationLoss(*_ChunkedDistillation.apply(
        hidden.reshape(-1, hidden.shape[-1]), head, flat, teacher_head, tau,
        None if labels is None else labels.reshape(-1), kd_weight if teacher_head is not None else 0.0, ce_weight,
        want_ce, budget))


def chunked_kl(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor,
               tau: Tensor | float = 1.0, budget: int | None = None) -> Tensor:
    """tau^2 KL(teacher || student) in nats per token; see `chunked_distillation`."""
    return chunked_distillation(hidden, head, teacher_hidden, teacher_head, tau, budget=budget).loss


@torch.no_grad()
def chunked_nll(hidden: Tensor, head: Tensor, labels: Tensor, budget: int | None = None) -> Tensor:
    """Negative log-likelihood of each label in nats, in fp32: hidden (..., D), head (V, D), labels (...) -> (...)."""
    flat, target = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    dtype = _compute_dtype(hidden)
    rows = _rows_per_chunk(head.shape[0], budget, hidden.device)
    weight = head.to(dtype)
    parts = [F.cross_entropy((flat[i:i + rows].to(dtype) @ weight.t()).float(), target[i:i + rows], reduction="none")
             for i in range(0, flat.shape[0], rows)]
    return torch.cat(parts).view(labels.shape)


class Temperature(nn.Module):
    """Distillation temperature tau.

    `fixed`; `staged`: 1.0, 1.5, 2.0 in thirds of the run (POCL); learned by CTKD [4], where gradient reversal makes
    the temperature raise the loss that the student lowers: `bounded`, tau_min + (tau_max - tau_min) * sigmoid(p) with
    lambda rising linearly over the warm-up, and `paper`, 1 + 20 * sigmoid(p) with lambda on a cosine over it.
    Without reversal (v12) tau lowers the loss too.
    """

    STAGES = (1.0, 1.5, 2.0)

    def __init__(self, mode: str = "bounded", tau: float = 2.0, tau_min: float = 1.0, tau_max: float = 5.0,
                 gradient_reversal: bool = True, lambda_max: float = 1.0, lambda_warmup_ratio: float = 0.25):
        super().__init__()
        require(mode in TEMPERATURES, "temperature", mode, ", ".join(TEMPERATURES))
        self.mode, self.reversal = mode, gradient_reversal
        self.lambda_max, self.lambda_warmup_ratio = lambda_max, lambda_warmup_ratio
        self.low, self.high = (1.0, 21.0) if mode == "paper" else (tau_min, tau_max)
        self.start = tau
        if mode in ("bounded", "paper"):
            require(self.low < tau < self.high, "tau", tau, f"between {self.low} and {self.high}, exclusive")
            share = (tau - self.low) / (self.high - self.low)
            self.logit = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    def strength(self, progress: float) -> float:
        """lambda at a share of the run in [0, 1]."""
        done = min(1.0, progress / self.lambda_warmup_ratio) if self.lambda_warmup_ratio else 1.0
        return self.lambda_max * (0.5 * (1 - math.cos(math.pi * done)) if self.mode == "paper" else done)

    def forward(self, progress: float = 1.0) -> Tensor:
        """tau, a scalar tensor, at a share of the run in [0, 1]."""
        if self.mode == "fixed":
            return torch.tensor(float(self.start))
        if self.mode == "staged":
            return torch.tensor(self.STAGES[min(2, int(3 * progress))])
        tau = self.low + (self.high - self.low) * torch.sigmoid(self.logit)
        if self.reversal and tau.requires_grad:
            tau.register_hook(lambda grad: -self.strength(progress) * grad)
        return tau


def unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased HSIC with linear kernels (Song et al. 2012, eq. 5 [7]): x (n, d1), y (n, d2), n >= 4 -> scalar.

    Computed from features in O(n d1 d2), the (n, n) kernels are never formed. Can be negative.
    """
    n = x.shape[0]
    require(n >= 4 and y.shape[0] == n, "samples of x and y", (n, y.shape[0]), "equal and at least 4")
    with torch.autocast(x.device.type, enabled=False):  # sums over thousands of rows overflow fp16
        x, y = x.float(), y.float()
        x, y = x - x.mean(0), y - y.mean(0)  # the estimator does not see a shift; the rounding does
        kk, ll = x.square().sum(1), y.square().sum(1)  # diagonals of both kernels, (n,)
        row_k, row_l = x @ x.sum(0) - kk, y @ y.sum(0) - ll  # row sums without the diagonal, (n,)
        total = (x.t() @ y).square().sum() - (kk * ll).sum() + row_k.sum() * row_l.sum() / ((n - 1) * (n - 2))
        return (total - 2 * (row_k * row_l).sum() / (n - 2)) / (n * (n - 3))


def linear_cka(x: Tensor, y: Tensor, unbiased: bool = True) -> Tensor:
    """Linear CKA [6] of x (n, d1) and y (n, d2). Unbiased, independent noise gives 0 on average; biased, about
    d / (n + d)."""
    if unbiased:
        norm = (unbiased_hsic(x, x) * unbiased_hsic(y, y)).clamp_min(1e-20).sqrt()
        return unbiased_hsic(x, y) / norm
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float() - x.float().mean(0), y.float() - y.float().mean(0)
        return (x.t() @ y).square().sum() / ((x.t() @ x).norm() * (y.t() @ y).norm()).clamp_min(1e-20)


def token_variance(x: Tensor) -> Tensor:
    """(B, T, D) -> (D,) variance of each channel over the tokens, of all processes' batches together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x.var((0, 1))
    rows = x.flatten(0, 1).double()
    sums = torch.cat((rows.sum(0), rows.square().sum(0), rows.new_tensor([len(rows)])))
    torch.distributed.all_reduce(sums)
    (total, squares), n = sums[:-1].view(2, -1), sums[-1]
    return ((squares - total.square() / n) / (n - 1)).to(x.dtype)


def span_ends(n_student: int, n_teacher: int) -> tuple[int, ...]:
    """The last teacher layer, from 0, of the span that each student layer stands for: (1, 3, 5) for 3 and 6,
    (2, 4, 7, 9, 11) for 5 and 12. Raises ValueError for a student deeper than the teacher."""
    require(n_student <= n_teacher, "n_layer", n_student, f"at most the teacher's {n_teacher} layers")
    return tuple(-(-(i + 1) * n_teacher // n_student) - 1 for i in range(n_student))


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of blocks of a causal language model. Raises ValueError for an architecture not known here."""
    for path in ("goose.blocks", "transformer.h", "model.layers", "gpt_neox.layers", "backbone.layers"):
        with contextlib.suppress(AttributeError):
            return model.get_submodule(path)
    raise ValueError(f"{type(model).__name__} has no list of blocks at a known place (GPT-2, Llama, NeoX, Goose).")


@contextlib.contextmanager
def capture_blocks(model: nn.Module, layers: Iterable[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Collects {layer: (input, output)} of blocks during forward passes; both are (B, T, D) of the residual stream,
    free of the final LayerNorm that `hidden_states[-1]` has gone through."""
    captured: dict[int, tuple[Tensor, Tensor]] = {}
    blocks = transformer_blocks(model)

    def keep(layer, _module, args, kwargs, output):
        captured[layer] = (args[0] if args else kwargs["hidden_states"],
                           output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as hooks:  # removed whatever is raised
        for layer in layers:
            hooks.enter_context(blocks[layer].register_forward_hook(functools.partial(keep, layer), with_kwargs=True))
        yield captured


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts models into eval mode for a block, and each back into its own mode after it, whatever is raised."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, modes):
            model.train(mode)


def spike_modules(student: nn.Module) -> dict[str, nn.Module]:
    """{"layer.site": module} of every spike site, in the order of the forward pass; mix_in has one for each of its
    inputs, "0.mix_in.k". All spikes pass through the module's `spikes`."""
    found: dict[str, nn.Module] = {}
    for i, block in enumerate(transformer_blocks(student)):
        mix, ffn = block.time_mix, block.ffn
        sites = {**{f"mix_in.{name}": module for name, module in mix.mix_in.items()}, "k": mix.spike_k,
                 "v": mix.spike_v, "mix_out": mix.mix_out, "ffn_in": ffn.ffn_in, "ffn_hidden": ffn.ffn_hidden}
        found.update({f"{i}.{name}": getattr(m, "encoder", m) for name, m in sites.items()})
    head_in = student.base_model.head_in
    # A sparse copy (section 9) has encoders inside other modules.
    found["head_in"] = getattr(getattr(student.get_output_embeddings(), "encode", head_in), "encoder", head_in)
    return {name: m for name, m in found.items() if isinstance(m, (TernarySpike, SpikeEncoder))}


@contextlib.contextmanager
def spike_hooks(student: nn.Module, function: Callable[[str, Tensor], Tensor | None],
                names: Iterable[str] | None = None) -> Iterator[None]:
    """Calls function("layer.site", spikes (B, T, C)) wherever a site fires, or those in `names`; what it returns takes
    the spikes' place, unless that is None. The hooks go with the block, whatever is raised in it.

    Raises ValueError for a site that does not exist.
    """
    modules = spike_modules(student)
    chosen = list(modules) if names is None else list(names)
    for name in chosen:
        require(name in modules, "spike site", name, ", ".join(modules) or "none: the student has no spikes")
    with contextlib.ExitStack() as undo:
        for name in chosen:
            undo.enter_context(modules[name].spikes.register_forward_hook(
                lambda _m, _i, spikes, name=name: function(name, spikes)))
        for block in transformer_blocks(student):
            undo.callback(setattr, block, "compiled", block.compiled)
            block.compiled = ""  # a compiled step runs no hooks
        yield


@contextlib.contextmanager
def firing_rates(student: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the firing rate of each channel (C,) of every spike site: the counted one, with the gradient of a soft
    threshold of width theta / 4."""
    rates: list[Tensor] = []
    fired: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        x = args[0]  # (..., C)
        if isinstance(module, SpikeEncoder):
            x = x - module.centre
            theta = module.alpha.float().abs() * x.float().abs().mean(-1, keepdim=True).detach()
        else:
            theta = module.theta(x)[0]
        x = x.float() if module.kind == "binary" else x.float().abs()
        soft = torch.sigmoid((x / theta.clamp_min(1e-6) - 1) / 0.25).flatten(0, -2).mean(0)
        rates.append((fired[name] != 0).float().flatten(0, -2).mean(0) + soft - soft.detach())

    with contextlib.ExitStack() as hooks:
        for name, module in spike_modules(student).items():
            hooks.enter_context(module.register_forward_hook(functools.partial(keep, name)))
        hooks.enter_context(spike_hooks(student, lambda name, spikes: fired.__setitem__(name, spikes.detach())))
        yield rates


def rate_penalty(rates: Iterable[Tensor], band: tuple[float, float]) -> Tensor:
    """Squared distance from the band, of each channel's rate and of a site's mean, averaged over sites. rates: (C,)."""
    def outside(rate: Tensor) -> Tensor:
        return (F.relu(rate - band[1]) + F.relu(band[0] - rate)).square()

    return torch.stack([outside(rate).mean() + outside(rate.mean()) for rate in rates]).mean()


def fdd_cka_delta(student: list[tuple[Tensor, Tensor]], teacher: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The founders' feature dynamics loss: mean over layer pairs of 1 - CKA of what the two layers add.

    Each entry is (input, output) of a block, (B, T, D). Unbiased CKA; position 0 is left out, where GPT-2 puts
    outliers that would decide the value alone.
    """
    losses = [1 - linear_cka((s_out - s_in)[:, 1:].flatten(0, 1), (t_out - t_in)[:, 1:].flatten(0, 1).to(s_out.device))
              for (s_in, s_out), (t_in, t_out) in zip(student, teacher)]
    return torch.stack(losses).mean()


def fdd_logit_lens(student: list[Tensor], teacher: list[Tensor], student_lens: Callable[[Tensor], Tensor],
                   teacher_lens: Callable[[Tensor], Tensor], max_tokens: int = 256) -> Tensor:
    """Feature dynamics distillation after its paper [5]: KL between logit lenses along the mapped layers, plus
    1 - cosine between the differences of consecutive log-probabilities.

    student, teacher: outputs of the mapped layers, (B, T, D) each; a lens maps (n, D) to (n, V) logits. At most
    `max_tokens` evenly spaced tokens take part, which bounds the memory.
    """
    tokens = student[0].shape[0] * student[0].shape[1]
    pick = torch.linspace(0, tokens - 1, min(tokens, max_tokens)).long()
    log_s = [F.log_softmax(student_lens(h.flatten(0, 1)[pick]).float(), -1) for h in student]  # L' x (n, V)
    with torch.no_grad():
        log_t = [F.log_softmax(teacher_lens(h.flatten(0, 1)[pick]).float(), -1).to(log_s[0].device) for h in teacher]
    trajectory = sum(F.kl_div(s, t, log_target=True, reduction="batchmean") for s, t in zip(log_s, log_t)) / len(log_s)
    if len(log_s) < 2:
        return trajectory
    steps = [1 - F.cosine_similarity(s1 - s0, t1 - t0, dim=-1).mean()
             for s0, s1, t0, t1 in zip(log_s, log_s[1:], log_t, log_t[1:])]
    return trajectory + sum(steps) / len(steps)


class FDDKillSwitch:
    """Turns FDD off for good when validation PPL rises more than `max_regression` above the best one seen."""

    def __init__(self, max_regression: float = 0.10):
        self.max_regression, self.best, self.killed = max_regression, math.inf, False

    def update(self, ppl: float, active: bool) -> bool:
        """True from the evaluation on that killed FDD; a rise while FDD was not active kills nothing."""
        if active and ppl > self.best * (1 + self.max_regression):
            self.killed = True
        self.best = min(self.best, ppl)
        return self.killed


class Distiller(nn.Module):
    """Student, temperature and whatever the recipe's loss trains, as one module whose forward returns the loss.

    The teacher is held outside the module tree: it is frozen, saved in no checkpoint and may live on its own device.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, recipe: Recipe,
                 teacher_device: torch.device | None = None):
        super().__init__()
        self.student, self.recipe = student, recipe
        self.temperature = Temperature(recipe.temperature, recipe.tau, recipe.tau_min, recipe.tau_max,
                                       recipe.gradient_reversal, recipe.lambda_max, recipe.lambda_warmup_ratio)
        self.kill_switch = FDDKillSwitch(recipe.fdd_max_regression)
        self._outside = [teacher.eval().requires_grad_(False), teacher.get_output_embeddings().weight]
        self._teacher_device = teacher_device
        self.boundaries = {end for _, _, end in recipe.stages()}  # steps after which `fit` evaluates
        self._spikes = [m for m in student.modules() if isinstance(m, (TernarySpike, SpikeEncoder))]
        n_student, n_teacher = len(transformer_blocks(student)), len(transformer_blocks(teacher))
        for s, t in recipe.layer_map:
            require(0 <= s < n_student and 0 <= t < n_teacher, "layer_map", (s, t),
                    f"student layers 0 to {n_student - 1}, teacher layers 0 to {n_teacher - 1}")
        self.projections = nn.ModuleDict()
        if recipe.hidden_weight:
            width = teacher.get_output_embeddings().weight.shape[1]
            self.projections.update({str(s): nn.Linear(student.config.d_model, width) for s, _ in recipe.layer_map})

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._outside[0]

    def place_teacher(self, device: torch.device) -> None:
        """Moves the teacher to the device that was asked for, else to `device`; the head always to `device`, where
        the loss is."""
        self._outside[0] = self.teacher.to(self._teacher_device or device)
        self._outside[1] = self.teacher.get_output_embeddings().weight.to(device)

    def fdd_active(self, step: int) -> bool:
        """True from step fdd_start on, until the kill switch has acted."""
        return self.recipe.fdd != "none" and step >= self.recipe.fdd_start and not self.kill_switch.killed

    def forward(self, input_ids: Tensor, labels: Tensor, step: int = 0,
                want_ce: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """input_ids, labels (B, T) -> loss and its terms, unweighted; `tau` and `lambda` are among them."""
        if not self.recipe.rate_weight or self.recipe.spike_kind == "dense":  # a dense twin has no rates
            return self.distillation(input_ids, labels, step, want_ce)
        require(not getattr(self.student, "is_gradient_checkpointing", False), "gradient checkpointing", True,
                "False with Recipe.rate_weight, for what is computed again comes without the rates' hooks")
        with firing_rates(self.student) as rates:
            loss, terms = self.distillation(input_ids, labels, step, want_ce)
        terms["rate"] = rate_penalty(rates, self.recipe.rate_band)
        return loss + self.recipe.rate_weight * terms["rate"], terms

    def distillation(self, input_ids: Tensor, labels: Tensor, step: int,
                     want_ce: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """What `forward` returns, without the firing rates."""
        recipe, teacher = self.recipe, self.teacher
        if recipe.anneal_steps:
            for module in self._spikes:
                module.share = min(1.0, step / recipe.anneal_steps)
        if step < recipe.align_steps:
            loss = self.alignment(input_ids)
            return loss, {"align": loss.detach()}
        fdd = self.fdd_active(step)
        pairs = recipe.layer_map if fdd or recipe.hidden_weight else ()
        where = next(teacher.parameters()).device
        with torch.no_grad(), capture_blocks(teacher, [t for _, t in pairs]) as teacher_blocks:
            teacher_hidden = teacher.base_model(input_ids.to(where), use_cache=False).last_hidden_state
        with capture_blocks(self.student, [s for s, _ in pairs]) as student_blocks:
            hidden = self.student.base_model(input_ids, use_cache=False).last_hidden_state
        progress = step / recipe.distill_steps
        tau = self.temperature(progress).to(hidden.device)
        loss, kd, ce = chunked_distillation(hidden, self.student.get_output_embeddings().weight,
                                            teacher_hidden.to(hidden.device), self._outside[1], tau, labels,
                                            recipe.kd_weight, recipe.ce_weight if step >= recipe.ce_start else 0.0,
                                            want_ce)
        terms = {"kd": kd, "tau": tau.detach(), "lambda": torch.tensor(self.temperature.strength(progress))}
        if want_ce or recipe.ce_weight:
            terms["ce"] = ce
        if recipe.hidden_weight:
            terms["hidden"] = torch.stack([
                F.mse_loss(self.projections[str(s)](student_blocks[s][1]).float(),
                           teacher_blocks[t][1].float().to(hidden.device)) for s, t in recipe.layer_map]).mean()
            loss = loss + recipe.hidden_weight * terms["hidden"]
        if fdd:
            terms["fdd"] = self._fdd(student_blocks, teacher_blocks)
            loss = loss + recipe.fdd_weight * terms["fdd"]
        if recipe.variance_penalty:
            spikes = [m for m in self._spikes if isinstance(m, TernarySpike)]
            terms["variance"] = sum(p.var() for m in spikes for p in (m.alpha, m.amplitude)) / len(spikes)
            loss = loss + recipe.variance_penalty * terms["variance"]
        return loss, terms

    def alignment(self, input_ids: Tensor) -> Tensor:
        """Layerwise alignment: each student block gets the teacher's stream at the first layer of its span and learns
        the stream after the last. input_ids (B, T) -> squared error over the variance of what the span adds, per
        channel, averaged over channels and blocks; position 0 is left out, as in fdd_cka_delta."""
        blocks = transformer_blocks(self.student)
        ends = span_ends(len(blocks), len(transformer_blocks(self.teacher)))
        where = next(self.teacher.parameters()).device
        with torch.no_grad(), capture_blocks(self.teacher, {0, *ends}) as captured:
            self.teacher.base_model(input_ids.to(where), use_cache=False)
        # The trained-but-unused parameters take part with weight zero, which several processes need.
        rest = sum(p.sum() for n, p in self.named_parameters() if ".blocks." not in n and p.requires_grad)
        start, losses = captured[0][0].float().to(rest.device), [0.0 * rest]
        for block, end in zip(blocks, ends):
            goal = captured[end][1].float().to(rest.device)  # (B, T, D)
            added, _ = block(start)
            error = (added.float() - goal)[:, 1:].square().mean((0, 1))  # (D,)
            losses.append((error / token_variance((goal - start)[:, 1:]).clamp_min(1e-6)).mean() / len(blocks))
            start = goal
        return sum(losses)

    def _fdd(self, student_blocks: dict, teacher_blocks: dict) -> Tensor:
        pairs = self.recipe.layer_map
        if self.recipe.fdd == "cka_delta":
            return fdd_cka_delta([student_blocks[s] for s, _ in pairs], [teacher_blocks[t] for _, t in pairs])
        teacher_norm = getattr(self.teacher.base_model, "ln_f", nn.Identity())
        return fdd_logit_lens([student_blocks[s][1] for s, _ in pairs], [teacher_blocks[t][1] for _, t in pairs],
                              lambda h: self.student.lm_head(self.student.goose.ln_f(h)),
                              lambda h: self.teacher.get_output_embeddings()(teacher_norm(h)))

    def on_evaluation(self, step: int, ppl: float) -> None:
        """Called by `fit` after each evaluation; may switch FDD off."""
        self.kill_switch.update(ppl, self.fdd_active(step))

    def get_extra_state(self) -> dict[str, Any]:
        """What of the kill switch a checkpoint keeps."""
        return {"best": self.kill_switch.best, "killed": self.kill_switch.killed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The counterpart of get_extra_state."""
        self.kill_switch.best, self.kill_switch.killed = state["best"], state["killed"]


class LanguageModelling(nn.Module):
    """Plain next-token training of a causal language model, with the interface of Distiller."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.student = model

    def forward(self, input_ids: Tensor, labels: Tensor, step: int = 0,
                want_ce: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """input_ids, labels (B, T) -> cross-entropy in nats per token, and its terms."""
        hidden = self.student.base_model(input_ids, use_cache=False).last_hidden_state
        loss, _, ce = chunked_distillation(hidden, self.student.get_output_embeddings().weight, labels=labels,
                                           ce_weight=1.0)
        return loss, {"ce": ce}


# ======================================================================================================
# 6  Data
# ======================================================================================================

SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"
PYDOCS_PACKAGES = ("torch", "numpy", "matplotlib", "datasets", "pandas", "networkx", "sympy", "transformers")
WIKITEXT = {"wikitext-2": "wikitext-2-raw-v1", "wikitext-103": "wikitext-103-raw-v1"}


class HubUnavailable(RuntimeError):
    """A corpus or teacher could not be fetched; the message names the ways on."""

    def __init__(self, what: str, reason: str):
        online = ""
        if where_am_i() == "kaggle":
            online = "switch on Settings > Internet (once the phone number of the account is verified), or "
        super().__init__(f"{what} could not be fetched from the Hugging Face hub ({reason}): {online}attach it as a "
                         "Kaggle dataset or model, or give a folder that holds it, or use corpus='pydocs' with "
                         "teacher='train', which need no download.")


def cache_folder() -> Path:
    """Where corpora, tokens and teachers are kept: ASNN_CACHE, else ~/.cache/asnn-goose."""
    return Path(os.environ.get("ASNN_CACHE") or Path.home() / ".cache" / "asnn-goose")


def _reference_task() -> Path:
    folder = os.environ.get("ASNN_REF")
    require(bool(folder), "ASNN_REF", folder, "the folder of the reference task, with corpus/ and teacher/")
    return Path(folder)


def attached_folders(depth: int = 7) -> Iterator[Path]:
    """The folders of ASNN_INPUTS and Kaggle's inputs and those below, shallow ones first; inputs appear at changing
    depths."""
    roots = (*os.environ.get("ASNN_INPUTS", "").split(os.pathsep), "/kaggle/input")
    level = [Path(root) for root in roots if root and Path(root).is_dir()]
    for _ in range(depth):
        yield from sorted(level)
        level = [child for folder in level for child in folder.iterdir() if child.is_dir()]


def find_attached(accept: Callable[[Path], bool]) -> Path | None:
    """The first attached folder that `accept` takes."""
    return next(filter(accept, attached_folders()), None)


def require_writable(folder: Path, name: str) -> None:
    """Raises ValueError when no file can be made in the folder, or in the nearest one above it that exists."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    require(there.is_dir() and os.access(there, os.W_OK | os.X_OK), name, str(folder), "a folder that can be written to")


WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO)


class CannotWrite(OSError):
    """The disk is full, or does not take what is written; what was there before is as it was."""


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what libraries raise when a disk is full into one sentence; torch and safetensors hide the system's error."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        number = None
        while cause and number not in WRITE_ERRORS:
            found = re.search(r"os error (\d+)", str(cause))
            number = int(found[1]) if found else getattr(cause, "errno", None)
            if re.search(r"\d+ requested and \d+ written", str(cause)):  # numpy
                number = errno.ENOSPC
            cause = cause.__cause__ or cause.__context__
        if number not in WRITE_ERRORS or isinstance(error, CannotWrite):
            raise
        raise CannotWrite(number, f"{path} cannot be written ({os.strerror(number)}); what was there before is kept. Free "
                                  "some space or choose another folder, then run again") from error


def write_atomically(path: Path, content: str | Callable[[Any], Any]) -> None:
    """Writes a text, or what a function writes to a binary file, beside `path`, flushes it to the disk and renames: a
    reader sees the old content or the new one, and a killed save leaves the last whole one. Raises CannotWrite when the
    disk is full, and leaves nothing half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode()) if isinstance(content, str) else content(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def is_main_process() -> bool:
    """True in the one of several processes that writes files, and where there is one process only."""
    return int(os.environ.get("RANK", 0)) == 0


def several_processes() -> Any:
    """accelerate's PartialState where a launcher has started more than one process, else None."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    # With --use_fsdp transformers would load a teacher in one process and leave it empty in the others.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return import_optional("accelerate").PartialState(cpu=select_device()[0].type == "cpu")


def wait_for_everyone() -> None:
    """Returns when all processes of the run have come here; at once where there is only one."""
    state = several_processes()
    if state:
        state.wait_for_everyone()


def largest_of_all(value: float) -> float:
    """The largest value that any process gives, so that all of them decide alike; each must call."""
    if not several_processes():
        return value
    return max(import_optional("accelerate").utils.gather_object([value]))


def how_to_go_on() -> str:
    """What to do with a run that its hours have cut off."""
    attach = "attach the output of this version with Add Input, then " if where_am_i() == "kaggle" else ""
    return f"{attach}run all cells again with the same parameters to go on"


def main_process_first() -> contextlib.AbstractContextManager:
    """The main process runs the block before the others, which find in the cache what it has written."""
    state = several_processes()
    return state.main_process_first() if state else contextlib.nullcontext()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block has ended well; one that exists by then is kept. Raises
    CannotWrite when the disk is full."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _explained(path):
            temporary.mkdir(parents=True)
            yield temporary
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def content_hash(*parts: str | bytes) -> str:
    """16 hex digits of the SHA-256 of the parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """A folder with train.txt, validation.txt and test.txt, and the hash of their content."""

    name: str
    folder: Path
    hash: str

    @classmethod
    def from_folder(cls, name: str, folder: Path) -> Corpus:
        """Raises ValueError that names the files that are missing, empty or no text."""
        files = [folder / f"{split}.txt" for split in SPLITS]
        bad = [file.name for file in files if not file.is_file() or not file.stat().st_size]
        if bad:
            raise ValueError(f"corpus folder {folder} has no text in {', '.join(bad)}; it needs train.txt, "
                             "validation.txt and test.txt.")
        contents = [file.read_bytes() for file in files]
        for file, content in zip(files, contents):
            try:
                readable = b"\0" not in content and bool(content.decode().strip())
            except UnicodeDecodeError:
                readable = False
            require(readable, f"corpus file {file}", content[:16], "text in UTF-8 that is not blank")
        return cls(name, folder, content_hash(*contents))

    def text(self, split: str) -> str:
        """The raw text of a split."""
        return (self.folder / f"{split}.txt").read_text(encoding="utf-8")

    def size(self, split: str) -> dict[str, int]:
        """{"bytes", "words"} of a split: UTF-8 bytes and whitespace-separated words of the raw text."""
        with open(self.folder / f"{split}.txt", "rb") as file:
            counts = [(len(line), len(line.decode().split())) for line in file]
        return {"bytes": sum(c[0] for c in counts), "words": sum(c[1] for c in counts)}


def require_windows(corpus: Corpus, tokens: dict[str, np.ndarray], seq_len: int) -> None:
    """Raises ValueError for a split that is shorter than one window and the token after it."""
    for split in SPLITS:
        require(len(tokens[split]) > seq_len, f"tokens in the {split} split of corpus {corpus.name}", len(tokens[split]),
                f"at least seq_len + 1 = {seq_len + 1}")


def load_corpus(name: str, max_chars: int | None = None) -> Corpus:
    """A corpus by name (`pydocs`, `wikitext-2`, `wikitext-103`, `ref`) or a folder.

    `max_chars` bounds pydocs. Raises ValueError for a name that is neither and for a folder without the three files,
    HubUnavailable when WikiText is neither attached nor to be fetched; another corpus is never taken instead.
    """
    if name == "pydocs":
        return _pydocs(max_chars)
    if name in WIKITEXT:
        return _wikitext(name)
    if name == "ref":
        return Corpus.from_folder("ref", _reference_task() / "corpus")
    require(is_word(name) and Path(name).is_dir(), "corpus", name,
            f"pydocs, {', '.join(WIKITEXT)}, ref, or a folder that exists")
    return Corpus.from_folder(Path(name).name, Path(name))


# The string that opens a file or follows a line ending in a colon. Parsing 9,600 files properly takes a minute more
# and finds the same text but for a few strings in single quotes.
_DOCSTRING = re.compile(r'(?:\A(?:\s|#[^\n]*\n)*|:[ \t]*(?:#[^\n]*)?\n\s*)[rRuU]?"""(.*?)"""', re.DOTALL)


def _docstrings(source: str) -> str:
    """Docstrings of a module, its classes and functions, with indentation removed."""
    return "\n\n".join(inspect.cleandoc(text) for text in _DOCSTRING.findall(source) if len(text) > 40)


def _pydocs(max_chars: int | None) -> Corpus:
    """Python's own topics, then the docstrings of installed packages, files in a fixed order until `max_chars`."""
    import importlib.metadata
    topics = importlib.import_module("pydoc_data.topics").topics
    versions = [f"{p} {importlib.metadata.version(p)}" for p in PYDOCS_PACKAGES if importlib.util.find_spec(p)]
    key = content_hash("pydocs 2", platform.python_version(), *versions, str(max_chars))
    folder = cache_folder() / "corpora" / f"pydocs-{key}"
    if folder.is_dir():
        return Corpus.from_folder("pydocs", folder)
    documents, seen, total = [], set(), 0

    def add(label: str, text: str) -> bool:
        nonlocal total
        kept = []
        for paragraph in text.split("\n\n"):
            mark = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
            if paragraph.strip() and mark not in seen:
                seen.add(mark)
                kept.append(paragraph.strip("\n"))
        text = "\n\n".join(kept)
        if len(text) > 200:
            documents.append((label, text))
            total += len(text)
        return max_chars is not None and total >= max_chars

    full = any(add(f"topics/{name}", topics[name]) for name in sorted(topics))
    if not full:
        files = []
        for package in PYDOCS_PACKAGES:
            spec = importlib.util.find_spec(package)
            for root in (spec.submodule_search_locations or ()) if spec else ():
                files += [(f"{package}/{p.relative_to(root).as_posix()}", p) for p in sorted(Path(root).rglob("*.py"))]
        for label, path in progress_bar(files, "pydocs: reading docstrings", "file"):
            if add(label, _docstrings(path.read_text(encoding="utf-8", errors="ignore"))):
                break
    # Whole files go to one split, in an order that their names decide: validation and test fill up first.
    documents.sort(key=lambda item: hashlib.sha256(item[0].encode()).digest())
    shares, parts = {"validation": 0.027 * total, "test": 0.024 * total, "train": math.inf}, {s: [] for s in SPLITS}
    names, filled = list(shares), 0
    for _, text in documents:
        parts[names[0]].append(text)
        filled += len(text)
        if filled >= shares[names[0]]:
            names.pop(0)
            filled = 0
    with new_folder(folder) as temporary:
        for split, texts in parts.items():
            (temporary / f"{split}.txt").write_text(END_OF_TEXT.join(texts), encoding="utf-8")
    return Corpus.from_folder("pydocs", folder)


def _wikitext(name: str) -> Corpus:
    """WikiText raw as the hub's parquet files or as three text files, attached or fetched."""
    folder = cache_folder() / "corpora" / name
    if folder.is_dir():
        return Corpus.from_folder(name, folder)
    config = WIKITEXT[name]

    def texts(path: Path) -> bool:
        return (config in path.as_posix() or name in path.name) and all((path / f"{s}.txt").is_file() for s in SPLITS)

    def parquet(path: Path) -> bool:
        return config in path.as_posix() and all(list(path.glob(f"{s}*.parquet")) for s in SPLITS)

    attached = find_attached(texts)
    if attached:
        return Corpus.from_folder(name, attached)
    attached = find_attached(parquet)
    datasets = import_optional("datasets")
    try:
        if attached:
            files = {s: [str(p) for p in sorted(attached.glob(f"{s}*.parquet"))] for s in SPLITS}
            data = datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache_folder() / "datasets"))
        else:
            data = datasets.load_dataset("Salesforce/wikitext", config)
    except Exception as error:  # the hub client raises a dozen unrelated types when there is no network
        if attached:
            raise ValueError(f"attached corpus {attached} cannot be read: {_first_line(error)}") from error
        raise HubUnavailable(name, _first_line(error)[:120]) from error
    with new_folder(folder) as temporary:
        for split in SPLITS:
            (temporary / f"{split}.txt").write_text("".join(data[split]["text"]), encoding="utf-8")
    return Corpus.from_folder(name, folder)


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Any:
    """A byte-level BPE trained on the train split, as a transformers tokenizer; cached by content."""
    transformers = import_optional("transformers")
    folder = cache_folder() / "tokenizers" / content_hash("bpe 1", corpus.hash, str(vocab_size))
    if not folder.is_dir():
        tokenizers = import_optional("tokenizers")
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
        documents = corpus.text("train").split(END_OF_TEXT)
        bpe.train_from_iterator(progress_bar(documents, "training the tokenizer", "document"), trainer)
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
                                                    pad_token=END_OF_TEXT, padding_side="left")
        with new_folder(folder) as temporary:
            made.save_pretrained(temporary)
    return transformers.AutoTokenizer.from_pretrained(folder)


def tokenize_corpus(corpus: Corpus, tokenizer: Any) -> dict[str, np.ndarray]:
    """{split: (tokens,) memory-mapped ids}, cached under the hash of corpus and tokenizer.

    Documents are separated by the end-of-text token where the corpus has it; nothing else is added.
    """
    key = content_hash("tokens 1", corpus.hash, tokenizer.backend_tokenizer.to_str())
    folder = cache_folder() / "tokens" / key
    if not folder.is_dir():
        dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        with new_folder(folder) as temporary:
            for split in SPLITS:
                pieces, ids = _pieces(corpus.text(split)), []
                batches = [pieces[i:i + 64] for i in range(0, len(pieces), 64)]
                for batch in progress_bar(batches, f"tokenising {split}", "batch", len(pieces) >= 64):
                    found = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
                    ids += [np.array(item.ids, dtype) for item in found]
                np.save(temporary / f"{split}.npy", np.concatenate(ids))
    return {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}


_CUT = re.compile(r"(?<=\S)(?= \S)")


def _pieces(text: str, size: int = 1 << 16) -> list[str]:
    """Cuts text into pieces of at least `size` characters, only before a word with its single space: a byte-level BPE
    never has a token across such a place, so that the ids are those of the whole text."""
    pieces, start = [], 0
    while start < len(text):
        cut = _CUT.search(text, start + size)
        end = cut.start() if cut else len(text)
        pieces.append(text[start:end])
        start = end
    return pieces


@dataclass(frozen=True)
class Teacher:
    """A frozen causal language model, its tokenizer and where both came from."""

    model: nn.Module
    tokenizer: Any
    name: str


def require_finite(model: nn.Module, what: str) -> None:
    """Raises ValueError that names the first parameter with a NaN or an infinity in it."""
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            raise ValueError(f"{what} has {int((~torch.isfinite(p)).sum())} values in {name} that are NaN or infinite; "
                             "allowed: finite weights.")


def refuse_missing(info: dict[str, Any], what: str) -> None:
    """Raises ValueError when from_pretrained, by its loading info, made up weights that the file lacks or has in another
    shape."""
    missing = sorted(info["missing_keys"])
    for name, *shapes in sorted(info["mismatched_keys"]):
        require(False, f"{what}: shape of {name}", tuple(shapes[0]), f"{tuple(shapes[1])}, that of its config.json")
    if missing:
        raise ValueError(f"{what} has no weights for {missing[0]} and {len(missing) - 1} more that its config.json asks "
                         "for; allowed: a file of the same configuration.")


def check_teacher(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Raises ValueError for weights that are not finite, a tokenizer of another vocabulary, and a model whose output at
    one place depends on later tokens, as that of BERT does."""
    require_finite(model, f"teacher {name}")
    rows, known = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    # Embeddings are often padded to a round number of rows, never by much.
    require(known <= rows <= known + max(1024, known // 10), f"teacher {name}: tokens of its tokenizer", known,
            f"about as many as the {rows} rows of its embedding")
    embedded: list[Tensor] = []
    ids = torch.arange(8, device=next(model.parameters()).device).clamp(max=rows - 1).unsqueeze(0)
    with torch.enable_grad(), model.get_input_embeddings().register_forward_hook(
            lambda module, args, out: embedded.append(out.detach().requires_grad_()) or embedded[-1]):
        logits = model(input_ids=ids).logits  # (1, 8, V)
    # A mask makes the gradient zero whatever the weights are; outputs alone differ little in a model hardly trained.
    reach = torch.autograd.grad(logits[0, 3, : rows // 2].sum(), embedded[0])[0][0].abs().amax(1)  # (8,)
    require(bool(reach[4:].max() <= 1e-6 * reach[:4].max()), f"teacher {name}", type(model).__name__,
            "a causal language model, in which no token sees a later one")


def load_teacher(spec: str) -> Teacher:
    """A teacher by folder or hub id (`gpt2`); `ref` is the folder teacher/ of ASNN_REF.

    An attached folder named like the last part of the id, or one below it, is taken before the hub is asked. Raises
    ValueError for a folder that cannot be loaded or holds no causal language model (see check_teacher), HubUnavailable
    for an id that cannot be fetched.
    """
    require(is_word(spec), "teacher", spec, "gpt2, another hub id, a folder, or train")
    transformers, spec = import_optional("transformers"), str(spec)
    if spec == "ref":
        spec = str(_reference_task() / "teacher")
    source = Path(spec)
    if not source.is_dir():
        last = spec.split("/")[-1].lower()

        def is_model(path: Path) -> bool:
            names = [part.lower() for part in path.parts]
            return last in names and (path / "config.json").is_file() and bool(
                [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")])

        source = find_attached(is_model) or spec
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)  # refused below, by name
        for module in model.modules():
            if type(getattr(module, "act", None)).__name__ == "NewGELUActivation":
                module.act = nn.GELU(approximate="tanh")  # the same function in one kernel instead of eight
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:
        if Path(source).is_dir():
            other = re.match(r"Unrecognized configuration class .*?(\w+)Config'", str(error))
            require(other is None, f"teacher folder {source}", other and other[1],
                    "a causal language model, as GPT-2 or Llama are")
            raise ValueError(f"teacher folder {source} cannot be loaded: {_first_line(error)}; it needs config.json, "
                             "whole weights and a tokenizer.") from error
        raise HubUnavailable(f"teacher {spec!r}", _first_line(error)[:120]) from error
    name = Path(spec).name if Path(spec).is_dir() else spec
    refuse_missing(info, f"teacher {name}")
    check_teacher(model.eval(), tokenizer, name)
    return Teacher(model, tokenizer, name)


class WindowSampler:
    """Training windows of seq_len + 1 tokens, each window once per epoch in an order that `seed` decides.

    Stateless: batch i is a function of i alone, which is what makes a resumed run exact. `order` replaces the
    permutation of the first epoch (POCL).
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int, order: np.ndarray | None = None):
        self.tokens, self.seq_len, self.seed, self.order = tokens, seq_len, seed, order
        self.windows = (len(tokens) - 1) // seq_len
        require(self.windows >= 1, "tokens in the train split", len(tokens), f"at least seq_len + 1 = {seq_len + 1}")
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def index(self, position: int) -> int:
        """The window at a position of the endless sequence of epochs."""
        if self.order is not None:
            return int(self.order[position % len(self.order)])
        epoch, offset = divmod(position, self.windows)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.windows)
        return int(self._permutation[offset])

    def gather(self, windows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Inputs and next-token labels of windows, (B, T) int64 each."""
        T = self.seq_len
        rows = torch.from_numpy(np.stack([self.tokens[i * T:(i + 1) * T + 1].astype(np.int64) for i in windows]))
        return rows[:, :-1], rows[:, 1:]

    def batch(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """The windows at positions start .. start + size - 1."""
        return self.gather([self.index(p) for p in range(start, start + size)])

    def fingerprint(self) -> str:
        """Hash of what decides the sequence of batches."""
        head = np.ascontiguousarray(self.tokens[:4096]).tobytes()
        order = b"" if self.order is None else np.ascontiguousarray(self.order).tobytes()
        return content_hash(head, order, f"{len(self.tokens)} {self.seq_len} {self.seed}")


def pocl_order(sampler: WindowSampler, difficulty: np.ndarray, positions: int) -> np.ndarray:
    """The POCL curriculum: the first third of the run draws from the easiest 33 % of the windows, the second from 67 %,
    the last from all. difficulty (windows,), lower is easier -> windows to visit, (positions,)."""
    ranked = np.argsort(difficulty, kind="stable")
    rng = np.random.default_rng((sampler.seed, 33))
    order = []
    for stage in range(3):
        pool = ranked[:max(1, round(len(ranked) * (stage + 1) / 3))]
        need = positions * (stage + 1) // 3 - positions * stage // 3
        order.append(np.concatenate([rng.permutation(pool) for _ in range(max(1, -(-need // len(pool))))])[:need])
    return np.concatenate(order)


# ======================================================================================================
# 7  Training
# ======================================================================================================


class NonFiniteLoss(RuntimeError):
    """The loss was NaN or infinite more often than a run may skip."""


@dataclass(frozen=True)
class FitConfig:
    """The optimiser's side of a run. One step takes batch_size * grad_accum windows, over all processes together.

    `patience` is in steps; `max_hours` bounds one call of `fit`, which ends at 95 % of it, and not the run, which a later
    call resumes. `tracker` shows the rows of log.jsonl, which is always written, in `tensorboard` (events in the run's
    folder) or `trackio` too; raises ImportError where that is not installed.
    """

    steps: int
    batch_size: int
    lr: float
    seq_len: int
    optimizer: str = "adamw"
    matrix_lr: float | None = None
    beta2: float = 0.999
    schedule: str = "cosine"
    align_steps: int = 0
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    clip: float = 1.0
    grad_accum: int = 1
    seed: int = 42
    eval_every: int = 100
    save_every: int = 500
    log_every: int = 10
    patience: int | None = None
    min_delta: float = 0.0
    nonfinite_limit: int = 10
    max_hours: float | None = None
    precision: str = "auto"
    tracker: str | None = None

    def __post_init__(self):
        require(self.tracker is None or self.tracker in TRACKERS, "FitConfig.tracker", self.tracker,
                f"None, {', '.join(TRACKERS)}")
        if self.tracker:
            import_optional(self.tracker)  # said before anything is trained
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            require(getattr(self, name) in allowed, f"FitConfig.{name}", getattr(self, name), ", ".join(allowed))
        check_fields(self, (
            "matrix_lr", "weight_decay", "min_delta", "align_steps", "seed", "nonfinite_limit"), ("beta2", "warmup_ratio"))
        require(self.beta2 < 1, "FitConfig.beta2", self.beta2, "a number in [0, 1)")
        require(self.align_steps < self.steps, "FitConfig.align_steps", self.align_steps, f"less than steps = {self.steps}")
        require(self.precision in PRECISIONS, "FitConfig.precision", self.precision, ", ".join(PRECISIONS))

    @classmethod
    def from_recipe(cls, recipe: Recipe, **overrides: Any) -> FitConfig:
        """The recipe's optimisation fields. Raises ValueError for an override that is no field."""
        names = {item.name for item in dataclasses.fields(cls)} & {item.name for item in dataclasses.fields(recipe)}
        log_every = max(1, min(10, recipe.distill_steps // 30))
        values = {"steps": recipe.distill_steps, "log_every": log_every,
                  **{name: getattr(recipe, name) for name in names}, **overrides}
        reject_unknown(values, (item.name for item in dataclasses.fields(cls)), "FitConfig")
        return cls(**values)


class EarlyStopping:
    """Stops when the validation PPL has not fallen by `min_delta` for `patience` steps; keeps the best weights."""

    def __init__(self, patience: int | None, min_delta: float = 0.0):
        self.patience, self.min_delta = patience, min_delta
        self.best, self.best_step, self.mark, self.mark_step = math.inf, 0, math.inf, 0

    def update(self, step: int, ppl: float) -> tuple[bool, bool]:
        """(improved, stop): improved is any new best; only a fall of min_delta restarts the patience."""
        improved = ppl < self.best
        if improved:
            self.best, self.best_step = ppl, step
        if ppl < self.mark - self.min_delta:
            self.mark, self.mark_step = ppl, step
        return improved, self.patience is not None and step - self.mark_step >= self.patience


@dataclass
class FitResult:
    """What a training run did. `stopped` is `completed`, `early stopping`, `time budget` or `step limit`; only
    the first two end a run, the others are resumed by the next call with the same folder. `seconds` of optimiser steps,
    without evaluation, and the peak are of the whole run, all calls together. `nonfinite` counts steps skipped
    for a loss that was not finite, `scaler_skips` those the GradScaler skipped to find its scale."""

    log: list[dict[str, float]]
    step: int
    stopped: str
    best_ppl: float
    best_step: int
    seconds: float
    tokens_per_second: float
    nonfinite: int
    scaler_skips: int
    precision: str
    peak_memory_gb: float

    @property
    def finished(self) -> bool:
        """True when no further call would train."""
        return self.stopped in ("completed", "early stopping")


def parameter_groups(module: nn.Module, weight_decay: float, lr: float | None = None, matrix_lr: float | None = None,
                     ) -> list[dict[str, Any]]:
    """Three groups: weights of Linears ("matrices", at matrix_lr), other matrices (embeddings, the tied head), and
    vectors. Weight decay for matrices only: decays, thresholds, mixes, norms and biases are not pulled to zero."""
    embedded = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)} - embedded
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"name": "matrices", "params": [p for p in trained if id(p) in linear], "weight_decay": weight_decay,
               **({} if matrix_lr is None else {"lr": matrix_lr})},
              {"name": "embeddings", "params": [p for p in trained if p.dim() >= 2 and id(p) not in linear],
               "weight_decay": weight_decay},
              {"name": "vectors", "params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return [group if lr is None else {"lr": lr, **group} for group in groups if group["params"]]


@torch.no_grad()
def orthogonalise(matrix: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix (m, n) with all singular values brought near 1, by a quintic Newton-Schulz iteration [13]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / x.norm().clamp_min(1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


@torch.no_grad()
def orthogonalise_shared(shares: list[Tensor], steps: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """`orthogonalise` of matrices (m, n) that lie in parts on several processes (DTensor), at most as many as there are
    processes: each gathers them all, works on one, and gets its part of the others from those who worked on them."""
    distributed = importlib.import_module("torch.distributed")
    distribute_tensor = importlib.import_module("torch.distributed.tensor").distribute_tensor
    whole = [share.full_tensor() for share in shares]
    results = [torch.empty_like(x, dtype=dtype) for x in whole]
    if (rank := distributed.get_rank()) < len(whole):
        results[rank] = orthogonalise(whole[rank], steps, dtype).contiguous()
    for source, result in enumerate(results):
        distributed.broadcast(result, source)
    return [distribute_tensor(result, share.device_mesh, share.placements, src_data_rank=None)
            for result, share in zip(results, shares)]


class Muon(torch.optim.AdamW):
    """Muon [13] for the group called "matrices", AdamW for the others, as one optimiser: one state, one schedule, one
    step of a GradScaler.

    The same as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but that one iterates in bf16 on every device, and
    this one in what the device is fast at: fp16 below compute capability 8.0, fp32 on a CPU without bf16 units.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.95),
                 momentum: float = 0.95):
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.momentum = momentum
        self._step_supports_amp_scaling = False  # the scaler itself leaves a step out, for both parts
        self.dtype: torch.dtype | None = None  # by the device at the first step: `fit` moves the weights before it

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of both parts."""
        groups = self.param_groups
        if self.dtype is None:
            self.dtype = {"fp32": torch.float32, "fp16": torch.float16,
                          "bf16": torch.bfloat16}[select_precision(groups[0]["params"][0].device)[0]]
        for group in groups:
            matrices = [p for p in group["params"] if group.get("name") == "matrices" and p.grad is not None]
            shares = matrices[0].device_mesh.size() if matrices and hasattr(matrices[0], "device_mesh") else 1
            for first in range(0, len(matrices), shares):
                some = matrices[first:first + shares]
                directions = [self._direction(p) for p in some]
                updates = (orthogonalise_shared(directions, dtype=self.dtype) if shares > 1
                           else [orthogonalise(directions[0], dtype=self.dtype)])
                for p, update in zip(some, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * math.sqrt(max(p.shape)) * group["lr"])
        try:
            self.param_groups = [group for group in groups if group.get("name") != "matrices"]
            super().step()
        finally:
            self.param_groups = groups

    def _direction(self, p: Tensor) -> Tensor:
        """Momentum and Nesterov's step of the gradient of p (m, n)."""
        state = self.state[p]
        if not state:
            # AdamW looks for "step" in every state that is loaded.
            state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
        buffer = state["momentum_buffer"].lerp_(p.grad, 1 - self.momentum)
        return p.grad.lerp(buffer, self.momentum)


def peak_memory_gb() -> float:
    """Peak memory of this process in GiB: allocated on the GPUs where there are any, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        allocated = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        if allocated > 2**20:  # a GPU that is there and cannot be used has next to nothing
            return allocated / 2**30
    resource = importlib.import_module("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": torch.get_rng_state()}
    state["numpy"]["state"]["key"] = torch.from_numpy(state["numpy"]["state"]["key"].astype(np.int64))
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(tuple(tuple(x) if isinstance(x, list) else x for x in state["python"]))
    state["numpy"]["state"]["key"] = state["numpy"]["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][:torch.cuda.device_count()])


def keep_freed_memory() -> None:
    """Makes glibc keep memory that tensors free. By default it returns blocks of megabytes to the kernel and gets them
    back page by page in every step: about a fifth of the time of a small student's step on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = importlib.import_module("ctypes").CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, bytes: the largest it takes


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class ShardedObjective:
    """An objective for `accelerate launch --use_fsdp`: a process holds its part of the matrices, of their gradients and
    of the optimiser's state (FSDP2, torch's fully_shard), and all of the vectors.

    `model`, a copy in parts, is trained. The objective itself waits on the CPU and is brought up to date by `gather`,
    so that evaluation, early stopping and checkpoints are those of a single process, and a checkpoint fits any number
    of them. Sharding is not left to accelerate, which has none on a CPU, where this is tested. Every process must make
    every call.
    """

    def __init__(self, objective: nn.Module, device: torch.device):
        fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard
        self.distributed = importlib.import_module("torch.distributed")
        self.distribute_tensor = importlib.import_module("torch.distributed.tensor").distribute_tensor
        self.device, self.objective = device, objective.cpu()
        alike = [getattr(objective, name, None) for name in ("_outside", "kill_switch")]  # the teacher is not copied
        self.model = copy.deepcopy(objective, {id(x): x for x in alike})
        self.mesh = self.distributed.init_device_mesh(device.type, (self.distributed.get_world_size(),))
        whole = {p for p in self.model.parameters() if p.dim() < 2}
        for part in (*transformer_blocks(self.model.student), self.model):
            fully_shard(part, mesh=self.mesh, ignored_params=whole)
        self.model.to(device)
        self.vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.matrices = [p for p in self.model.parameters() if p.dim() >= 2]

    def part(self, value: Tensor, like: Tensor) -> Tensor:
        """This process's part of a whole tensor, where `like` is in parts."""
        if not hasattr(like, "device_mesh"):
            return value
        return self.distribute_tensor(value.to(self.device), self.mesh, like.placements, src_data_rank=None)

    @torch.no_grad()
    def scatter(self) -> None:
        """Writes the objective's weights into the parts."""
        for part, whole in zip((*self.model.parameters(), *self.model.buffers()),
                               (*self.objective.parameters(), *self.objective.buffers())):
            part.copy_(self.part(whole, part))

    @torch.no_grad()
    def gather(self) -> None:
        """Writes the weights into the objective."""
        for part, whole in zip(self.model.parameters(), self.objective.parameters()):
            whole.copy_(part.full_tensor() if hasattr(part, "device_mesh") else part)
        self.broadcast_buffers()
        for part, whole in zip(self.model.buffers(), self.objective.buffers()):
            whole.copy_(part)

    def broadcast_buffers(self) -> None:
        """The first process's buffers, for all: what DistributedDataParallel does before each forward."""
        for buffer in self.model.buffers():
            self.distributed.broadcast(buffer, 0)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The objective, up to date and on the device for the length of the block."""
        self.gather()
        self.objective.to(self.device)
        try:
            yield
        finally:
            self.objective.cpu()

    def average_vectors(self) -> None:
        """Averages the gradients of the vectors over the processes, as fully_shard does those of the matrices."""
        gradients = [p.grad for p in self.vectors if p.grad is not None]
        flat = nn.utils.parameters_to_vector(gradients)
        self.distributed.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / self.mesh.size(), gradients)

    def clip_grad_norm_(self, limit: float) -> float:
        """torch.nn.utils.clip_grad_norm_ over matrices and vectors; the norm before."""
        groups = [[p.grad for p in group if p.grad is not None] for group in (self.matrices, self.vectors)]
        norms = [nn.utils.get_total_norm(group) for group in groups if group]
        norm = math.hypot(*(float(x.full_tensor() if hasattr(x, "device_mesh") else x) for x in norms))
        for gradient in itertools.chain(*groups):
            gradient.mul_(min(1.0, limit / (norm + 1e-6)))
        return norm

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """What the optimiser's state_dict is in a single process; empty in all processes but the first."""
        saved, keep = optimizer.state_dict(), self.distributed.get_rank() == 0
        state: dict[int, dict[str, Any]] = {}
        for i, values in saved["state"].items():
            for name, x in values.items():
                whole = x.full_tensor() if hasattr(x, "device_mesh") else x
                if keep:
                    state.setdefault(i, {})[name] = whole.cpu() if isinstance(whole, Tensor) else whole
        return {**saved, "state": state} if keep else {}

    def load_optimizer(self, optimizer: Any, saved: dict[str, Any]) -> None:
        """The counterpart of optimizer_state."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {i: {name: self.part(x, parameters[i]) if isinstance(x, Tensor) and x.dim() else x
                     for name, x in values.items()} for i, values in saved["state"].items()}
        optimizer.load_state_dict({**saved, "state": state})


def shares_of_weights() -> int:
    """Processes that `accelerate launch --use_fsdp` shares the weights out to; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if os.environ.get("ACCELERATE_USE_FSDP") == "true" else 1


@contextlib.contextmanager
def _without_environment(name: str) -> Iterator[None]:
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def _schedule(optimizer: torch.optim.Optimizer, config: FitConfig) -> Any:
    """Warm-up and fall to zero, once for the alignment and once for the rest of the run."""
    get_scheduler = import_optional("transformers").get_scheduler

    def part(steps: int) -> Any:
        return get_scheduler(config.schedule, optimizer, round(config.warmup_ratio * steps), steps)

    if not config.align_steps:
        return part(config.steps)
    with warnings.catch_warnings():  # the second part steps once before the optimiser does
        warnings.simplefilter("ignore", UserWarning)
        return torch.optim.lr_scheduler.SequentialLR(
            optimizer, [part(config.align_steps), part(config.steps - config.align_steps)], [config.align_steps])


def fit(objective: nn.Module, sampler: WindowSampler, config: FitConfig,
        evaluate_now: Callable[[], dict[str, float]] | None = None, folder: Path | None = None,
        description: str = "training", max_steps: int | None = None) -> FitResult:
    """Trains `objective` (Distiller or LanguageModelling), leaving the best weights in it. Several processes
    (`accelerate launch`) share each batch out, with `--use_fsdp` the weights too (ShardedObjective).

    Args:
        evaluate_now: returns {"ppl": ..., ...} on validation data; called every `eval_every` steps and at the end.
        folder: where checkpoint.pt, log.jsonl and a tracker's files live. A checkpoint found there is resumed exactly:
            weights, optimiser, schedule, scaler, random states and data position. Raises ValueError when it belongs to
            other settings or data. Without a folder nothing is saved.
        max_steps: ends this call after so many steps, as max_hours does after so many hours.
    Raises:
        NonFiniteLoss: more than `nonfinite_limit` steps had a NaN or infinite term; each was skipped.
        ValueError: a batch that the processes do not divide, fp16 with shared-out weights, DeepSpeed, weights that are
            not finite.
    """
    accelerate, tqdm = import_optional("accelerate"), import_optional("tqdm").tqdm
    device, _ = select_device()
    if device.type == "cpu":
        keep_freed_memory()
    precision, _ = select_precision(device, config.precision)
    # One process fits several models, each with its own precision; accelerate keeps the first one otherwise.
    accelerate.state.AcceleratorState._reset_state()
    sharded = shares_of_weights() > 1
    require(not (sharded and precision == "fp16"), "precision with --use_fsdp", precision,
            "bf16, on GPUs of compute capability 8.0 and above, or fp32 (FitConfig.precision)")
    with _without_environment("ACCELERATE_USE_FSDP"):  # see ShardedObjective
        accelerator = accelerate.Accelerator(mixed_precision={"fp32": "no"}.get(precision, precision),
                                             cpu=device.type == "cpu", project_dir=folder,
                                             log_with=config.tracker if folder else None)
    world, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    require(config.batch_size % world == 0, "batch_size", config.batch_size, f"a multiple of the {world} processes")
    spread = accelerator.distributed_type.value
    require(spread not in ("DEEPSPEED", "MEGATRON_LM"), "accelerate's distributed_type", spread,
            "NO, MULTI_CPU, MULTI_GPU (accelerate launch --multi_gpu) or FSDP (accelerate launch --use_fsdp)")
    require_finite(objective, "the model to train")
    seed_everything(config.seed)
    objective.train()
    shards = ShardedObjective(objective, accelerator.device) if sharded else None
    trained = shards.model if shards else objective
    groups = parameter_groups(trained, config.weight_decay, config.lr, config.matrix_lr)
    if config.optimizer == "muon":
        optimizer = Muon(groups, config.lr, (0.9, config.beta2))
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)
    scheduler = _schedule(optimizer, config)
    model, optimizer = (trained, accelerator.prepare(optimizer)) if shards else accelerator.prepare(trained, optimizer)
    if hasattr(objective, "place_teacher"):
        objective.place_teacher(accelerator.device)

    stopper, log, best = EarlyStopping(config.patience, config.min_delta), [], None
    step = nonfinite = scaler_skips = 0
    trained_seconds = peak = 0.0
    identity = {**{k: v for k, v in dataclasses.asdict(config).items() if k not in (
        "max_hours", "save_every", "precision", "log_every", "tracker")}, "data": sampler.fingerprint()}
    path = folder / "checkpoint.pt" if folder else None
    if hasattr(objective, "teacher"):
        require_finite(objective.teacher, "the teacher")
    for stale in folder.glob(".checkpoint.pt.*.tmp") if folder and main else ():
        stale.unlink(missing_ok=True)  # of a save that was killed
    stopped = ""
    if path and path.is_file():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            known = {name: getattr(value, "shape", None) for name, value in saved["objective"].items()}
            saved["identity"].items()
        except Exception as error:  # the reader raises half a dozen unrelated types for a damaged file
            raise ValueError(f"checkpoint {path} is damaged or no checkpoint of a run ({type(error).__name__}); delete it "
                             "to start anew, or choose another run name.") from error
        shapes = {name: getattr(value, "shape", None) for name, value in objective.state_dict().items()}
        for name in sorted(shapes.keys() | known.keys()):
            old, new = (tuple(x[name] or ()) if name in x else None for x in (known, shapes))
            require(old == new, f"{path}: shape of {name}", old, f"{new}, that of this run; choose another run name or the "
                                                                  "same settings")
        for name, value in identity.items():
            if saved["identity"].get(name) != value:
                raise ValueError(f"{path} was made with {name} {saved['identity'].get(name)!r} and this run has "
                                 f"{value!r}; choose another run name or the same settings.")
        objective.load_state_dict(saved["objective"])
        if shards:
            shards.scatter()
            shards.load_optimizer(optimizer, saved["optimizer"])
        else:
            optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        if accelerator.scaler is not None and saved["scaler"]:
            accelerator.scaler.load_state_dict(saved["scaler"])
        _set_random_state(saved["random"][rank] if rank < len(saved["random"]) else saved["random"][0])
        vars(stopper).update(saved["stopper"])
        log, step, best = saved["log"], saved["step"], saved["best"]
        nonfinite, scaler_skips = saved["nonfinite"], saved["scaler_skips"]
        trained_seconds, peak = saved["trained_seconds"], saved["peak"]
        stopped = saved["stopped"] if saved["stopped"] in ("completed", "early stopping") else ""
        del saved

    if accelerator.log_with:  # a project of tensorboard is a folder in the run's
        accelerator.init_trackers("tensorboard" if config.tracker == "tensorboard" else "asnn-goose", identity,
                                  {"trackio": {"name": f"{folder.parent.name}/{folder.name}"}})

    def record(row: dict[str, Any]) -> None:
        log.append(row)
        flat = {(f"{k}/{name}" if name else k): x for k, v in row.items() if k != "step"
                for name, x in (v.items() if isinstance(v, dict) else [("", v)]) if x is not None}
        accelerator.log(flat, step=row["step"])

    def save() -> None:
        if path is None:
            return
        states = [_random_state()]
        if world > 1:
            states = accelerate.utils.gather_object(states)
        if shards:
            shards.gather()
        moments = shards.optimizer_state(optimizer) if shards else optimizer.state_dict()
        if main:
            payload = {
                "identity": identity, "objective": objective.state_dict(), "optimizer": moments,
                "scheduler": scheduler.state_dict(), "random": states, "stopper": dict(vars(stopper)), "log": log,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
                "step": step, "nonfinite": nonfinite, "scaler_skips": scaler_skips, "best": best, "stopped": stopped,
                "trained_seconds": trained_seconds, "peak": max(peak, peak_memory_gb())}
            write_atomically(path, lambda file: torch.save(payload, file))
            write_atomically(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))

    per_step = config.batch_size * config.grad_accum
    tokens_per_step = per_step * config.seq_len
    share = config.batch_size // world
    whole = True  # False from the update of the weights until step, log and evaluation have followed it
    begin, first_step, before = time.perf_counter(), step, trained_seconds
    bar = tqdm(total=config.steps, initial=step, desc=description, unit="step", disable=not main, mininterval=1.0)
    try:
        while not stopped:
            clock = time.perf_counter()
            want_ce = step % config.log_every == 0 or step + 1 == config.steps
            sums: dict[str, float] = {}
            culprit, loss_value = None, 0.0
            for micro in range(config.grad_accum):
                start = step * per_step + micro * config.batch_size + rank * share
                inputs, labels = (t.to(accelerator.device) for t in sampler.batch(start, share))
                last = micro + 1 == config.grad_accum
                if shards:
                    shards.broadcast_buffers()
                # Shared-out gradients are summed each time: FSDP keeps whole ones otherwise, which zero_grad misses.
                with contextlib.nullcontext() if last or shards else accelerator.no_sync(model):
                    with accelerator.autocast() if shards else contextlib.nullcontext():
                        loss, terms = model(inputs, labels, step=step, want_ce=want_ce)
                    value = float(loss.detach())
                    if largest_of_all(float(not math.isfinite(value))):
                        culprit = next((f"{k} is {float(v)}" for k, v in terms.items() if not math.isfinite(float(v))),
                                       f"loss is {value}")
                        break
                    accelerator.backward(loss / config.grad_accum)
                loss_value += value / config.grad_accum
                for name, term in terms.items() if want_ce else ():
                    sums[name] = sums.get(name, 0.0) + float(term.detach()) / config.grad_accum
            whole = False
            norm, collapsed = math.nan, False
            if not culprit and shards:
                shards.average_vectors()
                norm = shards.clip_grad_norm_(config.clip)
            elif not culprit:
                norm = float(accelerator.clip_grad_norm_(model.parameters(), config.clip))
            if not culprit and not math.isfinite(norm):
                # A GradScaler skips the step itself and halves its scale; below 1 that has stopped helping.
                scaler_skips += accelerator.scaler is not None
                collapsed = accelerator.scaler is not None and accelerator.scaler.get_scale() < 1.0
                if accelerator.scaler is None or collapsed:
                    culprit = f"the gradient's norm is {norm}"
            if culprit:
                nonfinite += 1
                if nonfinite > config.nonfinite_limit:
                    raise NonFiniteLoss(f"Step {step}: {culprit}; {nonfinite} steps were not finite, at most "
                                        f"{config.nonfinite_limit} are skipped. A lower lr or fp32 may help.")
            if not culprit or collapsed:  # a scaler that has looked at the gradients must see its step
                optimizer.step()
            optimizer.zero_grad()
            lr = scheduler.get_last_lr()[-1]  # of the vectors: the matrices may have another
            with warnings.catch_warnings():  # a skipped first step looks to torch like a wrong order of calls
                warnings.simplefilter("ignore", UserWarning)
                scheduler.step()
            step += 1
            trained_seconds += time.perf_counter() - clock
            if want_ce and not culprit:
                speed = (step - first_step) * tokens_per_step / (trained_seconds - before)
                if world > 1:
                    every = accelerate.utils.gather_object([{**sums, "loss": loss_value}])
                    sums = {k: sum(row[k] for row in every) / world for k in every[0]}
                    loss_value = sums.pop("loss")
                record({"step": step, "loss": loss_value, **sums, "lr": lr,
                        "grad_norm": norm if math.isfinite(norm) else None, "tokens_per_second": round(speed)})
                postfix = {"loss": f"{loss_value:.3f}", "tok/s": f"{speed:,.0f}"}
                if "ce" in sums:
                    postfix["ppl"] = f"{math.exp(min(20.0, sums['ce'])):.1f}"
                if math.isfinite(stopper.best):
                    postfix["val ppl"] = f"{stopper.best:.1f}"
                bar.set_postfix(postfix, refresh=False)
            bar.update(1)
            if evaluate_now and (step % config.eval_every == 0 or step == config.steps
                                 or step in getattr(objective, "boundaries", ())):
                with shards.evaluating() if shards else contextlib.nullcontext():
                    measured = [evaluate_now()]
                if world > 1:  # the same to the last bit
                    accelerate.utils.broadcast_object_list(measured)
                objective.train()
                row = {"step": step, **{f"val_{k}": v for k, v in measured[0].items()}}
                record(row)
                improved, stop = stopper.update(step, row["val_ppl"])
                if improved:
                    best = {k: v.detach().cpu().clone() if isinstance(v, Tensor) else v
                            for k, v in objective.state_dict().items()}
                if hasattr(objective, "on_evaluation"):
                    objective.on_evaluation(step, row["val_ppl"])
                if stop:
                    stopped = "early stopping"
            if step >= config.steps:
                stopped = "completed"
            elif not stopped and max_steps is not None and step - first_step >= max_steps:
                stopped = "step limit"
            elif not stopped and config.max_hours is not None and largest_of_all(
                    float(time.perf_counter() - begin >= 0.95 * 3600 * config.max_hours)):  # figures take time too
                stopped = "time budget"
            whole = True
            if stopped or step % config.save_every == 0:
                save()
    except KeyboardInterrupt:
        if whole and not shards:  # the others may be gathering weights for a forward pass, and would wait for ever
            save()
        raise
    finally:
        bar.close()
        for tracker in accelerator.trackers:  # end_training would end the process group too
            tracker.finish()
        if not shards:
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast ends with the training
    if shards:
        shards.gather()
        objective.to(accelerator.device)
    if best is not None:
        objective.load_state_dict(best)
    optimizer.zero_grad(set_to_none=True)
    accelerator.free_memory()
    return FitResult(log, step, stopped, stopper.best, stopper.best_step, trained_seconds,
                     step * tokens_per_step / trained_seconds if step else 0.0, nonfinite, scaler_skips, precision,
                     max(peak, peak_memory_gb()))


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of a model on tokens: exp of the summed negative log-likelihood over the tokens scored.

    `nll_se` is the standard error of the mean NLL in nats, over windows; `bits_per_byte` and `word_ppl` need the
    size of the text and are None for part of a split.
    """

    ppl: float
    nll: float
    nll_se: float
    tokens: int
    windows: int
    seq_len: int
    bits_per_byte: float | None
    word_ppl: float | None
    window_nll: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the NLL of each window."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "window_nll"}


@torch.no_grad()
def evaluate(model: nn.Module, tokens: np.ndarray, seq_len: int, batch_size: int = 8, windows: int | None = None,
             size: dict[str, int] | None = None, precision: str = "fp32", description: str | None = None) -> Evaluation:
    """Perplexity on consecutive non-overlapping windows of `seq_len` tokens, every position scored.

    Each token but the very first of the split is predicted once, from the tokens before it in its window; the last
    window may be shorter. NLL is summed in fp64 from fp32 log-probabilities. `precision`, `fp32`, `fp16` or `bf16`,
    is what the matrix products run in. `windows` takes only the first so many; `size` is `Corpus.size(split)`.
    Several processes share the batches out and all get the sums of all, those of one process to the bit; each must call.
    """
    tqdm = import_optional("tqdm").tqdm
    state = several_processes()
    training, device = model.training, next(model.parameters()).device
    starts = list(range(0, len(tokens) - 1, seq_len))[:windows]
    require(bool(starts), "tokens to evaluate", len(tokens), "at least 2")
    model.eval()
    full = [s for s in starts if s + seq_len < len(tokens)]
    groups = [full[i:i + batch_size] for i in range(0, len(full), batch_size)] + [[s] for s in starts[len(full):]]
    head = model.get_output_embeddings()
    shares: list[list[tuple[list[float], int]]] = [[]]  # by process and batch: sums of its windows, tokens of each
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    require(precision in dtypes, "precision", precision, ", ".join(dtypes))
    rank, world = (state.process_index, state.num_processes) if state else (0, 1)
    for group in tqdm(groups[rank::world], desc=description, unit="batch", mininterval=1.0,
                      disable=description is None or rank > 0):
        rows = torch.from_numpy(np.stack([tokens[s:s + seq_len + 1].astype(np.int64) for s in group])).to(device)
        with torch.autocast(device.type, dtype=dtypes[precision], enabled=precision != "fp32"):
            hidden = model.base_model(rows[:, :-1], use_cache=False).last_hidden_state
            if isinstance(head, nn.Linear):
                nll = chunked_nll(hidden, head.weight, rows[:, 1:])  # (B, T)
            else:  # a head in int8 or fed by spikes has no weight to share out
                nll = torch.stack([F.cross_entropy(head(h).float(), y, reduction="none") for h, y in zip(hidden, rows[:, 1:])])
        shares[0].append((nll.double().sum(1).tolist(), nll.shape[1]))
    model.train(training)
    if state:
        shares = import_optional("accelerate").utils.gather_object(shares)
    parts = [shares[i % world][i // world] for i in range(len(groups))]
    window = np.array([x for sums, _ in parts for x in sums])
    count = np.array([T for sums, T in parts for _ in sums])
    total, scored = float(window.sum()), int(count.sum())
    mean = total / scored
    # Windows are the sampling unit: tokens inside one are not independent.
    residual = window - mean * count
    error = math.sqrt(len(window) / max(1, len(window) - 1) * float((residual**2).sum())) / scored
    whole = size if windows is None else None
    return Evaluation(math.exp(min(mean, 100.0)), mean, error, scored, len(window), seq_len,
                      total / math.log(2) / whole["bytes"] if whole else None,
                      math.exp(min(total / whole["words"], 100.0)) if whole else None, window / count)


def perplexity_gap(student: Evaluation, teacher: Evaluation) -> tuple[float, float]:
    """(gap, standard error): student PPL / teacher PPL on the same windows; the error is of the paired difference."""
    counts = (student.tokens, teacher.tokens)
    require(counts[0] == counts[1], "tokens of student and teacher", counts, "equal")
    gap = student.ppl / teacher.ppl
    difference = student.window_nll - teacher.window_nll
    return gap, gap * float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan


@torch.no_grad()
def spike_density(student: nn.Module, input_ids: Tensor) -> dict[str, float]:
    """{"layer.site": share of non-zero spikes} over the tokens of input_ids (B, T)."""
    density: dict[str, float] = {}
    keep = lambda name, spikes: density.update({name: float((spikes != 0).float().mean())})  # noqa: E731
    with evaluating(student), spike_hooks(student, keep):
        student.base_model(input_ids.to(next(student.parameters()).device), use_cache=False)
    return density


def operations(student: GooseForCausalLM, density: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """What one token costs, product by product: {"layer", "product", "site", "MACs", "density", "adds", "skipped"}.

    MACs are those of the dense form, whose sum FlopCounterMode finds too. Where spikes feed a product, `adds` are the
    additions that the {"layer.site": density} leave, `skipped` the rest; elsewhere adds are 0 and nothing is skipped. The
    last row of a layer, "state", is its elementwise update: one multiplication by the decay for each entry.
    """
    c, density, rows = student.config, density or {}, []
    matrix, delta = c.state_kind != "vector", c.state_kind == "delta"
    D, width, heads = c.d_model, c.ffn_width, c.d_model // c.head_width
    sites = ("mix_in.k", "mix_in.v", "mix_in.r", "mix_in.g", "k", "v", "mix_out", "ffn_in", "ffn_hidden")
    reject_unknown(density, ["head_in", *(f"{layer}.{site}" for layer in range(c.n_layer) for site in sites)], "density")

    spiking, state = c.spike_kind != "dense", D * c.head_width if matrix else D

    def add(layer: int | str, product: str, site: str, macs: int) -> None:
        fed = spiking and site.split(".")[0] in c.spike_sites
        share = density.get(site if layer == "-" else f"{layer}.{site}", 1.0) if fed else 1.0
        adds = round(macs * share) if fed else 0
        rows.append({"layer": layer, "product": product, "site": site, "MACs": macs, "density": share, "adds": adds,
                     "skipped": macs - adds if fed else 0, "state updates": 0})

    products = [*((f"W_{name}", f"mix_in.{name}", D * D) for name in ("kvrg" if matrix else "kvr")),
                *([("W_b", "mix_in.k", D * heads)] if delta else []), ("W_o", "mix_out", D * D),
                ("W_1", "ffn_in", D * width), ("W_2", "ffn_hidden", D * width),
                *([("k S", "k", state)] if delta else []), *([("r S", "-", state)] if matrix else [])]
    for layer in range(c.n_layer):
        for product in products:
            add(layer, *product)
        share = density.get(f"{layer}.k", 1.0) if spiking else 1.0
        rows.append({"layer": layer, "product": "state", "site": "k", "MACs": 0, "density": share, "skipped": 0,
                     "adds": round(state * share) if spiking else 0, "state updates": state if spiking else 2 * state})
    add("-", "head", "head_in", D * c.vocab_size)
    return rows


def matrix_products(student: GooseForCausalLM) -> list[dict[str, Any]]:
    """Multiply-accumulates per token of each kind of product: {"product", "macs", "layers", "site", "fed"}.

    `layers` is False for the head, `site` the spike site before a product with weights, None for those of the state, and
    `fed` says whether spikes go in: in the state's write and the delta rule's k S the key is a spike, r S has none.
    """
    c, rows = student.config, operations(student)
    matrix = c.state_kind != "vector"

    def macs(*products: str) -> int:
        return sum(row["MACs"] for row in rows if row["product"] in products)
    table = [("k, v, r, gate and beta" if matrix else "k, v, r", macs("W_k", "W_v", "W_r", "W_g", "W_b"), True, "mix_in"),
             ("W_o", macs("W_o"), True, "mix_out"), ("W_1", macs("W_1"), True, "ffn_in"),
             ("W_2", macs("W_2"), True, "ffn_hidden"), ("head", macs("head"), False, "head_in")]
    if matrix:  # the write, an outer product, has an entry for each that is read
        table += [("state, write" + (" and k S" if c.state_kind == "delta" else ""), macs("r S", "k S"), True, None),
                  ("state, r S", macs("r S"), True, None)]
    spiking = c.spike_kind != "dense"
    return [{"product": product, "macs": count, "layers": layers, "site": site,
             "fed": spiking and (site in c.spike_sites if site else product != "state, r S")}
            for product, count, layers, site in table]


def match_teacher(recipe: Recipe, teacher: Teacher) -> tuple[Recipe, list[str]]:
    """The recipe with what the teacher at hand does not allow changed, and a sentence for each change.

    Raises ValueError when the teacher's positions end before the recipe's windows do.
    """
    positions = getattr(teacher.model.config, "max_position_embeddings", recipe.seq_len)
    require(recipe.seq_len <= positions, "seq_len", recipe.seq_len,
            f"at most the {positions} positions of teacher {teacher.name}")
    layers, changes, notes = len(transformer_blocks(teacher.model)), {}, []
    if max(t for _, t in recipe.layer_map) >= layers and (recipe.fdd != "none" or recipe.hidden_weight):
        changes["layer_map"] = spread_layer_map(recipe.n_layer, layers)
        notes.append(f"layer_map is {changes['layer_map']}: teacher {teacher.name} has {layers} layers")
    width = teacher.model.get_input_embeddings().weight.shape[1]
    if recipe.embeddings_from_teacher and width != recipe.d_model:
        changes["embeddings_from_teacher"] = False
        notes.append(f"embeddings are not copied: teacher {teacher.name} is {width} wide, the student {recipe.d_model}")
    if recipe.weights_from_teacher:
        theirs = getattr(teacher.model.config, "activation_function", recipe.activation)  # transfer refuses others
        theirs = {"gelu_new": "gelu_pytorch_tanh"}.get(theirs, theirs)
        if theirs != recipe.activation:
            changes["activation"] = theirs
            notes.append(f"activation is {theirs}, that of teacher {teacher.name}, whose feed-forward weights are taken")
    return recipe.replace(**changes), notes


@torch.no_grad()
def transfer_weights(student: GooseForCausalLM, teacher: nn.Module, layers: Iterable[int] | None = None,
                     output_scale: float = 1.0) -> list[dict[str, str]]:
    """Starts a student from a GPT-2's weights: embeddings, positions, LayerNorms, the feed-forward blocks, and of the
    attention q -> receptance, k -> key, v -> value, output -> output, biases included.

    Args:
        layers: the teacher layer for each student layer; the ends of their spans (`span_ends`) by default.
        output_scale: factor on the attention's output weights. A recurrent state is not attention, and a loud branch
            of it disturbs what the other weights expect.
    Returns:
        One row for each parameter of the student: {"student", "teacher", "shape", "transferred"}.
    Raises:
        ValueError for another architecture, a layer that does not exist, or, with both shapes, weights that do not fit.
    """
    base = teacher.base_model
    if not hasattr(base, "wte") or not hasattr(base, "h"):
        raise ValueError(f"teacher is a {type(teacher).__name__}; weights are transferred from GPT-2 models only.")
    layers = tuple(span_ends(student.config.n_layer, len(base.h)) if layers is None else layers)
    require(len(layers) == student.config.n_layer and all(0 <= t < len(base.h) for t in layers), "transfer_layers",
            layers, f"{student.config.n_layer} layers, each from 0 to {len(base.h) - 1}")
    theirs = dict(base.named_parameters())
    targets = {name.removeprefix("goose."): p for name, p in student.named_parameters()}
    rows = min(len(base.wpe.weight), student.config.n_positions)
    sources: dict[str, tuple[str, Tensor]] = {"positions.weight": (f"wpe.weight[:{rows}]", base.wpe.weight[:rows])}
    for ours, name in (("embeddings.weight", "wte.weight"), ("ln_f.weight", "ln_f.weight"), ("ln_f.bias", "ln_f.bias")):
        sources[ours] = (name, theirs[name])
    for (i, t), kind in itertools.product(enumerate(layers), ("weight", "bias")):
        label = f"h.{t}.attn.c_attn.{kind}"
        for name, part in zip(("receptance", "key", "value"), theirs[label].t().chunk(3)):
            sources[f"blocks.{i}.time_mix.{name}.{kind}"] = (f"{label}, {name[0]}", part)
        for ours, name in (("ln_1", "ln_1"), ("ln_2", "ln_2"), ("time_mix.output", "attn.c_proj"),
                           ("ffn.up", "mlp.c_fc"), ("ffn.down", "mlp.c_proj")):
            label = f"h.{t}.{name}.{kind}"
            source = theirs[label].t()  # GPT-2 keeps weights as (in, out)
            if name == "attn.c_proj" and kind == "weight" and output_scale != 1:
                label, source = f"{label} * {output_scale:g}", source * output_scale
            sources[f"blocks.{i}.{ours}.{kind}"] = (label, source)
    if "lm_head.weight" in targets:  # else tied
        sources["lm_head.weight"] = ("lm_head.weight", teacher.get_output_embeddings().weight)
    table, parts = [], {**targets, "positions.weight": targets["positions.weight"][:rows]}
    for name, part in parts.items():
        label, source = sources.get(name, ("-", part))
        if source.shape != part.shape:
            raise ValueError(f"{label} of the teacher has shape {tuple(source.shape)} and {name} of the student "
                             f"{tuple(part.shape)}; choose a student of the teacher's width or "
                             "weights_from_teacher=False.")
    for name, target in targets.items():
        label, source = sources.get(name, ("-", None))
        if source is not None:
            parts[name].copy_(source)
        table.append({"student": name, "teacher": label, "shape": str(tuple(target.shape)),
                      "transferred": "yes" if source is not None else "no, starts fresh"})
    table += [{"student": "-", "teacher": label, "shape": str(tuple(source.shape)), "transferred": "no, no such parameter"}
              for name, (label, source) in sources.items() if name not in targets]
    return table


@torch.no_grad()
def calibrate_encoders(student: nn.Module, input_ids: Tensor) -> int:
    """Calibrates every SpikeEncoder, and every threshold that needs it, on input_ids (B, T), each on what the calibrated
    ones before it pass on. Returns how many there are."""
    encoders = [m for m in student.modules() if isinstance(m, SpikeEncoder) and m.kind != "dense"
                or isinstance(m, TernarySpike) and m.kind != "dense" and m.threshold == "mixed_fixed"]
    with contextlib.ExitStack() as hooks:
        for encoder in encoders:
            hooks.enter_context(encoder.register_forward_pre_hook(lambda module, args: module.calibrate(args[0])))
        student.base_model(input_ids.to(next(student.parameters()).device), use_cache=False)
    return len(encoders)


def build_student(recipe: Recipe, teacher: Teacher, seed: int | None = None,
                  calibration: Tensor | None = None) -> GooseForCausalLM:
    """A student for this teacher, with the teacher's weights or embeddings where the recipe says so, its spike encoders
    calibrated on the token ids `calibration` (B, T).

    Raises ValueError with both shapes when weights do not fit, and when there are encoders and no calibration batch.
    """
    seed_everything(recipe.seed if seed is None else seed)
    source = teacher.model.get_input_embeddings().weight
    special = {name: getattr(teacher.model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    student = GooseForCausalLM(recipe.student_config(source.shape[0], **special))
    if recipe.weights_from_teacher:
        transfer_weights(student, teacher.model, recipe.transfer_layers, recipe.output_scale)
    elif recipe.embeddings_from_teacher:
        target = student.get_input_embeddings().weight
        if source.shape != target.shape:
            raise ValueError(f"embeddings of teacher and student have shapes {tuple(source.shape)} and "
                             f"{tuple(target.shape)}; choose d_model={source.shape[1]} or "
                             "embeddings_from_teacher=False.")
        with torch.no_grad():
            target.copy_(source)
            positions = getattr(teacher.model.base_model, "wpe", None)
            if positions is not None:
                rows = min(len(positions.weight), len(student.goose.positions.weight))
                student.goose.positions.weight[:rows] = positions.weight[:rows]
    if (set(recipe.spike_sites) - {"k", "v"} or recipe.threshold == "mixed_fixed") and recipe.spike_kind != "dense":
        require(calibration is not None, "calibration", calibration, "a batch of token ids, for the spike encoders")
        calibrate_encoders(student, calibration)
    return student


def untrained_goose_teacher(recipe: Recipe, tokenizer: Any) -> Teacher:
    """v4's teacher: a dense Goose with random weights. What a student can learn from it is noise."""
    seed_everything(recipe.seed + 1)
    config = recipe.student_config(len(tokenizer), spike_kind="dense", recurrence="chunked")
    return Teacher(GooseForCausalLM(config).eval(), tokenizer, "untrained-goose")


def train_teacher(profile: Profile, corpus: Corpus, seq_len: int, seed: int = 42, max_hours: float | None = None,
                  ) -> tuple[Teacher, dict[str, Any]]:
    """A GPT-2-architecture teacher of the profile's shape trained on the corpus, with a BPE trained on it.

    Cached by content: a second call with the same corpus and profile loads it, an interrupted one resumes.
    Returns the teacher and what is known of its training.
    """
    transformers = import_optional("transformers")
    with main_process_first():
        tokenizer = train_tokenizer(corpus, profile.vocab_size)
    shape = {"vocab_size": len(tokenizer), "n_positions": seq_len, "n_embd": profile.teacher_width,
             "n_layer": profile.teacher_layers, "n_head": profile.teacher_heads}
    # A teacher that sees every window about once has nothing to gain from dropout.
    config = transformers.GPT2Config(**shape, activation_function="gelu_pytorch_tanh", attn_pdrop=0.0,
                                     resid_pdrop=0.0, embd_pdrop=0.0,
                                     bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    settings = FitConfig(profile.teacher_steps, profile.teacher_batch_size, profile.teacher_lr, seq_len,
                         weight_decay=0.1, seed=seed, eval_every=10**9, save_every=200, max_hours=max_hours)
    # Without defaults: an option that is new to FitConfig trains no teacher again.
    identity = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)
                if f.name != "max_hours" and getattr(settings, f.name) != f.default}
    key = content_hash("teacher 2", corpus.hash, json.dumps([shape, identity], sort_keys=True))
    folder = cache_folder() / "teachers" / key
    name = f"gpt2-{profile.teacher_layers}x{profile.teacher_width}-{corpus.name}-{key[:6]}"
    if not folder.is_dir():
        with main_process_first():
            tokens = tokenize_corpus(corpus, tokenizer)
        require_windows(corpus, tokens, seq_len)
        seed_everything(seed)
        model = transformers.GPT2LMHeadModel(config)
        work = cache_folder() / "teachers" / f"{key}.training"
        result = fit(LanguageModelling(model), WindowSampler(tokens["train"], seq_len, seed), settings, folder=work,
                     description="teacher")
        if not result.finished:
            raise RuntimeError(f"the teacher's training stopped at step {result.step} of {settings.steps} "
                               f"({result.stopped}); run again to go on.")
        known = {"trained_steps": result.step, "seconds": round(result.seconds, 1),
                 "tokens_per_second": round(result.tokens_per_second), "precision": result.precision}
        if is_main_process():
            with new_folder(folder) as temporary:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
                write_atomically(temporary / "training.json", json.dumps(known, indent=1))
            shutil.rmtree(work, ignore_errors=True)
        wait_for_everyone()
    loaded = load_teacher(str(folder))
    return Teacher(loaded.model, loaded.tokenizer, name), json.loads((folder / "training.json").read_text())


def distillation_sampler(recipe: Recipe, tokens: np.ndarray, teacher: nn.Module) -> WindowSampler:
    """The windows of a run in the recipe's order. POCL ranks the windows the run would draw by the teacher's NLL."""
    sampler = WindowSampler(tokens, recipe.seq_len, recipe.seed)
    if recipe.curriculum == "none":
        return sampler
    positions = recipe.distill_steps * recipe.batch_size * recipe.grad_accum
    drawn = np.unique([sampler.index(p) for p in range(min(positions, sampler.windows))])
    head, device = teacher.get_output_embeddings().weight, next(teacher.parameters()).device
    difficulty = []
    for start in range(0, len(drawn), recipe.batch_size):
        inputs, labels = (t.to(device) for t in sampler.gather(drawn[start:start + recipe.batch_size]))
        with torch.no_grad():
            hidden = teacher.base_model(inputs, use_cache=False).last_hidden_state
        difficulty += chunked_nll(hidden, head, labels).mean(1).tolist()
    order = drawn[pocl_order(sampler, np.array(difficulty), positions)]
    return WindowSampler(tokens, recipe.seq_len, recipe.seed, order)


@dataclass(frozen=True)
class Task:
    """What a run works on: the recipe as the teacher allows it, the corpus, its tokens, the teacher."""

    recipe: Recipe
    notes: list[str]  # a sentence for everything the teacher changed in the recipe
    corpus: Corpus
    sizes: dict[str, dict[str, int]]  # {split: {"bytes", "words"}}
    tokens: dict[str, np.ndarray]
    teacher: Teacher
    teacher_training: dict[str, Any]  # of a teacher trained here, else empty

    def peek(self) -> Tensor:
        """The first validation windows, at most eight, (B, T): what spike densities are measured on."""
        held_out = WindowSampler(self.tokens["validation"], self.recipe.seq_len, self.recipe.seed)
        return held_out.gather(range(min(8, held_out.windows)))[0]


def load_task(recipe: Recipe, profile: Profile) -> Task:
    """Corpus, teacher and tokens of a recipe in a profile; raises what load_corpus, load_teacher and match_teacher do,
    and ValueError for folders that cannot be written to and a corpus shorter than a window, before training."""
    require_writable(cache_folder(), "the cache folder (ASNN_CACHE)")
    require_writable(outputs_folder(), "the outputs folder (ASNN_OUTPUTS)")
    with main_process_first():
        corpus = load_corpus(profile.corpus, profile.corpus_chars)
    training: dict[str, Any] = {}
    if recipe.teacher == "untrained-goose":
        with main_process_first():
            tokenizer = train_tokenizer(corpus, profile.vocab_size)
        teacher = untrained_goose_teacher(recipe, tokenizer)
    elif profile.teacher == "train":
        teacher, training = train_teacher(profile, corpus, recipe.seq_len, recipe.seed)
    else:
        teacher = load_teacher(profile.teacher)
    recipe, notes = match_teacher(recipe, teacher)
    sizes = {split: corpus.size(split) for split in SPLITS}
    with main_process_first():
        tokens = tokenize_corpus(corpus, teacher.tokenizer)
    require_windows(corpus, tokens, recipe.seq_len)
    return Task(recipe, notes, corpus, sizes, tokens, teacher, training)


def distil(task: Task, recipe: Recipe, config: FitConfig, folder: Path | None = None, eval_windows: int | None = 64,
           description: str = "distillation", max_steps: int | None = None) -> tuple[GooseForCausalLM, FitResult]:
    """Builds the student of `recipe` (the task's, or one with other values) and trains it; see `fit`. Spike encoders
    are calibrated on the first training batch. Where there are two GPUs, the teacher takes the second."""
    sampler = distillation_sampler(recipe, task.tokens["train"], task.teacher.model)
    student = build_student(recipe, task.teacher, calibration=sampler.batch(0, recipe.batch_size)[0])
    device, _ = select_device()
    several = device.type == "cuda" and torch.cuda.device_count() > 1 and not os.environ.get("LOCAL_RANK")
    objective = Distiller(student, task.teacher.model, recipe, torch.device("cuda:1") if several else None)
    objective.place_teacher(device)
    precision, _ = select_precision(device, config.precision)
    peek = dataclasses.replace(task, recipe=recipe).peek()

    def evaluate_now() -> dict[str, Any]:
        measured = evaluate(student, task.tokens["validation"], recipe.seq_len, windows=eval_windows,
                            precision=precision)
        return {"ppl": measured.ppl, "density": spike_density(student, peek)}

    result = fit(objective, sampler, config, evaluate_now, folder, description, max_steps)
    return student.to(device), result


def training_memory(recipe: Recipe, vocab_size: int, teacher_parameters: int, shares: int = 1) -> dict[str, int]:
    """{part: bytes} that a run in half precision takes of a GPU, of `shares` that share the weights out: an estimate,
    by arithmetic.

    Kept for backward, per token and layer: about 46 D values in half precision (projections, norms, feed-forward of
    width 4D) and 20 D in fp32 for the recurrence; three steps of the full size on a CPU kept 173 bytes per token, layer
    and channel. An encoder of width D keeps 15 bytes more for each channel, a site whose rate is held 19 (D = 128).
    """
    with torch.device("meta"):
        count = count_parameters(GooseForCausalLM(recipe.student_config(vocab_size)))
    head, tokens = vocab_size * recipe.d_model, recipe.batch_size * recipe.seq_len
    encoded = sum({"mix_in": 4, "mix_out": 1, "ffn_in": 1, "ffn_hidden": 4}.get(site, 0) for site in recipe.spike_sites)
    spikes = 15 * encoded + (19 * (2 + encoded) if recipe.rate_weight else 0)
    return {"teacher weights, fp32": 4 * teacher_parameters,
            "student weights, gradients, at most two moments, fp32": 16 * count // shares,
            "half-precision copies under autocast": 2 * (count + head),
            "activations kept for backward": tokens * recipe.n_layer * recipe.d_model * (46 * 2 + 20 * 4 + spikes),
            "gradient of the head, fp32": 4 * head, "logit chunks of the loss": LOGIT_BUDGET["cuda"],
            "CUDA context and workspaces, allowance": 2**30}


def _probe(task: Task, precision: str, steps: int, seconds: float) -> FitResult:
    """A few steps as the run will make them, every loss switched on; what went before them warms up."""
    recipe = task.recipe.replace(align_steps=0, ce_start=0, anneal_steps=0, fdd_start=0, curriculum="none")
    config = FitConfig.from_recipe(recipe, eval_every=10**9, patience=None, precision=precision, max_hours=seconds / 3600)
    distil(task, recipe, config, description="probe, warming up", max_steps=1)
    return distil(task, recipe, config, description="probe", max_steps=max(1, min(steps, recipe.distill_steps // 6)))[1]


def preflight(task: Task | None = None, precision: str = "auto", max_hours: float | None = None, steps: int = 20,
              seconds: float = 10.0, device: torch.device | None = None) -> tuple[list[dict[str, str]], list[str]]:
    """(rows, advice): a table {"what", "value", "why"} of hardware, precision, memory, disk and versions, with a `task`
    also what its run needs and how long it takes by a probe of at most so many `steps` or `seconds` of training; and
    what to do before going on, a sentence each, none where all is well. `device` is what a page measures that trains
    nothing and needs no other. Raises ValueError for a precision that does not exist.
    """
    env, rows, advice, GB = environment(), [], [], 10**9
    found, device_reason = select_device()
    trains, device = device is None, found if device is None else device
    chosen, precision_reason = select_precision(device, precision)
    place = {"kaggle": "Kaggle", "colab": "Colab", "local": "local"}[env["platform"]]
    click = {"kaggle": "choose Settings > Accelerator > GPU T4 x2 and run all again",
             "colab": "choose Runtime > Change runtime type > T4 GPU and run all again",
             "local": "set profile = 'cpu' or run it on a Kaggle T4"}[env["platform"]]

    def row(what: str, value: str, why: str = "") -> None:
        rows.append({"what": what, "value": value, "why": why})

    total = None
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        total = torch.cuda.get_device_properties(device).total_memory
        row("GPU", f"{torch.cuda.device_count()} x {name}", "compute capability {}.{}".format(*capability))
        if chosen == "bf16" and capability < (8, 0):
            advice.append("bf16 was asked for and a {} (compute capability {}.{}) emulates it slowly: set precision = "
                          "'auto', which takes fp16 there.".format(name, *capability))
    elif found.type == "cuda":
        row("GPU", "not used", f"what is measured here is the CPU; there is {device_reason}")
    else:
        row("GPU", "none", device_reason)
        if trains and torch.cuda.is_available():
            advice.append(f"The GPU cannot be used, {device_reason}.")
        elif trains and env["platform"] != "local":
            offer = " (offered once the phone number of the account is verified)" if env["platform"] == "kaggle" else ""
            advice.append(f"This {place} session has no GPU: {click}{offer}; without one only small profiles make "
                          "sense.")
    row("CPU", hardware_text(env, gpus=False))
    row("precision", chosen, precision_reason)
    outputs = outputs_folder()
    free = shutil.disk_usage(next(path for path in (outputs, *outputs.parents) if path.is_dir())).free
    row("disk, free", f"{free / GB:.1f} GB", "where outputs go")
    if task is not None:
        teacher = task.teacher.model
        vocabulary = teacher.get_input_embeddings().weight.shape[0]
        world = int(os.environ.get("WORLD_SIZE", 1))
        mine = task.recipe.replace(batch_size=max(1, task.recipe.batch_size // world))
        parts = training_memory(mine, vocabulary, count_parameters(teacher), shares_of_weights())
        needed, result = sum(parts.values()), None
        # The old checkpoint and the new one, of whole weights.
        writes = 2 * shares_of_weights() * parts["student weights, gradients, at most two moments, fp32"]
        row("disk, needed", f"{writes / GB:.2f} GB", "two checkpoints, estimated")
        if free < writes:
            advice.append(f"The disk has {free / GB:.1f} GB free and the run needs {writes / GB:.1f} GB (estimated): "
                          "delete outputs of earlier runs or let ASNN_OUTPUTS name a folder on another disk.")
        try:
            result = _probe(task, precision, steps, seconds)
        except torch.cuda.OutOfMemoryError:
            advice.append(f"The GPU's {total / 2**30:.0f} GiB do not hold this run (about {needed / 2**30:.1f} GiB, "
                          f"estimated): {click}, or take a recipe of a smaller batch_size.")
        if total is not None:
            why = f"the run needs about {needed / 2**30:.1f} GiB (estimated)"
            if result:
                why += f"; the probe took {result.peak_memory_gb:.1f} GiB (measured)"
            row("GPU memory", f"{total / 2**30:.1f} GiB", why)
        else:
            row("memory", f"{peak_memory_gb():.1f} GiB", "peak of this process (measured)")
        if result:
            speed = result.step / result.seconds
            hours = task.recipe.distill_steps / speed / 3600
            row("speed", f"{speed:.2f} steps/s, {result.tokens_per_second:,.0f} tokens/s",
                f"probe of {result.step} steps (measured)")
            row("training", f"{hours:.2f} h", f"{task.recipe.distill_steps:,} steps without evaluation (estimated)")
            limit = max_hours or (12.0 if env["platform"] == "kaggle" else math.inf)
            if hours > limit:
                first = "" if max_hours else "set max_hours = 11, so that it saves before the session ends; "
                again = "attach its output with Add Input and" if env["platform"] == "kaggle" else "then"
                advice.append(f"Training takes about {hours:.1f} h and {limit:g} h are allowed: {first}it stops in time "
                              f"and saves; {again} run all again to go on.")
    elif total is not None:
        row("GPU memory", f"{total / 2**30:.1f} GiB")
    else:
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a system that does not say
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            row("memory", f"{memory / 2**30:.1f} GiB", "of this machine")
    row("versions", versions_text(env), place)
    return rows, advice


# ======================================================================================================
# 8  SpikingBrain
# ======================================================================================================
#
# Do the spikes carry information about the teacher's representation? Three estimators that can say no, the gate over
# them, interventions as causal evidence, and a remedy. n tokens, C channels of a site, K values a spike can take.

GATE = {"dead channels": 0.05, "saturated channels": 0.10, "firing rate": (0.2, 0.6), "mutual information": 0.1,
        "CKA": 0.3, "PPL rise": 0.02}
LOCKED_EVENTS = 20  # a channel with fewer spikes may show one sign by chance


def wilson_interval(count: np.ndarray | float, n: float, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % score interval of a proportion count / n; (0, 1) where n is 0."""
    if not n:
        return np.zeros_like(count, float), np.ones_like(count, float)
    share = np.asarray(count, float) / n
    centre, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (np.maximum((centre - half) / (1 + z * z / n), 0.0), np.minimum((centre + half) / (1 + z * z / n), 1.0))


def bootstrap_interval(rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray] | None = None,
                       draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile 95 % interval of a function of column means. rows (m, k): m independent units, windows or minibatches
    and not tokens, which depend on each other; statistic maps means (draws, k) to (draws,), by default the first."""
    rows = np.asarray(rows, float).reshape(len(rows), -1)
    m = len(rows)
    means = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), draws) @ rows / m  # (draws, k)
    low, high = np.quantile(means[:, 0] if statistic is None else statistic(means), (0.025, 0.975))
    return float(low), float(high)


def window_interval(values: Tensor, window: Tensor) -> tuple[float, float]:
    """Bootstrap interval of the mean of values (n,) over windows (n,), each with as many tokens as it has."""
    _, inverse, counts = window.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, inverse, values.double().cpu())
    return bootstrap_interval(torch.stack((sums, counts.double()), 1).numpy(), lambda means: means[:, 0] / means[:, 1])


def evenly_spaced(n: int, count: int) -> np.ndarray:
    """At most `count` of the indices 0 .. n - 1, the first and the last among them."""
    return np.linspace(0, n - 1, min(n, count)).astype(int)


class SpikeCapture(contextlib.ExitStack):
    """The spikes of a student while a block runs, in train or eval mode, at every site or those in `names`:

        with SpikeCapture(student, max_tokens) as capture:
            student(input_ids)
        capture.spikes()["0.k"]  # (n, C) int8; floats for a dense twin

    Of each site at most `max_tokens` tokens are kept, the first ones. No hook is left behind, whatever is raised.
    """

    def __init__(self, student: nn.Module, max_tokens: int = 32_768, names: Iterable[str] | None = None):
        require(max_tokens >= 1, "max_tokens", max_tokens, "a whole number from 1")
        super().__init__()
        self.student, self.max_tokens, self.names = student, max_tokens, names
        self._parts: dict[str, list[Tensor]] = {}

    def _keep(self, name: str, spikes: Tensor) -> None:
        parts = self._parts.setdefault(name, [])
        room = self.max_tokens - sum(len(part) for part in parts)
        if room > 0:
            kept = spikes.detach().flatten(0, -2)[:room]  # (tokens, C)
            dense = self.student.config.spike_kind == "dense"
            parts.append((kept.float() if dense else kept.to(torch.int8)).cpu())

    def __enter__(self) -> SpikeCapture:
        self.enter_context(spike_hooks(self.student, self._keep, self.names))
        return self

    def spikes(self) -> dict[str, Tensor]:
        """{"layer.site": (n, C)} of what was kept, in the order in which it fired."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}


class SpikeRecord(NamedTuple):
    """Spikes and teacher states of the same n tokens, on the CPU."""

    spikes: dict[str, Tensor]  # {"layer.site": (n, C) int8}
    hidden: dict[int, Tensor]  # {teacher layer: (n, D) fp32}, outputs of its blocks
    window: Tensor  # (n,) the sequence a token is of
    position: Tensor  # (n,) its place there
    next_token: Tensor  # (n,) the token after it, -1 at the end of a sequence
    control: dict[str, Tensor]  # spikes of the same student, untrained
    levels: dict[str, int]  # {"layer.site": events a unit can fire at most}
    binary: tuple[str, ...] = ()  # sites whose spikes have no sign

    def each(self, function: Callable[..., Tensor], *others: SpikeRecord) -> SpikeRecord:
        """function(tensor, those of the other records at its place) in the place of every tensor."""
        def of(*items: Any) -> Any:
            if isinstance(items[0], dict):
                return {key: function(*(item[key] for item in items)) for key in items[0]}
            return function(*items)
        return SpikeRecord(*map(of, *(record[:-2] for record in (self, *others))), self.levels, self.binary)

    def select(self, keep: Tensor) -> SpikeRecord:
        """The tokens where keep (n,) is True, or those of its indices."""
        return self.each(lambda x: x[keep])


def batch_of(batch: Any) -> tuple[Tensor, Tensor | None]:
    """(input_ids (B, T), attention_mask or None) of what a loader yields: ids, a dict, or a tuple, the ids first."""
    if isinstance(batch, Tensor):
        return batch, None
    if hasattr(batch, "keys"):
        return batch["input_ids"], batch.get("attention_mask")
    return batch[0], None


def untrained_copy(student: GooseForCausalLM, input_ids: Tensor, seed: int = 0) -> GooseForCausalLM:
    """A student of the same configuration with random weights, its encoders calibrated: the control."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        control = GooseForCausalLM(student.config)
    control = control.to(next(student.parameters()).device).eval()
    calibrate_encoders(control, input_ids)
    return control


@torch.no_grad()
def record_spikes(student: GooseForCausalLM, teacher: nn.Module, loader: Iterable[Any], max_batches: int | None = None,
                  max_tokens: int = 20_480, control: bool = True, seed: int = 0, progress: bool = True) -> SpikeRecord:
    """Runs student, teacher and an untrained control over batches of a loader (see `batch_of`), until `max_batches` or
    `max_tokens`; padding is left out.

    Raises ValueError for a dense twin, which has no spikes, and for a loader without a batch.
    """
    require(student.config.spike_kind != "dense", "spike_kind", "dense", "a student with spikes")
    layers, sites = range(len(transformer_blocks(teacher))), spike_modules(student)
    levels = {name: module.levels for name, module in sites.items()}
    binary = tuple(name for name, module in sites.items() if module.kind == "binary")
    untrained, parts, windows, tokens = None, [], 0, 0
    with evaluating(student, teacher), progress_bar(None, "recording spikes", "token", progress, max_tokens) as bar:
        for ids, mask in map(batch_of, itertools.islice(loader, max_batches)):
            if tokens >= max_tokens:
                break
            B, T = ids.shape
            real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.bool().cpu()
            place = real.long().cumsum(1) - 1
            if control and untrained is None:
                untrained = untrained_copy(student, ids, seed)
            found = []
            for model in (student, untrained)[:1 + control]:
                where = next(model.parameters()).device
                with SpikeCapture(model, B * T) as capture:
                    model.base_model(ids.to(where), None if mask is None else mask.to(where), use_cache=False)
                found.append(capture.spikes())
            where = next(teacher.parameters()).device
            with capture_blocks(teacher, layers) as blocks:
                extra = {} if mask is None else {  # GPT-2 counts positions from the start of the row, pads included
                    "attention_mask": mask.to(where), "position_ids": place.clamp_min(0).to(where)}
                teacher.base_model(ids.to(where), use_cache=False, **extra)
            following = torch.full((B, T), -1)
            following[:, :-1] = torch.where(real[:, 1:], ids[:, 1:].cpu(), -1)
            whole = SpikeRecord(found[0], {t: blocks[t][1].flatten(0, 1).float().cpu() for t in layers},
                                torch.arange(windows, windows + B).repeat_interleave(T), place.flatten(),
                                following.flatten(), found[1] if control else {}, levels, binary)
            parts.append(whole.select(real.flatten().nonzero()[:max_tokens - tokens, 0]))
            windows, tokens = windows + B, tokens + len(parts[-1].window)
            bar.update(len(parts[-1].window))
    require(bool(parts), "loader", "empty", "at least one batch")
    return parts[0].each(lambda *found: torch.cat(found), *parts[1:])


def entropy_bits(counts: np.ndarray) -> np.ndarray:
    """Plug-in entropy in bits over the last axis of counts (..., K)."""
    p = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return -np.sum(np.where(p > 0, p * np.log2(np.maximum(p, 1e-300)), 0.0), -1)


class SpikeHealthChecker:
    """Which channels fire, how often, with which sign, and how many of them say different things."""

    MAX_CORRELATED = 1024  # channels in the covariance, evenly spaced

    def check(self, spikes: Tensor, window: Tensor, position: Tensor, levels: int = 1,
              binary: bool = False) -> dict[str, Any]:
        """spikes (n, C) int8, window and position (n,) -> measures of the site.

        Saturated are channels that always fire and, for kinds with two signs, those that only ever show one:
        `sign-locked` counts the second sort alone. Shares of channels and the rate of each channel, as if its tokens
        were independent, have Wilson intervals; the site's firing rate has one by bootstrap over windows, for tokens
        are not. `entropy` is in bits per channel, `entropy share` relative to log2(2 levels + 1), 1.585 for ternary;
        `participation ratio` is (tr Cov)^2 / tr Cov^2, the number of channels that an equally rich code of independent
        ones would have, `correlation` the mean |r| of pairs of channels. Arrays: rate (C,), rate interval (C, 2),
        entropies (C,), by position (T,).
        """
        n, C = spikes.shape
        counts = np.stack([(spikes == value).sum(0).numpy() for value in range(-levels, levels + 1)], -1)  # (C, K)
        fired, positive = n - counts[:, levels], counts[:, levels + 1:].sum(-1)
        locked = (fired >= LOCKED_EVENTS) & ((positive == 0) | (positive == fired))
        fires = (spikes != 0).float()
        rates = fires.mean(1)
        at_position = torch.zeros(int(position.max()) + 1).index_add_(0, position, rates)
        entropies = entropy_bits(counts)
        entropy, most = float(entropies.mean()), math.log2(2 if binary else 2 * levels + 1)
        chosen = spikes[:, ::-(-C // self.MAX_CORRELATED)].float()
        covariance = torch.cov(chosen.t()).reshape(chosen.shape[1], -1)  # (C', C')
        spread = covariance.diagonal().clamp_min(0).sqrt()
        active = spread > 0
        r = (covariance / torch.outer(spread, spread).clamp_min(1e-12))[active][:, active].abs()
        pairs = r.numel() - len(r)
        result = {"channels": C, "tokens": n}
        saturated = fired == n if binary else (fired == n) | locked
        for name, which in (("dead channels", fired == 0), ("saturated channels", saturated),
                            ("sign-locked channels", locked)):
            low, high = wilson_interval(int(which.sum()), C)
            result |= {name: float(which.mean()), f"{name} interval": (float(low), float(high))}
        return result | {
            "firing rate": float(fires.mean()), "firing rate interval": window_interval(rates, window),
            "entropy": entropy, "entropy share": entropy / most,
            "correlation": float((r.sum() - len(r)) / pairs) if pairs else math.nan,
            "participation ratio": float(covariance.trace() ** 2 / covariance.square().sum().clamp_min(1e-12)),
            "rate": fired / n, "rate interval": np.stack(wilson_interval(fired, n), -1), "entropies": entropies,
            "by position": (at_position / torch.bincount(position).clamp_min(1)).numpy()}


def whitened_components(hidden: Tensor, components: int) -> Tensor:
    """The first principal components of hidden (n, D), each scaled to variance 1: (n, components)."""
    x = hidden.float() - hidden.float().mean(0)
    values, vectors = torch.linalg.eigh(x.t() @ x / len(x))  # ascending
    kept = min(components, int((values > 1e-6 * values[-1].clamp_min(1e-20)).sum()))
    return x @ (vectors[:, -kept:].flip(1) / values[-kept:].flip(0).sqrt()) if kept else x[:, :0]


def miller_madow(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(plug-in, Miller-Madow) mutual information in bits of contingency tables counts (..., R, S) [15]: the second one
    less (occupied cells - rows - columns + 1) / (2 n ln 2), the first order of the bias."""
    n = np.maximum(counts.sum((-2, -1)), 1)
    rows, columns, cells = counts.sum(-1), counts.sum(-2), counts.reshape(*counts.shape[:-2], -1)
    plain = entropy_bits(rows) + entropy_bits(columns) - entropy_bits(cells)
    occupied = (cells > 0).sum(-1) - (rows > 0).sum(-1) - (columns > 0).sum(-1) + 1
    return plain, plain - occupied / (2 * n * math.log(2))


class MutualInformationEstimator:
    """I(spike of a channel; teacher state) in bits, from below.

    `probe`: H(S) - CE, the cross-entropy of a held-out multinomial logistic regression on the teacher's principal
    components, is at most the mutual information, up to sampling error, for any probe [14]. It is cross-fitted on
    blocks of windows: every token is predicted by a probe that saw none of its block. A p-value says how often the
    fitted probe does as well on spikes of other tokens, the larger one of two nulls: circular shifts of the token axis,
    which keep the autocorrelation, and exchanged windows, which keep the position in the window as well, for a spike
    that knows nothing but its position is no evidence. Probes fitted anew to shifted spikes say what the estimator
    returns where there is nothing.
    `plug_in`: Miller-Madow on quantile bins, as a second opinion.
    """

    def __init__(self, components: int = 64, folds: int = 2, iterations: int = 50, ridge: float = 1.0,
                 shifts: int = 999, refits: int = 100, bins: int = 16, seed: int = 0):
        for name, value, least in (("components", components, 1), ("folds", folds, 2), ("iterations", iterations, 1),
                                   ("shifts", shifts, 100), ("refits", refits, 0), ("bins", bins, 2)):
            require(isinstance(value, int) and value >= least, name, value, f"a whole number from {least}")
        self.components, self.folds, self.iterations, self.ridge = components, folds, iterations, ridge
        self.shifts, self.refits, self.bins, self.seed = shifts, refits, bins, seed

    def blocks(self, window: Tensor) -> Tensor:
        """(n,) the fold of each token: contiguous blocks of windows, so that one text stays on one side."""
        order, place = window.unique(return_inverse=True)
        require(len(order) >= self.folds, "windows", len(order), f"at least the {self.folds} folds")
        return place * self.folds // len(order)

    @staticmethod
    def _least_shift(window: Tensor) -> int:
        """Two windows, in tokens: beyond the autocorrelation."""
        n = len(window)
        return max(1, min(n // 4, 2 * n // len(window.unique())))

    def fit(self, features: Tensor, target: Tensor, K: int) -> Tensor:
        """Weights (p + 1, C, K - 1) of C regressions that share features (n, p), targets (n, C) in 0 .. K-1, class 0
        the reference. Nesterov's method; features have variance 1, so that 1/2 bounds the curvature (Boehning 1992)."""
        n, C = target.shape
        X = torch.cat((features, torch.ones(n, 1, device=features.device)), 1)  # (n, p + 1)
        Y = torch.cat([(target == k).float() for k in range(1, K)], 1)  # (n, (K-1) C)
        shrink = torch.full((X.shape[1], 1), self.ridge / n, device=X.device)
        shrink[-1] = 0
        W = torch.zeros(X.shape[1], Y.shape[1], device=X.device)
        # One regressor's scale is 1, but a few carry outliers: the largest eigenvalue is what counts.
        step = 1.0 / (0.5 * float(torch.linalg.matrix_norm(X.t() @ X / n, 2)) + self.ridge / n)
        look, previous = W, W
        for i in range(self.iterations):
            odds = (X @ look).clamp_(max=30.0).exp_().view(n, K - 1, C)
            p = odds.div_(1 + odds.sum(1, keepdim=True)).view(n, -1)
            W = look - step * (X.t() @ p.sub_(Y) / n + shrink * look)
            look, previous = W + i / (i + 3) * (W - previous), W
        return W.view(-1, K - 1, C).transpose(1, 2)

    def log_probabilities(self, features: Tensor, target: Tensor, K: int, fold: Tensor) -> Tensor:
        """log2 q(s | features), (n, C, K), each token's by the probe of the other folds."""
        n, C = target.shape
        out = torch.empty(n, C, K)
        for f in fold.unique().tolist():
            inside = (fold == f).to(features.device)
            W = self.fit(features[~inside], target[~inside], K)
            x = features[inside]
            logits = (x @ W[:-1].flatten(1) + W[-1].flatten()).view(len(x), C, K - 1)
            logits = torch.cat((torch.zeros_like(logits[..., :1]), logits), -1)
            out[inside.cpu()] = (F.log_softmax(logits, -1) / math.log(2)).cpu()
        return out

    def _gain(self, log_q: Tensor, target: Tensor) -> Tensor:
        """log2 q(s | x) - log2 p(s) for each token and channel, (n, C); its mean is H(S) - CE."""
        chosen = log_q.gather(-1, target.cpu().long().unsqueeze(-1)).squeeze(-1)
        return chosen - self._log_frequency(target.cpu(), log_q.shape[-1])

    @staticmethod
    def _log_frequency(target: Tensor, K: int) -> Tensor:
        share = torch.stack([(target == k).float().mean(0) for k in range(K)], -1)  # (C, K)
        return share.clamp_min(1e-12).log2().gather(1, target.long().t()).t()

    def probe(self, features: Tensor, spikes: Tensor, window: Tensor, levels: int = 1) -> dict[str, Any]:
        """features (n, p) of variance 1, spikes (n, C) -> {"bits" (C,), "p" (C,), "q" (C,) after Benjamini-Hochberg,
        "mean", "interval" by bootstrap over windows, "mean p", "null" (refits,), "null mean", "null high" (95 %)}."""
        n, C = spikes.shape
        K, fold = 2 * levels + 1, self.blocks(window)
        # Enough tokens for each weight of the probe, or it learns the noise.
        p = max(1, min(features.shape[1], int((fold != 0).sum()) // 20))
        features, target = features[:, :p], (spikes.int() + levels).to(features.device)
        rng = np.random.default_rng(self.seed)
        away = self._least_shift(window)
        lags = rng.integers(away, n - away + 1, self.refits)
        length = len(window) // len(window.unique())
        if len(window) == length * len(window.unique()):  # every other one to another window, at the same position
            lags[::2] = np.maximum(1, lags[::2] // length) * length
        null = [target[:, i % C].roll(int(lag)) for i, lag in enumerate(lags)]
        parts = torch.stack([*target.t(), *null], 1).split(256, 1)  # bounds the memory: (n, 256, K)
        log_q = [self.log_probabilities(features, part, K, fold) for part in parts]
        gain = torch.cat([self._gain(q, part) for q, part in zip(log_q, parts)], 1)
        log_q = torch.cat(log_q, 1)[:, :C]
        bits, null_bits = gain.mean(0)[:C].numpy(), gain.mean(0)[C:].numpy()
        exchanged, same = self._exchanged(log_q, target.cpu(), window)
        nulls = [self._shifted(log_q, target.cpu(), away), exchanged - same + bits]  # (shifts, C)
        p_value = np.max([(1 + (gains >= bits).sum(0)) / (1 + len(gains)) for gains in nulls], 0)
        p_value[(target == target[:1]).all(0).cpu().numpy()] = 1.0  # always the same: shifts are equal but for rounding
        mean_p = max(float((1 + (gains.mean(1) >= bits.mean()).sum()) / (1 + len(gains))) for gains in nulls)
        null_mean, high = (null_bits.mean(), np.quantile(null_bits, 0.95)) if self.refits else (math.nan, math.nan)
        return {"bits": bits, "p": p_value, "q": import_optional("scipy.stats").false_discovery_control(p_value),
                "mean": float(bits.mean()), "interval": window_interval(gain[:, :C].mean(1), window),
                "mean p": mean_p, "null": null_bits, "null mean": float(null_mean), "null high": float(high)}

    def _shifted(self, log_q: Tensor, target: Tensor, away: int) -> np.ndarray:
        """Mean gain (shifts, C) of fixed predictions against circularly shifted spikes, all lags at once by FFT."""
        n, C, K = log_q.shape
        lags = np.unique(np.linspace(away, n - away, min(self.shifts, n - 2 * away + 1)).astype(int))
        constant = (log_q[..., 0].mean(0) - self._log_frequency(target, K).mean(0)).numpy()  # (C,)
        out = np.empty((len(lags), C))
        for start in range(0, C, 64):
            part = slice(start, start + 64)
            total = 0
            for k in range(1, K):
                ratio = torch.fft.rfft(log_q[:, part, k] - log_q[:, part, 0], dim=0)
                total = total + ratio * torch.fft.rfft((target[:, part] == k).float(), dim=0).conj()
            out[:, part] = torch.fft.irfft(total, n, dim=0)[lags].numpy() / n + constant[part]
        return out

    def _exchanged(self, log_q: Tensor, target: Tensor, window: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Mean gain (shifts, C) of fixed predictions against the spikes of other windows at the same positions: random
        permutations of the windows, from the score of every pair of windows; and (C,) against their own. Windows are
        cut to their median length, and shorter ones, such as a last one that was cut off, left out."""
        C, K = target.shape[1], log_q.shape[-1]
        rows = [torch.where(window == w)[0] for w in window.unique()]
        length = sorted(map(len, rows))[(len(rows) - 1) // 2]
        index = torch.stack([row[:length] for row in rows if len(row) >= length])  # (W, T)
        constant = (log_q[index][..., 0].sum((0, 1)) - self._log_frequency(target, K)[index].sum((0, 1))).numpy()
        score = torch.zeros(C, len(index), len(index))
        for k in range(1, K):
            ratio = (log_q[..., k] - log_q[..., 0])[index].permute(2, 0, 1)  # (C, W, T)
            score += ratio @ (target[index] == k).float().permute(2, 1, 0)
        rng, score, here = np.random.default_rng(self.seed), score.numpy(), np.arange(len(index))
        gain = lambda those: (score[:, here, those].sum(1) + constant) / index.numel()  # noqa: E731
        out = np.empty((self.shifts, C))
        for i in range(self.shifts):
            order = rng.permutation(len(index))
            cycle = np.empty_like(order)
            cycle[order] = np.roll(order, 1)  # one cycle through all windows: none meets itself
            out[i] = gain(cycle)
        return out, gain(here)

    def plug_in(self, features: Tensor, spikes: Tensor, window: Tensor, levels: int = 1, shifts: int = 100,
                components: int = 4, null_channels: int = 32) -> dict[str, Any]:
        """Miller-Madow estimate (C,) on quantile bins of one component per channel, bins and choice of the component
        from the other half of the tokens; {"bits", "mean", "null mean", "null high"}, the null of `shifts` circular
        shifts, on at most `null_channels` channels."""
        K, fold = 2 * levels + 1, self.blocks(window) % 2
        x, s = features[:, :components].cpu(), spikes.cpu().int() + levels
        n, C = s.shape
        codes = torch.empty(n, x.shape[1], dtype=torch.long)
        for f in (0, 1):
            edges = torch.quantile(x[fold != f][:200_000], torch.linspace(0, 1, self.bins + 1)[1:-1], dim=0)
            codes[fold == f] = torch.searchsorted(edges.t().contiguous(), x[fold == f].t().contiguous()).t()
        onehot = F.one_hot(codes, self.bins).flatten(1).float()  # (n, P R)

        def information(values: Tensor) -> np.ndarray:  # (plain and corrected, C')
            halves = []
            for f in (0, 1):
                rows, part = onehot[fold == f], values[fold == f]
                cells = torch.stack([rows.t() @ (part == k).float() for k in range(K)], -1)  # (P R, C', K)
                table = cells.view(x.shape[1], self.bins, -1, K).permute(2, 0, 1, 3)  # (C', P, R, K)
                halves.append(miller_madow(table.double().numpy()))
            found = np.array(halves)  # (2, plain and corrected, C', P)
            best = found[::-1, 0].argmax(-1)  # (2, C') the component that the other half chooses
            return np.take_along_axis(found, best[:, None, :, None], -1)[..., 0].mean(0)

        plain, bits = information(s)
        some = s[:, evenly_spaced(C, null_channels)]
        away = self._least_shift(window)
        lags = np.random.default_rng(self.seed).integers(away, n - away + 1, shifts)
        null = np.stack([information(some.roll(int(lag), 0))[1].mean() for lag in lags])
        return {"bits": bits, "plain": plain, "mean": float(bits.mean()), "null mean": float(null.mean()),
                "null high": float(np.quantile(null, 0.95))}

    def founders(self, features: Tensor, spikes: Tensor, levels: int = 1, tokens: int = 128,
                 bins: int = 20) -> tuple[float, float]:
        """The founders' estimate, plain counts of 20 equal bins of one component over 128 tokens, mean over channels
        in bits, and what the same formula gives for spikes of other tokens."""
        x, s = features[:tokens, 0].cpu().numpy(), spikes[:tokens].cpu().numpy()
        other = spikes[-tokens:].cpu().numpy()
        edges, values = np.histogram_bin_edges(x, bins), np.arange(-levels, levels + 2) - 0.5
        mean = lambda part: float(np.mean([miller_madow(np.histogram2d(x, column, (edges, values))[0])[0]  # noqa: E731
                                           for column in part.T]))
        return mean(s), mean(other)

    def next_token(self, hidden: Tensor, embedded: Tensor, spikes: Tensor, next_token: Tensor, window: Tensor,
                   levels: int = 1, channels: int = 32) -> dict[str, Any]:
        """What spikes tell of the token to come, bits per channel, by the same probe on embedded (n, p), components of
        the next token's embedding.

        `next token`: I(spike; token) from below, at most H(spike), with interval and null. `beyond teacher`: how much
        better the probe on teacher state and token is than the one on the teacher state alone, with its 95 % interval
        over windows; an estimate of I(spike; token | teacher state) and no bound, for both probes are imperfect.
        `beyond teacher null`: the same for tokens shifted circularly, what the additional weights cost.
        """
        known = next_token >= 0
        columns = evenly_spaced(spikes.shape[1], channels)
        s, where, K = spikes[known][:, columns].int() + levels, window[known], 2 * levels + 1
        x, e, fold = hidden[known.to(hidden.device)], embedded[known.to(embedded.device)], self.blocks(where)
        least = max(1, int((fold != 0).sum()) // 40)
        x, e, s = x[:, :least], e[:, :least], s.to(hidden.device)
        other = e.roll(len(e) // 2, 0)
        token, shifted, state, both, null = (
            self._gain(self.log_probabilities(part, s, K, fold), s).mean(1)  # (n,)
            for part in (e, other, x, torch.cat((x, e), 1), torch.cat((x, other), 1)))
        found = {}
        for name, gain, nothing in (("next token", token, shifted), ("beyond teacher", both - state, null - state)):
            found |= {name: float(gain.mean()), f"{name} interval": window_interval(gain, where),
                      f"{name} null": float(nothing.mean())}
        return found


def hsic_of_kernels(K: Tensor, L: Tensor) -> Tensor:
    """Unbiased HSIC of every pair of kernels [7], K (a, n, n) and L (b, n, n) with zeros on their diagonals: (a, b)."""
    n = K.shape[-1]
    rows, columns = K.sum(-1), L.sum(-1)  # (a, n), (b, n)
    total = K.flatten(1) @ L.flatten(1).t() + rows.sum(-1, keepdim=True) * columns.sum(-1) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * rows @ columns.t()) / (n * (n - 3))


def hsic_of_kernels_diagonal(K: Tensor) -> Tensor:
    """Unbiased HSIC of each kernel (a, n, n) with itself: (a,)."""
    return torch.cat([hsic_of_kernels(part, part).flatten() for part in K.split(1)])


def cka_of_terms(terms: np.ndarray) -> np.ndarray:
    """CKA of averaged HSIC terms (..., 3): xy, xx, yy. Averages come before the ratio [8]."""
    xy, xx, yy = np.moveaxis(np.asarray(terms, float), -1, 0)
    norm = np.sqrt(np.maximum(xx, 0) * np.maximum(yy, 0))
    return np.where(norm > 1e-12, xy / np.maximum(norm, 1e-12), 0.0)


def biased_noise_cka(n: int, d1: int, d2: int) -> float:
    """What biased linear CKA gives for two independent white noises of d1 and d2 channels over n samples; d / (n + d)
    for d1 = d2. Correlated channels count as fewer: shuffling the tokens of one side measures it."""
    return math.sqrt(d1 * d2 / ((n + d1) * (n + d2)))


class RepresentationAnalyzer:
    """Unbiased minibatch linear CKA [6, 7, 8] of spikes and teacher states.

    A minibatch is a run of whole windows of about `batch_tokens` tokens. Features are standardised over all tokens and
    position 0 is left out by the caller; `raw` is the value without standardising. The interval is a bootstrap over
    minibatches. The null pairs the spikes of each minibatch with the teacher's states of others: the states of other
    sequences at the same positions, in every cyclic order of the minibatches and, inside, of their tokens by whole
    and by random lags, `shifts` in all.
    """

    def __init__(self, batch_tokens: int = 512, shifts: int = 100, seed: int = 0):
        require(batch_tokens >= 16, "batch_tokens", batch_tokens, "a whole number from 16")
        require(shifts >= 20, "shifts", shifts, "a whole number from 20")
        self.batch_tokens, self.shifts, self.seed = batch_tokens, shifts, seed

    def minibatches(self, window: Tensor) -> list[Tensor]:
        """Token indices of each minibatch; at least 20 of them where there are enough windows."""
        names, inverse = window.unique(return_inverse=True)
        wanted = min(self.batch_tokens, max(32, len(window) // 20))
        per = max(1, round(wanted * len(names) / len(window)))
        found = [torch.where((inverse >= i) & (inverse < i + per))[0] for i in range(0, len(names), per)]
        return [part for part in found if len(part) >= 8]

    @staticmethod
    def _kernel(x: Tensor) -> Tensor:
        x = x - x.mean(0)
        return (x @ x.t()).fill_diagonal_(0)

    @torch.no_grad()
    def analyze(self, record: SpikeRecord, layer_of: dict[str, int], device: torch.device | str = "cpu",
                progress: bool = True) -> dict[str, Any]:
        """{"heat": (sites, teacher layers), "sites": {name: measures}} for the teacher layer of each site."""
        names, layers = list(record.spikes), list(record.hidden)
        batches = self.minibatches(record.window)
        require(bool(batches), "tokens in a window", len(record.window), "at least 8")

        def standard(x: Tensor) -> Callable[[Tensor], Tensor]:
            mean, std = x.float().mean(0), x.float().std(0)
            std = torch.where(std > 1e-6, std, torch.inf)  # a channel without variance counts nothing
            return lambda rows: ((x[rows].float() - mean) / std).to(device)

        def kernels(parts: Iterable[Tensor]) -> Tensor:
            return torch.stack([self._kernel(part) for part in parts])

        def terms(X: Tensor, Y: Tensor) -> Tensor:  # (a, b, 3) of `cka_of_terms` for each pair of kernels
            xy = hsic_of_kernels(X, Y).cpu()
            xx, yy = (hsic_of_kernels_diagonal(K).cpu() for K in (X, Y))
            return torch.stack((xy, xx.unsqueeze(1).expand_as(xy), yy.expand_as(xy)), -1)

        spikes, control, hidden = ({key: standard(x) for key, x in part.items()}
                                   for part in (record.spikes, record.control, record.hidden))
        mapped = torch.tensor([layers.index(layer_of[name]) for name in names])
        sites = torch.arange(len(names))
        sums = {key: [] for key in ("heat", "raw", "control", "biased", "null")}
        size = max(set(map(len, batches)), key=[len(rows) for rows in batches].count)
        alike = [number for number, rows in enumerate(batches) if len(rows) == size]
        states_of = {t: {b: self._kernel(hidden[layers[t]](batches[b])) for b in alike}
                     for t in mapped.unique().tolist()}
        # By whole windows first, where a minibatch holds several; then by any number of tokens.
        length = int(torch.bincount(record.window[batches[alike[0]]]).max())
        lags = np.random.default_rng(self.seed).integers(1, size, self.shifts + 2)
        whole = min(size // length, len(lags))
        lags[:whole] = np.arange(whole) * length
        for number, rows in enumerate(progress_bar(batches, "CKA", "minibatch", progress)):
            features = [spikes[name](rows) for name in names]
            goals = [hidden[t](rows) for t in layers]
            X, Y = kernels(features), kernels(goals)
            sums["heat"].append(terms(X, Y))
            sums["raw"].append(terms(kernels(record.spikes[name][rows].float().to(device) for name in names),
                                     kernels(record.hidden[t][rows].to(device) for t in layers))[sites, mapped])
            if record.control:
                sums["control"].append(terms(kernels(control[name](rows) for name in names), Y)[sites, mapped])
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(number)).to(device)
            sums["biased"].append(torch.stack([torch.stack((  # as they are; shuffled
                linear_cka(x, goals[t], unbiased=False), linear_cka(x[order], goals[t], unbiased=False))).cpu()
                for x, t in zip(features, mapped.tolist())]))
            if number not in alike:
                continue
            null, others = torch.empty(self.shifts, len(names)), len(alike) - 1
            for t, states in states_of.items():
                some = torch.where(mapped == t)[0]
                for draws in torch.arange(self.shifts).split(25):  # bounds the memory: 25 shifted kernels
                    turned = []
                    for draw in draws.tolist():
                        turn, other = divmod(draw, others) if others else (draw + 1, -1)
                        lag = int(lags[turn]) if turn else 0
                        from_batch = alike[(alike.index(number) + 1 + other) % len(alike)]
                        turned.append(states[from_batch].roll((lag, lag), (0, 1)))
                    null[draws[:, None], some] = hsic_of_kernels(X[some.to(X.device)], torch.stack(turned)).t().cpu()
            sums["null"].append(null)
        stack = {key: torch.stack(value).double().numpy() for key, value in sums.items() if value}
        mean = {key: value.mean(0) for key, value in stack.items()}
        found = {}
        for i, (name, t) in enumerate(zip(names, mapped.tolist())):
            value = float(cka_of_terms(mean["heat"][i, t]))
            null = cka_of_terms(np.stack(np.broadcast_arrays(mean["null"][:, i], *mean["heat"][i, t, 1:]), -1))
            C, D = record.spikes[name].shape[1], record.hidden[layers[t]].shape[1]
            found[name] = {"CKA": value, "interval": bootstrap_interval(stack["heat"][:, i, t], cka_of_terms),
                           "teacher layer": layers[t], "null mean": float(null.mean()),
                           "null high": float(np.quantile(null, 0.95)),
                           "p": float((1 + (null >= value).sum()) / (1 + len(null))),
                           "control": float(cka_of_terms(mean["control"][i])) if record.control else math.nan,
                           "raw": float(cka_of_terms(mean["raw"][i])), "biased": float(mean["biased"][i, 0]),
                           "biased shuffled": float(mean["biased"][i, 1]),
                           "biased noise": biased_noise_cka(size, C, D), "minibatches": len(batches), "n": size}
        return {"heat": cka_of_terms(mean["heat"]), "names": names, "layers": layers, "sites": found}


def student_id(student: nn.Module) -> str:
    """Content hash of a model's weights and spikes: the same for a model and what was saved of it."""
    tied = (getattr(student, "_tied_weights_keys", None) or {}) if student.config.tie_word_embeddings else {}
    config = {name: getattr(student.config, name, None) for name in (
        "spike_kind", "encoder_kind", "spike_sites", "threshold", "state_kind", "output_order", "recurrence")}
    return content_hash(json.dumps(config), *(
        part for name, value in sorted(student.state_dict().items()) if name not in tied
        for part in (name, value.detach().cpu().float().contiguous().numpy().tobytes())))


SITE_METRICS = tuple(GATE)[:-1]  # a rise of PPL is the student's


def _margin(site: dict[str, Any], name: str) -> float:
    """By how much a site passes a metric of the gate."""
    value, limit = site[name], GATE[name]
    if name == "firing rate":
        return min(value - limit[0], limit[1] - value)
    if name.endswith("channels"):
        return limit - value
    # Above the threshold and above the null, which a p-value decides.
    return min(value - limit, value - site[f"{name} null"] if site[f"{name} p"] <= 0.05 else -1.0)


def _plain(value: Any) -> Any:
    """Numbers as JSON knows them: NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


@dataclass
class ValidationResult:
    """What a validation measured: scalars per site, arrays for figures, the CKA heat map, and what it belongs to."""

    meta: dict[str, Any]
    sites: dict[str, dict[str, Any]]
    arrays: dict[str, dict[str, np.ndarray]]
    heat: np.ndarray  # (sites, teacher layers)

    @property
    def gate(self) -> dict[str, Any]:
        """{"metrics": {name: {"value", "interval", "null", "threshold", "pass", ...}}, "verdict", and `meta`}. Every
        site has to pass; the value is that of the site nearest to failing. `clear` says whether the whole interval is
        on the passing side: the gate itself is on the value, as defined."""
        metrics = {}
        for name in SITE_METRICS:
            margins = {site: _margin(row, name) for site, row in self.sites.items()}
            worst = min(margins, key=margins.get)
            row = self.sites[worst]
            interval = list(row[f"{name} interval"])
            ends = [_margin({**row, name: end}, name) for end in interval]
            passed = sum(m >= 0 if name == "firing rate" else m > 0 for m in margins.values())
            metrics[name] = {"value": row[name], "interval": interval, "null": row.get(f"{name} null"),
                             "p": row.get(f"{name} p"), "threshold": GATE[name], "pass": passed == len(margins),
                             "clear": min(ends) > 0, "site": worst, "sites passed": passed, "sites": len(margins)}
        if "PPL rise" in self.meta:
            rise = self.meta["PPL rise"]
            metrics["PPL rise"] = {"value": rise, "interval": None, "null": None, "threshold": GATE["PPL rise"],
                                   "pass": rise <= GATE["PPL rise"]}
        passed = all(entry["pass"] for entry in metrics.values())
        return _plain({**self.meta, "metrics": metrics, "verdict": "passed" if passed else "failed"})

    @property
    def summary(self) -> dict[str, Any]:
        """The verdict, the metrics that failed, and means over sites."""
        mean = lambda key: float(np.mean([row[key] for row in self.sites.values()]))  # noqa: E731
        gate, more = self.gate, ("entropy", "CKA biased", "correlation", "participation ratio")
        return {"verdict": gate["verdict"], "failed": [n for n, entry in gate["metrics"].items() if not entry["pass"]],
                **{key: mean(key) for key in (*SITE_METRICS, *more)}, "tokens": self.meta["tokens"],
                "sites": len(self.sites)}

    def table(self) -> list[dict[str, str]]:
        """One row for each site, values with 95 % intervals and nulls."""
        columns = {
            "dead %": "{dead channels%:.1f}", "saturated %": "{saturated channels%:.1f}",
            "sign-locked %": "{sign-locked channels%:.1f}", "firing rate": "{firing rate±}",
            "entropy, bits": "{entropy:.3f} ({entropy share%:.0f} %)", "MI probe, bits": "{mutual information±}",
            "of H(S)": "{share of entropy%:.0f} %", "null": "{mutual information null:.3f}",
            "channels with q < 0.05": "{informative channels%:.0f} %",
            "MI Miller-Madow (null)": "{Miller-Madow:.3f} ({Miller-Madow null:.3f})",
            "MI founders' (noise)": "{founders MI:.3f} ({founders MI noise:.3f})", "teacher layer": "{teacher layer}",
            "CKA": "{CKA±}", "CKA null": "{CKA null:.3f}", "untrained": "{CKA control:.3f}", "raw": "{CKA raw:.3f}",
            "biased (shuffled; noises)": "{CKA biased:.3f} ({CKA biased shuffled:.3f}; {CKA biased noise:.3f})",
            "participation ratio": "{participation ratio:.1f} of {channels}", "mean |r|": "{correlation:.3f}",
            "next token, bits (null)": "{next token±} ({next token null:.3f})",
            "beyond teacher (null)": "{beyond teacher±} ({beyond teacher null:.3f})"}
        rows = []
        for name, s in self.sites.items():
            percent = {f"{key}%": 100 * value for key, value in s.items() if isinstance(value, (int, float))}
            spans = {f"{key}±": "{:.3f} [{:.3f}, {:.3f}]".format(value, *s[f"{key} interval"])
                     for key, value in s.items() if f"{key} interval" in s}
            values = {**s, **percent, **spans}
            rows.append({"site": name, **{column: form.format_map(values) for column, form in columns.items()}})
        return rows

    def to_json(self) -> str:
        """Everything but the arrays of channels."""
        return json.dumps(_plain({"sites": self.sites, "heat": self.heat, "gate": self.gate}), indent=1, sort_keys=True)


class SpikingBrainValidator:
    """Health, mutual information and CKA of every spike site of a student, and the gate over them.

    `layer_map` is {student layer: teacher layer}; the ends of the spans (`span_ends`) by default. At most `max_tokens`
    tokens are held. Probes of sites with more than `max_channels` channels take evenly spaced ones.
    """

    def __init__(self, device: torch.device | str = "cpu", layer_map: dict[int, int] | None = None,
                 max_tokens: int = 20_480, max_channels: int = 256, seed: int = 42,
                 information: MutualInformationEstimator | None = None, cka: RepresentationAnalyzer | None = None):
        check_numbers(locals(), {"max_tokens": "int", "max_channels": "int"})
        self.device, self.layer_map, self.max_tokens, self.max_channels = device, layer_map, max_tokens, max_channels
        self.seed, self.health = seed, SpikeHealthChecker()
        self.information = information or MutualInformationEstimator(seed=seed)
        self.cka = cka or RepresentationAnalyzer(seed=seed)

    def layer_of(self, names: Iterable[str], n_student: int, n_teacher: int) -> dict[str, int]:
        """The teacher layer of each site; `head_in` belongs to the last. Raises ValueError for layers there are not."""
        mapping = dict(enumerate(span_ends(n_student, n_teacher))) if self.layer_map is None else dict(self.layer_map)
        for s, t in mapping.items():
            require(0 <= s < n_student and 0 <= t < n_teacher, "layer_map", (s, t),
                    f"student layers 0 to {n_student - 1}, teacher layers 0 to {n_teacher - 1}")
        missing = [i for i in range(n_student) if i not in mapping]
        require(not missing, "layer_map", self.layer_map, f"a teacher layer for each of the {n_student} student layers")
        return {name: n_teacher - 1 if name == "head_in" else mapping[int(name.split(".")[0])] for name in names}

    def validate(self, student: GooseForCausalLM, teacher: nn.Module, loader: Iterable[Any],
                 max_batches: int | None = None, progress: bool = True,
                 meta: dict[str, Any] | None = None) -> ValidationResult:
        """Validates a student on batches of a loader (see `batch_of`); `meta`, such as corpus and teacher, goes into
        the gate beside the student's id, tokens, seed and version."""
        begin = time.perf_counter()
        record = record_spikes(student, teacher, loader, max_batches, self.max_tokens, True, self.seed, progress)
        with torch.no_grad():
            embedded = teacher.get_input_embeddings().weight.detach().float().cpu()[record.next_token.clamp_min(0)]
        result = self.judge(record, student.config.n_layer, embedded, progress,
                            {"student": student_id(student), **(meta or {})})
        result.meta |= {"seconds": time.perf_counter() - begin, "peak memory, GiB": peak_memory_gb()}
        return result

    @torch.no_grad()
    def judge(self, record: SpikeRecord, n_layer: int, embedded: Tensor | None = None, progress: bool = True,
              meta: dict[str, Any] | None = None) -> ValidationResult:
        """The same for spikes that are already there. embedded (n, X): embeddings of the next tokens."""
        layer_of = self.layer_of(record.spikes, n_layer, len(record.hidden))
        inner = record.select(record.position > 0)
        cka = self.cka.analyze(inner, layer_of, self.device, progress)
        components = {t: whitened_components(inner.hidden[t].to(self.device), self.information.components)
                      for t in sorted(set(layer_of.values()))}
        following = None if embedded is None else whitened_components(
            embedded[record.position > 0].to(self.device), self.information.components // 2)
        sites, arrays = {}, {}
        for name, spikes in progress_bar(record.spikes.items(), "health and information", "site", progress):
            levels, x = record.levels[name], components[layer_of[name]]
            health = self.health.check(spikes, record.window, record.position, levels, name in record.binary)
            kept = evenly_spaced(spikes.shape[1], self.max_channels)
            some = inner.spikes[name][:, kept]
            probe = self.information.probe(x, some, inner.window, levels)
            plug_in = self.information.plug_in(x, some, inner.window, levels)
            plain, noise = self.information.founders(x, some, levels)
            told = {f"{what}{part}": value for what in ("next token", "beyond teacher") for part, value in (
                ("", math.nan), (" interval", (math.nan, math.nan)), (" null", math.nan))}
            if following is not None:
                told = self.information.next_token(x, following, some, inner.next_token, inner.window, levels)
            found = cka["sites"][name]
            array = {key: value for key, value in health.items() if isinstance(value, np.ndarray)}
            arrays[name] = {**array, "mutual information": probe["bits"], "null": probe["null"], "q": probe["q"],
                            "Miller-Madow": plug_in["bits"]}
            sites[name] = {
                **{key: value for key, value in health.items() if key not in array},
                "mutual information": probe["mean"], "mutual information interval": probe["interval"],
                "mutual information null": probe["null high"], "mutual information null mean": probe["null mean"],
                "mutual information p": probe["mean p"], "informative channels": float((probe["q"] < 0.05).mean()),
                "share of entropy": probe["mean"] / max(1e-9, float(health["entropies"][kept].mean())),
                "Miller-Madow": plug_in["mean"], "Miller-Madow null": plug_in["null high"], "founders MI": plain,
                "founders MI noise": noise, **told, "CKA": found["CKA"], "CKA null": found["null high"],
                "teacher layer": found["teacher layer"],
                **{f"CKA {key}": found[key] for key in ("interval", "p", "control", "raw", "biased", "biased shuffled",
                                                        "biased noise", "minibatches", "n")}}
        facts = {"version": "v15", "asnn_common": __version__, "tokens": len(record.window),
                 "windows": len(record.window.unique()), "seed": self.seed, "layer_of": layer_of,
                 "heat_layers": cka["layers"], "heat_sites": cka["names"], **(meta or {})}
        return ValidationResult(facts, sites, arrays, cka["heat"])


# ---- Interventions -----------------------------------------------------------------------------------

INTERVENTIONS = ("mean", "shuffle", "jitter", "delay", "flip", "zero")


@dataclass(frozen=True)
class Intervention:
    """One way to damage spikes (B, T, C): `mean`, each channel's mean rate in their place; `shuffle`, a permutation of
    the tokens of a window, another one for each channel; `jitter`, one in which nothing moves by more than `amount`
    tokens; `delay`, each entry from 0 to `amount` tokens before, which unlike the two before it shows no token its
    future; `flip`, signs turned with probability `amount`; `zero`."""

    kind: str
    amount: float = 0.0

    def __post_init__(self):
        require(self.kind in INTERVENTIONS, "intervention", self.kind, ", ".join(INTERVENTIONS))
        if self.kind in ("jitter", "delay"):
            require(self.amount >= 1 and self.amount == int(self.amount), f"amount of {self.kind}", self.amount,
                    "a whole number of tokens from 1")
        elif self.kind == "flip":
            require(0 <= self.amount <= 1, "amount of flip", self.amount, "a probability")
        else:
            require(self.amount == 0, f"amount of {self.kind}", self.amount, "0: there is none")

    def apply(self, spikes: Tensor, means: Tensor, generator: torch.Generator, mask: Tensor | None = None) -> Tensor:
        """spikes (B, T, C), means (C,), a generator on the CPU, mask (B, T) with 0 at padding, which nothing moves to
        or from -> (B, T, C)."""
        if self.kind == "zero":
            return torch.zeros_like(spikes)
        if self.kind == "mean":
            return means.to(spikes).expand_as(spikes)
        noise = torch.rand(spikes.shape, generator=generator).to(spikes.device)
        if self.kind == "flip":
            return torch.where(noise < self.amount, -spikes, spikes)
        time_axis = torch.arange(spikes.shape[1], device=spikes.device).view(1, -1, 1)
        real = time_axis >= 0 if mask is None else mask.bool().unsqueeze(-1).to(spikes.device)
        if self.kind == "delay":
            source = time_axis - (noise * (self.amount + 1)).floor().long()
            return torch.where(source >= 0, (spikes * real).gather(1, source.clamp_min(0)), 0)
        # Sorting t + u with u in [0, n + 1) moves nothing by more than n.
        key = noise if self.kind == "shuffle" else time_axis + noise * (self.amount + 1)
        T, after = spikes.shape[1], real.cumsum(1) > 0
        order = torch.where(real, key, torch.where(after, time_axis + 2 * T, time_axis - T)).argsort(1)
        return spikes.gather(1, order.expand_as(spikes))


@torch.no_grad()
def intervene(student: GooseForCausalLM, loader: Iterable[Any], interventions: Iterable[Intervention],
              sites: Iterable[str] | None = None, max_batches: int | None = None, unigram: Tensor | None = None,
              seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """The temporal coding suite: PPL of a student whose spikes are damaged, one place and one way at a time.

    Args:
        loader: see `batch_of`; every token but the first of a sequence is scored.
        sites: "0.k" for one place, "all.k" for a site in all layers at once; by default all of both.
        unigram: (V,) counts of the unigram model; by default those of the loader's own tokens, its best case.
    Returns:
        Rows {"site", "layer", "intervention", "amount", "ppl", "rise", "standard error", "tokens"}, intact and unigram
        first; rise is PPL / intact PPL, its error over paired sequences.
    Raises:
        ValueError for a site that does not exist.
    """
    modules = spike_modules(student)
    groups = {name: [name] for name in modules}
    for name in modules:
        if "." in name:
            groups.setdefault(f"all.{name.split('.', 1)[1]}", []).append(name)
    chosen = list(groups) if sites is None else list(sites)
    for name in chosen:
        require(name in groups, "site", name, ", ".join(groups))
    device, head = next(student.parameters()).device, student.get_output_embeddings().weight
    batches = [batch_of(batch) for batch in itertools.islice(loader, max_batches)]
    require(bool(batches), "loader", "empty", "at least one batch")
    # The tokens that a sequence has before them, -100 in the place of others.
    scored = [ids[:, 1:] if mask is None else torch.where((mask[:, 1:] * mask[:, :-1]).bool(), ids[:, 1:], -100)
              for ids, mask in batches]
    counts = np.concatenate([(labels >= 0).sum(1).cpu().numpy() for labels in scored])
    targets = torch.cat([labels[labels >= 0].cpu() for labels in scored])
    plan = [(site, item) for item in interventions for site in chosen]
    now: dict[str, Tensor | None] = {}
    totals: dict[str, Tensor] = {}

    def losses() -> np.ndarray:
        """NLL in nats summed over each sequence."""
        found = []
        for (ids, mask), labels in zip(batches, scored):
            now["mask"] = mask = None if mask is None else mask.to(device)
            hidden = student.base_model(ids.to(device), mask, use_cache=False).last_hidden_state
            nll = chunked_nll(hidden[:, :-1], head, labels.to(device))  # (B, T - 1), 0 at labels of -100
            found.append(nll.double().sum(1).cpu().numpy())
        bar.update(1)
        return np.concatenate(found)

    def count(name: str, spikes: Tensor) -> None:
        real = spikes.new_ones(spikes.shape[:2]) if now["mask"] is None else now["mask"].to(spikes)  # (B, T)
        total = torch.einsum("bt,btc->c", real.float(), spikes.float())
        totals[name] = totals.get(name, 0) + torch.cat((total, real.float().sum().view(1)))

    def row(layer: str, site: str, kind: str, amount: float, nll: float, error: float) -> dict[str, Any]:
        rise = math.exp(min(100.0, nll - base))
        return {"site": site, "layer": layer, "intervention": kind, "amount": float(amount),
                "ppl": math.exp(min(100.0, nll)), "rise": rise, "standard error": rise * error, "tokens": len(targets)}

    with evaluating(student), progress_bar(None, "interventions", "run", progress, len(plan) + 1) as bar:
        with spike_hooks(student, count):
            intact = losses()
        means, base = {name: value[:-1] / value[-1] for name, value in totals.items()}, intact.sum() / len(targets)
        unigram = torch.bincount(targets, minlength=len(head)) if unigram is None else unigram
        log_p = ((unigram.float() + 1e-9) / unigram.sum()).log()
        # A token that the counts lack would cost everything: it gets a share of one count.
        log_p = torch.where(unigram > 0, log_p, -math.log(float(unigram.sum()) + len(unigram)))
        rows = [row("-", "-", "intact", 0, base, 0.0),
                row("-", "-", "unigram", 0, -float(log_p[targets].double().sum()) / len(targets), 0.0)]
        for site, item in plan:
            generator = torch.Generator().manual_seed(seed)
            with spike_hooks(student, lambda name, spikes: item.apply(spikes, means[name], generator, now["mask"]),
                             groups[site]):
                damaged = losses()
            mean = damaged.sum() / len(targets)
            residual = (damaged - intact) - (mean - base) * counts
            error = math.sqrt(len(counts) / max(1, len(counts) - 1) * float((residual**2).sum())) / len(targets)
            layer, where = site.split(".", 1) if "." in site else ("-", site)
            rows.append(row(layer, where, item.kind, item.amount, mean, error))
    return rows


# ---- Remediation -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remediation:
    """What a remedy does; each part can be switched off.

    `threshold`: the spikes' threshold becomes this one (None: stays). With `mixed_fixed`, the founders' mixture of
    token and channel with a channel statistic that is fixed at inference, that statistic is calibrated so that each
    channel fires as often as before, or at the end of `rate_band` that it was beyond. `recentre`: biases move the
    median of each channel of keys and values to zero. `unlock`: biases move channels of which less than `minority` of
    the spikes have the rarer sign, just so far that this share has. `rate_weight`: pulls the firing rate of each
    channel into `rate_band`. `align_weight`: pulls keys and values to ternary teacher targets. Learning rates are those
    of the recipe given to `remediate`, times `lr_scale`.
    """

    threshold: str | None = "mixed_fixed"
    recentre: bool = True
    unlock: bool = True
    minority: float = 0.02
    rate_weight: float = 3.0
    rate_band: tuple[float, float] = (0.22, 0.57)
    align_weight: float = 0.05
    steps: int = 250
    lr_scale: float = 0.3

    def __post_init__(self):
        require(self.threshold is None or self.threshold in THRESHOLDS, "Remediation.threshold", self.threshold,
                f"None, {', '.join(THRESHOLDS)}")
        require(0 < self.minority < 0.5, "Remediation.minority", self.minority, "a share above 0 and below 0.5")
        check_band(self.rate_band, "Remediation.rate_band")
        check_fields(self, zero=("rate_weight", "align_weight"))

    @classmethod
    def for_gate(cls, gate: dict[str, Any], **values: Any) -> Remediation:
        """The parts that what failed calls for; `values` win. Thresholds and rates for channels that fire too much or
        too little; centres and alignment, which cost perplexity, only where spikes say too little."""
        failed = {name for name, entry in gate["metrics"].items() if not entry["pass"]}
        silent = bool(failed & {"mutual information", "CKA"})
        rates = bool(failed & {"firing rate", "dead channels", "saturated channels"})
        return cls(**{"threshold": "mixed_fixed" if rates else None, "rate_weight": 3.0 * rates, "recentre": silent,
                      "unlock": "saturated channels" in failed, "align_weight": 0.05 * silent, **values})


def ternary_targets(hidden: Tensor, width: int) -> Tensor:
    """Teacher states hidden (..., D) as ternary spikes (..., width): channels standardised over all tokens, turned by a
    fixed orthogonal matrix where the widths differ, at the threshold that suits a Gaussian, 0.77 mean|x|."""
    flat = hidden.detach().float().flatten(0, -2)  # (n, D)
    flat = (flat - flat.mean(0)) / flat.std(0).clamp_min(1e-6)
    if flat.shape[1] != width:
        size = max(width, flat.shape[1])
        turn = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))[0]
        flat = flat @ turn[:flat.shape[1], :width].to(flat)
    return ternary_spike(flat, 0.77 * flat.abs().mean(-1, keepdim=True)).view(*hidden.shape[:-1], width)


class RemediationObjective(Distiller):
    """Distillation with the terms of a Remediation beside it."""

    def __init__(self, student: GooseForCausalLM, teacher: nn.Module, recipe: Recipe, settings: Remediation,
                 layer_of: dict[str, int] | None = None):
        # A recipe that holds the rates itself goes on doing so.
        own = recipe.rate_weight > settings.rate_weight
        band = recipe.rate_band if own else settings.rate_band
        super().__init__(student, teacher, recipe.replace(
            rate_weight=max(recipe.rate_weight, settings.rate_weight), rate_band=band))
        self.settings = settings
        self._layer_of = layer_of or SpikingBrainValidator().layer_of(
            spike_modules(student), len(transformer_blocks(student)), len(transformer_blocks(teacher)))

    def forward(self, input_ids: Tensor, labels: Tensor, step: int = 0,
                want_ce: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """input_ids, labels (B, T) -> loss and its terms, `rate` and `spike alignment` among them."""
        if not self.settings.align_weight:
            return super().forward(input_ids, labels, step, want_ce)
        fired: dict[str, Tensor] = {}
        with spike_hooks(self.student, lambda name, spikes: fired.__setitem__(name, spikes)), \
                capture_blocks(self.teacher, set(self._layer_of.values())) as blocks:
            loss, terms = super().forward(input_ids, labels, step, want_ce)
        errors = []
        for name, spikes in fired.items():
            if name.split(".", 1)[-1] in ("k", "v"):
                state = blocks[self._layer_of[name]][1][:, 1:]  # position 0 is GPT-2's outlier
                target = ternary_targets(state, spikes.shape[-1]).to(spikes.device)
                errors.append((spikes[:, 1:].float() - target).square().mean())
        terms["spike alignment"] = torch.stack(errors).mean()
        return loss + self.settings.align_weight * terms["spike alignment"], terms


@torch.no_grad()
def prepare_remedy(student: GooseForCausalLM, settings: Remediation, input_ids: Tensor) -> GooseForCausalLM:
    """A copy of the student with the threshold and the centres of `settings`, calibrated on input_ids (B, T)."""
    changes = {} if settings.threshold is None else {"threshold": settings.threshold}
    if settings.recentre or settings.unlock:
        changes["projection_bias"] = True
    device = next(student.parameters()).device
    mended = GooseForCausalLM(GooseConfig.from_dict({**student.config.to_dict(), **changes}))
    mended.load_state_dict(student.state_dict(), strict=False)  # what is new, biases and channel means: 0 and 1
    mended = mended.to(device).eval()

    def reaching(module: nn.Module) -> Tensor:  # (n, C) what a site gets, with those before it as they are by now
        seen = []
        with module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].float().flatten(0, -2))):
            mended.base_model(input_ids.to(device), use_cache=False)
        return seen[0]

    def quantiles(x: Tensor, share: Tensor) -> Tensor:  # what `share` of each channel's values exceeds
        return torch.stack([column.quantile(1 - part) for column, part in zip(x.t(), share)])

    with SpikeCapture(student, input_ids.numel()) as capture:
        student.base_model(input_ids.to(device), use_cache=False)
    for name, spikes in capture.spikes().items():  # in order: a site sees what the mended ones before it do
        module, fires = spike_modules(mended)[name], (spikes != 0).float().mean(0)
        rate = fires.clamp(*settings.rate_band).to(device)
        upward = ((spikes > 0).float().mean(0) / fires.clamp_min(1e-6)).to(device)  # share of spikes that are positive
        if isinstance(module, TernarySpike) and (settings.recentre or settings.unlock) and module.kind != "binary":
            x = reaching(module)
            if settings.recentre:
                shift = x.median(0).values
            else:
                scale = x.abs().mean(-1, keepdim=True).clamp_min(1e-6).sqrt()
                up = upward.clamp(settings.minority, 1 - settings.minority)
                # Fire upwards for the highest inputs, downwards for the lowest, each as often as it should be.
                ends = [quantiles(x / scale, share) for share in (rate * up, 1 - rate * (1 - up))]
                shift = torch.where(up != upward, (ends[0] + ends[1]) / 2 * scale.mean(), 0.0)
            mix = transformer_blocks(mended)[int(name.split(".")[0])].time_mix
            (mix.key if name.endswith(".k") else mix.value).bias -= shift
        if settings.threshold == "mixed_fixed":
            x = reaching(module) - (module.centre if isinstance(module, SpikeEncoder) else 0)
            token, alpha = x.abs().mean(-1, keepdim=True).clamp_min(1e-6), module.alpha.abs().clamp_min(1e-6)
            x = x if module.kind == "binary" else x.abs()
            if isinstance(module, SpikeEncoder):  # its threshold is that of token and channel already
                module.alpha.copy_(quantiles(x / token, rate).clamp_min(1e-6))
            else:
                module.channel_mean.copy_((quantiles(x / token.sqrt(), rate).clamp_min(1e-6) / alpha).square())
    return mended


class RemediationResult(NamedTuple):
    """A remedied student, and the validations and PPLs on the same tokens before and after; `after` and `ppl_after` are
    None where the time budget ended the remedy, which then has no `table`."""

    student: GooseForCausalLM
    before: ValidationResult
    after: ValidationResult | None
    ppl_before: float
    ppl_after: float | None
    training: FitResult

    def table(self) -> list[dict[str, str]]:
        """One row for each metric of the gate, PPL included."""
        rows, say = [], {True: "pass", False: "FAIL"}
        gates = {"before": self.before.gate["metrics"], "after": self.after.gate["metrics"]}
        for name in SITE_METRICS:
            rows.append({"metric": name, "threshold": str(GATE[name])})
            for when, m in ((when, gate[name]) for when, gate in gates.items()):
                rows[-1] |= {when: f"{m['value']:.3f} at {m['site']}",
                             f"{when}: sites": f"{m['sites passed']} of {m['sites']}", f"{when}: gate": say[m["pass"]]}
        rise = round(self.ppl_after / self.ppl_before - 1, 12)
        rows.append({"metric": "PPL", "threshold": f"rise of at most {100 * GATE['PPL rise']:.0f} %",
                     "before": f"{self.ppl_before:.2f}", "before: sites": "-", "before: gate": "-",
                     "after": f"{self.ppl_after:.2f} ({100 * rise:+.1f} %)", "after: sites": "-",
                     "after: gate": say[rise <= GATE["PPL rise"]]})
        return rows


def remediate(student: GooseForCausalLM, teacher: nn.Module, sampler: WindowSampler, recipe: Recipe,
              validate: Callable[[GooseForCausalLM], ValidationResult], ppl: Callable[[GooseForCausalLM], float],
              settings: Remediation | None = None, before: ValidationResult | None = None, folder: Path | None = None,
              description: str = "remediation", max_hours: float | None = None) -> RemediationResult:
    """Fine-tunes a copy of a student that failed the gate and validates it again; the student given stays as it is.

    Args:
        recipe: that of the student's run; its objective goes on at a fixed temperature, without FDD and alignment.
        validate, ppl: what measures a student, on validation tokens. A rise of PPL by more than 2 % fails the gate.
        before: the validation of the student where it is known.
        folder, max_hours: see `fit`. A remedy that the budget ends is not validated; the next call goes on with it.
    """
    settings = settings or Remediation()
    given = {"temperature": "fixed", "tau": 1.0} if recipe.temperature != "fixed" else {}
    recipe = recipe.replace(**given, fdd="none", hidden_weight=0.0, variance_penalty=0.0, align_steps=0, ce_start=0,
                            anneal_steps=0, curriculum="none", distill_steps=settings.steps, lr=recipe.lr * settings.lr_scale,
                            matrix_lr=None if recipe.matrix_lr is None else recipe.matrix_lr * settings.lr_scale)
    before, ppl_before = before or validate(student), ppl(student)
    mended = prepare_remedy(student, settings, sampler.batch(0, recipe.batch_size)[0])
    objective = RemediationObjective(mended, teacher, recipe, settings, before.meta.get("layer_of"))
    config = FitConfig.from_recipe(recipe, eval_every=10**9, patience=None, max_hours=max_hours)
    training = fit(objective, sampler, config, None, folder, description)
    mended = mended.to(next(student.parameters()).device).eval()
    if not training.finished:
        return RemediationResult(mended, before, None, ppl_before, None, training)
    after, ppl_after = validate(mended), ppl(mended)
    after.meta |= {"PPL rise": round(ppl_after / ppl_before - 1, 12), "PPL before": ppl_before, "PPL after": ppl_after,
                   "remedy of": before.meta.get("student"), "remedy": dataclasses.asdict(settings)}
    return RemediationResult(mended, before, after, ppl_before, ppl_after, training)


# ======================================================================================================
# 9  Sparse
# ======================================================================================================
#
# A product of weights and spikes reads only the weights of channels that fired. X inputs, `out` outputs, n tokens.
# Weights are kept as rows (X, out), one for each input channel, so that what a spike needs lies together.

BACKENDS = ("linear", "dense", "gather", "gather_int8", "embedding_bag", "embedding_bag_int8", "csr", "coo", "block")
INT8 = ("gather_int8", "embedding_bag_int8")
EXACT = tuple(name for name in BACKENDS if name not in INT8)  # but for the order of the sum
LAYOUT = {name: "packed" if name in INT8 else "weight" if name == "linear" else "rows" for name in BACKENDS}
BLOCK = 32  # input channels that the backend `block` skips together


class SpikeVector(NamedTuple):
    """What a folded encoder passes to a folded Linear: spikes (..., X) in small integers, scale (..., 1)."""

    spikes: Tensor
    scale: Tensor


def dense_product(rows: Tensor, spikes: Tensor) -> Tensor:
    """rows (X, out), spikes (n, X) -> (n, out): the reference for the other backends, all with this signature."""
    return spikes @ rows


def linear_product(weight: Tensor, spikes: Tensor) -> Tensor:
    """What nn.Linear does, with weights (out, X) as it keeps them."""
    return F.linear(spikes, weight)


def _events(spikes: Tensor, bags: int) -> tuple[Tensor, Tensor, Tensor]:
    """(channel, value, offsets) of the non-zero spikes (n, X), each token's in `bags` bags of about the same size."""
    n, X = spikes.shape
    index = spikes.flatten().nonzero().squeeze(1)  # (events,)
    if n == 1:
        edges = torch.arange(bags, device=index.device) * len(index) // bags
    else:
        edges = torch.searchsorted(index, torch.arange(n * bags, device=index.device) * X // bags)
    return index % X if n > 1 else index, spikes.flatten()[index], edges


def _bags(n: int) -> int:
    """One bag runs on one thread: a single token is split over all of them. X is a multiple of no number in
    particular, so several tokens get one bag each."""
    return max(1, torch.get_num_threads()) if n == 1 else 1


def embedding_bag_product(rows: Tensor, spikes: Tensor) -> Tensor:
    """Adds and subtracts the rows of channels that fired: one fused kernel of the library, on the CPU and on CUDA."""
    bags = _bags(len(spikes)) if rows.device.type == "cpu" else 1
    index, value, offsets = _events(spikes, bags)
    out = F.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=value.to(rows.dtype))  # (n bags, out)
    return out.view(len(spikes), bags, -1).sum(1) if bags > 1 else out


def gather_static(rows: Tensor, spikes: Tensor, capacity: int) -> Tensor:
    """The same with a fixed number of rows, as a CUDA graph needs: the `capacity` largest spikes, silent ones with
    weight 0. More spikes than that make the result NaN, which cannot be overlooked."""
    require(capacity >= 1, "capacity", capacity, "a whole number from 1")
    value, index = spikes.abs().topk(min(capacity, spikes.shape[-1]), -1)  # (n, capacity)
    value = spikes.gather(-1, index)
    lost = (spikes != 0).sum(-1, keepdim=True) > index.shape[-1]
    out = F.embedding_bag(index, rows, mode="sum", per_sample_weights=value.to(rows.dtype))
    return out.masked_fill(lost, math.nan)


def pack_rows(rows: Tensor) -> Tensor:
    """rows (X, out) in int8 with a scale and an offset for each row: (X, out + 8) bytes, for the backends in INT8."""
    return torch.ops.quantized.embedding_bag_byte_prepack(rows.float().cpu())


def embedding_bag_int8_product(packed: Tensor, spikes: Tensor) -> Tensor:
    """The same on packed rows, a fourth of the bytes at a relative error of about 0.7 %; CPU only."""
    bags = _bags(len(spikes))
    index, value, offsets = _events(spikes, bags)
    out = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(packed, index, offsets, False, 0, False, value.float(),
                                                                 None, False)
    return out.view(len(spikes), bags, -1).sum(1) if bags > 1 else out


def csr_product(rows: Tensor, spikes: Tensor) -> Tensor:
    """The library's compressed sparse rows."""
    with warnings.catch_warnings():  # "beta state"
        warnings.simplefilter("ignore", UserWarning)
        return spikes.to_sparse_csr() @ rows


def coo_product(rows: Tensor, spikes: Tensor) -> Tensor:
    """The library's coordinate format."""
    return torch.sparse.mm(spikes.to_sparse_coo(), rows)


def block_product(rows: Tensor, spikes: Tensor) -> Tensor:
    """Skips blocks of BLOCK channels in which no token fired."""
    X, pad = rows.shape[0], -rows.shape[0] % BLOCK
    active = F.pad(spikes.ne(0).any(0), (0, pad)).view(-1, BLOCK).any(1).repeat_interleave(BLOCK)[:X]
    index = active.nonzero().squeeze(1)
    return spikes[:, index] @ rows[index]


# embedding_bag takes twice, on packed rows four times as long as the memory needs for the bytes, most of it in finding
# the events and in rows that are asked for too late. This kernel does the same in one pass, and asks ahead.
KERNEL = r"""
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <algorithm>
#include <cstring>
#include <vector>

namespace {
constexpr int UNROLL = 4, AHEAD = 16;  // rows added at once, rows between asking for one and adding it

// sum (out) += value[e] * row index[e] for `count` events e. A packed row is `out` bytes, its scale and its offset.
template <typename T>
void add_rows(const T* rows, int64_t stride, const int32_t* index, const float* value, int64_t count, int64_t out,
              float* __restrict sum) {
  constexpr bool packed = sizeof(T) == 1;
  constexpr int64_t LINE = 64 / sizeof(T);
  float offset = 0;
  for (int64_t e = 0; e < std::min<int64_t>(count, AHEAD); ++e)
    for (int64_t j = 0; j < stride; j += LINE) __builtin_prefetch(rows + index[e] * stride + j);
  auto factor_of = [&](int64_t e) {
    if (!packed) return value[e];
    float pair[2];
    std::memcpy(pair, rows + index[e] * stride + out, sizeof pair);
    offset += value[e] * pair[1];
    return value[e] * pair[0];
  };
  int64_t e = 0;
  for (; e + UNROLL <= count; e += UNROLL) {
    const T *row[UNROLL], *next[UNROLL];
    float factor[UNROLL];
    for (int r = 0; r < UNROLL; ++r) {
      row[r] = rows + index[e + r] * stride;
      next[r] = rows + index[std::min(e + r + AHEAD, count - 1)] * stride;
      factor[r] = factor_of(e + r);
    }
    int64_t j = 0;
    for (; j + LINE <= out; j += LINE) {
      for (int r = 0; r < UNROLL; ++r) __builtin_prefetch(next[r] + j);
      for (int64_t c = j; c < j + LINE; ++c)
        sum[c] += factor[0] * row[0][c] + factor[1] * row[1][c] + factor[2] * row[2][c] + factor[3] * row[3][c];
    }
    for (; j < out; ++j)
      sum[j] += factor[0] * row[0][j] + factor[1] * row[1][j] + factor[2] * row[2][j] + factor[3] * row[3][j];
    for (int r = 0; r < UNROLL; ++r) __builtin_prefetch(next[r] + out);
  }
  for (; e < count; ++e) {
    const T* row = rows + index[e] * stride;
    const float factor = factor_of(e);
    for (int64_t j = 0; j < out; ++j) sum[j] += factor * row[j];
  }
  if (packed)
    for (int64_t j = 0; j < out; ++j) sum[j] += offset;
}

template <typename T>
void gather(const T* rows, int64_t stride, int64_t out, const float* spikes, int64_t n, int64_t X, float* result) {
  std::vector<int32_t> index(n * X + 1);
  std::vector<float> value(n * X + 1);
  std::vector<int64_t> begin(n + 1, 0);
  int64_t events = 0;
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t i = 0; i < X; ++i) {  // without a branch: half of the spikes are zero, at random
      index[events] = static_cast<int32_t>(i);
      value[events] = spikes[t * X + i];
      events += spikes[t * X + i] != 0;
    }
    begin[t + 1] = events;
  }
  // The events of a single token are shared by the threads, several tokens are dealt out to them.
  const int64_t parts = n == 1 ? at::get_num_threads() : 1;
  std::vector<float> sums((parts - 1) * out, 0.0f);
  std::memset(result, 0, n * out * sizeof(float));
  at::parallel_for(0, n * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t t = p / parts, part = p % parts, count = begin[t + 1] - begin[t];
      const int64_t from = begin[t] + count * part / parts, to = begin[t] + count * (part + 1) / parts;
      add_rows(rows, stride, index.data() + from, value.data() + from, to - from, out,
               part ? sums.data() + (part - 1) * out : result + t * out);
    }
  });
  for (int64_t p = 0; p + 1 < parts; ++p)
    for (int64_t j = 0; j < out; ++j) result[j] += sums[p * out + j];
}

at::Tensor gather_rows(const at::Tensor& rows, const at::Tensor& spikes) {
  const bool packed = rows.scalar_type() == at::kByte;
  TORCH_CHECK(rows.dim() == 2 && spikes.dim() == 2 && rows.size(0) == spikes.size(1) && rows.is_contiguous() &&
              (!packed || rows.size(1) >= 8) &&
              spikes.is_contiguous() && spikes.scalar_type() == at::kFloat && (packed || rows.scalar_type() == at::kFloat),
              "gather_rows takes contiguous rows (X, out) in fp32 or packed int8 and spikes (n, X) in fp32");
  const int64_t n = spikes.size(0), X = spikes.size(1), out = rows.size(1) - (packed ? 8 : 0);
  at::Tensor result = at::empty({n, out}, spikes.options());
  if (packed)
    gather(rows.const_data_ptr<uint8_t>(), rows.size(1), out, spikes.const_data_ptr<float>(), n, X, result.data_ptr<float>());
  else
    gather(rows.const_data_ptr<float>(), out, out, spikes.const_data_ptr<float>(), n, X, result.data_ptr<float>());
  return result;
}
}  // namespace

TORCH_LIBRARY(asnn_goose, m) { m.def("gather_rows(Tensor rows, Tensor spikes) -> Tensor"); }
TORCH_LIBRARY_IMPL(asnn_goose, CPU, m) { m.impl("gather_rows", &gather_rows); }
"""


_KERNEL: dict[str, str] = {}  # what `load_kernel` returned; a dict, because torch.compile looks through no functools.cache


def load_kernel() -> str:
    """Makes KERNEL available as torch.ops.asnn_goose.gather_rows: built by torch.utils.cpp_extension for this machine,
    about 10 s, and kept in the cache. Returns "", or in one sentence why it is not to be had; the library's gather takes
    its place then. ASNN_KERNEL=0 switches it off."""
    if "problem" not in _KERNEL:
        _KERNEL["problem"] = _load_kernel()
    return _KERNEL["problem"]


def _load_kernel() -> str:
    if os.environ.get("ASNN_KERNEL") == "0":
        return "the C++ kernel is switched off by ASNN_KERNEL=0"
    if not hasattr(torch.ops.asnn_goose, "gather_rows"):  # else this file was loaded twice
        key = content_hash("kernel", KERNEL, torch.__version__, platform.machine(),
                           *(cpu_facts().get(name, "") for name in ("model name", "flags", "Features")))
        library = cache_folder() / "kernels" / key / "asnn_goose.so"
        try:
            if not library.is_file() or content_hash(library.read_bytes()) != library.with_suffix(".hash").read_text():
                _build_kernel(library)  # also where a library is not whole: loading that ends the process
            torch.ops.load_library(str(library))
        except Exception as error:  # no compiler, no ninja, a full disk: all of them only cost speed
            return f"the C++ kernel cannot be built: {(str(error).strip() or repr(error)).splitlines()[0][:200]}"
        torch.library.register_fake("asnn_goose::gather_rows", lambda rows, spikes: spikes.new_empty(
            spikes.shape[0], rows.shape[1] - 8 * (rows.dtype == torch.uint8)))
    return ""


def _build_kernel(library: Path) -> None:
    """In a process of its own, which loads what it built and tells whether that runs here; moved into place when it is
    whole, because another process may build it too."""
    library.parent.mkdir(parents=True, exist_ok=True)
    tqdm = import_optional("tqdm").tqdm
    with tempfile.TemporaryDirectory(dir=library.parent) as folder, tqdm(
            total=1, desc="building the C++ kernel, once on this machine", bar_format="{desc}: {elapsed}") as bar:
        source = Path(folder) / "asnn_goose.cpp"
        source.write_text(KERNEL)
        build = ("import sys, torch; from torch.utils import cpp_extension; cpp_extension.load('asnn_goose', [sys.argv[1]], "
                 "extra_cflags=['-O3', '-march=native', '-fopenmp'], build_directory=sys.argv[2], is_python_module=False); "
                 "torch.ops.asnn_goose.gather_rows(torch.ones(8, 8), torch.ones(1, 8))")
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # ninja lies beside python
        try:
            done = subprocess.run([sys.executable, "-c", build, str(source), folder], capture_output=True, text=True,
                                  timeout=300, env={**os.environ, "PATH": path})
        except subprocess.TimeoutExpired:
            raise OSError("the compiler did not end within 300 s") from None
        if done.returncode:
            lines = (done.stderr + done.stdout).replace(folder, "...").strip().splitlines()
            telling = [line for line in lines if re.search(r"not found|No such file|error:", line)]
            raise OSError((telling or lines or [f"the compiler ended with {done.returncode}"])[-1].strip())
        built = Path(folder) / "asnn_goose.so"
        write_atomically(library.with_suffix(".hash"), content_hash(built.read_bytes()))
        os.replace(built, library)
        bar.update(1)


def gather_product(rows: Tensor, spikes: Tensor) -> Tensor:
    """`embedding_bag_product` by the kernel, where that could be built, the rows are fp32 on the CPU and no gradient is
    asked for."""
    graph = torch.is_grad_enabled() and (rows.requires_grad or spikes.requires_grad)
    if graph or rows.device.type != "cpu" or rows.dtype != torch.float32 or not rows.is_contiguous() or load_kernel():
        return embedding_bag_product(rows, spikes)
    return torch.ops.asnn_goose.gather_rows(rows, spikes.float().contiguous())


def gather_int8_product(packed: Tensor, spikes: Tensor) -> Tensor:
    """`embedding_bag_int8_product` by the kernel, where that could be built."""
    if load_kernel():
        return embedding_bag_int8_product(packed, spikes)
    return torch.ops.asnn_goose.gather_rows(packed, spikes.float().contiguous())


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": linear_product, "dense": dense_product, "gather": gather_product, "gather_int8": gather_int8_product,
    "embedding_bag": embedding_bag_product, "embedding_bag_int8": embedding_bag_int8_product, "csr": csr_product,
    "coo": coo_product, "block": block_product}


def product_weights(backend: str, rows: Tensor) -> Tensor:
    """What a product takes as its weights, made of rows (X, out)."""
    return pack_rows(rows) if backend in INT8 else rows.t().contiguous() if backend == "linear" else rows


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, quartiles and 95 % quantile over `runs` interleaved measurements."""

    median: float
    low: float
    high: float
    runs: int
    p95: float

    def text(self, unit: float = 1e3, spec: str = ".2f") -> str:
        """"median (low to high)" in units of which a second has so many, by default milliseconds."""
        return "{} ({} to {})".format(*(format(unit * value, spec) for value in (self.median, self.low, self.high)))


def time_interleaved(calls: dict[Any, Callable[[], Any]], runs: int = 7, min_seconds: float = 2e-3,
                     progress: str = "") -> dict[Any, Timing]:
    """Times functions in turns, so that what disturbs the machine disturbs all of them. Each measurement is a block of
    calls of at least `min_seconds`, by torch.utils.benchmark, with a warm-up outside the clock. `progress` names a bar."""
    benchmark = import_optional("torch.utils.benchmark")
    timers = {name: benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
              for name, call in calls.items()}
    number = {name: max(1, round(min_seconds / max(1e-7, timer.timeit(2).median))) for name, timer in timers.items()}
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in import_optional("tqdm").tqdm(range(runs), desc=progress, unit="round", disable=not progress):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(number[name]).median)
    quantiles = {name: np.quantile(values, (0.5, 0.25, 0.75, 0.95)).tolist() for name, values in seconds.items()}
    return {name: Timing(m, low, high, runs, p95) for name, (m, low, high, p95) in quantiles.items()}


def random_spikes(n: int, X: int, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Ternary spikes (n, X) of which each is non-zero with probability `density`."""
    sign = torch.where(torch.rand(n, X, generator=generator) < 0.5, -1.0, 1.0)
    return sign * (torch.rand(n, X, generator=generator) < density)


def out_of_cache(make: Callable[[], Tensor], total: int = 96 * 2**20) -> Iterator[Tensor]:
    """Endless turns through copies of a tensor, together `total` bytes, larger than the caches of a CPU."""
    first = make()
    copies = [first] + [first.clone() for _ in range(min(64, total // max(1, first.numel() * first.element_size())))]
    return itertools.cycle(copies)


class ProductBench:
    """Products of one shape (X, out) by every backend that runs on a device, on weights out of cache."""

    def __init__(self, X: int, out: int, backends: Iterable[str] = BACKENDS, device: torch.device | str = "cpu"):
        self.X, self.out, self.device = X, out, device
        self.backends = [name for name in backends if name not in INT8 or torch.device(device).type == "cpu"]
        turns = {layout: out_of_cache(lambda name=name: product_weights(name, torch.randn(X, out, device=device)))
                 for layout, name in {LAYOUT[name]: name for name in self.backends}.items()}
        self.weights = {name: turns[LAYOUT[name]] for name in self.backends}

    def calls(self, spikes: Tensor) -> dict[str, Callable[[], Tensor]]:
        """{backend: its product with spikes (n, X)}, for `time_interleaved`."""
        return {name: lambda product=PRODUCTS[name], turn=turn: product(next(turn), spikes)
                for name, turn in self.weights.items()}


class BackendTable:
    """Which backend is fastest for (X, out, tokens, density) on this machine, as measured.

    `rows` are {"in", "out", "tokens", "density", "device", "seconds": {backend: median}}.
    """

    TOKENS, DENSITIES = (1, 4, 16, 64), (0.1, 0.2, 0.4, 0.6, 0.8)

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    @classmethod
    def measure(cls, shapes: Iterable[tuple[int, int]], device: torch.device | str = "cpu", seconds: float = 18.0,
                backends: Iterable[str] = ("linear", "dense", "gather", "gather_int8", "csr"),
                progress: bool = True) -> BackendTable:
        """Measures shapes (X, out), weights out of cache, within about `seconds`; the result is kept in the cache under
        the hardware's name and loaded by the next call."""
        shapes = sorted(set(shapes))
        env = environment()
        key = content_hash("backends 3", json.dumps([env["cpu"], env["gpus"], env["threads"], env["versions"]["torch"],
                                                     str(device), shapes, sorted(backends), KERNEL, bool(load_kernel())]))
        path = cache_folder() / "sparse" / f"{key}.json"
        if path.is_file():
            return cls(json.loads(path.read_text())["rows"])
        cells = [(n, density) for n in cls.TOKENS for density in cls.DENSITIES]
        generator, rows, end = torch.Generator().manual_seed(0), [], time.perf_counter() + seconds
        bar = import_optional("tqdm").tqdm(total=len(shapes) * len(cells), desc="measuring backends", unit="case",
                                           mininterval=1.0, disable=not progress)
        for X, out in shapes:
            bench = ProductBench(X, out, backends, device)
            for n, density in cells:
                calls = bench.calls(random_spikes(n, X, density, generator).to(device))
                left = max(0.01, end - time.perf_counter()) / (bar.total - bar.n) / len(calls)
                timing = time_interleaved(calls, runs=3, min_seconds=min(2e-3, left / 6))
                rows.append({"in": X, "out": out, "tokens": n, "density": density, "device": str(device),
                             "seconds": {name: t.median for name, t in timing.items()}})
                bar.update(1)
        bar.close()
        write_atomically(path, json.dumps({"environment": env, "rows": rows}, indent=1))
        return cls(rows)

    def seconds(self, X: int, out: int, tokens: int, density: float, exact: bool = True) -> dict[str, float]:
        """{backend: seconds} in the nearest cell that was measured; {} for a shape that was not."""
        near = [row for row in self.rows if (row["in"], row["out"]) == (X, out)]
        if not near:
            return {}
        row = min(near, key=lambda row: (abs(math.log(row["tokens"] / tokens)), abs(row["density"] - density)))
        return {name: value for name, value in row["seconds"].items() if name in (EXACT if exact else BACKENDS)}

    def choose(self, X: int, out: int, tokens: int, density: float, exact: bool = True) -> str:
        """The fastest backend in the nearest cell that was measured; linear for a shape that was not."""
        seconds = self.seconds(X, out, tokens, density, exact)
        return min(seconds, key=seconds.get, default="linear")

    def plan(self, X: int, out: int, density: float, exact: bool = True) -> dict[int, str]:
        """The backend for each of TOKENS. Decoding, one token, comes first: more tokens use the same weights unless
        another layout is more than 5 % faster, so that weights are kept twice only where that pays."""
        plan: dict[int, str] = {}
        for tokens in self.TOKENS:
            best, seconds = (f(X, out, tokens, density, exact) for f in (self.choose, self.seconds))
            kept = {LAYOUT[name] for name in plan.values()}
            same = {name: value for name, value in seconds.items() if LAYOUT[name] in kept and value <= 1.05 * seconds[best]}
            plan[tokens] = min(same, key=same.get, default=best)
        return plan


class SpikeEncode(nn.Module):
    """A SpikeEncoder whose following Linears are folded: it passes on spikes and scale instead of their product."""

    def __init__(self, encoder: SpikeEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> SpikeVector:
        """x (..., X) -> its spikes and scale."""
        return SpikeVector(*self.encoder.encode(x))


class SpikeLinear(nn.Module):
    """scale * (spikes @ weight^T) + bias for a SpikeVector, by one of BACKENDS or `auto`.

    `auto` chooses by the number of tokens and the expected density from a BackendTable. Backends that are never chosen
    keep no copy of the weights.
    """

    def __init__(self, linear: nn.Linear, backend: str = "auto", density: float = 0.4, table: BackendTable | None = None,
                 exact: bool = True):
        super().__init__()
        require(backend in (*BACKENDS, "auto"), "backend", backend, ", ".join((*BACKENDS, "auto")))
        require(backend != "auto" or table is not None, "table", table, "a BackendTable for backend auto")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.backend, self.density = backend, density
        rows = linear.weight.detach().t().contiguous()  # (X, out)
        self.plan = (table.plan(*rows.shape, density, exact) if backend == "auto"
                     else dict.fromkeys(BackendTable.TOKENS, backend))
        used = {LAYOUT[name]: name for name in self.plan.values()}
        for layout in ("rows", "weight", "packed"):
            self.register_buffer(layout, product_weights(used[layout], rows) if layout in used else None)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def backend_for(self, tokens: int) -> str:
        """The backend for so many tokens at once."""
        sizes = tuple(self.plan)
        for size, larger in zip(sizes, sizes[1:]):
            if tokens * tokens <= size * larger:  # nearer to `size` by their ratio
                return self.plan[size]
        return self.plan[sizes[-1]]

    def forward(self, x: SpikeVector) -> Tensor:
        """spikes (..., X), scale (..., 1) -> (..., out)"""
        flat = x.spikes.reshape(-1, self.in_features)  # (n, X)
        name = self.backend_for(len(flat))
        weights = getattr(self, LAYOUT[name])
        out = PRODUCTS[name](weights, flat.to(torch.float32 if name in INT8 else weights.dtype))
        out = x.scale.to(out.dtype) * out.view(*x.spikes.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, backend={self.backend}, plan={self.plan}"


class SpikeHead(nn.Module):
    """A head fed by spikes: the encoder `head_in` and the folded head."""

    def __init__(self, encoder: SpikeEncoder, head: SpikeLinear):
        super().__init__()
        self.encode, self.head = SpikeEncode(encoder), head

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        return self.head(self.encode(x))


def compile_step(student: GooseForCausalLM) -> GooseForCausalLM:
    """Lets torch.compile fuse what a block does for one token without padding and without gradients; all else runs as it
    does. The first tokens take half a minute. Returns the student, which stays as it is where nothing can compile."""
    dynamo = import_optional("torch._dynamo")
    if load_kernel() != "" and student.device.type == "cpu":
        warnings.warn(f"not compiled: {load_kernel()}", stacklevel=2)
        return student
    # Every student in a process has graphs of its own for the same code; the library's limit is 8.
    dynamo.config.recompile_limit = max(64, dynamo.config.recompile_limit)
    for block in transformer_blocks(student):
        tensors = [(name, tuple(value.shape), str(value.dtype)) for name, value in block.state_dict().items()
                   if isinstance(value, Tensor)]
        block.compiled = content_hash(repr(block), str(tensors), student.config.to_json_string())
    return student


def _quantized(module: nn.Module, what: Any) -> nn.Module:
    quantize = import_optional("torch.ao.quantization").quantize_dynamic
    with warnings.catch_warnings():  # a notice of deprecation at each call
        warnings.simplefilter("ignore")
        return quantize(nn.Sequential(module), what, dtype=torch.qint8)[0]


def int8_linear(linear: nn.Linear) -> nn.Module:
    """A Linear with int8 weights, activations quantised as they come (`torch.ao` dynamic quantisation); CPU only."""
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    plain.load_state_dict({k: v.detach().clone().float().cpu() for k, v in linear.state_dict().items()})
    return _quantized(plain, {nn.Linear})


class Int8Embedding(nn.Module):
    """A quantised Embedding for indices of any shape: its kernel takes contiguous ones of one or two dimensions."""

    def __init__(self, packed: nn.Module):
        super().__init__()
        self.packed = packed

    def forward(self, index: Tensor) -> Tensor:
        """(...) -> (..., D)"""
        return self.packed(index.flatten().contiguous()).view(*index.shape, self.packed.embedding_dim)


def int8_embedding(embedding: nn.Embedding) -> nn.Module:
    """An Embedding with rows in int8, each with a scale and an offset (`torch.ao` quantisation of weights); CPU only."""
    rows = import_optional("torch.ao.quantization").float_qparams_weight_only_qconfig
    plain = nn.Embedding(*embedding.weight.shape, _weight=embedding.weight.detach().float().cpu())
    return Int8Embedding(_quantized(plain, {nn.Embedding: rows}))


@torch.no_grad()
def sparsify(student: GooseForCausalLM, backend: str = "auto", head: str = "dense",
             density: dict[str, float] | None = None, table: BackendTable | None = None,
             exact: bool = True, embeddings: str = "dense", compiled: bool = False) -> GooseForCausalLM:
    """A decoding copy of a student in which every Linear that an encoder feeds takes spikes and skips the zeros.

    `generate` and the logits are those of the student, up to the order of sums, and to 0.7 % per product with
    gather_int8. The copy is for inference: its products have no gradient.

    Args:
        backend: one of BACKENDS or `auto`, which needs a `table` (measured here if there is none) and chooses
            gather_int8 only with exact=False.
        head: `dense`, `int8`, or `spikes` where the student has an encoder head_in.
        density: {"layer.site": share of non-zero spikes} that `auto` counts on; 0.4 where it is not given.
        embeddings: `dense`, or `int8` for a fourth of their memory.
        compiled: fuse the rest of a decoding step, see `compile_step`.
    Raises:
        ValueError for a student without encoders: its products are not fed by spikes, and nothing can be skipped.
    """
    require(backend in (*BACKENDS, "auto"), "backend", backend, ", ".join((*BACKENDS, "auto")))
    require(head in ("dense", "int8", "spikes"), "head", head, "dense, int8, spikes")
    require(embeddings in ("dense", "int8"), "embeddings", embeddings, "dense, int8")
    encoders = {name: m for name, m in spike_modules(student).items() if isinstance(m, SpikeEncoder)}
    if not encoders or student.config.spike_kind == "dense":
        raise ValueError(f"spike_sites are {student.config.spike_sites} and spike_kind is {student.config.spike_kind}: no "
                         "matrix product of this student is fed by spikes; train one with recipe v14.4-rates.")
    reject_unknown(density or {}, spike_modules(student), "density")
    require(head != "spikes" or "head_in" in encoders, "head", head, "dense, int8 for a student without the site head_in")
    copied = copy.deepcopy(student).eval()
    copied.requires_grad_(False)
    for block in transformer_blocks(copied):
        block.compiled = ""  # the structure was another's
    if backend == "auto" and table is None:
        D, width = student.config.d_model, student.config.ffn_width
        shapes = [(D, D), (D, width), (width, D)] + [(D, student.config.vocab_size)] * (head == "spikes")
        table = BackendTable.measure(shapes, next(student.parameters()).device)
    make = lambda linear, name, encoder: SpikeLinear(  # noqa: E731
        encoder.fold(linear), backend, (density or {}).get(name, 0.4), table, exact)
    for i, block in enumerate(transformer_blocks(copied)):
        mix, ffn = block.time_mix, block.ffn
        fed = {"k": ["key", "beta"], "v": ["value"], "r": ["receptance"], "g": ["gate"]}
        places = [(mix.mix_in, name, [(mix, linear) for linear in fed[name] if getattr(mix, linear, None) is not None],
                   f"{i}.mix_in.{name}") for name in mix.INPUTS]
        places += [(mix, "mix_out", [(mix, "output")], f"{i}.mix_out"), (ffn, "ffn_in", [(ffn, "up")], f"{i}.ffn_in"),
                   (ffn, "ffn_hidden", [(ffn, "down")], f"{i}.ffn_hidden")]
        for owner, attribute, linears, name in places:
            encoder = owner[attribute] if isinstance(owner, nn.ModuleDict) else getattr(owner, attribute)
            if isinstance(encoder, SpikeEncoder):
                for parent, linear in linears:
                    setattr(parent, linear, make(getattr(parent, linear), name, encoder))
                replaced = SpikeEncode(encoder)
                if isinstance(owner, nn.ModuleDict):
                    owner[attribute] = replaced
                else:
                    setattr(owner, attribute, replaced)
    if head == "int8":
        copied.lm_head = int8_linear(copied.lm_head)
    elif head == "spikes":
        copied.lm_head = SpikeHead(copied.goose.head_in, make(copied.lm_head, "head_in", copied.goose.head_in))
        copied.goose.head_in = nn.Identity()
    if embeddings == "int8":
        copied.goose.embeddings = int8_embedding(copied.goose.embeddings)

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise ValueError("a sparse copy cannot be saved: save the student it was made of, and call sparsify after loading.")

    copied.save_pretrained = refuse
    return compile_step(copied.eval()) if compiled else copied.eval()


# ======================================================================================================
# 10  Efficiency
# ======================================================================================================

ENERGY = {"MAC": 4.6e-12, "add": 0.9e-12, "DRAM byte": 640e-12 / 4}  # joules, fp32, 45 nm [17]; estimates, not measured
HARDWARE = ("cpu", "cores", "threads", "gpus")  # of `environment`: measurements that differ in these are not compared


@torch.no_grad()
def random_student(recipe: Recipe, vocab_size: int, density: dict[str, float], seed: int = 42) -> GooseForCausalLM:
    """A student with random weights, for measurements of speed, whose encoders fire with the given {site: density}: their
    thresholds are set on a batch of random tokens."""
    reject_unknown(density, SITES[2:], "density")
    for site, share in density.items():
        require(0 <= share <= 1, f"density of {site}", share, "a share in [0, 1]")
    seed_everything(seed)
    student = GooseForCausalLM(recipe.student_config(vocab_size)).eval()
    sample = torch.randint(0, vocab_size, (2, 32))
    calibrate_encoders(student, sample)

    def fire(share: float) -> Callable[..., None]:
        def hook(encoder: SpikeEncoder, args: tuple) -> None:
            x = (args[0] - encoder.centre).flatten(0, -2)  # (B*T, X)
            ratio = x.abs() / x.abs().mean(-1, keepdim=True).clamp_min(1e-6)
            encoder.alpha.fill_(float(np.quantile(ratio.flatten()[:200_000].numpy(), 1 - share)))
        return hook

    # Each encoder is set on what the ones before it pass on.
    encoders = [(name.split(".")[1 if "." in name else 0], m) for name, m in spike_modules(student).items()]  # (site, module)
    handles = [m.register_forward_pre_hook(fire(density[site])) for site, m in encoders
               if isinstance(m, SpikeEncoder) and m.kind != "dense" and site in density]
    student(sample)
    for handle in handles:
        handle.remove()
    return student


def quantize_int8(model: nn.Module, embeddings: bool = False) -> nn.Module:
    """A copy in which every Linear, GPT-2's Conv1D included, and if asked every embedding is int8 by torch.ao's dynamic
    quantisation; CPU only. What a user of the dense model would do to make it small and quick."""
    from transformers.pytorch_utils import Conv1D
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):  # its weight is (in, out)
                linear = nn.Linear(*child.weight.shape)
                linear.load_state_dict({"weight": child.weight.detach().t().contiguous(), "bias": child.bias.detach()})
                child = linear
            if isinstance(child, nn.Linear):
                setattr(module, name, int8_linear(child))
            elif embeddings and isinstance(child, nn.Embedding):
                setattr(module, name, int8_embedding(child))
    return model


def tensor_bytes(*objects: Any) -> int:
    """Bytes of all tensors in nested objects (modules, caches, named tuples), each storage counted once."""
    seen: dict[int, torch.UntypedStorage] = {}  # held, because the address of a freed one is given to another

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = storage
            if item.is_quantized and item.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
                visit([item.q_per_channel_scales(), item.q_per_channel_zero_points()])
        elif isinstance(item, nn.Module):
            visit(item.state_dict(keep_vars=True))
        elif isinstance(item, dict):
            for value in item.values():
                visit(value)
        elif isinstance(item, (list, tuple)):
            for value in item:
                visit(value)
        elif hasattr(item, "layers"):  # a cache of transformers: its layers hold keys and values
            visit([vars(layer) for layer in item.layers])
    visit(objects)
    return sum(storage.nbytes() for storage in seen.values())


class Decoder:
    """Decodes one token of a causal language model with its cache at a fixed context, each time it is called.

    The cache is the GooseState of a student, the keys and values of a transformer, which are cut by one after each call,
    or the state of transformers' RWKV, which moves on: it is of the same size at any context.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor):
        self.model, self.last = model, input_ids[:, -1:]
        takes = inspect.signature(model.forward).parameters
        self.few = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.cache = self.prefill(input_ids)

    def keyword(self, out: Any) -> tuple[str, Any]:
        """The name under which the model takes the cache that is in its output."""
        for name in ("state", "past_key_values"):
            if getattr(out, name, None) is not None:
                return name, getattr(out, name)
        raise ValueError(f"{type(self.model).__name__} returns neither state nor past_key_values: it cannot be decoded "
                         "token by token.")

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[str, Any]:
        """input_ids (B, T) -> (name, cache) after them."""
        return self.keyword(self.model(input_ids, use_cache=True, **self.few))

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Logits (B, 1, V) of the token after the context."""
        name, cache = self.cache
        out = self.model(self.last, use_cache=True, **{name: cache})
        if out.logits.shape[:2] != self.last.shape:  # transformers' RWKV mixes the sequences of a batch
            raise ValueError(f"{type(self.model).__name__} returns logits {tuple(out.logits.shape)} for token ids "
                             f"{tuple(self.last.shape)}: it does more than decode one token of each sequence.")
        if name == "past_key_values":
            out.past_key_values.crop(-1)
            self.cache = (name, out.past_key_values)
        return out.logits


def peak_allocation(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes that a call has allocated at most at once, over what was there before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler else writes two lines at each start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = call()  # the profiler knows the sizes only of what it has seen: a cache that the next call replaces
        del kept
        with torch.profiler.record_function("asnn: measured"):
            call()
    events = sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == "asnn: measured")
    sizes = np.cumsum([event.nbytes() for event in events if event.name() == "[memory]" and event.start_ns() >= begin] or [0])
    return int(max(0, sizes.max()))


class EnergyMeter:
    """Joules that a counter of the machine has counted: NVML's of the GPUs, or RAPL's of the CPU packages.

    `source` names the counter, or is None where there is none that can be read; then energy can only be estimated.
    """

    def __init__(self, device: torch.device | str = "cpu", powercap: Path = Path("/sys/class/powercap")):
        self.source, self.counters, self.ranges, self.total = None, [], [], 0.0
        if torch.device(device).type == "cuda":
            with contextlib.suppress(Exception):  # no driver library, no permission, an old GPU
                nvml = import_optional("pynvml")
                nvml.nvmlInit()
                handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
                self.counters = [lambda h=h: nvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3 for h in handles]
                self.last = [counter() for counter in self.counters]
                self.source = f"NVML, {len(handles)} GPU" if handles else None
        else:
            files = [file for file in sorted(powercap.glob("intel-rapl:*/energy_uj")) if file.parent.name.count(":") == 1]
            with contextlib.suppress(OSError, ValueError):  # only root may read it on most systems
                # psys is the whole platform, packages included.
                files = [file for file in files if (file.parent / "name").read_text().strip() != "psys"]
                self.ranges = [int((file.parent / "max_energy_range_uj").read_text()) / 1e6 for file in files]
                counters = [lambda f=f: int(f.read_text()) / 1e6 for f in files]
                self.last, self.counters = [counter() for counter in counters], counters
            self.source = f"RAPL, {len(files)} packages" if self.counters else None

    def joules(self) -> float:
        """Counted since this meter was made. RAPL's counters start again at zero after some 260 kJ: a difference is taken
        modulo that range. Raises ValueError where there is no counter."""
        require(self.source is not None, "energy counter", self.source, "NVML or RAPL, readable")
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what was asked for is to be done, or its energy is counted later
        now = [counter() for counter in self.counters]
        self.total += sum((new - old) % limit for new, old, limit in zip(
            now, self.last, self.ranges or itertools.repeat(math.inf)))
        self.last = now
        return self.total

    def per_call(self, call: Callable[[], Any], seconds: float = 5.0) -> float:
        """Joules of one call over what the idle machine takes, from windows of `seconds` each."""
        begin, clock = self.joules(), time.perf_counter()
        time.sleep(seconds)
        idle = (self.joules() - begin) / (time.perf_counter() - clock)
        begin, clock, calls = self.joules(), time.perf_counter(), 0
        while time.perf_counter() - clock < seconds:
            call()
            calls += 1
        return (self.joules() - begin - idle * (time.perf_counter() - clock)) / calls


def energy_estimate(rows: list[dict[str, Any]], bytes_read: int) -> dict[str, float]:
    """Joules per token of the rows of `operations`, estimated with ENERGY, in three columns.

    `as built`: everything that is computed as a multiply-accumulate, spikes that are zero left out only where adds say so.
    `idealised`: products fed by spikes as additions. `idealised, with DRAM and head`: the same with the head and every
    byte that a token reads from memory, `bytes_read`: that column is the one to compare systems by.
    """
    layers = [row for row in rows if row["product"] != "head"]

    def sums(some: list[dict[str, Any]], spike: float) -> float:
        return sum((row["MACs"] - row["skipped"] - row["adds"] if row["product"] != "state" else 0) * ENERGY["MAC"]
                   + row["adds"] * spike + row["state updates"] * ENERGY["MAC"] for row in some)
    return {"as built": sums(rows, ENERGY["MAC"]), "idealised": sums(layers, ENERGY["add"]),
            "idealised, with DRAM and head": sums(rows, ENERGY["add"]) + bytes_read * ENERGY["DRAM byte"]}


@dataclass
class Bench:
    """Measurements of several systems on one machine: `rows` as `bench` makes them, and the `environment` they belong to."""

    rows: list[dict[str, Any]]
    environment: dict[str, Any]

    def key(self, row: dict[str, Any]) -> tuple:
        """What a row is about."""
        return row["system"], row["batch"], row["context"]

    def same_hardware(self, other: Bench) -> None:
        """Raises ValueError that names what differs, where two benches were not measured on the same hardware."""
        for name in HARDWARE:
            require(self.environment[name] == other.environment[name], f"{name} of the other measurements",
                    other.environment[name], f"the same hardware, {self.environment[name]}")

    def merge(self, other: Bench) -> Bench:
        """Both sets of rows; the other's in the place of equal ones here."""
        self.same_hardware(other)
        return Bench(list({self.key(row): row for row in self.rows + other.rows}.values()), self.environment)

    def agreement(self, other: Bench) -> dict[tuple, float]:
        """{(system, batch, context): median latency there / median latency here} of what both measured."""
        self.same_hardware(other)
        there = {self.key(row): row for row in other.rows if "decode" in row}
        return {key: there[key]["decode"]["median"] / row["decode"]["median"] for row in self.rows if "decode" in row
                for key in [self.key(row)] if key in there}

    def save(self, path: Path) -> None:
        """Writes bench.json."""
        write_atomically(path, json.dumps({"environment": self.environment, "rows": self.rows}, indent=1))

    @classmethod
    def load(cls, path: Path) -> Bench:
        """Reads bench.json."""
        return cls(**json.loads(path.read_text()))

    def table(self) -> list[dict[str, str]]:
        """The rows as text, measured values with their unit."""
        def mib(size: int) -> str:
            return f"{size / 2**20:,.1f}"
        table = []
        for row in self.rows:
            cells = {"system": row["system"], "batch": str(row["batch"]), "context": f"{row['context']:,}"}
            if "decode" not in row:
                table.append(cells | {"ms per step (quartiles)": row["status"]})
                continue
            memory, joules = row["memory"], row["joules per token"]
            table.append(cells | {
                "ms per step (quartiles)": Timing(**row["decode"]).text(), "p95": f"{1e3 * row['decode']['p95']:.2f}",
                "tokens/s": f"{row['tokens/s']:,.1f}",
                "time to first token, ms": Timing(**row["prefill"]).text() if row["prefill"] else "-",
                "prefill tokens/s": f"{row['batch'] * row['context'] / row['prefill']['median']:,.0f}" if row["prefill"] else "-",
                "weights, MiB": mib(memory["weights"]), "state or cache, MiB": mib(memory["cache"]),
                "activations, MiB": mib(memory["activations"]), "J per token (measured)": f"{joules:.3g}" if joules else "-"})
        columns = list(dict.fromkeys(name for row in table for name in row))
        return [{name: row.get(name, "-") for name in columns} for row in table]

    def markdown(self) -> str:
        """The table for a README."""
        table = self.table()
        lines = [list(table[0]), ["---"] * len(table[0]), *([cell.replace("|", "/") for cell in row.values()] for row in table)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def latex(self) -> str:
        """The table for a paper, in the style of booktabs."""
        frame = import_optional("pandas").DataFrame(self.table())
        return frame.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1).to_latex(hrules=True)


def bench(model: nn.Module | dict[str, nn.Module], tokenizer: Any = None, contexts: Iterable[int] = (128,),
          batches: Iterable[int] = (1,), repeats: int = 20, prefill_up_to: int = 1024, prompt: str | None = None,
          energy_seconds: float = 5.0, progress: bool = True) -> Bench:
    """Measures decoding of any causal language model of transformers, or of several in turns: latency and throughput,
    time to first token, memory, energy where there is a counter.

    Args:
        model: a model, or {name: model}; all of them see the same token ids.
        tokenizer: makes the token ids of `prompt`, repeated; without one they are random.
        contexts: tokens before the one that is decoded. Models whose positions end earlier get a row that says so.
        batches: sequences decoded at once.
        repeats: interleaved measurements of each case, each after warm-up calls outside the clock.
        prefill_up_to: longest context (times batch) whose prefill is timed.
        energy_seconds: length of the window in which joules are counted.
    Returns:
        Bench with rows {"system", "batch", "context", "decode", "tokens/s", "prefill", "memory" (bytes of
        weights, cache and activations), "joules per token" (None without a counter)}; times in seconds, all measured.
    """
    systems = model if isinstance(model, dict) else {type(model).__name__: model}
    contexts, batches = tuple(contexts), tuple(batches)
    require(bool(systems), "model", model, "a model or {name: model}")
    require(prompt is None or tokenizer is not None, "prompt", prompt, "None without a tokenizer")
    for name, values in (("contexts", contexts), ("batches", batches), ("repeats", (repeats,))):
        require(values and all(isinstance(v, int) and v >= 1 for v in values), name, values, "whole numbers from 1")
    vocab = min(m.config.vocab_size for m in systems.values())
    device = next(itertools.chain.from_iterable(m.parameters() for m in systems.values()), torch.zeros(1)).device
    ids = torch.randint(0, vocab, (max(contexts),), generator=torch.Generator().manual_seed(0))
    if tokenizer is not None:
        words = torch.tensor(tokenizer(prompt or "The state of a recurrent network does not grow. ")["input_ids"])
        require(int(words.max()) < vocab, "token id", int(words.max()), f"below {vocab}, the smallest vocabulary")
        ids = words.repeat(-(-len(ids) // len(words)))[:len(ids)]
    meter, rows = EnergyMeter(device), []
    weights = {name: tensor_bytes(m) for name, m in systems.items()}
    tqdm = import_optional("tqdm").tqdm
    for batch in batches:
        decoders: dict[tuple[str, int], Decoder | str] = {}
        cases = [(name, context) for context in contexts for name in systems]
        for name, context in tqdm(cases, desc=f"contexts, batch {batch}", unit="case", disable=not progress):
            m = systems[name].eval()
            ends = None if getattr(m, "_is_stateful", False) else getattr(m.config, "max_position_embeddings", None)
            # The decoded token needs a position too.
            if ends is not None and context >= ends:
                decoders[name, context] = f"ends at {ends} positions"
                continue
            decoders[name, context] = decoder = Decoder(m, ids[:context].repeat(batch, 1).to(device))
            try:
                decoder()
            except ValueError as problem:
                decoders[name, context] = str(problem)
        run = {case: decoder for case, decoder in decoders.items() if not isinstance(decoder, str)}
        decode = time_interleaved(run, repeats, min_seconds=0.0, progress=f"decoding, batch {batch}" if progress else "")
        short = {case: lambda d=d, n=case[1]: d.prefill(ids[:n].repeat(batch, 1).to(device)) for case, d in run.items()
                 if case[1] * batch <= prefill_up_to}
        prefill = time_interleaved(short, 3, min_seconds=0.0, progress=f"prefill, batch {batch}" if progress else "")
        for case, decoder in decoders.items():
            row = {"system": case[0], "batch": batch, "context": case[1]}
            rows.append(row | {"status": decoder} if isinstance(decoder, str) else row | {
                "decode": dataclasses.asdict(decode[case]), "tokens/s": batch / decode[case].median,
                "prefill": dataclasses.asdict(prefill[case]) if case in prefill else None,
                "memory": {"weights": weights[case[0]], "cache": tensor_bytes(decoder.cache[1]),
                           "activations": peak_allocation(decoder, device)},
                "joules per token": meter.per_call(decoder, energy_seconds) / batch if meter.source else None})
    return Bench(rows, environment() | {"energy counter": meter.source})


# ======================================================================================================
# 11  Artefacts
# ======================================================================================================


def outputs_folder() -> Path:
    """ASNN_OUTPUTS, else outputs/ beside this file, or in the working folder on Kaggle and Colab, where this file may
    be in a read-only input."""
    if os.environ.get("ASNN_OUTPUTS"):
        return Path(os.environ["ASNN_OUTPUTS"])
    return Path(__file__).resolve().parent / "outputs" if where_am_i() == "local" else Path.cwd() / "outputs"


_LOCKS: dict[Path, Any] = {}  # of the run folders that this process works in


def lock_folder(folder: Path) -> None:
    """Makes the folder this process's own until unlock_folder or the process's end, however it comes. Raises RuntimeError
    when it is another's. The lock lies beside the folder, which is then as it would be without."""
    filelock = import_optional("filelock")
    lock = _LOCKS.setdefault(folder.resolve(), filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0))
    if lock.is_locked:
        return
    with _explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise RuntimeError(f"run folder {folder} is in use by another process; wait until that has ended, or choose "
                               "another run name.") from None


def unlock_folder(folder: Path) -> None:
    """Gives up the lock of lock_folder and removes its file; does nothing without one."""
    lock = _LOCKS.pop(folder.resolve(), None)
    if lock is not None and lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: nobody else's is removed
        lock.release()


# Okabe and Ito's colours, which people with any colour vision tell apart; the order puts the strongest contrasts first.
COLOURS = {"blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "vermillion": "#D55E00", "purple": "#CC79A7",
           "sky": "#56B4E9", "black": "#000000", "yellow": "#F0E442"}
FIGURE_STYLE = {
    "axes.prop_cycle": f"cycler('color', {list(COLOURS.values())})", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "font.size": 10, "axes.titlesize": 11,
    "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 8, "legend.framealpha": 0.85,
    "lines.linewidth": 1.6, "lines.markersize": 5, "figure.dpi": 100, "svg.hashsalt": "asnn"}


def figure_style() -> None:
    """Sets the look of all figures that this process draws from here on: FIGURE_STYLE over matplotlib's own."""
    matplotlib = import_optional("matplotlib")
    matplotlib.rcParams.update({**{key: matplotlib.rcParamsDefault[key] for key in FIGURE_STYLE}, **FIGURE_STYLE})


def plain_log(axis: Any, values: Iterable[float] | None = None) -> None:
    """Gives a logarithmic matplotlib axis (`axes.xaxis` or `.yaxis`, drawn already) ticks written as numbers, 200 instead
    of 2 x 10^2: at `values`, else at each power of ten, and at multiples of it where they do not crowd them."""
    ticker, (low, high) = import_optional("matplotlib.ticker"), axis.get_view_interval()
    subs = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=subs) if values is None else ticker.FixedLocator(list(values)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))


def show_table(rows: Iterable[dict[str, Any]], prose: bool = False) -> None:
    """Shows rows {column: value} as a table, or prints them where no notebook is looking. `prose`: cells hold long
    texts, which get columns of one width, or lines of their own."""
    rows = list(rows)
    frame = import_optional("pandas").DataFrame(rows)
    if "ipykernel" in sys.modules:
        styled = frame.style.hide(axis="index")
        if prose:
            styled = styled.set_properties(**{
                "text-align": "left", "white-space": "pre-wrap", "vertical-align": "top", "font-family": "monospace",
                "width": f"{96 // max(1, len(frame.columns))}%"})
        import_optional("IPython.display").display(styled)
    elif prose:
        for row in rows:
            print("\n".join(f"[{name}] {text!r}" for name, text in row.items()) + "\n")
    else:
        print(frame.to_string(index=False, max_colwidth=120, line_width=200))


def show_preflight(task: Task | None = None, **options: Any) -> None:
    """Shows the table of `preflight`, and under it what to do before going on."""
    rows, advice = preflight(task, **options)
    show_table(rows)
    print("\n".join(advice) or "Nothing to change: go on.")


class Run:
    """The folder outputs/<version>/<name>/ of one run: config.json, env.json, metrics.json, log.jsonl, figures/,
    student/.

    A finished run is never touched again: asking for its name makes <name>-2. An unfinished one with the same
    settings is resumed, one with other settings is left alone and a new folder is made. One that another process is at
    work in is refused.
    """

    def __init__(self, folder: Path, note: str):
        self.folder, self.note = folder, note
        self.main = is_main_process()  # of several processes one writes

    @classmethod
    def open(cls, version: str, name: str | None, config: dict[str, Any], outputs: Path | None = None) -> Run:
        """Raises ValueError for a name with characters outside letters, digits, '.', '_' and '-'. Of several processes
        the first opens the folder and tells the others."""
        state = several_processes()
        if not state:
            return cls._open(version, name, config, outputs)
        told = [cls._open(version, name, config, outputs) if state.is_main_process else None]
        import_optional("accelerate").utils.broadcast_object_list(told)
        return cls(told[0].folder, told[0].note)

    @classmethod
    def _open(cls, version: str, name: str | None, config: dict[str, Any], outputs: Path | None) -> Run:
        name = name or datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        for what, value in (("version", version), ("run name", name)):
            fits = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value) is not None
            require(fits, what, value, "at most 100 letters, digits, '.', '_' and '-', a letter or digit first")
        base = (outputs or outputs_folder()) / version
        require_writable(base, "the outputs folder")
        text = json.dumps(config, indent=1, sort_keys=True)
        for number in range(1, 10_000):
            folder = base / (name if number == 1 else f"{name}-{number}")
            settings = folder / "config.json"
            if (folder / "metrics.json").exists() or settings.is_file() and settings.read_text() != text:
                continue
            lock_folder(folder)
            if not folder.exists():
                folder.mkdir(parents=True)
                (folder / "figures").mkdir()
                # Outputs saved earlier and attached as an input are read-only: go on from a copy.
                attached = find_attached(lambda p: p.name == name and (p / "checkpoint.pt").is_file()
                                         and (p / "config.json").is_file() and (p / "config.json").read_text() == text)
                for path in sorted(attached.rglob("checkpoint.pt")) if attached else ():  # also of runs inside this one
                    with open(path, "rb") as source:
                        write_atomically(folder / path.relative_to(attached),
                                         lambda file: shutil.copyfileobj(source, file))
                # The settings come last: they make the folder one that a later call resumes.
                write_atomically(folder / "env.json", json.dumps(environment(), indent=1))
                write_atomically(folder / "config.json", text)
                if attached:
                    return cls(folder, f"resuming the attached unfinished run {attached}")
                why = "" if number == 1 else f" ({name} exists with other settings or is finished)"
                return cls(folder, f"new run {folder.name}{why}")
            if not (folder / "metrics.json").exists() and settings.is_file() and settings.read_text() == text:
                return cls(folder, f"resuming unfinished run {folder.name}")
            unlock_folder(folder)
        raise ValueError(f"run name {name} has been used 9,999 times; choose another.")

    def show(self, figure: Any, name: str) -> None:
        """Saves a matplotlib figure as figures/<name>.png and .svg, shows it where a notebook is looking, and closes
        it."""
        for kind, more in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})) if self.main else ():
            figure.savefig(self.folder / "figures" / f"{name}.{kind}", bbox_inches="tight", **more)
        if "ipykernel" in sys.modules:
            import_optional("IPython.display").display(figure)
        import_optional("matplotlib.pyplot").close(figure)

    def finish(self, metrics: dict[str, Any], student: nn.Module | None = None, tokenizer: Any = None) -> None:
        """Saves the student with its model card, then metrics.json, whose presence marks the run as finished."""
        if self.main:
            if student is not None:
                shutil.rmtree(self.folder / "student", ignore_errors=True)  # of a finish that was cut off
                with new_folder(self.folder / "student") as temporary:
                    student.save_pretrained(temporary)
                    tokenizer.save_pretrained(temporary)
                    write_atomically(temporary / "README.md", model_card(metrics))
            write_atomically(self.folder / "metrics.json", json.dumps(metrics, indent=1, sort_keys=True))
            table = results_table(runs(self.folder.parent.parent))
            write_atomically(self.folder.parent.parent / "index.md", f"# Runs\n\n{table}\n")
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)
            unlock_folder(self.folder)
        wait_for_everyone()


def runs(outputs: Path | None = None) -> list[dict[str, Any]]:
    """The metrics of every finished run, oldest first."""
    files = sorted((outputs or outputs_folder()).glob("*/*/metrics.json"), key=lambda p: p.stat().st_mtime)
    return [json.loads(path.read_text()) for path in files]


def find_run(name: str | None = None, without: tuple[str, ...] = (), sites: tuple[str, ...] = (),
             outputs: Path | None = None) -> Path | None:
    """The folder of a finished run that left a student: `name` is a folder or "<version>/<run>" below the outputs or an
    attached input; None takes the newest of a version that is not in `without` whose student has the spike sites
    `sites`, and of equally old ones, as attached files may be, that of the highest version. None where there is none.

    Raises ValueError for a name that belongs to no finished run, listing those there are.
    """
    def finished(path: Path) -> bool:
        return all((path / part).is_file() for part in ("config.json", "metrics.json", "student/config.json"))

    require(name is None or is_word(name), "student", name,
            "<version>/<run>, the folder of a finished run, or None")
    if name is not None and finished(Path(name)):
        return Path(name)
    name = name if name is None else str(name)
    found = [path.parent for path in (outputs or outputs_folder()).glob("*/*/metrics.json") if finished(path.parent)]
    found += [path for path in attached_folders() if finished(path)]
    if name is None:
        found = [path for path in found if path.parent.name not in without and set(sites) <= set(
            json.loads((path / "student" / "config.json").read_text())["spike_sites"])]
        number = lambda path: [int(part) for part in re.findall(r"\d+", path.parent.name)]  # noqa: E731
        return max(found, key=lambda path: ((path / "metrics.json").stat().st_mtime, number(path)), default=None)
    known = {f"{path.parent.name}/{path.name}": path for path in reversed(found)}
    require(name in known, "student", name, ", ".join(sorted(known)) or "the folder of a finished run; there is none yet")
    return known[name]


def load_run(folder: Path) -> tuple[GooseForCausalLM, Recipe, Profile, dict[str, Any]]:
    """(student, recipe, profile, metrics) of a finished run. Raises ValueError when its student cannot be loaded."""
    settings = json.loads((folder / "config.json").read_text())
    freeze = lambda x: tuple(map(freeze, x)) if isinstance(x, list) else x  # noqa: E731  JSON has no tuples
    recipe, profile = ({k: freeze(v) for k, v in settings[part].items()} for part in ("recipe", "profile"))
    try:
        student, info = GooseForCausalLM.from_pretrained(folder / "student", output_loading_info=True,
                                                         ignore_mismatched_sizes=True)  # refused below, by name
    except Exception as error:  # the library raises a dozen unrelated types for a damaged folder
        raise ValueError(f"student {folder / 'student'} cannot be loaded: {_first_line(error)}; it needs config.json and "
                         "whole weights.") from error
    refuse_missing(info, f"student {folder / 'student'}")
    require_finite(student, f"student {folder / 'student'}")
    return student.eval(), Recipe(**recipe), Profile(**profile), json.loads((folder / "metrics.json").read_text())


def train_short_student(name: str, profile: Profile, reason: str, steps: int = 100, seed: int = 42) -> Path:
    """The folder of a short run of recipe `name` in outputs/short/, for a notebook that found no student to work on.

    Raises FileNotFoundError in profile t4, where a run of any use takes hours.
    """
    if profile.name == "t4":
        raise FileNotFoundError("no finished student was found: run asnn_v14_4_transfer first (recipe v14.4-rates for "
                                "v16), or "
                                "attach its output as an input.")
    full = profile.scale(get_recipe(name), seed=seed)
    task = load_task(profile.scale(get_recipe(name), seed=seed, distill_steps=min(steps, full.distill_steps)), profile)
    print(f"no student was found: a short one of {task.recipe.distill_steps} steps is trained now ({reason})")
    settings = {"recipe": dataclasses.asdict(task.recipe), "profile": dataclasses.asdict(profile),
                "corpus_hash": task.corpus.hash, "teacher": task.teacher.name}
    run = Run.open("short", f"{name}-{profile.name}-seed{seed}", json.loads(json.dumps(settings)))
    student, result = distil(task, task.recipe, FitConfig.from_recipe(task.recipe), run.folder, profile.eval_windows)
    measured = {who: {split: evaluate(model, task.tokens[split], task.recipe.seq_len, windows=profile.eval_windows)
                      for split in ("validation", "test")} for who, model in (("teacher", task.teacher.model),
                                                                             ("student", student))}
    run.finish(run_metrics(run, task, profile, student, result, measured), student.cpu(), task.teacher.tokenizer)
    return run.folder


GATE_TOKENS = 20_000  # a gate over fewer tokens supports no claim


def gate_status(student: nn.Module, outputs: Path | None = None) -> tuple[bool, str]:
    """(gated, sentence): whether this student has passed a gate, here (outputs/v15/) or in an attached input. Of several
    gates of one student the newest counts."""
    folders = [(outputs or outputs_folder()) / "v15", *(path for path in attached_folders() if path.name == "v15")]
    files = [path for folder in folders for path in (*folder.glob("gate.json"), *folder.glob("*/gate.json"))]
    if not files:
        return False, "ungated: no gate.json was found; run the v15 notebook first"
    gates = [json.loads(path.read_text()) for path in sorted(files, key=lambda path: -path.stat().st_mtime)]
    gates += [gate["other"] for gate in gates if gate.get("other")]  # of the student before a remedy, or of a failed one
    name = student_id(student)
    gate = next((gate for gate in gates if gate["student"] == name), None)
    if gate is None:
        return False, f"ungated: the gates that were found are of other students ({gates[0]['student']})"
    failed = [name for name, entry in gate["metrics"].items() if not entry["pass"]]
    if failed:
        return False, f"ungated: the student failed {', '.join(failed)}"
    if gate["tokens"] < GATE_TOKENS:
        return False, f"ungated: the gate was passed over {gate['tokens']:,} tokens, and {GATE_TOKENS:,} are needed"
    return True, f"gated: the student passed all {len(gate['metrics'])} metrics over {gate['tokens']:,} tokens"


def densities_at(density: dict[str, float], site: str | None) -> list[float]:
    """What `spike_density` found at a site: a value for each layer and, at mix_in, each input; [] without spikes."""
    return [share for name, share in density.items() if site and name.split(".")[1 if "." in name else 0] == site]


@dataclass(frozen=True)
class LoadedStudent:
    """The student of a finished run, what made it, and whether it may carry a claim."""

    folder: Path
    student: GooseForCausalLM
    recipe: Recipe
    profile: Profile
    metrics: dict[str, Any]
    task: Task
    gated: bool
    gate: str  # why, in a sentence

    @property
    def name(self) -> str:
        """<version>-<run>, for a run that works on this student."""
        return f"{self.folder.parent.name}-{self.folder.name}"

    @functools.cached_property
    def density(self) -> dict[str, float]:
        """{"layer.site": share of non-zero spikes} over the first validation windows, at most eight."""
        return spike_density(self.student, self.task.peek())

    @property
    def site_density(self) -> dict[str, float]:
        """{site: mean over the layers}, of the sites before a Linear in the layers."""
        found = {site: densities_at(self.density, site) for site in SITES[2:-1]}
        return {site: float(np.mean(shares)) for site, shares in found.items() if shares}

    def __str__(self) -> str:
        m = self.metrics
        return (f"student {m['version']}/{m['run']}, content hash {student_id(self.student)}, test PPL "
                f"{m['student']['test']['ppl']:.2f}, gap {m['gap']['test']['value']:.3f} to its teacher, "
                f"{m['training']['step']} steps")


def load_student(name: str | None, profile: Profile, reason: str, recipe: str = "v14.4", without: tuple[str, ...] = (),
                 sites: tuple[str, ...] = (), steps: int = 100, seed: int = 42, **data: str | None) -> LoadedStudent:
    """The student that a notebook works on, with its task and its gate.

    Args:
        name: see `find_run`; None takes the newest of a version that is not in `without` and has the spike sites
            `sites`, a short run only where there is no other, and else makes one of `recipe` with so many `steps`.
        profile, reason: of that short run, as `select_profile` gives them.
        data: corpus and teacher in the place of those of the student's run, where they are not None.
    Raises:
        ValueError: the student has no spikes or not at `sites`, and what find_run, load_run and load_task raise.
    """
    folder = find_run(name, (*without, "short"), sites) or find_run(None, without, sites)
    folder = (folder or train_short_student(recipe, profile, reason, steps, seed)).resolve()
    student, made_by, made_with, metrics = load_run(folder)
    about = f"{folder.parent.name}/{folder.name}"
    require(student.config.spike_kind != "dense", "student", about, "a student with spikes; this one is a dense twin")
    require(set(sites) <= set(student.config.spike_sites), "student", about,
            f"one with spikes at {', '.join(sites)}, as runs of recipe {recipe} have; this one has them at "
            + ", ".join(student.config.spike_sites))
    made_with = made_with.replace(**{what: value for what, value in data.items() if value is not None})
    task = load_task(made_by, made_with)
    return LoadedStudent(folder, student, made_by, made_with, metrics, task, *gate_status(student))


def quality_table(measured: dict[str, dict[str, Evaluation]]) -> list[dict[str, str]]:
    """Rows of a table of {"teacher" or a student's name: {split: Evaluation}}, gaps to the teacher included."""
    rows = []
    for split in ("validation", "test"):
        for name, evaluations in measured.items():
            e = evaluations[split]
            gap = "{:.3f} ± {:.3f}".format(*perplexity_gap(e, measured["teacher"][split])) if name != "teacher" else "1"
            rows.append({"model": name, "split": split, "PPL": f"{e.ppl:.2f}", "± s.e.": f"{e.ppl * e.nll_se:.2f}",
                         "gap": gap, "bits per byte": f"{e.bits_per_byte:.3f}" if e.bits_per_byte else "part of the split",
                         "word PPL": f"{e.word_ppl:,.0f}" if e.word_ppl else "part of the split",
                         "tokens": f"{e.tokens:,}", "windows": f"{e.windows} x {e.seq_len}"})
    return rows


def sample_texts(models: dict[str, nn.Module], tokenizer: Any, tokens: np.ndarray, seq_len: int,
                 seed: int = 42) -> list[dict[str, str]]:
    """[{"prompt", name: continuation, ...}] from three places of a split, the same sampling for every model
    (temperature 0.8, top-k 40)."""
    length, new = min(32, seq_len // 4), min(48, seq_len // 2)
    rows = []
    for share in (0.2, 0.5, 0.8):
        start = int(len(tokens) * share)
        prompt = torch.from_numpy(tokens[start:start + length].astype(np.int64)).unsqueeze(0)  # (1, T)
        row = {"prompt": tokenizer.decode(prompt[0])}
        for name, model in models.items():
            seed_everything(seed)
            ids = prompt.to(model.device)
            out = model.eval().generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8,
                                        top_k=40, max_new_tokens=new, pad_token_id=tokenizer.eos_token_id)
            row[name] = tokenizer.decode(out[0, length:], skip_special_tokens=True)
        rows.append(row)
    return rows


def run_metrics(run: Run, task: Task, profile: Profile, student: nn.Module, result: FitResult,
                measured: dict[str, dict[str, Evaluation]], **more: Any) -> dict[str, Any]:
    """What metrics.json holds of a run, with `more` beside it. `measured` is {"teacher", "student"} by split."""
    splits = ("validation", "test")
    gaps = {split: perplexity_gap(measured["student"][split], measured["teacher"][split]) for split in splits}
    amplitudes = {name: float(m.amplitude.detach().abs().mean()) for name, m in spike_modules(student).items()
                  if isinstance(m, TernarySpike)}
    return {
        "version": task.recipe.name, "run": run.folder.name, "profile": profile.name, "seed": task.recipe.seed,
        "status": "measured", "environment": environment(),
        "corpus": {"name": task.corpus.name, "hash": task.corpus.hash,
                   "tokens": {split: len(task.tokens[split]) for split in SPLITS}},
        "teacher": {"name": task.teacher.name, "parameters": count_parameters(task.teacher.model),
                    **task.teacher_training, **{split: measured["teacher"][split].to_dict() for split in splits}},
        "student": {"parameters": count_parameters(student), "density": spike_density(student, task.peek()),
                    "amplitude": amplitudes, **{split: measured["student"][split].to_dict() for split in splits}},
        "gap": {split: {"value": gap, "standard_error": error} for split, (gap, error) in gaps.items()},
        "training": {"step": result.step, "steps": task.recipe.distill_steps, "stopped": result.stopped,
                     "best_step": result.best_step, "seconds": result.seconds,
                     "tokens_per_second": result.tokens_per_second, "precision": result.precision,
                     "nonfinite": result.nonfinite, "scaler_skips": result.scaler_skips,
                     "peak_memory_gb": result.peak_memory_gb},
        **more}


@dataclass(frozen=True)
class Check:
    """One run check: what was asked, what was measured, and whether it passed; None where it does not apply."""

    name: str
    value: str
    passed: bool | None


def run_checks(recipe: Recipe, result: FitResult, ppl: float, target_ppl: float, previous_ppl: float | None,
               density: dict[str, float], amplitudes: dict[str, float]) -> list[Check]:
    """The founders' 12 checks of a run.

    `target_ppl` and `previous_ppl` must be of the same corpus and teacher as `ppl`; None where there is no previous
    one. density and amplitudes are per layer and site.
    """
    losses = [row["loss"] for row in result.log if "loss" in row]
    fdd = [row["fdd"] for row in result.log if "fdd" in row]
    tau = [row["tau"] for row in result.log if "tau" in row]
    third = max(1, len(fdd) // 3)
    before, after = (float(np.mean(part)) if fdd else math.nan for part in (fdd[:third], fdd[-third:]))
    low, high = min(density.values()), max(density.values())
    small, large = min(amplitudes.values()), max(amplitudes.values())
    learned = recipe.temperature in ("bounded", "paper")
    return [
        Check("PPL under target", f"{ppl:.2f} < {target_ppl:.2f}", ppl < target_ppl),
        Check("improved on the previous version", "no previous run on this corpus and teacher" if previous_ppl is None
              else f"{ppl:.2f} < {previous_ppl:.2f}", None if previous_ppl is None else ppl < previous_ppl),
        Check("density in [0.1, 0.9]", f"{low:.3f} to {high:.3f}", 0.1 <= low and high <= 0.9),
        Check("amplitudes in [0.3, 3.0]", f"{small:.3f} to {large:.3f}", 0.3 <= small and large <= 3.0),
        Check("training completed or stopped early", result.stopped, result.finished),
        Check("no NaN or Inf loss", f"{result.nonfinite} steps skipped",
              result.nonfinite == 0 and all(map(math.isfinite, losses))),
        Check("memory under 8 GB", f"peak {result.peak_memory_gb:.2f} GiB", result.peak_memory_gb * 2**30 < 8e9),
        Check("FDD active", f"{len(fdd)} logged values", bool(fdd) if recipe.fdd != "none" else None),
        Check("tau evolved", f"{tau[0]:.3f} -> {tau[-1]:.3f}" if tau else "none",
              abs(tau[-1] - tau[0]) > 1e-3 if learned and tau else None),
        Check("early stopping worked", f"best {result.best_ppl:.2f} at step {result.best_step}, ended at {result.step}",
              result.best_step > 0 and result.step - result.best_step <= recipe.patience),
        Check("FDD loss decreased", f"{before:.3f} -> {after:.3f}" if fdd else "none",
              after < before if fdd else (False if recipe.fdd != "none" else None)),
        Check("step budget met", f"{result.step} of {recipe.distill_steps}", result.step <= recipe.distill_steps),
    ]


def results_table(metrics: list[dict[str, Any]]) -> str:
    """Markdown table of runs: measured values, whole test split unless the row says otherwise."""
    lines = ["| run | recipe | corpus, teacher | student | steps | test PPL teacher | test PPL student | gap ± s.e. "
             "(windows) | bits/byte | density | tokens/s | hardware |", "|" + "---|" * 12]
    for m in metrics:
        test, gap = m["student"]["test"], m["gap"]["test"]
        density = list(m["student"]["density"].values())
        bits = f"{test['bits_per_byte']:.3f}" if test["bits_per_byte"] else "part of the split"
        lines.append(
            f"| {m['run']} | {m['version']} | {m['corpus']['name']} {m['corpus']['hash'][:6]}, {m['teacher']['name']} "
            "| "
            f"{m['student']['parameters'] / 1e6:.1f}M | {m['training']['step']} | {m['teacher']['test']['ppl']:.2f} | "
            f"{test['ppl']:.2f} | {gap['value']:.3f} ± {gap['standard_error']:.3f} ({test['windows']}) | {bits} | "
            f"{sum(density) / len(density):.3f} | {m['training']['tokens_per_second']:,.0f} | "
            f"{hardware_text(m['environment'])} |")
    return "\n".join(lines)


# (hub id, licence) of teachers that go by a short name; any other name without an owner is that of a folder.
HUB_TEACHERS = {**{name: (f"openai-community/{name}", "mit") for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
                "distilgpt2": ("distilbert/distilgpt2", "apache-2.0")}


def _card_header(m: dict[str, Any]) -> str:
    """The hub's YAML of a model card. base_model and datasets name only what the hub has; the licence is that of the
    teacher, where it is known, and ours for a teacher that was trained here."""
    hub = import_optional("huggingface_hub")
    test, teacher, corpus = m["student"]["test"], m["teacher"]["name"], m["corpus"]["name"]
    ours = "trained_steps" in m["teacher"] or teacher == "untrained-goose"
    base, licence = HUB_TEACHERS.get(teacher, (teacher if "/" in teacher else None, "mit" if ours else "other"))
    dataset = "Salesforce/wikitext" if corpus in WIKITEXT else None
    window = f"windows of {test['seq_len']} tokens"
    values = [("perplexity", f"perplexity per token, {window}", test["ppl"]),
              ("bits_per_byte", f"bits per byte, {window}", test["bits_per_byte"]),
              ("word_perplexity", f"perplexity per word, {window}", test["word_ppl"]),
              ("perplexity_ratio", "student's over teacher's perplexity", m["gap"]["test"]["value"])]
    results = [hub.EvalResult("text-generation", dataset or corpus, f"{corpus} ({m['corpus']['hash']})", kind,
                              round(float(value), 6), dataset_config=WIKITEXT.get(corpus), dataset_split="test",
                              metric_name=name)
               for kind, name, value in values if value is not None and math.isfinite(value)]
    data = hub.ModelCardData(
        license=licence, license_name="that-of-the-teacher" if licence == "other" else None, base_model=base,
        datasets=[dataset] if dataset else None, metrics=["perplexity"], library_name="transformers",
        pipeline_tag="text-generation", tags=["spiking", "ternary", "rwkv", "distillation"],
        model_name=f"ASNN-Goose {m['version']}, run {m['run']}" if results else None, eval_results=results or None)
    return data.to_yaml()


def _card_energy(m: dict[str, Any]) -> str:
    energy = m.get("energy")
    if not energy:
        return "Neither the energy of training nor that of generation was measured."
    if isinstance(energy, dict):
        return "\n".join(f"- {k}: {v:.4g}" if isinstance(v, float) else f"- {k}: {v}" for k, v in energy.items())
    return str(energy)


def model_card(metrics: dict[str, Any]) -> str:
    """README.md of a saved student, from the metrics of its run: the hub's YAML header (licence, base_model, datasets,
    model-index), how to load it, results, limits and energy, which is `metrics["energy"]`, a sentence or {name: value},
    where the run has one."""
    m, test = metrics, metrics["student"]["test"]
    return f"""---
{_card_header(m)}
---
# ASNN-Goose {m['version']}, run {m['run']}

A recurrent language model whose keys and values are ternary spikes {{-1, 0, +1}} (spike sites:
{', '.join(sorted({name.split('.')[1] if '.' in name else name for name in m['student']['density']}))}),
{m['student']['parameters']:,} parameters, distilled from {m['teacher']['name']} on {m['corpus']['name']} (content hash {m['corpus']['hash']}).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
student = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)
```

Measured on the test split, {test['tokens']:,} tokens in windows of {test['seq_len']}, each token scored once:

{results_table([m])}

## Limits

The context is a state of fixed size. Positions are learned up to {test['seq_len']} tokens; later tokens share the last
one, a length the model was not trained for. Batches need padding on the left. bfloat16 and float16 weights run, with
states, decays and losses in float32.

The model continues text. It was tuned neither to follow instructions nor to be harmless, what it writes may be false,
and biases of its teacher and corpus are its own. Its perplexities hold for this tokenizer, split and window, and are
not comparable with those of another tokenizer; bits per byte are.

## Energy

{_card_energy(m)}

## Licence

The code is under the MIT licence. The weights start from the teacher's or learn from its outputs: the licence of
{m['teacher']['name']} and the terms of the corpus apply to them as well.
"""
