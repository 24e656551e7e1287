"""llama.cpp's logits for a model file, in an interpreter that has llama-cpp-python.

usage: python judge.py MODEL.gguf OUT.npy TOKEN [TOKEN ...]

One batch, float32 weights and cache, no flash attention: what every backend is compared with. A
context of 512 tokens, as skeletons have by default: by it llama.cpp chooses LongRoPE's list.
llama.cpp's log goes to stderr. Imports nothing of this project.
"""

from __future__ import annotations

import sys

import llama_cpp
import numpy as np


def main() -> None:
    """Write the logits (T, V) of the tokens to OUT.npy."""
    model, out, *ids = sys.argv[1:]
    tokens = [int(i) for i in ids]
    llama = llama_cpp.Llama(
        model,
        n_ctx=max(512, len(tokens)),
        n_batch=len(tokens),
        n_ubatch=len(tokens),
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=1,
        verbose=True,
    )
    llama.eval(tokens)
    np.save(out, np.array(llama.scores[: len(tokens)], np.float32))


if __name__ == "__main__":
    main()
