"""Options that several commands share, alone or as dataclasses for `expand_options`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.routers.parse import ROUTERS
from phatgoose.tasks.load import SOURCES

if TYPE_CHECKING:
    from phatgoose.models.attach.options import RouteOptions
    from phatgoose.records import SplitName

DEFAULT_BASE = "smollm2-135m-instruct-q4"
"""The same as phatgoose.models.base.load.DEFAULT_BASE, written again because reading that one would import torch."""

BASE_HELP = "The base model: an alias, a folder, a GGUF file, or a Hub id (org/name, org/name@revision)."
SOURCE_NAMES = ", ".join(SOURCES.table)
TASK_HELP = (
    f"The task, as SOURCE:NAME or SOURCE:NAME?option=value&…, from {SOURCE_NAMES} (`phatgoose tasks sources` lists "
    "them, with those of installed packages)."
)
ROUTER_NAMES = (
    f"What chooses the experts, as NAME or NAME:setting=value,…: {', '.join(ROUTERS.table)} "
    "(single:NAME is one expert; `phatgoose routers` lists them with what they need)."
)
ROUTER_HELP = (
    f"{ROUTER_NAMES} Or one expert made of all: merged, ties, dare. Or base for none. If not given: base without a "
    "pool; with one phatgoose, or where experts lack gates a router that needs none."
)

TaskOption = Annotated[str, typer.Option(help=TASK_HELP)]
DtypeOption = Annotated[
    str,
    typer.Option(help="What the base is loaded in: auto (as it is stored), float32, bfloat16 or float16."),
]
DeviceOption = Annotated[
    str, typer.Option(help="Where it runs, e.g. cpu or cuda:1; auto is the GPU if there is one.")
]
BackendOption = Annotated[
    str,
    typer.Option(
        help="What computes the routing: auto, cpu (a compiled kernel), triton (GPUs), torch, or reference (plain and "
        "slow). See `phatgoose doctor`."
    ),
]
PoolOption = Annotated[
    Path | None, typer.Option(help="A pool's folder; without one, the base alone answers.")
]
PoolFolderOption = Annotated[Path, typer.Option(help="The pool's folder.")]
RouterOption = Annotated[str | None, typer.Option(help=ROUTER_HELP)]
ChatOption = Annotated[
    bool,
    typer.Option(
        "--chat/--raw", help="Put the prompt through the model's chat template, or give it as it is."
    ),
]
PromptArgument = Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")]
ExpertArgument = Annotated[Path, typer.Argument(help="The expert's folder; a plain PEFT folder will do.")]
ExpertOutOption = Annotated[
    Path | None, typer.Option(help="Where the result goes; into the expert's own folder if not given.")
]
ExpertNameOption = Annotated[
    str | None, typer.Option(help="What the expert is called; like the folder OUT if not given.")
]


@dataclass(frozen=True)
class BaseOptions:
    """The base model of a pool."""

    base: Annotated[
        str | None,
        typer.Option(
            help=f"{BASE_HELP} If not given, the one that the pool records; {DEFAULT_BASE} without a pool."
        ),
    ] = None
    dtype: DtypeOption = "auto"
    device: DeviceOption = "auto"


@dataclass(frozen=True)
class ExpertBaseOptions(BaseOptions):
    """The base model of an expert."""

    base: Annotated[
        str | None, typer.Option(help=f"{BASE_HELP} If not given, the one that the expert records.")
    ] = None


@dataclass(frozen=True)
class TrainBaseOptions(BaseOptions):
    """The base model that an expert is trained on."""

    base: Annotated[str, typer.Option(help=BASE_HELP)] = DEFAULT_BASE


@dataclass(frozen=True)
class BackendOptions:
    """What computes the routing, and where the pool's tensors are."""

    backend: BackendOption = "auto"
    device_memory: Annotated[
        str | None,
        typer.Option(
            help="How much of the GPU the pool may take, e.g. 8GB: experts that don't fit are brought there when "
            "they are needed. Without it, all must fit. For routers that choose by gates."
        ),
    ] = None

    @property
    def route_options(self) -> RouteOptions:
        """The same for `route`; imports torch."""
        from phatgoose.models.attach.options import RouteOptions

        return RouteOptions(self.backend, device_memory=self.device_memory)


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated."""

    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="0 always takes the likeliest token; above 0 samples. Of the checkpoint's own generation settings "
            "only the end tokens are used: no penalties, forced or suppressed tokens, beams or lengths.",
        ),
    ] = 0.0
    seed: Annotated[int, typer.Option(min=0, help="Sampling seed; used when --temperature > 0.")] = 0


@dataclass(frozen=True)
class RunOptions:
    """A run of `train`, `gate` or `signature` that can be stopped and goes on."""

    work: Annotated[
        Path | None,
        typer.Option(help="Where unfinished work is kept until it is done; OUT.work if not given."),
    ] = None
    limit_train: Annotated[
        int | None, typer.Option(min=1, help="Only the first rows of the task's training split.")
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another result that is there already.")
    ] = False

    def work_folder(self, target: Path) -> Path:
        return self.work or target.with_name(target.name + ".work")

    @property
    def row_limit(self) -> dict[SplitName, int] | None:
        """What `load_task` takes as its limit."""
        return None if self.limit_train is None else {"train": self.limit_train}


_WRITING_PANEL = "Without the contributor's data (--generated)"


@dataclass(frozen=True)
class WritingOptions:
    """Texts that the base writes with the expert, in place of a task."""

    generated: Annotated[
        bool,
        typer.Option(
            "--generated",
            rich_help_panel=_WRITING_PANEL,
            help="Instead of a task: train on text that the base writes with this expert. Gates from the expert's "
            "own data are better.",
        ),
    ] = False
    prompts: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_WRITING_PANEL,
            help="A file of prompts, one per line, that the texts answer; without one they begin from nothing. "
            "Encoder–decoders need it.",
        ),
    ] = None
    texts: Annotated[
        int, typer.Option(min=2, rich_help_panel=_WRITING_PANEL, help="Usable texts wanted.")
    ] = 512
    text_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=_WRITING_PANEL, help="Most tokens of a text.")
    ] = 64
    temperature: Annotated[
        float, typer.Option(rich_help_panel=_WRITING_PANEL, help="Sampling temperature.")
    ] = 1.0
