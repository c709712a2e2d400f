"""What the benchmarks share: one check that two forms of a step agree, CPU seconds, memory."""
import time

import torch


def same_loss_and_gradients(make, bound):
    """The largest difference of loss and gradients between the steps `make(False)` and `make(True)`, with one noise
    for both, relative to the largest number of each; fails beyond `bound`."""
    found = []
    for plain in (False, True):
        step = make(plain)
        torch.manual_seed(0)
        loss = step.loss()
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in step.model.parameters()])
    worst = max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(*found))
    assert worst < bound, f"the two forms differ by {worst:.1e}"
    return worst


def resident(field):
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def peak_growth(step):
    "Bytes by which the resident memory of the process grew at most during a step (Linux), None elsewhere."
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f: f.write("5")  # forgets the old peak
        before = resident("VmRSS")
        step()
        return resident("VmHWM") - before
    except OSError: return None


def timed(call):
    started = time.process_time()
    call()
    return time.process_time() - started
