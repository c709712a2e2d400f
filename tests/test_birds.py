"""Drawn birds, what is said of them, the words as numbers, the real files in both official forms with what can be wrong
with them, and the pairs of features and captions."""
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from litvae.core.files import CorruptFileError, LitvaeError
from litvae.data import birds, captions as words
from litvae.data.birds import BACKGROUND, FOREGROUND, draw_birds, draw_parameters, drawn_birds
from litvae.data.captions import ATTRIBUTES, EOS, EXCLUDED, attribute_scores, build_vocabulary, captions_for, claims_of
from litvae.data.pairs import PartialData
from litvae.data.sources import load, shard_rng


def only(parameters, names): return {name: parameters[name] for name in names}


# Painter
def test_a_bird_is_a_function_of_seed_and_shard(tmp_path):
    a, b = (drawn_birds(shard_rng({"name": "x"}, 3), 8) for _ in range(2))
    other = drawn_birds(shard_rng({"name": "x"}, 4), 8)
    for key, array in a.items(): assert np.array_equal(array, b[key])
    assert not np.array_equal(a["image"], other["image"]) and not np.array_equal(a["caption"], other["caption"])
    few = birds.load_birds("test", 3, "standin", root=tmp_path / "a")
    more = birds.load_birds("test", 260, "standin", root=tmp_path / "b")
    for key in few.arrays: assert np.array_equal(few[key], more[key][:3])
    again = draw_birds(**{key: more[key][250:260] for key in FOREGROUND + BACKGROUND})  # across a shard
    assert np.array_equal(again["image"], more["image"][250:260])
    assert np.array_equal(again["mask"], more["mask"][250:260])


@pytest.mark.parametrize("size", [16, 64])
def test_the_mask_is_where_two_backgrounds_show_no_difference(size):
    parameters = draw_parameters(np.random.default_rng(0), 48)
    front, n = only(parameters, FOREGROUND), 48
    same = dict(texture=np.zeros((n, 2, 8, 8), np.uint8), background=np.full(n, 1))
    black = draw_birds(**front, **same, shade=np.full((n, 3), -2, np.float32), size=size)
    white = draw_birds(**front, **same, shade=np.full((n, 3), 2, np.float32), size=size)
    differs = (black["image"] != white["image"]).all(-1)
    assert np.array_equal(differs, black["mask"] == 0) and np.array_equal(black["mask"], white["mask"])
    assert (white["image"][differs] == 255).all() and (black["image"][differs] == 0).all()
    area = black["mask"].mean((1, 2))
    assert area.min() > 0.05 and area.max() < 0.3


def test_bird_and_background_are_independent():
    p = draw_parameters(np.random.default_rng(1), 20_000)
    for column in p["attributes"].T:
        table = np.histogram2d(column, p["background"], [np.arange(column.max() + 2), np.arange(5)])[0]
        expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
        freedom = 3 * column.max()
        chi2 = ((table - expected) ** 2 / expected).sum()
        assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_a_mirrored_bird_is_the_mirror_image():
    p = draw_parameters(np.random.default_rng(2), 16)
    tensors = [torch.from_numpy(p["attributes"].astype(int)), torch.from_numpy(p["pose"]), torch.from_numpy(p["tints"])]
    colours, mask = birds.paint_birds(*tensors)
    tensors[1] = tensors[1] * torch.tensor([-1, 1, 1, -1, 1])
    mirrored, other = birds.paint_birds(*tensors)
    assert (other.flip(-1) != mask).float().mean() < 1e-3
    both = other.flip(-1) & mask
    assert ((mirrored.flip(-1) - colours).abs().amax(1)[both] > 0.02).float().mean() < 0.01


