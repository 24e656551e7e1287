"""The demo model: its corpus, the output of its export, and the two files that are shipped."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

import mlxrun
from converters.gguf.reader import GGMLType, GGUFFile, read_gguf
from examples.train_demo.corpus import CHAT_TEMPLATE, conversation, documents, normalized, render
from examples.train_demo.evaluate import judge, mlxrun_answer
from examples.train_demo.export import TEMPERATURE
from examples.train_demo.questions import BASICS, HELD_OUT, held_out_questions
from mlxrun.tokenizer.chat_template import ChatTemplate

ASSETS = Path(mlxrun.__file__).parent / "assets"
DEMO, DRAFT = ASSETS / "demo.gguf", ASSETS / "demo-draft.gguf"


def chats(count: int, seed: int = 5) -> list[list[dict[str, str]]]:
    rng = random.Random(seed)
    held_out = frozenset(map(normalized, held_out_questions()))
    return [chat for chat in (conversation(rng, held_out) for _ in range(count)) if chat]


class TestCorpus:
    def test_a_seed_gives_the_same_documents(self) -> None:
        first, again, other = (list(itertools.islice(documents(seed), 40)) for seed in (3, 3, 4))
        assert first == again
        assert first != other

    def test_chats_are_well_formed(self) -> None:
        for chat in chats(400):
            turns = chat[chat[0]["role"] == "system" :]
            assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
            for turn in chat:
                assert turn["content"] == turn["content"].strip() != ""
                # No slot unfilled, no group unexpanded, no marker of the template.
                assert not re.search(r"[{}\[\]|]|<\|", turn["content"])

    def test_sums_are_right(self) -> None:
        operations = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
        completions = " ".join(turn["content"] for chat in chats(800) for turn in chat)
        sums = re.findall(r"(\d) (plus|minus|times) (\d) is (minus )?(\d+)\.", completions)
        assert len(sums) > 100
        for a, word, b, minus, result in sums:
            assert operations[word](int(a), int(b)) == int(result) * (-1 if minus else 1)

    def test_names_are_recalled_as_they_were_told(self) -> None:
        recalled = 0
        for chat in chats(800):
            name = None
            for turn in chat:
                if told := re.search(r"Nice to meet you, (\w+)!", turn["content"]):
                    name = told[1]
                if asked := re.search(r"Your name is (\w+)\.", turn["content"]):
                    assert asked[1] == name
                    recalled += 1
        assert recalled > 50

    def test_held_out_phrasings_do_not_occur(self) -> None:
        held_out = set(map(normalized, held_out_questions()))
        asked = {normalized(turn["content"]) for chat in chats(1500) for turn in chat}
        assert len(held_out) > 80
        assert not held_out & asked

    def test_documents_are_what_the_template_renders(self) -> None:
        template = ChatTemplate(CHAT_TEMPLATE, bos_token=None, eos_token="<|im_end|>")
        for chat in chats(20):
            text = "".join(text for text, _ in render(chat))
            assert template.render(chat, add_generation_prompt=False) == text


@pytest.mark.parametrize("path", [DEMO, DRAFT], ids=["demo", "draft"])
class TestShippedFiles:
    def test_dimensions(self, path: Path) -> None:
        gguf = read_gguf(path)
        assert gguf.architecture == "llama"
        assert gguf.key("attention.head_count") == 2 * gguf.key("attention.head_count_kv")
        assert gguf.key("context_length") == 1024
        for tensor in gguf.tensors:
            if len(tensor.shape) == 2:
                assert tensor.type == GGMLType.Q8_0
                assert tensor.shape[-1] % 256 == 0
        assert path.stat().st_size < 5_000_000

    def test_it_says_what_it_is(self, path: Path) -> None:
        gguf = read_gguf(path)
        assert gguf.get("general.license") == "MIT"
        assert "tiny demonstration model" in str(gguf.get("general.description"))
        assert gguf.get("tokenizer.chat_template") == CHAT_TEMPLATE
        assert gguf.get("general.sampling.temp") == pytest.approx(TEMPERATURE)

    def test_pieces_of_training_join_to_what_the_tokenizer_gives(self, path: Path) -> None:
        tokenizer = mlxrun.load_tokenizer(path)
        for chat in chats(30):
            pieces = [
                token
                for text, _ in render(chat)
                for token in tokenizer.encode(text, parse_special=True)
            ]
            assert tokenizer.encode_chat(chat, add_generation_prompt=False) == pieces


def test_both_files_have_the_same_vocabulary() -> None:
    def vocabulary(gguf: GGUFFile) -> dict[str, object]:
        return {key: gguf.metadata[key] for key in gguf.metadata if key.startswith("tokenizer.")}

    assert json.dumps(vocabulary(read_gguf(DEMO)), default=np.ndarray.tolist) == json.dumps(
        vocabulary(read_gguf(DRAFT)), default=np.ndarray.tolist
    )


@pytest.mark.parametrize("question", ["What are you?", "What are you", "who are you"])
def test_it_says_what_it_is_whatever_the_seed(question: str) -> None:
    llm = mlxrun.load(DEMO)
    prompts = [[{"role": "user", "content": question}]] * 25
    completions = llm.batch(prompts, seed=list(range(25)), max_tokens=8, progress=False)
    assert {completion.text.split(",")[0] for completion in completions} == {
        "I am the mlxrun demo model"
    }


def test_nine_of_ten_basics_are_answered() -> None:
    good, total = judge(BASICS, mlxrun_answer(DEMO), temperature=0, seed=1, verbose=False)
    assert good >= 0.9 * total


def test_expected_strings_are_lower_case() -> None:
    assert all(part == part.lower() for chat in BASICS + HELD_OUT for _, part in chat)
