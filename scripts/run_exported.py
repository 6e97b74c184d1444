"""Run an exported agent with ONNX Runtime and NumPy alone, on its task or on another of its size.

`python scripts/run_exported.py GRAPH.onnx [episodes] [task]` is an example to start from: a machine
that runs an exported agent needs the graph, the JSON beside it, and no PyTorch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from envs import make_env


def main(graph: str, episodes: str = "10", task: str = "") -> None:
    sidecar = Path(graph).with_suffix(".json")
    if not (Path(graph).is_file() and sidecar.is_file()):
        print(f"error: {graph} and {sidecar} must both be there", file=sys.stderr)
        raise SystemExit(2)
    about = json.loads(sidecar.read_text())
    shapes = {port["name"]: tuple(port["shape"]) for port in about["inputs"]}
    draws = {port["name"]: port["draw"] for port in about["inputs"] if "draw" in port}
    env = make_env(task or about["task"], about["action_repeat"])
    if env.observation_space.shape != shapes["observation"]:
        seen, wanted = env.observation_space.shape, shapes["observation"]
        print(f"error: {graph} takes observations {wanted}, {task} gives {seen}", file=sys.stderr)
        raise SystemExit(2)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options)
    rng = np.random.default_rng(0)
    draw = {"normal": rng.standard_normal, "uniform": rng.random}
    returns = []
    for seed in range(int(episodes)):
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
    print(f"return {np.mean(returns):.1f} ± {np.std(returns):.1f} over {len(returns)} episodes")


if __name__ == "__main__":
    main(*sys.argv[1:])
