"""`prfaas bench codec`: what each codec makes of real KV, how fast, and what a lossy one does to the model's output."""

from __future__ import annotations

import json
import stat
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prfaas.common.command_line import Parser
from prfaas.common.errors import UsageError
from prfaas.services.commands.capture_kv import add_prompt_flags, capture_text, load_model
from prfaas.services.commands.flags import new_parser, whole
from prfaas.services.commands.progress import progress_bar
from prfaas.services.commands.prompt_source import read_text

if TYPE_CHECKING:
    import argparse

    from prfaas.services.commands.codec_effect import Case, Effect
    from prfaas.services.commands.codec_speed import Speed
    from prfaas.services.engine.transformers.offline import OfflineModel
    from prfaas.services.kv_file import KvCapture
    from prfaas.services.model_store import Progress
    from prfaas.transport.codecs.api import Codec

EXACT = "raw"
"""The control: the same KV once more. What it differs from the reference is the measurement's own noise."""
MAKE_ONE = "make one with prfaas capture-kv --out FILE"
HELP = """\
Codecs on KV of the real model, on one core, in turns with plain zstd-1 over the same byte planes; and, for lossy ones,
what the model then says differently. greedy: share of equal tokens when it writes on by itself. top1, KL, perplexity:
the same tokens given to both, their next-token distributions compared. MB/s are MB of KV a processor second.\
"""


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    codecs = chosen_codecs(options.codecs)
    with progress_bar(counts=True) as progress:
        report = run(options, codecs, progress)
    if options.json:
        print(json.dumps(report))
    else:
        print(as_text(report))
    return 0


def parser() -> Parser:
    made = new_parser("prfaas bench codec", HELP, "prfaas bench codec --codecs zstd,int8 --json")
    made.add_argument("--kv", metavar="FILE", help="KV of prfaas capture-kv [it is captured first]")
    add_prompt_flags(made)
    made.add_argument("--codecs", metavar="A,B", default="", help="only these [all]")
    made.add_argument("--repetitions", metavar="N", type=whole(1, 1000), default=5, help="in turns; medians count [5]")
    made.add_argument("--chunk-kib", metavar="N", type=whole(4, 16384), default=1024, help="largest chunk, KiB [1024]")
    made.add_argument(
        "--step-tokens", metavar="N", type=whole(1, 65536), default=512, help="tokens of a prefill step [512]"
    )
    made.add_argument(
        "--effect-tokens", metavar="N", type=whole(0, 65536), default=512, help="tokens to judge by; 0: none [512]"
    )
    made.add_argument(
        "--effect-prompts", metavar="N", type=whole(1, 16), default=2, help="prompt lengths: N equal steps to all [2]"
    )
    made.add_argument("--json", action="store_true", help="print one object instead")
    return made


def chosen_codecs(names: str) -> list[Codec]:
    """Raises UsageError for a name that is no codec."""
    from prfaas.transport.codecs.registry import CODECS

    known = {codec.name: codec for codec in CODECS.values()}
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip())) or list(known)
    for name in wanted:
        if name not in known:
            raise UsageError(f"--codecs: {name!r} is no codec; the codecs are {', '.join(known)}")
    return [known[name] for name in wanted]


def run(options: argparse.Namespace, codecs: Sequence[Codec], progress: Progress) -> dict[str, Any]:
    model: OfflineModel | None = None
    lossy = [codec for codec in codecs if not codec.lossless]
    if options.kv:
        if options.text or options.prompt or options.tokens:
            raise UsageError("--kv has its own prompt: leave out --text, --prompt and --tokens")
        capture = read_capture(options.kv)
    else:
        text = read_text(options.text) if options.text else options.prompt
        model = load_model(options.model, progress)
        capture = capture_text(model, options.model, text, options.tokens, progress)
    if lossy and options.effect_tokens:
        model = model or load_model(options.model, progress)
        # Before the minutes of work.
        model.check_capture(capture)
        model.check_ids(capture.prompt_token_ids, options.effect_tokens)
    report = measure_speed(options, codecs, capture, progress)
    if lossy and options.effect_tokens:
        assert model is not None
        add_effects(report, options, lossy, capture, model, progress)
    return report


