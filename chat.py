"""Talk to a model, or have it answer one prompt.

    python chat.py --model=out/chat
    python chat.py --model=out/chat --prompt="What is the capital of France?"
    python chat.py --model=out/chat --web    # a page on http://127.0.0.1:8000

Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists the commands. When the context is full the oldest
turns are dropped, with a line that says so; the system message stays.
"""

import json
import os
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

from checkpoint import find_model
from common import (
    InputError,
    check_choice,
    check_numbers,
    half_surrogate,
    home_expanded,
    one_line,
    run_script,
    visible,
)
from distributed import Ranks, usable_device
from generation import SAMPLING, check_sampling
from gpt import GPTModel
from huggingface import model_directory
from precision import DTYPES, settle_precision
from sft import HEAD, prompt_ids
from tokenization import END, TURN_END, TURN_START, load_tokenizer
from web import ChatServer, serve


@dataclass
class Config:
    model: str = "out/chat"  # a run's folder (its newest checkpoint), a model directory, or a hub id
    prompt: str = ""  # answer this and end; empty for a conversation
    system: str = ""  # the system message; empty for none
    max_new_tokens: int = 256  # tokens in an answer, at most
    temperature: float = SAMPLING["temperature"]  # 0 always takes the most likely token
    top_k: int = SAMPLING["top_k"]  # sample among this many most likely tokens; 0 for all
    top_p: float = SAMPLING["top_p"]  # and among those, the fewest that together have this probability
    seed: int = -1  # of the sampling; -1 for a new one each time
    speed: bool = False  # tell tokens a second after each answer
    web: bool = False  # a page for the browser, instead of the terminal
    port: int = 8000  # of the page; 0 for any that is free
    web_host: str = "127.0.0.1"  # address that the page is served on; 0.0.0.0 lets other machines in
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of matrix products: float32, bfloat16, or auto for the faster one
    weights: str = "same"  # int8: on a CPU, faster answers from rounded weights; same: as they are


def load(name: str, device: str = "cpu") -> tuple[GPTModel, object]:
    """The model that a user named, on a device, and its tokenizer; InputError if it does not know ChatML."""
    path = model_directory(find_model(name))
    model, tokenizer = GPTModel.from_pretrained(path).to(device), load_tokenizer(path)
    model.graph_decoding, model.kept_weights = True, {}
    turns = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    known = set(tokenizer.get_vocab().values()) - set(tokenizer.new_ids)
    if not known.issuperset(turns) or max(known) >= model.config.vocab_size:
        raise InputError(f"{name} has no ids for ChatML's tokens; fine-tune it with sft_gpt.py first")
    return model, tokenizer


def check_text(text: str) -> None:
    """Raise InputError for bytes that the command line or the terminal could not decode."""
    if half_surrogate(text):
        raise InputError(f"{text!a} is no UTF-8 text; set the terminal to UTF-8 and type it again")


def drop_oldest(messages: list[dict], tokenizer, room: int) -> tuple[list[dict], int]:
    """The messages without the oldest turns that do not fit into `room` tokens, and how many were dropped.

    A system or developer message at the start stays. Raises InputError if the last message alone is too long.
    """
    head = int(messages[0]["role"] in HEAD)
    system, turns = messages[:head], messages[head:]
    starts = [0, *(i for i, turn in enumerate(turns) if i and turn["role"] == "user")]
    first = bisect_left(starts, True, key=lambda i: len(prompt_ids(system + turns[i:], tokenizer)) <= room)
    if first < len(starts):
        return system + turns[starts[first] :], starts[first]
    length, rest = (len(prompt_ids(part, tokenizer)) for part in (system + turns[-1:], turns[-1:]))
    if rest <= room:
        told = f"the system message and the last one take {length} tokens and the context leaves them {room}"
        raise InputError(f"{told}; shorten one of them")
    raise InputError(f"the message takes {rest} tokens and the context leaves it {room}; shorten it")


