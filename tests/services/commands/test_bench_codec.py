"""`prfaas capture-kv` and `prfaas bench codec`: mistakes, figures of lossless codecs without torch, the real model."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout
from prfaas.services import kv_file
from prfaas.services.__main__ import main
from prfaas.services.commands import codec_speed
from prfaas.services.commands.bench_codec import effect_case, prefix_tokens
from prfaas.services.kv_file import KvCapture
from prfaas.transport.codecs.api import ChunkForm, CodecError
from prfaas.transport.codecs.registry import CODECS, codec_by_name

LAYOUT = KvLayout(
    tuple(
        LayerLayout(tuple(TensorLayout(kind, "bfloat16", 2, (16,)) for kind in (TensorKind.KEY, TensorKind.VALUE)))
        for _ in range(2)
    )
)
TOKENS = 400


def small_capture() -> KvCapture:
    """Numbers around 1, as KV is: their exponents repeat."""
    rng = random.Random(3)
    elements = LAYOUT.bytes_per_token * (TOKENS - 1) // 2
    data = b"".join((0x3F80 + rng.randrange(-200, 200)).to_bytes(2, "little") for _ in range(elements))
    return KvCapture("tiny", "f" * 32, LAYOUT, tuple(range(TOKENS)), (), data)


@pytest.fixture
def file(tmp_path: Path) -> str:
    kv_file.write(tmp_path / "tiny.kv", small_capture())
    return str(tmp_path / "tiny.kv")


@pytest.mark.parametrize("command", [["capture-kv"], ["bench", "codec"]])
def test_help_fits_a_screen_and_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert len(told.splitlines()) <= 40
    assert f"example:\n  prfaas {' '.join(command)}" in told


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["capture-kv"], 2, "--out"),
        (["capture-kv", "--out", "/no/such/folder/a.kv"], 2, "no folder /no/such/folder"),
        (["capture-kv", "--out", "a.kv", "--tokens", "1"], 2, "'1' must be a whole number from 2"),
        (["capture-kv", "--out", "a.kv", "--text", "/no/such/text"], 2, "--text /no/such/text: No such file"),
        (["capture-kv", "--out", "a.kv", "--text", "x", "--prompt", "y"], 2, "not allowed with"),
        (["capture-kv", "--out", "a.kv", "--model", "/no/such/model"], 2, "no such directory"),
        (["bench"], 2, "link | codec"),
        (["bench", "codec", "--codecs", "zstd,mp3"], 2, "'mp3' is no codec; the codecs are lz4, zstd"),
        (
            ["bench", "codec", "--kv", "/nope"],
            2,
            "--kv /nope: No such file or directory; make one with prfaas capture-kv",
        ),
        (["bench", "codec", "--kv", "/"], 2, "--kv /: not a file; make one with prfaas capture-kv"),
        (["bench", "codec", "--kv", "/dev/full"], 2, "--kv /dev/full: not a file; make one with prfaas capture-kv"),
        (["bench", "codec", "--kv", __file__], 2, "is not a KV file; make one with prfaas capture-kv"),
        (["bench", "codec", "--kv", "a.kv", "--tokens", "9"], 2, "--kv has its own prompt"),
    ],
)
def test_a_mistake_is_one_line_with_its_status(
    arguments: list[str], status: int, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """2 for a wrong call, 1 for what isn't there; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    try:
        ended = main(arguments)
    except SystemExit as error:
        ended = int(str(error.code))
    errors = capsys.readouterr().err
    assert ended == status
    assert told in errors
    assert len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: b"", "is not a KV file; make one with prfaas capture-kv"),
        (lambda data: data[:12], "ends early: after 12 bytes; capture again"),
        (lambda data: data[:-1], "ends early"),
        (lambda data: data + b"x", "is too long"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged: its KV doesn't hash to"),
        (lambda data: data[:20] + b"\0" + data[21:], "its header is wrong"),
    ],
    ids=["empty", "no header", "short", "long", "a bit changed", "header"],
)
def test_a_file_that_is_no_whole_kv_is_one_line_with_the_mend(
    damage: Callable[[bytes], bytes], told: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(file).write_bytes(damage(Path(file).read_bytes()))
    assert main(["bench", "codec", "--kv", file, "--effect-tokens", "0"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prfaas bench codec: --kv {file}")
    assert told in line
    assert line.endswith(("capture again", "prfaas capture-kv"))


def test_figures_of_each_codec_as_json(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--effect-tokens 0 leaves out what needs the model; lossless and lossy codecs have ratio and speed."""
    assert main(["bench", "codec", "--kv", file, "--effect-tokens", "0", "--repetitions", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["codec"] for entry in report["codecs"]] == [codec.name for codec in CODECS.values()]
    for entry in (report["baseline"], report["baseline_by_plane"], *report["codecs"]):
        assert entry["ratio"] > 1
        assert entry["encode_mb_per_s"] > 0
        assert entry["decode_mb_per_s"] > 0
        assert set(entry["ratio_by_kind"]) == {"key", "value"}
        assert "effect" not in entry
    assert report["baseline"]["encode_to_baseline"] == 1.0


def test_the_ratio_is_bytes_of_kv_over_bytes_on_the_wire(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted again here, chunk by chunk."""
    flags = ["--codecs", "zstd", "--repetitions", "1", "--chunk-kib", "4", "--step-tokens", "100", "--json"]
    assert main(["bench", "codec", "--kv", file, *flags]) == 0
    entry = json.loads(capsys.readouterr().out)["codecs"][0]
    capture, codec = small_capture(), codec_by_name("zstd")
    assert codec is not None
    wire_bytes = 0
    for form, start, end in capture.chunks(4096, 100):
        wire = codec.encode(memoryview(capture.data)[start:end], form)
        wire_bytes += end - start if wire is None else len(wire)
    assert entry["ratio"] == pytest.approx(len(capture.data) / wire_bytes)


def test_lossless_codecs_on_a_file_need_no_torch(file: str) -> None:
    code = "import sys; from prfaas.services.__main__ import main; "
    code += f"main(['bench', 'codec', '--kv', {file!r}, '--codecs', 'zstd', '--repetitions', '1']); "
    code += "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "zstd" in done.stdout


class Liar:
    """Calls itself lossless and clears each chunk's first byte."""

    name, number, lossless = "liar", 200, True

    def encode(self, data: memoryview, form: ChunkForm) -> bytes | None:
        return bytes(data[1:])

    def decode(self, wire: memoryview, out: memoryview, form: ChunkForm) -> None:
        out[0] = 0
        out[1:] = wire


def test_a_lossless_codec_that_changes_bytes_is_found_out() -> None:
    capture = small_capture()
    contenders = [codec_speed.CodecContender(Liar())]
    with pytest.raises(CodecError, match="liar calls itself lossless"):
        codec_speed.measure(contenders, capture, capture.chunks(4096, 512), 1, lambda: None)


def test_kv_goes_through_a_codec_whole_or_one_kind_alone() -> None:
    """What the receiver would have; the kinds that aren't named keep their bytes."""
    capture = small_capture()
    case = effect_case(capture, [Liar()], 4096, 512)
    assert set(case.lossy) == {"raw", "liar", "liar key", "liar value"}
    assert case.lossy["raw"] == capture.data
    for form, start, end in capture.chunks(4096, 512):
        changed = b"\0" + bytes(capture.data[start + 1 : end])
        assert case.lossy["liar"][start:end] == changed
        assert case.lossy["liar key"][start:end] == (
            changed if form.kind is TensorKind.KEY else capture.data[start:end]
        )
        assert case.lossy["liar value"][start:end] == (
            changed if form.kind is TensorKind.VALUE else capture.data[start:end]
        )


def test_effects_are_measured_at_several_prompt_lengths_where_kv_has_prefixes() -> None:
    assert prefix_tokens(small_capture(), 4) == [100, 200, 300, 400]
    assert prefix_tokens(small_capture(), 1) == [400]


@pytest.fixture(scope="module")
def captured(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 tokens of the real model, by the command."""
    out = tmp_path_factory.mktemp("kv") / "smollm2.kv"
    assert main(["capture-kv", "--model", str(smollm2_dir), "--tokens", "48", "--out", str(out)]) == 0
    return out


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(300)
class TestRealModel:
    def test_captured_kv_is_what_transformers_computes(self, captured: Path, smollm2_dir: Path) -> None:
        """The same keys and values as in transformers' own cache, in wire order, of all tokens but the last."""
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        capture = kv_file.read(captured)
        assert len(capture.prompt_token_ids) == 48
        assert len(capture.following_token_ids) == 1024
        model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(torch.tensor([capture.prompt_token_ids[:-1]]), past_key_values=cache, use_cache=True)
        rows = list(kv_file.rows(capture.layout, capture.tokens))
        assert len(rows) == 30 * 2 * 3
        for row in rows:
            layer = cache.layers[row.layer]
            expected = (layer.keys if row.tensor.kind is TensorKind.KEY else layer.values)[0, row.row]
            nbytes = row.extent.row_bytes
            found = torch.frombuffer(bytearray(capture.data[row.start : row.start + nbytes]), dtype=torch.bfloat16)
            difference = (found.view(47, 64).float() - expected).norm() / expected.norm()
            assert difference < 0.05, f"layer {row.layer} {row.tensor.kind} head {row.row}"

    def test_exact_kv_has_no_effect_and_lossy_kv_has_a_small_one(
        self, captured: Path, smollm2_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The control row is exactly zero, so what the others show is their codec's doing; four bits cost more than
        eight."""
        command = ["bench", "codec", "--kv", str(captured), "--model", str(smollm2_dir), "--codecs", "int8,int4"]
        flags = ["--effect-tokens", "12", "--effect-prompts", "2", "--repetitions", "1", "--json"]
        assert main([*command, *flags]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["effect_prompt_tokens"] == [24, 48]
        control = report["effect_control"]
        assert (control["greedy_same"], control["first_change"]) == (1.0, [12, 12])
        assert control["continuation"]["kl_nats"] == control["text"]["kl_nats"] == 0.0
        int8, int4 = (entry["effect"]["text"] for entry in report["codecs"])
        assert 0 < int8["kl_nats"] < int4["kl_nats"] < 1
        assert set(report["codecs"][0]["effect_by_kind"]) == {"key", "value"}

    def test_kv_of_another_model_is_refused(
        self, file: str, smollm2_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Before anything is measured; the mend is named."""
        assert main(["bench", "codec", "--kv", file, "--model", str(smollm2_dir), "--codecs", "int8"]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert "the KV is of tiny (ffffffff)" in errors[-1]
        assert "--effect-tokens 0" in errors[-1]
        assert not any("measuring" in line for line in errors)

    def test_more_tokens_than_the_model_has_positions_are_refused(
        self, smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["capture-kv", "--model", str(smollm2_dir), "--tokens", "9000", "--out", str(tmp_path / "a.kv")]
        assert main(command) == 2
        assert "9000 tokens don't fit the model, which has 8192 positions" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
