"""The ONNX backend: graphs with key-value memory on the CPU through ONNX Runtime.

Scoring walks `planning.plan` over one row of memory: the branches of a step stand behind the trunk side by side, hidden from one another by
a mask, until the next step takes their place; a graph that takes no such mask has one branch a step. Generation has one row of memory a
sequence, steps all of them together, and copies the prompts' common prefix instead of computing it again. Never reads a clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from joulemark.graph_form import HIDDEN
from joulemark.wire import EngineFacts
from joulemark_agent.backends import Choice, Generated, GenerateRequest, Options, Scored, ScoreRequest, Session, Token
from joulemark_agent.backends._generation import SHORT_PREFIX, Growing, Waiting, generate, prompt_of_stream
from joulemark_agent.backends._logits import log_probability
from joulemark_agent.backends._onnx_engine import Graph
from joulemark_agent.backends._onnx_memory import Beside, Memory, memory_of
from joulemark_agent.backends._onnx_tokenizer import OnnxTokenizer
from joulemark_agent.backends._scoring import Owner, score
from joulemark_agent.backends._token_choice import TokenChooser
from joulemark_agent.chat_template import render_template
from joulemark_agent.costs import Costs
from joulemark_agent.planning import Extend, Placed, Request, Retract, Step, common_prefix, plan

FORMATS = ("onnx",)
MODULES = ("numpy", "onnxruntime", "tokenizers")

SCORING_BRANCHES = 128
"""Branches of one step; they cost nothing but the mask."""
COSTS = Costs(call=6.0, position=0.0004)
"""About what timed calls of 1 to 512 tokens say (SmolLM2-135M in four bits, two cores of an EPYC): 6.3 ms a call, 1.1 ms a token, 0.5 µs a
token and position. They decide about speed only."""
GROWTH = 256
"""Memories are made for multiples of this many positions, so that they are seldom made anew."""


def open_session(path: Path, options: Options) -> Session:
    """Open `path`, whose tokenizer lies beside it. Raises MissingExtra without the engine, EngineFailed when it refuses the files."""
    graph = Graph(path, options.threads, options.beat)
    return OnnxSession(graph, OnnxTokenizer(path.parent, graph.facts.end_tokens), options)


class OnnxSession:
    """An opened graph and the memory that the last kind of request needed."""

    def __init__(self, graph: Graph, tokenizer: OnnxTokenizer, options: Options) -> None:
        self._graph: Graph | None = graph
        self._facts = graph.facts
        self._numpy = graph.numpy
        self._runtime = graph.runtime
        self._tokenizer = tokenizer
        self._options = options
        self._read = log_probability(graph.numpy, graph.facts.vocabulary)
        self._memory: Memory | None = None
        self._branches = graph.branches
        self._uneven = graph.uneven
        self._rows = options.sequences
        self._window = min(options.context_tokens or graph.facts.context_tokens, graph.facts.context_tokens)

    # --- facts --------------------------------------------------------------------------------------------------------
    def facts(self) -> EngineFacts:
        """What really runs; see the contract."""
        about = self._facts
        return EngineFacts(
            backend="onnx",
            engine="onnxruntime",
            version=f"onnxruntime {self._runtime.__version__}",
            build=str(self._runtime.get_build_info())[:4000],
            model=f"{about.architecture} {about.parameters / 1e6:.0f}M {about.quantization}"[:200],
            model_sha256=self._options.model_sha256,
            device="cpu",
            threads=self._options.threads,
            batch_tokens=self._options.batch_tokens,
            sequences=self._rows,
            context_tokens=self._window,
            kv_type="f32",
            flash_attention=False,
            branching=self._branches,
        )

    def count_tokens(self, text: str) -> int:
        """Prompt tokens of `text`."""
        return len(self._tokenizer.tokenize(text))

    def close(self) -> None:
        """Free memory and graph."""
        self._memory = None
        self._graph = None

    def _need(self, positions: int, rows: int) -> Memory:
        """A memory with at least this room, made anew only when the present one is too small."""
        assert self._graph is not None, "the session is closed"
        capacity = -(-positions // GROWTH) * GROWTH
        memory = self._memory
        if memory is None or memory.capacity < capacity or memory.rows < rows:
            self._memory = memory = None  # given back before the larger one is asked for
            self._memory = memory = memory_of(self._graph, rows, capacity)
        return memory

    def _prefill(self, memory: Memory, row: int, tokens: Sequence[int], past: int) -> Any:
        """Feed tokens in batches; the logits after the last one, (vocabulary,)."""
        logits = None
        for start in range(0, len(tokens), self._options.batch_tokens):
            part = tokens[start : start + self._options.batch_tokens]
            logits = memory.feed(row, part, past + start, [len(part) - 1])
        assert logits is not None, "a prompt has at least one token"
        return logits[0]

    # --- scoring ------------------------------------------------------------------------------------------------------
    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scored]:
        """See the contract."""
        return score(requests, self._tokenizer.tokenize, self._window, self._run_plan)

    def _run_plan(self, flat: list[Request], owner: Sequence[Owner]) -> Iterator[int]:
        batch = self._options.batch_tokens
        # A step's branches never exceed a batch, the trunk never exceeds the longest request.
        memory = self._need(max(request.decoded for request in flat) + batch, 1)
        trunk = 0
        for step in plan(flat, batch, SCORING_BRANCHES if self._branches else 1, COSTS):
            if isinstance(step, Retract):
                trunk = step.length
                yield from step.finished
                continue
            self._evaluate(memory, trunk, step, owner)
            if isinstance(step, Extend):
                trunk += len(step.placed)
            else:
                yield from step.finished

    def _evaluate(self, memory: Memory, trunk: int, step: Step, owner: Sequence[Owner]) -> None:
        assert not isinstance(step, Retract)
        placed, grows = step.placed, isinstance(step, Extend)
        reading = [(index, item) for index, item in enumerate(placed) if item.readings]
        beside = None
        if not grows and self._branches:
            beside = Beside([item.position for item in placed], self._bias(placed, trunk))
        tokens = [item.token for item in placed]
        rows = memory.feed(0, tokens, trunk, [index for index, _ in reading], beside, kept=grows)
        for row, (_, item) in zip(rows, reading, strict=True):
            values, best = self._read(row, [entry.target for entry in item.readings])
            for entry, value in zip(item.readings, values, strict=True):
                opened, index = owner[entry.request]
                opened.add(index, value, entry.target == best)

    def _bias(self, placed: Sequence[Placed], trunk: int) -> Any:
        """The mask of a step (tokens, trunk + tokens): of the tokens before it, each sees those whose branches hold all of its own."""
        numpy = self._numpy
        first = numpy.array([item.branches[0] for item in placed])
        last = numpy.array([item.branches[-1] for item in placed])
        seen = (first[None, :] <= first[:, None]) & (last[None, :] >= last[:, None])
        bias = numpy.zeros((len(placed), trunk + len(placed)), numpy.float32)
        bias[:, trunk:] = numpy.where(seen, 0, HIDDEN)
        return bias

    # --- generation ---------------------------------------------------------------------------------------------------
    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Generated]:
        """Greedy continuous batching; a finished sequence is replaced at once."""
        return generate(requests, self._tokenizer, self._window, self._batches)

    def _batches(self, waiting: list[Waiting]) -> Iterator[Generated]:
        prefix, memory = self._prepare(waiting)
        waiting = list(reversed(waiting))
        active: list[Growing] = []
        while waiting or active:
            while waiting and len(active) < self._rows:
                request, tokens = waiting.pop()
                sequence = Growing(request, tokens)
                row = self._prefill(memory, len(active), tokens[prefix:], prefix)
                active.append(sequence)
                yield from self._take(memory, active, [len(active) - 1], row[None], prefix)
            if active:
                rows = memory.step([item.token for item in active], [item.position for item in active])
                for item in active:
                    item.position += 1
                yield from self._take(memory, active, range(len(active)), rows, prefix)

    def _take(
        self, memory: Memory, active: list[Growing], rows: Sequence[int], logits: Any, prefix: int
    ) -> Iterator[Generated]:
        """The next token of each row; a row that ends gives its place to the last one."""
        for row, token in reversed(list(zip(rows, logits.argmax(-1).tolist(), strict=True))):
            result = active[row].advance(token, self._tokenizer)
            if result is None:
                continue
            last = active.pop()
            if row < len(active):
                memory.copy(len(active), row, prefix, last.position)
                active[row] = last
            yield result

    def _prepare(self, waiting: Sequence[Waiting]) -> tuple[int, Memory]:
        """Choose how many sequences run side by side, and put the common prefix in front of all of them."""
        assert self._graph is not None, "the session is closed"
        prefix = common_prefix([tokens for _, tokens in waiting])
        if prefix < SHORT_PREFIX:
            prefix = 0
        longest = max(len(tokens) + request.max_new_tokens for request, tokens in waiting)
        most = min(self._options.sequences, len(waiting))
        if not self._uneven:
            most = 1
        if self._options.memory_bytes is not None:
            row_bytes = (longest + GROWTH) * self._graph.position_bytes()
            most = max(1, min(most, self._options.memory_bytes // row_bytes))
        self._rows = most
        memory = self._need(longest, most)
        if prefix:
            self._prefill(memory, 0, waiting[0][1][:prefix], 0)
            memory.share(prefix, most)
        return prefix, memory

    # --- single stream ------------------------------------------------------------------------------------------------
    def stream(self, prompt: str, max_new_tokens: int, choice: Choice) -> Iterator[Token]:
        """One sequence, nothing reused; see the contract."""
        tokenizer = self._tokenizer
        tokens = prompt_of_stream(prompt, max_new_tokens, tokenizer, self._window)
        needed = len(tokens) + max_new_tokens
        memory = self._need(needed, 1)
        chooser = TokenChooser(self._numpy, choice, tokenizer.piece)
        row = self._prefill(memory, 0, tokens, 0)
        for position in range(len(tokens), needed):
            token, logprob, top = chooser(row)
            yield Token(token, tokenizer.piece(token), tokenizer.is_end(token), logprob, top)
            if position + 1 == needed:
                return
            row = memory.step([token], [position])[0]

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as prompt text by the model's own template, rendered in jinja2's immutable sandbox."""
        tokenizer = self._tokenizer
        return render_template(tokenizer.chat_template, messages, tokenizer.special_text(), tokenizer.adds_bos())
