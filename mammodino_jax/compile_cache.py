"""Compiled programs on disk, so that a run that resumes does not wait for the compiler."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import logging
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
    _remove_broken(folder)
    compilation_cache.reset_cache()  # a program compiled before has settled that there is none
    jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def _remove_broken(folder: Path) -> None:
    """Remove programs that were not written to the end (killed, disk full).

    JAX neither uses nor replaces such a file: every later start would compile anew. There is no public way to
    ask whether one is whole. Process 0 writes all files.
    """
    from jax._src.compilation_cache import decompress_executable

    for file in folder.glob("*-cache") if jax.process_index() == 0 else ():
        try:
            decompress_executable(file.read_bytes())
        except Exception as error:  # zlib's or zstandard's own
            logging.warning("%s is not whole (%s) and is removed: it is compiled again", file, error)
            file.unlink()
