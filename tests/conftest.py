"What all tests share: a private home for every tool, the root of the repository, and copies of it."
import os, shutil, tempfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent

# Nothing of the user's may change a result, and no test may change anything of the user's: caches, data, Jupyter and
# IPython profiles all live in one temporary folder. The first process makes it; workers and grandchildren inherit it.
_made_here = None
if "LITVAE_TEST_HOME" not in os.environ:
    _made_here = tempfile.mkdtemp(prefix="litvae-test-")
    os.environ["LITVAE_TEST_HOME"] = _made_here
_home = Path(os.environ["LITVAE_TEST_HOME"])
for _variable, _folder in {
    "LITVAE_DATA": "data", "XDG_CACHE_HOME": "cache", "MPLCONFIGDIR": "matplotlib", "IPYTHONDIR": "ipython",
    "JUPYTER_CONFIG_DIR": "jupyter/config", "JUPYTER_DATA_DIR": "jupyter/data",
    "JUPYTER_RUNTIME_DIR": "jupyter/runtime",
}.items():
    (_home / _folder).mkdir(parents=True, exist_ok=True)
    os.environ[_variable] = str(_home / _folder)
os.environ.update(MPLBACKEND="Agg", OMP_NUM_THREADS="1", JUPYTER_PLATFORM_DIRS="1", PYDEVD_DISABLE_FILE_VALIDATION="1")


def pytest_unconfigure(config):
    if _made_here and not hasattr(config, "workerinput"): shutil.rmtree(_made_here, ignore_errors=True)


def pytest_collection_modifyitems(items):
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting: return
    import torch
    if torch.cuda.is_available(): return
    for item in wanting: item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def once(name, make):
    "The folder that `make(folder)` fills, called by the first of all parallel workers that asks and by no other."
    folder = _home / "once" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            work = Path(tempfile.mkdtemp(dir=folder.parent))
            make(work)
            work.rename(folder)
    return folder


def copy_repository(target, *names):
    "Copy the named parts of the repository (default: all that a notebook can see) to `target`; returns it."
    names = names or ("nbs", "litvae", "reproduce", "figures", "settings.ini", "setup.py", "pyproject.toml",
                      "constraints.txt", "README.md", "STYLE.md", "LICENSE", "Makefile")
    target.mkdir(parents=True, exist_ok=True)
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".*.tmp.*")
    for name in names:
        source = ROOT / name
        if source.is_dir(): shutil.copytree(source, target / name, ignore=ignore)
        elif source.exists(): shutil.copy2(source, target / name)
    return target


@pytest.fixture(scope="session")
def root():
    "The root of the repository; tests only read it."
    return ROOT


@pytest.fixture
def repository_copy(tmp_path):
    "A function that copies parts of the repository into the test's own folder and returns that."
    yield lambda *names: copy_repository(tmp_path / "copy", *names)
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
