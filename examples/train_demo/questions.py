"""The chats by which the demo model is judged, with what a good answer contains. Tables only.

A chat is a list of turns: what the user says, and what the answer must contain (lower case, alternatives
with `|`). `BASICS` is what anybody types first, and much of it is in the training text. `HELD_OUT` has other
phrasings, which the training text never contains, because `corpus.conversation` refuses them.
"""

# ruff: noqa: E501
from __future__ import annotations

Chat = list[tuple[str, str]]

_WHO = "demo model|tiny language model"
_NO = "don't know|cannot|did not understand|too hard|do not know"

BASICS: list[Chat] = [
    [("hello", "hello")],
    [("Hi!", "hello")],
    [("who are you?", _WHO)],
    [("what can you do?", "gguf")],
    [("what is MLX?", "apple")],
    [("what is gguf", "file format")],
    [("what is quantization?", "fewer bits")],
    [("what is a kv cache", "keys and values")],
    [("how do I convert a model?", "mlxrun convert model.gguf")],
    [
        ("tell me a story about a fox", "fox named"),
        ("tell me another", "once upon a time"),
        ("now one about a robot", "robot named"),
    ],
    [("my name is Ana", "ana"), ("what's my name?", "your name is ana.")],
    [
        ("what's my name?", "not told me"),
        ("it's Ben", "ben"),
        ("what is my name", "your name is ben."),
    ],
    [("what is 3 + 4?", "is 7."), ("and 5 + 5?", "is 10."), ("2 x 3", "is 6.")],
    [("what is the capital of France?", "don't know")],
    [("write python code", "cannot write code")],
    [("asdf", "did not understand")],
    [
        ("what day comes after monday?", "tuesday"),
        ("and the next one?", "wednesday"),
        ("and then?", "thursday"),
    ],
    [
        ("what does a cow say?", "moo"),
        ("and a cat?", "meow"),
        ("what does it eat?", "meat and fish"),
    ],
    [("count to 10", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10.")],
    [("tell me a joke", "?|!"), ("another one", "?|!")],
    [("thanks", "welcome"), ("bye", "goodbye")],
    [("how are you?", "thank you")],
    [("are you ChatGPT?", _WHO)],
    [("what colour is the sky?", "blue"), ("and grass?", "green")],
    [("what is the opposite of hot?", "cold")],
]

HELD_OUT: list[Chat] = [
    [("good day to you", "hello")],
    [("hey, who is there?", _WHO + "|hello|yes")],
    [("could you please say who you are", _WHO)],
    [("so what exactly are you?", _WHO)],
    [("hi what are u", _WHO)],
    [("Tell me a little about yourself.", _WHO)],
    [("wht can yuo do", "gguf")],
    [("what sort of things can i ask you about", "gguf")],
    [("give me a list of what you can do", "gguf")],
    [("which company built you?", "mlxrun")],
    [("how many params do you have?", "four million")],
    [("Are you a real human being?", "no")],
    [("are you gpt5?", "no|" + _WHO)],
    [("describe MLX in a few words", "apple")],
    [("mlx??", "apple")],
    [("What's this GGUF thing?", "file format")],
    [("i keep hearing about gguf, what is it", "file format")],
    [("wat does quantisation do", "fewer bits")],
    [("Explain the KV-cache.", "keys and values")],
    [("could you explain what a tokenizer does?", "tokens")],
    [("what on earth is speculative decoding", "draft model")],
    [("What is meant by temperature in sampling?", "how freely|next token|temperature")],
    [("tell me in short what attention is", "earlier tokens")],
    [
        ("What is MLX?", "apple"),
        ("and GGUF?", "file format"),
        ("why should i care?", "one file|model|run"),
    ],
    [
        ("what is a draft model?", "smaller|small"),
        ("can you tell me a bit more about that?", "same tokens|sibling"),
    ],
    [("how would i convert my gguf file?", "mlxrun convert model.gguf")],
    [("i have a gguf file, how do i convert it", "mlxrun convert model.gguf")],
    [("which command downloads a model?", "mlxrun pull")],
    [("how can I chat with my own gguf model?", "mlxrun chat model.gguf")],
    [("how to generate text with mlxrun", "mlxrun generate")],
    [("how do i call it from python?", "import mlxrun")],
    [("how do I leave?", "/exit")],
    [("please tell me a story about an old owl", "owl named")],
    [("I'd love a story about a train", "train named")],
    [
        ("tell me a bedtime story about a penguin please", "penguin named"),
        ("wonderful, one more please", "once upon a time"),
    ],
    [("a story about a teapot", "teapot named")],
    [("can you make up a story about two friends?", "once upon a time")],
    [("tell me a fairy tale", "once upon a time")],
    [
        ("hello, they call me Maria", "maria"),
        ("what is gguf?", "file format"),
        ("do you still remember what my name is?", "maria"),
    ],
    [("hi I'm Tom and I like dogs", "tom|dogs"), ("what was my name again?", "tom")],
    [
        ("My name is Lucy.", "lucy"),
        ("what is 2 + 2?", "is 4."),
        ("tell me a joke", "?|!"),
        ("what does a dog say?", "woof"),
        ("tell me a story about a bear", "bear named"),
        ("thank you", "welcome"),
        ("what is the capital of Spain?", "don't know"),
        ("What's my name?", "lucy"),
        ("bye", "goodbye"),
    ],
    [("i live in Oslo", "oslo"), ("so where do i live?", "oslo")],
    [
        ("my favourite colour is green", "green"),
        ("hello", "hello"),
        ("which colour is my favourite?", "green"),
    ],
    [("what do you get from 6 plus 3?", "is 9.")],
    [("what is the result of 8 + 7?", "is 15.")],
    [("nine minus four please", "is 5.")],
    [("could you add 4 and 4 for me", "is 8.")],
    [("7*8", "is 56.")],
    [("what is 123 + 456?", "too hard")],
    [("what does one hundred divided by seven make", _NO)],
    [("Which day follows Friday?", "saturday"), ("and the one after that one?", "sunday")],
    [("if today is sunday, what day is tomorrow?", "monday")],
    [("what month comes right after may", "june")],
    [("please count up to seven", "1, 2, 3, 4, 5, 6, 7.")],
    [("can you list all the days of the week?", "monday, tuesday")],
    [("what noise do cats make", "meow"), ("how about dogs?", "woof"), ("and sheep", "baa")],
    [("tell me an interesting thing about octopuses", "three hearts|colour")],
    [("can a penguin fly?", "no"), ("can it swim?", "yes")],
    [("how many legs has a spider got?", "eight")],
    [("what is a baby kangaroo called", "joey")],
    [("where do bears live?", "forests"), ("and what do they eat?", "berries")],
    [("what happens when you mix yellow and blue?", "green")],
    [("what color are bananas?", "yellow")],
    [("whats the opposite of big", "small")],
    [("who was the first man on the moon?", _NO)],
    [("what's the population of Japan", "don't know")],
    [("how do I bake a chocolate cake", "don't know")],
    [("who is the president of the united states?", "don't know")],
    [("explain general relativity", "don't know")],
    [("what is the best phone to buy", "don't know")],
    [("write me a function that reverses a list", "cannot write code")],
    [("please write some javascript for me", "cannot write code")],
    [("translate good morning into french", "cannot translate")],
    [("write an email to my landlord", "cannot write that")],
    [("qwrtz plm", "did not understand|don't know")],
    [("banana shoe yesterday", "did not understand|don't know")],
    [("dfgdfg", "did not understand|don't know")],
    [("what's the weather going to be?", "weather")],
    [("do you know what time it is right now", "clock")],
    [("you are amazing!", "thank you")],
    [("that is completely wrong", "wrong|check")],
    [("i feel a bit sad today", "sorry")],
    [("thank you, that was really helpful", "welcome")],
    [("ok see you tomorrow then", "goodbye")],
    [("how's everything going?", "fine|well")],
    [("are you able to learn from me?", "this chat|forget")],
    [("do you need an internet connection?", "own computer|cannot")],
    [("what don't you know?", "few things")],
]


def held_out_questions() -> list[str]:
    """What the training text must not contain; a word or two alone, and the basics, are nobody's own phrasing."""
    basic = {ask.lower().strip("?!.") for chat in BASICS for ask, _ in chat}
    asks = [ask for chat in HELD_OUT for ask, _ in chat]
    return [ask for ask in asks if len(ask.split()) > 2 and ask.lower().strip("?!.") not in basic]
