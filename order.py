"""Which samples a step reads, of one source or of several: a pure function of (seed, step). How a flag names
several sources, their shares, and what is reported of each."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from common import InputError

CYCLE = 10_000  # positions in which a mix of sources has exactly its shares
PIECES = (8, 4, 2)  # of a window, in each third of a length warm-up


def mix(x: np.ndarray, key: int) -> np.ndarray:
    """A well-mixed 64-bit hash of integers (the finalizer of MurmurHash3, with a key)."""
    x = x ^ np.uint64(key)
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(multiplier)
    return x ^ (x >> np.uint64(33))


def shuffled(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a keyed permutation of 0 … n-1 sends each index, in constant memory.

    A Feistel network permutes 0 … 4^k - 1, the smallest such range that covers n. Outputs from n up go
    through it again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    x = np.asarray(index, np.uint64)
    outside = np.ones(x.shape, bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & low
        for turn in range(6):
            left, right = right, left ^ (mix(right, key + turn * 0x9E3779B97F4A7C15 & 2**64 - 1) & low)
        x[outside] = left << half | right
        outside = x >= n
    return x.astype(np.int64)


def hash_of(seed: int, number: int) -> int:
    """A 64-bit hash of a seed, of any size, and a number."""
    return int(mix(np.array([number], np.uint64), int(mix(np.array([seed % 2**64], np.uint64), 0)[0]))[0])


def samples_at(positions: np.ndarray, seed: int, n: int) -> np.ndarray:
    """Which of n samples are read at some positions. Each epoch is a fresh permutation of all samples."""
    order = np.empty(len(positions), np.int64)
    for epoch in np.unique(positions // n):
        here = positions // n == epoch
        order[here] = shuffled(positions[here] % n, n, hash_of(seed, int(epoch)))
    return order


def batch_order(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """Which of n samples make up a step's global batch."""
    return samples_at(np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64), seed, n)


