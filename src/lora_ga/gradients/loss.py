"""The loss of a batch, and its weight.

A loss is a mean over label tokens. So the gradient of the mean loss over all batches is the mean of their gradients,
weighted by their numbers of label tokens; the unweighted mean is another gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ga.base import base_model

LossFunction = Callable[[nn.Module, Any], Tensor | tuple[Tensor, float]]

IGNORED = -100  # Transformers' label for "no label here"
# Losses of Transformers that shift the labels by one, so that the first position of a row is never a label.
SHIFTING = {"ForCausalLM", "ForConditionalGeneration"}


class BatchError(ValueError):
    """The loss of a batch cannot be used. `batch_in_errors` adds the number of the batch."""


def _shifts(model: nn.Module) -> bool:
    """Whether the loss of the model shifts labels: decoders do, encoder-decoders and classifiers do not."""
    base = base_model(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    kind, name = getattr(base, "loss_type", None), type(base).__name__
    # Older decoders (GPT2LMHeadModel) declare no loss type. Models named like XLMWithLMHeadModel do not shift.
    return kind in SHIFTING or (kind is None and name.endswith("LMHeadModel") and not name.endswith("WithLMHeadModel"))


def label_tokens(model: nn.Module, batch: Any) -> float | None:
    """How many terms a batch's mean loss is a mean over.

    Args:
        model: The model; its class determines whether labels are shifted.
        batch: A batch.

    Returns:
        `num_items_in_batch`, if the batch has it. Otherwise the number of integer labels other than -100 (one a token
        or one a row). Where there are no integer labels (`start_positions`, a tuple), the number of rows. None if
        the batch has no tensor with rows either.
    """
    if not isinstance(batch, Mapping):
        return _rows(batch if isinstance(batch, (tuple, list)) else [batch])
    if batch.get("num_items_in_batch") is not None:
        return float(batch["num_items_in_batch"])
    labels = batch.get("shift_labels", batch.get("labels"))
    if not isinstance(labels, Tensor):
        return _rows(batch.values())
    if labels.is_floating_point():
        return float(len(labels))
    if labels.dim() > 1 and "shift_labels" not in batch and _shifts(model):
        labels = labels[..., 1:]
    return float((labels != IGNORED).sum())


def _rows(values: Iterable[Any]) -> float | None:
    """The first dimension of the first tensor that has one."""
    return next((float(len(value)) for value in values if isinstance(value, Tensor) and value.dim() > 0), None)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The default loss: the one that the model computes from a batch with labels.

    Args:
        model: A model that returns an output with a `loss`, a tuple that begins with the loss, or the loss alone.
        batch: Keyword arguments (a mapping) or positional ones (a tuple or list).

    Returns:
        The loss, a scalar.

    Raises:
        BatchError: The model takes no such batch, or computed no loss.
        TypeError: The batch is neither a mapping nor a sequence.
    """
    if not isinstance(batch, (Mapping, tuple, list)):
        raise TypeError(
            f"A batch is a {type(batch).__name__}; the default loss takes a dict or a tuple. The data is an iterable "
            "of batches, so one batch alone is given as [batch]. For batches of another kind pass a loss_fn."
        )
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch, {})
    try:
        output = model(*args, **kwargs)
    except Exception as error:
        uncollated = _uncollated(batch)
        signature = _refusing_signature(model, args, kwargs) if isinstance(error, TypeError) else None
        if signature is not None and (uncollated is None or kwargs):
            raise BatchError(
                f"The model takes no batch of {_described(batch)}: its arguments are {signature}. Make batches of "
                "these, or pass a loss_fn(model, batch) that calls the model and returns the loss"
            ) from error
        if uncollated is None:
            raise
        raise BatchError(
            f"{uncollated}, and the model could not compute with it ({type(error).__name__}: {error}). A batch holds "
            "tensors, whose first dimension is that of the rows: a DataLoader with the collator of your trainer makes "
            'them of rows (transformers.DataCollatorWithPadding), a tokenizer of texts with return_tensors="pt"'
        ) from error
    loss = _loss_in(output)
    if loss is None:
        labelled = isinstance(batch, Mapping) and batch.get("labels") is not None
        found = f"; it returned {_kind(output)}" if labelled or not isinstance(batch, Mapping) else ""
        advice = "Pass a loss_fn" if found else "Add 'labels' to the batch, or pass a loss_fn"
        raise BatchError(f"The model returned no loss for a batch of {_described(batch)}{found}. {advice}")
    return loss


