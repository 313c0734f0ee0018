"""The training loop of one worker, for every kind of run: resume, steps, periodic work, finish."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import torch
import torch.distributed as dist

from crate_ray.config import FinetuneConfig, PretrainConfig
from crate_ray.data.batch import Batch
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.loader import Loader, training_loader
from crate_ray.data.order.sequence import worker_slots
from crate_ray.data.read.bad_samples import BAD_CAUSES
from crate_ray.data.read.mixture import open_mixture
from crate_ray.errors import UserError
from crate_ray.models.exported import Normalizer
from crate_ray.models.flops import gpu_peak_flops
from crate_ray.runs import metrics
from crate_ray.runs.record import RunRecord
from crate_ray.storage.interface import open_storage
from crate_ray.training.cuda_graph import GraphedStep, Step
from crate_ray.training.guard import Guard
from crate_ray.training.optimizer import learning_rate
from crate_ray.training.parallel import is_sharded, settle
from crate_ray.training.probe_batch import ProbeResult
from crate_ray.training.profiling import StepProfile
from crate_ray.training.step import autocast_dtype, prepare_cpu, train_step
from crate_ray.training.task import Task, WorkerContext, assemble
from crate_ray.training.telemetry import KEYS_DIGEST_RANGE, StepLog, Stopwatch, keys_digest, used_memory
from crate_ray.training.worker import StartFacts, Worker

_FIRST_STEPS = 2  # the first one warms up, the second one shows how long steps take


class TrainingLoop:
    """Trains one worker's share of a run, from its newest checkpoint to its last step. All calls are collective.

    Args:
        task_class: what is trained.
        config: settings of the run.
        record: the run's record.
        total_steps: steps of the whole run.
        worker: this process among the workers.

    Raises:
        UserError: the data changed since the run was opened. Methods raise it for other mistakes in settings or data.
    """

    def __init__(
        self,
        task_class: type[Task],
        config: PretrainConfig | FinetuneConfig,
        record: RunRecord,
        total_steps: int,
        worker: Worker,
    ) -> None:
        self.config, self.record, self.total_steps, self.worker = config, record, total_steps, worker
        device = worker.device
        if device.type == "cpu":
            prepare_cpu()
        torch.set_num_threads(record.threads)
        self.mixture = open_mixture(config.data.train, config.s3)
        validation = config.data.validation
        self.validation = load_dataset(open_storage(validation, config.s3)) if validation else None
        if self.mixture.digest != record.dataset:
            raise UserError(f"the dataset at {self.mixture.uri} changed while the run was starting; start it again")

        self.autocast = autocast_dtype(config.training.precision, device)
        self.context = WorkerContext(
            record=record,
            mixture=self.mixture,
            validation=self.validation,
            rank=worker.rank,
            world_size=worker.world_size,
            device=device,
            autocast=self.autocast,
            normalizer=Normalizer.of(record.mean, record.std, device),
            run=worker.run,
        )
        self.assembled = assemble(task_class, config, self.context)
        self.task = self.assembled.task
        self.optimizer_step = self._make_step()
        self.probes = self.task.probe_every is not None and (worker.rank == 0 or is_sharded(self.task.model))

        self.step = self.start = self.logged = self.saved = 0
        self.rescued = False
        """Whether a checkpoint was saved because of a notice of preemption or a request to stop."""
        self.lr = 0.0
        self.stopwatch = Stopwatch(device)
        self.step_log = StepLog(config.tracking.log_every, device)
        self.guard = Guard(config.training.max_skipped_steps)
        self.first_slot, _ = worker_slots(
            config.training.batch_size, worker.rank, worker.world_size, self.task.together
        )
        self.reported_bad: dict[str, set[str]] = {"training": set(), "validation": set()}
        self.bad_validation: dict[str, str] = {}
        self.picture_thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self.pictures: Future[None] | None = None
        """The last probe, until it is reported."""

    def _make_step(self) -> Step:
        step = partial(
            train_step,
            self.assembled.trained,
            self.assembled.optimizer,
            batch_size=self.config.training.batch_size,
            world_size=self.worker.world_size,
            micro_steps=self.assembled.micro_steps,
            clip_norm=self.config.optim.clip_norm,
            autocast=self.autocast,
        )
        captured = self.config.training.cuda_graph and self.worker.device.type == "cuda" and self.worker.world_size == 1
        return GraphedStep(step, self.assembled.optimizer) if captured else step

    def train(self) -> None:
        """Resume, make the remaining steps, finish."""
        self.resume()
        self.run()
        self.finish()

    # --- Resume -----------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Restore the newest checkpoint, and open the data at its step."""
        self.step = self.start = self.logged = self.saved = self.worker.checkpoints.restore(self.assembled)
        self.worker.reporter.started(self.step, self._start_facts())
        for note in self.assembled.notes:
            self.worker.reporter.note(self.step, note)
        if self.step == 0:
            self._probe()
        self.loader = self._open_loader()
        if self.worker.rank == 0 and self.step == 0:
            for dataset in self.mixture.datasets:
                self._report_bad("training", dataset.manifest.left_out)
            if self.validation:
                self._report_bad("validation", self.validation.manifest.left_out)

    def _start_facts(self) -> StartFacts:
        device = self.worker.device
        return StartFacts(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
            workers=self.worker.world_size,
            threads=torch.get_num_threads(),
            parameters=sum(p.numel() for p in self.task.model.parameters() if p.requires_grad),
            images=self.mixture.num_samples,
            batch_size=self.config.training.batch_size,
        )

    def _open_loader(self) -> Loader:
        return training_loader(
            self.mixture,
            self.record.order,
            self.task.image_model,
            self.config.data,
            steps=range(self.step, self.total_steps),
            rank=self.worker.rank,
            world_size=self.worker.world_size,
            device=self.worker.device,
            together=self.task.together,
        )

    # --- Steps ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Make the remaining steps, with the periodic work after each. Ends early if the driver asks to stop."""
        profiled = self.config.training.profile_steps if self.worker.rank == 0 else None
        profile = StepProfile(profiled, self.worker.run, self.worker.scratch, self.worker.device)
        with self.loader, profile, ExitStack() as at_the_end:
            at_the_end.callback(self._report_bad_samples)  # also after an error, which may be too many bad samples
            if self.step < self.total_steps:
                settle(self.assembled.trained, *self.task.blank(1))
            self.stopwatch.start()
            batches = iter(self.loader)
            while self.step < self.total_steps and not self._stop_or_rescue():
                profile.before(self.step + 1)
                batch = self._train_step(batches)
                if path := profile.after(self.step):
                    note = f"a profile was written to {path}; open it in Perfetto or chrome://tracing"
                    self.worker.reporter.note(self.step, note)
                self._periodic_work(batch)
            self.worker.control.finish()

    def _stop_or_rescue(self) -> bool:
        """Save a checkpoint if the driver asks to stop or a node is about to be preempted. Returns whether to stop.

        After a notice of preemption, training continues. Ray Train restarts the workers when the node is gone.
        """
        self.worker.checkpoints.raise_failure()
        decision = self.worker.control.decide(self.step)
        preempted = decision.check_preemption and not self.rescued and self.worker.preemption_notice()
        if decision.stop or preempted:
            self.rescued = True
            if self.step > self.saved:
                self._save(validation_loss=None)
        return decision.stop

    def _train_step(self, batches: Iterator[Batch]) -> Batch:
        """Read a batch and make an optimizer step with it."""
        began, training = time.perf_counter(), self.config.training
        with self.stopwatch.waiting(), self.worker.control.phase("data"):
            batch = next(batches)
        images, inputs = self.task.inputs(batch)
        self.lr = learning_rate(self.step, self.total_steps, self.config.optim, training.batch_size)
        loss_sum, gradient_norm = self.optimizer_step(images, inputs, lr=self.lr)
        self.step_log.add(loss_sum, gradient_norm)
        self.step += 1
        if self.step - self.start <= _FIRST_STEPS:
            loss = self._summed(loss_sum.clone()).item() / training.batch_size
            self.worker.reporter.first_step(self.step, loss, time.perf_counter() - began)
        return batch

    # --- Periodic work ----------------------------------------------------------------------------------------------

    def _periodic_work(self, batch: Batch) -> None:
        """After a step: log, validate, probe and save, if they are due. After the last step all of them are due."""
        last = self.step == self.total_steps
        if last or self.step % self.config.tracking.log_every == 0:
            self._log(batch)
        checkpoint = self.config.checkpoint
        measures = self.task.measure_every is not None and self.step % self.task.measure_every == 0
        saves = last or measures or self.step % checkpoint.every_steps == 0
        validate_every = self.config.training.validate_every or self.total_steps
        compares = saves and checkpoint.keep_best and checkpoint.keep_best_by == "validation_loss"
        validates = last or self.step % validate_every == 0 or compares
        validation_loss = self._validate() if self.validation and validates else None
        if last or (self.task.probe_every and self.step % self.task.probe_every == 0):
            self._probe()
        if saves:
            began = time.perf_counter()
            self._save(validation_loss)
            self.worker.reporter.metrics(self.step, {metrics.CHECKPOINT_BLOCKING_SECONDS: time.perf_counter() - began})

    def _log(self, batch: Batch) -> None:
        """Report the steps since the last log step. A collective call."""
        with self.stopwatch.logging():
            digest, *bad = self._summed(
                torch.tensor(
                    [keys_digest(batch.keys, self.first_slot), *self.loader.bad.take_counts()],
                    device=self.worker.device,
                )
            ).tolist()
            batch_size = self.config.training.batch_size
            losses, norms = self.step_log.take(batch_size, self.worker.world_size)
            report = self.guard.check(self.logged + 1, losses, norms)
            rates = self.stopwatch.lap(self.step - self.logged, batch_size)
            self.logged = self.step
            values = {
                metrics.LR: self.lr,
                metrics.EPOCH: self.step / self.record.order.batches_per_epoch,
                metrics.BATCH_DIGEST: float(digest % KEYS_DIGEST_RANGE),
                **report.metrics(),
                **rates,
                **used_memory(self.worker.device),
                **self._mfu(rates[metrics.IMAGES_PER_SECOND]),
            }
            values |= {
                metrics.bad_samples(cause): float(count) for cause, count in zip(BAD_CAUSES, bad, strict=True) if count
            }
            self.worker.reporter.metrics(self.step, values)
            for text in report.notes():
                self.worker.reporter.note(self.step, text)
            self._report_bad_samples()

    def _mfu(self, images_per_second: float) -> dict[str, float]:
        device, flops = self.worker.device, self.task.flops_per_image
        in_bf16 = device.type == "cuda" and self.autocast == torch.bfloat16  # the peak is that of bf16
        peak = gpu_peak_flops(torch.cuda.get_device_name(device)) if in_bf16 else None
        if not peak or not flops:
            return {}
        return {metrics.MFU: flops * images_per_second / (peak * self.worker.world_size)}

    def _validate(self) -> float | None:
        """Report metrics on the held-out data; returns the loss. A collective call."""
        with self.worker.control.phase("validation"):
            values = self.task.validate(self.bad_validation)
        self.worker.reporter.metrics(self.step, values)
        return values.get(metrics.VALIDATION_LOSS)

    def _probe(self) -> None:
        """Run the model on the task's probe batch. A thread draws the pictures and reports them."""
        self._wait_for_pictures()
        if self.probes and (draw := self.task.probe(self.step)) is not None:
            self.pictures = self.picture_thread.submit(self._report_probe, self.step, draw)

    def _report_probe(self, step: int, draw: Callable[[], ProbeResult]) -> None:
        """In a thread: report pictures, measures by layer and warnings."""
        result = draw()
        self.worker.reporter.metrics(step, result.metrics)
        for text in result.notes:
            self.worker.reporter.note(step, text)
        for name, png in result.pictures.items():
            self.worker.reporter.picture(step, name, png)

    def _wait_for_pictures(self) -> None:
        """Wait until the last probe is reported. Raises the error if drawing it has failed."""
        if self.pictures is not None:
            self.pictures.result()
            self.pictures = None

    def _save(self, validation_loss: float | None) -> None:
        """Report the probe and bad samples, then save a checkpoint. A run that resumes from it does not repeat them."""
        self._wait_for_pictures()
        self._report_bad_samples()
        with self.worker.control.phase("checkpoint"):
            self.worker.checkpoints.save(self.step, self.assembled, validation_loss)
        self.saved = self.step

    def _report_bad_samples(self) -> None:
        self._report_bad("training", self.loader.bad.causes)
        self._report_bad("validation", self.bad_validation)

    def _report_bad(self, split: str, causes: dict[str, str]) -> None:
        """Report the samples that this worker has not reported before."""
        reported = self.reported_bad[split]
        if new := {key: cause for key, cause in list(causes.items()) if key not in reported}:
            reported.update(new)
            self.worker.reporter.bad_samples(self.step, new, split)

    def _summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all workers, in place. A collective call."""
        if self.worker.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    # --- Finish -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Wait until checkpoints and reports have arrived, then release the parallel model."""
        self._wait_for_pictures()
        self.picture_thread.shutdown()
        self.worker.checkpoints.finish()
        self.worker.reporter.flush()
        if self.worker.world_size > 1:
            # Otherwise gloo can deadlock when the process group is destroyed.
            self.assembled = self.assembled._replace(trained=self.task.model)
            del self.optimizer_step
            gc.collect()
