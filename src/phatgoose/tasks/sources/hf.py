"""`hf:DATASET[/CONFIG]`: any dataset that `datasets` loads, local or from the Hub."""

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
from phatgoose.tasks.columns import OPTIONS, Columns, to_example
from phatgoose.tasks.examples import read_examples
from phatgoose.tasks.sources import TaskSource
from phatgoose.tasks.spec import TaskSpec
from phatgoose.tasks.splits import CHAT, Fractions, build_task

LOCAL_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
COPY = "refs/convert/parquet"
"""The branch on which the Hub keeps a copy of a dataset, as CONFIG/SPLIT/0000.parquet."""
ADVICE = (
    "Give your own copy: hf:/path/to/folder, or for prompted: a folder with DATASET.SPLIT.jsonl files "
    "(docs/tasks.md)."
)


def load(spec: TaskSpec, folder: Path | None, fractions: Fractions) -> Task:
    """The task in a dataset; a relative local path starts at `folder` if that is given.

    Raises:
        TaskError: a row can't be read as an example (the message names split and row), or a split isn't there.
        UnknownName: an option or column isn't there.
        DownloadError: the Hub can't be reached, has no such dataset, or holds a script without a copy.
    """
    source: dict[str, Any] = {"prompt_style": "as the template has it"}
    data = load_data(spec, folder, source)
    columns = Columns.from_spec(spec, Columns(target="target"))

    def read(row: Mapping[str, Any], labels: Mapping[str, list[str]], where: str) -> list[Example]:
        if (chat := messages.message_columns(row, spec.options)) is not None:
            source["prompt_style"] = CHAT
            return messages.to_examples(_without_nulls(row), chat, spec.options, where)
        return [to_example(row, columns, labels)]

    own, dropped = read_splits(data, spec, read)
    source["fingerprints"] = {name: getattr(part, "_fingerprint", "") for name, part in data.items()}
    name = Path(spec.name).stem if spec.has_path else spec.name
    return build_task(f"hf:{name}", own, source, fractions, dropped)


def check(spec: TaskSpec, folder: Path | None) -> str | None:
    path = spec.local_path(folder)
    if path.exists():
        return None
    if spec.has_path:
        raise TaskError(f"{path} does not exist.")
    return "the Hub"


