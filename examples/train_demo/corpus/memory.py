"""What the user tells of themselves, and what the model recalls of it later in the chat."""

from __future__ import annotations

from . import asks
from .chat import Chat, Exchange
from .smalltalk import SELF
from .words import CITIES, invented, thing
from .words import name as any_name
from .world import ANIMALS, COLOURS


def give_name(chat: Chat) -> list[Exchange]:
    """The user says who they are, sometimes with something more in the same breath."""
    chat.name = any_name(chat.rng)
    hello = f"Nice to meet you, {chat.name}!"
    if chat.chance(0.12):
        ask = chat.ask(asks.MY_NAME_AND_YOURS, n=chat.name)
        return [(ask, f"{hello} I am the mlxrun demo model, a tiny language model.")]
    ask = chat.ask(asks.MY_NAME, n=chat.name)
    if chat.chance(0.1):
        [(told, heard)] = _tell(chat, chat.rng.choice(("likes", "city", "age")))
        return [(f"{ask} and {told}", f"{hello} {heard}")]
    if chat.chance(0.1):
        entry = chat.rng.choice(SELF[:3])
        joint = chat.rng.choice((",", ".", "!", " and"))
        return [(f"{ask}{joint} {chat.ask(entry.asks)}", f"{hello} {entry.replies[0]}")]
    return [(ask, f"{hello} How can I help you?" if chat.chance(0.4) else hello)]


def recall_name(chat: Chat) -> list[Exchange]:
    """The user asks for their name; where they have not told it, the model asks for it."""
    if chat.name:
        return [(chat.ask(asks.RECALL), f"Your name is {chat.name}.")]
    exchanges = [(chat.ask(asks.RECALL), "You have not told me your name yet. What is your name?")]
    if chat.chance(0.6):
        chat.name = any_name(chat.rng)
        exchanges.append((chat.ask(asks.IT_IS, n=chat.name), f"Nice to meet you, {chat.name}!"))
        if chat.chance(0.5):
            exchanges.append((chat.ask(asks.RECALL), f"Your name is {chat.name}."))
    return exchanges


def facet(chat: Chat) -> list[Exchange]:
    """The user tells something else, or asks for it; an untold thing gets a plain answer."""
    if chat.known and chat.chance(0.5):
        return [_recall(chat, chat.rng.choice(list(chat.known)))]
    what = chat.rng.choice(list(asks.FACETS))
    if what in chat.known or chat.chance(0.2):
        return [_recall(chat, what)]
    exchanges = _tell(chat, what)
    return [*exchanges, _recall(chat, what)] if chat.chance(0.3) else exchanges


def _tell(chat: Chat, what: str) -> list[Exchange]:
    statements, _, heard, _ = asks.FACETS[what]
    chat.known[what] = value = _value(chat, what)
    return [(chat.ask(statements, x=value), heard.format(x=value))]


def _recall(chat: Chat, what: str) -> Exchange:
    _, questions, _, answer = asks.FACETS[what]
    known = chat.known.get(what)
    return chat.ask(questions), answer.format(
        x=known
    ) if known else "You have not told me that yet."


def _value(chat: Chat, what: str) -> str:
    match what:
        case "colour":
            return chat.rng.choice(COLOURS)
        case "animal":
            return chat.rng.choice(list(ANIMALS)) if chat.chance(0.7) else thing(chat.rng)
        case "city":
            return (
                chat.rng.choice(CITIES) if chat.chance(0.8) else invented(chat.rng, 2).capitalize()
            )
        case "age":
            return str(chat.rng.randrange(5, 100))
        case "likes":
            return chat.rng.choice(
                (thing(chat.rng), chat.rng.choice([a.plural for a in ANIMALS.values()]))
            )
        case _:
            return any_name(chat.rng) if chat.chance(0.6) else invented(chat.rng, 2).capitalize()
