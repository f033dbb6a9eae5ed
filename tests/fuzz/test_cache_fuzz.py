"""Random lives of growing, static and paged caches; `--cases 4000` for a long run, `--first-case 4000` for the next."""

from cache_life import Life


def test_in_every_life_a_cache_gives_what_whole_forwards_give(cases, without_shape_checks):
    for seed in cases(60):
        life = Life(seed)
        try:
            life.live()
        except Exception as error:
            raise AssertionError("\n".join([f"life {seed}:", *life.story, str(error)])) from error
