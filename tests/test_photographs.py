"""CIFAR, Indoor67, Places205 and ImageNet from small files in their official forms, with what can be wrong with them,
and the furnished rooms that stand in for two of them."""
import hashlib
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets
from torchvision.datasets import imagenet as official_imagenet

from litvae.core.files import CorruptFileError, LitvaeError
from litvae.data import furnished_rooms as rooms, photographs as ph
from litvae.data.sources import catalogue, load, resolve, shard_rng

SPLITS = ("train", "validation", "test")


def picture(seed, size=(12, 16)): return np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8)


def square(array):
    "The middle square of (12, 16, 3), by hand."
    return array[:, 2:14]


# CIFAR
@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "Writes an official set of 10 pictures a file; returns its training and test pictures, (N, 32, 32, 3), and labels."
    monkeypatch.setattr(ph, "CIFAR_HELD_OUT", 3)

    def write(kind, key, classes):
        official, rng, written = getattr(datasets, kind), np.random.default_rng(0), {}
        folder = tmp_path / kind.lower() / official.base_folder
        folder.mkdir(parents=True)

        def put(name, content):
            (folder / name).write_bytes(pickle.dumps(content))
            return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

        for lists in ("train_list", "test_list"):
            rows, parts = [], []
            for name, _ in getattr(official, lists):
                data = rng.integers(256, size=(10, 3072), dtype=np.uint8)
                label = rng.integers(classes, size=10).tolist()
                rows.append(put(name, {"data": data, key: label, "filenames": [""] * 10}))
                parts.append((data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), label))
            monkeypatch.setattr(official, lists, rows)
            written[lists] = [np.concatenate(part) for part in zip(*parts)]
        name, md5 = put(official.meta["filename"], {official.meta["key"]: [str(i) for i in range(classes)]})
        monkeypatch.setattr(official, "meta", official.meta | {"md5": md5})
        return written

    return write


@pytest.mark.parametrize("kind, key, classes", [("CIFAR10", "labels", 10), ("CIFAR100", "fine_labels", 100)])
def test_cifar_is_what_was_written(cifar, tmp_path, kind, key, classes):
    (images, labels), (others, marks) = cifar(kind, key, classes).values()
    sets = {split: load(kind.lower(), split, "real", root=tmp_path) for split in SPLITS}
    assert np.array_equal(np.concatenate([sets["train"]["image"], sets["validation"]["image"]]), images)
    assert len(sets["validation"]) == 3 and np.array_equal(sets["validation"]["label"], labels[-3:])
    assert np.array_equal(sets["test"]["image"], others) and np.array_equal(sets["test"]["label"], marks)
    assert sets["train"].images([4]).shape == (1, 3, 32, 32)


def test_a_cifar_file_that_differs_is_named_and_never_unpickled(cifar, tmp_path):
    cifar("CIFAR10", "labels", 10)
    folder, opened = tmp_path / "cifar10" / datasets.CIFAR10.base_folder, tmp_path / "opened"

    class Trap:
        def __reduce__(self): return os.mkdir, (str(opened),)

    good = (folder / "test_batch").read_bytes()
    (folder / "test_batch").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CorruptFileError, match="test_batch: expected a file with the MD5 sum"):
        load("cifar10", "test", root=tmp_path)
    assert not opened.exists()
    (folder / "test_batch").write_bytes(good)
    assert len(load("cifar10", "test", root=tmp_path)) == 10
    (folder / "batches.meta").unlink()
    with pytest.raises(LitvaeError, match="batches.meta is missing.*CIFAR10"): load("cifar10", "train", root=tmp_path)


