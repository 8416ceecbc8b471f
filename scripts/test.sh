#!/usr/bin/env bash
# Runs the tests: prepares the environment once, then pytest with the arguments given here.
#
#   ./scripts/test.sh                 everything, a file at a time on each of up to four cores
#   ./scripts/test.sh tests/data -x   some of it; any argument of pytest (-n 0: in one process, as for a debugger)
#   ./scripts/test.sh --full          the long counts (more seeds, more kills)
#   ./scripts/test.sh --gpu           let the tests see the GPU, in one process
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=$(scripts/setup.sh test)
workers=$(nproc 2>/dev/null || echo 1)
[ "$workers" -le 4 ] || workers=4
for argument in "$@"; do
    case "$argument" in
        -n | -n* | --numprocesses* | --pdb | --gpu) workers="" ;;
    esac
done
[ "${workers:-1}" = 1 ] || set -- -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
exec "$bin/python" -m pytest "$@"
