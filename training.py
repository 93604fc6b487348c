"""What the training scripts share: leaf functions, no control flow.

Command line, ranks and devices, one optimizer step, evaluation, checkpoints, metrics.
"""

import dataclasses
import errno
import faulthandler
import fcntl
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import threading
import time
import typing
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from data import file_sha256, load_tokenizer, source_files, write_json
from gpt import IGNORE, GPTModel, InputError, model_directory, one_line, read_json
from optim import state_by_name

RESUMABLE = 75  # the exit status of a run that was stopped and can go on; sysexits.h calls it EX_TEMPFAIL
# Fields that a run may change when it goes on: they leave its numbers alone, or change their rounding only.
# Of the paths and the model it is the content that counts, which `resume` compares.
FREE_FIELDS = (
    "data_dir tokenizer model out_dir log_every eval_every eval_tokens eval_questions samples max_new_tokens "
    "save_every keep_last keep_every wandb micro_batch_size timeout_minutes resume force device "
    "compile"
).split()

# -- command line --------------------------------------------------------------------------------------------


def field_comments(config_class: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, from its source."""
    lines = inspect.getsource(config_class).splitlines()
    return {
        m[1]: m[2] or "" for m in (re.match(r"    (\w+): [^#]*(?:# *(.*))?$", line) for line in lines) if m
    }


def parse_value(text: str, kind: type):
    """A command-line value as the field's type, 1_000 and 1e9 for integers too; ValueError if it is none."""
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if kind is int and not re.fullmatch(r"[-+]?[\d_]+", text):
        if float(text) != int(float(text)):
            raise ValueError(text)
        return int(float(text))
    return kind(text)


def parse_config(config_class: type, arguments: Sequence[str]):
    """A Config with `--field=value` overrides; the fields, their defaults and comments are the documentation.

    Raises InputError for an unknown field or a value of the wrong type, and SystemExit for --help.
    """
    comments, kinds = field_comments(config_class), typing.get_type_hints(config_class)
    fields = {f.name: f.default for f in dataclasses.fields(config_class)}
    overview = "\n".join(
        f"  {f'--{name}={default}':<32}  {comments[name]}" for name, default in fields.items()
    )
    if {"-h", "--help"} & set(arguments):
        print(f"{sys.modules[config_class.__module__].__doc__.strip()}\n\nFields and defaults:\n{overview}")
        raise SystemExit(0)
    values = {}
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not equals and kinds.get(name) is bool:
            equals, text = "=", "true"
        if argument.startswith("--") and not equals and name in fields:
            raise InputError(f"{argument} has no value; write {argument}=value ({comments[name]})")
        if not argument.startswith("--") or not equals or name not in fields:
            raise InputError(
                f"{argument} is not understood; write --field=value with one of these fields:\n{overview}"
            )
        try:
            values[name] = parse_value(text, kinds[name])
        except (ValueError, KeyError, OverflowError):
            raise InputError(
                f"--{name}={text} is not of type {kinds[name].__name__} ({comments[name]})"
            ) from None
    return config_class(**values)


def run_script(main: Callable, config_class: type) -> None:
    """Run main(config), config from the command line; the user's mistakes give one sentence and status 1."""
    try:
        main(parse_config(config_class, sys.argv[1:]))
    except InputError as error:
        message = f"error: {error}"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"error: the disk is full ({error}); make room and run the same command again, it continues"
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    print(message, file=sys.stderr, flush=True)  # at once: other ranks may keep this one from ending
    raise SystemExit(1)


def check_numbers(config, *positive: str) -> None:
    """InputError for the first number of a training script's Config that can mean nothing: `positive` fields,
    and those that all scripts have, must be above zero, others at least zero (the seed: any), none infinite,
    shares at most 1."""
    positive = {*positive, *"micro_batch_size log_every eval_every save_every max_bad_steps".split()}
    for name, value in dataclasses.asdict(config).items():
        if not isinstance(value, int | float) or isinstance(value, bool) or name == "seed":
            continue
        if name in positive | {"timeout_minutes"} and not 0 < value < math.inf:
            raise InputError(f"--{name}={value}: expected a number above zero")
        if not 0 <= value < math.inf:
            raise InputError(f"--{name}={value}: expected a number from zero up")
        if value > 1 and name.endswith(("_fraction", "beta1", "beta2")):
            raise InputError(f"--{name}={value}: expected a share, from 0 to 1")


# -- ranks and devices ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Ranks:
    """This process among those that torchrun started, and its device; alone when there is no torchrun."""

    rank: int
    world: int
    device: torch.device
    watchdog: "Watchdog | None" = None
    lock: typing.IO | None = None  # of the run's folder, held as long as this lives

    @property
    def main(self) -> bool:
        return self.rank == 0

    def print(self, *values) -> None:
        """Print on rank 0."""
        if self.main:
            print(*values, flush=True)

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Each value's sum over all ranks, in float64."""
        device = self.device if self.world > 1 else "cpu"
        total = torch.stack([torch.as_tensor(v).to(device).double() for v in values])
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    @contextmanager
    def main_first(self):
        """Rank 0 does the block before the others do: it downloads or writes what they then find."""
        if self.world > 1 and not self.main:
            dist.barrier()
        yield
        if self.world > 1 and self.main:
            dist.barrier()

    def require_shared(self, path: Path) -> None:
        """InputError on a rank that does not see, within ten seconds, what rank 0 has written."""
        for _ in range(100 if not self.main else 0):
            if path.exists():
                return
            time.sleep(0.1)
        if not self.main:
            raise InputError(
                f"rank {self.rank} does not see {path}; --out_dir has to be one folder for all machines"
            )

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def watch(self, minutes: float) -> None:
        """From now on, end a rank among several that is not heard `at` a place for so long."""
        if self.world > 1:
            self.watchdog = Watchdog(f"rank {self.rank} of {self.world}", 60 * minutes)

    def at(self, place: str) -> None:
        """Note where this rank is, a sign of life."""
        if self.watchdog:
            self.watchdog.place, self.watchdog.since = place, time.monotonic()

    def autocast(self):
        """bf16 matrix products on CUDA, fp32 elsewhere."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()


class Watchdog:
    """Ends the process when nothing has been heard of it for some seconds, and says where it stands.

    A collective operation that one rank never enters keeps the others waiting; torchrun, which sees processes
    end and not processes wait, then ends or restarts the whole job.
    """

    def __init__(self, name: str, seconds: float):
        self.name, self.seconds = name, seconds
        self.place, self.since = "the set-up", time.monotonic()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while (left := self.since + self.seconds - time.monotonic()) > 0:
            time.sleep(left)
        print(
            f"error: {self.name} has made no progress for {self.seconds:.0f} s in {self.place}; it stands at",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback()
        os._exit(1)


def set_up(device: str) -> Ranks:
    """Join the other ranks (NCCL on GPUs, gloo on CPUs) on a device, "auto" or as torch names it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"--device={device}, but no CUDA device is visible; use --device=cpu or --device=auto"
        )
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device={device} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun restarts ranks on the store of the dead, whose addresses they would find there; several
            # machines, which count restarts apart, get a new one by TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            device_id=device if device.type == "cuda" else None,
            timeout=timedelta(hours=1),  # the others wait while rank 0 renders a dataset
        )
    return Ranks(rank, world, device)


