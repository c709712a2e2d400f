"Every notebook under nbs/ is a test: its cells run, in order, in a process and a copy of the repository of its own."
import json, os, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").rglob("*.ipynb")
                   if not any(part[0] in "._" for part in path.relative_to(ROOT).parts))
LIMIT = 600  # seconds; a notebook takes under 20, this only ends one that hangs

RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
passed, _ = test_nb(Path(sys.argv[1]), skip_flags=sys.argv[2].split(), basepath=sys.argv[3])
sys.exit(not passed)
"""


def skip_flags():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["tst_flags"]


def run_notebook(folder, notebook):
    "Run `folder/notebook` as nbdev_test does; returns (passed, everything it printed)."
    env = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", RUN, str(folder / notebook), skip_flags(), str(folder)]
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return False, f"{notebook} was still running after {LIMIT} s"
    return done.returncode == 0, done.stdout + done.stderr


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook, repository_copy):
    copy = repository_copy()
    cells = json.loads((copy / notebook).read_text(encoding="utf-8"))["cells"]
    off = [cell for cell in cells if cell["cell_type"] == "raw" and "skip_exec" in "".join(cell["source"])]
    assert not off, f"{notebook} switches its own test off (skip_exec)"
    before = files_of(copy)
    passed, printed = run_notebook(copy, notebook)
    if not passed: pytest.fail(f"{notebook}\n{printed[-12000:]}", pytrace=False)
    left = sorted(files_of(copy) - before)
    assert not left, f"{notebook} leaves files in the repository (use a temporary folder): {left[:10]}"


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
    passed, printed = run_notebook(copy, Path("nbs/broken.ipynb"))
    assert not passed and "two is not three" in printed and "broken.ipynb" in printed and "SystemError" not in printed
    notebook["cells"] = cells[:2]
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert run_notebook(copy, Path("nbs/broken.ipynb"))[0]


def test_there_are_notebooks():
    assert NOTEBOOKS, "no notebook was found under nbs/"
