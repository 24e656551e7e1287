"""Questions about animals: one, then perhaps the same about another, or another about the same."""

from __future__ import annotations

from collections.abc import Callable

from . import asks
from .chat import Chat, Exchange
from .phrases import article, listing
from .world import ANIMALS, NUMBER_WORDS

# (chat, the animal, whether the question must name it: later ones say "it")
Question = Callable[[Chat, str, bool], Exchange]


def animal(chat: Chat) -> list[Exchange]:
    known = chat.rng.choice(list(ANIMALS))
    question = chat.rng.choice(_QUESTIONS)
    exchanges = [question(chat, known, True)]
    if chat.chance(0.4):  # "and a cat?"
        known = chat.rng.choice([other for other in ANIMALS if other != known])
        forms = (article(known), ANIMALS[known].plural, f"the {known}", known)
        _, reply = question(chat, known, True)
        exchanges.append((chat.ask(asks.AND_THIS, x=chat.rng.choice(forms)), reply))
    if chat.chance(0.4):  # "what does it eat?"
        exchanges.append(chat.rng.choice(_QUESTIONS)(chat, known, False))
    return exchanges


def animal_list(chat: Chat) -> list[Exchange]:
    some = listing(chat.rng.sample([entry.plural for entry in ANIMALS.values()], 3))
    reply = f"I know cats, dogs, foxes and owls, and many more, such as {some}."
    return [(chat.ask(asks.ANIMAL_LIST), f"{reply} Ask me about one of them.")]


def _slots(chat: Chat, known: str, named: bool) -> dict[str, str]:
    if not named:
        return {"s": "it", "p": "they", "o": "it", "k": known}
    one = chat.rng.choice((article(known), article(known), f"the {known}"))
    many = ANIMALS[known].plural
    return {"s": one, "p": many, "o": chat.rng.choice((one, many)), "k": known}


def _one(known: str) -> str:
    return article(known).capitalize()


def _many(known: str) -> str:
    return ANIMALS[known].plural.capitalize()


def _legs(chat: Chat, known: str, named: bool) -> Exchange:
    legs = ANIMALS[known].legs
    count = NUMBER_WORDS[legs] if legs else "no"
    return chat.ask(asks.LEGS, **_slots(chat, known, named)), f"{_one(known)} has {count} legs."


def _sound(chat: Chat, known: str, named: bool) -> Exchange:
    sound = ANIMALS[known].sound
    reply = f"{_one(known)} says {sound}." if sound else f"{_one(known)} is very quiet."
    return chat.ask(asks.SOUND, **_slots(chat, known, named)), reply


def _food(chat: Chat, known: str, named: bool) -> Exchange:
    return chat.ask(
        asks.FOOD, **_slots(chat, known, named)
    ), f"{_many(known)} eat {ANIMALS[known].food}."


def _home(chat: Chat, known: str, named: bool) -> Exchange:
    home = ANIMALS[known].home
    preposition = "on" if home.startswith(("farms", "grasslands")) else "in"
    return chat.ask(
        asks.HOME, **_slots(chat, known, named)
    ), f"{_many(known)} live {preposition} {home}."


def _baby(chat: Chat, known: str, named: bool) -> Exchange:
    ask = chat.ask(asks.BABY if named else asks.ITS_BABY, **_slots(chat, known, named))
    return ask, f"A baby {known} is called {article(ANIMALS[known].baby)}."


def _kind(chat: Chat, known: str, named: bool) -> Exchange:
    kind = ANIMALS[known].kind
    slots = _slots(chat, known, named)
    if chat.chance(0.5):
        return chat.ask(asks.KIND, **slots), f"{_one(known)} is {article(kind)}."
    guess = chat.rng.choice((kind, "bird", "fish", "mammal", "insect", "reptile"))
    answer = "Yes" if guess == kind else "No"
    return chat.ask(
        asks.IS_KIND, g=article(guess), **slots
    ), f"{answer}, {article(known)} is {article(kind)}."


def _can(chat: Chat, known: str, named: bool) -> Exchange:
    entry = ANIMALS[known]
    verb, able = chat.rng.choice((("fly", entry.flies), ("swim", entry.swims)))
    reply = f"Yes, {entry.plural} can {verb}." if able else f"No, {entry.plural} cannot {verb}."
    return chat.ask(asks.CAN, v=verb, **_slots(chat, known, named)), reply


def _fact(chat: Chat, known: str, named: bool) -> Exchange:
    first, second = ANIMALS[known].facts
    return chat.ask(
        asks.FACT if named else asks.MORE, **_slots(chat, known, named)
    ), first if named else second


_QUESTIONS: list[Question] = [
    _legs,
    _sound,
    _sound,
    _food,
    _food,
    _home,
    _baby,
    _kind,
    _can,
    _fact,
    _fact,
]
