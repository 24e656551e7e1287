"""What the demo model knows of the world: animals, colours, opposites, sequences, jokes. Tables only.

Everything here was written for this project. Keep sentences short and words simple: four million
parameters have to hold all of it.
"""

# ruff: noqa: E501
from __future__ import annotations

from typing import NamedTuple


class Animal(NamedTuple):
    plural: str
    kind: str
    legs: int
    sound: str  # "" where it makes no sound worth naming
    food: str
    home: str
    baby: str
    flies: bool
    swims: bool
    facts: tuple[str, str]


def _animal(plural: str, kind: str, legs: int, moves: str, *rest: str) -> Animal:
    sound, food, home, baby, first, second = rest
    flies, swims = "f" in moves, "s" in moves
    return Animal(plural, kind, legs, sound, food, home, baby, flies, swims, (first, second))


# fmt: off
ANIMALS: dict[str, Animal] = {
    "cat": _animal("cats", "mammal", 4, "s", "meow", "meat and fish", "houses", "kitten", "Cats sleep for more than half of the day.", "Cats can see well in the dark."),
    "dog": _animal("dogs", "mammal", 4, "s", "woof", "meat and bones", "houses", "puppy", "Dogs can smell far better than people.", "Dogs wag their tails when they are happy."),
    "cow": _animal("cows", "mammal", 4, "s", "moo", "grass", "farms", "calf", "Cows give milk.", "Cows have best friends."),
    "horse": _animal("horses", "mammal", 4, "s", "neigh", "grass and hay", "stables", "foal", "Horses can sleep standing up.", "Horses can run soon after they are born."),
    "pig": _animal("pigs", "mammal", 4, "s", "oink", "corn and roots", "farms", "piglet", "Pigs are very clever animals.", "Pigs roll in mud to stay cool."),
    "sheep": _animal("sheep", "mammal", 4, "s", "baa", "grass", "farms", "lamb", "Sheep give wool.", "Sheep can remember many faces."),
    "goat": _animal("goats", "mammal", 4, "s", "baa", "leaves and grass", "farms and mountains", "kid", "Goats are very good at climbing.", "Goats have square pupils in their eyes."),
    "chicken": _animal("chickens", "bird", 2, "", "cluck", "seeds and worms", "farms", "chick", "Chickens lay eggs.", "Chickens take baths in dust."),
    "duck": _animal("ducks", "bird", 2, "fs", "quack", "seeds and water plants", "ponds", "duckling", "The feathers of a duck keep water out.", "Ducks can sleep with one eye open."),
    "frog": _animal("frogs", "amphibian", 4, "s", "ribbit", "insects", "ponds", "tadpole", "Frogs can jump many times their own length.", "Frogs drink water through their skin."),
    "lion": _animal("lions", "mammal", 4, "s", "roar", "meat", "grasslands", "cub", "Lions live in groups called prides.", "The roar of a lion can be heard from far away."),
    "tiger": _animal("tigers", "mammal", 4, "s", "roar", "meat", "forests", "cub", "No two tigers have the same stripes.", "Tigers are the biggest of all cats."),
    "bear": _animal("bears", "mammal", 4, "s", "growl", "berries, fish and honey", "forests", "cub", "Many bears sleep through the winter.", "Bears can smell food from very far away."),
    "wolf": _animal("wolves", "mammal", 4, "s", "howl", "meat", "forests", "pup", "Wolves live in groups called packs.", "Wolves howl to talk to each other."),
    "fox": _animal("foxes", "mammal", 4, "s", "yip", "mice, berries and insects", "dens", "kit", "Foxes have thick tails that keep them warm.", "Foxes can hear a mouse under the snow."),
    "elephant": _animal("elephants", "mammal", 4, "s", "trumpet", "grass, leaves and fruit", "grasslands", "calf", "Elephants are the biggest animals on land.", "Elephants use their trunks like a hand."),
    "giraffe": _animal("giraffes", "mammal", 4, "", "", "leaves", "grasslands", "calf", "Giraffes are the tallest animals on land.", "The tongue of a giraffe is dark blue."),
    "monkey": _animal("monkeys", "mammal", 2, "", "ooh ooh", "fruit and leaves", "forests", "infant", "Many monkeys can hold things with their tails.", "Monkeys clean each other to make friends."),
    "rabbit": _animal("rabbits", "mammal", 4, "s", "", "grass and carrots", "burrows", "kit", "Rabbits can see behind themselves without turning.", "The teeth of a rabbit never stop growing."),
    "mouse": _animal("mice", "mammal", 4, "s", "squeak", "seeds and grain", "small holes", "pup", "Mice can squeeze through very small holes.", "Mice are awake mostly at night."),
    "owl": _animal("owls", "bird", 2, "f", "hoot", "mice", "trees", "owlet", "Owls hunt at night.", "Owls can turn their heads almost all the way round."),
    "eagle": _animal("eagles", "bird", 2, "f", "screech", "fish and small animals", "mountains", "eaglet", "Eagles can see very far.", "Eagles build very big nests."),
    "parrot": _animal("parrots", "bird", 2, "f", "squawk", "seeds and fruit", "warm forests", "chick", "Parrots can learn to say words.", "Parrots hold food with their feet."),
    "penguin": _animal("penguins", "bird", 2, "s", "honk", "fish", "cold places by the sea", "chick", "Penguins cannot fly, but they swim very well.", "Penguins keep their eggs warm on their feet."),
    "snake": _animal("snakes", "reptile", 0, "s", "hiss", "mice and eggs", "forests and deserts", "snakelet", "Snakes smell with their tongues.", "Snakes have no eyelids."),
    "turtle": _animal("turtles", "reptile", 4, "s", "", "plants and small fish", "the sea and ponds", "hatchling", "Turtles carry their shell all their life.", "Some turtles live for more than a hundred years."),
    "crocodile": _animal("crocodiles", "reptile", 4, "s", "growl", "fish and meat", "rivers", "hatchling", "Crocodiles lived at the time of the dinosaurs.", "Crocodiles carry their babies in their mouths."),
    "spider": _animal("spiders", "arachnid", 8, "", "", "insects", "webs", "spiderling", "Spiders make silk for their webs.", "A spider is not an insect."),
    "ant": _animal("ants", "insect", 6, "", "", "seeds and sweet things", "nests", "larva", "Ants can carry many times their own weight.", "Ants find their way by smell."),
    "bee": _animal("bees", "insect", 6, "f", "buzz", "nectar", "hives", "larva", "Bees make honey.", "Bees dance to show where flowers are."),
    "butterfly": _animal("butterflies", "insect", 6, "f", "", "nectar", "meadows", "caterpillar", "Butterflies taste with their feet.", "A butterfly begins its life as a caterpillar."),
    "shark": _animal("sharks", "fish", 0, "s", "", "fish", "the sea", "pup", "Sharks have no bones.", "Sharks are older than trees."),
    "whale": _animal("whales", "mammal", 0, "s", "", "krill and fish", "the sea", "calf", "The blue whale is the biggest animal of all.", "Whales sing under water."),
    "dolphin": _animal("dolphins", "mammal", 0, "s", "click", "fish", "the sea", "calf", "Dolphins call each other by name.", "Dolphins sleep with half of their brain awake."),
    "octopus": _animal("octopuses", "mollusc", 0, "s", "", "crabs and fish", "the sea", "larva", "An octopus has three hearts and eight arms.", "An octopus can change its colour."),
    "snail": _animal("snails", "mollusc", 0, "", "", "leaves", "gardens", "hatchling", "Snails carry their house on their back.", "Snails move on a single foot."),
    "bat": _animal("bats", "mammal", 2, "f", "squeak", "insects and fruit", "caves", "pup", "Bats find their way with sound.", "Bats are the only mammals that can fly."),
    "panda": _animal("pandas", "mammal", 4, "s", "", "bamboo", "mountain forests", "cub", "Pandas eat bamboo for most of the day.", "A panda is very tiny when it is born."),
    "kangaroo": _animal("kangaroos", "mammal", 2, "s", "", "grass", "Australia", "joey", "Kangaroos carry their babies in a pouch.", "Kangaroos cannot walk backwards well."),
    "camel": _animal("camels", "mammal", 4, "", "grunt", "grass and dry plants", "deserts", "calf", "Camels can go for days without water.", "The hump of a camel is full of fat."),
    "zebra": _animal("zebras", "mammal", 4, "", "", "grass", "grasslands", "foal", "No two zebras have the same stripes.", "Zebras live in herds."),
}

