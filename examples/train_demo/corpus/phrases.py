"""How people write: a little grammar for phrasings, and the noise of real typing.

`[a|b|]` in a template stands for one of its alternatives, here a, b or nothing; groups may nest.
`{slot}` is filled after the choice, so what a slot holds is never read as grammar.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from .glossary import TERMS
from .world import ANIMALS, COLOURS, DAYS, MONTHS

# Words that the model knows, so that it may put their spelling right.
LEARNED = frozenset(
    word.lower()
    for phrase in (
        *ANIMALS,
        *DAYS,
        *MONTHS,
        *COLOURS,
        *(name for term in TERMS for name in term.names),
    )
    for word in phrase.split()
)
_GROUP = re.compile(r"\[([^\[\]]*)\]")
_SPACES = re.compile(r" +")
_QUESTION = ("what", "who", "how", "where", "which", "when", "why", "whats", "what's")
# fmt: off
_LEADS = (
    "so", "ok", "hey", "well", "um", "and", "oh", "now", "please", "hi", "ok so", "alright", "hmm",
)
_ASKS = (
    "tell me", "can you tell me", "do you know", "i want to know", "could you tell me",
    "please tell me", "i would like to know", "say", "i wonder", "quick question,", "explain to me",
)
_TAILS = ("please", "then", "thanks", "friend", "model", "again")
_NEIGHBOURS = dict(zip("qwertyuiopasdfghjklzxcvbnm", "wertyuiopossdfghjkxxcvbnmn", strict=True))
_SHORT = {
    "you": "u", "are": "r", "please": "pls", "what is": "whats", "do not": "dont", "i am": "im",
    "what's": "whats", "don't": "dont", "can't": "cant", "favourite": "favorite", "colour": "color",
    "because": "cuz", "your": "ur", "what": "wat", "thanks": "thx",
}
# fmt: on


def expand(template: str, rng: random.Random) -> str:
    """Choose one alternative of every group of `template`; slots stay as they are."""
    while _GROUP.search(template):
        template = _GROUP.sub(lambda group: rng.choice(group[1].split("|")), template)
    return _SPACES.sub(" ", template).strip()


def phrase(templates: Sequence[str], rng: random.Random, **slots: object) -> str:
    """One phrasing of a question: a template chosen, expanded and filled, perhaps made polite."""
    text = expand(rng.choice(templates), rng).format(**slots)
    asks = text.split(" ", 1)[0].lower() in _QUESTION
    if asks and len(text.split()) > 2 and rng.random() < 0.12:
        text = f"{rng.choice(_ASKS)} {text}"
    if rng.random() < 0.08:
        text = f"{rng.choice(_LEADS)}{rng.choice((',', '', ''))} {text}"
    if rng.random() < 0.04:
        text = f"{text}{rng.choice((',', ''))} {rng.choice(_TAILS)}"
    return text


def typed(text: str, reply: str, rng: random.Random) -> str:
    """`text` as a hand would type it.

    Digits, and names and such that the reply repeats, keep their letters.
    """
    if rng.random() < 0.15:
        text = _abbreviate(text, rng)
    for _ in range(rng.choice((0, 0, 0, 0, 1, 1, 2))):
        text = _typo(text, reply.lower(), rng)
    text = _punctuate(text, rng)
    style = rng.random()
    if style < 0.5:
        return text.lower() if rng.random() < 0.7 else text
    if style < 0.53:
        return text.upper()
    return text[:1].upper() + text[1:]


def _abbreviate(text: str, rng: random.Random) -> str:
    long = rng.choice(list(_SHORT))
    return re.sub(rf"\b{re.escape(long)}\b", _SHORT[long], text)


def _typo(text: str, reply: str, rng: random.Random) -> str:
    words = text.split(" ")
    at = rng.randrange(len(words))
    word = words[at]
    if (
        len(word) < 4
        or not word.isalpha()
        or (word.lower() in reply and word.lower() not in LEARNED)
    ):
        return text
    i = rng.randrange(1, len(word) - 1)
    match rng.randrange(4):
        case 0:
            word = word[:i] + word[i + 1 :]
        case 1:
            word = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        case 2:
            word = word[:i] + word[i] + word[i:]
        case _:
            word = word[:i] + _NEIGHBOURS.get(word[i].lower(), word[i]) + word[i + 1 :]
    return " ".join([*words[:at], word, *words[at + 1 :]])


def _punctuate(text: str, rng: random.Random) -> str:
    if text[-1:] in "?!.=":
        return text
    first = text.split(" ", 1)[0].lower()
    question = first in (*_QUESTION, "can", "do", "does", "is", "are", "and", "could", "did")
    marks = ("", "", "?", "?", "?", "??", " ?") if question else ("", "", "", ".", "!", "...")
    return text + rng.choice(marks)


def article(noun: str) -> str:
    """The noun with its indefinite article: "a fox", "an owl"."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def listing(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]
