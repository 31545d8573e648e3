"""What recipes take after the colon: `configs/ablation.py:full,base=nano,data=DIR`."""

import difflib
import importlib

from configs.photometrics import PRESETS

BASES = ("nano", "vits14", "vitb14_518", "vitl14")  # recipes that others change


def parse(arg: str | None, word: str | None = None, **defaults) -> tuple[str | None, dict]:
    """The options of an argument "WORD,k=v,k=v".

    Args:
      arg: what stood after the colon.
      word: value of WORD, the one part without "=", where it is not given; None: there is no such part.
      defaults: the options and their values where they are not given.

    Raises:
      ValueError: an unknown option, with the known ones.
    """
    options, taken = dict(defaults), word is None
    for part in filter(None, (arg or "").split(",")):
        name, given, value = part.partition("=")
        if not given and not taken:
            word, taken = part, True
        elif not given or name not in defaults:
            raise ValueError(f"unknown option {name!r}; {_nearest(name, defaults)}")
        else:
            options[name] = value
    return word, options


def choose(what: str, name: str, known):
    """`name`, or a ValueError that lists what is known."""
    if name not in known:
        raise ValueError(f"{what} is {name!r}; {_nearest(name, known)}")
    return name


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return (f'did you mean "{near[0]}"? ' if near else "") + f"known: {', '.join(known) or 'none'}"


def base_recipe(name: str, data: str = ""):
    """The recipe of a base, on the built data set `data` ("": to be given by --config.data.sources)."""
    c = importlib.import_module(f"configs.{choose('base', name, BASES)}").get_config()
    return on_data(c, data)


def on_data(c, data: str):
    """`c` with a built data set as its source: training split, 2D images and tomosynthesis."""
    if data:
        c.data.sources = ((data, "train", ("2d", "synthetic2d", "film", "dbt"), 1.0),)
    return c


def photometrics(name: str) -> dict:
    """Fields of `augment` of a preset (photometrics.py)."""
    return PRESETS[choose("photometrics", name, PRESETS)]
