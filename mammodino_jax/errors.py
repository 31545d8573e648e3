"""The one error that users are meant to read: printed as a single line, exit code 2."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad input: the message names what is wrong, what was expected, and what to do next."""


class DataError(Exception):
    """A batch could not be made, by no fault of the settings: the message names step, record and worker."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the known name closest to `name`, or '' where none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f' Did you mean "{close[0]}"?' if close else ""


def refuse_bucket(path, what: str) -> None:
    """Raise a UserError where a path is a URL, such as gs://BUCKET/DIR: files are read and written as files.

    ArrayRecord reads through the file system alone, and so do the commands that read a workdir; pathlib would
    silently take gs://BUCKET for a folder gs: of the current one.
    """
    scheme, is_url, rest = str(path).partition("://")
    if is_url:
        bucket, _, inside = rest.partition("/")
        how = f"gcsfuse --implicit-dirs {bucket} /mnt/{bucket}" if scheme == "gs" else "its own file system"
        raise UserError(
            f"{what} {path} is in a bucket; mount it ({how}; options in docs/launch.md) and give "
            f"/mnt/{bucket}/{inside}"
        )


def run_command(main: Callable[..., int | None], *args) -> None:
    """Run a command line's `main`; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        code = main(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)
