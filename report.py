"""A run in one page, or two runs side by side: curves, what the model wrote, evaluation, settings, commands.

    python report.py out/chat               # writes out/chat/report.html
    python report.py out/first out/second   # writes out/second/report_first_second.html

The page needs no other file and no network. The training scripts write it at the end of a run; it can be made
at any time, of a running or a stopped run, too.
"""

import itertools
import math
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from safetensors import SafetensorError, safe_open

from checkpoint import list_checkpoints
from common import InputError, one_line, read_json, read_records, replace_file
from huggingface import weight_files

# What a logged step has; all else in a row is an evaluation's.
STEP_VALUES = (
    "step loss lr grad_norm targets tokens tokens_per_second mfu memory_gb seconds save_seconds skipped"
).split()
MOST_SAMPLES, MOST_CHARACTERS = 12, 300  # of a page, and of a sample
POINTS = 600  # of a curve, at most


@dataclass
class Run:
    """What a run's folder holds."""

    folder: Path
    rows: list[dict]  # of metrics.jsonl
    facts: dict  # run.json; empty for a run of before it was written
    texts: list[dict]  # what the model wrote: rows of answers.jsonl or samples.jsonl

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """Raises InputError for a folder without metrics, and for a damaged run.json."""
        folder = Path(folder)
        rows, *texts = (
            [row for row in read_records(folder / name) if isinstance(row.get("step"), int)]
            for name in ("metrics.jsonl", "answers.jsonl", "samples.jsonl")
        )
        if not rows:
            raise InputError(f"{folder} holds no metrics.jsonl with rows; name a training run's --out_dir")
        facts = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
        return cls(folder, rows, facts, texts[0] or texts[1])

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def settings(self) -> dict:
        return self.facts.get("settings", {})

    @property
    def unit(self) -> str:
        """Of its losses."""
        return self.facts.get("unit", "nats/token")

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) wherever a number was logged and finite, but for the losses of skipped steps."""
        rows = [row for row in self.rows if name != "loss" or not row.get("skipped")]
        numbers = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        return [(step, number) for step, number in numbers if math.isfinite(number)]

    def evaluations(self) -> dict[str, list[tuple[float, float]]]:
        """The curve of each number that is not a step's own, in the order of first appearance."""
        names = dict.fromkeys(name for row in self.rows for name in row if name not in STEP_VALUES)
        return {name: curve for name in names if (curve := self.curve(name))}

    def written(self, step: int) -> dict[str, str]:
        """What the model wrote at a step, by its question, or by its number where there was none."""
        rows = [row for row in self.texts if row["step"] == step][:MOST_SAMPLES]
        return {
            row.get("question", f"sample {i}"): shortened(row.get("answer", row.get("text", "")))
            for i, row in enumerate(rows, 1)
        }

    def parameters(self) -> int | None:
        """How many numbers the newest checkpoint's weights are; None without a readable one."""
        for checkpoint in reversed(list_checkpoints(self.folder)):
            try:
                return sum(numbers_in(path) for path in set(weight_files(checkpoint)))
            except (OSError, SafetensorError, InputError) as error:
                print(f"warning: the weights in {checkpoint} cannot be read ({error})", file=sys.stderr)
        return None


def numbers_in(path: Path) -> int:
    """How many numbers a file of weights holds; they are not read."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def heads_of(runs: Sequence[Run]) -> list[str]:
    """What tells runs apart: their folders' names, with the path if that is the same; nothing for one run."""
    if len(runs) == 1:
        return [""]
    names = [run.folder.name for run in runs]
    return names if len(set(names)) == len(names) else [run.name for run in runs]


# -- numbers -------------------------------------------------------------------------------------------------


