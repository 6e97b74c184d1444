"""The way from a command line to a function: Hydra, `--help`, and errors that a person can read.

Exit codes: 0 done, 1 the run could not go on, 2 wrong input, 128 + n stopped by signal n; of a
sweep, the largest of its jobs'.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from envs import DisplayError, TaskError
from tdmpc_prune.agent.config import PRESETS
from tdmpc_prune.analysis.config import (
    STUDIES,
    CoefficientsConfig,
    CompareCoefficientsConfig,
    GroupsConfig,
    ImportanceConfig,
    SensitivityConfig,
    StabilityConfig,
    StudyCommand,
)
from tdmpc_prune.arguments import Arguments, Settings
from tdmpc_prune.autoencoder.config import DATA, DataConfig
from tdmpc_prune.deploy.config import BenchmarkConfig, EvaluateConfig, ExportConfig, FitConfig
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.help_text import help_text
from tdmpc_prune.pruning.config import METRICS, PruneConfig
from tdmpc_prune.settings import _overridable
from tdmpc_prune.signals import Stopped, shared_stop
from tdmpc_prune.training.config import AutoencoderConfig, PruneCheckpointConfig, TrainConfig

_FOR_PEOPLE = (
    *(UserError, TaskError, DisplayError, RunError),
    *(HydraException, OmegaConfBaseException),
)

Function = Callable[[Any, list[str]], None]


def run_command(name: str, function: Function) -> None:
    """Run `function(settings, names of the settings given on the command line)`, and exit.

    Args:
        name: the command, a key of `config.COMMANDS`.
        function: gets an instance of the command's dataclass. Its docstring is what `--help`
            begins with: what the command does, and examples.
    """

    def run(arguments: Arguments) -> None:
        if arguments.multirun:
            sweep(name, arguments, function)
        else:
            function(arguments.settings(hydra.compose(name, arguments.overrides)), arguments.given)

    _command(name, function, run)


def run_sweeps(
    name: str,
    function: Function,
    sweeps: Callable[[Any], Iterable[str]],
    conclude: Callable[[Any], None],
) -> None:
    """Run `function` in sweeps through the Hydra launcher that the command line chooses.

    Args:
        name: the command, a key of `config.COMMANDS`.
        function: as for `run_command`; it gets the settings with one sweep's overrides.
        sweeps: from the settings, the override of one sweep after another.
        conclude: called at the end.
    """

    def run(arguments: Arguments) -> None:
        settings = arguments.settings(hydra.compose(name, arguments.overrides))
        for override in sweeps(settings):
            sweep(name, arguments.swept_over(override), function)
        conclude(settings)

    _command(name, function, run)


def _command(name: str, function: Function, run: Callable[[Arguments], None]) -> None:
    """What all commands have in common, around `run`."""
    known, typed = Settings(COMMANDS[name]), sys.argv[1:]
    with console():
        if {"--help", "-h"} & set(typed):
            print(help_text(name, known, function.__doc__ or ""))
            return
        register()
        try:
            arguments = Arguments.of(typed, known)
            with hydra.initialize_config_module(
                "tdmpc_prune.conf", job_name=name, version_base="1.3"
            ):
                if arguments.shown:
                    GlobalHydra.instance().hydra.show_cfg(
                        name, arguments.overrides, arguments.shown, None
                    )
                else:
                    run(arguments)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(sentence(error, known)) from error


@contextmanager
def console() -> Iterator[None]:
    """Around a whole command: output that never fails, and errors as one line and an exit code."""
    _tolerant()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except Stopped as stopped:
        _say(str(stopped))
        raise SystemExit(code_of(stopped)) from stopped
    except KeyboardInterrupt:
        _say("interrupted")
        raise SystemExit(130) from None
    except BrokenPipeError:  # who read our output has gone: `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # as if stopped by SIGPIPE
    except _FOR_PEOPLE as error:
        _say(f"error: {error}")
        raise SystemExit(code_of(error)) from error


def _tolerant() -> None:
    """Let what a terminal cannot show become a question mark, and no error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a stream that is none of the system's
            stream.reconfigure(errors="replace")


def _say(line: str) -> None:
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def code_of(error: BaseException) -> int:
    """The exit code of a command that ended with `error`."""
    if isinstance(error, Stopped):
        return 128 + error.signal_number
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, _FOR_PEOPLE) and not isinstance(error, RunError) else 1


