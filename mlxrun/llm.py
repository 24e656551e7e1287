"""LLM: a loaded model and its tokenizer. Its methods are thin layers over the engine."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Unpack

from mlxrun.kernels import blas

blas.preload()

import mlx.core as mx  # noqa: E402 - a BLAS must be loaded before MLX

from converters.report import ConversionReport  # noqa: E402
from mlxrun.config import (  # noqa: E402
    CacheConfig,
    CacheOptions,
    EngineConfig,
    EngineOptions,
    LoadConfig,
    LoadOptions,
    check_callback,
)
from mlxrun.display import in_notebook, progress_bar, table  # noqa: E402
from mlxrun.engine.engine import (  # noqa: E402
    PARALLEL,
    Engine,
    Mode,
    Progress,
    prefill_budget,
)
from mlxrun.engine.input import (  # noqa: E402
    InputProcessor,
    Message,
    Prompt,
    conversation,
    token_ids,
)
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK  # noqa: E402
from mlxrun.engine.sequence import Session, load_session  # noqa: E402
from mlxrun.errors import ParameterError, ProcessError  # noqa: E402
from mlxrun.fingerprint import ModelFingerprint  # noqa: E402
from mlxrun.hub import resolve  # noqa: E402
from mlxrun.kv_cache.prefix_cache import PrefixCache  # noqa: E402
from mlxrun.loader import Loaded, open_model  # noqa: E402
from mlxrun.lock import check_process, device_lock, is_forked, load_lock  # noqa: E402
from mlxrun.memory.device import give_back, room, wire  # noqa: E402
from mlxrun.memory.plan import preflight  # noqa: E402
from mlxrun.outputs import (  # noqa: E402
    BatchOptions,
    Chunk,
    Completion,
    Request,
    RequestOptions,
    completed,
)
from mlxrun.products import products_named  # noqa: E402
from mlxrun.sampling_params import (  # noqa: E402
    SamplingDefaults,
    SamplingParams,
    read_sampling_defaults,
)
from mlxrun.tokenizer.tokenizer import Tokenizer  # noqa: E402

if TYPE_CHECKING:
    from mlxrun.engine.batch import OnToken
    from mlxrun.engine.kv_budget import KVBudget
    from mlxrun.eval.perplexity import Perplexity, PerplexityOptions
    from mlxrun.memory.plan import Room
    from mlxrun.runtime_info import RuntimeInfo

# Bytes of weights from which a slow BLAS is worth a warning.
LARGE = 200_000_000
# The budget of the prefix cache: a share of the memory for models, and at most so many bytes.
PREFIX_SHARE, PREFIX_BYTES = 1 / 16, 2 << 30


def load(
    source: str | Path, *, progress: Progress | None = None, **options: Unpack[LoadOptions]
) -> LLM:
    """Load a model.

    Args:
        source: a ``.gguf`` file (or a shard of a split one), a converted directory, any mlx-lm or
            Hugging Face directory of a supported family, or ``org/repo[:QUANT]`` on the hub.
        progress: called with (bytes done, bytes in all), first while a model of the hub is
            downloaded, then from zero again while a GGUF is repacked. By default a notebook shows
            a bar.
        dtype: of activations: ``float32``, ``float16`` or ``bfloat16``. By default float32 on the
            CPU and half precision, as the weights have it, on a GPU.
        policy: how a GGUF's tensors become MLX's: ``exact``, ``near`` or ``compact``. By default
            matrices stay the blocks of the mapped file on the CPU, in float32 and for families that
            this package defines itself. Otherwise they become plain float32 (exact) up to half of
            the free memory (the environment variable ``MLXRUN_PLAIN_SHARE`` names another share, 0
            for none); on a GPU near.
        products: bits of activations in products with such blocks: ``fast`` (8), ``near`` (16) or
            ``exact`` (24, as float32 has). By default the environment variable
            ``MLXRUN_PRODUCTS``, else near.
        adapter: LoRA adapters to apply in addition to the weights, which stay unchanged: a
            directory of mlx-lm's or of Hugging Face PEFT's, or a GGUF of llama.cpp's; or a list of
            such, each alone or as ``(path, strength)``, which add up.
        wired: keep memory from being swapped out: that many bytes, or True for as many as the
            device recommends. Metal only.

    Raises:
        MemoryLimitError: the weights alone exceed this machine's memory. The environment variable
            ``MLXRUN_MEMORY_LIMIT`` (bytes such as ``24GB``, or ``none``) sets another limit.
        ProcessError: this process was forked from one that had already loaded a model.
        MlxrunError: the source cannot be loaded; its subclasses say why.
    """
    config = LoadConfig.of(options, "progress")
    check_process()
    check_callback("progress", progress, "bytes done and bytes in all")
    shown = progress is None and in_notebook()
    with progress_bar("Loading", "B", shown=shown) as bar:
        progress = bar if shown else progress
        path = resolve(source, progress=progress)
        if config.wired is not False:
            wire(None if config.wired is True else config.wired)
        with load_lock:
            llm = _loaded(path, str(source), config, progress)
    return _advised(llm)


def _loaded(path: Path, source: str, config: LoadConfig, progress: Progress | None) -> LLM:
    """The model of a local file or directory."""

    def report(done: int, total: int, _: str) -> None:
        if progress:
            progress(done, total)

    products, adapter = products_named(config.products), config.adapter
    opened = open_model(path)
    storage = opened.storage(dtype=config.dtype, policy=config.policy)
    preflight(opened, storage)
    loaded = opened.load(storage, products=products, adapter=adapter, progress=report)
    file = opened.file
    tokenizer = (
        Tokenizer.from_directory(file) if isinstance(file, Path) else Tokenizer.from_gguf(file)
    )
    fingerprint = ModelFingerprint(opened.paths, adapter, loaded.model, loaded.products)
    return LLM(loaded, tokenizer, source, fingerprint, read_sampling_defaults(file))


def _advised(llm: LLM) -> LLM:
    """Warn of sampling defaults that cannot be used, and once of a slow BLAS for a large model."""
    for problem in llm.defaults.problems:
        warnings.warn(problem, stacklevel=3)
    slow = llm.model.nbytes > LARGE and not llm.storage.native
    if slow and (advice := blas.advice()):
        warnings.warn(advice, RuntimeWarning, stacklevel=3)
    return llm


class _GivesBack:
    """Returns memory to the system when it is garbage-collected."""

    # Bound here: at the end of the interpreter a module's names are gone before its objects.
    def __del__(self, at_end: Callable[[], bool] = sys.is_finalizing) -> None:
        if not at_end() and not is_forked():  # MLX would wait for threads that a fork lacks
            give_back()


class LLM:
    """A loaded model with its tokenizer. Weights never change; conversations live in sessions.

    Attributes:
        model: the transformer.
        tokenizer: text to token ids and back.
        config: ``config.json`` in Hugging Face terms.
        report: the conversion of each tensor of a GGUF; None for a directory.
        source: the path or hub name that it was loaded from.
        storage: how the weights are stored, and why (``storage.reason``).
        products: the option ``products`` in use, if the weights are a GGUF's own blocks; else None.
    """

    def __init__(
        self,
        loaded: Loaded,
        tokenizer: Tokenizer,
        source: str,
        identity: Callable[[], str] | None = None,
        defaults: SamplingDefaults = SamplingDefaults(),  # noqa: B008 - immutable
    ) -> None:
        self.model = loaded.model
        self.config = loaded.config
        self.report: ConversionReport | None = loaded.report
        self.unused = loaded.unused
        self.storage, self.products = loaded.storage, loaded.products
        self.tokenizer = tokenizer
        self.source = source
        self.inputs = InputProcessor(loaded.model, tokenizer, defaults)
        self._fingerprint = identity
        self._prefix_cache: PrefixCache | None = None
        self._direct: Engine | None = None
        self._making = threading.Lock()
        # The last attribute of a model is freed last, after the weights.
        vars(loaded.model)["afterwards"] = _GivesBack()

    @property
    def defaults(self) -> SamplingDefaults:
        """The sampling parameters of requests without any: the model's own, else mlxrun's.

        A model's own are in its ``generation_config.json`` or its GGUF's ``general.sampling.*``.
        May be set, e.g. to ``SamplingParams(temperature=0)``.

        Raises:
            ParameterError: set to anything but SamplingDefaults or SamplingParams.
        """
        return self.inputs.defaults

    @defaults.setter
    def defaults(self, defaults: SamplingDefaults | SamplingParams) -> None:
        if isinstance(defaults, SamplingParams):
            defaults = SamplingDefaults(defaults)
        if not isinstance(defaults, SamplingDefaults):
            raise ParameterError("defaults", defaults, "SamplingDefaults or SamplingParams")
        self.inputs.defaults = defaults

    @property
    def prefix_cache(self) -> PrefixCache:
        """Prefixes of earlier prompts, for later ones that share them.

        Sessions, :meth:`batch` and engines use it. Its ``budget`` in bytes may be set, 0 turns it
        off; ``figures`` has its statistics.
        """
        with self._making:
            if self._prefix_cache is None:
                self._prefix_cache = PrefixCache(min(PREFIX_BYTES, int(room() * PREFIX_SHARE)))
            return self._prefix_cache

    @property
    def direct_engine(self) -> Engine:
        """The engine of ``generate``, ``stream``, ``chat`` and ``logits``, stepped by callers."""
        # Made without the lock, as its prefix cache takes it; another thread's may be there first.
        engine = self._direct or self.make_engine(EngineConfig(parallel=PARALLEL), "direct")
        with self._making:
            self._direct = self._direct or engine
            return self._direct

    @property
    def choices(self) -> RuntimeInfo:
        """How this model runs on this machine, with the options that change it; to be printed."""
        from mlxrun.runtime_info import runtime_info

        step = self.direct_engine.runner.decode_step
        return runtime_info(self.model, self.storage, self.products, self.defaults, step)

    @property
    def context_length(self) -> int:
        """Tokens the model was trained to see at once."""
        return self.model.context_length

    def logits(self, ids: Sequence[int]) -> mx.array:
        """The logits after each token.

        Args:
            ids: T token ids, at least one.

        Returns:
            Logits, float32, shape (T, V).

        Raises:
            ParameterError: no ids, or ids that the model does not have.
        """
        engine, request = self.direct_engine, Request(token_ids(ids))
        self.inputs.check(request)
        sequence = engine.prepare(request, score_from=0)
        rows = []
        for _, states in engine.scores(sequence):
            with device_lock:
                rows.append(self.model.head(states)[0].astype(mx.float32))
                mx.eval(rows[-1])
        with device_lock:
            logits = mx.concatenate(rows) if len(rows) > 1 else rows[0]
            mx.eval(logits)
            self.model.check()
        return logits

    def perplexity(
        self,
        text: str,
        *,
        progress: Progress | None = None,
        **options: Unpack[PerplexityOptions],
    ) -> Perplexity:
        """How well the model predicts a text: see :func:`mlxrun.eval.perplexity.perplexity`."""
        from mlxrun.eval.perplexity import perplexity

        return perplexity(self, text, progress=progress, **options)

    def session(self, **options: Unpack[CacheOptions]) -> Session:
        """The KV cache of one conversation, to pass to ``stream``, ``generate`` or ``chat``.

        The prefix that a prompt shares with the one before is not computed again.
        ``session.save(path)`` writes the cache to a file.

        Args:
            window: cache only the last ``window`` tokens (rotating cache), for conversations
                without end in bounded memory.
            keep: first tokens to keep under a window, e.g. the system message.
            cache_type_k, cache_type_v: how keys and values are stored: ``f32``, ``f16``, ``bf16``,
                ``q8``, ``q6``, ``q5``, ``q4``, ``q3``, ``q2`` (or with a group, ``q4/32``) or
                ``mxfp8``; keys also ``q4c``, by channel; None for the dtype of activations. See
                ``examples/kv_formats.py`` for the cost of each.
            attention: which tokens a new token attends to: ``dense``, all (the default);
                ``window:1024+4``, which is ``window=1024, keep=4``; or, of tokens that are all
                cached, ``strided:512/8``, the last 512 and every 8th before them, or
                ``blocks:32x64``, the 32 blocks of 64 that look best. Prompts are prefilled densely.

        Raises:
            ParameterError: a value outside its range, a pattern in addition to a window, or a cache
                type that does not fit the model's heads.
            CacheError: the model cannot evict or leave out tokens, or stores keys and values in
                its own way.
        """
        return Session(self.model, CacheConfig.of(options), self._fingerprint)

    def load_session(self, path: str | Path, **options: Unpack[CacheOptions]) -> Session:
        """The session of a file that ``session.save`` wrote.

        A file that is missing, damaged, or of another model, tokenizer or template cannot be used:
        then the session is empty, and a warning says why.

        Args:
            options: those of :meth:`session`, equal to those it was saved with; by default the
                file's.
        """
        config = CacheConfig.of(options) if options else None
        return self.restore_session(Path(path), _warn, config)

    def restore_session(
        self, path: Path, report: Callable[[str], None], config: CacheConfig | None = None
    ) -> Session:
        """As :meth:`load_session`; ``report`` gets the reason if a file cannot be used."""
        return load_session(self.model, path, self._fingerprint, report, config)

    def generate(
        self,
        prompt: Prompt,
        *,
        session: Session | None = None,
        progress: Progress | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """The completion of a prompt; takes the options of :meth:`stream`."""
        return completed(list(self._stream(prompt, session, progress, options, streams=False)))

    def batch(
        self,
        prompts: Sequence[Prompt],
        *,
        on_token: OnToken | None = None,
        progress: bool | None = None,
        **options: Unpack[BatchOptions],
    ) -> list[Completion]:
        """Continue many prompts together: see :func:`mlxrun.engine.batch.batch`.

        Returns:
            One completion for each prompt, in order, with the same tokens as alone.
        """
        from mlxrun.engine.batch import batch

        def make_engine(config: EngineConfig, cache: CacheConfig, most: int) -> Engine:
            return self.make_engine(config, "batch", cache=cache, most=most)

        return batch(
            self.inputs, make_engine, prompts, on_token=on_token, progress=progress, **options
        )

    def engine(self, **options: Unpack[EngineOptions]) -> Engine:
        """An engine that serves requests from many threads: see :class:`mlxrun.Engine`."""
        return self.make_engine(EngineConfig.of(options), "online").start()

    def make_engine(
        self,
        config: EngineConfig,
        mode: Mode,
        *,
        cache: CacheConfig | None = None,
        most: int = PARALLEL,
    ) -> Engine:
        """An engine without a thread.

        Args:
            cache: the KV cache that memory is planned for; None for the config's.
            most: sequences at once, unless ``config`` sets their number.
        """
        prefix_cache = self._own_prefix_cache(config)

        def plan_memory() -> KVBudget:
            return self._budget(config, prefix_cache, mode, cache or config.cache, most)

        return Engine(
            self.inputs,
            prefix_cache,
            config,
            mode=mode,
            plan_memory=plan_memory,
            source=self.source,
        )

    def room(self, **options: Unpack[EngineOptions]) -> Room:
        """How many sequences of how many tokens an engine with such options would be sized for.

        Raises:
            MemoryLimitError: there is no memory for that many.
        """
        config = EngineConfig.of(options)
        prefix_cache = self._own_prefix_cache(config)
        return self._budget(config, prefix_cache, "online", config.cache, PARALLEL).room

    def _own_prefix_cache(self, config: EngineConfig) -> PrefixCache:
        nbytes = config.prefix_bytes
        return self.prefix_cache if nbytes is None else PrefixCache(nbytes)

    def _budget(
        self,
        config: EngineConfig,
        prefix_cache: PrefixCache,
        mode: Mode,
        cache: CacheConfig,
        most: int,
    ) -> KVBudget:
        from mlxrun.engine.kv_budget import KVBudget

        return KVBudget(
            self.model,
            self.config,
            self.storage,
            cache,
            prefix_cache,
            parallel=config.parallel,
            context=config.context,
            most=most,
            chunk=prefill_budget(mode),
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        session: Session | None = None,
        progress: Progress | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """The model's answer in a conversation; takes the options of :meth:`stream`.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": ...}`` in order;
                content is a text, or a list of ``{"type": "text", "text": ...}``.
        """
        if not isinstance(messages, Iterable) or isinstance(messages, str | Mapping):
            raise ParameterError("messages", messages, "a sequence of mappings")
        prompt = conversation(list(messages))
        return self.generate(prompt, session=session, progress=progress, **options)

    def stream(
        self,
        prompt: Prompt,
        *,
        session: Session | None = None,
        progress: Progress | None = None,
        **options: Unpack[RequestOptions],
    ) -> Iterator[Chunk]:
        """Continue a prompt, yielding text as soon as it can no longer change.

        ::

            for chunk in llm.stream("Once upon a time"):
                print(chunk, end="", flush=True)  # or chunk.text, to join

        Args:
            prompt: text, token ids, or messages to put through the chat template.
            session: the KV cache of a conversation; see :meth:`session`.
            progress: called with (tokens done, tokens in all) before prefill and, if the prompt is
                long, meanwhile. It must not wait for another thread that uses a model.
            max_tokens: the most tokens to generate; None: until the context is full.
            stop: strings that end the completion and are not part of it.
            ignore_eos: continue past the model's end-of-turn tokens.
            parse_special: let ``<|markers|>`` in a text prompt become control tokens.
            template: variables for the chat template, e.g. ``{"enable_thinking": False}``.
            cache_type_k, cache_type_v, attention: as in :meth:`session`, if no session is given.
            params: how tokens are sampled; or single fields of :class:`SamplingParams`, such as
                ``temperature=0, seed=1``, and the others are those of :attr:`defaults`.

        Raises:
            ParameterError: a value outside its range (at once, not at the first chunk).
            ContextLengthError: the prompt leaves no room in the model's context.
        """
        return self._stream(prompt, session, progress, options)

    def _stream(
        self,
        prompt: Prompt,
        session: Session | None,
        progress: Progress | None,
        options: RequestOptions,
        *,
        streams: bool = True,
    ) -> Iterator[Chunk]:
        started = time.perf_counter()
        request = self.inputs.request(prompt, **options)
        check_callback("progress", progress, "tokens done and tokens in all")
        self.inputs.check_session(request, session)
        engine = self.direct_engine
        sequence = engine.prepare(
            request,
            session=session,
            streams=streams,
            awaits_progress=progress is not None,
            # Without a session, a prefix is reused in whole chunks: the operations, and so the
            # rounding, are those of a run without a cache.
            reuse_step=1 if session else PREFILL_CHUNK,
            started=started,
        )
        return engine.stream(sequence, progress)

    def __reduce__(self) -> NoReturn:
        raise ProcessError(
            "a model cannot be pickled, so neither copied nor sent to another process",
            hint=f"Send its source, and load it there: mlxrun.load({self.source!r})",
        )

    def __repr__(self) -> str:
        summary = self.model.summary
        return (
            f"LLM({self.source!r}, {summary.name}, {summary.layers} layers, "
            f"{self.model.nbytes / 1e6:.1f} MB, {str(self.model.dtype).removeprefix('mlx.core.')})"
        )

    def _repr_html_(self) -> str:
        summary = self.model.summary
        rows = {
            "source": self.source,
            "family": summary.name,
            "layers": f"{summary.layers} x {summary.hidden_size} wide",
            "heads": f"{summary.heads} query, {summary.kv_heads} key/value",
            "vocabulary": f"{self.model.vocab_size} tokens",
            "context": f"{self.context_length} tokens",
            "weights": f"{self.model.nbytes / 1e6:.1f} MB",
            "activations": str(self.model.dtype).removeprefix("mlx.core."),
        }
        if self.report:
            rows["conversion"] = str(self.report)
        return table(rows)


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=4)
