#!/usr/bin/env bash
#SBATCH --job-name=pretrain --ntasks-per-node=1 --requeue --signal=B:USR1@180
#SBATCH --output=%x-%j.log --open-mode=append
# Pretrain on FineWeb-Edu with every GPU of one node or of many.
#
#     bash pretrain_full.sh                       # any field of pretrain_gpt.py's Config as a flag, too
#     NPROC=2 bash pretrain_full.sh --micro_batch_size=8
#     bash pretrain_full.sh prepare               # on a login node, before sbatch: install, download, tokenize
#     sbatch -N4 --gpus-per-node=8 --exclusive --mem=0 --time=4:00:00 pretrain_full.sh        # more in launch.sh
#     bash pretrain_full.sh --depth=16            # another size, pretrain_gpt.py's by_depth gives the rest; to
#                                                 # prepare as many tokens, the same flag
#     PRESET=qwen3-130m bash pretrain_full.sh     # or gpt2-124m: runs to compare with, see presets/
#
# The model, 12 layers × 512, 8 heads, SwiGLU 1408, SmolLM2's vocabulary of 49,152:
#     a block        4 × 512² + 3 × 512 × 1408    =  3.2 M,  twelve of them  38.5 M
#     two embeddings 2 × 49,152 × 512             = 50.3 M                   88.9 M parameters in all
# The data: 2,000 steps × 524,288 tokens          = 1.05 B tokens, 12 for each parameter
# A step: 512 windows × 1,024 tokens              = 524,288 tokens
#     on 8 GPUs 64 windows each, 2 micro-batches of 32; on 1 GPU 16 of them: the result is the same
# The compute: 6 × 63.7 M (all but the input embedding) + 12 × 12 × 1,024 × 512 (attention) = 458 MFLOP a token,
#     4.8e17 in all; at a third of an H100's 990 TFLOP/s in bf16, 25 minutes on one
set -euo pipefail
PROJECT=$(dirname "${BASH_SOURCE[0]}")
if [ ! -f "$PROJECT/launch.sh" ]; then # sbatch runs a copy in a spool folder; Slurm knows where the original is
    PROJECT=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/pretrain_full.sh.*|\1|p' | head -n 1) || true
fi
cd "${PROJECT:-$SLURM_SUBMIT_DIR}"
source ./launch.sh
DEPTH=$(flag depth "" "$@")
[[ $DEPTH =~ ^(0|[1-9][0-9]*)?$ ]] || fail "--depth=$DEPTH: expected a number of blocks, from 1 up"
[ "$DEPTH" != 0 ] || DEPTH= # as in pretrain_gpt.py: no depth
# The training tokens, half a percent more for validation, and some to spare, so that no window is read twice.
# With a depth: by_depth's 20 for each of the blocks' 12 × depth × (64 × depth)² parameters.
prepare() {
    local word flags=() tokens=1_100_000_000
    for word in "$@"; do [[ $word == --depth=* ]] || flags+=("$word"); done
    [ -z "$DEPTH" ] || tokens=$((983040 * DEPTH ** 3 * 105 / 100))
    install
    run "$PYTHON" prepare_data.py --source=HuggingFaceFW/fineweb-edu --config="$SAMPLE" \
        --tokenizer=HuggingFaceTB/SmolLM2-135M --max_tokens="$tokens" --out_dir="$DATA" ${flags[@]+"${flags[@]}"}
}

prepared() { # or the user's own: a list of folders, or shards with other names than prepare_data.py's
    [ -f "$DATA/manifest.json" ] || [[ $DATA == *[,:]* ]] ||
        compgen -G "$DATA/*.bin" | grep -qvE '/(train|val)_[0-9]+[.]bin$'
}

DATA_GIVEN=${DATA:-} DEFAULT=data/fineweb-edu SAMPLE=sample-10BT
RECIPE=(--context_length=1024 --max_steps=2000 --batch_tokens=524_288 --micro_batch_size=32)
if [ -z "$(flag init_from "" "$@")" ]; then # a new phase has its model's shape
    RECIPE=(--num_hidden_layers=12 --hidden_size=512 --num_attention_heads=8 "${RECIPE[@]}")
fi

if [ -n "${PRESET:-}" ]; then # it sets prepare, prepared, RECIPE, DATA and OUT for another run
    [ -f "presets/$PRESET.sh" ] || fail "PRESET=$PRESET: expected a file of presets/ without its .sh"
    # shellcheck source=presets/qwen3-130m.sh
    source "./presets/$PRESET.sh"
fi
if [ -n "$DEPTH" ]; then # it gives what RECIPE would set
    [ -z "${PRESET:-}" ] || fail "PRESET=$PRESET is a run of its own; leave it out, or --depth"
    RECIPE=(--context_length=1024 --micro_batch_size=$((DEPTH < 26 ? 32 : 16))) # of an H100's 80 GB, see plan.py
    [ "$DEPTH" -lt 22 ] || SAMPLE=sample-100BT # for more than 10 B tokens
    DEFAULT=$DEFAULT-depth$DEPTH               # other sizes have other amounts
fi
DATA=${DATA:-$DEFAULT}
OUT=${OUT:-out/base}

need_data() { # for a job
    prepared || [ -n "${DRY_RUN:-}" ] || fail "DATA=$DATA is not prepared, seen from $PWD, and a job" \
        "fetches nothing; run \`$(to_prepare)\` on a login node first"
}

to_prepare() { # the command that fills DATA
    [ -z "${PRESET:-}" ] || printf 'PRESET=%q ' "$PRESET"
    [ -z "$DATA_GIVEN" ] || printf 'DATA=%q ' "$DATA_GIVEN"
    echo "bash pretrain_full.sh prepare${DEPTH:+ --depth=$DEPTH}"
}

case ${1:-} in
-h | --help)
    install
    run "$PYTHON" pretrain_gpt.py --help
    exit
    ;;
prepare)
    shift
    prepare "$@"
    exit
    ;;
submit)
    shift
    for_submit "$@"
    set -- ${FLAGS[@]+"${FLAGS[@]}"}
    ;;
[!-]*) fail "$1: expected prepare, submit, or flags of pretrain_gpt.py as --max_steps=100" ;;
esac
OUT=$(flag out_dir "$OUT" "$@")
if [ -z "$(flag data_dir "" "$@")" ] && ! prepared; then
    if on_a_cluster || [ -n "${SUBMIT:-}" ]; then
        need_data
    elif [ -z "$DATA_GIVEN" ] || [ -f "$DATA/progress.json" ] || [ -d "$DATA/parts" ]; then # or begun
        prepare
    else
        fail "there are no shards in DATA=$DATA; name a folder of shards, or fill it by \`$(to_prepare)\`"
    fi
fi
DATA=$(flag data_dir "$DATA" "$@")
launch pretrain_gpt.py "$DATA" "$OUT" --data_dir="$DATA" --out_dir="$OUT" "${RECIPE[@]}" "$@"
