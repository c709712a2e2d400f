"""Build the site: `make docs`, or `python docs/build.py [--out FOLDER] [--offline]`.

Pages are copied to OUT/stage in the layout of the repository, so that links between them work there as here; Sphinx
writes OUT/html. Nothing is executed and nothing outside of OUT is written. MathJax is fetched once with npm and kept
in OUT/npm."""
import argparse, json, os, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Reading order and names of the chapters below nbs/; a folder that is not listed comes last under its own name.
CHAPTERS = {
    "core": ("Core", "What every model uses: distributions, layers, objectives, runs, figures"),
    "data": ("Data", "The real data sets and their stand-ins"),
    "kernels": ("Kernels", "CUDA beside its formula"),
    "genesis": ("GENESIS", "Scenes as components; reconstruction bottlenecks"),
    "meme": ("MEME", "Two modalities that supervise each other"),
    "patchvae": ("PatchVAE", "Parts of an image"),
    "lsrgan": ("LSR-GAN", "From the thesis on factorised representation"),
    "transfer": ("Transfer", "From the thesis on factorised representation"),
    "bfvae": ("BFVAE", "From the thesis on factorised representation"),
    "said": ("SAID", "From the thesis on factorised representation"),
    "reproduce": ("Reproducing", "From a preset to a report"),
}
MATHJAX, SCRIPT = "mathjax@3.2.2", "mathjax/es5/tex-svg-full.js"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def notebooks(folder):
    hidden = lambda path: any(part[0] in "._" for part in path.relative_to(folder).parts)
    return sorted(path for path in folder.rglob("*.ipynb") if not hidden(path))


def source(cell):
    return "".join(cell["source"])


def title_and_summary(path):
    "The `# Title` of a notebook and the `> summary` below it."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = next((source(cell) for cell in cells if cell["cell_type"] == "markdown"), "")
    title, summary = re.search(r"^# (.+)$", text, re.M), re.search(r"^> (.+)$", text, re.M)
    return title[1] if title else path.stem, summary[1] if summary else ""


def guides(root):
    "Pages that are written by hand: docs/*.md but the front page."
    return [path for path in sorted((root / "docs").glob("*.md")) if path.name != "index.md"]


# ------------------------------------------------------------------------------------------------------------- stage
def stage_pages(root, stage):
    "Copy what readers read, in the layout of the repository."
    ignore = shutil.ignore_patterns("__pycache__", ".*", "_*.ipynb")
    for name in ("nbs", "reproduce", "figures"):
        if (root / name).is_dir(): shutil.copytree(root / name, stage / name, ignore=ignore)
    for name in ("README.md", "STYLE.md", "settings.ini"): shutil.copy2(root / name, stage / name)
    (stage / "docs").mkdir()
    for path in guides(root): shutil.copy2(path, stage / "docs" / path.name)
    shutil.copytree(root / "docs/_static", stage / "_static")
    shutil.copy2(root / "docs/conf.py", stage / "conf.py")
    report = stage / "figures/REPORT.md"
    report.parent.mkdir(exist_ok=True)
    if not report.exists(): report.write_text("# Report\n\nNothing is measured yet: `make figures` writes this page.\n")
    wide = "---\nhtml_theme.sidebar_secondary.remove: true\n---\n"  # its tables need the room
    report.write_text(wide + report.read_text(encoding="utf-8"), encoding="utf-8")


def markdown_cell(name, text):
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def drawn_by(stage, paper, name):
    "Tables and pictures below figures/ whose name is `name` or begins with it, as Markdown."
    for path in sorted((stage / "figures" / paper).glob(f"{name}*")):
        if not re.fullmatch(rf"{name}([_-].+)?", path.stem): continue
        if path.suffix == ".md": yield path.read_text(encoding="utf-8").strip()
        if path.suffix == ".png": yield f"![{path.stem}](../../figures/{paper}/{path.name})"


def papers(stage):
    return sorted({path.parent for path in (stage / "reproduce").glob("*/*.ipynb")})


def about(folder):
    "A paper's title and pages, from its pages.yaml."
    import yaml
    path = folder / "pages.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}


def stage_results(stage):
    "Below each notebook of a paper that has no outputs of its own, what it wrote for the report."
    for folder in papers(stage):
        paper, pages = folder.name, about(folder).get("pages", {})
        for path in notebooks(folder):
            notebook = json.loads(path.read_text(encoding="utf-8"))
            if any(cell.get("outputs") for cell in notebook["cells"]): continue
            drawn = [name for name, page in pages.items() if page.get("file") == path.name]
            results = [text for name in drawn for text in drawn_by(stage, paper, name)]
            note = ("This page is a template: its numbers depend on the preset, so it is kept without outputs. "
                    "[The report](../../figures/REPORT.md) shows what it wrote at the preset `small`")
            note += "; the results are repeated at the end of this page." if results else "."
            cells = notebook["cells"]
            place = 1 if cells and cells[0]["cell_type"] == "markdown" else 0
            cells.insert(place, markdown_cell("template", f":::{{note}}\n{note}\n:::"))
            heading = "## Written at the preset `small`"
            if results: cells.append(markdown_cell("results", "\n\n".join([heading, *results])))
            path.write_text(json.dumps(notebook, indent=1), encoding="utf-8")


