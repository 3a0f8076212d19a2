"""The settings in a run's report: versions, machine, time, memory, keys, configuration."""

from __future__ import annotations

from html import escape
from typing import Any

from riskmap_ext.finetune.report import page
from riskmap_ext.finetune.report.read import RunFiles

_VERSIONS = ("riskmap_ext", "torch", "monai", "python")


def settings_section(run: RunFiles) -> str:
    parts = [_environment(run.starts)]
    if run.log is None:
        parts.append(page.note("There is no log.txt."))
    elif run.warnings:
        listed = "".join(f"<li>{escape(text)}</li>" for text in run.warnings)
        parts.append(f"<h3>Warnings</h3><ul class='warnings'>{listed}</ul>")
    else:
        parts.append(page.note("No warnings in log.txt."))
    parts.append(_keys(run))
    parts.append(_folded("Configuration", f"<pre tabindex='0'>{escape(run.config_text)}</pre>"))
    return "\n".join(parts)


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _keys(run: RunFiles) -> str:
    if run.keys is None:
        source = None if run.config is None else run.config.source
        if run.config is None or (source is not None and source.initialize):
            return page.note("There is no keys.json.")
        return page.note("No weights were taken from a source.")
    counts = ", ".join(f"{len(keys)} {kind}" for kind, keys in run.keys.items() if keys)
    body = "".join(
        f"<h3>{escape(kind)} ({len(keys)})</h3><pre tabindex='0'>{escape(chr(10).join(keys))}</pre>"
        for kind, keys in run.keys.items()
        if keys
    )
    return _folded(f"Weights from the source: {counts}", body)


def _environment(starts: list[dict[str, Any]]) -> str:
    if not starts:
        return page.note("There is no environment.json: the versions of this run are not known.")
    last = starts[-1]

    def said(key: str) -> str:
        value = last.get(key)
        return "not recorded" if value is None else f"{value}"

    cases, seconds = last.get("cases"), last.get("seconds")
    facts = [("begun", said("begun")), ("ended", said("ended"))]
    if len(starts) > 1:
        facts.append(("starts", f"{len(starts)} (resumed); what follows is of the last"))
    if isinstance(cases, dict):
        facts.append(("cases", ", ".join(f"{count} {kind}" for kind, count in cases.items())))
    facts += [
        ("time", page.duration(seconds) if isinstance(seconds, float) else "not recorded"),
        ("peak memory", _memory(last.get("peak_memory_bytes"))),
    ]
    if last.get("gpu"):
        gpu = f"{last['gpu']} (CUDA {last.get('cuda')})"
        facts += [("GPU", gpu), ("peak GPU memory", _memory(last.get("peak_gpu_memory_bytes")))]
    facts += [
        ("device", said("device")),
        ("CPU", f"{said('cpu')}, {said('cpus')} CPUs, {said('threads')} threads"),
        ("system", said("system")),
        ("versions", ", ".join(f"{name} {said(name)}" for name in _VERSIONS)),
    ]
    for start in starts[:-1]:
        other = [f"{n} {start.get(n)}" for n in _VERSIONS if start.get(n) != last.get(n)]
        if other:
            facts.append((f"begun {start.get('begun')} with", ", ".join(other)))
    return page.facts(facts)


def _memory(size: Any) -> str:
    return f"{size / 2**20:,.0f} MiB" if isinstance(size, (int, float)) else "not recorded"
