"""Notebooks for Kaggle: folders for its command line tool, and the whole series on a simulated Kaggle.

    kaggle.py dataset TARGET [--attach FOLDER ...]    a folder for `kaggle datasets create -p TARGET --dir-mode zip`:
                                                      asnn_common.py and, for sessions without internet, folders such
                                                      as gpt2 or wikitext-2-raw-v1
    kaggle.py push-folder NOTEBOOK TARGET [--offline] [--set NAME=VALUE ...]
                                                      a folder for `kaggle kernels push -p TARGET`
    kaggle.py run [NAMES]                             the series in profile tiny, session by session, as Kaggle runs it

The owner of what is pushed is --owner or KAGGLE_USERNAME. A simulated session has /kaggle/input, read-only, with what
kernel-metadata.json names and nothing else, /kaggle/working as its folder, a new home and no network. It needs
`unshare`; where that is not allowed, the inputs lie in a folder that ASNN_INPUTS names and the network stays.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from notebooks import KERNELSPEC, ROOT, Stop, exit_code, read_source, series, set_ids, tags  # noqa: E402

DATASET = "asnn-goose"
# Smaller than profile tiny, in a simulated session.
SMALLER = {
    "asnn_v14_4_transfer": {"tax_seeds": 1},
    "asnn_v15_spikingbrain": {"tokens": 2048, "damage_windows": 4, "remedy": False},
}


# ---- folders for Kaggle's command line tool ------------------------------------------------------


def version(name):
    """The numbers in a notebook's name: (14, 4) of asnn_v14_4_transfer."""
    return tuple(int(part) for part in re.match(r"asnn_v(\d+(?:_\d+)*)", name).group(1).split("_"))


def slug(name):
    """The last part of a kernel's address: asnn-v14-4-transfer of asnn_v14_4_transfer."""
    return name.replace("_", "-")


def sources_of(name, names):
    """The notebooks whose output a notebook reads: from v15 on the last that makes students, and what followed it."""
    before = [other for other in sorted(names, key=version) if version(other) < version(name)]
    makers = [other for other in before if version(other) < (15,)]
    return [] if version(name) < (15,) else makers[-1:] + before[len(makers) :]


def kernel_metadata(name, owner, names, offline=False):
    """What kernel-metadata.json says of a notebook; a title and its slug have to agree."""
    return {
        "id": f"{owner}/{slug(name)}",
        "title": name.replace("_", " ").replace("asnn", "ASNN"),
        "code_file": f"{name}.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": not offline,
        "machine_shape": "NvidiaTeslaT4",  # otherwise a P100 may come, which torch has no kernels for
        "docker_image_pinning_type": "latest",
        "keywords": [],
        "dataset_sources": [f"{owner}/{DATASET}"],
        "kernel_sources": [f"{owner}/{slug(other)}" for other in sources_of(name, names)],
        "competition_sources": [],
        "model_sources": [],
    }


def with_parameters(cell, values):
    """The text of a parameters cell with other values; raises Stop for a name that it does not set."""
    text = cell.source
    for name, value in values.items():
        pattern = re.compile(rf"^{re.escape(name)} = [^#\n]*?(?=  #|$)", re.MULTILINE)
        if not pattern.search(text):
            known = [target.id for line in ast.parse(cell.source).body for target in line.targets]
            raise Stop(f"the notebook has no parameter {name}: it has {', '.join(known)}.")
        text = pattern.sub(lambda _: f"{name} = {value!r}", text, count=1)
    return text


def owner_of(given):
    """The Kaggle user name; raises Stop where none is known or it cannot be one."""
    owner = given or os.environ.get("KAGGLE_USERNAME", "")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", owner):
        raise Stop(
            f"the Kaggle user name is {owner!r}: --owner or KAGGLE_USERNAME gives it in small letters, digits and '-'."
        )
    return owner


def new_target(target):
    """The folder to write, made; raises Stop for one that holds something."""
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Stop(f"{target} exists and is not empty: name a new folder.")
    target.mkdir(parents=True, exist_ok=True)
    return target


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def push_folder(name, target, owner, offline=False, values=()):
    """Write a notebook without outputs and its kernel-metadata.json; return what the latter says."""
    import nbformat

    source, *others = series(names=[name])
    if others:
        raise Stop(f"{name} is part of several names: {', '.join(path.stem for path in (source, *others))}.")
    values = dict(values)
    notebook = read_source(source)
    for cell in notebook.cells:
        if "parameters" in tags(cell):
            cell.source = with_parameters(cell, values)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    set_ids(notebook)
    metadata = kernel_metadata(source.stem, owner, [path.stem for path in series()], offline)
    # The editor of Kaggle reads these, its command line tool the other file.
    accelerator = {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "isInternetEnabled": not offline}
    notebook.metadata = {
        "kernelspec": dict(KERNELSPEC),
        "language_info": {"name": "python"},
        "kaggle": {**accelerator, "dataSources": [], "language": "python", "sourceType": "notebook"},
    }
    nbformat.validate(notebook)
    target = new_target(target)
    (target / metadata["code_file"]).write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    write_json(target / "kernel-metadata.json", metadata)
    return metadata


