"""Inputs for every operator of litvae.kernels, used by test_kernels.py on the CPU, under sanitizers and on a GPU.

A case is (function, float32 tensors that may need a gradient, further arguments). Sizes are odd on purpose."""
import torch

from litvae.kernels.bn_glu import bn_glu
from litvae.kernels.contingency import contingency_tables
from litvae.kernels.crop import crop
from litvae.kernels.laplace import laplace_iwae
from litvae.kernels.log_mean_exp import log_mean_exp_normal
from litvae.kernels.mixture import mixture_nll
from litvae.kernels.ops import OPERATORS
from litvae.kernels.paste import paste
from litvae.kernels.stick_breaking import stick_breaking


def boxes(*shape):
    "Boxes inside, off the image, larger than it, and without an area."
    found = torch.rand(*shape, 4) * torch.tensor([0.5, 0.5, 1.0, 1.0]) + torch.tensor([0.2, 0.2, -0.5, -0.5])
    flat = found.view(-1, 4)
    for place, box in enumerate(([0.3, 0.4, 2.5, 0.0], [1.7, 1.3, 0.1, -0.1], [0.0, 0.0, 0.2, 0.1])):
        if place + 1 < len(flat): flat[place + 1] = torch.tensor(box)
    return found


def normalised(x, weight, bias, training=True):
    return bn_glu(x, weight, bias, torch.full_like(weight, 0.1), torch.full_like(weight, 1.5), training)


def cases():
    "name -> (function, tensors, other arguments); the same numbers at each call."
    torch.manual_seed(0)
    glimpses = torch.rand(2, 4, 3, 5, 6), torch.rand(2, 4, 1, 5, 6), boxes(2, 4)
    found = {
        "stick breaking": (stick_breaking, [torch.randn(2, 5, 1, 7, 5)], {}),
        "stick breaking, extreme": (stick_breaking, [torch.randn(1, 3, 1, 3, 3).sign() * 80], {}),
        "stick breaking, one slot": (stick_breaking, [torch.randn(1, 1, 1, 3, 3)], {}),
        "crop": (crop, [torch.rand(2, 3, 13, 11), boxes(2, 4)], {"size": (5, 6)}),
        "crop, one box": (crop, [torch.rand(1, 1, 8, 9), boxes(1, 1)], {"size": (3, 3)}),
        "bn_glu": (normalised, [torch.randn(3, 6, 7, 5), torch.rand(6) + 0.5, torch.randn(6)], {}),
        "bn_glu, one image": (normalised, [torch.randn(1, 2, 5, 3), torch.rand(2) + 0.5, torch.randn(2)], {}),
        "bn_glu, evaluation": (normalised, [torch.randn(2, 4, 3, 3), torch.rand(4) + 0.5, torch.randn(4)],
                               {"training": False}),
        "elu": (lambda x: OPERATORS["elu"](x), [torch.randn(3, 7, 5) * 3], {}),
        "log mean exp": (log_mean_exp_normal, [torch.randn(7, 5), torch.randn(9, 5), torch.rand(9, 5) + 0.3], {}),
        "log mean exp, one": (log_mean_exp_normal, [torch.randn(1, 3), torch.randn(1, 3), torch.rand(1, 3) + 0.3], {}),
        "laplace": (laplace_iwae, [torch.rand(3, 37), torch.rand(5, 3, 37), torch.randn(5, 3)], {"scale": 0.7}),
        "contingency": (contingency_tables, [torch.randint(0, 4, (3, 77)), torch.randint(0, 5, (3, 77))],
                        {"rows": 4, "columns": 5})}
    for weights in ("softmax", "share", "sum"):
        nearness = None if weights == "sum" else torch.rand(2, 4) * 3
        found[f"paste, {weights}"] = (lambda g, a, b, *n, weights=weights: torch.cat(
            paste(g, a, b, *(n or [None]), size=(13, 11), weights=weights), 1),
            [*glimpses] + ([] if nearness is None else [nearness]), {})
    for slots, joint in ((2, False), (5, False), (5, True), (9, False), (20, True)):
        x, means = torch.rand(2, 3, 7, 5), torch.rand(2, slots, 3, 7, 5)
        found[f"mixture, {slots} slots{', joint' * joint}"] = (
            mixture_nll, [x, means, torch.randn(2, slots, 1, 7, 5).log_softmax(1)], {"std": 0.3, "joint": joint})
    return found


def run(case, device="cpu"):
    "Value and gradients of a case, detached, on the CPU."
    function, tensors, others = case
    inputs = [t.detach().to(device).requires_grad_(t.is_floating_point()) for t in tensors]
    value = function(*inputs, **others)
    if not value.is_floating_point(): return [value.cpu()]
    weights = torch.linspace(0.5, 1.5, value.numel()).view_as(value).to(device)
    return [t.detach().cpu() for t in (value, *torch.autograd.grad((weights * value).sum(), inputs))]


def worst(found, expected):
    "The largest difference of two results of `run`, relative to the largest number of each tensor (at least one)."
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)).item()
               for a, b in zip(found, expected, strict=True))


def sanitized():
    "Run a case of each kernel through sources built with the address and undefined-behaviour sanitizers."
    from litvae.kernels.emulation import Emulator
    from litvae.kernels.ops import use_backend
    for op in OPERATORS.values(): op.kernels["emulated"] = Emulator(op.file, sanitize=True)
    with use_backend("emulated"):
        for name, case in cases().items():
            if "," not in name or name in ("paste, softmax", "mixture, 5 slots", "mixture, 20 slots, joint"): run(case)
    print("clean")


if __name__ == "__main__": sanitized()
