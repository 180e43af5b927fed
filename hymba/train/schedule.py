"""What every step does, as a function of its number: stage, rows, learning rate. So a step number is all that a
checkpoint has to remember of schedule and data.

Warmup, then stages in which the rate is constant or moves in a straight line: warmup-stable-decay (Hu et al., MiniCPM,
arXiv 2404.06395) in the paper's stages (general data, annealing on a better mixture, longer rows).
"""

from dataclasses import dataclass

from hymba.train.config import Stage, TrainConfig


@dataclass(frozen=True)
class Step:
    """One optimiser step."""

    number: int
    stage: int
    first_row: int  # of its stage's rows
    rows: int  # in all processes together
    length: int
    lr: float  # as a share of the optimiser's peak rates
    tokens: int  # seen when the step is done, since the beginning of the run


class Schedule:
    """The steps of a run: `schedule[n]` for n from 0 to `len(schedule)` - 1."""

    def __init__(self, config: TrainConfig):
        self._warmup = config.warmup_tokens
        self._stages: list[tuple[int, int, int, Stage]] = []  # first step, steps, rows of a step, stage
        first = 0
        for stage in config.stages:
            rows = max(1, config.batch_tokens // stage.length)
            steps = max(1, round(stage.tokens / (rows * stage.length)))
            self._stages.append((first, steps, rows, stage))
            first += steps
        self._length = first

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Step:
        if not 0 <= number < self._length:
            raise IndexError(f"there is no step {number} of {self._length}")
        tokens = 0
        for index, (first, steps, rows, stage) in enumerate(self._stages):  # noqa: B007
            if number < first + steps:
                break
            tokens += steps * rows * stage.length
        done = number - first
        tokens += (done + 1) * rows * stage.length
        lr = stage.lr_start + (stage.lr_end - stage.lr_start) * done / steps
        if self._warmup:
            lr *= min(1.0, tokens / self._warmup)
        return Step(number, index, done * rows, rows, stage.length, lr, tokens)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self[self._length - 1].tokens