def dataset_folder(target, owner, attach=()):
    """Write the helper module, folders for sessions without internet, and dataset-metadata.json; return the latter."""
    folders = [Path(folder) for folder in attach]
    for folder in folders:
        if not folder.is_dir():
            raise Stop(f"--attach {folder} is no folder.")
    names = [folder.resolve().name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise Stop(f"--attach names two folders {name}: one would take the other's place.")
    metadata = {"title": "ASNN Goose", "id": f"{owner}/{DATASET}", "licenses": [{"name": "MIT"}]}
    target = new_target(target)
    shutil.copy(ROOT / "asnn_common.py", target)
    for folder in folders:
        shutil.copytree(folder, target / folder.resolve().name)
    write_json(target / "dataset-metadata.json", metadata)
    return metadata


# ---- a simulated session -------------------------------------------------------------------------


def unshare():
    """The command that gives a process its own mounts and no network, or None where that is not allowed."""
    command = ["unshare", "--mount", "--net", *(["--map-root-user"] if os.geteuid() else [])]
    try:
        done = subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    except OSError:
        return None
    return command if done.returncode == 0 else None


def enter(session, command):
    """In a namespace of its own: see this machine with the session's folders as /kaggle, and become the command."""
    import fcntl
    import socket
    import struct

    def mount(*arguments):
        subprocess.run(["mount", *map(str, arguments)], check=True)

    with socket.socket() as any_socket:  # a notebook talks to its kernel through the loopback device, which is down
        SIOCSIFFLAGS, IFF_UP = 0x8914, 1
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))
    root = session / "root"
    root.mkdir()
    mount("-t", "tmpfs", "none", root)  # /kaggle is made here and not on the disk
    for entry in Path("/").iterdir():
        here = root / entry.name
        if entry.is_symlink():
            here.symlink_to(os.readlink(entry))
        elif entry.is_dir() and entry.name != "kaggle":
            here.mkdir()
            mount("--rbind", entry, here)
    for name in ("input", "working"):
        (root / "kaggle" / name).mkdir(parents=True)
        mount("--bind", session / name, root / "kaggle" / name)
    mount("-o", "remount,bind,ro", root / "kaggle" / "input")
    os.chroot(root)
    os.chdir("/kaggle/working")
    os.execvp(command[0], command)


def digest(folder):
    """A hash of the names and contents below a folder."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        whole.update(str(path.relative_to(folder)).encode())
        whole.update(path.read_bytes() if path.is_file() else b"")
    return whole.hexdigest()


def attach(source, session, owner, name, kind, nested):
    """Copy a folder to where Kaggle shows an input of this name, at the shallow or at the nested place."""
    place = session / "input" / (Path(kind) / owner / name if nested else name)
    shutil.copytree(source, place, copy_function=shutil.copyfile)
    for path in [place, *place.rglob("*")]:
        os.utime(path, (0, 0))  # what is attached has no useful times


def environment(session):
    """The variables of a session: Kaggle's, and nothing that this machine sets for the project."""
    own = ("ASNN_", "HF_", "KAGGLE_", "PYTHONPATH", "MPLBACKEND", "JUPYTER", "IPYTHON")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    return {
        **kept,
        "HOME": str(session / "home"),
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "COLAB_RELEASE_TAG": "set on Kaggle too",
        "HF_HUB_OFFLINE": "1",
        "ASNN_PROFILE": "tiny",
    }