def _loss_in(output: Any) -> Tensor | None:
    """The loss in a model's output: its `loss`, the first element of a tuple, or the output itself if it is a scalar.

    Returns:
        The loss; None if there is none.
    """
    if isinstance(output, Mapping):
        return output.get("loss")
    if (loss := getattr(output, "loss", None)) is not None:
        return loss
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    # Predictions for a batch of one row may have one element, but then in one dimension or more.
    return first if isinstance(first, Tensor) and first.dim() == 0 and first.is_floating_point() else None


def _refusing_signature(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The arguments of the base model's `forward`, if the given ones do not fit them; None if they fit."""
    signature = inspect.signature(base_model(model).forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return f"({', '.join(signature.parameters)})"
    return None


def _described(batch: Any) -> str:
    """What a batch consists of, for messages."""
    return ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"{len(batch)} positional values"


def _uncollated(batch: Any) -> str | None:
    """What in a batch is no tensor with rows, but the plain values of rows; None if there is no such thing."""
    for name, value in batch.items() if isinstance(batch, Mapping) else enumerate(batch, start=1):
        called = name if isinstance(batch, Mapping) else f"value {name}"
        if isinstance(value, Tensor):
            if name == "input_ids" and value.dim() < 2:
                return f"{called} is a tensor of shape {tuple(value.shape)}, one row"
        elif isinstance(value, (list, tuple, Mapping, str)) or hasattr(value, "__array__"):
            return f"{called} is a {type(value).__name__}, not a tensor"
    return None


def _kind(output: Any) -> str:
    """What a model returned, for messages."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, (tuple, list)) and output:
        return f"a {type(output).__name__} that begins with {_kind(output[0])}"
    return f"a {type(output).__name__}"


def unlabelled(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> bool:
    """Whether a batch has labels, but all of them are -100, so that a loss of labels is 0/0.

    Args:
        model: The model.
        batch: The batch.
        loss_fn: The caller's loss; None for the model's own. Of a caller's loss it is not known whether it needs
            labels, unless it has a true attribute `needs_labels`.

    Returns:
        True if the batch has no label and the loss needs one.
    """
    return (loss_fn is None or getattr(loss_fn, "needs_labels", False)) and label_tokens(model, batch) == 0


def counted_labels(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> float | None:
    """The label tokens of a batch; the model's own loss needs at least one.

    Args:
        model: The model.
        batch: The batch.
        loss_fn: The caller's loss; None for the model's own.

    Returns:
        As `label_tokens`.

    Raises:
        BatchError: The batch has no label at all.
    """
    counted = label_tokens(model, batch)
    if counted == 0 and loss_fn is None:
        raise BatchError(f"every label is {IGNORED}, so it has no loss. Leave such batches out, or truncate less")
    return counted


def weighed_loss(
    model: nn.Module, batch: Any, loss_fn: LossFunction | None, counted: float | None
) -> tuple[Tensor, float]:
    """The loss of one micro-batch, and its weight in the mean of all.

    Args:
        model: The model.
        batch: The batch, on the model's device.
        loss_fn: The caller's loss, `(model, batch) → loss` or `→ (loss, weight)`; None for the model's own.
        counted: The batch's label tokens, from `counted_labels`.

    Returns:
        The loss and its weight. The weight is the one that `loss_fn` returns; otherwise the number of label tokens or
        rows, or 1 where the batch shows neither.

    Raises:
        BatchError: The loss is not a scalar, or the weight is not a finite number above 0.
    """
    result = model_loss(model, batch) if loss_fn is None else loss_fn(model, batch)
    loss, weight = result if isinstance(result, tuple) and len(result) == 2 else (result, counted or 1.0)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise BatchError(f"its loss must be a scalar tensor, found {found}")
    if not (isinstance(weight, (int, float)) or (isinstance(weight, Tensor) and weight.numel() == 1)):
        raise BatchError(
            f"loss_fn returned (loss, {type(weight).__name__}); the second must be the weight, a number. Return the "
            "loss alone, or (loss, number of terms that it is a mean over)"
        )
    if not (0 < float(weight) < float("inf")):
        raise BatchError(f"its weight is {float(weight)}; it must be a finite number above 0")
    return loss, float(weight)


def refuse_infinite_loss(loss: Tensor) -> None:
    """Refuse a loss that is not finite. The host waits for the device, so this comes after the backward pass.

    Raises:
        BatchError: It is not finite.
    """
    if not bool(torch.isfinite(loss)):
        raise BatchError(f"its loss is {loss.item()}. Check the data, or compute the loss in float32")
