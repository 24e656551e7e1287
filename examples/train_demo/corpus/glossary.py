"""What the demo model knows of its own trade: the terms, and the commands of mlxrun. Tables only."""

# ruff: noqa: E501
from __future__ import annotations

from typing import NamedTuple


class Term(NamedTuple):
    names: tuple[str, ...]  # how people write it; the first is how the model writes it
    what: str
    more: str
    why: str


class Command(NamedTuple):
    asks: tuple[str, ...]
    reply: str
    more: str


# fmt: off
TERMS = [
    Term(("mlxrun", "mlx run", "mlx-run", "MLXRUN"), "mlxrun is a program that runs GGUF models on Apple Silicon with MLX.", "It can chat, convert models, generate text, and be used from Python.", "It lets you run a language model on your own computer."),
    Term(("MLX", "apple mlx", "the mlx framework"), "MLX is a library from Apple for machine learning on Apple Silicon.", "It works with arrays that live in unified memory, and it is lazy: it computes only what is needed.", "It makes models run fast on a Mac."),
    Term(("GGUF", "a gguf file", "the gguf format", "gguf files"), "GGUF is a file format for language models.", "One file holds the weights, the tokenizer and the settings of a model. It comes from llama.cpp.", "One file is all you need to run a model."),
    Term(("Quantisation", "quantization", "quantizing", "a quantized model", "quantising", "quants"), "Quantisation stores the weights of a model with fewer bits.", "For example, eight or four bits for each weight instead of sixteen.", "The model becomes smaller and faster, and loses only a little quality."),
    Term(("The KV cache", "kv cache", "a kv cache", "key value cache", "the key-value cache", "kvcache"), "The KV cache keeps the keys and values of the tokens that a model has already read.", "It grows with every token, and it can be dense, rotating or quantised.", "The model does not have to read the whole text again for every new token."),
    Term(("A token", "tokens", "a token"), "A token is a small piece of text, such as a word or a part of a word.", "A model reads tokens and writes one token at a time.", "Models work with numbers, and every token has a number."),
    Term(("A tokenizer", "tokenizer", "tokenization", "the tokenizer"), "A tokenizer cuts text into tokens and puts tokens together into text.", "My own tokenizer knows 2048 tokens.", "A model cannot read letters, only the numbers of tokens."),
    Term(("A parameter", "parameters", "weights", "a weight", "model weights"), "A parameter, or weight, is one of the numbers that a model learns in training.", "I have about four million parameters. Big models have billions.", "The parameters hold all that a model knows."),
    Term(("A layer", "layers", "a layer in a model"), "A layer is one step of a model: attention, then a feed-forward network.", "I have four layers.", "More layers let a model do more work on every token."),
    Term(("A transformer", "transformers", "the transformer"), "A transformer is the kind of neural network that most language models use.", "It is a stack of layers with attention and feed-forward networks.", "It can look at all the tokens before the next one."),
    Term(("Attention", "self attention", "the attention mechanism", "self-attention"), "Attention lets a model look back at earlier tokens and take what it needs.", "Each token asks with a query, and earlier tokens answer with keys and values.", "It is how I can remember your name in this chat."),
    Term(("GQA", "grouped query attention", "grouped-query attention"), "GQA means grouped-query attention: several query heads share one key and value head.", "I have eight query heads and four key and value heads.", "It makes the KV cache smaller."),
    Term(("RoPE", "rotary embeddings", "rotary position embedding", "rope in a transformer"), "RoPE turns queries and keys by an angle that depends on their position.", "It is short for rotary position embedding.", "It tells the model where each token stands."),
    Term(("An embedding", "embeddings", "embedding"), "An embedding is a list of numbers that stands for a token.", "My embeddings have 256 numbers each.", "It is how a model turns a token into something it can compute with."),
    Term(("A neural network", "neural networks", "neural net"), "A neural network is a program made of many simple sums whose numbers are learned.", "It is trained on examples instead of being written by hand.", "It can learn things that are hard to write as rules."),
    Term(("A language model", "language models", "an LLM", "llms", "llm", "large language model"), "A language model is a program that writes text by guessing the next token.", "It learns from a lot of text. I am a very small one.", "It can chat, write and answer questions, if it is big enough."),
    Term(("The context", "context window", "context length", "the context window"), "The context is the text that a model can see at one time.", "My context is 1024 tokens long.", "What is outside the context is forgotten."),
    Term(("Temperature", "the temperature setting", "sampling temperature"), "Temperature says how freely a model picks the next token.", "At 0 it always takes the most likely token. Higher values give more surprising text.", "You can choose between safe text and surprising text."),
    Term(("Sampling", "a sampler", "token sampling"), "Sampling is the way a model picks the next token from the likely ones.", "Temperature, top-k, top-p and min-p are settings of sampling.", "Without it, the same question would always get the same answer."),
    Term(("Top-p", "top p", "nucleus sampling", "top_p"), "Top-p keeps only the most likely tokens whose chances add up to p.", "It is also called nucleus sampling.", "It throws away very unlikely tokens."),
    Term(("Top-k", "top k", "top_k"), "Top-k keeps only the k most likely tokens.", "For example, top-k of 40 keeps 40 tokens.", "It throws away very unlikely tokens."),
    Term(("Greedy decoding", "greedy", "greedy search"), "Greedy decoding always takes the most likely next token.", "It is the same as a temperature of 0.", "It gives the same answer every time."),
    Term(("A seed", "the seed", "random seed"), "A seed is a number that fixes the random choices.", "The same seed and the same prompt give the same text.", "It makes a result easy to repeat."),
    Term(("A prompt", "prompts", "the prompt"), "A prompt is the text that you give to a model.", "The model reads the prompt and then writes what comes next.", "A clear prompt gives a better answer."),
    Term(("A system prompt", "system prompt", "system message", "the system prompt"), "A system prompt is a message at the start that tells a model how to behave.", "In mlxrun chat you can set it with /system.", "It sets the tone for the whole chat."),
    Term(("A chat template", "chat template", "chat templates", "chatml"), "A chat template turns the messages of a chat into one text for the model.", "Mine is called ChatML. It marks where each message begins and ends.", "A model must see a chat in the form it was trained on."),
    Term(("Speculative decoding", "speculation", "speculative sampling"), "In speculative decoding a small draft model guesses tokens and the big model checks them.", "The result is the same as without it, but it can be faster.", "Checking several tokens at once is faster than writing them one by one."),
    Term(("A draft model", "draft model", "draft models"), "A draft model is a small model that guesses tokens for a bigger one.", "It must use the same tokens as the bigger model. I have a smaller sibling for that.", "It makes speculative decoding possible."),
    Term(("Batching", "batches", "a batch", "continuous batching"), "Batching means that a model works on many requests at the same time.", "In continuous batching, requests join and leave at any step.", "It uses the computer much better."),
    Term(("Prefill", "prefilling", "prompt processing"), "Prefill is the first part of the work: the model reads the whole prompt.", "After prefill comes decoding, one token at a time.", "A fast prefill means that the first word comes soon."),
    Term(("A rotating cache", "rotating kv cache", "rotating cache", "sliding window cache"), "A rotating cache keeps the first few tokens and the last ones, and forgets the middle.", "Its size stays the same, however long the text is.", "The memory stays small in a long chat."),
    Term(("Safetensors", "safetensors files", "a safetensors file"), "Safetensors is a file format for the weights of a model.", "mlxrun convert writes safetensors files that MLX can load.", "It is simple, fast and safe to open."),
    Term(("Apple Silicon", "m1", "m2", "apple chips", "m3"), "Apple Silicon is the name of Apple's own chips, such as M1, M2 and M3.", "The processor and the graphics share one unified memory.", "Large models fit in that memory."),
    Term(("Unified memory", "unified memory on a mac", "shared memory on mac"), "Unified memory is memory that the CPU and the GPU share.", "On Apple Silicon nothing has to be copied between them.", "A model can use all of the memory."),
    Term(("Metal", "apple metal", "metal kernels"), "Metal is Apple's way to run programs on the GPU.", "MLX uses Metal on a Mac.", "It makes models fast on a Mac."),
    Term(("A GPU", "gpus", "graphics card", "gpu"), "A GPU is a chip that does many simple sums at the same time.", "It was made for graphics and is now used for models too.", "Models need very many sums."),
    Term(("A CPU", "cpus", "processor", "cpu"), "A CPU is the main processor of a computer.", "I am so small that I run well on a CPU.", "It can run any program."),
    Term(("Q8_0", "q8", "8 bit quantization", "eight bit"), "Q8_0 is a quantisation with eight bits a weight.", "Each group of 32 weights shares one scale. My own file uses Q8_0.", "It is almost as good as the full weights, at half the size of sixteen bits."),
    Term(("Q4_K_M", "q4", "q4_k", "4 bit quantization", "four bit"), "Q4_K_M is a quantisation with a little more than four bits a weight.", "It uses blocks of 256 weights, and keeps some tensors at six bits.", "It is a good balance of size and quality."),
    Term(("llama.cpp", "llama cpp", "llamacpp"), "llama.cpp is a program in C++ that runs language models. The GGUF format comes from it.", "It works on many kinds of computers.", "Many models are shared as GGUF files for it."),
    Term(("Hugging Face", "huggingface", "the hugging face hub", "the hub"), "Hugging Face is a site where people share models.", "Use mlxrun pull org/repo:Q4_K_M to get a GGUF file from it.", "You can find thousands of models there."),
    Term(("mlx-lm", "mlx lm", "mlx_lm"), "mlx-lm is a Python package that runs language models with MLX.", "It can load what mlxrun convert writes.", "It supports many kinds of models."),
    Term(("Perplexity", "ppl"), "Perplexity says how surprised a model is by a text. Lower is better.", "It is used to compare models and quantisations.", "It shows how much a quantisation hurts."),
    Term(("A tensor", "tensors", "tensor"), "A tensor is a box of numbers with any number of dimensions.", "The weights of a model are tensors.", "Models compute with tensors."),
    Term(("A llama model", "llama", "the llama architecture", "llama models"), "Llama is a family of language models. Its architecture is used by many models.", "I have the llama architecture too, but I am much smaller.", "A program that runs llama models can run many others."),
    Term(("Inference", "running a model", "llm inference"), "Inference means using a trained model to get an answer.", "Training comes first, then inference. mlxrun does inference.", "It is what happens every time I answer you."),
    Term(("Training", "train a model", "model training"), "Training is how a model learns: it guesses, and its weights are changed to guess better.", "I was trained on a CPU, on text from a small generator.", "A model knows only what it saw in training."),
    Term(("Machine learning", "ml", "AI", "artificial intelligence"), "Machine learning means that a program learns from examples.", "Language models are one kind of machine learning.", "Some things are easier to learn than to program."),
    Term(("A bit", "bits", "a byte", "bytes"), "A bit is a 0 or a 1. Eight bits make a byte.", "My weights have about eight bits each.", "All that computers store is made of bits."),
]

