"""How fast the parts are, side by side with what a user would pick instead.

    python bench.py                       # all, on the GPU if there is one
    python bench.py --only=loss
    python bench.py --only=step --hidden_size=512 --num_attention_heads=8 --num_hidden_layers=12

Each comparison runs its candidates in turn, `rounds` times, and prints the median; a warm-up comes first.
"""

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain_gpt
import sft_gpt
from checkpoint import Checkpoints
from common import InputError, check_choice, run_script
from distributed import Ranks, join_ranks, wrap
from gpt import GPTConfig, GPTModel, has_varlen
from loss import summed_loss
from metrics import Metrics
from optim import Muon, make_optimizer, schedule, set_learning_rate
from sft import (
    PackedLoader,
    SFTDataset,
    first_question,
    pack,
    prepare_conversations,
    render_batch,
    why_unusable,
)
from sources import hash_fraction
from tokenization import train_tokenizer
from training import StepHistory, evaluate, forward_backward, targets_in


@dataclass
class Config:
    only: str = "all"  # loss, step, optimizer, generate, save, sft or all
    rounds: int = 7  # times that each candidate runs
    vocab_size: int = 4096  # ids of the tokenizer
    hidden_size: int = 256  # width of the residual stream
    num_hidden_layers: int = 4  # blocks
    num_attention_heads: int = 4  # query heads
    context_length: int = 256  # T, tokens in a window
    micro_batch_size: int = 16  # B, windows at once
    optimizer: str = "muon"  # of the step: muon or adamw
    lr: float = 3e-3  # AdamW's learning rate
    matrix_lr: float = 0.02  # Muon's learning rate
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    weight_decay: float = 0.1  # on matrices
    data: str = "embedded"  # of sft: conversations as in sft_gpt.py
    conversations: int = 3000  # of sft: about so many of them, evenly spaced, are an epoch
    batch_tokens: int = 4096  # of sft: tokens in an optimizer step
    their_batch_size: int = 8  # of sft: conversations that TRL gives to its model at once
    device: str = "auto"  # auto, cpu, cuda


class LargestTensor(TorchDispatchMode):
    """Remembers the size in bytes of the largest storage that any operation gave."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def medians(candidates: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each candidate, run in turn."""
    seconds = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, results: dict[str, float], amount: float, unit: str) -> None:
    print(f"\n{title}")
    first = next(iter(results.values()))
    for name, seconds in results.items():
        speed = f"{amount / seconds:12,.0f} {unit}"
        print(f"  {name:44} {1000 * seconds:9.1f} ms {speed}  {seconds / first:5.2f} x the time")


def model_of(config: Config, device: torch.device) -> GPTModel:
    torch.manual_seed(0)
    shape = GPTConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.context_length,
    )
    return GPTModel(shape).to(device)


