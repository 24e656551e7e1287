"""A GGUF file or a model directory to a model in memory.

::

    checkpoint = open_model(path)              # header, names, config: worked out once
    storage = checkpoint.storage(dtype=dtype)  # how this machine stores each matrix, and its bytes
    model = checkpoint.load(storage).model     # weights are read (or mapped) and the model is built
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from converters.architectures.mapping import Mapped, NameMap
from converters.convert import stream
from converters.gguf.reader import GGMLType, GGUFFile, GGUFTensor
from converters.gguf.source import gguf_tensors, half_dtype, open_gguf, skipped
from converters.huggingface.names import normalize, text_config
from converters.huggingface.reader import WeightFiles, read_config, stored_form, weight_files
from converters.huggingface.weights import read_weights, reading
from converters.quantize.encode import expected_layout, plain_floats, supported
from converters.quantize.layout import Layout, dense
from converters.quantize.policy import FIXED, Policy, check_policy, source_bits
from converters.report import ConversionReport, TensorRecord
from mlxrun.config import AdapterChoice
from mlxrun.errors import ParameterError
from mlxrun.kernels.device import device
from mlxrun.kernels.dispatch import Kernels, Matrix, Missing, cpu_kernels, gpu_kernels
from mlxrun.memory.device import SHARE, plain_room, plain_share
from mlxrun.model import Model, WeightStorage
from mlxrun.models.config import ModelConfig
from mlxrun.models.families import FAMILIES, model_config
from mlxrun.models.transformer import Transformer
from mlxrun.products import PLANES, products_named
from mlxrun.weights.adapters import Adapters, read_adapters
from mlxrun.weights.blocks import BlockWeight
from mlxrun.weights.parameters import Parameters

if TYPE_CHECKING:
    from mlxrun.kernels.gpu import Kernels as GPUKernels
    from mlxrun.models.mlx_lm import MLXLMClasses

Progress = Callable[[int, int, str], None]

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
BLOCKS = "GGUF blocks as stored"
_FLOATS = ("F8_E4M3", "F16", "BF16", "F32")


@dataclass(frozen=True)
class Loaded:
    """A model in memory, with facts about its source.

    Attributes:
        model: ready to run.
        config: ``config.json`` in Hugging Face terms.
        storage: of its weights.
        report: of the conversion of a GGUF; None for a directory.
        unused: parameters of the source that the model does not have.
        products: the option ``products`` in use, where matrices are GGUF blocks; else None.
    """

    model: Model[Any]
    config: dict[str, Any]
    storage: WeightStorage
    report: ConversionReport | None
    unused: list[str]
    products: str | None = None


def load_model(
    source: Path | GGUFFile,
    *,
    dtype: str | None = None,
    policy: str | None = None,
    products: str | None = None,
    adapter: AdapterChoice = (),
    progress: Progress | None = None,
) -> Loaded:
    """Open and load a model, without a check of memory; see :func:`mlxrun.load` for the options."""
    opened = open_model(source)
    storage = opened.storage(dtype=dtype, policy=policy)
    return opened.load(storage, products=products, adapter=adapter, progress=progress)


def open_model(source: Path | GGUFFile) -> Checkpoint:
    """A GGUF or a model directory, its header read and its model defined; no weight is read.

    Raises:
        GGUFError, CheckpointError: the header or ``config.json`` is damaged or contradictory.
        UnsupportedArchitectureError: neither mlxrun nor mlx-lm defines the model.
    """
    if isinstance(source, Path) and source.is_dir():
        config = text_config(read_config(source))
        return DirectoryCheckpoint(source, config, definition(config))
    gguf = open_gguf(source)
    return GGUFCheckpoint(gguf.file, gguf.config, definition(gguf.config), gguf.names)


def definition(config: Mapping[str, Any]) -> ModelConfig | MLXLMClasses:
    """The model of a ``config.json``: a config of our transformer, or mlx-lm's classes."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return model_config(dict(config))
    from mlxrun.models.mlx_lm import classes, unsupported

    found = classes(config)
    if found is None:
        raise unsupported(kind, FAMILIES)
    return found


