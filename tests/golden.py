"""What small runs come to, to the last bit: for changes that are to change nothing.

    python -m tests.golden write golden.json      # before
    python -m tests.golden compare golden.json    # after

Five runs are made through the commands: an agent trained dense, trained while it is pruned, and
pruned from its finished dense run; an autoencoder trained dense, and while it is pruned. Kept are
their histories without times, and checksums of every tensor that their last checkpoints and kept
networks hold. The numbers depend on the processor and on PyTorch's version, so the file is made
where it is compared, and no test reads one.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from safetensors.numpy import load_file

from tests.commands import SMALL, run

_TIMES = {"seconds", "decision_ms", "median_ms", "p95_ms"}  # in histories
_TIMED_KINDS = {"times"}  # records that hold nothing but times
_PRUNING = [
    *("prune=bayesian", "prune.sparsity=0.7", "prune.steps=3", "prune.min_width=2"),
    *("prune.round_to=1", "prune.max_return_drop=0.3"),
]
_GATHERING = ["prune.gather_updates=5"]
_RUNS = {
    "dense": ("train.py", [*SMALL, "decisions=torch", "env_steps=240"]),
    "pruned": ("train.py", [*SMALL, *_PRUNING, "decisions=torch", "env_steps=240"]),
    "pruned-finished": (
        "prune.py",
        [
            *_PRUNING,
            *_GATHERING,
            "checkpoint=dense",
            "decisions=torch",
            "env_steps=120",
            "eval_every=60",
            "eval_episodes=2",
        ],
    ),
    "autoencoder": ("train_autoencoder.py", ["updates=120", "eval_every=40"]),
    "autoencoder-pruned": (
        "train_autoencoder.py",
        ["updates=120", "eval_every=40", *_PRUNING],
    ),
}


def make() -> dict:
    """All runs: name → what it came to."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (script, arguments) in _RUNS.items():
            done = run(script, *arguments, f"run_dir={name}", cwd=folder)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
        return {name: _read(Path(folder) / name) for name in _RUNS}


def _read(run_dir: Path) -> dict:
    lines = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    return {
        "history": [_timeless(line) for line in lines if line["kind"] not in _TIMED_KINDS],
        "tensors": {
            f"{path.relative_to(run_dir)}: {name}": hashlib.sha256(array.tobytes()).hexdigest()
            for path in sorted(run_dir.glob("**/*.safetensors"))
            for name, array in sorted(load_file(path).items())
        },
    }


def _timeless(value):
    if isinstance(value, dict):
        return {name: _timeless(part) for name, part in value.items() if name not in _TIMES}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def main() -> None:
    verb, path = sys.argv[1], Path(sys.argv[2])
    made = make()
    if verb == "write":
        path.write_text(json.dumps(made, indent=1) + "\n")
        return
    kept = json.loads(path.read_text())
    different = [
        f"{name}: {part}: {key}"
        for name, run in kept.items()
        for part in ("history", "tensors")
        for key in _differences(run[part], made[name][part])
    ]
    print("\n".join(different) or "equal, bit for bit")
    raise SystemExit(bool(different))


def _differences(before, after):
    if isinstance(before, dict):
        return [key for key in {*before, *after} if before.get(key) != after.get(key)]
    pairs = zip(before, after, strict=False)
    found = [f"line {i}: {a} is now {b}" for i, (a, b) in enumerate(pairs) if a != b]
    if len(before) != len(after):
        found.append(f"{len(before)} lines, now {len(after)}")
    return found


if __name__ == "__main__":
    main()
