"""Curves of metrics, and bars of where time went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from cutlayer.report.palette import SERIES
from cutlayer.report.record import Record
from cutlayer.report.scene import Box, Dot, Group, Label, Line, Scene, Shape, fit, fit_name, width
from cutlayer.report.tally import KINDS, Cost, Series, costs, series
from cutlayer.report.words import duration, number

__all__ = ["curves", "grid", "named", "panels", "ticks", "time_bars", "title_of"]

_TEXT, _TITLE = 10.0, 13.0
_PANEL = (470.0, 270.0)
_PLOT = (56.0, 400.0)  # left edge and width of the axes in a panel
_BARS = (140.0, 690.0)
_ROW = 34.0
_ALL = "all together"  # the name of what is of all samples, beside what is of a replica's own


def panels(record: Record) -> list[list[Series]]:
    """Return the series of each metric of each loss. Lists of numbers (per class) are left to the CSV file."""
    wanted = [line for line in series(record) if not line.listed]
    return [list(lines) for _, lines in groupby(wanted, key=lambda line: (line.loss, line.metric))]


def curves(record: Record) -> list[Scene]:
    """Return a drawing for each of `panels`."""
    return [_panel(lines) for lines in panels(record)]


def ticks(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """Return round numbers from `low` to `high`, both within: steps of 1, 2 or 5 times a power of ten."""
    power = math.floor(math.log10(max(high - low, 1e-300) / most))
    power = max(0, power) if whole else power
    while True:
        for factor in (1, 2, 5):
            step = factor * 10.0**power
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            if last - first < most:
                return [round(place * step, 12 - min(0, power)) for place in range(first, last + 1)]
        power += 1


def time_bars(record: Record) -> Scene:
    """Return a bar for each party: its seconds by kind of work."""
    rows = costs(record)
    kinds = [kind for kind in (*KINDS.values(), "other") if any(row.seconds[kind] >= 5e-4 for row in rows)]
    longest = max((sum(row.seconds.values()) for row in rows), default=0.0) or 1.0
    legend, top = _legend([(kind, f"fill-{_colour(kind)}") for kind in kinds], 0.0, _BARS[0] + _BARS[1])
    items: list[Shape] = [*legend]
    bottom = top + 8.0 + _ROW * len(rows)
    unit, word = (1.0, "s") if longest < 180.0 else (60.0, "min") if longest < 10800.0 else (3600.0, "h")
    for tick in ticks(0.0, longest / unit):
        x = _BARS[0] + _BARS[1] * tick * unit / longest
        items.append(Line(((x, top + 4.0), (x, bottom)), "rule"))
        items.append(Label(x, bottom + 14.0, f"{tick:g} {word}", "soft", _TEXT, "middle"))
    for place, row in enumerate(rows):
        items += _bar(row, kinds, top + 8.0 + _ROW * place, longest)
    items.append(Line(((_BARS[0], top + 4.0), (_BARS[0], bottom)), "axis"))
    told = [", ".join(f"{kind} {duration(row.seconds[kind])}" for kind in kinds) or "next to nothing" for row in rows]
    about = [f"{row.party}: {text}" for row, text in zip(rows, told, strict=True)]
    title = "Time of each party by kind of work"
    return Scene(_BARS[0] + _BARS[1] + 70.0, bottom + 22.0, tuple(items), title, f"{'. '.join(about)}.")


def grid(scenes: Sequence[Scene], title: str, columns: int = 2) -> Scene:
    """Return several drawings as one."""
    items: list[Shape] = []
    y, most = 0.0, 0.0
    for start in range(0, len(scenes), columns):
        row, x = scenes[start : start + columns], 0.0
        for scene in row:
            items.append(Group(x, y, scene.items))
            x += scene.width
        y, most = y + max(scene.height for scene in row), max(most, x)
    return Scene(most or 1.0, y or 1.0, tuple(items), title)


def _panel(lines: Sequence[Series]) -> Scene:
    title = title_of(lines[0])
    names, kinds = named(lines), _line_kinds(lines)
    legend, top = _legend(_legend_texts(lines, names, kinds), 32.0, _PANEL[0] - 16.0, left=14.0)
    frame = (_PLOT[0], top + 8.0, _PLOT[1], _PANEL[1] - 60.0)
    items: list[Shape] = [
        Label(14.0, 20.0, fit(title, _PANEL[0] - 28.0, _TITLE, bold=True), "ink", _TITLE, bold=True, title=title)
    ]
    items += legend
    rounds = [x for line in lines for x, _ in line.points]
    values = [y for line in lines for _, y in _finite(line)]
    x_range = (min(rounds), max(rounds)) if min(rounds) < max(rounds) else (min(rounds) - 0.5, max(rounds) + 0.5)
    y_range = _padded(values)
    items += _axes(frame, x_range, y_range)
    for line, name, kind in reversed(list(zip(lines, names, kinds, strict=True))):  # what is of all is on top
        items += _curve(line, f"{line.mode} {line.metric}, {name}", kind, frame, x_range, y_range)
    about = ". ".join(_about(line, name) for line, name in zip(lines, names, strict=True))
    return Scene(_PANEL[0], frame[1] + frame[3] + 40.0, tuple(items), f"{title} by round", f"{about}.")


def _line_kinds(lines: Sequence[Series]) -> list[str]:
    """Colour by replica, dashes for evaluation; one replica alone has a colour for each mode.

    Where lines are of a replica's own samples, they are thin, and those of all samples bold.
    """
    own = list(dict.fromkeys(line.who for line in lines if line.own))
    if own:
        return [
            f"thin{'dash' * (line.mode == 'evaluate')}-c{1 + min(own.index(line.who), SERIES)}"
            if line.own
            else f"{'dash' if line.mode == 'evaluate' else 'line'}-all"
            for line in lines
        ]
    whose = list(dict.fromkeys(line.who for line in lines))
    if len(whose) == 1:
        return [{"train": "line-c1", "evaluate": "dash-c2"}.get(line.mode, "line-c3") for line in lines]
    return [f"{'dash' if line.mode == 'evaluate' else 'line'}-c{1 + whose.index(line.who) % SERIES}" for line in lines]


def title_of(line: Series) -> str:
    """Return "accuracy", or "accuracy of LOSS" if that says more."""
    return line.metric if line.loss == "loss" else f"{line.metric} of {line.loss}"


def named(lines: Sequence[Series]) -> list[str]:
    """Return whose values the lines of one panel show."""
    apart = any(line.own for line in lines) and len({line.who for line in lines if not line.own}) <= 1
    return [_ALL if apart and not line.own else _who(line) for line in lines]


def _who(line: Series) -> str:
    names = line.who
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more, all the same"


def _about(line: Series, name: str) -> str:
    """Return in words how a line goes."""
    (first, begin), (last, end) = line.points[0], line.points[-1]
    values = [value for _, value in _finite(line)] or [math.nan]
    path = f"{number(begin)} in round {first}"
    if last > first:
        path += f", {number(end)} in round {last}, between {number(min(values))} and {number(max(values))}"
    return f"{line.mode}, {name}: {path}"


def _legend_texts(lines: Sequence[Series], names: Sequence[str], kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Return text and kind of each entry; the replicas that have no colour of their own are one.

    A line of one point is drawn as that point, and so it is in the legend.
    """
    alone, found, rest = len({line.who for line in lines}) == 1, list[tuple[str, str]](), dict[str, str]()
    for line, name, own in zip(lines, names, kinds, strict=True):
        kind = own if len(_finite(line)) > 1 else f"dot-{own.rpartition('-')[2]}"
        last = f"{line.mode} {number(line.points[-1][1])}"
        if own.startswith("thin") and own.endswith(f"c{SERIES + 1}"):
            rest[name] = own
        elif len(line.who) > 1 and name != _ALL:
            found.append((f"{last}, the same at {len(line.who)} replicas", kind))
        else:
            found.append((last if alone else f"{last}, {name}", kind))
    more = [(f"{len(rest)} more, each by its own", f"thin-c{SERIES + 1}")] if rest else []
    return [*found, *more]


