"""A simulated CUDA, for what a machine without a GPU can find out about code for one: tensors that
say cuda:N, hold CPU data and refuse what CUDA refuses. It knows nothing of time and memory.

    simulated_cuda.py FILE.py [name=value ...]   run a page or a script; values replace those of its
                                                 parameters. GPUS and CAPABILITY (7.5) choose cards.

Libraries are imported before `install`, which cannot be undone: each use is a process of its own.
"""
import ctypes
import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Autograd asks C++ for a guard of each device that a tensor names.
GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#define IS(head, ...) head const override { return __VA_ARGS__; }
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  IS(bool hasCUDA(), true) IS(bool isBuilt(), true) IS(bool isAvailable(), true) IS(void init(),)
  IS(DeviceIndex deviceCount(), 8) IS(DeviceIndex current_device(), 0)
  IS(DeviceIndex getCurrentDevice(), 0) IS(void setCurrentDevice(DeviceIndex),)
  IS(DeviceIndex exchangeDevice(DeviceIndex), 0) IS(DeviceIndex maybeExchangeDevice(DeviceIndex), 0)
  IS(bool hasPrimaryContext(DeviceIndex), true) IS(void deviceSynchronize(DeviceIndex),)
};
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, CUDAHooks)
}
using c10::Device, c10::DeviceIndex, c10::Stream;
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 8; }
  IS(Device getDevice(), {c10::kCUDA, 0}) IS(Device exchangeDevice(Device), {c10::kCUDA, 0})
  Stream getStream(Device d) const noexcept override {
    return Stream(Stream::DEFAULT, Device(c10::kCUDA, d.index() < 0 ? 0 : d.index()));
  }
  IS(Stream getDefaultStream(Device d), getStream(d))
  IS(Stream getNewStream(Device d, int), getStream(d))
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  IS(void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag),)
  IS(void block(void*, const Stream&),) IS(bool queryEvent(void*), true)
  IS(void synchronizeEvent(void*),) IS(void synchronizeDevice(const DeviceIndex),)
  IS(void recordDataPtrOnStream(const c10::DataPtr&, const Stream&),)
};
extern "C" void register_guard() {
  static Guard guard;
  static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
}
"""


def load_guard():
    """Loads GUARD, built once for several runs: hooks before torch, the guard after it, which a
    torch for CUDA has too."""
    root = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "guard.cpp")
        built = Path(os.environ.get("GUARD", source.with_suffix(".so")))
        source.write_text(GUARD)
        command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", source, "-o", built, "-lc10",
                   f"-I{root}/include", f"-L{root}/lib", "-ltorch_cpu"]
        if not built.is_file():
            subprocess.run(command, check=True)
        for path in (*sorted((root / "lib").glob("libgomp*")), root / "lib" / "libc10.so",
                     root / "lib" / "libtorch_cpu.so", built):
            library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401
    library.register_guard()


if "torch" not in sys.modules:
    load_guard()

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

CARD = SimpleNamespace(count=1, capability=(7, 5), generators={})
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPYING = {"copy_", "_to_copy", "_copy_from"}


class CudaTensor(torch.Tensor):
    """A tensor that says it is on a GPU; `inner` holds what it holds."""

    @staticmethod
    def __new__(cls, inner, device):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=device)

    def __init__(self, inner, device):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __reduce_ex__(self, protocol):
        return self.inner.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            new = CudaTensor(self.inner.detach().clone(), self.device)
            memo[id(self)] = new.requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                new._is_param = True
        return memo[id(self)]

    def __repr__(self, **_more):
        return f"CudaTensor({self.device}, {self.inner!r})"

    def numpy(self, **_more):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy.")

    def __array__(self, *_args, **_more):
        return self.numpy()

    def tolist(self):
        return self.inner.tolist()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()


def each(x, do):
    """x with do(tensor) in the place of every tensor in it, in lists, tuples and dictionaries."""
    if isinstance(x, torch.Tensor):
        return do(x)
    if isinstance(x, dict):
        return {key: each(value, do) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return (list if isinstance(x, list) else tuple)([each(value, do) for value in x])
    return x


@functools.cache
def facts(func):
    """What a schema says, asked once: {alias: (position, name)} written, aliases of results, ..."""
    schema, written = func._schema, {}
    for i, a in enumerate(schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            written.update(dict.fromkeys(a.alias_info.before_set, (i, a.name)))
    known = [r.alias_info for r in schema.returns]
    returns = [next(iter(a.before_set)) if a is not None and a.is_write else None for a in known]
    return SimpleNamespace(written=written, returns=returns, mutable=schema.is_mutable,
                           random="generator" in [a.name for a in schema.arguments])


def generator(device):
    """The generator of a card."""
    index = torch.device(device).index or 0
    if index not in CARD.generators:
        CARD.generators[index] = torch.Generator().manual_seed(1000 + index)
    return CARD.generators[index]


def refuse(name, func, args, kwargs, on_card, on_host):
    """Raises what CUDA raises for operands that do not belong together or have no kernel."""
    devices = {x.device for x in on_card}
    host = [x for x in on_host if x.dim() > 0 or name in ("mm", "bmm", "addmm", "cat", "embedding")]
    if name in INDEXING and isinstance(args[0], CudaTensor):  # indices may be on the host
        host = [x for x in args[2:3] if any(x is y for y in host)]
    written = facts(func).mutable and any(args[0] is x for x in on_host)
    if name not in COPYING and (len(devices) > 1 or host or written):
        found = [*map(str, devices), *["cpu"] * bool(host or written)]
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                           f"devices, {' and '.join(found)}! ({func})")
    if not func.namespace.startswith(("aten", "prim", "profiler", "c10d")):
        raise NotImplementedError(f"Could not run '{func}' with arguments from the 'CUDA' backend.")
    half = any(x.dtype.itemsize == 2 for x in on_card)
    if half and name.startswith("linalg_") and name != "linalg_vector_norm":
        raise RuntimeError(f"{name} not implemented for 'Half'")
    if name == "quantile" and args[0].numel() > 16_000_000:
        raise RuntimeError("quantile() input tensor is too large")
    if kwargs.get("generator") is not None and kwargs["generator"].device.type == "cpu":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def compute(func, args, kwargs):
    """The operation on the host, products of fp16 summed in fp32 as tensor cores do."""
    name = func.overloadpacket.__name__
    if name == "mm" and func._overloadname == "dtype":
        return args[0].float() @ args[1].float()
    if name in ("mm", "addmm", "bmm", "baddbmm") and args[-1].dtype == torch.float16:
        return func(*each(args, torch.Tensor.float), **kwargs).half()
    return func(*args, **kwargs)


def dispatch(func, args, kwargs):
    """One operation: refused, or done on the host and given back under the card's name."""
    name, tensors = func.overloadpacket.__name__, []
    each((args, kwargs), tensors.append)
    on_card = [x for x in tensors if isinstance(x, CudaTensor)]
    wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if not on_card and (wanted is None or wanted.type != "cuda"):
        return func(*args, **kwargs)
    if wanted is not None and wanted.type == "cuda":
        wanted = torch.device("cuda", wanted.index or 0)
        if wanted.index >= CARD.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
    device = wanted or on_card[0].device
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu" if wanted.type == "cuda" else wanted)}
    on_host = [x for x in tensors if not isinstance(x, CudaTensor)]
    refuse(name, func, args, kwargs, on_card, on_host)
    if device.type == "cuda" and facts(func).random:
        kwargs = {**kwargs, "generator": generator(device)}
    if name == "_has_compatible_shallow_copy_type":
        return False
    kwargs.pop("pin_memory", None)
    inner = each((args, kwargs), lambda x: x.inner if isinstance(x, CudaTensor) else x)
    out = compute(func, *inner)
    return given_back(func, args, kwargs, out, device)


