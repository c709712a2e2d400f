"""Pictures of one's own as a data set: a folder of images, with masks or without."""
import os

import numpy as np
import pytest
import torch
from PIL import Image

from litvae.core.files import CorruptFileError, LitvaeError
from litvae.data import load
from litvae.data.folder import find_pictures, read_ids
from litvae.reproduce.cli import main

rng = np.random.default_rng(0)


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def mine(tmp_path):
    "Five pictures of different sizes with masks; returns their folder."
    for k, (h, w) in enumerate([(40, 40), (40, 61), (90, 33), (17, 16), (80, 80)]):
        save(rng.integers(256, size=(h, w, 3), dtype=np.uint8), tmp_path / "my_pictures" / "images" / f"p{k}.png")
        save(rng.integers(5, size=(h, w), dtype=np.uint8), tmp_path / "my_pictures" / "masks" / f"p{k}.png")
    return tmp_path / "my_pictures"


def own(path, *split, **options): return load("folder", *split, path=path, root=path.parent / "data", **options)


def expected(path, size, mask):
    "The square in the middle, by other means than the package's."
    array = torch.from_numpy(np.array(Image.open(path)).reshape(*Image.open(path).size[::-1], -1)).movedim(-1, 0)[None]
    h, w = array.shape[2:]
    side = min(h, w)
    array = array[..., (h - side) // 2:(h - side) // 2 + side, (w - side) // 2:(w - side) // 2 + side]
    if mask: return torch.nn.functional.interpolate(array, size=size)[0, 0].numpy()
    return torch.nn.functional.interpolate(array.double(), size=size, mode="bilinear", antialias=True)[0].movedim(0, -1)


def test_middle_squares_in_the_order_of_names(mine):
    ds = own(mine, size=20)
    assert (ds.name, ds.source, ds.split, len(ds)) == ("my_pictures", "real", "test", 5)
    assert ds.describe() == "my_pictures (real), test, 5 scenes of 20x20" and set(ds.arrays) == {"image", "mask"}
    for k, (image, mask) in enumerate(zip(ds["image"], ds["mask"])):
        assert np.array_equal(mask, expected(mine / "masks" / f"p{k}.png", 20, True))
        assert abs(image - expected(mine / "images" / f"p{k}.png", 20, False).numpy()).max() <= 1.01
    whole = own(mine, size=40, n=1)
    assert np.array_equal(whole["image"][0], np.array(Image.open(mine / "images" / "p0.png")))  # 40x40: pixel for pixel
    assert "seed" not in ds.meta and not list(mine.rglob("*.npy")) and list((mine.parent / "data" / "folder").iterdir())


def test_nothing_private_is_kept(mine):
    ds = own(mine)
    assert str(mine.parent) not in str(ds.meta)


def test_it_is_stored_once_and_made_again_after_a_change(mine, monkeypatch):
    first = own(mine)["mask"][:]
    from litvae.data import folder
    monkeypatch.setattr(folder, "_read", None)
    assert np.array_equal(own(mine)["mask"], first)  # opened, not read again
    monkeypatch.undo()
    save(np.full((40, 40), 3, np.uint8), mine / "masks" / "p0.png")
    os.utime(mine / "masks" / "p0.png", ns=(1, 1))
    again = own(mine)
    assert (again["mask"][0] == 3).all() and np.array_equal(again["mask"][1:], first[1:])
    (mine / "images" / "p4.png").unlink()
    assert len(own(mine)) == 4


def test_more_pictures_than_a_shard(tmp_path):
    colours = rng.integers(256, size=(300, 3), dtype=np.uint8)
    for k, colour in enumerate(colours):
        save(np.full((4, 4, 3), colour, np.uint8), tmp_path / "many" / "images" / f"{k:03}.png")
    assert len(own(tmp_path / "many", size=4, n=10)) == 10
    assert np.array_equal(own(tmp_path / "many", size=4)["image"][:, 0, 0], colours)
    with pytest.raises(LitvaeError, match="many, test has 300 items"): own(tmp_path / "many", size=4, n=301)


def test_splits(mine):
    with pytest.raises(LitvaeError, match="no split 'train', only \"test\""): own(mine, "train")
    for split, names in {"train": "012", "validation": "34"}.items():
        for kind in ("images", "masks"):
            for k in names:
                (mine / split / kind).mkdir(parents=True, exist_ok=True)
                (mine / kind / f"p{k}.png").rename(mine / split / kind / f"p{k}.png")
    with pytest.raises(LitvaeError, match="one or the other"): own(mine, "train")
    for kind in ("images", "masks"): (mine / kind).rmdir()
    assert [len(own(mine, split)) for split in ("train", "validation")] == [3, 2]
    with pytest.raises(LitvaeError, match="no split 'test', only train, validation"): own(mine)
    assert [image.parent.parent.name for image, _ in find_pictures(mine, "train")] == ["train"] * 3


def test_without_masks(mine):
    (mine / "masks").rename(mine.parent / "elsewhere")
    ds = own(mine, size=8)
    assert list(ds.arrays) == ["image"] and find_pictures(mine)[0][1] is None
    with pytest.raises(LitvaeError, match="metrics of segmentation"): ds["mask"]


ids = rng.integers(4, size=(12, 15), dtype=np.uint8)
COLOURS = np.array([[0, 0, 0], [0, 0, 7], [3, 0, 0], [255, 255, 255]], np.uint8)  # in the order of their ids


def palette(array):
    image = Image.fromarray(array).convert("P")
    image.putdata(array.ravel().tolist())
    image.putpalette([9, 9, 9] * 4)  # the colours do not matter
    return image


@pytest.mark.parametrize("name, image, expected", [
    ("palette", palette(ids), ids), ("grey", Image.fromarray(ids * 80), ids * 80),
    ("colour", Image.fromarray(COLOURS[ids]), ids),
    ("no background", Image.fromarray(COLOURS[1 + ids % 3]), 1 + ids % 3),
    ("alpha", Image.fromarray(np.dstack([COLOURS[ids | 1], 255 * (ids > 1).astype(np.uint8)])),
     np.where(ids > 1, 1 + (ids == 3) * (len(np.unique((ids | 1)[ids > 1])) - 1), 0)),
    ("bits", Image.fromarray(ids > 1), ids > 1), ("grey with alpha", Image.fromarray(ids).convert("LA"), ids),
])
def test_forms_of_masks(tmp_path, name, image, expected):
    image.save(tmp_path / "mask.png")
    found = read_ids(tmp_path / "mask.png")
    assert found.dtype == np.uint8 and np.array_equal(found, expected)


def test_photographs(tmp_path):
    "JPEG with a note to turn it, a picture with a palette, one with an alpha channel, a grey one."
    scene = np.repeat(np.repeat(rng.integers(256, size=(3, 6, 3), dtype=np.uint8), 16, 0), 16, 1)  # 48x96
    folder = tmp_path / "photographs"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    save(scene, folder / "images" / "a.JPG", exif=exif, quality=100, subsampling=0)
    save(np.dstack([scene, scene[..., 0]]), folder / "images" / "b.png")
    save(scene[..., 0], folder / "images" / "c.jpeg", quality=100)
    (folder / "images" / ".DS_Store").write_bytes(b"x")
    (folder / "images" / "notes.txt").write_bytes(b"x")
    for name, shape in {"a": (96, 48), "b": (48, 96), "c": (48, 96)}.items():
        save(np.ones(shape, np.uint8), folder / "masks" / f"{name}.png")
    ds = own(folder, size=48)
    turned = np.rot90(scene, -1)
    assert abs(ds["image"][0].astype(int) - turned[24:72]).mean() < 6 and ds["mask"].min() == 1
    assert np.array_equal(ds["image"][1], scene[:, 24:72])
    assert abs(ds["image"][2, ..., 1].astype(int) - scene[:, 24:72, 0]).mean() < 6


def noise(path): save(rng.integers(256, size=(40, 40, 3), dtype=np.uint8), path)
def cut(path): path.write_bytes(path.read_bytes()[:-60])
def text(path): path.write_text("a picture")
def wide(path): save(np.zeros((40, 40), np.uint16), path)
def small(path): save(np.zeros((39, 40), np.uint8), path)


@pytest.mark.parametrize("kind, damage, words", [
    ("masks", noise, "at most 255 colours"), ("masks", cut, "whole picture"), ("masks", text, "whole picture"),
    ("masks", wide, "8 bits a channel"), ("masks", small, "expected 40x40 px like .*p0.png, found 40x39"),
    ("images", cut, "whole picture"), ("images", text, "whole picture"), ("images", wide, "8 bits a channel"),
])
def test_damaged_files(mine, kind, damage, words):
    damage(path := mine / kind / "p0.png")
    before = path.read_bytes()
    with pytest.raises(CorruptFileError, match=words) as caught: own(mine)
    assert str(path) in str(caught.value) and path.read_bytes() == before
    assert not list(mine.parent.rglob("meta.json"))


def test_folders_of_another_form(mine, tmp_path):
    with pytest.raises(LitvaeError, match="needs the folder"): load("folder", root=tmp_path)
    with pytest.raises(LitvaeError, match="no real files in .*nowhere"): own(tmp_path / "nowhere")
    with pytest.raises(LitvaeError, match="has no stand-in"): own(mine, source="standin")
    with pytest.raises(LitvaeError, match="size is 0"): own(mine, size=0)
    with pytest.raises(LitvaeError, match="no option 'crop'; it has size"): own(mine, crop=3)
    (mine / "masks" / "p3.png").unlink()
    with pytest.raises(LitvaeError, match="p3.png is missing, the mask of"): own(mine)
    save(np.zeros((9, 9, 3), np.uint8), mine / "images" / "p1.jpg")
    with pytest.raises(LitvaeError, match="would share"): own(mine)
    (tmp_path / "empty" / "images").mkdir(parents=True)
    (tmp_path / "empty" / "images" / "notes.txt").write_text("")
    with pytest.raises(LitvaeError, match="has no pictures"): own(tmp_path / "empty")


@pytest.mark.parametrize("name", ["multi_dsprites", "multi_dsprites_proc", "shapestacks_proc", "folder"])
def test_no_folder_passes_for_a_known_set(mine, name):
    mine.rename(mine.with_name(name))
    with pytest.raises(LitvaeError, match="name of a known set; rename it"): own(mine.with_name(name))


def test_official_files_elsewhere(tmp_path):
    "`path` also names official files outside the data root; it never falls back."
    from litvae.data.multi_dsprites import multi_dsprites_proc
    scenes = multi_dsprites_proc(np.random.default_rng(1), 5)
    (tmp_path / "disk").mkdir()
    np.save(tmp_path / "disk" / "test_images_rand4.npy", scenes["image"].astype(np.float32) / 255)
    np.save(tmp_path / "disk" / "test_masks_rand4.npy", scenes["mask"][..., None].astype(np.float64))
    ds = load("multi_dsprites", "test", path=tmp_path / "disk", root=tmp_path / "data")
    assert ds.describe() == "multi_dsprites (real), test, 5 scenes of 64x64"
    with pytest.raises(LitvaeError, match="no real files"):
        load("multi_dsprites", path=tmp_path, root=tmp_path / "data")
    with pytest.raises(LitvaeError, match='source is "standin"'):
        load("multi_dsprites", source="standin", path=tmp_path / "disk", root=tmp_path / "data")


def test_the_command_line_shows_how(mine, capsys, monkeypatch):
    monkeypatch.setenv("LITVAE_DATA", str(mine.parent / "data"))
    assert main(["data"]) == 0
    listing = capsys.readouterr().out
    assert "litvae data folder --path FOLDER" in listing and "FOLDER/images/*" in listing
    assert main(["data", "folder", "--path", str(mine), "--size", "16"]) == 0
    out = capsys.readouterr().out
    assert "my_pictures (real), test, 5 scenes of 16x16" in out and "with masks: 4 to 4 objects" in out
    (mine / "masks").rename(mine / "no-masks")
    assert main(["data", "folder", "--path", str(mine)]) == 0
    assert "no masks" in capsys.readouterr().out
    assert main(["data", "folder"]) == 1 and capsys.readouterr().err.count("\n") == 1
    assert main(["data", "folder", "--path", str(mine), "--split", "train"]) == 1
    assert "no split 'train'" in capsys.readouterr().err
