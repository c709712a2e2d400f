"One run on two processes: torchrun starts them, gloo connects them."
import os, subprocess, sys

import pytest
import torch
from filelock import FileLock

from helpers import ranks
from helpers.compare import FINISHED, contents, logged, metrics, result, weights
from helpers.tasks import config_hash
from litvae.core.files import read_json
from litvae.core.runs import Run, load_checkpoint, run_path


def torchrun(what, folder, restarts=0, **environment):
    "Run helpers/ranks.py in two processes, to the end; returns what they printed."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", str(restarts), ranks.__file__, what, str(folder)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, env=os.environ | environment, **pipes) as process:
        try: printed, _ = process.communicate(timeout=150)
        finally: process.terminate()                               # after a timeout; torchrun then ends its workers
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "What two processes have left behind that were not disturbed; made once, also where pytest itself is several."
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        if not (folder / "report1.pt").exists(): torchrun("first", folder)
    return folder


def test_two_processes_compute_the_gradients_of_one(folder):
    "A VAE in float64 without batch norm and without sampling; each step's update goes into the next step's gradients."
    one = ranks.gradients()
    for rank in (0, 1):
        two = torch.load(folder / f"gradients{rank}.pt", weights_only=True)
        assert len(two) == len(one) == 6
        for step, (ours, theirs) in enumerate(zip(two, one)):
            assert ours.keys() == theirs.keys()
            for name in (name for name in ours if not name.startswith("geco")):
                assert ours[name].dtype == torch.float64 and theirs[name].abs().max() > 0
                scale = theirs[name].abs().max().clamp(min=1)
                assert (ours[name] - theirs[name]).abs().max() <= 1e-12 * scale, (step, name)


def test_two_processes_play_the_adversarial_game_of_one(folder):
    "Phases, optimisers and gradients that do not leak, with each process seeing half of every batch."
    one = ranks.rivalry()
    for rank in (0, 1):
        two = torch.load(folder / f"rivalry{rank}.pt", weights_only=True)
        for name, value in one.items(): torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-12)


def test_both_processes_hold_the_same_geco(folder):
    "And the one that a single process would hold: both see the error of the whole batch."
    first, second = (torch.load(folder / f"gradients{rank}.pt", weights_only=True) for rank in (0, 1))
    one, betas = ranks.gradients(), set()
    for a, b, c in zip(first, second, one):
        for name in ("geco.beta", "geco.err_ema", "geco.updates", "geco.goal_update"):
            assert torch.equal(a[name], b[name])
            torch.testing.assert_close(a[name], c[name], rtol=1e-12, atol=0)
        betas.add(a["geco.beta"].item())
    assert len(betas) == len(first)                                # it moves


def test_a_run_on_two_processes_is_written_once(folder):
    reports = [torch.load(folder / f"report{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert reports[0]["path"] == reports[1]["path"] == str(run_path(ranks.TWO, folder / "whole"))
    run = Run(reports[0]["path"])
    assert logged(run.path) == [2, 4, 6, 8, 10, 12] and run.result["environment"]["processes"] == 2
    assert set(contents(run.path)) == FINISHED


def test_a_loss_that_is_not_finite_on_one_process_stops_both(folder):
    errors = [torch.load(folder / f"report{rank}.pt", weights_only=True)["errors"] for rank in (0, 1)]
    assert all(error[0].startswith("NonFiniteLoss: the loss was not finite at step 7 ") for error in errors)
    path = run_path(ranks.EXPLODING, folder / "bad")
    assert read_json(path / "failure.json")["step"] == 7 and not (path / "result.json").exists()
    assert load_checkpoint(path / "checkpoint.pt", config_hash(ranks.EXPLODING))["step"] == 4
    assert errors[0][1] == errors[1][1] and "cannot share a batch of 5" in errors[0][1]


def test_two_processes_resume_to_the_bit(folder):
    """Rank 1 is killed at step 10, torchrun starts both anew, once, and they take up the checkpoint of step 8.

    The model has batch norm and draws samples."""
    output = torchrun("killed", folder, restarts=1, LITVAE_TEST_RANK="1", LITVAE_TEST_STEP="10")
    assert "SIGKILL" in output or "exitcode: -9" in output, output
    whole, killed = (run_path(ranks.TWO, folder / name) for name in ("whole", "killed"))
    assert metrics(killed) == metrics(whole) and result(killed) == result(whole)
    assert weights(killed) == weights(whole)
