#!/usr/bin/env bash
# Prepares the Python environment, once. The environment's bin folder goes to stdout, everything else to stderr.
#
#   scripts/setup.sh          what training needs
#   scripts/setup.sh test     … and what the tests need
#   scripts/setup.sh dev      … and what scripts/check.sh needs
#
# The environment is VENV_PATH, else the active one (venv, or conda other than base), else .venv, made when missing.
# A second run installs nothing until pyproject.toml or constraints.txt change; DISABLE_UPDATES=1 installs nothing at all.
# PYTHON names the interpreter to make the environment with, SANA_TUNE_TORCH_INDEX the package index to take torch from.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'set-up: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

level=0 extras=""
case "${1:-}" in
    "") ;;
    test) level=1 extras="[test]" ;;
    dev) level=2 extras="[dev]" ;;
    *) die "unknown argument '$1'; known: test, dev" ;;
esac

active=""
if [ -n "${VENV_PATH:-}" ]; then
    env=$VENV_PATH
elif [ -n "${VIRTUAL_ENV:-}" ] && [ -d "$VIRTUAL_ENV" ]; then
    env=$VIRTUAL_ENV active=yes
elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
    env=$CONDA_PREFIX active=yes
else
    env=$root/.venv
fi
case "$env" in /*) ;; *) env=$PWD/$env ;; esac
if [ "$env" = "$root/.venv" ]; then active=""; fi
python=$env/bin/python
stamp=$env/.sana_tune-setup
log=$env/sana_tune-setup.log

# The stamp holds the level that is installed and a checksum of what was asked for.
wanted=$(printf '%s\n' "$root" | cat - "$root/pyproject.toml" "$root/constraints.txt" | cksum | tr ' ' '-')
installed() {
    [ -x "$python" ] && [ -x "$env/bin/sana_tune" ] && [ -r "$stamp" ] || return 1
    local have_level have_sum
    read -r have_level have_sum <"$stamp" || return 1
    [ "$have_sum" = "$wanted" ] && [ "$have_level" -ge "$level" ]
}

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local name without_venv=""
    for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        fits "$name" || continue # a version manager's stand-in can exist and not run, so it is asked
        if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$name"
            return
        fi
        without_venv=$name
    done
    if [ -n "$without_venv" ]; then
        die "$without_venv cannot make environments; install its venv package (Debian, Ubuntu: apt install $without_venv-venv)"
    fi
    die "Python 3.11, 3.12 or 3.13 is needed and was not found; install one, or name it: PYTHON=/path/to/python $0"
}

make_environment() {
    if [ -x "$python" ]; then
        fits "$python" || die "$env has $("$python" -V 2>&1); Python 3.11 to 3.13 is needed: deactivate it, or set VENV_PATH to another folder"
        return
    fi
    if [ -d "$env" ] && [ ! -e "$env/pyvenv.cfg" ] && [ -n "$(ls -A "$env")" ]; then
        die "$env is a folder with other things in it, not a Python environment; set VENV_PATH to another folder"
    fi
    local base
    base=$(find_python)
    say "making $env with $("$base" -V 2>&1)"
    if ! "$base" -m venv --clear "$env" >&2; then
        rm -rf "$env" # half an environment would be in the way of the next try
        die "$base could not make $env (see above)"
    fi
}

# Runs pip; shows the larger downloads, keeps everything in the log.
pip_install() {
    local line
    "$python" -m pip install --prefer-binary --no-input --disable-pip-version-check "$@" 2>&1 | tee -a "$log" |
        while IFS= read -r line; do
            if [[ $line =~ Downloading\ ([^ ]*/)?([^ /]+\ \([0-9.]+\ ?[MG]B\)) ]]; then
                say "  ${BASH_REMATCH[2]}"
            elif [[ $line == "Installing collected packages"* ]]; then
                say "  unpacking"
            fi
        done
}

give_up() {
    tail -n 15 "$log" >&2
    die "pip could not install $1 (above: the end of $log). Once that is mended, run the same command again"
}

# On a machine without an NVIDIA GPU the CPU build saves gigabytes. It comes from a wheel that pip is told of
# (find-links), else from PyTorch's CPU index; macOS has one build only.
choose_torch() {
    local pin index=${SANA_TUNE_TORCH_INDEX:-}
    pin=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$root/constraints.txt")
    if [ -n "$index" ]; then
        say "torch: from $index"
        pip_install --no-deps --index-url "$index" "$pin" || give_up "$pin from $index"
    elif [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null; then
        say "torch: the build of the package index"
    elif pip_install --no-deps --no-index "$pin"; then
        say "torch: no NVIDIA GPU here; a local wheel fits"
    else
        say "torch: no NVIDIA GPU here; the CPU build from $cpu_index"
        pip_install --no-deps --timeout 15 --retries 1 --index-url "$cpu_index" "$pin" ||
            say "torch: that failed; the build of the package index instead (with CUDA: gigabytes)"
    fi
}

# An active environment may bring a torch that suits its machine (a GPU image): it is kept when it is new enough.
own_torch() {
    local bound
    bound=$(sed -n 's/^ *"torch>=\([0-9.]*\)",$/\1/p' "$root/pyproject.toml")
    "$python" - "$bound" <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import version
number = lambda text: [int(part) for part in text.split("+")[0].split(".")[:2]]
sys.exit(number(version("torch")) < number(sys.argv[1]))
PYTHON
}

install() {
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >&2 || die "$env has no pip and none could be added"
    : >"$log" || die "$env cannot be written; set VENV_PATH to another folder"
    rm -f "$stamp"
    say "installing into $env (some minutes the first time; details: $log)"
    local constraints=$root/constraints.txt
    if [ -n "$active" ] && own_torch; then
        say "torch: the one of the active environment is kept"
        constraints=$env/sana_tune-constraints.txt
        grep -v '^torch==' "$root/constraints.txt" >"$constraints"
    elif ! "$python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
        choose_torch
    fi
    (cd "$root" && pip_install -c "$constraints" -e ".$extras") || give_up sana_tune
    printf '%s %s\n' "$level" "$wanted" >"$stamp"
    say "done"
}

# Two set-ups at once take turns; the second finds everything done.
if ! installed && command -v flock >/dev/null; then
    exec 9<"$root/constraints.txt"
    flock -n 9 || { say "waiting for another set-up" && flock 9; }
fi
if ! installed; then
    make_environment
    if [ -z "${DISABLE_UPDATES:-}" ] || [ ! -x "$env/bin/sana_tune" ]; then install; fi
fi
echo "$env/bin"
