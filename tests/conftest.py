"""What the tests share: a small learnable corpus, a teacher trained on it, recipes of that size,
and the definitions of a notebook."""
import ast
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: no test waits for a network

import asnn_common as asnn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "RANK", "LOCAL_RANK", "WORLD_SIZE")


def pytest_collection_modifyitems(items):
    """Leave standard error, which progress bars and warnings use, out of what nbval compares."""
    for item in items:
        skipped = getattr(item.parent, "skip_compare", ("stderr",))
        if "stderr" not in skipped:
            item.parent.skip_compare = (*skipped, "stderr")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One cache of corpora, tokens and teachers for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small run faster on one thread, and the same to the bit on any machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def isolate(patch, cache, outputs):
    """Hide the user's folders, inputs, platform and processes, and start from one random state."""
    for name in (*(name for name in os.environ if name.startswith("ASNN_")), *PLATFORM):
        patch.delenv(name, raising=False)
    patch.setenv("ASNN_CACHE", str(cache))
    patch.setenv("ASNN_OUTPUTS", str(outputs))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def isolated(monkeypatch, cache, tmp_path):
    isolate(monkeypatch, cache, tmp_path / "outputs")


def definitions(name):
    """The imports, functions, classes and upper-case constants of notebooks/<name>.py; nothing else
    of it runs. Functions look names up in what is returned, so that a test can replace one."""
    def kept(node):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            return all(isinstance(target, ast.Name) and target.id.isupper() for target in targets)
        return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))

    path = ROOT / "notebooks" / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if kept(node)]
    namespace = SimpleNamespace(__name__=name)
    exec(compile(tree, path, "exec"), vars(namespace))
    return namespace


# Every Python process of a session sees no network and says what it writes into watched folders.
GUARD = """
import os, sys

def guard(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        if args[1][0] not in ("127.0.0.1", "localhost", "::1"):
            raise OSError("there is no network in this session")
    if event == "open" and isinstance(args[0], str) and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        for place in os.environ["WATCHED"].split(os.pathsep):
            if os.path.abspath(args[0]).startswith(place):
                os.write(2, f"rank {os.environ.get('RANK')} wrote {args[0]}\\n".encode())

sys.addaudithook(guard)
"""


def kaggle_session(folder, below="datasets/someone"):
    """(environment, working folder, folder to attach to) of a session on Kaggle without a network.
    The module is attached `below` the inputs; nothing of this machine's user is seen."""
    inputs, working = folder / "kaggle" / "input", folder / "kaggle" / "working"
    attached = inputs / below
    (attached / "asnn-goose").mkdir(parents=True)
    shutil.copy(ROOT / "asnn_common.py", attached / "asnn-goose")
    for name in (working, folder / "home", folder / "guard"):
        name.mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    own = ("ASNN_", "HF_", "KAGGLE_", "PYTHONPATH", "MPLBACKEND", "JUPYTER", "IPYTHON")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    return {**kept, "HOME": str(folder / "home"), "PYTHONPATH": str(folder / "guard"),
            "KAGGLE_KERNEL_RUN_TYPE": "Batch", "COLAB_RELEASE_TAG": "set on Kaggle too",
            "ASNN_INPUTS": str(inputs), "ASNN_PROFILE": "tiny", "WATCHED": str(inputs),
            "HF_HUB_OFFLINE": "1"}, working, attached


def read_only(folder):
    """Take away everybody's right to write below a folder (root keeps it: GUARD tells)."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


@torch.no_grad()
def shake(model):
    """Moves all parameters away from their start values, so that a lost one shows."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.normal_(std=0.6 if "embeddings" in name or "positions" in name else 0.25)
        elif "decay" in name:
            p.copy_(torch.linspace(-1, 4, p.numel()))
        else:
            p.add_(0.2 * torch.rand_like(p))
    return model


def sentences(seed, count):
    """Text whose next word depends on the last one: a few steps of training show in the loss."""
    rng = random.Random(seed)
    words = ("the state of a spike is small and it fades with every token that the model reads "
             "again").split()
    lines = []
    for _ in range(count):
        word, line = rng.choice(words), []
        for _ in range(rng.randint(4, 9)):
            line.append(word)
            word = words[(words.index(word) * 3 + rng.choice((1, 2))) % len(words)]
        lines.append(" ".join(line).capitalize() + ".")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """A folder with train.txt, validation.txt and test.txt, for the parameter `corpus`."""
    folder = tmp_path_factory.mktemp("corpora") / "small"
    folder.mkdir()
    for seed, (split, count) in enumerate((("train", 900), ("validation", 60), ("test", 60))):
        (folder / f"{split}.txt").write_text(sentences(seed, count), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_recipe(corpus_folder):
    """small_recipe(name, **overrides): a recipe below profile `tiny`, on the small corpus."""
    size = {"d_model": 32, "n_layer": 2, "seq_len": 16, "batch_size": 4, "distill_steps": 12,
            "lr": 2e-3, "corpus": str(corpus_folder), "teacher": "train", "vocab_size": 300,
            "teacher_layers": 2, "teacher_width": 32, "teacher_heads": 2, "teacher_steps": 60,
            "teacher_lr": 1e-2, "precision": "fp32"}

    def make(name="v14.3", **overrides):
        return asnn.get_recipe(name, "tiny", **{**size, **overrides})
    return make


@pytest.fixture
def small_task(small_recipe):
    """small_task(name, **overrides): the task of a small recipe; one cached teacher for all."""
    return lambda name="v14.3", **overrides: asnn.load_task(small_recipe(name, **overrides))


@pytest.fixture(scope="session")
def task(small_recipe, cache, tmp_path_factory):
    """The task of small_recipe("v14.3"), shared: what a test changes in it, it puts back."""
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, cache, tmp_path_factory.mktemp("outputs"))
        return asnn.load_task(small_recipe())


@pytest.fixture
def corpus(task):
    return task.corpus


@pytest.fixture
def teacher(task):
    """The small GPT-2 itself, in evaluation mode."""
    return task.teacher


@pytest.fixture
def tokenizer(task):
    return task.tokenizer


@pytest.fixture
def tokens(task):
    """{split: token ids}."""
    return task.tokens


@pytest.fixture
def student(task):
    """The untrained student of the shared task."""
    return task.build_student()


@pytest.fixture
def distiller(small_task):
    """distiller(name, **overrides): the loss of a new run, with its student and teacher."""
    def make(name="v14.3", twin=None, encode=None, **overrides):
        task = small_task(name, **overrides)
        return asnn.Distiller(task.build_student(), task.teacher, task.recipe, twin=twin,
                              encode=encode)
    return make
