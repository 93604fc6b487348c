#!/usr/bin/env bash
# Set up as quickstart.sh does, add the test tools, check the style, run the tests.
#
#     bash test.sh                # the quick ones
#     bash test.sh -k packed      # any of pytest's arguments
#     bash test.sh -m slow        # those on real weights and in other tools, left out otherwise
#     TYPES=1 bash test.sh        # and check each call against the annotations, slower
#     PYTHON=python3 bash test.sh -m cuda    # those on a GPU; needs torch >= 2.11, transformers >= 5.17, pytest
#
# With PYTHON nothing is installed or downloaded, and ruff, whose versions differ in style, is not run. Tests
# of what is not there (hypothesis, datasets, trl, a GPU) are skipped and listed with the reason.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ -z "${PYTHON:-}" ]; then
    export VENV=${VENV:-.venv}
    bash quickstart.sh setup
    "$VENV/bin/pip" install --quiet pytest==9.2.0 hypothesis==6.170.15 ruff==0.17.6 \
        gguf==0.19.0 accelerate==1.15.0 trl==1.16.0 "lm-eval[hf]==0.4.13" "transformers[serving]<6" \
        datatrove==0.10.1 orjson==3.13.0 typeguard==4.6.1 -r requirements.txt
    "$VENV/bin/ruff" check .
    "$VENV/bin/ruff" format --check .
    PYTHON=$VENV/bin/python
fi
"$PYTHON" -m pytest "$@"
