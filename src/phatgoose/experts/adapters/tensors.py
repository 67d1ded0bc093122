"""Check the tensors of an adapter at one module: which there must be, and of which shape."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from phatgoose.errors import ExpertError

Shape = tuple[int | str, ...]
"""Sizes. One with a name, as "d_in", may be any number above 0, the same wherever the name stands."""


def check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], where: str, prefix: str = "", hint: str = ""
) -> None:
    """Refuses tensors that aren't just those in `shapes`, each of its shape.

    Args:
        where: what has them, as the message begins.
        prefix: what the message puts before their names.
        hint: what it says after a wrong shape, if some of its sizes are numbers that are given here.
    """
    if shapes.keys() != tensors.keys():
        missing, others = (
            ", ".join(prefix + name for name in sorted(names))
            for names in (shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys())
        )
        said = [f"lacks {missing}"] if missing else []
        said += [f"has {others} beyond its config"] if others else []
        raise ExpertError(f"{where} {' and '.join(said)}.")
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        known = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in shape)
        fits = len(found) == len(known) and all(
            one > 0 if isinstance(size, str) else one == size for one, size in zip(found, known, strict=True)
        )
        if not fits:
            expected = f"[{', '.join(map(str, known))}]" + hint * any(isinstance(size, int) for size in shape)
            raise ExpertError(f"{where} has {prefix}{name} {list(found)}, expected {expected}.")
        sizes |= {size: one for size, one in zip(shape, found, strict=True) if isinstance(size, str)}