def read_capture(file_name: str) -> KvCapture:
    """Raises UsageError for what is no file, can't be read, or isn't (whole) KV."""
    from prfaas.services import kv_file

    path = Path(file_name)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"--kv {path}: not a file; {MAKE_ONE}")
        return kv_file.read(path)
    except OSError as error:
        raise UsageError(f"--kv {path}: {error.strerror}; {MAKE_ONE}") from None
    except kv_file.KvFileError as error:
        raise UsageError(f"--kv {error}") from None


def measure_speed(
    options: argparse.Namespace, codecs: Sequence[Codec], capture: KvCapture, progress: Progress
) -> dict[str, Any]:
    from prfaas.services.commands import codec_speed

    chunks = capture.chunks(options.chunk_kib * 1024, options.step_tokens)
    contenders: list[codec_speed.Contender] = [codec_speed.PlainZstd(), codec_speed.PlainZstdByPlane()]
    contenders += [codec_speed.CodecContender(codec) for codec in codecs]
    turns = [0, len(contenders) * (options.repetitions + 1)]

    def tick() -> None:
        turns[0] += 1
        progress("measuring speed", *turns)

    baseline, by_plane, *speeds = codec_speed.measure(contenders, capture, chunks, options.repetitions, tick)
    return {
        "model": capture.model,
        "prompt_tokens": len(capture.prompt_token_ids),
        "kv_bytes": len(capture.data),
        "chunks": len(chunks),
        "repetitions": options.repetitions,
        "baseline": _speed_report(baseline, baseline),
        "baseline_by_plane": _speed_report(by_plane, baseline),
        "codecs": [_speed_report(speed, baseline) for speed in speeds],
    }


def _speed_report(speed: Speed, baseline: Speed) -> dict[str, Any]:
    from prfaas.services.commands.codec_speed import paired_ratio

    return {
        "codec": speed.name,
        "lossless": speed.lossless,
        "ratio": speed.raw_bytes / speed.wire_bytes,
        "ratio_by_kind": {kind: raw / wire for kind, (raw, wire) in speed.kinds.items()},
        "encode_mb_per_s": statistics.median(speed.encode_mb_per_s),
        "decode_mb_per_s": statistics.median(speed.decode_mb_per_s),
        "encode_to_baseline": paired_ratio(speed.encode_mb_per_s, baseline.encode_mb_per_s),
        "decode_to_baseline": paired_ratio(speed.decode_mb_per_s, baseline.decode_mb_per_s),
        "chunks_sent_raw": speed.raw_chunks,
    }


# -- the effect of lossy codecs ---------------------------------------------------------------------------------------


def add_effects(
    report: dict[str, Any],
    options: argparse.Namespace,
    lossy: Sequence[Codec],
    capture: KvCapture,
    model: OfflineModel,
    progress: Progress,
) -> None:
    """`effect` and `effect_by_kind` in the entries of lossy codecs, `effect_control` beside them."""
    from prfaas.services.commands import codec_effect

    prompts = prefix_tokens(capture, options.effect_prompts)
    cases = [effect_case(capture.prefix(n), lossy, options.chunk_kib * 1024, options.step_tokens) for n in prompts]
    free_running = [EXACT, *(codec.name for codec in lossy)]
    effects = codec_effect.measure(model, cases, free_running, options.effect_tokens, progress)
    report["effect_tokens"] = options.effect_tokens
    report["effect_prompt_tokens"] = prompts
    report["effect_control"] = effects[EXACT].report()
    for entry in report["codecs"]:
        if not entry["lossless"]:
            entry["effect"] = effects[entry["codec"]].report()
            entry["effect_by_kind"] = _by_kind(entry["codec"], effects)


