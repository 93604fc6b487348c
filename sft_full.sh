#!/usr/bin/env bash
# Fine-tune the model of pretrain_full.sh on smol-smoltalk with every GPU of this node.
#
#     bash sft_full.sh                            # any field of sft_gpt.py's Config as a flag, too
#     MODEL=HuggingFaceTB/SmolLM2-135M bash sft_full.sh --max_length=2048
#
# The data: 460,000 conversations, cut to the context of 1,024 tokens, packed into rows of 1,024
# A step: 64 rows × 1,024 tokens = 65,536 tokens; on 8 GPUs 8 rows each, in one micro-batch
# The recipe: 2 epochs at a learning rate of 1e-3, as SmolLM2 used for models of up to 360 M parameters
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash quickstart.sh setup
BIN=${VENV:-.venv}/bin
MODEL=${MODEL:-out/base}
OUT=${OUT:-out/chat}
NPROC=${NPROC:-$("$BIN/python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

# A rank that fails is started again with all others, from the newest checkpoint, up to three times. A signal
# goes on to the ranks, Slurm's SIGUSR1 too; they have two minutes to finish their step and save. With exec it is
# torchrun that gets the signal, not this shell, which would keep it to itself.
exec "$BIN/torchrun" --standalone --nproc_per_node="$NPROC" --max_restarts=3 \
    --signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown_timeout=120 \
    sft_gpt.py --model="$MODEL" \
    --data=HuggingFaceTB/smol-smoltalk --out_dir="$OUT" --epochs=2 --lr=1e-3 \
    --batch_tokens=65_536 --micro_batch_size=8 "$@"
