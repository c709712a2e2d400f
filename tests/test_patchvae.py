"PatchVAE as a user meets it: runs that are cut, spoiled or start from others, and the numbers of the printed tables."
import csv

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from helpers.tasks import changed, toy
from litvae.core.files import CorruptFileError, LitvaeError, read_json
from litvae.core.runs import RunConfig, run_path, train_or_load
from litvae.core.training import NonFiniteLoss
from litvae.data import load
from litvae.data.parts import part_cells
from litvae.patchvae.classifier import Classifier
from litvae.patchvae.model import PatchElbo, PatchVae
from litvae.patchvae.networks import PyramidDecoder
from litvae.patchvae.rivals import BetaVae, VectorEncoder, vector_decoder
from litvae.patchvae.training import probe_scores

DATA = {"name": "parts21", "source": "standin", "level": "grid", "n": 256, "n_test": 256}


def weights(run): return load_file(run.path / "weights.safetensors")


# ------------------------------------------------------------------------------------------------ adversarial runs
def test_an_adversarial_run_that_was_interrupted_ends_with_the_same_weights(tmp_path):
    game = toy("game", "helpers.Rivals", model={"die": 7, "mark": str(tmp_path / "mark")})
    with pytest.raises(KeyboardInterrupt): train_or_load(game, tmp_path / "a", progress=False)
    assert (run_path(game, tmp_path / "a") / "checkpoint.pt").exists()
    resumed, whole = (train_or_load(game, tmp_path / name, progress=False) for name in "ab")
    assert any(name.startswith("discriminator") for name in weights(whole))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    columns = [column for column in whole.metrics if column != "seconds"]
    assert resumed.metrics[columns].equals(whole.metrics[columns])


def test_a_player_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(tmp_path):
    game = toy("spoiled", "helpers.Rivals", model={"nan": 6})
    with pytest.raises(NonFiniteLoss, match="step 7"): train_or_load(game, tmp_path, progress=False)
    folder = run_path(game, tmp_path)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and read_json(folder / "failure.json")["step"] == 7
    assert all(torch.isfinite(value).all() for value in state["task"].values())


def test_a_checkpoint_that_lacks_a_player_is_refused(tmp_path):
    game = toy("halved", "helpers.Rivals", model={"die": 7, "mark": str(tmp_path / "mark")})
    with pytest.raises(KeyboardInterrupt): train_or_load(game, tmp_path, progress=False)
    file = run_path(game, tmp_path) / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    state["optimisers"].pop("discriminator")
    torch.save(state, file)
    with pytest.raises(CorruptFileError, match="does not fit"): train_or_load(game, tmp_path, progress=False)


# ------------------------------------------------------------------------------------- a run that starts from another
@pytest.fixture(scope="module")
def pair():
    first = RunConfig("patchvae", "first", "litvae.patchvae.training.UnlabelledGan", DATA,
                      {"kind": "patchvae", "parts": 3, "appearance": 2, "width": 8},
                      {"annealing": {"annealing": "share"}}, steps=3, batch_size=16)
    second = RunConfig("patchvae", "second", "litvae.patchvae.classifier.Classification", DATA,
                       {"width": 8, "hidden": 8, "protocol": "conv1-5"}, {}, steps=6, batch_size=32, learning_rate=0.01,
                       checkpoint_every=3, start_from=first.to_dict())
    return first, second


def test_a_classifier_trains_what_it_starts_from_and_keeps_it_to_the_bit(pair, tmp_path):
    first, second = pair
    found = weights(train_or_load(second, tmp_path, progress=False))
    learned = weights(train_or_load(first, tmp_path, progress=False))
    trunk = {name for name in found if name.startswith("model.trunk")}
    assert len(trunk) == 60
    for name in trunk: assert torch.equal(found[name], learned[name.replace("model.", "model.encoder.")])
    again = train_or_load(second, tmp_path / "again", progress=False)
    assert all(torch.equal(value, found[name]) for name, value in weights(again).items())


def test_a_damaged_predecessor_is_reported_and_kept(pair, tmp_path):
    first, second = pair
    file = train_or_load(first, tmp_path, progress=False).path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CorruptFileError, match="weights.safetensors"): train_or_load(second, tmp_path, progress=False)
    assert file.exists() and not (run_path(second, tmp_path) / "result.json").exists()


