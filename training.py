"""What the training scripts share: leaf functions, no control flow.

Command line, ranks and devices, one optimizer step, evaluation, checkpoints, metrics.
"""

import dataclasses
import errno
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from data import file_sha256, write_json
from gpt import IGNORE, GPTModel, InputError, read_json
from optim import state_by_name

RESUMABLE = 75  # the exit status of a run that was stopped and can go on; sysexits.h calls it EX_TEMPFAIL

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


def require_positive(config, *names: str) -> None:
    """InputError for the first of these fields that is not above zero."""
    for name in names:
        if getattr(config, name) <= 0:
            raise InputError(f"--{name}={getattr(config, name)}: expected a number above zero")


# -- ranks and devices ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Ranks:
    """This process among those that torchrun started, and its device; alone when there is no torchrun."""

    rank: int
    world: int
    device: torch.device

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

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def autocast(self):
        """bf16 matrix products on CUDA, fp32 elsewhere."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()


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
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            device_id=device if device.type == "cuda" else None,
            timeout=timedelta(hours=1),  # the others wait while rank 0 renders a dataset
        )
    return Ranks(rank, world, device)


def wrap(model: GPTModel, ranks: Ranks, compile: str) -> nn.Module:
    """The model as a training step calls it: compiled ("auto": on CUDA), gradients averaged over ranks."""
    if compile not in ("auto", "true", "false"):
        raise InputError(f"--compile={compile} is unknown; choose auto, true or false")
    wanted = compile == "true" or (compile == "auto" and ranks.device.type == "cuda")
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
        if number == signal.SIGINT and number in self.seen:
            raise KeyboardInterrupt
        self.seen.add(number)

    def on_any_rank(self) -> bool:
        """Whether a signal reached any rank; all ranks ask together and get the same answer."""
        return self.ranks.sum(len(self.seen))[0] > 0

    def close(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def leave(config, ranks: Ranks) -> None:
    """End a run that a signal stopped, after it is saved, with a status that says that it can go on."""
    ranks.print(f"stopped by a signal; the same command continues from the checkpoint in {config.out_dir}")
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(RESUMABLE)


# -- one step ------------------------------------------------------------------------------------------------


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[dict],
    lr_share: float,
    max_grad_norm: float,
    ranks: Ranks,
) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches, each the keyword arguments of the model's forward,
    at a share of the peak learning rates.

    The loss is the sum over all targets of all micro-batches of all ranks, divided once by their number: any
    split of the same global batch gives the same gradients up to rounding. Returns loss (nats per token),
    grad_norm (before clipping), lr (AdamW's) and targets (how many).
    """
    (targets,) = ranks.sum(sum((batch["targets"] != IGNORE).sum() for batch in micro_batches))
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
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_share
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    (loss_sum,) = ranks.sum(loss_sum)
    lr = optimizer.param_groups[-1]["lr"]
    return {"loss": loss_sum / targets, "grad_norm": grad_norm.item(), "lr": lr, "targets": int(targets)}


@torch.no_grad()
def evaluate(model: nn.Module, micro_batches: Iterable[dict], ranks: Ranks) -> tuple[float, int]:
    """Summed loss in nats and number of targets, over this and all other ranks' micro-batches."""
    loss, targets = torch.zeros((), dtype=torch.float64), 0
    for batch in micro_batches:
        with ranks.autocast():
            loss += model(**batch).cpu()
        targets += int((batch["targets"] != IGNORE).sum())
    loss, targets = ranks.sum(loss, targets)
    return loss, int(targets)


# -- checkpoints ---------------------------------------------------------------------------------------------


def sync_to_disk(path: Path) -> None:
    """Have the operating system write a file, or a folder's entries, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: Path, needed: int) -> None:
    """InputError if the disk that holds the folder has fewer free bytes than a checkpoint needs."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"a checkpoint needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; make room "
            f"and run the same command again, it continues from the last checkpoint"
        )


