"""The README's picture: perplexity of a real model by budget, drawn from the committed table.

    python -m tools.readme_figure            # or: make numbers

Reads results/tables/smollm2_h200.md and writes docs/figures/smollm2.svg. tests/test_site.py fails where the picture is another.
"""

from __future__ import annotations

from html import escape

from tools.insert_numbers import ROOT, lines_of, number, short_name

FIGURE = ROOT / "docs" / "figures" / "smollm2.svg"
PRUNER, SPARSITY = "wanda", "0.6"
PPL = "wikitext2/ppl"
WIDTH, ROW, LEFT, RIGHT, TOP = 640, 26, 220, 70, 34
INK, BAR, REFERENCE = "#24292f", "#2f6f9f", "#9aa4ad"  # on a white ground, so that it reads on dark pages too


SHOWN = {  # of the table's budgets, by the names that its options leave
    "uniform": "uniform",
    "owl": "owl",
    "atp": "atp",
    "dlp": "dlp",
    "shapley (slidingwindow w=3)": "shapley, windows of 3",
    "alphapruning": "alpha_pruning",
    "curves": "curves",
    "shapley (slidingwindow w=1)": "leave_one_out",
    "blockinfluence": "block_influence",
    "searchlinears (generations=50)": "search, per linear layer",
    "shapleymargins": "shapley_margins, per block",
    "marginsandinfluence": "margins_and_influence, per block",
    "shapleymarginslinears": "shapley_margins",
    "marginsandinfluencelinears": "margins_and_influence",
}


def bars() -> list[tuple[str, float, str]]:
    """(name, perplexity, colour) of the dense model, of the uniform budget, and of the others from high to low."""
    cell = (PRUNER, SPARSITY, "0")
    lines = [line for line in lines_of("smollm2_h200.md") if (line["pruner"], line["sparsity"], line["seed"]) == cell]
    found = {short_name(line["allocator"]): number(line[PPL]) for line in lines}
    shown = [(name, found[budget], REFERENCE if budget == "uniform" else BAR) for budget, name in SHOWN.items()]
    shown.sort(key=lambda bar: (bar[0] != "uniform", -bar[1]))
    return [("dense", number(lines[0][f"{PPL} dense"]), REFERENCE), *shown]


def drawn(found: list[tuple[str, float, str]]) -> str:
    """The bars as SVG."""
    height, scale = TOP + ROW * len(found) + 8, (WIDTH - LEFT - RIGHT) / max(value for _, value, _ in found)
    title = f"SmolLM2-135M, {100 * float(SPARSITY):.0f} % pruned by Wanda: WikiText-2 perplexity by budget"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>',
        f'<text x="10" y="21" fill="{INK}" font-weight="600">{escape(title)}</text>',
    ]
    for index, (name, value, colour) in enumerate(found):
        y = TOP + ROW * index
        out += [
            f'<text x="{LEFT - 8}" y="{y + 17}" fill="{INK}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y + 4}" width="{scale * value:.1f}" height="{ROW - 8}" rx="2" fill="{colour}"/>',
            f'<text x="{LEFT + scale * value + 6:.1f}" y="{y + 17}" fill="{INK}">{value:.1f}</text>',
        ]
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    FIGURE.write_text(drawn(bars()), encoding="utf-8")


if __name__ == "__main__":
    main()
