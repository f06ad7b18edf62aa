"""Batches → loss → backward, in one process or in step with others; what is listened to, and how far it has come."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor

from lora_ga.config import LoraGAConfig
from lora_ga.distributed.agreement import check_same_data, warn_idle, warn_same_data
from lora_ga.distributed.processes import DeferredError, Processes
from lora_ga.distributed.sharding import in_step
from lora_ga.gradients.batch import Pass, numbered
from lora_ga.gradients.checkpoint import Checkpoint, Progress, digest_of
from lora_ga.gradients.coverage import warn_probed
from lora_ga.gradients.hooks import Heard, Sink, record, record_weights
from lora_ga.gradients.isolation import place_of
from lora_ga.gradients.loss import counted_labels
from lora_ga.gradients.probe import probe
from lora_ga.layers.targets import Target
from lora_ga.linalg.accumulator import Accumulator
from lora_ga.linalg.low_rank import LowRank, packed, unpacked

ABSENT = object()


@dataclasses.dataclass
class Run:
    """One estimate under way: what it listens to, what it holds, how far it has come.

    Where a tensor-parallel plan has split the model (`planned`), all processes read the same batches: each listens to
    its parts of the layers that are split, the first one alone to the others, and it alone counts the batches.
    """

    model: PeftModel
    targets: Mapping[str, Target]
    config: LoraGAConfig
    passes: Pass
    accumulator: Accumulator
    progress: Progress
    checkpoint: Checkpoint | None
    processes: Processes
    planned: bool = False
    batches: list[Any] = dataclasses.field(default_factory=list)
    probed: Mapping[str, LowRank] = dataclasses.field(default_factory=dict)

    def listen(self, data: Iterable[Any], adapter_name: str) -> None:
        """Read this process's share of the batches; what was not seen is heard through a probe."""
        if self.config.estimator == "probe":
            self.keep(data)
        else:
            self.read(data)
        self.probe(adapter_name)

    def read(self, data: Iterable[Any]) -> None:
        """Pass this process's share of the batches through the model, from where the progress stands.

        The processes go in rounds of one batch each. Where a pass communicates (sharded parameters) one that has no
        batch left takes part with a batch it has had, or one that is lent to it, and does not listen.
        """
        processes, held, last = self.processes, DeferredError(), ABSENT
        together = processes.size > 1 and in_step(self.model)
        batches = self._unread(self._kept(self._share(data)))
        with self._listening(self._sink) as heard:
            for number in itertools.count():
                batch = ABSENT
                if held.error is None and (processes.size > 1 or not self._all_settled()):
                    with held, numbered(self.progress.batches + 1):
                        batch = self._next(batches)
                compared = self.planned or (number == 0 and processes.size > 1)
                first = digest_of(batch) if compared and batch is not ABSENT else ""
                mine = batch is not ABSENT and not self._all_settled()
                last = last if batch is ABSENT else batch
                reports = processes.exchange(held, (mine, last is not ABSENT, first))
                if not any(wanted for wanted, _, _ in reports):
                    break
                (check_same_data if self.planned else warn_same_data)([digest for _, _, digest in reports])
                if together:
                    last = self._lent(last, [has for _, has, _ in reports])
                if together or mine:
                    self._pass(last, held, heard if mine else None, together=together)

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch, or `ABSENT`; one without labels is refused before other processes wait for its pass."""
        batch = next(batches, ABSENT)
        if batch is not ABSENT:
            counted_labels(self.model, batch, self.passes.loss_fn)
        return batch

    def _lent(self, batch: Any, having: list[bool]) -> Any:
        """The batch, or for a process that has never had one that of another; on the CPU."""
        if all(having):
            return batch
        lends = self.processes.rank == having.index(True)
        lent = self.processes.gather(send_to_device(batch, "cpu") if lends else None)[having.index(True)]
        return lent if batch is ABSENT else batch

    def _pass(self, batch: Any, held: DeferredError, heard: Heard | None, *, together: bool) -> None:
        """One batch forward and backward, keeping an error until the processes meet.

        Args:
            batch: The batch.
            held: Where the error is kept.
            heard: What is listened to; None to only take part in the pass.
            together: Whether all processes make the pass together.
        """
        index = self.progress.batches + 1
        with held, numbered(index):
            loss, weight = self.passes.forward(batch)
        if together:  # so that none begins the backward pass without the others
            self.processes.exchange(held)
        if held.error is not None:
            return
        with held, numbered(index):
            self.passes.backward(loss, weight, heard=heard is not None)
            if heard is not None:
                self._take_in(index, weight, heard)

    def _take_in(self, index: int, weight: float, heard: Heard) -> None:
        """Settle what a batch has added."""
        with torch.no_grad(), torch.autocast(self.passes.device.type, enabled=False):
            self.accumulator.flush()
        progress = self.progress
        progress.batches, progress.weight = index, progress.weight + weight
        progress.ran |= heard.ran
        progress.got_gradient |= heard.got_gradient
        self._settle(heard)
        if self.checkpoint is not None and index % self.checkpoint.every == 0:
            self.checkpoint.save(progress, self.accumulator.state())

    def _sink(self, name: str, x_TI: Tensor, g_TO: Tensor) -> None:
        """Add what passes by a layer, unless it is a part that has settled of one whose others have not."""
        if self.passes.scale and name not in self.progress.settled:
            with torch.autocast(g_TO.device.type, enabled=False):
                self.accumulator.add(name, x_TI, g_TO, self.passes.scale)

    def _share(self, data: Iterable[Any]) -> Iterator[Any]:
        """As many of the batches as this process is to read."""
        most = self.config.max_batches
        return itertools.islice(data, most if self.planned else self.processes.share_of(most))

    def _kept(self, data: Iterable[Any]) -> Iterator[Any]:
        """The batches, kept while a layer that can be probed has not been seen to run: a probe needs them again.

        Yields:
            A batch.
        """
        for batch in data:
            if self._unseen(self.progress.ran):
                self.batches.append(copy.copy(batch))  # a loss may take the labels out of it
            else:
                self.batches.clear()
            yield batch

    def keep(self, data: Iterable[Any]) -> None:
        """Keep this process's share of the batches for the probe, without a pass of its own."""
        held, first = DeferredError(), ""
        with held:
            self.batches.extend(self._share(data))
            first = digest_of(self.batches[0]) if self.batches and self.processes.size > 1 else ""
        warn_same_data(self.processes.exchange(held, first))

    def _unseen(self, ran: Container[str]) -> dict[str, Target]:
        """The layers that have not called their hook, and can be probed."""
        if in_step(self.model):  # its passes are those of all processes
            return {}
        return {name: target for name, target in self.targets.items() if name not in ran and target.layout.probed}

    def probe(self, adapter_name: str) -> None:
        """Listen through a probe to the layers that no process has seen, with the batches that were kept."""
        seen, counts = zip(*self.processes.gather((self.progress.ran, len(self.batches))), strict=True)
        unseen = self._unseen(set().union(*seen))
        if not unseen or not any(counts):
            return
        kept = {name: self.config.directions(target.rank) for name, target in unseen.items()}
        self.probed, weight = probe(
            self.passes, self.processes, unseen, adapter_name, kept, self.config.seed, self.batches
        )
        self.progress.ran.update(self.probed)
        self.progress.got_gradient.update(self.probed)
        if self.config.estimator == "probe":
            self.progress.batches, self.progress.weight = len(self.batches), weight
        elif self.probed:
            warn_probed(list(self.probed), len(self.targets))

    @contextlib.contextmanager
    def _listening(self, sink: Sink) -> Iterator[Heard]:
        """Listen to the layers that have not settled, and to the parameters that no layer of their own applies.

        Yields:
            What has been heard so far.
        """
        apart = self.planned and self.processes.rank > 0
        waiting = {
            name: target
            for name, target in self.targets.items()
            if not self._settled(target) and not (apart and target.split is None)
        }
        rows = {name: target.rows for name, target in waiting.items()}
        layers = {name: target.layer for name, target in waiting.items() if not target.layout.gradient_from_parameter}
        owners = {
            name: (target.layer.get_base_layer(), target.layout.parameter_name(target.layer))
            for name, target in waiting.items()
            if target.layout.gradient_from_parameter
        }
        with record(layers, sink, rows) as heard, record_weights(owners, sink, rows, heard):
            yield heard

    def _settled(self, target: Target) -> bool:
        """Whether all parts of a layer have settled."""
        return all(key in self.progress.settled for key in target.keys)

    def _all_settled(self) -> bool:
        return all(self._settled(target) for target in self.targets.values())

    def _settle(self, heard: Heard) -> None:
        """Listen no more to layers whose directions have settled; what P processes hold errs by 1/P of each's error."""
        if self.config.tolerance is not None:
            with torch.no_grad():
                changes = self.accumulator.changes()
            done = set(self.progress.settle(changes, self.config.tolerance * self.processes.size))
            for name, target in self.targets.items():
                if done.intersection(target.keys) and self._settled(target):
                    heard.release[name]()

    def _unread(self, data: Iterable[Any]) -> Iterator[Any]:
        """The batches that the checkpoint has not seen; those that it has are compared with its digest.

        Yields:
            A batch.

        Raises:
            ValueError: They differ, or are fewer.
        """
        if self.checkpoint is None:
            yield from data
            return
        seen, again, count = self.progress.batches, Progress(), 0
        if seen and self._all_settled():
            return
        for count, batch in enumerate(data, start=1):
            if count > seen:
                self.progress.read(batch)
                yield batch
                continue
            again.read(batch)
            if count == seen and again.digest != self.progress.digest:
                break
        else:
            if count >= seen:
                return
        raise ValueError(
            f"{self.checkpoint.path} was made from other batches: it has seen {seen}, and those given now are not the "
            "same or fewer. Give the data of the interrupted run in its order, or remove the file to start anew."
        )

    def merged(self) -> tuple[Progress, dict[str, LowRank]]:
        """What all processes have read, and the directions of its gradient: the same numbers in each of them."""
        places = {key: place_of(target.layer) for target in self.targets.values() for key in target.keys}
        parts = self.processes.gather(self.progress)
        warn_idle([part.batches for part in parts])
        with torch.no_grad(), torch.autocast(self.passes.device.type, enabled=False):
            own = self.processes.merge(places, self.accumulator.state, self.accumulator.absorb)
            shared = self.processes.share(packed(self._factors(own)))
        found = {**unpacked(shared, places), **self.probed}
        return Progress.sum(parts[:1] if self.planned else parts), {key: found[key] for key in places if key in found}

    def _factors(self, keys: Iterable[str]) -> dict[str, LowRank]:
        """The factors of those layers among `keys` that got tokens, with 2r + `oversample` directions."""
        ranks = {key: target.rank for target in self.targets.values() for key in target.keys}
        factors = {}
        for key in keys:
            if (factor := self.accumulator.factors(key)) is not None:
                kept = self.config.directions(ranks[key])
                u, s, v = factor.U[:, :kept], factor.S[:kept], factor.V[:, :kept]
                factors[key] = dataclasses.replace(factor, U=u, S=s, V=v)
        return factors
