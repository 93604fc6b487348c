"""What a run will take, before any GPU is paid for: time, memory, messages, disk; what will fail.

    python plan.py --gpu=h100 --gpus=8 --num_hidden_layers=12 --hidden_size=512 --micro_batch_size=32
    python plan.py --gpu=h100 --gpus=1,8,64,512 --num_hidden_layers=24 --hidden_size=2048 --batch_tokens=2e6
    python plan.py sft_gpt.py --model=out/base --gpus=8 --max_length=2048 --data_tokens=4e8
    python plan.py dpo_gpt.py --model=out/chat --gpus=8 --pairs=61_000

A script's name may come first; without one it is pretrain_gpt.py. All its flags are understood. It needs no
GPU, but Linux and, without a GPU, a C++ compiler. Memory and messages are measured on fake tensors, see
rehearsal.py; a figure that is not says so. The exit status is 1 if the run would fail. With several numbers
of GPUs there is a table, a row for each.

T tokens in a window, in a row or in each of a pair's two answers.
"""

import copy
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fake_cuda
from common import InputError, check_choice, check_numbers, run_script

if __name__ == "__main__":
    try:
        fake_cuda.install()  # before torch is imported
    except InputError as error:
        raise SystemExit(f"error: {error}") from None

import torch

import dpo_gpt
import pretrain_gpt
import sft_gpt
from checkpoint import checkpoint_bytes, most_checkpoints
from checks import Run, check_data, find_run, room_problem, saving, take_script
from distributed import Ranks
from gpt import padded
from metrics import flops_per_token
from order import mean_length, parse_sources
from precision import GPUS, Gpu
from rehearsal import Footprint, Rehearsal, pretend_ranks
from sharding import SHARD

# Assumed. A process's CUDA context, NCCL's buffers and the allocator's gaps take the rest of a GPU's memory.
MEMORY_REACHED = 0.9
# Assumed, of what a link can send: NVIDIA's nccl-tests come near it with large messages.
LINK_REACHED = 0.8


@dataclass
class Machines:
    gpus: str = "8"  # how many, or several numbers with commas between them
    gpu: str = "h100"  # h100, h200, a100, b200 or l4
    gpus_per_machine: int = 8  # that are linked to each other
    shard: str = "auto"  # none (DDP), hybrid, full, or auto for the first of these that fits
    mfu: float = 0.4  # share of the GPU's peak while it computes; assumed, see metrics.jsonl of a short run
    json: bool = False  # print an object, or a list of them for several numbers of GPUs


@dataclass
class Pretraining(Machines, pretrain_gpt.Config):
    vocab_size: int = 0  # ids of the tokenizer; 0 for those of data_dir or, if it is not here, 49,152


@dataclass
class FineTuning(Machines, sft_gpt.Config):
    data_tokens: int = 0  # of the rendered examples, as a run prints; they and the epochs make the steps


@dataclass
class Preferences(Machines, dpo_gpt.Config):
    pairs: int = 0  # in the data; with the epochs they make the steps


CONFIGS = {pretrain_gpt: Pretraining, sft_gpt: FineTuning, dpo_gpt: Preferences}


def main(config: Machines) -> None:
    plans, refused, numbers = [], {}, numbers_of(config.gpus)
    with fake_cuda.fake_cuda():
        for gpus in numbers:
            try:
                plans.append(plan_of(config, gpus))
            except InputError as error:
                refused[gpus] = error
    if not plans:
        raise next(iter(refused.values()))
    if config.json:
        print(json.dumps(plans if len(numbers) > 1 else plans[0], indent=2))
    elif len(numbers) > 1:
        print_table(plans)
    else:
        print_plan(plans[0])
    for gpus, error in refused.items():
        print(f"{gpus} x {config.gpu} will fail: {error}", file=sys.stderr)
    if refused or any(plan["problems"] for plan in plans):
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


