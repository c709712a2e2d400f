"""The data chapter: stand-ins that do not depend on how they are asked for, real files in their official formats, and
what happens when the files, the disk or the process fail. The notebooks show the same rooms from the reader's side."""
import errno, gzip, hashlib, itertools, json, multiprocessing, os, shutil, struct, time

import numpy as np
import pytest
import torch

from litvae.core.files import CorruptFileError, LitvaeError
from litvae.data import load, multi_dsprites as md, resolve, sources, tfrecord as tf

SCENES = dict(name="multi_dsprites", source="standin", size=16)
spawned = multiprocessing.get_context("forkserver")
spawned.set_forkserver_preload(["litvae.data"])


def files(folder): return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arrays_on_disk(root):
    return {path.name: path.read_bytes() for path in root.rglob("*.npy") if path.parent.name != "parts"}


def only(root, name):
    path, = root.rglob(name)
    return path


def flip(path, byte, bit=1):
    data = bytearray(path.read_bytes())
    data[byte] ^= bit
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------- stand-ins
def test_items_do_not_depend_on_count_or_order(tmp_path):
    at_once = load(**SCENES, n=700, root=tmp_path / "a")
    load(**SCENES, n=10, root=tmp_path / "b")
    grown = load(**SCENES, n=700, root=tmp_path / "b")
    assert len(at_once) == 700 and at_once.meta["count"] == 768
    assert arrays_on_disk(tmp_path / "a") == arrays_on_disk(tmp_path / "b")
    few = load(**SCENES, n=300, root=tmp_path / "a")
    for key in at_once.arrays: assert np.array_equal(few[key], grown[key][:300])


def test_splits_seeds_and_options_are_independent_draws(tmp_path):
    kinds = [{}, {"split": "validation"}, {"split": "test"}, {"seed": 1}, {"unique_colours": True}, {"max_sprites": 3}]
    found = [load(**SCENES, n=64, root=tmp_path, **kind)["image"].tobytes() for kind in kinds]
    assert len(set(found)) == len(kinds)


def test_the_generator_is_the_one_of_its_version(tmp_path):
    ds = load(**SCENES, n=256, root=tmp_path)
    drawn = hashlib.sha256(b"".join(ds[key].tobytes() for key in ("sprites", "latents", "colours"))).hexdigest()
    assert (ds.meta["version"], drawn[:16]) == (1, "9b31c12e81e71ae1"), "other scenes: raise the version"
    assert abs(int((ds["mask"] > 0).sum()) - 6322) <= 10  # pixels may differ at an edge


def test_meta_tells_everything(tmp_path):
    ds = load(**SCENES, n=5, split="test", seed=3, root=tmp_path, max_sprites=2)
    assert ds.meta["name"] == "multi_dsprites_proc" and ds.meta["source"] == "standin" and ds.meta["seed"] == 3
    assert ds.meta["options"] == {"size": 16, "unique_colours": False, "max_sprites": 2} and ds.meta["split"] == "test"
    assert ds.meta["versions"]["numpy"] == np.__version__ and ds.meta["versions"]["torch"] == torch.__version__
    assert json.loads(only(tmp_path, "meta.json").read_text()) == ds.meta
    for key, spec in ds.meta["arrays"].items():
        path = only(tmp_path, {"image": "images.npy", "mask": "masks.npy"}.get(key, f"{key}.npy"))
        assert hashlib.sha256(path.read_bytes()).hexdigest() == spec["sha256"]
        assert list(np.load(path, mmap_mode="r").shape) == spec["shape"]


def test_batches(tmp_path):
    ds = load(**SCENES, n=50, root=tmp_path)
    rows = torch.tensor([7, 3, 3])
    expected = torch.from_numpy(ds["image"][[7, 3, 3]].transpose(0, 3, 1, 2) / np.float32(255))
    assert torch.equal(ds.images(rows), expected) and ds.images().shape == (50, 3, 16, 16)
    assert ds.tensor("mask", rows).dtype == torch.uint8 and ds.images(rows).is_contiguous()
    with pytest.raises(LitvaeError, match="no array 'depth'"): ds["depth"]


