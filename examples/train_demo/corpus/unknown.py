"""Questions that the demo model cannot answer, and its plain replies."""

from __future__ import annotations

from . import unknown_asks as asks
from .chat import Chat, Exchange
from .words import (
    CITIES,
    COUNTRIES,
    LANGUAGES,
    PEOPLE,
    THINGS,
    TONGUES,
    TOPICS,
    UNKNOWN_ANIMALS,
    VERBS,
    invented,
    keyboard_mash,
)

UNKNOWN = (
    "I don't know about that. I am a tiny demonstration model and know only a few things. "
    "Ask me what I can do."
)
WHY_NOT = "Because I am a tiny model, and I was trained on very little text."
# (phrasings, reply, weight)
_KINDS = (
    (asks.QUESTIONS, UNKNOWN, 12),
    (
        asks.CODE,
        "I cannot write code. I am too small for that. Ask me how to run or convert a model.",
        2.5,
    ),
    (asks.TRANSLATE, "I cannot translate. I speak only simple English.", 1.2),
    (
        asks.WRITING,
        "I cannot write that. I am a tiny demonstration model. But I can tell you a tiny story.",
        1.5,
    ),
    (asks.NOISE, "I did not understand that. Ask me what I can do.", 2.5),
    (asks.LETTERS, "I see text as tokens, so I cannot spell or count letters.", 0.8),
    (asks.STATEMENTS, "I see. I am a tiny model, so I do not have much to say about that.", 1.3),
    (asks.TASTE, "I am a program, so I do not have or like such things. But I like to chat.", 0.8),
)


def unknown(chat: Chat) -> list[Exchange]:
    phrasings, reply, _ = chat.rng.choices(_KINDS, [weight for _, _, weight in _KINDS])[0]
    slots = _slots(chat)
    # Nonsense stands alone: "can you tell me asdf" would be a question.
    ask = (
        chat.pick(phrasings).format(**slots)
        if phrasings is asks.NOISE
        else chat.ask(phrasings, **slots)
    )
    exchanges = [(ask, reply)]
    if chat.chance(0.1):
        exchanges.append((chat.ask(asks.WHY_NOT), WHY_NOT))
    elif chat.chance(0.15):
        exchanges.append((chat.ask(asks.AND_THAT, **_slots(chat)), UNKNOWN))
    return exchanges


def _slots(chat: Chat) -> dict[str, object]:
    """Something for each slot of `unknown_asks`."""
    rng = chat.rng
    person = f"{invented(rng, 2).capitalize()} {invented(rng).capitalize()}"
    slots: dict[str, object] = {
        "t": _topic(chat),
        "t2": _topic(chat),
        "p": rng.choice(PEOPLE) if chat.chance(0.7) else person,
        "n": invented(rng, 2).capitalize(),
        "c": rng.choice(COUNTRIES) if chat.chance(0.8) else invented(rng, 2).capitalize(),
        "y": rng.choice(CITIES),
        "v": rng.choice(VERBS),
        "l": rng.choice(LANGUAGES),
        "g": rng.choice(TONGUES),
        "o": rng.choice(THINGS),
        "o2": rng.choice(THINGS),
        "o3": rng.choice(THINGS),
        "u": rng.choice(THINGS)
        if chat.chance(0.5)
        else rng.choice((invented(rng), *UNKNOWN_ANIMALS)),
        "m": keyboard_mash(rng),
        "m2": keyboard_mash(rng),
        "i": invented(rng),
        "i2": invented(rng),
        "i3": invented(rng),
        "letter": rng.choice("abcdefghilmnoprst"),
        "a": rng.randrange(10),
        "b": rng.randrange(10),
    }
    slots["q"], slots["q2"] = (chat.pick(asks.QUESTIONS[:40]).format(**slots) for _ in range(2))
    return slots


def _topic(chat: Chat) -> str:
    rng = chat.rng
    topic, thing = rng.choice(TOPICS), rng.choice(THINGS)
    if chat.chance(0.6):
        return topic
    word = invented(rng)
    return rng.choice((word, word.capitalize(), f"{topic} {thing}", f"{word} {thing}", f"{thing}s"))
