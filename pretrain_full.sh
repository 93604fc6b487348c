#!/usr/bin/env bash
# Pretrain on FineWeb-Edu with every GPU of this node.
#
#     bash pretrain_full.sh                       # any field of pretrain_gpt.py's Config as a flag, too
#     NPROC=2 bash pretrain_full.sh --micro_batch_size=8
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
cd "$(dirname "${BASH_SOURCE[0]}")"
bash quickstart.sh setup
BIN=${VENV:-.venv}/bin
DATA=${DATA:-data/fineweb-edu}
OUT=${OUT:-out/base}
# One process for each GPU; without one, a single process on the CPU.
NPROC=${NPROC:-$("$BIN/python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

# The training tokens, half a percent more for validation, and some to spare, so that no window is read twice.
"$BIN/python" prepare_data.py --source=HuggingFaceFW/fineweb-edu --config=sample-10BT \
    --tokenizer=HuggingFaceTB/SmolLM2-135M --max_tokens=1_100_000_000 --out_dir="$DATA"

# A rank that fails is started again with all others, from the newest checkpoint, up to three times. A signal
# goes on to the ranks, Slurm's SIGUSR1 too; they have two minutes to finish their step and save. With exec it is
# torchrun that gets the signal, not this shell, which would keep it to itself.
exec "$BIN/torchrun" --standalone --nproc_per_node="$NPROC" --max_restarts=3 \
    --signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown_timeout=120 \
    pretrain_gpt.py --data_dir="$DATA" --out_dir="$OUT" \
    --num_hidden_layers=12 --hidden_size=512 --num_attention_heads=8 --context_length=1024 \
    --max_steps=2000 --batch_tokens=524_288 --micro_batch_size=32 "$@"
