"""The transcript of operations.md: an operator finds parked instances, mends the code and retries them in bulk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transcript import Shell, matches, plain, steps_of

GUIDE = Path(__file__).resolve().parents[2] / "examples" / "operations.md"
SECTION = GUIDE.read_text("utf-8").partition("\n### A bug in a stage\n")[2].partition("\n## ")[0]


@pytest.mark.timeout(300)
def test_a_hundred_parked_instances_complete_after_a_mended_file_and_no_effect_happens_twice(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n# billing.py\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)
    (console,) = re.findall(r"^```console\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)
    (tmp_path / "billing.py").write_text(code)
    invoices = [{"id": f"INV-{number:03}", "lines": [{"price": 4.5, "pieces": 2}]} for number in range(1, 101)]
    (tmp_path / "invoices.jsonl").write_text("".join(json.dumps(one) + "\n" for one in invoices))
    steps = steps_of(console)
    assert len(steps) > 8
    shell = Shell(tmp_path)
    try:
        for step in steps:
            printed = shell.run_until(step)
            assert matches(step, printed), f"$ {step.command}\n{printed}\n\nis shown as\n{plain(step.output)}"
    finally:
        shell.close()
    reserved = (tmp_path / "numbers.log").read_text().split()
    assert sorted(reserved) == [one["id"] for one in invoices], "the first stage ran once for each"
