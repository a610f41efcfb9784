"""How numbers become a picture: panels of curves, with axes and legends, by matplotlib.

figures.py says what is drawn, and analysis.py measures it. The colours are those of Okabe and Ito,
which the colour-blind tell apart; each curve has a marker of its own too. Curves of consecutive
layers go from dark to light instead (the colour map cividis).
"""

import io
import warnings
from typing import Any, NamedTuple

from PIL import Image

Curves = dict[str, tuple[list, list]]  # name -> (x, y)

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":")  # of the first seven curves, of the next seven, of those behind them
LIGHTEST = 0.85  # where the curves of consecutive layers end in the colour map; 1 is pale yellow
MOST_MARKED = 30  # points of a curve with markers
DODGE = 0.08  # between the clouds of two curves, in units of the x axis
MOST_TICKS = 16  # positions that all have a tick


class Panel(NamedTuple):
    """One pair of axes and its curves."""

    title: str
    xlabel: str
    ylabel: str
    curves: Curves
    if_empty: str = "nothing to draw"  # what is said where there is no point
    is_ordered: bool = False  # the curves are of consecutive layers
    is_cloud: bool = False  # points without a line
    from_zero: bool = True  # the y axis begins at 0, or below it
    highest: float | None = None  # end of the y axis; None: where the curves end
    references: Curves | None = None  # a dashed curve in the colour of the curve of that name
    reference_label: str = ""  # what the dashed curves are
    span: tuple[float, float] | None = None  # a part of the x axis that is shaded
    span_label: str = ""  # what it is
    has_legend_beside: bool = False  # the legend stands right of the axes, not over the curves


def load_matplotlib() -> Any:
    """The class of matplotlib's figures. Raises ValueError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    return Figure


def legend_label(name: str) -> str:
    """A name as matplotlib shows it: no formula between two $, and not hidden for its first _.

    Of a long one its end; it is one line, and UTF-8.
    """
    label = " ".join(name.split())
    if len(label) > 60:
        label = f"...{label[-57:]}"
    label = label.encode("utf-8", errors="replace").decode()
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def describe_points(panel: Panel) -> str:
    """The few points of a panel in words: what they are, then a line each."""
    lines = []
    for name, (x, y) in panel.curves.items():
        for position, value in zip(x, y, strict=True):
            lines.append(f"{legend_label(name)}: {value:.4g} at {panel.xlabel} = {position}")
    if not lines:
        return panel.if_empty
    return "\n".join([panel.ylabel, *lines])


def curve_style(number: int, count: int, panel: Panel) -> dict[str, Any]:
    """How curve `number` of `count` curves looks: matplotlib's settings."""
    style: dict[str, Any] = {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // len(COLORS) % len(LINES)],
        "markersize": 4,
    }
    if panel.is_ordered:
        from matplotlib import colormaps

        style["color"] = colormaps["cividis"](LIGHTEST * number / max(count - 1, 1))
        style["linestyle"] = "-"
    if panel.is_cloud:
        style["linestyle"] = "none"
        style["alpha"] = 0.6
    return style


def draw_curves(axes: Any, panel: Panel) -> None:
    """The curves, what they are compared with, and the ticks."""
    positions = set()
    filled = [name for name, (x, _) in panel.curves.items() if x]
    for number, name in enumerate(filled):
        x, y = panel.curves[name]
        style = curve_style(number, len(filled), panel)
        if len(x) >= MOST_MARKED and not panel.is_cloud:
            style["marker"] = None
        places = x
        if panel.is_cloud:  # beside one another, as they would hide one another
            shift = DODGE * (number - (len(filled) - 1) / 2)
            places = [place + shift for place in x]
        axes.plot(places, y, label=legend_label(name), **style)
        positions.update(x)
        if panel.references and name in panel.references:
            axes.plot(*panel.references[name], color=style["color"], linestyle="--", linewidth=1)
    explain_background(axes, panel)
    if panel.xlabel == "step" or len(positions) > MOST_TICKS:
        axes.locator_params(axis="x", integer=True)
    else:
        axes.set_xticks(sorted(positions))  # every layer has a tick


def explain_background(axes: Any, panel: Panel) -> None:
    """The shaded part of the x axis, and the legend's lines on it and on the dashed curves."""
    if panel.references:  # one line for all of them
        axes.plot([], [], color="gray", linestyle="--", linewidth=1, label=panel.reference_label)
    if panel.span:
        axes.axvspan(*panel.span, color="gray", alpha=0.15, linewidth=0, label=panel.span_label)


def draw_panel(axes: Any, panel: Panel) -> None:
    """Draw the curves; where none has two points, axes would be empty: say what there is."""
    axes.set(title=panel.title)
    if all(len(x) < 2 for x, _ in panel.curves.values()):
        axes.set_axis_off()
        middle = 0.5
        axes.text(middle, middle, describe_points(panel), ha="center", va="center")
        return

    draw_curves(axes, panel)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    low, high = axes.get_ylim()
    if panel.from_zero:
        low = min(0.0, low)
        high = max(0.0, high)
    if panel.highest is not None:
        high = panel.highest
    axes.set_ylim(low, high + 0.05 * (high - max(low, 0.0)))
    axes.grid(alpha=0.3)
    if panel.has_legend_beside:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.legend(fontsize="small")


def share_heights(row_of_axes: Any) -> None:
    """Give panels that stand side by side one y axis, so that they can be compared."""
    drawn = [axes for axes in row_of_axes if axes.axison]
    limits = [axes.get_ylim() for axes in drawn]
    for axes in drawn:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def draw_panels(panels: list[Panel], columns: int = 2, is_shared: bool = False) -> Image.Image:
    """Panels in full rows of `columns`. is_shared: those of a row have one y axis."""
    figure_class = load_matplotlib()
    num_rows = len(panels) // columns
    size = (5.5 * columns, 4.2 * num_rows)
    figure = figure_class(figsize=size, dpi=150, layout="constrained")
    grid_of_axes = figure.subplots(num_rows, columns, squeeze=False)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks, and of narrow axes
        for axes, panel in zip(grid_of_axes.flat, panels, strict=True):
            draw_panel(axes, panel)
        if is_shared:
            for row_of_axes in grid_of_axes:
                share_heights(row_of_axes)
        figure.savefig(file, format="png")
    return Image.open(file)
