"""Plans for scoring many requests with shared prefixes: a prefix tree cut into steps that a branching key-value memory can run.

Pure: token ids in, steps out; no engine, no clock. The engine keeps one *trunk* sequence. `Extend` appends tokens to it, `Retract` cuts
it back, `Decode` evaluates one batch of branches that all start at the trunk's end and are dropped afterwards. Every tree node
is decoded once (unless repeating a few tokens is cheaper than a step of its own).

The last token of a request is never decoded: its probability is read at the position before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

# A shared run shorter than this is repeated in each branch rather than given a decode call of its own: one call costs about as
# much as eight tokens of prefill (SmolLM2-135M Q4_1 on two cores: 7 ms a call, 266 tok/s).
SHORT_RUN = 8


@dataclass(frozen=True)
class Request:
    """`tokens` = prompt + continuation; `scored_from` is the index of the continuation's first token (≥ 1)."""

    tokens: tuple[int, ...]
    scored_from: int

    @property
    def decoded(self) -> int:
        """How many of the tokens are decoded: all but the last."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Reading:
    """Read the log-probability of `target` for `request` in the logits row of this position."""

    request: int
    target: int


@dataclass(frozen=True)
class Placed:
    """One token of a step. `branches` are the branch numbers (0-based within the step) that it belongs to; empty in the trunk."""

    token: int
    position: int
    branches: tuple[int, ...]
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Extend:
    """Append to the trunk."""

    placed: tuple[Placed, ...]


@dataclass(frozen=True)
class Decode:
    """Evaluate branches from the trunk's end, then forget them. `finished` are the requests complete after this step."""

    placed: tuple[Placed, ...]
    branches: int
    finished: tuple[int, ...]


@dataclass(frozen=True)
class Retract:
    """Cut the trunk back to `length` tokens. `finished` are the requests that ended inside the part that is cut."""

    length: int
    finished: tuple[int, ...] = ()


Step = Extend | Decode | Retract


@dataclass
class Node:
    """A run of tokens shared by the same requests. Built once, then read only."""

    start: int
    tokens: tuple[int, ...]
    requests: list[int] = field(default_factory=list[int])
    children: list[Node] = field(default_factory=list["Node"])
    size: int = 0
    """Tokens in the whole subtree, this run included."""
    leaves: int = 0
    """Branches that the subtree needs."""
    ending: list[int] = field(default_factory=list[int])
    """Requests that end with this run."""


def build_tree(requests: Sequence[Request]) -> Node:
    """The radix tree over the decoded tokens of all requests. The root is an empty run at position 0."""
    order = sorted(range(len(requests)), key=lambda index: requests[index].tokens[:-1])
    root = Node(0, ())
    _grow(root, requests, order, 0)
    return root


def _grow(node: Node, requests: Sequence[Request], order: Sequence[int], depth: int) -> None:
    """Hang the requests in `order` (sorted, sharing their first `depth` tokens) below `node`. Iterative in depth, for long prompts."""
    work = [(node, list(order), depth)]
    built: list[Node] = []
    while work:
        current, members, at = work.pop()
        built.append(current)
        current.requests = members
        current.ending = [index for index in members if requests[index].decoded == at]
        rest = [index for index in members if requests[index].decoded > at]
        for group in _group(rest, requests, at):
            end = _shared_end(requests, group)
            child = Node(at, requests[group[0]].tokens[at:end])
            current.children.append(child)
            work.append((child, group, end))
    for current in reversed(built):
        current.size = len(current.tokens) + sum(child.size for child in current.children)
        current.leaves = max(1, sum(child.leaves for child in current.children))


def _group(order: Sequence[int], requests: Sequence[Request], at: int) -> Iterator[list[int]]:
    group: list[int] = []
    for index in order:
        if group and requests[index].tokens[at] != requests[group[0]].tokens[at]:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _shared_end(requests: Sequence[Request], group: Sequence[int]) -> int:
    """Where the tokens common to a sorted group end: the first and the last of a sorted list differ first."""
    first, last = requests[group[0]], requests[group[-1]]
    limit = min(requests[index].decoded for index in group)
    for position in range(limit):
        if first.tokens[position] != last.tokens[position]:
            return position
    return limit