def planned_run(config: Machines, gpus: int) -> Run:
    """The run on so many GPUs; InputError for what leaves nothing to plan."""
    check_numbers(
        {"mfu": config.mfu, "gpus_per_machine": config.gpus_per_machine}, ["mfu", "gpus_per_machine"]
    )
    if config.mfu > 1:
        raise InputError(f"--mfu={config.mfu}: expected a share, from 0 to 1")
    check_choice("gpu", config.gpu, GPUS)
    if config.dtype == "float32":
        raise InputError(
            "--dtype=float32: only bf16 speeds of GPUs are known here; leave it out to plan bf16"
        )
    check_choice("shard", config.shard, ("auto", *SHARD))
    if config.shard == "hybrid" and gpus % min(gpus, config.gpus_per_machine):
        raise InputError(
            f"--shard=hybrid needs whole machines, and {gpus} GPUs are no multiple of "
            f"{config.gpus_per_machine}; change --gpus, or use --shard=full"
        )
    unsplit = copy.copy(config)  # and not a new one, to which all flags were given
    unsplit.shard = "none"
    run = find_run(unsplit, gpus)
    if run is None:
        name = config.init_from if isinstance(config, Pretraining) else config.model
        raise InputError(
            f"there is no folder {name}; name a run or a model directory, or if it is a hub id bring its "
            f"shape by `hf download {name} config.json`"
        )
    if isinstance(config, Pretraining):
        run.shape.vocab_size = padded(config.vocab_size) or run.shape.vocab_size
    elif not run.max_steps:
        run.max_steps, run.step = steps_of_epochs(config, run)
    return run


