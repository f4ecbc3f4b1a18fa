"""The paper: where its numbers come from, what is refused, and what the package holds."""
import json
import re
import zipfile
from types import SimpleNamespace

import pytest
from conftest import ROOT, definitions

REFERENCE = ROOT / "outputs" / "reference"


@pytest.fixture(scope="module")
def page():
    return definitions("asnn_v19_publication")


@pytest.fixture(scope="module")
def sources(page):
    return page.read_sources(REFERENCE)


# ---- numbers


def test_no_number_of_the_manuscript_is_typed(page):
    assert page.typed_numbers(page.MAIN) == []


@pytest.mark.parametrize("typed", [
    "1.229", "$p<0.01$", "3 seeds", "12\\,\\%", "GPT-2", "\\textbf{7}", "1,024", "\\frac{1}{3}",
    "\\begin{equation}x = 1.08\\end{equation}"])
def test_a_typed_number_is_found_in_every_section(page, typed):
    for section in page.SECTIONS:
        end = section.rindex(".\n") + 2
        typed_in = page.MAIN.replace(section, section[:end] + typed + "\n" + section[end:])
        assert page.typed_numbers(typed_in), section[:40]


def test_every_macro_of_the_manuscript_is_a_field_that_the_page_knows(page):
    known = {page.macro(name) for name, *_ in page.FIELDS} | {
        page.macro(name + end) for name in page.HEADLINE for end in ("", "_low", "_high", "_seeds")}
    assert set(re.findall(r"\\V[A-Z]\w*", page.MAIN)) <= known
    named = re.findall(r"\\([A-Z]\w*)", page.MAIN)
    assert {name for name in named if not re.match("V[A-Z]", name)} <= {
        *page.NAMES, "IfFileExists"}


def test_every_number_is_the_field_that_it_names(page, sources):
    """Read again from the files, not by the page: text and value agree to the digits shown."""
    files = {"headline": "headline.json", "v16": "v16.json", "v17": "v17/efficiency.json"}
    values, traced = page.numbers(sources), 0
    for value in values.values():
        source, *path = value["field"].split("|")
        if source in ("runs", "gate"):
            name = path.pop(0)
            file = f"ref-{name}.json" if source == "runs" else f"v15/{name}.json"
        elif source in files:
            file = files[source]
        else:  # made of several lines, or a recipe
            continue
        found = json.loads((REFERENCE / file).read_text())
        for key in path:
            found = found[key]
        assert value["text"] == page.shown(found, value["format"])
        if not isinstance(found, str):
            number = value["text"].replace(",", "").replace("$-$", "-").replace("\\%", "e-2")
            number = re.sub(r"\$(.*)\\times10\^\{(.*)\}\$", r"\1e\2", number)
            assert float(number) == pytest.approx(found, rel=0.06, abs=6e-3)
        traced += 1
    assert traced >= 80
    gaps = [json.loads(line) for line in (REFERENCE / "ladder.jsonl").read_text().splitlines()]
    delta = [row["test"]["gap"] for row in gaps if row["row"] == "+ delta rule"]
    assert values["\\VGapDelta"]["text"] == f"{sum(delta) / len(delta):.2f}" and len(delta) == 3


@pytest.mark.parametrize("value, form, text", [
    (1.0561, ".3f", "1.056"), (0.0349, ".1%", r"3.5\%"), (1.2e-7, ".2g", r"$1.2\times10^{-07}$"),
    (-0.0064, ".3f", "$-$0.006"), (6328976, ",d", "6,328,976"), ("a_b & c", "s", r"a\_b \& c")])
def test_how_a_value_is_shown(page, value, form, text):
    assert page.shown(value, form).replace("-7", "-07") == text.replace("-7", "-07")


def test_what_was_not_measured_says_so(page, sources):
    fewer = {**sources, "headline": {k: v for k, v in sources["headline"].items()
                                     if k != "tax_kv"}}
    text = page.definitions_of(page.numbers(fewer), page.MAIN)
    assert rf"\newcommand{{\VTaxKv}}{{{page.MISSING}\xspace}}" in text
    used = set(re.findall(r"\\V[A-Z]\w*", page.MAIN))
    assert used <= set(re.findall(r"newcommand\{(\\\w+)\}", text))


def test_a_checkout_without_any_result_still_gives_a_paper(page, tmp_path):
    empty = page.read_sources(tmp_path)
    assert set(page.numbers(empty)) <= {"\\VPublishedPpl", "\\VTFourSteps"}  # the recipes' own
    assert page.figures(empty) == {} and not any(page.tables(empty).values())
    assert page.to_latex([]).strip() == page.MISSING
    files = page.package(empty, tmp_path, page.MAIN, {})
    assert dict(zip(*list(zip(*page.checklist(empty, page.MAIN, files)))[:2]))["Compute"] == "no"


