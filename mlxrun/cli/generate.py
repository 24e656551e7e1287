"""``mlxrun generate``: one prompt in, its continuation out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mlxrun.cli.console import Bar, note, visible
from mlxrun.cli.loading import load_model, read_text, usage_line
from mlxrun.cli.options import (
    Command,
    ModelName,
    Values,
    defaults,
    take,
    take_settings,
    with_generation,
    with_ignore_eos,
)
from mlxrun.config import CacheConfig

if TYPE_CHECKING:
    from mlxrun.cli.thinking import Think
    from mlxrun.llm import LLM
    from mlxrun.outputs import Usage


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
@with_ignore_eos
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@with_generation(defaults())
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
    settings = take_settings(options) | {"ignore_eos": ignore_eos}
    llm = load_model(model, cache=CacheConfig(**cache), **options)
    request = settings | cache | {"parse_special": parse_special, "template": template}
    usage: Usage | None
    if as_json:
        first = [] if system is None else [{"role": "system", "content": system}]
        prompt: Any = [*first, {"role": "user", "content": text}] if chat else text
        with Bar("Prefilling", unit="tokens") as bar:
            completion = llm.generate(prompt, progress=bar, **request)
        print(json.dumps({"model": model, **completion.to_dict()}, ensure_ascii=False))
        usage = completion.usage
    elif chat:
        from mlxrun.cli.chat import print_answer
        from mlxrun.cli.conversation import Conversation

        settings = defaults(llm.defaults.params) | settings
        session = llm.session(**cache)
        conversation = Conversation(
            llm, session, system=system, settings=settings, template=template
        )
        print_answer(conversation, text, think, shown=_shown())
        usage = conversation.usage
    else:
        usage = _print_continuation(llm, text, request)
    if usage and (stats or verbose):
        note(usage_line(usage))


def _shown() -> Callable[[str], str]:
    """On a terminal control characters are neutralized; a pipe gets the text as it is."""
    return visible if sys.stdout.isatty() else str


def _print_continuation(llm: LLM, prompt: str, request: Values) -> Usage | None:
    shown, usage = _shown(), None
    with Bar("Prefilling", unit="tokens") as bar:
        for chunk in llm.stream(prompt, progress=bar, **request):
            bar.stop()
            sys.stdout.write(shown(chunk.text))
            sys.stdout.flush()
            usage = chunk.usage
    print(flush=True)
    return usage


def _prompt(prompts: tuple[str, ...], files: tuple[str, ...]) -> str:
    if not prompts and not files:
        if sys.stdin.isatty():
            raise click.UsageError("Give --prompt or --file, or pipe a text in.")
        return read_text("-")
    parts = [read_text("-") if prompt == "-" else prompt for prompt in prompts]
    return "\n".join(parts + [read_text(file) for file in files])
