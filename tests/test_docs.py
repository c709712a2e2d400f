"The site builds without warnings and without the network, and shows readers what is meant for readers."
import json, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import repository
from conftest import ROOT, once

def build(root, out, *arguments):
    "Run docs/build.py of `root`; returns (exit status, everything printed)."
    done = subprocess.run([sys.executable, str(root / "docs/build.py"), "--out", str(out), *arguments],
                          capture_output=True, text=True, cwd=root)
    return done.returncode, done.stdout + done.stderr


class Links(HTMLParser):
    "What a page refers to: `loaded` (pictures, scripts, styles) and `linked`."
    def __init__(self, page):
        super().__init__()
        self.loaded, self.linked = set(), set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("img", "script", "source") and attributes.get("src"): self.loaded.add(attributes["src"])
        if tag == "link" and attributes.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.add(attributes["href"])
        if tag == "a" and attributes.get("href"): self.linked.add(attributes["href"])


def lost(html):
    "Local targets of any page that do not exist."
    complaints = []
    for page in html.rglob("*.html"):
        if "_static" in page.parts: continue
        links = Links(page)
        for target in links.loaded | links.linked:
            file = re.split("[?#]", target)[0]
            if re.match(r"[a-z]+:", target) or not file: continue
            if not (page.parent / file).exists(): complaints.append(f"{page.relative_to(html)}: {target}")
    return complaints


def remote(html):
    "What pages would load from the network."
    loaded = {target for page in html.rglob("*.html") for target in Links(page).loaded}
    return {target for target in loaded if re.match(r"(https?:)?//", target)}


@pytest.fixture(scope="module")
def site():
    "The site of this repository, built as where there is no npm."
    def make(out):
        status, printed = build(ROOT, out, "--offline")
        assert status == 0 and "warning" not in printed.lower(), printed
        assert "formulas will need the network" in printed
    return once("site", make) / "html"


def test_every_notebook_has_a_page_and_is_listed(site):
    front = (site / "index.html").read_text(encoding="utf-8")
    for path in repository.notebooks(ROOT, "nbs", "reproduce"):
        page = path.relative_to(ROOT).with_suffix(".html").as_posix()
        assert (site / page).exists() and f'href="{page}"' in front, page


def test_nothing_of_nbdev_is_left(site):
    for page in (site / "nbs").rglob("*.html"):
        text = re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))
        assert not re.search(r"#\| ?(hide|export|default_exp|slow|cuda|eval)\b", text), page
        assert "nbdev_export()" not in text, page


def test_every_picture_and_local_link_exists(site):
    assert not lost(site)


def test_the_report_is_shown_with_its_pictures(site):
    report = ROOT / "figures/REPORT.md"
    page = site / "figures/REPORT.html"
    assert page.exists()
    if not report.exists(): return
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", report.read_text(encoding="utf-8"))
    shown = {Path(target).name for target in Links(page).loaded}
    assert pictures and {Path(picture).name for picture in pictures} <= shown


def test_search_finds_words_of_the_chapters(site):
    assert "nbs/core/00_files" in (site / "searchindex.js").read_text(encoding="utf-8")
    front = (site / "index.html").read_text(encoding="utf-8")
    assert front.count('type="search"') <= 2  # the box and its pop-up


def test_only_formulas_may_need_the_network(site):
    assert all("mathjax" in target for target in remote(site))


# ------------------------------------------------------------------------------------------ a small book, made for this
CHAPTER = [
    ("markdown", "# A kernel\n\n> One line for the reader.\n\nIt computes $y = a x$."),
    ("markdown", "```cuda file=csrc/axpy.cu\n__global__ void axpy(float *y) {}\n```"),
    ("code", "#| default_exp kernels.axpy"),
    ("code", "#| hide\nsecret = 1"),
    ("code", "#| export\ndef shown(): return 2"),
    ("code", "#| echo: false\nout_of_sight = 3"),
    ("markdown", "## Links\n\n[settings](../../setup.py), [the chapter](.), [elsewhere](../../tests), "
                 "[page](../../reproduce/paper/table.ipynb)"),
    ("code", "#| hide\nimport nbdev; nbdev.nbdev_export()"),
]


@pytest.fixture
def book(tmp_path):
    root = tmp_path / "book"
    shutil.copytree(ROOT / "docs", root / "docs", ignore=shutil.ignore_patterns("_build"))
    for name in ("settings.ini", "setup.py"): shutil.copy2(ROOT / name, root / name)
    (root / "README.md").write_text("# small\n\n![What came out](figures/paper/table1.png)\n\n"
                                    "[a folder](nbs/kernels), [a guide](docs/guide.md)\n")
    (root / "STYLE.md").write_text("# style\n")
    (root / "docs/guide.md").write_text("# A guide\n\nBack to [the start](../README.md).\n")
    (root / "tests").mkdir()
    def write(name, cells):
        made = [{"cell_type": kind, "id": f"c{n}", "metadata": {}, "source": text}
                | ({"outputs": [], "execution_count": None} if kind == "code" else {})
                for n, (kind, text) in enumerate(cells)]
        kernel = {"name": "python3", "display_name": "python3", "language": "python"}
        text = json.dumps({"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    write("nbs/kernels/00_axpy.ipynb", CHAPTER)
    write("nbs/unheard/00_of.ipynb", [("markdown", "# A chapter of a later day\n\n> Listed all the same.")])
    write("reproduce/paper/table.ipynb", [("markdown", "# Table 1\n\n> The numbers."), ("code", "seed = 0")])
    (root / "reproduce/paper/pages.yaml").write_text("title: A paper\npages:\n  table1: {file: table.ipynb}\n")
    (root / "figures/paper").mkdir(parents=True)
    picture = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c02"
                            "0000000b4944415478da6364f80f00010501012718e3660000000049454e44ae426082")
    (root / "figures/paper/table1.png").write_bytes(picture)
    (root / "figures/paper/table1.md").write_text("The numbers\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    (root / "figures/REPORT.md").write_text("# Report\n\n![Table 1](paper/table1.png) [data](paper/table1.md)\n")
    return root


def test_a_small_book(book, tmp_path):
    out = tmp_path / "out"
    script = out / "npm/node_modules/mathjax/es5/tex-svg-full.js"  # as if npm had fetched it before
    script.parent.mkdir(parents=True)
    script.write_text("// formulas\n")
    status, printed = build(book, out)
    html = out / "html"
    assert status == 0 and not remote(html) and not lost(html), printed
    chapter = (html / "nbs/kernels/00_axpy.html").read_text(encoding="utf-8")
    assert "highlight-cuda" in chapter and "math notranslate" in chapter and "tex-svg-full.js" in chapter
    assert "shown" in chapter and not any(word in chapter for word in ("secret", "out_of_sight", "default_exp", "#|"))
    front = (html / "index.html").read_text(encoding="utf-8")
    assert "A chapter of a later day" in front and "Listed all the same." in front and "table1.png" in front
    template = (html / "reproduce/paper/table.html").read_text(encoding="utf-8")
    assert all(word in template for word in ("template", "table1.png", "The numbers"))


def test_faults_in_a_page_fail_the_build(book, tmp_path):
    (book / "README.md").write_text("# Title\n\n### Skipped a level\n\n[nowhere](gone.ipynb) and ![gone](gone.png)")
    status, printed = build(book, tmp_path / "out", "--offline")
    assert status != 0 and all(word in printed for word in ("README.md", "gone.ipynb", "gone.png", "H1 to H3")), printed
