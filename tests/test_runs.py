"The contract of a run: exact resume after any kill, one trainer at a time, damaged files named, full disks survived."
import concurrent.futures, json, os, pickle, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch

from helpers.compare import FINISHED, assert_same_run, contents, equal, logged, metrics, weights
from helpers.processes import REFUSED, die_at_write, end_of, limit_file_size, start, wait_until
from helpers.tasks import changed, config_hash, toy, vanilla
from litvae.core.files import CorruptFileError, LitvaeError, read_json, write_json
from litvae.core.pool import steps_done, train_all
from litvae.core.runs import (Run, RunConfig, build_task, find_run, load_checkpoint, run_path, save_checkpoint,
                              train_or_load)
from litvae.core.training import NonFiniteLoss, Trainer


def train(config, root): return train_or_load(config, root, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished run of the toy; tests copy it before they damage it."
    return train(toy(), tmp_path_factory.mktemp("finished")).path


@pytest.fixture
def copy(finished, tmp_path):
    "A copy of the finished run under `tmp_path`."
    return shutil.copytree(finished, run_path(toy(), tmp_path))


@pytest.fixture
def stopped(tmp_path):
    "A run of the toy under `tmp_path` that was left at step 8 of 12, with a checkpoint."
    child = start(toy(), tmp_path, tmp_path / "log", prepare=(die_at_write, 4, "after"))     # the second checkpoint
    path = run_path(toy(), tmp_path)
    assert end_of(child) == -signal.SIGKILL and logged(path) == [2, 4, 6, 8]
    assert load_checkpoint(path / "checkpoint.pt", config_hash(toy()))["step"] == 8
    return path


# Kills

@pytest.mark.parametrize("kind", ["sbd", "dc"])
def test_a_process_killed_at_ten_random_moments_ends_with_the_same_weights(kind, tmp_path):
    """A real VAE; half of its time goes into checkpoints. Each kill waits for a random number of lines in
    metrics.jsonl, then for a random few milliseconds, so that it lands within the training on any machine."""
    config = vanilla(f"killed-{kind}", kind, steps=160, log_every=2, checkpoint_every=2)
    reference = train(config, tmp_path / "reference").path
    path, random = run_path(config, tmp_path / "killed"), np.random.default_rng(1)
    file = path / "metrics.jsonl"
    state = lambda: (file.stat().st_ino, file.stat().st_size) if file.exists() else (0, 0)
    kills, steps = 0, []
    for attempt in range(10):
        old, _ = state()
        child = start(config, path.parents[1], tmp_path / "log")
        wait_until(lambda: state()[0] != old, child)               # a start writes the metrics anew
        size = state()[1] + 150 * int(random.integers(0, 4))
        wait_until(lambda: state()[1] > size, child)
        time.sleep(random.uniform(0, 0.01))
        child.kill(), child.join()
        kills += child.exitcode == -signal.SIGKILL and not (path / "result.json").exists()
        steps.append(max(logged(path), default=0))
    print(f"killed at steps {steps}")
    assert kills >= 7, "the training ended before the kills"
    assert len(set(steps)) >= 5 and steps[-1] < config.steps
    last = start(config, path.parents[1], tmp_path / "log")
    assert end_of(last) == 0 and (tmp_path / "log").read_text() == ""
    assert_same_run(path, reference)
    assert len(metrics(path)) == 80


def deaths(tmp_path, how):
    "For each file that the toy's run writes: the path of a run that died there, and that has been started again."
    for number in range(1, 100):
        root = tmp_path / f"{how}{number}"
        root.mkdir()
        child = start(toy(), root, root / "log", prepare=(die_at_write, number, how))
        if end_of(child) == 0: break                               # it wrote fewer files than that
        assert child.exitcode == -signal.SIGKILL
        path = run_path(toy(), root)
        if (path / "metrics.jsonl").exists() and not (path / "result.json").exists():
            with open(path / "metrics.jsonl", "a") as f: f.write('{"step": 13, "lo')    # a line cut short
        child = start(toy(), root, root / "log")
        assert end_of(child) == 0, (root / "log").read_text()
        yield path
    assert number == 8                                             # two small files, three checkpoints, weights, result


@pytest.mark.parametrize("how", ["half", "after"])
def test_a_kill_within_or_right_after_any_write_changes_nothing(how, tmp_path, finished):
    for path in deaths(tmp_path, how): assert_same_run(path, finished)


def test_kills_leave_no_litter(tmp_path):
    "Half-written temporary files of dead processes are as large as checkpoints; a finished run has none left."
    for how in ("half", "after"):
        for path in deaths(tmp_path, how): assert set(contents(path)) - {"checkpoint.pt"} == FINISHED


def test_looking_more_often_changes_no_weight(tmp_path):
    "Logging, evaluating and checkpointing draw no random numbers that training sees, and leave batch norm alone."
    often = dict(log_every=1, evaluate_every=3, checkpoint_every=5)
    runs = [train(vanilla("looked", "dc", **changes), tmp_path) for changes in ({}, often)]
    assert weights(runs[0].path) == weights(runs[1].path)
    assert runs[1].metrics.validation_error.notna().sum() == 20 // 3
    assert runs[1].metrics.seconds.is_monotonic_increasing


# Locks

def gated(tmp_path, at=6): return toy("gated", "helpers.Gated", model={"gate": str(tmp_path / "gate"), "at": at})


@pytest.fixture
def holder(tmp_path):
    "A process that trains `gated(tmp_path)` and has stopped after step 4 of 12, before a gate that is closed."
    child = start(gated(tmp_path), tmp_path, tmp_path / "holder.log")
    path = run_path(gated(tmp_path), tmp_path)
    ready = lambda: logged(path) == [2, 4] and (path / "checkpoint.pt").exists()
    assert wait_until(ready, child), (tmp_path / "holder.log").read_text()
    yield child
    child.kill(), child.join()


def start_waiting(config, root):
    "A second process for a run, at the point where it has said that it waits."
    log = root / "waiting.log"
    child = start(config, root, log)
    assert wait_until(lambda: log.exists() and "waiting for it" in log.read_text(), child)
    return child


def test_a_second_process_is_refused_or_waits(tmp_path, holder):
    config = gated(tmp_path)
    path, before = run_path(config, tmp_path), contents(run_path(config, tmp_path))
    refused = start(config, tmp_path, tmp_path / "refused.log", wait=False)
    assert end_of(refused, 20) == REFUSED
    message = (tmp_path / "refused.log").read_text()
    assert message.count("\n") == 1 and config.run_id in message and "another process" in message
    with pytest.raises(LitvaeError, match="another process"): train_or_load(config, tmp_path, wait=False)
    waiting = start_waiting(config, tmp_path)
    assert waiting.is_alive() and holder.is_alive() and contents(path) == before
    (tmp_path / "gate").touch()
    assert end_of(holder) == end_of(waiting) == 0
    assert logged(path) == [2, 4, 6, 8, 10, 12] and set(contents(path)) == FINISHED


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    config = gated(tmp_path)
    waiting = start_waiting(config, tmp_path)
    os.kill(holder.pid, signal.SIGSTOP)
    (tmp_path / "gate").touch()                                    # it opens for the one who waits, not for the holder
    os.kill(holder.pid, signal.SIGKILL)
    assert end_of(holder) == -signal.SIGKILL and end_of(waiting) == 0
    assert logged(run_path(config, tmp_path)) == [2, 4, 6, 8, 10, 12]
    reference = train(toy(), tmp_path / "reference").path
    assert weights(run_path(config, tmp_path)) == weights(reference)


def test_four_processes_started_at_once_train_one_run(tmp_path, finished):
    children = [start(toy(), tmp_path, tmp_path / "log") for _ in range(4)]
    assert [end_of(child) for child in children] == [0] * 4, (tmp_path / "log").read_text()
    assert_same_run(run_path(toy(), tmp_path), finished)
    assert set(contents(run_path(toy(), tmp_path))) == FINISHED


# By name

@pytest.fixture
def many(tmp_path):
    "Fourteen runs of two sets, the last of them unfinished; the folder and their configurations."
    configs = [toy(f"set{n}-latent{latent}") for n in "ab" for latent in (1, 4, 16, 64, 128, 256, 512)]
    for config in configs:
        run_path(config, tmp_path).mkdir(parents=True)
        write_json(run_path(config, tmp_path) / "config.json", config.to_dict())
        if config != configs[-1]: write_json(run_path(config, tmp_path) / "result.json", {})
    return tmp_path, configs


def test_a_run_is_found_by_whatever_only_it_has(many):
    root, configs = many
    first = configs[0]
    for name in (first.run_id, "seta-latent1", first.run_id[-8:]):
        assert find_run(name, root).config == first
    assert find_run("seta-latent51", str(root)).config.name == "seta-latent512"
    assert find_run("latent512", root).config.name == "seta-latent512"       # the other one is not finished


@pytest.mark.parametrize("name, said, listed", [
    ("latent4", "is meant by 'latent4' alone", 2), ("set", "and 3 more", 10), ("", "and 3 more", 10),
    ("setb-latent512", "no run 'setb-latent512' is finished", 10), ("sprites", "no run 'sprites'", 10)])
def test_a_name_of_none_or_several_gets_a_list_of_ten_at_most(many, name, said, listed):
    with pytest.raises(LitvaeError, match=said) as caught: find_run(name, many[0])
    assert str(caught.value).count("-latent") - name.count("-latent") == listed and "\n" not in str(caught.value)


def test_no_run_is_found_where_there_is_none(tmp_path):
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(LitvaeError, match="holds no finished run"): find_run("x", root)


# Damaged files

def assert_refused(path, kind=CorruptFileError, match=None):
    "Training again raises one clear error, and every file stays as it is."
    before = contents(path)
    with pytest.raises(kind, match=match) as caught: train(toy(), path.parents[1])
    assert type(caught.value) is kind and str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert contents(path) == before


@pytest.mark.parametrize("length", [0, 1, 30, 2000, -2000, -100, -22, -1])
def test_a_truncated_checkpoint_is_refused(stopped, length):
    file = stopped / "checkpoint.pt"
    os.truncate(file, length % file.stat().st_size)                # negative: from the end
    assert_refused(stopped)


def test_no_flipped_bit_of_a_checkpoint_gets_through(tmp_path):
    "One bit of the file is turned, wherever: what is loaded is what was saved, or there is one clear error."
    optimiser = {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"lr": 0.1}]}
    state = {"task": {"w": torch.randn(3)}, "optimisers": {"model": optimiser}, "step": 7, "seconds": 1.5}
    state["config_hash"] = "ab" * 32
    file, flipped = tmp_path / "checkpoint.pt", tmp_path / "flipped.pt"
    save_checkpoint(file, state)
    raw, refused, other = file.read_bytes(), 0, {}
    for place in range(0, len(raw), 3):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << (place * 5 % 8)
        flipped.write_bytes(damaged)
        try: loaded = load_checkpoint(flipped, "ab" * 32)
        except LitvaeError: refused += 1
        except Exception as error: other.setdefault(type(error).__name__, f"byte {place}: {error}")
        else: assert equal(loaded, state), f"a flipped bit of byte {place} went unnoticed"
    assert not other, other
    assert refused > len(raw) / 6                                  # half of the file is padding