def optimizer_of(model: torch.nn.Module, kind: str, config, ranks: Ranks) -> Muon:
    """An optimizer with the rates of a Config, this one or a training script's."""
    return make_optimizer(
        model,
        kind,
        ranks=ranks,
        lr=config.lr,
        matrix_lr=config.matrix_lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def training_step(module, optimizer, batches: list[dict], *, lr_scale: float, ranks: Ranks) -> None:
    """A step as the scripts' loops make it."""
    targets = int(sum(targets_in(batch) for batch in batches))
    history = StepHistory(0.0, ranks)
    loss_sum, grad_norm = forward_backward(module, batches, targets=targets, max_grad_norm=1.0, ranks=ranks)
    lr = set_learning_rate(optimizer, lr_scale)
    bad = history.record(
        1, loss_sum=loss_sum, grad_norm=grad_norm, targets=targets, tokens=targets, lr=lr, stop=False
    )
    optimizer.step(skip=bad)
    optimizer.zero_grad(set_to_none=True)
    history.outcomes(1)


def bench_loss(config: Config, ranks: Ranks) -> None:
    """The head and its loss, forward and backward, over the (N, V) logits."""
    N, C, V = config.micro_batch_size * config.context_length, config.hidden_size, config.vocab_size
    x = torch.randn(N, C, device=ranks.device, requires_grad=True)
    w = torch.randn(V, C, device=ranks.device, requires_grad=True)
    y = torch.randint(V, (N,), device=ranks.device)
    half = y.masked_fill(torch.arange(N, device=ranks.device) % 2 == 0, -100)
    options = torch.nn.LinearCrossEntropyOptions()
    losses = {
        "summed_loss (ours)": lambda: summed_loss(x, w, y),
        "F.linear_cross_entropy, chunked": lambda: F.linear_cross_entropy(
            x, w, y, reduction="sum", options=options
        ),
        "F.cross_entropy on whole logits": lambda: F.cross_entropy(
            F.linear(x, w).float(), y, reduction="sum"
        ),
        "summed_loss (ours), half masked": lambda: summed_loss(x, w, half),
        "F.linear_cross_entropy, half masked": lambda: F.linear_cross_entropy(
            x, w, half, reduction="sum", options=options
        ),
    }
    report(
        f"loss, N={N} C={C} V={V}",
        medians({k: lambda f=f: f().backward() for k, f in losses.items()}, config.rounds, ranks.device),
        N,
        "tok/s",
    )
    for name, loss in losses.items():
        with LargestTensor() as largest:
            loss().backward()
        print(f"  {name:44} {largest.bytes / 2**20:9.1f} MiB in its largest tensor")


def bench_step(config: Config, ranks: Ranks) -> None:
    """A training step, against Hugging Face's Qwen3 of the same shape with the same optimizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ours = model_of(config, ranks.device)
    fields = ours.config.to_hf()
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).to(ranks.device)
    B, T = config.micro_batch_size, config.context_length
    ids = torch.randint(config.vocab_size, (B, T + 1), device=ranks.device)
    optimizers = [optimizer_of(model, config.optimizer, config, ranks) for model in (ours, theirs)]

    def their_step():
        with ranks.autocast():
            loss = theirs(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizers[1].step()
        optimizers[1].zero_grad()

    def our_step(module, optimizer):
        batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
        training_step(module, optimizer, [batch], lr_scale=1.0, ranks=ranks)

    set_learning_rate(optimizers[1], 1.0)
    compiled = copy.deepcopy(ours)
    compiled.compile_blocks()
    optimizers.append(optimizer_of(compiled, config.optimizer, config, ranks))
    candidates = {
        "GPTModel": lambda: our_step(ours, optimizers[0]),
        "GPTModel, compiled": lambda: our_step(compiled, optimizers[2]),
        f"transformers {fields['architectures'][0]}": their_step,
    }
    title = f"step of {ours.num_parameters():,} parameters, B={B} T={T}, {config.optimizer}"
    report(title, medians(candidates, config.rounds, ranks.device), B * T, "tok/s")


def bench_optimizer(config: Config, ranks: Ranks) -> None:
    """An update of all parameters."""
    candidates = {}
    for kind in ("adamw", "muon"):
        model = model_of(config, ranks.device)
        optimizer = optimizer_of(model, kind, config, ranks)
        set_learning_rate(optimizer, 1.0)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        candidates[kind] = optimizer.step
    report(
        "optimizer update",
        medians(candidates, config.rounds, ranks.device),
        model.num_parameters(),
        "parameters/s",
    )


def bench_generate(config: Config, ranks: Ranks) -> None:
    """Greedy generation of half a context, alone and in a batch, against transformers' generate."""
    from transformers import AutoModelForCausalLM

    ours = model_of(config, ranks.device)
    ours.graph_decoding = True
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder).to(ranks.device)
    n = config.context_length // 2
    for batch in (1, 16):
        prompts = torch.ones(batch, 8, dtype=torch.long, device=ranks.device)
        options = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        candidates = {
            "GPTModel.generate": lambda p=prompts: list(ours.generate(p.tolist(), n)),
            "transformers generate": lambda p=prompts, o=options: theirs.generate(p, attention_mask=p, **o),
        }
        report(
            f"generation, {batch} prompts",
            medians(candidates, config.rounds, ranks.device),
            n * batch,
            "tok/s",
        )


