"""`make` sets itself up, says in one line why it cannot, and does nothing the second time. The Python that it finds
here is a shell script that plays one: it makes environments, installs by writing to a log, and fails when told to."""
import os, re, shutil, signal, subprocess, time

import pytest
from conftest import ROOT

TOOLS = "sh make awk df cat cksum mkdir rm mv cp chmod date dirname sleep nproc getconf find env ls true".split()

PYTHON = """#!/bin/sh
case "$*" in
    "-c import sys; print"*) echo "<version>" ;;
    "-c import sys; sys.exit"*) exit <old> ;;
    "-c import venv"*) exit <bare> ;;
    "-m venv "*) echo "venv" >> "$LOG"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/litvae" ;;
    "-m pip --version") ;;
    "-m pip install"*) echo "$*" >> "$LOG"; sleep "${PIP_SECONDS:-0}"; exit "${PIP_FAILS:-0}" ;;
    *) echo "called $0 $*" ;;
esac
"""


class Checkout:
    "A copy of the files that set-up looks at, and a PATH with nothing else on it than what is put there."
    def __init__(self, folder):
        self.folder, self.bin, self.log = folder / "checkout", folder / "bin", folder / "log"
        (self.folder / "tools").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt", "tools/setup.sh"):
            shutil.copy2(ROOT / name, self.folder / name)
        for name in TOOLS:
            if where := shutil.which(name): (self.bin / name).symlink_to(where)

    def python(self, name="python3.11", version="3.11", old=0, bare=0):
        text = PYTHON.replace("<version>", version).replace("<old>", str(old)).replace("<bare>", str(bare))
        self.script(name, text)

    def script(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, *arguments, **env):
        env = {"PATH": str(self.bin), "LOG": str(self.log), **env}
        return subprocess.Popen(["make", *arguments], cwd=self.folder, env=env, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def started_to_install(self):
        deadline = time.monotonic() + 60
        while not self.installs and time.monotonic() < deadline: time.sleep(0.02)
        assert self.installs

    def make(self, *arguments, **env):
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def fails(self, *arguments, **env):
        "The one line that a failing `make` prints, besides make's own."
        code, out, err = self.make(*arguments, **env)
        lines = [line for line in err.splitlines() if not line.startswith("make")]
        assert code != 0 and len(lines) == 1 and lines[0].startswith("litvae: "), (code, out, err)
        assert not self.stamp.exists()
        return lines[0]

    @property
    def installs(self):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if "pip install" in line]

    @property
    def stamp(self):
        return self.folder / ".venv/.litvae-installed"


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


# ------------------------------------------------------------------------------------------------ nothing to work with
def test_help_is_the_default_and_needs_nothing(checkout):
    code, out, err = checkout.make()
    targets = re.findall(r"(?m)^([a-z-]+):.*## ", (ROOT / "Makefile").read_text())
    assert code == 0 and not err
    assert {"env", "test", "reproduce", "figures", "kernels", "gpu", "docs", "lab", "clean"} <= set(targets)
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  make ")] == targets
    assert not (checkout.folder / ".venv").exists()


def test_no_python(checkout):
    assert "no Python 3.11 or newer was found" in checkout.fails("env")
    assert "no Python 3.11 or newer was found" in checkout.fails("test")
    assert not (checkout.folder / ".venv").exists()


def test_python_too_old(checkout):
    checkout.python("python3", "3.9", old=1)
    assert "Python 3.11 or newer is needed, but python3 is Python 3.9" in checkout.fails("reproduce")


def test_python_without_venv(checkout):
    checkout.python("python3.12", "3.12", bare=1)
    assert "python3.12 has no venv module" in checkout.fails("env")


def test_an_asked_for_python_that_does_not_run(checkout):
    checkout.python()
    assert "no Python 3.11 or newer was found (tried: python9)" in checkout.fails("env", "PYTHON=python9")


