"""PNG files that heedful draws: never overwrite another file."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

from heedful.data.writing import write_whole
from heedful.train.errors import require

SOFTWARE = "heedful"
"""Value of the key Software in a PNG."""


def require_ours(path: Path) -> None:
    """Raise TrainError for a path that is not writable, or is a file that heedful did not draw."""
    from PIL import Image, UnidentifiedImageError

    require(path.suffix == ".png", f"--output {path} must end with .png")
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    require(os.access(folder, os.W_OK), f"{folder} cannot be written: give another --output")
    if not path.exists():
        return
    try:
        with Image.open(path) as image:
            is_ours = image.info.get("Software") == SOFTWARE
    except (OSError, UnidentifiedImageError):
        is_ours = False
    require(
        is_ours, f"--output {path} exists and is not a picture of heedful: give another --output"
    )


def to_png(figure: Any, title: str, **options: Any) -> bytes:
    """Return a matplotlib figure as a PNG that `require_ours` knows.

    options: arguments of `Figure.savefig`, such as dpi.
    """
    png = BytesIO()
    metadata = {"Software": SOFTWARE, "Title": title}
    figure.savefig(png, format="png", metadata=metadata, **options)
    return png.getvalue()


def save(figure: Any, path: Path, title: str, **options: Any) -> None:
    """Write the PNG of `to_png` to a path; make the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_png(figure, title, **options))