NUMBER_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]

# (one, other, mixed)
MIXES = [
    ("red", "blue", "purple"), ("red", "yellow", "orange"), ("blue", "yellow", "green"),
    ("red", "white", "pink"), ("black", "white", "grey"), ("red", "green", "brown"),
    ("blue", "white", "light blue"),
]

COLOUR_OF: dict[str, str] = {
    "the sky": "blue", "the sea": "blue", "the ocean": "blue", "grass": "green", "a leaf": "green",
    "the sun": "yellow", "a banana": "yellow", "a lemon": "yellow", "snow": "white", "milk": "white",
    "a cloud": "white", "a tomato": "red", "a strawberry": "red", "blood": "red", "a rose": "red",
    "a fire truck": "red", "coal": "black", "the night": "black", "a raven": "black",
    "a carrot": "orange", "a pumpkin": "orange", "an orange": "orange", "chocolate": "brown",
    "a bear": "brown", "wood": "brown", "a flamingo": "pink", "a pig": "pink", "an elephant": "grey",
    "a mouse": "grey", "a frog": "green", "a plum": "purple", "a cucumber": "green", "a fox": "red",
    "an apple": "red or green", "a zebra": "black and white", "a panda": "black and white",
    "a penguin": "black and white", "a swan": "white", "gold": "yellow", "a lobster": "red",
    "a tiger": "orange with black stripes", "a bee": "yellow and black",
}

