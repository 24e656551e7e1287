"""A GGUF file into a transformer: its own blocks where they can be multiplied, else converted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from converters.convert import Converted, check_policy, half_dtype, skipped, stream
from converters.encode import plain_floats, supported
from converters.gguf.config import model_config
from converters.gguf.names import Mapped, NameMap, map_names
from converters.gguf.reader import GGMLType, GGUFFile, GGUFTensor
from converters.layout import Layout
from converters.policy import FIXED, Policy, source_bits
from converters.report import ConversionReport, TensorRecord
from mlxrun.kernels.dispatch import Kernels, Matrix, Missing, cpu_kernels, gpu_kernels
from mlxrun.loading.adapters import AdapterChoice, read_adapters
from mlxrun.loading.model import Loaded, build
from mlxrun.loading.run import DTYPES, form, resolve_dtype
from mlxrun.models.families import FAMILIES
from mlxrun.products import PLANES, products_named
from mlxrun.weights.blocks import Blocks
from mlxrun.weights.parameters import Parameters

if TYPE_CHECKING:
    from mlxrun.kernels.gpu import Kernels as GPUKernels

Progress = Callable[[int, int, str], None]

# The form of a file that is not converted, in words.
BLOCKS = "GGUF blocks as they lie"


@dataclass(frozen=True)
class Forms:
    """In which form the tensors of a file are held on this machine.

    Attributes:
        blocks: matrices that stay the file's own blocks.
        others: all others, which a policy converts.
        policy: that policy.
        why: in words.
        kernels: multiply the blocks; None where there are none.
        step: the CPU's kernels, for plain float32 and the operations of a step; else None.
        missed: what keeps a model that could be held as blocks from being so; None for nothing.
    """

    blocks: tuple[Mapped, ...]
    others: NameMap
    policy: Policy
    why: str
    kernels: Kernels | GPUKernels | None = None
    step: Kernels | None = None
    missed: str | None = None


def forms(gguf: GGUFFile, names: NameMap, *, dtype: str, policy: str | None, ours: bool) -> Forms:
    """How a file's tensors are held here.

    On the CPU a model of ours stays as it is in the file, unless a policy or half precision is
    asked for, or its blocks cannot be multiplied here. On a GPU the types of blocks do that it
    multiplies faster than MLX's own forms.

    Args:
        dtype: of activations.
        policy: as :func:`mlxrun.load` takes it.
        ours: whether this package defines the model.
    """
    candidates = [m for m in names.mapped if ours and policy is None and not why_not_blocks(m)]
    types = {mapped.source.type for mapped in candidates}
    found = cpu_kernels(types, dtype) if candidates else None
    if isinstance(found, Kernels):
        return _with_blocks(names, candidates, Policy("exact", dtype, packed=False), found)
    chosen, why = _chosen(gguf, policy, dtype)
    chosen = replace(chosen, factors=ours)
    faster = gpu_kernels(types) if candidates else None
    if faster is not None and not isinstance(faster, Missing):
        kept = [mapped for mapped in candidates if mapped.source.type in faster.types]
        return _with_blocks(names, kept, chosen, faster)
    plain = cpu_kernels((), dtype) if ours else None
    return Forms(
        (),
        names,
        chosen,
        why,
        step=plain if isinstance(plain, Kernels) else None,
        missed=found.reason if isinstance(found, Missing) else None,
    )


def _with_blocks(
    names: NameMap, kept: Sequence[Mapped], policy: Policy, kernels: Kernels | GPUKernels
) -> Forms:
    """Some matrices as blocks, all other tensors under a policy."""
    size, targets = sum(mapped.source.nbytes for mapped in kept), {m.target for m in kept}
    others = tuple(mapped for mapped in names.mapped if mapped.target not in targets)
    return Forms(
        tuple(kept),
        replace(names, mapped=others),
        policy,
        f"{BLOCKS}: {len(kept)} matrices, {size / 1e6:.1f} MB",
        kernels,
        kernels if isinstance(kernels, Kernels) else None,
    )


def block_bytes(mapped: Mapped) -> int:
    """Bytes of a matrix that stays blocks, with the order of its rows and its factors."""
    order = 4 * mapped.source.shape[0] if mapped.order is not None and lies(mapped) else 0
    return mapped.source.nbytes + order + (mapped.factor.nbytes if mapped.factor else 0)


def lies(mapped: Mapped) -> bool:
    """Whether the blocks can be used where they are in the file, in their order or in another."""
    rows_only = mapped.order is None or len(mapped.source.shape) == 2
    return type(mapped.source) is GGUFTensor and rows_only


def why_not_blocks(mapped: Mapped) -> str | None:
    """Why a tensor cannot stay as it is in the file; None where it can."""
    tensor = mapped.source
    if len(tensor.shape) not in (2, 3):
        return "no matrix"
    if mapped.change is not None:
        return "its values are others in the model"
    if mapped.columns is not None:
        return "its columns are in another order in the model"
    if mapped.shape != tensor.shape:
        return "its shape is another in the model"
    if not supported(tensor.type) or tensor.type is GGMLType.F64:
        return "nothing multiplies its type"
    return None


def load_gguf(
    gguf: GGUFFile,
    *,
    dtype: str | None = None,
    policy: str | None = None,
    products: str | None = None,
    adapter: AdapterChoice = (),
    progress: Progress | None = None,
) -> Loaded:
    """A GGUF as a model: its matrices as they are in the file, or converted straight into memory.

    Args:
        dtype: of activations and scales; by default float32 on the CPU and with policy ``exact``
            (half precision rounds what the policy keeps), half precision elsewhere. With near,
            scales are held in half precision all the same where that loses nothing.
        policy: ``exact``, ``near`` or ``compact``. By default matrices stay blocks on the CPU (see
            :func:`forms`); where they cannot, they are plain float32 (exact) as far as memory
            allows (see :func:`form`), and near elsewhere.
        products: bits of activations where they are multiplied with blocks; see
            :mod:`mlxrun.products`.

    Raises:
        UnsupportedArchitectureError, GGUFError, InexactError: as the converter raises them.
        AdapterError: an adapter is damaged or was made for another model.
    """
    products = products_named(products)
    names, config = map_names(gguf), model_config(gguf)
    adapters = read_adapters(adapter, config)
    run, ours = run_dtype(gguf, dtype, policy), config["model_type"] in FAMILIES
    chosen = forms(gguf, names, dtype=run, policy=policy, ours=ours)
    report = ConversionReport({"name": gguf.path.name}, chosen.policy.name, skipped=skipped(names))
    blocks: dict[str, Blocks] = {}
    for mapped in chosen.blocks:
        assert chosen.kernels is not None
        blocks[mapped.target] = _blocks(mapped, chosen.kernels, PLANES[products])
        report.tensors.append(_record(mapped, blocks[mapped.target]))
    arrays: dict[str, mx.array] = {}
    layouts: dict[str, Layout] = {}
    for converted in stream(chosen.others, chosen.policy, progress=progress):
        arrays |= _to_mlx(converted)
        if converted.layout.quantized:
            layouts[converted.target.removesuffix(".weight")] = converted.layout
        if converted.record:
            report.tensors.append(converted.record)
    if chosen.blocks:
        report.tensors = _with_reasons(report.tensors, names, chosen)
    params = Parameters(
        arrays,
        layouts,
        DTYPES[run],
        blocks=blocks,
        kernels=chosen.step,
        planes=PLANES[products],
    )
    loaded = build(config, adapters.applied(params), report, adapters, chosen.why)
    return replace(
        loaded,
        products=products if chosen.blocks and chosen.step else None,
        native=bool(chosen.blocks and chosen.step),
        missed=chosen.missed,
    )


def _blocks(mapped: Mapped, kernels: Kernels | GPUKernels, planes: int) -> Blocks:
    tensor, factor, order = mapped.source, mapped.factor, None
    if lies(mapped):
        blocks = kernels.map(tensor)
        if mapped.order is not None:
            order = mx.array(mapped.order.astype(np.int32))
    else:  # its rows are not together in the file
        stored = tensor.raw().reshape(*tensor.shape[:-1], -1)
        blocks = mx.array(stored if mapped.order is None else stored[mapped.order])
    return Blocks(
        tensor.name,
        Matrix(blocks, tensor.type, tensor.shape[-1], order),
        kernels,
        planes,
        None if factor is None else mx.array(plain_floats(factor).reshape(-1)),
        lies(mapped) and isinstance(kernels, Kernels),  # a GPU's are copies
    )


def _record(mapped: Mapped, blocks: Blocks) -> TensorRecord:
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


def _with_reasons(
    records: Sequence[TensorRecord], names: NameMap, chosen: Forms
) -> list[TensorRecord]:
    """The records in the order of the file, and of each matrix that is no blocks why not."""
    matrices = [mapped for mapped in chosen.others.mapped if len(mapped.source.shape) > 1]
    reasons = {mapped.target: why_not_blocks(mapped) for mapped in matrices}
    by_target = {record.target: record for record in records}
    found = [by_target[mapped.target] for mapped in names.mapped]
    return [
        replace(record, note=f"{record.form}: {reasons[record.target]}")
        if record.target in reasons
        else record
        for record in found
    ]


def run_dtype(gguf: GGUFFile, dtype: str | None, policy: str | None) -> str:
    """The dtype of activations that a file is run with here; see :func:`load_gguf`."""
    return resolve_dtype(dtype or ("float32" if policy == "exact" else None), half_dtype(gguf))


def _chosen(gguf: GGUFFile, name: str | None, dtype: str) -> tuple[Policy, str]:
    """The policy that converts a file here, and in words in which form it holds weights and why."""
    if name is not None:
        return _bound(gguf, check_policy(name), dtype), f"policy {name}"
    kept = any(t.type in FIXED and len(t.shape) == 3 for t in gguf.tensors)
    held = form(sum(t.elements for t in gguf.tensors), dtype, kept=kept)
    if held.plain:
        return Policy("exact", dtype, packed=False), str(held)
    return _bound(gguf, "near", dtype), str(held)


def _bound(gguf: GGUFFile, name: str, dtype: str) -> Policy:
    """A policy for a run with activations of a dtype."""
    if name == "compact":  # counts bits: float32 scales would leave none for the codes
        return Policy(name, half_dtype(gguf))
    return Policy(name, dtype, narrow=name == "near" and dtype == "float32")


def _to_mlx(converted: Converted) -> dict[str, mx.array]:
    arrays = {}
    for name, array, dtype in converted.named_arrays():
        made = mx.array(np.asarray(array, order="C"))
        arrays[name] = made.view(mx.bfloat16) if dtype == "bfloat16" else made
    return arrays