@dataclass(frozen=True)
class Checkpoint(ABC):
    """A model whose header has been read.

    Attributes:
        file: the GGUF, or the model directory.
        config: ``config.json`` in Hugging Face terms, of the text model.
        definition: of the model.
    """

    file: Path | GGUFFile
    config: dict[str, Any]
    definition: ModelConfig | MLXLMClasses

    @property
    def native(self) -> ModelConfig | None:
        """The definition, if it is one of our transformer."""
        return self.definition if isinstance(self.definition, ModelConfig) else None

    @property
    def paths(self) -> Sequence[Path]:
        return [self.file] if isinstance(self.file, Path) else self.file.paths

    @abstractmethod
    def storage(self, *, dtype: str | None = None, policy: str | None = None) -> WeightStorage:
        """How the weights are stored here; see :func:`mlxrun.load` for the options.

        Raises:
            CheckpointError: files of a directory are missing or damaged.
            ParameterError: an option has no such value.
        """

    def load(
        self,
        storage: WeightStorage,
        *,
        products: str | None = None,
        adapter: AdapterChoice = (),
        progress: Progress | None = None,
    ) -> Loaded:
        """Read, map or convert the weights and build the model.

        Args:
            storage: as :meth:`storage` gives it.
            products: bits of activations in products with GGUF blocks.
            adapter: LoRA adapters to apply.
            progress: called with (bytes read, bytes in all, tensor name) while a GGUF is converted.

        Raises:
            GGUFError, InexactError, CheckpointError: the weights are damaged, contradict the
                config, or cannot be stored so.
            AdapterError: an adapter is damaged or was made for another model.
        """
        products = products_named(products)
        adapters = read_adapters(adapter, self.config, self.native)
        with reading(self.file) if isinstance(self.file, Path) else nullcontext():
            params, report = self._weights(storage, PLANES[products], progress)
            used = products if params.blocks and storage.native else None
            model, unused = self._built(adapters.applied(params), adapters)
        return Loaded(model, self.config, storage, report, unused, used)

    @abstractmethod
    def _weights(
        self, storage: WeightStorage, planes: int, progress: Progress | None
    ) -> tuple[Parameters, ConversionReport | None]:
        """The weights, those of a directory not read yet; and the report of a GGUF's conversion."""

    def _built(self, params: Parameters, adapters: Adapters) -> tuple[Model[Any], list[str]]:
        """Build the model and evaluate its parameters; returns it and its unused names."""
        if isinstance(self.definition, ModelConfig):
            model = Transformer(self.definition, params)
            adapters.check_applied(params.used)
            params.settle()
            return model, params.unused()
        from mlxrun.models.mlx_lm import build

        made = build(self.definition, self.config, params)
        adapters.check_applied({*params.arrays} - {*made.unused}, modules=False)
        return made, made.unused


