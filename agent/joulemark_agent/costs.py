"""What the engine's decode calls cost, so that batches can be planned by it. Pure; not aware of engines, tokens or time.

The unit is one token's matrix work. The costs decide about speed only: whatever is planned with them, the results are the same. That holds
for float32 models; on quantized ones llama.cpp's rounding depends a little on what stands beside a token in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """`call`: what a call costs beside its tokens (reading the weights, starting the threads). `position`: what one position of the memory
    adds to every token of a call; attention is computed over whole blocks of `block` positions, used or not."""

    call: float = 1.5
    position: float = 0.0
    block: int = 1

    def step(self, before: int, tokens: int) -> float:
        """One call of `tokens` tokens behind `before` positions of memory."""
        seen = -(-(before + tokens) // self.block) * self.block
        return self.call + tokens * (1 + self.position * seen)

    def saves_by_joining(self, before: int, first: int, second: int) -> bool:
        """Whether one call of both is at most as dear as two: it saves a call, but when it reaches into the next block, attention becomes
        dearer for all of its tokens."""
        return self.step(before, first + second) <= self.step(before, first) + self.step(before, second)

    def best_sequences(self, shared: int, own: int, most: int) -> int:
        """How many sequences of `own` positions behind `shared` common ones make most tokens a second, at most `most`.

        Each one more shares the call's cost with the others, but every token then attends over its memory too: the engine computes
        attention over the whole memory and masks what is not a sequence's own.
        """
        return min(range(1, most + 1), key=lambda count: self.step(shared + count * own, count) / count)