def sentence(error: Exception, known: Settings) -> str:
    """One line for a person, from an error of Hydra's or of OmegaConf's, or of ours."""
    text, cause = str(error), str(error.__cause__ or "")
    if match := re.search(r"Could not find '(.+)/([^/']+)'", text):
        group, choice = match.groups()
        own = known.choices(group) or re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        hint = f"the choices are {', '.join(own)}" if own else "there are no choices for it"
        return f"{group}={choice} is not a choice; {hint}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return known.unknown(match[1])
    if match := re.search(r"Error merging override (.+?)$", text, re.MULTILINE):
        return f"{match[1].strip()}: {cause.splitlines()[0] if cause else 'it does not fit'}"
    return " ".join(" ".join(text.splitlines()[:2]).split())


# --- Sweeps -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a job of a sweep."""

    job: str  # the values that it has of its own: "seed=1"
    code: int  # as its exit code would be
    message: str


def sweep(name: str, arguments: Arguments, function: Function) -> None:
    """Run every job of a sweep, whatever becomes of the others.

    A signal stops the sweep: jobs at work save, and those that have not begun do not begin.

    Raises:
        SystemExit: jobs failed, which are named, with the largest of their codes; or a signal came.
    """
    home = os.getpid()
    with shared_stop() as stop:

        def job(settings: Any) -> Outcome:
            own = [
                o for o in HydraConfig.get().overrides.task if o.split("=")[0] in arguments.swept
            ]
            label = " ".join(own) or "the job"
            _tolerant()
            if stop:
                return Outcome(label, 0, "did not begin")
            try:
                with stop.working(here=os.getpid() == home):
                    function(arguments.settings(settings), arguments.given)
            except (Stopped, KeyboardInterrupt, SystemExit) as ended:
                if isinstance(ended, Stopped):
                    _say(str(ended))
                code = code_of(ended)
                if code > 128:
                    stop.request()
                return Outcome(label, code, "was stopped" if code > 128 else f"exit code {code}")
            except _FOR_PEOPLE as error:
                outcome = Outcome(label, code_of(error), sentence(error, arguments.known))
            except Exception as error:
                traceback.print_exc()
                outcome = Outcome(label, 1, f"{type(error).__name__}: {error}")
            else:
                return Outcome(label, 0, "")
            _say(f"{label} failed: {outcome.message}")
            return outcome

        batches = GlobalHydra.instance().hydra.multirun(name, job, arguments.overrides)
        outcomes = [result.return_value for batch in batches for result in batch]
    stopped = [o for o in outcomes if o.code > 128]
    failed = [o for o in outcomes if 0 < o.code <= 128]
    if failed:
        jobs = "jobs" if len(outcomes) > 1 else "job"
        named: dict[str, list[str]] = {}
        for outcome in failed:
            named.setdefault(outcome.message, []).append(outcome.job)
        reasons = "; ".join(f"{', '.join(own)}: {message}" for message, own in named.items())
        _say(f"error: {len(failed)} of {len(outcomes)} {jobs} failed: {reasons}")
    if stopped or stop:
        begun = sum(outcome.message != "did not begin" for outcome in outcomes)
        _say(f"the sweep was stopped; {begun} of {len(outcomes)} jobs had begun")
    codes = [outcome.code for outcome in outcomes] + ([128 + stop.number] if stop.number else [])
    if any(codes):
        raise SystemExit(max(codes))


COMMANDS = {
    "train": TrainConfig,
    "train_autoencoder": AutoencoderConfig,
    "prune": PruneCheckpointConfig,
    "groups": GroupsConfig,
    "evaluate": EvaluateConfig,
    "fit": FitConfig,
    "optimize_coefficients": CoefficientsConfig,
    "compare_coefficients": CompareCoefficientsConfig,
    "sensitivity": SensitivityConfig,
    "stability": StabilityConfig,
    "importance": ImportanceConfig,
    "study": StudyCommand,
    "export": ExportConfig,
    "benchmark": BenchmarkConfig,
}

GROUPS = {
    "model": PRESETS,
    "study": STUDIES,
    "data": {name: DataConfig(name) for name in DATA},
    "prune": {method: PruneConfig(method=method) for method in ("none", *METRICS)},
}


def register() -> None:
    """Tell Hydra of the commands' settings and of the choices for `model=` and `prune=`."""
    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name=f"{name}_settings", node=_overridable(schema))
    for group, choices in GROUPS.items():
        for name, choice in choices.items():
            store.store(group=group, name=name, node=_overridable(choice))
