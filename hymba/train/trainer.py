"""The training loop.

A step is a function of its number, the weights and the optimisers' state: data, learning rate and the seed of dropout
follow from the number (`schedule.py`). So a run that is stopped and continued computes what it would have computed.

The loop never waits for the device: losses stay there, and are read every `log_every` steps, before each validation
and before each checkpoint. A run is a folder: config.toml, log.jsonl, checkpoints/, and at the end final/.
"""

import math
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hymba.cost import training_operations
from hymba.engine.llm import LLM
from hymba.engine.sampling import SamplingParams
from hymba.errors import UserError
from hymba.model.hymba import Hymba
from hymba.tokenizer import Tokenizer
from hymba.train import config as config_file
from hymba.train.card import write_final
from hymba.train.checkpoint import Checkpoints
from hymba.train.config import TrainConfig
from hymba.train.data import IGNORED_LABEL, Corpus, Rows, TrainingRows, ValidationRows
from hymba.train.graph import Recorded
from hymba.train.optim import allocate_state, make_optimizers, set_lr, state_tensors
from hymba.train.parallel import World, whole
from hymba.train.report import LOG, Report, Stopwatch, peak_memory, read_log
from hymba.train.schedule import Schedule, Step
from hymba.train.speed import peak_operations

CONFIG = "config.toml"
FINAL = "final"
# primes: seeds of different steps and processes do not meet
STEP_SEED, RANK_SEED = 1_000_003, 7_368_787
# the mean of recent losses, against which a jump is one: mostly of the last 50 steps
RECENT = 0.98


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    folder: Path
    step: int  # steps that are done
    steps: int  # of the whole run
    stopped_by: str | None  # the signal that ended it early; the same call continues it

    @property
    def finished(self) -> bool:
        return self.step == self.steps

    @property
    def log(self) -> list[dict]:
        """Records of `log.jsonl`."""
        return read_log(self.folder / LOG)


def train(config: TrainConfig, folder: str | Path) -> Result:
    """Train a model, or continue where an earlier call with the same folder ended.

    Ctrl-C and SIGTERM save and return. Raises `UserError` if the run in the folder has another config, if the loss
    becomes NaN or explodes, or if the disk is full; checkpoints written before that stay good.
    """
    folder = Path(folder)
    world = World(config.run.device, config.run.parallel)
    try:
        _claim(config, folder, world)
        return Trainer(config, folder, world).run()
    finally:
        world.close()


def _claim(config: TrainConfig, folder: Path, world: World) -> None:
    """Make the run folder, or see that it is of the same run. The first process decides for all."""
    problem = None
    if world.first:
        try:
            if (folder / CONFIG).exists():
                changed = config_file.difference(config_file.load(folder / CONFIG), config)
                if changed:
                    problem = f"{folder} is a run with {changed}; name another folder, or put the setting back"
            if problem is None:
                config_file.save(config, folder / CONFIG)
        except UserError as error:
            problem = str(error)
    problem = world.tell(problem)
    if problem:
        raise UserError(problem)


