"""Trees of guesses: which of the draft heads' candidates are verified together."""

import heapq
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftTree:
    """Node 0 is the next token, which is known; node i at depth d is guess number `ranks[i]` (from 0) of head d - 1,
    for the case that its ancestors are right.

    Attributes:
        parents: of each node, which come before it; -1 for node 0.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, paths: list[list[int]]) -> "DraftTree":
        """From the ranks along the way to each node but node 0 (Medusa's choices, arXiv 2401.10774, section 2.1.2).

        Raises:
            ValueError: for a path whose beginning is no path itself, or that is there twice.
        """
        number = {(): 0}
        parents, ranks = [-1], [0]
        for path in sorted(map(tuple, paths), key=lambda path: (len(path), path)):
            if not path or path in number or path[:-1] not in number or min(path) < 0:
                raise ValueError(f"tree: {list(path)} is there twice, or {list(path[:-1])} before it is missing")
            number[path] = len(parents)
            parents.append(number[path[:-1]])
            ranks.append(path[-1])
        return cls(tuple(parents), tuple(ranks))

    @classmethod
    def grown(cls, accuracy: list[list[float]], nodes: int) -> "DraftTree":
        """The tree of `nodes` nodes (or all there are) that accepts most tokens per step.

        Args:
            accuracy: per head, how often its guess of each rank is right where what comes before it was right. Heads
                are taken to be right or wrong independently of each other.
        """
        paths, waiting = [], [(-1.0, ())]
        while waiting and len(paths) < nodes:
            negative, path = heapq.heappop(waiting)
            paths.append(path)
            if len(path) < len(accuracy):
                for rank, share in enumerate(accuracy[len(path)]):
                    heapq.heappush(waiting, (negative * share, (*path, rank)))
        return cls.of([list(path) for path in paths if path])

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

    def expected(self, accuracy: list[list[float]]) -> float:
        """Tokens accepted per step, node 0 among them; `accuracy` as of `grown`."""
        shares = [1.0]
        for parent, path in zip(self.parents[1:], self.paths, strict=True):
            shares.append(shares[parent] * accuracy[len(path) - 1][path[-1]])
        return sum(shares)
