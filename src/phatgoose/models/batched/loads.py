"""How much each expert did for each item of a pass, summed over modules and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class ExpertLoads:
    """What is noted at every module, and summed up once the pass is over."""

    _noted: dict[tuple[int, tuple[int, ...], int], list[tuple[Tensor, Tensor, Tensor]]] = field(
        default_factory=dict, repr=False
    )

    def note(
        self, version: int, members: tuple[int, ...], items: Tensor, chosen: Tensor, weights: Tensor
    ) -> None:
        """Takes in one module's choice for n tokens of these items int64 [n]: candidates int64 [n, k] (−1: none), weights [n, k].

        members: the pool's expert that each candidate is, −1 for none. They are kept until `summed`, so nobody may write into them.
        """
        self._noted.setdefault((version, members, chosen.shape[1]), []).append((items, chosen, weights))

    def summed(self, items: int, sizes: dict[int, int]) -> dict[int, tuple[Tensor, Tensor]]:
        """By version: float64 [items, experts], the weights summed, and int64 [items], how many choices of k experts that were.

        sizes: how many experts each version's pool has.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for (version, members, k), noted in self._noted.items():
            experts = sizes[version]
            if version not in found:
                found[version] = (
                    torch.zeros(items, experts + 1, dtype=torch.float64),
                    torch.zeros(items, dtype=torch.int64),
                )
            weight, times = found[version]
            owners = torch.cat([of for of, _, _ in noted])
            times.index_add_(0, owners, torch.ones_like(owners))
            if not k:
                continue
            table = torch.tensor([*members, -1])  # the last, which −1 finds, is none
            acted = table[torch.cat([chosen for _, chosen, _ in noted]).cpu()]
            place = owners[:, None] * (experts + 1) + torch.where(acted < 0, experts, acted)
            amount = torch.cat([w for _, _, w in noted]).cpu().double()
            weight.view(-1).index_add_(0, place.reshape(-1), amount.reshape(-1))
        return {version: (weight[:, :-1], times) for version, (weight, times) in found.items()}
