"""Students apart and together."""

import pytest

from experiments.bench import population as bench_population


@pytest.mark.slow
def test_the_bench_times_students_apart_and_together(tmp_path):
    pairs = (("mlp-8-4", "mlp-6-4", (4, 4, 1)),)
    rows, notes = bench_population.population(str(tmp_path), pairs, students=2, batch=8, repeats=1)
    assert [row["programs"] for row in rows] == [2, 1]
    assert rows[0]["ratio"] == 1 and f"{rows[1]['ratio']:.2f} of one" in notes[0]
