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

from lora_ga.base import base_model
from lora_ga.distributed.processes import processes
from lora_ga.linalg.low_rank import generator

# Models that take latents in rows of 2 x 2 patches, and time steps as a share of the number of training steps.
PACKED = ("FluxTransformer2DModel",)
GUIDANCE = 3.5  # the default of diffusers' DreamBooth script for Flux


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
            `encoder_hidden_states`; or a function of a batch that returns the model's other keyword arguments, or the
            embeddings of the prompts and the pooled ones, as the scripts compute them. It is called in the loss, with
            gradients.
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
            noise = torch.randn(clean.shape, generator=draw, device="cpu").to(clean)
            count = self.scheduler.config.num_train_timesteps
            steps = torch.randint(count, (len(clean),), generator=draw, device="cpu")
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
        base = base_model(model)
        arguments = dict(self._arguments(base, batch["batch"]))
        if type(base).__name__ in PACKED:
            time = time / self.scheduler.config.num_train_timesteps
            if noisy.dim() == 4:
                arguments = _places(noisy, arguments, getattr(base, "config", None)) | arguments
                noisy, target = _packed(noisy), _packed(target)
        noisy = noisy.to(getattr(base, "dtype", noisy.dtype))
        prediction = model(noisy, timestep=time, **arguments)[0]
        if prediction.shape != target.shape:
            raise ValueError(
                f"The model predicts {tuple(prediction.shape)} for latents of {tuple(target.shape)}. Pass `latents` as "
                "the model takes them, or a loss_fn of your own."
            )
        return mse_loss(prediction.float(), target.float()), len(clean)

    def _arguments(self, base: nn.Module, batch: Any) -> Mapping[str, Any]:
        """The other arguments of the model."""
        if isinstance(self.condition, nn.Module):
            ids = batch["input_ids"].to(next(self.condition.parameters()).device)
            return {"encoder_hidden_states": self.condition(ids)[0]}
        found = self.condition(batch)
        if isinstance(found, Mapping):
            return found
        states, pooled, *_ = found
        if getattr(getattr(base, "config", None), "addition_embed_type", None) != "text_time":
            return {"encoder_hidden_states": states, "pooled_projections": pooled}
        added = {"text_embeds": pooled, "time_ids": _sizes(batch).to(pooled)}  # SDXL
        return {"encoder_hidden_states": states, "added_cond_kwargs": added}

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


def _sizes(batch: Mapping[str, Any]) -> Tensor:
    """What SDXL is told of each picture: its size, where it was cropped, and the size that is trained; (rows, 6)."""
    height, width = batch["pixel_values"].shape[-2:]
    rows = len(batch["pixel_values"])
    sizes = batch.get("original_sizes", [(height, width)] * rows)
    crops = batch.get("crop_top_lefts", [(0, 0)] * rows)
    return torch.tensor([[*map(int, (*size, *crop)), height, width] for size, crop in zip(sizes, crops, strict=True)])


def _packed(latents: Tensor) -> Tensor:
    """Latents (N, C, H, W) as rows of 2 x 2 patches, (N, H/2 · W/2, 4 C)."""
    return latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _places(latents: Tensor, arguments: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The other arguments of a Flux transformer: the places of patches and tokens, and the guidance of its scripts."""
    height, width = (size // 2 for size in latents.shape[2:])
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(latents)
    found = {"img_ids": places, "txt_ids": places.new_zeros(arguments["encoder_hidden_states"].shape[1], 3)}
    if getattr(config, "guidance_embeds", False):
        found["guidance"] = latents.new_full((len(latents),), GUIDANCE)
    return found
