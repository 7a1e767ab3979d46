"""Trees of guesses: which candidates are verified together, and where they come from.

The candidates for the token so many places ahead are a draft head's likeliest ones (`medusa`), and the token that came
there when the text last said what it says now (prompt lookup; Saxena 2023, Yang et al., arXiv 2304.04487): texts repeat
themselves, the longer and the smaller the model, the more.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Candidates of a head, and the number, as a rank, of what is copied from the text.
RANKS = 10
COPY = RANKS
# Tokens copied at most, and the longest run of tokens that is looked for.
COPIED = 10
RUN = 4


def copies(text: Tensor, count: Tensor) -> Tensor:
    """[B, COPIED]: what followed the latest place before the end of each row where the longest run of its last tokens
    (up to RUN) stood; anything where there is none. A text that has begun to repeat itself goes on doing so.

    Args:
        text: [B, L], of which the first `count` [B] tokens are there, two or more.
    """
    place = torch.arange(text.shape[1], device=text.device)
    end = count[:, None] - 1
    run = torch.ones_like(text, dtype=torch.bool) & (place < end)
    length = torch.zeros_like(text)
    for back in range(RUN):
        token = text.gather(1, (end - back).clamp(min=0))
        before = text.gather(1, (place - back).clamp(min=0).expand_as(text))
        run = run & (before == token) & (place >= back)
        length = length + run
    latest = (length * text.shape[1] + place - (place >= end) * (RUN + 1) * text.shape[1]).argmax(1, keepdim=True)
    ahead = torch.arange(COPIED, device=text.device) % (end - latest).clamp(min=1)
    return text.gather(1, (latest + 1 + ahead).clamp(max=text.shape[1] - 1))


@dataclass(frozen=True)
class DraftTree:
    """Node 0 is the next token, which is known; node i at depth d is guess number `ranks[i]` (from 0) of head d - 1,
    or what was copied, for the case that its ancestors are right.

    Attributes:
        parents: of each node, which come before it; -1 for node 0.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, paths: list[list[int]]) -> "DraftTree":
        """From the ranks along the way to each node but node 0 (Medusa's choices, arXiv 2401.10774, section 2.1.2).

        Raises:
            ValueError: for a path whose beginning is no path itself, that is there twice, or with a rank that is none.
        """
        number = {(): 0}
        parents, ranks = [-1], [0]
        for path in sorted(map(tuple, paths), key=lambda path: (len(path), path)):
            if not path or path in number or path[:-1] not in number or not 0 <= min(path) <= max(path) <= COPY:
                raise ValueError(
                    f"tree: {list(path)} is there twice, {list(path[:-1])} before it is missing, or a rank is not one "
                    f"of 0 to {RANKS - 1}, nor {COPY} for what is copied"
                )
            number[path] = len(parents)
            parents.append(number[path[:-1]])
            ranks.append(path[-1])
        return cls(tuple(parents), tuple(ranks))

    @cached_property
    def paths(self) -> list[list[int]]:
        """Of all nodes but node 0, as `of` takes them."""
        found = [[]]
        for parent, rank in list(zip(self.parents, self.ranks, strict=True))[1:]:
            found.append([*found[parent], rank])
        return found[1:]

    @cached_property
    def depths(self) -> list[int]:
        return [0, *map(len, self.paths)]

    def levels(self, width: int, sequential: bool) -> list[tuple[list[int], list[int], list[int]]]:
        """For each depth from 1 on, of nodes one depth above and counted there: the parent of each, and those behind
        which a head is asked; and of the nodes themselves, which of the candidates they are, `width` behind each that
        was asked, followed by what is copied. Heads that are not `sequential` are asked once.
        """
        depths = range(max(self.depths) + 1)
        levels = [[node for node, depth in enumerate(self.depths) if depth == level] for level in depths]
        found, above = [], [-1]
        for level, below in zip(levels, levels[1:], strict=False):
            parents = [above.index(self.parents[node]) for node in level]
            asking = [level.index(self.parents[node]) if sequential else 0 for node in below]
            asked = sorted({at for at, node in zip(asking, below, strict=True) if self.ranks[node] != COPY})
            places = [
                len(asked) * width if self.ranks[node] == COPY else asked.index(at) * width + self.ranks[node]
                for at, node in zip(asking, below, strict=True)
            ]
            found.append((parents, asked, places))
            above = level
        return found

    @cached_property
    def heads(self) -> int:
        """How many heads it needs."""
        guesses = zip(self.depths[1:], self.ranks[1:], strict=True)
        return max((depth for depth, rank in guesses if rank != COPY), default=0)

    @cached_property
    def ancestors(self) -> Tensor:
        """[T, T] bool: whether node j is an ancestor of node i, or i itself."""
        order = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in list(enumerate(self.parents))[1:]:
            order[node] |= order[parent]
        return order

    @cached_property
    def ways(self) -> Tensor:
        """[T, depth + 1]: the nodes from node 0 to each node, -1 behind its end."""
        ways = torch.full((len(self.parents), max(self.depths) + 1), -1)
        for node, depth in enumerate(self.depths):
            ways[node, : depth + 1] = self.ancestors[node].nonzero().squeeze(1)
        return ways
