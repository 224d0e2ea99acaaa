"""`make bench`: the speeds that the product promises, as ratios from one run on one machine. Exit status 1 when one falls short.

Each figure sets the product against the barest loop that does the same work; the two sides take turns in slices of seconds, and the median
of the pairs' ratios counts. Needs a quiet machine: the first lines say how busy it was. Not part of the tests. Takes about forty minutes,
half of them for the exporter's figures; `--only` takes parts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from joulemark import documents, packs, sources
from joulemark.wire import PackItem
from joulemark_agent import doctor
from joulemark_agent.backends import Choice, Generated, GenerateRequest, Options, ScoreRequest, Token, llamacpp
from joulemark_agent.backends._llama_engine import Model
from joulemark_agent.backends._llama_session import LlamaSession
from joulemark_agent.machine import cpu_model, usable_cores
from joulemark_agent.planning import common_prefix
from joulemark_agent.sysfs import Roots
from tests.bench import engines, exports, kills, load, transfers
from tests.bench.loops import Batched, Prefill, Stream, counted
from tests.bench.pairs import Figure, Pairs, take_turns
from tests.fixtures.agent_process import AgentProcess

QUESTIONS_A_SLICE = 8
SCORER_PAIRS = 48
SHARING_PAIRS = 8
GENERATION_SLICES = 6
GENERATED_ITEMS = 36
STREAM_TOKENS = 64
STREAM_SLICE = 8
STREAM_PAIRS = 60
SAMPLER_SLICE = 32
SAMPLER_PAIRS = 100
AGENT_STARTS = 3

# Samples the process of the bench from another one, as the agent samples its worker.
SAMPLER = """
import sys, time
from joulemark_agent.profiles import load_profiles, match
from joulemark_agent.sampling import Sampler, open_sensors
from joulemark_agent.sysfs import Roots
roots = Roots()
sensors, absent = open_sensors(match(load_profiles(), roots), roots, int(sys.argv[1]))
sampler = Sampler(sensors, 0.1)
sampler.start()
print("started", flush=True)
sys.stdin.read()
trace = sampler.stop()
print(len(trace.times_s), flush=True)
"""


class Bench:
    """The model and the questions."""

    def __init__(self, path: Path, choices: Sequence[PackItem], problems: Sequence[PackItem], threads: int) -> None:
        self.model = Model(path, llamacpp.library())
        self.threads = threads
        self.scoring = [
            ScoreRequest(item.doc_id, item.prompt, tuple(" " + text for text in item.choices)) for item in choices
        ]
        self.generating = [
            GenerateRequest(item.doc_id, item.prompt, 256, ("Q:", "</s>", "<|im_end|>")) for item in problems
        ]

    def session(self) -> LlamaSession:
        """A session with a context of its own over the one loaded model."""
        return LlamaSession(self.model, Options(threads=self.threads, model_sha256="0" * 64))


# --- the figures ------------------------------------------------------------------------------------------------------
def measure_agent(_: Bench) -> Iterator[Figure]:
    """What the agent costs before it does anything: medians of three starts."""
    sizes: list[float] = []
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        agent = AgentProcess(Path(folder) / "agent")
        for _start in range(AGENT_STARTS):
            agent.stop()
            seconds.append(agent.start())
            agent.client.get("/api/device").raise_for_status()
            sizes.append(agent.resident_bytes() / 1e6)
        agent.stop()
    name = "agent: resident memory before a model is loaded"
    yield Figure(name, statistics.median(sizes), 70, "MB", at_least=False)
    yield Figure("agent: seconds from start to ready", statistics.median(seconds), 2, "s", at_least=False)


def measure_scorer(bench: Bench) -> Iterator[Figure]:
    """What the scorer adds to the engine's own work."""
    results = bench.session().score(bench.scoring[: QUESTIONS_A_SLICE * (SCORER_PAIRS + 2)])
    with counted() as count:

        def scored_tokens() -> float:
            before, started = count.tokens, time.perf_counter()
            assert sum(1 for _ in islice(results, QUESTIONS_A_SLICE)) == QUESTIONS_A_SLICE
            return (count.tokens - before) / (time.perf_counter() - started)

        pairs = take_turns(scored_tokens, Prefill(bench.model, bench.threads), SCORER_PAIRS)
    say("  scorer {:.1f} tok/s, bare 512-token decode {:.1f} tok/s".format(*pairs.rates()))
    yield pairs.figure("tokens/s inside the scorer ÷ bare 512-token decode calls", 0.95)