def save_checkpoint(
    config,
    step: int,
    model: GPTModel,
    tokenizer,
    optimizer: torch.optim.Optimizer,
    identity: dict,
    origin: str,
    metrics: "Metrics",
    ranks: Ranks,
) -> None:
    """Write out_dir/step_0000123, a Hugging Face model directory with `training_state.pt` beside the weights.

    It is written under another name, flushed, given a manifest with each file's size and hash, and renamed:
    at any moment a crash leaves the older checkpoints, and this one either whole or absent. Then all but the
    newest keep_last are deleted (0 keeps all). Raises InputError, having written nothing, if the disk has too
    little room. `config` has out_dir and keep_last; `origin` is a sentence for the model card. Rank 0 writes,
    the others wait.
    """
    if not ranks.main:
        return ranks.barrier()
    out_dir = Path(config.out_dir)
    for leftover in out_dir.glob(".step_*.partial"):
        shutil.rmtree(leftover)
    final, partial = out_dir / f"step_{step:07d}", out_dir / f".step_{step:07d}.partial"
    needed = 12 * model.num_parameters() + 50_000_000  # bytes: weights and two moments in fp32, the rest
    require_space(out_dir, needed)
    state = {
        "step": step,
        "identity": identity,
        "config": dataclasses.asdict(config),
        "wandb_id": metrics.wandb_id,
    }
    try:
        model.save_pretrained(partial, tokenizer)
        (partial / "README.md").write_text(model_card(config, step, model, origin, metrics))
        torch.save(state | {"optimizer": state_by_name(model, optimizer)}, partial / "training_state.pt")
    except (OSError, RuntimeError, SafetensorError):  # of which kinds a full disk is, by the library
        shutil.rmtree(partial)
        require_space(out_dir, needed)
        raise
    files = {f.name: {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in sorted(partial.iterdir())}
    for name in files:
        sync_to_disk(partial / name)
    write_json(partial / "checkpoint.json", {"step": step, "files": files})
    sync_to_disk(partial)
    if final.exists():  # this step was saved before, by a run since taken back to an earlier one
        shutil.rmtree(final)
    partial.rename(final)
    sync_to_disk(out_dir)
    earlier = [path for path in checkpoints(out_dir) if path.name <= final.name]  # a later one may be damaged
    for old in earlier[: -config.keep_last] if config.keep_last else []:
        shutil.rmtree(old)
    ranks.barrier()


def model_card(config, step: int, model: GPTModel, origin: str, metrics: "Metrics") -> str:
    """The README.md of a checkpoint: what it is, what it was made from, and the losses measured so far."""
    losses = []
    for name, unit in (
        ("loss", "nats per token"),
        ("val_loss", "nats per token"),
        ("val_bpb", "bits per byte"),
    ):
        for row in [row for row in metrics.rows if row.get(name) is not None][-1:]:
            losses.append(f"- step {row['step']}, {name.replace('_', ' ')}: {row[name]:.4f} {unit}\n")
    size = f"{model.num_parameters():,} parameters; {step * metrics.step_tokens:,} tokens in {step} steps"
    kind = model.config.to_hf()["architectures"][0]
    settings = "\n".join(f"{name}: {value!r}" for name, value in dataclasses.asdict(config).items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {Path(config.out_dir).name}\n\n"
        f"{origin} {size}. A {kind}, which `AutoModelForCausalLM.from_pretrained` opens.\n\n"
        f"## Losses\n\n{''.join(losses)}\n## Settings\n\n```\n{settings}\n```\n"
    )


def checkpoints(out_dir: str | Path) -> list[Path]:
    """A run's checkpoint folders, oldest first."""
    return sorted(p for p in Path(out_dir).glob("step_*") if re.fullmatch(r"step_\d{7,}", p.name))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that save_checkpoint wrote, or None if it is whole."""
    if not (checkpoint / "checkpoint.json").exists():
        return "checkpoint.json is missing"
    try:
        files = read_json(checkpoint / "checkpoint.json")["files"]
    except InputError:
        return "checkpoint.json is cut short"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
            return f"{name} is not what was saved"
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


def resume(out_dir: str | Path, choice: str, identity: dict) -> dict | None:
    """The training state to go on from, with its folder under "path", or None to start afresh.

    choice is "auto" (the newest whole checkpoint in out_dir, if any), "none" or a checkpoint's path. identity
    says what makes a run this run, None for what cannot be known any more. Raises InputError when out_dir
    holds the checkpoints of another run, or any
    that do not lead to the one chosen.
    """
    existing = checkpoints(out_dir)
    if choice == "none" and existing:
        raise InputError(
            f"{out_dir} holds checkpoints already, up to {existing[-1].name}; choose another --out_dir "
            f"or go on from them with --resume=auto"
        )
    if choice in ("none", "auto"):
        path = newest_checkpoint(out_dir)  # with "none" there is none
    else:
        path, problem = Path(choice), damage(Path(choice))
        if problem:
            raise InputError(f"{path} cannot be resumed: {problem}")
        inside = path.resolve().parent == Path(out_dir).resolve()
        later = [p.name for p in existing if not inside or p.name > path.name]
        if later:
            raise InputError(
                f"{out_dir} holds other checkpoints ({', '.join(later)}); go on from the newest with "
                f"--resume=auto, delete them, or choose another --out_dir"
            )
    if path is None:
        return None
    state = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True)
    differing = [
        f"{name} {state['identity'].get(name)!r} there, {value!r} here"
        for name, value in identity.items()
        if value is not None and state["identity"].get(name) != value
    ]
    if differing:
        raise InputError(
            f"{path} belongs to another run ({'; '.join(differing)}); take another --out_dir or those values"
        )
    return state | {"path": path}


def fingerprint(value) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# -- metrics -------------------------------------------------------------------------------------------------


class Metrics:
    """A run's numbers: `metrics.jsonl` always, `loss.png`, wandb if wanted, a progress bar on a terminal.

    Rank 0 keeps them; steps count finished optimizer steps, of step_tokens tokens each. `config` has out_dir,
    log_every and wandb; `state` is that of the checkpoint that the run goes on from, if any.
    """

    def __init__(
        self, config, start: int, max_steps: int, step_tokens: int, ranks: Ranks, state: dict | None
    ):
        self.ranks, self.log_every, self.max_steps, self.step_tokens = (
            ranks,
            config.log_every,
            max_steps,
            step_tokens,
        )
        self.path = Path(config.out_dir) / "metrics.jsonl"
        running = ranks.main and start < max_steps
        # None shows the bar on a terminal only
        self.bar = tqdm(total=max_steps, initial=start, unit="step", disable=None if running else True)
        self.rows, self.run = [], None
        self.seconds, self.steps = 0.0, 0  # since the last report
        if ranks.main:  # rows of later steps are made again
            self.rows = [row for row in read_jsonl(self.path) if row["step"] <= start]
            write_jsonl(self.path, self.rows)
        if running:
            self.run = start_wandb(config, state["wandb_id"] if state else None)

    @property
    def wandb_id(self) -> str | None:
        return self.run.id if self.run else None

    def has(self, step: int, name: str) -> bool:
        """Whether a number was recorded under a step; all ranks ask together and get the same answer."""
        return self.ranks.sum(any(row["step"] == step and name in row for row in self.rows))[0] > 0

    def log(self, step: int, **values: float) -> None:
        """Record values under a step, one row for each."""
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
        """Count a finished step; record and print every log_every-th, with the speed since the one before."""
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        speed = self.steps * self.step_tokens / self.seconds
        self.bar.set_postfix_str(f"loss {result['loss']:.3f}, {speed:,.0f} tok/s", refresh=False)
        self.bar.update(step - self.bar.n)
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
        self.say(f"step {step:6d}/{self.max_steps}  val_loss {val_loss:.4f} nats/token{rest}")
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
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=self.path.parent.name)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.path.with_name("loss.png"), dpi=120)

    def close(self) -> None:
        self.bar.close()
        if self.run:
            self.run.finish()


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a metrics file, without a last line that a crash cut short; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Replace a metrics file in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
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
