"The runner of notebooks: strict parameters, all or nothing on disk, readable failures, nothing of the user's profile."
import ctypes, errno, json, os, re, signal, subprocess, sys, time
from pathlib import Path

import nbclient
import nbformat
import papermill.iorw
import psutil
import pytest
import yaml
from conftest import ROOT

from litvae.core.files import CorruptFileError, LitvaeError
from litvae.reproduce import notebooks
from litvae.reproduce.notebooks import (NotebookError, NotebookJob, WarmKernels, check_parameters, is_complete,
                                        notebook_parameters, run_notebook, run_notebooks)

DEFAULTS = 'flag = True\nn = 3\nlr = 0.1\nname = "a"\nsizes = [1, 2]\nextra = None\noptions = {"deep": 1}'


@pytest.fixture
def write(tmp_path):
    "A function that writes a template: the source of the `parameters` cell, then of further code cells."
    def write(parameters, *sources, name="template.ipynb", tags=("parameters",), make=nbformat.v4.new_code_cell):
        cells = [make(parameters, id="defaults")]
        cells += [nbformat.v4.new_code_cell(source, id=f"step{n}") for n, source in enumerate(sources, 1)]
        for cell, tag in zip(cells, tags): cell.metadata.tags = [tag]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / name)
        return tmp_path / name
    return write


def names(folder):
    "What lies in `folder`, hidden files included."
    return sorted(path.name for path in Path(folder).iterdir()) if Path(folder).is_dir() else []


def wait_until(condition, patience=60):
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# Parameters: no kernel is started for any of these

def test_parameters_are_read_without_running(write):
    more = "\nlow: float = -1e-3  # annotated\nlong = [\n    1,\n    (2, 3),\n]"
    template = write(DEFAULTS + more, "raise SystemExit")
    assert list(notebook_parameters(template).items()) == [
        ("flag", True), ("n", 3), ("lr", 0.1), ("name", "a"), ("sizes", [1, 2]), ("extra", None),
        ("options", {"deep": 1}), ("low", -0.001), ("long", [1, (2, 3)])]


@pytest.mark.parametrize("source", [
    "import os", "n = 2 * 3", "n = m", "a = b = 1", "a, b = 1, 2", "n += 1", "n: int", "n = 1\nn = 2", "x.y = 1",
    "print(1)", "def f(): pass", "'text'", "for n in [1]: pass", "n = f'{1}'"])
def test_only_assignments_of_literals_are_parameters(write, source):
    with pytest.raises(LitvaeError, match="write `name = literal`"): notebook_parameters(write(source))


def test_a_cell_that_does_not_parse_is_named(write):
    complaint = r"template\.ipynb.*does not parse.*line 2"
    with pytest.raises(LitvaeError, match=complaint): notebook_parameters(write("a = 1\nb ="))
    with pytest.raises(LitvaeError, match="does not parse"): notebook_parameters(write("%matplotlib inline\na = 1"))


@pytest.mark.parametrize("tags, complaint", [
    ((), "has no cells tagged `parameters`.*tag the cell"), (("Parameters",), "has no cells tagged"),
    (("parameters", "parameters"), "has 2 cells tagged `parameters`.*keep the tag on one")])
def test_a_lost_or_doubled_tag_is_refused(write, tmp_path, tags, complaint):
    template = write("a = 1", "b = 2", tags=tags)
    with pytest.raises(LitvaeError, match=r"template\.ipynb " + complaint): notebook_parameters(template)
    with pytest.raises(LitvaeError, match=complaint): run_notebook(template, tmp_path / "out" / "a.ipynb")
    assert names(tmp_path / "out") == []


def test_the_tag_belongs_on_a_code_cell(write):
    template = write("a = 1", make=nbformat.v4.new_markdown_cell)
    with pytest.raises(LitvaeError, match="not a code cell"): notebook_parameters(template)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"cells": 1}', '{"worksheets": []}', "\x00\xff"])
