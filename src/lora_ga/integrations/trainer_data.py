"""The batches and the loss of an estimate inside a trainer, as the trainer has them in training."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from accelerate.state import GradientState
from torch import Tensor, nn
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import Trainer

from lora_ga.gradients.isolation import deactivate_adapter, modes_kept, set_modes
from lora_ga.gradients.loader import loader_kept
from lora_ga.gradients.loss import LossFunction
from lora_ga.gradients.reader import known_length


def check_training_data(trainer: Trainer) -> None:
    """Refuse training data from which no batches for the estimate can be taken.

    Args:
        trainer: The trainer.

    Raises:
        ValueError: The data is empty, or an iterable that may not restart.
    """
    data = trainer.train_dataset
    if known_length(data) == 0:
        raise ValueError(
            f"The training data of the {type(trainer).__name__} is empty; the gradient needs at least one example."
        )
    _check_restarts(data)


def _check_restarts(data: Any) -> None:
    """Refuse a stream that continues where the last reader stopped.

    Raises:
        ValueError: The data is an iterator, or a stream that holds one.
    """
    if not restarts(data):
        raise ValueError(
            f"The training data is a {type(data).__name__}, an iterable that may not restart since it is or holds an "
            "iterator, so batches taken from it could be missing in training. Pass LoraGACallback(batches=...), or "
            "let its __iter__ begin anew."
        )


def restarts(data: Any) -> bool:
    """Whether data begins anew with every iteration. A stream does, unless an iterator is in one of its attributes.

    Args:
        data: The data.

    Returns:
        Whether it does.
    """
    if isinstance(data, Iterator):
        return False
    # Without an import: a stream of `datasets` exists only if somebody has imported the library.
    library = sys.modules.get("datasets")
    if not isinstance(data, TorchIterableDataset) or (library and isinstance(data, library.IterableDataset)):
        return True
    return all(restarts(held) for held in getattr(data, "__dict__", {}).values())


@contextlib.contextmanager
def batches_of_trainer(trainer: Trainer, loader_of_training: Any) -> Iterator[Iterator[Any]]:
    """The batches that the trainer's own loader gives to this process, from a second loader.

    `get_train_dataloader` makes the loader. So the batches have the trainer's batch size, sampler, collator and share
    of this process, also where a subclass overrides one of them. The order of training does not change.

    Args:
        trainer: The trainer, kept by `trainer_kept`. A random sampler draws from the seed given there.
        loader_of_training: The loader that training will use.

    Yields:
        The batches, in the order of the loader.

    Raises:
        ValueError: The data cannot be read twice.
    """
    loader: Any = trainer.get_train_dataloader()
    _check_restarts(getattr(loader, "dataset", None))
    if loader is loader_of_training:
        _check_restarts(loader)
    with loader_kept(loader), contextlib.closing(_read(loader)) as batches:
        yield itertools.islice(batches, 0, None, _use_groups_of_training(trainer))


def _read(loader: Any) -> Generator[Any]:
    """The batches of a loader. On leaving early, Accelerate forgets the loader, as at its end.

    Yields:
        A batch.

    Raises:
        ValueError: The loader's own error.
    """
    empty = True
    try:
        for batch in loader:
            empty = False
            yield batch
    except ValueError:
        # Accelerate's loader refuses a stream without a row; the estimate refuses it in words that say so.
        if not (empty and _is_empty_stream(getattr(loader, "dataset", None))):
            raise
    finally:
        if any(each is loader for each in GradientState().dataloader_references):
            loader.end()


def _is_empty_stream(data: Any) -> bool:
    """Whether data is a stream without a row."""
    return isinstance(data, TorchIterableDataset) and not any(True for _ in data)


def _use_groups_of_training(trainer: Any) -> int:
    """Let GRPO, RLOO and the like compare as many answers to a prompt as in training.

    Their loaders give each prompt as often as training compares answers. `_prepared` makes the answers in evaluation
    mode, for which these trainers have another number.

    Args:
        trainer: The trainer, kept by `trainer_kept`.

    Returns:
        How often the loader repeats each batch, so that training can use its answers several times; 1 for others.
    """
    if not hasattr(trainer, "num_generations"):
        return 1
    if hasattr(trainer, "num_generations_eval"):
        trainer.num_generations_eval = trainer.num_generations
    return int(getattr(trainer, "num_iterations", 1) * getattr(trainer.args, "steps_per_generation", 1))


def _prepared(trainer: Any, batch: Any) -> Any:
    """The inputs of `compute_loss` for a batch; in GRPO, RLOO and the like they contain answers made for this batch.

    In training mode these trainers make answers for several steps at once, and count the steps.

    Args:
        trainer: The trainer, kept by `trainer_kept`.
        batch: A batch of its loader.

    Returns:
        The inputs.
    """
    if not hasattr(trainer, "num_generations"):
        return trainer._prepare_inputs(batch)
    with modes_kept(trainer.model):
        set_modes(trainer.model, training=False)
        return trainer._prepare_inputs(batch)


class TrainerLoss:
    """A trainer's `compute_loss` as the loss function of an estimate.

    `compute_loss` gets the `num_items_in_batch` that the trainer counts for an optimizer step of this batch alone, in
    this process alone. So a loss that divides by it is a mean over the batch.

    Attributes:
        needs_labels: Whether a batch without a label has no loss: with the trainer's own loss.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: Any,
        adapter_name: str | None,
        loss_fn: LossFunction | None,
        later: Sequence[str] = (),
    ) -> None:
        """Compute the loss of `trainer`.

        Args:
            trainer: The trainer, kept by `trainer_kept`.
            model: The model as the trainer passes it to its callbacks.
            adapter_name: The adapter that the estimate leaves out; None: all take part, as in training.
            loss_fn: The user's loss, in the place of `compute_loss`.
            later: Kinds of callbacks that will do something at the beginning of training, after the estimate.
        """
        self.trainer, self.model, self.adapter_name, self.loss_fn = trainer, model, adapter_name, loss_fn
        self.later = later
        self.needs_labels = loss_fn is None

    def __call__(self, adapted: nn.Module, batch: Any) -> Tensor | tuple[Tensor, float]:
        """The loss of a batch, or the loss and its weight if the user's loss returns both."""
        trainer: Any = self.trainer
        _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        inputs = _prepared(trainer, batch)
        with trainer.compute_loss_context_manager():
            loss = self._loss_of_trainer(inputs, items) if self.loss_fn is None else self.loss_fn(adapted, inputs)
        if self.adapter_name is not None:  # a preference loss switches adapters for its reference and back
            deactivate_adapter(self.model, self.adapter_name)
        return loss

    def _loss_of_trainer(self, inputs: Any, items: Any) -> Tensor:
        """The trainer's `compute_loss`; where the trainer explains why it fails, a ValueError says so."""
        trainer: Any = self.trainer
        try:
            return trainer.compute_loss(self.model, inputs, num_items_in_batch=items)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            if (reason := self._why_it_fails(error)) is None:
                raise
            raise ValueError(reason) from error

    def _why_it_fails(self, error: Exception) -> str | None:
        """Why the trainer's `compute_loss` fails before training, and what to do; None if nothing is known of it."""
        kind = type(self.trainer)
        if kind.training_step is not Trainer.training_step and kind.compute_loss is Trainer.compute_loss:
            return (
                f"compute_loss of {kind.__name__} fails ({error}); its loss may be in its training_step, where it "
                "cannot be computed without a step. Pass LoraGACallback(batches=..., loss_fn=...)."
            )
        if self.later:
            return (
                f"compute_loss of {kind.__name__} fails before training has begun ({error}). What it needs may come "
                f"from callbacks that run after LoraGACallback ({', '.join(self.later)}). Add it last, when the "
                "trainer is made: LoraGACallback().attach(trainer)."
            )
        return None
