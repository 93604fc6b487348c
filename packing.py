"""Rows of whole conversations: which share a row, the loader that fine-tuning reads, and a mix of several.

B rows, T tokens in a row, C hidden size.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from common import IGNORE, InputError
from distributed import Ranks
from order import batch_order, mixed_positions
from sft import SFTDataset


def row_length(max_length: int, context: int) -> int:
    """--max_length, or the model's context if it is 0; InputError beyond the context."""
    if max_length > context:
        raise InputError(f"--max_length={max_length} is beyond the model's context of {context}; lower it")
    return max_length or context


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray | None = None) -> list[list[int]]:
    """Rows of conversations whose lengths sum to at most capacity, by best-fit decreasing.

    The longest first, each goes into the row that it fills best; `order` settles which comes first among
    equals.

        pack([5, 3, 3, 2], 8) -> [[0, 1], [2, 3]]
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > capacity:
        raise InputError(
            f"a conversation of {lengths.max()} tokens does not fit into a row of {capacity}; cut it before, "
            f"or raise --max_length"
        )
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


class PackedLoader:
    """Rows of T tokens packed with whole conversations, in an order that is a pure function of (seed, step).

    Every conversation is in one row of each epoch. An epoch's rows are spread evenly over its steps, so that
    none is a small one with a noisy gradient. With `varlen` the batches are for variable-length attention.
    """

    def __init__(
        self, dataset: SFTDataset, *, row_length: int, rows_per_step: int, seed: int, varlen: bool = False
    ):
        self.dataset, self.T, self.seed, self.varlen = dataset, row_length, seed, varlen
        self.epoch, self.rows = None, []
        self.rows_of(0)
        self.sizes = [len(self.rows)]  # rows of each source in an epoch
        self.steps_per_epoch = -(-len(self.rows) // rows_per_step)
        self.rows_per_step = len(self.rows) / self.steps_per_epoch  # on average
        self.most_rows = -(-len(self.rows) // self.steps_per_epoch)  # of a step
        # Slots for a row's sequences, its padding counted as one: enough for most micro-batches, and for all.
        # Unused slots cost attention time.
        counts = [len(row) + 1 for row in self.rows]
        self.sequences = (2 * -(-sum(counts) // len(counts)), 2 * max(counts))

    def rows_of(self, epoch: int) -> list[list[int]]:
        """An epoch's rows, in reading order. Lengths alone decide their number, the same in all epochs."""
        if epoch != self.epoch:
            n = len(self.dataset)
            rows = pack(self.dataset.lengths(), self.T, batch_order(self.seed, epoch, n, n))
            order = batch_order(self.seed + 1, epoch, len(rows), len(rows))
            self.epoch, self.rows = epoch, [rows[i] for i in order]
        return self.rows

    def step_rows(self, step: int) -> list[list[int]]:
        """The rows of a step's global batch, each a list of conversations."""
        epoch, i = divmod(step, self.steps_per_epoch)
        n, steps = len(self.rows), self.steps_per_epoch
        return self.rows_of(epoch)[i * n // steps : (i + 1) * n // steps]

    def count(self, rows: Sequence[list]) -> tuple[int, int]:
        """How many tokens some rows have, without their padding, and how many of them are trained on; those
        of other ranks, too. A conversation's first token is never trained on."""
        found = [self.dataset[c] for row in rows for c in row]
        trained = sum(int((labels[1:] != IGNORE).sum()) for _, labels in found)
        return sum(len(ids) for ids, _ in found), trained

    def fill(self) -> float:
        """Share of the rows' positions that hold a token."""
        return float(self.dataset.offsets[-1]) / (len(self.rows) * self.T)

    def micro_batches(
        self, rows: Sequence[list], micro_batch_size: int, ranks: Ranks, noise: Callable | None = None
    ) -> Iterator[dict]:
        """A rank's share of some rows, as the keyword arguments of the model's forward.

        `noise`, if any, makes a row's (T, C) from its number and its conversations' lengths.
        """
        for share in ranks.share([*enumerate(rows)], micro_batch_size, most=self.most_rows):
            some = [(0, []) if item is None else item for item in share]  # rows of padding keep a shape
            some = [(number, [self.dataset[c] for c in row]) for number, row in some]
            sequences = [len(some) * n for n in self.sequences] if ranks.even_batches else []
            batch = collate([row for _, row in some], self.T, varlen=self.varlen, sequences=sequences)
            if noise:
                lengths = [(number, [len(ids) for ids, _ in row]) for number, row in some]
                batch["noise"] = torch.stack([noise(*pair) for pair in lengths])
            yield ranks.pin(batch)


def collate(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    T: int,
    *,
    varlen: bool = False,
    sequences: Sequence[int] = (),
) -> dict[str, torch.Tensor]:
    """Rows of conversations (ids, labels) as input_ids, targets and positions (B, T) and mask (B, 1, T, T).
    With `varlen` cu_seqlens replaces the mask: where in the B x T tokens each conversation begins. Empty
    conversations at the end fill it up to the first of `sequences` that is enough.

    Positions restart in every conversation. The mask keeps attention inside it. Its last token has no target,
    so the next one's first token is never predicted. The rest of a row is padding: no conversation sees it,
    and nothing is trained on it.
    """
    B = len(rows)
    input_ids, positions = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    targets, owner = np.full((B, T), IGNORE, np.int64), np.full((B, T), -1, np.int32)
    starts = []
    for b, row in enumerate(rows):
        at = 0
        for n, (ids, labels) in enumerate(row):
            span = slice(at, at + len(ids))
            input_ids[b, span], positions[b, span], owner[b, span] = ids, np.arange(len(ids)), n
            targets[b, at : at + len(ids) - 1] = labels[1:]
            starts.append(b * T + at)
            at += len(ids)
        if at < T:
            starts.append(b * T + at)
    batch = {"input_ids": input_ids, "targets": targets, "positions": positions}
    batch = {name: torch.from_numpy(array) for name, array in batch.items()}
    if varlen:  # each shape is compiled anew, so above them it is rounded up to a power of two
        length = next((n for n in sequences if n >= len(starts)), 1 << len(starts).bit_length())
        return batch | {"cu_seqlens": torch.tensor(starts + [B * T] * (length + 1 - len(starts))).int()}
    owner = torch.from_numpy(owner)
    return batch | {"mask": (owner[:, :, None] == owner[:, None, :]).tril_()[:, None]}


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
    sum(shares) rows. Every source has epochs of its own. An epoch of the mix has as many rows as all sources
    have together, and a step has at most these.
    """

    def __init__(self, loaders: Sequence[PackedLoader], shares: Sequence[int], rows_per_step: int):
        self.loaders, self.shares = loaders, shares
        self.dataset = Conversations([loader.dataset for loader in loaders])
        self.T, self.varlen = loaders[0].T, loaders[0].varlen
        self.sequences = tuple(map(max, zip(*(loader.sequences for loader in loaders))))
        self.sizes = [len(loader.rows) for loader in loaders]  # in an epoch
        self.rows_per_step = self.most_rows = min(rows_per_step, sum(self.sizes))
        self.steps_per_epoch = -(-sum(self.sizes) // self.rows_per_step)

    def step_rows(self, step: int) -> list[list[tuple[int, int]]]:
        """The rows of a step's global batch, each a list of conversations."""
        rows = []
        for source, nth in zip(*(a.tolist() for a in mixed_positions(step, self.most_rows, self.shares))):
            epoch, i = divmod(nth, self.sizes[source])
            rows.append([(source, number) for number in self.loaders[source].rows_of(epoch)[i]])
        return rows

    def fill(self) -> float:
        """Share of the rows' positions that hold a token."""
        filled = sum(loader.fill() * share for loader, share in zip(self.loaders, self.shares))
        return filled / sum(self.shares)
