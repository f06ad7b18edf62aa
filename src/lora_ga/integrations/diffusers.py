"""diffusers: batches with noise and the loss of a denoising step, for `lora_ga.initialize` in its training scripts.

    import lora_ga.integrations.diffusers

    batches, loss = lora_ga.integrations.diffusers.denoising(noise_scheduler, train_dataloader, vae, text_encoder)
    lora_ga.initialize(unet, batches, loss_fn=loss)

Nothing of diffusers is imported: schedulers, autoencoders and models are used by the methods that its training scripts
call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lora_ga.distributed.processes import processes
from lora_ga.files import base_model
from lora_ga.linalg.low_rank import generator

# Models that take their time steps as a share of the number of training steps.
TIME_AS_SHARE = ("FluxTransformer2DModel",)


def denoising(
    scheduler: Any,
    data: Iterable[Any],
    latents: Any,
    condition: Any,
    *,
    seed: int = 0,
) -> tuple[NoisyBatches, DenoisingLoss]:
    """The batches and the loss of denoising steps, as the training scripts of diffusers have them.

    Args:
        scheduler: The noise scheduler of the training: one that adds noise (DDPM and its like, with the prediction type
            "epsilon", "v_prediction" or "sample"), or one of flow matching.
        data: The script's batches.
        latents: The autoencoder, which encodes `batch["pixel_values"]`; or a function of a batch that returns the clean
            latents, as the model takes them.
        condition: The text encoder, whose first output for `batch["input_ids"]` is the model's
            `encoder_hidden_states`; or a function of a batch that returns the model's other keyword arguments. It is
            called in the loss, with gradients.
        seed: Seed of noise and time steps.

    Returns:
        The batches, which can be read again with the same noise, and the loss.
    """
    return NoisyBatches(scheduler, data, latents, seed), DenoisingLoss(scheduler, condition)


@dataclasses.dataclass(frozen=True)
class NoisyBatches:
    """Batches with their clean latents, the noise, and the numbers of their time steps in the scheduler.

    The random numbers of a batch depend on the seed, the process and the number of the batch alone.

    Attributes:
        scheduler: The noise scheduler.
        data: The script's batches.
        latents: As in `denoising`.
        seed: The seed.
    """

    scheduler: Any
    data: Iterable[Any]
    latents: Any
    seed: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields batches for `DenoisingLoss`."""
        rank = str(processes(None).rank)
        for number, batch in enumerate(self.data):
            draw = generator(self.seed, "denoising", rank, str(number))
            with torch.no_grad():
                clean = self._clean(batch, draw)
            noise = torch.randn(clean.shape, generator=draw).to(clean)
            steps = torch.randint(self.scheduler.config.num_train_timesteps, (len(clean),), generator=draw)
            yield {"batch": batch, "latents": clean, "noise": noise, "steps": steps.to(clean.device)}

    def _clean(self, batch: Any, draw: torch.Generator) -> Tensor:
        """The clean latents of a batch."""
        if not isinstance(self.latents, nn.Module):
            return self.latents(batch)
        vae: Any = self.latents
        first = next(vae.parameters())
        found = vae.encode(batch["pixel_values"].to(first.device, first.dtype)).latent_dist.sample(generator=draw)
        return (found - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


@dataclasses.dataclass(frozen=True)
class DenoisingLoss:
    """The mean squared error of a model's prediction, `(model, batch) → (loss, rows)`, for `NoisyBatches`.

    Attributes:
        scheduler: The noise scheduler.
        condition: As in `denoising`.
    """

    scheduler: Any
    condition: Any

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        """The loss of a batch, and its number of rows.

        Args:
            model: The model that predicts: a UNet or a transformer.
            batch: A batch of `NoisyBatches`.

        Returns:
            The loss and the rows.

        Raises:
            ValueError: The prediction has another shape than what it should predict.
        """
        clean, noise = batch["latents"], batch["noise"]
        noisy, time, target = self._step(clean, noise, batch["steps"])
        if type(base_model(model)).__name__ in TIME_AS_SHARE:
            time = time / self.scheduler.config.num_train_timesteps
        noisy = noisy.to(getattr(base_model(model), "dtype", noisy.dtype))
        prediction = model(noisy, timestep=time, **self._arguments(batch["batch"]))[0]
        if prediction.shape != target.shape:
            raise ValueError(
                f"The model predicts {tuple(prediction.shape)} for latents of {tuple(target.shape)}. Pass `latents` as "
                "the model takes them, or a loss_fn of your own."
            )
        return mse_loss(prediction.float(), target.float()), len(clean)

    def _arguments(self, batch: Any) -> Mapping[str, Any]:
        """The other arguments of the model."""
        if not isinstance(self.condition, nn.Module):
            return self.condition(batch)
        ids = batch["input_ids"].to(next(self.condition.parameters()).device)
        return {"encoder_hidden_states": self.condition(ids)[0]}

    def _step(self, clean: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The noisy latents, their time steps, and what the model should predict.

        Returns:
            The three.

        Raises:
            ValueError: The scheduler predicts something unknown.
        """
        if not hasattr(self.scheduler, "add_noise"):  # flow matching: the time steps begin with the noise
            places = steps.to(self.scheduler.timesteps.device)
            share = self.scheduler.sigmas[places].to(clean).reshape(-1, *[1] * (clean.dim() - 1))
            time = self.scheduler.timesteps[places].to(clean.device)
            return (1 - share) * clean + share * noise, time, noise - clean
        targets: Mapping[str, Callable[[], Tensor]] = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self.scheduler.get_velocity(clean, noise, steps),
            "sample": lambda: clean,
        }
        kind = self.scheduler.config.prediction_type
        if kind not in targets:
            raise ValueError(
                f"The scheduler's prediction type is {kind!r}; known are {', '.join(targets)}. Pass your own loss_fn."
            )
        return self.scheduler.add_noise(clean, noise, steps), steps, targets[kind]()
