"""The checks of the repository itself. Each takes the root of a checkout, changes nothing in it, and returns a list
of complaints, one line each: an empty list is a pass. test_repository.py runs them here and on broken copies."""
import ast, filecmp, fnmatch, json, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path

import nbformat, yaml

# ---------------------------------------------------------------------------------------------------------- files
_LEFT_OUT = {".git", ".venv", "__pycache__", "build", "dist", ".ipynb_checkpoints", ".pytest_cache", ".snakemake",
             ".cache", "runs", "results", "_build", "_docs", "_proc", "*.egg-info", ".*.tmp.*"}


def files(root):
    "The files that are or would be committed: git's list where there is git, else all but build products."
    root = Path(root)
    if (root / ".git").exists() and shutil.which("git"):
        done = subprocess.run(["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                              capture_output=True, text=True)
        names = {name for name in done.stdout.split("\0") if name}
        if done.returncode == 0: return sorted(root / name for name in names if (root / name).is_file())
    found = []
    for folder, below, names in os.walk(root):
        keep = lambda name: not any(fnmatch.fnmatch(name, pattern) for pattern in _LEFT_OUT)
        source_of_data = Path(folder).relative_to(root).as_posix() in ("nbs", "litvae")
        below[:] = [name for name in below if keep(name) and (name != "data" or source_of_data)]
        found += [Path(folder) / name for name in names if keep(name)]
    return sorted(found)


def notebooks(root, *folders):
    "The notebooks below `folders`, as sorted paths."
    return sorted(path for folder in folders for path in (Path(root) / folder).rglob("*.ipynb")
                  if not any(part[0] in "._" for part in path.relative_to(root).parts))


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def _copy(root, *names):
    folder = Path(tempfile.mkdtemp(prefix="litvae-check-"))
    for name in names:
        if (Path(root) / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(Path(root) / name, folder / name, ignore=ignore)
        elif (Path(root) / name).exists(): shutil.copy2(Path(root) / name, folder / name)
    return folder


def nbdev(folder, call):
    "Run a call of nbdev, such as `nbdev_export()`, in `folder`; a complaint if it fails."
    code = f"from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; {call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    return [] if done.returncode == 0 else [f"{call} failed: {' '.join(last)}"]


def kernel_sources(folder):
    "Export the CUDA and C++ blocks of the notebooks in `folder`; a complaint if that fails."
    from litvae.kernels.sources import export_sources
    try: export_sources(folder)
    except Exception as error: return [f"export_sources failed: {error}"]
    return []


# ----------------------------------------------------------------------------------------------- in sync and clean
def out_of_sync(root, package="litvae"):
    "Modules and kernel sources that differ from what the notebooks export, in either direction."
    folder = _copy(root, "settings.ini", "nbs")
    try:
        complaints = nbdev(folder, "nbdev_export()") + kernel_sources(folder)
        listed = lambda top: {p.relative_to(top / package).as_posix() for p in (top / package).rglob("*")
                              if p.suffix in (".py", ".cu", ".cpp")}
        there, made = listed(root), listed(folder)
        for name in sorted(there | made):
            if name not in made: problem = "no notebook exports it; delete it"
            elif name not in there: problem = "a notebook exports it but it is missing; run `make export`"
            elif filecmp.cmp(root / package / name, folder / package / name, shallow=False): continue
            else: problem = "differs from its notebook; edit the notebook and run `make export`"
            complaints.append(f"{package}/{name}: {problem}")
        return complaints
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unclean(root):
    "Notebooks that nbdev_clean would change, that are not valid, or that name another kernel than python3."
    folder, complaints = _copy(root, "settings.ini", "nbs", "reproduce"), []
    try:
        for name in ("nbs", "reproduce"):
            if (folder / name).is_dir(): complaints += nbdev(folder, f"nbdev_clean(fname={name!r})")
        for path in notebooks(root, "nbs", "reproduce"):
            name = path.relative_to(root).as_posix()
            try: nbformat.validate(nbformat.read(path, as_version=nbformat.NO_CONVERT))
            except Exception as error:
                complaints.append(f"{name}: not a valid notebook: {str(error).splitlines()[0]}")
                continue
            if not filecmp.cmp(path, folder / name, shallow=False):
                complaints.append(f"{name}: not clean; run `make clean-notebooks`")
            kernel = read(path)["metadata"].get("kernelspec", {}).get("name")
            if kernel != "python3": complaints.append(f"{name}: its kernel is {kernel!r}, not 'python3'")
        return complaints
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------ parameters
def _is_literal_assignment(node):
    if isinstance(node, ast.AnnAssign): targets, value = [node.target], node.value
    elif isinstance(node, ast.Assign): targets, value = node.targets, node.value
    else: return False
    if len(targets) != 1 or not isinstance(targets[0], ast.Name) or value is None: return False
    try: ast.literal_eval(value)
    except ValueError: return False
    return True


def lost_parameters(root, near_top=5):
    "Notebooks below reproduce/ without exactly one cell tagged `parameters`, near the top, of literal assignments."
    complaints = []
    for path in notebooks(root, "reproduce"):
        name, cells = path.relative_to(root).as_posix(), read(path)["cells"]
        tagged = [(n, cell) for n, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", [])]
        if len(tagged) != 1:
            complaints.append(f"{name}: {len(tagged)} cells are tagged `parameters`, one is needed")
            continue
        where, cell = tagged[0]
        if cell["cell_type"] != "code": complaints.append(f"{name}: the cell tagged `parameters` is not a code cell")
        elif where >= near_top:
            complaints.append(f"{name}: the `parameters` cell is cell {where + 1}, it belongs near the top")
        else:
            try: body = ast.parse(source(cell)).body
            except SyntaxError as error: complaints.append(f"{name}: the `parameters` cell does not parse: {error.msg}")
            else:
                if not body: complaints.append(f"{name}: the `parameters` cell sets nothing")
                complaints += [f"{name}: not a literal assignment in the `parameters` cell: {ast.unparse(node)}"
                               for node in body if not _is_literal_assignment(node)]
    return complaints


def wrong_pages(root):
    "Pages of a pages.yaml whose notebook is missing or has no such parameter, and notebooks that no page uses."
    complaints = []
    for listing in sorted((root / "reproduce").glob("*/pages.yaml")):
        where, unused = listing.relative_to(root).as_posix(), {path.name for path in listing.parent.rglob("*.ipynb")}
        pages = yaml.safe_load(listing.read_text(encoding="utf-8"))["pages"]
        for name, page in pages.items():
            path = listing.parent / page["file"]
            if not path.exists():
                complaints.append(f"{where}: {name} names {page['file']}, which does not exist")
                continue
            unused.discard(path.name)
            tagged = [cell for cell in read(path)["cells"] if "parameters" in cell["metadata"].get("tags", [])]
            text = "\n".join(source(cell) for cell in tagged)
            unknown = sorted(set(page.get("parameters", {})) - set(re.findall(r"(?m)^(\w+)\s*[:=]", text)))
            if unknown: complaints.append(f"{where}: {name} sets {unknown}, unknown to {page['file']}")
        complaints += [f"{where}: no page uses {name}" for name in sorted(unused)]
    return complaints


# ---------------------------------------------------------------------------------------------------------- floors
FLOORS = [  # from the ground; a room imports from floors below its own only; a module named here stands by itself
    ["core.files"],
    ["kernels"],
    ["core"],
    ["data"],
    ["genesis", "meme", "patchvae", "lsrgan", "transfer", "bfvae", "said"],
    ["reproduce"],
]
CHAPTERS_MAY_IMPORT = {}  # chapter: the other chapters that it builds on, where its paper does

# What only the named rooms may import, and only inside functions: users of the models do not have these installed.
LAZY = {"papermill": {"reproduce"}, "nbclient": {"reproduce"}, "nbformat": {"reproduce"}, "snakemake": {"reproduce"},
        "jupyter_client": {"reproduce"}, "IPython": {"core", "reproduce"}, "sklearn": {"core"}, "gpytorch": {"core"},
        "mlxtend": {"data"}}
REQUIRED = {"torch", "torchvision", "numpy", "scipy", "pandas", "matplotlib", "seaborn", "PIL", "yaml", "safetensors",
            "filelock", "tqdm"}


def modules(root, package="litvae"):
    "Dotted name -> path of every module of the package."
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name, path, known):
    "What module `name` imports: (dotted name, line, inside a function?); modules of the package are those in `known`."
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = []
    def visit(node, inside):
        if isinstance(node, ast.Import): found.extend((alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level: base = ".".join(package[:len(package) - node.level + 1] + [base] * bool(base))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append((full if full in known else base, node.lineno, inside))
        inner = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node): visit(child, inner)
    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def floor_violations(root, package="litvae"):
    "Imports that run against the floors, circles, rooms without a floor, and packages that users do not have."
    known, complaints, graph = modules(root, package), [], {}
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    def room_of(name):
        inside = ".".join(name.split(".")[1:])
        return inside if inside in floor else inside.split(".")[0]
    for room in sorted({room_of(name) for name in known} - {"", "_modidx"} - set(floor)):
        complaints.append(f"{package}.{room}: a room without a floor; give it one in tests/repository.py (FLOORS)")
    for name, path in known.items():
        room = room_of(name)
        if room == "_modidx": continue
        for target, line, inside in imports(name, path, known):
            where, top = f"{path.relative_to(root).as_posix()}:{line}", target.split(".")[0]
            if top != package:
                if room == "": complaints.append(f"{where}: `import {package}` must load nothing, it loads {target}")
                elif top in LAZY:
                    if room not in LAZY[top]: complaints.append(f"{where}: {name} must not import {top}")
                    elif not inside: complaints.append(f"{where}: {name} loads {top}; move that into a function")
                elif top not in REQUIRED and top not in sys.stdlib_module_names:
                    complaints.append(f"{where}: {name} imports {top}, not among the requirements in settings.ini")
                continue
            other = room_of(target)
            if target != name: graph.setdefault(name, set()).add(target)
            if room == "": complaints.append(f"{where}: `import {package}` must load nothing, it loads {target}")
            elif other == "" or other == room: continue
            elif other not in floor or room not in floor: continue  # named above
            elif floor[other] > floor[room]:
                complaints.append(f"{where}: {name} imports {target}, which lies on a floor above it")
            elif floor[other] == floor[room] and other not in CHAPTERS_MAY_IMPORT.get(room, ()):
                complaints.append(f"{where}: {name} imports {target}, another chapter; see CHAPTERS_MAY_IMPORT")
    return complaints + [f"circle of imports: {' -> '.join(circle)}" for circle in _circles(graph)]


def _circles(graph):
    "One circle for each knot of modules that import one another."
    done, circles = set(), []
    def walk(name, path):
        if name in path:
            circles.append(path[path.index(name):] + [name])
            return
        if name in done: return
        done.add(name)
        for target in sorted(graph.get(name, ())): walk(target, path + [name])
    for name in sorted(graph): walk(name, [])
    return circles


# --------------------------------------------------------------------------------------------------------- hygiene
MAX_FILE, MAX_NOTEBOOK, MAX_CELL, MAX_KERNEL, MAX_LINE = 1_000_000, 300_000, 40, 70, 120
_MACHINE = re.compile(r"(?<![\w.])/(?:(?:root|home|Users|work)/[\w.]|tmp/(?:tmp|plan|pytest))[\w./-]*")
_UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|NotImplemented" r"Error)\b|@[A-Z]+@")
_REGISTRY = re.compile("py" r"pi\.org|python" r"hosted\.org|registry\." r"npmjs|download\." r"pytorch")
_TEXT = set(".py .md .ipynb .ini .toml .yml .yaml .sh .smk .txt .csv .json .svg .css .html .js".split()) | {""}


def printed(notebook):
    "(cell id, text) for every source and every textual output of a notebook; pictures are left out."
    for cell in notebook["cells"]:
        yield cell.get("id"), source(cell)
        for output in cell.get("outputs", ()):
            yield cell.get("id"), "".join(output.get("text", "")) + "\n".join(output.get("traceback", ()))
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/") and isinstance(value, (str, list)): yield cell.get("id"), "".join(value)


def texts(root):
    "(where, text) for every piece of text in the repository."
    for path in files(root):
        name = path.relative_to(root).as_posix()
        if path.suffix not in _TEXT or name == "LICENSE": continue
        if path.suffix == ".ipynb": yield from ((f"{name} cell {cell}", text) for cell, text in printed(read(path)))
        else:
            try: yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError: continue


def unwanted_text(root):
    "Paths of one machine, random names of temporary files, unfinished code, host names of package registries."
    complaints = []
    for where, text in texts(root):
        for match in _MACHINE.finditer(text):
            complaints.append(f"{where}: a path of one machine or a random temporary name: {match[0]}")
        for match in _UNFINISHED.finditer(text): complaints.append(f"{where}: unfinished: {match[0]}")
        for match in _REGISTRY.finditer(text): complaints.append(f"{where}: names a package registry: {match[0]}")
    return complaints


def oversized(root):
    "Files, notebooks, cells and lines of code that are too long to read or to keep in git."
    complaints = []
    for path in files(root):
        name, size = path.relative_to(root).as_posix(), path.stat().st_size
        limit = MAX_NOTEBOOK if path.suffix == ".ipynb" else MAX_FILE
        if size > limit: complaints.append(f"{name}: {size / 1000:.0f} kB, the limit is {limit // 1000} kB")
        if path.suffix == ".ipynb":
            for cell in read(path)["cells"]:
                lines = source(cell).splitlines()
                where = f"{name} cell {cell.get('id')}"
                for part, limit in _parts(cell):
                    if len(part.splitlines()) > limit:
                        complaints.append(f"{where}: {len(part.splitlines())} lines, the limit is {limit}")
                if cell["cell_type"] == "code": complaints += _too_wide(f"{where} line ", lines)
        elif path.suffix in (".py", ".sh") and not name.startswith("litvae/"):
            complaints += _too_wide(f"{name}:", path.read_text(encoding="utf-8").splitlines())
    return complaints


def _parts(cell):
    "What has a limit of its own: the source of a cell; in running text, each block of CUDA or C++, and the rest."
    if cell["cell_type"] == "code": return [(source(cell), MAX_CELL)]
    pieces = re.split(r"(?ms)^(```(?:cuda|cpp).*?^```)$", source(cell))
    return [("".join(pieces[::2]), MAX_CELL)] + [(block, MAX_KERNEL) for block in pieces[1::2]]


def _too_wide(where, lines):
    wide = [(number, len(line)) for number, line in enumerate(lines, 1) if len(line) > MAX_LINE]
    return [f"{where}{number}: {columns} columns, the limit is {MAX_LINE}" for number, columns in wide]


def _speaks(cell):
    "Does running this cell print or show something?"
    if cell["cell_type"] != "code" or source(cell).startswith("#|"): return False
    names = {"print", "display", "expect_error", "savefig", "subplots"}
    try: called = [node.func for node in ast.walk(ast.parse(source(cell))) if isinstance(node, ast.Call)]
    except SyntaxError: return True  # a magic
    return any(getattr(function, "id", getattr(function, "attr", None)) in names for function in called)


def badly_formed_chapters(root):
    "Notebooks below nbs/ committed without outputs or with an error, or without the usual first and last cells."
    complaints = []
    for path in notebooks(root, "nbs"):
        name, cells = path.relative_to(root).as_posix(), read(path)["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        if any(_speaks(cell) for cell in cells) and not outputs:
            complaints.append(f"{name}: committed without outputs; run it before the commit")
        if any(output["output_type"] == "error" for output in outputs):
            complaints.append(f"{name}: committed with an error among its outputs")
        prose = [line for cell in cells if cell["cell_type"] == "markdown" for line in _outside_fences(source(cell))]
        if sum(line.startswith("# ") for line in prose) != 1 or not re.match(r"# .+\n\n?> .+", source(cells[0])):
            complaints.append(f"{name}: the first cell, and only it, has a `# Title`, below it `> what the page gives`")
        if sum("#| default_exp" in source(cell) for cell in cells) != 1:
            complaints.append(f"{name}: needs one `#| default_exp` cell")
        elif "nbdev_export()" not in source(cells[-1]):
            complaints.append(f"{name}: the last cell exports the package (nbdev.nbdev_export())")
    return complaints


def _outside_fences(text):
    inside = False
    for line in text.splitlines():
        if line.lstrip().startswith(("```", "~~~", ":::")): inside = not inside
        elif not inside: yield line


# ---------------------------------------------------------------------------------------------------------- README
def fenced(text, language):
    "The blocks of `text` that are fenced as `language`."
    return [block for kind, block in re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", text, re.M | re.S) if kind == language]


def commands(text):
    "The commands of the bash blocks: joined continuation lines, without comments, prompts and leading assignments."
    found = []
    for block in fenced(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = " ".join(re.sub(r"(^|\s)#.*$", "", line).split()).removeprefix("$ ")
            found += [part.strip() for part in re.split(r"&&|;|\|\|", line) if part.strip()]
    return found


def broken_links(root, name="README.md"):
    "Relative links and pictures of a Markdown file whose target does not exist, and anchors without a heading."
    path, complaints = root / name, []
    text = "\n".join(_outside_fences(path.read_text(encoding="utf-8")))
    heading = lambda line: re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
    anchors = {heading(line) for line in text.splitlines() if line.startswith("#")}
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
        if re.match(r"[a-z]+:", target): continue
        file, _, anchor = target.partition("#")
        if file and not (path.parent / file).exists(): complaints.append(f"{name}: the link {target} leads nowhere")
        elif not file and anchor not in anchors: complaints.append(f"{name}: no heading for the link {target}")
    return complaints


def uncovered_commands(text, covered):
    "Commands in `text` that no pattern of `covered` matches as a whole."
    return [f"README.md: no test is known to cover the command `{command}`; test it, then list it in COVERED"
            for command in commands(text) if not any(re.fullmatch(pattern, command) for pattern in covered)]
