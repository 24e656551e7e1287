"""Topics with an answer to work out: small sums, what comes next, counting, saying again."""

from __future__ import annotations

from . import asks
from .chat import Chat, Exchange
from .phrases import listing
from .words import invented, thing
from .world import DAYS, LETTERS, MONTHS, NUMBER_WORDS, SEASONS

_WORD = {"+": "plus", "-": "minus", "x": "times"}
_TOO_HARD = "That is too hard for me. I can only add, subtract and multiply numbers from 0 to 9."
_MATHS = "I can add, subtract and multiply numbers from 0 to 9. Try: what is 3 + 4?"


def arithmetic(chat: Chat) -> list[Exchange]:
    roll = chat.rng.random()
    if roll < 0.1:
        return [_too_hard(chat)]
    if roll < 0.22:
        return [_about_numbers(chat)]
    exchanges = [_sum(chat, first=True)]
    while chat.chance(0.35) and len(exchanges) < 4:
        exchanges.append(_sum(chat, first=False))
    return exchanges


def _sum(chat: Chat, first: bool) -> Exchange:
    sign = chat.rng.choices(("+", "-", "x"), (6, 2, 2))[0]
    a, b = chat.rng.randrange(10), chat.rng.randrange(10)
    result = {"+": a + b, "-": a - b, "x": a * b}[sign]
    spoken = {"a": NUMBER_WORDS[a], "b": NUMBER_WORDS[b]} if chat.chance(0.2) else {"a": a, "b": b}
    between, around = asks.OPERATIONS[sign]
    if first and chat.chance(0.2):
        ask = chat.ask(around, **spoken)
    else:
        # A follow-up "and 3 and 4" would mean nothing certain, so it does without the last form.
        expression = chat.rng.choice(between if first else between[:3]).format(**spoken)
        ask = chat.ask(asks.SUM if first else asks.SUM_AND, e=expression)
    return ask, f"{a} {_WORD[sign]} {b} is {result if result >= 0 else f'minus {-result}'}."


def _too_hard(chat: Chat) -> Exchange:
    rng = chat.rng
    if chat.chance(0.3):
        expression = rng.choice(asks.TOO_HARD).format(
            a=rng.randrange(1, 100), b=rng.randrange(1, 13)
        )
    else:
        a, b = rng.randrange(10, 2000), rng.choice((rng.randrange(10), rng.randrange(10, 500)))
        sign = rng.choice(
            ("+", "-", "*", " plus ", " minus ", " times ", " x ", " + ", " * ", " - ")
        )
        expression = f"{a}{sign}{b}" if chat.chance(0.5) else f"{b}{sign}{a}"
    return chat.ask(asks.SUM, e=expression), _TOO_HARD


def _about_numbers(chat: Chat) -> Exchange:
    a, b = chat.rng.sample(range(10), 2)
    return chat.rng.choice(
        (
            (chat.ask(asks.BIGGER, a=a, b=b), f"{max(a, b)} is bigger than {min(a, b)}."),
            (chat.ask(asks.SMALLER, a=a, b=b), f"{min(a, b)} is smaller than {max(a, b)}."),
            (chat.ask(asks.EVEN, a=a), f"{a} is {'odd' if a % 2 else 'even'}."),
            (chat.ask(asks.TWICE, a=a), f"2 times {a} is {2 * a}."),
            (chat.ask(asks.MATHS), _MATHS),
        )
    )


# (kind, members, weight); the loops begin again after their end
_LOOPS = (
    ("day", DAYS, 2),
    ("month", MONTHS, 2),
    ("season", [name.capitalize() for name in SEASONS], 1),
)
_LINES = (
    ("letter", LETTERS, 1),
    ("number", [str(n) for n in range(21)], 1),
    ("number", NUMBER_WORDS, 1),
)


