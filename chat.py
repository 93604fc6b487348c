"""Talk to a model, or have it answer one prompt.

    python chat.py --model=out/chat
    python chat.py --model=out/chat --prompt="What is the capital of France?"

Ctrl-C stops an answer, Ctrl-D ends the chat. When the context is full the oldest turns are dropped, with a
line that says so; the system message stays.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from checkpoint import find_model
from common import InputError, check_choice, check_numbers, run_script
from distributed import Ranks, usable_device
from generation import SAMPLING, check_sampling
from gpt import GPTModel
from huggingface import model_directory
from precision import DTYPES, settle_precision
from sft import prompt_ids
from sources import half_surrogate
from tokenization import END, TURN_END, load_tokenizer, vocabulary_size


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
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of matrix products: float32, bfloat16, or auto for the faster one
    weights: str = "same"  # int8: on a CPU, faster answers from rounded weights; same: as they are


def load(name: str, device: str = "cpu") -> tuple[GPTModel, object]:
    """The model that a user named, on a device, and its tokenizer; InputError if it does not know ChatML."""
    path = model_directory(find_model(name))
    model, tokenizer = GPTModel.from_pretrained(path).to(device), load_tokenizer(path)
    model.graph_decoding, model.kept_weights = True, {}
    unknown = tokenizer.convert_tokens_to_ids(TURN_END) in tokenizer.new_ids
    if unknown or vocabulary_size(tokenizer) > model.config.vocab_size:
        raise InputError(f"{name} has no ids for ChatML's tokens; fine-tune it with sft_gpt.py first")
    return model, tokenizer


def check_text(text: str) -> None:
    """Raise InputError for bytes that the command line or the terminal could not decode."""
    if half_surrogate(text):
        raise InputError(f"{text!a} is no UTF-8 text; set the terminal to UTF-8 and type it again")


def drop_oldest(messages: list[dict], tokenizer, room: int) -> tuple[list[dict], int]:
    """The messages without the oldest turns that do not fit into `room` tokens, and how many were dropped.

    A system message at the start stays. Raises InputError if the last message alone is too long.
    """
    system, turns = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    for dropped in range(len(turns)):
        kept = system + turns[dropped:]
        if turns[dropped]["role"] == "user" and len(prompt_ids(kept, tokenizer)) <= room:
            return kept, dropped
    length = len(prompt_ids(system + turns[-1:], tokenizer))
    raise InputError(f"the message takes {length} tokens and the context leaves it {room}; shorten it")


def stream(model: GPTModel, tokenizer, messages: list[dict], config: Config) -> Iterator[str]:
    """The answer's text, piece by piece; a character whose bytes are not all there yet waits for the rest."""
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
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def respond(model: GPTModel, tokenizer, messages: list[dict], config: Config) -> list[dict]:
    """Print the answer to a conversation as it comes; returns the messages kept, with the answer."""
    context = model.config.max_position_embeddings
    messages, dropped = drop_oldest(messages, tokenizer, context - min(config.max_new_tokens, context // 2))
    if dropped:
        print(f"[the context of {context} tokens is full: the {dropped} oldest messages were dropped]")
    answer = ""
    try:
        for piece in stream(model, tokenizer, messages, config):
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return [*messages, {"role": "assistant", "content": answer}]


def main(config: Config) -> None:
    check_numbers(asdict(config), ("max_new_tokens", "top_p"))
    check_sampling(config.temperature, config.top_k or None, config.top_p)
    for text in (config.system, config.prompt):
        check_text(text)
    check_choice("dtype", config.dtype, DTYPES)
    check_choice("weights", config.weights, ("same", "int8"))
    ranks = Ranks(0, 1, usable_device(config.device))
    if config.weights == "int8" and ranks.device.type != "cpu":
        raise InputError(f"--weights=int8 is for CPUs, the device is {ranks.device}; leave it out")
    settle_precision(ranks, config.dtype)
    model, tokenizer = load(config.model, ranks.device)
    model.int8_decoding = config.weights == "int8"
    with ranks.autocast():
        chat(model, tokenizer, config)


def chat(model: GPTModel, tokenizer, config: Config) -> None:
    """Answer the prompt, or one message after another until the input ends."""
    messages = [{"role": "system", "content": config.system}] if config.system else []
    if config.prompt:
        respond(model, tokenizer, [*messages, {"role": "user", "content": config.prompt}], config)
        return
    print(f"{config.model}: {model.num_parameters():,} parameters. Ctrl-C stops an answer, Ctrl-D the chat.")
    sys.stdin.reconfigure(errors="surrogateescape")  # one line of other bytes ends no conversation
    while True:
        try:
            question = input("> ")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if question.strip():
            try:
                check_text(question)
                messages = respond(
                    model, tokenizer, [*messages, {"role": "user", "content": question}], config
                )
            except InputError as error:
                print(f"[{error}]", file=sys.stderr)


if __name__ == "__main__":
    run_script(main, Config)
