"""Training on birds and captions: the schedule, pseudo-captions, the measurements against hand-made models and plain
numpy, the names of the runs, and what is said about wrong input."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from litvae.core.files import LitvaeError
from litvae.core.runs import build_task
from litvae.core.training import Trainer, evaluate
from litvae.data.birds import BirdPairs, species_table
from litvae.data.captions import (CAPTIONS, EOS, EXCLUDED, PAD, attribute_scores, build_vocabulary, captions_for,
                                  tokens)
from litvae.data.pairs import PartialData
from litvae.meme import birds
from litvae.meme.birds import CaptionJudge, bird_modalities, claim_scores, evaluate_birds, pseudo_birds, translate
from litvae.meme.training import build_model

NETWORKS = dict(embedding=32, width=2, feature_widths=(16,))


def drawn(first, count, split="train"):
    """Birds without pictures, so that nothing is drawn: the features are a noisy random map of the attributes."""
    attributes = species_table()[first:first + count]
    everyone = [captions_for(bird, seed) for seed, bird in enumerate(species_table()[:60])]
    said = [line for i, bird in enumerate(attributes) for line in captions_for(bird, first + i)]
    vocabulary = build_vocabulary(line for ten in everyone for line in ten)
    rng = np.random.default_rng(0)
    one_hot = np.concatenate([np.eye(11)[attributes[:, i]] for i in range(12)], 1)
    feature = (one_hot @ rng.normal(size=(132, 48)) + 0.1 * rng.normal(size=(count, 48))).astype(np.float32)
    modalities = {"feature": feature.repeat(CAPTIONS, 0), "caption": np.stack([vocabulary.encode(s) for s in said])}
    species = np.arange(first, first + count)
    return BirdPairs("drawn_birds", "standin", split, modalities, species.repeat(CAPTIONS),
                     np.zeros((count, 8, 8, 3), np.uint8), species, attributes, said, vocabulary, "a random map")


@pytest.fixture(scope="module")
def train(): return drawn(0, 60)


@pytest.fixture(scope="module")
def test_birds(): return drawn(60, 20, "test")


@pytest.fixture
def settings(monkeypatch, train, test_birds):
    "The arguments of a preset section, with `load_bird_pairs` replaced by the birds of this file."
    asked = []

    def load(split="train", n=None, source="auto", **options):
        asked.append({"split": split, "n": n, "source": source, **options})
        return train if split == "train" else replace(test_birds, split=split)

    monkeypatch.setattr(birds, "load_bird_pairs", load)
    models = {"meme": {"kind": "meme", "options": {"kl": "released"}}, "mvae": {"kind": "mvae"},
              "mmvae": {"kind": "mmvae", "paired_only": True, "options": {"samples": 1, "objective": "elbo"}}}
    return asked, dict(models=models, data={"source": "standin", "n": 60}, latent=4, networks=NETWORKS, seeds=[0],
                       fractions=[0.25], schemes=["split"], steps=4, batch_size=16, learning_rate=1e-3, pseudo=6)


class Copier(nn.Module):
    "A model that knows the answers: `truth` holds the captions of the features, the features of the captions."
    def __init__(self, data, shift=0):
        super().__init__()
        self.anchor, self.data, self.shift, self.asked = nn.Parameter(torch.zeros(())), data, shift, 0

    def cross_generate(self, source, target, x):
        rows = (np.arange(self.asked, self.asked + len(x)) + self.shift) % len(self.data)
        self.asked = (self.asked + len(x)) % len(self.data)
        answer = self.data.batch(rows)[target]
        if target == "feature": return answer
        return nn.functional.one_hot(answer, len(self.data.vocabulary)).float() * 1e4

    def elbo(self, batch): return -torch.ones(len(batch["feature"]))


# Measurements
def test_captions_copied_from_the_truth_score_one(train, test_birds):
    scores = evaluate_birds(Copier(test_birds), train, test_birds, k=10, chunk=64)
    assert scores["precision"] == 1 and scores["bound"] == -1
    assert scores["cca_feature_to_caption"] == scores["cca_caption_to_feature"] == scores["cca_truth"] > 0.1
    own = attribute_scores(test_birds.captions, test_birds.attributes.astype(int).repeat(CAPTIONS, 0))
    assert 0 <= own["recall"] - scores["recall"] < 0.01 and own["claims"] >= scores["claims"]    # rare words are lost


def test_captions_of_other_birds_score_what_chance_scores(train, test_birds):
    scores = evaluate_birds(Copier(test_birds, shift=70), train, test_birds, k=10)
    assert abs(scores["precision"] - scores["chance_precision"]) < 0.08 and scores["precision"] < 0.5
    assert abs(scores["cca_feature_to_caption"]) < 0.15 < scores["cca_truth"]


def test_chance_is_what_the_frequencies_of_the_attributes_say(test_birds):
    words = test_birds.batch(np.arange(len(test_birds)))["caption"]
    found = claim_scores(words, test_birds)["chance_precision"]
    every = [claim_scores(words, test_birds, seed)["chance_precision"] for seed in range(12)]
    birds_of = test_birds.attributes.astype(int)
    said = [attribute_scores([line] * len(birds_of), birds_of) for line in test_birds.captions[::7]]
    expected = sum(s["precision"] * s["claims"] for s in said) / sum(s["claims"] for s in said)
    assert found == every[0] and len(set(every)) > 6 and abs(np.mean(every) - expected) < 0.03


def test_silence_scores_zero_and_stays_finite(test_birds):
    silent = torch.full((len(test_birds), 32), PAD)
    assert claim_scores(silent, test_birds) == dict.fromkeys(("precision", "recall", "claims", "chance_precision"), 0.0)


def test_the_judge_is_equation_12(train, test_birds):
    judge, batch = CaptionJudge(train, k=6), test_birds.batch(np.arange(50))
    fitted = train.batch(np.arange(len(train)))
    views = [(batch["feature"].double(), fitted["feature"].double(), judge.cca.weights_x),
             (judge.embed(batch["caption"]), judge.embed(fitted["caption"]), judge.cca.weights_y)]
    a, b = ((x.numpy() @ w.numpy() - (known.numpy() @ w.numpy()).mean(0)) for x, known, w in views)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert math.isclose(judge(batch["feature"], batch["caption"]), cosine.mean(), rel_tol=1e-6)


def test_word_vectors_are_averaged_and_special_words_left_out(train):
    judge = CaptionJudge(train, k=3)
    line = train.modalities["caption"][0]
    kept = [int(i) for i in line if i not in (EXCLUDED, PAD, EOS)]
    vectors = [judge.embedder.vectors[judge.embedder.vocabulary[i]] for i in kept]
    np.testing.assert_allclose(judge.embed(torch.from_numpy(line[None]))[0], np.mean(vectors, 0), atol=1e-10)


def test_no_more_projections_than_directions(train):
    flat = replace(train, modalities=train.modalities | {"feature": train.modalities["feature"][:, [0, 1, 1]]})
    assert CaptionJudge(flat).k == 2 and CaptionJudge(train).k == 40


def test_words_after_the_end_do_not_count(test_birds):
    row = torch.from_numpy(test_birds.modalities["caption"][:1]).clone()
    end = int((row == EOS).nonzero()[0, 1])
    babble = row.clone()
    babble[0, end + 1:] = 5
    assert birds.until_end(babble).equal(row) and birds.until_end(row[:, :end]).equal(row[:, :end])
    assert tokens(test_birds.vocabulary.decode(row[0])) == tokens(test_birds.captions[0])


def test_a_model_translates_in_chunks_on_its_own_noise(test_birds):
    model = build_model("mvae", 4, bird_modalities(4, 48, len(test_birds.vocabulary), **NETWORKS)).eval()
    words = translate(model, test_birds, "feature", chunk=33)
    features = translate(model, test_birds, "caption", rows=[3, 4, 5], chunk=2)
    assert words.shape == (200, 32) and words.dtype == torch.int64 and features.shape == (3, 48)
    scores = evaluate_birds(model, test_birds, test_birds, k=5)
    assert all(math.isfinite(value) for value in scores.values())
    assert all(-1 <= scores[name] <= 1 for name in scores if name.startswith("cca"))
    assert all(0 <= scores[name] <= 1 for name in ("precision", "recall", "chance_precision"))


# The task
def test_pseudo_captions_are_embedded_words_of_visible_pairs_and_learn(settings):
    config = birds.sweep(**settings[1], only=["meme"])[0]
    task = build_task(config)
    pseudo, partial = task.model.pseudo, task.train_data
    start = {name: x.detach().clone() for name, x in pseudo.items()}
    assert start["caption"].shape == (6, 32, 32) and start["caption"].is_floating_point()
    table = task.model.modalities["caption"].encoder.embedding.weight
    ids = torch.cdist(start["caption"].reshape(-1, 32), table).argmin(1).reshape(6, 32)
    visible = torch.from_numpy(partial.paired.modalities["caption"][partial.groups[0][1]])
    assert table[ids].allclose(start["caption"]) and all((visible == row).all(1).any() for row in ids)
    trainer = Trainer(task, 1e-2, config.batch_size)
    trainer.gradient(1)                                            # features alone: captions come from pseudo-samples
    assert pseudo["caption"].grad.abs().sum() > 0 and pseudo["feature"].grad is None
    trainer.gradient(3)
    assert pseudo["feature"].grad.abs().sum() > 0 and pseudo["caption"].grad is None
    trainer.advance(8)
    assert all(not torch.equal(pseudo[name], x) for name, x in start.items())


@pytest.mark.parametrize("scheme, shown", [("split", [{"feature"}, {"caption"}]), ("feature", [{"feature"}] * 2),
                                           ("caption", [{"caption"}] * 2)])
def test_the_schedule_alternates_pairs_and_single_modalities(settings, scheme, shown):
    config = birds.sweep(**settings[1] | {"schemes": [scheme]}, only=["meme"])[0]
    task = build_task(config)
    seen = [set(task.batch(task.rows(step, 16, 0))) for step in range(4)]
    assert seen == [{"feature", "caption"}, shown[0], {"feature", "caption"}, shown[1]]
    batch = task.batch(task.rows(0, 16, 0))
    assert batch["feature"].shape == (16, 48) and batch["caption"].dtype == torch.int64
    assert task.forward(batch).total.isfinite()
    assert set(task.forward(task.batch(task.rows(1, 16, 0))).parts) == {"partial"}


@pytest.mark.parametrize("model", ["meme", "mvae", "mmvae"])
def test_each_model_trains_and_is_measured(settings, model):
    config = birds.sweep(**settings[1] | {"fractions": [1]}, only=[model])[0]
    task = build_task(config)
    Trainer(task, 1e-3, 16).advance(2)
    scores = evaluate(task)
    assert set(scores) == {"cca_truth", "cca_feature_to_caption", "cca_caption_to_feature", "precision", "recall",
                           "claims", "chance_precision", "bound"} and scores["bound"] < 0
    assert task.data_record()["birds"] == 60 and task.data_record()["source"] == "standin"


def test_the_task_asks_for_its_data(settings):
    asked, options = settings
    data = {"source": "standin", "n": 60, "judged_n": 20, "judged": "validation", "steps": 5}
    build_task(birds.sweep(**options | {"data": data}, only=["mvae"])[0])
    assert [(call["split"], call["n"], call["steps"]) for call in asked] == [("train", 60, 5), ("validation", 20, 5)]
    weights = {"source": "standin", "weights": "resnet101/weights.pth"}
    build_task(birds.sweep(**options | {"data": weights}, only=["mvae"])[0])
    assert asked[-1]["weights"] == birds.data_root() / "resnet101/weights.pth"


# Sweeps and errors
def test_names_of_the_sweep(settings):
    options = settings[1] | {"fractions": [1, 0.125], "schemes": ["feature", "caption", "split"]}
    configs = birds.sweep(**options)
    assert [c.name for c in configs] == [
        "birds-meme-all-seed0", "birds-meme-feature-f0.125-seed0", "birds-meme-caption-f0.125-seed0",
        "birds-meme-split-f0.125-seed0", "birds-mvae-all-seed0", "birds-mvae-feature-f0.125-seed0",
        "birds-mvae-caption-f0.125-seed0", "birds-mvae-split-f0.125-seed0", "birds-mmvae-all-seed0"]
    assert {c.task for c in configs} == {"litvae.meme.birds.CaptionedBirds"}
    assert {c.model.get("pseudo") for c in configs if c.model["kind"] == "meme"} == {None, 6}
    assert configs[1].steps == 2 * configs[0].steps and configs[0].data["scheme"] == "paired"


def test_errors_are_plain(settings, train):
    options = settings[1]
    with pytest.raises(LitvaeError, match="unknown scheme digit; known are feature, caption, split, paired"):
        birds.sweep(**options | {"schemes": ["digit"]})
    with pytest.raises(LitvaeError, match="no model gan"): birds.sweep(**options, only=["gan"])
    with pytest.raises(LitvaeError, match="unknown source 'song'"): translate(None, train, "song")
    with pytest.raises(LitvaeError, match="has no attributes"):
        claim_scores(torch.full((600, 32), PAD), replace(train, attributes=None))
    parts = bird_modalities(4, 48, len(train.vocabulary), **NETWORKS)
    with pytest.raises(LitvaeError, match="601 pseudo-samples, but only 60 pairs"):
        pseudo_birds(parts, PartialData(train, 0.1, "split"), 601)
