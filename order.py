"""Which samples a step reads, and which conversations share a row: pure functions of a seed."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from common import InputError

CYCLE = 10_000  # positions in which a mix of sources has exactly its shares


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
        order[here] = shuffled(positions[here] % n, n, hash_of(seed, epoch))
    return order


def batch_order(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """Which of n samples make up a step's global batch."""
    return samples_at(np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64), seed, n)


@lru_cache(8)
def cycle(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which source each position of a cycle reads, and how many earlier ones read the same; sum(shares) each.

    A source's positions are spread evenly. So any B positions in a row hold its share of B, but for a few.

        cycle((3, 1)) -> [0, 0, 1, 0], [0, 1, 0, 2]
    """
    sources = np.repeat(np.arange(len(shares)), shares)
    earlier = np.concatenate([np.arange(share) for share in shares])
    moments = (earlier + 0.5) / np.repeat(shares, shares)  # in the cycle, from 0 to 1
    order = np.argsort(moments, kind="stable")
    return sources[order], earlier[order]


def mixed_positions(step: int, batch_size: int, shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which source each position of a step's global batch reads, and the how many-th sample of that source,
    from 0 on. Source i gets shares[i] of every sum(shares) positions."""
    sources, earlier = cycle(tuple(shares))
    cycles, place = np.divmod(
        np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64), len(sources)
    )
    source = sources[place]
    return source, cycles * np.asarray(shares)[source] + earlier[place]


def mixed_order(
    seed: int, step: int, batch_size: int, *, sizes: Sequence[int], shares: Sequence[int]
) -> np.ndarray:
    """Which samples of several sources make up a step's global batch, counted through all the sources.

    Source i has sizes[i] samples and epochs of its own, each a fresh permutation. See mixed_positions.
    """
    source, nth = mixed_positions(step, batch_size, shares)
    order, first = np.empty(batch_size, np.int64), 0
    for i, n in enumerate(sizes):
        here = source == i
        order[here] = first + samples_at(nth[here], hash_of(seed, i), n)
        first += n
    return order


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray | None = None) -> list[list[int]]:
    """Rows of conversations whose lengths sum to at most capacity, by best-fit decreasing.

    The longest first, each goes into the row that it fills best; `order` settles which comes first among
    equals.

        pack([5, 3, 3, 2], 8) -> [[0, 1], [2, 3]]
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > capacity:
        raise InputError(f"a conversation of {lengths.max()} tokens does not fit into a row of {capacity}")
    order = np.arange(len(lengths)) if order is None else order
    rows: list[list[int]] = []
    rows_with_room = defaultdict(list)  # free tokens -> rows
    rooms: list[int] = []  # its keys that have rows, sorted
    for i in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[i])
        k = bisect_left(rooms, length)
        if k == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[k]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rooms[k]
        rows[row].append(i)
        if room > length:
            if not rows_with_room[room - length]:
                insort(rooms, room - length)
            rows_with_room[room - length].append(row)
    return rows
