"""What all scripts need: the user's mistakes, the command line, small helpers for files."""

import ast
import atexit
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import select
import signal
import socket
import sys
import textwrap
import threading
import time
import tokenize
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

IGNORE = -100  # a target with this value is not trained on; PyTorch's and Hugging Face's convention
RESUMABLE = 75  # the exit status of a run that was stopped and can go on; sysexits.h calls it EX_TEMPFAIL


class InputError(ValueError):
    """A mistake of the user, told in one sentence. Scripts print it and exit with status 1."""


def one_line(error: BaseException) -> str:
    """An error's message in one line; its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


# -- command line --------------------------------------------------------------------------------------------


def field_comments(config_class: type) -> dict[str, str]:
    """The comments behind each field of a dataclass, inherited ones too, joined; wherever a formatter breaks
    the line.

    Raises ValueError for a field without one, so that no flag is ever without help.
    """
    if config_class is object:
        return {}
    source = textwrap.dedent(inspect.getsource(config_class))
    comments = {  # by line
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    told = {
        field.target.id: " ".join(
            comments[n] for n in range(field.lineno, field.end_lineno + 1) if n in comments
        )
        for field in fields
    }
    silent = [name for name, comment in told.items() if not comment]
    if silent:
        raise ValueError(f"{config_class.__qualname__} has fields without a comment: {', '.join(silent)}")
    inherited = {}
    for base in reversed(config_class.__bases__):
        inherited |= field_comments(base)
    return inherited | told


def parse_value(text: str, kind: type):
    """A command-line value as the field's type, 1_000 and 1e9 for integers too. Raises ValueError,
    KeyError or OverflowError for any other text."""
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if kind is int and not re.fullmatch(r"[-+]?[\d_]+", text):
        if float(text) != int(float(text)):
            raise ValueError(text)
        return int(float(text))
    return kind(text)


PATH_FLAGS = "source data data_dir out_dir cache_dir model init_from tokenizer resume".split()


def parse_config(config_class: type, arguments: Sequence[str]):
    """A Config with `--field=value` overrides; the fields, their defaults and comments are the documentation.

    Raises InputError for an unknown field or a value of the wrong type, and SystemExit for --help.
    """
    comments, kinds = field_comments(config_class), typing.get_type_hints(config_class)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    overview = "\n".join(
        f"  {f'--{name}={default}':<32}  {comments[name]}" for name, default in defaults.items()
    )
    if {"-h", "--help"} & set(arguments):
        print(f"{sys.modules[config_class.__module__].__doc__.strip()}\n\nFields and defaults:\n{overview}")
        raise SystemExit(0)
    values = {}
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not equals and kinds.get(name) is bool:
            equals, text = "=", "true"
        if argument.startswith("--") and not equals and name in defaults:
            raise InputError(f"{argument} has no value; write {argument}=value ({comments[name]})")
        if not argument.startswith("--") or not equals or name not in defaults:
            raise InputError(
                f"{argument} is not understood; write --field=value with one of these fields:\n{overview}"
            )
        if name in PATH_FLAGS:  # a shell leaves the ~ behind a =
            text = re.sub(r"(^|,)~(?=/|$)", lambda found: f"{found[1]}{Path.home()}", text)
        try:
            values[name] = parse_value(text, kinds[name])
        except (ValueError, KeyError, OverflowError):
            raise InputError(
                f"--{name}={text} is not of type {kinds[name].__name__} ({comments[name]})"
            ) from None
    return config_class(**values)


# -- the process ---------------------------------------------------------------------------------------------

# Flags that save a GPU's memory without changing the result, where a script has them.
SAVERS = {
    "micro_batch_size": "lower --micro_batch_size",
    "checkpoint_activations": "use --checkpoint_activations",
    "shard": "with several GPUs use --shard=full",
}


def told_memory(error: RuntimeError, config_class: type) -> str:
    """A GPU's running out of memory in one sentence, with the sizes that torch gives and the script's flags
    that help."""
    text = " ".join(str(error).split())
    sizes = {
        "{} were asked for": r"Tried to allocate ([\d.]+ \wiB)",
        "the GPU has {}": r"total capacity of ([\d.]+ \wiB)",
        "{} are free": r"of which ([\d.]+ \wiB) is free",
    }
    found = [told.format(size[1]) for told, pattern in sizes.items() if (size := re.search(pattern, text))]
    names = {field.name for field in dataclasses.fields(config_class)}
    flags = [told for name, told in SAVERS.items() if name in names] or ["choose a smaller model"]
    return (
        f"out of memory on the GPU ({', '.join(found) or text[:200]}); {' or '.join(flags)}, and check "
        f"with nvidia-smi that nothing else uses it"
    )


def run_script(main: Callable, config_class: type) -> None:
    """Run main(config) with the command line's config. A mistake of the user, or a GPU's running out of
    memory, is printed as one sentence, and the process ends with status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal in Latin-1 prints ? for what it lacks
    try:
        main(parse_config(config_class, sys.argv[1:]))
        sys.stdout.flush()
        end_rank(0)
        return
    except SystemExit as end:
        if end.code == RESUMABLE:
            if mark := os.environ.get("RESUMABLE_FILE"):
                Path(mark).touch()  # for launch.sh: torchrun's own status is 1 however its ranks end
            end_rank(RESUMABLE)
        raise
    except InputError as error:
        message = f"error: {error}"
    except OSError as error:
        if error.errno == errno.EPIPE and not stdout_is_read():  # as in `preview.py | head`
            drop_output()
            raise SystemExit(1) from None
        if error.errno == errno.ENAMETOOLONG:
            message = f"error: a name is too long for a file ({str(error)[:200]}); give another"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"error: the disk is full ({error}); make room and run the same command again, it continues"
            )
        elif error.errno in (errno.EACCES, errno.EPERM) and error.filename:
            told = (
                f"error: {error.filename} may not be used ({error.strerror}); ask its owner or name another"
            )
            print(told, file=sys.stderr, flush=True)
            raise SystemExit(1) from None  # torchrun tries again: a file server's refusal may pass
        else:
            raise
    except RuntimeError as error:
        import torch  # which not all scripts need

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        message = f"error: {told_memory(error, config_class)}"
    print(message, file=sys.stderr, flush=True)  # flush now: other ranks may keep this process from exiting
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        os.kill(os.getppid(), signal.SIGTERM)  # torchrun: another start would end in the same way
    raise SystemExit(1)