@dataclass(frozen=True)
class GGUFCheckpoint(Checkpoint):
    """A GGUF; ``names``: the parameter of each of its tensors."""

    file: GGUFFile
    names: NameMap

    def storage(self, *, dtype: str | None = None, policy: str | None = None) -> GGUFStorage:
        # On the CPU a native model keeps the GGUF's blocks, unless a policy or half precision is
        # asked for or its blocks cannot be multiplied here. A GPU keeps those types of blocks that
        # it multiplies faster than MLX's quantized layouts.
        run = run_dtype(dtype or ("float32" if policy == "exact" else None), half_dtype(self.file))
        ours = self.native is not None
        blocks = [m for m in self.names.mapped if ours and policy is None and not why_not_blocks(m)]
        types = {mapped.source.type for mapped in blocks}
        found = cpu_kernels(types, run) if blocks else None
        kernels: Kernels | GPUKernels | None = None
        step: Kernels | None = None
        if isinstance(found, Kernels):
            kernels = step = found
            chosen, reason = Policy("exact", run, packed=False), ""
        else:
            chosen, reason = _policy(self.file, policy, run)
            chosen = replace(chosen, factors=ours)
            faster = gpu_kernels(types) if blocks else None
            if faster is None or isinstance(faster, Missing):
                blocks, plain = [], cpu_kernels((), run) if ours else None
                step = plain if isinstance(plain, Kernels) else None
            else:
                kernels, blocks = faster, [m for m in blocks if m.source.type in faster.types]
        if blocks:
            size = sum(mapped.source.nbytes for mapped in blocks)
            reason = f"{BLOCKS}: {len(blocks)} matrices, {size / 1e6:.1f} MB"
        targets = {mapped.target for mapped in blocks}
        others = [mapped for mapped in self.names.mapped if mapped.target not in targets]

        modules: dict[str, float] = defaultdict(float)
        shared, packed = 0, False
        for mapped in blocks:
            nbytes, place = mapped.source.nbytes, in_place(mapped)
            nbytes += mapped.factor.nbytes if mapped.factor else 0
            if mapped.order is not None and place:  # an index of its rows
                nbytes += 4 * mapped.source.shape[0]
            modules[_module(mapped.target)] += nbytes
            shared += nbytes if step and place else 0
        for mapped in others:
            tensor = mapped.source
            expected = expected_layout(tensor.type, chosen, module=len(tensor.shape) > 1)
            if expected:
                quantized = expected.layout.quantized
                layout = expected.layout if quantized else dense(run)  # plain: as activations
                packed = packed or quantized
                modules[_module(mapped.target)] += tensor.elements * layout.bits_per_weight / 8
        for target, length in self.names.zeros:
            modules[_module(target)] += length * dense(run).bits_per_weight / 8
        return GGUFStorage(
            nbytes=round(sum(modules.values())),
            dtype=run,
            packed=packed,
            how=f"{BLOCKS if blocks else chosen.name}, {run}",
            modules=modules,
            mapped=shared,
            fused=step is not None,
            reason=reason,
            native=bool(blocks and step),
            missed=found.reason if isinstance(found, Missing) else None,
            blocks=tuple(blocks),
            others=replace(self.names, mapped=tuple(others)),
            policy=chosen,
            block_kernels=kernels,
            step=step,
        )

    def _weights(
        self, storage: WeightStorage, planes: int, progress: Progress | None
    ) -> tuple[Parameters, ConversionReport]:
        assert isinstance(storage, GGUFStorage)
        records: dict[str, TensorRecord] = {}
        blocks: dict[str, BlockWeight] = {}
        for mapped in storage.blocks:
            assert storage.block_kernels is not None
            blocks[mapped.target] = _blocks(mapped, storage.block_kernels, planes)
            records[mapped.target] = _record(mapped, blocks[mapped.target])
        arrays: dict[str, mx.array] = {}
        layouts: dict[str, Layout] = {}
        for converted in stream(gguf_tensors(storage.others, storage.policy), progress=progress):
            for name, array, dtype in converted.named_arrays():
                made = mx.array(np.asarray(array, order="C"))
                arrays[name] = made.view(mx.bfloat16) if dtype == "bfloat16" else made
            if converted.layout.quantized:
                layouts[_module(converted.target)] = converted.layout
            if converted.record:
                records[converted.target] = converted.record
        for mapped in storage.others.mapped if blocks else ():
            if len(mapped.source.shape) > 1 and (reason := why_not_blocks(mapped)):
                record = records[mapped.target]
                records[mapped.target] = replace(record, note=f"{record.form}: {reason}")
        report = ConversionReport(
            {"name": self.file.path.name}, storage.policy.name, skipped=skipped(self.names)
        )
        in_file = [records.get(mapped.target) for mapped in self.names.mapped]
        report.tensors = [record for record in in_file if record]
        params = Parameters(
            arrays,
            layouts,
            DTYPES[storage.dtype],
            blocks=blocks,
            kernels=storage.step,
            planes=planes,
        )
        return params, report