COMMANDS = [
    Command(("[how do i|how to|how can i|how does one|what is the command to|command to|which command do i use to] convert [a|the|my|] [model|gguf|gguf model|gguf file|gguf to mlx|file]", "convert [a model|gguf|a gguf file|my gguf] [to mlx|]", "i want to convert a [model|gguf file]"),
     "Run this command: mlxrun convert model.gguf", "Add -o and a directory to say where the result goes: mlxrun convert model.gguf -o my-model"),
    Command(("[how do i|how to|how can i|what is the command to|command to|which command do i use to] [chat|talk] with [a|another|my|the] [model|gguf|gguf file]", "[how do i|how to|how can i] [start|open] a chat", "[how do i|how to|how can i] [run|use|load|try] [a|another|a bigger|a different|my own|my] [model|gguf|gguf file|gguf model]", "run [a|another|my] model", "[how do i|how to|how can i] use mlxrun"),
     "Run this command: mlxrun chat model.gguf", "Without a file, mlxrun chat starts me, the demo model. Type /help in the chat to see more."),
    Command(("[how do i|how to|how can i|what is the command to|command to|which command do i use to] generate [text|some text|a text] [with a model|from a prompt|]", "[how do i|how to|how can i] [complete a prompt|run a single prompt|give it a prompt]", "generate text [from|on] the command line"),
     'Run this command: mlxrun generate model.gguf --prompt "Once upon a time"', "Add --max-tokens 100 to say how long the text may be."),
    Command(("[how do i|how to|how can i|what is the command to|command to|which command do i use to] [inspect|look into|look inside|examine|see what is in] [a|the|my] [model|gguf|gguf file]", "inspect [a model|gguf|a gguf file]", "[how do i|how can i] see the [metadata|tensors] of a [model|gguf]", "how much memory [does a model need|will a model need]"),
     "Run this command: mlxrun inspect model.gguf", "It shows the metadata, the tensors and the memory that the model needs."),
    Command(("[how do i|how to|how can i|what is the command to|command to|which command do i use to] [download|pull|get|fetch] [a|another|a new|some] model", "[download|pull] [a|some] model [from hugging face|from the hub|]", "where [do i|can i] [get|find|download] [a model|models|more models|other models|gguf files]"),
     "Run this command: mlxrun pull org/repo:Q4_K_M", "Put the name of a model on Hugging Face in the place of org/repo."),
    Command(("[how do i|how to|how can i] install [mlxrun|it|this|you]", "install [mlxrun|this]", "what is the command to install [mlxrun|it]"),
     "Run this command in the folder of mlxrun: pip install .", "You need Python 3.11 or newer. On Linux it runs on the CPU, on a Mac on the GPU."),
    Command(("[how do i|how to|how can i|can i] use [mlxrun|it|this|you] [from|in|with] python", "[show me|what is] the python api", "python api", "[how do i|how to] [load a model|generate text|chat] [in|from] python", "[how do i|how to] use [mlxrun|it] in a notebook"),
     'In Python: import mlxrun, then llm = mlxrun.load("model.gguf"), then print(llm.generate("Hello", max_tokens=50)).', "There are also llm.stream, llm.chat and llm.tokenizer."),
    Command(("[how do i|how to|how can i] [exit|quit|leave|close|stop] [the chat|this chat|chat|this|here|]", "[exit|quit] the chat", "how do i get out of here"),
     "Type /exit to leave the chat.", "Ctrl-C stops a reply and keeps the chat."),
    Command(("[how do i|how to|how can i] [clear|reset|restart|start over] [the chat|this chat|chat|]", "[how do i|can i] start a new chat", "clear the chat", "start over"),
     "Type /clear to start a new chat.", "I forget all that was said before, also your name."),
    Command(("[how do i|how to|how can i|can i] [save|keep|store] [the|this|a|my] chat", "save [the|this] chat", "[how do i|can i] load a [saved|old] chat"),
     "Type /save and a file name to keep this chat, and /load and the file name to open it again.", "The file holds all the messages."),
    Command(("[how do i|how to|how can i|can i] [undo|take back] [a message|my last message|that|the last message|]", "undo [that|my last message]"),
     "Type /undo to take back the last message.", "Use /retry to get a new reply to it."),
    Command(("[how do i|how to|how can i|can i] [retry|get another reply|get a new answer|get a different answer]", "[how do i|can you] try again"),
     "Type /retry to get a new reply.", "With a higher temperature the replies differ more."),
    Command(("[how do i|how to|how can i|can i|where do i] [set|change|write] [the|a|your] [system prompt|system message]", "change [the|your] system prompt"),
     "Type /system and then the text.", "I am so small that a system prompt does not change me much."),
    Command(("[how do i|how to|how can i|can i] [set|change|raise|lower] [the|a|your] [temperature|settings|setting|sampling settings|seed]", "change the temperature", "set the temperature"),
     "Type /set temperature 0.7 to change the temperature.", "Other settings are changed the same way, with /set."),
    Command(("[how do i|how can i] see [how fast you are|the speed|the tokens per second|statistics|stats]", "[how fast are you|what is your speed|are you fast]", "[show|show me] [stats|statistics|the stats]"),
     "Type /stats to see how many tokens I write per second.", "I am small, so I am fast."),
    Command(("[what commands are there|which commands are there|list the commands|what commands can i use|what are the commands|show me the commands|chat commands|commands|list of commands|slash commands]", "what does /help do"),
     "In the chat there are /help, /system, /set, /save, /load, /undo, /retry, /clear, /stats and /exit.", "Type /help to see what each of them does."),
    Command(("[what can mlxrun do|what does mlxrun do|what is mlxrun for|what are the commands of mlxrun|mlxrun commands|features of mlxrun]",),
     "mlxrun can chat, convert, generate, inspect and pull. For example: mlxrun convert model.gguf", "You can also use it from Python: import mlxrun"),
    Command(("[why should i use|why use|what is good about|what is special about] mlxrun", "is mlxrun [good|free|open source]", "what license does mlxrun have"),
     "mlxrun is free, has the MIT license, and is pure Python on top of MLX.", "It says for every tensor whether it is exactly as in the GGUF file."),
    Command(("[does mlxrun|can mlxrun|does it|can i run it] [work on|run on|support|on] [linux|windows|a mac|my mac|my laptop|an m1]", "[what|which] computer do i need", "do i need a mac"),
     "mlxrun is made for Macs with Apple Silicon. It also runs on Linux, on the CPU.", "The more memory your computer has, the bigger the model can be."),
    Command(("[what|which] models [can mlxrun run|does mlxrun support|can i run|are supported|can i use|work]", "[can it|can mlxrun] run [llama|qwen|mistral|any model|other models]"),
     "mlxrun runs GGUF models such as Llama, Mistral and Qwen.", "Get one with mlxrun pull org/repo:Q4_K_M and then chat with it."),
    Command(("[what|which] model should i [use|try|run]", "[recommend|suggest] a model", "which model is [best|good]"),
     "Try a small instruct model first, as a Q4_K_M file.", "If your computer has more memory, try a bigger one."),
    Command(("how does mlxrun work", "[explain|tell me] how mlxrun works", "what happens when i [chat|write something]"),
     "mlxrun reads the GGUF file, turns its weights into MLX arrays, and runs the model one token at a time.", "Your text is cut into tokens, the model guesses the next token, and so on until the reply is done."),
]
# fmt: on
