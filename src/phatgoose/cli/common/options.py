"""Options that several commands share, alone or as dataclasses for `expand_options`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.cli.common.expand import Options
from phatgoose.routers.parse import ROUTERS
from phatgoose.shipped import pools
from phatgoose.tasks.load import SOURCES
from phatgoose.training.config import WritingConfig

if TYPE_CHECKING:
    from phatgoose.models.attach.options import RouteOptions
    from phatgoose.records import SplitName

DEFAULT_BASE = "smollm2-135m-instruct-q4"
"""The same as phatgoose.models.base.load.DEFAULT_BASE, written again because reading that one would import torch."""

BASE_HELP = (
    f"The base model: an alias ({DEFAULT_BASE}, gemma3-270m-pretrained-q4), a folder, a GGUF file, or a Hub id "
    "(org/name, org/name@revision)."
)
SOURCE_NAMES = ", ".join(SOURCES.table)
POOL_HELP = f"A pool's folder, or the name of a pool that comes with phatgoose: {', '.join(pools())}."
TASK_HELP = (
    f"The task, as SOURCE:NAME or SOURCE:NAME?option=value&…, from {SOURCE_NAMES} (`phatgoose tasks sources` lists "
    "them, with those of installed packages)."
)
ROUTER_NAMES = (
    f"What chooses the experts, as NAME or NAME:setting=value,…: {', '.join(ROUTERS.table)} "
    "(single:NAME is one expert; `phatgoose routers` lists them with what they need)."
)
OWN_ROUTER = "gander, or where it can't be used the best router that can; a line says which and why"
ROUTER_HELP = (
    f"{ROUTER_NAMES} Or one expert made of all: merged, ties, dare. Or base for none. If not given: base without a "
    f"pool; with one {OWN_ROUTER}."
)

AT_LEAST_0, AT_LEAST_1 = typer.Option(min=0), typer.Option(min=1)
TaskOption = Annotated[str, typer.Option(help=TASK_HELP)]
DtypeOption = Annotated[
    str,
    typer.Option(help="What the base is loaded in: auto (as it is stored), float32, bfloat16 or float16."),
]
BackendOption = Annotated[
    str,
    typer.Option(
        help="What computes the routing: auto, cpu (a compiled kernel), triton (GPUs), torch, or reference (plain and "
        "slow). See `phatgoose doctor`."
    ),
]
PoolOption = Annotated[Path | None, typer.Option(help=f"{POOL_HELP} Without one, the base alone answers.")]
PoolFolderOption = Annotated[Path, typer.Option(help=POOL_HELP)]
RouterOption = Annotated[str | None, typer.Option(help=ROUTER_HELP)]
ChatOption = Annotated[
    bool,
    typer.Option(
        "--chat/--raw", help="Put the prompt through the model's chat template, or give it as it is."
    ),
]
PromptArgument = Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")]
ExpertArgument = Annotated[Path, typer.Argument(help="The expert's folder; a plain PEFT folder will do.")]
ExpertsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="The expert's folder; a plain PEFT folder will do. With --pool: names of experts in it, all if none is "
        "given."
    ),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        help=f"{TASK_HELP} With --pool: NAME=SPEC is one expert's, may be given several times, and a TOML file has "
        "lines NAME = SPEC; without a task, each expert's own record says which."
    ),
]
ExpertOutOption = Annotated[
    Path | None, typer.Option(help="Where the result goes; into the expert's own folder if not given.")
]
ExpertNameOption = Annotated[
    str | None, typer.Option(help="What the expert is called; like the folder OUT if not given.")
]
RepoArgument = Annotated[
    str, typer.Argument(help="A repository on the Hub, org/name; made if it isn't there.")
]


@dataclass(frozen=True)
class BaseOptions(Options):
    """The base model of a pool."""

    base: Annotated[
        str | None,
        typer.Option(
            help=f"{BASE_HELP} If not given, the one that the pool records; {DEFAULT_BASE} without a pool."
        ),
    ] = None
    dtype: DtypeOption = "auto"
    device: str = "auto"
    """Where it runs, e.g. cpu or cuda:1; auto is the GPU if there is one."""


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
class BackendOptions(Options):
    """What computes the routing, and where the pool's tensors are."""

    backend: BackendOption = "auto"
    device_memory: str | None = None
    """How much of the GPU the pool may take, e.g. 8GB: experts that don't fit are brought there when they are needed.
    Without it, all must fit. For routers that choose by gates."""

    @property
    def route_options(self) -> RouteOptions:
        """The same for `route`; imports torch."""
        from phatgoose.models.attach.options import RouteOptions

        return RouteOptions(self.backend, device_memory=self.device_memory)


@dataclass(frozen=True)
class GenerationOptions(Options):
    """How an answer is generated."""

    max_new_tokens: Annotated[int, AT_LEAST_1] = 128
    """Most tokens of an answer."""
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0
    """0 always takes the likeliest token; above 0 samples. Of the checkpoint's own generation settings only the end
    tokens are used: no penalties, forced or suppressed tokens, beams or lengths."""
    seed: Annotated[int, AT_LEAST_0] = 0
    """Sampling seed; used when --temperature > 0."""


@dataclass(frozen=True)
class RunOptions(Options):
    """A run of `train`, `gate` or `signature` that can be stopped and goes on."""

    work: Path | None = None
    """Where unfinished work is kept until it is done; OUT.work if not given."""
    limit_train: Annotated[int | None, AT_LEAST_1] = None
    """Only the first rows of the task's training split."""
    overwrite: bool = False
    """Replace another result that is there already."""

    def work_folder(self, target: Path) -> Path:
        if target.name in ("", ".."):  # as `.` has
            target = target.resolve()
        return self.work or target.with_name(target.name + ".work")

    @property
    def row_limit(self) -> dict[SplitName, int] | None:
        """What `load_task` takes as its limit."""
        return None if self.limit_train is None else {"train": self.limit_train}


@dataclass(frozen=True)
class WholePoolOptions(Options):
    """A run over the experts of a pool."""

    PANEL = "For the experts of a pool"

    pool: Path | None = None
    """The pool's folder: its experts are done one after the other, with one load of the base, and written back. If one
    fails, the others are done."""
    missing: bool = False
    """Only the experts that have none yet."""


@dataclass(frozen=True)
class WritingOptions(Options):
    """Texts that the base writes with the expert, in place of a task."""

    PANEL = "Without the contributor's data (--generated)"

    generated: bool = False
    """Instead of a task: train on text that the base writes with this expert. Gates from the expert's own data are
    better."""
    prompts: Path | None = None
    """A file of prompts, one per line, that the texts answer; without one they begin from nothing. Encoder–decoders
    need it."""
    texts: Annotated[int, typer.Option(min=2)] = WritingConfig.rows
    """Usable texts wanted."""
    text_tokens: Annotated[int, AT_LEAST_1] = WritingConfig.max_new_tokens
    """Most tokens of a text."""
    temperature: float = WritingConfig.temperature
    """Sampling temperature."""


@dataclass(frozen=True)
class PublishOptions(Options):
    """How something is published. There is none for an access token, since other users can see command lines."""

    private: bool = False
    """Make a new repository private, and refuse an existing public one."""
    branch: str | None = None
    """The branch, made if it isn't there; main if not given."""
    message: str | None = None
    """The commit's message."""
    allow_paths: bool = False
    """Publish records that hold paths of local folders, too."""


def read_prompt(prompt: str) -> str:
    """The prompt; "-" reads it from standard input."""
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not text.strip():
        raise typer.BadParameter("it is empty.", param_hint="PROMPT")
    return text