def last_words(path):
    """What the last cell of an executed notebook printed."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return "".join(
        "".join(o["text"]) for o in cells[-1]["outputs"] if o["output_type"] == "stream" and o["name"] == "stdout"
    ).strip()


def findings_of(working, sources):
    """What is wrong with what a session left in its folder, each in a sentence."""
    found = [json.loads(path.read_text()) for path in working.glob("outputs/*/*/metrics.json")]
    findings = [] if found else ["it left no outputs/*/*/metrics.json."]
    for metrics in found:
        what = (metrics["environment"]["platform"], metrics["corpus"]["name"], metrics["teacher"]["name"])
        if what != ("kaggle", "wikitext-2", "gpt2"):
            findings.append(f"its platform, corpus and teacher are {', '.join(what)}, not kaggle, wikitext-2, gpt2.")
    if sources and (working / "outputs" / "short").exists():
        findings.append("it did not find the student of the notebook before it and trained one.")
    return findings


def run_session(folder, session, space, dataset, outputs, nested):
    """Run a pushed folder as Kaggle does, with the inputs that its metadata names; return findings."""
    metadata = json.loads((folder / "kernel-metadata.json").read_text())
    for part in ("input", "working", "home"):
        (session / part).mkdir(parents=True)
    for kind, names in (("datasets", metadata["dataset_sources"]), ("notebooks", metadata["kernel_sources"])):
        for full in names:
            owner, name = full.split("/")
            attach(dataset if kind == "datasets" else outputs[name], session, owner, name, kind, nested)
    page, before = session / "working" / "__notebook__.ipynb", digest(session / "input")
    shutil.copy(folder / metadata["code_file"], page)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3", page.name, page.name]
    values = SMALLER.get(Path(metadata["code_file"]).stem, {})
    if not metadata["kernel_sources"]:  # the others take what the student's run took
        values = {"corpus": "wikitext-2", "teacher": "gpt2", **values}
    for name, value in values.items():
        command += ["-p", name, str(value)]
    variables = environment(session)
    if space:
        command = [*space, sys.executable, __file__, "enter", str(session), *command]
    else:
        variables["ASNN_INPUTS"] = str(session / "input")
    done = subprocess.run(command, cwd=session / "working", env=variables, capture_output=True, text=True)
    if done.returncode:
        return [f"it ended with exit code {done.returncode}:\n" + "\n".join(done.stderr.splitlines()[-25:])]
    changed = [] if digest(session / "input") == before else ["it wrote into its inputs."]
    return changed + findings_of(session / "working", metadata["kernel_sources"])


def offline_inputs(folder):
    """A tiny GPT-2 with random weights and a tokenizer, and WikiText as the hub's parquet files, below a folder."""
    sys.path.insert(0, str(ROOT))
    import asnn_common as asnn
    import pandas
    import transformers

    os.environ["ASNN_CACHE"] = str(folder / "cache")
    corpus = asnn.load_corpus("pydocs", 150_000)
    tokenizer = asnn.train_tokenizer(corpus, 300)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    asnn.seed_everything(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    texts = folder / "wikitext-2-raw-v1"
    texts.mkdir()
    for split in asnn.SPLITS:
        lines = pandas.DataFrame({"text": corpus.text(split).splitlines(keepends=True)})
        lines.to_parquet(texts / f"{split}-00000-of-00001.parquet")
    return [folder / "gpt2", texts]


def run(names=()):
    """Run the series on a simulated Kaggle, up to the first notebook that fails, and print what each took and said."""
    space, chosen = unshare(), series(names=names)
    print("sessions with their own /kaggle and no network" if space else "no namespaces here: inputs by ASNN_INPUTS")
    with tempfile.TemporaryDirectory(prefix="asnn-kaggle-") as temporary:
        place, outputs, begin = Path(temporary), {}, time.time()
        (place / "made").mkdir()
        dataset_folder(place / "dataset", "someone", offline_inputs(place / "made"))
        for number, source in enumerate(chosen):
            folder, session, nested = place / f"push-{number}", place / f"session-{number}", number % 2 == 1
            metadata = push_folder(source.stem, folder, "someone", offline=True)
            for full in metadata["kernel_sources"]:
                if full.split("/")[1] not in outputs:
                    raise Stop(f"{source.stem} reads the output of {full}, which is not among the notebooks to run.")
            start = time.time()
            findings = run_session(folder, session, space, place / "dataset", outputs, nested)
            found = (session / "input").glob("*/*/*" if nested else "*")
            inputs = sorted(str(path.relative_to(session)) for path in found)
            print(f"\n{source.stem}: {time.time() - start:.0f} s, {'FAIL' if findings else 'ok'}; {', '.join(inputs)}")
            if findings:
                raise Stop(f"{source.stem} on a simulated Kaggle: {' '.join(findings)}")
            print(last_words(session / "working" / "__notebook__.ipynb"), flush=True)
            outputs[slug(source.stem)] = session / "working"
        print(f"\n{len(chosen)} notebooks, {time.time() - begin:.0f} s")


def assigned(pairs):
    """{name: value} of NAME=VALUE pairs: literals, else words; raises Stop for anything else."""
    values = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found:
            raise Stop(f"--set {pair} is not NAME=VALUE.")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value  # a word
    return values


def carry_out(options):
    if options.command == "run":
        run(options.names)
    elif options.command == "dataset":
        metadata = dataset_folder(options.target, owner_of(options.owner), options.attach)
        print(f"{options.target}: {metadata['id']}; next: kaggle datasets create -p {options.target} --dir-mode zip")
    else:
        values = assigned(options.set)
        metadata = push_folder(options.notebook, options.target, owner_of(options.owner), options.offline, values)
        print(f"{options.target}: {metadata['id']}; next: kaggle kernels push -p {options.target}")


def main(arguments=None):
    if sys.argv[1:2] == ["enter"] and arguments is None:
        enter(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("names", nargs="*", help="parts of names (the whole series if there are none)")
    for name in ("push-folder", "dataset"):
        one = commands.add_parser(name)
        if name == "push-folder":
            one.add_argument("notebook", help="part of a notebook's name")
            one.add_argument("--offline", action="store_true", help="a session without internet")
            one.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter's value")
        else:
            one.add_argument("--attach", action="append", default=[], metavar="FOLDER", help="a folder to pack")
        one.add_argument("target", help="a folder to make")
        one.add_argument("--owner", help="your Kaggle user name (default: KAGGLE_USERNAME)")
    options = parser.parse_args(arguments)
    return exit_code(lambda: carry_out(options))


if __name__ == "__main__":
    sys.exit(main())
