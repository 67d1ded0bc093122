"""One tree of errors. `PhatgooseError` catches everything that is raised on purpose.

A message says what was expected, what was found, and what to do about it.
"""

from __future__ import annotations


class PhatgooseError(Exception):
    """Root of every error raised on purpose by this library."""


class UnknownName(PhatgooseError):
    """A name (task, expert, router, backend, alias) that nothing answers to."""


class PluginError(PhatgooseError):
    """A package that adds routers or task sources can't be imported, or takes a name that is in use."""


class TaskError(PhatgooseError):
    """A task's source is missing, malformed or empty."""


class BaseModelError(PhatgooseError):
    """A base model can't be loaded, or is not the one that was expected."""


class ExpertError(PhatgooseError):
    """An expert's folder or tensors are missing, damaged or of a kind that is refused by name."""


class PoolError(PhatgooseError):
    """A pool's manifest or folders are missing, damaged or inconsistent."""


class RoutingError(PhatgooseError):
    """Routing can't be attached, detached or computed as asked."""


class TrainingError(PhatgooseError):
    """Training can't start, or produced something unusable (non-finite loss or weights)."""


class EvaluationError(PhatgooseError):
    """An evaluation can't be computed as asked."""


class DownloadError(PhatgooseError):
    """A file can't be fetched, or isn't the file that was pinned."""


class UploadError(PhatgooseError):
    """Something can't be published, or shouldn't be as it is."""


class StorageError(PhatgooseError):
    """A file can't be written (no space, no permission) or read; nothing that existed was damaged."""


def brief(value: object, limit: int = 200) -> str:
    """A value as it stands in a message: its repr, cut to `limit` characters. Files of strangers may hold anything."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
