"""ShapeStacks: the official pictures in their official layout, and the towers that stand in for them."""
import hashlib, shutil

import numpy as np
import pytest
import torch
from PIL import Image

from litvae.core.files import CorruptFileError, LitvaeError
from litvae.data import load, shapestacks as ss, sources
from litvae.data.ray_caster import camera_rays, lamp_numbers, render, silhouettes

NAMES = [f"env_{kind}-{level}-h={h}-vcom={com}-vpsf={psf}-v={v}" for v, (kind, level, h, com, psf) in enumerate(
    [("ccs", "hard", 4, 0, 0), ("blocks", "easy", 2, 1, 0), ("ccs", "easy", 6, 0, 3), ("blocks", "hard", 3, 0, 0),
     ("ccs", "easy", 5, 0, 0), ("ccs", "hard", 2, 10, 0)])]
STABLE = [1, 0, 0, 1, 1, 0]
MAP = "iseg-w=0-f=0-l=0-c=original-cam_{}-mono-0.map"


def picture(scenario, camera):
    "A coarse pattern (224, 224, 3) that tells scenario and camera."
    tiles = np.random.default_rng([scenario, camera]).integers(256, size=(28, 28, 3), dtype=np.uint8)
    return np.kron(tiles, np.ones((8, 8, 1), np.uint8))


def labels(scenario, camera):
    return np.random.default_rng([scenario, camera, 1]).integers(8, size=(224, 224), dtype=np.uint8)


def write_tree(folder, cameras=3):
    "The official layout with cameras numbered 1, 2, 10 (for 3 cameras), so that names do not sort like numbers."
    for i, name in enumerate(NAMES):
        for kind in ("recordings", "iseg"): (folder / kind / name).mkdir(parents=True)
        for camera in (*range(1, cameras), 10):
            rgb = folder / "recordings" / name / f"rgb-w={i}-f=2-l=1-c=unique-cam_{camera}-mono-0.png"
            Image.fromarray(picture(i, camera)).save(rgb)
            values = np.dstack([labels(i, camera) * 32] * 3 + [np.full((224, 224), 255, np.uint8)])
            Image.fromarray(values).save(folder / "iseg" / name / MAP.format(camera), format="png")
        for other in ("vseg-w=0-f=0-l=0-c=original-cam_1-mono-0.png", "depth-w=0-f=0-l=0-c=original-cam_1-mono-0.png",
                      "rgb-w=1-f=2-l=1-c=unique-cam_1-mono-1.png", "notes.txt"):
            (folder / "recordings" / name / other).write_bytes(b"not for us")
    for subset, parts in {"default": {"train": [0, 1, 2, 4], "eval": [3], "test": [5]},
                          "ccs_all": {"train": [0, 2], "eval": [4], "test": [5]}}.items():
        (folder / "splits" / subset).mkdir(parents=True)
        for part, which in parts.items():
            (folder / "splits" / subset / f"{part}.txt").write_text("".join(f"{NAMES[i]}\n" for i in which))
    (folder / "meta").mkdir()
    (folder / "meta" / "blacklist_stable.txt").write_text(f"{NAMES[0]}\n")
    (folder / "meta" / "blacklist_unstable.txt").write_text(f"{NAMES[2]}\n\n{NAMES[5]}")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory): return write_tree(tmp_path_factory.mktemp("official") / "shapestacks")


@pytest.fixture
def official(written, tmp_path):
    "A tree of one's own, to be damaged."
    return shutil.copytree(written, tmp_path / "shapestacks")


def real(folder, split="train", **options):
    return load("shapestacks", split, source="real", root=folder.parent, **options)


# ------------------------------------------------------------------------------------------------------- real files
@pytest.mark.parametrize("size", [64, 16, 50, 196])
def test_crop_and_sizes(official, size):
    "Against PyTorch: centre crop of 196, antialiased bilinear; nearest for the labels."
    ds = real(official, size=size)
    assert ds.describe() == f"shapestacks (real), train, 12 scenes of {size}x{size}"
    train = [0, 1, 2, 4]
    for image, mask, index, camera in zip(ds["image"], ds["mask"], ds["scenario"], ds["camera"]):
        i = train[index]
        pixels = torch.from_numpy(picture(i, camera))[None, 14:210, 14:210].movedim(-1, 1).double()
        exact = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        assert abs(torch.tensor(image) - exact[0].movedim(0, -1)).max() <= 1.01
        whole = torch.from_numpy(labels(i, camera))[None, None, 14:210, 14:210]
        assert np.array_equal(mask, torch.nn.functional.interpolate(whole, size=size)[0, 0])
    if size == 196: assert np.array_equal(image, picture(i, camera)[14:210, 14:210])


