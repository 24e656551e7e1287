"""End-of-generation tokens, known by their text where the metadata does not have them.

The rules are llama.cpp's (``llama-vocab.cpp``, November 2026): files seldom name all tokens that
end generation, and some mark such tokens as ordinary text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

__all__ = ["correct_types", "end_ids"]

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type

_ENDS: Final = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
]
# Separators of files in code models. Of each group only the first one present counts.
_FILE_ENDS: Final = {
    "fim_pad": ["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    "fim_rep": ["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    "fim_sep": ["<|file_sep|>"],
}
# Fill-in-the-middle tokens: control tokens, whatever the file says, but they end nothing.
_INFIX: Final = [
    line.split()
    for line in (
        "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|>"
        " <|prefix|>",
        "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|>"
        " <|suffix|>",
        "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|>"
        " <|middle|>",
    )
]
_CHANNELS: Final = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def end_ids(ids: Mapping[str, int], roles: Mapping[str, int]) -> frozenset[int]:
    """All end-of-generation tokens.

    Args:
        ids: the vocabulary, text -> id.
        roles: special tokens that the metadata names, by role ("eos", "eot", "eom", "fim_pad" ...).
    """
    ends = {ids[text] for text in _ENDS if text in ids}
    ends |= {roles[role] for role in ("eos", "eot", "eom") if role in roles}
    for role, texts in _FILE_ENDS.items():
        ends.update([roles[role]] if role in roles else _first(ids, texts))
    return frozenset(ends - {ids[text] for text in _not_ends(ids, roles)})


def correct_types(
    ids: Mapping[str, int], roles: Mapping[str, int], types: Sequence[int]
) -> list[int]:
    """Token types, corrected by the tokens' texts; arguments as ``end_ids``."""
    fixed = list(types)
    for text in _ENDS:
        if text in ids:
            fixed[ids[text]] = _CONTROL
    for texts in (*_FILE_ENDS.values(), *_INFIX):
        for index in _first(ids, texts):
            fixed[index] = _CONTROL
    for text in _CHANNELS:
        if text in ids:
            fixed[ids[text]] = _USER_DEFINED
    for text, type_ in _not_ends(ids, roles).items():
        fixed[ids[text]] = type_
    return fixed


def _first(ids: Mapping[str, int], texts: Sequence[str]) -> list[int]:
    return [ids[text] for text in texts if text in ids][:1]


def _not_ends(ids: Mapping[str, int], roles: Mapping[str, int]) -> dict[str, int]:
    """Texts of ``_ENDS`` that end nothing in this vocabulary, with their type here."""
    others: dict[str, int] = {}
    calls = "<|call|>" in ids or "<|calls|>" in ids
    if "<|end|>" in ids and calls and ("<|return|>" in ids or "<|flush|>" in ids):
        others["<|end|>"] = _USER_DEFINED  # separates the messages of one turn
    plamo = ids.get("<|plamo:eos|>") in [roles.get(role, -1) for role in ("eos", "eot", "eom")]
    if "</s>" in ids and ("<|tool_response>" in ids or plamo):
        others["</s>"] = _NORMAL
    return others
