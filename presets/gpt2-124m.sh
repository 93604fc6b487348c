# shellcheck shell=bash disable=SC2034 # the names are read by pretrain_full.sh
# The loss of 3.28 on FineWeb to which llm.c and modded-nanogpt train a GPT-2 of 124 M parameters:
# https://github.com/karpathy/llm.c/discussions/481, https://github.com/KellerJordan/modded-nanogpt
#
#     The model: 12 layers × 768, 12 heads, SwiGLU 2048, GPT-2's vocabulary of 50,257 and ChatML's two, tied
#         12 × (4 × 768² + 3 × 768 × 2048) = 84.9 M, one embedding 38.6 M: 123.5 M parameters in all
#     The data: FineWeb's first 10 B tokens in GPT-2's, 19,073 steps × 524,288 tokens
#     The validation: the first 10,485,760 tokens of its validation shard
#     The compute: 6 × 123.5 M + 12 × 12 × 1,024 × 768 = 854 MFLOP a token, 8.5e18 in all;
#         at 40 % of an H100's 990 TFLOP/s in bf16 6 hours on one, 45 minutes on eight
#     Theirs: 3.28 nats/token at the end of these tokens with AdamW, after 45 minutes on 8 H100s
#
# The rates are this project's usual ones. The run was not made.
DATA=${DATA:-data/fineweb10B-gpt2}
OUT=${OUT:-out/gpt2-124m}

prepared() { [ -e "$DATA" ]; }

prepare() { # GPT-2's tokenizer, and shards that others have made: 20 GB. A download that broke off goes on.
    install
    run "${PYTHON%python}hf" download gpt2 config.json tokenizer.json tokenizer_config.json vocab.json merges.txt
    if [ -e "$DATA" ]; then return; fi
    run "${PYTHON%python}hf" download kjj0/fineweb10B-gpt2 --repo-type=dataset --local-dir="$DATA.partial" "$@"
    run mv "$DATA.partial" "$DATA"
}

RECIPE=(--tokenizer=gpt2 --num_hidden_layers=12 --hidden_size=768 --num_attention_heads=12
    --tie_word_embeddings=true --context_length=1024 --max_steps=19_073 --batch_tokens=524_288
    --micro_batch_size=32 --eval_tokens=10_485_760)
