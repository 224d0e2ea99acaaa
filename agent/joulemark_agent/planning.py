"""Plans for scoring many requests with shared prefixes: a prefix tree cut into steps that a branching key-value memory can run.

Pure: token ids in, steps out; no engine, no clock. The engine keeps one *trunk* sequence. `Extend` appends tokens to it, `Retract`
cuts it back, `Decode` evaluates one batch of branches that all start at the trunk's end and are dropped afterwards. Every tree node is
decoded once (unless repeating a few tokens is cheaper than a call of its own). Which subtrees make a batch of their own, and which are
walked with a longer trunk, is decided by `Costs`.

The last token of a request is never decoded: its probability is read at the position before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from joulemark_agent.costs import Costs

# How many batches stay open while subtrees are shared out: enough to fill them well, and the work stays linear.
OPEN_BATCHES = 64


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
    """A run of tokens shared by the same requests. The tree is built first, then planned bottom-up (`_Planner.decide`)."""

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
    whole: bool = False
    """Whether the subtree goes into one batch, as branches; else its run becomes trunk and the following stand behind it."""
    branches: list[Node] = field(default_factory=list["Node"])
    """What stands behind the run: the children, those with a short run replaced by theirs with the run repeated."""
    batches: list[Batch] = field(default_factory=list["Batch"])
    """The whole ones of `branches`, shared out over batches."""
    cost: float = 0.0

    @property
    def end(self) -> int:
        """The position behind the run."""
        return self.start + len(self.tokens)


@dataclass
class Batch:
    """Whole subtrees that are decoded by one call."""

    nodes: list[Node]
    size: int
    leaves: int


def build_tree(requests: Sequence[Request]) -> list[Node]:
    """The radix tree over the decoded tokens of all requests: its nodes, parents first. The root is an empty run at position 0."""
    order = sorted(range(len(requests)), key=lambda index: requests[index].tokens[:-1])
    work = [(Node(0, ()), order, 0)]
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
    return built


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


def plan(requests: Sequence[Request], batch_tokens: int, branches: int, costs: Costs) -> Iterator[Step]:
    """Steps that score all requests, none larger than `batch_tokens` tokens and `branches` branches, as cheap as `costs` says.

    Raises nothing for long requests: a run longer than a batch becomes trunk, in chunks.
    """
    planner = _Planner(requests, batch_tokens, branches, costs)
    nodes = build_tree(requests)
    for node in reversed(nodes):
        planner.decide(node)
    yield from planner.walk(nodes[0])


class _Planner:
    def __init__(self, requests: Sequence[Request], batch_tokens: int, branches: int, costs: Costs) -> None:
        self._requests = requests
        self._batch_tokens = batch_tokens
        self._branches = branches
        self._costs = costs

    # --- bottom-up: what goes into which batch ------------------------------------------------------------------------
    def decide(self, node: Node) -> None:
        """Whether the subtree of `node`, whose children are decided, goes into a batch or its run becomes trunk; what is cheaper."""
        step = self._costs.step
        node.branches = [branch for child in node.children for branch in self._unfold(child)]
        node.batches = self._fill(node.end, [branch for branch in node.branches if branch.whole])
        split = sum(step(node.end, batch.size) for batch in node.batches)
        split += sum(branch.cost for branch in node.branches if not branch.whole)
        split += step(node.start, len(node.tokens)) if node.tokens else 0.0
        together = step(node.start, node.size)
        fits = node.size <= self._batch_tokens and node.leaves <= self._branches
        node.whole = fits and bool(node.tokens) and (together <= split or not node.children)
        node.cost = together if node.whole else split

    def _unfold(self, child: Node) -> list[Node]:
        """The child, or what is behind it with its run in front, where that costs less than a call and batches broken for a short run."""
        repeated = len(child.tokens) * (len(child.branches) - 1)
        if child.whole or child.ending or not child.branches or repeated > 2 * self._costs.call:
            return [child]
        return [self._prefixed(child, branch) for branch in child.branches]

    def _prefixed(self, parent: Node, child: Node) -> Node:
        node = Node(parent.start, parent.tokens + child.tokens, child.requests, child.children)
        node.size, node.leaves, node.ending = child.size + len(parent.tokens), child.leaves, child.ending
        self.decide(node)
        return node

    def _fill(self, before: int, nodes: Sequence[Node]) -> list[Batch]:
        """First fit, the large ones first, as far as joining is worth it."""
        batches: list[Batch] = []
        for node in sorted(nodes, key=lambda node: -node.size):
            for batch in batches[-OPEN_BATCHES:]:
                if self._joins(before, batch, node):
                    batch.nodes.append(node)
                    batch.size += node.size
                    batch.leaves += node.leaves
                    break
            else:
                batches.append(Batch([node], node.size, node.leaves))
        return batches

    def _joins(self, before: int, batch: Batch, node: Node) -> bool:
        fits = batch.size + node.size <= self._batch_tokens and batch.leaves + node.leaves <= self._branches
        return fits and self._costs.saves_by_joining(before, batch.size, node.size)

    # --- top-down: the steps ------------------------------------------------------------------------------------------
    def walk(self, root: Node) -> Iterator[Step]:
        """The steps of the whole tree. Without recursion: prefixes of prefixes may nest deeper than Python's stack."""
        stack = [(root, False)]
        while stack:
            node, done = stack.pop()
            if done:
                yield Retract(node.start, tuple(node.ending))
                continue
            for begin in range(0, len(node.tokens), self._batch_tokens):
                end = min(begin + self._batch_tokens, len(node.tokens))
                yield Extend(tuple(self._place(node, offset, ()) for offset in range(begin, end)))
            yield from map(self._decode, node.batches)
            if node.tokens:
                stack.append((node, True))
            stack.extend((branch, False) for branch in node.branches if not branch.whole)

    def _decode(self, batch: Batch) -> Decode:
        """Subtrees in depth-first order, so that each branch's positions rise and its token sets only narrow."""
        placed: list[Placed] = []
        finished: list[int] = []
        first = 0
        for node in batch.nodes:
            stack = [(node, first)]
            first += node.leaves
            while stack:
                current, branch = stack.pop()
                owners = tuple(range(branch, branch + current.leaves))
                placed.extend(self._place(current, offset, owners) for offset in range(len(current.tokens)))
                finished.extend(current.ending)
                below: list[tuple[Node, int]] = []
                for child in current.children:
                    below.append((child, branch))
                    branch += child.leaves
                stack.extend(reversed(below))
        return Decode(tuple(placed), first, tuple(finished))

    def _place(self, node: Node, offset: int, owners: tuple[int, ...]) -> Placed:
        position = node.start + offset
        readings = tuple(
            Reading(index, self._requests[index].tokens[position + 1])
            for index in node.requests
            if position + 1 >= self._requests[index].scored_from and position < self._requests[index].decoded
        )
        return Placed(node.tokens[offset], position, owners, readings)


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
