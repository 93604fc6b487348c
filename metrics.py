"""A run's numbers: `metrics.jsonl` always, `loss.png`, wandb if wanted, a progress bar on a terminal. What
report.py needs besides: `run.json`, the run's settings, and `samples.jsonl`, what pretraining writes.

How fast a run is: FLOPs of a token, the most memory that a device has held, and a profile of a few steps.

C hidden size, H query heads, G key/value heads, D dimensions of a head, F width of the SwiGLU, L blocks,
V vocabulary, T tokens that attention reaches over.
"""

import json
import math
import os
import shlex
import sys
from array import array
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import (
    InputError,
    make_folder,
    one_line,
    read_json,
    read_records,
    replace_file,
    surviving_lost_output,
    visible,
    write_json,
    write_records,
)
from distributed import Ranks
from gpt import GPTConfig

WANDB = ("auto", "online", "offline", "off")
SCORES = ("acc/", "acc_norm/")  # how the names of benchmarks' scores begin, from 0 to 1
CURVES = ("loss", "val_loss", "val_bpb", "lr", "tokens_per_second")  # kept in memory, for loss.png


class Metrics:
    """Records, prints and plots a run's numbers on rank 0.

    Steps count finished optimizer steps, of step_tokens tokens each or on average. A loss is in `unit`.
    `state` is that of the checkpoint that the run goes on from, if any. `settings` are what wandb and the
    report show of the run. flops_per_token is what training takes, and peak_flops what a rank's device
    reaches at best in a second; without them no share of the peak (mfu) is told.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        start: int,
        max_steps: int,
        step_tokens: int,
        log_every: int,
        ranks: Ranks,
        state: dict | None = None,
        wandb: str = "off",
        settings: dict | None = None,
        unit: str = "nats/token",
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
    ):
        self.ranks, self.log_every, self.max_steps = ranks, log_every, max_steps
        self.step_tokens, self.unit = step_tokens, unit
        self.peak_speed = None  # tokens a second, if all ranks did matrix products only, at their peak
        if flops_per_token and peak_flops:
            self.peak_speed = ranks.world * peak_flops / flops_per_token
        self.path = Path(out_dir) / "metrics.jsonl"
        running = ranks.is_main and start < max_steps
        # None shows the bar on a terminal only
        self.bar = tqdm(
            total=max_steps, initial=start, unit="step", disable=None if running else True, dynamic_ncols=True
        )
        self.row, self.row_at, self.run = {}, 0, None  # the last row, and where in the file it begins
        self.points = {name: (array("q"), array("d")) for name in CURVES}
        self.scores = {}  # of benchmarks: the last of each, with its step
        own = Path(out_dir).resolve()
        parent = state["path"].resolve().parent if state else own
        forked = parent != own  # begun from another run's checkpoint
        self.wandb_id = state["wandb_id"] if state and not forked else None  # kept while wandb is off
        self.seconds, self.steps, self.tokens = 0.0, 0, 0  # since the last report
        self.recorded = 0.0  # of these seconds, those that stand in a row already
        if ranks.is_main:  # at step 0 nothing was saved, and what stands there may be another run's
            self.keep_rows(parent, start or -1)
        self.draws = find_spec("matplotlib") is not None
        if running:
            if not self.draws:
                print("matplotlib is not installed, so there will be no loss.png", file=sys.stderr)
            self.begin_run(wandb, settings or {})
        if state:
            done = start >= max_steps
            ranks.print(f"{state['path']} is finished" if done else f"continuing from {state['path']}")

    def begin_run(self, wandb: str, settings: dict) -> None:
        """Note the start in run.json, and open the run in wandb. A run that died before its first checkpoint
        left its wandb id in a file."""
        note = self.path.with_name("wandb_id")
        if self.wandb_id is None and note.exists() and self.noted_settings() == settings:
            self.wandb_id = note.read_text()
        self.note_run(settings)
        self.run = start_wandb(wandb, self.path.parent, run_id=self.wandb_id, settings=settings)
        if self.run:
            self.wandb_id = self.run.id
            note.write_text(self.wandb_id)

    def keep_rows(self, parent: Path, start: int) -> None:
        """Go on after the rows up to a step, which a parent folder has if the run began in another; those of
        later steps are made again."""
        for name in (self.path.name, "answers.jsonl", "samples.jsonl"):
            if (parent / name).exists():
                rows = [row for row in read_records(parent / name) if row["step"] <= start]
                if rows:
                    write_records(self.path.with_name(name), rows)
                else:
                    self.path.with_name(name).unlink(missing_ok=True)
        rows = [row for row in read_records(self.path) if row["step"] <= start]
        write_records(self.path, rows)
        self.row_at = self.path.stat().st_size
        for row in rows:
            self.note_points(row)
        if rows and rows[-1]["step"] == start:  # it may grow
            self.row, self.row_at = rows[-1], self.row_at - len(line_of(rows[-1]))

    def noted_settings(self) -> dict | None:
        """Those in run.json, of the last start in this folder; None without any."""
        path = self.path.with_name("run.json")
        try:
            return read_json(path).get("settings") if path.exists() else None
        except (InputError, AttributeError):  # damaged: it is written anew
            return None

    def note_run(self, settings: dict) -> None:
        """Write run.json: how the run was started, and on what."""
        device = self.ranks.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        launcher = "python"
        if self.ranks.world > 1:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks.world))
            launcher = f"torchrun --nproc_per_node={local}"
            if self.ranks.world > local:  # on each node
                endpoint = f"{os.environ.get('MASTER_ADDR', 'HOST')}:29500"
                launcher += (
                    f" --nnodes={self.ranks.world // local} --rdzv_backend=c10d --rdzv_endpoint={endpoint}"
                )
        facts = {
            "launcher": launcher,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "devices": f"{self.ranks.world} x {name}, {self.ranks.precision}",
            "unit": self.unit,
            "max_steps": self.max_steps,
            "step_tokens": self.step_tokens,
            "settings": settings,
        }
        write_json(self.path.with_name("run.json"), facts)

    def has(self, step: int, *names: str) -> bool:
        """Whether numbers were recorded under the newest step. All ranks ask together and get the same
        answer."""
        recorded = self.row.get("step") == step and all(self.row.get(name) is not None for name in names)
        return self.ranks.any(recorded)

    def note_points(self, row: dict) -> None:
        for name, (steps, values) in self.points.items():
            if row.get(name) is not None and not (name == "loss" and "skipped" in row):
                steps.append(row["step"])
                values.append(row[name])
        self.scores |= {name: (row["step"], row[name]) for name in row if name.startswith(SCORES)}

    def log(self, step: int, **values: float | str) -> None:
        """Add values to the row of a step, the last one or a new one; what is not finite becomes null."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if self.ranks.is_main:
            if self.row and self.row["step"] != step:
                self.row, self.row_at = {}, self.row_at + len(line_of(self.row))
            self.row = {"step": step, **self.row, **row}
            with open(self.path, "r+b") as file:  # the last row is written over
                file.seek(self.row_at)
                file.write(line_of(self.row))
                file.truncate()  # numbers logged anew may be shorter
            self.note_points({"step": step, **row})
        if self.run:  # with an axis of its own: wandb drops what is logged below its last step
            self.run.log({"step": step, **row})

    def print(self, lines: Sequence[str]) -> None:
        """Print lines, above the progress bar if there is one."""
        if self.ranks.is_main:
            with surviving_lost_output():
                for line in lines:
                    self.bar.write(visible(line))
                sys.stdout.flush()

    def step(self, step: int, numbers: dict[str, float], *, seconds: float) -> None:
        """Count a finished step. Record and print every log_every-th, with the speed since the one before,
        and each that was skipped. All ranks call it for the same steps.

        `numbers` are the step's loss, grad_norm, lr and targets; under "skipped" why it was, or None; and
        under "step_tokens" how many tokens it had, where steps differ in that. `seconds` are those of the
        whole step, waiting for other ranks included; validations and saves are not part of a step.
        """
        values = {k: v for k, v in numbers.items() if v is not None and k != "step_tokens"}
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        self.tokens += numbers.get("step_tokens", self.step_tokens)
        speed = self.tokens / self.seconds
        self.bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {speed:,.0f} tok/s", refresh=False)
        self.bar.update(step - self.bar.n)
        if "skipped" in values:
            self.log(step, **values)
            self.print([f"{self.place(step)}skipped: {values['skipped']}"])
        if step % self.log_every and step != self.max_steps:
            return
        left = tqdm.format_interval(self.seconds / self.steps * (self.max_steps - step))
        costs, told = self.costs(speed)
        costs["seconds"] = round(self.seconds - self.recorded, 3)
        self.log(step, tokens=step * self.step_tokens, **values, tokens_per_second=round(speed), **costs)
        slow = self.ranks.slow_one()
        self.print(
            [
                f"{self.place(step)}loss {values['loss']:7.4f} {self.unit}  lr {values['lr']:.2e}  "
                f"grad norm {values['grad_norm']:7.3f}  {speed:9,.0f} tok/s  {told}{left:>8} left",
                *([slow] if slow else []),
            ]
        )
        self.seconds, self.steps, self.tokens, self.recorded = 0.0, 0, 0, 0.0

    def saved(self, step: int, seconds: float) -> None:
        """Record how long a save stopped training, and the steps' time so far: from here a run may go on."""
        values = {"save_seconds": round(seconds, 3)}
        if self.seconds > self.recorded:
            values["seconds"] = round(self.seconds - self.recorded, 3)
            self.recorded = self.seconds
        self.log(step, **values)

    def costs(self, speed: float) -> tuple[dict[str, float], str]:
        """What a speed is of the devices' peak (mfu, from 0 to 1) and the most GB that rank 0's GPU has held
        (memory_gb), each where it is known: for the row, and for the line."""
        costs, told = {}, ""
        if self.peak_speed:
            costs["mfu"] = round(speed / self.peak_speed, 4)
            told += f"{100 * speed / self.peak_speed:4.1f}% mfu  "
        memory = peak_memory(self.ranks.device)
        if memory is not None:
            costs["memory_gb"] = round(memory, 3)
            told += f"{memory:6.1f} GB  "
        return costs, told

    def place(self, step: int) -> str:
        """The beginning of a step's lines; as wide for all steps."""
        return f"step {step:{max(6, len(str(self.max_steps)))}d}/{self.max_steps}  "

    def validated(self, step: int, val_loss: float, **values: float) -> None:
        """Record and print a validation, and draw the curves."""
        self.log(step, val_loss=val_loss, **values)
        units = {"val_bpb": " bits/byte"}
        told = ((name, value, units.get(name.partition("/")[0], "")) for name, value in values.items())
        rest = "".join(f"  {name} {value:.4f}{unit}" for name, value, unit in told)
        self.print([f"{self.place(step)}val_loss {val_loss:.4f} {self.unit}{rest}"])
        self.plot()

    def scored(self, step: int, scores: dict[str, float]) -> None:
        """Record and print what benchmarks gave."""
        self.log(step, **scores)
        told = "  ".join(f"{name} {100 * value:.1f}%" for name, value in scores.items())
        self.print([f"{self.place(step)}{told}"])

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Record and print what the model wrote."""
        if self.ranks.is_main:
            path = self.path.with_name("samples.jsonl")
            earlier = [row for row in read_records(path) if row["step"] < step]
            write_records(path, earlier + [{"step": step, "text": text} for text in texts])
        self.print([f"  | {text}" for text in texts])

    def last_losses(self) -> list[str]:
        """The last of each loss, with its step and unit, for the model card."""
        units = {"loss": self.unit, "val_loss": self.unit, "val_bpb": "bits/byte"}
        return [
            f"step {steps[-1]}, {name.replace('_', ' ')}: {values[-1]:.4f} {units[name]}"
            for name, (steps, values) in self.points.items()
            if steps and name in units
        ]

    def last_scores(self) -> list[str]:
        """The last of each benchmark's scores, with its step, for the model card."""
        return [f"step {step}, {name}: {100 * value:.1f}%" for name, (step, value) in self.scores.items()]

    def plot(self) -> None:
        """Draw loss.png from all rows so far. What goes wrong with matplotlib costs the picture only."""
        if not self.ranks.is_main or not self.draws:
            return
        try:
            picture = self.drawn()
        except Exception as error:  # an installation that is broken can raise anything
            print(f"warning: there will be no loss.png ({one_line(error)})", file=sys.stderr)
            self.draws = False
        else:
            replace_file(self.path.with_name("loss.png"), picture)

    def drawn(self) -> bytes:
        """A picture of losses, learning rate and speed, of at most some thousand points of each curve."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 6.5), layout="constrained")
        losses, rate, speed = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
        for axes, name, label, style in (
            (losses, "loss", "training", {"alpha": 0.6, "linewidth": 1}),
            (losses, "val_loss", "validation", {"marker": "o", "markersize": 3}),
            (rate, "lr", None, {"color": "C2"}),
            (speed, "tokens_per_second", None, {"color": "C3", "linewidth": 1}),
        ):
            steps, values = self.points[name]
            stride = 1 + len(steps) // 2000
            if steps:
                axes.plot(steps[::stride], values[::stride], label=label, **style)
        losses.set(ylabel=f"loss ({self.unit})")
        losses.set_title(self.path.parent.name, parse_math=False)
        losses.legend()
        rate.set(ylabel="learning rate", ylim=(0, None))
        speed.set(ylabel="tokens/s", xlabel="optimizer step", ylim=(0, None))
        speed.yaxis.set_major_formatter("{x:,.0f}")
        for axes in (losses, rate, speed):
            axes.grid(alpha=0.3)
        figure.align_ylabels()
        picture = BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        return picture.getvalue()

    def close(self) -> None:
        self.bar.close()
        if self.run:
            self.run.finish()


def line_of(row: dict) -> bytes:
    return (json.dumps(row) + "\n").encode()


def has_wandb_key() -> bool:
    """Whether the user set up an API key, in the environment or by `wandb login`."""
    import wandb

    return wandb.login(prompt=False, verify=False)


def start_wandb(mode: str, out_dir: str | Path, *, run_id: str | None, settings: dict):
    """A wandb run, or None. Never a prompt: without a key, or if no server answers, it logs offline.

    wandb's own variables hold: WANDB_PROJECT, and WANDB_MODE where the mode is "auto".
    """
    installed = find_spec("wandb") is not None
    if mode == "auto":
        modes = {"offline": "offline", "dryrun": "offline", "disabled": "off"}
        mode = modes.get(os.environ.get("WANDB_MODE", ""), mode) if installed else "off"
    if mode == "off":
        return None
    if not installed:
        raise InputError(
            f"--wandb={mode} needs wandb, which is not installed; pip install it, or take --wandb=off"
        )
    import wandb

    key = has_wandb_key()
    if mode == "auto" and not key:
        return None
    options = {
        "project": os.environ.get("WANDB_PROJECT") or Path(__file__).parent.name,
        "name": Path(out_dir).name,
        "id": run_id,
        "resume": "allow",
        "config": settings,
        "dir": str(out_dir),
        "settings": wandb.Settings(console="off", silent=True, init_timeout=30),
    }
    run = None
    if mode != "offline" and key:
        try:
            run = wandb.init(mode="online", **options)
        except wandb.errors.Error as error:
            print(f"warning: wandb cannot be reached ({error})", file=sys.stderr)
    if run is None:
        print(f"wandb logs offline, into {out_dir}/wandb; `wandb sync` sends it later", file=sys.stderr)
        run = wandb.init(mode="offline", **options)
    run.define_metric("*", step_metric="step")
    return run


def flops_per_token(config: GPTConfig, T: float) -> float:
    """Floating-point operations to train on a token of a sequence of T: 6 N + 12 L H D T, as in appendix B of
    PaLM (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311).

    N are the weights of all matrix products: those of the blocks, and the head, tied or not. The lookup in
    the embedding and the norms' weights are not among them. Each weight takes a multiplication and an
    addition in the forward pass, and twice that in the backward pass. Attention counts all T keys of a
    query, although causality hides half of them. What is computed twice to save memory is not counted, nor
    is the optimizer.
    """
    C, D, L = config.hidden_size, config.head_dim, config.num_hidden_layers
    H, G, F, V = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
    )
    block = C * D * (H + 2 * G) + H * D * C + 3 * C * F
    return 6 * (L * block + C * V) + 12 * L * H * D * T


def mean_context(lengths: np.ndarray) -> float:
    """T for flops_per_token where sequences differ in length: that of a token's own sequence, on average over
    all tokens. A long sequence has more of them."""
    lengths = lengths.astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def peak_memory(device: torch.device) -> float | None:
    """The most GB (1e9 bytes) that tensors on a GPU have taken so far in this process; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