def test_a_checkpoint_of_another_configuration_is_refused(stopped, tmp_path):
    other = changed(toy(), seed=1)
    moved = run_path(other, tmp_path)
    stopped.rename(moved)
    before = contents(moved)
    with pytest.raises(LitvaeError, match="another configuration"): train(other, tmp_path)
    assert contents(moved).keys() == before.keys() and contents(moved)["checkpoint.pt"] == before["checkpoint.pt"]
    assert contents(moved)["metrics.jsonl"] == before["metrics.jsonl"]


def test_a_finished_run_of_another_configuration_is_refused(copy, tmp_path):
    other = changed(toy(), seed=1)
    copy.rename(run_path(other, tmp_path))
    with pytest.raises(LitvaeError, match="another configuration"): train(other, tmp_path)


def alter_checkpoint(path, change):
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    change(state)
    save_checkpoint(path / "checkpoint.pt", state)


@pytest.mark.parametrize("name, change", {
    "shape": lambda state: state["task"].update({"model.encode.weight": torch.zeros(5, 16)}),
    "missing weight": lambda state: state["task"].pop("model.encode.bias"),
    "unknown weight": lambda state: state["task"].update(other=torch.zeros(1)),
    "optimiser shape": lambda state: state["optimisers"]["model"]["state"][0].update(exp_avg=torch.zeros(5, 16)),
    "optimiser groups": lambda state: state["optimisers"]["model"].update(param_groups=[]),
    "no optimiser": lambda state: state.pop("optimisers"),
    "no step": lambda state: state.pop("step"),
    "step of another kind": lambda state: state.update(step="eight"),
    "no seconds": lambda state: state.pop("seconds"),
}.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_checkpoint_of_the_wrong_shape_is_refused(stopped, name, change):
    "The right configuration, but the state does not fit: the code has changed, or somebody edited the file."
    alter_checkpoint(stopped, change)
    assert_refused(stopped)


class Boom:
    "A pickle of this writes a file when it is loaded."
    def __init__(self, path): self.path = path
    def __reduce__(self): return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_a_pickle_that_runs_code_is_not_run(stopped, tmp_path, form):
    mark, state = tmp_path / "boom", {"config_hash": config_hash(toy()), "task": Boom(tmp_path / "boom")}
    with open(stopped / "checkpoint.pt", "wb") as f:
        if form == "pickle": pickle.dump(state, f)
        else: torch.save(state, f, _use_new_zipfile_serialization=form == "torch")
    assert_refused(stopped)
    assert not mark.exists()
    with open(stopped / "checkpoint.pt", "rb") as f:
        pickle.load(f) if form == "pickle" else torch.load(f, weights_only=False)
    assert mark.exists()                                           # a careless reader would have run it


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"null", b'{"paper": "demo"}', b"\xff\xfe{}"], ids=repr)
def test_a_damaged_config_is_named(copy, text):
    (copy / "config.json").write_bytes(text)
    with pytest.raises(LitvaeError) as caught: Run(copy)
    assert "config.json" in str(caught.value)


