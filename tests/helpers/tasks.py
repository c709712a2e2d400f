"Small configurations and tasks: tiny VAEs of litvae itself, and toys that wait, diverge or fill a disk."
import os, signal, time
from pathlib import Path

import torch
from torch import nn

from litvae.core.files import fingerprint
from litvae.core.adversarial import AdversarialTask
from litvae.core.objectives import Elbo, Loss
from litvae.core.runs import RunConfig, register_task
from litvae.core.training import Task
from litvae.genesis.vanilla import VanillaVAE


def vanilla(name, kind="sbd", **changes):
    "The configuration of a VAE of chapter genesis.vanilla so small that a step takes milliseconds."
    model = {"kind": kind, "latent": 2, "size": 16, "channels": 2}
    model |= {"layers": 3} if kind == "sbd" else {"strides": [2, 2, 2, 1, 1]}
    values = dict(paper="demo", name=name, task="litvae.genesis.vanilla.VanillaVAE", model=model,
                  data={"name": "multi_dsprites", "source": "standin", "size": 16, "n": 64},
                  objective={"goal_rmse": 0.1, "factor": 1.5}, steps=20, batch_size=4, learning_rate=2e-3)
    return RunConfig(**values | changes)


def toy(name="toy", task="helpers.Toy", **changes):
    "The configuration of a `Toy` or of one of its children."
    values = dict(paper="demo", name=name, task=task, data={}, model={}, objective={}, steps=12, batch_size=4,
                  learning_rate=1e-2, log_every=2, checkpoint_every=4)
    return RunConfig(**values | changes)


def changed(config, **changes): return RunConfig.from_dict(config.to_dict() | changes)


def config_hash(config): return fingerprint(config.to_dict(), 64)


class Noise:
    "Sixty-four fixed vectors."
    name, source, split = "noise", "standin", "train"

    def __init__(self, width): self.values = torch.rand(64, width, generator=torch.Generator().manual_seed(0))
    def __len__(self): return len(self.values)
    def images(self, indices, device="cpu"): return self.values[torch.as_tensor(indices)].to(device)


class Copier(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encode, self.decode = nn.Linear(width, 4), nn.Linear(4, width)

    def loss(self, x, objective):
        code = self.encode(x)
        error = (self.decode(code + 0.1 * torch.randn_like(code)) - x).square().sum(1).mean()
        size = code.square().sum(1).mean()
        return Loss(objective(error, size), {"err": error, "size": size})


class Toy(Task):
    """Copies vectors through a narrow, noisy code; counts its training steps in a buffer.

    `config.model` may hold `width` of the vectors (16 by default) and what the children need."""
    def __init__(self, config):
        width = config.model.get("width", 16)
        super().__init__(Copier(width), Elbo(0.01), Noise(width))
        self.settings = config.model
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, batch):
        if self.training: self.seen += 1
        loss = super().forward(batch)
        return self.disturbed(loss) if self.training else loss

    def disturbed(self, loss): return loss

    def evaluate(self): return {"validation_err": self(self.batch(range(16))).parts["err"]}


class Gated(Toy):
    "Stops before the training step `at` until the file `gate` exists."
    def disturbed(self, loss):
        while self.seen == self.settings["at"] and not Path(self.settings["gate"]).exists(): time.sleep(0.005)
        return loss


class Exploding(Toy):
    "The loss is `value` (nan, inf) from training step `at` on; on rank `rank` only if that is given."
    def disturbed(self, loss):
        if self.settings.get("rank", os.environ.get("RANK")) != os.environ.get("RANK"): return loss
        bad = torch.where(self.seen >= self.settings["at"], float(self.settings["value"]), 0.0)
        return Loss(loss.total + bad, loss.parts)


class BadGradient(Toy):
    "The loss of training step `at` is finite, its gradient is not: the derivative of a square root at zero."
    def disturbed(self, loss):
        if self.seen != self.settings["at"]: return loss
        return Loss(loss.total + (0 * self.model.encode.weight.sum()).sqrt(), loss.parts)


class BadEvaluation(Toy):
    "Trains well, but one of its final numbers is not finite."
    def evaluate(self): return {"validation_err": torch.tensor(float("nan"))}


class Filling(Toy):
    "Fills the disk under the file `filler` at the final evaluation, as another program would."
    def evaluate(self):
        if not Path(self.settings["filler"]).exists():
            with open(self.settings["filler"], "wb", buffering=0) as f:
                try:
                    while f.write(bytes(4096)): pass
                except OSError: pass
        return super().evaluate()


class Missing(Toy):
    "Wants a file that is not there."
    def __init__(self, config):
        super().__init__(config)
        open("/nowhere/scenes.npz")


class Dying(VanillaVAE):
    "A VAE; rank `LITVAE_TEST_RANK` kills itself at step `LITVAE_TEST_STEP`, unless torchrun has started it anew."
    def batch(self, indices):
        self.steps = getattr(self, "steps", 0) + 1
        here = (os.environ.get("RANK"), str(self.steps), os.environ.get("TORCHELASTIC_RESTART_COUNT"))
        if here == (os.environ.get("LITVAE_TEST_RANK"), os.environ.get("LITVAE_TEST_STEP"), "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(indices)


class DoubleVAE(VanillaVAE):
    "A VAE in float64 that takes the posterior mean instead of a sample: nothing in a step is random."
    def __init__(self, config):
        super().__init__(config)
        self.double()

    def batch(self, indices): return super().batch(indices).double()

    def forward(self, batch): return self.model.loss(batch, self.objective, sample=False)


for task in (Toy, Gated, Exploding, BadGradient, BadEvaluation, Filling, Missing, Dying, DoubleVAE):
    register_task(f"helpers.{task.__name__}", task)


class Rivals(AdversarialTask):
    "A `Copier` without noise whose copies a discriminator tells from the vectors, in float64; it may fail on purpose."
    def __init__(self, config):
        judge = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
        super().__init__(Copier(5), Elbo(0.1), judge, Noise(5))
        self.double().failure = config.model

    def batch(self, indices): return super().batch(indices).double()
    def fake(self, batch): return (self.model.decode(self.model.encode(batch)),)

    def forward(self, batch, phase):
        if phase != "model": return super().forward(batch, phase)
        error = (self.fake(batch)[0] - batch).square().sum(1).mean()
        return Loss(error, {"err": error})

    def begin(self, step):
        if self.failure.get("nan") == step: nn.init.constant_(self.discriminator[0].weight, float("nan"))
        if self.failure.get("die") == step and not Path(self.failure["mark"]).exists():
            Path(self.failure["mark"]).touch()
            raise KeyboardInterrupt


register_task("helpers.Rivals", Rivals)