def test_each_attribute_shows_and_no_other_changes_it():
    p = draw_parameters(np.random.default_rng(3), 4, "any")
    plain = np.zeros_like(p["attributes"]) + np.array([0, 2, 4, 6, 7, 0, 0, 0, 0, 0, 0, 0], np.uint8)
    front = dict(pose=p["pose"], tints=p["tints"] * 0)
    base = draw_birds(plain, **front, **only(p, BACKGROUND))
    for i, name in enumerate(ATTRIBUTES):
        if name == "size": continue  # the size is in the pose
        changed = plain.copy()
        changed[:, i] = 1
        image = draw_birds(changed, **front, **only(p, BACKGROUND))["image"]
        assert (image != base["image"]).any((1, 2, 3)).all(), name
    p = draw_parameters(np.random.default_rng(4), 1000)
    assert np.array_equal(np.floor((p["pose"][:, 2] - 0.7) * 10 - 1e-4).clip(0), p["attributes"][:, 0])


def test_classes():
    table = birds.species_table()
    assert len(np.unique(table, axis=0)) == 200 and not table.flags.writeable
    assert (table[:, list(ATTRIBUTES).index("eye_ring")] == 1).sum() > 40
    for classes, low, high in (("train", 0, 150), ("test", 150, 200), ("all", 0, 200)):
        found = draw_parameters(np.random.default_rng(0), 3000, classes)
        assert set(found["species"]) == set(range(low, high))
        assert np.array_equal(found["attributes"], table[found["species"]])
    with pytest.raises(LitvaeError, match="unknown classes 7"): draw_parameters(np.random.default_rng(0), 2, 7)


@pytest.mark.parametrize("change, message", [
    (dict(size=0), "size is 0"), (dict(background=[9, 0]), "does not exist"),
    (dict(pose=np.zeros((3, 5))), "one length"), (dict(attributes=np.zeros((2, 11), int)), "12 attributes"),
    (dict(attributes=np.full((2, 12), 3)), "does not exist")])
def test_bad_parameters(change, message):
    p = draw_parameters(np.random.default_rng(0), 2)
    with pytest.raises(LitvaeError, match=message): draw_birds(**only(p, FOREGROUND + BACKGROUND) | change)


# Captions
@pytest.fixture(scope="module")
def said():
    "200 species with ten sentences each: (attributes (2000, 12), sentences)."
    table = birds.species_table()
    return table.repeat(10, axis=0), [line for i, bird in enumerate(table) for line in captions_for(bird, i)]


def test_captions_are_true_of_their_own_bird_only(said):
    attributes, lines = said
    own = attribute_scores(lines, attributes)
    assert own["precision"] == 1 and 2 <= own["claims"] <= 4 and own["recall"] == pytest.approx(own["claims"] / 12)
    shuffled = attributes[np.random.default_rng(0).permutation(len(lines))]
    assert attribute_scores(lines, shuffled)["precision"] < 0.5
    assert all(2 <= len(claims_of(line)) <= 4 for line in lines)
    named = {name for line in lines for name in claims_of(line)}
    assert named == set(ATTRIBUTES)


def test_articles(said):
    for line in said[1]:
        found = words.tokens(line)
        for article, after in zip(found, found[1:]):
            if article in ("a", "an"): assert (article == "an") == (after[0] in "aeiou"), line


def test_ten_different_captions_a_bird_that_vary(said):
    _, lines = said
    assert all(len(set(lines[i:i + 10])) == 10 for i in range(0, 2000, 10)) and len(set(lines)) > 1900
    assert max(len(words.tokens(line)) for line in lines) <= 31
    first = ("this", "look", "with", "one", "here")
    assert len({line.split()[0] for line in lines if line.startswith(first)}) == 5
    bird = birds.species_table()[0]
    assert captions_for(bird, 5) == captions_for(bird, 5) != captions_for(bird, 6)


