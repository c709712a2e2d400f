"""Every notebook under nbs/ is a test: its cells run, in order, in a process of its own and in a copy of the repository
that they must leave as it was."""
import json, os, shutil, signal, subprocess, sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, copy_repository

NOTEBOOKS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").rglob("*.ipynb")
                   if not any(part[0] in "._" for part in path.relative_to(ROOT).parts))
LIMIT = 600  # seconds; a notebook takes under 20, this only ends one that hangs

# A process that has imported what is not of this package, and forks for each notebook: the imports take longer than
# most notebooks do. It ends when nobody writes to it any more.
FORKS = """
import json, os, signal, sys
from pathlib import Path
import matplotlib.figure, matplotlib.backends.backend_agg, numpy, pandas, scipy.special, torch, torch._dynamo
from nbdev.test import test_nb
if os.path.isdir("/proc/self/task"): assert len(os.listdir("/proc/self/task")) == 1, "threads are lost in a fork"
assert "litvae" not in sys.modules
for line in sys.stdin:
    folder, notebook, skipped, printed, limit = json.loads(line)
    child = os.fork()
    if child == 0:
        for number in (1, 2): os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = folder
        sys.path.insert(1, folder)
        numpy.random.seed()
        signal.alarm(limit)
        sys.exit(not test_nb(Path(folder, notebook), skip_flags=skipped, basepath=folder)[0])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def forks():
    "The process of this worker that forks for each notebook."
    return subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            cwd=ROOT)


def skip_flags():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["tst_flags"]


def run_notebook(folder, notebook, printed):
    "Run `folder/notebook` as nbdev_test does; returns (passed, everything it printed, also into the file `printed`)."
    process = forks()
    process.stdin.write(json.dumps([str(folder), str(notebook), skip_flags().split(), str(printed), LIMIT]) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer: return False, f"the process that forks ended with {process.wait()}"
    if int(answer) == -signal.SIGALRM: return False, f"{notebook} was still running after {LIMIT} s"
    return int(answer) == 0, printed.read_text(encoding="utf-8", errors="replace") if printed.exists() else ""


def files_of(folder):
    "Path -> size and time of all files, but Python's own."
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def shared_copy(tmp_path_factory):
    "A copy of the repository for all notebooks of this worker, each of which must leave it as it was."
    folder = tmp_path_factory.mktemp("shared")
    yield folder / "copy"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook, shared_copy, tmp_path):
    copy = shared_copy if shared_copy.exists() else copy_repository(shared_copy)
    cells = json.loads((copy / notebook).read_text(encoding="utf-8"))["cells"]
    off = [cell for cell in cells if cell["cell_type"] == "raw" and "skip_exec" in "".join(cell["source"])]
    assert not off, f"{notebook} switches its own test off (skip_exec)"
    before = files_of(copy)
    passed, printed = run_notebook(copy, notebook, tmp_path / "printed.txt")
    changed = sorted(name for name, _ in before.items() ^ files_of(copy).items())
    if changed or not passed: shutil.rmtree(copy)
    if not passed: pytest.fail(f"{notebook}\n{printed[-12000:]}", pytrace=False)
    assert not changed, f"{notebook} changes files of the repository (use a temporary folder): {changed[:10]}"


def test_a_failing_cell_fails_the_test_and_shows_where(tmp_path, repository_copy):
    copy = repository_copy("settings.ini", "litvae")
    source = {"good": "value = 2", "skipped": "#| cuda\nraise SystemError",
              "bad": "assert value == 3, 'two is not three'"}
    cells = [{"cell_type": "code", "id": name, "metadata": {}, "outputs": [], "execution_count": None, "source": text}
             for name, text in source.items()]
    kernel = {"name": "python3", "language": "python", "display_name": "python3"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (copy / "nbs").mkdir()
    path = copy / "nbs" / "broken.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    passed, printed = run_notebook(copy, "nbs/broken.ipynb", tmp_path / "bad.txt")
    assert not passed and "two is not three" in printed and "broken.ipynb" in printed and "SystemError" not in printed
    notebook["cells"] = cells[:2]
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert run_notebook(copy, "nbs/broken.ipynb", tmp_path / "good.txt")[0]


def test_there_are_notebooks():
    assert NOTEBOOKS, "no notebook was found under nbs/"
