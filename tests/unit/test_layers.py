"""Distribution of store items over layers: complete, stable, and cheap to update."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.runtime.layers import Item, plan

if TYPE_CHECKING:
    from collections.abc import Sequence


def closure(count: int, seed: int) -> list[Item]:
    """Return items of which each refers to a few earlier ones, with sizes like those of Guix."""
    rng = random.Random(seed)  # noqa: S311 -- no secret
    items: list[Item] = []
    for number in range(count):
        needed = rng.sample(items, min(len(items), rng.randint(0, 4)))
        size = int(rng.lognormvariate(12.5, 2))
        paths = [item.path for item in needed]
        items.append(Item(f"item-{number}", f"/gnu/store/{number}", size, paths))
    return items


def dependents(items: Sequence[Item], changed: Item) -> set[str]:
    """Return the paths of the items that change with another one."""
    paths = {changed.path}
    for item in items:
        if paths.intersection(item.references):
            paths.add(item.path)
    return paths


def moved(layers: Sequence[Sequence[Item]], paths: set[str]) -> int:
    """Return the bytes of the layers that contain one of the items."""
    touched = [layer for layer in layers if any(item.path in paths for item in layer)]
    return sum(item.size for layer in touched for item in layer)


@given(count=st.integers(0, 40), maximum=st.integers(1, 20), seed=st.integers(0, 99))
def test_every_item_is_in_one_layer(count: int, maximum: int, seed: int) -> None:
    items = closure(count, seed)
    layers = plan(items, maximum)
    assert sorted(item.path for layer in layers for item in layer) == sorted(
        item.path for item in items
    )
    assert len(layers) == min(count, maximum)
    shuffled = random.Random(seed).sample(items, len(items))  # noqa: S311 -- no secret
    assert plan(shuffled, maximum) == layers


def test_updates_move_little_more_than_what_changed() -> None:
    """50 updates of one of 250 items: the goal is at most 1.5 times the changed bytes."""
    items = closure(250, seed=3)
    layers = plan(items, 59)
    rng = random.Random(4)  # noqa: S311 -- no secret
    changes = [dependents(items, rng.choice(items)) for _ in range(50)]
    changed = sum(item.size for paths in changes for item in items if item.path in paths)
    assert sum(moved(layers, paths) for paths in changes) <= 1.5 * changed


def test_small_update_keeps_the_plan() -> None:
    items = closure(120, seed=5)
    names = [[item.name for item in layer] for layer in plan(items, 30)]
    updated = [
        Item(item.name, f"{item.path}-new", item.size * 21 // 20, [
            f"{path}-new" for path in item.references
        ])
        for item in items
    ]  # fmt: skip
    assert (
        sum(
            layer in names
            for layer in ([item.name for item in layer] for layer in plan(updated, 30))
        )
        >= 20
    )


def test_circular_references_end() -> None:
    items = [Item("a", "/a", 1, ["/b"]), Item("b", "/b", 1, ["/a"])]
    assert plan(items, 1) == [items]