def test_plain_captions_say_everything_each_at_its_own_place():
    table = birds.species_table()
    lines = [line for i, bird in enumerate(table) for line in captions_for(bird, i, level="plain")]
    scores = attribute_scores(lines, table.repeat(10, axis=0))
    assert (scores["precision"], scores["recall"], scores["claims"]) == (1, 1, 12)
    assert all(len(set(lines[i:i + 10])) == 10 for i in range(0, 2000, 10))
    assert captions_for(table[0], 5, level="plain") == captions_for(table[0], 5, level="plain") != lines[:10]
    rows = np.array([words.tokens(line) for line in lines])  # all of one length
    assert rows.shape == (2000, 30)
    nouns = {"bird", "beak", "wings", "belly", "crown", "tail", "legs", "ring"}
    assert all(nouns.isdisjoint(column) or len(set(column)) == 1 for column in rows.T)
    assert {column[0] for column in rows.T} >= nouns
    with pytest.raises(LitvaeError, match="unknown level 'easy'.*full, plain"): captions_for(table[0], 0, level="easy")


@pytest.mark.parametrize("sentence, claims", [
    ("", {}), ("red", {}), ("a bird", {}), ("the bird is big", {"size": "large"}),
    ("this bird is red with a blue crown", {"body": "red", "crown": "blue"}),
    ("wings that are grey and striped, short legs", {"wing": "grey", "wing_pattern": "barred"}),
    ("a beak, short and red", {}),
    ("a bird without an eye ring and with a red bill", {"eye_ring": "none", "beak": "red"}),
    ("crown and belly are white", {"belly": "white"}), ("a red and blue belly", {"belly": "blue and red"}),
    ("GREY wings with speckles.", {"wing": "grey", "wing_pattern": "speckled"}),
    ("its crown is red its tail is long", {"crown": "red", "tail": "long"})])
def test_claims(sentence, claims): assert claims_of(sentence) == claims


def test_scores_count_claims():
    bird = np.array([[list(values).index(value) for values, value in zip(ATTRIBUTES.values(), (
        "small", "red", "blue", "white", "black", "grey", "short", "curved", "plain", "long", "none", "pink"))]])
    scores = attribute_scores(["a red bird with a red crown and green wings."], bird)
    assert scores == {"precision": pytest.approx(1 / 3), "recall": pytest.approx(1 / 12), "claims": 3}
    assert np.isnan(attribute_scores(["hello"], bird)["precision"])
    for wrong in (bird[0], bird.astype(float), bird.repeat(2, 0), bird + 20, bird - 12):
        with pytest.raises(LitvaeError): attribute_scores(["a bird"], wrong)
    with pytest.raises(LitvaeError): attribute_scores([], bird[:0])


# Vocabulary
def test_vocabulary_round_trip(said, tmp_path):
    vocabulary = build_vocabulary(said[1])
    assert vocabulary.words[:3] == ("<exc>", "<pad>", "<eos>") and 100 <= len(vocabulary) <= 140
    for line in said[1][:300]:
        ids = vocabulary.encode(line)
        assert ids.shape == (32,) and ids.dtype == np.int64 and vocabulary.decode(torch.from_numpy(ids)) == line
        end = ids.tolist().index(2)
        assert (ids[end + 1:] == 1).all() and end == len(words.tokens(line))
    words.save_vocabulary(tmp_path / "v.json", vocabulary)
    assert words.load_vocabulary(tmp_path / "v.json") == vocabulary
    assert [path.name for path in tmp_path.iterdir()] == ["v.json"]


def test_words_are_kept_if_they_occur_more_than_three_times():
    vocabulary = build_vocabulary(["a b b"] * 4 + ["rare"] * 3)
    assert vocabulary.words[3:] == ("b", "a")
    assert vocabulary.encode("a rare b").tolist()[:4] == [4, 0, 3, 2]
    assert vocabulary.decode([4, 0, 3, 2, 3]) == "a <exc> b"
    long = vocabulary.encode("a " * 50)
    assert len(long) == 32 and long[30] == 4 and long[31] == 2


@pytest.mark.parametrize("empty", ["", "   ", ".,", "12 34", "- '"])
def test_an_empty_caption_is_an_error(empty):
    with pytest.raises(LitvaeError, match="empty"): build_vocabulary(["a bird"] * 4).encode(empty)