def window_pieces(step: int, warmup_steps: int) -> int:
    """Into how many sequences a step cuts each window: 8, 4, then 2, in a third of the warm-up each; then 1.

    Shorter sequences cost less, and a model learns from what is near first (Press et al. 2020,
    https://arxiv.org/abs/2012.15832; Li et al. 2021, https://arxiv.org/abs/2108.06084).
    """
    return PIECES[3 * step // warmup_steps] if step < warmup_steps else 1


def mean_length(T: int, warmup_fraction: float) -> float:
    """How long a token's sequence is on average over a run with windows of T and such a length warm-up."""
    shorter = sum(1 / pieces for pieces in PIECES) / len(PIECES)
    return T * (1 - warmup_fraction + warmup_fraction * shorter)


@lru_cache(8)
def cycle(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each of a cycle's sum(shares) positions: its source, and how many earlier ones have that source.

    A source's positions are spread evenly. So any B consecutive positions hold its share of B, give or
    take a few.

        cycle((3, 1)) -> [0, 0, 1, 0], [0, 1, 0, 2]
    """
    sources = np.repeat(np.arange(len(shares)), shares)
    earlier = np.concatenate([np.arange(share) for share in shares])
    moments = (earlier + 0.5) / np.repeat(shares, shares)  # in the cycle, from 0 to 1
    order = np.argsort(moments, kind="stable")
    return sources[order], earlier[order]


def mixed_positions(step: int, batch_size: int, shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each position of a step's global batch: its source, and the sample's number in that source's order,
    from 0. Source i gets shares[i] of every sum(shares) positions."""
    sources, earlier = cycle(tuple(shares))
    cycles, place = np.divmod(
        np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64), len(sources)
    )
    source = sources[place]
    return source, cycles * np.asarray(shares)[source] + earlier[place]


def source_seeds(seed: int, shares: Sequence[int]) -> dict[int, int]:
    """The seed of the order of each source with a share, by its place. A single one has the seed itself, so a
    source without a share changes no order."""
    trained = [i for i, share in enumerate(shares) if share]
    return {i: hash_of(seed, k) if len(trained) > 1 else seed for k, i in enumerate(trained)}


def mixed_order(
    seed: int, step: int, batch_size: int, *, sizes: Sequence[int], shares: Sequence[int]
) -> np.ndarray:
    """Which samples of several sources make up a step's global batch, counted through all the sources.

    Source i has sizes[i] samples and epochs of its own, each a fresh permutation. See mixed_positions.
    """
    source, nth = mixed_positions(step, batch_size, shares)
    order, firsts = np.empty(batch_size, np.int64), np.cumsum([0, *sizes])
    for i, own_seed in source_seeds(seed, shares).items():
        here = source == i
        order[here] = firsts[i] + samples_at(nth[here], own_seed, sizes[i])
    return order


@dataclass(frozen=True)
class Source:
    """One part of a mix."""

    name: str  # in reports: last part of the path; all of it if two share that; numbered if equal
    path: str  # a folder, a file or what else the flag names
    share: int | None  # of every CYCLE samples; None without weights


def parse_sources(
    text: str | Path, flag: str = "data_dir", exists: Callable[[str], bool] = os.path.isdir
) -> list[Source]:
    """The sources that a flag names, with commas between them: all with a weight, or none.

    A weight stands behind the last colon. Weights count samples and need not sum to one. A source of weight 0
    is validated and never trained on. An entry that `exists` as a whole is a path without a weight.
    Raises InputError for an invalid weight, or if only some sources have one.

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
    names = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]
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
    if not path or not 0 <= weight < math.inf:
        raise InputError(
            f"--{flag} names {entry}, which does not exist, and {text!r} is no weight; expected path:weight "
            f"with a number above zero, or 0 for what is validated only"
        )
    return path, weight


def rounded_shares(names: Sequence[str], weights: Sequence[float]) -> list[int]:
    """Weights as shares that sum to CYCLE, by largest remainder; InputError for one that rounds to none, and
    if all are 0."""
    if not sum(weights):
        raise InputError(f"all of {', '.join(names)} have the weight 0, so nothing is trained on; raise one")
    exact = [weight / sum(weights) * CYCLE for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: CYCLE - sum(shares)]:
        shares[i] += 1
    for name, share, weight in zip(names, shares, weights):
        if weight and not share:
            raise InputError(
                f"{name} has the weight {weight:g} of {sum(weights):g}, less than one window in {CYCLE:,}; "
                f"raise it, or leave the folder out"
            )
    return shares


def taken(shares: Sequence[float], sizes: Sequence[int], most: int) -> list[int]:
    """How many samples a validation takes from each source: its share of `most`, at least one. A source of
    share 0 gives up to `most`. If `most` is 0, each gives all it has."""
    wanted = [max(1, round(most * share)) if share else most for share in shares]
    return [min(n, count) if most else n for n, count in zip(sizes, wanted)]


def validation_numbers(
    names: Sequence[str],
    shares: Sequence[float],
    counts: Sequence[int],
    sums: Sequence[tuple[float, float, int]],
    *,
    text_bytes: Sequence[int] | None = None,
) -> dict[str, float]:
    """A validation's losses, from what `evaluate` returned for `counts` samples of each source. With
    text_bytes also bits per byte; without them also the accuracy.

    A source's sums are scaled to its share, however many samples it had. So val_loss is that of a token of
    the mix. With several sources each also has its own val_loss/NAME and, with text_bytes, val_bpb/NAME.
    """
    scales = [share * (sum(counts) / count) for share, count in zip(shares, counts)]
    nats, hits, targets = (
        sum(scale * value for scale, value in zip(scales, values)) for values in zip(*sums)
    )
    numbers = {"val_loss": nats / targets}
    own = {f"val_loss/{name}": nats / targets for name, (nats, _, targets) in zip(names, sums)}
    if text_bytes is None:
        numbers["val_accuracy"] = hits / targets
    else:
        read = sum(scale * count for scale, count in zip(scales, text_bytes))
        numbers["val_bpb"] = nats / math.log(2) / read
        parts = zip(names, sums, text_bytes)
        own |= {f"val_bpb/{name}": nats / math.log(2) / size for name, (nats, *_), size in parts}
    return numbers | (own if len(names) > 1 else {})


def epochs_read(names: Sequence[str], shares: Sequence[float], sizes: Sequence[int], read: float) -> dict:
    """How often each of several sources was read when so many samples were, as epochs/NAME. Those of weight 0
    are left out."""
    if len(names) == 1:
        return {}
    return {f"epochs/{name}": read * share / n for name, share, n in zip(names, shares, sizes) if share}


def mix_report(
    names: Sequence[str], shares: Sequence[float], sizes: Sequence[int], *, read: float, unit: str
) -> list[str]:
    """A line on each of several sources, for a run that reads so many samples."""
    epochs, width = epochs_read(names, shares, sizes, read), max(map(len, names))
    return [
        f"  {name:<{width}}  {share:7.2%} of the {unit}; {n:,} of them, {epochs[f'epochs/{name}']:.2f} epochs"
        if share
        else f"  {name:<{width}}  validated only"
        for name, share, n in zip(names, shares, sizes)
        if epochs
    ]


def data_sources(data: str) -> list[Source]:
    """The sources that --data mixes by weights; without weights it names one, as it stands."""
    sources = parse_sources(data, "data", os.path.exists)
    return [Source(sources[0].name, data, None)] if sources[0].share is None else sources


def for_each(flag: str, value: str, count: int) -> list[str]:
    """A flag's value for each of so many sources: one for all, or with commas between them one for each."""
    values = value.split(",") if count > 1 else [value]
    if len(values) not in (1, count):
        raise InputError(
            f"--{flag}={value} has {len(values)} values for {count} sources in --data; give one for all, or "
            f"one for each"
        )
    return values * count if len(values) == 1 else values
