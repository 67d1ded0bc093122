"""A recipe: one TOML file that says everything about an experiment.

docs/experiments.md has an example with every table. Each table but [folders] and [claims] is a dataclass here or
in `training`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from phatgoose.errors import PhatgooseError, TaskError
from phatgoose.experts.names import MANIFEST, RECORD_FILE, check_name
from phatgoose.models.base import DTYPES
from phatgoose.ops import BACKENDS
from phatgoose.registry import unknown
from phatgoose.routers.parse import is_router, parse_router
from phatgoose.shipped import pool_folder, recipe_file, recipes
from phatgoose.tasks.lists.entries import SAME_DATASET, Entry, check_no_shared_data, folder_for
from phatgoose.tasks.lists.named import POOLS, SUITES, Suite, pool_entries, suite
from phatgoose.tasks.load import SOURCES, without_path
from phatgoose.tasks.spec import split_spec
from phatgoose.training.config import ExpertConfig, GateConfig, SignatureConfig
from phatgoose.workflows.experiment.admission import SISTERS
from phatgoose.workflows.experiment.measures.values import MEASURES
from phatgoose.workflows.experiment.systems import (
    BASE,
    CHOSEN,
    MAIN,
    MULTITASK,
    ORACLE,
    OWN,
    SISTER,
    check_system,
    expanded,
)

IN_POOL, UNSEEN = "in-pool", "unseen"


class RecipeError(PhatgooseError):
    """A recipe that can't be read or contradicts itself."""


@dataclass(frozen=True, kw_only=True)
class PoolPart:
    """[pool]: which experts there are, trained or taken from a pool."""

    names: tuple[str, ...] = ()
    """Named pools (`tasks/lists/named.py`)."""
    tasks: Mapping[str, str] = field(default_factory=dict)
    """Further tasks: expert's name → spec."""
    only: tuple[str, ...] = ()
    """Keep only the experts of these names; empty: all."""
    leave_out: tuple[str, ...] = ()
    """Leave out the experts of these names."""
    folder: str = ""
    """An existing pool. Experts named after the tasks above are taken from it instead of being trained. Its other
    experts act beside them, and have no task of their own in "in-pool"."""
    train_rows: int = 2000
    """At most this many rows of a task's training split."""
    admit_rows: int = 0
    """An expert that is trained stays in the pool only if on so many validation rows of its own task it is better than
    the base alone, with a paired 95 % interval above 0. 0: all stay. Experts of `folder` stay in any case."""


@dataclass(frozen=True, kw_only=True)
class MeasurePart:
    """[measure]: what the pool is measured on."""

    suites: tuple[str, ...] = (IN_POOL,)
    """Named suites (`tasks/lists/named.py`), "in-pool" (the experts' own tasks), "unseen" (`tasks` below)."""
    tasks: Mapping[str, str] = field(default_factory=dict)
    """Tasks of the suite "unseen": name → spec."""
    test_rows: int = 100
    """At most this many test rows of each task, a fixed random part, the same for all systems."""
    choice_rows: int = 32
    """Validation rows of each task on which oracle and best-single choose."""
    backend: str = "auto"
    """The backend that routes."""
    own_experts: str = ""
    """Experts on the training rows of suites' tasks that have a tier, each named after its task: a pool, or the folder
    `experts` of an experiment. The system own is then measured on these tasks too."""
    admit_rows: int = 0
    """A task of the tier "sisters" is measured only if on so many validation rows its own expert and the best of its
    named sisters gain enough over the base alone, as the two settings below say. 0: all are."""
    admit_own_gain: float = 0.10
    """The least gain of a task's own expert; its paired 95 % interval must also lie above 0."""
    admit_sister_gain: float = 0.04
    """The least gain of the best sister."""
    measures: tuple[str, ...] = ()
    """Further tables of each suite, by these measures (`measures/values.py`). The first one that a suite has is its
    primary one. Empty: none."""


@dataclass(frozen=True, kw_only=True)
class PagePart:
    """[page]: what the page shows beside the numbers."""

    prompts: int = 0
    """Tasks whose first test row is answered and shown token by token, the pool's own first. 0: nothing is traced."""


