"""Prefill and decoding speed, cache bytes and peak memory of all arms, side by side in one process.

Repetitions go round the arms, so that a machine whose speed moves is the same for all. All arms run the module path,
without the fused decoding steps that only some of them have.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hymba import cost
from hymba.config import HymbaConfig
from hymba.model.cache import HymbaCache
from hymba.model.hymba import Hymba
from hymba.study.study import Speed

CACHE_ELEMENT = 2  # bytes: caches are counted in 16 bits, as in the paper


def measure(
    configs: dict[str, HymbaConfig], speed: Speed, device: torch.device, advance: Callable[[], object] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Time fresh models of the arms (speed does not depend on what they learned) -> their numbers, by arm.

    Tokens a second of all rows together: the median, and the slowest and the fastest repetition; bytes.
    advance: called (repeats + 1) times for each arm
    """
    arms = {name: Timed(config, speed, device) for name, config in configs.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for repeat in range(speed.repeats + 1):
        for name, arm in arms.items():
            pair = arm.prefill(), arm.decode()
            if repeat:  # the first one warms up
                times[name].append(pair)
            advance()
    numbers = {}
    for name, arm in arms.items():
        prefill, decode = zip(*times[name], strict=True)
        numbers[name] = {
            "prefill": _rate(prefill, speed.batch * speed.context),
            "decode": _rate(decode, speed.batch * speed.steps),
            "cache_bytes": cache_bytes(configs[name], speed.context),
            "weight_bytes": sum(p.numel() * p.element_size() for p in arm.model.parameters()),
            "peak_memory": arm.peak_memory(),
        }
    return numbers


def cache_bytes(config: HymbaConfig, context: int) -> int:
    """Bytes that one row of so many tokens keeps, in 16 bits, with its share of the meta tokens' states: all of it."""
    return sum(cost.cache_bytes(config, 1, context, CACHE_ELEMENT).values())


class Timed:
    """A fresh model of an arm, and what is timed."""

    def __init__(self, config: HymbaConfig, speed: Speed, device: torch.device):
        self.speed, self.device = speed, device
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Hymba(config).to(device).eval()
            self.ids = torch.randint(3, config.vocab_size, (speed.batch, speed.context + speed.steps)).to(device)
        self.cache = self.new_cache()

    def new_cache(self) -> HymbaCache:
        return self.model.new_cache(self.speed.batch, self.speed.context + self.speed.steps)

    @torch.inference_mode()
    def prefill(self) -> float:
        """Seconds to read the prompts and compute the logits of their last tokens."""
        for row in range(self.speed.batch):
            self.cache.reset(row)
        return self._seconds(lambda: self._read(self.ids[:, : self.speed.context]))

    @torch.inference_mode()
    def decode(self) -> float:
        """Seconds to go on for some tokens, one after the other, behind the prompts."""
        steps = self.ids[:, self.speed.context :].split(1, dim=1)
        return self._seconds(lambda: [self._read(ids) for ids in steps])

    @torch.inference_mode()
    def peak_memory(self) -> int:
        """Bytes of tensors that live at once, at most, in a prefill and a decoding step, beside the weights: the cache
        and what is computed on the way."""

        def work() -> None:
            self.cache = self.new_cache()
            self.prefill()
            self._read(self.ids[:, -1:])

        del self.cache
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            work()
            return torch.cuda.max_memory_allocated(self.device) - before
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
        live = peak = 0
        events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak

    def _read(self, ids: Tensor) -> Tensor:
        return self.model.lm_head(self.model.hidden(ids, cache=self.cache)[:, -1])

    def _seconds(self, work: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _rate(seconds: tuple[float, ...], tokens: int) -> dict[str, float]:
    rates = sorted(tokens / s for s in seconds)
    return {"median": statistics.median(rates), "slowest": rates[0], "fastest": rates[-1]}