def test_a_configuration_checks_what_it_starts_from(pair):
    with pytest.raises(LitvaeError, match="unknown run parameter seeds"):
        changed(pair[1], start_from=pair[0].to_dict() | {"seeds": 3})
    assert "start_from" not in pair[0].to_dict()                       # so older configurations keep their names


# ------------------------------------------------------------------------------------------------- the printed numbers
def printed(table):
    with open(ROOT / "reproduce/patchvae/published_tables.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == str(table) and row["row"] == "parameters"]
    assert rows
    return {row["column"]: float(row["value"]) for row in rows}


def count(module): return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("table, size", [(8, 32), (9, 64)])
def test_encoders_have_the_printed_parameters(table, size):
    ours = {"β-VAE": VectorEncoder(size=size), "BiGAN": VectorEncoder(outputs=1, size=size),
            "PatchVAE": PatchVae(size=size).encoder}
    assert {name: count(module) for name, module in ours.items()} == printed(table)


@pytest.mark.parametrize("table, size", [(10, 32), (11, 64)])
def test_decoders_have_the_printed_parameters(table, size):
    ours = {"β-VAE": vector_decoder(size=size), "BiGAN": vector_decoder(size=size), "PatchVAE": PyramidDecoder(96)}
    assert {name: count(module) for name, module in ours.items()} == printed(table)


def test_classifiers_have_the_printed_parameters():
    ours = {"CIFAR100": Classifier(100), "Indoor67": Classifier(67, size=64), "Places205": Classifier(205, size=64)}
    assert {name: count(module) for name, module in ours.items()} == printed(12)


# ---------------------------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("parts, appearance, size, batch", [(1, 1, 32, 1), (3, 2, 40, 2), (16, 6, 64, 1)])
def test_odd_sizes_train(parts, appearance, size, batch):
    model, x = PatchVae(parts, appearance, size=size, width=8), torch.rand(batch, 3, size, size)
    loss = model.loss(x, PatchElbo(weighted=True))
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters()) and torch.isfinite(loss.total)
    assert model.reconstruct(x).shape == x.shape


def test_where_a_part_is_does_not_depend_on_what_it_looks_like():
    "The appearance's KL sends no gradient into the occurrence logits; the occurrence's own KL does."
    model, x = PatchVae(4, 3, width=8), torch.rand(2, 3, 32, 32)
    for which, moved in ((0, False), (1, True)):
        model.zero_grad()
        model.posterior(x).kl(0.25)[which].backward()
        gradient = model.encoder.logits.weight.grad
        assert (gradient is not None and gradient.abs().sum() > 0) == moved


def test_a_code_of_parts_ignores_absent_parts():
    "Where no bit is on, the decoder sees nothing of the appearance; where one is on, only cells near it change."
    model = PatchVae(4, 3, width=8).eval()
    nothing = torch.zeros(1, 4, 4, 4)
    first, second = (model.decoder((torch.randn(1, 4, 3), nothing)) for _ in range(2))
    assert torch.equal(first, second)
    one = nothing.clone()
    one[0, 2, 0, 0] = 1
    change = (model.decoder((torch.randn(1, 4, 3), one)) - first).abs().amax((0, 1))
    assert change[:8, :8].max() > 0 and change[16:, 16:].max() == 0


def test_features_of_supervised_parts_are_found_by_the_probes():
    "Features that are the true cells, handed in as a trunk, score perfectly; the same model's noise does not."
    data = load("parts21", source="standin", level="grid", n=256)
    cells = part_cells(data).float()

    class Truth(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor, self.at = torch.nn.Parameter(torch.zeros(1)), 0

        def pixels(self, x): return x
        def trunk(self, x):
            found = torch.cat([cells, cells])[self.at:self.at + len(x)]
            self.at += len(x)
            return found

    assert probe_scores(Truth(), data, data)["cell_precision"] > 0.999
    assert probe_scores(BetaVae(8, width=8).eval(), data, data)["cell_precision"] < 0.6
