"""The state of one conversation while it is being written."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .phrases import expand, phrase
from .stories import story
from .world import ANIMALS

Exchange = tuple[str, str]  # what the user asks, what the model answers


@dataclass
class Chat:
    """What the user has told and what the model has told, so that later turns can refer to it."""

    rng: random.Random
    name: str = ""
    known: dict[str, str] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    last_story: tuple[str, str] = ("", "")  # the hero's name, the friend

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def ask(self, templates: Sequence[str], **slots: object) -> str:
        """One phrasing of a question, its slots filled."""
        return phrase(templates, self.rng, **slots)

    def pick(self, options: Sequence[str]) -> str:
        """One of the options, with its groups expanded and its slots left alone."""
        return expand(self.rng.choice(options), self.rng)

    def fresh(self, options: Sequence[str]) -> str:
        """An option that this chat has not told yet, or any if all are; it counts as told."""
        new = [option for option in options if option not in self.told] or list(options)
        choice = self.rng.choice(new)
        self.told.append(choice)
        return choice

    def story(self, who: str = "", hero: str = "") -> str:
        """A story that is new in this chat, about an animal unless `who` says otherwise."""
        who = who or self.rng.choice(list(ANIMALS))
        told = story(who, self.rng, self.told, hero)
        self.told += [told.plot] if hero else [told.plot, told.hero]
        self.last_story = (told.hero, told.friend)
        return told.text


Topic = Callable[[Chat], list[Exchange]]
