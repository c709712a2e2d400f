"Sphinx's settings. docs/build.py copies this file beside the staged pages; build the site with `make docs`."
import json
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).resolve().parent
settings = ConfigParser(delimiters=["="])
settings.read(here / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project, author, version = settings["lib_name"], settings["author"], settings["version"]
release, copyright = version, settings["copyright"]
html_title = settings["lib_name"]

extensions = ["myst_nb"]
# The pages are the notebooks, README.md, STYLE.md and figures/REPORT.md; other Markdown files are downloads.
exclude_patterns = ["**/.ipynb_checkpoints", "figures/*/**", "nbs/**/*.md", "reproduce/**/*.md"]

# Pages are notebooks with the outputs that were committed: nothing runs while the site is built.
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "html_image", "deflist"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_theme_options = {
    "show_toc_level": 2, "show_navbar_depth": 1, "navbar_persistent": [],
    "use_fullscreen_button": False, "use_download_button": True, "footer_content_items": ["copyright"],
}
html_context = {"default_mode": "light"}
html_static_path = ["_static"]
html_css_files = ["litvae.css"]
html_copy_source = True
if (here / "_static/tex-svg-full.js").exists(): mathjax_path = "tex-svg-full.js"  # else browsers ask the network


def directives(cell):
    "The nbdev directives at the head of a code cell, as {name: argument}, and its source without them."
    lines = "".join(cell["source"]).splitlines()
    marks = [line.strip()[2:].strip() for line in lines if line.strip().startswith("#|")]
    named = dict((mark.replace(":", " ").split(None, 1) + [""])[:2] for mark in marks if mark)
    return named, "\n".join(line for line in lines if not line.strip().startswith("#|")).strip("\n")


def for_readers(notebook):
    "The notebook without what is meant for nbdev: hidden cells, module names, export marks."
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            named, cell["source"] = directives(cell)
            if {"hide", "default_exp"} & set(named) or "nbdev_export()" in cell["source"]: continue
            if not cell["source"] and not cell["outputs"]: continue
            tags = cell["metadata"].setdefault("tags", [])
            if named.get("echo") == "false" or "hide_input" in named: tags.append("remove-input")
            if named.get("output") == "false" or "hide_output" in named: tags.append("remove-output")
        cells.append(cell)
    return {**notebook, "cells": cells}


def prepare(app, docname, source):
    if str(app.env.doc2path(docname)).endswith(".ipynb"): source[0] = json.dumps(for_readers(json.loads(source[0])))


def setup(app):
    app.connect("source-read", prepare)
