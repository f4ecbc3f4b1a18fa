"""Make the virtual environment .venv that everything else runs in.

Run by `make env` with any Python 3: the standard library is enough, and the file parses on old versions so
that it can say that they are too old. Each failure is one sentence on stderr and exit code 2.

A stamp in .venv holds a hash of the requirements, the constraints and the Python version. It is written last,
so an installation that was interrupted, or one that is out of date, is made anew by the next `make`.
"""

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "asnn-stamp")
LOG = os.path.join(VENV, "install.log")
REQUIREMENTS = os.path.join(ROOT, "requirements.txt")
CONSTRAINTS = os.path.join(ROOT, ".ci", "constraints.txt")

OLDEST, NEWEST = (3, 11), (3, 13)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DISK_GB = {"cpu": 4, "cuda": 10}  # free space wanted; the finished .venv is smaller, downloads need room too
# An older pip downloads a whole wheel, gigabytes for CUDA, to learn what it requires.
PIP_READS_METADATA = (23, 2)


class Stop(Exception):
    """A reason, in one sentence, why no environment can be made."""


def say(text):
    print(text, flush=True)


# ---- what is checked before anything is written --------------------------------------------------


def check_python(version):
    """Refuse a Python outside the tested range; `version` is like sys.version_info."""
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        raise Stop(
            "Python {} was found, but 3.11, 3.12 or 3.13 is needed: PYTHON=python3.12 make run, for example, "
            "selects another one.".format(".".join(str(part) for part in version[:3]))
        )


def check_venv(version, find_spec=importlib.util.find_spec):
    """Refuse a Python without what makes virtual environments, a package of its own on Debian and Ubuntu."""
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        raise Stop(
            "this Python has no venv and ensurepip modules: on Debian or Ubuntu, apt-get install "
            f"python3-venv (or python{version[0]}.{version[1]}-venv for this very version) adds them."
        )


def check_space(free_bytes, needed_gb):
    """Refuse a disk that the environment would fill."""
    if free_bytes < needed_gb * 1e9:
        raise Stop(
            f"the environment needs {needed_gb} GB of free disk space, but the project's disk has "
            f"{free_bytes / 1e9:.1f} GB free."
        )


def has_gpu():
    """Whether nvidia-smi lists a GPU that works."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=15
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and b"GPU " in found.stdout


# ---- the stamp -----------------------------------------------------------------------------------


def stamp_text(version):
    """What the stamp of an up-to-date environment says."""
    digest = hashlib.sha256()
    for path in (REQUIREMENTS, CONSTRAINTS):
        with open(path, "rb") as file:
            digest.update(file.read())
    return f"{digest.hexdigest()} python{version[0]}.{version[1]}\n"


def is_current(text):
    """Whether .venv was completed with this stamp and its Python is still there."""
    try:
        with open(STAMP) as file:
            return file.read() == text and os.path.exists(venv_python())
    except OSError:
        return False


def write_stamp(text):
    """Write the stamp in one step: it is there whole or not at all."""
    with open(STAMP + ".new", "w") as file:
        file.write(text)
    os.replace(STAMP + ".new", STAMP)


# ---- pip -----------------------------------------------------------------------------------------


def venv_python():
    return os.path.join(VENV, "bin", "python")


def run_logged(command, beat=False):
    """Run a command with its output in the log; return its exit code. With beat, say that it goes on."""
    start = time.time()
    with open(LOG, "a") as log:
        log.write("\n$ {}\n".format(" ".join(command)))
        log.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
        )
        try:
            while True:
                try:
                    return process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    if beat:
                        say(f"  ... {time.time() - start:.0f} s")
        except BaseException:
            process.kill()
            raise


def pip(*arguments, **options):
    """Run pip in .venv; return its exit code."""
    command = [venv_python(), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    extra = shlex.split(os.environ.get("ASNN_PIP_ARGS", "")) if arguments[0] == "install" else []
    return run_logged(command + list(arguments) + extra, **options)


def reason(text):
    """What went wrong in the last command of a log, in a few words."""
    text = text[text.rfind("\n$ ") + 1 :]
    if re.search(r"No space left on device", text):
        return "the disk is full"
    if re.search(r"ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|connection broken", text):
        return "the package index could not be reached"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # pip follows the error that tells something with one that names a page of its documentation.
    errors = [line for line in lines if line.startswith("ERROR") and "ResolutionImpossible" not in line]
    return (errors or lines or ["no message"])[-1][:300].rstrip(".")


def failure(doing):
    """The Stop for a command that failed."""
    with open(LOG, errors="replace") as log:
        why = reason(log.read())
    return Stop(f"{doing} failed: {why} (the whole log is {os.path.relpath(LOG, ROOT)}).")


def dry_run(*arguments):
    """pip's report on what `pip install` would do with these arguments, or None if it finds no solution."""
    path = os.path.join(VENV, "report.json")
    code = pip("install", "--dry-run", "--ignore-installed", "--quiet", "--report", path, *arguments)
    if code != 0 or not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    os.remove(path)
    return report


