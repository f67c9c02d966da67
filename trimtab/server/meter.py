"""What `/metrics` tells, in Prometheus' text, under the names that vLLM's dashboards know."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter

from trimtab.server.link import Link

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
EACH = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
WHOLE = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)


class Histogram:
    """Counts of values up to each of some bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        total, lines = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}')
        return [*lines, f"{name}_sum{{{labels}}} {self._sum}", f"{name}_count{{{labels}}} {total}"]


class Meter:
    """Counts since this process began."""

    def __init__(self) -> None:
        self._prompt_tokens = self._tokens = 0
        self._finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0})
        self._times = {
            "vllm:time_to_first_token_seconds": Histogram(FIRST),
            "vllm:inter_token_latency_seconds": Histogram(EACH),
            "vllm:request_time_per_output_token_seconds": Histogram(EACH),
            "vllm:e2e_request_latency_seconds": Histogram(WHOLE),
        }

    def clock(self) -> Clock:
        """The time of a choice that was asked for now."""
        return Clock(self)

    def prompt(self, tokens: int) -> None:
        self._prompt_tokens += tokens

    def token(self) -> None:
        self._tokens += 1

    def finished(self, reason: str) -> None:
        self._finished[reason] += 1

    def took(self, what: str, seconds: float) -> None:
        self._times[f"vllm:{what}_seconds"].add(seconds)

    def text(self, link: Link) -> str:
        """All of it, in Prometheus' text format."""
        ready, state = link.ready, link.state
        model = _quoted(ready.model if ready else "")
        labels = f'model_name="{model}",engine="0"'
        lines: list[str] = []

        def say(name: str, kind: str, help: str, *rows: str) -> None:
            lines.extend((f"# HELP {name} {help}", f"# TYPE {name} {kind}", *rows))

        def gauge(name: str, help: str, value: float) -> None:
            say(name, "gauge", help, f"{name}{{{labels}}} {value}")

        def counter(name: str, help: str, value: float) -> None:
            say(name, "counter", help, f"{name}{{{labels}}} {value}")

        gauge("vllm:num_requests_running", "Requests that the engine runs.", state.running if state else 0)
        gauge("vllm:num_requests_waiting", "Requests that wait for a place.", state.waiting if state else 0)
        used = state.taken / max(state.pool, 1) if state else 0.0
        gauge("vllm:kv_cache_usage_perc", "Share of the pool of texts and adapters that is taken, 0 to 1.", used)
        counter("vllm:prompt_tokens_total", "Tokens of prompts.", self._prompt_tokens)
        counter("vllm:generation_tokens_total", "Tokens written.", self._tokens)
        name = "vllm:request_success_total"
        rows = (f'{name}{{{labels},finished_reason="{reason}"}} {n}' for reason, n in sorted(self._finished.items()))
        say(name, "counter", "Texts that ended, by why.", *rows)
        for name, times in self._times.items():
            say(name, "histogram", name.removeprefix("vllm:").replace("_", " ") + ".", *times.lines(name, labels))
        resident = _quoted(",".join(state.resident)) if state else ""
        name = "vllm:lora_requests_info"
        row = f'{name}{{max_lora="{len(link.adapters)}",running_lora_adapters="{resident}",waiting_lora_adapters=""}}'
        say(name, "gauge", "Adapters in memory, and when that was said.", f"{row} {time.time():.3f}")
        gauge("trimtab:engine_ready", "1 while the engine takes requests.", int(ready is not None))
        gauge("trimtab:adapter_loads", "Adapters read into memory since the engine began.", state.loads if state else 0)
        gauge("trimtab:adapter_evictions", "Adapters put out of memory again.", state.evictions if state else 0)
        gauge("trimtab:pages", "Pages of tokens that texts hold.", state.pages if state else 0)
        gauge("trimtab:engine_tokens", "Tokens written since the engine began.", state.tokens if state else 0)
        gauge("trimtab:engine_resident_bytes", "Memory of the engine's process.", state.rss if state else 0)
        drafted, accepted = (state.drafted, state.accepted) if state else (0, 0)
        gauge("trimtab:drafted_tokens", "Tokens that the draft wrote since the engine began.", drafted)
        gauge("trimtab:accepted_tokens", "Those of them that are the model's own.", accepted)
        gauge(
            "trimtab:draft_learns",
            "1 while the draft learns from what is corrected.",
            int(bool(state and state.learns)),
        )
        gauge("trimtab:draft_pieces", "Pieces of texts that it is still to learn from.", state.pieces if state else 0)
        gauge("trimtab:draft_updates", "Updates of the draft since the engine began.", state.updates if state else 0)
        return "\n".join(lines) + "\n"


class Clock:
    """When things happened to one choice."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._begun = meter, time.monotonic()
        self._first = self._last = 0.0
        self._tokens = 0
        self._ended = False

    def token(self) -> None:
        now = time.monotonic()
        if self._tokens:
            self._meter.took("inter_token_latency", now - self._last)
        else:
            self._first = now
            self._meter.took("time_to_first_token", now - self._begun)
        self._tokens, self._last = self._tokens + 1, now
        self._meter.token()

    def end(self, reason: str | None) -> None:
        """The first reason counts: a choice that was finished is not aborted afterwards. None: it never began."""
        if self._ended:
            return
        self._ended = True
        if reason is None:
            return
        self._meter.finished(reason if reason in ("stop", "length") else "abort")
        self._meter.took("e2e_request_latency", time.monotonic() - self._begun)
        if self._tokens > 1:
            self._meter.took("request_time_per_output_token", (self._last - self._first) / (self._tokens - 1))


def _quoted(text: str) -> str:
    """A label's value."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
