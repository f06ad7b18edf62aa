"""From a batch to a loss and its weight.

A loss is a mean over label tokens, so the gradient of the whole is the mean of the micro-batches' gradients weighted by
their numbers of label tokens. Unweighted, the cosine to the gradient of the one large batch was 0.81 in a trial.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ga.store import plain

LossFunction = Callable[[nn.Module, Any], Tensor | tuple[Tensor, float]]

IGNORED = -100  # Transformers' label for "no label here"
# Losses of Transformers that shift the labels by one, so that the first position of a row is never a label.
SHIFTING = {"ForCausalLM", "ForConditionalGeneration", None}


def _shifts(model: nn.Module) -> bool:
    """Whether the model's own loss shifts labels: decoders do, encoder-decoders and classifiers do not."""
    base = plain(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    return getattr(base, "loss_type", "not a Transformers model") in SHIFTING


def label_tokens(model: nn.Module, batch: Any) -> float | None:
    """How many labels a batch's mean loss is a mean over.

    Args:
        model: The model, whose class says whether labels are shifted.
        batch: A batch; only mappings have labels that can be counted.

    Returns:
        The number of labels other than -100 for integer labels of tokens or rows, the number of rows for other
        labels, `num_items_in_batch` where the batch sets it; None if the batch shows no labels.
    """
    if not isinstance(batch, Mapping):
        return None
    if batch.get("num_items_in_batch") is not None:
        return float(batch["num_items_in_batch"])
    labels = batch.get("shift_labels", batch.get("labels"))
    if not isinstance(labels, Tensor):
        return None
    if labels.is_floating_point():
        return float(len(labels))
    if labels.dim() > 1 and "shift_labels" not in batch and _shifts(model):
        labels = labels[..., 1:]
    return float((labels != IGNORED).sum())


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The default loss: what the model itself computes from a batch with labels.

    Args:
        model: A model whose output has a `loss`.
        batch: Keyword arguments (a mapping) or positional ones (a tuple or list).

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: The model computed no loss.
        TypeError: The batch is neither a mapping nor a sequence.
    """
    if isinstance(batch, Mapping):
        output, keys = model(**batch), ", ".join(map(str, batch))
    elif isinstance(batch, (tuple, list)):
        output, keys = model(*batch), f"{len(batch)} positional values"
    else:
        raise TypeError(
            f"A batch is a {type(batch).__name__}; the default loss takes a dict or a tuple. Pass a loss_fn."
        )
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"The model returned no loss for a batch of {keys}. Add 'labels' to the batch, or pass a loss_fn."
        )
    return loss


def weighed_loss(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> tuple[Tensor, float]:
    """The loss of one micro-batch and its weight in the whole.

    Args:
        model: The model.
        batch: The batch, on the model's device.
        loss_fn: The caller's loss, `(model, batch) → loss` or `→ (loss, weight)`; None for the model's own.

    Returns:
        The loss and its weight: what `loss_fn` says; otherwise the number of label tokens, or 1 where none are seen.

    Raises:
        ValueError: The batch has no label at all, the loss is not a finite scalar, or the weight not a number above 0.
    """
    counted = label_tokens(model, batch)
    if counted == 0 and loss_fn is None:
        raise ValueError(f"every label is {IGNORED}, so it has no loss. Leave such batches out, or truncate less")
    result = model_loss(model, batch) if loss_fn is None else loss_fn(model, batch)
    loss, weight = result if isinstance(result, tuple) else (result, 1.0 if counted is None else counted)
    weight = float(weight)
    if not (0 < weight < float("inf")):
        raise ValueError(f"its weight is {weight}; it must be a finite number above 0")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"its loss must be a scalar tensor, found {shape}")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"its loss is {loss.item()}. Check the data, or compute the loss in float32")
    return loss, weight
