#!/usr/bin/env bash
# Runs the tests: prepares the environment once, then pytest with the arguments given here.
#
#   ./scripts/test.sh                 everything
#   ./scripts/test.sh tests/data -x   some of it; any argument of pytest
#   ./scripts/test.sh --full          the long counts (more seeds, more kills)
#   ./scripts/test.sh --gpu           let the tests see the GPU
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=$(scripts/setup.sh test)
exec "$bin/python" -m pytest "$@"
