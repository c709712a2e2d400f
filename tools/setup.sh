#!/bin/sh
# Makes the environment that the Makefile works in, or does nothing if it is there already.
#
#   VENV         folder of the virtual environment        (default .venv)
#   PYTHON       the Python to make it with               (default: the first of the list below that works)
#   MIN_DISK_GB  free space asked for before an install   (default 9)
#
# The stamp $VENV/.litvae-installed is written last. It names what was installed (a checksum of settings.ini, setup.py
# and constraints.txt) and where the checkout lay, since an environment does not survive a move.
set -eu
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
stamp=$venv/.litvae-installed
lock=$venv/.setup-lock
need=${MIN_DISK_GB:-9}

say() { echo "litvae: $*"; }
fail() { echo "litvae: $*" >&2; exit 1; }
in_venv() { "$venv/bin/python" "$@"; }
installed() { [ -x "$venv/bin/python" ] && [ -r "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
free_gb() { df -Pk "$venv" | awk 'NR == 2 { print int($4 / 1048576) }'; }

for file in settings.ini setup.py constraints.txt; do
    [ -r "$file" ] || fail "$file is missing from $(pwd): the checkout is not complete"
done
key="$(cat settings.ini setup.py constraints.txt | cksum) $(pwd -P)"

# A Python that was asked for by name must be the one that the environment has.
if [ -n "${PYTHON:-}" ] && [ -x "$venv/bin/python" ]; then
    asked=$(version_of "$PYTHON") || fail "PYTHON=$PYTHON does not run; name a Python 3.11 or newer"
    has=$(version_of "$venv/bin/python") || has=$asked
    [ "$asked" = "$has" ] || fail "$venv holds Python $has but PYTHON=$PYTHON is $asked; remove $venv or set VENV="
fi
if installed; then exit 0; fi

# Choose an interpreter. Names can exist and still not run (pyenv's shims), so each is tried.
python='' ; old='' ; bare=''
if [ -x "$venv/bin/python" ] && [ -z "${PYTHON:-}" ]; then set -- "$venv/bin/python"
elif [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"
else set -- python3.12 python3.11 python3 python3.13 python
fi
for candidate in "$@"; do
    version=$(version_of "$candidate") || continue
    if ! new_enough "$candidate"; then old="${old:-$candidate is Python $version}"; continue; fi
    if ! "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then bare="${bare:-$candidate}"; continue; fi
    python=$candidate
    break
done
if [ -z "$python" ]; then
    [ "$*" != "$venv/bin/python" ] || fail "the Python in $venv is not usable (3.11 or newer is needed); remove $venv"
    [ -z "$bare" ] || fail "$bare has no venv module; install it (on Debian: apt install python3-venv) or set PYTHON="
    [ -z "$old" ] || fail "Python 3.11 or newer is needed, but $old; install a newer one or set PYTHON="
    fail "no Python 3.11 or newer was found (tried: $*); install one or set PYTHON="
fi

# One set-up at a time: a second one waits for the first.
mkdir -p "$venv" 2>/dev/null || fail "cannot make $venv in $(pwd): no permission, or a full or read-only disk"
waited=0
while ! mkdir "$lock" 2>/dev/null; do
    [ -d "$lock" ] || fail "cannot write into $venv: no permission, or a full or read-only disk"
    holder=$(cat "$lock/pid" 2>/dev/null) || holder=''
    if [ -n "$holder" ] && kill -0 "$holder" 2>/dev/null; then
        [ "$waited" -ne 0 ] || say "another set-up of $venv is running (process $holder); waiting for it"
    elif [ "$waited" -gt 1 ]; then
        rm -rf "$lock"  # its owner was killed
    fi
    waited=$((waited + 1))
    sleep 1
done
trap 'rm -rf "$lock"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
echo $$ 2>/dev/null > "$lock/pid" || fail "cannot write into $venv: the disk is full"
if installed; then exit 0; fi

# A whole install takes about 6 GB and as much again for a moment; a refresh takes next to nothing.
for torch in "$venv"/lib/python3*/site-packages/torch/__init__.py; do [ ! -e "$torch" ] || need=1; done
free=$(free_gb)
[ "$free" -ge "$need" ] || fail "only $free GB are free where $venv lies, $need GB are needed; free some, set VENV= to\
 a folder on another disk, or MIN_DISK_GB= to the figure that you trust"

began=$(date +%s)
rm -f "$stamp"
if ! { [ -x "$venv/bin/python" ] && in_venv -m pip --version >/dev/null 2>&1; }; then
    say "making $venv with $python ($(version_of "$python"))"
    "$python" -m venv "$venv" || fail "$python could not make $venv (its own message stands above)"
fi
say "installing the pinned packages into $venv (the first time: about 6 GB, 3 to 5 minutes)"
install() {
    in_venv -m pip install --disable-pip-version-check -c constraints.txt "$@" && return
    [ "$(free_gb)" -ge 1 ] || fail "the disk of $venv is full; free some space and call again (nothing is lost)"
    fail "pip could not install the packages (its own message stands above); call again when that is mended"
}
install 'setuptools>=64' wheel
install --no-build-isolation -e '.[dev,reproduce,cluster,metrics]'
printf '%s\n' "$key" > "$stamp.$$" && mv "$stamp.$$" "$stamp" || fail "cannot write $stamp: the disk is full"
say "ready after $(($(date +%s) - began)) s"