@dataclass(frozen=True, kw_only=True)
class ExperimentRecipe:
    """One experiment."""

    base: str
    """Spec of the base model."""
    dtype: str = "auto"
    """What it is computed in: auto, float32, bfloat16, float16. A file may also say "fast": see `fast_dtype`."""
    systems: tuple[str, ...] = (
        "base",
        "phatgoose",
        "uniform",
        "merged",
        "random:seed={seed}",
        "best-single",
        "oracle",
    )
    """What is compared (`workflows/experiment/systems.py`); one with {seed} in it is run for every seed."""
    seeds: tuple[int, ...] = (0,)
    """Of systems that draw."""
    pool: PoolPart = field(default_factory=PoolPart)
    measure: MeasurePart = field(default_factory=MeasurePart)
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    signature: SignatureConfig = field(default_factory=SignatureConfig)
    page: PagePart = field(default_factory=PagePart)
    claims: Mapping[str, float] = field(default_factory=dict)
    """Suite → the share of the oracle's gain over the base that PHATGOOSE must recover there: said before measuring."""
    multitask: ExpertConfig | None = None
    """How the system "multitask" is trained; None: as the experts."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """Where data is read from instead of being fetched."""

    def __post_init__(self) -> None:
        self._check_settings()
        self._check_claims()
        for spec in (*self.pool.tasks.values(), *self.measure.tasks.values()):
            if (source := split_spec(spec).source) not in SOURCES:
                raise unknown("task source", source, SOURCES)
        entries = self.pool_entries
        if not entries and not self.pool.folder:
            raise RecipeError(
                "the recipe's pool has no tasks: under [pool], name pools or tasks, or the folder of an existing pool."
            )
        if not self.pool.folder:
            self._check_routers([e.name for e in entries])
        for found in self.suites:
            if found.name != IN_POOL:
                check_no_shared_data(entries, found.entries, found.refuses, found.name, self.folders)
        self._check_sisters()
        # Folders of suites and tasks that this recipe leaves out are fine: several recipes may share one list.
        known = {
            *SOURCES,
            *POOLS,
            *SUITES,
            UNSEEN,
            *self.measure.tasks,
            *(e.name for e in self._all_entries()),
        }
        known |= {e.name for name in SUITES for e in suite(name).entries}
        for name in self.folders:
            if name not in known:
                raise unknown("suite, pool, source or task of a folder", name, known)

    def _check_settings(self) -> None:
        """Refuses settings that mean nothing, or contradict each other."""
        measure, systems = self.measure, self.all_systems
        for part, given in (("systems", self.systems), ("[measure] suites", measure.suites)):
            if not given:
                raise RecipeError(f"{part} is empty: there would be nothing to compare.")
        for name in systems:
            check_system(name)
        if measure.test_rows < 1:
            raise RecipeError("[measure] test_rows is 0: there would be nothing to measure.")
        if measure.choice_rows < 1 and (choosing := [s for s in systems if s in CHOSEN]):
            raise RecipeError(
                f"[measure] choice_rows is 0, and {' and '.join(choosing)} choose by such rows: "
                "leave these systems out, or set it."
            )
        for kind, value, known in (("backend", measure.backend, BACKENDS), ("dtype", self.dtype, DTYPES)):
            if value not in ("auto", *known):
                raise unknown(kind, value, ("auto", *known))
        for name in measure.measures:
            if name not in MEASURES:
                raise unknown("measure", name, MEASURES)
        if measure.tasks and UNSEEN not in measure.suites:
            raise RecipeError(
                f"[measure] tasks are the suite {UNSEEN}, which isn't among the suites: add it, or leave out the tasks."
            )
        if OWN in systems and IN_POOL not in measure.suites and not measure.own_experts:
            raise RecipeError(
                f"the system {OWN} is measured on {IN_POOL}, which isn't among the suites: add it, or leave out {OWN}."
            )
        for name in self.pool.tasks:
            check_name(name)

    def _check_sisters(self) -> None:
        """Refuses settings of suites that name sisters, where there is no such suite."""
        measure, tiers = self.measure, {e.tier for s in self.suites if s.name != IN_POOL for e in s.entries}
        if SISTER in self.all_systems and not tiers & {SAME_DATASET, SISTERS}:
            raise RecipeError(
                f"the system {SISTER} is measured on suites whose tasks name sisters, and none is among the suites: "
                f"add one, or leave out {SISTER}."
            )
        if measure.admit_rows and SISTERS not in tiers:
            raise RecipeError(
                f"[measure] admit_rows admits tasks of the tier {SISTERS}, and no suite has one: add such a suite, or "
                "leave it out."
            )
        if measure.own_experts and not (measure.admit_rows or OWN in self.all_systems):
            raise RecipeError(
                f"[measure] own_experts serve admit_rows and the system {OWN}, and the recipe has neither: add one, or "
                "leave them out."
            )
        for name in ("admit_own_gain", "admit_sister_gain"):
            if not 0 <= (value := getattr(measure, name)) < 1:
                raise RecipeError(f"[measure] {name} is {value}, expected a gain from 0 to below 1.")

    def check_own_experts(self) -> None:
        """Refuses to run without the experts that admit tasks. Not when a recipe is read: one may come without them.

        Raises:
            RecipeError: they are needed and not given, or their folder holds none.
        """
        place = self.measure.own_experts
        if self.measure.admit_rows and not place:
            raise RecipeError(
                "[measure] admit_rows admits tasks by experts on their own training rows: say where these are, by "
                "own_experts or --own-experts (recipes/sisters-own.toml trains those of the suite sisters)."
            )
        if place and not ((Path(place) / MANIFEST).exists() or any(Path(place).glob(f"*/{RECORD_FILE}"))):
            raise RecipeError(
                f"{place} holds no experts: [measure] own_experts is a pool, or the folder `experts` of an experiment."
            )

    def _check_claims(self) -> None:
        for name, floor in self.claims.items():
            if name not in self.measure.suites:
                raise unknown("suite of a claim", name, self.measure.suites)
            if not 0 < floor <= 1:
                raise RecipeError(f"[claims] {name} is {floor}, expected a share above 0 and at most 1.")
        if self.claims and (missing := [s for s in (BASE, MAIN, ORACLE) if s not in self.all_systems]):
            raise RecipeError(
                f"[claims] compare {MAIN} with {BASE} and {ORACLE}: add {', '.join(missing)} to the systems."
            )

    def _check_routers(self, names: Sequence[str]) -> None:
        """Refuses routers that can't serve a pool of these experts."""
        for system in self.all_systems:
            if is_router(system):
                parse_router(system).check(names)

    @property
    def needs_signatures(self) -> bool:
        """Whether any system reads the experts' data signatures."""
        return any(parse_router(name).reads for name in self.all_systems if is_router(name))

    @property
    def all_systems(self) -> tuple[str, ...]:
        return expanded(self.systems, self.seeds)

    @property
    def pool_entries(self) -> tuple[Entry, ...]:
        """The entries that experts are trained on, names unique."""
        found = self._all_entries()
        names = [e.name for e in found]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise RecipeError(
                f"two of the pool's tasks are named {', '.join(twice)}: leave one out by another name."
            )
        for name in (*self.pool.only, *self.pool.leave_out):
            if name not in names and not self.pool.folder:  # whose experts are known once it is read
                raise unknown("task of the pool", name, names)
        only = set(self.pool.only) or set(names)
        return tuple(e for e in found if e.name in only and e.name not in self.pool.leave_out)

    def _all_entries(self) -> list[Entry]:
        return [*(e for name in self.pool.names for e in pool_entries(name)), *_entries(self.pool.tasks)]

    def taken(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the experts `names`, which are all of `pool.folder`, that the recipe's pool has.

        Raises:
            UnknownName, RoutingError: an expert to keep or leave out is neither among them nor a task, or a system
                can't serve these experts. RecipeError: nothing is left, or the multitask expert lacks some data.
        """
        tasks, known = [e.name for e in self.pool_entries], [e.name for e in self._all_entries()]
        for name in (*self.pool.only, *self.pool.leave_out):
            if name not in (*names, *known):
                raise unknown("expert or task of the pool", name, [*names, *known])
        only = self.pool.only or names
        kept = tuple(n for n in names if n in only and n not in self.pool.leave_out)
        if not kept and not tasks:
            raise RecipeError(f"no expert of {self.pool.folder} is left.")
        self._check_routers(list(dict.fromkeys((*tasks, *kept))))
        if MULTITASK in self.all_systems and (without := [n for n in kept if n not in tasks]):
            raise RecipeError(
                f"the system multitask needs the data of every expert: name tasks for {', '.join(without)} under "
                "[pool], or leave it out."
            )
        return kept

    def group_of(self, name: str) -> str:
        """The named pool that the expert `name` is of; "" if it is one of the recipe's own tasks."""
        return next((g for g in self.pool.names if any(e.name == name for e in pool_entries(g))), "")

    @property
    def suites(self) -> tuple[Suite, ...]:
        """What is measured; a suite's own-copy tasks are left out where no folder has been given for them."""
        own = {IN_POOL: self.pool_entries, UNSEEN: _entries(self.measure.tasks)}
        found = tuple(Suite(n, own[n]) if n in own else suite(n) for n in self.measure.suites)
        for one in found:
            if not one.entries:
                raise RecipeError(f"the suite {one.name!r} has no tasks.")
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def without_paths(self) -> dict[str, Any]:
        """As `to_json`, for results that are given away: of this machine's files and folders only the names."""
        data = self.to_json()
        data["base"] = local_name(self.base)
        data["signature"]["encoder"] = local_name(self.signature.encoder)
        data["folders"] = {name: Path(folder).name for name, folder in self.folders.items()}
        data["pool"]["folder"] = Path(self.pool.folder).name
        data["measure"]["own_experts"] = Path(self.measure.own_experts).name
        for part in ("pool", "measure"):
            data[part]["tasks"] = {name: without_path(spec) for name, spec in data[part]["tasks"].items()}
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str = "the recipe") -> ExperimentRecipe:
        """The recipe that `to_json` or a TOML file describes.

        Raises:
            UnknownName: a setting that doesn't exist. RecipeError: one of the wrong type.
        """
        made = _dataclass_of(ExperimentRecipe, data, where)
        assert isinstance(made, ExperimentRecipe)
        return made

    @staticmethod
    def read(
        path: str | Path,
        folders: Mapping[str, str] | None = None,
        pool: str | Path | None = None,
        own_experts: str | Path | None = None,
    ) -> ExperimentRecipe:
        """The recipe in a TOML file. What is given goes before its own. Relative paths start where the file is.

        Args:
            path: or the name of a recipe that comes with phatgoose, where there is no such file.

        Raises:
            RecipeError: the file is missing or no TOML; others as `from_json`.
        """
        path = recipe_file(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as cause:
            known = "" if path.exists() else f" These come with phatgoose: {', '.join(recipes())}."
            raise RecipeError(f"{path} can't be read as a recipe: {cause}.{known}") from cause
        # Folders are made absolute here: steps may run in processes with another current folder.
        own = data.get("folders", {})
        if not isinstance(own, dict) or not all(isinstance(v, str) for v in own.values()):
            raise RecipeError(f'{path}, [folders]: expected name = "folder".')
        if empty := [name for name, folder in {**own, **(folders or {})}.items() if not folder]:
            raise RecipeError(f"the folder for {empty[0]!r} is empty: give one, or leave {empty[0]!r} out.")
        placed = {k: _absolute(path.parent / Path(v).expanduser()) for k, v in own.items()}
        data["folders"] = placed | {k: _absolute(v) for k, v in (folders or {}).items()}
        for name, folder in data["folders"].items():
            if not Path(folder).is_dir():
                raise TaskError(f"the folder for {name!r} is {folder}, which is not a folder.")
        own_pool = data.get("pool", {})
        if isinstance(own_pool, dict):
            # An empty text means no folder, as by default. As a path, it would be the recipe's own folder.
            if isinstance(folder := own_pool.get("folder"), str) and folder:
                own_pool["folder"] = _absolute(pool_folder(Path(folder).expanduser(), near=path.parent))
            if pool:
                data["pool"] = own_pool | {"folder": _absolute(pool_folder(pool))}
        measure = data.get("measure", {})
        if isinstance(measure, dict):
            if isinstance(place := measure.get("own_experts"), str) and place:
                measure["own_experts"] = _absolute(path.parent / Path(place).expanduser())
            if own_experts:
                data["measure"] = measure | {"own_experts": _absolute(own_experts)}
        if data.get("dtype") == "fast":
            data["dtype"] = fast_dtype()
        return ExperimentRecipe.from_json(data, str(path))


def fast_dtype() -> str:
    """bfloat16 where this machine computes in it (three times as fast there), else float32."""
    fast = (
        torch.cuda.is_available()
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    )
    return "bfloat16" if fast else "float32"


def _absolute(path: str | Path) -> str:
    """Absolute, since a worker elsewhere may have another current folder."""
    return str(Path(path).expanduser().absolute())


def _entries(tasks: Mapping[str, str]) -> tuple[Entry, ...]:
    return tuple(Entry(name, (spec,)) for name, spec in tasks.items())


def local_name(spec: str) -> str:
    """The last part of a path to a folder of this machine; anything else as it is."""
    return Path(spec).name if spec.startswith(("/", ".", "~")) else spec


def _dataclass_of(kind: Any, data: Any, where: str) -> Any:
    """The dataclass that TOML or JSON describes; lists become tuples.

    Raises:
        UnknownName: a setting that doesn't exist. RecipeError: one of the wrong type, or missing.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected settings, got {type(data).__name__}.")
    hints, values = get_type_hints(kind), {}
    types = {f.name: hints[f.name] for f in fields(kind)}
    for name, given in data.items():
        if name not in types:
            raise unknown(f"setting in {where}", name, types)
        table = next((t for t in (types[name], *get_args(types[name])) if is_dataclass(t)), None)
        if table is not None and (given is not None or table is types[name]):
            values[name] = _dataclass_of(table, given, f"{where}, [{name}]")
            continue
        values[name] = tuple(given) if isinstance(given, list) else given
        expected, fits = _TYPES.get(types[name], ("", lambda value: True))
        if not fits(values[name]):
            raise RecipeError(f"{where}: {name} is {values[name]!r}, expected {expected}.")
    try:
        return kind(**values)
    except TypeError as cause:
        raise RecipeError(f"{where}: {str(cause).partition('() ')[2] or cause}.") from cause


def _is(kind: Any) -> Callable[[Any], bool]:
    """Whether a value is of this kind. A bool is no number, although Python says that it is an int."""
    return lambda value: isinstance(value, kind) and not isinstance(value, bool)


def _all(container: type, kind: Any) -> Callable[[Any], bool]:
    """Whether a value is such a list or mapping, with values of this kind."""

    def fits(value: Any) -> bool:
        found = value.values() if isinstance(value, Mapping) else value
        return isinstance(value, container) and all(map(_is(kind), found))

    return fits


_TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("a text", _is(str)),
    int: ("a whole number", lambda value: _is(int)(value) and value >= 0),
    float: ("a number", _is(int | float)),
    tuple[str, ...]: ("a list of texts", _all(tuple, str)),
    tuple[int, ...]: ("a list of whole numbers", lambda value: value != () and _all(tuple, int)(value)),
    Mapping[str, str]: ("names and texts", _all(Mapping, str)),
    Mapping[str, float]: ("names and numbers", _all(Mapping, int | float)),
}
"""Type of a field → (what is expected there, its check). Fields of other types check themselves."""


def without_own_copies(recipe: ExperimentRecipe, found: Suite) -> tuple[Suite, tuple[str, ...]]:
    """(the suite without its own-copy tasks for which there is no file, the names of those)."""
    missing = []
    for one in (e for e in found.entries if e.name in found.own_copy):
        folder = folder_for(one.specs[0], (one.name, found.name), recipe.folders)
        if folder is None or not any(Path(folder).glob(f"{one.name}.*")):
            missing.append(one.name)
    return replace(found, entries=tuple(e for e in found.entries if e.name not in missing)), tuple(missing)