def _legend(names: Sequence[tuple[str, str]], y: float, most: float, left: float = 0.0) -> tuple[list[Shape], float]:
    """Return the entries of a legend in as many lines as they need, and where it ends."""
    items: list[Shape] = []
    x = left
    for text, kind in names:
        shown = fit(text, most - 60.0, _TEXT)
        taken = width(shown, _TEXT) + 40.0
        if x > left and x + taken > most:
            x, y = left, y + 16.0
        if kind.startswith("fill"):
            items.append(Box(x + 8.0, y + 1.0, 12.0, 11.0, kind, 2.0))
        elif kind.startswith("dot"):
            items.append(Dot(x + 10.0, y + 6.5, 2.6, f"fill-{kind.rpartition('-')[2]}"))
        else:
            items.append(Line(((x, y + 6.5), (x + 20.0, y + 6.5)), kind))
        items.append(Label(x + 25.0, y + 10.0, shown, "ink", _TEXT, title=text))
        x += taken
    return items, y + 16.0


def _finite(line: Series) -> list[tuple[int, float]]:
    return [point for point in line.points if math.isfinite(point[1])]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
    return low - room, high + room


def _axes(
    frame: tuple[float, float, float, float], x_range: tuple[float, float], y_range: tuple[float, float]
) -> list[Shape]:
    left, top, wide, high = frame
    items: list[Shape] = []
    marks = ticks(*y_range)
    digits = max(0, min(6, -math.floor(math.log10(marks[1] - marks[0])))) if len(marks) > 1 else 4
    large = max(abs(mark) for mark in marks) >= 1e5 or (len(marks) > 1 and marks[1] - marks[0] < 1e-6)
    for mark in marks:
        y = top + high * (1 - (mark - y_range[0]) / (y_range[1] - y_range[0]))
        text = f"{mark:.3g}" if large else f"{mark:.{digits}f}"
        items.append(Line(((left, y), (left + wide, y)), "rule"))
        items.append(Label(left - 6.0, y + 3.5, text, "soft", _TEXT, "end"))
    for mark in ticks(*x_range, most=9, whole=True):
        x = left + wide * (mark - x_range[0]) / (x_range[1] - x_range[0])
        items.append(Line(((x, top + high), (x, top + high + 4.0)), "axis"))
        items.append(Label(x, top + high + 16.0, f"{mark:.0f}", "soft", _TEXT, "middle"))
    items.append(Line(((left, top), (left, top + high), (left + wide, top + high)), "axis"))
    items.append(Label(left + wide / 2, top + high + 31.0, "round", "soft", _TEXT, "middle"))
    return items


