"""How people ask: the phrasings of every kind of question, in the little grammar of `phrases`. Tables only."""

# ruff: noqa: E501
# fmt: off
from __future__ import annotations

# Follow-ups that lean on what was said before.
MORE = ("[tell me|tell me a bit|say|] more", "more [please|about it|about that|details]", "go on", "continue", "[what else|anything else]", "[can you|could you] [tell me more|say more|explain more]", "and", "is that all", "[explain|describe] it more", "another fact")
WHY = ("why", "[why is|how is] [that|it|this] [useful|good|important|needed]", "what is [it|that] [good for|for|used for]", "why do [we|i|people|you] need [it|that]", "what is the point [of it|]", "why does [it|that] matter", "what are the benefits")
ANOTHER = ("[tell me|give me|] another [one|]", "another [one|]", "one more", "again", "and another [one|]", "do you [have|know] another [one|]", "[tell me|] a different one", "more", "next", "can you tell me another one", "i want another one")
AND_THIS = ("and {x}", "what about {x}", "how about {x}", "and what about {x}", "{x}")

# {t} a term
TERM_WHAT = ("what [is|are|exactly is|does] {t}", "what's {t}", "what does {t} mean", "[explain|define|describe] {t}", "tell me [about|what is|something about] {t}", "{t}", "what do you know about {t}", "do you know {t}", "what is meant by {t}", "do you know what {t} is", "explain {t} [to me|simply|in simple words]", "[have you heard of|heard of|talk about|info on|information about|the meaning of|can you explain] {t}")
TERM_HOW = ("how does {t} work", "tell me more about {t}", "how do {t} work", "explain {t} in detail", "more about {t}")
TERM_WHY = ("why [is|are] {t} [useful|good|important]", "why {t}", "what is {t} good for", "why do we need {t}", "why [use|should i use] {t}", "what is the point of {t}", "what are the benefits of {t}")
TERM_MORE = (*MORE, "how does [it|that|this] work", "[give me|] an example")
TERM_AND = ("and {t}", "what about {t}", "and what is {t}", "how about {t}")
TERM_BOTH = ("what is the difference between {a} and {b}", "{a} or {b}", "compare {a} and {b}", "{a} vs {b}", "is {a} the same as {b}", "what is {a} and what is {b}", "what are {a} and {b}", "[explain|define] {a} and {b}", "what is {a}? and {b}", "{a} and {b}")

# {s} one animal or "it", {p} many or "they", {o} either, {k} the animal's name, {g} a kind, {v} a verb
LEGS = ("how many legs [does {s} have|do {p} have|has {s}|has {s} got]", "[number of|how many] legs of {o}", "does {s} have legs")
SOUND = ("what [sound|noise] [does {s} make|do {p} make]", "what does {s} say", "what do {p} say", "how does {s} [sound|speak|talk]")
FOOD = ("what [does {s} eat|do {p} eat]", "what [food|kind of food] do {p} [like|eat]", "what [do {p}|does {s}] like to eat", "what is the food of {o}", "what do you feed {o}", "what do {p} live on")
HOME = ("where [does {s} live|do {p} live]", "where is the home of {o}", "where can i find {o}", "what is the home of {o}", "where [do {p}|does {s}] sleep")
BABY = ("what is [a baby {k}|the baby of {s}|a young {k}] called", "what do you call a [baby|young] {k}", "[name for|name of] a baby {k}", "what is the baby of {s}")
ITS_BABY = ("what is its baby called", "what do you call its baby", "what are its babies called")
KIND = ("what [kind|sort|type] of animal is {s}", "what [kind|type] of animals are {p}")
IS_KIND = ("is {s} {g}", "is {s} {g} or not")
CAN = ("can {s} {v}", "can {p} {v}", "do {p} {v}", "is {s} able to {v}", "does {s} {v}")
FACT = ("tell me [about|something about|a fact about|an interesting fact about|more about] {o}", "what do you know about {o}", "[fact|facts|a fun fact|give me a fact] about {o}", "what is {s}", "what is special about {o}", "[describe|explain] {s}", "do you know {p}", "what are {p}", "say something about {o}")
ANIMAL_LIST = ("[which|what] animals do you know", "[name|list|tell me] [some animals|a few animals|animals|three animals]", "[tell me|] about animals", "what do you know about animals", "do you know any animals", "name an animal", "let's talk about animals", "animals")