def test_a_damaged_template_is_named_and_left_alone(tmp_path, text):
    (tmp_path / "a.ipynb").write_text(text, encoding="latin-1")
    for read in (notebook_parameters, lambda path: run_notebook(path, tmp_path / "out.ipynb")):
        with pytest.raises(CorruptFileError, match=r"a\.ipynb"): read(tmp_path / "a.ipynb")
    assert (tmp_path / "a.ipynb").read_text(encoding="latin-1") == text and names(tmp_path) == ["a.ipynb"]
    assert not is_complete(tmp_path / "a.ipynb")


def test_an_invalid_notebook_is_refused(write, tmp_path):
    broken = json.loads(write("a = 1", "b = 2").read_text())
    del broken["cells"][1]["cell_type"]
    (tmp_path / "broken.ipynb").write_text(json.dumps(broken))
    for name, error, complaint in [("broken", CorruptFileError, r"broken\.ipynb is not a valid notebook"),
                                   ("absent", LitvaeError, "there is no notebook")]:
        with pytest.raises(error, match=complaint): run_notebook(tmp_path / f"{name}.ipynb", tmp_path / "out.ipynb")


@pytest.mark.parametrize("given, complaint", [
    ({"lrr": 0.2}, "no parameter 'lrr'; did you mean 'lr'.*known are: flag, n, lr, name"),
    ({"preset": "x"}, "no parameter 'preset'; known"), ({"": 1}, "no parameter ''"), ({1: 1}, "no parameter 1"),
    ({"flag": "False"}, "type bool such as True, not 'False' of type str"), ({"flag": 0}, "type bool"),
    ({"flag": None}, "type bool"), ({"n": True}, "type int such as 3, not True of type bool"), ({"n": 3.0}, "type int"),
    ({"n": "3"}, "type int"), ({"lr": "0.1"}, "type float"), ({"lr": False}, "type float"),
    ({"lr": None}, "type float"), ({"name": 1}, "type str"), ({"name": None}, "type str"),
    ({"name": ["a"]}, "type str"),
    ({"name": Path("a")}, "cannot be a .*Path"), ({"sizes": 1}, "type list"), ({"sizes": "12"}, "type list"),
    ({"sizes": {1, 2}}, "cannot be a set"), ({"options": [1]}, "type dict"),
    ({"options": {1: 2}}, "key 1 is not a string"), ({"extra": [object()]}, "cannot be a object")])
def test_wrong_parameters_are_refused_before_anything_runs(write, tmp_path, monkeypatch, given, complaint):
    template = write(DEFAULTS)
    monkeypatch.setattr(notebooks, "_execute", lambda *args: pytest.fail("a kernel would have been started"))
    with pytest.raises(LitvaeError, match=complaint) as caught: run_notebook(template, tmp_path / "out.ipynb", given)
    assert "template.ipynb" in str(caught.value) and "\n" not in str(caught.value)
    assert names(tmp_path) == ["template.ipynb"]


def test_right_parameters_pass_as_plain_values(write):
    given = {"flag": False, "n": -1, "lr": 1, "sizes": (3, (4,)), "extra": {"any": None}, "options": {}}
    assert check_parameters(write(DEFAULTS), given) == given | {"sizes": [3, [4]]}


@pytest.mark.parametrize("pages", sorted((ROOT / "reproduce").glob("*/pages.yaml")), ids=lambda path: path.parent.name)
def test_the_pages_of_every_paper_name_parameters_that_exist(pages):
    listed = yaml.safe_load(pages.read_text(encoding="utf-8"))["pages"]
    assert listed
    common = {"preset": "quick", "runs": "runs", "out": "out"}     # what the reproduction job adds
    for page in listed.values(): check_parameters(pages.parent / page["file"], page["parameters"] | common)


@pytest.mark.parametrize("package", ["papermill", "nbformat"])
def test_missing_packages_are_named_with_what_to_install(write, tmp_path, monkeypatch, package):
    template = write("a = 1")
    monkeypatch.setitem(sys.modules, package, None)
    complaint = rf"{package}.*pip install \"litvae\[reproduce\]\""
    with pytest.raises(LitvaeError, match=complaint): run_notebook(template, tmp_path / "out.ipynb")
    assert notebook_parameters(template) == {"a": 1}