def load_data(
    spec: TaskSpec, folder: Path | None = None, source: dict[str, Any] | None = None
) -> Mapping[str, Any]:
    """Split name → `datasets.Dataset`, from a local path or the Hub.

    Args:
        source: the task's record, to which the copy is added that was read instead of a dataset script. None: no
            copy is read.
    """
    import datasets

    name, config, is_local = spec.name, spec.options.get("config"), check(spec, folder) is None
    try:
        if is_local:
            loaded = _load_local(spec.local_path(folder), config)
        else:
            parts = name.split("/")
            if config is None and len(parts) == 3:
                name, config = "/".join(parts[:2]), parts[2]
            loaded = _load_hub(name, config, spec.options.get("revision"), source)
    except PhatgooseError:
        raise
    except Exception as cause:
        if is_local:
            raise TaskError(f"{spec.local_path(folder)} can't be loaded as a dataset: {cause}") from cause
        raise DownloadError(
            f"can't load the dataset {name!r}{f' ({config})' if config else ''} from the Hub: {cause}. "
            "Check its name, the config and the network, or give a local folder: hf:/path/to/folder."
        ) from cause
    return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _load_hub(name: str, config: str | None, revision: str | None, source: dict[str, Any] | None) -> Any:
    """Loads from the Hub. A name of two parts is tried as `owner/name` first, then as `name/CONFIG`."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        return _load_or_copy(name, config, revision, source)
    except DatasetNotFoundError:
        if config is not None or name.count("/") != 1:
            raise
        plain, config = name.split("/")
        return _load_or_copy(plain, config, revision, source)


def _load_or_copy(name: str, config: str | None, revision: str | None, source: dict[str, Any] | None) -> Any:
    import datasets
    import huggingface_hub

    try:
        return datasets.load_dataset(name, config, revision=revision)
    except getattr(huggingface_hub.errors, "HfUriError", ()):
        # `datasets` (5.2) can't read the URLs that it makes of ids without an owner, as super_glue. The Hub
        # answers with a newer id.
        if "/" in name or "/" not in (found := huggingface_hub.HfApi().dataset_info(name).id):
            raise
        return _load_or_copy(found, config, revision, source)
    except RuntimeError as cause:
        is_script = str(cause).startswith("Dataset scripts are no longer supported")
        if not is_script or revision is not None or source is None:
            raise
    data, source["copy"] = _load_copy(name, config)
    return data


def _load_copy(name: str, config: str | None) -> tuple[Any, dict[str, Any]]:
    """The Hub's parquet copy of a config of a dataset script (of the only config, if none is asked for), and
    its record.

    Not by `load_dataset(name, revision=COPY)`, for two reasons. It guesses splits by words in file names:
    train_r1 and partial-train would both be train. And it caches the copy under the script's name, where
    `datasets` then finds it for any other config.
    """
    import datasets

    url, files, record = _list_copy(name)
    if config is None and len(files) > 1:
        raise TaskError(
            f"{name} has several configs: {', '.join(files)}. Write one as ?config=NAME (prompted: ?subset=NAME)."
        )
    config = next(iter(files)) if config is None else config
    if config not in files:
        raise unknown(f"config of {name}", config, files)
    if odd := [split for split in files[config] if not re.fullmatch(r"\w+(\.\w+)*", split)]:
        raise TaskError(
            f"{name} is a dataset script, and the Hub's parquet copy (branch {COPY}) can't replace it: "
            f"expected files in {config}/SPLIT for each whole split, found some in "
            f"{', '.join(f'{config}/{split}' for split in odd)} (partial-SPLIT is the first part of a split). {ADVICE}"
        )
    paths = {split: [url + path for path in found] for split, found in files[config].items()}
    return datasets.load_dataset("parquet", data_files=paths), record | {"config": config}


def _list_copy(name: str) -> tuple[str, dict[str, dict[str, list[str]]], dict[str, Any]]:
    """The copy's URL, its files as config → split → sorted paths, and its commit as a record."""
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
            f"{name} is a dataset script on the Hub, which `datasets` no longer runs, and the Hub has no "
            f"parquet copy of it (branch {COPY}). {ADVICE}"
        )
    # By the id that the Hub answers with: `hf://` URLs don't take the old ids without an owner.
    record = {"branch": COPY, "dataset": info.id, "commit": info.sha}
    return f"hf://datasets/{info.id}@{info.sha}/", files, record


def _load_local(path: Path, config: str | None) -> Any:
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
    """The dataset's splits as train, validation and test: as the options say, else by name; a lone split is train.

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


def read_splits(
    data: Mapping[str, Any],
    spec: TaskSpec,
    read: Callable[[Mapping[str, Any], Mapping[str, list[str]], str], list[Example]],
) -> tuple[dict[SplitName, list[Example]], Counter[str]]:
    """The examples of every chosen split, and how many rows had no answer.

    `read(row, label names by column, name of the row)` makes them.
    """
    own: dict[SplitName, list[Example]] = {}
    dropped: Counter[str] = Counter()
    for split, part in choose_splits(data, spec).items():
        labels = {c: list(f.names) for c, f in part.features.items() if hasattr(f, "names")}

        def read_row(
            row: Mapping[str, Any], number: int, split: str = split, labels: Any = labels
        ) -> list[Example]:
            return read(row, labels, f"{split} row {number}")

        own[split] = list(read_examples(part, read_row, f"{spec.text}, {split} row", dropped, f"_{split}"))
    return own, dropped


def _without_nulls(value: Any) -> Any:
    """A row without its keys that hold nothing. A table gives them to all rows if one row's messages have them."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


SOURCE = TaskSource(load, check, (*OPTIONS, *messages.OPTIONS, *SPLITS, "config", "revision"))
