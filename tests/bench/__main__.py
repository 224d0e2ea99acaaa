"""`make bench`: the speeds that the product promises, as ratios from one run on one machine. Exit status 1 when one falls short.

Each figure sets the product against the barest loop that does the same work; the two sides take turns and the medians of the rounds are
compared, so that a drift of the machine hits both. Needs a quiet machine: the first line says how busy it was. Not part of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joulemark import documents, packs, sources
from joulemark.wire import PackItem
from joulemark_agent import doctor
from joulemark_agent.backends import Choice, GenerateRequest, Options, ScoreRequest
from joulemark_agent.backends._llama_engine import Context
from joulemark_agent.backends.llamacpp import LlamaSession, open_session
from joulemark_agent.machine import cpu_model, usable_cores
from joulemark_agent.planning import common_prefix
from joulemark_agent.sysfs import Roots
from tests.fixtures.agent_process import AgentProcess

ROUNDS = 3
SCORED_QUESTIONS = 32
ALONE_QUESTIONS = 4
GENERATED_ITEMS = 32
SEQUENCES = 16
STREAMED_TOKENS = 64
SAMPLER_ROUNDS = 9

# Samples this process from another one, as the agent samples its worker.
SAMPLER = """
import os, sys, time
from joulemark_agent.profiles import load_profiles, match
from joulemark_agent.sampling import Sampler, open_sensors
from joulemark_agent.sysfs import Roots
roots = Roots()
sensors, absent = open_sensors(match(load_profiles(), roots), roots, int(sys.argv[1]))
sampler = Sampler(sensors, 0.1)
for line in sys.stdin:
    sampler.start()
    break
sys.stdin.read()
sampler.stop()
"""


@dataclass(frozen=True)
class Figure:
    """One line of the result. `at_least` False: the measured value must not exceed the required one."""

    name: str
    measured: float
    required: float
    unit: str = "×"
    at_least: bool = True

    @property
    def reached(self) -> bool:
        """Whether the requirement holds."""
        return self.measured >= self.required if self.at_least else self.measured <= self.required

    def line(self) -> str:
        """Name, measured, required."""
        sign = "≥" if self.at_least else "≤"
        word = "ok" if self.reached else "SHORT"
        return f"{self.name:<66} {self.measured:>8.3f} {self.unit:<3} {sign} {self.required:<6g} {word}"


def ratio(ours: Callable[[], float], theirs: Callable[[], float], rounds: int = ROUNDS) -> tuple[float, float]:
    """Medians of both sides, taken in turns after one round of each that does not count."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


