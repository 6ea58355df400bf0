"""Which spans follow from what happened."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.services.decode.spans import decode_span, receive_span
from prfaas.services.messages import DecodeNodeTimeline
from prfaas.services.prefill.spans import PrefillInstants, prefill_span
from prfaas.services.router.spans import request_span
from prfaas.services.router.timeline import RequestFacts, RouterInstants
from prfaas.services.telemetry.spans import MAX_GROUPS, layer_groups


@given(st.integers(0, 1024))
def test_layer_groups_cover_all_layers_once_and_are_few_and_alike(layers: int) -> None:
    groups = layer_groups(layers)
    assert [layer for group in groups for layer in group] == list(range(layers))
    assert len(groups) == min(layers, MAX_GROUPS)
    assert not groups or max(map(len, groups)) - min(map(len, groups)) <= 1


def test_a_transfer_is_from_its_first_layer_to_its_last() -> None:
    instants = PrefillInstants(1.0, 9.0, 1.5, 2.0, 6.0, [3.0, 4.0, 6.0], {0: 3.5, 1: 5.0, 2: 8.0}, 100, 60)
    span = prefill_span("r", instants, "done", 7, 0)
    queue, compute, send = span.children
    assert (queue.start_s, queue.end_s, compute.start_s, compute.end_s) == (1.5, 2.0, 2.0, 6.0)
    assert (send.start_s, send.end_s) == (3.0, 8.0)
    assert [(g.start_s, g.end_s) for g in send.children] == [(3.0, 3.5), (4.0, 5.0), (6.0, 8.0)]
    assert span.error == ""


@pytest.mark.parametrize(("outcome", "error"), [("cancelled", ""), ("engine_failed", "engine_failed"), ("done", "")])
def test_a_call_that_failed_is_an_error_and_a_cancelled_one_is_not(outcome: str, error: str) -> None:
    """Nothing had begun: there are no children."""
    span = prefill_span("r", PrefillInstants(1.0, 2.0), outcome, 7, 0)
    assert (span.error, span.children) == (error, ())


def test_what_did_not_arrive_has_no_span() -> None:
    """A local prefill, and a transfer that broke off."""
    assert receive_span(DecodeNodeTimeline(0.0, 1.0, arrived_s=[None, None])) is None
    broken = receive_span(DecodeNodeTimeline(0.0, 1.0, arrived_s=[0.5, None], sent_s=[0.4, 0.6], used_s=[0.7]))
    assert broken is not None
    assert [(g.start_s, g.end_s) for g in broken.children] == [(0.4, 0.5)]
    assert broken.children[0].attributes["prfaas.used_after_s"] == pytest.approx(0.2)


def test_the_first_step_is_from_the_last_layer_to_the_first_token() -> None:
    timeline = DecodeNodeTimeline(0.0, 2.0, last_token_s=3.0, arrived_s=[0.5, 1.5])
    first_step, output = decode_span("r", timeline, 3.5, "done", 4).children
    assert (first_step.start_s, first_step.end_s, output.start_s, output.end_s) == (1.5, 2.0, 2.0, 3.0)
    assert decode_span("r", timeline, 3.5, "cancelled", 0).children == ()


def test_a_request_that_came_to_no_node_is_an_error() -> None:
    facts = RequestFacts("r", "failed", "no_decode_node", [], None, "", 5, 0)
    span = request_span(facts, RouterInstants(1.0, ended_s=1.1), model="m")
    assert (span.error, span.children) == ("failed", ())
    assert "prfaas.decode_node" not in span.attributes


def test_without_an_endpoint_opentelemetry_is_not_imported() -> None:
    """Neither by a router nor by a node."""
    program = (
        "import sys; import prfaas.services.router.app, prfaas.services.node.app; "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_an_endpoint_without_the_package_is_said_at_the_start(tmp_path) -> None:
    """In one line with the mend, before anything is bound."""
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("raise ImportError('not here')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from prfaas.services.__main__ import main; sys.exit(main("
    )
    flags = ["router", "--model", "bytes", "--telemetry-otlp-endpoint", "http://127.0.0.1:4318/v1/traces"]
    done = subprocess.run([sys.executable, "-c", f"{code}{flags!r}))"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'prfaas[otel]'" in done.stderr
    assert "Traceback" not in done.stderr