def test_splits_and_what_comes_with_them(official):
    for split, which in {"train": [0, 1, 2, 4], "validation": [3], "test": [5]}.items():
        ds = real(official, split, size=8)
        assert sorted(zip(ds["scenario"], ds["camera"])) == [(k, c) for k in range(len(which)) for c in (1, 2, 10)]
        assert [STABLE[which[k]] for k in ds["scenario"]] == ds["stable"].tolist()
    assert ss.scenarios(official, "train", "ccs_all") == [NAMES[0], NAMES[2]]
    assert len(real(official, subset="ccs_all", size=8)) == 6
    assert list(ds.meta["files"]) == ["test.txt"] and ds.meta["source"] == "real"


def test_each_scenario_comes_once_before_any_comes_twice(official):
    ds = real(official, size=8)
    turns = ds["scenario"].reshape(3, 4)
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in turns) and len(set(ds["camera"][:4])) > 1
    few = real(official, size=8, n=4)
    assert np.array_equal(few["image"], ds["image"][:4])


def test_order_does_not_depend_on_the_file_system(official, tmp_path, monkeypatch):
    listed = real(official, size=8)
    import os
    listdir = os.listdir
    monkeypatch.setattr(ss.os, "listdir", lambda path: listdir(path)[::-1])
    backwards = load("shapestacks", source="real", path=official, root=tmp_path / "again", size=8)
    for key in listed.arrays: assert np.array_equal(listed[key], backwards[key])


def test_one_camera_blacklists_and_no_masks(official):
    ds = real(official, camera=10, size=8)
    assert len(ds) == 4 and set(ds["camera"]) == {10}
    kept = real(official, blacklist=True, size=8)
    assert len(kept) == 6 and ss.scenarios(official, "train", blacklist=True) == [NAMES[1], NAMES[4]]
    assert set(kept.meta["files"]) == {"train.txt", "blacklist_stable.txt", "blacklist_unstable.txt"}
    with pytest.raises(LitvaeError, match="no items in the split test"): real(official, "test", blacklist=True)
    shutil.rmtree(official / "iseg")
    plain = real(official, masks=False, size=8)
    assert "mask" not in plain.arrays and len(plain) == 12
    with pytest.raises(LitvaeError, match="metrics of segmentation need it"): plain["mask"]


def test_scenarios_with_fewer_cameras(official):
    next((official / "recordings" / NAMES[1]).glob("rgb-*cam_2-*")).unlink()
    ds = real(official, size=8)
    assert len(ds) == 11 and sorted(ds["camera"][ds["scenario"] == 1]) == [1, 10]


def test_reading_goes_on_after_an_interruption(official, monkeypatch):
    for module in (sources, ss): monkeypatch.setattr(module, "SHARD", 4)
    whole, read = real(official, size=8)["image"][:], []
    def dying(path, real=ss._official):
        if path.suffix == ".png":
            if len(read) == 8: raise KeyboardInterrupt
            read.append(path)
        return real(path)
    with monkeypatch.context() as patch:
        patch.setattr(ss, "_official", dying)
        with pytest.raises(KeyboardInterrupt): real(official, size=9)
        assert len(read) == 8
    monkeypatch.setattr(ss, "_official", lambda path, real=ss._official: read.append(path) or real(path))
    del read[:]
    assert len(real(official, size=9)) == 12 and len(read) == 2 * 4  # the third shard alone, pictures and maps
    assert np.array_equal(real(official, size=8)["image"], whole)


def test_a_list_without_a_last_line_break(official):
    path = official / "splits" / "default" / "train.txt"
    path.write_text(path.read_text().rstrip("\n").replace("\n", "\r\n"))
    assert ss.scenarios(official, "train") == [NAMES[i] for i in (0, 1, 2, 4)]


@pytest.mark.parametrize("change, kind, words", [
    ({"subset": "blocks_all"}, LitvaeError, "blocks_all/train.txt is missing; it is in shapestacks-meta"),
    ({"subset": "css_all"}, LitvaeError, "unknown subset 'css_all'; known are default, ccs_all, blocks_all"),
    ({"camera": 3}, LitvaeError, "cam_3-mono-0.png is missing; it is in shapestacks-rgb"),
    ({"size": 224}, LitvaeError, "expected 1 to 196"), ({"size": 0}, LitvaeError, "expected 1 to 196"),
    ({"crop": 1}, LitvaeError, "size, subset, camera, blacklist, masks"),
])
def test_wrong_options(official, change, kind, words):
    with pytest.raises(kind, match=words): real(official, **change)


def saved(array, **options):
    def damage(path): Image.fromarray(array).save(path, format="png", **options)
    return damage


def cut(path): path.write_bytes(path.read_bytes()[:-200])
def head(path): path.write_bytes(path.read_bytes()[:20])
def empty(path): path.write_bytes(b"")
def other(path): path.write_text("<html>not found</html>")
def absent(path): path.unlink()


