"""Compiled programs on disk, so that a run that resumes does not wait for the compiler."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compile_cache(folder: Path) -> Iterator[None]:
    """Keep programs that take a second or more to compile in `folder`.

    JAX_COMPILATION_CACHE_DIR comes first. The key of a program holds its text, the versions, the devices and
    a CPU's instruction set: a run that moves to another kind of machine compiles anew.
    """
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    compilation_cache.reset_cache()  # a program compiled before has settled that there is none
    jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