def test_names_that_do_not_run_are_passed_over(checkout):
    checkout.script("python3.12", "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    checkout.python("python3.11")
    code, out, err = checkout.make("env")
    assert code == 0 and "with python3.11" in out and not err and checkout.stamp.exists()


def test_a_usable_python_wins_over_a_bare_and_an_old_one(checkout):
    checkout.python("python3.12", "3.12", bare=1)
    checkout.python("python3.11", "3.10", old=1)
    checkout.python("python3", "3.13")
    code, out, _ = checkout.make("env")
    assert code == 0 and "with python3 (3.13)" in out


def test_no_disk(checkout):
    checkout.python()
    line = checkout.fails("env", "MIN_DISK_GB=1000000")
    assert "1000000 GB are needed" in line and not checkout.installs
    assert checkout.make("env", "MIN_DISK_GB=0")[0] == 0


def test_a_folder_that_cannot_be_made(checkout):
    checkout.python()
    assert "cannot make settings.ini/venv" in checkout.fails("env", "VENV=settings.ini/venv")


def test_an_incomplete_checkout(checkout):
    checkout.python()
    (checkout.folder / "constraints.txt").unlink()
    assert "constraints.txt is missing" in checkout.fails("env")


# ------------------------------------------------------------------------------------------ once, and only when needed
def test_the_second_call_installs_nothing(checkout):
    checkout.python()
    assert checkout.make("env")[0] == 0
    first = checkout.installs
    assert all("-c constraints.txt" in line for line in first) and "-e .[dev,reproduce,cluster,metrics]" in first[-1]
    assert checkout.make("env") == (0, "", "") and checkout.installs == first
    for name in ("settings.ini", "constraints.txt"):
        with open(checkout.folder / name, "a") as file: file.write("\n# changed\n")
        assert checkout.make("env")[0] == 0 and len(checkout.installs) > len(first)
        first = checkout.installs
    assert checkout.log.read_text().count("venv\n") == 1


def test_a_moved_checkout_is_installed_again(checkout, tmp_path):
    checkout.python()
    assert checkout.make("env")[0] == 0
    before, checkout.folder = len(checkout.installs), checkout.folder.rename(tmp_path / "with a space")
    assert checkout.make("env")[0] == 0 and len(checkout.installs) > before
    assert checkout.make("env") == (0, "", "")


def test_a_failing_pip_leaves_no_stamp(checkout):
    checkout.python()
    assert "pip could not install" in checkout.fails("test", PIP_FAILS="1")
    assert checkout.make("env")[0] == 0 and checkout.stamp.exists()
    with open(checkout.folder / "settings.ini", "a") as file: file.write("\n# changed\n")
    assert "pip could not install" in checkout.fails("env", PIP_FAILS="1")


def test_another_python_than_the_environment_has(checkout):
    checkout.python()
    checkout.python("python3.12", "3.12")
    assert checkout.make("env", "PYTHON=python3.11")[0] == 0
    assert checkout.make("env", "PYTHON=python3.11") == (0, "", "")
    code, _, err = checkout.make("env", "PYTHON=python3.12")
    assert code != 0 and ".venv holds Python 3.11 but PYTHON=python3.12 is 3.12" in err


def test_an_environment_of_an_old_python(checkout):
    checkout.python()
    checkout.python("python3", "3.10", old=1)
    (checkout.folder / ".venv/bin").mkdir(parents=True)
    shutil.copy2(checkout.bin / "python3", checkout.folder / ".venv/bin/python")
    assert "the Python in .venv is not usable" in checkout.fails("env")


def test_an_interrupted_set_up_is_taken_up_again(checkout):
    checkout.python()
    process = checkout.start("env", PIP_SECONDS="30")
    checkout.started_to_install()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not checkout.stamp.exists() and (checkout.folder / ".venv/.setup-lock/pid").exists()
    code, _, err = checkout.make("env")
    assert code == 0 and not err and checkout.stamp.exists() and not (checkout.folder / ".venv/.setup-lock").exists()


def test_two_set_ups_at_once_install_once(checkout):
    checkout.python()
    first = checkout.start("env", PIP_SECONDS="1")
    checkout.started_to_install()
    code, out, _ = checkout.make("env")
    first.communicate(timeout=60)
    assert first.returncode == code == 0 and "waiting for it" in out and len(checkout.installs) == 2


# ----------------------------------------------------------------------------------------------- what the targets call
def test_reproduce_passes_its_variables_on(checkout):
    checkout.python()
    code, out, _ = checkout.make("reproduce")
    assert code == 0 and out.endswith("/.venv/bin/litvae reproduce --preset quick --paper all\n")
    _, out, _ = checkout.make("reproduce", "PRESET=smoke", "PAPER=meme", "JOBS=3")
    assert out.endswith("litvae reproduce --preset smoke --paper meme --jobs 3\n")
    _, out, _ = checkout.make("figures")
    assert out.endswith("litvae reproduce --preset small --paper all\n")


def test_test_runs_pytest_and_docs_builds_the_site(checkout):
    checkout.python()
    _, out, _ = checkout.make("test", "JOBS=2", "ARGS=-k sync")
    assert out.endswith("python -m pytest -n 2 --dist worksteal -k sync\n")
    assert re.search(r"-m pytest -n [1-8] --dist", checkout.make("test")[1])
    assert checkout.make("docs")[1].endswith("python docs/build.py\n")
    assert checkout.make("lab")[1].endswith("python -m jupyter lab nbs\n")


def test_kernels_are_built_and_measured_where_they_can_be(checkout):
    checkout.python()
    assert "build_native" in checkout.make("kernels")[1] and "build_native" in checkout.make("reproduce")[1]
    out = checkout.make("gpu", "ARGS=-x")[1]
    assert out.endswith("-m pytest -m gpu tests -x\ncalled " + out.split("called ")[-1]) and "kernels.py" in out


def test_export_and_clean_notebooks_call_nbdev(checkout):
    checkout.python()
    assert checkout.make("env")[0] == 0
    for name in ("nbdev_export", "nbdev_clean"):
        shutil.copy2(checkout.bin / "python3.11", checkout.folder / ".venv/bin" / name)
    out = checkout.make("export")[1]
    assert "/nbdev_export \n" in out and out.endswith("export_sources('.')\n")
    out = checkout.make("clean-notebooks")[1]
    assert "nbdev_clean --fname nbs\n" in out and "nbdev_clean --fname reproduce\n" in out


def test_clean_keeps_what_took_long(checkout):
    goes = {"docs/_build/html/a", "litvae/__pycache__/a", "nbs/.ipynb_checkpoints/a", "build/a", "dist/a"}
    stays = {".venv/x/__pycache__/a", "runs/a", "results/a", "data/a", "figures/a"}
    for name in goes | stays:
        (checkout.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout.folder / name).write_text("")
    assert checkout.make("clean") == (0, "", "")
    assert {path.relative_to(checkout.folder).as_posix() for path in checkout.folder.rglob("a")} == stays


# ------------------------------------------------------------------------------------------------------------ .ci/run
@pytest.mark.parametrize("failing", [None, "env", "docs", "test"])
def test_ci_hides_no_failure(failing, tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy2(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "make").write_text(f'#!/bin/sh\necho "make $*"\n[ "$1" != "{failing}" ]\n')
    (tmp_path / "make").chmod(0o755)
    done = subprocess.run(["bash", str(tmp_path / ".ci/run")], cwd="/", capture_output=True, text=True,
                          env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (done.returncode == 0) == (failing is None)
    assert done.stdout.splitlines()[-1] == f"make {failing or 'test'}"  # pytest's summary is the last thing to be seen


def test_ci_without_make(tmp_path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    done = subprocess.run([shutil.which("bash"), str(ROOT / ".ci/run")], capture_output=True, text=True,
                          env={"PATH": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "make is needed" in done.stderr
