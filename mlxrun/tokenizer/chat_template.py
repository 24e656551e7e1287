"""Chat templates: messages in, the prompt's text out.

Renders as transformers' ``apply_chat_template`` does, within limits on the template's size, its
output and its time.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import jinja2
from jinja2.exceptions import SecurityError

from mlxrun.errors import TemplateError
from mlxrun.tokenizer.sandbox import LimitError, RefusalError, Sandbox

__all__ = ["ChatTemplate", "DefaultTemplate", "Message", "default_template"]


Message = Mapping[str, Any]
"""A chat message: at least ``role`` and ``content``, a text or a list of parts."""

MAX_SOURCE: Final = 256_000
"""Characters of a template; the largest in use have about 20,000."""

REASONING: Final = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that hold reasoning."""

_PROBE: Final = "probed"


class ChatTemplate:
    """A compiled chat template. Thread-safe.

    Args:
        source: Jinja source.
        bos_token, eos_token: variables of the template.
        special_tokens: more of them, e.g. ``{"unk_token": "<unk>"}``.
        max_seconds: time limit of a rendering.
        max_output: character limit of a rendering.

    Raises:
        TemplateError: the source is too long or does not parse.
    """

    def __init__(
        self,
        source: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        *,
        special_tokens: Mapping[str, str] | None = None,
        max_seconds: float = 3.0,
        max_output: int = 16_000_000,
    ) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template has {len(source)} characters, more than {MAX_SOURCE}"
            )
        self.source = source
        tokens = {"bos_token": bos_token, "eos_token": eos_token, **(special_tokens or {})}
        self._tokens = {name: text for name, text in tokens.items() if text is not None}
        self._sandbox = Sandbox(max_seconds, max_output)
        try:
            self._template = self._sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as reason:
            raise TemplateError(
                f"the chat template does not parse: {reason.message} (line {reason.lineno})"
            ) from None
        except Exception as reason:  # a source nested too deeply for Python's own compiler
            raise TemplateError(f"the chat template does not compile: {_say(reason)}") from None

    def render(
        self,
        /,  # a variable may have that name
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation.

        If the template refuses a system message, its text is prepended to the first user message;
        if it cannot print lists of ``{"type": "text", "text": ...}`` parts, they are joined by
        newlines.

        Args:
            messages: mappings with ``role``, ``content`` and further fields for the template.
            add_generation_prompt: open the assistant's turn at the end.
            tools: JSON schemas of functions.
            kwargs: more variables, e.g. ``enable_thinking=False``.

        Raises:
            TemplateError: invalid messages, or the template refuses them, fails, or exceeds its
                limits.
        """
        variables = {
            **self._tokens,
            **{name: _plain(value) for name, value in kwargs.items()},
            "tools": None if tools is None else _plain(list(tools)),
            "documents": _plain(kwargs.get("documents")),
            "add_generation_prompt": add_generation_prompt,
        }
        conversation = self._flattened(_conversation(messages))
        try:
            return self._render(variables | {"messages": conversation})
        except RefusalError as reason:
            refusal, folded = reason, _fold_system(conversation)
        if folded is not None:
            try:
                return self._render(variables | {"messages": folded})
            except RefusalError as reason:
                refusal = reason
        raise TemplateError(f"the chat template refuses: {refusal}")

    def _flattened(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with lists of text parts joined, if the template cannot print lists."""
        joined = [_joined(message.get("content")) for message in messages]
        if not any(text is not None for text in joined) or self._prints_parts:
            return messages
        return [
            message if text is None else message | {"content": text}
            for message, text in zip(messages, joined, strict=True)
        ]

    @cached_property
    def _prints_parts(self) -> bool:
        """Whether the template prints a part's text, rather than the list as Python or JSON."""
        messages = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
        try:
            text = self._render({**self._tokens, "messages": messages})
        except (RefusalError, TemplateError):
            return False
        return _PROBE in text and not re.search(f"['\"]{_PROBE}['\"]", text)

    def _render(self, variables: dict[str, Any]) -> str:
        self._sandbox.start()
        parts = []
        try:
            for part in self._template.generate(variables):
                self._sandbox.tick()
                parts.append(part)
        except RefusalError:
            raise
        except LimitError as reason:
            raise TemplateError(f"the chat template {reason}") from None
        except SecurityError as reason:
            raise TemplateError(f"the chat template is refused: {reason}") from None
        except Exception as reason:  # any mistake in a template
            raise TemplateError(f"the chat template fails: {_say(reason)}") from None
        return "".join(parts)


def _conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as plain data, with reasoning under each name that templates read."""
    conversation = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise TemplateError(f"a message must be a mapping with role and content: {message!r}")
        plain = _plain(message)
        reasoning = next((plain[key] for key in REASONING if plain.get(key) is not None), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        conversation.append(plain)
    return conversation


def _joined(content: Any) -> str | None:
    """The lines of a list of text parts; None for any other content."""
    if not isinstance(content, list | tuple) or not content:
        return None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "\n".join(texts)


def _plain(value: Any) -> Any:
    """Rebuild a value from JSON's types, so that a template can call no foreign methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return f"<{type(value).__name__}>"


def _fold_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The conversation with a leading system message moved into the first user message."""
    if len(messages) < 2 or messages[0].get("role") != "system" or messages[1]["role"] != "user":
        return None
    system, user, *rest = messages
    contents = system.get("content"), user.get("content")
    if not all(isinstance(content, str) for content in contents):
        return None
    return [{**user, "content": f"{contents[0]}\n\n{contents[1]}"}, *rest]


def _say(reason: Exception) -> str:
    return f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__


_FOLDER: Final = Path(__file__).with_name("templates")
# Markers that are all tokens, the name of such a template, and its file.
_BY_MARKERS: Final = (
    (("<|im_start|>", "<|im_end|>"), "ChatML's", "chatml"),
    (("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "llama 3's", "llama3"),
    (("<start_of_turn>", "<end_of_turn>"), "gemma's", "gemma"),
    (("<|user|>", "<|assistant|>", "<|end|>"), "phi 3's", "phi3"),
    (("[INST]", "[/INST]"), "llama 2's", "llama2"),
    ((), "a plain dialogue", "plain"),
)


class DefaultTemplate(NamedTuple):
    """A chat template for a model without one."""

    name: str
    source: str

    @property
    def warning(self) -> str:
        return (
            f"no chat template in this file: probably a base model; using {self.name}. "
            "`mlxrun generate` (in Python: generate with a string) continues text"
        )


def default_template(tokens: Container[str]) -> DefaultTemplate:
    """The first template whose markers are all tokens, at last a plain dialogue."""
    name, file = next(
        (name, file)
        for markers, name, file in _BY_MARKERS
        if all(marker in tokens for marker in markers)
    )
    return DefaultTemplate(name, (_FOLDER / f"{file}.jinja").read_text("utf-8").rstrip())
