"""The matrix of ablations: its rows, its statistics, and the function that runs it."""
import json
import math
import os
import threading
import time

import asnn_common as asnn
import numpy as np
import pytest
from conftest import definitions
from scipy import stats


@pytest.fixture
def page():
    return definitions("asnn_v18_ablations")


@pytest.mark.parametrize("profile", asnn.PROFILES)
def test_every_row_is_a_recipe_that_differs_from_its_control(page, profile):
    table = page.matrix(profile)
    assert {row.control for row in table.values()} - {None} < set(table)
    for row in table.values():
        recipe = page.recipe_of(row, profile, 300, 43)
        assert (recipe.profile, recipe.distill_steps, recipe.seed) == (profile, 300, 43)
        if row.control and row.kill_switch:
            control = page.recipe_of(table[row.control], profile, 300, 43)
            apart = {k for k in vars(recipe) if vars(recipe)[k] != vars(control)[k]}
            assert apart and apart <= {*row.changes, "name", "changed", "matrix_lr", "layer_map"}


# ---- statistics


def cell(row, seed, ppl, **changes):
    return {"row": row, "family": "ours", "control": None, "profile": "ref", "steps": 9,
            "seed": seed, "ppl": ppl, "precision": "fp32", "corpus": {"hash": "c"},
            "teacher": {"hash": "t"}, **changes}


def cells(page, effects, row="delta", control=(20.0, 21.0, 22.5, 20.4, 21.3)):
    """Five cells of the control, and of a row cells with these differences of log PPL."""
    made = [cell("control", seed, ppl) for seed, ppl in enumerate(control)]
    return made + [cell(row, seed, control[seed] * math.exp(e), control="control")
                   for seed, e in enumerate(effects)]


def row_of(page, made, name="delta"):
    return next(r for r in page.effects(made, page.matrix("ref")) if r["row"] == name)


def test_the_effect_is_that_of_scipys_paired_test_and_of_a_hand_made_example(page):
    made = cells(page, [0.1, 0.2, 0.3])
    found = row_of(page, made)
    row, control = ([math.log(c["ppl"]) for c in made if c["row"] == name][:3]
                    for name in ("delta", "control"))
    assert found["p"] == pytest.approx(stats.ttest_rel(row, control).pvalue)
    # By hand: mean 0.2, deviation 0.1, standard error 0.1 / sqrt(3), t = 3.4641, 4.3027 of 2 df.
    assert found["effect"] == pytest.approx(0.2) and found["p"] == pytest.approx(0.0742, abs=1e-4)
    assert found["high"] - 0.2 == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert 0.2 - found["low"] == pytest.approx(found["high"] - 0.2)


def test_holms_correction_by_hand(page):
    assert page.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert page.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert page.holm([0.03]) == pytest.approx([0.03]) and len(page.holm([])) == 0


@pytest.mark.parametrize("effects, says", [
    ([0.10, 0.101, 0.099], "PPL +10.5 %"), ([-0.10, -0.101, -0.099, -0.1], "PPL -9.5 %"),
    ([0.01, -0.01, 0.002], "no difference shown"), ([0.0, 0.0, 0.0], "no difference shown"),
    ([0.1, 0.2, 0.3], "no difference shown"), ([0.1, 0.101], "fewer than 3 seeds"),
    ([0.1], "fewer than 3 seeds"), ([], "not run")])
def test_what_a_row_may_say(page, effects, says):
    assert row_of(page, cells(page, effects))["verdict"] == says


def test_a_seed_without_its_control_is_refused_and_waits_in_the_table(page):
    made = cells(page, [0.1, 0.1, 0.1]) + [cell("delta", 9, 30.0, control="control")]
    with pytest.raises(ValueError, match="seed 9 has no control of that seed"):
        page.paired([c for c in made if c["row"] == "delta"], made[:5])
    assert (row_of(page, made)["seeds"], row_of(page, made)["waits"]) == (3, 1)


@pytest.mark.parametrize("change", [
    {"corpus": {"hash": "x"}}, {"teacher": {"hash": "x"}}, {"steps": 8}, {"profile": "cpu"},
    {"precision": "bf16"}])
def test_pairs_that_are_not_alike_are_refused(page, change):
    with pytest.raises(ValueError, match="is compared with"):
        page.paired([cell("delta", 0, 30.0, **change)], [cell("control", 0, 20.0)])


def test_the_noise_floor_needs_five_seeds_of_a_control(page):
    made = cells(page, [0.1, 0.2])
    logs = [math.log(c["ppl"]) for c in made[:5]]
    assert page.noise(made) == {"row": "control", "seeds": 5, "sd": pytest.approx(stats.tstd(logs))}
    assert page.noise(made[1:]) is None and page.noise([]) is None


# ---- the runner


@pytest.fixture
def runner(page, task, small_recipe, tmp_path, monkeypatch):
    """run(seeds) trains a row of 12 steps; run.trained lists the seeds that were trained."""
    row = page.Row("p-logits", "distillation", None, "v14.3", "", {"fdd": "none"})
    page.recipe_of = lambda row, profile, steps, seed: small_recipe(
        row.base, distill_steps=steps, seed=seed, eval_every=4, save_every=4, **row.changes)
    train = page.train_cell

    def count(*given):
        run.trained.append(given[2].seed)
        return train(*given)

    def run(seeds, hours=None):
        return page.run_rows(task, [row], seeds, 12, tmp_path, hours)

    page.train_cell, run.trained, run.row, run.train = count, [], row, train
    return run


