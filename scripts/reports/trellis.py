"""Drawing of a trellis and of the inputs that one output sees, as the text of an SVG file."""

import math
from collections.abc import Sequence

from trellisnet.ops.pruning import dependencies

STEP, FLOOR, RADIUS = 46, 62, 8  # pixels between time steps and between layers, and of a unit
# Middle tones, which stand out from white and from black.
PAST, NOW, INPUT, TEXT = "#d9662b", "#3f86d6", "#2f9e6e", "#7b8794"
STYLE = f"""<style>
text {{ font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: {TEXT}; }}
.head {{ font-size: 15px; font-weight: 600; }}
.sub {{ font-size: 10px; }}
.past, .now, .input {{ stroke-width: 2; fill: none; }}
.past {{ stroke: {PAST}; }} .now {{ stroke: {NOW}; }} .input {{ stroke: {INPUT}; }}
.unit {{ fill: {NOW}; }} .x {{ fill: {INPUT}; }} .unseen {{ opacity: 0.22; }}
.brace {{ stroke: {TEXT}; stroke-width: 1.5; fill: none; }}
</style>"""


def _panel(
    title: str, left: int, top: int, steps: int, layers: int, kernel_size: int, dilation: list[int]
) -> list[str]:
    """Draw a trellis with everything that the last output of the last layer depends on highlighted."""
    seen = dict(enumerate(map(set, dependencies(steps, layers, dilation, kernel_size)), 1))
    reach = [dilation[(i - 1) % len(dilation)] for i in range(1, layers + 1)]
    taps = [(layer, t, j * reach[layer - 1]) for layer in seen for t in range(steps) for j in range(kernel_size)]
    taps = [(layer, t, back) for layer, t, back in taps if t >= back]
    seen[0] = {t - back for layer, t, back in taps if t in seen[layer]}  # every layer reads x

    def at(layer: int, t: int) -> tuple[int, int]:
        return left + t * STEP, top + (layers - layer) * FLOOR

    lines = [f'<text class="head" x="{left - RADIUS}" y="{top - 34}">{title}</text>']
    for layer, t, back in sorted(taps, key=lambda tap: tap[1] in seen[tap[0]]):  # highlighted lines last, on top
        (x1, y1), (x2, y2) = at(layer - 1, t - back), at(layer, t)
        length = math.hypot(x2 - x1, y2 - y1)
        dx, dy = (x2 - x1) / length * (RADIUS + 2), (y2 - y1) / length * (RADIUS + 2)
        kind = "input" if layer == 1 else "past" if back else "now"
        faint = "" if t in seen[layer] else " unseen"
        ends = (x1 + dx, y1 + dy, x2 - dx, y2 - dy)
        lines.append('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(kind + faint, *ends))
    for layer in range(layers + 1):
        for t in range(steps):
            x, y = at(layer, t)
            faint = "" if t in seen[layer] else " unseen"
            if layer > 1:  # x̃ comes in here too
                lines.append(f'<path class="input{faint}" d="M{x + 17},{y + 13} L{x + 7},{y + 6}"/>')
            if layer:
                lines.append(f'<circle class="unit{faint}" cx="{x}" cy="{y}" r="{RADIUS}"/>')
            else:
                corner = f'x="{x - RADIUS}" y="{y - RADIUS}" width="{2 * RADIUS}" height="{2 * RADIUS}" rx="2"'
                lines.append(f'<rect class="x{faint}" {corner}/>')
    x, y = at(layers, steps - 1)
    lines.append(f'<text x="{x}" y="{y - 15}" text-anchor="middle">y<tspan class="sub" dy="4">t</tspan></text>')
    for layer in range(1, layers + 1):
        lines.append(f'<text x="{left - 28}" y="{at(layer, 0)[1] + 5}" text-anchor="end">layer {layer}</text>')
    x, y = at(0, 0)
    lines.append(f'<text x="{x - 28}" y="{y + 5}" text-anchor="end">input x</text>')
    for t in range(steps):
        x, _ = at(0, t)
        when = f"t−{steps - 1 - t}" if t < steps - 1 else "t"
        lines.append(f'<text x="{x}" y="{y + 27}" text-anchor="middle" class="sub">{when}</text>')
    first, last = min(seen[0]), max(seen[0])
    (x1, _), (x2, _) = at(0, first), at(0, last)
    lines.append(f'<path class="brace" d="M{x1 - 9},{y + 36} v7 H{x2 + 9} v-7"/>')
    text = f"y sees {last - first + 1} inputs: 1 + {kernel_size - 1} · ({' + '.join(map(str, reach))})"
    lines.append(f'<text x="{(x1 + x2) / 2:g}" y="{y + 62}" text-anchor="middle">{text}</text>')
    return lines


def trellis(
    layers: int = 4, kernel_size: int = 2, dilations: Sequence[list[int]] = ([1], [1, 2]), steps: int = 8
) -> str:
    """Draw trellises side by side; the text is the same on every machine."""
    top, left, lines = 62, 84, []
    for dilation in dilations:
        shown = (
            f"dilation {dilation[0]}" if len(dilation) == 1 else f"dilations {', '.join(map(str, dilation))} in turn"
        )
        lines += _panel(shown, left, top, steps, layers, kernel_size, dilation)
        left += steps * STEP + 94
    width, bottom = left - 94, top + layers * FLOOR + 100
    legend = [("now", "Wʰ, newest tap"), ("past", "Wʰ, older tap (both the same in every layer)")]
    legend += [("input", "x̃ = Wˣ ∗ x + b, into every layer")]
    x = 84 - RADIUS
    for kind, text in legend:
        lines.append(f'<line class="{kind}" x1="{x}" y1="{bottom - 5}" x2="{x + 24}" y2="{bottom - 5}"/>')
        lines.append(f'<text x="{x + 32}" y="{bottom}">{text}</text>')
        x += 60 + round(7.2 * len(text))
    size = f'width="{width}" height="{bottom + 18}" viewBox="0 0 {width} {bottom + 18}"'
    title = "A trellis network: units by layer and time step, and the inputs that one output sees."
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', f"<title>{title}</title>", STYLE]
    return "\n".join([*head, *lines, "</svg>"]) + "\n"
