"""Fine-tuning a compressed model with any trainer, its masks kept.

    model = AutoModelForCausalLM.from_pretrained(OUT).dequantize(torch.float32)
    compressor.keep_masks(model)
    ...                                   # any optimiser of torch, or transformers' Trainer
    model.save_pretrained(DIR)            # then: compress DIR --set sparsity.criterion=given --one-shot

`dense_modules` puts plain linears and embeddings in the place of packed ones, and notes the mask of each sparse weight
from its stored positions, so that a place that is kept but was rounded to zero may grow again. `keep_masks` multiplies
gradients by the masks, and weights after every step, whatever the step was.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from compressor.calibration import is_conv1d, weight_of
from compressor.compressed_linear import CompressedLinear, PackedModule
from compressor.formats.positions import expand24
from compressor.masks import MaskShape
from compressor.models import block_linears

log = logging.getLogger(__name__)

_MASK = "weight_mask"


def dense_modules(model: Any, dtype: torch.dtype) -> None:
    """Replaces every packed module of a loaded model by the plain one it was, with gradients.

    Raises:
        ValueError: a layer has a low-rank branch, which no plain linear holds.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    branches = [name for name, module in packed.items() if module.scheme.low_rank is not None]
    if branches:
        raise ValueError(
            f"{branches[0]} has a low-rank branch (SLoRB), which a plain linear cannot hold: compress without "
            "retraining.ast.low_rank to fine-tune the result"
        )
    with torch.device("meta"):
        plain = type(model)(model.config)
    head = model.get_output_embeddings()
    for name, module in packed.items():
        if module is head and not module.tensors:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _filled(plain.get_submodule(name), module, dtype))
    for instance_only in ("_tied_weights_keys", "all_tied_weights_keys"):
        model.__dict__.pop(instance_only, None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()
    model.to(dtype).requires_grad_(True)


def _filled(plain: nn.Module, packed: PackedModule, dtype: torch.dtype) -> nn.Module:
    """The plain module with the packed one's values; a sparse one with its mask."""
    stored = {name: tensor for name, tensor in packed.tensors.items() if name.startswith("weight")}
    weight = packed.format.unpack(stored).to(dtype)
    turned = is_conv1d(plain)
    plain.weight = nn.Parameter(weight.t().contiguous() if turned else weight)
    if isinstance(packed, CompressedLinear) and packed.tensors.get("bias") is not None:
        plain.bias = nn.Parameter(packed.tensors["bias"].to(dtype))
    if (factor := getattr(plain, "scalar_embed_scale", None)) is not None:
        plain.embed_scale = torch.tensor(factor)
    if packed.format.sparse:
        half = packed.out_features, packed.in_features // 2
        mask = expand24(torch.ones(half, dtype=torch.int8), stored["weight_meta"]) != 0
        plain.register_buffer(_MASK, mask.t().contiguous() if turned else mask, persistent=False)
    return plain


def keep_masks(model: nn.Module, pattern: str = "2:4") -> Callable[[], None]:
    """Keeps the pruned weights of a model at zero while it is trained, by whichever optimiser.

    Masks are those that `from_pretrained(OUT).dequantize()` noted; a linear without one that fulfils `pattern` (`2:4`,
    `4:8`, `50%`) keeps its zeros too, and other layers train freely.

    Returns:
        What ends it.

    Raises:
        ValueError: no layer of the model is pruned to the pattern.
    """
    shape, undo = MaskShape.parse(pattern), []
    kept: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    for module in block_linears(model).values():
        mask = _mask_of(module, shape)
        if mask is None:
            continue
        module.register_buffer(_MASK, mask, persistent=False)
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        undo.append(weight.register_hook(_masking(module)).remove)
        kept.add(module)
    if not kept:
        raise ValueError(f"no layer of this model is pruned to {pattern}; name the pattern that its zeros have")
    _prune(kept)
    undo.append(register_optimizer_step_post_hook(lambda _optimiser, _args, _kwargs: _prune(kept)).remove)
    log.info("%d layers keep their masks", len(kept))

    def end() -> None:
        for step in undo:
            step()

    return end


def _mask_of(module: nn.Module, shape: MaskShape) -> Tensor | None:
    noted = getattr(module, _MASK, None)
    if isinstance(noted, Tensor):
        return noted
    weight = weight_of(module).detach()
    try:
        shape.check_width(weight.shape[1])
        shape.check_weight(weight)
    except ValueError:
        return None
    mask = shape.mask((weight != 0).to(torch.int8))
    return mask.t().contiguous() if is_conv1d(module) else mask


def _masking(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Gradients of pruned weights are zero, so that neither moments nor the norm that is clipped hold them."""
    reference = weakref.ref(module)

    def mask(gradient: Tensor) -> Tensor:
        owner = reference()
        return gradient if owner is None else gradient * owner.get_buffer(_MASK)

    return mask


@torch.no_grad()
def _prune(modules: weakref.WeakSet[nn.Module]) -> None:
    for module in modules:
        weight = module.weight
        assert isinstance(weight, Tensor)
        weight.mul_(module.get_buffer(_MASK))
