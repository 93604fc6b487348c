r"""Conversations as masked ChatML: rendering, the dataset on disk, packing, and the loader that fine-tuning
reads.

    <|im_start|>user\nWhat is water?<|im_end|>\n<|im_start|>assistant\nA liquid.<|im_end|>\n

Trained on are an assistant's content and its <|im_end|>, in every turn: here "A liquid.<|im_end|>". All else
is masked.

B rows, T tokens in a row.
"""

import itertools
import shutil
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from data import TURN_END, TURN_START, batch_order, encode, write_json
from gpt import IGNORE, InputError, read_json

ROLES = ("system", "user", "assistant")


def problem(messages) -> str | None:
    """What keeps a conversation from being trained on, or None."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return "messages is no list of objects with role and content"
    for message in messages:
        if message.get("role") not in ROLES:
            return f"the role {message.get('role')!r} is none of {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str):
            return f"the content is {type(message.get('content')).__name__}, not a string"
    if not any(m["role"] == "assistant" for m in messages):
        return "there is no assistant turn"
    return None


def render_batch(conversations: Sequence[list[dict]], tokenizer) -> list[tuple[list[int], list[int]]]:
    """render_chatml for many conversations at once, on all cores."""
    start, end = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    texts = [
        text for messages in conversations for m in messages for text in (m["role"] + "\n", m["content"])
    ]
    *encoded, newline = encode(tokenizer, [*texts, "\n"])
    pieces = iter(encoded)
    rendered = []
    for messages in conversations:
        ids, labels = [], []
        for message in messages:
            header, content = [start, *next(pieces)], [*next(pieces), end]
            ids += header + content + newline
            trained = message["role"] == "assistant"
            labels += (
                [IGNORE] * len(header)
                + (content if trained else [IGNORE] * len(content))
                + [IGNORE] * len(newline)
            )
        rendered.append((ids, labels))
    return rendered


def render_chatml(messages: list[dict], tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation, of the same length and not yet shifted: label i is id i or IGNORE.

    Header, content and end are encoded apart, so that no merge crosses them, and content never gives a
    special id.
    """
    return render_batch([messages], tokenizer)[0]


def prompt_ids(messages: list[dict], tokenizer) -> list[int]:
    """Ids of a conversation and the header of the answer that is to follow."""
    ids, labels = render_chatml([*messages, {"role": "assistant", "content": ""}], tokenizer)
    return ids[
        : max(i for i, label in enumerate(labels) if label != IGNORE)
    ]  # all before the empty answer's end


def truncate(
    ids: list[int], labels: list[int], max_length: int, turn_end: int
) -> tuple[list[int], list[int]]:
    """The whole turns that fit into max_length, up to the last trained one; if none is, the first max_length
    tokens.

    An answer that is cut keeps what it has, and nothing teaches the model to stop there.
    """
    if len(ids) <= max_length:
        return ids, labels
    ends = [i + 1 for i in range(max_length) if ids[i] == turn_end and labels[i] == turn_end]
    cut = ends[-1] if ends else max_length
    return ids[:cut], labels[:cut]


