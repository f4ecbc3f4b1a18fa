"""Fixtures shared by the tests: a small learnable corpus, a teacher trained on it, recipes of a matching size."""
import random

import numpy as np
import pytest
import torch

import asnn_common as asnn


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


@pytest.fixture(autouse=True)
def isolated(monkeypatch, cache, tmp_path):
    """No test reads the user's cache, outputs, inputs or platform, and each starts from the same random state."""
    monkeypatch.setenv("ASNN_CACHE", str(cache))
    monkeypatch.setenv("ASNN_OUTPUTS", str(tmp_path / "outputs"))
    for name in ("ASNN_INPUTS", "ASNN_REF", "ASNN_PROFILE", "KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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
    """Text whose next word depends on the last one, so that a few steps of training show in the loss."""
    rng = random.Random(seed)
    words = "the state of a spike is small and it fades with every token that the model reads again".split()
    lines = []
    for _ in range(count):
        word, line = rng.choice(words), []
        for _ in range(rng.randint(4, 9)):
            line.append(word)
            word = words[(words.index(word) * 3 + rng.choice((1, 2))) % len(words)]
        lines.append(" ".join(line).capitalize() + ".")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora") / "small"
    folder.mkdir()
    for seed, (split, count) in enumerate((("train", 900), ("validation", 60), ("test", 60))):
        (folder / f"{split}.txt").write_text(sentences(seed, count), encoding="utf-8")
    return asnn.load_corpus(str(folder))


@pytest.fixture(scope="session")
def profile():
    """The profile `tiny`, smaller still."""
    return asnn.PROFILES["tiny"].replace(vocab_size=300, teacher_layers=2, teacher_width=32, teacher_heads=2,
                                         teacher_steps=60, teacher_lr=1e-2)


@pytest.fixture(scope="session")
def teacher(profile, corpus, cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASNN_CACHE", str(cache))
        return asnn.train_teacher(profile, corpus, seq_len=16)[0]


@pytest.fixture(scope="session")
def tokens(teacher, corpus, cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASNN_CACHE", str(cache))
        return asnn.tokenize_corpus(corpus, teacher.tokenizer)


@pytest.fixture(scope="session")
def small_recipe(profile):
    """small_recipe(name, **overrides): a recipe at the size of the fixtures."""
    def make(name="v14.3", **overrides):
        size = {"d_model": 32, "n_layer": 2, "seq_len": 16, "batch_size": 4, "distill_steps": 12, "lr": 2e-3}
        return profile.scale(asnn.get_recipe(name), **{**size, **overrides})
    return make


@pytest.fixture
def distillation(small_recipe, teacher, tokens):
    """distillation(name, **overrides): (objective, sampler, settings in fp32) of a new run."""
    def make(name="v14.3", settings=(), **overrides):
        recipe = small_recipe(name, **overrides)
        objective = asnn.Distiller(asnn.build_student(recipe, teacher), teacher.model, recipe)
        sampler = asnn.WindowSampler(tokens["train"], recipe.seq_len, recipe.seed)
        defaults = {"precision": "fp32", "log_every": 1, "save_every": 10**6, "eval_every": 10**6, "patience": None}
        return objective, sampler, asnn.FitConfig.from_recipe(recipe, **{**defaults, **dict(settings)})
    return make