@pytest.mark.parametrize("unique", [False, True])
def test_each_scene_is_painted_in_order(unique):
    "The painter against a loop over sprites and pixels."
    scenes = md.multi_dsprites_proc(np.random.default_rng(5), 40, size=32, unique_colours=unique)
    y, x = (np.mgrid[:32, :32] + 0.5) * 2
    names = ("image", "mask", "sprites", "latents", "colours")
    for image, mask, number, latents, colours in zip(*(scenes[name] for name in names)):
        canvas, ids = np.broadcast_to(colours[0], (32, 32, 3)).copy(), np.zeros((32, 32), np.uint8)
        for k, (shape, scale, turn, column, row) in enumerate(latents[:number].tolist()):
            a, s = 2 * np.pi * turn / 39, 0.5 + 0.1 * scale
            dx, dy = x - (16 + 32 * column / 31), y - (16 + 32 * row / 31)
            u, v = (dx * np.cos(a) + dy * np.sin(a)) / s, (dy * np.cos(a) - dx * np.sin(a)) / s
            inside = [(abs(u) <= 10) & (abs(v) <= 10), (u / 13) ** 2 + (v / 7) ** 2 <= 1, heart(u, v)][shape]
            canvas[inside], ids[inside] = colours[k + 1], k + 1
        assert (ids != mask).sum() <= 2  # double precision may decide otherwise on an outline
        assert (canvas != image).any(-1).sum() <= 2


def heart(u, v):
    "A square on its tip and two half discs, as a union of sets."
    w = np.sqrt(225 / (0.5 + np.pi / 8))
    u, v = abs(u) / w, (0.75 + np.sqrt(1 / 8)) / 2 - v / w
    return ((u <= v) & (u + v <= 1)) | ((u - 0.25) ** 2 + (v - 0.75) ** 2 <= 1 / 8) & (u + v >= 1)


def test_bad_arguments(tmp_path):
    for wanted, arguments in {
        "unknown data set 'dsprites'; known are .*multi_dsprites": dict(name="dsprites"),
        "unknown split 'val'": dict(split="val"),
        "unknown source 'fake'": dict(source="fake"),
        "no option 'colour'; it has size, unique_colours, max_sprites": dict(colour=1),
        "size is 0": dict(size=0), "size is '16'": dict(size="16"),
        "max_sprites is 0": dict(max_sprites=0),
        "n is 0": dict(n=0), "n is 2.5": dict(n=2.5),
    }.items():
        with pytest.raises(LitvaeError, match=wanted): load(**(SCENES | {"n": 1, "root": tmp_path} | arguments))
    assert not arrays_on_disk(tmp_path)


def test_auto_says_once_what_it_took(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "_ANNOUNCED", set())
    for _ in range(2): assert resolve("multi_dsprites", root=tmp_path) == "standin"
    assert capsys.readouterr().out.count("multi_dsprites_proc") == 1
    (tmp_path / "multi_dsprites").mkdir()
    (tmp_path / "multi_dsprites" / md.DSPRITES).write_bytes(b"")
    for _ in range(2): assert resolve("multi_dsprites", root=tmp_path) == "real"
    assert capsys.readouterr().out.count("real files") == 1
    with pytest.raises(CorruptFileError): load("multi_dsprites", n=1, root=tmp_path)  # damaged: no falling back