class SFTDataset:
    """Rendered conversations in a folder, memory-mapped: `ids.bin`, `trained.bin` and where each begins.

    `SFTDataset.prepare` makes the folder, unless it is there; `dataset[i]` is a conversation's (ids, labels),
    arrays of at most max_length, every one with a token to train on.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.report = read_json(self.folder / "report.json")
        self.offsets = np.load(self.folder / "offsets.npy")
        if len(self):
            self.ids = np.memmap(self.folder / "ids.bin", np.int32, "r")
            self.trained = np.memmap(self.folder / "trained.bin", np.bool_, "r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span], np.where(self.trained[span], self.ids[span], IGNORE)

    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @classmethod
    def prepare(
        cls,
        folder: str | Path,
        conversations: Iterable[tuple[list[dict], str]],
        tokenizer,
        max_length: int,
        batch: int = 1000,
    ) -> "SFTDataset":
        """Render (messages, where it was found) into a folder; memory use does not grow with their number.

        Conversations that cannot be trained on are skipped and counted in `report.json`, the first of each
        kind named. Raises InputError when none is left.
        """
        folder = Path(folder)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        turn_end = tokenizer.convert_tokens_to_ids(TURN_END)
        offsets, skipped, examples = [0], Counter(), {}
        counts = Counter(conversations=0, tokens=0, trained_tokens=0, truncated=0)

        def usable() -> Iterator[list[dict]]:
            for messages, where in conversations:
                reason = problem(messages)
                if reason is None:
                    yield messages
                else:
                    skipped[reason] += 1
                    examples.setdefault(reason, where)

        source = usable()
        with open(partial / "ids.bin", "wb") as id_file, open(partial / "trained.bin", "wb") as trained_file:
            while messages := list(itertools.islice(source, batch)):
                for ids, labels in render_batch(messages, tokenizer):
                    counts["truncated"] += len(ids) > max_length
                    ids, labels = (np.array(x, np.int32) for x in truncate(ids, labels, max_length, turn_end))
                    trained = labels != IGNORE
                    if not trained.any():
                        skipped[reason := f"no answer begins within {max_length} tokens"] += 1
                        examples.setdefault(reason, "a long conversation")
                        continue
                    id_file.write(ids.tobytes())
                    trained_file.write(trained.tobytes())
                    offsets.append(offsets[-1] + len(ids))
                    counts.update(conversations=1, tokens=len(ids), trained_tokens=int(trained.sum()))
        np.save(partial / "offsets.npy", np.array(offsets, np.int64))
        reasons = [
            {"count": n, "reason": reason, "first": examples[reason]} for reason, n in skipped.most_common()
        ]
        if not counts["conversations"]:
            detail = "; ".join(f"{r['count']} skipped: {r['reason']} (first: {r['first']})" for r in reasons)
            raise InputError(f"no conversation is left to train on ({detail or 'the source is empty'})")
        write_json(partial / "report.json", {**counts, "skipped": reasons})
        partial.rename(folder)
        return cls(folder)


# -- packing -------------------------------------------------------------------------------------------------


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


class PackedLoader:
    """Rows of T tokens packed with whole conversations, in an order that is a pure function of (seed, step).

    Every conversation is in one row of each epoch; the last step of an epoch may have fewer rows than the
    others.
    """

    def __init__(self, dataset: SFTDataset, row_length: int, batch_rows: int, seed: int):
        self.dataset, self.T, self.batch_rows, self.seed = dataset, row_length, batch_rows, seed
        self.epoch, self.rows = None, []
        self.rows_of(0)
        self.steps_per_epoch = -(-len(self.rows) // batch_rows)

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
        return self.rows_of(epoch)[i * self.batch_rows : (i + 1) * self.batch_rows]

    def fill(self) -> float:
        """Share of the rows' positions that hold a token."""
        return float(self.dataset.offsets[-1]) / (len(self.rows) * self.T)

    def micro_batches(self, rows: Sequence[list[int]], size: int, ranks) -> Iterator[dict]:
        """A rank's share of some rows, as the keyword arguments of the model's forward.

        A rank that gets none, at an epoch's end, gives one row of padding, so that all ranks take part in
        every step.
        """
        own = rows[ranks.rank :: ranks.world] or [[]]
        for i in range(0, len(own), size):
            batch = collate([[self.dataset[c] for c in row] for row in own[i : i + size]], self.T)
            yield {name: tensor.to(ranks.device) for name, tensor in batch.items()}


def collate(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], T: int) -> dict[str, torch.Tensor]:
    """Rows of conversations (ids, labels) as input_ids, targets and positions (B, T) and mask (B, 1, T, T).

    Positions restart in every conversation, the mask keeps it to itself, and its last token has no target, so
    that the next one's first is never predicted. What is left of a row is padding: it sees only itself,
    nothing is trained on it.
    """
    B = len(rows)
    input_ids, positions = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    targets, owner = np.full((B, T), IGNORE, np.int64), np.full((B, T), -1, np.int32)
    for b, row in enumerate(rows):
        at = 0
        for n, (ids, labels) in enumerate(row):
            span = slice(at, at + len(ids))
            input_ids[b, span], positions[b, span], owner[b, span] = ids, np.arange(len(ids)), n
            targets[b, at : at + len(ids) - 1] = labels[1:]
            at += len(ids)
    owner = torch.from_numpy(owner)
    mask = (owner[:, :, None] == owner[:, None, :]).tril_()[:, None]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "targets": torch.from_numpy(targets),
        "positions": torch.from_numpy(positions),
        "mask": mask,
    }
