"""Training through torch.compile: the same losses as eager, and a switch that a run is named by."""
import pytest, torch
from torch import nn

from litvae.core.files import LitvaeError
from litvae.core.objectives import Elbo, Loss
from litvae.core.runs import RunConfig
from litvae.core.training import Task, Trainer
from litvae.kernels.emulation import cpp_compiler


class Noiseless(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 5), nn.ELU(), nn.Linear(5, 12))

    def loss(self, x, objective):
        code, x = self.layers[1](self.layers[0](x.flatten(1))), x.flatten(1)
        err, kl = (self.layers[2](code) - x).square().sum(1).mean(), code.square().sum(1).mean()
        return Loss(objective(err, kl), {"err": err, "kl": kl})


class Pictures:
    def __len__(self): return 64
    def images(self, indices, device="cpu"):
        return torch.rand(64, 3, 2, 2, generator=torch.Generator().manual_seed(0))[torch.as_tensor(indices)].to(device)


def losses(**settings):
    torch.manual_seed(0)
    trainer = Trainer(Task(Noiseless(), Elbo(0.1), Pictures()), 1e-2, 16, **settings)
    return [trainer.advance()["loss"] for _ in range(20)]


@pytest.mark.skipif(not cpp_compiler(), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_training_has_the_losses_of_an_eager_one():
    found, expected = losses(compiled=True), losses()
    assert found == pytest.approx(expected, rel=1e-5) and expected[-1] < expected[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_graphs_on_a_gpu_have_the_losses_of_an_eager_training():
    def on_gpu(**settings):
        torch.manual_seed(0)
        trainer = Trainer(Task(Noiseless(), Elbo(0.1), Pictures()).to("cuda"), 1e-2, 16, **settings)
        return [trainer.advance()["loss"] for _ in range(20)]
    assert on_gpu(compiled=True) == pytest.approx(on_gpu(), rel=1e-4)


def test_the_switch_is_part_of_the_name_only_where_it_is_on():
    plain = {"paper": "meme", "name": "run", "task": "litvae.meme.training.DigitPairs", "data": {}, "model": {},
             "objective": {}, "steps": 1}
    assert "compiled" not in RunConfig(**plain).to_dict()
    assert RunConfig(**plain).run_id == RunConfig(**plain, compiled=False).run_id
    assert RunConfig(**plain, compiled=True).run_id != RunConfig(**plain).run_id
    assert RunConfig.from_dict(RunConfig(**plain, compiled=True).to_dict()).compiled
    with pytest.raises(LitvaeError, match="true or false"): RunConfig(**plain, compiled="yes")
