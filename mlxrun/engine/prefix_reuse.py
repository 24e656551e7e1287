"""Prefixes that the sequences of an engine take over from the prefix cache, and store in it.

A sequence looks up its prefix when it is about to prefill, not when it arrives, so that it finds
prefixes that were stored meanwhile. One that would repeat the prefill of another sequence waits for
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as ListLike

from mlxrun.engine.sequence import Sequence
from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.prefix_cache import PrefixCache, common_prefix_len

# Tokens of a forward pass of prefill: enough for matrix products to be efficient, few enough to
# bound its memory and to report progress. Prefixes are stored at multiples of it.
PREFILL_CHUNK = 512
# The shortest prefix to share between rows, with a product of its own in attention.
MIN_SHARED = 256
# A prefix that is shared already is preferred if it saves this share of the best one's tokens.
PREFER_SHARED = 0.8


class PrefixReuse:
    """The running sequences of an engine and their prefix cache."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self._running: dict[Sequence, tuple[str, ...]] = {}  # with the kinds of their caches
        self._stale = False  # whether waiting sequences are to be determined again

    @property
    def shared_nbytes(self) -> int:
        """Bytes of prefixes that running sequences share."""
        prefixes = {sequence.prefix for sequence in self._running}
        return sum(prefix.nbytes for prefix in prefixes if prefix)

    def add(self, sequence: Sequence) -> None:
        """Note a sequence that is about to prefill."""
        self._running[sequence] = tuple(cache.layout_key for cache in sequence.caches)
        self._stale = True

    def estimate(self, prefilling: Iterable[Sequence]) -> None:
        if not self._stale:
            return
        self._stale = False
        for sequence in prefilling:
            if not sequence.prefix_loaded and sequence in self._running:
                sequence.num_reusable = self.cache.num_reusable(
                    tuple(sequence.ids[:-1]), sequence.caches, sequence.reuse_step
                )
                sequence.waits_for_prefix = self._waits(sequence)

    def load_prefix(self, sequence: Sequence) -> bool:
        if sequence.prefix_loaded:
            return False
        sequence.prefix_loaded, self._stale = True, True
        if sequence not in self._running:
            return False
        step, session = sequence.reuse_step, sequence.session
        prompt = tuple(sequence.ids[:-1])  # the last token's logits are needed
        length = sequence.num_computed  # of a session
        known = self.cache.matched_len(prompt, sequence.caches, step)
        share = 0 if session else self._shared_length(sequence)
        caches = session.empty() if session else sequence.caches
        # What a session has is copied again only for a prefix that is clearly longer.
        min_len = length + self.cache.min_prefix_len if session else 1
        lease = self.cache.restore(prompt, caches, step, share_len=share, min_len=min_len)
        if lease is not None:
            sequence.caches, sequence.num_computed = caches, lease.length
            if session:
                lease.release()  # a session has copies
            else:
                sequence.lease = lease
        sequence.num_stored = sequence.num_computed
        if sequence.output_processor is not None and not sequence.num_output:
            sequence.output_processor.num_cached = sequence.num_computed
        sequence.find_prefix()
        for cache in sequence.caches:
            cache.prompt = len(sequence.request.prompt)
        if known - sequence.num_computed >= self.cache.min_prefix_len and step == 1 and not session:
            sequence.store_at.add(known)  # seen for the second time: worth a snapshot
        return sequence.prefix is not None

    def chunk(self, sequence: Sequence, count: int) -> int:
        start, first = sequence.num_computed, sequence.score_from
        if first is not None and sequence.score_rows is not None:
            count = min(count, first - start if start < first else sequence.score_rows)
        stops = (start // PREFILL_CHUNK * PREFILL_CHUNK + PREFILL_CHUNK, *sequence.store_at)
        return min(count, *(stop - start for stop in stops if stop > start))

    def store_prefilled(self, sequence: Sequence) -> None:
        """Store the prefix of a sequence that is at a stop or at its end."""
        length = sequence.num_computed
        at_stop = length % PREFILL_CHUNK == 0 or length in sequence.store_at
        if at_stop or sequence.is_prefilled:
            self._stale = True  # others may wait for it
            self._store(sequence, sequence.caches, sequence.ids[:length])
        if sequence.is_prefilled and (share := self._shared_length(sequence)):
            self.cache.share(sequence.ids[:share], sequence.caches)
            sequence.find_prefix()

    def store_ended(self, sequence: Sequence, caches: list[KVCache]) -> None:
        """Store a sequence that leaves, its output included."""
        if sequence in self._running and sequence.prefix_loaded and sequence.reuse_step == 1:
            # The last token that was sampled may not have gone through the model.
            self._store(sequence, caches, sequence.ids[: sequence.num_computed])

    def remove(self, sequence: Sequence) -> None:
        """Release a sequence's prefixes."""
        if self._running.pop(sequence, None) is not None:
            self._stale = True
        if sequence.lease is not None:
            sequence.lease.release()
        sequence.lease = sequence.prefix = None
        sequence.prefix_loaded = sequence.waits_for_prefix = False
        sequence.num_reusable = sequence.num_stored = 0
        sequence.store_at.clear()

    def _store(self, sequence: Sequence, caches: list[KVCache], ids: ListLike[int]) -> None:
        if (
            _is_reproducible(sequence)
            and len(ids) - sequence.num_stored >= self.cache.min_prefix_len
        ):
            self.cache.insert(ids, caches, sequence.reuse_step)
            sequence.num_stored, self._stale = len(ids), True

    def store_session(self, ids: ListLike[int], caches: list[KVCache]) -> None:
        if len(ids) >= self.cache.min_prefix_len:
            self.cache.insert(ids, caches)

    def _others(self, sequence: Sequence) -> Iterator[Sequence]:
        """Those whose caches are of the same kinds."""
        kinds = self._running[sequence]
        for other, own in self._running.items():
            if other is not sequence and own == kinds and other.reuse_step == sequence.reuse_step:
                yield other

    def _shared_length(self, sequence: Sequence) -> int:
        """Tokens of the prefix that a prompt shares with other sequences."""
        if sequence.reuse_step > 1 or sequence.session:  # sums of two parts round otherwise
            return 0
        prompt = tuple(sequence.ids[:-1])
        common = [
            min(common_prefix_len(prompt, other.request.prompt), len(other.request.prompt) - 1)
            for other in self._others(sequence)
        ]
        known = self.cache.matched_len(prompt, sequence.caches)
        held = self.cache.shared_lens(prompt, sequence.caches)
        return shared_length([min(n, known) for n in common], held)

    def _waits(self, sequence: Sequence) -> bool:
        """Whether another sequence is prefilling a prefix of this one."""
        if not self.cache.budget or not all(self._running[sequence]):
            return False
        prompt, step = tuple(sequence.ids[:-1]), sequence.reuse_step
        for other in self._others(sequence):
            if not other.prefix_loaded or other.is_prefilled or not _is_reproducible(other):
                continue
            common = common_prefix_len(prompt, other.request.prompt) // step * step
            missing = common - max(sequence.num_reusable, sequence.num_computed)
            if missing >= self.cache.min_prefix_len and other.num_computed < common:
                other.store_at.add(common)
                return True
        return False


def _is_reproducible(sequence: Sequence) -> bool:
    """Whether its keys and values are those of a cold start, as others of its step need them."""
    return sequence.reuse_step == 1 or sequence.whole_chunks


def shared_length(common: ListLike[int], shared: ListLike[int]) -> int:
    """Tokens of the prefix to share with other sequences; 0 unless it pays.

    A shorter prefix may be shared by more sequences, so the tokens saved in all count. A prefix
    that is shared already is preferred to one that saves little more, so that a group is not split
    by a word that some of it have in common.

    Args:
        common: length in common with each other sequence.
        shared: lengths of prefixes that are shared already.
    """
    each = sorted((n for n in common if n >= MIN_SHARED), reverse=True)
    saved = {n: n * count for count, n in enumerate(each, 1)}
    if not saved:
        return 0
    best = max(saved, key=saved.__getitem__)
    again = {n: n * sum(one >= n for one in each) for n in shared if n >= MIN_SHARED}
    likely = max(again, key=again.__getitem__, default=0)
    return likely if again.get(likely, 0) >= PREFER_SHARED * saved[best] else best
