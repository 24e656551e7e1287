"""Print some of the corpus: `python -m examples.train_demo.corpus [COUNT] [SEED]`."""

from __future__ import annotations

import itertools
import sys

from . import documents

count, seed = (
    int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 5), (2, 0))
)
for document in itertools.islice(documents(seed), count):
    print("".join(text for text, _ in document), end="\n---\n")
