"""A fixed sample of `fuzz_cli.py`: what people and their scripts feed the command lines."""

import pytest

from fuzz_cli import Runner, all_cases, make_files, sample_of


@pytest.mark.slow
def test_nothing_of_a_sample_is_handled_badly(tmp_path):
    runner, cases = Runner(tmp_path), all_cases(seed=0, count=0)
    assert len(cases) > 3000
    make_files(tmp_path, runner)
    assert not {case.name: bad for case in sample_of(cases, 60) if (bad := runner(case).bad)}