# -- a profile -----------------------------------------------------------------------------------------------


class Profiler:
    """Records what some steps do, kernel by kernel, and writes it to out_dir/profile/rank0.json.gz, a file a
    rank, for https://ui.perfetto.dev. With 0 steps it does nothing.

    The first steps compile and allocate, so SKIPPED of them are left out. A run that ends amid the recorded
    steps writes what there is; one that ends before says so.
    """

    SKIPPED = 5  # the profiler itself warms up in the last two

    def __init__(self, steps: int, out_dir: str | Path, ranks: Ranks):
        self.path = Path(out_dir) / "profile" / f"rank{ranks.rank}.json.gz"
        self.ranks, self.profile, self.written = ranks, None, False
        if steps:
            make_folder(self.path.parent)
            schedule = torch.profiler.schedule(wait=self.SKIPPED - 2, warmup=2, active=steps, repeat=1)
            self.profile = torch.profiler.profile(schedule=schedule, on_trace_ready=self.write)
            self.profile.start()

    def step(self) -> None:
        """Say that a step has ended."""
        if self.profile:
            self.profile.step()

    def write(self, profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(self.path))
        self.written = True
        self.ranks.print(f"{self.path} is written; https://ui.perfetto.dev shows it")

    def close(self) -> None:
        if self.profile:
            self.profile.stop()
            if not self.written:
                self.ranks.print(f"no profile is written; it begins after {self.SKIPPED} steps of a run")