def test_a_damaged_config_of_an_unfinished_run_is_written_anew(stopped, finished):
    (stopped / "config.json").write_bytes(b"{")
    assert_same_run(train(toy(), stopped.parents[1]).path, finished)


@pytest.mark.parametrize("text", [b"", b'{"metrics": {', b"[]", b"null", b"{}", b"\xff\xfe{}"], ids=repr)
def test_a_damaged_result_is_named(copy, text):
    (copy / "result.json").write_bytes(text)
    with pytest.raises(CorruptFileError, match="result.json"): train(toy(), copy.parents[1]).result


DAMAGED_LINES = {"cut": b'{"step": 6, "lo', "number": b"3", "list": b"[1, 2]", "null": b"null", "zeros": b"\0" * 20,
                 "no step": b'{"loss": 1.0}', "not utf-8": b'{"step": 6, "los\xe5": 1.0}',
                 "step of another kind": b'{"step": "six", "loss": 1.0}'}


@pytest.mark.parametrize("name, line", DAMAGED_LINES.items(), ids=DAMAGED_LINES)
def test_a_damaged_line_in_the_middle_of_the_metrics_is_named(copy, stopped_elsewhere, name, line):
    for path in (copy, stopped_elsewhere):
        lines = (path / "metrics.jsonl").read_bytes().split(b"\n")
        (path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(CorruptFileError, match=r"metrics.jsonl, line 2\b"): Run(copy).metrics
    assert_refused(stopped_elsewhere, match=r"metrics.jsonl, line 2\b")
    assert isinstance(steps_done(toy(), stopped_elsewhere.parents[1]), int)


@pytest.fixture
def stopped_elsewhere(tmp_path):
    "As `stopped`, without a process: a checkpoint at step 8 in `tmp_path`/elsewhere."
    path = run_path(toy(), tmp_path / "elsewhere")
    path.mkdir(parents=True)
    trainer = Trainer(build_task(toy()), learning_rate=toy().learning_rate, batch_size=toy().batch_size)
    rows = [{"step": step, "seconds": 0.1, **trainer.advance(2)} for step in (2, 4, 6, 8)]
    state = {**trainer.state_dict(), "seconds": 1.0, "config_hash": config_hash(toy())}
    save_checkpoint(path / "checkpoint.pt", state)
    write_json(path / "config.json", toy().to_dict())
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_progress_can_be_read_from_any_rubbish(tmp_path):
    "`steps_done` looks at a file that another process is writing: whatever it finds, it answers with a number."
    path = run_path(toy(), tmp_path)
    path.mkdir(parents=True)
    for text in (b"", b"\n", b'{"step": ', b'{"step": }', b'{"step": x3, "loss": 1}', b'{"step": 3.5}', b'{}',
                 b'{"step": 999}', b'{"step": 4}\n{"step": 6, "step": 7', b"\xff" * 3000, b'{"step": -4}'):
        (path / "metrics.jsonl").write_bytes(text)
        assert 0 <= steps_done(toy(), tmp_path) <= toy().steps, text


@pytest.mark.parametrize("text", [None, b"", b'{"step": 2, "seconds": 0.1, "loss": 1.0}\n'],
                         ids=["absent", "empty", "cut"])
def test_metrics_that_a_finished_run_has_lost_are_missed(copy, text):
    "A kill may cut the last line of a run under way. In a finished run a line that is not there is a damaged file."
    (copy / "metrics.jsonl").unlink()
    if text is not None: (copy / "metrics.jsonl").write_bytes(text)
    with pytest.raises(CorruptFileError, match="metrics.jsonl"): train(toy(), copy.parents[1]).metrics


def assert_weights_refused(copy):
    before = contents(copy)
    with pytest.raises(CorruptFileError, match="weights.safetensors"): train(toy(), copy.parents[1]).load_task()
    assert contents(copy) == before


@pytest.mark.parametrize("length", [None, 0, 7, 100, -1])
def test_truncated_or_missing_weights_are_named(copy, length):
    file = copy / "weights.safetensors"
    if length is None: file.unlink()
    else: os.truncate(file, length % file.stat().st_size)
    assert_weights_refused(copy)


@pytest.mark.parametrize("place", [3, 20, 60, -1, -40])
def test_a_flipped_bit_in_the_weights_is_noticed(copy, place):
    "safetensors files have no checksum of their own."
    file = copy / "weights.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[place] ^= 4
    file.write_bytes(damaged)
    assert_weights_refused(copy)


@pytest.mark.parametrize("change", [{"model.encode.weight": torch.zeros(5, 16)}, {"other": torch.zeros(1)},
                                    {"model.encode.bias": None}], ids=["shape", "unknown", "missing"])
def test_weights_of_another_model_are_refused(copy, change):
    file = copy / "weights.safetensors"
    state = safetensors.torch.load_file(file) | change
    safetensors.torch.save_file({name: value for name, value in state.items() if value is not None}, file)
    assert_weights_refused(copy)


def test_the_weights_of_a_finished_run_give_the_numbers_of_its_result(copy):
    run = train(toy(), copy.parents[1])
    assert not run.load_task().training
    torch.manual_seed(0)
    assert run.load_task().seen == toy().steps and set(run.result["metrics"]) == {"validation_err", "beta"}


# Bad configurations

@pytest.mark.parametrize("task", [
    "", "Toy", "os.system", "litvae", "litvae..x", "litvae.genesis.vanilla", "litvae.genesis.vanilla.Nothing",
    "litvae.genesis.nothing.Task", "litvae.genesis.vanilla.KINDS", "litvae.core.files.write_text",
    "litvae.core.files.LitvaeError", "litvae.core.runs.os.system"])
def test_an_unknown_task_is_refused(task, tmp_path):
    with pytest.raises(LitvaeError, match="unknown task"): train(toy(task=task), tmp_path)
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("values", [{"lerning_rate": 1}, {"Steps": 3, "batchsize": 2}])
def test_unknown_keys_of_a_configuration_are_named(values):
    with pytest.raises(LitvaeError) as caught: RunConfig.from_dict(toy().to_dict() | values)
    assert all(name in str(caught.value) for name in values)


@pytest.mark.parametrize("missing", ["paper", "task", "steps", "model"])
def test_missing_keys_of_a_configuration_are_named(missing):
    values = toy().to_dict()
    del values[missing]
    with pytest.raises(LitvaeError, match=missing): RunConfig.from_dict(values)


@pytest.mark.parametrize("values", [
    {"steps": 0}, {"steps": -3}, {"steps": 10.5}, {"steps": "12"}, {"steps": None}, {"batch_size": 0},
    {"batch_size": 65},
    {"log_every": 0}, {"checkpoint_every": 0}, {"evaluate_every": -5}, {"precision": "fp8"}, {"learning_rate": "fast"},
    {"learning_rate": float("nan")}, {"learning_rate": -1.0}, {"seed": "zero"}, {"seed": 0.5}, {"seed": -1},
    {"name": ""}, {"name": "a/b"}, {"name": "a b"}, {"paper": ""}, {"paper": "../demo"}, {"paper": "/demo"},
    {"model": [1]}, {"data": None}], ids=lambda values: "-".join(map(repr, *values.items())))
def test_impossible_values_are_refused_with_one_clear_error(values, tmp_path):
    with pytest.raises(LitvaeError): train(RunConfig.from_dict(toy().to_dict() | values), tmp_path / "runs")
    assert not list(tmp_path.rglob("result.json")) and not list(tmp_path.rglob("weights.safetensors"))
    assert [p.name for p in tmp_path.iterdir()] in ([], ["runs"])  # nothing outside


@pytest.mark.parametrize("part", ["model", "objective", "data"])
def test_unknown_parameters_of_model_objective_and_data_are_named(part, tmp_path):
    config = vanilla("misspelt")
    config = changed(config, **{part: getattr(config, part) | {"lattent": 3}})
    with pytest.raises(LitvaeError, match="lattent"): train(config, tmp_path)


def test_a_configuration_survives_json(tmp_path):
    config = vanilla("json", "dc")
    again = RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.run_id == config.run_id
    assert changed(config, seed=1).run_id != config.run_id


def test_two_settings_never_share_a_folder():
    base = toy()
    others = {"paper": "other", "name": "other", "task": "x", "data": {"n": 1}, "model": {"width": 8}, "steps": 13,
              "objective": {"goal": 1}, "batch_size": 5, "learning_rate": 0.5, "seed": 1, "precision": "bf16",
              "log_every": 3, "checkpoint_every": 5, "evaluate_every": 6, "version": 2}
    assert set(others) == set(base.to_dict())
    paths = {run_path(changed(base, **{key: value})) for key, value in others.items()}
    assert len(paths | {run_path(base)}) == len(others) + 1


# A loss that is not finite

@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint_and_a_report(value, tmp_path, stopped):
    config = toy("exploding", "helpers.Exploding", model={"at": 11, "value": value})
    path = run_path(config, tmp_path)
    with pytest.raises(NonFiniteLoss, match="step 11") as caught: train(config, tmp_path)
    assert caught.value.step == 11
    kept = load_checkpoint(path / "checkpoint.pt", config_hash(config))
    good = load_checkpoint(stopped / "checkpoint.pt", config_hash(toy()))
    assert all(equal(kept[key], good[key]) for key in ("step", "task", "optimisers"))
    report = read_json(path / "failure.json")
    assert report["step"] == 11 and "step 11" in report["message"] and set(report["parts"]) == {"loss", "err", "size"}
    assert set(contents(path)) == {"config.json", "metrics.jsonl", "checkpoint.pt", "failure.json"}
    assert logged(path) == [2, 4, 6, 8, 10]
    before = metrics(path), contents(path)["checkpoint.pt"], contents(path)["failure.json"]
    with pytest.raises(NonFiniteLoss, match="step 11"): train(config, tmp_path)              # from the checkpoint
    assert before == (metrics(path), contents(path)["checkpoint.pt"], contents(path)["failure.json"])
    with pytest.raises(LitvaeError, match="not finished"): Run(path).result


def test_the_very_first_loss_may_be_bad(tmp_path):
    config = toy("exploding", "helpers.Exploding", model={"at": 1, "value": "nan"}, log_every=100)
    with pytest.raises(NonFiniteLoss, match="step 1 "): train(config, tmp_path)
    assert set(contents(run_path(config, tmp_path))) == {"config.json", "metrics.jsonl", "failure.json"}


@pytest.mark.parametrize("at", [8, 12])
def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(at, tmp_path):
    "The loss of the step before a checkpoint is finite, the weights after it are not."
    config = toy("gradient", "helpers.BadGradient", model={"at": at})
    path = run_path(config, tmp_path)
    with pytest.raises(NonFiniteLoss): train(config, tmp_path)
    state = load_checkpoint(path / "checkpoint.pt", config_hash(config))
    assert state["step"] == at - 4 and all(value.isfinite().all() for value in state["task"].values())
    assert read_json(path / "failure.json")["step"] == at and not (path / "result.json").exists()


def test_a_final_number_that_is_not_finite_is_one_clear_error(tmp_path):
    config = toy("evaluation", "helpers.BadEvaluation")
    with pytest.raises(LitvaeError, match="validation_err"): train(config, tmp_path)
    assert not (run_path(config, tmp_path) / "result.json").exists()


def test_the_error_of_a_worker_reaches_its_parent():
    "Exceptions travel between processes as pickles."
    error = pickle.loads(pickle.dumps(NonFiniteLoss(7, {"loss": float("nan")})))
    assert type(error) is NonFiniteLoss and error.step == 7 and "step 7" in str(error)
    assert np.isnan(error.parts["loss"])


# Disks

WIDE = toy("wide", model={"width": 2000})                          # weights of 70 kB, a checkpoint of 200 kB


@pytest.fixture
def disk(tmp_path):
    "A function (size, options) that mounts, or changes, a small file system of its own at the folder it returns."
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size, *options):
        again = ["remount"] if os.path.ismount(folder) else []
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*again, f"size={size}k", *options]), "none", str(folder)]
        try: done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError: pytest.skip("there is no mount command to make a small disk with")
        if done.returncode and not again: pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        assert not done.returncode, done.stderr
        return folder

    yield mount
    if os.path.ismount(folder): subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory): return train(WIDE, tmp_path_factory.mktemp("wide")).path