def test_damaged_vocabularies(tmp_path):
    path = tmp_path / "v.json"
    for text in ("{", "[]", "{}", '{"words": 3}', '{"words": ["a"]}',
                 '{"words": ["<exc>", "<pad>", "<eos>", "a", "a"]}'):
        path.write_text(text)
        with pytest.raises(CorruptFileError): words.load_vocabulary(path)
    with pytest.raises(LitvaeError, match="missing"): words.load_vocabulary(tmp_path / "none.json")
    with pytest.raises(LitvaeError, match="-1"): build_vocabulary(["a bird"] * 4).decode([-1])


# Real files
CLASSES = ("001.Ibis", "002.Tern", "003.Wren")


def picture(path, number, mode="RGB", size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number * 20, 100, 50)).convert(mode).save(path, quality=95)


def ten(name): return [f"caption {k} of {name}" for k in range(10)]


@pytest.fixture
def release(tmp_path):
    "The form of the multimodal VAE papers: ten pictures of two training classes, three of one for the test."
    home = tmp_path / "cub"
    lines = {"train": [], "test": []}
    for part, name, count in (("train", CLASSES[0], 7), ("train", CLASSES[1], 3), ("test", CLASSES[2], 3)):
        for k in sorted(range(count), key=lambda k: f"b{k * 5}"):  # by name, as ImageFolder does: b0 b10 b15 b20 b5
            picture(home / part / name / f"b{k * 5}.jpg", k + 1)
            lines[part] += ten(f"{name} {k}")
    (home / "text_trainvalclasses.txt").write_text("\n".join(lines["train"]) + "\n")
    (home / "text_testclasses.txt").write_text("\n".join(lines["test"]))
    return home