def bench_save(config: Config, ranks: Ranks) -> None:
    """What a checkpoint costs a training run, the slower steps while it is written included; with AdamW,
    whose state is the largest."""
    B, T = config.micro_batch_size, config.context_length
    model = model_of(config, ranks.device)
    optimizer = optimizer_of(model, "adamw", config, ranks)
    ids = torch.randint(config.vocab_size, (B, T + 1), device=ranks.device)
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
    with tempfile.TemporaryDirectory() as folder:
        metrics = Metrics(folder, start=0, max_steps=0, step_tokens=B * T, log_every=1, ranks=ranks)
        checkpoints = Checkpoints(
            folder, ranks, tokenizer=None, identity={}, settings={}, origin="", keep_last=1, keep_every=0
        )

        def save() -> None:
            checkpoints.save(0, model, optimizer, history=StepHistory(0.0, ranks), metrics=metrics)

        def steps(n: int) -> None:
            for _ in range(n):
                training_step(module, optimizer, [batch], lr_scale=0.01, ranks=ranks)

        def save_and_steps(n: int) -> None:
            began = time.perf_counter()
            save()
            stalls.append(time.perf_counter() - began)
            steps(n)
            assert checkpoints.writing.done(), "a checkpoint takes longer to write than these steps"

        module, stalls = wrap(model, ranks, "auto"), []
        step = medians({"step": lambda: steps(1)}, config.rounds, ranks.device)["step"]
        began = time.perf_counter()
        save()
        checkpoints.wait()
        n = math.ceil(3 * (time.perf_counter() - began) / step)
        alone, saving = f"{n} steps", f"{n} steps, a checkpoint written meanwhile"
        candidates = {alone: lambda: steps(n), saving: lambda: save_and_steps(n)}
        stalls.clear()
        seconds = medians(candidates, config.rounds, ranks.device)
    report(f"saving {model.num_parameters():,} parameters, B={B} T={T}", seconds, n * B * T, "tok/s")
    cost, speed = seconds[saving] - seconds[alone], n * B * T / seconds[alone]
    print(f"  save() returns after {1000 * statistics.median(stalls):.0f} ms; in all it costs {cost:.2f} s")
    for script, defaults in (("pretrain_gpt.py", pretrain_gpt.Config()), ("sft_gpt.py", sft_gpt.Config())):
        between = defaults.save_every * defaults.batch_tokens / speed
        print(
            f"  {100 * cost / between:.4f}% of the {between:,.0f} s that {defaults.save_every} steps of "
            f"{defaults.batch_tokens:,} tokens take at this speed, the defaults of {script}"
        )


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


def trl_trainer(folder: Path, rows: list, steps: int, *, recipe: sft_gpt.Config, config: Config, **changes):
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
        "bf16": config.device != "cpu" and torch.cuda.is_available(),
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


def bench_sft(config: Config, ranks: Ranks) -> None:
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
        train, val = packed_loaders(config, folder / "data", has_varlen(ranks.device, model.config.head_dim))
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
                trainer = trl_trainer(
                    folder, theirs, train.steps_per_epoch, recipe=recipe, config=config, **changes
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


BENCHMARKS = {
    "loss": bench_loss,
    "step": bench_step,
    "optimizer": bench_optimizer,
    "generate": bench_generate,
    "save": bench_save,
    "sft": bench_sft,
}


def main(config: Config) -> None:
    check_choice("only", config.only, ("all", *BENCHMARKS))
    ranks = join_ranks(config.device)
    threads = f", {torch.get_num_threads()} threads" if ranks.device.type == "cpu" else ""
    print(f"torch {torch.__version__}, {ranks.device}{threads}, medians of {config.rounds}")
    for name, benchmark in BENCHMARKS.items():
        if config.only in ("all", name):
            benchmark(config, ranks)


if __name__ == "__main__":
    run_script(main, Config)