class Trainer:
    """A run in progress."""

    def __init__(self, config: TrainConfig, folder: Path, world: World):
        self.config, self.folder, self.world = config, folder, world
        if world.sharded and config.optimizer.name == "muon":
            raise UserError("optimizer.name='muon' needs whole matrices; use run.parallel='ddp', or adamw")
        if config.run.graph and (world.device.type != "cuda" or world.size > 1):
            raise UserError("run.graph needs a GPU, and one process; leave it out here")
        self.schedule = Schedule(config)
        self.tokenizer = _common_tokenizer(config)
        self.model = _initial_model(config).to(world.device).train()
        self.model.checkpoint_blocks, self.model.dropout = config.run.checkpoint_blocks, config.dropout
        _freeze_unused(self.model)
        if config.run.compile:
            for block in self.model.blocks:
                block.compile()
        self.forward = world.wrap(self.model)
        self._recorded: dict[torch.Size, Recorded] = {}
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(self.model, config.optimizer)
        self.average = [p.detach().clone() for p in self.parameters] if config.ema else []
        self.rows = [TrainingRows(s.sources, s.length, config.seed + i) for i, s in enumerate(config.stages)]
        self.checkpoints = Checkpoints(folder, config.run.keep, world, [rows.fingerprint for rows in self.rows])
        self.messages: list[str] = []
        self.done = self.checkpoints.restore(self._state_to_load, self.messages.append) or 0
        self.signal: str | None = None
        self.recent: float | None = None  # mean of recent losses
        self._unread: list[tuple[Step, Tensor, Tensor]] = []  # step, loss, norm of the gradient
        self._saved = self.done

    # ------------------------------------------------------------------------------------------------------- the loop

    def run(self) -> Result:
        c, steps = self.config, len(self.schedule)
        self.report = Report(c, self.folder, steps, self.done, self.world.first)
        loader = ThreadPoolExecutor(1, thread_name_prefix="rows")
        try:
            with _signals(self):
                self._introduce()
                if self.done == steps and (self.folder / FINAL).exists():
                    return Result(self.folder, self.done, steps, None)
                self.peak = peak_operations(self.world.device, c.precision)
                self.stopwatch = Stopwatch()
                if self._unmeasured():
                    with self._averaged():
                        self._validate()
                    self.stopwatch.restart()
                upcoming = loader.submit(self._load, self.done)
                while self.done < steps:
                    step, batch = self.schedule[self.done], upcoming
                    if step.number + 1 < steps:
                        upcoming = loader.submit(self._load, step.number + 1)
                    stop = self._step(step, batch)
                    self.done += 1
                    self._after(stop)
                    if stop:
                        self.signal = self.signal or "another process's signal"
                        break
                if self.done == steps:
                    self._finish()
                self.checkpoints.wait()
        except OSError as error:
            kept = self.checkpoints.newest()
            raise UserError(
                f"{error.filename or self.folder}: {error.strerror or error}; "
                + (f"the last whole checkpoint is {kept}" if kept else "there is no checkpoint yet")
            ) from error
        finally:
            loader.shutdown(cancel_futures=True)
            self.checkpoints.close()
            self.report.close()
        return Result(self.folder, self.done, steps, self.signal)

    def _step(self, step: Step, batch: "Future[list[tuple[Rows, int]]]") -> bool:
        """One update of the weights -> whether any process was told to stop."""
        parts = batch.result()
        # every token weighs the same, in whatever process and part of the batch it is
        targets, stop = self.world.sum([sum(count for _, count in parts), self.signal is not None])
        torch.manual_seed(self.config.seed + STEP_SEED * (step.number + 1) + RANK_SEED * self.world.rank)  # for dropout
        loss = torch.zeros((), device=self.world.device)
        if self.config.run.graph and len(parts) == 1:
            loss = self._replay(parts[0][0])
            parts = []
        for i, (rows, count) in enumerate(parts):
            share = count / max(1.0, targets)
            with self.world.accumulate(self.model, last=i + 1 == len(parts)):
                mean = self._loss(self.forward, rows)
                (mean * (share * self.world.size)).backward()  # processes average their gradients
            loss += mean.detach() * share
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip or math.inf)
        set_lr(self.optimizers, step.lr)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average:
            decay = min(self.config.ema, (step.number + 1) / (step.number + 10))  # a young run forgets its beginnings
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        self._unread.append((step, loss, norm))
        return stop > 0

    def _replay(self, rows: Rows) -> Tensor:
        """The loss of a whole batch, and its gradients, by a CUDA graph."""
        shape = rows.input_ids.shape
        if shape not in self._recorded:
            self._recorded[shape] = Recorded(partial(self._loss, self.model), self.parameters, rows)
        return self._recorded[shape](rows).clone()

    def _loss(self, model, rows: Rows) -> Tensor:
        with self._precision():
            return model(rows.input_ids, document_ids=rows.document_ids, labels=rows.labels)

    def _precision(self):
        bfloat16 = self.config.precision == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=bfloat16)

    def _load(self, number: int) -> list[tuple[Rows, int]]:
        """This process's rows of a step, in parts of at most `micro_tokens`, with the number of their targets."""
        step = self.schedule[number]
        mine = self.world.share(step.rows)
        rows = self.rows[step.stage].rows(step.first_row + mine.start, len(mine))
        return [(self._place(part), _targets(part)) for part in self._parts(rows)]

    def _parts(self, rows: Rows) -> list[Rows]:
        count, length = rows.input_ids.shape
        size = max(1, self.config.run.micro_tokens // length)
        return [Rows(*(x[first : first + size] for x in rows)) for first in range(0, count, size)]

    def _place(self, rows: Rows) -> Rows:
        """Rows on the device; the copy is not waited for."""
        if self.world.device.type != "cuda":
            return rows
        return Rows(*(x.pin_memory().to(self.world.device, non_blocking=True) for x in rows))

    # --------------------------------------------------------------------------------------------- between the steps

    def _after(self, stop: bool) -> None:
        """Reports, measurements and checkpoints that are due after a step."""
        c, last = self.config, stop or self.done == len(self.schedule)
        self.checkpoints.check()
        measure = not stop and (last or self.done % c.validation.every == 0)
        write = not stop and bool(c.samples.prompts) and (last or self.done % c.samples.every == 0)
        save = last or self.done % c.run.save_every == 0
        if measure or write or save or self.done % c.run.log_every == 0:
            self._read_losses()
        if save and self.done != self._saved:
            self.checkpoints.save(self.done, self._state())
            self._saved = self.done
        if measure or write:
            with self._averaged():
                if measure:
                    self._validate()
                if write:
                    self._sample()
            self.peak = max(self.peak, peak_operations(self.world.device, c.precision))  # shared machines vary
        if measure or write or save:
            self.stopwatch.restart()

    def _unmeasured(self) -> bool:
        """Whether the loss was to be measured at the checkpoint from which the run goes on, and it ended before."""
        due = self.done > 0 and (self.done == len(self.schedule) or self.done % self.config.validation.every == 0)
        records = read_log(self.folder / LOG) if due and self.world.first else []
        known = {
            record["source"] for record in records if record["kind"] == "validation" and record["step"] == self.done
        }
        return self.world.tell(due and not known.issuperset(self._validation_sources()))

    def _read_losses(self) -> None:
        """Read what the device has computed, stop if it makes no sense, report it."""
        if not self._unread:
            return
        steps, losses, norms = zip(*self._unread, strict=True)
        self._unread = []
        losses = self.world.sum(torch.stack(losses).tolist())
        norms = torch.stack([whole(norm) for norm in norms]).tolist()
        seconds = self.stopwatch.lap()
        records = []
        for step, loss, norm in zip(steps, losses, norms, strict=True):
            self._check_loss(step, loss, norm)
            record = {"step": step.number + 1, "loss": loss, "gradient_norm": norm}
            records.append(record | {"lr": step.lr * self.config.optimizer.lr, "tokens": step.tokens})
        speed = sum(step.rows * step.length for step in steps) / seconds
        operations = training_operations(self.config.model, steps[-1].length)
        records[-1] |= {
            "tokens_per_second": speed,
            "mfu": speed * operations / (self.peak * self.world.size),
            "peak_memory": peak_memory(self.world.device),
        }
        self.report.steps(records)

    def _check_loss(self, step: Step, loss: float, norm: float) -> None:
        """Raises `UserError` for a loss that is NaN or exploded."""
        exploded = self.recent is not None and loss > self.recent + self.config.run.loss_jump
        if not (math.isfinite(loss) and math.isfinite(norm)) or exploded:
            what = f"the loss jumped from {self.recent:.3f} to {loss:.3f}" if exploded else f"the loss is {loss:.3f}"
            if math.isfinite(loss) and not exploded:
                what = f"the gradient's norm is {norm}"
            self.checkpoints.wait()
            kept = self.checkpoints.newest()
            stage, rows = self.config.stages[step.stage], f"{step.first_row} to {step.first_row + step.rows - 1}"
            message = (
                f"{what} at step {step.number + 1} (stage {stage.name!r}, rows {rows}); "
                + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet")
                + "; a lower optimizer.lr, a lower optimizer.clip or a longer warmup_tokens may help"
            )
            self.report.event("stopped", step=step.number + 1, reason=message)
            raise UserError(message)
        self.recent = loss if self.recent is None else RECENT * self.recent + (1 - RECENT) * loss

    @torch.no_grad()
    def _validate(self) -> None:
        """The loss on every validation split, in nats a token and in bits a byte of text."""
        v = self.config.validation
        length = v.length or self.config.stages[-1].length
        self.model.eval()
        for path in self._validation_sources():
            data = ValidationRows(path, length, v.stride or None)
            total, targets = torch.zeros((), dtype=torch.float64, device=self.world.device), 0
            for part, count in self._validation_parts(data):
                total += self._loss(self.model, part).double() * count
                targets += count
            nats, targets = self.world.sum([total.item(), targets])
            self.report.validation(self.done, path, nats / max(1, targets), data.bits_per_byte(nats))
        self.model.train()

    def _validation_sources(self) -> Sequence[str]:
        paths = self.config.validation.sources
        return paths or [path for path in self.config.sources if "validation" in Corpus(path).manifest["splits"]]

    def _validation_parts(self, data: ValidationRows) -> Iterator[tuple[Rows, int]]:
        """This process's share. All processes get the same number of parts, some of them repeated with weight 0."""
        part: Rows | None = None
        for i, part in enumerate(data.batches(max(1, self.config.run.micro_tokens // data.length))):
            if i % self.world.size == self.world.rank:
                mine = part
            if i % self.world.size == self.world.size - 1:
                yield self._place(mine), _targets(mine)
        if part is not None and (left := (i + 1) % self.world.size):
            yield self._place(part), _targets(mine) if self.world.rank < left else 0

    def _sample(self) -> None:
        """Texts that the model writes now."""
        s = self.config.samples
        model = self._whole_model()
        if self.world.first:
            model.eval()
            room = min(model.config.max_length, 1024 + s.max_tokens)
            llm = LLM.of(model, self.tokenizer, max_batch=len(s.prompts), max_length=room)
            params = SamplingParams(max_tokens=s.max_tokens, temperature=s.temperature, seed=self.config.seed)
            for prompt, output in zip(s.prompts, llm.generate(list(s.prompts), params), strict=True):
                self.report.sample(self.done, prompt, output.text)
        self.model.train()

    def _finish(self) -> None:
        """Write final/: the model in the official layout, its tokenizer, and its card."""
        with self._averaged():
            model = self._whole_model()
            if self.world.first:
                write_final(model, self.tokenizer, self.config, self.folder, FINAL)
        self.report.say(f"finished: {self.folder / FINAL}")

    def _introduce(self) -> None:
        for message in self.messages:
            self.report.say(message)
        count = sum(p.numel() for p in self.model.parameters())
        text = f"{count / 1e6:.2f} M parameters, {self.schedule.tokens:,} tokens in {len(self.schedule):,} steps"
        processes = f", {self.world.size} processes" if self.world.size > 1 else ""
        self.report.say(f"{text}, on {self.world.device}{processes}")
        if self.done:
            self.report.say(f"going on after step {self.done}")

    # ------------------------------------------------------------------------------------------------------ the state

    def _state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by names that do not depend on the number of processes."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.numel()]
        state = {f"model.{name}": p.detach() for name, p in named}
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        if self.average:
            state |= {f"average.{name}": x for name, x in zip(trained, self.average, strict=True)}
        tensors = state_tensors(self.model, self.optimizers)
        return state | {f"optimizer.{name}": x for name, x in tensors.items()}

    def _state_to_load(self) -> dict[str, Tensor]:
        allocate_state(self.model, self.optimizers)
        return self._state()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place, where there are any."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if self.average:
            for parameter, average in zip(self.parameters, self.average, strict=True):
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)
            if self.world.sharded:  # embedding and norm stay gathered after a forward pass, now with old values
                self.model.reshard()

    def _whole_model(self) -> Hymba:
        """The model, put together from its shards if there are any; all processes must ask."""
        if not self.world.sharded:
            return self.model
        weights = {name: whole(p.detach()) for name, p in self.model.named_parameters()}
        model = Hymba(self.config.model).to(self.world.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        return model


def _initial_model(config: TrainConfig) -> Hymba:
    """Fresh weights, or those of the checkpoint that training starts from; float32."""
    torch.manual_seed(config.seed)
    model = Hymba(config.model)
    if config.checkpoint:
        loaded = Hymba.from_pretrained(config.checkpoint, dtype=torch.float32).state_dict()
        for name, x in model.state_dict().items():
            if name not in loaded or loaded[name].shape != x.shape:
                raise UserError(
                    f"model.from={config.checkpoint!r} has no {name} of shape {tuple(x.shape)}; "
                    "leave out of [model] what changes sizes"
                )
        model.load_state_dict(loaded)
    return model


def _freeze_unused(model: Hymba) -> None:
    """Parameters that no loss depends on: DDP would wait for their gradients."""
    for plan, block in zip(model.config.layers, model.blocks, strict=True):
        if plan.attends and not plan.produces_kv:
            block.heads.attention.k_norm.requires_grad_(False)
    if model.config.n_meta == 0:
        model.meta_tokens.requires_grad_(False)


def _targets(rows: Rows) -> int:
    """How many tokens the loss of these rows is the mean of."""
    return int((rows.labels != IGNORED_LABEL).sum())


def _common_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer that all prepared folders share. Raises `UserError` if there are several, or it is too large."""
    first, *others = (Corpus(path) for path in [*config.sources, *config.validation.sources])
    for other in others:
        if other.manifest["tokenizer"]["sha256"] != first.manifest["tokenizer"]["sha256"]:
            raise UserError(f"{other.path} has another tokenizer than {first.path}; prepare both with the same one")
    if first.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer of {first.path}, "
            f"{first.vocab_size}"
        )
    return first.tokenizer()


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C and SIGTERM let the step end, then save and stop; a second Ctrl-C stops at once."""

    def ask(number: int, _frame) -> None:
        if trainer.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.signal = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():  # others cannot be told
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
