"""Words that fill the slots of the corpus: names, places, and things that the demo model does not know."""

# ruff: noqa: E501
from __future__ import annotations

import random


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words("""
Ana Anna Ben Carla Tom Lucy Mia Leo Max Sam Alex Maria John Mary Peter Paul Lisa Sara Sarah Emma Olivia Noah Liam
James Jack Harry George Charlie Oscar Henry William Lucas Mason Ethan Logan Daniel David Michael Robert Richard
Thomas Mark Steven Kevin Brian Eric Adam Simon Andrew Philip Martin Frank Walter Arthur Albert Alice Amy Amanda
Andrea Angela Beth Bella Bob Carol Chloe Claire Clara Diana Dora Ella Ellen Eva Eve Fiona Flora Grace Hannah Helen
Ida Ines Irene Iris Isabel Jane Jenny Jess Jessica Joan Julia Julie Karen Kate Katie Kim Laura Lena Lily Linda
Lola Louise Luna Maya Megan Molly Monica Nadia Nancy Nina Nora Paula Rachel Rita Rosa Rose Ruby Ruth Sandra Sofia
Sophie Stella Susan Tina Vera Wendy Zoe Aaron Abdul Ahmed Ali Omar Hassan Fatima Aisha Yusuf Ibrahim Layla Amir
Dmitri Ivan Olga Sergei Natasha Boris Igor Yuri Anton Marek Jan Pavel Petra Jana Eva Zuzana Katarina Milan Goran
Luka Ana Marko Nikola Wei Ming Li Chen Yuki Hiro Kenji Sakura Aiko Haruto Ren Jun Min Ji Soo Raj Priya Arjun
Anil Sunita Deepa Ravi Kiran Meera Vijay Carlos Juan Jose Luis Miguel Pedro Diego Pablo Jorge Elena Lucia Carmen
Sofia Marta Pilar Joao Tiago Rui Beatriz Giulia Marco Luca Matteo Paolo Chiara Francesca Pierre Jean Luc Marie
Camille Amelie Antoine Hans Klaus Fritz Greta Heidi Ingrid Lars Sven Astrid Freya Erik Nils Bjorn Kofi Ama Kwame
Zuri Amara Chidi Ngozi Tariq Samir Leila Yasmin Dan Joe Jim Tim Ted Ron Ray Rob Nick Mike Matt Luke Josh Jake Ian
Greg Fred Doug Dave Craig Chris Carl Brad Bill Theo Finn Felix Hugo Jonas Elias Emil Otto Ezra Levi Owen Dylan Kai
Zara Ivy Hazel Violet Daisy Pearl Willow Robin River Sky Jordan Taylor Morgan Casey Riley Quinn Avery Blake Drew
""")

CITIES = _words("""
Paris London Berlin Rome Madrid Lisbon Vienna Prague Warsaw Dublin Oslo Stockholm Helsinki Athens Cairo Lagos Nairobi
Tokyo Kyoto Seoul Beijing Delhi Mumbai Sydney Toronto Boston Chicago Dallas Denver Seattle Austin Lima Bogota
Santiago Amsterdam Brussels Zurich Geneva Milan Naples Munich Hamburg Lyon Porto Krakow Budapest Sofia Zagreb
""")

COUNTRIES = _words("""
France Germany Italy Spain Portugal Japan China India Brazil Canada Mexico Egypt Kenya Norway Sweden Poland Greece
Turkey Russia Australia Peru Chile Cuba Ireland Scotland Iceland Finland Denmark Austria Hungary Argentina England
""")

LANGUAGES = _words("""
Python Java JavaScript Rust C++ Go Ruby Swift Kotlin SQL HTML CSS PHP Perl Haskell Lisp bash TypeScript
""")

TONGUES = _words("""
French German Spanish Italian Portuguese Japanese Chinese Russian Arabic Hindi Korean Dutch Polish Latin Greek
""")

THINGS = _words("""
car train boat plane bicycle bridge house castle tower garden kitchen table chair lamp mirror window door key clock
phone radio camera guitar piano violin drum trumpet book pencil paper map coin ring crown sword shield rocket planet
star moon comet galaxy river lake island mountain volcano desert forest jungle cave beach storm cloud rainbow snowman
robot dragon wizard witch princess prince king queen knight pirate ghost giant fairy mermaid unicorn monster alien
astronaut doctor teacher farmer baker sailor painter boy girl baby grandmother hat shoe sock coat button pillow
blanket cup spoon bottle box basket balloon kite ball doll puppet teapot cake cookie pizza soup bread cheese apple
pear potato onion tree flower mushroom leaf acorn pumpkin cactus seed squirrel hedgehog beaver otter deer moose
hamster lizard crab seal walrus swan goose crow raven sparrow donkey hippo rhino llama koala sloth badger mole toad
""")

