"""What each of two processes does in test_distributed.py: `torchrun ... ranks.py first|killed FOLDER`.

It stands in for a user's script, and imports litvae as one would."""
import os, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # the tests, for the helpers' tasks

import torch
import torch.distributed as dist

from helpers.tasks import toy, vanilla
from litvae.core.files import LitvaeError
from litvae.core.runs import build_task, train_or_load
from litvae.core.training import Trainer, join_processes

DOUBLE = vanilla("double", task="helpers.DoubleVAE", batch_size=8, objective={"goal_rmse": 0.45, "factor": 1.0})
TWO = vanilla("two", "dc", task="helpers.Dying", steps=12, batch_size=4, log_every=2, checkpoint_every=4)
EXPLODING = toy("exploding", "helpers.Exploding", model={"at": 7, "value": "nan", "rank": "1"})
ODD = toy("odd", batch_size=5)
RIVALS = toy("rivals", "helpers.Rivals", batch_size=8)


def gradients(config=DOUBLE, steps=6):
    "Gradients and GECO's state at each of some steps, by name."
    trainer = Trainer(build_task(config), config.learning_rate, config.batch_size, config.seed)
    trainer.task.train()
    record = []
    for step in range(steps):
        trainer.gradient(step)
        record.append({name: p.grad.clone() for name, p in trainer.task.named_parameters()}
                      | {name: value.clone() for name, value in trainer.task.objective.named_buffers(prefix="geco")})
        trainer.optimisers["model"].step()
    return record


def rivalry(steps=4):
    "The weights of both players after some steps of an adversarial game, by name."
    trainer = Trainer(build_task(RIVALS), RIVALS.learning_rate, RIVALS.batch_size, RIVALS.seed)
    trainer.advance(steps)
    return trainer.task.state_dict()


def complaint(config, folder):
    "The error that training `config` ends in, as one line."
    try: train_or_load(config, folder, progress=False)
    except LitvaeError as error: return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    rank, world = join_processes()
    assert world == 2
    if what == "first":
        torch.save(gradients(), folder / f"gradients{rank}.pt")
        torch.save(rivalry(), folder / f"rivalry{rank}.pt")
        run = train_or_load(TWO, folder / "whole", progress=False)
        errors = [complaint(config, folder / "bad") for config in (EXPLODING, ODD)]
        torch.save({"path": str(run.path), "errors": errors}, folder / f"report{rank}.pt")
    else: train_or_load(TWO, folder / "killed", progress=False)
    dist.destroy_process_group()