def test_a_working_folder_that_is_not_there_is_named(write, tmp_path):
    with pytest.raises(LitvaeError, match="nowhere: there is no such folder"):
        run_notebook(write("a = 1"), tmp_path / "out.ipynb", cwd=tmp_path / "nowhere")


# A good run

NASTY = {"flag": False, "n": 10**20, "lr": 1, "name": 'a "b" \\ \'c\' \n\t{x} é 𝛽 \\n', "sizes": [],
         "extra": [None, {"x": [1.5, "é"]}], "options": {'quo"ted': (1, 2)}}
# What a user may have: a profile, a start-up file, a kernel that is called python3 too
USER = {"ipython/profile_default/startup/a.py": "n = 'profile'; sabotage = 1", "startup.py": "sabotage = 2",
        "jupyter/kernels/python3/kernel.json": '{"argv": ["false"], "display_name": "mine", "language": "python"}'}
SEE = """
import json, os, sys
from pathlib import Path
given = {name: globals()[name] for name in "flag n lr name sizes extra options".split()}
seen = [given, sys.executable, os.getcwd(), dict(os.environ), sorted(globals())]
Path("seen.json").write_text(json.dumps(seen))
"""


def test_the_kernel_gets_exact_values_and_nothing_of_the_user(write, tmp_path, monkeypatch, capfd):
    home = tmp_path / "home"
    for file, text in USER.items():
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_text(text)
    for variable, value in {"IPYTHONDIR": home / "ipython", "PYTHONSTARTUP": home / "startup.py",
                            "JUPYTER_PATH": home / "jupyter", "JUPYTER_PREFER_ENV_PATH": "0",
                            "OMP_NUM_THREADS": "7", "MPLBACKEND": "Agg"}.items():
        monkeypatch.setenv(variable, str(value))
    folder = tmp_path / "a {b} folder"
    folder.mkdir()
    loud = "print('out'); print('err', file=sys.stderr); os.write(1, b'deep')"
    template = write(DEFAULTS, SEE, "", loud, name="a {b} folder/template.ipynb")
    before = os.getcwd()
    done = run_notebook(template, folder / "out" / "page.ipynb", NASTY, cwd=folder, threads=2)
    seen, executable, cwd, env, variables = json.loads((folder / "seen.json").read_text())
    assert done == folder / "out" / "page.ipynb" and is_complete(done) and names(done.parent) == ["page.ipynb"]
    assert seen == check_parameters(template, NASTY)
    assert (executable, cwd, os.getcwd()) == (sys.executable, str(folder), before)
    assert env["OMP_NUM_THREADS"] == "2" and env["MPLBACKEND"].endswith("backend_inline")
    assert "PYTHONSTARTUP" not in env and not {"sabotage", "_guard"} & set(variables)
    assert not Path(env["IPYTHONDIR"]).exists()
    assert capfd.readouterr() == ("", "")                          # neither papermill nor the kernel has a say


RENDEZVOUS = """
import sys, time, warnings
from pathlib import Path
Path("here").write_text("")
while len(list(Path("..").glob("*/here"))) < 2: time.sleep(0.01)
print(Path.cwd(), where, Path.home() / "data", sep="\\n")
warnings.warn("in the notebook")
print(warnings.__file__, sys.modules["IPython"].__file__, file=sys.stderr)
Path.cwd() / "é"
"""