def measure_sharing(bench: Bench) -> Iterator[Figure]:
    """What sharing prefixes gains in scoring, against one request per (question, choice) without reuse."""
    by_key = {request.key: request for request in bench.scoring}
    results, alone = bench.session().score(bench.scoring[: QUESTIONS_A_SLICE * (SHARING_PAIRS + 1)]), bench.session()
    pairs = Pairs()
    for number in range(SHARING_PAIRS + 1):
        started = time.perf_counter()
        answered = list(islice(results, QUESTIONS_A_SLICE))
        together_s = (time.perf_counter() - started) / len(answered)
        # A question of middling length stands for its slice.
        middle = sorted(answered, key=lambda scored: scored.prompt_tokens)[len(answered) // 2]
        request = by_key[middle.key]
        started = time.perf_counter()
        for text in request.continuations:
            assert len(list(alone.score([ScoreRequest(0, request.prompt, (text,))]))) == 1
        if number:  # the first slice also reads the prefix, and warms up
            pairs.add(1 / together_s, 1 / (time.perf_counter() - started))
    say("  scorer {:.2f} questions/s, one by one {:.3f} questions/s".format(*pairs.rates()))
    yield pairs.figure("ARC 5-shot questions/s: scorer ÷ one request per (question, choice)", 10)


def measure_generation(bench: Bench) -> Iterator[Figure]:
    """What batching over the shared prefix gains in generation, and what it adds to the engine's own work."""
    session, alone = bench.session(), bench.session()
    requests = bench.generating[:GENERATED_ITEMS]
    by_key = {request.key: request for request in requests}
    # A first pass warms up and tells how long the answers are, so that the bare loop can do the same work.
    lengths = {result.key: result.new_tokens for result in session.generate(requests)}
    slots = session.facts().sequences
    prompts = {request.key: bench.model.tokenize(request.prompt) for request in requests}
    bare = Batched(
        bench.model,
        bench.threads,
        [(prompts[request.key], lengths[request.key]) for request in requests],
        slots,
        common_prefix(list(prompts.values())),
    )
    results = session.generate(requests)
    items, tokens = Pairs(), Pairs()
    together_s = alone_s = 0.0
    with counted() as count:
        # The first sequences are started before the clock, as the last ones are still going on when it stops.
        assert len(list(islice(results, slots))) == slots
        bare(slots)
        for _slice in range(GENERATION_SLICES):
            before, started = count.rows, time.perf_counter()
            answered: list[Generated] = list(islice(results, slots))
            spent_s = time.perf_counter() - started
            tokens.add((count.rows - before) / spent_s, bare(slots))
            started = time.perf_counter()
            for result in answered:
                assert len(list(alone.generate([by_key[result.key]]))) == 1
            together_s, alone_s = together_s + spent_s, alone_s + time.perf_counter() - started
            items.add(slots / spent_s, slots / (time.perf_counter() - started))
        results.close()
    say("  batched {:.3f} items/s, one at a time {:.3f} items/s".format(*items.rates()))
    name = "gsm8k_cot items/s: batched over the shared prefix ÷ one at a time"
    # Answers differ in length, so the same items on both sides and the ratio of the sums, not of single slices.
    yield Figure(name, alone_s / together_s, 3, spread=f"{GENERATION_SLICES * slots} items on both sides")
    say("  generation {:.1f} output tok/s, bare loop {:.1f} tok/s".format(*tokens.rates()))
    yield tokens.figure(f"gsm8k_cot output tokens/s ÷ bare batched loop of {slots} sequences", 0.9)


class Latency:
    """The product's own stream, as the latency phase times it, with the same length and restarts as the bare one."""

    def __init__(self, session: LlamaSession, prompt: str, length: int) -> None:
        self._session = session
        self._prompt = prompt
        self._length = self._done = length
        self._tokens: Iterator[Token] = iter(())

    def make_room(self, tokens: int) -> None:
        """Begin a new generation when so many tokens do not fit any more; its first token belongs to the prompt."""
        if self._done + tokens > self._length:
            self._tokens = self._session.stream(self._prompt, self._length + 1, Choice())
            next(self._tokens)
            self._done = 0

    def step(self) -> None:
        """One token."""
        next(self._tokens)
        self._done += 1


def time_slice(stream: Latency | Stream, tokens: int) -> float:
    """Tokens/s of a slice, after one token that is not timed."""
    stream.make_room(tokens + 1)
    stream.step()
    started = time.perf_counter()
    for _ in range(tokens):
        stream.step()
    return tokens / (time.perf_counter() - started)


def measure_stream(bench: Bench) -> Iterator[Figure]:
    """What the latency phase adds to a bare single-sequence loop of the same length after the same prompt."""
    prompt = bench.scoring[0].prompt
    ours = Latency(bench.session(), prompt, STREAM_TOKENS)
    theirs = Stream(bench.model, bench.threads, prompt, STREAM_TOKENS)
    pairs = take_turns(lambda: time_slice(ours, STREAM_SLICE), lambda: time_slice(theirs, STREAM_SLICE), STREAM_PAIRS)
    say("  latency phase {:.1f} tok/s, bare loop {:.1f} tok/s".format(*pairs.rates()))
    yield pairs.figure("decode tok/s in the latency phase ÷ bare single-sequence loop", 0.98)


def measure_sampler(bench: Bench) -> Iterator[Figure]:
    """What sampling at 10 Hz costs: a stream of tokens, the sampler's process stopped and continued in turns."""
    bare = Stream(bench.model, bench.threads, bench.scoring[0].prompt, 4 * SAMPLER_SLICE)
    with _sampler() as toggle:

        def slice_with(number: signal.Signals) -> float:
            toggle(number)
            return time_slice(bare, SAMPLER_SLICE)

        pairs = take_turns(lambda: slice_with(signal.SIGCONT), lambda: slice_with(signal.SIGSTOP), SAMPLER_PAIRS)
        toggle(signal.SIGCONT)
    say("  with the sampler {:.1f} tok/s, without {:.1f} tok/s".format(*pairs.rates()))
    yield pairs.figure("throughput with the sampler at 10 Hz ÷ without", 0.99)


@contextlib.contextmanager
def _sampler() -> Iterator[Callable[[signal.Signals], None]]:
    """A sampler that watches this process from another one, and how to stop and continue it."""
    command = [sys.executable, "-c", SAMPLER, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "started\n"
        yield process.send_signal
        process.stdin.close()
        ticks = int(process.stdout.readline())
        assert ticks > 2 * SAMPLER_PAIRS, f"the sampler ticked {ticks} times only"


def measure_engines(bench: Bench) -> Iterator[Figure]:
    """ONNX Runtime beside llama.cpp on the same weights, in float32 and in four bits, and optimum's graph beside ours: said, not judged, as
    nothing is required of them."""
    with tempfile.TemporaryDirectory(prefix="joulemark-bench-") as folder:
        for contest in engines.contests(Path(folder), bench.threads):
            one, other = contest.names
            for work, pairs in engines.compare(contest.sessions, bench.scoring, bench.generating):
                ours, theirs = pairs.rates()
                ratio = f"{statistics.median(pairs.ratios):.2f} times"
                say(f"  {contest.held}, {work}: {one} {ours:.1f}, {other} {theirs:.1f} per second, {ratio}")
    yield from ()


def measure_postgresql(measure: Callable[..., Iterator[Figure]]) -> Iterator[Figure]:
    """The same on a PostgreSQL server of its own."""
    with load.postgresql() as url:
        yield from measure(say, database=url)


PARTS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "agent": measure_agent,
    "scorer": measure_scorer,
    "sharing": measure_sharing,
    "generation": measure_generation,
    "stream": measure_stream,
    "sampler": measure_sampler,
    "engines": measure_engines,
    "push": lambda _: transfers.measure_push(say),
    "grid": lambda _: load.measure_grid(say),
    "fleet": lambda _: load.measure_fleet(say),
    "grid-postgresql": lambda _: measure_postgresql(load.measure_grid),
    "fleet-postgresql": lambda _: measure_postgresql(load.measure_fleet),
    "kills": lambda _: kills.measure_kills(say),
    "large": lambda _: exports.measure_large(say),
    "gptq": lambda _: exports.measure_gptq(say),
    "methods": lambda _: exports.measure_methods(say),
}


ON_DEMAND = ("grid", "fleet", "grid-postgresql", "fleet-postgresql", "kills")
"""Parts that measure the host or take hours: only with `--only`."""


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
        if finding.area in ("contention", "memory bandwidth"):
            say(f"{finding.area} before: {finding.status}: {finding.text}")
    bench = Bench(model, choices, problems, usable_cores(roots))
    done: list[Figure] = []
    for part in options.only or [part for part in PARTS if part not in ON_DEMAND]:
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
