"""Download one source distribution through pip without building it.

Run as a script: `pip_sdist.py NAME FILENAME TARGET [pip options]`.

`pip download` runs a source distribution's setup.py to learn its metadata, with or without dependencies. There
is no option against it, so this asks pip's own parts for the file alone: they know the user's index, folders,
proxy, certificates and log-in. Tried with pip 23.0 to 26.1. Imports nothing of phatgoose, since pip may belong
to another environment.
"""

from __future__ import annotations

import sys
import time


def main(name: str, filename: str, target: str, options: list[str]) -> None:
    """Writes the file `filename` of the project `name` to `target`. Exits with a message if the index hasn't got it."""
    from pip._internal.commands import create_command

    command = create_command("download")
    settings, _ = command.parse_args(["--no-deps", "--no-binary", ":all:", *options])
    with command.main_context():
        session = command.get_default_session(settings)  # type: ignore[attr-defined]
        finder = command._build_package_finder(  # type: ignore[attr-defined]
            options=settings, session=session, ignore_requires_python=True
        )
        links = [c.link for c in finder.find_all_candidates(name) if c.link.filename == filename]
        if not links:
            sys.exit(f"ERROR: No matching distribution found for {filename}")
        # No compression on the way: the bytes are what is hashed.
        answer = session.get(
            links[0].url_without_fragment, stream=True, headers={"Accept-Encoding": "identity"}
        )
        answer.raise_for_status()
        _write(answer, target)


def _write(answer, target: str) -> None:  # type: ignore[no-untyped-def]
    total, done, said = int(answer.headers.get("Content-Length") or 0), 0, time.monotonic()
    shown = sys.stdout.isatty()
    with open(target, "wb") as file:
        for chunk in iter(lambda: answer.raw.read(2**20), b""):
            file.write(chunk)
            done += len(chunk)
            if shown and time.monotonic() - said > 1:
                said = time.monotonic()
                print(f"\r{done / 1e6:.0f} of {total / 1e6:.0f} MB", end="", flush=True)
    if shown:
        print(f"\r{done / 1e6:.0f} MB" + " " * 20, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