def wrap(model: GPTModel, ranks: Ranks, compile: str) -> nn.Module:
    """The model as a training step calls it: compiled ("auto": on CUDA), gradients averaged over ranks."""
    if compile not in ("auto", "true", "false"):
        raise InputError(f"--compile={compile} is unknown; choose auto, true or false")
    wanted = compile == "true" or (compile == "auto" and ranks.device.type == "cuda")
    torch._dynamo.config.recompile_limit = 32  # for rows of several lengths, in training and evaluation
    module = torch.compile(model, dynamic=False) if wanted else model
    if ranks.world > 1:
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        module = nn.parallel.DistributedDataParallel(
            module, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    return module


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1 (Slurm's warning), so that a run can finish its step, save and leave.

    A second SIGINT ends the process at once. `close` brings the earlier handlers back.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.seen = ranks, set()
        self.handlers = {
            n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }

    def note(self, number: int, frame) -> None:
        if number == signal.SIGINT:  # the next ends the process, also amid a kernel or a checkpoint's writing
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.seen.add(number)

    def on_any_rank(self) -> bool:
        """Whether a signal reached any rank; all ranks ask together and get the same answer."""
        return self.ranks.sum(len(self.seen))[0] > 0

    def close(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def leave(config, ranks: Ranks) -> None:
    """End a run that a signal stopped, after it is saved, with a status that says that it can go on."""
    ranks.barrier()  # torchrun ends all ranks as soon as one has ended
    ranks.print(f"stopped by a signal; the same command continues from the checkpoint in {config.out_dir}")
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(RESUMABLE)


# -- one step ------------------------------------------------------------------------------------------------


class StepHistory:
    """The last losses and gradient norms, by which a step is judged; part of a run's state.

    A step is bad if its loss or gradient norm is not finite, or is a spike: further above the mean of the
    last 128 than 6 standard deviations. Both numbers, and that half of the 128 must be there, are those of
    OLMo-core's SkipStepOptimizer (https://github.com/allenai/OLMo-core). `config` has out_dir, spike_sigma
    (0: no step is a spike) and max_bad_steps.
    """

    LENGTH = 128

    def __init__(self, config, state: dict | None):
        self.config = config
        saved = state["history"] if state else {"loss": [], "grad_norm": [], "bad_steps": 0}
        self.values = {name: deque(saved[name], self.LENGTH) for name in ("loss", "grad_norm")}
        self.bad_steps = saved["bad_steps"]  # in a row

    def state(self) -> dict:
        return {name: list(values) for name, values in self.values.items()} | {"bad_steps": self.bad_steps}

    def problem(self, **measured: float) -> str | None:
        """What is wrong with a step of this loss and grad_norm, or None.

        Raises InputError, which names the last whole checkpoint, for the max_bad_steps-th bad step in a row.
        """
        problems = [text for text in (self.judge(*item) for item in measured.items()) if text]
        self.bad_steps = self.bad_steps + 1 if problems else 0
        if problems and self.bad_steps >= self.config.max_bad_steps:
            good = newest_checkpoint(self.config.out_dir)
            raise InputError(
                f"{self.bad_steps} steps in a row were skipped, the last because {problems[0]}; "
                + (f"the last good checkpoint is {good}" if good else "there is no checkpoint yet")
                + "; lower the learning rate, or look at the data of these steps"
            )
        return problems[0] if problems else None

    def judge(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"its {name} is {value}"
        past, limit = self.values[name], math.inf
        if self.config.spike_sigma and len(past) >= self.LENGTH // 2:
            limit = np.mean(past) + self.config.spike_sigma * np.std(past, ddof=1)
        past.append(value)
        return f"its {name} of {value:.3f} is a spike, above {limit:.3f}" if value > limit else None


def targets_in(batch: dict) -> torch.Tensor:
    """How many of a micro-batch's targets are trained on."""
    return (batch["targets"] != IGNORE).sum()


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[dict],
    lr_share: float,
    max_grad_norm: float,
    history: StepHistory,
    ranks: Ranks,
    count: Callable[[dict], float | torch.Tensor] = targets_in,
) -> dict[str, float | str]:
    """One optimizer step over this rank's micro-batches, each the keyword arguments of the module's forward,
    at a share of the peak learning rates.

    The module gives a micro-batch's loss as a sum over what `count` counts. It is divided once, by the count
    of all micro-batches of all ranks: any split of the same global batch gives the same gradients up to
    rounding. Returns loss (per target, in nats), grad_norm (before clipping), lr (AdamW's) and targets (how
    many); for a bad step, which changes nothing, also skipped (why): all ranks decide by the same sums.
    """
    (targets,) = ranks.sum(sum(count(batch) for batch in micro_batches))
    assert targets > 0, "a global batch without targets; the loaders never give one"
    loss_sum = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if last or ranks.world == 1 else module.no_sync():
            with ranks.autocast():
                loss = module(**batch)
            share = loss * (ranks.world / targets)  # DDP averages over ranks: times their number is a sum
            share.backward()
        loss_sum += loss.detach()
    grad_norm = nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm or math.inf)
    loss_sum, grad_norm = ranks.sum(loss_sum, grad_norm / ranks.world)  # the norm is the same on all ranks
    result = {"loss": loss_sum / targets, "grad_norm": grad_norm}
    problem = history.problem(**result)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_share
    if problem is None:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    result |= {"lr": optimizer.param_groups[-1]["lr"], "targets": int(targets)}
    return result if problem is None else result | {"skipped": problem}


@torch.no_grad()
def evaluate(
    module: nn.Module, micro_batches: Iterable[dict], ranks: Ranks, count: Callable[[dict], int] = targets_in
) -> tuple[float, int, int]:
    """Summed loss in nats, how many targets were the likeliest token, and the number of targets, over this
    and all other ranks' micro-batches; a module's own idea of the first two with a `count` to match."""
    loss, right, targets = 0.0, 0, 0
    for batch in micro_batches:
        ranks.at("an evaluation")
        with ranks.autocast():
            losses, hits = module(**batch, per_token=True)
        loss, right, targets = loss + losses.sum().item(), right + hits.sum().item(), targets + count(batch)
    loss, right, targets = ranks.sum(loss, right, targets)
    return loss, int(right), int(targets)


# -- checkpoints ---------------------------------------------------------------------------------------------


def sync_to_disk(path: Path) -> None:
    """Have the operating system write a file, or a folder's entries, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lacking_space(folder: Path, needed: int) -> InputError:
    """What to tell when the disk that holds the folder has no room for a checkpoint of so many bytes."""
    return InputError(
        f"a checkpoint needs {needed / 1e9:.2f} GB and {folder} has "
        f"{shutil.disk_usage(folder).free / 1e9:.2f} GB free; make room and run the same command again, it "
        f"continues from the last checkpoint"
    )


class Checkpoints:
    """Writes a run's checkpoints, out_dir/step_0000123 each, on rank 0 and while training goes on.

    Each is a Hugging Face model directory with `training_state.pt` beside the weights. `save` copies weights
    and optimizer state to host memory (12 bytes a parameter with AdamW) and returns; a thread writes them
    under another name, flushes them to the disk, adds a manifest with each file's size and hash, and renames:
    at any moment a crash leaves the older checkpoints, and this one either whole or absent. Only then are
    all but the newest keep_last deleted (0 keeps all), and of those none whose step is a multiple of
    keep_every. `config` has out_dir, save_every, keep_last and keep_every; `identity` is what `resume`
    compares; `origin` is a sentence for the model card.
    """

    def __init__(self, config, model, tokenizer, optimizer, history, identity, origin, metrics, ranks):
        if config.keep_every % config.save_every:
            raise InputError(
                f"--keep_every={config.keep_every} is no multiple of --save_every={config.save_every}; "
                f"only a checkpoint that is saved can be kept"
            )
        self.config, self.model, self.tokenizer, self.optimizer = config, model, tokenizer, optimizer
        self.history, self.identity, self.origin = history, identity, origin
        self.metrics, self.ranks = metrics, ranks
        self.out_dir = Path(config.out_dir)
        self.needed = 12 * model.num_parameters() + 50_000_000  # bytes: weights and moments in fp32, the rest
        self.thread, self.writing = ThreadPoolExecutor(1), Future()
        self.writing.set_result(None)

    def after(self, step: int, stopped: bool) -> None:
        """Save every save_every-th step, and the last. If a signal has stopped the run, save and end it.

        Raises what went wrong in writing the checkpoint before.
        """
        if self.writing.done():
            self.wait()
        if stopped or step % self.config.save_every == 0 or step == self.metrics.max_steps:
            self.save(step)
        if stopped:
            self.wait()
            self.metrics.close()
            leave(self.config, self.ranks)

    def wait(self) -> None:
        """Until the last checkpoint is on the disk; raises what went wrong."""
        self.writing.result()

    def save(self, step: int) -> None:
        """Begin to write a checkpoint, when the one before is written.

        Raises InputError, having written nothing, if the disk has too little room or if weights are not
        finite.
        """
        began = time.monotonic()
        self.wait()
        if not self.ranks.main:
            return
        for leftover in self.out_dir.glob(".step_*.partial"):  # of a run that was killed while writing
            shutil.rmtree(leftover)
        if shutil.disk_usage(self.out_dir).free < self.needed:
            raise lacking_space(self.out_dir, self.needed)
        broken = [name for name, p in self.model.named_parameters() if not p.isfinite().all()]
        if broken:
            raise InputError(
                f"after step {step} {len(broken)} weights are not finite, {broken[0]} among them; nothing "
                f"was saved, the last good checkpoint is {newest_checkpoint(self.out_dir)}"
            )
        weights = on_host(self.model.stored_state())
        state = {
            "step": step,
            **self.identity,
            "config": dataclasses.asdict(self.config),
            "history": self.history.state(),
            "wandb_id": self.metrics.wandb_id,
            "optimizer": on_host(state_by_name(self.model, self.optimizer)),
        }
        card = model_card(self.config, step, self.model, self.origin, self.metrics)
        self.writing = self.thread.submit(self.write, step, weights, state, card)
        self.metrics.log(step, save_seconds=round(time.monotonic() - began, 3))

    def write(self, step: int, weights: dict, state: dict, card: str) -> None:
        final, partial = self.out_dir / f"step_{step:07d}", self.out_dir / f".step_{step:07d}.partial"
        try:
            self.model.save_pretrained(partial, self.tokenizer, weights)
            (partial / "README.md").write_text(card)
            torch.save(state, partial / "training_state.pt")
            found = sorted(partial.iterdir())
            files = {f.name: {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in found}
            for name in files:
                sync_to_disk(partial / name)
            write_json(partial / "checkpoint.json", {"step": step, "files": files})
            sync_to_disk(partial)
            sync_to_disk(self.metrics.path)  # whose rows up to this step no later run makes again
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # a full disk is each of these, by the library
            shutil.rmtree(partial, ignore_errors=True)
            told = lacking_space(self.out_dir, self.needed)
            raise InputError(f"step {step} could not be saved ({one_line(error)}); {told}") from error
        if final.exists():  # damaged, so that the run went on from an earlier one
            shutil.rmtree(final)
        partial.rename(final)
        sync_to_disk(self.out_dir)
        # a later one is damaged, or this run would not be here
        earlier = [path for path in checkpoints(self.out_dir) if step_of(path) <= step]
        keep_last, keep_every = self.config.keep_last, self.config.keep_every
        for old in earlier[:-keep_last] if keep_last else []:
            if not keep_every or step_of(old) % keep_every:
                shutil.rmtree(old)


def on_host(state: dict) -> dict:
    """A copy in host memory of a state whose values are tensors or such states."""
    return {
        k: on_host(v) if isinstance(v, dict) else v.detach().to("cpu", copy=True) for k, v in state.items()
    }


def model_card(config, step: int, model: GPTModel, origin: str, metrics: "Metrics") -> str:
    """The README.md of a checkpoint: what it is, what it was made from, and the losses measured so far."""
    losses = []
    for name, unit in (("loss", metrics.unit), ("val_loss", metrics.unit), ("val_bpb", "bits/byte")):
        for row in [row for row in metrics.rows if row.get(name) is not None][-1:]:
            losses.append(f"- step {row['step']}, {name.replace('_', ' ')}: {row[name]:.4f} {unit}\n")
    size = f"{model.num_parameters():,} parameters; {step * metrics.step_tokens:,} tokens in {step} steps"
    fields = model.config.to_hf()
    kind = fields.pop("architectures")[0]
    shape = "\n".join(f"{name}: {value!r}" for name, value in fields.items())
    settings = "\n".join(f"{name}: {value!r}" for name, value in dataclasses.asdict(config).items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {Path(config.out_dir).name}\n\n"
        f"{origin} {size}. A {kind}, which `AutoModelForCausalLM.from_pretrained` opens.\n\n"
        f"## Losses\n\n{''.join(losses)}\n## Settings\n\n```\n{settings}\n```\n\n"
        f"## Configuration\n\n```\n{shape}\n```\n"
    )


def checkpoints(out_dir: str | Path) -> list[Path]:
    """A run's checkpoint folders, oldest first."""
    found = [p for p in Path(out_dir).glob("step_*") if re.fullmatch(r"step_\d{7,}", p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that save_checkpoint wrote, or None if it is whole."""
    if not (checkpoint / "checkpoint.json").exists():
        return "checkpoint.json is missing"
    try:
        manifest = read_json(checkpoint / "checkpoint.json")
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (InputError, KeyError, TypeError, AttributeError):
        return "checkpoint.json is cut short or not what was saved"
    for name, expected in files.items():
        path = checkpoint / name
        try:
            if not path.exists():
                return f"{name} is missing"
            if (path.stat().st_size, file_sha256(path)) != expected:
                return f"{name} is not what was saved"
        except (OSError, ValueError) as error:  # a failing disk, or a name that no file can have
            return f"{name} cannot be read ({error})"
    return None


def newest_checkpoint(out_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None; damaged ones are named on stderr and passed over."""
    for checkpoint in reversed(checkpoints(out_dir)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        print(f"warning: passing over {checkpoint}: {problem}", file=sys.stderr)
    return None


def find_model(name: str) -> str | Path:
    """The model that a user named: for a run's folder its newest whole checkpoint, else the name as it is.

    Raises InputError for a folder with neither, and for a checkpoint whose weights or tokenizer were changed.
    """
    path = Path(name)
    if not path.is_dir():
        return name
    if (path / "config.json").exists():
        problem = damage(path) if (path / "checkpoint.json").exists() else None
        if problem:
            raise InputError(f"{name}: {problem}; delete checkpoint.json there to use it all the same")
        return name
    checkpoint = newest_checkpoint(name)
    if checkpoint is None:
        raise InputError(f"{name} holds neither a model (config.json) nor a whole checkpoint (step_…)")
    return checkpoint


def lock(out_dir: str | Path) -> typing.IO:
    """A lock on a run's folder, which ends with the file returned or with the process, however that ends.

    Raises InputError while another process holds it: two writers would mix their checkpoints.
    """
    file = open(Path(out_dir) / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(
                f"{out_dir} is in use by {file.read() or 'another process'}; wait for it or end it, or "
                f"choose another --out_dir"
            ) from None
        print(f"warning: {out_dir} cannot be locked ({error}); start nothing else in it", file=sys.stderr)
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def resume(config, identity: dict[str, dict], ranks: Ranks) -> dict | None:
    """The training state to go on from, with its folder under "path", or None to start afresh.

    `config.resume` is "auto" (the newest whole checkpoint in out_dir, if any), "none" or a checkpoint's path.
    `identity` has under "fixed" what a run can never change, under "content" what its data and starting point
    hold, None for what cannot be known any more. Changed settings are listed; with another content or other
    fields than FREE_FIELDS the run would end elsewhere than an undisturbed one, and needs `config.force`.
    Raises InputError without it, when out_dir holds checkpoints that do not lead to the one chosen, and when
    another process trains in out_dir. When torchrun restarts a run that has saved, that is what goes on.
    """
    out_dir, choice = config.out_dir, config.resume
    if ranks.main:
        ranks.lock = lock(out_dir)
    existing = checkpoints(out_dir)
    if existing and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        choice = "auto"
    if choice == "none" and existing:
        raise InputError(
            f"{out_dir} holds checkpoints already, up to {existing[-1].name}; choose another --out_dir "
            f"or go on from them with --resume=auto"
        )
    if choice in ("none", "auto"):
        path = newest_checkpoint(out_dir)  # with "none" there is none
        if path is None and existing:
            raise InputError(
                f"{out_dir} holds checkpoints up to {existing[-1].name}, but none is whole; bring one back, "
                f"or delete them to start afresh"
            )
    else:
        path, problem = Path(choice), damage(Path(choice))
        if problem:
            raise InputError(f"{path} cannot be resumed: {problem}")
    state = load_state(path / "training_state.pt") if path else None
    step = state["step"] if state else 0
    if choice not in ("none", "auto"):
        inside = path.resolve().parent == Path(out_dir).resolve()
        later = [p.name for p in existing if not inside or step_of(p) > step]
        if later:
            raise InputError(
                f"{out_dir} holds other checkpoints ({', '.join(later)}); go on from the newest with "
                f"--resume=auto, delete them, or choose another --out_dir"
            )
    if ranks.sum(step)[0] != step * ranks.world:
        raise InputError(
            f"rank {ranks.rank} would go on from {path or 'the beginning'}, and other ranks from elsewhere; "
            f"{out_dir} has to be one folder that all machines share"
        )
    if state is None:
        return None
    differing = differences(state["fixed"], identity["fixed"])
    if differing:
        raise InputError(
            f"{path} belongs to another run ({', '.join(differing)}); take another --out_dir, or the old ones"
        )
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    changed = differences(defaults | state["config"], dataclasses.asdict(config))
    breaking = differences(state["content"], identity["content"])
    for name, value in identity["content"].items():  # what is gone by now stays what it was
        identity["content"][name] = state["content"].get(name) if value is None else value
    breaking += [text for text in changed if text.split()[0] not in FREE_FIELDS]
    if breaking and not config.force:
        raise InputError(
            f"{path} was trained with other settings ({', '.join(breaking)}); take those, or another "
            f"--out_dir, or --force to go on with the new ones, which ends elsewhere than an undisturbed run"
        )
    changed = breaking + [text for text in changed if text not in breaking]
    if changed:
        ranks.print(f"changed since {path}: {', '.join(changed)}")
    return state | {"path": path}


def load_state(path: Path) -> dict:
    """A training state; InputError for a file that could run code, as only a stranger's does."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, numbers and text, and is not loaded: it could run code"
        ) from error


def differences(old: dict, new: dict) -> list[str]:
    """Each value that is known and was another, as "name old → new"."""
    return [
        f"{name} {old.get(name)!r} → {value!r}"
        for name, value in new.items()
        if value is not None and old.get(name) != value
    ]


def open_model(name: str | Path, ranks: Ranks) -> tuple[GPTModel, object]:
    """The model that a user named and its tokenizer, on this rank's device, with an embedding for each of the
    tokenizer's tokens."""
    with ranks.main_first():
        path = model_directory(find_model(name))
        model, tokenizer = GPTModel.from_pretrained(path), load_tokenizer(path)
    model.resize_vocabulary(len(tokenizer), tokenizer.new_tokens)
    return model.to(ranks.device), tokenizer


def row_length(config, model: GPTModel) -> int:
    """--max_length, or the model's context; InputError beyond it."""
    context = model.config.max_position_embeddings
    if config.max_length > context:
        raise InputError(f"--max_length={config.max_length} is beyond the model's context of {context}")
    return config.max_length or context


def starting_point(config) -> dict[str, dict]:
    """The identity, for `resume`, of a run that starts from config.model and reads config.data: hashes of
    local files, None for what is of a hub or a package, or gone."""
    files = source_files(config.data) if config.data != "embedded" else None
    found = fingerprint([[path.name, file_sha256(path)] for path in files]) if files else None
    model = Path(find_model(config.model))
    weights = [file_sha256(path) for path in sorted(model.glob("*.safetensors"))] if model.is_dir() else None
    content = {"data_files": found, "weights": fingerprint(weights) if weights else None}
    return {
        "fixed": {"optimizer": config.optimizer},
        "content": {"model": os.path.normpath(config.model), **content},
    }


def fingerprint(value) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# -- metrics -------------------------------------------------------------------------------------------------


class Metrics:
    """A run's numbers: `metrics.jsonl` always, `loss.png`, wandb if wanted, a progress bar on a terminal.

    Rank 0 keeps them; steps count finished optimizer steps, of step_tokens tokens each; a loss is in `unit`.
    `config` has out_dir, log_every and wandb; `state` is that of the checkpoint that the run goes on
    from, if any.
    """

    def __init__(
        self,
        config,
        start: int,
        max_steps: int,
        step_tokens: int,
        ranks: Ranks,
        state: dict | None,
        unit: str = "nats/token",
    ):
        self.ranks, self.log_every, self.max_steps = ranks, config.log_every, max_steps
        self.step_tokens, self.unit = step_tokens, unit
        self.path = Path(config.out_dir) / "metrics.jsonl"
        running = ranks.main and start < max_steps
        # None shows the bar on a terminal only
        self.bar = tqdm(total=max_steps, initial=start, unit="step", disable=None if running else True)
        self.rows, self.run = [], None
        self.wandb_id = state["wandb_id"] if state else None  # kept while wandb is off
        self.seconds, self.steps = 0.0, 0  # since the last report
        if ranks.main:  # rows of later steps are made again
            self.rows = [row for row in read_jsonl(self.path) if row["step"] <= start]
            write_jsonl(self.path, self.rows)
        if running:
            self.run = start_wandb(config, self.wandb_id)
            self.wandb_id = self.run.id if self.run else self.wandb_id
        if state:
            done = start >= max_steps
            ranks.print(f"{state['path']} is finished" if done else f"continuing from {state['path']}")

    def has(self, step: int, name: str) -> bool:
        """Whether a number was recorded under a step; all ranks ask together and get the same answer."""
        return self.ranks.sum(any(row["step"] == step and name in row for row in self.rows))[0] > 0

    def log(self, step: int, **values: float | str) -> None:
        """Record values under a step, one row for each; what is not finite as null, as JSON wants it."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if self.ranks.main:
            if self.rows and self.rows[-1]["step"] == step:
                self.rows[-1] |= values
                write_jsonl(self.path, self.rows)
            else:
                self.rows.append({"step": step, **values})
                with open(self.path, "a") as file:
                    file.write(json.dumps(self.rows[-1]) + "\n")
        if self.run:
            self.run.log(values, step=step)

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.ranks.main:
            self.bar.write(line)
            sys.stdout.flush()

    def step(self, step: int, result: dict[str, float], seconds: float) -> None:
        """Count a finished step; record and print every log_every-th, with the speed since the one before,
        and each that was skipped."""
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        speed = self.steps * self.step_tokens / self.seconds
        self.bar.set_postfix_str(f"loss {result['loss']:.3f}, {speed:,.0f} tok/s", refresh=False)
        self.bar.update(step - self.bar.n)
        if "skipped" in result:
            self.log(step, **result)
            self.say(f"step {step:6d}/{self.max_steps}  skipped: {result['skipped']}")
        if step % self.log_every and step != self.max_steps:
            return
        left = tqdm.format_interval(self.seconds / self.steps * (self.max_steps - step))
        self.log(step, tokens=step * self.step_tokens, **result, tokens_per_second=round(speed))
        self.say(
            f"step {step:6d}/{self.max_steps}  loss {result['loss']:7.4f}  lr {result['lr']:.2e}  "
            f"grad norm {result['grad_norm']:6.3f}  {speed:9,.0f} tok/s  {left} left"
        )
        self.seconds, self.steps = 0.0, 0

    def validated(self, step: int, val_loss: float, **values: float) -> None:
        """Record and print a validation, and draw the curves."""
        self.log(step, val_loss=val_loss, **values)
        rest = "".join(f"  {name} {value:.4f}" for name, value in values.items())
        self.say(f"step {step:6d}/{self.max_steps}  val_loss {val_loss:.4f} {self.unit}{rest}")
        self.plot()

    def plot(self) -> None:
        """Draw loss.png from all rows so far."""
        if not self.ranks.main:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, style in (
            ("loss", {"alpha": 0.6, "linewidth": 1}),
            ("val_loss", {"marker": "o", "markersize": 3}),
        ):
            points = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points), label={"loss": "training", "val_loss": "validation"}[name], **style)
        axes.set(xlabel="optimizer step", ylabel=f"loss ({self.unit})", title=self.path.parent.name)
        axes.grid(alpha=0.3)
        axes.legend()
        partial = self.path.with_name("loss.png.partial")
        figure.savefig(partial, format="png", dpi=120)
        partial.replace(self.path.with_name("loss.png"))

    def close(self) -> None:
        self.bar.close()
        if self.run:
            self.run.finish()


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a metrics file, without a last line that a crash cut short; none if there is no file.

    Other lines that are no JSON, as after a power failure, are named on stderr and left out.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        if not line.endswith(b"\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"warning: line {number} of {path} is damaged and left out", file=sys.stderr)
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Replace a metrics file in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sync_to_disk(partial)
    partial.replace(path)


def has_wandb_key() -> bool:
    """Whether the user set up an API key, in the environment or by `wandb login`."""
    import wandb

    return wandb.login(prompt=False, verify=False)


def start_wandb(config, run_id: str | None):
    """A wandb run, or None. Never a prompt: without a key, or if no server answers, it logs offline."""
    if config.wandb not in ("auto", "online", "offline", "off"):
        raise InputError(f"--wandb={config.wandb} is unknown; choose auto, online, offline or off")
    if config.wandb == "off":
        return None
    import wandb

    key = has_wandb_key()
    if config.wandb == "auto" and not key:
        return None
    options = {
        "project": Path(__file__).parent.name,
        "name": Path(config.out_dir).name,
        "id": run_id,
        "resume": "allow",
        "config": dataclasses.asdict(config),
        "dir": config.out_dir,
        "settings": wandb.Settings(console="off", silent=True, init_timeout=30),
    }
    if config.wandb != "offline" and key:
        try:
            return wandb.init(mode="online", **options)
        except wandb.errors.Error as error:
            print(f"warning: wandb cannot be reached ({error})", file=sys.stderr)
    print(f"wandb logs offline, into {config.out_dir}/wandb; `wandb sync` sends it later", file=sys.stderr)
    return wandb.init(mode="offline", **options)
