"""The orders of the example are what the script in the repository makes."""

from __future__ import annotations

import json

import pytest

import make_orders


def test_the_files_in_the_repository_are_what_the_script_makes() -> None:
    files, _ = make_orders.make_files()
    for path, text in files.items():
        assert path.read_text("utf-8") == text, f"run scripts/make_orders.py: {path.name} is out of date"


def test_check_names_the_file_that_differs(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_orders, "EXAMPLES", tmp_path)
    monkeypatch.setattr("sys.argv", ["make_orders.py", "--check"])
    assert make_orders.main() == 1
    assert "orders.jsonl is not what this script makes" in capsys.readouterr().err

    monkeypatch.setattr("sys.argv", ["make_orders.py"])
    assert make_orders.main() == 0
    monkeypatch.setattr("sys.argv", ["make_orders.py", "--check"])
    assert make_orders.main() == 0


def test_every_kind_of_failure_is_among_the_orders() -> None:
    _, causes = make_orders.make_files()
    counts = {cause: list(causes.values()).count(cause) for cause in make_orders.CAUSES}
    assert counts == {
        "unknown customer": 60,
        "article not listed": 20,
        "card declined": 100,
        "address refused": 60,
        "account held": 20,
    }


def test_some_articles_are_wanted_more_often_than_there_are_pieces() -> None:
    files, _ = make_orders.make_files()
    orders = [json.loads(line) for line in files[make_orders.EXAMPLES / "orders.jsonl"].splitlines()]
    wanted = dict.fromkeys(make_orders.SHORT, 0)
    for order in orders:
        for item in order["items"]:
            if item["sku"] in wanted:
                wanted[item["sku"]] += item["quantity"]
    assert all(wanted[sku] > left for sku, (_, _, left) in make_orders.SHORT.items())