def stream(model: GPTModel, tokenizer, messages: list[dict], config: Config) -> Iterator[dict]:
    """The answer: {"text": …} for each token, then {"cut": tokens} if it did not end by itself. A special
    token has no text, nor has one that ends amid a character, which the next ones bring."""
    stops = tokenizer.convert_tokens_to_ids([END, TURN_END])
    ids, shown = [], ""
    for (token,) in model.generate(
        [prompt_ids(messages, tokenizer)],
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        seed=config.seed if config.seed >= 0 else None,
        stop_ids=stops,
    ):
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        text = shown if text.endswith("\ufffd") else text
        yield {"text": text[len(shown) :]}
        shown = text
    if ids and ids[-1] not in stops:
        yield {"cut": len(ids)}


def room_for_prompt(model: GPTModel, config: Config) -> int:
    """Tokens of the context that an answer leaves to what was said before."""
    context = model.config.max_position_embeddings
    return context - min(config.max_new_tokens, context // 2)


def events(model: GPTModel, tokenizer, messages: list[dict], config: Config) -> Iterator[dict]:
    """The answer as web.py sends it: how many old messages were dropped, if any; then what stream yields."""
    messages, dropped = drop_oldest(messages, tokenizer, room_for_prompt(model, config))
    if dropped:
        yield {"dropped": dropped}
    yield from stream(model, tokenizer, messages, config)


# -- the terminal --------------------------------------------------------------------------------------------

COMMANDS = {
    "/reset": "begin a new conversation; the system message stays",
    "/system TEXT": "set the system message; without TEXT there is none",
    "/save FILE": "add the conversation to a .jsonl file, as a row that sft_gpt.py trains on",
    "/speed": "tell tokens a second after each answer, or no longer",
    "/help": "this list",
}
GREEN, DIM = "1;32", "2"


def painted(text: str, colour: str) -> str:
    """Text in a colour on a terminal; as it is elsewhere, and with NO_COLOR (https://no-color.org)."""
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\x1b[{colour}m{text}\x1b[0m" if wanted else text


def tell(text: str) -> None:
    """Print what comes from this script, not from the model."""
    print(painted(f"[{text}]", DIM))


def respond(model: GPTModel, tokenizer, messages: list[dict], config: Config) -> list[dict]:
    """Print the answer to a conversation as it comes. Returns the messages kept, with the answer. An answer
    that was stopped or cut is marked. If it was stopped before it began, the question is not kept either."""
    before = messages[:-1]
    messages, dropped = drop_oldest(messages, tokenizer, room_for_prompt(model, config))
    if dropped:
        context = model.config.max_position_embeddings
        tell(f"the context of {context} tokens is full: the {dropped} oldest messages were dropped")
    answer, cut, times = "", 0, [time.monotonic()]
    try:
        for event in stream(model, tokenizer, messages, config):
            if cut := event.get("cut", 0):
                break
            answer += event["text"]
            times.append(time.monotonic())
            print(visible(event["text"]), end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
        if not answer:
            return before
        cut = len(times) - 1
    else:
        if cut:
            why = "" if cut == config.max_new_tokens else ", the context is full"
            print(f"[cut at {cut} tokens{why}]", file=sys.stderr)
    if config.speed and len(times) > 2:
        began, first, *_, last = times
        speed = (len(times) - 2) / (last - first)
        tell(f"{len(times) - 1} tokens: the first after {first - began:.2f} s, then {speed:.1f} tokens/s")
    return [*messages, {"role": "assistant", "content": answer} | ({"cut": True} if cut else {})]


def system_turn(text: str) -> list[dict]:
    """The beginning of a conversation."""
    return [{"role": "system", "content": text}] if text else []


def save(messages: list[dict], name: str) -> str:
    """Add a conversation to a file of conversations; returns what to tell. Raises InputError if it cannot."""
    path = home_expanded(name)
    if path.suffix != ".jsonl":
        raise InputError(f"/save {name}: expected a file whose name ends in .jsonl, as chats.jsonl")
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise InputError("there is no answer yet, so nothing was saved; ask something first")
    try:
        row = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                row = row if file.read() == b"\n" else "\n" + row  # an editor may leave the last line open
            file.write(row.encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({one_line(error)}); choose another file") from error
    cut = sum("cut" in message for message in messages)
    note = f"; first complete the answers marked as cut in it ({cut})" if cut else ""
    return f"added {len(messages)} messages to {path}; sft_gpt.py --data={path} trains on them{note}"


def command(line: str, messages: list[dict], config: Config) -> tuple[list[dict], Config, str]:
    """Obey a line that begins with /: the messages and settings after it, and what to tell.

    Raises InputError for an unknown one and for one that cannot be obeyed.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        return system_turn(config.system), config, "a new conversation"
    if name == "/system":
        turns = [message for message in messages if message["role"] != "system"]
        told = "the system message is set" if rest else "there is no system message"
        return system_turn(rest) + turns, replace(config, system=rest), told
    if name == "/save":
        return messages, config, save(messages, rest)
    if name == "/speed":
        config = replace(config, speed=not config.speed)
        return messages, config, f"tokens a second are {'told' if config.speed else 'not told'}"
    if name == "/help":
        lines = [f"{usage:14}{what}" for usage, what in COMMANDS.items()]
        lines += ['"""           begins and ends a message of several lines; a paste may have them, too']
        return messages, config, "\n ".join(lines)
    raise InputError(f"{name} is no command; /help lists them, and a space before the / makes it a message")


def line_editing() -> bool:
    """Let arrow keys edit and recall lines, and a paste of several lines be one message, by readline. False
    for a Python without it, and where input or output is no terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        import readline
    except ImportError:
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    return True


def read_message(prompt: str) -> str:
    """The next message or command: a line, a paste, or all that stands between two times three quotes.

    Raises EOFError at the end of the input.
    """
    text = input(prompt)
    if not text.startswith('"""'):
        return text
    text = text[3:]
    while not text.rstrip().endswith('"""'):
        text += "\n" + input(". ")
    return text.rstrip().removesuffix('"""').strip("\n")


def chat(model: GPTModel, tokenizer, config: Config) -> None:
    """Answer the prompt, or one message after another until the input ends."""
    messages = system_turn(config.system)
    if config.prompt:
        respond(model, tokenizer, [*messages, {"role": "user", "content": config.prompt}], config)
        return
    print(f"{config.model}: {model.num_parameters():,} parameters. Ctrl-C stops an answer, Ctrl-D the chat.")
    sys.stdin.reconfigure(errors="surrogateescape")  # one line of other bytes ends no conversation
    prompt = painted("> ", GREEN)
    if line_editing():  # readline has to know what takes no room on the line
        prompt = re.sub("(\x1b[^m]*m)", "\x01\\1\x02", prompt)
    while True:
        try:
            text = read_message(prompt)
            check_text(text)
            if text.startswith("/") and "\n" not in text:
                messages, config, told = command(text, messages, config)
                tell(told)
            elif text.strip():
                messages = respond(model, tokenizer, [*messages, {"role": "user", "content": text}], config)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
        except InputError as error:
            print(f"[{error}]", file=sys.stderr)


# -- start ---------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    check_numbers(asdict(config), ("max_new_tokens", "top_p"))
    check_sampling(config.temperature, config.top_k or None, config.top_p)
    for text in (config.system, config.prompt):
        check_text(text)
    check_choice("dtype", config.dtype, DTYPES)
    check_choice("weights", config.weights, ("same", "int8"))
    if config.web and config.prompt:
        raise InputError("--web and --prompt exclude each other; type the prompt into the page")
    ranks = Ranks(0, 1, usable_device(config.device))
    if config.weights == "int8" and ranks.device.type != "cpu":
        raise InputError(f"--weights=int8 is for CPUs, the device is {ranks.device}; leave it out")
    settle_precision(ranks, config.dtype)
    model, tokenizer = load(config.model, ranks.device)
    model.int8_decoding = config.weights == "int8"
    with ranks.autocast():
        if config.web:
            about = {"model": config.model, "system": config.system, "speed": config.speed}
            answer = partial(events, model, tokenizer, config=config)
            serve(ChatServer(answer, about=about, host=config.web_host, port=config.port))
        else:
            chat(model, tokenizer, config)


if __name__ == "__main__":
    run_script(main, Config)
