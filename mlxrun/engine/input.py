"""A prompt and its options to a checked request, its limit and its sampler."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Unpack, cast

import mlx.core as mx

from mlxrun.config import Flag, known, names_of
from mlxrun.errors import ContextLengthError, ParameterError
from mlxrun.model import Model
from mlxrun.outputs import MAX_TOKENS, Request, RequestOptions
from mlxrun.sampling.dry import breaker_tokens
from mlxrun.sampling.sampler import Sampler
from mlxrun.sampling_params import SamplingDefaults, SamplingOptions
from mlxrun.tokenizer.chat_template import REASONING
from mlxrun.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxrun.engine.sequence import Session

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]

# Lists of DRY's sequence breakers to cache: finding their tokens goes through the vocabulary.
_BREAKERS = 16


class InputProcessor:
    """Makes the requests of one model.

    Args:
        model: its vocabulary and context bound them.
        defaults: the sampling parameters of requests that name none.
    """

    def __init__(
        self,
        model: Model[Any],
        tokenizer: Tokenizer,
        defaults: SamplingDefaults = SamplingDefaults(),  # noqa: B008 - immutable
    ) -> None:
        self.model, self.tokenizer, self.defaults = model, tokenizer, defaults
        self._breakers = lru_cache(_BREAKERS)(partial(_breakers, tokenizer))

    def request(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Request:
        """A checked request.

        Args:
            prompt: text, token ids, or messages to put through the chat template.

        Raises:
            ParameterError: a value outside its range, or no option of that name.
            TemplateError: the chat template fails.
        """
        known(options, names_of(RequestOptions))
        given: dict[str, Any] = {"max_tokens": MAX_TOKENS, **options}
        parse_special = Flag().check("parse_special", given.pop("parse_special", False))
        ids = self.encode(prompt, parse_special, given.pop("template", None))
        sampling = {name: given.pop(name) for name in names_of(SamplingOptions) if name in given}
        params = given.pop("params", None)
        if params is None:
            params = replace(self.defaults.params, **sampling)
        elif sampling:
            raise ParameterError("params", sampling, "given alone, without single fields")
        request = Request(ids, params, **given)
        self.check(request)
        return request

    def encode(
        self,
        prompt: Prompt,
        parse_special: bool = False,
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """A prompt's token ids; those that are given as such are not checked yet."""
        variables = _variables(template)
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, parse_special=parse_special)
        elif isinstance(prompt, Mapping):
            raise ParameterError("prompt", prompt, "a list of messages, also if there is only one")
        elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            ids = self.tokenizer.encode_chat(
                conversation(cast(Sequence[Message], prompt)), **variables
            )
        else:
            ids = token_ids(cast(Sequence[int], prompt))
        if not ids:
            raise ParameterError("prompt", prompt, "at least one token long")
        return ids

    def check(self, request: Request) -> None:
        """Check a request against the model.

        Raises:
            ParameterError: a token that the model does not have, or a bias that bans them all.
        """
        size, largest = self.model.vocab_size, max(request.prompt)
        if largest >= size:
            raise ParameterError("token id", largest, f"a whole number from 0 to {size - 1}")
        banned = sum(bias == -math.inf for bias in request.params.logit_bias.values())
        if banned >= size:
            raise ParameterError(
                "logit_bias", f"a ban of all {banned}", "such that a token is left"
            )

    def check_session(self, request: Request, session: Session | None) -> None:
        """Check the session that a request continues.

        Raises:
            ParameterError: another model's session, or a session together with cache options.
        """
        if session is None:
            return
        if getattr(session, "model", None) is not self.model:
            raise ParameterError("session", session, "one that this model's session() made")
        if request.types != (None, None) or request.attention is not None:
            raise ParameterError("session", session, "left out where options of one are given")

    def limit(self, request: Request, *, windowed: bool = False, context: int | None = None) -> int:
        """The most tokens to sample.

        Args:
            windowed: old tokens are evicted, so that the context never fills.
            context: tokens of prompt and completion, if not the model's.

        Raises:
            ContextLengthError: the prompt leaves no room in the context.
        """
        length = self.model.context_length
        if windowed:
            return request.max_tokens or length
        whose = "the model's context"
        if context is not None and context < length:
            length, whose = context, "the context that was asked for"
        room = length - len(request.prompt)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(request.prompt)} tokens, {whose} holds {length}",
                hint='Shorten it, or evict old tokens: attention="window:N" (--attention '
                "window:N), or a session with a window",
            )
        return min(request.max_tokens or room, room)

    def sampler(self, request: Request) -> Sampler:
        """The sampler of a request."""
        params = request.params
        breakers: frozenset[tuple[int, ...]] = frozenset()
        if params.dry_multiplier:
            breakers = self._breakers(params.dry_sequence_breakers)
        return Sampler(
            params, self.model.vocab_size, context_tokens=request.prompt, dry_breakers=breakers
        )


def token_ids(ids: Sequence[int] | mx.array) -> list[int]:
    """Token ids as a list, also of numpy or MLX arrays.

    Raises:
        ParameterError: they are no sequence, or an empty one.
    """
    listed = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(listed, Iterable) or isinstance(listed, bytes | bytearray):
        raise ParameterError("prompt", ids, "text, token ids or messages")
    tokens = list(cast(Iterable[int], listed))
    if not tokens:
        raise ParameterError("prompt", tokens, "at least one token long")
    return tokens


def conversation(messages: Sequence[Message]) -> list[Message]:
    """Messages that a model of text can read.

    Raises:
        ParameterError: there are none; or one is no mapping, has no role or no content, or has
            parts that are no text.
    """
    if not messages:
        raise ParameterError("messages", messages, "at least one message long")
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, Mapping):
            allowed = 'a mapping such as {"role": "user", "content": "Hello!"}'
            raise ParameterError(name, message, allowed)
        if "role" not in message:
            raise ParameterError(name, message, "a message with a role")
        content = message.get("content")
        # A turn that calls tools, or has been thought out only so far, may have none.
        if content is None and not any(map(message.get, ("tool_calls", *REASONING))):
            raise ParameterError(name, message, "a message with content")
        for part in content if isinstance(content, list | tuple) else ():
            text = part.get("text") if isinstance(part, Mapping) else None
            if not isinstance(text, str) or part.get("type") != "text":
                allowed = 'made of parts such as {"type": "text", "text": "Hello!"}'
                raise ParameterError(f"{name}['content']", part, allowed)
    return list(messages)


def _breakers(tokenizer: Tokenizer, strings: tuple[str, ...]) -> frozenset[tuple[int, ...]]:
    """The token sequences across which DRY sees no repetition."""
    return breaker_tokens(
        strings,
        [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)],
        lambda text: tokenizer.encode(text, add_special=False),
    )


def _variables(template: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Variables of a chat template, checked."""
    given = {} if template is None else template
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ParameterError("template", template, "a mapping of names to values")
    if "messages" in given:
        raise ParameterError("template", "messages", "variables other than the messages")
    return given
