"""`hf:DATASET[/CONFIG]`: any dataset that `datasets` can load, from the Hub or a local folder or file.

    hf:super_glue/cb?input={premise} Question: {hypothesis}?&target=label&choices=names
    hf:/data/my_folder?input=question&target=answer            parquet, json, csv, arrow, or saved with save_to_disk

DATASET on the Hub is `name` or `owner/name`; write `owner/name/CONFIG` or, for a name without owner, `name/CONFIG`;
`config=` says it where that is ambiguous. Column options: see `columns`. A class label column counts as its names.
The dataset's train, validation and test splits are kept (`train=`, `validation=`, `test=` name them otherwise, or take
another in their place: `test=validation`); what is missing or unlabelled is taken from train by the split
rule. `revision=` pins the Hub's version.

A dataset that the Hub holds as a script, which `datasets` no longer runs, is read from the Hub's parquet copy, unless a
revision is asked for; the record says so under `copy`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import DownloadError, PhatgooseError, TaskError
from phatgoose.records import SPLITS, Example, SplitName, Task
from phatgoose.registry import unknown
from phatgoose.tasks import messages
from phatgoose.tasks.columns import OPTIONS, Columns, Unlabelled, to_example
from phatgoose.tasks.sources import TaskSource
from phatgoose.tasks.spec import TaskSpec, is_local
from phatgoose.tasks.splits import CHAT, Fractions, build_task

LOCAL_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
COPY = "refs/convert/parquet"
"""The branch on which the Hub keeps a copy of a dataset, as CONFIG/SPLIT/0000.parquet."""
OWN_COPY = "Give your own copy: hf:/path/to/folder, or for prompted: a folder with DATASET.SPLIT.jsonl files (docs/tasks.md)."


def load(spec: TaskSpec, folder: Path | None, fractions: Fractions) -> Task:
    """The task in a dataset; a relative local path starts at `folder` if that is given.

    Raises:
        TaskError: a row can't be read as an example (the message names split and row), or a split isn't there.
        UnknownName: an option or column isn't there.
        DownloadError: the Hub can't be reached, has no such dataset, or holds a script without a copy.
    """
    source: dict[str, Any] = {"spec": spec.text, "source": "hf", "prompt_style": "as the template has it"}
    data = load_data(spec, folder, source)
    columns = Columns.of(spec, Columns(target="target"))

    def read(row: Mapping[str, Any], labels: Mapping[str, list[str]], where: str) -> list[Example]:
        if (chat := messages.columns_of(row, spec.options)) is not None:
            source["prompt_style"] = CHAT
            return messages.to_examples(_filled(row), chat, spec.options, where)
        return [to_example(row, columns, labels)]

    own, dropped = collect(data, spec, read)
    source["fingerprints"] = {name: getattr(part, "_fingerprint", "") for name, part in data.items()}
    return build_task(f"hf:{_short(spec.name)}", own, source, fractions, dropped)


def check(spec: TaskSpec, folder: Path | None) -> str | None:
    """As `TaskSource.check`."""
    path = (folder or Path()) / Path(spec.name).expanduser()
    if path.exists():
        return None
    if is_local(spec.text):
        raise TaskError(f"{path} does not exist.")
    return "the Hub"


def load_data(
    spec: TaskSpec, folder: Path | None = None, source: dict[str, Any] | None = None
) -> Mapping[str, Any]:
    """Split name → `datasets.Dataset`, from a local path or the Hub.

    Into `source`, the task's record, goes which copy was read in place of a dataset script; without a record none is read.
    """
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
            loaded = _hub(name, config, spec.options.get("revision"), source)
    except PhatgooseError:
        raise
    except Exception as cause:
        if local.exists():
            raise TaskError(f"{local} can't be loaded as a dataset: {cause}") from cause
        raise DownloadError(
            f"can't load the dataset {name!r}{f' ({config})' if config else ''} from the Hub: {cause}. "
            "Check its name, the config and the network, or give a local folder: hf:/path/to/folder."
        ) from cause
    return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _hub(name: str, config: str | None, revision: str | None, source: dict[str, Any] | None) -> Any:
    """`name/CONFIG` with two parts may also be `owner/name`: the Hub is asked, the config second."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        return _data_or_copy(name, config, revision, source)
    except DatasetNotFoundError:
        if config is not None or name.count("/") != 1:
            raise
        plain, config = name.split("/")
        return _data_or_copy(plain, config, revision, source)