@dataclass(frozen=True, kw_only=True)
class GGUFStorage(WeightStorage):
    """How a GGUF is stored.

    Attributes:
        blocks: matrices that stay the file's blocks.
        others: the other tensors, which ``policy`` converts.
        block_kernels: multiply the blocks; None without blocks.
        step: the CPU's kernels for plain float32 and the operations of a step, or None.
    """

    blocks: tuple[Mapped, ...] = field(repr=False)
    others: NameMap = field(repr=False)
    policy: Policy
    block_kernels: Kernels | GPUKernels | None = field(repr=False)
    step: Kernels | None = field(repr=False)


@dataclass(frozen=True)
class DirectoryCheckpoint(Checkpoint):
    """A directory of safetensors, stored here as in the files or as plain float32."""

    file: Path

    @cached_property
    def _files(self) -> WeightFiles:
        return weight_files(self.file)

    def storage(self, *, dtype: str | None = None, policy: str | None = None) -> WeightStorage:
        del policy  # for GGUF files
        entries = self._files.entries
        codes = {name for name in entries if _is_code(name, entries)}
        experts = [name for name in entries if name.endswith("_blocks")]  # MXFP4 as gpt-oss has it
        kinds = {entry.dtype for entry in entries.values() if entry.dtype in _FLOATS}
        run = run_dtype(dtype, "float16" if "F16" in kinds else "bfloat16")
        forms = {name: stored_form(self.config, _module(name)) for name in codes}
        elements = {n: prod(entries[n].shape) * 32 // form.bits for n, form in forms.items()}
        fixed_experts = bool(experts) or any(
            len(entries[n].shape) == 3 and form.mode != "affine" for n, form in forms.items()
        )
        expand, reason = False, f"plain {run}, as they are stored"
        if codes or experts:
            expand, reason = expands(sum(elements.values()), run, fixed_experts=fixed_experts)
        ours, size = self.native is not None, DTYPES[run].size
        modules: dict[str, float] = defaultdict(float)
        for name, entry in entries.items():
            scales = f"{_module(name)}.weight" in codes and not name.endswith(".bias")
            if name in codes:
                nbytes = elements[name] * size if expand else entry.nbytes
            elif scales and expand:
                continue
            elif scales and ours and run == "float32" and entry.dtype == "F16":
                nbytes = entry.nbytes  # stay narrow
            else:
                nbytes = prod(entry.shape) * size if entry.dtype in _FLOATS else entry.nbytes
            modules[_module(name)] += nbytes
        packed = bool(codes or experts) and not expand
        fused = ours and isinstance(cpu_kernels((), run), Kernels)
        return WeightStorage(
            nbytes=round(sum(modules.values())),
            dtype=run,
            packed=packed,
            how=f"{'as stored' if packed else 'plain'}, {run}",
            modules=modules,
            fused=fused,
            reason=reason,
            native=fused and not packed,
        )

    def _weights(
        self, storage: WeightStorage, planes: int, progress: Progress | None
    ) -> tuple[Parameters, None]:
        del planes, progress  # for GGUF files
        weights = read_weights(self._files, self.config)
        if self.native:
            normalize(self.config, weights)
        kernels = cpu_kernels((), storage.dtype) if storage.fused else None
        params = Parameters(
            weights.arrays,
            weights.layouts,
            DTYPES[storage.dtype],
            expand=not storage.packed,
            kernels=kernels if isinstance(kernels, Kernels) else None,
        )
        return params, None


def run_dtype(dtype: str | None, half: str) -> str:
    """The dtype of activations: float32 on the CPU, else half precision as the weights have it."""
    if dtype is None:
        return half if device().half_precision else "float32"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ParameterError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    return dtype


def expands(elements: int, dtype: str, *, fixed_experts: bool) -> tuple[bool, str]:
    """Whether quantized weights become plain float32, and why or why not.

    On the CPU that is exact and, where memory allows, several times faster: MLX's product with
    packed codes runs on one core there (docs/architecture.md has the figures).

    Args:
        elements: weights that would be expanded.
        dtype: of activations.
        fixed_experts: experts are in MXFP4 or its kin, which their makers chose for its size.
    """
    if device().fast_packed_matmul:
        return False, "packed: a GPU multiplies packed codes"
    if dtype != "float32":
        return False, f"packed: activations are {dtype}"
    if fixed_experts:
        return False, (
            "packed: experts in one of MLX's own 4-bit modes stay as small as their file"
        )
    needed, most = 4 * elements, plain_room()
    plain = needed < most
    return plain, (
        f"{'plain float32' if plain else 'packed'}: {needed / 1e9:.3g} GB of {most / 1e9:.3g} GB, "
        f"which is {100 * plain_share():.3g}% of the free memory (--policy, {SHARE})"
    )


def _policy(gguf: GGUFFile, name: str | None, dtype: str) -> tuple[Policy, str]:
    """The policy that converts a file here, and how it stores weights and why."""
    reason = f"policy {name}"
    if name is None:
        fixed = any(t.type in FIXED and len(t.shape) == 3 for t in gguf.tensors)
        expand, reason = expands(sum(t.elements for t in gguf.tensors), dtype, fixed_experts=fixed)
        if expand:
            return Policy("exact", dtype, packed=False), reason
        name = "near"
    if check_policy(name) == "compact":  # counts bits: float32 scales would leave none for codes
        return Policy(name, half_dtype(gguf)), reason
    return Policy(name, dtype, narrow=name == "near" and dtype == "float32"), reason


def why_not_blocks(mapped: Mapped) -> str | None:
    """Why a tensor cannot stay as it is in the file; None where it can."""
    tensor = mapped.source
    if len(tensor.shape) not in (2, 3):
        return "no matrix"
    if mapped.change is not None:
        return "its values differ in the model"
    if mapped.columns is not None:
        return "the order of its columns differs in the model"
    if mapped.shape != tensor.shape:
        return "its shape differs in the model"
    if not supported(tensor.type) or tensor.type is GGMLType.F64:
        return "no kernel multiplies its type"
    return None


def in_place(mapped: Mapped) -> bool:
    """Whether the blocks can be used in the mapped file, with or without an index of rows."""
    rows_only = mapped.order is None or len(mapped.source.shape) == 2
    return type(mapped.source) is GGUFTensor and rows_only


def _blocks(mapped: Mapped, kernels: Kernels | GPUKernels, planes: int) -> BlockWeight:
    tensor, factor, order = mapped.source, mapped.factor, None
    if in_place(mapped):
        blocks = kernels.map(tensor)
        if mapped.order is not None:
            order = mx.array(mapped.order.astype(np.int32))
    else:  # its rows are not together in the file
        stored = tensor.raw().reshape(*tensor.shape[:-1], -1)
        blocks = mx.array(stored if mapped.order is None else stored[mapped.order])
    return BlockWeight(
        tensor.name,
        Matrix(blocks, tensor.type, tensor.shape[-1], order),
        kernels,
        planes,
        None if factor is None else mx.array(plain_floats(factor).reshape(-1)),
        in_place(mapped) and isinstance(kernels, Kernels),  # a GPU's are copies
    )


def _record(mapped: Mapped, blocks: BlockWeight) -> TensorRecord:
    tensor = mapped.source
    bits = source_bits(tensor.type)
    return TensorRecord(
        name=tensor.name,
        target=mapped.target,
        type=tensor.type.name,
        form=f"{tensor.type.name} blocks",
        fidelity="exact",
        rmse=0.0,
        max_error=0.0,
        bits_before=bits,
        bits_after=bits,
        elements=tensor.elements,
        note="" if blocks.mapped else "copied: its rows are not together in the file",
    )


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_code(name: str, entries: Mapping[str, Any]) -> bool:
    """Whether a stored array is the packed codes of a quantized module."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and entries[name].dtype == "U32" and f"{module}.scales" in entries
