"""Write docs/when-does-it-help.md and its figures from the numbers in docs/results/regimes.

    python docs/results/regimes.py

The numbers are made by ``python -m experiments.regimes --out=docs/results/regimes``, the text is
regimes/page.txt.
"""

import pathlib

from experiments.studies.regimes import drawing

if __name__ == "__main__":
    here = pathlib.Path(__file__).parent
    drawing.write(here / "regimes", here.parent / "when-does-it-help.md")
