"""``mlxrun generate``: one prompt in, its continuation out."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxrun.cli.console import Bar, note, size, visible
from mlxrun.cli.loading import load_model, usage_line, with_prefill_bar
from mlxrun.cli.options import (
    Command,
    ModelName,
    Values,
    defaults,
    take,
    take_settings,
    with_attention,
    with_cache_types,
    with_loading,
    with_settings,
    with_template_vars,
)
from mlxrun.config import CacheConfig
from mlxrun.errors import ContextLengthError

if TYPE_CHECKING:
    from mlxrun.cli.conversation import Think
    from mlxrun.llm import LLM
    from mlxrun.outputs import Usage

# Bytes: ten million tokens, the longest context that a model claims, at ten bytes each.
LONGEST_PROMPT = 100_000_000


@click.command("generate", cls=Command)
@click.argument("model", type=ModelName())
@click.option(
    "-p", "--prompt", "prompts", multiple=True, metavar="TEXT", help="The prompt; - is stdin."
)
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="Read the prompt from a file; - is stdin.",
)
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@click.option("--system", metavar="TEXT", help="System message; implies --chat.")
@click.option(
    "--parse-special", is_flag=True, help="Let <|markers|> in the prompt be control tokens."
)
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's end of turn.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option("--stats", is_flag=True, help="Print its cost on standard error.")
@click.option(
    "--think",
    type=click.Choice(("show", "hide")),
    help="With --chat: whether to print the model's thinking before its answer.  [default: show "
    "on a terminal, hide elsewhere]",
)
@with_template_vars
@with_settings(defaults())
@with_cache_types
@with_attention
@with_loading
def generate_command(
    model: str,
    prompts: tuple[str, ...],
    files: tuple[str, ...],
    chat: bool,
    system: str | None,
    parse_special: bool,
    ignore_eos: bool,
    as_json: bool,
    stats: bool,
    think: Think | None,
    template: Values,
    **options: Any,
) -> None:
    """Continue a text.

    Prints the continuation as it is generated. Without --prompt and --file the prompt is standard
    input. Several are joined by newlines, prompts first; a prompt of "-" stands for standard input,
    which is otherwise not read, so that the command is safe in loops. One newline at the end of a
    file or of standard input is dropped.

    \b
    Examples:
      mlxrun generate model.gguf --prompt "Once upon a time" --max-tokens 100
      mlxrun generate model.gguf < question.txt
      mlxrun generate model.gguf --chat -p "Summarize this:" -p - < article.txt
      mlxrun generate model.gguf -p "2 + 2 =" --temperature 0 --json
    """
    chat = chat or system is not None
    if chat and parse_special:
        raise click.UsageError("--parse-special is for plain prompts, not for --chat.")
    if template and not chat:
        raise click.UsageError("--template-var needs --chat.")
    if think and (as_json or not chat):
        raise click.UsageError("--think is for --chat, and not for --json.")
    if options["logprobs"] and not as_json:
        raise click.UsageError("--logprobs needs --json.")
    text = _prompt(prompts, files)
    cache, verbose = take(options, CacheConfig), options["verbose"]
    settings = take_settings(options) | cache
    settings |= {"parse_special": parse_special, "ignore_eos": ignore_eos, "template": template}
    llm = load_model(model, cache=CacheConfig(**cache), **options)
    prompt: Any = _messages(text, system) if chat else text
    if as_json:
        with Bar("Prefilling", count="tokens") as bar:
            completion = llm.generate(prompt, progress=bar, **settings)
        print(json.dumps({"model": model, **completion.to_dict()}, ensure_ascii=False))
        usage = completion.usage
    elif chat:
        usage = _print_chat(llm, prompt, settings, think)
    else:
        usage = _print_stream(llm, prompt, settings)
    if stats or verbose:
        note(usage_line(usage))


def _print_stream(llm: LLM, prompt: Any, settings: Values) -> Usage:
    """Print a continuation as it is generated, on a terminal without escape sequences."""
    shown = visible if sys.stdout.isatty() else str
    last = None
    for last in with_prefill_bar(lambda bar: llm.stream(prompt, progress=bar, **settings)):
        sys.stdout.write(shown(last.text))
        sys.stdout.flush()
    print(flush=True)
    assert last is not None and last.usage is not None
    return last.usage


def _print_chat(
    llm: LLM, messages: list[dict[str, str]], settings: Values, think: Think | None
) -> Usage:
    """Print an answer as it is generated, with thinking apart."""
    from mlxrun.cli.conversation import Thinking
    from mlxrun.cli.terminal import Writer

    on_terminal = sys.stdout.isatty()
    shown = visible if on_terminal else str
    writer = Writer(think or ("show" if on_terminal else "hide"))
    ids, last = llm.inputs.encode(messages, template=settings["template"]), None
    thinking = Thinking(llm.tokenizer)
    splitter = thinking.splitter(ids)
    for last in with_prefill_bar(lambda bar: llm.stream(ids, progress=bar, **settings)):
        for text, thought in splitter.add(thinking.text(last)):
            writer.write(shown(text), thought)
    for text, thought in splitter.finish():
        writer.write(shown(text), thought)
    print(flush=True)
    if writer.all_hidden:
        note("all of it was thinking; --think show shows that")
    assert last is not None and last.usage is not None
    return last.usage


def _prompt(prompts: tuple[str, ...], files: tuple[str, ...]) -> str:
    if not prompts and not files:
        if sys.stdin.isatty():
            raise click.UsageError("Give --prompt or --file, or pipe a text in.")
        return _read("-")
    parts = [_read("-") if prompt == "-" else prompt for prompt in prompts]
    return "\n".join(parts + [_read(file) for file in files])


def _read(name: str) -> str:
    """The text of a file, or of standard input for ``-``, without the newline at its end."""
    source = "Standard input" if name == "-" else name
    with nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as file:
        data = file.read(LONGEST_PROMPT + 1)  # /dev/zero and some pipes never end
    if len(data) > LONGEST_PROMPT:
        raise ContextLengthError(
            f"{source} holds more than {size(LONGEST_PROMPT)}, which no model's context does",
            hint="Give a shorter text",
        )
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"{source} is not UTF-8 text: {error.reason} at {error.start}."
        ) from None


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]