def sequence(chat: Chat) -> list[Exchange]:
    """What comes after or before a member of a series, one step after another."""
    series_weights = [weight for _, _, weight in _LOOPS + _LINES]
    entry = chat.rng.choices(_LOOPS + _LINES, series_weights)[0]
    kind, series, _ = entry
    # Room at the ends of a line, so that no step leaves it.
    starts = range(len(series)) if entry in _LOOPS else range(5, len(series) - 5)
    at, step = chat.rng.choice(starts), chat.rng.choice((1, 1, -1))
    ask = chat.ask(asks.AFTER if step > 0 else asks.BEFORE, x=series[at], k=kind)
    exchanges: list[Exchange] = []
    while True:
        new = (at + step) % len(series)
        relation = "after" if step > 0 else "before"
        exchanges.append((ask, f"{series[new].capitalize()} comes {relation} {series[at]}."))
        if len(exchanges) >= 5 or not chat.chance(0.55):
            return exchanges
        at = new
        if step > 0 and chat.chance(0.75):
            ask = chat.ask(asks.THEN, k=kind)
        elif chat.chance(0.6):
            ask, step = chat.ask(asks.THEN_BACK, k=kind), -1
        else:
            at, step = chat.rng.choice(starts), 1
            ask = chat.ask(asks.AFTER_AND, x=series[at])


def tomorrow(chat: Chat) -> list[Exchange]:
    at = chat.rng.randrange(7)
    if chat.chance(0.65):
        return [
            (chat.ask(asks.TOMORROW, x=DAYS[at]), f"{DAYS[(at + 1) % 7]} comes after {DAYS[at]}.")
        ]
    return [(chat.ask(asks.YESTERDAY, x=DAYS[at]), f"{DAYS[at - 1]} comes before {DAYS[at]}.")]


def counting(chat: Chat) -> list[Exchange]:
    roll = chat.rng.random()
    if roll < 0.55:
        return [_count_up(chat)]
    if roll < 0.68:
        start = chat.rng.choice((10, 10, 5, chat.rng.randrange(3, 11)))
        return [(chat.ask(asks.COUNT_DOWN, a=start), _numbers(range(start, 0, -1)))]
    if roll < 0.75:
        return [(chat.ask(asks.ALPHABET), f"{', '.join(LETTERS)}.")]
    if roll < 0.8:
        far = chat.rng.choice((30, 50, 100, 1000, 1_000_000, chat.rng.randrange(21, 999)))
        return [(chat.ask(asks.COUNT, a=1, b=far), "I can count only to 20.")]
    title, items, short = chat.rng.choice(
        (
            ("days of the week", DAYS, "days"),
            ("months of the year", MONTHS, "months"),
            ("four seasons", SEASONS, "seasons"),
        )
    )
    return [(chat.ask(asks.LIST, t=title, s=short), f"The {title} are {listing(items)}.")]


def _count_up(chat: Chat) -> Exchange:
    start = 1 if chat.chance(0.8) else chat.rng.randrange(2, 10)
    end = (
        chat.rng.randrange(start + 2, 21) if chat.chance(0.6) else chat.rng.choice((10, 10, 5, 20))
    )
    end = max(end, start + 2)
    words = chat.chance(0.25)
    spoken = {"a": NUMBER_WORDS[start], "b": NUMBER_WORDS[end]} if words else {"a": start, "b": end}
    return chat.ask(asks.COUNT if start == 1 else asks.COUNT_FROM, **spoken), _numbers(
        range(start, end + 1)
    )


def _numbers(numbers: range) -> str:
    return f"{', '.join(map(str, numbers))}."


def quantity(chat: Chat) -> list[Exchange]:
    what, reply = chat.rng.choice(asks.QUANTITIES)
    return [(chat.ask((f"how many {what}", f"how many {what}", f"tell me how many {what}")), reply)]


def echo(chat: Chat) -> list[Exchange]:
    """Say the user's words again."""
    count = chat.rng.choice((1, 1, 2, 3))
    words = [thing(chat.rng) if chat.chance(0.6) else invented(chat.rng) for _ in range(count)]
    text = " ".join(words)
    ask = chat.ask(asks.ECHO, x=text, s="s" if count > 1 else "")
    return [(ask, f"{text[:1].upper()}{text[1:]}.")]