def test_finished_cells_are_skipped_and_hold_what_a_row_must(page, runner, task, tmp_path):
    (one,) = runner([1])
    assert {c["seed"] for c in runner([1, 2])} == {1, 2} and runner.trained == [1, 2]
    assert len(runner([1, 2])) == 2 and runner.trained == [1, 2]
    assert {"command", "recipe", "corpus", "teacher", "commit", "hardware", "seconds", "versions",
            "student", "family", "control"} <= one.keys()
    assert one["recipe"]["fdd"] == "none" and one["corpus"]["hash"] == task.corpus.hash
    assert [step for step, _ in one["curve"]] == [4, 8, 12]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p-logits_12_1.json",
                                                          "p-logits_12_2.json"]


def test_an_unfinished_cell_goes_on_and_ends_as_in_one_go(page, runner, task, tmp_path):
    (whole,) = runner([1])
    path = tmp_path / "p-logits_12_1.json"
    path.unlink()
    recipe = page.recipe_of(runner.row, "tiny", 12, 1)
    given = (task, runner.row, recipe, page.facts_of(task), path.with_suffix(".work"), 1e-9)
    assert runner.train(*given) is None and list(path.with_suffix(".work").glob("checkpoint-*"))
    (again,) = runner([1])
    assert (again["ppl"], again["curve"]) == (whole["ppl"], whole["curve"])
    assert not path.with_suffix(".work").exists()


def test_a_row_that_fails_says_so_and_the_next_goes_on(page, runner, capsys):
    train = page.train_cell

    def fails(*given):
        if given[2].seed == 1:
            raise RuntimeError("Step 3: loss is nan")
        return train(*given)

    page.train_cell = fails
    assert [c["seed"] for c in runner([1, 2])] == [2]
    assert "p-logits, seed 1 failed: Step 3: loss is nan" in capsys.readouterr().out


def test_a_cell_of_another_recipe_is_refused_before_anything_is_trained(runner, tmp_path):
    (one,) = runner([1])
    one["recipe"]["lr"] = 0.5
    (tmp_path / "p-logits_12_1.json").write_text(json.dumps(one))
    with pytest.raises(ValueError, match="another lr; move it away"):
        runner([2, 1])
    assert runner.trained == [1]


def test_a_claim_keeps_others_out_and_a_stale_one_is_taken_over(page, runner, tmp_path):
    path = tmp_path / "p-logits_12_1.json"
    with page.claimed(path) as ours:
        assert ours and runner([1]) == [] and runner.trained == []
    assert not list(tmp_path.glob("*.claim-*"))  # one that ended well leaves no claim
    claim = path.with_suffix(".claim-000003")
    claim.write_text("of a machine that died")
    assert runner([1]) == []
    os.utime(claim, (0, 0))
    assert len(runner([1])) == 1 and not list(tmp_path.glob("*.claim-*"))


def test_of_many_that_see_a_stale_claim_one_gets_it(page, tmp_path):
    path, got = tmp_path / "a.json", []
    path.with_suffix(".claim-000000").write_text("")
    os.utime(path.with_suffix(".claim-000000"), (0, 0))
    barrier, done = threading.Barrier(8), threading.Barrier(8)

    def contend():
        barrier.wait()
        with page.claimed(path) as ours:
            got.append(ours)
            done.wait()

    threads = [threading.Thread(target=contend) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(got) == [False] * 7 + [True]


def test_a_claim_is_renewed_while_work_goes_on(page, tmp_path):
    with page.claimed(tmp_path / "a.json", stale=0.5):
        time.sleep(1.2)
        with page.claimed(tmp_path / "a.json", stale=0.5) as theirs:
            assert not theirs


def test_the_row_without_a_kill_switch_has_none(page, task, small_recipe):
    seen = []

    class Probe(page.WithoutKillSwitch):
        def run(self):
            seen.append(self.model.FDD_REGRESSION)
            return super().run()

    asnn.distil(task, small_recipe(distill_steps=2), trainer=Probe)
    assert seen == [math.inf] and asnn.Distiller.FDD_REGRESSION == 0.10


def test_steps_are_timed_in_turns(page, small_task, monkeypatch):
    seen, task = [], small_task("v14.4")
    real = asnn.distil
    monkeypatch.setattr(asnn, "distil", lambda *args, **more: seen.append(args[1]) or real(
        *args, **more))
    monkeypatch.setattr(asnn, "get_recipe", lambda name, profile, **more: task.recipe.replace(
        name=name, **more))
    costs = page.step_costs(task, ("v14.4", "v14.5"), 2, steps=2)
    assert [recipe.name for recipe in seen] == ["v14.4", "v14.5"] * 2
    assert all(recipe.align_steps == 0 for recipe in seen) and list(costs) == ["v14.4", "v14.5"]
    assert all(len(found) == 2 and min(found) > 0 for found in costs.values())


def test_exported_cells_are_merged_by_key(page, tmp_path):
    place = tmp_path / "reference" / "ablations.jsonl"
    assert page.published(place) == []
    page.export([cell("control", 1, 20.0), cell("control", 2, 21.0)], place)
    assert page.export([cell("control", 2, 22.0), cell("control", 2, 9.0, steps=8)], place) == 3
    assert sorted(c["ppl"] for c in page.published(place)) == [9.0, 20.0, 22.0]
