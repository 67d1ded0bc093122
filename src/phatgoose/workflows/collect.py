"""A pool of a folder full of adapters: what can be taken, of which base, and what is left out and why."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel

from phatgoose.errors import BaseModelError, PhatgooseError, PoolError, brief
from phatgoose.experts.expert import Expert
from phatgoose.experts.health import Warned
from phatgoose.experts.names import slug
from phatgoose.experts.pool import Pool
from phatgoose.fingerprints import check_same_base, same_base
from phatgoose.models.attach.fitting import fit_router
from phatgoose.models.attach.modules import module_at
from phatgoose.models.attach.site import placed_pool
from phatgoose.models.base.fingerprint import fingerprint
from phatgoose.models.base.gguf import ALIASES
from phatgoose.models.base.load import find_source
from phatgoose.models.base.without_weights import base_at_hand, why_not_at_hand
from phatgoose.records import Fingerprint
from phatgoose.routers.fitting import Fit

_IN_HUB_CACHE = re.compile(r"(?:^|[/\\])models--([^/\\]+?)--([^/\\]+)(?:[/\\]|$)")


@dataclass
class Collected:
    """Adapters that go together."""

    pool: Pool
    left_out: Mapping[str, str]
    """What was given → why it isn't in the pool."""
    base: str | None
    """The base's name; None if nothing names one."""
    not_at_hand: str | None
    """Why the base's weights couldn't be read here; None if they were, or there is no base."""
    fit: Fit | None
    """The router for the pool; None if the base isn't at hand."""

    def warned(self) -> list[Warned]:
        """What a user should know of the pool, compared with the base if it is at hand."""
        if self.base is None or self.not_at_hand is not None:
            return self.pool.warned()
        try:
            tokenizer = find_source(self.base).tokenizer()
        except BaseModelError:  # loading the base will say so
            tokenizer = None
        return self.pool.warned({}, tokenizer)


def collect(
    found: Mapping[str, Expert],
    left_out: Mapping[str, str],
    *,
    base: str | None = None,
    any_base: bool = False,
    there: Pool | None = None,
) -> Collected:
    """Takes those adapters that are of one base, and fit it as far as that can be told here.

    Nothing is fetched. If the base's weights are on this machine, every adapter is checked against them, and the pool
    gets the base's fingerprint; if not, it gets the base's name.

    Args:
        found: the adapters, by what was given on the command line.
        left_out: what couldn't be read, and why.
        base: the base; None: the one that most adapters name.
        any_base: take adapters that name another base, too.
        there: a pool that these are to be added to, whose base is known.

    Raises:
        PoolError: nothing can be taken, or two bases are named by equally many. BaseModelError: `base` isn't the base
            of the pool that is there.
    """
    left = dict(left_out)
    base = base or (there.base_spec if there else None)
    weights, not_at_hand, known = (None, None, None) if base is None else _at_hand(base)
    if there is not None and there.base is not None:
        if known is not None and same_base(there.base, known).level != "same":
            weights, not_at_hand = None, "what is there now is another model"
        known = there.base
    taken, group = _of_one_base(found, base, known, any_base, left, there)
    if base is None and group is not None:
        base = group.spec
        weights, not_at_hand, known = _at_hand(base)
        known = known or group.fingerprint
    if weights is not None:
        taken = _fitting(taken, weights, known, left)
    taken = _of_one_shape(taken, [] if there is None else there.experts, left)
    if not taken:
        what = (
            "none of these can be taken. Give folders as PEFT's save_pretrained writes them, with adapter_config.json "
            "and adapter_model.safetensors; or mend these:"
        )
        raise PoolError("\n".join([what, *by_reason(left)]))
    experts = _named_apart(taken)
    own = (
        replace(known, spec=place_of_base(base))
        if known is not None and base is not None
        else base and place_of_base(base)
    )
    pool = Pool([*(there.experts if there else ()), *experts], own)
    fit = None if weights is None else fit_router(weights, pool)
    return Collected(pool, left, base and place_of_base(base), not_at_hand, fit)