def test_the_data_root(tmp_path, monkeypatch):
    for name in ("LITVAE_DATA", "XDG_CACHE_HOME"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.data_root() == tmp_path / ".cache" / "litvae"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert sources.data_root() == tmp_path / "x" / "litvae"
    monkeypatch.setenv("LITVAE_DATA", str(tmp_path / "d"))
    assert sources.data_root() == tmp_path / "d" and sources.data_root("e").name == "e"


# ----------------------------------------------------------------------------------------- interruptions and faults
def progress(root):
    return max((json.loads(path.read_text())["count"] for path in root.rglob("progress.json")), default=0)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def test_killed_and_resumed_is_bit_identical(tmp_path):
    wanted = SCENES | {"size": 32}
    for least in (256, 1024):
        process = spawned.Process(target=load, kwargs=wanted | {"n": 50_000, "root": tmp_path / "killed"})
        process.start()
        wait_for(lambda: progress(tmp_path / "killed") >= least or not process.is_alive())
        process.kill()
        process.join()
        assert process.exitcode == -9 and not arrays_on_disk(tmp_path / "killed")  # it never looks finished
        assert not list((tmp_path / "killed").rglob("meta.json"))
    done, made = progress(tmp_path / "killed"), []
    original = sources.shard_rng
    sources.shard_rng = lambda key, shard: made.append(shard) or original(key, shard)
    try: resumed = load(**wanted, n=done + 1000, root=tmp_path / "killed")
    finally: sources.shard_rng = original
    assert done >= 1024 and made == list(range(done // 256, done // 256 + 4))  # finished shards are not made again
    load(**wanted, n=len(resumed), root=tmp_path / "whole")
    assert arrays_on_disk(tmp_path / "killed") == arrays_on_disk(tmp_path / "whole")


def test_two_processes_at_once(tmp_path):
    wanted = SCENES | {"n": 4000, "root": tmp_path}
    both = [spawned.Process(target=load, kwargs=wanted) for _ in range(2)]
    for process in both: process.start()
    for process in both: process.join()
    assert [process.exitcode for process in both] == [0, 0]
    load(**wanted)
    assert not list(tmp_path.rglob("parts"))


def test_a_kill_while_growing_keeps_the_smaller_set_or_makes_it_again(tmp_path, monkeypatch):
    small = load(**SCENES, n=256, root=tmp_path)
    before = small["image"].tobytes()
    for k in range(8):  # the process dies at the k-th rename
        calls = []
        def dying(*arguments, real=os.replace):
            calls.append(arguments)
            if len(calls) > k: raise KeyboardInterrupt
            real(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with pytest.raises(KeyboardInterrupt): load(**SCENES, n=700, root=tmp_path)
        assert load(**SCENES, n=256, root=tmp_path)["image"].tobytes() == before
    assert load(**SCENES, n=700, root=tmp_path)["image"][:256].tobytes() == before


def cut(path): path.write_bytes(path.read_bytes()[:-100])
def empty(path): path.write_bytes(b"")
def one_bit(path): flip(path, path.stat().st_size - 50)
def header_bit(path): flip(path, 20)
def other_shape(path): np.save(path, np.zeros((256, 8, 8), np.uint8))
def other_type(path): np.save(path, np.load(path).astype(np.int16))
def objects(path): np.save(path, np.array([print] * 256, object), allow_pickle=True)
def absent(path): path.unlink()
def longer(path): path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize("damage", [cut, empty, one_bit, header_bit, other_shape, other_type, objects, absent, longer])
@pytest.mark.parametrize("name", ["images.npy", "latents.npy"])
def test_a_damaged_store_is_refused_and_left_alone(tmp_path, name, damage):
    load(**SCENES, n=10, root=tmp_path)
    damage(path := only(tmp_path, "meta.json").with_name(name))
    before = files(tmp_path)
    for n in (10, 600):
        with pytest.raises(CorruptFileError) as caught: load(**SCENES, n=n, root=tmp_path)
        assert str(path) in str(caught.value) and "expected" in str(caught.value) and "found" in str(caught.value)
        assert "move the folder" in str(caught.value)
    assert files(tmp_path) == before
    shutil.move(path.parent, tmp_path / "elsewhere")  # the advice works
    assert len(load(**SCENES, n=10, root=tmp_path)) == 10


@pytest.mark.parametrize("old, new", [
    ("}", ""), ("{", "[]"), ('"count"', '"cuont"'), ('"exhausted"', '"e"'), ('"arrays": {', '"arrays": 3, "a": {'),
    ('"seed": 0', '"seed": 1'), ("sha256", "sha265"), ('"|u1"', '"|x9"'), ('"count": 256', '"count": 255'),
    ('"size": 16', '"size": 32')])
def test_a_damaged_meta_is_refused(tmp_path, old, new):
    load(**SCENES, n=10, root=tmp_path)
    path = only(tmp_path, "meta.json")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    only(tmp_path, ".verified.json").unlink()
    before = files(tmp_path)
    with pytest.raises(CorruptFileError, match="meta.json"): load(**SCENES, n=10, root=tmp_path)
    assert files(tmp_path) == before


def test_without_meta_it_is_made_again(tmp_path):
    load(**SCENES, n=10, root=tmp_path)
    before = arrays_on_disk(tmp_path)
    only(tmp_path, "meta.json").unlink()
    cut(only(tmp_path, "images.npy"))
    load(**SCENES, n=10, root=tmp_path)
    assert arrays_on_disk(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"count": 512, "arrays": {}}', '{"count": "x", "arrays": {"a": 1}}'])
def test_damaged_progress_starts_afresh(tmp_path, text):
    load(**SCENES, n=10, root=tmp_path)
    before, folder = arrays_on_disk(tmp_path), only(tmp_path, "meta.json").parent
    (folder / "meta.json").unlink()
    (folder / "parts").mkdir()
    (folder / "parts" / "progress.json").write_text(text)
    load(**SCENES, n=10, root=tmp_path)
    assert arrays_on_disk(tmp_path) == before


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "is full"), (errno.EROFS, "read-only"), (errno.EIO, "error")])
def test_a_disk_that_refuses(tmp_path, monkeypatch, code, words):
    calls = []
    def refusing(*arguments, real=os.replace):
        calls.append(arguments)
        if len(calls) > 2: raise OSError(code, os.strerror(code))
        real(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refusing)
        with pytest.raises(LitvaeError, match=words): load(**SCENES, n=1000, root=tmp_path)
    assert progress(tmp_path) == 512  # kept
    assert len(load(**SCENES, n=1000, root=tmp_path)) == 1000


def test_a_root_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LitvaeError, match="cannot write"): load(**SCENES, n=10, root=tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


def test_a_finished_set_can_be_read_from_a_read_only_disk(tmp_path, monkeypatch):
    load(**SCENES, n=10, root=tmp_path)
    only(tmp_path, ".verified.json").unlink()
    def refuse(*arguments, **keywords): raise OSError(errno.EROFS, "read-only")
    for name in ("replace", "mkdir", "open"): monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(sources.FileLock, "acquire", refuse)
    assert len(load(**SCENES, n=10, root=tmp_path)) == 10
    with pytest.raises(LitvaeError, match="cannot write"): load(**SCENES, n=300, root=tmp_path)


# -------------------------------------------------------------------------------------------- dSprites, the archive
SIZES = (3, 2, 4, 4, 4)  # 384 sprites instead of 737,280


def small_dsprites():
    "Pictures and latents like dSprites', made without the painter: each picture is different and not empty."
    latents = np.array(list(itertools.product(*map(range, SIZES))))
    imgs = (np.random.default_rng(0).random((384, 64, 64)) < 0.1).astype(np.uint8)
    classes = np.concatenate([np.zeros((384, 1), np.int64), latents], 1)
    trap = np.array(Trap(), object)
    return {"imgs": imgs, "latents_classes": classes, "latents_values": classes / 40, "metadata": trap}


class Trap:
    def __reduce__(self): return os.putenv, ("LITVAE_TRAP", "sprung")


@pytest.fixture
def archive(tmp_path, monkeypatch):
    monkeypatch.setattr(md, "LATENT_SIZES", SIZES)
    monkeypatch.setattr(md, "SCENES", {"train": (0, 600), "validation": (600, 700), "test": (700, 800)})
    path = tmp_path / "multi_dsprites" / md.DSPRITES
    path.parent.mkdir()
    np.savez_compressed(path, **small_dsprites())
    return path


def real(root, split="train", **options): return load("multi_dsprites", split, source="real", root=root, **options)


def test_the_papers_scenes_from_dsprites(archive, tmp_path):
    "Three splits, cut from one stream, against a loop that pastes pictures."
    pictures, drawn = small_dsprites()["imgs"], []
    for split, count in (("train", 600), ("validation", 100), ("test", 100)):
        ds = real(tmp_path, split)
        assert ds.describe() == f"multi_dsprites (real), {split}, {count} scenes of 64x64"
        assert ds.meta["files"] == {md.DSPRITES: archive.stat().st_size} and "seed" not in ds.meta
        for i in range(0, count, 7):
            image, mask = np.tile(ds["colours"][i, 0], (64, 64, 1)), np.zeros((64, 64), int)
            for k in range(ds["sprites"][i]):
                shape, scale, turn, x, y = map(int, ds["latents"][i, k])
                picture = pictures[y + 4 * (x + 4 * (turn + 4 * (scale + 2 * shape)))] > 0
                image[picture], mask[picture] = ds["colours"][i, k + 1], k + 1
            assert np.array_equal(ds["image"][i], image) and np.array_equal(ds["mask"][i], mask)
        drawn.append(ds["latents"])
    one_stream = md.draw_scenes(sources.shard_rng({"name": "multi_dsprites"}, 0), 800)["latents"]
    assert np.array_equal(np.concatenate(drawn), one_stream)
    assert "LITVAE_TRAP" not in os.environ
    assert np.array_equal(real(tmp_path, size=16)["mask"], real(tmp_path)["mask"][:, 2::4, 2::4])
    unique = real(tmp_path, "test", unique_colours=True)["colours"]
    assert all(len(np.unique(scene, axis=0)) == 5 for scene in unique)
    with pytest.raises(LitvaeError, match="divisors of 64"): real(tmp_path, size=48)
    with pytest.raises(LitvaeError, match="has 100 items"): real(tmp_path, "test", n=101)


def test_real_scenes_grow_like_generated_ones(archive, tmp_path):
    real(tmp_path, n=300)
    grown = real(tmp_path)
    shutil.rmtree(only(tmp_path, "meta.json").parent.parent)
    whole = real(tmp_path)
    assert len(whole) == 600
    for key in whole.arrays: assert np.array_equal(grown[key], whole[key])


def with_arrays(**changes): return lambda path: np.savez(path, **small_dsprites() | changes)


@pytest.mark.parametrize("damage, words", [
    (cut, "zip"), (empty, "zip"), (lambda path: flip(path, path.stat().st_size // 3), "found"),
    (with_arrays(imgs=np.zeros((384, 32, 32), np.uint8)), r"imgs of \(384, 32, 32\)"),
    (with_arrays(imgs=np.zeros((384, 64, 64))), "float64"),
    (with_arrays(imgs=np.full((384, 64, 64), 255, np.uint8)), "value 255"),
    (with_arrays(imgs=np.array([Trap()] * 384, object)), "imgs of"),
    (with_arrays(latents_classes=np.array(Trap(), object)), "latents_classes of"),
    (with_arrays(latents_classes=np.zeros((5, 6))), r"shape \(5, 6\)"),
    (with_arrays(latents_classes=np.zeros((384, 6), np.int64)), "order"),
    (lambda path: np.savez(path, imgs=small_dsprites()["imgs"]), "latents_classes"),
])
def test_a_damaged_archive(archive, tmp_path, damage, words):
    damage(archive)
    before = archive.read_bytes()
    with pytest.raises(CorruptFileError, match=words) as caught: real(tmp_path)
    assert str(archive) in str(caught.value) and "expected" in str(caught.value)
    assert archive.read_bytes() == before and "LITVAE_TRAP" not in os.environ


def test_missing_real_files(tmp_path):
    with pytest.raises(LitvaeError) as caught: real(tmp_path)
    for part in (str(tmp_path / "multi_dsprites"), md.DSPRITES, "26 MB", "_images_rand", "dsprites-dataset", "standin"):
        assert part in str(caught.value)
    (tmp_path / "multi_dsprites").mkdir()
    write_rand4(tmp_path, "test", "rand4")
    with pytest.raises(LitvaeError, match="training_images_rand4.npy"): real(tmp_path)
    with pytest.raises(LitvaeError, match="training_images_rand4.npy"): load("multi_dsprites", root=tmp_path)


# ---------------------------------------------------------------------------------------- Multi-dSprites, ready made
def write_rand4(root, split, variant, count=300):
    "Scenes in the files of the script that the papers used: float32 images in [0, 1], float64 masks."
    scenes = md.multi_dsprites_proc(np.random.default_rng(1), count, unique_colours="unique" in variant)
    folder = root / "multi_dsprites"
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{split}_images_{variant}.npy", scenes["image"].astype(np.float32) / 255)
    np.save(folder / f"{split}_masks_{variant}.npy", scenes["mask"][..., None].astype(np.float64))
    return scenes


@pytest.mark.parametrize("unique, most, variant", [(False, 4, "rand4"), (True, 4, "rand4_unique"), (False, 6, "rand6")])
def test_ready_made_scenes(tmp_path, unique, most, variant):
    scenes = write_rand4(tmp_path, "training", variant)
    ds = real(tmp_path, unique_colours=unique, max_sprites=most)
    assert np.array_equal(ds["image"], scenes["image"]) and np.array_equal(ds["mask"], scenes["mask"])
    assert ds["image"].dtype == ds["mask"].dtype == np.uint8
    small = real(tmp_path, unique_colours=unique, max_sprites=most, size=32, n=20)
    assert len(small) == 20 and np.array_equal(small["image"], scenes["image"][:20, 1::2, 1::2])


def rewrite(change): return lambda path: np.save(path, change(np.load(path)))


def nan_pixel(array): array.reshape(-1)[-1] = np.nan; return array


def swapped(array):  # legal values in the wrong place
    y, x = np.argwhere(array[280, ..., 0])[0]
    array[280, y, x] = 0
    return array


@pytest.mark.parametrize("kind, damage, words", [
    ("images", cut, "bytes"), ("masks", cut, "bytes"), ("masks", empty, "0 bytes"), ("images", objects, "bytes"),
    ("images", rewrite(lambda a: a[..., :2]), r"\(300, 64, 64, 2\)"),
    ("masks", rewrite(lambda a: a[..., 0]), r"\(300, 64, 64\)"),
    ("images", rewrite(lambda a: (a * 255).astype(np.uint8)), "uint8"),
    ("images", rewrite(lambda a: a[:-1]), "299 items"),
    ("images", rewrite(nan_pixel), "item 299 holds nan"), ("masks", rewrite(lambda a: a + 4), "item 0 holds"),
    ("masks", rewrite(swapped), "item 280 has several colours"), ("images", rewrite(lambda a: a * 255), "item 0 holds"),
    ("images", lambda path: flip(path, path.stat().st_size - 1, 64), "item 299"), ("masks", absent, "is missing"),
])
def test_damaged_scenes(tmp_path, kind, damage, words):
    write_rand4(tmp_path, "training", "rand4")
    damage(path := tmp_path / "multi_dsprites" / f"training_{kind}_rand4.npy")
    before = files(path.parent)
    with pytest.raises(LitvaeError, match=words) as caught: real(tmp_path)
    assert str(path) in str(caught.value)
    assert {name: data for name, data in files(path.parent).items() if len(name.parts) == 1} == before


# ------------------------------------------------------------------------------------------------------- TFRecord
def reference_crc(data):
    "CRC-32C as polynomial division, from the definition."
    value = int.from_bytes(bytes(int(f"{b:08b}"[::-1], 2) for b in data), "big")
    value = (value << 32) ^ (0xFFFFFFFF << 8 * len(data))
    for bit in range(8 * len(data) - 1, -1, -1):
        if value >> (bit + 32) & 1: value ^= 0x11EDC6F41 << bit
    return int(f"{value:032b}"[::-1], 2) ^ 0xFFFFFFFF


def test_crc32c():
    assert tf.crc32c(b"123456789") == 0xE3069283
    data = np.random.default_rng(0).bytes(4100)
    for size in (1, 2, 3, 4, 5, 100, 4096, 4097, 4099): assert tf.crc32c(data[:size]) == reference_crc(data[:size])


def entity_records(count=30):
    scenes = md.multi_dsprites_proc(np.random.default_rng(2), count)
    masks = 255 * (scenes["mask"][..., None] == np.arange(5)).astype(np.uint8)[..., None]  # (N, 64, 64, 5, 1)
    rng = np.random.default_rng(3)
    def floats(): return {k: rng.random(s, np.float32) for k, (t, s) in tf.MULTI_DSPRITES.items() if t == "float32"}
    return scenes, [{"image": image, "mask": mask, **floats()} for image, mask in zip(scenes["image"], masks)]


def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def message(*fields): return b"".join(varint(number << 3 | 2) + varint(len(data)) + data for number, data in fields)


def official_file(path, records, packed=True):
    "A writer of its own, string by string and float by float, after the definitions of TFRecord and tf.train.Example."
    def feature(array):
        if array.dtype == np.uint8: return message((1, message(*((1, bytes([b])) for b in array.ravel().tolist()))))
        if packed: return message((2, message((1, array.tobytes()))))
        return message((2, b"".join(b"\x0d" + struct.pack("<f", value) for value in array.ravel())))
    def masked(data):
        crc = tf.crc32c(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", 1) as f:
        for record in records:
            entries = ((1, message((1, name.encode()), (2, feature(array)))) for name, array in record.items())
            payload = message((1, message(*entries)))
            length = struct.pack("<Q", len(payload))
            f.write(length + masked(length) + payload + masked(payload))


@pytest.mark.parametrize("packed", [True, False])
def test_official_records(tmp_path, packed):
    _, records = entity_records(3)
    official_file(path := tmp_path / "a.tfrecords", records, packed)
    found = list(tf.read_records(path, tf.MULTI_DSPRITES))
    assert len(found) == 3
    for a, b in zip(records, found):
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    if packed:
        tf.write_records(tmp_path / "b.tfrecords", records)
        with gzip.open(path) as a, gzip.open(tmp_path / "b.tfrecords") as b: assert a.read() == b.read()


def test_whole_buffers_and_other_shapes(tmp_path):
    masks = np.tile(255 * np.eye(7, dtype=np.uint8)[:, None, :, None], (1, 7, 1, 1))  # as in Objects Room: (E, H, W, 1)
    records = [{"image": np.full((7, 7, 3), i, np.uint8), "mask": masks} for i in range(5)]
    tf.write_records(tmp_path / "room.tfrecords", records, layout="buffer")
    schema = {"image": ("uint8", (7, 7, 3)), "mask": ("uint8", (7, 7, 7, 1))}
    shard, = tf.convert(tmp_path / "room.tfrecords", schema, entity_axis=0, backgrounds=4, size=7).shards(0)
    assert shard["mask"].shape == (5, 7, 7) and shard["mask"][2, 3].tolist() == [0, 0, 0, 0, 5, 6, 7]
    assert shard["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.fixture
def deepmind(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD", 8)
    monkeypatch.setattr(tf, "SHARD", 8)
    monkeypatch.setattr(tf, "RECORDS", {"test": (0, 5), "validation": (5, 9), "train": (9, None)})
    scenes, records = entity_records()
    path = tmp_path / "multi_dsprites_deepmind" / "multi_dsprites_colored_on_colored.tfrecords"
    tf.write_records(path, records)
    return path, scenes, records


def deep(root, split="train", **options): return load("multi_dsprites_deepmind", split, root=root, **options)


def test_splits_of_the_records(deepmind, tmp_path):
    path, scenes, records = deepmind
    for split, (first, last) in {"test": (0, 5), "validation": (5, 9), "train": (9, 30)}.items():
        ds = deep(tmp_path, split)
        assert ds.source == "real" and np.array_equal(ds["image"], scenes["image"][first:last])
        assert np.array_equal(ds["mask"], np.where(scenes["mask"] > 0, scenes["mask"] + 1, 0)[first:last])
        assert np.array_equal(ds["color"], np.stack([r["color"] for r in records[first:last]]))
    assert np.array_equal(deep(tmp_path, size=32)["image"], scenes["image"][9:, 1::2, 1::2])


def test_conversion_reads_no_more_than_asked_and_goes_on(deepmind, tmp_path, monkeypatch):
    path, scenes, _ = deepmind
    seen, most, parse = [], 100, tf.parse_example
    def counting(payload):
        if len(seen) == most: raise KeyboardInterrupt
        seen.append(payload)
        return parse(payload)
    monkeypatch.setattr(tf, "parse_example", counting)
    deep(tmp_path, n=3)
    assert len(seen) == 8  # one shard of the 21 records
    most = 8 + 11
    with pytest.raises(KeyboardInterrupt): deep(tmp_path)  # in the middle of the third shard
    seen.clear()
    assert np.array_equal(deep(tmp_path)["image"], scenes["image"][9:]) and len(seen) == 5


def rezipped(change):
    def damage(path):
        with gzip.open(path) as f: data = bytearray(f.read())
        data = change(data) or data
        with gzip.open(path, "wb", 1) as f: f.write(data)
    return damage


def in_record(number, byte, bit=1):
    def change(data):
        at = 0
        for _ in range(number): at += 16 + struct.unpack_from("<Q", data, at)[0]
        data[at + byte] ^= bit
    return rezipped(change)


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.write_bytes(path.read_bytes()[:-50]), "record 29 .*end-of-stream"),
    (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), r"record \d+ "),
    (rezipped(lambda data: data[:-1000]), "record 29 .*ends after"), (rezipped(lambda data: data[:-2]), "record 29 "),
    (in_record(17, 500), "record 17 .*sum of its content"), (in_record(17, 3), "record 17 .*sum of its length"),
    (in_record(17, 9), "record 17 .*sum of its length"),
    (lambda path: flip(path, path.stat().st_size // 2), r"record \d+ "),
    (lambda path: path.write_bytes(gzip.decompress(path.read_bytes())), "record 0 .*gzip"),
    (empty, "no items"),
])
def test_damaged_records(deepmind, tmp_path, damage, words):
    path, *_ = deepmind
    damage(path)
    before = path.read_bytes()
    with pytest.raises(LitvaeError, match=words) as caught: deep(tmp_path)
    assert str(path) in str(caught.value) or damage is empty
    assert path.read_bytes() == before and not list(tmp_path.rglob("meta.json"))


@pytest.mark.parametrize("name, array, words", [
    ("mask", np.zeros((7, 64, 64, 1), np.uint8), "mask: expected uint8"), ("image", None, "no feature 'image'"),
    ("x", np.zeros(5, np.uint8), "x: expected float32"), ("color", np.zeros((5, 4), np.float32), "color: expected"),
])
def test_records_of_another_shape(deepmind, tmp_path, name, array, words):
    path, _, records = deepmind
    records[20] = {k: v for k, v in (records[20] | {name: array}).items() if v is not None}
    tf.write_records(path, records)
    with pytest.raises(CorruptFileError, match=f"record 20 .*{words}"): deep(tmp_path)


def test_messages_that_are_not_examples():
    rng = np.random.default_rng(0)
    feature = message((2, message((1, bytes(8)))))
    payload = message((1, message((1, message((1, b"x"), (2, feature))))))
    assert tf.parse_example(payload)["x"].tolist() == [0, 0]
    for _ in range(2000):  # whatever the bytes, it is a ValueError or a dictionary
        broken = bytearray(payload[: rng.integers(1, len(payload) + 1)])
        for _ in range(rng.integers(1, 4)): broken[rng.integers(len(broken))] = rng.integers(256)
        try: assert isinstance(tf.parse_example(bytes(broken)), dict)
        except ValueError: pass