def steps_of_epochs(config: FineTuning | Preferences, run: Run) -> tuple[int, int]:
    """A tuning run's steps, and rows or pairs in each, by the script's own arithmetic."""
    flag, size = ("pairs", 1) if run.unit == "pairs" else ("data_tokens", run.T)
    items = -(-getattr(config, flag) // size)
    if items < 1:
        raise InputError(
            f"how many steps --epochs={config.epochs:g} makes depends on the data; give --{flag} or "
            f"--max_steps"
        )
    if run.unit == "pairs":
        step = min(run.step, items)
        return math.ceil(config.epochs * items / step), step
    steps = -(-items // run.step)
    return math.ceil(config.epochs * steps), -(-items // steps)


# -- memory --------------------------------------------------------------------------------------------------


def rehearsal_of(config: Machines, run: Run, gpus: int, shard: str) -> Rehearsal:
    return Rehearsal(
        run.shape,
        Ranks(0, gpus, torch.device("cuda", 0), shard=shard, even_batches=True),
        T=run.T,
        unit=run.unit,
        optimizer=config.optimizer,
        compile=config.compile != "false",
        checkpoint_activations=config.checkpoint_activations,
        noisy=isinstance(config, FineTuning) and config.neftune_alpha > 0,
    )


def engines(config: Machines, gpus: int) -> list[str]:
    """The values of --shard to try, the simplest first."""
    if config.shard != "auto" or gpus == 1:
        return ["none" if gpus == 1 else config.shard]
    whole_machines = gpus > config.gpus_per_machine and gpus % config.gpus_per_machine == 0
    return ["none", "hybrid", "full"] if whole_machines else ["none", "full"]


def largest_fitting(measure: Callable[[int], Footprint], limit: float, *, first: int, most: int) -> int:
    """The most windows, rows or pairs in a micro-batch, up to `most`, whose step takes no more than `limit`
    bytes; 0 if not even one does. Beyond 16 it may be up to a sixteenth too low.

    Only the activations grow with a micro-batch, nearly in proportion, so few sizes are measured.
    """
    low, high, B = 0, most + 1, first
    while high - low > max(1, low // 16):
        memory = measure(B).memory
        total, grows = sum(memory.values()), memory["activations"]
        low, high = (B, high) if total <= limit else (low, B)
        B = min(max(int(B * (limit - total + grows) / grows), low + 1), high - 1)
    return low


def choose(config: Machines, run: Run, gpus: int, B: int) -> tuple[str, Rehearsal, Footprint, int]:
    """The first value of --shard with which a micro-batch of one fits, else the last: this value, its
    rehearsal, a step's footprint with micro-batches of B, and the largest micro-batch that fits."""
    most = -(-run.step // gpus)  # of a GPU in a step
    for shard in engines(config, gpus):
        rehearsal = rehearsal_of(config, run, gpus, shard)
        # DDP's buckets hold the gradients all the time, as a step of two micro-batches does in the second.
        rehearsal.micro_batches = 2 if most > B or (gpus > 1 and shard == "none") else 1
        footprint = rehearsal.step(B)
        largest = largest_fitting(rehearsal.step, memory_limit(config), first=B, most=most)
        if largest:
            break
    return shard, rehearsal, footprint, largest


def memory_limit(config: Machines) -> int:
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


def messages_of(passes: Counter, update: Counter, config: Machines) -> list[dict]:
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


def messages_of_step(footprint: Footprint, rehearsal: Rehearsal, config: Machines, n: int) -> list[dict]:
    """The messages of a step of n micro-batches, from those of the rehearsed one. Weights are gathered and
    gradients split for each micro-batch; whole gradients are added up over the ranks once."""
    ranks, passes = rehearsal.ranks, Counter()
    for key, size in footprint.passes.items():
        passes[key] = size * (1 if key[0].startswith("allreduce") else n / rehearsal.micro_batches)
    if ranks.world > 1 and not ranks.sharded:
        share = (ranks.world - 1) / ranks.world
        passes["allreduce", tuple(range(ranks.world))] = 2 * 4 * rehearsal.model.num_parameters() * share
    return messages_of(passes, footprint.update, config)


def exposed(messages: list[dict], compute: float, micro_batches: int) -> float:
    """Seconds of a step in which a GPU waits for messages: what does not fit behind its compute.

    A third of a micro-batch's compute is the forward pass. Weights are gathered in both passes, gradients are
    split in each backward pass and added up in the last, and nothing hides what the update sends.
    """

    def seconds(operation: str) -> float:
        return sum(m["seconds"] for m in messages if m["operation"].startswith(operation) and in_passes(m))

    each = compute / micro_batches
    gather, split = seconds("allgather") / micro_batches, seconds("reduce_scatter") / micro_batches
    forward = max(0.0, gather / 2 - each / 3)
    backward = max(0.0, gather / 2 + split - 2 * each / 3)
    last = max(0.0, gather / 2 + split + seconds("allreduce") - 2 * each / 3)
    update = sum(m["seconds"] for m in messages if not in_passes(m))
    return micro_batches * forward + (micro_batches - 1) * backward + last + update


def in_passes(message: dict) -> bool:
    return message["phase"] == "passes"


# -- the plan ------------------------------------------------------------------------------------------------


def plan_of(config: Machines, gpus: int) -> dict:
    """All that is told about a run on so many GPUs."""
    run = planned_run(config, gpus)
    pretend_ranks(gpus, config.gpus_per_machine)
    shares = Ranks(0, gpus, torch.device("cpu"), even_batches=True).share(
        range(run.step), config.micro_batch_size
    )
    n, B = len(shares), len(shares[0])
    shard, rehearsal, footprint, largest = choose(config, run, gpus, B)
    messages = messages_of_step(footprint, rehearsal, config, n)
    width = 2 * run.T if run.unit == "pairs" else run.T  # tokens in a window, row or pair
    fraction = config.length_warmup_fraction if isinstance(config, Pretraining) else 0.0
    per_token = flops_per_token(run.shape, mean_length(run.T, fraction))
    speed = GPUS[config.gpu].flops * config.mfu
    compute = n * B * width * per_token / speed
    waiting = exposed(messages, compute, n)
    # A forward pass, a third of a step's compute, over all pairs gives the reference's log-probabilities.
    compared = config.pairs if isinstance(config, Preferences) else 0
    reference = compared * width * per_token / 3
    tokens = run.max_steps * run.step * width
    plan = {
        "gpu": config.gpu,
        "gpus": gpus,
        "shard": shard,
        "parameters": rehearsal.model.num_parameters(),
        "unit": run.unit,
        "steps": run.max_steps,
        "tokens_per_step": run.step * width,
        "tokens": tokens,
        "flops": tokens * per_token + reference,
        "mfu": config.mfu,
        "micro_batches": n,
        "micro_batch_size": B,
        "largest_micro_batch_size": largest,
        "seconds_per_step": compute + waiting,
        "waiting_seconds_per_step": waiting,
        "reference_seconds": reference / (gpus * speed),
        "hours": (run.max_steps * (compute + waiting) + reference / (gpus * speed)) / 3600,
        "memory": footprint.memory | {"total": sum(footprint.memory.values()), "limit": memory_limit(config)},
        "messages": messages,
        "disk": disk_of(config, run, rehearsal, tokens),
    }
    problems, notes = problems_of(plan, config) + data_problems(config), notes_of(plan, run, config)
    if room := room_problem(config, run):  # where its folder is not, the run may be meant for another machine
        here = Path(config.out_dir).exists()
        (problems if here else notes).append(room if here else f"on this machine {room}")
    return plan | {"problems": problems, "notes": notes}


def disk_of(config: Machines, run: Run, rehearsal: Rehearsal, tokens: int) -> dict[str, int]:
    """Bytes of the data, of a checkpoint, and of all checkpoints that are there at a time, the one being
    written included. Pretraining's data are its tokens, read once; rendered ones take 5 bytes a token."""
    one = checkpoint_bytes(rehearsal.optimizer)
    if isinstance(config, Pretraining):
        data = tokens * (2 if run.shape.vocab_size <= 2**16 else 4)
    else:
        data = 5 * (config.data_tokens if isinstance(config, FineTuning) else config.pairs * 2 * run.T)
    most = most_checkpoints(run.max_steps, **saving(config))
    return {"data": data, "checkpoint": one, "checkpoints": most * one}


def data_problems(config: Machines) -> list[str]:
    """What is wrong with the data. Pretraining's may be on another machine."""
    folders = parse_sources(config.data_dir) if isinstance(config, Pretraining) else []
    if folders and not any(Path(source.path).exists() for source in folders):
        return []
    try:
        check_data(config)
    except InputError as error:
        return [str(error)]
    return []


def problems_of(plan: dict, config: Machines) -> list[str]:
    """What will fail for want of memory, a sentence."""
    total, limit = (plan["memory"][name] / 2**30 for name in ("total", "limit"))
    B, largest = plan["micro_batch_size"], plan["largest_micro_batch_size"]
    unit, gpu = plan["unit"], config.gpu
    needs = f"{B} {unit} at once need {total:.1f} GiB of the {limit:.1f} that --gpu={gpu} has for a step"
    if largest >= B or total <= limit:
        return []
    if largest:
        return [f"{needs}; use --micro_batch_size={largest}"]
    remedies = [] if config.checkpoint_activations else ["--checkpoint_activations"]
    remedies += ["more GPUs with --shard=full"] if plan["gpus"] == 1 else []
    remedies += ["--shard=full"] if plan["gpus"] > 1 and plan["shard"] != "full" else []
    length = "context_length" if plan["unit"] == "windows" else "max_length"
    remedies += ["a GPU with more memory", f"a shorter --{length}"]
    return [f"{needs}, and a single one does not fit either; use {' or '.join(remedies)}"]


def notes_of(plan: dict, run: Run, config: Machines) -> list[str]:
    """What works but may not be meant, a sentence each."""
    notes, T, batch = [], run.T, "batch_pairs" if run.unit == "pairs" else "batch_tokens"
    if run.unit != "pairs" and config.batch_tokens % T:
        notes.append(
            f"--batch_tokens={config.batch_tokens} makes no whole number of {run.unit} of {T}: a step has "
            f"{plan['tokens_per_step']:,} tokens"
        )
    computed = plan["gpus"] * plan["micro_batches"] * plan["micro_batch_size"]
    if computed != run.step:
        notes.append(
            f"{run.step} {run.unit} are no multiple of {plan['gpus']} GPUs x {plan['micro_batches']} "
            f"micro-batches: {100 * (1 - run.step / computed):.1f}% of the compute is padding"
        )
    waiting = plan["waiting_seconds_per_step"] / plan["seconds_per_step"]
    if waiting > 0.1:
        notes.append(f"GPUs wait for messages {100 * waiting:.0f}% of the time; raise --{batch}")
    if run.unit == "pairs" and not plan["reference_seconds"]:
        notes.append("the reference pass over all pairs is left out of time and FLOPs; give --pairs")
    if config.shard in ("full", "hybrid") and plan["gpus"] == 1:
        notes.append(f"--shard={config.shard} splits nothing on one GPU")
    return notes


# -- printing ------------------------------------------------------------------------------------------------


def print_plan(plan: dict) -> None:
    memory, disk = plan["memory"], plan["disk"]
    gib = {kind: f"{size / 2**30:.2f}" for kind, size in memory.items()}
    seconds = plan["reference_seconds"]
    data = f"data {disk['data'] / 1e9:.2f} GB, " if disk["data"] else ""
    before = f", {seconds / 3600:.2f} hours of it the reference pass" if seconds else ""
    how = {"none": "DDP" if plan["gpus"] > 1 else "alone", "full": "FSDP2", "hybrid": "FSDP2, hybrid"}
    print(
        f"model      {plan['parameters']:,} parameters\n"
        f"run        {plan['steps']:,} steps of {plan['tokens_per_step']:,} tokens, {plan['tokens']:,} in "
        f"all, {plan['flops']:.2e} FLOPs\n"
        f"GPUs       {plan['gpus']} x {plan['gpu']}, {how[plan['shard']]} (--shard={plan['shard']}), "
        f"{plan['micro_batches']} micro-batches of {plan['micro_batch_size']} {plan['unit']} on each\n"
        f"time       {plan['hours']:.2f} hours, {plan['hours'] * plan['gpus']:.1f} GPU hours; "
        f"{plan['seconds_per_step']:.3f} s a step at {100 * plan['mfu']:.0f}% MFU (assumed){before}\n"
        f"memory     {gib['total']} of {gib['limit']} GiB: weights {gib['weights']}, gradients "
        f"{gib['gradients']}, optimizer {gib['optimizer']}, activations and the rest {gib['activations']} "
        f"(measured on fake tensors)\n"
        f"           the largest micro-batch that fits: {plan['largest_micro_batch_size']} {plan['unit']}"
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
        f"disk       {data}checkpoints {disk['checkpoints'] / 1e9:.2f} GB of {disk['checkpoint'] / 1e9:.2f} "
        f"each"
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
        f"| GPUs | shard | micro-batch | largest | GiB a GPU | GB sent a step | waiting | hours |\n"
        f"|-----:|-------|------------:|--------:|----------:|---------------:|--------:|------:|"
    )
    for p in plans:
        sent = sum(m["bytes"] for m in p["messages"]) / 1e9
        waiting = f"{100 * p['waiting_seconds_per_step'] / p['seconds_per_step']:.1f}%"
        print(
            f"| {p['gpus']:4} | {p['shard']:5} | {p['micro_batch_size']:11} | "
            f"{p['largest_micro_batch_size']:7} | {p['memory']['total'] / 2**30:9.1f} | {sent:14.2f} | "
            f"{waiting:>7} | {p['hours']:5.1f} |"
        )
    for p in plans:
        for sentence in p["problems"]:
            print(f"{p['gpus']} x {p['gpu']} will fail: {sentence}")


if __name__ == "__main__":
    run_script(main, CONFIGS[take_script()])
