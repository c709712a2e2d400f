"Figures and tables: the same input gives the same bytes, nothing private leaks out, bad input is refused in words."
import errno, inspect, json, os, socket, subprocess, sys, xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from conftest import copy_repository
from litvae.core import figures
from litvae.core.files import LitvaeError, read_json

ORIGIN = {"preset": "small", "data": [{"name": "toys_proc", "source": "standin"}], "seeds": [0, 1], "runs": ["a"],
          "training": {"seconds": 5400.0, "hardware": ["one core"]},
          "environment": {"litvae": "0.1.0", "torch": "2.15.0", "git_commit": "0123456789+"}}


@pytest.fixture(autouse=True)
def style():
    figures.use_style()
    yield
    plt.close("all")


def drawn():
    fig, axes = plt.subplots(1, 2)
    figures.dots_with_interval(axes[0], [1, 2, 4], [[1, 2, 3], [2, 2.5, 4], [3, None, 5]], label="$x^2$ (µ, ↓)")
    axes[0].set(xscale="log", ylabel="long\nlabels\nmove\na layout"), axes[0].legend()
    fig.colorbar(axes[1].imshow(np.arange(12).reshape(3, 4)), ax=axes)  # a colour bar makes the layout depend on itself
    return fig


# --- statistics ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_interval_is_students(n, level):
    values = np.random.default_rng(n).normal(3, 2, n)
    low, high = stats.t.interval(level, n - 1, np.mean(values), stats.sem(values))
    mean, half = figures.mean_interval(values, level)
    assert np.allclose([mean - half, mean + half], [low, high])


def test_interval_of_three_seeds_covers_the_truth_in_19_of_20_cases():
    samples = np.random.default_rng(0).normal(0.5, 0.1, (4000, 3))
    hits = np.mean([abs(i.mean - 0.5) < i.half for i in map(figures.mean_interval, samples)])
    assert abs(hits - 0.95) < 0.012


@pytest.mark.parametrize("values", [[], [None], [1.0, None], [1.0, float("nan")], [1.0, float("inf")]])
def test_a_missing_seed_leaves_no_mean(values):
    mean, half = figures.mean_interval(values)
    assert np.isnan(mean) and np.isnan(half)


def test_each_seed_is_a_dot_and_gaps_interrupt_the_line():
    fig, ax = plt.subplots()
    values = [[3.0], [1.0, 2.0, None], [5.0, 7.0, 6.0], []]
    bars = figures.dots_with_interval(ax, [1, 2, 4, 8], values, color="#123456", label="seeds")
    np.testing.assert_array_equal(np.asarray(bars.lines[0].get_ydata(), float), [3, np.nan, 6, np.nan])
    dots, = [line for line in ax.lines if line.get_marker() == "o"]
    assert list(zip(dots.get_xdata(), dots.get_ydata())) == [(1, 3), (2, 1), (2, 2), (4, 5), (4, 7), (4, 6)]
    assert dots.get_color() == "#123456" and [t.get_text() for t in ax.legend().get_texts()] == ["seeds"]
    heights = [segment[1, 1] - segment[0, 1] for segment in bars.lines[2][0].get_segments() if len(segment)]
    assert np.allclose(heights, [0, 2 * stats.t.ppf(0.975, 2) / np.sqrt(3)])


def test_every_concept_has_its_own_colour():
    assert len(set(figures.PALETTE.values())) == len(figures.PALETTE)
    with pytest.raises(LitvaeError, match="'elephant'.*sbd, dc"): figures.colour("elephant")


# --- pictures --------------------------------------------------------------------------------------------------------

def pixels(fig): return np.asarray(fig.axes[0].images[0].get_array())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tiles_stand_in_reading_order(dtype):
    images = torch.arange(7, dtype=dtype)[:, None, None, None].expand(7, 3, 4, 6) / 8
    sheet = pixels(figures.image_grid(images.requires_grad_(), columns=3, gap=2))
    assert sheet.shape == (3 * 6 - 2, 3 * 8 - 2, 3)
    for i in range(7):
        row, column = divmod(i, 3)
        assert (sheet[row * 6:row * 6 + 4, column * 8:column * 8 + 6] == round(i / 8 * 255)).all()
    assert (sheet[12:, 8:] == 255).all() and (sheet[4:6] == 255).all()


def test_both_layouts_give_the_same_sheet():
    stored = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 3), dtype=np.uint8)  # every axis could be the channels
    as_float = torch.from_numpy(stored).permute(0, 3, 1, 2).float() / 255
    assert np.array_equal(pixels(figures.image_grid(stored)), pixels(figures.image_grid(as_float)))
    assert np.array_equal(pixels(figures.image_grid(stored)), pixels(figures.image_grid(torch.from_numpy(stored))))


