"""The scoring plan against a model of what a branching memory does: every reading once, in its right context, within the limits."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from joulemark_agent.costs import Costs
from joulemark_agent.planning import Decode, Extend, Request, Retract, Step, common_prefix, plan

TOKENS = st.integers(0, 3)
REQUESTS = st.lists(
    st.tuples(st.lists(TOKENS, min_size=1, max_size=14), st.lists(TOKENS, min_size=1, max_size=6)).map(
        lambda pair: Request((*pair[0], *pair[1]), len(pair[0]))
    ),
    min_size=1,
    max_size=25,
)


CHEAP = Costs()
SMOLLM2 = Costs(call=1.5, position=3.6e-4, block=256)


class Memory:
    """Replays steps and records in which context every reading was made."""

    def __init__(self) -> None:
        self.trunk: list[int] = []
        self.readings: dict[tuple[int, int], tuple[list[int], int]] = {}
        self.finished: list[int] = []
        self.decoded = 0

    def run(self, step: Step, batch: int, branches: int) -> None:
        if isinstance(step, Retract):
            assert step.length < len(self.trunk)
            del self.trunk[step.length :]
            self.finished.extend(step.finished)
            return
        assert 0 < len(step.placed) <= batch
        self.decoded += len(step.placed)
        if isinstance(step, Extend):
            for placed in step.placed:
                assert placed.position == len(self.trunk) and placed.branches == ()
                self.trunk.append(placed.token)
                self.read(placed, self.trunk)
            return
        assert step.branches <= branches
        contents = [list(self.trunk) for _ in range(step.branches)]
        for placed in step.placed:
            assert placed.branches
            for branch in placed.branches:
                assert placed.position == len(contents[branch])
                contents[branch].append(placed.token)
            self.read(placed, contents[placed.branches[0]])
            assert all(contents[branch] == contents[placed.branches[0]] for branch in placed.branches)
        self.finished.extend(step.finished)

    def read(self, placed: object, content: list[int]) -> None:
        for reading in placed.readings:  # type: ignore[attr-defined]
            key = (reading.request, len(content))
            assert key not in self.readings, "a position was read twice"
            self.readings[key] = (list(content), reading.target)


def replay(requests: list[Request], batch: int, branches: int, costs: Costs = CHEAP) -> Memory:
    memory = Memory()
    for step in plan(requests, batch, branches, costs):
        memory.run(step, batch, branches)
    assert memory.trunk == []
    return memory


@settings(max_examples=300, deadline=None)
@given(REQUESTS, st.integers(4, 40), st.integers(1, 8), st.floats(0, 4), st.sampled_from([0, 0.01]))
def test_every_position_is_read_once_in_its_own_context(
    requests: list[Request], batch: int, branches: int, call: float, position: float
) -> None:
    memory = replay(requests, batch, branches, Costs(call, position, 8))
    expected = {
        (index, position): (list(request.tokens[:position]), request.tokens[position])
        for index, request in enumerate(requests)
        for position in range(request.scored_from, len(request.tokens))
    }
    assert memory.readings == expected
    assert sorted(memory.finished) == list(range(len(requests)))


def test_a_request_is_finished_only_after_all_its_readings() -> None:
    requests = [Request((1, 2, 3, 4, 5, 6), 2), Request((1, 2, 3, 4, 7), 2), Request((9, 8), 1)]
    seen: set[int] = set()
    done: set[int] = set()
    for step in plan(requests, 4, 2, CHEAP):
        if not isinstance(step, Retract):
            for placed in step.placed:
                assert not {reading.request for reading in placed.readings} & done
                seen |= {reading.request for reading in placed.readings}
        if not isinstance(step, Extend):
            assert set(step.finished) <= seen
            done |= set(step.finished)
    assert done == {0, 1, 2}


def test_a_shared_prefix_is_decoded_once() -> None:
    prefix = tuple(range(100, 300))
    requests = [
        Request((*prefix, question, 7, choice, 9), len(prefix) + 2) for question in range(20) for choice in range(4)
    ]
    memory = replay(requests, 128, 64)
    # The prefix once; per question its two own tokens once and one token per choice (the last token is never decoded).
    assert memory.decoded == len(prefix) + 20 * (2 + 4)
    assert sum(isinstance(step, Decode) for step in plan(requests, 128, 64, CHEAP)) <= 3


def test_a_batch_does_not_reach_into_the_next_block_for_one_question_more() -> None:
    prefix = tuple(range(160))
    requests = [Request((*prefix, question + 500, *range(40), 9), 161) for question in range(50)]
    sizes = [len(step.placed) for step in plan(requests, 512, 128, SMOLLM2) if isinstance(step, Decode)]
    # 160 + 2 × 41 positions fit one block of 256; a third question would double what every token attends over.
    assert sizes == [82] * 25
    free = Costs(call=1.5, position=0.0, block=256)
    assert max(len(step.placed) for step in plan(requests, 512, 128, free) if isinstance(step, Decode)) == 12 * 41


def test_few_sequences_are_best_where_attention_is_dear_and_many_where_calls_are() -> None:
    # By hand, one block = one position: (1.5 + n (1 + 3.6e-4 (730 + 190 n))) / n is least at n = sqrt(1.5 / (3.6e-4 × 190)) = 4.7.
    assert Costs(1.5, 3.6e-4, 1).best_sequences(730, 190, 16) == 5
    assert Costs(50, 3.6e-4, 256).best_sequences(730, 190, 16) == 16
    assert Costs(1.5, 0.0, 256).best_sequences(730, 190, 16) == 16
    assert SMOLLM2.best_sequences(730, 190, 3) == 3
    assert Costs(0.0, 1e-3, 1).best_sequences(0, 100, 16) == 1


def test_a_short_run_is_repeated_where_that_is_cheaper_than_a_call() -> None:
    requests = [Request((1, 2, question, *range(100), 9), 2) for question in range(10, 13)]
    repeated = list(plan(requests, 128, 64, Costs(call=2.0)))
    assert all(isinstance(step, Decode) for step in repeated) and len(repeated) == 3
    shared = list(plan(requests, 128, 64, Costs(call=1.0)))
    assert isinstance(shared[0], Extend) and [placed.token for placed in shared[0].placed] == [1, 2]


def test_long_requests_go_through_the_trunk_in_chunks() -> None:
    requests = [Request(tuple(range(1000)), 990), Request((5000, 5001), 1)]
    chunks = [len(step.placed) for step in plan(requests, 256, 4, CHEAP) if isinstance(step, Extend)]
    assert chunks == [256, 256, 256, 231]


def test_prefixes_of_prefixes_may_nest_deeper_than_the_stack() -> None:
    requests = [Request((*range(3 * length), 99_000 + length), 3 * length) for length in range(1, 1500)]
    memory = replay(requests, 16, 4, Costs(call=0.0))
    assert len(memory.readings) == len(requests) and memory.decoded == 3 * 1499


def test_a_question_too_large_for_the_block_is_cut_where_that_is_cheaper() -> None:
    prefix, stem = tuple(range(160)), tuple(range(500, 560))
    requests = [Request((*prefix, *stem, 700 + choice, *range(800, 815), 9), 220) for choice in range(4)] + [
        Request((*prefix, 1, 2, 3), 161)
    ]
    steps = list(plan(requests, 512, 128, SMOLLM2))
    sizes = [(type(step).__name__, len(step.placed)) for step in steps if not isinstance(step, Retract)]
    # In one batch of 124 tokens all of them would attend over 512 positions instead of 256.
    assert ("Extend", 60) in sizes and sizes.count(("Decode", 32)) == 2


def test_equal_requests_are_decoded_once_and_both_read() -> None:
    requests = [Request((1, 2, 3), 1), Request((1, 2, 3), 1)]
    memory = replay(requests, 8, 4)
    assert memory.decoded == 2
    assert len(memory.readings) == 4


@given(st.lists(st.lists(TOKENS, min_size=1, max_size=10), min_size=2, max_size=8))
def test_common_prefix_leaves_every_sequence_a_token(sequences: list[list[int]]) -> None:
    length = common_prefix(sequences)
    assert length < min(len(sequence) for sequence in sequences) or length == 0
    assert len({tuple(sequence[:length]) for sequence in sequences}) == 1
    if length < min(len(sequence) for sequence in sequences) - 1:
        assert len({sequence[length] for sequence in sequences}) > 1


def test_a_single_sequence_shares_nothing() -> None:
    assert common_prefix([[1, 2, 3]]) == 0
