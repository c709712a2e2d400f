"A small GENESIS trained with all operators through their CUDA sources learns what the references learn."
import pytest
import torch

from litvae.core.objectives import Geco
from litvae.genesis.model import Genesis
from litvae.kernels.compiling import launches
from litvae.kernels.emulation import cpp_compiler
from litvae.kernels.ops import use_backend

STEPS = 50


def train(backend):
    "The total loss, the error and the KL of each step, and the names of the kernels that ran."
    torch.manual_seed(0)
    mask = dict(channels=2, features=6, strides=(2, 1, 2, 1, 1))
    model = Genesis("asymmetric", slots=3, component_latent=3, mask_latent=4, size=16, channels=2,
                    layers=3, std=0.3, mask=mask)
    geco, adam = Geco(0.5, 1e-3), torch.optim.Adam(model.parameters(), 1e-3)
    images, history = torch.rand(6, 3, 16, 16), []
    with use_backend(backend), launches() as log:
        for step in range(STEPS):
            loss = model.loss(images[step % 3 * 2:][:2], geco)
            adam.zero_grad()
            loss.total.backward()
            adam.step()
            history.append([loss.total.item(), loss.parts["err"].item(), loss.parts["kl"].item()])
    return torch.tensor(history, dtype=torch.float64), {name.split("<")[0] for name, *_ in log}


@pytest.mark.skipif(not cpp_compiler(), reason="there is no C++ compiler here, so the CUDA sources cannot be emulated")
def test_fifty_steps_with_the_kernels_have_the_losses_of_the_references():
    reference, none = train("reference")
    emulated, kernels = train("emulated")
    assert not none and {"mixture_nll", "stick_breaking", "stick_breaking_backward"} <= kernels
    assert reference[-5:, 1].mean() < reference[:5, 1].mean()                     # it does learn
    differences = (emulated - reference).abs() / reference.abs().clamp(min=1)
    assert differences[0].max() < 1e-5                                            # total, error and KL before any step
    assert (differences.amax(0) < torch.tensor([1e-4, 1e-4, 1e-3])).all(), differences.amax(0)
