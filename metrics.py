"""A run's numbers: `metrics.jsonl` always, `loss.png`, wandb if wanted, a progress bar on a terminal."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from common import read_records, replace_file, write_records
from distributed import Ranks

WANDB = ("auto", "online", "offline", "off")


class Metrics:
    """Records, prints and plots a run's numbers on rank 0.

    Steps count finished optimizer steps, of step_tokens tokens each. A loss is in `unit`. `state` is that of
    the checkpoint that the run goes on from, if any. `settings` are what wandb shows of the run.
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
    ):
        self.ranks, self.log_every, self.max_steps = ranks, log_every, max_steps
        self.step_tokens, self.unit = step_tokens, unit
        self.path = Path(out_dir) / "metrics.jsonl"
        running = ranks.is_main and start < max_steps
        # None shows the bar on a terminal only
        self.bar = tqdm(total=max_steps, initial=start, unit="step", disable=None if running else True)
        self.rows, self.run = [], None
        self.wandb_id = state["wandb_id"] if state else None  # kept while wandb is off
        self.seconds, self.steps = 0.0, 0  # since the last report
        if ranks.is_main:  # rows of later steps are made again
            self.rows = [row for row in read_records(self.path) if row["step"] <= start]
            write_records(self.path, self.rows)
        if running:
            self.run = start_wandb(wandb, out_dir, run_id=self.wandb_id, settings=settings or {})
            self.wandb_id = self.run.id if self.run else self.wandb_id
        if state:
            done = start >= max_steps
            ranks.print(f"{state['path']} is finished" if done else f"continuing from {state['path']}")

    def has(self, step: int, name: str) -> bool:
        """Whether a number was recorded under a step. All ranks ask together and get the same answer."""
        return self.ranks.any(any(row["step"] == step and name in row for row in self.rows))

    def log(self, step: int, **values: float | str) -> None:
        """Record values under a step, one row for each step; what is not finite as null, as JSON wants it."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if self.ranks.is_main:
            if self.rows and self.rows[-1]["step"] == step:
                self.rows[-1] |= values
                write_records(self.path, self.rows)
            else:
                self.rows.append({"step": step, **values})
                with open(self.path, "a") as file:
                    file.write(json.dumps(self.rows[-1]) + "\n")
        if self.run:
            self.run.log(values, step=step)

    def print(self, lines: Sequence[str]) -> None:
        """Print lines, above the progress bar if there is one."""
        if self.ranks.is_main:
            for line in lines:
                self.bar.write(line)
            sys.stdout.flush()

    def step(self, step: int, numbers: dict[str, float], *, seconds: float) -> None:
        """Count a finished step. Record and print every log_every-th, with the speed since the one before,
        and each that was skipped.

        `numbers` are the step's loss, grad_norm, lr and targets, and under "skipped" why it was, or None.
        """
        values = {name: value for name, value in numbers.items() if value is not None}
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        speed = self.steps * self.step_tokens / self.seconds
        self.bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {speed:,.0f} tok/s", refresh=False)
        self.bar.update(step - self.bar.n)
        if "skipped" in values:
            self.log(step, **values)
            self.print([f"step {step:6d}/{self.max_steps}  skipped: {values['skipped']}"])
        if step % self.log_every and step != self.max_steps:
            return
        left = tqdm.format_interval(self.seconds / self.steps * (self.max_steps - step))
        self.log(step, tokens=step * self.step_tokens, **values, tokens_per_second=round(speed))
        self.print(
            [
                f"step {step:6d}/{self.max_steps}  loss {values['loss']:7.4f}  lr {values['lr']:.2e}  "
                f"grad norm {values['grad_norm']:6.3f}  {speed:9,.0f} tok/s  {left} left"
            ]
        )
        self.seconds, self.steps = 0.0, 0

    def validated(self, step: int, val_loss: float, **values: float) -> None:
        """Record and print a validation, and draw the curves."""
        self.log(step, val_loss=val_loss, **values)
        rest = "".join(f"  {name} {value:.4f}" for name, value in values.items())
        self.print([f"step {step:6d}/{self.max_steps}  val_loss {val_loss:.4f} {self.unit}{rest}"])
        self.plot()

    def last_losses(self) -> list[str]:
        """The last of each loss, with its step and unit, for the model card."""
        lines = []
        for name, unit in (("loss", self.unit), ("val_loss", self.unit), ("val_bpb", "bits/byte")):
            for row in [row for row in self.rows if row.get(name) is not None][-1:]:
                lines.append(f"step {row['step']}, {name.replace('_', ' ')}: {row[name]:.4f} {unit}")
        return lines

    def plot(self) -> None:
        """Draw loss.png from all rows so far."""
        if not self.ranks.is_main:
            return
        from io import BytesIO

        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, label, style in (
            ("loss", "training", {"alpha": 0.6, "linewidth": 1}),
            ("val_loss", "validation", {"marker": "o", "markersize": 3}),
        ):
            points = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points), label=label, **style)
        axes.set(xlabel="optimizer step", ylabel=f"loss ({self.unit})", title=self.path.parent.name)
        axes.grid(alpha=0.3)
        axes.legend()
        picture = BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        replace_file(self.path.with_name("loss.png"), picture.getvalue())

    def close(self) -> None:
        self.bar.close()
        if self.run:
            self.run.finish()


def has_wandb_key() -> bool:
    """Whether the user set up an API key, in the environment or by `wandb login`."""
    import wandb

    return wandb.login(prompt=False, verify=False)


def start_wandb(mode: str, out_dir: str | Path, *, run_id: str | None, settings: dict):
    """A wandb run, or None. Never a prompt: without a key, or if no server answers, it logs offline."""
    if mode == "off":
        return None
    import wandb

    key = has_wandb_key()
    if mode == "auto" and not key:
        return None
    options = {
        "project": Path(__file__).parent.name,
        "name": Path(out_dir).name,
        "id": run_id,
        "resume": "allow",
        "config": settings,
        "dir": str(out_dir),
        "settings": wandb.Settings(console="off", silent=True, init_timeout=30),
    }
    if mode != "offline" and key:
        try:
            return wandb.init(mode="online", **options)
        except wandb.errors.Error as error:
            print(f"warning: wandb cannot be reached ({error})", file=sys.stderr)
    print(f"wandb logs offline, into {out_dir}/wandb; `wandb sync` sends it later", file=sys.stderr)
    return wandb.init(mode="offline", **options)