def _curve(
    line: Series,
    name: str,
    kind: str,
    frame: tuple[float, float, float, float],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> list[Shape]:
    left, top, wide, high = frame
    points = [
        (
            left + wide * (x - x_range[0]) / (x_range[1] - x_range[0]),
            top + high * (1 - (y - y_range[0]) / (y_range[1] - y_range[0])),
        )
        for x, y in _finite(line)
    ]
    colour = kind.rpartition("-")[2]
    items: list[Shape] = [Line(tuple(points), kind, name)] if len(points) > 1 else []
    thin = kind.startswith("thin")
    if len(points) <= 60 and not (thin and colour == f"c{SERIES + 1}" and len(points) > 1):
        items += [
            Dot(x, y, 1.8 if thin else 2.6, f"fill-{colour}", f"{name}\nround {at}: {number(value)}")
            for (x, y), (at, value) in zip(points, _finite(line), strict=True)
        ]
    return items


def _colour(kind: str) -> str:
    return f"c{1 + [*KINDS.values(), 'other'].index(kind)}"


def _bar(row: Cost, kinds: Sequence[str], y: float, longest: float) -> list[Shape]:
    name = fit_name(row.party, _BARS[0] - 12.0, 12.0, bold=True)
    items: list[Shape] = [Label(_BARS[0] - 10.0, y + 18.0, name, "ink", 12.0, "end", bold=True, title=row.party)]
    x, total = _BARS[0], sum(row.seconds.values())
    for kind in kinds:
        wide = _BARS[1] * row.seconds[kind] / longest
        share = row.seconds[kind] / total if total else 0.0
        title = f"{row.party}: {kind} {duration(row.seconds[kind])} ({share:.0%})"
        items.append(Box(x, y + 4.0, wide, _ROW - 14.0, f"fill-{_colour(kind)}", 0.0, title))
        x += wide
    items.append(Label(x + 6.0, y + 18.0, duration(total), "soft", _TEXT))
    return items