def _data_or_copy(name: str, config: str | None, revision: str | None, source: dict[str, Any] | None) -> Any:
    import datasets
    import huggingface_hub

    try:
        return datasets.load_dataset(name, config, revision=revision)
    except getattr(huggingface_hub.errors, "HfUriError", ()):
        # `datasets` (5.2) makes URLs of ids without an owner, as super_glue, that it then can't read: the Hub knows them by a newer one.
        if "/" in name or "/" not in (found := huggingface_hub.HfApi().dataset_info(name).id):
            raise
        return _data_or_copy(found, config, revision, source)
    except RuntimeError as cause:
        is_script = str(cause).startswith("Dataset scripts are no longer supported")
        if not is_script or revision is not None or source is None:
            raise
    data, source["copy"] = _copy(name, config)
    return data


def _copy(name: str, config: str | None) -> tuple[Any, dict[str, Any]]:
    """The Hub's parquet copy of a config of a dataset script (of the only one, if none is asked for), and what the record says of it.

    Not `load_dataset(name, revision=COPY)`: it tells splits by words in their names (train_r1 and partial-train would be train),
    and what it caches under the script's name is what `datasets` takes, unsaid, for whatever config is asked for next.
    """
    import datasets

    where, files, record = _copied_files(name)
    if config is None and len(files) > 1:
        raise TaskError(
            f"{name} has several configs: {', '.join(files)}. Write one as ?config=NAME (prompted: ?subset=NAME)."
        )
    config = next(iter(files)) if config is None else config
    if config not in files:
        raise unknown(f"config of {name}", config, files)
    if odd := [split for split in files[config] if not re.fullmatch(r"\w+(\.\w+)*", split)]:
        raise TaskError(
            f"{name} is a dataset script, and the Hub's parquet copy (branch {COPY}) can't stand for it: expected files in "
            f"{config}/SPLIT for each whole split, found some in {', '.join(f'{config}/{split}' for split in odd)} "
            f"(partial-SPLIT is the first part of a split). {OWN_COPY}"
        )
    paths = {split: [where + path for path in found] for split, found in files[config].items()}
    return datasets.load_dataset("parquet", data_files=paths), record | {"config": config}


def _copied_files(name: str) -> tuple[str, dict[str, dict[str, list[str]]], dict[str, Any]]:
    """The copy's place as a URL, its files' paths in order by config and folder of a split, and its commit as a record."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    files: dict[str, dict[str, list[str]]] = {}
    try:
        info = HfApi().dataset_info(name, revision=COPY)
        listed = HfApi().list_repo_files(info.id, repo_type="dataset", revision=info.sha)
    except RevisionNotFoundError:
        listed = []
    for path in sorted(path for path in listed if path.endswith(".parquet")):
        config, _, rest = path.partition("/")
        files.setdefault(config, {}).setdefault(rest.rpartition("/")[0], []).append(path)
    if not files:
        raise DownloadError(
            f"{name} is a dataset script on the Hub, which `datasets` no longer runs, and the Hub has no parquet copy of it "
            f"(branch {COPY}). {OWN_COPY}"
        )
    # By the id that the Hub answers with: `hf://` URLs don't take the ids without an owner that it once had.
    record = {"branch": COPY, "dataset": info.id, "commit": info.sha}
    return f"hf://datasets/{info.id}@{info.sha}/", files, record


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
    read: Callable[[Mapping[str, Any], Mapping[str, list[str]], str], list[Example]],
) -> tuple[dict[SplitName, list[Example]], Counter[str]]:
    """The examples of every chosen split, and how many rows had no answer. `read(row, label names, which row)` makes them."""
    own: dict[SplitName, list[Example]] = {}
    dropped: Counter[str] = Counter()
    for split, part in choose_splits(data, spec).items():
        labels = {c: list(f.names) for c, f in part.features.items() if hasattr(f, "names")}
        own[split] = []
        for i, row in enumerate(part):
            try:
                own[split] += read(row, labels, f"{split} row {i}")
            except Unlabelled:
                dropped[f"unlabelled_{split}"] += 1
            except ValueError as cause:
                raise TaskError(f"{spec.text}, {split} row {i}: {cause}.") from cause
    return own, dropped


def _filled(value: Any) -> Any:
    """A row without what tables fill in: every key that another row's message, call or tool has, with nothing."""
    if isinstance(value, Mapping):
        return {key: _filled(part) for key, part in value.items() if part is not None}
    return [_filled(part) for part in value] if isinstance(value, list) else value


def _short(name: str) -> str:
    """A local path by its last part, a Hub name as it is."""
    return Path(name).stem if name.startswith((".", "/", "~")) else name


SOURCE = TaskSource(load, check, (*OPTIONS, *messages.OPTIONS, *SPLITS, "config", "revision"))