def test_two_run_at_once_to_the_same_bytes_and_a_third_may_fail(write, tmp_path):
    template = write("where = 'here'", RENDEZVOUS)                 # each one waits for the other
    bad = write("a = 1", "a / 0", name="bad.ipynb")
    for name in "xy": (tmp_path / name).mkdir()
    jobs = [NotebookJob(template, folder / "page.ipynb", {"where": str(folder / "é")}, folder)
            for folder in (tmp_path / "x", tmp_path / "y")]
    jobs.insert(1, NotebookJob(bad, tmp_path / "bad" / "page.ipynb"))
    jobs.insert(0, NotebookJob(bad, tmp_path / "wrong" / "page.ipynb", {"b": 1}))
    before, ended = os.getcwd(), {}
    results = run_notebooks(jobs, workers=3, on_done=lambda job, result: ended.update({job.target: result}))
    assert os.getcwd() == before
    assert ended == {job.target: result for job, result in zip(jobs, results)} and len(ended) == 4
    assert results[1] == jobs[1].target and results[3] == jobs[3].target
    assert isinstance(results[0], LitvaeError) and isinstance(results[2], NotebookError)
    assert names(tmp_path / "wrong") == [] and names(tmp_path / "bad") == ["page.failed.ipynb"]
    text = results[1].read_text(encoding="utf-8")
    assert text == results[3].read_text(encoding="utf-8")          # paths, times and process numbers are gone
    for path in {tmp_path, Path.home(), Path(sys.prefix), Path(sys.base_prefix)} - {Path("/usr")}:
        assert str(path) not in text and str(path.resolve()) not in text, path
    for machine in ("start_time", "duration", "ipykernel_", "iopub", "litvae-kernel"): assert machine not in text
    printed = nbformat.reads(text, 4).cells[2].outputs
    assert printed[0].text == ".\n./é\n~/data\n"
    assert "site-packages/IPython" in printed[1].text and "lib/python" in printed[1].text
    assert printed[2].data["text/plain"] == "PosixPath('./é')"
    assert nbformat.reads(text, 4).cells[1].id == "injected-parameters"


def test_two_jobs_cannot_share_a_target(write, tmp_path):
    template = write("a = 1")
    jobs = [NotebookJob(template, tmp_path / "out.ipynb"), NotebookJob(template, tmp_path / "x" / ".." / "out.ipynb")]
    with pytest.raises(LitvaeError, match="two notebooks would be written to"): run_notebooks(jobs)
    assert run_notebooks([]) == []


# Failures

def test_a_failing_cell_is_shown_and_leaves_no_target(write, tmp_path, capfd):
    target, failed = tmp_path / "out" / "page.ipynb", tmp_path / "out" / "page.failed.ipynb"
    failing = "def inner(x):\n    # why\n    return 1 / x\n\ninner(n)"
    template = write("n = 0", "before = 1", failing, "open('after', 'w')")
    with pytest.raises(NotebookError) as caught: run_notebook(template, target, cwd=tmp_path, progress=False)
    error, message = caught.value, str(caught.value)
    assert (error.source, error.cell_id, error.cell_index) == (template, "step2", 2)
    assert error.head == "def inner(x):\n    # why\n    return 1 / x" and error.failed == failed
    first = message.splitlines()[0]
    assert "cell step2 (number 3): ZeroDivisionError: division by zero" in first and str(failed) in first
    assert re.search(r"^-+> 3 +return 1 / x$", error.traceback, re.M) and "inner(n)" in error.traceback
    assert error.traceback.rstrip().endswith("ZeroDivisionError: division by zero")
    assert error.traceback in message and "\x1b" not in message
    assert names(target.parent) == ["page.failed.ipynb"] and not is_complete(failed)
    assert not (tmp_path / "after").exists()
    assert capfd.readouterr() == ("", "")

    run_notebook(failed, target, {"n": 2}, cwd=tmp_path, progress=True)      # an executed one is a template too
    assert names(target.parent) == ["page.ipynb"] and is_complete(target) and "page" in capfd.readouterr().err


def test_leaving_early_is_not_finishing(write, tmp_path):
    (tmp_path / "page.ipynb").write_text("an earlier one")
    with pytest.raises(NotebookError, match="cell step1 .number 2.: SystemExit"):
        run_notebook(write("a = 1", "import sys; sys.exit(0)", "a"), tmp_path / "page.ipynb", cwd=tmp_path)
    assert names(tmp_path) == ["page.failed.ipynb", "page.ipynb", "template.ipynb"]
    assert (tmp_path / "page.ipynb").read_text() == "an earlier one" and not is_complete(tmp_path / "page.failed.ipynb")