@pytest.mark.parametrize("images, message", [
    (np.zeros((0, 3, 4, 4)), "at least one"), (np.zeros((2, 4, 4, 3)), "expected .N, 3, H, W. float"),
    (np.zeros((2, 3, 4, 4), np.int64), "expected .N, 3, H, W. float"),
    (np.zeros((2, 4, 4), np.uint8), "shape .2, 4, 4."),
    (np.full((1, 3, 4, 4), -0.1), "clip them first"), (np.full((1, 3, 4, 4), np.nan), "clip them first")])
def test_other_images_are_refused(images, message):
    with pytest.raises(LitvaeError, match=message): figures.image_grid(images)


def test_mask_colours_are_stable_and_keep_the_shape():
    masks = torch.tensor([[[-1, 0], [1, 2]], [[9, 10], [19, 0]]], dtype=torch.int8)
    colours = figures.mask_colours(masks)
    assert colours.shape == (2, 2, 2, 3) and colours.dtype == np.uint8
    assert (colours[0, 0, 0] == 255).all() and np.array_equal(colours[1, 0, 1], colours[0, 1, 0])
    assert np.array_equal(colours[1, 1, 0], colours[0, 1, 0]) and np.array_equal(colours[1, 1, 1], colours[0, 0, 1])
    assert len({tuple(c) for c in figures.mask_colours(np.arange(-1, 10))}) == 11
    for mask in (np.zeros((2, 2)), np.zeros((2, 2), bool)):
        with pytest.raises(LitvaeError, match="integer"): figures.mask_colours(mask)


# --- saved files -----------------------------------------------------------------------------------------------------

def test_saved_files_are_what_they_say(tmp_path):
    data = pd.DataFrame({"x": [1, 2], "y": [0.1 + 0.2, np.nan]})
    paths = figures.save_figure(drawn(), tmp_path / "deep" / "a.v2", ORIGIN, data=data, caption="A | caption µ")
    assert {k: p.name for k, p in paths.items()} == {k: f"a.v2.{k}" for k in ("png", "svg", "csv", "json")}
    with Image.open(paths["png"]) as picture:
        assert abs(picture.width - 6.4 * 150) < 60 and set(picture.info) <= {"dpi"}
        assert np.allclose(picture.info["dpi"], 150, atol=0.1)
    assert ElementTree.parse(paths["svg"]).getroot().tag.endswith("svg")
    assert "Date" not in (svg := paths["svg"].read_text()) and "dc:date" not in svg and "/home" not in svg
    pd.testing.assert_frame_equal(pd.read_csv(paths["csv"]), data, check_exact=True)
    assert read_json(paths["json"]) == {"kind": "figure", "id": "a.v2", "caption": "A | caption µ",
                                        "provenance": ORIGIN, "files": ["a.v2.csv", "a.v2.png", "a.v2.svg"]}


def test_the_short_origin_is_printed_in_the_picture_and_then_taken_off(tmp_path):
    (fig, _), nothing = plt.subplots(), {**ORIGIN, "preset": None, "data": [], "seeds": []}
    paths = figures.save_figure(fig, tmp_path / "a", ORIGIN)
    bare = figures.save_figure(fig, tmp_path / "b", nothing)["png"]
    assert Image.open(paths["png"]).height > Image.open(bare).height and fig.texts == []
    assert set(paths) == {"png", "svg", "json"} and not (tmp_path / "a.csv").exists()  # no data, no CSV


def test_the_same_drawing_gives_the_same_bytes_in_every_process(tmp_path):
    imports = "import numpy as np, matplotlib.pyplot as plt\nfrom litvae.core import figures\n"
    script = (imports + inspect.getsource(drawn) +
              f"figures.use_style()\nfigures.save_figure(drawn(), {str(tmp_path / 'a')!r}, {ORIGIN!r})")
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")} | {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    fig = drawn()
    for name in "bc": figures.save_figure(fig, tmp_path / name, ORIGIN)
    for suffix in ("png", "svg"): assert len({(tmp_path / f"{name}.{suffix}").read_bytes() for name in "abc"}) == 1


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    old = {k: p.read_bytes() for k, p in figures.save_figure(drawn(), tmp_path / "a", ORIGIN).items()}
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    fig, _ = plt.subplots()
    with pytest.raises(LitvaeError, match="disk is full"): figures.save_figure(fig, tmp_path / "a", ORIGIN)
    with pytest.raises(LitvaeError, match="disk is full"):
        figures.save_table(pd.DataFrame({"a": [1]}), tmp_path / "a", ORIGIN)
    assert {p.suffix[1:]: p.read_bytes() for p in tmp_path.iterdir()} == old and fig.texts == []


