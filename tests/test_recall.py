"""Made-up facts in training windows, what a model remembers by length and what it writes."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import definitions
from torch.nn.functional import cross_entropy

import asnn_common as asnn
from test_training import same

PAGE = definitions("asnn_v14_4_transfer")
V, T = 40, 30
FACTS = asnn._RecallFacts(39, np.arange(1, 9), np.arange(10, 18))
TOKENS = np.random.default_rng(0).integers(20, 39, 900).astype(np.uint16)  # no fact in the text


def windows(share=0.5, seed=0):
    """(windows, the positions where they have facts)."""
    made = asnn._Windows(TOKENS, T, seed, 200)
    made.facts, made.recall_share = FACTS, share
    return made, [i for i in range(len(made)) if (made[i]["answers"] >= 0).any()]


class Model:
    """`rule`: ids (B, T) -> logits (B, 1, V); it reads `reach` tokens."""
    def __init__(self, rule, reach=10**6):
        self.rule, self.device = rule, "cpu"
        self.config = SimpleNamespace(max_position_embeddings=reach)

    def __call__(self, ids, use_cache, logits_to_keep):
        return SimpleNamespace(logits=self.rule(ids))


def look_up(ids):
    """What followed the last two tokens where they first stood."""
    rows = ids.tolist()
    places = [next(i for i in range(len(row)) if row[i:i + 2] == row[-2:]) for row in rows]
    found = torch.tensor([row[place + 2] for row, place in zip(rows, places)])
    return torch.nn.functional.one_hot(found, V)[:, None]


def test_keys_and_values_are_frequent_words_and_the_marker_is_rare(task, tokens, tokenizer):
    facts, counts = task.facts(), np.bincount(tokens["train"], minlength=len(tokenizer))
    words = tokenizer.batch_decode([[i] for i in (*facts.keys, *facts.values)])
    assert len(set(words)) == len(words) and len(facts.keys) >= len(facts.values) >= 2
    assert all(word[0] == " " and len(word) > 3 and word[1:].isalpha() for word in words)
    assert counts[facts.keys[0]] >= counts[facts.values[0]] >= counts[facts.keys[-1]] > 0
    assert counts[facts.marker] == counts.min()


def test_a_window_with_facts_is_text_but_for_them_and_asks_for_what_it_told():
    (made, places), plain, gaps, counts = windows(), asnn._Windows(TOKENS, T, 0, 200), [], set()
    for i in places:
        ids, answers, labels = (made[i][name] for name in ("input_ids", "answers", "labels"))
        asked, row = (answers >= 0).nonzero().flatten().tolist(), ids.tolist()
        told = len({row[j + 1] for j in range(T - 1) if row[j] == FACTS.marker})
        assert 1 <= told <= 3 and len(asked) >= 5 - told  # of six slots, the last maybe at the end
        for place in asked:
            first = row.index(row[place]) - 1
            assert row[place] in FACTS.keys and answers[place] in FACTS.values
            assert row[first:first + 2] == row[place - 1:place + 1] == [FACTS.marker, row[place]]
            assert row[first + 2] == answers[place] and first + 3 < place
            gaps.append(place - first)
        text, counts = ids == plain[i]["input_ids"], counts | {told}
        assert torch.equal(labels[:-1] >= 0, text[1:]) and 12 <= int(text.sum()) <= 14
        assert torch.equal(labels[labels >= 0], plain[i]["labels"][labels >= 0])
    assert min(gaps) == 4 and max(gaps) > 24 and counts == {1, 2, 3}  # near and far, few and many


def test_facts_are_a_function_of_the_position_alone_and_as_frequent_as_stated():
    (made, places), (again, _) = windows(), windows()
    assert all([same(made[i], again[i]) for i in reversed(range(40))])
    assert places != windows(seed=1)[1]
    counts = [len(windows(share)[1]) for share in (0.1, 0.5, 0.9)]
    assert counts == pytest.approx([20, 100, 180], abs=16)


def test_without_a_share_nothing_changes(small_task):
    task = small_task("v14.4", recall_share=0.0, align_steps=0)
    made, plain = task.windows(task.recipe), asnn._Windows(task.tokens["train"], 16, 42)
    assert {*made[0]} == {"input_ids", "labels"} and all(same(made[i], plain[i]) for i in range(9))
    objective, results = asnn.Distiller(task.build_student(), task.teacher, task.recipe), []
    for answers in ({}, {"answers": torch.full((1, 16), -100)}):
        loss, terms = objective(**{name: part[None] for name, part in made[0].items()}, **answers)
        results.append(dict(enumerate(torch.autograd.grad(loss, [*objective.parameters()]))))
    assert same(*results) and terms["recall"] == 0
    with pytest.raises(ValueError, match=r"recall_share is 1.0; allowed: a number in \[0, 1\)"):
        task.recipe.replace(recall_share=1.0)


def test_answers_are_learned_from_labels_and_not_from_the_teacher(small_task):
    task = small_task("v14.4", recall_share=0.5, align_steps=0)
    made, student = task.windows(task.recipe), task.build_student()
    batch = torch.utils.data.default_collate([made[i] for i in range(4)])
    asked = batch["answers"] >= 0
    assert 0 < asked.any(1).sum() < 4
    loss, terms = asnn.Distiller(student, task.teacher, task.recipe)(**batch)
    ours, theirs = (model(batch["input_ids"]).logits.log_softmax(-1)
                    for model in (student, task.teacher))
    kd = (theirs.exp() * (theirs - ours)).sum(-1)[~asked].mean()
    ce = cross_entropy(ours[~asked], batch["labels"][~asked])
    recall = cross_entropy(ours[asked], batch["answers"][asked])
    torch.testing.assert_close((loss, terms["recall"]), (kd + 0.2 * ce + recall, recall.detach()))


def test_a_run_with_facts_resumes_to_the_bit(small_task, tmp_path):
    task = small_task("v14.4", recall_share=0.5, distill_steps=6, align_steps=1)
    whole, result = asnn.distil(task)
    asnn.distil(task, folder=tmp_path, max_steps=3)
    resumed, _ = asnn.distil(task, folder=tmp_path)
    assert same(whole.state_dict(), resumed.state_dict())
    assert any(row.get("recall", 0) > 0 for row in result.log)


def test_who_looks_up_is_always_right_and_who_does_not_guesses(task, student):
    models = {"oracle": Model(look_up), "short": Model(look_up, T),
              "blind": Model(lambda ids: torch.linspace(0, 1, V).expand(len(ids), 1, V))}
    rows = PAGE.recall_by_length(models, FACTS, TOKENS, T, 160, 0)
    assert [row["length"] for row in rows if row["model"] == "oracle"] == [30, 60, 120, 240]
    assert [row["length"] for row in rows if row["model"] == "short"] == [30]
    assert all(row["low"] < 1 / 8 < row["high"] < 0.25 if row["model"] == "blind" else
               row["recall"] == 1 and row["low"] > 0.97 for row in rows)
    places = PAGE.retrieval_windows(FACTS, TOKENS, T, 400, 0)[0] == FACTS.marker
    assert set(places.int().argmax(1).tolist()) == set(range(T - 4)) and (places.sum(1) == 2).all()
    facts = task.facts()
    rows = PAGE.recall_by_length({"student": student}, facts, task.tokens["test"], 16, 200, 0)
    assert [row["low"] <= 1 / len(facts.values) <= row["high"] for row in rows] == [True] * 4


def test_the_teacher_has_no_gap_to_itself_and_noise_a_large_one(task, teacher, tokens):
    noise = task.build_student()
    torch.nn.init.zeros_(noise.goose.embeddings.weight)  # the head: every token is as likely
    models = {"again": teacher, "noise": noise}
    own, again, noisy = PAGE.generation_gap(models, teacher, tokens["test"], 16, 12, 0)
    assert own["gap"] == again["gap"] == 1 and own["standard_error"] == 0
    assert noisy["gap"] > 20 and noisy["PPL"] == pytest.approx(noisy["gap"] * own["PPL"])


def test_continuations_are_drawn_from_the_models_own_distribution(teacher, tokens):
    prompts = torch.from_numpy(tokens["test"][:8].astype(np.int64)).repeat(600, 1)
    written = PAGE.write_on(teacher, prompts, 2, 0)
    assert torch.equal(written, PAGE.write_on(teacher, prompts, 2, 0)) and len(written) == 600
    token = written[:, 0].mode().values
    follow = written[written[:, 0] == token][:, 1]  # came through the cache
    logits = teacher(torch.cat((prompts[0], token[None]))[None]).logits
    chance, top = logits[0, -1].softmax(-1).max(-1)
    error = (chance * (1 - chance) / len(follow)) ** 0.5
    assert abs((follow == top).float().mean() - chance) < 4 * error


def test_repetition_is_the_share_of_ngrams_that_came_before():
    both = torch.stack((torch.zeros(103), torch.arange(103)))
    assert [PAGE.repetition(rows) for rows in (both[:1], both[1:], both)] == [0.99, 0, 0.495]
    assert PAGE.repetition(torch.arange(10).repeat(2)[None]) == 7 / 17


# ---- headline numbers ----------------------------------------------------------------------------

TAX = {"runs": [{"tax": t, "standard_error": 0.1, "spiking": 20 * t} for t in (1.1, 1.2, 1.3)]}


@pytest.mark.parametrize("name, more, wanted", [
    ("v14.4", {}, {"tax_kv"}), ("v14.4-rates", {}, {"tax_sites_600_one_step"}),
    ("v14.5", {}, {"tax_sites_600", "gap_600", "generation_gap"}),
    ("v14.5", {"recall_share": 0.5}, {"recall_1x", "recall_4x"})])
def test_what_a_run_claims_is_named_by_its_recipe(name, more, wanted):
    recipe = asnn.get_recipe(name, "tiny", seq_len=32, **more)
    metrics = {"tax": TAX, "teacher": {"test": {"ppl": 10.0}},
               "gap": {"test": {"value": 2.4, "standard_error": 0.5}}, "generation": [
                   {"model": who, "gap": gap, "standard_error": 0.25}
                   for who, gap in (("teacher", 1.0), ("student", 3.0))], "recall": [
                   {"model": who, "length": n, "recall": n / 1000, "low": 0.0, "high": 1.0}
                   for who in ("teacher", "student") for n in (32, 64, 128)]}
    found = PAGE.headlines(recipe, metrics, 600, "student")
    assert set(found) == wanted
    for row in (row for name, row in found.items() if name.startswith("tax")):  # t(2) is 4.303
        assert row["value"] == pytest.approx(1.2) and row["seeds"] == 3
        assert row["high"] - 1.2 == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    if "gap_600" in found:
        assert found["gap_600"]["value"] == pytest.approx(2.4)
        assert found["generation_gap"]["low"] == pytest.approx(3 - 1.96 * 0.25, rel=1e-3)
    if "recall_4x" in found:
        assert found["recall_4x"]["value"] == 0.128


def test_headlines_are_kept_beside_the_runs_and_say_what_they_belong_to(tmp_path, monkeypatch):
    monkeypatch.setenv("ASNN_OUTPUTS", str(tmp_path))
    run = asnn.Run.open("v14.5", "one", {})
    row = {"value": 1.1, "low": 1.0, "high": 1.2, "seeds": 3}
    run.headline("first", {"tax_kv": row, "gap_600": row})
    run.headline("second", {"gap_600": {**row, "value": 1.3}})
    found = asnn._read_json(tmp_path / "reference" / "headline.json")
    assert [(name, one["command"], one["value"]) for name, one in sorted(found.items())] == [
        ("gap_600", "second", 1.3), ("tax_kv", "first", 1.1)]
    assert set(found["tax_kv"]) == {*row, "hardware", "command", "commit"}
    assert all(found["tax_kv"].values())