COLOUR_IS = ("what [colour|color] is {x}", "what is the [colour|color] of {x}", "which [colour|color] [is|does] {x} [have|]", "[tell me|] the [colour|color] of {x}", "what [colour|color] does {x} have")
COLOUR_RIGHT = ("is {x} {c}", "is {x} {c} or not")
RAINBOW = ("[what are|list|name|tell me|which are] the [colours|colors] of [the|a] rainbow", "[colours|colors] of the rainbow", "how many [colours|colors] does a rainbow have", "what [colour|color] is [a|the] rainbow")
COLOUR_LIST = ("[name|tell me|list|say] [some|a few|three] [colours|colors]", "[what|which] [colours|colors] do you know", "name a [colour|color]", "what are the primary [colours|colors]", "primary [colours|colors]", "what do you know about [colours|colors]", "tell me about [colours|colors]")
MIX = ("what [colour|color|] do you get [if|when] you mix {a} and {b}", "what [is|happens if i mix] {a} and {b}", "mix {a} and {b}", "{a} and {b} [make|makes|is] what", "{a} plus {b}", "what do {a} and {b} make", "what is {a} [mixed|] with {b}", "[if i mix|when i mix] {a} [and|with] {b} what do i get", "{a} + {b}", "what does {a} and {b} make")
MIX_AND = ("and {a} and {b}", "what about {a} and {b}", "{a} and {b}", "how about {a} and {b}")
MIX_FOR = ("how do [i|you] [make|get|mix] {m}", "how can i make {m}", "which colours make {m}")
OPPOSITE = ("what is the opposite of {a}", "opposite of {a}", "[tell me|say|give me] the opposite of {a}", "what is opposite to {a}", "the opposite of {a} is", "what's the contrary of {a}")
OPPOSITE_AND = ("and [of|] {a}", "what about {a}", "and the opposite of {a}", "how about {a}")

STORY_ABOUT = ("[tell me|write|write me|i want|i would like|can you tell me|give me|make up|invent|could you write|please tell me|let's hear|do you know] a [short|little|tiny|nice|funny|long|bedtime|new|good|] [story|tale] [about|with|of] {x}", "[a|] story [about|of] {x}", "a [tale|story] about {x}", "once upon a time there was {x}")
STORY = ("[tell me|write|write me|i want|i would like|can you tell me|give me|please tell me] a [short|little|tiny|nice|bedtime|good|funny|] [story|tale]", "tell a story", "story", "[can you|could you|do you] [tell|write|know] [stories|a story]", "story time", "write something", "tell me any story", "make up a story")
STORY_AGAIN = (*ANOTHER, "[tell me|] another story", "another story [please|]", "tell another story")
STORY_NEXT = ("[tell me|] another [story|one] about {x}", "[now|and|and now] [one|a story] about {x}", "and about {x}", "what about [one about|a story about] {x}")
HERO = ("who was the story about", "what was the name of the {s}", "who is the hero", "what was the {s} called", "what was its name", "who was it about")
FRIEND = ("who came by", "who helped [{n}|]", "who was the friend", "who helped the {s}")
JOKE = ("[tell me|tell us|tell|say|give me|i want|can you tell me|do you know|make|i want to hear|let me hear] [a|another|a good|a funny|some] joke", "joke", "make me laugh", "jokes", "do you know any jokes", "[tell me|say] something funny", "are you funny", "can you tell jokes", "be funny", "know any jokes")
POEM = ("[write|tell me|write me|give me|i want|make|can you write|recite|compose] a [short|nice|little|] [poem|rhyme|verse]", "poem", "can you rhyme", "do you know a poem", "[write|tell me] a [poem|rhyme] about [the moon|love|colours|winter|a cat|nature]", "write poetry")
RIDDLE = ("[tell me|ask me|give me|do you know] a riddle", "riddle", "[let's play|play] a game", "ask me a question", "riddle me", "quiz me", "can we play a game")
GIVE_UP = ("i don't know", "i give up", "what is [it|the answer|the solution]", "tell me [the answer|]", "no idea", "solution")
SAD = ("i am [sad|tired|bored|lonely|sick|unhappy|not well]", "i feel [bad|sad|lonely|tired]", "i had a bad day")
A_STORY = ("a story [please|]", "story", "yes, a story [please|]", "tell me a story")
NO_THANKS = ("no", "no thanks", "not really", "nope")
YES_A_JOKE = ("yes", "yes please", "a joke [please|]", "sure", "ok", "yeah", "joke", "a joke would help", "maybe")