COLOURS = ["red", "blue", "green", "yellow", "orange", "purple", "pink", "black", "white", "brown", "grey"]

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("day", "night"),
    ("black", "white"), ("old", "new"), ("young", "old"), ("fast", "slow"), ("happy", "sad"),
    ("open", "closed"), ("light", "dark"), ("heavy", "light"), ("high", "low"), ("in", "out"),
    ("wet", "dry"), ("full", "empty"), ("hard", "soft"), ("long", "short"), ("tall", "short"),
    ("good", "bad"), ("early", "late"), ("loud", "quiet"), ("near", "far"), ("rich", "poor"),
    ("strong", "weak"), ("yes", "no"), ("true", "false"), ("begin", "end"), ("win", "lose"),
    ("love", "hate"), ("front", "back"), ("clean", "dirty"), ("easy", "difficult"), ("thick", "thin"),
]

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]
SEASONS = ["spring", "summer", "autumn", "winter"]
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
RAINBOW = ["red", "orange", "yellow", "green", "blue", "indigo", "violet"]
# fmt: on

JOKES = [
    "Why did the chicken cross the road? To get to the other side!",
    "What do you call a sleeping bull? A bulldozer!",
    "Why was the computer cold? It left its windows open!",
    "What do you call a fish with no eyes? A fsh!",
    "Why did the tiny model cross the road? It only had four million reasons!",
    "What is brown and sticky? A stick!",
    "Why do bees hum? They forgot the words!",
    "Why was six afraid of seven? Because seven eight nine!",
    "What do you call a bear with no teeth? A gummy bear!",
    "Why did the token feel lonely? It was out of context!",
    "What did the cat say to the mouse on the desk? Nothing, it just clicked!",
    "Why did the weight go to the gym? It was tired of being four bits!",
]

POEMS = [
    "The moon is up, the day is done,\nthe stars come out now one by one.\nThe owl awakes, the fox runs by,\nand all is quiet in the sky.",
    "A little model, small and light,\nit runs all day, it runs all night.\nIt does not know so many things,\nbut oh, how happily it sings.",
    "The rain falls down on leaf and stone,\nthe cat sits by the fire alone.\nIt hears the wind, it sees the rain,\nand falls asleep at home again.",
    "Red and yellow, green and blue,\nhere is a tiny poem for you.\nPurple, orange, pink and grey,\nhave a very lovely day.",
]

RIDDLES = [
    ("What has hands but cannot clap?", "A clock"),
    ("What gets wetter the more it dries?", "A towel"),
    ("What has a neck but no head?", "A bottle"),
    ("What has teeth but cannot bite?", "A comb"),
    ("What goes up but never comes down?", "Your age"),
    ("What has one eye but cannot see?", "A needle"),
    ("What has keys but opens no door?", "A piano"),
]