# ---- which torch ---------------------------------------------------------------------------------


def is_cuda(name):
    return re.match(r"(nvidia|cuda)[-_.]", name, re.IGNORECASE) is not None


def cuda_packages(report):
    """The CUDA packages that the installation of a pip report would bring."""
    return sorted(item["metadata"]["name"] for item in report["install"] if is_cuda(item["metadata"]["name"]))


def asks_for_cuda(report):
    """Whether a wheel of the report, taken without its dependencies, is a build that wants CUDA packages."""
    wanted = [name for item in report["install"] for name in item["metadata"].get("requires_dist", [])]
    return any(is_cuda(name) for name in wanted)


def check_no_cuda(report, allowed):
    """Refuse the gigabytes of a CUDA build on a machine that cannot use it."""
    if cuda_packages(report) and not allowed:
        raise Stop(
            "without an NVIDIA GPU a CPU build of torch is wanted, but only a CUDA build (several GB) was "
            "found: ASNN_ALLOW_CUDA=1 make run accepts it."
        )


def torch_pin():
    """The line torch==... of the constraints."""
    with open(CONSTRAINTS) as file:
        return re.search(r"^torch==\S+", file.read(), re.MULTILINE).group()


def answers(url, seconds=5):
    """Whether the address answers in time (in a thread, since a name look-up obeys no timeout)."""
    result = []

    def ask():
        try:
            with urllib.request.urlopen(url, timeout=seconds) as reply:
                result.append(reply.status == 200)
        except Exception:  # whatever goes wrong, the address is of no use
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(result and result[0])


def pip_version():
    """The version of .venv's pip as numbers."""
    text = subprocess.check_output([venv_python(), "-m", "pip", "--version"]).decode()
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def install_cpu_torch():
    """Install the CPU build of torch, or settle that an ordinary installation brings no CUDA."""
    pin = torch_pin()
    # A wheel in a place that pip is configured to look into costs no download.
    sources = [("a local wheel", lambda: True, ["--no-index"])]
    sources += [("the PyTorch CPU index", lambda: answers(CPU_INDEX + "/torch/"), ["--index-url", CPU_INDEX])]
    for name, there, arguments in sources:
        if not there():
            continue
        report = dry_run("--no-deps", pin, *arguments)
        if report and not asks_for_cuda(report):
            say(f"installing {pin} from {name} ...")
            if pip("install", "--no-deps", pin, *arguments, beat=True) != 0:
                raise failure("installing torch")
            return
    # The ordinary index has CPU builds for some systems (macOS, for example), CUDA builds for others.
    if pip_version() < PIP_READS_METADATA and pip("install", "--upgrade", "pip") != 0:
        raise failure("updating pip")
    report = dry_run(pin, "-c", CONSTRAINTS)
    if report is None:
        raise failure("looking for torch")
    check_no_cuda(report, allowed=cuda_allowed())


def cuda_allowed():
    return os.environ.get("ASNN_ALLOW_CUDA") == "1"


# ---- all of it -----------------------------------------------------------------------------------


def make(version):
    """Make .venv from nothing."""
    start = time.time()
    check_venv(version)
    gpu = has_gpu()
    kind = "cuda" if gpu or cuda_allowed() else "cpu"
    shutil.rmtree(VENV, ignore_errors=True)  # before the space is looked at: it may hold an environment
    check_space(shutil.disk_usage(ROOT).free, DISK_GB[kind])
    say("making .venv with Python {} ...".format(".".join(str(part) for part in version[:3])))
    os.makedirs(VENV)
    if run_logged([sys.executable, "-m", "venv", VENV]) != 0:
        raise failure("making the virtual environment")
    if not gpu:
        install_cpu_torch()
    size = "about 7 GB" if kind == "cuda" else "about 1.6 GB"
    say(f"installing the requirements ({size} on disk) ...")
    if pip("install", "-r", REQUIREMENTS, "-c", CONSTRAINTS, beat=True) != 0:
        raise failure("installing the requirements")
    write_stamp(stamp_text(version))
    say(f".venv is ready ({time.time() - start:.0f} s)")


def main(version=sys.version_info):
    try:
        check_python(version)
        if not is_current(stamp_text(version)):
            make(version)
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: .venv could not be made: {error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the next make starts the environment anew.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