def assert_whole_files_only(path, allowed=frozenset()):
    "Every file under its own name can be read to the end, nothing looks finished, no temporary file takes up space."
    names = set(contents(path)) if path.exists() else set()
    assert names <= {"config.json", "metrics.jsonl", "checkpoint.pt"} | allowed
    if "config.json" in names: assert Run(path).config == RunConfig.from_dict(read_json(path / "config.json"))
    if "checkpoint.pt" in names: load_checkpoint(path / "checkpoint.pt", config_hash(Run(path).config))
    if names: assert not Run(path).finished


@pytest.mark.parametrize("size, step", [(4, None), (8, None), (100, None), (300, 4), (412, 4)], ids=str)
def test_a_full_disk_loses_nothing(size, step, disk, wide, tmp_path):
    "Too full for anything, for the metrics, for the first and for the second checkpoint; then somebody makes room."
    root = disk(size)
    path = run_path(WIDE, root)
    with pytest.raises(LitvaeError, match="disk is full") as caught: train(WIDE, root)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)
    assert_whole_files_only(path)
    assert (path / "checkpoint.pt").exists() == (step is not None)
    if step: assert load_checkpoint(path / "checkpoint.pt", config_hash(WIDE))["step"] == step
    disk(4000)
    assert_same_run(train(WIDE, root).path, wide)


