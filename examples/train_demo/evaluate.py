"""Judge a demo model by the chats of `questions`: how many answers are good, and which are not.

`python -m examples.train_demo.evaluate [model.gguf]`. An answer counts when it contains one of the
expected strings; later turns see the model's own earlier answers. Greedy, then at temperature 0.7.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from .questions import BASICS, HELD_OUT, Chat

Messages = list[dict[str, str]]
Answer = Callable[[Messages, float, int], str]
DEMO = Path(__file__).resolve().parents[2] / "mlxrun" / "assets" / "demo.gguf"


def mlxrun_answer(path: Path) -> Answer:
    import mlxrun

    llm = mlxrun.load(str(path))

    def answer(messages: Messages, temperature: float, seed: int) -> str:
        return llm.chat(messages, max_tokens=256, temperature=temperature, seed=seed).text

    return answer


def llama_cpp_answer(path: Path) -> Answer:
    """The same through llama.cpp, where llama-cpp-python is installed."""
    from llama_cpp import Llama

    llm = Llama(str(path), n_ctx=1024, verbose=False, n_threads=1)

    def answer(messages: Messages, temperature: float, seed: int) -> str:
        reply = llm.create_chat_completion(
            messages,
            max_tokens=256,
            temperature=temperature,
            seed=seed,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            repeat_penalty=1.0,
        )
        return reply["choices"][0]["message"]["content"]

    return answer


def judge(
    chats: list[Chat], answer: Answer, temperature: float, seed: int, verbose: bool
) -> tuple[int, int]:
    """(good answers, answers) over all turns of the chats."""
    good = total = 0
    for chat in chats:
        messages: Messages = []
        for ask, expected in chat:
            messages.append({"role": "user", "content": ask})
            text = answer(messages, temperature, seed)
            messages.append({"role": "assistant", "content": text})
            right = any(part in text.lower() for part in expected.split("|"))
            good, total = good + right, total + 1
            if verbose or not right:
                print(f"{'  ' if right else '! '}{ask}\n    {text!r}")
    return good, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--engine", choices=("mlxrun", "llama.cpp"), default="mlxrun")
    parser.add_argument("--verbose", action="store_true", help="print the good answers too")
    args = parser.parse_args()
    answer = (mlxrun_answer if args.engine == "mlxrun" else llama_cpp_answer)(args.model)
    for title, chats in (("basics", BASICS), ("held out", HELD_OUT)):
        for temperature in (0.0, 0.7):
            good, total = judge(chats, answer, temperature, 1, args.verbose)
            print(f"{title}, temperature {temperature}: {good}/{total}")


if __name__ == "__main__":
    main()
