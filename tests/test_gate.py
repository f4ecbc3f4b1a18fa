"""How one notebook finds the student of another, and the gate that a claim about it needs."""
import dataclasses
import json
import os

import pytest
import torch

import asnn_common as asnn


@pytest.fixture
def finished(small_recipe, teacher, profile, tmp_path):
    """finished("v14.4", "night"): the folder of a run that left a student, and the student."""
    def make(version, name, outputs=tmp_path / "outputs", seed=0, age=0):
        recipe = small_recipe("v14.4-sites" if version == "v14.4" else "v14.3")
        settings = {"recipe": dataclasses.asdict(recipe), "profile": dataclasses.asdict(profile)}
        run = asnn.Run.open(version, name, json.loads(json.dumps(settings)), outputs)
        calibration = torch.zeros(2, 8, dtype=torch.long)
        student = asnn.build_student(recipe, teacher, seed, calibration)
        student.save_pretrained(run.folder / "student")
        path = run.folder / "metrics.json"
        path.write_text(json.dumps({"version": version, "run": name}))
        os.utime(path, (1e9 - age, 1e9 - age))
        return run.folder, student
    return make


def gate_of(student, passed=True, tokens=20_480):
    metrics = {"dead channels": {"pass": True}, "CKA": {"pass": passed}}
    return {"student": asnn.student_id(student), "metrics": metrics, "tokens": tokens}


def test_the_newest_student_is_found_unless_its_version_is_left_out(finished):
    assert asnn.find_run() is None
    old, _ = finished("v14.4", "night", age=100)
    new, _ = finished("v14.3", "morning")
    remedied, _ = finished("v15", "remedied", age=-100)
    assert asnn.find_run() == remedied
    assert asnn.find_run(without=("v15",)) == new
    assert asnn.find_run("v14.4/night") == old and asnn.find_run(str(old)) == old


def test_a_student_of_an_attached_input_is_found(finished, tmp_path, monkeypatch):
    inputs = tmp_path / "input"
    folder, _ = finished("v14.4", "night", outputs=inputs / "someone" / "outputs")
    assert asnn.find_run() is None
    monkeypatch.setenv("ASNN_INPUTS", str(inputs))
    assert asnn.find_run() == folder and asnn.find_run("v14.4/night") == folder


def test_an_unfinished_run_is_no_student(finished):
    folder, _ = finished("v14.4", "night")
    (folder / "metrics.json").unlink()
    assert asnn.find_run() is None
    with pytest.raises(ValueError, match="student is 'v14.4/night'; allowed: .*none yet"):
        asnn.find_run("v14.4/night")


def test_an_unknown_student_is_refused_with_those_there_are(finished):
    finished("v14.4", "night")
    with pytest.raises(ValueError, match="student is 'v14.4/noon'; allowed: v14.4/night"):
        asnn.find_run("v14.4/noon")


def test_a_run_is_loaded_with_its_settings(finished, small_recipe, profile):
    folder, student = finished("v14.4", "night")
    loaded, recipe, size, metrics = asnn.load_run(folder)
    assert recipe == small_recipe("v14.4-sites") and size == profile and metrics["run"] == "night"
    assert not loaded.training and asnn.student_id(loaded) == asnn.student_id(student)


def test_a_damaged_student_is_refused_in_one_sentence(finished):
    folder, _ = finished("v14.4", "night")
    weights = folder / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="student .* cannot be loaded: "):
        asnn.load_run(folder)


def test_a_claim_is_gated_only_by_a_passed_gate_of_the_same_student(finished, tmp_path, monkeypatch):
    folder, student = finished("v14.4", "night")
    _, other = finished("v14.4", "other", seed=1)
    assert asnn.gate_status(student) == (False, "ungated: no gate.json was found; run the v15 notebook first")
    path = tmp_path / "outputs" / "v15" / "gate.json"
    asnn.write_atomically(path, json.dumps(gate_of(student)))
    gated, why = asnn.gate_status(student)
    assert gated and why == "gated: the student passed all 2 metrics over 20,480 tokens"
    gated, why = asnn.gate_status(other)
    assert not gated and "of other students" in why
    asnn.write_atomically(path, json.dumps(gate_of(student, passed=False)))
    assert asnn.gate_status(student) == (False, "ungated: the student failed CKA")
    asnn.write_atomically(path, json.dumps(gate_of(student, tokens=4096)))
    assert asnn.gate_status(student) == (False, "ungated: the gate was passed over 4,096 tokens, and 20,000 are needed")
    # A later validation of another student takes nothing away, and the student before a remedy is known too.
    asnn.write_atomically(path, json.dumps({**gate_of(other), "other": gate_of(student, passed=False)}))
    assert asnn.gate_status(other)[0] and "failed CKA" in asnn.gate_status(student)[1]
    asnn.write_atomically(path.parent / "run" / "gate.json", json.dumps(gate_of(student)))
    assert asnn.gate_status(student)[0]
    (path.parent / "run" / "gate.json").unlink()
    # The gate may be in an attached input, with the outputs of an earlier session.
    inputs = tmp_path / "input"
    asnn.write_atomically(inputs / "earlier" / "outputs" / "v15" / "gate.json", json.dumps(gate_of(student)))
    path.unlink()
    monkeypatch.setenv("ASNN_INPUTS", str(inputs))
    assert asnn.gate_status(student)[0]


def test_a_notebook_without_a_student_makes_a_short_one_but_not_at_full_size(capsys):
    small = asnn.PROFILES["tiny"].replace(corpus_chars=150_000, teacher_steps=4, eval_windows=2)
    folder = asnn.train_short_student("v14.4-sites", small, "as a test", steps=3)
    assert folder.parent.name == "short" and "a short one of 3 steps is trained now (as a test)" in capsys.readouterr().out
    assert asnn.find_run(sites=("mix_in", "ffn_hidden")) == folder and asnn.find_run(without=("short",)) is None
    assert asnn.load_run(folder)[3]["training"]["step"] == 3
    with pytest.raises(FileNotFoundError, match="run asnn_v14_4_transfer first"):
        asnn.train_short_student("v14.4", asnn.PROFILES["t4"], "a GPU")


def test_students_without_the_spike_sites_asked_for_are_not_found(finished):
    finished("v14.3", "morning")
    assert asnn.find_run(sites=("mix_in",)) is None
    folder, _ = finished("v14.4", "night", age=100)
    assert asnn.find_run(sites=("mix_in", "ffn_hidden")) == folder
