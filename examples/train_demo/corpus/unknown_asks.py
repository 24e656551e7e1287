"""What people ask that the demo model cannot answer, in as many shapes as possible. Tables only."""

# ruff: noqa: E501
# fmt: off
from __future__ import annotations

# {t} a topic or an invented word, {p} a person, {c} a country, {y} a city, {v} a verb, {o} a thing, {u} a thing or an
# unknown animal, {l} a programming language, {g} a tongue, {n} and {i} invented, {m} keys hit at random, {q} a question
QUESTIONS = (
    "what is {t}", "what is a {t}", "what are {t}", "who [is|was] {p}", "explain {t} [to me|]", "tell me about {t}", "how does {t} work", "define {t}", "what does {t} mean",
    "what is the capital of {c}", "capital of {c}", "what is the [population|flag|language|currency|history] of {c}", "where is {y}", "where is {c}", "how [far|big|old] is {y}", "tell me about {y}", "tell me about {c}",
    "how do [i|you] {v} a {o}", "how to {v} a {o}", "how to {v} {t}", "can you {v} [a|my] {o}", "how much does a {o} cost", "where can i buy a {o}", "how many {t} are there", "who invented [the {o}|{t}]", "when was {t} [invented|born|discovered|built]",
    "what is the [best|biggest|smallest|tallest|fastest|oldest] {o} [in the world|]", "what do you think about {t}", "do you know {t}", "do you know {p}", "why is {t} so [popular|hard|big|good]", "is {t} [good|bad|dangerous|real|expensive]", "why is the sky blue", "why do people like {t}",
    "when did {p} [die|live]", "where was {p} born", "how old is {p}", "what did {p} do", "what happened in 1{a}{b}{b}", "what happened in 20{a}{b}", "who won the [world cup|war|game|election] in 20{a}{b}",
    "how do i [lose weight|get rich|learn {t}|cook {t}|make {t}|get to {y}|become a {o}|find a job]", "recipe for {t}", "give me a recipe for {t}", "what is [a good|the best] [book|film|movie|song|restaurant|hotel] [about|in] {y}", "recommend a [book|film|movie|song|restaurant]",
    "what is the difference between {t} and {t2}", "{t}", "{t} and {t2}", "{t} or {t2}", "{p}", "who is {n}", "what is {n}", "tell me about {p}", "what is the [price|weight|size|length|height|speed] of [a {o}|{t}]", "how [tall|long|heavy|deep|fast] is [a {o}|{t}|{p}]",
    "what should i [eat|wear|buy|read|watch|cook|say] [today|tonight|tomorrow|]", "i need [help|advice] with {t}", "help me with {t}", "help me with my [homework|essay|job|{t}]", "is it true that {t} is {t2}", "i want to learn {t}", "teach me {t}", "i think {t} is [great|bad]", "have you [seen|read|heard of|been to] {t}", "play some {t}", "let's talk about {t}",
    "can you [book a flight|order {t}|play {t}|buy me a {o}|call {p}|help me with {t}|explain {t}]", "what is the [chemical|latin|scientific] [name|symbol] [of|for] {t}", "which {o} is the best", "what {o} should i buy", "how are {o}s made", "what is a {o} made of", "what is inside a {o}", "what is a {o}", "what does a {o} do",
    "how many legs does a {u} have", "what [sound|noise] does a {u} make", "what does a {u} eat", "what do {u}s eat", "where do {u}s live", "what is a baby {u} called", "can {u}s [fly|swim]", "what [colour|color] is a {u}", "what [colour|color] is {t}", "what is the opposite of {u}", "opposite of {t}", "what comes after {u}", "what do you get if you mix {u} and {o}", "is a {u} a [bird|mammal|fish]", "what does a {u} say", "tell me about {u}s", "a fact about {u}s",
    "{q} {q2}", "{q}. {q2}", "i read about {t} in {y} and i was told that {p} likes {t2}, is that right", "my friend says that {t} is better than {t2} because the {o} is a {o2}, what do you think", "please help me to {v} the {o} in my {o2} before {p} comes",
    "tell me everything about {t}", "what are the rules of {t}", "what is the meaning of {t}", "what is the history of {t}", "who wrote {t}", "who painted {t}", "who discovered {t}", "how many people live in [{y}|{c}]", "what language do they speak in {c}", "is {y} in {c}", "what is {c} famous for",
)
CODE = (
    "write [a|some|me a|me some|] {l} [code|program|script|function]", "write code [in {l}|]", "write [a|] {l} [code|program|script|function] [to|that can] {v} a {o}", "can you [write code|code|program|program in {l}]", "code in {l}", "do you [know|speak] {l}", "write a function [to|that] {v} {t}",
    "fix my code", "fix this bug", "debug this", "print hello world in {l}", "hello world in {l}", "implement quicksort", "write a [program|script|website|sorting function|for loop]", "how do i write a loop in {l}", "how do i learn {l}", "{l}", "sort a list in {l}", "help me with [my code|{l}]", "def main():", "what is {l}", "explain this code", "write a regex", "make a website", "write an algorithm", "write sql", "how to reverse a string in {l}", "[can you|please] code [a game|an app|something]", "program a [game|robot|website]",
)
TRANSLATE = (
    "translate [this|it|hello|{o}|that] [to|into] {g}", "how do you say [hello|{o}|thank you|{t}] in {g}", "what is [hello|{o}|good morning|cat] in {g}", "say [something|hello|{o}] in {g}", "[can you|please] translate [this|something|a text|for me]", "translate", "{g} translation", "teach me {g}", "answer in {g}", "speak {g}",
)
WRITING = (
    "write [a|an|me a|me an] [essay|email|letter|cover letter|report|song|book|speech|article|novel|blog post|tweet|cv] [about {t}|to my boss|for {p}|for me|]", "summarize [this|this text|{t}|the book]", "summarise [this text|the article]", "rewrite this", "correct my [grammar|text|spelling]", "check my spelling", "make a [list|plan|table] of {t}", "write an essay", "plan my [day|trip|week|holiday in {y}]", "sing [a song|me a song]", "paraphrase this", "write lyrics",
)
LETTERS = (
    "how many {letter}s are [in|there in] [the word|] {o}", "how many letters [are in|does] {o} [have|]", "spell {o}", "how do you spell {o}", "what is {o} backwards", "reverse [the word|] {o}", "what rhymes with {o}", "how many words are in this sentence", "how many rs are in strawberry", "count the letters in {o}", "what is the first letter of {o}", "how many {letter} in {o}",
)
STATEMENTS = (
    "i am a {o}", "i have a {o}", "i bought a {o} [today|yesterday|]", "i went to {y} [today|last week|yesterday|]", "my {o} is broken", "yesterday i {v}ed a {o}", "i saw a {o} [today|in {y}|]", "i work [with {t}|as a {o}|in {y}]", "i do not have a {o}", "i want [a {o}|to {v} a {o}|to go to {y}|{t}]", "my brother [likes {t}|is a {o}|lives in {y}]", "the {o} is [big|small|red|old|in the {o2}]", "i am going to {y}", "i study {t}", "today i {v}ed {t}", "we have a [new|big|small] {o}", "there is a {o} in my {o2}", "i need a {o}", "i think you are a {o}", "it is [late|early|cold|hot|dark]", "i was in {c} [once|last year|]", "i know {p}",
)
TASTE = ("do you like {t}", "do you like [a {o}|{o}s|{y}|{c}|{p}]", "do you love {t}", "what do you think of {p}", "do you want [a {o}|{t}]", "do you have a {o}", "have you ever [seen|had|eaten] a {o}", "do you own a {o}", "do you play {t}", "do you hate {t}")
NOISE = ("{m}", "{m}", "{m} {m2}", "{i} {i2} {i3}", "{i} {i2}", "{o} {o2} {o3}", "{i}", "{a}", "{a}{b}", "the {o} {v} {o2}", "{o} {t} {v} {o2} {i}", ".", "?", "{i} {o} {i2}", "{a}{b}{a}{a}", "x", "blah", "blah blah", "bla bla", "{t} {o} {v}")
WHY_NOT = ("why not", "why", "why can't you", "why don't you know [that|]", "why is that", "how come")
AND_THAT = ("and {c}", "what about {t}", "and {t}", "and {p}", "how about {y}", "and in {l}", "[ok|] what about {o}")
