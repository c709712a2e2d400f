"""Processes to be killed.

Importing torch takes seconds, so the children are forked by a server process (`multiprocessing`'s forkserver) that
has imported torch and litvae and done nothing else. For what these tests ask, such a child is as good as a program
started by hand: it is a process of its own with its own files and locks, it shares no memory with the test, SIGKILL
gives it no chance to tidy up, and nothing of an earlier child lives on in the server. Programs started in the ordinary
way are killed in test_distributed.py (torchrun) and in the tests of the pool (spawn)."""
import multiprocessing, os, signal, sys, threading, time

from tqdm import tqdm

from litvae.core.files import LitvaeError
from litvae.core.runs import RunConfig, train_or_load

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["litvae.genesis.vanilla", "torch._dynamo"])     # optimisers import the latter
REFUSED = 3                                                        # exit code after a LitvaeError


def start(config, root, log, prepare=(), **options):
    """Start `train_or_load(config, root, **options)` in a process of its own, and return that.

    What it prints, and the one line of a `LitvaeError`, go to the file `log`. `prepare` is called first: (function,
    *arguments)."""
    child = context.Process(target=_train, args=(config.to_dict(), str(root), str(log), prepare, options), daemon=True)
    child.start()
    return child


def end_of(child, patience=120):
    "The exit code of `child`, awaited; `AssertionError` if it hangs, and then it is killed."
    child.join(patience)
    if child.exitcode is None:
        child.kill(), child.join()
        raise AssertionError(f"the process had not ended after {patience} seconds")
    return child.exitcode


def _train(config, root, log, prepare, options):
    import helpers.tasks                                           # registers the tasks
    tqdm.set_lock(threading.RLock())    # its own is a semaphore, which would outlive a killed child
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1), os.dup2(1, 2)
    if prepare: prepare[0](*prepare[1:])
    try: train_or_load(RunConfig.from_dict(config), root, progress=False, **options)
    except LitvaeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(REFUSED)


def die_at_write(number, how):
    """Prepare a process to kill itself at its write number `number`, counted by the final renames of complete files.

    `how` is "half" (the temporary file is cut to half its length and not renamed) or "after" (it was just renamed)."""
    rename, count = os.replace, 0

    def replace(source, target, **options):
        nonlocal count
        count += 1
        if count == number and how == "half":
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **options)
        if count == number: os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def limit_file_size(limit):
    "Prepare a process so that no file of its may grow beyond `limit` bytes: writing fails as it would under a quota."
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def wait_until(condition, child=None, patience=60):
    "Poll `condition()` until it is true; False if `child` ended before, `AssertionError` after `patience` seconds."
    end = time.monotonic() + patience
    while not condition():
        if child is not None and not child.is_alive(): return bool(condition())
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)
    return True
