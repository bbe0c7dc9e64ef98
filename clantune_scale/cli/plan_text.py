"""A plan in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_PARTS = ("weights", "gradients", "masters", "moments", "average", "line", "device", "round_end", "host")
_PART_NAMES = {
    "line": "arrays of the line",
    "device": "= on the device",
    "round_end": "at a round's end",
    "host": "copies on the host",
}
_FORM_NAMES = {"groups": "groups", "line": "line", "plain": "plain", "hsdp": "HSDP"}


def describe(data: dict[str, Any]) -> str:
    """The plan's data as a page of text."""
    lines = [data["ranks"], data["batch"], f"{data['parameters']:,} trainable parameters, ZeRO {data['zero_stage']}"]
    lines += ["", *_forms(data), *_price(data), "", *_traffic(data), "", *_cost(data)]
    if "budget" in data:
        lines += ["", *_budget(data["budget"])]
    return "\n".join([*lines, *(f"warning: {text}" for text in data["warnings"])])


def amount(number: float) -> str:
    """Bytes with a unit, in powers of 1,000, as vendors count."""
    size, unit = float(number), 0
    while abs(size) >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 else f"{size:.3g} {_UNITS[unit]}"


def _forms(data: dict[str, Any]) -> Iterator[str]:
    """The table of the four forms, the chosen one in brackets."""
    forms = data["forms"]
    heads = {name: f"[{text}]" if name == data["form"] else text for name, text in _FORM_NAMES.items()}
    yield f"{'memory of a rank':<22}" + "".join(f"{heads[name]:>10}" for name in forms)
    for part in _PARTS:
        cells = ["-" if form["memory"] is None else amount(form["memory"][part]) for form in forms.values()]
        yield f"  {_PART_NAMES.get(part, part):<20}" + "".join(f"{cell:>10}" for cell in cells)
    if any(form["fits"] is not None for form in forms.values()):
        cells = ["-" if form["fits"] is None else "yes" if form["fits"] else "no" for form in forms.values()]
        yield f"  {'fits a device':<20}" + "".join(f"{cell:>10}" for cell in cells)
    if any(form["seconds"] is not None for form in forms.values()):
        cells = ["-" if form["seconds"] is None else f"{form['seconds']:,.1f}" for form in forms.values()]
        yield f"{'seconds of the run':<22}" + "".join(f"{cell:>10}" for cell in cells)
    for name, form in forms.items():
        if form["obstacle"] is not None:
            yield f"  no {_FORM_NAMES[name]}: {form['obstacle']}"


def _price(data: dict[str, Any]) -> Iterator[str]:
    memory = data["memory"]
    clan, plain = memory["clan"], memory["plain"]
    more = clan["device"] - plain["device"]
    state = "State is sharded over all ranks, as without a clan"
    if data["zero_stage"] == 0:
        state = "State is whole on each device, as without a clan"
    elif data["form"] == "groups":
        state = "State is sharded over a member's ranks and not over all ranks"
    yield f"  {state}: {amount(more)} more on each device ({100 * more / plain['device']:.0f} %)."
    yield "  Activations and buffers are extra; a clan does not change them."
    if data["form"] == "line" and clan["centre"]:
        held = amount(clan["round_end_in_loop"])
        yield f"  A loop of your own (DDP, FSDP2) holds its gradients at a round's end: {held} on each device then."
    limit = memory["device_limit"]
    if limit is not None and clan["peak"] > limit:
        # The centre's copy lies on the device only if the other arrays of a round do.
        first = "fewer members" if data["form"] == "groups" else '"line": {"store": "host"}' if clan["centre"] else ""
        advice = ", ".join(filter(None, (first, "a higher ZeRO stage or more ranks")))
        yield f"  It does not fit: a device has {amount(limit)}. Use {advice}."


def _traffic(data: dict[str, Any]) -> Iterator[str]:
    is_line = data["form"] == "line"
    whose = "bytes of all ranks" if is_line else "bytes of a member"
    yield f"{whose:<26}" + (f"{'sent':>12}" if is_line else f"{'inside it':>12}{'out of it':>12}")
    for name, part in data["traffic"].items():
        if is_line and name in ("last_cooperative_step", "clone"):
            continue  # nothing compares members' gradients, and nothing is cloned
        inside, crossing = amount(part["inside_bytes"]), amount(part["crossing_bytes"])
        yield f"  {name.replace('_', ' '):<24}{inside:>12}" + ("" if is_line else f"{crossing:>12}")


def _cost(data: dict[str, Any]) -> Iterator[str]:
    cost = data["cost"]
    yield (
        f"{cost['num_steps']:,} steps in {cost['num_rounds']:,} rounds, {cost['competitive_steps']:,} competitive, "
        f"{cost['undone_steps']:,} rolled back"
    )
    tokens = data["unique_tokens_lost"]
    of_tokens = f" ({tokens:,} tokens)" if tokens is not None else ""
    lost = cost["samples"] - cost["unique_samples"]
    share = f"{cost['sample_loss_percent']:.2f} %"
    yield f"samples repeated or rolled back: {lost:,} of {cost['samples']:,}, {share}{of_tokens}"
    yield (
        f"gradient work with evaluations: {cost['work_percent']:+.2f} % against plain data parallelism "
        f"({cost['trained_samples']:,} samples trained on, {cost['evaluated_samples']:,} evaluated)"
    )
    if cost["seconds"] is None:
        yield "no seconds: give --hardware with --tokens-per-sample, or --measured RUN"
        return
    parts = ", ".join(f"{part} {seconds:,.1f}" for part, seconds in cost["seconds"].items())
    yield f"seconds: {parts}; plain data parallelism {cost['plain_seconds']:,.1f}"
    yield f"overhead: {cost['time_percent']:.2f} % more time for the same steps, {_overhead(cost)} per new sample"
    yield f"seconds are from {_source(data)}"


def _overhead(cost: dict[str, Any]) -> str:
    return "unbounded" if cost["overhead_percent"] is None else f"{cost['overhead_percent']:.2f} %"


def _source(data: dict[str, Any]) -> str:
    if data["measured"]:
        return f"{data['measured']['num_rounds']} rounds of a measured run"
    hardware = data["hardware"]
    return (
        f"{hardware['source']}; assumed: {hardware['compute_share']:.0%} of the compute and "
        f"{hardware['link_share']:.0%} of the links are reached"
    )


def _budget(budget: dict[str, Any]) -> Iterator[str]:
    if not budget["fits"]:
        yield f"nothing fits {budget['percent']:g} %: lengthen round_length, or lower fitness.num_samples"
        return
    yield f"settings within {budget['percent']:g} %:"
    yield f"  {'population_size':>15}{'duty_cycle':>12}{'overhead':>10}{'a device':>10}"
    for row in budget["fits"]:
        yield (
            f"  {row['population_size']:>15}{row['duty_cycle']:>12g}{row['overhead_percent']:>8.2f} %"
            f"{amount(row['device_bytes']):>10}"
        )