@pytest.fixture
def original(tmp_path):
    "The original archives: the same birds, with boxes, segmentations and one caption file a picture."
    root = tmp_path / "cub"
    home, rows = root / "CUB_200_2011", []
    for c, (name, count) in enumerate(zip(CLASSES, (7, 3, 3))):
        for k in range(count):
            stem = f"{name}/b{k}"
            picture(home / "images" / f"{stem}.jpg", k + 1, "L" if k == 2 else "RGB")  # some are grey
            votes = np.zeros((40, 60), np.uint8)
            votes[10:20, 20:40], votes[20:30, 20:40] = 255, 51
            (root / "segmentations" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(votes).convert("RGBA" if k == 1 else "L").save(root / "segmentations" / f"{stem}.png")
            captions = root / "text_c10" / f"{stem}.txt"
            captions.parent.mkdir(parents=True, exist_ok=True)
            captions.write_text("\n".join(ten(f"{name} {k}")) + "\n\n")
            rows.append((stem, c))
    number = list(enumerate(rows, 1))
    (home / "images.txt").write_text("".join(f"{i} {stem}.jpg\n" for i, (stem, _) in number))
    (home / "image_class_labels.txt").write_text("".join(f"{i} {c + 1}\n" for i, (_, c) in number))
    (home / "bounding_boxes.txt").write_text("".join(f"{i} 20.0 10.0 20.0 10.0\n" for i, _ in number))
    (root / "trainvalclasses.txt").write_text("\n".join(CLASSES[:2]))
    (root / "testclasses.txt").write_text(CLASSES[2] + "\n")
    return root


def real(folder, split="train", **options):
    return load("cub", split, source="real", root=folder.parent, **options)


@pytest.mark.parametrize("form", ["release", "original"])
def test_captions_belong_to_their_pictures(form, request):
    folder = request.getfixturevalue(form)
    seen = []
    for split, count in (("train", 9), ("validation", 1), ("test", 3)):
        data = real(folder, split, size=40)
        assert (data.name, data.source, len(data)) == ("cub", "real", count)
        lines = birds.sentences(data)
        for i, (image, species) in enumerate(zip(data["image"], data["species"])):
            number = int(lines[10 * i].split()[-1])
            assert lines[10 * i:10 * i + 10] == ten(f"{CLASSES[species]} {number}")
            grey = form == "original" and number == 2
            if not grey: assert abs(int(image[20, 20, 0]) - (number + 1) * 20) <= 3
            seen.append((species, number))
        assert (set(data["species"]) == {2}) == (split == "test")
    assert sorted(seen) == [(c, k) for c, count in enumerate((7, 3, 3)) for k in range(count)]


def test_boxes_and_masks_follow_the_crop(original):
    data = real(original, "test", size=20)
    assert data["mask"].dtype == np.uint8 and set(np.unique(data["mask"])) == {0, 1}
    for mask, box in zip(data["mask"], data["box"]):
        rows, columns = np.nonzero(mask)
        assert box.tolist() == [5, 5, 15, 10] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    for path in original.glob("segmentations/*/*.png"): path.unlink()
    with pytest.raises(LitvaeError, match="is missing"): real(original, "train", size=20)


def truncate(path): path.write_bytes(path.read_bytes()[:-30])


def shorten(path): path.write_text("\n".join(path.read_text().splitlines()[:-1]))


def blank(path): path.write_text(path.read_text().replace("caption 3", "\n", 1).replace("caption 4 of 003", "", 1))


@pytest.mark.parametrize("name, damage, kind, message", [
    ("text_testclasses.txt", Path.unlink, LitvaeError, "is missing"),
    ("text_testclasses.txt", shorten, CorruptFileError, "found 29 lines"),
    ("text_testclasses.txt", blank, CorruptFileError, "10 captions for each of 3"),
    ("text_testclasses.txt", lambda path: path.write_text(""), CorruptFileError, "lines of text"),
    ("text_testclasses.txt", lambda path: path.write_bytes(b"\0\1" * 99), CorruptFileError, "lines of text"),
    ("test/003.Wren/b5.jpg", truncate, CorruptFileError, "whole picture"),
    ("test/003.Wren/b5.jpg", Path.unlink, CorruptFileError, "each of 2 pictures"),
    ("test", lambda path: path.rename(path.parent / "tests"), LitvaeError, "one for each class")])
def test_errors_of_the_release(release, name, damage, kind, message):
    damage(release / name)
    left = {path: path.read_bytes() for path in release.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=message) as caught: real(release, "test")
    assert str(release) in str(caught.value) and all(path.read_bytes() == data for path, data in left.items())


@pytest.mark.parametrize("name, damage, kind, message", [
    ("CUB_200_2011/image_class_labels.txt", shorten, CorruptFileError, "do not match"),
    ("CUB_200_2011/bounding_boxes.txt", Path.unlink, LitvaeError, "is missing"),
    ("CUB_200_2011/bounding_boxes.txt", lambda path: path.write_text("1 2 three 4 5"), CorruptFileError, "three"),
    ("CUB_200_2011/images.txt", lambda path: path.write_text("1 a b"), CorruptFileError, "1 values"),
    ("CUB_200_2011/images/003.Wren/b1.jpg", Path.unlink, LitvaeError, "is missing"),
    ("text_c10/003.Wren/b1.txt", shorten, CorruptFileError, "found 9 lines"),
    ("text_c10/003.Wren/b1.txt", Path.unlink, LitvaeError, "is missing"),
    ("segmentations/003.Wren/b1.png", truncate, CorruptFileError, "whole picture"),
    ("segmentations/003.Wren/b1.png", lambda path: picture(path, 1, "L", (50, 40)), CorruptFileError, "like its"),
    ("testclasses.txt", Path.unlink, LitvaeError, "is missing"),
    ("testclasses.txt", lambda path: path.write_text("004.Owl"), CorruptFileError, "none of them")])
def test_errors_of_the_originals(original, name, damage, kind, message):
    if damage is shorten and name.startswith("text"):
        (original / name).write_text((original / name).read_text().rstrip())
    damage(original / name)
    with pytest.raises(kind, match=message): real(original, "test")


def test_real_never_falls_back(tmp_path):
    with pytest.raises(LitvaeError, match="no real files.*CUB-200-2011"): birds.load_birds(source="real", root=tmp_path)
    with pytest.raises(LitvaeError, match="size is 0"): birds.cub(tmp_path, "train", size=0)


# Features, pairs
def test_pairs(tmp_path):
    settings = dict(source="standin", steps=2, images=64, root=tmp_path)
    pairs = birds.load_bird_pairs("test", 20, **settings)
    assert len(pairs) == 200 == len(pairs.captions) and (pairs.name, pairs.source) == ("drawn_birds", "standin")
    assert "BirdFeatures (2 steps on 64 drawn_birds" in pairs.describe() and pairs.species.min() >= 150
    batch = pairs.batch(np.array([199, 3, 14]))
    assert batch["feature"].shape == (3, 256) and batch["feature"].dtype == torch.float32
    assert batch["caption"].dtype == torch.int64
    for row, i in enumerate([199, 3, 14]):
        assert pairs.vocabulary.decode(batch["caption"][row]) == pairs.captions[i]
        assert pairs.label[i] == pairs.species[i // 10]
    extractor = birds.trained_bird_features(2, 64, root=tmp_path)
    raw = birds.image_features(pairs.images, extractor)
    train = birds.load_bird_pairs("train", 512, **settings)
    known = birds.image_features(train.images, extractor)
    expected = (raw - known.mean(0)) / known.std(0)
    assert np.allclose(np.asarray(pairs.modalities["feature"])[::10], expected, atol=1e-3)
    assert pairs.nearest(batch["feature"]).tolist() == [19, 0, 1] and train.vocabulary == pairs.vocabulary
    more = birds.load_bird_pairs("test", 30, **settings)  # another number, the same birds
    assert np.allclose(more.batch([5])["feature"], pairs.batch([5])["feature"]) and len(more) == 300


def test_plain_pairs(tmp_path):
    settings = dict(source="standin", steps=2, images=64, root=tmp_path)
    full, plain = (birds.load_bird_pairs("test", 20, **settings, level=level) for level in ("full", "plain"))
    assert (plain.name, len(plain)) == ("drawn_birds (plain captions)", 200) and "plain" in plain.describe()
    assert torch.equal(full.batch(range(200))["feature"], plain.batch(range(200))["feature"])
    ids = plain.batch(range(200))["caption"]
    assert (ids[:, 30] == EOS).all() and not (ids == EXCLUDED).any()
    assert [plain.vocabulary.decode(row) for row in ids] == plain.captions
    assert attribute_scores(plain.captions, plain.attributes.repeat(10, axis=0))["recall"] == 1
    assert birds.load_bird_pairs("test", 30, **settings, level="plain").captions[:200] == plain.captions
    other = birds.load_bird_pairs("validation", 20, **settings, level="plain")
    assert other.vocabulary == plain.vocabulary != full.vocabulary
    with pytest.raises(LitvaeError, match="no captions of level 'easy'"):
        birds.load_bird_pairs("test", 20, **settings, level="easy")


def test_hiding_one_side_of_the_pairs(tmp_path):
    pairs = birds.load_bird_pairs("test", 20, source="standin", steps=2, images=64, root=tmp_path)
    for scheme, names in (("split", {"feature", "caption"}), ("caption", {"caption"}), ("feature", {"feature"})):
        partial = PartialData(pairs, 0.5, scheme, 0)
        shown = [set(partial.batch(partial.rows(step, 16, 0, partial_steps=1))) for step in range(4)]
        assert shown[0] == shown[2] == {"feature", "caption"} and shown[1] | shown[3] == names


def test_real_birds_as_pairs(release):
    pairs = birds.load_bird_pairs("test", source="real", steps=2, images=64, root=release.parent)
    assert (pairs.name, pairs.source, len(pairs)) == ("cub", "real", 30) and pairs.attributes is None
    assert "BirdFeatures (2 steps on 64 drawn_birds" in pairs.extractor
    assert set(pairs.vocabulary.words[3:]) == {".", "caption", "of", "ibis", "tern"}  # of training birds: no wren
    assert pairs.vocabulary.decode(pairs.batch([0])["caption"][0]).startswith("caption of. <exc>")
    with pytest.raises(LitvaeError, match="cub has no captions of level 'plain'"):
        birds.load_bird_pairs("test", source="real", steps=2, images=64, root=release.parent, level="plain")


def test_training_learns_and_leaves_the_random_state_alone(tmp_path):
    data = load("cub", "train", "standin", 256, root=tmp_path, classes="any")
    state = torch.get_rng_state()
    extractor = birds.train_bird_features(data, steps=40, seed=1)
    assert torch.equal(state, torch.get_rng_state()) and not extractor.training
    first = birds.train_bird_features(data, steps=1, seed=1)
    mean = lambda trained: np.mean(list(birds.attribute_accuracy(trained, data).values()))
    assert mean(extractor) > mean(first) + 0.05
    with pytest.raises(LitvaeError, match="steps is 0"): birds.train_bird_features(data, steps=0)


def test_the_kept_extractor(tmp_path):
    a = birds.trained_bird_features(2, 64, root=tmp_path).state_dict()
    path, = (tmp_path / "bird_features").glob("*.safetensors")
    before = path.read_bytes()
    b = birds.trained_bird_features(2, 64, root=tmp_path).state_dict()
    assert path.read_bytes() == before and all(torch.equal(a[key], b[key]) for key in a)
    for damaged in (before[:-10], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match="BirdFeatures"): birds.trained_bird_features(2, 64, root=tmp_path)
        assert path.read_bytes() == damaged


def test_resnet_weights(tmp_path):
    from torchvision.models import resnet101
    torch.manual_seed(0)
    network, path = resnet101(weights=None), tmp_path / "resnet101.pth"
    torch.save(network.state_dict(), path)
    extractor = birds.resnet101_features(path)
    images = np.random.default_rng(0).integers(256, size=(1, 64, 64, 3), dtype=np.uint8)
    found = birds.image_features(images, extractor)
    network.fc = torch.nn.Identity()
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    inputs = torch.nn.functional.interpolate(inputs, (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad(): expected = network.eval()(inputs)
    assert found.shape == (1, 2048) and np.allclose(found, expected, atol=1e-4) and "not normalised" in extractor.name
    truncate(path)
    with pytest.raises(CorruptFileError, match="ResNet-101"): birds.resnet101_features(path)
    with pytest.raises(LitvaeError, match="is missing"): birds.resnet101_features(tmp_path / "none.pth")


def test_weights_are_read_without_running_code(tmp_path):
    class Trap:
        def __reduce__(self): return (tmp_path / "sprung").touch, ()
    torch.save(Trap(), tmp_path / "trap.pth")
    with pytest.raises(CorruptFileError): birds.resnet101_features(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("shape, kind", [((2, 3, 8, 8), np.uint8), ((2, 8, 8, 3), float), ((0, 8, 8, 3), np.uint8)])
def test_images_of_another_form(shape, kind):
    images = np.zeros(shape, kind)
    with pytest.raises(LitvaeError, match="uint8"): birds.image_features(images, birds.BirdFeatures().eval())


def test_the_generator_says_what_it_chose():
    rng = np.random.default_rng(1)
    for i, bird in enumerate(rng.integers(birds.VALUES, size=(500, 12))):
        truth = {name: ATTRIBUTES[name][value] for name, value in zip(ATTRIBUTES, bird)}
        claims = claims_of(words.caption(bird, random.Random(i)))
        assert claims.items() <= truth.items() and claims