RGB, ISEG = f"recordings/{NAMES[1]}/rgb-w=1-f=2-l=1-c=unique-cam_2-mono-0.png", f"iseg/{NAMES[1]}/{MAP.format(2)}"
LIST = "splits/default/train.txt"


@pytest.mark.parametrize("name, damage, kind, words", [
    *((RGB, damage, CorruptFileError, "whole picture") for damage in (cut, head, empty, other)),
    *((ISEG, damage, CorruptFileError, "whole picture") for damage in (cut, head, empty, other)),
    (RGB, saved(np.zeros((128, 128, 3), np.uint8)), CorruptFileError, "expected 224x224 px, found 128x128"),
    (ISEG, saved(np.zeros((224, 223), np.uint8)), CorruptFileError, "expected 224x224 px, found 223x224"),
    (ISEG, saved(np.full((224, 224), 256, np.uint16)), CorruptFileError, "labels below 8.*found 8"),
    (ISEG, absent, LitvaeError, "is missing; get it again.*shapestacks-iseg"),
    (f"recordings/{NAMES[1]}", shutil.rmtree, LitvaeError, "is missing; it is in shapestacks-rgb"),
    (LIST, absent, LitvaeError, "is missing; it is in shapestacks-meta"),
    (LIST, lambda path: path.write_text("env_ccs\n"), CorruptFileError, "one scenario a line, .* found env_ccs"),
    (LIST, lambda path: path.write_bytes(b"\xff\xfe\x00"), CorruptFileError, "one scenario a line"),
    (LIST, empty, LitvaeError, "no items in the split train"),
])
def test_damage_is_named(official, name, damage, kind, words):
    damage(official / name)
    with pytest.raises(kind, match=words) as caught: real(official, size=8)
    assert damage is empty and name is LIST or str(official / name) in str(caught.value)
    assert not list(official.rglob("meta.json"))


def test_missing_blacklist(official):
    (official / "meta" / "blacklist_unstable.txt").unlink()
    assert len(real(official, size=8)) == 12
    with pytest.raises(LitvaeError, match="blacklist_unstable.txt is missing"): real(official, size=8, blacklist=True)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_maps_in_all_forms(tmp_path, mode):
    grey = Image.fromarray(labels(0, 1) * 32 + 31)  # any value of a label's 32 is that label
    grey.convert(mode).save(tmp_path / "a.map", format="png")
    assert np.array_equal(ss.read_labels(tmp_path / "a.map"), labels(0, 1))


def test_no_real_files(tmp_path):
    with pytest.raises(LitvaeError) as caught: real(tmp_path / "shapestacks")
    for part in ("recordings", "33 GB", "iseg", "352 MB", "splits", "shapestacks-rgb", "md5", "shapestacks_proc"):
        assert part in str(caught.value)


# ------------------------------------------------------------------------------------------------------ the stand-in
TOWERS = dict(name="shapestacks", source="standin", size=16)


def arrays_on_disk(root): return {path.name: path.read_bytes() for path in root.rglob("*.npy")}


def test_towers_do_not_depend_on_count_or_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD", 8)
    at_once = load(**TOWERS, n=24, root=tmp_path / "a")
    drawn = []
    def dying(key, shard, real=sources.shard_rng):
        if shard == 2: raise KeyboardInterrupt
        drawn.append(shard)
        return real(key, shard)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "shard_rng", dying)
        with pytest.raises(KeyboardInterrupt): load(**TOWERS, n=24, root=tmp_path / "b")
    assert drawn == [0, 1] and not list((tmp_path / "b").rglob("meta.json"))
    load(**TOWERS, n=24, root=tmp_path / "b")
    assert arrays_on_disk(tmp_path / "a") == arrays_on_disk(tmp_path / "b")
    shards = [ss.shapestacks_proc(sources.shard_rng(at_once_key(at_once), k), 8, size=16) for k in (2, 0, 1)]
    for key in at_once.arrays: assert np.array_equal(np.concatenate([shards[k][key] for k in (1, 2, 0)]), at_once[key])


def at_once_key(ds): return {k: ds.meta[k] for k in ("source", "version", "options", "split", "name", "seed")}


def test_splits_seeds_and_options_are_independent_draws(tmp_path):
    kinds = [{}, {"split": "validation"}, {"split": "test"}, {"seed": 1}, {"repeated_colours": True}]
    found = [load(**(TOWERS | {"size": 4}), n=8, root=tmp_path, **kind)["image"].tobytes() for kind in kinds]
    assert len(set(found)) == len(kinds)


