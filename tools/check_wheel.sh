#!/bin/sh
# Is the wheel enough for somebody who only wants the models? Makes a fresh environment with the given Python, installs
# the wheel and its runtime requirements (pinned by constraints.txt), imports every module and runs the snippets of
# README.md. Takes a few minutes and 6 GB, all of it in a temporary folder that is removed at the end.
#
#   tools/check_wheel.sh [PYTHON]     (default python3)
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-python3}
work=$(mktemp -d "${TMPDIR:-/tmp}/litvae-wheel.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

"$python" -m venv "$work/build" "$work/user"
mkdir "$work/source"
(cd "$root" && cp -R litvae settings.ini setup.py pyproject.toml README.md LICENSE "$work/source")
"$work/build/bin/python" -m pip install -q --disable-pip-version-check 'setuptools>=64' wheel
"$work/build/bin/python" -m pip wheel -q --no-deps --no-build-isolation -w "$work" "$work/source"
"$work/user/bin/python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" "$work"/litvae-*.whl
cd "$work"

cat > check.py <<'PYTHON'
import importlib, importlib.util, pkgutil, re, subprocess, sys, time
from pathlib import Path

start = time.perf_counter()
import torch, torchvision
torches = time.perf_counter()
import litvae
names = [module.name for module in pkgutil.walk_packages(litvae.__path__, "litvae.")]
done = time.perf_counter()
assert "site-packages" in litvae.__file__, litvae.__file__
for name in names: importlib.import_module(name)
unwanted = ("nbdev", "fastcore", "papermill", "nbclient", "IPython", "sklearn", "snakemake")
present = [name for name in unwanted if importlib.util.find_spec(name)]
assert not present, f"more than the runtime requirements is installed: {present}"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: importing torch and torchvision took "
      f"{torches - start:.2f} s, litvae {done - torches:.3f} s more, its {len(names)} modules "
      f"{time.perf_counter() - done:.2f} s more")
snippets = re.findall(r"^```python[^\n]*\n(.*?)^```", Path(sys.argv[1]).read_text(encoding="utf-8"), re.M | re.S)
for snippet in snippets: subprocess.run([sys.executable, "-c", snippet], check=True)
print(f"{len(snippets)} snippets of README.md ran")
PYTHON
LITVAE_DATA="$work/data" MPLBACKEND=Agg "$work/user/bin/python" check.py "$root/README.md"
"$work/user/bin/litvae" --help > /dev/null
"$work/user/bin/python" -m pip check
echo "the wheel is enough for its users"
