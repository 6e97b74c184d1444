"""Every command in a process of its own, as a shell starts it: help, and one refusal."""

import pytest

from tests.commands import ROOT, run_process

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
WRONG = {"compare.py": "nowhere", "run_exported.py": "nowhere.onnx"}  # the others have settings


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_command_helps_and_refuses_in_a_process_of_its_own(tmp_path, script):
    helped = run_process(script, "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    assert ("usage: " if script in WRONG else "Examples:") in helped.stdout
    wrong = WRONG.get(script, "no_such_setting=3")
    refused = run_process(script, wrong, cwd=tmp_path)
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2 and refused.stdout == ""
    assert line.startswith("error: ") and wrong.split("=")[0] in line
    assert not list(tmp_path.iterdir())