def test_a_kernel_that_dies_in_a_cell_is_reported_and_not_started_again(write, tmp_path):
    template = write("a = 1", "open('begun', 'a').write('x')\nimport os; os.abort()", "a")
    with pytest.raises(NotebookError, match="cell step1 .number 2.: the kernel died") as caught:
        run_notebook(template, tmp_path / "out" / "page.ipynb", cwd=tmp_path)
    assert (tmp_path / "begun").read_text() == "x" and names(tmp_path / "out") == ["page.failed.ipynb"]
    assert caught.value.traceback.startswith("Fatal Python error: Aborted")
    assert "line 2 in <module>" in caught.value.traceback
    assert not is_complete(tmp_path / "out" / "page.failed.ipynb")


LAUNCHER = """
import os, sys
with open(os.environ["STARTS"], "a") as starts: starts.write("x")
if os.path.getsize(os.environ["STARTS"]) == 1: sys.exit("zmq.error.ZMQError: Address already in use")
sys.path.remove(os.path.dirname(__file__))
del sys.modules["__main__"]
from ipykernel import kernelapp
kernelapp.launch_new_instance()
"""


def test_a_kernel_that_does_not_come_up_gets_a_second_chance(write, tmp_path, monkeypatch):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "ipykernel_launcher.py").write_text(LAUNCHER)       # the first start dies before it answers
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    run_notebook(write("a = 1", "open('begun', 'a').write('x')"), tmp_path / "page.ipynb", cwd=tmp_path)
    assert is_complete(tmp_path / "page.ipynb")
    assert (tmp_path / "starts").read_text() == "xx" and (tmp_path / "begun").read_text() == "x"


DEATHS = [RuntimeError("Kernel died before replying to kernel_info"),
          nbclient.exceptions.DeadKernelError("Kernel died"),
          OSError(errno.EADDRINUSE, "Address already in use")]


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: type(death).__name__)
def test_a_kernel_that_never_comes_up_is_tried_twice(write, tmp_path, monkeypatch, death):
    starts = []

    def start_new_kernel(self, **options):
        starts.append(options)
        options["stderr"].write("the reason\n")
        raise death

    monkeypatch.setattr(nbclient.NotebookClient, "start_new_kernel", start_new_kernel)
    with pytest.raises(NotebookError, match="its kernel did not start") as caught:
        run_notebook(write("a = 1"), tmp_path / "out" / "page.ipynb")
    assert len(starts) == 2 and str(death) in str(caught.value) and caught.value.traceback == "the reason"
    assert names(tmp_path / "out") == []


def test_a_full_disk_is_one_clear_error_and_loses_nothing(write, tmp_path, monkeypatch):
    write_file, writes = papermill.iorw.LocalHandler.write, []

    def full(self, text, path):
        writes.append(path)
        if len(writes) > 3: raise OSError(errno.ENOSPC, "No space left on device")
        write_file(self, text, path)

    monkeypatch.setattr(papermill.iorw.LocalHandler, "write", full)
    (tmp_path / "page.ipynb").write_text("an earlier one")
    with pytest.raises(LitvaeError, match=r"page\.ipynb: the disk is full"):
        run_notebook(write("a = 1", "a"), tmp_path / "page.ipynb")
    assert names(tmp_path) == ["page.ipynb", "template.ipynb"]
    assert (tmp_path / "page.ipynb").read_text() == "an earlier one"


# Warm kernels

SHARED = """
import builtins, json, os, signal, sys
from pathlib import Path
assert not hasattr(builtins, "left") and "litvae" not in sys.modules
builtins.left = n
import matplotlib, torch
print(matplotlib.rcParams["backend"], torch.get_num_threads(), sys.argv[0], sys.path, sorted(os.environ), Path.cwd())
print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGCHLD), os.getsid(0) == os.getpid(), sorted(globals()))
Path(f"{n}.json").write_text(json.dumps([os.getpid(), os.getppid()]))
if n == 2: os.abort()
"""


