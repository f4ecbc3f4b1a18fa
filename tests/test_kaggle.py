"""Kaggle: the metadata that its command line tool reads, and the series in simulated sessions."""
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, kaggle_session, read_only

FOLDER = ROOT / ".ci" / "kaggle"
METADATA = {path.parent.name: json.loads(path.read_text())
            for path in sorted(FOLDER.glob("*/kernel-metadata.json"))}


def page_of(metadata):
    return Path(metadata["code_file"]).stem


def test_every_page_has_metadata_that_kaggle_takes():
    pages = {path.stem for path in (ROOT / "notebooks").glob("asnn_*.py")}
    assert {page_of(metadata) for metadata in METADATA.values()} == pages and len(METADATA) == 7
    for name, metadata in METADATA.items():
        assert (FOLDER / name / metadata["code_file"]).resolve().is_file()
        # Kaggle makes the address of the title: small letters, a dash for each space.
        assert metadata["id"] == "OWNER/" + metadata["title"].lower().replace(" ", "-")
        assert metadata["id"].endswith(page_of(metadata).replace("_", "-"))
        assert (metadata["language"], metadata["kernel_type"]) == ("python", "notebook")
        assert metadata["is_private"] and metadata["dataset_sources"] == ["OWNER/asnn-goose"]
        gpu = name in ("v14_3", "v14_4", "v15", "v18")
        assert metadata["enable_gpu"] == gpu
        assert metadata.get("machine_shape") == ("NvidiaTeslaT4" if gpu else None)
    dataset = json.loads((FOLDER / "dataset-metadata.json").read_text())
    assert dataset["id"] == "OWNER/asnn-goose" and len(dataset["licenses"]) == 1
    assert re.fullmatch(r"[\w ]{6,50}", dataset["title"])


def test_the_sources_chain_the_pages():
    ids = [METADATA[name]["id"] for name in ("v14_4", "v15", "v16")]
    sources = {name: metadata["kernel_sources"] for name, metadata in METADATA.items()}
    assert sources == {"v14_3": [], "v14_4": [], "v15": ids[:1], "v16": ids[:2], "v17": ids,
                       "v18": [], "v19": []}


def digest(folder):
    """A hash of the names and contents below a folder."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        whole.update(str(path.relative_to(folder)).encode())
        whole.update(path.read_bytes() if path.is_file() else b"")
    return whole.hexdigest()


def test_the_series_runs_session_by_session_as_committed(tmp_path):
    """Each page as it is committed, all cells, with what its metadata attaches and no network."""
    outputs = {}
    for name in ("v14_4", "v15", "v16", "v17"):
        metadata = METADATA[name]
        env, working, attached = kaggle_session(tmp_path / name)
        for source in metadata["kernel_sources"]:
            place = attached.parent.parent / "notebooks" / "someone" / source.split("/")[1]
            shutil.copytree(outputs[source], place, copy_function=shutil.copyfile)
        inputs = attached.parent.parent
        read_only(inputs)
        before = digest(inputs)
        shutil.copy(FOLDER / name / metadata["code_file"], working / "__notebook__.ipynb")
        command = [sys.executable, "-m", "papermill", "__notebook__.ipynb", "__notebook__.ipynb"]
        done = subprocess.run(command, cwd=working, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (name, done.stderr[-3000:])
        assert digest(inputs) == before and " wrote " not in done.stderr
        outputs[metadata["id"]] = working
    made = {path.parent.parent.name: json.loads(path.read_text())
            for path in tmp_path.glob("v14_4/kaggle/working/outputs/*/*/metrics.json")}
    assert {metrics["environment"]["platform"] for metrics in made.values()} == {"kaggle"}
    # The later pages found the student that was attached: none of them trained one.
    for name in ("v15", "v16", "v17"):
        outputs = tmp_path / name / "kaggle" / "working" / "outputs"
        assert {path.name for path in outputs.iterdir() if path.is_dir()} == {name}