def test_the_generator_is_the_one_of_its_version():
    scene = ss.draw_towers(np.random.default_rng(7), 64)
    drawn = np.concatenate([t.double().flatten().numpy() for t in (
        scene.positions, scene.sizes, scene.yaws, scene.colours, scene.target, scene.light, scene.kinds, scene.present,
        *scene.looks.values())])
    digest = hashlib.sha256(np.round(drawn, 4).astype("<f4").tobytes()).hexdigest()[:16]
    assert digest == "23691c808837d42b", "other towers: raise the version"


def test_masks_are_exact_and_count_from_the_bottom_up():
    scene = ss.draw_towers(np.random.default_rng(11), 40)
    mask = render(scene, 48, torch.zeros(40, 2, 1, 48, 48), samples=1)[1]
    alone = silhouettes(scene, 48)
    nearest, which = alone.min(1)
    assert torch.equal(mask.long(), torch.where(nearest < torch.inf, which + 1, 0))
    rows = torch.arange(48.0)[:, None]
    for k in range(40):
        heights = [rows.expand(48, 48)[mask[k] == i].mean() for i in mask[k].unique().tolist() if i]
        assert heights == sorted(heights, reverse=True) and len(heights) == scene.present[k].sum()
        assert mask[k].max() == scene.present[k].sum()


def test_masks_are_those_of_one_object_by_itself():
    "Each object rendered in an empty room, by the pixels in which the picture differs from that of the empty room."
    import dataclasses
    scene = ss.draw_towers(np.random.default_rng(12), 6)
    jitter = lamp_numbers(np.random.default_rng(0), 6, 32, samples=1)
    ids = render(scene, 32, jitter, samples=1)[1]
    for n in range(6):
        only = torch.zeros_like(scene.present)
        only[:, n] = scene.present[:, n]
        one = render(dataclasses.replace(scene, present=only), 32, jitter, samples=1)[1]
        assert set(one.unique().tolist()) <= {0, n + 1}
        assert not ((ids == n + 1) & (one == 0)).any()  # what is seen of it lies in its own silhouette
        free = (one > 0) & (ids == 0)
        assert not free.any()  # and nothing of it is taken for background


def test_towers_stand_in_the_room():
    scene = ss.draw_towers(np.random.default_rng(13), 500)
    low, high = (scene.positions[..., 2] + sign * scene.sizes[..., 2] for sign in (-1, 1))
    assert torch.allclose(low[:, 1:], high[:, :-1], atol=1e-5) and (low[:, 0].abs() < 1e-6).all()
    sphere = (scene.kinds == 0) & scene.present
    top = scene.present & ~torch.nn.functional.pad(scene.present[:, 1:], (0, 1))
    assert not (sphere & ~top).any() and 0.2 < sphere.any(1).float().mean() < 0.5
    distance = scene.camera[:, :2].norm(dim=1)
    assert distance.min() >= 6.2 and distance.max() <= 7.4
    assert (camera_rays(scene, 8)[:2].amin(0) < 0).all()  # each ray ends on the floor or on a wall: there is no sky
    round_ones = scene.kinds != 1
    assert torch.equal(scene.sizes[..., 0][round_ones], scene.sizes[..., 1][round_ones])


@pytest.mark.parametrize("repeated", [False, True])
def test_colours(repeated):
    scene = ss.draw_towers(np.random.default_rng(14), 300, repeated)
    number = (scene.colours > 0.5).long() @ torch.tensor([4, 2, 1])
    distinct = torch.tensor([len(set(row.tolist())) for row in number])
    assert len(number.unique()) == 6 and (distinct == 6).all() == (not repeated)
    assert scene.colours.min() >= 0 and scene.colours.max() <= 1
    if repeated: assert abs(distinct.double().mean() - 6 * (1 - (5 / 6)**6)) < 0.15


def test_pictures_show_what_the_masks_say():
    "In the mean, an object's pixels have its colour's hue: the strong channels are brighter than the weak ones."
    towers = ss.shapestacks_proc(np.random.default_rng(15), 60, size=32)
    scene = ss.draw_towers(np.random.default_rng(15), 60)
    good = []
    for image, mask, colours in zip(towers["image"], towers["mask"], scene.colours.numpy()):
        for k in np.unique(mask[mask > 0]):
            mean, strong = image[mask == k].mean(0), colours[k - 1] > 0.5
            good.append(mean[strong].min() > mean[~strong].max())
    assert np.mean(good) > 0.97
    assert towers["kind"].dtype == np.uint8 and ((towers["kind"] == 255) == ~scene.present.numpy()).all()


def test_wrong_options_of_the_stand_in(tmp_path):
    for wanted, options in {"size is 0": {"size": 0}, "it has size, repeated_colours": {"subset": "default"}}.items():
        with pytest.raises(LitvaeError, match=wanted): load(**(TOWERS | options), n=1, root=tmp_path)
