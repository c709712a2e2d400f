"The wheel holds the package and nothing else, and works where only its runtime requirements are installed."
import os, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from email.parser import Parser

import pytest
from conftest import ROOT, copy_repository, once

# What people have who write notebooks, and users of the models do not: importing it fails in the processes below.
BLOCKED = ("nbdev fastcore execnb ghapi papermill nbclient nbformat nbconvert IPython ipykernel ipywidgets jupyterlab "
           "jupyter_client jupyter_core sklearn snakemake sphinx myst_nb pytest").split()

BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {set(BLOCKED)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by the test)", name=name)
sys.meta_path.insert(0, Block())
"""


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def wheel():
    "The wheel, built from a copy of the repository, and unpacked into site/ beside it."
    def make(folder):
        copy = copy_repository(folder / "copy")
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
        done = subprocess.run([*command, "-w", str(folder), str(copy)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        shutil.rmtree(copy)
        (path,) = folder.glob("*.whl")
        with zipfile.ZipFile(path) as archive: archive.extractall(folder / "site")
    (path,) = once("wheel", make).glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel):
    return wheel.parent / "site"


def run(site, code):
    "Run `code` with the unpacked wheel in front of everything else and the tools of the notebooks blocked."
    done = subprocess.run([sys.executable, "-c", BLOCK + code], cwd=site.parent, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive: names = {name for name in archive.namelist() if ".dist-info/" not in name}
    kept = {".py", ".cu", ".cuh", ".cpp"}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "litvae").rglob("*") if path.suffix in kept}
    assert names == expected
    assert wheel.name == f"litvae-{settings()['version']}-py3-none-any.whl"


def test_the_metadata_is_that_of_settings(wheel):
    from packaging.requirements import Requirement
    with zipfile.ZipFile(wheel) as archive:
        (info,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        folder = info.rpartition("/")[0]
        text, entry_points = archive.read(info).decode(), archive.read(f"{folder}/entry_points.txt").decode()
        assert any(name.startswith(folder) and name.endswith("LICENSE") for name in archive.namelist())
    meta = Parser().parsestr(text)
    always = {Requirement(line) for line in meta.get_all("Requires-Dist") if "extra ==" not in line}
    assert always == {Requirement(word) for word in settings()["requirements"].split()}
    assert set(meta.get_all("Provides-Extra")) == {"reproduce", "cluster", "metrics", "dev"}
    assert meta["Requires-Python"] == ">=3.11" and "Apache-2.0" in (meta["License"] or meta["License-Expression"])
    assert meta.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert "litvae=litvae.reproduce.cli:main" in entry_points.replace(" ", "")


def test_every_module_imports_without_the_tools_of_the_notebooks(unpacked):
    out = run(unpacked, """
import importlib, pkgutil, litvae
assert litvae.__file__.startswith(sys.path[1]), (litvae.__file__, sys.path)
names = [module.name for module in pkgutil.walk_packages(litvae.__path__, "litvae.")]
for name in names: importlib.import_module(name)
print(len(names))
""")
    assert int(out) == len(list((ROOT / "litvae").rglob("*.py"))) - 1


def test_the_blocking_is_real(unpacked):
    with pytest.raises(AssertionError, match="blocked by the test"): run(unpacked, "import litvae, nbdev")


def test_importing_litvae_loads_nothing_heavy(unpacked):
    out = run(unpacked, """
import litvae
heavy = {"torch", "torchvision", "numpy", "pandas", "matplotlib", "scipy"}
print(sorted({name.split(".")[0] for name in sys.modules} & heavy))
""")
    assert out.strip() == "[]"


@pytest.mark.parametrize("module", ["litvae.core.runs", "litvae.genesis", "litvae.data"])
def test_training_does_not_load_what_draws(unpacked, module):
    "A worker that trains starts quickly: pictures and tables are loaded by those who draw."
    out = run(unpacked, f"""
import {module}
print(sorted(set(sys.modules) & {{"matplotlib.pyplot", "seaborn", "torchvision"}}))
""")
    assert out.strip() == "[]"


def test_the_command_line_starts_without_them(unpacked):
    if not (ROOT / "litvae/reproduce/cli.py").exists(): pytest.skip("no command line yet")
    out = run(unpacked, """
from litvae.reproduce.cli import main
sys.argv = ["litvae", "--help"]
try: main()
except SystemExit as end: assert not end.code
""")
    assert all(word in out for word in ("train", "reproduce", "data", "report"))