def stdout_is_read() -> bool:
    """Whether anybody still reads what this process prints."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def drop_output() -> None:
    """Throw away what is printed from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def surviving_lost_output() -> Iterator[None]:
    """Print inside, and go on if nobody can read it any more: the terminal is closed, or the reader of the
    pipe has ended."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
        drop_output()


def end_rank(status: int) -> None:
    """End this process, if it is one of several ranks, without Python's own end. Threads and exit functions
    finish first, and output is flushed.

    Python's own end stops every thread that asks for the GIL. One of gloo's may be about to free a tensor:
    then the process aborts (pytorch issue 190489). FSDP2 keeps gloo's threads until the end.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        ctypes.CDLL(None).fflush(None)  # what NCCL has printed
        os._exit(status)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> None:
    """Have glibc keep what freed tensors leave, for those of the next step. By default it gives large blocks
    back to Linux, which then fills each new one with zeros, page by page."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # no block gets a mapping of its own, which free would give back
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # no free end of the heap is given back


PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def die_with_launcher() -> None:
    """Have Linux kill this process when torchrun, its parent, is gone, even if that was killed itself. In a
    session of its own it would live on, and hold its GPU and the lock of the run's folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# -- values --------------------------------------------------------------------------------------------------


def check_numbers(settings: dict, positive: Sequence[str]) -> None:
    """Raise InputError for the first number out of range.

    The `positive` settings must be above zero, all others but the seed at least zero. None may be infinite.
    Fractions and betas are at most 1.
    """
    for name, value in settings.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if name == "seed":
            if abs(value) >= 2**63:
                raise InputError(f"--seed={value}: expected a number of at most 63 bits")
            continue
        if name in positive and not 0 < value < math.inf:
            raise InputError(f"--{name}={value}: expected a number above zero")
        if not 0 <= value < math.inf:
            raise InputError(f"--{name}={value}: expected a number from zero up")
        if value > 1 and name.endswith(("_fraction", "beta1", "beta2", "max_bad_rows")):
            raise InputError(f"--{name}={value}: expected a share, from 0 to 1")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise InputError for a value that is none of the choices."""
    if value not in choices:
        raise InputError(f"--{name}={value} is unknown; choose {', '.join(choices)}")


def half_surrogate(text: str) -> str | None:
    """The first half of a surrogate pair in a text, which JSON can spell but no UTF-8 holds."""
    half = None if text.isascii() else re.search("[\ud800-\udfff]", text)
    return half and half[0]


def visible(text: str) -> str:
    """Text that is safe to print on a terminal. Control characters are spelled out, except tabs and newlines.
    So are characters that take no width or turn the direction of writing."""
    unseen = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
    return re.sub(unseen, lambda c: c[0].encode("unicode_escape").decode(), text)


# -- files ---------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """The object in a JSON file; InputError if it is missing, cut short or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}); expected a JSON object") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}; expected a JSON object")
    return value


