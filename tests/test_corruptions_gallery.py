"""The contact sheet of the corruptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_corruptions_core import picture

from pipeline.corruptions import corrupt
from tools.gallery import Options, contact_sheet, load_square, main


def test_sheet_has_a_cell_for_every_severity(tmp_path: Path) -> None:
    Image.fromarray(picture(90, 130).numpy()).save(tmp_path / "photo.png")
    main(
        Options(tmp_path / "photo.png", tmp_path / "new" / "sheet.png", ("fog", "contrast"), side=64, cell=64)
    )
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.size == (150 + 5 * 68 + 4, 22 + 2 * 68 + 4)


def test_cells_are_what_corrupt_returns() -> None:
    image = picture(64, 64)
    sheet = np.asarray(contact_sheet(image, ("contrast",), cell=64))
    assert np.array_equal(
        sheet[22:86, 150 + 2 * 68 : 150 + 2 * 68 + 64], corrupt(image, "contrast", 3, 0).numpy()
    )


def test_bad_pictures(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"photo\.png is not there"):
        load_square(tmp_path / "photo.png", 224)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="no picture that Pillow can read"):
        load_square(tmp_path / "text.png", 224)
