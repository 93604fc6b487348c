#!/usr/bin/env bash
#SBATCH --job-name=sft --ntasks-per-node=1 --requeue --signal=B:USR1@180
#SBATCH --output=%x-%j.log --open-mode=append
# Fine-tune the model of pretrain_full.sh on smol-smoltalk with every GPU of one node or of many.
#
#     bash sft_full.sh                            # any field of sft_gpt.py's Config as a flag, too
#     MODEL=HuggingFaceTB/SmolLM2-135M bash sft_full.sh --max_length=2048
#     bash sft_full.sh prepare                    # on a login node, before sbatch: install and download
#     sbatch -N2 --gpus-per-node=8 --exclusive --mem=0 --time=4:00:00 sft_full.sh             # more in launch.sh
#
# The data: 460,000 conversations, cut to the context of 1,024 tokens, packed into rows of 1,024
# A step: 64 rows × 1,024 tokens = 65,536 tokens; on 8 GPUs 8 rows each, in one micro-batch
# The recipe: 2 epochs at a learning rate of 1e-3, as SmolLM2 used for models of up to 360 M parameters
set -euo pipefail
PROJECT=$(dirname "${BASH_SOURCE[0]}")
if [ ! -f "$PROJECT/launch.sh" ]; then # sbatch runs a copy in a spool folder; Slurm knows where the original is
    PROJECT=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/sft_full.sh.*|\1|p' | head -n 1) || true
fi
cd "${PROJECT:-$SLURM_SUBMIT_DIR}"
source ./launch.sh
MODEL=${MODEL:-out/base}
SMOLTALK=data/smol-smoltalk # what is downloaded without being asked for
DATA=${DATA:-$SMOLTALK}
OUT=${OUT:-out/chat}

# The training split's files, and the model if it is one of the hub's. A download that broke off goes on.
prepare() {
    refuse_hub_id
    install
    if [ "$MODEL" != out/base ] && [ ! -d "$MODEL" ]; then run "${PYTHON%python}hf" download "$MODEL"; fi
    if [ -e "$DATA" ]; then return; fi
    run "${PYTHON%python}hf" download HuggingFaceTB/smol-smoltalk --repo-type=dataset --include="data/train*" \
        --local-dir="$DATA.partial"
    run mv "$DATA.partial" "$DATA"
}

refuse_hub_id() {
    [[ $DATA =~ ^[^./][^/]*/[^/]+$ && $DATA != data/* && ! -d ${DATA%/*} ]] || return 0
    fail "there is no DATA=$DATA, and prepare fetches smol-smoltalk only; a dataset of the hub is given by" \
        "--data=$DATA, and for a job first by \`hf download $DATA --repo-type=dataset --include='data/train*'" \
        "--local-dir=data/${DATA#*/}\`, then DATA=data/${DATA#*/}"
}

RECIPE=(--epochs=2 --lr=1e-3 --batch_tokens=65_536 --micro_batch_size=8)

need_data() { # for a job
    [ -e "$DATA" ] || [ -n "${DRY_RUN:-}" ] || refuse_hub_id
    [ -e "$DATA" ] || [ -n "${DRY_RUN:-}" ] || fail "DATA=$DATA is not there, seen from $PWD, and a job fetches" \
        "nothing; run \`$(to_prepare)\` on a login node first"
}

to_prepare() { # the command that fetches model and data
    [ "$MODEL" = out/base ] || printf 'MODEL=%q ' "$MODEL"
    [ "$DATA" = "$SMOLTALK" ] || printf 'DATA=%q ' "$DATA"
    echo "bash sft_full.sh prepare"
}

case ${1:-} in
-h | --help)
    install
    run "$PYTHON" sft_gpt.py --help
    exit
    ;;
prepare)
    shift
    for word in "$@"; do [[ $word == --model=* ]] || fail "prepare takes --model= only, not $word"; done
    MODEL=$(flag model "$MODEL" "$@")
    prepare
    exit
    ;;
submit)
    shift
    for_submit "$@"
    set -- ${FLAGS[@]+"${FLAGS[@]}"}
    ;;
[!-]*) fail "$1: expected prepare, submit, or flags of sft_gpt.py as --max_steps=100" ;;
esac
MODEL=$(flag model "$MODEL" "$@")
OUT=$(flag out_dir "$OUT" "$@")
if [ -z "$(flag data "" "$@")" ] && [ ! -e "$DATA" ]; then # --data is the user's own, DATA the folder made here
    if on_a_cluster || [ -n "${SUBMIT:-}" ]; then
        need_data
    elif [ "$DATA" = "$SMOLTALK" ]; then
        prepare
    else
        refuse_hub_id
        fail "there is no DATA=$DATA; name a folder, a file, or by --data= a hub dataset;" \
            "\`$(to_prepare)\` downloads smol-smoltalk there"
    fi
fi
DATA=$(flag data "$DATA" "$@")
launch sft_gpt.py "$DATA" "$OUT" --model="$MODEL" --data="$DATA" --out_dir="$OUT" --cache_dir="$OUT/cache" \
    ${RECIPE[@]+"${RECIPE[@]}"} "$@"
