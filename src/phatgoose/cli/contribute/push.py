"""`phatgoose push`: publish an expert on the Hub."""

from __future__ import annotations

import shlex

import phatgoose
from phatgoose.cli.common.expand import expand_options
from phatgoose.cli.common.options import ExpertArgument, PublishOptions, RepoArgument
from phatgoose.cli.measure import show


@expand_options
def command(expert: ExpertArgument, repo: RepoArgument, publish: PublishOptions) -> None:
    """Publish one expert on the Hub, in one commit: others can add it to their pools. Log in with `hf auth login`."""
    loaded = phatgoose.Expert.load(expert)
    done = loaded.push(
        repo,
        private=publish.private or None,
        revision=publish.branch,
        message=publish.message,
        allow_paths=publish.allow_paths,
    )
    show.say(f"{done}: {loaded.name}, gates: {'no' if loaded.gates is None else 'yes'}")
    show.facts([("next", shlex.join(["phatgoose", "pool", "add", "POOL", str(done)]))])
