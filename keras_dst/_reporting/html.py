"""A sparsity report as a page: one file, with everything in it."""

from __future__ import annotations

import base64
import io

import numpy as np

from keras_dst._reporting.tables import count, percent
from keras_dst.version import __version__

_COLOUR = "#4a86f0"  # of what is kept; its opacity is the density, so that any background serves
_POWER = 0.5  # of the density, so that what little is kept can be seen
_SCALE = (0, 0.01, 0.1, 0.25, 0.5, 1)


def page(report) -> str:
    """The page of a `keras_dst.report`; see `SparsityReport.to_html`."""
    try:
        import matplotlib.image  # noqa: F401
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ImportError(
            "The HTML report needs jinja2 and matplotlib: pip install keras_dst[plot]"
        ) from error
    templates = Environment(
        loader=PackageLoader("keras_dst._reporting", ""), autoescape=True, trim_blocks=True
    )
    return templates.get_template("report.html").render(
        report=report,
        version=__version__,
        summary=_summary(report),
        percent=percent,
        count=count,
        shape=_shape,
        picture=_picture,
        scale=[(f"{100 * density:g} %", _shade(density)) for density in _SCALE],
    )


def _summary(report) -> list[tuple[str, str, str]]:
    """The figures at the top: name, figure, note."""
    found = [
        ("sparsity", percent(report.sparsity), "of the prunable weights"),
        ("sparsity in total", percent(report.total_sparsity), "of all weights"),
        ("nonzeros", count(report.nonzeros), f"of {count(report.parameters)} parameters"),
        ("bytes", count(report.bytes), "if all are stored"),
    ]
    if report.flops is not None:
        note = f"of {count(report.dense_flops)} for a sample"
        found.append(("FLOPs", count(report.flops), note))
    return found


def _shape(row) -> str:
    return " × ".join(str(n) for n in row.shape)


def _shade(density: float) -> str:
    return f"{_COLOUR}{round(255 * density**_POWER):02x}"


def _picture(cells: np.ndarray) -> str:
    """A matrix of densities as the data URI of a PNG, a pixel a cell."""
    from matplotlib.colors import to_rgba
    from matplotlib.image import imsave

    pixels = np.empty((*cells.shape, 4), "float32")
    pixels[...] = to_rgba(_COLOUR)
    pixels[..., 3] = cells**_POWER
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