class Bench:
    """The model, the questions, and the loops."""

    def __init__(self, model: Path, choices: Sequence[PackItem], problems: Sequence[PackItem], threads: int) -> None:
        options = Options(threads=threads, model_sha256="0" * 64, sequences=SEQUENCES)
        session = open_session(model, options)
        assert isinstance(session, LlamaSession)
        self.session = session
        self.model: Any = session._model  # pyright: ignore[reportPrivateUsage]
        self.threads = threads
        self.scoring = [
            ScoreRequest(item.doc_id, item.prompt, tuple(" " + text for text in item.choices))
            for item in choices[:SCORED_QUESTIONS]
        ]
        self.generating = [
            GenerateRequest(item.doc_id, item.prompt, 256, ("Q:", "</s>", "<|im_end|>"))
            for item in problems[:GENERATED_ITEMS]
        ]

    def bare(self, cells: int, sequences: int) -> Context:
        """A context of its own for a bare loop."""
        return Context(self.model, cells, sequences, 512, self.threads)

    # --- scoring ------------------------------------------------------------------------------------------------------
    def scored_questions(self) -> float:
        """Questions/s of the scorer."""
        started = time.perf_counter()
        assert len(list(self.session.score(self.scoring))) == len(self.scoring)
        return len(self.scoring) / (time.perf_counter() - started)

    def questions_alone(self) -> float:
        """Questions/s of one request per (question, choice) without reuse, same engine and threads."""
        some = self.scoring[:: len(self.scoring) // ALONE_QUESTIONS][:ALONE_QUESTIONS]
        started = time.perf_counter()
        for request in some:
            for text in request.continuations:
                list(self.session.score([ScoreRequest(0, request.prompt, (text,))]))
        return len(some) / (time.perf_counter() - started)

    def scored_tokens(self) -> float:
        """Tokens/s that pass through the engine while the scorer works."""
        with counted() as count:
            started = time.perf_counter()
            list(self.session.score(self.scoring))
            return count[0] / (time.perf_counter() - started)

    def bare_prefill(self, context: Context) -> float:
        """Tokens/s of bare 512-token decode calls; only the calls are timed."""
        spent = 0.0
        for _ in range(4):
            context.reset()
            context.clear_batch()
            for position in range(512):
                context.add(1000 + position, position, (0,), position == 511)
            started = time.perf_counter()
            context.decode()
            spent += time.perf_counter() - started
        return 4 * 512 / spent

    # --- generation ---------------------------------------------------------------------------------------------------
    def generated(self) -> tuple[float, float]:
        """Items/s and output tokens/s of the batched generation, shared prefix included."""
        started = time.perf_counter()
        results = list(self.session.generate(self.generating))
        spent = time.perf_counter() - started
        return len(results) / spent, sum(result.new_tokens for result in results) / spent

    def generated_alone(self) -> float:
        """Items/s when each item is generated by itself, reading its whole prompt again."""
        some = self.generating[::4]
        started = time.perf_counter()
        for request in some:
            list(self.session.generate([request]))
        return len(some) / (time.perf_counter() - started)

    def bare_batched(self, context: Context, steps: int) -> float:
        """Output tokens/s of a bare loop: the same prefix once, the same own parts of the prompts, then `steps` steps of all sequences."""
        tokens = [self.model.tokenize(request.prompt) for request in self.generating[:SEQUENCES]]
        prefix = common_prefix(tokens)
        context.reset()
        started = time.perf_counter()
        feed(context, tokens[0][:prefix], 0, 0)
        for sequence, prompt in enumerate(tokens, start=1):
            context.copy(0, sequence)
            feed(context, prompt[prefix:], prefix, sequence)
        for step in range(steps):
            context.clear_batch()
            for sequence, prompt in enumerate(tokens, start=1):
                context.add(500 + step, len(prompt) + step, (sequence,), True)
            context.decode()
        return (steps + 1) * len(tokens) / (time.perf_counter() - started)

    # --- single stream ------------------------------------------------------------------------------------------------
    def streamed(self) -> float:
        """Decode tokens/s as the latency phase times them."""
        times = [time.monotonic() for _ in self.session.stream(self.scoring[0].prompt, STREAMED_TOKENS, Choice())]
        return (len(times) - 1) / (times[-1] - times[0])

    def bare_stream(self, context: Context) -> float:
        """Tokens/s of a bare single-sequence decode loop of the same length after the same prompt."""
        prompt = self.model.tokenize(self.scoring[0].prompt)
        context.reset()
        feed(context, prompt, 0, 0)
        started = time.perf_counter()
        for step in range(STREAMED_TOKENS - 1):
            context.clear_batch()
            context.add(500 + step, len(prompt) + step, (0,), True)
            context.decode()
        return (STREAMED_TOKENS - 1) / (time.perf_counter() - started)


def feed(context: Context, tokens: Sequence[int], start: int, sequence: int) -> None:
    """Decode tokens in full batches; the last one with logits."""
    for begin in range(0, len(tokens), context.batch_tokens):
        context.clear_batch()
        for offset in range(begin, min(begin + context.batch_tokens, len(tokens))):
            context.add(tokens[offset], start + offset, (sequence,), offset == len(tokens) - 1)
        context.decode()


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the tokens of all decode calls while it is open."""
    count = [0]
    real = Context.decode

    def decode(self: Context) -> Any:
        count[0] += self.batched
        return real(self)

    Context.decode = decode  # type: ignore[method-assign]
    try:
        yield count
    finally:
        Context.decode = real  # type: ignore[method-assign]


@contextlib.contextmanager
def sampled() -> Iterator[None]:
    """A sampler at 10 Hz watches this process from another one."""
    import os

    command = [sys.executable, "-c", SAMPLER, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
        time.sleep(1.5)
        yield
        process.stdin.close()


def sampling_cost(bench: Bench) -> float:
    """Throughput with the sampler ÷ without, in turns."""

    def with_sampler() -> float:
        with sampled():
            return statistics.median(bench.streamed() for _ in range(3))

    def without() -> float:
        time.sleep(1.5)
        return statistics.median(bench.streamed() for _ in range(3))

    ours, theirs = ratio(with_sampler, without, SAMPLER_ROUNDS)
    say(f"  with the sampler {ours:.1f} tok/s, without {theirs:.1f} tok/s")
    return ours / theirs


def agent_figures() -> tuple[float, float]:
    """Resident memory (MB) before a model is loaded, and seconds from start to ready: medians of three starts."""
    sizes: list[float] = []
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        agent = AgentProcess(Path(folder) / "agent")
        for _ in range(ROUNDS):
            agent.stop()
            seconds.append(agent.start())
            agent.client.get("/api/device")
            sizes.append(agent.resident_bytes() / 1e6)
        agent.stop()
    return statistics.median(sizes), statistics.median(seconds)


def measure_agent(_: Bench) -> Iterator[Figure]:
    """What the agent costs before it does anything."""
    megabytes, seconds = agent_figures()
    yield Figure("agent: resident memory before a model is loaded", megabytes, 70, "MB", at_least=False)
    yield Figure("agent: seconds from start to ready", seconds, 2, "s", at_least=False)


def measure_scorer(bench: Bench) -> Iterator[Figure]:
    """What the scorer adds to the engine's own work."""
    prefill = bench.bare(512, 1)
    ours, theirs = ratio(bench.scored_tokens, lambda: bench.bare_prefill(prefill))
    prefill.close()
    say(f"  scorer {ours:.1f} tok/s, bare 512-token decode {theirs:.1f} tok/s")
    yield Figure("tokens/s inside the scorer ÷ bare 512-token decode calls", ours / theirs, 0.95)


def measure_stream(bench: Bench) -> Iterator[Figure]:
    """What the latency phase adds to it."""
    single = bench.bare(1024, 1)
    ours, theirs = ratio(bench.streamed, lambda: bench.bare_stream(single), SAMPLER_ROUNDS)
    single.close()
    say(f"  latency phase {ours:.1f} tok/s, bare loop {theirs:.1f} tok/s")
    yield Figure("decode tok/s in the latency phase ÷ bare single-sequence loop", ours / theirs, 0.98)


def measure_sampler(bench: Bench) -> Iterator[Figure]:
    """What sampling costs."""
    yield Figure("throughput with the sampler at 10 Hz ÷ without", sampling_cost(bench), 0.99)


def measure_sharing(bench: Bench) -> Iterator[Figure]:
    """What sharing prefixes gains in scoring."""
    ours, theirs = ratio(bench.scored_questions, bench.questions_alone)
    say(f"  scorer {ours:.2f} questions/s, one by one {theirs:.3f} questions/s")
    yield Figure("ARC 5-shot questions/s: scorer ÷ one request per (question, choice)", ours / theirs, 10)


def measure_generation(bench: Bench) -> Iterator[Figure]:
    """What batching over the shared prefix gains in generation, and what it adds to the engine's own work."""
    mean = sum(result.new_tokens for result in bench.session.generate(bench.generating)) / GENERATED_ITEMS
    batched = bench.bare(8192, SEQUENCES + 1)
    tokens, items, bare, alone = list[float](), list[float](), list[float](), list[float]()
    for _ in range(ROUNDS):
        per_item, per_token = bench.generated()
        items.append(per_item)
        tokens.append(per_token)
        bare.append(bench.bare_batched(batched, round(mean)))
        alone.append(bench.generated_alone())
    batched.close()
    ours, theirs = statistics.median(items), statistics.median(alone)
    say(f"  batched {ours:.3f} items/s, one at a time {theirs:.3f} items/s; {mean:.0f} new tokens an item")
    yield Figure("gsm8k_cot items/s: batched over the prefix ÷ one at a time", ours / theirs, 3)
    ours, theirs = statistics.median(tokens), statistics.median(bare)
    say(f"  generation {ours:.1f} output tok/s, bare loop of {SEQUENCES} sequences {theirs:.1f} tok/s")
    yield Figure(f"gsm8k_cot output tokens/s ÷ bare batched loop of {SEQUENCES} sequences", ours / theirs, 0.9)


PARTS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "agent": measure_agent,
    "scorer": measure_scorer,
    "stream": measure_stream,
    "sampler": measure_sampler,
    "sharing": measure_sharing,
    "generation": measure_generation,
}


