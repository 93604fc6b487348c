"""Fine-tuning on a mix of sources: the settings of each, and the rows that a step reads of each."""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from common import InputError
from mixture import Source, parse_sources
from order import mixed_positions
from sft import PackedLoader, SFTDataset


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


class Conversations:
    """Conversations of several datasets, each under (source, number)."""

    def __init__(self, datasets: Sequence[SFTDataset]):
        self.datasets = datasets

    def __getitem__(self, place: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        source, number = place
        return self.datasets[source][number]


class MixedLoader(PackedLoader):
    """Rows of several sources in an order that is a pure function of (seed, step).

    A row has conversations of one source, under (source, number). Source i gives shares[i] of every
    sum(shares) rows. Rows are about equally full, so these are its share of the tokens. Every source has
    epochs of its own. One of the mix has as many rows as all sources together.
    """

    def __init__(self, loaders: Sequence[PackedLoader], shares: Sequence[int], rows_per_step: int):
        self.loaders, self.shares, self.most_rows = loaders, shares, rows_per_step
        self.dataset = Conversations([loader.dataset for loader in loaders])
        self.T, self.varlen = loaders[0].T, loaders[0].varlen
        self.sequences = max(loader.sequences for loader in loaders)
        self.sizes = [len(loader.rows) for loader in loaders]  # in an epoch
        self.steps_per_epoch = -(-sum(self.sizes) // rows_per_step)

    def step_rows(self, step: int) -> list[list[tuple[int, int]]]:
        """The rows of a step's global batch, each a list of conversations."""
        rows = []
        for source, nth in zip(*(a.tolist() for a in mixed_positions(step, self.most_rows, self.shares))):
            epoch, i = divmod(nth, self.sizes[source])
            rows.append([(source, number) for number in self.loaders[source].rows_of(epoch)[i]])
        return rows

    def count_targets(self, rows: Sequence[list[tuple[int, int]]]) -> int:
        """How many tokens of some rows are trained on, those of other ranks too."""
        return sum(loader.count_targets([row]) for loader, row in self.by_source(rows))

    def count_tokens(self, rows: Sequence[list[tuple[int, int]]]) -> int:
        """How many tokens some rows have, without their padding."""
        return sum(loader.count_tokens([row]) for loader, row in self.by_source(rows))

    def by_source(self, rows: Sequence[list[tuple[int, int]]]) -> Iterator[tuple[PackedLoader, list[int]]]:
        """The loader of each row's source, and the row as that loader knows it."""
        for row in rows:
            yield self.loaders[row[0][0]], [number for _, number in row]

    def fill(self) -> float:
        """Share of the rows' positions that hold a token."""
        filled = sum(loader.fill() * size for loader, size in zip(self.loaders, self.sizes))
        return filled / sum(self.sizes)
