"""Run an exported agent without PyTorch: an example to start from.

Only the graph, the JSON beside it, NumPy and ONNX Runtime are needed; `envs` is the simulated task.
"""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

try:
    import onnxruntime
    from tdmpc_prune.envs import TaskError, make_env
except ImportError as missing:
    needed = {"onnxruntime": "pip install -e '.[onnx]'"}
    mend = needed.get(missing.name, f"take another '{missing.name}' out of PYTHONPATH (sys.path)")
    print(f"error: {missing}; {mend}", file=sys.stderr)
    raise SystemExit(2) from None


def play(graph: Path, task: str | None, episodes: int) -> list[float]:
    about = json.loads(graph.with_name(f"{graph.name}.json").read_text())
    shapes = {port["name"]: tuple(port["shape"]) for port in about["inputs"]}
    draws = {port["name"]: port["draw"] for port in about["inputs"] if "draw" in port}
    env = make_env(task or about["task"], about["action_repeat"])
    sizes = (env.observation_space.shape, env.action_space.shape)
    if sizes != (shapes["observation"], tuple(about["outputs"][0]["shape"])):
        raise TaskError(
            f"{graph} takes observations of {shapes['observation'][0]} numbers and gives actions "
            f"of {about['outputs'][0]['shape'][0]}; the task's have {sizes[0][0]} and {sizes[1][0]}"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options)
    rng = np.random.default_rng(0)
    draw = {"normal": rng.standard_normal, "uniform": rng.random}
    returns = []
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        means, total, ended = np.zeros(shapes.get("means", 0), np.float32), 0.0, False
        while not ended:
            inputs = {name: draw[d](shapes[name]).astype(np.float32) for name, d in draws.items()}
            inputs |= {"observation": observation, "means": means}
            action, *rest = session.run(None, {name: inputs[name] for name in shapes})
            means = rest[0] if rest else means  # the policy alone has none
            observation, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + reward, terminated or truncated
        returns.append(total)
    return returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graph", type=Path, help="of export.py, *.onnx")
    parser.add_argument("episodes", type=int, nargs="?", default=10)
    parser.add_argument("task", nargs="?", help="another task with the same sizes")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a stream that is none of the system's
            stream.reconfigure(errors="replace")  # a terminal may lack a sign
    given = parser.parse_args()
    try:
        returns = play(given.graph, given.task, max(1, given.episodes))
    except FileNotFoundError:
        error = f"{given.graph} and {given.graph}.json must both be there"
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
