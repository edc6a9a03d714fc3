"""Distribution of store items over the layers of an image, so that a change touches few bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


@dataclass(frozen=True)
class Item:
    """A part of an image that belongs into one layer as a whole."""

    name: str
    """A name that stays the same if the content changes; it breaks ties."""
    path: str
    size: int
    """In bytes, unpacked."""
    references: Collection[str] = ()
    """Paths of the items whose change changes this one."""


@dataclass
class _Group:
    """Items of one layer. ``size`` is rounded, ``causes`` is a bit for each item."""

    items: list[Item]
    size: int
    causes: int

    @property
    def cost(self) -> int:
        return self.size * self.causes.bit_count()


def plan(items: Sequence[Item], maximum: int) -> list[list[Item]]:
    """Distribute items over at most ``maximum`` layers.

    A layer is sent again if one of its items changes, and an item changes if one that it needs,
    directly or not, changes. So a layer costs its size times the number of items whose change
    changes it. Each item starts in a layer of its own; then, again and again, the two layers are
    merged that add least to the sum of the costs.

    Sizes are rounded to powers of two and names break ties, so that a small update gives the same
    plan. What few changes touch comes first, because engines share equal lowest layers.
    """
    ordered = sorted(items, key=lambda item: (item.name, item.path))
    causes = _causes(ordered)
    groups = [_Group([item], 1 << item.size.bit_length(), causes[item.path]) for item in ordered]
    nearest = [_nearest(groups, index) for index in range(len(groups))]
    while len(groups) > maximum:
        first = min(range(len(groups)), key=lambda index: (*nearest[index], index))
        second = nearest[first][-1]
        low, high = sorted((first, second))
        one, other = groups[low], groups.pop(high)
        groups[low] = _Group(
            [*one.items, *other.items], one.size + other.size, one.causes | other.causes
        )
        del nearest[high]
        for index, (_, _, partner) in enumerate(nearest):
            if index == low or partner in (low, high):
                nearest[index] = _nearest(groups, index)
            else:
                moved = partner - (partner > high)
                nearest[index] = min(
                    (*nearest[index][:2], moved), (*_growth(groups[index], groups[low]), low)
                )
    groups.sort(key=lambda group: (group.causes.bit_count(), group.items[0].name))
    return [group.items for group in groups]


def _causes(items: Sequence[Item]) -> Mapping[str, int]:
    """Return for each path the items whose change changes it, itself included, as bits."""
    causes = {item.path: 1 << number for number, item in enumerate(items)}
    is_complete = False
    while not is_complete:
        is_complete = True
        for item in items:
            joined = causes[item.path]
            for reference in item.references:
                joined |= causes.get(reference, 0)
            is_complete = is_complete and joined == causes[item.path]
            causes[item.path] = joined
    return causes


def _nearest(groups: Sequence[_Group], index: int) -> tuple[int, int, int]:
    """Return what the cheapest merge of a group adds, the size of the result, and its partner."""
    candidates = (
        (*_growth(groups[index], group), other)
        for other, group in enumerate(groups)
        if other != index
    )
    return min(candidates, default=(0, 0, index))


def _growth(one: _Group, other: _Group) -> tuple[int, int]:
    size = one.size + other.size
    cost = size * (one.causes | other.causes).bit_count()
    return cost - one.cost - other.cost, size
