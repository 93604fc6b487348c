# shellcheck shell=bash disable=SC2034 # the names are read by pretrain_full.sh
# Marin's speedrun of Qwen3 at "130M" with Muon: https://marin.community/speedrun, its configuration and result
# at https://github.com/marin-community/marin/tree/main/experiments/speedrun/muon_qwen3_scaling
#
#     The model: 6 layers × 512, 8 heads, SwiGLU 1792, Llama 3's vocabulary of 128,256, windows of 4,096
#         6 × (4 × 512² + 3 × 512 × 1792) = 22.8 M, two embeddings 131.3 M: 154.1 M parameters in all
#         (here three more tokens, ChatML's, and a multiple of 64: 65,536 more parameters)
#     The data: FineWeb-Edu, 4,959 steps × 524,288 tokens = 2.60 B
#     The compute: 6 × 88.5 M + 12 × 6 × 4,096 × 512 = 682 MFLOP a token, 1.77e18 in all;
#         at 40 % of an H100's 990 TFLOP/s in bf16 75 minutes on one, 10 on eight
#     Theirs: 1.166 bits/byte on Paloma's c4_en, after 23 minutes on 16 TPU v5p
#
# The initial weights are this project's, see init_weights in gpt.py; theirs have a deviation of 0.02. Validation
# reads c4_en's validation text in windows. The run was not made.
C4=data/c4-llama3
FINEWEB=data/fineweb-edu-llama3
BOTH=$FINEWEB:1,$C4:0 # C4 is validated, not trained on
DATA=${DATA:-$BOTH}
OUT=${OUT:-out/qwen3-130m}

prepared() { [ "$DATA" != "$BOTH" ] || { [ -f "$FINEWEB/manifest.json" ] && [ -f "$C4/manifest.json" ]; }; }

# Paloma's owner asks for a consent on its page at the hub, and for `hf auth login`. Flags, as --workers=16, are for
# both corpora; the ones below win.
prepare() {
    install
    set -- "$PYTHON" prepare_data.py "$@" --tokenizer=marin-community/marin-tokenizer
    run "$@" --source=HuggingFaceFW/fineweb-edu --config=sample-10BT --max_tokens=2_650_000_000 --out_dir="$FINEWEB"
    run "$@" --source=allenai/paloma --config=c4_en --split=val --max_tokens=0 --val_fraction=1 --out_dir="$C4"
}

RECIPE=(--num_hidden_layers=6 --hidden_size=512 --num_attention_heads=8 --intermediate_size=1792
    --context_length=4096 --max_steps=4959 --batch_tokens=524_288 --micro_batch_size=8 --eval_tokens=0
    --matrix_lr=0.016 --lr=0.0032 --beta1=0.8 --beta2=0.98 --weight_decay=0.1
    --warmup_steps=0 --decay_fraction=0.8)
