"""Fine-tuning beside TRL's SFTTrainer: speed and validation loss on the same conversations.

python bench.py --only=sft
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import sft_gpt
from attention import has_varlen
from bench import Config, model_of, optimizer_of, report, training_step
from common import InputError
from distributed import Ranks
from gpt import GPTModel
from optim import schedule
from packing import PackedLoader, pack
from sft import SFTDataset, first_question, prepare_conversations, render_batch, why_unusable
from sources import hash_fraction
from tokenization import train_tokenizer
from training import evaluate

WARMUP = 0.1  # of the steps of a fine-tuning run
VAL_FRACTION = 0.05  # of the conversations, held out


def fine_tune(model: GPTModel, train: PackedLoader, recipe: sft_gpt.Config, ranks: Ranks) -> None:
    """An epoch, as sft_gpt.py runs it."""
    steps = train.steps_per_epoch
    warmup, optimizer = math.ceil(WARMUP * steps), optimizer_of(model, recipe.optimizer, recipe, ranks)
    for step in range(steps):
        batches = list(train.micro_batches(train.step_rows(step), recipe.micro_batch_size, ranks))
        lr_scale = schedule(step, steps, warmup_steps=warmup, decay_steps=steps - warmup)
        training_step(model, optimizer, batches, lr_scale=lr_scale, ranks=ranks)


def trl_trainer(
    folder: Path, rows: list, steps: int, *, recipe: sft_gpt.Config, config: Config, bf16: bool, **changes
):
    """TRL's SFTTrainer for the model in a folder, an epoch of as many steps with the same recipe; padded to
    the longest conversation, because on a CPU it cannot keep packed ones apart."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise InputError(
            f"--only=sft compares with TRL, which is missing ({error}); pip install trl"
        ) from None
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    at_once = min(config.their_batch_size, max(1, round(len(rows) / steps)))
    options = {
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": max(1, round(len(rows) / steps / at_once)),
        "num_train_epochs": 1,
        "assistant_only_loss": True,
        "max_length": None,  # none is longer than a row of ours
        "learning_rate": recipe.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": math.ceil(WARMUP * steps),
        "optim": "adamw_torch_fused",
        "adam_beta1": recipe.beta1,
        "adam_beta2": recipe.beta2,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "gradient_checkpointing": False,
        "bf16": bf16,
        "use_cpu": config.device == "cpu" or not torch.cuda.is_available(),
        **changes,
    }
    quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=SFTConfig(output_dir=str(folder / "trl"), **options, **quiet),
        train_dataset=datasets.Dataset.from_list([{"messages": messages} for messages in rows]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )


def spaced_conversations(config: Config) -> tuple[list, np.ndarray, object]:
    """Conversations from all over the source, their lengths in tokens, and a tokenizer trained on them."""
    source = (messages for messages, _ in sft_gpt.conversations(sft_gpt.Config(data=config.data)))
    rows = [messages for messages in source if why_unusable(messages) is None]
    rows = rows[:: max(1, len(rows) // config.conversations)]
    tokenizer = train_tokenizer((m["content"] for messages in rows for m in messages), config.vocab_size)
    return rows, np.array([len(ids) for ids, _ in render_batch(rows, tokenizer)]), tokenizer


def packed_loaders(config: Config, folder: Path, varlen: bool) -> tuple[PackedLoader, PackedLoader]:
    """Those of sft_gpt.py, for training and for validation."""
    T = config.context_length
    return tuple(
        PackedLoader(
            SFTDataset(folder / split),
            row_length=T,
            rows_per_step=config.batch_tokens // T,
            seed=0,
            varlen=varlen,
        )
        for split in ("train", "val")
    )


PADDED = {  # what of TRL's settings differs from trl_trainer's
    "TRL, padded, as it comes": {"gradient_checkpointing": True},
    "TRL, padded": {},
    "TRL, padded, grouped by length": {"train_sampling_strategy": "group_by_length"},
}


def compare(config: Config, ranks: Ranks) -> None:
    """Fine-tuning for an epoch, against TRL's SFTTrainer: the same model, conversations and recipe."""
    if find_spec("trl") is None:
        raise InputError("--only=sft compares with TRL, which is not installed; pip install trl")
    T, (rows, lengths, tokenizer) = config.context_length, spaced_conversations(config)
    rows = [messages for messages, length in zip(rows, lengths) if length <= T]
    theirs = [messages for messages in rows if hash_fraction(first_question(messages)) >= VAL_FRACTION]
    recipe = sft_gpt.Config(micro_batch_size=config.micro_batch_size, warmup_fraction=WARMUP)
    seconds, losses = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = ((messages, "") for messages in rows)
        prepare_conversations(folder / "data", places, tokenizer, max_length=T, val_fraction=VAL_FRACTION)
        model = model_of(config, ranks.device)
        model.save_pretrained(folder, tokenizer)
        varlen = has_varlen(ranks.device, model.config.head_dim, ranks.dtype)
        train, val = packed_loaders(config, folder / "data", varlen)
        assert len(theirs) == len(train.dataset)

        def run(name: str, tune: Callable, trained) -> None:
            began = time.perf_counter()
            tune()
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            model.load_state_dict(trained.state_dict())
            batches = val.micro_batches(val.rows, recipe.micro_batch_size, ranks)
            nats, _, targets = evaluate(model, batches, ranks)
            losses[name] = nats / targets

        for _ in range(config.rounds):
            ours = GPTModel.from_pretrained(folder).to(ranks.device)
            run("sft_gpt.py, packed", lambda model=ours: fine_tune(model, train, recipe, ranks), ours)
            for name, changes in PADDED.items():
                bf16 = ranks.dtype == torch.bfloat16
                trainer = trl_trainer(
                    folder, theirs, train.steps_per_epoch, recipe=recipe, config=config, bf16=bf16, **changes
                )
                run(name, trainer.train, trainer.model)
    report_sft(config, train, lengths, seconds={k: statistics.median(v) for k, v in seconds.items()})
    for name, loss in losses.items():
        print(f"  {name:44} {loss:9.4f} nats/token of validation loss")


def report_sft(config: Config, train: PackedLoader, lengths: np.ndarray, *, seconds: dict) -> None:
    """What was tuned on, how full rows of other lengths would be, and the speeds."""
    targets = int(train.dataset.trained.sum())
    print(
        f"\n{config.data}: {len(train.dataset)} conversations of {train.dataset.lengths().mean():.0f} "
        f"tokens, {targets} supervised; packed into {len(train.rows)} rows of {train.T}, "
        f"{100 * train.fill():.1f}% filled, {train.steps_per_epoch} steps"
    )
    shortened = ((n, np.minimum(lengths, n)) for n in (512, 1024, 2048, 4096, 8192))
    fills = (f"{100 * cut.sum() / n / len(pack(cut, n)):.2f}% of {n}" for n, cut in shortened)
    print(f"filled in rows of other lengths, longer conversations truncated: {', '.join(fills)}")
    report("fine-tuning for an epoch", seconds, targets, "supervised tok/s")