def say(text: str) -> None:
    """A line now, not at the end."""
    print(text, flush=True)


def main() -> int:
    """Measure everything, print a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, help="a GGUF file; default: SmolLM2-135M-Instruct Q4_1")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part; may be given several times")
    options = parser.parse_args()
    roots, cache = Roots(), sources.default_cache()
    model = options.model or sources.fetch("smollm2-135m-instruct-q4_1", cache)
    choices = packs.render("arc_challenge_olmes", documents.load("arc_challenge", cache)).items
    problems = packs.render("gsm8k_cot", documents.load("gsm8k", cache)).items
    say(f"{cpu_model(roots)}, {usable_cores(roots)} cores, {model.name}, {time.strftime('%Y-%m-%d')}")
    for finding in doctor.examine(roots, Path()):
        if finding.area == "contention":
            say(f"contention before: {finding.status}: {finding.text}")
    bench = Bench(model, choices, problems, usable_cores(roots))
    done: list[Figure] = []
    for part in options.only or PARTS:
        for figure in PARTS[part](bench):
            done.append(figure)
            say(figure.line())
    short = [figure for figure in done if not figure.reached]
    say("")
    for figure in done:
        say(figure.line())
    say("all figures are reached" if not short else f"{len(short)} of {len(done)} figures fall short")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
