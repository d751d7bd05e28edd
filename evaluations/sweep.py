"""Tables and plots of the metrics as a function of the guidance scale, as in the paper's figures 4 and 5."""

import csv
import io

from .features import METRICS
from .output import write_output

SWEPT = ("fid", "is", "precision", "recall")


def write_table(path, rows, features=""):
    """Write a CSV file with one row per guidance scale.

    :param rows: dicts whose first entry is the guidance scale, and whose other entries are the metrics in SWEPT.
    :param features: the name of the feature network if it is not Inception; appended to the names of the columns.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([_swept(rows), *(f"{METRICS[name]}{_note(features)}" for name in SWEPT)])
    table.writerows([row[_swept(rows)], *(row[name] for name in SWEPT)] for row in rows)
    with write_output(path) as f:
        f.write(text.getvalue().encode())


def format_table(rows, features=""):
    """Return the metrics as a text table with one row per guidance scale."""
    lines = ["scale" + "".join(f"{METRICS[name]:>17}" for name in SWEPT)]
    lines += [f"{row[_swept(rows)]:>5g}" + "".join(f"{row[name]:>17.4g}" for name in SWEPT) for row in rows]
    return "\n".join(lines + ([f"Figures{_note(features)}: compare them only with each other."] * bool(features)))


def draw(path, rows, features=""):
    """Plot each metric over the guidance scale, and precision over recall, as a PNG file. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.6), layout="constrained")
    swept = _swept(rows).replace("_", " ")
    figure.suptitle(f"Guidance{_note(features)}{': compare values only within this figure' if features else ''}")
    fid, score, both, trade_off = figure.subplots(1, 4)
    scales = [row[_swept(rows)] for row in rows]
    for axes, names in ((fid, ["fid"]), (score, ["is"]), (both, ["precision", "recall"])):
        for name in names:
            axes.plot(scales, [row[name] for row in rows], marker="o", label=METRICS[name])
        axes.set(xlabel=swept, title=" and ".join(METRICS[name] for name in names))
    both.legend()
    trade_off.plot([row["recall"] for row in rows], [row["precision"] for row in rows], marker="o")
    for scale, row in zip(scales, rows):
        trade_off.annotate(f"{scale:g}", (row["recall"], row["precision"]), (4, 4), textcoords="offset points")
    trade_off.margins(0.12)
    trade_off.set(xlabel="Recall", ylabel="Precision", title="Precision against recall, by scale")
    with write_output(path) as f:
        figure.savefig(f, format="png", dpi=100)


def _swept(rows):
    """Return the name of the flag that was varied: classifier_scale or guide_scale."""
    return next(iter(rows[0]))


def _note(features):
    return f" in features of {features}" if features else ""