def by_reason(left_out: Mapping[str, str]) -> list[str]:
    """One line for each reason, with what it is of: "a, b: it has no adapter_config.json."."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for given, why in left_out.items():
        kinds[_plain_reason(given, why)].append(given)
    short = {given: Path(given).name or given for given in left_out}
    twice = {name for name, n in Counter(short.values()).items() if n > 1}
    return [
        f"{', '.join(given if short[given] in twice else short[given] for given in group)}: {why}"
        for why, group in kinds.items()
    ]


def _plain_reason(given: str, why: str) -> str:
    """A reason without the name of what was given, so that equal reasons are equal texts."""
    place = rf"(?<![\w./-]){re.escape(given.rstrip('/'))}"  # as a whole: "a" is in many words
    why = re.sub(rf"expert '[^']*' \({place}/?\)", "it", why)
    why = re.sub(rf"{place}/(?=[\w.])", "", why)
    why = re.sub(rf"{place}/?(?![\w-])", "it", why)
    return re.sub(r"expert '[^']*'", "it", why).removeprefix("it: ")


@dataclass
class _Group:
    """Adapters of one base, as far as their records tell."""

    names: Counter[str] = field(default_factory=Counter)
    fingerprint: Fingerprint | None = None
    members: list[str] = field(default_factory=list)

    @property
    def spec(self) -> str:
        return self.fingerprint.spec if self.fingerprint else self.names.most_common(1)[0][0]

    def has(self, name: str | None, found: Fingerprint | None) -> bool:
        if found is not None and self.fingerprint is not None:
            return same_base(self.fingerprint, found).level == "same"
        return name in self.names


def _of_one_base(
    found: Mapping[str, Expert],
    base: str | None,
    known: Fingerprint | None,
    any_base: bool,
    left: dict[str, str],
    there: Pool | None,
) -> tuple[dict[str, Expert], _Group | None]:
    """(the adapters of the base that is asked for, or most name; their group, or None if nobody names a base).

    Adapters that name no base go with any. If none names the base that is asked for, it is taken to be another place
    of the one that most name.
    """
    groups: list[_Group] = []
    for given, expert in found.items():
        name, own = _name_of(expert), expert.base
        if name is None and own is None:
            continue
        group = next((g for g in groups if g.has(name, own)), None)
        if group is None:
            groups.append(group := _Group())
        group.fingerprint = group.fingerprint or own
        group.members.append(given)
        if name is not None:
            group.names[name] += 1
    if not groups:
        return dict(found), None
    groups.sort(key=lambda g: -len(g.members))
    names: set[str | None] = set() if base is None else {_normal(base)}
    names |= {_name_of(expert) for expert in there.experts} if there else set()
    asked = [g for g in groups if _is_asked(g, names, known)]
    chosen = (asked or groups)[0]
    if any_base:
        return dict(found), chosen
    if there is None and not asked and len(groups) > 1 and len(groups[1].members) == len(chosen.members):
        one, other = (f"{g.spec} ({', '.join(Path(m).name for m in g.members[:3])}, …)" for g in groups[:2])
        raise PoolError(
            f"as many adapters are of the base {one} as of {other}. Say which with --base, and the others are left "
            "out; or, if these are two names of one model, take all with --any-base."
        )
    allowed = {member for g in (asked or ([] if there else [chosen])) for member in g.members}
    for group in groups:
        for given in group.members:
            if given not in allowed:
                wanted = base if base and (asked or there) else chosen.spec
                left[given] = (
                    f"it is of another base, {brief(group.spec)}, and not of {brief(wanted)}. If these are two names "
                    "of one model, take it with --any-base."
                )
    return {given: expert for given, expert in found.items() if given not in left}, chosen


def _is_asked(group: _Group, names: set[str | None], known: Fingerprint | None) -> bool:
    if known is not None and group.fingerprint is not None:
        return same_base(known, group.fingerprint).level == "same"
    return not names.isdisjoint(group.names)


def _name_of(expert: Expert) -> str | None:
    name = expert.base.spec if expert.base is not None else expert.base_name
    return None if name is None else _normal(name)


def _normal(name: str) -> str:
    """A base's name without what differs between machines: a folder of the Hub's cache is the model that it holds."""
    if match := _IN_HUB_CACHE.search(name):
        return f"{match[1]}/{match[2]}"
    return place_of_base(name)


def place_of_base(name: str) -> str:
    """A folder or file that is here by its whole path, so that the pool can be used from any folder."""
    place = os.path.expanduser(name)  # os.path raises nothing, whatever a config names
    if name in ALIASES or not name or not os.path.exists(place):
        return name.rstrip("/") or name
    return os.path.abspath(place)


def _at_hand(base: str) -> tuple[PreTrainedModel | None, str | None, Fingerprint | None]:
    """(the base's weights, or None; why they can't be read here, or None; its fingerprint, or None)."""
    if (why := why_not_at_hand(base)) is not None:
        return None, why, None
    try:
        model = base_at_hand(base)
        return model, None, fingerprint(model, base)
    except BaseModelError as error:
        return None, str(error), None


def _fitting(
    found: Mapping[str, Expert], model: PreTrainedModel, known: Fingerprint | None, left: dict[str, str]
) -> dict[str, Expert]:
    """The adapters that can be routed on this model."""
    taken = {}
    for given, expert in found.items():
        try:
            if known is not None and expert.base is not None:
                check_same_base(known, expert.base, "it")
            pool, modules, _ = placed_pool(model, Pool([expert]))
            for path in pool.modules:
                module_at(modules, path, pool)
        except PhatgooseError as error:
            left[given] = str(error)
        else:
            taken[given] = expert
    return taken


def _of_one_shape(
    found: Mapping[str, Expert], there: Sequence[Expert], left: dict[str, str]
) -> dict[str, Expert]:
    """The adapters whose modules have the sizes that most give them. 0 is a size that only the base knows."""
    sizes: dict[str, Counter[tuple[int, int, bool]]] = defaultdict(Counter)
    for expert in (*there, *found.values()):
        for path, size in expert.sizes.items():
            if size[0] and size[1]:
                sizes[path][size] += 1
    taken = {}
    for given, expert in found.items():
        for path, size in expert.sizes.items():
            if not (size[0] and size[1]):
                continue
            (most, count), *_ = sizes[path].most_common(1)
            if size != most and sizes[path][size] < count:
                left[given] = (
                    f"it adapts {path} of {size[0]} → {size[1]}, where {count} others have {most[0]} → {most[1]}: it "
                    "is of another base."
                )
                break
        else:
            taken[given] = expert
    return taken


def _named_apart(found: Mapping[str, Expert]) -> list[Expert]:
    """The experts under names that differ: where several have one name, their parent folder's comes before it."""
    often = Counter(expert.name for expert in found.values())
    used: set[str] = set()
    experts = []
    for given, expert in found.items():
        name = expert.name
        if often[name] > 1:
            parent = Path(given).absolute().parent.name if Path(given).exists() else given.partition(":")[0]
            name = slug(f"{parent}-{name}")
        number, first = 1, name
        while name in used:
            number += 1
            name = slug(f"{first[:90]}-{number}")
        used.add(name)
        experts.append(expert if name == expert.name else expert.renamed(name))
    return experts
