"""Run an exported agent without PyTorch: an example to start from.

Of an ONNX export only the graph, the JSON beside it, NumPy and ONNX Runtime are needed; of a C
export its folder and a C compiler. `envs` is the simulated task.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

try:
    from tdmpc_prune.envs import TaskError, make_env
except ImportError as missing:
    mend = f"take another '{missing.name}' out of PYTHONPATH (sys.path)"
    print(f"error: {missing}; {mend}", file=sys.stderr)
    raise SystemExit(2) from None


Act = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def of_graph(graph: Path, about: dict) -> Act:
    """(observation, means) → (action, next means), by ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError as missing:
        raise TaskError(f"{missing}; pip install -e '.[onnx]'") from missing
    shapes = {port["name"]: tuple(port["shape"]) for port in about["inputs"]}
    draws = {port["name"]: port["draw"] for port in about["inputs"] if "draw" in port}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options)
    rng = np.random.default_rng(0)
    draw = {"normal": rng.standard_normal, "uniform": rng.random}

    def act(observation: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs = {name: draw[d](shapes[name]).astype(np.float32) for name, d in draws.items()}
        inputs |= {"observation": observation, "means": means}
        action, *rest = session.run(None, {name: inputs[name] for name in shapes})
        return action, rest[0] if rest else means  # the policy alone has none

    return act


class Key(ctypes.Structure):
    """planner_key of planner.h."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_uint32),
        ("decision", ctypes.c_uint32),
    )


def of_folder(folder: Path, about: dict) -> Act:
    """(observation, means) → (action, next means), by the folder's own C."""
    made = subprocess.run(["make", "-s", "-C", folder, "libagent.so"], capture_output=True)
    if made.returncode:
        said = made.stderr.decode(errors="replace").strip().splitlines()
        raise TaskError(f"{folder} cannot be compiled: {said[0] if said else 'make fails'}")
    library = ctypes.CDLL(str((folder / "libagent.so").absolute()))
    model, config = (
        ctypes.byref(ctypes.c_char.in_dll(library, f"agent_{name}")) for name in ("model", "config")
    )
    library.planner_workspace.restype = ctypes.c_size_t
    workspace = ctypes.create_string_buffer(library.planner_workspace(model, config))
    action = np.zeros(about["outputs"][0]["shape"], np.float32)
    key = Key()

    def pointer(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    def act(observation: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if about["part"] == "policy":
            status = library.planner_policy(model, pointer(observation), pointer(action), workspace)
        else:
            decision = (ctypes.c_void_p * 6)(action.ctypes.data, means.ctypes.data)
            status = library.planner_plan(
                *(model, config, pointer(observation), pointer(means), None),
                *(ctypes.byref(key), 0, decision, workspace),
            )
            key.decision += 1
        if status:
            raise TaskError(f"no action: planner.h says what status {status} is")
        return action.copy(), means

    return act


def play(exported: Path, task: str | None, episodes: int) -> list[float]:
    is_folder = exported.is_dir()
    sidecar = exported / "agent.json" if is_folder else exported.with_name(f"{exported.name}.json")
    about = json.loads(sidecar.read_text())
    shapes = {port["name"]: tuple(port["shape"]) for port in about["inputs"]}
    env = make_env(task or about["task"], about["action_repeat"])
    sizes = (env.observation_space.shape, env.action_space.shape)
    if sizes != (shapes["observation"], tuple(about["outputs"][0]["shape"])):
        raise TaskError(
            f"{exported} takes observations of {shapes['observation'][0]} numbers and gives "
            f"actions of {about['outputs'][0]['shape'][0]}; the task's have {sizes[0][0]} and "
            f"{sizes[1][0]}"
        )
    act = (of_folder if is_folder else of_graph)(exported, about)
    returns = []
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        means, total, ended = np.zeros(shapes.get("means", 0), np.float32), 0.0, False
        while not ended:
            action, means = act(np.ascontiguousarray(observation, np.float32), means)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + reward, terminated or truncated
        returns.append(total)
    return returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exported", type=Path, help="of export.py: *.onnx, or a folder in C")
    parser.add_argument("episodes", type=int, nargs="?", default=10)
    parser.add_argument("task", nargs="?", help="another task with the same sizes")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a stream that is none of the system's
            stream.reconfigure(errors="replace")  # a terminal may lack a sign
    given = parser.parse_args()
    try:
        returns = play(given.exported, given.task, max(1, given.episodes))
    except FileNotFoundError as found:
        error = f"{given.exported} and {given.exported}.json must both be there"
        if given.exported.is_dir():
            error = f"there is no {found.filename}: it is needed"
    except (TaskError, ValueError, RuntimeError) as found:  # the last: of ONNX Runtime
        error = str(found).splitlines()[0]
    else:
        spread = f" ± {np.std(returns):.1f}" if len(returns) > 1 else ""
        count = f"{len(returns)} episode{'s' if len(returns) > 1 else ''}"
        print(f"return {np.mean(returns):.1f}{spread} over {count}")
        return
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
