"""Several sources of training data: how a flag names them, their shares, and what is reported of each."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import InputError
from order import CYCLE


@dataclass(frozen=True)
class Source:
    """One folder of a mix."""

    name: str  # in reports: the folder's own name, or the path as given if two have the same
    folder: Path
    share: int | None  # of every CYCLE windows; None without weights


def parse_sources(data_dir: str | Path) -> list[Source]:
    """The folders that --data_dir names, with commas between them: all with a weight, or none.

    A weight stands behind the last colon. Weights count tokens and need not sum to one. Raises InputError for
    a weight that is none, for weights that only some have, and for a folder that is named twice.

        a:3,b:1 -> shares 7500 and 2500
    """
    text = str(data_dir)
    entries = [split_weight(entry) for entry in ([text] if os.path.isdir(text) else text.split(","))]
    paths, weights = [path for path, _ in entries], [weight for _, weight in entries]
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise InputError(f"--data_dir={text} names a folder twice; name it once, with the sum of its weights")
    lacking = [path for path, weight in entries if weight is None]
    if lacking and len(lacking) < len(paths):
        raise InputError(
            f"--data_dir={text} gives weights to some folders, but none to {lacking[0]}; give all a weight, "
            f"as {lacking[0]}:0.5, or none"
        )
    shares = [None] * len(paths) if lacking else rounded_shares(paths, weights)
    names = [Path(os.path.abspath(path)).name for path in paths]
    names = [name if names.count(name) == 1 else path for name, path in zip(names, paths)]
    return [Source(name, Path(path), share) for name, path, share in zip(names, paths, shares)]


def split_weight(entry: str) -> tuple[str, float | None]:
    """The path and the weight of path:weight; None without one. What is itself a folder has none."""
    path, colon, text = entry.rpartition(":")
    if not entry.strip():
        raise InputError("--data_dir has an empty name in it; give folders with commas between them only")
    if not colon or os.path.isdir(entry):
        return entry, None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not path or not 0 < weight < math.inf:
        raise InputError(
            f"--data_dir names {entry}, which is no folder, and {text!r} is no weight; expected path:weight "
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


def validation_numbers(
    names: Sequence[str],
    shares: Sequence[float],
    sums: Sequence[tuple[float, float, int]],
    text_bytes: Sequence[int],
) -> dict[str, float]:
    """The losses of a validation, from what `evaluate` gave for each source and the bytes that it read.

    A source's sums are scaled to its share of all targets, however many it had. So val_loss is that of a
    token of the mix. Of several sources each has its own val_loss/NAME, too.
    """
    total = sum(targets for _, _, targets in sums)
    scales = [share * (total / targets) for share, (_, _, targets) in zip(shares, sums)]
    nats = sum(scale * nats for scale, (nats, _, _) in zip(scales, sums))
    read = sum(scale * count for scale, count in zip(scales, text_bytes))
    own = {f"val_loss/{name}": nats / targets for name, (nats, _, targets) in zip(names, sums)}
    numbers = {"val_loss": nats / total, "val_bpb": nats / math.log(2) / read}
    return numbers | (own if len(own) > 1 else {})
