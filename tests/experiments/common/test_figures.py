"""Names of the user's in a figure: any letters, and no formula."""

import numpy as np
import pytest
from PIL import Image

from experiments.common import figures


@pytest.mark.slow
def test_a_name_is_neither_a_formula_nor_a_warning(tmp_path):
    """Matplotlib raises for "$a_$", and warns of letters that its font lacks."""
    assert figures.plain("$5_$ notes", 9) == r"\$5_\$ note"
    sizes = []
    for name in ("$a_$", "猫", ""):
        figure, axis = figures.subplots(figsize=(2, 2))
        axis.set_xticks([0], [figures.plain(name, 14)])
        figures.finish(figure, tmp_path / "a.png")
        sizes.append(int((np.asarray(Image.open(tmp_path / "a.png").convert("L")) < 128).sum()))
    assert min(sizes[:2]) > sizes[2]  # drawn, the one as it is, the other as a box
