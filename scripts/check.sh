#!/usr/bin/env bash
# Format, lint and types. `scripts/check.sh --fix` formats and mends what can be mended.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=$(scripts/setup.sh dev)
if [ "${1:-}" = --fix ]; then
    "$bin/ruff" check --fix .
    "$bin/ruff" format .
fi
status=0
"$bin/ruff" format --check . || status=1
"$bin/ruff" check . || status=1
"$bin/pyright" --pythonpath "$bin/python" || status=1
exit "$status"
