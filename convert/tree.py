"""Which draft tree makes the fewest steps, by how often guesses are right at each place of texts.

A step begins where the one before it has ended: where a text repeats itself it goes on in a few long steps. So what is
accepted at a place is not what is accepted in a step, and texts are gone through here as decoding would.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from linearize.layers.draft import DraftTree


@dataclass
class Places:
    """N places of texts, at which a step may begin.

    Attributes:
        right: [N, D, RANKS + 1] bool, whether the token so many places ahead is a head's guess of that rank, or what is
            copied (`draft.COPY`).
        text: [N], which text it is; those of a text follow each other.
    """

    right: Tensor
    text: Tensor

    @cached_property
    def left(self) -> Tensor:
        """[N], places of its text from each one on."""
        place = torch.arange(len(self.text), device=self.text.device)
        return torch.searchsorted(self.text, self.text, right=True) - place

    def ahead(self, tokens: Tensor) -> Tensor:
        """[N], the place so many tokens [N] further; N where the text has ended."""
        place = torch.arange(len(self.text), device=self.text.device)
        return torch.where(tokens < self.left, place + tokens, len(self.text))

    def walk(self, accepted: Tensor) -> tuple[Tensor, Tensor]:
        """[N] whether a step begins at each place, if steps accept so many tokens [N]; [N + 1] how many steps there are
        from each place to the end of its text, and behind all texts none."""
        jump = torch.nn.functional.pad(self.ahead(accepted), (0, 1), value=len(self.text))
        begins = torch.nn.functional.pad(self.text.diff() != 0, (1, 1), value=True)
        steps = torch.nn.functional.pad(torch.ones_like(accepted), (0, 1))
        # Each time twice as many steps at once.
        for _ in range(int(self.left.max()).bit_length()):
            steps = steps + steps[jump]
            begins[jump[begins]] = True
            jump = jump[jump]
        return begins[:-1], steps


def grown(places: Places, nodes: int) -> list[list[int]]:
    """Paths to the nodes, but for node 0, of a tree of so many, or fewer that are ever right, with which texts take the
    fewest steps: one by one that which saves most, so the first of them are the best smaller trees."""
    depth = places.right.shape[1]
    accepted = {(): torch.ones_like(places.text, dtype=torch.bool)}
    # That a step accepts, the next one among them, which is known.
    tokens = torch.ones_like(places.text)
    while len(accepted) < nodes:
        begins, steps = places.walk(tokens)
        # A further token saves what one of those that come next takes of the steps for them.
        coming = (places.left - tokens).clamp(1, depth)
        saved = ((steps[places.ahead(tokens)] - steps[places.ahead(tokens + depth)]) / coming)[begins]
        longest = tokens[begins]
        right = places.right[begins].float().unbind(1)
        best, chosen = 0.0, None
        for path, alive in accepted.items():
            if len(path) < depth:
                # Where this path is the longest that is right.
                gains = (saved * (alive[begins] & (longest == len(path) + 1))) @ right[len(path)]
                for rank, gain in enumerate(gains.tolist()):
                    if gain > best and (*path, rank) not in accepted:
                        best, chosen = gain, (*path, rank)
        if chosen is None:
            break
        accepted[chosen] = accepted[chosen[:-1]] & places.right[:, len(chosen) - 1, chosen[-1]]
        tokens = torch.where(accepted[chosen], tokens.clamp(min=len(chosen) + 1), tokens)
    return [list(path) for path in accepted if path]


def tokens_per_step(tree: DraftTree, places: Places) -> float:
    """Tokens that steps with this tree accept on their way through the texts, the next one among them."""
    tokens = torch.ones_like(places.text)
    alive = [torch.ones_like(tokens, dtype=torch.bool)]
    for parent, path in zip(tree.parents[1:], tree.paths, strict=True):
        alive.append(alive[parent] & places.right[:, len(path) - 1, path[-1]])
        tokens = torch.where(alive[-1], tokens.clamp(min=len(path) + 1), tokens)
    return len(tokens) / int(places.walk(tokens)[0].sum())
