"""The training text of the demo model: made up here, seeded, the same on every machine.

`documents(seed)` yields training documents without end: mostly chats, sometimes a plain story. A
chat strings together the topics of `topics`; each line of the user is roughened as real typing is
(`phrases`).
`python -m examples.train_demo.corpus 20` prints some.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from . import topics
from .chat import Chat
from .phrases import typed
from .smalltalk import SYSTEM_NAMES, SYSTEM_PROMPTS

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Message = dict[str, str]
Document = list[tuple[str, bool]]  # pieces of text, and whether the model is to learn to write them


def normalized(text: str) -> str:
    """A question without case and punctuation, to compare phrasings."""
    return " ".join(re.findall(r"[a-z0-9+*'/-]+", text.lower()))


def conversation(rng: random.Random, held_out: frozenset[str] = frozenset()) -> list[Message]:
    """One chat of one to about ten exchanges.

    Phrasings in `held_out` (normalized) do not occur in it.
    """
    chat = Chat(rng)
    exchanges = [(typed(ask, reply, rng), reply) for ask, reply in topics.write(chat)]
    messages = []
    for user, reply in exchanges:
        if normalized(user) not in held_out:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    return [*_system(chat), *messages] if messages else []


def _system(chat: Chat) -> list[Message]:
    if chat.chance(0.75):
        return []
    content = chat.pick(SYSTEM_PROMPTS)
    if chat.name and chat.chance(0.2):
        content = f"{content} {chat.pick(SYSTEM_NAMES).format(name=chat.name)}"
    return [{"role": "system", "content": content}]


def render(messages: list[Message]) -> Document:
    """The messages as ChatML; only what the assistant says is to be learned."""
    document: Document = []
    for message in messages:
        answer = message["role"] == "assistant"
        document.append((f"{IM_START}{message['role']}\n", False))
        document.append((f"{message['content']}{IM_END}", answer))
        document.append(("\n", False))
    return document


def documents(seed: int, held_out: frozenset[str] = frozenset()) -> Iterator[Document]:
    """Training documents without end."""
    rng = random.Random(seed)
    while True:
        if rng.random() < 0.03:
            yield [(Chat(rng).story() + END_OF_TEXT, True)]
        elif messages := conversation(rng, held_out):
            yield render(messages)