def prefix_tokens(capture: KvCapture, prompts: int) -> list[int]:
    """Lengths of the prompts to judge by, the longest last; only the whole one where KV has no prefixes."""
    whole_prompt = len(capture.prompt_token_ids)
    if not capture.has_prefixes:
        return [whole_prompt]
    return sorted({max(2, whole_prompt * i // prompts) for i in range(1, prompts + 1)})


def effect_case(capture: KvCapture, lossy: Sequence[Codec], chunk_bytes: int, step_tokens: int) -> Case:
    from prfaas.services.commands.codec_effect import Case
    from prfaas.services.commands.codec_speed import through

    chunks = capture.chunks(chunk_bytes, step_tokens)
    kinds = list(dict.fromkeys(str(chunk.form.kind) for chunk in chunks))
    variants: dict[str, bytes | bytearray] = {EXACT: capture.data}
    for codec in lossy:
        variants[codec.name] = through(codec, capture, chunks)
        for kind in kinds if len(kinds) > 1 else ():
            variants[f"{codec.name} {kind}"] = through(codec, capture, chunks, frozenset({kind}))
    return Case(capture.prompt_token_ids, capture.data, variants, capture.following_token_ids)


def _by_kind(name: str, effects: dict[str, Effect]) -> dict[str, Any]:
    """With only this kind of tensor lossy, the others exact."""
    return {
        variant.removeprefix(f"{name} "): {key: effect.report()[key] for key in ("continuation", "text")}
        for variant, effect in effects.items()
        if variant.startswith(f"{name} ")
    }


# -- for people -------------------------------------------------------------------------------------------------------


def as_text(report: dict[str, Any]) -> str:
    megabytes = report["kv_bytes"] / 1e6
    lines = [
        f"{megabytes:.1f} MB of KV ({report['model']}, {report['prompt_tokens']} tokens) in {report['chunks']} chunks; "
        f"MB/s per core, median of {report['repetitions']}",
        "",
        f"{'codec':15} {'ratio':>6} {'encode':>8} {'decode':>8}   of plain zstd-1   by kind",
    ]
    lines += [_speed_line(entry) for entry in _speeds_of(report)]
    if any("effect" in entry for entry in report["codecs"]):
        lines += ["", *_effect_lines(report)]
    return "\n".join(lines)


def _speeds_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [report["baseline"], report["baseline_by_plane"], *report["codecs"]]


def _effect_lines(report: dict[str, Any]) -> Iterator[str]:
    prompts = ", ".join(map(str, report["effect_prompt_tokens"]))
    yield f"effect on {report['effect_tokens']} tokens after prompts of {prompts} tokens ({EXACT}: the same KV again)"
    yield f"{'':15} {'':>7}  {'given the greedy tokens':^27}  {'given how the text goes on':^27}  writing on by itself"
    same = f"{'KL, nats':>9} {'top-1':>7} {'perplexity':>10}"
    yield f"{'codec':15} {'greedy':>7} {same} {same}  equal until"
    yield _effect_line(EXACT, report["effect_control"])
    for entry in report["codecs"]:
        if "effect" in entry:
            yield _effect_line(entry["codec"], entry["effect"])
            for kind, effect in entry["effect_by_kind"].items():
                yield _effect_line(f"  {kind} only", effect)


def _speed_line(entry: dict[str, Any]) -> str:
    kinds = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in entry["ratio_by_kind"].items())
    relative = f"{entry['encode_to_baseline']:>6.2f} / {entry['decode_to_baseline']:<6.2f}"
    return (
        f"{entry['codec']:15} {entry['ratio']:>6.3f} {entry['encode_mb_per_s']:>8.0f} {entry['decode_mb_per_s']:>8.0f}"
        f"   {relative}   {kinds}"
    )


def _effect_line(name: str, effect: dict[str, Any]) -> str:
    changes = " ".join(map(str, effect.get("first_change") or ()))
    compared = f"{_comparison(effect['continuation'])} {_comparison(effect['text'])}"
    return f"{name:15} {_percent(effect.get('greedy_same'))} {compared}  {changes}".rstrip()


def _comparison(found: dict[str, float] | None) -> str:
    if found is None:
        return f"{'-':>9} {'-':>7} {'-':>10}"
    change = f"{100 * found['perplexity_change']:+.2f}%"
    return f"{found['kl_nats']:>9.5f} {_percent(found['top1_same'])} {change:>10}"


def _percent(share: float | None) -> str:
    return f"{'':>7}" if share is None else f"{100 * share:>6.1f}%"
