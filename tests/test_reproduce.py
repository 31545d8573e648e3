"""docs/reproduce.md: its commands are those of the code. Nothing it needs is here, so each ends at its inputs."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from mammodino_jax.errors import UserError

REPO = Path(__file__).parents[1]


def commands() -> list[list[str]]:
    """The words of each command, once for each value of a loop around it."""
    text = (REPO / "docs/reproduce.md").read_text().replace("\\\n", " ")
    found, loop = [], ("", [""])
    for line in re.findall(r"^ {4}(.*)$", text, re.MULTILINE):
        if start := re.match(r"for (\w+) in (.*); do", line):
            loop = f"${start[1]}", start[2].split()
        elif line == "done":
            loop = "", [""]
        elif line.strip().startswith("python "):
            name, values = loop
            found += [shlex.split(line.replace(name, value) if name else line) for value in values]
    return found


COMMANDS = commands()


def test_all_steps_are_found():
    assert len(COMMANDS) == 3 * 3 + 3 + 1 + 1 + 2 + 1 + 3


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[1] == "-m"], ids=" ".join)
def test_modules_know_the_flags_and_miss_only_the_inputs(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(words[2])
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{words[2]}.__main__")
    with pytest.raises(UserError, match=r"(RAW|DATA|RUNS|RESULTS)/"):  # argparse would exit
        module.main(words[3:])


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[1] == "main.py"], ids=" ".join)
def test_the_recipe_has_the_fields(words):
    from mammodino_jax.recipe import from_config

    flags = dict(word.removeprefix("--").split("=", 1) for word in words[2:])
    file, _, argument = flags.pop("config").partition(":")
    spec = importlib.util.spec_from_file_location("recipe_of_docs", REPO / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument)
    assert flags.pop("workdir")
    for name, value in flags.items():
        field = config
        *path, last = name.removeprefix("config.").split(".")
        for part in path:
            field = field[part]
        assert last in field, name
        field[last] = eval(value)  # the tuples and numbers of our own page
    from_config(config)