def test_markdown_tables_line_up_and_keep_odd_cells(tmp_path):
    frame = pd.DataFrame({("ours", "steps"): [1000.0, np.nan], ("ours", "error"): [0.56, 12.3456789],
                          "name": ["a|b", "two\nlines"], "flag": [True, None], "none": [None, None]},
                         index=pd.Index(["SBD", "DC"], name="decoder"))
    text = str(figures.save_table(frame, tmp_path / "t", ORIGIN, caption="Caption.", digits=2))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({len(line) for line in table}) == 1
    cells = [[c.strip() for c in line.replace("\\|", "¦").strip("|").split("|")] for line in table]
    assert cells[0] == ["decoder", "ours steps", "ours error", "name", "flag", "none"]
    assert cells[2:] == [["SBD", "1000", "0.56", "a¦b", "True", "–"], ["DC", "–", "12.35", "two lines", "–", "–"]]
    assert [c.endswith(":") for c in cells[1]] == [False, True, True, False, False, False]
    assert text.startswith("Caption.\n\n|") and "toys_proc (stand-in)" in text
    assert "12.3456789" in (tmp_path / "t.csv").read_text() and read_json(tmp_path / "t.json")["kind"] == "table"


def test_an_empty_table_is_a_table(tmp_path):
    assert "| latent |" in str(figures.save_table(pd.DataFrame({"latent": []}), tmp_path / "t", ORIGIN))


# --- provenance ------------------------------------------------------------------------------------------------------

def run(seed, name="toys_proc", source="standin", seconds=60.0, hardware="one core"):
    return SimpleNamespace(config=SimpleNamespace(seed=seed, run_id=f"run-seed{seed}-{name}"),
                           result={"data": {"name": name, "source": source, "n": 3}, "seconds": seconds,
                                   "environment": {"hardware": hardware}})


def test_provenance_sums_up_the_runs():
    runs = [run(10), run(9, "toys", "real", 0.5, "a GPU"), run(9)]
    origin = figures.provenance("small", runs, {"steps": np.int64(5)},
                                data=[SimpleNamespace(name="extra", source="real")])
    assert origin["seeds"] == [9, 10] and origin["training"] == {"seconds": 120.5, "hardware": ["one core", "a GPU"]}
    assert origin["data"] == [{"name": "extra", "source": "real"}, {"name": "toys", "source": "real"},
                              {"name": "toys_proc", "source": "standin"}]
    assert origin["parameters"] == {"steps": 5} and len(origin["runs"]) == 3
    assert set(origin["environment"]) == {"python", "torch", "litvae", "numpy", "matplotlib", "git_commit", "hardware",
                                          "operators"}


def test_nothing_private_is_written():
    secret = {"out": Path.home() / "secret" / "figures", "runs": "/srv/private/runs", "nested": [{"p": "/srv/private"}]}
    text = json.dumps(figures.provenance("small", [run(0)], secret), allow_nan=False)
    private = ["secret", "/srv", *(w for w in (socket.gethostname(), str(Path.home()), str(Path.cwd())) if len(w) > 4)]
    assert not [word for word in private if word in text]
    assert json.loads(text)["parameters"] == {"out": "figures", "runs": "runs", "nested": [{"p": "private"}]}


def test_jsonable_takes_what_notebooks_have():
    given = {1: torch.tensor(2.0), "a": (np.float64("inf"), None, True), "t": torch.arange(2), "s": "text/with/slash"}
    assert figures.jsonable(given) == {"1": 2.0, "a": [None, None, True], "t": [0, 1], "s": "text/with/slash"}


@pytest.mark.parametrize("seconds, words", [(12.4, "12 s"), (89, "89 s"), (600, "10 min"), (5400, "1 h 30 min"),
                                            (90000, "25 h 00 min")])
def test_the_line_for_people(seconds, words):
    line = figures.provenance_line({**ORIGIN, "training": {"seconds": seconds}})
    assert line == ("preset small · toys_proc (stand-in) · seeds 0, 1 · 1 run, trained in " + words +
                    " · litvae 0.1.0, torch 2.15.0 · commit 0123456789 with local changes")
    short = figures.provenance_line({**ORIGIN, "environment": {}, "runs": []}, full=False)
    assert short == "preset small · toys_proc (stand-in) · seeds 0, 1"


def test_the_commit_is_that_of_the_package_and_ignores_redrawn_figures(tmp_path):
    copy_repository(tmp_path / "checkout", "litvae")
    script = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, ".")
from litvae.core.environment import git_commit
here, who = Path("."), ["-c", "user.name=a", "-c", "user.email=a@b"]
git = lambda *words: subprocess.run(["git", *who, *words], check=True, capture_output=True)
assert Path(sys.modules["litvae"].__file__).is_relative_to(Path.cwd()), sys.modules["litvae"].__file__
assert git_commit() is None
git("init"), (here / "figures").mkdir(), (here / "figures" / "a.png").write_text("old")
(here / ".gitignore").write_text("__pycache__/\\n")
assert git_commit() is None
git("add", "."), git("commit", "-m", "all")
clean = git_commit()
assert len(clean) == 10 and not clean.endswith("+"), clean
(here / "figures" / "a.png").write_text("new")
assert git_commit() == clean
(here / "litvae" / "fresh.py").write_text("x = 1")
assert git_commit() == clean + "+"
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "checkout", check=True)
