"""Flags of the commands that take a recipe: --config=FILE[:arg] and --config.a.b=v."""

import sys

from absl import flags

from mammodino_jax.errors import UserError


def parse(argv, required: tuple[str, ...], example: str) -> list[str]:
    """Parse absl flags; a mistyped one is one clear line and exit code 2, not a traceback."""
    try:
        rest = flags.FLAGS(argv)
        for name in required:
            if flags.FLAGS[name].value is None:
                raise UserError(f"--{name} is required: {example}")
        flags.FLAGS.config.keys()  # a file that failed to load is only reported on use
        if rest[1:]:
            raise UserError(f"unexpected argument {rest[1]!r}")
        return rest
    except (UserError, flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        text = str(error)
        if isinstance(error, AttributeError | KeyError):
            # the config library's, quoted twice: 'NAME'\nDid you mean ...
            text = "config has no field " + text.replace("\\'", "").replace("\\n", ". ").strip("'\"")
        print("error:", " ".join(text.split()), file=sys.stderr)
        sys.exit(2)