# {a} and {b} numbers, {e} such as "3 + 4"; by sign: between the numbers, and in words around them
OPERATIONS = {
    "+": (("{a} + {b}", "{a}+{b}", "{a} plus {b}", "{a} and {b}"), ("add {a} and {b}", "[what is|] the sum of {a} and {b}", "[can you|please|] add {a} to {b}", "how much is {a} and {b}")),
    "-": (("{a} - {b}", "{a}-{b}", "{a} minus {b}", "{a} take away {b}"), ("subtract {b} from {a}", "take {b} away from {a}", "what is {a} less {b}")),
    "x": (("{a} x {b}", "{a}*{b}", "{a} times {b}", "{a} * {b}", "{a} multiplied by {b}"), ("multiply {a} [by|and|with] {b}", "[what is|] the product of {a} and {b}")),
}
SUM = ("what is {e}", "what's {e}", "how much is {e}", "{e}", "{e} = ?", "{e}=", "calculate {e}", "compute {e}", "[can you|please] [solve|work out|do] {e}", "{e} is", "{e} equals", "tell me {e}", "do you know what {e} is", "what does {e} make", "how many is {e}", "what do you get [for|from] {e}", "solve {e}")
SUM_AND = ("and {e}", "what about {e}", "{e}", "how about {e}", "and what is {e}", "now {e}", "what is {e}")
TOO_HARD = ("{a} / {b}", "{a} divided by {b}", "the square root of {a}", "{a} squared", "{a}/{b}", "{b} to the power of {b}", "{b}% of {a}", "{a} percent of {b}")
BIGGER = ("which is [bigger|larger|more], {a} or {b}", "what is [bigger|larger|more] {a} or {b}", "which number is [bigger|larger] {a} or {b}")
SMALLER = ("which is [smaller|less], {a} or {b}", "what is [smaller|less] {a} or {b}", "which number is [smaller|less] {a} or {b}")
EVEN = ("is {a} [even|odd|even or odd|an even number|an odd number]", "is {a} odd or even")
TWICE = ("what is twice {a}", "double {a}", "what is [two times|the double of] {a}", "twice {a}")
MATHS = ("can you [add|do math|do maths|calculate|count|do sums|do arithmetic|add numbers]", "[are you good at|do you know] [math|maths|sums|arithmetic]", "math", "maths", "arithmetic", "what math can you do", "do some math", "do a sum")

# {x} a member of a series, {k} its kind
AFTER = ("what comes after {x}", "what is after {x}", "what {k} [comes|is] after {x}", "what is the {k} after {x}", "which {k} comes after {x}", "[the|] {k} after {x}", "what comes next after {x}", "what follows {x}", "after {x} comes", "which {k} follows {x}", "what is the next {k} after {x}")
BEFORE = ("what comes before {x}", "what is before {x}", "what {k} [comes|is] before {x}", "what is the {k} before {x}", "which {k} comes before {x}", "[the|] {k} before {x}", "which {k} is before {x}")
THEN = ("and [the next|the next one|then|next|after that|what comes next]", "what comes [next|after that|then]", "and the [one|{k}] after that", "what is next", "next", "what is the next [one|{k}]", "and then", "the next [one|]", "after that")
THEN_BACK = ("and before [that|it]", "what comes before [that|it]", "and the [one|{k}] before [that|it|]", "and the previous one", "before that")
AFTER_AND = ("and after {x}", "what about {x}", "and {x}")
TOMORROW = ("[if|when|] today is {x}, what day is it tomorrow", "today is {x}, what is tomorrow", "what [day|] is tomorrow if today is {x}", "if it is {x} today, what day will it be tomorrow", "tomorrow is what day if today is {x}")
YESTERDAY = ("[if|when|] today is {x}, what day was yesterday", "today is {x}, what was yesterday", "what day was yesterday if today is {x}", "if it is {x} today, what day was it yesterday")
COUNT = ("count to {b}", "[can you|please] count to {b}", "count up to {b}", "count from {a} to {b}", "[say|write|list] the numbers from {a} to {b}")
COUNT_FROM = ("count from {a} to {b}", "[say|write|list|name] the numbers from {a} to {b}", "count {a} to {b}")
COUNT_DOWN = ("count [backwards|down|back] from {a}", "count [backwards|down] from {a} to 1", "countdown from {a}", "[can you|please] count down from {a}")
ALPHABET = ("[say|tell me|write|recite] the alphabet", "the alphabet", "what are the letters of the alphabet", "abc", "list the letters")
LIST = ("[what are|list|name|tell me|say|which are] the {t}", "{t}", "[what are|list|name|say|tell me] [all|] the {s}", "list all {s}", "do you know the {t}")
ECHO = ("repeat after me: {x}", "repeat: {x}", "say {x}", "say the word{s} {x}", "please repeat {x}", "can you say {x}", "repeat the word{s} {x}", "say after me: {x}", 'say "{x}"')
QUANTITIES = [
    ("days [are in|are there in|does it have|in|has] a week", "A week has seven days."),
    ("[days does a week|days has a week] have", "A week has seven days."),
    ("months [are in|are there in|in|has] a year", "A year has twelve months."),
    ("months does a year have", "A year has twelve months."),
    ("days [are in|are there in|in|has] a year", "A year has 365 days."),
    ("weeks [are in|are there in|in|has] a year", "A year has 52 weeks."),
    ("seasons [are there|are in a year|does a year have|are there in a year]", "A year has four seasons."),
    ("hours [are in|are there in|in|has] a day", "A day has 24 hours."),
    ("minutes [are in|are there in|in|has] an hour", "An hour has 60 minutes."),
    ("seconds [are in|are there in|in|has] a minute", "A minute has 60 seconds."),
    ("letters [are in|are there in|in|has] the alphabet", "The alphabet has 26 letters."),
    ("fingers [does a person have|do i have|are on two hands|do people have]", "A person has ten fingers."),
    ("bits [are in|are there in|in|has] a byte", "A byte has eight bits."),
    ("wheels does a [car|bus] have", "It has four wheels."),
    ("wheels does a bicycle have", "A bicycle has two wheels."),
    ("eggs [are in|in] a dozen", "A dozen is twelve."),
]