def short(value: float) -> str:
    """A number as an axis or a table shows it: 0.003, 4.42, 12.3k, 1.2M."""
    for limit, unit, letter in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def shortened(text: str) -> str:
    """A text in one line of at most MOST_CHARACTERS."""
    text = " ".join(text.split())
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 4 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, three to six."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= max(factor for factor in (1, 2, 2.5, 5) if 3 * step * factor <= (high - low) * (1 + 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about POINTS of the points, the last one among them."""
    return [*points[: -1 : 1 + len(points) // POINTS], points[-1]]


# -- curves as SVG -------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 400, 230, 46, 22, 8, 12  # of a chart, in its own units


@dataclass
class Series:
    """A curve of a chart."""

    label: str
    points: list[tuple[float, float]]
    colour: str  # the class that colours it: run0, run1
    marked: bool = False  # a dot at each point, as for few validations; else a thin line


def chart(title: str, series: Sequence[Series], *, from_zero: bool) -> str:
    """A figure with the curves that have points; empty if none has. `from_zero`: the y axis begins there."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs, ys = zip(*itertools.chain.from_iterable(one.points for one in series))
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    margin = 0.04 * (high - low) or abs(high) / 2 or 1.0
    low, high = (low if from_zero else low - margin), high + margin
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - first) / (last - first), (y - low) / (high - low)
        right, down = LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)
        return round(right, 1), round(down, 1)

    parts = []
    for y in ticks(low, high):
        _, down = place(first, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{down + 4}" text-anchor="end">{short(y)}</text>')
    for x in ticks(first, last):
        right, _ = place(x, low)
        parts.append(f'<text x="{right}" y="{HEIGHT - 6}" text-anchor="middle">{short(x)}</text>')
    for one in series:
        places = [place(*point) for point in thinned(one.points)]
        line = " ".join(f"{right},{down}" for right, down in places)
        kind = f"{one.colour} marked" if one.marked else one.colour
        parts.append(f'<polyline class="{kind}" points="{line}"/>')
        if one.marked or len(places) == 1:
            parts += [f'<circle class="{one.colour}" cx="{r}" cy="{d}" r="2.5"/>' for r, d in places]
    names = "".join(
        f'<span class="{one.colour}{" marked" if one.marked else ""}">{escape(one.label)}</span>'
        for one in series
        if one.label
    )
    return (
        f"<figure><figcaption>{escape(title)}{names}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"</figure>"
    )


def charts(runs: Sequence[Run]) -> Iterator[str]:
    """The charts of a page, all runs in each. Where a step's tokens differ, over tokens instead of steps."""
    sizes = {run.facts.get("step_tokens") for run in runs}
    over_tokens = len(sizes) > 1 and None not in sizes
    axis = "tokens" if over_tokens else "step"

    def series(name: str, label: str, *, marked: bool = False) -> list[Series]:
        several = []
        for i, (run, head) in enumerate(zip(runs, heads_of(runs))):
            scale = run.facts["step_tokens"] if over_tokens else 1
            points = [(step * scale, value) for step, value in run.curve(name)]
            several.append(Series(f"{head} {label}".strip(), points, f"run{i}", marked))
        return several

    unit = " or ".join(dict.fromkeys(run.unit for run in runs))
    losses = series("loss", "training") + series("val_loss", "validation", marked=True)
    yield chart(f"loss, {unit}, by {axis}", losses, from_zero=False)
    yield chart(f"learning rate, by {axis}", series("lr", ""), from_zero=True)
    yield chart(f"tokens/s, by {axis}", series("tokens_per_second", ""), from_zero=True)
    yield chart(f"gradient norm, by {axis}", series("grad_norm", ""), from_zero=True)


# -- tables --------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table of texts; a row whose values differ from run to run is marked in one of kind "compared"."""
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"] if any(head) else []
    for name, *values in rows:
        differs = kind == "compared" and len({*values} - {"–"}) > 1
        cells = "".join(
            f'<td data-head="{escape(above)}">{escape(value)}</td>' for above, value in zip(head[1:], values)
        )
        lines.append(f"<tr{' class=differs' if differs else ''}><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>' if rows else ""


def summary(run: Run) -> dict[str, str]:
    """What matters of a run, in short texts."""
    last, steps = run.rows[-1]["step"], run.facts.get("max_steps")
    told = {"steps": f"{last:,} of {steps:,}" if steps else f"{last:,}"}
    if tokens := run.curve("tokens"):
        told["tokens"] = short(tokens[-1][1])
    for name, title, unit in (
        ("loss", "training loss", run.unit),
        ("val_loss", "validation loss", run.unit),
        ("val_bpb", "validation by bytes", "bits/byte"),
    ):
        if curve := run.curve(name):
            told[title] = f"{curve[0][1]:.3f} → {curve[-1][1]:.3f} {unit}"
    if seconds := run.curve("seconds"):
        told["time of all steps"] = duration(sum(value for _, value in seconds))
    if speeds := sorted(value for _, value in run.curve("tokens_per_second")):
        told["speed"] = f"{speeds[len(speeds) // 2]:,.0f} tokens/s, the median"
    if skipped := [row for row in run.rows if row.get("skipped")]:
        told["skipped steps"] = f"{len(skipped)}, the last because {skipped[-1]['skipped']}"
    if parameters := run.parameters():
        told["parameters"] = f"{parameters:,}"
    if "devices" in run.facts:
        told["devices"] = run.facts["devices"]
    return told


def side_by_side(columns: Sequence[dict[str, str]]) -> list[list[str]]:
    """Rows of a name and what each column has under it, or a dash."""
    names = dict.fromkeys(itertools.chain.from_iterable(columns))
    return [[name, *(column.get(name, "–") for column in columns)] for name in names]


def samples(runs: Sequence[Run]) -> str:
    """What a run's model wrote first and last; of several runs what each wrote last."""
    heads, columns = [], []
    for run, head in zip(runs, heads_of(runs)):
        steps = sorted({row["step"] for row in run.texts})
        for step in steps[-1:] if len(runs) > 1 else dict.fromkeys((*steps[:1], *steps[-1:])):
            heads.append(f"{head} step {step}".strip())
            columns.append(run.written(step))
    return table(["", *heads], side_by_side(columns), kind="texts")


def evaluation(runs: Sequence[Run]) -> str:
    """Each number of the evaluations, first and last."""
    columns = [
        {
            name: f"{curve[0][1]:.4g} → {curve[-1][1]:.4g}" if len(curve) > 1 else f"{curve[0][1]:.4g}"
            for name, curve in run.evaluations().items()
        }
        for run in runs
    ]
    return table(["", *heads_of(runs)], side_by_side(columns))


def commands(run: Run) -> list[tuple[str, str]]:
    """How to go on from a run: what for, and the command."""
    folder = shlex.quote(run.name)
    told = []
    if "command" in run.facts:
        stopped = run.rows[-1]["step"] < run.facts["max_steps"]
        what = "it is not finished; the same command continues it" if stopped else "it was made by"
        told.append((what, f"{run.facts.get('launcher', 'python')} {run.facts['command']}"))
    if "data_dir" in run.settings:
        told += [
            ("fine-tune it to chat", f"python sft_gpt.py --model={folder} --out_dir=out/chat"),
            (
                "go on with other text",
                f"python pretrain_gpt.py --init_from={folder} --data_dir=data/mine --out_dir=out/next",
            ),
        ]
    else:
        told += [
            ("talk to it", f"python chat.py --model={folder}"),
            ("in a browser", f"python chat.py --model={folder} --web"),
        ]
        if "batch_pairs" not in run.settings:
            told.append(("tune it on preferences", f"python dpo_gpt.py --model={folder} --out_dir=out/dpo"))
    told.append(("score it", f"bash eval.sh {folder}"))
    if checkpoints := list_checkpoints(run.folder):
        opened = f'AutoModelForCausalLM.from_pretrained("{checkpoints[-1]}")'
        told.append(("open it with transformers", opened))
    told.append(("compare it with another run", f"python report.py {folder} out/other"))
    return told


# -- the page ------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#dde0e5, #363b43); --dim: light-dark(#5f6673, #9aa3b2);
        --first: light-dark(#1a5fb4, #78aeed); --second: light-dark(#c64600, #ffa348);
        --mark: light-dark(#fff3d6, #45391a); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 1rem;
       overflow-wrap: break-word; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .9rem; } svg { width: 100%; height: auto; display: block; }
figcaption span { display: inline-block; margin-left: .8rem; } figcaption span::before { content: "— "; }
figcaption span.marked::before { content: "● "; }
svg text { font-size: 12px; fill: var(--dim); } svg .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 1; opacity: .75; } polyline.marked { stroke-width: 2; opacity: 1; }
.run0 { stroke: var(--first); } .run1 { stroke: var(--second); }
circle.run0, span.run0 { fill: var(--first); color: var(--first); }
circle.run1, span.run1 { fill: var(--second); color: var(--second); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
         border-top: 1px solid var(--line); }
th { font-weight: 600; } tr > th:first-child { white-space: nowrap; } .differs { background: var(--mark); }
.texts { width: 100%; table-layout: fixed; } .texts tr > th:first-child { width: 20%; white-space: normal; }
@media (max-width: 40rem) { .texts tr, .texts th, .texts td { display: block; border-top: 0; }
  .texts tr > th:first-child { width: auto; }
  .texts tr { border-top: 1px solid var(--line); padding: .4rem 0; } .texts tr:first-child { display: none; }
  .texts td { padding: .1rem 0 .1rem .8rem; border-left: 3px solid var(--line); margin: .4rem 0; }
  .texts td::before { content: attr(data-head); display: block; color: var(--dim); font-size: .8rem; } }
"""


def page(runs: Sequence[Run]) -> str:
    """The report of one run, or of two side by side. All text of the runs is escaped."""
    title = " and ".join(run.name for run in runs)
    settings = [{name: str(value) for name, value in run.settings.items()} for run in runs]
    data = {"data_dir", "data", "model", "init_from", "tokenizer", "data_config", "data_split"}
    read = [{name: value for name, value in one.items() if name in data and value} for one in settings]
    rest = [{name: value for name, value in one.items() if name not in data} for one in settings]
    heads = ["", *heads_of(runs)]
    going_on = "".join(
        f"<p>{escape(what[0].upper() + what[1:])}:<br><code>{escape(how)}</code></p>"
        for what, how in commands(runs[-1])
    )
    sections = {
        "Summary": table(heads, side_by_side([summary(run) for run in runs])),
        "Curves": f'<div class="charts">{"".join(charts(runs))}</div>',
        "What the model writes": samples(runs),
        "Evaluation, first → last": evaluation(runs),
        "Data": table(heads, side_by_side(read), kind="compared"),
        "Settings": table(heads, side_by_side(rest), kind="compared"),
        "How to go on" + (f" with {runs[-1].name}" if len(runs) > 1 else ""): going_on,
    }
    body = "".join(f"<h2>{escape(head)}</h2>\n{text}\n" for head, text in sections.items() if text)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{body}</body>\n</html>\n"
    )


def write_report(*folders: str | Path) -> Path:
    """Write the page of one run into its folder, or of two into the second's; returns its path."""
    runs = [Run.read(folder) for folder in folders]
    names = "_".join(["report", *(run.folder.resolve().name for run in runs if len(runs) > 1)])
    path = runs[-1].folder / f"{names}.html"
    content = page(runs).encode("utf-8", errors="replace")
    try:
        replace_file(path, content)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({one_line(error)}); copy the run to a folder of yours"
        ) from error
    return path


def report_end(out_dir: str | Path) -> None:
    """Write a finished run's report and tell where it is. The run is whole without it: what goes wrong here
    is printed, and the run's status stays what it was."""
    try:
        print(f"\nThe run in one page: {write_report(out_dir)}")
    except Exception:  # whatever it is
        traceback.print_exc()
        print(
            f"warning: no report was written (see above); python report.py {out_dir} tries again",
            file=sys.stderr,
        )


def main(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
    elif not 1 <= len(arguments) <= 2:
        raise InputError(f"{len(arguments)} folders were named; expected a run's folder, or two to compare")
    else:
        print(write_report(*arguments))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
