"""What model classes of mlx-lm do not have: a file that needs it is refused, not run without it."""

from __future__ import annotations

from converters.gguf.architectures.row import Config
from converters.gguf.numbers import scalar
from converters.gguf.reader import GGUFFile


def no_windows(gguf: GGUFFile) -> None:
    """Refuse sliding windows.

    Raises:
        GGUFError: the file has them.
    """
    if scalar(gguf, "attention.sliding_window", 0):
        key = f"{gguf.architecture}.attention.sliding_window"
        raise gguf.error(key, expected="no sliding window in this architecture")


def tied(gguf: GGUFFile) -> None:
    """Refuse an output head of the file's own.

    Raises:
        GGUFError: it has one.
    """
    if "output.weight" in gguf:
        raise gguf.tensor("output.weight").error(
            expected="the embeddings as output head in this architecture", found="another one"
        )


def whole_heads(gguf: GGUFFile, config: Config) -> None:
    """Require heads that share the hidden size.

    Raises:
        GGUFError: they are of another width.
    """
    width = config["hidden_size"] // config["num_attention_heads"]
    if config["head_dim"] != width:
        key = f"{gguf.architecture}.attention.key_length"
        raise gguf.error(key, expected=f"{width}, the hidden size over the heads")
