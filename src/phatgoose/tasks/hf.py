"""`hf:DATASET[/CONFIG]`: any dataset that `datasets` can load, from the Hub or a local folder or file.

    hf:super_glue/cb?input={premise} Question: {hypothesis}?&target=label&choices=names
    hf:/data/my_folder?input=question&target=answer            parquet, json, csv, arrow, or saved with save_to_disk

DATASET on the Hub is `name` or `owner/name`; write `owner/name/CONFIG` or, for a name without owner, `name/CONFIG`;
`config=` says it where that is ambiguous. Column options: see `columns`. A class label column counts as its names.
The dataset's train, validation and test splits are kept (`train=`, `validation=`, `test=` name them otherwise, or take
another in their place: `test=validation`); what is missing or unlabelled is taken from train by the split
rule. `revision=` pins the Hub's version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import DownloadError, TaskError
from phatgoose.records import SPLITS, Example, SplitName, Task
from phatgoose.registry import unknown
from phatgoose.tasks.columns import OPTIONS, Columns, Unlabelled, to_example
from phatgoose.tasks.spec import TaskSpec
from phatgoose.tasks.splits import Fractions, build_task

LOCAL_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


def load(spec: TaskSpec, folder: Path | None, fractions: Fractions) -> Task:
    """The task in a dataset; a relative local path starts at `folder` if that is given.

    Raises:
        TaskError: a row can't be read as an example (the message names split and row), or a split isn't there.
        UnknownName: an option or column isn't there.
        DownloadError: the Hub can't be reached or has no such dataset.
    """
    spec.check_options((*OPTIONS, *SPLITS, "config", "revision"))
    data = load_data(spec, folder)
    columns = Columns.of(spec, Columns(target="target"))
    own, dropped = collect(data, spec, lambda row, labels: to_example(row, columns, labels))
    source: dict[str, Any] = {"spec": spec.text, "source": "hf", "prompt_style": "as the template has it"}
    source["fingerprints"] = {name: getattr(part, "_fingerprint", "") for name, part in data.items()}
    return build_task(f"hf:{_short(spec.name)}", own, source, fractions, dropped)


def load_data(spec: TaskSpec, folder: Path | None = None) -> Mapping[str, Any]:
    """Split name → `datasets.Dataset`, from a local path or the Hub."""
    import datasets

    name, config = spec.name, spec.options.get("config")
    local = (folder or Path()) / Path(name).expanduser()
    try:
        if local.exists():
            loaded = _local(local, config)
        else:
            if name.startswith((".", "/", "~")):
                raise TaskError(f"{local} does not exist.")
            parts = name.split("/")
            if config is None and len(parts) == 3:
                name, config = "/".join(parts[:2]), parts[2]
            loaded = _hub(name, config, spec.options.get("revision"))
    except TaskError:
        raise
    except Exception as cause:
        if local.exists():
            raise TaskError(f"{local} can't be loaded as a dataset: {cause}") from cause
        raise DownloadError(
            f"can't load the dataset {name!r}{f' ({config})' if config else ''} from the Hub: {cause}. "
            "Check its name, the config and the network, or give a local folder: hf:/path/to/folder."
        ) from cause
    return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _hub(name: str, config: str | None, revision: str | None) -> Any:
    """`name/CONFIG` with two parts may also be `owner/name`: the Hub is asked, the config second."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        return datasets.load_dataset(name, config, revision=revision)
    except DatasetNotFoundError:
        if config is not None or name.count("/") != 1:
            raise
        plain, config = name.split("/")
        return datasets.load_dataset(plain, config, revision=revision)


def _local(path: Path, config: str | None) -> Any:
    import datasets

    if path.is_file():
        ending = path.name.removesuffix(".gz").rpartition(".")[2]
        if f".{ending}" not in LOCAL_FORMATS:
            raise TaskError(
                f"{path}: expected a file ending in {', '.join(LOCAL_FORMATS)} (or .gz of these)."
            )
        return datasets.load_dataset(LOCAL_FORMATS[f".{ending}"], data_files=str(path))
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path), config)


def choose_splits(data: Mapping[str, Any], spec: TaskSpec) -> dict[SplitName, Any]:
    """Which of the dataset's splits stands for which of ours: as the options say, else by name; a lone split is train.

    A split that an option names is not used a second time under its own name.
    """
    named = {spec.options[s] for s in SPLITS if s in spec.options}
    chosen: dict[SplitName, Any] = {}
    for split in SPLITS:
        name = spec.options.get(split, split if split in data and split not in named else "")
        if name and name not in data:
            raise unknown(f"split of {spec.name}", name, data)
        if name:
            chosen[split] = data[name]
    if not chosen and len(data) == 1:
        chosen["train"] = next(iter(data.values()))
    if not chosen:
        raise TaskError(
            f"{spec.text} has the splits {sorted(data)}: choose with ?train=…&validation=…&test=…"
        )
    return chosen


def collect(
    data: Mapping[str, Any],
    spec: TaskSpec,
    read: Callable[[Mapping[str, Any], Mapping[str, list[str]]], Example],
) -> tuple[dict[SplitName, list[Example]], Counter[str]]:
    """The examples of every chosen split, and how many rows had no answer. `read(row, label names)` makes one."""
    own: dict[SplitName, list[Example]] = {}
    dropped: Counter[str] = Counter()
    for split, part in choose_splits(data, spec).items():
        labels = {c: list(f.names) for c, f in part.features.items() if hasattr(f, "names")}
        own[split] = []
        for i, row in enumerate(part):
            try:
                own[split].append(read(row, labels))
            except Unlabelled:
                dropped[f"unlabelled_{split}"] += 1
            except ValueError as cause:
                raise TaskError(f"{spec.text}, {split} row {i}: {cause}.") from cause
    return own, dropped


def _short(name: str) -> str:
    """A local path by its last part, a Hub name as it is."""
    return Path(name).stem if name.startswith((".", "/", "~")) else name
