"""The main job from end to end at the preset smoke: killed in the middle, started again, called once more;
and the Snakefile."""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest
import yaml

from litvae.core.files import LitvaeError
from litvae.reproduce.cli import main
from litvae.reproduce.plan import load_paper, load_preset, paper_ids, sweep_configs
from litvae.reproduce.reproduce import page_jobs

ROOT = Path(__file__).resolve().parents[1]
PAPER = "reconstruction_bottlenecks"


def start(*words, log):
    "A command in a process group of its own, so that a kill takes the workers too."
    return subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, start_new_session=True,
                            stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


def files(folder): return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    "A reproduction that was killed after a few runs and started again: its folder and the output of the second start."
    folder = tmp_path_factory.mktemp("reproduced")
    words = ["litvae.reproduce.cli", "reproduce", "--preset", "smoke", "--jobs", "2",
             "--runs", str(folder / "runs"), "--out", str(folder / "out")]
    with open(folder / "first.log", "w") as log:
        process = start(*words, log=log)
        wait_for(lambda: len(list((folder / "runs").glob("*/*/result.json"))) >= 3 or process.poll() is not None)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (folder / "first.log").read_text()
    with open(folder / "second.log", "w") as log: code = start(*words, log=log).wait()
    output = (folder / "second.log").read_text()
    assert code == 0, output
    return folder, words, output


def test_every_page_is_drawn(reproduced):
    folder, _, output = reproduced
    for paper in paper_ids():
        for page in load_paper(paper).pages:
            assert list((folder / "out" / paper).glob(f"{page}*.json")), page
            notebook = json.loads((folder / "out" / paper / "notebooks" / f"{page}.ipynb").read_text())
            marks = [cell.get("metadata", {}).get("papermill", {}) for cell in notebook["cells"]]
            assert all(mark.get("status", "completed") == "completed" for mark in marks)
    assert "REPORT.md" in output and "figures and tables" in output


def test_report_judges_every_claim_and_says_what_it_rests_on(reproduced):
    folder, _, _ = reproduced
    report = (folder / "out" / "REPORT.md").read_text()
    assert "never reaches the GECO goal" in report and "multi_dsprites_proc" in report and "smoke" in report
    assert "inconclusive" in report                                    # one seed at the smallest preset decides nothing


def test_second_call_does_nothing(reproduced):
    folder, words, _ = reproduced
    before = files(folder / "runs") | {p: s for p, s in files(folder / "out").items() if p.name != "REPORT.md"}
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b0 of \d+ runs to train, 0 of \d+ pages to draw", done.stdout), done.stdout + done.stderr
    assert before == files(folder / "runs") | {p: s for p, s in files(folder / "out").items() if p.name != "REPORT.md"}


