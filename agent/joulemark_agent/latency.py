"""The figures of the latency phase: single stream, no prefix reuse. Pure.

Owns the definitions of TTFT, inter-token latency, prefill and decode speed. Not aware of phases, power or records: it
gets the samples. Seconds and tokens per second. Rates follow exo's methodology (bench/METHODOLOGY.md): decode is
(n − 1) ÷ (t_last − t_first), because the first token belongs to the prefill.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from joulemark.wire import Absent, LatencySample, Measure, Metric
from joulemark_agent.statistics import percentile, supports_percentile


def latency_metrics(samples: Sequence[LatencySample]) -> dict[str, Metric]:
    """ttft_*, itl_* (s) and prefill_rate, decode_rate (tok/s) of the samples; Absent where there are too few."""
    first = [sample.token_times_s[0] - sample.start_s for sample in samples if sample.token_times_s]
    between = [right - left for sample in samples for left, right in pairwise(sample.token_times_s)]
    return {
        **_percentiles("ttft", first, "times to first token"),
        **_percentiles("itl", between, "inter-token times, pooled over the samples"),
        "prefill_rate": _prefill_rate(samples),
        "decode_rate": _decode_rate(samples),
    }


def _percentiles(prefix: str, values: Sequence[float], what: str) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    for percent in (50, 95, 99):
        name = f"{prefix}_p{percent}"
        if not values:
            found[name] = Absent(reason=f"the latency phase gave no {what}")
        elif not supports_percentile(len(values), percent):
            needed = 100 // (100 - percent)
            found[name] = Absent(reason=f"{len(values)} {what}; the {percent}th percentile needs {needed}")
        else:
            found[name] = Measure(
                value=percentile(values, percent),
                unit="s",
                n=len(values),
                source=f"{what}, latency phase; linear between order statistics",
            )
    return found


def median_metric(values: Iterable[float], unit: str, source: str, absent: str) -> Metric:
    """The median, of several values with the smallest and the largest as low and high; Absent(`absent`) for none."""
    ordered = sorted(values)
    if not ordered:
        return Absent(reason=absent)
    if len(ordered) == 1:
        return Measure(value=ordered[0], unit=unit, n=1, source=source)
    return Measure(
        value=percentile(ordered, 50),
        unit=unit,
        n=len(ordered),
        low=ordered[0],
        high=ordered[-1],
        source=f"{source}; median, low and high are the smallest and the largest",
    )


def _prefill_rate(samples: Sequence[LatencySample]) -> Metric:
    rates = [
        sample.prompt_tokens / (sample.token_times_s[0] - sample.start_s)
        for sample in samples
        if sample.token_times_s and sample.token_times_s[0] > sample.start_s and sample.prompt_tokens > 0
    ]
    return median_metric(
        rates, "tok/s", "prompt tokens ÷ time to first token, latency phase", "the latency phase gave no first token"
    )


def _decode_rate(samples: Sequence[LatencySample]) -> Metric:
    rates = [
        (len(sample.token_times_s) - 1) / (sample.token_times_s[-1] - sample.token_times_s[0])
        for sample in samples
        if len(sample.token_times_s) > 1 and sample.token_times_s[-1] > sample.token_times_s[0]
    ]
    return median_metric(
        rates,
        "tok/s",
        "(tokens − 1) ÷ (last − first token's time), latency phase",
        "no sample of the latency phase has two tokens",
    )
