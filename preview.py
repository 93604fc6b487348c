"""Conversations as they will be trained: what is masked, what is trained on, and what is cut.

python preview.py --model=out/base --data=chats.jsonl
python preview.py --model=out/base --data=HuggingFaceTB/smol-smoltalk --html=preview.html
"""

import html
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sft_gpt
from checkpoint import find_model
from common import IGNORE, InputError, check_choice, check_numbers, one_line, read_json, run_script, visible
from gpt import GPTConfig
from huggingface import model_directory
from order import data_sources
from packing import row_length
from sft import Example, examples_of
from sft_gpt import OVERLONG
from tokenization import REASONING, TRAIN_ON, chat_template, load_tokenizer


@dataclass
class Config:
    model: str = "out/base"  # a run's folder, a model directory, or a hub id: its tokenizer and context
    data: str = "HuggingFaceTB/smol-smoltalk"  # embedded, a hub id, files and folders a,b, or a mix a:3,b:1
    data_config: str = ""  # the hub dataset's configuration
    data_split: str = "train"  # the hub dataset's split
    column: str = "messages"  # the column or JSON key with the list of messages
    max_length: int = 0  # tokens in a row; 0 for the model's context
    overlong: str = "truncate"  # a longer conversation: truncate, split or drop
    train_on: str = "all"  # the answers of a conversation that are trained on: all or last
    reasoning: str = "keep"  # drop leaves <think>…</think> out of earlier answers; an example a question
    show: int = 3  # conversations that are shown, of each source
    look: int = 1000  # conversations of each source that the summary is made of
    html: str = ""  # also write a page to this file


def pieces_of_text(ids: Sequence[int], labels: Sequence[int], tokenizer) -> Iterator[tuple[str, bool]]:
    """Stretches of a conversation's text, each with whether it is trained on."""
    pairs = ((id, label != IGNORE) for id, label in zip(ids, labels))
    for trained, stretch in itertools.groupby(pairs, key=lambda pair: pair[1]):
        yield visible(tokenizer.decode([id for id, _ in stretch])), trained


def for_terminal(stretches: Sequence[tuple[str, bool]], colour: bool) -> str:
    """What is trained on in green, or in brackets where there are no colours."""
    marks = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    return "".join(f"{marks[0]}{text}{marks[1]}" if trained else text for text, trained in stretches)


def page(shown: Sequence[Sequence[tuple[str, bool]]], summary: str) -> str:
    """The same as a page by itself."""

    def marked(text: str, trained: bool) -> str:
        return f"<mark>{html.escape(text)}</mark>" if trained else html.escape(text)

    conversations = "".join(f"<pre>{''.join(itertools.starmap(marked, part))}</pre>" for part in shown)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>What is trained on</title>'
        '<meta name="viewport" content="width=device-width">'
        "<style>body{font:16px sans-serif;max-width:50em;margin:auto;padding:1em}"
        "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#eee;color:#222;padding:1em}"
        "mark{background:#9e9}</style>"
        f"<h1>What is trained on</h1><p>Marked text is trained on, the rest is masked.</p>"
        f"<pre>{html.escape(summary)}</pre>{conversations}</html>\n"
    )


def summary_of(examples: Sequence[Example]) -> str:
    """Turns, lengths, the share that is trained on, and what is cut or left out."""
    used = [example for example in examples if example.pieces]
    rows = [piece for example in used for piece in example.pieces]
    lengths = sorted(len(ids) for ids, _ in rows)
    turns = Counter(example.turns for example in used)
    trained = sum(label != IGNORE for _, labels in rows for label in labels)
    before = sum(example.answer_tokens for example in examples)
    lines = [
        f"{len(used):,} of {len(examples):,} conversations are trained on, in {len(rows):,} pieces",
        f"{lengths[0]} to {lengths[-1]} tokens, the median {lengths[len(lengths) // 2]}",
        "turns: " + ", ".join(f"{count:,} of {number}" for number, count in sorted(turns.items())[:8]),
        f"{trained:,} of {sum(lengths):,} tokens are trained on, {100 * trained / sum(lengths):.1f}%",
        f"{before - trained:,} tokens of answers are cut or left out",
    ]
    reasons = Counter(example.why_skipped for example in examples if not example.pieces)
    lines += [f"{count:,} left out: {reason}" for reason, count in reasons.most_common(5)]
    return "\n".join(lines)


def preview(part: sft_gpt.Config, config: Config, tokenizer, length: int) -> tuple[list, str]:
    """Of one source the conversations that are shown, and the summary. Raises InputError if none is trained
    on."""
    rows = itertools.islice(sft_gpt.conversations(part), config.look)
    examples = list(examples_of(rows, tokenizer, max_length=length, overlong=config.overlong))
    if not any(example.pieces for example in examples):
        first = examples[0].why_skipped if examples else "it is empty"
        raise InputError(
            f"nothing in {part.data} would be trained on (the first conversation: {first}); mend the data, "
            f"or name others by --data and --column"
        )
    pieces = (piece for example in examples for piece in example.pieces)
    shown = [list(pieces_of_text(*piece, tokenizer)) for piece in itertools.islice(pieces, config.show)]
    return shown, summary_of(examples)


def write_page(path: str, content: str) -> None:
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--html={path} cannot be written ({one_line(error)}); name another file") from error


def main(config: Config) -> None:
    for name, choices in (("overlong", OVERLONG), ("train_on", TRAIN_ON), ("reasoning", REASONING)):
        check_choice(name, getattr(config, name), choices)
    check_numbers(vars(config), positive=("look",))
    folder = model_directory(find_model(config.model))
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = chat_template(config.train_on, config.reasoning)
    context = GPTConfig.from_hf(read_json(folder / "config.json")).max_position_embeddings
    length = row_length(config.max_length, context)
    fields = {name: getattr(config, name) for name in ("data", "data_config", "data_split", "column")}
    parts = sft_gpt.source_configs(sft_gpt.Config(**fields), data_sources(config.data))
    shown, summaries = [], []
    for part in parts:
        conversations, summary = preview(part, config, tokenizer, length)
        summary = f"{part.data}\n{summary}" if len(parts) > 1 else summary
        for stretches in conversations:
            print(for_terminal(stretches, sys.stdout.isatty()) + "-" * 80)
        print(summary)
        shown += conversations
        summaries.append(summary)
    if config.html:
        write_page(config.html, page(shown, "\n\n".join(summaries)))


if __name__ == "__main__":
    run_script(main, Config)