def test_a_warm_kernel_gives_the_bytes_of_a_cold_one_and_shares_nothing(write, tmp_path):
    template = write("n = 0", SHARED, "import matplotlib.pyplot as plt; plt.plot([1, 2]);")
    with WarmKernels() as warm:
        def run(n): return run_notebook(template, tmp_path / f"{n}" / "page.ipynb", {"n": n}, cwd=tmp_path, warm=warm)
        run(0)
        with pytest.raises(NotebookError, match="the kernel died") as caught: run(2)
        assert caught.value.traceback.startswith("Fatal Python error: Aborted")
        found = run(1).read_bytes()
        numbers = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(3)]
        assert len({own for own, _ in numbers}) == 3 and {parent for _, parent in numbers} == {warm.process.pid}
    assert warm.process.returncode and not any(psutil.pid_exists(own) for own, _ in numbers)
    assert run(1).read_bytes() == found                            # nobody is there to fork, so this one is cold
    assert json.loads((tmp_path / "1.json").read_text())[1] == os.getpid()


# Kills: a process of its own runs the notebook, and the kernel must not outlive it

RUN = """
import sys
from pathlib import Path
from litvae.reproduce.notebooks import NotebookJob, WarmKernels, run_notebook, run_notebooks
folder = Path(sys.argv[1])
job = NotebookJob(folder / "template.ipynb", folder / "out" / "page.ipynb", cwd=folder)
if "warm" in sys.argv:
    with WarmKernels() as warm: run_notebook(job.source, job.target, cwd=folder, warm=warm)
else: run_notebooks([job])
"""
SLEEP = """
import json, os, time
from pathlib import Path
Path("new").write_text(json.dumps([os.getpid(), os.environ["IPYTHONDIR"]]))
Path("new").rename("kernel")
time.sleep(600)
"""


@pytest.fixture
def start(tmp_path):
    """A function that runs the template in a new process; it returns, once a cell sleeps, the process, the kernel, and
    the kernel's own folder. A process that the test leaves is killed."""
    processes = []

    def start(*words):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), *words], stderr=subprocess.PIPE, cwd=ROOT)
        processes.append(process)
        wait_until(lambda: (tmp_path / "kernel").exists() or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        number, private = json.loads((tmp_path / "kernel").read_text())
        return process, psutil.Process(number), Path(private)

    yield start
    for process in processes: process.kill(), process.wait()


def gone(process): return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def foster_parent():
    "Orphans come to this process rather than to process 1, as they do under a desktop session or in some containers."
    try: prctl = ctypes.CDLL(None).prctl
    except (AttributeError, OSError): yield
    else:
        prctl(36, 1, 0, 0, 0)                                      # PR_SET_CHILD_SUBREAPER
        yield
        prctl(36, 0, 0, 0, 0)


@pytest.mark.parametrize("words", [(), ("warm",)], ids=["cold", "warm"])
def test_a_killed_run_leaves_no_target_and_no_kernel(write, tmp_path, start, foster_parent, words):
    write("a = 1", "a", SLEEP)
    process, kernel, private = start(*words)
    assert (kernel.ppid() == process.pid) == (not words)
    parent = kernel.parent()
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = names(tmp_path / "out")
    assert len(left) == 1 and left[0].startswith(".") and not is_complete(tmp_path / "out" / left[0])
    wait_until(lambda: gone(kernel) and gone(parent) and not private.exists(), patience=20)


def test_an_interrupt_does_not_wait_for_the_notebooks(write, tmp_path, start):
    write("a = 1", SLEEP)
    process, kernel, private = start()
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=30)[1].decode()
    assert process.returncode != 0 and "KeyboardInterrupt" in printed
    assert gone(kernel) and not private.exists() and not is_complete(tmp_path / "out" / "page.ipynb")
