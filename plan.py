"""What a pretraining run will take, before any GPU is paid for: time, memory, messages, disk; what will fail.

    python plan.py --gpu=h100 --gpus=8 --num_hidden_layers=12 --hidden_size=512 --micro_batch_size=32
    python plan.py --gpu=h100 --gpus=1,8,64,512 --num_hidden_layers=24 --hidden_size=2048 --batch_tokens=2e6

All flags of pretrain_gpt.py are understood. It needs no GPU, but Linux and, without a GPU, a C++ compiler.
Memory and messages are measured on fake tensors, see rehearsal.py; a figure that is not says so. The exit
status is 1 if the run would fail. With several numbers of GPUs there is a table, a row for each.

T tokens in a window.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import fake_cuda
from common import InputError, check_choice, check_numbers, run_script

if __name__ == "__main__":
    try:
        fake_cuda.install()  # before torch is imported
    except InputError as error:
        raise SystemExit(f"error: {error}") from None

import torch
import torch.distributed as dist

import pretrain_gpt
from checkpoint import checkpoint_bytes, lacking_room, most_checkpoints
from distributed import Ranks
from gpt import GPTConfig
from metrics import GPUS, Gpu, flops_per_token
from rehearsal import Footprint, Rehearsal, pretend_ranks, pretend_streams
from sharding import SHARD
from tokenization import load_tokenizer, vocabulary_size
from training import check_settings

# Assumed. A process's CUDA context, NCCL's buffers and the allocator's gaps take the rest of a GPU's memory.
MEMORY_REACHED = 0.9
# Assumed, of what a link can send: NVIDIA's nccl-tests come near it with large messages.
LINK_REACHED = 0.8


@dataclass
class Config(pretrain_gpt.Config):
    gpus: str = "8"  # how many, or several numbers with commas between them
    gpu: str = "h100"  # h100, h200, a100, b200 or l4
    gpus_per_machine: int = 8  # that are linked to each other
    shard: str = "auto"  # none (DDP), hybrid, full, or auto for the first of these that fits
    vocab_size: int = 0  # ids of the tokenizer; 0 for that in data_dir or, where there is none, 49,152
    mfu: float = 0.4  # share of the GPU's peak while it computes; assumed, see metrics.jsonl of a short run
    json: bool = False  # print an object, or a list of them for several numbers of GPUs


def main(config: Config) -> None:
    with fake_cuda.fake_cuda():
        plans = [plan_of(config, gpus) for gpus in numbers_of(config.gpus)]
    if config.json:
        print(json.dumps(plans if len(plans) > 1 else plans[0], indent=2))
    elif len(plans) > 1:
        print_table(plans)
    else:
        print_plan(plans[0])
    if any(plan["problems"] for plan in plans):
        raise SystemExit(1)


def numbers_of(text: str) -> list[int]:
    """The numbers of GPUs that a user asked for."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise InputError(f"--gpus={text}: expected a number above zero, or several as 1,8,64")
    return numbers


def check(config: Config, gpus: int) -> None:
    """Raise InputError for what leaves nothing to plan."""
    settings = asdict(config)
    shapes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "context_length")
    check_settings(
        settings | {"shard": "none"}, positive=("max_steps", "batch_tokens", "gpus_per_machine", *shapes)
    )
    check_numbers({"mfu": config.mfu}, positive=["mfu"])
    if config.mfu > 1:
        raise InputError(f"--mfu={config.mfu}: expected a share, from 0 to 1")
    check_choice("gpu", config.gpu, GPUS)
    check_choice("shard", config.shard, ("auto", *SHARD))
    windows = config.batch_tokens // config.context_length
    if windows < gpus:
        raise InputError(
            f"--batch_tokens={config.batch_tokens} are {windows} windows of {config.context_length}, fewer "
            f"than the {gpus} GPUs; raise --batch_tokens, lower --context_length, or use fewer GPUs"
        )
    if config.shard == "hybrid" and gpus % min(gpus, config.gpus_per_machine):
        raise InputError(
            f"--shard=hybrid needs whole machines, and {gpus} GPUs are no multiple of "
            f"{config.gpus_per_machine}; change --gpus, or use --shard=full"
        )


def shape_of(config: Config) -> GPTConfig:
    """The model's shape, as pretrain_gpt.py makes it; the tokenizer is looked for on the disk only."""
    folder = Path(config.tokenizer or Path(config.data_dir) / "tokenizer")
    found = not config.vocab_size and folder.is_dir()
    size = vocabulary_size(load_tokenizer(folder)) if found else config.vocab_size or 49_152
    return pretrain_gpt.model_config(config, size)


# -- memory --------------------------------------------------------------------------------------------------


