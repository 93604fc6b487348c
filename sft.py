r"""Conversations as masked ChatML: rendering, and the dataset on disk.

    <|im_start|>user\nWhat is water?<|im_end|>\n<|im_start|>assistant\nA liquid.<|im_end|>\n

Trained on are an assistant's content and its <|im_end|>, in every turn: here "A liquid.<|im_end|>". All else
is masked. A tokenizer's chat template may also train on the last answer alone, or drop reasoning from earlier
ones: see chat_template.
"""

import itertools
import math
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from common import (
    IGNORE,
    InputError,
    fingerprint,
    half_surrogate,
    locked,
    read_json,
    replace_file,
    sync_to_disk,
    write_json,
)
from sources import BadRows, hash_fraction
from tokenization import (
    CHAT_TEMPLATES,
    TURN_END,
    TURN_START,
    after_special,
    encode,
    encode_after_newline,
    tokenizer_fingerprint,
)

ROLES = ("system", "user", "assistant", "tool", "developer")
HEAD = ("system", "developer")  # who may speak before the conversation
QUESTIONS_KEPT = 1000  # held-out questions that the report lists
KINDS_KEPT, KINDS_TOLD = 20, 5  # reasons for skipping rows: that are counted apart; that are printed


def why_unusable(messages) -> str | None:
    """What keeps a conversation from being trained on, or None."""
    if isinstance(messages, ValueError):  # a source's reason
        return str(messages)
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return "messages is no list of objects with role and content"
    for message in messages:
        if message.get("role") not in ROLES:
            return f"the role {message.get('role')!r} is none of {', '.join(ROLES)}"
        if message.get("tool_calls"):
            return "a message has tool_calls, which ChatML lacks; write them into its content"
        if not isinstance(message.get("content"), str):
            return f"the content is {type(message.get('content')).__name__}, not a string"
        if half_surrogate(message["content"]):
            return "the content is no Unicode text"
    if not any(m["role"] == "assistant" for m in messages):
        return "there is no assistant turn"
    return None


def without_reasoning(content: str) -> str:
    """An answer without its leading <think>…</think>."""
    reasoned = content.startswith("<think>") and "</think>" in content
    return content.split("</think>", 1)[1].lstrip("\n") if reasoned else content


def as_the_template_has_it(messages: list[dict], tokenizer) -> Iterator[tuple[str, str, bool]]:
    """Of each message the role, the content, and whether it is trained on, as the chat template says."""
    train_on, reasoning = CHAT_TEMPLATES.get(tokenizer.chat_template, ("all", "keep"))
    roles = [message["role"] for message in messages]
    user, answer = (
        max((i for i, r in enumerate(roles) if r == role), default=-1) for role in ("user", "assistant")
    )
    for i, (role, message) in enumerate(zip(roles, messages)):
        content, trained = message["content"], role == "assistant"
        if trained and reasoning == "drop":
            content, trained = without_reasoning(content) if i < user else content, i > user
        yield role, content, i == answer if train_on == "last" else trained


def examples_in(messages: list[dict], tokenizer) -> list[list[dict]]:
    """The examples made of a conversation: itself or, if the template drops reasoning, its beginnings. Each
    of these ends before a user's turn or at the end. It keeps reasoning behind its last user's turn only."""
    train_on, reasoning = CHAT_TEMPLATES.get(tokenizer.chat_template, ("all", "keep"))
    if reasoning == "keep":
        return [messages]
    cuts = [0, *(i for i, m in enumerate(messages) if m["role"] == "user"), len(messages)]
    answered = (any(m["role"] == "assistant" for m in messages[a:b]) for a, b in itertools.pairwise(cuts))
    beginnings = [messages[:end] for end, has_answer in zip(cuts[1:], answered) if has_answer]
    return beginnings if train_on == "all" else beginnings[-1:]