def test_a_disk_that_fills_up_before_the_weights_are_written(disk, tmp_path, wide):
    root = disk(800)
    config = toy("wide", "helpers.Filling", model={"width": 2000, "filler": str(root / "filler")})
    path = run_path(config, root)
    with pytest.raises(LitvaeError, match="disk is full"): train(config, root)
    assert_whole_files_only(path)
    assert load_checkpoint(path / "checkpoint.pt", config_hash(config))["step"] == 12
    (root / "filler").write_bytes(b"")                             # room again
    train(config, root)
    assert weights(path) == weights(wide) and metrics(path) == metrics(wide)


def test_a_read_only_disk_is_one_clear_error_and_finished_runs_can_be_read(disk, finished):
    root = disk(4000)
    path = shutil.copytree(finished, run_path(toy(), root))
    disk(4000, "ro")
    assert_same_run(train(toy(), root).path, finished)
    train(toy(), root).load_task()
    for config in (changed(toy(), seed=1), changed(toy(), seed=1, paper="other")):
        with pytest.raises(LitvaeError, match="read-only") as caught: train(config, root)
        assert "\n" not in str(caught.value)
    assert set(contents(path)) == FINISHED


def test_an_unfinished_run_on_a_read_only_disk_stays_as_it_is(disk, stopped, finished):
    root = disk(4000)
    path = shutil.copytree(stopped, run_path(toy(), root))
    before = contents(path)
    disk(4000, "ro")
    with pytest.raises(LitvaeError, match="read-only"): train(toy(), root)
    assert contents(path) == before
    disk(4000, "rw")
    assert_same_run(train(toy(), root).path, finished)


