"""Tokenizers: training one, loading one, and ChatML's special tokens."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import InputError, one_line

END, TURN_START, TURN_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# ChatML; the generation marks let `apply_chat_template(..., return_assistant_tokens_mask=True)` give the loss
# mask.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterator[str], vocab_size: int):
    """A byte-level BPE of vocab_size ids, the special ones first; GPT-2's splitting, digits apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIALS):
        raise InputError(
            f"vocab_size is {vocab_size}; a byte-level one needs at least {len(alphabet) + len(SPECIALS)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return with_chatml(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def load_tokenizer(name: str | Path):
    """Any Hugging Face tokenizer, by directory or hub id, made ready for ChatML; or InputError."""
    from huggingface_hub.utils import httpx
    from transformers import AutoTokenizer

    files = [Path(name) / file for file in ("tokenizer.json", "tokenizer.model", "vocab.json")]
    if Path(name).is_dir() and not any(file.exists() for file in files):  # else an empty one would be made up
        raise InputError(f"{name} holds no tokenizer; expected a tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError, KeyError, httpx.HTTPError) as error:
        raise InputError(f"no tokenizer could be loaded from {name}: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise InputError(
            f"{name} is a slow tokenizer; only those of the tokenizers library (tokenizer.json) are supported"
        )
    return with_chatml(tokenizer)


def with_chatml(tokenizer):
    """Add the special tokens that a tokenizer lacks, `new_tokens` of them, and set the ChatML template."""
    from tokenizers import AddedToken

    tokenizer.new_tokens = tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIALS], special_tokens=True
    )
    tokenizer.eos_token = tokenizer.pad_token = END
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, on all cores, with no special id: text that looks like a special token stays text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer may have been saved with them
    backend.no_padding()
    backend.encode_special_tokens = True  # the library's name for: as the text that they are spelled with
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = False


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of all that decides how text becomes ids; equal for a tokenizer and its saved copy."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: fields[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]
