"The repository is what it claims to be; and each check is shown to fail on a copy that was broken on purpose."
import json, os, re, shlex, subprocess, sys
from pathlib import Path

import pytest
import repository
from conftest import ROOT


def passes(complaints):
    assert not complaints, "\n" + "\n".join(complaints)


def reports(complaints, *words):
    assert any(all(word in line for word in words) for line in complaints), f"no complaint with {words} in {complaints}"


def edit_cell(path, number, **changes):
    notebook = repository.read(path)
    notebook["cells"][number].update(changes)
    path.write_text(json.dumps(notebook, indent=1) + "\n", encoding="utf-8")


def small_notebook(path, *cells, **metadata):
    "Write a valid notebook whose cells are (type, source, tags...)."
    made = [{"cell_type": kind, "id": f"c{n}", "metadata": {"tags": tags} if tags else {}, "source": text}
            | ({"outputs": [], "execution_count": None} if kind == "code" else {})
            for n, (kind, text, *tags) in enumerate(cells)]
    metadata = metadata or {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path


# ------------------------------------------------------------------------------------------------------- in sync
def test_the_package_is_what_the_notebooks_export():
    passes(repository.out_of_sync(ROOT))


def test_an_edited_module_is_reported(repository_copy):
    copy = repository_copy("settings.ini", "nbs", "litvae")
    with open(copy / "litvae/core/files.py", "a") as file: file.write("\n# by hand\n")
    reports(repository.out_of_sync(copy), "litvae/core/files.py", "differs")


def test_an_edited_a_stale_and_a_missing_module_are_reported(repository_copy):
    copy = repository_copy("settings.ini", "nbs", "litvae")
    (copy / "litvae/core/stale.py").write_text("")
    (copy / "litvae/core/files.py").unlink()
    path = next(path for path in repository.notebooks(copy, "nbs/core") if path.name != "00_files.ipynb")
    cells = repository.read(path)["cells"]
    number = next(n for n, cell in enumerate(cells) if repository.source(cell).startswith("#| export\n"))
    edit_cell(path, number, source=repository.source(cells[number]) + "\n# not exported yet")
    complaints = repository.out_of_sync(copy)
    reports(complaints, "stale.py", "no notebook")
    reports(complaints, "files.py", "missing")
    reports(complaints, "differs")


# --------------------------------------------------------------------------------------------------------- clean
def test_the_notebooks_are_clean():
    passes(repository.unclean(ROOT))


def test_dirty_notebooks_are_reported(repository_copy):
    copy = repository_copy("settings.ini", "nbs")
    path = copy / "nbs/core/00_files.ipynb"
    number = next(n for n, cell in enumerate(repository.read(path)["cells"]) if cell["cell_type"] == "code")
    edit_cell(path, number, execution_count=7)
    mine = {"display_name": "mine", "language": "python", "name": "mine"}
    small_notebook(copy / "reproduce/paper/a.ipynb", ("code", "1"), kernelspec=mine)
    (copy / "reproduce/paper/b.ipynb").write_text("{}")
    edit_cell(small_notebook(copy / "reproduce/paper/c.ipynb", ("code", "1")), 0, execution_count=1)
    complaints = repository.unclean(copy)
    reports(complaints, "nbs/core/00_files.ipynb", "not clean")
    reports(complaints, "reproduce/paper/a.ipynb", "'mine'")
    reports(complaints, "reproduce/paper/b.ipynb", "not a valid notebook")
    reports(complaints, "reproduce/paper/c.ipynb", "not clean")


# ---------------------------------------------------------------------------------------------------- parameters
def test_the_notebooks_of_the_papers_have_their_parameters():
    passes(repository.lost_parameters(ROOT))


@pytest.mark.parametrize("cells, words", [
    ([("code", "seed = 0")], "0 cells"),
    ([("code", "seed = 0", "parameters"), ("code", "n = 1", "parameters")], "2 cells"),
    ([("markdown", "seed = 0", "parameters")], "not a code cell"),
    ([("markdown", "text")] * 6 + [("code", "seed = 0", "parameters")], "near the top"),
    ([("code", "import os\nseed = 0", "parameters")], "import os"),
    ([("code", "out = str(1)", "parameters")], "out = str(1)"),
    ([("code", "a, b = 1, 2", "parameters")], "a, b = "),
    ([("code", "seed = ", "parameters")], "does not parse"),
    ([("code", "# nothing", "parameters")], "sets nothing"),
])
def test_lost_parameters_are_reported(cells, words, tmp_path):
    small_notebook(tmp_path / "reproduce/paper/table.ipynb", *cells)
    reports(repository.lost_parameters(tmp_path), "reproduce/paper/table.ipynb", words)


def test_good_parameters_pass(tmp_path):
    small_notebook(tmp_path / "reproduce/paper/table.ipynb", ("markdown", "# Table"),
                   ("code", "seeds = [0, 1]  # which\npreset = 'quick'\nsize: int = -1\nout = None", "parameters"))
    passes(repository.lost_parameters(tmp_path))


def test_pages_and_notebooks_agree():
    passes(repository.wrong_pages(ROOT))


def test_wrong_pages_are_reported(tmp_path):
    for name in ("table", "spare"):
        small_notebook(tmp_path / f"reproduce/paper/{name}.ipynb", ("code", "seed = 0", "parameters"))
    (tmp_path / "reproduce/paper/pages.yaml").write_text(
        "pages:\n  a: {file: table.ipynb, parameters: {seed: 1}}\n"
        "  b: {file: table.ipynb, parameters: {sede: 1}}\n  c: {file: lost.ipynb}\n")
    complaints = repository.wrong_pages(tmp_path)
    for words in ("b sets ['sede']", "c names lost.ipynb", "no page uses spare.ipynb"): reports(complaints, words)
    assert len(complaints) == 3


def test_a_tag_lost_by_cleaning_would_be_noticed(repository_copy):
    "settings.ini keeps the tag through nbdev_clean; without that key the check above would fail."
    copy = repository_copy("settings.ini")
    small_notebook(copy / "reproduce/paper/table.ipynb", ("code", "seed = 0", "parameters"))
    assert not repository.nbdev(copy, "nbdev_clean(fname='reproduce')") and not repository.lost_parameters(copy)
    settings = (copy / "settings.ini").read_text()
    settings = re.sub(r"(?m)^allowed_cell_metadata_keys.*$", "allowed_cell_metadata_keys =", settings)
    (copy / "settings.ini").write_text(settings)
    repository.nbdev(copy, "nbdev_clean(fname='reproduce')")
    reports(repository.lost_parameters(copy), "0 cells")


# -------------------------------------------------------------------------------------------------------- floors
def test_imports_follow_the_floors():
    passes(repository.floor_violations(ROOT))


@pytest.mark.parametrize("module, line, words", [
    ("core/low.py", "from ..genesis.model import x", ["litvae.core.low", "litvae.genesis.model", "above"]),
    ("core/low.py", "import litvae.reproduce.plan", ["litvae.reproduce.plan", "above"]),
    ("core/low.py", "def later():\n    from litvae.data import load", ["litvae/core/low.py:2", "above"]),
    ("meme/model.py", "from ..genesis.model import x", ["another chapter"]),
    ("kernels/op.py", "from ..core import low", ["litvae.core.low", "above"]),
    ("core/low.py", "from .high import x", ["circle", "litvae.core.high -> litvae.core.low"]),
    ("lobby/door.py", "", ["litvae.lobby", "without a floor"]),
    ("__init__.py", "import torch", ["must load nothing", "torch"]),
    ("__init__.py", "from .core import low", ["must load nothing", "litvae.core.low"]),
    ("core/low.py", "import networkx.algorithms", ["networkx", "requirements"]),
    ("core/low.py", "def f():\n    import papermill", ["must not import papermill"]),
    ("reproduce/plan.py", "import nbformat", ["nbformat", "into a function"]),
])
def test_imports_against_the_floors_are_reported(tmp_path, module, line, words):
    good = {
        "__init__.py": "", "kernels/op.py": "import torch", "core/low.py": "import torch\n",
        "core/high.py": "from . import low\nfrom .low import y\n", "data/__init__.py": "from ..core.high import x",
        "genesis/model.py": "from litvae.core import low, high", "meme/model.py": "",
        "reproduce/plan.py": "from ..genesis import model\ndef run():\n    import papermill\n",
    }
    for name, text in good.items():
        path = tmp_path / "litvae" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    passes(repository.floor_violations(tmp_path))
    (tmp_path / "litvae" / module).parent.mkdir(exist_ok=True)
    (tmp_path / "litvae" / module).write_text(line + "\n")
    complaints = repository.floor_violations(tmp_path)
    reports(complaints, *words)


# ------------------------------------------------------------------------------------------------------- hygiene
def test_nothing_is_oversized():
    passes(repository.oversized(ROOT))


def test_no_text_belongs_to_one_machine():
    passes(repository.unwanted_text(ROOT))


def test_chapters_are_well_formed():
    passes(repository.badly_formed_chapters(ROOT))


def test_bad_hygiene_is_reported(tmp_path):
    home = "/" + "home/somebody/data"
    (tmp_path / "big.bin").write_bytes(bytes(repository.MAX_FILE + 1))
    (tmp_path / "wide.py").write_text("x = '" + "a" * repository.MAX_LINE + "'\n")
    (tmp_path / "mine.md").write_text(f"look into {home}\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/ignored.md").write_text(home)
    path = small_notebook(tmp_path / "nbs/core/bare.ipynb", ("markdown", "# One\n\n> summary"),
                          ("code", "#| default_exp core.bare"), ("code", "\n".join("x" * 41)), ("markdown", "# Two"),
                          ("code", "print(x)"), ("code", "raise " + "NotImplemented" + "Error"))
    complaints = repository.oversized(tmp_path) + repository.unwanted_text(tmp_path)
    complaints += repository.badly_formed_chapters(tmp_path)
    reports(complaints, "big.bin", "limit is 1000 kB")
    reports(complaints, "wide.py:1", "columns")
    reports(complaints, "mine.md", home)
    reports(complaints, "bare.ipynb cell c2", "41 lines")
    reports(complaints, "bare.ipynb", "without outputs")
    reports(complaints, "bare.ipynb", "and only it")
    reports(complaints, "bare.ipynb", "the last cell")
    reports(complaints, "bare.ipynb cell c5", "unfinished")
    assert not any("ignored.md" in line for line in complaints)
    temporary = "/" + "tmp/tmpab12cd/a.json"
    edit_cell(path, 2, outputs=[{"output_type": "stream", "name": "stdout", "text": [f"{temporary} is damaged\n"]},
                                {"output_type": "error", "ename": "E", "evalue": "e", "traceback": []}])
    reports(repository.unwanted_text(tmp_path), "bare.ipynb cell c2", temporary)
    reports(repository.badly_formed_chapters(tmp_path), "bare.ipynb", "with an error")


def test_files_are_found_with_and_without_git(tmp_path):
    (tmp_path / ".gitignore").write_text("build/\n")
    for name in ("a.md", "build/b.md", "nbs/data/c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    names = lambda: [path.relative_to(tmp_path).as_posix() for path in repository.files(tmp_path)]
    assert names() == [".gitignore", "a.md", "nbs/data/c.md"]
    if subprocess.run(["git", "init", "-q", str(tmp_path)], capture_output=True).returncode == 0:
        assert names() == [".gitignore", "a.md", "nbs/data/c.md"]


# ------------------------------------------------------------------------------------- one place for each setting
def test_environments_agree_with_settings():
    "environment.yml repeats the pins of nbdev and its companions; constraints.txt admits every requirement."
    import yaml
    from packaging.requirements import Requirement
    lines = dict(line.split(" = ", 1) for line in (ROOT / "settings.ini").read_text().splitlines() if " = " in line)
    pinned = {word for word in lines["dev_requirements"].split() if "==" in word}
    pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert pinned <= set(pip) and "-c constraints.txt" in pip and "-e .[dev,reproduce,cluster,metrics]" in pip
    lines_of_constraints = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").split()
    versions = dict(line.split("==") for line in lines_of_constraints)
    for key in ("requirements", "reproduce_requirements", "cluster_requirements", "metrics_requirements",
                "dev_requirements"):
        for word in lines[key].split():
            wanted = Requirement(word)
            assert wanted.name.lower() in versions, f"constraints.txt does not pin {wanted.name}"
            assert versions[wanted.name.lower()] in wanted.specifier, f"constraints.txt goes against {word}"


# -------------------------------------------------------------------------------------------------------- README
# Every command that README.md shows, as a regular expression for the whole line, and the test file that covers it.
COVERED = {
    r"git clone \S+( \S+)?": None,  # nothing of ours
    r"cd \S+": None,
    r"make|make help|make env|make lab|make clean|make export|make clean-notebooks": "test_setup.py",
    r"make docs": "test_docs.py",
    r"make kernels|make gpu": "test_setup.py",
    r"make test( (JOBS=\d+|ARGS=.+))*": "test_setup.py",
    r"make (reproduce|figures)( (PRESET|PAPER|JOBS)=\w+)*": "test_setup.py",
    r"pip install -c constraints\.txt \.": "test_packaging.py",
    r"export LITVAE_DATA=\S+": None,
    r"litvae (train|reproduce) --(sweep|paper) \w+ --preset smoke( --jobs \d+)?": "test_reproduce.py",
    r"litvae report --preset smoke": "test_reproduce.py",
    r"litvae segment --run \S+ --data \w+ --n \d+": "test_reproduce.py",
    r"litvae data": "test_repository.py",  # the three below are run by test_commands_of_the_readme_answer
    r"litvae data multi_dsprites --source real --split \w+": "test_repository.py",
    r"litvae train --sweep \w+ --preset paper --list": "test_repository.py",
}


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "STYLE.md"])
def test_links_lead_somewhere(name):
    passes(repository.broken_links(ROOT, name))