@pytest.mark.parametrize("limit, changes", [
    (1000, {"log_every": 1, "checkpoint_every": 99}), (1000, {}), (150_000, {}), (50_000, {"checkpoint_every": 99})],
    ids=["metrics", "checkpoint", "rest of the checkpoint", "weights"])
def test_files_that_may_not_grow_are_one_clear_error(limit, changes, tmp_path, wide):
    "A limit on the size of files, as queues and quotas set it, needs no disk of its own."
    config = changed(WIDE, **changes)
    path = run_path(config, tmp_path)
    child = start(config, tmp_path, tmp_path / "log", prepare=(limit_file_size, limit))
    code, log = end_of(child), (tmp_path / "log").read_text()
    assert code == REFUSED and log.startswith("LitvaeError: cannot write ") and log.count("\n") == 1, log
    assert_whole_files_only(path)
    assert weights(train(config, tmp_path).path) == weights(wide)


def test_a_file_in_the_place_of_the_folder_is_one_clear_error(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(LitvaeError, match="cannot write"): train(toy(), tmp_path / "runs")
    assert (tmp_path / "runs").read_text() == "not a folder"


def test_a_file_that_a_task_misses_is_not_called_a_full_disk(tmp_path):
    with pytest.raises((LitvaeError, OSError), match="/nowhere/scenes.npz") as caught:
        train(toy(task="helpers.Missing"), tmp_path)
    assert "free some space" not in str(caught.value)


# The pool

def trained_by(path):
    "The process that has the metrics of a run open, or None."
    for process in psutil.Process().children(recursive=True):
        try:
            if any(Path(file.path) == path / "metrics.jsonl" for file in process.open_files()): return process
        except psutil.Error: continue


def test_a_killed_worker_stops_no_other_run(tmp_path, capfd):
    "Three runs for two workers; the worker of the first is killed. The second call needs the first run only."
    victim, *others = configs = [vanilla(name, steps=steps, log_every=5, checkpoint_every=10)
                                 for name, steps in (("victim", 500), ("beside", 200), ("after", 20))]
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        future = thread.submit(train_all, configs, jobs=2, root=tmp_path, progress=False)
        wait_until(lambda: all(steps_done(config, tmp_path) > 20 for config in configs[:2]) or future.done())
        assert not future.done(), future.exception()
        trained_by(run_path(victim, tmp_path)).send_signal(signal.SIGKILL)
        error = future.exception(timeout=300)
    assert isinstance(error, LitvaeError) and "1 of 3 runs failed" in str(error)
    assert "victim: a worker process was killed" in str(error)
    assert not any(config.name in str(error) for config in others)
    assert all(Run(run_path(config, tmp_path)).finished for config in others)
    kept = [contents(run_path(config, tmp_path)) for config in others]
    runs = train_all(configs, jobs=2, root=tmp_path, progress=False)
    assert [run.config for run in runs] == configs and all(run.finished for run in runs)
    assert kept == [contents(run_path(config, tmp_path)) for config in others]
    assert logged(runs[0].path) == list(range(5, 501, 5))


def test_a_diverging_run_stops_no_other_run(tmp_path):
    "The first diverges, the second has a batch larger than its data, the third is fine."
    fine = vanilla("fine")
    configs = [changed(fine, name="diverging", learning_rate=1e30), changed(fine, name="greedy", batch_size=100), fine]
    with pytest.raises(LitvaeError) as caught: train_all(configs, jobs=1, root=tmp_path, progress=False)
    message = str(caught.value)
    assert "2 of 3 runs failed" in message and "\n  fine" not in message
    assert "diverging: NonFiniteLoss" in message and "not finite at step" in message
    assert "greedy: LitvaeError" in message and "smaller batch" in message
    assert Run(run_path(fine, tmp_path)).finished and (run_path(configs[0], tmp_path) / "failure.json").exists()


def test_a_run_that_lacks_only_its_result_is_left_to_a_worker(tmp_path, monkeypatch):
    "It was killed after its last line of metrics; a sweep must not train it in the notebook's own process."
    config = vanilla("unfinished")
    path = train(config, tmp_path).path
    for name in ("result.json", "weights.safetensors"): (path / name).unlink()
    monkeypatch.setattr("litvae.core.runs.Trainer", None)          # in this process; workers import their own
    assert train_all([config], jobs=1, root=tmp_path, progress=False)[0].finished


def test_ctrl_c_ends_a_sweep_and_loses_nothing(tmp_path):
    "The signal goes to the whole group of processes, as from a terminal: no run begins after it, the next resumes."
    configs = [vanilla(f"run{number}", steps=300, log_every=5, checkpoint_every=10) for number in range(3)]
    (tmp_path / "sweep.json").write_text(json.dumps([config.to_dict() for config in configs]))
    (tmp_path / "sweep.py").write_text("""if __name__ == "__main__":
    import json
    from litvae.core.pool import train_all
    from litvae.core.runs import RunConfig
    configs = [RunConfig.from_dict(values) for values in json.load(open("sweep.json"))]
    train_all(configs, jobs=1, root=".", progress=False)
""")
    command = [sys.executable, "sweep.py"]
    with open(tmp_path / "log", "w") as log:
        sweep = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=log, stderr=log)
    wait_until(lambda: steps_done(configs[0], tmp_path) > 20 or sweep.poll() is not None)
    os.killpg(sweep.pid, signal.SIGINT)
    try: sweep.wait(60)
    finally:
        if sweep.poll() is None: os.killpg(sweep.pid, signal.SIGKILL), sweep.wait()
    assert sweep.returncode != 0 and "KeyboardInterrupt" in (tmp_path / "log").read_text()
    assert not run_path(configs[1], tmp_path).exists() and not run_path(configs[2], tmp_path).exists()
    assert not (run_path(configs[0], tmp_path) / "result.json").exists()
    run = train(configs[0], tmp_path)
    assert_same_run(run.path, train(configs[0], tmp_path / "reference").path)