def given_back(func, args, kwargs, out, device):
    """The results as CudaTensors; what was written to in place is the argument itself."""
    def wrap(x):
        return CudaTensor(x, device) if device.type == "cuda" else x

    def one(alias, value):
        if alias is None:
            return each(value, wrap)
        i, name = facts(func).written[alias]
        return args[i] if i < len(args) else kwargs[name]

    returns = facts(func).returns
    if len(returns) > 1 and isinstance(out, (tuple, list)):
        return tuple(map(one, returns, out))
    return one(returns[0], out) if returns else out


class Mode(TorchDispatchMode):
    """Sees the operations that make tensors on a card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """Scaled dot-product attention by plain operations: the fused ones choose by device."""
    scores = (query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)).float()
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~causal, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1).to(query.dtype) @ value


def install(count=1, capability=(7, 5), memory=15_828_320_256):
    """Makes torch.cuda say that there are `count` cards, and tensors go to them."""
    CARD.count, CARD.capability = count, capability
    cuda, name = torch.cuda, "simulated GPU"
    properties = SimpleNamespace(name=name, major=capability[0], minor=capability[1],
                                 total_memory=memory, multi_processor_count=40)

    cards = [torch.device("cuda", index) for index in range(count)]

    def seed_all(seed):
        for card in cards:
            generator(card).manual_seed(int(seed))

    def restore(states):
        for card, state in zip(cards, states):
            generator(card).set_state(state)

    answers = {
        "is_available": True, "device_count": count, "is_initialized": True, "_lazy_init": None,
        "get_device_name": name, "get_device_capability": capability, "current_device": 0,
        "get_device_properties": properties, "set_device": None, "synchronize": None,
        "empty_cache": None, "ipc_collect": None, "max_memory_allocated": 3 * 2**30,
        "memory_allocated": 2**30, "memory_reserved": 2**30, "max_memory_reserved": 3 * 2**30,
        "reset_peak_memory_stats": None, "mem_get_info": (memory, memory), "_is_in_bad_fork": False,
        "is_current_stream_capturing": False, "current_stream": None}
    functions = {key: lambda *_a, value=value, **_k: value for key, value in answers.items()}
    functions |= {
        "is_bf16_supported": lambda including_emulation=True: (
            including_emulation or capability[0] >= 8),  # as torch answers for a T4
        "manual_seed_all": seed_all, "manual_seed": lambda seed: seed_all(seed),
        "get_rng_state": lambda device=0: generator(cards[0]).get_state(),
        "get_rng_state_all": lambda: [generator(card).get_state() for card in cards],
        "set_rng_state": lambda state, device=0: restore([state]), "set_rng_state_all": restore}
    for key, function in functions.items():
        vars(cuda)[key] = function
        if key in vars(cuda.random):
            vars(cuda.random)[key] = function
    torch._C._cuda_isCurrentStreamCapturing = lambda: False
    for key, value in {"is_available": True, "synchronize": None, "device_count": count,
                       "current_accelerator": torch.device("cuda"),
                       "current_device_index": 0}.items():
        vars(torch.accelerator)[key] = lambda *_a, value=value, **_k: value
    torch.nn.functional.scaled_dot_product_attention = attention
    torch.Tensor.cuda = lambda self, device=None, **_k: self.to(device or "cuda")
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.autograd.set_multithreading_enabled(False).__enter__()
    Mode().__enter__()


def with_values(source, **values):
    """A page's source with other values, given as literals, in the place of those it sets."""
    for name, value in values.items():
        source, found = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value}  ", source, count=1)
        assert found, f"there is no parameter {name}"
    return source


def main(path, *values):
    """Runs a file under the simulation."""
    torch.set_num_threads(1)
    import accelerate, datasets, matplotlib.pyplot, pandas, peft, scipy.stats  # noqa: E401, F401
    import transformers  # noqa: F401
    install(int(os.environ.get("GPUS", 1)),
            tuple(map(int, os.environ.get("CAPABILITY", "7.5").split("."))))
    given = dict(pair.split("=", 1) for pair in values)
    source = with_values(Path(path).read_text(encoding="utf-8"), **given)
    sys.path.insert(0, str(Path(path).resolve().parent))
    exec(compile(source, path, "exec"), {"__name__": "__main__", "__file__": path})


if __name__ == "__main__":
    main(*sys.argv[1:])
