"""Pretrain a language model on the token shards of prepare_data.py.

    python pretrain_gpt.py --data_dir=data/embedded --out_dir=out/base
    torchrun --standalone --nproc_per_node=8 pretrain_gpt.py --data_dir=data/fineweb-edu --out_dir=out/base

Every field of Config is a flag. The same command, started again, continues from the newest checkpoint.

B windows in a micro-batch, T tokens in a window.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import training
from data import TokenLoader, batch_order, open_data, tokenizer_fingerprint
from gpt import GPTConfig, GPTModel, InputError
from optim import load_state_by_name, make_optimizer, schedule


@dataclass
class Config:
    # data
    data_dir: str = "data/fineweb-edu"  # folder with token shards
    tokenizer: str = ""  # hub id or directory; empty for the one in data_dir
    out_dir: str = "out/base"  # folder for checkpoints, metrics.jsonl and loss.png
    # model
    num_hidden_layers: int = 12  # blocks
    hidden_size: int = 512  # width of the residual stream
    num_attention_heads: int = 8  # query heads
    num_key_value_heads: int = 0  # key and value heads; 0 for as many as query heads
    intermediate_size: int = 0  # width of the SwiGLU; 0 for 8/3 of hidden_size
    context_length: int = 1024  # tokens in a window
    rope_theta: float = 10000.0  # base of the rotary frequencies
    qk_norm: bool = True  # normalize queries and keys, as in Qwen3; without it the model is a Llama
    tie_word_embeddings: bool = False  # one matrix for input and output embedding
    # optimization
    max_steps: int = 2000  # optimizer steps
    batch_tokens: int = 524_288  # tokens in an optimizer step, over all ranks and micro-batches
    micro_batch_size: int = 16  # windows that go through the model at once, on each rank
    optimizer: str = "muon"  # muon (for the blocks' matrices, AdamW for the rest) or adamw
    lr: float = 3e-3  # AdamW's peak learning rate
    matrix_lr: float = 0.02  # Muon's peak learning rate
    warmup_steps: int = 100  # of linear rise to the peak
    decay_fraction: float = 0.4  # share of the steps, at the end, in which the rate falls linearly to zero
    weight_decay: float = 0.1  # on matrices, per unit of learning rate
    beta1: float = 0.9  # AdamW's averaging of gradients
    beta2: float = 0.95  # AdamW's averaging of squared gradients
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 for no limit
    spike_sigma: float = 6.0  # a loss or norm so many deviations above the last 128 is skipped; 0 for none
    max_bad_steps: int = 10  # steps skipped in a row that stop the run
    seed: int = 0  # of the initial weights and the data order
    # reporting
    log_every: int = 10  # steps between two lines
    eval_every: int = 250  # steps between two validations
    eval_tokens: int = 2_000_000  # tokens of the validation split that are read each time; 0 for all
    samples: bool = True  # continue a few prompts after each validation
    save_every: int = 500  # steps between two checkpoints
    keep_last: int = 3  # checkpoints that are kept; 0 for all
    keep_every: int = 0  # steps between two that are kept for good; 0 for none
    wandb: str = "auto"  # auto (if a key is set up), online, offline or off
    # machine
    resume: str = "auto"  # auto (newest checkpoint in out_dir), none, or a checkpoint's path
    force: bool = False  # go on although settings that change the result are others than before
    timeout_minutes: float = 30.0  # a rank without progress for so long ends the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    compile: str = "auto"  # torch.compile: true, false, or auto for only on CUDA


PROMPTS = ("The history of", "The most important", "Water is")  # of the samples


def model_config(config: Config, vocab_size: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=-(-vocab_size // 64) * 64,
        hidden_size=config.hidden_size,
        rope_theta=config.rope_theta,
        intermediate_size=config.intermediate_size or None,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads or None,
        max_position_embeddings=config.context_length,
        qk_norm=config.qk_norm,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def micro_batches(loader: TokenLoader, windows, config: Config, shape: GPTConfig, ranks: training.Ranks):
    """This rank's share of some windows, as the keyword arguments of the model's forward: (B, T) each."""
    own = windows[ranks.rank :: ranks.world]
    for i in range(0, len(own), config.micro_batch_size):
        ids, targets = loader.batch(own[i : i + config.micro_batch_size], shape.vocab_size)
        yield {"input_ids": ids.to(ranks.device), "targets": targets.to(ranks.device)}


def sample_text(model: GPTModel, tokenizer, seed: int) -> list[str]:
    """A few lines of text that the model continues, one for each prompt."""
    prompts = [
        [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids] for text in PROMPTS
    ]
    steps = model.generate(
        prompts, max_new_tokens=32, temperature=0.8, top_k=50, seed=seed, stop_ids=[tokenizer.eos_token_id]
    )
    rows = [prompt[1:] + [i for i in row if i is not None] for prompt, row in zip(prompts, zip(*steps))]
    return [" ".join(tokenizer.decode(row, skip_special_tokens=True).split()) for row in rows]


def main(config: Config) -> None:
    # Set-up: ranks, data, tokenizer
    training.check_numbers(
        config,
        "context_length",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "max_steps",
        "batch_tokens",
    )
    ranks = training.set_up(config.device)
    batch = config.batch_tokens // config.context_length  # windows in a step
    if batch < ranks.world:
        raise InputError(
            f"batch_tokens {config.batch_tokens} are {batch} windows of {config.context_length}, fewer "
            f"than the {ranks.world} ranks; raise --batch_tokens or lower --context_length"
        )
    with ranks.main_first():
        manifest, tokenizer = open_data(config.data_dir, config.tokenizer)
    train = TokenLoader(config.data_dir, "train", config.context_length)
    val = TokenLoader(config.data_dir, "val", config.context_length)
    eval_windows = max(1, config.eval_tokens // config.context_length) if config.eval_tokens else len(val)
    val_windows = range(min(len(val), eval_windows))

    # Model and optimizer, or those of an interrupted run
    shape = model_config(config, len(tokenizer))
    identity = {
        "fixed": {
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "optimizer": config.optimizer,
            **asdict(shape),
        },
        "content": {"data": training.fingerprint(manifest["shards"]), "windows": len(train)},
    }
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    state = training.resume(config, identity, ranks)
    torch.manual_seed(config.seed)
    model = (GPTModel.from_pretrained(state["path"]) if state else GPTModel(shape)).to(ranks.device)
    optimizer = make_optimizer(model, config)
    if state:
        load_state_by_name(model, optimizer, state["optimizer"])
    module = training.wrap(model, ranks, config.compile)
    start = state["step"] if state else 0
    ranks.print(
        f"{model.num_parameters():,} parameters; {len(train):,} windows of {config.context_length} tokens; "
        f"{config.max_steps} steps of {batch * config.context_length:,} tokens, "
        f"{config.max_steps * batch / len(train):.2f} epochs; {ranks.world} x {ranks.device}"
    )
    metrics = training.Metrics(config, start, config.max_steps, batch * config.context_length, ranks, state)
    val_bytes = val.text_bytes(val_windows, tokenizer)
    origin = f"Pretrained on {manifest.get('source', config.data_dir)}."
    decay_steps = round(config.decay_fraction * config.max_steps)
    history = training.StepHistory(config, state)
    saves = training.Checkpoints(
        config, model, tokenizer, optimizer, history, identity, origin, metrics, ranks
    )

    signals = training.StopSignals(ranks)
    ranks.watch(config.timeout_minutes)
    for step in range(start, config.max_steps + 1):  # so many optimizer steps are done
        last = step == config.max_steps
        if (step % config.eval_every == 0 or last) and not metrics.has(step, "val_loss"):
            batches = micro_batches(val, val_windows, config, shape, ranks)
            nats, _, targets = training.evaluate(module, batches, ranks)
            metrics.validated(step, val_loss=nats / targets, val_bpb=nats / math.log(2) / val_bytes)
            if config.samples and ranks.main:
                metrics.say("\n".join(f"  | {text}" for text in sample_text(model, tokenizer, config.seed)))
        if last:
            break
        ranks.at(f"step {step + 1}")
        began = time.monotonic()
        share = schedule(step, config.max_steps, config.warmup_steps, decay_steps)
        windows = batch_order(config.seed, step, batch, len(train))
        batches = list(micro_batches(train, windows, config, shape, ranks))
        result = training.train_step(module, optimizer, batches, share, config.max_grad_norm, history, ranks)
        step += 1
        metrics.step(step, result, time.monotonic() - began)
        saves.after(step, signals.on_any_rank())
    saves.wait()
    signals.close()
    metrics.close()


if __name__ == "__main__":
    training.run_script(main, Config)
