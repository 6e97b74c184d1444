"""What a run tells while it goes on: a progress bar, TensorBoard, and `history.jsonl`.

The horizontal axis is the run's own unit of time: env steps (simulator steps) for an agent.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from tdmpc_prune.pruning.refit import Refit
from tdmpc_prune.saving.files import write_file
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.settings import by_dotted_name

_SECONDS_BETWEEN_REFRESHES = 0.5

_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

_RGBA = 4  # of TensorBoard's image formats

_OUTCOMES = ("networks/sparsity", "networks/parameters", "networks/macs")

_READ_ME = """**Set "Smoothing" to 0** in the settings beside the charts (it is 0.6 at first), and
switch "Ignore outliers in chart scaling" off: a run has few evaluations, and what is smoothed lags
behind them, so that the best run may not look the best.

- `evaluation` is the result; the {score} under `pruning` is of fewer {samples}, around each cut.
- `networks/macs` is the exact cost of {use}. `speed` is wall time under whatever load the
  machine had, and is no result{times}.
- A run in a folder `none` is the dense one.
"""


@dataclass
class Averages:
    """Means of metrics since they were last taken."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means by name; starts anew."""
        means = {name: self.sums[name] / self.counts[name] for name in self.sums}
        self.sums, self.counts = {}, {}
        return means


class RunLog:
    """Writes into a run's folder. `history` is the number of lines that are in the history."""

    def __init__(
        self,
        folder: RunFolder,
        now: int,
        end: int,
        history: int,
        unit: str = "env_steps",
        name: str = "",
    ):
        """Open the logs of a run.

        Args:
            folder: of the run.
            now: where the run stands; later events of a run that was cut off are hidden.
            end: where it ends.
            history: lines of the history to keep; what a run that was cut off wrote beyond them
                will be written again.
            unit: what the time is called in the history.
            name: of the run, where several share a terminal: before the bar and every sentence.
        """
        self._name = f"{name}: " if name else ""
        self._unit = unit
        self._history_path = folder.history
        self.history = history
        if self._history_path.exists():
            kept = self._history_path.read_text().splitlines(keepends=True)[:history]
            write_file(self._history_path, "".join(kept), "run_dir")
        self._writer = SummaryWriter(str(folder), purge_step=now + 1)
        self._bar = tqdm(
            desc=name,
            total=end,
            initial=now,
            bar_format=_BAR,
            dynamic_ncols=True,
            disable=None,  # where nobody watches; the sentences tell the run
        )
        self._shown: dict[str, str] = {}
        self._doing = ""
        self._refreshed = 0.0

    def hyperparameters(self, settings: dict[str, Any], score: str) -> None:
        """Fill TensorBoard's hyperparameter tab, and lay out its page that compares runs.

        Args:
            settings: of the run.
            score: what is measured: "return", "PSNR".
        """
        agent = score == "return"
        words = {
            "samples": "episodes" if agent else "images",
            "use": "a decision" if agent else "a reconstruction",
            "times": '; CPU times of all agents of the run are in its text "decision times"'
            if agent
            else "",
        }
        self.text("! read me first", _READ_ME.format(score=score, **words), 0)
        outcomes = [f"evaluation/{score}", *_OUTCOMES]
        for summary in hparams(_shown(settings), dict.fromkeys(outcomes, 0.0)):
            self._writer.file_writer.add_summary(summary)
        # The "custom scalars" page: one chart each for all runs, against time.
        charts = {
            score: f"evaluation/{score}",
            "sparsity": "networks/sparsity",
            "planning MACs" if agent else "MACs": "networks/macs",
            f"{score} around the cuts": f"pruning/{score}",
        }
        layout = {title: ["Multiline", [tag]] for title, tag in charts.items()}
        self._writer.add_custom_scalars({"Dense and pruned (set smoothing to 0)": layout})

    def record(self, kind: str, now: int, **values: Any) -> None:
        """Add a line to the history."""
        line = json.dumps({"kind": kind, self._unit: now} | values)
        with self._history_path.open("a") as history:
            history.write(line + "\n")
        self.history += 1

    def scalars(self, now: int, values: dict[str, float]) -> None:
        """Add scalars to TensorBoard."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, now)

    def networks(self, now: int, size: dict[str, float]) -> None:
        """Add the networks' size to TensorBoard."""
        self.scalars(now, {f"networks/{name}": value for name, value in size.items()})

    def importance(
        self,
        now: int,
        importance: dict[str, dict[str, dict[str, float]]],
        correlations: dict[str, float],
    ) -> None:
        """Add importance by group and component, and how alike the metrics rank the units."""
        self.record("importance", now, **importance, correlations=correlations)
        self.scalars(
            now,
            {
                f"unit importance by {kind[:-1]}/{metric}/{name}": value  # "unit" sorts last
                for kind, metrics in importance.items()
                for metric, values in metrics.items()
                for name, value in values.items()
            }
            | {f"unit rank correlation/{pair}": value for pair, value in correlations.items()},
        )

    def refit(self, now: int, step: int, refit: Refit) -> None:
        """Add what the refit of a cut did to each layer's error."""
        self.record("refit", now, step=step, layers=[vars(fit) for fit in refit.layers])
        for fit in refit.layers:
            self.scalars(
                now,
                {
                    f"refit/{fit.layer}/as cut": fit.before,
                    f"refit/{fit.layer}/fitted": fit.after,
                },
            )

    def text(self, name: str, markdown: str, now: int) -> None:
        """Add a text to TensorBoard."""
        self._writer.add_text(name, markdown, now)

    def progress(self, now: int | None = None, doing: str = "", **shown: str) -> None:
        """Move the progress bar to `now`, and show `shown` beside what it shows already.

        While it is `doing` something else than learning, it shows that alone.
        """
        began = bool(doing) and not self._doing
        self._shown |= shown
        self._doing = doing
        if now is not None:
            self._bar.n = now
        if began or time.monotonic() - self._refreshed > _SECONDS_BETWEEN_REFRESHES:
            self._refreshed = time.monotonic()
            text = doing or ", ".join(f"{name} {value}" for name, value in self._shown.items())
            self._bar.set_postfix_str(text)

    def say(self, sentence: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(f"{self._name}{sentence}")
        sys.stdout.flush()  # a log file is read while the run goes on

    def picture(self, name: str, path: Path, now: int) -> None:
        """Add a PNG file to TensorBoard, as it is."""
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # after signature and "IHDR"
        image = Summary.Image(
            height=height, width=width, colorspace=_RGBA, encoded_image_string=content
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._writer.file_writer.add_summary(summary, now)

    def close(self) -> None:
        """Finish the files."""
        self._writer.close()
        self._bar.close()


def _shown(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names, of the types that TensorBoard shows.

    What tells runs apart comes first. A dense run has no settings of pruning.
    """
    flat = by_dotted_name(settings)
    dense = flat["prune.method"] == "none"
    first = {
        "task": flat.get("task") or f"autoencoder of {flat['data.name']}",
        "method": "dense" if dense else flat["prune.method"],
        "sparsity": 0.0 if dense else flat["prune.sparsity"],
        "seed": flat["seed"],
    }
    rest = {
        name: value
        for name, value in flat.items()
        if name not in (*first, "prune.method", "prune.sparsity")
        and not (dense and name.startswith("prune."))
    }
    simple = (bool, int, float, str)
    return {
        name: value if isinstance(value, simple) else json.dumps(value)
        for name, value in (first | rest).items()
    }