def mend_links(text, folder, root, stage):
    "Links to files of the repository that are no pages become downloads; links to folders go to their first notebook."
    def mend(match):
        picture, label, target = match.groups()
        file = target.partition("#")[0]
        if not file or re.match(r"[a-z]+:", target): return match[0]
        path = Path(os.path.normpath(folder / file))
        if not path.is_relative_to(stage): return match[0]
        here = root / path.relative_to(stage)
        if here.is_dir():
            pages = notebooks(path) if path.is_dir() else []
            return f"[{label}]({os.path.relpath(pages[0], folder)})" if pages else label
        if here.is_file() and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(here, path)
        download = path.suffix == ".md" and path.is_file() and path not in markdown_pages(stage)
        return f"[{label}](path:{target})" if download else match[0]
    return LINK.sub(mend, text)


def markdown_pages(stage):
    return [stage / name for name in ("index.md", "README.md", "STYLE.md", "figures/REPORT.md")] + guides(stage)


def stage_links(root, stage):
    for path in markdown_pages(stage)[1:]:
        path.write_text(mend_links(path.read_text(encoding="utf-8"), path.parent, root, stage), encoding="utf-8")
    for path in notebooks(stage):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown": cell["source"] = mend_links(source(cell), path.parent, root, stage)
        path.write_text(json.dumps(notebook, indent=1), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- front
def toctree(caption, entries):
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", ""])


def front_page(root, stage):
    "docs/index.md with the table of contents, in reading order, and the picture of results that README.md shows."
    folders = [path.name for path in sorted((stage / "nbs").iterdir()) if path.is_dir()]
    order = [name for name in CHAPTERS if name in folders] + [name for name in folders if name not in CHAPTERS]
    groups = [(*CHAPTERS.get(name, (name.capitalize(), "")), notebooks(stage / "nbs" / name)) for name in order]
    for folder in papers(stage):
        order = [page.get("file") for page in about(folder).get("pages", {}).values()]
        pages = sorted(notebooks(folder), key=lambda path: order.index(path.name) if path.name in order else len(order))
        name = folder.name.replace("_", " ").capitalize()
        groups.append((f"Tables and figures: {name}", about(folder).get("title", ""), pages))
    text = [toctree("Start", ["Getting started <README>", "Report <figures/REPORT>"])]
    for caption, subtitle, pages in groups:
        if not pages: continue
        text.append(f"## {caption}\n" + (f"\n{subtitle}.\n" if subtitle else ""))
        for page in pages:
            (title, summary), name = title_and_summary(page), page.relative_to(stage).as_posix()
            text.append(f"- [{title}]({name})" + (f"  \n  {summary}" if summary else ""))
        text.append("\n" + toctree(caption, [page.relative_to(stage).with_suffix("").as_posix() for page in pages]))
    by_hand = [f"docs/{path.stem}" for path in guides(root)]
    text.append(toctree("About", [*by_hand, "How a notebook reads here <STYLE>"]))
    readme = (stage / "README.md").read_text(encoding="utf-8")
    picture = re.search(r"!\[([^\]]*)\]\((figures/[^)\s]+\.(?:png|svg))\)", readme)
    index = (root / "docs/index.md").read_text(encoding="utf-8")
    shown = f"[![{picture[1]}]({picture[2]})](figures/REPORT.md)" if picture else ""
    index = index.replace("<!-- picture -->", shown).replace("<!-- chapters -->", "\n".join(text))
    (stage / "index.md").write_text(index, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- formulas
def mathjax(cache, stage, offline):
    "Put MathJax into the site if npm gives it; says so in one line if not."
    script = cache / "node_modules" / SCRIPT
    if not script.exists() and not offline and shutil.which("npm"):
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", str(cache), "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
        try: subprocess.run([*command, MATHJAX], timeout=120, capture_output=True, check=True)
        except (OSError, subprocess.SubprocessError): pass
    if script.exists(): shutil.copy2(script, stage / "_static" / script.name)
    else: print(f"docs: formulas will need the network in the reader's browser, since npm gave no {MATHJAX}")


# --------------------------------------------------------------------------------------------------------------- main
def build(root, out, offline=False):
    "Stage and build; returns Sphinx's exit status. Warnings are errors."
    from sphinx.cmd.build import build_main
    stage, html = out / "stage", out / "html"
    for folder in (stage, html): shutil.rmtree(folder, ignore_errors=True)
    stage.mkdir(parents=True)
    stage_pages(root, stage)
    stage_results(stage)
    stage_links(root, stage)
    front_page(root, stage)
    mathjax(out / "npm", stage, offline)
    options = ["-q", "-E", "-W", "--keep-going", "-b", "html", "-d", str(out / "doctrees")]
    status = build_main([*options, str(stage), str(html)])
    if status == 0: print(f"docs: {len(list(html.rglob('*.html')))} pages, open {os.path.relpath(html / 'index.html')}")
    return status


def main():
    parser = argparse.ArgumentParser(description="Build the site from the notebooks.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/_build", help="where to build (default docs/_build)")
    parser.add_argument("--offline", action="store_true", help="do not ask npm for MathJax")
    arguments = parser.parse_args()
    sys.exit(build(ROOT, arguments.out.resolve(), arguments.offline))


if __name__ == "__main__": main()
