"""The `jaxslim` command: arguments.py reads its words, commands.py does what they say.

Exit codes: 0 ok, 2 usage or bad input, 3 bad data beyond the limit, 4 gate missed, 5 numerical stop, 75 preempted but
saved.
"""
from __future__ import annotations

import logging
import os
import sys

from jaxslim import arguments, commands, malloc


def main(argv: list[str] | None = None) -> int:
    if argv is None:
        malloc.restart()
    top = arguments.parser()
    args, rest = top.parse_known_args([_dashes(a) for a in (sys.argv[1:] if argv is None else argv)])
    if rest and not (hasattr(args, "overrides") and all("=" in a for a in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # key=value behind an option, and --key=value
        args.overrides += rest
    logging.basicConfig(level=logging.INFO if args.verbose or args.command in ("train", "slim", "demo") else
                        logging.WARNING, format="%(message)s")
    for noisy in ("jax", "absl", "orbax", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING if args.verbose else logging.ERROR)
    if args.devices:
        os.environ["JAX_NUM_CPU_DEVICES"] = str(args.devices)
    try:
        _jax_setup()
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("Interrupted; finished work is kept, run the same command again to go on.", file=sys.stderr)
        return 130
    except Exception as error:
        if args.verbose:
            raise
        code = _exit_code(error)
        if code is None:
            raise
        print(f"jaxslim {args.command}: {error}", file=sys.stderr)
        return code


def _exit_code(error: Exception) -> int | None:
    """Exit code of an error that its message explains; None for a defect, which keeps its traceback."""
    from jaxslim.data.rows import DataError
    from jaxslim.export import ParityError
    from jaxslim.train.loop import NumericalStop, Preempted

    for kind, code in ((DataError, 3), (ParityError, 4), (NumericalStop, 5), (Preempted, 75), (ValueError, 2),
                       (OSError, 2), (ImportError, 2)):
        if isinstance(error, kind):
            return code
    return None


def _jax_setup() -> None:
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxslim/xla"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if commands.distributed():
        number = lambda name: int(os.environ[name]) if name in os.environ else None  # noqa: E731
        jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"))


def _dashes(word: str) -> str:
    """--batch_size and --batch-size are the same."""
    name, sep, value = word.partition("=")
    return (name[:2] + name[2:].replace("_", "-") if name.startswith("--") else name) + sep + value


if __name__ == "__main__":
    sys.exit(main())