# Pictures of all kinds
def test_pictures_of_all_kinds_become_rgb(tmp_path):
    array = picture(0)
    coarse = array // 64 * 64  # few enough colours for a palette
    as_palette = Image.fromarray(coarse).quantize(64, dither=Image.Dither.NONE)
    clear = Image.fromarray(np.dstack([array, np.arange(192, dtype=np.uint8).reshape(12, 16)]))
    see_through = Image.fromarray(array[..., 0] // 16).convert("P")
    see_through.info["transparency"] = bytes([0, 255, 7])
    cases = {"a.png": (Image.fromarray(array), array), "b.gif": (as_palette, np.asarray(as_palette.convert("RGB"))),
             "c.png": (Image.fromarray(array[..., 0]), array[..., :1].repeat(3, -1)), "d.png": (clear, array),
             "e.png": (see_through, np.asarray(see_through.convert("RGBA"))[..., :3]),
             "f.png": (Image.fromarray(array[..., 0] > 99), (array[..., :1] > 99).repeat(3, -1) * np.uint8(255))}
    for name, (kind, expected) in cases.items():
        kind.save(tmp_path / name)
        os.rename(tmp_path / name, path := tmp_path / f"{name}.jpg")  # whatever they are called
        assert np.array_equal(ph.read_square(path, 12), square(expected)), name
    flat = Image.new("CMYK", (9, 9), (0, 255, 255, 0))
    flat.save(tmp_path / "cmyk.jpg")
    assert np.abs(ph.read_square(tmp_path / "cmyk.jpg", 3).astype(int) - [255, 0, 0]).max() < 8


def test_held_out_against_a_loop():
    labels = np.random.default_rng(0).integers(6, size=200)
    labels = labels[labels != 3]  # a class without pictures
    expected = np.zeros(len(labels), bool)
    for kind in range(6):
        rows = np.flatnonzero(labels == kind)
        if len(rows) >= 10: expected[rows[-(len(rows) // 10):]] = True
    assert np.array_equal(ph.held_out(labels, 10), expected) and expected.any()


# Indoor67
@pytest.fixture
def indoor(tmp_path):
    "Three classes with 24 pictures each, 20 to train, 2 to test, 2 in no list; returns the folder."
    folder, lists = tmp_path / "indoor67", {"Train": [], "Test": []}
    for k, kind in enumerate(("attic", "bar", "tv_studio")):
        (folder / "Images" / kind).mkdir(parents=True)
        for i in range(24):
            Image.fromarray(picture(100 * k + i)).save(folder / "Images" / kind / f"no {i:02}.jpg", format="PNG")
            if i < 22: lists["Train" if i < 20 else "Test"].append(f"{kind}/no {i:02}.jpg")
        (folder / "Images" / kind / "Thumbs.db").write_bytes(b"not a picture")
    for part, names in lists.items():
        start = "\ufeff" if part == "Train" else ""  # some editors put a mark there
        (folder / f"{part}Images.txt").write_text(start + "\r\n".join(names) + " \r\n\r\n", encoding="utf-8")
    return folder


def found(ds): return {(100 * int(k) + i) for k, image in zip(ds["label"], ds["image"]) for i in range(24)
                       if np.array_equal(image, square(picture(100 * int(k) + i)))}


def ids(first, last): return {100 * k + i for k in range(3) for i in range(first, last)}


def test_indoor_splits(indoor, tmp_path):
    def get(split, **options): return load("indoor67", split, "real", root=tmp_path, size=12, **options)

    sets = {split: get(split) for split in SPLITS}
    assert found(sets["train"]) == ids(0, 18) and found(sets["validation"]) == ids(18, 20)
    assert found(sets["test"]) == ids(20, 22) and [len(ds) for ds in sets.values()] == [54, 6, 6]
    every = get("train", unlabelled=True)
    assert found(every) == ids(0, 20) | ids(22, 24) and len(every) == 66
    assert np.array_equal(get("test", unlabelled=True)["image"], sets["test"]["image"])
    labels = sets["train"]["label"].tolist()
    assert labels != sorted(labels)  # mixed, so that the first few are of all classes
    assert np.array_equal(get("train", n=5)["image"], sets["train"]["image"][:5])


@pytest.mark.parametrize("part, line, message", [
    ("Train", "bar", "one CLASS/FILE"), ("Test", "../bar/no 20.jpg", "one CLASS/FILE"),
    ("Test", "bar/..", "one CLASS/FILE"), ("Train", "bar/no\0 20.jpg", "plain text"),
    ("Train", "bar/no 03.jpg", "no 03.jpg twice"), ("Test", "bar/no 03.jpg", "other pictures than"),
    ("Train", "cellar/no 1.jpg", "cellar in one of them only"), ("Train", "\udcff", "plain text")])
def test_indoor_wrong_lists(indoor, part, line, message):
    path = indoor / f"{part}Images.txt"
    with open(path, "ab") as f: f.write(line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(CorruptFileError, match=message): list(ph.indoor67(indoor, "train").shards(0))


def test_indoor_damage_names_the_file_and_goes_on_after_it_is_mended(indoor, tmp_path):
    path = indoor / "Images" / "bar" / "no 20.jpg"
    whole = path.read_bytes()
    for broken in (whole[:150], b"", b"<html>404</html>"):
        path.write_bytes(broken)
        with pytest.raises(CorruptFileError, match="no 20.jpg"): load("indoor67", "test", root=tmp_path, size=12)
    path.unlink()
    with pytest.raises(LitvaeError, match="no 20.jpg is missing"): load("indoor67", "test", root=tmp_path, size=12)
    path.write_bytes(whole)
    assert found(load("indoor67", "test", root=tmp_path, size=12)) == ids(20, 22)
    (indoor / "TestImages.txt").unlink()
    with pytest.raises(LitvaeError, match="TestImages.txt is missing.*indoorCVPR_09"): load("indoor67", root=tmp_path)
    with pytest.raises(LitvaeError, match="size is -1"): ph.indoor67(indoor, "test", size=-1)


def test_a_damaged_picture_in_a_later_shard_does_not_lose_the_first(indoor, tmp_path, monkeypatch):
    monkeypatch.setattr(ph, "SHARD", 16)
    monkeypatch.setattr("litvae.data.sources.SHARD", 16)
    order = shard_rng({"name": "indoor67", "split": "train"}, 0).permutation(54)
    lines = (indoor / "TrainImages.txt").read_text(encoding="utf-8-sig").split()
    names = [f"{line} {number}" for line, number in zip(lines[::2], lines[1::2]) if int(number[:2]) < 18]
    path = indoor / "Images" / names[order[40]]  # in the third shard
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(CorruptFileError, match=path.name): load("indoor67", "train", root=tmp_path, size=12)
    read, count = ph.read_square, []
    monkeypatch.setattr(ph, "read_square", lambda *args: count.append(args) or read(*args))
    path.write_bytes(whole)
    assert found(load("indoor67", "train", root=tmp_path, size=12)) == ids(0, 18) and len(count) == 54 - 32


def test_a_picture_removed_halfway_does_not_mix_two_orders(indoor, tmp_path, monkeypatch):
    "Without labels no list says what belongs to the set, so a set without the damaged picture is another one."
    monkeypatch.setattr(ph, "SHARD", 16)
    monkeypatch.setattr("litvae.data.sources.SHARD", 16)
    names = sorted(f"{kind}/no {i:02}.jpg" for kind in ("attic", "bar", "tv_studio") for i in range(24)
                   if i not in (20, 21))
    order = shard_rng({"name": "indoor67", "split": "train"}, 0).permutation(66)
    damaged = names[order[40]]  # in the third shard
    (indoor / "Images" / damaged).write_bytes(b"GIF89a")
    def get(): return load("indoor67", "train", root=tmp_path, size=12, unlabelled=True)
    with pytest.raises(CorruptFileError, match=damaged): get()
    (indoor / "Images" / damaged).unlink()
    rest = get()
    assert len(found(rest)) == len(rest) == 65


# Places205
@pytest.mark.parametrize("base", ["data/vision/torralba/deeplearning/images256", "images256"])
def test_places(tmp_path, base):
    folder, lines = tmp_path / "places205", []
    for i in range(200):
        name = f"{'ab'[i % 2]}/{['abbey/inside', 'bar'][i % 2]}/gsun {i}.jpg"
        (folder / base / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, (4, 4))).save(folder / base / name, format="PNG")
        lines.append(f"{name} {[3, 204][i % 2]}")
    lists = folder / "trainvalsplit_places205"
    lists.mkdir()
    (lists / "train_places205.csv").write_text("\n".join(lines))
    (lists / "val_places205.csv").write_bytes(("\ufeff" + "\r\n".join("/" + line for line in lines[:3])).encode())
    sets = {split: load("places205", split, "real", root=tmp_path, size=4) for split in SPLITS}
    for split, rows in {"train": range(198), "validation": (198, 199), "test": range(3)}.items():
        expected = {(bytes(picture(i, (4, 4))), [3, 204][i % 2]) for i in rows}
        assert {(bytes(im), int(k)) for im, k in zip(sets[split]["image"], sets[split]["label"])} == expected
    for line in ("a/x.jpg", "a/x.jpg 205", "a/x.jpg -1", "x.jpg 3", "a/../../x.jpg 3", lines[0]):
        (lists / "val_places205.csv").write_text("\n".join([*lines[:3], line]))
        with pytest.raises(CorruptFileError, match="val_places205.csv"): list(ph.places205(folder, "test").shards(0))


# ImageNet
WNIDS = ("n01440764", "n01443537")


def write_archives(folder, monkeypatch):
    "Small official archives: two classes of 100 training pictures, three validation pictures of classes 2, 1, 2."
    work, meta = folder.parent / "work", {}
    folder.mkdir(), work.mkdir()

    def pack(name, paths, mode="w"):
        with tarfile.open(name, mode) as f:
            for path in paths: f.add(path, path.name)
        return name

    def save(seed, name):
        Image.fromarray(picture(seed)).save(work / name, format="PNG")
        return work / name

    inner = [pack(work / f"{wnid}.tar", [save(100 * k + i, f"{wnid}_{i:03}.JPEG") for i in range(100)])
             for k, wnid in enumerate(WNIDS)]
    synsets = np.array([[(1, WNIDS[0], "tench, Tinca", "a fish", 0), (2, WNIDS[1], "goldfish", "a fish", 0),
                         (3, "n0", "fish", "all", 2)]],
                       dtype=[(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")])
    data = work / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": synsets})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n2\n")
    val = [save(500 + i, f"ILSVRC2012_val_0000000{i + 1}.JPEG") for i in range(3)]
    for key, (name, _) in official_imagenet.ARCHIVE_META.items():
        content = {"train": inner, "val": val, "devkit": [data.parent]}[key]
        pack(folder / name, content, "w:gz" if key == "devkit" else "w")
        meta[key] = (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
    monkeypatch.setattr(official_imagenet, "ARCHIVE_META", meta)
    return {key: folder / name for key, (name, _) in meta.items()}


def test_imagenet_from_archives(tmp_path, monkeypatch):
    folder = tmp_path / "imagenet"
    archives = write_archives(folder, monkeypatch)
    before = {path: path.read_bytes() for path in archives.values()}
    sets = {split: load("imagenet", split, "real", root=tmp_path, size=12) for split in SPLITS}
    assert {key: len(ds) for key, ds in sets.items()} == {"train": 198, "validation": 2, "test": 3}
    seen = {(bytes(image), int(k)) for image, k in zip(sets["test"]["image"], sets["test"]["label"])}
    assert seen == {(bytes(square(picture(500 + i))), k) for i, k in enumerate((1, 0, 1))}
    assert {bytes(image) for image in sets["validation"]["image"]} == {bytes(square(picture(i))) for i in (99, 199)}
    learned = {bytes(square(picture(i))) for i in range(200) if i % 100 < 99}
    assert {bytes(image) for image in sets["train"]["image"]} == learned
    assert before == {path: path.read_bytes() for path in archives.values()}  # the user's files are only read
    assert sorted(os.listdir(folder / "train")) == list(WNIDS) and not (folder / "unpacking").exists()
    for path in before: path.unlink()  # the tree is enough, and it is the same data set
    assert load("imagenet", "test", root=tmp_path, size=12).meta == sets["test"].meta
    next((folder / "val" / WNIDS[0]).iterdir()).unlink()  # a picture less: another data set
    assert len(load("imagenet", "test", root=tmp_path, size=12)) == 2


def test_imagenet_that_is_not_whole(tmp_path, monkeypatch):
    folder = tmp_path / "imagenet"
    archives = write_archives(folder, monkeypatch)
    (folder / "unpacking" / "train").mkdir(parents=True)  # left by one that was killed
    whole = archives["val"].read_bytes()
    archives["val"].write_bytes(whole[:-512])
    with pytest.raises(CorruptFileError, match="ILSVRC2012_img_val.tar"): load("imagenet", "test", root=tmp_path)
    assert not (folder / "val").exists()
    archives["val"].write_bytes(whole)
    assert len(load("imagenet", "test", root=tmp_path, size=12)) == 3
    archives["devkit"].unlink()
    with pytest.raises(LitvaeError, match="devkit_t12.tar.gz is there"): load("imagenet", "train", root=tmp_path)
    (folder / "train" / WNIDS[0]).mkdir(parents=True)
    with pytest.raises(LitvaeError, match=f"class {WNIDS[1]} is only in one"): load("imagenet", "train", root=tmp_path)
    (folder / "train" / f"{WNIDS[1]}.tar").write_bytes(b"")
    with pytest.raises(LitvaeError, match="one folder for each class"): load("imagenet", "train", root=tmp_path)
    with pytest.raises(LitvaeError, match="has no stand-in"): resolve("imagenet", "standin", tmp_path)


# Stand-ins and crops
def test_stand_ins_bear_their_own_name(tmp_path):
    found = {row["name"]: row["standin"] for row in catalogue(tmp_path)}
    expected = {"cifar10": "parts21_proc", "cifar100": "parts21_proc", "indoor67": "furnished_rooms_proc",
                "places205": "furnished_rooms_proc", "furnished_rooms": "furnished_rooms_proc", "imagenet": None}
    assert {name: found[name] for name in expected} == expected
    ds = load("cifar100", "test", "standin", n=2, root=tmp_path)
    assert ds.describe().startswith("parts21_proc (grid) (stand-in)")
    for name in ("cifar10", "indoor67", "places205", "imagenet"):
        with pytest.raises(LitvaeError, match=f"{name}: no real files"): load(name, "test", "real", root=tmp_path)
    with pytest.raises(LitvaeError, match="only a stand-in"): load("furnished_rooms", "test", "real", root=tmp_path)


def test_photographs_of_both_packages_are_found(tmp_path, monkeypatch):
    (tmp_path / "skimage" / "data").mkdir(parents=True)
    (tmp_path / "skimage" / "__init__.py").write_text("raise ImportError('it is not to be imported')")
    Image.new("L", (300, 300)).save(tmp_path / "skimage" / "data" / "brick.png")
    monkeypatch.syspath_prepend(tmp_path)
    assert set(ph.sample_photographs()) == {"china", "flower", "brick"}
    crops = ph.photographs_crops(6)
    assert crops.shape == (6, 64, 64, 3) and [bool(crop.any()) for crop in crops] == [True, True, False] * 2


def test_crops_are_pieces_of_the_photographs(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    path = tmp_path / "grey.png"
    Image.fromarray(rng.integers(256, size=(20, 31), dtype=np.uint8)).save(path)
    monkeypatch.setattr(ph, "sample_photographs", lambda: {"grey": path})
    crops = ph.photographs_crops(6, size=20)
    whole = np.asarray(Image.open(path).convert("RGB"))
    places = {bytes(whole[:, left:left + 20].copy()) for left in range(12)}
    assert {bytes(crop) for crop in crops} <= places and len({bytes(crop) for crop in crops}) > 1
    with pytest.raises(LitvaeError, match="at most 20"): ph.photographs_crops(1, size=21)
    monkeypatch.setattr(ph, "sample_photographs", dict)
    with pytest.raises(LitvaeError, match="pip install scikit-learn"): ph.photographs_crops(1)


# Furnished rooms
def test_rooms_are_a_function_of_the_generator_and_show_what_the_label_says():
    a, b = (rooms.furnished_rooms_proc(shard_rng({"name": "x"}, 1), 64) for _ in range(2))
    for key in a: assert np.array_equal(a[key], b[key]) and a[key].dtype == np.uint8
    names = [set(rooms.CLASSES[label].split(" + ")) for label in a["label"]]
    shown = [{rooms.KINDS[k - 1] for k in np.unique(f[f > 0])} for f in a["furniture"]]
    assert all(s <= n for s, n in zip(shown, names)) and sum(s == n for s, n in zip(shown, names)) > 58
    small = rooms.furnished_rooms_proc(shard_rng({"name": "x"}, 1), 64, size=32)
    assert small["image"].shape == (64, 32, 32, 3) and np.array_equal(small["label"], a["label"])
    halves = a["image"].reshape(64, 32, 2, 32, 2, 3).mean((2, 4))  # the same scenes, averaged
    assert np.abs(halves - small["image"]).mean() < 4


def test_colours_places_and_counts_know_nothing_of_the_class():
    p = rooms.draw_furnished(np.random.default_rng(1), 15_000)
    numbers = {"here": p["here"].sum(1), "wall": p["wall"], "floor": p["floor"], "yaw": np.cos(p["yaw"]),
               "colours": p["colours"].reshape(15_000, -1), "camera": p["camera"], "light": p["light"]}
    for name, x in numbers.items():
        x = x.reshape(15_000, -1).astype(float)
        means = np.stack([x[p["label"] == k].mean(0) for k in range(15)])
        z = (means - x.mean(0)) / (x.std(0) + 1e-9) * 1000**0.5  # about 1,000 rooms a class
        assert np.abs(z).max() < 5 and z.std() < 1.3, name
    assert np.bincount(p["label"], minlength=15).min() > 850