# Things that people ask about and the model knows nothing of.
TOPICS = _words("""
physics chemistry biology history geography philosophy politics economics religion football tennis basketball cricket
chess poker baseball hockey golf opera jazz rock painting sculpture cinema theatre literature poetry grammar algebra
geometry calculus statistics medicine surgery vaccines cancer diabetes insurance taxes mortgages stocks bonds
inflation bitcoin blockchain marketing fashion cooking baking gardening fishing hunting sailing skiing surfing yoga
meditation psychology sociology law crime war peace democracy revolution gravity electricity magnetism lasers atoms
electrons protons quarks relativity evolution genetics DNA cells bacteria viruses dinosaurs fossils volcanoes
earthquakes hurricanes tornadoes oceans glaciers deserts Jupiter Saturn Mars Venus Neptune Pluto satellites telescopes
Shakespeare Mozart Beethoven Einstein Newton Darwin Napoleon Caesar Cleopatra Picasso Tesla Edison Gandhi Lincoln
Kubernetes Docker Linux Windows Android Excel Photoshop Minecraft Pokemon Netflix YouTube Facebook Twitter Instagram
WhatsApp Bluetooth Wikipedia Google Amazon Microsoft Toyota Ferrari Boeing NASA Olympics Hollywood Broadway Titanic
Everest Sahara Amazon Nile photosynthesis plumbing carpentry welding diamonds petrol steel plastic glass concrete
whisky coffee tea wine beer sushi lasagna pancakes curry risotto tacos paella ramen vitamins calories sleep dreams
memory happiness friendship marriage money school university homework exams jobs salaries robots rockets trains
karate boxing ballet karaoke origami knitting magic vampires zombies aliens pyramids castles knights samurai vikings
blorf zanzibar quinoa okapi axolotl platypus narwhal lemur tapir yak ibex mongoose
React Redis PostgreSQL TensorFlow CUDA Kafka Terraform MongoDB GraphQL WebAssembly Arduino Bluetooth
""")

UNKNOWN_ANIMALS = _words("""
platypus okapi narwhal tapir lemur yak ibex mongoose squid clam lobster salmon trout tuna pigeon turkey ostrich
gorilla chimpanzee leopard cheetah jaguar lynx coyote hyena weasel ferret rat gecko iguana moth beetle fly wasp
cricket grasshopper worm jellyfish starfish dinosaur mammoth rhinoceros hippopotamus hedgehog squirrel moose
""")

PEOPLE = [
    "the president", "the king of England", "Albert Einstein", "Elon Musk", "Taylor Swift", "the mayor", "Napoleon",
    "Julius Caesar", "Barack Obama", "Marie Curie", "Leonardo da Vinci", "Steve Jobs", "Harry Potter", "Batman",
    "Sherlock Holmes", "the queen", "the pope", "Lionel Messi", "Beyonce", "Isaac Newton", "Charles Darwin",
    "Vincent van Gogh", "the prime minister", "Bill Gates", "Ada Lovelace", "Alan Turing", "Mickey Mouse",
]  # fmt: skip

VERBS = _words("""
fix build paint cook bake repair clean grow sell buy draw learn teach make wash open install design measure catch
plant drive fly ride play win explain solve invent train cut hang sew fold carve mix boil fry
""")

_ONSETS = _words("b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t tr v w y z zh")
_NUCLEI = _words("a e i o u a e i o u ai ee oo ou ia")
_CODAS = ["", "", "", "n", "r", "l", "s", "m", "x", "t", "k", "nd", "rt"]


def invented(rng: random.Random, syllables: int | None = None) -> str:
    """A word that exists nowhere, in lower case: one to three syllables."""
    count = syllables or rng.choice((1, 2, 2, 3))
    parts = (rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(count))
    return "".join(parts)


def keyboard_mash(rng: random.Random) -> str:
    """What a bored hand types: "asdf", "jkljkl", "qwe rty", "????"."""
    rows = ("asdfghjkl", "qwertyuiop", "zxcvbnm", "1234567890", "?!.", "abcdefghijklmnopqrstuvwxyz")
    row = rng.choice(rows[:2] * 3 + rows)
    if rng.random() < 0.5:
        start = rng.randrange(len(row))
        text = row[start : start + rng.randint(2, 6)]
    else:
        text = "".join(rng.choice(row) for _ in range(rng.randint(2, 10)))
    return text if rng.random() < 0.7 else text + rng.choice(("", " ")) + text


def name(rng: random.Random) -> str:
    """A given name, seldom an invented one."""
    return rng.choice(NAMES) if rng.random() < 0.8 else invented(rng, 2).capitalize()


def thing(rng: random.Random) -> str:
    """A thing a story can be about, seldom an invented one."""
    return rng.choice(THINGS) if rng.random() < 0.85 else invented(rng, 2)
