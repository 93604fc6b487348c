#!/usr/bin/env bash
# Set up as quickstart.sh does, add the test tools, check the style, run the tests.
#
#     bash test.sh                # all
#     bash test.sh -k packed      # any of pytest's arguments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export VENV=${VENV:-.venv}
bash quickstart.sh setup
"$VENV/bin/pip" install --quiet pytest==9.2.0 hypothesis==6.170.15 ruff==0.17.6
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/python" -m pytest "$@"