def plan(requests: Sequence[Request], batch_tokens: int, branches: int, block: int = 1) -> Iterator[Step]:
    """Steps that score all requests, none larger than `batch_tokens` tokens and `branches` branches.

    Attention is computed over whole blocks of `block` positions, used or not: a batch is kept so small that trunk and batch end at a
    block's border, unless that would halve it. Raises nothing for long requests: a run longer than a batch becomes trunk, in chunks.
    """
    planner = _Planner(requests, batch_tokens, branches, block)
    yield from planner.walk(build_tree(requests))
    yield from planner.flush()


class _Planner:
    """Holds the batch that is being filled."""

    def __init__(self, requests: Sequence[Request], batch_tokens: int, branches: int, block: int) -> None:
        self._requests = requests
        self._batch_tokens = batch_tokens
        self._branches = branches
        self._block = block
        self._placed: list[Placed] = []
        self._used = 0
        self._finished: list[int] = []

    def flush(self) -> Iterator[Step]:
        if self._placed:
            yield Decode(tuple(self._placed), self._used, tuple(self._finished))
            self._placed, self._used, self._finished = [], 0, []

    def _room(self, trunk: int) -> int:
        """Tokens of a batch behind a trunk of this length."""
        aligned = (trunk + self._batch_tokens) // self._block * self._block - trunk
        return aligned if 2 * aligned >= self._batch_tokens else self._batch_tokens

    def walk(self, node: Node) -> Iterator[Step]:
        room = self._room(node.start)
        if node.size <= room and node.leaves <= self._branches and node.tokens:
            if len(self._placed) + node.size > room or self._used + node.leaves > self._branches:
                yield from self.flush()
            self._pack(node)
        elif node.tokens and len(node.tokens) < SHORT_RUN and node.children and not node.ending:
            for child in node.children:
                yield from self.walk(_prefixed(node, child))
        else:
            yield from self._as_trunk(node)

    def _as_trunk(self, node: Node) -> Iterator[Step]:
        if node.tokens:
            yield from self.flush()
            placed = [self._place(node, offset, ()) for offset in range(len(node.tokens))]
            for begin in range(0, len(placed), self._batch_tokens):
                yield Extend(tuple(placed[begin : begin + self._batch_tokens]))
        for child in node.children:
            yield from self.walk(child)
        if node.tokens:
            yield from self.flush()
            yield Retract(node.start, tuple(node.ending))

    def _pack(self, node: Node) -> None:
        """Append a whole subtree in depth-first order, so that each branch's positions rise and its token sets only narrow."""
        first = self._used
        self._used += node.leaves
        stack = [(node, first)]
        while stack:
            current, branch = stack.pop()
            owners = tuple(range(branch, branch + current.leaves))
            self._placed.extend(self._place(current, offset, owners) for offset in range(len(current.tokens)))
            self._finished.extend(current.ending)
            below: list[tuple[Node, int]] = []
            for child in current.children:
                below.append((child, branch))
                branch += child.leaves
            stack.extend(reversed(below))

    def _place(self, node: Node, offset: int, owners: tuple[int, ...]) -> Placed:
        position = node.start + offset
        readings = tuple(
            Reading(index, self._requests[index].tokens[position + 1])
            for index in node.requests
            if position + 1 >= self._requests[index].scored_from and position < self._requests[index].decoded
        )
        return Placed(node.tokens[offset], position, owners, readings)


def _prefixed(parent: Node, child: Node) -> Node:
    """The child with its parent's short run repeated in front."""
    return Node(
        parent.start,
        parent.tokens + child.tokens,
        child.requests,
        child.children,
        child.size + len(parent.tokens),
        child.leaves,
        child.ending,
    )


def common_prefix(sequences: Iterable[Sequence[int]]) -> int:
    """How many leading tokens all sequences share, at most one less than the shortest (each keeps a token of its own)."""
    items = list(sequences)
    if len(items) < 2:
        return 0
    # Tuples, because sequences as such have no order.
    ordered = sorted(tuple(item) for item in items)
    first, last = ordered[0], ordered[-1]
    limit = min(len(item) for item in items) - 1
    for position in range(min(limit, len(first), len(last))):
        if first[position] != last[position]:
            return position
    return max(limit, 0)
