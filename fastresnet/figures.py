"""Matplotlib, without the settings in the working folder.

That may be a folder of somebody else's data. A `matplotlibrc` there, which Matplotlib prefers to the user's own, can
start a program (LaTeX) and take any memory.
"""

from __future__ import annotations

import os


def _import_matplotlib() -> None:
    exists = os.path.exists
    os.path.exists = lambda path: path != "matplotlibrc" and exists(path)  # as Matplotlib asks for it, once
    try:
        import matplotlib  # noqa: F401
    finally:
        os.path.exists = exists


_import_matplotlib()

from matplotlib.axes import Axes as Axes  # noqa: E402
from matplotlib.cm import ScalarMappable as ScalarMappable  # noqa: E402
from matplotlib.colors import Normalize as Normalize  # noqa: E402
from matplotlib.figure import Figure as Figure  # noqa: E402
from matplotlib.font_manager import FontProperties as FontProperties  # noqa: E402
from matplotlib.font_manager import findfont as findfont  # noqa: E402
from matplotlib.font_manager import fontManager as fontManager  # noqa: E402
from matplotlib.font_manager import get_font as get_font  # noqa: E402
from matplotlib.text import Text as Text  # noqa: E402
from matplotlib.ticker import MaxNLocator as MaxNLocator  # noqa: E402
from matplotlib.ticker import NullFormatter as NullFormatter  # noqa: E402