def write_json(path: Path, value) -> None:
    """Replace a JSON file in one step: a reader sees the old or the new one, also after a crash."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())


def read_records(path: Path) -> list[dict]:
    """The rows of a file with a JSON object a line, as metrics.jsonl; none if there is no file.

    A last line that a crash cut short is left out. Another damaged line, as after a power failure, is named
    on stderr and left out.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            print(f"warning: line {number} of {path} is damaged and left out", file=sys.stderr)
    return rows


def write_records(path: Path, rows: Sequence[dict]) -> None:
    """Replace a file of records in one step."""
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file in one step. Its content is on the disk before the old one goes."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def make_folder(path: str | Path) -> None:
    """Make a folder, and those above it, if it is not there; InputError if it cannot be written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"{path} cannot be made a folder ({one_line(error)}); choose another") from error
    if not writable:
        raise InputError(f"{path} cannot be written to; choose another folder, or change its permissions")


def lock_folder(out_dir: str | Path) -> typing.IO:
    """Lock a folder to write in. The lock ends with the file returned or with the process, however that ends.

    Raises InputError while another process holds it, as two writers would mix their files, and for a lock
    that cannot be written.
    """
    path = Path(out_dir) / ".lock"
    try:
        file = open(path, "a+")
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({one_line(error)}); delete it if it is another user's and no run is "
            f"in that folder, or choose another --out_dir"
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(
                f"{out_dir} is in use by {file.read() or 'another process'}; wait for it or end it, or "
                f"choose another --out_dir"
            ) from None
        print(f"warning: {out_dir} cannot be locked ({error}); start nothing else in it", file=sys.stderr)
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file for the block; wait while another process holds it. On a disk without locks it warns
    and goes on."""
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            print(f"warning: {path} cannot be locked ({error}); start nothing else there", file=sys.stderr)
        yield


def home_expanded(path: str) -> Path:
    """The path with ~ replaced by the user's home; InputError for a ~name of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path} names the home of nobody here; write ~/ or a whole path") from error


def cache_folder(cache_dir: str) -> Path:
    """--cache_dir, or if that is empty the project's folder in the user's cache; made if it is not there."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = home_expanded(cache_dir or f"{users}/{Path(__file__).parent.name}")
    make_folder(folder)
    return folder


def sync_to_disk(path: Path) -> None:
    """Have the operating system write a file, or a folder's entries, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# -- a busy hub ----------------------------------------------------------------------------------------------

TRIES = 5  # of a request that the libraries send once only; before the last, 15 seconds have passed
LONGEST_WAIT = 60.0  # seconds, whatever a hub asks for


def patiently(ask: Callable):
    """The result of a request to the hub. If the hub is busy or hangs up, the request is sent again: after as
    many seconds as the hub says, or else after 1, 2, 4 and 8."""
    for number in range(TRIES):
        try:
            return ask()
        except Exception as error:
            wait = wait_of_busy_hub(error)
            if number == TRIES - 1 or wait is None:
                raise
            time.sleep(min(wait or 2.0**number, LONGEST_WAIT))


def wait_of_busy_hub(error: BaseException | None) -> float | None:
    """Seconds that a busy hub says to wait, 0 if it says nothing; None for an error of another kind."""
    from huggingface_hub.utils import httpx

    while error is not None:
        answer = getattr(error, "response", None)
        if answer is not None:
            said = answer.headers.get("Retry-After", "")
            busy = answer.status_code == 429 or answer.status_code >= 500
            return (float(said) if said.isdigit() else 0.0) if busy else None
        if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):  # it hung up
            return 0.0
        error = error.__cause__ or error.__context__
    return None
