"""Rendering of the sparsity report as one self-contained HTML page."""

from __future__ import annotations

import base64
import io

import numpy as np

from keras_dst._reporting.tables import format_count, format_percent
from keras_dst.version import __version__

# Color of the cells in a density map. The opacity of the color shows the density, so that the map
# is readable on light and dark backgrounds.
_COLOR = "#4a86f0"
_GAMMA = 0.5  # The opacity of a cell is density ** gamma, so that low densities stay visible.
_LEGEND = (0, 0.01, 0.1, 0.25, 0.5, 1)


def render_page(report) -> str:
    """Render a sparsity report as an HTML page; see `SparsityReport.to_html`."""
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
        percent=format_percent,
        count=format_count,
        shape=_shape,
        image=_image,
        legend=[(f"{100 * density:g} %", _color_of(density)) for density in _LEGEND],
    )


def _summary(report) -> list[tuple[str, str, str]]:
    """Return the key figures at the top of the page, as (name, number, note) tuples."""
    parameters = f"of {format_count(report.parameters)} parameters"
    figures = [
        ("sparsity", format_percent(report.sparsity), "of the prunable weights"),
        ("total sparsity", format_percent(report.total_sparsity), "of all weights"),
        ("nonzeros", format_count(report.nonzeros), parameters),
        ("bytes", format_count(report.bytes), "if zeros are stored"),
    ]
    if report.flops is not None:
        note = f"of {format_count(report.dense_flops)} per sample"
        figures.append(("FLOPs", format_count(report.flops), note))
    return figures


def _shape(row) -> str:
    return " × ".join(str(n) for n in row.shape)


def _color_of(density: float) -> str:
    return f"{_COLOR}{round(255 * density**_GAMMA):02x}"


def _image(density_map: np.ndarray) -> str:
    """Return the data URI of a PNG image with one pixel per cell of a density map."""
    from matplotlib.colors import to_rgba
    from matplotlib.image import imsave

    pixels = np.empty((*density_map.shape, 4), "float32")
    pixels[...] = to_rgba(_COLOR)
    pixels[..., 3] = density_map**_GAMMA
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
