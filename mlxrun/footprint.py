"""What a model takes besides its weights, in bytes: what layers remember and what a pass computes.

Arithmetic only: knows neither MLX nor where the figures of a layer come from.

What is alive at once on MLX's CPU backend was measured: its queue runs about one layer ahead, so
that a pass holds all intermediate arrays of one layer, and a cache that grows has its old arrays
and fresh zeros beside the new ones in one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

# What is computed at once goes by the pace of the queue, and small arrays come with every pass.
SLACK, FIXED = 1.06, 1 << 19
# Layers whose arrays are there twice while a row joins.
JOINING = 2
# Smallest capacity of a cache; see mlxrun.cache.store.
SMALLEST = 256
# Bytes of each logit while a token is drawn: it and its penalties as float32, keys of 64 bits to
# sort by and their parts, ids.
DRAW = 40


@dataclass(frozen=True)
class Layer:
    """Bytes that one layer takes.

    Attributes:
        token: of keys and values, for each token that is remembered.
        fixed: remembered whatever the tokens, as a state is.
        window: tokens remembered at most, or None.
        twice: what is remembered is held as it was before the last token as well, to go back over
            that: a state always, a window once it is full.
        step: capacity grows by so many tokens; 0: it doubles.
        stream: of intermediate arrays, for each token of a pass.
        pair: of attention scores, for each query and each key that it is compared with.
        seen: of unpacked keys and values, for each key that a prompt sees.
        read: the same for each key that a row sees as it decodes.
        matrices: of weights that are unpacked for a pass of many tokens.
        ahead: layers whose arrays are alive at once: the fewer operations a layer is made of, the
            more of them are in the queue.
    """

    token: int = 0
    fixed: int = 0
    window: int | None = None
    twice: bool = False
    step: int = 0
    stream: int = 0
    pair: int = 0
    seen: int = 0
    read: int = 0
    matrices: int = 0
    ahead: int = 1

    def slots(self, tokens: int) -> int:
        """Capacity of a row that has seen so many tokens."""
        if tokens < 1:
            return 0
        if self.step:
            capacity = -(-tokens // self.step) * self.step
        else:
            capacity = max(SMALLEST, 1 << (tokens - 1).bit_length())
        return capacity if self.window is None else min(capacity, self.window)

    def stored(self, tokens: int) -> int:
        """Bytes that a row remembers, or has room for, after so many tokens."""
        held = self.fixed + self.token * self.slots(tokens)
        again = self.twice and (self.window is None or tokens >= self.window)
        return 2 * held if again else held

    def growth(self, before: int, after: int) -> int:
        """Bytes beside the new arrays while a row grows: its old arrays, and zeros for the rest."""
        grows = before and self.slots(after) > self.slots(before)
        return self.ahead * self.token * self.slots(after) if grows else 0

    def sorting(self, before: int, after: int) -> int:
        """Bytes beside a window's new arrays while a piece of a prompt is sorted into it.

        What is in reach is put together with what is new, then what stays is picked out.
        """
        if self.window is None:
            return 0
        return self.token * (2 * self.slots(before) + self.slots(after) + after - before)

    def work(self, queries: int, context: int, rows: int) -> int:
        """Bytes of a pass over ``queries`` tokens, the last of which sees ``context`` tokens.

        Args:
            rows: sequences that decode a token each in the same pass.
        """
        keys = context if self.window is None else min(context, self.window + queries)
        mask = queries * keys
        unpacked = self.matrices if queries > 1 else 0
        expanded = self.read * keys * rows + (self.seen * keys if queries > rows else 0)
        attention = self.pair * queries * keys + mask + expanded
        # Most matrices are those of the feed-forward, when the scores are gone.
        return self.ahead * self.stream * queries + max(attention, unpacked)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes besides its weights.

    Attributes:
        layers: of its blocks.
        draw: of the logits of one token and of drawing from them.
        head: of the output matrix, unpacked for many tokens at once; 0 where it is not.
        joint: rows go through the model together and share arrays; else one after the other.
    """

    layers: tuple[Layer, ...]
    draw: int
    head: int = 0
    joint: bool = True

    def stored(self, tokens: int, rows: int = 1) -> int:
        """Keys and values of rows that hold up to ``tokens`` tokens each.

        Rows share an array in each layer, so the longest decides on the capacity of all.
        """
        return rows * sum(layer.stored(tokens) for layer in self.layers)

    def reading(self, prompt: int, chunk: int, rows: int = 1) -> int:
        """Bytes at most while the last of several rows reads its prompt in chunks, beside weights.

        Counts what that row stores; not what the others do.
        """
        # The chunk in which the capacity doubles for the last time, the last full one, the last.
        doubled = max((layer.slots(prompt) for layer in self.layers), default=0) // 2 + 1
        starts = {min(doubled, prompt) - 1, max(0, prompt - chunk), prompt - 1}
        return max(self._chunk(start // chunk * chunk, prompt, chunk, rows) for start in starts)

    def _chunk(self, start: int, prompt: int, chunk: int, rows: int) -> int:
        end = min(start + chunk, prompt)
        beside = rows - 1  # each decodes a token in the same pass
        beside = beside if self.joint else 0
        queries = end - start + beside
        most = max(
            layer.work(queries, end, beside) + layer.growth(start, end) + layer.sorting(start, end)
            for layer in self.layers
        )
        return self.stored(end) + self._scratch(most, beside)

    def decoding(self, prompt: int, tokens: int, rows: int = 1) -> int:
        """Bytes at most while rows draw from ``prompt`` to ``tokens`` tokens, beside weights."""
        computed = rows if self.joint else 1
        if computed > 1:
            # A row that joins makes a layer's arrays anew, with zeros for itself.
            each = (max(JOINING, layer.ahead) * layer.stored(tokens) for layer in self.layers)
            copies = (rows + 1) * max(each, default=0)
        else:
            copies = max((layer.growth(prompt, tokens) for layer in self.layers), default=0)
        work = max((layer.work(computed, tokens, computed) for layer in self.layers), default=0)
        return self.stored(tokens, rows) + self._scratch(copies + work, computed)

    def _scratch(self, layer: int, rows: int) -> int:
        """What a pass takes beside caches, of which ``layer`` in the layer that takes most."""
        drawing = max(1, rows) * self.draw + (self.head if rows > 1 else 0)
        return int(SLACK * (layer + drawing)) + FIXED

    def peak(self, prompt: int, tokens: int, rows: int = 1, *, chunk: int) -> int:
        """Bytes at most besides the weights, from the first prompt to the last token.

        Args:
            prompt: tokens of each row's prompt.
            tokens: of its prompt and its reply.
            chunk: tokens of prompts in a pass.
        """
        others = self.stored(tokens, rows - 1)
        reading = others + self.reading(prompt, chunk, rows)
        return max(reading, self.decoding(prompt, tokens, rows))
