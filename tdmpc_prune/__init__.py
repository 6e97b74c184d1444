"""TD-MPC on control tasks, built to be compressed."""

import importlib.util
import sys
from pathlib import Path


def _check_envs(root: Path) -> None:
    """Say so in one line if another `envs` comes before this package's own.

    Raises:
        ImportError: it does; of a command it is the exit, with code 2.
    """
    try:
        found = importlib.util.find_spec("envs")
    except ValueError:  # something without a place is imported under that name
        found = None
    ours = root / "envs" / "__init__.py"
    if found and found.origin and Path(found.origin).resolve() == ours.resolve():
        return
    places = list(found.submodule_search_locations or [found.origin]) if found else []
    what = (
        f"'{places[0]}' hides this package's own 'envs': rename it, or take its folder out of "
        f"PYTHONPATH (sys.path)"
        if places
        else f"this package's own 'envs' is not found (it lies in '{ours.parent}')"
    )
    if sys.argv and Path(sys.argv[0]).resolve().parent == root / "scripts":
        print(f"error: {what}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(what)


_check_envs(Path(__file__).resolve().parents[1])