def test_commands_of_the_readme_are_covered():
    passes([f"COVERED names tests/{name}, which does not exist" for name in sorted(set(COVERED.values()) - {None})
            if not (ROOT / "tests" / name).exists()])
    passes(repository.uncovered_commands(readme(), COVERED))


def test_commands_of_the_readme_are_understood():
    "In code blocks, tables and running text alike."
    from litvae.reproduce.cli import parser
    shown = [command for command in repository.commands(readme()) if command.startswith("litvae ")]
    shown += re.findall(r"`(litvae (?:train|reproduce|data|report)[^`]*)`", readme())
    for command in shown:
        try: parser().parse_args(shlex.split(command)[1:])
        except SystemExit as stop: assert stop.code == 0, f"litvae does not understand README.md's `{command}`"


@pytest.mark.parametrize("arguments, code, words", [
    ("data", 0, "multi_dsprites"),
    ("data multi_dsprites --source real --split validation", 1, "no real files in"),
    ("train --sweep reconstruction_bottlenecks --preset paper --list", 0, "steps"),
])
def test_commands_of_the_readme_answer(arguments, code, words, tmp_path):
    done = subprocess.run([sys.executable, "-c", "from litvae.reproduce.cli import main; raise SystemExit(main())",
                           *arguments.split()], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "LITVAE_DATA": str(tmp_path)})
    assert done.returncode == code and words in done.stdout + done.stderr, done.stdout + done.stderr
    if code: assert "Traceback" not in done.stderr and done.stderr.startswith("litvae: ")


def test_snippets_of_the_readme_run(tmp_path):
    for snippet in repository.fenced(readme(), "python"):
        done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
        assert done.returncode == 0, f"{snippet}\n{done.stdout}{done.stderr}"


def test_a_bad_readme_is_reported(tmp_path):
    text = ("# Title\n[gone](no/such.md) [here](#title) [lost](#lost) ![picture](no.png)\n"
            "```bash\n$ make test JOBS=2  # fine\nmake reproduce \\\n  PRESET=smoke && rm -rf everything\n```\n")
    (tmp_path / "README.md").write_text(text)
    complaints = repository.broken_links(tmp_path) + repository.uncovered_commands(text, COVERED)
    for word in ("no/such.md", "#lost", "no.png", "rm -rf everything"): reports(complaints, word)
    assert len(complaints) == 4, complaints