MY_NAME = ("my name is {n}", "i am {n}", "i'm {n}", "call me {n}", "[hello|hi|hey], [my name is|i am|i'm] {n}", "my name's {n}", "you can call me {n}", "please call me {n}", "the name is {n}", "this is {n}", "[hello|hi] {n} here", "people call me {n}", "im {n}", "i am called {n}", "my name is {n} and i have a question", "remember that my name is {n}", "remember my name, it is {n}", "my friends call me {n}", "{n} is my name", "[hello|hi] i am {n}, nice to meet you", "my name is {n} by the way")
MY_NAME_AND_YOURS = ("i am {n} and who are you", "my name is {n}, what is yours", "hello my name is {n}, who are you")
IT_IS = ("{n}", "{n}", "it is {n}", "my name is {n}", "i am {n}", "it's {n}")
RECALL = ("what is my name", "what's my name", "whats my name", "do you [know|remember] my name", "who am i", "can you tell me my name", "tell me my name", "say my name", "my name", "what am i called", "do you [know|remember] who i am", "what did i say my name was", "have you forgotten my name", "do you still know my name", "remember my name", "do you remember me", "and what is my name")
# what: (statements, questions, what the model says to the statement, its answer)
FACETS = {
    "colour": (("my [favourite|favorite] [colour|color] is {x}", "i like the [colour|color] {x}", "the [colour|color] i like [most|best] is {x}"), ("what is my [favourite|favorite] [colour|color]", "which [colour|color] do i like", "do you [remember|know] my [favourite|favorite] [colour|color]", "what [colour|color] do i like"), "I will remember that you like {x}.", "Your favourite colour is {x}."),
    "animal": (("my [favourite|favorite] animal is the {x}", "my [favourite|favorite] animal is a {x}"), ("what is my [favourite|favorite] animal", "which animal do i like [best|most|]", "do you [remember|know] my [favourite|favorite] animal"), "I will remember that you like the {x}.", "Your favourite animal is the {x}."),
    "city": (("i live in {x}", "i am from {x}", "i come from {x}", "my city is {x}", "my home is in {x}"), ("where do i live", "where am i from", "which city [do i live in|am i from]", "do you [remember|know] where i live", "what is my city"), "I have heard the name {x}, but I have never been there.", "You told me {x}."),
    "age": (("i am {x} years old", "my age is {x}", "i am {x}", "i'm {x} years old"), ("how old am i", "what is my age", "do you [remember|know] [how old i am|my age]"), "{x} is a good age.", "You are {x} years old."),
    "dog": (("i have a dog [called|named] {x}", "my dog is [called|named] {x}", "my dog's name is {x}", "the name of my dog is {x}"), ("what is my dog called", "what is [the name of my dog|my dog's name]", "do you [remember|know] the name of my dog", "who is my dog"), "{x} is a nice name for a dog.", "Your dog is called {x}."),
    "cat": (("i have a cat [called|named] {x}", "my cat is [called|named] {x}", "my cat's name is {x}", "the name of my cat is {x}"), ("what is my cat called", "what is [the name of my cat|my cat's name]", "do you [remember|know] the name of my cat", "who is my cat"), "{x} is a nice name for a cat.", "Your cat is called {x}."),
    "friend": (("my [friend|best friend] is [called|named] {x}", "my friend's name is {x}", "i have a friend [called|named] {x}"), ("what is my friend called", "what is [the name of my friend|my friend's name]", "who is my friend", "do you [remember|know] my friend's name"), "{x} is a nice name for a friend.", "Your friend is called {x}."),
    "likes": (("i like {x}", "i love {x}", "i really like {x}"), ("what do i like", "do you [remember|know] what i like", "what did i say i like", "what do i love"), "I will remember that you like {x}.", "You like {x}."),
}
