"""README and pages: short, complete, and true where a test can tell."""

import re
import shlex

import pytest

from tdmpc_prune import command_line
from tests.commands import ROOT, run
from tests.test_calls import CUT, TINY

README = ROOT / "README.md"
PAGES = [README, ROOT / "checkpoints/README.md"]
PAGES += [
    ROOT / ".readme" / f"{name}.md"
    for name in ("cuts", "results", "returns", "analysis", "study-findings", "c")
]
PAGES_OF_CODE = [ROOT / ".readme" / f"{name}.md" for name in ("deployment", "from-python")]
WITHOUT_HYDRA = ("compare.py", "run_exported.py")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page):
    """Every command of a page as [script, argument, …], with one value for each shell variable."""
    found = []
    for block in blocks(page, "sh"):
        text = block.replace("\\\n", " ")
        assigned = re.findall(r"^(\w+)=(\S+)$", block, re.MULTILINE)
        for name, value in [("seed", "1"), ("prune", "magnitude"), *assigned]:
            text = text.replace(f"${name}", value)
        for part in re.findall(r"python scripts/([^;\n]*)", text):
            found.append(shlex.split(part, comments=True))
    return found


def test_the_readme_is_short():
    assert len(README.read_bytes()) < 10_000


def test_every_script_is_in_the_table_of_commands():
    table = README.read_text().split("\n## Commands\n")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+\.py)` \|", table, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize(
    "page", [*PAGES, *PAGES_OF_CODE], ids=lambda page: str(page.relative_to(ROOT))
)
def test_what_a_page_points_to_exists(page):
    text = page.read_text()
    for script in re.findall(r"scripts/(\w+\.py)", text):
        assert (ROOT / "scripts" / script).is_file(), script
    for file in re.findall(r"`((?:tdmpc_prune|tests|envs)/[\w/.]+\.py)`", text):
        assert (ROOT / file).is_file(), file
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links or page in PAGES_OF_CODE
    for link in links:
        if "://" not in link:
            assert (page.parent / link.partition("#")[0]).exists(), link
    for path in re.findall(r"=(checkpoints/[\w-]+)", text):
        assert (ROOT / path).is_dir(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_understood(page, tmp_path, monkeypatch):
    """Its settings exist and are valid; the work itself is left out."""
    compose = command_line.run_command
    understood = []

    def without_work(schema, main, *sweeps):
        compose(schema, lambda config, given: understood.append(config))

    monkeypatch.setattr(command_line, "run_command", without_work)
    monkeypatch.setattr(command_line, "run_sweeps", without_work)
    found = commands(page)
    assert found
    for script, *arguments in found:
        if script in WITHOUT_HYDRA:
            options = [argument for argument in arguments if argument.startswith("--")]
            shown = run(script, "--help", cwd=tmp_path).stdout
            assert all(option in shown for option in options), (script, arguments)
            continue
        if "-m" in arguments:  # each of its values by itself is as good as the first
            arguments = [re.sub(r"^(\w+=[\w-]+),.*", r"\1", a) for a in arguments if a != "-m"]
        understood.clear()
        done = run(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0 and understood, (script, arguments, done.stderr)


def test_the_control_loop_of_the_readme_controls(monkeypatch):
    (block,) = [block for block in blocks(README, "python") if "controller" in block]
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["reward"] > 7  # of 8: one for each simulator step with the pole up


def test_the_loop_of_the_deployment_page_controls(monkeypatch, capsys):
    (block,) = blocks(PAGES_OF_CODE[0], "python")
    monkeypatch.chdir(ROOT)
    names, applied = {}, []
    exec(compile(block, "deployment.md", "exec"), names)
    monkeypatch.setattr(names["time"], "sleep", lambda seconds: None)
    seen = iter([[0.0, -1.0, 0.0, 0.0, 0.0], [float("nan")] * 5, [0.0, -1.0, 0.0, 0.0, 0.0]])
    found = names["control"](lambda: next(seen), applied.append, 3)
    assert len(applied) == 3 and applied[0] is applied[1] and found.decisions == 2
    assert "position[0] (element 0) is nan" in capsys.readouterr().out


def test_the_calls_of_the_page_run(tmp_path, monkeypatch, undrawn):
    (block,) = blocks(PAGES_OF_CODE[1], "python")
    given = ('task="gym:Pendulum-v1", env_steps=20_000, model={"planner": {"samples": 128}}',)
    given += ('env_steps=5_000, **{"prune.sparsity": 0.5}',)
    assert all(settings in block for settings in given)
    block = block.replace(given[0], "**TINY").replace(
        given[1], "env_steps=0, eval_episodes=1, **CUT"
    )
    monkeypatch.chdir(tmp_path)
    cut = {f"prune.{name}": value for name, value in CUT.items()}
    names = {"TINY": TINY, "CUT": cut | {"prune.gather_episodes": 1, "prune.gather_updates": 3}}
    exec(compile(block, "from-python.md", "exec"), names)
    assert names["controller"].size["sparsity"] >= 0.4


def rows(page):
    """Every row of every table that has milliseconds and parameters, by the head of its columns."""
    found, head = [], []
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif "parameters" in head and any("ms per decision" in name for name in head):
            if set(line) <= set("|-"):
                continue
            found.append((cells[0], dict(zip(head, cells, strict=True))))
    return found


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_shipped_agents_are_what_their_cards_say(page):
    agents = {}
    for title, row in rows(page):
        name = re.match(r"[\w-]+", title.lstrip("["))[0]
        if not title.startswith("small, with"):  # a budget that no card is of
            agents[name if "-" in name else f"cartpole-swingup-{name}"] = row
    assert len(agents) == (2 if page == README else 7)
    cards = {name: (ROOT / "checkpoints" / name / "card.md").read_text() for name in agents}
    for name, row in agents.items():
        assert f"| {row['parameters'].replace(' ', ',')} " in cards[name]
        (score,) = [value for head, value in row.items() if head.startswith("return")]
        assert f"| {score} " in cards[name]
        # A dense agent's time is the one measured together with its pruned one's.
        (said,) = [value for head, value in row.items() if "ms per decision" in head]
        beside = "small" if page == README else "pruned"
        card = cards.get(name.replace("dense", beside))
        times = re.search(r"ms per decision \(median.*?\) +\|(.*)\|$", card, re.MULTILINE)[1]
        median = times.split("|")[name.endswith("dense")].partition(";")[0]
        digits = len(said.partition(".")[2])
        assert said == f"{float(median):.{digits}f}", name
