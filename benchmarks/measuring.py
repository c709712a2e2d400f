"""What the benchmarks count and time: CPU seconds, kernels, memory."""
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Kernels(TorchDispatchMode):
    "Counts the aten operations that compute: no views, no allocations, no questions about types, no markers."
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        idle = ("aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.promote_types", "profiler.")
        if not function.is_view and not str(function).startswith(idle): self.count += 1
        return function(*args, **(kwargs or {}))


def saved_bytes(step):
    "Bytes that the forward pass keeps for the backward pass, each storage once, parameters left out."
    own, kept = {p.untyped_storage().data_ptr() for p in step.model.parameters()}, {}
    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own: kept[storage.data_ptr()] = storage.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): step.loss()
    return sum(kept.values())


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