# ---- tables, references, checklist, package


def test_tables_have_at_most_seven_columns_that_say_what_was_measured(page, sources):
    made = page.tables(sources)
    assert max(len(rows[0]) for rows in made.values() if rows) <= 7
    head = " ".join(made["main"][0])
    for name, how in (("PPL, gap", "measured"), ("ms/token", "measured"), ("MiB", "measured"),
                      ("MACs skipped", "measured"), ("mJ/token", "estimated")):
        assert f"{name} ({how})" in head
    tex = page.to_latex([{"a_b": "5 % & {x}"}])
    assert r"a\_b" in tex and r"5 \% \& \{x\}" in tex and r"\toprule" in tex


def test_what_is_cited_is_listed_once_with_an_identifier(page):
    keys = re.findall(r"@misc\{(\w+),", page.bibliography())
    cited = {key for part in re.findall(r"\\cite[tp]?\{(.*?)\}", page.MAIN)
             for key in part.split(",")}
    assert sorted(keys) == sorted(cited)
    notes = re.findall(r"note = \{(.*)\}", page.bibliography())
    assert len(notes) == len(keys) and all(re.search(r"arXiv:\d{4}\.\d{4,5}$|doi:10|https|\d{4}|-",
                                                     note) for note in notes)


def test_the_checklist_is_filled_from_facts(page, sources):
    def answers(tex=page.MAIN, **headline):
        rows = page.checklist({**sources, "headline": headline}, tex, {"recipes.json": ""})
        return {question: answer for question, answer, _ in rows}

    claim = {"low": 1, "high": 2, "hardware": "x", "command": "y", "commit": "z"}
    three, one = {**claim, "seeds": 3}, {**claim, "seeds": 1}
    assert answers(a=three)["Statistical significance"] == "yes"
    assert answers(a=three, b=one)["Statistical significance"] == "partly"
    assert answers(a=one)["Statistical significance"] == "no"
    assert answers(a=three)["Claims match results"] == "yes"
    assert answers(page.MAIN + "7")["Claims match results"] == "no"
    assert answers(page.MAIN.replace("{Limits}", "{More}"))["Limitations"] == "no"
    assert answers(a={"seeds": 3, "low": 1, "high": 2})["Compute"] != "yes"
    assert answers()["Results can be reproduced"] == "no"  # without commands and reproduce.md


def test_the_package_holds_what_a_stranger_needs_and_is_the_same_twice(page, sources, tmp_path):
    cells = [{"row": "control", "seed": 42, "profile": "cpu", "steps": 9, "command": "run it",
              "student": "abc", "corpus": {"name": "c", "hash": "1"},
              "teacher": {"name": "t", "hash": "2"}}]
    files = page.package({**sources, "cells": cells}, REFERENCE, page.MAIN, {"cpu": "a"})
    for name in ("one.zip", "two.zip"):
        page.write_zip(tmp_path / name, files)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as package:
        read = {name: package.read(name).decode() for name in package.namelist()}
    assert {"reproduce.md", "recipes.json", "environment.json", "commands.txt", "hashes.json",
            "reference/headline.json", "reference/ladder.jsonl"} <= read.keys()
    assert "control, seed 42, cpu, 9 steps: run it" in read["commands.txt"]
    assert all(f"{name} (claim)" in read["commands.txt"] for name in sources["headline"])
    hashes = json.loads(read["hashes.json"])
    assert hashes["students"]["control-42-9"] == "abc" and hashes["teacher"] == ["t 2"]
    assert "c 1" in hashes["corpus"] and "reference/v16.json" in hashes["files"]
    assert json.loads(read["recipes.json"])["v14.4"]["state_kind"] == "delta"


def test_without_latex_the_page_says_what_to_install(page, monkeypatch, tmp_path):
    monkeypatch.setattr(page.shutil, "which", lambda name: None)
    assert page.compiled(tmp_path)[0] is None and "texlive" in page.compiled(tmp_path)[1]
    monkeypatch.setattr(page.shutil, "which", lambda name: name)
    monkeypatch.setattr(page.subprocess, "run", lambda *_, **__: SimpleNamespace(
        returncode=1, stdout="! Undefined control sequence.", stderr=""))
    assert "Undefined control sequence" in page.compiled(tmp_path)[1]
