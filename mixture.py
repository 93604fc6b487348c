"""Several sources of training data: how a flag names them, their shares, and what is reported of each."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import InputError
from order import CYCLE


@dataclass(frozen=True)
class Source:
    """One part of a mix."""

    name: str  # in reports: the last part of its path, or all of it if two have the same
    path: str  # a folder, a file or what else the flag names
    share: int | None  # of every CYCLE samples; None without weights


def parse_sources(
    text: str | Path, flag: str = "data_dir", exists: Callable[[str], bool] = os.path.isdir
) -> list[Source]:
    """The sources that a flag names, with commas between them: all with a weight, or none.

    A weight stands behind the last colon. Weights count tokens and need not sum to one. What `exists` as it
    is written has no weight. Raises InputError for a weight that is none, or that only some have.

        a:3,b:1 -> shares 7500 and 2500
    """
    text = str(text)
    entries = [split_weight(entry, flag, exists) for entry in ([text] if exists(text) else text.split(","))]
    paths, weights = [path for path, _ in entries], [weight for _, weight in entries]
    lacking = [path for path, weight in entries if weight is None]
    if lacking and len(lacking) < len(paths):
        raise InputError(
            f"--{flag}={text} gives weights to some, but none to {lacking[0]}; give all a weight, as "
            f"{lacking[0]}:0.5, or none"
        )
    shares = [None] * len(paths) if lacking else rounded_shares(paths, weights)
    names = [Path(os.path.abspath(path)).name for path in paths]
    names = [name if names.count(name) == 1 else path for name, path in zip(names, paths)]
    return [Source(name, path, share) for name, path, share in zip(names, paths, shares)]


def split_weight(entry: str, flag: str, exists: Callable[[str], bool]) -> tuple[str, float | None]:
    """The path and the weight of path:weight; None without one."""
    path, colon, text = entry.rpartition(":")
    if not entry.strip():
        raise InputError(f"--{flag} has an empty name in it; give names with commas between them only")
    if not colon or exists(entry):
        return entry, None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not path or not 0 < weight < math.inf:
        raise InputError(
            f"--{flag} names {entry}, which does not exist, and {text!r} is no weight; expected path:weight "
            f"with a number above zero"
        )
    return path, weight


def rounded_shares(names: Sequence[str], weights: Sequence[float]) -> list[int]:
    """Weights as shares that sum to CYCLE, by largest remainder; InputError for one that rounds to none."""
    exact = [weight / sum(weights) * CYCLE for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: CYCLE - sum(shares)]:
        shares[i] += 1
    for name, share, weight in zip(names, shares, weights):
        if not share:
            raise InputError(
                f"{name} has the weight {weight:g} of {sum(weights):g}, less than one window in {CYCLE:,}; "
                f"raise it, or leave the folder out"
            )
    return shares


def taken(shares: Sequence[float], sizes: Sequence[int], most: int) -> list[int]:
    """How many of each source's samples are taken for a validation: its share of `most` in all (0: all that
    it has), and at least one."""
    return [min(n, max(1, round(most * share))) if most else n for n, share in zip(sizes, shares)]


def validation_numbers(
    names: Sequence[str],
    shares: Sequence[float],
    counts: Sequence[int],
    sums: Sequence[tuple[float, float, int]],
    text_bytes: Sequence[int] | None = None,
) -> dict[str, float]:
    """The losses of a validation, from what `evaluate` gave for `counts` samples of each source: with the
    bytes of text that they spell in bits per byte, without in hits, too.

    A source's sums are scaled to its share, however many samples it had. So val_loss is that of a token of
    the mix. Of several sources each has its own val_loss/NAME, too.
    """
    scales = [share * (sum(counts) / count) for share, count in zip(shares, counts)]
    nats, hits, targets = (
        sum(scale * value for scale, value in zip(scales, values)) for values in zip(*sums)
    )
    numbers = {"val_loss": nats / targets}
    if text_bytes is None:
        numbers["val_accuracy"] = hits / targets
    else:
        read = sum(scale * count for scale, count in zip(scales, text_bytes))
        numbers["val_bpb"] = nats / math.log(2) / read
    own = {f"val_loss/{name}": nats / targets for name, (nats, _, targets) in zip(names, sums)}
    return numbers | (own if len(own) > 1 else {})


def epochs_read(names: Sequence[str], shares: Sequence[float], sizes: Sequence[int], read: int) -> dict:
    """How often each of several sources was read when so many samples were, as epochs/NAME."""
    if len(names) == 1:
        return {}
    return {f"epochs/{name}": read * share / n for name, share, n in zip(names, shares, sizes)}


def mix_report(
    names: Sequence[str], shares: Sequence[float], sizes: Sequence[int], *, read: int, unit: str
) -> list[str]:
    """A line on each of several sources, for a run that reads so many samples."""
    epochs, width = epochs_read(names, shares, sizes, read), max(map(len, names))
    return [
        f"  {name:<{width}}  {share:7.2%} of the tokens; {n:,} {unit}, {epochs[f'epochs/{name}']:.2f} epochs"
        for name, share, n in zip(names, shares, sizes)
        if epochs
    ]
