"""Chats about stories: one on request, another one, and what was in it."""

from __future__ import annotations

from . import asks
from .chat import Chat, Exchange
from .phrases import article
from .words import name as any_name
from .words import thing
from .world import ANIMALS


def tell_story(chat: Chat) -> list[Exchange]:
    if chat.chance(0.25):
        who, hero = chat.rng.choice(list(ANIMALS)), ""
        ask = chat.ask(asks.STORY)
    else:
        who, spoken, hero = _subject(chat)
        ask = chat.ask(asks.STORY_ABOUT, x=spoken)
    exchanges = []
    for _ in range(chat.rng.choice((1, 1, 2))):
        exchanges.append((ask, chat.story(who, hero)))
        exchanges += _about_it(chat, who)
        if chat.chance(0.5):
            ask = chat.ask(asks.STORY_AGAIN)
        else:
            who, spoken, hero = _subject(chat)
            ask = chat.ask(asks.STORY_NEXT, x=spoken)
    return exchanges


def _about_it(chat: Chat, who: str) -> list[Exchange]:
    """Perhaps a question about the story just told."""
    name, friend = chat.last_story
    if chat.chance(0.15):
        return [(chat.ask(asks.HERO, s=who), f"The {who} in the story was called {name}.")]
    if chat.chance(0.08):
        return [(chat.ask(asks.FRIEND, n=name, s=who), f"It was {article(friend)}.")]
    return []


def _subject(chat: Chat) -> tuple[str, str, str]:
    """(kind, how the user names it, the hero's name where it is a person)."""
    if chat.chance(0.08):
        if chat.name and chat.chance(0.7):
            return "child", "me", chat.name
        hero = any_name(chat.rng)
        return "child", hero, hero
    if chat.chance(0.45):
        who = chat.rng.choice(list(ANIMALS))
        return (
            who,
            chat.rng.choice((article(who), article(who), ANIMALS[who].plural, f"the {who}", who)),
            "",
        )
    who = thing(chat.rng)
    mood = chat.rng.choice(("", "", "", "", "small ", "young ", "red ", "magic "))
    return (
        who,
        chat.rng.choice((article(mood + who), article(mood + who), f"the {who}", f"my {who}", who)),
        "",
    )
