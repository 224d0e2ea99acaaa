"""A session over llama.cpp's engine, whichever library it comes from. Not a plug-in; `llamacpp` and `xllamacpp` open it.

Scoring walks `planning.plan` over one unified key-value memory: sequence 0 is the trunk, branches are copies of it. Generation is
continuous batching over the prompts' common prefix. Models whose memory cannot branch (recurrent, hybrid) are served one whole
sequence at a time with the same results. Never reads a clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from joulemark.wire import EngineFacts
from joulemark_agent.backends import Choice, Generated, GenerateRequest, Options, Scored, ScoreRequest, Token
from joulemark_agent.backends._generation import SHORT_PREFIX, Growing, Waiting, generate, prompt_of_stream
from joulemark_agent.backends._llama_engine import Context, Model
from joulemark_agent.backends._logits import import_numpy, log_probability
from joulemark_agent.backends._scoring import OpenScore, Owner, score
from joulemark_agent.backends._token_choice import TokenChooser
from joulemark_agent.chat_template import render_template
from joulemark_agent.costs import Costs
from joulemark_agent.planning import Extend, Placed, Request, Retract, Step, common_prefix, plan

# Branches of one scoring batch. A batch of 512 tokens holds about ten ARC questions of four or five choices.
SCORING_BRANCHES = 128
_LOGITS_BYTES = 256 * 1024 * 1024
_LEAST_ROWS = 32
# The engine allocates its memory, and computes attention, in blocks of this many positions.
CELL_BLOCK = 256
# What a call costs beside its tokens, in tokens, and a multiply-add of attention (16-bit floats) in ones of the weights. A fit over 132
# timed calls of 1 to 512 tokens (SmolLM2-135M Q4_1, two EPYC cores): 7.7 ms a call, 4.5 ms a token, 1.6 µs a token and position.
CALL_COST = 1.5
ATTENTION_COST = 1.4


class LlamaSession:
    """A loaded model and the context that the last kind of request needed."""

    def __init__(self, model: Model, options: Options) -> None:
        self._model = model
        self._options = options
        self._numpy = import_numpy(model.library.install)
        self._read = log_probability(self._numpy, model.vocabulary_size)
        self._context: Context | None = None
        self._costs = Costs(CALL_COST, ATTENTION_COST * model.attention_share(), CELL_BLOCK)
        self._slots = options.sequences
        self._window = min(options.context_tokens or model.trained_context, model.trained_context)

    # --- facts --------------------------------------------------------------------------------------------------------
    def facts(self) -> EngineFacts:
        """What really runs; see the contract."""
        build = self._model.llama.llama_print_system_info().decode(errors="replace").strip()
        return EngineFacts(
            backend=self._model.library.backend,
            engine="llama.cpp",
            version=self._model.library.version,
            build=build[:4000],
            model=self._model.description()[:200],
            model_sha256=self._options.model_sha256,
            device="cpu",
            threads=self._options.threads,
            batch_tokens=self._options.batch_tokens,
            sequences=self._slots,
            context_tokens=self._window,
            kv_type="f32" if self._model.full_precision else "f16",
            flash_attention=False,
            branching=not self._model.recurrent,
        )

    def count_tokens(self, text: str) -> int:
        """Prompt tokens of `text`."""
        return len(self._model.tokenize(text))

    def close(self) -> None:
        """Free context and model."""
        if self._context:
            self._context.close()
            self._context = None
        self._model.close()

    def _need(self, cells: int, sequences: int) -> Context:
        """A context with at least this room, made anew only when the present one is too small."""
        cells = math.ceil(cells / CELL_BLOCK) * CELL_BLOCK
        context = self._context
        if context is None or context.cells < cells or context.sequences < sequences:
            if context is not None:
                cells, sequences = max(cells, context.cells), max(sequences, context.sequences)
                context.close()
                self._context = None
            context = Context(
                self._model, cells, sequences, self._options.batch_tokens, self._options.threads, self._options.beat
            )
            self._context = context
        context.reset()
        return context

    # --- scoring ------------------------------------------------------------------------------------------------------
    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scored]:
        """See the contract."""
        return score(requests, self._model.tokenize, self._window, self._run_plan)

    def _scoring_batch(self) -> int:
        """Tokens of a scoring batch. The logits of each may be wanted, and are there twice: 2 MB a token with Gemma's vocabulary."""
        budget = _LOGITS_BYTES if self._options.memory_bytes is None else min(self._options.memory_bytes, _LOGITS_BYTES)
        rows = budget // (2 * 4 * self._model.vocabulary_size)
        return min(self._options.batch_tokens, max(_LEAST_ROWS, rows))

    def _run_plan(self, flat: list[Request], owner: Sequence[Owner]) -> Iterator[int]:
        batch = self._scoring_batch()
        longest = max(request.decoded for request in flat)
        if self._model.recurrent:
            context = self._need(longest, 1)
            for index, request in enumerate(flat):
                context.reset()
                self._whole(context, request, *owner[index])
                yield index
            return
        # A step's branches never exceed a batch, the trunk never exceeds the longest request.
        branches = min(SCORING_BRANCHES, batch - 1, self._most_sequences())
        context = self._need(longest + batch, branches + 1)
        for step in plan(flat, batch, branches, self._costs):
            yield from self._step(context, step, owner)

    def _step(self, context: Context, step: Step, owner: Sequence[Owner]) -> Sequence[int]:
        if isinstance(step, Retract):
            context.remove(0, step.length)
            return step.finished
        if isinstance(step, Extend):
            self._evaluate(context, step.placed, None, owner)
            return ()
        trunk = step.placed[0].position > 0
        if trunk:
            for branch in range(step.branches):
                context.copy(0, branch + 1)
        self._evaluate(context, step.placed, step.branches, owner)
        for branch in range(step.branches):
            context.remove(branch + 1)
        return step.finished

    def _evaluate(
        self, context: Context, placed: Sequence[Placed], branches: int | None, owner: Sequence[Owner]
    ) -> None:
        context.clear_batch()
        reading: list[Placed] = []
        for item in placed:
            sequences = (0,) if branches is None else tuple(branch + 1 for branch in item.branches)
            context.add(item.token, item.position, sequences, bool(item.readings))
            if item.readings:
                reading.append(item)
        rows = context.decode()
        for row, item in zip(rows, reading, strict=True):
            values, best = self._read(row, [entry.target for entry in item.readings])
            for entry, value in zip(item.readings, values, strict=True):
                opened, index = owner[entry.request]
                opened.add(index, value, entry.target == best)

    def _whole(self, context: Context, request: Request, opened: OpenScore, index: int) -> None:
        batch = context.batch_tokens
        for start in range(0, request.decoded, batch):
            context.clear_batch()
            end = min(start + batch, request.decoded)
            for position in range(start, end):
                context.add(request.tokens[position], position, (0,), position + 1 >= request.scored_from)
            first = max(start, request.scored_from - 1)
            for offset, row in enumerate(context.decode()):
                target = request.tokens[first + offset + 1]
                values, best = self._read(row, [target])
                opened.add(index, values[0], target == best)

    # --- generation ---------------------------------------------------------------------------------------------------
    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Generated]:
        """Greedy continuous batching; a finished sequence is replaced at once."""
        return generate(requests, self._model, self._window, self._batches)

    def _batches(self, waiting: list[Waiting]) -> Iterator[Generated]:
        prefix, slots, context = self._prepare(waiting)
        waiting = list(reversed(waiting))
        active: dict[int, Growing] = {}
        free = [index + 1 for index in reversed(range(slots))]
        while waiting or active:
            admitted: dict[int, Growing] = {}
            while waiting and free:
                request, tokens = waiting.pop()
                admitted[free.pop()] = Growing(request, tokens)
            if admitted:
                chosen = self._prefill(context, admitted, prefix)
                active.update(admitted)
            else:
                chosen = self._decode_step(context, active)
            for sequence, token in chosen.items():
                result = active[sequence].advance(token, self._model)
                if result is not None:
                    context.remove(sequence)
                    del active[sequence]
                    free.append(sequence)
                    yield result

    def _prepare(self, waiting: Sequence[Waiting]) -> tuple[int, int, Context]:
        """Decode the common prefix into sequence 0 and choose how many sequences run side by side."""
        prefix = 0 if self._model.recurrent else common_prefix([tokens for _, tokens in waiting])
        if prefix < SHORT_PREFIX:
            prefix = 0
        own = max(len(tokens) - prefix + request.max_new_tokens for request, tokens in waiting)
        # What a sequence holds on average: its own prompt and half of its answer.
        held = sum(len(tokens) - prefix + request.max_new_tokens // 2 for request, tokens in waiting) // len(waiting)
        most = min(self._options.sequences, len(waiting), self._most_sequences(), self._affordable(prefix, own))
        self._slots = 1 if self._model.recurrent else self._costs.best_sequences(prefix, held, most)
        context = self._need(prefix + own * self._slots, self._slots + 1)
        if prefix:
            self._feed(context, [(0, waiting[0][1][:prefix], 0, False)])
        return prefix, self._slots, context

    def _most_sequences(self) -> int:
        """Sequences beside the trunk: llama.cpp aborts when a context has more sequences than a batch has tokens."""
        return self._options.batch_tokens - 1

    def _affordable(self, prefix: int, own: int) -> int:
        """How many sequences of `own` positions the key-value memory's budget holds beside the prefix; at least one."""
        if self._options.memory_bytes is None or self._model.recurrent:  # whose memory does not grow with positions
            return self._options.sequences
        return max(1, (self._options.memory_bytes // self._model.cell_bytes() - prefix) // own)

    def _prefill(self, context: Context, admitted: dict[int, Growing], prefix: int) -> dict[int, int]:
        """Decode the own parts of the admitted prompts together; the first new token of each."""
        if prefix:
            for sequence in admitted:
                context.copy(0, sequence)
        return self._feed(
            context, [(sequence, slot.tokens[prefix:], prefix, True) for sequence, slot in admitted.items()]
        )

    def _feed(self, context: Context, parts: Sequence[tuple[int, Sequence[int], int, bool]]) -> dict[int, int]:
        """Decode (sequence, tokens, first position, wants an answer) parts in full batches; the arg max after each part that wants one."""
        chosen: dict[int, int] = {}
        rows_of: list[int] = []

        def run() -> None:
            rows = context.decode()
            chosen.update((sequence, int(row.argmax())) for sequence, row in zip(rows_of, rows, strict=True))
            rows_of.clear()
            context.clear_batch()

        context.clear_batch()
        for sequence, tokens, start, wants in parts:
            for offset, token in enumerate(tokens):
                last = wants and offset == len(tokens) - 1
                context.add(token, start + offset, (sequence,), last)
                if last:
                    rows_of.append(sequence)
                if context.batched == context.batch_tokens:
                    run()
        if context.batched:
            run()
        return chosen

    def _decode_step(self, context: Context, active: dict[int, Growing]) -> dict[int, int]:
        """One new token for every running sequence."""
        context.clear_batch()
        for sequence, slot in active.items():
            context.add(slot.token, slot.position, (sequence,), True)
            slot.position += 1
        rows = context.decode()
        return {sequence: int(row.argmax()) for sequence, row in zip(active, rows, strict=True)}

    # --- single stream ------------------------------------------------------------------------------------------------
    def stream(self, prompt: str, max_new_tokens: int, choice: Choice) -> Iterator[Token]:
        """One sequence, nothing reused; see the contract."""
        tokens = prompt_of_stream(prompt, max_new_tokens, self._model, self._window)
        needed = len(tokens) + max_new_tokens
        context = self._need(needed, 1)
        chooser = TokenChooser(self._numpy, choice, self._model.piece)
        row = self._prompt_row(context, tokens)
        for position in range(len(tokens), needed):
            token, logprob, top = chooser(row)
            yield Token(token, self._model.piece(token), self._model.is_end(token), logprob, top)
            if position + 1 == needed:
                return
            context.clear_batch()
            context.add(token, position, (0,), True)
            row = context.decode()[0]

    def _prompt_row(self, context: Context, tokens: Sequence[int]) -> Any:
        """Decode a whole prompt into sequence 0; the logits row after its last token."""
        row = None
        for start in range(0, len(tokens), context.batch_tokens):
            context.clear_batch()
            end = min(start + context.batch_tokens, len(tokens))
            for position in range(start, end):
                context.add(tokens[position], position, (0,), position == len(tokens) - 1)
            rows = context.decode()
            row = rows[0] if len(rows) else None
        return row

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as prompt text by the model's own template, rendered in jinja2's immutable sandbox."""
        template = self._model.metadata("tokenizer.chat_template")
        return render_template(template, messages, self._model.special_text(), self._model.adds_bos)
