"What a run folder holds, and whether two of them hold the same."
import json
from pathlib import Path

import torch

from litvae.core.files import read_json

FINISHED = {"config.json", "metrics.jsonl", "weights.safetensors", "result.json"}


def contents(path):
    "All files of a folder by name, but the lock."
    return {p.name: p.read_bytes() for p in Path(path).iterdir() if p.is_file() and p.name != ".lock"}


def weights(path): return (Path(path) / "weights.safetensors").read_bytes()


def metrics(path):
    "The lines of metrics.jsonl without the seconds."
    lines = (Path(path) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def result(path):
    "result.json without what may differ between two runs of one configuration."
    values = read_json(Path(path) / "result.json")
    return {name: value for name, value in values.items() if name not in ("seconds", "environment")}


def assert_same_run(path, reference):
    assert metrics(path) == metrics(reference)
    assert result(path) == result(reference)
    assert weights(path) == weights(reference), "the weights differ"         # the files, byte for byte


def logged(path):
    "The steps in the complete lines of metrics.jsonl; it may be being written."
    try: lines = (Path(path) / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError: return []
    return [json.loads(line)["step"] for line in lines]


def equal(a, b):
    "Whether two states of tensors, containers and plain values are the same, types included."
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b): return False
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b