def rehearsal_of(config: Config, shape: GPTConfig, gpus: int, shard: str) -> Rehearsal:
    ranks = Ranks(0, gpus, torch.device("cuda", 0), shard=shard, even_batches=True)
    return Rehearsal(
        shape,
        ranks,
        optimizer=config.optimizer,
        compile=config.compile != "false",
        checkpoint_activations=config.checkpoint_activations,
    )


def engines(config: Config, gpus: int) -> list[str]:
    """What --shard may become, the simplest first."""
    if config.shard != "auto" or gpus == 1:
        return ["none" if gpus == 1 else config.shard]
    whole_machines = gpus > config.gpus_per_machine and gpus % config.gpus_per_machine == 0
    return ["none", "hybrid", "full"] if whole_machines else ["none", "full"]


def largest_fitting(measure: Callable[[int], Footprint], limit: float, *, first: int, most: int) -> int:
    """The most windows in a micro-batch, up to `most`, whose step takes no more than `limit` bytes; 0 if not
    even one does. Beyond 16 windows it may be up to a sixteenth too low.

    Only the activations grow with a micro-batch, nearly in proportion, so few sizes are measured.
    """
    low, high, B = 0, most + 1, first
    while high - low > max(1, low // 16):
        memory = measure(B).memory
        total, grows = sum(memory.values()), memory["activations"]
        low, high = (B, high) if total <= limit else (low, B)
        B = min(max(int(B * (limit - total + grows) / grows), low + 1), high - 1)
    return low


def choose(config: Config, shape: GPTConfig, gpus: int, B: int) -> tuple[str, Rehearsal, Footprint, int]:
    """The first engine in which at least one window fits, or the last: its name, its rehearsal, a step's
    footprint with micro-batches of B windows, and the largest that fits."""
    most = -(-(config.batch_tokens // config.context_length) // gpus)  # of a GPU in a step
    for shard in engines(config, gpus):
        rehearsal = rehearsal_of(config, shape, gpus, shard)
        # DDP's buckets hold the gradients all the time, as a step of two micro-batches does in the second.
        rehearsal.micro_batches = 2 if most > B or (gpus > 1 and shard == "none") else 1
        footprint = rehearsal.step(B)
        largest = largest_fitting(rehearsal.step, memory_limit(config), first=B, most=most)
        if largest:
            break
    return shard, rehearsal, footprint, largest


def memory_limit(config: Config) -> int:
    """Bytes that a step may take."""
    return int(MEMORY_REACHED * GPUS[config.gpu].memory * 2**30)


# -- messages ------------------------------------------------------------------------------------------------


def rate(operation: str, ranks: tuple, gpu: Gpu, per_machine: int) -> float:
    """Bytes a second that a GPU of a group can send.

    In a ring over machines the GPUs of one machine share its network ports, k of them. All-to-all has each
    GPU send nearly everything through its own.
    """
    k = sum(rank // per_machine == ranks[0] // per_machine for rank in ranks)
    if k == len(ranks):
        return LINK_REACHED * gpu.link
    return LINK_REACHED * min(gpu.link, gpu.network * (1 if operation.startswith("alltoall") else k))


def messages_of(passes: Counter, update: Counter, config: Config) -> list[dict]:
    """A row for each kind of message of a step: bytes that a GPU sends, and seconds that they take."""
    gpu, rows = GPUS[config.gpu], []
    for phase, sent in (("passes", passes), ("update", update)):
        for (operation, ranks), size in sent.items():
            seconds = size / rate(operation, ranks, gpu, config.gpus_per_machine)
            rows.append(
                {
                    "phase": phase,
                    "operation": operation,
                    "ranks": len(ranks),
                    "bytes": size,
                    "seconds": seconds,
                }
            )
    return rows


def exposed(messages: list[dict], compute: float, micro_batches: int) -> float:
    """Seconds of a step in which a GPU waits for messages: what does not fit behind its compute.

    A third of a micro-batch's compute is the forward pass. Weights are gathered in both passes, gradients are
    sent in the last backward pass, and nothing hides what the update sends.
    """
    gathered = sum(m["seconds"] for m in messages if m["operation"].startswith("allgather") and in_passes(m))
    reduced = sum(m["seconds"] for m in messages if in_passes(m)) - gathered
    each, gather = compute / micro_batches, gathered / micro_batches
    forward = max(0.0, gather / 2 - each / 3)
    backward = max(0.0, gather / 2 - 2 * each / 3)
    last = max(0.0, gather / 2 + reduced - 2 * each / 3)
    update = sum(m["seconds"] for m in messages if not in_passes(m))
    return micro_batches * forward + (micro_batches - 1) * backward + last + update


def in_passes(message: dict) -> bool:
    return message["phase"] == "passes"


# -- the plan ------------------------------------------------------------------------------------------------


def pretend(gpus: int, per_machine: int) -> None:
    """The group of so many GPUs."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if gpus > 1:
        pretend_ranks(gpus, per_machine)
        pretend_streams()


def plan_of(config: Config, gpus: int) -> dict:
    """All that is told about a run on so many GPUs."""
    check(config, gpus)
    shape, T = shape_of(config), config.context_length
    pretend(gpus, config.gpus_per_machine)
    windows = config.batch_tokens // T
    shares = Ranks(0, gpus, torch.device("cpu"), even_batches=True).share(
        range(windows), config.micro_batch_size
    )
    n, B = len(shares), len(shares[0])
    shard, rehearsal, footprint, largest = choose(config, shape, gpus, B)
    parameters = rehearsal.model.num_parameters()

    # Weights are gathered for each micro-batch; DDP sends the gradients once.
    times, passes = n / rehearsal.micro_batches, Counter()
    for key, size in footprint.passes.items():
        passes[key] = size * (times if key[0].startswith("allgather") else 1)
    if gpus > 1 and shard == "none":
        passes["allreduce", tuple(range(gpus))] = 2 * 4 * parameters * (gpus - 1) / gpus
    messages = messages_of(passes, footprint.update, config)

    per_token = flops_per_token(shape, T)
    compute = n * B * T * per_token / (GPUS[config.gpu].flops * config.mfu)
    waiting = exposed(messages, compute, n)
    tokens = config.max_steps * windows * T
    plan = {
        "gpu": config.gpu,
        "gpus": gpus,
        "shard": shard,
        "parameters": parameters,
        "steps": config.max_steps,
        "tokens_per_step": windows * T,
        "tokens": tokens,
        "flops": tokens * per_token,
        "mfu": config.mfu,
        "micro_batches": n,
        "micro_batch_size": B,
        "largest_micro_batch_size": largest,
        "seconds_per_step": compute + waiting,
        "waiting_seconds_per_step": waiting,
        "hours": config.max_steps * (compute + waiting) / 3600,
        "memory": footprint.memory | {"total": sum(footprint.memory.values()), "limit": memory_limit(config)},
        "messages": messages,
        "disk": disk_of(config, shape, rehearsal, tokens),
    }
    problems, notes = problems_of(plan, config), notes_of(plan, config)
    room = lacking_room(config.out_dir, plan["disk"]["checkpoint"], config.max_steps, **saving(config))
    if room and Path(config.out_dir).exists():
        problems.append(room)
    elif room:  # the run may be meant for another machine
        notes.append(f"on this machine {room}")
    return plan | {"problems": problems, "notes": notes}


def saving(config: Config) -> dict[str, int]:
    """The settings that tell how many checkpoints a run keeps."""
    return {name: getattr(config, name) for name in ("save_every", "keep_last", "keep_every")}


def disk_of(config: Config, shape: GPTConfig, rehearsal: Rehearsal, tokens: int) -> dict[str, int]:
    """Bytes of the training tokens, read once, of a checkpoint, and of all that are there at a time, the one
    being written included."""
    one = checkpoint_bytes(rehearsal.optimizer)
    most = most_checkpoints(config.max_steps, **saving(config))
    return {
        "data": tokens * (2 if shape.vocab_size <= 2**16 else 4),
        "checkpoint": one,
        "checkpoints": most * one,
    }


def problems_of(plan: dict, config: Config) -> list[str]:
    """What will fail, a sentence each."""
    total, limit = (plan["memory"][name] / 2**30 for name in ("total", "limit"))
    B, largest = plan["micro_batch_size"], plan["largest_micro_batch_size"]
    needs = (
        f"{B} windows at once need {total:.1f} GiB of the {limit:.1f} that --gpu={config.gpu} has for a step"
    )
    if largest >= B or total <= limit:
        return []
    if largest:
        return [f"{needs}; use --micro_batch_size={largest}"]
    remedies = [] if config.checkpoint_activations else ["--checkpoint_activations"]
    remedies += ["more GPUs with --shard=full"] if plan["gpus"] == 1 else []
    remedies += ["--shard=full"] if plan["gpus"] > 1 and plan["shard"] != "full" else []
    remedies += ["a GPU with more memory", "a shorter --context_length"]
    return [f"{needs}, and a single one does not fit either; use {' or '.join(remedies)}"]


def notes_of(plan: dict, config: Config) -> list[str]:
    """What works but may not be meant, a sentence each."""
    notes, T = [], config.context_length
    if plan["tokens_per_step"] != config.batch_tokens:
        notes.append(
            f"--batch_tokens={config.batch_tokens} is no multiple of --context_length={T}: a step has "
            f"{plan['tokens_per_step']:,} tokens"
        )
    computed = plan["gpus"] * plan["micro_batches"] * plan["micro_batch_size"]
    windows = plan["tokens_per_step"] // T
    if computed != windows:
        notes.append(
            f"{windows} windows are no multiple of {plan['gpus']} GPUs x {plan['micro_batches']} "
            f"micro-batches: {100 * (1 - windows / computed):.1f}% of the compute is padding"
        )
    waiting = plan["waiting_seconds_per_step"] / plan["seconds_per_step"]
    if waiting > 0.1:
        notes.append(f"GPUs wait for messages {100 * waiting:.0f}% of the time; raise --batch_tokens")
    if config.shard in ("full", "hybrid") and plan["gpus"] == 1:
        notes.append(f"--shard={config.shard} splits nothing on one GPU")
    return notes


# -- printing ------------------------------------------------------------------------------------------------


def print_plan(plan: dict) -> None:
    memory, disk = plan["memory"], plan["disk"]
    gib = {kind: f"{size / 2**30:.2f}" for kind, size in memory.items()}
    how = {"none": "DDP" if plan["gpus"] > 1 else "alone", "full": "FSDP2", "hybrid": "FSDP2, hybrid"}
    print(
        f"model      {plan['parameters']:,} parameters\n"
        f"run        {plan['steps']:,} steps of {plan['tokens_per_step']:,} tokens, {plan['tokens']:,} in "
        f"all, {plan['flops']:.2e} FLOPs\n"
        f"GPUs       {plan['gpus']} x {plan['gpu']}, {how[plan['shard']]} (--shard={plan['shard']}), "
        f"{plan['micro_batches']} micro-batches of {plan['micro_batch_size']} windows on each\n"
        f"time       {plan['hours']:.2f} hours, {plan['hours'] * plan['gpus']:.1f} GPU hours; "
        f"{plan['seconds_per_step']:.3f} s a step at {100 * plan['mfu']:.0f}% MFU (assumed)\n"
        f"memory     {gib['total']} of {gib['limit']} GiB: weights {gib['weights']}, gradients "
        f"{gib['gradients']}, optimizer {gib['optimizer']}, activations and the rest {gib['activations']} "
        f"(measured on fake tensors)\n"
        f"           the largest micro-batch that fits: {plan['largest_micro_batch_size']} windows"
    )
    for m in plan["messages"]:
        source = "computed" if plan["shard"] == "none" and in_passes(m) else "measured on fake tensors"
        print(
            f"messages   {m['bytes'] / 1e9:.3f} GB a step from each GPU, {m['operation']} among "
            f"{m['ranks']}, in the {m['phase']}: {1e3 * m['seconds']:.1f} ms ({source})"
        )
    print(
        f"           compute hides all but {1e3 * plan['waiting_seconds_per_step']:.1f} ms of them "
        f"(computed)\n"
        f"disk       data {disk['data'] / 1e9:.2f} GB, checkpoints {disk['checkpoints'] / 1e9:.2f} GB of "
        f"{disk['checkpoint'] / 1e9:.2f} each"
    )
    for kind in ("problems", "notes"):
        for sentence in plan[kind]:
            print(f"{'will fail' if kind == 'problems' else 'note':10} {sentence}")


def print_table(plans: list[dict]) -> None:
    """A row for each plan, and below them what will fail."""
    first = plans[0]
    print(
        f"{first['parameters']:,} parameters, {first['tokens']:,} tokens on {first['gpu']}s, "
        f"{100 * first['mfu']:.0f}% MFU assumed\n\n"
        f"| GPUs | shard | windows a micro-batch | largest | GiB a GPU | GB sent a step | waiting | hours |\n"
        f"|-----:|-------|----------------------:|--------:|----------:|---------------:|--------:|------:|"
    )
    for p in plans:
        sent = sum(m["bytes"] for m in p["messages"]) / 1e9
        waiting = f"{100 * p['waiting_seconds_per_step'] / p['seconds_per_step']:.1f}%"
        print(
            f"| {p['gpus']:4} | {p['shard']:5} | {p['micro_batch_size']:21} | "
            f"{p['largest_micro_batch_size']:7} | {p['memory']['total'] / 2**30:9.1f} | {sent:14.2f} | "
            f"{waiting:>7} | {p['hours']:5.1f} |"
        )
    for p in plans:
        for sentence in p["problems"]:
            print(f"{p['gpus']} x {p['gpu']} will fail: {sentence}")


if __name__ == "__main__":
    run_script(main, Config)
