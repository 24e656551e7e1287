"""The topics that the demo model can talk about: each writes one or more exchanges of a chat.

A topic is a function from a `Chat` to a list of (what the user asks, what the model answers).
`TOPICS` gives each its weight; `write` strings some of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import asks, exercises, memory
from .animals import animal, animal_list
from .chat import Chat, Exchange, Topic
from .glossary import COMMANDS, TERMS, Term
from .phrases import article, listing
from .smalltalk import (
    BYE_ASKS,
    BYE_NAMED,
    BYE_REPLIES,
    GREET_ASKS,
    GREET_NAMED,
    GREET_REPLIES,
    LIMITS,
    SELF,
    TALK,
    Entry,
)
from .storytelling import tell_story
from .unknown import unknown
from .words import thing
from .world import COLOUR_OF, COLOURS, JOKES, MIXES, OPPOSITES, POEMS, RAINBOW, RIDDLES


def greet(chat: Chat) -> list[Exchange]:
    replies = GREET_NAMED if chat.name else GREET_REPLIES
    return [(chat.ask(GREET_ASKS), chat.pick(replies).format(name=chat.name))]


def bye(chat: Chat) -> list[Exchange]:
    replies = BYE_NAMED if chat.name else BYE_REPLIES
    return [(chat.ask(BYE_ASKS), chat.pick(replies).format(name=chat.name))]


def table(entries: Sequence[Entry]) -> Topic:
    """A topic that is nothing but questions and their answers."""
    weights = [entry.weight for entry in entries]

    def topic(chat: Chat) -> list[Exchange]:
        entry = chat.rng.choices(entries, weights)[0]
        return [(chat.ask(entry.asks), chat.pick(entry.replies))]

    return topic


def term(chat: Chat) -> list[Exchange]:
    """What a term means, with follow-ups: more of it, why it matters, another term."""
    entry = chat.rng.choice(TERMS[:5] if chat.chance(0.3) else TERMS)
    word = chat.pick(entry.names)
    first = chat.rng.random()
    if first < 0.13:
        return [(chat.ask(asks.TERM_WHY, t=word), entry.why)]
    if first < 0.25:
        exchanges = [(chat.ask(asks.TERM_HOW, t=word), f"{entry.what} {entry.more}")]
    else:
        exchanges = [(chat.ask(asks.TERM_WHAT, t=word), entry.what)]
        if chat.chance(0.45):
            exchanges.append((chat.ask(asks.TERM_MORE), entry.more))
    if chat.chance(0.3):
        exchanges.append((chat.ask(asks.WHY), entry.why))
    if chat.chance(0.25):
        other = _other_term(chat, entry)
        exchanges.append((chat.ask(asks.TERM_AND, t=chat.pick(other.names)), other.what))
    return exchanges


def _other_term(chat: Chat, entry: Term) -> Term:
    return chat.rng.choice([other for other in TERMS if other is not entry])


def two_terms(chat: Chat) -> list[Exchange]:
    one, two = chat.rng.sample(TERMS, 2)
    ask = chat.ask(asks.TERM_BOTH, a=chat.pick(one.names), b=chat.pick(two.names))
    return [(ask, f"{one.what} {two.what}")]


def command(chat: Chat) -> list[Exchange]:
    entry = chat.rng.choice(COMMANDS[:7] if chat.chance(0.5) else COMMANDS)
    exchanges = [(chat.ask(entry.asks), entry.reply)]
    if chat.chance(0.25):
        exchanges.append((chat.ask(asks.MORE), entry.more))
    return exchanges


def colour(chat: Chat) -> list[Exchange]:
    roll = chat.rng.random()
    if roll < 0.4:
        return _mixes(chat)
    if roll < 0.85:
        return _colour_of(chat)
    if roll < 0.92:
        return [(chat.ask(asks.RAINBOW), f"The rainbow has seven colours: {listing(RAINBOW)}.")]
    reply = f"The primary colours are red, yellow and blue. I also know {listing(COLOURS[4:8])}."
    return [(chat.ask(asks.COLOUR_LIST), reply)]


def _colour_of(chat: Chat) -> list[Exchange]:
    first, second = chat.rng.sample(list(COLOUR_OF), 2)
    if chat.chance(0.15):
        right = COLOUR_OF[first]
        guess = right if chat.chance(0.5) else chat.rng.choice(COLOURS)
        reply = f"{'Yes' if guess == right else 'No'}, {first} is {right}."
        return [(chat.ask(asks.COLOUR_RIGHT, x=first, c=guess), reply)]
    exchanges = [
        (chat.ask(asks.COLOUR_IS, x=first), f"{first.capitalize()} is {COLOUR_OF[first]}.")
    ]
    if chat.chance(0.4):
        reply = f"{second.capitalize()} is {COLOUR_OF[second]}."
        exchanges.append((chat.ask(asks.AND_THIS, x=second), reply))
    return exchanges


def _mixes(chat: Chat) -> list[Exchange]:
    if chat.chance(0.12):
        one, two, mixed = chat.rng.choice(MIXES)
        return [(chat.ask(asks.MIX_FOR, m=mixed), f"Mix {one} and {two} to make {mixed}.")]
    exchanges = []
    for one, two, mixed in chat.rng.sample(MIXES, chat.rng.choice((1, 1, 2))):
        a, b = (one, two) if chat.chance(0.5) else (two, one)
        ask = chat.ask(asks.MIX_AND if exchanges else asks.MIX, a=a, b=b)
        exchanges.append((ask, f"{a.capitalize()} and {b} make {mixed}."))
    return exchanges


def opposite(chat: Chat) -> list[Exchange]:
    exchanges: list[Exchange] = []
    for pair in chat.rng.sample(OPPOSITES, chat.rng.choice((1, 1, 2))):
        word = chat.rng.choice(pair)
        ask = chat.ask(asks.OPPOSITE_AND if exchanges else asks.OPPOSITE, a=word)
        exchanges.append((ask, f"The opposite of {word} is {_opposite_of(word)}."))
    return exchanges


def _opposite_of(word: str) -> str:
    """One answer for words that have two, so that the model is not torn."""
    pair = next(pair for pair in OPPOSITES if word in pair)
    return pair[1] if word == pair[0] else pair[0]


def fun(chat: Chat) -> list[Exchange]:
    """Jokes or poems, one after another, none of them twice."""
    kind = chat.rng.choice(("joke", "joke", "poem"))
    options, first = (JOKES, asks.JOKE) if kind == "joke" else (POEMS, asks.POEM)
    again = (*asks.ANOTHER, f"another {kind}", f"tell me another {kind}", f"one more {kind}")
    exchanges = [(chat.ask(first), chat.fresh(options))]
    while chat.chance(0.35) and len(exchanges) < 4:
        exchanges.append((chat.ask(again), chat.fresh(options)))
    return exchanges


def riddle(chat: Chat) -> list[Exchange]:
    question, answer = chat.rng.choice(RIDDLES)
    word = answer.lower()
    right = (chat.ask((word, f"is it {word}", f"{word}?")), f"Yes! {answer}.")
    given_up = (chat.ask(asks.GIVE_UP), f"{answer}!")
    wrong = (article(thing(chat.rng)), f"No, it is {word}.")
    return [(chat.ask(asks.RIDDLE), question), chat.rng.choice((right, given_up, wrong))]


def comfort(chat: Chat) -> list[Exchange]:
    """A sad user, and the joke or the story that was offered."""
    exchanges = [(chat.ask(asks.SAD), "I am sorry to hear that. Would a joke or a story help?")]
    match chat.rng.randrange(4):
        case 0:
            exchanges.append((chat.ask(asks.A_STORY), chat.story()))
        case 1:
            exchanges.append(
                (chat.ask(asks.NO_THANKS), "All right. Ask me something else if you like.")
            )
        case _:
            exchanges.append((chat.ask(asks.YES_A_JOKE), chat.fresh(JOKES)))
    return exchanges


TOPICS: list[tuple[Topic, float]] = [
    (greet, 5),
    (bye, 1),
    (table(SELF), 16),
    (table(TALK), 9),
    (table(LIMITS), 2),
    (term, 14),
    (two_terms, 1.2),
    (command, 9),
    (animal, 12),
    (animal_list, 0.8),
    (colour, 4.5),
    (opposite, 2.5),
    (tell_story, 4),
    (fun, 3),
    (riddle, 1.2),
    (comfort, 0.8),
    (exercises.arithmetic, 9),
    (exercises.sequence, 4.5),
    (exercises.tomorrow, 0.8),
    (exercises.counting, 2.5),
    (exercises.quantity, 1.5),
    (exercises.echo, 1.5),
    (memory.facet, 5),
    (memory.give_name, 5),
    (memory.recall_name, 5),
    (unknown, 20),
]


def write(chat: Chat) -> list[Exchange]:
    """A whole chat of one to about ten exchanges."""

    def maybe(topic: Callable[[Chat], list[Exchange]], probability: float) -> list[Exchange]:
        return topic(chat) if chat.chance(probability) else []

    exchanges = maybe(greet, 0.3) + maybe(memory.give_name, 0.25)
    topics, weights = zip(*TOPICS, strict=True)
    for topic in chat.rng.choices(
        topics, weights, k=chat.rng.choice((1, 1, 2, 2, 3, 3, 4, 5, 6, 8))
    ):
        exchanges += topic(chat)
    if chat.name:
        exchanges += maybe(memory.recall_name, 0.35)
    return exchanges + maybe(bye, 0.12)
