"""The loss of a batch as a trainer computes it in training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from lora_ga.gradients.isolation import deactivate_adapter
from lora_ga.gradients.loss import LossFunction


class TrainerLoss:
    """A trainer's `compute_loss` as the loss function of an estimate.

    `compute_loss` gets the `num_items_in_batch` that the trainer counts for an optimizer step of this batch alone, in
    this process alone. So a loss that divides by it is a mean over the batch.

    Attributes:
        needs_labels: Whether a batch without a label has no loss: with the trainer's own loss.
    """

    def __init__(self, trainer: Trainer, model: Any, adapter_name: str, loss_fn: LossFunction | None) -> None:
        """Compute the loss of `trainer`.

        Args:
            trainer: The trainer, kept by `trainer_kept`.
            model: The model as the trainer passes it to its callbacks.
            adapter_name: The adapter that the estimate leaves out.
            loss_fn: The user's loss, in the place of `compute_loss`.
        """
        self.trainer, self.model, self.adapter_name, self.loss_fn = trainer, model, adapter_name, loss_fn
        self.needs_labels = loss_fn is None

    def __call__(self, adapted: nn.Module, batch: Any) -> Tensor | tuple[Tensor, float]:
        """The loss of a batch, or the loss and its weight if the user's loss returns both."""
        trainer: Any = self.trainer
        _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            if self.loss_fn is None:
                loss = trainer.compute_loss(self.model, inputs, num_items_in_batch=items)
            else:
                loss = self.loss_fn(adapted, inputs)
        # A preference loss switches adapters for its reference and back.
        deactivate_adapter(self.model, self.adapter_name)
        return loss