def test_the_readme_segments_with_a_run_of_the_preset_smoke(reproduced, tmp_path, capsys):
    command, = re.findall(r"^litvae (segment --run .+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert main([*command.split(), "--runs", str(reproduced[0] / "runs"), "--out", str(tmp_path)]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["run"] in command and scores["scenes"] == 16 and 0 <= scores["scores"]["msc"] <= 1, scores
    assert (tmp_path / "segmentation.png").stat().st_size and str(tmp_path / "scores.json") in capsys.readouterr().out


def test_a_single_run_says_in_its_log_how_far_it_is(tmp_path, capsys):
    words = ["train", "--sweep", PAPER, "--preset", "smoke", "--run", "multi_dsprites-sbd-latent1-seed0"]
    assert main([*words, "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr()
    first, last = said.err.strip().splitlines()
    assert "0 of 40 steps done" in first and "step 40 of 40 (loss" in last and str(tmp_path) in said.out


def test_a_lost_file_is_drawn_again(reproduced):
    folder, words, _ = reproduced
    page = next(job for job in page_jobs(load_preset("smoke"), [PAPER], "table1", folder / "runs", folder / "out"))
    assert page.current()
    moved = next((folder / "out" / PAPER).glob("table1*.csv"))
    moved.rename(folder / "aside")
    assert not page.current()
    (folder / "aside").rename(moved)
    assert page.current()


def paper_configs(preset):
    "Sweep -> its configurations."
    paper = load_paper(PAPER)
    return {name: sweep_configs(paper, name, load_preset(preset)) for name in paper.sweeps}


def test_the_paper_preset_is_144_trainings_planned_without_data(monkeypatch):
    def opened(*words, **settings): raise AssertionError(f"planning opened {words} {settings}")
    for name in ("load", "resolve"): monkeypatch.setattr(f"litvae.genesis.vanilla.{name}", opened)
    sweeps = paper_configs("paper")
    assert {name: len(configs) for name, configs in sweeps.items()} == {"vanilla": 54, "genesis": 90}
    configs = sum(sweeps.values(), [])
    assert len({config.run_id for config in configs}) == 144
    assert all(c.data["source"] == "real" and c.steps == 500_000 and c.batch_size == 32 for c in configs)
    slots = {(c.data["name"], c.model["slots"]) for c in sweeps["genesis"]}
    assert slots == {("multi_dsprites", 5), ("objects_room", 7), ("shapestacks", 9)}


def test_snakefile_lists_the_144_trainings_and_says_why(tmp_path):
    pytest.importorskip("snakemake")
    words = ["snakemake", "-s", "reproduce/Snakefile", "-n", "--nolock", "--config", "preset=paper", "gpu=1",
             f"paper={PAPER}", f"runs={tmp_path}/runs", f"out={tmp_path}/out"]
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"LITVAE_DATA": str(tmp_path / "no_data")})
    assert done.returncode == 0, done.stdout + done.stderr
    configs, pages = sum(paper_configs("paper").values(), []), len(load_paper(PAPER).pages)
    assert all(config.run_id in done.stdout for config in configs) and "Missing output files" in done.stdout
    table = " ".join(done.stdout.split())
    assert f"train 144 page {pages} report 1 all 1 total {146 + pages}" in table
    assert all(text in done.stdout for text in ("gpu=1,", "mem_mb=8000", "runtime=4320"))
    assert not (tmp_path / "no_data").exists()


@pytest.mark.parametrize("name", ["default", "slurm"])
def test_profiles_hold_options_that_snakemake_knows(name):
    values = yaml.safe_load((ROOT / "reproduce" / "profiles" / name / "config.yaml").read_text())
    assert values["keep-going"] and values["rerun-incomplete"]
    known = pytest.importorskip("snakemake.cli").get_argument_parser()._option_string_actions
    assert all(f"--{key}" in known for key in values if not key.startswith("slurm-"))


def test_snakefile_resumes_a_killed_training(tmp_path):
    """Two runs; one training process is killed after its first checkpoint.
    The other ends, the second call finishes the first."""
    configs = sweep_configs(load_paper(PAPER), "vanilla", load_preset("quick"))[:2]
    paths = [tmp_path / "runs" / PAPER / config.run_id for config in configs]
    words = ["snakemake", "-s", "reproduce/Snakefile", "--cores", "2", "--config", "preset=quick",
             f"runs={tmp_path}/runs", f"out={tmp_path}/out",
             "--nolock", "--", *[str(path / "result.json") for path in paths]]
    with open(tmp_path / "first.log", "w") as log:
        process = start(*words, log=log)
        wait_for(lambda: (paths[0] / "checkpoint.pt").exists() or process.poll() is not None, seconds=600)
        command = f"train --sweep {PAPER} --preset quick --runs {tmp_path}/runs --run {configs[0].run_id}"
        victims = subprocess.run(["pgrep", "-f", command], capture_output=True, text=True).stdout.split()
        assert victims, (tmp_path / "first.log").read_text()
        for victim in victims: os.kill(int(victim), signal.SIGKILL)
        assert process.wait() != 0
    assert (paths[1] / "result.json").exists() and not (paths[0] / "result.json").exists()
    assert (paths[0] / "checkpoint.pt").exists()
    weights, result = paths[1] / "weights.safetensors", (paths[1] / "result.json").read_bytes()
    kept = (paths[1] / "result.json").stat().st_mtime_ns
    with open(tmp_path / "second.log", "w") as log: assert start(*words, log=log).wait() == 0
    steps = [json.loads(line)["step"] for line in (paths[0] / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == configs[0].steps
    assert (paths[1] / "result.json").stat().st_mtime_ns == kept
    again = [*words[:-3], "--forcerun", "train", "--", words[-1]]      # as a job that was left marked as incomplete
    with open(tmp_path / "third.log", "w") as log: assert start(*again, log=log).wait() == 0
    assert "Forced execution" in (tmp_path / "third.log").read_text()
    assert (paths[1] / "result.json").read_bytes() == result and weights.stat().st_mtime_ns < kept


@pytest.mark.parametrize("words, text", [
    (["reproduce", "--preset", "huge"], "unknown preset 'huge'"),
    (["reproduce", "--preset", "smoke", "--paper", "genisis"], "unknown paper 'genisis'"),
    (["reproduce", "--preset", "smoke", "--only", "table9"], "unknown page 'table9'"),
    (["train", "--sweep", PAPER, "--preset", "smoke", "--run", "sbd-latent3-seed0"], "no run 'sbd-latent3-seed0'"),
    (["data", "multi_sprites"], "unknown data set"),
    (["train", "--sweep", PAPER, "--steps", "5"], "unrecognized arguments"),
])
def test_bad_arguments_give_one_line_and_exit_code_2(words, text, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert text in error and "Traceback" not in error


def test_misspelt_preset_key_is_named(tmp_path):
    preset = load_preset("smoke")
    preset.papers[PAPER]["vanilla"]["lerning_rate"] = 1
    with pytest.raises(LitvaeError, match="lerning_rate"): sweep_configs(load_paper(PAPER), "vanilla", preset)