def render_batch(conversations: Sequence[list[dict]], tokenizer) -> list[tuple[list[int], list[int]]]:
    """render_chatml for many conversations at once, on all cores."""
    start, end = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    headers = {role: after_special(tokenizer, TURN_START, role + "\n") for role in ROLES}
    newline = after_special(tokenizer, TURN_END, "\n")
    shown = [list(as_the_template_has_it(messages, tokenizer)) for messages in conversations]
    contents = iter(encode_after_newline(tokenizer, [content for turns in shown for _, content, _ in turns]))
    rendered = []
    for messages, turns in zip(conversations, shown):
        ids, labels = [], []
        for message, (role, _, trained) in zip(messages, turns):
            header, content = [start, *headers[role]], [*next(contents), end]
            ids += header + content + newline
            learned = content if trained else [IGNORE] * len(content)
            if message.get("cut"):  # by /save in chat.py: nothing teaches the model to stop there
                learned = [*learned[:-1], IGNORE]
            labels += [IGNORE] * len(header) + learned + [IGNORE] * len(newline)
        rendered.append((ids, labels))
    return rendered


def render_chatml(messages: list[dict], tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation, of the same length and not yet shifted: label i is id i or IGNORE.

    Header, content and end are encoded apart, so that no merge crosses them, and content never gives a
    special id.
    """
    return render_batch([messages], tokenizer)[0]


def user_turn(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


def prompt_ids(messages: list[dict], tokenizer) -> list[int]:
    """Ids of a conversation and the header of the answer that is to follow."""
    ids, labels = render_chatml([*messages, {"role": "assistant", "content": ""}], tokenizer)
    end = max(i for i, label in enumerate(labels) if label != IGNORE)  # of the empty answer
    return ids[:end]


OVERLONG = ("truncate", "split", "drop")


def cut_to_length(
    ids: list[int], labels: list[int], max_length: int, *, overlong: str, prefix: int, turns: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """The pieces (ids, labels) of at most max_length tokens that a rendered conversation is trained in.

    A longer one is dropped, truncated or split. Truncated, it keeps the whole turns up to the last answer
    that fits. Split, its next turns make another piece behind its first `prefix` tokens (the system message),
    and so on. An answer that alone is too long is cut, and nothing teaches the model to stop there. A piece
    without a token to train on is left out. `turns` are the ids of <|im_start|> and <|im_end|>.
    """
    start, end = turns
    if len(ids) <= max_length:
        return [(ids, labels)]
    if overlong == "drop":
        return []
    pieces, at, head = [], 0, 0
    while at < len(ids):
        room = max_length - head
        stop = min(len(ids), at + room)
        ends = [i + 1 for i in range(at, stop) if ids[i] == end and labels[i] == end]
        if overlong == "split" and prefix < max_length and not ends and stop < len(ids):
            question = turns_before_answer(ids, labels, at, stop, room=max_length - prefix, turns=turns)
            if question is not None:
                at, head = question, prefix
                continue
        cut = stop if stop == len(ids) or not ends else ends[-1]
        if any(label != IGNORE for label in labels[at:cut]):
            pieces.append((ids[:head] + ids[at:cut], labels[:head] + labels[at:cut]))
        if overlong == "truncate" or prefix >= max_length:
            break
        if not ends:  # the rest of this answer has lost its beginning or its question
            cut = next((i for i in range(cut, len(ids)) if ids[i] == end and labels[i] == end), len(ids))
        at = next((i for i in range(cut, len(ids)) if ids[i] == start), len(ids))
        head = prefix
    return pieces


def turns_before_answer(
    ids: list[int], labels: list[int], at: int, stop: int, *, room: int, turns: Sequence[int]
) -> int | None:
    """Where to begin after `at` so that the turns before the next answer and this answer fit into `room`
    tokens. Else, of an answer that begins at `stop` or later, where its question begins, if it fits with the
    answer's start. Else None."""
    start, end = turns
    answer = next((i for i in range(at, len(ids)) if labels[i] != IGNORE), at)
    over = next((i + 1 for i in range(answer, len(ids)) if labels[i] == end), len(ids))
    begins = [i for i in range(at + 1, answer) if ids[i] == start][:-1]  # without the answer's own header
    whole = [i for i in begins if over - i <= room]
    question = begins[-1:] if answer >= stop else []
    return next((i for i in (whole or question) if answer - i < room), None)


# Raise one when its rendering changes; cached rows are then rendered again. A run that began with another of
# the last two resumes only with --force.
RENDERING = 3  # of all rows; 3: where an answer is marked as cut, its <|im_end|> is not trained on
SPLIT_RENDERING = 2  # 2: an answer is whole if it fits without earlier turns
PAIR_RENDERING = 3  # 3: two prompts are the same if they say the same, whatever else is noted of them


def cached_as(source: list, settings: list, tokenizer) -> str:
    """The name of a folder of rendered rows: a hash of all that decides what is in it."""
    rules = [tokenizer.chat_template, tokenizer_fingerprint(tokenizer)]
    header = after_special(tokenizer, TURN_START, "user\n")
    if [header] != encode(tokenizer, ["user\n"]):  # as which headers were encoded before
        rules.append(header)
    return f"data-{fingerprint([RENDERING, source, settings, rules])}"


class SFTDataset:
    """One split of rendered conversations in a folder, memory-mapped.

    `dataset[i]` is a conversation's (ids, labels), arrays of equal length with at least one token to train
    on.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.offsets = np.load(folder / "offsets.npy")  # where each conversation begins, and the end
        self.ids = np.memmap(folder / "ids.bin", np.int32, "r")
        self.trained = np.memmap(folder / "trained.bin", np.bool_, "r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span], np.where(self.trained[span], self.ids[span], IGNORE)

    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


class Writer:
    """Appends rendered conversations to the folder of an SFTDataset, behind the first `count` there."""

    def __init__(self, folder: Path, count: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.offsets = folder, array("q", [0])
        if count:
            self.offsets = array("q", np.load(folder / "offsets.npy")[: count + 1].tolist())
        self.files = {}
        for name, size in (("ids.bin", 4), ("trained.bin", 1)):
            self.files[name] = open(folder / name, "ab")
            self.files[name].truncate(self.offsets[-1] * size)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def append(self, ids: list[int], labels: list[int]) -> None:
        self.files["ids.bin"].write(array("i", ids))
        self.files["trained.bin"].write(np.array(labels) != IGNORE)
        self.offsets.append(self.offsets[-1] + len(ids))

    def flush(self) -> None:
        """Bring all that was appended to the disk itself: the note that is written next vouches for it."""
        for file in self.files.values():
            file.flush()
            sync_to_disk(Path(file.name))
        content = BytesIO()
        np.save(content, np.array(self.offsets, np.int64))
        replace_file(self.folder / "offsets.npy", content.getvalue())
        sync_to_disk(self.folder)

    def close(self) -> None:
        self.flush()
        for file in self.files.values():
            file.close()


def first_question(messages: list[dict]) -> str:
    """The first user message of a conversation; empty if it has none."""
    return next((m["content"] for m in messages if m["role"] == "user"), "")


@dataclass
class Example:
    """What a row of the source gives: pieces (ids, labels) that stay on one side of the split, or a reason
    why there are none."""

    where: str
    why_skipped: str | None = None
    question: str = ""  # its hash settles the side
    pieces: Sequence[tuple[list[int], list[int]]] = ()
    turns: int = 0  # messages in the row
    answer_tokens: int = 0  # before anything was cut
    unusable: bool = False  # the row itself, whatever the length


def prepare_conversations(
    folder: str | Path,
    conversations: Iterable,
    tokenizer,
    *,
    max_length: int,
    val_fraction: float,
    overlong: str = "truncate",
    max_bad_rows: float = 1.0,
) -> dict:
    """Render (messages, where they were found) into the datasets of write_examples, cut by cut_to_length."""

    def examples(start: int) -> Iterator[Example]:
        rest = itertools.islice(conversations, start, None)
        return examples_of(rest, tokenizer, max_length=max_length, overlong=overlong)

    return write_examples(folder, examples, val_fraction, max_bad_rows)


def examples_of(conversations: Iterable, tokenizer, *, max_length: int, overlong: str) -> Iterator[Example]:
    """What (messages, where they were found) are trained as."""
    turns = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    too_long = f"longer than {max_length} tokens"
    if overlong != "drop":
        too_long = f"no answer begins within {max_length} tokens"
    if overlong == "truncate" and CHAT_TEMPLATES.get(tokenizer.chat_template, ("all", "keep"))[0] == "last":
        too_long = f"the last answer does not begin within {max_length} tokens; try --overlong=split"
    for rows in batched(conversations):
        reasons = [why_unusable(messages) for messages, _ in rows]
        parts = [[] if why else examples_in(row[0], tokenizer) for row, why in zip(rows, reasons)]
        rendered = iter(render_batch(list(itertools.chain(*parts)), tokenizer))
        for (messages, where), reason, own in zip(rows, reasons, parts):
            if reason:
                yield Example(where, reason, unusable=True)
                continue
            pieces, answer_tokens = [], 0
            for ids, labels in itertools.islice(rendered, len(own)):
                prefix = ids.index(turns[0], 1) if messages[0]["role"] in HEAD else 0
                pieces += cut_to_length(
                    ids, labels, max_length, overlong=overlong, prefix=prefix, turns=turns
                )
                answer_tokens += trained_tokens(labels)
            yield Example(
                where,
                None if pieces else too_long,
                question=first_question(messages),
                pieces=pieces,
                turns=len(messages),
                answer_tokens=answer_tokens,
            )


def batched(rows: Iterable, size: int = 1000) -> Iterator[list]:
    """The rows in lists of `size`, the last one shorter."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def trained_tokens(labels: Sequence[int]) -> int:
    return len(labels) - labels.count(IGNORE)


def write_examples(
    folder: str | Path,
    examples: Callable[[int], Iterable[Example]],
    val_fraction: float,
    max_bad_rows: float = 1.0,
) -> dict:
    """Write the datasets folder/train and folder/val in one pass, in constant memory; returns the report.

    `examples` gives those of the source's rows from one on. A folder appears whole, under a lock: of two runs
    that want the same one, the second waits and finds it. Then no example is read. After a crash the next run
    goes on from the last note. Raises InputError as `write_splits` does.
    """
    folder = Path(folder)
    if not (folder / "report.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not (folder / "report.json").exists():
                partial = folder.with_name(f".{folder.name}.partial")
                shutil.rmtree(folder, ignore_errors=True)
                for leftover in partial.rglob("*.partial"):  # of a run that was killed while writing a file
                    leftover.unlink()
                if not (partial / "report.json").exists():
                    write_splits(partial, examples, val_fraction, max_bad_rows)
                (partial / "progress.json").unlink(missing_ok=True)
                sync_to_disk(partial)
                partial.rename(folder)
                sync_to_disk(folder.parent)
    return read_json(folder / "report.json")


SECONDS_BETWEEN_NOTES = 30  # of rendering that a crash can lose
NEW_NOTE = {
    "rows": 0,  # of the source that are done
    "counts": {"examples": 0, "tokens": 0, "trained_tokens": 0, "lost_tokens": 0, "cut": 0},
    "skipped": {},  # reason: how many rows, and where the first one is
    "questions": [],  # the first that are held out
    "bad_rows": [0, 0, ""],  # BadRows' rows, bad and first
    "written": {"train": 0, "val": 0},  # conversations
    "fractions": [1.0, 0.0],  # hash_fraction of the questions: the least and the greatest
}


def write_splits(
    folder: Path, examples: Callable[[int], Iterable[Example]], val_fraction: float, max_bad_rows: float
) -> None:
    """Write folder/train, folder/val and the report on them, from where the note in the folder stands.

    All examples with one question fall on one side, by its hash. Examples without pieces are counted, and the
    first of each kind is named. Raises InputError if a side is empty; with val_fraction=1 train may be.
    It also raises if the share of unusable rows is above max_bad_rows. Rows that are only too long do not
    count as unusable.
    """
    path = folder / "progress.json"
    note = read_json(path) if path.exists() else NEW_NOTE
    writers = {split: Writer(folder / split, note["written"][split]) for split in ("train", "val")}
    counts, skipped = Counter(note["counts"]), dict(note["skipped"])
    questions, bad_rows = dict.fromkeys(note["questions"]), BadRows(max_bad_rows, note["bad_rows"])
    least, greatest = note.get("fractions", (0.0, 1.0))  # older notes lack them
    noted = time.monotonic()
    for rows, example in enumerate(examples(note["rows"]), note["rows"] + 1):
        count_example(example, counts, skipped, bad_rows)
        fraction = hash_fraction(example.question)
        held_out = fraction < val_fraction
        if example.pieces:
            least, greatest = min(least, fraction), max(greatest, fraction)
        if held_out and example.pieces and len(questions) < QUESTIONS_KEPT:
            questions[example.question] = None
        for piece in example.pieces:
            writers["val" if held_out else "train"].append(*piece)
        if time.monotonic() - noted >= SECONDS_BETWEEN_NOTES:
            for writer in writers.values():
                writer.flush()
            note = {"rows": rows, "counts": counts, "skipped": skipped, "questions": list(questions)}
            note["bad_rows"] = [bad_rows.rows, bad_rows.bad, bad_rows.first]
            note["fractions"] = [least, greatest]
            write_json(path, note | {"written": {split: len(w) for split, w in writers.items()}})
            print(f"{rows:,} rows rendered", flush=True)
            noted = time.monotonic()
    for writer in writers.values():
        writer.close()
    ordered = sorted(skipped.items(), key=lambda item: -item[1][0])
    reasons = [{"count": n, "reason": reason, "first": first} for reason, (n, first) in ordered]
    detail = "; ".join(f"{r['count']} skipped, {r['reason']} ({r['first']})" for r in reasons[:KINDS_TOLD])
    sizes = {split: len(writer) for split, writer in writers.items()}
    if not any(sizes.values()):
        raise InputError(f"nothing is left to train on ({detail or 'the source is empty'}); mend the data")
    bad_rows.check()
    if not sizes["val"] or (not sizes["train"] and val_fraction < 1):
        more = not sizes["val"]
        held_out = "none of {} rows is held out for validation" if more else "all of {} rows are held out"
        raise InputError(f"{held_out.format(counts['examples'])}; {advice(more, least, greatest)}")
    report = {**sizes, **counts, "skipped": reasons, "questions": [q for q in questions if q]}
    write_json(folder / "report.json", report)


def advice(more: bool, least: float, greatest: float) -> str:
    """What to do if more or fewer rows must be held out, for the least and the greatest hash_fraction of the
    questions. One is held out if its own is below --val_fraction."""
    if least == greatest:
        return "all begin with the same question, which is never on both sides; add one with another question"
    up, down = math.floor(100 * least + 1) / 100, math.floor(100 * greatest) / 100
    better = up if more else down
    better = better if least < better <= greatest else (least + greatest) / 2
    return f"{'raise' if more else 'lower'} --val_fraction, for example to {better:.6g}"


def count_example(example: Example, counts: Counter, skipped: dict, bad_rows: BadRows) -> None:
    """Add an example to the report's numbers; InputError from bad_rows."""
    if example.unusable:
        bad_rows.skip(example.where, example.why_skipped)
    else:
        bad_rows.good()
    if reason := example.why_skipped:
        reason = reason if reason in skipped or len(skipped) < KINDS_KEPT else "other reasons"
        count, first = skipped.get(reason, (0, example.where))
        skipped[reason] = count + 1, first
        counts["lost_tokens"] += example.answer_tokens
        return
    kept = sum(trained_tokens(labels) for _, labels in example.pieces)
    lost = max(0, example.answer_tokens - kept)
    counts["tokens"] += sum(len(ids) for ids, _ in example.pieces)
    counts.update(examples=1, trained_tokens=kept, lost_tokens=lost, cut=lost > 0)


def preparation_notes(report: dict, max_length: int) -> list[str]:
    """Lines about what of a prepared source was cut or skipped."""
    told, more = report["skipped"][:KINDS_TOLD], report["skipped"][KINDS_TOLD:]
    lines = [f"{r['count']} rows skipped: {r['reason']} (first: {r['first']})" for r in told]
    if more:
        lines.append(f"{sum(r['count'] for r in more)} rows skipped for {len(more)} other reasons")
    lost, kept = report["lost_tokens"], report["trained_tokens"]
    if report["cut"]:
        lines.append(f"{report['cut']} of {report['examples']} rows were cut at {max_length} tokens")
    if lost:
        lines.append(f"{lost} of {lost + kept} tokens of answers were lost, cut or skipped for their length")
    return lines
