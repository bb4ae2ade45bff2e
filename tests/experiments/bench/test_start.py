"""Cold starts, each with a cache of its own."""

from experiments.bench import (
    start,
)


def test_a_start_has_a_cache_of_its_own_each_time(monkeypatch, tmp_path):
    seen = []

    def planted(environment, flags):
        cache = environment.get("JAX_COMPILATION_CACHE_DIR")
        compiling = 9.0 if cache is None else 3.0 if cache in [c for c, _ in seen] else 12.0
        seen.append((cache, flags[-1]))
        columns = dict.fromkeys(start.COLUMNS, float(len(seen)))
        return columns | {"compiling": compiling + (len(seen) > 6)}

    monkeypatch.setattr(start, "_one", planted)
    rows, notes = start.start(tmp_path, repeats=3, flags=())
    caches = [cache for cache, _ in seen]
    assert caches[::3] == [None] * 3 and caches[1::3] == caches[2::3]
    assert len(set(caches)) == 4 and len({out for _, out in seen}) == 9
    assert [(row["start"], row["end"]) for row in rows] == list(
        zip(start.KINDS, (4.0, 5.0, 6.0), strict=True)
    )
    assert [row["compiling"] for row in rows] == [9, 12, 3]
    assert notes[-1].endswith("0.25, target at most 0.333: met")
