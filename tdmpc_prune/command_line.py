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
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tdmpc_prune.arguments import Arguments, Settings
from tdmpc_prune.envs import DisplayError, TaskError
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.help_text import help_text
from tdmpc_prune.machine import set_threads
from tdmpc_prune.settings import PROGRAM, by_dotted_name, thawed, to_plain
from tdmpc_prune.signals import Stopped, shared_stop

_FOR_PEOPLE = (
    *(UserError, TaskError, DisplayError, RunError),
    *(HydraException, OmegaConfBaseException),
)

Main = Callable[[Any, list[str]], None]


def run_command(schema: type, main: Main) -> None:
    """Run `main(settings, names of the settings given on the command line)`, and exit.

    PyTorch's threads are set before: `settings.threads`, or 1 where there is no such setting.

    Args:
        schema: the dataclass of the command's settings, see `settings.setting`.
        main: gets an instance of it. What it works with is imported in it, so that help and
            refusals need not wait. Its docstring is what `--help` begins with: what the command
            does, and examples.
    """

    def run(arguments: Arguments) -> None:
        if arguments.multirun:
            sweep(arguments, main)
        else:
            _work(main, _composed(arguments), arguments)

    _command(schema, main, run)


def run_sweeps(
    schema: type,
    job: Main,
    sweeps: Callable[[Any], Iterable[str]],
    conclude: Callable[[Any], None],
) -> None:
    """Run `job` in sweeps through the Hydra launcher that the command line chooses.

    Args:
        schema: as for `run_command`.
        job: as `main` there; it gets the settings with one sweep's overrides.
        sweeps: from the settings, the override of one sweep after another.
        conclude: called at the end.
    """

    def run(arguments: Arguments) -> None:
        settings = _composed(arguments)
        set_threads(_threads(settings))  # what comes between the sweeps
        for override in sweeps(settings):
            sweep(arguments.swept_over(override), job)
        conclude(settings)

    _command(schema, job, run)


def _command(schema: type, main: Main, run: Callable[[Arguments], None]) -> None:
    """What all commands have in common, around `run`."""
    name, known, typed = _name(sys.argv[0]), Settings(schema), sys.argv[1:]
    with console():
        if {"--help", "-h"} & set(typed):
            print(help_text(name, known, main.__doc__ or ""))
            return
        register(known)
        try:
            arguments = Arguments.of(typed, known)
            with hydra.initialize(config_path=None, job_name=name, version_base="1.3"):
                if arguments.shown:
                    GlobalHydra.instance().hydra.show_cfg(
                        schema.__name__, arguments.overrides, arguments.shown, None
                    )
                else:
                    run(arguments)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(sentence(error, known)) from error


def _name(called: str) -> str:
    """Of a command that is called as `scripts/train.py` or as `tdmpc-prune train`."""
    return Path(called.removeprefix(f"{PROGRAM} ")).stem


def composed(schema: type, words: list[str]) -> tuple[Any, list[str]]:
    """The settings of a command that is called from Python, and the names of those given.

    Raises:
        UserError: they cannot be so.
    """
    known = Settings(schema)
    register(known)
    try:
        arguments = Arguments.of(words, known)
        with hydra.initialize(config_path=None, job_name=schema.__name__, version_base="1.3"):
            return _composed(arguments), arguments.given
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(sentence(error, known)) from error


def _composed(arguments: Arguments) -> Any:
    """The command's settings, an instance of its dataclass."""
    return arguments.settings(hydra.compose(arguments.known.schema.__name__, arguments.overrides))


def _work(main: Main, settings: Any, arguments: Arguments) -> None:
    set_threads(_threads(settings))
    main(settings, arguments.given)


def _threads(settings: Any) -> int:
    return getattr(settings, "threads", 1)


# Hydra writes no folders or logs of its own: a run's folder holds all that there is of it.
_NO_LOGS = [{f"override hydra/{kind}_logging": "disabled"} for kind in ("job", "hydra")]
_NO_FOLDERS = {
    "output_subdir": None,
    "run": {"dir": "."},
    "sweep": {"dir": "runs/.sweeps", "subdir": "."},
}


def register(known: Settings) -> None:
    """Tell Hydra of a command's settings, under its dataclass's name, and of their choices.

    What a command's own default changes in the chosen value (`prune.start`) it changes in whichever
    is chosen.
    """
    store, name = ConfigStore.instance(), known.schema.__name__
    store.store(f"{name}_fields", thawed(known.schema))
    defaults: list[Any] = [f"{name}_fields"]
    own = OmegaConf.create({"hydra": _NO_FOLDERS})
    for group in known.declared.values():
        for choice, value in group.values.items():
            store.store(choice, thawed(value), group=group.name)
        if group.choices:
            chosen = next(iter(group.choices))
            defaults.append({group.name: chosen})
            plain = by_dotted_name(to_plain(group.values[chosen]))
            for part, value in by_dotted_name(to_plain(group.default)).items():
                if plain.get(part, MISSING) != value:
                    OmegaConf.update(own, f"{group.name}.{part}", value)
    store.store(name, {"defaults": [*defaults, *_NO_LOGS, "_self_"], **own})


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


def sweep(arguments: Arguments, main: Main) -> None:
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
                    _work(main, arguments.settings(settings), arguments)
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

        batches = GlobalHydra.instance().hydra.multirun(
            arguments.known.schema.__name__, job, arguments.overrides
        )
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
