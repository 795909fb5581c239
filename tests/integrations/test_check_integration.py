"""tools/check_integration: its verdict, what it says of a changed checkout, and placeholders that refuse calls."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from parity import CASES, core_gradient, make_batch

from asympo_megatron.errors import IntegrationError
from asympo_megatron.objectives import build_objective

sys.path.append(str(Path(__file__).parents[2] / "tools" / "check_integration"))
import checkout
import placeholders

TOOL = Path(checkout.__file__).parent


@pytest.fixture
def tool(monkeypatch):
    """The program, as a module."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    monkeypatch.setenv("ROLL_LOG_DIR", "unset")
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("check_integration_main", TOOL / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("factor", "status", "verdict"), [(1.0, 0, "PASS"), (1 + 1e-5, 1, "FAILED")])
def test_a_gradient_that_differs_is_a_failure(tool, monkeypatch, capsys, tmp_path, factor, status, verdict):
    _, gradient = core_gradient(build_objective("asympo", **CASES["asympo"]), make_batch())

    def results(name, path):
        assert (name, path) == ("roll", tmp_path)
        assert Path(os.environ["ROLL_LOG_DIR"]).is_dir()
        yield "asympo", "one process", factor * gradient

    monkeypatch.setattr(tool, "results", results)
    assert tool.main(["roll", str(tmp_path)]) == status
    said = capsys.readouterr().out.split()
    assert said[-1] == verdict
    assert ("DIFFERENT:" in said) == (status == 1)
    assert not Path(os.environ["ROLL_LOG_DIR"]).exists()


def test_what_cannot_be_compared_is_no_pass(tool, capsys, tmp_path):
    assert tool.main(["prime_rl", str(tmp_path)]) == 2
    assert "is no checkout of prime_rl" in capsys.readouterr().err


def test_placeholders_can_be_imported_and_inherited_from_but_not_called(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setitem(placeholders.PACKAGES, "stack", ("absent_tracker", "xml.absent_part", "json"))
    placeholders.allow("stack")
    for name in ("absent_tracker.client", "xml.absent_part", "json"):
        importlib.import_module(name)
    module = sys.modules.pop("absent_tracker.client")
    del sys.modules["absent_tracker"], sys.modules["xml.absent_part"]
    assert sys.modules["json"].loads("3") == 3, "an installed package wins"
    assert type("Mine", (module.Tracker,), {}).__mro__[1].__qualname__ == "Tracker"
    for call in (module.log, module.Tracker.start):
        with pytest.raises(IntegrationError, match=r"absent_tracker.client\.\S+ was called"):
            call()
    for name in ("absent_trackers", "xml.absent_parts"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_a_checkout_that_has_changed_is_told_apart_from_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "changed_stack.py").write_text("def loss_function(args, data):\n    pass\n")
    (tmp_path / "needy_stack.py").write_text("import a_package_that_nobody_has\n")
    function = checkout.upstream("changed_stack", "loss_function")
    with pytest.raises(IntegrationError, match="has no parameter batch; it takes args, data"):
        checkout.require_parameters(function, ["args", "batch"])
    with pytest.raises(IntegrationError, match="was written for args, batch"):
        checkout.require_call(function, ["args", "batch"])
    with pytest.raises(IntegrationError, match="changed_stack has no gone: it has moved or been renamed"):
        checkout.upstream("changed_stack", "gone")
    with pytest.raises(IntegrationError, match="the checkout has no module gone_stack"):
        checkout.upstream("gone_stack.loss", "loss_function")
    with pytest.raises(IntegrationError, match="a_package_that_nobody_has, which is not installed here"):
        checkout.upstream("needy_stack", "loss_function")
    with pytest.raises(IntegrationError, match="is no checkout of prime_rl"):
        checkout.enter("prime_rl", tmp_path)
