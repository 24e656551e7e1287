"""Tiny stories on any subject: plots with slots, so that a story stays coherent from end to end."""

# ruff: noqa: E501
from __future__ import annotations

import random
from collections.abc import Collection
from typing import NamedTuple

from .phrases import article

HEROES = [
    "Milo",
    "Pip",
    "Luna",
    "Toby",
    "Nilo",
    "Bella",
    "Rufus",
    "Tilda",
    "Momo",
    "Kiki",
    "Otto",
    "Fern",
]
FRIENDS = ["owl", "mouse", "turtle", "rabbit", "bee", "frog", "cat", "bear"]
MOODS = ["little", "brave", "curious", "happy", "lonely", "clever", "sleepy", "shy"]
PLACES = [
    "by a quiet river",
    "at the edge of a forest",
    "on a green hill",
    "near the sea",
    "in a small village",
    "in an old garden",
]
ENDINGS = [
    "And they were friends from that day on.",
    "That night {n} slept very well.",
    "And {n} was happy.",
    "From then on, nobody was lonely any more.",
]
# {n} the hero's name, {f} the friend
PLOTS = {
    "ball": "One day {n} found a red ball in the grass. {n} wanted to play, but there was nobody to play with. "
    'Then {f} came by and said, "May I play too?" They played until the sun went down.',
    "lost": "One day {n} went for a long walk and got lost. It was getting dark, and {n} was afraid. "
    'Then {f} came by and said, "I know the way." Together they walked home under the stars.',
    "storm": "One day a big storm came, and the wind took the roof away. {n} was cold and wet. "
    'Then {f} came by and said, "Stay with me." In the morning they built a new roof together.',
    "star": "One night {n} saw a star fall from the sky. {n} looked for it everywhere. "
    'Then {f} came by and said, "Look into the water." There was the star, shining in the pond.',
    "song": "One day {n} heard a song from far away. {n} followed it over the hills. "
    "At the end of the path sat {f} who sang all alone. So {n} sang along, and it sounded twice as good.",
    "seed": "One day {n} found a tiny seed. {n} put it into the ground and gave it water every day. "
    'Then {f} came by and asked, "What are you waiting for?" The next morning a yellow flower stood there.',
    "cake": "One day {n} wanted to bake a cake, but there was no honey left. {n} was sad. "
    'Then {f} came by and said, "I have some honey." They baked the cake and ate it together.',
    "treasure": "One day {n} found an old map. {n} followed it and dug a deep hole. "
    "There was a box, and it was empty. "
    "Then {f} came by and laughed. They filled the box with all that they liked best.",
    "snow": "One morning all the world was white with snow. {n} had never seen snow before. "
    'Then {f} came by and said, "Let us build a snowman." They gave it a hat and a big smile.',
    "boat": "One day {n} built a small boat. It was finished, but {n} did not dare to sail alone. "
    'Then {f} came by and said, "I will come with you." They sailed to an island and back.',
}


class Story(NamedTuple):
    text: str
    plot: str
    hero: str
    friend: str


def story(subject: str, rng: random.Random, told: Collection[str] = (), hero: str = "") -> Story:
    """A story about `subject`.

    Plots and hero names in `told` are not used again, as long as there are others; `hero` names
    the hero where the subject is a person.
    """
    plot = rng.choice([plot for plot in PLOTS if plot not in told] or list(PLOTS))
    hero = hero or rng.choice([name for name in HEROES if name not in told] or HEROES)
    friend = rng.choice([friend for friend in FRIENDS if friend != subject])
    who = article(f"{rng.choice(MOODS)} {subject}")
    opening = f"Once upon a time there was {who} named {hero}. {hero} lived {rng.choice(PLACES)}."
    middle = PLOTS[plot].format(n=hero, f=article(friend))
    return Story(f"{opening} {middle} {rng.choice(ENDINGS).format(n=hero)}", plot, hero, friend)
